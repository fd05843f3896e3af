"""medseg.io.dicom.pixels: what is stored, and what it stands for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from dicoms import write_enhanced, write_series
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    JPEG2000,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from medseg.errors import UnreadableFile
from medseg.io import dicom
from medseg.io.dicom import pixels
from medseg.io.dicom.archive import Instance, Reader
from medseg.io.dicom.frames import Frame, Image, image_of

STORED = (np.arange(36 * 34 * 2).reshape(36, 34, 2) % 4001 - 2000).astype(np.int16)


def frame_of(path: Path) -> Frame:
    with Reader() as reader:
        image = image_of(reader, Instance(path))
    assert isinstance(image, Image)
    assert not image.fault
    return image.frames[0]


def read(frame: Frame) -> NDArray[Any]:
    """Stored pixels (columns, rows)."""
    with Reader() as reader:
        ((_, plane),) = pixels.read(reader, {0: frame})
    return plane.T


def values(stored: Sequence[int], frame: Frame, *, turned: bool = False) -> tuple[list[float], str]:
    kind = pixels.kind_of([frame])
    return pixels.values(np.array([stored]), frame, kind, turned)[0].tolist(), kind.name


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEG2000Lossless])
def test_signed_numbers(syntax: str, tmp_path: Path) -> None:
    path = write_series(tmp_path, STORED, syntax=syntax)[1]
    np.testing.assert_array_equal(read(frame_of(path)), STORED[:, :, 1])


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEGLSLossless])
def test_unsigned_numbers(syntax: str, tmp_path: Path) -> None:
    array = (STORED.astype(int) + 60000).astype(np.uint16)
    path = write_series(tmp_path, array, syntax=syntax)[1]
    np.testing.assert_array_equal(read(frame_of(path)), array[:, :, 1])


@pytest.mark.parametrize(("signed", "expected"), [(0, [0, 4095, 2048, 5]), (1, [0, -1, -2048, 5])])
def test_bits_above_and_below_those_stored_are_no_part_of_a_number(
    signed: int, expected: list[int], tmp_path: Path
) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 13, signed
        # two bits below, two above, which overlays once took
        words = np.array([0b11 << 14, 0xFFF << 2, 0x800 << 2 | 0b11, 5 << 2 | 1 << 15], dtype="<u2")
        dataset.PixelData = words.tobytes()

    path = write_series(tmp_path, np.zeros((4, 1, 1), np.uint16), change=change)[0]
    assert read(frame_of(path))[:, 0].tolist() == expected


def test_frames_come_with_the_key_that_asked(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path, STORED, syntax=RLELossless)
    with Reader() as reader:
        image = image_of(reader, Instance(path))
        assert isinstance(image, Image)
        keys = {frame.number: int(frame.plane.position[2]) for frame in image.frames if frame.plane}
        found = dict(pixels.read(reader, {keys[frame.number]: frame for frame in image.frames}))
    for k in range(2):
        np.testing.assert_array_equal(found[k].T, STORED[:, :, k])


def test_floats(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        del dataset.PixelData
        dataset.BitsAllocated = 32
        dataset.FloatPixelData = np.array([1.5, -2.25], dtype="<f4").tobytes()

    path = write_series(tmp_path, np.zeros((2, 1, 1), np.int16), change=change, slope=2, intercept=1)[0]
    frame = frame_of(path)
    assert pixels.kind_of([frame]) == np.float32
    stored = read(frame)
    assert stored[:, 0].tolist() == [1.5, -2.25]
    assert pixels.values(stored, frame, np.dtype(np.float32), False)[:, 0].tolist() == [4.0, -3.5]


def plain(**changes: Any) -> Frame:
    """A frame of 12 unsigned bits in 16 without rescaling, and changed."""
    from medseg.io.dicom.frames import Encoding

    bits = {name: changes.pop(name) for name in ("stored", "signed", "keyword") if name in changes}
    encoding = Encoding(
        syntax=str(ExplicitVRLittleEndian),
        keyword="PixelData",
        start=0,
        length=0,
        file_bytes=0,
        rows=1,
        columns=1,
        frames=1,
        allocated=16,
        stored=12,
        high=11,
        signed=False,
        inverted=False,
        little_endian=True,
    )
    frame = Frame(Instance(Path("x")), 0, "1.2", replace(encoding, **bits), None, 0, 0, None, None, None, "", {})
    return replace(frame, **changes)


@pytest.mark.parametrize(
    ("frames", "kind"),
    [
        ([plain()], "int16"),
        ([plain(stored=8)], "uint8"),
        ([plain(stored=16)], "uint16"),
        ([plain(stored=16, signed=True)], "int16"),
        ([plain(slope=1.0, intercept=-1024.0)], "int16"),
        ([plain(stored=16, slope=1.0, intercept=-1024.0)], "int32"),
        ([plain(stored=16, signed=True, slope=1.0, intercept=-1024.0)], "int32"),
        ([plain(), plain(stored=16, signed=True, slope=1.0, intercept=5.0)], "int32"),
        ([plain(), plain(slope=2.0, intercept=0.0)], "float32"),
        ([plain(slope=1.0, intercept=0.5)], "float32"),
        ([plain(slope=1.0, intercept=1e30)], "float32"),
        ([plain(table=(0, np.array([0, 60000], np.uint16)))], "uint16"),
    ],
)
def test_the_number_type_holds_what_the_bits_allow(frames: list[Frame], kind: str) -> None:
    assert pixels.kind_of(frames).name == kind


def test_values() -> None:
    assert values([0, 4095], plain()) == ([0, 4095], "int16")
    assert values([0, 4095], plain(slope=1.0, intercept=-1024.0)) == ([-1024, 3071], "int16")
    wrapped = plain(stored=16, slope=1.0, intercept=-32768.0)
    assert values([0, 65535], wrapped) == ([-32768, 32767], "int16")
    assert values([0, 4], plain(slope=0.25, intercept=-1.5)) == ([-1.5, -0.5], "float32")
    assert values([0, 4095, 95], plain(), turned=True) == ([4095, 0, 4000], "int16")
    assert values([-2048, 2047], plain(signed=True), turned=True) == ([2047, -2048], "int16")
    table = plain(table=(10, np.array([7, 300, 9], np.uint16)))
    assert values([0, 10, 11, 12, 4000], table) == ([7, 7, 300, 9, 9], "int16")  # beyond its ends, its ends


@given(st.integers(-2048, 2047), st.floats(-1e3, 1e3), st.floats(-1e6, 1e6))
def test_slope_and_intercept_are_those_of_float64(stored: int, slope: float, intercept: float) -> None:
    frame = plain(signed=True, slope=slope, intercept=intercept)
    found = pixels.values(np.array([[stored]], np.int16), frame, np.dtype(np.float32), False)
    assert found[0, 0] == np.float32(stored * slope + intercept)


def test_a_modality_table_in_a_file(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        del dataset.RescaleSlope, dataset.RescaleIntercept
        item = Dataset()
        item.add_new("LUTDescriptor", "SS", [3, -1, 16])
        item.ModalityLUTType = "HU"
        item.add_new("LUTData", "OW", np.array([100, 200, 1000], "<u2").tobytes())
        dataset.ModalityLUTSequence = [item]

    write_series(tmp_path, np.array([-5, -1, 0, 1, 5], np.int16).reshape(5, 1, 1), change=change)
    assert dicom.read(tmp_path).array[0, :, 0, 0].tolist() == [100, 100, 200, 1000, 1000]


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_series(tmp_path, STORED, syntax=JPEG2000Lossless)
    (before,) = dicom.scan(tmp_path).series
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    (series,) = dicom.scan(tmp_path).series
    assert series.reason.endswith("is installed; pip install imagecodecs")
    for one in (series, before):
        with pytest.raises(UnreadableFile, match=r"no decoder of JPEG 2000.*Pip install imagecodecs"):
            dicom.read_series(one)


def test_a_syntax_that_nothing_decodes(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.94"  # JPIP Referenced
        dataset.PixelData = encapsulate([b"1234"])
        dataset["PixelData"].is_undefined_length = True

    write_series(tmp_path, STORED, change=change)
    (series,) = dicom.scan(tmp_path).series
    assert "JPIP Referenced cannot be decoded" in series.reason
    assert pixels.syntax_name("1.2.3") == "unknown transfer syntax"


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
@pytest.mark.parametrize("damage", ["size", "cut", "swapped", "pieces", "end"])
def test_damaged_streams(syntax: str, damage: str, tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        stream = next(generate_frames(dataset.PixelData, number_of_frames=1))
        if damage == "size":
            dataset.Rows += 1
        elif damage == "cut":
            stream = stream[: len(stream) // 2]
        elif damage == "swapped":
            stream = stream[::-1]
        content = encapsulate([stream])
        if damage == "pieces":
            content = content[:8] + content[9:]
        dataset.PixelData = content
        dataset["PixelData"].is_undefined_length = True

    array = STORED if syntax != JPEGLSLossless else (STORED + 2000).astype(np.uint16)
    paths = write_series(tmp_path, array, syntax=syntax, change=change)
    if damage == "end":
        paths[0].write_bytes(paths[0].read_bytes()[:-100])
    (series,) = dicom.scan(tmp_path).series
    with pytest.raises(UnreadableFile):
        dicom.read_series(series)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, JPEGLossless])
@pytest.mark.parametrize(
    ("behind", "ok"), [(b"\xff", True), (b" " * 16, True), (b"JUNK\0\0\0", True), (b"x" * 18, False)]
)
def test_a_few_bytes_behind_a_stream(syntax: str, behind: bytes, ok: bool, tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        stream = next(generate_frames(dataset.PixelData, number_of_frames=1))
        dataset.PixelData = encapsulate([stream.rstrip(b"\0") + behind])
        dataset["PixelData"].is_undefined_length = True

    array = (STORED + 2000).astype(np.uint16)
    path = write_series(tmp_path, array, syntax=syntax, change=change)[1]
    if ok:
        np.testing.assert_array_equal(read(frame_of(path)), array[:, :, 1])
    else:
        with pytest.raises(UnreadableFile, match="stream is damaged"):
            read(frame_of(path))


def test_a_stream_of_another_size_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a damaged codestream claims is seen before a decoder takes memory for it."""
    import imagecodecs

    def change(dataset: Dataset, k: int) -> None:
        stream = bytearray(next(generate_frames(dataset.PixelData, number_of_frames=1)))
        place = stream.index(b"\xff\x51") + 6
        stream[place : place + 8] = (60000).to_bytes(4, "big") * 2
        dataset.PixelData = encapsulate([bytes(stream)])
        dataset["PixelData"].is_undefined_length = True

    def never(content: bytes) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(imagecodecs, "jpeg2k_decode", never)
    write_series(tmp_path, STORED, syntax=JPEG2000Lossless, change=change)
    with pytest.raises(UnreadableFile, match="stream is damaged"):
        dicom.read(tmp_path)


