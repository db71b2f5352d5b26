"""What the second layers read on calibration data: moments of it, summed up batch by batch."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxslim import _mesh
from flaxslim._spec import Site
from flaxslim.errors import CalibrationError
from flaxslim.posttraining._capture import Traced, hidden
from flaxslim.posttraining._function import Fn
from flaxslim.posttraining._kept import Kept, Sums, digest
from flaxslim.posttraining._refit import Moments

# The batch -> which of its positions count, (b, t), or none for all.
Mask = Callable[[Any], Any]
# By the path of the second kernel, the moments of each row of a site, `(s,)` of them.
BySite = dict[str, Sequence[Moments]]

_FOLDS = 4  # one of so many batches is held out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """The moments of some sites: of most of the batches, and of those held out.

    Of a single batch nothing is held out, and both are the same.
    """

    fit: BySite
    held: BySite

    def all(self, path: str) -> Sequence[Moments]:
        """The moments of a site, of all batches."""
        fit, held = self.fit[path], self.held[path]
        return fit if held is fit else [a.joined(b) for a, b in zip(fit, held, strict=True)]

    def positions(self, path: str) -> int:
        """How many were read at a site, of all batches; of its rows the most."""
        fit, held = self.fit[path], self.held[path]
        both = zip(fit, held, strict=True)
        return max(a.count + (0 if held is fit else b.count) for a, b in both)

    def pop(self, path: str) -> "Seen":
        """Those of one site, which are no longer held here."""
        fit = self.fit.pop(path)
        return Seen(fit={path: fit}, held={path: self.held.pop(path, fit)})


class Calibration:
    """Calibration data, and a function to run on it.

    Args:
      fn: `fn(params, batch) -> outputs`, pure. It is traced once for each shape of batch, and
        always called with parameters of the dense shapes.
      batches: pytrees of arrays, such as dicts of `input_ids` and `attention_mask`. All are held;
        the first axis of their arrays counts the samples.
      mask: which positions of a batch count; by default its `attention_mask`, if it has one (the
        `decoder_attention_mask` where the lengths are those of the decoder).
      kept: where the statistics are kept, for a run that goes on after this one was stopped.

    What is read is summed up in float32, float64 where JAX has it enabled, at the highest
    precision of products; the sums of batches are added in float64 on the host.

    Raises `CalibrationError` if there is no batch, or if what is read is not finite.
    """

    def __init__(
        self,
        fn: Fn,
        batches: Iterable[Any],
        *,
        params: Any,
        mask: Mask | None = None,
        kept: Kept | None = None,
    ):
        self.fn, self.mask, self.kept = fn, mask, kept
        several = isinstance(batches, Iterable) and not isinstance(batches, Mapping | str)
        if not several or hasattr(batches, "shape"):
            raise CalibrationError(
                "batches= is not several batches",
                seen=f"a {type(batches).__name__}",
                expected="a list of batches",
                mend="pass [batch]; better four or more, of which some are held out",
            )
        # A tokenizer's BatchEncoding is no pytree, but a mapping.
        batches = [dict(b) if isinstance(b, Mapping) else b for b in batches]
        for number, batch in enumerate(batches):
            _check_arrays(batch, number)
        self.batches = [jax.tree.map(_mesh.automatic, b) for b in batches]
        if not self.batches:
            raise CalibrationError(
                "there is no calibration batch",
                seen="an empty iterable",
                expected="some hundred samples: [{'input_ids': ..., 'attention_mask': ...}, ...]",
                mend="pass a list; a generator that was run through once is empty",
            )
        self._shapes: Any = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), params
        )
        self._traced: dict[Any, Traced] = {}
        self._dense = params
        self._digest = "" if kept is None else self._digested(params)

    @property
    def samples(self) -> int:
        """How many there are in all batches."""
        arrays = (jax.tree.leaves(batch) for batch in self.batches)
        return sum(next(np.shape(x)[0] for x in own if np.ndim(x)) for own in arrays)

    @property
    def running(self) -> list[str]:
        """The paths of the kernels in the order in which the function first reads them."""
        return self.traced(self.batches[0]).running

    @property
    def held_out(self) -> list[bool]:
        """Which batches are held out where something is chosen; none of a single one."""
        count = len(self.batches)
        step = min(_FOLDS, count)
        return [count > 1 and i % step == step - 1 for i in range(count)]

    def traced(self, batch: Any) -> Traced:
        """The function, traced for the shapes of a batch."""
        key = _shapes(batch)
        if key not in self._traced:
            self._traced[key] = Traced(self.fn, self._shapes, batch)
        return self._traced[key]

    def counted(self, batch: Any, lead: Sequence[int], path: str, *, steps: bool = False) -> Any:
        """Which of the samples at a site count: an array of its leading axes, or none for all.

        `steps`: those of a scan stand in front. Tokens of all samples may lie in one axis.
        """
        masks = []
        if self.mask is not None:
            masks = [self.mask(batch)]
        elif isinstance(batch, Mapping):
            decodes = "decoder" in path and "decoder_input_ids" in batch
            names = ["decoder_attention_mask"] if decodes else ["attention_mask"]
            if "decoder" not in path:
                names.append("decoder_attention_mask")
            if "pixel_values" in batch and _of_images(path, batch):
                names = []  # however many patches there are
            masks = [_of_positions(batch[name], name) for name in names if name in batch]
        front = 1 if steps else 0
        own = tuple(lead[front:])
        for mask in masks:
            if mask is not None and own[:1] == (mask.size,) and mask.ndim > 1:
                mask = mask.reshape(-1)
            if mask is not None and tuple(mask.shape) == own[: mask.ndim]:
                ones = (1,) * (len(own) - mask.ndim)
                return jnp.broadcast_to(mask.reshape(*(1,) * front, *mask.shape, *ones), lead)
        return None

    def moments(
        self,
        sites: Sequence[Site],
        params: Any,
        dense: Any = None,
        *,
        told: Callable[[int], None] = lambda done: None,
    ) -> Seen:
        """What the second layers of some sites read with `params`.

        And where `dense` is given, how that goes along with what they read with those.
        `told` is called after each batch with their number.
        """
        sums = self._summed(sites, params, dense, told)
        for path in sums[False]:
            _check(path, [own[path] for own in sums.values()])
        fit = _by_row(sums[False])
        return Seen(fit=fit, held=_by_row(sums[True]) if True in sums else fit)

    def _summed(
        self,
        sites: Sequence[Site],
        params: Any,
        dense: Any,
        told: Callable[[int], None],
    ) -> Sums:
        """The sums of all batches, from where a run that was stopped came to."""
        kept = self.kept if dense is None else None
        pruned = {} if params is self._dense else params
        key = (
            ""
            if kept is None
            else digest(self._digest, [site.second.path for site in sites], pruned)
        )
        start, sums = (0, {}) if kept is None else kept.load(key)
        done, whole = start, True
        programs: dict[Any, Any] = {}  # by the shapes of a batch; they serve no other pass
        told(done)
        try:
            for batch, held in list(zip(self.batches, self.held_out, strict=True))[start:]:
                found = jax.device_get(self._sum(programs, sites, params, dense, batch))
                whole = False
                _add(sums.setdefault(held, {}), found)
                done, whole = done + 1, True
                told(done)
        finally:
            if kept is not None and whole and done > start:
                kept.save(key, done, sums)
        return sums

    def _digested(self, params: Any) -> str:
        """Of all that decides what a pass over the dense model finds."""
        shapes = {str(_shapes(batch)): batch for batch in self.batches}
        programs = {shape: self.traced(batch).program for shape, batch in shapes.items()}
        masks = [self.mask(batch) for batch in self.batches] if self.mask is not None else []
        where = f"{_wide()} {jax.default_backend()} {jax.__version__}"
        return digest(programs, params, self.batches, masks, where)

    def _sum(
        self, programs: dict[Any, Any], sites: Sequence[Site], params: Any, dense: Any, batch: Any
    ) -> Any:
        key = _shapes(batch)
        if key not in programs:
            programs[key] = jax.jit(self._summing(sites, batch))
        return programs[key](params, dense, batch)

    def _summing(self, sites: Sequence[Site], batch: Any) -> Any:
        traced = self.traced(batch)
        wanted = {site.second.path for site in sites}

        def sums(params: Any, dense: Any, batch: Any) -> dict[str, list[Any]]:
            reads = traced(params, batch, wanted)[1]
            others = None if dense is None else traced(dense, batch, wanted)[1]
            return {site.second.path: self._of_site(site, reads, others, batch) for site in sites}

        return sums

    def _of_site(self, site: Site, reads: Any, others: Any, batch: Any) -> list[Any]:
        """Sums over samples: x x^T, x, how many; and x y^T, y, y y^T."""
        xs = hidden(site, reads)
        ys = xs if others is None else hidden(site, others)
        total: list[Any] = []
        path = site.second.path
        own = [read for read in reads if read.path == path]
        for x, y, read in zip(xs, ys, own, strict=True):
            s, m = x.shape[0], x.shape[-1]
            steps = read.scanned and not read.scanned_kernel
            counted = self.counted(batch, x.shape[1:-1], path, steps=steps)
            if counted is None and self.mask is not None and (mask := self.mask(batch)) is not None:
                raise CalibrationError(
                    "the mask does not fit what is read here",
                    path=path,
                    seen=f"a mask of shape {tuple(mask.shape)} for samples of {x.shape[1:-1]}",
                    mend="mask(batch) -> which positions count, (b, t)",
                )
            if counted is None:
                weights = jnp.ones((s, x[0, ..., 0].size), _wide())
            else:
                weights = jnp.broadcast_to(counted.reshape(1, -1), (s, counted.size)).astype(
                    _wide()
                )
            on = weights[..., None] > 0  # padding may be infinite, or no number
            x = jnp.where(on, x.reshape(s, -1, m).astype(_wide()), 0)
            parts = [_product(x, x), x.sum(1), weights.sum(1)]
            if others is not None:
                y = jnp.where(on, y.reshape(s, -1, m).astype(_wide()), 0)
                parts += [_product(x, y), y.sum(1), _product(y, y)]
            total = parts if not total else [a + b for a, b in zip(total, parts, strict=True)]
        return total


def _of_images(path: str, batch: Mapping[str, Any]) -> bool:
    """Whether a layer reads images, of a model that reads texts too."""
    return "vision" in path or ("decoder" not in path and "input_ids" not in batch)


def side_of(keys: Any) -> str:
    """The path of an output, by which it is known what its positions are.

    What is not said to be of an encoder is what a decoder puts out, where there is one.
    """
    path = jax.tree_util.keystr(keys)
    return path if "encoder" in path else f"decoder{path}"


def _of_positions(mask: Any, name: str) -> Any:
    """A mask `(b, t)`; one of `(b, 1, 1, t)`, as attention adds it, says the same."""
    if mask.ndim > 2:
        mask = mask.reshape([n for i, n in enumerate(mask.shape) if i == 0 or n > 1])
    if mask.ndim > 2:
        raise CalibrationError(
            "it does not follow from this mask which positions count",
            path=name,
            seen=f"shape {tuple(mask.shape)}",
            expected="(b, t)",
            mend="say which count: prune(..., mask=lambda batch: ...) -> (b, t)",
        )
    return mask


def _check_arrays(batch: Any, number: int) -> None:
    """Raise `CalibrationError` unless a batch holds arrays, one of them with an axis of samples."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    others = [(keys, x) for keys, x in leaves if not hasattr(x, "shape")]
    if others or not any(np.ndim(x) for _, x in leaves):
        keys, x = (others or leaves or [((), None)])[0]
        raise CalibrationError(
            "a batch is a tree of arrays, whose first axis counts samples",
            path=f"batches[{number}]{jax.tree_util.keystr(keys)}",
            seen=f"{x!r}"[:60],
            expected="arrays",
            mend='np.asarray(...) makes one of lists; tokenizer(texts, return_tensors="np", '
            "padding=True)",
        )


