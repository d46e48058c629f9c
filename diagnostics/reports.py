"""What reports share: plain-text tables, and values that JSON can hold.

The tables are plain text, not rich's: they are pasted into Markdown and issues, and have the same width everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any


def table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Align columns, two blanks between them; return one line per row.

    Args:
        rows: Cells, as many in each row.
        right: Numbers of the columns that are aligned on the right; the others are on the left.

    Raises:
        ValueError: The rows differ in length.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [">" if i in right else "<" for i in range(len(widths))]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def jsonable(value: Any) -> Any:
    """Write infinity and NaN, which JSON does not know, as strings, at any depth."""
    if isinstance(value, dict):
        return {key: jsonable(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
