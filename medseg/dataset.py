"""Datasets: which files belong to which case, what they should hold, and whether they do.

A dataset is a folder with a ``dataset.json``, either as the Medical Segmentation Decathlon ships it (lists of files,
labels keyed by value, channels as a fourth dimension) or as nnU-Net v2 wants it (labels keyed by name, one file a
channel with the endings ``_0000``, ``_0001``). Nothing is renamed or copied.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DatasetError, InputError, MedsegError
from medseg.geometry import Geometry
from medseg.io import FORMATS, describe_grid, finite_float32, integral, name_of, suffix_of
from medseg.progress import Progress, silent, track
from medseg.records import Record, digest_file, digest_of, read_json
from medseg.volume import Labels, Volume

FOLD_SEED = 12345
"""Seed of the shuffled folds, nnU-Net's (``generate_crossval_split``), so that scores can be compared fold by fold."""

FOREIGN_GROUP = 4
"""Fewest cases among which one can be called foreign."""
FOREIGN_MEAN_FACTOR = 4.0
"""A grid is foreign where the mean over the axes of spacing or extent is this many times the median case's. Distances
of CT slices from 0.8 to 8 mm change the mean spacing by 2.2."""
FOREIGN_AXIS_FACTOR = 12.0
"""... or where one axis by itself is this many times off: more than any mixture of slice distances (0.6 to 8 mm from a
median of 1 or 5 mm), less than a unit mistaken for another."""
FOREIGN_SPREADS = 6.0
"""... and it also lies this many robust standard deviations from the median, so that a dataset which is varied by
nature has no foreign cases."""
FOREIGN_NEGATIVE = (0.001, 0.1)
"""Fractions of negative voxels that count as none and as many: the one mark of modality that does not depend on the
scale of an image (MR maxima within one dataset run from 112 to 1.7e6). CT has air and fat below 0, raw MR nothing."""
FOREIGN_CT_FACTOR = 20.0
"""CT has a scale: a 99th percentile this many times off is no Hounsfield unit."""
SAMPLE_VOXELS = 1_000_000
"""Intensities are looked at on at most this many evenly spaced voxels of a channel."""

_FOLDERS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
_CHANNEL = re.compile(r"^(?P<id>.+)_(?P<channel>\d{4})$")


@dataclass(frozen=True)
class Case:
    """One patient's images and, for a labelled case, the label file.

    Attributes:
        id: name of the case, unique among the cases of a dataset.
        images: one file whose fourth dimension is the channels, or one file a channel.
        label: the mask, or None where there is none.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the case."""
        return (*self.images, self.label) if self.label else self.images


@dataclass(frozen=True)
class Fold:
    """Ids to train on and ids held out, both sorted."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


class Finding(Record):
    """One fault of a dataset.

    Attributes:
        case: its id, or "" for the dataset as a whole.
        kind: a short, stable word for programs.
        unusable: the case must not be trained or scored with as it is; otherwise the finding is a warning.
        found: what is wrong, with the figures.
        remedy: what to do about it.
    """

    case: str
    kind: str
    unusable: bool
    found: str
    remedy: str


class Findings(Record):
    """Everything that ``check`` found, warnings included; empty where the dataset is sound."""

    findings: tuple[Finding, ...]
    cases_checked: int

    @property
    def unusable_cases(self) -> tuple[str, ...]:
        """Sorted ids of the cases with a fault that keeps them from being used."""
        return tuple(sorted({f.case for f in self.findings if f.unusable}))

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings of each kind, by kind."""
        return dict(sorted(Counter(f.kind for f in self.findings).items()))

    def of(self, case: str) -> tuple[Finding, ...]:
        """The findings of one case; of the dataset as a whole for ""."""
        return tuple(f for f in self.findings if f.case == case)


