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
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from medseg.errors import InputError
from medseg.resample import Slab, resample_image
from medseg.sliding_window import (
    Margins,
    Network,
    buffer_bytes,
    gaussian,
    is_out_of_memory,
    rolling_axis,
    slabs,
    tile_count,
    tile_starts,
)

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


def joined(networks: Sequence[Network], image: NDArray[np.float32], *args: Any, **more: Any) -> NDArray[np.float32]:
    """The logits (classes, D, H, W) of the whole volume; slabs must cover it in the order that ``Slab`` promises."""
    whole: NDArray[np.float32] = np.zeros(0)
    at: tuple[int, int] = (0, 0)
    for slab in slabs(networks, image, *args, **more):
        planes, rows, columns, classes = slab.logits.shape
        assert slab.logits.dtype == torch.float32
        across, along = (n for axis, n in enumerate(image.shape[1:]) if axis != slab.axis)
        assert (planes, rows, columns) == (slab.stop - slab.start, slab.rows[1] - slab.rows[0], along)
        assert (slab.start, slab.rows[0]) == at
        if not whole.size:
            whole = np.full((classes, *image.shape[1:]), np.nan, dtype=np.float32)
        part = np.moveaxis(whole, (1 + slab.axis, 0), (0, -1))[slab.start : slab.stop, slice(*slab.rows)]
        found = slab.logits.numpy()
        np.testing.assert_allclose(part[~np.isnan(part)], found[~np.isnan(part)], rtol=1e-5, atol=1e-5)  # rows on a cut
        part[...] = found
        # a block ends with the first row of the next
        at = (slab.stop, slab.rows[0]) if slab.stop < image.shape[1 + slab.axis] else (0, slab.rows[1] - 1)
    assert at == (0, across - 1)
    assert not np.isnan(whole).any()
    return whole


