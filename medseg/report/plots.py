"""Plots of an evaluation and of trainings, as SVG text that stands within a page.

Text and axes take the colour of the text around them (``currentColor``), so that one picture serves a light and a dark
page; the rest is in colours of Okabe and Ito, which eyes of all kinds tell apart on both. The same input gives the same
text. Names are drawn as they are: nothing in them is taken for mathematics.
"""

from __future__ import annotations

import hashlib
import html
import io as text_io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.evaluate import ClassSummary, Evaluation, Spread
from medseg.geometry import Float
from medseg.metrics import DISTANCES, ClassScore, Status
from medseg.report.curves import read_log, smoothed
from medseg.report.planes import plain
from medseg.report.words import count
from medseg.terminology import colour_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TEXT = "#010203"
"""Stands for ``currentColor`` while matplotlib draws; no datum has it."""

_BLUE, _ORANGE, _GREEN, _RED, _PINK = "#56b4e9", "#e69f00", "#009e73", "#d55e00", "#cc79a7"
_LOOKS: dict[Status, tuple[str, str, str]] = {
    "scored": ("o", _BLUE, "scored"),
    "missed": ("v", _ORANGE, "missed: prediction empty"),
    "false_positive": ("^", _PINK, "false positive: reference empty"),
    "failed": ("X", _RED, "failed: no usable prediction"),
}
"""Marker, colour and meaning."""

_WORDS = {
    "dice": "Dice",
    "nsd": "NSD",
    "hd95_mm": "HD95 (mm)",
    "iou": "IoU",
    "sensitivity": "sensitivity",
    "precision": "precision",
    "hd_mm": "HD (mm)",
    "assd_mm": "ASSD (mm)",
    "volume_difference_ml": "volume difference (ml)",
    "volume_difference_percent": "volume difference (%)",
}
_STRIP_NOTES = ("bar: median, 25th to 75th percentile", "diamond: mean with its 95 % interval")

_ROW = 12
"""Columns that stand side by side at most."""

_MOST_DOTS = 1000
"""With more of them, dots are pixels: so many would make the page heavy."""

_DPI = 110
"""Of dots that are pixels."""

_MOST_POINTS = 400
"""Of a curve."""

_MOST_NAMES = 30
"""Of a legend."""

_EDGE: dict[str, Any] = {"markeredgecolor": _TEXT, "markeredgewidth": 0.3}
"""Of markers, so that light ones are seen on white."""

_GOLDEN = 0.6180339887

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "medseg",
    "text.usetex": False,
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "font.size": 11,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "axes.linewidth": 0.8,
    "lines.markeredgewidth": 0.0,
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor", "axes.edgecolor"), _TEXT),
}
"""Of matplotlib: text stays text, names are no formulas, and equal plots have equal ids."""