@dataclass(frozen=True)
class Dataset:
    """The cases of a dataset, without their pixels.

    Attributes:
        name: for people.
        root: the folder of ``dataset.json``.
        channels: names, in order.
        labels: what the masks hold.
        cases: labelled training cases, sorted by id.
        test: cases kept apart, sorted by id; most have no label.
        faults: what was already amiss in the list of files; part of what ``check`` reports.
    """

    name: str
    root: Path
    channels: tuple[str, ...]
    labels: Labels
    cases: tuple[Case, ...]
    test: tuple[Case, ...] = ()
    faults: tuple[Finding, ...] = ()

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Read the list of a dataset; no image is opened.

        Args:
            path: a folder with a ``dataset.json``, or the ``dataset.json`` itself.

        Raises:
            DatasetError: there is no ``dataset.json``, it lacks channels, labels or cases, or none of the files that
                it speaks of exists.
            InputError: ``dataset.json`` cannot be read or is no JSON object.
        """
        listing = _find_listing(path)
        root = listing.parent
        body = read_json(listing)
        channels = _read_channels(body, listing)
        labels = _read_labels(body, listing)
        training, test = _read_cases(body, listing, channels)
        cases, faults = _unique(training, root)
        apart, test_faults = _unique(test, root)
        apart, both = _apart_from(cases, apart)
        _require_files(cases, root, listing)
        absent = [case for case in apart if not all(file.exists() for file in case.images)]
        faults += test_faults + both + _absent_tests(absent, apart) + _miscount(body, training)
        faults += _surplus(root, listing, [*training, *test])
        present = tuple(case for case in apart if case not in absent)
        name = str(body.get("name") or root.resolve().name)
        return cls(name, root, channels, labels, cases, present, tuple(faults))

    def case(self, case_id: str) -> Case:
        """The case of that id, from the training cases or else the test cases.

        Raises:
            DatasetError: there is none; similar ids are listed.
        """
        for case in (*self.cases, *self.test):
            if case.id == case_id:
                return case
        known = ", ".join(case.id for case in self.cases[:5])
        raise DatasetError(self.root, f"has no case {case_id!r}", f"one of its {len(self.cases)} cases, as {known}")

    def only(self, ids: Collection[str]) -> Dataset:
        """The dataset with only these cases.

        Raises:
            DatasetError: an id is unknown; every unknown one is listed.
        """
        unknown = sorted(set(ids) - {case.id for case in (*self.cases, *self.test)})
        if unknown:
            raise DatasetError(self.root, f"has no case {', '.join(unknown)}", "ids of cases in dataset.json")
        return self._kept(set(ids))

    def without(self, ids: Collection[str]) -> Dataset:
        """The dataset without these cases; ids that it does not have are of no matter."""
        return self._kept({case.id for case in (*self.cases, *self.test)} - set(ids))

    def folds(self, count: int = 5) -> tuple[Fold, ...]:
        """Split the training cases for cross-validation, as nnU-Net does.

        The same lists as scikit-learn's ``KFold(count, shuffle=True, random_state=12345)`` on the sorted ids. With
        fewer cases than folds there is one fold a case.

        Raises:
            DatasetError: fewer than two cases; one cannot be trained and validated with.
        """
        ids = sorted(case.id for case in self.cases)
        if len(ids) < 2:
            raise DatasetError(self.root, f"has {len(ids)} labelled cases", "two at least, to train and to validate")
        order = np.arange(len(ids))
        np.random.RandomState(FOLD_SEED).shuffle(order)  # the legacy generator, as scikit-learn
        held_out = [set(part.tolist()) for part in np.array_split(order, max(2, min(count, len(ids))))]
        return tuple(
            Fold(
                tuple(case for n, case in enumerate(ids) if n not in part),
                tuple(case for n, case in enumerate(ids) if n in part),
            )
            for part in held_out
        )

    def digest(self) -> str:
        """SHA-256 (hex) over ids, channels, labels and the content of every file of the labelled cases."""
        content = [
            [case.id, len(case.images), *(digest_file(file) if file.exists() else "missing" for file in case.files)]
            for case in self.cases
        ]
        return digest_of([list(self.channels), self.labels.model_dump(mode="json"), content])

    def _kept(self, ids: set[str]) -> Dataset:
        return replace(
            self,
            cases=tuple(case for case in self.cases if case.id in ids),
            test=tuple(case for case in self.test if case.id in ids),
            faults=tuple(fault for fault in self.faults if not fault.case or fault.case in ids),
        )


def check(dataset: Dataset, progress: Progress = silent) -> Findings:
    """Find every fault of a dataset in one pass: each file is read once, one case is in memory at a time.

    A case that cannot be read is reported and the rest goes on. Grids and intensities are also compared with those of
    the other cases; what counts as foreign is said beside the ``FOREIGN_`` constants.

    Returns:
        Findings, the dataset's own first and then by case; none for a sound dataset.
    """
    findings = list(dataset.faults)
    looks = []
    everything = [*dataset.cases, *dataset.test]
    for case in track(everything, "checking", progress):
        look, faults = _look_at(case, dataset)
        looks.append(look)
        findings += faults
    findings += _classes_missing(looks, dataset.labels)
    findings += _foreign_grids(looks)
    for channel, name in enumerate(dataset.channels):
        findings += _foreign_intensities(looks, channel, name)
    findings += _copies(looks, len(dataset.cases))
    return Findings(findings=tuple(sorted(findings, key=lambda f: f.case)), cases_checked=len(everything))


def _fault(case: str, kind: str, found: str, remedy: str) -> Finding:
    return Finding(case=case, kind=kind, unusable=True, found=found, remedy=remedy)


def _warning(case: str, kind: str, found: str, remedy: str) -> Finding:
    return Finding(case=case, kind=kind, unusable=False, found=found, remedy=remedy)


# ---- dataset.json ----------------------------------------------------------------------------------------------------


def _find_listing(path: Path) -> Path:
    listing = path / "dataset.json" if path.is_dir() else path
    if listing.is_file():
        return listing
    if not path.exists():
        raise DatasetError(path, "does not exist", "a folder with a dataset.json", "correct the path")
    names = sorted(child.name for child in path.iterdir())
    held = f"it holds {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "it is empty"
    inner = [child for child in sorted(path.iterdir()) if (child / "dataset.json").is_file()]
    raise DatasetError(
        path,
        f"has no dataset.json; {held}",
        "the folder of a Decathlon task, or an nnU-Net dataset",
        f"did you mean {inner[0]}?"
        if inner
        else "unpack the whole task: its dataset.json says which files belong together",
    )


def _read_channels(body: Mapping[str, Any], listing: Path) -> tuple[str, ...]:
    named = body.get("channel_names", body.get("modality"))
    if isinstance(named, str):
        named = [named]
    if isinstance(named, dict):
        if not all(str(key).isdigit() for key in named):
            raise DatasetError(listing, f"channels are keyed {list(named)}", 'numbers, as {"0": "CT"}')
        named = [named[key] for key in sorted(named, key=int)]
    if not named or not isinstance(named, list):
        raise DatasetError(listing, "names no channels", '"modality" or "channel_names", as {"0": "MRI"}')
    return tuple(str(name) for name in named)


def _read_labels(body: Mapping[str, Any], listing: Path) -> Labels:
    named = body.get("labels")
    if not isinstance(named, dict) or not named:
        raise DatasetError(listing, "has no labels", 'labels as {"0": "background", "1": "liver"}')
    by_name = _by_value(named, listing) if all(isinstance(v, str) for v in named.values()) else named
    values: dict[str, int] = {}
    regions: dict[str, tuple[int, ...]] = {}
    ignore = None
    for name, value in by_name.items():
        members = _integers(value, name, listing)
        if len(members) > 1:
            regions[name] = members
        elif name.casefold() == "ignore":
            ignore = members[0]
        elif members[0] != 0:
            values[name] = members[0]
    for member in sorted({m for members in regions.values() for m in members} - set(values.values())):
        values[f"label_{member}"] = member
    return Labels.checked({"values": values, "regions": regions, "ignore": ignore}, f"{listing}, labels", DatasetError)


def _by_value(named: Mapping[str, str], listing: Path) -> dict[str, int]:
    """The Decathlon's {"1": "liver"} turned round."""
    repeated = [name for name, count in Counter(named.values()).items() if count > 1]
    if repeated:
        raise DatasetError(listing, f"label names {repeated} stand for several values", "one name a value")
    return {name: _integers(value, name, listing)[0] for value, name in named.items()}


