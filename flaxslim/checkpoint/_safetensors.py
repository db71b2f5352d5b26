"""The safetensors file format: tensors found without reading them, streamed out.

The library judges a file and gives its metadata. The tensors are read when they are asked for, or
are views of the mapped file, and are written one at a time, which the library's numpy functions do
not do: they copy every tensor, want all of them in memory to write, and do not know the 8-bit
floats. The format is eight bytes of
little-endian header length, a JSON header (name -> dtype, shape, byte offsets), and the data
(https://github.com/huggingface/safetensors#format).
"""

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flaxslim.checkpoint import _folder
from flaxslim.checkpoint._leaf import Leaf, Piece
from flaxslim.checkpoint._stored import Stored
from flaxslim.errors import CorruptFileError, UnsupportedFormatError

_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "U32": np.uint32,
        "I32": np.int32,
        "F32": np.float32,
        "C64": np.complex64,
        "U64": np.uint64,
        "I64": np.int64,
        "F64": np.float64,
    }.items()
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _validate(path: Path) -> dict[str, str]:
    """Let the library judge the header (sizes, overlaps, holes); returns the metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        _folder.refuse_pointer(path)
        raise CorruptFileError(
            f"not a whole safetensors file: {error}",
            path=str(path),
            seen=f"{path.stat().st_size} bytes",
            mend="download or copy the file again",
        ) from None


def stored(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors by name, none of them read, and the file's metadata.

    Raises `CorruptFileError` if the file is truncated or is something else.
    """
    metadata = _validate(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length), object_pairs_hook=_once)
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise UnsupportedFormatError(
                "a tensor has a dtype that is not read",
                path=f"{path}: {name}",
                seen=entry["dtype"],
                expected=", ".join(_DTYPES),
            )
        start, end = entry["data_offsets"]
        span = (8 + length + start, end - start)
        found[name] = Stored(path=path, spans=(span,), shape=tuple(entry["shape"]), dtype=dtype)
    return found, metadata


def mapped(tensors: Mapping[str, Stored]) -> dict[str, np.ndarray]:
    """The tensors of one file as read-only views of it, or a copy where one is not aligned."""
    if not any(tensor.nbytes for tensor in tensors.values()):
        return {name: np.asarray(tensor) for name, tensor in tensors.items()}
    with next(iter(tensors.values())).path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    found = {}
    for name, t in tensors.items():
        array = np.frombuffer(data, t.dtype, t.size, t.spans[0][0]).reshape(t.shape)
        found[name] = array if array.flags.aligned else array.copy()
    return found


def pieces(leaves: Mapping[str, Leaf], metadata: Mapping[str, str]) -> list[Piece]:
    """What a file consists of.

    Raises `UnsupportedFormatError` for a dtype that the format has no name for.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    # Widest dtype first keeps every tensor aligned to its item size, as the library does it.
    names = sorted(leaves, key=lambda name: (-leaves[name].dtype.itemsize, name))
    offset = 0
    for name in names:
        leaf = leaves[name]
        if leaf.dtype not in _NAMES:
            raise UnsupportedFormatError(
                "safetensors has no name for this dtype", path=name, seen=leaf.dtype
            )
        header[name] = {
            "dtype": _NAMES[leaf.dtype],
            "shape": list(leaf.shape),
            "data_offsets": [offset, offset + leaf.nbytes],
        }
        offset += leaf.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    front = Piece.of(len(text).to_bytes(8, "little") + text)
    return [front, *(Piece.whole(leaves[name]) for name in names)]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which no name is there twice."""
    if len(found := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CorruptFileError(
            "the header of a safetensors file has a name twice",
            path=twice,
            mend="write the file anew: it is not known which of the two tensors is meant",
        )
    return found
