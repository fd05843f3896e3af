"""DICOM series: what lies in a folder or zip, which of it is a volume, and its voxels.

Headers decide before any pixel is read: the slices of a volume lie along one normal at even distance, without gap,
repetition or tilt (``stack``). DICOM's world is LPS; the affine of a volume is RAS+.

Values are those of the Modality LUT, or of slope and intercept, slice by slice. Real World Value Maps and Philips'
private scaling are not applied. Padding keeps its value: no number is made up for what was not scanned.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import re
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import IncompleteSeries, InputError, UnreadableFile
from medseg.geometry import Geometry
from medseg.io.dicom import frames as files
from medseg.io.dicom import pixels, stack
from medseg.io.dicom.archive import UNSEEN, Instance, Reader, instances, is_zip
from medseg.io.dicom.frames import MISSED, Frame, Image, headers_of, image_of, uid_of
from medseg.io.dicom.parts import Part, parts_of, planes_of
from medseg.progress import Progress, silent, track
from medseg.volume import Volume

__all__ = [
    *("SUFFIXES", "Instance", "Scan", "Series", "check", "headers", "is_dicom", "read", "read_series", "reading_bytes"),
    *("from_slices", "chosen", "scan", "select", "to_slices"),
]

SUFFIXES: tuple[str, ...] = (".dcm", ".zip")

_log = logging.getLogger("medseg.io.dicom")
_HEAD = 1 << 16  # bytes of a damaged file in which the UID of its series is looked for
_PAGES, _SLICES = 2, 5  # so many files that lie nowhere are left out, among so many that lie somewhere
_NOBODY = ""  # instead of a UID: it may be a file of any series
_LISTED = "list what there is with 'medseg dicom scan'"


@dataclass(frozen=True, eq=False)
class Series:
    """A series, or the part of one that is a volume of its own (an echo, a time point), by its headers.

    Attributes:
        place: folder, zip or file in which it was found.
        uid, study_uid, frame_uid: of the series, its study and its frame of reference.
        part: which part of the series, as ``EchoTime=4.92``; empty where it is one volume.
        modality: CT, MR, ...
        description: free text that may hold anything: shown in listings alone, never in logs, files or errors.
        instances: its files, each once; those of a volume in the order of its slices.
        geometry: of the volume, in the order of the array that ``read_series`` gives; None where it is none.
        kind: number type of the voxels after rescaling.
        syntax: name of the transfer syntax.
        reason: why it cannot be read as a volume; empty where it can.
        irregular: what is uneven or tilted about it, where resampling to a straight grid could mend that.
        positions_mm: offset of every slice from the first along the line of slices, where their distances are uneven.
        frames: its slices; those of a volume in their order.
        damaged: whether the reason is a fault of a file, and none of where the slices lie.
        warnings: what is odd about it but can be read all the same.
        replaced: whether its files have no true UIDs, so that nothing can refer to them.
    """

    place: Path
    uid: str
    study_uid: str
    frame_uid: str
    part: str
    modality: str
    description: str = field(repr=False)
    instances: tuple[Instance, ...]
    geometry: Geometry | None
    kind: str
    syntax: str
    reason: str = ""
    irregular: str = ""
    positions_mm: tuple[float, ...] = ()
    frames: tuple[Frame, ...] = field(default=(), repr=False)
    damaged: bool = False
    warnings: tuple[str, ...] = ()
    replaced: bool = False

    @property
    def name(self) -> str:
        """A name for files and messages that says nothing of the patient: ``series_`` and a digest of UIDs and part."""
        return f"series_{hashlib.sha256((self.study_uid + self.uid + self.part).encode()).hexdigest()[:12]}"

    @property
    def key(self) -> str:
        """How ``select`` is told of it: the UID, and the part in brackets where there is one."""
        return f"{self.uid}[{self.part}]" if self.part else self.uid

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that it takes from disk, once."""
        return tuple(dict.fromkeys(instance.path for instance in self.instances))

    def resampled(self) -> Series:
        """The series as one that is read on an even grid, where ``irregular`` says that it needs to be.

        A tilted one is read as it lies, on a sheared grid: no voxel is made up. Of uneven slices the missing ones are
        interpolated between their neighbours; ``to_slices`` leads back.

        Raises:
            IncompleteSeries: it cannot be read, for another reason.
        """
        if not self.irregular:
            check(self)
            return self
        geometry = stack.mended(planes_of(self.frames))
        how = "slices are interpolated on an even grid" if self.positions_mm else "read on a sheared grid"
        return replace(
            self,
            geometry=geometry,
            kind="float32" if self.positions_mm else self.kind,
            reason="",
            warnings=(*self.warnings, f"{self.irregular}: {how}"),
        )


