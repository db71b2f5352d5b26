"""Any model as a pure function of its parameters and its inputs.

A Hugging Face Flax class, a Linen module, an nnx module and a plain function are called in four
different ways. `Model` hides that: parameters go in as an argument in every case, so that XLA
cannot fold them as constants, and what comes out is a flat dict of arrays.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from flaxslim import _config
from flaxslim.errors import InputsError

Call = Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The arguments of one call, positional and by keyword.

    Strings and bools are options, not data (`train=False`, `deterministic=True`): they stay
    outside of the trace, since models branch on them in Python.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def split(self) -> tuple[list[Any], Callable[[list[Any]], "Inputs"]]:
        """The arrays in it, and the function that puts (traced) arrays back in their places."""
        leaves, treedef = jax.tree_util.tree_flatten((self.args, dict(self.kwargs)))
        static = [isinstance(leaf, bool | str) for leaf in leaves]

        def join(arrays: list[Any]) -> Inputs:
            rest = iter(arrays)
            new = [x if fixed else next(rest) for x, fixed in zip(leaves, static, strict=True)]
            args, kwargs = treedef.unflatten(new)
            return Inputs(args=args, kwargs=kwargs)

        return [x for x, fixed in zip(leaves, static, strict=True) if not fixed], join


def as_inputs(value: Any) -> Inputs:
    """A dict by keyword, a tuple or list by position, anything else as the only argument."""
    if isinstance(value, Mapping):
        return Inputs(kwargs={name: _array(x) for name, x in value.items()})
    if isinstance(value, tuple | list):
        return Inputs(args=tuple(_array(x) for x in value))
    return Inputs(args=(_array(value),))


def _array(x: Any) -> Any:
    # Token ids often come as nested lists; as a pytree each id would be an argument of its own.
    if isinstance(x, list) and all(
        isinstance(leaf, int | float) for leaf in jax.tree_util.tree_leaves(x)
    ):
        return np.asarray(x)
    return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """One of the two models of a proof.

    Attributes:
      call: `call(params, *args, **kwargs) -> any pytree`, pure.
      params: the tree that `call` takes.
      weights: the part of `params` that counts as parameters.
      cls: the Hugging Face class, if it is one.
    """

    call: Call
    params: Any
    weights: Any
    cls: type | None = None


def split(value: Any) -> tuple[Any, Any]:
    """`(params, cfg)`; a cfg of None for bare parameters, which may be a tuple of two as well."""
    if not isinstance(value, tuple) or len(value) != 2:
        return value, None
    arrays = (isinstance(x, np.ndarray | jax.Array) for x in jax.tree_util.tree_leaves(value[1]))
    return (value, None) if any(arrays) else value


def resolve(value: Any, model: Any, *, dtype: Any = None) -> tuple[Model, Any]:
    """The model and the config (or None) behind one of `verify`'s first two arguments.

    Raises `InputsError` when nothing says how to run the parameters.
    """
    params, cfg = split(value)
    if isinstance(params, nnx.Module):
        return _nnx(params), cfg
    if model is None and cfg is not None:
        from flaxslim._inputs import model_class_for

        model = model_class_for(cfg, params)
    if is_hugging_face(model):
        return _hugging_face(model, params, cfg, dtype), cfg
    if dtype is not None:
        raise InputsError(
            "dtype= is for Hugging Face classes; other models say themselves what they compute in",
            seen=f"dtype={dtype} with {_describe(model)}",
        )
    if isinstance(model, type) and issubclass(model, linen.Module):
        model = model(**fields_of(model, cfg))
    elif cfg is not None and callable(model) and _is_builder(model):
        return resolve((params, cfg), model(cfg))
    if isinstance(model, linen.Module):
        return _linen(model, params, cfg), cfg
    if callable(model):
        return Model(call=model, params=params, weights=params), cfg
    raise InputsError(
        "nothing says how to run these parameters",
        seen=_describe(model),
        expected="a Hugging Face Flax class, a Linen module or a builder cfg -> module, or a "
        "function fn(params, *inputs)",
        mend="pass it as the third argument, or pass (params, cfg) pairs whose config has "
        "architectures or model_type, or nnx modules",
    )


def outputs(result: Any) -> dict[str, Any]:
    """The arrays of a pytree of outputs by path; None and PRNG keys are left out.

    Raises `InputsError` if there is something else among them, or if there is no array.
    """
    pairs, _ = jax.tree_util.tree_flatten_with_path(result)
    found = {}
    for keys, leaf in pairs:
        path = jax.tree_util.keystr(keys, simple=True, separator="/") or "output"
        dtype = getattr(leaf, "dtype", None)
        if dtype is None and not isinstance(leaf, bool | int | float | complex):
            raise InputsError(
                "the model gives something that is no array, so it cannot be compared",
                path=path,
                seen=f"a {type(leaf).__name__}",
                expected="a pytree of arrays",
                mend="wrap the model in a function that gives its arrays alone",
            )
        if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
            found[path] = leaf
    if not found:
        raise InputsError(
            "the model gives no array, so there is nothing to compare",
            seen=f"a {type(result).__name__}",
            expected="a pytree of arrays",
            mend="wrap the model in a function that gives the arrays which matter",
        )
    return found


def _describe(model: Any) -> str:
    return getattr(model, "__name__", None) or f"a {type(model).__name__}"


def is_hugging_face(model: Any) -> bool:
    """By name along the bases, so that transformers need not be imported to ask."""
    cls = model if isinstance(model, type) else type(model)
    return any(base.__name__ == "FlaxPreTrainedModel" for base in cls.__mro__)


def _hugging_face(model: Any, params: Any, cfg: Any, dtype: Any) -> Model:
    from flaxslim._compat import shell

    cls = model if isinstance(model, type) else type(model)
    if cfg is None:
        raise InputsError(
            f"{cls.__name__} needs a config to be built from",
            mend="pass (params, cfg) pairs: verify((params, cfg), (new_params, new_cfg))",
        )
    if dtype is None:
        dtype = _precise(params) if isinstance(model, type) else model.dtype
    instance = shell(cls, cfg, dtype)
    if isinstance(params, Mapping) and set(params) == {"params"}:
        params = params["params"]

    def call(params: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(params, Mapping) and set(params) == {"params"}:
            params = params["params"]
        return instance(*args, params=params, train=False, **kwargs)

    return Model(call=call, params=params, weights=params, cls=cls)


def _precise(params: Any) -> Any:
    """float32, or float64 if the parameters are (and x64 is enabled).

    16-bit parameters too are computed with in float32, as the stock class does by default: the
    comparison is then sharp, while 16-bit arithmetic would blur it.
    """
    wide = any(getattr(x, "dtype", None) == np.float64 for x in jax.tree_util.tree_leaves(params))
    return jnp.result_type(float) if wide else jnp.float32


def _linen(module: linen.Module, params: Any, cfg: Any) -> Model:
    from flaxslim._intercept import at_layout_of

    values = fields_of(module, cfg)
    module = at_layout_of(module.clone(**values) if values else module, cfg)
    wrapped = isinstance(params, Mapping) and isinstance(params.get("params"), Mapping)

    def call(params: Any, *args: Any, **kwargs: Any) -> Any:
        return module.apply(params if wrapped else {"params": params}, *args, **kwargs)

    weights = params["params"] if wrapped else params
    return Model(call=call, params=params, weights=weights)


def fields_of(module: Any, cfg: Any) -> dict[str, Any]:
    """What a config says of a Linen module: all of it as `config`, or field by field."""
    if cfg is None:
        return {}
    names = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
    if "config" in names:
        return {"config": cfg}
    return {name: _config.read(cfg, name) for name in names if _config.has(cfg, name)}


def _is_builder(model: Call) -> bool:
    """Whether a callable takes one argument, the config; fn(params, *inputs) takes more."""
    if isinstance(model, linen.Module):
        return False
    kinds = inspect.Parameter
    try:
        parameters = inspect.signature(model).parameters.values()
    except ValueError:  # some callables written in C
        return False
    positional = [
        p
        for p in parameters
        if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD, kinds.VAR_POSITIONAL)
    ]
    return len(positional) == 1 and positional[0].kind is not kinds.VAR_POSITIONAL


def _nnx(module: nnx.Module) -> Model:
    graphdef, state = nnx.split(module)

    def call(state: Any, *args: Any, **kwargs: Any) -> Any:
        merged: Any = nnx.merge(graphdef, state)
        merged.eval()  # dropout off, running statistics: on this copy only
        return merged(*args, **kwargs)

    return Model(call=call, params=state, weights=nnx.state(module, nnx.Param))
