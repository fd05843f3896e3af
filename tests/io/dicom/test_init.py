"""medseg.io.dicom: series as they lie in folders and zips, compared with ground truths and with SimpleITK."""

from __future__ import annotations

import itertools
import logging
import pickle
import re
import shutil
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from dicoms import affine_of, write_enhanced, write_series
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from medseg.errors import IncompleteSeries, InputError, UnreadableFile
from medseg.geometry import Geometry
from medseg.io import dicom
from medseg.io.dicom import segmentation
from medseg.io.dicom.archive import Instance, Reader
from medseg.io.dicom.frames import uid_of
from medseg.volume import Labels, Mask, Volume

ARRAY = np.random.default_rng(0).integers(-1000, 3000, (6, 5, 4), dtype=np.int16)
ACCEPTED = (
    *("ge/anatomical/001", "ge/anatomical/001_implicit", "ge/anatomical/001_single_slice", "generic/anatomical/001"),
    *("generic/anatomical/001_implicit", "generic/anatomical/002_non_isotropic", "generic/compressed/001"),
    *("generic/compressed_j2k/001", "generic/compressed_jpeg/001", "generic/compressed_jpegls/001"),
    *("generic/compressed_rle/001", "hitachi/anatomical/001", "hitachi/anatomical/001_implicit"),
    *("hyperfine/anatomical/001", "philips_enhanced/anatomical/001", "philips_enhanced/anatomical/001_implicit"),
    *("siemens/anatomical/001", "siemens/anatomical/001_implicit", "siemens_multiframe/anatomical/001"),
    "two_slices/001",
)
REFUSED = {
    "gantrytilting": "a gantry tilt of 14.0 degrees",
    "notavolume": "4 images at the one position 61.50 mm",
    "sliceincrement": "usually 5.00 mm, but 10.00 mm from 28.11 to 38.11",
    "sliceorientation": "slices of 2 orientations, as those of a localizer",
}


def corners(geometry: Geometry) -> NDArray[np.float64]:
    return geometry.world(np.array(list(itertools.product(*((0, n - 1) for n in geometry.shape))), dtype=float))


def same(volume: Volume, array: NDArray[Any], affine: NDArray[np.float64], tolerance: float = 1e-3) -> None:
    """The volume has the voxels of an array at the same places of the world, in any order of axes."""
    other = Geometry(array.shape, affine)
    turn, back = volume.geometry.to("RAS"), other.to("RAS")
    np.testing.assert_allclose(
        corners(volume.geometry.reoriented(turn)), corners(other.reoriented(back)), rtol=0, atol=tolerance
    )
    found, expected = turn.apply(volume.array[0]), back.apply(array)
    if found.dtype.kind in "iu":
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=3e-7)  # float32 of what others keep in float64


def the(place: Path) -> dicom.Series:
    (series,) = dicom.scan(place).series
    return series