def _integers(value: Any, name: str, listing: Path) -> tuple[int, ...]:
    members = value if isinstance(value, list) else [value]
    try:
        if members and not any(isinstance(m, bool) or (isinstance(m, float) and m % 1) for m in members):
            return tuple(int(m) for m in members)
    except (TypeError, ValueError):
        pass
    raise DatasetError(listing, f"label {name!r} has the value {value!r}", "an integer, or a list of them for a region")


def _read_cases(body: Mapping[str, Any], listing: Path, channels: Sequence[str]) -> tuple[list[Case], list[Case]]:
    root = listing.parent
    ending = str(body.get("file_ending") or ".nii.gz")
    if isinstance(body.get("dataset"), dict):
        training = [_listed(item, root, listing, case_id) for case_id, item in body["dataset"].items()]
        return training, _discovered(root, "Ts", ending, len(channels))
    if isinstance(body.get("training"), list):
        training = [_listed(item, root, listing) for item in body["training"]]
        return training, [_listed(item, root, listing) for item in body.get("test") or []]
    training = _discovered(root, "Tr", ending, len(channels))
    return training, _discovered(root, "Ts", ending, len(channels))


def _listed(item: Any, root: Path, listing: Path, case_id: str = "") -> Case:
    """A case from an entry of a list: a path, or {"image": path or paths, "label": path}."""
    if isinstance(item, str):
        item = {"image": item}
    images = item.get("image", item.get("images")) if isinstance(item, dict) else None
    label = item.get("label") if isinstance(item, dict) else None
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in [*names, label or ""]):
        raise DatasetError(listing, f"an entry is {str(item)[:80]}", '{"image": "imagesTr/a.nii.gz", "label": ...}')
    paths = tuple(root / name for name in names)
    mask = root / label if label else None
    return Case(case_id or _id_of(paths, mask), paths, mask)