def jpegls(frame: NDArray[Any]) -> bytes:
    return bytes(imagecodecs.jpegls_encode(frame, level=3))


def jpeg2k(frame: NDArray[Any]) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(frame, level=70, reversible=False, codecformat="j2k"))


def jpeg2k_of_twelve_bits(frame: NDArray[Any]) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(frame, reversible=True, codecformat="j2k", bitspersample=12))


@pytest.mark.parametrize(
    ("syntax", "encode", "low", "most"),
    [
        (JPEGLSNearLossless, jpegls, 0, 3),
        (JPEG2000, jpeg2k, 0, 100),
        (JPEG2000, jpeg2k, -2048, 100),
        (JPEG2000, jpeg2k_of_twelve_bits, -2048, 0),
        (JPEG2000Lossless, jpeg2k_of_twelve_bits, -2048, 0),
    ],
    ids=["JPEG-LS", "JPEG 2000", "signed JPEG 2000", "12 signed bits", "12 signed bits, lossless"],
)
def test_twelve_bits_with_loss(
    syntax: str, encode: Callable[[NDArray[Any]], bytes], low: int, most: int, tmp_path: Path
) -> None:
    """Hard edges between the ends of the range, which a lossy decoder oversteps in a stream of 16 bits."""
    random = np.random.default_rng(0)
    array = (random.choice([0, 4095], (36, 34, 2)) + low).astype(np.int16 if low else np.uint16)
    array[:, 10:] = (np.arange(36 * 24 * 2).reshape(36, 24, 2) % 4001 + low).astype(array.dtype)

    def change(dataset: Dataset, k: int) -> None:
        dataset.PixelData = encapsulate([encode(np.ascontiguousarray(array[:, :, k].T))])
        dataset["PixelData"].is_undefined_length = True
        dataset.BitsStored, dataset.HighBit = 12, 11
        dataset.file_meta.TransferSyntaxUID = syntax

    write_series(tmp_path, array, change=change)
    found = dicom.read(tmp_path).array[0]
    assert (found.min(), found.max()) == (low, low + 4095)
    assert np.abs(found.astype(int) - array).max() <= most


