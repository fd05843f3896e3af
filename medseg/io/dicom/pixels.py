"""Pixels of DICOM frames: decoded one at a time, and brought to the values that they stand for.

JPEG, JPEG-LS and JPEG 2000 are decoded by imagecodecs, run lengths by pydicom. What a codestream says of itself is
compared with the header before a decoder sees it, so that a damaged one asks for no more memory than a sound one.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medseg.errors import UnreadableFile
from medseg.io.dicom.archive import Instance, Reader, damaged
from medseg.io.dicom.frames import NATIVE, Encoding, Frame, data_of, silent

RLE = "1.2.840.10008.1.2.5"
MOST_RUN = 64
"""Times that run lengths expand: two bytes stand for 128 at the most (PS3.5 G.3.1)."""
_DECODERS = {
    **dict.fromkeys((f"1.2.840.10008.1.2.4.{end}" for end in (50, 51, 57, 70)), "jpeg8_decode"),
    **dict.fromkeys((f"1.2.840.10008.1.2.4.{end}" for end in (80, 81)), "jpegls_decode"),
    **dict.fromkeys((f"1.2.840.10008.1.2.4.{end}" for end in (90, 91, 201, 202, 203)), "jpeg2k_decode"),
}
"""Function of imagecodecs for a transfer syntax."""
_LOSSY = frozenset(f"1.2.840.10008.1.2.4.{end}" for end in (50, 51, 81, 91, 203))
_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"  # tags of encapsulated fragments, PS3.5 A.4
_END_OF_IMAGE = b"\xff\xd9"  # EOI of JPEG and JPEG-LS, EOC of JPEG 2000
_MOST_BEHIND = 16  # bytes that some writers leave behind the end of a stream; it stands in no stream before its end
_KINDS = (np.uint8, np.int16, np.uint16, np.int32, np.int64)
_TILE = 1024  # pixels: a stream in smaller pieces is no image of a scanner, and asks for memory by their number
_DAMAGED = "copy it again from its source"


def syntax_name(uid: str) -> str:
    """The name of a transfer syntax."""
    from pydicom._uid_dict import UID_dictionary

    return str(UID_dictionary[uid][0]) if uid in UID_dictionary else "unknown transfer syntax"


def undecodable(syntax: str) -> str:
    """Why pixels of a transfer syntax cannot be decoded here, with the package to install; empty where they can."""
    if syntax in NATIVE or syntax == RLE:
        return ""
    name = syntax_name(syntax)
    if syntax not in _DECODERS:
        return f"{name} cannot be decoded; convert it to another transfer syntax"
    return "" if _decoder(syntax) else f"no decoder of {name} is installed; pip install imagecodecs"


def decoders() -> dict[str, str]:
    """By the name of every compressed transfer syntax that there is a decoder of, what ``undecodable`` says of it."""
    return {syntax_name(syntax): undecodable(syntax) for syntax in (RLE, *_DECODERS)}


def kind_of(frames: Sequence[Frame]) -> np.dtype[Any]:
    """Number type of the values of some frames: the smallest integers that hold what the bits allow, or float32."""
    low = high = 0
    for frame in frames:
        slope, intercept = frame.slope, frame.intercept or 0.0
        if frame.encoding.is_float or slope not in (None, 1.0) or not intercept.is_integer():
            return np.dtype(np.float32)
        first, last = frame.encoding.range
        if frame.table is not None:
            first, last = (int(n) for n in (frame.table[1].min(), frame.table[1].max()))
        low, high = min(low, first + int(intercept)), max(high, last + int(intercept))
    fitting = (kind for kind in _KINDS if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    return np.dtype(next(fitting, np.float32))


def read(reader: Reader, frames: Mapping[int, Frame]) -> Iterator[tuple[int, NDArray[Any]]]:
    """The stored pixels of frames of one file, in the order of the file.

    Args:
        reader: opens the file.
        frames: by a key that comes back.

    Returns:
        Key and array (rows, columns) of what is stored: integers, or floating point numbers.

    Raises:
        UnreadableFile: the file is damaged, or no decoder of its compression is installed.
    """
    first = next(iter(frames.values()))
    keys: dict[int, list[int]] = {}
    for key, frame in sorted(frames.items(), key=lambda item: item[1].number):
        keys.setdefault(frame.number, []).append(key)
    instance, encoding = first.instance, first.encoding
    try:
        with data_of(reader, instance, whole=True) as (stream, _):
            for number, plane in planes(stream, instance, encoding, list(keys)):
                yield from ((key, plane) for key in keys.pop(number))
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error):
        raise damaged(instance) from None
    if keys:
        found = f"holds {encoding.frames - len(keys)} of {encoding.frames} frames"
        raise UnreadableFile(instance.path, found, "a whole file", _DAMAGED)


def planes(
    stream: BinaryIO, instance: Instance, encoding: Encoding, numbers: Sequence[int]
) -> Iterator[tuple[int, NDArray[Any]]]:
    """The stored pixels of some frames, decoded one at a time.

    Args:
        stream: in which the pixels begin at ``encoding.start``.
        instance: the file that they are of.
        encoding: how they are stored.
        numbers: of the frames, from 0, in ascending order.

    Returns:
        Number and array (rows, columns) of each frame that there is.

    Raises:
        UnreadableFile: a frame is damaged, or no decoder of its compression is installed.
    """
    if missing := undecodable(encoding.syntax):
        found, _, remedy = missing.partition("; ")
        raise UnreadableFile(instance.path, found, remedy=remedy)
    decode = _native if encoding.syntax in NATIVE else _compressed
    yield from decode(stream, instance, encoding, numbers)


def values(stored: NDArray[Any], frame: Frame, kind: np.dtype[Any], turned: bool) -> NDArray[Any]:
    """What stored pixels stand for: the Modality LUT, or slope and intercept (PS3.3 C.11.1).

    Args:
        stored: pixels of a frame.
        frame: whose they are.
        kind: number type that ``kind_of`` gives; wide enough.
        turned: whether the stored numbers are to be turned, the largest possible becoming the smallest.
    """
    if turned:
        stored = sum(frame.encoding.range) - stored.astype(np.int64)
    if frame.table is not None:
        first, table = frame.table
        stored = table[np.clip(stored.astype(np.int64) - first, 0, len(table) - 1)]
    slope, intercept = frame.slope, frame.intercept or 0.0
    if kind.kind in "iu":  # what fits in the end may wrap around on the way
        return np.asarray(stored.astype(kind) + np.int64(intercept).astype(kind))
    with np.errstate(over="ignore"):  # too large for float32: infinite, which is refused where an image is taken in
        product = np.multiply(stored, 1.0 if slope is None else slope, dtype=np.float64)
        return np.asarray((product + intercept).astype(kind))


def digest(reader: Reader, frame: Frame) -> bytes:
    """SHA-256 of the pixels as a frame's file stores them, and of what the header says about their values.

    Raises:
        UnreadableFile: the file cannot be read.
    """
    facts = replace(frame.encoding, start=0, length=None, file_bytes=0)
    found = hashlib.sha256(repr((facts, frame.number, frame.slope, frame.intercept)).encode())
    with data_of(reader, frame.instance) as (stream, _):
        stream.seek(frame.encoding.start)
        left = frame.encoding.file_bytes if frame.encoding.length is None else frame.encoding.length
        while left > 0 and (chunk := stream.read(min(left, 1 << 20))):
            found.update(chunk)
            left -= len(chunk)
    return found.digest()


def decoded_digest(reader: Reader, frames: Sequence[Frame]) -> bytes:
    """SHA-256 of the decoded pixels of frames of one file, which is the same however they are compressed.

    Raises:
        UnreadableFile: the file is damaged, or no decoder of its compression is installed.
    """
    found = hashlib.sha256()
    for number, plane in read(reader, {frame.number: frame for frame in frames}):
        found.update(repr((number, plane.shape)).encode())
        found.update(plane.astype(np.float64 if plane.dtype.kind == "f" else np.int64).tobytes())
    return found.digest()


def _decoder(syntax: str) -> Callable[[bytes], NDArray[Any]] | None:
    """What decodes a frame of a syntax; None where it is not installed."""
    try:
        import imagecodecs
    except ImportError:
        return None
    return getattr(imagecodecs, _DECODERS[syntax], None)


def _native(
    stream: BinaryIO, instance: Instance, encoding: Encoding, numbers: Sequence[int]
) -> Iterator[tuple[int, NDArray[Any]]]:
    size = encoding.frame_bytes
    order = "<" if encoding.little_endian else ">"
    kind = np.dtype(f"{order}{'f' if encoding.is_float else 'u'}{encoding.allocated // 8}")
    for number in numbers:
        stream.seek(encoding.start + number * size)
        content = stream.read(size)
        if len(content) < size:
            raise UnreadableFile(instance.path, "ends within its pixels", "a whole file", _DAMAGED)
        plane = np.frombuffer(content, kind).reshape(encoding.rows, encoding.columns)
        plane = plane.astype(kind.newbyteorder("="), copy=False)
        yield number, plane if encoding.is_float else _in_bits(plane, encoding)


def _in_bits(plane: NDArray[Any], encoding: Encoding) -> NDArray[Any]:
    """The Bits Stored below the High Bit, in two's complement where signed; whatever stands in other bits."""
    unsigned = plane.astype(f"u{encoding.allocated // 8}", copy=False)
    if encoding.stored < encoding.allocated:
        kind = unsigned.dtype.type
        unsigned = (unsigned >> kind(encoding.high + 1 - encoding.stored)) & kind((1 << encoding.stored) - 1)
    if not encoding.signed:
        return unsigned
    signed = unsigned.view(f"i{encoding.allocated // 8}")
    half = signed.dtype.type(-(1 << (encoding.stored - 1)))
    return signed if encoding.stored == encoding.allocated else (signed ^ half) - half


