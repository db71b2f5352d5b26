"""The bits of floating point arrays: which entries are zero, and which are no numbers.

Both are read off bit patterns without their sign. Zero is the pattern 0: a comparison of floats
would take subnormal numbers for zero in XLA's CPU code. And the patterns of infinity and NaN are
above that of the largest number, so one pass over a kernel answers both questions.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flaxslim import _mesh, _tree
from flaxslim._axes import Axes
from flaxslim._lazy import Lazy
from flaxslim._spec import Tensor
from flaxslim.errors import NonFiniteError, TracedError

# How many entries along an axis are looked at before all of them are.
_SAMPLE = 16

# The unsigned integer of each width.
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Not among them: types whose NaN is the pattern of minus zero, and would read as zero.
FLOATS = tuple(
    jnp.dtype(name)
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
)


def unsigned(leaf: Any) -> Any:
    """The bits of an array as unsigned integers, where the array is; no copy on the host."""
    if isinstance(leaf, jax.Array) and all(d.platform != "cpu" for d in leaf.devices()):
        return device_bits(leaf)
    # A view, of an array on a CPU device as well: numpy reads it at the speed of memory, XLA at
    # half of it.
    return np.asarray(leaf).view(_UNSIGNED[leaf.dtype.itemsize])


@jax.jit
def device_bits(x: jax.Array) -> jax.Array:
    """The bits of an array on an accelerator."""
    return jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])


def set_along(leaf: Any, axes: Axes, over: tuple[int, ...], *, sample: bool = False) -> np.ndarray:
    """`any_set` of an array that is split by its axes; of what lies on a mesh, the largest bits.

    With `sample` it may stop where all are set: only which are zero is right.
    """
    look = _sampled if sample else any_set
    if _mesh.on_mesh(leaf):
        return axes.reduced(_mesh.BITS, leaf, over)
    if not isinstance(leaf, Lazy) or len(axes.factors) != leaf.ndim or not leaf.ndim:
        return look(axes.split(unsigned(leaf)), over)
    parts = []  # block by block, in the cache
    for block in leaf.blocks():
        parts.append(look(unsigned(block), over))
        if 0 in over:
            parts = [np.bitwise_or.reduce(parts)]
            if sample and parts[0].all():
                break
    return parts[0] if 0 in over else np.concatenate(parts)


def _sampled(bits: Any, over: tuple[int, ...]) -> np.ndarray:
    """`any_set` of the first entries, where these show all that is to be known.

    What is not zero nearly always shows it there.
    """
    first = tuple(slice(_SAMPLE) if i in over else slice(None) for i in range(bits.ndim))
    found = any_set(bits[first], over)
    return found if found.all() else any_set(bits, over)


def set_anywhere(leaf: Any) -> np.ndarray:
    """`any_set` of all entries, of an array wherever it is."""
    if _mesh.on_mesh(leaf):
        return _mesh.reduced(_mesh.BITS, leaf, range(leaf.ndim))
    return any_set(unsigned(leaf))


def any_set(bits: Any, axes: tuple[int, ...] | None = None) -> np.ndarray:
    """The bits that are set in any entry along some axes, but for the sign: 0 if all are zero."""
    sign_off = np.iinfo(bits.dtype).max >> 1
    if isinstance(bits, np.ndarray):
        if axes is None and bits.nbytes % 8 == 0 and bits.flags.c_contiguous:
            # As many at once as a word holds, then those of the one that is left.
            word = np.bitwise_or.reduce(bits.reshape(-1).view(np.uint64))
            bits = np.atleast_1d(word).view(bits.dtype)
        return np.bitwise_or.reduce(bits, axis=axes) & sign_off
    return np.asarray(_device_or(bits, axes)) & sign_off


@functools.partial(jax.jit, static_argnums=1)
def _device_or(bits: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
    axes = tuple(range(bits.ndim)) if axes is None else axes
    return jax.lax.reduce(bits, np.zeros((), bits.dtype), jax.lax.bitwise_or, axes)


@functools.cache
def _largest(dtype: Any) -> int:
    """The bits of the largest number of a type."""
    return int(np.array(jnp.finfo(dtype).max, dtype).view(_UNSIGNED[dtype.itemsize]))


def check_concrete(leaf: Any, tensor: Tensor) -> None:
    """Raise `TracedError` for a tracer, a deleted array, or a shape without values."""
    if isinstance(leaf, Tracer):
        raise TracedError(
            "the parameters are tracers: which channels are dead depends on their values",
            path=tensor.path,
            seen=str(leaf),
            mend="call this outside of jax.jit, jax.grad and jax.vmap; under jit, masks keep "
            "shapes as they are",
        )
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TracedError(
            "the parameters are shapes without values",
            path=tensor.path,
            seen=str(leaf),
            mend="pass the arrays themselves, not what jax.eval_shape gives",
        )
    _tree.check_living({tensor.path: leaf})


def check_finite(leaf: Any, tensor: Tensor, found: np.ndarray | None = None) -> None:
    """Raise `NonFiniteError` if there is NaN or infinity; `found` is `any_set` if known already.

    Types that are not in `FLOATS` (a tree of masks) have none.
    """
    check_concrete(leaf, tensor)
    if leaf.dtype not in FLOATS:
        return
    found = set_anywhere(leaf) if found is None else found
    # The bits of several finite numbers may together look like infinity: then look closely.
    if found.max(initial=0) > _largest(leaf.dtype):
        if _mesh.on_mesh(leaf):
            raise _not_finite(tensor, f"in shards of {leaf.shape}, by {leaf.sharding.spec}")
        finite_values(leaf, tensor)


def finite_values(leaf: Any, tensor: Tensor) -> np.ndarray:
    """The values on the host; raises `NonFiniteError` unless all are finite."""
    values = _mesh.host(leaf)
    if not (finite := np.isfinite(values)).all():
        where = np.argwhere(~finite)[0].tolist()
        raise _not_finite(tensor, f"{values[tuple(where)]} at index {where} of {values.shape}")
    return values


def _not_finite(tensor: Tensor, seen: str) -> NonFiniteError:
    return NonFiniteError(
        "a tensor holds NaN or infinity, so no channel can be said to contribute nothing",
        path=tensor.path,
        seen=seen,
        mend="repair or reload the checkpoint; a diverged training run leaves such values",
    )
