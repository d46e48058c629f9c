"""Reading corpora: parallel text, TSV and JSON Lines, each plain or compressed, and `datasets` by name.

Everything streams; nothing is guessed. A file that is missing, empty, torn or malformed is named, with the line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..dependencies import missing_dependency
from ..tokenization.text_files import COMPRESSED, MAX_LINE_BYTES, decode_lines, open_lines, unencodable

__all__ = [
    "MAX_LINE_BYTES",
    "decode_lines",
    "open_lines",
    "open_sources",
    "read_dataset",
    "read_jsonl",
    "read_parallel",
    "read_records",
    "read_tsv",
    "texts",
]

# Checks the fields of one example and returns it as the task wants it. Its ValueErrors get the file and the line.
Check = Callable[[tuple[Any, ...]], tuple[Any, ...]]


def texts(example: tuple[Any, ...]) -> tuple[str, ...]:
    """Return an example all of whose fields are text.

    Raises:
        ValueError: A field is something else, or holds half of a surrogate pair.
    """
    for value in example:
        if not isinstance(value, str):
            raise ValueError(f"expected text, got {type(value).__name__}: {value!r:.60}")
        if wrong := unencodable(value):
            raise ValueError(wrong)
    return example


def _checked(check: Check, example: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    try:
        return check(example)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def read_parallel(
    source: str | Path, target: str | Path, max_line_bytes: int | None = MAX_LINE_BYTES
) -> Iterator[tuple[str, str]]:
    """Yield pairs of lines of two files of equal length.

    Raises:
        ValueError: If the files have different numbers of lines (both are named), or are empty, besides what
            `open_lines` raises.
    """
    sources, targets = open_lines(source, max_line_bytes), open_lines(target, max_line_bytes)
    count = 0
    while True:
        left, right = next(sources, None), next(targets, None)
        if left is None and right is None:
            break
        if left is None or right is None:
            ends = ((left, sources), (right, targets))
            counts = [count + (line is not None) + sum(1 for _ in rest) for line, rest in ends]
            raise ValueError(
                f"parallel files differ in length: {source} has {counts[0]} lines, {target} has {counts[1]}"
            )
        count += 1
        yield left, right
    if not count:
        raise ValueError(f"no data: {source} and {target} are empty")


def read_jsonl(
    path: str | Path, fields: Sequence[str], check: Check = texts, max_line_bytes: int | None = MAX_LINE_BYTES
) -> Iterator[tuple[Any, ...]]:
    """Yield the named fields of each line of a JSON Lines file. Blank lines are no records.

    Args:
        path: The file.
        fields: Names; dots go deeper.
        check: Called with the fields of each line; by default they must be text.
        max_line_bytes: See `open_lines`.

    Raises:
        ValueError: If a line is not a JSON object, lacks a field or does not pass the check (names file and line), or
            if the file is empty.
    """
    count = 0
    for number, line in enumerate(open_lines(path, max_line_bytes), start=1):
        if not line.strip():
            continue
        count += 1
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists thousands deep
            raise ValueError(f"{path}, line {number}: not usable as JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}")
        values = tuple(_field(record, name, path, number) for name in fields)
        yield _checked(check, values, f"{path}, line {number}")
    if not count:
        raise ValueError(f"no data: {path} is empty")


def _field(record: dict[str, Any], name: str, path: str | Path, number: int) -> Any:
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            known = ", ".join(map(str, record))
            raise ValueError(f"{path}, line {number}: no field {name!r}; the line has: {known}")
        value = value[part]
    return value


def read_tsv(
    path: str | Path, columns: Sequence[str], check: Check = texts, max_line_bytes: int | None = MAX_LINE_BYTES
) -> Iterator[tuple[Any, ...]]:
    """Yield the named columns of a tab-separated file.

    Args:
        path: The file. Fields are separated by tabs and nothing is quoted or escaped.
        columns: Zero-based numbers as text ("0"), for a file without a header, or names, for one with a header.
        check: Called with the columns of each line.
        max_line_bytes: See `open_lines`.

    Raises:
        ValueError: If a line has too few columns or does not pass the check, or a name is not in the header (names file
            and line), or if the file has no data.
    """
    lines = enumerate(open_lines(path, max_line_bytes), start=1)
    if all(column.isdecimal() for column in columns):
        indices = [int(column) for column in columns]
    else:
        header = next((line for _, line in lines), "").split("\t")
        missing = [column for column in columns if column not in header]
        if missing:
            raise ValueError(f"{path}, line 1: no column {missing[0]!r} in the header; it has: {', '.join(header)}")
        indices = [header.index(column) for column in columns]
    number = 0
    for number, line in lines:
        cells = line.split("\t")
        if max(indices) >= len(cells):
            raise ValueError(f"{path}, line {number}: {len(cells)} column(s), but column {max(indices)} is wanted")
        yield _checked(check, tuple(cells[index] for index in indices), f"{path}, line {number}")
    if number == 0:
        raise ValueError(f"no data: {path} is empty")


def read_records(
    path: str | Path, fields: Sequence[str], check: Check = texts, max_line_bytes: int | None = MAX_LINE_BYTES
) -> Iterator[tuple[Any, ...]]:
    """Read `.tsv` or `.jsonl`/`.json` (plain or compressed) by the file's name.

    Raises:
        ValueError: If the name says neither, besides what the readers raise.
    """
    suffixes = [suffix for suffix in map(str.lower, Path(path).suffixes) if suffix not in COMPRESSED]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".tsv":
        return read_tsv(path, fields, check, max_line_bytes)
    if kind in (".jsonl", ".json"):
        return read_jsonl(path, fields, check, max_line_bytes)
    raise ValueError(f"{path}: expected a name ending in .tsv or .jsonl, plain or with {', '.join(COMPRESSED)}")


def open_sources(path: str | Path, field: str, max_line_bytes: int | None = MAX_LINE_BYTES) -> Iterator[str]:
    """Yield the texts of a file to translate: its lines, or one column or field of a .tsv or .jsonl, in order.

    Raises:
        ValueError: If it is a .csv, or if a source is no text, besides what the readers raise.
    """
    suffixes = [suffix for suffix in map(str.lower, Path(path).suffixes) if suffix not in COMPRESSED]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".csv":
        raise ValueError(f"{path}: .csv is not read; save it as .tsv or .jsonl, or its source column as text")
    if kind not in (".tsv", ".jsonl", ".json"):
        yield from open_lines(path, max_line_bytes)
        return
    for (text,) in read_records(path, [field], max_line_bytes=max_line_bytes):
        yield text


def read_dataset(
    name: str, config: str | None, split: str, fields: Sequence[str], check: Check = texts
) -> Iterator[tuple[Any, ...]]:
    """Yield the named fields of a data set of the `datasets` library, by its name on the Hub or a local path.

    Raises:
        ValueError: If `datasets` is not installed, or if a field is missing or does not pass the check.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing_dependency("datasets", f"dataset_name={name!r}", None) from error
    where = f"dataset {name} ({split})"
    count = 0
    for count, record in enumerate(load_dataset(name, config, split=split), start=1):
        values = tuple(_field(record, field, where, count) for field in fields)
        yield _checked(check, values, f"{where}, example {count}")
    if count == 0:
        raise ValueError(f"no data: {where} is empty")
