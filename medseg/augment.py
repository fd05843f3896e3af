"""The random transforms of training, from a plan: MONAI's transforms on one patch.

A sample is drawn a little larger than the patch (``read_size``), so that a turned or shrunk patch is filled with image
rather than with border. ``full`` follows nnU-Net's ranges and probabilities (Isensee et al. 2021, Supplement 4);
``light`` has smaller turns and no blurring, for budgets of minutes on a processor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityFixedMeand,
    RandScaleIntensityd,
    RandSimulateLowResolutiond,
    Transform,
)

from medseg.plan import Configuration

_IMAGE = ["image"]
_BOTH = ["image", "labels"]


def read_size(configuration: Configuration) -> tuple[int, ...]:
    """Voxels to draw for one sample, in the patch's axes: the patch, and a margin where it will be turned."""
    if configuration.training.augmentation == "none":
        return configuration.patch_size
    return tuple(math.ceil(1.2 * n) for n in configuration.patch_size)


def build_transform(configuration: Configuration) -> Compose:
    """The transform of one training sample.

    It takes and gives a dict of tensors ``image`` (C, *spatial) and ``labels`` (1, *spatial); a sample of
    ``read_size`` becomes one of ``patch_size``. Seed it with ``set_random_state``.
    """
    training = configuration.training
    crop = CenterSpatialCropd(_BOTH, configuration.patch_size)
    mirror = [RandFlipd(_BOTH, prob=0.5, spatial_axis=axis) for axis in configuration.mirror_axes]
    if training.augmentation == "none":
        return Compose([crop, *mirror])
    full = training.augmentation == "full"
    return Compose(
        [*_spatial(configuration, full), crop, *(_intensity_full() if full else _intensity_light()), *mirror]
    )


def _spatial(configuration: Configuration, full: bool) -> list[Transform]:
    """Rotation and scaling, each with its own probability; sizes of an anisotropic patch turn only in their plane."""
    angle, probability = (math.radians(30), 0.2) if full else (math.radians(14), 0.3)
    smaller, larger = (0.7, 1.4) if full else (0.8, 1.25)
    turn = _angles(configuration.patch_size, angle)
    # MONAI samples the output grid: a factor below 1 enlarges the content
    scale = [(1 / larger - 1, 1 / smaller - 1)] * configuration.spatial_dims
    shared = {"mode": ("bilinear", "nearest"), "padding_mode": "zeros", "cache_grid": True}
    size = read_size(configuration)
    return [
        RandAffined(_BOTH, prob=probability, rotate_range=turn, spatial_size=size, **shared),
        RandAffined(_BOTH, prob=probability, scale_range=scale, spatial_size=size, **shared),
    ]


def _angles(patch_size: Sequence[int], angle: float) -> Sequence[float] | float:
    """Ranges of rotation about each axis: only about the first where the patch is three times wider than deep."""
    if len(patch_size) == 2:
        ratio = max(patch_size) / min(patch_size)
        return math.radians(15) if ratio > 1.5 else math.pi if angle > math.radians(20) else angle
    if max(patch_size) / patch_size[0] > 3:
        return (math.pi if angle > math.radians(20) else angle, 0.0, 0.0)
    return (angle, angle, angle)


def _intensity_light() -> list[Transform]:
    return [
        RandGaussianNoised(_IMAGE, prob=0.15, std=0.3),
        RandScaleIntensityd(_IMAGE, prob=0.15, factors=0.25),
        RandScaleIntensityFixedMeand(_IMAGE, prob=0.15, factors=0.25, preserve_range=False),
        RandAdjustContrastd(_IMAGE, prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
    ]


def _intensity_full() -> list[Transform]:
    sigma = (0.5, 1.0)
    return [
        RandGaussianNoised(_IMAGE, prob=0.1, std=float(np.sqrt(0.1))),
        RandGaussianSmoothd(_IMAGE, prob=0.1, sigma_x=sigma, sigma_y=sigma, sigma_z=sigma),
        RandScaleIntensityd(_IMAGE, prob=0.15, factors=0.25),
        RandScaleIntensityFixedMeand(_IMAGE, prob=0.15, factors=0.25, preserve_range=True),
        RandSimulateLowResolutiond(_IMAGE, prob=0.25, zoom_range=(0.5, 1.0)),
        RandAdjustContrastd(_IMAGE, prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
        RandAdjustContrastd(_IMAGE, prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
    ]
