"""Images of DICOM by their headers: what a file is, and for each of its frames where it lies and how it is stored.

Values are taken from the bytes of the header here, not by pydicom's conversions, which take most of the time that a
folder of many files needs. What cannot be parsed counts as missing; warnings with values are kept down by ``silent``.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import re
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medseg.errors import UnreadableFile
from medseg.io.dicom.archive import Instance, Reader, damaged
from medseg.io.dicom.stack import Plane

MAX_IMAGE_BYTES = 2**36
"""Largest image that a header may claim, 64 GiB."""

UNREADABLE = "unreadable file"
"""Kind of what is DICOM and cannot be read."""
MISSED = (UNREADABLE, "file without UIDs", "no DICOM in spite of its name")
"""Kinds of what may be a slice."""

_UID = re.compile(r"[0-9.]{1,64}")  # with zeros before a component too, as some scanners and anonymisers write them
_BARE = re.compile(
    rb"\x02\x00[\x00-\x13]\x00(UL\x04\x00|OB\x00\x00|UI[\x00-\x40]\x00)"
    rb"|\x08\x00[\x00\x01\x05\x06\x08\x10-\x18]\x00((UL|CS|SQ|DA|TM|UI|LO|SH).[\x00-\x03]|.[\x00-\x03]\x00\x00)",
    re.DOTALL,
)
"""First element of a file without preamble: of its meta information, or of a little-endian data set alone."""
_NAMES = (".dcm", ".dicom", ".ima")
_STANDARD = "1.2.840.10008."  # root of what the standard itself names
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_MAX_INFLATION = 200  # times; images deflate to a third, and an empty one that says more is not worth the memory
_MAX_COMPRESSION = 1000  # times, of images of more than ...
_SMALL_BYTES = 1 << 26
_UNDEFINED = 0xFFFFFFFF
NATIVE = frozenset(f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".1.99", ".2"))
"""Transfer syntaxes without compression of pixels."""


_KINDS = {
    "1.2.840.10008.1.3.10": "DICOMDIR",
    "1.2.840.10008.5.1.4.1.1.7": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.9": "waveform",
    "1.2.840.10008.5.1.4.1.1.11": "presentation state",
    "1.2.840.10008.5.1.4.1.1.66": "raw data or registration",
    "1.2.840.10008.5.1.4.1.1.66.4": "segmentation",
    "1.2.840.10008.5.1.4.1.1.66.5": "segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "segmentation",
    "1.2.840.10008.5.1.4.1.1.77.1.1.1": "video",
    "1.2.840.10008.5.1.4.1.1.77.1.2.1": "video",
    "1.2.840.10008.5.1.4.1.1.77.1.4.1": "video",
    "1.2.840.10008.5.1.4.1.1.77.1.6": "whole-slide image",
    "1.2.840.10008.5.1.4.1.1.88": "structured report",
    "1.2.840.10008.5.1.4.1.1.104": "document",
    "1.2.840.10008.5.1.4.1.1.481": "radiotherapy object",
}
"""SOP classes (PS3.4 B.5), and with them those whose UID goes on, that are passed over."""
_CAPTURES = ("1.2.840.10008.5.1.4.1.1.7.2", "1.2.840.10008.5.1.4.1.1.7.3")
"""Multi-frame grayscale secondary capture: a volume where every frame has its plane (PS3.3 A.8.3, A.8.4)."""
_ELSEWHERE = {
    "1.2.840.10008.5.1.4.1.1.20": "nuclear medicine",
    "1.2.840.10008.5.1.4.1.1.6.2": "enhanced ultrasound",
}
"""SOP classes that say where their frames lie by detectors, or in the coordinates of a probe."""
_SCANS = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(2|4|128|130)(\.\d)?")  # CT, MR and PET: without Rows, cut short
_VIDEO = re.compile(r"1\.2\.840\.10008\.1\.2\.4\.10\d(\.\d+)?")  # MPEG and HEVC, PS3.5 A.4.5 to A.4.12
_PIXELS = {0x7FE00010: "PixelData", 0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData"}

_SHARED_GROUPS, _FRAME_GROUPS = 0x52009229, 0x52009230
_SOP_CLASS, _SOP_UID, _STUDY_UID, _SERIES_UID, _FRAME_UID = 0x00080016, 0x00080018, 0x0020000D, 0x0020000E, 0x00200052
_IMAGE_TYPE, _FRAME_TYPE, _MODALITY, _DESCRIPTION = 0x00080008, 0x00089007, 0x00080060, 0x0008103E
_SAMPLES, _PHOTOMETRIC, _FRAMES, _ROWS, _COLUMNS = 0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011
_ALLOCATED, _STORED, _HIGH, _SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
_POSITION, _ORIENTATION, _SPACING, _THICKNESS, _BETWEEN = 0x00200032, 0x00200037, 0x00280030, 0x00180050, 0x00180088
_INTERCEPT, _SLOPE, _RESCALE_TYPE, _TABLE = 0x00281052, 0x00281053, 0x00281054, 0x00283000
_TABLE_DESCRIPTOR, _TABLE_DATA = 0x00283002, 0x00283006

_SIEMENS, _SIEMENS_TILES = 0x00190010, 0x0019100A  # private creator "SIEMENS MR HEADER", number of images in a mosaic
_UNITED, _UNITED_TILES = 0x00650010, 0x00651051  # "Image Private Header" of United Imaging, sequence of them

ATTRIBUTES = {
    "StackID": 0x00209056,
    "EchoTime": 0x00180081,
    "EffectiveEchoTime": 0x00189082,
    "EchoNumbers": 0x00180086,
    "InversionTime": 0x00180082,
    "InversionTimes": 0x00189079,
    "DiffusionBValue": 0x00189087,
    "FrameType": _FRAME_TYPE,
    "ImageType": _IMAGE_TYPE,
    "ComplexImageComponent": 0x00089208,
    "TemporalPositionIdentifier": 0x00200100,
    "TemporalPositionIndex": 0x00209128,
    "TriggerTime": 0x00181060,
    "NominalCardiacTriggerDelayTime": 0x00209153,
    "NominalPercentageOfCardiacPhase": 0x00209241,
    "FrameReferenceTime": 0x00541300,
    "FlipAngle": 0x00181314,
    "AcquisitionNumber": 0x00200012,
    "AcquisitionTime": 0x00080032,
    "AcquisitionDateTime": 0x0008002A,
    "FrameAcquisitionDateTime": 0x00189074,
    "ContentTime": 0x00080033,
}
"""What may tell apart the volumes of one series, the surest first."""

_WANTED = [
    *(_SHARED_GROUPS, _FRAME_GROUPS, _SOP_CLASS, _SOP_UID, _STUDY_UID, _SERIES_UID, _FRAME_UID, _MODALITY),
    *(_DESCRIPTION, _SAMPLES, _PHOTOMETRIC, _FRAMES, _ROWS, _COLUMNS, _ALLOCATED, _STORED, _HIGH, _SIGNED),
    *(_POSITION, _ORIENTATION, _SPACING, _THICKNESS, _BETWEEN, _INTERCEPT, _SLOPE, _RESCALE_TYPE, _TABLE),
    *(_SIEMENS, _SIEMENS_TILES, _UNITED, _UNITED_TILES, *ATTRIBUTES.values()),
]
_MEASURES, _TRANSFORMATION = 0x00289110, 0x00289145
_MACROS = {
    _POSITION: 0x00209113,
    _ORIENTATION: 0x00209116,
    **dict.fromkeys((_SPACING, _THICKNESS, _BETWEEN), _MEASURES),
    **dict.fromkeys((_INTERCEPT, _SLOPE, _RESCALE_TYPE), _TRANSFORMATION),
}
"""In which functional group (PS3.3 C.7.6.16.2) the geometry and scale of a frame stand; elsewhere they mean another."""
_OF_FRAMES = frozenset((*_MACROS, *ATTRIBUTES.values()))
_Elements = Mapping[int, Any]


@dataclass(frozen=True)
class Encoding:
    """How the pixels of a file are stored.

    Attributes:
        syntax: UID of the transfer syntax.
        keyword: which element holds them: PixelData, FloatPixelData or DoubleFloatPixelData; empty where none does.
        start, length: of the element's value in the (inflated) file; None where it is encapsulated.
        file_bytes: size of that file.
        rows, columns, frames: as the header says.
        allocated, stored, high: Bits Allocated, Bits Stored, High Bit.
        signed: whether Pixel Representation is two's complement.
        inverted: whether 0 is white (MONOCHROME1).
        little_endian: order of bytes.
    """

    syntax: str
    keyword: str
    start: int
    length: int | None
    file_bytes: int
    rows: int
    columns: int
    frames: int
    allocated: int
    stored: int
    high: int
    signed: bool
    inverted: bool
    little_endian: bool

    @property
    def frame_bytes(self) -> int:
        """Bytes of one decoded frame."""
        return self.rows * self.columns * self.allocated // 8

    @property
    def deflated(self) -> bool:
        """Whether the file is inflated to be read."""
        return self.syntax.encode() == _DEFLATED

    @property
    def is_float(self) -> bool:
        """Whether the pixels are floating point numbers."""
        return self.keyword in ("FloatPixelData", "DoubleFloatPixelData")

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest stored integer by the bits."""
        half = 1 << max(0, self.stored - 1)
        return (-half, half - 1) if self.signed else (0, 2 * half - 1)


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice.

    Attributes:
        instance, number: the file, and which of its frames, from 0.
        uid: SOP instance UID of the file.
        encoding: how its pixels are stored.
        plane: where it lies; None where the header does not say.
        thickness, between: Slice Thickness and Spacing Between Slices, mm; 0 where unknown.
        slope, intercept: of rescaling; None where missing, NaN where it is no number.
        table: look-up table of modality values: first stored value that it maps, and the values.
        unit: Rescale Type.
        attributes: values of ``ATTRIBUTES``: numbers as float, others as text.
    """

    instance: Instance
    number: int
    uid: str
    encoding: Encoding
    plane: Plane | None
    thickness: float
    between: float
    slope: float | None
    intercept: float | None
    table: tuple[int, NDArray[Any]] | None
    unit: str
    attributes: Mapping[str, float | str] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Image:
    """A file with an image.

    Attributes:
        uid, series_uid, study_uid, frame_uid: of the file, its series, its study and its frame of reference; what is
            no UID is replaced by one, see ``uid_of``.
        modality: CT, MR, ...
        description: of the series; free text.
        frames: its slices; of a multi-frame file without a place for each, the first alone.
        fault: why its pixels cannot be used; empty where they can.
        damaged: whether that is a fault of the file.
        replaced: whether one of its UIDs was none.
        note: what was assumed about it.
    """

    uid: str
    series_uid: str
    study_uid: str
    frame_uid: str
    modality: str
    description: str = field(repr=False)
    frames: tuple[Frame, ...]
    fault: str = ""
    damaged: bool = False
    replaced: bool = False
    note: str = ""


def uid_of(text: str) -> str:
    """A UID as it is, or one out of the digest of what should be one: public data sets have such as ``ID_18f2``.

    The text itself goes nowhere, as it may be a name or lead out of a folder. Of an empty text, nothing.
    """
    if not text or _UID.fullmatch(text):
        return text
    return f"2.25.{int(hashlib.sha256(text.encode()).hexdigest(), 16)}"[:44]  # PS3.5 B.2: 39 digits at the most


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without warnings, and the log of pydicom and highdicom, which quote what a file says.

    Threads share the silence: it begins with the first of them that asks for it, and ends with the last.
    """
    _silence.begin()
    try:
        yield
    finally:
        _silence.end()


