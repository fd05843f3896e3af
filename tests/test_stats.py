"""Statistics of masks: every number worked out by hand, the same in all orientations, cases that fail alone."""

from __future__ import annotations

import csv
import itertools
from dataclasses import replace
from pathlib import Path

import dicoms
import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medseg.errors import GeometryMismatch, InputError
from medseg.geometry import Geometry
from medseg.io import read_volume, series, write_mask
from medseg.stats import DEFINITIONS, FACES, Intensities, LabelStats, measure, measure_folders
from medseg.volume import Labels, Mask, Volume

ORIENTATIONS = [
    "".join(letters) for axes in itertools.permutations(("LR", "PA", "IS")) for letters in itertools.product(*axes)
]
GRID = Geometry((6, 5, 4), np.array([[2.0, 0, 0, 10], [0, 3, 0, 20], [0, 0, 5, 30], [0, 0, 0, 1]]))
"""RAS+, voxels of 2 x 3 x 5 mm: 0.03 ml."""
LABELS = Labels(values={"organ": 1, "lesion": 5, "none": 7}, regions={"whole": (1, 5)})


def example() -> tuple[Volume, Mask]:
    """An organ of five voxels in a row and one across a corner, a lesion of two voxels that touch nothing."""
    mask = np.zeros(GRID.shape, np.uint8)
    mask[0:5, 1, 1] = 1
    mask[5, 2, 2] = 1  # touches (4, 1, 1) in a corner
    mask[0, 4, 3] = mask[2, 4, 3] = 5  # one voxel between them
    image = np.zeros((1, *GRID.shape), np.int16)
    image[0, 0:5, 1, 1] = [10, 50, 20, 40, 30]
    image[0, 5, 2, 2] = 90
    image[0, 0, 4, 3], image[0, 2, 4, 3] = -100, 100
    return Volume(image, GRID), Mask(mask, GRID, LABELS)


def test_every_number_of_a_label() -> None:
    organ, lesion, none, whole = measure(*example())
    assert (organ.label, organ.values, organ.voxels) == ("organ", (1,), 6)
    assert organ.volume_ml == pytest.approx(0.18)
    assert (organ.components, organ.largest_component_ml) == (1, pytest.approx(0.18))
    assert (organ.box_start, organ.box_stop) == ((0, 1, 1), (6, 3, 3))
    # mean index (15 / 6, 7 / 6, 7 / 6); times spacing, plus origin
    assert organ.centroid_mm == pytest.approx((10 + 2 * 2.5, 20 + 3 * 7 / 6, 30 + 5 * 7 / 6))
    assert organ.touches_border == ("left", "right")
    # sorted 10 20 30 40 50 90, rank of a percentile p: 5 p; squares of 240 / 6 = 40: 900 400 100 0 100 2500
    assert organ.intensities == (
        Intensities(
            mean=40.0,
            sd=(4000 / 6) ** 0.5,
            minimum=10.0,
            p05=12.5,
            p25=22.5,
            median=35.0,
            p75=47.5,
            p95=80.0,
            maximum=90.0,
        ),
    )
    assert (lesion.voxels, lesion.components, lesion.largest_component_ml) == (2, 2, pytest.approx(0.03))
    assert lesion.touches_border == ("left", "anterior", "superior")
    assert none == LabelStats(label="none", values=(7,))
    assert (whole.values, whole.voxels, whole.components) == ((1, 5), 8, 3)
    assert whole.intensities[0].mean == pytest.approx(240 / 8)
    assert (whole.box_start, whole.box_stop) == ((0, 1, 1), (6, 5, 4))


def test_a_single_voxel_and_several_channels() -> None:
    image, mask = example()
    array = np.zeros_like(mask.array)
    array[3, 2, 1] = 5
    both = replace(image, array=np.stack([np.full(GRID.shape, 7.5, np.float32), np.full(GRID.shape, -2, np.float32)]))
    _, lesion, *_ = measure(both, replace(mask, array=array))
    assert [(c.mean, c.sd, c.minimum, c.p95, c.maximum) for c in lesion.intensities] == [
        (7.5, 0.0, 7.5, 7.5, 7.5),
        (-2.0, 0.0, -2.0, -2.0, -2.0),
    ]
    assert lesion.centroid_mm == (16.0, 26.0, 35.0)
    assert lesion.touches_border == ()


def test_the_image_is_left_as_it_is() -> None:
    image, mask = example()
    before = image.array.copy(), mask.array.copy()
    measure(image, mask)
    np.testing.assert_array_equal(image.array, before[0])
    np.testing.assert_array_equal(mask.array, before[1])


