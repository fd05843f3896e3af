"""Scenes: images from above that are larger than memory, segmented window by window into a georeferenced mask.

The network sees tiles of one patch, which lie on a lattice over the whole scene, half a patch apart from its first
pixel on. A window of the mask is made of every tile that touches it, and no tile depends on the window. So the mask is
the same for every size of window, bit for bit, and that of one window over the whole scene.

A scene is read as ``medseg.io`` reads a picture: column and row as I and J, one pixel one millimetre. Nothing is
resampled: pixels must be as large on the ground as those of the training tiles. Coordinates, transform and size of the
scene are handed on to the mask untouched.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import medseg
from medseg.engines import choose_device
from medseg.errors import GeometryMismatch, InputError, PlanError, UnreadableFile
from medseg.geometry import Reorientation
from medseg.io.picture import picture_grid
from medseg.metrics import joint_dice, joint_histogram
from medseg.package import ModelPackage
from medseg.plan import Configuration, Plan
from medseg.preprocess import normalise
from medseg.progress import Progress, silent, track
from medseg.records import replacing
from medseg.sliding_window import Network, slabs
from medseg.volume import Labels

SUFFIXES = (".tif", ".tiff")
BLOCK = 256
"""Edge of a block of the mask's file, pixels. A window that is a multiple of it writes every block once."""
CACHE_BYTES = 2**28
"""Blocks of the files that GDAL keeps; by itself it would take a twentieth of the machine's memory."""
_BY_IMAGE = {"zscore": "mean and standard deviation", "minmax": "smallest and largest value"}
_Span = tuple[int, int]
_Place = tuple[_Span, _Span]


