"""Pairs: names that are the same, that differ by what is around them, and those that are not guessed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medseg.errors import InputError
from medseg.evaluate import evaluate_folders
from medseg.geometry import Geometry
from medseg.io import write_mask
from medseg.pairs import find, pairs_of
from medseg.volume import Mask

SHAPE = (4, 4, 4)


def save(folder: Path, *names: str) -> Path:
    """Masks of one voxel, which names alone tell apart."""
    array = np.zeros(SHAPE, dtype=np.uint8)
    array[1, 1, 1] = 1
    for name in names:
        write_mask(Mask(array, Geometry(SHAPE, np.eye(4))), folder / f"{name}.nii.gz")
    return folder


@pytest.mark.parametrize(
    ("of_predictions", "of_references", "how"),
    [
        ("{}", "{}", ""),
        ("pred_{}_seg", "{}", "pred_01_seg is the prediction of 01"),
        ("{}", "case_{}_label", "01 is the prediction of case_01_label"),
        (
            "sub-{}_desc-medseg_dseg",
            "sub-{}_dseg",
            "sub-*_desc-medseg_dseg of the predictions is sub-*_dseg of the references",
        ),
    ],
)
def test_names_may_differ_by_what_is_around_them(
    tmp_path: Path, of_predictions: str, of_references: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    cases = ("01", "02", "11")
    predictions = save(tmp_path / "predictions", *map(of_predictions.format, cases))
    references = save(tmp_path / "references", *map(of_references.format, cases))
    found = pairs_of(predictions, references)
    assert [case for case, _, _ in found] == [of_references.format(case) for case in cases]
    assert [path.name for _, path, _ in found] == [f"{of_predictions.format(case)}.nii.gz" for case in cases]
    assert find(predictions, references).how == how
    assert how in caplog.text
    assert bool(caplog.text) == bool(how)
    evaluation = evaluate_folders(predictions, references)
    assert (evaluation.matched, evaluation.predictions) == (how, str(predictions))
    assert not evaluation.failed


@pytest.mark.parametrize(
    ("predictions", "references", "pairs"),
    [
        (("x_A_1", "x_A_2"), ("1", "2", "A_1", "A_2"), {"A_1": "x_A_1", "A_2": "x_A_2"}),
        (("model_12", "model_1"), ("1", "12", "2"), {"1": "model_1", "12": "model_12"}),
        (("patientB1", "patientB2"), ("patientA1", "patientA2"), {}),
        (("p1_post", "p2_post"), ("p1_pre", "p2_pre"), {}),
        (("7", "8"), ("7_left", "7_right", "8_left"), {}),
        (("pred_1", "pred_2", "pred_3"), ("1", "2"), {}),
    ],
    ids=["the longest name", "whole numbers", "another patient", "another visit", "two for one", "one left over"],
)
def test_names_are_matched_only_where_that_is_sure(
    tmp_path: Path, predictions: tuple[str, ...], references: tuple[str, ...], pairs: dict[str, str]
) -> None:
    places = save(tmp_path / "predictions", *predictions), save(tmp_path / "references", *references)
    found = pairs_of(*places)
    assert {case: path.name.removesuffix(".nii.gz") for case, path, _ in found if path.exists()} == pairs
    if not pairs:
        with pytest.raises(InputError, match="no mask has the name of a reference"):
            evaluate_folders(*places)


def test_where_some_names_are_the_same_no_other_is_changed(tmp_path: Path) -> None:
    predictions = save(tmp_path / "predictions", "1", "pred_2")
    found = find(predictions, save(tmp_path / "references", "1", "2"))
    assert (set(found.predictions), found.how) == ({"1", "pred_2"}, "")


def test_names_that_are_no_text_or_hostile_are_spelled_out(tmp_path: Path) -> None:
    names = ("c\udcff", "d\n# injected")
    found = evaluate_folders(save(tmp_path / "predictions", *names), save(tmp_path / "references", *names))
    assert [case.case for case in found.cases] == ["c\\udcff", "d\\n# injected"]
    found.save(tmp_path / "evaluation.json")
    found.save_csv(tmp_path / "scores.csv")
    assert type(found).load(tmp_path / "evaluation.json") == found
