"""Pictures of masks as outlines on their image: three planes where two masks differ most, and a mosaic of many cases.

Planes are shown as radiology does: axial with the patient's right on the left and the front up, coronal with the head
up, sagittal with the front on the left. An oblique grid is shown along the world axes nearest to its own. Outlines run
along the edges of voxels, so that no voxel is smoothed away. A picture (.png and the like) is one plane, as on screen.
"""

from __future__ import annotations

import io as bytes_io
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medseg import NOTICE
from medseg.cases import find_cases
from medseg.errors import InputError
from medseg.folder import require_writable
from medseg.geometry import Box
from medseg.io import own_labels, read_mask, read_volume
from medseg.records import write_bytes
from medseg.report.outlines import outlines
from medseg.report.view import View, Voxel, across
from medseg.terminology import Colour
from medseg.volume import Labels, Mask, Volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_TILES = 48
"""Of a mosaic."""

_SAGITTAL, _CORONAL, _AXIAL = range(3)  # the axis of a ``View`` that a plane is across
_NAMES = ("sagittal", "coronal", "axial")
_ENDS = ("RL", "AP", "SI")  # letters where each axis begins and ends on the screen, left to right or top to bottom
_LEAST_SHOWN = 0.3  # part of a plane that is shown at least, so that one sees where it is
_ROOM = 1.4  # the part shown, over the size of the structures
_OBLIQUE_DEGREES = 5.0  # from which a caption tells it
_MOST_NAMES, _LONGEST_NAME = 24, 40
_DPI = 100
_SIDE, _TILE, _COLUMNS = 4.0, 1.5, 8  # inches of a plane and a tile, and tiles in a row
_LEAST_WIDTH = 5.0  # inches, so that there is room for the notice
_GAP, _LINE = 0.06, 0.2  # inches between planes, and of a line of text
_WHITE, _GREY, _BLACK = "#ffffff", "#b0b0b0", "#000000"

_EDGES = (
    (0.01, 0.5, "left", "center"),
    (0.99, 0.5, "right", "center"),
    (0.5, 0.99, "center", "top"),
    (0.5, 0.01, "center", "bottom"),
)
"""Where a letter stands at the left, right, upper and lower edge of a plane."""


