"""Other programs' models, as medseg's own."""

from __future__ import annotations

from medseg.interop.nnunet import network_weights

__all__ = ["network_weights"]