class _Silence:
    """Warning filters and loggers are of the whole process: no thread may restore them while another needs them."""

    def __init__(self) -> None:
        self._lock, self._askers, self._undo = threading.Lock(), 0, contextlib.ExitStack()

    def begin(self) -> None:
        with self._lock:
            self._askers += 1
            if self._askers > 1:
                return
            self._undo.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for log in map(logging.getLogger, ("pydicom", "highdicom")):
                self._undo.callback(setattr, log, "propagate", log.propagate)
                log.propagate = False
                log.addHandler(_NOWHERE)  # a logger without any would be heard on standard error

    def end(self) -> None:
        with self._lock:
            self._askers -= 1
            if not self._askers:
                self._undo.close()


_NOWHERE = logging.NullHandler()
_silence = _Silence()


@contextlib.contextmanager
def data_of(reader: Reader, instance: Instance, *, whole: bool = False) -> Iterator[tuple[BinaryIO, int]]:
    """A DICOM file as a stream, inflated where its transfer syntax is deflated; and its size.

    Args:
        reader: opens it.
        instance: the file.
        whole: whether a member of a zip is read to its end first, which alone checks it against its CRC.

    Raises:
        UnreadableFile: it cannot be opened or inflated.
    """
    with reader.open(instance) as stream:
        head = stream.read(1024)
        stream.seek(0)
        if _DEFLATED not in head and not (whole and instance.member):
            yield stream, reader.size(instance)
            return
        content = reader.content(instance)
    plain = _inflated(content, instance) if _DEFLATED in head else content
    yield BytesIO(plain), len(plain)


