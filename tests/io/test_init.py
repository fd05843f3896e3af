"""The doors of medseg.io: names, channels, finite voxels, integral labels."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medseg import io
from medseg.errors import GeometryMismatch, InputError
from medseg.geometry import Geometry
from medseg.io import (
    describe_grid,
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
    with pytest.raises(InputError, match=r"has 1 channels \(expected 4\)"):
        read_volume(written(tmp_path / "a.nii.gz"), channels=4)


@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_an_unknown_ending_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
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
