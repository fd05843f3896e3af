"""The doors of medseg.io: names, channels, finite voxels, integral labels."""

from __future__ import annotations

import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from dicoms import affine_of, write_series
from numpy.typing import NDArray

from medseg import io
from medseg.errors import GeometryMismatch, IncompleteSeries, InputError
from medseg.geometry import Geometry
from medseg.io import (
    describe_grid,
    dicom,
    finite,
    finite_float32,
    integral,
    name_of,
    read_mask,
    read_volume,
    suffix_of,
    write_mask,
)
from medseg.volume import Labels, Mask

GRID = Geometry((2, 3, 4), np.diag([-1.0, 1.0, 2.5, 1.0]))
STORED = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4)


def written(path: Path, value: int = 1, geometry: Geometry = GRID) -> Path:
    write_mask(Mask(np.full(geometry.shape, value, np.uint8), geometry), path)
    return path


@pytest.mark.parametrize(
    ("name", "suffix", "stem"),
    [
        ("case_1.nii.gz", ".nii.gz", "case_1"),
        ("case.1.NII", ".nii", "case.1"),
        ("a.hdr.gz", ".hdr.gz", "a"),
        ("a.mha", ".mha", "a"),
        ("a.txt", None, "a"),
        ("a", None, "a"),
        (".nii", ".nii", ""),
    ],
)
def test_endings(name: str, suffix: str | None, stem: str) -> None:
    assert suffix_of(Path(name)) == suffix
    if stem:
        assert name_of(Path(name)) == stem


def test_one_file_a_channel_on_one_grid(tmp_path: Path) -> None:
    files = [written(tmp_path / "a.nii.gz", 1), written(tmp_path / "b.nii.gz", 2)]
    volume = read_volume(files, channels=2)
    assert volume.array.shape == (2, 2, 3, 4)
    assert volume.array.dtype == np.uint8  # as stored
    assert volume.array[:, 0, 0, 0].tolist() == [1, 2]
    assert volume.paths == tuple(files)


def test_channels_on_different_grids_are_refused(tmp_path: Path) -> None:
    first = written(tmp_path / "a.nii.gz")
    for affine, shape in ((np.diag([-1.0, 1.0, 2.6, 1.0]), (2, 3, 4)), (GRID.affine, (2, 3, 5))):
        second = written(tmp_path / "b.nii.gz", geometry=Geometry(shape, affine))
        with pytest.raises(GeometryMismatch, match=r"differs from that of a\.nii\.gz"):
            read_volume([first, second])


def test_the_wrong_number_of_channels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has 1 channel \(expected 4\)"):
        read_volume(written(tmp_path / "a.nii.gz"), channels=4)


@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_an_unknown_ending_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"no known image ending \(expected \.nii\.gz"):
        read_volume(tmp_path / name)


def test_a_mask_with_an_integer_without_a_name_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.nii.gz", 7)
    assert read_mask(path, Labels(values={"a": 7})).labels == Labels(values={"a": 7})
    with pytest.raises(InputError, match=r"label values \[7\]"):
        read_mask(path, Labels(values={"a": 1}))


def test_black_and_white_masks_say_what_to_do(tmp_path: Path) -> None:
    array = np.array([0, 255, 255, 0], np.uint8).reshape(2, 2, 1)
    path = tmp_path / "a.nii.gz"
    write_mask(Mask(array, Geometry(array.shape, np.eye(4))), path)
    advice = r"black and white: write \"labels\": \{\"cell\": 255\} in dataset\.json, or divide the mask by 255"
    with pytest.raises(InputError, match=advice):
        read_mask(path, Labels(values={"cell": 1}))
    array[0] = 1
    write_mask(Mask(array, Geometry(array.shape, np.eye(4))), path)
    with pytest.raises(InputError, match=r"\[255\] have no name.*Name them"):
        read_mask(path, Labels(values={"cell": 1}))


