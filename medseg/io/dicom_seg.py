"""DICOM SEG: a mask as segments with names, codes and colours that lie on the series it was made from.

Written and placed by highdicom; read frame by frame, of any tool that follows PS3.3 C.8.20. DICOM's world is LPS: what
turns it to RAS+ and back is highdicom too.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

import medseg
from medseg.errors import GeometryMismatch, IncompleteSeries, InputError, MedsegError, UnreadableFile
from medseg.geometry import Geometry
from medseg.io import archive, dicom
from medseg.records import replacing
from medseg.terminology import Code, Coding, Colour, coding_of, colour_of
from medseg.volume import Labels, Mask

log = logging.getLogger(__name__)

Kind = Literal["BINARY", "LABELMAP"]
SOP_CLASSES = {"BINARY": "1.2.840.10008.5.1.4.1.1.66.4", "LABELMAP": "1.2.840.10008.5.1.4.1.1.66.7"}
"""Segmentation Storage and Label Map Segmentation Storage (PS3.6, annex A)."""

PRIVATE_SCHEME = "99MEDSEG"
"""Designator of what has no code of any standard; 99 begins private ones (PS3.3, 8.2)."""

_INHERITED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber"),
    *("StudyID", "ReferringPhysicianName"),
)
"""What the Patient and General Study modules must have, if only empty (type 2: PS3.3 C.7.1.1, C.7.2.1)."""
_INHERITED_IF_THERE = (
    *("IssuerOfPatientID", "PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence"),
    "StudyDescription",
)
_REFERRED = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality"),
    *("Rows", "Columns", "LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
)
_LONG_STRING = 64
"""Characters of a value of kind LO (PS3.5, 6.2)."""
_SERIES_NUMBER = 900
"""Beyond the numbers that scanners give."""

_TOLERANCE = 1e-2
"""Of a voxel, within which grids lie on each other; as ``Geometry.close_to``."""
_SOP_CLASS_UID = 0x00080016
_MOST_VOXELS = 2**32
_MOST_GAP = 4096
"""Slices that a segmentation may span beyond the frames that it has."""

Result = TypeVar("Result")


def write(
    mask: Mask,
    path: Path,
    *,
    kind: Kind = "BINARY",
    model: str = "medseg",
    version: str = medseg.__version__,
    allow_uncoded: bool = False,
    dataset: str = "",
) -> None:
    """Write a mask as a DICOM SEG of the series that it was made from, atomically.

    Every label becomes a segment, numbered from 1 in the order of ``Labels.names``, with voxels or without. Patient
    and study are those of the series, by the attributes that DICOM requires; nothing else of its headers is taken but
    UIDs and geometry. BINARY is stored as it is, one frame a segment and slice, those without voxels left out;
    LABELMAP, which fewer viewers know, is one frame a slice, RLE compressed.

    Args:
        mask: with labels; ``header`` is the series, the grid its own or one that ``matched`` brings to it.
        path: of the file.
        kind: BINARY or LABELMAP.
        model: name of what made the mask.
        version: its version.
        allow_uncoded: give labels without codes private ones of ``PRIVATE_SCHEME``, instead of refusing them.
        dataset: name of the dataset or model that labels may need to be understood: see ``terminology.coding_of``.

    Raises:
        InputError: no labels, no DICOM series behind the mask, labels without codes, or names that DICOM cannot hold.
        GeometryMismatch: the mask does not lie on the grid of the series.
        UnreadableFile: a file of the series has gone or is damaged.
    """
    if kind not in SOP_CLASSES:
        raise InputError("kind of DICOM SEG", f"is {kind!r}", " or ".join(SOP_CLASSES))
    series = mask.header
    if not isinstance(series, dicom.Series):
        remedy = "name the series by --reference, or write another format"
        raise InputError(path, "has no DICOM series behind it", "a mask of a DICOM series", remedy)
    if (labels := mask.labels) is None:
        raise InputError(path, "the mask has no labels", "names of its integers", "read it with labels")
    segments = _segments(labels, path, dataset, allow_uncoded)
    with _quiet():
        image = _guarded(lambda: _Image.of(series), series.name)
        frames = _frames(mask, labels, image, series)
        built = _guarded(lambda: _built(frames, image, segments, kind, _Maker(model, version)), series.name)
        with replacing(path) as temporary:
            built.save_as(temporary)


def read_mask(path: Path) -> Mask:
    """Read a DICOM SEG (BINARY or LABELMAP).

    Args:
        path: of the file, or a folder or zip with exactly one.

    Returns:
        Mask on the grid that its frames span (frames without voxels may be missing: ``matched`` gives it that of an
        image); columns, rows, slices along their normal. Values are the numbers of the segments; labels have their
        names, codes and colours.

    Raises:
        UnreadableFile: the file is damaged.
        IncompleteSeries: its frames do not lie on one straight, even grid.
        InputError: it is no DICOM SEG, one of probabilities, one of overlapping segments, or there is none or several.
    """
    with _quiet():
        return _guarded(lambda: _read(path), path, UnreadableFile)


def matched(mask: Mask, geometry: Geometry) -> Mask:
    """The mask on another grid of the same lattice: turned, flipped, cropped and padded, never resampled.

    Raises:
        GeometryMismatch: the voxels of the two grids do not lie on each other, or labelled ones lie outside.
    """
    if mask.geometry.close_to(geometry):
        return replace(mask, geometry=geometry)
    with _quiet():
        array = _brought(mask, geometry)
    lost = int(np.count_nonzero(mask.array)) - int(np.count_nonzero(array))
    if lost:
        found = f"{lost:,} labelled voxels of the mask lie outside of the image"
        raise GeometryMismatch("mask", found, "a mask within the image", "is it the mask of this image?")
    return replace(mask, array=array, geometry=geometry)


def is_segmentation(path: Path) -> bool:
    """Whether a file is a DICOM SEG by its header, or a folder or zip holds one."""
    with _quiet():
        return next(_instances(path), None) is not None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what pydicom and highdicom have to say away: it quotes the values of patients."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _guarded(work: Callable[[], Result], where: object, error: type[MedsegError] = InputError) -> Result:
    """What ``work`` gives; whatever a library raises is told by its kind alone, for its text quotes values."""
    try:
        return work()
    except (MedsegError, OSError, MemoryError):
        raise
    except Exception as failure:  # noqa: BLE001 - damaged headers make the libraries raise nearly anything
        found = f"has headers that cannot be used ({type(failure).__name__})"
        raise error(where, found, "headers as DICOM has them", "check the file with dciodvfy") from None


# Writing


@dataclass(frozen=True)
class _Segment:
    name: str
    coding: Coding
    colour: Colour


@dataclass(frozen=True)
class _Maker:
    model: str
    version: str


def _segments(labels: Labels, path: Path, dataset: str, allow_uncoded: bool) -> list[_Segment]:
    unfit = [name for name in labels.names if not name.strip() or _text(name) != name]
    if unfit:
        expected = f"at most {_LONG_STRING} characters, without backslash and line ends"
        raise InputError(path, f"label names that DICOM cannot hold: {', '.join(map(repr, unfit))}", expected)
    codings = {name: labels.codings.get(name) or coding_of(name, dataset) for name in labels.names}
    uncoded = [name for name, coding in codings.items() if coding is None]
    if uncoded and not allow_uncoded:
        raise InputError(
            path,
            f"labels without a SNOMED CT code: {', '.join(uncoded)}",
            "a code for every segment",
            "give codes in dataset.json or a label table, or allow private ones with --allow-uncoded",
        )
    return [
        _Segment(name, codings[name] or _private(name), labels.colours.get(name) or colour_of(place))
        for place, name in enumerate(labels.names)
    ]


def _private(name: str) -> Coding:
    """A coding of its own for a label, by its name; its category too, for what it is is not known."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:16].upper()  # a code has 16 characters at most: PS3.5, 6.2
    unknown = Code(value="UNCODED", meaning="Uncoded", scheme=PRIVATE_SCHEME)
    return Coding(type=Code(value=digest, meaning=name, scheme=PRIVATE_SCHEME), category=unknown)


