"""Which images to segment: the cases that paths, patterns and lists name, and a shard's share of them."""

from __future__ import annotations

import csv
import glob
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar, get_args

from medseg import io
from medseg.dataset import Case, Dataset
from medseg.errors import InputError, UnreadableFile
from medseg.io import dicom
from medseg.io.dicom import Series, segmentation
from medseg.progress import Progress, part, silent

log = logging.getLogger(__name__)

T = TypeVar("T")
MaskFormat = Literal["nii.gz", "dicom-seg", "seg.nrrd", "nrrd", "mha"]
MASK_FORMATS: tuple[MaskFormat, ...] = get_args(MaskFormat)
"""What masks can be written as."""
_ENDINGS = {"dicom-seg": "dcm"}
_CHANNEL_FILE = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")
_IMAGE_COLUMN = re.compile(r"^(?:image|channel)_?(\d+)$")
_SERIES_COLUMN = re.compile(r"^series(?:_?(\d+))?$")
_ID_COLUMNS = ("case", "case_id", "id")
_WILD = re.compile(r"[*?[]")
_LOOKS = 50
"""So many files of a folder beside images are looked at to see whether there is DICOM in it."""
_UNFIT = re.compile(r"[^\w.+-]+")
"""Letters that a file name had better not have."""


@dataclass(frozen=True)
class Shard:
    """One of several processes that share a list of cases: number ``index`` of ``count``, from 1."""

    index: int
    count: int

    @classmethod
    def of(cls, text: str) -> Shard:
        """A shard from ``i/n``.

        Raises:
            InputError: it is no such text, or i is not one of 1 to n.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError("--shard", f"{text!r} is no shard", "i/n with i from 1 to n, as 2/8")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of_slurm(cls, variables: Mapping[str, str]) -> Shard | None:
        """The shard that a job of a Slurm array is by its environment variables; None outside of an array.

        The numbers of the array are taken from ``SLURM_ARRAY_TASK_MIN``, ``_MAX``, ``_STEP`` and ``_COUNT``
        (https://slurm.schedmd.com/job_array.html): jobs 0 to 7, 1 to 8 and 10, 20, 30 all count from the first.

        Raises:
            InputError: the numbers do not lie evenly, so that they do not say which share is meant.
        """
        prefix = "SLURM_ARRAY_TASK_"
        if f"{prefix}ID" not in variables:
            return None
        names = ("ID", "MIN", "MAX", "STEP", "COUNT")
        given = {name: int(text) for name in names if (text := variables.get(prefix + name, "")).isdigit()}
        own, low, high = given.get("ID"), given.get("MIN"), given.get("MAX")
        if own is not None and low is not None and high is not None:
            count = given.get("COUNT", (high - low) // given.get("STEP", 1) + 1)
            step = (high - low) // (count - 1) if count > 1 else 1
            if low + step * (count - 1) == high and step and (own - low) % step == 0 and low <= own <= high:
                return cls((own - low) // step + 1, count)
        found = ", ".join(f"{prefix}{name}={variables.get(prefix + name, '')}" for name in names)
        raise InputError("Slurm array", f"does not number its jobs evenly: {found}", "", "give --shard i/n")

    @property
    def suffix(self) -> str:
        """What the names of a shard's own files end in: ``-2-of-8``; empty for the only one."""
        return f"-{self.index}-of-{self.count}" if self.count > 1 else ""

    def share(self, cases: Sequence[Case]) -> list[Case]:
        """Every ``count``-th case of the list sorted by id: together the shards have each case once."""
        return sorted(cases, key=lambda case: case.id)[self.index - 1 :: self.count]


def find_cases(
    *places: Path | str, series: Sequence[str] = (), resample_irregular: bool = False, progress: Progress = silent
) -> list[Case]:
    """The images to segment at one or several places.

    Args:
        places: each an image file; a folder of images (one file a case, or files ``CASE_0000``, ``CASE_0001``, ... one
            a channel; hidden files are passed over); a folder without images, a zip or a file of DICOM, of which each
            study is a case; a pattern with ``*``, ``?``, ``[...]`` or ``**``, whose folders become part of the ids of
            files where they vary (``*/ct.nii.gz`` gives ``ANNA_ct``), and which may match folders and zips of DICOM; a
            dataset.json, or the folder that holds one, of which the test cases are taken; or a CSV file with a column
            ``image`` (or ``image_0``, ``image_1``, ... one a channel) of paths relative to it, and perhaps a column
            ``case`` of ids and ``series`` (``series_0``, ...) of patterns of series.
        series: which DICOM series of a study are meant, one pattern a channel (see ``medseg.io.dicom.select``);
            without any the only usable series of the study. Images that are no DICOM are taken as they are.
        resample_irregular: take tilted and uneven series too, to be read on a straight grid.
        progress: told how many of the headers of DICOM are read.

    Returns:
        Cases with different ids, in the order of the places. Those of DICOM are named by a digest of the UID of their
        first series. A study whose series cannot be used, or that leaves open which is meant (then named ``study_`` and
        a digest), is a case that fails when it is read, with the reason.

    Raises:
        InputError: nothing is found, with what was looked for; two images would have masks of one name; or a CSV file
            that cannot be used, with all its faults.
        IncompleteSeries, UnreadableFile: no study has a series that can be used.
        DatasetError: the dataset.json cannot be used.
    """
    wanted = _Wanted(tuple(series), resample_irregular, progress)
    # files named one by one, as a shell does with a pattern, are grouped into channels as those of a folder
    files = [Path(place) for place in places if Path(place).is_file() and _is_image(Path(place))]
    cases = _group_channels(files)
    others = [place for place in places if Path(place) not in files]
    for one, place in wanted.each(others):
        cases += one.cases_at(place)
    if not cases:
        raise InputError("INPUT", "is not given", "an image, a folder, a pattern, a dataset.json or a CSV file")
    plain = [case.paths[0] for case in cases if not any(isinstance(image, Series) for image in case.images)]
    if len(plain) == len(cases) and series:
        raise InputError("--series", f"picks series of DICOM, and {plain[0]} is none", "folders, zips or files of it")
    _require_one_usable(cases)
    return _unique(cases)


def find_masks(place: Path) -> dict[str, Path]:
    """The masks in a folder by their names without ending, or the one mask that is given.

    Args:
        place: a mask, a folder of them, or a pattern with ``*``, ``?``, ``[...]`` or ``**``. A DICOM SEG is known by
            its content; a folder within that holds one is a mask too, and has its name.

    Raises:
        InputError: there is none, or two are of one name.
    """
    if place.is_file():
        return {printable(io.name_of(place)): place}
    if place.is_dir():
        found = sorted(place.iterdir())
    elif _WILD.search(str(place)):
        _, found = _globbed(str(place))
    else:
        raise InputError(place, "is not there", "a mask, a folder of masks, or a pattern")
    masks: dict[str, Path] = {}
    for path in found:
        if not _is_mask(path):
            continue
        name = printable(path.name if path.is_dir() else io.name_of(path))
        if name in masks:
            remedy = "say which with a pattern, as 'masks/*.nii.gz'"
            raise InputError(path, f"and {masks[name].name} are both masks of {name}", "one mask a case", remedy)
        masks[name] = path
    if not masks:
        kinds = "files ending in .nii.gz, .nrrd or another known image ending, or DICOM segmentations"
        raise InputError(place, "holds no masks", kinds)
    return masks


def printable(name: str) -> str:
    """A file name as text that can be written: bytes that are no text, and breaks of lines, are spelled out."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c.encode("unicode_escape").decode() if c in "\r\n" else c for c in text)


def _globbed(pattern: str) -> tuple[Path, list[Path]]:
    """The last folder that a pattern spells out, and what the pattern matches."""
    parts = Path(pattern).parts
    fixed = next(n for n, part in enumerate(parts) if _WILD.search(part))
    root = Path(*parts[:fixed])
    return root, sorted(root.glob(str(Path(*parts[fixed:]))))


def _is_mask(path: Path) -> bool:
    """Whether a file is a mask by its ending, or a file or folder by its content a DICOM segmentation."""
    if path.name.startswith("."):
        return False
    if path.is_dir() or io.suffix_of(path) in (None, ".dcm", ".zip"):
        return segmentation.is_segmentation(path)
    return not _is_second_half(path)


def mask_name(case: Case, form: str = "nii.gz") -> str:
    """File name of a case's mask in one of ``MASK_FORMATS``; instead of nii.gz that of a picture is .png or .tif."""
    if form != "nii.gz" or not io.is_picture(case.images[0]):
        return f"{case.id}.{_ENDINGS.get(form, form)}"
    is_tiff = io.suffix_of(case.paths[0]) in (".tif", ".tiff")
    return f"{case.id}{'.tif' if is_tiff else '.png'}"


def mask_names(case: Case, formats: Sequence[str]) -> tuple[str, ...]:
    """File names of a case's masks, one a format."""
    return tuple(mask_name(case, form) for form in formats)


def probability_name(case: str, label: str) -> str:
    """File of a case's probabilities of a class or region, relative to the folder of the masks."""
    return f"probabilities/{case}/{_UNFIT.sub('_', label)}.nii.gz"


def require_apart(cases: Iterable[Case], out: Path) -> None:
    """Refuse an output folder that holds input images: the masks would be taken for images the next time.

    Raises:
        InputError: see above.
    """
    folder = out.resolve()
    for case in cases:
        for source, place in zip(case.images, case.paths, strict=True):
            files = source.files if isinstance(source, Series) else ()
            holders = {path.parent for path in files} | {place if place.is_dir() else place.parent}
            if folder in {holder.resolve() for holder in holders}:
                raise InputError(out, f"holds input images, as {place.name}", "a folder of its own for the masks")


def files_of(case: Case) -> Iterator[Path]:
    """Every file that the images of a case consist of: of those in two files (.hdr and .img) both."""
    for source in case.images:
        if isinstance(source, Series):
            yield from source.files
        elif io.suffix_of(source) in (".hdr", ".hdr.gz", ".img", ".img.gz", ".mhd"):
            yield from sorted(source.parent.glob(f"{glob.escape(io.name_of(source))}.*"))
        else:
            yield source


@dataclass(frozen=True)
class _Wanted:
    """What is taken of DICOM.

    Attributes:
        patterns: of series, one a channel; none for the only usable series.
        resample_irregular: whether tilted and uneven series are taken too.
        progress: told how many of the headers are read.
    """

    patterns: tuple[str, ...]
    resample_irregular: bool
    progress: Progress

    def each(self, places: Sequence[T]) -> Iterator[tuple[_Wanted, T]]:
        """Go through places, each with a share of the progress."""
        for n, place in enumerate(places):
            yield replace(self, progress=part(self.progress, n, len(places))), place

    def cases_at(self, place: Path | str) -> list[Case]:
        """The cases at a place that is no image file."""
        path = Path(place)
        if not path.exists() and _WILD.search(str(place)):
            return self.matching(str(place))
        listing = path / "dataset.json" if path.is_dir() else path
        if listing.name.endswith(".json") and listing.is_file():
            return [one.located(case) for one, case in self.each(_listed_cases(listing))]
        if not path.exists():
            kinds = "an image, a folder of images or DICOM, a zip, a pattern, a dataset.json or a CSV file"
            raise InputError(path, "does not exist", kinds)
        if path.is_dir():
            return self.folder(path)
        if path.suffix.lower() == ".csv":
            return self.table(path)
        if not io.is_dicom(path):
            raise InputError(path, "has no known image ending", " ".join(io.SUFFIXES))
        if cases := self.studies(path):
            return cases
        raise InputError(path, "holds no DICOM image", "a series of CT, MR or PET images")

    def folder(self, path: Path) -> list[Case]:
        """The cases of a folder: its images, or the studies in it and below it; pictures beside DICOM are previews."""
        files = _images_of(path.iterdir(), path)
        prefers_dicom = bool(self.patterns) or (bool(files) and io.is_picture(files[0]) and _has_slices(path))
        cases = self.studies(path) if prefers_dicom or not files else []
        if cases and files and not io.is_picture(files[0]):
            log.warning("%s: images beside DICOM are passed over, as %s", path, files[0].name)
        if files and not cases:
            if beside := next((child for child in sorted(path.iterdir()) if _holds_dicom(child)), None):
                log.warning("%s: DICOM beside images is passed over: name %s too if it is meant", path, beside)
            cases = _group_channels(files)
        if cases:
            return cases
        inner = (child for child in sorted(path.iterdir()) if child.is_dir() and _images_of(child.iterdir(), child))
        found = f"holds no image among its {sum(1 for _ in path.iterdir())} entries"
        first = next(inner, None)
        remedy = f"did you mean {first}?" if first else ""
        raise InputError(path, found, f"DICOM, or files ending in {' '.join(io.SUFFIXES)}", remedy)

    def matching(self, pattern: str) -> list[Case]:
        """The cases of a pattern: images, each named by its path below the last folder spelled out, and DICOM."""
        root, found = _globbed(pattern)
        images = _images_of(found, root)
        places = [path for path in found if not path.name.startswith(".") and io.is_dicom(path)]
        of_dicom = []
        for one, place in self.each([path for path in places if not set(path.parents).intersection(places)]):
            of_place = one.studies(place)
            if not of_place:
                log.warning("%s: holds no DICOM image, and is passed over", place)
            of_dicom += of_place
        if of_dicom and images and io.is_picture(images[0]):
            log.warning("%s: pictures beside DICOM are passed over, as %s", pattern, images[0].name)
            images = []
        cases = [*_matching(images, root), *of_dicom]
        if not cases:
            raise InputError(pattern, "matches no image", f"DICOM, or files ending in {' '.join(io.SUFFIXES)}")
        return cases

    def table(self, table: Path) -> list[Case]:
        """The cases of a CSV file."""
        rows, columns, patterns = _rows(table)
        cases = []
        for wanted, (line, row) in self.each(rows):
            named = _id_of(row)
            paths = [table.parent / _cell(row, column) for column in columns]
            own = tuple(text for column in patterns if (text := _cell(row, column)))
            if any(io.is_dicom(path) for path in paths):
                case = replace(wanted, patterns=own or self.patterns).of_row(paths, f"{table}, row {line}")
            else:
                case = replace(_group_channels(paths)[0], images=tuple(paths))
            cases.append(replace(case, id=named) if named else case)
        return cases

    def of_row(self, paths: Sequence[Path], where: str) -> Case:
        """The case of several places, one a channel, or of one place for all channels."""
        patterns = self.patterns or ("",) * len(paths)
        places = list(paths) * len(patterns) if len(paths) == 1 else list(paths)
        if len(places) != len(patterns):
            found = f"{len(patterns)} series do not fit its {len(paths)} images"
            raise InputError(where, found, "one series an image")
        sources: list[io.Source] = []
        for one, (place, pattern) in self.each(list(zip(places, patterns, strict=True))):
            try:
                is_series = io.is_dicom(place)
                series = io.series(place, pattern, self.resample_irregular, one.progress) if is_series else place
                sources.append(series)
            except InputError as failure:
                return _failing(where, place, failure)
        return Case(io.name_of(sources[0]), tuple(sources), None)

    def located(self, case: Case) -> Case:
        """A case with its places as series."""
        if not any(io.is_dicom(path) for path in case.paths):
            return case
        return replace(self.of_row(case.paths, case.id), id=case.id)

    def studies(self, place: Path) -> list[Case]:
        """A case a study of a folder, zip or file; none where there is no DICOM."""
        try:
            found = dicom.scan(place, self.progress)
            if not found.series and set(found.passed_over) - {"no DICOM"}:
                dicom.select(found)  # says what there is instead
        except InputError as failure:
            return [_failing(str(place), place, failure)]
        studies: dict[str, list[Series]] = {}
        for one in found.series:
            studies.setdefault(one.study_uid, []).append(one)
        by_uid = {one.study_uid for one in found.series for pattern in self.patterns if _is_named(one, pattern)}
        return [self.study(place, studies[uid]) for uid in (by_uid or studies)]

    def study(self, place: Path, study: Sequence[Series]) -> Case:
        """The case of a study; its series may be unusable."""
        scan, chosen = dicom.Scan(tuple(study), {}, place), list[Series]()
        for pattern in self.patterns or ("",):
            try:
                chosen += dicom.chosen(scan, pattern, resample_irregular=self.resample_irregular)
            except InputError as failure:
                return _failing(study[0].study_uid, place, failure)
        return Case(chosen[0].name, tuple(chosen), None)


def _is_named(series: Series, pattern: str) -> bool:
    """Whether a pattern is the name or UID of a series, with its part or without."""
    return pattern.partition("[")[0] in (series.uid, series.name)


def _failing(key: str, place: Path, failure: InputError) -> Case:
    """A case that fails when it is read, for the reason that the failure has: which series is meant, nothing says."""
    reason = str(failure).removeprefix(f"{failure.where}: ")
    none = Series(place, "", key, "", "", "", "", (), None, "", "", reason, damaged=isinstance(failure, UnreadableFile))
    return Case(f"study_{hashlib.sha256(key.encode()).hexdigest()[:12]}", (none,), None)


def _has_slices(folder: Path) -> bool:
    return any(io.suffix_of(child) == ".dcm" for child in folder.iterdir())


def _holds_dicom(place: Path) -> bool:
    """Whether a file is DICOM, or one of the first files of a folder or zip, hidden ones aside."""
    if place.name.startswith("."):
        return False
    if place.is_dir():
        files = (path for path in place.rglob("*") if path.is_file())
        return any(dicom.is_dicom(path) for path in islice(files, _LOOKS))
    return io.is_dicom(place)


def _require_one_usable(cases: Sequence[Case]) -> None:
    """Refuse a list whose cases have all failed already.

    Raises:
        IncompleteSeries: it is one.
    """
    failed = [next((one for one in case.images if isinstance(one, Series) and one.reason), None) for case in cases]
    if (first := failed[0]) is None or None in failed:
        return
    try:
        dicom.check(first)
    except InputError as failure:
        if len(cases) == 1:
            raise
        where = f"{failure.where} (the first of {len(cases)} that cannot be used)"
        raise type(failure)(where, failure.found, failure.expected, failure.remedy) from None


def _is_image(path: Path) -> bool:
    """Whether a file is an image by its ending, and not DICOM."""
    return io.suffix_of(path) not in (None, *dicom.SUFFIXES)


def _matching(images: Iterable[Path], root: Path) -> list[Case]:
    """Images as cases, each named by its path below a folder."""
    folders: dict[Path, list[Path]] = {}
    for path in images:
        folders.setdefault(path.parent, []).append(path)
    cases = []
    for folder, files in sorted(folders.items()):
        prefix = "".join(f"{part}_" for part in folder.relative_to(root).parts)
        cases += [replace(case, id=prefix + case.id) for case in _group_channels(files)]
    return cases


def _listed_cases(listing: Path) -> list[Case]:
    dataset = Dataset.open(listing)
    missing = " ".join(fault.found for fault in dataset.faults if fault.kind == "missing-test")
    if not dataset.test:
        found = f"has no test case to segment {missing}".strip()
        raise InputError(listing, found, "a test list whose images are there", "give a folder of images")
    if missing:
        log.warning("%s", missing)
    return list(dataset.test)


def _rows(table: Path) -> tuple[list[tuple[int, dict[str, str]]], list[str], list[str]]:
    """A CSV file, whose cells are parted by commas, semicolons or tabs: rows by line, columns of images and series.

    Raises:
        InputError: it cannot be read, or is no list of images; with all its faults.
    """
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            separator = max(",;\t", key=file.readline().count)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=separator)
            rows = list(enumerate(reader, start=2))
            columns = _columns(reader.fieldnames or (), table)
            patterns = _numbered(reader.fieldnames or (), _SERIES_COLUMN)
    except (OSError, UnicodeDecodeError, csv.Error) as failure:
        raise InputError(table, f"cannot be read: {failure}", "a CSV file in UTF-8") from None
    empty = {line: [column for column in columns if not _cell(row, column)] for line, row in rows}
    faults = [f"row {line} names no {' and no '.join(names)}" for line, names in empty.items() if names]
    ids = ((line, _id_of(row)) for line, row in rows)
    faults += [
        f"row {line} names its case {name!r}, which cannot name a mask" for line, name in ids if Path(name).name != name
    ]
    if not rows:
        faults.append("it has no rows")
    if faults:
        raise InputError(table, "; ".join(faults), "a path in every row, ids without slashes")
    return rows, columns, patterns


