"""Losses over logits and index labels, each a weighted sum of terms, and their weighting under deep supervision.

Every loss takes logits (N, C, *spatial) and labels (N, 1, *spatial) of indices, and gives a scalar, computed in
float32: sums over voxels overflow in float16. C classes are those of a softmax, 0 the background; a single channel is
the logit of a foreground with label 1 (a sigmoid). Terms of overlap leave the background out, all but generalised
Dice. Voxels with the label ``ignore_index`` count nowhere. To add a loss: a term, and a line in ``LOSSES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from monai.losses import DeepSupervisionLoss, DiceLoss, TverskyLoss
from monai.networks.utils import one_hot
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import PlanError

_SMOOTH = 1e-5  # MONAI's, in voxels: 0 over 0 is full overlap
_SKELETON_STEPS = 3  # of the authors' code: tubes of up to 7 voxels


@dataclass(frozen=True)
class _Voxels:
    """What a term is made of, float32 (N, C, *spatial) with two classes at least.

    ``target`` (one-hot) and ``probabilities`` are 0 at voxels to ignore. ``valid`` (N, 1, *spatial) tells these apart,
    None where none is ignored; ``counted`` is the number of the others, at least 1. ``distances`` are those of
    ``signed_distances``, where they came with the labels.
    """

    logits: Tensor
    logs: Tensor
    probabilities: Tensor
    target: Tensor
    valid: Tensor | None
    counted: Tensor | int
    distances: Tensor | None
    batch: bool

    @property
    def axes(self) -> list[int]:
        """Axes of a sum over the voxels of a sample, or of the batch."""
        return [*([0] if self.batch else []), *range(2, self.logits.ndim)]


def _dice(voxels: _Voxels) -> Tensor:
    """1 - 2 |A B| / (|A| + |B|), the mean over the classes (Milletari et al. 2016, without squares)."""
    loss: Tensor = DiceLoss(include_background=False, batch=voxels.batch)(voxels.probabilities, voxels.target)
    return loss


def _tversky(voxels: _Voxels) -> Tensor:
    """1 - TP / (TP + 0.3 FP + 0.7 FN): misses weigh more than false alarms (Salehi et al. 2017)."""
    tversky = TverskyLoss(include_background=False, alpha=0.3, beta=0.7, batch=voxels.batch)
    loss: Tensor = tversky(voxels.probabilities, voxels.target)
    return loss


def _generalised_dice(voxels: _Voxels) -> Tensor:
    """1 - 2 sum_c w_c |A B| / sum_c w_c (|A| + |B|), w_c = 1 / |B|^2, over all classes (Sudre et al. 2017).

    The background is one of them, as in the paper: in a patch without foreground it alone has a volume. The weights
    are relative to that of the rarest class, so that the smoothing is in voxels (in MONAI's form it outweighs a class
    of more than a hundred thousand voxels); an absent class has the weight of the rarest.
    """
    volume = voxels.target.sum(voxels.axes)
    rarest = torch.where(volume > 0, volume, torch.inf).amin(-1, keepdim=True)
    weight = torch.where(volume > 0, (rarest / volume).square(), 1.0)
    both = (weight * (voxels.probabilities * voxels.target).sum(voxels.axes)).sum(-1)
    sizes = (weight * (voxels.probabilities + voxels.target).sum(voxels.axes)).sum(-1)
    return 1 - ((2 * both + _SMOOTH) / (sizes + _SMOOTH)).mean()


def _cross_entropy(voxels: _Voxels) -> Tensor:
    """Mean over the voxels of -log p of the label."""
    # Not torch's cross_entropy: its backward pass on a GPU is not deterministic for volumes.
    return -(voxels.target * voxels.logs).sum() / voxels.counted


def _binary_cross_entropy(voxels: _Voxels) -> Tensor:
    """Mean over voxels and classes of -log p where the class is, and of -log (1 - p) elsewhere."""
    losses = voxels.target * voxels.logs + (1 - voxels.target) * F.logsigmoid(-voxels.logits)
    if voxels.valid is not None:
        losses = losses * voxels.valid
    return -losses.sum() / (voxels.counted * losses.shape[1])


def _focal(voxels: _Voxels) -> Tensor:
    """Mean over the voxels of -(1 - p)^2 log p of the label (Lin et al. 2017, gamma 2, no class weights)."""
    return -(voxels.target * (1 - voxels.probabilities).square() * voxels.logs).sum() / voxels.counted


def _centreline_dice(voxels: _Voxels) -> Tensor:
    """1 - clDice: the harmonic mean of how much of either skeleton lies in the other mask (Shit et al. 2021).

    For each class by itself, as MONAI's sums over classes and counts the background; 1 is added to each ratio's
    numerator and denominator, as in the authors' code.
    """
    prediction, target = voxels.probabilities[:, 1:], voxels.target[:, 1:]
    thin, thin_target = soft_skeleton(prediction), soft_skeleton(target)
    precision = ((thin * target).sum(voxels.axes) + 1) / (thin.sum(voxels.axes) + 1)
    recall = ((thin_target * prediction).sum(voxels.axes) + 1) / (thin_target.sum(voxels.axes) + 1)
    return 1 - (2 * precision * recall / (precision + recall)).mean()


def _boundary(voxels: _Voxels) -> Tensor:
    """Mean over voxels and classes of p times the distance to the border of the label (Kervadec et al. 2019).

    In voxels: of full resolution where the distances came with the labels, as in training, at lower levels of deep
    supervision too; of the level itself where they are made here. Below 0 where the prediction lies inside, so that a
    perfect prediction has the lowest value there is, not 0.
    """
    distances = voxels.distances
    if distances is None:
        distances = _distances(voxels.target, voxels.valid)
    return (voxels.probabilities * distances)[:, 1:].sum() / (voxels.counted * (distances.shape[1] - 1))


Term = Callable[[_Voxels], Tensor]

LOSSES: dict[str, Mapping[Term, float]] = {
    "dice": {_dice: 1.0},
    "dice_ce": {_cross_entropy: 1.0, _dice: 1.0},
    "bce_dice": {_binary_cross_entropy: 1.0, _dice: 1.0},
    "focal": {_focal: 1.0},
    "dice_focal": {_dice: 1.0, _focal: 1.0},
    "tversky": {_tversky: 1.0},
    "generalised_dice": {_generalised_dice: 1.0},
    "cldice": {_dice: 0.5, _centreline_dice: 0.5},  # (1 - alpha) and alpha; 0.5 is the largest that the paper allows
    "boundary": {_generalised_dice: 1.0, _boundary: 0.01},  # the paper's first weight; it stays
}
"""Terms and weights of each loss, by the name that a plan uses.

