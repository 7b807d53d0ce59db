"""Pictures of more than 8 bits: limits, stores, results in the units of the files."""

import importlib
import json
import shutil
import types

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

import common
import pix2pix
import support.limits
import support.serve
from files import CLASSES, PLACE, TABLE, bands_of, geotiff, has_data, noise, save
from pages import in_colours, opened, page_shows, studio_of
from runs import last, line_of, refused, rows_of, stop_after, tiny_run, use
from support import errors
from support.demo import landscape
from support.device import in_bf16
from support.generate import needs_tiff
from support.limits import Limits, print_doubts
from support.options import flag
from support.pictures import eight_bits
from support.rasters import Raster
from support.windows import read_filled
from tensors import CPU, calls_of, open_data, tiny


def world(root, count=56, side=64):
    """Six bands of reflectances as uint16, 0 without data, and heights in metres with NaN.

    Near infrared follows vegetation, and heights follow from what lies there.
    """
    for k in range(count):
        rng, split = np.random.default_rng(k), "train" if k < count * 6 // 7 else "val"
        rgb, _, ground = landscape(rng, side)
        infrared = np.array([3900, 3000, 4500, 300, 1800, 1400])[ground]
        infrared = infrared + rng.normal(0, 60, (side, side))
        a = np.dstack([rgb * 14.3 + 60, infrared, 5000 - infrared, infrared / 2 + 400])
        b = np.array([412.5, 405, 431, 390, 420, 408])[ground] + np.arange(side) / 100
        if k % 4 == 0:  # also in one of the validation images
            a[:9, :9], b[-9:, :9] = 0, np.nan
        geotiff(root / split / "A" / f"{k}.tif", a.round().astype(np.uint16), nodata=0)
        geotiff(root / split / "B" / f"{k}.tif", b.astype(np.float32))
    return root


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return world(tmp_path_factory.mktemp("deep"), count=9)


def started(root, tmp_path, **options):
    """The Config of a run of pix2pix that has begun, with its limits."""
    if not (root / "val").exists():
        shutil.copytree(root / "train", root / "val")
    line = f"--data {root} --out {tmp_path}/run --cache {tmp_path} --size 64 --direction AtoB"
    words = line.split()
    for name, value in options.items():
        words += [flag(name), value]
    return common.begin(pix2pix.Config, pix2pix.__doc__, {}, words)[0]


def test_limits_are_percentiles_of_the_training_images_for_each_band(deep, tmp_path):
    cfg = started(deep, tmp_path, bands_A="4,1")
    pixels = [bands_of(path, (4, 1)) for path in (deep / "train" / "A").iterdir()]
    known = np.concatenate([image[image[..., 0] > 0] for image in pixels])
    limits = Limits.of(cfg, "A")
    assert limits.dtype == "uint16"
    assert np.allclose([limits.low, limits.high], np.percentile(known, [2, 98], 0), rtol=0.05)
    heights = Limits.of(cfg, "B")
    assert heights.dtype == "float32"
    assert np.allclose([heights.low[0], heights.high[0]], [390, 431], atol=2)
    assert cfg.channels("B") == 1  # a band of heights is no grey picture


RAMP = np.add.outer(np.arange(700.0), np.arange(900.0))
FINE = 4000.25 + np.random.default_rng(0).integers(0, 256, (64, 64)) / 1000


@pytest.mark.parametrize(
    ("values", "near"),
    [(RAMP, 0.15 * np.ptp(RAMP)), (FINE, 1e-3)],
    ids=["come from all parts of an image", "have the digits of their values"],
)
def test_limits(tmp_path, values, near):
    for side in "AB":
        geotiff(tmp_path / "data" / "train" / side / "x.tif", values.astype(np.float32))
    limits = Limits.of(started(tmp_path / "data", tmp_path), "A")
    found = [limits.low[0], limits.high[0]]
    assert np.allclose(found, np.percentile(values, [2, 98]), rtol=0, atol=near)


def halves(root):
    """Pairs of a dark left and a bright right half, which is the left one and 9000."""
    for split in ("train", "val"):
        for k in range(2):
            left = noise(64, 64).astype(np.uint16) * 4 + 100
            geotiff(root / split / f"{k}.tif", np.concatenate([left, left + 9000], 1))
    return root