@pytest.mark.parametrize(
    ("bits", "precision", "expected"),
    [(12, 12, -1), (12, 16, -1), (16, 12, -1), (16, 16, 4095)],
)
def test_streams_without_a_sign(bits: int, precision: int, expected: int) -> None:
    """JPEG knows no signed numbers: the header says that these 12 ones are a -1, where 12 bits are all there are."""
    plane = np.array([[4095]], dtype=np.int64)
    assert pixels._as_signed(plane, min(bits, precision), True)[0, 0] == expected


def test_digests_are_of_the_pixels(tmp_path: Path) -> None:
    array = STORED.copy()
    array[:, :, 1] = array[:, :, 0]
    one, other = (frame_of(path) for path in write_series(tmp_path / "a", array))
    third = frame_of(write_series(tmp_path / "b", array, intercept=7)[0])
    with Reader() as reader:
        assert pixels.digest(reader, one) == pixels.digest(reader, other) != pixels.digest(reader, third)


def test_decoded_digests_are_the_same_in_any_compression(tmp_path: Path) -> None:
    syntaxes = (ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless)
    paths = [write_series(tmp_path / syntax, STORED, syntax=syntax) for syntax in syntaxes]
    with Reader() as reader:
        first = {pixels.decoded_digest(reader, [frame_of(one)]) for one, _ in paths}
        second = {pixels.decoded_digest(reader, [frame_of(other)]) for _, other in paths}
    assert len(first) == len(second) == 1
    assert first != second
