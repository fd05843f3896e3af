"""What a network runs on: the device, and the memory behaviour of the process that holds it."""

from __future__ import annotations

import ctypes
import platform

import torch

from medseg.errors import InputError


def choose_device(name: str) -> torch.device:
    """The device of a name: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Raises:
        InputError: a named device that this machine does not have.
    """
    available = ["cpu"]
    if torch.cuda.is_available():
        available += ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        available.append("mps")
    if name == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if name in available))
    if name not in available:
        raise InputError("--device", f"{name!r} is not there", " or ".join(["auto", *available]))
    return torch.device(name)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware: then training in it is nearly twice as fast as in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8  # NVIDIA Ampere; older ones emulate it
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # torch 2.8 cannot tell
        return False
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks rather than give them back to the system at every step.

    Activations are freed and allocated again at each step; without this a training on a CPU spends up to a third of its
    time in page faults. Elsewhere than on glibc it does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, most) or libc.mallopt(mmap_threshold, 2**25)  # older glibc takes 32 MiB at most
    libc.mallopt(trim_threshold, most)
