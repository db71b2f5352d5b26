"""A user's function as a jaxpr, by shapes alone, and a walk through it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import flax.errors
import jax
import numpy as np
from flax import linen, nnx
from jax.core import Tracer
from jax.tree_util import tree_flatten, tree_flatten_with_path

from flaxslim._discover._atoms import Atom, Dims, Reason, all_roots
from flaxslim._discover._place import Place
from flaxslim._discover._trace import Node, Value, Walk, alive
from flaxslim._tree import flatten, name_of
from flaxslim.errors import DiscoveryError

_VARIABLES = 'give the variables as apply takes them: discover(model, {"params": params}, *inputs)'
_MENDS: Mapping[type[Exception], str] = {
    flax.errors.ScopeCollectionNotFound: _VARIABLES,
    flax.errors.ApplyScopeInvalidVariablesTypeError: _VARIABLES,
    jax.errors.UnexpectedTracerError: "a value of an earlier trace was kept, in a global or an "
    "attribute: return it instead",
    jax.errors.NonConcreteBooleanIndexError: "its shapes depend on values: use jnp.where, or a "
    "fixed size",
    jax.errors.ConcretizationTypeError: "it goes by values, which a trace has not: pass flags such "
    "as train=False in a lambda, and fix shapes that depend on values",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
    """A function of parameters and inputs, ready to be traced at any shapes.

    Attributes:
      run: it, on the leaves of both.
      params: the parameters' leaves by path.
      inputs: the leaves of the other arguments that are arrays.
    """

    run: Callable[[Sequence[Any], Sequence[Any]], Any]
    params: Mapping[str, Any]
    inputs: tuple[Any, ...]

    def jaxpr(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Any:
        """Its jaxpr, perhaps at other shapes of parameters; `DiscoveryError` if it raises."""
        own = shapes or {}
        params = [_abstract(leaf, own.get(path)) for path, leaf in self.params.items()]
        sized = linen.intercept_methods(_as_wide_as_its_kernel) if own else nullcontext()
        try:
            with sized:
                closed = jax.make_jaxpr(lambda p, x: _arrays(self.run(p, x)))(
                    params, [_abstract(leaf) for leaf in self.inputs]
                )
            if any(isinstance(x, Tracer) for x in closed.consts):
                raise jax.errors.UnexpectedTracerError("a constant of it is a tracer")
            return closed
        except Exception as error:  # whatever the user's own code raises
            mend = next((text for kind, text in _MENDS.items() if isinstance(error, kind)), None)
            first = str(error).strip().partition("\n")[0]
            raise DiscoveryError(
                "the function cannot be traced",
                seen=f"{type(error).__name__}: {first[:300]}",
                expected="fn(params, *inputs), which works on arrays alone",
                mend=mend
                or "fn(params, *inputs) must run at these shapes; call it as it is meant: "
                "discover(lambda p, x: model.apply(p, x, train=False), params, x), with rngs= if "
                "it draws random numbers",
            ) from error


def function(fn: Any, params: Any, inputs: Sequence[Any]) -> Function:
    """Whatever the user gave as one: a function, a Linen module, or an nnx module with inputs."""
    if isinstance(fn, nnx.Module):
        fn, params, inputs = _called, fn, (params, *inputs)
    if isinstance(fn, linen.Module):
        fn = fn.apply
    if not callable(fn):
        raise DiscoveryError(
            "what was given is no function",
            seen=type(fn).__name__,
            expected="discover(fn, params, *inputs), or discover(nnx_module, *inputs)",
        )
    merge: Callable[[Any], Any] = lambda tree: tree  # noqa: E731
    if isinstance(params, nnx.Module):
        graph, params = nnx.split(params)
        merge = lambda state: nnx.merge(graph, state)  # noqa: E731
    flatten(params)  # refuses what is no tree
    pairs, treedef = tree_flatten_with_path(params)
    try:
        leaves, structure = tree_flatten(tuple(inputs))
    except (ValueError, TypeError) as error:
        raise DiscoveryError(
            "JAX cannot flatten the inputs",
            seen=str(error).partition("\n")[0],
            expected="arrays, or trees of them, with keys that can be sorted",
        ) from error
    arrays = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    def run(p: Sequence[Any], x: Sequence[Any]) -> Any:
        own = list(leaves)
        for i, value in zip(arrays, x, strict=True):
            own[i] = value
        return fn(merge(treedef.unflatten(p)), *structure.unflatten(own))

    return Function(
        run=run,
        params={name_of(keys): leaf for keys, leaf in pairs},
        inputs=tuple(leaves[i] for i in arrays),
    )


def _called(module: Any, *inputs: Any) -> Any:
    return module(*inputs)


def _as_wide_as_its_kernel(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """A Linen layer at the size of its tensors, whatever its class was told.

    So that the retrace at another width runs modules of fixed sizes too.
    """
    module = context.module
    features = getattr(module, "features", None)
    if context.method_name == "__call__" and module.has_variable("params", "kernel"):
        # That of a bias, where there is one: some classes keep their kernels transposed.
        name = "bias" if module.has_variable("params", "bias") else "kernel"
        shape = module.get_variable("params", name).shape
        if isinstance(features, int):
            object.__setattr__(module, "features", shape[-1])
        elif isinstance(features, tuple | list):
            object.__setattr__(module, "features", tuple(shape[-len(features) :]))
    return next_fun(*args, **kwargs)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _abstract(leaf: Any, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    own = leaf if _is_array(leaf) else np.asarray(leaf)
    return jax.ShapeDtypeStruct(own.shape if shape is None else shape, own.dtype)


def _arrays(out: Any) -> list[Any]:
    """The arrays in what a function returns: a tuple, a dict, a ModelOutput, even with strings."""
    found: list[Any] = []
    for leaf in jax.tree.leaves(out):
        if isinstance(leaf, Mapping):  # one that is not registered with JAX
            found += _arrays(dict(leaf))
        elif _is_array(leaf) or isinstance(leaf, int | float | complex):
            found.append(leaf)
    if not found:
        raise TypeError(f"the function returns no array, but a {type(out).__name__}")
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walked:
    """A function that was walked through: the dimensions of its parameters, and which are used."""

    function: Function
    closed: Any
    walk: Walk
    dims: Mapping[str, Dims]
    unused: tuple[str, ...]

    @property
    def leaves(self) -> Mapping[str, Any]:
        return self.function.params

    @functools.cached_property
    def folders(self) -> dict[str, list[str]]:
        """The tensors of each layer."""
        found: dict[str, list[str]] = {}
        for path in self.leaves:
            found.setdefault(path.rpartition("/")[0], []).append(path)
        return found


def walked(fn: Function, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Walked:
    """Trace a function, perhaps at other shapes of parameters, and follow all axes.

    Raises `DiscoveryError` if it uses no parameter.
    """
    shapes = shapes or {}
    closed, walk = fn.jaxpr(shapes), Walk()
    dims: dict[str, Dims] = {}
    values: list[Value] = []
    for path, leaf in fn.params.items():
        shape = shapes.get(path, np.shape(leaf) if not _is_array(leaf) else leaf.shape)
        if not jax.numpy.issubdtype(_abstract(leaf).dtype, np.floating):
            values.append(Value(walk.fixed(shape, "it is not floating point", _NOWHERE)))
            continue
        dims[path] = tuple((Atom(size),) if size != 1 else () for size in shape)
        values.append(Value(dims[path], Node("param", data=path), frozenset([path])))
    for leaf in fn.inputs:
        values.append(Value(walk.fixed(leaf.shape, "it is an axis of the inputs", _NOWHERE)))
    jaxpr = closed.jaxpr
    unused = _unused(jaxpr, list(fn.params))
    if fn.params and len(unused) == len(fn.params):
        raise DiscoveryError(
            f"the function uses none of the {len(unused)} parameters",
            seen=f"it closes over {len(closed.consts)} arrays" if closed.consts else None,
            mend="let it use the parameters that it is given: "
            "discover(lambda p: model(**inputs, params=p), params)",
        )
    consts = [walk.constant(x, Place(primitive="a closed-over array")) for x in closed.consts]
    outputs = walk.run(jaxpr, consts, values)
    walk.note_other_uses(outputs)
    for value in outputs:
        reason = Reason(why="it is an axis of the outputs", place=_NOWHERE, order=walk.order + 1)
        for atom in all_roots(value.dims):
            atom.block(reason)
    return Walked(function=fn, closed=closed, walk=walk, dims=dims, unused=unused)


_NOWHERE = Place(primitive="")  # an input or an output is no operation


def _unused(jaxpr: Any, paths: Sequence[str]) -> tuple[str, ...]:
    used = {var for eqn in alive(jaxpr) for var in eqn.invars if not hasattr(var, "val")}
    used |= {var for var in jaxpr.outvars if not hasattr(var, "val")}
    return tuple(p for p, var in zip(paths, jaxpr.invars, strict=False) if var not in used)
