"""Nested skips: every depth is a network of its own, a parameter count by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg.networks import UNet, UNetPlusPlus


def nested(dims: int = 2, **more: Any) -> UNetPlusPlus:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"features": (2, 4, 6, 8), "deep_supervision": True, **more}
    return UNetPlusPlus(dims, 1, 3, **arguments)


@pytest.mark.parametrize(("dims", "size"), [(2, (16, 24)), (2, (13, 7)), (3, (9, 8, 5))])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_pruned_to_a_depth_is_the_head_of_that_depth(dims: int, size: tuple[int, ...], norm: str) -> None:
    network = nested(dims, norm=norm)
    x = torch.randn(2, 1, *size)
    network.train()(x)  # running means
    for child in network.children():
        child.eval()  # all heads, and norms as in evaluation
    with torch.inference_mode():
        levels = network(x)
        sizes = []
        for depth in (1, 2, 3):
            pruned = network.pruned(depth).eval()
            logits = pruned(x)
            assert logits.shape == (2, 3, *size)
            assert torch.equal(logits, levels[3 - depth])
            sizes.append(sum(p.numel() for p in pruned.parameters()))
    whole = sum(p.numel() for p in network.parameters())
    assert sizes[0] < sizes[1] < sizes[2] == whole - 2 * (2 * 3 + 3)  # the other two heads
    assert len(network.encoder) == 4  # as it was


def test_depths_without_a_head_are_refused() -> None:
    for depth in (0, 4):
        with pytest.raises(ValueError, match=rf"no head at depth {depth}; there are \[1, 2, 3\]"):
            nested().pruned(depth)
    single = nested(deep_supervision=False)
    with pytest.raises(ValueError, match=r"there are \[3\]"):
        single.pruned(2)
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(single.pruned(3).eval()(x), single.eval()(x))
    with pytest.raises(ValueError, match=r"there are \[2\]"):
        nested().pruned(2).pruned(1)


def test_all_logits_have_the_size_of_the_input_deepest_first() -> None:
    network = nested().train()
    levels = network(torch.randn(1, 1, 11, 8))
    assert [tuple(level.shape) for level in levels] == [(1, 3, 11, 8)] * 3
    levels[2].sum().backward()  # that of depth 1
    learning = {name.split(".")[1] for name, p in network.encoder.named_parameters("encoder") if p.grad is not None}
    assert learning == {"0", "1"}
    assert network.heads[0].weight.grad is None


def test_a_single_node_is_a_unet() -> None:
    one, plain = nested(features=(2, 4)).eval(), UNet(2, 1, 3, (2, 4)).eval()
    nodes = {"upsample.0.0.": "upsample.0.", "decoder.0.0.": "decoder.0."}
    for theirs, ours in nodes.items():
        state = {name.replace(theirs, ours, 1): weight for name, weight in one.state_dict().items()}
        plain.load_state_dict({n: w for n, w in state.items() if n in plain.state_dict()}, strict=False)
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(one(x), plain(x))


def test_a_node_takes_all_to_its_left() -> None:
    """Beside what comes from below, node (i, j) has j times its level's features."""
    inputs = [[node[0].conv.in_channels for node in column] for column in nested().decoder]  # type: ignore[union-attr]
    assert inputs == [[2 * 2, 2 * 4, 2 * 6], [3 * 2, 3 * 4], [4 * 2]]


def test_the_number_of_parameters_by_hand() -> None:
    # features 2, 4, 6 in 2D; a block has in x out x 9 + 3 out (bias, scale and shift)
    def stage(inputs: int, outputs: int) -> int:
        return inputs * outputs * 9 + 3 * outputs + outputs * outputs * 9 + 3 * outputs

    encoder = stage(1, 2) + stage(2, 4) + stage(4, 6)
    first = 4 * 2 * 4 + 2 + stage(4, 2) + 6 * 4 * 4 + 4 + stage(8, 4)  # nodes (0, 1) and (1, 1)
    second = 4 * 2 * 4 + 2 + stage(6, 2)  # node (0, 2)
    head = 2 * 3 + 3
    assert encoder + first + second + head == 1791
    network = nested(features=(2, 4, 6), deep_supervision=False)
    assert sum(p.numel() for p in network.parameters()) == 1791
    assert isinstance(network.heads[0], nn.Conv2d)
