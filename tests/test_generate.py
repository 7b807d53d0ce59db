"""Generation at the scale of training: windows, seams, shared statistics, edits."""

import dataclasses
import importlib
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from rasterio.transform import from_origin
from torch import nn

import common
import cyclegan
import pix2pix
import support.edits
import support.generate
from files import (
    CLASSES,
    LABELS,
    bands_of,
    geotiff,
    has_data,
    noise,
    picture,
    pictures_in,
    pixels_of,
    save,
)
from runs import last, refused, stop_after, tiny_run, use
from support.edits import PhotoEdit
from support.generate import _view, edit_of_files, inputs_of, print_windows, results_of
from support.pictures import paste, resize
from support.rasters import Raster
from support.store import cache_folder
from support.windows import SharedStatistics, Windows, overlap, read_filled, sides_of, tiles
from tensors import CPU, calls_of, same, tiny


def generated(image, paint, window, size=16, **options):
    """(C, H, W) float32 bytes through blended, with windows at a scale of window / size."""

    def cut(top, left, height, width):
        part = image[:, top : top + height, left : left + width]
        missing = [(0, height - part.shape[1]), (0, width - part.shape[2])]
        part = np.pad(part, [(0, 0), *missing], "symmetric")
        return np.stack([resize(np.ascontiguousarray(p), (size, size)) for p in part])

    strips = list(Windows(cut, paint, image.shape[1:], (window, window), **options).blended())
    tops = [top for top, _ in strips]
    assert tops == sorted(tops) and tops[0] == 0
    return torch.cat([strip for _, strip in strips], 1)


class Painter:
    """Stands in for a generator: paints grey, and notes what it was given."""

    def __init__(self):
        self.windows = []

    def __call__(self, windows, variant=1, whole=False):
        self.windows += list(windows)
        return torch.full((len(windows), 3, *windows.shape[2:]), 0.1 * variant)


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


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (47, 90), (100, 33), (128, 64), (32, 260)])
def test_windows_equal_the_whole_for_a_convolution(size):
    """Two padded convolutions see 2 pixels around; windows of 32 count nothing within 2."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, 1, 1))
    image = noise(*size).transpose(2, 0, 1)
    tiled = generated(image, lambda x: net(x.float() / 255), 32, size=32)
    whole = net(torch.from_numpy(image)[None].float() / 255)[0]
    assert torch.allclose(tiled, whole, atol=1e-5)


def test_smaller_windows_are_averaged():
    grains = torch.randn(1, 1, 256, 256)
    grey = np.zeros((1, 64, 64), np.uint8)
    back = generated(grey, lambda x: grains.expand(len(x), -1, -1, -1), 64, size=256)
    assert back.shape == (1, 64, 64) and back.std() < 0.4


def window_in_use(main, run, more=""):
    """The (height, width) of the windows by which a run's model generates."""
    config = sys.modules[main.__module__].Config
    return sides_of(common.begin(config, "", {}, use(run, f"--generate {run}", more))[0])


def test_a_window_covers_what_training_covered(pairs, tmp_path, monkeypatch, capsys):
    """--patch, or the side of the training images; in the checkpoint, for --generate."""
    run = tmp_path / "run"
    stop_after(1, pix2pix.main, tiny_run("pix2pix", pairs, run, "--patch 40"), monkeypatch)
    assert last(run)["window"] == (40, 40)
    for name, size in (("large", (100, 130)), ("small", (60, 50))):
        save(tmp_path / "in" / f"{name}.png", picture(np.random.default_rng(0), *size))
    for out, more, how in (("a", "", "in windows of 40x40"), ("b", "--window 100", "as a whole")):
        pix2pix.main(use(run, f"--generate {tmp_path}/in", f"--out {tmp_path}/{out} {more}"))
        said = capsys.readouterr().err
        assert f"large.png: 130x100: {how}, at 64x64" in said
        assert "small.png: 50x60: as a whole, at 64x64" in said
    a, b = (pixels_of(tmp_path / k / "large.png") for k in "ab")
    assert a.shape == b.shape == (100, 130, 3) and (a != b).any()
    old = last(run) | {"window": 50, "window_B": None}  # one number for both sides
    older = {name: value for name, value in old.items() if "window" not in name}  # --patch
    older["config"] = {name: value for name, value in old["config"].items() if name != "schedule"}
    for content, window in ((old, (50, 50)), (older, (40, 40))):
        torch.save(content, tmp_path / "old.pt")
        assert window_in_use(pix2pix.main, run, f"--checkpoint {tmp_path}/old.pt") == window


