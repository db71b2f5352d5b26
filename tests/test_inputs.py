"""Inputs for every stock class, and the class for every config."""

from typing import Any

import jax
import numpy as np
import pytest
from zoo import CASES, Case, build

from flaxslim._compat import parameter_shapes, shell
from flaxslim._inputs import inputs_for, model_class_for
from flaxslim.errors import InputsError, UnknownFamilyError

# Compiled without optimising: each case runs once.
FAST: dict[str, Any] = {"xla_backend_optimization_level": 0}


# Tokens with pixels, and audio. The others run on theirs where they are cut and compared.
ORDINARY = ("FlaxCLIPModel", "FlaxWav2Vec2ForCTC")


def params_of(cases):
    return [
        pytest.param(case, id=str(case), marks=[] if str(case) in ORDINARY else pytest.mark.long)
        for case in cases
    ]


def case(name: str) -> Case:
    return next(case for case in CASES if str(case) == name)


@pytest.mark.parametrize("chosen", params_of(CASES))
def test_every_class_runs_on_its_inputs(chosen):
    cls, cfg, params = build(chosen)
    model = shell(cls, cfg)
    inputs = inputs_for(cls, cfg, length=chosen.length)
    forward = jax.jit(lambda p, x: model(**x, params=p, train=False))
    outputs = forward.lower(params, inputs).compile(FAST)(params, inputs)
    leaves = jax.tree.leaves(outputs)
    assert leaves
    for leaf in leaves:
        assert np.isfinite(leaf).all()
        assert 0 < np.abs(leaf).max() < 1e3


def test_the_zoo_has_one_short_case_for_each_family():
    families = {case.family for case in CASES}
    assert len(families) == 37
    assert families == {case.family for case in CASES if case.short}
    assert len({str(case) for case in CASES}) == len(CASES)


def test_build_is_deterministic_and_new_each_time():
    chosen = case("FlaxViTModel")
    (_, cfg, params), (_, again, same) = build(chosen), build(chosen)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert cfg is not again
    assert cfg.to_dict() == again.to_dict()
    other = build(chosen, seed=1)[2]
    assert not np.array_equal(jax.tree.leaves(params)[0], jax.tree.leaves(other)[0])


# --- model_class_for --------------------------------------------------------------------------


def test_architectures_name_the_class_of_every_case():
    wrong = {str(case): model_class_for(case.config()).__name__ for case in CASES}
    assert wrong == {str(case): case.cls_name for case in CASES}


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("BertLMHeadModel", "FlaxBertForCausalLM"),
        ("FlaxBertForMaskedLM", "FlaxBertForMaskedLM"),
        ("BertForSomethingOfMyOwn", "FlaxBertModel"),
    ],
)
def test_names_that_are_not_simply_flax_and_the_name(architecture, expected):
    cfg = {"model_type": "bert", "architectures": [architecture]}
    assert model_class_for(cfg).__name__ == expected


@pytest.mark.parametrize(
    "name",
    [str(case) for case in CASES if case.short and "+" in case.variant]
    + ["FlaxCLIPModel", "FlaxCLIPTextModel", "FlaxCLIPVisionModel", "FlaxGPT2Model-none"],
)
def test_without_architectures_it_is_the_base_class(name):
    cfg = case(name).config()
    cfg.architectures = None
    assert model_class_for(cfg).__name__ == case(name).cls_name


def test_a_family_without_flax_class_is_named():
    with pytest.raises(UnknownFamilyError, match=r"no Flax class[\s\S]*qwen2"):
        model_class_for({"model_type": "qwen2"})


@pytest.mark.parametrize(
    ("named", "tree"),
    [
        ("FlaxBertForMaskedLM", "FlaxBertModel"),
        ("FlaxBertModel", "FlaxBertForMaskedLM"),
        ("FlaxBertModel", "FlaxBertForQuestionAnswering"),
        ("FlaxBertForSequenceClassification", "FlaxBertForPreTraining"),
    ],
)
def test_params_decide_where_the_named_class_does_not_fit(named, tree):
    cfg = case(named).config()
    params = parameter_shapes(case(tree).cls, cfg)
    assert model_class_for(cfg, params).__name__ == tree
    assert model_class_for(cfg, {"params": params}).__name__ == tree


def test_the_named_class_stays_where_others_fit_as_well():
    cfg = case("FlaxBertForTokenClassification").config()
    params = parameter_shapes(case("FlaxBertForQuestionAnswering").cls, cfg)
    params["classifier"] = params.pop("qa_outputs")
    assert model_class_for(cfg, params).__name__ == "FlaxBertForTokenClassification"


