"""Memory: what a case is estimated to take, how it can take less, what there is, and what was taken."""

from __future__ import annotations

import math
import platform
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from medseg import io
from medseg.errors import InputError, MedsegError
from medseg.plan import Configuration, Plan
from medseg.preprocess import plan_grid, plan_order
from medseg.records import Record
from medseg.sliding_window import buffer_bytes
from medseg.volume import Volume

_MB = 2**20
_CHUNKS_MB = 64.0
"""What is read, resampled or decided at a time, and what is left of memory that was freed in pieces."""
_COMPRESSED = 20
"""Times that an image in memory may be larger than its file, where the header is not looked at."""
_REMEDY = "close other programs, or say with --memory-limit how much may be taken"
_PROC = Path("/proc/self")


class Strategy(Record):
    """How the logits of a case are summed.

    Attributes:
        on_device: on the device of the network, else on the host.
        blocks: rows are cut into so many blocks, done one after the other: less memory, more time.
    """

    on_device: bool
    blocks: int

    def __str__(self) -> str:
        """In words, for people."""
        place = "summed on the device" if self.on_device else "summed on the host"
        return place if self.blocks == 1 else f"{place} in {self.blocks} blocks"


class Budget(Record):
    """What a case will take of the memory that there is.

    Attributes:
        strategies: those that fit, the fastest first.
        needed_mb: by the process with the first of them, about.
        limit_mb: what it may take.
    """

    strategies: tuple[Strategy, ...]
    needed_mb: float
    limit_mb: float

    def __str__(self) -> str:
        """In words, for people."""
        return f"about {self.needed_mb / 1024:.1f} GB of {self.limit_mb / 1024:.1f} GB, {self.strategies[0]}"


@dataclass(frozen=True)
class Need:
    """What a case is estimated to take, MB.

    Attributes:
        preparing: from reading to the prepared array, at the most.
        network: from the prepared array to the mask, at the most, the prepared array included.
        device: of the device of the network, where that is another.
    """

    preparing: float
    network: float
    device: float = 0.0


@dataclass(frozen=True)
class Estimator:
    """What the cases of a model will take, before anything is read.

    Attributes:
        plan, configuration: of the model.
        device, engine: that compute the network.
        averaged: whether the logits of a tile are a mean, of folds or mirrored tiles.
        earlier: of a cascade, what its first model takes.
        most_mb: what the process may take, all in all; None for what it has and is free.
        baseline_mb: what the process takes at rest.
        resamples_channels: whether channels are brought to the grid of the first.
    """

    plan: Plan
    configuration: Configuration
    device: torch.device
    engine: str
    averaged: bool
    most_mb: float | None
    baseline_mb: float
    earlier: Estimator | None = None
    resamples_channels: bool = False

    @property
    def strategies(self) -> list[Strategy]:
        """All that there are, the fastest first, each taking less than the one before."""
        blocks = [Strategy(on_device=False, blocks=n) for n in (1, 2, 4, 8, 16)]
        return blocks if self.device.type == "cpu" else [Strategy(on_device=True, blocks=1), *blocks]

    def need(self, source: Volume, strategy: Strategy, plan_shape: Sequence[int] | None = None) -> Need:
        """What a case is estimated to take, besides what the process takes at rest.

        Args:
            source: the image, or its outline.
            strategy: how logits are summed.
            plan_shape: of the prepared array; None for that of an image without an empty border.
        """
        plan, setup = self.plan, self.configuration
        native = math.prod(source.geometry.shape)
        _, oriented, uncropped = plan_order(source.geometry, plan)
        grid = plan_shape or plan_grid(uncropped, setup)[0]
        prepared = 4 * plan.inputs(setup) * math.prod(grid)
        # the pieces of what is 0, which are numbered
        body = 5 * native if any(rule.nonzero_only for rule in plan.normalisation) else 0
        straight = 0 if uncropped is oriented else 4 * len(source.array) * math.prod(uncropped.shape)
        # the mask of the earlier model, in indices too, on the grids of the file and of the plan
        before = 3 * native + math.prod(grid) if self.earlier else 0
        patch = math.prod(setup.patch_size)
        # arrays of its first stage that a U-Net holds at its widest: measured; and the logits of a tile, and their sum
        arrays = 5 if self.engine.startswith("openvino") else 10
        tile = 4 * patch * (arrays * setup.network.features[0] + (4 if self.averaged else 2) * plan.outputs)
        buffer = buffer_bytes(grid, setup.patch_size, plan.outputs, strategy.blocks)
        # two planes of logits wait for the next slab
        buffer += 8 * plan.outputs * math.prod(grid) // max(grid) // strategy.blocks
        mask = native * (1 + (max(plan.labels.values.values()) > 255)) * (2 if straight or plan.keep_largest else 1)
        aside = self.device.type != "cpu"
        on_device = (tile + (buffer if strategy.on_device else 0)) / _MB if aside else 0.0
        on_host = (0 if aside else tile) + (0 if aside and strategy.on_device else buffer)
        return Need(
            preparing=(source.array.nbytes + body + straight + before + prepared) / _MB + _CHUNKS_MB,
            network=(prepared + mask + on_host) / _MB + _CHUNKS_MB,
            device=on_device,
        )

    def budget(self, source: Volume, plan_shape: Sequence[int] | None = None, besides_mb: float = 0.0) -> Budget:
        """What the network will take of the memory that there is, and how.

        Args:
            source: the image, or its outline.
            plan_shape: as for ``need``.
            besides_mb: memory that other cases hold meanwhile.

        Raises:
            InputError: no strategy fits; with what is needed.
        """
        limit, free = self.limit_mb(), self._device_free_mb()
        held = self.baseline_mb + besides_mb
        needs = [self.need(source, strategy, plan_shape) for strategy in self.strategies]
        fitting = [
            (strategy, held + need.network)
            for strategy, need in zip(self.strategies, needs, strict=True)
            if held + need.network <= limit and need.device <= free
        ]
        if fitting:
            return Budget(strategies=tuple(s for s, _ in fitting), needed_mb=fitting[0][1], limit_mb=limit)
        found = f"needs about {(held + needs[-1].network) / 1024:.1f} GB of memory even {self.strategies[-1]}"
        raise InputError(io.title(source), found, f"{limit / 1024:.1f} GB", _REMEDY)

    def fits(self, source: Volume, besides_mb: float) -> bool:
        """Whether a case can be on the network, in no more blocks than it would be alone, while others hold memory."""
        if self.earlier and not self.earlier.fits(source, besides_mb + source.array.nbytes / _MB):
            return False
        try:
            alone = self.budget(source)
        except InputError:
            return False
        return alone.needed_mb + besides_mb <= alone.limit_mb

    def preparing_mb(self, sources: Sequence[io.Source]) -> float:
        """What reading and preparing an image will take, MB: by the headers of NIfTI and DICOM, else by its size.

        0 where it cannot be read: that takes no memory.
        """
        try:
            known = self._preparing_mb(sources)
            files = [source for source in sources if isinstance(source, Path)]  # where the headers do not tell: all
            return 2 * _COMPRESSED * sum(path.stat().st_size for path in files) / _MB if known is None else known
        except (MedsegError, OSError):
            return 0.0

    def require_room(self, sources: Sequence[io.Source]) -> None:
        """Refuse to read an image that takes more than there is, where its header says so.

        Raises:
            InputError: reading or preparing it takes too much; or the header cannot be used.
        """
        limit, known = self.limit_mb(), self._preparing_mb(sources)
        if known is not None and self.baseline_mb + known > limit:
            found = f"needs about {(self.baseline_mb + known) / 1024:.1f} GB of memory to be read and prepared"
            raise InputError(io.name_of(sources[0]), found, f"{limit / 1024:.1f} GB", _REMEDY)

    def _preparing_mb(self, sources: Sequence[io.Source]) -> float | None:
        source = io.outline(sources)
        if source is None:
            return None
        resampled = 4 * source.array.size if self.resamples_channels and len(sources) > 1 else 0
        reading = (io.reading_bytes(sources) + resampled) / _MB + _CHUNKS_MB
        return max(reading, self.need(source, self.strategies[0]).preparing)

    def limit_mb(self) -> float:
        """What the process may take: what it was told, or what it has and is free."""
        return self.most_mb or resident_mb() + free_mb()

    def _device_free_mb(self) -> float:
        if self.device.type != "cuda":
            return math.inf
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return (free + kept) / _MB