def test_an_image_of_two_channels_is_no_mask(tmp_path: Path) -> None:
    both = np.zeros((4, 5, 3), np.uint8)
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    sitk.WriteImage(sitk.GetImageFromArray(both, isVector=True), str(tmp_path / "a.mha"))
    with pytest.raises(InputError, match="3 channels"):
        read_mask(tmp_path / "a.mha")


def test_finite_keeps_integers_and_the_order_in_memory() -> None:
    whole = np.asfortranarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    assert finite(whole, "x") is whole
    assert finite(whole > 3, "x").dtype == np.uint8
    single = whole.astype(np.float32)
    assert finite(single, "x") is single
    double = finite(np.asfortranarray(whole.astype(np.float64)), "x")
    assert double.dtype == np.float32
    assert double.flags.f_contiguous
    np.testing.assert_array_equal(double, whole)


def test_finite_counts_over_all_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg.io._CHUNK", 5)
    values = np.zeros((4, 3, 2))
    values[0, 0, 0], values[3, 2, 1], values[1, 1, 1] = np.nan, np.inf, 1e39
    with pytest.raises(InputError, match="x: 3 voxels are not finite"):
        finite(values, "x")


def test_finite_float32_counts_what_is_not_finite() -> None:
    assert finite_float32(np.array([1, 2], np.int64), "x").dtype == np.float32
    with pytest.raises(InputError, match="case: 3 voxels"):
        finite_float32(np.array([np.nan, np.inf, 1.0, 1e39]), "case")
    assert finite_float32(np.zeros((0,)), "nothing").size == 0