def test_tensors_that_no_class_has_are_passed_over():
    cfg = case("FlaxBertForMaskedLM").config()
    params = parameter_shapes(case("FlaxBertForMaskedLM").cls, cfg)
    params["lora"] = {"a": params["bert"]["embeddings"]["word_embeddings"]["embedding"]}
    assert model_class_for(cfg, params).__name__ == "FlaxBertForMaskedLM"


def test_params_that_no_class_has_are_refused():
    cfg = case("FlaxViTModel").config()
    params = parameter_shapes(case("FlaxViTModel").cls, cfg)
    del params["encoder"]["layer"]["0"]["output"]
    with pytest.raises(InputsError, match=r"encoder/layer/0/output/dense[\s\S]*FlaxViTModel"):
        model_class_for(cfg, params)


# --- inputs_for -------------------------------------------------------------------------------


def inputs_of(name: str, **options) -> dict[str, np.ndarray]:
    return inputs_for(case(name).cls, case(name).config(), **options)


def test_same_seed_same_inputs():
    name = "FlaxEncoderDecoderModel-bert+bart"
    first, same, other = inputs_of(name), inputs_of(name), inputs_of(name, seed=1)
    assert first.keys() == same.keys() == {"input_ids", "attention_mask", "decoder_input_ids"}
    for key in first:
        np.testing.assert_array_equal(first[key], same[key])
    assert not np.array_equal(first["input_ids"], other["input_ids"])
    assert not np.array_equal(first["input_ids"], first["decoder_input_ids"])


def test_tokens_are_ordinary_with_one_end_of_sequence():
    ids = inputs_of("FlaxBartForSequenceClassification", batch=3, length=50)["input_ids"]
    assert ids.shape == (3, 50)
    assert ids.dtype == np.int32
    assert (ids[:, -1] == 2).all()
    assert ((ids[:, :-1] > 2) & (ids[:, :-1] < 99)).all()


def test_the_mask_hides_the_end_of_the_last_row():
    mask = inputs_of("FlaxBertModel", length=8)["attention_mask"]
    np.testing.assert_array_equal(mask, [[1] * 8, [1] * 6 + [0] * 2])
    assert inputs_of("FlaxBertModel", batch=1)["attention_mask"].all()


def test_the_default_length_is_bounded_by_the_positions():
    cfg = case("FlaxRobertaModel").config()
    cfg.max_position_embeddings = 12  # of which two belong to the padding
    assert inputs_for(case("FlaxRobertaModel").cls, cfg)["input_ids"].shape == (2, 10)
    with pytest.raises(InputsError, match=r"at: +input_ids[\s\S]*length 11[\s\S]*at most 10"):
        inputs_for(case("FlaxRobertaModel").cls, cfg, length=11)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("FlaxBertForMultipleChoice", {"input_ids": (2, 2, 8), "attention_mask": (2, 2, 8)}),
        ("FlaxBertForCausalLM-cross", {"encoder_hidden_states": (2, 8, 32)}),
        ("FlaxBigBirdModel-sparse", {"input_ids": (2, 32)}),
        ("FlaxBigBirdModel-full", {"input_ids": (2, 8)}),
        ("FlaxCLIPModel", {"input_ids": (2, 8), "pixel_values": (2, 3, 16, 16)}),
        ("FlaxWav2Vec2ForCTC", {"input_values": (2, 90)}),  # 8 frames of 10 samples
        ("FlaxWhisperModel", {"input_features": (2, 16, 32), "decoder_input_ids": (2, 8)}),
        ("FlaxSpeechEncoderDecoderModel-wav2vec2+gpt2", {"inputs": (2, 90)}),
    ],
)
def test_shapes(name, shapes):
    made = {key: array.shape for key, array in inputs_of(name, length=8).items()}
    assert shapes.items() <= made.items()


def test_an_argument_that_is_not_known_is_named():
    class Odd:
        def __call__(self, input_ids, spectrum, params=None): ...

    with pytest.raises(InputsError, match=r"Odd needs[\s\S]*at: +spectrum"):
        inputs_for(Odd, case("FlaxBertModel").config())


def test_a_size_that_the_config_lacks_is_named():
    with pytest.raises(InputsError, match=r"pixel_values[\s\S]*image_size"):
        inputs_for(case("FlaxViTModel").cls, case("FlaxBertModel").config())
