"""Datasets: which files belong to which case, what they should hold, and whether they do.

A dataset is a folder with a ``dataset.json``, either as the Medical Segmentation Decathlon ships it (lists of files,
labels keyed by value, channels as a fourth dimension) or as nnU-Net v2 wants it (labels keyed by name, one file a
channel with the endings ``_0000``, ``_0001``; of pictures, one file ``_0000`` may hold all channels, as RGB does).
Nothing is renamed or copied. Both may say what labels stand for, and in which colour they are shown: see
``io.label_tables.labels_of_dataset``.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import DatasetError
from medseg.io import Source, is_picture, name_of, suffix_of
from medseg.io.label_tables import labels_of_dataset
from medseg.records import Record, digest_file, digest_of, read_json
from medseg.volume import Labels

FOLD_SEED = 12345
"""Seed of the shuffled folds, nnU-Net's (``generate_crossval_split``), so that scores can be compared fold by fold."""

_FOLDERS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
_CHANNEL = re.compile(r"^(?P<id>.+)_(?P<channel>\d{4})$")


@dataclass(frozen=True)
class Case:
    """One patient's images and, for a labelled case, the label file.

    Attributes:
        id: name of the case, unique among the cases of a dataset.
        images: one file that holds the channels (as its fourth dimension or as colours), or one file or DICOM series a
            channel. A folder or zip stands for the only series in it.
        label: the mask, or None where there is none.
    """

    id: str
    images: tuple[Source, ...]
    label: Path | None

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files or folders of the images."""
        return tuple(image if isinstance(image, Path) else image.place for image in self.images)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file (or folder) of the case."""
        return (*self.paths, self.label) if self.label else self.paths


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

    @classmethod
    def fault(cls, case: str, kind: str, found: str, remedy: str) -> Finding:
        """A finding that makes its case unusable."""
        return cls(case=case, kind=kind, unusable=True, found=found, remedy=remedy)

    @classmethod
    def warning(cls, case: str, kind: str, found: str, remedy: str) -> Finding:
        """A finding that a user should know of."""
        return cls(case=case, kind=kind, unusable=False, found=found, remedy=remedy)


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
        labels = labels_of_dataset(body, listing)
        training, test = _read_cases(body, listing, channels)
        cases, faults = _unique(training, root)
        apart, test_faults = _unique(test, root)
        apart, both = _apart_from(cases, apart)
        _require_files(cases, root, listing)
        absent = [case for case in apart if not all(file.exists() for file in case.paths)]
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
        labels = self.labels.model_dump(mode="json", exclude={"codings", "colours"})  # no voxel depends on these
        return digest_of([list(self.channels), labels, content])

    def _kept(self, ids: set[str]) -> Dataset:
        return replace(
            self,
            cases=tuple(case for case in self.cases if case.id in ids),
            test=tuple(case for case in self.test if case.id in ids),
            faults=tuple(fault for fault in self.faults if not fault.case or fault.case in ids),
        )


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
        if is_picture(paths[0]) and not any(path.exists() for path in paths[1:]):
            paths = paths[:1]
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
                Finding.warning(
                    case.id, "listed-twice", "is listed twice", "remove one of the entries; it is used once"
                )
            )
        elif first is not case or twin != case.id:
            others = ", ".join(short_name(file, root) for file in (*kept[twin].paths, *case.paths))
            faults.append(
                Finding.fault(
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
                Finding.warning(
                    case.id, "leak", "is listed for training and for testing", "remove one entry; it is trained on only"
                )
            )
        else:
            faults.append(
                Finding.fault(
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
            f"none of the files of its {len(cases)} cases exists, as {short_name(cases[0].files[0], root)}",
            f"paths relative to {root}",
            "unpack the images beside dataset.json",
        )


def _absent_tests(absent: Sequence[Case], test: Sequence[Case]) -> list[Finding]:
    if not absent:
        return []
    names = ", ".join(case.id for case in absent[:5]) + (" ..." if len(absent) > 5 else "")
    return [
        Finding.warning(
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
        Finding.warning(
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
                Finding.warning(
                    case_id,
                    "duplicate-id",
                    f"{short_name(file, root)} has the name of a listed file and another ending",
                    "remove the one that is out of date; the listed one is used",
                )
            )
    faults += [_not_listed(name, files, root) for name, files in unlisted.items()]
    if stray:
        names = ", ".join(short_name(file, root) for file in stray[:5]) + (" ..." if len(stray) > 5 else "")
        faults.append(
            Finding.warning(
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
    return Finding.warning(
        name,
        "not-listed",
        f"{', '.join(short_name(file, root) for file in files)} is not listed in dataset.json{lack}",
        "list it, or move it elsewhere; it is passed over",
    )


def short_name(file: Path, root: Path) -> str:
    """A file's path relative to the dataset's folder where it lies in it, for messages."""
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)