@pytest.mark.parametrize("sizes", [[(64, 128)], [(90, 60), (40, 120), (80, 80)]])
def test_generation_squeezes_images_as_training_does(tmp_path, capsys, sizes):
    """Whole images: what a network gets is the same to the bit; larger ones go by windows."""
    for k, size in enumerate(sizes):
        names = " ".join(f"{split}/{side}/{k}.png" for split in ("train", "val") for side in "AB")
        data = pictures_in(tmp_path, names, *size)
    _, cfg = tiny("pix2pix", data=str(data), cache=str(tmp_path / "cache"))
    window = common.ImageStore(cfg, "train", 64).windows()[0]
    assert window == tuple(np.max(sizes, 0))
    wide, high = max(sizes, key=lambda size: max(size) / min(size))[::-1]
    assert f"images such as {wide}x{high} are squeezed" in capsys.readouterr().err
    using, painter = dataclasses.replace(cfg, window=window, out=str(tmp_path / "out")), Painter()
    pictures_in(data, "large.png", 2 * window[0], window[1])
    for path in (data / "val" / "A", data / "large.png"):
        common.translate_files(dataclasses.replace(using, generate=(str(path),)), painter)
    seen = torch.stack(painter.windows[: len(sizes)]).numpy()
    assert (seen == common.ImageStore(cfg, "val", 64).A).all()
    assert f"in windows of {window[1]}x{window[0]}" in capsys.readouterr().err


def test_each_direction_has_the_window_of_its_images(tmp_path, monkeypatch):
    """Unaligned images, A and B of other sizes; a run that goes on keeps both windows."""
    pictures_in(tmp_path, "trainA/0.png trainA/1.png testA/0.png testA/1.png")
    pictures_in(tmp_path, "trainB/0.png trainB/1.png testB/0.png testB/1.png", 100, 200)
    run = tmp_path / "run"
    stop_after(1, cyclegan.main, tiny_run("cyclegan", tmp_path, run, "--epochs 2"), monkeypatch)
    cyclegan.main(f"--resume --out {run}".split())
    assert (last(run)["window"], last(run)["window_B"]) == ((64, 64), (100, 200))
    for direction, window in (("AtoB", (64, 64)), ("BtoA", (100, 200))):
        assert window_in_use(cyclegan.main, run, f"--direction {direction}") == window


TILES = {"tiled": True, "blockxsize": 64, "blockysize": 64}


@pytest.mark.parametrize(("blocks", "cached", "slow"), [({}, 0, 1), (TILES, 0, 0), ({}, 1, 0)])
def test_slow_strips_are_told(tmp_path, monkeypatch, capsys, blocks, cached, slow):
    """Those that are decoded again for every few windows."""
    source = geotiff(tmp_path / "x.tif", noise(150, 200), **blocks)
    monkeypatch.setattr(support.generate, "CACHED_MB", cached)
    with Raster(source) as raster:
        print_windows(tiny("pix2pix", window=64)[1], raster)
    assert ("its strips are decoded once more" in capsys.readouterr().err) == slow


@pytest.mark.parametrize("kind", ["picture", "edit"])
@pytest.mark.parametrize("window", [0, 64])
def test_valid_pixels_do_not_depend_on_what_holes_are_filled_with(tmp_path, kind, window):
    """With shared statistics, too: what the network makes of pixels depends on all of them."""
    photo = picture(np.random.default_rng(0), 150, 200) // 2 + 60
    valid, results, net = np.ones(photo.shape[:2], bool), [], nn.InstanceNorm2d(3)
    valid[40:110, 70:140] = False
    about = {"shape": photo.shape[:2], "suffix": ".tif", "write": geotiff, "norm_reach": 1.0}
    cfg, _ = edit(tmp_path, "water:60,30,90,90", **about, window=window)
    for level, about in ((0, {"nodata": 0}), (255, {"nodata": 255}), (90, {"valid": valid})):
        geotiff(tmp_path / "photo.tif", np.where(valid[..., None], photo, level), **about)
        cfg = dataclasses.replace(cfg, out=str(tmp_path / f"{level}"))
        use_net(kind, cfg, net)
        result = tmp_path / f"{level}" / "photo.tif"
        assert (has_data(result) == valid).all()
        results.append(bands_of(result)[valid])
    assert results[0].std() > 5 and (results[0] != photo[valid]).any()
    assert all((result == results[0]).all() for result in results)


def test_holes_have_the_mean_colour_of_the_window(tmp_path):
    photo = picture(np.random.default_rng(0), 30, 40)
    geotiff(tmp_path / "x.tif", np.where(photo > 128, 0, photo), nodata=0)
    with Raster(tmp_path / "x.tif") as raster:
        valid, pixels = raster.valid(0, 0, 30, 40), raster.read()
        shown = read_filled(raster, 0, 0, 30, 40)
    assert (shown[valid] == pixels[valid]).all() and 0 < valid.mean() < 1
    assert (shown[~valid] == pixels[valid].mean(0).round()).all()


def use_net(kind, cfg, net):
    """Translates a picture, or edits a photograph, with a network of its colours alone."""
    if kind == "edit":
        common.edit_file(cfg, lambda x, variant: net(x[:, :3].float()) / 9, net)
    else:
        common.translate_files(cfg, lambda x, whole: net(x.float()) / 9, net)


def test_rows_of_a_tall_picture_stay_in_order(tmp_path):
    rows = np.linspace(0, 255, 900)[:, None, None].astype(np.uint8)
    save(tmp_path / "x.png", np.tile(rows, (1, 64, 3)))
    paths = {"generate": (str(tmp_path / "x.png"),), "out": str(tmp_path / "out")}
    cfg = tiny("pix2pix", size=64, window=1000, **paths)[1]
    common.translate_files(cfg, lambda windows, whole: common.from_bytes(windows))
    assert abs(pixels_of(tmp_path / "out" / "x.png") - rows.astype(float)).max() < 6