With a binary cross-entropy among them all terms take a sigmoid for each class rather than a softmax over all. The
largest logit is still the class: each channel is trained on whether its class is there, the background's too.
"""


class Loss(nn.Module):
    """A weighted sum of terms.

    Logits (N, C, *spatial), labels (N, 1, *spatial) of indices; a scalar comes out. Where every voxel is to be
    ignored it is constant.

    Args:
        terms: with their weights; an entry of ``LOSSES``.
        batch: sum overlaps over the whole batch rather than a sample.
        ignore_index: label of voxels that count nowhere.
    """

    def __init__(self, terms: Mapping[Term, float], batch: bool = False, ignore_index: int | None = None) -> None:
        super().__init__()
        self.terms = dict(terms)
        self.one_against_rest = _binary_cross_entropy in terms
        self.batch = batch
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch; ``labels`` may have the channels of ``with_distances`` beside that of the indices."""
        voxels = self._voxels(logits.float(), labels)
        first, *rest = (weight * term(voxels) for term, weight in self.terms.items())
        return reduce(torch.add, rest, first)

    def _voxels(self, logits: Tensor, labels: Tensor) -> _Voxels:
        if logits.shape[1] == 1:  # sigmoid(x) is the softmax over 0 and x
            logits = torch.cat([-logits if self.one_against_rest else torch.zeros_like(logits), logits], dim=1)
        expected = (logits.shape[0], *logits.shape[2:])
        if (labels.shape[0], *labels.shape[2:]) != expected or labels.shape[1] not in (1, 1 + logits.shape[1]):
            raise ValueError(f"logits {tuple(logits.shape)} (two channels for one) and labels {tuple(labels.shape)}")
        indices, distances = labels[:, :1], labels[:, 1:] if labels.shape[1] > 1 else None
        logs = F.logsigmoid(logits) if self.one_against_rest else torch.log_softmax(logits, dim=1)
        valid = None if self.ignore_index is None else indices != self.ignore_index
        if valid is not None:
            indices = torch.where(valid, indices, 0)
        target, probabilities = one_hot(indices.long(), logs.shape[1]), logs.exp()
        if valid is not None:
            target, probabilities = target * valid, probabilities * valid
        counted = indices.numel() if valid is None else valid.sum().clamp(min=1)  # no voxel counts: a loss of 0
        return _Voxels(logits, logs, probabilities, target, valid, counted, distances, self.batch)


def soft_skeleton(masks: Tensor) -> Tensor:
    """The centrelines of soft masks (N, C, *spatial) in 0..1: algorithm 1 of Shit et al. 2021.

    What an opening takes away, gathered over erosions by a cross; tubes of up to 7 voxels become thin. Shifted minima
    rather than pooling, whose backward pass on a GPU is not deterministic.
    """
    skeleton = F.relu(masks - _opened(masks))
    for _ in range(_SKELETON_STEPS):
        masks = _eroded(masks)
        skeleton = skeleton + F.relu(masks - _opened(masks)) * (1 - skeleton)
    return skeleton


