"""Rasters read and written by windows: GeoTIFFs, label maps, memory."""

import dataclasses
import json
import os
import struct

import numpy as np
import pytest
import rasterio
from PIL import Image, ImageOps

import common
from common import IGNORED
from conftest import PLACE, TABLE, geotiff, noise, picture, save, tiny
from support.classes import ClassTable
from support.rasters import Raster, writing

# ----------------------------------------------------------------------------------------- GeoTIFFs


def test_georeferencing_nodata_and_bigness(tmp_path):
    pixels = np.moveaxis(noise(70, 90), 0, -1).copy()
    pixels[:10] = 7
    source = geotiff(tmp_path / "in" / "x.tif", pixels, nodata=7)
    with Raster(source) as raster, writing(tmp_path / "out" / "x.tif", raster) as put:
        for top in range(0, 70, 20):
            put(np.full((min(20, 70 - top), 90, 3), 7, np.uint8), top)
    with rasterio.open(tmp_path / "out" / "x.tif") as out:
        assert (out.height, out.width, out.count) == (70, 90, 3)
        assert out.crs == PLACE["crs"] and out.transform == PLACE["transform"]
        assert out.profile["tiled"] and out.profile["compress"] == "deflate" and out.nodata == 7
        valid = out.dataset_mask() > 0
        assert not valid[:10].any() and valid[10:].all()  # painted 7, 7, 7 is not nothing
        assert (out.read()[:, 10:] == 6).all()


@pytest.mark.parametrize("kind", ["mask", "alpha"])
def test_masks_stay_and_black_stays_black(tmp_path, kind):
    """A mask or transparency says what holds data; no colour is taken for nothing."""
    pixels = np.moveaxis(noise(40, 50), 0, -1).copy()
    pixels[20:] = 0
    valid = np.full((40, 50), 255, np.uint8)
    valid[:, :10] = 0
    source = tmp_path / "x.tif"
    if kind == "alpha":
        geotiff(source, np.dstack([pixels, valid]), photometric="RGB", alpha="yes")
    else:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            geotiff(source, pixels)
            with rasterio.open(source, "r+") as target:
                target.write_mask(valid)
    with Raster(source) as raster, writing(tmp_path / "y.tif", raster) as put:
        for top in (0, 25):
            put(raster.read(top, height=25), top)
    with rasterio.open(tmp_path / "y.tif") as out:
        assert (np.moveaxis(out.read(), 0, -1) == pixels).all() and out.nodata is None
        assert ((out.dataset_mask() > 0) == (valid > 0)).all()


def test_no_data_that_a_byte_cannot_hold_becomes_a_mask(tmp_path):
    index = np.zeros((20, 30), np.int16)
    index[:7] = -9999
    source = geotiff(tmp_path / "x.tif", index, nodata=-9999)
    table = ClassTable.load(json.dumps(TABLE))
    with Raster(source, table) as raster, writing(tmp_path / "y.tif", raster) as put:
        assert (raster.read()[:7] == IGNORED).all()
        put(np.full((20, 30, 3), 9, np.uint8), 0)
    with rasterio.open(tmp_path / "y.tif") as out:
        valid = out.dataset_mask() > 0
        assert out.nodata is None and not valid[:7].any() and valid[7:].all()


def test_what_is_painted_never_looks_like_no_data(tmp_path):
    """Only a pixel that has the value of no data in every band is moved, by one level."""
    pixels = np.full((20, 30, 3), 9, np.uint8)
    pixels[:7] = 0
    source = geotiff(tmp_path / "x.tif", pixels, nodata=0)
    painted = np.tile(np.array([0, 200, 100], np.uint8), (20, 30, 1))
    painted[:, 15:] = 0
    with Raster(source) as raster, writing(tmp_path / "y.tif", raster) as put:
        put(painted, 0)
    with rasterio.open(tmp_path / "y.tif") as out:
        written = np.moveaxis(out.read(), 0, -1)
    assert (written[7:, :15] == (0, 200, 100)).all() and (written[7:, 15:] == 1).all()
    assert (written[:7] == 0).all()


