"""A model of any kind as `fn(params, batch) -> outputs`, at the sizes of any config."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen, nnx

from flaxslim._model import Model, as_inputs, is_hugging_face, resolve
from flaxslim.errors import CalibrationError

Fn = Callable[[Any, Any], Any]


def function_of(model: Any, params: Any, cfg: Any) -> Fn:
    """The model itself if it is a function; of a class or a module, a function that calls it.

    A Hugging Face Flax class or instance, a Linen module or an nnx module (which is `params`
    itself) gets a mapping by keyword, a tuple by position, and anything else as its only argument;
    built for `cfg`, so that it runs parameters of its sizes. Raises `CalibrationError` for
    something else.
    """
    linen_module = isinstance(model, linen.Module) or (
        isinstance(model, type) and issubclass(model, linen.Module)
    )
    if linen_module or is_hugging_face(model) or (model is None and isinstance(params, nnx.Module)):
        return _calling(resolve((params, cfg), model)[0])
    if not callable(model):
        raise CalibrationError(
            "nothing says how to run the model",
            seen=f"model={model!r}"[:80],
            expected="fn(params, batch) -> outputs; a Flax class of transformers, or an instance; "
            "a Linen module; or params that are an nnx module",
            mend="model=lambda params, batch: bert(**batch, params=params)[0]",
        )
    return model


def _calling(model: Model) -> Fn:
    def call(params: Any, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return model.call(params, **batch)
        inputs = as_inputs(batch)
        return model.call(params, *inputs.args, **inputs.kwargs)

    return call
