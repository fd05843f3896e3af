"""Numbers and lengths of time in words."""

from __future__ import annotations

import pytest

from medseg.report.words import by, count, duration, listed, millilitres, number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(0.87654), "0.877"),
        (number(-0.5, 2), "\N{MINUS SIGN}0.50"),
        (number(-0.004, 2), "0.00"),
        (number(None), "\N{EN DASH}"),
        (millilitres(1534.4), "1534"),
        (millilitres(-123.45), "\N{MINUS SIGN}123.5"),
        (millilitres(1.234), "1.23"),
        (millilitres(0.01234), "0.012"),
        (millilitres(0.0), "0"),
        (millilitres(None), "\N{EN DASH}"),
        (duration(59.6), "60 s"),
        (duration(603.0), "10 min"),
        (duration(7500.0), "2 h 5 min"),
        (duration(None), "\N{EN DASH}"),
        (count(1, "case"), "1 case"),
        (count(1200, "case"), "1,200 cases"),
        (count(2, "class"), "2 classes"),
        (listed(["a"]), "a"),
        (listed(["a", "b", "c"]), "a, b and c"),
        (listed(["a", "b", "c"], 2, "cases"), "3 cases: a and others"),
        (by([40, 56, 40]), "40 \N{MULTIPLICATION SIGN} 56 \N{MULTIPLICATION SIGN} 40"),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert text == expected
