"""Generation at the scale of training: windows, seams, GeoTIFFs, edits, and memory."""

import os

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin
from torch import nn

import common
import mixlc
import pix2pix
from common import IGNORED, Raster, SharedStatistics, blended, tiles
from conftest import TABLE, line_of, picture, same, save, tiny

PLACE = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_800_000, 0.5, 0.5)}


def geotiff(path, pixels, **profile):
    """Writes (H, W, bands) or (H, W) as a GeoTIFF in PLACE."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    about = {"driver": "GTiff", "dtype": bands.dtype, "count": len(bands), **PLACE, **profile}
    with rasterio.open(path, "w", height=bands.shape[1], width=bands.shape[2], **about) as target:
        target.write(bands)
    return path


def painted(image, paint, window, size=16, **options):
    """(C, H, W) float32 bytes through blended, with windows at a scale of window / size."""

    def cut(top, left, height, width):
        part = image[:, top : top + height, left : left + width]
        missing = [(0, height - part.shape[1]), (0, width - part.shape[2])]
        part = np.pad(part, [(0, 0), *missing], "symmetric")
        return np.stack([common.resize(np.ascontiguousarray(p), (size, size)) for p in part])

    strips = list(blended(cut, paint, image.shape[1:], window, **options))
    tops = [top for top, _ in strips]
    assert tops == sorted(tops) and tops[0] == 0
    return torch.cat([strip for _, strip in strips], 1)


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (channels, height, width), np.uint8)


# ------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("window", [1, 5, 16, 64, 143])
@pytest.mark.parametrize("length", [1, 7, 64, 97, 143, 215, 1000])
def test_weights_sum_to_one_and_windows_overlap(length, window):
    places = tiles(length, window)
    total = np.zeros(max(length, window))
    for start, weights in places:
        total[start : start + window] += weights
        assert (weights >= 0).all()
    assert np.allclose(total, 1, atol=1e-6)
    starts = [start for start, _ in places]
    assert starts[0] == 0 and starts[-1] == max(0, length - window)
    if window >= 4:
        assert all(b - a <= window - window // 4 for a, b in zip(starts, starts[1:], strict=False))


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (16, 16), (17, 90), (64, 64), (41, 133)])
def test_windows_equal_the_whole_for_a_pointwise_network(size):
    image = noise(*size)
    whole = painted(image, lambda x: x.float() * 0.5 - 3, 16)
    assert whole.shape == (3, *size)
    assert torch.allclose(whole, torch.from_numpy(image).float() * 0.5 - 3, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (47, 90), (100, 33), (128, 64)])
def test_windows_equal_the_whole_for_a_convolution(size):
    """Two padded convolutions see 2 pixels around; windows of 32 count nothing within 2."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, 1, 1))
    image = noise(*size)
    with torch.no_grad():
        tiled = painted(image, lambda x: net(x.float() / 255), 32, size=32, batch=3)
        whole = net(torch.from_numpy(image)[None].float() / 255)[0]
    assert torch.allclose(tiled, whole, atol=1e-5)


def test_windows_are_resized_to_the_network_and_back():
    smooth = np.array(Image.fromarray(noise(4, 4, 1)[0]).resize((200, 150), 2))[None]
    seen = []

    def paint(windows):
        seen.append(tuple(windows.shape))
        return windows.float()

    back = painted(smooth, paint, 64, size=16)
    assert {shape[1:] for shape in seen} == {(1, 16, 16)}
    assert back.shape == smooth.shape
    assert (back - torch.from_numpy(smooth).float()).abs().mean() < 3


def test_a_window_covers_what_training_covered(pairs, tmp_path, capsys):
    """--patch, or the side of the training images; in the checkpoint, for --generate."""
    main = pix2pix.main
    run = ["--data", str(pairs), "--size", "64", "--width", "2", "--batch-size", "2"]
    run += ["--epochs", "1", "--cache", str(tmp_path / "cache")]
    for patch, window in (("0", 80), ("40", 40)):
        out = tmp_path / patch
        main([*run, "--patch", patch, "--out", str(out)])
        checkpoint = str(out / "checkpoints" / "last.pt")
        assert torch.load(checkpoint, weights_only=True)["window"] == window
    save(tmp_path / "in" / "large.png", picture(np.random.default_rng(0), 100, 130))
    save(tmp_path / "in" / "small.png", picture(np.random.default_rng(0), 60, 50))
    capsys.readouterr()
    use = ["--generate", str(tmp_path / "in"), "--checkpoint", checkpoint]
    main([*use, "--out", str(tmp_path / "a")])
    said = capsys.readouterr().err
    assert "large.png: 130x100: 12 windows of 40, overlapping 10, each at 64x64" in said
    assert "small.png: 50x60: as a whole, at 64x64" in said
    main([*use, "--out", str(tmp_path / "b"), "--window", "100"])
    assert "large.png: 130x100: as a whole" in capsys.readouterr().err
    a, b = (np.asarray(Image.open(tmp_path / k / "large.png")) for k in "ab")
    assert a.shape == b.shape == (100, 130, 3) and (a != b).any()
    assert "--window goes with --generate" in line_of(main, [*run, "--window", "9"], capsys)


