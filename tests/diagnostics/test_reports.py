"""What reports share."""

import json
import math

import pytest

from urform.diagnostics.reports import jsonable, table


def test_tables_align_their_columns() -> None:
    rows = [["", "ms", "note"], ["a name", "3.10", "x"], ["b", "12345.00", ""]]
    assert table(rows, right=[1]) == ["              ms  note", "a name      3.10  x", "b       12345.00"]
    assert table(rows) == ["        ms        note", "a name  3.10      x", "b       12345.00"]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        table([["a"], ["b", "c"]])


def test_json_gets_no_infinity() -> None:
    value = {"a": [math.inf, (math.nan, 1.5)], "b": None}
    assert json.loads(json.dumps(jsonable(value), allow_nan=False)) == {"a": ["inf", ["nan", 1.5]], "b": None}
