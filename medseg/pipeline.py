"""The whole journey: check, fingerprint, plan, prepare, train, package, predict, evaluate.

Each station writes into its own place under the output folder and is skipped when what it would make is there already,
made from the same inputs (by digest, not by existence). So a run that was killed, or is called again with other
choices, does only what is missing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import medseg
from medseg import NOTICE
from medseg.batch import predict_cases
from medseg.cases import mask_name
from medseg.check import check
from medseg.dataset import Case, Dataset, Findings, Fold
from medseg.engines import choose_device
from medseg.errors import DatasetError, InputError
from medseg.evaluate import EvaluateSettings, Evaluation, evaluate_cases, scoring_of
from medseg.fingerprint import Fingerprint, measure
from medseg.folder import writing_to
from medseg.journal import versions
from medseg.package import FoldRecord, load_package, note_dice, save_package
from medseg.pairs import Pair
from medseg.patches import prepare_cases
from medseg.plan import ConfigurationName, Plan
from medseg.planning import make_plan, override_plan
from medseg.predict import Predictor, PredictSettings
from medseg.progress import Progress, silent
from medseg.quality import Ranges, ranges_of
from medseg.records import Record, digest_file, digest_of, read_json, write_json, write_text
from medseg.report import markdown_summary, save_curve, write_report
from medseg.train import LOG, WEIGHTS, Job, TrainSettings, precision_of, refuse_impossible, train_fold
from medseg.volume import Labels

log = logging.getLogger(__name__)

DEFAULT_MEMORY_MB = 8192.0
"""Memory that a plan may use where nothing else is said: nnU-Net's 8 GB."""


@dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
        out: the folder that holds everything.
        package: the trained model.
        evaluation: of the held-out cases.
        skipped_cases: unusable cases that were left out.
        paths: what to look at, by what it is.
    """

    out: Path
    package: Path
    evaluation: Evaluation
    skipped_cases: tuple[str, ...]
    paths: dict[str, Path]


def run(
    dataset: Path | str,
    out: Path | str,
    *,
    configuration: ConfigurationName | None = None,
    folds: Sequence[int] | None = (0,),
    train: TrainSettings | None = None,
    memory_budget_mb: float = DEFAULT_MEMORY_MB,
    evaluate: EvaluateSettings | None = None,
    regions: Mapping[str, tuple[int, ...]] | None = None,
    overrides: Sequence[str] = (),
    mirror: bool = False,
    skip_bad_cases: bool = False,
    report: bool = True,
    progress: Progress = silent,
) -> RunResult:
    """Go from a dataset to a scored model.

    Args:
        dataset: a folder with ``dataset.json``.
        out: where everything is written; calling again with the same folder goes on.
        configuration: of the plan; None for 3d_fullres where the plan has it, else 2d.
        folds: numbers of the folds to train; None for all of them.
        train: settings of training, the same for each fold.
        memory_budget_mb: what a training step may take.
        evaluate: settings of the scores.
        regions: unions of labels to score beside the labels.
        overrides: plan settings.
        mirror: average predictions over mirrored images.
        skip_bad_cases: go on without the cases that ``check`` finds unusable.
        report: write ``report.html`` too, with pictures of the cases; see ``medseg.report.page``.
        progress: told how far each station is.

    Raises:
        DatasetError: cases are unusable and ``skip_bad_cases`` is not set; every one is listed.
        PlanError: an override or the configuration is impossible.
        TrainingError: training cannot go on.
        InputError: another run is writing to ``out``, or nothing can be written there; a fold or the device that does
            not exist, or a precision that it does not have; a region of an unknown label.
    """
    out = Path(out)
    settings = train or TrainSettings()
    precision_of(settings)  # what the device cannot do is refused now rather than after checking gigabytes
    data = Dataset.open(Path(dataset))
    scored = _with_regions(data.labels, regions or {})
    with writing_to(out):
        data, skipped = check_station(data, out, skip_bad_cases, progress)
        plan = plan_station(data, out, settings.device, memory_budget_mb, configuration, overrides, progress)
        chosen = chosen_folds(data, folds, out)
        records = train_station(data, plan, configuration, chosen, out, settings, progress)
        pairs = _predict_station(data, chosen, out, PredictSettings(device=settings.device, mirror=mirror), progress)
        chosen_scores = evaluate or EvaluateSettings()
        evaluation = _evaluate_station(pairs, scored, chosen_scores, data.root.resolve().name, out, progress)
        dice = {number: _fold_dice(evaluation, fold) for number, fold in chosen.items()}
        note_dice(out / "package", dice)
        records = {n: record.model_copy(update={"dice": dice[n]}) for n, record in records.items()}
        choices = {
            "configuration": configuration or _usual(plan),
            "settings": settings.model_dump(mode="json"),
            "overrides": list(overrides),
            "mirror": mirror,
        }
        result = _write_results(data, evaluation, skipped, chosen, records, choices, out)
        return _report_station(result, progress) if report else result


def check_station(
    data: Dataset, out: Path, skip_bad_cases: bool = False, progress: Progress = silent
) -> tuple[Dataset, tuple[str, ...]]:
    """Check a dataset and take out its unusable cases; findings go to ``check.json``.

    Raises:
        DatasetError: there are unusable cases, and they are not to be skipped.
    """
    faults = [fault.model_dump(mode="json") for fault in data.faults]
    key = digest_of(["check", medseg.__version__, data.digest(), replace(data, cases=data.test).digest(), faults])
    findings = _kept(out / "check.json", Findings, key) or _keep(out / "check.json", check(data, progress), key)
    for finding in findings.findings:
        level = logging.WARNING if finding.unusable else logging.INFO
        log.log(level, "%s: %s: %s. %s", finding.case or "dataset", finding.kind, finding.found, finding.remedy)
    bad = tuple(case for case in findings.unusable_cases if case in {c.id for c in data.cases})
    if bad and not skip_bad_cases:
        listed = "\n  ".join(f"{f.case}: {f.found}" for f in findings.findings if f.case in bad and f.unusable)
        raise DatasetError(
            data.root,
            f"{len(bad)} of {len(data.cases)} cases cannot be used:\n  {listed}",
            "",
            "correct them, or leave them out with --skip-bad-cases",
        )
    if bad:
        log.warning("left out %d of %d cases: %s", len(bad), len(data.cases), ", ".join(bad))
    return data.without(findings.unusable_cases), bad


def plan_station(
    data: Dataset,
    out: Path,
    device: str = "auto",
    memory_budget_mb: float = DEFAULT_MEMORY_MB,
    configuration: ConfigurationName | None = None,
    overrides: Sequence[str] = (),
    progress: Progress = silent,
) -> Plan:
    """Measure the fingerprint and make the plan, each with its reason; ``fingerprint.json`` and ``plan.json``.

    Args:
        data: sound cases.
        out: where both are written.
        device: ``cuda`` asks for a GPU's plan (nnU-Net's rules) on any machine, ``auto`` takes the one that is here.
        memory_budget_mb: what a training step may take.
        configuration: that short ``overrides`` apply to; None as for ``run``.
        overrides: plan settings.
        progress: told how far the measuring is.

    Raises:
        PlanError: an impossible setting, or no such configuration, network or loss.
        InputError: no device has this name.
    """
    key = digest_of(["fingerprint", medseg.__version__, data.digest()])
    path = out / "fingerprint.json"
    fingerprint = _kept(path, Fingerprint, key) or _keep(path, measure(data, progress), key)
    kind = _kind_of(device)
    plan = make_plan(fingerprint, data.name, data.channels, data.labels, device=kind, memory_budget_mb=memory_budget_mb)
    name = configuration or _usual(plan)
    plan, messages = override_plan(plan, overrides, name)
    for message in messages:
        log.warning("plan: %s", message)
    refuse_impossible(plan, name)
    path = out / "plan.json"
    if _written_plan(path) != plan:
        if _is_edited(path):
            log.warning("plan.json was edited by hand and is made anew: use --set, or `medseg train`, which takes it")
        _keep(path, plan, plan.digest())
        for field, reason in plan.reasons.items():
            log.info("plan: %s: %s", field, reason)
    return plan


def _usual(plan: Plan) -> ConfigurationName:
    """The configuration where none is named: whole volumes where the cases have more than one slice."""
    return "3d_fullres" if "3d_fullres" in plan.configurations else "2d"


def _kind_of(device: str) -> Literal["cpu", "gpu"]:
    """What a plan is for. A device that is named need not be here: one may plan for another machine."""
    name = choose_device("auto").type if device == "auto" else device
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise InputError("--device", f"{device!r} is no device", "auto, cpu, cuda, cuda:1 or mps")
    return "cpu" if name == "cpu" else "gpu"


def _written_plan(path: Path) -> Plan | None:
    """The plan of an earlier run, if it is there and whole."""
    try:
        return Plan.load(path)
    except InputError:
        return None


def _is_edited(path: Path) -> bool:
    """Whether a record that a station wrote is no longer as it was written."""
    try:
        return read_json(_mark(path)).get("digest") != digest_file(path)
    except (InputError, OSError):
        return False


def _with_regions(labels: Labels, regions: Mapping[str, tuple[int, ...]]) -> Labels:
    """Labels with more regions, which only the scores know of: nothing is trained again for them."""
    body = {**labels.model_dump(), "regions": {**labels.regions, **regions}}
    return Labels.checked(body, "regions")


def train_station(
    data: Dataset,
    plan: Plan,
    configuration: ConfigurationName | None,
    chosen: Mapping[int, Fold],
    out: Path,
    settings: TrainSettings,
    progress: Progress = silent,
) -> dict[int, FoldRecord]:
    """Prepare the cases, train each chosen fold, and put all of them into ``out/package``; configuration as ``run``.

    Raises:
        PlanError: no such configuration, network or loss; then nothing is prepared.
        InputError: the device does not exist, or cannot train in the precision; likewise.
        TrainingError: training cannot go on.
    """
    name = configuration or _usual(plan)
    precision_of(settings)
    refuse_impossible(plan, name)
    prepared = {c.id: c for c in prepare_cases(data, plan, name, out / "prepared" / name, progress)}
    records, weights = {}, {}
    for number, fold in chosen.items():
        folder = out / "training" / f"fold_{number}"
        validation = [(data.case(case), prepared[case]) for case in fold.validation]
        training = [prepared[case] for case in fold.train]
        records[number] = train_fold(Job(plan, name, training, validation, folder, settings), progress)
        weights[number] = (folder / WEIGHTS).read_bytes()
        if _is_newer(folder / LOG, folder / "curve.png"):
            save_curve(folder / LOG, folder / "curve.png")
    save_package(out / "package", data.name, plan, name, records, weights, versions(), _ranges(out, plan))
    return records


def _ranges(out: Path, plan: Plan) -> Ranges | None:
    """What the training cases are like, where the fingerprint that the plan was made from is there."""
    try:
        fingerprint = Fingerprint.load(out / "fingerprint.json")
    except InputError:
        fingerprint = None
    if fingerprint is None or fingerprint.digest() != plan.fingerprint_digest:
        log.warning("fingerprint.json is not the plan's: predicted cases will not be compared with the training data")
        return None
    return ranges_of(fingerprint)


def _is_newer(source: Path, picture: Path) -> bool:
    """Whether there is a source that the picture, if there is one, does not show yet."""
    return source.exists() and not (picture.exists() and picture.stat().st_mtime_ns > source.stat().st_mtime_ns)


def _predict_station(
    data: Dataset, chosen: Mapping[int, Fold], out: Path, settings: PredictSettings, progress: Progress
) -> list[Pair]:
    """Segment every fold's held-out cases with that fold's network alone; pairs for the evaluation."""
    package = load_package(out / "package")
    pairs = []
    for number, fold in chosen.items():
        folder = out / "predictions" / f"fold_{number}"
        cases = [data.case(case) for case in fold.validation]
        predictor = Predictor(package.only(number), settings)
        results = predict_cases(predictor, cases, folder, overwrite=True, progress=progress)
        for case, result in zip(cases, results, strict=True):
            if result.status == "failed":  # an older model's mask must not be scored as this one's
                (folder / mask_name(case)).unlink(missing_ok=True)
        pairs += [(case.id, folder / mask_name(case), _label(case)) for case in cases]
    return pairs


def _evaluate_station(
    pairs: Sequence[Pair], labels: Labels, settings: EvaluateSettings, dataset: str, out: Path, progress: Progress
) -> Evaluation:
    files = [[case, *(digest_file(p) if p.exists() else "missing" for p in paths)] for case, *paths in pairs]
    scoring, source = scoring_of(labels, settings, dataset)
    asked = [scoring.tolerance_mm, source, scoring.lesions, scoring.lesion_iou]
    key = digest_of(["evaluation", medseg.__version__, labels.model_dump(mode="json"), *asked, files])
    path = out / "evaluation" / "evaluation.json"
    kept: Evaluation | None = _kept(path, Evaluation, key)
    return kept or _keep(path, evaluate_cases(pairs, labels, settings, dataset, progress), key)


def _fold_dice(evaluation: Evaluation, fold: Fold) -> float | None:
    """Mean over a fold's held-out cases and the classes; None where nothing could be scored."""
    held_out = set(fold.validation)
    classes = len(evaluation.labels.values)
    cases = [case.scores[:classes] for case in evaluation.cases if case.case in held_out]
    means = [
        fmean(known) for scores in zip(*cases, strict=True) if (known := [s.dice for s in scores if s.dice is not None])
    ]
    return round(fmean(means), 4) if means else None