def test_ground_control_points_and_tags_are_kept(tmp_path):
    gcps = [
        rasterio.control.GroundControlPoint(r, c, 9 + c, 5 - r) for r, c in ((0, 0), (0, 9), (9, 0))
    ]
    about = {"driver": "GTiff", "dtype": "uint8", "count": 3, "height": 20, "width": 20}
    with rasterio.open(tmp_path / "x.tif", "w", gcps=gcps, crs="EPSG:25832", **about) as target:
        target.write(noise(20, 20))
        target.update_tags(season="spring", AREA_OR_POINT="Point")
    with Raster(tmp_path / "x.tif") as raster, writing(tmp_path / "y.tif", raster) as put:
        put(raster.read(), 0)
    with rasterio.open(tmp_path / "y.tif") as out:
        assert len(out.gcps[0]) == 3 and out.gcps[1] == "EPSG:25832"
        assert out.tags()["season"] == "spring" and out.tags()["AREA_OR_POINT"] == "Point"


def test_a_photograph_is_no_label_map(tmp_path):
    table = ClassTable.load(json.dumps(TABLE))
    geotiff(tmp_path / "photo.tif", picture(np.random.default_rng(0), 80, 90))
    with pytest.raises(common.UserError, match="hardly a pixel has a colour of the class table"):
        Raster(tmp_path / "photo.tif", table)


def test_classes_in_a_geotiff_keep_their_colours(tmp_path):
    table = ClassTable.load(json.dumps(TABLE))
    source = geotiff(tmp_path / "x.tif", np.zeros((20, 30, 3), np.uint8), nodata=None)
    index = np.random.default_rng(0).integers(0, 3, (20, 30), np.uint8)
    with Raster(source) as raster, writing(tmp_path / "y.tif", raster, table) as put:
        put(index, 0)
    with rasterio.open(tmp_path / "y.tif") as out:
        assert out.colormap(1)[1][:3] == table.colors[1] and out.nodata == IGNORED
        assert out.transform == PLACE["transform"]
    with Raster(tmp_path / "y.tif", table) as again:
        assert (again.read() == index).all()


def test_label_rasters_are_read_by_windows_as_as_a_whole(tmp_path):
    """Codes, palettes and colours; no data has no class."""
    table = ClassTable.load(json.dumps(TABLE))
    index = np.random.default_rng(0).integers(0, 3, (40, 50), np.uint8)
    index[:12] = 0
    geotiff(tmp_path / "codes.tif", index.astype(np.uint16))
    geotiff(tmp_path / "colours.tif", table.palette[index])
    image = Image.fromarray(index)
    image.putpalette(table.palette.tobytes())
    image.save(tmp_path / "palette.tif")
    for name in ("codes", "colours", "palette"):
        with Raster(tmp_path / f"{name}.tif", table) as raster:
            assert (raster.read() == index).all()
            assert (raster.read(9, 5, 20, 99) == index[9:29, 5:]).all()
    geotiff(tmp_path / "holes.tif", np.where(index == 2, 99, index).astype(np.uint8), nodata=99)
    with Raster(tmp_path / "holes.tif", table) as raster:
        assert (raster.read() == np.where(index == 2, IGNORED, index)).all()
    strange = table.palette[index].copy()
    strange[:20] = 1
    geotiff(tmp_path / "strange.tif", strange)
    with Raster(tmp_path / "strange.tif", table) as raster:
        assert (raster.read(0, 0, 20, 50) == IGNORED).all()  # stray colours are no mistake here


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_deep_rasters_are_refused_with_the_command_that_converts_them(tmp_path, kind):
    for shape in ((8, 8, 3), (8, 8)):
        geotiff(tmp_path / "deep.tif", np.ones(shape, kind))
        with pytest.raises(common.UserError, match="gdal_translate -ot Byte -scale LOW HIGH 0 255"):
            Raster(tmp_path / "deep.tif")


