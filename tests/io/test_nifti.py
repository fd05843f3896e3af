"""NIfTI: every fault that a file can have, made here byte by byte, and what is written back."""

from __future__ import annotations

import gzip
import os
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.nifti2 import Nifti2Header, Nifti2Image

from medseg import io
from medseg.errors import InputError, MedsegError, UnreadableFile
from medseg.geometry import Geometry
from medseg.io import nifti, read_mask, read_volume, write_mask
from medseg.io.nifti import Probabilities
from medseg.volume import Labels, Mask, Volume

OBLIQUE = np.array([[0.8, -0.6, 0, 11.3], [0.6, 0.8, 0, -7.1], [0, 0, 2.5, 3.3], [0, 0, 0, 1]])
VOXELS = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
CANARY = "JANE-DOE"


def header_of(**fields: Any) -> Nifti1Header:
    """A sound header of VOXELS with some fields changed."""
    header = Nifti1Header()
    header.set_data_shape(VOXELS.shape)
    header.set_data_dtype(np.int16)
    header.set_sform(OBLIQUE, 1)
    header.set_xyzt_units("mm")
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    header["scl_slope"], header["scl_inter"] = 1, 0
    for name, value in fields.items():
        header[name] = value
    return header


def content_of(header: Nifti1Header | None = None, voxels: np.ndarray | None = None) -> bytes:
    """A NIfTI file's bytes."""
    voxels = VOXELS if voxels is None else voxels
    return (header or header_of()).binaryblock + bytes(4) + voxels.tobytes(order="F")


def saved(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def image_file(folder: Path, affine: np.ndarray = OBLIQUE, kind: type = Nifti1Image, name: str = "a.nii.gz") -> Path:
    """An image saved by nibabel, whose free-text fields hold a name."""
    image = kind(VOXELS, affine)
    image.set_qform(np.diag([1.0, 1, 1, 1]), 0)
    image.set_sform(affine, 4)
    image.header.set_xyzt_units("mm", "sec")
    for field in ("descrip", "aux_file", "intent_name"):
        image.header[field] = CANARY
    if "db_name" in image.header:
        image.header["db_name"] = CANARY
    nibabel.save(image, folder / name)
    return folder / name


def mask_of(path: Path) -> Mask:
    """A mask on the grid of the image at ``path``."""
    volume = read_volume(path)
    return Mask((volume.array[0] > 10).astype(np.uint8), volume.geometry, None, volume.paths, volume.header)


# Reading what is sound


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ", "the image of Zoë/Łódź scan 1.nii.gz"])
def test_a_sound_file_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    saved(path, gzip.compress(content_of()) if name.lower().endswith("gz") else content_of())
    volume = nifti.read(path)
    np.testing.assert_array_equal(volume.array, VOXELS[np.newaxis])
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.geometry.affine, OBLIQUE.astype(np.float32))
    assert volume.warnings == ()
    assert volume.paths == (path,)


def test_big_endian_voxels_are_read(tmp_path: Path) -> None:
    header = header_of().as_byteswapped(">")
    volume = nifti.read(saved(tmp_path / "big.nii", content_of(header, VOXELS.astype(">i2"))))
    np.testing.assert_array_equal(volume.array[0], VOXELS)
    assert volume.array.dtype == np.dtype("=i2")


def test_nifti_2_is_read(tmp_path: Path) -> None:
    volume = nifti.read(image_file(tmp_path, kind=Nifti2Image))
    np.testing.assert_array_equal(volume.array[0], VOXELS)
    assert isinstance(volume.header, Nifti2Header)
    np.testing.assert_array_equal(volume.geometry.affine, OBLIQUE)  # NIfTI-2 keeps doubles


@pytest.mark.parametrize("ending", [".hdr", ".img"])
def test_a_pair_is_read_from_either_half(tmp_path: Path, ending: str) -> None:
    saved(tmp_path / "a.hdr", header_of(magic=b"ni1", vox_offset=0).binaryblock)
    saved(tmp_path / "a.img", VOXELS.tobytes(order="F"))
    np.testing.assert_array_equal(nifti.read(tmp_path / f"a{ending}").array[0], VOXELS)


def test_a_pair_may_have_an_offset(tmp_path: Path) -> None:
    saved(tmp_path / "a.hdr", header_of(magic=b"ni1", vox_offset=16).binaryblock)
    saved(tmp_path / "a.img", bytes(16) + VOXELS.tobytes(order="F"))
    np.testing.assert_array_equal(nifti.read(tmp_path / "a.hdr").array[0], VOXELS)


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a.hdr", header_of(magic=b"ni1", vox_offset=0).binaryblock)
    with pytest.raises(UnreadableFile, match="other half"):
        nifti.read(tmp_path / "a.hdr")


