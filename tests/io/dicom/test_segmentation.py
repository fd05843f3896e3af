"""DICOM SEG: masks where they belong, by several readers; what a SEG says, and what it must not say."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import subprocess
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dicoms
import highdicom
import imagecodecs
import numpy as np
import pydicom
import pytest
from highdicom._standard_utils import get_iod_module_map, get_module_attribute_map
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from medseg.errors import GeometryMismatch, IncompleteSeries, InputError, UnreadableFile
from medseg.geometry import Geometry
from medseg.io import dicom
from medseg.io.dicom import segmentation
from medseg.terminology import Code, Coding
from medseg.volume import Labels, Mask

DATA = os.environ.get("MEDSEG_TEST_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="MEDSEG_TEST_DATA is not set")
needs_dciodvfy = pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy (dicom3tools) is not installed")

LABELS = Labels(values={"liver": 7, "left kidney": 300, "spleen": 400})
NUMBERS = {7: 1, 300: 2, 400: 3}
TURNED = float(np.cos(0.35)), float(np.sin(0.35))
PLACES: dict[str, dict[str, Any]] = {
    "axial": {"row": (1, 0, 0), "column": (0, 1, 0)},
    "sagittal": {"row": (0, 1, 0), "column": (0, 0, -1)},
    "coronal": {"row": (1, 0, 0), "column": (0, 0, -1)},
    "negated column": {"row": (1, 0, 0), "column": (0, -1, 0)},
    "oblique": {"row": (TURNED[0], TURNED[1], 0), "column": (-TURNED[1], TURNED[0], 0)},
    "double oblique": {
        "row": (TURNED[0], TURNED[1], 0),
        "column": (-TURNED[1] * TURNED[0], TURNED[0] ** 2, TURNED[1]),
    },
}
GRID: dict[str, Any] = {"spacing": (0.7, 0.9, 2.5), "origin": (-10.5, 33.25, 12.125)}
SHAPE = (6, 5, 4)
ORIENTATIONS = ("RAS", "LPS", "LAS", "RPI", "PSR", "SLA", "AIL", "IPR")
KINDS = ("BINARY", "LABELMAP")


def labelled(shape: tuple[int, int, int] = SHAPE) -> NDArray[np.uint16]:
    """Every label, no symmetry, the first slice and the last column empty."""
    array = np.zeros(shape, dtype=np.uint16)
    array[1, 2, 1], array[4, 0, 2], array[0, 4, 3] = 7, 300, 400
    array[2:4, 1, 1:3] = 7
    return array


def a_series(folder: Path, *, make: Callable[..., Any] = dicoms.write_series, **place: Any) -> dicom.Series:
    make(folder, np.zeros(SHAPE, dtype=np.int16), **{**GRID, **place})
    return dicom.select(dicom.scan(folder), resample_irregular=True)[0]


def a_mask(series: dicom.Series, array: NDArray[Any] | None = None, labels: Labels | None = LABELS) -> Mask:
    assert series.geometry is not None
    return Mask(labelled() if array is None else array, series.geometry, labels, header=series)


def points(array: NDArray[Any], affine: NDArray[np.float64]) -> dict[tuple[float, ...], int]:
    """Labelled voxels: where they lie in the world, 1/100 mm, and their labels."""
    voxels = np.argwhere(array)
    world = voxels @ affine[:3, :3].T + affine[:3, 3]
    return {tuple(np.round(w, 2) + 0.0): int(array[tuple(v)]) for w, v in zip(world.tolist(), voxels, strict=True)}


def points_of(mask: Mask) -> dict[tuple[float, ...], int]:
    found = points(mask.array, mask.geometry.affine)
    return {place: NUMBERS.get(value, value) for place, value in found.items()}


def points_by_hand(path: Path) -> dict[tuple[float, ...], int]:
    """Read frame by frame: PS3.3, equation C.7.6.2.1-1."""
    dataset = pydicom.dcmread(path)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    between_rows, between_columns = (float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing)
    pixels = dataset.pixel_array.reshape(dataset.NumberOfFrames, dataset.Rows, dataset.Columns)
    found: dict[tuple[float, ...], int] = {}
    for frame, plane in zip(dataset.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        first = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        for row, column in np.argwhere(plane):
            x, y, z = first + column * between_columns * orientation[:3] + row * between_rows * orientation[3:]
            number = int(plane[row, column])
            if dataset.SegmentationType == "BINARY":
                number = int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
            place = tuple(np.round([-x, -y, z], 2) + 0.0)
            assert place not in found
            found[place] = number
    return found


def points_by_highdicom(path: Path) -> dict[tuple[float, ...], int]:
    volume = highdicom.seg.segread(path).get_volume(combine_segments=True)
    return points(volume.array, volume.get_affine("RAS"))


def close(one: dict[tuple[float, ...], int], other: dict[tuple[float, ...], int]) -> bool:
    """Whether each point has a partner of its label within 1/50 mm."""
    left, right = (np.array([(*place, value) for place, value in sorted(item.items())]) for item in (one, other))
    if len(left) != len(right):
        return False
    distances = np.abs(left[:, None, :] - right[None, :, :]).max(axis=2)
    return bool((distances.min(axis=0) < 0.021).all() and (distances.min(axis=1) < 0.021).all())


@pytest.fixture(scope="module", params=PLACES)
def somewhere(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dicom.Series:
    return a_series(tmp_path_factory.mktemp("series"), **PLACES[request.param])


@pytest.fixture(scope="module")
def axial(tmp_path_factory: pytest.TempPathFactory) -> dicom.Series:
    return a_series(tmp_path_factory.mktemp("axial"))


@pytest.mark.parametrize(("kind", "orientation"), list(itertools.product(KINDS, ORIENTATIONS)))
def test_labels_lie_where_they_lay_however_they_came(
    somewhere: dicom.Series, kind: Any, orientation: str, tmp_path: Path
) -> None:
    mask = a_mask(somewhere)
    turn = mask.geometry.to(orientation)
    elsewhere = Mask(turn.apply(mask.array), mask.geometry.reoriented(turn), LABELS, header=somewhere)
    segmentation.write(elsewhere, tmp_path / "seg.dcm", kind=kind)
    expected = points_of(mask)
    assert len(expected) == 7  # 4 + 3 voxels, by hand
    assert close(points_by_hand(tmp_path / "seg.dcm"), expected)
    assert close(points_by_highdicom(tmp_path / "seg.dcm"), expected)
    read = segmentation.read_mask(tmp_path / "seg.dcm")
    assert close(points_of(read), expected)
    back = read.placed(mask.geometry)
    assert back.geometry == mask.geometry
    assert back.array.tolist() == np.vectorize(lambda v: NUMBERS.get(v, 0))(mask.array).tolist()


def test_the_world_by_hand(axial: dicom.Series, tmp_path: Path) -> None:
    array = np.zeros(SHAPE, dtype=np.uint8)
    array[2, 1, 3] = 7
    segmentation.write(a_mask(axial, array), tmp_path / "seg.dcm")
    # LPS: -10.5 + 2 * 0.7, 33.25 + 1 * 0.9, 12.125 + 3 * 2.5
    assert points_by_hand(tmp_path / "seg.dcm") == {(9.1, -34.15, 19.62): 1}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_enhanced_images_are_told_by_their_place(kind: Any, tmp_path: Path) -> None:
    series = a_series(tmp_path, make=dicoms.write_enhanced, **PLACES["double oblique"])
    segmentation.write(a_mask(series), tmp_path / "out" / "seg.dcm", kind=kind)
    assert close(points_by_hand(tmp_path / "out" / "seg.dcm"), points_of(a_mask(series)))
    image, seg = pydicom.dcmread(series.files[0]), pydicom.dcmread(tmp_path / "out" / "seg.dcm")
    for frame in seg.PerFrameFunctionalGroupsSequence:
        source = frame.DerivationImageSequence[0].SourceImageSequence
        assert [item.ReferencedSOPInstanceUID for item in source] == [image.SOPInstanceUID]
        referred = image.PerFrameFunctionalGroupsSequence[source[0].ReferencedFrameNumber - 1]
        place = referred.PlanePositionSequence[0].ImagePositionPatient
        assert frame.PlanePositionSequence[0].ImagePositionPatient == pytest.approx(place)


def test_frames_refer_to_their_slices(axial: dicom.Series, tmp_path: Path) -> None:
    segmentation.write(a_mask(axial), tmp_path / "seg.dcm")
    images = {image.SOPInstanceUID: image for image in dicom.headers(axial)}
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert len(seg.PerFrameFunctionalGroupsSequence) == 4  # liver in two slices, kidney and spleen in one
    for frame in seg.PerFrameFunctionalGroupsSequence:
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        place = images[source.ReferencedSOPInstanceUID].ImagePositionPatient
        assert frame.PlanePositionSequence[0].ImagePositionPatient == pytest.approx(place)
    first = dicom.headers(axial)[0]
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        assert seg[keyword].value == first[keyword].value
    assert seg.SeriesInstanceUID != first.SeriesInstanceUID
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices == 2.5


def test_of_two_volumes_in_one_file_the_frames_of_the_right_one_are_referred_to(tmp_path: Path) -> None:
    def change(dataset: Any, k: int) -> None:
        for number, frame in enumerate(dataset.PerFrameFunctionalGroupsSequence):
            echo, k = number % 2, number // 2  # frames of the two echoes in turn
            frame.PlanePositionSequence[0].ImagePositionPatient = [-10.5, 33.25, 12.125 + 2.5 * k]
            frame.MREchoSequence = [pydicom.Dataset()]
            frame.MREchoSequence[0].EffectiveEchoTime = 10.0 + 80.0 * echo
        del dataset.SharedFunctionalGroupsSequence[0].MREchoSequence

    dicoms.write_enhanced(tmp_path, np.zeros((6, 5, 8), dtype=np.int16), **GRID, change=change)
    early, late = sorted(dicom.scan(tmp_path).series, key=lambda series: series.part)
    for series, first in ((early, 1), (late, 2)):
        segmentation.write(a_mask(series), tmp_path / "out" / "seg.dcm")
        seg = pydicom.dcmread(tmp_path / "out" / "seg.dcm")
        for frame in seg.PerFrameFunctionalGroupsSequence:
            (source,) = frame.DerivationImageSequence[0].SourceImageSequence
            k = round((frame.PlanePositionSequence[0].ImagePositionPatient[2] - 12.125) / 2.5)
            assert source.ReferencedFrameNumber == first + 2 * k


def test_slices_may_be_spread_over_several_multi_frame_files(tmp_path: Path) -> None:
    def change(dataset: Any, k: int) -> None:
        dataset.FrameOfReferenceUID = "1.2.3"

    for n in range(2):
        origin = (-10.5, 33.25, 12.125 + n * 2 * 2.5)
        place = {**GRID, "origin": origin, "uid": "1.2.3.4", "study_uid": "1.2.3.5", "change": change}
        dicoms.write_enhanced(tmp_path / str(n), np.zeros((6, 5, 2), dtype=np.int16), **place)
    series = dicom.select(dicom.scan(tmp_path))[0]
    assert len(series.files) == 2
    segmentation.write(a_mask(series), tmp_path / "out" / "seg.dcm")
    assert close(points_by_hand(tmp_path / "out" / "seg.dcm"), points_of(a_mask(series)))
    seg = pydicom.dcmread(tmp_path / "out" / "seg.dcm")
    referred = {item.ReferencedSOPInstanceUID for item in seg.SourceImageSequence}
    assert referred == {image.SOPInstanceUID for image in dicom.headers(series)}


def test_a_tilted_series_keeps_its_tilt(tmp_path: Path) -> None:
    step = (0.0, 1.0, 2.5)
    series = a_series(tmp_path, step=step)
    assert series.irregular
    segmentation.write(a_mask(series), tmp_path / "seg.dcm")
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    frames = [frame.PlanePositionSequence[0].ImagePositionPatient for frame in seg.PerFrameFunctionalGroupsSequence]
    assert min(frames, key=lambda place: place[2]) == pytest.approx([-10.5, 34.25, 14.625])  # the second slice
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices == pytest.approx(2.5)
    read = segmentation.read_mask(tmp_path / "seg.dcm")
    assert read.geometry.is_sheared
    assert "tilted" in read.warnings[0]
    assert close(points_of(read), points_of(a_mask(series)))
    assert np.array_equal(read.placed(a_mask(series).geometry).array > 0, labelled() > 0)


def test_labels_of_interpolated_slices_stay_with_the_slices_that_there_are(tmp_path: Path) -> None:
    series = a_series(tmp_path, offsets=(0.0, 2.5, 7.5, 10.0))
    assert series.geometry is not None
    assert series.geometry.shape == (6, 5, 5)
    array = np.zeros((6, 5, 5), dtype=np.uint8)
    array[1, 2, 1], array[3, 3, 2], array[4, 4, 3] = 7, 7, 7  # the second was never scanned
    segmentation.write(a_mask(series, array), tmp_path / "seg.dcm")
    # slices at 2.5 and 7.5 mm: x -10.5 + 0.7 i, y 33.25 + 0.9 j
    assert points_by_hand(tmp_path / "seg.dcm") == {(9.8, -35.05, 14.62): 1, (7.7, -36.85, 19.62): 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offsets", [(0.0, 2.5, 7.5, 10.0), (0.0, 2.5, 7.2, 9.9)])
def test_planes_between_uneven_slices_are_those_of_the_nearest(kind: Any, offsets: Any, tmp_path: Path) -> None:
    series = a_series(tmp_path / "series", offsets=offsets)
    assert series.geometry is not None
    assert series.geometry.shape == (6, 5, 5)
    array = np.zeros((6, 5, 5), dtype=np.uint8)
    array[1, 2, 1], array[3, 3, 2], array[4, 4, 3] = 7, 7, 7  # the second was never scanned
    segmentation.write(a_mask(series, array), tmp_path / "seg.dcm", kind=kind)
    mask = segmentation.read_mask(tmp_path / "seg.dcm", series)
    assert mask.geometry == series.geometry
    middle = (1, 2, 2) if offsets[2] == 7.5 else (4, 4, 2)  # of two that are as near the first; 4.95 is nearer to 7.2
    assert sorted(map(tuple, np.argwhere(mask.array).tolist())) == sorted([(1, 2, 1), middle, (4, 4, 3)])


def test_planes_without_a_slice_are_told_of(tmp_path: Path, axial: dicom.Series) -> None:
    uneven = a_series(tmp_path / "series", offsets=(0.0, 2.5, 7.5, 10.0))
    assert uneven.geometry is not None
    array = np.ones(uneven.geometry.shape, dtype=np.uint8) * 7
    segmentation.write(a_mask(uneven, array), tmp_path / "seg.dcm")
    (warning,) = segmentation.read_mask(tmp_path / "seg.dcm").warnings
    assert "1 of 5 planes have no slice in this DICOM SEG and are taken as background" in warning
    array = np.zeros(SHAPE, dtype=np.uint8)
    array[:, :, [0, 2, 3]] = 7  # of an even series an empty slice
    segmentation.write(a_mask(axial, array), tmp_path / "seg.dcm")
    for series in (None, axial, uneven):  # the last is another one, on which the frames do not lie
        assert segmentation.read_mask(tmp_path / "seg.dcm", series).warnings == ()


def test_a_seg_on_the_even_grid_of_an_uneven_series_is_read_as_it_is(tmp_path: Path) -> None:
    uneven = a_series(tmp_path / "uneven", offsets=(0.0, 2.5, 7.5, 10.0))
    even = a_series(tmp_path / "even", offsets=(0.0, 2.5, 5.0, 7.5))
    segmentation.write(a_mask(even), tmp_path / "seg.dcm")
    read = segmentation.read_mask(tmp_path / "seg.dcm", uneven)
    assert close(points_of(read), points_of(a_mask(even)))


@settings(max_examples=15)
@given(data=st.data())
def test_any_mask_comes_back(
    axial: dicom.Series, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    values = data.draw(st.lists(st.sampled_from([0, 0, 7, 300, 400]), min_size=120, max_size=120))
    kind = data.draw(st.sampled_from(KINDS))
    array = np.array(values, dtype=np.int32).reshape(SHAPE)
    path = tmp_path_factory.getbasetemp() / "any.dcm"
    segmentation.write(a_mask(axial, array), path, kind=kind)  # type: ignore[arg-type]
    back = segmentation.read_mask(path).placed(a_mask(axial).geometry)
    assert np.array_equal(back.array, np.select([array == 7, array == 300, array == 400], [1, 2, 3]))


# What a SEG says


def segments_of(path: Path) -> list[Any]:
    return [segment for segment in pydicom.dcmread(path).SegmentSequence if segment.SegmentNumber > 0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_label_is_a_segment_with_voxels_or_without(axial: dicom.Series, kind: Any, tmp_path: Path) -> None:
    array = np.zeros(SHAPE, dtype=np.int32)
    array[1, 1, 1] = 300
    segmentation.write(a_mask(axial, array), tmp_path / "seg.dcm", kind=kind, model="Task99 model", version="2.1")
    found = [(segment.SegmentNumber, segment.SegmentLabel) for segment in segments_of(tmp_path / "seg.dcm")]
    assert found == [(1, "liver"), (2, "left kidney"), (3, "spleen")]
    kidney = segments_of(tmp_path / "seg.dcm")[1]
    assert kidney.SegmentAlgorithmType == "AUTOMATIC"
    algorithm = kidney.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("Task99 model", "2.1")
    assert algorithm.AlgorithmFamilyCodeSequence[0].CodeMeaning == "Artificial Intelligence"
    kind_code = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert (kind_code.CodeValue, kind_code.CodingSchemeDesignator) == ("64033007", "SCT")
    assert kind_code.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == "7771000"
    assert kidney.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "91723000"
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert (seg.Modality, seg.ContentLabel, seg.Manufacturer) == ("SEG", "MEDSEG", "medseg")
    assert seg.SeriesDescription == "medseg, research use only: Task99 model"


def test_codes_and_colours_of_the_labels_come_first_and_come_back(axial: dicom.Series, tmp_path: Path) -> None:
    lesion = Coding(
        type=Code(value="108369006", meaning="Neoplasm"),
        category=Code(value="49755003", meaning="Morphologically Abnormal Structure"),
        region=Code(value="64033007", meaning="Kidney"),
        region_modifier=Code(value="24028007", meaning="Right"),
    )
    labels = Labels(values={"something": 1}, codings={"something": lesion}, colours={"something": (200, 30, 10)})
    segmentation.write(a_mask(axial, labelled() // 7 % 2, labels), tmp_path / "seg.dcm")
    found = segmentation.read_mask(tmp_path / "seg.dcm").labels
    assert found is not None
    assert found.codings == {"something": lesion}
    assert found.colours == {"something": (200, 30, 10)}


def test_labels_without_codes_are_refused_or_get_private_ones(axial: dicom.Series, tmp_path: Path) -> None:
    labels = Labels(values={"liver": 7, "blob": 300, "thing with a rather long name": 400})
    with pytest.raises(InputError, match="blob, thing with a rather long name") as failure:
        segmentation.write(a_mask(axial, labels=labels), tmp_path / "seg.dcm")
    assert "--allow-uncoded" in failure.value.remedy
    assert not list(tmp_path.iterdir())
    segmentation.write(a_mask(axial, labels=labels), tmp_path / "seg.dcm", allow_uncoded=True)
    codes = [segment.SegmentedPropertyTypeCodeSequence[0] for segment in segments_of(tmp_path / "seg.dcm")]
    assert [code.CodingSchemeDesignator for code in codes] == ["SCT", "99MEDSEG", "99MEDSEG"]
    assert [code.CodeMeaning for code in codes] == ["Liver", "blob", "thing with a rather long name"]
    assert len({code.CodeValue for code in codes}) == 3
    assert max(len(code.CodeValue) for code in codes) <= 16
    found = segmentation.read_mask(tmp_path / "seg.dcm").labels
    assert found is not None
    assert set(found.codings) == {"liver"}  # a private code stands for nothing elsewhere


@pytest.mark.parametrize("kind", KINDS)
def test_of_an_unknown_maker_nothing_is_claimed(axial: dicom.Series, kind: Any, tmp_path: Path) -> None:
    segmentation.write(a_mask(axial), tmp_path / "seg.dcm", kind=kind)
    for segment in segments_of(tmp_path / "seg.dcm"):
        assert segment.SegmentAlgorithmType == "SEMIAUTOMATIC"
        assert segment.SegmentAlgorithmName == "unknown, converted by medseg"
        assert "SegmentationAlgorithmIdentificationSequence" not in segment
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert seg.SeriesDescription == "converted by medseg, research use only"
    assert seg.ManufacturerModelName == "medseg"
    if kind == "BINARY" and shutil.which("dciodvfy"):
        assert faults(tmp_path / "seg.dcm") == []


def test_a_maker_that_dicom_cannot_hold_has_a_name_all_the_same(axial: dicom.Series, tmp_path: Path) -> None:
    segmentation.write(a_mask(axial), tmp_path / "seg.dcm", model="\\\n", version="")
    (segment, *_) = segments_of(tmp_path / "seg.dcm")
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("model without a name", "unknown")


def test_more_pixels_than_an_element_holds_are_refused(
    axial: dicom.Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # labels by slice: none; 7; 7, 300; 400: 4 frames of 6 x 5 bits are 15 bytes
    monkeypatch.setattr(segmentation, "_MOST_BYTES", 15)
    segmentation.write(a_mask(axial), tmp_path / "seg.dcm")
    monkeypatch.setattr(segmentation, "_MOST_BYTES", 14)
    with pytest.raises(InputError, match="4 frames of 15 bytes") as failure:
        segmentation.write(a_mask(axial), tmp_path / "more.dcm")
    assert "--seg-type labelmap" in failure.value.remedy
    segmentation.write(a_mask(axial), tmp_path / "more.dcm", kind="LABELMAP")


def test_an_empty_mask_is_a_valid_seg(axial: dicom.Series, tmp_path: Path) -> None:
    for kind, frames in (("BINARY", 3), ("LABELMAP", 1)):  # one slice, of every segment
        path = tmp_path / f"{kind}.dcm"
        segmentation.write(a_mask(axial, np.zeros(SHAPE, dtype=np.uint8)), path, kind=kind)  # type: ignore[arg-type]
        assert pydicom.dcmread(path).NumberOfFrames == frames
        mask = segmentation.read_mask(path).placed(a_mask(axial).geometry)
        assert mask.array.shape == SHAPE
        assert not mask.array.any()
        assert mask.labels is not None
        assert mask.labels.names == ("liver", "left kidney", "spleen")


def test_what_cannot_be_written_is_refused(axial: dicom.Series, tmp_path: Path) -> None:
    path, mask = tmp_path / "seg.dcm", a_mask(axial)
    with pytest.raises(InputError, match="no labels"):
        segmentation.write(a_mask(axial, labels=None), path)
    with pytest.raises(InputError, match="no DICOM series behind it"):
        segmentation.write(Mask(mask.array, mask.geometry, LABELS), path)
    with pytest.raises(InputError, match="BINARY or LABELMAP"):
        segmentation.write(mask, path, kind="FRACTIONAL")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="label names that DICOM cannot hold"):
        segmentation.write(a_mask(axial, labels=Labels(values={"a\\b": 7, "b": 300, "c": 400})), path)
    with pytest.raises(InputError, match=r"label names .*'x{65}'"):
        segmentation.write(a_mask(axial, labels=Labels(values={"x" * 65: 7, "b": 300, "c": 400})), path)
    with pytest.raises(InputError, match="marked to be ignored"):
        segmentation.write(a_mask(axial, labels=Labels(values={"liver": 7, "spleen": 300}, ignore=400)), path)
    with pytest.raises(InputError, match="have no name"):
        segmentation.write(a_mask(axial, labels=Labels(values={"liver": 7})), path)
    shifted = mask.geometry.affine.copy()
    shifted[0, 3] += 0.35  # half a voxel
    with pytest.raises(GeometryMismatch):
        segmentation.write(Mask(mask.array, Geometry(SHAPE, shifted), LABELS, header=axial), path)
    assert not list(tmp_path.iterdir())


MARKER = "ZQXMARKERXQZ"
INHERITED = {
    *("PatientName", "PatientID", "IssuerOfPatientID", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
    "StudyDescription",
}


@pytest.mark.parametrize("make", [dicoms.write_series, dicoms.write_enhanced])
def test_only_patient_and_study_are_taken_from_the_images(
    make: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    series = a_series(
        tmp_path, make=make, marker=MARKER, change=lambda dataset, k: setattr(dataset, "PatientSex", "ZQ")
    )
    with caplog.at_level(logging.DEBUG):
        segmentation.write(a_mask(series), tmp_path / "out" / "seg.dcm")
    seg = pydicom.dcmread(tmp_path / "out" / "seg.dcm")
    marked = {element.keyword for element in seg.iterall() if element.VR != "SQ" and MARKER in str(element.value)}
    assert marked == INHERITED
    assert (tmp_path / "out" / "seg.dcm").read_bytes().count(MARKER.encode()) == len(INHERITED)
    assert seg.PatientSex == ""
    assert "PatientSex" in caplog.text
    assert MARKER not in caplog.text
    assert "ZQ" not in caplog.text


def test_what_is_not_valid_in_the_images_is_mended(tmp_path: Path) -> None:
    def change(dataset: Any, k: int) -> None:
        dataset.PatientIdentityRemoved = "YES"
        dataset.StudyDescription = "x" * 64
        dataset.ReferringPhysicianName = ["First^Name", "Second^Name"]

    series = a_series(tmp_path / "a", change=change)
    segmentation.write(a_mask(series), tmp_path / "seg.dcm")
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert "PatientIdentityRemoved" not in seg  # without a method
    assert seg.ReferringPhysicianName == "First^Name"
    assert seg.StudyDescription == "x" * 64
    if shutil.which("dciodvfy"):
        assert faults(tmp_path / "seg.dcm") == []

    def more(dataset: Any, k: int) -> None:
        dataset.PatientIdentityRemoved, dataset.DeidentificationMethod = "YES", "by hand"
        dataset.add_new("StudyDescription", "LT", "x" * 65)  # of another kind, which holds more

    segmentation.write(a_mask(a_series(tmp_path / "b", change=more)), tmp_path / "seg.dcm")
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert (seg.PatientIdentityRemoved, seg.DeidentificationMethod) == ("YES", "by hand")
    assert "StudyDescription" not in seg


def test_what_is_missing_in_the_images_is_left_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    missing = ("PatientName", "PatientID", "PatientSex", "StudyID", "StudyDate", "StudyTime", "AccessionNumber")

    def change(dataset: Any, k: int) -> None:
        for keyword in (*missing, "FrameOfReferenceUID"):
            delattr(dataset, keyword)

    series = a_series(tmp_path, change=change)
    segmentation.write(a_mask(series), tmp_path / "out" / "seg.dcm")
    seg = pydicom.dcmread(tmp_path / "out" / "seg.dcm")
    assert all(keyword in seg and not seg[keyword].value for keyword in missing)
    assert seg.FrameOfReferenceUID
    assert all(keyword in caplog.text for keyword in missing)
    assert "Frame of Reference UID" in caplog.text
    assert close(points_by_hand(tmp_path / "out" / "seg.dcm"), points_of(a_mask(series)))


def test_images_of_no_standard_class_are_refused_and_of_none_named_by_their_file(tmp_path: Path) -> None:
    def unnamed(dataset: Any, k: int) -> None:
        del dataset.SOPClassUID

    def private(dataset: Any, k: int) -> None:
        dataset.SOPClassUID = "1.3.12.2.1107.5.9.1"

    segmentation.write(a_mask(a_series(tmp_path / "in", change=unnamed)), tmp_path / "seg.dcm")
    referred = pydicom.dcmread(tmp_path / "seg.dcm").ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {item.ReferencedSOPClassUID for item in referred} == {pydicom.uid.CTImageStorage}
    with pytest.raises(InputError, match=r"series_[0-9a-f]+: highdicom makes no DICOM SEG .*KeyError"):
        segmentation.write(a_mask(a_series(tmp_path / "other", change=private)), tmp_path / "other.dcm")
    assert not (tmp_path / "other.dcm").exists()


@pytest.mark.parametrize("kind", [NameError, TypeError, ValueError, KeyError, UnicodeDecodeError])
@pytest.mark.parametrize("where", ["_frames", "_images_of", "_description", "_check", "_grid", "_labels", "_filled"])
def test_a_bug_comes_out_as_such_and_quotes_nothing(
    where: str, kind: type[Exception], axial: dicom.Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        arguments = (MARKER, b"x", 0, 1, MARKER) if kind is UnicodeDecodeError else (MARKER,)
        raise kind(*arguments) from RuntimeError(MARKER)

    def both() -> None:
        segmentation.write(a_mask(axial), tmp_path / "other.dcm")
        segmentation.read_mask(tmp_path / "seg.dcm")

    segmentation.write(a_mask(axial), tmp_path / "seg.dcm")
    monkeypatch.setattr(segmentation, where, broken)
    with pytest.raises(RuntimeError if kind is UnicodeDecodeError else kind) as failure:
        both()
    told = "".join(traceback.format_exception(failure.value))
    assert MARKER not in told
    assert kind.__name__ in told
    assert "in broken" in told  # the place, for whoever mends it


@pytest.mark.parametrize(("characters", "name"), [("ISO_IR 100", "Müller^Jörg"), ("ISO_IR 13", "ﾔﾏﾀﾞ^ﾀﾛｳ"), ("", "X^Y")])
def test_names_of_any_script_are_kept(characters: str, name: str, tmp_path: Path) -> None:
    def change(dataset: Any, k: int) -> None:
        dataset.SpecificCharacterSet, dataset.PatientName = characters, name

    labels = Labels(values={"Leber ü": 7, "肾": 300, "spleen": 400})
    segmentation.write(a_mask(a_series(tmp_path, change=change), labels=labels), tmp_path / "s.dcm", allow_uncoded=True)
    assert pydicom.dcmread(tmp_path / "s.dcm").PatientName == name
    assert [segment.SegmentLabel for segment in segments_of(tmp_path / "s.dcm")] == ["Leber ü", "肾", "spleen"]


MODULES = [
    *(module["key"] for module in get_iod_module_map()["segmentation"] if module["usage"] == "M"),
    *("frame-of-reference", "common-instance-reference"),  # conditional, and their conditions are met
]
GROUPS = "segmentation-multi-frame-functional-groups"
IN_GROUPS = {
    *("PixelMeasuresSequence", "PlaneOrientationSequence", "PlanePositionSequence", "FrameContentSequence"),
    *("DerivationImageSequence", "SegmentIdentificationSequence"),
}


def items(dataset: Any, path: list[str]) -> list[Any]:
    """The items of the last of nested sequences; the data set itself where there are none."""
    found = [dataset]
    for keyword in path:
        found = [item for one in found if keyword in one for item in one[keyword].value]
    return found


def lacking(dataset: Any, module: str) -> set[str]:
    """Attributes of a module that are not there, or empty where they may not (PS3.5, 7.4)."""
    return {
        "/".join([*attribute["path"], attribute["keyword"]])
        for attribute in get_module_attribute_map()[module]
        for item in items(dataset, attribute["path"])
        if not (module == GROUPS and len(attribute["path"]) == 1)  # a functional group is of all frames or of each
        and not suffices(item, attribute["keyword"], attribute["type"])
    }


def suffices(item: Any, keyword: str, kind: str) -> bool:
    if keyword not in item:
        return kind not in ("1", "2")
    return kind[0] != "1" or not item[keyword].is_empty


def strangers(dataset: Any, path: tuple[str, ...] = ()) -> list[str]:
    """Elements that no module of the IOD has."""
    found = []
    known = {
        attribute["keyword"]
        for module in get_iod_module_map()["segmentation"]
        for attribute in get_module_attribute_map()[module["key"]]
        if tuple(attribute["path"]) == path
    }
    for element in dataset:
        if element.keyword not in known:
            found.append("/".join([*path, element.keyword or str(element.tag)]))
        elif element.VR == "SQ":
            found += [name for item in element.value for name in strangers(item, (*path, element.keyword))]
    return found


@pytest.mark.parametrize("make", [dicoms.write_series, dicoms.write_enhanced])
@pytest.mark.parametrize("kind", KINDS)
def test_a_seg_has_what_the_iod_demands_and_nothing_else(make: Callable[..., Any], kind: Any, tmp_path: Path) -> None:
    """PS3.3 A.51, by the tables of the standard that highdicom brings along."""
    labels = Labels(values={"liver": 7, "right kidney": 300, "blob": 400})
    segmentation.write(
        a_mask(a_series(tmp_path, make=make), labels=labels), tmp_path / "s.dcm", kind=kind, allow_uncoded=True
    )
    seg = pydicom.dcmread(tmp_path / "s.dcm")
    assert {module: found for module in MODULES if (found := lacking(seg, module))} == {}
    assert strangers(seg) == []
    shared = {element.keyword for element in seg.SharedFunctionalGroupsSequence[0]}
    wanted = IN_GROUPS - ({"SegmentIdentificationSequence"} if kind == "LABELMAP" else set())
    for frame in seg.PerFrameFunctionalGroupsSequence:
        own = {element.keyword for element in frame}
        assert own | shared == wanted
        assert not own & shared
    del seg.SegmentSequence[0].SegmentLabel  # that both find something
    seg.KVP = seg.ContentLabel = ""
    assert lacking(seg, "segmentation-image") == {"ContentLabel", "SegmentSequence/SegmentLabel"}
    assert strangers(seg) == ["KVP"]


TABLES = Path.home() / "dicom-validator"


@pytest.mark.skipif(
    not (shutil.which("validate_iods") and list(TABLES.glob("*/json/version"))),
    reason="dicom-validator is not installed, or has not fetched the tables of the standard",
)
def test_dicom_validator_finds_no_error(axial: dicom.Series, tmp_path: Path) -> None:
    segmentation.write(a_mask(axial), tmp_path / "seg.dcm")
    command = ["validate_iods", "--edition", "local", str(tmp_path / "seg.dcm")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def faults(path: Path) -> list[str]:
    """What dciodvfy calls an error."""
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    assert "\nSegmentation\n" in f"\n{text}"  # the name of the IOD: it was recognised, and all of it checked
    return [line for line in text.splitlines() if line.startswith("Error")]


@needs_dciodvfy
@pytest.mark.parametrize("make", [dicoms.write_series, dicoms.write_enhanced])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_dciodvfy_finds_no_error(make: Callable[..., Any], modality: str, tmp_path: Path) -> None:
    series = a_series(tmp_path, make=make, modality=modality)
    labels = Labels(values={"liver": 7, "right kidney": 300, "blob": 400})
    segmentation.write(a_mask(series, labels=labels), tmp_path / "out" / "seg.dcm", allow_uncoded=True)
    assert faults(tmp_path / "out" / "seg.dcm") == []
    segmentation.write(a_mask(series, np.zeros(SHAPE, np.uint8)), tmp_path / "out" / "empty.dcm")
    assert faults(tmp_path / "out" / "empty.dcm") == []


@needs_dciodvfy
@pytest.mark.parametrize("make", [dicoms.write_series, dicoms.write_enhanced])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_dciodvfy_finds_no_error_in_a_labelmap_but_that_it_is_one(
    make: Callable[..., Any], modality: str, tmp_path: Path
) -> None:
    """Its SOP class is younger than dciodvfy: it is changed to that of binary ones, so that all else is checked.

    PS3.3 2024d, C.8.20.2.3, has every value of a LABELMAP described, 0 too, and in them the numbers of segments.
    """
    segmentation.write(a_mask(a_series(tmp_path, make=make, modality=modality)), tmp_path / "seg.dcm", kind="LABELMAP")
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    seg.SOPClassUID = seg.file_meta.MediaStorageSOPClassUID = segmentation.SOP_CLASSES["BINARY"]
    seg.save_as(tmp_path / "checked.dcm")
    attributes = "<Segmentation Type>", "<Segment Number>", "SegmentNumber", "<SegmentIdentificationSequence>"
    assert [fault for fault in faults(tmp_path / "checked.dcm") if not any(name in fault for name in attributes)] == []


# Reading


def changed(series: dicom.Series, path: Path, change: Callable[[Any], object], kind: Any = "BINARY") -> Path:
    """A SEG as another tool may write it."""
    segmentation.write(a_mask(series), path, kind=kind)
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)
    return path


def frames_kept(dataset: Any, numbers: list[int]) -> None:
    pixels = dataset.pixel_array[numbers]
    dataset.PerFrameFunctionalGroupsSequence = [dataset.PerFrameFunctionalGroupsSequence[n] for n in numbers]
    dataset.NumberOfFrames = len(numbers)
    bits = np.packbits(pixels.ravel(), bitorder="little").tobytes()
    dataset.PixelData = bits + b"\0" * (len(bits) % 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("meta", [True, False])
def test_a_seg_without_preamble_is_read_as_any_other(
    axial: dicom.Series, kind: Any, meta: bool, tmp_path: Path
) -> None:
    path = tmp_path / "seg.dcm"
    segmentation.write(a_mask(axial), path, kind=kind)
    content = path.read_bytes()[132:]
    if not meta and kind == "LABELMAP":
        return  # nothing would say how it is compressed
    length = 12 + int.from_bytes(content[8:12], "little")  # (0002,0000): PS3.10, 7.1
    path.write_bytes(content if meta else content[length:])
    assert segmentation.is_segmentation(path)
    assert close(points_of(segmentation.read_mask(path)), points_of(a_mask(axial)))


def test_a_seg_is_found_in_a_folder_and_in_a_zip(axial: dicom.Series, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(axial.files[0].parent, folder)
    assert not segmentation.is_segmentation(folder)
    with pytest.raises(InputError, match="no DICOM SEG"):
        segmentation.read_mask(folder)
    segmentation.write(a_mask(axial), folder / "below" / "any name")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    for place in (folder, tmp_path / "all.zip", folder / "below" / "any name"):
        assert segmentation.is_segmentation(place)
        assert close(points_of(segmentation.read_mask(place)), points_of(a_mask(axial)))
    assert not segmentation.is_segmentation(axial.files[0])
    assert not segmentation.is_segmentation(tmp_path / "nothing")
    segmentation.write(a_mask(axial), folder / "second.dcm")
    with pytest.raises(InputError, match="several DICOM SEG files"):
        segmentation.read_mask(folder)


def test_the_distance_of_slices_is_stated_or_told_by_the_frames(axial: dicom.Series, tmp_path: Path) -> None:
    def change(dataset: Any) -> None:
        frames_kept(
            dataset, [n for n, frame in enumerate(dataset.PerFrameFunctionalGroupsSequence) if number(frame) != 2]
        )
        measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        measures.SliceThickness = 1.25

    def unstated(dataset: Any) -> None:
        change(dataset)
        del dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices

    def number(frame: Any) -> int:
        return int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)

    for how in (change, unstated):
        mask = segmentation.read_mask(changed(axial, tmp_path / "seg.dcm", how))
        assert mask.geometry.spacing == pytest.approx((0.7, 0.9, 2.5))
        assert len(mask.warnings) == (how is unstated)


def test_without_a_middle_slice_the_distance_stated_counts(axial: dicom.Series, tmp_path: Path) -> None:
    array = np.zeros(SHAPE, dtype=np.uint16)
    array[1, 2, 0] = array[1, 2, 3] = 7
    segmentation.write(a_mask(axial, array), tmp_path / "seg.dcm")
    mask = segmentation.read_mask(tmp_path / "seg.dcm")
    assert mask.array.shape == (6, 5, 4)
    assert mask.geometry.spacing == pytest.approx((0.7, 0.9, 2.5))


def test_a_single_frame_may_have_all_groups_in_common(axial: dicom.Series, tmp_path: Path) -> None:
    def change(dataset: Any) -> None:
        frames_kept(dataset, [0])
        frame, shared = dataset.PerFrameFunctionalGroupsSequence[0], dataset.SharedFunctionalGroupsSequence[0]
        for keyword in ("PlanePositionSequence", "SegmentIdentificationSequence"):
            setattr(shared, keyword, frame[keyword].value)
            del frame[keyword]

    mask = segmentation.read_mask(changed(axial, tmp_path / "seg.dcm", change))
    assert mask.array.shape == (6, 5, 1)
    assert mask.geometry.spacing == pytest.approx((0.7, 0.9, 2.5))
    assert set(np.unique(mask.array)) == {0, 1}


def encoded(dataset: Any, syntax: str, encode: Callable[[NDArray[Any]], bytes]) -> None:
    planes = dataset.pixel_array.reshape(dataset.NumberOfFrames, dataset.Rows, dataset.Columns)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    dataset.PixelData = encapsulate([encode(np.ascontiguousarray(plane)) for plane in planes])
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True


ENCODERS: dict[str, tuple[str, Callable[[NDArray[Any]], bytes]]] = {
    "run lengths": (RLELossless, lambda plane: next(generate_frames(run_lengths(plane), number_of_frames=1))),
    "JPEG-LS": (JPEGLSLossless, lambda plane: bytes(imagecodecs.jpegls_encode(plane))),
    "JPEG 2000": (JPEG2000Lossless, lambda plane: in_jpeg_2000(plane, bitspersample=8)),
}


def in_jpeg_2000(plane: NDArray[Any], bitspersample: int) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(plane, reversible=True, codecformat="j2k", bitspersample=bitspersample))


def run_lengths(plane: NDArray[Any]) -> bytes:
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = *plane.shape, 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
    dataset.BitsAllocated = dataset.BitsStored = 8 * plane.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.compress(RLELossless, plane, encoding_plugin="pydicom", generate_instance_uid=False)
    return bytes(dataset.PixelData)


@pytest.mark.parametrize("name", ENCODERS)
def test_compressed_labels_are_read_or_refused(axial: dicom.Series, name: str, tmp_path: Path) -> None:
    path = changed(axial, tmp_path / "seg.dcm", lambda dataset: encoded(dataset, *ENCODERS[name]), "LABELMAP")
    assert close(points_of(segmentation.read_mask(path)), points_of(a_mask(axial)))
    content = path.read_bytes()
    start = content.rindex(b"\xe0\x7f\x10\x00OB")
    for damage in (content[: start + 60], content[:-12] + bytes(12), content[: start + 40] + bytes(20) + content[-40:]):
        path.write_bytes(damage)
        with pytest.raises(UnreadableFile) as failure:
            segmentation.read_mask(path)
        assert "headers that cannot be used" not in str(failure.value)


def test_binary_labels_in_jpeg_2000(axial: dicom.Series, tmp_path: Path) -> None:
    def change(dataset: Any) -> None:
        encoded(dataset, JPEG2000Lossless, lambda plane: in_jpeg_2000(plane, bitspersample=1))

    path = changed(axial, tmp_path / "seg.dcm", change)
    assert close(points_of(segmentation.read_mask(path)), points_of(a_mask(axial)))


def test_a_codestream_that_claims_another_size_is_not_decoded(axial: dicom.Series, tmp_path: Path) -> None:
    path = changed(axial, tmp_path / "seg.dcm", lambda dataset: encoded(dataset, *ENCODERS["JPEG 2000"]), "LABELMAP")
    content = bytearray(path.read_bytes())
    width = content.index(b"\xff\x4f\xff\x51") + 8  # SOC, SIZ, its length, capabilities: then Xsiz
    content[width : width + 4] = (1 << 30).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(UnreadableFile, match="frame 1 cannot be decoded: its JPEG 2000"):
        segmentation.read_mask(path)


def test_a_compression_without_decoder_is_named(axial: dicom.Series, tmp_path: Path) -> None:
    def change(dataset: Any) -> None:
        encoded(dataset, *ENCODERS["JPEG-LS"])
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.94"

    with pytest.raises(UnreadableFile, match=r"JPIP Referenced cannot be decoded\. Convert it"):
        segmentation.read_mask(changed(axial, tmp_path / "seg.dcm", change, "LABELMAP"))


def test_names_of_segments_are_made_unique(axial: dicom.Series, tmp_path: Path) -> None:
    def change(dataset: Any) -> None:
        dataset.SegmentSequence[0].SegmentLabel = dataset.SegmentSequence[2].SegmentLabel = "lesion"
        dataset.SegmentSequence[1].SegmentLabel = ""

    mask = segmentation.read_mask(changed(axial, tmp_path / "seg.dcm", change))
    assert mask.labels is not None
    assert mask.labels.values == {"lesion": 1, "segment 2": 2, "lesion 2": 3}


def test_the_background_of_a_labelmap_may_have_any_number(axial: dicom.Series, tmp_path: Path) -> None:
    def change(dataset: Any) -> None:
        pixels = dataset.pixel_array
        dataset.decompress()
        pixels[pixels == 0] = 9
        dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.size % 2)
        dataset.SegmentSequence[0].SegmentNumber = dataset.PixelPaddingValue = 9

    mask = segmentation.read_mask(changed(axial, tmp_path / "seg.dcm", change, "LABELMAP"))
    assert close(points_of(mask), points_of(a_mask(axial)))
    assert mask.labels is not None
    assert mask.labels.names == ("liver", "left kidney", "spleen")


def test_what_labels_cannot_be_is_refused(axial: dicom.Series, tmp_path: Path) -> None:
    def same(dataset: Any) -> None:
        dataset.SegmentSequence[2].SegmentNumber = 2

    def no_background(dataset: Any) -> None:
        del dataset.PixelPaddingValue
        dataset.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeValue = "10200004"

    with pytest.raises(InputError, match="3 segments with 2 numbers"):
        segmentation.read_mask(changed(axial, tmp_path / "seg.dcm", same))
    with pytest.raises(InputError, match="segment 0 is no background"):
        segmentation.read_mask(changed(axial, tmp_path / "seg.dcm", no_background, "LABELMAP"))


def test_overlapping_segments_are_refused(axial: dicom.Series, tmp_path: Path) -> None:
    def change(dataset: Any) -> None:
        frames = dataset.PerFrameFunctionalGroupsSequence
        frames[2].PlanePositionSequence = frames[0].PlanePositionSequence
        dataset.PixelData = b"\xff" * len(dataset.PixelData)

    with pytest.raises(InputError, match="its segments overlap"):
        segmentation.read_mask(changed(axial, tmp_path / "seg.dcm", change))


def fractional(dataset: Any) -> None:
    dataset.SegmentationType = "FRACTIONAL"


def unknown_type(dataset: Any) -> None:
    dataset.SegmentationType = MARKER


def short(dataset: Any) -> None:
    dataset.PixelData = dataset.PixelData[:4]


def too_many(dataset: Any) -> None:
    dataset.NumberOfFrames = 10**9


def huge(dataset: Any) -> None:
    dataset.Rows = dataset.Columns = 65535


def twice(dataset: Any) -> None:
    frames_kept(dataset, [0, 0, 1, 2])


def far(dataset: Any) -> None:
    dataset.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient = [
        -10.5,
        33.25,
        2500012.125,
    ]


def uneven(dataset: Any) -> None:
    dataset.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient = [-10.5, 33.25, 13.5]


def aside(dataset: Any) -> None:
    dataset.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient[0] += 4


def turned(dataset: Any) -> None:
    frame = dataset.PerFrameFunctionalGroupsSequence[0]
    frame.PlaneOrientationSequence = [pydicom.Dataset()]
    frame.PlaneOrientationSequence[0].ImageOrientationPatient = [0, 1, 0, 1, 0, 0]


def placeless(dataset: Any) -> None:
    del dataset.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence


def undescribed(dataset: Any) -> None:
    del dataset.SegmentSequence[2]


def wordy(dataset: Any) -> None:
    dataset["NumberOfFrames"]._value = MARKER


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (fractional, InputError, "holds fractions"),
        (unknown_type, UnreadableFile, "no known type"),
        (short, UnreadableFile, "4 frames of 6x5"),
        (too_many, UnreadableFile, "1000000000 frames"),
        (huge, UnreadableFile, "65535x65535"),
        (twice, UnreadableFile, "two frames of one segment at one place"),
        (far, UnreadableFile, "slices span"),
        (uneven, IncompleteSeries, "even distances"),
        (aside, IncompleteSeries, "even distances"),
        (turned, IncompleteSeries, "even distances"),
        (placeless, UnreadableFile, "KeyError"),
        (undescribed, UnreadableFile, r"segments \[3\], which it does not describe"),
        (wordy, UnreadableFile, "headers that cannot be used"),
    ],
)
def test_what_cannot_be_read_is_refused_without_its_text(
    axial: dicom.Series, tmp_path: Path, change: Callable[[Any], None], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as failure:
        segmentation.read_mask(changed(axial, tmp_path / "seg.dcm", change))
    assert failure.type is error
    assert MARKER not in str(failure.value)


def test_a_truncated_file_is_refused(axial: dicom.Series, tmp_path: Path) -> None:
    segmentation.write(a_mask(axial), tmp_path / "seg.dcm")
    content = (tmp_path / "seg.dcm").read_bytes()
    for length in range(400, len(content) - 2, 397):
        (tmp_path / "seg.dcm").write_bytes(content[:length])
        with pytest.raises((UnreadableFile, InputError)):
            segmentation.read_mask(tmp_path / "seg.dcm")


@settings(max_examples=60)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_damage_is_told_in_own_words(
    axial: dicom.Series, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / f"sound_{kind}.dcm"
    if not path.exists():
        segmentation.write(a_mask(axial), path, kind=kind)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(132, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = path.with_name("damaged.dcm")
    path.write_bytes(content)
    with contextlib.suppress(InputError):  # its children too: any other error fails the test
        segmentation.read_mask(path)


# Real images


@needs_data
@pytest.mark.parametrize("kind", KINDS)
def test_every_real_series_takes_a_mask(kind: Any, tmp_path: Path) -> None:
    folders = sorted({path.parent for path in (Path(DATA) / "dicom" / "accept").rglob("*.dcm")})
    assert len(folders) > 10
    for folder in folders:
        series = dicom.select(dicom.scan(folder))[0]
        assert series.geometry is not None
        array = np.zeros(series.geometry.shape, dtype=np.uint16)
        array[5:9, 10:20, 1:], array[12:18, 3:9, 0] = 7, 300
        mask = Mask(array, series.geometry, LABELS, header=series)
        segmentation.write(mask, tmp_path / "seg.dcm", kind=kind)
        read = segmentation.read_mask(tmp_path / "seg.dcm")
        back = read.placed(series.geometry).array
        assert np.array_equal(back, np.select([array == 7, array == 300], [1, 2])), folder
        seg = pydicom.dcmread(tmp_path / "seg.dcm")
        assert all(len(frame.DerivationImageSequence) == 1 for frame in seg.PerFrameFunctionalGroupsSequence), folder
        if kind == "BINARY" and shutil.which("dciodvfy"):
            assert faults(tmp_path / "seg.dcm") == [], folder
