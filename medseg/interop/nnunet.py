"""Weights of nnU-Net's networks, under the names that they have in ours.

nnU-Net's PlainConvUNet is our ``UNet``, its ResidualEncoderUNet our ``ResidualUNet``: with features, kernels, strides
and numbers of convolutions (blocks) of its plan they have the same layers in the same places.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from medseg.errors import PackageError
from medseg.networks import UNet

_SHOWN = 3


def network_weights(state: Mapping[str, Tensor], network: UNet) -> dict[str, Tensor]:
    """The state of a network of nnU-Net, for ``network.load_state_dict``.

    nnU-Net names every layer several times; each is taken once. It keeps the heads of deep supervision in any case; a
    network without it leaves them out.

    Args:
        state: the ``network_weights`` of a checkpoint of nnU-Net, or the state of a PlainConvUNet or
            ResidualEncoderUNet.
        network: a ``UNet`` or ``ResidualUNet`` of the same topology.

    Raises:
        PackageError: a weight has no place in the network, or none for a place of it, or another shape; the first
            few are named.
    """
    own = network.state_dict()
    levels = len(network.decoder)
    renamed = {_renamed(name, levels): tensor for name, tensor in state.items() if not _is_repeated(name)}
    unused = {f"heads.{level}.{part}" for level in range(len(network.heads), levels) for part in ("weight", "bias")}
    found = {name: tensor for name, tensor in renamed.items() if name not in unused}
    faults = {
        "have no place": [name for name in found if name not in own],
        "are missing": [name for name in own if name not in found],
        "have another shape": [n for n, tensor in found.items() if n in own and tensor.shape != own[n].shape],
    }
    if any(faults.values()):
        listed = (f"{len(names)} {fault} ({_first(names)})" for fault, names in faults.items() if names)
        raise PackageError("nnU-Net's weights", "; ".join(listed), "those of a network of the same topology")
    return found


def _is_repeated(name: str) -> bool:
    return ".all_modules." in name or name.startswith("decoder.encoder.")


def _renamed(name: str, levels: int) -> str:
    """Our name of a weight; as it is where it has none. Their decoder begins at the bottom, ours at the top."""
    match name.split("."):
        case ["encoder", "stem", "convs", "0", *rest]:
            parts = ["encoder", "0", "0", *rest]
        case ["encoder", "stages", stage, "0", "convs", conv, *rest]:
            parts = ["encoder", stage, conv, *rest]
        case ["encoder", "stages", stage, "blocks", block, part, *rest]:
            place = int(block) + (stage == "0")  # the stem comes before the first stage's blocks
            parts = ["encoder", stage, str(place), {"conv1": "first", "conv2": "second"}.get(part, part), *rest]
        case ["decoder", "stages", stage, "convs", conv, *rest]:
            parts = ["decoder", str(levels - 1 - int(stage)), conv, *rest]
        case ["decoder", ("transpconvs" | "seg_layers") as kind, stage, *rest]:
            parts = [{"transpconvs": "upsample", "seg_layers": "heads"}[kind], str(levels - 1 - int(stage)), *rest]
        case parts:
            pass
    return ".".join(parts)


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