def _id_of(images: tuple[Path, ...], label: Path | None) -> str:
    name = name_of(images[0])
    match = _CHANNEL.match(name)
    if match and (len(images) > 1 or (label is not None and name_of(label) == match["id"])):
        return match["id"]
    return name


def _discovered(root: Path, part: str, ending: str, channels: int) -> list[Case]:
    """Cases of an nnU-Net dataset from the file names in ``imagesTr`` and ``labelsTr`` (or ``Ts``).

    A case that has only a label, or only an image among training cases, gets the path where the other should be.
    """
    images, labels = root / f"images{part}", root / f"labels{part}"
    stems = [file.name.removesuffix(ending) for file in _files(images) if file.name.endswith(ending)]
    ids = {match["id"] for stem in stems if (match := _CHANNEL.match(stem))}
    masks = {file.name.removesuffix(ending) for file in _files(labels) if file.name.endswith(ending)}
    if part == "Tr":
        ids |= masks
    cases = []
    for case_id in sorted(ids):
        paths = tuple(images / f"{case_id}_{channel:04d}{ending}" for channel in range(channels))
        expected = part == "Tr" or case_id in masks
        cases.append(Case(case_id, paths, labels / f"{case_id}{ending}" if expected else None))
    return cases


def _files(folder: Path) -> list[Path]:
    """The visible files of a folder by name; none where there is no such folder."""
    return [file for file in _all_files(folder) if not file.name.startswith(".")]


def _all_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []


def _unique(cases: Iterable[Case], root: Path) -> tuple[tuple[Case, ...], list[Finding]]:
    """The cases sorted by id, each id once, and what was wrong with them."""
    kept: dict[str, Case] = {}
    folded: dict[str, str] = {}
    faults = []
    for case in sorted(cases, key=lambda c: (c.id, c.files)):
        first = kept.setdefault(case.id, case)
        twin = folded.setdefault(case.id.casefold(), case.id)
        if first is not case and first == case:
            faults.append(
                _warning(case.id, "listed-twice", "is listed twice", "remove one of the entries; it is used once")
            )
        elif first is not case or twin != case.id:
            others = ", ".join(_short(file, root) for file in (*kept[twin].images, *case.images))
            faults.append(
                _fault(
                    case.id,
                    "duplicate-id",
                    f"has the same id as another case (capitals aside): {others}",
                    "keep one of them, or give it another file name",
                )
            )
    return tuple(kept[case_id] for case_id in sorted(kept)), faults


def _apart_from(cases: Sequence[Case], test: Sequence[Case]) -> tuple[tuple[Case, ...], list[Finding]]:
    """The test cases without those that are listed for training too, and a finding for each of these."""
    training = {case.id: case for case in cases}
    faults = []
    for case in test:
        if case.id not in training:
            continue
        if case.images == training[case.id].images:
            faults.append(
                _warning(
                    case.id, "leak", "is listed for training and for testing", "remove one entry; it is trained on only"
                )
            )
        else:
            faults.append(
                _fault(
                    case.id,
                    "duplicate-id",
                    "is the id of a training case and of another test case",
                    "rename one of them",
                )
            )
    return tuple(case for case in test if case.id not in training), faults


def _require_files(cases: Sequence[Case], root: Path, listing: Path) -> None:
    if not cases:
        folder = root / "imagesTr"
        names = [file.name for file in _all_files(folder)]
        held = f"{folder} holds {', '.join(names[:5])}" if names else f"{folder} is missing or empty"
        raise DatasetError(listing, f"no labelled case was found; {held}", 'a list "training", or imagesTr/ID_0000.*')
    if not any(file.exists() for case in cases for file in case.files):
        raise DatasetError(
            listing,
            f"none of the files of its {len(cases)} cases exists, as {_short(cases[0].files[0], root)}",
            f"paths relative to {root}",
            "unpack the images beside dataset.json",
        )


def _absent_tests(absent: Sequence[Case], test: Sequence[Case]) -> list[Finding]:
    if not absent:
        return []
    names = ", ".join(case.id for case in absent[:5]) + (" ..." if len(absent) > 5 else "")
    return [
        _warning(
            "",
            "missing-test",
            f"{len(absent)} of {len(test)} listed test images do not exist: {names}",
            "nothing, where they are not wanted: they are left out",
        )
    ]


def _miscount(body: Mapping[str, Any], training: Sequence[Case]) -> list[Finding]:
    promised = body.get("numTraining")
    if promised is None or promised == len(training):
        return []
    return [
        _warning(
            "",
            "count",
            f"dataset.json says numTraining {promised}, and {len(training)} cases were found",
            "look for files that were lost, or correct the number",
        )
    ]


def _surplus(root: Path, listing: Path, cases: Sequence[Case]) -> list[Finding]:
    """Files beside those of the cases: images that are not listed, and what is no image at all."""
    used = {file for case in cases for file in case.files}
    owner = {(file.parent, name_of(file)): case.id for case in cases for file in case.files}
    folders = {file.parent for file in used} | {root / name for name in _FOLDERS}
    stray = [file for file in _all_files(root) if file.name.startswith(".")]
    unlisted: dict[str, list[Path]] = defaultdict(list)
    faults = []
    for file in (file for folder in sorted(folders) for file in _all_files(folder)):
        case_id = owner.get((file.parent, name_of(file)))
        if file in used or file == listing or file in stray:
            continue
        if file.name.startswith(".") or suffix_of(file) is None:
            stray.append(file)
        elif case_id is None:
            unlisted[name_of(file)].append(file)
        elif not _is_half_of_a_pair(file, used):
            faults.append(
                _warning(
                    case_id,
                    "duplicate-id",
                    f"{_short(file, root)} has the name of a listed file and another ending",
                    "remove the one that is out of date; the listed one is used",
                )
            )
    faults += [_not_listed(name, files, root) for name, files in unlisted.items()]
    if stray:
        names = ", ".join(_short(file, root) for file in stray[:5]) + (" ..." if len(stray) > 5 else "")
        faults.append(
            _warning(
                "",
                "stray",
                f"{len(stray)} files are no images: {names}",
                "remove them at leisure; they are passed over",
            )
        )
    return faults


