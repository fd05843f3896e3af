"""medseg: medical image segmentation with U-Nets in 2D and 3D. Research software, not a medical device."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers; at run time __getattr__ brings them
    from medseg.errors import MedsegError
    from medseg.io import series
    from medseg.pipeline import run
    from medseg.predict import load
    from medseg.segmenter import Segmenter

__version__ = "0.1.0"
NOTICE = "Research software, not a medical device."

_PLACES = {
    "load": "medseg.predict",
    "run": "medseg.pipeline",
    "series": "medseg.io",
    "MedsegError": "medseg.errors",
    "Segmenter": "medseg.segmenter",
}
__all__ = ["MedsegError", "Segmenter", "__version__", "load", "run", "series"]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for: importing medseg stays fast and loads no torch."""
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'medseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
