"""How long work reports where it is, without printing: a callback that the caller chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

Progress = Callable[[str, float, str], None]
"""Called with what is being done, the fraction done (0 to 1), and a short note (a case id, a loss)."""


def silent(work: str, fraction: float, note: str) -> None:
    """The progress that shows nothing."""


def track(items: Sequence[T], work: str, progress: Progress) -> Iterator[T]:
    """Go through ``items`` and report after each; an empty sequence reports nothing."""
    for done, item in enumerate(items, start=1):
        yield item
        progress(work, done / len(items), "")


def part(progress: Progress, number: int, count: int) -> Progress:
    """What shows the progress of the ``number``-th (from 0) of ``count`` like pieces of work as that of them all."""
    return lambda work, fraction, note: progress(work, (number + fraction) / count, note)