def _id_of(row: Mapping[str, str]) -> str:
    """How a row names its case; empty where it does not."""
    return next((text for column in _ID_COLUMNS if (text := _cell(row, column))), "")


def _cell(row: Mapping[str, str], column: str) -> str:
    return (row.get(column) or "").strip()


def _columns(names: Sequence[str], table: Path) -> list[str]:
    """The columns of images: ``image``, or those with a number in the order of the numbers."""
    if "image" in names:
        return ["image"]
    numbered = _numbered(names, _IMAGE_COLUMN)
    if not numbered:
        raise InputError(table, f"has the columns {', '.join(map(str, names))}", "image, or image_0, image_1, ...")
    return numbered


def _numbered(names: Sequence[str], kind: re.Pattern[str]) -> list[str]:
    """The columns of a kind in the order of their numbers."""
    found = {int(match[1] or 0): name for name in names if (match := kind.match(name or ""))}
    return [found[number] for number in sorted(found)]


def _images_of(paths: Iterable[Path], folder: Path) -> list[Path]:
    """The images among paths by name; of a pair of header and image the header; beside volumes no pictures."""
    files = [path for path in sorted(paths) if path.is_file() and not path.name.startswith(".")]
    images = [path for path in files if _is_image(path) and not _is_second_half(path)]
    volumes = [path for path in images if not io.is_picture(path)]
    if volumes and len(volumes) < len(images):  # previews, as many programs make them
        log.warning("%s: %d pictures beside volumes are passed over", folder, len(images) - len(volumes))
    return volumes or images


