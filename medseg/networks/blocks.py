"""What the networks are built of: stages, convolution blocks, padding to the strides, initialisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

Sizes = int | Sequence[int]
INSTANCE_NORM = ("INSTANCE", {"affine": True})
BATCH_NORM = "BATCH"
LEAKY_RELU: tuple[str, dict[str, Any]] = ("LEAKYRELU", {"negative_slope": 0.01, "inplace": True})
RELU: tuple[str, dict[str, Any]] = ("RELU", {"inplace": True})


class Stage(NamedTuple):
    """One resolution of a network: its channels, the kernel and number of its convolutions, the step into it."""

    features: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    convs: int

    @property
    def ones(self) -> tuple[int, ...]:
        """The step of what stays on the stage's grid."""
        return (1,) * len(self.stride)


def stages_of(
    spatial_dims: int,
    features: Sequence[int],
    kernel_sizes: Sequence[Sizes] | None,
    strides: Sequence[Sizes] | None,
    convs_per_stage: int | Sequence[int],
) -> list[Stage]:
    """The stages of a network, highest resolution first; kernels of 3 and steps of 2 where none are given.

    Raises:
        ValueError: other than 2 or 3 axes, not one kernel, stride and number of convolutions a stage, fewer than two
            stages, a first stride that is not 1, an even kernel, or a size with a wrong number of axes.
    """
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3; got {spatial_dims}")
    count = len(features)
    kernels = [_per_axis(k, spatial_dims) for k in (kernel_sizes or [3] * count)]
    steps = [_per_axis(s, spatial_dims) for s in (strides or [1] + [2] * (count - 1))]
    convs = each_of(convs_per_stage, count)
    if not len(kernels) == len(steps) == len(convs) == count >= 2:
        raise ValueError(
            "features, kernel_sizes, strides and convs_per_stage need one entry a stage, and two stages at least; "
            f"got {count}, {len(kernels)}, {len(steps)} and {len(convs)}"
        )
    if any(n != 1 for n in steps[0]) or any(k % 2 == 0 for kernel in kernels for k in kernel):
        raise ValueError(f"the first stride must be 1 and kernels odd; got {steps[0]} and {kernels}")
    return [Stage(*parts) for parts in zip(features, kernels, steps, convs, strict=True)]


def each_of(convs: int | Sequence[int], count: int) -> list[int]:
    """Numbers of convolutions as given one by one, or the one number for all of ``count`` stages."""
    return list(convs) if isinstance(convs, Iterable) else [convs] * count


def _per_axis(size: Sizes, spatial_dims: int) -> tuple[int, ...]:
    axes = tuple(map(int, size)) if isinstance(size, Iterable) else (int(size),) * spatial_dims
    if len(axes) != spatial_dims:
        raise ValueError(f"a size for {spatial_dims} axes is needed; got {size}")
    return axes


def convolution(spatial_dims: int) -> Callable[..., nn.Module]:
    """The convolution of so many dimensions."""
    return nn.Conv2d if spatial_dims == 2 else nn.Conv3d


def transposed(spatial_dims: int) -> Callable[..., nn.Module]:
    """The transposed convolution of so many dimensions."""
    return nn.ConvTranspose2d if spatial_dims == 2 else nn.ConvTranspose3d