@dataclass(frozen=True)
class Scan:
    """What there is at a place.

    Attributes:
        series: usable and not, by study, then by UID.
        passed_over: what else there is, by kind ("secondary capture", "DICOMDIR", "no DICOM"), and how much of it.
        place: where it was looked for.
    """

    series: tuple[Series, ...]
    passed_over: dict[str, int]
    place: Path = Path()


def scan(place: Path, progress: Progress = silent) -> Scan:
    """List the series in a folder (and those below it), a zip or a file, by their headers.

    Raises:
        InputError: there is nothing there, or a zip that may not be opened (members outside of it, or a bomb).
        UnreadableFile: a zip that is damaged.
    """
    passed_over: Counter[str] = Counter()
    groups: dict[tuple[str, str], list[Image]] = defaultdict(list)
    missed = []
    with Reader() as reader:
        for instance in track(instances(place, passed_over), "reading DICOM headers", progress):
            image = image_of(reader, instance)
            if isinstance(image, str):
                passed_over[image] += 1
                missed += [instance] * (image in MISSED)
            else:
                groups[image.study_uid, image.series_uid].append(image)
        lost = _owners(missed, {uid for _, uid in groups}, reader)
        lost[_NOBODY] += sum(passed_over[kind] for kind in UNSEEN)
        found = [part for _, images in sorted(groups.items()) for part in _series_of(place, images, reader, lost)]
        found = [_not_alone(series, reader) for series in found]
    return Scan(tuple(found), dict(sorted(passed_over.items())), place)


def select(found: Scan, pattern: str = "", *, resample_irregular: bool = False) -> list[Series]:
    """The series that a pattern means.

    Args:
        found: what there is.
        pattern: UID, UID and part (``UID[EchoTime=4.92]``), the name (``series_...``), or a pattern of the description
            with ``*`` and ``?``, upper and lower case alike; empty for the only usable series of a study.
        resample_irregular: take tilted and uneven series too, to be resampled.

    Returns:
        One series a study: the usable one of those that are meant. Where several studies are looked at, an unusable
        one stands for a study that has no other, so that its case fails alone; studies without any are logged.

    Raises:
        IncompleteSeries: it means a series that cannot be used; with the reason.
        UnreadableFile: the reason is a damaged file, or a decoder that is not installed.
        InputError: it means none, or several of one study; they are listed by name.
    """
    selected = chosen(found, pattern, resample_irregular=resample_irregular)
    if len(selected) == 1:
        check(selected[0])
    return selected


def chosen(found: Scan, pattern: str = "", *, resample_irregular: bool = False) -> list[Series]:
    """As ``select``, but that a series alone may be unusable too.

    Raises:
        InputError: as ``select``.
    """
    meant = [series for series in found.series if _means(pattern, series)]
    if not meant:
        what = "a pattern that means one of them" if found.series else "a DICOM series"
        raise InputError(found.place, _none_found(found, pattern), what, _LISTED)
    studies: dict[str, list[Series]] = defaultdict(list)
    for series in meant:
        studies[series.study_uid].append(_mended(series) if resample_irregular else series)
    for study in {series.study_uid for series in found.series} - set(studies):
        _log.warning("study %s has no series that the pattern means", study)
    return [_one_of(found.place, group) for group in studies.values()]