def _compressed(
    stream: BinaryIO, instance: Instance, encoding: Encoding, numbers: Sequence[int]
) -> Iterator[tuple[int, NDArray[Any]]]:
    from pydicom.encaps import generate_frames

    _check_fragments(stream, instance, encoding)
    coded, wanted = generate_frames(stream, number_of_frames=encoding.frames), set(numbers)
    for number in range(numbers[-1] + 1):
        try:
            with silent():
                content = next(coded)
                plane = _decoded(content, encoding) if number in wanted else None
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - what decoders raise on damaged streams; their messages may quote the file
            plane = None
        if plane is not None:
            yield number, plane
        elif number in wanted:
            found = f"frame {number + 1} cannot be decoded: its {syntax_name(encoding.syntax)} stream is damaged"
            raise UnreadableFile(instance.path, found, "a whole file", _DAMAGED)


def _check_fragments(stream: BinaryIO, instance: Instance, encoding: Encoding) -> None:
    """Every fragment is there in its length; the stream stands at the first of them again afterwards."""
    place = encoding.start
    stream.seek(place)
    while (head := stream.read(8))[:4] == _ITEM and len(head) == 8:
        length = int.from_bytes(head[4:], "little")
        place += 8 + length
        if place > encoding.file_bytes:
            raise UnreadableFile(instance.path, "ends within its pixels", "a whole file", _DAMAGED)
        stream.seek(place)
    if place == encoding.start or (head and head[:4] != _END):
        raise UnreadableFile(instance.path, "its compressed pixels are not in whole pieces", "a whole file", _DAMAGED)
    stream.seek(encoding.start)


