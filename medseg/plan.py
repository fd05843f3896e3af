"""Plan: every decision derived from the data, each with a sentence of reason.

A plan alone rebuilds preprocessing and network: it is what a model package carries. It is a record, readable and
editable as JSON. Lengths are in mm; sizes of patches and strides are in *plan order*, the axes after ``orientation``
and ``axes`` have been applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from medseg.errors import PlanError
from medseg.records import Record
from medseg.volume import Labels

ConfigurationName = Literal["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"]
Sizes = tuple[int, ...]
Positive = Field(gt=0)


def divisor_of(strides: Iterable[Iterable[int]]) -> Sizes:
    """Product along each axis of the strides into the stages of a network."""
    return tuple(math.prod(map(int, along)) for along in zip(*strides, strict=True))


class Normalisation(Record):
    """How one channel's intensities are brought to a common scale.

    Attributes:
        scheme: ``ct``, for any unit that means the same in every image (Hounsfield units, reflectance), clips to
            [lower, upper] and subtracts mean and divides by std of the dataset's foreground; ``zscore`` uses the
            image's own mean and standard deviation; ``minmax`` maps the image to [0, 1]; ``rgb`` divides by 255;
            ``none`` leaves it.
        nonzero_only: ``zscore`` over the voxels that are not 0 in every channel, which stay 0.
    """

    scheme: Literal["ct", "zscore", "minmax", "rgb", "none"]
    mean: float = 0.0
    std: float = 1.0
    lower: float = 0.0
    upper: float = 0.0
    nonzero_only: bool = False


class Resampling(Record):
    """Orders of the splines: 0 nearest, 1 linear, 3 cubic.

    Attributes:
        image: order within the plane, and along every axis of a grid that is not anisotropic.
        image_along_low: order along the axis of low resolution of an anisotropic grid.
        label: order for the labels (each label resampled by itself, the largest wins).
        label_along_low: order for the labels along the axis of low resolution.
        logits: order for the network's output on the way back.
        logits_along_low: order for the network's output along the axis of low resolution.
        anisotropy: a grid is anisotropic where its largest spacing is more than this many times its smallest.
        separate: whether the axis of low resolution has orders of its own: where the grid is anisotropic (``auto``),
            ``always`` or ``never``.
    """

    image: Literal[0, 1, 3] = 3
    image_along_low: Literal[0, 1, 3] = 0
    label: Literal[0, 1] = 1
    label_along_low: Literal[0, 1] = 0
    logits: Literal[0, 1] = 1
    logits_along_low: Literal[0, 1] = 0
    anisotropy: float = Field(default=3.0, gt=1)
    separate: Literal["auto", "always", "never"] = "auto"


RESENC_BLOCKS = (1, 3, 4, *[6] * 11)
"""Residual blocks of each encoder stage in nnU-Net's ResEnc presets (Isensee et al., "nnU-Net Revisited", 2024)."""


class NetworkPlan(Record):
    """Topology of a U-Net; one entry a stage, highest resolution first.

    Attributes:
        name: an entry of ``medseg.networks.ARCHITECTURES``.
        features: channels of each stage.
        kernel_sizes: convolution kernel of each stage, in plan order.
        strides: step into each stage (all ones for the first).
        convs_per_stage: convolutions (of a residual network: blocks) of the encoder stages, one number for all or one
            a stage.
        decoder_convs: convolutions of each decoder stage, one number for all or one a stage.
        downsampling: into a stage by a ``stride`` of its first convolution, or by a max-``pool`` before it.
        norm: ``instance`` or ``batch``.
        act: ``leakyrelu`` (slope 0.01) or ``relu``.
        dropout: probability that a channel is left out in training.
        deep_supervision: train the lower decoder levels too.
    """

    name: str = "unet"
    features: tuple[int, ...]
    kernel_sizes: tuple[Sizes, ...]
    strides: tuple[Sizes, ...]
    convs_per_stage: Annotated[int, Positive] | tuple[Annotated[int, Positive], ...] = 2
    decoder_convs: Annotated[int, Positive] | tuple[Annotated[int, Positive], ...] = 2
    downsampling: Literal["stride", "pool"] = "stride"
    norm: Literal["instance", "batch"] = "instance"
    act: Literal["leakyrelu", "relu"] = "leakyrelu"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    deep_supervision: bool = True

    @model_validator(mode="after")
    def _one_entry_a_stage(self) -> Self:
        if not len(self.features) == len(self.kernel_sizes) == len(self.strides) > 1:
            raise ValueError(
                "features, kernel_sizes and strides need one entry a stage, and two stages at least; "
                f"got {len(self.features)}, {len(self.kernel_sizes)} and {len(self.strides)}"
            )
        if isinstance(self.convs_per_stage, tuple) and len(self.convs_per_stage) != len(self.features):
            raise ValueError(f"convs_per_stage needs one entry a stage; got {len(self.convs_per_stage)}")
        if isinstance(self.decoder_convs, tuple) and len(self.decoder_convs) != len(self.features) - 1:
            raise ValueError(f"decoder_convs needs one entry a decoder stage; got {len(self.decoder_convs)}")
        return self

    @property
    def divisor(self) -> Sizes:
        """Size along each axis that every patch is a multiple of."""
        return divisor_of(self.strides)


