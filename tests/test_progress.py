"""Progress: reports after each item, fractions that end at one."""

from __future__ import annotations

from medseg.progress import part, silent, track


def test_track_yields_every_item_and_reports_after_it() -> None:
    seen: list[object] = []
    seen.extend(track(["a", "b"], "reading", lambda work, fraction, note: seen.append((work, fraction, note))))
    assert seen == ["a", ("reading", 0.5, ""), "b", ("reading", 1.0, "")]


def test_track_of_nothing_reports_nothing() -> None:
    seen: list[object] = []
    assert list(track([], "reading", lambda *report: seen.append(report))) == []
    assert seen == []


def test_silent_takes_a_report() -> None:
    assert list(track([1, 2], "work", silent)) == [1, 2]


def test_a_part_of_the_work_is_a_part_of_the_whole() -> None:
    seen: list[object] = []
    for number in range(2):
        list(track(["a", "b"], "reading", part(lambda *report: seen.append(report[1]), number, 2)))
    assert seen == [0.25, 0.5, 0.75, 1.0]
