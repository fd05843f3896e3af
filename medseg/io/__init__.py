"""Files: the only place where formats, and the LPS convention of some of them, exist.

A format is one module here with ``SUFFIXES``, ``read(path) -> Volume``, ``read_labels(path) -> Volume`` and
``write(mask, path)``, and one entry in ``FORMATS``. DICOM is two: images are series of files (``dicom``), masks are
segmentations (``segmentation``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medseg.errors import GeometryMismatch, IncompleteSeries, InputError
from medseg.geometry import Geometry
from medseg.io import dicom, itk, nifti, picture, seg_nrrd
from medseg.io.dicom import Series, segmentation
from medseg.progress import Progress, silent
from medseg.volume import Labels, Mask, Volume

Source = Path | Series
"""What an image, or a channel of one, is read from: a file, a place with one DICOM series, or a series."""


class Format(Protocol):
    """What a module of this package offers."""

    SUFFIXES: tuple[str, ...]

    def read(self, path: Path) -> Volume:
        """Read an image."""

    def read_labels(self, path: Path) -> Volume:
        """Read a mask: the stored values, where ``read`` gives what they look like (a palette's colours)."""

    def write(self, mask: Mask, path: Path) -> None:
        """Write a mask, atomically."""


class _Dicom:
    """DICOM as a format."""

    SUFFIXES = dicom.SUFFIXES

    def read(self, path: Path) -> Volume:
        """Read the only usable series of a place."""
        return dicom.read_series(series(path))

    def read_labels(self, path: Path) -> Volume:
        """Read a segmentation."""
        mask = segmentation.read_mask(path)
        return Volume(mask.array[np.newaxis], mask.geometry, mask.paths or (path,), mask.header, mask.warnings)

    def write(self, mask: Mask, path: Path, **options: Any) -> None:
        """Write a segmentation of the mask's series."""
        segmentation.write(mask, path, **options)


_DICOM = _Dicom()
FORMATS: tuple[Format, ...] = (nifti, itk, seg_nrrd, picture, _DICOM)
SUFFIXES = tuple(suffix for form in FORMATS for suffix in form.SUFFIXES)
_log = logging.getLogger(__name__)
_CHUNK = 1 << 22
"""Voxels that are looked at at a time."""


def suffix_of(path: Path) -> str | None:
    """The known image ending of a file name (``.nii.gz`` counts as one), or None."""
    name = path.name.lower()
    return max((s for s in SUFFIXES if name.endswith(s)), key=len, default=None)


def name_of(source: Source) -> str:
    """The case's name in a folder of images: the file's without its image ending; of a series no text of DICOM."""
    if not isinstance(source, Path):
        return source.name
    suffix = suffix_of(source) or ("" if source.is_dir() else source.suffix)
    return source.name[: -len(suffix) or None]


def title(volume: Volume) -> str:
    """What an image is called in messages: see ``name_of``; ``image`` where it is of no file."""
    if isinstance(volume.header, Series):
        return volume.header.name
    return name_of(volume.paths[0]) if volume.paths else "image"


def is_picture(source: Source) -> bool:
    """Whether a file is a picture (or a stack of them) by its ending: colours, and no size in the world."""
    return isinstance(source, Path) and suffix_of(source) in picture.SUFFIXES


def is_dicom(source: Source) -> bool:
    """Whether it is read as DICOM: a series, folder or zip, or a file by its ending or (without one) its content."""
    if not isinstance(source, Path):
        return True
    suffix = suffix_of(source)
    if suffix in dicom.SUFFIXES or source.is_dir():
        return True
    return suffix is None and source.is_file() and dicom.is_dicom(source)


def format_of(path: Path) -> Format:
    """The format of a file, by its ending; DICOM also by its content, and where it is a folder.

    Raises:
        InputError: it has no known ending.
    """
    if is_dicom(path):
        return _DICOM
    suffix = suffix_of(path)
    for form in FORMATS:
        if suffix in form.SUFFIXES:
            return form
    raise InputError(path, "has no known image ending", " ".join(SUFFIXES))


def series(
    place: Path | str, pattern: str = "", resample_irregular: bool = False, progress: Progress = silent
) -> Series:
    """The DICOM series of a folder, zip or file that a pattern means, without its pixels.

    Args:
        place: where it is.
        pattern: UID, name or pattern of the description (see ``medseg.io.dicom.select``); empty for the only usable
            series.
        resample_irregular: take a tilted or uneven series too, to be read on a straight grid.
        progress: told how many of the headers are read.

    Raises:
        IncompleteSeries: it cannot be used; with the reason.
        InputError: there is none, or several; which are listed.
    """
    found = dicom.select(dicom.scan(Path(place), progress), pattern, resample_irregular=resample_irregular)
    if len(found) > 1:
        names = ", ".join(one.uid for one in found[:10])
        raise InputError(place, f"holds such series of {len(found)} studies: {names}", "one", "name one by its UID")
    return found[0]


def located(source: Source) -> Source:
    """The series of a place that is DICOM; another file as it is. Errors as ``series``."""
    return series(source) if isinstance(source, Path) and is_dicom(source) else source


def read_volume(sources: Source | Sequence[Source], channels: int | None = None) -> Volume:
    """Read an image from one file, or from one file a channel.

    Args:
        sources: a file (a fourth dimension becomes channels) or DICOM series, or several of one channel each on one
            grid.
        channels: how many channels the image must have; None takes any.

    Returns:
        Volume with a finite array (C, I, J, K): integers as they are stored, other numbers as float32.

    Raises:
        UnreadableFile: a file is damaged or of no known format.
        IncompleteSeries: a DICOM series that cannot be used.
        GeometryMismatch: the files of the channels lie on different grids.
        InputError: voxels that are not finite, another number of channels, or several series at a place.
    """
    wanted = [sources] if isinstance(sources, Path | Series) else list(sources)
    return joined([_read_finite(source) for source in wanted], channels)


def joined(parts: Sequence[Volume], channels: int | None = None) -> Volume:
    """Images on one grid as one image of all their channels; see ``read_volume``.

    Raises:
        GeometryMismatch: they lie on different grids.
        InputError: another number of channels.
    """
    first = parts[0]
    for part in parts[1:]:
        if not part.geometry.close_to(first.geometry):
            raise GeometryMismatch(
                _where(part),
                f"grid {describe_grid(part)} differs from that of {Path(_where(first)).name}",
                describe_grid(first),
                "resample the channels of a case to one grid",
            )
    array = np.concatenate([part.array for part in parts]) if len(parts) > 1 else first.array
    if channels is not None and array.shape[0] != channels:
        count = len(array)
        raise InputError(_where(first), f"has {count} channel{'s' * (count != 1)}", f"{channels}")
    paths = tuple(path for part in parts for path in part.paths)
    warnings = tuple(w for part in parts for w in part.warnings)
    if len({part.header.frame_uid for part in parts if isinstance(part.header, Series)} - {""}) > 1:
        warnings = (*warnings, "the channels have several frames of reference: they may not lie over each other")
    return replace(first, array=array, paths=paths, warnings=warnings)


def outline(sources: Sequence[Source]) -> Volume | None:
    """What ``read_volume`` will give, by the headers alone: all voxels 0, and no memory taken.

    None where one is neither NIfTI nor DICOM.

    Raises:
        UnreadableFile, IncompleteSeries, InputError: a header that cannot be used.
    """
    parts = [_outline(source) for source in sources]
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    channels, kind = sum(len(part.array) for part in known), np.result_type(*(_finite_type(part) for part in known))
    first = known[0]
    whole = np.broadcast_to(np.zeros((), kind), (channels, *first.geometry.shape))
    return replace(first, array=whole, paths=tuple(path for part in known for path in part.paths))


def reading_bytes(sources: Sequence[Source]) -> int:
    """What ``read_volume`` takes at the most for files of NIfTI and DICOM, by their headers.

    Raises:
        UnreadableFile, IncompleteSeries, InputError: a header that cannot be used.
    """
    held = most = 0
    for source in sources:
        part = _outline(source)
        if part is None:
            raise InputError(name_of(source), "does not say in a header what it takes", "NIfTI or DICOM")
        kind = _finite_type(part)
        finite_bytes = kind.itemsize * part.array.size
        changing = part.array.nbytes + (0 if part.array.dtype == kind else finite_bytes)
        reading = dicom.reading_bytes(part.header) if isinstance(part.header, Series) else nifti.reading_bytes(part)
        most = max(most, held + reading, held + changing)
        held += finite_bytes
    return max(most, 2 * held) if len(sources) > 1 else most


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


def read_mask(path: Path, labels: Labels | None = None, image: Volume | Mask | None = None) -> Mask:
    """Read a mask.

    Args:
        path: a file; of a DICOM segmentation also the folder or zip that holds it alone.
        labels: the names that its values have.
        image: what it is of: segments, which may be stored on a part of its grid alone, are brought to it. Without
            it, what has to be assumed of where segments lie is logged.

    Returns:
        Mask with an integer array (I, J, K). Without ``labels`` the values are as in the file, and the names are the
        file's own, or None where it has none. With ``labels`` it is ``Mask.named``: what the file names (a DICOM
        segmentation, ``.seg.nrrd``, NIfTI with an extension of labels) is known by its names, else by its values. Those
        of NIfTI count too where not one of its names is known, which is logged.

    Raises:
        UnreadableFile: the file is damaged or of no known format.
        GeometryMismatch: segments whose voxels do not lie on those of ``image``.
        InputError: more than one channel, values that are no integers, or (with ``labels``) what ``Mask.named``
            refuses.
    """
    header = image.header if image else None
    mask = _read_mask(path, header if isinstance(header, Series) else None)
    if has_segments(path) and image is not None:
        mask = mask.placed(image.geometry)
    elif has_segments(path):
        for warning in mask.warnings:
            _log.warning("%s: %s", path, warning)
    if labels is None:
        return mask
    if mask.labels is not None and not has_segments(path) and not any(map(labels.like, mask.labels.names)):
        _log.warning("%s: none of its label names is known (expected %s): its values count", path, labels.names)
        mask = replace(mask, labels=None)
    return mask.named(labels)


def own_labels(path: Path) -> Labels | None:
    """The labels that a mask's file names, None where it names none; voxels are read of segments alone.

    Raises:
        UnreadableFile: the file is damaged or of no known format.
        InputError: segments that cannot be read.
    """
    if has_segments(path):
        return _read_mask(path, None).labels
    return nifti.labels_of(path) if format_of(path) is nifti else None


def has_segments(path: Path) -> bool:
    """Whether a mask is one of segments: known by their names, and perhaps on a part of its image's grid alone."""
    return is_dicom(path) or suffix_of(path) == ".seg.nrrd"


def write_mask(mask: Mask, path: Path, **options: Any) -> None:
    """Write a mask in the format of the path's ending, atomically, on exactly the grid of its geometry.

    Args:
        mask: what is written; as a DICOM segmentation (``.dcm``) a mask of a series, which is then its ``header``.
        path: file.
        options: of a DICOM segmentation: see ``medseg.io.dicom.segmentation.write``.
    """
    if suffix_of(path) == ".dcm":
        _DICOM.write(mask, path, **options)
    else:
        format_of(path).write(mask, path, **options)


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


def describe_grid(item: Volume | Mask) -> str:
    """Shape, spacing and orientation of a grid in a few words, for messages."""
    g = item.geometry
    size = "x".join(map(str, g.shape))
    return f"{size} at {'x'.join(f'{s:.4g}' for s in g.spacing)} mm {g.orientation}"


def _read_finite(source: Source) -> Volume:
    """A file or series with finite voxels. Of a series the place stands for its files: it is one word in messages."""
    source = located(source)
    if isinstance(source, Series):
        _check(source)
        volume = dicom.read_series(source)
        return replace(volume, array=finite(volume.array, source.name), paths=(source.place,))
    if suffix_of(source) is None and not source.exists():
        raise InputError(source, "does not exist", "an image, or a place with one DICOM series")
    volume = format_of(source).read(source)
    return replace(volume, array=finite(volume.array, source), paths=(source,))


def _outline(source: Source) -> Volume | None:
    """See ``outline``."""
    source = located(source)
    if isinstance(source, Series):
        geometry = _check(source)
        whole = np.broadcast_to(np.zeros((), source.kind), (1, *geometry.shape))
        return Volume(whole, geometry, (source.place,), source)
    return nifti.read_outline(source) if format_of(source) is nifti else None


def _check(source: Series) -> Geometry:
    """The grid of a series.

    Raises:
        InputError: it cannot be read, or stands for a choice that could not be made; with the reason.
    """
    if not source.instances:
        raise IncompleteSeries(source.place, source.reason)
    return dicom.check(source)


def _where(volume: Volume) -> Path | str:
    """What an image is called in errors: a file as the user named it; a place may hold several series."""
    return volume.header.name if isinstance(volume.header, Series) else volume.paths[0]


def _read_mask(path: Path, series: Series | None) -> Mask:
    """A mask with the names that its file knows."""
    if has_segments(path):
        return segmentation.read_mask(path, series) if is_dicom(path) else seg_nrrd.read_mask(path)
    form = format_of(path)
    volume = form.read_labels(path)
    if volume.array.shape[0] != 1:
        raise InputError(path, f"has {volume.array.shape[0]} channels", "a mask of one channel")
    array, paths = integral(volume.array[0], path), volume.paths or (path,)
    return Mask(array, volume.geometry, own_labels(path), paths, volume.header, volume.warnings)


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