def test_photographs_are_turned_upright(tmp_path):
    """As EXIF says; a camera held sideways writes 6."""
    upright = picture(np.random.default_rng(0), 40, 60)
    exif = Image.Exif()
    exif[274] = 6
    lying = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    lying.save(tmp_path / "x.jpg", exif=exif, quality=95)
    with Raster(tmp_path / "x.jpg") as raster:
        assert (raster.height, raster.width) == (40, 60)
        assert np.abs(raster.read().astype(int) - upright).mean() < 3


def test_formats_that_lie_in_memory_have_a_limit(tmp_path, monkeypatch):
    save(tmp_path / "x.png", np.zeros((4, 4), np.uint8))
    monkeypatch.setattr(Image.Image, "size", (20_000, 20_000))
    with pytest.raises(common.UserError, match=r"x.png: 20000x20000 .* gdal_translate x.png x.tif"):
        Raster(tmp_path / "x.png")


@pytest.mark.parametrize("name", ["x.tif", "x.png"])
def test_a_killed_process_leaves_nothing_under_the_final_name(tmp_path, name):
    geotiff(tmp_path / "in.tif", np.zeros((64, 64, 3), np.uint8))
    child = os.fork()
    if child == 0:
        raster = Raster(tmp_path / "in.tif")
        with writing(tmp_path / "out" / name, raster) as put:
            put(np.ones((32, 64, 3), np.uint8), 0)
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "out" / name).exists()
    out, raster = tmp_path / "out2" / name, Raster(tmp_path / "in.tif")
    with pytest.raises(ValueError, match="predicting"), writing(out, raster):
        raise ValueError("predicting failed")
    assert list((tmp_path / "out2").iterdir()) == []


@pytest.mark.parametrize("shape", [(10, 13), (3, 40), (40, 7)])
def test_windows_past_the_edge_are_mirrored(tmp_path, shape):
    image = np.moveaxis(noise(*shape), 0, -1)
    save(tmp_path / "x.png", image)
    with Raster(tmp_path / "x.png") as raster:
        got = raster.padded(1, 2, 16, 20)
    part = image[1:17, 2:22]
    missing = [(0, 16 - part.shape[0]), (0, 20 - part.shape[1]), (0, 0)]
    assert (got == np.pad(part, missing, "symmetric")).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(tmp_path, orientation):
    """As Pillow itself turns them."""
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(picture(np.random.default_rng(0), 40, 60)).save(tmp_path / "x.jpg", exif=exif)
    want = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "x.jpg")))
    with Raster(tmp_path / "x.jpg") as raster:
        assert (raster.height, raster.width) == want.shape[:2]
        assert (raster.read() == want).all()