def image_of(reader: Reader, instance: Instance) -> Image | str:
    """What an instance is: an image, or the kind of thing for which it is passed over.

    A file that cannot be read is of the kind ``UNREADABLE``. One without preamble (PS3.10 7.1), as old archives and
    some anonymisers write, counts as DICOM where it begins as such and has a known SOP class and the UID of a series.

    Raises:
        UnreadableFile: the zip that it is in is damaged.
    """
    try:
        with data_of(reader, instance) as (stream, size):
            head = stream.read(132)
            if not _begins(head):
                return _other(head, instance)
            stream.seek(0)
            return _image_of(stream, size, instance, inflated=size != reader.size(instance), bare=not _is_marked(head))
    except MemoryError:
        raise
    except (zipfile.BadZipFile, zlib.error):
        raise damaged(instance) from None
    except Exception:  # noqa: BLE001 - damaged headers make pydicom raise nearly anything, and quote their values
        return UNREADABLE


def is_dicom(instance: Instance) -> bool:
    """Whether a file is DICOM: by its preamble, or without one by what it begins with and its UIDs."""
    with Reader() as reader:
        head = reader.head(instance, 132)
        return _is_marked(head) or (_begins(head) and image_of(reader, instance) != UNREADABLE)


def headers_of(reader: Reader, instance: Instance) -> Any:
    """The whole data set of an instance without its pixels.

    Raises:
        UnreadableFile: it cannot be read.
    """
    from pydicom import dcmread

    try:
        with silent(), data_of(reader, instance) as (stream, _):
            is_dicom = _begins(stream.read(132))
            stream.seek(0)
            return dcmread(stream, stop_before_pixels=True, force=is_dicom)
    except UnreadableFile:
        raise
    except Exception:  # noqa: BLE001 - as above
        raise UnreadableFile(instance.path, "the DICOM header is damaged", "a whole file") from None