@dataclass(frozen=True)
class Lattice:
    """The tiles along one axis: the first at pixel 0, the next half a patch further, the last one up to the end.

    Attributes:
        size: pixels of the scene.
        patch: pixels of a tile, an even number.
    """

    size: int
    patch: int

    def around(self, start: int, stop: int) -> tuple[int, int]:
        """First pixel and end of the tiles that touch the pixels ``start`` to ``stop`` (exclusive).

        The end may lie beyond the scene; a scene smaller than a tile is one tile, of the scene's own size.
        """
        if self.size <= self.patch:
            return 0, self.size
        step = self.patch // 2
        first = max(0, (start - self.patch) // step + 1)
        last = min((stop - 1) // step, -(-(self.size - self.patch) // step))
        return first * step, last * step + self.patch


@dataclass(frozen=True)
class _Classifier:
    """What turns a window's pixels into label indices."""

    networks: Sequence[Network]
    plan: Plan
    setup: Configuration
    turn: Reorientation
    mirror: bool
    device: torch.device

    @property
    def patch(self) -> tuple[int, int]:
        """Columns and rows of a tile."""
        sizes = dict(zip(self.turn.axes[1:], self.setup.patch_size, strict=True))
        return sizes[0], sizes[1]

    def __call__(self, bands: NDArray[Any], shape: tuple[int, int]) -> NDArray[np.uint8]:
        """Label indices (rows, columns) of bands (C, rows, columns), made ``shape`` large by zeros, as in training."""
        missing = [(0, n - size) for n, size in zip(shape, bands.shape[1:], strict=True)]
        image = np.pad(normalise(bands, self.plan.normalisation), [(0, 0), *missing])
        image = self.turn.apply(image.transpose(0, 2, 1)[..., np.newaxis])
        finished = slabs(
            self.networks,
            image,
            self.setup.patch_size,
            overlap=0.5,
            mirror_axes=self.setup.mirror_axes if self.mirror else (),
            device=self.device,
            axis=1,  # whatever the window's shape: in another order sums round otherwise
        )
        indices = np.empty(image.shape[1:], dtype=np.uint8)
        for slab in finished:
            winners = slab.logits.argmax(dim=-1).to(torch.uint8).cpu().numpy()  # (planes, 1, columns)
            indices[:, slab.start : slab.stop] = winners.swapaxes(0, 1)
        return self.turn.inverse.apply(indices)[..., 0].T


def predict_scene(
    package: ModelPackage,
    source: Path,
    target: Path,
    *,
    device: str = "auto",
    mirror: bool = False,
    window: int = 1024,
    progress: Progress = silent,
) -> None:
    """Segment a GeoTIFF of any size into a tiled, compressed GeoTIFF of label values.

    Memory is that of one window and a patch around it, and 256 MiB of blocks, whatever the size of the scene. The mask
    has the scene's size, coordinate system, transform or control points, where it has any; names of the labels and the
    model stand in its tags. Pixels without data (by the file's nodata value or mask in all bands, or not finite in one)
    become background; to their neighbours they look as they are stored, or as 0 where not finite. A window of nothing
    else is not computed. The target appears when it is complete; a file of that name is replaced then, and stays as it
    was where anything fails.

    Args:
        package: a model trained on pictures (configuration 2d) whose channels have a fixed scale.
        source: a file that rasterio reads, one band a channel of the model; an alpha band besides them counts as mask.
        target: ends in .tif or .tiff.
        device: as in training.
        mirror: average over mirrored images along the axes that the plan allows: two to four times the work.
        window: edge of what is computed at once, pixels; changes memory and speed, not the mask.
        progress: told after each window.

    Raises:
        PlanError: the plan scales each image by itself, is none of pictures, or resamples.
        InputError: rasterio is not installed; another number of bands, a palette, complex values; the target's name;
            a window takes more memory than there is; logits are not finite; the mask could not be written.
        UnreadableFile: the scene is damaged, at the beginning or in some window.
    """
    if window < 1:
        raise InputError("window", f"{window}", "1 pixel or more")
    _require_target(source, target)
    turn = _turn(package.plan, package.configuration)
    where = choose_device(device)
    networks = [network.to(where) for network in package.networks()]
    classify = _Classifier(networks, package.plan, package.configuration, turn, mirror, where)
    labels = package.plan.labels
    with load_rasterio().Env(GDAL_CACHEMAX=CACHE_BYTES), _opened(source) as scene, replacing(target) as temporary:
        bands = _bands(scene, package.plan.channels, source)
        places = _windows(scene.shape, window)
        pieces = (
            (place, labels.to_values(_window_indices(scene, bands, *place, classify, source)))
            for place in track(places, "segmenting", progress)
        )
        if reason := _write(temporary, _profile(scene, labels), _tags(package), pieces):
            raise InputError(target, f"could not be written whole: {reason}", "", "see that the disk has room")


def scene_dice(prediction: Path, reference: Path, labels: Labels, *, window: int = 4096) -> dict[str, float | None]:
    """Dice of each class between two masks of any size, by name: 2 |A and B| / (|A| + |B|) in pixels.

    Pixels that are ``labels.ignore`` in the reference are left out. None for a class that neither mask has.

    Args:
        prediction: a mask that rasterio reads.
        reference: the same size and place.
        labels: values and names.
        window: edge of what is read at once, pixels.

    Raises:
        GeometryMismatch: size, coordinate system or transform differ.
        InputError: rasterio is not installed, or a value has no name.
        UnreadableFile: a file is damaged.
    """
    n = labels.count + (labels.ignore is not None)
    joint = np.zeros((n, n), dtype=np.int64)
    with _opened(prediction) as first, _opened(reference) as second:
        hair = 0.01 * min(second.res) / max(second.shape)  # a hundredth of a pixel at the far end of the scene
        for what in ("shape", "crs", "transform"):
            found, expected = getattr(first, what), getattr(second, what)
            if not (found.almost_equals(expected, hair) if what == "transform" else found == expected):
                raise GeometryMismatch(prediction, f"has {what} {found}", f"{expected} as {reference.name}")
        for place in _windows(first.shape, window):
            p = labels.to_indices(_read(first, [1], *place, prediction)[0], prediction)
            r = labels.to_indices(_read(second, [1], *place, reference)[0], reference)
            joint += joint_histogram(p, r, n)
    joint = joint[:, : labels.count]  # without what is ignored in the reference
    return dict(zip(labels.names, joint_dice(joint), strict=True))


# ---- what can be segmented window by window --------------------------------------------------------------------------


def _turn(plan: Plan, setup: Configuration) -> Reorientation:
    """From a picture's (column, row, slice) to the plan's axes.

    Raises:
        PlanError: see ``predict_scene``.
    """
    for channel, rule in zip(plan.channels, plan.normalisation, strict=True):
        if rule.scheme in _BY_IMAGE:
            raise PlanError(
                "normalisation",
                f"channel {channel!r} is scaled by each image's own {_BY_IMAGE[rule.scheme]}, which no window knows",
                "a scale that is the same for all images",
                "name the channels 'reflectance' (or rgb_to_0_1, or noNorm) in dataset.json, and train again",
            )
    turn = picture_grid((1, 1, 1)).to("".join(plan.orientation[axis] for axis in plan.axes))
    if setup.spatial_dims != 2 or turn.axes[0] != 2 or any(size % 2 for size in setup.patch_size):
        remedy = "train configuration 2d on pictures, with a patch of even size"
        raise PlanError("plan", "is none of pictures", "a network of slices", remedy)
    if any(mm is not None and not np.isclose(mm, 1.0) for mm in setup.spacing_mm[1:]):
        raise PlanError("spacing_mm", f"{setup.spacing_mm[1:]}", "1 mm, as pictures have", "a scene is not resampled")
    return turn


def _bands(scene: Any, channels: Sequence[str], source: Path) -> list[int]:
    """Numbers of the bands that are the model's channels."""
    if "palette" in (kind.name for kind in scene.colorinterp):
        raise InputError(source, "has a palette (or 0 for white)", "bands with values", "save it as RGB or grey")
    colour = [n for n, kind in zip(scene.indexes, scene.colorinterp, strict=True) if kind.name != "alpha"]
    bands = colour if len(colour) == len(channels) else list(scene.indexes)
    if len(bands) != len(channels):
        raise InputError(source, f"has {scene.count} bands", f"{len(channels)}: {', '.join(channels)}")
    if any(np.dtype(kind).kind == "c" for kind in scene.dtypes):
        raise InputError(source, f"holds {scene.dtypes[0]} pixels", "one real number a pixel and band")
    return bands


def _require_target(source: Path, target: Path) -> None:
    if target.suffix.lower() not in SUFFIXES:
        raise InputError(target, "is no name of a GeoTIFF", " or ".join(SUFFIXES))
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(target, "is the scene itself", "another name")


# ---- windows ---------------------------------------------------------------------------------------------------------


def _windows(shape: tuple[int, int], edge: int) -> list[_Place]:
    """Rows and columns of the windows of a scene, row by row."""
    rows, columns = ([(a, min(a + edge, n)) for a in range(0, n, edge)] for n in shape)
    return list(itertools.product(rows, columns))


def _window_indices(
    scene: Any, bands: Sequence[int], rows: _Span, columns: _Span, classify: _Classifier, source: Path
) -> NDArray[np.uint8]:
    """Label indices of a window, background where there are no data."""
    shape = (rows[1] - rows[0], columns[1] - columns[0])
    valid = _read(scene, bands, rows, columns, source, masks=True).any(axis=0)
    if not valid.any():
        return np.zeros(shape, dtype=np.uint8)
    tops, lefts = (
        Lattice(size, patch).around(*span)
        for size, patch, span in zip(scene.shape, classify.patch[::-1], (rows, columns), strict=True)
    )
    near = [(start, min(stop, size)) for (start, stop), size in zip((tops, lefts), scene.shape, strict=True)]
    pixels = _read(scene, bands, near[0], near[1], source)
    inner = (slice(rows[0] - tops[0], rows[1] - tops[0]), slice(columns[0] - lefts[0], columns[1] - lefts[0]))
    if pixels.dtype.kind == "f":
        finite = np.isfinite(pixels)
        valid &= finite.all(axis=0)[inner]
        pixels[~finite] = 0
    try:
        indices = classify(pixels, (tops[1] - tops[0], lefts[1] - lefts[0]))[inner]
    except (MemoryError, torch.OutOfMemoryError) as failure:
        place = f"rows {rows[0]} to {rows[1]}, columns {columns[0]} to {columns[1]}"
        raise InputError(
            source, f"{place}: {failure}", "a window that can be computed", "try a smaller window"
        ) from failure
    return np.where(valid, indices, np.uint8(0))


# ---- rasterio --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    rasterio = load_rasterio()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            scene = rasterio.open(path)
    except rasterio.errors.RasterioError as failure:
        raise UnreadableFile(path, f"cannot be read: {failure}", "a GeoTIFF") from None
    with scene:
        yield scene


def _read(
    scene: Any, bands: Sequence[int], rows: _Span, columns: _Span, path: Path, *, masks: bool = False
) -> NDArray[Any]:
    """Pixels (C, rows, columns) of a window, or where they hold data (not 0)."""
    read = scene.read_masks if masks else scene.read
    try:
        pixels: NDArray[Any] = read(list(bands), window=_window(rows, columns))
    except load_rasterio().errors.RasterioError as failure:
        place = f"rows {rows[0]} to {rows[1]}, columns {columns[0]} to {columns[1]}"
        raise UnreadableFile(path, f"{place} cannot be read: {failure}", "a sound file", "copy it again") from None
    return pixels


def _window(rows: _Span, columns: _Span) -> Any:
    return load_rasterio().windows.Window.from_slices(rows, columns)


def _profile(scene: Any, labels: Labels) -> dict[str, Any]:
    """How the mask is stored, and where it lies: by control points where the scene has them, else by its transform."""
    points, system = scene.gcps
    place = {"crs": system, "gcps": points} if points else {"crs": scene.crs, "transform": scene.transform}
    return {
        **place,
        "driver": "GTiff",
        "width": scene.width,
        "height": scene.height,
        "count": 1,
        "dtype": labels.to_values(np.zeros(1, dtype=np.uint8)).dtype,
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "compress": "deflate",
        "BIGTIFF": "IF_SAFER",
    }


def _write(
    path: Path, profile: dict[str, Any], tags: dict[str, str], pieces: Iterable[tuple[_Place, NDArray[Any]]]
) -> str:
    """Write a mask from its windows; why the file does not hold them then, or nothing.

    Read back because rasterio does not say so where a disk fills up while a file is closed.
    """
    rasterio, sums = load_rasterio(), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            with rasterio.open(path, "w", **profile) as mask:
                mask.update_tags(**tags)
                for place, values in pieces:
                    mask.write(values, 1, window=_window(*place))
                    sums[place] = zlib.crc32(values.tobytes())
        except rasterio.errors.RasterioError as failure:
            return str(failure)
    try:
        with _opened(path) as mask:
            whole = all(zlib.crc32(_read(mask, [1], *place, path).tobytes()) == known for place, known in sums.items())
    except UnreadableFile as failure:
        return failure.found
    return "" if whole else "it holds other values than were written"


def _tags(package: ModelPackage) -> dict[str, str]:
    """What the values mean, and whose they are."""
    return {
        "TIFFTAG_SOFTWARE": f"medseg {medseg.__version__}",
        "labels": json.dumps({"background": 0, **package.plan.labels.values}),
        "model": package.manifest.name,
        "model_digest": package.digest,
    }


def load_rasterio() -> Any:
    """The module ``rasterio``, which is an extra.

    Raises:
        InputError: it is not installed; with how to.
    """
    try:
        import rasterio
        import rasterio.errors
        import rasterio.windows
    except ImportError:
        raise InputError("rasterio", "is not installed", "it, for scenes", "pip install 'medseg[satellite]'") from None
    return rasterio
