"""Segmenter: fit and predict for people who have arrays and no files, by the stations of ``medseg run``.

``fit`` writes the arrays down as a dataset and hands that to ``pipeline.run``: it is checked, planned, trained, packed
and scored as any other, and a model from here is the same kind of package as one from the command line.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg import io
from medseg.errors import DatasetError, InputError
from medseg.evaluate import Evaluation
from medseg.folder import writing_to
from medseg.io import nifti
from medseg.package import ModelPackage, load_package, write_package, zip_package
from medseg.pipeline import run
from medseg.plan import ConfigurationName, Plan
from medseg.predict import Predictor, PredictSettings
from medseg.progress import Progress, silent
from medseg.recipe import settings_of
from medseg.records import write_json
from medseg.train import TrainSettings, seconds_of
from medseg.volume import Volume

SpatialDims = Literal[2, 3]
_SHAPES = {2: "(H, W) or (C, H, W)", 3: "(I, J, K) or (C, I, J, K)"}


class Segmenter:
    """A model that is trained on images and masks in memory, and segments images.

    An image or mask is one of:

    - an array or tensor, (I, J, K) or (C, I, J, K) where ``spatial_dims`` is 3, (H, W) or (C, H, W), rows first, where
      it is 2. Channels come first, and a mask has none or one. A volume lies along RAS with ``spacing_mm``, a picture
      as a file of it would, a mask on its image's grid.
    - an image that knows its grid: a nibabel or SimpleITK image, a MONAI MetaTensor, or a tuple (array, affine to RAS+
      mm). Its axes are (I, J, K), or (I, J) where ``spatial_dims`` is 2, after the channels.
    - a path, or a tuple of paths, one a channel. Such files are read where they lie.

    As in ``medseg run``, the network is trained on four fifths of the cases, and the rest (fold 0, one case at least)
    is segmented and scored: a model comes with figures of cases that it has not seen.

    Args:
        labels: name -> integer in the masks, 0 being background; or as in an nnU-Net ``dataset.json``, where a list of
            integers is a region and the name "ignore" marks voxels to leave out. None takes the integers that the masks
            hold and calls them ``label_1``, ``label_2``, ...
        channels: names, as "CT", which decide on the normalisation. None gives names that say nothing: each image is
            brought to mean 0 and standard deviation 1.
        spatial_dims: 3 for volumes, 2 for pictures: what the axes of an array mean.
        time_budget: length of training, as "90s", "10m" or "1h30m".
        iterations: length of training in steps. With neither, the plan's: minutes on a CPU, nnU-Net's 250,000 steps on
            a GPU.
        configuration: of the plan; None takes 3d_fullres where there is one, else 2d.
        recipe: name of a set of plan settings, as "classic".
        overrides: plan settings, as "plan.batch_size=4"; they come after the recipe's.
        device: of training and prediction: auto, cpu, cuda, cuda:1 or mps.
        seed: of weights, batches and augmentation.
        folder: where everything is written and kept: ``fit`` with the same data and settings goes on from what is
            there. None is a temporary folder, and each ``fit`` trains anew.

    Raises:
        InputError: an argument is impossible, or both lengths are given.
        PlanError: no recipe has this name.
    """

    def __init__(
        self,
        labels: Mapping[str, int | Sequence[int]] | None = None,
        channels: Sequence[str] | None = None,
        *,
        spatial_dims: SpatialDims = 3,
        time_budget: str | None = None,
        iterations: int | None = None,
        configuration: ConfigurationName | None = None,
        recipe: str | None = None,
        overrides: Sequence[str] = (),
        device: str = "auto",
        seed: int = 0,
        folder: Path | str | None = None,
    ) -> None:
        if spatial_dims not in _SHAPES:
            raise InputError("spatial_dims", f"is {spatial_dims!r}", "2 for pictures, 3 for volumes")
        seconds = None if time_budget is None else seconds_of(time_budget)
        settings = {"time_budget_s": seconds, "iterations": iterations, "device": device, "seed": seed}
        self.labels = labels
        self.channels = (channels,) if isinstance(channels, str) else channels
        self.spatial_dims: SpatialDims = spatial_dims
        self.settings = TrainSettings.checked(settings, "Segmenter")
        self.configuration = configuration
        self.overrides = (*settings_of(recipe), *overrides)
        self.folder = None if folder is None else Path(folder)
        self._predictor: Predictor | None = None
        self._evaluation: Evaluation | None = None

    def fit(
        self, images: Iterable[Any], masks: Iterable[Any], spacing_mm: Any = None, *, progress: Progress = silent
    ) -> Segmenter:
        """Train on cases, and score those held out.

        Args:
            images: two at least, of equal channels; see the class. The first axis of a single array is the cases.
            masks: one an image, of integers.
            spacing_mm: of arrays without a grid, along their axes: one for all cases, or a list of one a case. None is
                1 mm.
            progress: told how far each station is.

        Returns:
            The segmenter itself.

        Raises:
            DatasetError: cases cannot be used; every one is listed, by its number from 0.
            PlanError: an override or the configuration is impossible.
            TrainingError: training cannot go on.
            InputError: ``spacing_mm`` is none, the device does not exist, or ``folder`` cannot be written to.
        """
        images, masks = list(images), list(masks)
        if len(images) != len(masks) or len(images) < 2:
            found = f"{len(images)} images and {len(masks)} masks"
            raise DatasetError("fit", found, "two at least, to train and to validate, and a mask for each image")
        spacings = _spacings(spacing_mm, len(images), self.spatial_dims)
        with _folder(self.folder) as folder:
            with writing_to(folder):
                self._write(images, masks, spacings, folder / "dataset")
            try:
                result = run(
                    folder / "dataset",
                    folder,
                    configuration=self.configuration,
                    train=self.settings,
                    overrides=self.overrides,
                    report=False,  # arrays are looked at where they came from
                    progress=progress,
                )
            except DatasetError as failure:
                raise _unusable(failure.found) from None
            self._take(load_package(result.package))
        self._evaluation = result.evaluation
        return self

    def predict(self, images: Any, spacing_mm: Any = None) -> Any:
        """Segment an image, or each one of a list.

        Args:
            images: see the class. A list is several images; anything else is one.
            spacing_mm: as in ``fit``.

        Returns:
            A mask, an integer array with the values of the training masks; or a list of them. Its axes are the image's
            without channels: (I, J, K) for volumes; with ``spatial_dims`` 2, (H, W) for an array or the file of a
            picture, (I, J) for any other image of one slice.

        Raises:
            InputError: nothing was fitted or loaded, or an image cannot be used.
        """
        items = images if isinstance(images, list) else [images]
        spacings = _spacings(spacing_mm, len(items), self.spatial_dims)
        masks = [
            self._segment(_Image(item, self.spatial_dims, spacing, "image"))
            for item, spacing in zip(items, spacings, strict=True)
        ]
        return masks if isinstance(images, list) else masks[0]

    def save(self, path: Path | str) -> None:
        """Write the model package: a folder, or one file where the path ends in ``.zip``.

        Raises:
            InputError: nothing was fitted or loaded.
        """
        package, path = self.package, Path(path)
        if path.suffix.lower() != ".zip":
            write_package(package, path)
            return
        with _folder(None) as folder:
            write_package(package, folder)
            zip_package(folder, path)

    @classmethod
    def load(cls, path: Path | str, *, device: str = "auto") -> Segmenter:
        """A segmenter with the model of a package, from ``save`` or from ``medseg run``; folder or zip.

        Labels, channels, configuration and ``spatial_dims`` (2 where the median case has one slice) are the package's.

        Raises:
            PackageError: the package is incomplete, altered or of another version.
            InputError: the device is not there.
        """
        package = load_package(Path(path))
        plan = package.plan
        ignore = {} if plan.labels.ignore is None else {"ignore": plan.labels.ignore}
        loaded = cls(
            {**plan.labels.values, **plan.labels.regions, **ignore},
            plan.channels,
            spatial_dims=2 if package.configuration.median_shape[0] == 1 else 3,
            configuration=package.manifest.configuration,
            device=device,
        )
        loaded._take(package)
        return loaded

    @property
    def package(self) -> ModelPackage:
        """The trained model.

        Raises:
            InputError: nothing was fitted or loaded.
        """
        return self._ready.package

    @property
    def plan(self) -> Plan:
        """Every decision that was made from the data, with its reason; errors as for ``package``."""
        return self.package.plan

    @property
    def evaluation(self) -> Evaluation:
        """All scores of the held-out cases, ``case_0``, ``case_1``, ... by their number.

        Raises:
            InputError: nothing was fitted here. A loaded package has its mean Dice in ``package.manifest.folds``.
        """
        if self._evaluation is None:
            raise InputError("Segmenter", "has scored no case", "a fitted one", "call fit(images, masks)")
        return self._evaluation

    @property
    def scores(self) -> dict[str, float | None]:
        """Mean Dice over the held-out cases, by class; None where no case has the class. Errors as ``evaluation``."""
        return {found.name: found.dice.mean if found.dice else None for found in self.evaluation.classes}

    @property
    def _ready(self) -> Predictor:
        if self._predictor is None:
            raise InputError("Segmenter", "has no model", "a fitted one", "call fit(images, masks), or Segmenter.load")
        return self._predictor

    def _take(self, package: ModelPackage) -> None:
        self._predictor = Predictor(package, PredictSettings(device=self.settings.device))
        self._evaluation = None

    def _segment(self, image: _Image) -> NDArray[Any]:
        mask = self._ready(image.paths or (image.volume.array, image.volume.geometry.affine)).array
        if self.spatial_dims == 2 and mask.shape[2] == 1:
            mask = mask[..., 0].T if image.rows_first else mask[..., 0]
        return np.ascontiguousarray(mask)

    def _write(self, images: Sequence[Any], masks: Sequence[Any], spacings: NDArray[Any], root: Path) -> None:
        """Write down what is in memory, and the list of all cases.

        Raises:
            DatasetError: something is no image; every such case is listed.
        """
        listed, faults = {}, []
        channels, labels = self.channels, {} if self.labels is None else dict(self.labels)
        for number, (given, marked, spacing) in enumerate(zip(images, masks, spacings, strict=True)):
            name = f"case_{number:0{len(str(len(images) - 1))}d}"  # sorted as they were given
            image = _Image(given, self.spatial_dims, spacing, "image")
            mask = _Image(marked, self.spatial_dims, spacing, "mask", image)
            try:
                label = mask.put(root / "labelsTr" / f"{name}.nii")[0]
                listed[name] = {"images": image.put(root / "imagesTr" / f"{name}.nii"), "label": label}
                channels = channels or [f"channel_{n}" for n in range(len(image.volume.array))]
                if self.labels is None:
                    labels |= {f"label_{value}": value for value in mask.values()}
            except InputError as failure:
                faults.append(f"{name}: {failure}")
        if faults:
            raise _unusable("\n  ".join([f"{len(faults)} of {len(images)} cases cannot be used:", *faults]))
        names = {str(n): name for n, name in enumerate(channels or ())}
        body = {"name": "Segmenter", "channel_names": names, "labels": {"background": 0, **labels}, "dataset": listed}
        write_json(root / "dataset.json", body)


@dataclass(frozen=True, eq=False)
class _Image:
    """An image or a mask as it was given.

    Attributes:
        given: see ``Segmenter``.
        spatial_dims: what its axes mean.
        spacing_mm: along the axes, for one that does not know its grid.
        where: what it is called in errors.
        partner: the image that a mask belongs to.
    """

    given: Any
    spatial_dims: SpatialDims
    spacing_mm: NDArray[np.float64]
    where: str
    partner: _Image | None = None

    @cached_property
    def paths(self) -> list[Path]:
        """The files, one or one a channel; none for what is in memory."""
        parts = self.given if isinstance(self.given, tuple | list) else [self.given]
        are_paths = all(isinstance(part, str | os.PathLike) for part in parts)
        return [Path(part).absolute() for part in parts] if are_paths else []

    @property
    def is_bare(self) -> bool:
        """Whether it is voxels alone, on no grid."""
        return isinstance(self.given, np.ndarray) or (
            hasattr(self.given, "detach") and not hasattr(self.given, "affine")
        )

    @property
    def rows_first(self) -> bool:
        """Whether it is a picture whose first axis runs down, where that of a Volume runs right."""
        if self.is_bare and self.partner is not None:
            return self.partner.rows_first
        return self.spatial_dims == 2 and (self.is_bare or (bool(self.paths) and io.is_picture(self.paths[0])))

    @cached_property
    def volume(self) -> Volume:
        """Its voxels, of a number type that NIfTI has, and its grid.

        Raises:
            InputError: it is no image of these dimensions.
        """
        if self.paths:
            return io.read_volume(self.paths)
        volume = self._in_memory()
        array = volume.array
        kind: Any = {"b": np.uint8, "f": np.float32}.get(array.dtype.kind, array.dtype.newbyteorder("="))
        with np.errstate(over="ignore"):  # to infinity, which is not accepted later on
            return replace(volume, array=array.astype(kind, copy=False))

    def _in_memory(self) -> Volume:
        if isinstance(self.given, tuple) and len(self.given) == 2:
            return self._placed(*self.given)
        if self.is_bare or hasattr(self.given, "detach"):
            return self._placed(self.given, self._own_affine() if self.is_bare else self.given.affine)
        return io.volume_of(self.given, self.where)

    def values(self) -> list[int]:
        """The integers of a mask but 0, sorted.

        Raises:
            InputError: there are other numbers, or it cannot be read.
        """
        array = io.read_mask(self.paths[0]).array if self.paths else io.integral(self.volume.array, self.where)
        return [int(value) for value in np.unique(array) if value]

    def put(self, target: Path) -> list[str]:
        """Its files: those that it has, or ``target``, to which what is in memory is written.

        Raises:
            InputError: see ``volume``; or a mask has several files.
        """
        if self.partner is not None and len(self.paths) > 1:
            raise InputError(self.where, f"has {len(self.paths)} files", "one")
        if self.paths:
            return [str(path) for path in self.paths]
        nifti.write_volume(self.volume, target)
        return [f"{target.parent.name}/{target.name}"]

    def _own_affine(self) -> NDArray[np.float64]:
        """The grid of voxels without one: a mask's is its image's, a picture's is that of a file of it."""
        if self.partner is not None:
            return self.partner.volume.geometry.affine
        if self.spatial_dims == 3:
            return np.diag([*self.spacing_mm, 1.0])
        down, right = self.spacing_mm
        return np.diag([-right, -down, 1.0, 1.0])

    def _placed(self, voxels: Any, affine: Any) -> Volume:
        """An array or tensor on a grid."""
        array, matrix = _numpy(voxels), _numpy(affine).astype(np.float64)
        dims = self.spatial_dims
        if array.ndim not in (dims, dims + 1) or not array.size:
            remedy = f"spatial_dims is {dims}: give channels first, and cases one by one"
            raise InputError(self.where, f"has shape {array.shape}", _SHAPES[dims], remedy)
        if dims == 2:
            array = (array.swapaxes(-2, -1) if self.is_bare and self.rows_first else array)[..., np.newaxis]
            if matrix.shape == (3, 3):  # of a plane, as MONAI has it
                matrix = np.insert(np.insert(matrix, 2, 0.0, axis=0), 2, (0.0, 0.0, 1.0, 0.0), axis=1)
        return io.volume_of((array, matrix), self.where)


