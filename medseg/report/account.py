"""What a page says of how results came to be: training and prediction, data, plan, settings and versions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from medseg.errors import InputError
from medseg.journal import STAGES
from medseg.plan import Plan
from medseg.report import methods, plots
from medseg.report.gather import Batch, Gathered
from medseg.report.words import NONE, by, duration

log = logging.getLogger(__name__)

_SIZES = ("spacing_mm", "median_shape", "patch_size")
"""Fields of a plan that hold a number an axis."""


# ---- training and prediction -----------------------------------------------------------------------------------------


def training(found: Gathered) -> dict[str, Any]:
    """The curves, and tables of what training and prediction took; None where there was neither."""
    curves = ""
    logs = {fold: path for fold, path in found.logs.items() if path.is_file()}
    if logs:
        try:
            curves = plots.training_curves(logs)
        except InputError as failure:
            log.warning("report: no curves of the training: %s", failure)
    folds = [_fold(name, record) for name, record in found.run.get("folds", {}).items()]
    batches = [_batch(batch) for batch in found.batches if batch.rows]
    there = curves or folds or batches
    return {"training": {"curves": curves, "folds": folds, "batches": batches} if there else None}


def _fold(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    seconds, iterations = record.get("seconds"), record.get("iterations")
    return {
        "number": name,
        "train": _known(record.get("train_cases")),
        "validation": _known(record.get("validation_cases")),
        "iterations": NONE if iterations is None else f"{iterations:,}",
        "time": duration(seconds),
        "precision": _known(record.get("precision")),
        "seed": _known(record.get("seed")),
        "dice": record.get("dice"),
    }


def _batch(batch: Batch) -> dict[str, Any]:
    computed = [row for row in batch.rows if row.status == "done" or (row.status == "kept" and row.seconds)]
    columns = [[row.stages[stage] for row in computed if stage in row.stages] for stage in STAGES]
    memory = [row.peak_memory_mb for row in computed if row.peak_memory_mb is not None]
    return {
        "name": batch.name or "all",
        "n": len(batch.rows),
        "device": _known(batch.facts.get("device")),
        "engine": _known(batch.facts.get("engine")),
        "seconds": [
            *(median(column) if column else None for column in columns),
            median(row.seconds or 0.0 for row in computed) if computed else None,
        ],
        "memory": max(memory, default=None),
    }


def _known(value: Any) -> str:
    return NONE if value is None else str(value)


# ---- what was done ---------------------------------------------------------------------------------------------------


def done(found: Gathered) -> dict[str, Any]:
    """Methods, command, data, settings, plan, folds, and what the page lacks."""
    used = set(found.run.get("folds", {}))
    folds = [(n, fold["validation"], str(n) in used or not used) for n, fold in enumerate(found.folds)]
    return {
        "methods": methods.paragraphs(found),
        "command": methods.command(found),
        "facts": [(term, value) for term, value in _facts(found) if value],
        "findings": found.check.findings if found.check else (),
        "decisions": _decisions(found.plan) if found.plan else [],
        "folds": folds,
        "notes": found.notes,
    }


def _facts(found: Gathered) -> Iterable[tuple[str, str]]:
    run, plan = found.run, found.plan
    if found.kind == "run":
        yield "Dataset", found.name
        yield "Cases", _known(run.get("cases")) if run else ""
        yield "Left out as unusable", ", ".join(run.get("skipped_cases", ()))
    if found.fingerprint and found.fingerprint.cases:
        yield "Median size", _median(case.shape for case in found.fingerprint.cases) + " voxels"
        yield "Median spacing", _median(case.spacing_mm for case in found.fingerprint.cases) + " mm"
    yield "Channels", ", ".join(plan.channels) if plan else ""
    if found.labels:
        yield "Labels", ", ".join(f"{name} ({found.labels.values[name]})" for name in found.labels.names)
        regions = found.labels.regions.items()
        yield "Regions", "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in regions)
        yield "Ignored value", "" if found.labels.ignore is None else str(found.labels.ignore)
    yield "Configuration", str(run.get("configuration", ""))
    yield "Settings of training", _settings(run.get("settings", {}))
    yield from _facts_of_prediction(found)
    yield "Versions", ", ".join(f"{name} {version}" for name, version in versions(found).items())


def versions(found: Gathered) -> dict[str, str]:
    """Versions of what it was made with; empty where that is not known."""
    known: list[dict[str, str]] = [facts.get("versions", {}) for facts in (found.run, *_facts_of_batches(found))]
    return next((one for one in known if one), {})


def _facts_of_batches(found: Gathered) -> list[dict[str, Any]]:
    return [batch.facts for batch in found.batches]


def _facts_of_prediction(found: Gathered) -> Iterable[tuple[str, str]]:
    facts = next((facts for facts in _facts_of_batches(found) if facts), {})
    if facts:
        yield "Model", f"{facts.get('model')}, digest {str(facts.get('model_digest', ''))[:12]}"
        yield "Settings of prediction", _settings(facts.get("settings", {}))
        yield "Processor threads", _known(facts.get("threads"))


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in settings.items() if value not in (None, [], ()))


def _median(rows: Iterable[Sequence[float]]) -> str:
    return by([f"{median(along):.3g}" for along in zip(*rows, strict=True)])


def _decisions(plan: Plan) -> list[tuple[str, str, str]]:
    """Every field of a plan with a reason: its name, its value where that is short, and why."""
    body = plan.model_dump(mode="json")
    return [(field.replace("configurations.", ""), _at(body, field), why) for field, why in plan.reasons.items()]


def _at(body: Any, field: str) -> str:
    """The value of a field that is named with dots; nothing of one that is not there or has fields of its own."""
    *_, last = field.split(".")
    for name in field.split("."):
        if isinstance(body, list) and name.isdigit() and int(name) < len(body):
            body = body[int(name)]
        elif isinstance(body, dict) and name in body:
            body = body[name]
        else:
            return ""
    if isinstance(body, dict):
        return ""
    return by([_value(one) for one in body]) if last in _SIZES else _value(body)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(by(one) if isinstance(one, list) else _value(one) for one in value)
    return NONE if value is None else f"{value:g}" if isinstance(value, float) else str(value)
