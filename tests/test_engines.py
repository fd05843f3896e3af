"""Devices by name, networks as callables, and their quantised form beside the package."""

from __future__ import annotations

import copy
import hashlib
import logging
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg import cli, engines
from medseg.engines import (
    ENGINES,
    PRECISIONS,
    Quantisation,
    Quantised,
    build_engine,
    check_engine,
    choose_device,
    computes_bfloat16,
    default_engine,
    describe,
    int8_folder,
    keep_freed_memory,
    keep_quantised,
    load_quantised,
    quantise_network,
    quantised_network,
    tiles_of,
)
from medseg.errors import InputError
from medseg.networks import ARCHITECTURES

CPU = torch.device("cpu")
PATCH = {2: (8, 12), 3: (8, 12, 8)}
DIGEST = "0123456789abcdef" * 4


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


# ---- engines -------------------------------------------------------------------------------------------------------


def tiny(name: str = "unet", dims: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return ARCHITECTURES[name](dims, 2, 3, features=(4, 6)).eval()


def patches(dims: int, count: int = 2) -> Tensor:
    """Mirrored, as the sliding window does it: not in the order of memory."""
    torch.manual_seed(1)
    return torch.randn(count, 2, *PATCH[dims]).flip(2)


def logits(network: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        result: Tensor = network(x)
    return result


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_every_network_in_every_engine(name: str, dims: int, engine: str) -> None:
    network, x = tiny(name, dims), patches(dims)
    built = build_engine(engine, network, 2, PATCH[dims], device=CPU)
    expected, found = logits(network, x), built(x)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    off = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, atol=off, rtol=0)
    torch.testing.assert_close(built(x[1:]), expected[1:], atol=off, rtol=0)  # any number of patches
    torch.testing.assert_close(found, expected, atol=off, rtol=0)  # and no later call writes into an earlier result


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_large_tiles_of_faint_noise(engine: str) -> None:
    """Air in a CT: 64 000 voxels near one value. Sums of them in one float32 would be off by a hundredth and more."""
    torch.manual_seed(0)
    network, patch = ARCHITECTURES["unet"](3, 1, 3, features=(8, 8)), (40, 40, 40)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.abs_()
    x = 0.02 * torch.randn(1, 1, *patch) - 1.5
    expected = logits(copy.deepcopy(network).double().eval(), x.double())
    found = build_engine(engine, network, 1, patch, device=CPU)(x)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_only_instance_norms_are_summed_otherwise() -> None:
    norms = nn.Sequential(nn.LayerNorm(12), nn.InstanceNorm2d(2, affine=True, eps=0.5), nn.InstanceNorm2d(2)).eval()
    model = engines._converted(norms, 2, PATCH[2], "openvino")
    kinds = [op.get_type_name() for op in engines._summed_by_axis(model).get_ordered_ops()]
    assert (kinds.count("MVN"), kinds.count("AvgPool")) == (1, 8)  # mean and variance of two norms and two axes
    found = build_engine("openvino", norms, 2, PATCH[2], device=CPU)(patches(2))
    torch.testing.assert_close(found, logits(norms, patches(2)), atol=1e-5, rtol=0)


def test_no_step_of_the_graph_does_nothing() -> None:
    """Neither padding nor cropping, as a patch needs none."""
    model = engines._converted(tiny(dims=3), 2, PATCH[3], "openvino")
    kinds = {op.get_type_name() for op in model.get_ordered_ops()}
    assert kinds - {"Parameter", "Constant", "Result"} == {
        "Convolution", "MVN", "PRelu", "ConvolutionBackpropData", "Concat",
    }  # fmt: skip


@pytest.mark.parametrize("dims", [2, 3])
def test_openvino_gives_channels_last(dims: int) -> None:
    """The sliding window sums them so; then it has nothing to turn."""
    found = build_engine("openvino", tiny(dims=dims), 2, PATCH[dims], device=CPU)(patches(dims))
    assert found.movedim(1, -1).is_contiguous()


def test_eager_is_the_network_itself() -> None:
    network = tiny("residual_unet").train()
    found = build_engine("eager", network, 2, PATCH[2], device=CPU)(patches(2))
    assert not network.training
    assert torch.equal(found, logits(network, patches(2)))


@pytest.mark.parametrize("engine", ["eager", "openvino"])
def test_bfloat16_is_near_and_another(engine: str) -> None:
    if engine == "openvino" and not computes_bfloat16(CPU):
        pytest.skip("this processor has no bfloat16, and OpenVINO leaves it then")
    network, x = tiny(dims=3), patches(3)
    found = build_engine(engine, network, 2, PATCH[3], device=CPU, precision="bf16")(x)
    assert found.dtype == torch.float32
    assert 1e-4 < (found - logits(network, x)).abs().max() < 0.2


@pytest.mark.slow  # the compiler takes twenty seconds
def test_compiled() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()).eval()
    found = build_engine("compiled", network, 2, PATCH[2], device=CPU)(patches(2))
    torch.testing.assert_close(found, logits(network, patches(2)), atol=1e-4, rtol=0)


