"""Building a network from a plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
    network = build_network(configuration(features=(3, 5), convs_per_stage=3, deep_supervision=False), 1, 2)
    assert isinstance(network, UNet)
    assert not network.deep_supervision
    assert [len(stage) for stage in network.encoder] == [3, 3]  # type: ignore[arg-type]
    assert network.heads[0].weight.shape == (2, 3, 1, 1)


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (configuration(name="unknown"), "no architecture 'unknown' .expected unet"),
        (configuration((2, 2)), "one voxel in the lowest stage"),
        (configuration(strides=((2, 2), (2, 2))), "first stride must be 1"),
        (configuration(kernel_sizes=((2, 2), (3, 3))), "kernels odd"),
    ],
)
def test_an_impossible_plan_is_refused(setup: Configuration, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        build_network(setup, 1, 2)
