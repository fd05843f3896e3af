"""The page of a report: one HTML file with everything in it, which opens from disk and asks no network for anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg import NOTICE
from medseg.progress import Progress, part, silent
from medseg.records import write_bytes
from medseg.report import account, results, viewer
from medseg.report.gather import Gathered, gather, without_folders
from medseg.report.pictures import Pictures, draw
from medseg.report.viewer import asset
from medseg.report.words import count, millilitres, number

NAME = "report.html"
"""Of the page in the folder that it is about."""

POLICY = "; ".join(
    (
        *("default-src 'none'", "img-src data: blob:", "style-src 'unsafe-inline'", "script-src 'unsafe-inline'"),
        *("base-uri 'none'", "form-action 'none'"),
    )
)
"""What the page may load: what is in it, and nothing from anywhere else."""

_TITLES = {"run": "training and evaluation", "evaluation": "evaluation", "predictions": "predicted masks"}


def write_report(
    place: Path, out: Path | None = None, images: Path | str | None = None, progress: Progress = silent
) -> Path:
    """Write the page of what is in a folder, atomically.

    Args:
        place: output folder of ``medseg run``, ``medseg evaluate`` or ``medseg predict``.
        out: the page; None for ``report.html`` in the folder.
        images: where the images of the cases are; see ``gather``.
        progress: told how far the pictures are.

    Returns:
        The page.

    Raises:
        InputError: there are no results in the folder, or ``images`` cannot be used.
    """
    path = out or place / NAME
    page = render(gather(place, images), progress)
    write_bytes(path, page.encode("utf-8", "backslashreplace"))  # a file name may hold bytes that are no text
    return path


def render(found: Gathered, progress: Progress = silent) -> str:
    """The page as text; equal inputs, equal pages."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(asset("page.html.j2")).render(_context(found, progress))


def _context(found: Gathered, progress: Progress) -> dict[str, Any]:
    """All that the template names. What it takes as it is (css, scripts, viewers' data, plots) is ours, and escaped."""
    pictures = draw(found, part(progress, 0, 2))
    context = {
        **_head(found, pictures),
        **results.scores(found, part(progress, 1, 2)),
        **results.cases(found, pictures),
        **results.pictures(found, pictures),
        **account.training(found),
        **account.done(found),
        "policy": POLICY,
        "notice": NOTICE,
        "css": asset("page.css") + asset("viewer.css"),
        "script": asset("page.js"),
        "viewer_script": viewer.script(),
        "niivue": (viewer.niivue_script() if pictures.viewers else None) or "",
        "viewers": [(shown, viewer.as_json(shown.viewer or {})) for shown in pictures.viewers],
        "colours": _colours(found),
        "count": count,
        "number": number,
        "ml": millilitres,
        "raw": lambda value: "" if value is None else f"{value:.6g}",
        "plain": lambda value: f"{value:g}",
        "short": without_folders,
    }
    return {**context, "contents": _contents(context)}


def _head(found: Gathered, pictures: Pictures) -> dict[str, Any]:
    versions = account.versions(found)
    version = f"version {versions['medseg']}" if "medseg" in versions else ""
    return {
        "heading": f"{found.name}: {_TITLES[found.kind]}",
        "kicker": " · ".join(word for word in ("medseg report", version, found.date) if word),
        "sentence": _sentence(found),
        "holds_images": bool(pictures.worst or pictures.typical or pictures.mosaics),
        "evaluation": found.evaluation,
    }


def _sentence(found: Gathered) -> str:
    """What came out, in one sentence."""
    evaluation = found.evaluation
    if evaluation is None:
        rows = found.predicted.values()
        failed, flagged = sum(row.status == "failed" for row in rows), sum(bool(row.flags) for row in rows)
        if not rows:
            return "There are no scores and no predictions here."
        return (
            f"{count(len(rows) - failed, 'mask')} of {count(len(rows), 'image')}; {failed} failed, {flagged} flagged."
        )
    mean, low, high = evaluation.mean.dice, evaluation.mean_low.dice, evaluation.mean_high.dice
    interval = "" if low is None or high is None else f" (95 % interval {number(low)} to {number(high)})"
    classes = evaluation.classes[: len(evaluation.labels.values)]
    return (
        f"Mean Dice {number(mean)}{interval} over "
        f"{count(len(evaluation.cases), 'held-out case' if found.kind == 'run' else 'case')} and "
        f"{count(len(classes), 'class')}; {count(len(evaluation.failed), 'case')} failed, "
        f"{count(sum(summary.n_missed for summary in classes), 'structure')} missed."
    )


def _contents(context: Mapping[str, Any]) -> list[tuple[str, str]]:
    sections = [
        ("scores", "Scores", context["evaluation"]),
        ("problems", "Failures", context["problems"]),
        ("cases", "Cases", True),
        ("pictures", "Pictures", context["has_pictures"]),
        ("viewers", "Slice by slice", context["viewers"]),
        ("training", "Training and prediction", context["training"]),
        ("done", "What was done", True),
    ]
    return [(anchor, title) for anchor, title, is_there in sections if is_there]


def _colours(found: Gathered) -> dict[str, str]:
    """CSS colours of the labels; the names themselves are never part of a style."""
    if found.labels is None:
        return {}
    return {name: "rgb({} {} {})".format(*found.labels.colour(name)) for name in found.labels.names}
