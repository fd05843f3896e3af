"""medseg.io.dicom.frames: what a file is by its header, and what its frames say."""

from __future__ import annotations

import logging
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
from medseg.io.dicom.frames import UNREADABLE, Image, data_of, headers_of, image_of, silent

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
        ({"SeriesInstanceUID": "../../etc/x"}, "file without valid UIDs"),
        ({"SOPInstanceUID": "1" * 65}, "file without valid UIDs"),
        ({"FrameOfReferenceUID": "JANE DOE"}, "file without valid UIDs"),
        ({"StudyInstanceUID": None}, "file without valid UIDs"),
    ],
)
def test_what_is_passed_over(values: dict[str, Any], kind: str, tmp_path: Path) -> None:
    assert changed(tmp_path, **values) == kind


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
        ({"PixelRepresentation": 7}, "signed"),
    ],
)
def test_faults_of_pixels(values: dict[str, Any], fault: str, tmp_path: Path) -> None:
    image = changed(tmp_path, **values)
    assert isinstance(image, Image)
    assert fault in image.fault
    assert image.damaged == (fault[:5] in ("holds", "where", "has n", "signe"))


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