def strip_plot(evaluation: Evaluation, measure: str) -> str:
    """Every case as a dot, one column a class and region.

    The bar is the range from the 25th to the 75th percentile with the median; the diamond the mean with its 95 %
    interval. Cases missed, failed or falsely found have markers of their own.

    Args:
        evaluation: of one class at least.
        measure: one of ``medseg.metrics.MEASURES``.
    """
    classes = evaluation.classes
    words = _measure_words(evaluation, measure)
    columns = _columns(evaluation)
    dots = [_valued(columns[c.name], measure) for c in classes]
    spreads: list[Spread | None] = [getattr(c, measure) for c in classes]

    longest = -(-len(classes) // -(-len(classes) // _ROW))  # rows of equal length
    rows = [slice(first, first + longest) for first in range(0, len(classes), longest)]

    def draw(figure: Figure) -> None:
        for row, axes in zip(rows, figure.subplots(len(rows), 1, sharey=True, squeeze=False)[:, 0], strict=True):
            for place, (column, spread) in enumerate(zip(dots[row], spreads[row], strict=True)):
                _dots(axes, place, column, rasterized=sum(map(len, dots)) > _MOST_DOTS)
                if spread:
                    _summary(axes, place, spread)
            _name_columns(axes, classes[row], longest)
            axes.set_ylabel(words)
            _scale(axes, measure, [value for column in dots for _, value in column])
        _status_legend(figure, [score.status for column in dots for score, _ in column], *_STRIP_NOTES)

    size = (max(6.4, 1.4 + 0.75 * longest), 4.4 if len(rows) == 1 else 1.0 + 3.0 * len(rows))
    medians = ", ".join(
        f"{plain(c.name)} {spread.median:.3g}" if spread else f"{plain(c.name)} none"
        for c, spread in zip(classes, spreads, strict=True)
    )
    return _svg(draw, size, f"Strip plot of {count(len(evaluation.cases), 'case')}: {words}. Medians: {medians}.")


def bland_altman(evaluation: Evaluation, name: str) -> str:
    """The difference of predicted and reference volume against their mean, of one class or region.

    Cases without a usable prediction are left out, and so are those in which both are empty; the figure says how many.

    Args:
        evaluation: what was found.
        name: of the class or region.
    """
    scores = _columns(evaluation)[name]
    used = [score for score in scores if score.prediction_ml is not None and score.status != "true_negative"]
    reference = np.array([score.reference_ml for score in used])
    difference = np.array([score.prediction_ml for score in used], dtype=np.float64) - reference
    limits = _limits(difference)
    left_out = _left_out(scores)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for status, chosen in _by_status(used).items():
            marker, colour, _ = _LOOKS[status]
            x, y = (reference + difference / 2)[chosen], difference[chosen]
            axes.plot(x, y, marker, color=colour, alpha=0.8, markersize=5, **_EDGE)
        axes.axhline(0, color=_TEXT, linewidth=0.6, alpha=0.5)
        _draw_limits(axes, limits)
        if not used:
            axes.text(0.5, 0.5, "no case with volumes", transform=axes.transAxes, ha="center")
        axes.set_xlabel("mean of reference and predicted volume (ml)")
        axes.set_ylabel("prediction minus reference (ml)")
        axes.set_title(plain(name), fontsize=12)
        _status_legend(figure, [score.status for score in used], *left_out)

    found = ", ".join(f"{word} {value:+.3g} ml" for value, word in limits) or "no limits of agreement"
    said = f"Bland-Altman plot of the volume of {plain(name)}, {count(len(used), 'case')}: {found}."
    return _svg(draw, (6.4, 4.2), said)


def dice_by_volume(evaluation: Evaluation) -> str:
    """Dice against the volume of the reference, one colour a class; log axis where volumes span more than tenfold."""
    names = [c.name for c in evaluation.classes]
    valued = {name: [s for s in scores if s.dice is not None] for name, scores in _columns(evaluation).items()}
    columns = {name: [s for s in scores if s.reference_ml > 0] for name, scores in valued.items()}
    volumes = [score.reference_ml for scores in columns.values() for score in scores]
    number, empty = len(volumes), sum(map(len, valued.values())) - len(volumes)

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import NullFormatter

        axes = figure.subplots()
        few = number <= _MOST_DOTS
        look: dict[str, Any] = {"alpha": 0.8, "markersize": 5 if few else 3, "rasterized": not few, **_EDGE}
        for name, scores in columns.items():
            for status, chosen in _by_status(scores).items():
                x = [scores[n].reference_ml for n in chosen]
                y = [scores[n].dice or 0.0 for n in chosen]
                axes.plot(x, y, _LOOKS[status][0], color=_colour(evaluation, name), **look)
        if volumes and max(volumes) > 10 * min(volumes):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        _from_near(axes, [dice for scores in columns.values() for _, dice in _valued(scores, "dice")])
        axes.set(xlabel="reference volume (ml)", ylabel="Dice, higher is better")
        seen = {score.status for scores in columns.values() for score in scores}
        notes = [f"not shown: {empty} of\nempty reference"] if empty else []
        _class_legend(figure, evaluation, [name for name in names if columns[name]], seen, notes)

    said = f"Dice against reference volume, {number} structures of {count(len(evaluation.cases), 'case')}"
    height = max(4.2, 0.9 + 0.17 * min(len(names), _MOST_NAMES))
    return _svg(draw, (7.4, height), f"{said}. Classes: {', '.join(map(plain, names))}.")


def training_curves(logs: Mapping[int, Path]) -> str:
    """Loss (running mean), validation Dice and learning rate over the iterations, one line a fold.

    Args:
        logs: fold -> its log (see ``medseg.report.curves``); one at least.

    Raises:
        InputError: a log cannot be read.
    """
    read = {fold: read_log(path) for fold, path in sorted(logs.items())}
    best = {fold: float(np.nanmax(log["dice"])) for fold, log in read.items() if np.isfinite(log["dice"]).any()}

    def draw(figure: Figure) -> None:
        loss, dice, rate = figure.subplots(1, 3)
        for n, (fold, log) in enumerate(read.items()):
            look: dict[str, Any] = {"color": _hex(colour_of(n)), "linewidth": 1.4, "label": f"fold {fold}"}
            kept = _thinned(len(log["iteration"]))
            loss.plot(log["iteration"][kept], smoothed(log["loss"])[kept], **look)
            run = np.isfinite(log["dice"])
            dice.plot(log["iteration"][run], log["dice"][run], marker="o", markersize=3, **look)
            rate.plot(log["iteration"][kept], log["learning_rate"][kept], **look)
        if not best:
            dice.text(0.5, 0.5, "no validation was run", transform=dice.transAxes, ha="center", va="center")
        for axes, title in ((loss, "training loss"), (dice, "validation Dice"), (rate, "learning rate")):
            axes.set_title(title, fontsize=12)
            axes.set_xlabel("iteration")
        rate.set_ylim(bottom=0)
        figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=len(read))

    found = ", ".join(f"fold {fold} {value:.3f}" for fold, value in best.items()) or "no validation was run"
    words = "Training curves: loss, validation Dice and learning rate over the iterations. Best validation Dice"
    return _svg(draw, (10.5, 3.4), f"{words}: {found}.")


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def _columns(evaluation: Evaluation) -> dict[str, list[ClassScore]]:
    """Scores of all cases by class or region."""
    found: dict[str, list[ClassScore]] = {summary.name: [] for summary in evaluation.classes}
    for case in evaluation.cases:
        for score in case.scores:
            found[score.name].append(score)
    return found