def check(series: Series) -> Geometry:
    """Make sure that a series can be read, and give its geometry.

    Raises:
        IncompleteSeries: it is no volume; with the reason.
        UnreadableFile: a file is damaged, or its compression needs a package that is not installed; which is named.
    """
    if series.geometry is not None:
        return series.geometry
    found, _, remedy = series.reason.partition("; ")
    kind = UnreadableFile if series.damaged else IncompleteSeries
    named = f"series {series.key}: " if series.key else ""
    raise kind(series.place, f"{named}{found}", "" if remedy else "one volume", remedy)


def read_series(series: Series) -> Volume:
    """Read the voxels of a series.

    Returns:
        Volume (1, I, J, K): columns, rows, slices along their normal; ``header`` is the series. Numbers are after
        rescaling, integers where slope is 1 and intercept an integer, else float32. Brighter is more: MONOCHROME1 is
        turned within the range of its bits, but for values with a unit (CT, PET, a Rescale Type), which stay.

    Raises:
        UnreadableFile: a file is damaged, or its compression needs a package that is not installed; which is named.
        IncompleteSeries: the series is none that can be read.
    """
    geometry = check(series)
    kind, first = np.dtype(series.kind), series.frames[0].encoding
    array = np.empty((len(series.frames), first.rows, first.columns), dtype=kind)
    by_file: dict[Instance, dict[int, Frame]] = defaultdict(dict)
    for k, frame in enumerate(series.frames):
        by_file[frame.instance][k] = frame
    with Reader() as reader:
        for frames in by_file.values():
            for k, stored in pixels.read(reader, frames):
                array[k] = pixels.values(stored, series.frames[k], kind, _turned(series.frames[k], series.modality))
    if series.positions_mm:
        array = _interpolated(array, series, geometry.shape[2])
    return Volume(array.T[np.newaxis], geometry, series.files, series, series.warnings)


def to_slices(series: Series, array: NDArray[Any]) -> NDArray[Any]:
    """Bring an array on the grid of a resampled series back to its slices.

    Args:
        series: as it was read.
        array: (I, J, K) on the grid of ``series.geometry``.

    Returns:
        Array (I, J, slices): for each slice the plane nearest to it; the array itself where none was interpolated.
    """
    if not series.positions_mm:
        return array
    places = np.asarray(series.positions_mm) / series.positions_mm[-1] * (array.shape[2] - 1)
    return array[:, :, np.rint(places).astype(int)]


def from_slices(series: Series, array: NDArray[Any]) -> NDArray[Any]:
    """Bring an array on the slices of a resampled series to its even grid; the way back from ``to_slices``.

    Args:
        series: as it is read.
        array: (I, J, slices).

    Returns:
        Array (I, J, K) on the grid of ``series.geometry``: for each plane the slice nearest to it, the first of two;
        the array itself where none is interpolated.
    """
    if not series.positions_mm:
        return array
    offsets, count = np.asarray(series.positions_mm), check(series).shape[2]
    distances = np.abs(np.linspace(0.0, offsets[-1], count)[:, None] - offsets)
    return array[:, :, np.round(distances, 3).argmin(axis=1)]  # positions are rounded to 0.001 mm


