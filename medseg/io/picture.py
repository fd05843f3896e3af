"""Pictures: .png and .jpg through Pillow, .tif through tifffile.

A picture is a volume of one slice: array (C, I, J, 1), I columns to the viewer's right, J rows downwards, 1 mm a pixel
(resolutions in such files are rarely meant). The grid is the file's own; an orientation tag (EXIF or TIFF) goes into
the affine, so that ``prepare`` turns the picture upright and a mask comes back on the pixels of the file.

An image is what its file shows:

- grey and RGB: the stored values, 8, 16 or 32 bits, integers or floats; 1 bit: 0 and 1; 2 and 4 bits: 0 to 3 and to 15
- palette: RGB by the palette
- TIFF in which 0 is white: turned, so that a larger value is brighter
- alpha: dropped where it is opaque everywhere, else the picture is laid over black, with a warning
- one transparent colour of a grey or RGB PNG: taken as any other, with a warning
- PNG of 16-bit colours: read by SimpleITK, as Pillow keeps 8 of the bits; refused where that is not installed
- GeoTIFF, and a distance of slices (ImageJ, OME): taken as any other, with a warning

A mask is what is stored: palette indices, and 0 for 0 where 0 is white, with a warning. RGB with equal channels is one
channel. Other colours, an alpha that is not opaque, and JPEG and its kin, which change values, are refused.

TIFF axes are those of ``tifffile``'s series: samples and bands (S, C) are channels, and pages of equal size (Z, I, Q)
the slices K. Anything else of more than one entry, as time (T), is refused, as are two axes of a kind, and pages of
several sizes that are no pyramid (of which the first level is read). CMYK, Lab and animations are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, MedsegError, UnreadableFile
from medseg.geometry import Geometry
from medseg.records import replacing
from medseg.volume import Mask, Volume

SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
MAX_BYTES = 2**30
"""Pixels of more than 1 GiB are read only where ..."""
MAX_RATIO = 100
"""... they are not more than this many times the bytes of the file, as those of a decompression bomb."""

_ORIENTATION = 0x0112  # the tag, in EXIF and TIFF alike
_PLACE_ON_MAP = 34735  # the tag that makes a TIFF a GeoTIFF
_RIGHT, _LEFT, _DOWN, _UP = (1, 0), (-1, 0), (0, 1), (0, -1)
_STEPS = {
    1: (_RIGHT, _DOWN),
    2: (_LEFT, _DOWN),
    3: (_LEFT, _UP),
    4: (_RIGHT, _UP),
    5: (_DOWN, _RIGHT),
    6: (_DOWN, _LEFT),
    7: (_UP, _LEFT),
    8: (_UP, _RIGHT),
}
"""Orientation tag, 1 to 8 -> where the viewer sees the next column, and where the next row (TIFF 6.0)."""
_RGB, _GREY_ALPHA, _RGBA = 2, 4, 6  # colour types of PNG
_WHITE_IS_ZERO, _YCBCR = 0, 6  # colours of TIFF; 1 is grey, 2 RGB and 3 a palette
_REPLACE = "copy the file again from its source"
_EXTRA = "pip install 'medseg[itk]'"
_LOSSY = "is compressed by {}, which changes the values of a mask"
_LOSSY_NAMES = (
    "JP",
    "WEBP",
)  # within tifffile's names of compressions; some of them can be lossless, and do not say so

Alpha = Literal["", "straight", "premultiplied"]


@dataclass(frozen=True)
class _Stored:
    """What a file holds.

    Attributes:
        samples: as stored, (K, J, I, C).
        palette: colours (n, 3 or 4) uint8 of the one channel, or None.
        alpha: what the last channel is, if it is one of opacity.
        black: the value of black where larger values are darker, else None.
        orientation: the tag.
        lossy: name of a compression that changes values.
        warnings: what was odd.
    """

    samples: NDArray[Any]
    palette: NDArray[np.uint8] | None = None
    alpha: Alpha = ""
    black: int | None = None
    orientation: int = 1
    lossy: str = ""
    warnings: tuple[str, ...] = ()


def read(path: Path) -> Volume:
    """Read a picture, or a stack of them.

    Returns:
        Volume with array (C, I, J, K) in the stored number type; K is 1 but for TIFF files of several pages.

    Raises:
        UnreadableFile: damaged, truncated, empty, not what its ending says, or too large to be true.
        InputError: colours or axes without a defined meaning here; see the top of this module.
    """
    stored = _decode(path)
    samples, alpha, warnings = stored.samples, stored.alpha, list(stored.warnings)
    if stored.black is not None:
        samples = (stored.black - samples).astype(samples.dtype)
    if stored.palette is not None:
        samples = stored.palette[samples[..., 0]]
        alpha = "straight" if samples.shape[-1] == 4 else ""
    if alpha:
        samples = _over_black(samples, alpha, warnings)
    return _volume(path, samples, stored.orientation, warnings)


def read_labels(path: Path) -> Volume:
    """Read a mask: the stored values, in one channel.

    Raises:
        UnreadableFile: as ``read``.
        InputError: JPEG, also within a TIFF; colours other than a palette; an alpha that is not opaque.
    """
    if _is_jpeg(path):
        raise InputError(path, _LOSSY.format("JPEG"), ".png or .tif")
    stored = _decode(path)
    samples, warnings = stored.samples, list(stored.warnings)
    if stored.lossy:
        raise InputError(
            path, _LOSSY.format(stored.lossy), "deflate, LZW or no compression", "save it so from its source"
        )
    if stored.black is not None:
        warnings.append("has 0 as white: the mask's values are taken as they are stored")
    if stored.alpha:
        if (samples[..., -1] != _largest(samples.dtype)).any():
            raise InputError(path, "is transparent in places", "a mask without alpha", "save it as grey")
        samples = samples[..., :-1]
    if (samples != samples[..., :1]).any():
        raise InputError(path, "is coloured", "one value a pixel", "save it as grey or with a palette")
    return _volume(path, samples[..., :1], stored.orientation, warnings)


def write(mask: Mask, path: Path) -> None:
    """Write a mask as grey values, atomically; the same mask always gives the same bytes.

    Values up to 255 take 8 bits, up to 65535 16 bits, and in TIFF 32 bits otherwise. The slices of a mask become the
    pages of a TIFF. The grid is given back by the orientation tag.

    Raises:
        InputError: negative values; for PNG values above 65535 or several slices; JPEG; a grid that is no picture's.
    """
    if _is_jpeg(path):
        raise InputError(path, _LOSSY.format("JPEG"), ".png or .tif")
    orientation = _orientation_of(mask, path)
    pages = _unsigned(mask.array, path).transpose(2, 1, 0)  # (K, J, I)
    save = _save_png if path.name.lower().endswith(".png") else _save_tiff
    with replacing(path) as temporary:
        save(pages, orientation, temporary, path)


def picture_grid(shape: Sequence[int], orientation: int = 1) -> Geometry:
    """The grid of a picture of ``shape`` (I, J, K) whose file has this orientation tag (1 to 8); 1 mm a pixel.

    The upright picture has its upper left pixel at the origin, x to the right is the patient's left, y down the back:
    LPS, as ITK gives pictures.
    """
    affine = np.eye(4)
    affine[:2, :2] = np.transpose(_STEPS[orientation])
    last = np.array(shape[:2]) - 1
    affine[:2, 3] = -np.minimum(affine[:2, :2] * last, 0).sum(axis=1)
    affine[:2] *= -1
    return Geometry((shape[0], shape[1], shape[2]), affine + 0.0)  # no negative zeros


# ---- meaning ---------------------------------------------------------------------------------------------------------


def _volume(path: Path, samples: NDArray[Any], orientation: int, warnings: Sequence[str]) -> Volume:
    array = samples.transpose(3, 2, 1, 0)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    grid = picture_grid(array.shape[1:], orientation if orientation in _STEPS else 1)
    return Volume(array, grid, (path,), warnings=tuple(warnings))


def _over_black(samples: NDArray[Any], alpha: Alpha, warnings: list[str]) -> NDArray[Any]:
    """The colours without their alpha, laid over black where it is not opaque."""
    colours, opacity = samples[..., :-1], samples[..., -1:]
    largest = _largest(samples.dtype)
    if (opacity == largest).all():
        return colours
    warnings.append("is transparent in places: laid over black")
    if alpha == "premultiplied":
        return colours
    result = colours * (opacity / np.float64(largest))
    return (np.rint(result) if samples.dtype.kind in "iu" else result).astype(samples.dtype)


def _largest(dtype: np.dtype[Any]) -> int:
    """What stands for white, or opaque."""
    return int(np.iinfo(dtype).max) if dtype.kind in "iu" else 1


def _is_jpeg(path: Path) -> bool:
    return path.name.lower().endswith((".jpg", ".jpeg"))


def _orientation_of(mask: Mask, path: Path) -> int:
    for orientation in _STEPS:
        if picture_grid(mask.geometry.shape, orientation).close_to(mask.geometry):
            return orientation
    spacing = "x".join(f"{s:.4g}" for s in mask.geometry.spacing)
    found = f"cannot hold this mask's place in the world ({spacing} mm, {mask.geometry.orientation})"
    raise InputError(path, found, "the grid of a picture", "write it as .nii.gz")


def _unsigned(array: NDArray[Any], path: Path) -> NDArray[Any]:
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    if low < 0:
        raise InputError(path, f"cannot hold the label value {low}", "values from 0", "write it as .nii.gz")
    return array.astype(np.min_scalar_type(high))


# ---- files -----------------------------------------------------------------------------------------------------------


def _decode(path: Path) -> _Stored:
    if not path.is_file():
        raise UnreadableFile(path, "is missing or no file", "an image file")
    if not path.stat().st_size:
        raise UnreadableFile(path, "is empty", "an image file", _REPLACE)
    ending = path.suffix.lower()
    decode: Callable[[Path], _Stored] = {".png": _decode_png, ".tif": _decode_tiff, ".tiff": _decode_tiff}.get(
        ending, _decode_jpeg
    )
    try:
        return decode(path)
    except MedsegError:
        raise
    except Exception as failure:  # noqa: BLE001 - damage makes the two libraries raise nearly anything
        reason = " ".join(str(failure).split()) or type(failure).__name__
        raise UnreadableFile(path, f"cannot be read: {reason}", f"a sound {ending} file", _REPLACE) from None


def _refuse_bomb(path: Path, shape: Sequence[int], itemsize: int) -> None:
    size, held = int(np.prod(shape, dtype=object)) * itemsize, path.stat().st_size
    if size > max(MAX_BYTES, MAX_RATIO * held):
        found = f"claims {'x'.join(map(str, shape))} values, {size / 2**30:.1f} GiB, in a file of {held:,} bytes"
        raise UnreadableFile(path, found, f"at most {MAX_RATIO} times the file above 1 GiB", "save it uncompressed")


def _decode_png(path: Path) -> _Stored:
    from PIL.PngImagePlugin import PngImageFile

    content = path.read_bytes()
    image = PngImageFile(BytesIO(content))  # not Image.open, which takes any format for its own
    depth, colour = content[24:26]  # of the header, whose place is fixed
    _refuse_bomb(path, (image.height, image.width, len(image.getbands())), max(1, depth // 8))
    PngImageFile(BytesIO(content)).verify()  # every checksum, which loading does not
    if image.is_animated:
        raise InputError(path, f"is an animation of {image.n_frames} pictures", "one picture", "save one of them")
    samples = np.asarray(image)
    if depth == 16 and colour in (_RGB, _GREY_ALPHA, _RGBA):
        samples = _colours_of_16_bits(path, colour)
    elif depth == 16:
        samples = samples.astype(np.uint16)  # Pillow before 11 gives 32 bits
    elif image.mode == "L" and depth < 8:
        samples = samples // np.uint8(255 // (2**depth - 1))  # Pillow spreads them over 0 to 255
    keyed = "transparency" in image.info and image.mode != "P"
    return _Stored(
        samples.reshape(1, image.height, image.width, -1),
        palette=_palette(image) if image.mode == "P" else None,
        alpha="straight" if image.mode in ("LA", "RGBA") else "",
        orientation=image.getexif().get(_ORIENTATION, 1),
        warnings=("names a transparent colour, which is taken as any other",) if keyed else (),
    )


def _colours_of_16_bits(path: Path, colour: int) -> NDArray[Any]:
    found = "is a PNG of 16 bits a channel, of which Pillow keeps 8"
    if colour == _GREY_ALPHA:
        raise UnreadableFile(path, found, "grey without alpha, or RGB", "save it without alpha, or as .tif")
    try:
        import SimpleITK
    except ImportError:
        raise UnreadableFile(path, found, "SimpleITK, which reads them", f"{_EXTRA}, or save it as .tif") from None
    image = SimpleITK.ReadImage(str(path), imageIO="PNGImageIO")
    samples = cast("NDArray[Any]", SimpleITK.GetArrayFromImage(image))
    return samples[..., :3] if colour == _RGB else samples  # a transparent colour becomes an alpha in ITK


def _palette(image: Any) -> NDArray[np.uint8]:
    """Colours of the 256 indices, with alpha where some are transparent; black for indices without a colour."""
    colours = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(colours)] = colours
    transparent = image.info.get("transparency")
    if transparent is None:
        return table
    alpha = np.full((256, 1), 255, dtype=np.uint8)
    if isinstance(transparent, bytes):
        alpha[: len(transparent), 0] = np.frombuffer(transparent, dtype=np.uint8)
    else:
        alpha[transparent] = 0
    return np.hstack([table, alpha])


def _decode_jpeg(path: Path) -> _Stored:
    from PIL.JpegImagePlugin import JpegImageFile

    with JpegImageFile(path) as image:
        _refuse_bomb(path, (image.height, image.width, len(image.getbands())), 1)
        if image.mode not in ("L", "RGB"):
            raise InputError(path, f"has {image.mode} colours", "grey or RGB", "save it as RGB")
        samples = np.asarray(image).reshape(1, image.height, image.width, -1)
        return _Stored(samples, orientation=image.getexif().get(_ORIENTATION, 1))


def _save_png(pages: NDArray[Any], orientation: int, temporary: Path, path: Path) -> None:
    from PIL import Image

    if len(pages) != 1:
        raise InputError(path, f"cannot hold {len(pages)} slices", "one slice", "write it as .tif or .nii.gz")
    if pages.dtype.itemsize > 2:
        raise InputError(path, f"cannot hold the label value {pages.max()}", "values up to 65535", "write it as .tif")
    exif = Image.Exif()
    if orientation != 1:
        exif[_ORIENTATION] = orientation
    Image.fromarray(np.ascontiguousarray(pages[0])).save(temporary, format="PNG", exif=exif)


# ---- TIFF ------------------------------------------------------------------------------------------------------------


def _decode_tiff(path: Path) -> _Stored:
    import tifffile

    with tifffile.TiffFile(path, _multifile=False) as tiff:  # the pages of this file alone
        series = _only_series(tiff, path)
        page = series.keyframe
        _require_known(page, path)
        _refuse_bomb(path, series.shape, series.dtype.itemsize)
        _require_whole(series, tiff.filehandle.size, path)
        tag = page.tags.get(_ORIENTATION)
        orientation = 1 if tag is None else int(tag.value)
        samples = _arranged(_unpacked(series, orientation, path), series.axes, path)
        colours = page.colormap
        return _Stored(
            samples,
            palette=None if colours is None else (colours.T >> 8).astype(np.uint8),
            alpha=_alpha(page) if samples.shape[-1] == page.samplesperpixel else "",
            black=2 ** int(page.bitspersample) - 1 if int(page.photometric) == _WHITE_IS_ZERO else None,
            orientation=orientation,
            lossy=page.compression.name if any(name in page.compression.name for name in _LOSSY_NAMES) else "",
            warnings=_not_kept(tiff, page),
        )


def _not_kept(tiff: Any, page: Any) -> tuple[str, ...]:
    """What a TIFF says about its place and size in the world, which no picture here has."""
    found = []
    if _PLACE_ON_MAP in page.tags:
        found.append("has a place on the map, which is not kept: medseg.scenes keeps it")
    ome = re.search(r'PhysicalSizeZ="([^"]+)"', tiff.ome_metadata or "")
    distance = ome[1] if ome else (tiff.imagej_metadata or {}).get("spacing")
    if distance is not None:
        found.append(f"says that its slices are {distance} apart, which is not kept: they are taken as 1 mm apart")
    return tuple(found)


def _alpha(page: Any) -> Alpha:
    kinds: dict[int, Alpha] = {1: "premultiplied", 2: "straight"}
    return kinds.get(int(page.extrasamples[-1]), "") if page.extrasamples else ""


def _only_series(tiff: Any, path: Path) -> Any:
    """The one picture or stack of a file; beside it there may be smaller copies, marked as such."""
    first, *others = tiff.series
    others = [series for series in others if not series.keyframe.is_reduced]
    if others:
        sizes = ", ".join("x".join(map(str, series.shape)) for series in (first, *others)[:4])
        raise InputError(path, f"holds pictures of several kinds: {sizes}", "pages of one size", "save each as a file")
    return first.levels[0]


def _require_known(page: Any, path: Path) -> None:
    """Refuse colours and numbers that have no defined meaning here."""
    colours, kind = int(page.photometric), getattr(page.dtype, "kind", "")
    by_jpeg = colours == _YCBCR and int(page.compression) in (6, 7)  # whose decoders give RGB
    if colours not in (_WHITE_IS_ZERO, 1, 2, 3) and not by_jpeg:
        raise InputError(path, f"has {page.photometric.name} colours", "grey, RGB or a palette", "save it as RGB")
    if not kind or kind not in ("bu" if colours == _WHITE_IS_ZERO else "biuf"):
        found = f"holds {page.dtype} values{', 0 as white' if colours == _WHITE_IS_ZERO else ''}"
        raise InputError(path, found, "integers or floats, 0 as black", "convert it")


def _require_whole(series: Any, size: int, path: Path) -> None:
    for page in series.pages:
        ends = () if page is None else zip(page.dataoffsets, page.databytecounts, strict=True)
        if page is None or any(start + count > size for start, count in ends):
            raise UnreadableFile(path, "is truncated, or pages of it are in other files", "a whole file", _REPLACE)


def _arranged(array: NDArray[Any], axes: str, path: Path) -> NDArray[Any]:
    """An array with tifffile's axes as (K, J, I, C)."""
    long = [n for n, axis in enumerate(axes) if axis in "YX" or array.shape[n] > 1]
    left = "".join(axes[n] for n in long)
    slices, channels = ("".join(axis for axis in left if axis in kind) for kind in ("ZIQ", "SC"))
    if sorted(left) != sorted(f"{slices}YX{channels}") or len(slices) > 1 or len(channels) > 1:
        found = f"has the axes {axes} of {'x'.join(map(str, array.shape))}"
        raise InputError(path, found, "Y, X and at most one of slices (Z) and one of bands (S, C)", "save it in parts")
    moved = array.reshape([array.shape[n] for n in long]).transpose([left.index(a) for a in f"{slices}YX{channels}"])
    rows, columns = moved.shape[len(slices) :][:2]
    return moved.reshape(moved.shape[0] if slices else 1, rows, columns, -1)


