"""Losses: worked by hand, and equal to MONAI's where they are comparable."""

from __future__ import annotations

import math

import pytest
import torch
from monai.losses import DiceCELoss
from torch import Tensor

from medseg.losses import LOSSES, DiceCrossEntropy, build_loss, supervision_weights

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
    ("levels", "expected"),
    [(1, [1]), (2, [1, 0]), (3, [2 / 3, 1 / 3, 0]), (4, [4 / 7, 2 / 7, 1 / 7, 0])],
)
def test_weights_of_the_levels(levels: int, expected: list[float]) -> None:
    assert supervision_weights(levels) == pytest.approx(expected)


def test_deep_supervision_weighs_each_level_on_labels_of_its_size() -> None:
    loss = build_loss("dice_ce", batch=False, ignore_index=None, levels=3)
    labels = torch.randint(0, 2, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    levels = [torch.randn(1, 2, n, n, generator=torch.Generator().manual_seed(n)) for n in (8, 4, 2)]
    single = DiceCrossEntropy()
    expected = 2 / 3 * single(levels[0], labels) + 1 / 3 * single(levels[1], labels[..., 1::2, 1::2])
    torch.testing.assert_close(loss(levels, labels), expected)


def test_one_level_is_the_loss_itself() -> None:
    loss = build_loss("dice_ce", batch=True, ignore_index=4, levels=1)
    assert isinstance(loss, LOSSES["dice_ce"])  # type: ignore[arg-type]