class TrainingPlan(Record):
    """The training recipe that fits the data and the device.

    Attributes:
        loss: an entry of ``medseg.losses.LOSSES``.
        optimiser: ``sgd`` (Nesterov momentum), ``adam`` (weight decay added to the gradient), ``adamw`` (weight decay
            of its own) or ``muon`` (orthogonalised momentum for the kernels, AdamW for the rest).
        learning_rate, weight_decay, momentum: of that optimiser; ``momentum`` is the first beta of Adam and AdamW.
        schedule: ``poly`` (power 0.9), ``cosine`` or ``linear`` to zero over the budget; ``step``, a tenth after each
            third of it; ``plateau``, a tenth, at most three times, where the mean training loss of a twentieth of the
            budget has not fallen for five of them.
        warmup: iterations of linear warm-up.
        gradient_clip: largest norm of the gradient.
        average: decay of the running average of the weights that is shipped; 0 ships the last weights.
        foreground: fraction of the patches centred on a voxel of a class.
        iterations: length of training where the person running it names none.
        augmentation: strength of the random transforms in ``medseg.augment``, or ``classic``: those of the U-Net's
            literature.
    """

    loss: str = "dice_ce"
    optimiser: Literal["sgd", "adam", "adamw", "muon"] = "sgd"
    learning_rate: float = Field(default=0.01, gt=0)
    weight_decay: float = Field(default=3e-5, ge=0)
    momentum: float = Field(default=0.99, ge=0, lt=1)
    schedule: Literal["poly", "cosine", "linear", "step", "plateau"] = "poly"
    warmup: int = Field(default=0, ge=0)
    gradient_clip: float = Field(default=12.0, gt=0)
    average: float = Field(default=0.0, ge=0, lt=1)
    foreground: float = Field(default=0.33, ge=0, le=1)
    iterations: int = Field(default=250_000, gt=0)
    augmentation: Literal["none", "light", "full", "classic"] = "full"


