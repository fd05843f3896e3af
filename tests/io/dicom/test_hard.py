"""DICOM as scanners, archives and attackers make it: what must come out, by the standard alone."""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
import struct
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from dicoms import ENCODERS, affine_of, write_enhanced, write_series
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    MediaStorageDirectoryStorage,
    RLELossless,
    generate_uid,
)

from medseg.errors import IncompleteSeries, InputError, MedsegError, UnreadableFile
from medseg.io import dicom
from medseg.volume import Volume

VOXELS = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4) - 7
"""Every voxel has a value of its own, and no two axes are of one length."""
LARGE = np.arange(36 * 34 * 3, dtype=np.int16).reshape(36, 34, 3) - 99
CANARY = "JANE-DOE-CANARY"
C, S = float(np.cos(0.3)), float(np.sin(0.3))
ORIENTATIONS: dict[str, dict[str, Any]] = {
    "axial": {},
    "coronal": {"row": (1, 0, 0), "column": (0, 0, -1)},
    "sagittal": {"row": (0, 1, 0), "column": (0, 0, -1)},
    "column negated": {"row": (1, 0, 0), "column": (0, -1, 0)},
    "row negated": {"row": (-1, 0, 0), "column": (0, 1, 0)},
    "rows along y": {"row": (0, 1, 0), "column": (1, 0, 0)},
    "oblique": {"row": (C, S, 0), "column": (-S, C, 0)},
    "double oblique": {"row": (C, S * C, S * S), "column": (-S, C * C, C * S)},
}


def usable(place: Path) -> list[dicom.Series]:
    return [series for series in dicom.scan(place).series if not series.reason]


def the(place: Path) -> dicom.Series:
    found = dicom.scan(place).series
    assert len(found) == 1
    assert found[0].reason == ""
    return found[0]


def refused(place: Path, *words: str) -> dicom.Series:
    """Nothing at the place can be used, and the reason has one of the words."""
    found = dicom.scan(place)
    assert not [series for series in found.series if not series.reason]
    assert found.series
    series = found.series[0]
    assert not words or any(word in series.reason.lower() for word in words), series.reason
    with pytest.raises(UnreadableFile if series.damaged else IncompleteSeries):
        dicom.read_series(series)
    with pytest.raises(InputError):
        dicom.select(found, series.uid)
    return series


def check(
    volume: Volume, array: NDArray[Any], affine: NDArray[np.float64], tolerance: float = 1e-3, normal: bool = True
) -> None:
    """Every voxel that was written is in the volume, once, at the same world point, and nothing else is."""
    index = np.indices(array.shape).reshape(3, -1).T.astype(float)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    inverse = np.linalg.inv(volume.geometry.affine)
    nearest = np.rint(world @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)
    np.testing.assert_allclose(volume.geometry.world(nearest.astype(float)), world, atol=tolerance)
    assert volume.array.shape == (1, *volume.geometry.shape)
    assert volume.array.size == array.size == len(np.unique(nearest, axis=0))
    assert nearest.min() == 0
    np.testing.assert_array_equal(volume.array[0][tuple(nearest.T)], array.ravel())
    lps = volume.geometry.affine[:3, :3] * [[-1], [-1], [1]]
    assert not normal or np.cross(lps[:, 0], lps[:, 1]) @ lps[:, 2] > 0


def read_as(place: Path, array: NDArray[Any] = VOXELS, tolerance: float = 1e-3, **geometry: Any) -> Volume:
    """Read the only series and compare it with what was written; with what the headers promised, too."""
    series = the(place)
    volume = dicom.read_series(series)
    check(volume, array, affine_of(**geometry), tolerance)
    assert series.geometry is not None
    assert series.geometry == volume.geometry
    assert series.kind == volume.array.dtype.name
    assert volume.header is series
    assert dicom.reading_bytes(series) >= volume.array.nbytes
    assert len(dicom.headers(series)) in (1, array.shape[2])
    return volume


def put(**values: Any) -> Callable[[Dataset, int], None]:
    """A change that sets attributes, or takes those out whose value is None."""

    def change(dataset: Dataset, k: int) -> None:
        for keyword, value in values.items():
            value = value(k) if callable(value) else value
            if value is None:
                dataset.pop(keyword, None)
            else:
                setattr(dataset, keyword, value)

    return change