class ConvBlock(nn.Module):
    """Convolution, dropout, norm, activation: (N, in_channels, *spatial) to (N, out_channels, *spatial / stride).

    Args:
        spatial_dims: 2 or 3.
        in_channels, out_channels: of the convolution.
        kernel: odd, one entry an axis; the size stays but for the stride.
        stride: one entry an axis.
        norm: MONAI's norm specification; None for none.
        act: MONAI's activation specification; None for none.
        dropout: MONAI's dropout specification; 0 or None for none.
        bias: of the convolution.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        norm: Any = INSTANCE_NORM,
        act: Any = LEAKY_RELU,
        dropout: Any = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        padding = tuple(k // 2 for k in kernel)
        sizes = {"kernel_size": tuple(kernel), "stride": tuple(stride), "padding": padding}
        self.conv = convolution(spatial_dims)(in_channels, out_channels, **sizes, bias=bias)
        self.dropout = _dropout(dropout, spatial_dims) if dropout else nn.Identity()
        self.norm = _norm(norm, spatial_dims, out_channels) if norm is not None else nn.Identity()
        self.act = _activation(act) if act is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        result: Tensor = self.act(normalised(self.norm, self.dropout(self.conv(x))))
        return result


# MONAI makes what it specifies, but takes two seconds to be imported: what plans can name is made here.


def _norm(norm: Any, spatial_dims: int, channels: int) -> nn.Module:
    flat = spatial_dims == 2
    if norm == INSTANCE_NORM:
        return (nn.InstanceNorm2d if flat else nn.InstanceNorm3d)(channels, affine=True)
    if norm == BATCH_NORM:
        return (nn.BatchNorm2d if flat else nn.BatchNorm3d)(channels)
    from monai.networks.layers.utils import get_norm_layer

    layer: nn.Module = get_norm_layer(norm, spatial_dims, channels)
    return layer


def _activation(act: Any) -> nn.Module:
    if act == LEAKY_RELU:
        return nn.LeakyReLU(**LEAKY_RELU[1])
    if act == RELU:
        return nn.ReLU(**RELU[1])
    from monai.networks.layers.utils import get_act_layer

    layer: nn.Module = get_act_layer(act)
    return layer


def _dropout(dropout: Any, spatial_dims: int) -> nn.Module:
    from monai.networks.layers.utils import get_dropout_layer

    layer: nn.Module = get_dropout_layer(dropout, spatial_dims)
    return layer


def conv_stage(conv: Callable[..., nn.Module], channels: int, stage: Stage) -> nn.Sequential:
    """Convolutions of one resolution; the first takes the step.

    Args:
        conv: ``(in_channels, out_channels, kernel, stride)`` to a block.
        channels: of the input.
        stage: says the rest.

    Raises:
        ValueError: no convolution at all.
    """
    if stage.convs < 1:
        raise ValueError(f"convs_per_stage and decoder_convs must be 1 at least; got {stage.convs}")
    first = conv(channels, stage.features, stage.kernel, stage.stride)
    more = (conv(stage.features, stage.features, stage.kernel, stage.ones) for _ in range(stage.convs - 1))
    return nn.Sequential(first, *more)


def pooled_stage(conv: Callable[..., nn.Module], channels: int, stage: Stage) -> nn.Sequential:
    """As ``conv_stage``, with the step taken by max-pooling before the convolutions."""
    convs = conv_stage(conv, channels, stage._replace(stride=stage.ones))
    if stage.stride == stage.ones:
        return convs
    pool = nn.MaxPool2d if len(stage.stride) == 2 else nn.MaxPool3d
    return nn.Sequential(pool(stage.stride, stage.stride), *convs)


ENCODER_STAGES: dict[Literal["stride", "pool"], Callable[..., nn.Sequential]] = {
    "stride": conv_stage,
    "pool": pooled_stage,
}


def padded(x: Tensor, divisor: Sequence[int]) -> Tensor:
    """Zeros after the end of each axis, up to a multiple of the divisor; never to the divisor itself on all axes.

    A lowest stage of a single voxel is avoided because no norm can scale it.
    """
    missing = [-n % d for n, d in zip(x.shape[2:], divisor, strict=True)]
    if all(n + m == d for n, m, d in zip(x.shape[2:], missing, divisor, strict=True)):
        missing[-1] += divisor[-1]
    if not any(missing):
        return x
    return F.pad(x, [v for m in reversed(missing) for v in (0, m)])


def cropped(x: Tensor, size: Sequence[int]) -> Tensor:
    """The beginning of each spatial axis, as long as ``size``: undoes ``padded``."""
    for axis, n in enumerate(size, start=2):
        if x.shape[axis] != n:  # also so that no exported graph has steps that do nothing
            x = x.narrow(axis, 0, n)
    return x


def interpolated(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resampled to a size, linear between the centres of voxels, and constant beyond the outermost ones.

    Where torch is asked for determinism by products with matrices, as its own way has none for volumes on a GPU.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    if torch.are_deterministic_algorithms_enabled():
        for axis, n in enumerate(size, start=2):
            one = torch.eye(x.shape[axis], dtype=x.dtype, device=x.device)[None]
            x = torch.tensordot(x, F.interpolate(one, n, mode="linear")[0], ([axis], [0])).movedim(-1, axis)
        return x
    return F.interpolate(x, tuple(size), mode="bilinear" if x.ndim == 4 else "trilinear", align_corners=False)


def initialise(module: nn.Module) -> None:
    """He initialisation for leaky ReLU with slope 0.01."""
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_contexts(stage: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For ``torch.utils.checkpoint``: the second forward pass leaves the running statistics of batch norms alone."""
    return nullcontext(), _statistics_kept(stage)


