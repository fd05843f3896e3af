"""Losses over logits and index labels, and their weighting under deep supervision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.losses import DeepSupervisionLoss, DiceLoss
from monai.networks.utils import one_hot
from torch import Tensor, nn


class DiceCrossEntropy(nn.Module):
    """Soft Dice over the foreground plus cross-entropy, both over softmax, with equal weight.

    Logits (N, C, *spatial), labels (N, 1, *spatial) of indices; a scalar comes out, 0 at best. Computed in float32:
    Dice sums overflow in float16.

    Args:
        batch: sum Dice over the whole batch rather than a sample.
        ignore_index: label of voxels that count in neither part.
    """

    def __init__(self, batch: bool = False, ignore_index: int | None = None) -> None:
        super().__init__()
        self.dice = DiceLoss(include_background=False, batch=batch)
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch."""
        logs = torch.log_softmax(logits.float(), dim=1)
        valid = None if self.ignore_index is None else labels != self.ignore_index
        indices = labels if valid is None else torch.where(valid, labels, 0)
        target = one_hot(indices.long(), logs.shape[1])
        probabilities = logs.exp()
        if valid is not None:
            target, probabilities = target * valid, probabilities * valid
        # Not torch's cross_entropy: its backward pass on a GPU is not deterministic for volumes.
        counted = labels.numel() if valid is None else valid.sum().clamp(min=1)  # no voxel counts: a loss of 0
        entropy = -(target * logs).sum() / counted
        dice: Tensor = self.dice(probabilities, target)
        return entropy + dice


LOSSES: dict[str, Callable[..., nn.Module]] = {"dice_ce": DiceCrossEntropy}


def supervision_weights(levels: int) -> list[float]:
    """Weights of the decoder levels, highest resolution first, of sum 1: halved from level to level.

    The coarsest of several levels gets 0, as in nnU-Net.
    """
    weights = [0.5**n for n in range(levels)]
    if levels > 1:
        weights[-1] = 0.0
    return [w / sum(weights) for w in weights]


def build_loss(
    name: str, *, batch: bool, ignore_index: int | None, levels: int
) -> Callable[[Tensor | list[Tensor], Tensor], Tensor]:
    """The loss of a network's output: of one tensor, or of the list of ``levels`` tensors of deep supervision."""
    loss: Any = LOSSES[name](batch=batch, ignore_index=ignore_index)
    result: nn.Module = DeepSupervisionLoss(loss, weights=supervision_weights(levels)) if levels > 1 else loss
    return result
