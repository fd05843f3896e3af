"""The doors of interop."""

from __future__ import annotations

from medseg import interop


def test_the_doors_are_named_once() -> None:
    assert interop.__all__ == ["SlabInferer", "network_weights"]
    assert interop.SlabInferer.__module__ == "medseg.interop.monai"
    assert interop.network_weights.__module__ == "medseg.interop.nnunet"
