"""Which stock Flax class runs a checkpoint, and inputs on which to run it."""

import inspect
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flaxslim._compat import parameter_shapes, stock_config
from flaxslim._tree import flatten
from flaxslim.errors import ConfigError, InputsError, UnknownFamilyError, nearest

Shapes = dict[str, tuple[int, ...]]

# PyTorch classes whose Flax counterpart is not "Flax" + name.
_RENAMED = {"BertLMHeadModel": "BertForCausalLM", "T5WithLMHeadModel": "T5ForConditionalGeneration"}
# Base classes that transformers' own table of them leaves out.
_BASES = {
    "clip_text_model": "FlaxCLIPTextModel",
    "clip_vision_model": "FlaxCLIPVisionModel",
    "encoder-decoder": "FlaxEncoderDecoderModel",
    "speech-encoder-decoder": "FlaxSpeechEncoderDecoderModel",
    "vision-encoder-decoder": "FlaxVisionEncoderDecoderModel",
}


# --- which class ------------------------------------------------------------------------------


def model_class_for(cfg: Any, params: Any = None) -> type:
    """The stock Flax class of a config: the one that `architectures` names, else the base class.

    With `params`, the class must also have these parameters: a bare tree under a config that names
    a head class (or a head under one that names the bare class) gets the class of that family
    that has the same paths, else the one that uses most of them.
    Raises `UnknownFamilyError` if transformers has no Flax class for the `model_type`,
    `InputsError` if no class of the family has these parameters.

    >>> model_class_for({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}).__name__
    'FlaxGPT2LMHeadModel'
    >>> model_class_for({"model_type": "gpt2"}).__name__
    'FlaxGPT2Model'
    """
    cfg = stock_config(cfg)
    base = _base_class(cfg.model_type)
    named = _named_class(cfg.architectures or []) or base
    if params is None:
        return named
    have = _shapes(_unwrapped(params))
    if _fit(_shapes(parameter_shapes(named, cfg)), have)[0] >= _SAME_PATHS:
        return named
    fits = {cls: _fit(shapes, have) for cls, shapes in _family(named, base, cfg)}
    best = max(fits, key=lambda cls: fits[cls])  # the first of equals
    if fits[best][0] > _UNFIT:
        return best
    want = _shapes(parameter_shapes(named, cfg))
    raise InputsError(
        f"no Flax class of {cfg.model_type} has these parameters",
        path=next(iter(sorted(want.keys() ^ have.keys())), None),
        seen=f"{len(have)} tensors, of which {len(want.keys() & have.keys())} are also in "
        f"{named.__name__}, which has {len(want)}",
        expected="one of " + ", ".join(cls.__name__ for cls in fits),
        mend="pass the params of one of these classes, or your own model: "
        "verify(..., model=fn, inputs=...)",
    )


def _named_class(architectures: list[str]) -> type | None:
    import transformers

    for name in architectures:
        name = _RENAMED.get(name, name)
        found = getattr(transformers, name if name.startswith("Flax") else "Flax" + name, None)
        if isinstance(found, type):
            return found
    return None


def _base_class(model_type: str) -> type:
    import transformers
    from transformers.models.auto.modeling_flax_auto import FLAX_MODEL_MAPPING_NAMES

    names = {**FLAX_MODEL_MAPPING_NAMES, **_BASES}
    if model_type not in names:
        raise UnknownFamilyError(
            "transformers has no Flax class for this model_type",
            seen=model_type,
            near=nearest(model_type or "", names),
            mend="give the model itself: model=fn(params, *inputs), a Linen or an nnx module",
        )
    return getattr(transformers, names[model_type])


def _family(named: type, base: type, cfg: Any) -> Iterator[tuple[type, Shapes]]:
    """The classes of the family that take this config, the likeliest first."""
    from transformers import FlaxPreTrainedModel

    others = [
        cls
        for cls in vars(sys.modules[base.__module__]).values()
        if isinstance(cls, type) and issubclass(cls, FlaxPreTrainedModel)
    ]
    for cls in dict.fromkeys([named, base, *others]):
        known = getattr(cls, "module_class", None) and cls.__module__ == base.__module__
        config_class = getattr(cls, "config_class", None)
        if known and config_class and isinstance(cfg, config_class):
            try:
                yield cls, _shapes(parameter_shapes(cls, cfg))
            except ConfigError:
                continue  # a head that this config cannot make is not the one