def test_halves_have_limits_of_their_own_and_copies_have_the_values_of_the_input(tmp_path, capsys):
    root = halves(tmp_path / "data")
    cfg = started(root, tmp_path)
    a, b = (Limits.of(cfg, side) for side in "AB")
    assert np.allclose(a.ranges, b.ranges) and np.allclose(np.subtract(b.low, a.low), 9000)
    said = capsys.readouterr().err
    assert a.low[0] < 150 and f"--limits-A={cfg.limits_A.split()[0]}: the 2nd" in said
    about = {name: getattr(cfg, name) for name in ("limits_A", "limits_B")}
    about["limits_B"] = f"{b.low[0]},{b.low[0] + 4 * b.ranges[0]} uint16"
    grey = {"grey": torch.zeros(3)}
    ways = [("pix2pix", grey, "AtoB"), ("pix2pix", grey, "BtoA")]
    for script, constants, way in [*ways, ("cyclegan", {"A": grey, "B": grey}, "AtoB")]:
        val = open_data(script, root, tmp_path, "val", **about, direction=way)
        module = importlib.import_module(script)
        state = module.build(val.cfg, CPU)
        rows = module.evaluate(state, val, val.cfg, np.arange(2), constants).table()
        copies = [row["rmse_units"] for name, row in rows.items() if "copy of the input" in name]
        assert copies == pytest.approx([9000] * len(copies), abs=100)  # outside the limits


def test_copies_of_another_type_are_as_they_are_seen():
    store, images = object.__new__(common.ImageStore), torch.zeros(1, 1, 2, 2)
    limits = Limits((0,), (9,), "uint16"), Limits((0,), (5,), "float32"), None
    for other in limits[1:]:
        store.limits = {"A": limits[0], "B": other}
        assert store.copied(images, "A", "B") is images


@pytest.mark.parametrize(
    ("typed", "found"), [("0, 5000 uint16", "0,5000 uint16"), (" 0,5", "0,5 uint16")]
)
def test_limits_can_be_typed_as_a_run_shows_them(tmp_path, typed, found):
    root = halves(tmp_path / "data")
    cfg = started(root, tmp_path, limits_A=typed, limits_B="1,2")
    assert (cfg.limits_A, cfg.limits_B) == (found, "1,2 uint16")
    with refused("--limits-A 0,5000nonsense: write LOW,HIGH"):
        started(root, tmp_path / "other", limits_A="0,5000 nonsense")


def test_files_of_one_side_have_one_type(tmp_path):
    """Otherwise results, which have the first one's, could not hold the values of others."""
    root = halves(tmp_path / "data")
    geotiff(root / "train" / "1.tif", np.full((64, 128, 3), 9, np.int16))
    with refused("1.tif: has int16 values, and .*0.tif uint16: convert them to one type"):
        started(root, tmp_path)


def test_training_images_in_other_units_are_reported(tmp_path, capsys):
    """Reflectance from 0 to 1 among reflectance from 0 to 10000 would be one colour.

    An image of little contrast is no mistake.
    """
    for k, scale in enumerate((1.0, 1.0, 1e-4, 0.03)):
        values = noise(64, 64) * 40 * scale
        for side in "AB":
            geotiff(tmp_path / "data" / "train" / side / f"{k}.tif", values.astype(np.float32))
    started(tmp_path / "data", tmp_path)
    said = capsys.readouterr().err
    assert "1 of 4 images, such as " in said and "A/2.tif, fill less than 1% of the values" in said
    for limits, wrong in (("1e8,1e9", True), ("0,9999", False)):
        errors.print_new.cache_clear()
        shutil.rmtree(tmp_path / "run")
        cfg = started(tmp_path / "data", tmp_path, limits_A=limits)
        common.ImageStore(cfg, "train", 64)
        about = "split train: A: fill less than 1% of --limits-A: other units?"
        assert (about in capsys.readouterr().err) == wrong


def test_limits_of_8_bits_on_one_side_alone(pairs, tmp_path):
    cfg = started(pairs, tmp_path, limits_B="0,100")
    assert (cfg.limits_A, cfg.limits_B) == ("0,255 uint8", "0,100 uint8")