def test_each_patch_size_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a cascade. Torch, left to itself, leaves the sizes open the second time, and then may fail."""
    asked = []

    def note(network: nn.Module, **more: Any) -> nn.Module:
        asked.append(more)
        return network

    monkeypatch.setattr(torch, "compile", note)
    build_engine("compiled", tiny(), 2, PATCH[2], device=CPU)
    assert asked == [{"dynamic": False}]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("No working C++ compiler found\nand many lines more")

    monkeypatch.setattr(torch, "compile", lambda network, dynamic: fail)
    with pytest.raises(InputError, match=r"cannot compile: No working C\+\+ compiler found .expected.*--engine eager"):
        build_engine("compiled", tiny(), 2, PATCH[2], device=CPU)


@pytest.mark.parametrize(
    ("engine", "module", "extra"),
    [
        ("onnx", "onnxruntime", "onnx"),
        ("onnx", "onnxscript", "onnx"),
        ("openvino", "openvino", "openvino"),
        ("openvino-int8", "nncf", "int8"),
    ],
)
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, engine: str, module: str, extra: str) -> None:
    check_engine(engine, CPU)
    monkeypatch.setitem(sys.modules, module, None)
    for build in (check_engine, lambda name, device: build_engine(name, tiny(), 2, PATCH[2], device=device)):
        with pytest.raises(InputError, match=rf'pip install "medseg\[{extra}\]"'):
            build(engine, CPU)


def test_a_missing_nncf_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(InputError, match=r'pip install "medseg\[int8\]"'):
        quantise_network(tiny(), 2, PATCH[2], tiles(2))


def test_the_command_line_has_the_same_names() -> None:
    """It writes them out, as it must start without torch."""
    choices = get_type_hints(cli.predict)
    assert get_args(choices["engine"]) == ("auto", *ENGINES)
    assert get_args(choices["precision"]) == PRECISIONS


@pytest.mark.parametrize(
    ("name", "device", "precision", "message"),
    [
        ("fast", "cpu", "32", "there is no 'fast' .expected eager or compiled or onnx or openvino or openvino-int8"),
        ("openvino", "cuda", "32", "'openvino' runs on a CPU, not on cuda"),
        ("eager", "cpu", "16", "'16' is not for eager on cpu .expected 32 or bf16"),
        ("onnx", "cpu", "bf16", "'bf16' is not for onnx on cpu .expected 32"),
        ("eager", "cuda", "8", "'8' is not for eager on cuda .expected 32 or bf16 or 16"),
    ],
)
def test_what_does_not_go_together(name: str, device: str, precision: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_engine(name, torch.device(device), precision)
    with pytest.raises(InputError, match=message):
        build_engine(name, tiny(), 2, PATCH[2], device=torch.device(device), precision=precision)


def test_the_default_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_engine(CPU) == "openvino"
    assert default_engine(torch.device("cuda")) == "eager"
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert default_engine(CPU) == "eager"
    assert default_engine(CPU) in ENGINES


class Slow:
    """A request that is not done when it is asked twice, and is interrupted at the third time if it shall be."""

    def __init__(self, interrupted: bool) -> None:
        self.interrupted = interrupted
        self.calls: list[str] = []

    def start_async(self) -> None:
        self.calls.append("start")

    def wait_for(self, milliseconds: int) -> bool:
        assert milliseconds < 1000
        self.calls.append("wait")
        if self.interrupted and len(self.calls) == 4:
            raise KeyboardInterrupt
        return len(self.calls) == 4

    def cancel(self) -> None:
        self.calls.append("cancel")

    def wait(self) -> None:
        self.calls.append("ended")
        raise RuntimeError("Infer Request was canceled")


def test_a_long_tile_can_be_interrupted() -> None:
    request = Slow(interrupted=False)
    engines._wait(request)
    assert request.calls == ["start", "wait", "wait", "wait"]
    request = Slow(interrupted=True)
    with pytest.raises(KeyboardInterrupt):
        engines._wait(request)
    assert request.calls[-2:] == ["cancel", "ended"]


# ---- 8-bit integers ------------------------------------------------------------------------------------------------


def tiles(dims: int, count: int = 2) -> list[Any]:
    return list(np.random.default_rng(2).normal(size=(count, 2, *PATCH[dims])).astype(np.float32))


def test_tiles_are_spread_over_an_image_and_always_the_same() -> None:
    image = np.arange(8 * 6 * 4, dtype=np.float32).reshape(1, 8, 6, 4)
    found = tiles_of(image, (4, 4, 4), 100)
    corners = sorted(int(tile.flat[0]) for tile in found)  # starts 0, 2, 4 and 0, 2 and 0: in steps of half a tile
    assert corners == [0, 8, 48, 56, 96, 104]
    few = tiles_of(image, (4, 4, 4), 3)
    assert [tile.tobytes() for tile in few] == [tile.tobytes() for tile in found[:3]]
    assert few[0].shape == (1, 4, 4, 4)


def test_tiles_of_one_value_come_last() -> None:
    """Two channels; of the starts 0, 2, 4, 6, 8 along the first axis only 4 and 6 hold the voxel that differs."""
    image = np.stack([np.zeros((12, 4, 4)), np.ones((12, 4, 4))]).astype(np.float32)
    image[1, 7] = 5
    found = tiles_of(image, (4, 4, 4), 3)
    assert [float(tile.max()) for tile in found] == [5, 5, 1]
    assert {np.flatnonzero(tile[1, :, 0, 0] == 5).item() for tile in found[:2]} == {1, 3}


def test_tiles_of_a_small_image_and_of_slices() -> None:
    image = np.ones((2, 3, 2, 2), dtype=np.float32)
    (whole,) = tiles_of(image, (4, 4, 4))
    assert whole.shape == (2, 4, 4, 4)
    assert whole[:, :3, 1:3, 1:3].sum() == whole.sum() == 24
    flat = tiles_of(image, (2, 2))
    assert [tile.shape for tile in flat] == [(2, 2, 2)] * 3


@pytest.mark.parametrize(("dims", "name"), [(2, "attention_unet"), (3, "unet")])
def test_quantised_is_near_and_smaller(dims: int, name: str) -> None:
    network, x = tiny(name, dims), torch.from_numpy(np.stack(tiles(dims)))
    small = quantise_network(network, 2, PATCH[dims], tiles(dims))
    found = build_engine("openvino-int8", network, 2, PATCH[dims], device=CPU, quantised=small)(x)
    expected = logits(network, x)
    assert found.shape == expected.shape
    assert 1e-4 < (found - expected).abs().mean() < 0.1 * expected.abs().mean() + 0.05
    assert b"FakeQuantize" in small.topology
    record = describe(small, network, tiles(dims), digest=DIGEST, cases=["a"], regions=False)
    assert record.agreement is not None
    assert 0.5 < record.agreement < 1  # of random weights, whose logits lie close together
    assert (record.tiles, record.cases, record.network) == (2, ("a",), DIGEST)
    assert set(record.versions) == {"openvino", "nncf"}


def test_int8_needs_the_quantised_network() -> None:
    with pytest.raises(ValueError, match="needs the quantised network"):
        build_engine("openvino-int8", tiny(), 2, PATCH[2], device=CPU)


@pytest.mark.parametrize(
    ("regions", "expected"),
    [(False, [[0, 1, 0], [0, 0, 1]]), (True, [[1, 0, 0], [0, 1, 0], [0, 1, 1]])],
)
def test_winners(regions: bool, expected: list[list[int]]) -> None:
    values = torch.tensor([[[2.0, -1.0, -3.0], [-1.0, 5.0, -1.0], [1.0, 4.0, 1.0]]])
    if regions:
        values[0, 2, 0] = -1.0
    assert engines._winners(values, regions).int().tolist() == expected


def test_agreement_by_hand(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Class 1: 2 and 1 voxels, 1 common: 2/3. Class 2: 1 and 2, 1 common: 2/3. Region 3 has none at all."""
    exact = torch.tensor([[[0.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [-1, -1, -1, -1]]])
    small = torch.tensor([[[0.0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [-1, -1, -1, -1]]])
    both = {"openvino": exact, "openvino-int8": small}
    monkeypatch.setattr(engines, "build_engine", lambda name, *_, **__: lambda x: both[name])
    record = describe(Quantised(b"", b""), tiny(), tiles(2, 1), digest=DIGEST, cases=[], regions=False)
    assert record.agreement == pytest.approx(2 / 3)
    assert "agrees with itself by 0.67 alone" in caplog.text


@pytest.mark.parametrize(("inside", "agreement", "warned"), [(1.0, 1.0, False), (-1.0, None, True)])
def test_nothing_found_is_no_agreement(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    inside: float,
    agreement: float | None,
    warned: bool,
) -> None:
    found = torch.tensor([[[0.0, 0, 0], [inside, -1, -1]]])
    monkeypatch.setattr(engines, "build_engine", lambda *_, **__: lambda x: found)
    record = describe(Quantised(b"", b""), tiny(), tiles(2, 1), digest=DIGEST, cases=[], regions=False)
    assert record.agreement == agreement
    assert ("finds nothing on the calibration tiles" in caplog.text) == warned


def test_the_digest_of_a_quantised_network() -> None:
    one = Quantised(b"xml", b"bin")
    assert len(one.digest) == 64
    assert one.digest == Quantised(b"xml", b"bin").digest
    others = [Quantised(b"xml", b"bim"), Quantised(b"xmlb", b"in"), Quantised(b"bin", b"xml")]
    assert len({one.digest, *(other.digest for other in others)}) == 4


def test_where_quantiseds_are_kept(tmp_path: Path) -> None:
    assert int8_folder(tmp_path) == tmp_path / "int8"
    assert int8_folder(tmp_path / "liver.zip") == tmp_path / "liver-int8"


def kept(folder: Path) -> Quantisation:
    record = Quantisation(network=DIGEST, tiles=2, cases=("a",), agreement=0.99, versions=engines._versions())
    return keep_quantised(folder, Quantised(b"xml", b"bin"), record)


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    assert load_quantised(tmp_path / "int8", DIGEST) is None
    record = kept(tmp_path / "int8")
    assert record.files == {
        "0123456789ab.xml": hashlib.sha256(b"xml").hexdigest(),
        "0123456789ab.bin": hashlib.sha256(b"bin").hexdigest(),
    }
    assert load_quantised(tmp_path / "int8", DIGEST) == (Quantised(b"xml", b"bin"), record)
    assert sorted(path.suffix for path in (tmp_path / "int8").iterdir()) == [".bin", ".json", ".xml"]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.with_suffix(".bin").write_bytes(b"bim"), "is damaged or another's"),
        (lambda path: path.with_suffix(".xml").unlink(), "cannot be read"),
        (lambda path: path.write_text("{}"), "cannot be read"),
        (lambda path: path.write_text(path.read_text().replace(DIGEST, "0123456789ab")), "is damaged or another's"),
    ],
)
def test_what_is_damaged_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], Any], message: str
) -> None:
    kept(tmp_path)
    harm(tmp_path / "0123456789ab.json")
    assert load_quantised(tmp_path, DIGEST) is None
    assert message in caplog.text
    assert "made anew" in caplog.text