def _decoded(content: bytes, encoding: Encoding) -> NDArray[Any] | None:
    """The pixels of one compressed frame (rows, columns); None where it is not what the header says."""
    if encoding.syntax == RLE:
        if encoding.frame_bytes > MOST_RUN * len(content):
            return None
        return _in_bits(_run_lengths(content, encoding), encoding)
    end = content.find(_END_OF_IMAGE, max(0, len(content.rstrip(b"\0")) - len(_END_OF_IMAGE) - _MOST_BEHIND))
    stream, decode = _stream_of(content), _decoder(encoding.syntax)
    if stream is None or decode is None or end < 0:
        return None  # decoders make up what is missing at the end
    if (stream.rows, stream.columns, stream.components) != (encoding.rows, encoding.columns, 1):
        return None
    if not 0 < stream.bits <= encoding.allocated or stream.tiles > 1 + stream.rows * stream.columns // _TILE:
        return None
    plane = decode(content[: end + len(_END_OF_IMAGE)]).reshape(encoding.rows, encoding.columns)
    if (plane.dtype.kind == "i") != encoding.signed:
        plane = _as_signed(plane.astype(np.int64), min(stream.bits, encoding.stored), encoding.signed)
    low, high = encoding.range
    if encoding.syntax in _LOSSY:
        plane = plane.clip(low, high)  # a stream of more bits than are stored overshoots their range at edges
    return plane if low <= plane.min() and plane.max() <= high else None