def test_classes_are_blended_as_scores_and_then_decided(landcover, tmp_path):
    """One window is not sure of a class, the next one of another: it wins where they overlap."""
    _, cfg = tiny("cyclegan", lc_classes=str(landcover / "classes.json"), generate="x", window=16)
    save(tmp_path / "in" / "x.png", np.zeros((16, 28, 3), np.uint8))
    calls = []

    def paint(windows, whole):
        calls.append(len(windows))
        scores = torch.zeros(len(windows), 3, 16, 16)
        scores[0, 0], scores[0, 1] = 0.51, 0.49
        scores[1, 0], scores[1, 1] = 0.0, 1.0
        return scores

    cfg = common.dataclasses.replace(cfg, generate=str(tmp_path / "in"), out=str(tmp_path / "out"))
    common.translate_files(cfg, paint, to_labels=True)
    index = np.asarray(Image.open(tmp_path / "out" / "x.png"))
    assert calls == [2] and index.shape == (16, 28)
    row = index[8].tolist()
    assert row == sorted(row) and row[0] == 0 and row[-1] == 1
    assert row.index(1) < 14  # not the middle of the overlap, where the weights are equal


# --------------------------------------------------------------------------------------- statistics


def test_shared_statistics_are_the_rasters():
    """With an infinite reach InstanceNorm of windows equals that of the whole."""
    net = nn.InstanceNorm2d(3)
    image = noise(64, 64)
    image[:, :, 32:] //= 4  # another contrast
    paint = lambda x: net(x.float())  # noqa: E731
    shared = SharedStatistics(net, float("inf"))
    with torch.no_grad():
        tiled = painted(image, paint, 16, statistics=shared)
        own = painted(image, paint, 16)
        whole = net(torch.from_numpy(image)[None].float())[0]
    # windows overlap, so that the middle counts twice in the statistics
    assert (tiled - whole).abs().max() < 0.1 < (own - whole).abs().max()
    assert "forward" not in vars(net)


@pytest.mark.parametrize("kind", ["instance", "batch"])
def test_shared_statistics_that_reach_nowhere_are_a_windows_own(kind):
    net = nn.InstanceNorm2d(3) if kind == "instance" else nn.BatchNorm2d(3)
    if kind == "batch":
        nn.init.normal_(net.weight)
        nn.init.normal_(net.bias)
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)

    def paint(windows):  # one by one, as BatchNorm of an image's own statistics needs it
        return torch.cat([net(window[None].float()) for window in windows])

    own, shared, places = paint(x), SharedStatistics(net, 1e-3), [(0.0, 0.0), (0.0, 1.0)]
    for place, tile in zip(places, x, strict=True):
        shared.note(place, paint, tile)
    with shared.around(places):
        assert torch.allclose(paint(x), own, atol=1e-4)
    with shared.around(places):
        assert torch.allclose(net(x.float()), own, atol=1e-4)  # a batch at once
    with shared.around(places[::-1]):
        assert not torch.allclose(paint(x), own, atol=1e-2)


def test_statistics_are_weighted_by_distance():
    net = nn.InstanceNorm2d(1)
    shared = SharedStatistics(net, 1.0)
    for place, level in ((0.0, 10), (1.0, 30)):
        tile = torch.tensor([[[level - 2, level + 2]]], dtype=torch.uint8)
        shared.note((0.0, place), lambda x: net(x.float()), tile)
    near, far = 1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(0.5))
    mean = 10 * near + 30 * far
    deviation = (4 + near * (10 - mean) ** 2 + far * (30 - mean) ** 2) ** 0.5
    with shared.around([(0.0, 0.0)]):
        out = net(torch.full((1, 1, 1, 2), 10.0))
    assert np.isclose(out[0, 0, 0, 0], (10 - mean) / deviation, atol=1e-4)


