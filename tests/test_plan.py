"""Plan: what its validators refuse, and that it survives JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from medseg.errors import PlanError
from medseg.plan import Configuration, NetworkPlan, Normalisation, Plan, TrainingPlan
from medseg.volume import Labels

NETWORK: dict[str, Any] = {
    "features": (8, 16, 32),
    "kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
}
CONFIGURATION: dict[str, Any] = {
    "spatial_dims": 3,
    "spacing_mm": (2.5, 1.0, 1.0),
    "median_shape": (20, 48, 48),
    "patch_size": (16, 32, 32),
    "batch_size": 2,
    "batch_dice": False,
    "mirror_axes": (0, 1, 2),
    "network": NETWORK,
    "training": TrainingPlan(),
    "estimated_memory_mb": 100.0,
}
PLAN: dict[str, Any] = {
    "dataset": "phantom",
    "fingerprint_digest": "0" * 64,
    "device": "cpu",
    "memory_budget_mb": 1000.0,
    "axes": (2, 1, 0),
    "channels": ("MR",),
    "normalisation": (Normalisation(scheme="zscore"),),
    "labels": Labels(values={"organ": 1}),
    "configurations": {"3d_fullres": CONFIGURATION},
}


def test_a_plan_survives_json(tmp_path: Path) -> None:
    plan = Plan(**PLAN)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(tmp_path / "plan.json").digest() == plan.digest()


def test_divisor_is_the_product_of_the_strides() -> None:
    assert NetworkPlan(**NETWORK).divisor == (2, 4, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": (8, 16)}, "one entry a stage"),
        ({"features": (8,), "kernel_sizes": ((3,),), "strides": ((1,),)}, "two stages at least"),
        ({"convs_per_stage": 0}, "convs_per_stage"),
        ({"convs_per_stage": (2, 2)}, "one entry a stage; got 2"),
        ({"decoder_convs": (2, 2, 2)}, "one entry a decoder stage; got 3"),
        ({"decoder_convs": (2, 0)}, "decoder_convs"),
    ],
)
def test_network_refuses(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        NetworkPlan(**NETWORK | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_size": (16, 32)}, "need 3 positive entries"),
        ({"patch_size": (0, 32, 32)}, "positive"),
        ({"spatial_dims": 2}, "need 2 positive entries"),
        ({"patch_size": (16, 32, 30)}, r"no multiple of \(2, 4, 4\)"),
        ({"mirror_axes": (3,)}, r"0\.\.2"),
        ({"batch_size": 0}, "batch_size"),
        ({"estimated_memory_mb": 0}, "estimated_memory_mb"),
    ],
)
def test_configuration_refuses(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Configuration(**CONFIGURATION | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"axes": (0, 1, 1)}, "axes must order"),
        ({"channels": ("MR", "CT")}, "2 channels need as many normalisations"),
        ({"device": "tpu"}, "device"),
        ({"configurations": {"4d": CONFIGURATION}}, "configurations"),
        ({"region_order": (1,)}, "one integer a region; got .1,"),
        ({"keep_largest": ((1,), (1, 3))}, r"integers \[3\] that no label has"),
        ({"labels": Labels(values={"a": 1}, regions={"r": (1,)}), "region_order": (2,)}, r"integers \[2\]"),
    ],
)
def test_plan_refuses(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Plan(**PLAN | change)


def test_the_known_configuration_and_an_unknown_one() -> None:
    plan = Plan(**PLAN, reasons={"configurations.2d": "Cubes need no slices."})
    assert plan.configuration("3d_fullres").patch_size == (16, 32, 32)
    with pytest.raises(PlanError, match=r"no configuration '2d'. Cubes need no slices. \(expected 3d_fullres\)"):
        plan.configuration("2d")


def test_an_override_reaches_into_a_configuration() -> None:
    plan = Plan(**PLAN).override(["plan.configurations.3d_fullres.patch_size=[8, 16, 16]"])
    assert plan.configuration("3d_fullres").patch_size == (8, 16, 16)
    with pytest.raises(PlanError, match="no multiple"):
        plan.override(["plan.configurations.3d_fullres.patch_size.0=7"])


def test_channels_in_and_out() -> None:
    labels = Labels(values={"core": 1, "oedema": 2}, regions={"whole": (1, 2), "core": (1,), "edge": (2,)})
    plan = Plan(**PLAN | {"labels": labels})
    alone = plan.configuration("3d_fullres")
    second = alone.model_copy(update={"previous": "3d_lowres"})
    assert (plan.outputs, plan.inputs(alone), plan.inputs(second)) == (3, 1, 3)  # a channel a class, beside the image
    assert Plan(**PLAN | {"labels": labels, "region_order": (1, 1, 2)}).outputs == 3
    assert Plan(**PLAN | {"labels": labels, "region_order": (2, 1, 2)}).inputs(second) == 3


def test_the_order_of_regions_survives_json(tmp_path: Path) -> None:
    labels = Labels(values={"a": 1, "b": 2}, regions={"z": (1, 2), "a": (1,)})
    Plan(**PLAN | {"labels": labels, "region_order": (1, 2)}).save(tmp_path / "plan.json")
    assert list(Plan.load(tmp_path / "plan.json").labels.regions) == ["z", "a"]
