"""Numbers and lengths of time in words, as they stand on a page."""

from __future__ import annotations

from collections.abc import Sequence

NONE, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


def number(value: float | None, digits: int = 3) -> str:
    """A number with a real minus sign; a dash where there is none."""
    if value is None:
        return NONE
    text = f"{value:.{digits}f}"
    return text.replace("-", MINUS if float(text) else "")


def millilitres(value: float | None) -> str:
    """A volume to about three figures."""
    size = abs(value or 0.0)
    if value == 0:
        return "0"
    return number(value, 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3)


def duration(seconds: float | None) -> str:
    """A length of time as people read it."""
    if seconds is None:
        return NONE
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60.0)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def count(number_of: int, noun: str) -> str:
    """How many there are: ``1 case``, ``1,200 cases``."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number_of:,} {noun if number_of == 1 else plural}"


def listed(names: Sequence[str], most: int = 99, kind: str = "") -> str:
    """Names as in a sentence: ``a, b and c``; of more than ``most``, how many of a kind they are, and the first."""
    if len(names) > most:
        return f"{len(names)} {kind}: {', '.join(names[: most - 1])} and others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def by(sizes: Sequence[object]) -> str:
    """Sizes along axes: ``40 x 56 x 40``, with the sign of multiplication."""
    return f" {TIMES} ".join(map(str, sizes))
