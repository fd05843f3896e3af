"""Files: the only place where formats, and the LPS convention of some of them, exist.

A format is one module here with ``SUFFIXES``, ``read(path) -> Volume``, ``read_labels(path) -> Volume`` and
``write(mask, path)``, and one entry in ``FORMATS``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medseg.errors import GeometryMismatch, InputError
from medseg.geometry import Geometry
from medseg.io import itk, nifti, picture
from medseg.volume import Labels, Mask, Volume


class Format(Protocol):
    """What a module of this package offers."""

    SUFFIXES: tuple[str, ...]

    def read(self, path: Path) -> Volume:
        """Read an image."""

    def read_labels(self, path: Path) -> Volume:
        """Read a mask: the stored values, where ``read`` gives what they look like (a palette's colours)."""

    def write(self, mask: Mask, path: Path) -> None:
        """Write a mask, atomically."""


FORMATS: tuple[Format, ...] = (nifti, itk, picture)
SUFFIXES = tuple(suffix for form in FORMATS for suffix in form.SUFFIXES)
_CHUNK = 1 << 22
"""Voxels that are looked at at a time."""


def suffix_of(path: Path) -> str | None:
    """The known image ending of a file name (``.nii.gz`` counts as one), or None."""
    name = path.name.lower()
    return max((s for s in SUFFIXES if name.endswith(s)), key=len, default=None)


def name_of(path: Path) -> str:
    """The file name without its image ending: the case's name in a folder of images."""
    return path.name[: -len(suffix_of(path) or path.suffix) or None]


def title(volume: Volume) -> str:
    """What an image is called in messages: its first file's name without ending, or ``image``."""
    return name_of(volume.paths[0]) if volume.paths else "image"


def is_picture(path: Path) -> bool:
    """Whether a file is a picture (or a stack of them) by its ending: colours, and no size in the world."""
    return suffix_of(path) in picture.SUFFIXES


def format_of(path: Path) -> Format:
    """The format of a file, by its ending.

    Raises:
        InputError: it has no known ending.
    """
    suffix = suffix_of(path)
    for form in FORMATS:
        if suffix in form.SUFFIXES:
            return form
    raise InputError(path, "has no known image ending", " ".join(SUFFIXES))


def read_volume(paths: Path | Sequence[Path], channels: int | None = None) -> Volume:
    """Read an image from one file, or from one file a channel.

    Args:
        paths: a file (a fourth dimension becomes channels), or several files of one channel each on one grid.
        channels: how many channels the image must have; None takes any.

    Returns:
        Volume with a finite array (C, I, J, K): integers as they are stored, other numbers as float32.

    Raises:
        UnreadableFile: a file is damaged or of no known format.
        GeometryMismatch: the files of the channels lie on different grids.
        InputError: voxels that are not finite, or another number of channels.
    """
    files = [paths] if isinstance(paths, Path) else list(paths)
    parts = [_read_finite(path) for path in files]
    first = parts[0]
    for part in parts[1:]:
        if not part.geometry.close_to(first.geometry):
            raise GeometryMismatch(
                part.paths[0],
                f"grid {describe_grid(part)} differs from that of {first.paths[0].name}",
                describe_grid(first),
                "resample the channels of a case to one grid",
            )
    array = np.concatenate([part.array for part in parts]) if len(parts) > 1 else first.array
    if channels is not None and array.shape[0] != channels:
        raise InputError(files[0], f"has {array.shape[0]} channels", f"{channels}")
    warnings = tuple(w for part in parts for w in part.warnings)
    return replace(first, array=array, paths=tuple(files), warnings=warnings)


def outline(paths: Sequence[Path]) -> Volume | None:
    """What ``read_volume`` will give, by the headers alone: all voxels 0, and no memory taken; None but for NIfTI.

    Raises:
        UnreadableFile, InputError: a header that cannot be used.
    """
    if any(format_of(path) is not nifti for path in paths):
        return None
    parts = [nifti.read_outline(path) for path in paths]
    channels, kind = sum(len(part.array) for part in parts), np.result_type(*(_finite_type(part) for part in parts))
    first = parts[0]
    whole = np.broadcast_to(np.zeros((), kind), (channels, *first.geometry.shape))
    return replace(first, array=whole, paths=tuple(paths))


def reading_bytes(paths: Sequence[Path]) -> int:
    """What ``read_volume`` takes at the most for files of NIfTI, by their headers.

    Raises:
        UnreadableFile, InputError: a header that cannot be used.
    """
    held = most = 0
    for part in (nifti.read_outline(path) for path in paths):
        kind = _finite_type(part)
        finite_bytes = kind.itemsize * part.array.size
        changing = part.array.nbytes + (0 if part.array.dtype == kind else finite_bytes)
        most = max(most, held + nifti.reading_bytes(part), held + changing)
        held += finite_bytes
    return max(most, 2 * held) if len(paths) > 1 else most


def volume_of(image: Any, where: str = "image") -> Volume:
    """An image in memory as a Volume, its voxels as they are.

    Args:
        image: a nibabel image, a SimpleITK image, a MONAI MetaTensor (C, I, J, K) with its affine, or a tuple (array,
            affine) with an array (I, J, K) or (C, I, J, K) and a 4x4 affine to RAS+ mm.
        where: its name in errors.

    Raises:
        InputError: it is none, or has no real numbers, no shape or no affine that an image can have.
    """
    if isinstance(image, tuple) and len(image) == 2:
        return _from_array(np.asarray(image[0]), image[1], where)
    if hasattr(image, "dataobj"):
        return nifti.from_nibabel(image)
    if hasattr(image, "GetDirection"):
        return itk.from_simpleitk(image)
    if hasattr(image, "affine"):  # MetaTensor
        return _from_array(image.detach().cpu().numpy(), image.affine, where)
    kinds = "a path, a list of paths, a nibabel or SimpleITK image, a MetaTensor, or (array, affine)"
    raise InputError(where, f"is a {type(image).__name__}", kinds)


def read_mask(path: Path, labels: Labels | None = None) -> Mask:
    """Read a mask.

    Returns:
        Mask with an integer array (I, J, K); values are as in the file.

    Raises:
        UnreadableFile: the file is damaged or of no known format.
        InputError: more than one channel, values that are no integers, or (with ``labels``) values without a name.
    """
    volume = format_of(path).read_labels(path)
    if volume.array.shape[0] != 1:
        raise InputError(path, f"has {volume.array.shape[0]} channels", "a mask of one channel")
    array = integral(volume.array[0], path)
    if labels is not None and (unknown := labels.unknown(array)):
        found = f"label values {unknown[:10]} have no name"
        raise InputError(path, found, f"0 and {dict(labels.values)}", naming(np.unique(array).tolist(), labels))
    return Mask(array, volume.geometry, labels, volume.paths, volume.header, volume.warnings)


def write_mask(mask: Mask, path: Path) -> None:
    """Write a mask in the format of the path's ending, atomically, on exactly the grid of its geometry."""
    format_of(path).write(mask, path)


def finite(array: NDArray[Any], where: object) -> NDArray[Any]:
    """The array with integers as they are and other numbers as float32, in the order that it has in memory.

    Raises:
        InputError: a value is NaN or infinite, or too large for float32; with their number.
    """
    if array.dtype.kind in "iu":
        return array
    if array.dtype == bool:
        return array.view(np.uint8)
    result = array if array.dtype == np.float32 else np.empty_like(array, dtype=np.float32)
    bad = 0
    axis = int(np.argmax(np.abs(array.strides))) if array.ndim else 0  # pieces that lie together
    step = max(1, _CHUNK * array.shape[axis] // max(array.size, 1))
    with np.errstate(over="ignore"):
        for start in range(0, array.shape[axis], step):
            place = (slice(None),) * axis + (slice(start, start + step),)
            if result is not array:
                result[place] = array[place]
            bad += int(result[place].size - np.count_nonzero(np.isfinite(result[place])))
    if bad:
        raise InputError(where, f"{bad:,} voxels are not finite (NaN or infinite)", "finite intensities", "repair it")
    return result


def finite_float32(array: NDArray[Any], where: object) -> NDArray[np.float32]:
    """The array as float32 in C order; errors as ``finite``."""
    return np.ascontiguousarray(finite(array, where), dtype=np.float32)


def integral(array: NDArray[Any], where: object) -> NDArray[Any]:
    """The array as integers.

    Raises:
        InputError: a value is further than 1e-6 from an integer, or does not fit into 32 bits.
    """
    if array.dtype.kind in "iu":
        return array
    if array.dtype == bool:
        return array.astype(np.uint8)
    rounded = np.rint(array)
    with np.errstate(invalid="ignore"):  # infinity minus infinity: NaN, which is wrong too
        wrong = ~(np.abs(array - rounded) <= 1e-6)
    if wrong.any():
        example = array[wrong].flat[0]
        raise InputError(
            where, f"{int(wrong.sum()):,} label values are no integers, as {example:.6g}", "integers", "threshold it"
        )
    if np.abs(rounded).max(initial=0) > np.iinfo(np.int32).max:
        raise InputError(where, f"a label value of {rounded.max():.3g}", "32-bit integers")
    values: NDArray[Any] = rounded.astype(np.int32)
    return values


def naming(values: Iterable[int], labels: Labels) -> str:
    """What to do about a mask with values that ``labels`` does not name."""
    if set(values) != {0, 255}:
        return "name them in dataset.json, or correct the mask"
    name = labels.names[0]
    return f'it is black and white: write "labels": {{"{name}": 255}} in dataset.json, or divide the mask by 255'


def describe_grid(item: Volume | Mask) -> str:
    """Shape, spacing and orientation of a grid in a few words, for messages."""
    g = item.geometry
    size = "x".join(map(str, g.shape))
    return f"{size} at {'x'.join(f'{s:.4g}' for s in g.spacing)} mm {g.orientation}"


def _read_finite(path: Path) -> Volume:
    volume = format_of(path).read(path)
    return replace(volume, array=finite(volume.array, path))


def _finite_type(volume: Volume) -> np.dtype[Any]:
    """The type that ``finite`` gives."""
    return volume.array.dtype if volume.array.dtype.kind in "iu" else np.dtype(np.float32)


def _from_array(array: Any, affine: Any, where: str) -> Volume:
    if array.dtype.kind not in "biuf":
        raise InputError(where, f"holds {array.dtype} voxels", "one real number a voxel and channel")
    array = array[np.newaxis] if array.ndim == 3 else array
    if array.ndim != 4:
        raise InputError(where, f"has shape {array.shape}", "(I, J, K) or (C, I, J, K)")
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
        raise InputError(f"affine of the {where}", "is no invertible 4x4 matrix", "voxel indices to RAS+ mm")
    return Volume(array, Geometry(array.shape[1:], matrix))
