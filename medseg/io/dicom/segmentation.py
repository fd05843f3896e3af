"""DICOM SEG: a mask as segments with names, codes and colours that lie on the series it was made from.

Written by highdicom, each frame on the slice of the series that it belongs to. Read frame by frame, of any tool that
follows PS3.3 C.8.20; highdicom turns DICOM's LPS to RAS+.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

import medseg
from medseg.errors import IncompleteSeries, InputError, MedsegError, UnreadableFile
from medseg.geometry import Geometry
from medseg.io import dicom
from medseg.io.dicom import archive, pixels, stack
from medseg.io.dicom import frames as files
from medseg.records import replacing
from medseg.terminology import PRIVATE_SCHEME, Code, Coding, Colour, Triplet
from medseg.volume import Labels, Mask

log = logging.getLogger(__name__)

Kind = Literal["BINARY", "LABELMAP"]
SOP_CLASSES = {"BINARY": "1.2.840.10008.5.1.4.1.1.66.4", "LABELMAP": "1.2.840.10008.5.1.4.1.1.66.7"}
"""Segmentation Storage and Label Map Segmentation Storage (PS3.6, annex A)."""

_INHERITED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber"),
    *("StudyID", "ReferringPhysicianName"),
)
"""What the Patient and General Study modules must have, if only empty (type 2: PS3.3 C.7.1.1, C.7.2.1)."""
_METHODS = ("DeidentificationMethod", "DeidentificationMethodCodeSequence")
_INHERITED_IF_THERE = (*("IssuerOfPatientID", "PatientIdentityRemoved", *_METHODS, "StudyDescription"),)
_REFERRED = (
    *("SOPClassUID", "Modality", "LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
)
_ALLOWED = {
    "PatientSex": "[MFO]?",
    "PatientIdentityRemoved": "YES|NO",
    "LossyImageCompression": "0[01]",
    "LossyImageCompressionRatio": r"[0-9.]{1,16}",
    "LossyImageCompressionMethod": "ISO_[0-9_]{1,12}",
}
"""Patterns of values that are terms and numbers (PS3.3 C.7.1.1, C.7.6.1.1.5); others may be text of any kind."""
_NOWHERE = (1e6, 1e6, 1e6)
_CONVERTED = "converted by medseg"
_BACKGROUND = "125040"
"""Of the scheme DCM."""
_LONG_STRING = 64
"""Characters of a value of kind LO (PS3.5, 6.2)."""
_SERIES_NUMBER = 900
"""Beyond the numbers that scanners give."""

_TOLERANCE = 0.1
"""Of a voxel, within which one lies on another: positions are rounded, and slices a little uneven (``stack.DRIFT``)."""
_SOP_CLASS_UID = 0x00080016
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_MOST_LABELS = 254  # see Labels
_MOST_VOXELS = 2**32
_MOST_BYTES = 2**32 - 2
"""Of an element whose length is stated: PS3.5, 7.1.1."""
_MOST_COMPRESSION = 10_000
"""Times; a frame of one colour is a thousandth in JPEG-LS."""
_MOST_MM = 1e7
"""Beyond any number of millimetres."""
_MOST_GAP = 4096
"""Slices that a segmentation may span beyond the frames that it has."""


Result = TypeVar("Result")


def write(
    mask: Mask,
    path: Path,
    *,
    kind: Kind = "BINARY",
    model: str = "",
    version: str = medseg.__version__,
    allow_uncoded: bool = False,
) -> None:
    """Write a mask as a DICOM SEG of the series that it was made from, atomically.

    Every label becomes a segment, numbered from 1 in the order of ``Labels.names``, with voxels or without. Patient
    and study are those of the series, by the attributes that DICOM requires; nothing else of its headers is taken but
    UIDs and geometry. BINARY is stored as it is, one frame a segment and slice, those without voxels left out;
    LABELMAP, which fewer viewers know, is one frame a slice, RLE compressed.

    Args:
        mask: with labels; ``header`` is the series, the grid its own or one that ``Mask.placed`` brings to it.
        path: of the file.
        kind: BINARY or LABELMAP.
        model: name of the model that made the mask; empty where nobody knows who made it, and the SEG says so.
        version: of the model.
        allow_uncoded: give labels without codes private ones of ``PRIVATE_SCHEME``, instead of refusing them.

    Raises:
        InputError: no labels, no DICOM series behind the mask or one without true UIDs, labels without codes, or names
            that DICOM cannot hold.
        GeometryMismatch: the mask does not lie on the grid of the series.
        UnreadableFile: a file of the series has gone or is damaged.
    """
    if kind not in SOP_CLASSES:
        raise InputError("kind of DICOM SEG", f"is {kind!r}", " or ".join(SOP_CLASSES))
    series = mask.header
    if not isinstance(series, dicom.Series):
        remedy = "name the series by --reference, or write another format"
        raise InputError(path, "has no DICOM series behind it", "a mask of a DICOM series", remedy)
    if series.replaced:
        raise InputError(path, "the images have no true UIDs to refer to", "UIDs of DICOM", "write another format")
    if (labels := mask.labels) is None:
        raise InputError(path, "the mask has no labels", "names of its integers", "read it with labels")
    segments = _segments(labels, path, allow_uncoded)
    with _quiet():
        frames, images = _frames(mask, labels, series), _images_of(series)
        if kind == "BINARY":
            _check_fits(frames, path)
        built = _built(frames, images, segments, kind, _Maker.of(model, version), series.name)
        with replacing(path) as temporary:
            built.save_as(temporary)


def read_mask(path: Path, series: dicom.Series | None = None) -> Mask:
    """Read a DICOM SEG (BINARY or LABELMAP).

    Args:
        path: of the file, or a folder or zip with exactly one.
        series: that it belongs to: where its slices are uneven, the planes between them are those of the nearest.

    Returns:
        Mask on the grid that its frames span (frames without voxels may be missing: ``Mask.placed`` gives it that of
        an image); columns, rows, slices along their normal. On the slices of an uneven series, the mask is on the grid
        that this is read on. Values are the numbers of the segments; labels have their names, codes and colours.

    Raises:
        UnreadableFile: the file is damaged.
        IncompleteSeries: its frames do not lie on one straight, even grid.
        InputError: it is no DICOM SEG, one of probabilities, one of overlapping segments, or there is none or several.
    """
    with _quiet():
        header = _guarded(lambda: _header(_dataset(path)), path)
        _check(header, path)
        labels = _labels(header, path)
        if series is not None and (slices := _slices_of(header, series)):
            shape = (header.encoding.columns, header.encoding.rows, len(series.frames))
            array = dicom.from_slices(series, _filled(header, slices, shape, labels, path))
            return Mask(array, dicom.check(series), labels, (path,))
        geometry, slices, assumed = _grid(header, path)
        array = _filled(header, slices, geometry.shape, labels, path)
    return Mask(array, geometry, labels, (path,), warnings=assumed)


def is_segmentation(path: Path) -> bool:
    """Whether a file is a DICOM SEG by its header, or a folder or zip holds one; False where nothing can be read."""
    with _quiet(), contextlib.suppress(InputError):
        return next(_instances(path), None) is not None
    return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what pydicom and highdicom say, and the text of errors that nobody expected: both quote headers."""
    with files.silent():
        try:
            yield
        except (MedsegError, MemoryError, OSError):
            raise
        except Exception as bug:  # noqa: BLE001 - its kind and its place are told
            bug.args = ()
            raise (RuntimeError(type(bug).__name__).with_traceback(bug.__traceback__) if str(bug) else bug) from None


