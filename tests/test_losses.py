"""Losses: worked by hand, and equal to MONAI's where they are comparable; what holds for each of them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceCELoss, FocalLoss, GeneralizedDiceLoss
from monai.losses.cldice import soft_skel
from torch import Tensor

from medseg.errors import PlanError
from medseg.losses import (
    LOSSES,
    Loss,
    build_loss,
    build_target,
    signed_distances,
    soft_skeleton,
    supervision_weights,
    with_distances,
)

NAMES = sorted(LOSSES)


def loss_of(name: str, batch: bool = False, ignore_index: int | None = None) -> Loss:
    return Loss(LOSSES[name], batch, ignore_index)


DiceCrossEntropy = partial(loss_of, "dice_ce")

# Probabilities of the class: 3/4 in the first voxel, 1/2 in the second
LOGITS = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
ENTROPY = -(math.log(0.75) + math.log(0.5)) / 2


def test_dice_and_cross_entropy_by_hand() -> None:
    """The class is in the first voxel: Dice is 2 * 0.75 / (1.25 + 1)."""
    found = DiceCrossEntropy()(LOGITS[None], torch.tensor([[[1, 0]]], dtype=torch.uint8))
    assert found.item() == pytest.approx(ENTROPY + 1 - 1.5 / 2.25, abs=1e-5)


def test_dice_of_a_batch_and_of_its_samples_by_hand() -> None:
    """The same two voxels as two samples: 2 * 0.75 / (0.75 + 1) in the first, no overlap in the second."""
    logits, labels = LOGITS.T[:, :, None], torch.tensor([1, 0])[:, None, None]
    samples = DiceCrossEntropy(batch=False)(logits, labels)
    assert samples.item() == pytest.approx(ENTROPY + ((1 - 1.5 / 1.75) + 1) / 2, abs=1e-4)
    whole = DiceCrossEntropy(batch=True)(logits, labels)
    assert whole.item() == pytest.approx(ENTROPY + 1 - 1.5 / 2.25, abs=1e-5)


def test_voxels_to_ignore_count_in_neither_part() -> None:
    logits = torch.cat([LOGITS, torch.tensor([[7.0, -3.0], [-5.0, 4.0]])], dim=1)[None].requires_grad_()
    loss = DiceCrossEntropy(ignore_index=2)(logits, torch.tensor([[[1, 0, 2, 2]]], dtype=torch.uint8))
    assert loss.item() == pytest.approx(ENTROPY + 1 - 1.5 / 2.25, abs=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad[..., 2:].any()
    assert logits.grad[..., :2].all()


def test_nothing_but_voxels_to_ignore_costs_nothing() -> None:
    logits = torch.randn(1, 2, 3, requires_grad=True)
    loss = DiceCrossEntropy(ignore_index=2)(logits, torch.full((1, 1, 3), 2))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def perfect(labels: Tensor, classes: int) -> Tensor:
    return 50 * torch.nn.functional.one_hot(labels[:, 0].long(), classes).movedim(-1, 1).float() - 25


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("ignore", [None, 3])
def test_a_perfect_prediction_costs_nearly_nothing(batch: bool, ignore: int | None) -> None:
    labels = torch.arange(2 * 4 * 4).reshape(2, 1, 4, 4) % 3
    loss = DiceCrossEntropy(batch=batch, ignore_index=ignore)(perfect(labels, 3), labels)
    assert loss.item() == pytest.approx(0, abs=1e-4)


def test_a_class_that_is_absent_and_not_predicted_costs_nothing() -> None:
    labels = torch.zeros(1, 1, 4, 4)
    assert DiceCrossEntropy()(perfect(labels, 3), labels).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("batch", [False, True])
def test_equal_to_monai(batch: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 4, 3, generator=generator)
    labels = torch.randint(0, 3, (2, 1, 5, 4, 3), generator=generator)
    theirs = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=batch)
    torch.testing.assert_close(DiceCrossEntropy(batch=batch)(logits, labels), theirs(logits, labels))


def test_half_precision_is_summed_in_single() -> None:
    """A million voxels of a class are more than float16 can hold."""
    labels = torch.ones(1, 1, 1000, 1000, dtype=torch.uint8)
    logits = torch.zeros(1, 2, 1000, 1000, dtype=torch.float16)
    assert DiceCrossEntropy()(logits, labels).item() == pytest.approx(math.log(2) + 1 - 1 / 1.5, abs=1e-3)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(8, 8)], [1]),
        ([(8, 8), (4, 4)], [1, 0]),
        ([(8, 8), (8, 4), (8, 2)], [2 / 3, 1 / 3, 0]),
        ([(8, 8), (4, 4), (2, 2), (1, 1)], [4 / 7, 2 / 7, 1 / 7, 0]),
        ([(8, 8), (8, 8), (4, 4)], [2 / 3, 1 / 3, 0]),
        ([(8, 8)] * 4, [1 / 4] * 4),  # of nested U-Nets
    ],
)
def test_weights_of_the_levels(sizes: list[tuple[int, int]], expected: list[float]) -> None:
    assert supervision_weights(sizes) == pytest.approx(expected)


def test_deep_supervision_weighs_each_level_on_labels_of_its_size() -> None:
    loss = build_loss("dice_ce", batch=False, ignore_index=None)
    labels = torch.randint(0, 2, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    levels = [torch.randn(1, 2, n, n, generator=torch.Generator().manual_seed(n)) for n in (8, 4, 2)]
    single = DiceCrossEntropy()
    expected = 2 / 3 * single(levels[0], labels) + 1 / 3 * single(levels[1], labels[..., 1::2, 1::2])
    torch.testing.assert_close(loss(levels, labels), expected)


def test_one_level_is_the_loss_itself_in_a_list_or_not() -> None:
    """A network of two stages gives a list of one."""
    logits, labels = drawn(7, ignore=3)
    expected = DiceCrossEntropy(batch=True, ignore_index=3)(logits, labels)
    loss = build_loss("dice_ce", batch=True, ignore_index=3)
    assert loss(logits, labels) == loss([logits], labels) == expected


def test_levels_of_one_size_weigh_the_same() -> None:
    """As a UNetPlusPlus gives them: the last of them trains its smallest network."""
    (first, labels), (second, _) = drawn(0), drawn(1)
    single = DiceCrossEntropy()
    found = build_loss("dice_ce", batch=False, ignore_index=None)([first, second], labels)
    torch.testing.assert_close(found, (single(first, labels) + single(second, labels)) / 2)


def test_an_unknown_loss_is_refused_and_the_known_are_named() -> None:
    with pytest.raises(PlanError, match=r"plan\.loss: no loss 'mse' \(expected .*tversky"):
        build_loss("mse", batch=False, ignore_index=None)


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (1, 1, 4, 4), (2, 2, 4, 4)])
def test_labels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="labels"):
        loss_of("dice")(torch.zeros(2, 3, 4, 4), torch.zeros(shape))


# ---- each worked by hand ---------------------------------------------------------------------------------------------

# LOGITS with the label (1, 0): p of the class is (3/4, 1/2), of the background (1/4, 1/2)
LABELS = torch.tensor([[[1, 0]]], dtype=torch.uint8)
DICE = 1 - 2 * 0.75 / (1.25 + 1)
FOCAL = -(0.25**2 * math.log(0.75) + 0.5**2 * math.log(0.5)) / 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dice", DICE),
        ("focal", FOCAL),
        ("dice_focal", DICE + FOCAL),
        ("tversky", 1 - 0.75 / (0.75 + 0.3 * 0.5 + 0.7 * 0.25)),
        # both classes have one voxel, so the same weight: 2 (3/4 + 1/2) / ((1.25 + 1) + (0.75 + 1))
        ("generalised_dice", 1 - 2.5 / 4),
        # one against the rest, sigmoid of (0, 0) for the background and of (log 3, 0) for the class: all 1/2 but 3/4
        ("bce_dice", -(math.log(0.75) + 3 * math.log(0.5)) / 4 + DICE),
    ],
)
def test_two_voxels_by_hand(name: str, expected: float) -> None:
    assert loss_of(name)(LOGITS[None], LABELS).item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("dice", DICE), ("focal", FOCAL), ("dice_ce", ENTROPY + DICE), ("bce_dice", ENTROPY + DICE)],
)
def test_one_channel_is_a_sigmoid_by_hand(name: str, expected: float) -> None:
    """sigmoid(log 3) is 3/4."""
    assert loss_of(name)(LOGITS[None, 1:], LABELS).item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"bce_dice"}))
def test_one_channel_is_two_of_which_the_first_is_zero(name: str) -> None:
    logits, labels = drawn(0, classes=2)
    one = (logits[:, 1] - logits[:, 0])[:, None]
    torch.testing.assert_close(loss_of(name)(one, labels), loss_of(name)(logits, labels))


def test_weights_of_generalised_dice_by_hand() -> None:
    """Eight voxels of background, two of the class, p of the class 1/4 everywhere: weights 1/64 and 1/4."""
    labels = torch.tensor([0] * 8 + [1] * 2)[None, None]
    logits = torch.tensor([math.log(3.0), 0.0])[None, :, None].expand(1, 2, 10)
    both = 8 * 0.75 / 64 + 2 * 0.25 / 4
    sizes = (10 * 0.75 + 8) / 64 + (10 * 0.25 + 2) / 4
    assert loss_of("generalised_dice")(logits, labels).item() == pytest.approx(1 - 2 * both / sizes, abs=1e-5)


def test_generalised_dice_of_a_large_patch_is_not_smoothed_away() -> None:
    """Half of a million voxels of background is taken for the class: MONAI's smoothing outweighs such weights."""
    logits = perfect(torch.zeros(1, 1, 1000, 1000), 2)
    logits[..., :500] *= -1
    loss = loss_of("generalised_dice")(logits, torch.zeros(1, 1, 1000, 1000))
    # half of the background is hit; the absent class weighs as much: 2 * 1/2 / (1/2 + 1 + 1/2)
    assert loss.item() == pytest.approx(1 - 1 / 2, abs=1e-3)


