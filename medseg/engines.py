"""What a network runs on: the device, the engine that computes it there, and its form in 8-bit integers.

An engine is a plain callable: (N, C, *patch) float32 tensor on the device to logits (N, classes, *patch), float32, on
the device. How far its logits may lie from those of torch, as a part of the largest logit, in precision ``32``:

==================  ==============================================================================================
``eager``           torch itself: 0
``compiled``        torch.compile: 1e-4
``onnx``            ONNX Runtime, on a CPU: 1e-4
``openvino``        OpenVINO, on a CPU: 1e-4
``openvino-int8``   OpenVINO with weights and activations of 8 bits, on a CPU: what it costs is measured for each
                    network, and kept beside it as ``Quantisation``
==================  ==============================================================================================

A trained network comes to 5e-7 to 3e-6. A tile of faint noise on one value, where instance norm divides by next to
nothing, comes to 5e-5, which is as far as torch itself lies from float64 there. ``bf16`` and ``16`` multiply with 8 and
11 bits.

A network is quantised once: ``quantised_network`` finds it in a folder beside its package, each file checked by its
digest, or makes it from calibration tiles and puts it there. Neither OpenVINO nor NNCF reports home from here.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import logging
import math
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medseg.errors import InputError
from medseg.records import Record, digest_of, write_bytes

log = logging.getLogger(__name__)

Float32 = NDArray[np.float32]
Engine = Callable[[Tensor], Tensor]

ENGINES: tuple[str, ...] = ("eager", "compiled", "onnx", "openvino", "openvino-int8")
PRECISIONS: tuple[str, ...] = ("32", "bf16", "16")
CALIBRATION_TILES = 8
"""On Task04 one tile cost as little Dice as 23; what a network has not seen calls for some more."""
LOW_AGREEMENT = 0.9
"""Below it a quantised network is warned of."""
_EXTRAS = {"onnx": "onnx", "openvino": "openvino", "openvino-int8": "int8"}
_MODULES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "openvino-int8": ("openvino", "nncf"),
}
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}
_SUFFIXES = (".xml", ".bin")
_MOMENT_MS = 200
"""For so long an engine computes before it looks whether it is asked to stop."""


@dataclass(frozen=True)
class Quantised:
    """A network in 8-bit integers, as OpenVINO's two files: ``topology`` (XML) and ``weights``."""

    topology: bytes
    weights: bytes

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of both."""
        return digest_of([hashlib.sha256(part).hexdigest() for part in (self.topology, self.weights)])


class Quantisation(Record):
    """How a quantised network came to be, and what it costs.

    Attributes:
        network: digest of the package with this network alone (``ModelPackage.only(fold).digest``).
        files: name -> SHA-256 of topology and weights.
        tiles: how many it was calibrated on.
        cases: the cases that those are of.
        agreement: Dice of the winners of the quantised network and the float32 one, both on the calibration tiles, mean
            over the classes; 1 is equal. None where neither found anything: then nothing is known.
        measured_cases: labelled cases, not those of the calibration, on which both Dices are measured.
        held_out: whether these pass for cases that the network was not trained on: the dataset is like that of the
            training in name, channels, labels and numbers of cases. Its files are not compared.
        dice_float32, dice_int8: mean Dice on those.
        dice_loss: the first minus the second.
        versions: of OpenVINO and NNCF; with others it is made anew.
    """

    network: str
    files: dict[str, str] = {}
    tiles: int
    cases: tuple[str, ...]
    agreement: float | None
    measured_cases: tuple[str, ...] = ()
    held_out: bool = False
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
        patch_size: two or three sizes; ``onnx`` and ``openvino`` take no other. Any number of patches at once.
        device: where tensors come from and go to.
        precision: ``32``; ``bf16``, or on a GPU ``16``, for products in fewer bits. ``onnx`` has 32 alone.
        quantised: the network in 8 bits, which ``openvino-int8`` needs.

    Raises:
        InputError: there is no such engine or precision, not on this device, its extra is not installed, it cannot
            run this network, or (compiled) there is no compiler.
    """
    check_engine(name, device, precision)
    network = network.to(device).eval()
    if name == "openvino-int8":
        if quantised is None:
            raise ValueError("openvino-int8 needs the quantised network")
        model = _openvino(name).Core().read_model(quantised.topology, quantised.weights)
        return _openvino_engine(model, precision)
    if name == "openvino":
        model = _converted(network, channels, patch_size, name)
        return _openvino_engine(_summed_by_axis(model) if precision == "32" else model, precision)
    if name == "onnx":
        return _onnx_engine(network, channels, patch_size)
    if device.type == "cpu":
        keep_freed_memory()
    if name == "compiled":
        return _compiled(network, torch.zeros(1, channels, *patch_size, device=device), precision)
    return _torch_engine(network, device, precision)


