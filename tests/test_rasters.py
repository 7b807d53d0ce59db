"""Rasters read and written by windows: GeoTIFFs, label maps, memory."""

import contextlib
import functools
import json
import os
import re
import struct

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.transform import from_bounds, from_origin

import common
from common import IGNORED, UserError
from files import (
    CLASSES,
    TABLE,
    bands_of,
    geotiff,
    has_data,
    noise,
    picture,
    pixels_of,
    save,
    touch,
    written,
)
from runs import refused
from support.classes import ClassTable
from support.files import write_image
from support.limits import ALL, Limits
from support.pairs import check_pair
from support.pictures import to_bytes
from support.rasters import Raster
from support.windows import read_filled
from support.writing import _profile, writing
from tensors import CPU, open_data, tiny

# ----------------------------------------------------------------------------------------- GeoTIFFs

ESRI = CRS.from_wkt(CRS.from_epsg(32633).to_wkt(version="WKT1_ESRI"))
POINTS = [GroundControlPoint(y, x, 5e5 + x / 2, 58e5 - y / 2) for y, x in ((0, 0), (0, 9), (9, 0))]


def rewritten(source, pixels=None, read_as=None, seen=None, bands=(), **how):
    """The GeoTIFF of pixels, or of its own, that is written in the place of a source."""
    with Raster(source, read_as, limits=seen, bands=bands) as raster:
        how["bands"] = len(bands) or 3
        return written(source.parent / "out.tif", raster, pixels, **how)


def rewritten_edit(source, limits=None):
    """(The file of an edit that changes nothing, where it has data), which is as in its source."""
    how, valid = {"limits": limits, "edited": True}, []
    with Raster(source, limits=limits) as raster:
        out = written(source.parent / "edit.tif", raster, raster.values(), **how)
    for path in (source, out):
        with Raster(path, limits=limits) as raster:
            valid.append(raster.valid(0, 0, raster.height, raster.width))
    assert (valid[0] == valid[1]).all()
    return out, valid[1]


COLOURS = rasterio.enums.ColorInterp


@pytest.mark.parametrize("names", ["0001", "1000", "00001", "000001", "01"])
def test_alpha_counts_wherever_it_is(tmp_path, names, capsys):
    """GDAL counts it as the second band or the fourth only."""
    pixels, alpha = np.full((20, 30, len(names)), 9, np.uint8), names.index("1")
    pixels[:5, :, alpha] = 0
    kinds = [(COLOURS.undefined, COLOURS.alpha)[int(name)] for name in names]
    geotiff(tmp_path / "x.tif", pixels, about={"colorinterp": kinds}, photometric="MINISBLACK")
    with Raster(tmp_path / "x.tif") as raster:
        assert raster.valid(0, 0, 20, 30).sum(1).tolist() == [0] * 5 + [30] * 15
    others = ",undefined" * (len(names) - 1)  # GDAL calls the first one grey
    assert re.search(f"else: .*--colorinterp (gray|undefined){others}[)]", capsys.readouterr().err)
    about = {"about": {"colorinterp": kinds}, "photometric": "MINISBLACK", "nodata": 9}
    geotiff(tmp_path / "x.tif", pixels, **about)
    Raster(tmp_path / "x.tif")
    assert "alpha" not in capsys.readouterr().err  # where a no-data value counts instead


def test_an_edit_of_one_band_that_is_read_thrice_keeps_its_scale(tmp_path):
    grey = noise(20, 30, 1)
    source = geotiff(tmp_path / "x.tif", grey, about={"scales": (0.5,)})
    with rasterio.open(rewritten(source, edited=True)) as out:
        assert out.scales == (0.5,) * 3 and (out.read() == grey[..., 0]).all()


