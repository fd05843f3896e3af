"""Attention gates: their formula, their maps, a parameter count by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from medseg.networks import AttentionUNet, UNet
from medseg.networks.attention_unet import AttentionGate
from medseg.networks.blocks import Stage


@pytest.mark.parametrize(
    ("size", "strides"),
    [
        ((16, 16), (1, 2, 2)),
        ((13, 7), (1, 2, (1, 2))),
        ((5, 9, 11), (1, (1, 2, 2), (3, 2, 2))),
        ((1, 1, 1), (1, 2, 2)),
    ],
)
def test_maps_have_the_size_of_the_input(size: tuple[int, ...], strides: tuple[int, ...]) -> None:
    network = AttentionUNet(len(size), 2, 3, (4, 6, 8), strides=strides)
    maps = network.attention_maps(torch.randn(2, 2, *size))
    assert [tuple(each.shape) for each in maps] == [(2, 1, *size)] * 2
    assert all(0 <= each.min() <= each.max() <= 1 for each in maps)


def test_maps_are_what_the_skips_are_weighted_by() -> None:
    torch.manual_seed(0)
    network = AttentionUNet(2, 1, 2, (4, 6, 8)).eval()
    seen = []
    for gate in network.gates:
        gate.register_forward_hook(lambda _, arguments, result: seen.append(result / arguments[0]))
    x = torch.randn(1, 1, 16, 16)
    network(x)
    lower, highest = seen  # the decoder begins at the bottom
    maps = network.attention_maps(x)
    torch.testing.assert_close(highest, maps[0].expand_as(highest), rtol=1e-3, atol=1e-4)
    enlarged = F.interpolate(lower[:, :1], scale_factor=2, mode="bilinear")
    torch.testing.assert_close(enlarged, maps[1], rtol=1e-3, atol=1e-4)


def test_the_formula_by_hand() -> None:
    """On the grid below: sigmoid(psi relu(theta x + phi g)), theta over the two pixels of a step."""
    gate = AttentionGate(Stage(2, (3, 3), (1, 1), 1), Stage(1, (3, 3), (1, 2), 1))
    with torch.no_grad():
        gate.theta.weight.copy_(torch.tensor([[[[1.0, 2.0]], [[0.0, -1.0]]]]))
        gate.phi.weight.fill_(3), gate.phi.bias.fill_(-1)
        gate.psi.weight.fill_(0.5), gate.psi.bias.fill_(-2)
    skip = torch.tensor([[[[1.0, 2.0]], [[5.0, 1.0]]]])
    # theta: 1 + 2 x 2 - 1 = 4; phi: 3 x 1 - 1 = 2; psi: 6 / 2 - 2 = 1
    expected = torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(gate(skip, torch.ones(1, 1, 1, 1)), skip * expected)
    # phi: 3 x -9 - 1 = -28, so that relu gives 0: psi: -2
    torch.testing.assert_close(gate(skip, torch.full((1, 1, 1, 1), -9.0)), skip * torch.sigmoid(torch.tensor(-2.0)))


def test_a_closed_gate_keeps_the_skip_out() -> None:
    torch.manual_seed(0)
    network = AttentionUNet(2, 1, 2, (4, 6)).eval()
    plain = UNet(2, 1, 2, (4, 6)).eval()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("gates")})
    x = torch.randn(1, 1, 8, 8)
    with torch.inference_mode():
        network.gates[0].psi.weight.zero_()  # type: ignore[union-attr,operator]
        network.gates[0].psi.bias.fill_(99)  # type: ignore[union-attr,operator]
        torch.testing.assert_close(network(x), plain(x))
        network.gates[0].psi.bias.fill_(-99)  # type: ignore[union-attr,operator]
        plain.decoder[0][0].conv.weight[:, 4:] = 0  # type: ignore[index,union-attr,operator]
        torch.testing.assert_close(network(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dims", "expected"), [(2, 5_924_646), (3, 16_957_798)])
def test_the_number_of_parameters_by_hand(dims: int, expected: int) -> None:
    features = (32, 64, 128, 256, 320)
    total = sum(p.numel() for p in UNet(dims, 1, 2, features).parameters())
    for high, low in itertools.pairwise(features):
        theta, phi, psi = high * high // 2 * 2**dims, low * high // 2 + high // 2, high // 2 + 1
        total += theta + phi + psi
    assert total == expected
    assert sum(p.numel() for p in AttentionUNet(dims, 1, 2, features).parameters()) == expected