def test_classes_are_blended_as_scores_and_then_decided(tmp_path):
    """One window is not sure of a class, the next one of another: it wins where they overlap."""

    def paint(windows, whole):
        scores = torch.zeros(2, 3, 16, 16)
        scores[0, 0], scores[0, 1] = 0.51, 0.49
        scores[1, 1] = 1.0
        return scores

    save(tmp_path / "x.png", np.zeros((16, 28, 3), np.uint8))
    paths = {"generate": (str(tmp_path / "x.png"),), "out": str(tmp_path / "out")}
    cfg = tiny("cyclegan", **LABELS, **paths, window=16)[1]
    common.translate_files(cfg, paint, to_labels=True)
    index = pixels_of(tmp_path / "out" / "x.png")
    row = index[8].tolist()
    assert index.shape == (16, 28) and row == sorted(row) and row[0] == 0 and row[-1] == 1
    assert row.index(1) < 14  # not the middle of the overlap, where the weights are equal


# --------------------------------------------------------------------------------------- statistics


def test_shared_statistics_are_the_rasters():
    """With an infinite reach InstanceNorm of windows equals that of the whole."""
    net = nn.InstanceNorm2d(3)
    image = noise(64, 64).transpose(2, 0, 1)
    image[:, :, 32:] //= 4  # another contrast
    paint = lambda x: net(x.float())  # noqa: E731
    shared = SharedStatistics(net, float("inf"))
    with torch.no_grad():
        tiled = generated(image, paint, 16, statistics=shared)
        own = generated(image, paint, 16)
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
    scale = torch.tensor([1.0, 0.1, 0.003]).view(3, 1, 1)  # layers see small variances, too

    def paint(windows):  # one by one, as BatchNorm of an image's own statistics needs it
        return torch.cat([net(window[None] * scale) for window in windows])

    own, shared, places = paint(x), SharedStatistics(net, 1e-320), [(0.0, 0.0), (0.0, 1.0)]
    for place, tile in zip(places, x, strict=True):
        shared.note(place, paint, tile)
    with shared.around(places):
        assert torch.allclose(paint(x), own, atol=1e-4)
    with shared.around(places):
        assert torch.allclose(net(x * scale), own, atol=1e-4)  # a batch at once
    with shared.around(places[::-1]):
        assert not torch.allclose(paint(x), own, atol=1e-2)
    shared.reach = 1e200  # as good as infinite
    with shared.around(places):
        assert paint(x).isfinite().all()
    shared._forward = mock.Mock(side_effect=KeyboardInterrupt)  # Ctrl-C at the first layer
    with pytest.raises(KeyboardInterrupt), shared.around(places):
        pass


@pytest.mark.parametrize("top", [-5, -2, 0, 3, 7, 9])
@pytest.mark.parametrize("left", [-6, -1, 0, 4, 6, 9])
def test_pasting_puts_what_fits(top, left):
    pixels = np.arange(1, 21, dtype=np.uint8).reshape(4, 5)
    picture, wide = np.zeros((8, 9), np.uint8), np.zeros((40, 40), np.uint8)
    paste(picture, pixels, top, left)
    wide[10 + top : 14 + top, 10 + left : 15 + left] = pixels
    assert (picture == wide[10:18, 10:19]).all()


def test_a_sheet_of_a_large_raster_shows_the_largest_edit():
    small, large = (700, 100, 90, 2), (40, 600, 30, 30)
    assert _view([small, large], (800, 700), most=100) == (5, 565, 100, 100)
    assert _view([(790, 0, 10, 10)], (800, 700), most=100) == (700, 0, 100, 100)
    assert _view([small], (800, 60), most=100) == (695, 0, 100, 60)
    assert _view([small], (90, 100), most=100) == (0, 0, 90, 100)
    assert _view([], (800, 700), most=100) == (0, 0, 100, 100)


def noted(reach, most, size, window, valid=None):
    """SharedStatistics of a raster, of which `most` windows along a side are noted."""
    net, shown = nn.InstanceNorm2d(3), np.zeros((3, 16, 16), np.uint8)
    shared = SharedStatistics(net, reach)
    shared.most = most
    Windows(lambda *_: shown, lambda x: net(x.float()), size, window, shared, valid)
    return shared


FIVE_BY_TWELVE = (4 * 12 + 16, 11 * 24 + 32), (16, 32)  # windows: their raster's size, and theirs


def test_statistics_are_noted_all_over_a_raster():
    """By places counted in windows; the reach covers what lies between."""
    shared = noted(0.5, 4, *FIVE_BY_TWELVE)
    rows, columns = ({position[k] for position in shared.positions} for k in (0, 1))
    assert len(shared.positions) == 16 and len(rows) == len(columns) == 4
    assert max(rows) == 3 * 0.75 and max(columns) == 9 * 0.75
    assert shared.reach == 0.75 * 12 / 4