@pytest.mark.parametrize("white_first", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_greys_of_few_bits_reach_from_black_to_white(tmp_path, bits, white_first):
    codes = np.tile(np.arange(2**bits, dtype=np.uint8), (4, 1))
    kind = "MINISWHITE" if white_first else "MINISBLACK"
    geotiff(tmp_path / "x.tif", codes, nbits=bits, photometric=kind)
    levels = np.round(np.linspace(0, 255, 2**bits))
    found = Raster(tmp_path / "x.tif").read()[0]
    assert (found == levels[:: -1 if white_first else 1, None]).all()


GENERATED = [  # values of the photograph, its no-data value, what is generated, limits
    (np.uint8, 0, np.float32, 0.0, (0.0, 1.0)),
    (np.uint8, 255, np.float32, 255.0, (0.0, 255.0)),
    (np.uint16, 65535, np.uint16, 65535, (0, 65535)),
    (np.int16, -9999, np.float32, -9999.0, (-9999.0, 0.0)),
]


def test_a_no_data_value_among_those_generated_becomes_a_mask(tmp_path):
    """As 0 of reflectances, of which heights are generated; in an edit it stays."""
    source = geotiff(tmp_path / "x.tif", np.eye(8, 9, dtype=np.uint8)[..., None], nodata=0)
    heights, own = Limits((-40.0,), (140.0,), "int16"), Limits((-1.0,), (255.0,), "uint8")
    above, below = (Limits((low,), (high,), "int16") for low, high in ((0, 140), (-40, 0)))
    for limits, kept in ((heights, None), (own, 0), (above, 0), (below, 0)):
        new = np.zeros((8, 9, 1), limits.dtype)
        target = rewritten(source, new, seen=own, bands=(1,), limits=limits)
        assert (has_data(target) == np.eye(8, 9)).all()
        with rasterio.open(target) as out:
            assert out.nodata == kept and (kept == 0 or not out.read(1).any())


@pytest.mark.parametrize(("given", "nothing", "dtype", "value", "limits"), GENERATED)
def test_generated_pixels_do_not_look_like_no_data(tmp_path, given, nothing, dtype, value, limits):
    """In a deep picture one band of three would be enough."""
    pixels = np.full((20, 30, 3), 7, given)
    pixels[:5] = nothing
    source = geotiff(tmp_path / "x.tif", pixels, nodata=nothing)
    seen = Limits((0.0,) * 3, (9.0,) * 3, str(np.dtype(given))) if given != np.uint8 else None
    limits = Limits(*((limit,) * 3 for limit in limits), str(np.dtype(dtype)))
    new = np.full((20, 30, 3), (limits.high[0] + limits.low[0]) / 2, dtype)
    new[10:15, :, 0], new[15:] = value, value
    with Raster(rewritten(source, new, seen=seen, limits=limits), limits=limits) as raster:
        assert raster.valid(0, 0, 20, 30).sum(1).tolist() == [0] * 5 + [30] * 15
        near = 1 if np.dtype(dtype).kind != "f" else 1e-4 * abs(value) + 1e-9
        assert (np.abs(raster.values()[5:] - new[5:].astype(float)) <= near).all()


@pytest.mark.parametrize("nothing", [-9999, 9999, 0])
def test_a_picture_of_labels_has_their_holes(tmp_path, nothing):
    """As a mask, since no byte is that no-data value; none where it is the value of a class."""
    index = np.zeros((20, 30), np.int16)
    index[:7] = nothing
    source = geotiff(tmp_path / "x.tif", index, nodata=nothing)
    assert (Raster(source, CLASSES).read() == np.where(index == 0, 0, IGNORED)).all()
    out = rewritten(source, np.full((20, 30, 3), 9, np.uint8), read_as=CLASSES)
    assert rasterio.open(out).nodata is None and (has_data(out) == (index == 0)).all()


@pytest.mark.parametrize(("crs", "points"), [("EPSG:25832", 1), (None, 1), ("EPSG:25832", 0)])
@pytest.mark.parametrize("pixel", ["Area", "Point"])
def test_points_tags_and_the_meaning_of_a_pixel_are_kept(tmp_path, crs, pixel, points):
    about = {"crs": CRS.from_user_input(crs) if crs else CRS()}
    about |= {"gcps": POINTS, "transform": None} if points else {}
    source = geotiff(tmp_path / "x.tif", noise(20, 20), **about)
    with rasterio.open(source, "r+") as target:
        target.update_tags(season="spring", AREA_OR_POINT=pixel)
    with rasterio.open(source) as given, rasterio.open(rewritten(source)) as out:
        places = [[(p.row, p.col, p.x, p.y) for p in file.gcps[0]] for file in (given, out)]
        assert places[0] == places[1] and len(places[0]) == 3 * points
        assert out.crs == given.crs and out.gcps[1] == given.gcps[1]
        assert out.transform == given.transform and "season" not in out.tags()
        assert points or out.tags()["AREA_OR_POINT"] == pixel
    with rasterio.open(rewritten(source, edited=True)) as out:  # its values stay what they are
        assert out.tags()["season"] == "spring"


@pytest.mark.parametrize(
    ("dtype", "masked"), [("uint16", True), ("uint16", False), ("uint8", True)]
)
def test_an_edited_file_has_its_other_values_to_the_bit(tmp_path, dtype, masked):
    """Also those of pixels of which one band has no data, or beside a mask the no-data value."""
    pixels, valid = noise(20, 30).astype(dtype), None
    pixels[:5, :, 1], pixels[5:9] = 7, 7
    if masked:
        valid = np.add.outer(np.arange(20), np.arange(30)) % 9 > 2
    source = geotiff(tmp_path / "x.tif", pixels, valid, nodata=7)
    limits = Limits((0,), (255,), dtype) if dtype == "uint16" else None
    out, _ = rewritten_edit(source, limits)
    assert (bands_of(out) == pixels).all()


STRETCHED = {"nbits": 4}, {"photometric": "MINISWHITE"}


@pytest.mark.parametrize("profile", [*STRETCHED, {"dtype": "float32"}])
def test_an_edited_file_keeps_its_holes(tmp_path, profile):
    """Where levels are stretched, and where values become another type."""
    pixels, limits = noise(20, 30, 1) // 16, None
    if "dtype" in profile:
        pixels = np.where(pixels < 4, np.nan, pixels)
        limits = Limits((0,), (255,), "uint16")
    source = geotiff(tmp_path / "x.tif", pixels, nodata=5, **profile)
    _, known = rewritten_edit(source, limits)
    assert not known.all()


def test_greys_that_are_read_as_the_no_data_value_stay(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    source = geotiff(tmp_path / "x.tif", pixels, nodata=3, photometric="MINISWHITE")
    out, known = rewritten_edit(source)
    assert (known == (pixels != 3)).all()
    with Raster(source) as before, Raster(out) as after:
        assert (after.values()[known] == before.values()[known]).all()


def test_an_edited_file_keeps_nan_as_its_no_data_value(tmp_path):
    pixels = noise(20, 30).astype(np.float32)
    pixels[:5] = np.nan
    source = geotiff(tmp_path / "x.tif", pixels, nodata=np.nan)
    out, known = rewritten_edit(source, Limits((0,) * 3, (255,) * 3, "float32"))
    with rasterio.open(out) as file:
        assert np.isnan(file.nodatavals).all() and not known[:5].any()


def test_an_edited_palette_has_its_colours_and_holes(tmp_path):
    """Black among its colours is no hole, though the index without data is 0."""
    index = noise(20, 30, 1) % 4
    colours = {0: (255, 255, 255), 1: (0, 0, 0), 2: (200, 0, 0), 3: (0, 0, 9)}
    source = geotiff(tmp_path / "x.tif", index, nodata=0, photometric="PALETTE")
    with rasterio.open(source, "r+") as target:
        target.write_colormap(1, colours)
    out, known = rewritten_edit(source)
    want = np.array(list(colours.values()), np.uint8)[index[..., 0]]
    assert (bands_of(out)[known] == want[known]).all() and (known == (index[..., 0] > 0)).all()


@pytest.mark.parametrize("values", ["7 7 7", "7 0 7"])
def test_an_edited_file_keeps_holes_that_a_tag_marks(tmp_path, values):
    pixels = noise(20, 30)
    pixels[:5] = [int(value) for value in values.split()]
    source = geotiff(tmp_path / "x.tif", pixels)
    with rasterio.open(source, "r+") as target:
        target.update_tags(NODATA_VALUES=values)
    _, known = rewritten_edit(source)
    assert not known[:5].any() and known[5:].all()


def test_codes_of_16_bits_with_a_palette(tmp_path):
    forest = {"name": "forest", "color": "#0000ff", "value": 300}
    path = geotiff(tmp_path / "x.tif", np.array([[0, 1, 300]], np.uint16))
    with rasterio.open(path, "r+") as target:
        target.write_colormap(1, {k: (9, k % 256, 7) for k in range(301)})
    table = ClassTable.load(json.dumps([*TABLE[:2], forest]))
    assert Raster(path, table).read().tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("shape", [(10, 13), (3, 40), (40, 7)])
def test_windows_past_the_edge_are_mirrored(tmp_path, shape):
    save(tmp_path / "x.png", noise(*shape))
    part = noise(*shape)[1:17, 2:22]
    missing = [(0, 16 - part.shape[0]), (0, 20 - part.shape[1]), (0, 0)]
    mirrored = np.pad(part, missing, "symmetric")
    assert (read_filled(Raster(tmp_path / "x.png"), 1, 2, 16, 20) == mirrored).all()


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 are none
def test_every_orientation_is_turned_upright(tmp_path, kind, orientation):
    """As Pillow itself turns them."""
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(picture(np.random.default_rng(0), 40, 60))
    more = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}  # phones
    name = "x.jpg" if kind == "MPO" else f"x.{kind.lower()}"
    image.save(tmp_path / name, kind, exif=exif, **more)
    want = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / name)))
    with Raster(tmp_path / name) as raster:
        assert (raster.height, raster.width) == want.shape[:2]
        assert (raster.read() == want).all()


