"""Scores of an evaluation as a table and as Markdown text."""

from __future__ import annotations

from collections.abc import Mapping

from medseg.evaluate import ClassSummary, Evaluation, Spread

_NOTHING = "-"


def score_table(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """The scores as rows of text: a heading, one row a class and region, and the mean over the classes.

    Measures are means over the cases, Dice with the 95 % interval of its mean and its median. "no reference" counts
    cases without the class, "missed" and "false positive" those with one empty mask; these and the failed ones are in
    the means with the worst score.
    """
    nsd = f"NSD at {evaluation.tolerance_mm:g} mm"
    counts = ("cases", "no reference", "missed", "false positive", "failed")
    heading = ("class", "Dice", "95 % interval", "median Dice", nsd, "HD95 mm", *counts)
    mean, interval = evaluation.mean, _interval(evaluation.mean_low.dice, evaluation.mean_high.dice)
    means = (_number(mean.dice), interval, "", _number(mean.nsd), _number(mean.hd95_mm, 2))
    return [
        heading,
        *(_row(summary) for summary in evaluation.classes),
        ("mean of classes", *means, *("",) * len(counts)),
    ]


def lesion_table(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """The single lesions as rows of text: a heading and one row a class; no row where none are counted."""
    found = f"found at IoU > {evaluation.lesion_iou:g}"
    heading = (
        "lesions of",
        "F1",
        "sensitivity",
        "precision",
        "false positives a case",
        "reference",
        "predicted",
        found,
    )
    rows = [
        (
            summary.name,
            *(_number(value, 3) for value in (lesions.f1, lesions.sensitivity, lesions.precision)),
            _number(lesions.false_positives_per_case, 2),
            *map(str, (lesions.n_reference, lesions.n_predicted, lesions.n_found)),
        )
        for summary in evaluation.classes
        if (lesions := summary.lesions)
    ]
    return [heading, *rows] if rows else []


def markdown_summary(evaluation: Evaluation) -> str:
    """The scores as Markdown: the table, what it means, and every case that failed or could not be scored."""
    heading, *rows = score_table(evaluation)
    lines = ["## Scores", "", _line(heading), _line(["---"] * len(heading)), *(_line(row) for row in rows), ""]
    if lesions := lesion_table(evaluation):
        heading, *rows = lesions
        lines += [_line(heading), _line(["---"] * len(heading)), *(_line(row) for row in rows), ""]
    lines += [
        f"{len(evaluation.cases)} cases. Averaged: {evaluation.order}. Cases in which prediction and reference are "
        "both empty are left out of a class's mean; a missed or wrongly found class and a failed case count as Dice 0, "
        f"NSD 0 and HD95 the image diagonal. Intervals of the mean: {evaluation.intervals}. Tolerance of NSD: "
        f"{evaluation.tolerance_mm:g} mm, {evaluation.tolerance_source}.",
        "",
        *(f"- {name}: {meaning}" for name, meaning in evaluation.definitions.items()),
        "",
    ]
    lines += _listing("Failed cases", evaluation.failed)
    lines += _listing("Cases without a usable reference (in no number above)", evaluation.unscored)
    lines += _listing("Predictions without a reference", dict.fromkeys(evaluation.extra, ""))
    return "\n".join(lines)


def _row(summary: ClassSummary) -> tuple[str, ...]:
    return (
        summary.name,
        _mean(summary.dice),
        _interval(summary.dice.low, summary.dice.high) if summary.dice else _NOTHING,
        _number(summary.dice.median if summary.dice else None),
        _mean(summary.nsd),
        _mean(summary.hd95_mm, 2),
        str(summary.n),
        str(summary.n_empty_reference),
        str(summary.n_missed),
        str(summary.n_false_positive),
        str(summary.n_failed),
    )


def _mean(spread: Spread | None, digits: int = 4) -> str:
    return _number(spread.mean if spread else None, digits)


def _interval(low: float | None, high: float | None) -> str:
    return _NOTHING if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _number(value: float | None, digits: int = 4) -> str:
    return _NOTHING if value is None else f"{value:.{digits}f}"


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """Text as one line that Markdown shows as it is."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")


def _listing(title: str, reasons: Mapping[str, str]) -> list[str]:
    if not reasons:
        return []
    return [
        f"## {title}",
        "",
        *(f"- {_escaped(f'{case}: {reason}' if reason else case)}" for case, reason in reasons.items()),
        "",
    ]
