"""Evaluation from files: matching, the cases that fail, and what the summary says of them."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicoms import write_series
from numpy.typing import NDArray

from medseg.errors import DatasetError, InputError
from medseg.evaluate import (
    DEFAULT_TOLERANCE_MM,
    EvaluateSettings,
    Evaluation,
    evaluate_cases,
    evaluate_folders,
)
from medseg.geometry import Geometry
from medseg.io import series as io_series
from medseg.io import write_mask
from medseg.io.dicom import Series
from medseg.io.picture import picture_grid
from medseg.metrics import score_pair
from medseg.pairs import pairs_of
from medseg.volume import Labels, Mask

LABELS = Labels(values={"organ": 1, "lesion": 2})
SHAPE = (8, 6, 6)
DIAGONAL = math.hypot(*SHAPE)


def mask(*pieces: tuple[int, tuple[slice, ...]]) -> NDArray[np.uint8]:
    array = np.zeros(SHAPE, dtype=np.uint8)
    for value, place in pieces:
        array[place] = value
    return array


ORGAN = (1, np.s_[2:5, 2:5, 2:5])
LESION = (2, np.s_[6:8, 2:4, 2:4])


def save(path: Path, array: NDArray[np.uint8], affine: NDArray[np.float64] | None = None) -> Path:
    geometry = Geometry(array.shape, np.eye(4) if affine is None else affine)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mask(Mask(array, geometry), path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Five cases: a perfect one, a missed lesion, a false lesion, both empty, and one without a prediction."""
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    for case, reference, prediction in [
        ("a", mask(ORGAN, LESION), mask(ORGAN, LESION)),
        ("b", mask(ORGAN, LESION), mask(ORGAN)),
        ("c", mask(ORGAN), mask(ORGAN, LESION)),
        ("d", mask(ORGAN), mask(ORGAN)),
        ("e", mask(ORGAN, LESION), None),
    ]:
        save(references / f"{case}.nii.gz", reference)
        if prediction is not None:
            save(predictions / f"{case}.nii.gz", prediction)
    return predictions, references


def test_every_case_counts(folders: tuple[Path, Path]) -> None:
    found = evaluate_folders(*folders, labels=LABELS)
    organ, lesion = found.classes
    assert (organ.n, organ.n_failed, organ.n_missed, organ.n_false_positive, organ.n_empty_reference) == (5, 1, 0, 0, 0)
    assert organ.dice is not None
    assert (organ.dice.mean, organ.dice.median) == (pytest.approx(4 / 5), 1.0)
    assert (lesion.n, lesion.n_true_negative, lesion.n_empty_reference) == (4, 1, 2)
    assert (lesion.n_missed, lesion.n_false_positive, lesion.n_failed) == (1, 1, 1)
    assert lesion.dice is not None
    assert lesion.hd95_mm is not None
    assert lesion.dice.mean == 1 / 4
    assert lesion.hd95_mm.mean == pytest.approx(DIAGONAL * 3 / 4)
    assert lesion.hd95_mm.median == pytest.approx(DIAGONAL)
    assert found.mean.dice == pytest.approx((4 / 5 + 1 / 4) / 2)
    assert found.mean.hd95_mm == pytest.approx(DIAGONAL * (1 / 5 + 3 / 4) / 2)
    assert found.tolerance_mm == DEFAULT_TOLERANCE_MM
    assert list(found.failed) == ["e"]
    assert "there is no prediction" in found.failed["e"]


def test_labels_are_found_where_none_are_given(folders: tuple[Path, Path]) -> None:
    found = evaluate_folders(*folders)
    assert found.labels.values == {"label_1": 1, "label_2": 2}


def test_labels_and_references_of_a_dataset(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders
    references.rename(tmp_path / "labelsTr")
    (tmp_path / "imagesTr").mkdir()
    entries = []
    for case in "abcde":
        (tmp_path / f"imagesTr/{case}.nii.gz").touch()  # evaluation opens no image
        entries.append({"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"})
    listing = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "tumour"},
        "training": entries,
        "test": [],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(listing))
    found = evaluate_folders(predictions, tmp_path)
    assert [c.name for c in found.classes] == ["liver", "tumour"]
    assert len(found.cases) == 5