@pytest.mark.parametrize("batch", [False, True])
def test_generalised_dice_and_focal_are_monais(batch: bool) -> None:
    logits, labels = drawn(3, shape=(2, 5, 6, 4))
    theirs = GeneralizedDiceLoss(to_onehot_y=True, softmax=True, batch=batch, smooth_nr=0, smooth_dr=0)
    found = loss_of("generalised_dice", batch=batch)(logits, labels)
    torch.testing.assert_close(found, theirs(logits, labels), atol=1e-5, rtol=0)
    focal = FocalLoss(to_onehot_y=True, use_softmax=True)  # the mean over the classes too
    torch.testing.assert_close(loss_of("focal")(logits, labels), 3 * focal(logits, labels))


def test_the_skeleton_of_a_bar_is_its_middle_line() -> None:
    """Three rows of seven: the middle row, without its ends, which an erosion takes away."""
    bar = torch.zeros(1, 1, 7, 11)
    bar[..., 2:5, 2:9] = 1
    line = torch.zeros_like(bar)
    line[..., 3, 3:8] = 1
    assert torch.equal(soft_skeleton(bar), line)


@pytest.mark.parametrize("shape", [(7, 9), (5, 6, 7)])
def test_the_skeleton_is_monais(shape: tuple[int, ...]) -> None:
    masks = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(soft_skeleton(masks), soft_skel(masks, 3))