def default_engine(device: torch.device) -> str:
    """The fastest engine that keeps the labels: ``openvino`` on a CPU where it is installed, else ``eager``."""
    return "openvino" if device.type == "cpu" and importlib.util.find_spec("openvino") else "eager"


def check_engine(name: str, device: torch.device, precision: str = "32") -> None:
    """Refuse what ``build_engine`` cannot build, before there is a network.

    Raises:
        InputError: there is no such engine or precision, not on this device, or its extra is not installed.
    """
    if name not in ENGINES:
        raise InputError("--engine", f"there is no {name!r}", " or ".join(ENGINES))
    if name in _EXTRAS and device.type != "cpu":
        raise InputError(
            "--engine", f"{name!r} runs on a CPU, not on {device}", "eager or compiled", "add --device cpu"
        )
    allowed = ("32",) if name == "onnx" else ("32", "bf16") if device.type == "cpu" else PRECISIONS
    if precision not in allowed:
        raise InputError("--precision", f"{precision!r} is not for {name} on {device}", " or ".join(allowed))
    for module in _MODULES.get(name, ()):
        if importlib.util.find_spec(module) is None:  # looked for only: NNCF takes half a second to be imported
            raise _missing(module, name, f"no module named {module}")


def _brought(module: str, name: str) -> Any:
    """A module of an extra."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own dependencies
            return importlib.import_module(module)
    except ImportError as failure:
        raise _missing(module, name, str(failure)) from None


def _missing(module: str, name: str, reason: str) -> InputError:
    remedy = f'install it: pip install "medseg[{_EXTRAS[name]}]"'
    return InputError("--engine", f"{name!r} cannot be used: {reason}", f"{module} installed", remedy)


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Neither warnings nor messages of a library that writes progress and advice for its own users to the terminal."""
    its_log = logging.getLogger(logger)
    level = its_log.level
    its_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        its_log.setLevel(level)


# ---- torch ---------------------------------------------------------------------------------------------------------


def _torch_engine(network: Callable[[Tensor], Tensor], device: torch.device, precision: str) -> Engine:
    def run(x: Tensor) -> Tensor:
        fewer = torch.autocast(device.type, _DTYPES.get(precision), enabled=precision != "32")
        with torch.inference_mode(), fewer:
            return network(x).float()

    return run


def _compiled(network: nn.Module, x: Tensor, precision: str) -> Engine:
    """The compiled network, compiled for patches like ``x`` now rather than at the first tile."""
    try:
        with _quiet("torch"):
            # by itself torch leaves sizes open at the second patch size in a process, and then may fail
            engine = _torch_engine(torch.compile(network, dynamic=False), x.device, precision)
            engine(x)
    except RuntimeError as failure:  # torch's own errors of compilation are RuntimeErrors
        reason = str(failure).strip().splitlines()[0]
        raise InputError("--engine", f"cannot compile: {reason}", "a C++ compiler", "use --engine eager") from failure
    return engine


# ---- ONNX Runtime --------------------------------------------------------------------------------------------------


def _onnx_engine(network: nn.Module, channels: int, patch_size: Sequence[int]) -> Engine:
    runtime = _brought("onnxruntime", "onnx")
    runtime.disable_telemetry_events()  # of Windows
    with _quiet("torch.onnx"), torch.no_grad():
        program = torch.onnx.export(network, (torch.zeros(1, channels, *patch_size),), dynamo=True, verbose=False)
    if program is None:  # pragma: no cover - for the type checker: what the exporter of before returned
        raise ValueError("nothing was exported")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    model = program.model_proto.SerializeToString()
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        return torch.cat([torch.from_numpy(session.run(None, {given: one.numpy()})[0]) for one in torch.split(x, 1)])

    return run