def test_a_mask_alone_has_no_intensities() -> None:
    image, mask = example()
    assert measure(None, mask) == tuple(s.model_copy(update={"intensities": ()}) for s in measure(image, mask))


def test_a_mask_without_names_and_one_of_nothing() -> None:
    image, mask = example()
    found = measure(image, replace(mask, labels=None))
    assert [(s.label, s.values) for s in found] == [("label_1", (1,)), ("label_5", (5,))]
    assert measure(image, Mask(np.zeros(GRID.shape, np.uint8), GRID)) == ()
    assert {s.voxels for s in measure(image, Mask(np.zeros(GRID.shape, np.uint8), GRID, LABELS))} == {0}


def test_large_and_negative_values_and_those_to_ignore() -> None:
    array = np.zeros(GRID.shape, np.int32)
    array[1, 1, 1:3], array[2, 2, 2], array[3] = -70000, 2**31 - 1, 9
    labels = Labels(values={"low": -70000, "high": 2**31 - 1}, ignore=9)
    assert [(s.label, s.voxels) for s in measure(None, Mask(array, GRID, labels))] == [("low", 2), ("high", 1)]
    with pytest.raises(InputError, match=r"\[9\] have no name"):
        measure(None, Mask(array, GRID, Labels(values={"low": -70000, "high": 2**31 - 1})))