def _bad_data() -> tuple[type[Exception], ...]:
    """What pydicom raises, and what conversions of its values raise, where a file is damaged."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return (
        *(AttributeError, LookupError, ValueError, TypeError, OverflowError, NotImplementedError, RecursionError),
        *(EOFError, OSError, struct.error, zlib.error, zipfile.BadZipFile, BytesLengthException, InvalidDicomError),
    )


def _guarded(read: Callable[[], Result], path: Path) -> Result:
    """What is read of a file; of a failure the kind alone, for its text quotes values."""
    try:
        return read()
    except _bad_data() as failure:
        found = f"has headers that cannot be used ({type(failure).__name__})"
        raise UnreadableFile(path, found, "headers as DICOM has them", "check the file with dciodvfy") from None


# Writing


@dataclass(frozen=True)
class _Segment:
    name: str
    coding: Coding
    colour: Colour


@dataclass(frozen=True)
class _Maker:
    """A model by name and version; ``model`` is empty where nobody knows what made the mask."""

    model: str
    version: str

    @classmethod
    def of(cls, model: str, version: str) -> _Maker:
        """As DICOM can hold it."""
        return cls(_text(model) or ("model without a name" if model else ""), _text(version) or "unknown")

    @property
    def description(self) -> str:
        """Of the series."""
        return _text(f"medseg, research use only: {self.model}" if self.model else f"{_CONVERTED}, research use only")

    def sign(self, description: Any) -> None:
        """Say in the description of a segment what made it.

        Of the kinds that there are (PS3.3, C.8.20.2) MANUAL and AUTOMATIC would claim something of an unknown maker.
        """
        from highdicom import AlgorithmIdentificationSequence
        from pydicom.sr.codedict import codes

        description.SegmentAlgorithmType = "AUTOMATIC" if self.model else "SEMIAUTOMATIC"
        description.SegmentAlgorithmName = self.model or f"unknown, {_CONVERTED}"
        if self.model:
            family = codes.DCM.ArtificialIntelligence
            algorithm = AlgorithmIdentificationSequence(self.model, family, self.version)
            description.SegmentationAlgorithmIdentificationSequence = algorithm


def _segments(labels: Labels, path: Path, allow_uncoded: bool) -> list[_Segment]:
    unfit = [name for name in labels.names if not name.strip() or _text(name) != name]
    if unfit:
        expected = f"at most {_LONG_STRING} characters, without backslash and line ends"
        found = f"label names that DICOM cannot hold: {', '.join(map(repr, unfit))}"
        raise InputError(path, found, expected, "give them others, in a table for --labels or in dataset.json")
    codings = {name: labels.coding(name) for name in labels.names}
    uncoded = [name for name, coding in codings.items() if coding is None]
    if uncoded and not allow_uncoded:
        raise InputError(
            path,
            f"labels without a SNOMED CT code: {', '.join(uncoded)}",
            "a code for every segment",
            "give --labels with codes (a model package, dataset.json or 3D Slicer's .csv; the other tables hold none), "
            "or --allow-uncoded for private ones",
        )
    return [_Segment(name, codings[name] or _private(name), labels.colour(name)) for name in labels.names]


def _private(name: str) -> Coding:
    """A coding of its own for a label, by its name; its category too, for what it is is not known."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:16].upper()  # a code has 16 characters at most: PS3.5, 6.2
    unknown = Code(value="UNCODED", meaning="Uncoded", scheme=PRIVATE_SCHEME)
    return Coding(type=Code(value=digest, meaning=name, scheme=PRIVATE_SCHEME), category=unknown)