class Configuration(Record):
    """One way to look at the data: slices (2d), or volumes at full or low resolution.

    Attributes:
        spacing_mm: of the plan grid, in plan order; None keeps each image's own: for 2d along the first axis.
        median_shape: median of the cases' shapes on the plan grid, in plan order.
        patch_size: one entry a spatial dimension of the network, a multiple of ``network.divisor``.
        batch_size: patches of one training step.
        batch_dice: Dice over the whole batch rather than for each patch.
        mirror_axes: axes of the patch (0 first) that may be mirrored, in training and in prediction.
        estimated_memory_mb: what one training step is estimated to take.
        previous: the configuration whose mask the network sees beside the image, one channel a class (a cascade).
    """

    spatial_dims: Literal[2, 3]
    spacing_mm: tuple[float | None, float | None, float | None]
    median_shape: tuple[int, int, int]
    patch_size: Sizes
    batch_size: int = Field(gt=0)
    batch_dice: bool
    mirror_axes: tuple[int, ...]
    network: NetworkPlan
    training: TrainingPlan
    estimated_memory_mb: float = Field(gt=0)
    previous: ConfigurationName | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        dims = self.spatial_dims
        sizes = [self.patch_size, *self.network.kernel_sizes, *self.network.strides]
        if any(len(size) != dims for size in sizes) or min(min(size) for size in sizes) < 1:
            raise ValueError(f"patch_size, kernel_sizes and strides need {dims} positive entries each")
        if any(p % d for p, d in zip(self.patch_size, self.network.divisor, strict=True)):
            raise ValueError(f"patch_size {self.patch_size} is no multiple of {self.network.divisor}")
        if any(axis not in range(dims) for axis in self.mirror_axes):
            raise ValueError(f"mirror_axes {self.mirror_axes} must lie in 0..{dims - 1}")
        if self.network.name == "cell_segmenter" and self.training.loss == "bce_dice":
            raise ValueError("cell_segmenter gives probabilities of one softmax; bce_dice is no loss for it")
        return self


class Plan(Record):
    """All decisions for one dataset.

    Attributes:
        dataset: name, for people.
        fingerprint_digest: of the fingerprint that the plan was made from.
        device: ``cpu`` or ``gpu``: what the recipe is meant for.
        memory_budget_mb: what one training step may take.
        orientation: of the plan grid, before ``axes``; ``stored`` takes the voxel axes as they lie in the file, neither
            turned nor straightened, as nnU-Net does.
        axes: order in which the axes of that orientation become the plan's axes (slowest, lowest resolution first).
        channels: names, in order.
        normalisation: one a channel.
        labels: what is segmented.
        region_order: empty where the network gives one channel a class (softmax, the largest wins). Else it gives one
            a region of ``labels.regions`` (sigmoid, positive logits win), and this is the integer that each paints, a
            later one over an earlier.
        keep_largest: groups of label integers, done in order: of the voxels of a group only the largest connected
            component is kept.
        configurations: by name.
        reasons: dotted field name -> why it is what it is.
    """

    dataset: str
    fingerprint_digest: str
    device: Literal["cpu", "gpu"]
    memory_budget_mb: float = Field(gt=0)
    orientation: str = "RAS"
    axes: tuple[int, int, int]
    channels: tuple[str, ...]
    normalisation: tuple[Normalisation, ...]
    resampling: Resampling = Resampling()
    labels: Labels
    region_order: tuple[int, ...] = ()
    keep_largest: tuple[tuple[int, ...], ...] = ()
    configurations: dict[ConfigurationName, Configuration]
    reasons: dict[str, str] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if sorted(self.axes) != [0, 1, 2]:
            raise ValueError(f"axes must order 0, 1 and 2; got {self.axes}")
        if len(self.channels) != len(self.normalisation):
            raise ValueError(
                f"{len(self.channels)} channels need as many normalisations, not {len(self.normalisation)}"
            )
        if self.region_order and len(self.region_order) != len(self.labels.regions):
            raise ValueError(f"region_order needs one integer a region; got {self.region_order}")
        unknown = {*self.region_order, *(v for group in self.keep_largest for v in group)} - {
            *self.labels.values.values()
        }
        if unknown:
            raise ValueError(f"region_order and keep_largest use integers {sorted(unknown)} that no label has")
        return self

    @property
    def outputs(self) -> int:
        """Channels that the networks give: one a region, or one a class with the background."""
        return len(self.region_order) or self.labels.count

    def inputs(self, configuration: Configuration) -> int:
        """Channels that a network takes: those of the image, and in a cascade one a class of the earlier mask."""
        return len(self.channels) + (self.labels.count - 1 if configuration.previous else 0)

    def configuration(self, name: str) -> Configuration:
        """The configuration of that name.

        Raises:
            PlanError: the plan has none; the ones that it has are listed.
        """
        for known, configuration in self.configurations.items():
            if known == name:
                return configuration
        reason = self.reasons.get(f"configurations.{name}", "")
        raise PlanError("plan", f"has no configuration {name!r}. {reason}".strip(), " or ".join(self.configurations))