def _opened(masks: Tensor) -> Tensor:
    return reduce(partial(_of_three, torch.maximum), range(2, masks.ndim), _eroded(masks))


def _eroded(masks: Tensor) -> Tensor:
    return reduce(torch.minimum, (_of_three(torch.minimum, masks, axis) for axis in range(2, masks.ndim)))


def _of_three(choose: Callable[[Tensor, Tensor], Tensor], masks: Tensor, axis: int) -> Tensor:
    """The chosen one of each voxel and its two neighbours along an axis; of what is there at the border."""
    length = masks.shape[axis] - 1
    if length == 0:
        return masks
    pairs = choose(masks.narrow(axis, 0, length), masks.narrow(axis, 1, length))
    inner = choose(pairs.narrow(axis, 0, length - 1), pairs.narrow(axis, 1, length - 1))
    return torch.cat([pairs.narrow(axis, 0, 1), inner, pairs.narrow(axis, length - 1, 1)], dim=axis)


def signed_distances(labels: Tensor, classes: int, ignore_index: int | None = None) -> Tensor:
    """How far each voxel is from the border of each class, in voxels: the maps of Kervadec et al. 2019.

    Outside a class the distance to its nearest voxel; inside 1 less than that to the nearest voxel of another class,
    and negative: 0 on the class's own border. Voxels to ignore are of no class, and bound none.

    Args:
        labels: indices (N, 1, *spatial).
        classes: how many, with the background.
        ignore_index: label of voxels to ignore.

    Returns:
        float32 (N, classes, *spatial) in main memory; zeros for a class that a sample has nowhere, or everywhere.
    """
    indices = labels[:, 0].long().cpu().numpy()
    maps = np.zeros((len(indices), classes, *indices.shape[1:]), dtype=np.float32)
    for sample, result in zip(indices, maps, strict=True):
        for index in np.unique(sample):
            inside = sample == index
            others = ~inside if ignore_index is None else ~inside & (sample != ignore_index)
            if index != ignore_index and others.any():
                result[index] = ndimage.distance_transform_edt(~inside)
                result[index] -= np.maximum(ndimage.distance_transform_edt(~others) - 1, 0) * inside
    return torch.from_numpy(maps)


def _distances(target: Tensor, valid: Tensor | None) -> Tensor:
    """``signed_distances`` of a one-hot target, on its device."""
    classes = target.shape[1]
    indices = target.argmax(1, keepdim=True)
    if valid is not None:
        indices = torch.where(valid, indices, classes)
    return signed_distances(indices, classes, classes).to(target.device)


def with_distances(labels: Tensor, classes: int, ignore_index: int | None = None) -> Tensor:
    """Labels (N, 1, *spatial), and behind them their ``signed_distances``: float32 (N, 1 + classes, *spatial).

    For ``boundary``, which otherwise makes them itself, in voxels of each level of deep supervision. Of
    these, in voxels of full resolution, lower levels take the nearest.
    """
    return torch.cat([labels.float(), signed_distances(labels, max(classes, 2), ignore_index)], dim=1)


def build_target(name: str, *, classes: int, ignore_index: int | None) -> Callable[[Tensor], Tensor] | None:
    """What makes labels (N, 1, *spatial) the target of a loss, for the threads that draw batches; None where they are.

    On a GPU the distances of ``boundary`` would take longer than the step that waits for them.
    """
    wanted = _boundary in LOSSES.get(name, {})
    return partial(with_distances, classes=classes, ignore_index=ignore_index) if wanted else None


def supervision_weights(sizes: Sequence[Sequence[int]]) -> list[float]:
    """Weights of levels of these spatial sizes, highest resolution first, of sum 1.

    Halved from level to level, and 0 for the coarsest of several, as in nnU-Net; equal where all have one size, as the
    levels of a ``UNetPlusPlus`` (Zhou et al. 2018 average them).
    """
    if len({tuple(size) for size in sizes}) == 1:
        return [1 / len(sizes)] * len(sizes)
    weights = [*(0.5**n for n in range(len(sizes) - 1)), 0.0]
    return [w / sum(weights) for w in weights]


def build_loss(
    name: str, *, batch: bool, ignore_index: int | None
) -> Callable[[Tensor | Sequence[Tensor], Tensor], Tensor]:
    """The loss of a network's output: of one tensor, or of the list of tensors of deep supervision.

    These are compared with labels sampled at the nearest voxel, and weighted by ``supervision_weights``.

    Raises:
        PlanError: no loss has this name.
    """
    if name not in LOSSES:
        raise PlanError("plan.loss", f"no loss {name!r}", " or ".join(LOSSES))
    return partial(_supervised, Loss(LOSSES[name], batch, ignore_index))


def _supervised(loss: Any, logits: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
    levels = [logits] if isinstance(logits, Tensor) else logits
    weights = supervision_weights([level.shape[2:] for level in levels])
    result: Tensor = DeepSupervisionLoss(loss, weights=weights)(levels, labels)
    return result
