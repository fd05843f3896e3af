"""What a report is made of: the files of a run, of an evaluation or of predictions, read and put side by side.

Nothing is fatal but a folder without any results: what is not there, or cannot be read, is noted and left out.
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from medseg.cases import find_cases, find_masks
from medseg.dataset import Case, Dataset, Findings
from medseg.errors import InputError, MedsegError
from medseg.evaluate import Evaluation
from medseg.fingerprint import Fingerprint
from medseg.io import Source
from medseg.pairs import pairs_of
from medseg.plan import Plan
from medseg.records import Record, read_json
from medseg.volume import Labels

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)
Kind = Literal["run", "evaluation", "predictions"]

_DAY = re.compile(r"^(\d{4}-\d\d-\d\d) \d\d:", re.MULTILINE)
_FOLD = re.compile(r"fold_(\d+)$")
_FILE = r"[^\s/\\:;,()'\"]+\.(?:nii|nii\.gz|nrrd|seg\.nrrd|mha|mhd|dcm|zip|png|tiff?|jpe?g|json|csv|txt|safetensors)\b"
_PATH = re.compile(
    rf"(?<![\w…/\\])(?:(?:[A-Za-z]:)?[/\\](?:[^/\\:;,()'\"\n]+[/\\])*|(?:[^\s/\\:;,()'\"]+[/\\])+(?={_FILE}))"
)


@dataclass(frozen=True)
class CaseFiles:
    """Where the pictures of a case come from.

    Attributes:
        images: files or series; empty where they are not known.
        reference, prediction: masks; None where there is none.
    """

    images: tuple[Source, ...] = ()
    reference: Path | None = None
    prediction: Path | None = None


@dataclass(frozen=True)
class Predicted:
    """A row of a ``cases.csv``: what became of a case; see ``medseg.journal.Prediction``."""

    case: str
    status: str
    output: str
    seconds: float | None
    stages: dict[str, float]
    peak_memory_mb: float | None
    volumes_ml: dict[str, float]
    flags: tuple[str, ...]
    warnings: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """One call of a prediction: its ``run.json``, and its rows.

    Attributes:
        name: of the folder, as fold_0; of a shard with its number; empty for the only one.
    """

    name: str
    facts: dict[str, Any]
    rows: tuple[Predicted, ...]


@dataclass(frozen=True)
class Gathered:
    """Everything that a page tells of; what there is not is None or empty.

    Attributes:
        kind: what was found in the folder.
        name: of the dataset, or of the folder.
        labels: names of what masks mark.
        files: by case.
        date: on which it was done, as its log has it; empty where there is none.
        notes: what could not be read, in words.
    """

    kind: Kind
    name: str
    evaluation: Evaluation | None = None
    labels: Labels | None = None
    files: dict[str, CaseFiles] = field(default_factory=dict)
    batches: tuple[Batch, ...] = ()
    run: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    check: Findings | None = None
    fingerprint: Fingerprint | None = None
    folds: tuple[dict[str, list[str]], ...] = ()
    logs: dict[int, Path] = field(default_factory=dict)
    date: str = ""
    notes: tuple[str, ...] = ()

    @property
    def predicted(self) -> dict[str, Predicted]:
        """The rows of all batches, by case."""
        return {row.case: row for batch in self.batches for row in batch.rows}


def gather(place: Path, images: Path | str | None = None) -> Gathered:
    """Read what is in the output folder of ``medseg run``, ``evaluate`` or ``predict``.

    Args:
        place: the folder.
        images: where the images of the cases are, as ``find_cases`` takes it, or a dataset folder, of which all cases
            are meant; None for where they were when the masks were made.

    Raises:
        InputError: it is no folder, there are no results in it, or ``images`` cannot be used.
    """
    reader = _Reader(place)
    if (place / "plan.json").is_file() or (place / "evaluation" / "evaluation.json").is_file():
        found = reader.run()
    elif (place / "evaluation.json").is_file():
        found = reader.evaluation()
    elif any(place.glob("cases*.csv")) or any(place.glob("journal*.jsonl")):
        found = reader.predictions()
    else:
        kinds = "the output folder of `medseg run`, `medseg evaluate` or `medseg predict`"
        raise InputError(place, "holds no results" if place.is_dir() else "is no folder", kinds)
    if images is not None:
        named = {case.id: case.images for case in _cases_at(images)}
        files = {case: replace(one, images=named.get(case, ())) for case, one in found.files.items()}
        found = replace(found, files=files)
    return replace(found, date=_date(place), notes=tuple(dict.fromkeys(reader.notes)))


def without_folders(text: str) -> str:
    """A message without the folders of the paths in it: ``…/name.nii.gz``."""
    return _PATH.sub("…/", text)


class _Reader:
    """A folder, and what in it could not be read."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.notes: list[str] = []

    def run(self) -> Gathered:
        """What ``medseg run`` wrote."""
        place = self.place
        facts = self.json(place / "run.json")
        plan = self.record(Plan, place / "plan.json")
        evaluation = self.record(Evaluation, place / "evaluation" / "evaluation.json")
        folders = _by_fold(place / "predictions")
        name = str(facts.get("dataset") or (plan.dataset if plan else place.resolve().name))
        return Gathered(
            "run",
            name,
            evaluation,
            evaluation.labels if evaluation else plan.labels if plan else None,
            self.files_of_run(facts, folders.values()),
            tuple(batch for fold, folder in folders.items() for batch in self.batches(folder, f"fold {fold}")),
            facts,
            plan,
            self.record(Findings, place / "check.json"),
            self.record(Fingerprint, place / "fingerprint.json"),
            self.folds(),
            {fold: folder / "log.csv" for fold, folder in _by_fold(place / "training").items()},
        )

    def evaluation(self) -> Gathered:
        """What ``medseg evaluate`` wrote.

        Raises:
            InputError: it cannot be read, and there is nothing else.
        """
        evaluation = Evaluation.load(self.place / "evaluation.json")
        predictions, references = Path(evaluation.predictions), Path(evaluation.references)
        files: dict[str, CaseFiles] = {}
        if evaluation.predictions and evaluation.references:
            try:
                pairs = pairs_of(predictions, references)
                files = {case: CaseFiles((), _there(r), _there(p)) for case, p, r in pairs}
            except (MedsegError, OSError) as failure:
                self.note("The masks are not where they were: no pictures are shown.", failure)
        batches = self.batches(predictions) if predictions.is_dir() and evaluation.predictions else ()
        dataset = self.dataset(references)
        images = {case.id: case.images for case in (*dataset.cases, *dataset.test)} if dataset else {}
        images = images or _first(self.images_of_batch(batch) for batch in batches)
        files = {case: replace(one, images=images.get(case, ())) for case, one in files.items()}
        name = dataset.name if dataset else predictions.name or self.place.resolve().name
        return Gathered("evaluation", name, evaluation, evaluation.labels, files, batches)

    def predictions(self) -> Gathered:
        """What ``medseg predict`` wrote."""
        batches = self.batches(self.place)
        images: dict[str, tuple[Source, ...]] = {}
        for batch in batches:
            images |= self.images_of_batch(batch)
        rows = [row for batch in batches for row in batch.rows]
        files = {
            row.case: CaseFiles(images.get(row.case, ()), None, _there(self.place / row.output) if row.output else None)
            for row in rows
        }
        return Gathered("predictions", self.place.resolve().name, None, self.labels_of(batches), files, batches)

    def files_of_run(self, facts: Mapping[str, Any], folders: Iterable[Path]) -> dict[str, CaseFiles]:
        """Masks of all folds, with the images and labels of the dataset where that is where it was."""
        masks: dict[str, Path] = {}
        for folder in folders:
            try:
                masks |= find_masks(folder)
            except (InputError, OSError) as failure:
                self.note(f"There are no masks in {folder.name}.", failure)
        known: dict[str, Case] = {}
        try:
            if not facts.get("dataset_folder"):
                raise InputError("run.json", "names no dataset", "dataset_folder", "run again with this version")
            known = {case.id: case for case in Dataset.open(Path(str(facts["dataset_folder"]))).cases}
        except (MedsegError, OSError) as failure:
            self.note("The dataset is not where it was: images and references are not shown.", failure)
        return {
            case: CaseFiles(known[case].images, known[case].label, masks.get(case))
            if case in known
            else CaseFiles((), None, masks[case])
            for case in sorted({*masks, *known})
        }

    def dataset(self, references: Path) -> Dataset | None:
        """The dataset that references are of, where they are those of one."""
        if not (references / "dataset.json").is_file():
            return None
        try:
            return Dataset.open(references)
        except (MedsegError, OSError) as failure:
            self.note("The images of the references cannot be found.", failure)
            return None

    def images_of_batch(self, batch: Batch) -> dict[str, tuple[Source, ...]]:
        """The images that were predicted, where they still are where they were."""
        inputs = batch.facts.get("inputs") or []
        if not inputs:
            return {}
        series = batch.facts.get("series") or ()
        irregular = bool(batch.facts.get("resample_irregular"))
        try:
            return {case.id: case.images for case in find_cases(*inputs, series=series, resample_irregular=irregular)}
        except (MedsegError, OSError) as failure:
            self.note("The images are not where they were: masks are shown without them.", failure)
            return {}

    def labels_of(self, batches: Sequence[Batch]) -> Labels | None:
        """What the masks of predictions mark: as their ``run.json`` has it."""
        for batch in batches:
            try:
                return Labels.checked(batch.facts.get("labels") or {}, "run.json")
            except MedsegError:
                continue
        self.note("run.json does not name the labels.", None)
        return None

    def batches(self, folder: Path, name: str = "") -> tuple[Batch, ...]:
        """The calls that wrote into a folder: one, or one a shard."""
        found = []
        for table in sorted(folder.glob("cases*.csv")):
            suffix = table.stem.removeprefix("cases")
            words = " ".join(part for part in (name, f"shard {suffix[1:]}".replace("-", " ") if suffix else "") if part)
            found.append(Batch(words, self.json(folder / f"run{suffix}.json"), self.rows(table)))
        return tuple(found)

    def rows(self, table: Path) -> tuple[Predicted, ...]:
        """The rows of a ``cases.csv``."""
        try:
            with table.open(newline="", encoding="utf-8") as file:
                return tuple(_predicted(row) for row in csv.DictReader(file))
        except (OSError, ValueError, KeyError, csv.Error) as failure:
            self.note(f"{table.name} cannot be read.", failure)
            return ()

    def folds(self) -> tuple[dict[str, list[str]], ...]:
        """The lists of ids of ``folds.json``."""
        try:
            return tuple(json.loads((self.place / "folds.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as failure:
            self.note("folds.json cannot be read.", failure)
            return ()

    def record(self, kind: type[R], path: Path) -> R | None:
        """A record, or None where it is not there or cannot be used."""
        if not path.exists():
            return None
        try:
            return kind.load(path)
        except InputError as failure:
            self.note(f"{path.name} cannot be used.", failure)
            return None

    def json(self, path: Path) -> dict[str, Any]:
        """A JSON object; empty where it is not there or is none."""
        try:
            return read_json(path)
        except InputError as failure:
            self.note(f"{path.name} cannot be read.", failure)
            return {}

    def note(self, what: str, why: BaseException | None) -> None:
        """Take down what will be missing from the page, and why."""
        log.info("report of %s: %s %s", self.place, what, why or "")
        self.notes.append(f"{what} {without_folders(str(why))}".strip() if why else what)


def _date(place: Path) -> str:
    """The day of the last line of a folder's log, as 2026-11-27."""
    days = ""
    for path in sorted(place.glob("log*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        days = max([days, *_DAY.findall(text)])
    return days


def _cases_at(place: Path | str) -> Sequence[Case]:
    """The cases of a place; of a dataset all of them."""
    path = Path(place)
    if (path / "dataset.json").is_file() or path.name == "dataset.json":
        dataset = Dataset.open(path)
        return (*dataset.cases, *dataset.test)
    return find_cases(place)


def _first(found: Iterable[dict[str, tuple[Source, ...]]]) -> dict[str, tuple[Source, ...]]:
    return next((images for images in found if images), {})


def _by_fold(folder: Path) -> dict[int, Path]:
    """The folders ``fold_N`` by their number."""
    found = {int(match[1]): path for path in folder.glob("fold_*") if (match := _FOLD.search(path.name))}
    return dict(sorted(found.items()))


def _there(path: Path) -> Path | None:
    return path if path.exists() else None


def _predicted(row: Mapping[str, str]) -> Predicted:
    return Predicted(
        row["case"],
        row["status"],
        row["output"],
        _number(row["seconds"]),
        {name[:-2]: float(text) for name, text in row.items() if name.endswith("_s") and text},
        _number(row["peak_memory_mb"]),
        {name[:-3]: float(text) for name, text in row.items() if name.endswith("_ml") and text},
        tuple(flag for flag in row["qc_flags"].split(";") if flag),
        row["warnings"],
        row["reason"],
    )


def _number(text: str) -> float | None:
    return float(text) if text else None
