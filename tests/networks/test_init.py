"""Building a network from a plan."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medseg import networks
from medseg.errors import PlanError
from medseg.networks import ARCHITECTURES, UNet, build_network
from medseg.plan import Configuration, NetworkPlan, TrainingPlan


def configuration(patch: tuple[int, ...] = (8, 8), **network: Any) -> Configuration:
    dims = len(patch)
    plan = {"features": (2, 4), "kernel_sizes": ((3,) * dims,) * 2, "strides": ((1,) * dims, (2,) * dims), **network}
    return Configuration(
        spatial_dims=2 if dims == 2 else 3,
        spacing_mm=(1, 1, 1),
        median_shape=(8, 8, 8),
        patch_size=patch,
        batch_size=2,
        batch_dice=False,
        mirror_axes=(),
        network=NetworkPlan(**plan),
        training=TrainingPlan(),
        estimated_memory_mb=1,
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("patch", [(8, 8), (8, 8, 8)])
def test_every_architecture_does_what_its_siblings_do(name: str, patch: tuple[int, ...]) -> None:
    network = build_network(configuration(patch, name=name), in_channels=3, out_channels=4)
    x = torch.randn(2, 3, *patch)
    levels = network.train()(x)
    assert isinstance(levels, list)
    assert levels[0].shape == (2, 4, *patch)
    odd = torch.randn(1, 3, *(n - 1 for n in patch))
    assert network.eval()(odd).shape == (1, 4, *(n - 1 for n in patch))


def test_all_of_the_plan_arrives() -> None:
    convs = {"convs_per_stage": (1, 3), "decoder_convs": 4}
    form = {"norm": "batch", "act": "relu", "dropout": 0.1, "downsampling": "pool", "deep_supervision": False}
    plan = configuration(features=(3, 5), **convs, **form)
    network = build_network(plan, 1, 2, checkpointing=True)
    assert isinstance(network, UNet)
    assert not network.deep_supervision
    assert network.checkpointing
    assert [len(stage) for stage in network.encoder] == [1, 1 + 3]  # type: ignore[arg-type]
    assert len(network.decoder[0]) == 4  # type: ignore[arg-type]
    assert network.heads[0].weight.shape == (2, 3, 1, 1)
    kinds = {type(module) for module in network.modules()}
    assert {nn.MaxPool2d, nn.BatchNorm2d, nn.ReLU, nn.Dropout2d} <= kinds
    assert not {nn.InstanceNorm2d, nn.LeakyReLU} & kinds


def test_every_architecture_is_a_name_of_the_package() -> None:
    for network in ARCHITECTURES.values():
        assert getattr(networks, network.__name__) is network
        assert network.__name__ in networks.__all__


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (configuration(name="unknown"), "no architecture 'unknown' .expected unet"),
        (configuration(name="cell_segmenter"), "3 out_channels at least"),
        (configuration((2, 2)), "one voxel in the lowest stage"),
        (configuration(strides=((2, 2), (2, 2))), "first stride must be 1"),
        (configuration(kernel_sizes=((2, 2), (3, 3))), "kernels odd"),
    ],
)
def test_an_impossible_plan_is_refused(setup: Configuration, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        build_network(setup, 1, 2)


def test_the_table_of_the_documents_is_true() -> None:
    text = (Path(__file__).parents[2] / "docs" / "networks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| .* \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    assert [(name, kind) for name, kind, *_ in rows] == [(n, a.__name__) for n, a in ARCHITECTURES.items()]
    for name, _, *counts in rows:
        with torch.device("meta"):
            made = [ARCHITECTURES[name](dims, 1, 3, (32, 64, 128, 256, 320)) for dims in (2, 3)]
        assert [f"{sum(p.numel() for p in network.parameters()):,}" for network in made] == counts
