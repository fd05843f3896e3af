"""Results in words: the order of cases, flags, failures, and which plots there are."""

from __future__ import annotations

from pathlib import Path

import pytest
from reporting import gathered, scored

from medseg.progress import silent
from medseg.report import results
from medseg.report.gather import Batch, Predicted
from medseg.report.pictures import Pictures
from medseg.report.results import cases, pictures, scores, words_of_flags
from medseg.volume import Labels

LABELS = Labels(values={"organ": 1, "le:sion": 5})


def row(case: str, *flags: str, status: str = "done", warnings: str = "") -> Predicted:
    return Predicted(case, status, "", None, {}, None, {}, flags, warnings, "broken" if status == "failed" else "")


def test_flags_are_words_and_names_in_them_are_names() -> None:
    flags = ("volume:le%3Asion:low", "touches_border:organ:left+anterior", "spacing:z:high")
    assert words_of_flags(flags) == ["volume le:sion low", "touches border organ left+anterior", "spacing z high"]
    assert words_of_flags(flags[:1], "le:sion") == ["volume low"]


def test_flags_stand_beside_the_class_that_they_are_of(tmp_path: Path) -> None:
    evaluation = scored(tmp_path, {"a": ({1: (2, 8), 5: (9, 12)}, {1: (2, 8), 5: (9, 11)})}, LABELS)
    batch = Batch("", {}, (row("a", "volume:le%3Asion:low", "spacing:z:high"),))
    found = cases(gathered(evaluation, batches=(batch,)), Pictures())
    assert found["has_flags"]
    by_class = {each.score.name: each.flags for each in found["rows"]}
    assert by_class == {"organ": ("spacing z high",), "le:sion": ("volume low", "spacing z high")}


def test_the_worst_come_first_and_what_has_no_score_last(tmp_path: Path) -> None:
    blocks = {
        "good": ({1: (2, 8)}, {1: (2, 8)}),
        "poor": ({1: (2, 8)}, {1: (6, 8)}),
        "false": ({1: (2, 8)}, {1: (2, 8), 5: (9, 10)}),
        "failed": ({1: (2, 8)}, None),
    }
    found = cases(gathered(scored(tmp_path, blocks, LABELS)), Pictures())
    told = [(each.case, each.score.name, each.status) for each in found["rows"]]
    assert told[:3] == [
        ("failed", "le:sion", "failed"),
        ("failed", "organ", "failed"),
        ("false", "le:sion", "false positive"),
    ] or {one[0] for one in told[:3]} == {"failed", "false"}
    assert told[3:6] == [("poor", "organ", ""), ("false", "organ", ""), ("good", "organ", "")]
    assert {one[2] for one in told[6:]} == {"both empty, left out"}
    assert found["has_statuses"]


def test_failures_of_all_kinds_are_listed_without_folders(tmp_path: Path) -> None:
    blocks = {"a": ({1: (2, 8)}, {1: (2, 8)}), "b": ({1: (2, 8)}, None)}
    evaluation = scored(tmp_path, blocks, LABELS)
    evaluation = evaluation.model_copy(update={"unscored": {"c": "/home/anna/c.nii.gz: is damaged"}, "extra": ("d",)})
    listed = {title: items for title, _, items in scores(gathered(evaluation), silent)["problems"]}
    assert listed == {
        "Failed cases": [("b", "…/b: there is no prediction (expected a mask)")],
        "Cases that could not be scored": [("c", "…/c.nii.gz: is damaged")],
        "Predictions without a reference": [("d", "")],
    }


def test_plots_are_of_the_largest_classes(tmp_path: Path) -> None:
    labels = Labels(values={f"class {n}": n for n in range(1, 9)})
    blocks = {n: (n, n + 1) for n in range(1, 8)} | {8: (8, 12)}
    evaluation = scored(tmp_path, dict.fromkeys("abc", (blocks, blocks)), labels)
    drawn = scores(gathered(evaluation), silent)["plots"]
    titles = [plot.title for plot in drawn]
    assert titles[3:5] == ["Dice by size", "Volumes of class 8"]
    assert len(titles) == 3 + 1 + 6
    assert [plot.wide for plot in drawn] == [True] * 4 + [False] * 6
    assert "The 6 largest of 8 classes." in drawn[-1].caption


@pytest.mark.parametrize("blocks", [{}, {1: (2, 8)}], ids=["none", "two"])
def test_where_few_cases_count_there_is_no_plot(blocks: dict[int, tuple[int, int]], tmp_path: Path) -> None:
    evaluation = scored(tmp_path, {"a": (blocks, blocks), "b": (blocks, blocks), "c": ({}, {})}, LABELS)
    found = scores(gathered(evaluation), silent)
    assert found["plots"] == []
    assert not found["has_intervals"]


def test_failed_cases_are_named_among_the_pictures(tmp_path: Path) -> None:
    evaluation = scored(tmp_path, {"a": ({1: (2, 8)}, {1: (2, 8)}), "b": ({1: (2, 8)}, None)}, LABELS)
    found = pictures(gathered(evaluation), Pictures())
    assert found["picture_notes"] == ["Without a mask to show, as they failed: b."]
    assert found["has_pictures"]


@pytest.mark.parametrize(
    ("count", "last"), [(8, "c8: Dice 1.000, HD95 0.0 mm"), (10, "and 2 classes with a higher Dice")]
)
def test_captions_name_the_worst_of_many_classes(count: int, last: str, tmp_path: Path) -> None:
    labels = Labels(values={f"c{n}": n for n in range(1, count + 1)})
    blocks = {n: (n, n + 1) for n in range(1, count + 1)}
    evaluation = scored(tmp_path, {"a": (blocks, blocks)}, labels)
    texts = results._captioned(evaluation.cases[0])
    assert (len(texts), texts[-1]) == (min(count, 8) + (count > 8), last)


def test_predictions_tell_of_failures_and_warnings() -> None:
    from medseg.report.gather import Gathered

    batch = Batch("", {}, (row("a", warnings="odd"), row("b", status="failed"), row("c", "empty:organ")))
    found = Gathered("predictions", "masks", batches=(batch,))
    assert [each.case for each in cases(found, Pictures())["rows"]] == ["b", "c", "a"]
    listed = [(title, items) for title, _, items in scores(found, silent)["problems"]]
    assert listed == [("Failed cases", [("b", "broken")]), ("Warnings about the images", [("a", "odd")])]
