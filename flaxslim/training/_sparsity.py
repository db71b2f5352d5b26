"""`sparsity`: what an optimizer state says about the channels of a model, at any step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from flaxslim import _mesh, _tree
from flaxslim._copies import of_channels, splits
from flaxslim.errors import TrainingError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteChannels:
    """The channels of one site (of a stacked one, of all its rows together).

    Attributes:
      alive: bool `(s, f)`; score: float32 `(s, f)`.
      gone: how many each row has lost to `shrink`.
    """

    alive: np.ndarray
    score: np.ndarray
    gone: int

    @property
    def whole(self) -> int:
        """How many channels there were at first."""
        return self.alive.size + self.gone * len(self.alive)

    @property
    def dead(self) -> int:
        """How many are dead, those that were cut among them."""
        return self.whole - int(self.alive.sum())

    @property
    def width(self) -> int:
        """How many of a row have to stay: as many as live in the fullest."""
        return int(self.alive.sum(-1).max(initial=0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsity:
    """How far pruning has come. `str()` is a table.

    Attributes:
      sites: what is known of the channels, by the path of the second kernel of each site.
      skipped: how many scores were not finite, so that they did not count.
    """

    sites: Mapping[str, SiteChannels]
    skipped: int = 0

    @property
    def total(self) -> float:
        """The share of all channels that is dead, of those that there were at first."""
        whole = sum(site.whole for site in self.sites.values())
        return sum(site.dead for site in self.sites.values()) / max(whole, 1)

    @property
    def widths(self) -> dict[str, int]:
        """How many channels live, by the path of the second kernel of each site."""
        return {path: site.width for path, site in self.sites.items()}

    def __str__(self) -> str:
        rows = [("second kernel", "channels", "dead", "alive")]
        rows += [
            (path, f"{s.whole:,}", f"{s.dead:,}", f"{s.whole - s.dead:,}")
            for path, s in self.sites.items()
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))])
            for row in rows
        ]
        lines.append(f"{self.total:.1%} of the channels are dead")
        if self.skipped:
            lines.append(
                f"note: {self.skipped:,} scores were not finite (NaN gradients?): they did not "
                "count, and nothing died by them"
            )
        return "\n".join(lines)


def sparsity(opt_state: Any) -> Sparsity:
    """Which channels are alive, from the state of `flaxslim.pruning` wherever it stands in a tree.

    `opt_state` is that state, or anything with it inside: a chain's state, a `TrainState`, an
    `nnx.Optimizer`. Fetches a bool and a number for each channel.

    Raises `TrainingError` if there is none, or more than one, or if it is replicated.

    >>> import optax
    >>> from flaxslim import Pair, Spec, one_shot, pruning
    >>> MLP = Spec(name="MLP", pairs=Pair(first="up", second="down"))
    >>> params = {"up": {"kernel": np.diag([1.0, 2.0])}, "down": {"kernel": np.ones((2, 3))}}
    >>> print(sparsity(pruning(optax.sgd(0.1), MLP, one_shot(0.5)).init(params)))
    second kernel  channels  dead  alive
    down/kernel           2     0      2
    0.0% of the channels are dead
    """
    leaves = _tree.flatten(opt_state)
    found: dict[str, dict[str, Any]] = {}
    counts: dict[str, Any] = {}
    for path, leaf in leaves.items():
        # A layer may be called so too, but has no count beside it.
        for head, rest in splits(path):
            count = leaves.get(f"{head}/skipped" if head else "skipped")
            site = of_channels(rest.removeprefix("channels/"))
            if count is not None and site is not None and rest.startswith("channels/"):
                second, part = site
                found.setdefault(second, {})[part] = _mesh.host(leaf)
                counts[head] = _mesh.host(count)
                break
    if not found:
        raise TrainingError(
            "there is no state of flaxslim.pruning in this tree",
            seen=f"a {type(opt_state).__name__} with {len(leaves)} leaves",
            mend="make the optimizer with tx = flaxslim.pruning(optax.adamw(3e-5), spec, "
            "schedule), and pass tx.init(params) or what became of it",
        )
    if len(counts) > 1:
        raise TrainingError(
            "there are several states of flaxslim.pruning in this tree",
            seen=", ".join(head or "(top)" for head in counts),
            mend="pass one of them",
        )
    (skipped,) = counts.values()
    if skipped.ndim:
        raise TrainingError(
            "the state is replicated, one for each device",
            seen=f"a count of shape {skipped.shape}",
            mend="flax.jax_utils.unreplicate it first",
        )
    sites = {
        path: SiteChannels(alive=own["alive"], score=own["score"], gone=int(own["gone"]))
        for path, own in found.items()
    }
    return Sparsity(sites=sites, skipped=int(skipped))
