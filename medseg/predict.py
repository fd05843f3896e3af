"""Prediction: a Predictor loaded once, and batches that survive bad inputs, little memory and interruptions."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from pydantic import Field

import medseg
from medseg import io
from medseg.cases import Shard, files_of, find_cases, mask_name
from medseg.dataset import Case
from medseg.engines import (
    Engine,
    build_engine,
    choose_device,
    default_engine,
    int8_folder,
    quantised_network,
    tiles_of,
)
from medseg.errors import InputError, MedsegError
from medseg.geometry import Geometry
from medseg.io import nifti
from medseg.journal import Journal, PeakMemory, Prediction, versions
from medseg.package import ModelPackage, load_package
from medseg.postprocess import keep_largest
from medseg.preprocess import Prepared, plan_grid, prepare, restore
from medseg.progress import Progress, silent
from medseg.records import Record, digest_file, digest_of, replacing
from medseg.resample import Slab
from medseg.sliding_window import buffer_bytes, is_out_of_memory, slabs
from medseg.volume import Mask, Volume

log = logging.getLogger(__name__)

PROBABILITIES = "probabilities"
"""Folder beside the masks."""
TABLE_SECONDS = 30.0
"""Tables of a long batch are written so often."""
PATIENCE_SECONDS = 5.0
"""An interrupted batch waits so long for the mask that is being written."""
_MB = 2**20
_CHUNKS_MB = 64.0
"""What is read, resampled or decided at a time, and what is left of memory that was freed in pieces."""
_COMPRESSED = 20
"""Times that an image in memory may be larger than its file, where the header is not looked at."""


class PredictSettings(Record):
    """Choices of the person who predicts.

    Attributes:
        device: as in training.
        mirror: average over mirrored images along the axes that the plan allows: two to eight times the work.
        overlap: fraction of a patch that neighbouring tiles share.
        engine: what computes the network, of ``medseg.engines.ENGINES``; ``auto`` is the fastest that keeps the labels.
        precision: of its products, of ``medseg.engines.PRECISIONS``.
        memory_limit_mb: what the process may take, all in all; None for what is free.
        probabilities: names of the classes (of a model of regions: regions) whose probabilities are written too;
            ``("all",)`` for all of them.
    """

    device: str = "auto"
    mirror: bool = False
    overlap: float = Field(default=0.5, ge=0, le=0.9)
    engine: Literal["auto", "eager", "compiled", "onnx", "openvino", "openvino-int8"] = "auto"
    precision: Literal["32", "bf16", "16"] = "32"
    memory_limit_mb: float | None = Field(default=None, gt=0)
    probabilities: tuple[str, ...] = ()


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
class Memory:
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
class Ready:
    """A case that waits for the network: on the plan grid, with the grid of its file (and no voxels of it)."""

    prepared: Prepared
    source: Volume


Taker = Callable[[tuple[slice, slice, slice], NDArray[np.float32]], None]


class Predictor:
    """A model in memory: call it with image after image. Spawns no process and prints nothing.

    Raises:
        InputError: the device, engine or precision is not there, or there is no class of a name in ``probabilities``.
    """

    def __init__(self, package: ModelPackage, settings: PredictSettings | None = None) -> None:
        self.package = package
        self.settings = settings or PredictSettings()
        self.device = choose_device(self.settings.device)
        self.engine = default_engine(self.device) if self.settings.engine == "auto" else self.settings.engine
        self.classes = _classes(package, self.settings.probabilities)
        self._networks: list[Engine] = [] if self.engine == "openvino-int8" else self._build()
        self._earlier = package.previous and Predictor(
            package.previous, self.settings.model_copy(update={"probabilities": ()})
        )
        self._baseline = _resident_mb()

    def __call__(self, image: Any) -> Mask:
        """Segment an image.

        Args:
            image: a path (or a list of paths, one a channel), a nibabel image, a SimpleITK image, a MONAI MetaTensor
                (C, I, J, K) with its affine, or a tuple (array, affine) with an array (I, J, K) or (C, I, J, K) and a
                4x4 affine to RAS+ mm.

        Returns:
            The mask on the image's own grid, with label values as in the training data.

        Raises:
            InputError: the image cannot be used, or needs more memory than there is; with the reason.
        """
        return self.segment(_to_volume(image, len(self.package.plan.channels)))

    def segment(self, volume: Volume) -> Mask:
        """Segment a Volume; see ``__call__``."""
        mask, _ = self.infer(self.prepare(volume))
        return mask

    def prepare(self, volume: Volume) -> Ready:
        """Bring an image to the plan grid, in a cascade with the mask of the earlier model, which is made first."""
        plan, setup = self.package.plan, self.package.configuration
        previous = self._earlier.segment(volume) if self._earlier else None
        outline = np.broadcast_to(np.zeros((), volume.array.dtype), volume.array.shape)
        return Ready(prepare(volume, plan, setup, previous=previous), replace(volume, array=outline))

    def infer(
        self,
        ready: Ready,
        probabilities: Taker | None = None,
        report: Callable[[float], None] = lambda fraction: None,
        besides_mb: float = 0.0,
    ) -> tuple[Mask, Strategy]:
        """Run the network over a prepared image, and make the mask.

        Where memory does not suffice after all, it is tried once more with the next strategy that takes less.

        Args:
            ready: from ``prepare``.
            probabilities: takes the probabilities of ``self.classes``, float32 (classes, i, j, k) of a place on the
                native grid, when a part is finished; called anew from the beginning after memory did not suffice.
            report: told the fraction that is done.
            besides_mb: memory that other cases hold meanwhile.

        Returns:
            The mask, and how its logits were summed.

        Raises:
            InputError: no strategy fits into memory.
        """
        if not self._networks:
            self._networks = self._build(ready)
        strategy, *less = self.budget(ready, besides_mb).strategies
        try:
            return self._mask(ready, strategy, probabilities, report), strategy
        except Exception as failure:  # of ONNX Runtime: of its own kinds
            if not less or not is_out_of_memory(failure):
                raise
            log.warning("%s: out of memory %s: once more %s", _name(ready.source), strategy, less[0])
        gc.collect()  # the frames of the failure hold its arrays
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._mask(ready, less[0], probabilities, report), less[0]

    def budget(self, ready: Ready, besides_mb: float = 0.0) -> Budget:
        """What the network will take of the memory that there is, and how.

        Raises:
            InputError: no strategy fits; with what is needed.
        """
        return self._budget(ready.source, ready.prepared.trace.plan_shape, besides_mb)

    def memory(self, source: Volume, strategy: Strategy, plan_shape: Sequence[int] | None = None) -> Memory:
        """What a case is estimated to take, besides what the process takes at rest.

        Args:
            source: the image, or its outline.
            strategy: how logits are summed.
            plan_shape: of the prepared array; None for that of an image without an empty border.
        """
        plan, setup = self.package.plan, self.package.configuration
        native = math.prod(source.geometry.shape)
        grid = plan_shape or self._plan_shape(source.geometry)
        prepared = 4 * plan.inputs(setup) * math.prod(grid)
        # the pieces of what is 0, which are numbered; and a second array on a straight grid
        body = 5 * native if any(rule.nonzero_only for rule in plan.normalisation) else 0
        straight = source.array.nbytes if source.geometry.is_sheared and plan.orientation != "stored" else 0
        patch = math.prod(setup.patch_size)
        # arrays of its first stage that a U-Net holds at its widest: measured; and the logits of a tile, and their sum
        arrays = 5 if self.engine.startswith("openvino") else 10
        logits = 4 if self.settings.mirror or len(self.package.weights) > 1 else 2
        tile = 4 * patch * (arrays * setup.network.features[0] + logits * plan.outputs)
        buffer = buffer_bytes(grid, setup.patch_size, plan.outputs, strategy.blocks)
        # two planes of logits wait for the next slab
        buffer += 8 * plan.outputs * math.prod(grid) // max(grid) // strategy.blocks
        mask = native * (1 + (max(plan.labels.values.values()) > 255)) * (2 if straight or plan.keep_largest else 1)
        aside = self.device.type != "cpu"
        on_device = (tile + (buffer if strategy.on_device else 0)) / _MB if aside else 0.0
        on_host = (0 if aside else tile) + (0 if aside and strategy.on_device else buffer)
        return Memory(
            preparing=(source.array.nbytes + body + straight + prepared) / _MB + _CHUNKS_MB,
            network=(prepared + mask + on_host) / _MB + _CHUNKS_MB,
            device=on_device,
        )

    def limit_mb(self) -> float:
        """What the process may take: the limit of the settings, or what it has and is free."""
        return self.settings.memory_limit_mb or _resident_mb() + free_mb()

    def fits(self, source: Volume, besides_mb: float) -> bool:
        """Whether a case can be on the network, in no more blocks than it would be alone, while others hold memory."""
        try:
            alone = self._budget(source, None, 0.0)
        except InputError:
            return False
        return alone.needed_mb + besides_mb <= alone.limit_mb

    def preparing_mb(self, paths: Sequence[Path]) -> float:
        """What reading and preparing an image will take, MB, by its header, or of other formats than NIfTI by its size.

        0 where it cannot be read: that takes no memory.
        """
        try:
            source = io.outline(paths)
            if source is not None:
                return self.memory(source, self._all_strategies()[0]).preparing
            return 2 * _COMPRESSED * sum(path.stat().st_size for path in paths) / _MB
        except (MedsegError, OSError):
            return 0.0

    @property
    def is_cascade(self) -> bool:
        """Whether preparing a case takes the network of an earlier model."""
        return self._earlier is not None

    def _build(self, ready: Ready | None = None) -> list[Engine]:
        """The networks as callables; those in 8 bits may need an image to be calibrated on."""
        package, setup = self.package, self.package.configuration
        channels = package.plan.inputs(setup)
        engines = []
        for fold, network in zip(sorted(package.weights), package.networks(), strict=True):
            small = None
            if ready is not None:
                small = quantised_network(
                    network,
                    channels,
                    setup.patch_size,
                    digest=package.only(fold).digest,
                    folder=package.path and int8_folder(package.path),
                    tiles=lambda: tiles_of(ready.prepared.image, setup.patch_size),
                    cases=[_name(ready.source)],
                    regions=bool(package.plan.region_order),
                )
            engine = build_engine(
                self.engine,
                network,
                channels,
                setup.patch_size,
                device=self.device,
                precision=self.settings.precision,
                quantised=small,
            )
            engines.append(engine)
        return engines

    def _mask(
        self, ready: Ready, strategy: Strategy, probabilities: Taker | None, report: Callable[[float], None]
    ) -> Mask:
        plan, setup, trace = self.package.plan, self.package.configuration, ready.prepared.trace
        finished = slabs(
            self._networks,
            ready.prepared.image,
            setup.patch_size,
            overlap=self.settings.overlap,
            mirror_axes=setup.mirror_axes if self.settings.mirror else (),
            device=self.device,
            blocks=strategy.blocks,
            on_device=strategy.on_device,
        )
        taker = None
        if probabilities is not None:
            channels = [channel for channel, _ in self.classes]

            def taker(place: tuple[slice, slice, slice], values: NDArray[np.float32]) -> None:
                probabilities(place, values[channels])

        array = restore(_counted(finished, trace.plan_shape, report), trace, plan, taker)
        if plan.keep_largest:
            array = keep_largest(array, plan.keep_largest)
        source = ready.source
        return Mask(array, source.geometry, plan.labels, source.paths, source.header, source.warnings)

    def _budget(self, source: Volume, plan_shape: Sequence[int] | None, besides_mb: float) -> Budget:
        limit, free = self.limit_mb(), self._device_free_mb()
        held = self._baseline + besides_mb
        strategies = self._all_strategies()
        estimates = [self.memory(source, strategy, plan_shape) for strategy in strategies]
        fitting = [
            (strategy, held + memory.network)
            for strategy, memory in zip(strategies, estimates, strict=True)
            if held + memory.network <= limit and memory.device <= free
        ]
        if fitting:
            return Budget(strategies=tuple(s for s, _ in fitting), needed_mb=fitting[0][1], limit_mb=limit)
        found = f"needs about {(held + estimates[-1].network) / 1024:.1f} GB of memory even {strategies[-1]}"
        remedy = "close other programs, or say with --memory-limit how much may be taken"
        raise InputError(_name(source), found, f"{limit / 1024:.1f} GB", remedy)

    def _all_strategies(self) -> list[Strategy]:
        blocks = [Strategy(on_device=False, blocks=n) for n in (1, 2, 4, 8, 16)]
        return blocks if self.device.type == "cpu" else [Strategy(on_device=True, blocks=1), *blocks]

    def _plan_shape(self, geometry: Geometry) -> Sequence[int]:
        plan = self.package.plan
        own = plan.orientation == "stored"
        letters = "".join((geometry.orientation if own else plan.orientation)[axis] for axis in plan.axes)
        shape, _ = plan_grid(geometry.reoriented(geometry.to(letters)), self.package.configuration)
        return shape

    def _device_free_mb(self) -> float:
        if self.device.type != "cuda":
            return math.inf
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return (free + kept) / _MB


def load(package: Path | str, **settings: Any) -> Predictor:
    """Load a model package (folder or zip) for prediction; ``settings`` are those of ``PredictSettings``.

    Raises:
        PackageError: the package is incomplete, altered or of another version.
        InputError: the device is not there, or a setting does not exist.
    """
    return Predictor(load_package(Path(package)), PredictSettings.checked(settings, "medseg.load"))


def predict_folder(
    predictor: Predictor,
    places: Path | str | Sequence[Path | str],
    out: Path,
    *,
    shard: Shard | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> list[Prediction]:
    """Find images (see ``find_cases``) and segment them, or a shard's share of them, as ``predict_cases`` does.

    Raises:
        InputError, DatasetError: as ``find_cases``.
    """
    cases = find_cases(*([places] if isinstance(places, Path | str) else places))
    return predict_cases(predictor, cases, out, shard=shard, overwrite=overwrite, progress=progress)


def predict_cases(
    predictor: Predictor,
    cases: Sequence[Case],
    out: Path,
    *,
    shard: Shard | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> list[Prediction]:
    """Segment cases into a folder: one mask each, named by ``mask_name``, ``cases.csv`` and ``run.json``.

    While a case is on the network, the next is read and prepared and the one before written, where memory allows it.

    A case that fails is recorded with its reason, and the others are done. A case whose files are there and were made
    from the same input, model and settings (by digest) is kept. A file that was not written here, or was changed since,
    is not replaced, unless ``overwrite`` says so. Probabilities go into the folder ``probabilities``, one NIfTI file a
    case and class.

    Args:
        predictor: a model.
        cases: the images of all shards.
        out: folder; it may be shared by shards, which have a journal, a table and a run record each.
        shard: which of the cases are this process's; None for all of them.
        overwrite: replace files that are not from here.
        progress: told how far it is, also within a case.

    Returns:
        One record a case, in the order of the cases.

    Raises:
        KeyboardInterrupt: passed on, after the mask that was being written and the tables.
        OSError: the tables cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    own = shard.share(cases) if shard else list(cases)
    return _Batch(predictor, own, out, shard, overwrite, progress).run()