# ----------------------------------------------------------------------------------------- GeoTIFFs


def test_georeferencing_nodata_and_bigness(tmp_path):
    pixels = np.moveaxis(noise(70, 90), 0, -1).copy()
    pixels[:10] = 7
    source = geotiff(tmp_path / "in" / "x.tif", pixels, nodata=7)
    with Raster(source) as raster, common.writing(tmp_path / "out" / "x.tif", raster) as put:
        for top in range(0, 70, 20):
            put(np.full((min(20, 70 - top), 90, 3), 7, np.uint8), top)
    with rasterio.open(tmp_path / "out" / "x.tif") as out:
        assert (out.height, out.width, out.count) == (70, 90, 3)
        assert out.crs == PLACE["crs"] and out.transform == PLACE["transform"]
        assert out.profile["tiled"] and out.profile["compress"] == "deflate" and out.nodata == 7
        valid = out.dataset_mask() > 0
        assert not valid[:10].any() and valid[10:].all()  # painted 7, 7, 7 is not nothing
        assert (out.read()[:, 10:] == 6).all()


def test_classes_in_a_geotiff_keep_their_colours(tmp_path):
    table = common.ClassTable.load(common.json.dumps(TABLE))
    source = geotiff(tmp_path / "x.tif", np.zeros((20, 30, 3), np.uint8), nodata=None)
    index = np.random.default_rng(0).integers(0, 3, (20, 30), np.uint8)
    with Raster(source) as raster, common.writing(tmp_path / "y.tif", raster, table) as put:
        put(index, 0)
    with rasterio.open(tmp_path / "y.tif") as out:
        assert out.colormap(1)[1][:3] == table.colors[1] and out.nodata == IGNORED
        assert out.transform == PLACE["transform"]
    with Raster(tmp_path / "y.tif", table) as again:
        assert (again.read() == index).all()


def test_label_rasters_are_read_by_windows_as_as_a_whole(tmp_path):
    """Codes, palettes and colours; no data has no class."""
    table = common.ClassTable.load(common.json.dumps(TABLE))
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
    geotiff(tmp_path / "deep.tif", np.ones((8, 8, 3), kind))
    with pytest.raises(common.UserError, match="gdal_translate -ot Byte -scale LOW HIGH 0 255"):
        Raster(tmp_path / "deep.tif")


def test_whole_rasters_through_the_command_line(tmp_path, pairs):
    """A GeoTIFF in, a GeoTIFF out, windows in between; --quick nets of both norms."""
    image = np.moveaxis(noise(150, 210), 0, -1)
    source = geotiff(tmp_path / "in" / "x.tif", image)
    for norm in ("batch", "instance"):
        run = ["--data", str(pairs), "--size", "64", "--width", "2", "--norm", norm]
        run += ["--epochs", "1", "--patch", "64", "--out", str(tmp_path / norm)]
        pix2pix.main([*run, "--cache", str(tmp_path / "cache"), "--batch-size", "1"])
        checkpoint = str(tmp_path / norm / "checkpoints" / "last.pt")
        pix2pix.main(["--generate", str(source), "--checkpoint", checkpoint])
        with rasterio.open(tmp_path / norm / "generated" / "x.tif") as out:
            assert out.shape == (150, 210) and out.transform == PLACE["transform"]
            assert out.read().std() > 0


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
        with common.writing(tmp_path / "out" / name, raster) as put:
            put(np.ones((32, 64, 3), np.uint8), 0)
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "out" / name).exists()
    out, raster = tmp_path / "out2" / name, Raster(tmp_path / "in.tif")
    with pytest.raises(ValueError, match="painting"), common.writing(out, raster):
        raise ValueError("painting failed")
    assert list((tmp_path / "out2").iterdir()) == []


# ----------------------------------------------------------------------------------------- training


