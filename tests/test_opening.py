"""Files are opened by the driver of their ending alone; land cover is written with its values."""

import contextlib
import io
import json
import os
import re
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from PIL import Image
from rasterio.rpc import RPC

import common
from files import CLASSES, PLACE, bands_of, geotiff, has_data, pixels_of, save, written
from runs import refused
from support import opening
from support.classes import ClassTable
from support.generate import results_of
from support.limits import ALL, Limits
from support.opening import UPLOADS
from support.pictures import as_array
from support.rasters import Raster
from tensors import calls_of, tiny

GREY = np.full((30, 40, 3), 9, np.uint8)
BAND = '<VRTRasterBand dataType="Byte" band="{band}">{sources}</VRTRasterBand>'
SOURCE = (
    '<SimpleSource><SourceFilename relativeToVRT="1">{name}</SourceFilename>'
    '<SourceBand>{band}</SourceBand><SrcRect xOff="0" yOff="0" xSize="40" ySize="30"/>'
    '<DstRect xOff="{left}" yOff="0" xSize="40" ySize="30"/></SimpleSource>'
)


def joined(*names, source=SOURCE):
    """The text of a VRT that puts GeoTIFFs of 40 x 30 pixels side by side."""
    bands = ""
    for band in (1, 2, 3):
        parts = [source.format(name=n, band=band, left=40 * k) for k, n in enumerate(names)]
        bands += BAND.format(band=band, sources="".join(parts))
    width = 40 * len(names)
    return f'<VRTDataset rasterXSize="{width}" rasterYSize="30">{bands}</VRTDataset>'


NODATA = SOURCE.replace("</Simple", "<NODATA>9</NODATA></Simple").replace("Simple", "Complex")
SECRET = "/etc/hostname"
RAW = (
    '<VRTDataset rasterXSize="4" rasterYSize="1"><VRTRasterBand dataType="Byte" band="1" '
    f'subClass="VRTRawRasterBand"><SourceFilename>{SECRET}</SourceFilename>'
    "<ImageOffset>0</ImageOffset></VRTRasterBand></VRTDataset>"
)

FLAGS = '><Metadata><MDI key="INTERNAL_MASK_FLAGS_1">2</MDI></Metadata><VRTR'
MASK = RAW.replace('"4"', '"40"').replace('YSize="1"', 'YSize="30"').replace("><VRTR", FLAGS)


WORLD = "0.5\n0\n0\n-0.5\n500000.25\n5799999.75\n"  # PLACE as six numbers; the first pixel's middle
EPS, FAR = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "http://127.0.0.1:9/x.tif"
# (file, its content, what the line says)
RECIPES = [
    ("x.tif", "<MRF_META><Raster><Size x='64' y='64'/></Raster></MRF_META>", "cannot be decoded"),
    ("x.tif", RAW, "cannot be decoded"),
    ("x.vrt", RAW, "VRTRawRasterBand"),
    ("x.vrt", RAW.replace("subClass", "SUBCLASS"), "may only join TIFFs"),
    ("x.vrt", RAW.replace("VRTRasterBand", "vrtrasterband"), "vrtrasterband"),
    ("x.vrt", "<VRTDataset><PixelFunctionCode/></VRTDataset>", "PixelFunctionCode"),
    ("x.vrt", joined(f"/vsicurl/{FAR}"), "No such file"),
    ("x.vrt", joined(FAR), "No such file"),
    ("x.vrt", joined("other.vrt"), "No such file"),
    ("x.png", EPS, "cannot be decoded"),
    ("x.png", "P6\n4 4\n255\n" + 48 * "\0", "cannot be decoded"),  # a PPM
    ("x.eps", EPS, "endings are"),
    ("x.mrf", "<MRF_META/>", "endings are"),
    *((f"x.{ending}", RAW, "cannot be decoded") for ending in ["jp2", "img", "gpkg", "png", "jpg"]),
]


@pytest.mark.parametrize(("version", "old"), [("3.9.3", True), ("3.10.0", False), ("4.0.1", False)])
def test_an_old_gdal_that_misreads_palettes_is_reported(monkeypatch, capsys, version, old):
    monkeypatch.setattr(rasterio, "__gdal_version__", version)
    opening.gdal.__wrapped__()
    about = f"GDAL {version} reads colours of some palettes wrongly"
    assert (about in capsys.readouterr().err) == old


