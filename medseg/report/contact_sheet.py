"""The contact sheet: images with the outlines of their single objects, reference beside prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from medseg.geometry import Float
from medseg.records import replacing
from medseg.report.outlines import outlines
from medseg.report.view import window_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"reference": "#009e73", "prediction": "#d55e00"}  # colour-blind eyes tell them apart (Okabe and Ito)
_WIDTH, _HEIGHT = 3.2, 3.0  # of a picture, inches


@dataclass(frozen=True)
class Panel:
    """One row of a contact sheet.

    Attributes:
        title: name and scores.
        image: (C, I, J, 1); three channels are shown as colours, of another number the first as grey.
        reference, prediction: ids (I, J, 1).
    """

    title: str
    image: NDArray[Any]
    reference: NDArray[Any]
    prediction: NDArray[Any]


def save_contact_sheet(panels: Sequence[Panel], png: Path) -> None:
    """Draw a row of three pictures for each panel, atomically: image, reference outlines, prediction outlines.

    Args:
        panels: one at least.
        png: the picture to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * _WIDTH, _HEIGHT * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, panel in zip(figure.subfigures(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        picture = _shades(panel.image)
        outlined = {"image": None, "reference": panel.reference, "prediction": panel.prediction}
        row.suptitle(panel.title, fontsize=9, parse_math=False)
        for axes, (name, ids) in zip(row.subplots(1, 3), outlined.items(), strict=True):
            axes.imshow(picture, extent=(0, picture.shape[1], picture.shape[0], 0))
            axes.set_title(name, fontsize=8)
            axes.set_axis_off()
            if ids is not None:
                _outline(axes, ids, _COLOURS[name])
    with replacing(png) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _shades(image: NDArray[Any]) -> Float:
    """The image as colours (rows, columns, 3) from 0 to 1, stretched so that a dark image can be seen."""
    channels = image[[0, 1, 2] if len(image) == 3 else [0, 0, 0], :, :, 0]
    return window_of(channels).shades(channels.transpose(2, 1, 0))


def _outline(axes: Axes, ids: NDArray[Any], colour: str) -> None:
    """Lines around all objects, as wide in a large image as in a small one."""
    from matplotlib.collections import LineCollection

    loops = [loop for loops in outlines(ids[:, :, 0].T).values() for loop in loops]
    axes.add_collection(LineCollection(loops, colors=[colour], linewidths=0.7), autolim=False)
