"""A network run tile by tile over a prepared array, its logits handed out in finished slabs.

Tiles are visited in order along one axis. A rolling buffer as deep as one patch is the only place where classes x
voxels exist: planes that no later tile touches are averaged where they lie and handed out at once.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medseg.errors import InputError
from medseg.resample import CHUNK_BYTES, Slab

Network = Callable[[Tensor], Tensor]
Span = tuple[int, int]
Three = tuple[int, int, int]

# Of torch on Linux, on Windows, and where no allocator of its own stands between; of ONNX Runtime (bfc_arena.cc); of
# OpenVINO (cpu_memory.cpp); and of C++ on Linux and on Windows, which both of them hand on
_TOO_LITTLE_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|Failed to allocate (memory for requested buffer|\d+ bytes of memory)|std::bad_alloc|\bbad allocation"
)


@dataclass(frozen=True)
class Tiling:
    """The tiles of a volume of three axes.

    Attributes:
        shape: voxels of the volume.
        patch: voxels of a tile.
        starts: of the tiles along each axis, rising, without gaps: each at most a tile after the one before, the last
            at most a tile before the end. So what lies between two starts is never deeper than a tile, or the buffer.
            Where the volume is smaller than a tile: one, not above 0.
        weight: float32 (*patch), above 0: of each voxel of a tile.
        padding: mode and value by which ``torch.nn.functional.pad`` fills what a tile has beyond the volume.
    """

    shape: Three
    patch: Three
    starts: Sequence[Sequence[int]]
    weight: Tensor
    padding: tuple[str, float] = ("constant", 0.0)


def slabs(
    networks: Sequence[Network],
    image: NDArray[np.float32],
    patch_size: Sequence[int],
    *,
    overlap: float = 0.5,
    mirror_axes: Sequence[int] = (),
    device: str | torch.device = "cpu",
    batch_size: int = 1,
    blocks: int = 1,
    on_device: bool = True,
    axis: int | None = None,
) -> Iterator[Slab]:
    """Average logits of several networks over overlapping, Gaussian-weighted tiles, in float32.

    An image smaller than a patch lies in the middle of zeros. The image stays on the host: each tile is sent by itself.

    Args:
        networks: callables (N, C, *patch) -> logits (N, classes, *patch), in evaluation mode.
        image: prepared array (C, D, H, W).
        patch_size: three sizes for volumes; two for networks of slices, which then run along the first axis.
        overlap: fraction of a patch that neighbouring tiles share, 0 to 0.9.
        mirror_axes: spatial axes of the patch; logits are averaged over all their combinations of mirroring.
        device: where the networks are.
        batch_size: tiles that a network gets at once.
        blocks: parts that rows are cut into, one after the other, to need less memory; see ``buffer_bytes``.
        on_device: sum on the device; else on the host, where the logits of each tile are then copied to.
        axis: along which tiles are visited; None: that of ``rolling_axis``. The same to rounding along any.

    Yields:
        Slabs that cover (D, H, W).

    Raises:
        InputError: logits that are not finite, of which a mask would be silently empty: of such an image, of such
            weights, or of half precision.
        torch.OutOfMemoryError: the device is too small, see ``is_out_of_memory``. What was handed out is of no use
            then; begin anew with ``on_device=False`` or more blocks.
    """
    if len(patch_size) == 2:
        networks, mirror_axes = [as_slices(n) for n in networks], [a + 1 for a in mirror_axes]
    shape, patch = three_axes(image.shape[1:]), three_axes(patch_size)
    # A tile of the whole of a shorter axis begins before it, by half of what is missing.
    starts = [[s - max(0, p - n) // 2 for s in tile_starts(n, p, overlap)] for n, p in zip(shape, patch, strict=True)]
    return roll(
        networks,
        torch.from_numpy(np.require(image, np.float32, ["C", "W"])),
        Tiling(shape, patch, starts, gaussian(patch)),
        axis=rolling_axis(shape, patch) if axis is None else axis,
        mirror_axes=mirror_axes,
        device=device,
        store=device if on_device else "cpu",
        batch_size=batch_size,
        blocks=blocks,
    )


def roll(
    networks: Sequence[Network],
    image: Tensor,
    tiling: Tiling,
    *,
    axis: int,
    mirror_axes: Sequence[int] = (),
    device: str | torch.device = "cpu",
    store: str | torch.device = "cpu",
    batch_size: int = 1,
    blocks: int = 1,
) -> Iterator[Slab]:
    """What is below ``slabs``: any tiles and weights, an image (C, *tiling.shape) on any device, sums on ``store``."""
    tiles = _Tiles(networks, image, tiling, mirror_axes, torch.device(device), torch.device(store))
    across, along = _across(axis)[0], tiling.starts[axis]
    row_blocks = _row_blocks(tiling.shape[across], blocks)
    buffer = _Buffer(tiling, axis, max(end - first for first, end in row_blocks), torch.device(store))
    for rows in row_blocks:
        buffer.begin(rows)
        starts = list(tiling.starts)
        starts[across] = _touching(starts[across], tiling.patch[across], rows)
        for start, end in itertools.pairwise([*along, tiling.shape[axis]]):
            starts[axis], first = [start], max(start, 0)
            buffer.advance(first)
            corners = list(itertools.product(*starts))
            for n in range(0, len(corners), batch_size):
                buffer.add(corners[n : n + batch_size], tiles(corners[n : n + batch_size]))
            yield Slab(axis, first, end, rows, buffer.finished(end - first))


class Margins:
    """How sure a network is where it finds something, summed while slabs pass.

    The margin of a voxel is p1 - p2, the two largest of its softmax; it belongs to the class that wins, and background
    has none. Of regions it is |2 p - 1| = tanh(logit / 2) wherever a region is positive. 0: a tie; 1: no doubt. At the
    most ``CHUNK_BYTES`` of logits, or one row of them, are looked at at once.

    Args:
        classes: with the background, or number of regions.
        regions: whether logits are of regions.
    """

    def __init__(self, classes: int, *, regions: bool) -> None:
        self._regions = regions
        self._sums, self._counts = np.zeros(classes), np.zeros(classes, dtype=np.int64)

    def watch(self, finished: Iterable[Slab], shape: Sequence[int]) -> Iterator[Slab]:
        """The slabs of an array of ``shape`` as they are; a row that two of them share is counted once."""
        for slab in finished:
            is_last = slab.rows[1] >= shape[_across(slab.axis)[0]]
            self._add(slab.logits if is_last else slab.logits[:, :-1])
            yield slab

    @property
    def means(self) -> dict[int, float]:
        """The mean margin by channel, of channels that win somewhere."""
        return {int(n): float(self._sums[n] / self._counts[n]) for n in np.flatnonzero(self._counts)}

    @torch.inference_mode()
    def _add(self, logits: Tensor) -> None:
        plane = max(1, 4 * logits[0].numel())
        planes = max(1, CHUNK_BYTES // plane)
        rows = max(1, CHUNK_BYTES * logits.shape[1] // plane)
        for part in (part for some in torch.split(logits, planes) for part in torch.split(some, rows, 1)):
            if self._regions:
                self._sums += (part.clamp(min=0) / 2).tanh().sum((0, 1, 2)).cpu().numpy()
                self._counts += (part > 0).sum((0, 1, 2)).cpu().numpy()
                continue
            odds = part[part[..., 1:].amax(-1) > part[..., 0]].softmax(-1)
            first, winners = odds.max(-1)
            margins = first - odds.scatter_(1, winners[:, None], 0).amax(-1)
            numbers, weights = winners.cpu().numpy(), margins.cpu().numpy()
            self._sums += np.bincount(numbers, weights, len(self._sums))
            self._counts += np.bincount(numbers, minlength=len(self._counts))


def tile_starts(size: int, patch: int, overlap: float) -> list[int]:
    """Starts of the tiles along an axis: evenly spread, the first at 0, the last ending at ``size`` (nnU-Net's)."""
    if size <= patch:
        return [0]
    step = max(patch * (1 - overlap), 1.0)
    count = int(np.ceil((size - patch) / step)) + 1
    return [round(n * (size - patch) / (count - 1)) for n in range(count)]


def tile_count(shape: Sequence[int], patch_size: Sequence[int], overlap: float = 0.5, blocks: int = 1) -> int:
    """Tiles that ``slabs`` takes for an image of (D, H, W), a measure of its work; those on cuts count twice."""
    patch = three_axes(patch_size)
    starts = [tile_starts(n, p, overlap) for n, p in zip(shape, patch, strict=True)]
    across = _across(rolling_axis(shape, patch))[0]
    rows = sum(len(_touching(starts[across], patch[across], rows)) for rows in _row_blocks(shape[across], blocks))
    return rows * math.prod(len(s) for axis, s in enumerate(starts) if axis != across)


def rolling_axis(shape: Sequence[int], patch_size: Sequence[int]) -> int:
    """The axis along which the buffer, as deep as a patch, is smallest; the first of equals."""
    return min(range(3), key=lambda axis: _buffer_voxels(shape, three_axes(patch_size), axis, 1))


def buffer_bytes(shape: Sequence[int], patch_size: Sequence[int], classes: int, blocks: int = 1) -> int:
    """Memory of the sums of ``slabs``: float32 logits and a weight, a patch deep, of the rows of the largest block.

    Not counted: the image, the network, and the logits of tiles in work, 4 * classes bytes for each voxel of a tile: of
    a batch as the network gives it, twice more where mirrorings or networks are averaged, and of one tile of a single
    value.
    """
    patch = three_axes(patch_size)
    return 4 * (classes + 1) * _buffer_voxels(shape, patch, rolling_axis(shape, patch), blocks)


@lru_cache(maxsize=8)
def gaussian(patch: Three) -> Tensor:
    """Weights of a tile, float32 (*patch): a Gaussian around voxel p // 2, its deviation p / 8 voxels, at most 10.

    nnU-Net's importance map (``compute_gaussian``), without its rounding to half precision.
    """
    weight = np.full((), 10.0)
    for n in patch:
        weight = weight[..., np.newaxis] * np.exp(-0.5 * ((np.arange(n) - n // 2) / (n / 8)) ** 2)
    return torch.from_numpy(weight.astype(np.float32))


def as_slices(network: Network) -> Network:
    """A network of slices as one of volumes that are one plane deep."""
    return lambda batch: network(batch[:, :, 0])[:, :, None]


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether an exception says that a device or the host has too little memory, and nothing else."""
    if isinstance(failure, torch.OutOfMemoryError | MemoryError):
        return True
    # ONNX Runtime's own exceptions are no RuntimeErrors
    foreign = isinstance(failure, RuntimeError) or type(failure).__module__.startswith("onnxruntime.")
    return foreign and _TOO_LITTLE_MEMORY.search(str(failure)) is not None


class _Tiles:
    """Logits of tiles: the mean over networks and mirrorings.

    A tile of a single value, as air outside the body is once it is clipped, is computed once for all of that value.
    Values that differ by less than a millionth are one: resampling a constant gives it up to 6e-7 of itself. The logits
    depend on the tile alone, not on the tiles before.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        image: Tensor,
        tiling: Tiling,
        mirror_axes: Sequence[int],
        device: torch.device,
        store: torch.device,
    ) -> None:
        mirrorings = [c for n in range(len(mirror_axes) + 1) for c in itertools.combinations(mirror_axes, n)]
        self._runs = [(n, [axis + 2 for axis in axes]) for n, axes in itertools.product(networks, mirrorings)]
        if not self._runs:
            raise ValueError("at least one network is needed")
        self._image, self._tiling, self._device, self._store = image, tiling, device, store
        self._known: tuple[list[float], Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, corners: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Logits (classes, *patch) of each tile, on the store."""
        tiles = [self._cut(corner) for corner in corners]
        values = [_single_value(tile) for tile in tiles]
        varied = [tile for tile, value in zip(tiles, values, strict=True) if value is None]
        computed = iter(self._logits(torch.stack(varied)) if varied else [])
        return [next(computed) if value is None else self._of_value(value) for value in values]

    def _cut(self, corner: tuple[int, ...]) -> Tensor:
        place, missing = [slice(None)], list[int]()
        for start, size, end in zip(corner, self._tiling.patch, self._tiling.shape, strict=True):
            place.append(slice(max(start, 0), min(start + size, end)))
            missing = [max(-start, 0), max(start + size - end, 0), *missing]  # torch pads the last axis first
        tile = self._image[tuple(place)]
        mode, value = self._tiling.padding
        return F.pad(tile[None], missing, mode, value)[0] if any(missing) else tile

    def _of_value(self, value: list[float]) -> Tensor:
        if self._known is None or self._known[0] != value:
            tile = torch.tensor(value, dtype=self._image.dtype).view(1, -1, 1, 1, 1)
            self._known = None  # before the next one is made
            self._known = value, self._logits(tile.expand(-1, -1, *self._tiling.patch).contiguous())[0].clone()
        return self._known[1]

    def _logits(self, batch: Tensor) -> list[Tensor]:
        batch = _sent(batch, self._device)
        share = 1 / len(self._runs)
        parts = (network(batch.flip(a)).float().flip(a) if a else network(batch).float() for network, a in self._runs)
        mean = next(parts)
        if share < 1:
            mean = mean * share  # not in place: a network may hold what it gave
        for part in parts:
            mean.add_(part, alpha=share)
        return list(mean.to(self._store))


class _Buffer:
    """Sums of weighted logits, and of weights, of the planes and rows that tiles are being laid on.

    Its axes are the rolling one and the other two. One for all blocks: what was handed out of one may still be held.
    """

    def __init__(self, tiling: Tiling, axis: int, rows: int, store: torch.device) -> None:
        self._tiling, self._order = tiling, (axis, *_across(axis))
        self._weight = tiling.weight.to(store)
        self._planes, columns = min(tiling.patch[axis], tiling.shape[axis]), tiling.shape[self._order[2]]
        self._window = [(0, size) for size in tiling.shape]
        self._mass = torch.empty(self._planes, rows, columns, device=store)
        self._total = torch.empty(0, device=store)  # until a tile tells how many classes there are

    def begin(self, rows: Span) -> None:
        """Start anew at plane 0, with other rows."""
        self._window[self._order[0]], self._window[self._order[1]] = (0, self._planes), rows
        self._mass.zero_()
        self._total.zero_()

    def advance(self, first: int) -> None:
        """Drop the planes before this one. They move plane by plane: so there is no second buffer."""
        dropped = first - self._window[self._order[0]][0]
        self._window[self._order[0]] = first, first + self._planes
        if dropped:
            for buffer in (self._total, self._mass):
                for plane in range(self._planes - dropped):
                    buffer[plane] = buffer[plane + dropped]
                buffer[self._planes - dropped :] = 0

    def add(self, corners: Sequence[tuple[int, ...]], logits: Sequence[Tensor]) -> None:
        """Lay logits (classes, *patch) of tiles, by their weights, on what they share with the buffer."""
        for corner, tile in zip(corners, logits, strict=True):
            if not self._total.numel():
                self._total = self._mass.new_zeros(*self._mass.shape, len(tile))
            pairs = [_shared(*axis) for axis in zip(corner, self._tiling.patch, self._window, strict=True)]
            place, part = tuple(pairs[a][0] for a in self._order), tuple(pair[1] for pair in pairs)
            back = [self._order.index(a) for a in range(3)]  # to the order of the volume's axes
            weight = self._weight[part]
            self._mass[place].permute(back).add_(weight)
            _add_product(self._total[place].permute(*back, 3), tile[(slice(None), *part)], weight)

    def finished(self, planes: int) -> Tensor:
        """The first planes, divided by their weights.

        Raises:
            InputError: they are not finite.
        """
        first, end = self._window[self._order[1]]
        done = self._total[:planes, : end - first].div_(self._mass[:planes, : end - first, :, None])
        if not done.sum().isfinite():
            remedy = (
                "look for NaN and infinite values in the image and in the weights; "
                "where there are none, half precision may be too narrow: predict with precision 32"
            )
            raise InputError("prediction", "the network gives logits that are not finite", "finite logits", remedy)
        return done


def _single_value(tile: Tensor) -> list[float] | None:
    """The value of each channel of a tile (C, ...) that has only one, rounded to twenty bits."""
    values = []
    for channel in tile:
        low, high = (float(bound) for bound in channel.aminmax())
        if not math.isfinite(high - low) or high - low > 1e-6 * max(abs(low), abs(high)):
            return None
        fraction, exponent = math.frexp((low + high) / 2)
        values.append(math.ldexp(round(fraction * 2**20), exponent - 20))
    return values


def _add_product(total: Tensor, logits: Tensor, weight: Tensor) -> None:
    """Add logits (classes, ...) times weights (...) to a total (..., classes)."""
    if logits.stride(0) == 1 or logits.device.type != "cpu":
        total.addcmul_(logits.movedim(0, -1), weight[..., None])
        return
    # Plane by plane the transpose stays in the processor's cache: half the time of a whole one, and no memory
    for plane, values, share in zip(total, logits.unbind(1), weight, strict=True):
        plane.addcmul_(values.flatten(1).t().contiguous().view_as(plane), share[..., None])


def _sent(batch: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda" or batch.device.type == "cuda":
        return batch.to(device)
    return batch.pin_memory().to(device, non_blocking=True)


def _shared(start: int, size: int, window: Span) -> tuple[slice, slice]:
    """What a tile and a window have in common along an axis, counted from the window's begin and from the tile's."""
    first, end = max(start, window[0]), min(start + size, window[1])
    return slice(first - window[0], end - window[0]), slice(first - start, end - start)


def _across(axis: int) -> Span:
    """The other two axes: rows and columns."""
    rows, columns = (a for a in range(3) if a != axis)
    return rows, columns


def _row_blocks(rows: int, blocks: int) -> list[Span]:
    """Rows of each block, two or more its own; all but the last end with the first row of the next."""
    blocks = max(1, min(blocks, rows // 2))
    edges = [n * rows // blocks for n in range(blocks + 1)]
    return [(first, min(end + 1, rows)) for first, end in itertools.pairwise(edges)]


def _touching(starts: Sequence[int], patch: int, rows: Span) -> list[int]:
    return [start for start in starts if start < rows[1] and start + patch > rows[0]]


def _buffer_voxels(shape: Sequence[int], patch: Three, axis: int, blocks: int) -> int:
    """Voxels of the buffer along an axis."""
    rows, columns = (shape[a] for a in _across(axis))
    return min(patch[axis], shape[axis]) * max(end - first for first, end in _row_blocks(rows, blocks)) * columns


def three_axes(sizes: Sequence[int]) -> Three:
    """Sizes along three axes; what has two is one plane deep."""
    first, second, third = (1, *sizes) if len(sizes) == 2 else sizes
    return first, second, third
