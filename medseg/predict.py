"""Prediction: a model loaded once, called with image after image."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

import medseg
from medseg import io
from medseg.cases import probability_name
from medseg.engines import (
    Engine,
    Quantised,
    build_engine,
    check_engine,
    choose_device,
    default_engine,
    int8_folder,
    load_quantised,
    quantised_network,
    tiles_of,
)
from medseg.errors import InputError
from medseg.io.dicom import Series
from medseg.memory import Budget, Estimator, Strategy, resident_mb
from medseg.package import ModelPackage, load_package
from medseg.postprocess import keep_largest
from medseg.preprocess import Prepared, Probabilities, on_grid, prepare, restore
from medseg.records import Record, digest_of
from medseg.resample import Place, Slab
from medseg.sliding_window import Margins, is_out_of_memory, slabs
from medseg.volume import Mask, Volume

log = logging.getLogger(__name__)


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
        resample_channels: bring the channels of an image to the grid of the first, where they lie on several.
    """

    device: str = "auto"
    mirror: bool = False
    overlap: float = Field(default=0.5, ge=0, le=0.9)
    engine: str = "auto"
    precision: str = "32"
    memory_limit_mb: float | None = Field(default=None, gt=0)
    probabilities: tuple[str, ...] = ()
    resample_channels: bool = False


@dataclass(frozen=True)
class Ready:
    """A case that waits for the network: on the plan grid, with the grid of its file (and no voxels of it)."""

    prepared: Prepared
    source: Volume


class Found(NamedTuple):
    """What the network made of a case.

    Attributes:
        mask: on the grid of the image.
        strategy: how its logits were summed.
        margins: by name, of each class (or region) that it found somewhere, how sure it is there, 0 to 1: the mean of
            ``medseg.sliding_window.Margins`` on the plan grid, before pieces are removed.
    """

    mask: Mask
    strategy: Strategy
    margins: dict[str, float]


