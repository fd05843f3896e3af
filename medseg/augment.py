"""The random transforms of training, from a plan: MONAI's transforms on one patch.

A sample is drawn a little larger than the patch (``read_size``), so that a turned or shrunk patch is filled with image
rather than with border. ``full`` follows nnU-Net's ranges and probabilities (Isensee et al. 2021, Supplement 4);
``light`` has smaller turns and no blurring, for budgets of minutes on a processor. ``classic`` is what the literature
of the U-Net uses: turns, smooth deformation, mirroring, brightness and contrast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    MapTransform,
    OneOf,
    RandAdjustContrastd,
    RandAffined,
    RandAffineGrid,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    Randomizable,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandShiftIntensityd,
    RandSimulateLowResolutiond,
    Resample,
    Transform,
)
from monai.transforms.utils import create_grid
from torch import Tensor
from torch.nn import functional as F

from medseg.plan import Configuration

_IMAGE = ["image"]
_BOTH = ["image", "labels"]
_MODES = ("bilinear", "nearest")


def read_size(configuration: Configuration) -> tuple[int, ...]:
    """Voxels to draw for one sample, in the patch's axes: the patch, and a margin where it will be turned."""
    if configuration.training.augmentation == "none":
        return configuration.patch_size
    return tuple(n + 2 * math.ceil(n / 10) for n in configuration.patch_size)


def build_transform(configuration: Configuration) -> Compose:
    """The transform of one training sample.

    It takes and gives a dict of tensors ``image`` (C, *spatial) and ``labels`` (1, *spatial); a sample of
    ``read_size`` becomes one of ``patch_size``. Seed it with ``seed_transform``.
    """
    training = configuration.training
    crop = CenterSpatialCropd(_BOTH, configuration.patch_size)
    mirror = [RandFlipd(_BOTH, prob=0.5, spatial_axis=axis) for axis in configuration.mirror_axes]
    if training.augmentation == "none":
        return _on_one_state(Compose([crop, *mirror]))
    if training.augmentation == "classic":
        return _on_one_state(Compose([_spatial_classic(configuration, crop), *_intensity_classic(), *mirror]))
    full = training.augmentation == "full"
    intensity = _intensity_full(configuration.spatial_dims) if full else _intensity_light()
    return _on_one_state(Compose([_spatial(configuration, crop, full), *intensity, *mirror]))


def seed_transform(transform: Compose, seed: int) -> None:
    """Start the random numbers of a transform from ``build_transform`` anew; ``seed`` below 2**32."""
    transform.R.seed(seed)


def _on_one_state(transform: Compose) -> Compose:
    """The transform with one random state for all its parts: to seed one for each part takes as long as a rotation."""
    transform.R = np.random.RandomState()
    for part in transform.transforms:
        if isinstance(part, Randomizable):
            part.set_random_state(state=transform.R)
        if isinstance(part, OneOf):  # a Compose seeds its parts rather than share its state
            for choice in part.transforms:
                if isinstance(choice, Randomizable):
                    choice.set_random_state(state=transform.R)
    return transform


def _spatial(configuration: Configuration, crop: Transform, full: bool) -> OneOf:
    """Rotation and scaling, each with its own probability; sizes of an anisotropic patch turn only in their plane.

    One choice among crop, turn, scale, and turn and scale, with the product of their probabilities: a sample is
    resampled once at most, and only at the voxels of the patch. Two transforms in a row cost twice as much and blur.
    """
    angle, probability = (math.radians(30), 0.2) if full else (math.radians(14), 0.3)
    smaller, larger = (0.7, 1.4) if full else (0.8, 1.25)
    turn = _angles(configuration.patch_size, angle)
    # MONAI samples the output grid: a factor below 1 enlarges the content
    scale = [(1 / larger - 1, 1 / smaller - 1)] * configuration.spatial_dims
    ranges = ((turn, None), (None, scale), (turn, scale))
    changed = [_affine(configuration.patch_size, rotate_range, scale_range) for rotate_range, scale_range in ranges]
    one, both = probability * (1 - probability), probability**2
    return OneOf([crop, *changed], weights=[1 - 2 * one - both, one, one, both])


def _affine(patch_size: Sequence[int], rotate_range: Any, scale_range: Any) -> RandAffined:
    return RandAffined(
        _BOTH,
        spatial_size=patch_size,
        prob=1.0,
        rotate_range=rotate_range,
        scale_range=scale_range,
        mode=_MODES,
        padding_mode="zeros",
        cache_grid=True,
    )


def _spatial_classic(configuration: Configuration, crop: Transform) -> OneOf:
    """Rotation by up to 15 degrees with probability 0.5, deformation with 0.3; resampled once at most."""
    patch = configuration.patch_size
    turn = _angles(patch, math.radians(15))
    changed: list[Transform] = [_affine(patch, turn, None), _RandElasticd(patch, None), _RandElasticd(patch, turn)]
    return OneOf([crop, *changed], weights=[0.5 * 0.7, 0.5 * 0.7, 0.5 * 0.3, 0.5 * 0.3])


