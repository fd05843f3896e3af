"""Seconds of a training step on this machine, and what parts of the CPU recipe save, as ratios in one run.

    python benchmarks/bench_training.py

The first figure, forward and backward of nnU-Net's network for Decathlon Task04 (32 base features, one patch of
40x56x40), says how fast the machine is: other measurements are quoted beside it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch

from medseg.engines import keep_freed_memory
from medseg.losses import build_loss
from medseg.networks import UNet
from medseg.optimisers import build_optimiser
from medseg.plan import TrainingPlan

PATCH = (40, 56, 40)
STEPS = 7


def step_seconds(base: int, batch: int, optimiser: str | None) -> float:
    """Median seconds of a step: forward, backward, and the optimiser's update where one is named."""
    torch.manual_seed(0)
    network = UNet(3, 1, 3, features=[base * 2**n for n in range(4)])
    loss_of = build_loss("dice_ce", batch=False, ignore_index=None)
    update = None if optimiser is None else build_optimiser(network, TrainingPlan(optimiser=optimiser))
    images, labels = torch.randn(batch, 1, *PATCH), torch.randint(0, 3, (batch, 1, *PATCH))
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        loss_of(network(images), labels).backward()
        if update is not None:
            update.step()
        network.zero_grad()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main() -> None:
    if sys.argv[1:] == ["--recipe"]:
        print(step_seconds(16, 2, "muon"))
        return
    plain = float(subprocess.run([sys.executable, __file__, "--recipe"], capture_output=True, check=True).stdout)
    keep_freed_memory()
    reference = step_seconds(32, 1, None)
    print(f"nnU-Net's Task04 network, one sample: {reference:.3f} s")
    for optimiser in ("muon", "adamw", "sgd"):
        seconds = step_seconds(16, 2, optimiser)
        print(f"16 features, batch 2, {optimiser}: {seconds:.3f} s a step, {seconds / reference:.2f} of the above")
        if optimiser == "muon":
            print(f"   without keeping freed memory: {plain:.3f} s, {plain / seconds:.2f} times that")


if __name__ == "__main__":
    main()