def test_statistics_are_noted_all_over_the_windows_with_data():
    """Those that would be noted have none: 16 of the other 40."""

    def valid(top, left, height, width):
        return np.full((height, width), left // 24 % 3 > 0)

    shared = noted(0.5, 4, *FIVE_BY_TWELVE, valid)
    rows = {row for row, _ in shared.positions}
    assert len(shared.positions) == 16 and rows == {0, 0.75, 1.5, 2.25, 3}


def test_statistics_come_from_the_only_window_with_data():
    """Of 61 in a row the second, which is not among the 24 that are noted; without data one."""
    for with_data, want in ((12, (0.0, 0.75)), (-1, (0, 0))):
        valid = lambda top, left, *_: np.array(left == with_data)  # noqa: B023, E731
        assert noted(2.0, 24, (16, 60 * 12 + 16), (16, 16), valid).positions == [want]


@pytest.mark.parametrize("kind", ["picture", "edit"])
def test_the_reach_of_the_command_line_counts(tmp_path, kind, monkeypatch):
    module, net = {"picture": support.generate, "edit": support.edits}[kind], nn.InstanceNorm2d(3)
    calls = calls_of(monkeypatch, module, "Windows")
    for options in ({"norm_reach": 0.0}, {"norm_reach": 3.0}, {}):
        cfg, _ = edit(tmp_path, "water:0,0,60,60", shape=(80, 90), **options)
        use_net(kind, dataclasses.replace(cfg, overwrite=True), net)
    found = [statistics and statistics.reach for *_, statistics, _ in calls]
    assert found == [None, 3.0, 2.0]


def test_labels_are_resized_by_nearest_alone(tmp_path):
    """In edits and in generation: between class 0 and class 2 lies no class 1."""
    index, painter = np.zeros((300, 400), np.uint8), Painter()
    index[:, ::3] = 2
    cfg, _ = edit(tmp_path, "road:50,50,9,9", window=150)
    save(tmp_path / "labels" / "lc.png", index)
    common.edit_file(cfg, painter)
    labels = {"generate": (cfg.lc,), "out": str(tmp_path / "two")}
    common.translate_files(dataclasses.replace(cfg, **labels), painter, from_labels=True)
    seen = [window[-2 if len(window) == 5 else 0] for window in painter.windows]
    assert all(classes.unique().tolist() == [0, 2] for classes in seen)


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


def test_two_results_of_one_name_are_refused(tmp_path):
    with refused("two results would be called a.png"):
        common.translate_files(translation(tmp_path, "a.png", "a.bmp"), None, to_labels=True)


# what is generated from a file, as pictures and as label maps
RESULTS = {
    "x.jpg": (["x.jpg"], ["x.png", "x_colours.png"]),
    "X.JPG": (["X.JPG"], ["X.png", "X_colours.png"]),
    "x.tif": (["x.tif"], ["x.tif"]),
    "x.tiff": (["x.tiff"], ["x.tiff"]),
    "X.TIF": (["X.TIF"], ["X.TIF"]),
    "x.vrt": (["x.tif"], ["x.tif"]),
    "x.npy": (["x.png"], ["x.png", "x_colours.png"]),
    "x.gif": (["x.png"], ["x.png", "x_colours.png"]),
}


def test_results_have_the_names_of_their_inputs_and_endings_that_can_be_written():
    for name, results in RESULTS.items():
        assert (results_of(Path(name)), results_of(Path(name), to_labels=True)) == results


def translation(tmp_path, *names, **options):
    """A Config that translates pictures in/NAME of 16 x 16 pixels."""
    for k, name in enumerate(names):
        save(tmp_path / "in" / name, np.full((16, 16, 3), 40 * k, np.uint8))
    options = {"generate": (str(tmp_path / "in"),), "out": str(tmp_path / "out")} | options
    return tiny("pix2pix", **options)[1]


def negative(windows, whole):
    return -common.from_bytes(windows)


def level(path):
    return int(pixels_of(path)[0, 0, 0])


def test_what_is_there_is_kept_and_overwrite_replaces_it(tmp_path, capsys):
    """Also hidden files of anybody."""
    cfg, out = translation(tmp_path, "a.png", "b.png", "c.png"), tmp_path / "out"
    for name in ("b.png", ".2024-a.png"):
        save(out / name, np.full((4, 4, 3), 7, np.uint8))
    (out / "c.png").symlink_to(tmp_path / "removed.png")
    (out / ".unfinished-0.png").touch()
    os.utime(out / ".unfinished-0.png", (0, 0))  # of a process that was killed
    (out / ".unfinished-1.png").touch()  # of one that is at work
    common.translate_files(cfg, negative)
    said = capsys.readouterr()
    assert f"2 result(s) in {out} are kept: --overwrite replaces them" in said.err
    assert said.out == f"1 image(s) written to {out}\n" and level(out / "a.png") == 255
    assert level(out / "b.png") == 7 and not (out / "c.png").exists()
    assert [path.name for path in out.glob(".unfinished*")] == [".unfinished-1.png"]
    common.translate_files(dataclasses.replace(cfg, overwrite=True), negative)
    assert [level(out / name) for name in ("a.png", "b.png", "c.png")] == [255, 215, 175]
    assert level(out / ".2024-a.png") == 7 and "kept" not in capsys.readouterr().err


def test_a_folder_that_was_stopped_goes_on_where_it_was(tmp_path):
    cfg, calls = translation(tmp_path, "a.png", "b.png", "c.png"), []

    def stopped(windows, whole):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return negative(windows, whole)

    with pytest.raises(KeyboardInterrupt):
        common.translate_files(cfg, stopped)
    common.translate_files(cfg, stopped)
    assert len(calls) == 4 and level(tmp_path / "out" / "c.png") == 175


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_input_is_replaced(tmp_path, overwrite):
    out = str(tmp_path / "in" / ".." / "in")
    cfg = translation(tmp_path, "a.png", out=out, overwrite=overwrite)
    with refused("a.png is an input: choose another --out"):
        common.translate_files(cfg, negative)
    labels = tmp_path / "labels" / "photo.png"
    save(labels, np.zeros((300, 400), np.uint8))
    for options in ({}, {"lc": str(labels)}, {"lc_before": str(labels)}):
        out = labels.parent if options else tmp_path
        cfg, _ = edit(tmp_path, "water:9,9,9,9", overwrite=overwrite, out=str(out), **options)
        with refused(f"{out}/photo.png is an input"):
            common.edit_file(cfg, Painter())


def test_a_picture_does_not_depend_on_the_others_in_its_folder(tmp_path):
    cfg = translation(tmp_path, "a.png", "b.png")
    common.translate_files(cfg, lambda windows, whole: torch.rand(1, 3, 64, 64))
    a, b = (pixels_of(tmp_path / "out" / name) for name in ("a.png", "b.png"))
    assert np.array_equal(a, b) and a.std() > 0


def test_a_damaged_input_is_found_before_the_first_is_generated(tmp_path):
    cfg = translation(tmp_path, "a.png", "b.png")
    (tmp_path / "in" / "b.png").write_text("no picture")
    with refused("b.png"):
        common.translate_files(cfg, negative)
    assert not (tmp_path / "out").exists()


def test_windows_without_data_are_left_out(tmp_path):
    """Of 36 windows four have data, and one per row stands for the channels."""
    pixels = np.zeros((304, 304, 3), np.uint8)
    pixels[100:120, 100:120] = 90
    geotiff(tmp_path / "x.tif", pixels, nodata=0)
    windows, net = [], nn.InstanceNorm2d(3)

    def predict(tiles, whole):
        windows.extend(tiles)
        return net(tiles.float()).tanh() / 2

    cfg = translation(tmp_path, generate=(str(tmp_path / "x.tif"),), window=64)
    common.translate_files(cfg, predict)
    assert len(windows) <= 4 + 6
    windows.clear()
    cfg = dataclasses.replace(cfg, out=str(tmp_path / "shared"))
    common.translate_files(cfg, predict, net)
    noted = [window for window in windows if (window == 90).any()]
    assert noted and len(windows) <= 8 + 6  # statistics come from windows with data
    assert (has_data(tmp_path / "shared" / "x.tif") == (pixels[..., 0] > 0)).all()


def test_land_cover_with_holes_becomes_a_photograph_with_holes(tmp_path):
    """No data is no class: 255 for the network, all zeros in its one-hot map."""
    labels, painter = np.ones((200, 160), np.uint8), Painter()
    labels[:30, 50:] = 200
    geotiff(tmp_path / "x.tif", labels, nodata=200)
    cfg = translation(tmp_path, generate=(str(tmp_path / "x.tif"),), window=64, **LABELS)
    common.translate_files(cfg, painter, from_labels=True)
    assert torch.stack(painter.windows).unique().tolist() == [1, common.IGNORED]
    assert (has_data(tmp_path / "out" / "x.tif") == (labels == 1)).all()


# -------------------------------------------------------------------------------------------- edits


def edit(tmp_path, *strokes, shape=(300, 400), suffix=".png", write=save, after=None, **options):
    """(cfg, photograph) for an edit of a photograph of land; after: the land cover to be."""
    photo, labels = picture(np.random.default_rng(0), *shape), tmp_path / "labels"
    write(tmp_path / f"photo{suffix}", photo)
    write(labels / f"lc{suffix}", np.zeros(shape, np.uint8))
    more = {"generate": (str(tmp_path / f"photo{suffix}"),), "window": 64}
    more |= {"lc": str(labels / f"lc{suffix}"), "out": str(tmp_path / "out")}
    if after is not None:
        save(labels / "after.png", after)
        more |= {"lc": str(labels / "after.png"), "lc_before": more["lc"]}
    return tiny("mixlc", **more | options, paint=strokes)[1], photo


def edited(tmp_path, *strokes, **options):
    """(photograph, the edited one, the windows that were painted)."""
    (cfg, photo), painter = edit(tmp_path, *strokes, **options), Painter()
    common.edit_file(cfg, painter)
    with Raster(tmp_path / "out" / Path(cfg.generate[0]).name) as raster:
        return photo, raster.read(), painter.windows


def test_an_edit_changes_the_photograph_around_it_alone(tmp_path):
    photo, result, windows = edited(tmp_path, "water:100,50,20,20", "road:300,200,90,30")
    near, border = np.zeros((300, 400), bool), 3  # 12 at 256
    near[50 - border : 70 + border, 100 - border : 120 + border] = True
    near[200 - border : 230 + border, 300 - border : 390 + border] = True
    assert (result[~near] == photo[~near]).all()
    assert (result[55:65, 105:115] == 140).all() and (result[205:225, 310:380] == 140).all()
    assert len(windows) == 1 + 3  # the lake has its own
    lake = next(window for window in windows if 1 in window[3])
    rows, columns = torch.where(lake[4] > 0)
    assert abs((rows.min() + rows.max()) / 2 - 31.5) <= 2  # in the middle, as in training
    assert abs((columns.min() + columns.max()) / 2 - 31.5) <= 2
    assert lake[4].sum() == 400 and (lake[3][lake[4] > 0] == 1).all()
    sheet = pixels_of(tmp_path / "out" / "photo_sheet.png")[16:, 4:]
    shown = [sheet[60, 404 * k + 110].tolist() for k in range(4)]
    assert shown == [photo[60, 110].tolist(), *map(list, CLASSES.colors[:2]), [140] * 3]


@pytest.mark.parametrize("option", ["lc", "lc_before"])
def test_land_cover_of_another_place_is_refused(tmp_path, option):
    place = {"transform": from_origin(500_100, 5_800_000, 0.5, 0.5)}
    away = geotiff(tmp_path / "away.tif", np.zeros((300, 400), np.uint8), **place)
    how = {"suffix": ".tif", "write": geotiff, option: str(away)}
    with refused(r"away.tif lies elsewhere than .*photo.tif"):
        edit_of_files(edit(tmp_path, "water:9,9,9,9", **how)[0])


def test_flat_channels_have_no_negative_variance():
    net = nn.InstanceNorm2d(4)
    shared = SharedStatistics(net, 1.0)
    tile = torch.tensor([100.1, 200.7, 77.3, 251.9]).view(4, 1, 1).expand(4, 8, 8)
    for k in range(7):
        shared.note((0.0, 0.7 * k), net, tile)
    with shared.around([(0.0, 0.9 * k) for k in range(5)]):
        assert net(tile.expand(5, -1, -1, -1)).isfinite().all()


def test_a_folder_of_label_arrays_is_translated(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((20, 20), np.uint8))
    cfg = translation(tmp_path, generate=(str(tmp_path),), **LABELS)
    common.translate_files(cfg, Painter(), from_labels=True)
    assert (tmp_path / "out" / "x.png").is_file()


def test_a_file_that_is_named_twice_is_read_once(tmp_path):
    pictures_in(tmp_path, "a.png b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "a.png")  # a result of its own
    words = f"{tmp_path}/b.png", f"{tmp_path}", f"{tmp_path}/../{tmp_path.name}/a.png"
    found = inputs_of(tiny("pix2pix", generate=words)[1])
    assert sorted(path.name for path in found) == ["a.png", "b.png", "c.png"]


def test_what_belongs_to_a_result_is_made_again_if_it_lacks(tmp_path, capsys):
    """The sheet of an edit; the colours of a label map."""
    cfg, _ = edit(tmp_path, "water:100,50,20,20")
    common.edit_file(cfg, Painter())
    sheet = tmp_path / "out" / "photo_sheet.png"
    before = pixels_of(sheet)
    sheet.unlink()
    common.edit_file(cfg, Painter())
    assert (pixels_of(sheet) == before).all()
    assert "0 picture(s) written" in capsys.readouterr().out
    sheet.unlink()
    save(tmp_path / "out" / "photo.png", np.zeros((9, 9, 3), np.uint8))  # of another photograph
    with refused("photo.png: another picture is there: --overwrite replaces it"):
        common.edit_file(cfg, Painter())
    save(tmp_path / "x.png", np.zeros((64, 64, 3), np.uint8))
    words = {"generate": (str(tmp_path / "x.png"),), "out": str(tmp_path / "lc"), "window": 64}
    cfg = tiny("cyclegan", **LABELS, **words, direction="AtoB")[1]
    labels, colours = tmp_path / "lc" / "x.png", tmp_path / "lc" / "x_colours.png"
    for index in (0, 2):
        common.translate_files(
            cfg, lambda x, whole: torch.eye(3)[x[:, 0].long()].movedim(-1, 1), to_labels=True
        )
        assert (Raster(labels, CLASSES).read() == index).all()
        assert (pixels_of(colours) == CLASSES.palette[index]).all()
        save(labels, np.full((64, 64), 2, np.uint8))  # retouched: it stays
        colours.unlink()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_raster_is_written_leaves_nothing(trained, tmp_path, monkeypatch, number):
    geotiff(tmp_path / "x.tif", picture(np.random.default_rng(0), 300, 300))
    monkeypatch.setattr(support.generate, "values_of", lambda *_: signal.raise_signal(number))
    handlers = [signal.getsignal(other) for other in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as stopped:
        words = f"--generate {tmp_path}/x.tif", f"--out {tmp_path}/out --window 64"
        pix2pix.main(use(trained("pix2pix"), *words))
    assert stopped.value.code == 128 + number and not list((tmp_path / "out").iterdir())
    assert [signal.getsignal(other) for other in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_samples_that_are_there_are_kept(tmp_path, capsys):
    """Four samples, of which the second was retouched: the others are generated, all are shown."""
    cfg, photo = edit(tmp_path, "water:100,50,20,20", samples=4)
    save(tmp_path / "out" / "photo_2.png", np.full_like(photo, 7))
    common.edit_file(cfg, Painter())
    said = capsys.readouterr()
    assert "1 result(s) in" in said.err and "3 picture(s) written" in said.out
    pictures = [Image.open(tmp_path / "out" / f"photo_{k}.png") for k in (1, 2, 3, 4)]
    assert [picture.getpixel((110, 60))[0] for picture in pictures] == [140, 7, 166, 178]
    sheet = pixels_of(tmp_path / "out" / "photo_sheet.png")
    assert sheet.shape[1] == 8 * 404 + 4  # three before, four after, and how they differ
    inside = [photo[60, 110] * 0 + level for level in (140, 7, 166, 178)]
    outside = [photo[250, 50], photo[250, 50] * 0 + 7, photo[250, 50], photo[250, 50]]
    for (y, x), levels in {(60, 110): inside, (250, 50): outside}.items():
        want = min(255, int(8 * np.std(levels, 0).mean()))  # eight times the deviation
        assert (sheet[16:, 4 + 7 * 404 :][y, x] == want).all()


def painted(boxes):
    """--paint of boxes (x, y, width, height); a name's beginning is enough, in any case."""
    return [f"Wat:{x},{y},{width},{height}" for x, y, width, height in boxes]


def random_boxes(seed, count=6):
    """Boxes (x, y, width, height) that begin in a photograph of 400 x 300."""
    rng = np.random.default_rng(seed)
    return rng.integers((0, 0, 1, 1), (390, 290, 120, 60), (count, 4)).tolist()


OVER_THE_EDGE = [(-20, -30, 60, 70), (370, 270, 60, 70)]
BOXES = [*map(random_boxes, range(3)), OVER_THE_EDGE, [(0, 0, 400, 300)]]


@pytest.mark.parametrize("boxes", BOXES)
def test_an_edit_is_feathered(tmp_path, boxes):
    """Around it, over 2 pixels, the same whatever regions and strips it is generated in.

    It is painted up to the photograph's edge; strokes may begin and end outside.
    """
    asked = np.zeros((300, 400), np.uint8)
    for x, y, width, height in boxes:
        asked[max(0, y) : y + height, max(0, x) : x + width] = 255
    photo, result, _ = edited(tmp_path, *painted(boxes))
    grown = Image.fromarray(asked).filter(ImageFilter.MaxFilter(3))
    share = np.asarray(grown.filter(ImageFilter.BoxBlur(1)), float)[..., None]
    wrong = abs(photo + share / 255 * (140.0 - photo) - result).max(-1)
    assert wrong[3:-3, 3:-3].max() <= 1
    assert (result[asked > 0] == 140).all()  # however narrow it is
    files, grey = edit_of_files(edit(tmp_path, *painted(boxes))[0]), np.full_like(photo, 140)
    strips = [files._feathered(grey[:1], top, 0) for top in range(300)]
    assert (np.concatenate(strips) == files._feathered(grey, 0, 0)).all()


def test_a_small_edit_has_a_window_of_its_own_and_those_close_together_are_one(tmp_path):
    """A margin of an eighth of the window must be left; a larger edit gets a quarter all around."""
    for side, length in ((48, 64), (52, 52 + 2 * 16)):
        cfg, _ = edit(tmp_path, f"water:100,100,{side},{side}")
        ((*_, height, width),) = edit_of_files(cfg).regions()
        assert height == width == length
    strokes = "water:100,50,20,20", "road:130,80,20,20", "road:10,250,5,5"
    assert len(edit_of_files(edit(tmp_path, *strokes)[0]).regions()) == 2
    assert overlap((0, 0, 4, 4), (3, 0, 4, 4)) and not overlap((0, 0, 4, 4), (4, 0, 4, 4))


def test_windows_of_a_region_in_which_nothing_changes_are_not_generated(tmp_path):
    """Within a ring of small changes, which overlap as regions."""
    along = range(40, 280, 30)
    ring = [(x, y) for x in along for y in along if {x, y} & {40, 250}]
    strokes = [f"water:{x},{y},9,9" for x, y in ring]
    photo, result, windows = edited(tmp_path, *strokes)
    (region,) = edit_of_files(edit(tmp_path, *strokes)[0]).regions()
    assert len(windows) < len(tiles(region[2], 64)) * len(tiles(region[3], 64))
    assert all((result[y : y + 9, x : x + 9] == 140).all() for x, y in ring)
    assert (result[90:220, 90:220] == photo[90:220, 90:220]).all()


@pytest.mark.parametrize("seed", range(5))
def test_regions_hold_every_change_and_do_not_touch(tmp_path, seed):
    strokes = painted(random_boxes(seed, count=1 + 2 * seed))
    files = edit_of_files(edit(tmp_path, *strokes, window=(64, 64 + 16 * seed))[0])
    regions, left = files.regions(), files.changed(0, 0, 300, 400)
    assert left.any() and files.border == 3  # of the shorter side
    for k, (y, x, height, width) in enumerate(regions):
        assert height >= 64 and width >= 64 + 16 * seed
        assert 0 <= y <= 300 - height and 0 <= x <= 400 - width
        left[y : y + height, x : x + width] = False
        assert not any(overlap(regions[k], other) for other in regions[:k])
    assert not left.any()


# boxes of changes, and the regions around them by windows of 64 x 64
JOINED = [
    ([(10, 10, 4, 4), (10, 300, 4, 4), (40, 10, 4, 4)], [(0, 270, 64, 64), (0, 0, 64, 64)]),
    ([(10, 10, 4, 4), (10, 128, 4, 4), (12, 50, 4, 30)], [(0, 0, 64, 154)]),  # one after the other
]


@pytest.mark.parametrize(("boxes", "regions"), JOINED)
def test_changes_join_the_regions_that_they_touch(boxes, regions):
    edit = object.__new__(PhotoEdit)
    edit.size, edit.window, edit.whole = (400, 400), (64, 64), False
    edit._changes = lambda block: iter(boxes)
    assert edit.regions() == regions
    assert not (overlap((0, 0, 4, 4), (4, 0, 4, 4)) or overlap((0, 0, 4, 4), (0, 4, 4, 4)))


@pytest.mark.parametrize("window", [64, 400])
def test_an_edit_of_nothing_is_the_photograph(tmp_path, capsys, window):
    photo, result, windows = edited(tmp_path, "land:0,0,400,300", window=window)
    assert "nothing changes" in capsys.readouterr().err and not windows
    assert (result == photo).all()


def test_land_cover_before_and_after_as_files(tmp_path, capsys):
    """Where there is no class after, the photograph stays.

    Without the one before, or with --no-keep-outside, all is generated.
    """
    after, painter = np.zeros((300, 400), np.uint8), Painter()
    after[100:120, 200:220] = 1
    after[200:] = common.IGNORED
    cfg, photo = edit(tmp_path, after=after)
    common.edit_file(dataclasses.replace(cfg, samples=2), painter)
    assert len(painter.windows) == 2 and "--lc-before" not in capsys.readouterr().err
    for k, grey in ((1, 140), (2, 153)):
        result = pixels_of(tmp_path / "out" / f"photo_{k}.png")
        assert (result[105:115, 205:215] == grey).all()
        assert (result[:90] == photo[:90]).all() and (result[130:] == photo[130:]).all()
    for name, options in (("a", {"keep_outside": False}), ("b", {"lc_before": "", "erase": False})):
        out = tmp_path / name
        common.edit_file(dataclasses.replace(cfg, out=str(out), **options), Painter())
        assert (pixels_of(out / "photo.png") == 140).all()
    assert "is generated: --lc-before" in capsys.readouterr().err


def test_a_small_photograph_is_edited_as_a_whole(tmp_path, capsys):
    *_, (window,) = edited(tmp_path, "water:20,30,10,10", shape=(90, 70))
    assert "as a whole" in capsys.readouterr().err
    assert window.shape == (5, 64, 64) and window[4].sum() < 200


def test_the_noise_of_a_sample_is_one_for_all_windows(monkeypatch):
    module, cfg = tiny("mixlc_acgan", erase=True)
    state, seen = module.build(cfg, CPU, training=False), []
    monkeypatch.setattr(common, "edit_file", lambda cfg, paint, net: seen.append(paint))
    module.generate(state, cfg, CPU)
    window = torch.randint(0, 3, (1, 5, 64, 64), dtype=torch.uint8)
    both = seen[0](torch.cat([window, window]), variant=1)
    assert same(both[0], both[1]) and not same(seen[0](window, variant=2)[0], both[0])


def test_using_keeps_the_cache_of_training_and_may_normalise_otherwise(trained, tmp_path):
    for script in ("pix2pix", "mixlc"):
        content, run = last(trained(script)), tmp_path / script / "run"
        content["config"] |= {"cache": "", "out": str(run)}
        (run / "checkpoints").mkdir(parents=True)
        torch.save(content, run / "checkpoints" / "last.pt")
        caches = {"": f"{script}/cache", f"--out {tmp_path}/o/x": "o/cache"}
        for more, cache in (caches | {f"--cache {tmp_path}/c": "c"}).items():
            words = use(run, "--serve --eval-norm running", more)
            cfg, *_ = common.begin(importlib.import_module(script).Config, "", {}, words)
            assert cfg.eval_norm == "running" and cache_folder(cfg) == tmp_path / cache


def test_strokes_come_on_top_of_another_land_cover(tmp_path):
    after = np.zeros((300, 400), np.uint8)
    after[200:220, 300:320] = 2
    cfg, _ = edit(tmp_path, "water:100,50,20,20", after=after)
    assert edit_of_files(cfg).changed(0, 0, 300, 400).sum() == 2 * 20 * 20


def test_the_border_of_a_whole_photograph_follows_its_size(tmp_path):
    for number, (shape, border) in enumerate((((256, 512), 12), ((10, 20), 1))):
        cfg, _ = edit(tmp_path / str(number), "water:9,9,9,9", shape=shape, window=0)
        assert edit_of_files(cfg).border == border