def _is_second_half(path: Path) -> bool:
    return io.suffix_of(path) in (".img", ".img.gz") and any(
        path.with_name(io.name_of(path) + ending).exists() for ending in (".hdr", ".hdr.gz")
    )


def _group_channels(files: Sequence[Path]) -> list[Case]:
    """Files as cases: one a channel where all names end in a number and some in ``_0000``, else one a case.

    Files of one name and several endings become one case, which is refused when its turn comes.
    """
    matches = [_CHANNEL_FILE.match(io.name_of(path)) for path in files]
    numbered = all(matches) and any(match["channel"] == "0000" for match in matches if match)
    groups: dict[tuple[Path, str], list[Path]] = {}
    for path, match in zip(files, matches, strict=True):
        name = match["case"] if match and numbered else io.name_of(path)
        groups.setdefault((path.parent, name), []).append(path)
    return [Case(name, tuple(sorted(paths)), None) for (_, name), paths in groups.items()]


def _unique(cases: Sequence[Case]) -> list[Case]:
    """The cases without those that are named twice.

    Raises:
        InputError: two different ones have one id, so that their masks would have one name.
    """
    known: dict[str, Case] = {}
    for case in cases:
        other = known.setdefault(case.id, case)
        if [_key(source) for source in other.images] != [_key(source) for source in case.images]:
            found = f"is the name of several images: {other.paths[0]} and {case.paths[0]}"
            is_series = isinstance(case.images[0], Series)
            whole = "give the folder that holds all files of the series, or " if is_series else ""
            raise InputError(case.id, found, "one image a case", f"{whole}give ids in a CSV file: case,image")
    return list(known.values())


def _key(source: io.Source) -> object:
    """What makes two images the same."""
    return (
        (source.study_uid, source.uid, source.part, source.files) if isinstance(source, Series) else source.absolute()
    )