def raw(keyword: str, value: bytes) -> Callable[[Dataset, int], None]:
    """A change that sets an attribute to bytes that its type does not allow."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    tag = Tag(tag_for_keyword(keyword) or 0)
    padded = value + b" " * (len(value) % 2)

    def change(dataset: Dataset, k: int) -> None:
        dataset._dict[tag] = RawDataElement(tag, dictionary_VR(tag), len(padded), padded, 0, False, True)

    return change


def again(path: Path, **values: Any) -> None:
    """Change a file that was written."""
    dataset = pydicom.dcmread(path)
    put(**values)(dataset, 0)
    dataset.save_as(path)


# ---------------------------------------------------------------------------------------------- where the voxels lie


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("down", [False, True], ids=["along the normal", "against it"])
@pytest.mark.parametrize("write", [write_series, write_enhanced])
def test_the_world_follows_positions(write: Callable[..., Any], orientation: str, down: bool, tmp_path: Path) -> None:
    geometry: dict[str, Any] = {
        "spacing": (0.7, 0.9, 2.5),
        "origin": (-31.7, 12.25, 801.5),
        **ORIENTATIONS[orientation],
    }
    if down:
        normal = np.cross(geometry.get("row", (1, 0, 0)), geometry.get("column", (0, 1, 0)))
        geometry["step"] = tuple(-2.5 * normal)
    write(tmp_path, VOXELS, **geometry)
    read_as(tmp_path, **geometry)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    angles=st.tuples(*[st.floats(-3.1, 3.1)] * 3),
    spacing=st.tuples(*[st.floats(0.05, 12)] * 3),
    origin=st.tuples(*[st.floats(-2000, 2000)] * 3),
)
def test_any_rotation(
    angles: tuple[float, ...], spacing: tuple[float, ...], origin: tuple[float, ...], tmp_path: Path
) -> None:
    from scipy.spatial.transform import Rotation

    matrix = Rotation.from_euler("xyz", angles).as_matrix()
    geometry = {"row": tuple(matrix[0]), "column": tuple(matrix[1]), "spacing": spacing, "origin": origin}
    shutil.rmtree(tmp_path / "any", ignore_errors=True)
    write_series(tmp_path / "any", VOXELS, **geometry)
    read_as(tmp_path / "any", **geometry)


def test_as_itk_reads_it(tmp_path: Path) -> None:
    itk = pytest.importorskip("SimpleITK")
    write_series(tmp_path, VOXELS, spacing=(0.7, 0.9, 2.5), origin=(-31, 12, 8), **ORIENTATIONS["double oblique"])
    reader = itk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    image = reader.Execute()
    volume = dicom.read(tmp_path)
    np.testing.assert_array_equal(volume.array[0], itk.GetArrayFromImage(image).T)
    for index in np.ndindex(2, 2, 2):
        corner = [int(a * (n - 1)) for a, n in zip(index, VOXELS.shape, strict=True)]
        point = np.array(image.TransformIndexToPhysicalPoint(corner)) * [-1, -1, 1]
        np.testing.assert_allclose(volume.geometry.world(np.array([corner], dtype=float))[0], point, atol=1e-4)


@pytest.mark.parametrize("position", ["HFP", "HFS", "FFS", "FFP", "HFDR", "FFDL", "", None])
def test_patient_position_moves_nothing(position: str | None, tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS, change=put(PatientPosition=position))
    read_as(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"SliceThickness": "5"},
        {"SliceThickness": "0"},
        {"SliceThickness": ""},
        {"SliceThickness": None},
        {"SpacingBetweenSlices": None},
        {"SpacingBetweenSlices": "-3"},
        {"SpacingBetweenSlices": "7"},
        {"SliceLocation": lambda k: str(-k * 3)},
        {"SliceLocation": lambda k: str((k * 7) % 4)},
        {"SliceLocation": "0"},
        {"InstanceNumber": None},
        {"InstanceNumber": "1"},
        {"InstanceNumber": ""},
        {"NumberOfFrames": "1"},
        {"FrameOfReferenceUID": None},
        {"PatientID": None, "PatientName": None, "StudyID": None, "StudyDate": None, "SeriesNumber": None},
        {"AcquisitionNumber": lambda k: str(k)},
        {"AcquisitionTime": lambda k: f"03040{k}", "ContentTime": lambda k: f"03050{k}"},
        {"TriggerTime": lambda k: str(k * 10)},
        {"WindowCenter": lambda k: str(k), "WindowWidth": "1"},
        {"ExposureTime": lambda k: str(k), "XRayTubeCurrent": lambda k: str(100 + k)},
        {"EchoTime": lambda k: "4.92" if k % 2 else "4.920001"},
        {"ImageComments": lambda k: str(k)},
    ],
    ids=lambda values: ",".join(values) + "=" + ("of k" if callable(v := next(iter(values.values()))) else str(v)),
)
def test_attributes_that_do_not_tell_where_a_slice_is(values: dict[str, Any], tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS, spacing=(1, 1, 3), modality="MR", change=put(**values))
    read_as(tmp_path, spacing=(1, 1, 3))


def test_positions_with_the_noise_of_rounding(tmp_path: Path) -> None:
    geometry = {"spacing": (0.9, 0.9, 1.2), "origin": (-100.123456, 50.654321, 7.1), **ORIENTATIONS["double oblique"]}

    def rounded(dataset: Dataset, k: int) -> None:
        dataset.ImagePositionPatient = [f"{v:.3f}" for v in dataset.ImagePositionPatient]

    write_series(tmp_path, VOXELS, change=rounded, **geometry)
    read_as(tmp_path, tolerance=2e-3, **geometry)


def test_positions_off_by_a_micrometre_each(tmp_path: Path) -> None:
    def noisy(dataset: Dataset, k: int) -> None:
        noise = np.random.default_rng(k).uniform(-1e-3, 1e-3, 3)
        dataset.ImagePositionPatient = [
            f"{v + n:.6f}" for v, n in zip(dataset.ImagePositionPatient, noise, strict=True)
        ]

    array = np.arange(6 * 5 * 30, dtype=np.int16).reshape(6, 5, 30)
    write_series(tmp_path, array, spacing=(1, 1, 2), change=noisy)
    read_as(tmp_path, array, tolerance=4e-3, spacing=(1, 1, 2))


@pytest.mark.parametrize(
    "orientation",
    [
        ["1.00001", "0", "0", "0", "0.99999", "0"],
        ["1", "-0", "-0.0", "-0", "1", "-0"],
        ["1", "1e-6", "0", "0", "1", "0"],
        ["1.000000", "0.00000", "0.000000", "0.00000", "1.000000", "-0.00000"],
        ["+1", "+0", " 0", "0 ", "1.", ".0"],
    ],
    ids=["length", "minus zero", "shear", "zeros", "signs"],
)
def test_orientations_nearly_of_unit_length(orientation: list[str], tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS, change=put(ImageOrientationPatient=orientation))
    read_as(tmp_path)


@pytest.mark.parametrize("noise", [1e-6, 1e-5, 1e-4])
def test_orientations_that_differ_by_rounding(noise: float, tmp_path: Path) -> None:
    write_series(
        tmp_path,
        VOXELS,
        change=put(ImageOrientationPatient=lambda k: ["1", f"{noise * (k % 2):.6f}", "0", "0", "1", "0"]),
    )
    read_as(tmp_path, tolerance=1e-3)


def test_a_spacing_that_differs_in_the_last_digit(tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS, change=put(PixelSpacing=lambda k: ["1", "1"] if k else ["1.0000001", "0.9999999"]))
    read_as(tmp_path)


@pytest.mark.parametrize("count", [2, 3])
def test_few_slices(count: int, tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS[:, :, :count], spacing=(1, 1, 6.5), change=put(SliceThickness="5"))
    read_as(tmp_path, VOXELS[:, :, :count], spacing=(1, 1, 6.5))


@pytest.mark.parametrize("write", [write_series, write_enhanced])
def test_one_slice_lies_where_it_is_or_is_refused(write: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path, VOXELS[:, :, :1], spacing=(0.7, 0.9, 6.5), origin=(3, 4, 5))
    (series,) = dicom.scan(tmp_path).series
    if series.reason:
        refused(tmp_path)
    else:
        check(dicom.read_series(series), VOXELS[:, :, :1], affine_of(spacing=(0.7, 0.9, 6.5), origin=(3, 4, 5)))


def test_a_tilt_within_tolerance_keeps_every_corner(tmp_path: Path) -> None:
    """0.03 degrees: were the affine made straight, the last of 40 slices would lie 0.1 mm off."""
    array = np.arange(6 * 5 * 40, dtype=np.int16).reshape(6, 5, 40)
    step = (0.0, 5 * 5e-4, 5.0)
    write_series(tmp_path, array, step=step)
    read_as(tmp_path, array, step=step)


@pytest.mark.parametrize("degrees", [-2.0, -0.5, 0.5, 2.0])
@pytest.mark.parametrize("write", [write_series, write_enhanced])
def test_a_small_tilt_is_no_loss(write: Callable[..., Any], degrees: float, tmp_path: Path) -> None:
    """Within the tolerance of DICOM SEG writers: read with every corner where it is, or refused."""
    step = (0.0, 4 * float(np.sin(np.radians(degrees))), 4 * float(np.cos(np.radians(degrees))))
    write(tmp_path, VOXELS, step=step)
    if dicom.scan(tmp_path).series[0].reason:
        refused(tmp_path, "tilt")
    else:
        read_as(tmp_path, step=step)


@pytest.mark.parametrize("degrees", [-18.5, -4, 4, 18.5, 30])
def test_a_tilted_gantry_is_refused_or_resampled(degrees: float, tmp_path: Path) -> None:
    step = (0.0, 4 * float(np.sin(np.radians(degrees))), 4 * float(np.cos(np.radians(degrees))))
    array = np.arange(9 * 8 * 7, dtype=np.int16).reshape(9, 8, 7)
    write_series(tmp_path, array, step=step, change=put(GantryDetectorTilt="0"))
    series = refused(tmp_path, "tilt")
    assert series.irregular
    assert dicom.select(dicom.scan(tmp_path), resample_irregular=True)[0].irregular
    volume = dicom.read_series(series.resampled())
    assert volume.geometry.is_sheared  # no voxel is touched
    check(volume, array, affine_of(step=step))


@pytest.mark.parametrize(
    "offsets", [[0, 2, 6, 8], [0, 2, 4, 5], [0, 2, 4.13, 6.13], [0, 1, 3, 7]], ids=["missing", "end", "6 %", "growing"]
)
@pytest.mark.parametrize("write", [write_series, write_enhanced])
def test_uneven_distance_is_refused_with_its_positions(
    write: Callable[..., Any], offsets: list[float], tmp_path: Path
) -> None:
    write(tmp_path, VOXELS, offsets=offsets)
    series = refused(tmp_path, "distance", "gap", "uneven", "missing", "spacing")
    assert series.irregular
    np.testing.assert_allclose(series.positions_mm, offsets, atol=1e-6)
    straight = series.resampled()
    assert straight.reason == ""
    volume = dicom.read_series(straight)
    assert straight.geometry == volume.geometry
    z = volume.geometry.world(np.array([[0, 0, 0], [0, 0, volume.geometry.shape[2] - 1]], dtype=float))[:, 2]
    assert z[0] == pytest.approx(0)
    assert offsets[-1] - volume.geometry.spacing[2] < z[1] < offsets[-1] + volume.geometry.spacing[2]
    for k, offset in enumerate(offsets):
        index = offset / volume.geometry.spacing[2]
        if abs(index - round(index)) < 1e-6:
            np.testing.assert_allclose(volume.array[0, :, :, round(index)], VOXELS[:, :, k], atol=0.51)


def test_a_missing_slice_names_where(tmp_path: Path) -> None:
    paths = write_series(tmp_path, VOXELS, spacing=(1, 1, 2.5), origin=(0, 0, 100))
    paths[2].unlink()
    assert re.search(r"\b10[257]\.?", refused(tmp_path).reason)


def test_a_missing_end_slice_cannot_be_seen(tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS)[3].unlink()
    read_as(tmp_path, VOXELS[:, :, :3])


@pytest.mark.parametrize(
    "values",
    [
        {"ImagePositionPatient": lambda k: None if k == 1 else ["0", "0", str(k)]},
        {"ImagePositionPatient": lambda k: "" if k == 1 else ["0", "0", str(k)]},
        {"ImagePositionPatient": lambda k: ["0", "0", "nan"] if k == 1 else ["0", "0", str(k)]},
        {"ImagePositionPatient": lambda k: ["0", "0", "inf"] if k == 3 else ["0", "0", str(k)]},
        {"ImagePositionPatient": lambda k: ["0", "0", "1e300"] if k == 3 else ["0", "0", str(k)]},
        {"ImagePositionPatient": lambda k: ["0", str(k)]},
        {"ImageOrientationPatient": None},
        {"ImageOrientationPatient": ["0", "0", "0", "0", "0", "0"]},
        {"ImageOrientationPatient": ["1", "0", "0", "1", "0", "0"]},
        {"ImageOrientationPatient": ["1", "0", "0", "0.2", "0.9797959", "0"]},
        {"ImageOrientationPatient": ["2", "0", "0", "0", "2", "0"]},
        {"ImageOrientationPatient": ["nan"] * 6},
        {"ImageOrientationPatient": ["1", "0", "0"]},
        {"PixelSpacing": None},
        {"PixelSpacing": ["0", "1"]},
        {"PixelSpacing": ["-1", "1"]},
        {"PixelSpacing": ["nan", "1"]},
        {"PixelSpacing": ["1"]},
        {"PixelSpacing": ["1", "1", "1"]},
        {"PixelSpacing": ["1e30", "1"]},
        {"PixelSpacing": lambda k: ["1", "1"] if k else ["1.1", "1.1"]},
        {"PixelSpacing": None, "ImagerPixelSpacing": ["1", "1"]},
        {
            "ImageOrientationPatient": lambda k: (
                ["1", "0", "0", "0", str(C), str(S)] if k == 2 else ["1", "0", "0", "0", "1", "0"]
            )
        },
        {
            "ImageOrientationPatient": lambda k: (
                ["-1", "0", "0", "0", "-1", "0"] if k == 2 else ["1", "0", "0", "0", "1", "0"]
            )
        },
        {"ImagePositionPatient": ["0", "0", "0"]},
        {"ImagePositionPatient": lambda k: [str(k), "0", "0"]},
        {"ImagePositionPatient": lambda k: ["30" if k == 2 else "0", "0", str(k)]},
        {"FrameOfReferenceUID": lambda k: f"1.2.{3 + (k >= 2)}"},
        {"RescaleSlope": "nan"},
        {"RescaleIntercept": "inf"},
    ],
    ids=lambda values: next(iter(values)),
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # what pydicom says when such a file is written
def test_a_geometry_that_is_none(values: dict[str, Any], tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS, change=put(**values))
    refused(tmp_path)


@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows"])
@pytest.mark.parametrize("value", [b"", b"JANE-DOE-CANARY", b"0,5\\0,5", b"\xff\xfe\x00", b"1\\2\\3\\4\\5\\6\\7\\8"])
def test_numbers_that_are_none(keyword: str, value: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_series(tmp_path, VOXELS, change=raw(keyword, value))
    found = dicom.scan(tmp_path)
    assert not [series for series in found.series if not series.reason]
    assert CANARY not in repr(found)
    assert CANARY not in caplog.text


def test_slices_of_another_size(tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS, uid="1.2.3", study_uid="1.2", change=put(FrameOfReferenceUID="1.2.9"))
    write_series(
        tmp_path / "b", LARGE, origin=(0, 0, 4), uid="1.2.3", study_uid="1.2", change=put(FrameOfReferenceUID="1.2.9")
    )
    refused(tmp_path, "size", "rows", "shape", "columns")


def test_localizers_among_the_slices(tmp_path: Path) -> None:
    same = {"uid": "1.2.3", "study_uid": "1.2", "change": put(FrameOfReferenceUID="1.2.9")}
    write_series(tmp_path, VOXELS, **same)
    write_series(tmp_path / "sagittal", VOXELS[:, :, :1], **same, **ORIENTATIONS["sagittal"])
    write_series(tmp_path / "coronal", VOXELS[:, :, :1], **same, **ORIENTATIONS["coronal"])
    refused(tmp_path, "orientation")


# ---------------------------------------------------------------------- several volumes in a series; several series


def parts(folder: Path, values: list[dict[str, Any]], **more: Any) -> list[NDArray[np.int16]]:
    """One series of several volumes on one grid, each with attributes of its own."""
    arrays = [(VOXELS + 1000 * n).astype(np.int16) for n in range(len(values))]
    for n, (array, value) in enumerate(zip(arrays, values, strict=True)):
        change = put(FrameOfReferenceUID="1.2.9", **value)
        write_series(folder / str(n), array, modality="MR", uid="1.2.3", study_uid="1.2", change=change, **more)
    return arrays


PARTS: dict[str, list[dict[str, Any]]] = {
    "echoes": [{"EchoTime": "4.92", "EchoNumbers": "1"}, {"EchoTime": "7.38", "EchoNumbers": "2"}],
    "echoes without number": [{"EchoTime": "4.92"}, {"EchoTime": "7.38"}],
    "echoes numbered alone": [{"EchoNumbers": "1"}, {"EchoNumbers": "2"}],
    "time points": [{"TemporalPositionIdentifier": str(n), "AcquisitionTime": f"0304{n:02}"} for n in (1, 2, 3)],
    "time points numbered alone": [{"TemporalPositionIdentifier": str(n)} for n in range(1, 13)],
    "triggers": [{"TriggerTime": str(n * 35)} for n in range(3)],
    "acquisition times": [{"AcquisitionTime": f"0304{n:02}.123"} for n in range(3)],
    "acquisition numbers": [{"AcquisitionNumber": str(n)} for n in range(1, 4)],
    "b-values": [{"DiffusionBValue": 0.0}, {"DiffusionBValue": 500.0}, {"DiffusionBValue": 1000.0}],
    "Dixon": [
        {"ImageType": ["DERIVED", "PRIMARY", "DIXON", kind]} for kind in ("IN_PHASE", "OUT_PHASE", "WATER", "FAT")
    ],
    "magnitude and phase": [{"ImageType": ["ORIGINAL", "PRIMARY", kind, "ND"]} for kind in ("M", "P")],
    "inversion times": [{"InversionTime": str(n)} for n in (100, 900)],
    "flip angles": [{"FlipAngle": str(n)} for n in (5, 15)],
}


@pytest.mark.parametrize("kind", PARTS)
def test_volumes_of_one_series_are_told_apart(kind: str, tmp_path: Path) -> None:
    arrays = parts(tmp_path, PARTS[kind])
    found = dicom.scan(tmp_path)
    ready = [series for series in found.series if not series.reason]
    assert len(ready) == len(arrays)
    assert len({series.part for series in ready}) == len({series.name for series in ready}) == len(arrays)
    seen = set()
    for series in ready:
        assert series.uid == "1.2.3"
        assert series.part
        (again,) = dicom.select(found, f"{series.uid}[{series.part}]")
        assert again is series
        volume = dicom.read_series(series)
        number = round(float(volume.array.min()) / 1000)
        check(volume, arrays[number], affine_of())
        seen.add(number)
    assert len(seen) == len(arrays)
    for pattern in ("", "1.2.3"):
        with pytest.raises(InputError):
            dicom.select(found, pattern)


def test_the_parts_say_what_tells_them_apart(tmp_path: Path) -> None:
    parts(tmp_path, PARTS["echoes without number"])
    assert {series.part for series in usable(tmp_path)} == {"EchoTime=4.92", "EchoTime=7.38"}


UNTOLD: dict[str, list[dict[str, Any]]] = {
    "nothing": [{}, {}, {}],
    "directions": [
        {"DiffusionBValue": 0.0},
        *({"DiffusionBValue": 1000.0, "DiffusionGradientOrientation": list(map(float, v))} for v in np.eye(3)),
    ],
    "times within the slices": [{"AcquisitionTime": (lambda k, n=n: f"03{n:02}{k:02}")} for n in range(3)],
    "text alone": [{"ImageComments": "arterial"}, {"ImageComments": "venous"}],
}


@pytest.mark.parametrize("kind", UNTOLD)
def test_volumes_are_never_mixed(kind: str, tmp_path: Path) -> None:
    """Where a header hardly says which slice belongs to which volume: right or refused."""
    arrays = parts(tmp_path, UNTOLD[kind])
    found = dicom.scan(tmp_path)
    assert found.series
    for series in found.series:
        if series.reason:
            assert series.instances
            continue
        volume = dicom.read_series(series)
        check(volume, arrays[round(float(volume.array.min()) / 1000)], affine_of())
    with pytest.raises(InputError):
        dicom.select(found, "")


def test_an_echo_that_lacks_a_slice(tmp_path: Path) -> None:
    parts(tmp_path, PARTS["echoes"])
    paths = sorted((tmp_path / "1").iterdir(), key=lambda p: pydicom.dcmread(p).ImagePositionPatient[2])
    paths[1].unlink()
    whole = [series for series in dicom.scan(tmp_path).series if not series.reason]
    assert len(whole) <= 1
    for series in whole:
        assert "4.92" in series.part
        check(dicom.read_series(series), VOXELS, affine_of())


def test_two_bed_positions_of_two_times_are_one_volume(tmp_path: Path) -> None:
    """PET and multi-slab scans: the time differs along the volume, which is no reason to cut it."""
    change = put(AcquisitionTime=lambda k: f"0304{k // 2:02}", FrameReferenceTime=lambda k: str(k // 2 * 1000))
    write_series(tmp_path, VOXELS, modality="PT", change=change)
    read_as(tmp_path)


def test_copies_of_a_file_count_once(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "a", VOXELS)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.copy(paths[0], tmp_path / "again")
    read_as(tmp_path)


def test_one_uid_with_two_contents(tmp_path: Path) -> None:
    paths = write_series(tmp_path, VOXELS)
    dataset = pydicom.dcmread(paths[1])
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.save_as(tmp_path / "other.dcm")
    (series,) = dicom.scan(tmp_path).series
    with pytest.raises(InputError):
        dicom.read_series(series)


def test_two_images_at_one_position(tmp_path: Path) -> None:
    paths = write_series(tmp_path, VOXELS)
    dataset = pydicom.dcmread(paths[1])
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.save_as(tmp_path / "other.dcm")
    refused(tmp_path, "position", "repeat", "twice", "same")


def test_one_series_uid_in_two_studies(tmp_path: Path) -> None:
    write_series(tmp_path / "a", VOXELS, uid="1.2.3", study_uid="1.2.1")
    write_series(tmp_path / "b", VOXELS + 500, uid="1.2.3", study_uid="1.2.2")
    first, second = sorted(usable(tmp_path), key=lambda series: series.study_uid)
    assert (first.study_uid, second.study_uid) == ("1.2.1", "1.2.2")
    check(dicom.read_series(first), VOXELS, affine_of())
    check(dicom.read_series(second), VOXELS + 500, affine_of())
    assert len(dicom.select(dicom.scan(tmp_path))) == 2
    assert first.name != second.name


def study(folder: Path) -> None:
    described = (
        (LARGE, "1.2.3.1", "T1 ax"),
        (VOXELS, "1.2.3.2", "T2 ax CANARY"),
        (VOXELS + 500, "1.2.3.3", "T2 ax CANARY"),
    )
    for n, (array, uid, text) in enumerate(described):
        write_series(folder / str(n), array, uid=uid, study_uid="1.2.3", change=put(SeriesDescription=text))


def test_a_study_is_listed_and_selected_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    study(tmp_path)
    found = dicom.scan(tmp_path)
    assert [series.uid for series in found.series] == ["1.2.3.1", "1.2.3.2", "1.2.3.3"]
    assert [series.description for series in found.series] == ["T1 ax", "T2 ax CANARY", "T2 ax CANARY"]
    assert "CANARY" not in repr(found)
    for series in found.series:
        assert dicom.select(found, series.uid) == [series]
        assert dicom.select(found, series.name) == [series]
    for pattern in ("T1*", "t1 AX", "*1*", "t? ax"):
        assert dicom.select(found, pattern) == [found.series[0]]
    for pattern in ("", "T2*", "*", "*canary"):
        with pytest.raises(InputError) as error:
            dicom.select(found, pattern)
        assert all(series.name in str(error.value) for series in found.series[1:3])
        assert "CANARY" not in str(error.value)
    for pattern in ("T3", "1.2.3", "1.2.3.9", "1.2.3.1[EchoTime=1]", "series_", "[", "1.2.3.*", "T2"):
        with pytest.raises(InputError) as error:
            dicom.select(found, pattern)
        assert "CANARY" not in str(error.value)
    assert "CANARY" not in caplog.text


def test_a_pattern_is_no_regular_expression(tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS, change=put(SeriesDescription="T1 (post) [ax] +C"))
    found = dicom.scan(tmp_path)
    assert len(dicom.select(found, "T1 (post)*")) == 1
    with pytest.raises(InputError):
        dicom.select(found, "T1 .post.*")


def test_a_study_with_one_usable_series_needs_no_choice(tmp_path: Path) -> None:
    write_series(tmp_path / "a", VOXELS, uid="1.2.3.1", study_uid="1.2.3")
    write_series(tmp_path / "b", VOXELS, uid="1.2.3.2", study_uid="1.2.3", offsets=[0, 1, 5, 6])
    found = dicom.scan(tmp_path)
    (series,) = dicom.select(found)
    assert series.uid == "1.2.3.1"
    with pytest.raises(InputError):
        dicom.select(found, resample_irregular=True)


# --------------------------------------------------------------------------------------------- enhanced multi-frame


def frames(change: Callable[[Dataset, int], None]) -> Callable[[Dataset, int], None]:
    """A change of every frame's groups, called with the slice that it is."""

    def all_frames(dataset: Dataset, _: int) -> None:
        for item in dataset.PerFrameFunctionalGroupsSequence:
            change(item, item.FrameContentSequence[0].InStackPositionNumber - 1)

    return all_frames


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_rescaling_of_every_frame(modality: str, tmp_path: Path) -> None:
    slopes = [0.5, 1.5, 2.25, 3]
    write_enhanced(tmp_path, VOXELS, modality=modality, slope=slopes, intercept=[1, 2, 3, -4])
    read_as(tmp_path, (VOXELS * np.array(slopes) + [1, 2, 3, -4]).astype(np.float32))