def plain(
    networks: Sequence[Network], image: NDArray[np.float32], patch: Sequence[int], overlap: float, axes: Sequence[int]
) -> NDArray[Any]:
    """The same with a buffer of the whole volume, in double precision."""
    missing = [max(0, p - n) for n, p in zip(image.shape[1:], patch, strict=True)]
    padded = np.pad(image, [(0, 0), *((m // 2, m - m // 2) for m in missing)])
    total: NDArray[Any] = np.zeros(())
    weight = gaussian(tuple(patch)).double().numpy()
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
    st.integers(1, 2),
    st.fixed_dictionaries(
        {"batch_size": st.integers(1, 3), "blocks": st.integers(1, 4), "axis": st.sampled_from([None, 0, 1, 2])}
    ),
    seeds,
)
def test_equal_to_a_buffer_of_the_whole_volume(
    shape: tuple[int, ...],
    patch: tuple[int, ...],
    overlap: float,
    mirror: set[int],
    folds: int,
    how: dict[str, Any],
    seed: int,
) -> None:
    image, networks, axes = image_of(shape, seed), [convolution(n) for n in range(folds)], sorted(mirror)
    found = joined(networks, image, patch, overlap=overlap, mirror_axes=axes, **how)
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
        roi_weight_map=gaussian((4, 4, 4)),
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


def test_weights_worked_out_by_hand() -> None:
    """Of four voxels: the largest at voxel 2, a deviation of half a voxel, exp(-2) and exp(-8) one and two off."""
    line = [10 * np.exp(-8), 10 * np.exp(-2), 10, 10 * np.exp(-2)]
    np.testing.assert_allclose(gaussian((1, 1, 4)).flatten(), line, rtol=1e-6)
    np.testing.assert_allclose(gaussian((3, 1, 4))[1, 0], line, rtol=1e-6)
    # of three: the largest in the middle, a deviation of 3/8 of a voxel: exp(-(8/3)^2 / 2) = exp(-32/9)
    np.testing.assert_allclose(
        gaussian((3, 1, 4))[:, 0, 2], [10 * np.exp(-32 / 9), 10, 10 * np.exp(-32 / 9)], rtol=1e-6
    )
    assert gaussian((1, 1, 1)).flatten().tolist() == [10]


@pytest.mark.parametrize("patch", [(6, 5, 8), (1, 7, 4), (16, 2, 3)])
def test_the_weights_are_nnunets(patch: tuple[int, int, int]) -> None:
    """As it makes them: a filtered point at voxel p // 2, scaled to 10; here in double precision."""
    point = np.zeros(patch)
    point[tuple(n // 2 for n in patch)] = 1
    theirs = ndimage.gaussian_filter(point, [n / 8 for n in patch], mode="constant")
    np.testing.assert_allclose(gaussian(patch), theirs / theirs.max() * 10, rtol=1e-4)


def test_no_weight_of_a_large_patch_vanishes() -> None:
    weight = gaussian((160, 128, 96))
    assert weight.max() == 10
    np.testing.assert_allclose(float(weight.min()), 10 * np.exp(-24), rtol=1e-4)  # in a corner: exp(-8) an axis


def test_mirroring_undoes_itself_for_a_network_that_follows_it() -> None:
    """A convolution with a kernel that is the same in a mirror gives the same with and without mirroring."""
    kernel = torch.tensor([1.0, 2.0, 1.0])
    weight = (kernel[:, None, None] * kernel[:, None] * kernel)[None, None]
    image = image_of((7, 6, 5), channels=1)

    def network(batch: Tensor) -> Tensor:
        return F.conv3d(batch, weight, padding=1)

    np.testing.assert_allclose(
        joined([network], image, (4, 4, 4), mirror_axes=(0, 1, 2)), joined([network], image, (4, 4, 4)), 1e-4, 1e-5
    )


def test_mirroring_by_hand() -> None:
    """A network that says where in the tile it is: along a mirrored axis the mean of both ends is the middle."""

    def ramp(batch: Tensor) -> Tensor:
        return torch.arange(4.0).expand(batch.shape[0], 1, *batch.shape[2:-1], 4)

    image = image_of((2, 3, 4))
    for axes, expected in (((), np.arange(4)), ((2,), 1.5), ((0, 1), np.arange(4))):
        found = joined([ramp], image, (2, 3, 4), mirror_axes=axes)
        np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-6)


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
    np.testing.assert_allclose(found, image, rtol=1e-6)
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

    with pytest.raises(InputError, match="not finite"):
        joined([network], np.full((1, 4, 4, 4), 3, dtype=np.float32), (4, 4, 4))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_image_that_is_not_finite_is_refused(value: float) -> None:
    """Named as a cause, beside the weights and half precision."""
    image = image_of((9, 4, 4))
    image[0, 5, 2, 2] = value
    with pytest.raises(InputError, match=r"not finite .* NaN .* in the image and in the weights; .*precision 32"):
        joined([convolution(0)], image, (4, 4, 4))


def test_a_network_is_needed() -> None:
    with pytest.raises(ValueError, match="one network"):
        joined([], image_of((4, 4, 4)), (4, 4, 4))


# Memory


@pytest.mark.parametrize(
    ("shape", "patch", "axis", "voxels"),
    [
        ((10, 10, 10), (4, 5, 6), 0, 4 * 100),
        ((10, 10, 10), (6, 5, 4), 2, 4 * 100),
        ((10, 20, 30), (5, 5, 5), 2, 5 * 200),
        ((8, 8, 8), (4, 4, 4), 0, 4 * 64),  # equals: the first
        ((7, 40, 30), (64, 64), 0, 40 * 30),  # slices
        ((1, 40, 30), (16, 24), 1, 16 * 30),  # a picture: of rows 16 of 40, of columns 24 of 30
        ((3, 4, 5), (16, 16, 16), 0, 3 * 4 * 5),  # never more than the image
    ],
)
def test_the_buffer_lies_where_it_is_smallest(
    shape: tuple[int, ...], patch: tuple[int, ...], axis: int, voxels: int
) -> None:
    assert rolling_axis(shape, patch) == axis
    assert buffer_bytes(shape, patch, classes=7) == voxels * 8 * 4  # seven logits and a weight, four bytes each


def test_blocks_take_less_memory_and_more_tiles() -> None:
    """Planes of 10 x 10, 4 rows deep: blocks of 5 rows, the first with one row more, have 6 x 10 x 4 voxels."""
    assert buffer_bytes((10, 10, 10), (4, 4, 4), 1, blocks=2) == 4 * 6 * 10 * 2 * 4
    assert buffer_bytes((10, 10, 10), (4, 4, 4), 1, blocks=99) == 4 * 3 * 10 * 2 * 4  # five blocks of two rows
    # tiles begin at 0, 2, 4 and 6; rows 0 to 6 are touched by those at 0, 2 and 4, rows 5 to 10 by those at 2, 4 and 6
    assert tile_count((10, 10, 10), (4, 4, 4)) == 4 * 4 * 4
    assert tile_count((10, 10, 10), (4, 4, 4), blocks=2) == 4 * (3 + 3) * 4
    assert tile_count((3, 6, 4), (4, 4), overlap=0) == 3 * 2 * 1


@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 5)] * 3), st.integers(1, 3))
def test_tiles_are_counted_as_they_are_run(shape: tuple[int, ...], patch: tuple[int, ...], blocks: int) -> None:
    seen = []

    def network(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return batch

    ramp = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape) + 1
    joined([network], ramp, patch, blocks=blocks)
    if max(patch) > 1:  # a tile of one voxel is a tile of one value
        lonely = all(n == 1 or p == 1 for n, p in zip(shape, patch, strict=True))
        assert lonely or sum(seen) == tile_count(shape, patch, blocks=blocks)


