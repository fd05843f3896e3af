"""Networks: siblings of one kind, each usable in any MONAI program.

All take ``spatial_dims, in_channels, out_channels`` first, any input size, and return logits: in training with deep
supervision a list, highest resolution first; in evaluation one tensor. To add one: a file here and a line in
``ARCHITECTURES``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from medseg.errors import PlanError
from medseg.networks.attention_unet import AttentionUNet
from medseg.networks.blocks import BATCH_NORM, INSTANCE_NORM, LEAKY_RELU, RELU
from medseg.networks.heads import CellSegmenter, SatelliteSegmenter
from medseg.networks.residual_unet import ResidualUNet
from medseg.networks.unet import PRESETS, UNet
from medseg.networks.unet_plus_plus import UNetPlusPlus
from medseg.plan import Configuration

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "unet": UNet,
    "residual_unet": ResidualUNet,
    "attention_unet": AttentionUNet,
    "unet_plus_plus": UNetPlusPlus,
    "cell_segmenter": CellSegmenter,
    "satellite_segmenter": SatelliteSegmenter,
}

_NORMS = {"instance": INSTANCE_NORM, "batch": BATCH_NORM}
_ACTS = {"leakyrelu": LEAKY_RELU, "relu": RELU}


def build_network(
    configuration: Configuration, in_channels: int, out_channels: int, checkpointing: bool = False
) -> nn.Module:
    """The network of a plan's configuration, freshly initialised.

    Args:
        configuration: of a plan.
        in_channels: channels of the images.
        out_channels: classes, with the background.
        checkpointing: less memory in training, more time.

    Raises:
        PlanError: the plan names an architecture that does not exist, or sizes that it cannot have.
    """
    plan = configuration.network
    if plan.name not in ARCHITECTURES:
        raise PlanError("plan.network.name", f"no architecture {plan.name!r}", " or ".join(ARCHITECTURES))
    if configuration.patch_size == plan.divisor:
        raise PlanError(
            "plan.patch_size",
            f"{configuration.patch_size} is one voxel in the lowest stage",
            "more, as no norm can scale a single voxel",
            "use a larger patch or fewer stages",
        )
    try:
        return ARCHITECTURES[plan.name](
            spatial_dims=configuration.spatial_dims,
            in_channels=in_channels,
            out_channels=out_channels,
            features=plan.features,
            kernel_sizes=plan.kernel_sizes,
            strides=plan.strides,
            convs_per_stage=plan.convs_per_stage,
            decoder_convs=plan.decoder_convs,
            downsampling=plan.downsampling,
            norm=_NORMS[plan.norm],
            act=_ACTS[plan.act],
            dropout=plan.dropout,
            deep_supervision=plan.deep_supervision,
            checkpointing=checkpointing,
        )
    except ValueError as failure:
        raise PlanError("plan.network", str(failure)) from None


__all__ = [
    "ARCHITECTURES",
    "PRESETS",
    "AttentionUNet",
    "CellSegmenter",
    "ResidualUNet",
    "SatelliteSegmenter",
    "UNet",
    "UNetPlusPlus",
    "build_network",
]
