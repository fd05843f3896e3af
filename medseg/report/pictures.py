"""The cases that a page shows as pictures: which ones, and what is read and drawn of each."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

from medseg import io
from medseg.errors import InputError, MedsegError
from medseg.evaluate import CaseScores, Evaluation
from medseg.progress import Progress, silent, track
from medseg.report.gather import CaseFiles, Gathered, without_folders
from medseg.report.planes import MOST_TILES, mosaic_png, planes_png
from medseg.report.viewer import pack
from medseg.report.words import listed
from medseg.volume import Labels, Mask, Volume

WORST, TYPICAL, VIEWERS = 6, 4, 5
"""Cases of each kind at the most."""
MOSAICS = 4
"""Of a page, at the most: with more the page would be too large to send."""
ROOM = 12_000_000
"""Characters of all pictures and viewers: with the rest, and NiiVue, the page has no more than 15 MB."""
_NO_PICTURE = "Without a picture, as the page would be too large."
_NO_VIEWER = "Without a viewer, as the page would be too large."


@dataclass(frozen=True)
class Shown:
    """A case as a picture.

    Attributes:
        case: its id.
        number: from 1, the same for its picture and its viewer.
        png: as a data URI; empty where it cannot be drawn.
        viewer: what ``viewer.pack`` made of it, where it has a viewer.
        notes: what is missing, and why.
    """

    case: str
    number: int
    png: str = ""
    viewer: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mosaic:
    """Many cases in one picture: their ids, and the picture as a data URI."""

    cases: tuple[str, ...]
    png: str


@dataclass(frozen=True)
class Pictures:
    """All pictures of a page; without references there are mosaics in place of worst and typical cases."""

    worst: tuple[Shown, ...] = ()
    typical: tuple[Shown, ...] = ()
    mosaics: tuple[Mosaic, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def viewers(self) -> tuple[Shown, ...]:
        """The cases that have a viewer."""
        return tuple(shown for shown in self.worst if shown.viewer)

    @property
    def numbers(self) -> dict[str, int]:
        """Case -> number of its picture."""
        return {shown.case: shown.number for shown in (*self.worst, *self.typical) if shown.png}


def draw(found: Gathered, progress: Progress = silent) -> Pictures:
    """Read and draw the cases that are worth a look; one that cannot be drawn says why."""
    if found.evaluation:
        return _scored(found, found.evaluation, progress)
    return _predicted(found, progress)


def mean_dice(case: CaseScores, classes: int) -> float | None:
    """Mean of a case over its classes, regions left out; None where all are empty."""
    known = [score.dice for score in case.scores[:classes] if score.dice is not None]
    return fmean(known) if known else None


def ranked(evaluation: Evaluation) -> list[CaseScores]:
    """The cases with a usable prediction and a score, the worst first."""
    classes = len(evaluation.labels.values)
    known = [case for case in evaluation.cases if not case.reason and mean_dice(case, classes) is not None]
    return sorted(known, key=lambda case: (mean_dice(case, classes), case.case))


def chosen(evaluation: Evaluation) -> tuple[list[CaseScores], list[CaseScores]]:
    """The worst cases, worst first, and of the others those nearest the median, in the same order."""
    order = ranked(evaluation)
    worst, others = order[:WORST], order[WORST:]
    if not others:
        return worst, []
    classes = len(evaluation.labels.values)
    middle = median(mean_dice(case, classes) or 0.0 for case in order)
    nearest = sorted(others, key=lambda case: (abs((mean_dice(case, classes) or 0.0) - middle), case.case))[:TYPICAL]
    return worst, [case for case in others if case in nearest]


def _scored(found: Gathered, evaluation: Evaluation, progress: Progress) -> Pictures:
    worst, typical = chosen(evaluation)
    drawn = []
    for number, case in enumerate(track([*worst, *typical], "drawing", progress), start=1):
        files = found.files.get(case.case, CaseFiles())
        drawn.append(_shown(case.case, number, files, evaluation.labels, case.left_out, number <= VIEWERS))
    drawn = _within(drawn, ROOM)
    return Pictures(tuple(drawn[: len(worst)]), tuple(drawn[len(worst) :]))


def _within(drawn: Sequence[Shown], room: int) -> list[Shown]:
    """What there is room for, pictures of the worst cases and viewers before the rest; it says what is left out."""
    kept, numbers = list(drawn), range(len(drawn))
    pictures, viewers = [(n, "png") for n in numbers], [(n, "viewer") for n in numbers]
    for n, part in [*pictures[:WORST], *viewers, *pictures[WORST:]]:
        size = _length(kept[n], part)
        if size <= room:
            room -= size
        elif part == "png":
            kept[n] = replace(kept[n], png="", notes=(*kept[n].notes, _NO_PICTURE))
        else:
            kept[n] = replace(kept[n], viewer=None, notes=(*kept[n].notes, _NO_VIEWER))
    return kept


def _length(shown: Shown, part: str) -> int:
    """Characters of a picture or of the data of a viewer."""
    if part == "png":
        return len(shown.png)
    return sum(len(text) for text in (shown.viewer or {}).values() if isinstance(text, str))


def _predicted(found: Gathered, progress: Progress) -> Pictures:
    rows = sorted(found.predicted.values(), key=lambda row: (not row.flags, row.case))
    cases = [row.case for row in rows if found.files.get(row.case, CaseFiles()).prediction]
    if found.labels is None or not cases:
        return Pictures()
    blocks = [
        cases[start : start + MOST_TILES] for start in range(0, min(len(cases), MOST_TILES * MOSAICS), MOST_TILES)
    ]
    notes: dict[str, list[str]] = {}
    mosaics = [_mosaic(block, found, found.labels, notes) for block in track(blocks, "drawing", progress)]
    looked = [
        _shown(case, number, found.files[case], found.labels, (), True, planes=False)
        for number, case in enumerate(cases[:VIEWERS], start=1)
    ]
    looked = _within(looked, ROOM - sum(len(mosaic.png) for mosaic in mosaics if mosaic))
    said = [f"{note} ({listed(names, 10, 'cases')})" for note, names in notes.items()]
    if (most := MOST_TILES * MOSAICS) < len(cases):
        said.append(f"{most} of the {len(cases)} masks are shown, those with flags first.")
    return Pictures(tuple(looked), (), tuple(filter(None, mosaics)), tuple(said))


def _mosaic(cases: Sequence[str], found: Gathered, labels: Labels, notes: dict[str, list[str]]) -> Mosaic | None:
    """Cases in one picture; what is missing goes to ``notes``, with the cases. None where no mask can be read."""
    names: list[str] = []

    def tiles() -> Iterator[tuple[str, Volume | None, Mask]]:
        for case in cases:  # one at a time is in memory
            image, _, mask, said = _read(found.files[case], labels, ())
            for note in said:
                notes.setdefault(note, []).append(case)
            if mask:
                names.append(case)
                yield case, image, mask

    try:
        png = mosaic_png(tiles(), labels)
    except ValueError:  # no tile
        return None
    return Mosaic(tuple(names), _data_uri(png))


def _shown(
    case: str,
    number: int,
    files: CaseFiles,
    labels: Labels,
    left_out: Sequence[str],
    has_viewer: bool,
    planes: bool = True,
) -> Shown:
    image, reference, prediction, notes = _read(files, labels, left_out)
    if reference is None and prediction is None:
        return Shown(case, number, notes=tuple(notes))
    png, viewer = "", None
    try:
        if planes:
            png = _data_uri(planes_png(image, reference, prediction, labels))
        if has_viewer:
            viewer = pack(case, image, reference, prediction, labels)
    except MedsegError as failure:
        notes.append(without_folders(str(failure)))
    return Shown(case, number, png, viewer, tuple(notes))


def _read(
    files: CaseFiles, labels: Labels, left_out: Sequence[str]
) -> tuple[Volume | None, Mask | None, Mask | None, list[str]]:
    """Image (its first file), reference and prediction on one grid, as far as there are such, and what is missing."""
    notes: list[str] = []
    image = _image(files, notes)
    reference = _mask(files.reference, "reference", image, labels, (), notes)
    prediction = _mask(files.prediction, "prediction", image or reference, labels, left_out, notes)
    mask = reference or prediction
    if image and mask and not image.geometry.close_to(mask.geometry):
        notes.append("The image lies on another grid than the mask, and is not shown.")
        image = None
    if reference and prediction and not prediction.geometry.close_to(reference.geometry):
        notes.append("The prediction lies on another grid than the reference, and is not shown.")
        prediction = None
    return image, reference, prediction, notes


def _image(files: CaseFiles, notes: list[str]) -> Volume | None:
    if not files.images:
        notes.append("The image is not known; the masks are shown without it.")
        return None
    try:
        return io.read_volume(files.images[0])
    except (InputError, OSError) as failure:
        notes.append(f"The image cannot be read: {without_folders(str(failure))}")
        return None


def _mask(
    path: Any, what: str, image: Volume | Mask | None, labels: Labels, left_out: Sequence[str], notes: list[str]
) -> Mask | None:
    if path is None:
        if what == "prediction":
            notes.append("There is no predicted mask.")
        return None
    try:
        mask = io.read_mask(path, None, image)
        return mask.without(left_out).named(labels)
    except (InputError, OSError) as failure:
        notes.append(f"The {what} cannot be read: {without_folders(str(failure))}")
        return None


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