def test_memory_is_that_of_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One allocation holds all sums, over planes and blocks; what is handed out lies in it."""
    image = image_of((20, 8, 8))
    places = {slab.logits.data_ptr() for slab in slabs([convolution(0)], image, (4, 4, 4), blocks=2)}
    assert len(places) == 1
    first = next(iter(slabs([convolution(0)], image, (4, 4, 4), blocks=2)))
    whole = first.logits.untyped_storage().nbytes()
    assert whole + whole // 3 == buffer_bytes((20, 8, 8), (4, 4, 4), classes=3, blocks=2)  # and one weight for 3 logits


# Tiles of one value


def counted(network: Network, seen: list[Tensor]) -> Network:
    def run(batch: Tensor) -> Tensor:
        seen.extend(batch.clone())
        return network(batch)

    return run


@pytest.mark.parametrize("batch_size", [1, 3])
def test_tiles_of_one_value_are_computed_once(batch_size: int) -> None:
    """Along 20 planes tiles of 4 begin at 0, 2, ... 16; the one voxel in plane 9 is in those at 6 and 8."""
    image = np.full((2, 20, 4, 4), -1.1, dtype=np.float32)
    image[1] = 3
    image[0, 9, 2, 2] = 5
    seen: list[Tensor] = []
    found = joined([counted(convolution(0), seen)], image, (4, 4, 4), batch_size=batch_size)
    assert len(seen) == 3
    np.testing.assert_allclose(found, plain([convolution(0)], image, (4, 4, 4), 0.5, []), rtol=1e-4, atol=1e-4)


def test_what_resampling_leaves_of_one_value_is_one_value() -> None:
    """Planes 0 to 24 of air beside a body: far enough from it air stays, up to rounding."""
    image = np.full((1, 60, 25, 20), -1.83746, dtype=np.float32)
    image[:, 50:] = image_of((10, 25, 20), channels=1)
    air = resample_image(image, (53, 31, 22), (3, 3, 3))[:, :24]
    assert np.ptp(air) > 0
    seen: list[Tensor] = []
    joined([counted(convolution(0, channels=1), seen)], air, (8, 8, 8))
    assert len(seen) == 1
    np.testing.assert_allclose(seen[0], -1.83746, rtol=1e-6)


def test_a_second_value_is_computed_anew() -> None:
    """Tiles of 4 without overlap: of 0, of 0, of both, of 7 and of 7 in channel 0."""
    image = np.zeros((2, 20, 4, 4), dtype=np.float32)
    image[0, 10:] = 7
    seen: list[Tensor] = []
    found = joined([counted(convolution(0), seen)], image, (4, 4, 4), overlap=0)
    assert len(seen) == 3
    np.testing.assert_allclose(found, plain([convolution(0)], image, (4, 4, 4), 0, []), rtol=1e-5, atol=1e-5)


def test_nothing_small_is_taken_for_nothing() -> None:
    """A value that differs by a hundred-thousandth is another value, also far from 0 and in one channel alone."""
    image = np.full((2, 4, 4, 4), 100, dtype=np.float32)
    image[1, 2, 2, 2] *= 1.00001
    seen: list[Tensor] = []
    joined([counted(voxelwise, seen)], image, (4, 4, 4))
    np.testing.assert_array_equal(seen[0], image)


def test_a_network_may_use_the_memory_of_its_logits_again() -> None:
    memory = torch.empty(1, 1, 4, 4, 4)

    def network(batch: Tensor) -> Tensor:
        memory.copy_(batch)
        return memory

    image = np.zeros((1, 16, 4, 4), dtype=np.float32)
    image[:, 5:7] = image_of((2, 4, 4), channels=1)
    np.testing.assert_allclose(joined([network], image, (4, 4, 4)), image, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(joined([network], image, (4, 4, 4), mirror_axes=(1,)), image, rtol=1e-5, atol=1e-6)


def test_a_network_of_another_memory_order_gives_the_same() -> None:
    def last(batch: Tensor) -> Tensor:
        return convolution(0)(batch).contiguous(memory_format=torch.channels_last_3d)

    image = image_of((9, 6, 7))
    for axis in range(3):
        np.testing.assert_array_equal(
            joined([last], image, (4, 4, 4), axis=axis), joined([convolution(0)], image, (4, 4, 4), axis=axis)
        )


def test_the_image_is_not_written_to() -> None:
    image = image_of((6, 4, 4))
    image.flags.writeable = False
    joined([lambda batch: batch.mul_(2)], image, (4, 4, 4), mirror_axes=(0,))
    np.testing.assert_array_equal(image, image_of((6, 4, 4)))


# Too little memory


def test_too_little_memory_is_handed_on_and_a_second_try_is_whole() -> None:
    """A device that is too small for two tiles at once: nothing is caught, nothing is left behind."""
    image = image_of((9, 10, 4))

    def network(batch: Tensor) -> Tensor:
        if batch.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return voxelwise(batch)

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        joined([network], image, (4, 4, 4), batch_size=2)
    found = joined([network], image, (4, 4, 4), blocks=2, on_device=False)
    np.testing.assert_allclose(found, joined([voxelwise], image, (4, 4, 4)), rtol=1e-5, atol=1e-6)


def test_what_is_too_little_memory() -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.empty(10**15)
    assert is_out_of_memory(failure.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("std::bad_alloc"))


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 95551488 bytes. Error code 12 (Cannot allocate memory)",
        "[enforce fail at alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Exception from src/inference/src/dev/plugin.cpp:54:\nCheck 'ptr' failed at src/plugins/intel_cpu/src/"
        "cpu_memory.cpp:257:\nFailed to allocate 113246208 bytes of memory\n\n",
        "Exception from src/core/src/runtime/allocator.cpp:79:\nstd::bad_alloc\n",
        "Exception from src\\core\\src\\runtime\\allocator.cpp:79:\nbad allocation\n",
    ],
)
def test_texts_of_too_little_memory(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(InputError("--engine", text))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "DefaultCPUAllocator: invalid alignment of memory",
        "Failed to allocate a name for the memory-mapped file",
        "Exception from src/inference/src/dev/plugin.cpp:54:\n"
        "could not construct a memory descriptor using a format tag",
    ],
)
def test_texts_that_only_speak_of_memory(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text))


def test_too_little_memory_for_onnx_runtime() -> None:
    """Its exceptions are no RuntimeErrors; one of another reason is not taken for it."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    kinds, value = onnx.TensorProto, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Expand", ["x", "shape"], ["y"])],
        "as often as it is told",
        [value("x", kinds.FLOAT, [1]), value("shape", kinds.INT64, [1])],
        [value("y", kinds.FLOAT, [None])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shape = np.array([10**15])
    with pytest.raises(Exception, match="Failed to allocate") as failure:
        session.run(None, {"x": np.ones(1, np.float32), "shape": shape})
    assert is_out_of_memory(failure.value)
    with pytest.raises(Exception, match="invalid dimensions") as failure:
        session.run(None, {"x": np.ones(2, np.float32), "shape": shape})
    assert not is_out_of_memory(failure.value)


def test_too_little_memory_for_openvino() -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    with pytest.raises(RuntimeError) as failure:
        openvino.Tensor(openvino.Type.f32, [10**15])
    assert is_out_of_memory(failure.value)


# ---- margins ---------------------------------------------------------------------------------------------------------


def slab_of(logits: NDArray[np.float64]) -> Slab:
    """A slab of the voxels (n, classes) of one row."""
    row = torch.from_numpy(logits.astype(np.float32))[np.newaxis, np.newaxis]
    return Slab(0, 0, 1, (0, 1), row)


def test_the_margin_of_a_class_is_the_mean_over_the_voxels_that_it_wins() -> None:
    odds = np.array([[0.1, 0.7, 0.2], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])  # 0.7 - 0.2, 0.5 - 0.3; background has none
    margins = Margins(3, regions=False)
    slab = slab_of(np.log(odds) + 5)
    before = slab.logits.clone()
    assert list(margins.watch([slab], (1, 1, 3))) == [slab]
    assert torch.equal(slab.logits, before)
    assert margins.means == {1: pytest.approx(0.35)}


def test_the_margin_of_a_region_is_that_of_its_probability() -> None:
    odds = np.array([[0.9, 0.6, 0.1], [0.7, 0.5, 0.2], [0.1, 0.2, 0.3]])  # |2 p - 1|: 0.8 and 0.4; 0.2; 0.5 is a tie
    margins = Margins(3, regions=True)
    list(margins.watch([slab_of(np.log(odds / (1 - odds)))], (1, 1, 3)))
    assert margins.means == {0: pytest.approx(0.6), 1: pytest.approx(0.2)}


def test_nothing_found_has_no_margin() -> None:
    margins = Margins(2, regions=False)
    list(margins.watch([slab_of(np.array([[1.0, 0.0], [0.0, 0.0]]))], (1, 1, 2)))
    assert margins.means == {}


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("chunk", [1, 500, 2**25])
@pytest.mark.parametrize("blocks", [1, 3])
def test_margins_are_the_same_for_every_cutting(
    blocks: int, chunk: int, regions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medseg.sliding_window.CHUNK_BYTES", chunk)
    image, network = image_of((13, 11, 12)), convolution(1)
    whole = joined([network], image, (6, 5, 4)).reshape(3, -1).astype(np.float64)
    margins = Margins(3, regions=regions)
    for slab in margins.watch(slabs([network], image, (6, 5, 4), blocks=blocks), image.shape[1:]):
        assert slab.logits.shape[0] == slab.stop - slab.start
    if regions:
        expected = {n: np.tanh(row[row > 0] / 2).mean() for n, row in enumerate(whole)}
    else:
        odds = np.exp(whole) / np.exp(whole).sum(axis=0)
        _, second, first = np.sort(odds, axis=0)
        expected = {n: (first - second)[odds.argmax(axis=0) == n].mean() for n in (1, 2)}
    assert margins.means == pytest.approx(expected, rel=1e-5)
