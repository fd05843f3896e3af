"""The contact sheet: images with the outlines of their single objects, reference beside prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.geometry import Float
from medseg.records import replacing

_REFERENCE, _PREDICTION = (0.0, 0.62, 0.45), (0.84, 0.37, 0.0)  # told apart by colour-blind eyes too (Okabe and Ito)
_DARKEST, _BRIGHTEST = 0.5, 99.5
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
        shown = _shown(panel.image)
        pictures = {
            "image": shown,
            "reference": _outlined(shown, panel.reference, _REFERENCE),
            "prediction": _outlined(shown, panel.prediction, _PREDICTION),
        }
        row.suptitle(panel.title, fontsize=9)
        for axes, (name, picture) in zip(row.subplots(1, 3), pictures.items(), strict=True):
            axes.imshow(picture.transpose(1, 0, 2), interpolation="nearest")
            axes.set_title(name, fontsize=8)
            axes.set_axis_off()
    with replacing(png) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def outlines(ids: NDArray[Any]) -> NDArray[np.bool_]:
    """The pixels of an object with a neighbour (across an edge) that is not of it; the image's border is none.

    Args:
        ids: (I, J), 0 background.
    """
    edge = np.zeros(ids.shape, dtype=bool)
    for here, there in (np.s_[:-1, :], np.s_[1:, :]), (np.s_[:, :-1], np.s_[:, 1:]):
        differ = ids[here] != ids[there]
        edge[here] |= differ
        edge[there] |= differ
    return np.asarray(edge & (ids != 0))


def _shown(image: NDArray[Any]) -> Float:
    """The image as colours (I, J, 3) from 0 to 1, stretched so that a dark image can be seen."""
    colours = image[:, :, :, 0] if image.shape[0] == 3 else np.repeat(image[:1, :, :, 0], 3, axis=0)
    low, high = np.percentile(colours, (_DARKEST, _BRIGHTEST))
    return np.asarray(np.clip((colours.transpose(1, 2, 0) - low) / max(high - low, 1e-9), 0.0, 1.0), dtype=np.float64)


def _outlined(shown: Float, ids: NDArray[Any], colour: tuple[float, float, float]) -> Float:
    picture = shown.copy()
    picture[outlines(ids[:, :, 0])] = colour
    return picture
