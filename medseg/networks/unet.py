"""The U-Net in 2D and 3D, in the plain-convolution form of nnU-Net.

Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015; Isensee et al.,
"nnU-Net", Nature Methods 18, 2021: strided convolutions instead of pooling, instance norm, leaky ReLU, kernels and
strides that follow the anisotropy of the voxels, deep supervision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks.convolutions import Convolution
from torch import Tensor, nn
from torch.nn import functional as F

Sizes = int | Sequence[int]
_NORM = ("INSTANCE", {"affine": True})
_ACT = ("LEAKYRELU", {"negative_slope": 0.01, "inplace": True})


class UNet(nn.Module):
    """Encoder and decoder of the same number of stages, joined by concatenation.

    Input (N, in_channels, *spatial) of any spatial size; it is padded with zeros to a multiple of the strides inside
    (to two of them along the last axis where the lowest stage would be one voxel, which no norm can scale), and cropped
    back. Output: logits (N, out_channels, *spatial); in training with deep supervision a list of logits,
    one for each decoder stage, highest resolution first, where a lower stage has the padded size over its strides.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the logits.
        features: channels of each stage, highest resolution first.
        kernel_sizes: kernel of each stage's convolutions, one for all axes or one an axis. Odd.
        strides: step into each stage; the first is 1.
        convs_per_stage: convolutions of each encoder and each decoder stage.
        norm: MONAI's norm specification.
        act: MONAI's activation specification.
        dropout: probability, 0 for none.
        deep_supervision: whether training returns the logits of the lower stages too.

    Raises:
        ValueError: not one kernel and stride a stage, a first stride that is not 1, an even kernel, or a size with a
            wrong number of axes.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = (32, 64, 128, 256, 320),
        kernel_sizes: Sequence[Sizes] | None = None,
        strides: Sequence[Sizes] | None = None,
        convs_per_stage: int = 2,
        norm: Any = _NORM,
        act: Any = _ACT,
        dropout: float = 0.0,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        stages = len(features)
        kernels = [_per_axis(k, spatial_dims) for k in (kernel_sizes or [3] * stages)]
        steps = [_per_axis(s, spatial_dims) for s in (strides or [1] + [2] * (stages - 1))]
        if not len(kernels) == len(steps) == stages >= 2:
            raise ValueError(
                f"features, kernel_sizes and strides need one entry a stage; got {stages}, {len(kernels)}, {len(steps)}"
            )
        ones = (1,) * spatial_dims
        if steps[0] != ones or any(k % 2 == 0 for kernel in kernels for k in kernel):
            raise ValueError(f"the first stride must be 1 and kernels odd; got {steps[0]} and {kernels}")
        self.spatial_dims = spatial_dims
        self.deep_supervision = deep_supervision
        self.divisor = tuple(math.prod(along) for along in zip(*steps, strict=True))
        common = {"adn_ordering": "DNA", "norm": norm, "act": act, "dropout": dropout or None}

        def stage(channels: int, width: int, kernel: tuple[int, ...], step: tuple[int, ...]) -> nn.Sequential:
            """Convolutions of one resolution; the first takes the step."""
            first = Convolution(spatial_dims, channels, width, step, kernel, **common)
            more = (Convolution(spatial_dims, width, width, ones, kernel, **common) for _ in range(convs_per_stage - 1))
            return nn.Sequential(first, *more)

        self.encoder = nn.ModuleList()
        channels = in_channels
        for width, kernel, step in zip(features, kernels, steps, strict=True):
            self.encoder.append(stage(channels, width, kernel, step))
            channels = width
        transposed = nn.ConvTranspose2d if spatial_dims == 2 else nn.ConvTranspose3d
        pointwise = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        self.upsample, self.decoder, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for low in range(stages - 1, 0, -1):
            width = features[low - 1]
            self.upsample.append(transposed(features[low], width, steps[low], steps[low]))  # type: ignore[arg-type]
            self.decoder.append(stage(2 * width, width, kernels[low - 1], ones))
            # Every level has its head, also without deep supervision, so that weights of both forms fit each other.
            self.heads.append(pointwise(width, out_channels, 1))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits of a batch; see the class for shapes."""
        size = x.shape[2:]
        x = _pad(x, self.divisor)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        logits: list[Tensor] = []
        last = len(self.decoder) - 1
        for n, (upsample, stage, head) in enumerate(zip(self.upsample, self.decoder, self.heads, strict=True)):
            x = stage(torch.cat([upsample(x), skips[last - n]], dim=1))
            if n == last or (self.training and self.deep_supervision):
                logits.insert(0, head(x))
        for axis, n in enumerate(size, start=2):
            logits[0] = logits[0].narrow(axis, 0, n)
        return logits if self.training and self.deep_supervision else logits[0]


def _per_axis(size: Sizes, spatial_dims: int) -> tuple[int, ...]:
    axes = (size,) * spatial_dims if isinstance(size, int) else tuple(size)
    if len(axes) != spatial_dims:
        raise ValueError(f"a size for {spatial_dims} axes is needed; got {size}")
    return axes


def _pad(x: Tensor, divisor: Sequence[int]) -> Tensor:
    """Zeros after the end of each axis, up to a multiple of the divisor; never to the divisor itself on all axes."""
    missing = [-n % d for n, d in zip(x.shape[2:], divisor, strict=True)]
    if all(n + m == d for n, m, d in zip(x.shape[2:], missing, divisor, strict=True)):
        missing[-1] += divisor[-1]
    if not any(missing):
        return x
    return F.pad(x, [v for m in reversed(missing) for v in (0, m)])


def _initialise(module: nn.Module) -> None:
    """He initialisation for leaky ReLU with slope 0.01."""
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
