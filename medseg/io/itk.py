"""MetaImage and NRRD files (.mha .mhd .nrrd), and SimpleITK images in memory, through SimpleITK.

ITK's world is LPS: x to the left and y to the back. The first two rows of every affine change sign here and nowhere
else.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import InputError, UnreadableFile
from medseg.geometry import Geometry
from medseg.records import replacing
from medseg.volume import Mask, Volume

SUFFIXES: tuple[str, ...] = (".mha", ".mhd", ".nrrd")
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read(path: Path) -> Volume:
    """Read an image; array (C, I, J, K).

    Raises:
        UnreadableFile: SimpleITK cannot read the file; with its reason.
        InputError: SimpleITK is not installed.
    """
    itk = _simpleitk()
    if not path.is_file():
        raise UnreadableFile(path, "is missing or no file", "an image file")
    try:
        image = itk.ReadImage(str(path))
    except RuntimeError as failure:
        reason = str(failure).strip().splitlines()[-1]
        raise UnreadableFile(path, f"cannot be read: {reason}", "a sound image file") from None
    volume = from_simpleitk(image)
    return Volume(volume.array, volume.geometry, (path,))


read_labels = read


def write(mask: Mask, path: Path) -> None:
    """Write a mask, compressed, atomically. ``.mhd`` has its voxels in a second file and is refused.

    Raises:
        InputError: a ``.mhd``, or SimpleITK is not installed.
        OSError: the file cannot be written.
    """
    if path.name.lower().endswith(".mhd"):
        raise InputError(path, "a .mhd is two files, which cannot be replaced at once", ".mha, .nrrd or .nii.gz")
    with replacing(path) as temporary:
        temporary.touch()  # where this may not be, the system says why; SimpleITK does not
        try:
            _simpleitk().WriteImage(to_simpleitk(mask), str(temporary), useCompression=True)
        except RuntimeError:
            raise OSError(errno.EIO, "cannot be written by SimpleITK; is there room?", str(temporary)) from None


def from_simpleitk(image: Any) -> Volume:
    """A SimpleITK image (2D or 3D, any number of components) as a Volume.

    Raises:
        InputError: complex voxels, or neither 2 nor 3 dimensions.
    """
    array = _simpleitk().GetArrayFromImage(image)  # (K, J, I[, C])
    if array.dtype.kind not in "iuf":
        raise InputError("SimpleITK image", f"holds {array.dtype} voxels", "one real number a voxel and channel")
    if image.GetNumberOfComponentsPerPixel() == 1:
        array = array[..., np.newaxis]
    if image.GetDimension() == 2:
        array = array[np.newaxis]
    if array.ndim != 4:
        raise InputError("SimpleITK image", f"has {image.GetDimension()} dimensions", "2 or 3")
    size = image.GetDimension()
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(size, size)
    affine[:size, :size] = direction * np.array(image.GetSpacing())
    affine[:size, 3] = image.GetOrigin()
    channels_first = array.transpose(3, 2, 1, 0)
    return Volume(channels_first, Geometry(channels_first.shape[1:], _LPS @ affine))


def to_simpleitk(mask: Mask) -> Any:
    """A mask as a SimpleITK image."""
    itk = _simpleitk()
    image = itk.GetImageFromArray(np.ascontiguousarray(mask.array.transpose(2, 1, 0)))
    geometry = mask.geometry
    affine = _LPS @ geometry.affine
    image.SetSpacing(geometry.spacing)
    image.SetOrigin([float(v) for v in affine[:3, 3]])
    image.SetDirection([float(v) for v in (affine[:3, :3] / np.array(geometry.spacing)).ravel()])
    return image


def _simpleitk() -> Any:
    try:
        import SimpleITK
    except ImportError:
        raise InputError(
            "SimpleITK", "is not installed", "it, for .mha, .mhd and .nrrd files", "pip install 'medseg[itk]'"
        ) from None
    return SimpleITK