@pytest.mark.parametrize(("dtype", "reported"), [("uint16", True), ("uint8", False)])
def test_a_split_in_other_units_is_reported_where_it_has_data(capsys, dtype, reported):
    """B is flat at the left, and has no data at the right; a flat map of 8 bits is a map."""
    store = object.__new__(common.ImageStore)
    rows = np.random.default_rng(0).integers(-(2**15), 2**15, (4, 4, 64, 64), np.int16)
    rows[:, 1, :, :32], rows[:, 2:] = 7, 255
    rows[:, 3, :, 32:] = 0
    store.rows, store.slots = {"A": rows, "B": rows}, {"A": (0, 1, 2), "B": (1, 2, 3)}
    store.limits = {side: Limits((0,), (9,), dtype) for side in "AB"}
    store.classes, store.split = None, types.SimpleNamespace(root="root", name="val")
    store._print_other_units()
    line = "root, split val: B: fill less than 1% of --limits-B: other units?\n"
    assert capsys.readouterr().err == line * reported


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("flat", ["the middle", "all but the middle"])
def test_the_middle_of_a_raster_shows_its_units(tmp_path, capsys, flat, high):
    values = np.random.default_rng(0).integers(0, 9999, (100, 2000)).astype(np.uint16)
    middle = (np.arange(2000) >= 744) & (np.arange(2000) < 1256)
    values[:, middle == (flat == "the middle")] = 5
    values[:50] = 0  # no data
    geotiff(tmp_path / "x.tif", values.T if high else values, nodata=0)
    with Raster(tmp_path / "x.tif", bands=(1,), limits=Limits((0,), (9999,), "uint16")) as raster:
        print_doubts(raster)
    assert ("other units?" in capsys.readouterr().err) == (flat == "the middle")


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_label_maps_of_other_classes_are_reported_where_they_have_data(tmp_path, capsys, share):
    index = np.ones((100, 20), np.uint8)
    index[: int(share * 50)], index[50:] = 3, 9  # an ignored class, and no data
    with Raster(geotiff(tmp_path / "x.tif", index, nodata=9), CLASSES) as raster:
        print_doubts(raster)
    said = capsys.readouterr().err
    assert ("x.tif: most of its pixels have no class of the model" in said) == (share > 0.5)


def test_the_store_keeps_sixteen_bits_and_holes(deep, tmp_path):
    cfg = started(deep, tmp_path, bands_A="4", limits_A="200,4800", limits_B="380,440")
    store = common.ImageStore(cfg, "train", 64)
    rows = torch.from_numpy(store.records[:2])
    for side, low, high in (("A", 200, 4800), ("B", 380, 440)):
        path = deep / "train" / side / "0.tif"
        band = bands_of(path)[..., 3 if side == "A" else 0].astype(np.float64)
        expected = (2 * (band - low) / (high - low) - 1).clip(-1, 1)
        image = store.images(side, rows)[0, 0].numpy()
        holes = (band == 0) | np.isnan(band)
        assert holes.sum() == 81 and (np.isnan(image) == holes).all()
        assert abs(image - expected)[~holes].max() < 1.1 / 65535
    steps = len(np.unique(store.records[:, 0]))
    assert steps > 256  # finer than 8 bits


def test_eight_bits_beside_sixteen_are_as_ever(deep, tmp_path):
    root = tmp_path / "mixed"
    for split in ("train", "val"):
        for path in (deep / split / "B").iterdir():
            save(root / split / "A" / f"{path.stem}.png", noise(64, 64))
            geotiff(root / split / "B" / path.name, bands_of(path))
    store = common.ImageStore(started(root, tmp_path), "train", 64)
    pixels = np.asarray(Image.open(root / "train" / "A" / "0.png"))
    image = store.images("A", torch.from_numpy(store.records[:1]))[0]
    plain = common.from_bytes(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])[0]
    assert torch.allclose(image, plain, atol=1e-6)
    counts = np.bincount(pixels[..., 0].ravel(), minlength=256)
    assert (store.histograms()["A"][0].numpy() >= counts).all()  # of one image among several


def test_values_come_back_in_their_type_and_units():
    assert Limits.of(pix2pix.Config(limits_A="0,9"), "A").dtype == "float32"  # without a file's
    limits = Limits((0.0, -50.0), (65535.0, 50.0), "int16")
    values = np.array([[[0, -50], [32767, 50], [12345, 7]]], np.int16)
    levels = limits.to_levels(values)
    image = common.from_bytes(torch.from_numpy(levels).permute(2, 0, 1)[None])[0]
    assert (limits.to_values(image) == values).all()
    assert limits.to_values(torch.full((2, 1, 1), 1.5)).tolist() == [[[32767, 50]]]
    assert limits.to_levels(np.array([[[-9, 99]]])).tolist() == [[[-32768, 32767]]]