def _text(value: str) -> str:
    """What a value of kind LO can hold of a text."""
    return "".join(c for c in value if c.isprintable() and c != "\\").strip()[:_LONG_STRING]


@dataclass(frozen=True)
class _Image:
    """The images behind a mask.

    Attributes:
        sources: their headers with nothing but what a SEG may know, in the order of the slices; one if multi-frame.
        positions: of the slices, for a multi-frame image, whose frames have an order of their own; else None.
        shape: columns, rows, slices.
    """

    sources: list[Any]
    positions: list[Any] | None
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, series: dicom.Series) -> _Image:
        headers = list(dicom.headers(series))
        if not headers[0].get("FrameOfReferenceUID"):
            found = "has no Frame of Reference UID, which a DICOM SEG needs to lie anywhere"
            raise InputError(series.name, found, "", "write another format")
        many = "PerFrameFunctionalGroupsSequence" in headers[0]
        positions, sources = _multi_frame(headers[0], series) if many else (None, _single_frames(headers, series))
        count = len(positions) if positions else len(sources)
        _inherit(headers[0], sources[0], series.name)
        return cls(sources, positions, (int(headers[0].Columns), int(headers[0].Rows), count))


def _single_frames(headers: Sequence[Any], series: dicom.Series) -> list[Any]:
    first, sources = headers[0], []
    for header in headers:
        source = _reference(header)
        source.ImagePositionPatient = header.ImagePositionPatient
        source.ImageOrientationPatient = first.ImageOrientationPatient  # equal but for rounding
        source.update(_measures(first, series))
        sources.append(source)
    return sources