def test_a_picture_has_no_border_along_its_single_plane() -> None:
    grid = Geometry((4, 4, 1), np.eye(4))
    array = np.zeros(grid.shape, np.uint8)
    array[1, 1] = array[2, 2] = 1
    (found,) = measure(None, Mask(array, grid, Labels(values={"cell": 1})))
    assert (found.components, found.touches_border) == (1, ())
    array[3, 1] = 1
    (found,) = measure(None, Mask(array, grid, Labels(values={"cell": 1})))
    assert (found.components, found.touches_border) == (1, ("right",))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_faces_are_named_by_anatomy_in_every_orientation(orientation: str) -> None:
    """The voxel that lies farthest to the left, back and foot, and one on each face alone."""
    turn = GRID.to(orientation)
    for place, faces in {
        (0, 0, 0): ("left", "posterior", "inferior"),
        (5, 2, 2): ("right",),
        (2, 4, 2): ("anterior",),
        (2, 2, 3): ("superior",),
        (2, 2, 2): (),
    }.items():
        array = np.zeros(GRID.shape, np.uint8)
        array[place] = 1
        (found,) = measure(None, Mask(turn.apply(array), GRID.reoriented(turn), Labels(values={"a": 1})))
        assert found.touches_border == faces
    assert list(FACES.values()) == ["left", "right", "posterior", "anterior", "inferior", "superior"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.uint8], NDArray[np.float32], str]:
    shape = tuple(draw(st.integers(1, 6)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = rng.choice(3, size=shape, p=[0.6, 0.3, 0.1]).astype(np.uint8)
    return mask, rng.normal(100, 30, (1, *shape)).astype(np.float32), draw(st.sampled_from(ORIENTATIONS))


@settings(max_examples=60)
@given(cases())
def test_numbers_stay_and_boxes_move_when_axes_are_turned(
    case: tuple[NDArray[np.uint8], NDArray[np.float32], str],
) -> None:
    array, image, orientation = case
    affine = np.diag([0.7, 1.3, 2.9, 1.0])
    affine[:3, 3] = 5, -7, 11
    grid = Geometry(array.shape, affine)  # type: ignore[arg-type]
    turn, labels = grid.to(orientation), Labels(values={"a": 1, "b": 2}, regions={"both": (1, 2)})
    straight = measure(Volume(image, grid), Mask(array, grid, labels))
    turned_grid = grid.reoriented(turn)
    turned_mask = Mask(turn.apply(array), turned_grid, labels)
    turned = measure(Volume(turn.apply(image), turned_grid), turned_mask)
    for one, other in zip(straight, turned, strict=True):
        assert (one.voxels, one.components, one.touches_border) == (
            other.voxels,
            other.components,
            other.touches_border,
        )
        assert (one.volume_ml, one.largest_component_ml) == pytest.approx((other.volume_ml, other.largest_component_ml))
        if not one.voxels:
            assert other.box_start is other.centroid_mm is None
            continue
        assert one.centroid_mm == pytest.approx(other.centroid_mm)
        for mine, theirs in zip(one.intensities, other.intensities, strict=True):
            assert mine.model_dump() == pytest.approx(theirs.model_dump(), rel=1e-9)
        values = image[0][np.isin(array, one.values)].astype(np.float64)
        measured = one.intensities[0]
        assert (measured.mean, measured.sd) == pytest.approx((values.mean(), values.std()))
        expected = np.percentile(values, [0, 5, 25, 50, 75, 95, 100])
        found = list(measured.model_dump(exclude={"mean", "sd"}).values())
        assert found == pytest.approx(expected.tolist())
        place = np.argwhere(np.isin(turned_mask.array, one.values))
        assert (other.box_start, other.box_stop) == (tuple(place.min(axis=0)), tuple(place.max(axis=0) + 1))


def test_another_grid_is_refused() -> None:
    image, mask = example()
    moved = GRID.affine.copy()
    moved[0, 3] += 1
    with pytest.raises(GeometryMismatch, match="differs from the image's"):
        measure(replace(image, geometry=Geometry(GRID.shape, moved)), mask)


# ---- folders ---------------------------------------------------------------------------------------------------------


def save(path: Path, array: NDArray[np.generic], affine: NDArray[np.float64] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(array, GRID.affine if affine is None else affine).to_filename(path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """a is good; b lies on another grid, c is no image, d has none, e has a value without name; f has no mask."""
    image, mask = example()
    moved = GRID.affine.copy()
    moved[2, 3] += 2
    for name in "abcef":
        save(tmp_path / "images" / f"{name}.nii.gz", image.array[0])
    for name in "abde":
        save(tmp_path / "masks" / f"{name}.nii.gz", mask.array, moved if name == "b" else None)
    (tmp_path / "masks" / "c.nii.gz").write_bytes(b"no image")
    wrong = mask.array.copy()
    wrong[3, 3, 3] = 9
    save(tmp_path / "masks" / "e.nii.gz", wrong)
    return tmp_path / "images", tmp_path / "masks"


def test_bad_cases_stop_no_other(folders: tuple[Path, Path]) -> None:
    told: list[tuple[float, str]] = []
    found = measure_folders(*folders, LABELS, lambda _, fraction, note: told.append((fraction, note)))
    assert [case.case for case in found.cases] == ["a", "b", "c", "d", "e"]
    assert found.cases[0].labels == measure(*example())
    assert list(found.failed) == ["b", "c", "d", "e"]
    for case, reason in {"b": "differs from the image's", "d": "no image of this name", "e": "have no name"}.items():
        assert reason in found.failed[case]
    assert found.without_mask == ("f",)
    assert told == [(0.2, "a"), (0.4, "b"), (0.6, "c"), (0.8, "d"), (1.0, "e")]


def test_the_table_has_a_row_a_case_and_label(folders: tuple[Path, Path], tmp_path: Path) -> None:
    measure_folders(*folders, LABELS).save_csv(tmp_path / "stats.csv")
    with (tmp_path / "stats.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["label"]) for row in rows] == [
        *(("a", label) for label in ("organ", "lesion", "none", "whole")),
        *((case, "") for case in "bcde"),
    ]
    assert rows[0] == {
        "case": "a",
        "label": "organ",
        "value": "1",
        "voxels": "6",
        "volume_ml": "0.18",
        "components": "1",
        "largest_component_ml": "0.18",
        "box_start_i": "0",
        "box_start_j": "1",
        "box_start_k": "1",
        "box_stop_i": "6",
        "box_stop_j": "3",
        "box_stop_k": "3",
        "centroid_x_mm": "15.0",
        "centroid_y_mm": "23.5",
        "centroid_z_mm": "35.8333",
        "touches_border": "left+right",
        "mean": "40",
        "sd": "25.8199",  # the root of 4000 / 6
        "minimum": "10",
        "p05": "12.5",
        "p25": "22.5",
        "median": "35",
        "p75": "47.5",
        "p95": "80",
        "maximum": "90",
        "reason": "",
    }
    empty, whole, bad = rows[2], rows[3], rows[4]
    assert {name for name, cell in empty.items() if cell} == {
        *("case", "label", "value", "voxels", "volume_ml", "components", "largest_component_ml"),
    }
    assert whole["value"] == "1+5"
    assert {name for name, cell in bad.items() if cell} == {"case", "reason"}


def test_a_mask_of_nothing_has_its_row(tmp_path: Path) -> None:
    image, mask = example()
    found = measure_folders(
        save(tmp_path / "a.nii.gz", image.array[0]), save(tmp_path / "masks" / "a.nii.gz", np.zeros_like(mask.array))
    )
    assert found.failed == {}
    (row,) = csv.DictReader(found.as_csv().splitlines())
    assert {name for name, cell in row.items() if cell} == {"case"}


def test_the_columns_of_several_channels_are_numbered(tmp_path: Path) -> None:
    image, mask = example()
    for channel in range(2):
        save(tmp_path / "images" / f"a_000{channel}.nii.gz", image.array[0] + channel)
    save(tmp_path / "a.nii.gz", mask.array)
    measure_folders(tmp_path / "images", tmp_path / "a.nii.gz").save_csv(tmp_path / "stats.csv")
    with (tmp_path / "stats.csv").open(newline="") as file:
        organ, lesion = csv.DictReader(file)
    assert (organ["label"], organ["mean_0"], organ["mean_1"]) == ("label_1", "40", "41")
    assert (lesion["maximum_0"], lesion["maximum_1"]) == ("100", "101")
    assert "mean" not in organ


def test_one_image_and_one_mask_are_a_pair_whatever_their_names(tmp_path: Path) -> None:
    image, mask = example()
    found = measure_folders(
        save(tmp_path / "scan.nii.gz", image.array[0]), save(tmp_path / "seg.nii.gz", mask.array), LABELS
    )
    assert [(case.case, case.reason) for case in found.cases] == [("seg", "")]
    assert found.without_mask == ()
    assert set(found.definitions) == set(DEFINITIONS)


@pytest.mark.parametrize("ending", [".dcm", ".seg.nrrd"])
def test_segments_are_measured_on_the_grid_of_the_image(ending: str, tmp_path: Path) -> None:
    """A DICOM SEG has the slices with labels alone; the box is on all slices, and names are those of the segments."""
    voxels = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4)
    dicoms.write_series(tmp_path / "series", voxels, spacing=(2.0, 3.0, 5.0), origin=(10, 20, 30))
    image = read_volume(tmp_path / "series")
    array = np.zeros(image.geometry.shape, np.uint8)
    array[1:3, 2, 2] = 7
    target = tmp_path / f"seg{ending}"
    options = {"allow_uncoded": True} if ending == ".dcm" else {}
    write_mask(Mask(array, image.geometry, Labels(values={"blob": 7}), header=image.header), target, **options)
    found = measure_folders(tmp_path / "series", target)
    assert found.failed == {}
    (blob,) = found.cases[0].labels
    assert (blob.label, blob.voxels, blob.volume_ml) == ("blob", 2, pytest.approx(0.06))
    assert (blob.box_start, blob.box_stop) == ((1, 2, 2), (3, 3, 3))
    # LPS 10 + 2 * 1.5, 20 + 3 * 2, 30 + 5 * 2, and the first two change sign in RAS
    assert blob.centroid_mm == pytest.approx((-13, -26, 40))
    assert blob.intensities[0].mean == image.array[0][array == 7].mean()


def test_segments_of_an_uneven_series_fill_the_planes_between_its_slices(tmp_path: Path) -> None:
    dicoms.write_series(tmp_path / "series", np.ones((6, 5, 4), np.int16), offsets=[0, 2, 4, 8])
    image = read_volume(series(tmp_path / "series", resample_irregular=True))
    assert image.geometry.shape == (6, 5, 5)
    array = np.zeros(image.geometry.shape, np.uint8)
    array[1:3, 2] = 1
    mask = Mask(array, image.geometry, Labels(values={"blob": 1}), header=image.header)
    write_mask(mask, tmp_path / "seg.dcm", allow_uncoded=True)
    found = measure_folders(tmp_path / "series", tmp_path / "seg.dcm", resample_irregular=True)
    assert found.cases[0].labels[0].volume_ml == pytest.approx(2 * 5 * 0.002)  # the fourth plane has no slice


def test_nothing_in_common(folders: tuple[Path, Path], tmp_path: Path) -> None:
    images, masks = folders
    for path in masks.iterdir():
        path.rename(path.with_name(f"seg_{path.name}"))
    with pytest.raises(InputError, match="no mask has the name of an image"):
        measure_folders(images, masks)
    with pytest.raises(InputError, match="is not there"):
        measure_folders(images, tmp_path / "nowhere")


def test_a_real_case(real_data: Path) -> None:
    """The volumes of hippocampus_001 of the Decathlon, whose voxels are of 1 mm: as many microlitres as voxels."""
    task = real_data / "Task04_Hippocampus"
    path = task / "labelsTr" / "hippocampus_001.nii.gz"
    labels = Labels(values={"Anterior": 1, "Posterior": 2})
    found = measure_folders(task / "imagesTr" / path.name, path, labels)
    array = np.asarray(nibabel.load(path).dataobj)
    image = np.asarray(nibabel.load(task / "imagesTr" / path.name).dataobj, dtype=np.float64)
    assert found.failed == {}
    for value, stats in enumerate(found.cases[0].labels, start=1):
        assert stats.volume_ml == pytest.approx(np.count_nonzero(array == value) / 1000)
        assert stats.intensities[0].mean == pytest.approx(image[array == value].mean())
        assert stats.intensities[0].p95 == pytest.approx(np.percentile(image[array == value], 95))
