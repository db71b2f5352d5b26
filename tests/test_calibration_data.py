"""Calibration data of each kind: what is read, what is refused, and what is told."""

import json
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxslim.checkpoint._read import read_config
from flaxslim.errors import CalibrationError, CalibrationWarning
from flaxslim.posttraining._data import read_calibration
from flaxslim.posttraining._tokens import joined, padded, windows

WORDS = [f"w{i}" for i in range(90)]
EOS, CLS, SEP = 2, 3, 4
BERT: dict[str, Any] = {"model_type": "bert", "vocab_size": 96, "max_position_embeddings": 64}
GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": 96, "n_positions": 64}
T5: dict[str, Any] = {
    "model_type": "t5",
    "vocab_size": 96,
    "is_encoder_decoder": True,
    "decoder_start_token_id": 0,
}
FEW = pytest.mark.filterwarnings("ignore::flaxslim.errors.CalibrationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint's folder with a tokenizer: one token a word, in BERT's template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[EOS]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    path = tmp_path_factory.mktemp("checkpoint")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(path)
    return path


@pytest.fixture
def read(folder):
    def call(path, cfg=BERT, **how):
        how = {"samples": 4, "length": 16, "batch_size": 2, **how}
        return read_calibration(path, **{"folder": folder, "cfg": cfg, **how})

    return call


@pytest.fixture
def write(tmp_path):
    def call(name, content):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8")
        return path

    return call


def texts_of(data):
    """The words of each sample, sorted; special tokens left out."""
    rows = [row for batch in data.batches for row in batch["input_ids"]]
    return sorted(" ".join(WORDS[i - 5] for i in row if i >= 5) for row in rows)


def same(one, other):
    assert [list(batch) for batch in one.batches] == [list(batch) for batch in other.batches]
    return all(
        np.array_equal(x, other.batches[i][name])
        for i, batch in enumerate(one.batches)
        for name, x in batch.items()
    )


LINES = "\n".join(" ".join(WORDS[i : i + 1 + i % 5]) for i in range(40))


# --- text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x.log", "x"])
def test_lines_are_samples_padded_to_their_batch(read, write, name):
    data = read(write(name, "w1 w2\r\n\n   \nw3\u2028\nw4 w5 w6\nw7\n"), length=32)
    assert texts_of(data) == ["w1 w2", "w3", "w4 w5 w6", "w7"]
    assert (data.samples, data.truncated, data.source[-len(name) :]) == (4, 0, name)
    for batch in data.batches:
        assert list(batch) == ["input_ids", "attention_mask"]
        assert {x.dtype for x in batch.values()} == {np.dtype(np.int32)}
        assert batch["input_ids"].shape == (2, 16)
        np.testing.assert_array_equal(batch["attention_mask"], batch["input_ids"] != 0)
    assert data.tokens == 7 + 2 * 4 == sum(b["attention_mask"].sum() for b in data.batches)


def test_padding_never_goes_beyond_the_length(read, write):
    data = read(write("x.txt", "\n".join([" ".join(WORDS[:18])] * 4)), length=20)
    assert data.batches[0]["input_ids"].shape == (2, 20)
    assert data.truncated == 0


def test_batches_hold_texts_of_like_length(read, write):
    data = read(write("x.txt", "\n".join([" ".join(WORDS[:n]) for n in (40, 1, 41, 2)])), length=60)
    assert sorted(b["input_ids"].shape for b in data.batches) == [(2, 16), (2, 48)]


def test_a_remainder_goes_unless_it_is_all(read, write):
    path = write("x.txt", LINES)
    assert [len(b["input_ids"]) for b in read(path, samples=7, batch_size=3).batches] == [3, 3]
    assert read(path, samples=7, batch_size=3).samples == 6
    assert [len(b["input_ids"]) for b in read(path, samples=2, batch_size=3).batches] == [2]


@pytest.mark.parametrize("cfg", [BERT, GPT2, T5], ids=["padded", "packed", "two stacks"])
def test_the_same_seed_gives_the_same_bytes(read, write, cfg):
    path = write("x.txt", LINES)
    first = read(path, cfg, length=8)
    assert same(first, read(path, cfg, length=8))
    assert not same(first, read(path, cfg, length=8, seed=1))


def test_samples_that_are_cut_are_counted(read, write):
    path = write("x.txt", "w1\n" + "\n".join([" ".join(WORDS[:9])] * 3))
    assert read(path, length=8).truncated == 3
    with pytest.warns(CalibrationWarning, match="all 2 samples .* cut to 8 tokens"):
        data = read(write("y.txt", "\n".join([" ".join(WORDS[:9])] * 2)), length=8, samples=2)
    assert data.truncated == 2
    assert data.batches[0]["input_ids"][0, -1] == SEP  # cut within, not at the end


def test_fewer_samples_than_asked_for_are_told(read, write):
    with pytest.warns(CalibrationWarning, match="has 3 samples where 4 were asked for; 2 are"):
        assert read(write("x.txt", "w1\nw2\nw3")).samples == 2


def test_enough_samples_are_told_nothing(read, write):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(write("x.txt", LINES)).samples == 4


@pytest.mark.parametrize("name", ["text", "sentence", "content"])
def test_objects_have_their_text_under_a_usual_name(read, write, name):
    lines = [json.dumps({"id": 1, name: w}) for w in WORDS[:4]]
    assert texts_of(read(write("x.jsonl", "\n".join(lines)))) == WORDS[:4]


PAIRS = [{"a": f"w{i}", "b": f"w{i + 20}", "c": f"w{i + 40}"} for i in range(4)]


def test_two_fields_are_a_pair(read, write):
    path = write("x.json", "\n".join(map(json.dumps, PAIRS)))
    data = read(path, fields=("a", "b"))
    assert texts_of(data) == [f"w{i} w{i + 20}" for i in range(4)]
    batch = data.batches[0]
    assert list(batch) == ["input_ids", "attention_mask", "token_type_ids"]
    np.testing.assert_array_equal(batch["token_type_ids"][0, :6], [0, 0, 0, 1, 1, 0])
    # DistilBERT has no types of tokens, whatever its tokenizer says.
    plain = read(path, {**BERT, "model_type": "distilbert"}, fields=("a", "b")).batches[0]
    assert list(plain) == ["input_ids", "attention_mask"]
    np.testing.assert_array_equal(plain["input_ids"], batch["input_ids"])


def test_three_fields_are_one_text_and_one_may_be_a_string(read, write):
    path = write("x.jsonl", "\n".join(map(json.dumps, PAIRS)))
    assert texts_of(read(path, fields=("a", "b", "c")))[0] == "w0 w20 w40"
    assert texts_of(read(path, fields="c"))[0] == "w40"
    assert texts_of(read(path, GPT2, fields=("a", "b"), length=2, samples=1, batch_size=1))


TABLE = 'id,text,other\n1,"w1, w2",w9\n2,"w3\nw4",w9\n\n3,w5,w9\n4,w6,w9\n'


def test_columns_go_by_name_or_number(read, write):
    path = write("x.csv", TABLE)
    by_name = read(path)
    assert texts_of(by_name) == texts_of(read(path, fields=["text"]))
    assert "w3 w4" in texts_of(by_name)
    numbered = write("y.csv", TABLE.split("\n", 1)[1])
    assert texts_of(read(numbered, fields=["2"])) == texts_of(by_name)
    tabs = write("z.tsv", '\ufefftext\tx\nw1 "w2\tw9\nw2\tw9\nw3\tw9\nw4\tw9\n')
    assert texts_of(read(tabs))[1:] == ["w2", "w3", "w4"]


def test_sts_b_with_the_real_tokenizer(data):
    encoder = data / "sentence-encoder"
    path = data / "stsb" / "sts-train.csv"
    found = read_calibration(path, folder=encoder, cfg=read_config(encoder), fields=("6",))
    assert found.samples == 128
    assert found.truncated == 0
    assert [batch["input_ids"].shape[0] for batch in found.batches] == [16] * 8
    assert {batch["input_ids"].shape[1] for batch in found.batches} <= {16, 32, 48, 64}
    assert found.tokens is not None
    assert 1500 < found.tokens < 2400
    assert all((batch["input_ids"][:, 0] == 101).all() for batch in found.batches)
    pairs = read_calibration(path, folder=encoder, cfg=read_config(encoder), fields=("6", "7"))
    assert "token_type_ids" in pairs.batches[0]


# --- windows ----------------------------------------------------------------------------------

TEXTS = st.lists(st.lists(st.integers(5, 90), max_size=9), max_size=12)


@given(texts=TEXTS, between=st.sampled_from([None, EOS]), length=st.integers(1, 7))
def test_windows_are_the_stream_but_for_the_remainder(texts, between, length):
    stream = joined(texts, between)
    cut = windows(stream, length)
    full = [ids for ids in texts if ids]
    seams = max(len(full) - 1, 0) if between is not None else 0
    assert len(stream) == sum(map(len, texts)) + seams
    assert [i for i in stream if i != EOS] == [i for ids in texts for i in ids]
    for i, window in enumerate(cut):
        np.testing.assert_array_equal(window, stream[i * length : (i + 1) * length])
    assert cut.shape == (len(stream) // length, length)
    assert len(stream) - cut.size < length


def test_causal_models_get_windows(read, write):
    path = write("x.txt", LINES)
    stream = joined([[5 + WORDS.index(w) for w in t.split()] for t in LINES.split("\n")], EOS)
    count = len(stream) // 8
    data = read(path, GPT2, length=8, samples=count, batch_size=count)
    (batch,) = data.batches
    assert list(batch) == ["input_ids", "attention_mask"]
    assert sorted(map(tuple, batch["input_ids"])) == sorted(map(tuple, windows(stream, 8)))
    assert (batch["attention_mask"] == 1).all()
    assert (data.samples, data.tokens, data.truncated) == (count, count * 8, 0)


@pytest.mark.parametrize(
    ("cfg", "packed"),
    [
        (BERT, False),
        (GPT2, True),
        ({**BERT, "architectures": ["BertForCausalLM"]}, True),
        ({**T5, "model_type": "bart", "architectures": ["BartForCausalLM"]}, True),
        (T5, False),
    ],
)
def test_the_config_says_whether_texts_are_joined(read, write, cfg, packed):
    path = write("x.txt", LINES)
    default = read(path, cfg, length=8)
    assert same(default, read(path, cfg, length=8, packed=packed))
    assert (EOS in default.batches[0]["input_ids"]) == packed
    assert ("decoder_input_ids" in default.batches[0]) == (cfg is T5)


def test_a_decoder_reads_what_the_encoder_reads_one_later(read, write):
    for batch in read(write("x.txt", LINES), T5).batches:
        ids, shifted = batch["input_ids"], batch["decoder_input_ids"]
        assert (shifted[:, 0] == 0).all()
        np.testing.assert_array_equal(shifted[:, 1:], ids[:, :-1])
        np.testing.assert_array_equal(batch["decoder_attention_mask"], batch["attention_mask"])
        assert shifted.dtype == np.int32


# --- arrays -----------------------------------------------------------------------------------


def test_arrays_are_taken_by_their_names(read, tmp_path):
    ids = np.arange(5, 85, dtype=np.int64).reshape(4, 20)
    np.savez(
        tmp_path / "x.npz",
        input_ids=ids,
        attention_mask=np.arange(20) < np.array([[16], [16], [17], [20]]),
        weights=np.ones((4, 2), np.float64),
    )
    data = read(tmp_path / "x.npz")
    found = np.concatenate([batch["input_ids"] for batch in data.batches])
    assert sorted(map(tuple, found)) == sorted(map(tuple, ids[:, :16]))
    assert [str(x.dtype) for x in data.batches[0].values()] == ["int32", "int32", "float32"]
    # Two of the samples lose no more than padding.
    assert (data.samples, data.tokens, data.truncated) == (4, 64, 2)


def test_padding_at_the_left_goes_to_the_right(read, tmp_path):
    """And is what is cut first; what belongs to the tokens goes with them."""
    ids = np.arange(5, 85).reshape(4, 20)
    mask = (np.arange(20) >= np.array([[12], [15], [0], [12]])).astype(np.int64)
    np.savez(tmp_path / "x.npz", input_ids=ids, attention_mask=mask, token_type_ids=ids + 1)
    with pytest.warns(CalibrationWarning, match="where 9 were"):
        data = read(tmp_path / "x.npz", length=8, samples=9, batch_size=4)
    (batch,) = data.batches
    assert (data.tokens, data.truncated) == (8 + 5 + 8 + 8, 1)
    for row, real in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        expected = ids[(ids == row[0]).any(1)].ravel()
        start = int(np.flatnonzero(expected == row[0])[0])
        assert (row[real == 1] == expected[start : start + 8][: real.sum()]).all()
    np.testing.assert_array_equal(batch["token_type_ids"], batch["input_ids"] + 1)


@FEW
def test_a_mask_of_what_is_not_cut_is_not_cut(read, tmp_path):
    mask = np.arange(20) < np.array([[20], [19], [18], [20]])
    np.savez(
        tmp_path / "x.npz",
        input_values=np.random.default_rng(0).standard_normal((4, 20)),
        attention_mask=mask,
    )
    data = read(tmp_path / "x.npz", length=8)
    assert data.truncated == 0
    found = np.concatenate([batch["attention_mask"] for batch in data.batches])
    assert sorted(found.sum(1)) == [18, 19, 20, 20]
    ids = np.arange(5, 85).reshape(4, 20)
    pictures = np.zeros((4, 3, 20, 20))
    np.savez(tmp_path / "y.npz", input_ids=ids, attention_mask=mask, pixel_values=pictures)
    (first, _) = read(tmp_path / "y.npz", length=8).batches
    assert first["input_ids"].shape == first["attention_mask"].shape == (2, 8)


def test_what_stands_beside_the_tokens_turns_with_them(read, tmp_path):
    mask = np.tile(np.arange(6) >= 2, (2, 1))
    embeds = np.arange(2 * 6 * 3.0).reshape(2, 6, 3)
    labels = np.where(mask, np.arange(12).reshape(2, 6), -100)
    np.savez(tmp_path / "x.npz", inputs_embeds=embeds, attention_mask=mask, labels=labels)
    (batch,) = read(tmp_path / "x.npz", samples=2).batches
    assert (batch["attention_mask"] == [1, 1, 1, 1, 0, 0]).all()
    assert sorted(batch["inputs_embeds"][:, 0, 0]) == [2 * 3, (6 + 2) * 3]
    assert sorted(batch["labels"][:, 0]) == [2, 8]


def test_what_a_decoder_reads_is_not_turned(read, tmp_path):
    """T5 starts with its padding token, which a mask of tokens other than that leaves out."""
    ids = np.arange(5, 17).reshape(2, 6)
    mask = np.tile(np.arange(6) >= 2, (2, 1))
    decoder = np.where(np.arange(6) == 0, 0, ids + 20)
    others = {"decoder_input_ids": decoder, "decoder_attention_mask": decoder != 0, "labels": ids}
    np.savez(tmp_path / "x.npz", input_ids=ids, attention_mask=mask, **others)
    (batch,) = read(tmp_path / "x.npz", T5, samples=2).batches
    assert sorted(batch["input_ids"][:, 0]) == [7, 13]
    order = np.argsort(batch["input_ids"][:, 0])
    for name, x in others.items():
        np.testing.assert_array_equal(batch[name][order], x)


CLIP = {"model_type": "clip", "text_config": {"vocab_size": 96, "max_position_embeddings": 10}}
TWO = {
    "is_encoder_decoder": True,
    "encoder": {"vocab_size": 96},
    "decoder": {"vocab_size": 30, "max_position_embeddings": 10},
}
LACKING: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a decoder": (T5, {"decoder_input_ids": np.array([[5, -100]] * 2)}, "-100 is of labels alone"),
    "a decoder, above": (T5, {"decoder_input_ids": np.array([[5, 96]] * 2)}, "from 0 to 95"),
    "a decoder of its own": (TWO, {"decoder_input_ids": np.full((2, 3), 30)}, "from 0 to 29"),
    "an encoder of its own": (TWO, {"input_ids": np.full((2, 3), 97)}, "encoder.vocab_size"),
    "a part": (CLIP, {"input_ids": np.full((2, 3), -50)}, "text_config.vocab_size"),
    "positions of a part": (CLIP, {"input_ids": np.full((2, 11), 5)}, "at most 10"),
    "positions of a decoder": (TWO, {"decoder_input_ids": np.full((2, 11), 5)}, "at most 10"),
}


@FEW
@pytest.mark.parametrize("what", LACKING)
def test_tokens_and_positions_that_a_part_lacks_are_told(read, tmp_path, what):
    cfg, arrays, told = LACKING[what]
    np.savez(tmp_path / "x.npz", **{"input_ids": np.full((2, 3), 5), **arrays})
    with pytest.raises(CalibrationError, match=told):
        read(tmp_path / "x.npz", cfg)


@pytest.mark.filterwarnings("ignore:all 96 samples")
def test_stories_by_fields(data):
    model = data / "stories260K"
    with pytest.warns(CalibrationWarning, match="103 samples where 128") as told:
        found = read_calibration(
            model / "tinystories_tokens.npz",
            folder=model,
            cfg=read_config(model),
            fields=("calibration_ids", "calibration_mask"),
        )
    assert len(told) <= 2
    assert found.samples == 96
    assert [list(batch) for batch in found.batches] == [["input_ids", "attention_mask"]] * 6
    assert all(batch["input_ids"].shape == (16, 128) for batch in found.batches)
    assert all((batch["input_ids"][:, 0] == 1).all() for batch in found.batches)


# --- images -----------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    from PIL import Image

    where = tmp_path / "images"
    for i, name in enumerate(["a.png", "b.JPG", "sub/c.webp", "d.jpeg", "note.txt"]):
        path = where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "note.txt":
            path.write_text("no image")
        else:
            Image.new(("RGB", "L", "RGBA", "RGB")[i], (7 + i, 9), 60).save(path, format="PNG")
    return where


@pytest.fixture
def vision(tmp_path):
    from transformers import ViTImageProcessor

    ViTImageProcessor(size={"height": 8, "width": 6}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


VIT = {"model_type": "vit", "num_channels": 3}


def test_images_are_what_the_processor_makes_of_them(read, images, vision):
    data = read(images, VIT, folder=vision)
    assert (data.samples, data.tokens, data.truncated) == (4, None, 0)
    for batch in data.batches:
        assert list(batch) == ["pixel_values"]
        assert batch["pixel_values"].shape == (2, 3, 8, 6)
        assert batch["pixel_values"].dtype == np.float32
    assert same(data, read(images, VIT, folder=vision))


# --- what is refused --------------------------------------------------------------------------

REFUSED = {
    "empty": ("x.txt", b"", {}, "no calibration data in the file(.|\n)*0 bytes"),
    "blank": ("x.txt", b" \n\n", {}, "3 bytes of white space"),
    "nothing but a header": ("x.csv", b"text,b\n", {}, "no text in any sample"),
    "nothing but commas": ("x.csv", b",,\n,,\n", {}, "no text in any sample"),
    "NUL": ("x.txt", b"w1\nw\0", {}, "byte 4 is NUL(.|\n)*expected: UTF-8 text"),
    "Latin-1": ("x.txt", b"w1 \xe9t\xe9", {}, "byte 3 is 0xe9"),
    "fields of plain text": ("x.txt", b"w1", {"fields": ["text"]}, "plain text has no fields"),
    "no JSON": ("x.jsonl", b'{"text": "w1"}\n\n{"text"\n', {}, "line 3\n(.|\n)*at column 8"),
    "deep JSON": ("x.jsonl", b"[" * 200_000, {}, "no JSON(.|\n)*line 1\n"),
    "no object": ("x.json", b'["w1"]', {}, "no JSON object(.|\n)*line 1\n(.|\n)*of type list"),
    "no usual name": ("x.jsonl", b'{"a": "w1"}', {}, "expected: one of text, sentence, content"),
    "no such member": (
        "x.jsonl",
        b'{"text": "w1"}\n{"txt": "w1"}',
        {},
        "no field text(.|\n)*line 2\n(.|\n)*nearest:  txt",
    ),
    "no text there": (
        "x.jsonl",
        b'{"text": 1, "title": "w1"}',
        {},
        "field text holds no text(.|\n)*of type int(.|\n)*title",
    ),
    "no such column": ("x.csv", b"texts,b\nw1,w2", {"fields": ["text"]}, "nearest:  texts"),
    "no header": ("x.csv", b"w1\tw2\nw1\tw2", {}, "w1, w2(.|\n)*by its number, from 1"),
    "no such number": ("x.csv", b"w1\tw2", {"fields": ["3"]}, "no column 3(.|\n)*from 1 to 2"),
    "column zero": ("x.csv", b"w1\tw2", {"fields": ["0"]}, "no column 0(.|\n)*from 1 to 2"),
    "a short row": ("x.csv", b"a,text\n1,w1\n2\n", {}, "too short(.|\n)*line 3\n(.|\n)*1 columns"),
    "an open quote": ("x.csv", b'text\n"w1' + b" w1" * 50_000, {}, "cannot be read(.|\n)*line 2"),
    "few tokens": ("x.txt", b"w1 w2\nw3", {"packed": True}, "fill one window(.|\n)*4 tokens"),
    "no room": ("x.txt", b"w1", {"length": 2}, "no room for text(.|\n)*2 tokens are special"),
    "no count": ("x.txt", b"w1", {"samples": 0}, "samples is no count"),
    "no positions": (
        "x.txt",
        " ".join(WORDS).encode(),
        {"length": 80},
        "longer than the model has positions(.|\n)*at most 64",
    ),
    "not the model's": (
        "x.txt",
        b"w89",
        {"cfg": {**BERT, "vocab_size": 50}},
        "not in the model's vocabulary(.|\n)*from 0 to 49",
    ),
    "no start": (
        "x.txt",
        b"w1",
        {"cfg": {**T5, "decoder_start_token_id": None}},
        "what a decoder starts with",
    ),
    "no .npz": ("x.npz", b"w1", {}, "no .npz file of plain arrays"),
    "an empty .npz": ("x.npz", b"", {}, "no .npz file of plain arrays"),
    "an .npz packed": ("x.npz", b"", {"packed": True}, "packed= is for text"),
}


@FEW
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_said(read, write, what):
    name, content, how, message = REFUSED[what]
    with pytest.raises(CalibrationError, match=message):
        read(write(name, content), **how)


def test_a_missing_file_names_the_nearest(read, write):
    write("stories.txt", "w1")
    with pytest.raises(CalibrationError, match=r"no such file(.|\n)*nearest:  stories\.txt"):
        read(write("x.txt", "w1").with_name("story.txt"))
    with pytest.raises(CalibrationError, match="no such file"):
        read("/nowhere/at/all.txt")


@pytest.mark.parametrize("config", [None, '{"model_type": "bert"}', '{"model_type": "llama"}'])
def test_a_folder_without_tokenizer_is_told_the_way_out(read, write, tmp_path, config):
    path = write("x.txt", "w1")
    (tmp_path / "bare").mkdir()
    if config:
        write("bare/config.json", config)
    why = r"no tokenizer(.|\n)*neither tokenizer\.json nor tokenizer_config\.json\n(.|\n)*or save"
    with pytest.raises(CalibrationError, match=why):
        read(path, folder=tmp_path / "bare")


ARRAYS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "none": ({}, {}, "no array in the file"),
    "unequal": (
        {"a": np.ones((2, 3)), "b": np.ones((3, 3))},
        {},
        "not have equally many samples(.|\n)*a: 2, b: 3(.|\n)*fields",
    ),
    "two sets": (
        {
            name: np.ones((count, 3), int)
            for which, count in (("eval", 2), ("calibration", 3))
            for name in (f"{which}_ids", f"{which}_mask")
        },
        {},
        r"mask: fields=\('calibration_ids', 'calibration_mask'\)",
    ),
    "no sample": ({"input_ids": np.ones((0, 3), int)}, {}, "hold no sample"),
    "one number": ({"a": np.ones(())}, {}, "array a is none of samples"),
    "letters": ({"a": np.array(["w1"])}, {}, "array a is none of samples"),
    "objects": ({"a": np.array([{}])}, {}, "no .npz file of plain arrays(.|\n)*allow_pickle"),
    "wide": ({"a": np.array([2**40])}, {}, "array a is none of samples(.|\n)*fit int32"),
    "floats for ids": ({"a": np.ones((2, 3))}, {"fields": ["a"]}, "a cannot be taken as input_ids"),
    "no such array": ({"eval_ids": np.ones((2, 3))}, {"fields": ["ids"]}, "nearest:  eval_ids"),
    "a mask of other tokens": (
        {"input_ids": np.ones((2, 3), int), "attention_mask": np.ones((2, 4), int)},
        {},
        r"attention_mask is no mask of input_ids(.|\n)*\(2, 3\)(.|\n)*\(2, 4\)",
    ),
    "three": ({"a": np.ones((2, 3))}, {"fields": ["a", "b", "c"]}, "two fields at most"),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_arrays_that_are_no_samples_are_refused(read, tmp_path, what):
    arrays, how, message = ARRAYS[what]
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(CalibrationError, match=message):
        read(tmp_path / "x.npz", **how)


def test_a_lone_array_is_no_npz(read, tmp_path):
    with open(tmp_path / "x.npz", "wb") as file:
        np.save(file, np.ones((2, 3)))
    with pytest.raises(CalibrationError, match=r"is no \.npz file of plain arrays"):
        read(tmp_path / "x.npz")


def test_folders_of_images_that_do_not_serve(read, images, vision, tmp_path, monkeypatch):
    with pytest.raises(CalibrationError, match=r"no images(.|\n)*config(.|\n)*\.png"):
        read(vision, VIT, folder=vision)
    with pytest.raises(CalibrationError, match="fields= is for text"):
        read(images, VIT, folder=vision, fields=["text"])
    (tmp_path / "bare").mkdir()
    with pytest.raises(CalibrationError, match=r"no image processor(.|\n)*preprocessor_config"):
        read(images, VIT, folder=tmp_path / "bare")
    (images / "a.png").write_bytes(b"no image")
    with pytest.raises(CalibrationError, match=r"image cannot be read(.|\n)*a\.png"):
        read(images, VIT, folder=vision)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(CalibrationError, match="Pillow is not installed"):
        read(images, VIT, folder=vision)


@pytest.mark.parametrize("token", [2**31, -1])
def test_a_token_that_no_vocabulary_has_is_refused(token):
    """As a tokenizer.json may say."""
    for call in (lambda: joined([[3, token]], None), lambda: padded([[3, token]], 4, 0)):
        with pytest.raises(CalibrationError, match="no vocabulary has"):
            call()
