"""Extractive question answering: the metric by hand, labels and answers back to the texts."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flaxslim.cli._tasks import _squad, _squad_metric
from flaxslim.cli._tasks._squad import Example
from flaxslim.errors import CorruptFileError, FlaxslimError, MissingFileError

CONTEXT = (
    "The tower stands in the old town of Ávila, and was built by 300 masons in 1090. "
    "It is 42 metres high; nobody has climbed it since the wall beside it fell in 1901. "
    "A second tower, half as high, was begun by the masons' sons and never finished."
)


def example(text: str, *, context: str = CONTEXT, id: str = "q") -> Example:
    start = context.index(text)
    return Example(
        id=id, question="Which one is it?", context=context, answers=(text,), starts=(start,)
    )


@pytest.fixture(scope="module")
def tokenizer():
    """BERT's way to cut text, over single characters: no file needed."""
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789.,;?'"))
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "tower", "wall", "ma", "##s", "##ons"]
    vocab = [*marks, *letters, *("##" + letter for letter in letters if letter != "s")]
    ids = {word: at for at, word in enumerate(vocab)}
    stock = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))  # type: ignore
    stock.normalizer = normalizers.BertNormalizer()  # type: ignore
    stock.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore
    stock.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # type: ignore
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    return PreTrainedTokenizerFast(tokenizer_object=stock, sep_token="[SEP]", **names)


@pytest.fixture(scope="module")
def real(data):
    """The real tokenizer, and the questions to train on and to be measured by."""
    squad = data / "squad"
    return (
        AutoTokenizer.from_pretrained(data / "sentence-encoder"),
        _squad.read(squad / "squad-v1.1-train-part.json"),
        _squad.read(squad / "xquad.en.json"),
    )