def _text(value: str) -> str:
    """What a value of kind LO can hold of a text."""
    return "".join(c for c in value if c.isprintable() and c != "\\").strip()[:_LONG_STRING]


@dataclass(frozen=True)
class _Images:
    """The images behind a mask, with nothing in them but what a SEG may know.

    Attributes:
        sources: one a slice, in their order; or the only multi-frame one.
        further: more multi-frame ones, which hold slices too.
        positions: of the slices, where frames of multi-frame images have an order of their own; else None.
    """

    sources: list[Any]
    further: list[Any]
    positions: list[Any] | None


def _images_of(series: dicom.Series) -> _Images:
    from highdicom import PlanePositionSequence

    dicom.check(series)
    if not series.frame_uid:
        log.warning("%s: no Frame of Reference UID in the images; the DICOM SEG has one of its own", series.name)
    with archive.Reader() as reader:
        header = files.headers_of(reader, series.frames[0].instance)
    if "PerFrameFunctionalGroupsSequence" in header:
        grouped = {instance: [f for f in series.frames if f.instance == instance] for instance in series.instances}
        first, *further = (_multi_frame(header, series, frames) for frames in grouped.values())
        positions = [PlanePositionSequence("PATIENT", frame.plane.position) for frame in series.frames if frame.plane]
        images = _Images([first], further, positions)
    else:
        images = _Images([_single_frame(header, series, frame) for frame in series.frames], [], None)
    _inherit(header, images.sources[0], series.name)
    return images


def _single_frame(header: Any, series: dicom.Series, frame: files.Frame) -> Any:
    source = _reference(header, series, frame)
    source.update(_measures(series, frame))
    source.update(_orientation(series))
    source.update(_position(frame))
    return source


def _multi_frame(header: Any, series: dicom.Series, frames: list[files.Frame]) -> Any:
    from pydicom.dataset import Dataset

    source, shared = _reference(header, series, frames[0]), Dataset()
    shared.PixelMeasuresSequence = [_measures(series, frames[0])]
    shared.PlaneOrientationSequence = [_orientation(series)]
    mine = {frame.number: frame for frame in frames}
    items = []
    for number in range(frames[0].encoding.frames):
        item = Dataset()
        item.PlanePositionSequence = [_position(mine.get(number))]
        items.append(item)
    source.NumberOfFrames = len(items)
    source.SharedFunctionalGroupsSequence, source.PerFrameFunctionalGroupsSequence = [shared], items
    return source


def _reference(header: Any, series: dicom.Series, frame: files.Frame) -> Any:
    from pydicom.dataset import Dataset
    from pydicom.uid import generate_uid

    reference = Dataset()
    for keyword in _REFERRED:
        if (element := _element(header, keyword)) is not None:
            reference[keyword] = element
    if "SOPClassUID" not in reference:
        reference.SOPClassUID = header.file_meta.get("MediaStorageSOPClassUID", "")
    reference.SOPInstanceUID, reference.SeriesInstanceUID = frame.uid, series.uid
    reference.StudyInstanceUID = series.study_uid
    reference.FrameOfReferenceUID = series.frame_uid or generate_uid(entropy_srcs=[series.uid])
    reference.Rows, reference.Columns = frame.encoding.rows, frame.encoding.columns
    return reference


