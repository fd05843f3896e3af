"""The sliding window as an inferer of MONAI: equal to MONAI's own, in a part of its memory."""

from __future__ import annotations

import doctest
import gc
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.meta_tensor import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import InputError
from medseg.interop import SlabInferer


def convolution(batch: Tensor) -> Tensor:
    """A network that sees its neighbours, and zeros beyond the tile: not the same for every tiling."""
    dims = batch.ndim - 2
    weight = torch.randn(3, 2, *[3] * dims, generator=torch.Generator().manual_seed(0))
    result: Tensor = (F.conv2d if dims == 2 else F.conv3d)(batch, weight.to(batch.dtype), padding=1)
    return result


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_as_monai(inputs: Tensor, **how: Any) -> None:
    with torch.no_grad():
        expected = SlidingWindowInferer(**how)(inputs, convolution)
    found = SlabInferer(**how)(inputs, convolution)
    assert isinstance(expected, Tensor)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    mask = SlabInferer(**how, argmax=True)(inputs, convolution)
    assert (mask.dtype, mask.shape) == (torch.uint8, (len(inputs), 1, *inputs.shape[2:]))
    top = expected.gather(1, mask.long())
    torch.testing.assert_close(top, expected.amax(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)


@settings(max_examples=60)
@given(
    st.integers(2, 3).flatmap(lambda n: st.tuples(*[st.tuples(st.integers(1, 13), st.integers(1, 6))] * n)),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.25, 0.5, 0.8, (0.1, 0.6, 0.3)]),
    st.sampled_from(["constant", "gaussian"]),
    st.sampled_from([0.125, 0.3, (0.05, 0.125, 0.2)]),
    st.sampled_from([0.0, -1.5]),
    st.integers(0, 2**31),
)
def test_equal_to_monai(
    sizes: Sequence[tuple[int, int]],
    batch: int,
    tiles: int,
    overlap: Any,
    mode: str,
    sigma: Any,
    cval: float,
    seed: int,
) -> None:
    """Odd sizes, images smaller than a tile, overlaps and deviations one an axis, two and three axes, batches."""
    dims = len(sizes)
    shape, roi = zip(*sizes, strict=True)
    overlap, sigma = (value[:dims] if isinstance(value, tuple) else value for value in (overlap, sigma))
    inputs = images(batch, 2, *shape, seed=seed)
    assert_as_monai(inputs, roi_size=roi, sw_batch_size=tiles, overlap=overlap, mode=mode, sigma_scale=sigma, cval=cval)