def _unwrapped(params: Any) -> Any:
    return params["params"] if list(params) == ["params"] else params


def _shapes(tree: Any) -> Shapes:
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


_UNFIT, _USES_SOME, _SAME_PATHS, _SAME = range(4)


def _fit(want: Shapes, have: Shapes) -> tuple[int, int]:
    """How well parameters fit a class: the kind of fit, and how many tensors the class uses."""
    if want.keys() == have.keys():
        return (_SAME if want == have else _SAME_PATHS), len(want)
    return (_USES_SOME if want.keys() <= have.keys() else _UNFIT), len(want)


# --- which inputs -----------------------------------------------------------------------------


def inputs_for(
    model_class: type, cfg: Any, *, batch: int = 2, length: int | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Keyword inputs for a stock Flax class, made from the signature of its call and its config.

    Token ids `(batch, length)` are ordinary ones of the vocabulary, with the end-of-sequence token
    (if there is one) once, at the end; `attention_mask` hides the end of the last row; pixels
    `(batch, channels, height, width)`, audio samples `(batch, samples)` and log-mel features
    `(batch, mel bins, frames)` are standard normal. `length` is that of the token sequences, or
    the frames of an audio encoder; 32 or as many as the model has positions, unless given.
    BigBird's sparse attention needs whole blocks, so there it is rounded up.
    The same seed gives the same inputs.
    Raises `InputsError`, which names the argument, if one that is required cannot be made.

    >>> from transformers import BertConfig, FlaxBertModel
    >>> inputs = inputs_for(FlaxBertModel, BertConfig(), length=8)
    >>> {name: array.shape for name, array in inputs.items()}
    {'input_ids': (2, 8), 'attention_mask': (2, 8)}
    """
    cfg = stock_config(cfg)
    parameters = inspect.signature(model_class.__call__).parameters
    want = [name for name in _MAKERS if name in parameters]
    made: dict[str, np.ndarray] = {}
    for name in want:
        ask = _Ask(name, model_class, cfg, batch, length, seed, made)
        array = _MAKERS[name](ask)
        if array is not None:
            made[name] = array
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if required and name not in made and name != "self":
            raise InputsError(
                f"{model_class.__name__} needs an argument that is not known here",
                path=name,
                expected="one of " + ", ".join(_MAKERS),
                mend=f"give the inputs yourself: inputs={{{name!r}: ...}}",
            )
    return made


class _Ask:
    """One argument to be made: for which class and config, how large, and its own randomness."""

    def __init__(
        self,
        name: str,
        model_class: type,
        cfg: Any,
        batch: int,
        length: int | None,
        seed: int,
        made: dict[str, np.ndarray],
    ):
        self.name, self.model_class, self.cfg = name, model_class, cfg
        self.batch, self.length, self.made = batch, length, made
        self.rng = np.random.default_rng([seed, zlib.crc32(name.encode())])

    def part(self, *names: str) -> Any:
        """The first of these sub-configs that the config has, else the config."""
        from transformers import PretrainedConfig

        parts = (getattr(self.cfg, name, None) for name in names)
        return next((part for part in parts if isinstance(part, PretrainedConfig)), self.cfg)

    def size(self, cfg: Any, *keys: str) -> int:
        for key in keys:
            value = getattr(cfg, key, None)
            if isinstance(value, int) and value > 0:
                return value
        raise InputsError(
            f"cannot tell how large {self.name} is for {self.model_class.__name__}",
            path=self.name,
            expected=f"a config with {' or '.join(keys)}",
            mend=f"set it in the config, or give the inputs: inputs={{{self.name!r}: ...}}",
        )

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal((self.batch, *shape), dtype=np.float32)


def positions(cfg: Any) -> int | None:
    """How many positions a text model has; None if there is no limit."""
    for key in ("max_target_positions", "max_position_embeddings", "n_positions"):
        value = getattr(cfg, key, None)
        if isinstance(value, int) and value > 0:
            # RoBERTa counts positions from the one after the padding token's id.
            return value - (cfg.pad_token_id + 1 if "roberta" in cfg.model_type else 0)
    return None


def _text_length(ask: _Ask, cfg: Any) -> int:
    limit = positions(cfg)
    length = ask.length or min(32, limit or 32)
    if getattr(cfg, "attention_type", None) == "block_sparse":
        # Fewer blocks than global, window and random ones together would overlap.
        blocks = max(-(-length // cfg.block_size), 6 + 2 * cfg.num_random_blocks)
        length = blocks * cfg.block_size
    if limit is not None and length > limit:
        raise InputsError(
            f"{ask.name} would be longer than the model has positions",
            path=ask.name,
            seen=f"length {length}",
            expected=f"at most {limit}",
            mend="pass a smaller length, or the inputs themselves",
        )
    return length


def _special_ids(cfg: Any) -> set[int]:
    ids: set[int] = set()
    for key, value in vars(cfg).items():
        if key.endswith("_token_id"):
            ids.update(i for i in (value if isinstance(value, list) else [value]) if i is not None)
    return ids


def _tokens(ask: _Ask, cfg: Any) -> np.ndarray:
    vocabulary = ask.size(cfg, "vocab_size")
    length = _text_length(ask, cfg)
    choices = 2 if "ForMultipleChoice" in ask.model_class.__name__ else None
    shape = (ask.batch, choices, length) if choices else (ask.batch, length)
    ordinary = sorted(set(range(vocabulary)) - _special_ids(cfg)) or [0]
    return ask.rng.choice(np.asarray(ordinary, np.int32), size=shape)


def _input_ids(ask: _Ask) -> np.ndarray:
    cfg = ask.part("text_config", "encoder")
    ids = _tokens(ask, cfg)
    eos = cfg.eos_token_id
    eos = eos[0] if isinstance(eos, list) else eos
    if eos is not None and 0 <= eos < cfg.vocab_size:
        ids[..., -1] = eos  # exactly once: sequence classifiers of the BART kind look for it
    return ids


def _attention_mask(ask: _Ask) -> np.ndarray | None:
    if "input_ids" not in ask.made:
        return None  # audio: every sample counts
    mask = np.ones_like(ask.made["input_ids"])
    if ask.batch > 1:
        mask[-1, ..., mask.shape[-1] - mask.shape[-1] // 4 :] = 0
    return mask


def _decoder_input_ids(ask: _Ask) -> np.ndarray:
    cfg = ask.part("decoder")
    ids = _tokens(ask, cfg)
    start = getattr(ask.cfg, "decoder_start_token_id", None)
    if start is not None and 0 <= start < cfg.vocab_size:
        ids[:, 0] = start
    return ids


def _question_lengths(ask: _Ask) -> np.ndarray:
    # BigBird subtracts 1e6 from the logits of the question, which would drown every difference.
    return np.zeros((ask.batch, 1), np.int32)


def _encoder_hidden_states(ask: _Ask) -> np.ndarray | None:
    if not getattr(ask.cfg, "add_cross_attention", False):
        return None
    cfg = ask.cfg
    width = ask.size(cfg, "cross_attention_hidden_size", "hidden_size")
    return ask.normal(_text_length(ask, cfg), width)


def _pixel_values(ask: _Ask) -> np.ndarray:
    cfg = ask.part("vision_config", "encoder")
    size = getattr(cfg, "image_size", None)
    if not isinstance(size, list | tuple):
        # Networks that are only convolutions take any size and have none in their config.
        side = ask.size(cfg, "image_size") if size or not hasattr(cfg, "depths") else 64
        size = (side, side)
    return ask.normal(ask.size(cfg, "num_channels"), *size)


def _audio(ask: _Ask) -> np.ndarray:
    cfg = ask.part("encoder")
    kernels, strides = getattr(cfg, "conv_kernel", None), getattr(cfg, "conv_stride", None)
    if not kernels or not strides:
        ask.size(cfg, "conv_kernel")
    samples = ask.length or 32
    for kernel, stride in zip(reversed(kernels or ()), reversed(strides or ()), strict=True):
        samples = (samples - 1) * stride + kernel
    return ask.normal(samples)


def _input_features(ask: _Ask) -> np.ndarray:
    # Whisper takes exactly this many frames: its first convolutions halve them.
    return ask.normal(
        ask.size(ask.cfg, "num_mel_bins"), 2 * ask.size(ask.cfg, "max_source_positions")
    )


# In the order in which they are made: a later one may look at an earlier one.
_MAKERS: dict[str, Callable[[_Ask], np.ndarray | None]] = {
    "input_ids": _input_ids,
    "pixel_values": _pixel_values,
    "input_values": _audio,
    "inputs": _audio,
    "input_features": _input_features,
    "attention_mask": _attention_mask,
    "decoder_input_ids": _decoder_input_ids,
    "encoder_hidden_states": _encoder_hidden_states,
    "question_lengths": _question_lengths,
}
