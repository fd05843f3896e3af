"""medseg.io.dicom.parts: volumes of one series told apart by what their headers say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_series
from pydicom.dataset import Dataset

from medseg.errors import InputError
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
        dataset.TriggerTime = (0.0, 40.0, 80.0, 3.5, 42.0, 83.5)[k]  # breath-holds differ a little: 38.5 / 80 is 0.48

    found = shown(parts(tmp_path, [0, 0, 0, 1, 1, 1], change))
    assert found == {"TriggerTime=#1": [0, 3], "TriggerTime=#2": [1, 4], "TriggerTime=#3": [2, 5]}


@pytest.mark.parametrize(
    ("times", "contrasts"),
    [
        ((0, 40, 3, 42), None),  # any two numbers have a first and a second
        ((0, 40, 80, 1, 61, 81), None),  # half of the way, and three quarters
        ((0, 40, 80, 0, 40, 40), None),  # two of one time
        ((1, 41, 82, 0, 40, 80), (0, 800, 800, 0, 800, 0)),  # a b-value that would be mixed with another
    ],
)
def test_times_that_are_no_phases(times: tuple[float, ...], contrasts: tuple[float, ...], tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.TriggerTime = times[k]
        if contrasts:
            dataset.DiffusionBValue = float(contrasts[k])

    images = len(times) // 2
    (series,) = parts(tmp_path, [0] * images + [1] * images, change)
    assert series.reason == f"2 of 2 positions have up to {images} images each: 0.00, 1.00 mm"


def test_gated_diffusion_is_not_parted_by_its_trigger_times(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)

    def change(dataset: Dataset, k: int) -> None:
        dataset.TriggerTime = f"{rng.uniform(250, 400):.1f}"
        dataset.DiffusionBValue = 800.0 if k % 4 else 0.0

    (series,) = parts(tmp_path, [k // 4 for k in range(20)], change)
    assert series.reason == "5 of 5 positions have up to 4 images each: 0.00, 1.00, 2.00, 3.00 mm and 1 more"


def test_phases_of_magnitude_and_velocity(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.TriggerTime = (0, 30, 60, 1, 32, 61)[k % 6]
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "MP"[k // 6]]

    assert shown(parts(tmp_path, [0, 0, 0, 1, 1, 1] * 2, change)) == {
        **{f"ImageType=M,TriggerTime=#{n + 1}": [n, n + 3] for n in range(3)},
        **{f"ImageType=P,TriggerTime=#{n + 1}": [n + 6, n + 9] for n in range(3)},
    }


def test_echo_times_that_jitter(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.EchoTime = (4.6, 4.601, 4.602, 9.2, 9.202, 9.201)[k]

    found = shown(parts(tmp_path, [0, 1, 2, 0, 1, 2], change))
    assert found == {"EchoTime=4.601": [0, 1, 2], "EchoTime=9.201": [3, 4, 5]}


def test_near_values_that_are_volumes(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.InversionTime = (2000, 2010)[k // 3]

    found = shown(parts(tmp_path, [0, 1, 2, 0, 1, 2], change))
    assert found == {"InversionTime=2000": [0, 1, 2], "InversionTime=2010": [3, 4, 5]}


@pytest.mark.parametrize("shift", [0.5, 0.25, 0.05])  # in the middle, uneven, and nearly at one place
def test_echoes_between_one_another_are_volumes(shift: float, tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.EchoTime = (90, 4.9, 90, 4.901)[k % 4]  # a jitter too

    found = parts(tmp_path, [k // 2 + k % 2 * shift for k in range(8)], change)
    assert shown(found) == {"EchoTime=4.9": [1, 3, 5, 7], "EchoTime=90": [0, 2, 4, 6]}
    assert [series.geometry.spacing[2] for series in found if series.geometry] == [1.0, 1.0]


def test_a_jitter_of_the_contrast_is_no_second_volume(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.EchoTime, dataset.FlipAngle = 4.9 + k % 2 / 1000, 90 + k % 2 / 100

    assert shown(parts(tmp_path, list(range(8)), change)) == {"": list(range(8))}


def test_slabs_of_two_contrasts_behind_one_another_are_one_volume(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.FlipAngle = (15, 20)[k // 4]

    assert shown(parts(tmp_path, list(range(8)), change)) == {"": list(range(8))}


def _odd_and_even(dataset: Dataset, k: int) -> None:
    dataset.AcquisitionNumber = k % 2 + 1


def test_odd_and_even_slices_of_two_acquisitions_are_one_volume(tmp_path: Path) -> None:
    assert shown(parts(tmp_path, list(range(8)), _odd_and_even)) == {"": list(range(8))}


@pytest.mark.parametrize("shift", [1.0, 0.05, 1.45])
def test_acquisitions_with_alternating_gaps_are_volumes(shift: float, tmp_path: Path) -> None:
    found = parts(tmp_path, [k // 2 * 3 + k % 2 * shift for k in range(8)], _odd_and_even)
    assert shown(found) == {"AcquisitionNumber=1": [0, 2, 4, 6], "AcquisitionNumber=2": [1, 3, 5, 7]}
    assert not any(series.irregular for series in found)


def test_acquisitions_that_are_even_but_for_rounding_are_volumes(tmp_path: Path) -> None:
    offsets = [k // 2 * 1.2 + k % 2 * 0.6 + (k % 2 * 0.1) for k in range(8)]  # 0, 0.7, 1.2, 1.9: 0.65 +- 0.05
    (one,) = parts(tmp_path / "one", offsets, lambda dataset, k: None)
    assert one.geometry is not None  # nothing speaks against one volume, of which it is said
    assert "rounded" in one.warnings[0]
    found = shown(parts(tmp_path / "two", offsets, _odd_and_even))
    assert found == {"AcquisitionNumber=1": [0, 2, 4, 6], "AcquisitionNumber=2": [1, 3, 5, 7]}


def test_a_missing_slice_is_no_alternation(tmp_path: Path) -> None:
    """Odd and even slices by themselves are even, as 3 mm is missing at the end of one of them."""
    numbers = [0, *range(2, 9)]

    def change(dataset: Dataset, k: int) -> None:
        dataset.AcquisitionNumber = numbers[k] % 2 + 1

    (series,) = parts(tmp_path, [3 * n for n in numbers], change)
    assert series.reason.startswith("uneven distance of slices: usually 3.00 mm, but 6.00 mm from 0.00 to 6.00")


def _turning(dataset: Dataset, degrees: float) -> None:
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    dataset.ImageOrientationPatient = [1, 0, 0, 0, float(f"{cosine:.6f}"), float(f"{sine:.6f}")]


@pytest.mark.parametrize(
    ("odd", "count", "left_out"),
    [((0,), 6, True), ((2, 6), 7, True), ((0, 3, 7), 8, False), ((0,), 5, False), ((0, 1), 6, False)],
)
def test_odd_slices_are_left_out_of_a_series_without_gaps(
    odd: tuple[int, ...], count: int, left_out: bool, tmp_path: Path
) -> None:
    """Two of them at the most, and five others at the least."""

    def change(dataset: Dataset, k: int) -> None:
        if k in odd:
            _turning(dataset, 90)

    rest = [k for k in range(count) if k not in odd]
    offsets = [float(rest.index(k)) if k in rest else 0.0 for k in range(count)]
    (series,) = parts(tmp_path, offsets, change)
    if left_out:
        assert shown([series]) == {"": rest}
        note = f"{len(odd)} of {count} slices have another orientation or size: left out"
        assert series.warnings == (note,)
        assert len(series.instances) == len(rest)
    else:
        assert series.reason == "slices of 2 orientations, as those of a localizer"


def test_an_odd_slice_that_leaves_a_gap(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        if k == 3:
            _turning(dataset, 90)

    (series,) = parts(tmp_path, list(range(8)), change)
    assert series.reason == "slices of 2 orientations, as those of a localizer"


def test_an_odd_slice_of_another_size_beside_echoes(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.EchoTime = k % 2 + 1
        if k == 10:
            dataset.Rows, dataset.Columns = dataset.Columns, dataset.Rows

    found = parts(tmp_path, [k // 2 for k in range(11)], change)
    assert shown(found) == {"EchoTime=1": [0, 2, 4, 6, 8], "EchoTime=2": [1, 3, 5, 7, 9]}
    for series in found:
        assert series.warnings == ("1 of 11 slices have another orientation or size: left out",)


@pytest.mark.parametrize(("degrees", "apart"), [(10, True), (44, True), (46, False), (90, False)])
def test_stacks_at_an_angle(degrees: float, apart: bool, tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        if k > 2:
            _turning(dataset, degrees)
            y, z = -np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
            dataset.ImagePositionPatient = [0, round(50 + k * y, 6), round(k * z, 6)]

    found = parts(tmp_path, list(range(6)), change)
    if apart:
        assert {tuple(voxels) for voxels in shown(found).values()} == {(0, 1, 2), (3, 4, 5)}
        assert [series.part for series in found] == ["Orientation=#1", "Orientation=#2"]
    else:
        assert [series.reason for series in found] == ["slices of 2 orientations, as those of a localizer"]


def test_acquisitions_that_share_a_slice(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.AcquisitionNumber = k // 4 + 1

    found = parts(tmp_path, [0, 1, 2, 3, 3, 4, 5, 6], change)
    assert shown(found) == {"AcquisitionNumber=1": [0, 1, 2, 3], "AcquisitionNumber=2": [4, 5, 6, 7]}
    assert [series.warnings for series in found] == [("has 4 of its series' 7 positions",)] * 2


def test_acquisitions_that_lack_a_slice_each(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.AcquisitionNumber = k // 4 + 1

    one, other = parts(tmp_path, [0, 1, 2, 4, 0, 2, 3, 4], change)
    assert (one.part, other.part) == ("AcquisitionNumber=1", "AcquisitionNumber=2")
    assert one.reason.startswith("uneven distance of slices: usually 1.00 mm, but 2.00 mm from 2.00 to 4.00")
    assert other.reason.startswith("uneven distance of slices: usually 1.00 mm, but 2.00 mm from 0.00 to 2.00")


def test_half_of_the_slices_are_no_volume(tmp_path: Path) -> None:
    """Two volumes of odd and even slices each: four times, none of which has all slices between its first and last."""

    def change(dataset: Dataset, k: int) -> None:
        dataset.AcquisitionTime = f"01{k // 6:02d}{k % 2:02d}"

    (series,) = parts(tmp_path, list(range(6)) * 2, change)
    assert series.reason.startswith("6 of 6 positions have up to 2 images each")


@pytest.mark.parametrize(("count", "apart"), [(4, True), (5, False)])
def test_attributes_that_are_tried_together(count: int, apart: bool, tmp_path: Path) -> None:
    """As many as four of two values each."""
    names = ("EchoTime", "InversionTime", "TemporalPositionIdentifier", "FlipAngle", "AcquisitionNumber")

    def change(dataset: Dataset, k: int) -> None:
        for n, name in enumerate(names):
            setattr(dataset, name, 10 * (1 + (k >> n) % 2 * (n < count)))

    found = parts(tmp_path, [k // 2**count for k in range(2 * 2**count)], change)
    assert len(found) == (16 if apart else 1)
    if apart:
        assert all(second == first + 16 for first, second in shown(found).values())


def test_nothing_is_searched_where_nothing_can_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.EchoTime = (1, 1, 2)[k % 3]

    monkeypatch.delattr("medseg.io.dicom.parts._split")
    (series,) = parts(tmp_path, [0, 0, 0, 1, 1, 1], change)
    assert series.reason == "2 of 2 positions have up to 3 images each: 0.00, 1.00 mm"


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


@pytest.mark.parametrize("marker", ["MUELLER", "JANE_DOE", "JANE DOE"])
def test_words_of_image_type_that_may_be_names_are_not_shown(marker: str, tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", marker if k % 2 else "SCHMIDT"]

    found = parts(tmp_path, [0, 0, 1, 1], change)
    assert shown(found) == {"ImageType=#1": [1, 3], "ImageType=#2": [0, 2]}
    with pytest.raises(InputError) as error:
        dicom.select(dicom.scan(tmp_path))
    assert not any(word in str(error.value) + repr(found) for word in (marker, "SCHMIDT"))


def test_of_words_that_differ_the_known_ones_are_shown(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", *(("W", "JANE"), ("F", "DOE"))[k % 2]]

    assert shown(parts(tmp_path, [0, 0, 1, 1], change)) == {"ImageType=F": [1, 3], "ImageType=W": [0, 2]}


def test_even_slices_are_one_volume_whatever_their_stacks(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.add_new(0x00209056, "SH", str(k // 2))

    assert shown(parts(tmp_path, [0, 1, 2, 3], change)) == {"": [0, 1, 2, 3]}


def test_one_slice_is_a_volume(tmp_path: Path) -> None:
    assert shown(parts(tmp_path, [7], lambda dataset, k: None)) == {"": [0]}