def test_centreline_dice_by_hand() -> None:
    """A bar of 3 x 7 of which its left four columns are found.

    Skeletons: 5 voxels (columns 3..7) and 2 (columns 3, 4). Of the found one all lies in the bar, of the bar's the 3
    voxels in columns 3..5 lie in what was found. Dice is 2 * 12 / (21 + 12).
    """
    labels = torch.zeros(1, 1, 7, 11)
    labels[..., 2:5, 2:9] = 1
    found = labels.clone()
    found[..., 6:] = 0
    precision, recall = (2 + 1) / (2 + 1), (3 + 1) / (5 + 1)
    expected = 0.5 * (1 - 24 / 33) + 0.5 * (1 - 2 * precision * recall / (precision + recall))
    assert loss_of("cldice")(perfect(found, 2), labels).item() == pytest.approx(expected, abs=1e-5)


def test_centreline_dice_is_the_mean_over_the_classes() -> None:
    """A class that is found and one that is missed: Dice and clDice are the means of 1 and 0 (nearly, of clDice)."""
    labels = torch.zeros(1, 1, 12, 12)
    labels[..., 2:5, 2:11], labels[..., 7:10, 2:11] = 1, 2
    missed = torch.where(labels == 2, 0, labels)
    recall = 1 / (7 + 1)  # of a skeleton of 7 voxels; nothing is found, so nothing wrong
    expected = 0.5 * 0.5 + 0.5 * (1 - 2 * recall / (1 + recall)) / 2
    assert loss_of("cldice")(perfect(missed, 3), labels).item() == pytest.approx(expected, abs=1e-5)