@dataclass(frozen=True, eq=False)
class _Plane:
    """One slice as it lies on the screen: rows downwards, columns to the right.

    Attributes:
        caption: which it is.
        image: (C, rows, columns), intensities as stored, and later shades from 0 to 1; zeros where there is no image.
        masks: (0 to 2, rows, columns), the reference first; label values, 0 also for those without a name.
        spacing: distance of rows and of columns, mm.
        letters: at the left, right, upper and lower edge; empty of a picture.
        unit: of lengths.
    """

    caption: str
    image: NDArray[Any]
    masks: NDArray[Any]
    spacing: tuple[float, float]
    letters: str
    unit: str

    @property
    def size(self) -> tuple[float, float]:
        """Height and width, mm."""
        rows, columns = self.image.shape[1:]
        return rows * self.spacing[0], columns * self.spacing[1]

    def cropped(self) -> _Plane:
        """The structures with some room around, as square as the plane allows, and no less than ``_LEAST_SHOWN``.

        A copy, without a hold on the whole slice; all of it where nothing is marked.
        """
        shape, spacing = np.array(self.image.shape[1:]), np.array(self.spacing)
        box = Box.around((self.masks != 0).any(axis=0))
        size = np.maximum(_ROOM * np.array(box.shape), _LEAST_SHOWN * shape) * spacing
        number = np.minimum(np.ceil(size.max() / spacing).astype(int), shape)
        start = np.clip((np.array(box.start) + box.stop - number) // 2, 0, shape - number)
        cut = Box(tuple(start.tolist()), tuple((start + number).tolist())).slices
        return replace(self, image=self.image[:, *cut].copy(), masks=self.masks[:, *cut].copy())


def planes_png(
    image: Volume | None, reference: Mask | None, prediction: Mask | None, labels: Labels, *, title: str = ""
) -> bytes:
    """Draw the planes of most error of one case.

    Args:
        image: (C, I, J, K), of which the first channel is shown, of a picture of three channels its colours.
        reference: outlined with a solid line, in the colour of each label.
        prediction: outlined with dashes; with a solid line where there is no reference.
        labels: names of the values that are outlined. Others are not drawn.
        title: stands above.

    Returns:
        A PNG file. Across each axis the slice of ``View.worst_place`` is shown, cut to the structures in it and some
        room around them.

    Raises:
        GeometryMismatch: they do not lie on one grid.
        ValueError: there is neither image nor mask.
    """
    planes = list(_planes(View.of(image, reference, prediction), labels).values())
    widths = [_SIDE * float(np.clip(plane.size[1] / plane.size[0], 0.5, 1.5)) for plane in planes]
    content = sum(widths) + _GAP * (len(planes) + 1)
    width = max(content, _LEAST_WIDTH)
    legend = _Legend(planes, labels, width, both=reference is not None and prediction is not None)
    top = _LINE * (bool(title) + bool(planes[0].caption)) + 2 * _GAP
    figure = _figure(width, top + _SIDE + legend.height + _LINE)
    if title:
        _say(figure, _GAP, _GAP, plain(title), size=11, weight="bold")
    left = _GAP + (width - content) / 2
    for plane, wide in zip(planes, widths, strict=True):
        _say(figure, left, top - _LINE - _GAP / 2, plane.caption, size=9, color=_GREY)
        _draw(_axes(figure, left, top, wide, _SIDE), plane, labels)
        left += wide + _GAP
    legend.draw(figure, top + _SIDE)
    return _png(figure)


class _Tile(NamedTuple):
    """A case in a mosaic: its name, and its planes as ``_planes`` gives them."""

    name: str
    planes: dict[int, _Plane]

    @property
    def fullest(self) -> int:
        """The axis whose plane has the most voxels marked."""
        return max(self.planes, key=lambda axis: np.count_nonzero(self.planes[axis].masks))


def mosaic_png(tiles: Iterable[tuple[str, Volume | None, Mask]], labels: Labels) -> bytes:
    """Draw a small picture a case: the slice with the most voxels marked, cut to what is marked.

    All are of the plane that has the most voxels marked in most cases, so that they can be compared.

    Args:
        tiles: name, image and mask of each case; one at least, ``MOST_TILES`` at most. They are taken one by one, and
            no more than their slices is kept.
        labels: names of the values that are outlined.

    Raises:
        GeometryMismatch: an image and its mask do not lie on one grid.
        ValueError: there are no tiles, or too many.
    """
    drawn = [
        _Tile(name, _planes(View.of(image, None, mask), labels)) for name, image, mask in islice(tiles, MOST_TILES + 1)
    ]
    if not 0 < len(drawn) <= MOST_TILES:
        raise ValueError(f"a mosaic has 1 to {MOST_TILES} tiles")
    votes = Counter(tile.fullest for tile in drawn)
    axis = max((_AXIAL, _CORONAL, _SAGITTAL), key=lambda axis: votes[axis])
    shown = [tile.planes.get(axis) or tile.planes[tile.fullest] for tile in drawn]
    columns = min(len(drawn), _COLUMNS)
    width, step = max(columns * (_TILE + _GAP) + _GAP, _LEAST_WIDTH), _TILE + _LINE + _GAP
    legend = _Legend(shown, labels, width)
    bottom = -(-len(drawn) // columns) * step + _GAP
    figure = _figure(width, bottom + legend.height + _LINE)
    for n, (tile, plane) in enumerate(zip(drawn, shown, strict=True)):
        left, top = _GAP + n % columns * (_TILE + _GAP), _GAP + n // columns * step
        _say(figure, left, top, plain(tile.name, 22), size=7, color=_GREY)
        axes = _axes(figure, left, top + _LINE, _TILE, _TILE)
        _draw(axes, plane, labels, small=True)
        if not plane.masks.any():
            _cased(axes, 0.5, 0.25, "nothing marked", 8, "center", "center")
    legend.draw(figure, bottom)
    return _png(figure)


def save_preview(
    image: Path | str,
    mask: Path,
    out: Path,
    reference: Path | None = None,
    labels: Labels | None = None,
    *,
    series: Sequence[str] = (),
    resample_irregular: bool = False,
) -> None:
    """Draw one case from its files as ``planes_png`` does, atomically.

    Args:
        image: where the image is, as ``medseg.cases.find_cases`` takes it.
        mask: as ``medseg.io.read_mask`` takes it.
        out: the .png to write.
        reference: a mask to compare with.
        labels: names of the values; without them those that a mask knows, else ``label_<value>``.
        series: which DICOM series are meant, as ``find_cases`` takes it.
        resample_irregular: likewise.

    Raises:
        InputError: a file cannot be used, there are several images, or ``out`` is no place for a PNG file.
        GeometryMismatch: image and masks do not lie on one grid.
    """
    if out.suffix.lower() != ".png":
        raise InputError(out, "is no name of a PNG file", "a name that ends in .png")
    require_writable(out)
    cases = find_cases(image, series=series, resample_irregular=resample_irregular)
    if len(cases) > 1:
        raise InputError(image, f"holds {len(cases)} images", "one", "name one of them")
    volume = read_volume(cases[0].images)
    paths = [mask] if reference is None else [mask, reference]
    known = labels or next((found for path in paths if (found := own_labels(path))), None)
    masks = [read_mask(path, known, volume) for path in paths]
    for read in masks:
        known = known.completed(read.labels) if known and read.labels else known
    names = known or _numbered(masks)
    content = planes_png(volume, masks[1] if reference else None, masks[0], names, title=cases[0].id)
    write_bytes(out, content)


def plain(name: str, longest: int = _LONGEST_NAME) -> str:
    """A name of the user's in one short line: nothing in it that cannot be shown."""
    line = "".join(letter if letter.isprintable() else " " for letter in name)
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _planes(view: View, labels: Labels) -> dict[int, _Plane]:
    """Axis of the view -> the plane across it, cropped and in shades, axial first; of a single slice that one alone."""
    place = view.worst_place(labels)
    order = (_AXIAL, _CORONAL, _SAGITTAL)
    single = [axis for axis in order if view.grid.shape[axis] == 1]
    planes = {axis: _plane(view, place, axis, labels).cropped() for axis in single[:1] or order}
    shown = [plane.image.reshape(len(plane.image), -1) for plane in planes.values()]
    masks = zip(*(plane.masks for plane in planes.values()), strict=True)
    marks = [np.concatenate([slice_.ravel() != 0 for slice_ in slices]) for slices in masks]
    window = view.window(place, np.concatenate(shown, axis=1), marks)
    return {axis: replace(plane, image=window.shades(plane.image)) for axis, plane in planes.items()}


def _plane(view: View, place: Voxel, axis: int, labels: Labels) -> _Plane:
    """The slice at a voxel across an axis of the view."""
    column, row = (other for other in range(3) if other != axis)
    rows, columns = view.grid.shape[row], view.grid.shape[column]

    def cut(array: NDArray[Any]) -> NDArray[Any]:
        """The slice of (..., I, J, K); right, front and head, where the axes end, are on the left or above."""
        return across(array, axis, place[axis]).swapaxes(-1, -2)[..., ::-1, ::-1]

    image = np.zeros((1, rows, columns)) if view.image is None else cut(view.image)
    masks = [cut(mask) for mask in view.masks]
    named = [np.where(np.isin(mask, list(labels.values.values())), mask, 0) for mask in masks]
    return _Plane(
        caption="" if view.is_picture else _caption(view, place, axis),
        image=image,
        masks=np.stack(named) if named else np.zeros((0, rows, columns), np.uint8),
        spacing=(view.grid.spacing[row], view.grid.spacing[column]),
        letters="" if view.is_picture else _ENDS[column] + _ENDS[row],
        unit="px" if view.is_picture else "mm",
    )


def _caption(view: View, place: Voxel, axis: int) -> str:
    """Name of a plane, number of the slice as the file counts them (from 1), and how oblique it is."""
    number, slices = place[axis], view.grid.shape[axis]
    if view.turn.flips[axis]:
        number = slices - 1 - number
    first, second = (view.grid.direction[:, other] for other in range(3) if other != axis)
    normal = np.cross(first, second)
    degrees = float(np.degrees(np.arccos(min(1.0, abs(normal[axis]) / float(np.linalg.norm(normal))))))
    oblique = f", oblique by {degrees:.0f}°" if degrees >= _OBLIQUE_DEGREES else ""
    return f"{_NAMES[axis]}, slice {number + 1} of {slices}{oblique}"


def _numbered(masks: Sequence[Mask]) -> Labels:
    """Labels for the values of masks that nobody named.

    Raises:
        InputError: they are more than 254.
    """
    values = set[int]().union(*(mask.counts() for mask in masks)) - {0}
    return Labels.numbered(values or {1}, masks[0].paths[0] if masks[0].paths else "mask")


# ---- drawing ---------------------------------------------------------------------------------------------------------


class _Line(NamedTuple):
    """Look of an outline, of which the colours of labels are lightened by a part towards white."""

    width: float
    dashes: tuple[float, ...] = ()
    lightened: float = 0.0

    def colour(self, rgb: Colour) -> tuple[float, float, float]:
        """The colour of a label as fractions of 1."""
        red, green, blue = (self.lightened + (1.0 - self.lightened) * part / 255.0 for part in rgb)
        return red, green, blue

    @property
    def style(self) -> Any:
        """As matplotlib takes it."""
        return (0, self.dashes) if self.dashes else "solid"


_SOLID, _THIN = _Line(1.5), _Line(1.0)
_DASHED = _Line(1.1, (3.0, 2.4), 0.4)  # light, so that it can be told from a solid line that it lies on


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor=_BLACK)
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the upper left."""
    wide, high = figure.get_size_inches()
    axes = figure.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high))
    axes.set_axis_off()
    return axes


def _say(figure: Figure, left: float, top: float, text: str, **look: Any) -> None:
    """Text at a place in inches from the upper left."""
    wide, high = figure.get_size_inches()
    figure.text(left / wide, 1 - top / high, text, **{"color": _WHITE, "va": "top", "parse_math": False, **look})


def _draw(axes: Axes, plane: _Plane, labels: Labels, small: bool = False) -> None:
    """Draw a plane with its outlines and letters; a small one without a scale bar."""
    height, width = plane.size
    look: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "bilinear", "aspect": "equal"}
    axes.imshow(np.moveaxis(plane.image, 0, -1), extent=(0, width, height, 0), **look)
    for number, mask in enumerate(plane.masks):
        _outline(axes, mask, plane.spacing, labels, _DASHED if number else _THIN if small else _SOLID)
    axes.set(xlim=(0, width), ylim=(height, 0))
    for letter, place in zip(plane.letters, _EDGES, strict=False):
        _cased(axes, *place[:2], letter, 7 if small else 11, *place[2:])
    if not small:
        _scale_bar(axes, plane)


def _outline(axes: Axes, mask: NDArray[Any], spacing: tuple[float, float], labels: Labels, line: _Line) -> None:
    """The outlines of all labels of a mask, each on a dark casing; casings lie below all lines, dashes above."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    found = outlines(mask)
    for name in labels.names:
        if loops := found.get(labels.values[name]):
            path = Outline.make_compound_path(*(Outline(loop * spacing[::-1], closed=True) for loop in loops))
            look: dict[str, Any] = {"fill": False, "joinstyle": "miter", "capstyle": "butt"}
            casing = {"edgecolor": _BLACK, "linewidth": line.width + 1.4, "alpha": 0.7, "zorder": 2}
            axes.add_patch(PathPatch(path, **casing, **look))
            look |= {"edgecolor": line.colour(labels.colour(name)), "zorder": 4 if line.dashes else 3}
            axes.add_patch(PathPatch(path, linewidth=line.width, linestyle=line.style, **look))


def _scale_bar(axes: Axes, plane: _Plane) -> None:
    height, width = plane.size
    length = _round_length(0.35 * width)
    up = 0.035 if width > height / 2 else 0.1  # in a narrow plane above the letter
    x, y = 0.03 * min(width, height), height - up * max(width, height)
    for colour, thickness in ((_BLACK, 4.5), (_WHITE, 2.0)):
        axes.plot([x, x + length], [y, y], color=colour, linewidth=thickness, solid_capstyle="butt", zorder=6)
    _cased(axes, x / width, 1 - (y - 0.015 * height) / height, f"{length:g} {plane.unit}", 8, "left", "bottom")


def _round_length(most: float) -> float:
    """The largest of 1, 2, 5, 10, 20, 50, ... that is not more than ``most``."""
    power = 10.0 ** np.floor(np.log10(most))
    return float(power * max(digit for digit in (1.0, 2.0, 5.0) if digit * power <= most * (1 + 1e-9)))


def _cased(axes: Axes, x: float, y: float, text: str, size: float, ha: str, va: str) -> None:
    """White text with a dark rim, at a place within the axes from 0 to 1."""
    from matplotlib.patheffects import withStroke

    look: dict[str, Any] = {"transform": axes.transAxes, "ha": ha, "va": va, "zorder": 7, "parse_math": False}
    written = axes.text(x, y, text, color=_WHITE, size=size, **look)
    written.set_path_effects([withStroke(linewidth=2, foreground=_BLACK)])


class _Legend:
    """What the lines of some planes mean, in as many columns as fit, above the notice."""

    def __init__(self, planes: Sequence[_Plane], labels: Labels, width: float, both: bool = False) -> None:
        there = {value for plane in planes for value in np.unique(plane.masks).tolist()}
        names = [name for name in labels.names if labels.values[name] in there]
        white = (255, 255, 255)
        entries = [("reference", white, _SOLID), ("prediction", white, _DASHED)] if both else []
        entries += [(plain(name), labels.colour(name), _SOLID) for name in names[:_MOST_NAMES]]
        if len(names) > _MOST_NAMES:
            entries.append((f"and {len(names) - _MOST_NAMES} more", (0, 0, 0), _SOLID))  # black on black: no line
        self.entries = entries
        self.column = 0.55 + 0.085 * max((len(word) for word, *_ in entries), default=0)
        self.columns = max(1, int((width - 2 * _GAP) / self.column))
        self.height = -(-len(entries) // self.columns) * _LINE + 2 * _GAP

    def draw(self, figure: Figure, top: float) -> None:
        """Draw it below ``top`` (inches), and the notice below that."""
        from matplotlib.lines import Line2D

        wide, high = figure.get_size_inches()
        for n, (word, rgb, line) in enumerate(self.entries):
            left = 2 * _GAP + n % self.columns * self.column
            y = top + 2 * _GAP + n // self.columns * _LINE
            xs, ys = [left / wide, (left + 0.32) / wide], [1 - (y + 0.06) / high] * 2
            figure.add_artist(Line2D(xs, ys, color=line.colour(rgb), linewidth=line.width, linestyle=line.style))
            _say(figure, left + 0.4, y, word, size=8)
        _say(figure, 2 * _GAP, high - _LINE, NOTICE, size=7, color=_GREY)


def _png(figure: Figure) -> bytes:
    content = bytes_io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that the font has not: drawn as boxes
        figure.savefig(content, format="png", dpi=_DPI, metadata={"Software": None})
    return content.getvalue()
