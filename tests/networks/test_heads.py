"""The heads for cells and scenes: probabilities by hand, half precision, fusion of levels, parameters by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.networks import CellSegmenter, SatelliteSegmenter, UNet
from medseg.networks.blocks import interpolated
from medseg.networks.heads import CellHead


class Fixed(nn.Module):
    """In place of a branch: what it would say."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.to(x.dtype)


def composed(classes: list[float], boundary: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The head's output for one pixel, from its branches' logits."""
    head = CellSegmenter(2, 1, len(classes) + 1, (2, 4)).heads[0]
    assert isinstance(head, CellHead)
    head.classes = Fixed(torch.tensor(classes).reshape(1, -1, 1, 1))
    head.boundary = Fixed(torch.full((1, 1, 1, 1), boundary))  # type: ignore[assignment]
    result: Tensor = head(torch.zeros(1, 2, 1, 1, dtype=dtype)).flatten()
    return result


def test_probabilities_by_hand() -> None:
    # background 1/6, two kinds of cells 2/6 and 3/6; on a boundary with a probability of 1/4
    found = composed(torch.tensor([1.0, 2.0, 3.0]).log().tolist(), -(torch.tensor(3.0).log().item())).exp()
    torch.testing.assert_close(found, torch.tensor([1 / 6, 2 / 6 * 3 / 4, 3 / 6 * 3 / 4, 5 / 6 * 1 / 4]))


LOGIT = st.floats(-60, 60)


@settings(max_examples=50, deadline=None)
@given(st.lists(LOGIT, min_size=2, max_size=5), LOGIT)
def test_probabilities_sum_to_1(classes: list[float], boundary: float) -> None:
    logs = composed(classes, boundary)
    assert logs.isfinite().all()
    assert (logs <= 0).all()
    assert logs.exp().sum().item() == pytest.approx(1, abs=1e-5)
    half = composed(classes, boundary, torch.float16)
    assert half.dtype == torch.float16
    assert half.isfinite().all()
    expected = composed([float(torch.tensor(c).half()) for c in classes], float(torch.tensor(boundary).half()))
    torch.testing.assert_close(half.float(), expected, rtol=2e-3, atol=2e-3)


def test_softmax_of_the_output_is_the_output() -> None:
    torch.manual_seed(0)
    logits = CellSegmenter(2, 3, 4, (4, 6), deep_supervision=True).train()(torch.randn(2, 3, 9, 7))
    for level in logits:
        torch.testing.assert_close(level.softmax(1), level.exp())


@pytest.mark.parametrize("classes", [1, 2])
def test_a_cell_needs_three_classes(classes: int) -> None:
    with pytest.raises(ValueError, match=f"3 out_channels at least .* got {classes}"):
        CellSegmenter(2, 3, classes)


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("dims", "expected"), [(2, 5_696_963), (3, 16_574_467)])
def test_parameters_of_cells_by_hand(dims: int, expected: int) -> None:
    block = 32 * 32 * 3**dims + 32 + 2 * 32
    difference = block + (32 + 1) + (32 * 2 + 2) - (32 * 3 + 3)
    assert count(UNet(dims, 1, 3)) + difference == expected
    assert count(CellSegmenter(dims, 1, 3)) == expected


@pytest.mark.parametrize(("dims", "expected"), [(2, 5_712_418), (3, 16_589_922)])
def test_parameters_of_scenes_by_hand(dims: int, expected: int) -> None:
    projections = (32 + 64 + 128 + 256) * 32 + 4 * 32
    fusion = 32 * 32 * 3**dims + 32 + 2 * 32
    assert count(UNet(dims, 1, 2)) + projections + fusion == expected
    assert count(SatelliteSegmenter(dims, 1, 2)) == expected


@pytest.mark.parametrize("size", [(8, 8), (9, 5), (1, 1), (3, 17), (5, 9, 7)])
@pytest.mark.parametrize("steps", [(1, 2, 2), (1, 2, 3)])
def test_scenes_of_any_size(size: tuple[int, ...], steps: tuple[int, ...]) -> None:
    network = SatelliteSegmenter(len(size), 13, 4, (4, 6, 8), strides=steps, deep_supervision=True)
    x = torch.randn(2, 13, *size)
    highest, lower = network.train()(x)
    assert highest.shape == (2, 4, *size)
    assert lower.shape == (2, 4, *((n + 1) // 2 for n in size))
    assert network.eval()(x).shape == (2, 4, *size)


def test_the_sum_of_all_levels() -> None:
    """Against the parts by hand: projections of the levels of the plain decoder, enlarged and summed."""
    torch.manual_seed(0)
    features: Any = (4, 6, 8)
    network, plain = SatelliteSegmenter(2, 3, 2, features).eval(), UNet(2, 3, 2, features).eval()
    shared = plain.state_dict().keys()
    plain.load_state_dict({name: weight for name, weight in network.state_dict().items() if name in shared})
    x = torch.randn(1, 3, 8, 12)
    with torch.inference_mode():
        high, low = plain.decode(plain.encode(x))
        together = network.projections[0](high)
        together = together + F.interpolate(network.projections[1](low), (8, 12), mode="bilinear")
        torch.testing.assert_close(network(x), network.heads[0](network.fusion(together)))


@pytest.mark.parametrize(("before", "after"), [((3, 4), (6, 4)), ((2, 5), (6, 7)), ((2, 3, 4), (4, 3, 12))])
def test_interpolation_is_the_same_where_it_is_deterministic(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *before, requires_grad=True)
    usual = interpolated(x, after)
    torch.use_deterministic_algorithms(True)
    try:
        exact = interpolated(x, after)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(exact, usual)
    weights = torch.randn_like(usual)
    (first,), (second,) = (torch.autograd.grad((each * weights).sum(), x) for each in (usual, exact))
    torch.testing.assert_close(first, second)
    assert interpolated(x, before) is x
