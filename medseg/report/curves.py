"""The picture of a training: loss, Dice and learning rate over the iterations."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medseg.errors import InputError
from medseg.geometry import Float
from medseg.records import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("iteration", "seconds", "loss", "learning_rate", "dice")
"""Of a training log; ``dice`` is empty where no validation was run."""

_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#595959"  # told apart by colour-blind eyes too (Okabe and Ito)


def save_curve(log_csv: Path, png: Path) -> None:
    """Draw the training log as a picture, atomically.

    Args:
        log_csv: the log, with ``COLUMNS``; further columns are of no matter.
        png: the picture to write.

    Raises:
        InputError: the log cannot be read, lacks a column, holds no row or something other than numbers.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    log = read_log(log_csv)
    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    loss, dice, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    _draw_loss(loss, log)
    _draw_dice(dice, log)
    rate.plot(log["iteration"], log["learning_rate"], color=_GREY)
    rate.set(ylabel="learning rate", xlabel="iteration")
    rate.set_ylim(bottom=0)
    for axes in (loss, dice, rate):
        axes.grid(alpha=0.3)
    minutes = log["seconds"][-1] / 60.0
    figure.align_ylabels()
    figure.suptitle(f"{int(log['iteration'][-1]):,} iterations in {minutes:,.1f} minutes")
    with replacing(png) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_loss(axes: Axes, log: dict[str, Float]) -> None:
    axes.plot(log["iteration"], log["loss"], color=_BLUE, alpha=0.3, linewidth=0.8, label="loss")
    axes.plot(log["iteration"], smoothed(log["loss"]), color=_BLUE, label="running mean")
    axes.set(ylabel="training loss")
    axes.legend(frameon=False)


def _draw_dice(axes: Axes, log: dict[str, Float]) -> None:
    run = np.isfinite(log["dice"])
    axes.set(ylabel="validation Dice")
    if not run.any():
        axes.text(0.5, 0.5, "no validation was run", transform=axes.transAxes, ha="center", va="center", color=_GREY)
        return
    iteration, dice = log["iteration"][run], log["dice"][run]
    best = int(np.argmax(dice))
    axes.plot(iteration, dice, color=_ORANGE, marker="o", markersize=4, label="mean over classes")
    axes.axhline(dice[best], color=_GREY, linestyle=":", label=f"best {dice[best]:.4f} at {int(iteration[best]):,}")
    axes.legend(frameon=False, loc="lower right")


def smoothed(values: Float) -> Float:
    """Running mean over the last fiftieth of the training, of what there is at the start; over finite values alone."""
    width = max(1, len(values) // 50)
    finite = np.isfinite(values)
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - width)
    total, number = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(finite, values, 0.0), finite))
    with np.errstate(invalid="ignore"):  # where none is finite there is no mean
        return np.asarray((total[end] - total[start]) / (number[end] - number[start]))


def read_log(log_csv: Path) -> dict[str, Float]:
    """The columns of a training log, one row at least; NaN where a cell is empty. Errors as ``save_curve``."""
    try:
        with log_csv.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]  # a kill cuts a row short
    except (OSError, UnicodeDecodeError) as failure:
        raise InputError(log_csv, f"cannot be read: {failure}", "a training log") from None
    absent = [column for column in COLUMNS if not rows or column not in rows[0]]
    if absent:
        raise InputError(log_csv, f"has no {', '.join(absent)}", f"rows with {', '.join(COLUMNS)}")
    try:
        return {column: np.array([float(row[column] or "nan") for row in rows]) for column in COLUMNS}
    except ValueError as failure:
        raise InputError(log_csv, f"holds something other than numbers: {failure}", "a training log") from None