def _is_marked(head: bytes) -> bool:
    return head[128:] == b"DICM"


def _begins(head: bytes) -> bool:
    return _is_marked(head) or _BARE.match(head) is not None


def _other(head: bytes, instance: Instance) -> str:
    """The kind of a file that does not begin as DICOM."""
    if head.startswith(b"PK\x03\x04"):
        return "zip in a folder"
    name = (instance.member or instance.path.name).lower()
    return MISSED[2] if name.endswith(_NAMES) and not name.rpartition("/")[2].startswith("._") else "no DICOM"


def _inflated(content: bytes, instance: Instance) -> bytes:
    """A deflated file as an explicit little-endian one (PS3.5 A.5): a header of its own, then the plain data set."""
    from pydicom.uid import ExplicitVRLittleEndian

    meta = 132 if _is_marked(content[:132]) else 0
    start = meta + 12 + int.from_bytes(content[meta + 8 : meta + 12], "little")  # (0002,0000), PS3.10 7.1
    limit = _MAX_INFLATION * len(content)
    try:
        plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content[start:], limit + 1)
    except zlib.error:
        raise UnreadableFile(instance.path, "the deflated data set is damaged", "a whole file") from None
    if len(plain) > limit:
        raise UnreadableFile(instance.path, f"inflates to more than {_MAX_INFLATION} times its size", "an image")
    uid = str(ExplicitVRLittleEndian).encode() + b"\0"
    syntax = b"\x02\x00\x10\x00UI" + len(uid).to_bytes(2, "little") + uid
    length = b"\x02\x00\x00\x00UL\x04\x00" + len(syntax).to_bytes(4, "little")
    return bytes(128) + b"DICM" + length + syntax + plain


