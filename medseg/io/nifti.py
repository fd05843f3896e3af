"""NIfTI-1 and NIfTI-2, single files and .hdr/.img pairs, gzipped or not.

Reading is checked before it is trusted: gzip files are read to their end, so that CRC and length are verified; a file
shorter than its header says, a header that claims more than the file can hold, and an affine that is missing,
non-finite or singular are refused. Writing gives back the geometry fields of the header it was read with, bit for bit,
and nothing else of it (free-text fields can hold patient data). Masks have the names and colours of their labels in an
extension of the header (see ``caret``).
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import mmap
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Extension, Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from medseg.errors import InputError, UnreadableFile
from medseg.geometry import Geometry
from medseg.io import caret
from medseg.records import replacing
from medseg.volume import Labels, Mask, Volume

SUFFIXES: tuple[str, ...] = (".nii.gz", ".nii", ".hdr", ".hdr.gz", ".img", ".img.gz")
MAX_IMAGE_BYTES = 2**36
"""Largest image that a header may claim, 64 GiB."""
DEFLATE_MAX_RATIO = 1032
"""No deflate stream expands further, so a larger claim cannot be true (zlib, technical note)."""

_GZIP_MAGIC = b"\x1f\x8b"
_GEOMETRY_FIELDS = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"),
)
_METRE, _MICRON = 1, 3
_CHUNK, _WRITTEN = 1 << 21, 1 << 18
"""Bytes or voxels that are handled, and bytes that are written, at a time."""
_MAX_EXTENSIONS = 1 << 20
"""Bytes of extensions that are looked through for names of labels."""
_REPLACE = "copy the file again from its source"

log = logging.getLogger("medseg.io.nifti")


def read(path: Path) -> Volume:
    """Read a NIfTI file.

    Returns:
        Volume with array (C, I, J, K), scaled by slope and intercept, in the stored number type where they are trivial.

    Raises:
        UnreadableFile: damaged, truncated, empty, or no NIfTI.
        InputError: a number type, dimension, unit or affine that cannot be used.
    """
    header_path, data_path = _pair(path)
    header = _read_header(header_path)
    if not data_path.exists():
        raise UnreadableFile(path, f"its other half {data_path.name} is missing", "a .hdr beside its .img")
    if header_path == data_path and float(header["vox_offset"]) < int(header["sizeof_hdr"]):
        raise UnreadableFile(path, "the header places the voxels inside itself", "voxels behind the header", _REPLACE)
    warnings: list[str] = []
    expected = _expected_bytes(header, data_path)
    kind, shape = _kind(header, data_path), _shape(header, data_path, warnings)
    content = _read_bytes(data_path, expected, warnings)
    if _is_gzip(data_path) != data_path.name.lower().endswith(".gz"):
        warnings.append(f"is {'' if _is_gzip(data_path) else 'not '}compressed by gzip, other than its name says")
    array = _pixels(header, content, kind, shape, data_path)
    geometry = Geometry(array.shape[1:], _affine(header, path, warnings))
    if geometry.is_sheared:
        warnings.append(f"voxel axes are not orthogonal (cosine {geometry.shear:.4f}): handled on a straight grid")
    return Volume(array, geometry, (path,), header, tuple(warnings))


def read_outline(path: Path) -> Volume:
    """What ``read`` will give, by the header alone: a volume whose voxels are all 0 and take no memory.

    Raises:
        UnreadableFile, InputError: as ``read``, as far as the header shows it.
    """
    header_path, data_path = _pair(path)
    header = _read_header(header_path)
    _expected_bytes(header, data_path)
    kind = _kind(header, path).newbyteorder("=")
    if _scale(header, path) is not None:
        kind = _scaled_type(kind)
    array = np.broadcast_to(np.zeros((), kind), _shape(header, path, []))
    channels_first = _channels_first(array)
    return Volume(channels_first, Geometry(channels_first.shape[1:], _affine(header, path, [])), (path,), header)


def reading_bytes(outline: Volume) -> int:
    """Bytes that ``read`` takes at the most for the file of an outline: as stored, and beside it as scaled."""
    header, (path,) = outline.header, outline.paths
    stored = _kind(header, path).itemsize * outline.array.size
    return stored + (0 if _scale(header, path) is None else outline.array.nbytes)


read_labels = read


def labels_of(path: Path) -> Labels | None:
    """The names and colours of a mask's labels, of its header's extensions; None where they hold none.

    Raises:
        UnreadableFile: the file has no header of NIfTI, or cannot be unpacked.
    """
    header_path, data_path = _pair(path)
    header = _read_header(header_path)
    size, offset = int(header["sizeof_hdr"]), float(header["vox_offset"])
    end = offset if header_path == data_path and np.isfinite(offset) else np.inf
    with _opened(header_path) as stream, explained(header_path):
        stream.read(size)
        flag = stream.read(4)
        content = (
            stream.read(int(min(max(end - size - 4, 0), _MAX_EXTENSIONS))) if flag[:1] not in (b"", b"\0") else b""
        )
    tables = (caret.from_xml(part) for _, part in sorted(_extensions(content, header), key=lambda e: -e[0]))
    return next((labels for labels in tables if labels), None)


def write(mask: Mask, path: Path) -> None:
    """Write a mask, atomically; the same mask always gives the same bytes.

    Shape and affine are the mask's. Where it has a NIfTI header whose affine is the mask's, that header's geometry
    fields and codes go into the file bit for bit. Names and colours of its labels go into an extension.

    Raises:
        InputError: the path ends in neither .nii nor .nii.gz.
    """
    _write(mask.array, _header_for(mask, mask.array), path, _label_table(mask))


def write_volume(volume: Volume, path: Path) -> None:
    """Write an image as ``write`` does a mask; several channels become the fourth dimension.

    Raises:
        InputError: the path ends in neither .nii nor .nii.gz.
    """
    array = volume.array[0] if len(volume.array) == 1 else np.moveaxis(volume.array, 0, -1)
    _write(array, _header_for(volume, array), path)


class Probabilities:
    """Probabilities of several classes, put together block by block and written as NIfTI, all in little memory.

    They wait in a nameless file, as 16-bit integers: 65535 is 1. Close it, or use it in a ``with``.

    Args:
        shape: (I, J, K).
        count: of classes.
        folder: that the file is in; it needs 2 bytes a class and voxel.

    Raises:
        OSError: there is no room for the file.
    """

    def __init__(self, shape: tuple[int, ...], count: int, folder: Path) -> None:
        self.shape, self.count = shape, count
        size = 2 * count * int(np.prod(shape))
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close()
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now rather than a broken mapping later
                os.posix_fallocate(self._file.fileno(), 0, size)
            else:
                self._file.truncate(size)
            self._map = mmap.mmap(self._file.fileno(), size)
        except BaseException:
            self._file.close()
            raise
        self._array: NDArray[np.uint16] | None = None

    def put(self, place: tuple[slice, slice, slice], values: NDArray[np.float32]) -> None:
        """Take probabilities, 0 to 1, (count, i, j, k) of a part of the grid; where none are put they are 0."""
        if self._array is None:
            self._array = self._laid_out(values.shape[1:])
        self._array[(slice(None), *place)] = np.rint(values * np.float32(65535))
        self._forget()

    def write(self, index: int, mask: Mask, path: Path) -> None:
        """Write those of one class, atomically, with the grid and header fields of a mask.

        Raises:
            InputError: the path ends in neither .nii nor .nii.gz.
        """
        array = self._laid_out(self.shape) if self._array is None else self._array
        header = _header_for(mask, array[index])
        header["scl_slope"] = 1 / 65535
        _write(array[index], header, path)
        self._forget()

    def close(self) -> None:
        """Give the file's room back."""
        self._array = None
        with contextlib.suppress(BufferError):  # whoever still holds a part, as frames of a failure do, is the last
            self._map.close()
        self._file.close()

    def __enter__(self) -> Probabilities:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _laid_out(self, part: tuple[int, ...]) -> NDArray[np.uint16]:
        """The file as an array (count, I, J, K), so that parts of this shape lie together in it."""
        order = sorted(range(3), key=lambda axis: part[axis] / self.shape[axis])
        array = np.frombuffer(self._map, dtype=np.uint16).reshape(self.count, *(self.shape[axis] for axis in order))
        return array.transpose(0, *(1 + order.index(axis) for axis in range(3)))

    def _forget(self) -> None:
        """Let the system keep the pages in its cache of files rather than in this process."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def from_nibabel(image: Any) -> Volume:
    """A nibabel image in memory as a Volume (channels last become channels first).

    Raises:
        InputError: voxels that are no real numbers, more than 4 dimensions, or an affine that cannot be used.
    """
    array = np.asanyarray(image.dataobj)
    if array.dtype.kind not in "iuf":
        raise InputError("nibabel image", f"holds {array.dtype} voxels", "one real number a voxel and channel")
    if array.ndim not in (2, 3, 4):
        raise InputError("nibabel image", f"has {array.ndim} dimensions", "2, 3 or 4 (the last is channels)")
    channels_first = _channels_first(array.reshape(array.shape + (1,) * (3 - array.ndim)))
    header = image.header if isinstance(image.header, Nifti1Header) else None
    check_affine(image.affine, "nibabel image")
    return Volume(channels_first, Geometry(channels_first.shape[1:], image.affine), (), header)


def to_nibabel(mask: Mask) -> Any:
    """A mask as a nibabel image, with the geometry fields of the header it was read with."""
    kind = nibabel.Nifti2Image if isinstance(mask.header, Nifti2Header) else nibabel.Nifti1Image
    image = kind(mask.array, mask.geometry.affine, _header_for(mask, mask.array))
    if table := _label_table(mask):
        image.header.extensions.append(Nifti1Extension(caret.CODE, table))
    return image


def _label_table(mask: Mask) -> bytes:
    """What the extension for the labels holds; nothing where they have no names, or more than fits."""
    table = b"" if mask.labels is None else caret.to_xml(mask.labels)
    if len(table) <= caret.MAX_BYTES:
        return table
    log.warning("the names of the labels are too long for a NIfTI header (%d bytes): left out", len(table))
    return b""


def _extension(table: bytes, header: Nifti1Header) -> bytes:
    """The four bytes behind a header, and the extension: its size (with these numbers, in sixteens), its code, it."""
    if not table:
        return b"\0\0\0\0"
    padded = table + b" " * (-(len(table) + 8) % 16)
    numbers = np.array([len(padded) + 8, caret.CODE], dtype=f"{header.endianness}i4")
    return b"\1\0\0\0" + numbers.tobytes() + padded


def _extensions(content: bytes, header: Nifti1Header) -> Iterator[tuple[int, bytes]]:
    """The extensions that can hold a table of labels, each with its code, as far as they are sound."""
    start = 0
    while start + 16 <= len(content):
        size, code = (int(n) for n in np.frombuffer(content, dtype=f"{header.endianness}i4", count=2, offset=start))
        if size < 16 or size % 16 or start + size > len(content):
            return
        if code in (0, caret.CODE):
            yield code, content[start + 8 : start + size]
        start += size


def _write(array: NDArray[Any], header: Nifti1Header, path: Path, table: bytes = b"") -> None:
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        raise InputError(path, "an image of two files cannot be replaced at once", ".nii or .nii.gz")
    extension = _extension(table, header)
    header["vox_offset"] = len(header.binaryblock) + len(extension)
    with replacing(path) as temporary, _opened_for_writing(temporary) as stream:
        stream.write(header.binaryblock + extension)
        for part in pieces(array):
            content = memoryview(part.tobytes(order="F"))
            for start in range(0, len(content), _WRITTEN):  # what gzip is given at once it holds several times
                stream.write(content[start : start + _WRITTEN])


@contextlib.contextmanager
def _opened_for_writing(path: Path) -> Iterator[Any]:
    """The file as a stream that compresses where the name says so, without a time stamp."""
    with path.open("wb") as file:
        if path.name.lower().endswith(".gz"):
            with gzip.GzipFile("", "wb", 3, file, mtime=0) as stream:
                yield stream
        else:
            yield file


def pieces(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """An array in pieces of its last axis: what is done to them takes little memory."""
    step = max(1, _CHUNK * array.shape[-1] // max(array.size, 1))
    for start in range(0, array.shape[-1], step):
        yield array[..., start : start + step]


def _pair(path: Path) -> tuple[Path, Path]:
    """Header file and data file; the same for a single-file NIfTI."""
    for ending, other in ((".hdr", ".img"), (".img", ".hdr"), (".hdr.gz", ".img.gz"), (".img.gz", ".hdr.gz")):
        if path.name.endswith(ending):
            partner = path.with_name(path.name[: -len(ending)] + other)
            return (path, partner) if ending.startswith(".hdr") else (partner, path)
    return path, path


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file's bytes as a stream, unpacked where they begin as gzip does, whatever the file is called."""
    try:
        file = path.open("rb")
    except OSError as failure:
        raise UnreadableFile(path, f"cannot be opened: {failure.strerror}", "a readable NIfTI file") from None
    with file:
        magic = file.read(2)
        file.seek(0)
        if not magic:
            raise UnreadableFile(path, "is empty (0 bytes)", "a NIfTI file", _REPLACE)
        yield gzip.GzipFile(fileobj=file) if magic == _GZIP_MAGIC else file


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """What goes wrong while a file is read, as an UnreadableFile."""
    try:
        yield
    except EOFError:
        raise UnreadableFile(path, "the gzip stream ends early (truncated)", "a whole file", _REPLACE) from None
    except (gzip.BadGzipFile, zlib.error) as failure:
        raise UnreadableFile(path, f"the gzip data are damaged: {failure}", "a sound gzip file", _REPLACE) from None
    except OSError as failure:
        raise UnreadableFile(path, f"cannot be read: {failure}", "a readable file") from None


