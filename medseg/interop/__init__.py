"""Doors to other programs: nnU-Net's weights as medseg's own, medseg's sliding window in MONAI."""

from __future__ import annotations

from medseg.interop.monai import SlabInferer
from medseg.interop.nnunet import network_weights

__all__ = ["SlabInferer", "network_weights"]