def test_training_reads_rasters_strip_by_strip(tmp_path, monkeypatch):
    """The same store as from a PNG, and never more in memory than a row of patches."""
    rng = np.random.default_rng(0)
    image, index = picture(rng, 130, 200), rng.integers(0, 3, (130, 200), np.uint8)
    for suffix, write in ((".tif", geotiff), (".png", save)):
        for split in ("train", "val"):
            write(tmp_path / suffix / split / "rgb" / f"x{suffix}", image)
            write(tmp_path / suffix / split / "lc" / f"x{suffix}", index)
        (tmp_path / suffix / "classes.json").write_text(common.json.dumps(TABLE))
    stores, honest, rows = [], Raster.read, []

    def read(self, *window, **more):
        pixels = honest(self, *window, **more)
        rows.append(len(pixels))
        return pixels

    monkeypatch.setattr(Raster, "read", read)
    for suffix in (".tif", ".png"):
        _, cfg = tiny("mixlc", data=str(tmp_path / suffix), patch=60, lc_classes="")
        cfg = common.dataclasses.replace(cfg, cache=str(tmp_path / "cache"))
        stores.append(common.ImageStore(cfg, "train", 64))
    assert stores[0].records.shape == (6, 4, 64, 64) and max(rows) == 60
    assert (stores[0].records == stores[1].records).all()
    assert stores[0].window() == 60


# -------------------------------------------------------------------------------------------- edits


class Painter:
    """Stands in for a generator of edits: paints grey, and notes what it was given."""

    def __init__(self):
        self.windows = []

    def __call__(self, windows, sample):
        self.windows += list(windows)
        return torch.full((len(windows), 3, *windows.shape[2:]), 0.1 * sample)


def edit(tmp_path, shape=(300, 400), suffix=".png", write=save, **options):
    """(cfg, photograph) for an edit of land that becomes water."""
    photo = picture(np.random.default_rng(0), *shape)
    write(tmp_path / f"photo{suffix}", photo)
    write(tmp_path / "labels" / f"lc{suffix}", np.zeros(shape, np.uint8))
    options = {"generate": str(tmp_path / f"photo{suffix}"), "window": 64} | options
    options |= {"lc": str(tmp_path / "labels" / f"lc{suffix}"), "out": str(tmp_path / "out")}
    return tiny("mixlc", **options)[1], photo


@pytest.mark.parametrize(("suffix", "write"), [(".png", save), (".tif", geotiff)])
def test_an_edit_changes_the_photograph_around_it_alone(tmp_path, suffix, write):
    strokes = "water:100,50,20,20", "road:300,200,90,30"
    cfg, photo = edit(tmp_path, suffix=suffix, write=write, paint=strokes)
    painter = Painter()
    common.edit_file(cfg, painter)
    with Raster(tmp_path / "out" / f"photo{suffix}") as raster:
        edited = raster.read()
    near, border = np.zeros((300, 400), bool), 3  # 12 at 256
    near[50 - border : 70 + border, 100 - border : 120 + border] = True
    near[200 - border : 230 + border, 300 - border : 390 + border] = True
    assert (edited[~near] == photo[~near]).all()
    assert (edited[55:65, 105:115] == 140).all() and (edited[205:225, 310:380] == 140).all()
    assert len(painter.windows) == 1 + 3  # the lake has its own
    lake = next(window for window in painter.windows if 1 in window[3])
    rows, columns = torch.where(lake[4] > 0)
    assert abs((rows.min() + rows.max()) / 2 - 31.5) <= 2  # in the middle, as in training
    assert abs((columns.min() + columns.max()) / 2 - 31.5) <= 2
    assert lake[4].sum() == 400 and (lake[3][lake[4] > 0] == 1).all()
    assert (tmp_path / "out" / "photo_sheet.png").is_file()
    if suffix == ".tif":
        with rasterio.open(tmp_path / "out" / "photo.tif") as out:
            assert out.transform == PLACE["transform"]


def test_edits_close_together_are_painted_as_one(tmp_path):
    strokes = "water:100,50,20,20", "road:130,80,20,20", "road:10,250,5,5"
    cfg, _ = edit(tmp_path, paint=strokes)
    regions = common.EditFiles(cfg).regions(64)
    assert len(regions) == 2
    for (top, left, height, width), other in (regions, regions[::-1]):
        assert height >= 64 and width >= 64 and top >= 0 and left >= 0
        assert top + height <= 300 and left + width <= 400
        assert not common._touch((top, left, height, width), other)


