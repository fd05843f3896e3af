"""The rules of planning: from a Fingerprint to a Plan, with a sentence of reason for every decision.

The rules are nnU-Net's (Isensee et al., Nature Methods 18, 203-211, 2021, and its version 2 planner), restated: target
spacing, normalisation, patch, topology, batch, the low-resolution configuration. On a GPU with 8192 MB they give
nnU-Net's own plan. nnU-Net orders axes as they are in the file read by ITK, slowest first; here the data are turned to
RAS first, so that the order is (head, front, right) with the axis of largest spacing moved to the front.

A CPU has another recipe, kept in ``PROFILES``.
"""

from __future__ import annotations

import typing
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, TypeAdapter, ValidationError

from medseg.errors import PlanError
from medseg.fingerprint import Fingerprint, Intensities
from medseg.plan import (
    RESENC_BLOCKS,
    Configuration,
    ConfigurationName,
    NetworkPlan,
    Normalisation,
    Plan,
    Resampling,
    TrainingPlan,
    divisor_of,
)
from medseg.volume import Labels

Float = NDArray[np.float64]
Device = Literal["cpu", "gpu"]
Sizes = tuple[int, ...]
AXIS_NAMES = ("left-right", "back-front", "foot-head")
"""The axes of RAS."""


@dataclass(frozen=True)
class DeviceProfile:
    """What a kind of device changes about a plan; to be tuned by experiment.

    Attributes:
        base_features: features of the first stage; each further one has twice as many.
        max_features: largest number of features, for networks of 2 and 3 dimensions.
        batch_voxels: largest batch, two patches at least; None limits it by memory and the size of the dataset alone.
        patch_voxels: largest patch; None limits it by memory alone.
        bytes_per_value: memory of a training step over the numbers in its feature maps; None takes nnU-Net's reference.
        deep_supervision: train the lower decoder levels too.
        training: optimiser, schedule and sampling.
    """

    base_features: int
    max_features: Mapping[int, int]
    batch_voxels: int | None
    patch_voxels: int | None
    bytes_per_value: float | None
    deep_supervision: bool
    training: TrainingPlan


PROFILES: Mapping[Device, DeviceProfile] = {
    "gpu": DeviceProfile(
        base_features=32,
        max_features={2: 512, 3: 320},
        batch_voxels=None,
        patch_voxels=None,
        bytes_per_value=None,
        deep_supervision=True,
        training=TrainingPlan(),
    ),
    "cpu": DeviceProfile(
        base_features=16,
        max_features={2: 160, 3: 160},
        batch_voxels=192 * 1024,
        patch_voxels=128 * 1024,
        bytes_per_value=20.0,  # float32, measured: 17 to 21 over six networks and patches (docs/experiments.md)
        deep_supervision=False,
        training=TrainingPlan(
            optimiser="muon",
            learning_rate=0.03,
            weight_decay=1e-2,
            momentum=0.9,
            schedule="linear",
            warmup=30,
            average=0.99,
            foreground=0.5,
            iterations=2000,
            augmentation="light",
        ),
    ),
}


@dataclass(frozen=True)
class _Reference:
    """nnU-Net's measure of memory: a network with ``values`` numbers in its feature maps and this batch fills 8 GB."""

    edge: int
    values: float
    batch_size: int


REFERENCES = {2: _Reference(2048, 8.5e7, 12), 3: _Reference(256, 5.6e8, 2)}
RESIDUAL_REFERENCES = {2: _Reference(2048, 1.35e8, 12), 3: _Reference(256, 6.8e8, 2)}
"""Those of nnU-Net's planner for ResEnc, chosen so that it has about the same configurations in as much memory."""
REFERENCE_MEMORY_MB = 8192.0
MIN_BATCH = 2
MAX_COVERAGE = 0.05
"""Largest fraction of all voxels of the dataset in one batch."""
MIN_EDGE = 4
"""Smallest edge of a feature map that pooling may lead to."""
LOWRES_COVERAGE = 0.25
"""A patch that covers less of the median case calls for a low-resolution configuration."""
LOWRES_STEP = 1.03
LOWRES_GAIN = 2.0
"""A low-resolution configuration must have this many times fewer voxels than the full one."""
NONZERO_SIZE = 0.75
"""Below this median share of voxels inside the box of voxels that are not 0, those outside are left out."""
MIRROR_AGREEMENT = 0.2
"""Axes with a lower mirror agreement are not mirrored. Measured on 200 cases of Decathlon Task04: left-right 0.41
(a pool of left and right hippocampi), foot-head 0.043, back-front 0.0007 (anterior and posterior change places)."""

_SCHEMES: Mapping[str, Literal["ct", "none", "minmax", "rgb"]] = {
    "ct": "ct",
    "reflectance": "ct",
    "nonorm": "none",
    "rescale_to_0_1": "minmax",
    "rgb_to_0_1": "rgb",
}
_FIXED = ("dataset", "fingerprint_digest", "device", "memory_budget_mb", "orientation", "axes", "channels", "labels",
          "configurations", "reasons")  # fmt: skip