def test_a_header_extension_is_skipped(tmp_path: Path) -> None:
    content = header_of(vox_offset=368).binaryblock + b"\1\0\0\0" + bytes(16) + VOXELS.tobytes(order="F")
    np.testing.assert_array_equal(nifti.read(saved(tmp_path / "a.nii", content)).array[0], VOXELS)


def test_one_volume_in_four_dimensions_is_one_channel(tmp_path: Path) -> None:
    volume = nifti.read(saved(tmp_path / "a.nii", content_of(header_of(dim=[4, 2, 3, 4, 1, 1, 1, 1]))))
    assert volume.array.shape == (1, 2, 3, 4)
    assert volume.warnings == ("a fourth dimension of length 1 was dropped",)


def test_the_fourth_dimension_becomes_channels(tmp_path: Path) -> None:
    both = np.stack([VOXELS, VOXELS + 100], axis=-1)
    volume = nifti.read(saved(tmp_path / "a.nii", content_of(header_of(dim=[4, 2, 3, 4, 2, 1, 1, 1]), both)))
    np.testing.assert_array_equal(volume.array, np.stack([VOXELS, VOXELS + 100]))
    with pytest.raises(InputError, match=r"2 channels \(expected 1\)"):
        read_volume(tmp_path / "a.nii", channels=1)


def test_a_picture_has_one_slice(tmp_path: Path) -> None:
    volume = nifti.read(saved(tmp_path / "a.nii", content_of(header_of(dim=[2, 6, 4, 1, 1, 1, 1, 1]))))
    assert volume.array.shape == (1, 6, 4, 1)


@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [(0, 7, 23), (np.nan, 7, 23), (np.inf, 0, 23), (1, 0, 23), (1, -1024, -1001), (0.5, 1, 12.5)],
)
def test_slope_and_intercept(tmp_path: Path, slope: float, intercept: float, expected: float) -> None:
    path = saved(tmp_path / "a.nii", content_of(header_of(scl_slope=slope, scl_inter=intercept)))
    assert nifti.read(path).array[0, 1, 2, 3] == expected  # stored as 23


def test_an_intercept_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii", content_of(header_of(scl_slope=2, scl_inter=np.nan)))
    with pytest.raises(InputError, match="intercept"):
        nifti.read(path)


def test_a_scaled_mask_has_the_scaled_integers_and_fractions_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii", content_of(header_of(scl_slope=2)))
    assert read_mask(path).array[1, 2, 3] == 46
    with pytest.raises(InputError, match=r"no integers, as 0\.5"):
        read_mask(saved(path, content_of(header_of(scl_slope=0.5))))


# Damaged files


def gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