def _as_signed(plane: NDArray[np.int64], bits: int, signed: bool) -> NDArray[np.int64]:
    """The lowest bits of numbers, taken as two's complement or not: a stream says it otherwise than the header."""
    plane = plane & ((1 << bits) - 1)
    half = 1 << (bits - 1)
    return (plane ^ half) - half if signed else plane


def _run_lengths(content: bytes, encoding: Encoding) -> NDArray[Any]:
    from pydicom.encaps import encapsulate
    from pydicom.pixels.decoders.base import get_decoder

    options: dict[str, Any] = {
        "rows": encoding.rows,
        "columns": encoding.columns,
        "number_of_frames": 1,
        "samples_per_pixel": 1,
        "photometric_interpretation": "MONOCHROME2",
        "bits_allocated": encoding.allocated,
        "bits_stored": encoding.allocated,
        "pixel_representation": 0,
        "pixel_keyword": "PixelData",
    }
    source = BytesIO(encapsulate([content]))
    plane, _ = get_decoder(RLE).as_array(source, index=0, raw=True, decoding_plugin="pydicom", **options)
    return plane.reshape(encoding.rows, encoding.columns)


@dataclass(frozen=True)
class _Stream:
    """What a codestream says of itself."""

    rows: int
    columns: int
    components: int
    bits: int
    tiles: int = 1


def _stream_of(content: bytes) -> _Stream | None:
    """SIZ of JPEG 2000 (ISO 15444-1 A.5.1), or the frame header of JPEG and JPEG-LS (ISO 10918-1 B.2.2); or None."""
    if not content.startswith(b"\xff\xd8"):
        start = content.find(b"\xff\x4f\xff\x51")
        return _siz(content[start + 8 : start + 45]) if start >= 0 else None
    place = 2
    while place + 10 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns = (int.from_bytes(content[place + n : place + n + 2], "big") for n in (5, 7))
            return _Stream(rows, columns, content[place + 9], content[place + 4])
        place += 1 if marker == 0xFF else 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return None


def _siz(content: bytes) -> _Stream | None:
    if len(content) < 37:
        return None
    right, bottom, left, top, width, height, x, y = np.frombuffer(content, ">u4", 8).tolist()
    if not (width and height) or content[35:37] != b"\x01\x01":  # a step of 1 from sample to sample
        return None
    tiles = -(-(right - x) // width) * -(-(bottom - y) // height)
    components, bits = int.from_bytes(content[32:34], "big"), (content[34] & 0x7F) + 1
    return _Stream(bottom - top, right - left, components, bits, tiles)