def test_orientation_and_measures_a_frame(tmp_path: Path) -> None:
    def move(dataset: Dataset, _: int) -> None:
        shared = dataset.SharedFunctionalGroupsSequence[0]
        for item in dataset.PerFrameFunctionalGroupsSequence:
            item.PlaneOrientationSequence = shared.PlaneOrientationSequence
            item.PixelMeasuresSequence = shared.PixelMeasuresSequence
        del shared.PlaneOrientationSequence, shared.PixelMeasuresSequence

    geometry = {"spacing": (0.7, 0.9, 2.5), "origin": (1, 2, 3), **ORIENTATIONS["double oblique"]}
    write_enhanced(tmp_path, VOXELS, change=move, **geometry)
    read_as(tmp_path, **geometry)


def test_in_stack_numbers_do_not_tell_where_a_frame_is(tmp_path: Path) -> None:
    def turn(item: Dataset, k: int) -> None:
        item.FrameContentSequence[0].InStackPositionNumber = 4 - k
        item.FrameContentSequence[0].DimensionIndexValues = [1, 4 - k]

    write_enhanced(tmp_path, VOXELS, change=frames(turn))
    read_as(tmp_path)


def test_frames_of_several_times(tmp_path: Path) -> None:
    array = np.concatenate([VOXELS, VOXELS + 1000], axis=2)

    def times(item: Dataset, k: int) -> None:
        content = item.FrameContentSequence[0]
        content.TemporalPositionIndex = 1 + k // 4
        content.InStackPositionNumber = 1 + k % 4
        content.DimensionIndexValues = [1, 1 + k % 4, 1 + k // 4]
        item.PlanePositionSequence[0].ImagePositionPatient = ["0", "0", str(k % 4)]

    write_enhanced(tmp_path, array, change=frames(times))
    ready = usable(tmp_path)
    assert len(ready) == 2
    for series, expected in zip(sorted(ready, key=lambda s: s.part), (VOXELS, VOXELS + 1000), strict=True):
        check(dicom.read_series(series), expected, affine_of())


def test_frames_of_two_stacks_are_never_mixed(tmp_path: Path) -> None:
    def stacks(item: Dataset, k: int) -> None:
        if k < 2:
            return
        item.FrameContentSequence[0].StackID = "2"
        orientation = Dataset()
        orientation.ImageOrientationPatient = ["0", "1", "0", "0", "0", "-1"]
        item.PlaneOrientationSequence = [orientation]
        item.PlanePositionSequence[0].ImagePositionPatient = [str(-k), "0", "0"]

    def all_frames(dataset: Dataset, _: int) -> None:
        shared = dataset.SharedFunctionalGroupsSequence[0]
        for item in dataset.PerFrameFunctionalGroupsSequence:
            item.PlaneOrientationSequence = shared.PlaneOrientationSequence
        del shared.PlaneOrientationSequence
        frames(stacks)(dataset, 0)

    write_enhanced(tmp_path, VOXELS, change=all_frames)
    for series in usable(tmp_path):
        volume = dicom.read_series(series)
        assert volume.array.shape[3] == 2
        first = np.array_equal(np.sort(volume.array, axis=None), np.sort(VOXELS[:, :, :2], axis=None))
        if first:
            check(volume, VOXELS[:, :, :2], affine_of())
        else:
            affine = affine_of(row=(0, 1, 0), column=(0, 0, -1), origin=(-2, 0, 0), step=(-1, 0, 0))
            check(volume, VOXELS[:, :, 2:], affine)


def _less(keyword: str, shared: bool = False) -> Callable[[Dataset, int], None]:
    def change(dataset: Dataset, _: int) -> None:
        groups = dataset.SharedFunctionalGroupsSequence if shared else dataset.PerFrameFunctionalGroupsSequence
        for item in groups:
            del item[keyword]

    return change


def _one_frame_less(dataset: Dataset, _: int) -> None:
    del dataset.PerFrameFunctionalGroupsSequence[2]


BROKEN_FRAMES: dict[str, Callable[[Dataset, int], Any]] = {
    "no positions": _less("PlanePositionSequence"),
    "no orientation": _less("PlaneOrientationSequence", shared=True),
    "no measures": _less("PixelMeasuresSequence", shared=True),
    "no groups": put(PerFrameFunctionalGroupsSequence=None),
    "no shared groups": put(SharedFunctionalGroupsSequence=None),
    "empty groups": put(PerFrameFunctionalGroupsSequence=[], SharedFunctionalGroupsSequence=[]),
    "one frame without groups": _one_frame_less,
    "too many frames": put(NumberOfFrames="5"),
    "absurdly many frames": put(NumberOfFrames="2000000000"),
    "no frames": put(NumberOfFrames="0"),
    "fewer than none": put(NumberOfFrames="-4"),
    "one position": frames(lambda item, k: put(ImagePositionPatient=["0", "0", "0"])(item.PlanePositionSequence[0], k)),
}


@pytest.mark.parametrize("kind", BROKEN_FRAMES)
def test_enhanced_without_geometry_is_refused(kind: str, tmp_path: Path) -> None:
    write_enhanced(tmp_path, VOXELS, change=BROKEN_FRAMES[kind])
    refused(tmp_path)


@pytest.mark.parametrize("uid", ["1.2.840.10008.5.1.4.1.1.20", "1.2.840.10008.5.1.4.1.1.3.1"], ids=["NM", "US"])
def test_frames_without_a_place_are_no_volume(uid: str, tmp_path: Path) -> None:
    def change(dataset: Dataset, _: int) -> None:
        del dataset.PerFrameFunctionalGroupsSequence, dataset.SharedFunctionalGroupsSequence
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = uid
        dataset.PixelSpacing, dataset.SpacingBetweenSlices = ["1", "1"], "1"

    write_enhanced(tmp_path, VOXELS, change=change)
    found = dicom.scan(tmp_path)
    assert not [series for series in found.series if not series.reason]
    assert len(found.series) + sum(found.passed_over.values()) >= 1


def test_a_volume_in_two_enhanced_files(tmp_path: Path) -> None:
    """Some scanners cut a long series into files: one volume, or none."""
    for n in range(2):
        path = write_enhanced(
            tmp_path / str(n), VOXELS[:, :, 2 * n : 2 * n + 2], uid="1.2.3", study_uid="1.2", origin=(0, 0, 2 * n)
        )
        again(path, FrameOfReferenceUID="1.2.9")
    for series in usable(tmp_path):
        volume = dicom.read_series(series)
        if volume.array.shape[3] == 4:
            check(volume, VOXELS, affine_of())
        else:
            first = int(volume.array.min()) == int(VOXELS[:, :, :2].min())
            check(volume, VOXELS[:, :, :2] if first else VOXELS[:, :, 2:], affine_of(origin=(0, 0, 0 if first else 2)))


# ------------------------------------------------------------------------------------------------ numbers of a voxel


@pytest.mark.parametrize("write", [write_series, write_enhanced])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.uint32, np.int32])
def test_kinds_of_numbers(write: Callable[..., Any], kind: type, tmp_path: Path) -> None:
    array = np.arange(VOXELS.size).reshape(VOXELS.shape).astype(kind)
    array[0, 0, 0], array[1, 1, 1] = np.iinfo(kind).max, np.iinfo(kind).min
    write(tmp_path, array)
    volume = read_as(tmp_path, array)
    assert volume.array.dtype.kind in "iuf"