def read(path: Path) -> Volume:
    """Read the only usable series at a path; see ``select`` and ``read_series``.

    Raises:
        InputError: there are several studies.
    """
    found = select(scan(path))
    if len(found) > 1:
        raise InputError(path, f"holds {len(found)} studies", "one series", _LISTED)
    return read_series(found[0])


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its content; also without the preamble that it should have."""
    return files.is_dicom(Instance(path))


def reading_bytes(series: Series) -> int:
    """What ``read_series`` takes at the most, by the headers; 0 for one that cannot be read."""
    if series.geometry is None:
        return 0
    pixels_a_slice = series.geometry.shape[0] * series.geometry.shape[1]
    item = np.dtype(series.kind).itemsize
    read = len(series.frames) * pixels_a_slice * item
    interpolated = series.geometry.shape[2] * pixels_a_slice * item if series.positions_mm else 0
    file_bytes = max(frame.encoding.file_bytes * (5 if frame.encoding.deflated else 1) for frame in series.frames)
    return read + interpolated + 4 * 8 * pixels_a_slice + file_bytes


def headers(series: Series) -> Sequence[Any]:
    """The pydicom data sets of a series without pixels, one a file, in the order of its slices.

    Raises:
        UnreadableFile: a file is damaged.
    """
    with Reader() as reader:
        return [headers_of(reader, instance) for instance in series.instances]


def _series_of(place: Path, images: list[Image], reader: Reader, lost: Counter[str]) -> list[Series]:
    """The series of the images with one UID, one for each volume among them."""
    kept, notes, fault = _without_copies(place, images, reader)
    kept = _without_pages(kept, notes)
    if count := lost[kept[0].series_uid]:
        fault = f"{count} of its files cannot be read"
    if count := lost[_NOBODY]:
        notes.append(f"{count} files or folders beside its own cannot be read: slices may be missing at its ends")
    frames = [frame for image in kept for frame in image.frames]
    referred = Counter(image.frame_uid for image in kept for _ in image.frames if image.frame_uid)
    if sum(count > 1 for count in referred.values()) > 1:
        fault = fault or "its slices have several frames of reference"
    elif len(referred) > 1:  # some anonymisers make up one a file
        kept = [replace(image, frame_uid="") for image in kept]
        notes.append(f"{len(referred)} frames of reference in one series: taken as none")
    if any(image.replaced for image in kept):
        notes.append("its UIDs are none of DICOM: digests stand for them")
    notes += sorted({image.note for image in kept} - {""})
    if fault := fault or _unplaced(frames):
        return [_series(place, kept, Part("", frames, fault), notes)]
    found = parts_of(frames, lambda frame: pixels.digest(reader, frame))
    return [_series(place, kept, part, notes) for part in found]


def _not_alone(series: Series, reader: Reader) -> Series:
    """A series, which is none that can be read where it is one slice of several and was given by its file."""
    (place, *others) = (instance.path for instance in series.instances)
    if series.reason or others or len(series.frames) > 1 or place != series.place or is_zip(place):
        return series
    if not any(_is_of_series(reader, path, series) for path in _nearest(place)):
        return series
    reason = "is one slice of a series of several files; give the folder that holds them"
    return replace(series, geometry=None, reason=reason)


def _nearest(path: Path) -> list[Path]:
    """The files of a file's folder, beginning with those whose names lie next to its own."""
    try:
        names = sorted(other for other in path.parent.iterdir() if other.is_file())
    except OSError:
        return []
    own = bisect(names, path)
    return [names[n] for n in sorted(range(len(names)), key=lambda n: abs(n - own))]


def _is_of_series(reader: Reader, path: Path, series: Series) -> bool:
    """Whether a file is another instance of a series."""
    try:
        image = image_of(reader, Instance(path))
    except UnreadableFile:
        return False
    return isinstance(image, Image) and image.series_uid == series.uid and image.uid != series.frames[0].uid


def _owners(missed: Sequence[Instance], uids: set[str], reader: Reader) -> Counter[str]:
    """How many damaged files there are of each series, by the UIDs in them; of ``_NOBODY`` where they have none."""
    found: Counter[str] = Counter()
    for instance in missed:
        texts = re.findall(rb"[0-9.]+|[!-~]+", reader.head(instance, _HEAD))
        found.update({uid_of(text.decode()) for text in texts} & uids or [_NOBODY])
    return found


def _without_copies(place: Path, images: list[Image], reader: Reader) -> tuple[list[Image], list[str], str]:
    """Images without copies of the same instance; what was left out; and why that cannot be done."""
    kept: dict[str, Image] = {}
    for image in images:
        other = kept.setdefault(image.uid, image)
        if other is not image and not _same(other, image, reader):
            names = " and ".join(str(one.frames[0].instance.within(place)) for one in (other, image))
            return images, [], f"several files have one SOP Instance UID and differ, as {names}; keep one of each"
    count = len(images) - len(kept)
    return list(kept.values()), [f"{count} files are copies of others and left out"] if count else [], ""