def _unpacked(series: Any, orientation: int, path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = series.asarray()
    except ValueError as failure:
        if "imagecodecs" not in str(failure):
            raise
        return _by_pillow(series, orientation, path)
    return array


def _by_pillow(series: Any, orientation: int, path: Path) -> NDArray[Any]:
    """Pages in a compression that tifffile leaves to another package (LZW, JPEG), by the libtiff that Pillow brings.

    Only where Pillow gives the stored values: it turns upright, keeps 8 bits of many and undoes premultiplication.
    """
    from PIL.TiffImagePlugin import TiffImageFile

    page = series.keyframe
    plain = orientation == 1 and int(page.photometric) != _WHITE_IS_ZERO and page.bitspersample in (1, 8, 16, 32)
    pages = []
    if plain and 1 not in map(int, page.extrasamples):
        with TiffImageFile(path) as image:
            for one in series.pages:
                image.seek(one.index)
                pages.append(np.asarray(image))
    if not pages or any(p.shape != page.shape or p.dtype.newbyteorder("=") != page.dtype for p in pages):
        found = f"is compressed by {page.compression.name}, with which this kind of picture cannot be read"
        raise UnreadableFile(path, found, "deflate or no compression", "save it so, or pip install imagecodecs")
    return np.stack(pages).reshape(series.shape)


def _save_tiff(pages: NDArray[Any], orientation: int, temporary: Path, path: Path) -> None:
    import tifffile

    tifffile.imwrite(
        temporary,
        pages if len(pages) > 1 else pages[0],
        photometric="minisblack",
        compression="zlib",
        metadata=None,
        software=False,
        extratags=[(_ORIENTATION, 3, 1, orientation, False)] if orientation != 1 else [],
    )