class Predictor:
    """A model in memory: call it with image after image. Spawns no process and prints nothing.

    Attributes:
        labels: of its masks, with the codes that are known of them.

    Raises:
        InputError: the device, engine or precision is not there, or there is no class of a name in ``probabilities``.
    """

    def __init__(self, package: ModelPackage, settings: PredictSettings | None = None) -> None:
        self.package = package
        self.settings = settings or PredictSettings()
        self.device = choose_device(self.settings.device)
        self.engine = default_engine(self.device) if self.settings.engine == "auto" else self.settings.engine
        check_engine(self.engine, self.device, self.settings.precision)
        self.classes = _classes(package, self.settings.probabilities)
        self.labels = package.plan.labels.coded(package.manifest.name)
        self._small = self._kept()
        self._networks: list[Engine] = [] if self.engine == "openvino-int8" and not self._small else self._build()
        earlier = self.settings.model_copy(update={"probabilities": ()})
        self._earlier = Predictor(package.previous, earlier) if package.previous else None
        self.memory: Estimator = Estimator(
            plan=package.plan,
            configuration=package.configuration,
            device=self.device,
            engine=self.engine,
            averaged=self.settings.mirror or len(package.weights) > 1,
            most_mb=self.settings.memory_limit_mb,
            baseline_mb=resident_mb(),
            earlier=self._earlier.memory if self._earlier else None,
            resamples_channels=self.settings.resample_channels,
        )

    def __call__(self, image: Any) -> Mask:
        """Segment an image.

        Args:
            image: a path (of a file, or of a folder or zip with one DICOM series) or a DICOM series (see
                ``medseg.series``), or a list of these, one a channel; a nibabel image, a SimpleITK image, a MONAI
                MetaTensor (C, I, J, K) with its affine, or a tuple (array, affine) with an array (I, J, K) or
                (C, I, J, K) and a 4x4 affine to RAS+ mm.

        Returns:
            The mask on the image's own grid, with label values as in the training data.

        Raises:
            InputError: the image cannot be used, or needs more memory than there is; with the reason.
        """
        if sources := _sources(image):
            return self.infer(self.prepare(self.read(sources))).mask  # its voxels are gone when the network runs
        return self.segment(_to_volume(image, len(self.package.plan.channels)))

    def read(self, sources: Sequence[io.Source]) -> Volume:
        """Read an image of the model's channels from a file or DICOM series, or from one a channel.

        Raises:
            InputError: it needs more memory than there is, or has other channels.
            UnreadableFile, IncompleteSeries, GeometryMismatch: as ``medseg.io.read_volume``.
        """
        first, *others = located = tuple(io.located(source) for source in sources)
        self.memory.require_room(located)
        channels = len(self.package.plan.channels)
        if not others or not self.settings.resample_channels:
            return io.read_volume(located, channels)
        volume = io.read_volume(first)
        return io.joined([volume, *(on_grid(io.read_volume(other), volume.geometry) for other in others)], channels)

    def segment(self, volume: Volume, besides_mb: float = 0.0) -> Mask:
        """Segment a Volume, which whoever calls holds meanwhile; see ``__call__``, and ``infer`` for ``besides_mb``."""
        held_mb = besides_mb + volume.array.nbytes / 2**20
        return self.infer(self.prepare(volume, besides_mb), besides_mb=held_mb).mask

    def prepare(self, volume: Volume, besides_mb: float = 0.0) -> Ready:
        """Bring an image to the plan grid, in a cascade with the mask of the earlier model, which is made first.

        Args:
            volume: the image.
            besides_mb: as for ``infer``.
        """
        plan, setup = self.package.plan, self.package.configuration
        previous = self._earlier.segment(volume, besides_mb) if self._earlier else None
        outline = np.broadcast_to(np.zeros((), volume.array.dtype), volume.array.shape)
        return Ready(prepare(volume, plan, setup, previous=previous), replace(volume, array=outline))

    def infer(
        self,
        ready: Ready,
        probabilities: Probabilities | None = None,
        report: Callable[[float], None] = lambda fraction: None,
        besides_mb: float = 0.0,
    ) -> Found:
        """Run the network over a prepared image, and make the mask.

        Where memory does not suffice after all, it is tried once more with the next strategy that takes less.

        Args:
            ready: from ``prepare``.
            probabilities: takes the probabilities of ``self.classes``, float32 (classes, i, j, k) of a place on the
                native grid, when a part is finished; called anew from the beginning after memory did not suffice.
            report: told the fraction that is done.
            besides_mb: memory that other cases hold meanwhile.

        Returns:
            The mask, how its logits were summed, and how sure the network is.

        Raises:
            InputError: no strategy fits into memory.
        """
        if not self._networks:
            self.calibrate(ready)
        strategy, *less = self.budget(ready, besides_mb).strategies
        try:
            return self._found(ready, strategy, probabilities, report)
        except Exception as failure:  # of ONNX Runtime: of its own kinds
            if not less or not is_out_of_memory(failure):
                raise
            log.warning("%s: out of memory %s: once more %s", io.title(ready.source), strategy, less[0])
        gc.collect()  # the frames of the failure hold its arrays
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._found(ready, less[0], probabilities, report)

    def budget(self, ready: Ready, besides_mb: float = 0.0) -> Budget:
        """What the network will take of the memory that there is, and how.

        Raises:
            InputError: no strategy fits; with what is needed.
        """
        return self.memory.budget(ready.source, ready.prepared.trace.plan_shape, besides_mb)

    def calibrate(self, ready: Ready) -> None:
        """Make the networks of ``openvino-int8`` with an image, and keep them in the package where that can be."""
        package, setup = self.package, self.package.configuration
        self._small = [
            quantised_network(
                network,
                package.plan.inputs(setup),
                setup.patch_size,
                digest=package.only(fold).digest,
                folder=package.path and int8_folder(package.path),
                tiles=lambda: tiles_of(ready.prepared.image, setup.patch_size),
                cases=[io.title(ready.source)],
                regions=bool(package.plan.region_order),
            )
            for fold, network in zip(sorted(package.weights), package.networks(), strict=True)
        ]
        self._networks = self._build()

    @property
    def needs_calibration(self) -> bool:
        """Whether a network is wanted in 8 bits and not there yet: the first image will make it."""
        return not self._networks or (self._earlier is not None and self._earlier.needs_calibration)

    @property
    def key(self) -> str:
        """Digest of all that masks depend on besides the image: not the device, nor which engine computes in float32.

        Networks in 8 bits are a part of it once they are there.
        """
        settings, earlier = self.settings, self._earlier
        small = [network.digest for network in self._small]
        choices = [settings.mirror, settings.overlap, settings.precision, small, earlier.key if earlier else ""]
        if settings.resample_channels:
            choices.append("resample_channels")
        return digest_of([medseg.__version__, self.package.digest, choices])

    @property
    def is_cascade(self) -> bool:
        """Whether preparing a case takes the network of an earlier model."""
        return self._earlier is not None

    def _kept(self) -> list[Quantised]:
        """The networks of ``openvino-int8`` that are kept in the package; none where one is missing."""
        package = self.package
        if self.engine != "openvino-int8" or package.path is None:
            return []
        folder = int8_folder(package.path)
        known = [load_quantised(folder, package.only(fold).digest) for fold in sorted(package.weights)]
        return [pair[0] for pair in known if pair] if all(known) else []

    def _build(self) -> list[Engine]:
        """The networks as callables."""
        package, setup = self.package, self.package.configuration
        networks = list(package.networks())
        small: list[Quantised | None] = [*self._small] or [None] * len(networks)
        return [
            build_engine(
                self.engine,
                network,
                package.plan.inputs(setup),
                setup.patch_size,
                device=self.device,
                precision=self.settings.precision,
                quantised=one,
            )
            for network, one in zip(networks, small, strict=True)
        ]

    def _found(
        self, ready: Ready, strategy: Strategy, probabilities: Probabilities | None, report: Callable[[float], None]
    ) -> Found:
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

            def taker(place: Place, values: NDArray[np.float32]) -> None:
                probabilities(place, values[channels])

        margins = Margins(plan.outputs, regions=bool(plan.region_order))
        watched = margins.watch(finished, trace.plan_shape)
        array = restore(_counted(watched, trace.plan_shape, report), trace, plan, taker)
        if plan.keep_largest:
            array = keep_largest(array, plan.keep_largest)
        source, names = ready.source, dict(_channels(self.package))
        mask = Mask(array, source.geometry, self.labels, source.paths, source.header, source.warnings)
        return Found(mask, strategy, {names[channel]: mean for channel, mean in margins.means.items()})