def _label(case: Case) -> Path:
    if case.label is None:
        raise InputError(case.id, "has no label file", "a labelled case")
    return case.label


def _write_results(
    data: Dataset,
    evaluation: Evaluation,
    skipped: tuple[str, ...],
    chosen: Mapping[int, Fold],
    records: Mapping[int, FoldRecord],
    choices: Mapping[str, Any],
    out: Path,
) -> RunResult:
    paths = {
        "model package": out / "package",
        "masks": out / "predictions",
        "scores": out / "evaluation" / "scores.csv",
        "summary": out / "summary.md",
        "plan": out / "plan.json",
        "log": out / "log.txt",
    }
    evaluation.save_csv(paths["scores"])
    lines = [
        f"# {data.name}",
        "",
        NOTICE,
        "",
        f"Held-out cases of fold{'s' * (len(chosen) > 1)} {', '.join(map(str, chosen))}.",
        "",
    ]
    if skipped:
        lines += [f"Left out as unusable ({len(skipped)}): {', '.join(skipped)}. See check.json.", ""]
    write_text(paths["summary"], "\n".join([*lines, markdown_summary(evaluation)]))
    run_record = {
        "notice": NOTICE,
        "dataset": data.name,
        "dataset_folder": str(data.root.absolute()),
        **choices,
        "cases": len(data.cases),
        "skipped_cases": list(skipped),
        "folds": {str(n): record.model_dump(mode="json") for n, record in records.items()},
        "mean": evaluation.mean.model_dump(mode="json"),
        "tolerance_mm": evaluation.tolerance_mm,
        "versions": versions(),
    }
    write_json(out / "run.json", run_record)
    return RunResult(out, out / "package", evaluation, skipped, paths)