@dataclass
class _Work:
    """A case on its way through the stages, and what is known of it so far."""

    case: Case
    key: str = ""
    volume: Volume | None = None
    ready: Ready | None = None
    mask: Mask | None = None
    probabilities: nifti.Probabilities | None = None
    strategy: str = ""
    stages: dict[str, float] = field(default_factory=dict)
    failure: BaseException | None = None
    record: Prediction | None = None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; what goes wrong in it is kept as the case's failure."""
        start = time.monotonic()
        try:
            yield
        except Exception as failure:  # whatever is wrong with one case, the others are done
            log.info("%s", self.case.id, exc_info=not isinstance(failure, MedsegError))
            self.failure = failure.with_traceback(None)  # whose frames hold arrays
        finally:
            self.stages[name] = round(self.stages.get(name, 0.0) + time.monotonic() - start, 3)

    @property
    def is_open(self) -> bool:
        """Whether there is more to do than to write down what became of it."""
        return self.failure is None and self.record is None


class _Batch:
    """Cases on their way: read and prepared ahead in one thread, on the network here, written in another thread."""

    def __init__(
        self,
        predictor: Predictor,
        cases: Sequence[Case],
        out: Path,
        shard: Shard | None,
        overwrite: bool,
        progress: Progress,
    ) -> None:
        self.predictor, self.cases, self.out, self.shard = predictor, cases, out, shard
        self.overwrite, self.progress = overwrite, progress
        self.journal = Journal(out, shard)
        self.memory = PeakMemory()
        self.model = _model_key(predictor)
        self.begun = self.shown = time.monotonic()
        self.fraction = 0.0

    def run(self) -> list[Prediction]:
        """All cases, one after the other."""
        reader, writer = _Aside(self._read), _Aside(self._write)
        try:
            for number, case in enumerate(self.cases):
                work = self._next(reader, case)
                besides_mb = self._read_ahead(reader, work, number)
                self._network(work, number, besides_mb)
                self._await(writer)
                if work.mask is None:  # nothing to write
                    self._settle(self._write(work))
                else:
                    writer.ask(work)
            self._await(writer)
        finally:
            reader.dismiss()
            self._await(writer, PATIENCE_SECONDS)
            writer.dismiss()
            self._write_tables()
        return [self.journal.results[case.id] for case in self.cases]

    def _next(self, reader: _Aside, case: Case) -> _Work:
        """A case that was read ahead, or is read now."""
        if not reader.is_busy:
            return self._read(case)
        work: _Work = reader.answer()
        if work.failure is not None and is_out_of_memory(work.failure):
            log.warning("%s: out of memory while it was read ahead: once more alone", case.id)
            return self._read(case)
        return work

    def _read_ahead(self, reader: _Aside, work: _Work, number: int) -> float:
        """Have the case after this one read, where there is memory for both; what it takes, MB."""
        source = work.ready.source if work.ready else work.volume
        if number + 1 == len(self.cases) or source is None:
            return 0.0
        following = self.cases[number + 1]
        needed = self.predictor.preparing_mb(following.images)
        if not self.predictor.fits(source, needed):
            return 0.0
        reader.ask(following)
        return needed

    def _read(self, case: Case) -> _Work:
        """Read and prepare a case, unless it is done already."""
        work = _Work(case)
        self.memory.begin(case.id)
        with work.stage("read"):
            self._open(work)
        if work.volume is not None and not self.predictor.is_cascade:
            with work.stage("prepare"):
                work.ready, work.volume = self.predictor.prepare(work.volume), None
        return work

    def _open(self, work: _Work) -> None:
        case = work.case
        _require_one_image(case)
        work.key = digest_of([self.model, *map(digest_file, files_of(case))])
        work.record = self.journal.kept(case.id, work.key, self._files(case)[1:])
        if work.record is None:
            self._require_free(case)
            work.volume = io.read_volume(case.images, len(self.predictor.package.plan.channels))

    def _network(self, work: _Work, number: int, besides_mb: float) -> None:
        """From the prepared image to the mask."""
        if work.volume is not None:
            with work.stage("prepare"):
                work.ready, work.volume = self.predictor.prepare(work.volume), None
        if work.ready is None:
            return
        ready, work.ready = work.ready, None
        for warning in ready.source.warnings:
            log.warning("%s: %s", work.case.id, warning)
        with work.stage("network"):
            budget = self.predictor.budget(ready, besides_mb)
            log.info("%s: %s", work.case.id, budget)
            note = f"{work.case.id} ({number + 1} of {len(self.cases)}), {budget}"
            self._report(number, note)
            if self.predictor.classes:
                work.probabilities = self._probabilities(ready)
            work.mask, strategy = self.predictor.infer(
                ready,
                work.probabilities.put if work.probabilities else None,
                # not the whole: it is still to be written
                report=lambda fraction: self._report(number + 0.99 * fraction, note),
                besides_mb=besides_mb,
            )
            work.strategy = str(strategy)

    def _probabilities(self, ready: Ready) -> nifti.Probabilities:
        folder = self.out / PROBABILITIES
        folder.mkdir(exist_ok=True)
        return nifti.Probabilities(ready.source.geometry.shape, len(self.predictor.classes), folder)

    def _write(self, work: _Work) -> Prediction:
        """Write what came out of a case, and say what became of it."""
        if work.failure is None and work.mask is not None:
            with work.stage("write"):
                self._save(work, work.mask)
        work.mask = None
        if work.probabilities is not None:
            work.probabilities.close()
            work.probabilities = None
        if work.failure is None and work.record is not None:
            if work.record.status == "kept":
                self.memory.end(work.case.id)
            return work.record
        self._remove_former(work)
        return self._record(work, status="failed", reason=_reason(work.failure))

    def _save(self, work: _Work, mask: Mask) -> None:
        """All files of a case: none has its name before all are whole, and the journal says what they are."""
        start = time.monotonic()
        first, *more = self._files(work.case)
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(replacing(self.out / first))
            digests = {}
            for index, name in enumerate(more):
                if work.probabilities is not None:
                    other = stack.enter_context(replacing(self.out / name))
                    work.probabilities.write(index, mask, other)
                    digests[name] = digest_file(other)
            io.write_mask(mask, temporary)
            volumes = {name: round(ml, 4) for name, ml in mask.volumes_ml().items()}
            work.stages["write"] = round(time.monotonic() - start, 3)
            work.record = self._record(
                work,
                status="done",
                output=first,
                output_digest=digest_file(temporary),
                probability_digests=digests,
                volumes_ml=volumes,
                warnings=mask.warnings,
            )
            self.journal.add(work.record)

    def _record(self, work: _Work, **facts: Any) -> Prediction:
        return Prediction(
            case=work.case.id,
            seconds=round(math.fsum(work.stages.values()), 3),
            stages=dict(work.stages),
            peak_memory_mb=self.memory.end(work.case.id),
            strategy=work.strategy,
            key=work.key,
            **facts,
        )

    def _files(self, case: Case) -> list[str]:
        """Files of a case, relative to the folder: its mask, and one a class of probabilities."""
        names = [f"{PROBABILITIES}/{case.id}_{_as_name(name)}.nii.gz" for _, name in self.predictor.classes]
        return [mask_name(case), *names]

    def _require_free(self, case: Case) -> None:
        """Refuse to write where there is a file that is not from here, or no longer as it was written.

        Raises:
            InputError: see above; or the id cannot name a file.
        """
        if Path(case.id).name != case.id:
            raise InputError(case.id, "cannot name a mask", "an id without slashes")
        remedy = "move it away, or use --overwrite"
        for name in self._files(case):
            target = self.out / name
            if not target.exists():
                continue
            if any(target.samefile(path) for path in case.images):
                raise InputError(target, "is the input itself", "another output folder")
            if self.overwrite or self.journal.wrote(case.id, name):
                continue
            if not self.journal.knows(case.id, name):
                raise InputError(target, "exists and was not written here", "a free name", remedy)
            if _is_image(target):
                raise InputError(target, "was changed since it was written", "a free name", remedy)

    def _remove_former(self, work: _Work) -> None:
        """Files of a former input or model would be taken for this one's."""
        case, key = work.case, work.key
        if key and self.journal.kept(case.id, key) is None:
            for name in self._files(case):
                if self.journal.wrote(case.id, name):
                    (self.out / name).unlink(missing_ok=True)

    def _await(self, writer: _Aside, patience: float | None = None) -> None:
        """Wait for the case that was given to the writer, if one was."""
        if not writer.is_busy:
            return
        try:
            self._settle(writer.answer(patience))
        except queue.Empty:
            log.warning("a mask was still being written, and is left out")

    def _settle(self, record: Prediction) -> None:
        """Take down what became of a case."""
        self.journal.results[record.case] = record
        if record.status == "failed":
            log.error("%s failed: %s", record.case, record.reason)
        done = len(self.journal.results)
        self._report(done, f"{record.case} {record.status} ({done} of {len(self.cases)})")
        if time.monotonic() - self.shown > TABLE_SECONDS:
            self.shown = time.monotonic()
            self._write_tables()

    def _report(self, cases: float, note: str) -> None:
        self.fraction = max(self.fraction, cases / len(self.cases))
        self.progress("predicting", self.fraction, note)

    def _write_tables(self) -> None:
        predictor = self.predictor
        labels = predictor.package.plan.labels
        facts = {
            "model": predictor.package.manifest.name,
            "model_digest": predictor.package.digest,
            "versions": versions(),
            "device": str(predictor.device),
            "engine": predictor.engine,
            "threads": torch.get_num_threads(),
            "settings": predictor.settings.model_dump(mode="json"),
            "shard": f"{self.shard.index}/{self.shard.count}" if self.shard else None,
            "wall_seconds": round(time.monotonic() - self.begun, 1),
        }
        self.journal.write_tables([*labels.names, *labels.regions], len(self.cases), facts)


