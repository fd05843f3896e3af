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
    OneOf,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    Randomizable,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
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
    changed = [
        RandAffined(
            _BOTH,
            spatial_size=configuration.patch_size,
            prob=1.0,
            rotate_range=rotate_range,
            scale_range=scale_range,
            mode=("bilinear", "nearest"),
            padding_mode="zeros",
            cache_grid=True,
        )
        for rotate_range, scale_range in ((turn, None), (None, scale), (turn, scale))
    ]
    one, both = probability * (1 - probability), probability**2
    return OneOf([crop, *changed], weights=[1 - 2 * one - both, one, one, both])


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
