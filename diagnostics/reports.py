"""What the reports of `urform doctor` share: plain-text tables, and values that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns on the left, two blanks between them; one line per row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def jsonable(value: Any) -> Any:
    """Write infinity and NaN, which JSON does not know, as strings, at any depth."""
    if isinstance(value, dict):
        return {key: jsonable(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
