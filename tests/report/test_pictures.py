"""The cases that are shown: the worst, some typical ones, and what is said of those that cannot be drawn."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reporting import GRID, gathered, mask, scored

from medseg.evaluate import Evaluation
from medseg.geometry import Geometry
from medseg.io import write_mask
from medseg.report import pictures
from medseg.report.gather import Batch, CaseFiles, Gathered, Predicted, gather
from medseg.report.pictures import chosen, draw, mean_dice, ranked
from medseg.volume import Labels, Mask

LABELS = Labels(values={"organ": 1, "lesion": 5})


@pytest.fixture
def many(tmp_path: Path) -> Evaluation:
    """Thirteen cases: one that failed, and twelve whose organ of 12 planes lacks 0 to 11; a lesion in one of them."""
    cases: dict[str, tuple[dict[int, tuple[int, int]], dict[int, tuple[int, int]] | None]] = {
        f"lacks_{n:02d}": ({1: (0, 12)}, {1: (n, 12)}) for n in range(12)
    }
    cases["failed"] = ({1: (0, 12)}, None)
    cases["lacks_00"] = ({1: (0, 12), 5: (13, 15)}, {1: (0, 12)})
    return scored(tmp_path, cases, LABELS)


def test_cases_are_ranked_by_their_mean_dice(many: Evaluation) -> None:
    by_name = {case.case: case for case in many.cases}
    assert mean_dice(by_name["lacks_06"], 2) == pytest.approx(2 * 6 / 18)
    assert mean_dice(by_name["lacks_00"], 2) == pytest.approx((1 + 0) / 2), "the lesion is missed"
    order = [case.case for case in ranked(many)]
    # 0.5 lies between lacking 9 (2 * 3 / 15 = 0.4) and lacking 8 (2 * 4 / 16 = 0.5): equal to the latter, by name first
    assert order == [
        *("lacks_11", "lacks_10", "lacks_09", "lacks_00", "lacks_08", "lacks_07"),
        *("lacks_06", "lacks_05", "lacks_04", "lacks_03", "lacks_02", "lacks_01"),
    ]


def test_the_worst_and_those_nearest_the_median_are_chosen(many: Evaluation) -> None:
    worst, typical = chosen(many)
    assert [case.case for case in worst] == ["lacks_11", "lacks_10", "lacks_09", "lacks_00", "lacks_08", "lacks_07"]
    assert [case.case for case in typical] == ["lacks_06", "lacks_05", "lacks_04", "lacks_03"]
    few = many.model_copy(update={"cases": many.cases[1:4]})
    assert [len(part) for part in chosen(few)] == [3, 0]


def test_a_case_without_any_class_is_not_ranked(tmp_path: Path) -> None:
    evaluation = scored(tmp_path, {"a": ({1: (2, 8)}, {1: (2, 8)}), "empty": ({}, {})}, LABELS)
    assert [case.case for case in ranked(evaluation)] == ["a"]


def test_worst_cases_have_a_picture_and_the_first_a_viewer(many: Evaluation, tmp_path: Path) -> None:
    drawn = draw(gather(tmp_path / "scores"))
    assert [len(part) for part in (drawn.worst, drawn.typical, drawn.viewers, drawn.mosaics)] == [6, 4, 5, 0]
    first = drawn.worst[0]
    assert base64.b64decode(first.png.partition(",")[2]).startswith(b"\x89PNG")
    assert first.viewer is not None
    assert first.viewer["case"] == "lacks_11"
    assert first.notes == ("The image is not known; the masks are shown without it.",)
    assert drawn.numbers == {shown.case: n for n, shown in enumerate((*drawn.worst, *drawn.typical), start=1)}


def one(folder: Path, **files: object) -> pictures.Shown:
    """The only case, with other files."""
    evaluation = scored(folder, {"a": ({1: (2, 8)}, {1: (3, 8)})}, LABELS)
    known = gather(folder / "scores").files["a"]
    drawn = draw(gathered(evaluation, files={"a": replace(known, **files)}))  # type: ignore[arg-type]
    return drawn.worst[0]


def test_what_is_damaged_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    (tmp_path / "image.nii.gz").write_bytes(b"no image")
    shown = one(tmp_path, images=(tmp_path / "image.nii.gz",))
    assert shown.notes[0].startswith("The image cannot be read: …/image.nii.gz: ")
    assert shown.png
    shown = one(tmp_path, reference=tmp_path / "gone.nii.gz")
    assert any("The reference cannot be read: …/gone.nii.gz" in note for note in shown.notes)
    assert shown.png
    shown = one(tmp_path, reference=None, prediction=None)
    assert "There is no predicted mask." in shown.notes
    assert (shown.png, shown.viewer) == ("", None)


def test_what_lies_on_another_grid_is_left_out(tmp_path: Path) -> None:
    shifted = Geometry(GRID.shape, np.diag([2.0, 1.5, 2.0, 1.0]))
    write_mask(Mask(mask({1: (2, 8)}).array, shifted), tmp_path / "other.nii.gz")
    shown = one(tmp_path, images=(tmp_path / "other.nii.gz",))
    assert "The image lies on another grid than the mask, and is not shown." in shown.notes
    assert shown.viewer is not None
    assert shown.viewer["image"] is None
    shown = one(tmp_path, prediction=tmp_path / "other.nii.gz")
    assert "The prediction lies on another grid than the reference, and is not shown." in shown.notes
    assert shown.viewer is not None
    assert shown.viewer["prediction"] is None


def predictions(folder: Path, count: int) -> Gathered:
    """Predicted cases of one mask, the last of them flagged, without images."""
    write_mask(mask({1: (2, 8)}), folder / "mask.nii.gz")
    rows = tuple(
        Predicted(
            f"case_{n:03d}", "done", "mask.nii.gz", 1.0, {}, None, {}, ("empty:lesion",) * (n == count - 1), "", ""
        )
        for n in range(count)
    )
    files = {row.case: CaseFiles((), None, folder / "mask.nii.gz") for row in rows}
    return Gathered("predictions", "masks", None, LABELS, files, (Batch("", {}, rows),))


def test_predictions_are_shown_in_mosaics_flagged_ones_first(tmp_path: Path) -> None:
    drawn = draw(predictions(tmp_path, 50))
    assert [len(mosaic.cases) for mosaic in drawn.mosaics] == [48, 2]
    assert drawn.mosaics[0].cases[:2] == ("case_049", "case_000")
    assert [shown.case for shown in drawn.viewers] == ["case_049", "case_000", "case_001", "case_002", "case_003"]
    (note,) = drawn.notes
    assert note.startswith("The image is not known; the masks are shown without it. (50 cases: case_049, ")


def test_there_is_an_end_to_mosaics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_TILES", 3)
    drawn = draw(predictions(tmp_path, 14))
    assert [len(mosaic.cases) for mosaic in drawn.mosaics] == [3, 3, 3, 3]
    assert drawn.notes[-1] == "12 of the 14 masks are shown, those with flags first."


def test_what_there_is_no_room_for_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "WORST", 1)
    drawn = [pictures.Shown(name, n, "x" * 10, {"image": "x" * 7}) for n, name in enumerate("ab", start=1)]
    in_order = ["a png", "a viewer", "b viewer", "b png"]
    for room, fitting in ((34, 4), (33, 3), (23, 2), (16, 1), (6, 0)):
        kept = pictures._within(drawn, room)
        left = {f"{shown.case} {part}" for shown in kept for part in ("png", "viewer") if getattr(shown, part)}
        assert left == {*in_order[:fitting]}
    assert kept[1].notes == (pictures._NO_VIEWER, pictures._NO_PICTURE)


def test_masks_that_cannot_be_read_give_no_mosaic(tmp_path: Path) -> None:
    found = predictions(tmp_path, 2)
    (tmp_path / "mask.nii.gz").write_bytes(b"")
    drawn = draw(found)
    assert drawn.mosaics == ()
    assert any("The prediction cannot be read" in note for note in drawn.notes)
    assert draw(replace(found, labels=None)).mosaics == ()
