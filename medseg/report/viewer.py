"""A case for the viewer of a report: the voxels around its structures in 8 bits, compressed, as text for a page.

A page holds, for each viewer, ``<section class="viewer">`` and right after it ``<script type="application/json"
class="viewer-data">`` with what ``pack`` gives, through ``as_json``; ``script()`` once, after the last of them; and,
where ``niivue_script()`` gives one, that text once in ``<script type="text/plain" class="niivue">`` before it, which is
not run before somebody wants the view in three dimensions.
"""

from __future__ import annotations

import base64
import gzip
import json
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.download import viewer_file
from medseg.geometry import Box, Float, Geometry
from medseg.report.view import View, Window
from medseg.volume import Labels, Mask, Volume

MOST_VOXELS = 1_200_000
"""Of a viewer. As text of a page, noise of so many voxels takes 1.3 MB, and five viewers leave room in 15 MB."""

MARGIN_MM = 20.0
"""What is shown around the structures: enough to see where in the body they are."""

_NOT_LABELLED = (128, 128, 128)  # colour of what ``Labels.ignore`` marks


def pack(
    case: str, image: Volume | None, reference: Mask | None, prediction: Mask | None, labels: Labels
) -> dict[str, Any]:
    """What the viewer shows of a case, as plain JSON data: equal inputs, equal text.

    Voxels are in the order R, A, S (the first axis runs fastest), cropped to the box around both masks and
    ``MARGIN_MM``, and of no more than ``MOST_VOXELS`` (images by the mean of blocks, masks by their middle). Of an
    image with three channels that is a picture all are shown, of any other the first. Values are in 8 bits between
    the ends of ``range``; those that are not finite are the darkest.

    Args:
        case: its name.
        image: None where there is none.
        reference: the same; on the grid of the image.
        prediction: the same; one of the three is needed.
        labels: those of both masks.

    Raises:
        GeometryMismatch: they lie on different grids.
        InputError: a mask holds a value without a name.
    """
    view = View.of(image, reference, prediction)
    grid, place = view.grid, view.worst_place(labels)
    box = Box.whole(grid.shape) if view.is_picture else _box_around(view.marked_box(labels), grid)
    factors = _factors(box.shape, grid.spacing, MOST_VOXELS // (1 if view.image is None else len(view.image)))
    shown = _shown_grid(grid.cropped(box), factors)
    masks = [
        None if mask is None else _middles(mask[box.slices], factors) for mask in (view.reference, view.prediction)
    ]
    indices = [None if mask is None else labels.to_indices(mask, case) for mask in masks]
    body: dict[str, Any] = {
        "case": case,
        "shape": list(shown.shape),
        "spacing_mm": list(shown.spacing),
        "affine": shown.affine.tolist(),
        "picture": view.is_picture,
        "note": _note(box, grid, shown, factors, view.is_picture),
        "labels": _names_and_colours(labels),
        "start": [(n - first) // f for n, first, f in zip(place, box.start, factors, strict=True)],
        "reference": None if indices[0] is None else _packed(indices[0]),
        "prediction": None if indices[1] is None else _packed(indices[1]),
    }
    if view.image is None:
        return body | {"image": None, "channels": 0, "range": [0.0, 1.0], "window": [0.0, 1.0]}
    values = _means(view.image[:, *box.slices], factors)
    marks = [np.isin(mask, list(labels.values.values())) for mask in masks if mask is not None]
    return body | _packed_image(values, view.window(place, values, marks))


def script() -> str:
    """The viewer: a script without library, which mounts itself on all sections of the page."""
    parts = (asset(name) for name in ("viewer-drawing.js", "viewer-niivue.js", "viewer.js"))
    return "\n".join(('(() => {\n"use strict";', *parts, "})();"))


def niivue_script() -> str | None:
    """NiiVue as ``medseg download viewer`` has fetched it, under its licence; None where it is not there."""
    path = viewer_file()
    if path is None:
        return None
    code = path.read_text(encoding="utf-8").replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return f"/*\n{asset('niivue.licence.txt')}*/\n{code}"


def asset(name: str) -> str:
    """The text of a file of the page that is not Python."""
    return (resources.files("medseg.report") / "assets" / name).read_text(encoding="utf-8")


def _box_around(structures: Box | None, grid: Geometry) -> Box:
    """The box around the structures with its margin; the whole grid where there are none."""
    if structures is None:
        return Box.whole(grid.shape)
    margin = np.ceil(MARGIN_MM / np.array(grid.spacing)).astype(int)
    start = np.maximum(np.array(structures.start) - margin, 0)
    stop = np.minimum(np.array(structures.stop) + margin, grid.shape)
    return Box(tuple(start.tolist()), tuple(stop.tolist()))


def _factors(shape: tuple[int, ...], spacing: tuple[float, ...], most: int) -> tuple[int, ...]:
    """By how much to shrink each axis, the finest first, until there are no more than so many voxels."""
    factors = np.ones(3, dtype=int)
    while np.prod(-(-np.array(shape) // factors)) > most:
        finest = np.where(factors < shape, spacing * factors, np.inf)
        factors[np.argmin(finest)] += 1
    return tuple(factors.tolist())


def _shown_grid(grid: Geometry, factors: tuple[int, ...]) -> Geometry:
    """The grid of blocks of voxels. The last block of an axis may reach beyond the voxels that there are."""
    blocks = -(-np.array(grid.shape) // factors)
    affine = grid.affine.copy()
    affine[:3, 3] = grid.world((np.array(factors) - 1.0) / 2.0)
    affine[:3, :3] *= factors
    return Geometry(tuple(blocks.tolist()), affine)


def _middles(mask: NDArray[Any], factors: tuple[int, ...]) -> NDArray[Any]:
    """The middle voxel of each block."""
    places = [np.minimum(np.arange(0, n, f) + f // 2, n - 1) for n, f in zip(mask.shape, factors, strict=True)]
    return mask[np.ix_(*places)]


def _means(image: NDArray[Any], factors: tuple[int, ...]) -> Float:
    """The mean of each block (C, I, J, K), a few slices at a time; not a number where a voxel of it is not finite."""
    starts = [np.arange(0, n, f) for n, f in zip(image.shape[1:], factors, strict=True)]
    slabs = []
    for first in starts[2]:
        slab = image[..., first : first + factors[2]].astype(np.float64)
        for axis in (1, 2, 3):
            places = starts[axis - 1] if axis < 3 else np.array([0])
            sizes = np.diff([*places, slab.shape[axis]])
            with np.errstate(over="ignore", invalid="ignore"):
                sums = np.add.reduceat(slab, places, axis=axis)
            slab = sums / sizes.reshape([-1 if n == axis else 1 for n in range(4)])
        slabs.append(slab)
    means = np.concatenate(slabs, axis=3)
    return np.where(np.isfinite(means), means, np.nan)


def _packed_image(values: Float, window: Window) -> dict[str, Any]:
    """The image in 8 bits, the window to begin with, and the widest, whose ends 0 and 255 stand for.

    The widest has half the width of the first more on each side, as far as there are values.
    """
    finite, margin = values[np.isfinite(values)], (window.high - window.low) / 2.0
    lowest, highest = finite.min(initial=window.high), finite.max(initial=window.low)
    widest = Window(
        float(min(window.low, max(lowest, window.low - margin))),
        float(max(window.high, min(highest, window.high + margin))),
    )
    shades = np.rint(255.0 * widest.shades(values)).astype(np.uint8)
    return {"image": _packed(shades), "channels": len(values), "range": list(widest), "window": list(window)}


def _names_and_colours(labels: Labels) -> list[dict[str, Any]]:
    """By index, from 1."""
    named = [{"name": name, "colour": list(labels.colour(name))} for name in labels.names]
    return [*named, {"name": "not labelled", "colour": list(_NOT_LABELLED)}] if labels.ignore is not None else named


def _note(box: Box, grid: Geometry, shown: Geometry, factors: tuple[int, ...], flat: bool) -> str:
    """What is shown, in words, where it is not the image as it is."""
    said = []
    if box != Box.whole(grid.shape):
        said.append(f"Cropped to {MARGIN_MM:g} mm around the structures.")
    if max(factors) > 1:
        size = " x ".join(f"{s:.3g}" for s in shown.spacing)
        said.append(f"Shown at {size} pixels." if flat else f"Shown at {size} mm.")
    return " ".join(said)


def _packed(array: NDArray[np.uint8]) -> str:
    """Bytes, of which those of one voxel and then the first axis run fastest: compressed, in base 64."""
    return base64.b64encode(gzip.compress(array.tobytes(order="F"), 6, mtime=0)).decode("ascii")


def as_json(body: dict[str, Any]) -> str:
    """What ``pack`` gives as text that is safe within a script element of a page."""
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