def _measures(series: dicom.Series, frame: files.Frame) -> Any:
    """Pixel measures: the distance of slices is that of their positions, whatever the header says of it."""
    from pydicom.dataset import Dataset

    measures = Dataset()
    measures.PixelSpacing = _ds(frame.plane.spacing if frame.plane else ())
    grid = series.geometry
    distance = 1000.0 * grid.voxel_volume_ml / (grid.spacing[0] * grid.spacing[1]) if grid else 0.0  # along the normal
    measures.SliceThickness = _ds([frame.thickness or distance])[0]
    if not series.positions_mm:
        measures.SpacingBetweenSlices = _ds([distance])[0]
    return measures


def _orientation(series: dicom.Series) -> Any:
    """The orientation of the first slice, of which the others' is but rounded otherwise."""
    from pydicom.dataset import Dataset

    orientation, plane = Dataset(), series.frames[0].plane
    orientation.ImageOrientationPatient = _ds(plane.orientation if plane else ())
    return orientation


def _position(frame: files.Frame | None) -> Any:
    """The position of a slice; of a frame of another volume one where no slice is."""
    from pydicom.dataset import Dataset

    position = Dataset()
    position.ImagePositionPatient = _ds(frame.plane.position if frame and frame.plane else _NOWHERE)
    return position


def _ds(values: Sequence[float]) -> list[Any]:
    from pydicom.valuerep import DS

    return [DS(float(value), auto_format=True) for value in values]


def _inherit(header: Any, source: Any, where: str) -> None:
    """Give ``source`` patient and study; what must be there and is not, or is not valid, is left empty."""
    empty = []
    for keyword in (*_INHERITED, *_INHERITED_IF_THERE):
        if (element := _element(header, keyword)) is not None:
            source[keyword] = element
        elif keyword in _INHERITED:
            setattr(source, keyword, "")
            empty.append(keyword)
    if source.get("PatientIdentityRemoved") == "YES" and not any(method in source for method in _METHODS):
        del source.PatientIdentityRemoved  # it takes a method: PS3.3, C.7.1.1
    if empty:
        log.warning("%s: no usable %s in the images; left empty in the DICOM SEG", where, ", ".join(empty))


def _element(header: Any, keyword: str) -> Any:
    """An element, its text decoded; None where it is missing or not valid."""
    from pydicom.dataset import Dataset

    alone = Dataset()
    try:
        for name in ("SpecificCharacterSet", keyword):
            if name in header:
                alone[name] = header[name]
        alone.decode()
        if keyword == "ReferringPhysicianName" and alone.get(keyword) and alone[keyword].VM > 1:
            alone.ReferringPhysicianName = alone.ReferringPhysicianName[0]  # it has one alone: PS3.3, C.7.2.1
        return alone[keyword] if keyword in alone and _is_valid(keyword, alone[keyword].value) else None
    except _bad_data():
        return None


def _is_valid(keyword: str, value: Any) -> bool:
    from pydicom.multival import MultiValue
    from pydicom.valuerep import DA, TM

    if keyword in _ALLOWED:
        values = value if isinstance(value, MultiValue) else [value]
        return all(re.fullmatch(_ALLOWED[keyword], str(one)) for one in values)
    if keyword == "StudyDescription":
        return isinstance(value, str) and len(value) <= _LONG_STRING
    kind = DA if keyword.endswith("Date") else TM if keyword.endswith("Time") else str
    try:
        kind(value)
    except (ValueError, TypeError):
        return False
    return True


def _frames(mask: Mask, labels: Labels, series: dicom.Series) -> NDArray[np.uint8]:
    """The mask as slices, rows, columns of segment numbers, on the slices of the series."""
    if series.geometry is not None:
        mask = mask.placed(series.geometry)
    indices = labels.to_indices(dicom.to_slices(series, mask.array))
    if indices.max(initial=0) > len(labels.names):
        raise InputError("mask", f"voxels are marked to be ignored ({labels.ignore})", "labels and background")
    return np.ascontiguousarray(indices.transpose(2, 1, 0))