def test_kinds_of_pictures_that_pillow_opens(tmp_path):
    """Grey with alpha has one band; a GIF is read where it is named."""
    Image.new("LA", (8, 8)).save(tmp_path / "x.png")
    assert Raster(tmp_path / "x.png").count == 1
    Image.new("P", (8, 6)).save(tmp_path / "x.gif")
    assert Raster(tmp_path / "x.gif").read().shape == (6, 8, 3)


def test_pictures_with_strange_exif_are_turned_upright(tmp_path):
    """A damaged one, whose width is text that nobody could write; ImageMagick's, in digits."""
    tags = struct.pack("<HHIHH", 274, 3, 1, 6, 0), struct.pack("<HHI4s", 256, 2, 4, b"abc\0")
    damaged = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(tags) + bytes(4)
    Image.new("RGB", (60, 40)).save(tmp_path / "x.jpg", exif=damaged)
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[274] = 6
    content = exif.tobytes()
    text.add_text("Raw profile type exif", f"\nexif\n{len(content):8}\n{content.hex()}\n")
    Image.new("RGB", (60, 40)).save(tmp_path / "x.png", pnginfo=text)
    for name in ("x.jpg", "x.png"):
        with Raster(tmp_path / name) as raster:
            assert raster.read().shape == (60, 40, 3) == (raster.height, raster.width, 3)


