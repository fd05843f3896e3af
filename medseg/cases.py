"""Which images to segment: the cases that paths, patterns and lists name, and a shard's share of them."""

from __future__ import annotations

import csv
import glob
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg import io
from medseg.dataset import Case, Dataset
from medseg.errors import InputError

log = logging.getLogger(__name__)

_CHANNEL_FILE = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")
_IMAGE_COLUMN = re.compile(r"^(?:image|channel)_?(\d+)$")
_ID_COLUMNS = ("case", "case_id", "id")
_WILD = re.compile(r"[*?[]")
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


def find_cases(*places: Path | str) -> list[Case]:
    """The images to segment at one or several places.

    Args:
        places: each an image file; a folder of images (one file a case, or files ``CASE_0000``, ``CASE_0001``, ... one
            a channel; hidden files are passed over); a pattern with ``*``, ``?``, ``[...]`` or ``**``, whose folders
            become part of the ids where they vary (``*/ct.nii.gz`` gives ``ANNA_ct``); a dataset.json, or the folder
            that holds one, of which the test cases are taken; or a CSV file with a column ``image`` (or ``image_0``,
            ``image_1``, ... one a channel) of paths relative to it, and perhaps a column ``case`` of ids.

    Returns:
        Cases with different ids, in the order of the places.

    Raises:
        InputError: nothing is found, with what was looked for; two images would have masks of one name; or a CSV file
            that cannot be used, with all its faults.
        DatasetError: the dataset.json cannot be used.
    """
    # files named one by one, as a shell does with a pattern, are grouped into channels as those of a folder
    files = [Path(place) for place in places if _is_image_file(Path(place))]
    cases = _group_channels(files)
    for place in places:
        if Path(place) not in files:
            cases += _cases_at(place)
    if not cases:
        raise InputError("INPUT", "is not given", "an image, a folder, a pattern, a dataset.json or a CSV file")
    return _unique(cases)


def find_masks(place: Path) -> dict[str, Path]:
    """The masks in a folder by their names without ending, or the one mask that is given.

    Args:
        place: a mask, or a folder of them. A DICOM SEG is known by its content; a folder within that holds one is a mask
            too, and has its name.

    Raises:
        InputError: there is none, or two are of one name.
    """
    if place.is_file():
        return {io.name_of(place): place}
    if not place.is_dir():
        raise InputError(place, "is not there", "a mask or a folder of masks")
    masks: dict[str, Path] = {}
    for path in sorted(place.iterdir()):
        if not _is_mask(path):
            continue
        name = path.name if path.is_dir() else io.name_of(path)
        if name in masks:
            raise InputError(path, f"and {masks[name].name} are both masks of {name}", "one mask a case")
        masks[name] = path
    if not masks:
        kinds = "files ending in .nii.gz, .nrrd or another known image ending, or DICOM segmentations"
        raise InputError(place, "holds no masks", kinds)
    return masks


def _is_mask(path: Path) -> bool:
    """Whether a file is a mask by its ending, or a file or folder by its content a DICOM segmentation."""
    if path.name.startswith("."):
        return False
    if path.is_dir() or io.suffix_of(path) in (None, ".dcm", ".zip"):
        from medseg.io import dicom_seg

        return dicom_seg.is_segmentation(path)
    return not _is_second_half(path)


def mask_name(case: Case) -> str:
    """File name of a case's mask: ``CASE.png`` for a picture (``CASE.tif`` for a TIFF), else ``CASE.nii.gz``."""
    if not io.is_picture(case.images[0]):
        return f"{case.id}.nii.gz"
    is_tiff = io.suffix_of(case.images[0]) in (".tif", ".tiff")
    return f"{case.id}{'.tif' if is_tiff else '.png'}"


def probability_name(case: str, label: str) -> str:
    """File of a case's probabilities of a class or region, relative to the folder of the masks."""
    return f"probabilities/{case}/{_UNFIT.sub('_', label)}.nii.gz"


def require_apart(cases: Iterable[Case], out: Path) -> None:
    """Refuse an output folder that holds input images: the masks would be taken for images the next time.

    Raises:
        InputError: see above.
    """
    folder = out.resolve()
    for path in (path for case in cases for path in case.images):
        if path.absolute().parent.resolve() == folder:
            raise InputError(out, f"holds input images, as {path.name}", "a folder of its own for the masks")


def files_of(case: Case) -> Iterator[Path]:
    """Every file that the images of a case consist of: of those in two files (.hdr and .img) both."""
    for path in case.images:
        if io.suffix_of(path) in (".hdr", ".hdr.gz", ".img", ".img.gz", ".mhd"):
            yield from sorted(path.parent.glob(f"{glob.escape(io.name_of(path))}.*"))
        else:
            yield path