def _multi_frame(header: Any, series: dicom.Series) -> tuple[list[Any], list[Any]]:
    from highdicom import PlanePositionSequence
    from pydicom.dataset import Dataset

    shared = header.get("SharedFunctionalGroupsSequence", [Dataset()])[0]
    frames = header.PerFrameFunctionalGroupsSequence
    groups = Dataset()
    groups.PlaneOrientationSequence = _group("PlaneOrientationSequence", frames[0], shared)
    measures = _group("PixelMeasuresSequence", frames[0], shared)[0]
    groups.PixelMeasuresSequence = [_measures(measures, series)]
    source = _reference(header)
    source.NumberOfFrames, source.SharedFunctionalGroupsSequence = len(frames), [groups]
    source.PerFrameFunctionalGroupsSequence, places = [], []
    for frame in frames:
        item = Dataset()
        item.PlanePositionSequence = _group("PlanePositionSequence", frame, shared)
        source.PerFrameFunctionalGroupsSequence.append(item)
        places.append([float(v) for v in item.PlanePositionSequence[0].ImagePositionPatient])
    return [PlanePositionSequence("PATIENT", place) for place in _by_slices(places, series)], [source]


def _reference(header: Any) -> Any:
    """A data set of what a SEG may know of an image; the rest is left behind."""
    from pydicom.dataset import Dataset

    reference = Dataset()
    for keyword in _REFERRED:
        if keyword in header:
            reference[keyword] = header[keyword]
    return reference


def _measures(header: Any, series: dicom.Series) -> Any:
    """Pixel measures: the distance of slices is that of their positions, whatever the header says of it."""
    from pydicom.dataset import Dataset
    from pydicom.valuerep import DS

    measures = Dataset()
    measures.PixelSpacing = header.PixelSpacing
    measures.SliceThickness = header.get("SliceThickness") or 0
    if series.geometry is not None and not series.positions_mm:
        measures.SpacingBetweenSlices = distance = DS(series.geometry.spacing[2], auto_format=True)
        measures.SliceThickness = header.get("SliceThickness") or distance
    return measures