def _image_of(stream: BinaryIO, size: int, instance: Instance, *, inflated: bool, bare: bool) -> Image | str:
    from pydicom import dcmread

    with silent():
        dataset = dcmread(stream, stop_before_pixels=True, specific_tags=_WANTED, force=bare)
        meta = dataset.file_meta
        implicit, little = dataset.original_encoding
        syntax = _DEFLATED.decode() if inflated else str(meta.get("TransferSyntaxUID", "") or native(implicit, little))
        sop_class = str(meta.get("MediaStorageSOPClassUID", ""))
        header = _elements(dataset)  # before pydicom parses any, as it does with others on the way to a sequence
        description = _description(dataset)
        groups = [_items(dataset, tag) for tag in (_SHARED_GROUPS, _FRAME_GROUPS)]
        table = _table(dataset, header)
    sop_class = _text(header, _SOP_CLASS) or sop_class
    if bare and not (sop_class.startswith(_STANDARD) and _UID.fullmatch(_text(header, _SERIES_UID))):
        return UNREADABLE
    if kind := _kind(header, sop_class, syntax):
        return kind
    given = [_text(header, tag) for tag in (_SOP_UID, _SERIES_UID, _STUDY_UID, _FRAME_UID)]
    if not all(given[:3]):
        return MISSED[1]
    uid, series_uid, study_uid, frame_uid = uids = [uid_of(text) for text in given]
    encoding = _encoding(header, _element(stream, size, bool(implicit), bool(little)), syntax, bool(little))
    frames = _frames(instance, uid, encoding, header, groups, table)
    placed = all(frame.plane for frame in frames)
    if sop_class in _CAPTURES and not (placed and groups[1]):
        return "secondary capture"
    fault, broken = _fault(encoding, frames, _number(header, _SIGNED) in (0, 1))
    if sop_class in _ELSEWHERE and not placed:
        fault, broken = f"is of {_ELSEWHERE[sop_class]}: the position of its slices is given in another way", False
    return Image(
        uid,
        series_uid,
        study_uid,
        frame_uid,
        modality=_code(header, _MODALITY),
        description=description,
        frames=frames,
        fault=fault,
        damaged=broken,
        replaced=uids != given,
        note="" if _text(header, _PHOTOMETRIC) else "no Photometric Interpretation: taken as MONOCHROME2",
    )


def native(implicit: bool | None, little: bool | None) -> str:
    """The transfer syntax of a data set of which no meta information says it."""
    return f"1.2.840.10008.1.2{'' if implicit else '.1' if little else '.2'}"