def test_coloured_labels_may_be_empty_in_the_middle(tmp_path):
    """A large file is looked at in several places before it is called a photograph."""
    index = np.full((1100, 1100), IGNORED, np.uint8)
    index[-150:, -150:] = 1
    geotiff(tmp_path / "x.tif", CLASSES.palette[index], photometric="RGB")
    assert (Raster(tmp_path / "x.tif", CLASSES).read() == index).all()


def test_colours_of_lossy_tiffs_are_nearest(tmp_path):
    labels = np.repeat(np.arange(3, dtype=np.uint8), 16)[:, None].repeat(64, 1)
    path = tmp_path / "x.tif"
    for ending, how in (
        (".tif", {"compress": "WEBP"}),
        (".tif", {"compress": "JPEG"}),
        (".jp2", {"driver": "JP2OpenJPEG"}),
    ):
        path = geotiff(path.with_suffix(ending), CLASSES.palette[labels], **how)
        raster = Raster(path, CLASSES)
        assert raster.lossy and (raster.read() == labels).mean() > 0.9


def test_palettes_of_photographs(tmp_path):
    palette = Image.fromarray(noise(20, 30)).quantize(9)
    colours = np.asarray(palette.convert("RGB"))
    for name in ("x.tif", "x.png"):
        palette.save(tmp_path / name)
        assert (Raster(tmp_path / name).read() == colours).all()
        assert (Raster(tmp_path / name, bands=(3, 1)).read() == colours[..., [2, 0]]).all()


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize(
    ("mode", "source", "name", "kept"),
    [
        ("RGB", "x.png", "x.png", True),
        ("RGB", "x.jpg", "x.jpg", True),
        ("RGB", "x.tif", "x.tif", True),
        ("RGB", "x.png", "x.tif", True),
        ("CMYK", "x.jpg", "x.jpg", False),
        ("L", "x.tif", "x.tif", False),  # of other colours
    ],
)
def test_the_profile_of_an_edit_is_of_its_colours(tmp_path, mode, source, name, kept):
    """A translation has none: it has other colours than its source."""
    path = tmp_path / source
    Image.new(mode, (40, 30)).save(path, icc_profile=PROFILE)
    for edited in (True, False):
        with Raster(path) as raster:
            out = written(tmp_path / f"{edited}" / name, raster, edited=edited)
        assert Image.open(out).info.get("icc_profile") == (PROFILE if edited and kept else None)


def test_a_translation_has_no_units_of_its_source(tmp_path):
    ones, limits = np.ones((8, 8, 1), np.float32), Limits((0.0,), (2.0,), "float32")
    about = {"scales": (0.5,), "units": ("m",), "descriptions": ("height",)}
    source = geotiff(tmp_path / "x.tif", ones, about=about, nodata=np.nan)
    how = {"seen": limits, "bands": (1,), "limits": limits}
    with rasterio.open(rewritten(source, ones, **how)) as out:
        assert (out.scales, out.units, out.descriptions) == ((1,), (None,), (None,))
        assert np.isnan(out.nodata)


def test_bands_of_label_maps_are_not_reported(tmp_path, capsys):
    geotiff(tmp_path / "x.tif", np.full((8, 8, 5), CLASSES.colors[0][0], np.uint8))
    with contextlib.suppress(UserError):
        Raster(tmp_path / "x.tif", CLASSES)
    assert "bands" not in capsys.readouterr().err


# the colours that a TIFF names, the bands asked for, the bands that are read
BANDS = [
    ("blue green red", (), (3, 2, 1)),
    ("blue green red alpha", (), (3, 2, 1)),
    ("alpha red green blue", (), (2, 3, 4)),
    ("undefined undefined undefined red green blue", (), (4, 5, 6)),
    ("gray undefined undefined undefined undefined", (), (1, 2, 3)),
    ("gray alpha", (), (1, 1, 1)),
    ("gray", (), (1, 1, 1)),
    ("red green blue undefined", (4, 3, 2), (4, 3, 2)),
    ("red green blue undefined", (4,), (4,)),
    ("gray undefined undefined undefined", (4, 1, 3, 2), (4, 1, 3, 2)),
]