def test_a_run_resumes_and_is_used_with_its_limits(deep, tmp_path, monkeypatch, capsys):
    """The result of the whole has B's type, units and place, and no data where A has none."""
    out = tmp_path / "run"
    more = "--epochs 2 --direction AtoB --bands-A 1,2,3,4,5,6 --limits-A 0,5000"
    stop_after(1, pix2pix.main, tiny_run("pix2pix", deep, out, more), monkeypatch)
    pix2pix.main(["--resume", "--out", str(out), "--limits-A", "0,5000", "--epochs", "2"])
    pix2pix.main(["--resume", "--out", str(out), "--limits-A", "0, 5000 uint16"])
    assert last(out)["config"]["limits_A"] == "0,5000 uint16"
    error, row = rows_of(out)["model"]["rmse_units"], rows_of(out)["model"]
    limits = Limits.of(pix2pix.Config(**last(out)["config"]), "B")
    assert np.isclose(error, row["rmse"] / 255 * limits.ranges[0], rtol=0.02)
    capsys.readouterr()
    pix2pix.main(use(out, f"--generate {deep}/val/A", f"--out {tmp_path}/new"))
    assert "other units?" not in capsys.readouterr().err
    for path in (deep / "val" / "A").iterdir():
        result, source = tmp_path / "new" / path.name, bands_of(path)
        known = source[..., 0] > 0
        assert (has_data(result) == known).all()
        assert rasterio.open(result).transform == PLACE["transform"]
        heights = bands_of(result)[known]
        assert heights.dtype == np.float32 and heights.shape[1:] == (1,)
        assert limits.low[0] <= heights.min() < heights.max() <= limits.high[0]
    for name, scale in (("shares", 1e-4), ("negative", -1e-4)):
        geotiff(tmp_path / f"{name}.tif", source * scale)
        pix2pix.main(use(out, f"--generate {tmp_path}/{name}.tif", f"--out {tmp_path}/new"))
        assert f"{name}.tif: its values fill less than 1%" in capsys.readouterr().err
    for wrong in ("0,3000", "0,500"):
        line = line_of(pix2pix.main, use(out, "--evaluate", f"--limits-A {wrong}"), capsys)
        assert f"--limits-A {wrong} contradicts" in line