def _report_station(result: RunResult, progress: Progress) -> RunResult:
    """Write the page; what goes wrong there is logged and costs nothing else, as the run is done."""
    try:
        page = write_report(result.out, progress=progress)
    except Exception as failure:  # hours of training are not lost to a picture
        log.warning("the report could not be written: %s. Try again with `medseg report`", failure, exc_info=True)
        return result
    return replace(result, paths={**result.paths, "report": page})


def chosen_folds(data: Dataset, wanted: Sequence[int] | None, out: Path) -> dict[int, Fold]:
    """The folds to train, by number; all lists of ids go to ``folds.json``."""
    all_folds = data.folds()
    write_json(out / "folds.json", [{"train": list(f.train), "validation": list(f.validation)} for f in all_folds])
    numbers = range(len(all_folds)) if wanted is None else wanted
    if absent := [number for number in numbers if not 0 <= number < len(all_folds)] or not numbers:
        found = f"there is no fold {absent}" if numbers else "no fold is named"
        raise InputError("--folds", found, f"0 to {len(all_folds) - 1}, or all")
    return {number: all_folds[number] for number in numbers}


def _mark(path: Path) -> Path:
    """The file beside a station's record that says what it was made from."""
    return path.with_suffix(".key.json")


def _keep(path: Path, record: Any, key: str) -> Any:
    """Save a station's record, and the digest of what it was made from beside it."""
    record.save(path)
    write_json(_mark(path), {"key": key, "digest": digest_file(path)})
    return record


def _kept(path: Path, kind: type[Record], key: str) -> Any:
    """A station's record if it is there, unharmed, and made from the same inputs; else None."""
    try:
        mark = read_json(_mark(path))
        if mark.get("key") == key and mark.get("digest") == digest_file(path):
            return kind.load(path)
    except (InputError, OSError):
        pass
    return None