def make_plan(
    fingerprint: Fingerprint,
    dataset_name: str,
    channels: Sequence[str],
    labels: Labels,
    *,
    device: Device = "gpu",
    memory_budget_mb: float = REFERENCE_MEMORY_MB,
) -> Plan:
    """Derive every decision from the data.

    Args:
        fingerprint: of the training cases.
        dataset_name: for people.
        channels: names, which choose the normalisation ("CT", "reflectance" and the names of nnU-Net are known).
        labels: what is segmented.
        device: ``gpu`` follows nnU-Net's rules, ``cpu`` the smaller recipe.
        memory_budget_mb: what one training step may take, on the scale on which nnU-Net's reference takes 8192 MB.

    Raises:
        PlanError: the budget is too small for any patch, or channels and fingerprint do not fit.
    """
    if len(channels) != len(fingerprint.intensities):
        raise PlanError("channels", f"{len(channels)} names", f"{len(fingerprint.intensities)}, as were measured")
    if not memory_budget_mb > 0:
        raise PlanError("memory_budget_mb", f"{memory_budget_mb}", "more than 0")
    data = _look(fingerprint, labels)
    reasons = {
        "orientation": "All cases are turned to RAS, so that an axis means the same in each of them.",
        "axes": f"The {AXIS_NAMES[data.axes[0]]} axis comes first: "
        + (
            "the cases have one slice along it."
            if data.median[0] == 1
            else f"its target spacing is the largest, {data.target[0]:.4g} mm (in plan order {_mm(data.target)} mm)."
        ),
        "resampling": "Images by cubic splines, labels and logits linearly; where the largest spacing is more than "
        f"{Resampling().anisotropy:g} times the smallest, the nearest slice along that axis.",
    }
    normalisation = tuple(_normalisation(index, name, fingerprint, reasons) for index, name in enumerate(channels))
    planner = _Planner(data, PROFILES[device], device, memory_budget_mb, reasons)
    return Plan(
        dataset=dataset_name,
        fingerprint_digest=fingerprint.digest(),
        device=device,
        memory_budget_mb=memory_budget_mb,
        axes=data.axes,
        channels=tuple(channels),
        normalisation=normalisation,
        labels=labels,
        configurations=planner.configurations(),
        reasons=reasons,
    )


# ---- what the rules look at ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """The fingerprint in plan order: sizes of (n, 3) and (3,)."""

    axes: tuple[int, int, int]
    target: Float
    median_spacing: Float
    thinned: bool
    median: Float
    slices: int
    count: int
    classes: int
    mirror: tuple[float, ...]


def _look(fingerprint: Fingerprint, labels: Labels) -> _Data:
    spacings = np.array([case.spacing_mm for case in fingerprint.cases])[:, ::-1]
    shapes = np.array([case.cropped_shape for case in fingerprint.cases], dtype=float)[:, ::-1]
    target, thinned = target_spacing(spacings, shapes)
    flat = np.median(shapes, axis=0) == 1  # a picture has one slice, whose thickness says nothing
    first = int(np.argmax(np.where(flat, np.inf, target)))
    order = [first, *(axis for axis in range(3) if axis != first)]
    new_shapes = np.round(spacings / target * shapes)
    axes = tuple((2, 1, 0)[axis] for axis in order)
    return _Data(
        axes=axes,  # type: ignore[arg-type]
        target=target[order],
        median_spacing=np.median(spacings, axis=0)[order],
        thinned=thinned,
        median=np.maximum(np.median(new_shapes, axis=0), 1.0)[order],
        slices=max(1, round(float(np.median(shapes[:, first])))),
        count=len(fingerprint.cases),
        classes=labels.count,
        mirror=tuple(fingerprint.mirror_agreement[axis] for axis in axes),
    )