def _kind(header: _Elements, sop_class: str, syntax: str) -> str:
    """What is passed over; empty for images."""
    kinds = [kind for uid, kind in _KINDS.items() if sop_class == uid or sop_class.startswith(uid + ".")]
    if kinds and sop_class not in _CAPTURES:
        return kinds[-1]
    if _VIDEO.fullmatch(syntax):
        return "video"
    if not (_number(header, _ROWS) and _number(header, _COLUMNS)):
        return UNREADABLE if not sop_class or _SCANS.fullmatch(sop_class) else "other DICOM object"
    if _number(header, _SAMPLES, 1) != 1 or not (_text(header, _PHOTOMETRIC) or "MONOCHROME2").startswith("MONOCHROME"):
        return "colour image"
    types = _text(header, _IMAGE_TYPE).split("\\")
    if "MOSAIC" in types or _is_mosaic(header):
        return "mosaic"
    return "localizer" if "LOCALIZER" in types else ""


def _is_mosaic(header: _Elements) -> bool:
    """Whether a vendor's own elements say that slices lie beside one another in one image."""
    if _text(header, _SIEMENS) == "SIEMENS MR HEADER":
        raw = getattr(header.get(_SIEMENS_TILES), "value", None)
        return isinstance(raw, bytes) and int.from_bytes(raw[:2], "little") > 1
    return _UNITED_TILES in header and _text(header, _UNITED) == "Image Private Header"


def _description(dataset: Any) -> str:
    try:
        return str(dataset.get("SeriesDescription", "") or "")
    except Exception:  # noqa: BLE001 - as above
        return ""


def _element(stream: BinaryIO, size: int, implicit: bool, little: bool) -> tuple[str, int, int | None, int]:
    """Keyword, start and length of the element with the pixels, at which the stream stands; and the file's size."""
    head = stream.read(12)
    order = "little" if little else "big"
    if len(head) < 8:
        return "", 0, 0, size
    group, element = (int.from_bytes(head[n : n + 2], order) for n in (0, 2))  # type: ignore[arg-type]
    long = not implicit and head[4:6] in (b"OB", b"OW", b"OF", b"OD", b"UN")
    length = int.from_bytes(head[8:12] if long else head[4:8], order)  # type: ignore[arg-type]
    start = stream.tell() - len(head) + (12 if long else 8)
    return _PIXELS.get(group << 16 | element, ""), start, None if length == _UNDEFINED else length, size


def _encoding(header: _Elements, element: tuple[str, int, int | None, int], syntax: str, little: bool) -> Encoding:
    keyword, start, length, size = element
    allocated = _whole(header, _ALLOCATED)
    stored = _whole(header, _STORED) or allocated
    high = _number(header, _HIGH)
    if keyword in ("FloatPixelData", "DoubleFloatPixelData"):
        allocated = stored = 32 if keyword == "FloatPixelData" else 64
    return Encoding(
        syntax=syntax,
        keyword=keyword,
        start=start,
        length=length,
        file_bytes=size,
        rows=_whole(header, _ROWS),
        columns=_whole(header, _COLUMNS),
        frames=max(1, _whole(header, _FRAMES)),
        allocated=allocated,
        stored=stored,
        high=stored - 1 if high is None else int(high),
        signed=_number(header, _SIGNED) == 1,
        inverted=_text(header, _PHOTOMETRIC) == "MONOCHROME1",
        little_endian=little,
    )


def _fault(encoding: Encoding, frames: Sequence[Frame], is_signed_or_not: bool) -> tuple[str, bool]:
    """Why the values of a file cannot be used, and whether the file is damaged."""
    if not (encoding.is_float or is_signed_or_not):  # Pixel Representation is of type 1: PS3.3 C.7.6.3
        return "does not say whether its pixels are signed", True
    if any(math.isnan((frame.slope or 0.0) + (frame.intercept or 0.0)) for frame in frames):
        return "has a rescale slope or intercept that is no number", True
    return _fault_of_pixels(encoding, len(frames))


