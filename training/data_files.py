"""Reading corpora: parallel text, TSV and JSON Lines, each plain, .gz or .xz, and `datasets` by name.

Everything streams; nothing is guessed. A file that is missing, empty, torn or malformed is named, with the line.
"""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..dependencies import missing_dependency

__all__ = ["open_lines", "open_sources", "read_dataset", "read_jsonl", "read_parallel", "read_records", "read_tsv"]

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}


def open_lines(path: str | Path) -> Iterator[str]:
    r"""The lines of a text file (UTF-8), without their line ends; only `\n` and `\r\n` end a line.

    Args:
        path: The file; `.gz` and `.xz` are unpacked.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not UTF-8, or not the archive that its name says; names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    number = 0
    opener = _OPENERS.get(path.suffix, open)
    try:
        # newline="\n": Unicode's other line separators belong to the text.
        with opener(path, "rt", encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                text = line.rstrip("\n").removesuffix("\r")
                yield text.removeprefix("\ufeff") if number == 1 else text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, after line {number}: not UTF-8 ({error})") from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}, after line {number}: the {path.suffix} file is damaged ({error})") from error


def read_parallel(source: str | Path, target: str | Path) -> Iterator[tuple[str, str]]:
    """Pairs of lines of two files of equal length.

    Raises:
        ValueError: If the files have different numbers of lines (both are named), or are empty.
    """
    sources, targets = open_lines(source), open_lines(target)
    count = 0
    while True:
        left, right = next(sources, None), next(targets, None)
        if left is None and right is None:
            break
        if left is None or right is None:
            counts = [count + (line is not None) + sum(1 for _ in rest) for line, rest in
                      ((left, sources), (right, targets))]  # fmt: skip
            raise ValueError(
                f"parallel files differ in length: {source} has {counts[0]} lines, {target} has {counts[1]}"
            )
        count += 1
        yield left, right
    if not count:
        raise ValueError(f"no data: {source} and {target} are empty")


def read_jsonl(path: str | Path, fields: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The named fields of each line of a JSON Lines file.

    Raises:
        ValueError: If a line is not a JSON object or lacks a field (names file and line), or if the file is empty.
    """
    number = 0
    for number, line in enumerate(open_lines(path), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}")
        yield tuple(_field(record, name, path, number) for name in fields)
    if number == 0:
        raise ValueError(f"no data: {path} is empty")


def _field(record: dict[str, Any], name: str, path: str | Path, number: int) -> Any:
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            known = ", ".join(map(str, record))
            raise ValueError(f"{path}, line {number}: no field {name!r}; the line has: {known}")
        value = value[part]
    return value


def read_tsv(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The named columns of a tab-separated file.

    Args:
        path: The file. Fields are separated by tabs and nothing is quoted or escaped.
        columns: Zero-based numbers as text ("0"), for a file without a header, or names, for one with a header.

    Raises:
        ValueError: If a line has too few columns or a name is not in the header (names file and line), or if the file
            has no data.
    """
    lines = enumerate(open_lines(path), start=1)
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
        yield tuple(cells[index] for index in indices)
    if number == 0:
        raise ValueError(f"no data: {path} is empty")


def read_records(path: str | Path, fields: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Reads `.tsv` or `.jsonl`/`.json` (plain, .gz, .xz) by the file's name.

    Raises:
        ValueError: If the name says neither, besides what the readers raise.
    """
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in _OPENERS]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".tsv":
        return read_tsv(path, fields)
    if kind in (".jsonl", ".json"):
        return read_jsonl(path, fields)
    raise ValueError(f"{path}: expected a name ending in .tsv or .jsonl, plain or with .gz or .xz")


def open_sources(path: str | Path, field: str) -> Iterator[str]:
    """The texts of a file to translate: its lines, or one column or field of a .tsv or .jsonl, in order.

    Raises:
        ValueError: If it is a .csv, or if a source is no text, besides what the readers raise.
    """
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in _OPENERS]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".csv":
        raise ValueError(f"{path}: .csv is not read; save it as .tsv or .jsonl, or its source column as text")
    if kind not in (".tsv", ".jsonl", ".json"):
        yield from open_lines(path)
        return
    for number, (text,) in enumerate(read_records(path, [field]), start=1):
        if not isinstance(text, str):
            raise ValueError(f"{path}, record {number}: {field!r} is no text but {type(text).__name__}: {text!r}")
        yield text


def read_dataset(name: str, config: str | None, split: str, fields: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The named fields of a data set of the `datasets` library, by its name on the Hub or a local path.

    Raises:
        ValueError: If `datasets` is not installed, or if a field is missing.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing_dependency("datasets", f"dataset_name={name!r}", None) from error
    count = 0
    for count, record in enumerate(load_dataset(name, config, split=split), start=1):
        yield tuple(_field(record, field, f"dataset {name} ({split})", count) for field in fields)
    if count == 0:
        raise ValueError(f"no data: dataset {name} ({split}) is empty")
