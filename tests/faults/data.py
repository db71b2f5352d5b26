"""The readers of configs in YAML, of recipes, of calibration data, and of what we keep."""

import json
import shutil
import struct
import warnings
import zlib
from pathlib import Path
from random import Random

import numpy as np

from faults import tiny
from faults.mutate import broken_bytes, broken_json
from faults.reader import by_bytes, by_json, by_lines, some
from flaxslim.checkpoint._read import read_config

YAML = """\
# A comment.
base_emb_dim: 6
base_mlp_dim: 16  # the width
mlp_activations: ["silu", "linear"]
more: &more {a: 1, b: [x, y]}
less: *more
"""
_YAML_VALUES = (
    "!!python/object/apply:os.system [touch ran]", "&a [*a]", "1_6", "0x10", "1e400", ".nan",
    "[" * 2000, "{a: {a: ", "!!binary xx", "!!timestamp 2001-99-99", "2001-99-99", "- 1", "\t1",
    "'", "|\n  x", "*none", "? a", "!!set {a, b}", "!!omap [a: 1]", "<<: 3", "1:99:99", "\x07",
)  # fmt: skip


_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
)


def spoilt_yaml(folder: Path, random: Random) -> None:
    if random.random() < 0.05:  # a thousand million values in 400 bytes
        (folder / "config.yml").write_text(YAML + _BOMB)
        return
    by_lines("config.yml", ":", _YAML_VALUES)(folder, random)


def read_yaml(folder: Path, random: Random) -> None:
    from flaxslim.checkpoint._yaml import rewritten, values_of

    path = folder / "config.yml"
    text = path.read_text(encoding="utf-8", errors="replace")
    values = values_of(text, str(path))
    rewritten(text, values, {**values, "base_mlp_dim": 5}, str(path))


# --- recipes ----------------------------------------------------------------------------------

_TOML_VALUES = (
    "0", "-1", "1e400", "nan", "inf", "-inf", "true", "''", '"x"', '"../x"', '"\\u0000"', "[]",
    "[[]]", "{}", "{a = 1}", "[" * 3000, "1979-05-27T07:32:00Z", "9" * 5000, "0x7fffffffffffffff",
    '"' + "x" * 5000 + '"', "[1, 'a', []]", "'''", '"\\ud800"', "1_000", "0.5", "2", "[10, 5]",
)  # fmt: skip


def recipes_folder(folder: Path) -> None:
    folder.mkdir()
    shipped = Path(__file__).parents[2] / "configs"
    for name in ("digits", "squad_bert_base", "llama_7b"):
        shutil.copy(shipped / f"{name}.toml", folder)


def spoilt_recipe(folder: Path, random: Random) -> None:
    by_lines(some(folder, ("*.toml",), random).name, "=", _TOML_VALUES)(folder, random)


def read_recipes(folder: Path, random: Random) -> None:
    from flaxslim.cli import _recipe_prune, _recipe_read

    for path in sorted(folder.glob("*.toml")):
        tree, book = _recipe_read.load(path)
        if _recipe_prune.COMMAND in tree:
            _recipe_prune.arguments(tree, book, files=False)
        else:
            _recipe_read.checked(tree, book, files=False).recipe.to_toml()


# --- data ---

_SENTENCES = ["The cat sat.", 'It said "no", twice.', "", "Über den Wolken\u2028weiter"] * 3


def texts_folder(folder: Path) -> None:
    folder.mkdir()
    rows = [{"text": text, "label": number} for number, text in enumerate(_SENTENCES)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "a.txt").write_text("\n".join(_SENTENCES), encoding="utf-8")
    quoted = [text.replace('"', '""') for text in _SENTENCES]
    table = "\n".join(f'{i},"{text}"' for i, text in enumerate(quoted))
    (folder / "a.csv").write_text(f"id,text\n{table}", encoding="utf-8")


def spoilt_texts(folder: Path, random: Random) -> None:
    path = some(folder, ("a.*",), random)
    if path.suffix == ".jsonl" and random.random() < 0.7:
        lines = path.read_bytes().split(b"\n")
        at = random.randrange(len(lines))
        lines[at] = broken_json(lines[at].decode(), random)
        path.write_bytes(b"\n".join(lines))
        return
    path.write_bytes(broken_bytes(path.read_bytes(), random))


def read_text_files(folder: Path, random: Random) -> None:
    from flaxslim.cli._evaluate import _passages
    from flaxslim.posttraining._text import read_texts

    read = random.choice((read_texts, lambda path: list(_passages(path))))
    for path in sorted(folder.glob("a.*")):
        read(path)