def perfect(made: _squad.Features) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are 1 where the label is, as if a model knew; lower in windows without it."""
    assert made.labels is not None
    start, end = (np.zeros(made.offsets.shape[:2], np.float32) for _ in range(2))
    start[np.arange(len(made)), made.labels[:, 0]] = 1
    end[np.arange(len(made)), made.labels[:, 1]] = 1
    return start, end


def said(made: _squad.Features, examples: list[Example]) -> list[str]:
    """What the labels of each window cut out of the context; "" where they say [CLS]."""
    assert made.labels is not None
    rows = zip(made.example.tolist(), made.labels.tolist(), made.offsets, strict=True)
    return [
        examples[at].context[offsets[start, 0] : offsets[end, 1]] if start else ""
        for at, (start, end), offsets in rows
    ]


# --- the metric -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("an apple a day", "apple day"),
        ("Theatre, Anna & a-ha", "theatre anna aha"),
        ("U.S.", "us"),
        ("  two\t words\n", "two words"),
        ("Ávila – ÉCOLE", "ávila – école"),
        ("«the» “a”", "« » “ ”"),
        ("the", ""),
        ("", ""),
    ],
)
def test_normalized(text, words):
    assert _squad_metric.normalized(text) == words


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1"),
    [
        ("the Broncos.", "Broncos", True, 1.0),
        ("Denver Broncos", "Broncos", False, 2 / 3),  # 1/2 and 1
        ("old town", "the old town of Ávila", False, 2 / 3),  # 1 and 1/2
        ("a b c d", "b c x", False, 4 / 6),  # "a" is an article: 2/3 and 2/3
        ("go go go stop", "go go", False, 2 / 3),  # each as often as it occurs: 2/4 and 1
        ("red", "blue", False, 0.0),
        ("", "blue", False, 0.0),
        ("the", "a", True, 0.0),  # v1.1 knows no overlap of nothing with nothing
        ("ÁVILA", "ávila", True, 1.0),
        ("Avila", "Ávila", False, 0.0),
        ("50 %", "50%", True, 1.0),
    ],
)
def test_exact_and_f1(answer, gold, exact, f1):
    assert _squad_metric.exact(answer, gold) is exact
    assert _squad_metric.f1(answer, gold) == pytest.approx(f1)
    assert _squad_metric.f1(gold, answer) == pytest.approx(f1)


def test_score_is_the_best_over_golds_and_the_mean_over_questions():
    golds = {"p": ["blue", "dark red"], "q": ["two words", "one"], "r": ["x"], "s": ["y"]}
    found = _squad_metric.score({"p": "red", "q": "One!", "r": "z", "other": "y"}, golds)
    assert found.exact == pytest.approx(100 / 4)
    assert found.f1 == pytest.approx(100 * (2 / 3 + 1) / 4)
    assert _squad_metric.score({}, {}) == _squad_metric.Score(exact=0.0, f1=0.0)


# --- read -------------------------------------------------------------------------------------


def tree(**change) -> dict:
    qa = {"id": "q", "question": " Which? ", "answers": [{"text": "two", "answer_start": 4}]}
    return {"data": [{"paragraphs": [{"context": "one two", "qas": [{**qa, **change}]}]}]}


def written(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return str(path)


def test_read(tmp_path):
    golds = [{"text": "two", "answer_start": 4}, {"text": " two", "answer_start": 3}]
    found = _squad.read(written(tmp_path / "squad.json", tree(answers=golds)))
    assert found == [
        Example(id="q", question="Which?", context="one two", answers=("two", "two"), starts=(4, 4))
    ]


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ({"rows": []}, "no 'data'"),
        ({"data": []}, "no question"),
        ({"data": [1]}, "not a SQuAD v1.1 file"),
        ({"data": [{"paragraphs": [{"qas": [{"id": 1}]}]}]}, "no 'question'"),
        (tree(answers=[]), "question q has no answer (as in SQuAD v2)"),
        (tree(answers=[{"text": "two", "answer_start": 3}]), "no 'two' at character 3"),
        (tree(answers=[{"text": "two", "answer_start": -3}]), "no 'two' at character -3"),
        (tree(answers=[{"text": "two", "answer_start": "4"}]), "not a SQuAD v1.1 file"),
        (tree(answers=[{"text": " ", "answer_start": 3}]), "no '' at character 4"),
        ({"data": tree()["data"] * 2}, "two questions of the same id"),
    ],
)
def test_read_refuses(tmp_path, content, seen):
    with pytest.raises(CorruptFileError) as caught:
        _squad.read(written(tmp_path / "squad.json", content))
    assert seen in str(caught.value)
    assert "squad.json" in str(caught.value)


def test_read_absent(tmp_path):
    with pytest.raises(MissingFileError, match=r"none\.json"):
        _squad.read(tmp_path / "none.json")
    with pytest.raises(CorruptFileError, match="cannot be read"):
        _squad.read(tmp_path)


# --- features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [30, 40, 400])
@pytest.mark.parametrize("text", ["Ávila", "The tower", "300 masons", "sons", "finished", "42"])
def test_labels_decode_to_the_answer(tokenizer, text, length):
    examples = [example("1090"), example(text, id="r")]
    made = _squad.features(examples, tokenizer, length=length, stride=9, labels=True)
    texts = said(made, examples)
    assert set(texts) <= {"", "1090", text}
    assert {
        (at, words) for at, words in zip(made.example.tolist(), texts, strict=True) if words
    } == {
        (0, "1090"),
        (1, text),
    }
    assert all(array.dtype == np.int32 for array in made.inputs.values())
    assert all(array.shape == (len(made), length) for array in made.inputs.values())


def test_an_answer_cut_by_the_end_of_its_window_is_no_answer(tokenizer):
    examples = [example(CONTEXT[:40])]
    made = _squad.features(examples, tokenizer, length=30, stride=0, labels=True)
    assert made.labels is not None
    assert not made.labels.any()


def test_tokens_of_one_character_are_all_the_answer(tokenizer):
    offsets = np.array([[[-1, -1], [0, 1], [1, 2], [1, 2], [2, 2], [2, 3], [-1, -1]]])
    found = _squad._labels([example("b", context="abc")], np.array([0]), offsets)
    assert found.tolist() == [[2, 3]]


@pytest.mark.parametrize(("length", "stride"), [(30, 0), (30, 7), (40, 21), (24, 5)])
def test_windows_cover_the_context(tokenizer, length, stride):
    made = _squad.features([example("1090")], tokenizer, length=length, stride=stride, labels=False)
    assert made.labels is None
    whole = _squad.features([example("1090")], tokenizer, length=999, stride=0, labels=False)
    all_tokens = [tuple(span) for span in whole.offsets[0].tolist() if span[0] >= 0]
    windows = [[tuple(span) for span in row if span[0] >= 0] for row in made.offsets.tolist()]
    assert len(whole) == 1
    assert len(windows) > 3
    assert windows[0] + [span for row in windows[1:] for span in row[stride:]] == all_tokens
    for one, other in itertools.pairwise(windows):
        assert one[len(one) - stride :] == other[:stride]


def test_features_refuse(tokenizer):
    make = _squad.features
    with pytest.raises(FlaxslimError, match="raise the length"):
        make([example("42")], tokenizer, length=20, stride=10, labels=True)
    with pytest.raises(FlaxslimError, match="a length of more than"):
        make([example("42")], tokenizer, length=10, stride=0, labels=True)
    with pytest.raises(FlaxslimError, match="stride -1"):
        make([example("42")], tokenizer, length=99, stride=-1, labels=True)
    with pytest.raises(FlaxslimError, match="at least one"):
        make([], tokenizer, length=99, stride=0, labels=True)
    with pytest.raises(FlaxslimError, match="use_fast"):
        make([example("42")], object(), length=99, stride=0, labels=True)


# --- batches ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tokenizer) -> tuple[_squad.Features, list[Example]]:
    """Windows of many lengths."""
    examples = [
        example("1090", context=CONTEXT[: 80 + at % 160], id=str(at)) for at in range(0, 500, 7)
    ]
    return _squad.features(examples, tokenizer, length=150, stride=20, labels=True), examples


def taken(stream, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(stream, count))


@pytest.mark.parametrize("size", [8, 1, 500])
def test_every_epoch_has_every_window(many, size):
    made, _ = many
    epoch = -(-len(made) // size)
    found = taken(_squad.batches(made, size, np.random.default_rng(0), bucket=32), 2 * epoch)
    for part in (found[:epoch], found[epoch:]):
        assert {row for batch in part for row in batch["rows"].tolist()} == set(range(len(made)))
    orders = [
        np.concatenate([batch["rows"] for batch in part]) for part in (found[:epoch], found[epoch:])
    ]
    assert not np.array_equal(orders[0], orders[1])
    for batch in found:
        rows, longest = batch["rows"], made.lengths[batch["rows"]].max()
        width = batch["input_ids"].shape[1]
        assert longest <= width < longest + 32
        assert width % 32 == 0 or width == 150
        assert batch["input_ids"].shape[0] == size
        np.testing.assert_array_equal(batch["starts"], made.labels[rows, 0])
        np.testing.assert_array_equal(batch["ends"], made.labels[rows, 1])
        for name in made.inputs:
            np.testing.assert_array_equal(batch[name], made.inputs[name][rows, :width])


def test_batches_are_a_function_of_the_generator(many):
    made, _ = many
    one, same, other = (
        np.stack(
            [b["rows"] for b in taken(_squad.batches(made, 4, np.random.default_rng(seed)), 9)]
        )
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_in_order_has_every_window_once_by_length(many):
    made, _ = many
    found = list(_squad.in_order(made, 8, bucket=32))
    rows = np.concatenate([batch["rows"] for batch in found])
    assert sorted(rows[: len(made)]) == list(range(len(made)))
    assert set(rows[len(made) :]) <= {rows[len(made) - 1]}
    assert (np.diff(made.lengths[rows]) >= 0).all()
    assert {len(batch["rows"]) for batch in found} == {8}


def test_batches_refuse(many):
    made, examples = many
    with pytest.raises(FlaxslimError, match="labels=True"):
        next(_squad.batches(_unlabelled(made), 4, np.random.default_rng(0)))
    with pytest.raises(FlaxslimError, match="size 0"):
        next(_squad.batches(made, 0, np.random.default_rng(0)))
    with pytest.raises(FlaxslimError, match="bucket 0"):
        next(_squad.in_order(made, 4, bucket=0))
    with pytest.raises(FlaxslimError, match="a row for each window"):
        _squad.answers(made, np.zeros((3, 5)), np.zeros((3, 5)), examples)


def _unlabelled(made: _squad.Features) -> _squad.Features:
    return _squad.Features(inputs=made.inputs, offsets=made.offsets, example=made.example)


# --- loss and answers -------------------------------------------------------------------------


def test_loss_ignores_padding():
    batch = {
        "attention_mask": np.array([[1, 1, 1, 0], [1, 1, 0, 0]]),
        "starts": np.array([1, 0]),
        "ends": np.array([2, 1]),
    }
    start = jnp.array([[0.0, 2.0, 0.0, 50.0], [0.0, 0.0, 9.0, 9.0]])
    end = jnp.zeros((2, 4))
    by_hand = (np.log(np.exp(2) + 2) - 2 + np.log(2) + np.log(3) + np.log(2)) / 4
    value, grads = jax.value_and_grad(_squad.loss, argnums=(0, 1))(start, end, batch)
    assert value == pytest.approx(by_hand, rel=1e-6)
    for grad in grads:
        assert np.isfinite(grad).all()
        assert not np.asarray(grad)[batch["attention_mask"] == 0].any()
    assert _squad.loss(start.astype(jnp.bfloat16), end, batch).dtype == jnp.float32


@pytest.mark.parametrize("length", [40, 400])
def test_answers_of_perfect_logits(tokenizer, length):
    texts = ["Ávila", "The tower", "300 masons in 1090", "wall", "never finished"]
    examples = [example(text, id=text) for text in texts]
    made = _squad.features(examples, tokenizer, length=length, stride=20, labels=True)
    assert _squad.answers(made, *perfect(made), examples) == {text: text for text in texts}


def test_answers_are_the_best_allowed_span(tokenizer):
    examples = [example("tower", context="tower wall tower wall")]
    made = _squad.features(examples, tokenizer, length=30, stride=0, labels=False)
    context = np.flatnonzero(made.offsets[0, :, 0] >= 0)
    assert len(context) == 4

    def found(start: list[float], end: list[float], **limits) -> str:
        logits = np.full((2, 1, 30), 99.0)  # what is no context never counts
        logits[0, 0, context], logits[1, 0, context] = start, end
        return _squad.answers(made, logits[0], logits[1], examples, **limits)["q"]

    assert found([9, 0, 0, 0], [0, 0, 0, 9]) == "tower wall tower wall"
    assert found([9, 0, 2, 0], [0, 1, 0, 9], longest=2) == "tower wall"  # 9 + 1, not 2 + 9 ...
    assert found([9, 0, 3, 0], [0, 1, 0, 9], longest=2) == "tower wall"  # ... which is 12 here
    assert found([0, 0, 0, 9], [9, 0, 0, 1]) == "wall"  # never backwards
    assert found([0, 0, 0, 9], [9, 0, 0, 1], best=1) == ""
    assert found([np.nan] * 4, [0, 0, 0, 0]) == ""


def test_logits_are_put_back_in_order(many):
    made, _ = many
    seen = []

    def forward(inputs):
        seen.append(inputs["input_ids"].shape)
        assert set(inputs) == set(made.inputs)
        return inputs["input_ids"] + 1, inputs["input_ids"] * 2

    start, end = _squad.logits(forward, made, 8, bucket=32)
    real = made.inputs["attention_mask"] > 0
    np.testing.assert_array_equal(start[real], made.inputs["input_ids"][real] + 1)
    np.testing.assert_array_equal(end[real], made.inputs["input_ids"][real] * 2)
    assert len(set(seen)) > 1


# --- real data --------------------------------------------------------------------------------


def test_labels_of_real_questions_decode_to_the_answers(real):
    tokenizer, train, _ = real
    examples = train[:600]
    made = _squad.features(examples, tokenizer, length=128, stride=48, labels=True)
    found = [set() for _ in examples]
    for at, text in zip(made.example.tolist(), said(made, examples), strict=True):
        found[at] |= {text} - {""}
    for one, texts in zip(examples, found, strict=True):
        (text,) = texts  # some window has it, and all that have it agree
        # Two golds end amid a word ("... and Rober"): tokens can but say the whole word.
        assert text.startswith(one.answers[0])
    assert sum(texts != {e.answers[0]} for e, texts in zip(examples, found, strict=True)) == 2


@pytest.mark.parametrize(("length", "stride"), [(384, 128), (192, 64)])
def test_answers_of_perfect_logits_on_real_questions(real, length, stride):
    tokenizer, _, examples = real
    made = _squad.features(examples, tokenizer, length=length, stride=stride, labels=True)
    found = _squad.answers(made, *perfect(made), examples)
    # One gold ends amid a number: "7,000,000 square kilometres (2,70|0 ...".
    wrong = [e for e in examples if found[e.id] != e.answers[0]]
    assert len(wrong) == 1
    assert found[wrong[0].id].startswith(wrong[0].answers[0])
    result = _squad_metric.score(found, {e.id: e.answers for e in examples})
    assert result.exact == pytest.approx(100 * 1189 / 1190)
    assert result.f1 > result.exact
