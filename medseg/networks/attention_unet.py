"""The U-Net with gates on its skips (Oktay et al., "Attention U-Net", MIDL 2018).

A gate on every skip, as in the paper's figure 1 (its experiments on CT leave out the highest one), and its output as
in the paper's formula: the skip times the attention, without the convolution and norm that the authors' code adds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.networks.blocks import ConvBlock, Stage, convolution, cropped, interpolated
from medseg.networks.unet import UNet


class AttentionGate(nn.Module):
    """Additive attention: sigmoid(psi(relu(theta(skip) + phi(signal)))), on the grid of the signal.

    Args:
        high: the stage of the skip.
        low: the stage below, whose stride leads from one grid to the other.
    """

    def __init__(self, high: Stage, low: Stage) -> None:
        super().__init__()
        conv = convolution(len(low.stride))
        width = max(1, high.features // 2)
        self.theta = conv(high.features, width, low.stride, low.stride, bias=False)
        self.phi = conv(low.features, width, 1)
        self.psi = conv(width, 1, 1)

    def attention(self, skip: Tensor, signal: Tensor) -> Tensor:
        """How much of the skip passes, 0 to 1: (N, 1, *spatial of the skip), linear between the signal's voxels.

        Args:
            skip: features of the encoder (N, C, *spatial).
            signal: features of the decoder from below (N, C', *spatial / stride).
        """
        both = F.relu(self.theta(skip) + self.phi(signal))
        return interpolated(torch.sigmoid(self.psi(both)), skip.shape[2:])

    def forward(self, skip: Tensor, signal: Tensor) -> Tensor:
        """The skip, weighted by the attention."""
        return skip * self.attention(skip, signal)


class AttentionUNet(UNet):
    """A U-Net whose skips pass through gates, opened by the decoder's features from below.

    Shapes, arguments and errors as ``UNet``. Its gates have, for a skip of F features, half as many inside, so
    F / 2 (F x the stride's voxels + F' + 2) + 1 parameters, F' those of the stage below.
    """

    def _build_decoder(self, conv: Callable[..., ConvBlock], stages: Sequence[Stage], convs: Sequence[int]) -> None:
        super()._build_decoder(conv, stages, convs)
        self.gates = nn.ModuleList(AttentionGate(high, low) for high, low in itertools.pairwise(stages))

    def _joined(self, level: int, x: Tensor, skip: Tensor) -> Tensor:
        return super()._joined(level, x, self.gates[level](skip, x))

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        """Where each gate lets features pass, 0 to 1, for a batch (N, in_channels, *spatial).

        Returns:
            One map (N, 1, *spatial) a skip, highest resolution first, all interpolated to the size of the input.
        """
        skips = self.encode(x)
        signals = [*self.decode(skips)[1:], skips[-1]]
        size = skips[0].shape[2:]
        maps = []
        for gate, skip, signal in zip(self.gates, skips[:-1], signals, strict=True):
            attention = gate.attention(skip, signal)  # type: ignore[operator]
            maps.append(cropped(interpolated(attention, size), x.shape[2:]))
        return maps