def _by_slices(places: list[list[float]], series: dicom.Series) -> list[list[float]]:
    """The positions of frames in the order of the slices that the geometry of the series names."""
    geometry = series.geometry
    if geometry is None:
        raise IncompleteSeries(series.name, "is no volume", "a series with a grid")
    count = geometry.shape[2]
    slices = geometry.world(np.arange(count, dtype=np.float64)[:, None] * (0, 0, 1)) * (-1, -1, 1)  # LPS
    distances = np.linalg.norm(np.array(places)[None] - slices[:, None], axis=2)
    nearest = distances.argmin(axis=1)
    if distances.min(axis=1).max() > 0.1 * geometry.spacing[2]:
        raise GeometryMismatch(series.name, "frames do not lie where the grid of the series has its slices")
    return [places[n] for n in nearest]


def _inherit(header: Any, source: Any, where: str) -> None:
    """Give ``source`` patient and study; what must be there and is not, or is not valid, is left empty."""
    header.decode()
    empty = []
    for keyword in _INHERITED:
        value = header.get(keyword)
        valid = value is not None and _is_valid(keyword, value)
        setattr(source, keyword, value if valid else "")
        if not valid:
            empty.append(keyword)
    for keyword in _INHERITED_IF_THERE:
        if keyword in header:
            source[keyword] = header[keyword]
    if empty:
        log.warning("%s: no usable %s in the images; left empty in the DICOM SEG", where, ", ".join(empty))


def _is_valid(keyword: str, value: Any) -> bool:
    from pydicom.valuerep import DA, TM

    if keyword == "PatientSex":
        return value in ("", "M", "F", "O")
    kind = DA if keyword.endswith("Date") else TM if keyword.endswith("Time") else str
    try:
        kind(value)
    except ValueError:
        return False
    return True


def _frames(mask: Mask, labels: Labels, image: _Image, series: dicom.Series) -> NDArray[np.uint8]:
    """The mask as slices, rows, columns of segment numbers, on the slices of the image."""
    if series.geometry is not None:
        mask = matched(mask, series.geometry)
    if mask.array.shape != image.shape:
        found, expected = ("x".join(map(str, shape)) for shape in (mask.array.shape, image.shape))
        raise GeometryMismatch(series.name, f"the mask has {found} voxels", expected)
    indices = labels.to_indices(mask.array)
    if indices.max(initial=0) > len(labels.names):
        raise InputError("mask", f"voxels are marked to be ignored ({labels.ignore})", "labels and background")
    return indices.transpose(2, 1, 0)


def _built(frames: NDArray[np.uint8], image: _Image, segments: list[_Segment], kind: Kind, maker: _Maker) -> Any:
    import highdicom
    from highdicom.coding_schemes import CodingSchemeIdentificationItem
    from pydicom.sr.codedict import codes
    from pydicom.uid import ExplicitVRLittleEndian, RLELossless

    sources, positions = image.sources, image.positions
    if not frames.any():  # nothing to show, but a SEG has frames: one slice says it for all
        frames, positions, sources = frames[:1], positions and positions[:1], sources[:1]
    model, version = _text(maker.model), _text(maker.version)
    algorithm = highdicom.AlgorithmIdentificationSequence(model, codes.DCM.ArtificialIntelligence, version)
    private = any(segment.coding.type.scheme == PRIVATE_SCHEME for segment in segments)
    schemes = [CodingSchemeIdentificationItem(PRIVATE_SCHEME, name="medseg: labels without a code")]
    return highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=frames,
        plane_positions=positions,
        segmentation_type=kind,
        segment_descriptions=[_description(n, segment, algorithm) for n, segment in enumerate(segments, start=1)],
        series_instance_uid=highdicom.UID(),
        series_number=_SERIES_NUMBER,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="medseg",
        manufacturer_model_name=model,
        software_versions=medseg.__version__,
        device_serial_number="0",
        content_label="MEDSEG",
        content_description="Research use only",
        series_description=_text(f"medseg, research use only: {model}"),
        coding_schemes=schemes if private else None,
        transfer_syntax_uid=ExplicitVRLittleEndian if kind == "BINARY" else RLELossless,
        specific_character_set="ISO_IR 192",
    )


