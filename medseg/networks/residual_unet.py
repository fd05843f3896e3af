"""The U-Net with a residual encoder: nnU-Net's ResEnc (Isensee et al., "nnU-Net Revisited", MICCAI 2024).

Its presets M, L and XL are one network: blocks and features by ``RESENC_BLOCKS`` and 32 doubled up to 320 (3D) or 512
(2D). They differ in the memory that patch and batch fill: 8, 24 and 40 GB.

Parameters with 1 channel and 2 classes, kernels of 3, without deep supervision: 102,348,226 in 3D with six stages (32
to 320 features), 140,013,058 in 2D with eight (32 to 512).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medseg.networks.blocks import ENCODER_STAGES, ConvBlock, Stage
from medseg.networks.unet import UNet
from medseg.plan import RESENC_BLOCKS


class _Average(nn.Module):
    """The mean over the voxels of each step, which the sizes are multiples of.

    As torch's average pooling, which for volumes leaves the channels-last format, has no deterministic gradient on a
    GPU, and none of half precision on a processor.
    """

    def __init__(self, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        for axis, step in enumerate(self.stride, start=2):
            if step > 1:
                x = reduce(torch.add, torch.unflatten(x, axis, (-1, step)).unbind(axis + 1)) / step
        return x


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, in the form ResNet-D (He et al., "Bag of Tricks", CVPR 2019).

    (N, in_channels, *spatial) to (N, out_channels, *spatial / stride). The shortcut is averaged over the stride, and
    convolved with kernel 1 and a norm where the channels change. The last norm starts at 0, so that the block starts
    as its shortcut.

    Args:
        conv: ``(in_channels, out_channels, kernel, stride)`` to a ``ConvBlock``.
        in_channels, out_channels: of the block.
        kernel: odd, one entry an axis.
        stride: one entry an axis, taken by the first convolution.
    """

    def __init__(
        self,
        conv: Callable[..., ConvBlock],
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int],
    ) -> None:
        super().__init__()
        ones = (1,) * len(stride)
        self.first = conv(in_channels, out_channels, kernel, stride)
        self.second = conv(out_channels, out_channels, kernel, ones, dropout=0)
        self.act, self.second.act = self.second.act, nn.Identity()  # it comes after the sum
        self.skip = nn.Sequential()
        if tuple(stride) != ones:
            self.skip.append(_Average(stride))
        if in_channels != out_channels:
            self.skip.append(conv(in_channels, out_channels, ones, ones, act=None, dropout=0, bias=False))
        if isinstance(weight := getattr(self.second.norm, "weight", None), Tensor):
            nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        inside = self.second(self.first(x))
        inside += self.skip(x)
        result: Tensor = self.act(inside)
        return result


class ResidualUNet(UNet):
    """A U-Net whose encoder is residual, and far deeper than its decoder.

    A convolution of the first stage's width (the stem), then residual blocks in each encoder stage; one convolution in
    each decoder stage. Shapes, arguments and errors as ``UNet``, but for:

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the logits.
        features: channels of each stage, highest resolution first.
        convs_per_stage: residual blocks of the encoder stages, one number or one a stage; by default ResEnc's.
        decoder_convs: convolutions of the decoder stages, one number or one a stage, highest resolution first.
        more: the other arguments of ``UNet``, by name.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = (32, 64, 128, 256, 320, 320),
        *,
        convs_per_stage: int | Sequence[int] | None = None,
        decoder_convs: int | Sequence[int] = 1,
        **more: Any,
    ) -> None:
        blocks = RESENC_BLOCKS[: len(features)] if convs_per_stage is None else convs_per_stage
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            features,
            convs_per_stage=blocks,
            decoder_convs=decoder_convs,
            **more,
        )

    def _encoder_stage(
        self, conv: Callable[..., ConvBlock], channels: int, stage: Stage, downsampling: Literal["stride", "pool"]
    ) -> nn.Module:
        build = ENCODER_STAGES[downsampling]
        if len(self.encoder):
            return build(partial(ResidualBlock, conv), channels, stage)
        stem = conv(channels, stage.features, stage.kernel, stage.stride)
        return nn.Sequential(stem, *build(partial(ResidualBlock, conv), stage.features, stage))
