"""Layouts and their refusals, label maps, the store, the demo world."""

import dataclasses
import json
import os
import re
import types

import numpy as np
import pytest
import torch
from PIL import Image

import common
import pix2pix
from common import ImageStore, UserError
from conftest import TABLE, as_rank, geotiff, land_cover, picture, save, side_by_side
from pix2pix import Config
from support.classes import ClassTable
from support.demo import DEMO_CLASSES, demo_world, landscape
from support.layouts import find_images
from support.measures import confusion_matrix, measure_images, measure_labels
from support.pictures import as_array, as_tensor, to_bytes
from support.rasters import Raster


def config(root, cache, **options):
    return Config(data=str(root), cache=str(cache), **options)


def stems(paths):
    return " ".join(path.stem for path in paths)


def touch(root, names):
    """Empty files."""
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


# ------------------------------------------------------------------------------------------ layouts

INRIA = ["austin1", "austin5", "austin6", "vienna36", "tyrol-w2", "tyrol-w10"]
INRIA = " ".join(f"train/{side}/{name}.tif" for side in ("images", "gt") for name in INRIA)

# case: (files, split, its layout and name, stems of A, stems of B)
LAYOUTS = {
    "side by side": ("train/10.jpg train/9.png", "train", "side by side, train", "10 9", "10 9"),
    "two folders": ("train/A/x.png train/A/x.q.png train/B/x.webp train/B/x.q.jpg", "train",
                    "two folders, train", "x x.q", "x x.q"),
    "two folders, small": ("train/a/x.png train/b/x.png", "train", "two folders, train", "x", "x"),
    "unaligned": ("trainA/2.jpg trainA/1.jpg trainB/3.jpg", "train", "unaligned, train",
                  "1 2", "3"),
    "land cover": ("train/rgb/7.png train/lc/7.npz classes.json", "train", "land cover, train",
                   "7", "7"),
    "Inria": (INRIA, "train", "Inria, train", "austin6 tyrol-w10 vienna36",
              "austin6 tyrol-w10 vienna36"),
    "Inria, 1-5": (INRIA, "val", "Inria, train, images 1-5 of each city",
                   "austin1 austin5 tyrol-w2", "austin1 austin5 tyrol-w2"),
    "Inria with val": (INRIA + " val/images/x.tif val/gt/x.tif", "train", "Inria, train",
                       "austin1 austin5 austin6 tyrol-w10 tyrol-w2 vienna36",
                       "austin1 austin5 austin6 tyrol-w10 tyrol-w2 vienna36"),
    "masks": ("train/images/7.jpg train/masks/7.png classes.json", "train", "masks, train", "7",
              "7"),
    "two endings": ("train/1_A.png train/1_B.png train/2_B.jpg train/2_A.png", "train",
                    "two endings, train", "1_A 2_A", "1_B 2_B"),
    "a satellite image and a mask": ("train/9_sat.jpg train/9_mask.png classes.json", "train",
                                     "two endings, train", "9_sat", "9_mask"),
    "one of two endings": ("train/1_A.png train/2_A.png", "train", "side by side, train",
                           "1_A 2_A", "1_A 2_A"),
    "other names, too": ("train/1_A.png train/2_B.png train/3.png", "train",
                         "side by side, train", "1_A 2_B 3", "1_A 2_B 3"),
    "zipped on a Mac": ("train/A/\u00e9.png train/B/e\u0301.png", "train", "two folders, train",
                        "\u00e9", "e\u0301"),
    "val before test": ("val/1.png test/2.png", "val", "side by side, val", "1", "1"),
    "validation": ("validation/1.png test/2.png", "val", "side by side, validation", "1", "1"),
    "test for val": ("train/1.png test/2.png", "val", "side by side, test", "2", "2"),
    "test": ("val/1.png test/2.png", "test", "side by side, test", "2", "2"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(tmp_path, case):
    names, split, layout, a, b = LAYOUTS[case]
    touch(tmp_path, names)
    if "classes.json" in names:
        (tmp_path / "classes.json").write_text(json.dumps(TABLE))
    found = find_images(tmp_path, split)
    assert (f"{found.layout}, {found.name}", stems(found.A), stems(found.B)) == (layout, a, b)
    assert found.paired == ("unaligned" not in layout) and found.halves == ("side" in layout)
    assert bool(found.classes) == ("classes.json" in names or found.layout == "Inria")


def test_classes_turn_any_layout_into_label_maps(pairs, landcover):
    split = find_images(pairs, "train", "maps")
    assert split.classes.names[4] == "water" and split.halves
    assert find_images(landcover, "train", "pictures").classes is None


KNOWN = "side by side.*two folders.*unaligned.*land cover.*Inria.*masks.*two endings"
NOT_LAYOUTS = {
    "nowhere": ("", "train", "no such directory"),
    "a file": (".", "train", "is a file, not a directory"),
    "other folders": ("train/sat/1.png train/map/1.png train/notes.txt", "train",
                      f"train has map, notes.txt, sat .sub-folders are not searched.*{KNOWN}"),
    "sub-folders": ("train/A/x/1.png train/B/1.png", "train", "train/A: .*has x .*not searched"),
    "twins on a Mac": ("train/A/\u00e9.png train/A/e\u0301.png train/B/\u00e9.png", "train",
                       "the same name but for"),
    "a lone ending": ("train/1_A.png train/1_B.png train/2_A.png", "train", "2_A.png has no par"),
    "masks without a table": ("train/images/x.png train/masks/x.png", "train", "s2glc, maps or b"),
    "a mask without a table": ("train/x_sat.png train/x_mask.png", "train", "s2glc, maps or bin"),
    "nothing": ("x/notes.txt", "train", f"no layout with images of split train.*{KNOWN}"),
    "no images": ("train/notes.txt", "train", f"no layout.*{KNOWN}"),
    "no val": ("train/1.png", "val", f"no layout with images of split val.*{KNOWN}"),
    "no test": ("train/1.png val/1.png", "test", "no layout with images of split test"),
    "one side": ("train/A/notes.txt train/B/x.png", "train", "train/A: no images in split train"),
    "a lone file": ("train/A/x.png train/A/y.png train/B/x.png", "train",
                    "2 images and 1: .*y.png has no partner"),
    "twins": ("train/A/x.png train/A/x.jpg train/B/x.png", "train", "but for their ending"),
    "no class table": ("train/rgb/x.png train/lc/x.png", "train", "pass --lc-classes s2glc"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_LAYOUTS)
def test_refuses_directories_with_one_line_that_helps(tmp_path, case):
    names, split, text = NOT_LAYOUTS[case]
    root = tmp_path / "data"
    if names == ".":
        root.touch()
    else:
        touch(root, names)
    with pytest.raises(UserError, match=text):
        find_images(root, split)


# --------------------------------------------------------------------------------------- label maps


@pytest.fixture
def table():
    return ClassTable.load(json.dumps(TABLE))


INDEX = np.array([[0, 1, 2, 0, 1], [2, 255, 1, 0, 0]], np.uint8)
CODES = np.where(INDEX == 255, np.uint8(3), INDEX)  # 3 is the row of the table that is ignored
ONE_HOT = (INDEX[..., None] == np.arange(3)).astype(np.float32)


def write(path, array):
    """A label map as .npy, .npz or an image."""
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez(path, array)
    else:
        save(path, array)
    return path


def stray(table):
    rgb = table.palette[INDEX].copy()
    rgb[1, 1] = (0x84, 0x29, 0xF0)  # near the first class, but not it
    return rgb


LABELS = {
    "indices": ("x.png", lambda table: CODES),
    "colours": ("x.png", lambda table: table.palette[INDEX]),
    "a stray colour": ("x.png", stray),
    "integers": ("x.npy", lambda table: CODES.astype(np.int64)),
    "whole floats": ("x.npy", lambda table: CODES.astype(float)),
    "an axis of 1": ("x.npy", lambda table: CODES[None]),
    "one-hot": ("x.npz", lambda table: ONE_HOT),
    "one-hot, channels first": ("x.npz", lambda table: np.moveaxis(ONE_HOT, -1, 0)),
    "one-hot of all rows": ("x.npz", lambda table: CODES[..., None] == np.arange(4)),
}


@pytest.mark.parametrize("kind", LABELS)
def test_label_formats(tmp_path, table, kind):
    name, pixels = LABELS[kind]
    with Raster(write(tmp_path / name, pixels(table)), table) as raster:
        assert (raster.height, raster.width) == INDEX.shape
        assert (raster.read() == INDEX).all() and (raster.read(1, 2, 9, 2) == INDEX[1:, 2:4]).all()


S2GLC = "values [1] are outside the class table, whose values are [0, 62,"
ROWS = [{"name": f"n{k}", "color": f"0,{k},0", "value": k} for k in (1, 2, 3)]
MIXED = [ROWS[2], {"name": "x", "color": "#000001"}]  # the value of a row without one is its place

# case: (class table, codes in the file, indices or the end of a message)
VALUES = {
    "s2glc": ("s2glc", [0, 62, 162, 255], [0, 1, 13, 255]),
    "positions in s2glc": ("s2glc", [0, 1], S2GLC),
    "values": (json.dumps(ROWS), [1, 2, 3, 255], [0, 1, 2, 255]),
    "a position": (json.dumps(ROWS), [0, 1, 2], "[0] are outside"),
    "some values": (json.dumps(MIXED), [3, 1], [0, 1]),
    "no values, a row ignored": (json.dumps([TABLE[0], TABLE[3], *TABLE[1:3]]), [0, 1, 2, 3],
                                 [0, 255, 1, 2]),
    "a mask": ("binary", [0, 255, 255], [0, 1, 1]),
    "a stranger": (json.dumps(TABLE), [0, 77], "[77] are outside the class table"),
    "a fraction": (json.dumps(TABLE), [0.7], "[0.7] are outside the class table"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_codes_are_the_values_of_the_table(tmp_path, case):
    source, codes, want = VALUES[case]
    codes = np.array([codes]) if isinstance(codes[0], float) else np.array([codes], np.uint8)
    path = write(tmp_path / ("x.npy" if codes.dtype == float else "x.png"), codes)
    if isinstance(want, list):
        assert Raster(path, ClassTable.load(source)).read().tolist() == [want]
    else:
        with pytest.raises(UserError, match=re.escape(want)):
            Raster(path, ClassTable.load(source)).read()


TWO = '[{"name": "a", "color": "#010203", "value": 0}, {"name": "b", "color": "#9", "value": 255}]'
TWO = TWO.replace("#9", "#998877")


@pytest.mark.parametrize("name", ["x.png", "x.tif", "white_is_zero.tif"])
@pytest.mark.parametrize("source", ["binary", json.dumps(TABLE), TWO])
def test_masks_of_one_bit(tmp_path, source, name):
    """Also where the middle, which is looked at first, has only one of the two."""
    mask = np.zeros((1, 3000), bool)
    mask[0, 2900:] = True
    if "white" in name:
        pixels = np.uint8(~mask)
        geotiff(tmp_path / name, pixels, nbits="1", photometric="MINISWHITE")
    else:
        Image.fromarray(mask).save(tmp_path / name)
    assert (np.asarray(Image.open(tmp_path / name)) == mask).all()
    assert (Raster(tmp_path / name, ClassTable.load(source)).read() == mask).all()


BLACK_AND_WHITE = [{"name": "no", "color": "#000000"}, {"name": "yes", "color": "#ffffff"}]
NEAREST = json.dumps({"nearest": True, "classes": BLACK_AND_WHITE})
EXACT = json.dumps(BLACK_AND_WHITE)

# case: (levels of a grey mask, class table, its file, indices or a message)
GREYS = {
    "soft edges": ([0, 90, 200, 255], NEAREST, "x.png", [0, 0, 1, 1]),
    "soft edges, TIFF": ([0, 90, 200, 255], NEAREST, "x.tif", [0, 0, 1, 1]),
    "codes": ([0, 1, 1, 0], NEAREST, "x.png", [0, 1, 1, 0]),
    "binary": ([0, 90, 200, 255], "binary", "x.png", [0, 0, 1, 1]),
    "binary, TIFF": ([0, 90, 200, 255], "binary", "x.tif", [0, 0, 1, 1]),
    "binary, 0 and 1": ([0, 1, 1, 0], "binary", "x.png", "[1] are outside"),
    "binary, 0 and 1, TIFF": ([0, 1, 1, 0], "binary", "x.tif", "[1] are outside"),
    "more codes": ([0, 1, 2, 3], NEAREST, "x.tif", "[2, 3] are outside"),
    "a grey photograph": ([90, 100, 0, 140], "binary", "x.png", "[90, 100, 140] are outside"),
    "no nearest": ([0, 90, 200, 255], EXACT, "x.png", "[90, 200] are outside"),
}


@pytest.mark.parametrize("case", GREYS)
def test_levels_of_grey_are_colours_where_they_are_no_codes(tmp_path, case):
    levels, source, name, want = GREYS[case]
    save(tmp_path / name, np.array([levels], np.uint8))
    if isinstance(want, list):
        assert Raster(tmp_path / name, ClassTable.load(source)).read().tolist() == [want]
    else:
        with pytest.raises(UserError, match=re.escape(want)):
            Raster(tmp_path / name, ClassTable.load(source)).read()


@pytest.mark.parametrize("source", ["binary", NEAREST, EXACT])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(("name", "options"), [("x.jpg", {}), ("x.tif", {"compression": "jpeg"})])
def test_masks_survive_jpeg(tmp_path, source, mode, name, options):
    index = np.zeros((64, 64), np.uint8)
    index[13:40, 9:31] = 1
    mask = Image.fromarray(index * 255).convert(mode)
    mask.save(tmp_path / name, quality=50, **options)
    assert (Raster(tmp_path / name, ClassTable.load(source)).read() == index).mean() > 0.99


def test_maps_colours_survive_jpeg(tmp_path):
    table = ClassTable.load("maps")
    index = np.array([[0, 4], [5, 3]], np.uint8).repeat(24, 0).repeat(24, 1)
    save(tmp_path / "x.jpg", table.palette[index], quality=80)
    assert (Raster(tmp_path / "x.jpg", table).read() == index).mean() > 0.95


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif"])
@pytest.mark.parametrize("nearest", [False, True])
def test_refuses_pictures_as_label_maps(tmp_path, table, name, nearest):
    """JPEG-compressed label maps of the same places are accepted, at any quality."""
    table = dataclasses.replace(table, nearest=nearest)
    photo, _, classes = landscape(np.random.default_rng(0), 128)
    save(tmp_path / name, photo)
    with pytest.raises(UserError, match=f"{name}: .*not those of the class table"):
        Raster(tmp_path / name, table).read()
    index = np.uint8(classes % 3)
    for quality in (30, 60, 95):
        save(tmp_path / "lc.jpg", table.palette[index], quality=quality)
        assert (Raster(tmp_path / "lc.jpg", table).read() == index).mean() > 0.75


@pytest.mark.parametrize(
    "text",
    ["[]", '[{"name": "x"}]', "{", '[{"name": "x", "color": "#12"}]', json.dumps(TABLE[:1] * 2)],
)
def test_refuses_bad_class_tables(tmp_path, text):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(UserError, match="class table .*classes.json: "):
        ClassTable.load(str(tmp_path / "classes.json"))


def test_what_is_ignored_has_the_first_colour_that_is(table):
    rows = [*TABLE, {"name": "cloud", "color": "255,0,0", "ignore": True}]
    assert ClassTable.load(json.dumps(rows)).palette[255].tolist() == [0x9B, 0x9B, 0x9B]


def test_class_table_round_trip(table):
    assert ClassTable.load(table.text) == table
    assert ClassTable.load(ClassTable.load("maps").text) == ClassTable.load("maps")
    assert ClassTable.load("") is None
    assert table.palette[[0, 2, 3, 255]].tolist() == [
        [0x84, 0x29, 0xF6],
        [0x6E, 0xC1, 0xE4],
        [0, 0, 0],
        [0x9B, 0x9B, 0x9B],
    ]


# ---------------------------------------------------------------------------------------- the store


def test_store_holds_the_resized_images(pairs, tmp_path):
    store = ImageStore(config(pairs, tmp_path), "train", 40)
    both = Image.open(pairs / "train" / "3.png")
    a = np.asarray(both.crop((0, 0, 80, 80)).resize((40, 40), Image.Resampling.BICUBIC))
    assert (store.A[3].transpose(1, 2, 0) == a).all() and store.records.shape == (6, 6, 40, 40)
    assert np.shares_memory(store.A, store.records)


def test_store_of_two_lists(tmp_path):
    for name, level in (("trainA/1", 10), ("trainA/2", 20), ("trainB/x", 30)):
        save(tmp_path / f"{name}.png", np.full((16, 16, 3), level, np.uint8))
    store = ImageStore(config(tmp_path, tmp_path / "cache"), "train", 8)
    assert store.A.shape == (2, 3, 8, 8) and store.B.shape == (1, 3, 8, 8)
    assert store.records is None and store.A.max((1, 2, 3)).tolist() == [10, 20]
    assert store.B.max() == 30


def test_patches(pairs, tmp_path):
    store = ImageStore(config(pairs, tmp_path, patch=32), "train", 32)
    both = np.asarray(Image.open(pairs / "train" / "0.png"))
    assert len(store.A) == 6 * 4  # what does not fill a patch is left out
    assert (store.A[1].transpose(1, 2, 0) == both[:32, 32:64]).all()
    assert (store.B[2].transpose(1, 2, 0) == both[32:64, 80:112]).all()
    with pytest.raises(UserError, match="--patch 81"):
        ImageStore(config(pairs, tmp_path, patch=81), "train", 32)


def test_patches_of_labels(tmp_path):
    """Two rasters of two by two; another is smaller than a patch and gives none."""
    rng, rows = np.random.default_rng(0), []
    for name in ("a", "b"):
        index = rng.integers(0, 2, (50, 45), np.uint8)
        save(tmp_path / "train" / "images" / f"{name}.tif", picture(rng, 50, 45))
        save(tmp_path / "train" / "gt" / f"{name}.tif", index * 255)
        rows += [index[:20, :20], index[:20, 20:40], index[20:40, :20], index[20:40, 20:40]]
    for side, shape in (("images", (19, 45, 3)), ("gt", (19, 45))):
        save(tmp_path / "train" / side / "small.tif", np.zeros(shape, np.uint8))
    store = ImageStore(config(tmp_path, tmp_path / "cache", patch=20), "train", 20)
    assert store.records.shape == (8, 4, 20, 20) and (store.B[:, 0] == rows).all()


def test_maps_patch_count(tmp_path):
    """256 on the 600x600 halves of the maps data: 4 patches, so 1096 images give 4384."""
    save(tmp_path / "train" / "1.jpg", np.zeros((600, 1200, 3), np.uint8))
    assert len(ImageStore(config(tmp_path, tmp_path / "cache", patch=256), "train", 64).A) == 4


def test_labels_are_resized_with_nearest_only(landcover, tmp_path):
    store = ImageStore(config(landcover, tmp_path), "train", 50)
    assert store.B.shape == (4, 1, 50, 50) and set(np.unique(store.B)) == {0, 1, 2, 255}


def store_files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_store_is_reused_and_invalidated(tmp_path, monkeypatch):
    root, cache = side_by_side(tmp_path / "data"), tmp_path / "cache"
    ImageStore(config(root, cache), "train", 32)
    first = store_files(cache)
    with monkeypatch.context() as patch:
        patch.setattr(Raster, "read", lambda *_, **__: pytest.fail("decoded again"))
        ImageStore(config(root, cache), "train", 32)
    assert store_files(cache) == first
    ImageStore(config(root, cache), "train", 40)
    assert len(store_files(cache)) == 2  # another size, another file
    os.utime(root / "train" / "0.png", (1, 1))
    ImageStore(config(root, cache), "train", 32)
    assert len(store_files(cache)) == 3  # another time
    (root / "train" / "5.png").unlink()
    assert len(ImageStore(config(root, cache), "train", 32).A) == 5


def test_store_appears_whole_or_not_at_all(tmp_path):
    root, cache = side_by_side(tmp_path / "data", suffix=".jpg"), tmp_path / "cache"
    broken = root / "train" / "4.jpg"
    broken.write_bytes(broken.read_bytes()[:1200])
    with pytest.raises(UserError, match=r"4.jpg: cannot be decoded .*truncated"):
        ImageStore(config(root, cache), "train", 32)
    assert store_files(cache) == []


def test_refuses_what_does_not_fit(tmp_path):
    root = side_by_side(tmp_path / "a")
    save(root / "train" / "2.png", np.zeros((80, 100, 3), np.uint8))
    with pytest.raises(UserError, match="2.png: 100x80 is no pair side by side"):
        ImageStore(config(root, tmp_path / "cache"), "train", 32)
    root = land_cover(tmp_path / "b")
    save(root / "train" / "lc" / "1.png", np.zeros((80, 79), np.uint8))
    with pytest.raises(UserError, match="1.jpg is 80x80 but .*1.png is 79x80"):
        ImageStore(config(root, tmp_path / "cache"), "train", 32)
    (root / "train" / "rgb" / "0.jpg").write_text("no image")
    with pytest.raises(UserError, match="0.jpg: cannot be decoded"):
        ImageStore(config(root, tmp_path / "cache"), "train", 32)


def test_refuses_pictures_of_more_than_eight_bits(tmp_path):
    root = side_by_side(tmp_path / "a")
    save(root / "train" / "2.png", np.full((80, 160), 40_000, np.uint16))
    with pytest.raises(UserError, match="2.png: has uint16 values"):
        ImageStore(config(root, tmp_path / "cache"), "train", 32)


def test_conversions_are_said_once(tmp_path, capsys):
    for k in range(2):
        Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / f"{k}.jpg", quality=95)
        assert abs(Raster(tmp_path / f"{k}.jpg").read().astype(int) - (255, 0, 0)).max() < 8
    assert capsys.readouterr().err.count("CMYK: converted to RGB") == 1


def test_says_how_much_has_no_class_and_refuses_maps_without_any(tmp_path, capsys):
    root = tmp_path / "data"
    rows = [{"name": "ground", "color": "0,0,0"}, {"name": "building", "color": "255,255,255"}]
    for split in ("train", "val"):  # a mask of 0 and 255 under a table whose values are 0 and 1
        mask = np.zeros((40, 40), np.uint8)
        mask[:10] = 255
        save(root / split / "rgb" / "1.png", np.zeros((40, 40, 3), np.uint8))
        save(root / split / "lc" / "1.png", mask if split == "train" else mask * 0 + 255)
    (root / "classes.json").write_bytes(
        b"\xef\xbb\xbf" + json.dumps(rows).encode()
    )  # as some editors write it
    ImageStore(config(root, tmp_path / "cache"), "train", 40)
    assert "2 classes, 25% of the pixels ignored" in capsys.readouterr().err
    with pytest.raises(UserError, match="split val: no pixel has a class"):
        ImageStore(config(root, tmp_path / "cache"), "val", 40)


def test_a_damaged_store_is_built_again(tmp_path):
    root, cache = side_by_side(tmp_path / "data"), tmp_path / "cache"
    whole = np.array(ImageStore(config(root, cache), "train", 32).records)
    file = store_files(cache)[0]
    content = (cache / file).read_bytes()
    for damaged in (content[:-1], content + b"x", content[:9] + b"?" + content[10:], b""):
        (cache / file).write_bytes(damaged)
        assert (ImageStore(config(root, cache), "train", 32).records == whole).all()
        assert (cache / file).read_bytes() == content


def test_two_datasets_of_equal_names_sizes_and_times_have_two_stores(tmp_path):
    for name, level in (("a", 10), ("b", 200)):
        for split in ("train", "val"):
            save(tmp_path / name / split / "1.bmp", np.full((40, 80, 3), level, np.uint8))
            os.utime(tmp_path / name / split / "1.bmp", (1, 1))
    stores = [
        ImageStore(config(tmp_path / name, tmp_path / "cache"), "train", 32) for name in ("a", "b")
    ]
    assert [store.A.max() for store in stores] == [10, 200]


def test_a_full_disk_is_one_line(tmp_path, pairs, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SystemExit) as stopped:
        common.command(lambda argv: ImageStore(config(pairs, tmp_path), "train", 32))()
    assert stopped.value.code == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert store_files(tmp_path) == []


def test_rows_gather(pairs, tmp_path):
    store = ImageStore(config(pairs, tmp_path), "train", 32)
    index = np.array([[3, 1], [0, 5]])
    batches = list(common.Loader(store.records, torch.device("cpu")).batches(index))
    assert all(
        (np.stack(batch) == store.records[rows]).all()
        for batch, rows in zip(batches, index, strict=True)
    )


def test_prefetching_yields_the_same_batches_and_ends_its_thread(pairs, tmp_path, monkeypatch):
    """The background thread, with pinning (which needs a GPU) left out."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    rows = common.Loader(
        ImageStore(config(pairs, tmp_path), "train", 32).records, torch.device("cpu")
    )
    index = np.arange(6).repeat(4).reshape(12, 2)
    for one, other in zip(rows._prefetched(index), rows.batches(index), strict=True):
        assert torch.equal(torch.stack(one), torch.stack(other))
    half = rows._prefetched(index)
    next(half)
    half.close()  # ends the thread although it waits to put the next batch
    with pytest.raises(IndexError):
        list(rows._prefetched(np.array([[0, 99]])))


# --------------------------------------------------------------------------------------- demo world


def test_demo_world(tmp_path):
    """The same on every machine; written once; satellite left and map right; val is not train."""
    root = demo_world(tmp_path, "maps", train=2, val=1, side=64)
    written = sorted((tmp_path / "demo-maps").rglob("*.png"))
    assert [str(path.relative_to(root)) for path in written] == [
        "train/000.png",
        "train/001.png",
        "val/000.png",
    ]
    times = [path.stat().st_mtime_ns for path in written]
    demo_world(tmp_path, "maps", train=2, val=1, side=64)
    assert [path.stat().st_mtime_ns for path in written] == times
    for path, number in zip(written, (0, 1, 100_000), strict=True):
        satellite, drawn, _ = landscape(np.random.default_rng([7, number]), 64)
        assert (np.asarray(Image.open(path)) == np.concatenate([satellite, drawn], 1)).all()
    root = demo_world(tmp_path, "landcover", train=2, val=1, side=64)
    store = ImageStore(config(root, tmp_path / "cache"), "train", 64)
    assert store.classes.names == DEMO_CLASSES
    for k in range(2):
        satellite, _, ground = landscape(np.random.default_rng([7, k]), 64)
        assert (store.A[k].transpose(1, 2, 0) == satellite).all() and (store.B[k] == ground).all()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["cache", "demo-landcover", "demo-maps"]  # nothing is left aside


def test_demo_map_half_is_made_of_map_colours(tmp_path):
    satellite, drawn, ground = landscape(np.random.default_rng(0), 96)
    colors = {tuple(c) for c in drawn.reshape(-1, 3).tolist()}
    assert (
        colors <= set(ClassTable.load("maps").colors)
        and satellite.std() > 20
        and len(np.unique(ground)) >= 4
    )


# ----------------------------------------------------------------------------------------- measures


def test_image_measures_by_hand():
    target = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    fake = target.clone()
    fake[:, 0, :, :8] += 6  # one channel of half of the pixels is 6 levels off
    measured = {name: value.item() for name, value in measure_images(fake, target).items()}
    assert measured["mse"] == pytest.approx(36 / 6)
    assert measured["psnr"] == pytest.approx(10 * np.log10(255**2 / 6))
    assert (measured["accuracy_5"], measured["accuracy_10"]) == (0.5, 1.0)
    assert measured["rmse_rgb"] == pytest.approx(np.sqrt(36 / 2))
    same = measure_images(target, target)
    assert same["ssim"].item() == pytest.approx(1.0) and same["accuracy_5"].item() == 1.0


def test_accuracies_are_strict_and_rmse_rgb_sums_over_channels():
    """A pixel 5 levels off is not within 5; (3, 4, 0) off everywhere is 5 off in all."""
    target = torch.zeros((1, 3, 16, 16), dtype=torch.uint8)
    for off, five, ten in ((4, 1, 1), (5, 0, 1), (9, 0, 1), (10, 0, 0)):
        measured = measure_images(target + off, target)
        assert (measured["accuracy_5"].item(), measured["accuracy_10"].item()) == (five, ten)
    fake = target + torch.tensor([3, 4, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    assert measure_images(fake, target)["rmse_rgb"].item() == pytest.approx(5)


def test_ssim_of_constants_by_hand():
    a, b = (torch.full((1, 3, 16, 16), v, dtype=torch.uint8) for v in (50, 100))
    c1 = (0.01 * 255) ** 2
    want = (2 * 50 * 100 + c1) / (50**2 + 100**2 + c1)
    assert measure_images(a, b)["ssim"].item() == pytest.approx(want, rel=1e-6)


def test_scores_are_means_over_images_and_rmse_the_root_of_the_mean():
    """Three images, off by 2, 0 and 4 levels everywhere, in batches of two and one."""
    target, scores = torch.zeros(3, 3, 16, 16), common.Scores()
    guess = target + torch.tensor([2.0, 0.0, 4.0]).view(3, 1, 1, 1) / 127.5
    for part in (slice(0, 2), slice(2, 3)):
        scores.add_images("model", guess[part], target[part])
    row = scores.table()["model"]
    assert row["rmse"] == pytest.approx(np.sqrt((4 + 0 + 16) / 3))
    assert row["rmse_rgb"] == pytest.approx(np.sqrt(3) * (2 + 0 + 4) / 3)  # the mean over images
    assert row["accuracy_5"] == 1.0 and row["accuracy_10"] == 1.0


def test_scores_of_edits_by_hand():
    """10 levels off in a box of 4 x 8, 1 off elsewhere; the second image has no edit at all."""
    mask = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    mask[0, :, :4, :8] = True
    target, scores = common.from_bytes(torch.full((2, 3, 16, 16), 128)), common.Scores()
    guess = target + torch.where(mask, 10.0, 1.0) / 127.5
    scores.add_edit("model", guess, target, target + 4 / 127.5, mask)
    row = scores.table()["model"]
    assert (row["l1_inside"], row["l1_outside"], row["l1_to_input"]) == (10.0, 1.0, 6.0)


def test_variety_is_how_much_places_differ_as_a_share_of_the_targets_differences():
    """Of pictures, of edits where both places have one, of labels where both have a class."""
    levels = torch.tensor([0, 100, 0]).view(3, 1, 1, 1).expand(3, 3, 16, 16)
    quarter, half, target = map(common.from_bytes, (levels // 4, levels // 2, levels))
    mask, scores = torch.ones(3, 1, 16, 16, dtype=torch.bool), common.Scores()
    mask[0, :, :8] = False
    scores.add_images("picture", quarter, target)
    scores.add_edit("edit", torch.where(mask, half, target), target, target, mask)
    labels = torch.tensor([[0, 1, 1, 255], [1, 1, 2, 0]]).view(2, 1, 4)
    scores.add_labels("labels", torch.tensor([[0, 0, 1, 0], [2, 0, 1, 1]]).view(2, 1, 4), labels, 3)
    scores.add_images("one place", target[:1], target[:1])
    rows = scores.table()
    assert rows["picture"]["variety"] == 0.25 and rows["edit"]["variety"] == 0.5
    assert rows["labels"]["class_variety"] == 0.5 and "variety" not in rows["one place"]


def test_label_measures_by_hand():
    target = torch.tensor([0, 0, 0, 1, 1, 255])
    predicted = torch.tensor([0, 0, 1, 1, 1, 0])
    confusion = confusion_matrix(predicted, target, 3)
    assert confusion.tolist() == [[2, 1, 0], [0, 2, 0], [0, 0, 0]]
    measured = measure_labels(confusion)
    assert measured["pixel_accuracy"] == pytest.approx(4 / 5)
    assert measured["class_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert measured["mean_iou"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_constant_guesses():
    images = np.zeros((2, 3, 4, 4), np.uint8)
    images[0, 0], images[1, 1, :1] = 200, 80
    store = types.SimpleNamespace(A=images, B=images, paired=True, classes=None)
    store.rows, store.known = {"A": images, "B": images}, lambda *_: None
    counts = ImageStore.histograms(store)["A"]
    guesses = common.constant_colors(counts)
    bytes_of = {name: to_bytes(color).tolist() for name, color in guesses.items()}
    assert bytes_of == {"mean training colour": [100, 10, 0], "median training colour": [0, 0, 0]}
    table = ClassTable.load(json.dumps(TABLE))
    labels = np.array([0, 1, 1, 2, 1, 255, 255, 255, 255], np.uint8).reshape(1, 1, 3, 3)
    counts = torch.from_numpy(np.bincount(labels.ravel(), minlength=256)[None])
    frequent = to_bytes(common.constant_colors(counts, table)["most frequent class"])
    assert tuple(frequent.tolist()) == table.colors[1]
    drawn = torch.tensor(table.colors[2]).view(1, 3, 1, 1)
    assert pix2pix.nearest_class(common.from_bytes(drawn), table).item() == 2


def test_colours_of_the_classes():
    """By hand: what each class looked like; all pixels' colour for classes that were not seen."""
    table = ClassTable.load(json.dumps(TABLE))
    labels = np.array([[0, 0, 0, 1], [1, 1, 1, 255]], np.uint8).reshape(2, 1, 2, 2)
    images = np.zeros((2, 3, 2, 2), np.uint8)
    images[0, 0] = [[10, 20], [90, 200]]  # red, of the first image: three of class 0, one of 1
    images[1, 1] = [[4, 4], [4, 80]]  # green, of the second: three of class 1, one ignored
    store = types.SimpleNamespace(A=images, B=labels, paired=True, classes=table)
    store.rows, store.known = {"A": images, "B": labels}, lambda *_: None
    counts = ImageStore.histograms(store)
    assert counts["A of classes"].shape == (3, 3, 256) and counts["A of classes"].sum() == 7 * 3
    colors = common.constant_colors(counts["A"], by_class=counts["A of classes"])
    levels = {name: (color + 1) * 127.5 for name, color in colors.items()}
    everywhere = [320 / 8, 92 / 8, 0.0]
    assert levels["mean training colour"].tolist() == pytest.approx(everywhere, abs=1e-3)
    mean, median = levels["mean colour of the class"], levels["median colour of the class"]
    assert mean[0].tolist() == pytest.approx([40, 0, 0], abs=1e-3)
    assert mean[1].tolist() == pytest.approx([50, 3, 0], abs=1e-3)
    assert mean[2].tolist() == mean[255].tolist() == pytest.approx(everywhere, abs=1e-3)
    assert median[0].tolist() == pytest.approx([20, 0, 0], abs=1e-3)
    assert median[1].tolist() == pytest.approx([0, 4, 0], abs=1e-3)
    shown = common.constant_guesses(colors, torch.zeros(2, 3, 2, 2), torch.from_numpy(labels[:, 0]))
    mean = to_bytes(shown["mean colour of the class"])
    assert mean[:, 0].tolist() == [[[40, 40], [40, 50]], [[50, 50], [50, 40]]]
    assert (to_bytes(shown["mean training colour"])[:, 0] == 40).all()


def test_bytes_and_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(common.from_bytes(levels)), levels)
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert (as_array(common.from_bytes(as_tensor(picture, "cpu"))) == picture).all()
    assert common.from_bytes(as_tensor(picture, "cpu")).is_contiguous()
    assert to_bytes(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_one_hot_and_back():
    index = torch.from_numpy(INDEX)[None]
    maps = common.one_hot(index, 3)
    assert maps.shape == (1, 3, *INDEX.shape) and maps.sum() == (INDEX < 3).sum()
    assert torch.equal(common.class_index(maps), index.long())


def test_drawn_classes_have_the_colours_of_the_table(table):
    drawn = to_bytes(common.draw(torch.from_numpy(INDEX)[None], table))
    assert (drawn[0].permute(1, 2, 0).numpy() == table.palette[INDEX]).all()


def test_ranks_get_disjoint_rows(monkeypatch):
    order = np.random.default_rng(0).permutation(11)
    rows = []
    for rank in range(2):
        as_rank(monkeypatch, rank)
        rows.append(next(common.batches_of_rank(2, 0, order)))
    assert rows[0].shape == (2, 2) and len(set(np.concatenate(rows).ravel().tolist())) == 8
    with pytest.raises(UserError, match="--batch-size 6"):
        next(common.batches_of_rank(6, 0, order))


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().size = 3


def palette_file(path, codes, colors, how):
    """A paletted PNG or TIFF of these codes; colors {code: "#rrggbb"}."""
    palette = np.zeros((256, 3), np.uint8)
    for code, color in colors.items():
        palette[code] = tuple(bytes.fromhex(color[1:]))
    image = Image.fromarray(codes)
    image.putpalette(palette.tobytes())
    image.save(path.with_suffix(how))
    return path.with_suffix(how)


@pytest.mark.parametrize("how", [".png", ".tif"])
def test_codes_or_colours_of_a_palette(tmp_path, how):
    """Values that a table names decide, whatever the colours; else most of the colours."""
    codes = np.array([[1, 2, 3, 4]], np.uint8)
    rows = [{"name": f"n{k}", "color": f"#{40 * k:02x}0000"} for k in range(1, 5)]
    valued = ClassTable.load(json.dumps([row | {"value": k} for k, row in enumerate(rows, 1)]))
    colors = {k: row["color"] for k, row in enumerate(rows, 1)}
    reds = colors | {4: "#f00000"}  # another red than the table's
    twins = colors | {4: colors[3]}  # two codes that share a colour
    for name, shown in (("reds", reds), ("twins", twins)):
        file = palette_file(tmp_path / name, codes, shown, how)
        assert Raster(file, valued).read().tolist() == [[0, 1, 2, 3]], name
    order = {1: colors[4], 2: colors[3], 3: colors[2], 4: colors[1]}  # codes that mean nothing
    file = palette_file(tmp_path / "order", codes, order, how)
    assert Raster(file, ClassTable.load(json.dumps(rows))).read().tolist() == [[3, 2, 1, 0]]
    far = ClassTable.load(json.dumps([row | {"value": k} for k, row in enumerate(rows, 50)]))
    assert Raster(file, far).read().tolist() == [[3, 2, 1, 0]]  # none of its values occurs
