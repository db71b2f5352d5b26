"""Calibration texts out of a file: its lines, its JSON objects, or columns of a table."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flaxslim.errors import CalibrationError, nearest

KINDS = (
    "UTF-8 text (.txt, .md), .jsonl, .csv or .tsv; an .npz of arrays; or a folder of .png, .jpg, "
    ".jpeg or .webp images"
)
# Where no field is named, the first of these that is there.
_NAMES = ("text", "sentence", "content")
_BY_NAME = "say in fields= which one to take"
_BY_NUMBER = _BY_NAME + ": by its name in the header, or by its number, from 1"


def read_texts(path: Path, fields: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """The samples of a file, each as the texts of its fields.

    A `.csv` or `.tsv` is a table, with tabs if there is one in its first line; `fields` are names
    in its header, or numbers from 1. If all are numbers, the first row is a sample as well. A
    `.json` or `.jsonl` has an object in each line. Everything else has a sample in each line, and
    no fields. Samples without any text are left out.
    Raises `CalibrationError` for a file that is empty or no text, and for fields that are not
    there.
    """
    text = decoded(path)
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        samples = _table(path, text, fields)
    elif kind in (".json", ".jsonl"):
        samples = _objects(path, text, fields)
    elif fields:
        raise CalibrationError(
            "a file of plain text has no fields",
            path=str(path),
            seen=", ".join(fields),
            expected="one sample a line",
            mend="leave fields= out, or name the file .jsonl, .csv or .tsv if it is one",
        )
    else:
        samples = ((line,) for _, line in lines(text))
    # Tokenizers take no lone surrogate, which JSON can write as \ud800.
    clean = (tuple(t.encode(errors="replace").decode() for t in sample) for sample in samples)
    found = [sample for sample in clean if any(t.strip() for t in sample)]
    if not found:
        raise _empty(path, "no text in any sample")
    return found


def decoded(path: Path) -> str:
    """The text of a file in UTF-8; `CalibrationError` if it is none, or is empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CalibrationError(
            "the calibration data cannot be read",
            path=str(path),
            seen=error.strerror or error,
            expected="a plain file that you may read",
        ) from error
    if not data.strip():
        raise _empty(path, f"{len(data)} bytes" + (" of white space" if data else ""))
    where = data.find(b"\0")
    what = "is NUL"
    text = ""
    if where < 0:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            where, what = error.start, f"is 0x{data[error.start]:02x}, which is not UTF-8 there"
    if where >= 0:
        raise CalibrationError(
            "the file is no text",
            path=str(path),
            seen=f"byte {where} {what}",
            expected=KINDS,
            mend="save it as UTF-8, or pass another file",
        )
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    # Not splitlines: JSON strings and prose may hold U+2028, which is no end of a line there.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _objects(path: Path, text: str, fields: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for number, line in lines(text):
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            seen = str(error)
            if isinstance(error, json.JSONDecodeError):
                seen = f"{error.msg} at column {error.colno}"
            raise CalibrationError(
                "a line is no JSON",
                path=where,
                seen=seen,
                expected='an object on one line, such as {"text": "..."}',
                mend="correct the line, or write one object a line",
            ) from error
        if not isinstance(value, dict):
            raise CalibrationError(
                "a line is no JSON object",
                path=where,
                seen=f"of type {type(value).__name__}",
                expected='an object on one line, such as {"text": "..."}',
                mend="write one object a line; or name the file .txt to take its lines as texts",
            )
        fields = fields or _default(value, where, _BY_NAME)
        yield tuple(_member(value, field, where) for field in fields)


def _member(value: dict[str, Any], field: str, where: str) -> str:
    if field not in value:
        raise _no_field(field, list(value), where, _BY_NAME)
    if not isinstance(value[field], str):
        raise CalibrationError(
            f"the field {field} holds no text",
            path=where,
            seen=f"of type {type(value[field]).__name__}",
            expected="a string",
            near=[name for name in value if isinstance(value[name], str)][:3],
            mend=_BY_NAME,
        )
    return value[field]


def _table(path: Path, text: str, fields: Sequence[str]) -> Iterator[tuple[str, ...]]:
    tabs = path.suffix.lower() == ".tsv" or "\t" in text.lstrip("\n").partition("\n")[0]
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="\t" if tabs else ",",
        # A quote is a plain character where tabs separate: STS-B and GLUE have unpaired ones.
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
    )
    rows = _rows(path, reader)
    number, first = next(rows, (0, []))
    if not first:
        return
    header = [name.strip() for name in first]
    fields = fields or _default(header, f"{path}, line {number}", _BY_NUMBER)
    columns = [_column(field, header, f"{path}, line {number}") for field in fields]
    if all(map(_is_number, fields)):
        yield tuple(first[column] for column in columns)
    for number, row in rows:
        if len(row) <= max(columns):
            raise CalibrationError(
                "a row is too short",
                path=f"{path}, line {number}",
                seen=f"{len(row)} columns",
                expected=f"{len(header)}, as in the first row",
                mend="correct the row; a comma or a line break within a field needs quotes",
            )
        yield tuple(row[column] for column in columns)


def _rows(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its last line."""
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise CalibrationError(
            "a row of the table cannot be read",
            path=f"{path}, line {reader.line_num}",
            seen=error,
            mend="correct the row: a quote in it may be left open",
        ) from error


def _column(field: str, header: list[str], where: str) -> int:
    if not _is_number(field):
        if field in header:
            return header.index(field)
        raise _no_field(field, header, where, _BY_NUMBER)
    if not 1 <= int(field) <= len(header):
        raise CalibrationError(
            f"the table has no column {field}",
            path=where,
            seen=f"{len(header)} columns",
            expected=f"a number from 1 to {len(header)}",
            mend=_BY_NUMBER,
        )
    return int(field) - 1


def _is_number(field: str) -> bool:
    return field.isascii() and field.isdigit()


def _default(names: Sequence[str] | dict[str, Any], where: str, mend: str) -> list[str]:
    found = [name for name in _NAMES if name in names]
    if not found:
        raise CalibrationError(
            "no field is named, and there is none of a usual name",
            path=where,
            seen=_shown(names),
            expected="one of " + ", ".join(_NAMES),
            mend=mend,
        )
    return found[:1]


def _no_field(field: str, names: Sequence[str], where: str, mend: str) -> CalibrationError:
    return CalibrationError(
        f"there is no field {field}",
        path=where,
        seen=_shown(names),
        near=nearest(field, names),
        mend=mend,
    )


def _shown(names: Sequence[str] | dict[str, Any]) -> str:
    """Names for a message: without a header they are whole sentences."""
    short = [name if len(name) <= 24 else name[:21] + "..." for name in names]
    return ", ".join(short[:8]) + (", ..." if short[8:] else "") if short else "nothing"


def _empty(path: Path, seen: str) -> CalibrationError:
    return CalibrationError(
        "there is no calibration data in the file",
        path=str(path),
        seen=seen,
        expected="some hundred samples",
        mend="pass another file",
    )