class _Aside:
    """A function in a daemon thread of its own, called once at a time.

    Threads of a ThreadPoolExecutor would be waited for at the end of an interrupted program, however long they take.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.is_busy = False
        self._function = function
        self._asked: queue.Queue[Any] = queue.Queue()
        self._answers: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()
        self._thread: threading.Thread | None = None

    def ask(self, item: Any) -> None:
        """Have the function called with an item."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"medseg {self._function.__name__}", daemon=True)
            self._thread.start()
        self.is_busy = True
        self._asked.put(item)

    def answer(self, timeout: float | None = None) -> Any:
        """What the function returned, or what it raised raised here.

        Raises:
            queue.Empty: it takes longer than ``timeout`` seconds.
        """
        result, failure = self._answers.get(timeout=timeout)
        self.is_busy = False
        if failure is not None:
            raise failure
        return result

    def dismiss(self) -> None:
        """End the thread after what it does."""
        self._asked.put(None)

    def _work(self) -> None:
        while (item := self._asked.get()) is not None:
            try:
                self._answers.put((self._function(item), None))
            except BaseException as failure:  # noqa: BLE001 - it belongs to whoever asked
                self._answers.put((None, failure))
            del item


def free_mb() -> float:
    """Memory that this process may still take, MB: what is free on the machine, and within its control groups."""
    return min([float(psutil.virtual_memory().available), *_rooms_in_groups()]) / _MB


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