def test_odd_bytes_are_padded(tmp_path: Path) -> None:
    array = np.arange(5 * 3 * 4, dtype=np.uint8).reshape(5, 3, 4)
    write_series(tmp_path, array)
    read_as(tmp_path, array)


def test_rescaling_to_hounsfield_units_gives_integers(tmp_path: Path) -> None:
    array = np.arange(VOXELS.size, dtype=np.uint16).reshape(VOXELS.shape) * 30
    write_series(tmp_path, array, intercept=-1024)
    volume = read_as(tmp_path, array.astype(int) - 1024)
    assert volume.array.dtype.kind == "i"


def test_unsigned_numbers_do_not_wrap(tmp_path: Path) -> None:
    array = np.full(VOXELS.shape, 65535, dtype=np.uint16)
    array[0] = 0
    write_series(tmp_path, array, slope=2, intercept=-8192)
    read_as(tmp_path, array.astype(int) * 2 - 8192)


def test_pet_scales_every_slice(tmp_path: Path) -> None:
    slopes = [0.13572, 1.33333, 7.5, 0.00061]
    write_series(tmp_path, VOXELS, modality="PT", slope=slopes)
    volume = dicom.read(tmp_path)
    expected = np.stack([VOXELS[:, :, k].astype(float) * slopes[k] for k in range(4)], axis=2)
    np.testing.assert_allclose(volume.array[0], expected, rtol=1e-6)
    assert volume.array.dtype == np.float32


def test_one_slice_scaled_otherwise_by_an_integer(tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS, slope=[1, 2, 1, 1], intercept=[0, 0, 0, 5])
    read_as(tmp_path, VOXELS * np.array([1, 2, 1, 1]) + [0, 0, 0, 5])


@pytest.mark.parametrize("values", [{"RescaleIntercept": None}, {"RescaleSlope": None, "RescaleIntercept": None}])
def test_ct_without_rescaling(values: dict[str, Any], tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS, change=put(**values))
    read_as(tmp_path)


def test_a_slope_of_zero_is_never_applied(tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS, slope=0)
    refused(tmp_path, "slope is 0")


@pytest.mark.parametrize("signed", [False, True])
def test_twelve_bits_of_sixteen(signed: bool, tmp_path: Path) -> None:
    array = np.arange(VOXELS.size, dtype=np.int16).reshape(VOXELS.shape) * 17
    array = array - 1024 if signed else array
    stored = (array.astype(np.uint16) & 0x0FFF).astype(np.int16 if signed else np.uint16)
    write_series(tmp_path, stored, change=put(BitsStored=12, HighBit=11))
    read_as(tmp_path, array)


@pytest.mark.parametrize("high_bit", [11, 15])
def test_bits_beside_the_stored_ones_are_never_taken_for_value(high_bit: int, tmp_path: Path) -> None:
    """Overlays of old scanners in bits 12 to 15, or values in the upper 12 bits."""
    array = (np.arange(VOXELS.size) * 30).reshape(VOXELS.shape).astype(np.uint16)
    stored = array | 0x3000 if high_bit == 11 else array << 4
    write_series(tmp_path, stored.astype(np.uint16), change=put(BitsStored=12, HighBit=high_bit))
    read_as(tmp_path, array)


