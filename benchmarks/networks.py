"""Training step and forward time of the plain U-Net beside its peers, at equal topology, interleaved in one process.

    pip install --no-deps dynamic-network-architectures
    python benchmarks/networks.py

Every network is a U-Net of the same stages and widths (3D: the four that nnU-Net plans for Decathlon Task04, 32 to 256
features; 2D: six, 32 to 512), two convolutions of 3 a stage, instance norm and leaky ReLU, without deep supervision.
BasicUNet has its own fixed topology (five stages, pooling): its widths are as near as can be, and its parameters are
printed. One round times every network once; the table has the medians over the rounds, and medseg's over each peer's.
Peak memory is measured in a process of its own, as what training steps add to the resident set. Absent peers are left
out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

PATCHES = {2: (4, 1, 256, 256), 3: (2, 1, 40, 56, 40)}
FEATURES = {2: (32, 64, 128, 256, 512, 512), 3: (32, 64, 128, 256)}
CLASSES = 3


def medseg_unet(dims: int) -> nn.Module:
    from medseg.networks import UNet

    return UNet(dims, PATCHES[dims][1], CLASSES, FEATURES[dims])


def nnunet(dims: int) -> nn.Module:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    features, conv = FEATURES[dims], nn.Conv2d if dims == 2 else nn.Conv3d
    stages = len(features)
    return PlainConvUNet(
        PATCHES[dims][1], stages, features, conv, 3, [1] + [2] * (stages - 1), 2, CLASSES, 2,
        conv_bias=True, norm_op=nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip


def dynunet(dims: int) -> nn.Module:
    from monai.networks.nets import DynUNet

    features = FEATURES[dims]
    strides = [1] + [2] * (len(features) - 1)
    return DynUNet(
        dims, PATCHES[dims][1], CLASSES, [3] * len(features), strides, strides[1:], filters=features,
        norm_name=("INSTANCE", {"affine": True}),
    )  # fmt: skip


def basicunet(dims: int) -> nn.Module:
    from monai.networks.nets import BasicUNet

    # Five stages are fixed: the widths of the others' first five, or of their four and the last again.
    features = (*FEATURES[dims], *[FEATURES[dims][-1]] * 5)[:5]
    return BasicUNet(dims, PATCHES[dims][1], CLASSES, (*features, features[0]))


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "medseg UNet": (medseg_unet, "medseg"),
    "nnU-Net PlainConvUNet": (nnunet, "dynamic_network_architectures"),
    "MONAI DynUNet": (dynunet, "monai"),
    "MONAI BasicUNet": (basicunet, "monai"),
}


def train_step(network: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Forward, cross-entropy, backward."""
    network.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(network(x), labels).backward()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def batch_of(dims: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PATCHES[dims], generator=generator)
    labels = torch.randint(0, CLASSES, (x.shape[0], *x.shape[2:]), generator=generator)
    return x.to(device), labels.to(device)


def compare(dims: int, rounds: int, device: torch.device) -> None:
    names = [name for name, (_, package) in NETWORKS.items() if importlib.util.find_spec(package)]
    torch.manual_seed(0)
    networks = {name: NETWORKS[name][0](dims).to(device) for name in names}
    x, labels = batch_of(dims, device)
    step: dict[str, list[float]] = {name: [] for name in names}
    forward: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        for name, network in networks.items():
            network.train()
            took = seconds(lambda network=network: train_step(network, x, labels), device)
            network.eval()
            with torch.inference_mode():
                looked = seconds(lambda network=network: network(x), device)
            if round_:  # the first is for warming up
                step[name].append(took)
                forward[name].append(looked)
    memory = {name: peak_memory(name, dims, device) for name in names}
    own_step, own_forward = statistics.median(step[names[0]]), statistics.median(forward[names[0]])
    print(f"\n{dims}D, batch {'x'.join(map(str, PATCHES[dims]))}, {device}, {rounds} rounds")
    print("| network | parameters | step, s | medseg / it | forward, s | medseg / it | peak, MB | medseg / it |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        a, b = statistics.median(step[name]), statistics.median(forward[name])
        count = sum(p.numel() for p in networks[name].parameters())
        print(
            f"| {name} | {count:,} | {a:.3f} | {own_step / a:.2f} | {b:.3f} | {own_forward / b:.2f} | "
            f"{memory[name]:.0f} | {memory[names[0]] / memory[name]:.2f} |"
        )
    for name in NETWORKS.keys() - names:
        print(f"left out: {name}, not installed")


def peak_memory(name: str, dims: int, device: torch.device) -> float:
    """MB that training steps take at most, measured in a fresh process."""
    command = [sys.executable, __file__, "--memory-of", name, "--dims", str(dims), "--device", str(device)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def print_memory(name: str, dims: int, device: torch.device) -> None:
    network = NETWORKS[name][0](dims).to(device)
    x, labels = batch_of(dims, device)
    if device.type == "cuda":
        train_step(network, x, labels)
        print(torch.cuda.max_memory_allocated() / 2**20)
        return
    before, highest, done = resident_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        train_step(network, x, labels)
    done.set()
    watcher.join()
    print(highest[0] - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dims", type=int, choices=(2, 3))
    parser.add_argument("--memory-of", choices=NETWORKS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.memory_of:
        print_memory(args.memory_of, args.dims, device)
        return
    for dims in (args.dims,) if args.dims else (2, 3):
        compare(dims, args.rounds, device)


if __name__ == "__main__":
    main()