@pytest.mark.parametrize(("colors", "asked", "read"), BANDS)
def test_bands_are_read_by_the_colours_that_a_file_names(tmp_path, colors, asked, read):
    names = [COLOURS[name] for name in colors.split()]
    pixels = np.tile(np.arange(10, 10 + len(names), dtype=np.uint8), (20, 30, 1))
    about = {"colorinterp": names}
    geotiff(tmp_path / "x.tif", pixels, about=about, photometric="MINISBLACK")
    with Raster(tmp_path / "x.tif", bands=asked) as raster:
        assert raster.read()[3, 4].tolist() == [band + 9 for band in read]


def test_label_maps_have_one_band_or_colours_and_perhaps_alpha(tmp_path):
    """Alpha is the second band, or a fourth; a fourth that is not marked as alpha is left out."""
    index = np.arange(9, dtype=np.uint16).reshape(3, 3) % 3
    codes = np.dstack([index, np.where(index == 1, 0, 65535).astype(np.uint16)])
    geotiff(tmp_path / "codes.tif", codes, alpha="yes")
    colours = np.dstack([CLASSES.palette[index], index.astype(np.uint8)])
    geotiff(tmp_path / "colours.tif", colours, photometric="RGB", alpha="no")
    for name, want in (("codes", np.where(index == 1, IGNORED, index)), ("colours", index)):
        with Raster(tmp_path / f"{name}.tif", CLASSES) as raster:
            assert (raster.read() == want).all()
    kinds = [COLOURS[name] for name in ("undefined", "blue", "green", "red")]
    about = {"about": {"colorinterp": kinds}, "photometric": "MINISBLACK"}
    mirrored = np.dstack([index.astype(np.uint8), CLASSES.palette[index][..., ::-1]])
    geotiff(tmp_path / "named.tif", mirrored, **about)
    assert (Raster(tmp_path / "named.tif", CLASSES).read() == index).all()
    geotiff(tmp_path / "deep.tif", mirrored.astype(np.uint16), **about)
    geotiff(tmp_path / "unnamed.tif", mirrored, photometric="MINISBLACK")
    for name in ("deep", "unnamed"):
        with refused("has 4 bands: a label map has"):
            Raster(tmp_path / f"{name}.tif", CLASSES, limits=ALL)


@pytest.mark.parametrize(("name", "bands"), [("x.tif", (5,)), ("x.tif", (4,)), ("x.png", (1, 4))])
def test_bands_that_a_file_lacks_are_refused(tmp_path, name, bands):
    """Alpha is no band."""
    pixels = noise(20, 30, 4)
    geotiff(tmp_path / "x.tif", pixels, photometric="RGB", alpha="yes")
    save(tmp_path / "x.png", pixels)
    it = "it is marked as alpha: rio" if name == "x.tif" and bands == (4,) else "its .*1, 2"
    with refused(f"{name}: band {bands[-1]} is asked for .*, but {it}"):
        Raster(tmp_path / name, bands=bands).read()
    assert (Raster(tmp_path / name, bands=(3, 1)).read() == pixels[..., [2, 0]]).all()


def test_what_a_tiff_cannot_hold_lies_beside_it_or_in_a_mask(tmp_path):
    """A CRS of a rotated pole; a no-data value beyond the results' type."""
    rotated = "+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=39 +lon_0=18 +R=6371229 +no_defs"
    pixels = np.ones((8, 8))
    pixels[:2] = -1.7976931348623157e308
    source = geotiff(tmp_path / "x.tif", pixels, crs=rotated, nodata=pixels[0, 0])
    ones, limits = np.ones((8, 8, 1), np.float32), Limits((0.0,), (2.0,), "float32")
    out = rewritten(source, ones, seen=limits, bands=(1,), limits=limits)
    with rasterio.open(source) as given, rasterio.open(out) as result:
        assert result.crs == given.crs and given.crs and result.nodata is None
    assert has_data(out).sum(1).tolist() == [0] * 2 + [8] * 6
    names = {path.name for path in tmp_path.glob("[!x]*")}
    assert names == {"out.tif", "out.tif.aux.xml"}