def _is_half_of_a_pair(file: Path, used: Collection[Path]) -> bool:
    """Whether a file is the .img of a used .hdr, or the other way round."""
    swapped = file.name.replace(".img", ".hdr") if ".img" in file.name else file.name.replace(".hdr", ".img")
    return swapped != file.name and file.with_name(swapped) in used


def _not_listed(name: str, files: Sequence[Path], root: Path) -> Finding:
    are_labels = {file.parent.name.startswith("labels") for file in files}
    lack = {frozenset({True}): ", and has no image", frozenset({False}): ", and has no label"}.get(
        frozenset(are_labels), ""
    )
    if any(file.parent.name.endswith("Ts") for file in files):
        lack = ""
    return _warning(
        name,
        "not-listed",
        f"{', '.join(_short(file, root) for file in files)} is not listed in dataset.json{lack}",
        "list it, or move it elsewhere; it is passed over",
    )


def _short(file: Path, root: Path) -> str:
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


# ---- one case --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """What is kept of a case to compare it with the others."""

    id: str
    geometry: Geometry | None = None
    negative: tuple[float, ...] = ()
    percentile_99: tuple[float, ...] = ()
    content: str = ""
    absent: tuple[str, ...] = ()
    labelled: bool = False


class _Faults(list[Finding]):
    """The findings of one case while it is looked at."""

    def __init__(self, case: Case, root: Path) -> None:
        super().__init__()
        self.case, self.root = case, root

    def add(self, kind: str, found: str, remedy: str, unusable: bool = True) -> None:
        self.append(Finding(case=self.case.id, kind=kind, unusable=unusable, found=found, remedy=remedy))

    def read(self, file: Path, missing: str) -> Volume | None:
        """The file with its voxels as they are stored, or None and a finding."""
        if not file.exists():
            self.add(missing, f"{self.name(file)} does not exist", "restore the file, or remove the case from the list")
            return None
        try:
            form = next((form for form in FORMATS if suffix_of(file) in form.SUFFIXES), None)
            if form is None:
                raise InputError(file, "has no known image ending")
            return form.read(file)
        except MedsegError as failure:
            expected = f" (expected {failure.expected})" if failure.expected else ""
            remedy = failure.remedy or "replace the file, or remove the case from the list"
            self.add("damaged", f"{self.name(file)} {failure.found}{expected}", remedy)
        except (OSError, ValueError, RuntimeError, MemoryError) as failure:
            self.add("damaged", f"{self.name(file)} cannot be read: {failure}", "replace the file")
        return None

    def name(self, file: Path) -> str:
        return _short(file, self.root)


def _look_at(case: Case, dataset: Dataset) -> tuple[_Look, list[Finding]]:
    faults = _Faults(case, dataset.root)
    parts = [part for file in case.images if (part := faults.read(file, "missing-image"))]
    mask = faults.read(case.label, "missing-label") if case.label else None
    whole = len(parts) == len(case.images)
    if parts:
        _check_channels(parts, len(dataset.channels) if whole else None, faults)
    if parts and mask:
        _check_one_grid(mask, parts[0], "grid", "draw the label on this image's grid, or resample it to it", faults)
    absent = _check_label(mask, dataset.labels, faults) if mask else None
    shown = parts[0] if parts else mask
    look = _Look(
        case.id,
        shown.geometry if shown else None,
        absent=absent or (),
        labelled=absent is not None,
    )
    if whole and (measured := _check_intensities(parts, faults)):
        look = replace(look, negative=measured[0], percentile_99=measured[1], content=measured[2])
    return look, list(faults)


