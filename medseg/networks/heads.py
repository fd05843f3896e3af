"""U-Nets with heads for pictures: cells that touch, and scenes with things of every size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.networks.blocks import ConvBlock, Stage, arranged, convolution, interpolated
from medseg.networks.unet import UNet


class CellHead(nn.Module):
    """Features (N, F, *spatial) to log-probabilities (N, classes, *spatial), the last class the boundary of the others.

    One branch says what a pixel belongs to, p(k), with boundaries as part of their cell; the other whether a pixel of
    a cell lies on its boundary, p(b). Together: the background p(0), the inside of a cell p(k) (1 - p(b)), and the
    boundary (1 - p(0)) p(b).

    Args:
        conv: ``(in_channels, out_channels, kernel, stride)`` to a block.
        level: the stage that the features come from.
        classes: background, kinds of cells, boundary.
    """

    def __init__(self, conv: Callable[..., ConvBlock], level: Stage, classes: int) -> None:
        super().__init__()
        plain = convolution(len(level.kernel))
        self.classes = plain(level.features, classes - 1, 1)
        self.boundary = nn.Sequential(
            conv(level.features, level.features, level.kernel, level.ones), plain(level.features, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The log-probabilities, computed in float32 at least; their exponentials sum to 1."""
        classes, boundary = self.classes(x), self.boundary(x)
        wide = torch.promote_types(classes.dtype, torch.float32)
        logs, boundary = F.log_softmax(classes.to(wide), dim=1), boundary.to(wide)
        cells = logs[:, 1:]
        on_boundary = torch.logsumexp(cells, dim=1, keepdim=True) + F.logsigmoid(boundary)
        parts = [logs[:, :1], cells + F.logsigmoid(-boundary), on_boundary]
        return torch.cat(parts, dim=1).to(classes.dtype)


class CellSegmenter(UNet):
    """A U-Net with a head of its own for the boundaries of cells, by which those that touch are parted.

    After the contour branch of Chen et al. ("DCAN", CVPR 2016), both branches on the decoder's last features, but as
    one distribution: the ``out_channels`` classes are 0 the background, then the kinds of cells, the last the boundary.
    What comes out are log-probabilities, so that softmax, losses and the largest value serve as for any logits.
    Shapes and arguments as ``UNet``; under deep supervision every level has such a head. Beside the
    F x (out_channels - 1) + out_channels - 1 parameters of the classes a head has a block of F to F and F + 1 more.

    Raises:
        ValueError: fewer than 3 ``out_channels``; and as ``UNet``.
    """

    def _head(self, conv: Callable[..., ConvBlock], level: Stage, out_channels: int) -> nn.Module:
        if out_channels < 3:
            raise ValueError(f"3 out_channels at least are needed (background, cell, boundary); got {out_channels}")
        return CellHead(conv, level, out_channels)


class SatelliteSegmenter(UNet):
    """A U-Net whose logits see every level of the decoder at once, for scenes with things of every size.

    As the semantic branch of feature pyramids (Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019): each
    decoder level is projected to the width of the highest one by a convolution of kernel 1, brought to its size and
    summed; a convolution with norm and activation smooths the sum for the head. The decoder's levels rather than the
    encoder's, as these have the skips in them and the context from below; the lowest stage is in all of them.

    Shapes, arguments and errors as ``UNet``. Under deep supervision the first logits are those of the sum, the others
    those of the levels themselves.
    """

    def _build_decoder(self, conv: Callable[..., ConvBlock], stages: Sequence[Stage], convs: Sequence[int]) -> None:
        super()._build_decoder(conv, stages, convs)
        first = stages[0]
        plain = convolution(self.spatial_dims)
        self.projections = nn.ModuleList(plain(stage.features, first.features, 1) for stage in stages[:-1])
        self.fusion = conv(first.features, first.features, first.kernel, first.ones)

    def decode(self, skips: Sequence[Tensor]) -> list[Tensor]:
        """Features of every decoder stage, highest resolution first, the sum of all in place of the first."""
        levels = super().decode(skips)
        size = levels[0].shape[2:]
        parts = [interpolated(project(x), size) for project, x in zip(self.projections, levels, strict=True)]
        return [self._run(self.fusion, arranged(reduce(torch.add, parts))), *levels[1:]]