@pytest.mark.parametrize(("name", "content", "text"), RECIPES)
def test_no_file_is_opened_by_its_content(tmp_path, name, content, text):
    """Also where a world file beside it names its place."""
    (tmp_path / name).write_text(content)
    (tmp_path / "x.wld").write_text(WORLD)
    with refused(text):
        Raster(tmp_path / name).read()
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {name: content, "x.wld": WORLD}


@pytest.mark.parametrize("ending", [".msk", ".MSK", ".Msk", ".ovr", ".OVR"])
def test_what_lies_beside_a_tiff_is_not_opened_by_its_content(tmp_path, ending, monkeypatch):
    """Refused, or under a strange name left alone, whatever the environment asks for."""
    monkeypatch.setenv("GDAL_DISABLE_READDIR_ON_OPEN", "FALSE")
    opening.gdal.cache_clear()
    geotiff(tmp_path / "x.tif", GREY)
    (tmp_path / f"x.tif{ending}").write_text(MASK)
    if ending == ".Msk":
        with Raster(tmp_path / "x.tif") as raster:
            assert not raster.masked and (raster.read() == GREY).all()
        return
    with refused(f"x.tif{ending}: cannot be decoded: it is not a TIFF"):
        Raster(tmp_path / "x.tif")


# GDAL takes it for a file of ERDAS Imagine, and opens it as what comes first in it
WARPED = (
    'EHFA_HEADER_TAG<VRTDataset rasterXSize="40" rasterYSize="30" subClass="VRTWarpedDataset"/>'
)


@pytest.mark.parametrize("name", ["x.aux", "x.AUX", "x.tif.aux", "x.tif.msk.aux", "x.tif.aux own"])
def test_an_aux_file_is_not_opened_by_its_content(tmp_path, name):
    name, _, own = name.partition(" ")
    geotiff(tmp_path / "x.tif", GREY)
    if ".msk" in name:
        geotiff(tmp_path / "x.tif.msk", GREY[..., 0])
    if own:
        with rasterio.open(
            tmp_path / name, "w", driver="HFA", width=40, height=30, count=1, dtype="uint8"
        ):
            pass
        assert (Raster(tmp_path / "x.tif").read() == GREY).all()
        return
    (tmp_path / name).write_text("\\relax")  # of LaTeX: left alone
    assert (Raster(tmp_path / "x.tif").read() == GREY).all()
    (tmp_path / name).write_text(WARPED.lower() if "AUX" in name else WARPED)
    with refused(f"{name}: is not of ERDAS Imagine"):
        Raster(tmp_path / "x.tif")


def test_an_array_is_as_large_as_the_last_part_of_its_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        for size in (1, 1000):
            content = io.BytesIO()
            np.save(content, np.zeros(size, np.uint8))
            with warnings.catch_warnings(action="ignore"):  # of two parts of one name
                file.writestr("x.npy", content.getvalue())
    assert opening.open_array(tmp_path / "x.npz", 2000).shape == (1000,)
    with pytest.raises(MemoryError):
        opening.open_array(tmp_path / "x.npz", 1000)
    np.save(tmp_path / "x.npy", np.zeros((0, 5), np.uint8))
    with refused("x.npy: has no pixels"):
        Raster(tmp_path / "x.npy", CLASSES)


def test_a_tiff_of_large_blocks_is_refused_before_it_is_decoded(tmp_path):
    how = {"width": 256, "height": 256, "dtype": "uint8", "compress": "deflate"}
    for count, interleave, large in ((9, "pixel", True), (9, "band", False), (2, "pixel", False)):
        path = tmp_path / f"{count}{interleave}.tif"
        with rasterio.open(
            path, "w", "GTiff", count=count, interleave=interleave, blockysize=256, **how
        ) as t:
            t.write(np.zeros((count, 256, 256), np.uint8))
        with refused("has blocks of 589,824 bytes") if large else contextlib.nullcontext():
            Raster(path, bands=(1,), most=2**13 * 5)