def _resident_mb() -> float:
    return float(psutil.Process().memory_info().rss / _MB)


def _model_key(predictor: Predictor) -> str:
    """Digest of all that masks depend on besides the image: not the device, nor which engine computes in float32."""
    settings = predictor.settings
    choices = [settings.mirror, settings.overlap, settings.precision, predictor.engine == "openvino-int8"]
    return digest_of([medseg.__version__, predictor.package.digest, choices])


def _classes(package: ModelPackage, names: Sequence[str]) -> tuple[tuple[int, str], ...]:
    """Channel of the network and name, of the classes (or regions) whose probabilities are wanted.

    Raises:
        InputError: there is none of a name, or two would have files of one name.
    """
    labels = package.plan.labels
    known = tuple(labels.regions) if package.plan.region_order else labels.names
    first = 0 if package.plan.region_order else 1  # before it the background
    chosen = known if tuple(names) == ("all",) else [name for name in known if name in names]
    if unknown := sorted({*names} - {*chosen, "all"}):
        raise InputError("--probabilities", f"the model has no {', '.join(unknown)}", f"all, {', '.join(known)}")
    if len({_as_name(name) for name in chosen}) < len(chosen):
        raise InputError("--probabilities", f"{', '.join(chosen)} cannot name files", "names that differ in letters")
    return tuple((known.index(name) + first, name) for name in chosen)