class _RandElasticd(Randomizable, MapTransform):
    """Smooth random displacements, and a rotation, of image and labels, always applied: a sample becomes a patch.

    Ronneberger et al. 2015: displacements drawn from a normal distribution on a grid of 3 points an axis, between
    which they are bicubic; there 10 voxels of 572, in the 3D U-Net (Cicek et al. 2016) 4 of 132, here 3 in 100 of the
    smallest size that is deformed. MONAI's Rand3DElasticd knows neither a size in voxels nor anisotropic patches,
    whose slices here stay as they are.
    """

    def __init__(self, patch_size: Sequence[int], rotate_range: Any) -> None:
        super().__init__(_BOTH)
        self.patch_size = tuple(patch_size)
        flat = len(self.patch_size) == 3 and _is_flat(self.patch_size)
        self.deformed = self.patch_size[1:] if flat else self.patch_size
        self.turn = RandAffineGrid(rotate_range=rotate_range)
        self.resample = Resample(padding_mode="zeros", dtype=np.float32)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> _RandElasticd:
        self.turn.set_random_state(seed, state)
        super().set_random_state(seed, state)
        return self

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        axes = len(self.deformed)
        size = (axes, *([3] * len(self.patch_size)))
        coarse = self.R.normal(scale=0.03 * min(self.deformed), size=size)
        grid: Any = create_grid(self.patch_size, backend="torch", dtype=torch.float32)
        grid[-1 - axes : -1] += _bicubic(torch.from_numpy(coarse).float(), self.patch_size)  # the last row is ones
        grid = self.turn(grid=grid)
        modes = zip(_BOTH, _MODES, strict=True)
        return {**data, **{key: self.resample(data[key], grid, mode=mode) for key, mode in modes}}


def _bicubic(coarse: Tensor, size: Sequence[int]) -> Tensor:
    """A field (C, *coarse) at a larger size, by cubic interpolation along one axis after the other."""
    for axis, length in enumerate(size, start=1):
        rows = coarse.movedim(axis, 0)
        flat = rows.reshape(1, 1, len(rows), -1)
        fine = F.interpolate(flat, size=(length, flat.shape[-1]), mode="bicubic", align_corners=True)
        coarse = fine.reshape(length, *rows.shape[1:]).movedim(0, axis)
    return coarse


def _angles(patch_size: Sequence[int], angle: float) -> Sequence[float] | float:
    """Ranges of rotation about each axis: only about the first where the patch is three times wider than deep."""
    if len(patch_size) == 2:
        ratio = max(patch_size) / min(patch_size)
        return math.radians(15) if ratio > 1.5 else math.pi if angle > math.radians(20) else angle
    if _is_flat(patch_size):
        return (math.pi if angle > math.radians(20) else angle, 0.0, 0.0)
    return (angle, angle, angle)


def _is_flat(patch_size: Sequence[int]) -> bool:
    """Whether a patch of three axes is three times wider than deep: its slices are far apart."""
    return max(patch_size) / patch_size[0] > 3


def _intensity_classic() -> list[Transform]:
    """Brightness, an offset of up to a fifth (of a standard deviation, where images are so normalised); contrast."""
    return [
        RandShiftIntensityd(_IMAGE, prob=0.3, offsets=0.2),
        RandScaleIntensityFixedMeand(_IMAGE, prob=0.3, factors=0.25, preserve_range=False),
    ]


def _intensity_light() -> list[Transform]:
    return [
        RandGaussianNoised(_IMAGE, prob=0.15, std=0.3),
        RandScaleIntensityd(_IMAGE, prob=0.15, factors=0.25),
        RandScaleIntensityFixedMeand(_IMAGE, prob=0.15, factors=0.25, preserve_range=False),
        RandAdjustContrastd(_IMAGE, prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
    ]


def _intensity_full(spatial_dims: int) -> list[Transform]:
    sigma = (0.5, 1.0)
    smooth = "bilinear" if spatial_dims == 2 else "trilinear"
    return [
        RandGaussianNoised(_IMAGE, prob=0.1, std=float(np.sqrt(0.1))),
        RandGaussianSmoothd(_IMAGE, prob=0.1, sigma_x=sigma, sigma_y=sigma, sigma_z=sigma),
        RandScaleIntensityd(_IMAGE, prob=0.15, factors=0.25),
        RandScaleIntensityFixedMeand(_IMAGE, prob=0.15, factors=0.25, preserve_range=True),
        RandSimulateLowResolutiond(_IMAGE, prob=0.25, upsample_mode=smooth, zoom_range=(0.5, 1.0)),
        RandAdjustContrastd(_IMAGE, prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
        RandAdjustContrastd(_IMAGE, prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
    ]