def _valued(scores: Sequence[ClassScore], measure: str) -> list[tuple[ClassScore, float]]:
    values = ((score, getattr(score, measure)) for score in scores)
    return [(score, float(value)) for score, value in values if value is not None]


def _by_status(scores: Sequence[ClassScore]) -> dict[Status, list[int]]:
    """Which scores have each status, those with most to tell last, so that they lie above."""
    found = {status: [n for n, score in enumerate(scores) if score.status == status] for status in _LOOKS}
    return {status: places for status, places in found.items() if places}


def _limits(difference: Float) -> list[tuple[float, str]]:
    """Bias and 95 % limits of agreement (Bland and Altman 1986): mean -+ 1.96 standard deviations."""
    if not len(difference):
        return []
    bias = float(difference.mean())
    if len(difference) < 2:
        return [(bias, "bias")]
    reach = 1.96 * float(difference.std(ddof=1))
    return [(bias + reach, "upper limit"), (bias, "bias"), (bias - reach, "lower limit")]


def _left_out(scores: Sequence[ClassScore]) -> list[str]:
    """Which scores have no place in a plot of volumes, in words."""
    statuses = Counter(score.status for score in scores)
    parts = [f"{count(n, 'case')} failed"] if (n := statuses["failed"]) else []
    parts += [f"{count(n, 'case')} empty in both"] if (n := statuses["true_negative"]) else []
    return [f"left out: {', '.join(parts)}"] if parts else []