def _description(number: int, segment: _Segment, algorithm: Any) -> Any:
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription

    coding = segment.coding
    description = SegmentDescription(
        segment_number=number,
        segment_label=segment.name,
        segmented_property_category=_concept(coding.category),
        segmented_property_type=_concept(coding.type),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
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
    place: tuple[float, float, float]


def _instances(path: Path) -> Iterator[archive.Instance]:
    """The segmentations at a path, by their SOP class."""
    from pydicom.filereader import read_partial

    with archive.Reader() as reader:
        for instance in archive.instances(path, Counter()):
            with contextlib.suppress(Exception), reader.open(instance) as stream:
                header = read_partial(stream, lambda tag, vr, length: tag > _SOP_CLASS_UID)
                if str(header.get("SOPClassUID")) in SOP_CLASSES.values():
                    yield instance


def _read(path: Path) -> Mask:
    dataset = _dataset(path)
    kind = dataset.get("SegmentationType")
    if kind == "FRACTIONAL":
        remedy = "make a binary one of it, by a threshold of your choice"
        raise InputError(path, "holds fractions, not labels", " or ".join(SOP_CLASSES), remedy)
    if kind not in SOP_CLASSES:
        raise UnreadableFile(path, "is a DICOM SEG of no known type", " or ".join(SOP_CLASSES))
    frames = _frame_table(dataset, path)
    geometry, slices = _grid(dataset, frames, path)
    labels = _labels(dataset, path)
    array = _filled(dataset, frames, slices, geometry, path)
    background = _background(dataset)
    if background:
        array[array == background] = 0
    if unknown := labels.unknown(array):
        raise UnreadableFile(path, f"voxels of segments {unknown[:10]}, which it does not describe", "described ones")
    return Mask(array, geometry, labels, (path,))


def _dataset(path: Path) -> Any:
    import pydicom

    found = list(itertools.islice(_instances(path), 2))
    if len(found) != 1:
        number = "several DICOM SEG files" if found else "no DICOM SEG"
        raise InputError(path, f"there is {number}", "exactly one", "name the file")
    with archive.Reader() as reader:
        content = reader.content(found[0], reader.size(found[0]))
    return pydicom.dcmread(io.BytesIO(content))


def _group(name: str, frame: Any, shared: Any) -> Any:
    """A functional group macro, of the frame or shared by all (PS3.3 C.7.6.16)."""
    return frame[name].value if name in frame else shared[name].value


def _frame_table(dataset: Any, path: Path) -> list[_Frame]:
    """Segment and position of every frame, with the size of the pixel data checked."""
    rows, columns, count = int(dataset.Rows), int(dataset.Columns), int(dataset.get("NumberOfFrames", 1))
    items, shared = dataset.PerFrameFunctionalGroupsSequence, dataset.SharedFunctionalGroupsSequence[0]
    needed = (rows * columns * count * int(dataset.BitsAllocated) + 7) // 8
    short = _is_native(dataset) and len(dataset.PixelData) < needed
    if min(rows, columns, count) < 1 or len(items) != count or short:
        found = f"{count} frames of {columns}x{rows}, {len(items)} described, in {len(dataset.PixelData):,} bytes"
        raise UnreadableFile(path, found, "as many frames as its header claims", "copy it again from its source")
    frames = []
    for item in items:
        segment = 0
        if dataset.SegmentationType == "BINARY":
            segment = int(_group("SegmentIdentificationSequence", item, shared)[0].ReferencedSegmentNumber)
        x, y, z = (round(float(v), 4) for v in _group("PlanePositionSequence", item, shared)[0].ImagePositionPatient)
        frames.append(_Frame(segment, (x, y, z)))
    if len(set(frames)) != count:
        raise UnreadableFile(path, "two frames of one segment at one place", "one frame a segment and slice")
    return frames


def _grid(dataset: Any, frames: list[_Frame], path: Path) -> tuple[Geometry, list[int]]:
    """The grid that the frames span, and the slice of each."""
    from highdicom.spatial import create_affine_matrix_from_attributes
    from highdicom.volume import VolumeGeometry

    shared, items = dataset.SharedFunctionalGroupsSequence[0], dataset.PerFrameFunctionalGroupsSequence
    planes = [_floats(_group("PlaneOrientationSequence", item, shared)[0].ImageOrientationPatient) for item in items]
    measures = _group("PixelMeasuresSequence", items[0], shared)[0]
    stated = measures.get("SpacingBetweenSlices") or measures.get("SliceThickness")
    places = [frame.place for frame in frames]
    turned = np.abs(np.array(planes) - planes[0]).max() > 1e-4
    distance, slices = (None, None) if turned else _stacked(places, planes[0], abs(float(stated or 0)))
    if distance is None or slices is None:
        found = "its frames do not lie on one straight grid of even distances"
        raise IncompleteSeries(path, found, "", "it belongs to a tilted or uneven series: resample both elsewhere")
    shape = (int(dataset.Columns), int(dataset.Rows), max(slices) + 1)
    _check_size(shape, len(set(slices)), path)
    affine = create_affine_matrix_from_attributes(
        image_position=places[slices.index(0)],
        image_orientation=planes[0],
        pixel_spacing=_floats(measures.PixelSpacing),
        spacing_between_slices=distance,
    )
    return Geometry(shape, VolumeGeometry(affine, shape, "PATIENT").get_affine("RAS")), slices


def _stacked(places: list[Any], plane: list[float], stated: float) -> tuple[float | None, list[int] | None]:
    """Distance of slices and the slice of each place; the distance stated first, for frames may have been left out."""
    from highdicom.spatial import get_volume_positions

    for distance in (stated, 0.0) if stated else (0.0,):
        found: tuple[float | None, list[int] | None] = get_volume_positions(
            places,
            plane,
            allow_missing_positions=True,
            allow_duplicate_positions=True,
            spacing_hint=distance or None,
            index_convention="RD",
        )
        if found[0] is not None:
            return found
    return None, None


def _floats(values: Sequence[Any]) -> list[float]:
    return [float(v) for v in values]


def _check_size(shape: tuple[int, int, int], count: int, path: Path) -> None:
    columns, rows, slices = shape
    if slices > count + _MOST_GAP or columns * rows * slices > _MOST_VOXELS:
        found = f"its {count} slices span {columns}x{rows}x{slices} voxels"
        raise UnreadableFile(path, found, f"at most {_MOST_GAP:,} slices without voxels and {_MOST_VOXELS:,} voxels")


def _filled(dataset: Any, frames: list[_Frame], slices: list[int], geometry: Geometry, path: Path) -> NDArray[Any]:
    """The array (I, J, K), one frame after the other; in memory the slices lie one after the other."""
    labelled = dataset.SegmentationType == "LABELMAP"
    most = max(int(segment.SegmentNumber) for segment in dataset.SegmentSequence)
    kind = np.uint16 if most > 255 or (labelled and int(dataset.BitsAllocated) > 8) else np.uint8
    array = np.zeros(geometry.shape[::-1], dtype=kind)
    for frame, k, pixels in zip(frames, slices, _planes(dataset), strict=True):
        marked = pixels != 0
        if array[k][marked].any():
            raise InputError(path, "its segments overlap", "each voxel in one segment", "export one segment at a time")
        array[k][marked] = pixels[marked] if labelled else frame.segment
    return array.transpose(2, 1, 0)


def _planes(dataset: Any) -> Iterator[NDArray[Any]]:
    """The frames, each (rows, columns)."""
    from pydicom.pixels.utils import iter_pixels

    if int(dataset.BitsAllocated) > 1 or not _is_native(dataset):
        yield from iter_pixels(dataset, raw=True)
        return
    packed = np.frombuffer(dataset.PixelData, dtype=np.uint8)  # a frame may begin within a byte: PS3.5, 8.1.1
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    for start in range(0, rows * columns * int(dataset.get("NumberOfFrames", 1)), rows * columns):
        first, stop = start // 8, -(-(start + rows * columns) // 8)
        bits = np.unpackbits(packed[first:stop], bitorder="little")[start - 8 * first :]
        yield bits[: rows * columns].reshape(rows, columns)


def _is_native(dataset: Any) -> bool:
    """Whether its pixels are not compressed (deflation is of the whole data set)."""
    syntax = dataset.file_meta.TransferSyntaxUID
    return bool(not syntax.is_encapsulated)


def _background(dataset: Any) -> int:
    """The number that stands for background in a LABELMAP."""
    return int(dataset.get("PixelPaddingValue", 0)) if dataset.SegmentationType == "LABELMAP" else 0


def _labels(dataset: Any, path: Path) -> Labels:
    from highdicom.color import CIELabColor

    values: dict[str, int] = {}
    codings: dict[str, Coding] = {}
    colours: dict[str, Colour] = {}
    for segment in dataset.SegmentSequence:
        number = int(segment.SegmentNumber)
        if number in (0, _background(dataset)):
            continue
        name = _unused(_text(str(segment.get("SegmentLabel") or "")) or f"segment {number}", values)
        values[name] = number
        if (coding := _coding(segment)) is not None:
            codings[name] = coding
        if colour := segment.get("RecommendedDisplayCIELabValue"):
            red, green, blue = CIELabColor.from_dicom_value([int(v) for v in colour]).to_rgb(clip=True)
            colours[name] = (int(red), int(green), int(blue))
    return Labels.checked({"values": values, "codings": codings, "colours": colours}, path)


def _unused(name: str, taken: Mapping[str, int]) -> str:
    numbers = (f"{name} {n}" for n in itertools.count(2))
    return name if name not in taken else next(other for other in numbers if other not in taken)


def _coding(segment: Any) -> Coding | None:
    kind, category = _code(segment, "SegmentedPropertyType"), _code(segment, "SegmentedPropertyCategory")
    if kind is None or category is None:
        return None
    item = segment.SegmentedPropertyTypeCodeSequence[0]
    region = _code(segment, "AnatomicRegion")
    return Coding(
        type=kind,
        category=category,
        modifier=_code(item, "SegmentedPropertyTypeModifier"),
        region=region,
        region_modifier=_code(segment.AnatomicRegionSequence[0], "AnatomicRegionModifier") if region else None,
    )


def _code(item: Any, name: str) -> Code | None:
    """The first code of a sequence of codes; None where it is not there or not whole."""
    found = item.get(f"{name}CodeSequence") or item.get(f"{name}Sequence")
    if not found:
        return None
    value = found[0].get("CodeValue") or found[0].get("LongCodeValue")
    scheme, meaning = found[0].get("CodingSchemeDesignator"), found[0].get("CodeMeaning")
    return Code(value=str(value), meaning=str(meaning), scheme=str(scheme)) if value and scheme and meaning else None


# Grids


def _brought(mask: Mask, geometry: Geometry) -> NDArray[Any]:
    """The array of the mask on a grid, by highdicom; without what lies outside."""
    from highdicom.volume import Volume, VolumeGeometry

    try:
        volume = Volume(mask.array, mask.geometry.affine, "PATIENT", from_reference_convention="RAS")
        grid = VolumeGeometry(geometry.affine, geometry.shape, "PATIENT", from_reference_convention="RAS")
        brought = volume.match_geometry(grid, tol=_TOLERANCE)
        columns, rows, slices = (slice(n) for n in geometry.shape)
        brought = brought[columns, rows, slices]  # type: ignore[index]  # highdicom 0.28 leaves what is beyond the end
        result = Geometry(brought.spatial_shape, brought.get_affine("RAS"))
    except (RuntimeError, ValueError, IndexError):
        result = None
    if result is None or not result.close_to(geometry, _TOLERANCE):
        found = "its voxels do not lie on those of the image, however turned, flipped or cropped"
        raise GeometryMismatch("mask", found, "the lattice of the image", "resample the mask to the image first")
    array: NDArray[Any] = brought.array
    return array
