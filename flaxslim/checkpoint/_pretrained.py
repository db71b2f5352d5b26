"""`from_pretrained`: a stock Flax class from a folder, at the sizes that the folder records."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flaxslim import _record
from flaxslim._compat import clip_compat
from flaxslim._intercept import lay_out, layout
from flaxslim.errors import LayoutError
from flaxslim.specs import COMPOSITES


def from_pretrained(cls: Any, source: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
    """`cls.from_pretrained(source, ...)`, whatever widths and heads the layers have.

    An instance of the stock class comes back, and all that it can do it does: `model(...)`,
    `generate`, `init_cache`, `save_pretrained`, `to_bf16`, `params = ...`,
    `enable_gradient_checkpointing`, in jit, grad, vmap, pmap, in threads, pickled and copied. It
    runs at its layout wherever it is traced, and no other model is touched. A folder without a
    layout is loaded as ever, T5-like classes with the `jnp.clip` that they need.

    `head_mask` keeps its shape, with an entry for each head of the dense model; attentions that
    are put out have the heads that are left.

    Args:
      cls: a Flax class of transformers (or one of its Auto classes).
      source: a folder or a Hub id, Flax or PyTorch-named.
      args, kwargs: as for `cls.from_pretrained`: `dtype=`, `revision=`, `_do_init=False` (which
        gives `(model, params)`), ...

    Raises `LayoutError` if the class is not one of Flax, or if the layout cannot be read, does not
    fit the tensors, or belongs to another family than the class; and what `cls.from_pretrained`
    raises.

    >>> model = from_pretrained(FlaxBertForQuestionAnswering, "slim")  # doctest: +SKIP
    """
    _check_flax(cls)
    laid_out = _laid_out(cls, source, kwargs)
    with clip_compat(), layout(), _leading_on(source, laid_out):
        loaded = cls.from_pretrained(source, *args, **kwargs)
    if isinstance(loaded, tuple):  # _do_init=False
        return (lay_out(loaded[0]), *loaded[1:])
    return lay_out(loaded)


def _check_flax(cls: Any) -> None:
    bases = [base.__name__ for base in getattr(cls, "__mro__", ())]
    if not any(name == "FlaxPreTrainedModel" or name.startswith("FlaxAuto") for name in bases):
        name = getattr(cls, "__name__", str(cls))
        raise LayoutError(
            f"{name} is no Flax class of transformers",
            expected=f"such as Flax{name}" if isinstance(cls, type) else "a class",
            mend="import that from transformers (4.x); examples/per_layer_in_torch.py loads widths "
            "of each layer's own in PyTorch",
        )


def _laid_out(cls: Any, source: str | os.PathLike, kwargs: Mapping[str, Any]) -> bool:
    """Whether the source records a layout; raises `LayoutError` if the class cannot run it."""
    from transformers import PretrainedConfig

    given: Any = kwargs.get("config")
    if hasattr(given, "to_dict"):
        values = given.to_dict()
    else:
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        hub = {name: kwargs[name] for name in (*names, "subfolder") if name in kwargs}
        values, _ = PretrainedConfig.get_config_dict(given or source, **hub)
    parts = {name: part for name, part in values.items() if isinstance(part, Mapping)}
    if not any(_record.is_laid_out(part) for part in (values, *parts.values())):
        return False
    wanted = getattr(getattr(cls, "config_class", None), "model_type", None)
    # The towers of CLIP load from the whole; those of other composites would stay random.
    towers = COMPOSITES.get(values.get("model_type", ""), {})
    loadable = [values, *(part for name, part in parts.items() if towers.get(name) == "")]
    families = [part["model_type"] for part in loadable if part.get("model_type")]
    if wanted and families and wanted not in families:
        raise LayoutError(
            f"{cls.__name__} is a class of another family than the folder",
            path=str(source),
            seen=f"model_type {families[0]!r}",
            expected=f"model_type {wanted!r}",
            mend="load it with a Flax class of its family: "
            + str(_record.entry(values).get("load", "see architectures in its config.json")),
        )
    return True


@contextmanager
def _leading_on(source: str | os.PathLike, laid_out: bool) -> Iterator[None]:
    """transformers' word for shapes that do not fit, in ours."""
    try:
        yield
    except ValueError as error:
        if laid_out and "incompatible with the model shape" in str(error):
            raise LayoutError(
                "the layout of the config does not fit the tensors",
                path=str(source),
                seen=str(error).split(". Using")[0],
                mend="use the config.json that was saved with these weights; a config= that is "
                "given must hold the layout",
            ) from error
        raise
