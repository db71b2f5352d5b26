"""The safetensors file format, memory-mapped in and streamed out.

A file is eight bytes of little-endian header length, a JSON header (name -> dtype, shape, byte
offsets), and the data (https://github.com/huggingface/safetensors#format). Read here rather than
by the library, because its numpy reader copies every tensor, and older releases refuse bfloat16.
"""

import json
import mmap
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from flaxslim._errors import CorruptFileError, UnsupportedFormatError
from flaxslim.checkpoint._leaf import Leaf

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


def _corrupt(path: Path, problem: str, seen: object = None) -> CorruptFileError:
    return CorruptFileError(
        f"not a whole safetensors file: {problem}",
        path=str(path),
        seen=seen,
        mend="download or copy the file again",
    )


def _header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if start == b"version ":
        raise CorruptFileError(
            "a Git LFS pointer lies where the weights should be",
            path=str(path),
            mend="run `git lfs pull` in that folder",
        )
    if size < 8 or length > size - 8:
        raise _corrupt(path, "truncated in its header", f"{size} bytes")
    try:
        header = json.loads(file.read(length))
    except ValueError:
        raise _corrupt(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not a JSON object")
    return header, 8 + length


def _view(path: Path, data: mmap.mmap, start: int, name: str, entry: Any) -> np.ndarray:
    try:
        kind, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise _corrupt(path, f"the entry of {name!r} is malformed", entry) from None
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise UnsupportedFormatError(
            "a tensor has a dtype that is not read",
            path=f"{path}: {name}",
            seen=kind,
            expected=", ".join(_DTYPES),
        )
    if min((begin, *shape), default=0) < 0:
        raise _corrupt(path, f"the entry of {name!r} is malformed", entry)
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if end - begin != count * dtype.itemsize:
        raise _corrupt(path, f"the size of {name!r} contradicts its shape", entry)
    if start + end > len(data):
        raise _corrupt(
            path, "truncated in its data", f"{len(data)} bytes, but {name!r} ends at {start + end}"
        )
    if count == 0:
        return np.empty(shape, dtype)
    array = np.frombuffer(data, dtype, count, start + begin).reshape(shape)
    return array if array.flags.aligned else array.copy()


def read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors by name (read-only views of the mapped file) and the file's metadata.

    Raises `CorruptFileError` if the file is truncated or is something else.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        header, start = _header(path, file, size)
        metadata = header.pop("__metadata__", None) or {}
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = {name: _view(path, data, start, name, entry) for name, entry in header.items()}
    return tensors, metadata


def write_file(file: BinaryIO, leaves: Mapping[str, Leaf], metadata: Mapping[str, str]) -> None:
    """Stream tensors out, one at a time in memory.

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
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        values = leaves[name].numpy()
        if sys.byteorder == "big":
            values = values.byteswap()
        file.write(values.reshape(-1).view(np.uint8).data)