@contextmanager
def _statistics_kept(stage: nn.Module) -> Iterator[None]:
    norms = [module for module in stage.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None  # a share of 0, and none counted
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


# ---- speed on processors (figures in docs/experiments.md) ------------------------------------------------------------


def arranged(x: Tensor) -> Tensor:
    """The input in the memory format in which a processor convolves fastest: channels last.

    Every layer after it keeps the format, but for convolutions of kernel 1 of volumes. Measured with 32 channels:
    convolutions 1.3 to 2.5 times as fast, transposed convolutions 2 to 10 times. Elsewhere, and in graphs that are
    exported, as it is.
    """
    if not _on_eager_cpu(x):
        return x
    # Not x.contiguous(memory_format=...): it leaves an image of one channel as it is, and so all layers after it.
    last = torch.empty_like(x, memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    return x if x.stride() == last.stride() else last.copy_(x)


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``, where instance norm on a processor takes a faster way to the same numbers."""
    instance = isinstance(norm, nn.InstanceNorm2d | nn.InstanceNorm3d)
    if instance and norm.affine and not norm.track_running_stats and _on_eager_cpu(x):
        quick: Tensor = _InstanceNorm.apply(x, norm.weight, norm.bias, norm.eps)  # type: ignore[no-untyped-call]
        return quick
    usual: Tensor = norm(x)
    return usual


def _on_eager_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None


class _InstanceNorm(torch.autograd.Function):
    """Instance norm as one batch norm a sample, whose kernels are fast in channels-last format, forward and backward.

    torch's own instance norm copies channels-last tensors to and fro; its group norm is slow backward there, and loses
    the deviation where the mean is far above it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        result = torch.empty_like(x)
        # in the precision of the weights: an image in half precision has its statistics in full
        mean, inverse = weight.new_empty(x.shape[:2]), weight.new_empty(x.shape[:2])
        for n in range(x.shape[0]):
            torch.ops.aten.native_batch_norm.out(
                x[n : n + 1], weight, bias, None, None, True, 0.0, eps,
                out=result[n : n + 1], save_mean=mean[n], save_invstd=inverse[n],
            )  # fmt: skip
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        like_x = torch.empty_like(x)  # as densely arranged as x
        gradient = like_x.copy_(gradient) if gradient.stride() != like_x.stride() else gradient
        of_x, of_weight, of_bias = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
        for n in range(x.shape[0]):
            torch.ops.aten.native_batch_norm_backward.out(
                gradient[n : n + 1], x[n : n + 1], weight, None, None, mean[n], inverse[n], True, ctx.eps,
                [True, True, True], out0=of_x[n : n + 1], out1=of_weight[n], out2=of_bias[n],
            )  # fmt: skip
        return of_x, of_weight.sum(0), of_bias.sum(0), None
