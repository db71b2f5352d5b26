"""`shrink`: dead channels cut from a model in training, and from all that was made for it."""

import logging
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from flaxslim import _mesh, _tree
from flaxslim._apply import apply
from flaxslim._copies import Names, copies
from flaxslim._draw import draw
from flaxslim._kinds import is_whole
from flaxslim._plan import Plan
from flaxslim._slim import carried_out
from flaxslim._spec import SpecLike
from flaxslim.errors import NothingRemovedWarning, TrainingError
from flaxslim.training._sparsity import SiteChannels, Sparsity, sparsity

_log = logging.getLogger("flaxslim")


def shrink(
    params: Any,
    opt_state: Any = None,
    cfg: Any = None,
    spec: SpecLike = None,
    *,
    width: str = "uniform",
    multiple_of: int | Mapping[str, int] = 1,
) -> tuple[Any, Any, Any]:
    """Cut the dead channels from the parameters and from the state of their optimizer.

    Training goes on as if nothing had happened, only faster: a step function under `jax.jit` is
    compiled anew by itself, since the shapes are others. A stock class needs the new config
    (`flaxslim.module(cls, cfg)`, `flaxslim.layout`), and `pruning` too once heads were cut.

    Args:
      params: the parameters; or a `TrainState` or the like, with fields `params` and `opt_state`,
        that is cut whole; or an nnx module.
      opt_state: what was made for them: the state of `flaxslim.pruning` (the schedule goes on to
        count from the first widths), of any other optimizer, an `nnx.Optimizer`, an average of the
        parameters, or a tuple of such.
      cfg, spec, width, multiple_of: as in `flaxslim.slim`. On a mesh a width is one that the arrays
        of the state can be split by, too.

    Returns: `(params, opt_state, cfg)`, each of the kind that went in. If nothing is dead they are
    what went in, and a `NothingRemovedWarning` says so. The logger "flaxslim" tells what went.

    Raises: what `slim` and `apply(plan, tree, like=params)` raise, among it `PlanError` for an
    inner state that cannot be cut, `WidthError` for a config that can say no smaller width and
    `TracedError` under `jax.jit`; and `TrainingError` for channels that are zero without being
    pruned, or pruned without being zero. It warns of heads that are left in groups of unequal size.

    >>> import optax
    >>> from flaxslim import Pair, Spec, one_shot, pruning
    >>> MLP = Spec(name="MLP", pairs=Pair(first="up", second="down", width="hidden"))
    >>> params = {"up": {"kernel": np.diag([1.0, 2.0])}, "down": {"kernel": np.ones((2, 3))}}
    >>> tx = pruning(optax.adam(0.1), MLP, one_shot(0.5))
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> params, state, cfg = shrink(params, state, {"hidden": 2}, MLP)
    >>> params["up"]["kernel"].shape, state.inner_state[0].mu["up"]["kernel"].shape, cfg
    ((2, 1), (2, 1), {'hidden': 1})
    """
    whole = _parameters_of(params)
    plan = draw(
        whole,
        cfg,
        spec,
        width=width,
        multiple_of=multiple_of,
        beside=_in_shards(whole, (params, opt_state)),
    )
    _check_pruned(plan, (params, opt_state))
    small, new = carried_out(plan, params, cfg, like=None if whole is params else whole)
    if opt_state is not None and plan.removed:
        opt_state = apply(plan, opt_state, like=whole)
    if plan.removed and any(len({*cut.groups}) > 1 for cut in plan.cuts):
        warnings.warn(
            "groups of heads are of unequal size now, as only the new config tells: call "
            "flaxslim.pruning again with it (the state stays)",
            stacklevel=2,
        )
    return small, opt_state, new


def _parameters_of(tree: Any) -> Any:
    """The parameters in a `TrainState`, or the tree itself."""
    if hasattr(tree, "opt_state") and hasattr(tree, "params"):
        return tree.params
    return tree


def _in_shards(params: Any, trees: Iterable[Any]) -> dict[str, list[Any]]:
    """The arrays on a mesh that follow a parameter, by its path: moments may lie otherwise."""
    found: dict[str, list[Any]] = {}
    names = Names(_tree.flatten(params))
    for tree in trees:
        leaves = {} if tree is None else _tree.flatten(tree)
        if not any(map(_mesh.on_mesh, leaves.values())):
            continue
        for copy in copies(tree, leaves, names, fold=True):
            for name, path in copy.arrays(leaves).items():
                found.setdefault(name, []).append(leaves[path])
    return found