def test_a_vrt_that_scales_could_open_overviews_that_a_tiff_names(tmp_path):
    geotiff(tmp_path / "x.tif", GREY)
    (tmp_path / "raw.vrt").write_text(RAW)
    with rasterio.open(tmp_path / "x.tif", "r+") as target:
        target.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(tmp_path / "raw.vrt"))
    whole, half = 'yOff="0" xSize="40" ySize="30"/></S', 'xSize="20" ySize="15"/></S'
    for kind in ("Simple", "Complex"):
        text = joined("x.tif").replace(whole, half).replace("Simple", kind)
        (tmp_path / "half.vrt").write_text(text)
        with refused("half.vrt: scales the TIFFs that it joins"):
            Raster(tmp_path / "half.vrt")


@pytest.mark.parametrize("ending", [".tif", ".png"])
def test_names_that_are_not_utf_8(tmp_path, ending):
    """A line where GDAL cannot open them; the rest of the formats can."""
    path = tmp_path / os.fsdecode(b"caf\xe9" + ending.encode())
    save(tmp_path / f"x{ending}", GREY)
    os.rename(tmp_path / f"x{ending}", path)
    if ending == ".png":
        assert (Raster(path).read() == GREY).all()
        return
    with refused("cannot be decoded .*utf-8"):
        Raster(path)


def test_a_folder_a_pipe_or_a_name_of_the_network_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    (tmp_path / "y.tif").mkdir()
    for name in ("x.png", "y.tif"):
        with refused(f"{name}: is no file, but a folder or a pipe"):
            Raster(tmp_path / name)
    for name in (f"/vsicurl/{FAR}", FAR):
        with refused("no such file"):
            Raster(name)


def test_a_vrt_joins_tiffs_and_is_not_for_strangers(tmp_path, monkeypatch):
    geotiff(tmp_path / "a.tif", GREY, bigtiff="YES")
    geotiff(tmp_path / "b.TIFF", GREY + 200, compress="JPEG")
    (tmp_path / "both.vrt").write_text(joined("a.tif", "b.TIFF"))
    with mock.patch.object(rasterio, "open", wraps=rasterio.open) as spy:
        assert (Raster(tmp_path / "both.vrt").read() == np.hstack([GREY, GREY + 200])).all()
    assert spy.call_args.kwargs == {"driver": "VRT"}  # or GDAL would go by its content
    (tmp_path / "alone.vrt").write_text(joined("a.tif"))
    assert [Raster(tmp_path / f"{name}.vrt").lossy for name in ("both", "alone")] == [True, False]
    text = joined("a.tif", "b.TIFF", source=NODATA)  # as gdalbuildvrt writes it
    text = re.sub("(<VRTRasterBand .*?>)", r"\1<NoDataValue>9</NoDataValue>", text)
    (tmp_path / "vrt").mkdir()
    (tmp_path / "vrt" / "nodata.vrt").write_text(text.replace('VRT="1"', 'VRT="0"'))
    monkeypatch.chdir(tmp_path)
    with Raster("vrt/nodata.vrt") as raster:
        assert raster.valid(0, 0, 30, 80).any(0).tolist() == [False] * 40 + [True] * 40
    with refused("endings are"):
        Raster(tmp_path / "both.vrt", endings=UPLOADS)
    assert Raster("both.vrt").lossy
    assert not UPLOADS & {".bmp", ".gif", ".gpkg", ".img", ".jp2", ".vrt"}


def test_remarks_in_a_vrt_are_not_read(tmp_path):
    """Nor what they name: GDAL would open overviews by their content."""
    overview = f"<Overview><SourceFilename>{SECRET}</SourceFilename></Overview>"
    remarks = "<Histograms><HistItem/></Histograms><GDALRasterAttributeTable/>" + overview
    text = joined("a.tif").replace("</VRTRasterBand>", f"{remarks}</VRTRasterBand>")
    text = text.replace("</VRTD", "<OverviewList>2 4</OverviewList></VRTD")
    geotiff(tmp_path / "a.tif", GREY)
    (tmp_path / "x.vrt").write_text(text)
    raster = Raster(tmp_path / "x.vrt")
    assert (raster.read() == GREY).all() and not raster.tiff.overviews(1)


