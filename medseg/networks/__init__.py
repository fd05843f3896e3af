"""Networks: siblings of one kind, each usable in any MONAI program.

All take ``spatial_dims, in_channels, out_channels`` first, any input size, and return logits: in training with deep
supervision a list, highest resolution first; in evaluation one tensor. To add one: a file here and a line in
``ARCHITECTURES``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from medseg.errors import PlanError
from medseg.networks.unet import UNet
from medseg.plan import Configuration

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"unet": UNet}


def build_network(configuration: Configuration, in_channels: int, out_channels: int) -> nn.Module:
    """The network of a plan's configuration, freshly initialised.

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
            deep_supervision=plan.deep_supervision,
        )
    except ValueError as failure:
        raise PlanError("plan.network", str(failure)) from None


__all__ = ["ARCHITECTURES", "UNet", "build_network"]