def _check_pruned(plan: Plan, trees: Any) -> None:
    """Raise `TrainingError` unless the channels that are dead are those that were pruned.

    Some happen to be zero, but would have trained on; some were pruned, and are not zero.
    """
    known = _known(trees)
    if known is None:
        return
    living = revived = 0
    for cut in plan.cuts:
        if (site := _of(cut.site.second.path, known)) is not None:
            alive = site.alive.copy()
            revived += max(int((~alive).sum()) - cut.dead, 0)
            np.put_along_axis(alive, cut.kept, False, axis=-1)
            living += int(alive.sum())
    if revived:
        raise TrainingError(
            f"{revived} channels were pruned, and are not zero",
            seen="an update that changed them after `pruning` (weight decay in a chain around it, "
            "an average of the parameters), or parameters of another step than the state",
            mend="put pruning around everything that updates the parameters: "
            "pruning(optax.chain(optax.adam(...), optax.add_decayed_weights(...)), spec, schedule)",
        )
    if living:
        raise TrainingError(
            f"{living} channels are dead, but not by pruning: they would train on",
            seen="a second layer that starts at zero, or another cause of zeros (group lasso)?",
            mend="shrink after the first steps; or cut them all the same: "
            "p = flaxslim.plan(params, cfg, spec), flaxslim.slim(params, cfg, plan=p), "
            "flaxslim.apply(p, opt_state, like=params)",
        )


def _of(path: str, known: Sparsity) -> SiteChannels | None:
    """What is known of a site; the state may be of the tree in or around these parameters."""
    if path in known.sites:
        return known.sites[path]
    found = [
        site
        for other, site in known.sites.items()
        if path.endswith(f"/{other}") or other.endswith(f"/{path}")
    ]
    return found[0] if len(found) == 1 else None


def _known(trees: Any) -> Sparsity | None:
    for tree in trees:
        try:
            return sparsity(tree)
        except TrainingError:
            continue
    return None


class ShrinkEvery:
    """Calls `shrink` every so many steps, but only if a width has become smaller.

    Each other width means another compilation, so widths are rounded up to `multiple_of`. It tells
    the logger "flaxslim" what went and, once it has seen `steps` steps without a compilation on
    either side, how much faster a step has become. It counts its own calls, which no checkpoint
    knows: make it anew at a multiple of `steps`, or a resumed loop shrinks at others.

    Args:
      steps: look every so many calls.
      spec, width, multiple_of: as in `shrink`.

    >>> import optax
    >>> from flaxslim import Pair, Spec, one_shot, pruning
    >>> MLP = Spec(name="MLP", pairs=Pair(first="up", second="down", width="hidden"))
    >>> params = {"up": {"kernel": np.diag([1.0, 2.0])}, "down": {"kernel": np.ones((2, 3))}}
    >>> tx = pruning(optax.adam(0.1), MLP, one_shot(0.5, at=1))
    >>> state, cfg, shrinking = tx.init(params), {"hidden": 2}, ShrinkEvery(2, MLP)
    >>> for step in range(4):
    ...     updates, state = tx.update(params, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     params, state, cfg = shrinking(params, state, cfg)
    ...     if shrinking.changed:
    ...         print(step, cfg)  # here a loop makes what depends on the config anew
    1 {'hidden': 1}
    """

    def __init__(
        self,
        steps: int,
        spec: SpecLike = None,
        *,
        width: str = "uniform",
        multiple_of: int | Mapping[str, int] = 1,
    ):
        if not is_whole(steps) or steps < 1:
            raise TrainingError(
                "shrink every how many steps?",
                seen=repr(steps),
                expected="a whole number, 1 or more",
            )
        self.steps, self.spec, self.width, self.multiple_of = steps, spec, width, multiple_of
        self.changed = False
        self._calls = 0
        self._widths: Mapping[str, int] | None = None
        self._since: float | None = None
        self._compiles = True
        self._before: float | None = None
        self._after: float | None = None

    def __call__(self, params: Any, opt_state: Any, cfg: Any = None) -> tuple[Any, Any, Any]:
        """The three, smaller perhaps; then `changed` is true until the next call."""
        self._calls += 1
        self.changed = False
        if self._calls % self.steps:
            return params, opt_state, cfg
        jax.block_until_ready([*_tree.flatten(params).values()])
        self._clock()
        known = _known((opt_state, params))
        widths = None if known is None else known.widths
        if known is not None and (widths == self._widths or not known.total):
            return params, opt_state, cfg
        with warnings.catch_warnings():
            # Widths that are rounded often stay as they are, which is no fault.
            warnings.simplefilter("ignore", NothingRemovedWarning)
            found = shrink(
                params, opt_state, cfg, self.spec, width=self.width, multiple_of=self.multiple_of
            )
        self._widths = widths
        self.changed = found[0] is not params
        if self.changed:
            self._before, self._after = self._after or self._before, None
            self._compiles = True
        self._since = time.perf_counter()
        return found

    @property
    def speedup(self) -> float | None:
        """How many times as fast a step is as before the last cut; None until that is known."""
        if self._before is None or self._after is None:
            return None
        return self._before / self._after

    def _clock(self) -> None:
        """Take the time of the steps since it looked last, if none of them was compiled."""
        now = time.perf_counter()
        if self._since is not None and not self._compiles:
            first, self._after = self._after is None, (now - self._since) / self.steps
            if first and self.speedup is not None:
                _log.info("a step takes %.1f ms, %.2fx as fast", 1e3 * self._after, self.speedup)
        self._compiles, self._since = False, now