def test_distances_by_hand() -> None:
    """A line of six voxels, one of them to ignore: it bounds nothing and is of no class."""
    labels = torch.tensor([[[[0, 0, 1, 1, 1, 0]]], [[[0, 0, 1, 1, 3, 3]]]], dtype=torch.uint8)
    found = signed_distances(labels, 3, ignore_index=3)[:, :, 0]
    assert found[0].tolist() == [[-1, 0, 1, 2, 1, 0], [2, 1, 0, -1, 0, 1], [0] * 6]
    assert found[1, 1, :4].tolist() == [2, 1, 0, -1]
    assert signed_distances(labels, 4)[1, 1].tolist() == [[2, 1, 0, 0, 1, 2]], "without ignoring it is a class"


def test_distances_of_a_square_by_hand() -> None:
    labels = torch.zeros(1, 1, 5, 5)
    labels[..., 1:4, 1:4] = 1
    root = math.sqrt(2)
    expected = [[root, 1, 1, 1, root], [1, 0, 0, 0, 1], [1, 0, -1, 0, 1], [1, 0, 0, 0, 1], [root, 1, 1, 1, root]]
    torch.testing.assert_close(signed_distances(labels, 2)[0, 1], torch.tensor(expected))


@pytest.mark.parametrize("value", [0, 1, 2])
def test_a_patch_of_one_class_has_no_border(value: int) -> None:
    assert not signed_distances(torch.full((1, 1, 3, 4, 5), value), 2, ignore_index=2).any()


def test_boundary_by_hand() -> None:
    """Four voxels, p of the class 1/4: distances 1, 0, 1, 2 sum to 4."""
    labels = torch.tensor([[[0, 1, 0, 0]]])
    logits = torch.tensor([math.log(3.0), 0.0])[None, :, None].expand(1, 2, 4)
    both, sizes = 3 * 0.75 / 9 + 0.25, (4 * 0.75 + 3) / 9 + (1 + 1)
    expected = 1 - 2 * both / sizes + 0.01 * 0.25 * 4 / 4
    assert loss_of("boundary")(logits, labels).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("ignore", [None, 3])
@pytest.mark.parametrize("classes", [1, 3])
def test_maps_that_came_with_the_labels_are_used(ignore: int | None, classes: int) -> None:
    logits, labels = drawn(1, classes=classes, ignore=ignore)
    loss, target_of = (
        loss_of("boundary", ignore_index=ignore),
        build_target("boundary", classes=classes, ignore_index=ignore),
    )
    assert target_of is not None
    target = target_of(labels)
    assert torch.equal(loss(logits, target), loss(logits, labels))
    target[:, 1:] += 1  # every class now is one voxel farther off
    assert loss(logits, target) > loss(logits, labels)


def test_only_the_boundary_loss_wants_maps() -> None:
    wanting = {name for name in [*NAMES, "unknown"] if build_target(name, classes=2, ignore_index=None)}
    assert wanting == {"boundary"}


def test_maps_are_sampled_with_the_labels_under_deep_supervision() -> None:
    loss = build_loss("boundary", batch=False, ignore_index=None)
    _, labels = drawn(2, shape=(8, 8))
    target = with_distances(labels, 3)
    levels = [torch.randn(2, 3, n, n, generator=torch.Generator().manual_seed(n)) for n in (8, 4, 2)]
    single = loss_of("boundary")
    expected = 2 / 3 * single(levels[0], target) + 1 / 3 * single(levels[1], target[..., 1::2, 1::2])
    torch.testing.assert_close(loss(levels, target), expected)