def load(package: Path | str, **settings: Any) -> Predictor:
    """Load a model package (folder or zip) for prediction; ``settings`` are those of ``PredictSettings``.

    Raises:
        PackageError: the package is incomplete, altered or of another version.
        InputError: the device is not there, or a setting does not exist.
    """
    return Predictor(load_package(Path(package)), PredictSettings.checked(settings, "medseg.load"))


def _classes(package: ModelPackage, names: Sequence[str]) -> tuple[tuple[int, str], ...]:
    """Channel of the network and name, of the classes (or regions) whose probabilities are wanted.

    Raises:
        InputError: there is none of a name, or two would have files of one name.
    """
    channels = _channels(package)
    known = [name for _, name in channels]
    chosen = known if tuple(names) == ("all",) else [name for name in known if name in names]
    if unknown := sorted({*names} - {*chosen, "all"}):
        raise InputError("--probabilities", f"the model has no {', '.join(unknown)}", f"all, {', '.join(known)}")
    if len({probability_name("", name) for name in chosen}) < len(chosen):
        raise InputError("--probabilities", f"{', '.join(chosen)} cannot name files", "names that differ in letters")
    return tuple((channel, name) for channel, name in channels if name in chosen)


def _channels(package: ModelPackage) -> tuple[tuple[int, str], ...]:
    """Every channel of the network but the background's, and its name: of a class, or of a region."""
    plan = package.plan
    return tuple(enumerate(plan.labels.regions)) if plan.region_order else tuple(enumerate(plan.labels.names, start=1))


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


def _sources(image: Any) -> list[io.Source]:
    """The files and series that an image is given as; none where it is something else."""
    sources = image if isinstance(image, list) else [image]
    if not all(isinstance(source, str | os.PathLike | Series) for source in sources):
        return []
    return [source if isinstance(source, Series) else Path(source) for source in sources]


def _to_volume(image: Any, channels: int) -> Volume:
    volume = io.volume_of(image)
    if volume.array.shape[0] != channels:
        raise InputError("image", f"has {volume.array.shape[0]} channels", str(channels))
    return replace(volume, array=io.finite(volume.array, "image"))