class PeakMemory:
    """The most memory that this process held between two moments, also where such spans overlap.

    Linux keeps the high-water mark of a process (``VmHWM``) and sets it back when 5 is written to ``clear_refs``
    (proc(5)). Where that cannot be had, the mark is that of the whole life of the process.
    """

    def __init__(self) -> None:
        self._spans: dict[str, float] = {}
        self._lock = threading.Lock()

    def begin(self, name: str) -> None:
        """Begin a span."""
        with self._lock:
            self._lap()
            self._spans[name] = 0.0

    def peak(self, name: str) -> float:
        """Peak of a span so far, MB (2**20 bytes)."""
        with self._lock:
            self._lap()
            return round(self._spans[name], 1)

    def end(self, name: str) -> None:
        """End a span."""
        with self._lock:
            self._lap()
            del self._spans[name]

    def _lap(self) -> None:
        """Carry the mark over to all spans that run, and set it back."""
        mark = _high_water_mark()
        self._spans = {name: max(peak, mark) for name, peak in self._spans.items()}
        try:
            (_PROC / "clear_refs").write_text("5")
        except OSError:
            return


def free_mb() -> float:
    """Memory that this process may still take, MB: what is free on the machine, and within its control groups."""
    return min([float(psutil.virtual_memory().available), *_rooms_in_groups()]) / _MB


def resident_mb() -> float:
    """Memory that this process takes now, MB."""
    return float(psutil.Process().memory_info().rss / _MB)


def _rooms_in_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """Bytes up to the limit of each control group that holds this process (cgroups(7), versions 1 and 2).

    File pages that nobody uses count as free: the system gives them up before it refuses memory.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        top = root / controllers
        folder = top / path.strip("/")
        # where the process is in a container its group is the top itself
        for group in dict.fromkeys([folder, *folder.parents, top]):
            if group.is_relative_to(top):
                yield from _room(group, *names)


def _room(group: Path, limit: str, usage: str) -> Iterator[float]:
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        pairs = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
    except (OSError, ValueError):
        return
    stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    if most != "max":
        yield float(int(most) - used + stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _high_water_mark() -> float:
    """MB."""
    try:
        lines = (_PROC / "status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return float(memory.peak_wset / 2**20)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak / (2**20 if platform.system() == "Darwin" else 2**10))
