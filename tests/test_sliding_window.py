"""The sliding window: equal to the plain way of doing it and to MONAI's, on any size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medseg.errors import TrainingError
from medseg.sliding_window import Network, gaussian, slabs, tile_starts

seeds = st.integers(0, 2**32 - 1)


def convolution(seed: int, channels: int = 2, classes: int = 3, dims: int = 3) -> Network:
    """A network that sees its neighbours, and zeros beyond the tile: not the same for every tiling."""
    weight = torch.randn(classes, channels, *[3] * dims, generator=torch.Generator().manual_seed(seed))
    conv = F.conv2d if dims == 2 else F.conv3d
    return lambda batch: conv(batch, weight, padding=1)


def voxelwise(batch: Tensor) -> Tensor:
    """A network that sees one voxel at a time: the same for every tiling and mirroring."""
    return torch.stack([batch[:, 0], batch[:, 0] * 2 - 1, torch.sin(batch[:, 0])], dim=1)


def image_of(shape: Sequence[int], seed: int = 0, channels: int = 2) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(channels, *shape)).astype(np.float32)


def joined(*args: Any, **more: Any) -> NDArray[np.float32]:
    """The logits of the whole volume; slabs must follow each other without gap."""
    pieces, at = [], 0
    for start, stop, logits in slabs(*args, **more):
        assert start == at < stop
        assert logits.shape[1] == stop - start
        assert logits.dtype == np.float32
        at = stop
        pieces.append(logits)
    return np.concatenate(pieces, axis=1)


def plain(
    networks: Sequence[Network], image: NDArray[np.float32], patch: Sequence[int], overlap: float, axes: Sequence[int]
) -> NDArray[Any]:
    """The same with a buffer of the whole volume, in double precision."""
    missing = [max(0, p - n) for n, p in zip(image.shape[1:], patch, strict=True)]
    padded = np.pad(image, [(0, 0), *((m // 2, m - m // 2) for m in missing)])
    total: NDArray[Any] = np.zeros(())
    weight = gaussian(tuple(patch)).astype(np.float64)
    mass = np.zeros(padded.shape[1:])
    for corner in itertools.product(
        *(tile_starts(n, p, overlap) for n, p in zip(padded.shape[1:], patch, strict=True))
    ):
        place = (slice(None), *(slice(c, c + p) for c, p in zip(corner, patch, strict=True)))
        tile = torch.from_numpy(padded[place][np.newaxis])
        results = []
        for network in networks:
            for flags in itertools.product((False, True), repeat=len(axes)):
                dims = [axis + 2 for axis, flag in zip(axes, flags, strict=True) if flag]
                results.append(network(tile.flip(dims)).flip(dims)[0].double().numpy())
        logits = np.mean(results, axis=0)
        total = np.zeros((len(logits), *padded.shape[1:])) if total.ndim == 0 else total
        total[place] += logits * weight
        mass[place[1:]] += weight
    result = total / mass
    inner = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, image.shape[1:], strict=True))
    return np.asarray(result[(slice(None), *inner)])


@settings(max_examples=60)
@given(
    st.tuples(*[st.integers(1, 11)] * 3),
    st.tuples(*[st.integers(1, 6)] * 3),
    st.sampled_from([0.0, 0.3, 0.5, 0.75]),
    st.sets(st.integers(0, 2)),
    st.integers(1, 3),
    seeds,
)
def test_equal_to_a_buffer_of_the_whole_volume(
    shape: tuple[int, ...], patch: tuple[int, ...], overlap: float, mirror: set[int], folds: int, seed: int
) -> None:
    image, networks, axes = image_of(shape, seed), [convolution(n) for n in range(folds)], sorted(mirror)
    found = joined(networks, image, patch, overlap=overlap, mirror_axes=axes)
    assert found.shape == (3, *shape)
    np.testing.assert_allclose(found, plain(networks, image, patch, overlap, axes), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 8, 8), (12, 4, 10), (3, 2, 4)])
def test_equal_to_monai_where_it_places_the_same_tiles(shape: tuple[int, ...]) -> None:
    """MONAI lets its last tile jump back and has a higher floor of weights: so sizes in steps, and our weights."""
    image, network = image_of(shape), convolution(0)
    found = joined([network], image, (4, 4, 4))
    theirs = sliding_window_inference(
        torch.from_numpy(image[np.newaxis]),
        (4, 4, 4),
        1,
        network,
        overlap=0.5,
        mode="gaussian",
        roi_weight_map=torch.from_numpy(gaussian((4, 4, 4)).copy()),
    )
    np.testing.assert_allclose(found, theirs[0].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 5, 9), (1, 13, 4), (5, 5, 5)])
def test_equal_to_monai_on_odd_sizes_where_tiles_do_not_matter(shape: tuple[int, ...]) -> None:
    image = image_of(shape, channels=1)
    theirs = sliding_window_inference(
        torch.from_numpy(image[np.newaxis]), (4, 3, 4), 1, voxelwise, overlap=0.5, mode="gaussian"
    )
    found = joined([voxelwise], image, (4, 3, 4), mirror_axes=(0, 1, 2))
    np.testing.assert_allclose(found, theirs[0].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found, voxelwise(torch.from_numpy(image[np.newaxis]))[0], rtol=1e-4, atol=1e-5)


def test_the_weights_are_monais_up_to_their_scale() -> None:
    from monai.data.utils import compute_importance_map

    theirs = compute_importance_map((5, 8, 6), mode="gaussian", sigma_scale=0.125)
    ours = gaussian((5, 8, 6))
    assert ours.max() == 10
    assert ours.min() > 0
    scaled = theirs.numpy() / theirs.max().item() * 10
    large = ours > 0.1  # MONAI's floor is a thousandth of the largest
    np.testing.assert_allclose(ours[large], scaled[large], rtol=1e-4)
    assert gaussian((1,)).tolist() == [10]


def test_mirroring_undoes_itself_for_a_network_that_follows_it() -> None:
    """A convolution with a kernel that is the same in a mirror gives the same with and without mirroring."""
    kernel = torch.tensor([1.0, 2.0, 1.0])
    weight = (kernel[:, None, None] * kernel[:, None] * kernel)[None, None]
    image = image_of((7, 6, 5), channels=1)

    def network(batch: Tensor) -> Tensor:
        return F.conv3d(batch, weight, padding=1)

    np.testing.assert_allclose(
        joined([network], image, (4, 4, 4), mirror_axes=(0, 1, 2)), joined([network], image, (4, 4, 4)), rtol=1e-4
    )


def test_mirroring_by_hand() -> None:
    """A network that says where in the tile it is: along a mirrored axis the mean of both ends is the middle."""

    def ramp(batch: Tensor) -> Tensor:
        return torch.arange(4.0).expand(batch.shape[0], 1, *batch.shape[2:-1], 4)

    image = image_of((2, 3, 4))
    assert (joined([ramp], image, (2, 3, 4)) == np.arange(4)).all()
    assert (joined([ramp], image, (2, 3, 4), mirror_axes=(2,)) == 1.5).all()
    assert (joined([ramp], image, (2, 3, 4), mirror_axes=(0, 1)) == np.arange(4)).all()


def test_slices_are_seen_one_by_one() -> None:
    """A network of slices equals itself run over each slice; mirror axes count the slice's axes."""
    image, network = image_of((5, 7, 6)), convolution(1, dims=2)
    found = joined([network], image, (4, 4), mirror_axes=(1,))
    for index in range(5):
        alone = joined([network], image[:, index : index + 1], (4, 4), mirror_axes=(1,))
        np.testing.assert_array_equal(found[:, index], alone[:, 0])
    whole = joined([network], image, (7, 6))
    np.testing.assert_allclose(whole[:, 2], network(torch.from_numpy(image[np.newaxis, :, 2]))[0], rtol=1e-5, atol=1e-5)