# ---- OpenVINO ------------------------------------------------------------------------------------------------------


def _openvino(name: str) -> Any:
    """OpenVINO, unable to report home."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # both it and NNCF go without it
    if sender := sys.modules.get("openvino_telemetry.utils.sender"):  # the surrounding program brought it already
        sender.TelemetrySender.send = lambda *_: None
    return _brought("openvino", name)


def _converted(network: nn.Module, channels: int, patch_size: Sequence[int], name: str) -> Any:
    """The network as an OpenVINO model of one patch.

    It is traced with a patch as small as the network can take: sizes in the graph follow from those of the input, and a
    whole one would take the time and memory of several tiles.
    """
    openvino = _openvino(name)
    least = getattr(network, "divisor", patch_size)
    x = torch.zeros(1, channels, *(min(p, 2 * n) for p, n in zip(patch_size, least, strict=True)))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of branches that are taken once: a patch needs no padding
        # traced here, as OpenVINO has torch check it by two more runs
        traced = torch.jit.trace(network.cpu().eval(), x, check_trace=False)  # type: ignore[no-untyped-call]
        return openvino.convert_model(traced, example_input=x, input=[(1, channels, *patch_size)])


def _summed_by_axis(model: Any) -> Any:
    """An OpenVINO model with its instance norms in steps that lose nothing, for 4 % more time.

    As OpenVINO computes MVN behind a convolution, it adds up all voxels of a channel in one float32: of 100 000 of one
    sign the sum lacks the last three digits, and so do mean and deviation. Averages along one axis after another are
    sums of a few hundred; and unlike ReduceMean, which OpenVINO would make an MVN of again, AvgPool stays.
    """
    steps = importlib.import_module("openvino.opset13")

    def mean(x: Any, size: Sequence[int]) -> Any:
        for axis in reversed(range(len(size))):
            kernel = [n if a == axis else 1 for a, n in enumerate(size)]
            x = steps.avg_pool(x, kernel, [0] * len(size), [0] * len(size), kernel, exclude_pad=True)
        return x

    for norm in model.get_ordered_ops():
        if norm.get_type_name() != "MVN":
            continue
        x, (_, _, *size) = norm.input_value(0), norm.output(0).shape
        if norm.input_value(1).get_node().get_data().tolist() != list(range(2, 2 + len(size))):
            continue  # of another kind: a layer norm
        centred = steps.subtract(x, mean(x, size))
        variance = mean(steps.multiply(centred, centred), size)
        eps = steps.constant(np.float32(norm.get_attributes()["eps"]))
        scaled = steps.multiply(centred, steps.power(steps.add(variance, eps), steps.constant(np.float32(-0.5))))
        norm.output(0).replace(scaled.output(0))
    model.validate_nodes_and_infer_types()
    return model


def _openvino_engine(model: Any, precision: str) -> Engine:
    """An OpenVINO model of one patch as an engine, its logits channels last in memory."""
    openvino = _openvino("openvino")
    last = _brought("openvino.preprocess", "openvino").PrePostProcessor(model)
    axes = "DHW"[5 - len(model.output().shape) :]
    last.output().model().set_layout(openvino.Layout(f"NC{axes}"))
    last.output().tensor().set_layout(openvino.Layout(f"N{axes}C"))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",  # bf16 by itself where there is AMX
        "ENABLE_CPU_PINNING": False,  # two programs would take the same cores
    }
    compiled = openvino.Core().compile_model(last.build(), "CPU", settings)
    shape = tuple(compiled.output().shape)[1:]

    def run(x: Tensor) -> Tensor:
        logits = torch.empty(len(x), *shape)
        request = compiled.create_infer_request()  # one that was cancelled can run no more
        for one, out in zip(torch.split(x.contiguous(), 1), torch.split(logits, 1), strict=True):
            request.set_input_tensor(openvino.Tensor(one.numpy(), shared_memory=True))
            request.set_output_tensor(openvino.Tensor(out.numpy(), shared_memory=True))
            _wait(request)
        return logits.movedim(-1, 1)

    return run


def _wait(request: Any) -> None:
    """Run a request so that Ctrl-C is heard while it computes: Python hears signals between its own steps alone."""
    request.start_async()
    try:
        while not request.wait_for(_MOMENT_MS):
            pass
    except BaseException:
        request.cancel()
        with contextlib.suppress(RuntimeError):  # says that it was cancelled: now nothing writes into the logits
            request.wait()
        raise


# ---- 8-bit integers ------------------------------------------------------------------------------------------------


def tiles_of(image: Float32, patch_size: Sequence[int], count: int = CALIBRATION_TILES) -> list[Float32]:
    """Up to ``count`` tiles (C, *patch) spread at random over a prepared image (C, D, H, W): the same every time.

    Of the tiles that half overlap and cover the image, those of one value come last: they say nothing of what the
    network computes. An image smaller than a patch has zeros around it.
    """
    patch = (1, *patch_size)[-3:]
    missing = [max(0, p - n) for p, n in zip(patch, image.shape[1:], strict=True)]
    image = np.pad(image, [(0, 0), *((m // 2, m - m // 2) for m in missing)])
    steps = [range(0, n - p + 1, max(1, p // 2)) for n, p in zip(image.shape[1:], patch, strict=True)]
    corners = list(itertools.product(*steps))
    varied: list[Float32] = []
    uniform: list[Float32] = []
    for n in np.random.default_rng(0).permutation(len(corners)):
        tile = image[(slice(None), *(slice(c, c + p) for c, p in zip(corners[n], patch, strict=True)))]
        (varied if (np.ptp(tile, axis=(1, 2, 3)) > 0).any() else uniform).append(tile)
        if len(varied) == count:
            break
    chosen = [*varied, *uniform][:count]
    return [np.ascontiguousarray(tile.reshape(-1, *patch_size)) for tile in chosen]


def quantise_network(
    network: nn.Module, channels: int, patch_size: Sequence[int], tiles: Sequence[Float32]
) -> Quantised:
    """A network in 8-bit integers, calibrated on tiles (C, *patch) of prepared cases.

    Raises:
        InputError: OpenVINO or NNCF is not installed.
    """
    openvino = _openvino("openvino-int8")
    nncf = _brought("nncf", "openvino-int8")
    model = _converted(network, channels, patch_size, "openvino-int8")
    samples = nncf.Dataset([tile[np.newaxis] for tile in tiles])
    with _quiet("nncf"), tempfile.TemporaryDirectory() as folder:
        small = nncf.quantize(model, samples, preset=nncf.QuantizationPreset.PERFORMANCE, subset_size=len(tiles))
        path = Path(folder, "network.xml")
        openvino.save_model(small, path, compress_to_fp16=False)
        return Quantised(path.read_bytes(), path.with_suffix(".bin").read_bytes())


def int8_folder(package: Path) -> Path:
    """Where the quantised networks of a package are kept: ``int8`` in its folder, or ``NAME-int8`` beside its zip."""
    return package / "int8" if package.is_dir() else package.with_name(f"{package.stem}-int8")


def quantised_network(
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
    """The quantised network of a digest: from the folder, or else made of tiles and kept there.

    What is in the folder is verified; where it is damaged, or of other versions of OpenVINO and NNCF, it is made anew,
    and where the folder cannot be written to it is kept in memory only, with a warning.

    Args:
        network: in evaluation mode on the CPU.
        channels: of its input.
        patch_size: two or three sizes.
        digest: of the package with this network alone (``ModelPackage.only(fold).digest``).
        folder: ``int8_folder`` of the package; None keeps nothing.
        tiles: called where calibration is needed: (C, *patch) each, as from ``tiles_of``.
        cases: ids of the cases that the tiles are of, for the record.
        regions: whether channels are regions (positive logits win) rather than classes (the largest wins).

    Raises:
        InputError: OpenVINO or NNCF is not installed.
    """
    known = load_quantised(folder, digest) if folder else None
    if known:
        return known[0]
    chosen = tiles()
    result = quantise_network(network, channels, patch_size, chosen)
    record = describe(result, network, chosen, digest=digest, cases=cases, regions=regions)
    log.info("quantised with %d tiles of %s: agreement %s", len(chosen), ", ".join(cases), record.agreement)
    if folder:
        try:
            keep_quantised(folder, result, record)
        except OSError as failure:
            log.warning("%s: the quantised network is not kept: %s", folder, failure)
    return result


def describe(
    quantised: Quantised,
    network: nn.Module,
    tiles: Sequence[Float32],
    *,
    digest: str,
    cases: Sequence[str],
    regions: bool,
) -> Quantisation:
    """The record of a quantised network, its agreement with the network measured on tiles.

    Where that is low, or where neither of them found anything on the tiles, a warning says so.
    """
    cpu = torch.device("cpu")
    channels, *patch_size = tiles[0].shape
    exact = build_engine("openvino", network, channels, patch_size, device=cpu)
    small = build_engine("openvino-int8", network, channels, patch_size, device=cpu, quantised=quantised)
    both = [
        [_winners(engine(torch.from_numpy(tile[np.newaxis])), regions) for engine in (exact, small)] for tile in tiles
    ]
    overlap = sum((a & b).flatten(1).sum(1) for a, b in both)
    sizes = sum((a.flatten(1).sum(1) + b.flatten(1).sum(1)) for a, b in both)
    dices = [2 * o / s for o, s in zip(overlap.tolist(), sizes.tolist(), strict=True) if s]  # type: ignore[union-attr]
    agreement = math.fsum(dices) / len(dices) if dices else None
    if agreement is None:
        log.warning("the network finds nothing on the calibration tiles: what 8 bits cost is not known")
    elif agreement < LOW_AGREEMENT:
        log.warning("in 8 bits the network agrees with itself by %.2f alone (Dice on the calibration tiles)", agreement)
    return Quantisation(network=digest, tiles=len(tiles), cases=tuple(cases), agreement=agreement, versions=_versions())


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("openvino", "nncf")}


def load_quantised(folder: Path, digest: str) -> tuple[Quantised, Quantisation] | None:
    """What ``keep_quantised`` put in a folder.

    None where there is nothing, or what other versions of OpenVINO and NNCF made, or, with a warning, what is damaged.
    """
    path = _record_path(folder, digest)
    if not path.exists():
        return None
    try:
        record = Quantisation.load(path)
        contents = [path.with_suffix(suffix).read_bytes() for suffix in _SUFFIXES]
    except (InputError, OSError) as failure:
        log.warning("%s: the quantised network cannot be read, and is made anew: %s", path, failure)
        return None
    digests = {
        path.with_suffix(s).name: hashlib.sha256(c).hexdigest() for s, c in zip(_SUFFIXES, contents, strict=True)
    }
    if record.network != digest or record.files != digests:
        log.warning("%s: the quantised network is damaged or another's, and is made anew", path)
        return None
    if record.versions != _versions():
        log.info("%s: the quantised network is of %s, and is made anew", path, record.versions)
        return None
    return Quantised(*contents), record


def keep_quantised(folder: Path, quantised: Quantised, record: Quantisation) -> Quantisation:
    """Write a quantised network and its record, which comes last; the record with the files' digests.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = _record_path(folder, record.network)
    contents = dict(zip(_SUFFIXES, (quantised.topology, quantised.weights), strict=True))
    for suffix, content in contents.items():
        write_bytes(path.with_suffix(suffix), content)
    files = {path.with_suffix(s).name: hashlib.sha256(c).hexdigest() for s, c in contents.items()}
    record = record.model_copy(update={"files": files})
    record.save(path)
    return record


def _record_path(folder: Path, digest: str) -> Path:
    return folder / f"{digest[:12]}.json"


def _winners(logits: Tensor, regions: bool) -> Tensor:
    """Where each class but the background, or each region, wins: bool (classes, *patch) of logits (1, classes, ...)."""
    if regions:
        return logits[0] > 0
    return torch.stack([logits[0].argmax(0) == n for n in range(1, logits.shape[1])])


# ---- the device ----------------------------------------------------------------------------------------------------


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
