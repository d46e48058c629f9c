"""Lines of text files: the one reader of the package, for training tokenizers, for data files and for streams.

A file that cannot be read as text is refused with its name and line. Nothing is guessed, skipped or replaced.
"""

import bz2
import gzip
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

MAX_LINE_BYTES = 1_000_000  # tokenizing such a line takes seconds and 300 MB

# Suffix, opener, first bytes.
_COMPRESSIONS: dict[str, tuple[Any, bytes]] = {
    ".gz": (gzip.open, b"\x1f\x8b"),
    ".xz": (lzma.open, b"\xfd7zXZ\x00"),
    ".bz2": (bz2.open, b"BZh"),
}
COMPRESSED = tuple(_COMPRESSIONS)
_SURROGATE = re.compile("[\ud800-\udfff]")


def open_lines(path: str | os.PathLike[str], max_line_bytes: int | None = MAX_LINE_BYTES) -> Iterator[str]:
    r"""Yield the lines of a UTF-8 text file without their line ends; only `\n` and `\r\n` end a line.

    Args:
        path: The file; `.gz`, `.xz` and `.bz2` are unpacked. A byte-order mark at its beginning is left out.
        max_line_bytes: Longest line that is accepted, in bytes; None for no limit.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a folder, not UTF-8, not the archive that its name says, damaged, or has a line that is longer
            than `max_line_bytes`. The message names the file and the line.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    with path.open("rb") as raw:
        start = raw.peek(8)[:8]
        suffix = path.suffix.lower()
        if suffix not in _COMPRESSIONS:
            for compression, (_, magic) in _COMPRESSIONS.items():
                if start.startswith(magic) and not magic.isascii():
                    raise ValueError(
                        f"{path}, line 1: not text but {compression} data: rename it to {path}{compression}"
                    )
            yield from decode_lines(raw, path, max_line_bytes)
            return
        opener, magic = _COMPRESSIONS[suffix]
        if not start.startswith(magic):
            raise ValueError(f"{path}, line 1: not a {suffix} file although its name says so: rename or compress it")
        with opener(raw) as unpacked:
            yield from decode_lines(unpacked, path, max_line_bytes)


def decode_lines(
    stream: IO[bytes], name: str | os.PathLike[str], max_line_bytes: int | None = MAX_LINE_BYTES
) -> Iterator[str]:
    """Yield the lines of a stream of bytes as `open_lines` does.

    Args:
        stream: Plain bytes, or an archive opened for reading.
        name: What errors call it.
        max_line_bytes: As for `open_lines`.

    Raises:
        ValueError: As for `open_lines`.
    """
    if max_line_bytes is not None and max_line_bytes < 1:
        raise ValueError(f"max_line_bytes={max_line_bytes} must be positive, or None for no limit")
    size = -1 if max_line_bytes is None else max_line_bytes + 2  # the line end does not count
    number = 0
    while True:
        try:
            line = stream.readline(size)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the machine failed, not the archive
            raise ValueError(f"{name}, after line {number}: the file is damaged ({error}): make it again") from error
        if not line:
            return
        number += 1
        yield _decode(line, f"{name}, line {number}", number == 1, max_line_bytes)


def _decode(line: bytes, where: str, is_first: bool, max_line_bytes: int | None) -> str:
    """Return a line as text, without its line end, the first one without a byte-order mark.

    Raises:
        ValueError: The line is too long, not UTF-8, or mostly zeros; the message begins with `where`.
    """
    if is_first and line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{where}: not UTF-8 but UTF-16: convert it, e.g. with iconv -f UTF-16 -t UTF-8")
    text = line.removesuffix(b"\n").removesuffix(b"\r")
    if max_line_bytes is not None and len(text) > max_line_bytes:
        raise ValueError(f"{where}: longer than max_line_bytes={max_line_bytes}: split the line or raise the limit")
    zeros = text.count(0)
    if zeros > 2 and 4 * zeros >= len(text):
        raise ValueError(f"{where}: not text ({zeros} of {len(text)} bytes are 0): convert it to UTF-8")
    try:
        return text.decode("utf-8-sig" if is_first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}): convert it to UTF-8") from None


def unencodable(text: str) -> str | None:
    """Say which character of a text UTF-8 cannot hold (half of a surrogate pair, as a cut emoji leaves it), or None."""
    found = None if text.isascii() else _SURROGATE.search(text)
    return (
        found
        and f"{found[0]!r} at character {found.start()} is half of a character that was cut in two: correct the text"
    )