def _check_channels(parts: Sequence[Volume], expected: int | None, faults: _Faults) -> None:
    found = sum(part.array.shape[0] for part in parts)
    if expected is not None and found != expected:
        faults.add(
            "channels",
            f"the image has {found} channels, and dataset.json names {expected}",
            "add or remove channels, or correct the names in dataset.json",
        )
    for part in parts[1:]:
        _check_one_grid(part, parts[0], "channel-grids", "resample the channels of a case to one grid", faults)


def _check_one_grid(item: Volume, first: Volume, kind: str, remedy: str, faults: _Faults) -> None:
    if item.geometry.close_to(first.geometry):
        return
    found = (
        f"{faults.name(item.paths[0])} is {describe_grid(item)}, {faults.name(first.paths[0])} {describe_grid(first)}"
    )
    if item.geometry.shape == first.geometry.shape:
        corners = np.array(np.meshgrid(*((0.0, n - 1.0) for n in first.geometry.shape))).reshape(3, -1).T
        apart = np.linalg.norm(item.geometry.world(corners) - first.geometry.world(corners), axis=1).max()
        found += f"; their corners lie up to {apart:.3g} mm apart"
    faults.add(kind, found, remedy)


def _check_label(mask: Volume, labels: Labels, faults: _Faults) -> tuple[str, ...] | None:
    """The names of the classes that a mask lacks; None where it is no mask of these labels."""
    name = faults.name(mask.paths[0])
    if mask.array.shape[0] != 1:
        faults.add("channels", f"{name} has {mask.array.shape[0]} channels", "give the label one channel")
        return None
    try:
        values = {int(v) for v in np.unique(integral(mask.array[0], name))}
    except InputError as failure:
        faults.add("label-values", f"{name}: {failure.found}", "make it a mask of whole numbers, as by a threshold")
        return None
    unknown = labels.unknown(np.array(sorted(values)))
    if unknown:
        faults.add(
            "unknown-labels",
            f"{name} holds the values {unknown[:10]}, which have no name (known: 0 and {dict(labels.values)})",
            "name them in dataset.json, or correct the mask",
        )
        return None
    if not values & set(labels.values.values()):
        faults.add("empty", f"{name} marks no voxel of any class", "check that nothing was lost", unusable=False)
        return None
    return tuple(n for n in labels.names if labels.values[n] not in values)


def _check_intensities(
    parts: Sequence[Volume], faults: _Faults
) -> tuple[tuple[float, ...], tuple[float, ...], str] | None:
    """Negative fraction and 99th percentile by channel, and a digest of the voxels; None where they are not finite."""
    content = hashlib.sha256()
    negative, high = [], []
    for part in parts:
        name = faults.name(part.paths[0])
        try:
            array = finite_float32(part.array, name)
        except InputError as failure:
            faults.add("not-finite", f"{name}: {failure.found}", "replace these voxels, or remove the case")
            return None
        content.update(repr(array.shape).encode() + array.tobytes())
        for channel, voxels in enumerate(array):
            if voxels.min() == voxels.max():
                where = f" channel {channel}" if len(array) > 1 else ""
                faults.add("constant", f"{name}{where} is {voxels.flat[0]:g} everywhere", "replace the image")
            sample = _sample(voxels)
            negative.append(float((sample < 0).mean()))
            high.append(float(np.quantile(sample, 0.99)))
    return tuple(negative), tuple(high), content.hexdigest()