@pytest.mark.parametrize("padding", ["constant", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("shape", [(5, 4), (9, 4), (5, 6, 4), (4, 11, 5)])
def test_images_smaller_than_a_tile_are_padded_as_by_monai(shape: tuple[int, ...], padding: str) -> None:
    assert_as_monai(images(1, 2, *shape), roi_size=7, overlap=0.5, mode="gaussian", padding_mode=padding)


@pytest.mark.parametrize("roi", [-1, (4, -1, 0), (4, None, 3), 5])
def test_sizes_that_are_the_images(roi: Any) -> None:
    assert_as_monai(images(2, 2, 9, 6, 7), roi_size=roi, overlap=0.5)


def test_weights_below_a_thousandth_count_as_a_thousandth() -> None:
    """In the corner of two tiles of 16 x 16 x 16 MONAI's weights are exp(-8) of each axis or a thousandth."""
    assert_as_monai(images(1, 2, 24, 24, 24), roi_size=16, overlap=0.5, mode="gaussian")


def test_the_network_gets_what_else_is_given() -> None:
    def network(batch: Tensor, shift: float, *, scale: float) -> Tensor:
        assert not isinstance(batch, MetaTensor)
        assert torch.is_inference_mode_enabled()
        return batch * scale + shift

    inputs = MetaTensor(images(1, 2, 6, 5, 4), meta={"case": "a"})
    found = SlabInferer(4)(inputs, network, 3.0, scale=2.0, device="cpu", buffer_steps=2)
    assert isinstance(found, MetaTensor)
    assert found.meta["case"] == "a"
    torch.testing.assert_close(found.as_tensor(), inputs.as_tensor() * 2 + 3)
    inputs.meta["case"] = "b"
    assert found.meta["case"] == "a"


def test_the_affine_is_kept() -> None:
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    inputs = MetaTensor(images(1, 2, 6, 5, 4), affine=affine)
    for argmax in (False, True):
        found = SlabInferer(4, argmax=argmax)(inputs, convolution)
        assert isinstance(found, MetaTensor)
        torch.testing.assert_close(found.affine, affine)


def test_the_result_is_of_the_inputs_type() -> None:
    double, half = (SlabInferer(4)(images(1, 2, 6, 6).to(kind), lambda x: x) for kind in (torch.float64, torch.float16))
    assert (double.dtype, half.dtype) == (torch.float64, torch.float16)
    integers = torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6)
    found = SlabInferer(4, overlap=0.5)(integers, lambda x: x)
    torch.testing.assert_close(found, integers.float())


def test_the_result_takes_part_in_later_gradients() -> None:
    layer = nn.Conv3d(2, 2, 1)
    found = SlabInferer(4)(images(1, 2, 6, 5, 4), layer)
    assert not found.requires_grad
    layer(found).sum().backward()


def test_a_list_of_one_is_one() -> None:
    inputs = images(1, 2, 6, 5, 4)
    torch.testing.assert_close(SlabInferer(4)(inputs, lambda x: [x]), inputs)


def test_a_tile_of_one_value_is_computed_once() -> None:
    seen = []

    def network(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return convolution(batch)

    inputs = torch.full((2, 2, 16, 8, 8), 0.7)
    found = SlabInferer(4, overlap=0.5, mode="gaussian")(inputs, network)
    assert sum(seen) == 2  # one for each image of the batch
    expected = SlidingWindowInferer(4, overlap=0.5, mode="gaussian")(inputs, convolution)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def alive() -> dict[int, int]:
    """Bytes of each piece of memory that some tensor lies in."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize("argmax", [False, True])
def test_a_mask_needs_no_logits_of_the_image(argmax: bool) -> None:
    """All tensors that there are while a network runs, beside those of before: for a mask, far less than the logits."""
    inputs = images(1, 1, 40, 8, 8)
    before, most = alive(), 0

    def network(batch: Tensor) -> Tensor:
        nonlocal most
        most = max(most, sum(size for place, size in alive().items() if place not in before))
        return torch.cat([batch] * 5, dim=1)

    found = SlabInferer((4, 8, 8), overlap=0, argmax=argmax)(inputs, network)
    assert found.shape == (1, 1 if argmax else 5, 40, 8, 8)
    logits = 5 * 40 * 8 * 8 * 4
    if argmax:  # the mask takes 1/20 of them, and of a tile's depth: sums 1/10, all weights 1/25, an input 1/50
        assert most < logits / 4
    else:
        assert most > logits  # what the mask goes without is seen by this measure


def test_large_images_are_summed_on_the_host() -> None:
    """Of more voxels than the threshold, whatever the channels and the batch; that of inputs elsewhere."""
    ten, eleven = (torch.empty(3, 2, n, 1, 1, device="meta") for n in (10, 11))
    assert SlabInferer(4, cpu_thresh=10)._store(ten).type == "meta"
    assert SlabInferer(4, cpu_thresh=10)._store(eleven).type == "cpu"
    assert SlabInferer(4)._store(eleven).type == "meta"


def test_progress_is_shown_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []

    def bar(steps: Any) -> Any:
        for index, _ in (pair for pair in steps):
            shown.append(index)
            yield index, _

    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace(tqdm=bar))
    SlabInferer((4, 5, 4), overlap=0.5, progress=True)(images(2, 2, 8, 5, 4), convolution)
    assert shown == [0, 0, 0, 1, 1, 1]  # planes 0 to 2, 2 to 4 and 4 to 8 of two images
    SlabInferer((4, 5, 4), overlap=0.5)(images(2, 2, 8, 5, 4), convolution)
    assert len(shown) == 6


def test_progress_names_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(InputError, match="pip install tqdm"):
        SlabInferer(4, progress=True)
    SlabInferer(4)


def test_what_it_does_not_do_is_refused() -> None:
    inputs = images(1, 2, 6, 5, 4)
    with pytest.raises(InputError, match="with_coord"):
        SlabInferer(4, with_coord=True)
    with pytest.raises(InputError, match="sw_batch_size"):
        SlabInferer(4, sw_batch_size=0)
    with pytest.raises(ValueError, match="BlendMode"):
        SlabInferer(4, mode="cosine")
    with pytest.raises(InputError, match="condition"):
        SlabInferer(4)(inputs, convolution, condition=inputs)
    with pytest.raises(InputError, match="roi_size"):
        SlabInferer((4, 4))(inputs, convolution)
    with pytest.raises(InputError, match="overlap"):
        SlabInferer(4, overlap=1.0)(inputs, convolution)
    with pytest.raises(InputError, match="gives a dict"):
        SlabInferer(4)(inputs, lambda batch: {"a": batch})
    with pytest.raises(InputError, match="own size"):
        SlabInferer(4)(inputs, lambda batch: batch[..., ::2])
    with pytest.raises(InputError, match="257 classes"):
        SlabInferer(4, argmax=True)(inputs, lambda batch: batch[:, :1].expand(-1, 257, -1, -1, -1))
    with pytest.raises(InputError, match="shape"):
        SlabInferer(4)(inputs[0, 0], convolution)
    with pytest.raises(InputError, match="shape"):
        SlabInferer(4)(inputs[:0], convolution)
    with pytest.raises(InputError, match="not finite"):
        SlabInferer(4)(inputs, lambda batch: batch / 0)


def test_the_example_of_its_docstring() -> None:
    examples = doctest.DocTestFinder().find(SlabInferer, "SlabInferer")
    runner = doctest.DocTestRunner()
    for example in examples:
        runner.run(example)
    assert runner.failures == 0
    assert runner.tries > 5