def test_a_photograph_without_a_place_gives_a_tiff_of_heights(deep, tmp_path, monkeypatch):
    """Of a label map, too, also on the page; a PNG of 16 bits is read as such."""
    root = tmp_path / "data"
    for split in ("train", "val"):
        for path in (deep / split / "B").iterdir():
            heights = np.nan_to_num(bands_of(path)[..., 0], nan=400)
            save(root / split / "rgb" / f"{path.stem}.png", heights.astype(np.uint16) * 100)
            save(root / split / "lc" / f"{path.stem}.png", (heights // 20 % 3).astype(np.uint8))
    (root / "classes.json").write_text(json.dumps(TABLE))
    pix2pix.main(tiny_run("pix2pix", root, tmp_path / "run", "--epochs 1"))
    config = last(tmp_path / "run")["config"]
    assert config["limits_A"].endswith("uint16") and config["bands_A"] == "1"
    labels = next((root / "val" / "lc").iterdir())
    pix2pix.main(use(tmp_path / "run", f"--generate {labels}", f"--out {tmp_path}/new"))
    new = bands_of(tmp_path / "new" / f"{labels.stem}.tif")
    assert new.dtype == np.uint16 and new.shape[-1] == 1
    assert 38_000 < new.min() <= new.max() < 44_000
    limits, row = Limits.of(pix2pix.Config(**config), "A"), rows_of(tmp_path / "run")["model"]
    assert np.isclose(row["rmse_units"], row["rmse"] / 255 * limits.ranges[0], rtol=0.02)
    studio = studio_of(pix2pix.main, tmp_path / "run", monkeypatch)
    result = in_colours(tmp_path / "new" / f"{labels.stem}.tif", limits)
    assert (page_shows(studio, [labels]) == result).all()
    given, photo = studio.examples[0]
    assert given.pixels.dtype == np.uint8 and photo.pixels.dtype == np.uint16
    assert 38_000 < photo.pixels.min() < photo.pixels.max() < 44_000


def test_an_edit_of_a_deep_photograph(tmp_path, monkeypatch, capsys):
    """By windows; what is painted lies within the limits, in a dark photograph, too."""
    values, side = np.random.default_rng(0).integers(0, 5000, (128, 128, 6), np.uint16), (128, 128)
    about = {"scales": [k / 10 for k in range(1, 7)], "offsets": range(6)}
    about |= {"descriptions": "ABCDEF", "units": ["m"] * 6}
    photo = geotiff(tmp_path / "photo.tif", values, about=about)
    dark = geotiff(tmp_path / "dark.tif", np.full((*side, 6), 9, np.uint16))
    labels = geotiff(tmp_path / "lc.tif", np.zeros(side, np.uint8))
    options = {"bands_A": "4,3,2,1,5,6", "limits_A": "300,3000 uint16", "data": "removed"}
    options |= {"lc": str(labels), "paint": ("water:0,0,20,20",), "out": str(tmp_path / "new")}

    def edit(path, **more):
        cfg = tiny("mixlc", window=64, generate=(str(path),), **options, **more)[1]
        common.edit_file(
            cfg, lambda windows, variant: torch.rand(len(windows), 6, 64, 64) * 3 - 1.5
        )

    for path in (photo, dark):
        edit(path)
        assert ("dark.tif: its values fill" in capsys.readouterr().err) == (path is dark)
        new, old = bands_of(tmp_path / "new" / path.name), bands_of(path, (4, 3, 2, 1, 5, 6))
        assert new.dtype == np.uint16 and (new[30:, 30:] == old[30:, 30:]).all()
        inside = new[:10, :10]
        assert (inside >= 300).all() and (inside <= 3000).all()
        assert (inside != old[:10, :10]).mean() > 0.9
    with rasterio.open(tmp_path / "new" / photo.name) as file:
        assert file.scales == (0.4, 0.3, 0.2, 0.1, 0.5, 0.6) and file.offsets == (3, 2, 1, 0, 4, 5)
        assert "".join(file.descriptions) == "DCBAEF" and file.units == ("m",) * 6
    served = calls_of(monkeypatch, support.serve, "serve", lambda studio: None)
    edit(photo, serve=True)
    (remark,) = opened(served[0][0], [labels, dark])["remarks"]
    assert remark.startswith("dark.tif: its values fill")
    for dtype in (np.uint8, np.int16):  # outside the edit their values would not stay
        geotiff(dark, np.full((*side, 6), 9, dtype))
        with refused(f"has {np.dtype(dtype)} values"):
            edit(dark, overwrite=True)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(("count", "bands"), [(1, "1"), (2, "1,2"), (3, ""), (4, "")])
def test_all_of_one_or_two_bands_are_read(count, bands, dtype, tmp_path, monkeypatch):
    """Each file is opened once, and with 16 bits once more for its percentiles."""
    opened = calls_of(monkeypatch, support.limits, "Raster")
    for split in ("train", "val"):
        geotiff(tmp_path / split / "A" / "0.tif", np.ones((64, 64, count), dtype))
        save(tmp_path / split / "B" / "0.png", np.ones((64, 64, 3), np.uint8))
    assert started(tmp_path, tmp_path).bands_A == bands
    assert len(opened) == (2 if dtype == "uint8" else 3)


def test_grey_pictures_have_one_channel_unless_some_have_colours(tmp_path, capsys):
    grey, run = np.tile(np.arange(64, dtype=np.uint8), (64, 1)), tmp_path / "run"
    for name in ("train/A/0", "train/B/0", "train/A/1", "train/B/1", "val/A/0", "val/B/0"):
        save(tmp_path / f"{name}.png", grey)
    main = pix2pix.main
    main(tiny_run("pix2pix", tmp_path, run, "--epochs 1"))
    assert "are read" not in capsys.readouterr().err
    colours = np.stack([grey, 255 - grey, grey], -1)
    save(tmp_path / "train" / "A" / "1.png", colours)
    assert started(tmp_path, tmp_path / "mixed").bands_A == ""
    main(use(run, f"--generate {tmp_path}/train/A/1.png", f"--out {tmp_path}/new"))
    assert "have 3 bands; these are read: [1]" in capsys.readouterr().err
    assert Image.open(tmp_path / "new" / "1.png").mode == "L"


@pytest.mark.parametrize(("nothing", "missing"), [(-9999, (1, 3)), (0, (3,))])
def test_no_data_in_one_of_the_bands_read(nothing, missing, tmp_path):
    """Is a hole, unless it is 0, which must be in both: a third band is not read."""
    pixels = np.full((4, 4, 3), 500, np.int16)
    pixels[0, 1, :1] = pixels[0, 2, 2] = pixels[0, 3, :2] = nothing
    path = geotiff(tmp_path / "x.tif", pixels, nodata=nothing)
    with Raster(path, bands=(1, 2), limits=Limits((0.0,), (1000.0,), "int16")) as raster:
        assert np.argwhere(~raster.valid(0, 0, 4, 4)).tolist() == [[0, k] for k in missing]


@pytest.mark.parametrize(("limits", "middle"), [(None, 127), (Limits((0.0,), (9.0,), "int16"), 0)])
def test_a_window_without_data_is_grey(limits, middle, tmp_path):
    nothing = np.full((8, 8, 1), 255, limits.dtype if limits else "uint8")
    path = geotiff(tmp_path / "x.tif", nothing, nodata=255)
    with Raster(path, bands=(1,), limits=limits) as raster:
        assert (read_filled(raster, 0, 0, 8, 8) == middle).all()


def test_pictures_of_one_or_three_bands_of_eight_bits_need_no_tiff():
    for bands, limits, wanted in (("1", "", 0), ("1,2", "", 1), ("", "", 0), ("1", "0,9 int16", 1)):
        assert needs_tiff(pix2pix.Config(bands_A=bands, limits_A=limits), "A") == wanted


def test_only_pictures_of_eight_bits_are_computed_in_bf16_by_default(monkeypatch):
    cuda = torch.device("cuda")
    assert not in_bf16(pix2pix.Config(), cuda)  # which emulates it, or is not there
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation
    )
    for limits, precision, wanted in (("", "auto", 1), ("0,9 int16", "auto", 0), ("", "fp32", 0)):
        cfg = pix2pix.Config(limits_A=limits, precision=precision)
        assert in_bf16(cfg, cuda) == wanted and not in_bf16(cfg, torch.device("cpu"))
    assert in_bf16(pix2pix.Config(limits_B="0,9 int16", precision="bf16"), torch.device("cpu"))
    assert not in_bf16(pix2pix.Config(limits_B="0,9 int16"), cuda)


def test_levels_are_shown_in_eight_bits():
    levels = np.array([-32768, -32513, -32512, 0, 32511, 32512, 32767], np.int16)
    assert eight_bits(levels).tolist() == [0, 0, 1, 128, 254, 255, 255]


@pytest.mark.slow
def test_a_deep_landscape_is_learnt(tmp_path):
    """Six bands to heights."""
    root, out = world(tmp_path / "data"), tmp_path / "run"
    line = tiny_run("pix2pix", root, out, "--direction AtoB --epochs 5 --bands-A 1,2,3,4,5,6")
    pix2pix.main([*line, "--width", "8", "--batch-size", "4", "--lr", "2e-3"])
    rows = rows_of(out)
    for measure in ("rmse", "rmse_units"):
        others = min(row[measure] for name, row in rows.items() if name != "model")
        assert rows["model"][measure] < 0.9 * others
    pix2pix.main(use(out, f"--generate {root}/val/A", f"--out {tmp_path}/new"))
    for path in (root / "val" / "A").iterdir():
        new, real = bands_of(tmp_path / "new" / path.name), bands_of(root / "val" / "B" / path.name)
        known = has_data(tmp_path / "new" / path.name)[..., None] & (real > 0)
        assert known.mean() > 0.9
        assert abs(new[known].mean() / real[known].mean() - 1) < 0.05


def test_one_flat_band_is_no_other_unit():
    values = np.random.default_rng(0).uniform(0, 9999, (500, 2))
    values[:, 1] = 5
    limits = Limits((0.0,) * 2, (9999.0,) * 2, "uint16")
    assert not support.limits.nearly_flat(limits.to_levels(values))