def _same(one: Image, other: Image, reader: Reader) -> bool:
    """Whether two files hold one image; archives store some raw, and beside it compressed."""
    if [_facts(frame) for frame in one.frames] != [_facts(frame) for frame in other.frames]:
        return False
    if pixels.digest(reader, one.frames[0]) == pixels.digest(reader, other.frames[0]):
        return True
    if one.frames[0].encoding.syntax == other.frames[0].encoding.syntax or one.fault or other.fault:
        return False
    try:
        return pixels.decoded_digest(reader, one.frames) == pixels.decoded_digest(reader, other.frames)
    except UnreadableFile:
        return False


def _facts(frame: Frame) -> tuple[object, ...]:
    """Where a frame lies and what its stored numbers stand for."""
    encoding, table = frame.encoding, frame.table and (frame.table[0], frame.table[1].tobytes())
    return frame.plane, frame.slope, frame.intercept, table, encoding.range, encoding.inverted


def _without_pages(images: list[Image], notes: list[str]) -> list[Image]:
    """Images without a page or two among them that lie nowhere, as of a scanner's protocol; which is noted."""
    lost = [image for image in images if len(image.frames) == 1 and not image.frames[0].plane]
    placed = [image for image in images if all(frame.plane for frame in image.frames)]
    if not 0 < len(lost) <= _PAGES or len(placed) < _SLICES or len(placed) + len(lost) < len(images):
        return images
    notes.append(f"{len(lost)} files have no position, orientation and pixel spacing that can be used: left out")
    return placed


def _unplaced(frames: Sequence[Frame]) -> str:
    """Why slices have no place."""
    missing = sum(frame.plane is None for frame in frames)
    if not missing:
        return ""
    return f"{missing} of {len(frames)} slices have no position, orientation and pixel spacing that can be used"


def _series(place: Path, images: list[Image], part: Part, notes: list[str]) -> Series:
    """One series out of its images, and the part of them that it is."""
    first, frames = images[0], part.frames
    laid = stack.stack(planes_of(frames), _step(frames)) if all(frame.plane for frame in frames) else stack.Stack()
    if laid.order:
        frames = [replace(frames[n], plane=plane) for n, plane in zip(laid.order, laid.planes, strict=True)]
    reason, damaged = _reason(part, images, laid)
    return Series(
        place=place,
        uid=first.series_uid,
        study_uid=first.study_uid,
        frame_uid=first.frame_uid,
        part=part.label,
        modality=first.modality,
        description=first.description,
        instances=tuple(dict.fromkeys(frame.instance for frame in frames)),
        geometry=None if reason else laid.geometry,
        kind=pixels.kind_of(frames).name,
        syntax=", ".join(sorted({pixels.syntax_name(frame.encoding.syntax) for frame in frames})),
        reason=reason,
        irregular=laid.irregular if reason == laid.reason else "",
        positions_mm=laid.offsets,
        frames=tuple(frames),
        damaged=damaged,
        warnings=(*notes, *filter(None, (part.note, laid.warning, *_oddities(frames, first.modality)))),
        replaced=any(image.replaced for image in images),
    )


def _reason(part: Part, images: list[Image], laid: stack.Stack) -> tuple[str, bool]:
    """Why a part cannot be read, and whether a fault of a file is the reason."""
    mine = {frame.instance for frame in part.frames}
    for image in images:
        if image.fault and image.frames[0].instance in mine:
            return f"instance {image.uid} {image.fault}", image.damaged
    if part.reason:
        return part.reason, False
    for frame in part.frames:
        if missing := pixels.undecodable(frame.encoding.syntax):
            return missing, True
    if any(frame.slope == 0 for frame in part.frames) and not any(frame.slope for frame in part.frames):
        return "the rescale slope is 0: every voxel would have one value", True
    if fault := _unscaled(part.frames):
        return fault, True
    return laid.reason, False