def test_a_photograph_with_damaged_exif_is_turned_upright(tmp_path):
    """Its width stands there as text, which nobody could write again, nor needs to."""
    tags = struct.pack("<HHIHH", 274, 3, 1, 6, 0), struct.pack("<HHI4s", 256, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(tags) + bytes(4)
    Image.new("RGB", (60, 40)).save(tmp_path / "x.jpg", exif=exif)
    with Raster(tmp_path / "x.jpg") as raster:
        assert raster.read().shape == (60, 40, 3) == (raster.height, raster.width, 3)


def test_bands_and_palettes_of_photographs(tmp_path):
    pixels = np.moveaxis(noise(20, 30, 4), 0, -1)
    geotiff(tmp_path / "four.tif", pixels)
    geotiff(tmp_path / "one.tif", pixels[..., 0])
    Image.fromarray(pixels[..., :3]).quantize(9).save(tmp_path / "palette.tif")
    for name, want in (
        ("four", pixels[..., :3]),
        ("one", pixels[..., :1].repeat(3, -1)),
        ("palette", np.asarray(Image.open(tmp_path / "palette.tif").convert("RGB"))),
    ):
        with Raster(tmp_path / f"{name}.tif") as raster:
            assert (raster.read() == want).all(), name


def test_a_mask_of_label_maps_is_no_class(tmp_path):
    table = {"nearest": True, "classes": TABLE[:3]}
    table = ClassTable.load(json.dumps(table))
    index = np.random.default_rng(0).integers(0, 3, (20, 30), np.uint8)
    colours = table.palette[index]
    colours[:5] = 0
    geotiff(tmp_path / "x.tif", colours, nodata=0)
    with Raster(tmp_path / "x.tif", table) as raster:
        assert (raster.read()[:5] == IGNORED).all() and (raster.read()[5:] == index[5:]).all()


def test_a_palette_of_other_colours_does_not_hide_indices(tmp_path):
    index = np.random.default_rng(0).integers(0, 3, (20, 30), np.uint8)
    image = Image.fromarray(index)
    image.putpalette(bytes(range(7, 255, 3)) * 9)
    image.save(tmp_path / "x.tif")
    table = ClassTable.load(json.dumps(TABLE))
    with Raster(tmp_path / "x.tif", table) as raster:
        assert (raster.read() == index).all() and (
            raster.read(3, 4, 5, 6) == index[3:8, 4:10]
        ).all()


def test_positions_count_ignored_rows(tmp_path):
    """Where the table has no values, a code is the position of its row."""
    save(tmp_path / "x.png", np.array([[0, 1, 2, 3]], np.uint8))
    table = ClassTable.load(json.dumps([TABLE[0], TABLE[3], TABLE[1], TABLE[2]]))
    with Raster(tmp_path / "x.png", table) as raster:
        assert raster.read().tolist() == [[0, IGNORED, 1, 2]]


def test_a_tiff_that_was_not_written_whole_does_not_appear(tmp_path, monkeypatch):
    """GDAL says nothing when it closes a file on a full disk: it is read once more."""
    geotiff(tmp_path / "x.tif", np.zeros((64, 64, 3), np.uint8))
    raster, honest = Raster(tmp_path / "x.tif"), rasterio.open

    def half(path, mode="r", **more):
        if mode == "r":
            os.truncate(path, 500)
        return honest(path, mode, **more)

    monkeypatch.setattr(rasterio, "open", half)
    out = tmp_path / "out" / "x.tif"
    full = pytest.raises(common.UserError, match="is the disk full")
    with full, writing(out, raster) as put:
        put(noise(64, 64).transpose(1, 2, 0), 0)
    assert list(out.parent.iterdir()) == []


def test_a_code_that_is_a_class_is_one_though_declared_no_data(tmp_path):
    table = ClassTable.load(json.dumps(TABLE))
    geotiff(tmp_path / "x.tif", np.zeros((4, 4), np.uint8), nodata=0)
    with Raster(tmp_path / "x.tif", table) as raster:
        assert (raster.read() == 0).all()


# ----------------------------------------------------------------------------------------- training


def test_training_reads_rasters_strip_by_strip(tmp_path, monkeypatch):
    """The same store as from a PNG, and never more in memory than a row of patches."""
    rng = np.random.default_rng(0)
    image, index = picture(rng, 130, 200), rng.integers(0, 3, (130, 200), np.uint8)
    for suffix, write in ((".tif", geotiff), (".png", save)):
        for split in ("train", "val"):
            write(tmp_path / suffix / split / "rgb" / f"x{suffix}", image)
            write(tmp_path / suffix / split / "lc" / f"x{suffix}", index)
        (tmp_path / suffix / "classes.json").write_text(json.dumps(TABLE))
    stores, honest, rows = [], Raster.read, []

    def read(self, *window, **more):
        pixels = honest(self, *window, **more)
        rows.append(len(pixels))
        return pixels

    monkeypatch.setattr(Raster, "read", read)
    for suffix in (".tif", ".png"):
        _, cfg = tiny("mixlc", data=str(tmp_path / suffix), patch=60, lc_classes="")
        cfg = dataclasses.replace(cfg, cache=str(tmp_path / "cache"))
        stores.append(common.ImageStore(cfg, "train", 64))
    assert stores[0].records.shape == (6, 4, 64, 64) and max(rows) == 60
    assert (stores[0].records == stores[1].records).all()
    assert stores[0].window() == 60