def _sample(voxels: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = voxels.reshape(-1)
    return flat[:: max(1, flat.size // SAMPLE_VOXELS)]


# ---- one case against the others -------------------------------------------------------------------------------------


def _classes_missing(looks: Sequence[_Look], labels: Labels) -> Iterator[Finding]:
    labelled = [look for look in looks if look.labelled]
    nowhere = {name for name in labels.names if labelled and all(name in look.absent for look in labelled)}
    for name in sorted(nowhere):
        yield _warning(
            "",
            "class-missing",
            f"no label holds class {name!r}",
            "check the labels; a class without examples cannot be learned",
        )
    for look in labelled:
        if absent := [f"{name!r} ({labels.values[name]})" for name in look.absent if name not in nowhere]:
            yield _warning(
                look.id, "class-missing", f"the label lacks {', '.join(absent)}", "check that this is so in the patient"
            )


def _foreign_grids(looks: Sequence[_Look]) -> Iterator[Finding]:
    seen = [(look, look.geometry) for look in looks if look.geometry is not None]
    if len(seen) < FOREIGN_GROUP:
        return
    canonical = [geometry.reoriented(geometry.to("RAS")) for _, geometry in seen]
    spacing = np.array([g.spacing for g in canonical])
    extent = np.array([np.array(g.shape) * g.spacing for g in canonical])
    foreign = _far_off(spacing) | _far_off(extent)
    for (look, geometry), odd, size in zip(seen, foreign, extent, strict=True):
        if odd:
            yield _fault(
                look.id,
                "foreign-grid",
                f"{_sizes(geometry.shape)} voxels of {_sizes(geometry.spacing)} mm span "
                f"{_sizes(size, 3)} mm; the median case has voxels of "
                f"{_sizes(np.median(spacing, axis=0))} mm and spans "
                f"{_sizes(np.median(extent, axis=0), 3)} mm",
                "check that it is of this study: another scan, or a wrong unit of length",
            )


def _far_off(lengths: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows of (cases, axes) lie far from the others, on a logarithmic scale."""
    logs = np.log(lengths)
    off = np.abs(logs - np.median(logs, axis=0))
    mean = logs.mean(axis=1)
    mean_off = np.abs(mean - np.median(mean))
    return np.asarray(
        (mean_off > np.maximum(np.log(FOREIGN_MEAN_FACTOR), _spread(mean_off)))
        | (off > np.maximum(np.log(FOREIGN_AXIS_FACTOR), _spread(off))).any(axis=1)
    )


def _spread(deviations: NDArray[np.float64]) -> NDArray[np.float64]:
    """``FOREIGN_SPREADS`` standard deviations, estimated by the median of the absolute deviations."""
    return np.asarray(FOREIGN_SPREADS * 1.4826 * np.median(deviations, axis=0))


def _foreign_intensities(looks: Sequence[_Look], channel: int, name: str) -> Iterator[Finding]:
    seen = [look for look in looks if len(look.negative) > channel]
    if len(seen) < FOREIGN_GROUP:
        return
    none, many = FOREIGN_NEGATIVE
    negative = np.array([look.negative[channel] for look in seen])
    high = np.array([look.percentile_99[channel] for look in seen])
    typical = float(np.median(negative))
    odd = np.zeros(len(seen), dtype=bool)
    if np.mean(negative <= none) >= 0.75:
        odd = negative > many
    elif np.mean(negative >= many / 2) >= 0.75:
        odd = negative <= none
    scale = float(np.median(high))
    if name.casefold() == "ct" and scale > 0:
        odd |= high > scale * FOREIGN_CT_FACTOR
    for look, is_odd, fraction, top in zip(seen, odd, negative, high, strict=True):
        if is_odd:
            yield _fault(
                look.id,
                "foreign-intensity",
                f"channel {name!r}: {fraction:.0%} of the voxels are negative and the 99th percentile "
                f"is {top:.4g}; in the median case {typical:.0%} and {scale:.4g}",
                "check modality, rescale slope and intercept of the image",
            )


def _copies(looks: Sequence[_Look], trained: int) -> Iterator[Finding]:
    """Equal images under several ids; the first ``trained`` looks are at training cases, the others at test cases."""
    first: dict[str, int] = {}
    for number, look in enumerate(looks):
        index = first.setdefault(look.content, number)
        if not look.content or index == number:
            continue
        original, leak = looks[index], index < trained <= number
        yield _fault(
            look.id,
            "leak" if leak else "duplicate-image",
            f"has the very voxels of {'training case ' if leak else ''}{original.id}",
            "remove it from the test cases: it is trained on"
            if leak
            else "keep one of them: a copy in training and validation flatters the score",
        )


def _sizes(values: Iterable[float], digits: int = 4) -> str:
    return "x".join(f"{value:.{digits}g}" for value in values)