def test_integral_takes_floats_that_are_integers_within_a_millionth() -> None:
    result = integral(np.array([0.0, 0.9999999, 3.0]), "x")
    assert result.tolist() == [0, 1, 3]
    assert result.dtype == np.int32
    same = np.array([1, 2], np.uint16)
    assert integral(same, "x") is same


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.5, 1.0], "1 label values are no integers, as 0.5"),
        ([0.9999, 1.5], "2 label values"),
        ([np.nan], "nan"),
        ([np.inf, 1.0], "inf"),
        ([3e9], "32-bit"),
    ],
)
def test_integral_refuses(values: list[float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        integral(np.array(values), "x")


def test_describe_grid() -> None:
    assert describe_grid(Mask(np.zeros((2, 3, 4), np.uint8), GRID)) == "2x3x4 at 1x1x2.5 mm LAS"


def test_booleans_are_integers() -> None:
    assert integral(np.array([True, False]), "mask").tolist() == [1, 0]


@pytest.mark.parametrize(
    ("kind", "slope", "files", "bytes_a_voxel"),
    [
        (np.int16, 1, 1, 2),  # as it is stored
        (np.int16, 2, 1, 2 + 4),  # and float32 beside it
        (np.int32, 2, 1, 4 + 8),  # float64 holds all of them, and becomes float32: 8 + 4
        (np.float64, 1, 1, 8 + 4),
        (np.float32, 1, 1, 4),
        (np.int16, 1, 3, 2 * 3 * 2),  # three channels, and the array of all
        (np.float64, 1, 2, 2 * 2 * 4),
    ],
)
def test_what_reading_takes_is_known_beforehand(
    kind: type, slope: float, files: int, bytes_a_voxel: int, tmp_path: Path
) -> None:
    image = nibabel.Nifti1Image(np.ones((100, 100, 100), kind), np.eye(4))
    image.header.set_slope_inter(slope, -1024 if slope != 1 else 0)
    paths = [tmp_path / f"a_{n}.nii" for n in range(files)]
    for path in paths:
        nibabel.save(image, path)
    assert io.reading_bytes(paths) == bytes_a_voxel * 10**6
    outline = io.outline(paths)
    tracemalloc.start()
    volume = io.read_volume(paths)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert outline is not None
    assert (outline.array.shape, outline.array.dtype) == (volume.array.shape, volume.array.dtype)
    assert 0.9 * bytes_a_voxel * 10**6 < peak < bytes_a_voxel * 10**6 + 80 * 2**20


# DICOM


def dicom_series(folder: Path, values: NDArray[Any] = STORED, **facts: Any) -> Path:
    write_series(folder, values, spacing=(0.8, 0.9, 2.5), **facts)
    return folder


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    return folder.with_suffix(".zip")


def test_a_folder_a_zip_and_a_series_are_one_image(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "scan", uid="1.2.3")
    for source in (folder, zipped(folder), io.series(str(folder))):
        volume = read_volume(source, channels=1)
        np.testing.assert_array_equal(volume.array[0], STORED)
        np.testing.assert_allclose(volume.geometry.affine, affine_of(spacing=(0.8, 0.9, 2.5)), atol=1e-6)
        assert io.title(volume) == io.name_of(io.series(folder)) == io.series(folder).name
        assert volume.paths == (source if isinstance(source, Path) else folder,)
        assert not io.is_picture(source)
    assert io.located(tmp_path / "a.nii.gz") == tmp_path / "a.nii.gz"


def test_a_file_without_ending_is_known_by_its_content(tmp_path: Path) -> None:
    (path, *_) = write_series(tmp_path / "scan", STORED[..., :1])
    path = path.rename(tmp_path / "IM0001")
    assert read_volume(path).array.shape == (1, 6, 5, 1)
    assert io.is_dicom(path)
    (tmp_path / "notes").write_text("DICM")
    assert not io.is_dicom(tmp_path / "notes")
    assert not io.is_dicom(tmp_path / "nowhere")


def test_a_place_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: does not exist"):
        read_volume(tmp_path / "nowhere")


def test_the_name_of_a_folder_has_no_ending(tmp_path: Path) -> None:
    (tmp_path / "1.2.840").mkdir()
    assert name_of(tmp_path / "1.2.840") == "1.2.840"


def test_a_series_a_channel(tmp_path: Path) -> None:
    one = dicom_series(tmp_path / "one", uid="1.2.1")
    two = dicom_series(tmp_path / "two", STORED + 100, uid="1.2.2")
    volume = read_volume([one, io.series(two)], channels=2)
    assert volume.array[:, 1, 0, 0].tolist() == [STORED[1, 0, 0], STORED[1, 0, 0] + 100]
    assert volume.warnings == ("the channels have several frames of reference: they may not lie over each other",)
    other = dicom_series(tmp_path / "other", uid="1.2.3", origin=(0, 0, 1))
    with pytest.raises(GeometryMismatch, match=f"^{io.series(other).name}: .* differs from that of series_"):
        read_volume([one, other])
    with pytest.raises(InputError, match="has 1 channel "):
        read_volume(io.series(one), channels=2)


def test_one_frame_of_reference_needs_no_warning(tmp_path: Path) -> None:
    def framed(dataset: Any, k: int) -> None:
        dataset.FrameOfReferenceUID = "1.2.9"

    folders = [dicom_series(tmp_path / name, change=framed) for name in "ab"]
    assert read_volume(folders).warnings == ()


def test_a_place_with_several_series_says_which(tmp_path: Path) -> None:
    dicom_series(tmp_path / "study" / "a", uid="1.2.1", study_uid="1.2")
    dicom_series(tmp_path / "study" / "b", uid="1.2.2", study_uid="1.2")
    with pytest.raises(InputError, match=r"study: 2 series could be meant: series_\w+ \(CT.* series_\w+ \(CT"):
        read_volume(tmp_path / "study")
    assert io.series(tmp_path / "study", "1.2.2").uid == "1.2.2"


def test_a_place_with_several_studies_says_which(tmp_path: Path) -> None:
    dicom_series(tmp_path / "a", uid="1.2.1", study_uid="1.2")
    dicom_series(tmp_path / "b", uid="1.3.1", study_uid="1.3")
    with pytest.raises(InputError, match=r"such series of 2 studies: 1\.2\.1, 1\.3\.1 .*by its UID"):
        io.series(tmp_path)


def test_what_a_series_takes_is_known_beforehand(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "scan", slope=0.5)
    volume, outline = read_volume(folder), io.outline([folder])
    assert outline is not None
    assert (outline.array.shape, outline.array.dtype) == (volume.array.shape, volume.array.dtype)
    assert outline.geometry == volume.geometry
    assert io.title(outline) == io.title(volume)
    assert volume.array.nbytes <= io.reading_bytes([folder]) == io.reading_bytes([io.series(folder)])
    assert io.reading_bytes([folder, folder]) >= 4 * volume.array.nbytes  # two channels, and both as one
    assert io.outline([folder, written(tmp_path / "a.mha")]) is None
    with pytest.raises(InputError, match="does not say"):
        io.reading_bytes([tmp_path / "a.mha"])


def test_a_series_that_cannot_be_used_says_why_wherever_it_goes(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "scan", offsets=(0, 2.5, 5, 9))
    (series,) = dicom.scan(folder).series
    for door in (read_volume, io.outline, io.reading_bytes):
        with pytest.raises(IncompleteSeries, match=f"series {series.uid}: "):
            door([series])
    assert read_volume(io.series(folder, resample_irregular=True)).warnings


# Masks whose files know names


LABELS = Labels(values={"liver": 3, "spleen": 7})
ARRAY = (np.arange(120).reshape(6, 5, 4) % 3).astype(np.uint8)


def test_a_segmentation_is_written_and_read_by_name(tmp_path: Path) -> None:
    volume = read_volume(dicom_series(tmp_path / "scan"))
    mask = Mask(LABELS.to_values(ARRAY), volume.geometry, LABELS, header=volume.header)
    write_mask(mask, tmp_path / "a.dcm", kind="LABELMAP", model="m")
    own = read_mask(tmp_path / "a.dcm")
    assert own.labels is not None
    assert own.labels.values == {"liver": 1, "spleen": 2}  # numbers of segments
    found = read_mask(tmp_path / "a.dcm", LABELS)
    assert found.labels is not None
    assert found.labels.values == LABELS.values
    np.testing.assert_array_equal(found.array, mask.array)
    assert read_mask(tmp_path / "a.dcm", Labels(values={"Spleen": 1, "LIVER": 2})).array[0, 0, :3].tolist() == [0, 2, 1]
    with pytest.raises(InputError, match=r"a\.dcm: has labels of unknown names \(values \[2\]\) \(expected liver\)"):
        read_mask(tmp_path / "a.dcm", Labels(values={"liver": 1}))
    few = mask.array * (np.arange(4) == 2)  # labels in one slice: the others are not stored
    write_mask(replace(mask, array=few), tmp_path / "few.dcm")
    assert read_mask(tmp_path / "few.dcm", LABELS).array.shape != few.shape
    np.testing.assert_array_equal(read_mask(tmp_path / "few.dcm", LABELS, volume).array, few)
    with pytest.raises(GeometryMismatch):
        read_mask(tmp_path / "few.dcm", LABELS, replace(volume, geometry=GRID))
    raw = io.format_of(tmp_path / "a.dcm").read_labels(tmp_path / "a.dcm")
    np.testing.assert_array_equal(raw.array, own.array[np.newaxis])


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ({"spleen": 3, "liver": 7}, [0, 7, 3]),
        ({"Spleen": 300, "liver": -7, "kidney": 3}, [0, -7, 300]),
    ],
)
def test_a_nifti_with_names_is_read_by_name(names: dict[str, int], first: list[int], tmp_path: Path) -> None:
    write_mask(Mask(LABELS.to_values(ARRAY), Geometry(ARRAY.shape, np.eye(4)), LABELS), tmp_path / "a.nii.gz")
    own = read_mask(tmp_path / "a.nii.gz")
    assert own.labels is not None
    assert own.labels.values == LABELS.values
    assert io.own_labels(tmp_path / "a.nii.gz") == own.labels
    assert read_mask(tmp_path / "a.nii.gz", Labels(values=names)).array[0, 0, :3].tolist() == first
    for other in ({"liver": 3, "kidney": 7}, {"kidney": 7, "spleen": 3}):  # no organ becomes another by its value
        with pytest.raises(InputError, match=r"unknown names \(values \[.\]\).*file given with --labels"):
            read_mask(tmp_path / "a.nii.gz", Labels(values=other))


