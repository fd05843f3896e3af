"""Pictures: each kind of file means what is written at the top of the module, on the file's own pixels."""

from __future__ import annotations

import contextlib
import struct
import sys
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from medseg.errors import InputError, UnreadableFile
from medseg.geometry import Geometry
from medseg.io import picture, read_mask, read_volume, write_mask
from medseg.volume import Labels, Mask

GREY = np.array([[0, 1, 2], [3, 4, 255]], np.uint8)  # two rows of three columns
RGB = np.stack([GREY, GREY + 10, 255 - GREY], axis=-1)
ENDINGS = [".png", ".tif"]


def save(path: Path, array: NDArray[Any], mode: str | None = None, **options: Any) -> Path:
    """Write rows of pixels with Pillow."""
    size = (array.shape[1], array.shape[0])
    image = Image.fromarray(array) if mode is None else Image.frombytes(mode, size, array.tobytes())
    image.save(path, **options)
    return path


def tagged(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(path: Path, rows: list[bytes], width: int, depth: int, colour: int, more: bytes = b"") -> Path:
    """A PNG made by hand: rows of packed samples, without filters."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def tiff(path: Path, array: NDArray[Any], **options: Any) -> Path:
    tifffile.imwrite(path, array, **{"metadata": None, **options})
    return path


def rows(path: Path) -> list[Any]:
    """What ``read`` gives, as rows of pixels; of several channels a list each."""
    array = picture.read(path).array
    assert array.shape[3] == 1
    moved = array[..., 0].transpose(0, 2, 1)
    return (moved[0] if len(moved) == 1 else moved.transpose(1, 2, 0)).tolist()


# ---- what an image means ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_rows_and_columns_and_a_grid_of_one_mm(tmp_path: Path, ending: str) -> None:
    volume = picture.read(save(tmp_path / f"a{ending}", GREY))
    assert volume.array.shape == (1, 3, 2, 1)
    assert volume.array.dtype == np.uint8
    assert volume.array[0, :, :, 0].tolist() == [[0, 3], [1, 4], [2, 255]]  # columns first
    assert volume.geometry == Geometry((3, 2, 1), np.diag([-1.0, -1.0, 1.0, 1.0]))
    assert volume.geometry.orientation == "LPS"
    assert (volume.paths, volume.warnings) == ((tmp_path / f"a{ending}",), ())


@pytest.mark.parametrize("ending", ENDINGS)
def test_rgb_and_a_palette_become_three_channels(tmp_path: Path, ending: str) -> None:
    assert rows(save(tmp_path / f"rgb{ending}", RGB)) == RGB.tolist()
    image = Image.new("P", (2, 2))
    image.putdata([0, 1, 2, 1])
    image.putpalette([0, 0, 0, 255, 0, 0, 7, 8, 9])
    image.save(tmp_path / f"p{ending}")
    assert rows(tmp_path / f"p{ending}") == [[[0, 0, 0], [255, 0, 0]], [[7, 8, 9], [255, 0, 0]]]
    mask = read_mask(tmp_path / f"p{ending}", Labels(values={"a": 1, "b": 2}))  # as the VOC masks
    assert mask.array[:, :, 0].T.tolist() == [[0, 1], [2, 1]]


def test_a_palette_with_transparent_entries_is_laid_over_black(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1))
    image.putdata([0, 1, 2])
    image.putpalette([9, 9, 9, 255, 0, 0, 7, 8, 9])
    image.save(tmp_path / "one.png", transparency=1)
    assert rows(tmp_path / "one.png") == [[[9, 9, 9], [0, 0, 0], [7, 8, 9]]]
    image.save(tmp_path / "many.png", transparency=bytes([0, 51]))
    assert rows(tmp_path / "many.png") == [[[0, 0, 0], [51, 0, 0], [7, 8, 9]]]
    assert read_mask(tmp_path / "many.png").array[:, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bits_are_the_stored_values(tmp_path: Path, depth: int) -> None:
    packed, values = {1: (0b01100000, [0, 1, 1]), 2: (0b00011011, [0, 1, 2, 3]), 4: (0x2F, [2, 15])}[depth]
    path = png(tmp_path / "a.png", [bytes([packed])], len(values), depth, 0)
    assert rows(path) == [values]
    assert read_mask(path).array[:, 0, 0].tolist() == values


def test_one_bit_in_a_tiff(tmp_path: Path) -> None:
    assert rows(tiff(tmp_path / "a.tif", GREY > 2, photometric="minisblack")) == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("ending", ENDINGS)
def test_grey_of_16_bits_is_kept(tmp_path: Path, ending: str) -> None:
    values = np.array([[0, 256, 65535]], np.uint16)
    path = save(tmp_path / f"a{ending}", values)
    assert picture.read(path).array.dtype == np.uint16
    assert rows(path) == values.tolist()


@pytest.mark.parametrize("colour", [2, 6])
def test_colours_of_16_bits_are_kept(tmp_path: Path, colour: int) -> None:
    pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    pixels = np.array([[1, 256, 40000], [65535, 0, 3]])
    stored = np.hstack([pixels, np.full((2, 1), 65535)]) if colour == 6 else pixels
    path = png(tmp_path / "a.png", [stored.astype(">u2").tobytes()], 2, 16, colour)
    assert rows(path) == [pixels.tolist()]
    assert picture.read(path).array.dtype == np.uint16


def test_a_transparent_colour_of_16_bits_is_no_channel(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    pixels = np.array([[1, 256, 40000], [65535, 0, 3]])
    clear = chunk(b"tRNS", struct.pack(">HHH", 65535, 0, 3))
    path = png(tmp_path / "a.png", [pixels.astype(">u2").tobytes()], 2, 16, 2, clear)
    assert rows(path) == [pixels.tolist()]
    assert picture.read(path).warnings == ("names a transparent colour, which is taken as any other",)


def test_colours_of_16_bits_need_what_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnreadableFile, match=r"16 bits.*without alpha"):
        picture.read(png(tmp_path / "la.png", [bytes(4)], 1, 16, 4))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(UnreadableFile, match=r"Pillow keeps 8.*SimpleITK.*ip install 'medseg\[itk\]'"):
        picture.read(png(tmp_path / "a.png", [bytes(6)], 1, 16, 2))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_dropped_where_opaque_and_else_laid_over_black(tmp_path: Path, mode: str) -> None:
    colours = GREY[..., np.newaxis] if mode == "LA" else RGB
    opaque = np.concatenate([colours, np.full((2, 3, 1), 255, np.uint8)], axis=-1)
    path = save(tmp_path / "a.png", opaque, mode)
    assert rows(path) == (GREY if mode == "LA" else RGB).tolist()
    assert picture.read(path).warnings == ()
    opaque[1, 2, -1], opaque[0, 2, -1] = 51, 0  # 51 of 255 at the last pixel, nothing above
    volume = read_volume(save(path, opaque, mode))
    assert volume.warnings == ("is transparent in places: laid over black",)
    assert volume.array[:, 2, 1, 0].tolist() == ([51] if mode == "LA" else [51, 2, 0])  # a fifth of (255, 9, 0)
    assert volume.array[:, 2, 0, 0].tolist() == [0] * len(volume.array)
    with pytest.raises(InputError, match="transparent"):
        read_mask(path)


def test_a_transparent_colour_is_taken_as_any_other(tmp_path: Path) -> None:
    volume = picture.read(save(tmp_path / "a.png", GREY, transparency=3))
    assert volume.array[0, :, 1, 0].tolist() == [3, 4, 255]
    assert volume.warnings == ("names a transparent colour, which is taken as any other",)


def test_jpeg(tmp_path: Path) -> None:
    flat = np.full((8, 16, 3), (200, 100, 50), np.uint8)
    volume = picture.read(save(tmp_path / "a.JPG", flat, quality=95))
    assert volume.array.shape == (3, 16, 8, 1)
    np.testing.assert_allclose(volume.array[:, 5, 5, 0], [200, 100, 50], atol=3)
    assert rows(save(tmp_path / "g.jpeg", np.full((8, 8), 77, np.uint8)))[0][0] == 77


# ---- TIFF ------------------------------------------------------------------------------------------------------------

STACK = np.arange(24, dtype=np.uint16).reshape(4, 2, 3)  # four pages, or bands, of two rows and three columns


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "int16", "int32", "float32", "float64"])
def test_numbers_of_tiff_are_kept(tmp_path: Path, kind: str) -> None:
    values = np.array([[0, 1, 100]]).astype(kind) - (1 if kind[0] != "u" else 0)
    path = tiff(tmp_path / "a.tif", values, compression="zlib")
    assert picture.read(path).array.dtype == kind
    assert rows(path) == values.tolist()


@pytest.mark.parametrize(
    ("array", "options", "shape"),
    [
        (STACK, {"photometric": "minisblack"}, (1, 3, 2, 4)),  # pages
        (STACK, {"photometric": "minisblack", "metadata": {}}, (1, 3, 2, 4)),  # pages, with tifffile's own description
        (STACK, {"photometric": "minisblack", "planarconfig": "separate"}, (4, 3, 2, 1)),
        (STACK.transpose(1, 2, 0), {"photometric": "minisblack", "planarconfig": "contig"}, (4, 3, 2, 1)),
        (STACK, {"imagej": True, "metadata": {"axes": "ZYX"}}, (1, 3, 2, 4)),
        (STACK, {"imagej": True, "metadata": {"axes": "CYX"}}, (4, 3, 2, 1)),
        (STACK, {"ome": True, "photometric": "minisblack", "metadata": {"axes": "CYX"}}, (4, 3, 2, 1)),
        (
            np.stack([STACK, STACK]),
            {"ome": True, "photometric": "minisblack", "metadata": {"axes": "ZCYX"}},
            (4, 3, 2, 2),
        ),
        (
            STACK[:, np.newaxis],
            {"ome": True, "photometric": "minisblack", "metadata": {"axes": "ZTYX"}},
            (1, 3, 2, 4),
        ),  # a series of one time
    ],
)
def test_pages_are_slices_and_bands_are_channels(
    tmp_path: Path, array: NDArray[Any], options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    volume = picture.read(tiff(tmp_path / "a.ome.tif" if "ome" in options else tmp_path / "a.tif", array, **options))
    assert volume.array.shape == shape
    flat = volume.array[0] if shape[0] == 1 else volume.array[..., 0]
    entry = flat[:, :, 2] if shape[0] == 1 else flat[2]
    assert entry.T.tolist() == STACK[2].tolist()


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_rgb_pages_are_slices_of_three_channels(tmp_path: Path, planar: str) -> None:
    pages = np.stack([RGB, RGB // 2])
    array = pages if planar == "contig" else pages.transpose(0, 3, 1, 2)
    volume = picture.read(tiff(tmp_path / "a.tif", array, photometric="rgb", planarconfig=planar))
    assert volume.array.shape == (3, 3, 2, 2)
    np.testing.assert_array_equal(volume.array[:, :, :, 1].transpose(2, 1, 0), RGB // 2)


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (STACK, {"imagej": True, "metadata": {"axes": "TYX"}}),
        (np.stack([STACK, STACK]), {"photometric": "minisblack", "metadata": {}}),
        (np.stack([STACK, STACK]), {"imagej": True, "metadata": {"axes": "TZYX"}}),
    ],
)
def test_axes_without_a_meaning_here_are_refused(tmp_path: Path, array: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="has the axes"):
        picture.read(tiff(tmp_path / "a.tif", array, **options))


def test_pages_of_several_sizes_are_refused_and_of_a_pyramid_the_first_is_read(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(GREY)
        file.write(GREY[:, :2])
    with pytest.raises(InputError, match="2x3, 2x2"):
        picture.read(tmp_path / "a.tif")
    large = np.arange(64, dtype=np.uint8).reshape(8, 8)
    with tifffile.TiffWriter(tmp_path / "b.tif") as file:
        file.write(large, subifds=1)
        file.write(large[::2, ::2], subfiletype=1)
    assert rows(tmp_path / "b.tif") == large.tolist()
    with tifffile.TiffWriter(tmp_path / "c.tif") as file:
        file.write(large, metadata=None)
        file.write(large[::2, ::2], subfiletype=1, metadata=None)
    assert rows(tmp_path / "c.tif") == large.tolist()


def test_where_0_is_white_an_image_is_turned_and_a_mask_is_not(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", GREY, photometric="miniswhite")
    assert rows(path) == (255 - GREY).tolist()
    mask = read_mask(path)
    assert mask.array[:, :, 0].T.tolist() == GREY.tolist()
    assert mask.warnings == ("has 0 as white: the mask's values are taken as they are stored",)
    path = tiff(tmp_path / "b.tif", GREY > 2, photometric="miniswhite")
    assert rows(path) == [[1, 1, 1], [0, 0, 0]]
    with pytest.raises(InputError, match="float32 values, 0 as white"):
        picture.read(tiff(tmp_path / "c.tif", GREY.astype(np.float32), photometric="miniswhite"))


def test_black_is_the_largest_value_of_the_bits_where_0_is_white(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(tiff(tmp_path / "a.tif", GREY, photometric="miniswhite", software=False).read_bytes())
    at = next(n for n in range(8, len(content), 2) if struct.unpack_from("<HHI", content, n) == (258, 3, 1))
    struct.pack_into("<H", content, at + 8, 4)  # bits a sample
    (tmp_path / "a.tif").write_bytes(bytes(content))
    # unpacking them takes imagecodecs, which is no dependency
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", lambda *_, **__: GREY.clip(0, 15))
    assert rows(tmp_path / "a.tif") == [[15, 14, 13], [12, 11, 0]]


def test_a_place_on_the_map_and_a_distance_of_slices_are_not_lost_unsaid(tmp_path: Path) -> None:
    keys = (1, 1, 0, 1, 1024, 0, 1, 1)
    (warning,) = picture.read(tiff(tmp_path / "a.tif", GREY, extratags=[(34735, "H", 8, keys, True)])).warnings
    assert "medseg.scenes" in warning
    stacks = {
        "i.tif": {"imagej": True, "metadata": {"axes": "ZYX", "spacing": 2.5}},
        "o.ome.tif": {"ome": True, "photometric": "minisblack", "metadata": {"axes": "ZYX", "PhysicalSizeZ": 2.5}},
    }
    for name, options in stacks.items():
        volume = picture.read(tiff(tmp_path / name, STACK, **options))
        assert volume.geometry.spacing == (1, 1, 1)
        assert volume.warnings == (
            "says that its slices are 2.5 apart, which is not kept: they are taken as 1 mm apart",
        )


def test_alpha_of_a_tiff(tmp_path: Path) -> None:
    pixels = np.array([[[100, 200, 50, 51]]], np.uint8)
    straight = tiff(tmp_path / "s.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    assert rows(straight) == [[[20, 40, 10]]]
    premultiplied = tiff(tmp_path / "p.tif", pixels, photometric="rgb", extrasamples=["assocalpha"])
    assert rows(premultiplied) == [[[100, 200, 50]]]
    near_infrared = tiff(tmp_path / "n.tif", pixels, photometric="rgb", extrasamples=["unspecified"])
    assert rows(near_infrared) == pixels.tolist()


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "jpeg"])
def test_usual_compressions_are_read(tmp_path: Path, compression: str) -> None:
    flat = np.full((16, 16, 3), (90, 90, 90), np.uint8)
    assert rows(save(tmp_path / "a.tif", flat, compression=compression)) == flat.tolist()
    if compression != "jpeg":
        wide = (np.arange(6, dtype=np.uint16) * 5000).reshape(2, 3)
        assert rows(save(tmp_path / "b.tif", wide, compression=compression)) == wide.tolist()


def test_a_compression_that_would_change_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object, **__: object) -> None:
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", lacking)
    for n, (array, options) in enumerate(
        [
            (RGB.astype(np.uint16), {"photometric": "rgb"}),  # Pillow keeps 8 of its bits
            (GREY, {"extratags": [(274, 3, 1, 3, False)]}),  # and turns this one
            (GREY, {"photometric": "miniswhite"}),  # and inverts this one
        ]
    ):
        with pytest.raises(UnreadableFile, match="pip install imagecodecs"):
            picture.read(tiff(tmp_path / f"{n}.tif", array, **options))


# ---- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [".png", ".tif", ".jpg"])
def test_a_picture_is_upright_in_the_world_and_a_mask_lies_on_its_pixels(
    tmp_path: Path, ending: str, orientation: int
) -> None:
    path = tmp_path / f"in{ending}"
    array = np.kron(GREY, np.ones((8, 8), np.uint8))  # large pixels survive JPEG
    if ending == ".tif":
        tiff(path, array, extratags=[(274, 3, 1, orientation, False)])
    else:
        save(path, array, exif=tagged(orientation))
    volume = picture.read(path)
    assert volume.array.shape == (1, 24, 16, 1)  # the file's own grid
    plain = Image.fromarray(array)
    plain.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(plain))
    turned = volume.geometry.to("LPS").apply(volume.array)[0, :, :, 0].T
    np.testing.assert_allclose(turned, upright, atol=20 if ending == ".jpg" else 0)
    assert volume.geometry.reoriented(volume.geometry.to("LPS")) == picture.picture_grid((*upright.T.shape, 1))
    out = tmp_path / f"mask{'.tif' if ending == '.tif' else '.png'}"
    write_mask(Mask((volume.array[0] > 100).astype(np.uint8), volume.geometry), out)
    again = read_mask(out)
    assert again.geometry == volume.geometry
    with Image.open(out) as image:
        assert image.getexif().get(0x0112, 1) == orientation


def test_an_unknown_orientation_is_none(tmp_path: Path) -> None:
    assert picture.read(save(tmp_path / "a.png", GREY, exif=tagged(9))).geometry == picture.picture_grid((3, 2, 1))


def test_orientation_6_by_hand() -> None:
    # the file's first row is the right edge of the upright picture (H = 2 wide), its first column the upper edge
    affine = picture.picture_grid((3, 2, 1), 6).affine
    assert (affine @ [0, 0, 0, 1]).tolist() == [-1, 0, 0, 1]  # x = 1 to the right is RAS -1
    assert (affine @ [2, 0, 0, 1]).tolist() == [-1, -2, 0, 1]
    assert (affine @ [0, 1, 0, 1]).tolist() == [0, 0, 0, 1]


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".png", ".tif", ".tiff"])
@pytest.mark.parametrize(("value", "kind"), [(1, "uint8"), (255, "uint8"), (256, "uint16"), (65535, "uint16")])
def test_a_mask_comes_back(tmp_path: Path, ending: str, value: int, kind: str) -> None:
    array = np.zeros((5, 4, 1), np.int64)
    array[1, 2] = value
    mask, path = Mask(array, picture.picture_grid((5, 4, 1))), tmp_path / f"a{ending}"
    write_mask(mask, path)
    again = read_mask(path)
    np.testing.assert_array_equal(again.array, array)
    assert again.array.dtype == kind
    assert again.geometry == mask.geometry
    first = path.read_bytes()
    write_mask(mask, path)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("slices", [2, 3, 4])
def test_slices_are_pages_of_a_tiff(tmp_path: Path, slices: int) -> None:
    array = np.arange(12 * slices, dtype=np.uint32).reshape(3, 4, slices) + 70000
    write_mask(Mask(array, picture.picture_grid(array.shape, 8)), tmp_path / "a.tif")
    again = read_mask(tmp_path / "a.tif")
    np.testing.assert_array_equal(again.array, array)
    assert again.geometry == picture.picture_grid(array.shape, 8)


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("a.jpg", np.zeros((2, 2, 1)), "JPEG"),
        ("a.png", np.zeros((2, 2, 2)), r"2 slices.*\.tif"),
        ("a.png", np.full((2, 2, 1), 65536), r"65536.*\.tif"),
        ("a.tif", np.full((2, 2, 1), -1), r"-1.*\.nii\.gz"),
    ],
)
def test_what_a_picture_cannot_hold_is_not_written(tmp_path: Path, name: str, array: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        write_mask(Mask(array.astype(np.int32), picture.picture_grid(array.shape)), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_grid_that_no_picture_has_is_not_lost_unsaid(tmp_path: Path) -> None:
    grid = Geometry((2, 2, 1), np.diag([-0.5, -0.5, 1, 1]))
    with pytest.raises(InputError, match=r"0\.5x0\.5x1 mm, LPS.*\.nii\.gz"):
        write_mask(Mask(np.zeros((2, 2, 1), np.uint8), grid), tmp_path / "a.png")


def test_a_mask_in_colours_has_equal_channels_or_is_refused(tmp_path: Path) -> None:
    same = np.repeat(GREY[..., np.newaxis], 3, axis=-1)
    assert read_mask(save(tmp_path / "a.png", same)).array[:, :, 0].T.tolist() == GREY.tolist()
    opaque = np.concatenate([same, np.full((2, 3, 1), 255, np.uint8)], axis=-1)
    assert read_mask(save(tmp_path / "b.png", opaque)).array[:, :, 0].T.tolist() == GREY.tolist()
    with pytest.raises(InputError, match="coloured"):
        read_mask(save(tmp_path / "c.png", RGB))


def test_a_jpeg_is_no_mask(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="JPEG"):
        read_mask(save(tmp_path / "a.jpg", GREY))
    flat = np.full((16, 16), 90, np.uint8)
    path = save(tmp_path / "a.tif", flat, compression="jpeg")
    assert rows(path) == flat.tolist()
    with pytest.raises(InputError, match=r"compressed by JPEG.*deflate"):
        read_mask(path)
    assert read_mask(save(tmp_path / "b.tif", flat, compression="tiff_lzw")).array.max() == 90


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif"])
def test_files_that_are_none(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    with pytest.raises(UnreadableFile, match="missing"):
        read_volume(path)
    path.write_bytes(b"")
    with pytest.raises(UnreadableFile, match="empty"):
        read_volume(path)
    path.write_bytes(b"This is no picture.\n")
    with pytest.raises(UnreadableFile, match=r"cannot be read.*sound"):
        read_volume(path)
    other = save(tmp_path / f"b{'.jpg' if ending == '.png' else '.png'}", GREY)
    path.write_bytes(other.read_bytes())  # a picture under the wrong ending
    with pytest.raises(UnreadableFile, match="cannot be read"):
        read_volume(path)


def sound(ending: str) -> bytes:
    content, array = BytesIO(), np.random.default_rng(0).integers(0, 255, (40, 30), np.uint8)
    if ending == ".tif":
        tifffile.imwrite(content, array, compression="zlib", metadata=None)
    else:
        Image.fromarray(array).save(content, {".png": "PNG", ".jpg": "JPEG"}[ending])
    return content.getvalue()


@pytest.mark.filterwarnings("ignore")  # the libraries' own words about damage
@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif"])
def test_no_part_of_a_file_is_taken_for_the_whole(tmp_path: Path, ending: str) -> None:
    content = sound(ending)
    for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
        (tmp_path / f"a{ending}").write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UnreadableFile):
            read_volume(tmp_path / f"a{ending}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif"])
@given(place=st.floats(0, 0.999), bits=st.integers(1, 255))
def test_a_changed_byte_gives_a_picture_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, ending: str, place: float, bits: int
) -> None:
    content = bytearray(sound(ending))
    checked = len(content) - 12  # the end mark of a PNG holds nothing, and nothing looks at it
    content[int(place * checked)] ^= bits
    path = tmp_path_factory.getbasetemp() / f"changed{ending}"
    path.write_bytes(bytes(content))
    with contextlib.suppress(InputError):  # the reason; anything else that is raised fails
        assert np.isfinite(read_volume(path).array).all()
        assert ending != ".png", "every byte of a PNG is under a checksum"


def test_a_bomb_is_refused_by_its_claim(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    with pytest.raises(UnreadableFile, match=r"100000x100000x3 values, 27\.9 GiB, in a file of \d+ bytes"):
        read_volume(path)
    content = bytearray(tiff(tmp_path / "b.tif", GREY, compression="zlib", software=False).read_bytes())
    for tag in (256, 257, 278):  # width, length, rows a strip
        at = next(n for n in range(8, len(content) - 12, 2) if struct.unpack_from("<H", content, n)[0] == tag)
        struct.pack_into("<HII", content, at + 2, 4, 1, 60_000)
    (tmp_path / "b.tif").write_bytes(bytes(content))
    with pytest.raises(UnreadableFile, match="60000x60000 values"):
        read_volume(tmp_path / "b.tif")


@pytest.mark.parametrize("ending", [".jpg", ".tif"])
def test_other_colours_are_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    Image.new("CMYK", (8, 8)).save(path)
    with pytest.raises(InputError, match=r"(CMYK|SEPARATED) colours.*RGB"):
        read_volume(path)


def test_animations_are_refused(tmp_path: Path) -> None:
    image = Image.fromarray(GREY)
    image.save(tmp_path / "a.png", save_all=True, append_images=[Image.fromarray(GREY // 2)])
    with pytest.raises(InputError, match="animation of 2"):
        read_volume(tmp_path / "a.png")