@pytest.mark.parametrize("name", ["x.tif", "x.png"])
def test_what_lies_beside_a_result_does_not_outlive_it(tmp_path, name):
    """GDAL believes it: the CRS of the picture before, or its overviews."""
    source = geotiff(tmp_path / "x.tif", np.ones((8, 8, 3), np.uint8))
    beside = [tmp_path / "out" / f"{name}{ending}" for ending in (".aux.xml", ".ovr", ".msk")]
    touch(*beside, tmp_path / "out" / "x.txt")
    touch(tmp_path / "out" / "x_colours.png.aux.xml")
    for classes in (None, CLASSES):
        with Raster(source) as raster:
            pixels = np.zeros((8, 8), np.uint8) if classes else None
            written(tmp_path / "out" / name, raster, pixels, classes)
    names = {name, "x.txt", f"x_colours.png{'.aux.xml' * (name == 'x.tif')}"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


@pytest.mark.parametrize("kind", ["nodata", "mask", "classes"])
def test_large_rasters_have_overviews(tmp_path, kind):
    """Of pictures the mean of what has data, of land cover the nearest; and of the mask."""
    valid = np.ones((300, 4200), bool)
    valid[:, :2100] = False
    stripes = np.where(np.arange(4200) % 2, 60, 40)  # 50 on average
    pixels = np.repeat((valid * stripes).astype(np.uint8)[..., None], 3, 2)
    about = {"nodata": {"nodata": 0}, "mask": {"valid": valid}, "classes": {}}[kind]
    source = geotiff(tmp_path / "x.tif", pixels, **about)
    greys = [{"name": f"{k}", "color": f"{k},{k},{k}"} for k in (0, 99, 198)]
    table = ClassTable.load(json.dumps(greys)) if kind == "classes" else None
    index = valid * np.uint8(stripes > 50) * 2  # the mean colour of 0 and 2 is that of 1
    path = rewritten(source, index if table else None, table=table)
    with rasterio.open(path) as out:
        assert out.overviews(1) == [2, 4, 8, 16] and out.shape == (300, 4200)
    with rasterio.open(path, overview_level=1) as file:
        small, seen = file.read(), file.dataset_mask() > 0
    assert small.shape[1:] == (75, 1050) and len(list(tmp_path.iterdir())) == 2
    if table:
        assert set(np.unique(small)) <= {table.codes[0], table.codes[2]} and seen.all()
        assert (small[0, :, :525] == table.codes[0]).all()
    else:
        assert (seen == valid[::4, ::4]).all() and (small[:, seen] == 50).all()


@pytest.mark.parametrize(("width", "missing"), [(64, 9000), (4200, 300)])
def test_a_tiff_that_was_not_written_whole_does_not_appear(tmp_path, monkeypatch, width, missing):
    """GDAL says nothing when it closes a file on a full disk: all is read once more, and of a
    large one the overviews, which lie at the end.
    """
    geotiff(tmp_path / "x.tif", np.zeros((64, width, 3), np.uint8))
    raster, honest = Raster(tmp_path / "x.tif"), rasterio.open
    size = functools.cache(lambda path: path.stat().st_size)

    def cut(path, mode="r", **more):
        if mode == "r":
            os.truncate(path, size(path) - missing)
        return honest(path, mode, **more)

    monkeypatch.setattr(rasterio, "open", cut)
    with refused("is the disk full"), writing(tmp_path / "out" / "x.tif", raster) as put:
        put(noise(64, width), 0)
    assert list((tmp_path / "out").iterdir()) == []


# ----------------------------------------------------------------------------------------- training


def away(x, y, wide=0.5):
    """PLACE, moved by some meters."""
    return {"transform": from_origin(500_000 + x, 5_800_000 - y, wide, 0.5)}


# the label map's place, beside a photograph in PLACE: (its profile, whether it fits)
PLACES = {
    "the same": ({}, True),
    "by bounds": ({"transform": from_bounds(5e5, 58e5 - 15, 5e5 + 20, 58e5, 40, 30)}, True),
    "by points": ({"transform": None, "gcps": POINTS}, True),
    "a twentieth of a pixel": (away(0.025, -0.025), True),
    "a fifth of a pixel": (away(0.1, 0), False),
    "half a pixel": (away(0, 0.25), False),
    "5000 pixels away": (away(2500, 0), False),
    "wider pixels": (away(0, 0, 0.505), False),
    "south-up": ({"transform": Affine(0.5, 0, 5e5, 0, 0.5, 58e5 - 15)}, False),
    "another CRS": ({"crs": "EPSG:32632"}, False),
    "the same CRS in other words": ({"crs": ESRI}, True),
    "the same CRS with heights": ({"crs": "EPSG:32633+5773"}, True),
    "the zone before the easting": (away(33e6, 0) | {"crs": "EPSG:5653"}, True),
    "no place on earth": ({"crs": CRS.from_wkt('LOCAL_CS["a hall",UNIT["metre",1]]')}, False),
    "no CRS": ({"crs": None}, True),
    "no CRS, away": (away(4.5, 0) | {"crs": None}, False),
    "no place": ({"crs": None, "transform": Affine.identity()}, True),
    "a degenerate place": ({"transform": Affine(0.0, 0.0, 5.0, 0.0, 0.0, 7.0)}, True),
}


@pytest.mark.parametrize("case", PLACES)
def test_labels_of_a_training_pair_lie_where_the_photograph_does(tmp_path, case):
    profile, fits = PLACES[case]
    labels = np.zeros((30, 40), np.uint8)
    geotiff(tmp_path / "train" / "rgb" / "x.tif", picture(np.random.default_rng(0), 30, 40))
    geotiff(tmp_path / "train" / "lc" / "x.tif", labels, **profile)
    (tmp_path / "classes.json").write_text(json.dumps(TABLE))
    _, cfg = tiny("mixlc", data=str(tmp_path), cache=str(tmp_path / "cache"), lc_classes="")
    if fits:
        assert not common.ImageStore(cfg, "train", 32).B.any()
    else:
        with refused("lc/x.tif lies elsewhere than .*rgb/x.tif: "):
            common.ImageStore(cfg, "train", 32)


def half_empty(path, how, level=(200, 60, 20)):
    """A photograph of one colour, 64 x 64; its right half has no data, but colours."""
    pixels = np.full((64, 64, 3), level, np.uint8)
    pixels[:, 32:] = 0 if how == "nodata" else noise(64, 32)
    valid = np.zeros((64, 64), np.uint8)
    valid[:, :32] = 255
    with_alpha = np.dstack([pixels, valid // 2])  # half transparent is data
    if how == "nodata":
        geotiff(path / "x.tif", pixels, nodata=0)
    elif how == "alpha band":
        geotiff(path / "x.tif", with_alpha, photometric="RGB", alpha="yes")
    elif how == "mask":
        geotiff(path / "x.tif", pixels, valid)
    elif how == "mask beside it":
        geotiff(path / "x.tif", pixels, valid, beside=True)
        assert (path / "x.tif.msk").exists()
    elif "palette" in how:
        path.mkdir(parents=True)
        index = np.where(valid > 0, 0, noise(64, 64, 1)[..., 0] % 2 + 1)  # 1, 2 are transparent
        image = Image.fromarray(index.astype(np.uint8))
        image.putpalette([*level, 9, 99, 199, 99, 199, 9])
        image.save(path / "x.png", transparency=b"\xff\0\0")
        if "place" in how:
            (path / "x.pgw").write_text("1\n0\n0\n-1\n5\n5\n")
    else:
        options = {"lossless": True, "exact": True} if how == ".webp" else {}
        save(path / f"x{how}", with_alpha, **options)


HOLES = ["nodata", "alpha band", "mask", "mask beside it", ".png", ".webp", "palette"]
HOLES += ["palette and place"]


@pytest.mark.parametrize("how", HOLES)
@pytest.mark.parametrize("labels", [True, False])
def test_pixels_without_data_are_ignored(tmp_path, capsys, how, labels):
    """In histograms, baselines, measures and the printed share, whatever their colours are."""
    for split in ("train", "val"):
        half_empty(tmp_path / split / ("rgb" if labels else "A"), how)
        if labels:
            save(tmp_path / split / "lc" / "x.png", np.ones((64, 64), np.uint8))
        else:
            save(tmp_path / split / "B" / "x.png", noise(64, 64))
    table = json.dumps(TABLE) if labels else "pictures"
    about = {"data": str(tmp_path), "cache": str(tmp_path / "cache"), "lc_classes": table}
    module, cfg = tiny("pix2pix", **about)
    val = module.Pairs(cfg, "val", CPU)
    assert f"{50 if labels else 25}% of the pixels ignored" in capsys.readouterr().err
    (records,) = val.in_order(np.arange(1))
    x, y = val.pair(records)
    assert y[:, :, :, 32:].isnan().all() and not x.isnan().any()
    assert (to_bytes(y)[0, :, 0, 0].tolist()) == [200, 60, 20] and not y[:, :, :, :32].isnan().any()
    histograms = val.store.histograms()
    assert [row.nonzero().tolist() for row in histograms["A"]] == [[[200]], [[60]], [[20]]]
    if labels:
        assert (val.store.images("B", records) == IGNORED).sum() == 64 * 32
        assert histograms["A of classes"].sum() == 64 * 32 * 3
    colors = common.constant_colors(histograms["A"], None, histograms.get("A of classes"))
    colors["black"] = torch.full((3,), -1.0)
    rows = module.evaluate(module.build(cfg, CPU), val, cfg, np.arange(1), colors).table()
    assert rows["median training colour"]["accuracy_5"] == 1.0
    assert rows["black"]["accuracy_5"] == rows["median training colour"]["rmse"] == 0.0
    assert rows["black"]["rmse"] == pytest.approx(np.sqrt((200**2 + 60**2 + 20**2) / 3))


@pytest.mark.parametrize("script", ["pix2pix", "cyclegan"])
@pytest.mark.parametrize("side", "AB")
def test_places_without_data_in_the_input_do_not_count(tmp_path, script, side):
    """In losses and measures of a pair: what lies below a hole changes neither."""
    found, partner = [], "BA"[side == "B"]
    for level in (0, 255):
        root = tmp_path / str(level)
        other = np.full((64, 64, 3), 99, np.uint8)
        other[:, 32:] = level
        half_empty(root / "val" / side, ".png")
        save(root / "val" / partner / "x.png", other)
        module, cfg = tiny(script, direction=f"{side}to{partner}")
        val = open_data(script, root, tmp_path / "cache", "val", direction=cfg.direction)
        torch.manual_seed(0)
        rows = module.evaluate(module.build(cfg, CPU), val, cfg, np.arange(1)).table()
        if script == "pix2pix":
            (records,) = val.in_order(np.arange(1))
            x, y = val.pair(records)
            assert torch.equal(x.isnan().any(1), y.isnan().all(1)) and x.isnan().any()
        found.append(rows["model" if script == "pix2pix" else f"{side} to {partner}: model"])
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "most"), [("x.png", 0), ("x.webp", 0), ("x.jpg", 5)])
def test_pictures_are_written_without_loss_and_jpeg_at_quality_95(tmp_path, name, most):
    pixels = noise(40, 50)
    write_image(tmp_path / name, pixels)
    assert abs(pixels_of(tmp_path / name).astype(int) - pixels).mean() <= most


@pytest.mark.parametrize("ending", [".png", ".PNG", ".webp"])
def test_opacity_stays(tmp_path, ending):
    path, opacity = tmp_path / f"x{ending}", np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    save(path, np.dstack([noise(64, 64), opacity]), lossless=True)
    with Raster(path) as raster:
        nines = np.full((64, 64, 3), 9, np.uint8)
        new = written(tmp_path / f"y{ending}", raster, nines)
        edited = written(tmp_path / f"z{ending}", raster, nines, edited=True)
        labels = written(tmp_path / "lc.png", raster, np.ones((64, 64), np.uint8), CLASSES)
    assert (pixels_of(new)[..., 3] == opacity).all() and (pixels_of(new)[:, 1:, :3] == 9).all()
    assert (pixels_of(new)[:, 0, :3] == 0).all() and (pixels_of(edited)[..., :3] == 9).all()
    assert (Raster(labels, CLASSES).read() == np.where(opacity > 0, 1, IGNORED)).all()


def test_large_results_are_big_tiffs_and_four_bands_have_no_alpha(tmp_path):
    geotiff(tmp_path / "x.tif", np.zeros((9, 9, 3), np.uint8))
    with Raster(tmp_path / "x.tif") as raster:
        assert _profile(raster, None, 3, None)["bigtiff"] == "if_safer"
        assert _profile(raster, None, 4, None)["photometric"] == "MINISBLACK"


def test_bands_that_are_left_out_are_reported(tmp_path, capsys):
    save(tmp_path / "x.png", noise(8, 8))
    for bands, said in (((2,), "[2]"), ((1, 2), "[1, 2]"), ((3, 2, 1), "")):
        Raster(tmp_path / "x.png", bands=bands)
        err = capsys.readouterr().err
        assert err == (f"images have 3 bands; these are read: {said}\n" if said else "")


def test_systems_without_codes_are_compared(tmp_path):
    for name, longitude in (("a.tif", 11), ("b.tif", 47)):
        crs = f"+proj=laea +lat_0=10 +lon_0={longitude} +units=m"
        geotiff(tmp_path / name, np.zeros((9, 9, 3), np.uint8), crs=crs)
    with refused("lies elsewhere"):
        check_pair(Raster(tmp_path / "a.tif"), Raster(tmp_path / "b.tif"))


@pytest.mark.parametrize(
    ("pixels", "table", "text"),
    [
        (np.ones((8, 8), np.complex64), None, "has complex64 values, which are not supported"),
        (np.ones((8, 8, 3), np.uint16), CLASSES, "has 3 bands: a label map has one band of codes"),
        (np.ones((8, 8, 5), np.uint8), CLASSES, "has 5 bands: .*--bidx 1"),
        (np.ones((8, 8, 2), np.uint8), CLASSES, "has 2 bands"),
        (np.ones((8, 8)), None, "an array can only be a label map"),
        (np.ones((8, 8, 3), np.uint8), None, "has uint8 values; the training images: "),
    ],
)
def test_files_that_are_no_pictures_or_label_maps_are_refused(tmp_path, pixels, table, text):
    if pixels.dtype == float:
        np.save(tmp_path / "x.npy", pixels)
    else:
        geotiff(tmp_path / "x.tif", pixels)
    deep = Limits((0,), (9,), "uint16")
    with refused(text):
        Raster(next(tmp_path.iterdir()), table, limits=deep)