# ---- what holds for each loss ----------------------------------------------------------------------------------------


def drawn(
    seed: int, classes: int = 3, shape: tuple[int, ...] = (6, 7), ignore: int | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (2, classes, *shape) and labels, a fifth of them to ignore."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, *shape, generator=generator)
    labels = torch.randint(0, max(classes, 2), (2, 1, *shape), generator=generator)
    if ignore is not None:
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = ignore
    return logits, labels.to(torch.uint8)


def gradient(loss: torch.nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, labels)
    assert value.isfinite()
    value.backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    return leaf.grad


@pytest.mark.parametrize("shape", [(6, 7), (4, 5, 6)])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_costs_less_than_a_perfect_prediction(name: str, classes: int, shape: tuple[int, ...]) -> None:
    logits, labels = drawn(0, classes, shape)
    best = perfect(labels, max(classes, 2))[:, -classes:]
    loss = loss_of(name)
    lowest = loss(best, labels).item()
    if name != "boundary":  # its own term is below 0 then
        assert lowest == pytest.approx(0, abs=1e-4)
    assert lowest < loss(logits, labels)
    assert lowest < loss(-best, labels)
    assert gradient(loss, best, labels).abs().max() < 1e-4


@pytest.mark.parametrize("labels", [0, 1, 2, 3], ids=["empty", "whole", "another", "ignored"])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_where_one_label_is_everywhere(name: str, batch: bool, labels: int) -> None:
    loss = loss_of(name, batch=batch, ignore_index=3)
    for scale in (1.0, 1e4):
        logits = scale * drawn(0)[0]
        found = gradient(loss, logits, torch.full((2, 1, 6, 7), labels))
        if labels == 3:
            assert not found.any()
        elif scale == 1:
            assert found.any()


@pytest.mark.parametrize("shape", [(6, 7), (3, 4, 5)])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8)
@given(st.integers(0, 10_000), st.booleans())
def test_voxels_to_ignore_have_no_part(name: str, classes: int, shape: tuple[int, ...], seed: int, batch: bool) -> None:
    """Neither the value nor a gradient knows what was predicted there; elsewhere there are gradients."""
    logits, labels = drawn(seed, classes, shape, ignore=3)
    loss = loss_of(name, batch=batch, ignore_index=3)
    ignored = (labels == 3).expand_as(logits)
    found = gradient(loss, logits, labels)
    assert not found[ignored].any()
    assert found[~ignored].any()
    other = torch.where(ignored, torch.flip(logits, dims=[0]) * 5, logits)
    assert torch.equal(loss(other, labels), loss(logits, labels))


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_samples_does_not_count(name: str, batch: bool) -> None:
    logits, labels = drawn(4, ignore=3)
    loss = loss_of(name, batch=batch, ignore_index=3)
    torch.testing.assert_close(loss(logits.flip(0), labels.flip(0)), loss(logits, labels))


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_is_taken_in_single_precision(name: str) -> None:
    logits, labels = drawn(5)
    assert loss_of(name)(logits.half(), labels).dtype == torch.float32
    torch.testing.assert_close(loss_of(name)(logits.half(), labels), loss_of(name)(logits, labels), atol=1e-2, rtol=0)


@pytest.mark.parametrize("ignore", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_deep_supervision_of_every_loss_takes_the_nearest_labels(name: str, ignore: int | None) -> None:
    loss = build_loss(name, batch=True, ignore_index=ignore)
    _, labels = drawn(6, shape=(8, 8), ignore=ignore)
    levels = [torch.randn(2, 3, n, n, generator=torch.Generator().manual_seed(n)) for n in (8, 4, 2)]
    single = loss_of(name, batch=True, ignore_index=ignore)
    expected = 2 / 3 * single(levels[0], labels) + 1 / 3 * single(levels[1], labels[..., 1::2, 1::2])
    torch.testing.assert_close(loss(levels, labels), expected)