def oracle(folder: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Array (I, J, K) and RAS+ affine as SimpleITK reads a folder."""
    import SimpleITK

    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).T, np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("kind", ["ground_truth", "ground_truth_reoriented"])
def test_real_series_become_their_ground_truths(name: str, kind: str, real_data: Path) -> None:
    folder = real_data / "dicom/accept" / name
    truth = nibabel.load(folder.with_name(f"{folder.name}_{kind}.nii.gz"))
    array = np.asanyarray(truth.dataobj)
    volume = dicom.read(folder)
    same(volume, array.reshape(array.shape[:3]), truth.affine)
    assert (volume.array.dtype.kind == "f") == (array.dtype.kind == "f")
    assert dicom.reading_bytes(volume.header) >= volume.array.nbytes


def test_every_real_series_is_tried(real_data: Path) -> None:
    root = real_data / "dicom/accept"
    folders = {path.parent.relative_to(root) for path in root.rglob("*") if path.is_file() and ".nii" not in path.name}
    assert {folder.as_posix() for folder in folders} == {*ACCEPTED}


@pytest.mark.parametrize("name", REFUSED)
def test_real_series_that_are_no_volume(name: str, real_data: Path) -> None:
    folder = real_data / "dicom/refuse" / name
    with pytest.raises(IncompleteSeries, match=REFUSED[name]):
        dicom.read(folder)


def test_the_slices_of_a_tilted_real_series_stay_where_they_are(real_data: Path) -> None:
    series = the(real_data / "dicom/refuse/gantrytilting")
    volume = dicom.read_series(series.resampled())
    assert volume.geometry.is_sheared
    for k, header in enumerate(dicom.headers(series)):
        x, y, z = (float(v) for v in header.ImagePositionPatient)
        np.testing.assert_allclose(volume.geometry.world(np.array([[0.0, 0, k]])), [[-x, -y, z]], atol=1e-3)
    assert any("tilt" in warning for warning in volume.warnings)


def test_a_study_of_two_series(real_data: Path) -> None:
    found = dicom.scan(real_data / "dicom/study_multi_series")
    sizes = {series.geometry.shape: series for series in found.series if series.geometry}
    assert set(sizes) == {(512, 512, 22), (35, 51, 32)}
    assert not found.passed_over
    with pytest.raises(InputError, match="2 series could be meant") as error:
        dicom.select(found)
    assert all(series.name in str(error.value) for series in found.series)
    assert not any(series.description in str(error.value) for series in found.series)
    crop = sizes[35, 51, 32]
    for pattern in (crop.uid, crop.name, crop.description.upper(), f"{crop.description[:3]}*"):
        assert dicom.select(found, pattern) == [crop]
    np.testing.assert_allclose(sizes[512, 512, 22].geometry.spacing, (0.4297, 0.4297, 6.5), atol=1e-4)


unit = st.floats(-1, 1)


@settings(max_examples=15)
@given(
    st.tuples(unit, unit, unit, unit).filter(lambda q: sum(v * v for v in q) > 0.1),
    st.tuples(*[st.floats(0.3, 7.0)] * 3),
    st.tuples(*[st.floats(-500, 500)] * 3),
    st.booleans(),
    st.booleans(),
)
def test_any_orientation_spacing_and_place(
    tmp_path_factory: pytest.TempPathFactory,
    quaternion: tuple[float, ...],
    spacing: tuple[float, ...],
    origin: tuple[float, ...],
    down: bool,
    enhanced: bool,
) -> None:
    folder = tmp_path_factory.mktemp("series")
    w, x, y, z = np.array(quaternion) / np.linalg.norm(quaternion)
    row = (1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w))
    column = (2 * (x * y - z * w), 1 - 2 * (x * x + z * z), 2 * (y * z + x * w))
    step = np.cross(row, column) * spacing[2] * (-1 if down else 1)
    geometry: dict[str, Any] = {"row": row, "column": column, "spacing": spacing, "origin": origin, "step": step}
    (write_enhanced if enhanced else write_series)(folder, ARRAY, **geometry)
    volume = dicom.read(folder)
    same(volume, ARRAY, affine_of(**geometry))
    normal = np.cross(row, column) * (-1, -1, 1)  # of LPS, in RAS
    assert volume.geometry.direction[:, 2] @ normal > 0.999
    if not enhanced:
        same(volume, *oracle(folder))
    shutil.rmtree(folder)


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_slopes_that_differ_from_slice_to_slice(modality: str, tmp_path: Path) -> None:
    slopes, intercepts = (0.5, 1, 2.25, 3), (0, -7, 0.5, 1)
    write_series(tmp_path, ARRAY, modality=modality, slope=slopes, intercept=intercepts)
    volume = dicom.read(tmp_path)
    assert volume.array.dtype == np.float32
    same(volume, ARRAY * np.array(slopes) + intercepts, affine_of())


def test_a_zip_is_read_as_its_folder(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "in", ARRAY, syntax=RLELossless)
    with zipfile.ZipFile(tmp_path / "study.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for n, path in enumerate(paths):
            archive.write(path, f"folder {n % 2}/JANE DOE {n}.dcm")
    series = the(tmp_path / "study.zip")
    same(dicom.read_series(series), ARRAY, affine_of())
    assert series.files == (tmp_path / "study.zip",)
    assert series.name == the(tmp_path / "in").name
    assert "JANE" not in series.name
    assert [float(header.ImagePositionPatient[2]) for header in dicom.headers(series)] == [0, 1, 2, 3]
    same(dicom.read(tmp_path / "in"), ARRAY, affine_of())


def test_one_file_and_what_is_none(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path, ARRAY[:, :, :1])
    volume = dicom.read(path)
    assert volume.array.shape == (1, 6, 5, 1)
    assert volume.warnings == ("one slice",)
    assert dicom.is_dicom(path)
    (tmp_path / "text.dcm").write_bytes(b"no DICOM")
    assert not dicom.is_dicom(tmp_path / "text.dcm")
    assert not dicom.is_dicom(tmp_path / "nothing")
    with pytest.raises(InputError, match="1 x no DICOM in spite of its name"):
        dicom.read(tmp_path / "text.dcm")
    with pytest.raises(InputError, match="no such file"):
        dicom.scan(tmp_path / "nothing")


def test_a_slice_of_several_is_no_volume_however_it_is_given(tmp_path: Path) -> None:
    """Beside it lie the other slices, between files of another series and what is no DICOM; copies are not others."""
    path, *others = write_series(tmp_path / "in", ARRAY, uid="1.2.3.1", study_uid="1.2.3")
    for other in write_series(tmp_path / "b", ARRAY, uid="1.2.3.2", study_uid="1.2.3"):
        other.rename(tmp_path / "in" / f"{other.stem}b.dcm")
    (tmp_path / "in" / "notes.txt").write_text("none")
    (series,) = dicom.scan(path).series
    assert (series.geometry, series.files) == (None, (path,))
    with pytest.raises(IncompleteSeries, match=r"1\.2\.3\.1: is one slice of a series of several files\. Give"):
        dicom.read(path)
    for other in others:
        other.unlink()
    shutil.copy(path, path.with_name("copy.dcm"))
    assert dicom.read(path).array.shape == (1, 6, 5, 1)


def test_a_series_of_several_multi_frame_files(tmp_path: Path) -> None:
    frame_uid = "1.2.3.4"

    def change(dataset: Dataset, k: int) -> None:
        dataset.FrameOfReferenceUID = frame_uid

    first: dict[str, Any] = {"uid": "1.2.3", "study_uid": "1.2", "change": change}
    write_enhanced(tmp_path / "a", ARRAY[:, :, 2:], origin=(0, 0, 2), **first)
    write_enhanced(tmp_path / "b", ARRAY[:, :, :2], **first)
    series = the(tmp_path)
    assert len(series.instances) == 2
    assert len(series.frames) == 4
    same(dicom.read_series(series), ARRAY, affine_of())


def test_what_lies_beside_a_series_is_counted(tmp_path: Path) -> None:
    write_series(tmp_path / "series", ARRAY)

    def captured(dataset: Dataset, k: int) -> None:
        dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"

    write_series(tmp_path / "captures", ARRAY, change=captured)
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    found = dicom.scan(tmp_path)
    assert found.passed_over == {"no DICOM": 1, "secondary capture": 4}
    assert len(found.series) == 1
    assert found.place == tmp_path


def test_copies_are_left_out_and_others_with_their_uid_refused(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "a", ARRAY)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    volume = dicom.read(tmp_path)
    same(volume, ARRAY, affine_of())
    assert volume.warnings == ("4 files are copies of others and left out",)
    content = bytearray((tmp_path / "b" / paths[0].name).read_bytes())
    content[-1] ^= 1
    (tmp_path / "b" / paths[0].name).write_bytes(content)
    names = f"as a/{paths[0].name} and b/{paths[0].name}"
    with pytest.raises(IncompleteSeries, match=f"have one SOP Instance UID and differ, {re.escape(names)}"):
        dicom.read(tmp_path)


@pytest.mark.parametrize("changed", [False, True])
def test_an_instance_stored_raw_and_compressed(changed: bool, tmp_path: Path) -> None:
    """As archives export: one UID, one image, two transfer syntaxes."""

    def named(dataset: Dataset, k: int) -> None:
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k}"
        dataset.FrameOfReferenceUID = "1.2.9"

    shared: dict[str, Any] = {"uid": "1.2.3", "study_uid": "1.2", "change": named}
    other = ARRAY.copy()
    other[2, 2, 2] += changed
    write_series(tmp_path / "raw", ARRAY, **shared)
    write_series(tmp_path / "compressed", other, syntax=JPEG2000Lossless, **shared)
    if changed:
        with pytest.raises(IncompleteSeries, match="have one SOP Instance UID and differ"):
            dicom.read(tmp_path)
        return
    volume = dicom.read(tmp_path)
    same(volume, ARRAY, affine_of())
    assert volume.warnings == ("4 files are copies of others and left out",)


def lacking(*keywords: str, slices: tuple[int, ...] = (2,)) -> Any:
    def change(dataset: Dataset, k: int) -> None:
        for keyword in keywords if k in slices else ():
            del dataset[keyword]

    return change


@pytest.mark.parametrize("keywords", [("RescaleSlope", "RescaleIntercept"), ("RescaleIntercept",)])
def test_a_slice_without_the_scale_of_the_others(keywords: tuple[str, ...], tmp_path: Path) -> None:
    """Read as it is stored, it would be 1024 HU off."""
    write_series(tmp_path / "a", ARRAY, intercept=-1024, change=lacking(*keywords))
    with pytest.raises(UnreadableFile, match="1 of 4 slices have no rescale intercept, and the others have one"):
        dicom.read(tmp_path / "a")
    write_series(tmp_path / "b", ARRAY, modality="PT", slope=3, change=lacking("RescaleSlope"))
    with pytest.raises(UnreadableFile, match="1 of 4 slices have no rescale slope"):
        dicom.read(tmp_path / "b")
    write_series(tmp_path / "c", ARRAY, change=lacking(*keywords))  # the others have 1 and 0
    same(dicom.read(tmp_path / "c"), ARRAY, affine_of())


def test_a_table_that_one_slice_has(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        del dataset.RescaleSlope, dataset.RescaleIntercept
        if k == 2:
            item = Dataset()
            item.add_new("LUTDescriptor", "SS", [2, 0, 16])
            item.ModalityLUTType = "HU"
            item.add_new("LUTData", "OW", bytes(4))
            dataset.ModalityLUTSequence = [item]

    write_series(tmp_path, ARRAY, change=change)
    with pytest.raises(UnreadableFile, match="1 of 4 slices have a table of modality values"):
        dicom.read(tmp_path)


PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")


def test_a_page_that_lies_nowhere_is_left_out(tmp_path: Path) -> None:
    array = np.arange(8 * 5 * 4, dtype=np.int16).reshape(4, 5, 8)
    write_series(tmp_path / "a", array, change=lacking(*PLACE, slices=(7,)))
    volume = dicom.read(tmp_path / "a")
    same(volume, array[:, :, :7], affine_of())
    assert volume.warnings == ("1 files have no position, orientation and pixel spacing that can be used: left out",)
    write_series(tmp_path / "b", array, change=lacking(*PLACE, slices=(3,)))  # a slice: it leaves a gap
    with pytest.raises(IncompleteSeries, match="uneven"):
        dicom.read(tmp_path / "b")
    for name, slices, count in (("three", (5, 6, 7), 8), ("few", (4,), 5)):
        write_series(tmp_path / name, array[:, :, :count], change=lacking(*PLACE, slices=slices))
        with pytest.raises(IncompleteSeries, match=f"{len(slices)} of {count} slices have no position"):
            dicom.read(tmp_path / name)


def test_files_without_true_uids_are_read(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"ID_JANE{k}"
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = "ID_JANE_series", "../JANE"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = write_series(tmp_path, ARRAY, change=change)
    series = the(tmp_path)
    volume = dicom.read_series(series)
    same(volume, ARRAY, affine_of())
    assert volume.warnings == ("its UIDs are none of DICOM: digests stand for them",)
    labels = Labels(values={"organ": 1})
    mask = Mask(np.ones(volume.array.shape[1:], np.uint8), volume.geometry, labels=labels, header=series)
    with pytest.raises(InputError, match="the images have no true UIDs to refer to"):
        segmentation.write(mask, tmp_path / "seg.dcm", allow_uncoded=True)
    assert dicom.select(dicom.scan(tmp_path), series.uid)[0].key == series.uid
    assert "JANE" not in f"{series!r}{series.name}".replace(str(tmp_path), "")
    content = paths[3].read_bytes()
    paths[3].write_bytes(content[: content.index(b"\x28\x00\x10\x00US")])  # damaged, and still of its series
    with pytest.raises(IncompleteSeries, match="1 of its files cannot be read"):
        dicom.read(tmp_path)


def test_whose_a_damaged_file_is(tmp_path: Path) -> None:
    (tmp_path / "cut.dcm").write_bytes(bytes(128) + b"DICM" + b" 1.2.3.77 1.2.3.5\0ID_x\0")
    uids = {f"1.2.3.{n}" for n in range(60)} | {uid_of("ID_x"), "1.2.3.7", "2.3.77"}
    with Reader() as reader:
        found = dicom._owners([Instance(tmp_path / "cut.dcm")], uids, reader)
        nobody = dicom._owners([Instance(tmp_path / "cut.dcm")], {"1.2"}, reader)
    assert found == {"1.2.3.5": 1, uid_of("ID_x"): 1}
    assert nobody == {"": 1}


def test_a_frame_of_reference_of_its_own_in_every_file(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.FrameOfReferenceUID = f"1.2.{k}"

    write_series(tmp_path, ARRAY, change=change)
    series = the(tmp_path)
    assert series.frame_uid == ""
    volume = dicom.read_series(series)
    same(volume, ARRAY, affine_of())
    assert volume.warnings == ("4 frames of reference in one series: taken as none",)


def test_no_photometric_interpretation_is_warned_of(tmp_path: Path) -> None:
    write_series(tmp_path, ARRAY, change=lacking("PhotometricInterpretation", slices=(0, 1, 2, 3)))
    volume = dicom.read(tmp_path)
    same(volume, ARRAY, affine_of())
    assert volume.warnings == ("no Photometric Interpretation: taken as MONOCHROME2",)


def test_several_frames_of_reference(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.FrameOfReferenceUID = f"1.2.{k // 2}"

    write_series(tmp_path, ARRAY, change=change)
    with pytest.raises(IncompleteSeries, match="several frames of reference"):
        dicom.read(tmp_path)


def test_a_damaged_file_is_missed_by_its_series(tmp_path: Path) -> None:
    paths = write_series(tmp_path, ARRAY)
    content = paths[3].read_bytes()
    paths[3].write_bytes(content[: content.index(b"\x28\x00\x10\x00US")])  # before Rows
    with pytest.raises(IncompleteSeries, match="1 of its files cannot be read"):
        dicom.read(tmp_path)
    paths[3].write_bytes(content[:200])  # before the UID of its series
    volume = dicom.read(tmp_path)
    assert volume.array.shape[3] == 3
    assert volume.warnings == ("1 files or folders beside its own cannot be read: slices may be missing at its ends",)
    paths[3].write_bytes(content[:-3])
    with pytest.raises(UnreadableFile, match="57 bytes of pixels where its header says 60"):
        dicom.read(tmp_path)


@pytest.mark.parametrize(
    ("modality", "unit", "turned"), [("MR", "", True), ("MR", "US", True), ("CT", "HU", False), ("MR", "T1", False)]
)
def test_where_0_is_white(modality: str, unit: str, turned: bool, tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.PhotometricInterpretation = "MONOCHROME1"
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, 0, unit

    write_series(tmp_path, ARRAY, modality=modality, change=change)
    volume = dicom.read(tmp_path)
    same(volume, -1 - ARRAY if turned else ARRAY, affine_of())  # -32768 to 32767
    assert "MONOCHROME1" in volume.warnings[0]


def test_padding_keeps_its_value_and_a_ct_without_intercept_is_warned_of(tmp_path: Path) -> None:
    array = ARRAY.copy()
    array[0] = -2000

    def change(dataset: Dataset, k: int) -> None:
        dataset.add_new("PixelPaddingValue", "SS", -2000)

    write_series(tmp_path / "a", array, intercept=-1024, change=change)
    volume = dicom.read(tmp_path / "a")
    assert (volume.array[0, 0] == -3024).all()

    def without(dataset: Dataset, k: int) -> None:
        del dataset.RescaleSlope, dataset.RescaleIntercept

    write_series(tmp_path / "b", array, change=without)
    assert dicom.read(tmp_path / "b").warnings == ("CT without rescale intercept: values may not be Hounsfield units",)


def test_a_slope_of_0_erases_an_image(tmp_path: Path) -> None:
    write_series(tmp_path / "a", ARRAY, slope=0, intercept=3)
    with pytest.raises(UnreadableFile, match="slope is 0"):
        dicom.read(tmp_path / "a")
    write_series(tmp_path / "b", ARRAY, slope=(1, 2, 3, 0), intercept=0.5)  # an empty slice of PET
    same(dicom.read(tmp_path / "b"), ARRAY * np.array((1, 2, 3, 0)) + 0.5, affine_of())


def test_uneven_slices_on_an_even_grid_and_back(tmp_path: Path) -> None:
    array = np.broadcast_to(np.array([0, 10, 20, 40], np.int16), (3, 2, 4))
    write_series(tmp_path, array, offsets=[0, 1, 2, 4])
    series = the(tmp_path)
    assert series.geometry is None
    with pytest.raises(IncompleteSeries, match="Give --resample-irregular"):
        dicom.read_series(series)
    even = series.resampled()
    volume = dicom.read_series(even)
    assert volume.array.dtype == np.float32
    assert volume.array[0, 0, 0].tolist() == [0, 10, 20, 30, 40]  # the missing one between its neighbours
    np.testing.assert_allclose(volume.geometry.affine, affine_of())
    assert "interpolated" in volume.warnings[0]
    mask = np.broadcast_to(np.arange(5), (3, 2, 5))
    assert dicom.to_slices(even, mask)[0, 0].tolist() == [0, 1, 2, 4]
    slices = np.broadcast_to(np.array([5, 6, 7, 8]), (3, 2, 4))
    assert dicom.from_slices(even, slices)[0, 0].tolist() == [5, 6, 7, 7, 8]  # at 3 mm the first of two
    assert dicom.reading_bytes(even) >= volume.array.nbytes + array.size * 4
    assert dicom.reading_bytes(series) == 0


def test_tilted_slices_are_read_as_they_lie(tmp_path: Path) -> None:
    write_series(tmp_path, ARRAY, step=(0, 1, 3))
    (series,) = dicom.select(dicom.scan(tmp_path), resample_irregular=True)
    volume = dicom.read_series(series)
    same(volume, ARRAY, affine_of(step=(0, 1, 3)))
    assert volume.array.dtype == np.int16
    assert dicom.to_slices(series, ARRAY) is ARRAY
    assert dicom.from_slices(series, ARRAY) is ARRAY


def test_what_resampling_cannot_mend(tmp_path: Path) -> None:
    write_series(tmp_path, ARRAY, offsets=[0, 1, 2, 2])
    with pytest.raises(IncompleteSeries, match="positions have"):
        the(tmp_path).resampled()
    write_series(tmp_path / "even", ARRAY, uid="1.2.3")
    (even,) = dicom.select(dicom.scan(tmp_path), "1.2.3", resample_irregular=True)
    assert even.resampled() is even


def test_what_a_pattern_means(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def described(text: str) -> Any:
        def change(dataset: Dataset, k: int) -> None:
            dataset.SeriesDescription, dataset.EchoTime = text, k // 2 + 1

        return change

    write_series(tmp_path / "a", ARRAY, uid="1.1", study_uid="1", change=described("T1 native"))
    write_series(tmp_path / "b", ARRAY, uid="1.2", study_uid="1", offsets=[0, 1, 0, 1], change=described("T2 [JANE]"))
    write_series(tmp_path / "c", ARRAY, uid="1.3", study_uid="1", offsets=[0, 1, 5, 6], change=described("T1 gap"))
    write_series(tmp_path / "d", ARRAY, uid="2.1", study_uid="2", change=described("t1 NATIVE"))
    write_series(tmp_path / "e", ARRAY, uid="3.1", study_uid="3", offsets=[0, 1, 5, 6], change=described("T1 native"))
    found = dicom.scan(tmp_path)

    def keys(pattern: str) -> list[str]:
        return [series.key for series in dicom.select(found, pattern)]

    assert keys("1.2[EchoTime=2]") == ["1.2[EchoTime=2]"]
    assert keys("T1 NATIVE") == ["1.1", "2.1", "3.1"]  # 3.1 fails alone, when it is read
    assert keys("t1*") == ["1.1", "2.1", "3.1"]  # the usable one of study 1
    with caplog.at_level(logging.WARNING, "medseg"):
        assert keys("2.1") == ["2.1"]
    assert "study 1 has no series that the pattern means" in caplog.text
    with pytest.raises(IncompleteSeries, match=r"1\.3: uneven distance"):
        keys("T1 gap")
    with pytest.raises(IncompleteSeries, match=r"3\.1: uneven"):
        keys("3.1")
    for pattern in ("1.2", "T2*"):
        with pytest.raises(
            InputError, match=r"2 series could be meant: series_\w+ \(.*EchoTime=1\), series_\w+ \(.*EchoTime=2\)"
        ) as error:
            keys(pattern)
        assert "JANE" not in str(error.value)
    with pytest.raises(InputError, match="no series is called 'FLAIR'") as error:
        keys("FLAIR")
    assert "JANE" not in str(error.value) + caplog.text
    shutil.rmtree(tmp_path / "b")
    shutil.rmtree(tmp_path / "e")
    with pytest.raises(InputError, match="holds 2 studies"):
        dicom.read(tmp_path)


def test_no_text_of_a_header_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    marker = "JANE-DOE-CANARY"
    write_series(tmp_path, ARRAY, marker=marker, offsets=[0, 1, 1, 2])
    series = the(tmp_path)
    assert series.description == marker  # for listings
    with pytest.raises(InputError) as error:
        dicom.read(tmp_path)
    assert marker not in f"{series!r}{error.value}{series.name}{series.key}{caplog.text}"


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize("write", [write_series, write_enhanced])
def test_no_more_memory_than_reading_bytes_says(write: Any, syntax: str, tmp_path: Path) -> None:
    write(tmp_path, np.random.default_rng(0).integers(-999, 999, (128, 128, 20), dtype=np.int16), syntax=syntax)
    series = the(tmp_path)
    dicom.read_series(series)  # what is imported on the way does not count
    tracemalloc.start()
    dicom.read_series(series)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= dicom.reading_bytes(series) <= 2**23


def test_a_series_can_be_sent_to_another_process(tmp_path: Path) -> None:
    write_series(tmp_path, ARRAY)
    series = pickle.loads(pickle.dumps(the(tmp_path)))
    same(dicom.read_series(series), ARRAY, affine_of())
