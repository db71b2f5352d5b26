"""What a layer reads while a function runs: its input, captured in the traced function.

No model is rewritten and no class need be known. The function is traced once; when its jaxpr is run
again, equation by equation inside of another trace, every contraction with a kernel is seen, and
what stands on its other side is what the layer reads. What only moves or casts the kernel on its
way there (a transposed table, a fused kernel, a cast to bfloat16) is followed, into `jit`, `remat`
and `scan` too. All that is not asked for is left out by the compiler.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxslim import _tree
from flaxslim._jaxpr import scan_counts
from flaxslim._spec import Site
from flaxslim.errors import CalibrationError, FlaxslimError, in_short, nearest

# What changes neither the numbers of a kernel nor what they mean.
_MOVES = frozenset(
    {
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "copy_p",
        "expand_dims",
        "optimization_barrier",
        "reduce_precision",
        "reshape",
        "reshard",
        "rev",
        "sharding_constraint",
        "squeeze",
        "transpose",
    }
)
# What does not even move them.
_SAME = frozenset(
    {"convert_element_type", "copy", "copy_p", "optimization_barrier", "reduce_precision"}
    | {"reshard", "sharding_constraint"}
)
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """A value that holds numbers of one kernel: which, as flat indices in its own shape.

    `moved` makes those indices when they are asked for; a kernel may have many millions. `scanned`:
    the value is one slice of many along a scanned axis, and `moved` gives all of them.
    """

    path: str
    moved: Callable[[], np.ndarray]
    scanned: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """One contraction with a kernel.

    Attributes:
      path: the kernel.
      x: the other operand, with axes (batch..., free..., contracted...); behind a scan with an axis
        of its steps in front.
      kernel: flat indices into the kernel, (batch..., contracted...); behind a scan likewise.
      batch, contracted: how many such axes there are.
      scanned: whether there is an axis of steps. The kernel has one too if it differs by step.
      source: the value itself, which layers that read the same one have in common.
    """

    path: str
    x: Any
    kernel: Callable[[], np.ndarray]
    batch: int
    contracted: int
    scanned: bool = False
    scanned_kernel: bool = False
    source: Any = None


class Traced:
    """A function `fn(params, batch)`, traced for the shapes of one batch.

    >>> params = {"up": np.ones((2, 3)), "down": np.ones((3, 1))}
    >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> _, (read,) = Traced(fn, params, np.ones((4, 2)))(params, np.ones((4, 2)), {"down"})
    >>> read.x.shape
    (4, 3)
    """

    def __init__(self, fn: Callable[..., Any], params: Any, batch: Any):
        self._closed, self.outputs = _traced(fn, params, batch)
        self.paths = list(_tree.flatten(params))
        found: list[Read] = []
        self.tables: set[str] = set()  # the parameters that are looked up by index
        jax.eval_shape(
            lambda p, b: self._call(p, b, self.paths, found, self.tables)[0], params, batch
        )
        self.running = list(dict.fromkeys(read.path for read in found))  # what is multiplied by
        self.kernels = set(self.running)

    @property
    def program(self) -> tuple[str, Any]:
        """What it computes: its text, and the constants in it."""
        return str(self._closed.jaxpr), self._closed.consts

    def __call__(self, params: Any, batch: Any, wanted: Any) -> tuple[Any, list[Read]]:
        """The outputs, and the reads of the kernels at the paths `wanted`, in order of running."""
        return self._call(params, batch, wanted, [], set())

    def _call(
        self, params: Any, batch: Any, wanted: Any, reads: list[Read], tables: set[str]
    ) -> tuple[Any, list[Read]]:
        leaves = jax.tree.leaves(params)
        views: list[View | None] = [
            _whole(path, np.shape(leaf)) if path in wanted else None
            for path, leaf in zip(self.paths, leaves, strict=True)
        ]
        arrays = [*leaves, *jax.tree.leaves(batch)]
        views += [None] * (len(arrays) - len(leaves))
        into = _Found(reads=reads, tables=tables)
        out, _ = _run(self._closed.jaxpr, self._closed.consts, arrays, views, into)
        return jax.tree.unflatten(jax.tree.structure(self.outputs), out), reads


def _traced(fn: Callable[..., Any], params: Any, batch: Any) -> tuple[Any, Any]:
    """The jaxpr and the outputs; raises `CalibrationError` for a batch that the function refuses.

    A class of transformers says that in errors of any kind.
    """
    try:
        return jax.make_jaxpr(fn, return_shape=True)(params, batch)
    except FlaxslimError:
        raise
    except Exception as error:
        raise CalibrationError(
            "the model does not run on a batch of the calibration data",
            seen=f"{in_short(error)}; the batch holds {_said(batch)}",
            expected="what the model takes, by the names that it has there, and nothing else",
            mend="leave out of the data what the model does not take (labels), and add what it "
            "lacks (decoder_input_ids, pixel_values: an .npz holds both); pixels are (b, c, h, w)",
        ) from error


def _said(batch: Any) -> str:
    """The arrays of a batch: names, dtypes, shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    names = (jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in leaves)
    told = (f"{x.dtype} {np.shape(x)}" for _, x in leaves)
    return ", ".join(f"{name} {x}".strip() for name, x in zip(names, told, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Found:
    reads: list[Read]
    tables: set[str]


def _whole(path: str, shape: Sequence[int]) -> View:
    return View(path=path, moved=lambda: np.arange(math.prod(shape), dtype=np.int32).reshape(shape))


def _run(
    jaxpr: Any,
    consts: Sequence[Any],
    args: Sequence[Any],
    views: Sequence[View | None],
    into: _Found,
) -> tuple[list[Any], list[View | None]]:
    """Run a jaxpr on values some of which are views of kernels."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))
    seen: dict[Any, View] = {
        var: view for var, view in zip(jaxpr.invars, views, strict=True) if view is not None
    }

    def value(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    def view(atom: Any) -> View | None:
        return None if hasattr(atom, "val") else seen.get(atom)

    for eqn in jaxpr.eqns:
        own, name = [view(v) for v in eqn.invars], eqn.primitive.name
        given = [value(v) for v in eqn.invars]
        out_views: list[View | None] = [None] * len(eqn.outvars)
        if not any(own):
            out = _bind(eqn, given)
        elif name in _CALLS and (inner := _jaxpr_of(eqn)) is not None:
            out, out_views = _run(inner.jaxpr, inner.consts, given, own, into)
        elif name == "scan":
            out = _scan(eqn, given, own, into)
        else:
            if name == "dot_general":
                _contract(eqn, given, own, into)
            elif name == "gather" and own[0] is not None:
                into.tables.add(own[0].path)
            elif name in _MOVES and own[0] is not None:
                out_views = [_moved(eqn, own[0])]
            out = _bind(eqn, given)
        values |= dict(zip(eqn.outvars, out, strict=True))
        seen |= {
            var: view for var, view in zip(eqn.outvars, out_views, strict=True) if view is not None
        }
    return [value(v) for v in jaxpr.outvars], [view(v) for v in jaxpr.outvars]


def _bind(eqn: Any, given: Sequence[Any]) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # older releases
    with eqn.ctx.manager:  # the precision that the function asked for, among others
        out = eqn.primitive.bind(*functions, *given, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _jaxpr_of(eqn: Any) -> Any:
    inner = eqn.params.get(_CALLS[eqn.primitive.name])
    if inner is None:
        return None
    if not hasattr(inner, "consts"):  # remat holds an open jaxpr
        from jax.extend.core import ClosedJaxpr

        inner = ClosedJaxpr(inner, ())
    return inner if len(inner.jaxpr.invars) == len(eqn.invars) else None


def _on_host() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names others only
        return None


def _moved(eqn: Any, before: View) -> View:
    def moved() -> np.ndarray:
        if eqn.primitive.name in _SAME:
            return before.moved()
        # There are as many of them as numbers in the kernel: they stay on the host.
        with jax.ensure_compile_time_eval(), jax.default_device(_on_host()):
            indices = jnp.asarray(before.moved())
            if before.scanned:  # the same for each of the slices
                return np.asarray(jax.vmap(lambda x: _bind(eqn, [x])[0])(indices))
            return np.asarray(_bind(eqn, [indices])[0])

    return dataclasses.replace(before, moved=moved)


def _contract(eqn: Any, given: Sequence[Any], own: Sequence[View | None], into: _Found) -> None:
    if own[0] is not None and own[1] is not None:
        return  # two kernels: no layer that reads something
    (at,) = [i for i, view in enumerate(own) if view is not None]
    view, x = own[at], given[1 - at]
    assert view is not None
    contracted, batch = (sides for sides in eqn.params["dimension_numbers"])
    ours, theirs = (contracted[at], batch[at]), (contracted[1 - at], batch[1 - at])
    free = [i for i in range(np.ndim(x)) if i not in (*theirs[0], *theirs[1])]

    def kernel() -> np.ndarray:
        indices = view.moved()
        lead = int(view.scanned)
        order = [i + lead for i in (*ours[1], *ours[0])]
        rest = [i for i in range(lead, indices.ndim) if i not in order]
        front = [0] * lead
        moved = indices.transpose([*front, *order, *rest])
        return moved.reshape(*moved.shape[: lead + len(order)], -1)[..., 0]

    into.reads.append(
        Read(
            path=view.path,
            x=jnp.transpose(x, (*theirs[1], *free, *theirs[0])),
            kernel=kernel,
            batch=len(ours[1]),
            contracted=len(ours[0]),
            scanned_kernel=view.scanned,
            source=given[1 - at],
        )
    )


def _scan(eqn: Any, given: Sequence[Any], own: Sequence[View | None], into: _Found) -> list[Any]:
    """A scan whose body tells, beside its own results, what its layers read in each step."""
    p = eqn.params
    consts, carry = scan_counts(p)
    body = p["jaxpr"]
    inside = [
        view if i < consts else _sliced(view) if i >= consts + carry else None
        for i, view in enumerate(own)
    ]
    kept: list[Read] = []

    def step(state: Any, slices: Any) -> Any:
        found = _Found(reads=[], tables=into.tables)
        args = [*given[:consts], *state, *slices]
        out, _ = _run(body.jaxpr, body.consts, args, inside, found)
        kept[:] = found.reads
        return out[:carry], (out[carry:], [read.x for read in found.reads])

    start, xs = given[consts : consts + carry], given[consts + carry :]
    state, (ys, read) = jax.lax.scan(
        step, list(start), list(xs), length=p["length"], reverse=p["reverse"]
    )
    into.reads.extend(
        dataclasses.replace(r, x=x, scanned=True)
        for r, x in zip(kept, read, strict=True)
        if not r.scanned
    )
    return [*state, *ys]


def _sliced(view: View | None) -> View | None:
    """One slice of many; none where it is itself one of many already."""
    return None if view is None or view.scanned else dataclasses.replace(view, scanned=True)


# --- the hidden channels of a site --------------------------------------------------------------


def inner_axes(site: Site) -> tuple[str, ...]:
    """The axes over which the second layer sums, the prunable one first: `f`, or `h` and `k`."""
    inner = [name for name in site.second.axes.names if name in site.pair.inner]
    return (site.pair.axis, *(name for name in inner if name != site.pair.axis))


def hidden(site: Site, reads: Sequence[Read]) -> list[jax.Array]:
    """What the second layer of a site reads, each time it does: `(s, ..., m)`.

    `m` are the hidden channels of a row; of heads `h k`, head by head. Raises `CalibrationError` if
    the function does not read the kernel, or in a way that does not tell the channels apart.
    """
    own = [read for read in reads if read.path == site.second.path]
    if not own:
        raise CalibrationError(
            "the function never reads the second layer of this site by a matrix product",
            path=site.second.path,
            expected="a contraction of its kernel with the hidden channels",
            near=nearest(site.second.path, [read.path for read in reads]),
            mend="pass an fn(params, batch) that runs the whole model with these parameters, or a "
            "spec without this site",
        )
    return [_in_order(site, read) for read in own]


def _in_order(site: Site, read: Read) -> jax.Array:
    axes, inner = site.second.axes, inner_axes(site)
    sizes = axes.sizes(site.second.shape)
    factors = [f if isinstance(f, int) else sizes[f] for f in axes.factors]
    coordinates = np.unravel_index(read.kernel(), factors)
    named = dict(zip(axes.factors, coordinates, strict=True))

    def flat(names: Sequence[str]) -> np.ndarray:
        if not names:
            return np.zeros_like(coordinates[0])
        at = [named[name] for name in names]
        return np.asarray(np.ravel_multi_index(at, [sizes[name] for name in names]))

    m, s = math.prod(sizes[name] for name in inner), site.rows
    stack, order = flat(axes.stack), flat(inner)
    lead = read.batch + read.scanned_kernel
    rows = math.prod(stack.shape[:lead])
    stack, order = stack.reshape(rows, -1), order.reshape(rows, -1)
    whole = rows in (1, s) and order.shape[1] == m and (np.sort(order) == np.arange(m)).all()
    if not whole or rows != s or (stack != stack[:, :1]).any() or {*stack[:, 0]} != {*range(s)}:
        raise CalibrationError(
            "the second layer of this site is read piece by piece, not by one matrix product",
            path=site.second.path,
            seen=f"{order.shape[1]} of {m} channels at once, {rows} of {s} stacked layers",
            expected="a contraction over all of its channels",
            mend="pass a spec without this site",
        )
    x = read.x
    if read.scanned and not read.scanned_kernel and read.batch:
        x = jnp.moveaxis(x, 0, read.batch)  # steps are samples
    x = x.reshape(rows, *x.shape[lead : x.ndim - read.contracted], m)
    where = np.argsort(order[0])
    if (order != order[:1]).any():
        x = jnp.stack([x[i][..., np.argsort(order[i])] for i in range(rows)])
    elif (where != np.arange(m)).any():
        x = x[..., where]
    places = np.argsort(stack[:, 0])
    return x if (places == np.arange(s)).all() else x[places]
