"""Flags: one hand-made case for every rule, on both sides of its threshold."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.fingerprint import CaseMeasures, ClassMeasures, Fingerprint, Intensities
from medseg.geometry import Geometry
from medseg.quality import NOTICE, Range, Ranges, Sample, flags, ranges_of
from medseg.stats import LabelStats

GRID = Geometry((10, 10, 10), np.diag([1.0, 2.0, 3.0, 1.0]))
ORGAN = LabelStats(label="organ", values=(1,), voxels=100, volume_ml=10.0, components=1)
RANGES = Ranges(
    cases=20,
    spacing_mm=(Range(low=1, high=1), Range(low=2, high=2), Range(low=2, high=4)),
    volumes_ml={"organ": Range(low=9, high=20)},
    components={"organ": 2},
    intensities=(Range(low=-100, high=200),),
)
SURE = {"organ": 0.9}


def changed(**fields: object) -> LabelStats:
    return ORGAN.model_copy(update=fields)


def test_a_usual_case_has_no_flags() -> None:
    assert flags([ORGAN], GRID, [("CT", 50.0)], SURE, RANGES) == ()
    assert flags([ORGAN], GRID, [("CT", 50.0)], SURE, None) == ()


@pytest.mark.parametrize("ranges", [RANGES, None])
def test_an_empty_label_is_empty_and_nothing_else(ranges: Ranges | None) -> None:
    assert flags([LabelStats(label="organ", values=(1,))], GRID, [], {}, ranges) == ("empty:organ",)


@pytest.mark.parametrize("ranges", [RANGES, None])
def test_the_border(ranges: Ranges | None) -> None:
    found = flags([changed(touches_border=("left", "superior"))], GRID, [], SURE, ranges)
    assert found == ("touches_border:organ:left+superior",)


@pytest.mark.parametrize(
    ("volume_ml", "found"),
    [(5.9, ("volume:organ:low",)), (6.1, ()), (29.9, ()), (30.1, ("volume:organ:high",))],
)
def test_volumes_by_half_outside_of_the_range(volume_ml: float, found: tuple[str, ...]) -> None:
    """The range is 9 to 20 ml: 6 and 30 are where flags begin."""
    assert flags([changed(volume_ml=volume_ml)], GRID, [], SURE, RANGES) == found
    assert flags([changed(volume_ml=volume_ml)], GRID, [], SURE, None) == ()


def test_a_label_that_no_training_case_has() -> None:
    ranges = RANGES.model_copy(update={"volumes_ml": {"organ": Range(low=0, high=0)}, "components": {"organ": 0}})
    assert flags([ORGAN], GRID, [], SURE, ranges) == ("volume:organ:high", "components:organ:1")


@pytest.mark.parametrize(("components", "found"), [(2, ()), (3, ("components:organ:3",))])
def test_more_pieces_than_any_training_case(components: int, found: tuple[str, ...]) -> None:
    assert flags([changed(components=components)], GRID, [], SURE, RANGES) == found
    assert flags([changed(components=components)], GRID, [], SURE, RANGES.model_copy(update={"components": {}})) == ()


@pytest.mark.parametrize(
    ("spacing", "found"),
    [
        ((1.09, 1.83, 4.39), ()),
        ((1.11, 2, 3), ("spacing:x:high",)),
        ((1, 1.8, 1.8), ("spacing:y:low", "spacing:z:low")),
        ((1, 2, 4.41), ("spacing:z:high",)),
    ],
)
def test_spacing_by_a_tenth_outside_of_the_range(spacing: tuple[float, ...], found: tuple[str, ...]) -> None:
    grid = Geometry((10, 10, 10), np.diag([*spacing, 1.0]))
    for orientation in ("RAS", "LPS", "SAR"):
        assert flags([ORGAN], grid.reoriented(grid.to(orientation)), [], SURE, RANGES) == found


@pytest.mark.parametrize(
    ("median", "found"), [(-101.0, ("intensity:CT:low",)), (-100.0, ()), (200.0, ()), (201.0, ("intensity:CT:high",))]
)
def test_intensities_outside_of_the_percentiles(median: float, found: tuple[str, ...]) -> None:
    assert flags([ORGAN], GRID, [("CT", median)], SURE, RANGES) == found


@pytest.mark.parametrize(("margin", "found"), [(0.8, ()), (0.79, ("margin:organ:0.79",))])
def test_low_margins(margin: float, found: tuple[str, ...]) -> None:
    assert flags([ORGAN], GRID, [], {"organ": margin}, None) == found


def test_flags_of_odd_names_can_be_taken_apart() -> None:
    (found,) = flags([LabelStats(label="a:b;100%", values=(1,))], GRID, [], {}, None)
    assert found == "empty:a%3Ab%3B100%25"


def test_flags_of_several_come_image_first_then_by_label() -> None:
    other = LabelStats(label="lesion", values=(2,))
    found = flags([changed(volume_ml=99.0), other], GRID, [("CT", 999.0)], {"organ": 0.5}, RANGES)
    assert found == ("intensity:CT:high", "volume:organ:high", "empty:lesion", "margin:organ:0.50")
    assert "heuristics" in NOTICE


def test_ranges_of_a_fingerprint() -> None:
    ones = Intensities(mean=1, median=1, std=1, minimum=0, maximum=9, percentile_00_5=0.5, percentile_99_5=8)
    sizes = [
        CaseMeasures(id=str(n), shape=(9, 9, 9), spacing_mm=mm, cropped_shape=(9, 9, 9), relative_size=1)
        for n, mm in enumerate([(1.0, 2.0, 3.0), (0.5, 2.5, 3.0)])
    ]
    classes = {
        "organ": ClassMeasures(
            cases=2, volume_ml_median=5, volume_ml_minimum=4, volume_ml_maximum=6, components_maximum=3
        ),
        "old": ClassMeasures(cases=1, volume_ml_median=1, volume_ml_minimum=1, volume_ml_maximum=1),
    }
    found = ranges_of(
        Fingerprint(
            dataset_digest="",
            cases=tuple(sizes),
            intensities=(ones,),
            classes=classes,
            empty_cases=0,
            mirror_agreement=(1, 1, 1),
        )
    )
    assert found == Ranges(
        cases=2,
        spacing_mm=(Range(low=0.5, high=1), Range(low=2, high=2.5), Range(low=3, high=3)),
        volumes_ml={"organ": Range(low=4, high=6), "old": Range(low=1, high=1)},
        components={"organ": 3},
        intensities=(Range(low=0.5, high=8),),
    )


# ---- samples of images -----------------------------------------------------------------------------------------------


def test_a_small_image_is_sampled_whole() -> None:
    image = np.arange(2 * 60, dtype=np.int16).reshape(2, 3, 4, 5)
    mask = np.zeros((3, 4, 5), np.uint8)
    assert Sample.of(image).medians(mask) == ()
    mask[0, 0, :3] = 1, 9, 4
    assert Sample.of(image).medians(mask) == (1.0, 61.0)


def test_a_large_image_is_sampled_evenly_and_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg.quality.SAMPLES", 100)
    image = np.broadcast_to(np.arange(40.0)[:, np.newaxis, np.newaxis], (40, 20, 2))[np.newaxis]
    sample = Sample.of(image)
    assert sample.values.base is None
    # the longest first: 40 20 2, 20 20 2, 14 20 2, 14 10 2, 10 10 2, 8 10 2, 8 7 2, 7 7 2
    assert (sample.steps, sample.values.shape) == ((6, 3, 1), (1, 7, 7, 2))
    mask = np.zeros((40, 20, 2), np.uint8)
    mask[10:31] = 1  # of the planes 0, 6, 12, ... 36: 12, 18, 24, 30
    assert sample.medians(mask) == (21.0,)
