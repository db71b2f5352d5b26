"""What the stock Flax classes of transformers need to run on a new JAX, or without weights.

Nothing is patched when this module is imported. `clip_compat` repairs the T5-like classes while it
is entered; `shell` makes an instance that owns no weights and repairs itself when it is called.
"""

import functools
import importlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from flaxslim.errors import ConfigError, FlaxslimError, UnknownFamilyError, nearest

# The only modules of transformers that call `jnp.clip(x, a_max=...)`. mT5 runs T5's functions.
_CLIPPING = (
    "transformers.models.t5.modeling_flax_t5",
    "transformers.models.longt5.modeling_flax_longt5",
)
_lock = threading.Lock()
_users = 0
_stock: dict[str, tuple[ModuleType, Any]] = {}


class _Numpy(ModuleType):
    """`jax.numpy` with the clip of older releases; everything else is looked up in the original."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def clip(array: Any, a_min: Any = None, a_max: Any = None, **named: Any) -> jax.Array:
        return jnp.clip(array, **{"min": a_min, "max": a_max, **named})


def _clip_is_old() -> bool:
    return "a_max" in inspect.signature(jnp.clip).parameters


def _clipping_modules() -> list[ModuleType]:
    modules = []
    for name in _CLIPPING:
        try:
            modules.append(importlib.import_module(name))
        except ImportError:  # a release of transformers without this family
            continue
    return modules


@contextmanager
def clip_compat() -> Iterator[None]:
    """T5, mT5 and LongT5 Flax classes work inside, on a JAX whose `jnp.clip` lost `a_max`.

    transformers 4 calls `jnp.clip(x, a_max=...)` in two modules, and JAX 0.10 took that argument
    away, so that these classes fail with `TypeError: clip() got an unexpected keyword argument
    'a_max'`. Inside this context the name `jnp` of those two modules is a thin stand-in whose
    `clip` takes both spellings. `jax.numpy` itself, and every other module, stays as it is.

    Contexts may be nested and may overlap in several threads: the last one to leave restores the
    modules. A function compiled inside stays usable outside; one that is traced anew does not.
    Where `jnp.clip` still takes `a_max`, nothing is done.

    >>> with clip_compat():
    ...     pass  # FlaxT5Model(config), model(**inputs), model.generate(...)
    """
    global _users
    if _clip_is_old():
        yield
        return
    modules = _clipping_modules()
    with _lock:
        if _users == 0:
            for module in modules:
                _stock[module.__name__] = (module, vars(module)["jnp"])
                vars(module)["jnp"] = _Numpy("jax.numpy")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for module, original in _stock.values():
                    vars(module)["jnp"] = original
                _stock.clear()


def clips(cls: type) -> bool:
    """Whether a class, of a model or a module, is one of those that need `clip_compat` here."""
    return not _clip_is_old() and any(base.__module__ in _CLIPPING for base in cls.__mro__)


def _with_train(method: Any) -> Any:
    """OPT asks for `deterministic` where all other classes ask for `train`."""

    @functools.wraps(method)
    def call(*args: Any, train: bool = False, **kwargs: Any) -> Any:
        return method(*args, **{"deterministic": not train, **kwargs})

    return call


@functools.cache
def _alike(cls: type) -> type:
    """A subclass of `cls` that is called like all others."""
    call = inspect.signature(cls.__call__).parameters
    if "deterministic" not in call or "train" in call:
        return cls
    return type(
        cls.__name__, (cls,), {"__call__": _with_train(cls.__call__), "__module__": cls.__module__}
    )


def stock_config(cfg: Any) -> Any:
    """The transformers config object that a stock class takes; a dict is turned into one.

    Raises `UnknownFamilyError` for a `model_type` that transformers does not know and
    `ConfigError` for anything else than a `PretrainedConfig` or a dict with a `model_type`.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    if isinstance(cfg, PretrainedConfig):
        return cfg
    if not isinstance(cfg, Mapping) or not isinstance(cfg.get("model_type"), str):
        raise ConfigError(
            "this is no config of a Hugging Face model",
            seen=f"a {type(cfg).__name__}",
            expected="a PretrainedConfig, or a dict with a model_type",
            mend="give verify the model itself: model=fn(params, *inputs), or a module",
        )
    name = cfg["model_type"]
    if name not in CONFIG_MAPPING:
        raise UnknownFamilyError(
            "transformers knows no such model_type",
            seen=name,
            near=nearest(name, CONFIG_MAPPING.keys()),
            mend="correct model_type in config.json",
        )
    return AutoConfig.for_model(name, **{k: v for k, v in cfg.items() if k != "model_type"})


def shell(cls: type, cfg: Any, dtype: Any = None) -> Any:
    """An instance of a stock Flax class that holds no weights; give them at each call.

    `instance(**inputs, params=params, train=False)` runs, under `jax.jit` as well;
    `instance.params_shape_tree` has the shapes; `instance.params` raises. `dtype` is the one of
    the computation (float32 unless given). It runs at the layout of its config, T5-like classes in
    `clip_compat`, and OPT takes `train` too. Unlike `_do_init=False`, this works for the composite
    classes, which refuse that argument.
    Raises `ConfigError` for a config from which the class cannot be built.

    >>> from transformers import BertConfig, FlaxBertModel
    >>> config = BertConfig(vocab_size=9, hidden_size=8, num_attention_heads=2,
    ...                     num_hidden_layers=1, intermediate_size=12)
    >>> model = shell(FlaxBertModel, config)
    >>> model.params_shape_tree["pooler"]["dense"]["kernel"].shape
    (8, 8)
    """
    made: list[Any] = []

    from flaxslim._intercept import lay_out, layout

    def build() -> None:
        with clip_compat(), layout():
            instance = _alike(cls)(stock_config(cfg), dtype=dtype or jnp.float32)
        # What was made while tracing must not outlive the trace.
        instance._params = instance.key = None
        instance._is_initialized = False
        made.append(instance)

    try:
        jax.eval_shape(build)
    except FlaxslimError:
        raise
    except Exception as error:  # of any kind: a class looks its values up, divides, adds
        raise ConfigError(
            "the stock class cannot be built from this config",
            seen=f"{type(error).__name__}: {error}",
            expected=f"a config of {cls.__name__} (this one has model_type "
            f"{getattr(stock_config(cfg), 'model_type', None)!r})",
            mend=_mend(cfg),
        ) from error
    instance = lay_out(made[0])
    instance.key = jax.random.PRNGKey(0)
    return instance


def _mend(cfg: Any) -> str:
    """What may be wrong with a config from which its class cannot be built."""
    from flaxslim import _record

    heads = any(isinstance(kept, tuple) for kept in _record.sites(cfg).values())
    for pair in (_record.kept(cfg) or ()) if heads else ():
        if pair.axis == "h" and not pair.modules:  # as of a discovered spec
            return (
                'cut its heads by the spec of its family (spec="heads"), or say in the spec what '
                f"the class calls their number: Pair(modules=...), which {pair.second} lacks"
            )
    return (
        "correct the value in the config (an unknown activation, sizes that do not divide, a "
        "missing number)"
    )


def parameter_shapes(cls: type, cfg: Any) -> dict[str, Any]:
    """The parameters of a stock Flax class as a nested dict of `jax.ShapeDtypeStruct`.

    Nothing is allocated. Raises `ConfigError` for a config from which the class cannot be built.
    """
    from flax.core import unfreeze

    return unfreeze(shell(cls, cfg).params_shape_tree)