def test_a_small_image_lies_in_the_middle_of_its_tile() -> None:
    seen: list[Tensor] = []

    def network(batch: Tensor) -> Tensor:
        seen.append(batch.clone())
        return batch

    image = np.ones((1, 2, 3, 4), dtype=np.float32)
    found = joined([network], image, (4, 4, 4))
    np.testing.assert_array_equal(found, image)
    expected = torch.zeros(1, 1, 4, 4, 4)
    expected[:, :, 1:3, 0:3] = 1
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize(
    ("size", "patch", "overlap", "expected"),
    [
        (4, 4, 0.5, [0]),
        (2, 4, 0.5, [0]),
        (8, 4, 0.5, [0, 2, 4]),
        (9, 4, 0.5, [0, 2, 3, 5]),  # four tiles 5/3 apart: 0, 1.67, 3.33, 5
        (5, 4, 0.0, [0, 1]),
        (3, 1, 0.5, [0, 1, 2]),
        (110, 64, 0.5, [0, 23, 46]),  # nnU-Net's own example: 0, 23, 46
    ],
)
def test_tiles_are_spread_evenly(size: int, patch: int, overlap: float, expected: list[int]) -> None:
    assert tile_starts(size, patch, overlap) == expected


@given(st.integers(1, 200), st.integers(1, 40), st.floats(0, 0.9))
def test_tiles_leave_no_gap_and_overlap_as_asked(size: int, patch: int, overlap: float) -> None:
    starts = tile_starts(size, patch, overlap)
    assert starts[0] == 0
    assert starts[-1] == max(0, size - patch)
    assert all(0 < b - a <= max(1, np.ceil(patch * (1 - overlap))) for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    def network(batch: Tensor) -> Tensor:
        return torch.where(batch > 2, value, batch)

    with pytest.raises(TrainingError, match="not finite"):
        joined([network], np.full((1, 4, 4, 4), 3, dtype=np.float32), (4, 4, 4))


def test_a_network_is_needed() -> None:
    with pytest.raises(ValueError, match="one network"):
        joined([], image_of((4, 4, 4)), (4, 4, 4))