def _fault_of_pixels(encoding: Encoding, frames: int) -> tuple[str, bool]:
    """Why the pixels of a file cannot be used, and whether the file is damaged."""
    e = encoding
    if not e.keyword:
        return "has no pixels", True
    if e.frames != frames:
        return f"has {e.frames} frames, and a header for {frames} of them", False
    if not e.is_float and not (e.allocated in (8, 16, 32) and 0 < e.stored <= e.high + 1 <= e.allocated):
        return f"has {e.stored} bits of {e.allocated} a pixel, the highest of them bit {e.high}", False
    if e.allocated == 8 and not e.little_endian:
        return "has 8 bits a pixel in big-endian words", False
    claimed = e.frames * e.frame_bytes
    held = min(e.file_bytes - e.start, e.file_bytes if e.length is None else e.length)
    if claimed > MAX_IMAGE_BYTES:
        return f"claims {claimed:,} bytes of pixels; {MAX_IMAGE_BYTES:,} at most are read", True
    if e.length is not None and e.syntax in NATIVE:
        if held < claimed:
            return f"holds {max(held, 0):,} bytes of pixels where its header says {claimed:,}", True
    elif e.length is not None or e.syntax in NATIVE:
        return "its pixels are not stored as its transfer syntax says", True
    elif held < 16 + 8 * e.frames or (claimed > _SMALL_BYTES and claimed > _MAX_COMPRESSION * held):
        return f"holds {max(held, 0):,} bytes of compressed pixels where its header says {claimed:,}", True
    return "", False


def _frames(
    instance: Instance,
    uid: str,
    encoding: Encoding,
    header: _Elements,
    groups: list[list[Any]],
    table: tuple[int, NDArray[Any]] | None,
) -> tuple[Frame, ...]:
    """The frames of a file: one, or one for each item of the functional groups (PS3.3 C.7.6.16)."""
    shared, per_frame = groups
    common = {tag: element for tag, element in header.items() if tag in _OF_FRAMES}
    for item in shared[:1]:
        common.update(_macros(item))
    every = [common | _macros(item) for item in per_frame] if per_frame else [common]
    return tuple(_frame(instance, n, uid, encoding, elements, table) for n, elements in enumerate(every))


def _macros(groups: Any) -> dict[int, Any]:
    """What the first items of the sequences of functional groups say, in one table; private ones left out."""
    found: dict[int, Any] = {}
    for tag in _elements(groups):
        if not tag >> 16 & 1:
            for item in _items(groups, tag)[:1]:
                mine = {t: element for t, element in _elements(item).items() if t in _OF_FRAMES}
                found.update((t, element) for t, element in mine.items() if _MACROS.get(t, tag) == tag)
    return found


def _elements(dataset: Any) -> dict[int, Any]:
    """The elements of a data set, their values unparsed."""
    return {int(tag): dataset.get_item(tag) for tag in dataset.keys()}  # noqa: SIM118 - iterating parses values


def _items(dataset: Any, tag: int) -> list[Any]:
    """The items of a sequence; none where it is missing or no sequence."""
    if tag not in dataset:
        return []
    element = dataset[tag]
    return list(element.value) if element.VR == "SQ" and element.value else []


def _frame(
    instance: Instance,
    number: int,
    uid: str,
    encoding: Encoding,
    elements: _Elements,
    table: tuple[int, NDArray[Any]] | None,
) -> Frame:
    attributes = {name: value for name, tag in ATTRIBUTES.items() if (value := _value(elements, tag)) is not None}
    return Frame(
        instance,
        number,
        uid,
        encoding,
        _plane(elements, encoding),
        abs(_number(elements, _THICKNESS) or 0.0),
        abs(_number(elements, _BETWEEN) or 0.0),
        _scale(elements, _SLOPE),
        _scale(elements, _INTERCEPT),
        table,
        _code(elements, _RESCALE_TYPE),
        attributes,
    )


