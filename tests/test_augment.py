"""Augmentation: a function of its seed, on the axes that the plan allows, and with labels that stay labels."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from medseg import augment
from medseg.augment import build_transform, read_size, seed_transform
from medseg.plan import Configuration, NetworkPlan, TrainingPlan

Level = Literal["none", "light", "full", "classic"]
LEVELS: tuple[Level, ...] = ("none", "light", "full", "classic")


def configuration(
    level: Level, patch: tuple[int, ...] = (8, 10, 12), mirror_axes: tuple[int, ...] = ()
) -> Configuration:
    dims = len(patch)
    return Configuration(
        spatial_dims=2 if dims == 2 else 3,
        spacing_mm=(1, 1, 1),
        median_shape=(8, 8, 8),
        patch_size=patch,
        batch_size=2,
        batch_dice=False,
        mirror_axes=mirror_axes,
        network=NetworkPlan(features=(2, 2), kernel_sizes=((3,) * dims,) * 2, strides=((1,) * dims, (1,) * dims)),
        training=TrainingPlan(augmentation=level),
        estimated_memory_mb=1,
    )


def sample_of(setup: Configuration, channels: int = 2) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    size = read_size(setup)
    image = rng.normal(size=(channels, *size)).astype(np.float32)
    labels = rng.choice([0, 1, 4], size=(1, *size)).astype(np.uint8)
    return {"image": torch.from_numpy(image), "labels": torch.from_numpy(labels)}


def plain(tensor: Any) -> Tensor:
    result: Tensor = tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor
    return result


def drawn(setup: Configuration, sample: dict[str, Tensor], seeds: int) -> list[dict[str, Tensor]]:
    transform = build_transform(setup)
    results = []
    for seed in range(seeds):
        seed_transform(transform, seed)
        done = transform(dict(sample))
        results.append({name: plain(tensor) for name, tensor in done.items()})
    return results


@pytest.mark.parametrize(
    ("patch", "expected"),
    [((40, 56, 40), (48, 68, 48)), ((10, 11), (12, 15)), ((1, 20, 5), (3, 24, 7))],
)
def test_the_size_read_is_a_fifth_larger_by_an_even_number(patch: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert read_size(configuration("light", patch)) == read_size(configuration("full", patch)) == expected
    assert read_size(configuration("none", patch)) == patch


@pytest.mark.parametrize("patch", [(8, 10, 12), (4, 16, 16), (12, 10), (8, 16)])
@pytest.mark.parametrize("level", LEVELS)
def test_a_sample_is_a_function_of_its_seed(level: Level, patch: tuple[int, ...]) -> None:
    setup = configuration(level, patch, mirror_axes=tuple(range(len(patch))))
    sample = sample_of(setup)
    before = {name: tensor.clone() for name, tensor in sample.items()}
    first, second = drawn(setup, sample, 25), drawn(setup, sample, 25)
    assert all(torch.equal(sample[name], before[name]) for name in sample)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)
    assert len({a["image"].numpy().tobytes() for a in first}) > (1 if level == "none" else 15)
    transform = build_transform(setup)
    seed_transform(transform, 7)
    transform(dict(sample))
    seed_transform(transform, 3)  # not a function of what was drawn before
    assert torch.equal(plain(transform(dict(sample))["image"]), first[3]["image"])


@pytest.mark.parametrize("patch", [(8, 10, 12), (4, 16, 16), (12, 10), (8, 16)])
@pytest.mark.parametrize("level", LEVELS)
def test_size_and_labels_stay(level: Level, patch: tuple[int, ...]) -> None:
    setup = configuration(level, patch, mirror_axes=tuple(range(len(patch))))
    for done in drawn(setup, sample_of(setup), 40):
        assert done["image"].shape == (2, *patch)
        assert done["labels"].shape == (1, *patch)
        assert done["image"].dtype == torch.float32
        assert done["image"].isfinite().all()
        assert set(done["labels"].unique().tolist()) <= {0, 1, 4}


def ramps(setup: Configuration) -> dict[str, Tensor]:
    """A sample with one channel for each axis, which rises along it from -1 to 1; labels 1 in its upper half."""
    size = read_size(setup)
    axes = [torch.linspace(-1, 1, n).reshape([-1 if a == axis else 1 for a in range(len(size))]).expand(size)
            for axis, n in enumerate(size)]  # fmt: skip
    return {"image": torch.stack(axes), "labels": (axes[-1] > 0).to(torch.uint8)[None]}


@pytest.mark.parametrize("axes", [(), (0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("level", LEVELS)
def test_only_the_allowed_axes_are_mirrored(level: Level, axes: tuple[int, ...]) -> None:
    """No turn is beyond 30 degrees, so that a ramp falls only where it was mirrored."""
    setup = configuration(level, (12, 12, 12), mirror_axes=axes)
    falling = set()
    for done in drawn(setup, ramps(setup), 60):
        upper, lower = done["image"].unbind(0), setup.patch_size
        for axis in range(3):
            half = lower[axis] // 2
            rise = upper[axis].narrow(axis, half, half).mean() - upper[axis].narrow(axis, 0, half).mean()
            if rise < 0:
                falling.add(axis)
    assert falling == set(axes)


def test_without_augmentation_a_patch_is_what_was_read() -> None:
    setup = configuration("none")
    sample = sample_of(setup)
    (done,) = drawn(setup, sample, 1)
    assert all(torch.equal(done[name], sample[name]) for name in sample)


@pytest.mark.parametrize("level", ["light", "full", "classic"])
def test_what_is_not_turned_is_the_middle_of_what_was_read(level: Level) -> None:
    """In half of the samples or more labels are not resampled, and then they are cut from the centre."""
    setup = configuration(level)
    sample = sample_of(setup)
    middle = sample["labels"][:, 1:-1, 1:-1, 2:-2]
    same = sum(torch.equal(done["labels"].to(torch.uint8), middle) for done in drawn(setup, sample, 200))
    probability = {"light": 0.7**2, "full": 0.8**2, "classic": 0.5 * 0.7}[level]
    assert abs(same / 200 - probability) < 0.1  # three standard deviations


@pytest.mark.parametrize("level", ["light", "full", "classic"])
def test_image_and_labels_turn_together(level: Level) -> None:
    """Labels are where the last channel is above its middle; without noise and blur that stays so off the border."""
    setup = configuration(level, (16, 16, 16), mirror_axes=(0, 2))
    transform = build_transform(setup)
    transform.transforms = [transform.transforms[0], *transform.transforms[-2:]]  # turn, scale and mirror
    turned = 0
    for seed in range(60):
        seed_transform(transform, seed)
        done = {name: plain(tensor) for name, tensor in transform(ramps(setup)).items()}
        inner = (slice(3, 13),) * 3
        ramp, labels = done["image"][2][inner], done["labels"][0][inner]
        clear = ramp.abs() > 0.1
        assert torch.equal((ramp > 0)[clear], (labels == 1)[clear])
        turned += not torch.equal(labels[0], labels[-1])
    assert turned > 5


@pytest.mark.parametrize("level", ["light", "full", "classic"])
def test_an_anisotropic_patch_turns_in_its_plane_only(level: Level) -> None:
    """With 4 x 16 x 16 voxels the ramp along the first axis may be scaled, but is never tilted."""
    setup = configuration(level, (4, 16, 16))
    transform = build_transform(setup)
    transform.transforms = transform.transforms[:1]
    turned = 0
    for seed in range(60):
        seed_transform(transform, seed)
        done = plain(transform(ramps(setup))["image"])
        inner = done[:, 1:3, 6:10, 6:10]
        torch.testing.assert_close(inner[0], inner[0, :, :1, :1].expand(2, 4, 4), atol=1e-5, rtol=0)
        turned += bool((inner[2, :, 0] - inner[2, :, -1]).abs().max() > 1e-3)
    assert turned > 5


def test_seeding_reaches_every_part() -> None:
    """Each part draws from the one state: no part of a transform seeded alike draws something else."""
    setup = configuration("full", mirror_axes=(0,))
    transforms = [build_transform(setup) for _ in range(2)]
    for transform in transforms:
        for part in (*transform.transforms, *transform.transforms[0].transforms):
            if hasattr(part, "prob"):
                part.prob = 1.0
        seed_transform(transform, 5)
    first, second = (transform(sample_of(setup)) for transform in transforms)
    assert torch.equal(plain(first["image"]), plain(second["image"]))


@pytest.mark.parametrize("patch", [(8, 10, 12), (8, 16)])
@pytest.mark.parametrize("level", LEVELS)
def test_a_patch_of_nothing_stays_finite(level: Level, patch: tuple[int, ...]) -> None:
    setup = configuration(level, patch)
    sample = {name: torch.zeros_like(tensor) for name, tensor in sample_of(setup).items()}
    assert all(done["image"].isfinite().all() for done in drawn(setup, sample, 40))


# ---- deformation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9, 13), (5, 9, 7)])
def test_a_fine_field_is_the_coarse_one_at_its_points(size: tuple[int, ...]) -> None:
    """Three points an axis: first, middle and last voxel."""
    coarse = torch.randn(len(size), *([3] * len(size)), generator=torch.Generator().manual_seed(0))
    fine = augment._bicubic(coarse, size)
    assert fine.shape == (len(size), *size)
    points = np.ix_(range(len(size)), *([0, n // 2, n - 1] for n in size))
    torch.testing.assert_close(fine[points], coarse)
    torch.testing.assert_close(augment._bicubic(torch.ones_like(coarse), size), torch.ones(len(size), *size))


class Still:
    """Random numbers that deform nothing."""

    def normal(self, scale: float, size: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return np.zeros(size)


@pytest.mark.parametrize("patch", [(8, 10, 12), (5, 7), (4, 16, 16)])
def test_a_patch_that_is_not_deformed_is_the_middle_of_what_was_read(patch: tuple[int, ...]) -> None:
    setup = configuration("classic", patch)
    sample = sample_of(setup)
    elastic = augment._RandElasticd(patch, None)
    elastic.R = Still()  # type: ignore[assignment]
    done = elastic(sample)
    middle = tuple(slice((n - p) // 2, (n - p) // 2 + p) for n, p in zip(read_size(setup), patch, strict=True))
    for name in ("image", "labels"):
        expected = sample[name][(slice(None), *middle)].float()
        torch.testing.assert_close(plain(done[name]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("patch", "moved"), [((40, 40, 40), (0, 1, 2)), ((60, 60), (0, 1)), ((6, 40, 40), (1, 2))])
def test_how_far_voxels_move(patch: tuple[int, ...], moved: tuple[int, ...]) -> None:
    """At the middle voxel the displacement is that of the middle point: a standard deviation of 3 in 100 of the size.

    Ramps that rise by 1 a voxel tell it; along the axis of a flat patch nothing moves.
    """
    elastic = augment._RandElasticd(patch, None)
    elastic.set_random_state(0)
    size = read_size(configuration("classic", patch))
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in size), indexing="ij")
    sample = {"image": torch.stack(axes), "labels": axes[0][None]}
    still = elastic(sample)["image"]
    elastic.set_random_state(0)
    middle = (slice(None), *(n // 2 for n in patch))
    found = torch.stack([plain(elastic(sample)["image"])[middle] for _ in range(150)])
    assert still.shape == (len(patch), *patch)
    for axis, spread in enumerate(found.std(dim=0).tolist()):
        # between the points of an even size, a little less than at one
        expected = 0.03 * patch[-1] if axis in moved else 0.0
        assert spread == pytest.approx(expected, rel=0.2, abs=1e-4)


@pytest.mark.parametrize("patch", [(16, 16), (8, 12, 10)])
def test_brightness_and_contrast_by_hand(patch: tuple[int, ...]) -> None:
    """Off the mirror and the turns an image x becomes (x - m) (1 + c) + m + b, |b| at most 1/5 and |c| at most 1/4."""
    setup = configuration("classic", patch)
    transform = build_transform(setup)
    transform.transforms = transform.transforms[1:]
    sample = sample_of(setup)
    image = sample["image"]
    brighter = stronger = 0
    for seed in range(100):
        seed_transform(transform, seed)
        done = plain(transform(dict(sample))["image"])
        contrast = float(done.std() / image.std()) - 1
        offset = float(done.mean() - image.mean())
        torch.testing.assert_close(done, (image - image.mean()) * (1 + contrast) + image.mean() + offset)
        assert abs(contrast) < 0.25 + 1e-4
        assert abs(offset) < 0.2 + 1e-4
        brighter, stronger = brighter + (abs(offset) > 1e-4), stronger + (abs(contrast) > 1e-4)
    assert abs(brighter - 30) < 15, "three standard deviations of probability 0.3"
    assert abs(stronger - 30) < 15
