"""Stock Linen modules at the sizes of a layout: while they are traced, nothing is patched.

`flax.linen.intercept_methods` sees each call of a module's method, `setup` included. Modules that
a layout names are told their sizes there; the arrays and the compiled code are those of a class
that was written for them. Interceptors act in one thread, and only on the trees of modules that
are run inside: a dense model beside is not touched.
"""

import dataclasses
import functools
import threading
import types
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from flaxslim import _config, _record
from flaxslim._compat import clip_compat, clips
from flaxslim._layout import Layout
from flaxslim._spec import SpecLike
from flaxslim._told import Told, set_sizes, tell
from flaxslim.errors import LayoutError
from flaxslim.specs import chosen


class _Running(threading.local):
    """The innermost context of this thread; it alone acts."""

    def __init__(self) -> None:
        self.stack: list[_Context] = []


_running = _Running()

# A function traces to something else at another layout. Newer releases of JAX can be told so, and
# do not run the program of the one for the other.
_traced_at: Any = getattr(jax, "make_user_context", lambda: lambda _: nullcontext())()


@dataclasses.dataclass(eq=False)
class _Context:
    """One `with`: a layout that is given, or the one that the config of a model says.

    While a tree of modules runs, `now` is its layout, of which the paths begin below `depth`
    names. A model in it whose config is of a family, and which is part of no such model, runs at
    its own from there on. Inside of a lifted transformation (`nn.remat`) a module has no way up to
    its root any more.
    """

    layout: Layout | None
    by_config: bool
    now: Layout | None = None
    depth: int = 0
    inside: bool = False
    said: bool = False

    def intercept(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        # In one frame: JAX walks the stack for each equation, and modules are deeply nested.
        module, method = context.module, context.method_name
        if _running.stack[-1] is not self or module.scope is None:  # not ours, or unbound
            return next_fun(*args, **kwargs)
        before = self.now, self.depth, self.inside, self.said
        if not self.inside or (self.by_config and not (self.said and module.path)):
            self._enter(module)
        try:
            found = self.now
            told = None if found is None else found.at(module.path[self.depth :])
            if found is None or (told is None and method != "setup"):
                return next_fun(*args, **kwargs)
            if told is not None:
                args, kwargs = tell(module, told, method, args, kwargs)
            result = next_fun(*args, **kwargs)
            return _after(found, self.depth, module, told, method, result)
        finally:
            self.now, self.depth, self.inside, self.said = before

    def _enter(self, module: Any) -> None:
        """A module runs that is in no model yet."""
        model = _model_of(module) if self.by_config else None
        if model is not None:
            self.now, self.depth, self.said = Layout.of(model.config), len(model.path), True
        elif not self.inside:
            self.now, self.depth = self.layout, 0
        self.inside = True


def _model_of(module: Any) -> Any:
    """The topmost of a module and those around it whose config is that of a model; None if none."""
    found = None
    while isinstance(module, linen.Module):
        if (cfg := getattr(module, "config", None)) is not None and _is_model(cfg):
            found = module
        module = module.parent
    return found


def _is_model(cfg: Any) -> bool:
    return _config.model_type(cfg) is not None or _record.is_laid_out(cfg)


@contextmanager
def _running_at(context: _Context) -> Iterator[None]:
    _running.stack.append(context)
    try:
        with linen.intercept_methods(context.intercept):
            yield
    finally:
        _running.stack.pop()


@contextmanager
def layout(cfg: Any = None, *, spec: SpecLike = None) -> Iterator[None]:
    """Stock Linen classes run at the sizes of their slimmed configs inside.

    For code that builds the stock class itself: a training script as it is, or
    `FlaxAutoModel.from_pretrained(folder)`. A model whose config has a layout runs at it, any
    other (a dense teacher) as ever, also as a part of a larger module. Modules without a config of
    their own (one with a `model_type` or a layout) run at the layout of `cfg`; `spec` is only
    needed for a model of one's own whose config does not keep it.

    What is traced must be inside, in the same thread. Without `cfg`, what is compiled inside stays
    usable outside. At a given layout it is compiled for this one alone, on a JAX that has
    `jax.make_user_context`; on an older one, give each layout a jitted function of its own.
    `flaxslim.from_pretrained` gives an instance that needs no such context.
    Raises `LayoutError` for a layout that cannot be read.

    >>> import flaxslim
    >>> with flaxslim.layout():
    ...     pass  # model = FlaxAutoModel.from_pretrained("slim"); model(**inputs)
    """
    found = None if cfg is None and spec is None else _layout_of(cfg, spec)
    with (
        _traced_at(None if found is None else found.key),
        _running_at(_Context(layout=found, by_config=True)),
    ):
        yield


# --- after a method ---------------------------------------------------------------------------


def _after(
    found: Layout, depth: int, module: Any, told: Told | None, method: str, result: Any
) -> Any:
    """After it: what a setup has made is told its sizes; a layer without channels gives zeros."""
    if method == "setup":
        if told is not None:
            set_sizes(module, told)
        _set_layers(found, depth, module)
    elif method == "__call__" and told is not None and told.outputs is not None:
        ahead = result.shape[: result.ndim - len(told.outputs)]
        if not told.outputs:
            ahead = tuple(size or 1 for size in ahead)
        return jnp.zeros((*ahead, *told.outputs), result.dtype)
    return result


def _set_layers(found: Layout, depth: int, module: Any) -> None:
    """Tell the layers that a setup has made at once.

    An interceptor of somebody else's may come before ours when they are called, and compute them
    by other means (quantised, say).
    """
    for name in found.layers & vars(module).keys():
        child = getattr(module, name)
        if isinstance(child, linen.Module) and (told := found.at((*module.path[depth:], name))):
            set_sizes(child, told)


# --- modules that run at a layout by themselves -----------------------------------------------

_ENTRIES = ("apply", "init", "init_with_output", "lazy_init")


def module(cls: type, cfg: Any, *, spec: SpecLike = None, **fields: Any) -> Any:
    """A Linen module of a stock class at the sizes of a slimmed config.

    Its `apply` and `init` run at the layout by themselves, under any transformation; where it is
    bound, or made a part of another module, `flaxslim.layout(cfg)` does it.

    Args:
      cls: the Linen class, such as `FlaxBertModule`.
      cfg: the slimmed config, which becomes its field `config`; of a class without one, the
        fields that the config has.
      spec: only for a model of one's own whose config does not keep it.
      fields: further fields (`dtype=`).

    Raises `LayoutError` for a layout that cannot be read.

    >>> import flax.linen as nn
    >>> from flaxslim import Pair, Spec
    >>> import jax, numpy as np
    >>> class MLP(nn.Module):
    ...     hidden: int
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         h = nn.relu(nn.Dense(self.hidden)(x))
    ...         return nn.Dense(2)(h)
    >>> cfg = {"hidden": 8, "flaxslim_layout": {"version": 1, "sites": {"/Dense_1": 5}}}
    >>> spec = Spec(name="MLP", pairs=Pair(first="Dense_0", second="Dense_1", width="hidden"))
    >>> mlp = module(MLP, cfg, spec=spec)
    >>> variables = mlp.init(jax.random.key(0), np.ones((1, 3)))
    >>> jax.tree.map(np.shape, variables["params"]["Dense_0"])
    {'bias': (5,), 'kernel': (3, 5)}
    """
    from flaxslim._model import fields_of

    if not (isinstance(cls, type) and issubclass(cls, linen.Module)):
        own = getattr(cls, "module_class", None) or type(cls)
        raise LayoutError(
            "module() takes a class of flax.linen",
            seen=repr(cls)[:80],
            expected="such as FlaxBertModule",
            mend=f"pass {own.__name__}" if issubclass(own, linen.Module) else None,
        )
    found = _layout_of(cfg, spec)
    return module_at(cls, found, **{**fields_of(cls, cfg), **fields})


def _layout_of(cfg: Any, spec: SpecLike) -> Layout | None:
    return Layout.of(cfg, None if spec is None else chosen(spec, cfg))


def at_layout_of(module: Any, cfg: Any) -> Any:
    """A Linen module that runs at the layout of a config; the same one if there is none."""
    found = Layout.of(cfg)
    return module if found is None else module_at(type(module), found, **_fields(module))


def module_at(cls: type, found: Layout | None, **fields: Any) -> Any:
    """An instance of a Linen class whose entry points run at a layout."""
    return _class_at(cls, found)(**fields)


def _class_at(cls: type, found: Layout | None) -> type:
    def entering(name: str) -> Any:
        method = getattr(cls, name)

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                if clips(cls):
                    stack.enter_context(clip_compat())
                if found is not None:
                    stack.enter_context(_running_at(_Context(layout=found, by_config=False)))
                return method(self, *args, **kwargs)

        return linen.nowrap(call)

    def body(namespace: dict[str, Any]) -> None:
        namespace |= {name: entering(name) for name in _ENTRIES}
        namespace |= {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__reduce__": linen.nowrap(lambda self: (_restored, (cls, found, _fields(self)))),
        }

    return types.new_class(cls.__name__, (cls,), exec_body=body)


def _fields(module: Any) -> dict[str, Any]:
    names = (f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name"))
    return {name: getattr(module, name) for name in names}


def _restored(cls: type, found: Layout | None, fields: Mapping[str, Any]) -> Any:
    return module_at(cls, found, **fields)


class ModuleClass:
    """A Linen class at a layout: called like the class, and equal to it.

    transformers makes modules anew from `model.module_class` (to enable gradient checkpointing),
    and asks which class that is.
    """

    def __init__(self, cls: type, found: Layout | None):
        self.cls, self.found = cls, found
        functools.update_wrapper(self, cls, updated=())

    def __call__(self, *args: Any, **fields: Any) -> Any:
        return _class_at(self.cls, self.found)(*args, **fields)

    def __eq__(self, other: object) -> bool:
        return other is self.cls or (isinstance(other, ModuleClass) and other.cls is self.cls)

    def __hash__(self) -> int:
        return hash(self.cls)


def lay_out(model: Any) -> Any:
    """Let an instance of a transformers class run at the layout of its config from now on.

    Returns the same instance; one whose config has no layout stays as it is (but T5-like ones get
    the `jnp.clip` that they need).
    """
    found = Layout.of(model.config)
    cls = type(model.module)
    if found is not None or clips(cls):
        model._module = module_at(cls, found, **_fields(model.module))
        model.module_class = ModuleClass(cls, found)
    return model