def test_own_labels_of_other_masks(tmp_path: Path) -> None:
    grid = Geometry(ARRAY.shape, np.eye(4))
    write_mask(Mask(LABELS.to_values(ARRAY), grid, LABELS), tmp_path / "a.seg.nrrd")
    own = io.own_labels(tmp_path / "a.seg.nrrd")
    assert own is not None
    assert own.values == LABELS.values
    assert io.own_labels(written(tmp_path / "a.nii.gz")) is None
    assert io.own_labels(written(tmp_path / "a.mha")) is None
    with pytest.raises(InputError):
        io.own_labels(tmp_path / "a")


@pytest.mark.parametrize("ending", [".seg.nrrd", ".nii.gz"])
def test_voxels_to_be_ignored_come_back(ending: str, tmp_path: Path) -> None:
    labels = LABELS.model_copy(update={"ignore": 9})
    array = np.choose(ARRAY, [0, 3, 9]).astype(np.uint8)
    write_mask(Mask(array, Geometry(array.shape, np.eye(4)), labels), tmp_path / f"a{ending}")
    np.testing.assert_array_equal(read_mask(tmp_path / f"a{ending}", labels).array, array)
    with pytest.raises(InputError, match=r"label values \[9\] have no name"):
        read_mask(tmp_path / f"a{ending}", LABELS)


