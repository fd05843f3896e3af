"""medseg.io.dicom.parts: volumes of one series told apart by what their headers say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_series
from pydicom.dataset import Dataset

from medseg.io import dicom

Change = Callable[[Dataset, int], None]


def parts(folder: Path, offsets: list[float], change: Change, modality: str = "MR") -> list[dicom.Series]:
    """The series of slices at some offsets; the voxels of slice k are k."""
    array = np.broadcast_to(np.arange(len(offsets), dtype=np.int16), (3, 4, len(offsets)))
    write_series(folder, array, offsets=offsets, modality=modality, change=change)
    return list(dicom.scan(folder).series)


def shown(series: list[dicom.Series]) -> dict[str, list[int]]:
    """For each part the slices that it holds."""
    return {one.part: dicom.read_series(one).array[0, 0, 0].tolist() for one in series}


def test_echoes(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.EchoTime = (4.92, 7.38)[k // 3]

    found = parts(tmp_path, [0, 1, 2, 2, 1, 0], change)
    assert shown(found) == {"EchoTime=4.92": [0, 1, 2], "EchoTime=7.38": [5, 4, 3]}
    assert len({series.name for series in found}) == 2


def test_kinds_of_image_by_the_words_that_differ(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", ("WATER", "FAT")[k % 2]]

    assert shown(parts(tmp_path, [0, 0, 1, 1], change)) == {"ImageType=FAT": [1, 3], "ImageType=WATER": [0, 2]}


def test_a_value_that_is_missing_in_some(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        if k % 2:
            dataset.DiffusionBValue = 1000.0

    found = shown(parts(tmp_path, [0, 0, 1, 1], change))
    assert found == {"DiffusionBValue=1000": [1, 3], "DiffusionBValue=none": [0, 2]}


def test_echoes_of_several_times(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.EchoTime, dataset.TemporalPositionIdentifier = 5 * (k % 2 + 1), k // 2 % 2 + 1

    assert shown(parts(tmp_path, [0, 0, 0, 0, 1, 1, 1, 1], change)) == {
        "EchoTime=5,TemporalPositionIdentifier=1": [0, 4],
        "EchoTime=5,TemporalPositionIdentifier=2": [2, 6],
        "EchoTime=10,TemporalPositionIdentifier=1": [1, 5],
        "EchoTime=10,TemporalPositionIdentifier=2": [3, 7],
    }


def test_times_of_day_are_counted_and_not_shown(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.AcquisitionTime = f"0304{5 + k // 2:02d}.25"

    assert shown(parts(tmp_path, [0, 1, 0, 1], change)) == {"AcquisitionTime=#1": [0, 1], "AcquisitionTime=#2": [2, 3]}


def test_phases_of_the_heart_by_their_rank(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.TriggerTime = (0.0, 40.0, 3.5, 41.25)[k]  # breath-holds differ a little

    assert shown(parts(tmp_path, [0, 0, 1, 1], change)) == {"TriggerTime=#1": [0, 2], "TriggerTime=#2": [1, 3]}


def test_a_volume_that_was_not_finished_is_refused_alone(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.TemporalPositionIdentifier = k // 3 + 1

    whole, rest = parts(tmp_path, [0, 1, 2, 0, 1], change)
    assert shown([whole]) == {"TemporalPositionIdentifier=1": [0, 1, 2]}
    assert rest.reason == "has 2 of its series' 3 positions"


def test_nothing_tells_them_apart(tmp_path: Path) -> None:
    (series,) = parts(tmp_path, [0, 1, 1, 2], lambda dataset, k: None)
    assert series.reason == "1 of 3 positions have up to 2 images each: 1.00 mm"


def test_images_at_one_position_are_no_volumes(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.EchoTime = 5 * (k + 1)

    (series,) = parts(tmp_path, [7, 7, 7], change)
    assert series.reason == "3 images at the one position 7.00 mm: no volume"


def test_twins_are_left_out(tmp_path: Path) -> None:
    array = np.zeros((3, 4, 4), dtype=np.int16)
    array[:, :, 3] = 9
    write_series(tmp_path, array, offsets=[0, 1, 1, 2])
    (series,) = dicom.scan(tmp_path).series
    assert shown([series]) == {"": [0, 0, 9]}
    assert series.warnings == ("1 slices repeat the position and pixels of others: left out",)


@pytest.mark.parametrize("marker", ["JANE DOE", "JANE"])
def test_text_of_no_code_is_not_shown(marker: str, tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.add_new(0x00209056, "SH", f"{marker} {k // 2}")  # StackID

    found = parts(tmp_path, [0, 1, 100, 101], change)
    assert [series.part for series in found] == ["StackID=#1", "StackID=#2"]
    assert marker not in repr(found) + "".join(series.key for series in found)


def test_even_slices_are_one_volume_whatever_their_stacks(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.add_new(0x00209056, "SH", str(k // 2))

    assert shown(parts(tmp_path, [0, 1, 2, 3], change)) == {"": [0, 1, 2, 3]}