def _is_image_file(path: Path) -> bool:
    return path.is_file() and io.suffix_of(path) is not None


def _cases_at(place: Path | str) -> list[Case]:
    """The cases at a place that is no image file."""
    path = Path(place)
    if not path.exists() and _WILD.search(str(place)):
        return _matching(str(place))
    listing = path / "dataset.json" if path.is_dir() else path
    if listing.name.endswith(".json") and listing.is_file():
        return _listed_cases(listing)
    if not path.exists():
        kinds = "an image, a folder of images, a pattern, a dataset.json or a CSV file"
        raise InputError(path, "does not exist", kinds)
    if path.is_file() and path.suffix.lower() == ".csv":
        return _table_cases(path)
    if path.is_file():
        raise InputError(path, "has no known image ending", " ".join(io.SUFFIXES))
    files = _images_of(path.iterdir(), path)
    if not files:
        inner = (child for child in sorted(path.iterdir()) if child.is_dir() and _images_of(child.iterdir(), child))
        found = f"holds no image among its {sum(1 for _ in path.iterdir())} entries"
        first = next(inner, None)
        remedy = f"did you mean {first}?" if first else ""
        raise InputError(path, found, f"files ending in {' '.join(io.SUFFIXES)}", remedy)
    return _group_channels(files)


def _matching(pattern: str) -> list[Case]:
    """The cases of a pattern, each named by its path below the last folder that the pattern spells out."""
    parts = Path(pattern).parts
    fixed = next(n for n, part in enumerate(parts) if _WILD.search(part))
    root = Path(*parts[:fixed])
    folders: dict[Path, list[Path]] = {}
    for path in _images_of(root.glob(str(Path(*parts[fixed:]))), root):
        folders.setdefault(path.parent, []).append(path)
    if not folders:
        raise InputError(pattern, "matches no image", f"files ending in {' '.join(io.SUFFIXES)}")
    cases = []
    for folder, files in sorted(folders.items()):
        prefix = "".join(f"{part}_" for part in folder.relative_to(root).parts)
        cases += [Case(prefix + case.id, case.images, None) for case in _group_channels(files)]
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


def _table_cases(table: Path) -> list[Case]:
    """The cases of a CSV file, whose cells are parted by commas, semicolons or tabs."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            separator = max(",;\t", key=file.readline().count)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=separator)
            rows = list(reader)
            columns = _columns(reader.fieldnames or (), table)
    except (OSError, UnicodeDecodeError, csv.Error) as failure:
        raise InputError(table, f"cannot be read: {failure}", "a CSV file in UTF-8") from None
    cases, faults = [], []
    for line, row in enumerate(rows, start=2):
        cells = [(row.get(column) or "").strip() for column in columns]
        if empty := [column for column, cell in zip(columns, cells, strict=True) if not cell]:
            faults.append(f"row {line} names no {' and no '.join(empty)}")
            continue
        named = next((text for column in _ID_COLUMNS if (text := (row.get(column) or "").strip())), "")
        paths = [table.parent / cell for cell in cells]
        cases += [Case(named or case.id, tuple(paths), None) for case in _group_channels(paths)[:1]]
    if not rows:
        faults.append("it has no rows")
    if faults:
        raise InputError(table, "; ".join(faults), "a path in every row")
    return cases


def _columns(names: Sequence[str], table: Path) -> list[str]:
    """The columns of images: ``image``, or those with a number in the order of the numbers."""
    if "image" in names:
        return ["image"]
    numbered = {int(match[1]): name for name in names if (match := _IMAGE_COLUMN.match(name or ""))}
    if not numbered:
        raise InputError(table, f"has the columns {', '.join(map(str, names))}", "image, or image_0, image_1, ...")
    return [numbered[number] for number in sorted(numbered)]


def _images_of(paths: Iterable[Path], folder: Path) -> list[Path]:
    """The images among paths by name; of a pair of header and image the header; beside volumes no pictures."""
    files = [path for path in sorted(paths) if path.is_file() and not path.name.startswith(".")]
    images = [path for path in files if io.suffix_of(path) and not _is_second_half(path)]
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
        if [path.absolute() for path in other.images] != [path.absolute() for path in case.images]:
            found = f"is the name of several images: {other.images[0]} and {case.images[0]}"
            raise InputError(case.id, found, "one image a case", "give ids in a CSV file: case,image")
    return list(known.values())
