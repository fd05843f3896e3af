"""Devices by name."""

from __future__ import annotations

import pytest
import torch

from medseg.engines import choose_device, computes_bfloat16, keep_freed_memory
from medseg.errors import InputError


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("gpus", "mps", "expected"), [(0, False, "cpu"), (2, False, "cuda"), (0, True, "mps"), (1, True, "cuda")]
)
def test_auto_takes_the_fastest_there_is(monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool, expected: str) -> None:
    pretend(monkeypatch, gpus, mps)
    assert choose_device("auto") == torch.device(expected)
    assert choose_device("cpu") == torch.device("cpu")


def test_a_gpu_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 2, False)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InputError, match=r"'cuda:2' is not there .expected auto or cpu or cuda or cuda:0 or cuda:1."):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "mps", "gpu", ""])
def test_a_device_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend(monkeypatch, 0, False)
    with pytest.raises(InputError, match=r"is not there .expected auto or cpu."):
        choose_device(name)


def test_memory_is_kept_where_that_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_freed_memory()
    keep_freed_memory()
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", None)  # not asked of any other C library
    keep_freed_memory()


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_f": True, "avx512_bf16": False}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)],
)
def test_bfloat16_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert computes_bfloat16(torch.device("cpu")) == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch 2.8
    assert not computes_bfloat16(torch.device("cpu"))
    assert not computes_bfloat16(torch.device("mps"))


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_where_the_asked_for_gpu_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    """Of two cards: not what the current one has."""
    cards = {0: (8, 6) if not expected else (7, 0), 1: capability}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cards[torch.device(device).index])
    assert computes_bfloat16(torch.device("cuda", 1)) == expected
    assert computes_bfloat16(torch.device("cuda", 0)) != expected