NOISE = np.random.default_rng(0).integers(0, 30000, (20, 20, 20), dtype=np.int16)
NOISY = gz(content_of(header_of(dim=[3, 20, 20, 20, 1, 1, 1, 1]), NOISE))
DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "gz cut to 60 %": ("a.nii.gz", NOISY[: len(NOISY) * 6 // 10], "truncated"),
    "gz without its last 4 bytes": ("a.nii.gz", NOISY[:-4], "truncated"),
    "gz with a wrong CRC": ("a.nii.gz", flipped(NOISY, len(NOISY) - 8), "CRC check failed"),
    "gz with a wrong length": ("a.nii.gz", flipped(NOISY, len(NOISY) - 4), "length"),
    "gz with one byte flipped": ("a.nii.gz", flipped(NOISY, len(NOISY) // 2), "damaged"),
    "gz with garbage behind it": ("a.nii.gz", NOISY + b"garbage", "damaged"),
    "gz of too few bytes": ("a.nii.gz", gz(content_of()[:-2]), "holds 398 bytes of image"),
    "gz of nothing": ("a.nii.gz", gz(b""), "is no NIfTI file"),
    "raw cut to half": ("a.nii", content_of()[:376], "shorter than its header says"),
    "raw short by one byte": ("a.nii", content_of()[:-1], "399 bytes"),
    "zero bytes": ("a.nii", b"", "empty"),
    "zero bytes, gz": ("a.nii.gz", b"", "empty"),
    "text": ("a.nii", b"This is no image.\n" * 40, "is no NIfTI file"),
    "text as gz": ("a.nii.gz", b"This is no image.\n", "is no NIfTI file"),
    "header only": ("a.nii", header_of().binaryblock, "shorter"),
    "half a header": ("a.nii", header_of().binaryblock[:200], "is no NIfTI file"),
    "analyze": ("a.img", header_of(magic=b"").binaryblock, "Analyze"),
    "dimension 0": ("a.nii", content_of(header_of(dim=[3, 2, 0, 4, 1, 1, 1, 1])), "impossible dimensions"),
    "dimension negative": ("a.nii", content_of(header_of(dim=[3, 2, -3, 4, 1, 1, 1, 1])), "impossible dimensions"),
    "no dimensions": ("a.nii", content_of(header_of(dim=[0, 2, 3, 4, 1, 1, 1, 1])), "impossible dimensions"),
    "offset NaN": ("a.nii", content_of(header_of(vox_offset=np.nan)), "places the voxels"),
    "offset 0": ("a.nii", content_of(header_of(vox_offset=0)), "inside itself"),
    "offset negative": ("a.nii", content_of(header_of(vox_offset=-8)), "inside itself"),
    "offset far behind the file": ("a.nii", content_of(header_of(vox_offset=1e6)), "shorter"),
    "bomb": ("a.nii.gz", gz(content_of() + bytes(2**25)), "far more data"),
}


@pytest.mark.parametrize(("name", "content", "words"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = saved(tmp_path / name, content)
    if name == "a.img":
        saved(tmp_path / "a.hdr", content)
    with pytest.raises(UnreadableFile) as caught:
        nifti.read(path)
    assert words in str(caught.value)
    assert str(path.with_suffix("")) in str(caught.value)


def test_the_noisy_file_itself_is_sound(tmp_path: Path) -> None:
    np.testing.assert_array_equal(nifti.read(saved(tmp_path / "a.nii.gz", NOISY)).array[0], NOISE)


def test_a_header_that_claims_32000_cubed_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    content = content_of(header_of(dim=[3, 32000, 32000, 32000, 1, 1, 1, 1]))
    with pytest.raises(InputError, match="claims 65,536,000,000,352 bytes"):
        nifti.read(saved(tmp_path / "a.nii", content))
    # below the limit, but more than this gzip could ever expand to
    content = gz(content_of(header_of(dim=[3, 3000, 3000, 3000, 1, 1, 1, 1])))
    with pytest.raises(UnreadableFile, match="shorter than its header says"):
        nifti.read(saved(tmp_path / "a.nii.gz", content))


def test_surplus_bytes_are_reported(tmp_path: Path) -> None:
    volume = nifti.read(saved(tmp_path / "a.nii", content_of() + b"12345"))
    np.testing.assert_array_equal(volume.array[0], VOXELS)
    assert volume.warnings == ("5 bytes after the image were ignored",)


def test_a_raw_file_named_gz_and_a_gz_named_raw_are_read_by_their_content(tmp_path: Path) -> None:
    for name, content, found in (("a.nii.gz", content_of(), "is not"), ("a.nii", gz(content_of()), "is")):
        volume = nifti.read(saved(tmp_path / name, content))
        np.testing.assert_array_equal(volume.array[0], VOXELS)
        assert volume.warnings == (f"{found} compressed by gzip, other than its name says",)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "dangling.nii").symlink_to(tmp_path / "nowhere")
    for name in ("none.nii", "folder.nii", "dangling.nii"):
        with pytest.raises(UnreadableFile, match="cannot be opened"):
            nifti.read(tmp_path / name)


# Voxels that cannot be used


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.5e38])
def test_voxels_that_are_not_finite_are_counted_and_refused(tmp_path: Path, value: float) -> None:
    voxels = VOXELS.astype(np.float64)
    voxels[0, 0, :2] = value
    path = saved(tmp_path / "a.nii", content_of(header_of(datatype=64, bitpix=64), voxels))
    with pytest.raises(InputError, match="2 voxels are not finite"):
        read_volume(path)


@pytest.mark.parametrize(
    ("kind", "words"), [("RGB", "colour"), (np.complex64, "complex64"), (np.complex128, "complex128")]
)
def test_colour_and_complex_voxels_are_refused(tmp_path: Path, kind: Any, words: str) -> None:
    header = header_of()
    header.set_data_dtype(kind)
    path = saved(tmp_path / "a.nii", header.binaryblock + bytes(4 + 24 * header.get_data_dtype().itemsize))
    with pytest.raises(InputError, match=words):
        nifti.read(path)


def test_an_unknown_number_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown number type"):
        nifti.read(saved(tmp_path / "a.nii", content_of(header_of(datatype=999))))


def test_five_dimensions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="5 dimensions"):
        nifti.read(saved(tmp_path / "a.nii", content_of(header_of(dim=[5, 2, 3, 2, 1, 2, 1, 1]))))


# Geometry that cannot be used, or only with a warning


def with_sform(matrix: np.ndarray, **fields: Any) -> Nifti1Header:
    header = header_of(**fields)
    for name, row in zip(("srow_x", "srow_y", "srow_z"), matrix, strict=False):
        header[name] = row
    return header


def with_qform(**fields: Any) -> Nifti1Header:
    header = header_of()
    header.set_qform(OBLIQUE, 1)
    header["sform_code"] = 0
    for name, value in fields.items():
        header[name] = value
    return header


NAN = OBLIQUE.copy()
NAN[0, 3] = np.nan
SINGULAR = OBLIQUE.copy()
SINGULAR[:, 1] = SINGULAR[:, 0]
FLAT = np.diag([1.0, 1, 0, 1])
UNUSABLE: dict[str, tuple[Nifti1Header, str]] = {
    "neither sform nor qform": (header_of(sform_code=0), "neither sform nor qform"),
    "NaN in the affine": (with_sform(NAN), "not finite"),
    "two equal axes": (with_sform(SINGULAR), "singular"),
    "an axis of length 0": (with_sform(FLAT), "singular"),
    "pixdim 0 under a qform": (with_qform(pixdim=[1, 1, 0, 2.5, 0, 0, 0, 0]), "singular"),
    "pixdim NaN under a qform": (with_qform(pixdim=[1, 1, np.nan, 2.5, 0, 0, 0, 0]), "not finite"),
    "a quaternion of length 2": (with_qform(quatern_b=2.0), "no rotation"),
    "a quaternion of NaN": (with_qform(quatern_b=np.nan), "not finite"),
    "metres": (header_of(xyzt_units=1), "metres"),
    "micrometres": (header_of(xyzt_units=3), "micrometres"),
    "0.0001 mm": (with_sform(np.diag([1e-4, 1e-4, 1e-4, 1])), "spacing"),
    "5000 mm": (with_sform(np.diag([5000.0, 1, 1, 1])), "spacing"),
}


@pytest.mark.parametrize(("header", "words"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_unusable_geometry_is_refused(tmp_path: Path, header: Nifti1Header, words: str) -> None:
    with pytest.raises(InputError, match=words):
        nifti.read(saved(tmp_path / "a.nii", content_of(header)))


def test_the_qform_is_used_where_there_is_no_sform(tmp_path: Path) -> None:
    volume = nifti.read(saved(tmp_path / "a.nii", content_of(with_qform())))
    np.testing.assert_allclose(volume.geometry.affine, OBLIQUE, atol=1e-6)
    assert volume.warnings == ()


def test_the_sform_is_used_where_the_two_differ_and_that_is_said(tmp_path: Path) -> None:
    header = header_of()
    header.set_qform(np.diag([-1.0, 1, 1, 1]) @ OBLIQUE, 1)
    volume = nifti.read(saved(tmp_path / "a.nii", content_of(header)))
    np.testing.assert_array_equal(volume.geometry.affine, OBLIQUE.astype(np.float32))
    assert volume.warnings == ("sform and qform differ: the sform was used",)


def test_a_broken_qform_does_not_matter_beside_a_sform(tmp_path: Path) -> None:
    nifti.read(saved(tmp_path / "a.nii", content_of(header_of(qform_code=1, quatern_b=2.0))))


def test_a_sheared_grid_is_read_and_said(tmp_path: Path) -> None:
    sheared = OBLIQUE.copy()
    sheared[0, 2] = 0.8
    volume = nifti.read(saved(tmp_path / "a.nii", content_of(with_sform(sheared))))
    assert volume.geometry.is_sheared
    assert "not orthogonal" in volume.warnings[0]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 347), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_bytes_in_the_header_are_read_or_refused(tmp_path_factory: Any, changes: list[tuple[int, int]]) -> None:
    content = bytearray(content_of())
    for place, value in changes:
        content[place] = value
    path = saved(tmp_path_factory.getbasetemp() / "fuzz.nii", bytes(content))
    try:
        volume = nifti.read(path)
    except MedsegError:
        return
    assert volume.array.ndim == 4
    assert np.isfinite(volume.geometry.affine).all()


# Writing

SHEARED = OBLIQUE.copy()
SHEARED[0, 2] = 0.8


def big_endian(folder: Path) -> Path:
    header = header_of(qform_code=2).as_byteswapped(">")
    return saved(folder / "big.nii", content_of(header, VOXELS.astype(">i2")))


SOURCES: dict[str, Callable[[Path], Path]] = {
    "axial": lambda folder: image_file(folder, np.diag([-1.0, -1.0, 3.0, 1.0])),
    "oblique": image_file,
    "sheared": lambda folder: image_file(folder, SHEARED),
    "NIfTI-2": lambda folder: image_file(folder, OBLIQUE, Nifti2Image),
    "big-endian": big_endian,
    "qform only": lambda folder: saved(folder / "q.nii", content_of(with_qform())),
    "both forms, units unknown": lambda folder: saved(
        folder / "u.nii", content_of(header_of(qform_code=3, xyzt_units=0))
    ),
}
GEOMETRY = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_a_mask_has_the_affine_and_header_codes_of_its_image_bit_for_bit(
    tmp_path: Path, source: Callable[[Path], Path], ending: str
) -> None:
    path = source(tmp_path)
    mask = mask_of(path)
    write_mask(mask, tmp_path / f"mask{ending}")
    image, written = nibabel.load(path), nibabel.load(tmp_path / f"mask{ending}")
    assert written.affine.tobytes() == image.affine.tobytes()
    assert written.shape == image.shape
    assert type(written) is type(image)
    for field in GEOMETRY:
        assert np.array_equal(written.header[field], image.header[field], equal_nan=True), field
    np.testing.assert_array_equal(written.header["pixdim"][:4], image.header["pixdim"][:4])
    assert written.get_data_dtype() == np.uint8
    again = read_mask(tmp_path / f"mask{ending}")
    np.testing.assert_array_equal(again.array, VOXELS > 10)
    assert again.geometry == mask.geometry


@pytest.mark.parametrize("kind", [Nifti1Image, Nifti2Image])
def test_no_free_text_of_the_image_gets_into_the_mask(tmp_path: Path, kind: type) -> None:
    path = image_file(tmp_path, kind=kind, name="a.nii")
    assert CANARY.encode() in path.read_bytes()
    write_mask(mask_of(path), tmp_path / "mask.nii")
    assert CANARY.encode() not in (tmp_path / "mask.nii").read_bytes()
    assert CANARY.encode() not in nifti.to_nibabel(mask_of(path)).to_bytes()


def test_a_mask_without_a_header_gets_both_forms(tmp_path: Path) -> None:
    mask = Mask(np.ones((2, 3, 4), np.uint16), Geometry((2, 3, 4), OBLIQUE))
    write_mask(mask, tmp_path / "mask.nii")
    written = nibabel.load(tmp_path / "mask.nii")
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (2, 2)
    np.testing.assert_allclose(written.affine, OBLIQUE, rtol=1e-6)
    assert written.header.get_xyzt_units()[0] == "mm"
    assert written.get_data_dtype() == np.uint16


def test_a_header_of_another_grid_is_not_used(tmp_path: Path) -> None:
    mask = mask_of(image_file(tmp_path))
    moved = np.array(mask.geometry.affine)
    moved[0, 3] += 1
    write_mask(replace(mask, geometry=Geometry(mask.geometry.shape, moved)), tmp_path / "mask.nii")
    np.testing.assert_array_equal(nibabel.load(tmp_path / "mask.nii").affine, moved.astype(np.float32))


def test_writing_is_deterministic_down_to_the_byte(tmp_path: Path) -> None:
    mask = mask_of(image_file(tmp_path))
    write_mask(mask, tmp_path / "one.nii.gz")
    write_mask(mask, tmp_path / "another name.nii.gz")
    content = (tmp_path / "one.nii.gz").read_bytes()
    assert content == (tmp_path / "another name.nii.gz").read_bytes()
    assert content[3:8] == bytes(5)  # RFC 1952: no flags (so no file name), and no time


def test_an_ending_in_capitals_is_still_gzip(tmp_path: Path) -> None:
    write_mask(mask_of(image_file(tmp_path)), tmp_path / "MASK.NII.GZ")
    assert zlib.decompress((tmp_path / "MASK.NII.GZ").read_bytes(), 31)[344:348] == b"n+1\0"


def test_a_pair_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two files"):
        write_mask(mask_of(image_file(tmp_path)), tmp_path / "mask.img")


def test_a_failing_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = mask_of(image_file(tmp_path))
    out = tmp_path / "out"
    write_mask(mask, out / "mask.nii.gz")
    before = (out / "mask.nii.gz").read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_mask(replace(mask, array=1 - mask.array), out / "mask.nii.gz")
    assert (out / "mask.nii.gz").read_bytes() == before
    assert [p.name for p in out.iterdir()] == ["mask.nii.gz"]


# Names of labels


LABELS = Labels(values={"liver": 1, "liver & tumour": 700}, colours={"liver": (221, 130, 101)})


@pytest.mark.parametrize("kind", [Nifti1Image, Nifti2Image])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_mask_keeps_the_names_of_its_labels(tmp_path: Path, ending: str, kind: type) -> None:
    plain = mask_of(image_file(tmp_path, kind=kind))
    named = replace(plain, array=plain.array * np.uint16(700), labels=LABELS)
    write_mask(replace(named, labels=None), tmp_path / f"plain{ending}")
    write_mask(named, tmp_path / f"named{ending}")
    labels = nifti.labels_of(tmp_path / f"named{ending}")
    assert labels is not None
    assert labels.values == LABELS.values
    assert labels.colours == {"liver": (221, 130, 101), "liver & tumour": (86, 180, 233)}
    assert nifti.labels_of(tmp_path / f"plain{ending}") is None
    one, other = nibabel.load(tmp_path / f"plain{ending}"), nibabel.load(tmp_path / f"named{ending}")
    assert one.affine.tobytes() == other.affine.tobytes()
    np.testing.assert_array_equal(np.asanyarray(one.dataobj), np.asanyarray(other.dataobj))
    np.testing.assert_array_equal(nifti.read(tmp_path / f"named{ending}").array[0], named.array)
    (extension,) = other.header.extensions
    assert (extension.get_code(), extension.get_sizeondisk() % 16) == (30, 0)
    offset = one.header["sizeof_hdr"] + 4 + extension.get_sizeondisk()
    assert int(other.header["vox_offset"] or offset) == offset
    if kind is Nifti1Image:  # ITK reads no NIfTI-2
        itk = pytest.importorskip("SimpleITK").ReadImage(str(tmp_path / f"named{ending}"))
        np.testing.assert_array_equal(io.volume_of(itk).array[0], named.array)


def test_only_the_place_of_the_voxels_differs_in_the_header(tmp_path: Path) -> None:
    mask = mask_of(image_file(tmp_path))
    write_mask(mask, tmp_path / "plain.nii")
    write_mask(replace(mask, labels=LABELS), tmp_path / "named.nii")
    plain, named = (tmp_path / "plain.nii").read_bytes(), (tmp_path / "named.nii").read_bytes()
    offset = int(np.frombuffer(named, np.float32, 1, 108)[0])  # vox_offset of NIfTI-1
    assert (named[:108], named[112:348]) == (plain[:108], plain[112:348])
    assert (plain[348:352], named[348:352]) == (b"\0\0\0\0", b"\1\0\0\0")
    assert np.frombuffer(named, np.int32, 2, 352).tolist() == [offset - 352, 30]
    assert named[offset:] == plain[352:]


def test_a_nibabel_image_has_the_names_too(tmp_path: Path) -> None:
    mask = replace(mask_of(image_file(tmp_path)), labels=LABELS)
    nibabel.save(nifti.to_nibabel(mask), tmp_path / "mask.nii.gz")
    labels = nifti.labels_of(tmp_path / "mask.nii.gz")
    assert labels is not None
    assert labels.values == LABELS.values


def extended(*extensions: tuple[int, bytes], order: str = "<") -> bytes:
    """A file with extensions of a code and content each, padded as the standard wants it."""
    parts = b""
    for code, content in extensions:
        padded = content + bytes(-(len(content) + 8) % 16)
        parts += np.array([len(padded) + 8, code], f"{order}i4").tobytes() + padded
    header = header_of(vox_offset=352 + len(parts)).as_byteswapped(order)
    return header.binaryblock + b"\1\0\0\0" + parts + VOXELS.astype(f"{order}i2").tobytes(order="F")


FOREIGN = b"""<?xml version="1.0" encoding="UTF-8"?> <CaretExtension> <Date><![CDATA[2013-07-14]]></Date>
<VolumeInformation Index="0"> <LabelTable>
<Label Key="0" Red="1" Green="1" Blue="1" Alpha="0"><![CDATA[???]]></Label>
<Label Key="5" Red="1.0" Green="0.5019607843137255" Blue="0.0" Alpha="1"><![CDATA[spleen]]></Label>
</LabelTable> <VolumeType><![CDATA[Label]]></VolumeType> </VolumeInformation></CaretExtension>
"""


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("code", [0, 30])
def test_names_by_another_program_are_read(tmp_path: Path, code: int, order: str) -> None:
    content = extended((6, b"a comment"), (code, FOREIGN), order=order)
    labels = nifti.labels_of(saved(tmp_path / "a.nii", content))
    assert labels == Labels(values={"spleen": 5}, colours={"spleen": (255, 128, 0)})


def test_the_extension_of_its_own_code_goes_first(tmp_path: Path) -> None:
    content = extended((0, FOREIGN.replace(b"spleen", b"old")), (30, FOREIGN))
    labels = nifti.labels_of(saved(tmp_path / "a.nii", content))
    assert labels is not None
    assert labels.names == ("spleen",)


def test_a_pair_has_its_extensions_in_the_header_file(tmp_path: Path) -> None:
    content = extended((30, FOREIGN))
    header = header_of(magic=b"ni1", vox_offset=0).binaryblock
    saved(tmp_path / "a.hdr", header + content[348 : -VOXELS.nbytes])
    saved(tmp_path / "a.img", VOXELS.tobytes(order="F"))
    labels = nifti.labels_of(tmp_path / "a.img")
    assert labels is not None
    assert labels.names == ("spleen",)


def test_too_many_letters_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = Labels(values={"a" * 100_000: 1})
    write_mask(replace(mask_of(image_file(tmp_path)), labels=labels), tmp_path / "mask.nii")
    assert nifti.labels_of(tmp_path / "mask.nii") is None
    assert "too long" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        extended((4, FOREIGN)),  # AFNI's
        extended((30, b"<LabelTable>")),
        extended((30, b"\xff" + FOREIGN)),
        content_of()[:348],
        content_of()[:348] + b"\1\0\0\0" + np.array([2**31 - 16, 30], "<i4").tobytes(),
        content_of(header_of(vox_offset=384))[:348] + b"\1\0\0\0" + np.array([-32, 30], "<i4").tobytes() + bytes(48),
        content_of(header_of(vox_offset=384))[:348] + b"\1\0\0\0" + np.array([0, 30], "<i4").tobytes() + bytes(48),
        content_of(header_of(vox_offset=np.nan))[:348] + b"\1\0\0\0",
    ],
    ids=["another's", "no XML", "no UTF-8", "the end", "too large", "negative", "empty", "no offset"],
)
def test_what_is_no_label_table_gives_no_names(tmp_path: Path, content: bytes) -> None:
    assert nifti.labels_of(saved(tmp_path / "a.nii", content)) is None