def test_bands_have_types_and_no_data_values_of_their_own(tmp_path):
    pixels = GREY + np.arange(3, dtype=np.uint8)
    pixels[:9, :, 1] = 200
    geotiff(tmp_path / "a.tif", pixels)
    text = joined("a.tif").replace(
        '"Byte" band="2">', '"Int16" band="2"><NoDataValue>200</NoDataValue>'
    )
    (tmp_path / "x.vrt").write_text(text.replace('"Byte" band="3"', '"Float32" band="3"'))
    with Raster(tmp_path / "x.vrt", limits=ALL) as raster:
        values, limits = raster.values(), Limits((0,) * 3, (255,) * 3, "float32")
        assert values.dtype == raster.dtype == "float32" and (values == pixels).all()
        valid = raster.valid(0, 0, 30, 40)
        assert not valid[:9].any() and valid[9:].all()
    for bands, holes in (((2, 3), True), ((1, 3), False)):
        raster = Raster(tmp_path / "x.vrt", bands=bands, limits=ALL)
        assert (raster.valid(0, 0, 30, 40) == valid).all() == holes
    with Raster(tmp_path / "x.vrt", limits=limits) as raster:
        written(tmp_path / "out.tif", raster, values, limits=limits, edited=True)
    assert (has_data(tmp_path / "out.tif") == valid).all()
    one = Limits((0,), (255,), "float32")
    with Raster(tmp_path / "x.vrt", bands=(2,), limits=one) as raster:
        how = {"limits": one, "bands": 1, "edited": True}
        second = written(tmp_path / "second.tif", raster, raster.values(), **how)
    with rasterio.open(second) as file:
        assert file.nodata == 200


EIGHT, TWENTY = [float(k) for k in range(1, 9)], [1.0] * 20
RPCS = RPC(*EIGHT[:4], TWENTY, TWENTY, *EIGHT[4:], TWENTY, TWENTY, 9.0, 10.0, -1.0, -1.0)
NOWHERE = {"crs": None, "transform": None}

# case: (name, its driver, profile, file beside it and its text)
PLACED = {
    "JPEG 2000": ("x.jp2", "JP2OpenJPEG", {"quality": "100", "reversible": "yes"}, None),
    "ERDAS": ("x.img", "HFA", {}, None),
    "GeoPackage": ("x.gpkg", "GPKG", {"tile_format": "png"}, None),
    "PNG and .aux.xml": ("x.png", "PNG", {}, None),
    "PNG and a world file": ("x.png", "PNG", NOWHERE, ("x.pgw", WORLD)),
    "JPEG and a world file": ("x.jpg", "JPEG", {**NOWHERE, "quality": "100"}, ("x.jgw", WORLD)),
    "PNG and a long ending": ("x.png", "PNG", NOWHERE, ("x.pngw", WORLD)),
    "in capital letters": ("x.JPG", "JPEG", {**NOWHERE, "quality": "100"}, ("x.JGW", WORLD)),
    "JPEG and .wld": ("x.jpeg", "JPEG", {**NOWHERE, "quality": "100"}, ("x.wld", WORLD)),
    "BMP and a world file": ("x.bmp", "BMP", NOWHERE, ("x.bpw", WORLD)),
    "TIFF and a world file": ("x.tif", "GTiff", NOWHERE, ("x.tfw", WORLD)),
    "a TIFF in capital letters": ("X.TIFF", "GTiff", {}, None),
    "no transform": ("x.tif", "GTiff", {"transform": None}, None),
    "no CRS": ("x.tif", "GTiff", {"crs": None}, None),
    "RPCs": ("x.tif", "GTiff", {**NOWHERE, "rpcs": RPCS}, None),
}


@pytest.mark.parametrize("case", PLACED)
def test_a_place_is_kept_whatever_names_it(tmp_path, case):
    """Nothing that is read changes, and strangers' files have no other driver than before."""
    name, driver, profile, beside = PLACED[case]
    picture = np.full((30, 40, 3), 9, np.uint8)
    picture[:10] = 200
    about = {"photometric": "RGB"} if driver == "GTiff" else {}
    geotiff(tmp_path / name, picture, **{"driver": driver, **about, **profile})
    if beside:
        (tmp_path / beside[0]).write_text(beside[1])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    out = tmp_path / "out" / results_of(tmp_path / name)[0]
    with Raster(tmp_path / name) as raster:
        assert abs(raster.read().astype(int) - picture).max() <= 2 * (driver == "JPEG")
        written(out, raster)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with rasterio.open(out) as result:
        want = {"crs": PLACE["crs"], "transform": PLACE["transform"], **profile}
        want["crs"] = None if beside else want["crs"]
        want["transform"] = PLACE["transform"] if beside else want["transform"]
        assert out.suffix == (".TIFF" if name == "X.TIFF" else ".tif")
        assert result.crs == want["crs"]
        assert result.transform.almost_equals(want["transform"] or Affine.identity())
        assert (result.rpcs is None) == ("rpcs" not in profile)
        assert not result.rpcs or result.rpcs.to_gdal() == RPCS.to_gdal()


