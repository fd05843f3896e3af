"""Metrics: numbers worked out by hand, the empty cases by name, and agreement with surface-distance."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medseg.errors import GeometryMismatch, InputError
from medseg.geometry import Box, Geometry
from medseg.io import read_mask
from medseg.metrics import (
    IOU_THRESHOLDS,
    MEASURES,
    ClassScore,
    InstanceMeans,
    InstanceMeasures,
    LesionScore,
    Scoring,
    _overview,
    class_dice,
    joint_dice,
    score_failure,
    score_instances,
    score_pair,
)
from medseg.volume import Labels

ONE = Labels(values={"organ": 1})
Mask = NDArray[np.uint8]
Spacing = tuple[float, float, float]


def grid(shape: tuple[int, ...], spacing: Spacing = (1.0, 1.0, 1.0)) -> Geometry:
    return Geometry(shape, np.diag([*spacing, 1.0]))  # type: ignore[arg-type]


def boxes(shape: tuple[int, int, int], *pieces: tuple[int, tuple[slice, ...]]) -> Mask:
    mask = np.zeros(shape, dtype=np.uint8)
    for value, place in pieces:
        mask[place] = value
    return mask


def one(prediction: Mask, reference: Mask, spacing: Spacing = (1.0, 1.0, 1.0), tolerance_mm: float = 1.0) -> ClassScore:
    (score,) = score_pair(prediction, reference, grid(reference.shape, spacing), Scoring(ONE, tolerance_mm))
    return score


def ball(centre: tuple[int, int, int], radius: int) -> Mask:
    i, j, k = np.ogrid[:24, :20, :16]
    inside = (i - centre[0]) ** 2 + (j - centre[1]) ** 2 + (k - centre[2]) ** 2 <= radius**2
    return np.asarray(inside, dtype=np.uint8)


def noise(seed: int) -> Mask:
    return (np.random.RandomState(seed).rand(9, 8, 7) < 0.5).astype(np.uint8)


CUBE = boxes((7, 7, 7), (1, np.s_[2:5, 2:5, 2:5]))


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_equal_masks_are_perfect() -> None:
    score = one(CUBE, CUBE)
    assert (score.status, score.dice, score.nsd, score.hd95_mm) == ("scored", 1.0, 1.0, 0.0)
    assert score.reference_ml == score.prediction_ml == pytest.approx(0.027)


def test_cube_moved_by_one_voxel() -> None:
    score = one(np.roll(CUBE, 1, axis=0), CUBE, spacing=(2.0, 1.0, 1.0), tolerance_mm=2.0)
    assert score.dice == 2 * 18 / (27 + 27)
    assert score.nsd == 1.0
    assert score.hd95_mm == 2.0  # the cap that was left behind is 2 mm away, and more than 5 % of the surface
    assert score.reference_ml == pytest.approx(0.054)


def test_two_voxels_apart() -> None:
    # The surface of one voxel is eight equal elements on its corners. Two voxels further, four of them lie 2 mm from
    # the nearest corner of the other voxel, and four 1 mm.
    #
    #   i   0   1   2   3
    #       +---+   +---+
    #       | A |   | B |
    #       +---+   +---+
    reference = boxes((5, 3, 3), (1, np.s_[1, 1, 1]))
    prediction = boxes((5, 3, 3), (1, np.s_[3, 1, 1]))
    score = one(prediction, reference)
    assert (score.dice, score.nsd, score.hd95_mm) == (0.0, pytest.approx(0.5), 2.0)
    assert one(prediction, reference, tolerance_mm=0.9).nsd == 0.0
    assert one(prediction, reference, tolerance_mm=2.0).nsd == pytest.approx(1.0)


def test_picture_knows_no_thickness() -> None:
    reference = boxes((8, 8, 1), (1, np.s_[2:5, 2:5]))
    prediction = np.roll(reference, 2, axis=1)
    thin, thick = (one(prediction, reference, (1.0, 1.5, thickness)) for thickness in (0.1, 50.0))
    assert (thin.nsd, thin.hd95_mm) == (thick.nsd, thick.hd95_mm) == (thin.nsd, 3.0)


def test_structure_cut_by_the_image_border_has_a_surface_there() -> None:
    full = np.ones((4, 4, 4), dtype=np.uint8)
    inner = boxes((4, 4, 4), (1, np.s_[1:3, 1:3, 1:3]))
    score = one(inner, full, tolerance_mm=0.9)
    assert score.nsd == 0.0
    assert score.hd95_mm == pytest.approx(
        math.sqrt(2)
    )  # of the edges; the corners, sqrt(3) away, are 2 % of the surface


def test_tolerance_bears_a_spacing_kept_in_32_bits() -> None:
    spacing = float(np.float32(0.8))
    assert spacing > 0.8
    assert one(np.roll(CUBE, 1, axis=0), CUBE, (spacing, 1.0, 1.0), tolerance_mm=0.8).nsd == 1.0


def test_every_measure_of_a_cube_that_lost_a_slice() -> None:
    # 27 voxels of 2 mm^3, of which the prediction has 18: a face of the cube has moved inwards by 2 mm.
    prediction = boxes((7, 7, 7), (1, np.s_[3:5, 2:5, 2:5]))
    score = one(prediction, CUBE, spacing=(2.0, 1.0, 1.0))
    assert (score.dice, score.iou) == (2 * 18 / (18 + 27), 18 / 27)
    assert (score.sensitivity, score.precision) == (18 / 27, 1.0)
    assert score.hd_mm == score.hd95_mm == 2.0
    assert score.volume_difference_ml == pytest.approx(-9 * 0.002)
    assert score.volume_difference_percent == pytest.approx(-100 / 3)


def test_mean_surface_distance_of_two_voxels() -> None:
    # As in test_two_voxels_apart: on both sides half of eight equal elements is 1 mm away, half 2 mm.
    score = one(boxes((5, 3, 3), (1, np.s_[3, 1, 1])), boxes((5, 3, 3), (1, np.s_[1, 1, 1])))
    assert (score.assd_mm, score.hd_mm) == (pytest.approx(1.5), 2.0)


@pytest.mark.parametrize("order", ["C", "F"])
@given(st.integers(0, 10_000))
def test_the_overview_is_that_of_plain_counting(order: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 6, 3))
    first, second = (np.asarray(rng.integers(0, 3, shape), dtype=np.uint8, order=order) for _ in range(2))  # type: ignore[call-overload]
    joint, found = _overview(first, second, 4)
    for a, b in itertools.product(range(4), repeat=2):
        assert joint[a, b] == ((first == a) & (second == b)).sum()
    for index in range(1, 4):
        there = (first == index) | (second == index)
        assert (found[index] is None) == (not there.any())
        if found[index] is not None:
            assert found[index] == Box.around(there)


def test_blocks_do_not_change_the_overview(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 3, (2, 9, 8, 7)).astype(np.uint8)
    joint, found = _overview(first, second, 3)
    monkeypatch.setattr("medseg.metrics._BLOCK", 20)
    again, boxes_again = _overview(first, second, 3)
    assert (joint == again).all()
    assert found == boxes_again


# ---- lesions ---------------------------------------------------------------------------------------------------------

LESIONS = Scoring(ONE, 1.0, lesions=("organ",))


def counts(prediction: Mask, reference: Mask, iou: float = 0.1) -> tuple[int, int, int]:
    (score,) = score_pair(prediction, reference, grid(reference.shape), replace(LESIONS, lesion_iou=iou))
    assert score.lesions is not None
    return score.lesions.n_reference, score.lesions.n_predicted, score.lesions.n_found


def test_lesions_are_found_missed_and_made_up() -> None:
    reference = boxes((20, 5, 5), (1, np.s_[0:2, 0:2, 0:2]), (1, np.s_[6:8, 0:2, 0:2]), (1, np.s_[12, 0, 0]))
    prediction = boxes((20, 5, 5), (1, np.s_[0:2, 0:2, 0:2]), (1, np.s_[12:14, 0:2, 0:2]), (1, np.s_[17, 3, 3]))
    # The first is found; the second missed; the third, of one voxel, is one of eight: 0.125.
    assert counts(prediction, reference) == (3, 3, 2)
    assert counts(prediction, reference, iou=0.125) == (3, 3, 1)  # one of exactly the threshold is none
    assert counts(prediction, reference, iou=0.0) == (3, 3, 2)


def test_one_blob_over_two_lesions_finds_one() -> None:
    reference = boxes((20, 5, 5), (1, np.s_[0:4, 0:2, 0:2]), (1, np.s_[6:10, 0:2, 0:2]))
    prediction = boxes((20, 5, 5), (1, np.s_[0:10, 0:2, 0:2]))
    assert counts(prediction, reference) == (2, 1, 1)
    assert counts(reference, prediction) == (1, 2, 1)


def test_as_many_lesions_are_matched_as_can_be() -> None:
    # The first prediction overlaps both lesions, the second one only the first lesion: each gets one.
    reference = boxes((20, 1, 2), (1, np.s_[0:6, 0, 0]), (1, np.s_[8:12, 0, 0]))
    prediction = boxes((20, 1, 2), (1, np.s_[3:12, 0, 0]), (1, np.s_[0:2, 0, 0]))
    assert counts(prediction, reference) == (2, 2, 2)


def test_pieces_touch_at_corners() -> None:
    assert counts(CUBE, boxes((7, 7, 7), (1, np.s_[2, 2, 2]), (1, np.s_[3, 3, 3])), iou=0.05) == (1, 1, 1)


def test_lesions_of_empty_and_failed_masks() -> None:
    assert counts(EMPTY, EMPTY) == (0, 0, 0)
    assert counts(EMPTY, CUBE) == (1, 0, 0)
    assert counts(CUBE, EMPTY) == (0, 1, 0)
    (failed,) = score_failure(CUBE, grid(CUBE.shape), LESIONS)
    assert failed.lesions == LesionScore(n_reference=1, n_predicted=0, n_found=0)


def test_lesions_are_counted_where_they_are_asked_for() -> None:
    assert one(CUBE, CUBE).lesions is None


# ---- empty masks -----------------------------------------------------------------------------------------------------

EMPTY = np.zeros_like(CUBE)
DIAGONAL = math.hypot(14.0, 7.0, 7.0)
WORST = (0.0, 0.0, pytest.approx(DIAGONAL))


def measures(score: ClassScore) -> tuple[float | None, float | None, float | None]:
    return score.dice, score.nsd, score.hd95_mm


def test_both_empty_is_a_true_negative_without_numbers() -> None:
    score = one(EMPTY, EMPTY)
    assert {getattr(score, measure) for measure in MEASURES} == {None}
    assert (score.status, *measures(score)) == ("true_negative", None, None, None)
    assert score.reference_ml == score.prediction_ml == 0.0


def test_empty_prediction_is_missed() -> None:
    score = one(EMPTY, CUBE, (2.0, 1.0, 1.0))
    assert score.status == "missed"
    assert (score.iou, score.sensitivity, score.precision) == (0.0, 0.0, 0.0)
    assert score.hd_mm == score.assd_mm == pytest.approx(DIAGONAL)
    assert (score.volume_difference_ml, score.volume_difference_percent) == (pytest.approx(-0.054), -100.0)
    assert measures(score) == WORST


def test_empty_reference_is_a_false_positive() -> None:
    score = one(CUBE, EMPTY, (2.0, 1.0, 1.0))
    assert score.status == "false_positive"
    assert (score.iou, score.sensitivity, score.precision) == (0.0, 0.0, 0.0)
    assert (score.volume_difference_ml, score.volume_difference_percent) == (pytest.approx(0.054), None)
    assert measures(score) == WORST


def test_failure_has_the_worst_scores_and_the_reference_volume() -> None:
    labels = Labels(values={"organ": 1, "other": 2}, regions={"all": (1, 2)})
    organ, other, both = score_failure(CUBE, grid(CUBE.shape, (2.0, 1.0, 1.0)), Scoring(labels, 1.0))
    for score in (organ, other, both):
        assert score.status == "failed"
        assert measures(score) == WORST
        assert score.prediction_ml is None
    assert (organ.reference_ml, other.reference_ml, both.reference_ml) == (0.054, 0.0, 0.054)
    assert [score.volume_difference_percent for score in (organ, other, both)] == [-100.0, None, -100.0]


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.int64])
def test_any_integers_and_regions(kind: type) -> None:
    labels = Labels(values={"core": 300, "rim": 7}, regions={"whole": (7, 300)})
    reference = boxes((8, 6, 6), (1, np.s_[2:6, 2:4, 2:4]), (2, np.s_[4:6, 2:4, 2:4]))
    prediction = boxes((8, 6, 6), (2, np.s_[2:6, 2:4, 2:4]), (1, np.s_[4:6, 2:4, 2:4]))  # the two are mixed up
    table = np.array([0, 7, 300], dtype=kind)
    rim, core, whole = score_pair(table[prediction], table[reference], grid(reference.shape), Scoring(labels, 1.0))
    assert [score.name for score in (rim, core, whole)] == ["rim", "core", "whole"]
    assert (rim.dice, core.dice) == (0.0, 0.0)
    assert measures(whole) == (1.0, 1.0, 0.0)


def test_a_region_with_the_name_of_a_class_is_neither_lost_nor_taken_for_it() -> None:
    labels = Labels(values={"a": 1, "b": 2}, regions={"a": (1, 2), "b": (2,)})
    assert Scoring(labels, 1.0).structures == {"a": (1,), "b": (2,), "a (region)": (1, 2)}


@pytest.mark.parametrize("values", [(-5, 4), (3, 1_000_000)])
def test_far_integers_go_the_slow_way(values: tuple[int, int]) -> None:
    table = np.array([0, *values], dtype=np.int32)
    mask = table[boxes((4, 4, 4), (1, np.s_[1:3, 1:3, 1:3]), (2, np.s_[3, 3, 3]))]
    scores = score_pair(mask, mask, grid(mask.shape), Scoring(Labels(values={"a": values[0], "b": values[1]}), 1.0))
    assert [score.dice for score in scores] == [1.0, 1.0]


def test_ignored_voxels_are_left_out() -> None:
    labels = Labels(values={"organ": 1}, ignore=9)
    reference = boxes((7, 7, 7), (1, np.s_[2:5, 2:5, 2:5]), (9, np.s_[5:, :, :]))
    prediction = boxes((7, 7, 7), (1, np.s_[2:7, 2:5, 2:5]))  # runs on where no one labelled
    (score,) = score_pair(prediction, reference, grid(reference.shape), Scoring(labels, 1.0))
    assert measures(score) == (1.0, 1.0, 0.0)
    assert score.prediction_ml == score.reference_ml
    (failed,) = score_failure(reference, grid(reference.shape), Scoring(labels, 1.0))
    assert failed.reference_ml == score.reference_ml


def test_a_prediction_cannot_ignore_its_own_errors() -> None:
    labels = Labels(values={"organ": 1}, ignore=9)
    cheat = np.where(CUBE == 1, 9, 0).astype(np.uint8)
    cheat[2:4, 2:5, 2:5] = 1  # what it is sure of
    honest = np.where(cheat == 9, 0, cheat)
    scores = [score_pair(p, CUBE, grid(CUBE.shape), Scoring(labels, 1.0))[0] for p in (cheat, honest)]
    assert scores[0] == scores[1]
    assert scores[0].dice == 2 * 18 / (27 + 18)


def test_a_prediction_that_holds_the_whole_reference_is_not_perfect() -> None:
    score = one(boxes((7, 7, 7), (1, np.s_[1:6, 2:5, 2:5])), CUBE, tolerance_mm=0.5)
    assert score.sensitivity == 1.0
    assert score.hd_mm == 1.0
    assert score.nsd < 1.0  # type: ignore[operator]


def test_a_missed_picture_has_no_thickness() -> None:
    square = boxes((8, 8, 1), (1, np.s_[2:5, 2:5]))
    for thickness in (1.0, 50.0):
        assert one(np.zeros_like(square), square, (1.0, 1.0, thickness)).hd95_mm == pytest.approx(math.sqrt(128))


def test_thousands_of_specks_are_counted() -> None:
    rng = np.random.default_rng(0)
    first, second = ((rng.random((96, 96, 96)) < 0.02).astype(np.uint8) for _ in range(2))
    n_reference, n_predicted, n_found = counts(first, second)
    assert min(n_reference, n_predicted) > 10_000
    assert 0 < n_found < n_reference


def test_value_without_a_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"pred\.nii: label values \[4\]"):
        score_pair(CUBE * 4, CUBE, grid(CUBE.shape), Scoring(ONE, 1.0), "pred.nii")
    with pytest.raises(InputError, match=r"reference of pred\.nii: label values \[255\]"):
        score_pair(CUBE, CUBE * 255, grid(CUBE.shape), Scoring(ONE, 1.0), "pred.nii")


def test_other_shape_is_refused() -> None:
    with pytest.raises(GeometryMismatch, match=r"\(7, 7, 6\)"):
        score_pair(CUBE[:, :, :6], CUBE, grid(CUBE.shape), Scoring(ONE, 1.0))


# ---- surface-distance ------------------------------------------------------------------------------------------------

FINE, COARSE = (1.0, 1.0, 1.0), (0.7, 1.3, 3.0)
BALLS = ball((12, 10, 8), 6), ball((13, 9, 8), 7)
NOISE = noise(1), noise(2)  # meets most of the 256 neighbour codes, and every kind
CORNER = ball((0, 0, 0), 9), ball((2, 0, 0), 9)


@pytest.mark.parametrize(
    ("pair", "spacing", "dice", "nsd_1", "nsd_2", "hd95_mm", "hd_mm", "assd_mm"),
    [
        (
            BALLS,
            FINE,
            0.7713310580204779,
            0.7225237556544674,
            0.9736461894969893,
            2.0,
            2.449489742783178,
            0.7773021939793157,
        ),
        (
            BALLS,
            COARSE,
            0.7713310580204779,
            0.6078147583249853,
            0.9152791254020933,
            2.6925824035672523,
            3.556683848755748,
            0.8154574119810635,
        ),
        (NOISE, FINE, 0.4777327935222672, 0.9995785007328651, 1.0, 0.0, 1.4142135623730951, 0.035702668002140614),
        (NOISE, COARSE, 0.4777327935222672, 0.9934714519401482, 1.0, 0.0, 1.47648230602334, 0.028011001363384535),
        (CORNER, FINE, 0.8669064748201439, 0.9260909441098608, 1.0, 1.4142135623730951, 2.0, 0.2985118551484952),
    ],
    ids=["balls", "balls, anisotropic", "noise", "noise, anisotropic", "at the border"],
)
def test_equals_surface_distance(
    pair: tuple[Mask, Mask],
    spacing: Spacing,
    dice: float,
    nsd_1: float,
    nsd_2: float,
    hd95_mm: float,
    hd_mm: float,
    assd_mm: float,
) -> None:
    # Figures: google-deepmind/surface-distance 0.1 on the same masks; of its two mean distances, which it gives apart,
    # the mean weighted by the areas of both surfaces.
    near, far = (one(pair[1], pair[0], spacing, tolerance) for tolerance in (1.0, 2.0))
    assert (near.dice, near.nsd, far.nsd, near.hd95_mm) == pytest.approx((dice, nsd_1, nsd_2, hd95_mm), abs=1e-9)
    assert (near.hd_mm, near.assd_mm) == pytest.approx((hd_mm, assd_mm), abs=1e-9)


@pytest.mark.parametrize(
    ("pair", "place", "dice", "nsd_1", "nsd_2", "hd95_mm"),
    [
        (BALLS, np.s_[:, :, 8:9], 0.8244274809160306, 0.6254199588210118, 0.9521963711234523, 2.4698178070456938),
        (NOISE, np.s_[:, :, :1], 0.5974025974025974, 0.9890157711465319, 1.0, 0.7),
    ],
    ids=["circles", "noise"],
)
def test_equals_surface_distance_in_pictures(
    pair: tuple[Mask, Mask], place: tuple[slice, ...], dice: float, nsd_1: float, nsd_2: float, hd95_mm: float
) -> None:
    # Figures: google-deepmind/surface-distance 0.1 on the same two-dimensional masks.
    near, far = (one(pair[1][place], pair[0][place], COARSE, tolerance) for tolerance in (1.0, 2.0))
    assert (near.dice, near.nsd, far.nsd, near.hd95_mm) == pytest.approx((dice, nsd_1, nsd_2, hd95_mm), abs=1e-9)


def real(name: str) -> Path:
    folder = os.environ.get("MEDSEG_TEST_DATA")
    if not folder:
        pytest.skip("MEDSEG_TEST_DATA names no folder of real data")
    return Path(folder) / name


SPINE = {  # value: Dice, NSD at 1 mm, NSD at 3 mm, HD95 in mm
    26: (0.9698239455931553, 0.9727477705994088, 0.9943440901356356, 0.5859400033950806),
    41: (0.8836457411185097, 0.9694709503161293, 0.9984533461059718, 0.5859400033950806),
    42: (0.9115941298098744, 0.9569454896796343, 0.9906740479369172, 0.8286442995382602),
    43: (0.8663967611336032, 0.9507680914089868, 0.9680924540973351, 1.1718800067901611),
    44: (0.8649356316823041, 0.9479507151220035, 0.986324326046723, 1.7578200101852417),
    45: (0.9049142857142857, 0.9779922599826637, 0.999821798887583, 0.5859400033950806),
    46: (0.8938299055030573, 0.9756656047919894, 1.0, 0.5859400033950806),
    47: (0.9027481999797181, 0.9922767523669427, 0.9991538676354259, 0.5859400033950806),
    48: (0.8782828282828283, 0.9846582761026361, 1.0, 0.5859400033950806),
    49: (0.9714093870291493, 0.9800557588855804, 0.9991523384966772, 0.5859400033950806),
    60: (0.02015634084889205, 0.4281721532746307, 0.5053660109582842, 61.16831976793115),
    61: (0.02706817091735658, 0.43285575017595956, 0.4949669342100962, 60.419248701935324),
    62: (0.6793787581594264, 0.988035535685519, 0.9998313391051488, 0.5859400033950806),
    100: (0.9423566613429801, 0.9776846807345287, 0.9993205391391717, 0.5859400033950806),
}


def test_equals_surface_distance_on_a_real_spine() -> None:
    # Figures: google-deepmind/surface-distance 0.1 on panoptica's example pair, label by label.
    prediction, reference = (read_mask(real(f"spine_pair/{name}.nii.gz")) for name in ("pred", "ref"))
    labels = Labels(values={str(value): value for value in SPINE})
    near, far = (
        score_pair(prediction.array, reference.array, reference.geometry, Scoring(labels, tolerance))
        for tolerance in (1.0, 3.0)
    )
    for a, b in zip(near, far, strict=True):
        assert (a.dice, a.nsd, b.nsd, a.hd95_mm) == pytest.approx(SPINE[int(a.name)], abs=1e-6)


@pytest.mark.parametrize(
    ("shift", "anterior", "posterior"),
    [
        ((1, 0, 0), (0.8935483870967742, 1.0, 1.0), (0.8718801996672213, 1.0, 1.0)),
        ((0, 2, 1), (0.6096774193548387, 0.5899459676504019, 2.0), (0.5646145313366612, 0.6125619085334727, 2.0)),
        (
            (3, -1, 2),
            (0.6193548387096774, 0.6222706902112843, 3.0),
            (0.5867997781475319, 0.6328485252067889, 2.8284271247461903),
        ),
    ],
)
def test_equals_surface_distance_on_a_real_hippocampus(
    shift: tuple[int, int, int], anterior: tuple[float, ...], posterior: tuple[float, ...]
) -> None:
    # Figures: google-deepmind/surface-distance 0.1 on the Decathlon's label hippocampus_003 moved by some voxels.
    mask = read_mask(real("Task04_Hippocampus/labelsTr/hippocampus_003.nii.gz"))
    labels = Labels(values={"Anterior": 1, "Posterior": 2})
    moved = np.roll(mask.array, shift, axis=(0, 1, 2))
    scores = score_pair(moved, mask.array, mask.geometry, Scoring(labels, 1.0))
    assert measures(scores[0]) == pytest.approx(anterior, abs=1e-9)
    assert measures(scores[1]) == pytest.approx(posterior, abs=1e-9)


# ---- other programs --------------------------------------------------------------------------------------------------


of_monai = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy")  # what its own functions call


def tensors(*found: NDArray[Any]) -> list[Any]:
    import torch

    return [torch.from_numpy(mask.astype(bool))[None, None] for mask in found]


@of_monai
@pytest.mark.parametrize("spacing", [FINE, COARSE], ids=["isotropic", "anisotropic"])
@pytest.mark.parametrize("pair", [BALLS, NOISE, CORNER], ids=["balls", "noise", "at the border"])
def test_equals_monai_where_definitions_agree(pair: tuple[Mask, Mask], spacing: Spacing) -> None:
    from monai.metrics import compute_dice, compute_iou, compute_surface_dice

    score = one(pair[1], pair[0], spacing)
    a, b = tensors(pair[1], pair[0])
    nsd = compute_surface_dice(a, b, [1.0], include_background=True, spacing=spacing, use_subvoxels=True)
    assert score.dice == pytest.approx(compute_dice(a, b).item(), abs=1e-6)
    assert score.iou == pytest.approx(compute_iou(a, b).item(), abs=1e-6)
    assert score.nsd == pytest.approx(nsd.item(), abs=1e-6)


@of_monai
@pytest.mark.parametrize("plane", [np.s_[:, :, 8:9]], ids=["circles"])
def test_equals_monai_in_pictures(plane: tuple[slice, ...]) -> None:
    from monai.metrics import compute_dice, compute_surface_dice

    prediction, reference = BALLS[1][plane], BALLS[0][plane]
    score = one(prediction, reference, COARSE)
    a, b = tensors(prediction[..., 0], reference[..., 0])
    nsd = compute_surface_dice(a, b, [1.0], include_background=True, spacing=COARSE[:2], use_subvoxels=True)
    assert score.dice == pytest.approx(compute_dice(a, b).item(), abs=1e-6)
    assert score.nsd == pytest.approx(nsd.item(), abs=1e-6)


@pytest.mark.parametrize("spacing", [FINE, COARSE], ids=["isotropic", "anisotropic"])
@pytest.mark.parametrize("pair", [BALLS, NOISE, CORNER], ids=["balls", "noise", "at the border"])
def test_equals_simpleitk_where_definitions_agree(pair: tuple[Mask, Mask], spacing: Spacing) -> None:
    sitk = pytest.importorskip("SimpleITK")
    score = one(pair[1], pair[0], spacing)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    hausdorff = sitk.HausdorffDistanceImageFilter()
    images = [sitk.GetImageFromArray(mask.T) for mask in (pair[1], pair[0])]  # the reference is ITK's target
    for image in images:
        image.SetSpacing(spacing)
    overlap.Execute(*images)
    assert score.dice == pytest.approx(overlap.GetDiceCoefficient(1), abs=1e-6)
    assert score.iou == pytest.approx(overlap.GetJaccardCoefficient(1), abs=1e-6)
    assert score.sensitivity == pytest.approx(1.0 - overlap.GetFalseNegativeError(1), abs=1e-6)
    if spacing == FINE:  # see below for the other
        hausdorff.Execute(*images)
        assert score.hd_mm == pytest.approx(hausdorff.GetHausdorffDistance(), abs=1e-6)


@of_monai
def test_monai_counts_voxels_where_nsd_weighs_areas_unless_told() -> None:
    from monai.metrics import compute_surface_dice

    mask = read_mask(real("spleen_ct/sub-spleen2_ct_seg-manual.nii.gz"))
    reference = (mask.array > 0).astype(np.uint8)
    prediction = np.roll(reference, 1, axis=2)  # one slice of 5 mm
    (ours,) = score_pair(prediction, reference, mask.geometry, Scoring(ONE, 3.0))
    common = {"include_background": True, "spacing": list(mask.geometry.spacing)}
    a, b = tensors(prediction, reference)
    assert compute_surface_dice(a, b, [3.0], use_subvoxels=True, **common).item() == pytest.approx(ours.nsd, abs=1e-6)
    assert ours.nsd == pytest.approx(0.76846, abs=1e-5)  # as surface-distance
    assert compute_surface_dice(a, b, [3.0], **common).item() == pytest.approx(0.6226, abs=1e-4)


@of_monai
def test_monai_hd95_is_of_edge_voxels_that_all_count_the_same() -> None:
    from monai.metrics import compute_hausdorff_distance

    # A plate of 20 x 20 x 2 voxels with a bump of one voxel on it, that the prediction has not: less than 5 % of edge
    # voxels and area.
    reference = boxes((24, 24, 6), (1, np.s_[2:22, 2:22, 1:3]), (1, np.s_[10, 10, 3]))
    prediction = boxes((24, 24, 6), (1, np.s_[2:22, 2:22, 1:3]))
    score = one(prediction, reference)
    a, b = tensors(prediction, reference)
    assert score.hd95_mm == compute_hausdorff_distance(a, b, percentile=95, include_background=True).item() == 0.0
    assert score.hd_mm == compute_hausdorff_distance(a, b, include_background=True).item() == 1.0
    # On noise, where elements differ much in area, so do the percentiles.
    (x, y), (a, b) = NOISE, tensors(NOISE[1], NOISE[0])
    assert one(y, x, COARSE).hd95_mm == 0.0
    edges = compute_hausdorff_distance(a, b, percentile=95, include_background=True, spacing=COARSE)
    assert edges.item() == pytest.approx(1.4)


@of_monai
def test_monai_drops_a_total_miss_from_the_mean_of_hd95() -> None:
    from monai.metrics import HausdorffDistanceMetric

    metric = HausdorffDistanceMetric(include_background=True, percentile=95)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of the empty mask
        for prediction in (CUBE, EMPTY):
            metric(*tensors(prediction, CUBE))
    assert metric.aggregate().item() == 0.0  # of a perfect case and one that was missed
    assert np.mean([one(prediction, CUBE).hd95_mm for prediction in (CUBE, EMPTY)]) == pytest.approx(
        math.sqrt(3 * 49) / 2
    )


def test_monai_drops_a_false_positive_on_an_empty_reference_from_the_mean_dice() -> None:
    from monai.metrics import DiceMetric

    metric = DiceMetric(include_background=True)
    for prediction, reference in ((CUBE, CUBE), (CUBE, EMPTY)):
        metric(*tensors(prediction, reference))
    assert metric.aggregate().item() == 1.0
    assert np.mean([one(CUBE, reference).dice for reference in (CUBE, EMPTY)]) == 0.5


def test_simpleitk_gives_infinity_for_two_empty_masks() -> None:
    sitk = pytest.importorskip("SimpleITK")
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*(sitk.GetImageFromArray(EMPTY) for _ in range(2)))
    assert not math.isfinite(overlap.GetDiceCoefficient())
    assert one(EMPTY, EMPTY).status == "true_negative"


def test_simpleitk_means_something_else_by_average_distance_and_false_positive_error() -> None:
    # ITK averages over all voxels of a mask, most of which are inside the other and count as 0; and its false positive
    # error is relative to the background, however large the image is.
    sitk = pytest.importorskip("SimpleITK")
    images = [sitk.GetImageFromArray(mask.T) for mask in (BALLS[1], BALLS[0])]
    hausdorff, overlap = sitk.HausdorffDistanceImageFilter(), sitk.LabelOverlapMeasuresImageFilter()
    hausdorff.Execute(*images)
    overlap.Execute(*images)
    score = one(BALLS[1], BALLS[0])
    assert score.assd_mm == pytest.approx(0.7773, abs=1e-4)
    assert hausdorff.GetAverageHausdorffDistance() == pytest.approx(0.2572, abs=1e-4)
    wrong = int(((BALLS[1] == 1) & (BALLS[0] == 0)).sum())
    assert 1.0 - score.precision == pytest.approx(wrong / BALLS[1].sum())  # type: ignore[operator]
    assert overlap.GetFalsePositiveError(1) == pytest.approx(wrong / (BALLS[0] == 0).sum())


# ---- properties ------------------------------------------------------------------------------------------------------

masks = st.binary(min_size=60, max_size=60).map(lambda b: (np.frombuffer(b, np.uint8) % 2).reshape(3, 4, 5))


@settings(deadline=None, max_examples=50)
@given(masks, masks)
def test_exchanging_the_two_changes_nothing(a: Mask, b: Mask) -> None:
    assert measures(one(a, b, COARSE)) == pytest.approx(measures(one(b, a, COARSE)))


@settings(deadline=None, max_examples=25)
@given(masks, masks, st.permutations(range(3)), st.tuples(*[st.booleans()] * 3))
def test_turning_the_grid_changes_nothing(a: Mask, b: Mask, axes: list[int], flips: tuple[bool, ...]) -> None:
    def turned(mask: Mask) -> Mask:
        return np.flip(mask.transpose(axes), [axis for axis in range(3) if flips[axis]])

    spacing = tuple(COARSE[axis] for axis in axes)
    other = one(turned(a), turned(b), spacing)  # type: ignore[arg-type]
    assert measures(other) == pytest.approx(measures(one(a, b, COARSE)))


@given(st.integers(0, 1000), st.booleans())
def test_dice_alone_is_that_of_the_scores(seed: int, ignoring: bool) -> None:
    labels = Labels(values={"a": 1, "b": 2, "absent": 9}, ignore=4 if ignoring else None)
    rng = np.random.default_rng(seed)
    prediction, reference = rng.choice([0, 1, 2, 4] if ignoring else [0, 1, 2], (2, 5, 4, 3)).astype(np.uint8)
    expected = tuple(score.dice for score in score_pair(prediction, reference, grid((5, 4, 3)), Scoring(labels, 1.0)))
    assert class_dice(prediction, reference, labels) == expected
    assert expected[2] is None


def test_dice_alone_by_hand_and_of_two_shapes() -> None:
    half = boxes((7, 7, 7), (1, np.s_[2:5, 2:5, 2:4]))
    assert class_dice(half, CUBE, ONE) == (2 * 18 / (27 + 18),)
    with pytest.raises(GeometryMismatch, match="has shape"):
        class_dice(CUBE[1:], CUBE, ONE)


def test_dice_of_a_joint_histogram_by_hand() -> None:
    # index 1: 3 in both, 4 in the first mask, 5 in the second; 2: in neither; 3 is known to the first mask alone
    joint = np.array([[9, 1, 0], [1, 3, 0], [0, 0, 0], [2, 1, 0]])
    assert joint_dice(joint) == (2 * 3 / (4 + 5), None)


# ---- single objects --------------------------------------------------------------------------------------------------


def row(*ids: int) -> NDArray[np.int64]:
    return np.array(ids).reshape(-1, 1, 1)


def test_objects_of_a_row_by_hand() -> None:
    # reference   1 1 1 1 . 2 2 2 . .     1 and 5 share 3 of 4 voxels: IoU 3/4, a match up to 0.7
    # prediction  5 5 5 . . . 6 6 6 .     2 and 6 share 2 of 4 voxels: IoU 1/2, which is not more than 0.5
    score = score_instances(row(5, 5, 5, 0, 0, 0, 6, 6, 6, 0), row(1, 1, 1, 1, 0, 2, 2, 2, 0, 0))
    assert (score.n_reference, score.n_predicted) == (2, 2)
    assert score.matches == (1, 1, 1, 1, 1, 0, 0, 0, 0, 0)  # 3/4 is more than 0.7 and not more than 0.75
    assert score.dice == pytest.approx(2 * 5 / (7 + 6))
    assert score.f1 == pytest.approx(2 * 1 / (2 + 2))
    assert score.average_precision == pytest.approx(5 * (1 / 3) / 10)  # 1 TP, 1 FP, 1 FN at five thresholds of ten
    assert score.segmentation_quality == pytest.approx(3 / 4)
    assert score.panoptic_quality == pytest.approx(3 / 4 * 1 / 2)


def test_equal_objects_are_perfect_and_a_merged_pair_is_one_error_of_each_kind() -> None:
    # Two touching cells of 3 and 1 voxels: as one object of 4 it matches the larger (IoU 3/4), and misses the smaller.
    reference = row(1, 1, 1, 2, 0)
    assert score_instances(reference * 7, reference).model_dump() == {
        "dice": 1.0,
        "f1": 1.0,
        "average_precision": 1.0,
        "segmentation_quality": 1.0,
        "panoptic_quality": 1.0,
        "n_reference": 2,
        "n_predicted": 2,
        "matches": (2,) * 10,
    }
    merged = score_instances(row(1, 1, 1, 1, 0), reference)
    assert (merged.dice, merged.f1, merged.matches[0]) == (1.0, pytest.approx(2 / 3), 1)
    assert merged.average_precision == pytest.approx(5 * (1 / 2) / 10)  # 1 TP, 0 FP, 1 FN


def test_a_match_needs_more_than_the_threshold_to_the_last_voxel() -> None:
    # IoU 19/20, which floating point makes 0.95 or more or less, is a match at 0.9 and none at 0.95.
    reference, prediction = np.ones((20, 1, 1), int), np.ones((20, 1, 1), int)
    prediction[0] = 0
    assert score_instances(prediction, reference).matches == (1,) * 9 + (0,)


def test_empty_images_of_objects() -> None:
    nothing, something = row(0, 0), row(0, 4)
    both = score_instances(nothing, nothing)
    assert (both.n_reference, both.n_predicted, both.matches) == (0, 0, (0,) * 10)
    assert {getattr(both, name) for name in InstanceMeasures.model_fields} == {None}
    for score in (score_instances(nothing, something), score_instances(something, nothing)):
        assert (score.dice, score.f1, score.average_precision) == (0.0, 0.0, 0.0)
        assert (score.segmentation_quality, score.panoptic_quality) == (0.0, 0.0)


def test_means_leave_out_what_is_empty_in_both_and_count_it() -> None:
    nothing, something = row(0, 0), row(0, 4)
    pairs = [(nothing, nothing), (nothing, something), (something, something)]
    means = InstanceMeans.of(score_instances(*pair) for pair in pairs)
    assert (means.n, means.n_empty, means.dice, means.f1, means.panoptic_quality) == (2, 1, 0.5, 0.5, 0.5)
    alone = InstanceMeans.of([score_instances(nothing, nothing)])
    assert alone == InstanceMeans(n=0, n_empty=1)


def test_objects_of_two_shapes_are_refused() -> None:
    with pytest.raises(GeometryMismatch, match="has shape"):
        score_instances(row(1, 2), row(1, 2, 3))


ids = st.lists(st.integers(0, 4), min_size=12, max_size=12).map(lambda values: row(*values))


@given(ids, ids, st.permutations([-7, 1, 3, 999]), st.permutations([2, 5, 70000, 6]))
def test_other_numbers_of_the_objects_change_nothing(
    prediction: NDArray[np.int64], reference: NDArray[np.int64], first: list[int], second: list[int]
) -> None:
    renamed = score_instances(np.array([0, *first])[prediction], np.array([0, *second])[reference])
    score = score_instances(prediction, reference)
    assert renamed.matches == score.matches
    for name in InstanceMeasures.model_fields:  # up to the order of a sum
        assert getattr(renamed, name) == (None if score.dice is None else pytest.approx(getattr(score, name)))


@given(ids, ids)
def test_objects_scored_one_by_one_give_the_same(prediction: NDArray[np.int64], reference: NDArray[np.int64]) -> None:
    score = score_instances(prediction, reference)
    pairs = itertools.product(set(reference.flat) - {0}, set(prediction.flat) - {0})
    ious = [
        ((reference == r) & (prediction == p)).sum() / ((reference == r) | (prediction == p)).sum() for r, p in pairs
    ]
    assert score.matches == tuple(sum(iou > threshold + 1e-9 for iou in ious) for threshold in IOU_THRESHOLDS)
    assert score.matches[0] <= min(score.n_reference, score.n_predicted)


def test_one_square_split_in_a_volume() -> None:
    reference, prediction = np.zeros((4, 4, 2), int), np.zeros((4, 4, 2), int)
    reference[1:, 1:, :] = 1  # 18 voxels
    prediction[1:3, 1:, :], prediction[3:, 1:, :] = 1, 2  # 12 and 6 of them
    score = score_instances(prediction, reference)
    assert (score.n_predicted, score.matches) == (2, (1,) * 4 + (0,) * 6)  # 2/3 is more than 0.65
    assert score.f1 == pytest.approx(2 / 3)
    assert score.segmentation_quality == pytest.approx(2 / 3)
