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


def suffix_of(path: Path) -> str | None:
    """The known image ending of a file name (``.nii.gz`` counts as one), or None."""
    name = path.name.lower()
    return max((s for s in SUFFIXES if name.endswith(s)), key=len, default=None)


def name_of(path: Path) -> str:
    """The file name without its image ending: the case's name in a folder of images."""
    return path.name[: -len(suffix_of(path) or path.suffix) or None]


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
        Volume with a finite float32 array (C, I, J, K).

    Raises:
        UnreadableFile: a file is damaged or of no known format.
        GeometryMismatch: the files of the channels lie on different grids.
        InputError: voxels that are not finite, or another number of channels.
    """
    files = [paths] if isinstance(paths, Path) else list(paths)
    parts = [format_of(path).read(path) for path in files]
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
    return replace(first, array=finite_float32(array, files[0]), paths=tuple(files), warnings=warnings)


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


def finite_float32(array: NDArray[Any], where: object) -> NDArray[np.float32]:
    """The array as float32.

    Raises:
        InputError: a value is NaN or infinite, or too large for float32; with their number.
    """
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(array, dtype=np.float32)
    bad = int(result.size - np.count_nonzero(np.isfinite(result)))
    if bad:
        raise InputError(where, f"{bad:,} voxels are not finite (NaN or infinite)", "finite intensities", "repair it")
    return result


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
