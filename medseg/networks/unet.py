"""The U-Net in 2D and 3D: as published, and in the plain-convolution form of nnU-Net.

Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015; Cicek et al., "3D
U-Net", MICCAI 2016; Isensee et al., "nnU-Net", Nature Methods 18, 2021: strided convolutions instead of pooling,
instance norm, leaky ReLU, kernels and strides that follow the anisotropy of the voxels, deep supervision.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medseg.networks.blocks import (
    BATCH_NORM,
    ENCODER_STAGES,
    INSTANCE_NORM,
    LEAKY_RELU,
    RELU,
    ConvBlock,
    Sizes,
    Stage,
    arranged,
    checkpoint_contexts,
    conv_stage,
    convolution,
    cropped,
    each_of,
    initialise,
    padded,
    stages_of,
    transposed,
)
from medseg.plan import divisor_of

PRESETS: Mapping[str, tuple[int, ...]] = {
    "original": (64, 128, 256, 512),
    "small": (32, 64, 128, 256),
    "large": (64, 128, 256, 512, 1024),
}
"""Features of the contracting path of ``UNet.classic``; its bottom has twice the last of them."""


class UNet(nn.Module):
    """Encoder and decoder of the same number of stages, joined by concatenation.

    Input (N, in_channels, *spatial) of any spatial size; it is padded with zeros to a multiple of the strides inside
    (to two of them along the last axis where the lowest stage would be one voxel, which no norm can scale), and cropped
    back. Output: logits (N, out_channels, *spatial); in training with deep supervision a list of logits, one for each
    decoder stage, highest resolution first, a lower one of the input's size over its strides, rounded up. In
    evaluation the logits of a MetaTensor are one too, with its metadata; in training they are plain.

    The siblings in this package are subclasses that change one of its steps.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the logits.
        features: channels of each stage, highest resolution first.
        kernel_sizes: kernel of each stage's convolutions, one for all axes or one an axis. Odd.
        strides: step into each stage; the first is 1.
        convs_per_stage: convolutions of the encoder stages, one number or one a stage.
        decoder_convs: convolutions of the decoder stages, one number or one a stage, highest resolution first.
        downsampling: into a stage by a ``stride`` of its first convolution, or by a max-``pool`` before it.
        norm: MONAI's norm specification.
        act: MONAI's activation specification.
        dropout: MONAI's dropout specification, as a probability; 0 for none.
        deep_supervision: whether training returns the logits of the lower stages too.
        checkpointing: compute the inside of each stage again in the backward pass rather than keep it: less memory,
            about a third more time.

    Raises:
        ValueError: sizes that do not fit together; see ``medseg.networks.blocks.stages_of``.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = (32, 64, 128, 256, 320),
        kernel_sizes: Sequence[Sizes] | None = None,
        strides: Sequence[Sizes] | None = None,
        convs_per_stage: int | Sequence[int] = 2,
        decoder_convs: int | Sequence[int] = 2,
        downsampling: Literal["stride", "pool"] = "stride",
        norm: Any = INSTANCE_NORM,
        act: Any = LEAKY_RELU,
        dropout: Any = 0.0,
        deep_supervision: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        stages = stages_of(spatial_dims, features, kernel_sizes, strides, convs_per_stage)
        self.spatial_dims = spatial_dims
        self.deep_supervision = deep_supervision
        self.checkpointing = checkpointing
        self.divisor = divisor_of([stage.stride for stage in stages])
        conv = partial(ConvBlock, spatial_dims, norm=norm, act=act, dropout=dropout)
        self.encoder = nn.ModuleList()
        channels = in_channels
        for stage in stages:
            self.encoder.append(self._encoder_stage(conv, channels, stage, downsampling))
            channels = stage.features
        convs = each_of(decoder_convs, len(stages) - 1)
        if len(convs) != len(stages) - 1:
            raise ValueError(f"decoder_convs needs one entry a decoder stage, {len(stages) - 1}; got {len(convs)}")
        self._build_decoder(conv, stages, convs)
        levels = self._levels(stages)[: None if deep_supervision else 1]
        self.heads = nn.ModuleList(self._head(conv, level, out_channels) for level in levels)
        self.apply(initialise)

    @classmethod
    def classic(
        cls,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        preset: Literal["original", "small", "large"] | None = None,
        **more: Any,
    ) -> Self:
        """The U-Net of the literature: two convolutions, batch norm and ReLU a stage, max-pooling, a doubled bottom.

        Args:
            spatial_dims: 2 or 3.
            in_channels: channels of the input.
            out_channels: channels of the logits.
            preset: a key of ``PRESETS``; by default ``original`` in 2D (Ronneberger 2015) and ``small`` in 3D (after
                Cicek 2016).
            more: as for the class.

        Raises:
            ValueError: there is no such preset.
        """
        name = preset or ("original" if spatial_dims == 2 else "small")
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        features = (*PRESETS[name], 2 * PRESETS[name][-1])
        form = {"downsampling": "pool", "norm": BATCH_NORM, "act": RELU, **more}
        return cls(spatial_dims, in_channels, out_channels, features, **form)

    def _encoder_stage(
        self, conv: Callable[..., ConvBlock], channels: int, stage: Stage, downsampling: Literal["stride", "pool"]
    ) -> nn.Module:
        return ENCODER_STAGES[downsampling](conv, channels, stage)

    def _build_decoder(self, conv: Callable[..., ConvBlock], stages: Sequence[Stage], convs: Sequence[int]) -> None:
        """The modules of the decoder, highest resolution first."""
        self.upsample, self.decoder = nn.ModuleList(), nn.ModuleList()
        for (high, low), count in zip(itertools.pairwise(stages), convs, strict=True):
            self.upsample.append(transposed(self.spatial_dims)(low.features, high.features, low.stride, low.stride))
            self.decoder.append(conv_stage(conv, 2 * high.features, high._replace(stride=high.ones, convs=count)))

    def _levels(self, stages: Sequence[Stage]) -> list[Stage]:
        """The stages whose features ``decode`` returns, in its order."""
        return list(stages[:-1])

    def _head(self, conv: Callable[..., ConvBlock], level: Stage, out_channels: int) -> nn.Module:
        return convolution(self.spatial_dims)(level.features, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits of a batch; see the class for shapes."""
        size = x.shape[2:]
        levels = self.decode(self.encode(x))
        if self.training and self.deep_supervision:
            whole = levels[0].shape[2:]
            return [_unpadded(head(level), size, whole) for head, level in zip(self.heads, levels, strict=True)]
        logits = cropped(self.heads[0](levels[0]), size)
        if _is_metatensor(x) and not self.training:
            logits = type(x)(logits).copy_meta_from(x)  # type: ignore[attr-defined]
        return logits

    def encode(self, x: Tensor) -> list[Tensor]:
        """Features of every encoder stage, highest resolution first, of the input padded to a multiple of strides."""
        if _is_metatensor(x):  # every layer would hand it on: slower, and nothing needs it inside
            x = x.as_tensor()  # type: ignore[attr-defined]
        x = arranged(padded(x, self.divisor))
        skips = []
        for stage in self.encoder:
            x = self._run(stage, x)
            skips.append(x)
        return skips

    def decode(self, skips: Sequence[Tensor]) -> list[Tensor]:
        """Features of every decoder stage, highest resolution first."""
        *higher, x = skips
        levels: list[Tensor] = []
        for level in reversed(range(len(higher))):
            x = self._run(self.decoder[level], self._joined(level, x, higher[level]))
            levels.insert(0, x)
        return levels

    def _joined(self, level: int, x: Tensor, skip: Tensor) -> Tensor:
        """What the decoder stage of a level takes: the features from below, upsampled, and the encoder's."""
        return torch.cat([self.upsample[level](x), skip], dim=1)

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            again: Tensor = checkpoint(stage, x, use_reentrant=False, context_fn=partial(checkpoint_contexts, stage))
            return again
        result: Tensor = stage(x)
        return result


def _is_metatensor(x: Tensor) -> bool:
    """Whether it is MONAI's MetaTensor: told by what it can do, as importing MONAI takes two seconds."""
    return hasattr(x, "copy_meta_from")


def _unpadded(x: Tensor, size: Sequence[int], whole: Sequence[int]) -> Tensor:
    """A level without the padding of an image of this size to ``whole``: the size over the strides, rounded up."""
    return cropped(x, [-(-n * m // w) for n, m, w in zip(size, x.shape[2:], whole, strict=True)])