def _measure_words(evaluation: Evaluation, measure: str) -> str:
    """Name, unit, tolerance and direction of a measure."""
    word = _WORDS[measure]
    if measure == "nsd":
        word += f" at {evaluation.tolerance_mm:g} mm"
    if measure.startswith("volume_difference"):
        return f"{word}, 0 is best"
    return f"{word}, {'lower' if measure in DISTANCES else 'higher'} is better"


def _thinned(number: int) -> Any:
    return np.unique(np.linspace(0, number - 1, min(number, _MOST_POINTS)).round().astype(int))


def _hex(colour: Iterable[int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def _colour(evaluation: Evaluation, name: str) -> str:
    """The colour of a class as in pictures; regions have those that come after."""
    names = evaluation.labels.names
    if name in names:
        return _hex(evaluation.labels.colour(name))
    return _hex(colour_of(len(names) + list(evaluation.labels.regions).index(name)))


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _dots(axes: Axes, place: int, column: Sequence[tuple[ClassScore, float]], rasterized: bool) -> None:
    """The cases of one class, moved aside by the golden ratio so that few lie on each other."""
    y = np.array([value for _, value in column])
    x = place - 0.08 + 0.44 * (np.arange(1, len(column) + 1) * _GOLDEN % 1.0 - 0.5)
    for status, chosen in _by_status([score for score, _ in column]).items():
        marker, colour, _ = _LOOKS[status]
        look: dict[str, Any] = {"alpha": 0.8, "markersize": 4, **_EDGE}
        if rasterized:
            look = {"alpha": 0.8, "markersize": 3, "rasterized": True}
        if status != "scored":
            look |= {"alpha": 0.9, "markersize": 1.5 * look["markersize"], "zorder": 3}
        axes.plot(x[chosen], y[chosen], marker, color=colour, **look)


def _summary(axes: Axes, place: int, spread: Spread) -> None:
    axes.fill_between(
        [place - 0.33, place + 0.17], spread.p25, spread.p75, color=_TEXT, alpha=0.13, linewidth=0, zorder=1
    )
    axes.plot([place - 0.33, place + 0.17], [spread.median] * 2, color=_TEXT, linewidth=1.6, zorder=4)
    if spread.low is not None and spread.high is not None:
        axes.plot([place + 0.3] * 2, [spread.low, spread.high], color=_TEXT, linewidth=1.4, zorder=4)
    axes.plot(place + 0.3, spread.mean, "D", color=_TEXT, markersize=4.5, zorder=4)


def _name_columns(axes: Axes, classes: Sequence[ClassSummary], columns: int) -> None:
    """Names and numbers of cases below so many columns, all in one row where they fit."""
    crowded = columns > 6 or max(len(c.name) for c in classes) > 60 // columns
    look: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    names = [f"{plain(c.name, 30)}{' ' if crowded else chr(10)}(n = {c.n})" for c in classes]
    axes.set_xticks(range(len(classes)), names, **look)
    room = 0.6 if columns > 1 else 1.2
    axes.set_xlim(-room, columns - 1 + room)
    axes.tick_params(axis="x", length=0)


def _scale(axes: Axes, measure: str, values: Sequence[float]) -> None:
    """Up to 1 what is best there; distances by their logarithm where missed cases are far away from the others."""
    if measure in DISTANCES:
        most = max(values, default=1.0)
        if most > 10 * max(float(np.median(values or [0.0])), 1.0):
            axes.set_yscale("symlog", linthresh=1.0)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_ylabel(f"{axes.get_ylabel()} (log)")
            most *= 1.4
        axes.set_ylim(0, 1.05 * most)
    elif not measure.startswith("volume_difference"):
        _from_near(axes, values)


def _from_near(axes: Axes, values: Sequence[float]) -> None:
    """Up to 1, from 0 or, where all values are high, from the tenth below them: dots need no zero, but room."""
    low = np.floor(10.0 * min(values, default=0.0) - 0.1) / 10.0
    axes.set_ylim(low if low > 0 else -0.04, 1.0 + 0.04 * (1.0 - max(low, 0.0)))


def _draw_limits(axes: Axes, limits: Sequence[tuple[float, str]]) -> None:
    """Lines with their values on the right, moved from each other where they would overlap."""
    low, high = axes.get_ylim()
    values = [value for value, _ in limits]
    room = 0.05 * (max([high, *values]) - min([low, *values]))  # lines on the frame would not be seen
    low, high = min([low, *(value - room for value in values)]), max([high, *(value + room for value in values)])
    axes.set_ylim(low, high)
    for value, word in limits:
        axes.axhline(value, color=_GREEN, linewidth=1.2, linestyle="-" if word == "bias" else "--")
        away = {"upper limit": 0.055, "lower limit": -0.055}.get(word, 0.0)
        bias, own = ((limit - low) / (high - low) for limit in (limits[len(limits) // 2][0], value))
        y = max(own, bias + away) if away > 0 else min(own, bias + away)
        axes.text(1.01, y, f"{word} {value:+.3g} ml", transform=axes.transAxes, va="center", fontsize=10)


def _status_legend(figure: Figure, statuses: Iterable[Status], *notes: str) -> None:
    from matplotlib.lines import Line2D

    numbers = Counter(statuses)
    handles, words = [], []
    for status, (marker, colour, word) in _LOOKS.items():
        if numbers[status] and (status != "scored" or len(numbers) > 1):
            handles.append(Line2D([], [], marker=marker, color=colour, linestyle="", markersize=6, **_EDGE))
            words.append(f"{word} ({numbers[status]})")
    handles += [Line2D([], [], linestyle="") for _ in notes]
    words += notes
    if handles:
        figure.legend(handles, words, loc="outside lower center", ncols=2)


def _class_legend(
    figure: Figure, evaluation: Evaluation, names: Sequence[str], statuses: Collection[Status], notes: Sequence[str]
) -> None:
    """Classes and regions by their colours, and the markers of what was not scored."""
    from matplotlib.lines import Line2D

    shown = names[:_MOST_NAMES]
    handles = [Line2D([], [], marker="o", color=_colour(evaluation, name), linestyle="", **_EDGE) for name in shown]
    words = [plain(name, 30) for name in shown]
    if len(names) > len(shown):
        notes = [f"and {len(names) - len(shown)} more classes", *notes]
    for status, (marker, _, word) in _LOOKS.items():
        if status in statuses and status != "scored":
            handles.append(Line2D([], [], marker=marker, color=_TEXT, linestyle=""))
            words.append(word.partition(":")[0])
    handles += [Line2D([], [], linestyle="") for _ in notes]
    words += notes
    if not handles:
        return
    legend = figure.legend(handles, [" "] * len(handles), loc="outside right upper")  # "_..." would make no entry
    for text, word in zip(legend.get_texts(), words, strict=True):
        text.set_text(word)


def _svg(draw: Callable[[Figure], None], size: tuple[float, float], words: str) -> str:
    """What ``draw`` draws on a figure of a size in inches, as SVG that stands within a page and says ``words``."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    content = text_io.StringIO()
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that the font has not: the browser's will have them
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.18, color=_TEXT, linewidth=0.6)
            axes.set_axisbelow(True)
        figure.savefig(content, format="svg", dpi=_DPI, transparent=True, metadata={"Date": None})
    return _inline(content.getvalue(), words)


def _inline(svg: str, words: str) -> str:
    """SVG as it may stand within a page: without prolog and style sheet, with ids that no other picture has."""
    body = svg[svg.index("<svg") :]
    for part in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->"):
        body = re.sub(rf"\s*{part}", "", body, flags=re.DOTALL)
    mark = "p" + hashlib.sha256((words + body).encode()).hexdigest()[:8]

    def mended(tag: re.Match[str]) -> str:
        named = re.sub(r'( id="|href="#|url\(#)', rf"\1{mark}-", tag[0])
        return named.replace(_TEXT, "currentColor")

    body = re.sub(r"<[^>]+>", mended, body)  # what is written between tags is the user's
    said = f'role="img" aria-label="{html.escape(words, quote=True)}" stroke-linejoin="round"'
    return body.replace("<svg ", f"<svg {said} ", 1)