# Images in memory


def test_a_nibabel_image_in_and_out(tmp_path: Path) -> None:
    image = nibabel.load(image_file(tmp_path))
    volume = nifti.from_nibabel(image)
    np.testing.assert_array_equal(volume.array[0], VOXELS)
    out = nifti.to_nibabel(Mask(volume.array[0], volume.geometry, header=volume.header))
    assert out.affine.tobytes() == image.affine.tobytes()
    for field in GEOMETRY:
        np.testing.assert_array_equal(out.header[field], image.header[field])
    np.testing.assert_array_equal(out.dataobj, VOXELS)


def test_a_nibabel_image_keeps_a_qform_only_header(tmp_path: Path) -> None:
    mask = mask_of(saved(tmp_path / "q.nii", content_of(with_qform())))
    out = nifti.to_nibabel(mask)
    assert (int(out.header["sform_code"]), int(out.header["qform_code"])) == (0, 1)
    assert out.affine.tobytes() == mask.geometry.affine.tobytes()


def test_a_nibabel_image_of_channels_last() -> None:
    image = Nifti1Image(np.stack([VOXELS, VOXELS], -1), OBLIQUE)
    assert nifti.from_nibabel(image).array.shape == (2, 2, 3, 4)


@pytest.mark.parametrize(
    ("voxels", "affine", "words"),
    [
        (VOXELS.astype(np.complex64), OBLIQUE, "complex64"),
        (np.zeros((1, 1, 1, 1, 2), np.int16), OBLIQUE, "5 dimensions"),
        (VOXELS, SINGULAR, "singular"),
        (VOXELS, None, "no affine"),
    ],
)
def test_an_unusable_nibabel_image_is_refused(voxels: np.ndarray, affine: np.ndarray | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        nifti.from_nibabel(Nifti1Image(voxels, affine))


# Real files


@pytest.fixture
def oddities() -> Path:
    folder = os.environ.get("MEDSEG_TEST_DATA")
    if not folder:
        pytest.skip("MEDSEG_TEST_DATA names no folder of real data")
    return Path(folder) / "nifti_oddities"


REAL = [
    ("avg152T1_LR_nifti.nii", (91, 109, 91), "LAS"),
    ("avg152T1_LR_nifti.nii.gz", (91, 109, 91), "LAS"),
    ("avg152T1_LR_nifti2.nii.gz", (91, 109, 91), "LAS"),
    ("big.nii.gz", (64, 64, 21), "LAS"),
    ("little.nii.gz", (64, 64, 21), "LAS"),
    ("air2.hdr.gz", (79, 67, 64), "AIR"),
    ("air2.img.gz", (79, 67, 64), "AIR"),
    ("with_extension.nii.gz", (161, 191, 151), "LPI"),
]


@pytest.mark.parametrize(("name", "shape", "orientation"), REAL, ids=[r[0] for r in REAL])
def test_real_oddities_are_read_as_nibabel_reads_them(
    oddities: Path, name: str, shape: tuple[int, ...], orientation: str
) -> None:
    volume = nifti.read(oddities / name)
    assert volume.geometry.shape == shape
    assert volume.geometry.orientation == orientation
    image = nibabel.load(oddities / name)
    assert volume.geometry.affine.tobytes() == image.affine.astype(np.float64).tobytes()
    np.testing.assert_array_equal(volume.array[0], np.asanyarray(image.dataobj).reshape(shape))


def test_real_endian_twins_hold_the_same_image(oddities: Path) -> None:
    big, little = nifti.read(oddities / "big.nii.gz"), nifti.read(oddities / "little.nii.gz")
    np.testing.assert_array_equal(big.array, little.array)
    assert big.geometry.close_to(little.geometry)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("5D_small.nii", "5 dimensions"),
        ("5D_zeros.nii.gz", "5 dimensions"),
        ("rgb_test_file.nii.gz", "colour"),
        ("not-nifti.nii", "is no NIfTI"),
    ],
)
def test_real_oddities_are_refused(oddities: Path, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        nifti.read(oddities / name)


# Probabilities, block by block


def of_uint8(array: np.ndarray) -> Mask:
    geometry = Geometry(array.shape, np.diag([0.75, 0.75, 2.0, 1.0]))
    return Mask(array.astype(np.uint8), geometry)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_probabilities_come_back_whichever_way_the_blocks_lie(axis: int, tmp_path: Path) -> None:
    shape = (7, 6, 5)
    values = np.random.default_rng(0).random((2, *shape)).astype(np.float32)
    mask = of_uint8(np.zeros(shape))
    with Probabilities(shape, 2, tmp_path) as taken:
        for start in range(0, shape[axis], 2):
            place = tuple(slice(start, start + 2) if n == axis else slice(None) for n in range(3))
            taken.put(place, values[(slice(None), *place)])
        for index in range(2):
            taken.write(index, mask, tmp_path / f"{index}.nii.gz")
    for index in range(2):
        image = nibabel.load(tmp_path / f"{index}.nii.gz")
        assert image.get_data_dtype() == np.uint16
        assert np.abs(image.get_fdata() - values[index]).max() < 1 / 65535
        np.testing.assert_array_equal(image.affine, mask.geometry.affine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.nii.gz", "1.nii.gz"]


def test_where_no_probability_is_put_it_is_0_and_0_and_1_are_exact(tmp_path: Path) -> None:
    mask = of_uint8(np.zeros((4, 4, 4)))
    with Probabilities((4, 4, 4), 1, tmp_path) as taken:
        taken.write(0, mask, tmp_path / "none.nii.gz")
        taken.put((slice(1, 2), slice(0, 4), slice(0, 4)), np.ones((1, 1, 4, 4), np.float32))
        taken.write(0, mask, tmp_path / "some.nii.gz")
    assert nibabel.load(tmp_path / "none.nii.gz").get_fdata().max() == 0
    found = nibabel.load(tmp_path / "some.nii.gz").get_fdata()
    assert set(np.unique(found)) == {0.0, 65535 * np.float64(np.float32(1 / 65535))}
    assert found[1].min() > 0.9999999


def test_a_disk_without_room_for_probabilities_is_an_error_at_once(monkeypatch: Any, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        Probabilities((4, 4, 4), 1, tmp_path)
    assert list(tmp_path.iterdir()) == []


# Lean reading


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_reading_takes_little_more_than_the_stored_voxels(ending: str, tmp_path: Path) -> None:
    """16 MB of int16 are read in less than 24 MB, and written in less than 12 MB beside them."""
    voxels = np.random.default_rng(0).integers(-1000, 1000, (128, 256, 256)).astype(np.int16)
    path = tmp_path / f"a{ending}"
    tracemalloc.start()
    nifti.write_volume(Volume(voxels[np.newaxis], Geometry(voxels.shape, np.eye(4))), path)
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    volume = read_volume(path)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array[0], voxels)
    assert peak < 1.5 * voxels.nbytes
    assert written < 0.75 * voxels.nbytes


def test_scaled_voxels_are_float32(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii", content_of(header_of(scl_slope=0.5, scl_inter=-3)))
    found = nifti.read(path).array
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0], VOXELS * 0.5 - 3)


def test_an_outline_has_grid_and_type_and_takes_no_memory(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.ones((4, 5, 6, 2), np.int16), np.diag([1, 2, 3, 1]))
    nibabel.save(image, tmp_path / "a.nii.gz")
    outline, whole = io.outline([tmp_path / "a.nii.gz"]), read_volume(tmp_path / "a.nii.gz")
    assert outline is not None
    assert (outline.array.shape, outline.array.dtype) == (whole.array.shape, np.int16)
    assert outline.array.nbytes == whole.array.nbytes
    assert outline.array.strides == (0, 0, 0, 0)
    assert outline.geometry == whole.geometry
    two = io.outline([tmp_path / "a.nii.gz"] * 2)
    assert two is not None
    assert two.array.shape == (4, 4, 5, 6)
    assert io.outline([tmp_path / "a.png"]) is None
    with pytest.raises(UnreadableFile):
        io.outline([saved(tmp_path / "b.nii", b"nothing")])
