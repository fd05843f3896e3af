"""ITK formats: LPS turned into RAS once, and the grid given back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medseg.errors import InputError, UnreadableFile
from medseg.geometry import Geometry
from medseg.io import itk, read_mask, read_volume, write_mask
from medseg.volume import Mask

sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
VOXELS = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
OBLIQUE = np.array([[0.8, -1.2, 0, 11.5], [0.6, 1.6, 0, -7.0], [0, 0, 2.5, 3.25], [0, 0, 0, 1]])


def test_lps_becomes_ras_by_hand() -> None:
    image = sitk.GetImageFromArray(VOXELS.transpose(2, 1, 0))  # ITK's arrays run k, j, i
    image.SetOrigin((1, 2, 3))
    image.SetSpacing((4, 5, 6))
    volume = itk.from_simpleitk(image)
    assert volume.geometry.affine.tolist() == [[-4, 0, 0, -1], [0, -5, 0, -2], [0, 0, 6, 3], [0, 0, 0, 1]]
    assert volume.geometry.orientation == "LPS"
    np.testing.assert_array_equal(volume.array, VOXELS[np.newaxis])


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_a_mask_is_written_and_read_on_its_grid(tmp_path: Path, ending: str) -> None:
    mask = Mask(VOXELS, Geometry((2, 3, 4), OBLIQUE))
    path = tmp_path / f"masque d'été{ending}"
    write_mask(mask, path)
    again = read_mask(path)
    np.testing.assert_array_equal(again.array, VOXELS)
    assert again.array.dtype == np.int16
    np.testing.assert_allclose(again.geometry.affine, OBLIQUE, atol=1e-9)
    first = path.read_bytes()
    write_mask(mask, path)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_sitk_and_nibabel_see_one_world(tmp_path: Path) -> None:
    write_mask(Mask(VOXELS, Geometry((2, 3, 4), OBLIQUE)), tmp_path / "a.nii.gz")
    by_itk = itk.from_simpleitk(sitk.ReadImage(str(tmp_path / "a.nii.gz")))
    np.testing.assert_allclose(by_itk.geometry.affine, OBLIQUE, atol=1e-5)
    np.testing.assert_array_equal(by_itk.array[0], VOXELS)


def test_components_become_channels_and_a_picture_has_one_slice() -> None:
    picture = sitk.GetImageFromArray(np.zeros((4, 5, 3), np.uint8), isVector=True)
    assert itk.from_simpleitk(picture).array.shape == (3, 5, 4, 1)


def test_an_mhd_is_read_with_its_raw_file_but_not_written(tmp_path: Path) -> None:
    sitk.WriteImage(itk.to_simpleitk(Mask(VOXELS, Geometry((2, 3, 4), OBLIQUE))), str(tmp_path / "a.mhd"))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.mhd").array[0], VOXELS)
    with pytest.raises(InputError, match="two files"):
        write_mask(read_mask(tmp_path / "a.mhd"), tmp_path / "b.mhd")
    (tmp_path / "a.raw").unlink()
    with pytest.raises(UnreadableFile, match=r"a\.mhd"):
        read_volume(tmp_path / "a.mhd")


@pytest.mark.parametrize("content", [b"", b"This is no image.\n"])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mha").write_bytes(content)
    with pytest.raises(UnreadableFile, match=r"a\.mha"):
        read_volume(tmp_path / "a.mha")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mha"
    write_mask(Mask(VOXELS, Geometry((2, 3, 4), OBLIQUE)), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UnreadableFile, match=r"a\.mha"):
        read_volume(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="missing"):
        read_volume(tmp_path / "none.nrrd")


def test_complex_voxels_and_four_dimensions_are_refused() -> None:
    with pytest.raises(InputError, match="complex64"):
        itk.from_simpleitk(sitk.Image([2, 2, 2], sitk.sitkComplexFloat32))
    with pytest.raises(InputError, match="4 dimensions"):
        itk.from_simpleitk(sitk.Image([2, 2, 2, 2], sitk.sitkUInt8))


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(InputError, match=r"Pip install 'medseg\[itk\]'|pip install 'medseg\[itk\]'"):
        read_volume(tmp_path / "a.mha")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of a process")
def test_a_disk_without_room_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from medseg.geometry import Geometry\n"
        "from medseg.io import itk\n"
        "from medseg.volume import Mask\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "array = np.random.default_rng(0).integers(0, 200, (32, 32, 32)).astype(np.uint8)\n"
        "try:\n"
        "    itk.write(Mask(array, Geometry(array.shape, np.eye(4))), Path(sys.argv[1]))\n"
        "except OSError as failure:\n"
        "    sys.stdout.write(f'{failure.filename} {failure.strerror}')\n"
    )
    path = tmp_path / "x.mha"
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert result.stdout == f"{path} cannot be written by SimpleITK; is there room?", result.stderr
    assert list(tmp_path.iterdir()) == []