@pytest.mark.parametrize("name", ["openvino", "nncf"])
def test_what_another_version_made_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kept(tmp_path)
    monkeypatch.setattr(engines, "_versions", lambda: {"openvino": "2026.4.1", "nncf": "3.4.0"} | {name: "1"})
    assert load_quantised(tmp_path, DIGEST) is None


class Source:
    """Calibration tiles, and how often they were asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> Sequence[Any]:
        self.asked += 1
        return tiles(2)


def test_a_network_is_quantised_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network, source, folder = tiny(), Source(), tmp_path / "int8"

    def result() -> Quantised:
        return quantised_network(
            network, 2, PATCH[2], digest=DIGEST, folder=folder, tiles=source, cases=["a"], regions=True
        )

    first = result()
    assert result() == first
    assert source.asked == 1
    (folder / "0123456789ab.xml").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        again = result()
    assert source.asked == 2
    assert "made anew" in caplog.text
    assert load_quantised(folder, DIGEST) == (again, Quantisation.load(folder / "0123456789ab.json"))


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "quantise_network", lambda *_: Quantised(b"xml", b"bin"))
    record = Quantisation(network=DIGEST, tiles=2, cases=(), agreement=1, versions={})
    monkeypatch.setattr(engines, "describe", lambda *_, **__: record)
    (tmp_path / "int8").write_text("a file where the folder should be")
    for folder in (tmp_path / "int8", None):
        caplog.clear()
        found = quantised_network(
            tiny(), 2, PATCH[2], digest=DIGEST, folder=folder, tiles=Source(), cases=["a"], regions=False
        )
        assert found == Quantised(b"xml", b"bin")
        assert ("is not kept" in caplog.text) == (folder is not None)


QUIET = """
import sys
import numpy as np, torch
from torch import nn
from medseg.engines import build_engine, quantise_network
seen = []
doors = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "os.fork", "os.posix_spawn", "subprocess.Popen")
sys.addaudithook(lambda event, arguments: seen.append(event) if event in doors else None)
network = nn.Conv2d(1, 2, 3, padding=1).eval()
tiles = [np.ones((1, 8, 8), np.float32)]
small = quantise_network(network, 1, (8, 8), tiles)
for name in ("openvino", "openvino-int8"):
    build_engine(name, network, 1, (8, 8), device=torch.device("cpu"), quantised=small)
import nncf.telemetry.wrapper as wrapper
assert type(wrapper.telemetry).__name__ == "MagicMock", wrapper.telemetry
sys.exit(", ".join(seen) or 0)
"""


def test_nothing_is_sent_and_nothing_is_printed(tmp_path: Path) -> None:
    """In a process of its own: NNCF is silent where it sees pytest. Home would get a folder with an id."""
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", QUIET], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_telemetry_that_the_surrounding_program_brought_is_silent_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class TelemetrySender:
        def send(self, backend: object, message: object) -> None:
            raise AssertionError("sent")

    module = types.ModuleType("openvino_telemetry.utils.sender")
    module.TelemetrySender = TelemetrySender  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    engines._openvino("openvino")
    TelemetrySender().send("backend", "message")