def _read_header(path: Path) -> Nifti1Header:
    with _opened(path) as stream, explained(path):
        head = bytes(stream.read(544))
    for kind, size, magics in (
        (Nifti1Header, 348, (b"n+1\0", b"ni1\0")),
        (Nifti2Header, 540, (b"n+2\0", b"ni2\0")),
    ):
        place = slice(344, 348) if size == 348 else slice(4, 8)
        if len(head) >= size and head[place] in magics:
            header = kind(head[:size], check=False)
            if int(header["sizeof_hdr"]) == size:
                return header
    analyze = len(head) >= 348 and 348 in (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big"))
    raise UnreadableFile(
        path,
        "is an Analyze 7.5 header, which does not say where left and right are" if analyze else "is no NIfTI file",
        "the NIfTI mark 'n+1', 'ni1', 'n+2' or 'ni2' in the header",
        "convert the original images to NIfTI",
    )


def _expected_bytes(header: Nifti1Header, path: Path) -> int:
    """Bytes that the header promises, after checking that the file can hold them and that they may be allocated."""
    dims = [int(n) for n in header["dim"]]
    if not 1 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 1:
        raise UnreadableFile(path, f"the header has impossible dimensions {dims}", "1 to 7 positive sizes", _REPLACE)
    offset = float(header["vox_offset"])
    if not np.isfinite(offset) or offset < 0 or offset > 2**31:
        raise UnreadableFile(path, f"the header places the voxels at byte {offset}", "a sane offset", _REPLACE)
    item = _kind(header, path).itemsize
    size = int(offset)
    count: int = item
    for n in dims[1 : dims[0] + 1]:
        count *= n  # Python integers: no overflow
    size += count
    on_disk = path.stat().st_size
    holds = on_disk * DEFLATE_MAX_RATIO if _is_gzip(path) else on_disk
    if size > MAX_IMAGE_BYTES:
        raise InputError(path, f"the header claims {size:,} bytes", f"at most {MAX_IMAGE_BYTES:,}", _REPLACE)
    if size > holds:
        raise UnreadableFile(
            path, f"the file is shorter than its header says ({on_disk:,} bytes)", f"{size:,} bytes of image", _REPLACE
        )
    return size


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == _GZIP_MAGIC


def _read_bytes(path: Path, expected: int, warnings: list[str]) -> NDArray[np.uint8]:
    """The first ``expected`` bytes of a file, read to its end so that a gzip's CRC and length are checked."""
    content = np.empty(expected, dtype=np.uint8)
    surplus = filled = 0
    with _opened(path) as stream, explained(path):
        while filled < expected and (count := stream.readinto(content.data[filled : filled + _CHUNK])):
            filled += count
        while filled == expected and surplus <= 1 << 24 and (chunk := stream.read(1 << 16)):
            surplus += len(chunk)
    if filled < expected:
        raise UnreadableFile(path, f"holds {filled:,} bytes of image", f"{expected:,} by its header", _REPLACE)
    if surplus > 1 << 24:
        raise UnreadableFile(path, "holds far more data than its header says", f"{expected:,} bytes", _REPLACE)
    if surplus:
        warnings.append(f"{surplus:,} bytes after the image were ignored")
    return content


def _kind(header: Nifti1Header, path: Path) -> np.dtype[Any]:
    """The number type of the voxels."""
    try:
        kind: np.dtype[Any] = header.get_data_dtype()
    except (HeaderDataError, KeyError):
        raise InputError(path, f"unknown number type (NIfTI code {int(header['datatype'])})") from None
    if kind.fields is not None or kind.kind not in "iuf":
        what = "colour (RGB)" if kind.fields is not None else str(kind)
        raise InputError(path, f"holds {what} voxels", "one real number a voxel", "convert it to grey values")
    return kind


def _shape(header: Nifti1Header, path: Path, warnings: list[str]) -> list[int]:
    """Three sizes, or four with the channels last."""
    shape = [int(n) for n in header.get_data_shape()]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
        if len(shape) == 3:
            warnings.append("a fourth dimension of length 1 was dropped")
    if len(shape) > 4:
        raise InputError(path, f"has {len(shape)} dimensions {tuple(shape)}", "3, or 4 with channels last")
    return shape + [1] * (3 - len(shape))


def _pixels(
    header: Nifti1Header, content: NDArray[np.uint8], kind: np.dtype[Any], shape: list[int], path: Path
) -> NDArray[Any]:
    offset = int(header["vox_offset"])
    array = np.frombuffer(content, dtype=kind, count=int(np.prod(shape)), offset=offset)
    if not kind.isnative:
        array = array.byteswap(inplace=True).view(kind.newbyteorder("="))
    return _channels_first(_scaled(array.reshape(shape, order="F"), header, path))


def _scaled(array: NDArray[Any], header: Nifti1Header, path: Path) -> NDArray[Any]:
    """Apply slope and intercept; a slope of 0 or NaN means none (NIfTI-1 standard, ``scl_slope``)."""
    scale = _scale(header, path)
    if scale is None:
        return array
    result = np.empty(array.shape, dtype=_scaled_type(array.dtype), order="F")
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is refused where an image is taken in
        for part, scaled in zip(pieces(array), pieces(result), strict=True):
            scaled[...] = part.astype(np.float64) * scale[0] + scale[1]
    return result


def _scale(header: Nifti1Header, path: Path) -> tuple[float, float] | None:
    """Slope and intercept; None where they change nothing."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite(slope) or slope == 0 or (slope, intercept) == (1.0, 0.0):
        return None
    if not np.isfinite(intercept):
        raise InputError(path, f"the intercept is {intercept}", "a finite number", _REPLACE)
    return slope, intercept


def _scaled_type(kind: np.dtype[Any]) -> np.dtype[Any]:
    """float32 where it holds all the stored integers, which it does to 24 bits; else float64."""
    return np.result_type(kind, np.float32)


def _channels_first(array: NDArray[Any]) -> NDArray[Any]:
    return array[np.newaxis] if array.ndim == 3 else np.moveaxis(array, 3, 0)


def _affine(header: Nifti1Header, path: Path, warnings: list[str]) -> NDArray[np.float64]:
    unit = int(header["xyzt_units"]) & 7
    if unit in (_METRE, _MICRON):
        raise InputError(path, f"lengths are in {'metres' if unit == _METRE else 'micrometres'}", "millimetres")
    sform_code, qform_code = int(header["sform_code"]), int(header["qform_code"])
    qform = _qform(header, qform_code)
    if sform_code > 0:
        affine = np.asarray(header.get_sform(), dtype=np.float64)
    elif qform is not None:
        affine = qform
    elif qform_code > 0:
        raise InputError(path, "the quaternion of its qform is no rotation", "a valid qform or sform", _REPLACE)
    else:
        raise InputError(
            path,
            "has neither sform nor qform (both codes are 0), so left and right are unknown",
            "an image with orientation",
            "convert it again from the original images",
        )
    check_affine(affine, path)
    if sform_code > 0 and qform is not None:
        spacing = np.linalg.norm(affine[:3, :3], axis=0).min()
        if not np.allclose(affine, qform, rtol=0, atol=max(1e-3 * float(spacing), 1e-3)):
            warnings.append("sform and qform differ: the sform was used")
    return affine


def _qform(header: Nifti1Header, code: int) -> NDArray[np.float64] | None:
    if code <= 0:
        return None
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinity are refused as they come out
            return np.asarray(header.get_qform(), dtype=np.float64)
    except (HeaderDataError, ValueError):
        return None


def check_affine(affine: NDArray[np.float64] | None, path: object) -> None:
    """Refuse a 4x4 affine to RAS+ mm that no image can have.

    Raises:
        InputError: there is none, or it is not finite, singular, or of voxels below a micrometre or above a metre.
    """
    if affine is None:
        raise InputError(path, "has no affine", "an image with orientation")
    if not np.isfinite(affine).all():
        raise InputError(path, "the affine has a value that is not finite", "finite numbers", _REPLACE)
    with np.errstate(over="ignore"):
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() <= 0 or abs(np.linalg.det(affine[:3, :3] / np.maximum(spacing, 1e-300))) < 1e-4:
        raise InputError(path, "the affine is singular: it flattens the image", "three independent axes", _REPLACE)
    if spacing.min() < 1e-3 or spacing.max() > 1e3:
        raise InputError(path, f"the spacing is {tuple(spacing.round(6))} mm", "0.001 to 1000 mm", "correct its unit")


def _header_for(item: Volume | Mask, array: NDArray[Any]) -> Nifti1Header:
    source = item.header if isinstance(item.header, Nifti1Header) else None
    header = Nifti2Header() if isinstance(source, Nifti2Header) else Nifti1Header()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    header["magic"] = b"n+2" if isinstance(header, Nifti2Header) else b"n+1"
    header["vox_offset"] = 544 if isinstance(header, Nifti2Header) else 352
    if source is not None and _gives_affine(source, item.geometry.affine):
        for name in _GEOMETRY_FIELDS:
            header[name] = source[name]
        header["pixdim"][:4] = source["pixdim"][:4]
    else:
        header.set_qform(item.geometry.affine, 0 if item.geometry.is_sheared else 2)  # a quaternion holds no shear
        header.set_sform(item.geometry.affine, 2)
        header.set_xyzt_units("mm")
    return header


def _gives_affine(header: Nifti1Header, affine: NDArray[np.float64]) -> bool:
    own = header.get_sform() if int(header["sform_code"]) > 0 else _qform(header, int(header["qform_code"]))
    return own is not None and np.array_equal(np.asarray(own, dtype=np.float64), affine)
