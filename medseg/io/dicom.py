"""DICOM series: what lies in a folder or zip, which of it is a volume, and its voxels.

Headers decide before any pixel is read: the slices of a volume lie along one normal at even distance, without gap,
repetition or tilt. DICOM's world is LPS; the first two rows of an affine change sign here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.geometry import Geometry
from medseg.volume import Volume

SUFFIXES: tuple[str, ...] = (".dcm", ".zip")


@dataclass(frozen=True)
class Instance:
    """A DICOM file: one on disk, or a member of a zip, which is never unpacked.

    Attributes:
        path: the file, or the zip.
        member: name in the zip; empty for a file.
    """

    path: Path
    member: str = ""


@dataclass(frozen=True, eq=False)
class Series:
    """A series, or the part of one that is a volume of its own (an echo, a time point), by its headers.

    Attributes:
        place: folder, zip or file in which it was found.
        uid, study_uid, frame_uid: of the series, its study and its frame of reference.
        part: which part of the series, as ``EchoTime=4.92``; empty where it is one volume.
        modality: CT, MR, ...
        description: free text that may hold anything: shown in listings alone, never in logs, files or errors.
        instances: its files; those of a volume in the order of its slices.
        geometry: of the volume, in the order of the array that ``read_series`` gives; None where it is none.
        kind: number type of the voxels after rescaling.
        syntax: name of the transfer syntax.
        reason: why it cannot be read as a volume; empty where it can.
        irregular: what is uneven or tilted about it, where resampling to a straight grid could mend that.
        positions_mm: offset of every slice from the first along the line of slices, where their distances are uneven.
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

    @property
    def name(self) -> str:
        """A name for files and messages that says nothing of the patient: ``series_`` and a digest of the UID."""
        return f"series_{hashlib.sha256((self.uid + self.part).encode()).hexdigest()[:12]}"

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that it takes from disk, once."""
        return tuple(dict.fromkeys(instance.path for instance in self.instances))

    def resampled(self) -> Series:
        """The series as one that is read on a straight grid, where ``irregular`` says that it needs to be.

        Raises:
            IncompleteSeries: it cannot be read, for another reason.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Scan:
    """What there is at a place.

    Attributes:
        series: usable and not, by study, then by UID.
        passed_over: what else there is, by kind ("secondary capture", "DICOMDIR", "no DICOM"), and how much of it.
    """

    series: tuple[Series, ...]
    passed_over: dict[str, int]


def scan(place: Path) -> Scan:
    """List the series in a folder (and those below it), a zip or a file, by their headers.

    Raises:
        InputError: there is nothing there, or a zip that may not be opened (members outside of it, or a bomb).
    """
    raise NotImplementedError


def select(found: Scan, pattern: str = "", *, resample_irregular: bool = False) -> list[Series]:
    """The series that a pattern means.

    Args:
        found: what there is.
        pattern: UID, UID and part (``UID[EchoTime=4.92]``), the name (``series_...``), or a pattern of the description
            with ``*`` and ``?``, upper and lower case alike; empty for the only usable series of a study.
        resample_irregular: take tilted and uneven series too, to be resampled.

    Returns:
        One series a study.

    Raises:
        IncompleteSeries: it means a series that cannot be used; with the reason.
        InputError: it means none, or several of one study; they are listed by UID.
    """
    raise NotImplementedError


def read_series(series: Series) -> Volume:
    """Read the voxels of a series.

    Returns:
        Volume (1, I, J, K): columns, rows, slices along their normal; ``header`` is the series. Numbers are after
        rescaling, integers where slope and intercept are, and brighter is more (MONOCHROME1 is turned).

    Raises:
        UnreadableFile: a file is damaged, or its compression needs a package that is not installed; which is named.
        IncompleteSeries: the series is none that can be read.
    """
    raise NotImplementedError


def read(path: Path) -> Volume:
    """Read the only usable series at a path; see ``select`` and ``read_series``."""
    raise NotImplementedError


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its content (``DICM`` after the preamble)."""
    raise NotImplementedError


def reading_bytes(series: Series) -> int:
    """What ``read_series`` takes at the most, by the headers."""
    raise NotImplementedError


def headers(series: Series) -> Sequence[Any]:
    """The pydicom data sets of a series without pixels, in the order of its slices."""
    raise NotImplementedError