def _scale(elements: _Elements, tag: int) -> float | None:
    """A number of rescaling; None where it is missing or empty, NaN where it is anything else."""
    numbers = _numbers(elements, tag)
    if len(numbers) == 1:
        return numbers[0]
    return math.nan if _text(elements, tag) else None


def _plane(elements: _Elements, encoding: Encoding) -> Plane | None:
    position = _numbers(elements, _POSITION)
    orientation = _numbers(elements, _ORIENTATION)
    spacing = _numbers(elements, _SPACING)
    if (len(position), len(orientation), len(spacing)) != (3, 6, 2):
        return None
    sane = max(map(abs, position)) <= 1e6 and max(map(abs, orientation)) <= 2
    if not sane or not np.cross(orientation[:3], orientation[3:]).any() or not all(1e-3 <= s <= 1e3 for s in spacing):
        return None
    return Plane(position, orientation, spacing, encoding.rows, encoding.columns)  # type: ignore[arg-type]


def _table(dataset: Any, header: _Elements) -> tuple[int, NDArray[Any]] | None:
    """The Modality LUT (PS3.3 C.11.1): first stored value that is mapped, and values."""
    items = _items(dataset, _TABLE)
    if not items:
        return None
    item = _elements(items[0])
    descriptor, data = item[_TABLE_DESCRIPTOR], item[_TABLE_DATA]
    order = "<" if descriptor.is_little_endian else ">"
    count, _, bits = (int(n) for n in np.frombuffer(descriptor.value, order + "u2", 3))
    first = int(np.frombuffer(descriptor.value, order + "i2", 3)[1])
    if _number(header, _SIGNED) != 1:
        first &= 0xFFFF
    count = count or 1 << 16
    kind = "u1" if bits <= 8 and len(data.value) < 2 * count else order + "u2"
    values = np.frombuffer(data.value, kind, count).astype(np.uint16)
    return first, values


def _value(elements: _Elements, tag: int) -> float | str | None:
    """A number where the element is one, else its text; None where it is missing or empty."""
    numbers = _numbers(elements, tag)
    if len(numbers) == 1 and _representation(elements[tag]) in _COUNTED:
        return float(f"{numbers[0]:.6g}")
    return _text(elements, tag) or None


def _whole(elements: _Elements, tag: int) -> int:
    return int(_number(elements, tag) or 0)


def _number(elements: _Elements, tag: int, default: float | None = None) -> Any:
    numbers = _numbers(elements, tag)
    return numbers[0] if len(numbers) >= 1 else default


def _numbers(elements: _Elements, tag: int) -> tuple[float, ...]:
    """The finite numbers of an element; none where it is missing, empty or anything else."""
    element = elements.get(tag)
    raw = getattr(element, "value", None)
    if element is None or not isinstance(raw, bytes) or not raw:
        return ()
    code = _BINARY.get(_representation(element))
    try:
        if code is None:
            values = [float(part) for part in raw.decode("ascii").strip(" \0").split("\\")]
        else:
            values = np.frombuffer(raw, ("<" if element.is_little_endian else ">") + code).astype(float).tolist()
    except ValueError:
        return ()
    return tuple(values) if np.isfinite(values).all() else ()


_BINARY = {"US": "u2", "SS": "i2", "UL": "u4", "SL": "i4", "FL": "f4", "FD": "f8", "US or SS": "u2"}
_COUNTED = frozenset(("DS", "IS", *_BINARY))


def _representation(element: Any) -> str:
    from pydicom.datadict import dictionary_VR

    return str(dictionary_VR(element.tag)) if element.VR in (None, "UN") else str(element.VR)


def _text(elements: _Elements, tag: int) -> str:
    raw = getattr(elements.get(tag), "value", None)
    return raw.decode("ascii", "replace").strip(" \0") if isinstance(raw, bytes) else ""


def _code(elements: _Elements, tag: int) -> str:
    """A coded text; empty where it holds anything else, which may be a name."""
    text = _text(elements, tag)
    return text if re.fullmatch(r"[A-Z0-9_]{1,16}", text) else ""
