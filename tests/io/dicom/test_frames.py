"""medseg.io.dicom.frames: what a file is by its header, and what its frames say."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicoms import write_enhanced, write_series
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from medseg.errors import UnreadableFile
from medseg.io.dicom.archive import Instance, Reader
from medseg.io.dicom.frames import UNREADABLE, Image, data_of, headers_of, image_of, silent, uid_of

ARRAY = np.arange(60, dtype=np.int16).reshape(5, 4, 3)


def seen(path: Path) -> Image | str:
    with Reader() as reader:
        return image_of(reader, Instance(path))


def changed(folder: Path, *, modality: str = "CT", **values: Any) -> Image | str:
    """What a slice is whose header has other values; None takes an element away."""

    def change(dataset: Dataset, k: int) -> None:
        for keyword, value in values.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return seen(write_series(folder, ARRAY, modality=modality, change=change)[0])


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_a_slice(syntax: str, tmp_path: Path) -> None:
    path, *_ = write_series(
        tmp_path, ARRAY, spacing=(3, 2, 4), origin=(7, 8, 9), slope=2, intercept=-1024, syntax=syntax, uid="1.2.3"
    )
    image = seen(path)
    assert isinstance(image, Image)
    assert (image.series_uid, image.modality, image.fault) == ("1.2.3", "CT", "")
    (frame,) = image.frames
    assert frame.plane is not None
    assert frame.plane.position == (7.0, 8.0, 9.0)
    assert frame.plane.spacing == (2.0, 3.0)  # rows first
    assert (frame.plane.rows, frame.plane.columns) == (4, 5)
    assert (frame.slope, frame.intercept, frame.thickness, frame.unit) == (2.0, -1024.0, 4.0, "HU")
    encoding = frame.encoding
    assert (encoding.keyword, encoding.allocated, encoding.signed, encoding.length) == ("PixelData", 16, True, 40)
    assert encoding.range == (-32768, 32767)
    with Reader() as reader, data_of(reader, frame.instance) as (stream, size):
        stream.seek(encoding.start)
        assert len(stream.read()) == size - encoding.start == 40


def test_frames_of_an_enhanced_file(tmp_path: Path) -> None:
    image = seen(write_enhanced(tmp_path, ARRAY, spacing=(1, 1, 2.5), slope=(1, 2, 3)))
    assert isinstance(image, Image)
    found = {frame.plane.position[2]: frame.slope for frame in image.frames if frame.plane}
    assert found == {0.0: 1.0, 2.5: 2.0, 5.0: 3.0}
    assert [frame.number for frame in image.frames] == [0, 1, 2]
    assert all(frame.attributes["StackID"] == "1" for frame in image.frames)


def test_frames_without_a_place_each(tmp_path: Path) -> None:
    def unplaced(dataset: Dataset, k: int) -> None:
        del dataset.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence

    def ungrouped(dataset: Dataset, k: int) -> None:
        del dataset.PerFrameFunctionalGroupsSequence

    first = seen(write_enhanced(tmp_path / "a", ARRAY, change=unplaced))
    assert isinstance(first, Image)
    assert [frame.plane is None for frame in first.frames] == [False, True, False]
    second = seen(write_enhanced(tmp_path / "b", ARRAY, change=ungrouped))
    assert isinstance(second, Image)
    assert second.frames[0].plane is None
    assert second.fault == "has 3 frames, and a header for 1 of them"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "secondary capture"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.2"}, "secondary capture"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.33"}, "structured report"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4"}, "segmentation"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.2"}, "radiotherapy object"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.6"}, "whole-slide image"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.34.7", "Rows": None}, "other DICOM object"),
        ({"Rows": None}, UNREADABLE),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "colour image"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour image"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, "mosaic"),
        ({"SOPInstanceUID": ""}, "file without UIDs"),
        ({"StudyInstanceUID": None}, "file without UIDs"),
    ],
)
def test_what_is_passed_over(values: dict[str, Any], kind: str, tmp_path: Path) -> None:
    assert changed(tmp_path, **values) == kind


@pytest.mark.parametrize("value", ["../../etc/x", "1" * 65, "JANE DOE", "ID_18f2d431a9"])
@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"])
def test_what_is_no_uid_is_replaced_by_one(keyword: str, value: str, tmp_path: Path) -> None:
    image = changed(tmp_path, **{keyword: value})
    assert isinstance(image, Image)
    assert image.replaced
    assert value not in repr(image)
    uids = (image.uid, image.series_uid, image.study_uid, image.frame_uid)
    assert uid_of(value) in uids
    assert all(re.fullmatch(r"[0-9.]{1,64}", uid) for uid in uids)


def test_the_uid_for_what_is_none() -> None:
    assert uid_of("ID_18f2d431a9") == uid_of("ID_18f2d431a9") != uid_of("ID_18f2d431a8")
    assert re.fullmatch(r"2\.25\.[1-9][0-9]{38}", uid_of("ID_18f2d431a9"))
    assert [uid_of(text) for text in ("", "1.2.840", "1" * 64)] == ["", "1.2.840", "1" * 64]


def test_no_photometric_interpretation(tmp_path: Path) -> None:
    image = changed(tmp_path / "one", PhotometricInterpretation=None)
    assert isinstance(image, Image)
    assert (image.fault, image.note) == ("", "no Photometric Interpretation: taken as MONOCHROME2")
    assert changed(tmp_path / "three", PhotometricInterpretation=None, SamplesPerPixel=3) == "colour image"


@pytest.mark.parametrize("uid", ["1.2.840.10008.5.1.4.1.1.7.2", "1.2.840.10008.5.1.4.1.1.7.3"])
def test_secondary_capture_with_planes_is_a_volume(uid: str, tmp_path: Path) -> None:
    def captured(dataset: Dataset, k: int) -> None:
        dataset.SOPClassUID = uid

    def unplaced(dataset: Dataset, k: int) -> None:
        captured(dataset, k)
        del dataset.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence

    image = seen(write_enhanced(tmp_path / "a", ARRAY, change=captured))
    assert isinstance(image, Image)
    assert len(image.frames) == 3
    assert not image.fault
    assert seen(write_enhanced(tmp_path / "b", ARRAY, change=unplaced)) == "secondary capture"


def test_a_frame_is_scaled_and_placed_by_its_own_groups_alone(tmp_path: Path) -> None:
    """Other groups may repeat an attribute with another meaning, as that of the images that a frame is derived from."""

    def change(dataset: Dataset, k: int) -> None:
        other = Dataset()
        other.RescaleSlope, other.RescaleIntercept, other.RescaleType = 7, 7, "US"
        other.ImagePositionPatient, other.ImageOrientationPatient = [9, 9, 9], [0, 1, 0, 0, 0, -1]
        other.PixelSpacing, other.SliceThickness = [9, 9], 9
        for item in dataset.PerFrameFunctionalGroupsSequence:
            item.RealWorldValueMappingSequence = [other]  # (0040,9096), behind those that count
            item.DerivationImageSequence = [other]  # (0008,9124), before them

    image = seen(write_enhanced(tmp_path, ARRAY, slope=2, intercept=3, change=change))
    assert isinstance(image, Image)
    assert {(frame.slope, frame.intercept, frame.thickness) for frame in image.frames} == {(2.0, 3.0, 1.0)}
    planes = [frame.plane for frame in image.frames if frame.plane]
    assert sorted(plane.position for plane in planes) == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]
    assert {(plane.orientation, plane.spacing) for plane in planes} == {((1, 0, 0, 0, 1, 0), (1, 1))}


@pytest.mark.parametrize(
    ("uid", "kind"),
    [("1.2.840.10008.5.1.4.1.1.20", "nuclear medicine"), ("1.2.840.10008.5.1.4.1.1.6.2", "enhanced ultrasound")],
)
def test_slices_placed_in_another_way(uid: str, kind: str, tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.SOPClassUID = uid
        for item in dataset.PerFrameFunctionalGroupsSequence:
            del item.PlanePositionSequence

    image = seen(write_enhanced(tmp_path, ARRAY, change=change))
    assert isinstance(image, Image)
    assert image.fault == f"is of {kind}: the position of its slices is given in another way"
    assert not image.damaged


def test_floats_have_no_sign_to_tell(tmp_path: Path) -> None:
    pixels = np.zeros(20, "<f4").tobytes()
    image = changed(tmp_path, PixelData=None, FloatPixelData=pixels, PixelRepresentation=None)
    assert isinstance(image, Image)
    assert image.fault == ""


def test_a_vendors_mosaic(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", 36)

    assert seen(write_series(tmp_path, ARRAY, change=change)[0]) == "mosaic"


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"PixelData": bytes(38)}, "holds 38 bytes of pixels where its header says 40"),
        ({"Rows": 60000, "Columns": 60000}, "where its header says 7,200,000,000"),
        ({"PixelData": None}, "has no pixels"),
        ({"BitsAllocated": 12}, "has 16 bits of 12 a pixel"),
        ({"NumberOfFrames": 2**31 - 1}, "has 2147483647 frames, and a header for 1 of them"),
        ({"BitsStored": 16, "HighBit": 11}, "has 16 bits of 16 a pixel, the highest of them bit 11"),
        ({"PixelRepresentation": 7}, "signed"),
        ({"PixelRepresentation": None}, "does not say whether its pixels are signed"),
    ],
)
def test_faults_of_pixels(values: dict[str, Any], fault: str, tmp_path: Path) -> None:
    image = changed(tmp_path, **values)
    assert isinstance(image, Image)
    assert fault in image.fault
    assert image.damaged == (fault[:5] in ("holds", "where", "has n", "signe", "does "))


@pytest.mark.parametrize("text", [b"1,5 ", b"nan ", b"inf ", b"JANE"])
def test_a_slope_that_is_no_number(text: bytes, tmp_path: Path) -> None:
    path = write_series(tmp_path, ARRAY, slope=7777)[0]
    path.write_bytes(path.read_bytes().replace(b"DS\x06\x007777.0", b"DS\x06\x00" + text.ljust(6)))
    image = seen(path)
    assert isinstance(image, Image)
    assert image.fault == "has a rescale slope or intercept that is no number"


@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_no_place(keyword: str, tmp_path: Path) -> None:
    image = changed(tmp_path, **{keyword: None})
    assert isinstance(image, Image)
    assert image.frames[0].plane is None


@pytest.mark.parametrize(
    "values",
    [
        {"PixelSpacing": [0, 1]},
        {"PixelSpacing": [1, -1]},
        {"ImageOrientationPatient": [0] * 6},
        {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]},
        {"ImagePositionPatient": [1, 2]},
        {"ImagePositionPatient": [1e9, 0, 0]},
    ],
)
def test_places_that_cannot_be(values: dict[str, Any], tmp_path: Path) -> None:
    image = changed(tmp_path, **values)
    assert isinstance(image, Image)
    assert image.frames[0].plane is None


def test_what_is_no_dicom(tmp_path: Path) -> None:
    files = {"empty": b"", "text": b"hello" * 50, "zip": b"PK\3\4" + bytes(200)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert [seen(tmp_path / name) for name in files] == ["no DICOM", "no DICOM", "zip in a folder"]
    (tmp_path / "cut").write_bytes(bytes(128) + b"DICM" + b"\2\0\0\0UL\4\0")
    assert seen(tmp_path / "cut") == UNREADABLE
    assert seen(tmp_path / "nothing") == UNREADABLE


def test_a_deflated_bomb(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.Rows = dataset.Columns = 4000
        dataset.PixelData = bytes(32_000_000)

    path = write_series(tmp_path, ARRAY, syntax=DeflatedExplicitVRLittleEndian, change=change)[0]
    assert path.stat().st_size < 32_000_000 / 200
    assert seen(path) == UNREADABLE


def test_headers_are_whole_and_without_pixels(tmp_path: Path) -> None:
    path = write_series(tmp_path, ARRAY, marker="MARK")[0]
    with Reader() as reader:
        dataset = headers_of(reader, Instance(path))
        assert dataset.PatientName == "MARK"
        assert "PixelData" not in dataset
        (tmp_path / "no").write_bytes(b"no")
        with pytest.raises(UnreadableFile):
            headers_of(reader, Instance(tmp_path / "no"))


def test_nothing_that_pydicom_says_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    with silent():
        warnings.warn("JANE DOE", stacklevel=1)
        logging.getLogger("pydicom").warning("JANE DOE")
        logging.getLogger("pydicom.pixels").warning("JANE DOE")
    assert not caplog.records
    logging.getLogger("pydicom").warning("heard again")
    assert len(caplog.records) == 1


def test_threads_share_the_silence(caplog: pytest.LogCaptureFixture) -> None:
    """One that begins first and ends first leaves the other in silence; the second does not wait for the first."""
    first, second = silent(), silent()
    filters = list(warnings.filters)
    first.__enter__()
    thread = threading.Thread(target=second.__enter__)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive()
    first.__exit__(None, None, None)
    warnings.warn("JANE DOE", stacklevel=1)
    logging.getLogger("highdicom.seg").warning("JANE DOE")
    second.__exit__(None, None, None)
    assert not caplog.records
    assert warnings.filters == filters
    logging.getLogger("highdicom.seg").warning("heard again")
    assert len(caplog.records) == 1


def test_nested_sequences_end(tmp_path: Path) -> None:
    """A hundred thousand sequences in one another are an unreadable file, and no crash."""
    path = write_series(tmp_path, ARRAY)[0]
    whole = path.read_bytes()
    place = whole.index(b"\x10\x00\x10\x00PN")
    nested = (b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 100_000
    path.write_bytes(whole[:place] + nested + whole[place:])
    assert seen(path) == UNREADABLE