def test_a_label_that_no_voxel_has_is_of_no_matter(tmp_path: Path) -> None:
    array = np.full((2, 2, 2), 3, np.uint8)
    write_mask(Mask(array, Geometry(array.shape, np.eye(4)), LABELS), tmp_path / "a.nii.gz")
    assert (
        read_mask(tmp_path / "a.nii.gz", Labels(values={"liver": 9})).array.tolist() == np.full_like(array, 9).tolist()
    )


def test_the_mask_of_a_tilted_series_in_nifti_has_no_quaternion_that_says_otherwise(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "scan", step=(0, 0.5, 2.5))
    volume = read_volume(io.series(folder, resample_irregular=True))
    write_mask(Mask(np.zeros(volume.geometry.shape, np.uint8), volume.geometry), tmp_path / "a.nii.gz")
    found = read_mask(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(found.geometry.affine, volume.geometry.affine, atol=1e-6)
    assert not any("qform" in warning for warning in found.warnings)
    assert int(nibabel.load(tmp_path / "a.nii.gz").header["qform_code"]) == 0


def test_values_of_nifti_count_where_none_of_its_names_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    array = np.zeros((2, 2, 2), np.uint8)
    array[0, 0, 0], array[1, 1, 1] = 1, 2
    grid = Geometry((2, 2, 2), np.eye(4))
    io.write_mask(Mask(array, grid, Labels(values={"Leber": 1, "Milz": 2})), tmp_path / "mask.nii.gz")
    mask = io.read_mask(tmp_path / "mask.nii.gz", Labels(values={"liver": 1, "spleen": 2}))
    assert mask.array.tolist() == array.tolist()
    assert mask.labels is not None
    assert mask.labels.names == ("liver", "spleen")
    assert "none of its label names is known" in caplog.text
    with pytest.raises(
        InputError, match="unknown names"
    ):  # one name is: the others would be taken for what they are not
        io.read_mask(tmp_path / "mask.nii.gz", Labels(values={"Leber": 2, "liver": 1}))
