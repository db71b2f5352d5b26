"""`discover` and `explain`: which axes of a function's parameters can be cut, from its trace."""

import warnings
from collections.abc import Callable
from typing import Any

from flax import nnx

from flaxslim._discover._discovery import discovered
from flaxslim._discover._function import function
from flaxslim._discover._rules._table import axis_rule
from flaxslim._nnx import with_counts
from flaxslim._spec import Spec
from flaxslim.errors import DiscoveryError, DiscoveryWarning

__all__ = ["axis_rule", "discover", "explain"]


def discover(
    fn: Any,
    params: Any,
    *inputs: Any,
    cfg: Any = None,
    rebuild: Callable[[Any], Any] | None = None,
    name: str = "DISCOVERED",
) -> Spec:
    """Find the prunable pairs of a model nobody wrote a spec for, from what it computes.

    The function is traced on shapes, nothing is computed; each axis of each parameter is followed
    through the jaxpr to where it is summed over. An axis is in the spec if a channel whose second
    row is zero drops out of the result: if it meets nothing but operations on each entry by
    itself and contractions with parameters. `explain` says of all others why not.

    Args:
      fn: a function of parameters and inputs; a Linen module, for its `apply`; or an nnx module
        alone, followed by its inputs.
      params: the parameters, as arrays or `jax.ShapeDtypeStruct`s, in any container; an
        nnx.Module is split.
      inputs: the other arguments; what is an array is traced, by its shape, the rest is passed as
        it is.
      cfg: the config that holds the widths, if the spec is to resize it. A key is taken if it is
        the only one of that value, and a warning says so; with `rebuild` it is tried.
      rebuild: a function of a config that returns the shapes of its model's parameters, as
        `jax.eval_shape` does: `lambda cfg: jax.eval_shape(Model(**cfg).init, key, x)`.
      name: of the spec.

    Returns: an ordinary `Spec`: it prints, `spec.source()` is its Python, `slim` takes it.

    Raises: `DiscoveryError` if the function cannot be traced, uses no parameter, or holds nothing
    that can be cut exactly, or if `rebuild` does not make these parameters of `cfg`;
    `UnsupportedTreeError` if `params` is no tree. Warns (`DiscoveryWarning`) of what could not be
    told: a width without a key, a primitive without a rule (see `axis_rule`), a function that runs
    at one width only.

    >>> import jax, jax.numpy as jnp
    >>> def mlp(p, x):
    ...     return jax.nn.relu(x @ p["up"] + p["b"]) @ p["down"]
    >>> shapes = {"up": (4, 64), "b": (64,), "down": (64, 4)}
    >>> params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    >>> print(discover(mlp, params, jnp.ones((2, 4))))
    DISCOVERED
      up "d f" -> relu -> down "f d"
    """
    if rebuild is not None and cfg is None:
        raise DiscoveryError(
            "rebuild= is a function of a config, and none was given",
            mend="discover(fn, params, *inputs, cfg=cfg, rebuild=rebuild)",
        )
    found = discovered(function(fn, params, inputs), cfg, rebuild)
    spec = found.spec(name)
    module = next((x for x in (fn, params) if isinstance(x, nnx.Module)), None)
    spec = spec if module is None else with_counts(spec, module, cfg)
    unknown = [
        f"no rule for the primitive {at}: what enters it is not cut; axis_rule({prim!r}) adds one"
        for prim, at in found.unknown.items()
    ]
    if notes := [*found.notes, *unknown]:
        warnings.warn("\n".join(notes), DiscoveryWarning, stacklevel=2)
    return spec


def explain(fn: Any, params: Any, path: Any = None, *inputs: Any) -> str:
    """Say with what the axes of a parameter are tied, whether they can be cut, and why not.

    Args:
      fn, params, inputs: as in `discover`; of an nnx module `explain(module, path, *inputs)`.
      path: of the parameter, or its end if that is clear; None for a report on all.

    Raises `DiscoveryError` if the function cannot be traced, or has no such parameter.

    >>> import jax, jax.numpy as jnp, textwrap
    >>> def mlp(p, x):
    ...     return jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> params = {"up": jnp.ones((4, 64)), "down": jnp.ones((64, 4))}
    >>> print(textwrap.fill(explain(mlp, params, "down", jnp.ones((2, 4))), 80))
    down (64, 4). Axis 0 (64) is tied with up. It can be cut exactly: channels go
    whose rows in down are zero, with activation relu. Axis 1 (4) is tied with no
    other. It cannot be cut: it is an axis of the outputs.
    """
    if isinstance(fn, nnx.Module):  # which holds its parameters: all else is one place further on
        params, path = path, params
    if path is not None and not isinstance(path, str):
        raise DiscoveryError(
            "the path of a parameter comes before the inputs",
            seen=f"{type(path).__name__} in its place",
            expected="explain(fn, params, path, *inputs), or explain(nnx_module, path, *inputs); "
            "the path is a string, or None for a report on all",
        )
    found = discovered(function(fn, params, inputs))
    return str(found) if path is None else found.explain(path)
