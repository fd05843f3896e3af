"""Planning: nnU-Net's published plans as golden rows, the recipe of a CPU, and settings by hand."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.dataset import Dataset
from medseg.errors import PlanError
from medseg.fingerprint import CaseMeasures, Fingerprint, Intensities, measure
from medseg.plan import Configuration, Plan, TrainingPlan
from medseg.planning import PROFILES, Topology, feature_values, make_plan, override_plan, topology
from medseg.volume import Labels

DATA = os.environ.get("MEDSEG_TEST_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="MEDSEG_TEST_DATA is not set")
ONES = Intensities(
    mean=90, median=80, std=40, minimum=-50, maximum=400, percentile_00_5=-20, percentile_99_5=200
)  # fmt: skip
Triple = tuple[float, float, float]


def case(spacing: Triple, shape: tuple[int, int, int], number: int = 0, relative: float = 1.0) -> CaseMeasures:
    """A case from its spacing and shape in the order head, front, right (slowest first)."""
    k, j, i = shape
    return CaseMeasures(
        id=str(number), shape=(i, j, k), spacing_mm=spacing[::-1], cropped_shape=(i, j, k), relative_size=relative
    )


def fingerprint(cases: list[CaseMeasures], mirror: Triple = (1, 1, 1), channels: int = 1) -> Fingerprint:
    return Fingerprint(
        dataset_digest="",
        cases=tuple(cases),
        intensities=(ONES,) * channels,
        classes={},
        empty_cases=0,
        mirror_agreement=mirror,
    )


def labels(count: int) -> Labels:
    return Labels(values={f"class {n}": n for n in range(1, count + 1)})


def plan(spacing: Triple, shape: tuple[int, int, int], count: int, classes: int = 2, **options: Any) -> Plan:
    found = fingerprint([case(spacing, shape, n) for n in range(count)])
    return make_plan(found, "Test", ["MRI"], labels(classes), **options)


# ---- golden rows: known nnU-Net plans (its documentation, its planner run on these shapes) ---------------------------

GOLDEN = {
    "Hippocampus": ((1, 1, 1), (36, 50, 35), 260, 2, (40, 56, 40), 9, (56, 40), 366),
    "Spleen": ((1.6, 0.793, 0.793), (187, 512, 512), 41, 1, (64, 192, 160), 2, (512, 512), 12),
    "Heart": ((1.37, 1.25, 1.25), (115, 320, 232), 20, 1, (80, 192, 160), 2, (320, 256), 40),
    "Prostate": ((3.6, 0.62, 0.62), (20, 320, 319), 32, 2, (20, 320, 256), 2, (320, 320), 32),
    "BrainTumour": ((1, 1, 1), (138, 169, 138), 484, 3, (128, 128, 128), 2, (192, 160), 105),
    "Liver": ((1, 0.768, 0.768), (482, 512, 512), 131, 2, (128, 128, 128), 2, (512, 512), 12),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_rows(name: str) -> None:
    spacing, shape, count, classes, patch_3d, batch_3d, patch_2d, batch_2d = GOLDEN[name]
    made = plan(spacing, shape, count, classes)  # type: ignore[arg-type]
    full, flat = made.configurations["3d_fullres"], made.configurations["2d"]
    assert (full.patch_size, full.batch_size) == (patch_3d, batch_3d)
    assert (flat.patch_size, flat.batch_size) == (patch_2d, batch_2d)
    assert made.axes == (2, 1, 0)
    assert full.spacing_mm == spacing
    assert flat.spacing_mm == (None, *spacing[1:])
    assert full.median_shape == shape


def test_golden_topologies() -> None:
    spleen = plan(*GOLDEN["Spleen"][:4]).configurations["3d_fullres"].network  # type: ignore[arg-type]
    assert spleen.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    assert spleen.kernel_sizes == ((1, 3, 3), *[(3, 3, 3)] * 5)
    assert spleen.features == (32, 64, 128, 256, 320, 320)
    hippocampus = plan(*GOLDEN["Hippocampus"][:4]).configurations["3d_fullres"].network  # type: ignore[arg-type]
    assert hippocampus.strides == ((1, 1, 1), *[(2, 2, 2)] * 3)
    assert hippocampus.features == (32, 64, 128, 256)


def test_golden_estimates() -> None:
    # compute_conv_feature_map_size of nnU-Net's PlainConvUNet without deep supervision, as its planner calls it
    small = topology((1, 1, 1), (36, 50, 35))
    assert feature_values(small, (32, 64, 128, 256), 2, 3) == 19_174_400
    flat = topology((0.9015767817125446, 0.35878525186017474), (192, 384))
    assert flat.strides == ((1, 1), (1, 2), *[(2, 2)] * 5)
    assert feature_values(flat, (32, 64, 128, 256, 512, 512, 512), 2, 3) == 34_541_568
    large = topology((1.6, 0.793, 0.793), (64, 192, 160))
    assert feature_values(large, (32, 64, 128, 256, 320, 320), 2, 2) == 526_556_160


def test_golden_estimates_of_residual_encoders() -> None:
    # the same of ResidualEncoderUNet
    small = topology((1, 1, 1), (40, 56, 40))
    assert feature_values(small, (32, 64, 128, 256), (1, 3, 4, 6), 3, 1, "residual_unet") == 23_609_600
    large = topology((1, 1, 1), (128, 128, 128))
    features, blocks = (32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6)
    assert feature_values(large, features, blocks, 2, 1, "residual_unet") == 555_323_392


def test_estimates_by_hand() -> None:
    # 16 x 8 pixels, features 2, 4 and 6 at steps of 2: 128, 32 and 8 voxels, maps of 256, 128 and 48 numbers
    shape = Topology((16, 8), ((1, 1), (2, 2), (2, 2)), ((3, 3),) * 3)

    def values(name: str, convs: int | tuple[int, ...] = 2, decoder_convs: int | tuple[int, ...] = 2) -> float:
        return feature_values(shape, (2, 4, 6), convs, 3, decoder_convs, name)

    plain = 2 * (256 + 128 + 48) + 3 * (256 + 128) + 3 * 128
    assert values("unet") == values("a network of one's own") == plain == 2400
    assert values("unet", (1, 2, 3), 1) == 256 + 2 * 128 + 3 * 48 + 2 * (256 + 128) + 3 * 128
    assert values("unet", 2, (3, 1)) == 2 * (256 + 128 + 48) + 4 * 256 + 2 * 128 + 3 * 128
    assert values("unet_plus_plus", 2, (3, 1)) == 2 * (256 + 128 + 48) + 4 * 256 + 2 * 128 + 5 * 256 + 3 * 128
    # a stem; two convolutions a block; a shortcut where a stage begins, but for the first
    assert values("residual_unet", (1, 3, 4), 1) == 256 + 2 * 256 + 7 * 128 + 9 * 48 + 2 * (256 + 128) + 3 * 128
    # on the grid below theta, phi and psi (1 + 1 + 1 and 2 + 2 + 1 a voxel); here the attention and the gated skip
    assert values("attention_unet") == plain + 32 * 3 + 128 + 256 + 8 * 5 + 32 + 128
    # nodes (0, 1) and (1, 1), and (0, 2), which keeps a copy of one map more
    assert values("unet_plus_plus") == 2 * (256 + 128 + 48) + 3 * (256 + 128) + 4 * 256 + 3 * 128
    assert values("cell_segmenter") == plain + 256 + 3 * 128
    # 2 features of both levels, their sum, and its convolution
    assert values("satellite_segmenter") == plain + 2 * (128 + 32) + 2 * 256


def test_low_resolution_trigger() -> None:
    liver = plan(*GOLDEN["Liver"][:4])  # type: ignore[arg-type]
    low = liver.configurations["3d_lowres"]
    assert liver.configurations["3d_fullres"].batch_dice
    assert not low.batch_dice
    assert math.prod(low.patch_size) / math.prod(low.median_shape) >= 0.25
    assert low.spacing_mm[0] == pytest.approx(1.03 ** round(math.log(low.spacing_mm[0] or 0, 1.03)))
    assert "1.7%" in liver.reasons["configurations.3d_lowres"]  # 128^3 of 482x512x512
    spleen = plan(*GOLDEN["Spleen"][:4]).configurations["3d_lowres"]  # type: ignore[arg-type]
    assert (spleen.patch_size, spleen.batch_size) == ((64, 192, 192), 2)
    assert spleen.spacing_mm == pytest.approx((2.7239, 1.3905, 1.3905), abs=1e-4)
    small = plan(*GOLDEN["Hippocampus"][:4])  # type: ignore[arg-type]
    assert "3d_lowres" not in small.configurations
    assert not small.configurations["3d_fullres"].batch_dice
    assert small.reasons["configurations.3d_lowres"].startswith("Not made")
    # 128^3 of 210^3 is 23 %, but a grid on which it is 25 % has hardly fewer voxels
    assert "3d_lowres" not in plan((1, 1, 1), (210, 210, 210), 50).configurations


@needs_data
def test_task04_as_nnunet_plans_it() -> None:
    dataset = Dataset.open(Path(DATA) / "Task04_Hippocampus")
    found = measure(dataset)
    made = make_plan(found, dataset.name, dataset.channels, dataset.labels)
    full, flat = made.configurations["3d_fullres"], made.configurations["2d"]
    assert (full.patch_size, full.batch_size) == ((40, 56, 40), 7)  # 5 % of 200 cases
    assert (flat.patch_size, flat.batch_size) == ((56, 40), 287)
    assert made.normalisation[0].scheme == "zscore"
    assert not made.normalisation[0].nonzero_only
    assert full.mirror_axes == (2,)  # left-right only
    assert flat.mirror_axes == (1,)
    cpu = make_plan(found, dataset.name, dataset.channels, dataset.labels, device="cpu").configurations["3d_fullres"]
    assert (cpu.patch_size, cpu.batch_size, cpu.network.features) == ((40, 56, 40), 2, (16, 32, 64, 128))


# ---- single rules ----------------------------------------------------------------------------------------------------


def test_thick_slices_take_the_tenth_percentile() -> None:
    distances = [3.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0]  # the 10th percentile of 11 is the second: 5
    cases = [case((d, 0.8, 0.8), (60, 512, 512), n) for n, d in enumerate(distances)]
    assert make_plan(fingerprint(cases), "T", ["CT"], labels(1)).configurations["3d_fullres"].spacing_mm[0] == 5.0
    thin = [case((d, 0.8, 0.8), (60, 512, 512), n) for n, d in enumerate([2.0, 2.0, *distances[2:]])]
    assert make_plan(fingerprint(thin), "T", ["CT"], labels(1)).configurations["3d_fullres"].spacing_mm[0] == 2.0
    fine = [case((d, 0.8, 0.8), (60, 512, 512), n) for n, d in enumerate([0.5, 0.5, *distances[2:]])]
    made = make_plan(fingerprint(fine), "T", ["CT"], labels(1))
    assert made.configurations["3d_fullres"].spacing_mm[0] == pytest.approx(0.80001)
    assert "10th percentile" in made.reasons["configurations.3d_fullres.spacing_mm"]


def test_the_axis_of_largest_spacing_comes_first() -> None:
    # sagittal slices: 4 mm from left to right
    made = plan((1.0, 1.0, 4.0), (200, 220, 30), 10)
    assert made.axes == (0, 2, 1)  # right, head, front
    full = made.configurations["3d_fullres"]
    assert full.spacing_mm == (4.0, 1.0, 1.0)
    assert full.median_shape == (30, 200, 220)
    assert full.network.strides[1] == (1, 2, 2)
    assert made.configurations["2d"].median_shape == (30, 200, 220)


def test_mirrored_axes_follow_the_agreement() -> None:
    cases = [case((1, 1, 1), (36, 50, 35), n) for n in range(20)]
    made = make_plan(fingerprint(cases, (0.41, 0.001, 0.04)), "T", ["MRI"], labels(2))
    assert made.configurations["3d_fullres"].mirror_axes == (2,)
    assert made.configurations["2d"].mirror_axes == (1,)
    assert "left-right 0.41, mirrored" in made.reasons["configurations.3d_fullres.mirror_axes"]
    assert "back-front 0.001, not mirrored" in made.reasons["configurations.3d_fullres.mirror_axes"]


def test_normalisation_by_channel_name() -> None:
    cases = [case((1, 1, 1), (36, 50, 35), n, relative=0.5) for n in range(4)]
    names = ["ct", "noNorm", "rescale_to_0_1", "rgb_to_0_1", "T1", "Reflectance"]
    plan = make_plan(fingerprint(cases, channels=6), "T", names, labels(1))
    made = plan.normalisation
    assert [n.scheme for n in made] == ["ct", "none", "minmax", "rgb", "zscore", "ct"]
    assert "'Reflectance' has a unit that means the same in every image" in plan.reasons["normalisation.5"]
    assert (made[0].lower, made[0].upper, made[0].mean, made[0].std) == (-20, 200, 90, 40)
    assert made[4].nonzero_only  # half of the image is 0 all round; from 0.75 on it would not be
    with pytest.raises(PlanError, match="1 names"):
        make_plan(fingerprint(cases, channels=5), "T", ["CT"], labels(1))


def test_pictures_have_no_3d() -> None:
    made = plan((0.3, 1, 1), (1, 300, 400), 30)
    assert list(made.configurations) == ["2d"]
    assert made.axes == (2, 1, 0)
    assert "one slice" in made.reasons["configurations.3d_fullres"]
    with pytest.raises(PlanError, match="one slice"):
        made.configuration("3d_fullres")


def test_budget_scales_patch_and_batch() -> None:
    spleen: Any = GOLDEN["Spleen"][:4]
    assert math.prod(plan(*spleen, memory_budget_mb=24_000).configurations["3d_fullres"].patch_size) > 64 * 192 * 160
    half = plan(*spleen, memory_budget_mb=4096).configurations["3d_fullres"]
    assert math.prod(half.patch_size) < 64 * 192 * 160
    assert half.estimated_memory_mb <= 4096
    full = plan(*spleen).configurations["3d_fullres"]
    assert full.estimated_memory_mb == pytest.approx(526_556_160 / 5.6e8 * 8192)
    with pytest.raises(PlanError, match=r"memory_budget_mb: 0.1 MB .expected .* MB at least"):
        plan(*spleen, memory_budget_mb=0.1)
    with pytest.raises(PlanError, match="more than 0"):
        plan(*spleen, memory_budget_mb=-1)


def test_a_cpu_gets_the_other_recipe() -> None:
    liver: Any = GOLDEN["Liver"][:4]
    profile = PROFILES["cpu"]
    made = plan(*liver, device="cpu")
    for name, configuration in made.configurations.items():
        assert configuration.training == profile.training
        voxels = configuration.batch_size * math.prod(configuration.patch_size)
        assert configuration.batch_size == 2 or voxels <= 1.25 * (profile.batch_voxels or 0)
        assert configuration.network.features[0] == profile.base_features
        assert not configuration.network.deep_supervision
        assert math.prod(configuration.patch_size) <= (profile.patch_voxels or 0)
        assert "nnU-Net's rule" in made.reasons[f"configurations.{name}.batch_size"]
    assert "128x128x128" in made.reasons["configurations.3d_fullres.patch_size"]  # what a GPU would get
    assert "32, 64, 128, 256, 320, 320" in made.reasons["configurations.3d_fullres.network.features"]
    assert plan(*liver).configurations["2d"].training == TrainingPlan()


# ---- settings by hand ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hippocampus() -> Plan:
    return plan(*GOLDEN["Hippocampus"][:4])  # type: ignore[arg-type]


def test_short_and_whole_names(hippocampus: Plan) -> None:
    made, messages = override_plan(
        hippocampus,
        [
            "plan.batch_size=4",
            "plan.learning_rate=0.001",
            "plan.optimiser=adamw",
            "plan.deep_supervision=false",
            "plan.network.convs_per_stage=3",
            "plan.configurations.2d.batch_size=16",
            "plan.normalisation.0.nonzero_only=true",
            "plan.resampling.image=1",
        ],
        "3d_fullres",
    )
    full = made.configurations["3d_fullres"]
    assert (full.batch_size, full.training.learning_rate, full.training.optimiser) == (4, 0.001, "adamw")
    assert (full.network.deep_supervision, full.network.convs_per_stage) == (False, 3)
    assert (made.configurations["2d"].batch_size, made.normalisation[0].nonzero_only, made.resampling.image) == (
        16, True, 1,
    )  # fmt: skip
    assert messages == []
    assert made.reasons["configurations.3d_fullres.batch_size"].startswith("Set by hand to 4. By rule: 8192 MB")
    assert full.estimated_memory_mb < hippocampus.configurations["3d_fullres"].estimated_memory_mb
    assert hippocampus.configurations["3d_fullres"].batch_size == 9  # untouched
    assert override_plan(hippocampus, [], "2d") == (hippocampus, [])


def test_topology_follows_the_patch(hippocampus: Plan) -> None:
    made, messages = override_plan(hippocampus, ["plan.patch_size=[64,64,16]"], "3d_fullres")
    full = made.configurations["3d_fullres"]
    assert messages == []
    assert full.patch_size == (64, 64, 16)
    # 64 halves four times to 4; 16 twice
    assert full.network.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 1), (2, 2, 1))
    assert full.network.features == (32, 64, 128, 256, 320)
    assert len(full.network.kernel_sizes) == 5
    assert made.reasons["configurations.3d_fullres.network.strides"].startswith("Follows from what was set by hand")


def test_a_patch_is_rounded_up(hippocampus: Plan) -> None:
    made, messages = override_plan(hippocampus, ["plan.patch_size=[37,50,35]"], "3d_fullres")
    assert made.configurations["3d_fullres"].patch_size == (40, 56, 40)
    assert messages == ["3d_fullres: patch_size 37x50x35 was rounded up to 40x56x40, a multiple of 8x8x8"]
    made, messages = override_plan(
        hippocampus, ["plan.patch_size=[37,50,35]", "plan.strides=[[1,1,1],[2,2,2]]"], "3d_fullres"
    )
    full = made.configurations["3d_fullres"]
    assert full.patch_size == (38, 50, 36)
    assert (full.network.features, len(full.network.kernel_sizes)) == ((32, 64), 2)
    assert len(messages) == 1


def test_spacing_by_hand(hippocampus: Plan) -> None:
    made, _ = override_plan(hippocampus, ["plan.spacing_mm=[4,1,1]"], "3d_fullres")
    full = made.configurations["3d_fullres"]
    assert full.median_shape == (9, 50, 35)
    assert full.network.strides[1] == (1, 2, 2)
    assert full.network.kernel_sizes[0] == (1, 3, 3)


@pytest.mark.parametrize("setting", ["plan.network.name=residual_unet", 'plan.name="residual_unet"'])
def test_a_residual_network_gets_the_blocks_of_resenc(hippocampus: Plan, setting: str) -> None:
    made, messages = override_plan(hippocampus, [setting], "3d_fullres")
    full = made.configurations["3d_fullres"]
    assert (full.network.name, full.network.convs_per_stage, full.network.decoder_convs) == (
        "residual_unet", (1, 3, 4, 6), 1,
    )  # fmt: skip
    assert made.reasons["configurations.3d_fullres.network.convs_per_stage"].startswith("Follows from what was set")
    # 9 patches, on the scale of the ResEnc planner
    assert full.estimated_memory_mb == pytest.approx(9 * 23_609_600 / 2 / 6.8e8 * 8192)
    assert messages == []
    more, _ = override_plan(made, ["plan.patch_size=[64,64,64]"], "3d_fullres")  # a stage more
    assert more.configurations["3d_fullres"].network.convs_per_stage == (1, 3, 4, 6, 6)
    back, _ = override_plan(more, ["plan.network.name=unet"], "3d_fullres")
    network = back.configurations["3d_fullres"].network
    assert (network.name, network.convs_per_stage, network.decoder_convs) == ("unet", 2, 2)


def test_convolutions_set_by_hand_stay(hippocampus: Plan) -> None:
    settings = ["plan.network.name=residual_unet", "plan.convs_per_stage=[1,1,2,2]", "plan.decoder_convs=3"]
    network = override_plan(hippocampus, settings, "2d")[0].configurations["2d"].network
    assert network.convs_per_stage == (1, 1, 2, 2)
    assert network.decoder_convs == 3
    assert override_plan(hippocampus, settings, "2d")[0].configurations["3d_fullres"].network.name == "unet"
    with pytest.raises(PlanError, match="one entry a stage"):
        override_plan(hippocampus, ["plan.convs_per_stage=[2,2]"], "3d_fullres")


def test_any_architecture_can_be_chosen(hippocampus: Plan) -> None:
    before = hippocampus.configurations["2d"]
    made, _ = override_plan(hippocampus, ["plan.network.name=attention_unet"], "2d")
    after = made.configurations["2d"]
    assert after.network == before.network.model_copy(update={"name": "attention_unet"})
    assert before.estimated_memory_mb < after.estimated_memory_mb < 1.3 * before.estimated_memory_mb
    assert "configurations.2d.network.convs_per_stage" not in made.reasons  # as before
    assert made.reasons["configurations.2d.network.name"].startswith(
        "Set by hand to attention_unet. By rule: nnU-Net's"
    )


def test_over_budget_is_said(hippocampus: Plan) -> None:
    _, messages = override_plan(hippocampus, ["plan.batch_size=100"], "3d_fullres")
    assert messages[0].startswith("3d_fullres: estimated at 140")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("plan.patch=[1]", r"no field 'patch' .expected .*batch_size.*patch_size.*warmup"),
        ("plan.training.speed=3", "no field 'speed'"),
        ("plan.configurations.4d.batch_size=3", "no configuration '4d'.*2d or 3d_fullres"),
        ("plan.configurations=3", "cannot be set by hand"),
        ("plan.memory_budget_mb=4", "choose it when planning"),
        ("plan.batch_size", "not a setting"),
        ("batch_size=4", "not a setting"),
        ("plan.batch_size=0", "greater than 0"),
        ("plan.batch_size=2.5", "integer"),
        ("plan.batch_size=many", "integer"),
        ("plan.optimiser=magic", "sgd"),
        ("plan.patch_size=[8,8]", "3 positive"),
        ("plan.patch_size=[8,8,0]", "3 positive"),
        ("plan.patch_size=big", "plan.patch_size"),
        ("plan.strides=[]", "3 positive"),
        ("plan.spacing_mm=[0,1,1]", "positive lengths"),
        ("plan.mirror_axes=[3]", "mirror_axes"),
        ("plan.features=[8]", "one entry a stage"),
    ],
)
def test_impossible_settings(hippocampus: Plan, setting: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        override_plan(hippocampus, [setting], "3d_fullres")


# ---- properties ------------------------------------------------------------------------------------------------------

SPACING = st.tuples(*[st.floats(0.05, 10)] * 3)
SHAPE = st.tuples(*[st.integers(1, 400)] * 3)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(SPACING, SHAPE, st.floats(0.01, 1)), min_size=1, max_size=6),
    st.integers(1, 8),
    st.tuples(*[st.floats(0, 1)] * 3),
    st.sampled_from(["cpu", "gpu"]),
    st.sampled_from([1024.0, 8192.0]),
)
def test_every_plan_is_valid_and_explained(
    sizes: list[tuple[Triple, tuple[int, int, int], float]], classes: int, mirror: Triple, device: Any, budget: float
) -> None:
    cases = [case(spacing, shape, n, relative) for n, (spacing, shape, relative) in enumerate(sizes)]
    made = make_plan(
        fingerprint(cases, mirror, 2), "T", ["CT", "T1"], labels(classes), device=device, memory_budget_mb=budget
    )
    assert Plan.model_validate(made.model_dump()) == made
    for name in ("2d", "3d_fullres", "3d_lowres"):
        if name not in made.configurations:
            assert made.reasons[f"configurations.{name}"].startswith("Not made")
    for name, configuration in made.configurations.items():
        divisor = configuration.network.divisor
        assert all(p % d == 0 for p, d in zip(configuration.patch_size, divisor, strict=True))
        assert len(configuration.network.strides) > 1
        decided = (set(Configuration.model_fields) - {"spatial_dims", "network", "previous"}) | {
            f"network.{field}" for field in ("name", "features", "kernel_sizes", "strides", "deep_supervision")
        }
        assert {f"configurations.{name}.{field}" for field in decided} <= set(made.reasons)
    assert {"axes", "orientation", "resampling", "normalisation.0", "normalisation.1"} <= set(made.reasons)
    assert all(len(reason) > 10 for reason in made.reasons.values())