def target_spacing(spacings: Float, shapes: Float) -> tuple[Float, bool]:
    """The spacing that cases are resampled to, mm, and whether the rule for thick slices changed it.

    The median of each axis. Where one axis is more than 3 times coarser than the others and has less than a third of
    their voxels, its 10th percentile, so that thinner slices are not thrown away, but never finer than the other axes.

    Args:
        spacings: (cases, 3), mm.
        shapes: (cases, 3), voxels after cropping, axes in the same order.
    """
    target = np.median(spacings, axis=0)
    size = np.median(shapes, axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    anisotropy = Resampling().anisotropy
    if target[worst] <= anisotropy * target[others].max() or size[worst] * anisotropy >= size[others].min():
        return target, False
    thin = float(np.percentile(spacings[:, worst], 10))
    coarsest = float(target[others].max())
    target[worst] = coarsest + 1e-5 if thin < coarsest else thin
    return target, True


def _normalisation(index: int, name: str, fingerprint: Fingerprint, reasons: dict[str, str]) -> Normalisation:
    scheme = _SCHEMES.get(name.casefold())
    key = f"normalisation.{index}"
    if scheme == "ct":
        return _ct(name, fingerprint.intensities[index], reasons, key)
    if scheme is not None:
        reasons[key] = f"Channel {name!r} asks for it by its name."
        return Normalisation(scheme=scheme)
    share = float(np.median([case.relative_size for case in fingerprint.cases]))
    inside = share < NONZERO_SIZE
    reasons[key] = (
        f"Channel {name!r} has no fixed scale, so each image is brought to mean 0 and standard deviation 1, over "
        f"{'the voxels that are not 0' if inside else 'the whole image'}: the box of voxels that are not 0 is "
        f"{share:.0%} of the median image ({NONZERO_SIZE:.0%} is the limit)."
    )
    return Normalisation(scheme="zscore", nonzero_only=inside)


def _ct(name: str, found: Intensities, reasons: dict[str, str], key: str) -> Normalisation:
    reasons[key] = (
        f"Channel {name!r} has a unit that means the same in every image: clipped to the foreground's "
        f"percentiles 0.5 and 99.5 ({found.percentile_00_5:.4g} to {found.percentile_99_5:.4g}), less its mean "
        f"{found.mean:.4g}, over its standard deviation {found.std:.4g}."
    )
    return Normalisation(
        scheme="ct",
        mean=found.mean,
        std=max(found.std, 1e-8),
        lower=found.percentile_00_5,
        upper=found.percentile_99_5,
    )


# ---- topology and memory ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Topology:
    """A patch and the U-Net for it: one stride and one kernel a stage, highest resolution first."""

    patch: Sizes
    strides: tuple[Sizes, ...]
    kernels: tuple[Sizes, ...]

    @property
    def divisor(self) -> Sizes:
        """Size along each axis that the patch is a multiple of."""
        return divisor_of(self.strides)


def topology(spacing: Sequence[float] | Float, patch: Sequence[float] | NDArray[Any]) -> Topology:
    """Strides and kernels for a patch, which is rounded up to a multiple of what the strides divide by.

    An axis is halved while it has 8 voxels (12 where it is the only one) and its spacing is less than twice the finest
    of those axes; its kernel is 3 from the stage on where its spacing is less than twice the finest of all.
    """
    spacings, sizes = np.array(spacing, dtype=float), np.array(patch, dtype=float)
    kernel = np.ones(len(sizes), dtype=int)
    strides, kernels = [np.ones(len(sizes), dtype=int)], []
    while (large := sizes >= 2 * MIN_EDGE).any():
        halved = large & (spacings / spacings[large].min() < 2)
        if halved.sum() == 1 and sizes[halved][0] < 3 * MIN_EDGE:
            break
        kernel = np.where(spacings / spacings.min() < 2, 3, kernel)
        kernels.append(kernel)
        strides.append(np.where(halved, 2, 1))
        spacings = np.where(halved, spacings * 2, spacings)
        sizes = np.where(halved, np.ceil(sizes / 2), sizes)
    kernels.append(np.full(len(sizes), 3))
    divisor = divisor_of(strides)
    padded = np.ceil(np.array(patch, dtype=float) / divisor) * divisor
    return Topology(_integers(padded), tuple(map(_integers, strides)), tuple(map(_integers, kernels)))


@dataclass(frozen=True)
class _Maps:
    """Feature maps of one patch; one entry a stage (``decoder_convs``: a decoder stage), highest resolution first."""

    voxels: Float
    features: Float
    convs: Float
    decoder_convs: Float
    classes: int

    @property
    def values(self) -> Float:
        """Numbers in one map of each stage, over all its features."""
        return self.voxels * self.features

    def encoder(self) -> float:
        return float((self.convs * self.values).sum())

    def decoder(self) -> float:
        """Transposed convolutions, convolutions, and the classes of the last layer."""
        return float(((self.decoder_convs + 1) * self.values[:-1]).sum() + self.classes * self.voxels[0])

    def unet(self) -> float:
        return self.encoder() + self.decoder()

    def residual_unet(self) -> float:
        """The stem, two convolutions a block, and a shortcut where a stage changes size or features."""
        return float(self.values[0] + 2 * self.encoder() + self.values[1:].sum() + self.decoder())

    def attention_unet(self) -> float:
        """Beside a U-Net's, for each skip: two maps of half its features and the attention below, the product here."""
        inside = np.maximum(1, self.features[:-1] // 2)
        return float(self.unet() + (self.voxels[1:] * (2 * inside + 1) + self.voxels[:-1] + self.values[:-1]).sum())

    def unet_plus_plus(self) -> float:
        """A decoder for each depth, whose nodes keep a copy of every map that they take beyond two."""
        depth = len(self.values) - 1
        each = self.values[:-1]
        nodes = sum(
            ((self.decoder_convs + column) * each)[: depth + 1 - column].sum() for column in range(1, depth + 1)
        )
        return float(self.encoder() + nodes + self.classes * self.voxels[0])

    def cell_segmenter(self) -> float:
        """Beside a U-Net's: the boundary's convolution, and both heads' logits."""
        return float(self.unet() + self.values[0] + self.classes * self.voxels[0])

    def satellite_segmenter(self) -> float:
        """Beside a U-Net's: every level projected to the first one's features, their sum, and its convolution."""
        return float(self.unet() + self.features[0] * self.voxels[:-1].sum() + 2 * self.values[0])


_COUNTS: Mapping[str, Callable[[_Maps], float]] = {
    "residual_unet": _Maps.residual_unet,
    "attention_unet": _Maps.attention_unet,
    "unet_plus_plus": _Maps.unet_plus_plus,
    "cell_segmenter": _Maps.cell_segmenter,
    "satellite_segmenter": _Maps.satellite_segmenter,
}
"""How the feature maps of an architecture are counted; as a U-Net's, of any other."""


def feature_values(
    shape: Topology,
    features: Sequence[int],
    convs: int | Sequence[int],
    classes: int,
    decoder_convs: int | Sequence[int] = 2,
    name: str = "unet",
) -> float:
    """Numbers in all feature maps of one patch.

    Args:
        shape: patch and strides.
        features: one entry a stage.
        convs: convolutions (of a residual network: blocks) of the encoder stages, one number or one a stage.
        classes: of the last layer.
        decoder_convs: convolutions of the decoder stages, one number or one a stage.
        name: of the architecture; one that is not known here counts as a U-Net.
    """
    voxels = np.prod(shape.patch) / np.cumprod([np.prod(stride) for stride in shape.strides])
    widths = np.array(features, dtype=float)
    each = np.broadcast_to(np.array(convs, dtype=float), widths.shape)
    below = np.broadcast_to(np.array(decoder_convs, dtype=float), widths[:-1].shape)
    return _COUNTS.get(name, _Maps.unet)(_Maps(voxels, widths, each, below, classes))


def _features(profile: DeviceProfile, dims: int, stages: int) -> Sizes:
    return tuple(min(profile.base_features * 2**stage, profile.max_features[dims]) for stage in range(stages))


def _integers(values: Any) -> Sizes:
    return tuple(int(v) for v in values)


@dataclass(frozen=True)
class _Design:
    """Patch, network and batch of one configuration, and the numbers that led to them."""

    shape: Topology
    features: Sizes
    batch: int
    start: Sizes
    shrunk: int
    room: int
    cap: int
    memory_mb: float


def _memory_mb(values: float, dims: int, bytes_per_value: float | None, name: str = "unet") -> float:
    """Memory of a training step from the numbers in the feature maps of its batch."""
    if bytes_per_value is not None:
        return values * bytes_per_value / 2**20
    reference = (RESIDUAL_REFERENCES if name == "residual_unet" else REFERENCES)[dims]
    return values / reference.batch_size / reference.values * REFERENCE_MEMORY_MB


def _design(
    spacing: Float, median: Float, data: _Data, profile: DeviceProfile, budget_mb: float, voxels: float
) -> _Design:
    """Patch and batch for one configuration.

    The patch starts with the aspect ratio of the voxels and as large as the median case, and loses a step of its axis
    that is largest relative to the median case until a batch of 2 fits.

    Args:
        spacing: target spacing of the configuration's axes, mm.
        median: median shape along them.
        data: for the number of classes.
        profile: of the device.
        budget_mb: memory of a training step.
        voxels: of the whole dataset in this configuration, for the largest batch.
    """
    dims = len(spacing)
    reference = REFERENCES[dims]
    aspect = (1 / spacing) * (reference.edge**dims * np.prod(spacing)) ** (1 / dims)
    shape = _first_shape(spacing, np.minimum(np.round(aspect), median))
    start, shrunk = shape.patch, 0

    def memory(shape: Topology, batch: int) -> float:
        features = _features(profile, dims, len(shape.strides))
        return _memory_mb(feature_values(shape, features, 2, data.classes) * batch, dims, profile.bytes_per_value)

    limit = profile.patch_voxels or np.inf
    while memory(shape, MIN_BATCH) > budget_mb or np.prod(shape.patch) > limit:
        smaller = _smaller(shape, spacing, median)
        if smaller is None:
            needed = memory(shape, MIN_BATCH)
            raise PlanError(
                "memory_budget_mb", f"{budget_mb:g} MB", f"{needed:.3g} MB at least, for two patches of {shape.patch}"
            )
        shape, shrunk = smaller, shrunk + 1
    room = round(budget_mb / memory(shape, 1))
    cap = round(voxels * MAX_COVERAGE / float(np.prod(shape.patch)))
    affordable = round(profile.batch_voxels / float(np.prod(shape.patch))) if profile.batch_voxels else room
    batch = max(MIN_BATCH, min(room, cap, affordable))
    features = _features(profile, dims, len(shape.strides))
    return _Design(shape, features, batch, start, shrunk, room, cap, memory(shape, batch))


def _first_shape(spacing: Float, patch: Float) -> Topology:
    """Topology of the first patch, made large enough to be halved at least once."""
    shape = topology(spacing, patch)
    if len(shape.strides) > 1:
        return shape
    fine = spacing / spacing.min() < 2
    return topology(spacing, np.where(fine, np.maximum(patch, 3 * MIN_EDGE), patch))


def _smaller(shape: Topology, spacing: Float, median: Float) -> Topology | None:
    """The shape with one axis a step shorter, the one that is largest relative to the median case where that can be.

    The step is the divisor of the shorter patch, which can be finer than that of the longer one (224 follows 256).
    """
    ratio = np.array(shape.patch) / median
    for axis in sorted(range(len(ratio)), key=lambda a: (ratio[a], a), reverse=True):
        shorter = np.array(shape.patch)
        shorter[axis] -= shape.divisor[axis]
        if shorter[axis] < 1:
            continue
        step = topology(spacing, shorter).divisor[axis]
        patch = np.array(shape.patch)
        patch[axis] -= step
        result = topology(spacing, patch)
        if len(result.strides) > 1 and np.prod(result.patch) < np.prod(shape.patch):
            return result
    return None


# ---- configurations --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Planner:
    """Makes the configurations and writes down why."""

    data: _Data
    profile: DeviceProfile
    device: Device
    budget_mb: float
    reasons: dict[str, str]

    def configurations(self) -> dict[ConfigurationName, Configuration]:
        """2d always; 3d_fullres unless the cases are pictures; 3d_lowres where patches see too little of a case."""
        data = self.data
        voxels = float(np.prod(data.median)) * data.count
        made: dict[ConfigurationName, Configuration] = {}
        flat = self._design(data.target[1:], data.median[1:], voxels)
        made["2d"] = self._configuration("2d", data.target, data.median, flat, True)
        if data.median[0] == 1:
            self.reasons["configurations.3d_fullres"] = "Not made: the median case has one slice."
            self.reasons["configurations.3d_lowres"] = "Not made: there is no 3d_fullres."
            return made
        full = self._design(data.target, data.median, voxels)
        low = self._lowres(full)
        made["3d_fullres"] = self._configuration("3d_fullres", data.target, data.median, full, low is not None)
        if low is not None:
            made["3d_lowres"] = self._configuration("3d_lowres", *low, False)
        return made

    def _design(self, spacing: Float, median: Float, voxels: float) -> _Design:
        return _design(spacing, median, self.data, self.profile, self.budget_mb, voxels)

    def _lowres(self, full: _Design) -> tuple[Float, Float, _Design] | None:
        """Spacing, median shape and design of the low-resolution configuration, or None and a reason."""
        data, key = self.data, "configurations.3d_lowres"
        size = whole = float(np.prod(data.median))
        patch = float(np.prod(full.shape.patch))
        seen = f"a patch of {_x(full.shape.patch)} is {patch / whole:.1%} of the median case of {_x(data.median)}"
        spacing, median, design = data.target.copy(), data.median, full
        while patch / size < LOWRES_COVERAGE:
            finer = spacing.max() / spacing > 2
            spacing = np.where(finer if finer.any() else True, spacing * LOWRES_STEP, spacing)
            exact = data.target / spacing * data.median
            size, median = float(np.prod(exact)), np.maximum(np.round(exact), 1.0)
            design = self._design(spacing, median, size * data.count)
            patch = float(np.prod(design.shape.patch))
        if design is full:
            self.reasons[key] = f"Not made: {seen} ({LOWRES_COVERAGE:.0%} is enough)."
            return None
        if whole / size < LOWRES_GAIN:
            self.reasons[key] = (
                f"Not made: {seen}, but {_mm(spacing)} mm would do, only {whole / size:.2g} times fewer voxels."
            )
            return None
        self.reasons[key] = f"Made because {seen}, less than {LOWRES_COVERAGE:.0%}."
        return spacing, median, design

    def _configuration(
        self, name: ConfigurationName, spacing: Float, median: Float, design: _Design, batch_dice: bool
    ) -> Configuration:
        data, dims = self.data, len(design.shape.patch)
        first = 3 - dims  # 2d leaves the first axis out
        mirrored = tuple(n - first for n in range(first, 3) if data.mirror[n] >= MIRROR_AGREEMENT)
        self.reasons.update(
            {f"configurations.{name}.{k}": v for k, v in self._why(name, spacing, median, design, batch_dice)}
        )
        sizes = [data.slices if dims == 2 else round(float(median[0])), *(round(float(n)) for n in median[1:])]
        return Configuration(
            spatial_dims=2 if dims == 2 else 3,
            spacing_mm=(None if dims == 2 else float(spacing[0]), float(spacing[1]), float(spacing[2])),
            median_shape=(sizes[0], sizes[1], sizes[2]),
            patch_size=design.shape.patch,
            batch_size=design.batch,
            batch_dice=batch_dice,
            mirror_axes=mirrored,
            network=NetworkPlan(
                features=design.features,
                kernel_sizes=design.shape.kernels,
                strides=design.shape.strides,
                deep_supervision=self.profile.deep_supervision,
            ),
            training=self.profile.training,
            estimated_memory_mb=design.memory_mb,
        )

    # ---- reasons -----------------------------------------------------------------------------------------------------

    def _why(
        self, name: ConfigurationName, spacing: Float, median: Float, design: _Design, batch_dice: bool
    ) -> Iterator[tuple[str, str]]:
        usual = design
        if self.device == "cpu":
            axes = slice(3 - len(design.shape.patch), None)
            voxels = float(np.prod(median)) * self.data.count
            usual = _design(spacing[axes], median[axes], self.data, PROFILES["gpu"], self.budget_mb, voxels)
        yield "spacing_mm", self._why_spacing(name, spacing)
        yield "median_shape", f"Median of the {self.data.count} cases' shapes, cropped and at the target spacing."
        yield "patch_size", self._why_patch(design, usual)
        yield "batch_size", self._why_batch(design, usual)
        yield "batch_dice", _why_batch_dice(name, batch_dice)
        yield "mirror_axes", self._why_mirror(3 - len(design.shape.patch))
        yield (
            "network.name",
            "nnU-Net's plain U-Net: two convolutions a stage with instance norm and leaky ReLU, strided ones down.",
        )
        yield "network.features", self._why_features(design, usual)
        yield (
            "network.strides",
            (
                f"An axis is halved while it has {2 * MIN_EDGE} voxels and its spacing is less than twice the finest: "
                f"{len(design.shape.strides)} stages, {_x(design.shape.divisor)} in all."
            ),
        )
        yield (
            "network.kernel_sizes",
            ("3 along an axis once its spacing is less than twice the finest, 1 before; 3 at the bottom."),
        )
        yield (
            "network.deep_supervision",
            (
                "As nnU-Net."
                if self.profile.deep_supervision
                else "Left out: on a CPU it costs more time than it brings."
            ),
        )
        yield "training", self._why_training()
        yield (
            "estimated_memory_mb",
            self._why_memory(design),
        )

    def _why_memory(self, design: _Design) -> str:
        scale = (
            f"on the scale on which nnU-Net's reference takes {REFERENCE_MEMORY_MB:g} MB"
            if self.profile.bytes_per_value is None
            else f"at {self.profile.bytes_per_value:g} bytes a number, beside some 400 MB for the program"
        )
        return f"{design.batch} patches' feature maps, {scale}; the budget is {self.budget_mb:g} MB."

    def _why_spacing(self, name: ConfigurationName, spacing: Float) -> str:
        data = self.data
        if name == "3d_lowres":
            return (
                f"{_mm(data.target)} mm made coarser by steps of {LOWRES_STEP - 1:.0%} to {_mm(spacing)} mm, until a "
                f"patch covers {LOWRES_COVERAGE:.0%} of the median case."
            )
        text = f"Median of the {data.count} cases along each axis: {_mm(data.median_spacing)} mm."
        if data.thinned:
            text += (
                f" Slices are more than 3 times thicker than pixels are wide, and few: their distance is the 10th "
                f"percentile, {data.target[0]:.4g} mm."
            )
        return text + (" Slices keep their own distance." if name == "2d" else "")

    def _why_patch(self, design: _Design, usual: _Design) -> str:
        text = (
            f"The voxels' aspect ratio, no larger than the median case, rounded up for the strides: {_x(design.start)}"
        )
        if design.shrunk:
            text += (
                f"; then {design.shrunk} steps off the axis that was largest relative to the median case, until two "
                f"patches fit into {self.budget_mb:g} MB"
            )
            if self.profile.patch_voxels:
                text += f" and a patch has at most {self.profile.patch_voxels:,} voxels"
        if usual.shape.patch != design.shape.patch:
            text += f". nnU-Net's rule for a GPU gives {_x(usual.shape.patch)}"
        return text + "."

    def _why_batch(self, design: _Design, usual: _Design) -> str:
        if self.profile.batch_voxels:
            return (
                f"{design.batch} on a CPU: small steps of {self.profile.batch_voxels:,} voxels, and many of them. "
                f"nnU-Net's rule for a GPU gives {usual.batch}."
            )
        return (
            f"{self.budget_mb:g} MB hold {design.room}; {MAX_COVERAGE:.0%} of the dataset's voxels are {design.cap}; "
            f"never fewer than {MIN_BATCH}."
        )

    def _why_features(self, design: _Design, usual: _Design) -> str:
        dims = len(design.shape.patch)
        text = f"{self.profile.base_features}, doubled at each stage up to {self.profile.max_features[dims]}"
        if usual.features != design.features:
            text += f", so that a CPU can train it; nnU-Net's rule gives {', '.join(map(str, usual.features))}"
        return text + "."

    def _why_mirror(self, first: int) -> str:
        figures = "; ".join(
            f"{AXIS_NAMES[self.data.axes[n]]} {self.data.mirror[n]:.2g}, "
            f"{'mirrored' if self.data.mirror[n] >= MIRROR_AGREEMENT else 'not mirrored'}"
            for n in range(first, 3)
        )
        return f"Agreement of the classes' places with their mirror images (from {MIRROR_AGREEMENT:g} on): {figures}."

    def _why_training(self) -> str:
        training = self.profile.training
        if self.device == "gpu":
            return "nnU-Net's recipe: SGD with Nesterov momentum, 1000 epochs of 250 iterations."
        usual = PROFILES["gpu"].training
        return (
            f"For minutes on a CPU: {training.optimiser} at {training.learning_rate:g} over {training.iterations} "
            f"iterations; nnU-Net's rule is {usual.optimiser} at {usual.learning_rate:g} over {usual.iterations}."
        )


def _why_batch_dice(name: ConfigurationName, batch_dice: bool) -> str:
    if name == "2d":
        return "Over the batch: many slices lack a class."
    if batch_dice:
        return "Over the batch: a patch sees so little of a case (there is a 3d_lowres) that it often lacks a class."
    return "For each patch: it sees enough of a case."


def _mm(values: Float) -> str:
    return " x ".join(f"{v:.4g}" for v in values)


def _x(values: Sequence[float] | Float) -> str:
    return "x".join(f"{v:g}" for v in values)


# ---- settings by hand ------------------------------------------------------------------------------------------------


def override_plan(plan: Plan, settings: Sequence[str], configuration: str) -> tuple[Plan, list[str]]:
    """A plan with fields set by hand, and what had to be made to fit.

    A field of ``Configuration``, its network or its training is addressed by its name alone
    (``plan.patch_size=[40,56,40]``), and is then set in ``configuration``; a whole dotted name works as well
    (``plan.configurations.2d.training.learning_rate=0.001``). Where patch or spacing change, strides, kernels and
    features follow, unless they are set too. A patch that the strides do not divide is rounded up, with a message.
    Where the architecture changes (``plan.network.name=residual_unet``), its usual numbers of convolutions follow.

    Returns:
        The new plan and messages for the user; its reasons say what was set by hand.

    Raises:
        PlanError: an unknown field, a wrong type, or an impossible value; what is allowed is listed.
    """
    wanted: dict[str, dict[str, str]] = defaultdict(dict)
    whole: list[str] = []
    reasons = dict(plan.reasons)
    for setting in settings:
        owner, field, text = _address(setting, configuration)
        key = f"configurations.{owner}.{field}" if owner else field
        reasons[key] = f"Set by hand to {text}. By rule: {plan.reasons.get(key, 'the usual value.')}"
        if owner:
            plan.configuration(owner)
            wanted[owner][field] = text
        else:
            whole.append(setting)
    messages: list[str] = []
    for owner, fields in wanted.items():
        fitted = _fit(plan, owner, fields, messages)
        whole += [f"plan.configurations.{owner}.{field}={text}" for field, text in fitted.items()]
        for field in fitted.keys() - fields.keys():
            reasons[f"configurations.{owner}.{field}"] = f"Follows from what was set by hand ({', '.join(fields)})."
    result = plan.override(whole)
    made = {name: estimated(result, c) if name in wanted else c for name, c in result.configurations.items()}
    for name in wanted:
        needed = made[typing.cast(ConfigurationName, name)].estimated_memory_mb
        if needed > plan.memory_budget_mb:
            messages.append(f"{name}: estimated at {needed:.0f} MB, more than the budget of {plan.memory_budget_mb:g}")
    return result.model_copy(update={"configurations": made, "reasons": reasons}), messages


def _address(setting: str, configuration: str) -> tuple[str, str, str]:
    """Configuration ("" for none), field below it, and value of a setting."""
    name, separator, text = setting.partition("=")
    head, _, path = name.strip().partition(".")
    if not separator or head != "plan" or not path:
        raise PlanError(f"--set {setting}", "not a setting", "plan.FIELD=VALUE")
    first, _, rest = path.partition(".")
    if first == "configurations":
        owner, _, field = rest.partition(".")
        if field:
            return owner, field, text.strip()
    elif first in Configuration.model_fields:
        return configuration, path, text.strip()
    elif first in NetworkPlan.model_fields:
        return configuration, f"network.{path}", text.strip()
    elif first in TrainingPlan.model_fields:
        return configuration, f"training.{path}", text.strip()
    elif first in Plan.model_fields and first not in _FIXED:
        return "", path, text.strip()
    raise PlanError(f"--set {setting}", _why_not(first), ", ".join(sorted(_settable())), "name one of these fields")


def _why_not(first: str) -> str:
    if first in ("device", "memory_budget_mb"):
        return f"{first} is what a plan is made for: choose it when planning"
    return f"{first} cannot be set by hand" if first in _FIXED else f"the plan has no field {first!r}"


def _settable() -> set[str]:
    records: tuple[type[BaseModel], ...] = (Configuration, NetworkPlan, TrainingPlan)
    return {name for record in records for name in record.model_fields} | set(Plan.model_fields) - set(_FIXED)


def _fit(plan: Plan, name: str, fields: Mapping[str, str], messages: list[str]) -> dict[str, str]:
    """The fields to set so that patch, strides, kernels and features of a configuration fit together."""
    old = plan.configuration(name)
    result = dict(fields)
    spacing = _parsed(tuple[float | None, float, float], fields, "spacing_mm", old.spacing_mm)
    patch = _parsed(Sizes, fields, "patch_size", old.patch_size)
    strides = _parsed(tuple[Sizes, ...], fields, "network.strides", old.network.strides)
    _refuse_impossible(name, old, spacing, patch, strides)
    if spacing != old.spacing_mm:
        ratio = [1.0 if a is None or b is None else a / b for a, b in zip(old.spacing_mm, spacing, strict=True)]
        shape = [max(1, round(n * r)) for n, r in zip(old.median_shape, ratio, strict=True)]
        result.setdefault("median_shape", str(shape))
    if (spacing != old.spacing_mm or patch != old.patch_size) and "network.strides" not in fields:
        used = np.array([s if s is not None else 1.0 for s in spacing[-old.spatial_dims :]])
        shape_for = _first_shape(used, np.array(patch, dtype=float))
        strides = shape_for.strides
        result["network.strides"] = _json(strides)
        result.setdefault("network.kernel_sizes", _json(shape_for.kernels))
        patch_goal = np.maximum(patch, shape_for.patch)
    else:
        patch_goal = np.array(patch)
    if len(strides) != len(old.network.features):
        features = PROFILES[plan.device]
        first = replace(features, base_features=old.network.features[0])
        result.setdefault("network.features", _json(_features(first, old.spatial_dims, len(strides))))
        usual = [(3,) * old.spatial_dims] * len(strides)
        result.setdefault("network.kernel_sizes", _json(usual))
    _fit_convs(old.network, len(strides), result)
    divisor = divisor_of(strides)
    fitting = _integers(np.ceil(patch_goal / divisor) * divisor)
    if fitting != tuple(patch):
        messages.append(f"{name}: patch_size {_x(patch)} was rounded up to {_x(fitting)}, a multiple of {_x(divisor)}")
    if "patch_size" in fields or fitting != old.patch_size:
        result["patch_size"] = _json(fitting)
    return result


def _fit_convs(old: NetworkPlan, stages: int, fields: dict[str, str]) -> None:
    """Set the convolutions that an architecture usually has, where it is a new one or the number of stages changes."""
    name = fields.get("network.name", old.name).strip('"')
    convs: int | Sizes = RESENC_BLOCKS[:stages] if name == "residual_unet" else 2
    decoder_convs = 1 if name == "residual_unet" else 2
    another = name != old.name
    misfit = isinstance(old.decoder_convs, tuple) and len(old.decoder_convs) != stages - 1
    if (another and decoder_convs != old.decoder_convs) or misfit:
        fields.setdefault("network.decoder_convs", _json(decoder_convs))
    misfit = isinstance(old.convs_per_stage, tuple) and len(old.convs_per_stage) != stages
    if (another and convs != old.convs_per_stage) or misfit:
        fields.setdefault("network.convs_per_stage", _json(convs))


def _refuse_impossible(
    name: str, old: Configuration, spacing: Sequence[float | None], patch: Sizes, strides: Sequence[Sizes]
) -> None:
    dims = old.spatial_dims
    if len(patch) != dims or min(patch) < 1:
        raise PlanError(f"plan.configurations.{name}.patch_size", _x(patch), f"{dims} positive sizes")
    if not strides or any(len(stride) != dims or min(stride) < 1 for stride in strides):
        raise PlanError(f"plan.configurations.{name}.network.strides", f"{strides}", f"{dims} positive steps a stage")
    if any(s is not None and not s > 0 for s in spacing) or (spacing[0] is None) != (dims == 2):
        raise PlanError(
            f"plan.configurations.{name}.spacing_mm", f"{spacing}", "positive lengths; for 2d, null and two of them"
        )


def _parsed(kind: Any, fields: Mapping[str, str], field: str, old: Any) -> Any:
    if field not in fields:
        return old
    try:
        return TypeAdapter(kind).validate_json(fields[field])
    except ValidationError as failure:
        reason = failure.errors(include_url=False)[0]["msg"]
        raise PlanError(f"plan.{field}", f"{fields[field]}: {reason}", f"a value as {_json(old)}") from None


def _json(value: Any) -> str:
    return TypeAdapter(Any).dump_json(value).decode()


def estimated(plan: Plan, configuration: Configuration) -> Configuration:
    """A configuration with the memory that a training step of it is estimated to take, on the plan's device."""
    network = configuration.network
    shape = Topology(configuration.patch_size, network.strides, network.kernel_sizes)
    values = feature_values(
        shape, network.features, network.convs_per_stage, plan.labels.count, network.decoder_convs, network.name
    )
    memory = _memory_mb(
        values * configuration.batch_size,
        configuration.spatial_dims,
        PROFILES[plan.device].bytes_per_value,
        network.name,
    )
    return configuration.model_copy(update={"estimated_memory_mb": memory})