def _check_fits(frames: NDArray[np.uint8], path: Path) -> None:
    """Refuse more pixels than an element of a stated length can hold: a frame a slice and segment on it, a bit each."""
    count = sum(int(np.count_nonzero(np.bincount(plane.ravel())[1:])) for plane in frames)
    if (size := (count * frames[0].size + 7) // 8) > _MOST_BYTES:
        found = f"{count:,} frames of {size:,} bytes together"
        raise InputError(path, found, f"{_MOST_BYTES:,} bytes at the most", "write a labelmap: --seg-type labelmap")


def _built(
    frames: NDArray[np.uint8], images: _Images, segments: list[_Segment], kind: Kind, maker: _Maker, where: str
) -> Any:
    import highdicom
    from highdicom.coding_schemes import CodingSchemeIdentificationItem
    from pydicom.uid import ExplicitVRLittleEndian, RLELossless

    sources, positions = images.sources, images.positions
    if not frames.any():  # nothing to show, but a SEG has frames: one slice says it for all
        frames, positions, sources = frames[:1], positions and positions[:1], sources[:1]
    private = any(segment.coding.type.scheme == PRIVATE_SCHEME for segment in segments)
    schemes = [CodingSchemeIdentificationItem(PRIVATE_SCHEME, name="medseg: labels without a code")]
    make = functools.partial(
        highdicom.seg.Segmentation,
        source_images=sources,
        further_source_images=images.further,
        pixel_array=frames,
        plane_positions=positions,
        segmentation_type=kind,
        segment_descriptions=[_description(n, segment) for n, segment in enumerate(segments, start=1)],
        series_instance_uid=highdicom.UID(),
        series_number=_SERIES_NUMBER,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="medseg",
        manufacturer_model_name=maker.model or "medseg",
        software_versions=medseg.__version__,
        device_serial_number="0",
        content_label="MEDSEG",
        content_description="Research use only",
        series_description=maker.description,
        coding_schemes=schemes if private else None,
        transfer_syntax_uid=ExplicitVRLittleEndian if kind == "BINARY" else RLELossless,
        specific_character_set="ISO_IR 192",
    )
    try:
        built = make()
    except (LookupError, ValueError) as failure:  # as KeyError for images of a SOP class that highdicom knows not
        found = f"highdicom makes no DICOM SEG of its headers ({type(failure).__name__})"
        raise InputError(where, found, "images of a standard SOP class", "write another format") from None
    for segment in built.SegmentSequence:  # the background too
        maker.sign(segment)
    return built


def _description(number: int, segment: _Segment) -> Any:
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription

    coding = segment.coding
    description = SegmentDescription(
        segment_number=number,
        segment_label=segment.name,
        segmented_property_category=_concept(coding.category),
        segmented_property_type=_concept(coding.type),
        algorithm_type="MANUAL",  # until it is signed
        anatomic_regions=[_concept(coding.region)] if coding.region else None,
        display_color=CIELabColor.from_rgb(*segment.colour),
    )
    if coding.modifier:
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [_concept(coding.modifier)]
    if coding.region and coding.region_modifier:
        description.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [_concept(coding.region_modifier)]
    return description


def _concept(code: Code) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(code.value, code.scheme, _text(code.meaning))


# Reading


@dataclass(frozen=True)
class _Frame:
    """Where a frame lies, and which segment it is of: 0 where its values are the numbers of segments."""

    segment: int
    plane: stack.Plane


@dataclass(frozen=True)
class _Described:
    """A segment by its number: name (empty where it has none), what it stands for, and colour."""

    number: int
    name: str
    kind: Code | None
    coding: Coding | None
    colour: Colour | None


@dataclass(frozen=True)
class _Header:
    """What a SEG says, and its pixels as they are stored.

    Attributes:
        kind: BINARY, LABELMAP, FRACTIONAL or anything else.
        encoding: of the pixels.
        content: of the element with the pixels.
        frames: in their order.
        between, thickness: Spacing Between Slices and Slice Thickness, mm; 0 where it does not say.
        background: number that stands for background in a LABELMAP, where it says: PS3.3 2024d, C.8.20.2.3.
        segments: as it describes them.
    """

    kind: str
    encoding: files.Encoding
    content: bytes
    frames: list[_Frame]
    between: float
    thickness: float
    background: int | None
    segments: list[_Described]


def _instances(path: Path) -> Iterator[archive.Instance]:
    """The segmentations at a path, by their SOP class."""
    with archive.Reader() as reader:
        for instance in archive.instances(path, Counter()):
            if _sop_class(reader, instance) in SOP_CLASSES.values():
                yield instance


def _sop_class(reader: archive.Reader, instance: archive.Instance) -> str:
    """UID of the SOP class; empty where it cannot be read."""
    from pydicom.filereader import read_partial

    bare = files.is_dicom(instance)  # also without preamble
    with contextlib.suppress(MedsegError, *_bad_data()), files.data_of(reader, instance) as (stream, _):
        return str(read_partial(stream, lambda tag, vr, length: tag > _SOP_CLASS_UID, force=bare).get("SOPClassUID"))
    return ""


def _dataset(path: Path) -> Any:
    import pydicom

    found = list(itertools.islice(_instances(path), 2))
    if len(found) != 1:
        number = "several DICOM SEG files" if found else "no DICOM SEG"
        raise InputError(path, f"there is {number}", "exactly one", "name the file")
    with archive.Reader() as reader, files.data_of(reader, found[0], whole=True) as (stream, _):
        dataset = pydicom.dcmread(stream, force=True)  # its SOP class is known
    if not dataset:  # what pydicom makes of an element of unknown length without an end
        raise UnreadableFile(path, "ends within its pixels", "a whole file", "copy it again from its source")
    return dataset


def _header(dataset: Any) -> _Header:
    """Everything that is needed of a data set: what pydicom raises where it is damaged, it raises here."""
    kind = str(dataset.get("SegmentationType"))
    content = bytes(dataset.PixelData)
    encoding = _encoding(dataset, len(content))
    shared, items = dataset.SharedFunctionalGroupsSequence[0], dataset.PerFrameFunctionalGroupsSequence
    measures = _group("PixelMeasuresSequence", items[0], shared)[0]
    spacing = _floats(measures.PixelSpacing)
    frames = []
    for item in items:
        segment = 0
        if kind == "BINARY":
            segment = int(_group("SegmentIdentificationSequence", item, shared)[0].ReferencedSegmentNumber)
        place = _floats(_group("PlanePositionSequence", item, shared)[0].ImagePositionPatient)
        turn = _floats(_group("PlaneOrientationSequence", item, shared)[0].ImageOrientationPatient)
        frames.append(_Frame(segment, _plane(place, turn, spacing, encoding)))
    padding = dataset.get("PixelPaddingValue") if kind == "LABELMAP" else None
    return _Header(
        kind=kind,
        encoding=encoding,
        content=content,
        frames=frames,
        between=_distance(measures.get("SpacingBetweenSlices")),
        thickness=_distance(measures.get("SliceThickness")),
        background=None if padding is None else int(padding),
        segments=[_described(segment) for segment in dataset.SegmentSequence],
    )


def _encoding(dataset: Any, size: int) -> files.Encoding:
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    if not (0 < stored <= allocated and allocated in (1, 8, 16)) or int(dataset.SamplesPerPixel) != 1:
        raise ValueError("bits")
    return files.Encoding(
        syntax=str(dataset.file_meta.get("TransferSyntaxUID") or files.native(*dataset.original_encoding)),
        keyword="PixelData",
        start=0,
        length=None,
        file_bytes=size,
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        frames=int(dataset.get("NumberOfFrames", 1)),
        allocated=allocated,
        stored=stored,
        high=stored - 1,
        signed=False,
        inverted=False,
        little_endian=True,
    )


def _group(name: str, frame: Any, shared: Any) -> Any:
    """A functional group macro, of the frame or shared by all (PS3.3 C.7.6.16)."""
    return frame[name].value if name in frame else shared[name].value


def _floats(values: Sequence[Any]) -> list[float]:
    return [float(v) for v in values]


def _plane(place: list[float], turn: list[float], spacing: list[float], encoding: files.Encoding) -> stack.Plane:
    if (len(place), len(turn), len(spacing)) != (3, 6, 2) or not np.cross(turn[:3], turn[3:]).any():
        raise ValueError("plane")
    if not (max(map(abs, (*place, *turn))) < _MOST_MM and all(1 / _MOST_MM < one < _MOST_MM for one in spacing)):
        raise ValueError("plane")
    return stack.Plane(tuple(place), tuple(turn), tuple(spacing), encoding.rows, encoding.columns)  # type: ignore[arg-type]


def _distance(value: Any) -> float:
    """A distance, mm; 0 where there is none."""
    distance = abs(float(value or 0))
    if not distance < _MOST_MM:
        raise ValueError("distance")
    return distance


def _described(segment: Any) -> _Described:
    from highdicom.color import CIELabColor

    parts = None
    if colour := segment.get("RecommendedDisplayCIELabValue"):
        parts = CIELabColor.from_dicom_value([int(v) for v in colour]).to_rgb(clip=True)
    return _Described(
        number=int(segment.SegmentNumber),
        name=_text(str(segment.get("SegmentLabel") or "")),
        kind=Code.of(_triplet(_item(segment, "SegmentedPropertyType"))),
        coding=_coding(segment),
        colour=None if parts is None else (int(parts[0]), int(parts[1]), int(parts[2])),
    )


def _coding(segment: Any) -> Coding | None:
    kind, region = _item(segment, "SegmentedPropertyType"), _item(segment, "AnatomicRegion")
    category, modifier = _item(segment, "SegmentedPropertyCategory"), _item(kind, "SegmentedPropertyTypeModifier")
    items = (category, kind, modifier, region, _item(region, "AnatomicRegionModifier"))
    return Coding.from_triplets([_triplet(item) for item in items])


def _item(holder: Any, name: str) -> Any:
    """The first item of a sequence of codes; empty where it is not there."""
    found = holder.get(f"{name}CodeSequence") or holder.get(f"{name}Sequence")
    return found[0] if found else {}


def _triplet(item: Any) -> Triplet:
    value = item.get("CodeValue") or item.get("LongCodeValue")
    scheme, meaning = item.get("CodingSchemeDesignator"), item.get("CodeMeaning")
    return str(scheme or ""), str(value or ""), str(meaning or "")


def _check(header: _Header, path: Path) -> None:
    """Refuse what is not read, and what claims more pixels than it can hold."""
    encoding, content, described = header.encoding, header.content, len(header.frames)
    if header.kind == "FRACTIONAL":
        remedy = "make a binary one of it, by a threshold of your choice"
        raise InputError(path, "holds fractions, not labels", " or ".join(SOP_CLASSES), remedy)
    if header.kind not in SOP_CLASSES:
        raise UnreadableFile(path, "is a DICOM SEG of no known type", " or ".join(SOP_CLASSES))
    if encoding.syntax == _BIG_ENDIAN:
        raise InputError(path, "is big-endian, a retired transfer syntax", "little-endian", "convert it by dcmconv +te")
    rows, columns, count = encoding.rows, encoding.columns, encoding.frames
    needed = (rows * columns * count * encoding.allocated + 7) // 8
    most = pixels.MOST_RUN if encoding.syntax == pixels.RLE else _MOST_COMPRESSION
    expansion = 1 if encoding.syntax in files.NATIVE else most
    if min(rows, columns, count) < 1 or described != count or needed > len(content) * expansion:
        found = f"{count} frames of {columns}x{rows}, {described} described, in {len(content):,} bytes"
        raise UnreadableFile(path, found, "as many frames as its header claims", "copy it again from its source")
    if len({(frame.segment, *np.round(frame.plane.position, 3)) for frame in header.frames}) != count:
        raise UnreadableFile(path, "two frames of one segment at one place", "one frame a segment and slice")


def _grid(header: _Header, path: Path) -> tuple[Geometry, list[int], tuple[str, ...]]:
    """The grid that the frames span, the slice of each, and what had to be assumed."""
    from highdicom.spatial import convert_affine_to_convention, create_affine_matrix_from_attributes

    plane = header.frames[0].plane
    places = np.array([frame.plane.position for frame in header.frames])
    turns = np.array([frame.plane.orientation for frame in header.frames])
    turned = np.abs(turns - turns[0]).max() > stack.PARALLEL
    slices = [] if turned else _stacked(places, plane, header.between)
    if not slices:
        found = "its frames do not lie on one line at even distances"
        raise IncompleteSeries(path, found, "", "it belongs to an uneven series: resample both elsewhere")
    last, first = max(slices), places[slices.index(0)]
    shape = (plane.columns, plane.rows, last + 1)
    _check_size(shape, len(set(slices)), path)
    distance = header.between or header.thickness or 1.0
    affine = create_affine_matrix_from_attributes(first, plane.orientation, plane.spacing, distance)
    if last:
        affine[:3, 2] = (places[slices.index(last)] - first) / last
    geometry = Geometry(shape, convert_affine_to_convention(affine, "LPS", "RAS"))
    assumed = []
    if not header.between:
        text = f"the distance of slices is not stated: {geometry.spacing[2]:.4g} mm is assumed"
        missing = last + 1 - len(set(slices))
        more = f"; {missing} of {last + 1} planes have no slice in this DICOM SEG and are taken as background"
        assumed.append(text + more if missing else text)
    if geometry.is_sheared:
        assumed.append("its slices are tilted: read as they lie, on a sheared grid")
    return geometry, slices, tuple(assumed)


def _slices_of(header: _Header, series: dicom.Series) -> list[int]:
    """The slice of an uneven series that each frame lies on; none where it is even, or they lie elsewhere."""
    if not series.positions_mm:
        return []
    planes = [frame.plane for frame in series.frames if frame.plane]
    places = np.array([plane.position for plane in planes])
    found = []
    for frame in header.frames:
        nearest = int(np.linalg.norm(places - frame.plane.position, axis=1).argmin())
        if stack.differing([planes[nearest], frame.plane]) or stack.places([planes[nearest], frame.plane]).any():
            return []
        found.append(nearest)
    return found


def _stacked(places: NDArray[np.float64], plane: stack.Plane, stated: float) -> list[int]:
    """The slice of each place, along the normal; none where they do not lie on a line at even distances.

    At the distance stated, for frames may have been left out; or without gaps; or with the smallest as the distance.
    """
    from highdicom.spatial import get_volume_positions

    normal = plane.normal
    along = ((places - places[0]) @ normal)[:, None] * normal  # of a tilted stack what it is along the normal
    for gaps, hint in ((True, stated or None), (False, None), (True, None)):
        _, slices = get_volume_positions(
            np.round(along, 3).tolist(),  # what is left of it tells no slices apart
            plane.orientation,
            rtol=stack.DRIFT,
            allow_missing_positions=gaps,
            allow_duplicate_positions=True,
            spacing_hint=hint,
            index_convention="RD",
        )
        if slices is not None:
            return [int(n) for n in slices] if _on_line(places, np.array(slices), normal) else []
    return []


def _on_line(places: NDArray[np.float64], slices: NDArray[np.int_], normal: NDArray[np.float64]) -> bool:
    """Whether the slices lie where the first and the last of them say."""
    if not (last := int(slices.max())):
        return bool(np.abs(places - places[0]).max() <= stack.SAME_PLACE_MM)
    first = places[int(slices.argmin())]
    step = (places[int(slices.argmax())] - first) / last
    length = float(np.linalg.norm(step))
    aside = np.linalg.norm(places - first - slices[:, None] * step, axis=1).max()
    return bool(aside <= _TOLERANCE * length and step @ normal >= np.cos(np.radians(stack.MAX_TILT)) * length)


def _check_size(shape: tuple[int, int, int], count: int, path: Path) -> None:
    columns, rows, slices = shape
    if slices > count + _MOST_GAP or columns * rows * slices > _MOST_VOXELS:
        found = f"its {count} slices span {columns}x{rows}x{slices} voxels"
        raise UnreadableFile(path, found, f"at most {_MOST_GAP:,} slices without voxels and {_MOST_VOXELS:,} voxels")


def _filled(header: _Header, slices: list[int], shape: tuple[int, ...], labels: Labels, path: Path) -> NDArray[Any]:
    """The array (I, J, K), one frame after the other; in memory the slices lie one after the other."""
    described, background = set(labels.values.values()), header.background or 0
    array = np.zeros(shape[::-1], dtype=np.min_scalar_type(max(described)))
    for frame, k, plane in zip(header.frames, slices, _planes(header, path), strict=True):
        marked = plane != background
        if array[k][marked].any():
            raise InputError(path, "its segments overlap", "each voxel in one segment", "export one segment at a time")
        values = plane[marked] if header.kind == "LABELMAP" else np.full(np.count_nonzero(marked), frame.segment)
        if unknown := set(np.unique(values).tolist()) - described:
            found = f"voxels of segments {sorted(unknown)[:10]}, which it does not describe"
            raise UnreadableFile(path, found, "segments that it describes")
        array[k][marked] = values
    return array.transpose(2, 1, 0)


def _planes(header: _Header, path: Path) -> Iterator[NDArray[Any]]:
    """The frames, each (rows, columns)."""
    encoding = header.encoding
    if encoding.allocated > 1 or encoding.syntax not in files.NATIVE:
        numbers = range(encoding.frames)
        for _, plane in pixels.planes(BytesIO(header.content), archive.Instance(path), encoding, numbers):
            yield plane
        return
    packed = np.frombuffer(header.content, dtype=np.uint8)  # a frame may begin within a byte: PS3.5, 8.1.1
    size = encoding.rows * encoding.columns
    for start in range(0, size * encoding.frames, size):
        first, stop = start // 8, -(-(start + size) // 8)
        bits = np.unpackbits(packed[first:stop], bitorder="little")[start - 8 * first :]
        yield bits[:size].reshape(encoding.rows, encoding.columns)


def _labels(header: _Header, path: Path) -> Labels:
    """Names, codes and colours of the segments but the background."""
    named: dict[str, _Described] = {}
    for segment in header.segments:
        is_background = segment.number == 0 and segment.kind is not None and segment.kind.value == _BACKGROUND
        if segment.number == header.background or is_background:
            continue
        if segment.number == 0:
            raise InputError(path, "segment 0 is no background", "labels other than 0", "give it another number")
        named[_unused(segment.name or f"segment {segment.number}", named)] = segment
    values = {name: segment.number for name, segment in named.items()}
    if not 0 < len(values) == len(set(values.values())) <= _MOST_LABELS:
        found = f"{len(values)} segments with {len(set(values.values()))} numbers"
        raise InputError(path, found, f"1 to {_MOST_LABELS} segments, each with a number of its own")
    codings = {name: segment.coding for name, segment in named.items() if segment.coding}
    colours = {name: segment.colour for name, segment in named.items() if segment.colour}
    return Labels(values=values, codings=codings, colours=colours)


def _unused(name: str, taken: Container[str]) -> str:
    numbers = (f"{name} {n}" for n in itertools.count(2))
    return name if name not in taken else next(other for other in numbers if other not in taken)