def _numpy(values: Any) -> NDArray[Any]:
    """An array, or a tensor on any device."""
    if not hasattr(values, "detach"):
        return np.asarray(values)
    tensor = values.detach().cpu()
    is_short = tensor.is_floating_point() and tensor.element_size() < 4  # NumPy has no bfloat16
    return np.asarray(tensor.float() if is_short else tensor)


def _spacings(spacing_mm: Any, count: int, dims: SpatialDims) -> NDArray[np.float64]:
    """One row of voxel distances a case.

    Raises:
        InputError: there are more or fewer, or one is no length.
    """
    try:
        given = np.ones(dims) if spacing_mm is None else np.asarray(spacing_mm, dtype=np.float64)
    except (TypeError, ValueError):
        given = np.empty(0)
    rows = np.tile(given, (count, 1)) if given.ndim == 1 else given
    if rows.shape != (count, dims) or not (np.isfinite(rows) & (rows > 0)).all():
        expected = f"{dims} lengths in mm, for all images or for each of the {count}"
        raise InputError("spacing_mm", f"is {spacing_mm!r}", expected)
    return rows


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    """The folder to work in, or else one that vanishes afterwards."""
    if kept is not None:
        yield kept
        return
    # Windows does not delete a file that is still mapped into memory
    with tempfile.TemporaryDirectory(prefix="medseg-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _unusable(found: str) -> DatasetError:
    return DatasetError("images and masks", found, "", "correct them, or leave them out")