@pytest.mark.parametrize(
    "values",
    [
        {"BitsAllocated": 12},
        {"BitsAllocated": 0},
        {"BitsAllocated": 0, "BitsStored": 0, "HighBit": 0},
        {"BitsAllocated": 64},
        {"BitsAllocated": 24},
        {"BitsStored": 17},
        {"PixelRepresentation": 7},
        {"PixelRepresentation": None},
        {"SamplesPerPixel": 2},
        {"SamplesPerPixel": 3},
        {"PhotometricInterpretation": "JANE-DOE-CANARY"},
        {"Rows": 0},
        {"Columns": 0},
        {"Rows": 65535, "Columns": 65535},
        {"Rows": None},
        {"PixelData": None},
        {"PixelData": b""},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_pixels_that_cannot_be(values: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_series(tmp_path, VOXELS, change=put(**values))
    caplog.clear()
    found = dicom.scan(tmp_path)
    assert len(found.series) + sum(found.passed_over.values()) > 0
    assert all(series.reason for series in found.series)
    with pytest.raises(InputError) as error:
        dicom.select(found)
    assert CANARY not in caplog.text + repr(found) + str(error.value)


@pytest.mark.parametrize("cut", [2, 62, 100])
@pytest.mark.parametrize("write", [write_series, write_enhanced])
def test_pixel_data_too_short(write: Callable[..., Any], cut: int, tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        if k in (0, 2):
            dataset.PixelData = dataset.PixelData[: max(2, len(dataset.PixelData) - cut)]

    write(tmp_path, VOXELS, change=change)
    (series,) = dicom.scan(tmp_path).series
    with pytest.raises(InputError):
        dicom.read_series(series)


def test_one_bit_is_no_image(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.BitsAllocated = dataset.BitsStored = 1
        dataset.HighBit, dataset.PixelRepresentation, dataset.PixelData = 0, 0, b"\x55\x55\x55\x15"

    write_series(tmp_path, VOXELS.astype(np.uint8), change=change)
    refused(tmp_path, "1 bits of 1 a pixel")


def test_monochrome1_is_turned(tmp_path: Path) -> None:
    array = (VOXELS - VOXELS.min()).astype(np.uint16)
    array[0, 0, 2:] = 3  # a value that several slices have
    write_series(tmp_path, array, modality="MR", change=put(PhotometricInterpretation="MONOCHROME1"))
    got = dicom.read(tmp_path).array[0].astype(float)
    assert len({float(v) for v in got[array == 3]}) == 1
    order = np.argsort(array.ravel(), kind="stable")
    assert (np.diff(got.ravel()[order]) <= 0).all()
    np.testing.assert_allclose(np.diff(got.ravel()[order]), -np.diff(array.ravel()[order].astype(float)))


def test_hounsfield_units_shown_inverted_are_hounsfield_units(tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS, intercept=-1000, change=put(PhotometricInterpretation="MONOCHROME1"))
    read_as(tmp_path, VOXELS.astype(int) - 1000)


def test_one_slice_of_monochrome1(tmp_path: Path) -> None:
    """Never a volume of which one slice is inverted."""
    kinds = put(PhotometricInterpretation=lambda k: "MONOCHROME1" if k == 1 else "MONOCHROME2")
    write_series(tmp_path, VOXELS, modality="MR", change=kinds)
    for series in usable(tmp_path):
        got = dicom.read_series(series).array[0].astype(float)
        assert got[5, 4, 0] > got[0, 0, 0]
        assert got[5, 4, 1] < got[0, 0, 1]


def test_padding_is_no_brighter_than_anything(tmp_path: Path) -> None:
    array = VOXELS.copy()
    array[:2] = -2000

    def change(dataset: Dataset, k: int) -> None:
        dataset.add_new("PixelPaddingValue", "SS", -2000)

    write_series(tmp_path, array, intercept=-24, change=change)
    got = dicom.read(tmp_path).array[0]
    np.testing.assert_array_equal(got[2:], VOXELS[2:].astype(int) - 24)
    assert got[:2].max() <= got[2:].min()


def test_padding_written_with_the_wrong_sign(tmp_path: Path) -> None:
    """-2000 as an unsigned attribute (63536), which many scanners write beside signed pixels."""

    def change(dataset: Dataset, k: int) -> None:
        dataset.add_new("PixelPaddingValue", "US", 63536)

    write_series(tmp_path, VOXELS, change=change)
    read_as(tmp_path)


def test_overlays_and_look_up_tables_of_display_change_nothing(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.add_new(0x60003000, "OW", b"\xff" * 8)
        dataset.add_new(0x60000010, "US", 5)
        dataset.add_new(0x60000011, "US", 6)
        table = Dataset()
        table.add_new("LUTDescriptor", "US", [256, 0, 8])
        table.add_new("LUTData", "OW", bytes(256))
        dataset.VOILUTSequence = [table]
        dataset.PresentationLUTShape = "INVERSE"
        dataset.add_new(0xFFFCFFFC, "OB", b"\0" * 10)

    write_series(tmp_path, VOXELS, change=change)
    read_as(tmp_path)


def test_colours_are_no_volume(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
        dataset.PixelData = dataset.PixelData * 3

    write_series(tmp_path, VOXELS.astype(np.uint8), change=change)
    found = dicom.scan(tmp_path)
    assert not [series for series in found.series if not series.reason]
    assert len(found.series) + sum(found.passed_over.values()) >= 1


# ------------------------------------------------------------------------------------------------------- compression


@pytest.mark.parametrize("write", [write_series, write_enhanced])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16])
@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless, *ENCODERS],
    ids=lambda uid: uid.name.split(" (")[0] if isinstance(uid, UID) else None,
)
def test_transfer_syntaxes(write: Callable[..., Any], kind: type, syntax: UID, tmp_path: Path) -> None:
    array = (np.arange(35 * 33 * 3).reshape(35, 33, 3) % 251).astype(kind)  # rows of odd length
    if kind is np.int16:
        array -= 100
    write(tmp_path, array, syntax=syntax)
    if syntax == ExplicitVRBigEndian and kind is np.uint8 and not usable(tmp_path):
        refused(tmp_path, "big-endian")  # order of bytes in words of two pixels: writers differ
        return
    read_as(tmp_path, array)


@pytest.mark.parametrize("syntax", [RLELossless, *ENCODERS], ids=lambda uid: uid.name[:9])
def test_twelve_signed_bits_compressed(syntax: UID, tmp_path: Path) -> None:
    array = (np.arange(36 * 34 * 3).reshape(36, 34, 3) % 2000 - 1024).astype(np.int16)
    stored = array if "2000" in syntax.name else (array & 0x0FFF).astype(np.int16)
    write_series(tmp_path, stored, change=put(BitsStored=12, HighBit=11), syntax=syntax)
    read_as(tmp_path, array)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.50"], ids=["12 bits", "8 bits"])
def test_lossy_jpeg(syntax: str, tmp_path: Path) -> None:
    bits = 12 if syntax.endswith("51") else 8
    ramp = np.add.outer(np.arange(36), np.arange(34) * 2)
    array = np.stack([ramp + 40 * k for k in range(3)], axis=2).astype(np.uint16 if bits == 12 else np.uint8)
    array *= 16 if bits == 12 else 1

    def change(dataset: Dataset, k: int) -> None:
        stream = imagecodecs.jpeg8_encode(np.ascontiguousarray(array[:, :, k].T), level=98, bitspersample=bits)
        dataset.PixelData = encapsulate([stream])
        dataset["PixelData"].is_undefined_length = True
        dataset.BitsStored, dataset.HighBit = bits, bits - 1
        dataset.file_meta.TransferSyntaxUID = syntax

    write_series(tmp_path, array, change=change)
    volume = dicom.read(tmp_path)
    assert np.abs(volume.array[0].astype(int) - array).max() <= 2 * 16 ** (bits == 12)


def baseline(array: NDArray[np.uint8]) -> bytes:
    """One frame (I, J) as JPEG of 8 bits."""
    from io import BytesIO

    from PIL import Image

    stream = BytesIO()
    Image.fromarray(array.T).save(stream, "JPEG", quality=95)
    return stream.getvalue()


@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("table", [True, False], ids=["offsets", "empty table"])
def test_baseline_jpeg_in_fragments(fragments: int, table: bool, tmp_path: Path) -> None:
    ramp = np.add.outer(np.arange(36), np.arange(34) * 2)
    array = np.stack([ramp + 40 * k for k in range(3)], axis=2).astype(np.uint8)

    def change(dataset: Dataset, k: int) -> None:
        dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        stream = baseline(array[:, :, k])
        dataset.PixelData = encapsulate([stream], fragments_per_frame=fragments, has_bot=table)
        dataset["PixelData"].is_undefined_length = True

    write_series(tmp_path, array, change=change)
    volume = dicom.read(tmp_path)
    assert np.abs(volume.array[0].astype(int) - array).max() <= 3


@pytest.mark.parametrize("table", [True, False], ids=["offsets", "empty table"])
def test_frames_in_fragments(table: bool, tmp_path: Path) -> None:
    ramp = np.add.outer(np.arange(36), np.arange(34) * 2)
    array = np.stack([ramp + 40 * k for k in range(3)], axis=2).astype(np.uint8)

    def change(dataset: Dataset, _: int) -> None:
        order = [
            item.FrameContentSequence[0].InStackPositionNumber - 1 for item in dataset.PerFrameFunctionalGroupsSequence
        ]
        dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        streams = [baseline(array[:, :, k]) for k in order]
        dataset.PixelData = encapsulate(streams, fragments_per_frame=2, has_bot=table)
        dataset["PixelData"].is_undefined_length = True

    write_enhanced(tmp_path, array, change=change)
    volume = dicom.read(tmp_path)
    assert np.abs(volume.array[0].astype(int) - array).max() <= 3


@pytest.mark.parametrize(
    "syntax", [RLELossless, JPEG2000Lossless, JPEGBaseline8Bit, JPEGLosslessSV1], ids=lambda u: u.name[:12]
)
@pytest.mark.parametrize("damage", ["garbage", "cut", "none", "other size"])
def test_damaged_streams_are_refused(syntax: str, damage: str, tmp_path: Path) -> None:
    from pydicom.encaps import generate_frames

    known = syntax in (RLELossless, JPEG2000Lossless)

    def change(dataset: Dataset, k: int) -> None:
        stream = (
            next(generate_frames(dataset.PixelData, number_of_frames=1))
            if known
            else baseline(LARGE[:, :, k].astype(np.uint8))
        )
        dataset.file_meta.TransferSyntaxUID = syntax
        if damage == "other size":
            dataset.Rows, dataset.Columns = 68, 72
        stream = {"garbage": b"CANARY" * 50, "cut": stream[: len(stream) // 3], "none": b"", "other size": stream}[
            damage
        ]
        dataset.PixelData = encapsulate([stream] if stream else [b"\0\0"])
        dataset["PixelData"].is_undefined_length = True

    native = syntax if known else ExplicitVRLittleEndian
    write_series(tmp_path, LARGE.astype(np.uint8), syntax=native, change=change)
    (series,) = dicom.scan(tmp_path).series
    if not series.reason:
        with pytest.raises(InputError) as error:
            dicom.read_series(series)
        assert "CANARY" not in str(error.value)


def test_a_video_is_passed_over(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.PixelData = encapsulate([b"\0" * 100])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"  # MPEG-4, which no one decodes here

    write_series(tmp_path, VOXELS, change=change)
    found = dicom.scan(tmp_path)
    assert not found.series
    assert found.passed_over == {"video": 4}
    with pytest.raises(InputError, match="4 x video"):
        dicom.select(found)


# ---------------------------------------------------------------------------------------------- what else lies about


def test_stray_files_are_counted(tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS)
    stray = {".DS_Store": b"\0\0\0\1Bud1", "notes.txt": b"JANE-DOE-CANARY", "empty.dcm": b"", "Thumbs.db": b"\xd0\xcf"}
    for name, content in stray.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "preamble.dcm").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "zeros.dcm").write_bytes(bytes(4096))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    read_as(tmp_path)
    found = dicom.scan(tmp_path)
    assert sum(found.passed_over.values()) == 7
    assert CANARY not in repr(found)


def test_names_do_not_matter(tmp_path: Path) -> None:
    for n, path in enumerate(write_series(tmp_path, VOXELS)):
        path.rename(tmp_path / ["IM000001", "1.2.840.113619.2.55", "MR.ima", "ÄÖ 日本.nii.gz"][n])
    read_as(tmp_path)


@pytest.mark.parametrize("name", ["Größe 脳 и", "a b\tc", "x" * 200, "-rf", "*[?]", "new\nline", "study.zip", "a.dcm"])
def test_folders_of_any_name(name: str, tmp_path: Path) -> None:
    write_series(tmp_path / name / name, VOXELS)
    read_as(tmp_path)
    read_as(tmp_path / name)


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff\xfe"
    try:
        Path(os.fsdecode(folder)).mkdir()
    except OSError:
        pytest.skip("this file system takes text alone for names")
    write_series(Path(os.fsdecode(folder)), VOXELS)
    read_as(tmp_path)


def test_folders_that_lead_into_themselves(tmp_path: Path) -> None:
    write_series(tmp_path / "a", VOXELS)
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "dangling.dcm").symlink_to(tmp_path / "nowhere")
    read_as(tmp_path)


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS)
    os.mkfifo(tmp_path / "pipe.dcm")
    read_as(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.dcm").write_text("no DICOM")
    (tmp_path / "empty.dcm").touch()
    for name in ("nowhere", "empty", "text.dcm", "empty.dcm"):
        with pytest.raises(InputError):
            dicom.select(dicom.scan(tmp_path / name))
        with pytest.raises(InputError):
            dicom.read(tmp_path / name)


CLASSES = {
    "secondary capture": "1.2.840.10008.5.1.4.1.1.7",
    "report": "1.2.840.10008.5.1.4.1.1.88.11",
    "presentation state": "1.2.840.10008.5.1.4.1.1.11.1",
    "raw data": "1.2.840.10008.5.1.4.1.1.66",
    "structure set": "1.2.840.10008.5.1.4.1.1.481.3",
    "waveform": "1.2.840.10008.5.1.4.1.1.9.1.1",
    "PDF": "1.2.840.10008.5.1.4.1.1.104.1",
    "whole slide": "1.2.840.10008.5.1.4.1.1.77.1.6",
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "unknown": "1.2.826.0.1.3680043.2.1",
}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("mixed", [False, True], ids=["series of its own", "in the series"])
def test_other_objects_are_never_stacked(kind: str, mixed: bool, tmp_path: Path) -> None:
    write_series(tmp_path / "a", VOXELS, uid="1.2.3.1", study_uid="1.2.3", marker="X")

    def change(dataset: Dataset, k: int) -> None:
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CLASSES[kind]
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            del dataset[keyword]
        if kind not in ("secondary capture", "CR", "whole slide", "unknown"):
            for keyword in ("PixelData", "Rows", "Columns", "BitsAllocated"):
                del dataset[keyword]

    uid = "1.2.3.1" if mixed else "1.2.3.2"
    write_series(tmp_path / "b", VOXELS[:, :, :1], uid=uid, study_uid="1.2.3", change=change)
    ready = usable(tmp_path)
    assert [series.uid for series in ready] in (["1.2.3.1"], []) if mixed else ["1.2.3.1"]
    for series in ready:
        check(dicom.read_series(series), VOXELS, affine_of())
    found = dicom.scan(tmp_path)
    assert sum(found.passed_over.values()) + len([s for s in found.series if s.reason]) >= 1


def test_a_dicomdir_is_not_followed(tmp_path: Path) -> None:
    write_series(tmp_path / "out", VOXELS)
    index = pydicom.dcmread(write_enhanced(tmp_path / "out", VOXELS[:, :, :2]), stop_before_pixels=True)
    index.SOPClassUID = index.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    record = Dataset()
    record.ReferencedFileID, record.DirectoryRecordType = ["A", "B"], "IMAGE"
    index.DirectoryRecordSequence = [record]
    (tmp_path / "out" / "enhanced.dcm").unlink()
    index.save_as(tmp_path / "out" / "DICOMDIR")
    read_as(tmp_path / "out")
    assert sum(dicom.scan(tmp_path / "out").passed_over.values()) == 1


def test_a_scout_is_never_stacked(tmp_path: Path) -> None:
    scout = put(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(tmp_path / "a", LARGE, uid="1.2.3.1", study_uid="1.2.3")
    write_series(tmp_path / "b", VOXELS[:, :, :1], uid="1.2.3.2", study_uid="1.2.3", change=scout)
    write_series(tmp_path / "c", VOXELS[:, :, :2], uid="1.2.3.3", study_uid="1.2.3", change=scout)
    (series,) = dicom.select(dicom.scan(tmp_path))
    assert series.uid == "1.2.3.1"


def _siemens(dataset: Dataset, k: int) -> None:
    dataset.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", 25)


def _united(dataset: Dataset, k: int) -> None:
    """Grids of United Imaging: slices in one image, each with an item of a private sequence."""
    block = dataset.private_block(0x0065, "Image Private Header", create=True)
    block.add_new(0x50, "DS", "25")
    block.add_new(0x51, "SQ", [Dataset() for _ in range(25)])


MOSAICS = {
    "by type": put(ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]),
    "Siemens": _siemens,
    "United Imaging": _united,
}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kind", MOSAICS)
def test_a_mosaic_is_no_slice(kind: str, count: int, tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS[:, :, :count], modality="MR", change=MOSAICS[kind])
    assert not usable(tmp_path)


def strip(path: Path, keep: str) -> None:
    """Take preamble or meta information, or both, from a file."""
    content = path.read_bytes()
    meta = 132 + 12 + int.from_bytes(content[140:144], "little")
    kept = {"meta": content[132:], "data set": content[meta:], "preamble and data set": content[:132] + content[meta:]}
    path.write_bytes(kept[keep])


@pytest.mark.parametrize(
    ("syntax", "keep"),
    [
        *((syntax, "meta") for syntax in (DeflatedExplicitVRLittleEndian, RLELossless, ExplicitVRBigEndian)),
        *((ImplicitVRLittleEndian, keep) for keep in ("meta", "data set", "preamble and data set")),
        *((ExplicitVRLittleEndian, keep) for keep in ("meta", "data set", "preamble and data set")),
    ],
)
@pytest.mark.parametrize("write", [write_series, write_enhanced])
def test_without_preamble_or_meta(write: Callable[..., Any], syntax: UID, keep: str, tmp_path: Path) -> None:
    """Before 1993 and from some toolkits: what the data set alone does not say is taken from how it is written."""
    write(tmp_path, VOXELS, syntax=syntax)
    for path in tmp_path.iterdir():
        strip(path, keep)
        assert dicom.is_dicom(path)
    series = the(tmp_path)
    read_as(tmp_path)
    assert series.syntax == syntax.name


@pytest.mark.parametrize("keyword", ["SpecificCharacterSet", "ImageType", "InstanceCreationDate", "SOPClassUID"])
def test_a_data_set_that_begins_with(keyword: str, tmp_path: Path) -> None:
    before = ["SpecificCharacterSet", "ImageType", "InstanceCreationDate"]
    gone = dict.fromkeys(before[: [*before, "SOPClassUID"].index(keyword)])
    for path in write_series(tmp_path, VOXELS, change=put(**{"InstanceCreationDate": "20240102", **gone})):
        strip(path, "data set")
    read_as(tmp_path)


def test_compressed_pixels_without_a_word_of_how(tmp_path: Path) -> None:
    for path in write_series(tmp_path, LARGE, syntax=JPEG2000Lossless):
        strip(path, "data set")
    refused(tmp_path, "transfer syntax")


@pytest.mark.parametrize("keyword", ["SOPClassUID", "SeriesInstanceUID"])
@pytest.mark.parametrize("value", [None, "1.2.3/4"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_what_only_begins_like_a_data_set_is_none(keyword: str, value: str | None, tmp_path: Path) -> None:
    path, *_ = write_series(tmp_path, VOXELS[:, :, :1], change=put(**{keyword: value}))
    strip(path, "data set")
    assert not dicom.is_dicom(path)
    assert not dicom.scan(tmp_path).series


@given(
    start=st.sampled_from(
        [b"", b"\x08\x00", b"\x02\x00", b"\x08\x00\x05\x00CS\x0a\x00", b"\x08\x00\x16\x00\x1a\0\0\0"]
    ),
    rest=st.binary(max_size=400),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_file_of_any_bytes_is_dicom(start: bytes, rest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(start + rest)
    assert not dicom.is_dicom(path)
    assert not dicom.scan(tmp_path).series


@pytest.mark.parametrize("part", [0.02, 0.2, 0.5, 0.9])
def test_a_file_cut_short_is_not_lost_silently(part: float, tmp_path: Path) -> None:
    paths = write_series(tmp_path, VOXELS)
    content = paths[3].read_bytes()
    paths[3].write_bytes(content[: int(len(content) * part)])
    found = dicom.scan(tmp_path)
    (series,) = found.series
    if len(series.instances) == 3 and not series.reason:
        assert sum(found.passed_over.values()) == 1
    else:
        with pytest.raises(InputError):
            dicom.read_series(series)


def test_a_file_that_goes_between_scan_and_reading(tmp_path: Path) -> None:
    paths = write_series(tmp_path, VOXELS)
    series = the(tmp_path)
    paths[1].unlink()
    with pytest.raises(InputError):
        dicom.read_series(series)
    with pytest.raises(InputError):
        dicom.headers(series)


def test_a_file_that_changes_between_scan_and_reading(tmp_path: Path) -> None:
    paths = write_series(tmp_path, VOXELS)
    series = the(tmp_path)
    again(paths[1], Rows=4, PixelData=bytes(48))
    with pytest.raises(InputError):
        dicom.read_series(series)


def test_reading_one_file_of_a_series(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path, VOXELS)
    read_as(path)
    assert dicom.is_dicom(path)
    assert not dicom.is_dicom(Path(__file__))


# ------------------------------------------------------------------------------------ habits of the vendors, one by one


def test_two_acquisitions_that_interleave_are_one_volume(tmp_path: Path) -> None:
    """Odd slices first, then even ones, each with a number and a time of its own."""
    change = put(AcquisitionNumber=lambda k: str(1 + k % 2), AcquisitionTime=lambda k: f"03040{k % 2}")
    write_series(tmp_path, VOXELS, change=change)
    read_as(tmp_path)


def test_two_acquisitions_that_overlap_in_a_slice_are_not_mixed(tmp_path: Path) -> None:
    same = {"uid": "1.2.3", "study_uid": "1.2"}
    write_series(tmp_path / "a", VOXELS, change=put(FrameOfReferenceUID="1.9", AcquisitionNumber="1"), **same)
    change = put(FrameOfReferenceUID="1.9", AcquisitionNumber="2")
    write_series(tmp_path / "b", VOXELS + 500, origin=(0, 0, 3), change=change, **same)
    for series in usable(tmp_path):
        volume = dicom.read_series(series)
        second = int(volume.array.min()) > 400
        check(volume, VOXELS + 500 if second else VOXELS, affine_of(origin=(0, 0, 3 if second else 0)))


def test_echoes_of_magnitude_and_phase(tmp_path: Path) -> None:
    """A field map: two attributes together tell four volumes apart."""
    values = [
        {"EchoTime": echo, "ImageType": ["ORIGINAL", "PRIMARY", kind, "ND"]}
        for echo in ("4.92", "7.38")
        for kind in "MP"
    ]
    arrays = parts(tmp_path, values)
    ready = usable(tmp_path)
    assert len({series.name for series in ready}) == 4
    for series in ready:
        volume = dicom.read_series(series)
        number = round(float(volume.array.min()) / 1000)
        check(volume, arrays[number], affine_of())
        assert values[number]["EchoTime"] in series.part
        assert values[number]["ImageType"][2] in series.part


def test_cardiac_phases_whose_trigger_times_drift(tmp_path: Path) -> None:
    arrays = parts(tmp_path, [{"TriggerTime": (lambda k, n=n: str(40 * n + 0.5 * k))} for n in range(5)])
    ready = usable(tmp_path)
    assert len(ready) == 5
    for series in ready:
        volume = dicom.read_series(series)
        check(volume, arrays[round(float(volume.array.min()) / 1000)], affine_of())


def test_times_that_run_on_through_all_slices(tmp_path: Path) -> None:
    """A dynamic scan slice by slice: every image has a time of its own, and a number of its time point."""
    values = [
        {"AcquisitionTime": (lambda k, n=n: f"03{n:02}{k:02}"), "TemporalPositionIdentifier": str(n)}
        for n in range(1, 4)
    ]
    arrays = parts(tmp_path, values)
    ready = usable(tmp_path)
    assert [series.part for series in ready] == [f"TemporalPositionIdentifier={n}" for n in (1, 2, 3)]
    for series, array in zip(ready, arrays, strict=True):
        check(dicom.read_series(series), array, affine_of())


def test_echo_times_of_enhanced_frames(tmp_path: Path) -> None:
    array = np.concatenate([VOXELS, VOXELS + 1000], axis=2)

    def echoes(item: Dataset, k: int) -> None:
        content = item.FrameContentSequence[0]
        content.InStackPositionNumber, content.DimensionIndexValues = 1 + k % 4, [1, 1 + k % 4, 1 + k // 4]
        item.PlanePositionSequence[0].ImagePositionPatient = ["0", "0", str(k % 4)]
        echo = Dataset()
        echo.EffectiveEchoTime = 4.6 if k < 4 else 9.2
        item.MREchoSequence = [echo]

    def change(dataset: Dataset, k: int) -> None:
        frames(echoes)(dataset, k)
        del dataset.SharedFunctionalGroupsSequence[0].MREchoSequence

    write_enhanced(tmp_path, array, change=change)
    ready = usable(tmp_path)
    assert len(ready) == 2
    for series in ready:
        assert series.part in ("EffectiveEchoTime=4.6", "EffectiveEchoTime=9.2")
        check(dicom.read_series(series), VOXELS if "4.6" in series.part else VOXELS + 1000, affine_of())


def test_diffusion_of_enhanced_frames(tmp_path: Path) -> None:
    """b = 0 once and b = 1000 in two directions, and the trace: right, or refused."""
    array = np.concatenate([VOXELS + 1000 * n for n in range(4)], axis=2)

    def weights(item: Dataset, k: int) -> None:
        n, k = divmod(k, 4)
        content = item.FrameContentSequence[0]
        content.InStackPositionNumber, content.DimensionIndexValues = 1 + k, [1, 1 + k, 1 + n]
        item.PlanePositionSequence[0].ImagePositionPatient = ["0", "0", str(k)]
        weight = Dataset()
        weight.DiffusionBValue = 1000.0 if n else 0.0
        weight.DiffusionDirectionality = ["NONE", "DIRECTIONAL", "DIRECTIONAL", "ISOTROPIC"][n]
        if n in (1, 2):
            direction = Dataset()
            direction.DiffusionGradientOrientation = [float(n == 1), float(n == 2), 0.0]
            weight.DiffusionGradientDirectionSequence = [direction]
        item.MRDiffusionSequence = [weight]

    write_enhanced(tmp_path, array, change=frames(weights))
    found = dicom.scan(tmp_path)
    assert found.series
    for series in found.series:
        if not series.reason:
            volume = dicom.read_series(series)
            check(volume, VOXELS + 1000 * round(float(volume.array.min()) / 1000), affine_of())
    with pytest.raises(InputError):
        dicom.select(found)


def test_private_attributes_that_look_like_geometry(tmp_path: Path) -> None:
    """Philips keeps another slope in private attributes, GE and Siemens other positions: not ours to apply."""

    def change(dataset: Dataset, k: int) -> None:
        dataset.private_block(0x2005, "Philips MR Imaging DD 001", create=True).add_new(0x0E, "FL", 3.5)
        dataset.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x15, "FD", [9.0, 9.0, 9.0])
        dataset.private_block(0x0027, "GEMS_IMAG_01", create=True).add_new(0x41, "FL", 99.0)
        item = Dataset()
        item.ImagePositionPatient, item.RescaleSlope, item.Rows = ["9", "9", "9"], "7", 3
        dataset.private_block(0x2005, "Philips MR Imaging DD 001").add_new(0x0F, "SQ", [item])
        dataset.RequestAttributesSequence = [item]
        dataset.ReferencedImageSequence = [item]
        dataset.IconImageSequence = [item]

    write_series(tmp_path, VOXELS, modality="MR", change=change)
    read_as(tmp_path)


def test_a_real_world_value_map_beside_the_slope(tmp_path: Path) -> None:
    """Units of another kind do not replace the values that every viewer shows."""

    def change(dataset: Dataset, k: int) -> None:
        mapping = Dataset()
        mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = 9.0, 1.0
        dataset.RealWorldValueMappingSequence = [mapping]

    write_series(tmp_path, VOXELS, modality="MR", slope=2, intercept=-1, change=change)
    read_as(tmp_path, VOXELS * 2 - 1)


def test_a_table_of_modality_values(tmp_path: Path) -> None:
    """PS3.3 C.11.1: the table takes the place of slope and intercept."""

    def change(dataset: Dataset, k: int) -> None:
        del dataset.RescaleSlope, dataset.RescaleIntercept
        table = Dataset()
        table.add_new("LUTDescriptor", "US", [120, 0, 16])
        table.add_new("LUTData", "OW", (np.arange(120) ** 2).astype("<u2").tobytes())
        table.ModalityLUTType = "US"
        dataset.ModalityLUTSequence = [table]

    stored = np.arange(120, dtype=np.uint16).reshape(VOXELS.shape)
    write_series(tmp_path, stored, modality="CT", change=change)
    series = dicom.scan(tmp_path).series[0]
    if series.reason:
        refused(tmp_path)
    else:
        read_as(tmp_path, stored.astype(int) ** 2)


def test_a_series_that_was_numbered_by_a_poor_archive(tmp_path: Path) -> None:
    """Implicit and explicit, compressed and not, in one series: each file says how it is to be read."""
    syntaxes = [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, ExplicitVRLittleEndian]
    for n, syntax in enumerate(syntaxes):
        change = put(FrameOfReferenceUID="1.9")
        origin = (0, 0, 3 * n)
        same = {"uid": "1.2.3", "study_uid": "1.2"}
        write_series(tmp_path / str(n), LARGE + n, origin=origin, syntax=syntax, change=change, **same)
    read_as(tmp_path, np.concatenate([LARGE + n for n in range(4)], axis=2))


def test_signs_that_differ_between_slices(tmp_path: Path) -> None:
    """Slices without negative numbers written as unsigned."""
    array = np.arange(120, dtype=np.int16).reshape(VOXELS.shape)
    array[:, :, 2] -= 300
    write_series(tmp_path, array, change=put(PixelRepresentation=lambda k: int(k == 2)))
    read_as(tmp_path, array)


def test_bits_that_differ_between_slices(tmp_path: Path) -> None:
    array = VOXELS + 7
    same = {"uid": "1.2.3", "study_uid": "1.2", "change": put(FrameOfReferenceUID="1.9")}
    write_series(tmp_path / "a", array[:, :, :2], **same)
    write_series(tmp_path / "b", array[:, :, 2:].astype(np.uint8), origin=(0, 0, 2), **same)
    read_as(tmp_path, array)


def test_numbers_with_blanks_zeros_and_exponents(tmp_path: Path) -> None:
    text = {
        "ImagePositionPatient": lambda k: f" -1.50E+01\\+2.0e0 \\{k}.000000000000".encode(),
        "PixelSpacing": lambda k: b"0.70000000000000000000\\ 7e-1 ",
        "ImageOrientationPatient": lambda k: b"1.0\\0\\0\\0\\1\\0\0",
    }

    def change(dataset: Dataset, k: int) -> None:
        for keyword, value in text.items():
            raw(keyword, value(k))(dataset, k)

    write_series(tmp_path, VOXELS, syntax=ImplicitVRLittleEndian, change=change)
    read_as(tmp_path, spacing=(0.7, 0.7, 1), origin=(-15, 2, 0))


def test_a_thousand_thin_slices(tmp_path: Path) -> None:
    """Cone beam and micro CT: 0.08 mm, positions of six digits; the error of rounding does not add up."""
    array = (np.arange(3 * 2 * 400) % 30000).astype(np.int16).reshape(3, 2, 400)

    def rounded(dataset: Dataset, k: int) -> None:
        dataset.ImagePositionPatient = [f"{float(v):.3f}" for v in dataset.ImagePositionPatient]

    write_series(tmp_path, array, spacing=(0.08, 0.08, 0.0803), origin=(5, 6, -33.33), change=rounded)
    read_as(tmp_path, array, tolerance=2e-3, spacing=(0.08, 0.08, 0.0803), origin=(5, 6, -33.33))


def test_a_mouse_and_an_elephant(tmp_path: Path) -> None:
    for n, scale in enumerate((0.005, 60.0)):
        spacing = (scale, scale, scale)
        write_series(tmp_path / str(n), VOXELS, spacing=spacing, origin=(0, 0, 4900))
        read_as(tmp_path / str(n), spacing=spacing, origin=(0, 0, 4900))


def test_what_an_error_says_can_be_acted_on(tmp_path: Path) -> None:
    write_series(tmp_path / "a", VOXELS, uid="1.2.3.1", study_uid="1.2.3", offsets=[0, 1, 5, 6])
    with pytest.raises(IncompleteSeries) as error:
        dicom.read(tmp_path)
    assert error.value.remedy
    assert "1.2.3.1" in str(error.value)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_memory_follows_the_files(syntax: str, tmp_path: Path) -> None:
    """A series of 8 MB is read within what ``reading_bytes`` says and half of it."""
    import tracemalloc

    array = np.arange(256 * 256 * 64, dtype=np.int32).reshape(256, 256, 64).astype(np.int16)
    write_series(tmp_path, array, syntax=syntax)
    series = the(tmp_path)
    dicom.read_series(series)  # imports
    tracemalloc.start()
    volume = dicom.read_series(series)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert volume.array.nbytes == 2**23
    assert peak <= 1.5 * dicom.reading_bytes(series)
    assert dicom.reading_bytes(series) < 3 * 2**23


def test_a_grid_that_lies_does_not_take_its_memory(tmp_path: Path) -> None:
    """A header of 40000 x 40000 pixels over 200 bytes of a compressed stream."""
    import tracemalloc

    write_series(tmp_path, LARGE, syntax=JPEG2000Lossless, change=put(Rows=40000, Columns=40000))
    tracemalloc.start()
    (series,) = dicom.scan(tmp_path).series
    with pytest.raises(InputError):
        dicom.read_series(series)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20


def test_reading_twice_gives_one_result(tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS)
    first, second = dicom.read(tmp_path), dicom.read(tmp_path)
    np.testing.assert_array_equal(first.array, second.array)
    assert first.header.name == second.header.name
    assert first.array.flags.writeable
    first.array[:] = 0
    np.testing.assert_array_equal(dicom.read_series(first.header).array, second.array)


def test_the_name_of_a_series_is_that_of_its_copy(tmp_path: Path) -> None:
    write_series(tmp_path / "a", VOXELS, uid="1.2.3.4", study_uid="1.2")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    zipped(tmp_path / "a", tmp_path / "c.zip")
    names = {the(tmp_path / place).name for place in ("a", "b", "c.zip")}
    assert len(names) == 1


# ----------------------------------------------------------------------------------------------------- the malicious


@pytest.mark.parametrize(
    "uid", [b"../../../etc/JANE-DOE-CANARY", b"1." * 5000, b"1.2\x003.4", b"", b"JANE-DOE-CANARY", b"1.2.3\n4", b"/"]
)
@pytest.mark.parametrize("keyword", ["SeriesInstanceUID", "StudyInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_hostile_uids(
    keyword: str, uid: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    write_series(tmp_path, VOXELS, change=raw(keyword, uid))
    recwarn.clear()
    caplog.clear()
    found = dicom.scan(tmp_path)
    shown = repr(found)
    for series in found.series:
        assert re.fullmatch(r"series_[0-9a-f]{12}", series.name)
        for value in (series.uid, series.study_uid, series.frame_uid):
            assert re.fullmatch(r"[0-9.]{0,64}", value)
        try:
            dicom.read_series(series)
            dicom.select(found)
        except MedsegError as error:
            shown += str(error)
    shown += caplog.text + "".join(str(w.message) for w in recwarn)
    assert CANARY not in shown
    assert "1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1" not in shown


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_marker_in_every_text_is_in_no_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    caplog.set_level(logging.DEBUG)
    text = CANARY.encode()
    faults = {
        "a": raw("RescaleSlope", text),
        "b": raw("ImagePositionPatient", text),
        "c": raw("Modality", text + b"\\" + text),
        "d": raw("NumberOfFrames", text),
        "e": raw("SpecificCharacterSet", text),
        "f": raw("ImageType", text),
        "g": raw("EchoTime", text),
        "h": raw("AcquisitionTime", text),
        "i": raw("InstanceNumber", text),
        "j": raw("PatientBirthDate", text),
        "k": raw("TemporalPositionIdentifier", text),
        "l": raw("BitsAllocated", text),
        "m": raw("PhotometricInterpretation", text),
        "n": raw("TriggerTime", text),
        "o": raw("DiffusionBValue", text),
    }
    for name, change in faults.items():
        write_series(tmp_path / name, VOXELS, marker=CANARY, modality="MR", study_uid=f"1.2.{ord(name)}", change=change)
        write_series(tmp_path / name / "x", VOXELS, marker=CANARY, study_uid=f"1.2.{ord(name)}", offsets=[0, 1, 5, 9])
    recwarn.clear()
    caplog.clear()
    shown = []
    for name in faults:
        found = dicom.scan(tmp_path / name)
        shown.append(repr(found).replace(str(tmp_path), ""))
        for series in found.series:
            shown += [
                series.part,
                series.reason,
                series.irregular,
                series.modality,
                series.name,
                series.syntax,
                series.kind,
            ]
            for action in (dicom.read_series, dicom.headers, dicom.reading_bytes):
                try:
                    action(series)
                except MedsegError as error:
                    shown.append("".join(traceback.format_exception(error)))
        for pattern in ("", "*", "x*"):
            try:
                dicom.select(found, pattern)
            except MedsegError as error:
                shown.append(str(error))
    shown += [caplog.text, *(str(w.message) for w in recwarn)]
    assert CANARY not in "".join(shown)


def zipped(folder: Path, path: Path, name: Callable[[Path], str] = lambda p: p.name) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, name(file))
    return path


@pytest.mark.parametrize("prefix", ["", "study/series/", "study\\series\\", "Größe 脳/", "./", "a/b/c/d/e/f/g/h/"])
def test_a_zip_is_read_like_its_folder(prefix: str, tmp_path: Path) -> None:
    write_series(tmp_path / "in", VOXELS, spacing=(1, 2, 3))
    path = zipped(tmp_path / "in", tmp_path / "study.zip", lambda p: prefix + p.name)
    before = sorted(tmp_path.rglob("*"))
    read_as(path, spacing=(1, 2, 3))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_zip_of_an_enhanced_file_and_strays(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "in", VOXELS, syntax=RLELossless)
    (tmp_path / "in" / "._enhanced.dcm").write_bytes(b"\0\5\x16\7" + bytes(100))
    (tmp_path / "in" / "inner.zip").write_bytes(zipped(tmp_path / "in", tmp_path / "x.zip").read_bytes())
    path = zipped(tmp_path / "in", tmp_path / "study.zip")
    read_as(path)
    assert sum(dicom.scan(path).passed_over.values()) == 2


def test_a_zip_within_a_folder_is_no_surprise(tmp_path: Path) -> None:
    """One archive beside its own unpacked copy: the series is there once."""
    write_series(tmp_path / "in", VOXELS)
    zipped(tmp_path / "in", tmp_path / "in" / "study.zip")
    read_as(tmp_path / "in")


@pytest.mark.parametrize("name", ["../x.dcm", "a/../../x.dcm", "/etc/x.dcm", "..\\..\\x.dcm", "C:\\x.dcm", "C:/x.dcm"])
def test_a_zip_that_leads_outside_is_refused(name: str, tmp_path: Path) -> None:
    write_series(tmp_path / "in", VOXELS)
    path = zipped(tmp_path / "in", tmp_path / "study.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(InputError):
        dicom.scan(path)


def test_a_zip_with_a_link_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "in", VOXELS)
    path = zipped(tmp_path / "in", tmp_path / "study.zip")
    link = zipfile.ZipInfo("link.dcm")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InputError):
        dicom.scan(path)


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        head = bytes(128) + b"DICM"
        archive.writestr("a.dcm", head + bytes(64 * 2**20))
    with pytest.raises(InputError):
        dicom.scan(path)


def test_a_member_that_lies_about_its_size(tmp_path: Path) -> None:
    """The directory says 100 bytes, the stream holds 32 MB: not more is taken than was said."""
    path = tmp_path / "liar.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", bytes(128) + b"DICM" + bytes(32 * 2**20))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2")
    content[entry + 24 : entry + 28] = struct.pack("<I", 100)
    content[22:26] = struct.pack("<I", 100)
    path.write_bytes(content)
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(UnreadableFile, match="a member of the zip is damaged"):
        dicom.scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


def test_too_many_members(tmp_path: Path) -> None:
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0", b"")
        archive.filelist *= 20_000
    with pytest.raises(InputError):
        dicom.read(path)


@pytest.mark.parametrize("damage", ["cut", "byte", "text", "empty", "password", "method"])
def test_damaged_zips(damage: str, tmp_path: Path) -> None:
    write_series(tmp_path / "in", LARGE)
    path = zipped(tmp_path / "in", tmp_path / "study.zip")
    content = bytearray(path.read_bytes())
    first = content.index(b"PK\1\2")
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "byte":
        content[first // 6] ^= 0xFF
    elif damage == "text":
        content = bytearray(b"no archive at all")
    elif damage == "empty":
        content = bytearray()
    elif damage == "password":
        content[6] |= 1
        content[first + 8] |= 1
    else:
        content[8:10] = content[first + 10 : first + 12] = struct.pack("<H", 99)
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        dicom.read(path)
    assert not isinstance(error.value, IncompleteSeries) or "slice" in str(error.value)


def test_a_zip_whose_pixels_are_damaged(tmp_path: Path) -> None:
    """The sum of a member is checked when its voxels are read."""
    write_series(tmp_path / "in", LARGE)
    path = tmp_path / "study.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted((tmp_path / "in").iterdir()):
            archive.write(file, file.name)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\3\4", 100) - 50] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UnreadableFile):
        dicom.read(path)


def test_lengths_that_lie(tmp_path: Path) -> None:
    """Elements that claim 4 GB take neither time nor memory."""
    paths = write_series(tmp_path, VOXELS)
    head = bytes(128) + b"DICM"
    meta = b"\2\0\0\0UL\4\0" + struct.pack("<I", 26) + b"\2\0\x10\0UI\x12\0" + b"1.2.840.10008.1.2\0"
    for tag, kind in ((b"\x10\0\x10\0", b"OB"), (b"\x08\0\x40\x11", b"SQ"), (b"\x10\0\x10\0", b"UN")):
        path = tmp_path / f"{kind.decode()}.dcm"
        path.write_bytes(head + meta + tag + kind + b"\0\0" + struct.pack("<I", 0xFFFFFFF0) + b"x" * 20)
    deep = b"\x08\0\x40\x11" + b"\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    (tmp_path / "deep.dcm").write_bytes(head + meta + deep * 5000)
    import tracemalloc

    tracemalloc.start()
    found = dicom.scan(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20
    assert len(found.series) == 1
    assert sum(found.passed_over.values()) == 4
    assert len(paths) == 4


def test_a_deflated_bomb(tmp_path: Path) -> None:
    """A deflated data set of 200 MB in 200 kB is passed over, without its memory."""
    import tracemalloc
    import zlib

    path = write_series(tmp_path, VOXELS, syntax=DeflatedExplicitVRLittleEndian)[0]
    content = path.read_bytes()
    start = 132 + 12 + struct.unpack("<I", content[140:144])[0]
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = packer.compress(zlib.decompressobj(-zlib.MAX_WBITS).decompress(content[start:]))
    for _ in range(200):
        body += packer.compress(bytes(2**20))
    path.write_bytes(content[:start] + body + packer.flush())
    tracemalloc.start()
    found = dicom.scan(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20
    assert found.passed_over == {"unreadable file": 1}
    assert [len(series.frames) for series in found.series] == [3]
    assert "cannot be read" in found.series[0].warnings[0]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("where", ["name", "header", "pixels"])
def test_a_zip_of_which_a_member_is_damaged(method: int, where: str, tmp_path: Path) -> None:
    """The last slice: what is left would make a shorter volume, of which no one were told."""
    paths = write_series(tmp_path / "in", LARGE)
    path = tmp_path / "study.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in paths:
            archive.write(file, file.name)
        start, size = archive.infolist()[2].header_offset, archive.infolist()[2].compress_size
    content = bytearray(path.read_bytes())
    content[start + {"name": 32, "header": 300, "pixels": size - 200}[where]] ^= 0xFF
    path.write_bytes(content)
    try:
        volume = dicom.read(path)
    except InputError:
        return
    assert volume.warnings


def test_a_file_that_cannot_be_opened_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = write_series(tmp_path, VOXELS)[3]
    opened = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == last:
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert sum(dicom.scan(tmp_path).passed_over.values()) == 1
    assert "cannot be read" in dicom.read(tmp_path).warnings[0]


def test_a_zip_with_fewer_members_than_it_counts(tmp_path: Path) -> None:
    write_series(tmp_path / "in", VOXELS)
    content = bytearray(zipped(tmp_path / "in", tmp_path / "study.zip").read_bytes())
    end = content.rindex(b"PK\5\6")
    (start,) = struct.unpack("<I", content[end + 16 : end + 20])
    last = content.rindex(b"PK\1\2")
    content[end + 12 : end + 16] = struct.pack("<I", last - start)  # the directory ends before its last entry
    del content[last:end]
    (tmp_path / "study.zip").write_bytes(content)
    with pytest.raises(UnreadableFile, match="is a damaged zip"):
        dicom.scan(tmp_path / "study.zip")


LOST: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "no header": lambda path: path.write_bytes(path.read_bytes()[-100:]),
    "bare and cut": lambda path: path.write_bytes(path.read_bytes()[132:300]),
    "UID": lambda path: again(path, SeriesInstanceUID=None),
    "link": lambda path: path.symlink_to(path.rename(path.with_name("x")).with_name("y")),
    "other folder": lambda path: path.rename(path.parent.parent / "b" / path.name).write_bytes(b""),
}


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_no_slice_is_lost_without_a_word(kind: str, tmp_path: Path) -> None:
    """An end slice that nothing says whose it is: every series may have lost it."""
    (tmp_path / "b").mkdir()
    last = write_series(tmp_path / "a", VOXELS, uid="1.2.1", study_uid="1.2")[3]
    write_series(tmp_path / "c", VOXELS, uid="1.2.2", study_uid="1.2")
    LOST[kind](last)
    (tmp_path / "a" / "x").unlink(missing_ok=True)
    one, two = usable(tmp_path)
    assert (len(one.frames), len(two.frames)) == (3, 4)
    for series in (one, two):
        assert series.warnings == (
            "1 files or folders beside its own cannot be read: slices may be missing at its ends",
        )
        assert dicom.read_series(series).warnings == series.warnings


def test_a_damaged_file_in_another_folder_is_missed_by_its_series(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    last = write_series(tmp_path / "a", VOXELS)[3]
    last = last.rename(tmp_path / "b" / "last.dcm")
    content = last.read_bytes()
    last.write_bytes(content[: content.index(b"\x28\x00\x10\x00US")])
    refused(tmp_path, "1 of its files cannot be read")


@pytest.mark.parametrize("uid", ["1.2.003.04", "1.2.840.0113619.2.00.1", "01.2", "1..2", "1.2.", "9" * 64])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_uids_that_are_none_by_the_letter(uid: str, tmp_path: Path) -> None:
    """Zeros before a component break PS3.5 9.1, and are written all the same."""
    values = {"SeriesInstanceUID": uid, "StudyInstanceUID": uid, "FrameOfReferenceUID": uid}
    write_series(tmp_path, VOXELS, change=put(**values, SOPInstanceUID=lambda k: f"{uid[:-1]}{k}"))
    series = read_as(tmp_path).header
    assert isinstance(series, dicom.Series)
    assert (series.uid, series.study_uid, series.frame_uid) == (uid, uid, uid)
    assert dicom.select(dicom.scan(tmp_path), uid)[0].name == series.name


def test_rounded_positions_of_thin_slices(tmp_path: Path) -> None:
    """Jitter of 8 % by rounding to 0.1 mm alone: even, corners where the file has them, and even to who goes on."""
    array = np.arange(6 * 5 * 41, dtype=np.int16).reshape(6, 5, 41)

    def rounded(dataset: Dataset, k: int) -> None:
        dataset.ImagePositionPatient = [f"{float(v):.1f}" for v in dataset.ImagePositionPatient]

    write_series(tmp_path, array, spacing=(0.7, 0.7, 0.625), origin=(-120.5, 7, -33.5), change=rounded)
    volume = read_as(tmp_path, array, spacing=(0.7, 0.7, 0.625), origin=(-120.5, 7, -33.5))  # 40 steps are 25 mm
    assert volume.warnings == ("positions of slices are rounded to 0.1 mm: taken as even, 0.625 mm apart",)
    assert isinstance(volume.header, dicom.Series)
    heights = [frame.plane.position[2] for frame in volume.header.frames if frame.plane]
    np.testing.assert_allclose(heights, -33.5 + 0.625 * np.arange(41))


def test_progress_of_a_scan(tmp_path: Path) -> None:
    write_series(tmp_path, VOXELS)
    seen: list[tuple[str, float, str]] = []
    dicom.scan(tmp_path, lambda *report: seen.append(report))
    assert seen == [("reading DICOM headers", part / 4, "") for part in (1, 2, 3, 4)]
