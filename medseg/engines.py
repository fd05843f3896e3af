"""What a network runs on: the device, the engine that computes it there, and its form in 8-bit integers.

An engine is a plain callable: (N, C, *patch) float32 tensor on the device to logits (N, classes, *patch), float32, on
the device. How far its logits may lie from those of torch in float32:

==================  ==============================================================================================
``eager``           torch itself: 0
``compiled``        torch.compile: 1e-4
``onnx``            ONNX Runtime, on a CPU: 1e-4
``openvino``        OpenVINO, on a CPU: 1e-4
``openvino-int8``   OpenVINO with weights and activations of 8 bits, on a CPU: what it costs is measured for each
                    network, and kept beside it as ``Quantisation``
==================  ==============================================================================================

They hold for logits of the order of 10 in precision ``32``; ``bf16`` and ``16`` multiply with 8 and 11 significant bits.

A network is quantised once: ``quantised`` finds it in a folder beside its package, where every file is checked by its
digest, or makes it from calibration tiles and puts it there. Neither OpenVINO nor NNCF reports to its makers from here.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import logging
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medseg.errors import InputError
from medseg.records import Record, digest_file, write_bytes

log = logging.getLogger(__name__)

Float32 = NDArray[np.float32]
Engine = Callable[[Tensor], Tensor]

ENGINES: tuple[str, ...] = ("eager", "compiled", "onnx", "openvino", "openvino-int8")
PRECISIONS: tuple[str, ...] = ("32", "bf16", "16")
CALIBRATION_TILES = 32
_CPU_ONLY = ("onnx", "openvino", "openvino-int8")
_EXTRAS = {"onnx": "onnx", "openvino": "openvino", "openvino-int8": "int8"}
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}
_MOMENT_MS = 200
"""For so long an engine computes before it looks whether it is asked to stop."""


@dataclass(frozen=True)
class Quantised:
    """A network in 8-bit integers, as OpenVINO's two files: ``topology`` (XML) and ``weights``."""

    topology: bytes
    weights: bytes


class Quantisation(Record):
    """How a quantised network came to be, and what it costs.

    Attributes:
        network: digest of the package with this network alone (``ModelPackage.only(fold).digest``).
        files: name -> SHA-256 of topology and weights.
        tiles: how many it was calibrated on.
        cases: the cases that those are of.
        agreement: Dice of the winners of the quantised network and the float32 one, both on the calibration tiles, mean
            over the classes; 1 is equal.
        measured_cases: labelled cases, seen by neither training nor calibration, on which both Dices are measured.
        dice_float32, dice_int8: mean Dice on those.
        dice_loss: the first minus the second.
        versions: of OpenVINO and NNCF.
    """

    network: str
    files: dict[str, str] = {}
    tiles: int
    cases: tuple[str, ...]
    agreement: float
    measured_cases: tuple[str, ...] = ()
    dice_float32: float | None = None
    dice_int8: float | None = None
    dice_loss: float | None = None
    versions: dict[str, str]


def build_engine(
    name: str,
    network: nn.Module,
    channels: int,
    patch_size: Sequence[int],
    *,
    device: torch.device,
    precision: str = "32",
    quantised: Quantised | None = None,
) -> Engine:
    """A network as a plain callable.

    Args:
        name: one of ``ENGINES``.
        network: is put on the device, in evaluation mode.
        channels: of its input.
        patch_size: two or three sizes; ``onnx`` and ``openvino`` take no other.
        device: where tensors come from and go to.
        precision: ``32``; ``bf16``, or on a GPU ``16``, for products in fewer bits.
        quantised: the network in 8 bits, which ``openvino-int8`` needs.

    Raises:
        InputError: there is no such engine or precision, not on this device, its extra is not installed, or (compiled)
            there is no compiler.
    """
    raise NotImplementedError


def default_engine(device: torch.device) -> str:
    """The fastest engine that keeps the labels: ``openvino`` on a CPU where it is installed, else ``eager``."""
    raise NotImplementedError


def tiles_of(image: Float32, patch_size: Sequence[int], count: int = CALIBRATION_TILES) -> list[Float32]:
    """Up to ``count`` tiles (C, *patch) spread evenly over a prepared image (C, D, H, W): the same ones every time."""
    raise NotImplementedError


def quantise_network(
    network: nn.Module, channels: int, patch_size: Sequence[int], tiles: Sequence[Float32]
) -> Quantised:
    """A network in 8-bit integers, calibrated on tiles (C, *patch) of prepared cases."""
    raise NotImplementedError


def int8_folder(package: Path) -> Path:
    """Where the quantised networks of a package are kept: inside its folder, or beside its zip."""
    raise NotImplementedError


def quantised(
    network: nn.Module,
    channels: int,
    patch_size: Sequence[int],
    *,
    digest: str,
    folder: Path | None,
    tiles: Callable[[], Sequence[Float32]],
    cases: Sequence[str],
    regions: bool = False,
) -> Quantised:
    """The quantised network of a digest: from the folder, or made of tiles and kept there.

    What is in the folder is verified; where it is damaged it is made anew, and where the folder cannot be written to it
    is kept in memory only, both with a warning.

    Args:
        network, channels, patch_size: as for ``build_engine``.
        digest: of the package with this network alone (``ModelPackage.only(fold).digest``).
        folder: ``int8_folder`` of the package; None keeps nothing.
        tiles: called where calibration is needed: (C, *patch) each, as from ``tiles_of``.
        cases: ids of the cases that the tiles are of, for the record.
        regions: whether channels are regions (positive logits win) rather than classes (the largest wins).
    """
    raise NotImplementedError


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