def _add(sums: dict[str, list[np.ndarray]], found: Mapping[str, Sequence[Any]]) -> None:
    """In place, in float64: the sums of a large model leave no room for others beside them."""
    for path, parts in found.items():
        if path not in sums:
            sums[path] = [np.array(x, np.float64) for x in parts]
            continue
        for own, x in zip(sums[path], parts, strict=True):
            own += x


def _wide() -> Any:
    return jnp.result_type(float)


def _product(x: Any, y: Any) -> Any:
    return jnp.einsum("snm,snk->smk", x, y, precision=jax.lax.Precision.HIGHEST)


def _shapes(batch: Any) -> Any:
    leaves, treedef = jax.tree.flatten(batch)
    return treedef, tuple((np.shape(x), str(getattr(x, "dtype", type(x)))) for x in leaves)


def _by_row(sums: dict[str, list[np.ndarray]]) -> BySite:
    """The means of the sums, in their place: there are too many for two of each."""
    found: BySite = {}
    for path, (products, once, counts, *more) in sums.items():
        rows = []
        for i, count in enumerate(counts):
            means = [part[i] for part in (products, once, counts, *more)]
            for mean in (means[0], means[1], *means[3:]):
                mean /= max(float(count), 1.0)
            cross = {"xy": means[3], "y": means[4], "yy": means[5]} if more else {}
            rows.append(Moments(xx=means[0], x=means[1], count=int(count), **cross))
        found[path] = rows
    return found


def _check(path: str, sums: Sequence[Sequence[np.ndarray]]) -> None:
    """Raise `CalibrationError` unless the sums of a site are finite, and of something."""
    if not all(np.isfinite(part).all() for parts in sums for part in parts):
        finite = [np.isfinite(parts[1]).all(0) for parts in sums]
        channels = np.flatnonzero(~np.all(finite, axis=0))
        raise CalibrationError(
            "what this layer reads on the calibration data is not finite",
            path=path,
            seen=f"NaN or infinity in {len(channels)} channels, the first {channels[:5].tolist()}",
            mend="look for what makes the model overflow: wrong inputs, or float16 where float32 "
            "is needed (fn decides in what it computes)",
        )
    if not max(parts[2].max(initial=0) for parts in sums):
        raise CalibrationError(
            "no position of the calibration data counts",
            path=path,
            seen="a mask of zeros",
            mend="pass an attention_mask with ones where there is text",
        )
