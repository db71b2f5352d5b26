"""Calibration data that is arrays already: an .npz file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxslim.errors import CalibrationError, nearest
from flaxslim.posttraining._padding import MASKS, padded_right


def read_arrays(path: Path, fields: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, integers and truth values as int32, floats as float32.

    All of them by their names, or those that one or two `fields` name: as `input_ids`, and as
    `attention_mask`. The first axis of each counts the samples. Nothing is unpickled.
    Raises `CalibrationError` for a file that is none, has no such arrays, or other dtypes, and for
    arrays whose first axes differ. Rows that are padded at the left become padded at the right.
    """
    if len(fields) > 2:
        raise CalibrationError(
            "an .npz file has two fields at most",
            path=str(path),
            seen=", ".join(fields),
            expected="the array of token ids, and that of the mask",
            mend="name these two, or none to take all arrays by their names",
        )
    stored = _stored(path, fields)
    names = ("input_ids", "attention_mask") if fields else tuple(stored)
    arrays = {
        name: _narrow(path, told, x) for name, (told, x) in zip(names, stored.items(), strict=False)
    }
    as_named = dict(zip(stored, arrays.values(), strict=True))
    lengths = {told: len(x) for told, x in as_named.items()}
    if len(set(lengths.values())) > 1:
        raise CalibrationError(
            "the arrays do not have equally many samples",
            path=str(path),
            seen=", ".join(f"{told}: {count}" for told, count in lengths.items()),
            expected="first axes of one size",
            mend=_mend_fields(as_named),
        )
    if not all(lengths.values()):
        raise CalibrationError(
            "the arrays hold no sample", path=str(path), seen="a first axis of 0"
        )
    for told, (name, x) in zip(stored, arrays.items(), strict=True):
        if name in ("input_ids", "attention_mask") and not (x.ndim >= 2 and x.dtype == np.int32):
            raise CalibrationError(
                f"{told} cannot be taken as {name}",
                path=str(path),
                seen=f"{x.dtype} of shape {x.shape}",
                expected="integers, (samples, length)",
                mend=_mend_fields(as_named),
            )
    for name, mask in MASKS.items():
        _refuse_other_lengths(path, dict(zip(arrays, stored, strict=True)), arrays, name, mask)
    return padded_right(arrays)


def _refuse_other_lengths(
    path: Path, told: Mapping[str, str], arrays: Mapping[str, np.ndarray], name: str, mask: str
) -> None:
    """Raise `CalibrationError` for a mask of other tokens than those beside it."""
    if name in arrays and mask in arrays and arrays[mask].ndim == 2:
        shapes = {told[one]: arrays[one].shape for one in (name, mask)}
        if len(set(shapes.values())) > 1:
            raise CalibrationError(
                f"{told[mask]} is no mask of {told[name]}",
                path=str(path),
                seen=", ".join(f"{one} of shape {shape}" for one, shape in shapes.items()),
                expected="one number for each token",
                mend=f"write both of one shape, padded alike, or leave {told[mask]} out",
            )


def _mend_fields(arrays: Mapping[str, np.ndarray]) -> str:
    """With their names, where shapes and the word "mask" tell them; those for calibration first."""
    mend = "name the arrays of token ids and of their mask"
    masks = [name for name in arrays if "mask" in name]
    ids = [name for name, x in arrays.items() if name not in masks and x.dtype == np.int32]
    pairs = [
        (name, mask)
        for mask in sorted(masks, key=lambda mask: "calib" not in mask)
        for name in nearest(mask, ids, len(ids))
        if arrays[name].shape == arrays[mask].shape
    ]
    return f"{mend}: fields={pairs[0]}" if pairs else f"{mend} in fields="


def _stored(path: Path, fields: Sequence[str]) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            there = list(file.files)
            absent = [name for name in fields if name not in there]
            stored = {name: file[name] for name in fields or there} if not absent else {}
    except Exception as error:  # numpy, zipfile, zlib and tokenize raise whatever the bytes say
        raise CalibrationError(
            "this is no .npz file of plain arrays",
            path=str(path),
            seen=str(error).splitlines()[0] if str(error) else type(error).__name__,
            expected="what numpy.savez(path, input_ids=..., attention_mask=...) writes",
            mend="write it anew, without objects",
        ) from error
    if absent:
        raise CalibrationError(
            f"the file has no array {absent[0]}",
            path=str(path),
            seen=", ".join(there[:8]) or "nothing",
            near=nearest(absent[0], there),
            mend="name another one in fields=",
        )
    if not stored:
        raise CalibrationError(
            "there is no array in the file",
            path=str(path),
            expected="what numpy.savez(path, input_ids=..., attention_mask=...) writes",
            mend="pass another file",
        )
    return stored


def _narrow(path: Path, name: str, x: Any) -> np.ndarray:
    """As int32 or float32, the widest that JAX has unless it is told otherwise."""
    kind = x.dtype.kind if isinstance(x, np.ndarray) and x.ndim else None
    big = np.iinfo(np.int32)
    if kind == "f":
        return x.astype(np.float32)
    if kind in ("i", "u", "b") and (not x.size or (x.min() >= big.min and x.max() <= big.max)):
        return x.astype(np.int32)
    raise CalibrationError(
        f"the array {name} is none of samples",
        path=str(path),
        seen=f"{x.dtype} of shape {x.shape}" if isinstance(x, np.ndarray) else "bytes",
        expected="integers that fit int32, or floats, with a first axis that counts the samples",
        mend="write the file without it, or name the arrays to take in fields=",
    )
