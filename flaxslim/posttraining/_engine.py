"""The passes over the sites: what would be lost at each, and then what is done about it."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxslim import _mesh, _tree
from flaxslim._spec import Site
from flaxslim.errors import CalibrationWarning
from flaxslim.posttraining import _allocate, _fisher
from flaxslim.posttraining._calibration import Calibration, Seen
from flaxslim.posttraining._distance import Distance
from flaxslim.posttraining._gradient import Objective, gradient_rows
from flaxslim.posttraining._method import FOLD_MEANS, Method
from flaxslim.posttraining._rank import (
    Ranking,
    alive_of,
    count_of,
    rank,
    relative,
    takes_gradients,
    takes_mean,
    units_of,
)
from flaxslim.posttraining._refit import Moments, energy, error, kernels, read_matrix, refit
from flaxslim.posttraining._report import Row
from flaxslim.posttraining._tune import split
from flaxslim.training._channels import together

# (what is done, how much of it, of how much)
Progress = Callable[[str, int, int], None]
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
_RIDGE = 1e-2
_STAGES = 3  # of a sequential refit: each is a pass over the data
_ENOUGH = 128  # outputs, to tell which of four ridges is best
_TRIED = 8  # batches on which the effect of a site is measured
_NOTHING = 1e-9  # a relative error that rounding makes too


@dataclasses.dataclass(kw_only=True)
class Engine:
    """The two passes over the sites: what would be lost, and then what is done.

    Where each site is ranked by what it reads in the network as it is pruned by then, and no width
    depends on what the others lose, there is only the second.
    """

    calibration: Calibration
    method: Method
    dense: Any
    leaves: Mapping[str, Any]
    objective: Objective | None
    seed: int
    told: Progress
    low_memory: bool
    distance: Distance | None = None  # of the outputs, where errors of sites are to be compared
    positions: int = 0
    seen: Seen | None = None  # in the first pass, where that is not all that is read
    alive: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    gradients: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    biases: dict[str, Any] = dataclasses.field(default_factory=dict)
    few: bool = False  # whether it was told that there is too little data

    @property
    def ridge(self) -> float:
        """Of the order, and of the refit where none is chosen."""
        return _RIDGE if self.method.ridge is None else self.method.ridge

    def in_turn(self, sites: Sequence[Site]) -> bool:
        """Whether each site is ranked when its turn comes."""
        apart = all(site.tied is None for site in sites)
        return self.method.sequential != "no" and apart and not takes_gradients(self.method.score)

    def rankings(self, sites: Sequence[Site]) -> dict[str, Ranking]:
        """Of each site, by what it reads in the dense model."""
        by_masks = self.method.score == "fisher_mask"
        found, seen = (self._by_masks(sites), None) if by_masks else self._by_moments(sites)
        for own in together(sites):
            if len(own) < 2:
                continue
            orders = _shared_orders([found[site.second.path] for site in own])
            found |= {s.second.path: self._along(orders, found[s.second.path], seen) for s in own}
        return found

    def _along(self, orders: np.ndarray, ranking: Ranking, seen: Seen | None) -> Ranking:
        """The ranking with other orders, and what is lost along these."""
        site, path = ranking.site, ranking.site.second.path
        if path in self.gradients:
            return _fisher.search(site, self.gradients[path], orders)
        read = self._moments([site], self.dense) if seen is None else seen
        new = self._rank(site, self._of(read, site)[2], orders=orders)
        return dataclasses.replace(new, effect=ranking.effect)

    def _by_moments(self, sites: Sequence[Site]) -> tuple[dict[str, Ranking], Seen | None]:
        """And what they are made of, where that is held of all sites."""
        found: dict[str, Ranking] = {}
        seen = None
        rows = self._gradient_rows(sites)
        for part in [[site] for site in sites] if self.low_memory else [list(sites)]:
            seen = self._moments(part, self.dense)
            for site in part:
                self.told("ranking", len(found), len(sites))
                own, path = self._of(seen, site), site.second.path
                ranking = self._rank(site, own[2], rows.get(path))
                found[path] = dataclasses.replace(ranking, effect=self._effect(ranking, own))
            if not self.low_memory and self.method.sequential == "no":
                self.seen = seen
        self.told("ranking", len(sites), len(sites))
        return found, None if self.low_memory else seen

    def shared(
        self,
        rankings: Mapping[str, Ranking],
        shares: Mapping[str, float],
        *,
        width: str,
        multiple_of: int | Mapping[str, int],
    ) -> dict[str, int]:
        """How many units each site keeps, by a share of the parameters of all."""
        sites = [ranking.site for ranking in rankings.values()]
        each = {site.second.path: _allocate.parameters_of(site) for site in sites}
        counts, _ = _allocate.by_budget(
            rankings,
            limit=sum(shares[s.pair.axis] * each[s.second.path] * count_of(s) for s in sites),
            fixed=0.0,
            cost=lambda site, numbers: each[site.second.path] * numbers,
            unit="parameters",
            width=width,
            multiple_of=multiple_of,
        )
        return counts

    def pruned(
        self, sites: Sequence[Site], rankings: Mapping[str, Ranking], counts: Mapping[str, int]
    ) -> tuple[Any, dict[str, Row]]:
        """The dense shapes with zeros, and what that does at each site, by path."""
        tree, rows = self.dense, {}
        anew = self.in_turn(sites)
        for stage in self._stages(sites):
            for site, seen in self._read(stage, tree):
                path = site.second.path
                self.told("refitting", len(rows), len(sites))
                own = self._of(seen, site)
                ranking = self._rank(site, own[2]) if anew else rankings[path]
                if path in self.gradients and site.tied is None:
                    ranking = _fisher.rearranged(ranking, self.gradients[path], counts[path])
                kept = ranking.kept(counts[path])
                self.positions = max(self.positions, seen.positions(path))
                new, measured, ridge = self._compensated(site, own, kept)
                tree = _tree.replace(tree, new)
                self.alive[path] = alive_of(site, kept)
                gone = count_of(site) - counts[path]
                rows[path] = Row(
                    path=path,
                    unit=site.pair.unit,
                    before=site.size * site.rows,
                    after=int(self.alive[path].sum()),
                    predicted=None if path in self.gradients else float(ranking.relative[gone]),
                    measured=measured,
                    ridge=ridge,
                )
        self.told("refitting", len(sites), len(sites))
        return tree, rows

    # --- in the first pass --------------------------------------------------------------------

    def _effect(self, ranking: Ranking, own: Any) -> float:
        """By trying: a quarter of the units of this site alone goes, and it is refitted."""
        site, count = ranking.site, count_of(ranking.site)
        if self.distance is None or count < 2:
            return 1.0
        apart = dataclasses.replace(self, biases={})
        kept = ranking.kept(min(-(-count * 3 // 4), count - 1))
        new, error, _ = apart._compensated(site, own, kept)
        if error <= _NOTHING:
            return 1.0
        batches = (split(self.calibration)[1] or self.calibration.batches)[:_TRIED]
        found = self.distance.mean(_tree.replace(self.dense, new), self.dense, batches)
        return max(found, _NOTHING) / error  # or more would go than the budget asks for

    def _by_masks(self, sites: Sequence[Site]) -> dict[str, Ranking]:
        count = len(self.calibration.batches)
        self.gradients = _fisher.mask_gradients(
            self.calibration,
            self.dense,
            sites,
            self.objective,
            seed=self.seed,
            told=lambda done: self.told("gradients by masks", done, count),
        )
        return {
            site.second.path: _fisher.search(site, self.gradients[site.second.path])
            for site in sites
        }

    def _gradient_rows(self, sites: Sequence[Site]) -> Mapping[str, np.ndarray]:
        """What the channels score, if the score takes gradients."""
        score, count = self.method.score, len(self.calibration.batches)
        if not takes_gradients(score):
            return {}
        return gradient_rows(
            self.calibration,
            self.dense,
            sites,
            score,
            self.objective,
            seed=self.seed,
            told=lambda done: self.told("gradients", done, count),
        )

    def _moments(self, sites: Sequence[Site], tree: Any) -> Seen:
        """What the sites read in the network as it is by now."""
        count = len(self.calibration.batches)
        begun = tree is not self.dense
        return self.calibration.moments(
            sites,
            tree,
            self.dense if begun and self.method.sequential == "outputs" else None,
            told=lambda done: self.told("calibration", done, count),
        )

    def _rank(
        self,
        site: Site,
        moments: Sequence[Moments],
        rows: np.ndarray | None = None,
        orders: np.ndarray | None = None,
    ) -> Ranking:
        """The ranking of a site by what it reads.

        Where the refit aims at what the dense model puts out, the greedy order starts from the
        second layer that comes nearest to it.
        """
        self._warn_of_few(site, moments)
        start = None
        if self.method.score == "obs" and moments[0].xy is not None:
            old = read_matrix(site, self.leaves)
            whole = np.arange(old.shape[1])
            start = [
                refit(_centred(site, m), w, whole, ridge=self.ridge)
                for m, w in zip(moments, old, strict=True)
            ]
        return rank(
            site,
            moments,
            self.leaves,
            score=self.method.score,
            ridge=self.ridge,
            rows=rows,
            orders=orders,
            refitted=start,
            seed=self.seed,
        )

    # --- in the second ------------------------------------------------------------------------

    def _stages(self, sites: Sequence[Site]) -> list[Sequence[Site]]:
        """The sites that are looked at together, in the order of the network."""
        count = {"no": 1, "weights": _STAGES, "outputs": len(sites)}[self.method.sequential]
        size = -(-len(sites) // count)
        return [sites[i : i + size] for i in range(0, len(sites), size)]

    def _read(self, stage: Sequence[Site], tree: Any) -> Iterator[tuple[Site, Seen]]:
        """What each site of a stage reads."""
        for part in [[site] for site in stage] if self.low_memory else [stage]:
            seen = self._moments(part, tree) if self.seen is None else self.seen
            yield from ((site, seen.pop(site.second.path)) for site in part)

    def _of(self, seen: Seen, site: Site) -> tuple[Any, Any, Any]:
        """The moments of a site: of most batches, of those held out, and those to refit by.

        What is tuned afterwards must not know what is held out, or it seems to become worse; nor
        what is compared with it.
        """
        path = site.second.path
        every = seen.fit[path] if self.method.holds_out else seen.all(path)
        return seen.fit[path], seen.held[path], every

    def _compensated(
        self, site: Site, seen: Any, kept: Sequence[np.ndarray]
    ) -> tuple[dict[str, Any], float, float | None]:
        """The new second layer of a site by path, its relative error, and the ridge."""
        fit, held, every = seen
        old = read_matrix(site, self.leaves)
        units = units_of(site)
        folds = takes_mean(site) and self.method.compensation in FOLD_MEANS
        new, ridges, shifts = np.zeros_like(old), [], []
        wrong = total = 0.0
        for i, w in enumerate(old):
            inner = np.flatnonzero(np.isin(units, kept[i]))
            if self.method.compensation == "refit":
                ridge = self.method.ridge
                if ridge is None:
                    ridge = self._ridge(site, fit[i], held[i], w, inner)
                new[i] = refit(_centred(site, every[i]), w, inner, ridge=ridge)
                ridges.append(ridge)
            elif self.method.compensation == "scale":
                new[i] = _fisher.scaled(every[i], w, site, kept[i], ridge=self.ridge)
            else:
                new[i][inner] = w[inner]
            m = every[i]
            y = m.x if m.y is None else m.y
            shifts.append(y @ w - m.x @ new[i] if folds else np.zeros(w.shape[1]))
            wrong += error(m.centred() if folds else m, w, new[i])
            total += energy(_centred(site, m), w)
        changed = {path: _like(x, self.leaves[path]) for path, x in kernels(site, new).items()}
        if folds:
            bias = site.second_bias
            assert bias is not None
            shift = _bias(site, np.stack(shifts))
            leaf = self.biases.get(bias.path, self.leaves[bias.path])  # two sites may share one
            changed[bias.path] = _like(np.asarray(leaf).astype(np.float64) + shift, leaf)
            self.biases[bias.path] = changed[bias.path]
        return changed, relative(wrong, total), max(ridges, default=None)

    def _ridge(
        self, site: Site, fit: Moments, held: Moments, w: np.ndarray, inner: np.ndarray
    ) -> float:
        """The ridge that is best on what is held out, at some of the outputs if there are many."""
        if held is fit:
            return _RIDGE
        own, other = _centred(site, fit), _centred(site, held)
        w = w[:, :: max(1, w.shape[1] // _ENOUGH)]
        errors = [error(other, w, refit(own, w, inner, ridge=ridge)) for ridge in _RIDGES]
        return _RIDGES[int(np.argmin(errors))]

    def _warn_of_few(self, site: Site, moments: Sequence[Moments]) -> None:
        count, m = min(m.count for m in moments), len(moments[0].x)
        if count < m and not self.few:
            self.few = True  # as other sites will be
            warnings.warn(
                f"{count:,} calibration positions for {m:,} hidden channels at "
                f"{site.second.path}: what they read is known along so many directions only, and "
                "the ridge decides about the others. Give more data (samples=, longer texts), or a "
                "larger ridge (Method(ridge=0.1))",
                CalibrationWarning,
                stacklevel=4,
            )


def _shared_orders(own: Sequence[Ranking]) -> np.ndarray:
    """Of sites that must keep the same channels, `(s, u)`: by what they lose in the sum."""
    lost = np.zeros_like(own[0].errors[1:], shape=own[0].orders.shape)
    for ranking in own:
        steps = np.diff(ranking.relative)
        for row, order in zip(lost, ranking.orders, strict=True):
            row[order] += steps
    return np.argsort(lost, axis=1, kind="stable")


def _centred(site: Site, moments: Moments) -> Moments:
    return moments.centred() if takes_mean(site) else moments


def _like(x: np.ndarray, leaf: Any) -> Any:
    if _mesh.on_mesh(leaf):
        return _mesh.put(x.reshape(leaf.shape), like=leaf)
    new = jnp.asarray(x.reshape(np.shape(leaf)), leaf.dtype)
    return jax.device_put(new, leaf.sharding) if leaf.committed else new


def _bias(site: Site, shift: np.ndarray) -> np.ndarray:
    """Shifts `(s, o)` in the shape of the second bias."""
    bias = site.second_bias
    assert bias is not None
    axes, sizes = bias.axes, bias.axes.sizes(bias.shape)
    order = [axes.position(name) for name in axes.stack]
    order += [i for i in range(len(axes.factors)) if i not in order]
    shape = [f if isinstance(f, int) else sizes[f] for f in axes.factors]
    return shift.reshape([shape[i] for i in order]).transpose(np.argsort(order)).reshape(bias.shape)