@pytest.mark.parametrize("seed", range(5))
def test_regions_hold_every_change_and_do_not_touch(tmp_path, seed):
    rng = np.random.default_rng(seed)
    strokes = []
    for _ in range(rng.integers(1, 9)):
        x, y, width, height = rng.integers((0, 0, 1, 1), (390, 290, 120, 60))
        strokes.append(f"water:{x},{y},{width},{height}")
    cfg, photo = edit(tmp_path, paint=tuple(strokes))
    files = common.EditFiles(cfg)
    regions, left = files.regions(64), files.changed(0, 0, 300, 400)
    assert left.any()
    for k, (y, x, height, width) in enumerate(regions):
        left[y : y + height, x : x + width] = False
        assert not any(common._touch(regions[k], other) for other in regions[:k])
    assert not left.any()


def test_an_edit_of_everything_and_one_of_nothing(tmp_path, capsys):
    cfg, photo = edit(tmp_path, paint=("water:0,0,400,300",))
    common.edit_file(cfg, Painter())
    assert (np.asarray(Image.open(tmp_path / "out" / "photo.png"))[20:-20, 20:-20] == 140).all()
    cfg, photo = edit(tmp_path, paint=("land:0,0,400,300",))
    cfg = common.dataclasses.replace(cfg, out=str(tmp_path / "none"))
    painter = Painter()
    common.edit_file(cfg, painter)
    assert "nothing changes" in capsys.readouterr().err and not painter.windows
    assert (np.asarray(Image.open(tmp_path / "none" / "photo.png")) == photo).all()


def test_land_cover_before_and_after_as_files(tmp_path):
    after = np.zeros((300, 400), np.uint8)
    after[100:120, 200:220] = 1
    save(tmp_path / "labels" / "after.png", after)
    cfg, photo = edit(tmp_path)
    cfg = common.dataclasses.replace(
        cfg, lc=str(tmp_path / "labels" / "after.png"), lc_before=cfg.lc
    )
    painter = Painter()
    common.edit_file(cfg, painter, samples=2)
    assert len(painter.windows) == 2
    first, second = (np.asarray(Image.open(tmp_path / "out" / f"photo_{k}.png")) for k in (1, 2))
    assert (first != second).any(-1)[105:115, 205:215].all()
    assert (first == second)[:90].all()


def test_a_small_photograph_is_edited_as_a_whole(tmp_path, capsys):
    cfg, photo = edit(tmp_path, shape=(90, 70), paint=("water:20,30,10,10",))
    painter = Painter()
    common.edit_file(cfg, painter)
    assert "as a whole" in capsys.readouterr().err
    assert len(painter.windows) == 1 and painter.windows[0].shape == (5, 64, 64)
    assert painter.windows[0][4].sum() < 200


def test_edits_of_a_trained_model_at_its_own_scale(landcover, tmp_path):
    """The photograph's resolution stays: what is painted spans its window, not the whole."""
    run = ["--data", str(landcover), "--size", "64", "--width", "2", "--batch-size", "2"]
    run += ["--patch", "64", "--epochs", "1", "--out", str(tmp_path / "run")]
    mixlc.main([*run, "--cache", str(tmp_path / "cache")])
    photo = picture(np.random.default_rng(0), 200, 260)
    save(tmp_path / "photo.png", photo)
    save(tmp_path / "lc" / "photo.png", np.zeros((200, 260), np.uint8))
    call = ["--generate", str(tmp_path / "photo.png"), "--lc", str(tmp_path / "lc" / "photo.png")]
    call += ["--paint", "water:100,100,12,12"]
    mixlc.main([*call, "--checkpoint", str(tmp_path / "run" / "checkpoints" / "last.pt")])
    edited = np.asarray(Image.open(tmp_path / "run" / "generated" / "photo.png"))
    changed = (edited != photo).any(-1)
    assert changed[100:112, 100:112].mean() > 0.9 and not changed[:90].any()
    assert changed.sum() < 22 * 22


def test_the_noise_of_a_sample_is_one_for_all_windows(tmp_path):
    module, cfg = tiny("mixlc_acgan", erase=True)
    state = module.build(cfg, torch.device("cpu"), training=False)
    seen, honest = [], common.edit_file
    common.edit_file = lambda cfg, paint, net, samples: seen.append(paint)
    try:
        module.generate(state, cfg, torch.device("cpu"))
    finally:
        common.edit_file = honest
    window = torch.randint(0, 3, (1, 5, 64, 64), dtype=torch.uint8)
    both = seen[0](torch.cat([window, window]), sample=1)
    assert same(both[0], both[1]) and not same(seen[0](window, sample=2)[0], both[0])