def test_regions_are_summarised_but_not_in_the_mean(folders: tuple[Path, Path]) -> None:
    labels = LABELS.model_copy(update={"regions": {"all": (1, 2)}})
    found = evaluate_folders(*folders, labels=labels)
    assert [c.name for c in found.classes] == ["organ", "lesion", "all"]
    assert found.mean.dice == pytest.approx((4 / 5 + 1 / 4) / 2)


def test_chosen_cases_and_progress(folders: tuple[Path, Path]) -> None:
    seen: list[tuple[str, float, str]] = []
    found = evaluate_folders(*folders, cases=["b", "a", "b"], progress=lambda *step: seen.append(step))
    assert [case.case for case in found.cases] == ["b", "a"]
    assert seen == [("scoring", 0.5, "b"), ("scoring", 1.0, "a")]
    with pytest.raises(InputError, match="no reference for z"):
        evaluate_folders(*folders, cases=["z"])


def test_predictions_without_reference_are_listed(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    save(predictions / "z.nii.gz", mask(ORGAN))
    (predictions / ".hidden.nii.gz").touch()
    (predictions / "notes.txt").touch()
    assert evaluate_folders(predictions, references).extra == ("z",)


def test_single_files_are_a_pair_whatever_their_names(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    found = evaluate_folders(predictions / "a.nii.gz", references / "b.nii.gz")
    assert [(case.case, case.scores[0].dice) for case in found.cases] == [("b", 1.0)]
    found = evaluate_folders(predictions / "a.nii.gz", references)
    assert [case.case for case in found.cases] == ["a"]
    found = evaluate_folders(predictions, references / "c.nii.gz", labels=LABELS)
    assert [case.case for case in found.cases] == ["c"]
    assert found.extra == ("a", "b", "d")


def test_endings_may_differ(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    save(predictions / "e.nii", mask(ORGAN, LESION))
    assert evaluate_folders(predictions, references).failed == {}


def test_pictures_are_scored_at_1_mm_a_pixel_whatever_their_endings(tmp_path: Path) -> None:
    reference, prediction = np.zeros((2, 8, 8, 1), np.uint8)
    reference[2:4, 2:6], prediction[3:5, 2:6] = 255, 255
    grid = picture_grid((8, 8, 1))
    write_mask(Mask(reference, grid), tmp_path / "references" / "a.tif")
    write_mask(Mask(prediction, grid), tmp_path / "predictions" / "a.png")
    found = evaluate_folders(tmp_path / "predictions", tmp_path / "references")
    assert found.labels.values == {"label_255": 255}
    ((score,),) = (case.scores for case in found.cases)
    assert score.dice == 0.5  # 8 pixels each, 4 in common
    assert score.reference_ml == 0.008
    assert score.hd95_mm == 1.0  # moved by one pixel


def test_a_picture_on_its_side_is_another_grid(tmp_path: Path) -> None:
    array = np.eye(8, dtype=np.uint8)[..., np.newaxis]
    for folder, orientation in (("references", 6), ("predictions", 1)):
        write_mask(Mask(array, picture_grid((8, 8, 1), orientation)), tmp_path / folder / "a.png")
    found = evaluate_folders(tmp_path / "predictions", tmp_path / "references")
    assert "never resampled" in found.failed["a"]


FAULTS = {
    "shape": "7x6x6",
    "affine": "never resampled",
    "value": r"label values \[5, 10\]",
    "damaged": "e.nii.gz",
    "fractions": "no integers",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_unusable_prediction_fails_and_is_listed(folders: tuple[Path, Path], fault: str) -> None:
    predictions, references = folders
    path = predictions / "e.nii.gz"
    array, affine = mask(ORGAN, LESION), np.eye(4)
    if fault == "shape":
        array = array[:7]
    if fault == "affine":
        affine[0, 3] = 2.0
    if fault == "value":
        array = array * 5
    if fault == "fractions":
        array = array * 0.5  # type: ignore[assignment]
    save(path, array, affine)
    if fault == "damaged":
        path.write_bytes(path.read_bytes()[:-9])
    found = evaluate_folders(predictions, references, labels=LABELS)
    assert list(found.failed) == ["e"]
    assert re.search(FAULTS[fault], found.failed["e"])
    worst = found.cases[-1].scores[0]
    assert (worst.status, worst.dice, worst.nsd, worst.hd95_mm) == ("failed", 0.0, 0.0, pytest.approx(DIAGONAL))
    assert worst.reference_ml == pytest.approx(0.027)


def test_affine_that_differs_by_rounding_is_the_same_grid(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    affine = np.eye(4)
    affine[0, 3] = 1e-4
    save(predictions / "e.nii.gz", mask(ORGAN, LESION), affine)
    assert evaluate_folders(predictions, references).failed == {}


def test_unusable_reference_is_listed_and_in_no_number(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    (references / "a.nii.gz").write_bytes(b"no image")
    found = evaluate_folders(predictions, references)
    assert list(found.unscored) == ["a"]
    assert [case.case for case in found.cases] == ["b", "c", "d", "e"]
    assert found.classes[0].n == 4


def test_no_usable_reference_at_all(folders: tuple[Path, Path]) -> None:
    with pytest.raises(DatasetError, match="none of 5 can be used"):
        evaluate_folders(*folders, labels=Labels(values={"other": 77}))


def test_nothing_to_score(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no masks"):
        evaluate_folders(tmp_path / "empty", references)
    with pytest.raises(InputError, match="is not there"):
        evaluate_folders(predictions, tmp_path / "nowhere")
    with pytest.raises(InputError, match="no case to score"):
        evaluate_cases([], LABELS)
    save(tmp_path / "others" / "x.nii.gz", mask(ORGAN))
    with pytest.raises(InputError, match="no mask has the name of a reference"):
        evaluate_folders(tmp_path / "others", references)
    save(tmp_path / "blank" / "a.nii.gz", mask())
    with pytest.raises(InputError, match="no label but background"):
        evaluate_folders(predictions, tmp_path / "blank")


def test_two_masks_of_one_name_are_refused(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    save(predictions / "a.nii", mask(ORGAN))
    with pytest.raises(InputError, match=r"are both masks of a.*masks/\*\.nii\.gz"):
        evaluate_folders(predictions, references)
    assert len(evaluate_folders(predictions / "*.nii.gz", references / "?.nii.gz").cases) == 5
    with pytest.raises(InputError, match="holds no masks"):
        evaluate_folders(predictions / "*.mha", references)


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_impossible_tolerance_is_refused(tolerance: float) -> None:
    with pytest.raises(InputError, match="tolerance_mm"):
        EvaluateSettings.checked({"tolerance_mm": tolerance}, "--tolerance-mm")


def test_class_that_is_nowhere_has_no_mean(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    labels = Labels(values={**LABELS.values, "absent": 3})
    found = evaluate_folders(predictions, references, labels, cases=["a", "b"])
    absent = found.classes[2]
    assert (absent.n, absent.n_true_negative, absent.dice, absent.hd95_mm) == (0, 2, None, None)
    assert found.mean.dice == pytest.approx((1.0 + 0.5) / 2)


def test_record_and_table_are_kept(folders: tuple[Path, Path], tmp_path: Path) -> None:
    found = evaluate_folders(*folders, labels=LABELS, settings=EvaluateSettings(tolerance_mm=2.5))
    found.save(tmp_path / "scores.json")
    assert Evaluation.load(tmp_path / "scores.json") == found
    found.save_csv(tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["class"]) for row in rows] == [(c, n) for c in "abcde" for n in ("organ", "lesion")]
    assert [row["status"] for row in rows[1::2]] == ["scored", "missed", "false_positive", "true_negative", "failed"]
    assert (rows[7]["dice"], rows[7]["hd95_mm"]) == ("", "")
    assert float(rows[3]["hd95_mm"]) == pytest.approx(DIAGONAL)
    assert {row["tolerance_mm"] for row in rows} == {"2.5"}
    assert rows[8]["reason"].endswith("(expected a mask)")


def test_only_predicted_leaves_out_what_was_not_asked_for(tmp_path: Path) -> None:
    cube = mask((1, (slice(2, 4),) * 3))
    for name in ("predictions/a", "references/a", "references/b"):
        write_mask(Mask(cube, Geometry(SHAPE, np.eye(4))), tmp_path / f"{name}.nii.gz")
    both = evaluate_folders(tmp_path / "predictions", tmp_path / "references")
    one = evaluate_folders(tmp_path / "predictions", tmp_path / "references", only_predicted=True)
    assert (both.mean.dice, both.classes[0].n_failed) == (0.5, 1)  # the missing one counts as 0
    assert (one.mean.dice, one.classes[0].n, one.classes[0].n_failed) == (1.0, 1, 0)


# DICOM segmentations


GRID = {"spacing": (0.5, 0.75, 3.0), "row": (0, 1, 0), "column": (0, 0, -1), "origin": (10, 20, 30)}
NAMED = Labels(values={"liver": 2, "spleen": 40})


@pytest.fixture
def series(tmp_path: Path) -> Series:
    """A sagittal series of 12 slices."""
    write_series(tmp_path / "study", np.ones((8, 6, 12), np.int16), **GRID)  # type: ignore[arg-type]
    return io_series(tmp_path / "study")


def organs(first: int, last: int, spleen: bool = True) -> NDArray[np.uint8]:
    """A liver of 3 x 3 voxels in slices ``first`` to ``last``, and perhaps a spleen of one voxel in slice 5."""
    array = np.zeros((8, 6, 12), np.uint8)
    array[2:5, 2:5, first : last + 1] = 2
    if spleen:
        array[6, 2, 5] = 40
    return array


def save_seg(series: Series, path: Path, array: NDArray[np.uint8]) -> Path:
    assert series.geometry is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mask(Mask(array, series.geometry, NAMED, header=series), path)
    return path


def save_ras(series: Series, path: Path, array: NDArray[np.uint8], labels: Labels | None = None) -> Path:
    """As NIfTI turned to RAS, as a converter leaves it."""
    assert series.geometry is not None
    turn = series.geometry.to("RAS")
    path.parent.mkdir(parents=True, exist_ok=True)
    turned = Mask(np.ascontiguousarray(turn.apply(array)), series.geometry.reoriented(turn), labels)
    write_mask(turned, path)
    return path


def liver_dice(found: Evaluation) -> float:
    assert found.failed == {}
    assert found.unscored == {}
    (score,) = (score for score in found.cases[0].scores if score.name == "liver")
    assert score.dice is not None
    return score.dice


def test_segmentations_are_scored_on_the_grid_of_the_other_mask(series: Series, tmp_path: Path) -> None:
    whole = save_ras(series, tmp_path / "whole.nii.gz", organs(3, 6))  # 36 voxels of liver
    part = save_seg(series, tmp_path / "part.dcm", organs(4, 6))  # 27 of them, in a file of three slices
    assert liver_dice(evaluate_folders(part, whole, NAMED)) == pytest.approx(2 * 27 / (36 + 27))
    assert liver_dice(evaluate_folders(whole, part, NAMED)) == pytest.approx(2 * 27 / (36 + 27))
    other = save_seg(series, tmp_path / "other.dcm", organs(5, 9))  # 45, of which 18 in common with part
    for pair in ((part, other), (other, part)):
        found = evaluate_folders(*pair)
        assert found.labels.values == {"liver": 1, "spleen": 2}
        assert liver_dice(found) == pytest.approx(2 * 18 / (27 + 45))
    assert found.mean.dice == pytest.approx((2 * 18 / (27 + 45) + 1) / 2)


def test_segments_are_known_by_their_names(series: Series, tmp_path: Path) -> None:
    seg = save_seg(series, tmp_path / "a.dcm", organs(3, 6))  # its segments are 1 and 2
    values = np.choose(np.searchsorted([0, 2, 40], organs(3, 6)), [0, 2, 1]).astype(np.uint8)
    swapped = save_ras(series, tmp_path / "a.nii.gz", values)  # 2 is the liver, and 1 the spleen
    found = evaluate_folders(seg, swapped, Labels(values={"Spleen": 1, "Liver": 2}))
    assert [(score.name, score.dice) for score in found.cases[0].scores] == [("Spleen", 1.0), ("Liver", 1.0)]
    for pair in ((seg, swapped), (swapped, seg)):  # nobody says which of the values is the liver
        with pytest.raises(InputError, match=r"a\.nii\.gz: its values have no names.*Give --labels"):
            evaluate_folders(*pair)


def test_labels_that_nobody_asked_for_are_left_out_and_listed(series: Series, tmp_path: Path) -> None:
    """A tool that knows more organs than the reference."""
    liver = Labels(values={"Liver": 1})
    reference = save_ras(series, tmp_path / "ref" / "a.nii.gz", (organs(3, 6) == 2).astype(np.uint8), liver)
    for prediction in (
        save_seg(series, tmp_path / "a.dcm", organs(4, 6)),
        save_ras(series, tmp_path / "a.nii.gz", organs(4, 6), NAMED),
    ):
        for given in (None, liver):
            found = evaluate_folders(prediction, reference, given)
            assert found.mean.dice == pytest.approx(2 * 27 / (36 + 27))
            assert [score.name for score in found.classes] == ["Liver"]
            assert found.left_out == found.cases[0].left_out == ("spleen",)
    wrong = save_ras(series, tmp_path / "b.nii.gz", organs(4, 6), Labels(values={"Leber": 2, "Milz": 40}))
    found = evaluate_folders(wrong, reference)
    assert re.search(r"none of its labels has a name that is scored \(expected Liver\).*--labels", found.failed["a"])


def test_names_of_predictions_are_those_of_the_values_of_nameless_references(series: Series, tmp_path: Path) -> None:
    reference = save_ras(series, tmp_path / "ref" / "a.nii.gz", organs(3, 6))
    named = Labels(values={"liver": 2, "heart": 3})  # as of a model that knows no spleen
    prediction = save_ras(series, tmp_path / "a.nii.gz", organs(4, 6, spleen=False), named)
    found = evaluate_folders(prediction, reference)
    assert found.labels.values == {"liver": 2, "label_40": 40}
    assert [score.status for score in found.cases[0].scores] == ["scored", "missed"]
    assert found.left_out == ("heart",)


def test_capitals_of_names_may_differ_from_file_to_file(series: Series, tmp_path: Path) -> None:
    for case, name in (("a", "Liver"), ("b", "LIVER")):
        labels = Labels(values={name: 2})
        save_ras(series, tmp_path / f"ref/{case}.nii.gz", organs(3, 6, spleen=False), labels)
        save_ras(series, tmp_path / f"out/{case}.nii.gz", organs(4, 6, spleen=False), Labels(values={"liver": 2}))
    found = evaluate_folders(tmp_path / "out", tmp_path / "ref")
    assert found.labels.values == {"Liver": 2}
    assert found.classes[0].n == 2
    assert found.mean.dice == pytest.approx(2 * 27 / (36 + 27))
    two = Labels(values={"Liver": 2, "liver": 40})
    save_ras(series, tmp_path / "ref/a.nii.gz", organs(3, 6), two)
    found = evaluate_folders(tmp_path / "ref/a.nii.gz", tmp_path / "ref/a.nii.gz")
    assert [score.dice for score in found.cases[0].scores] == [1.0, 1.0]


def test_names_that_references_have_are_used(series: Series, tmp_path: Path) -> None:
    for case, values in (("a", NAMED), ("b", Labels(values={"spleen": 40, "liver": 2, "kidney": 5}))):
        save_ras(series, tmp_path / f"references/{case}.nii.gz", organs(3, 6), values)
        save_seg(series, tmp_path / f"predictions/{case}.dcm", organs(3, 6))
    found = evaluate_folders(tmp_path / "predictions", tmp_path / "references")
    assert found.labels.values == {"liver": 2, "kidney": 5, "spleen": 40}
    assert found.mean.dice == 1.0
    save_ras(series, tmp_path / "references/c.nii.gz", organs(3, 6), Labels(values={"spleen": 2, "liver": 40}))
    found = evaluate_folders(tmp_path / "references", tmp_path / "references")
    assert found.labels.values == {"kidney": 1, "liver": 2, "spleen": 3}  # c has other values: names are what counts
    assert found.mean.dice == 1.0
    save_ras(series, tmp_path / "references/d.nii.gz", organs(3, 6))  # names none: which organ is 2?
    with pytest.raises(InputError, match=r"d\.nii\.gz: its values have no names"):
        evaluate_folders(tmp_path / "references", tmp_path / "references")
    (tmp_path / "references/c.nii.gz").unlink()
    found = evaluate_folders(tmp_path / "references", tmp_path / "references")
    assert found.labels.values == {"liver": 2, "kidney": 5, "spleen": 40}  # the others agree
    assert (found.mean.dice, found.failed, found.unscored) == (1.0, {}, {})


def test_segmentations_are_found_in_files_and_folders(series: Series, tmp_path: Path) -> None:
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    for case in "abc":
        save_ras(series, references / f"{case}.nii.gz", organs(3, 6))
    save_seg(series, predictions / "a.dcm", organs(3, 6))
    save_seg(series, predictions / "b" / "image.dcm", organs(4, 6))
    save_seg(series, predictions / "c.dcm", organs(3, 6)).rename(predictions / "c")  # as PACS export them
    for file in series.files[:2]:
        shutil.copy(file, predictions)  # images are no masks
    (predictions / "empty").mkdir()
    found = evaluate_folders(predictions, references, NAMED)
    assert [case.case for case in found.cases] == ["a", "b", "c"]
    assert found.failed == {}
    assert found.extra == ()
    assert [case.scores[0].dice for case in found.cases] == [1.0, pytest.approx(2 * 27 / (36 + 27)), 1.0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"origin": (11, 20, 30)}, "a.dcm: its voxels do not lie on those of the image"),
        ({"origin": (13, 20, 30)}, "lie outside"),
        ({"origin": (10 + 3 * 1000, 20, 30)}, "lies far away from the reference"),
        ({"spacing": (1.0, 0.75, 3.0)}, "a.dcm: its voxels do not lie on those of the image"),
    ],
    ids=["a third of a slice", "one slice", "far away", "coarser"],
)
def test_a_segmentation_of_another_image_fails(
    change: dict[str, Any], reason: str, series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medseg.evaluate.MOST_VOXELS", 8 * 6 * 1000)
    write_series(tmp_path / "other", np.ones((8, 6, 12), np.int16), **{**GRID, **change})
    seg = save_seg(io_series(tmp_path / "other"), tmp_path / "a.dcm", organs(0, 11))
    reference = save_ras(series, tmp_path / "a.nii.gz", organs(3, 6))
    assert "a" in evaluate_folders(seg, reference, NAMED).failed
    found = evaluate_folders(seg, save_seg(series, tmp_path / "own.dcm", organs(3, 6)), NAMED)
    if "outside" in reason:  # the grid of two segmentations is that of both
        assert liver_dice(found) == pytest.approx(2 * 36 / (36 + 108))
    else:
        assert reason in found.failed["own"]


# What the field's tools get wrong, and what a summary carries


def test_a_total_miss_costs_what_it_should(tmp_path: Path) -> None:
    for name, prediction in {"perfect": mask(ORGAN), "missed": mask()}.items():
        save(tmp_path / "references" / f"{name}.nii.gz", mask(ORGAN))
        save(tmp_path / "predictions" / f"{name}.nii.gz", prediction)
    found = evaluate_folders(tmp_path / "predictions", tmp_path / "references")
    (organ,) = found.classes
    assert organ.dice is not None
    assert organ.hd95_mm is not None
    assert (organ.n, organ.n_missed, organ.dice.mean) == (2, 1, 0.5)
    assert organ.hd95_mm.mean == pytest.approx(DIAGONAL / 2)
    assert organ.worst == ("missed", "perfect")


def test_a_false_positive_on_an_empty_reference_costs_what_it_should(tmp_path: Path) -> None:
    for name, reference in {"perfect": mask(ORGAN), "empty": mask()}.items():
        save(tmp_path / "references" / f"{name}.nii.gz", reference)
        save(tmp_path / "predictions" / f"{name}.nii.gz", mask(ORGAN))
    (organ,) = evaluate_folders(tmp_path / "predictions", tmp_path / "references").classes
    assert organ.dice is not None
    assert (organ.n, organ.n_empty_reference, organ.n_false_positive, organ.dice.mean) == (2, 1, 1, 0.5)


def test_structures_of_one_voxel_and_at_the_border_are_scored(tmp_path: Path) -> None:
    one, corner = mask((1, np.s_[4, 3, 3])), mask((1, np.s_[:2, :2, :2]))
    for name, reference, prediction in (
        ("one", one, np.roll(one, 1, axis=0)),
        ("corner", corner, mask((1, np.s_[:1, :2, :2]))),
    ):
        save(tmp_path / "references" / f"{name}.nii.gz", reference)
        save(tmp_path / "predictions" / f"{name}.nii.gz", prediction)
    found = evaluate_folders(tmp_path / "predictions", tmp_path / "references")
    scores = {case.case: case.scores[0] for case in found.cases}
    # Beside each other: the four corners between them are shared, the other four are 1 mm away.
    assert (scores["one"].dice, scores["one"].hd_mm, scores["one"].nsd) == (0.0, 1.0, 1.0)
    assert (scores["corner"].dice, scores["corner"].hd_mm) == (2 * 4 / 12, 1.0)


def test_any_label_integers_and_regions_of_them(tmp_path: Path) -> None:
    labels = Labels(values={"rim": 7, "core": 300}, regions={"whole": (7, 300)})
    array = np.zeros(SHAPE, dtype=np.uint16)
    array[2:5, 2:5, 2:5], array[3, 3, 3] = 7, 300
    save(tmp_path / "references" / "a.nii.gz", array)  # type: ignore[arg-type]
    array[3, 3, 3] = 7
    save(tmp_path / "predictions" / "a.nii.gz", array)  # type: ignore[arg-type]
    found = evaluate_folders(tmp_path / "predictions", tmp_path / "references", labels)
    assert [(c.name, c.dice and c.dice.mean) for c in found.classes] == [
        ("rim", 2 * 26 / (26 + 27)),
        ("core", 0.0),
        ("whole", 1.0),
    ]


def cohort(folder: Path, lost: dict[str, int]) -> None:
    """Cases whose prediction lacks so many of the 27 voxels."""
    for case, voxels in lost.items():
        prediction = mask(ORGAN)
        prediction[tuple(index[:voxels] for index in np.nonzero(prediction))] = 0
        save(folder / "references" / f"{case}.nii.gz", mask(ORGAN))
        save(folder / "predictions" / f"{case}.nii.gz", prediction)


def test_a_summary_has_the_spread_the_interval_and_the_worst(tmp_path: Path) -> None:
    lost = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 9, "f": 18, "g": 0, "h": 4, "i": 5, "j": 6, "k": 7}
    cohort(tmp_path, lost)
    found = evaluate_folders(tmp_path / "predictions", tmp_path / "references")
    (organ,) = found.classes
    dices = [2 * (27 - n) / (54 - n) for n in lost.values()]
    assert organ.dice is not None
    assert organ.dice.mean == pytest.approx(np.mean(dices))
    assert organ.dice.median == pytest.approx(dices[7])  # of eleven the sixth
    assert (organ.dice.p25, organ.dice.p75) == pytest.approx(np.percentile(dices, (25, 75)))
    assert (organ.dice.p05, organ.dice.p95) == pytest.approx(np.percentile(dices, (5, 95)))
    assert organ.dice.low is not None
    assert organ.dice.high is not None
    assert 0.5 < organ.dice.low < organ.dice.mean < organ.dice.high < 1.0
    assert organ.worst == ("f", "e", "k", "j", "i")
    assert (found.mean_low.dice, found.mean_high.dice) == (organ.dice.low, organ.dice.high)
    assert organ.volume_difference_ml is not None
    assert organ.volume_difference_ml.mean == pytest.approx(-55 / 11 / 1000)
    again = evaluate_folders(tmp_path / "predictions", tmp_path / "references")
    assert again.model_dump() == found.model_dump()  # seeded


def test_too_few_cases_have_no_interval(tmp_path: Path) -> None:
    cohort(tmp_path, {"a": 0, "b": 1})
    found = evaluate_folders(tmp_path / "predictions", tmp_path / "references")
    assert found.classes[0].dice is not None
    assert found.classes[0].dice.low is None
    assert found.mean_low.dice is None


LESION_LABELS = Labels(values={"liver": 1, "liver tumour": 2})


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(None, ["liver tumour"]), ((), []), (("liver",), ["liver"])],
    ids=["by what they are", "none", "named"],
)
def test_lesions_are_counted_over_the_cases(
    folders: tuple[Path, Path], asked: tuple[str, ...] | None, expected: list[str], tmp_path: Path
) -> None:
    found = evaluate_folders(*folders, LESION_LABELS, EvaluateSettings(lesions=asked))
    assert [c.name for c in found.classes if c.lesions] == expected
    found.save_csv(tmp_path / "scores.csv")
    heading = (tmp_path / "scores.csv").read_text().splitlines()[0]
    assert ("lesions_found" in heading) == bool(expected)
    if expected == ["liver tumour"]:
        lesions = found.classes[1].lesions
        assert lesions is not None
        # Found in a; missed in b and in e, which failed; made up in c; d has none.
        assert (lesions.n_cases, lesions.n_reference, lesions.n_predicted, lesions.n_found) == (5, 3, 2, 1)
        assert (lesions.sensitivity, lesions.precision, lesions.f1) == (1 / 3, 1 / 2, 2 / 5)
        assert lesions.false_positives_per_case == 1 / 5


def test_lesions_of_an_unknown_class_are_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=r"lesions: there is no class tumor \(expected liver, liver tumour\)"):
        evaluate_folders(*folders, LESION_LABELS, EvaluateSettings(lesions=("tumor",)))


@pytest.mark.parametrize(
    ("folder", "wanted", "tolerance", "source"),
    [
        ("Task03_Liver", None, 7.0, "of Task03_Liver: Antonelli et al. 2022"),
        ("Dataset008_HepaticVessel", None, 3.0, "of Task08_HepaticVessel"),
        ("Dataset003_Knee", None, 1.0, "none was chosen"),
        ("liver", None, 1.0, "none was chosen"),
        ("Task03_Liver", 2.0, 2.0, "chosen by the user"),
    ],
)
def test_the_tolerance_of_the_decathlon_is_known_and_recorded(
    folders: tuple[Path, Path], folder: str, wanted: float | None, tolerance: float, source: str
) -> None:
    pairs = pairs_of(*folders)
    found = evaluate_cases(pairs, LABELS, EvaluateSettings(tolerance_mm=wanted), folder)
    assert found.tolerance_mm == tolerance
    assert source in found.tolerance_source


# Odd cases


def test_a_case_that_breaks_the_scoring_is_listed_and_the_others_are_scored(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_one(*arguments: Any) -> Any:
        if "b.nii.gz" in str(arguments[-1]):
            raise MemoryError("12.6 GiB")
        return score_pair(*arguments)

    monkeypatch.setattr("medseg.evaluate.score_pair", break_one)
    found = evaluate_folders(*folders, labels=LABELS)
    assert found.unscored == {"b": "could not be scored: unexpected MemoryError: 12.6 GiB"}
    assert [case.case for case in found.cases] == ["a", "c", "d", "e"]


def test_a_case_given_twice_is_refused(folders: tuple[Path, Path]) -> None:
    pairs = pairs_of(*folders)
    with pytest.raises(InputError, match="a: is given twice"):
        evaluate_cases([*pairs, pairs[0]], LABELS)


def test_an_evaluation_of_an_older_version_says_so(folders: tuple[Path, Path], tmp_path: Path) -> None:
    evaluate_folders(*folders, labels=LABELS).save(tmp_path / "scores.json")
    body = json.loads((tmp_path / "scores.json").read_text())
    (tmp_path / "scores.json").write_text(json.dumps({**body, "schema_version": 1}))
    with pytest.raises(InputError, match="has schema version 1"):
        Evaluation.load(tmp_path / "scores.json")
