"""The doors of interop."""

from __future__ import annotations

from medseg import interop


def test_the_doors_are_named_once() -> None:
    assert interop.__all__ == ["network_weights"]
    assert interop.network_weights.__module__ == "medseg.interop.nnunet"
