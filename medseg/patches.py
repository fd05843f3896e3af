"""Prepared cases on disk, and the training batches drawn from them.

A prepared case is three arrays that are opened memory-mapped, and a record that is written last. It is found by the
digest of everything it was made from, and its arrays are checked by theirs: a half-written, damaged or outdated case is
made again.

A batch is a pure function of the seed and the iteration's number, so training can stop and go on anywhere, and threads
can draw batches ahead without changing them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg import io
from medseg.augment import build_transform, read_size, seed_transform
from medseg.dataset import Case, Dataset
from medseg.errors import DatasetError, InputError, MedsegError
from medseg.plan import Configuration, Plan
from medseg.preprocess import GridTrace, Prepared, prepare
from medseg.progress import Progress, silent, track
from medseg.records import Record, digest_file, digest_of, replacing

CACHE_VERSION = 2
"""Part of every digest: raise it when the meaning of the stored arrays changes."""

MAX_COORDINATES = 10_000
"""Voxels of each class whose place is stored (nnU-Net's number)."""

_ARRAYS = ("image", "indices", "coordinates")


class PreparedRecord(Record):
    """What is known of a prepared case without opening its arrays.

    Attributes:
        case: id.
        trace: the way back to the native grid.
        files: SHA-256 of each array file, by its part.
    """

    case: str
    trace: GridTrace
    files: dict[str, str]


@dataclass(frozen=True)
class PreparedCase:
    """A prepared case on disk; arrays are memory-mapped when first asked for."""

    stem: Path
    record: PreparedRecord

    @property
    def id(self) -> str:
        """The case's id."""
        return self.record.case

    @cached_property
    def image(self) -> NDArray[Any]:
        """Normalised image (C, D, H, W), float16 or float32."""
        return self._open("image")

    @cached_property
    def indices(self) -> NDArray[np.uint8]:
        """Label indices (D, H, W)."""
        return self._open("indices")

    @cached_property
    def coordinates(self) -> dict[int, NDArray[np.int32]]:
        """Places (N, 3) of voxels of each class that the case has; the background and voxels to ignore are none."""
        table = np.asarray(self._open("coordinates"))
        return {int(c): np.ascontiguousarray(table[table[:, 0] == c, 1:]) for c in np.unique(table[:, 0])}

    def _open(self, part: str) -> NDArray[Any]:
        return np.load(_array_path(self.stem, part), mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]


def prepare_cases(
    dataset: Dataset, plan: Plan, configuration: str, folder: Path, progress: Progress = silent
) -> list[PreparedCase]:
    """Prepare every labelled case of a dataset into ``folder``; cases that are there and sound are kept.

    Everything else in the folder, prepared from other data or by another plan, is deleted: it can be large.

    Raises:
        DatasetError: lists every case that could not be prepared, with its reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prepared, failed = [], []
    for case in track(dataset.cases, f"preparing for {configuration}", progress):
        try:
            prepared.append(prepare_case(case, plan, configuration, folder))
        except MedsegError as failure:
            failed.append(f"{case.id}: {failure}")
    if failed:
        raise DatasetError(
            dataset.name, "cases that cannot be prepared:\n  " + "\n  ".join(failed), "", "leave them out"
        )
    files = {path for case in prepared for path in _files_of(case.stem)}
    for outdated in set(folder.iterdir()) - files:
        outdated.unlink()
    return prepared


def prepare_case(case: Case, plan: Plan, configuration: str, folder: Path) -> PreparedCase:
    """Prepare one case, or find it prepared."""
    if case.label is None:
        raise InputError(case.id, "has no label file", "a labelled case")
    sources = [digest_file(path) for path in (*case.paths, case.label)]
    setup = plan.configuration(configuration)
    grid = [plan.orientation, plan.axes, [n.model_dump() for n in plan.normalisation], plan.resampling.model_dump()]
    key = digest_of([CACHE_VERSION, sources, grid, plan.labels.model_dump(mode="json"), setup.spacing_mm])
    stem = folder / f"{case.id}-{key[:16]}"
    found = _find(stem)
    if found is not None:
        return found
    volume = io.read_volume(case.images, len(plan.channels))
    ready = prepare(volume, plan, setup, io.read_mask(case.label, plan.labels, volume))
    files = {}
    for part, array in zip(_ARRAYS, _storable(ready, plan.labels.count), strict=True):
        path = _array_path(stem, part)
        with replacing(path) as temporary:
            np.save(temporary, array, allow_pickle=False)
        files[part] = digest_file(path)
    record = PreparedRecord(case=case.id, trace=ready.trace, files=files)
    record.save(_record_path(stem))
    return PreparedCase(stem, record)


@dataclass(frozen=True)
class Batch:
    """Images float32 (N, C, *patch) and labels uint8 (N, 1, *patch), or what the loss wants to be made of these."""

    images: Tensor
    labels: Tensor


def draw_batch(
    cases: Sequence[PreparedCase],
    configuration: Configuration,
    seed: int,
    iteration: int,
    target_of: Callable[[Tensor], Tensor] | None = None,
) -> Batch:
    """The batch of an iteration: the same for the same cases, configuration, seed and number.

    ``target_of`` makes of the labels what the loss wants, if that is more.

    Cases are drawn with replacement. The last patches of the batch, ``training.foreground`` of them, are centred on a
    voxel of a class that is drawn from the classes of the case, the others anywhere (nnU-Net's rule, which forces
    foreground into every batch rather than by chance).
    """
    rng = np.random.default_rng([seed, iteration])
    transform = _transform_of_thread(configuration)
    images, labels = [], []
    forced = round(configuration.batch_size * configuration.training.foreground)
    for sample in range(configuration.batch_size):
        case = cases[int(rng.integers(len(cases)))]
        patch = draw_patch(case, configuration, rng, foreground=sample >= configuration.batch_size - forced)
        seed_transform(transform, int(rng.integers(2**32)))
        done = transform(patch)
        images.append(_plain(done["image"]))
        labels.append(_plain(done["labels"]))
    target = torch.stack(labels).to(torch.uint8)
    return Batch(torch.stack(images), target_of(target) if target_of else target)


def draw_patch(
    case: PreparedCase, configuration: Configuration, rng: np.random.Generator, *, foreground: bool
) -> dict[str, Tensor]:
    """One sample of ``read_size``: ``image`` (C, *size) float32 and ``labels`` (1, *size), zeros beyond the case.

    The patch (not the margin read around it) stays inside the case where the case is larger. In 2d it is a slice.
    """
    shape = case.indices.shape
    slices_only = configuration.spatial_dims == 2
    patch = (1, *configuration.patch_size) if slices_only else configuration.patch_size
    size = (1, *read_size(configuration)) if slices_only else read_size(configuration)
    centre = _foreground_voxel(case, rng) if foreground else None
    starts = []
    for axis in range(3):
        room = shape[axis] - patch[axis]
        if room <= 0:
            start = room // 2
        elif centre is None:
            start = int(rng.integers(room + 1))
        else:
            start = int(np.clip(centre[axis] - patch[axis] // 2, 0, room))
        starts.append(start - (size[axis] - patch[axis]) // 2)
    image = _cut(case.image, starts, size).astype(np.float32)
    labels = _cut(case.indices[np.newaxis], starts, size)
    if slices_only:
        image, labels = image[:, 0], labels[:, 0]
    return {"image": torch.from_numpy(image), "labels": torch.from_numpy(labels)}


def batches(
    cases: Sequence[PreparedCase],
    configuration: Configuration,
    seed: int,
    start: int,
    workers: int,
    target_of: Callable[[Tensor], Tensor] | None = None,
) -> Generator[Batch, None, None]:
    """Batches from iteration ``start`` on, without end; ``workers`` threads draw ahead (0: none)."""
    draw = partial(draw_batch, cases, configuration, seed, target_of=target_of)
    iteration = start
    if workers == 0:
        while True:
            yield draw(iteration)
            iteration += 1
    with ThreadPoolExecutor(workers) as pool:
        ahead = [pool.submit(draw, iteration + n) for n in range(2 * workers)]
        try:
            while True:
                ready = ahead.pop(0)
                ahead.append(pool.submit(draw, iteration + 2 * workers))
                yield ready.result()
                iteration += 1
        finally:
            for future in ahead:
                future.cancel()


_thread = threading.local()


def _transform_of_thread(configuration: Configuration) -> Any:
    """The transform of this thread: MONAI's transforms carry their random state and must not be shared."""
    if getattr(_thread, "configuration", None) != configuration:
        _thread.configuration = configuration
        _thread.transform = build_transform(configuration)
    return _thread.transform


def _foreground_voxel(case: PreparedCase, rng: np.random.Generator) -> NDArray[np.int32] | None:
    classes = sorted(case.coordinates)
    if not classes:
        return None
    places = case.coordinates[classes[int(rng.integers(len(classes)))]]
    voxel: NDArray[np.int32] = places[int(rng.integers(len(places)))]
    return voxel


def _cut(array: NDArray[Any], starts: Sequence[int], size: Sequence[int]) -> NDArray[Any]:
    """A block of (C, D, H, W) that may reach beyond the array; zeros there."""
    block = np.zeros((array.shape[0], *size), dtype=array.dtype)
    inside = [(max(s, 0), min(s + n, total)) for s, n, total in zip(starts, size, array.shape[1:], strict=True)]
    if all(a < b for a, b in inside):
        target = tuple(slice(a - s, b - s) for (a, b), s in zip(inside, starts, strict=True))
        block[(slice(None), *target)] = array[(slice(None), *(slice(a, b) for a, b in inside))]
    return block


def _storable(ready: Prepared, classes: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The arrays of a case as they are stored."""
    if ready.indices is None:
        raise ValueError("a case without labels cannot be stored for training")
    return _compact(ready.image), ready.indices, _coordinates(ready.indices, classes)


def _compact(image: NDArray[np.float32]) -> NDArray[Any]:
    """The image in half precision where that is as good as eleven bits of its largest value, else as it is."""
    with np.errstate(over="ignore"):
        half = image.astype(np.float16)
    error = np.abs(half - image).max(initial=0)
    return half if error <= 2**-11 * np.abs(image).max(initial=0) else image


def _coordinates(indices: NDArray[np.uint8], classes: int) -> NDArray[np.int32]:
    """Rows (class, d, h, w): up to ``MAX_COORDINATES`` voxels of each class, evenly drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    rows = [np.zeros((0, 4), dtype=np.int32)]
    for value in range(1, classes):
        places = np.flatnonzero(indices == value)
        if len(places) > MAX_COORDINATES:
            places = np.sort(rng.choice(places, MAX_COORDINATES, replace=False))
        where = np.stack(np.unravel_index(places, indices.shape), axis=1)
        rows.append(np.column_stack([np.full(len(where), value), where]).astype(np.int32))
    return np.concatenate(rows)


def _find(stem: Path) -> PreparedCase | None:
    """The prepared case at ``stem`` if its record and every array are there and unharmed."""
    try:
        record = PreparedRecord.load(_record_path(stem))
        sound = all(digest_file(_array_path(stem, part)) == record.files.get(part) for part in _ARRAYS)
    except (InputError, OSError):
        return None
    return PreparedCase(stem, record) if sound else None


def _files_of(stem: Path) -> list[Path]:
    return [_record_path(stem), *(_array_path(stem, part) for part in _ARRAYS)]


def _array_path(stem: Path, part: str) -> Path:
    return stem.with_name(f"{stem.name}.{part}.npy")


def _record_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.json")


def _plain(tensor: Tensor) -> Tensor:
    """A MONAI MetaTensor without its metadata, which would slow down every operation of the network."""
    as_tensor = getattr(tensor, "as_tensor", None)
    return tensor if as_tensor is None else as_tensor()