def _unscaled(frames: Sequence[Frame]) -> str:
    """Why the values of slices are of several scales, where some lack the scale that others have."""
    tables = sum(frame.table is not None for frame in frames)
    if 0 < tables < len(frames):
        return f"{tables} of {len(frames)} slices have a table of modality values, and the others none"
    for what, neutral in (("slope", 1.0), ("intercept", 0.0)):
        found = [getattr(frame, what) for frame in frames]
        if None in found and not set(found) <= {None, neutral}:
            return f"{found.count(None)} of {len(found)} slices have no rescale {what}, and the others have one"
    return ""


def _step(frames: Sequence[Frame]) -> float:
    """Distance of slices for a single one: what the header says, or its thickness; 0 where it says neither."""
    return frames[0].between or frames[0].thickness


def _oddities(frames: Sequence[Frame], modality: str) -> list[str]:
    """What is odd about how values are stored."""
    odd = []
    if any(frame.encoding.inverted for frame in frames):
        turned = any(_turned(frame, modality) for frame in frames)
        odd.append(f"MONOCHROME1: {'turned, so that brighter is more' if turned else 'values have a unit and stay'}")
    if modality == "CT" and any(frame.intercept is None and frame.table is None for frame in frames):
        odd.append("CT without rescale intercept: values may not be Hounsfield units")
    return odd


def _turned(frame: Frame, modality: str) -> bool:
    inverted = frame.encoding.inverted and not frame.encoding.is_float
    return inverted and modality not in ("CT", "PT") and frame.unit in ("", "US")


def _means(pattern: str, series: Series) -> bool:
    if not pattern or pattern in (series.uid, series.key, series.name):
        return True
    return fnmatch.fnmatchcase(series.description.strip().lower(), pattern.lower())


def _none_found(found: Scan, pattern: str) -> str:
    """What there is where no series is meant."""
    if found.series:
        return f"no series is called {pattern!r}; there are {_described(found.series)}"
    others = ", ".join(f"{count} x {kind}" for kind, count in found.passed_over.items())
    return f"holds no DICOM series that could be a volume ({others or 'no files'})"


def _described(series: Sequence[Series]) -> str:
    """A list of series by their names, without their free text."""
    words = []
    for one in series[:20]:
        shape = "x".join(f"{s:.4g}" for s in one.geometry.spacing) + " mm" if one.geometry else "cannot be used"
        facts = (one.modality, f"{len(one.frames)} slices", shape, one.part)
        words.append(f"{one.name} ({', '.join(filter(None, facts))})")
    return ", ".join(words) + (f" and {len(series) - 20} more" if len(series) > 20 else "")


def _mended(series: Series) -> Series:
    return series.resampled() if series.irregular else series


def _one_of(place: Path, group: list[Series]) -> Series:
    """The usable one of a study's series; the first where none is."""
    usable = [series for series in group if not series.reason]
    if len(usable) > 1:
        found = f"{len(usable)} series could be meant: {_described(usable)}"
        remedy = "name it with --series, in Python series=; a model of several channels takes one for each"
        raise InputError(place, found, "one of them", remedy)
    return (usable or group)[0]


def _interpolated(array: NDArray[Any], series: Series, count: int) -> NDArray[Any]:
    """Slices (n, J, I) at uneven offsets brought to some even ones, the ends in place, linearly."""
    offsets = np.asarray(series.positions_mm)
    wanted = np.linspace(0.0, offsets[-1], count)
    even = np.empty((count, *array.shape[1:]), dtype=array.dtype)
    above = np.clip(np.searchsorted(offsets, wanted), 1, len(offsets) - 1)
    for k, (place, upper) in enumerate(zip(wanted, above, strict=True)):
        part = np.clip((place - offsets[upper - 1]) / (offsets[upper] - offsets[upper - 1]), 0.0, 1.0)
        even[k] = (1.0 - part) * array[upper - 1] + part * array[upper]
    return even