def _as_name(text: str) -> str:
    """A class as a part of a file name."""
    return re.sub(r"[^\w.+-]+", "_", text)


def _name(source: Volume) -> str:
    return io.name_of(source.paths[0]) if source.paths else "image"


def _reason(failure: BaseException | None) -> str:
    return str(failure) if isinstance(failure, MedsegError) else f"{type(failure).__name__}: {failure}"


def _counted(finished: Iterable[Slab], plan_shape: Sequence[int], report: Callable[[float], None]) -> Iterator[Slab]:
    """The slabs, while the fraction that they are of the whole is reported."""
    done = 0
    for slab in finished:
        across = 1 if slab.axis == 0 else 0
        planes, rows = slab.stop - slab.start, slab.rows[1] - slab.rows[0]
        whole = plan_shape[slab.axis] * plan_shape[across]
        yield slab
        done += planes * rows
        report(min(done / whole, 1.0))


def _require_one_image(case: Case) -> None:
    """Refuse ``a.nii`` beside ``a.nii.gz``: two images, or one in two formats, and nothing says which is meant."""
    if len({(path.parent, io.name_of(path)) for path in case.images}) < len(case.images):
        names = " and ".join(path.name for path in case.images)
        raise InputError(case.id, f"is the name of several images: {names}", "one image a case", "rename or remove one")


def _to_volume(image: Any, channels: int) -> Volume:
    if isinstance(image, str | os.PathLike):
        return io.read_volume(Path(image), channels)
    if isinstance(image, list) and image and all(isinstance(path, str | os.PathLike) for path in image):
        return io.read_volume([Path(path) for path in image], channels)
    volume = io.volume_of(image)
    if volume.array.shape[0] != channels:
        raise InputError("image", f"has {volume.array.shape[0]} channels", str(channels))
    return replace(volume, array=io.finite(volume.array, "image"))


def _is_image(path: Path) -> bool:
    try:
        io.format_of(path).read_labels(path)
    except InputError:
        return False
    return True
