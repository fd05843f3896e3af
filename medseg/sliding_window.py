"""A network run tile by tile over a prepared array, its logits handed out in finished slabs.

Tiles are visited in order along the first axis. A rolling buffer as deep as one patch is the only place where classes x
voxels exist: planes that no later tile touches are averaged and handed out at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.errors import TrainingError

Float32 = NDArray[np.float32]
Network = Callable[[Tensor], Tensor]
Slab = tuple[int, int, Float32]


def slabs(
    networks: Sequence[Network],
    image: Float32,
    patch_size: Sequence[int],
    *,
    overlap: float = 0.5,
    mirror_axes: Sequence[int] = (),
    device: str | torch.device = "cpu",
) -> Iterator[Slab]:
    """Average logits of several networks over overlapping, Gaussian-weighted tiles.

    Args:
        networks: callables (1, C, *patch) -> logits (1, classes, *patch), in evaluation mode.
        image: prepared array (C, D, H, W).
        patch_size: three sizes for volumes; two for networks of slices, which then run along the first axis.
        overlap: fraction of a patch that neighbouring tiles share, 0 to 0.9.
        mirror_axes: spatial axes of the patch; logits are averaged over all their combinations of mirroring.
        device: where the networks are.

    Yields:
        ``(start, stop, logits float32 (classes, stop - start, H, W))`` in order, covering D.

    Raises:
        TrainingError: a network gives values that are not finite, of which a mask would be silently empty.
    """
    if len(patch_size) == 2:
        patch_size = (1, *patch_size)
        networks = [_as_slices(network) for network in networks]
        mirror_axes = [axis + 1 for axis in mirror_axes]
    patch = tuple(patch_size)
    depth = image.shape[1]
    padded, offset = _padded(image, patch)
    starts = [tile_starts(n, p, overlap) for n, p in zip(padded.shape[1:], patch, strict=True)]
    for start, stop, logits in _rolling(networks, padded, patch, starts, mirror_axes, torch.device(device)):
        first, last = max(start, offset[0]), min(stop, offset[0] + depth)
        if first < last:
            rows, columns = (slice(o, o + n) for o, n in zip(offset[1:], image.shape[2:], strict=True))
            yield first - offset[0], last - offset[0], logits[:, first - start : last - start, rows, columns]


def tile_starts(size: int, patch: int, overlap: float) -> list[int]:
    """Starts of the tiles along an axis: evenly spread, the first at 0, the last ending at ``size``."""
    if size <= patch:
        return [0]
    step = max(patch * (1 - overlap), 1.0)
    count = int(np.ceil((size - patch) / step)) + 1
    return [round(n * (size - patch) / (count - 1)) for n in range(count)]


def tile_count(shape: Sequence[int], patch_size: Sequence[int], overlap: float = 0.5) -> int:
    """Tiles that ``slabs`` takes for an image of (D, H, W): a measure of its work."""
    patch = (1, *patch_size) if len(patch_size) == 2 else patch_size
    return math.prod(len(tile_starts(n, p, overlap)) for n, p in zip(shape, patch, strict=True))


@lru_cache(maxsize=8)
def gaussian(patch: tuple[int, ...]) -> Float32:
    """Weights of a tile: a Gaussian around its centre with a standard deviation of an eighth of its size.

    Scaled to a maximum of 10, with a floor so that the weight of no voxel vanishes (nnU-Net's importance map).
    """
    weight = np.ones((), dtype=np.float64)
    for n in patch:
        distance = (np.arange(n) - (n - 1) / 2) / max(n / 8, 1e-8)
        weight = weight[..., np.newaxis] * np.exp(-0.5 * distance**2)
    weight = weight / weight.max() * 10
    return np.asarray(np.maximum(weight, 1e-4), dtype=np.float32)


def _rolling(
    networks: Sequence[Network],
    image: Float32,
    patch: tuple[int, ...],
    starts: list[list[int]],
    mirror_axes: Sequence[int],
    device: torch.device,
) -> Iterator[Slab]:
    """Slabs of the padded image, each as deep as the step between two rows of tiles."""
    weight = gaussian(patch)
    total: Float32 | None = None
    mass = np.zeros((patch[0], *image.shape[2:]), dtype=np.float32)
    for row, top in enumerate(starts[0]):
        for left, front in itertools.product(starts[1], starts[2]):
            place = (slice(None), slice(left, left + patch[1]), slice(front, front + patch[2]))
            tile = image[(slice(None), slice(top, top + patch[0]), *place[1:])]
            logits = _tile_logits(networks, tile, mirror_axes, device)
            if total is None:
                total = np.zeros((logits.shape[0], *mass.shape), dtype=np.float32)
            total[(slice(None), *place)] += logits * weight
            mass[place] += weight
        if total is None:  # pragma: no cover - there is always a tile
            return
        step = starts[0][row + 1] - top if row + 1 < len(starts[0]) else patch[0]
        yield top, top + step, np.divide(total[:, :step], mass[:step], dtype=np.float32)
        for buffer in (total, mass[np.newaxis]):
            buffer[:, : patch[0] - step] = buffer[:, step:].copy()
            buffer[:, patch[0] - step :] = 0


def _tile_logits(
    networks: Sequence[Network], tile: Float32, mirror_axes: Sequence[int], device: torch.device
) -> Float32:
    batch = torch.from_numpy(np.ascontiguousarray(tile[np.newaxis])).to(device)
    choices = [c for n in range(len(mirror_axes) + 1) for c in itertools.combinations(mirror_axes, n)]
    mean: Tensor | None = None
    with torch.inference_mode():
        for network, axes in itertools.product(networks, choices):
            flipped = [axis + 2 for axis in axes]
            logits = network(batch.flip(flipped)).float().flip(flipped)
            mean = logits if mean is None else mean + logits
    if mean is None:
        raise ValueError("at least one network is needed")
    mean = mean / (len(networks) * len(choices))
    if not torch.isfinite(mean).all():
        raise TrainingError("network", "gives logits that are not finite", "finite logits", "predict in float32")
    return np.asarray(mean[0].cpu().numpy(), dtype=np.float32)


def _as_slices(network: Network) -> Network:
    """A network of slices as one of volumes that are one plane deep."""
    return lambda batch: network(batch[:, :, 0])[:, :, None]


def _padded(image: Float32, patch: tuple[int, ...]) -> tuple[Float32, tuple[int, ...]]:
    """The image with zeros around it where it is smaller than a patch, and where it begins in there."""
    missing = [max(0, p - n) for n, p in zip(image.shape[1:], patch, strict=True)]
    before = tuple(m // 2 for m in missing)
    if not any(missing):
        return image, before
    return np.pad(image, [(0, 0), *((b, m - b) for b, m in zip(before, missing, strict=True))]), before