def arrays_folder(folder: Path) -> None:
    folder.mkdir()
    ids = np.arange(40, dtype=np.int64).reshape(5, 8) % tiny.WORDS
    np.savez(folder / "a.npz", input_ids=ids, attention_mask=ids >= 0)


def spoilt_arrays(folder: Path, random: Random) -> None:
    if random.random() < 0.5:
        by_bytes("a.npz")(folder, random)
        return
    import zipfile

    shapes = (
        "(5, 8)",
        "(10**9,)",
        "(1000000000000, 8)",
        "(-1, 8)",
        "(2.0,)",
        "(True, 8)",
        "()",
        "x",
    )
    kinds = ("'<i8'", "'|O'", "'<U9'", "'<f2'", "[('a', '<i8')]", "'<M8[s]'", "3", "(" * 300)
    header = (
        f"{{'descr': {random.choice(kinds)}, 'fortran_order': {random.choice(('False', '3'))}, "
    )
    text = f"{header}'shape': {random.choice(shapes)}, }}\n".encode()
    with zipfile.ZipFile(folder / "a.npz", "w") as file:
        for name in random.sample(("input_ids", "attention_mask", "../x", "/x", ""), 2):
            size = len(text).to_bytes(2, "little")
            file.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + size + text + bytes(320))


def read_arrays(folder: Path, random: Random) -> None:
    from flaxslim.posttraining._data import read_calibration

    warnings.simplefilter("ignore")
    fields = random.choice(((), ("input_ids",), ("input_ids", "attention_mask")))
    read_calibration(folder / "a.npz", folder=folder, cfg=tiny.config(), fields=fields, length=8)


def images_folder(folder: Path) -> None:
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, suffix in enumerate((".png", ".jpg", ".webp", ".png")):
        image = Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8))
        image.save(folder / "images" / f"{i}{suffix}")
    said = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))


def spoilt_images(folder: Path, random: Random) -> None:
    kind = random.randrange(4)
    if kind == 0:
        by_json("preprocessor_config.json")(folder, random)
    elif kind == 1:
        size = random.choice(((12000, 12000), (2**31 - 1, 1), (0, 5), (60000, 60000)))
        chunks = ((b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)), (b"IDAT", b"x"))
        whole = b"".join(
            struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d))
            for k, d in chunks
        )
        (folder / "images" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + whole)
    else:
        by_bytes("images/*")(folder, random)


def read_images(folder: Path, random: Random) -> None:
    from flaxslim.posttraining._data import read_calibration

    warnings.simplefilter("ignore")
    read_calibration(folder / "images", folder=folder, cfg=read_config(folder), batch_size=2)


def tokenizer_folder(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate(("[UNK]", "[PAD]", "the", "cat", "sat", "on", "."))}
    made = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", eos_token="."
    )
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**tiny.CONFIG, "vocab_size": 7}))
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("the cat sat on the cat .\n" * 20)


def read_tokenized(folder: Path, random: Random) -> None:
    from flaxslim.posttraining._data import read_calibration

    warnings.simplefilter("ignore")
    packed = random.random() < 0.5
    text = folder / "texts" / "a.txt"
    read_calibration(text, folder=folder, cfg=read_config(folder), length=8, packed=packed)


def kept_folder(folder: Path) -> None:
    from flaxslim.posttraining._kept import Kept

    Kept(folder).save("0" * 32, 2, {True: {"a/b": [np.ones(3)]}, False: {"a/b": [np.ones(3)]}})


def read_kept(folder: Path, random: Random) -> None:
    from flaxslim.posttraining._kept import Kept

    done, sums = Kept(folder).load("0" * 32)
    assert isinstance(done, int)
    assert all(
        isinstance(part, np.ndarray) for own in sums.values() for x in own.values() for part in x
    )


def times_folder(folder: Path) -> None:
    from flaxslim.posttraining._latency import Curve, Table, _store

    curves = {"f": Curve(widths=(0, 8), ms=(0.1, 0.3))}
    table = Table(device="cpu", dtype="float32", shapes="", base=0.3, curves=curves)
    _store(folder / "times.json", {"a": 1}, table)


def read_times(folder: Path, random: Random) -> None:
    from flaxslim.posttraining._latency import _stored

    _stored(folder / "times.json", {"a": 1})


def exported_file(folder: Path) -> None:
    """As far as we read it: the metadata. (Programs are read by jax alone, in an example.)"""
    folder.mkdir()
    from safetensors.numpy import save_file

    tensors = {"a": np.ones((2, 3), np.float32), "batch=1": np.zeros(50, np.uint8)}
    save_file(tensors, folder / "a.jaxexport", metadata={"format": "jax.export"})


def read_exported(folder: Path, random: Random) -> None:
    from flaxslim._export import is_export

    is_export(folder / "a.jaxexport")