def test_a_png_without_a_place_stays_a_png(tmp_path):
    """Also beside the statistics that QGIS leaves there."""
    Image.new("RGB", (40, 30)).save(tmp_path / "x.png")
    (tmp_path / "x.png.aux.xml").write_text("<PAMDataset><Metadata/></PAMDataset>")
    assert results_of(tmp_path / "x.png") == ["x.png"] and not Raster(tmp_path / "x.png").tiff
    points = '<GCPList><GCP Id="1" Pixel="0" Line="0" X="5" Y="8"/></GCPList>'
    (tmp_path / "x.png.aux.xml").write_text(f"<PAMDataset>{points}</PAMDataset>")
    assert results_of(tmp_path / "x.png") == ["x.tif"]


def test_one_of_several_images_in_a_file(tmp_path, capsys):
    """A TIFF's first page is read, which a line reports; a GeoPackage has no first table."""
    pages = [Image.fromarray(GREY), Image.fromarray(GREY + 1)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    assert (Raster(tmp_path / "x.tif").read() == GREY).all()
    assert "images have 2 pages: the first is read" in capsys.readouterr().err
    for table in "ab":
        more = {"raster_table": table, "append_subdataset": "YES" if table == "b" else "NO"}
        geotiff(tmp_path / "x.gpkg", GREY, driver="GPKG", **more)
    with refused("x.gpkg: has 2 images: write one of them as a TIFF"):
        Raster(tmp_path / "x.gpkg")


def random_geotiff(rng, path):
    """Writes a TIFF of random size, bands, layout, compression, data and place."""
    height, width = rng.integers(100, 200, 2)
    bands = rng.choice([1, 3, 4])
    profile = {"interleave": rng.choice(["pixel", "band"])}
    profile["compress"] = rng.choice(["none", "deflate", "lzw", "zstd", "packbits"])
    if rng.random() < 0.5:
        profile |= {"tiled": True, "blockxsize": 16, "blockysize": 32}
    nothing = rng.choice(["", "nodata", "mask"])
    if nothing == "nodata":
        profile["nodata"] = int(rng.integers(0, 256))
    profile["crs"] = rng.choice(["EPSG:32633", "EPSG:4326", "EPSG:3857"])
    shift, turn = Affine.translation(*rng.normal(0, 50, 2)), Affine.rotation(rng.choice([0, 30]))
    scale = Affine.scale(rng.uniform(0.1, 9), rng.choice([-1, 1]) * rng.uniform(0.1, 9))
    matrices = [np.reshape(part, (3, 3)) for part in (shift, turn, scale)]
    profile["transform"] = Affine(*np.linalg.multi_dot(matrices)[:2].ravel())
    pixels = rng.integers(0, 256, (height, width, bands), np.uint8)
    valid = rng.random((height, width)) < 0.7 if nothing == "mask" else None
    geotiff(path, pixels, valid, **profile)
    return np.repeat(pixels, 3, 2) if bands == 1 else pixels[..., :3]


def mask_of(path):
    """Where GDAL has data in one of the bands that are read."""
    with rasterio.open(path) as file:
        return (file.read_masks([1, 2, 3][: file.count]) > 0).any(0)


@pytest.mark.parametrize("seed", range(12))
def test_random_rasters_come_back(tmp_path, seed):
    """What is generated from them has their size, place and holes, and the generator's pixels."""
    path, result = tmp_path / "x.tif", tmp_path / "out" / "x.tif"
    pixels = random_geotiff(np.random.default_rng([25, seed]), path)
    valid = mask_of(path)
    assert np.array_equal(Raster(path).read()[valid], pixels[valid])
    paths = {"generate": (str(path),), "out": str(tmp_path / "out")}
    _, cfg = tiny("pix2pix", window=64, **paths)
    common.translate_files(cfg, lambda windows, whole: -common.from_bytes(windows))
    with rasterio.open(path) as given, rasterio.open(result) as out:
        for name in ("crs", "transform", "shape", "nodata"):
            assert getattr(out, name) == getattr(given, name)
        assert out.profile["tiled"] and out.profile["compress"] == "deflate"
    assert np.array_equal(has_data(result), valid)
    known = valid & (255 - pixels != out.nodata).any(-1)
    assert np.array_equal(bands_of(result)[known], 255 - pixels[known])


@pytest.mark.parametrize("seed", range(12))
def test_random_rasters_are_trained_on(tmp_path, seed, monkeypatch):
    """The store has their pixels, or NaN without data: of A and B, which lie in one place.

    No more than a row of patches is in memory.
    """
    pixels, read = {}, calls_of(monkeypatch, Raster, "read")
    for side in "AB":
        path = tmp_path / "data" / "train" / side / "x.tif"
        pixels[side] = random_geotiff(np.random.default_rng([25, seed]), path)[:64, :64]
    valid = mask_of(path)[:64, :64]
    options = {"data": str(tmp_path / "data"), "patch": 64, "cache": str(tmp_path / "cache")}
    store = common.ImageStore(tiny("pix2pix", **options)[1], "train", 64)
    assert {height for *_, height, _ in read} == {64}
    for side in "AB":
        (image,) = store.images(side, torch.from_numpy(store.records[:1]))
        assert np.array_equal(~image.isnan().all(0).numpy(), valid)
        assert np.array_equal(as_array(image)[valid], pixels[side][valid])


WORLD_COVER = {"tree": 10, "shrub": 20, "grass": 30, "water": 80, "moss": 255}


def world_cover(more):
    """A class table whose values are those of WorldCover and some more."""
    rows = WORLD_COVER.items()
    table = [{"name": n, "value": k + more, "color": f"#{k:02x}0009"} for n, k in rows]
    return json.dumps(table)


# 16 bits where values need them; of `binary`, 254 is no class
@pytest.mark.parametrize("table", [*map(world_cover, (-1, 0, 1)), "binary"])
def test_land_cover_is_written_with_the_values_of_its_table(tmp_path, table):
    """And read again, holes as well; also where the no-data value is a class."""
    classes = ClassTable.load(table)
    index = np.uint8([[0, 1, 2], [3, 4, 255]]).repeat(9, 0).repeat(9, 1)
    index[index < 255] %= len(classes)
    values = [value for value, _, _ in classes.entries]
    want = np.array([*values, classes.unused])[np.minimum(index, len(classes))]
    for name, write in (("x.tif", geotiff), ("x.png", save)):
        write(tmp_path / name, np.zeros((*index.shape, 3), np.uint8))
        with Raster(tmp_path / name) as source:
            out = written(tmp_path / "out" / name, source, index, classes)
        assert np.array_equal(Raster(out, classes).read(), index)
        codes = bands_of(out)[..., 0] if name == "x.tif" else pixels_of(out)
        assert np.array_equal(codes, want)
    with rasterio.open(tmp_path / "out" / "x.tif", "r+") as file:
        assert file.transform == PLACE["transform"] and file.nodata == classes.unused
        names = {f"class_{v}": name for v, name in zip(values, classes.names, strict=True)}
        assert names.items() <= file.tags(1).items()
        if codes.dtype == np.uint8:
            colours = [file.colormap(1)[value][:3] for value in values]
            assert colours == [*classes.colors]
        file.nodata = values[0]
    assert np.array_equal(Raster(tmp_path / "out" / "x.tif", classes).read(), index)


def test_threads_read_arrays_one_after_the_other(tmp_path):
    np.savez(tmp_path / "0.npz", GREY)
    with ThreadPoolExecutor(1) as pool:
        with opening._NUMPY:
            job = pool.submit(opening.open_array, tmp_path / "0.npz", GREY.nbytes * 2)
            with pytest.raises(TimeoutError):
                job.result(0.2)
        assert (job.result() == GREY).all()
