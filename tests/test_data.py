"""Layouts and their refusals, label maps, the store, the demo world."""

import contextlib
import dataclasses
import errno
import functools
import io
import itertools
import json
import os
import re
import shutil
import struct
import sys
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import common
import pix2pix
import support.batches
import support.store
from common import ImageStore
from files import (
    CLASSES,
    TABLE,
    geotiff,
    land_cover,
    noise,
    picture,
    pictures_in,
    pixels_of,
    save,
    side_by_side,
    touch,
)
from pix2pix import Config
from runs import line_of, refused
from support import errors
from support.classes import ClassTable
from support.demo import DEMO_CLASSES, demo_world, landscape
from support.layouts import find_images
from support.limits import Limits
from support.measures import confusion_matrix, measure_images, measure_labels, print_table
from support.pairs import Half
from support.pictures import as_array, as_tensor, resize, to_bytes
from support.rasters import Raster
from tensors import CPU, calls_of


def store_of(root, cache, side=32, split="train", **options):
    return ImageStore(Config(data=str(root), cache=str(cache), **options), split, side)


# ------------------------------------------------------------------------------------------ layouts

HELD_OUT, KEPT = "austin1 austin5 chicago3 kitsap4 tyrol-w2 vienna1", "austin6 tyrol-w10 vienna36"
ALL = sorted(f"{HELD_OUT} {KEPT}".split())
INRIA = " ".join(f"train/{side}/{name}.tif" for side in ("images", "gt") for name in ALL)

# case: (files, the layout that is found, stems of A, and of B where they differ)
LAYOUTS = {
    "side by side": ("train/10.jpg train/9.png", "side by side, train", "10 9"),
    "two folders": ("train/A/x.png train/A/x.q.png train/B/x.webp train/B/x.q.jpg",
                    "two folders, train", "x x.q"),
    "two folders, small": ("train/a/x.png train/b/x.png", "two folders, train", "x"),
    "unaligned": ("trainA/2.jpg trainA/1.jpg trainB/3.jpg", "unaligned, train", "1 2", "3"),
    "land cover": ("train/rgb/7.png train/lc/7.npz classes.json", "land cover, train", "7"),
    "Inria": (INRIA, "Inria, train", KEPT),
    "val of Inria": (INRIA, "Inria, train, images 1-5 of each city", HELD_OUT),
    "Inria with val": (INRIA + " val/images/x.tif val/gt/x.tif", "Inria, train", " ".join(ALL)),
    "Inria with valid": (INRIA + " valid/images/x.tif valid/gt/x.tif", "Inria, train",
                         " ".join(ALL)),
    "test of Inria": (INRIA + " test/images/x.tif test/gt/x.tif", "Inria, test", "x"),
    "Inria with a trial": (INRIA + " tiny/images/x.tif tiny/gt/x.tif", "Inria, train", KEPT),
    "a folder gt alone": ("train/1.png train/gt/1.png", "side by side, train", "1"),
    "masks": ("train/images/7.jpg train/masks/7.png classes.json", "masks, train", "7"),
    "two endings": ("train/1_A.png train/1_B.png train/2_B.jpg train/2_A.png",
                    "two endings, train", "1_A 2_A", "1_B 2_B"),
    "a satellite image and a mask": ("train/9_sat.jpg train/9_mask.png classes.json",
                                     "two endings, train", "9_sat", "9_mask"),
    "one of two endings": ("train/1_A.png train/2_A.png", "side by side, train", "1_A 2_A"),
    "other names, too": ("train/1_A.png train/2_B.png train/3.png", "side by side, train",
                         "1_A 2_B 3"),
    "zipped on a Mac": ("train/A/\u00e9.png train/B/e\u0301.png", "two folders, train",
                        "\u00e9", "e\u0301"),
    "val before test": ("val/1.png test/2.png", "side by side, val", "1"),
    "val, validation": ("validation/1.png test/2.png", "side by side, validation", "1"),
    "val, valid": ("valid/1.png test/2.png", "side by side, valid", "1"),
    "val, test": ("train/1.png test/2.png", "side by side, test", "2"),
    "in capitals": ("train/1.JPG train/2.Tif", "side by side, train", "1 2"),
    "read where they are named": ("train/1.jp2 train/2.vrt train/3.gpkg train/4.gif",
                                  "side by side, train", "1"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(tmp_path, case):
    names, layout, a, *b = LAYOUTS[case]
    touch(*map(tmp_path.joinpath, names.split()))
    for path in list(tmp_path.rglob("*.*")):  # as macOS leaves them
        touch(path.with_name(f"._{path.name}"))
    if "classes.json" in names:
        (tmp_path / "classes.json").write_text(json.dumps(TABLE))
    split = case.split()[0].strip(",")
    found = find_images(tmp_path, split if split in ("val", "test") else "train")
    stems = [" ".join(path.stem for path in paths) for paths in (found.A, found.B)]
    assert f"{found.layout}, {found.name}" == layout and stems == [a, *(b or [a])]
    assert found.paired == ("unaligned" not in layout) and found.halves == ("side" in layout)
    assert bool(found.classes) == ("classes.json" in names or found.layout == "Inria")


def test_training_images_validate_in_no_other_layout(tmp_path):
    touch(*(tmp_path / "train" / name for name in ("A/vienna1.png", "B/vienna1.png", "gt/x.png")))
    with refused("no images of split val"):  # before anything is decoded
        common.begin(Config, "", {}, ["--data", str(tmp_path), "--out", str(tmp_path / "run")])


def test_classes_turn_any_layout_into_label_maps(pairs, landcover, tmp_path, capsys):
    touch(*(tmp_path / "train" / side / "x6.tif" for side in ("images", "gt")))
    (tmp_path / "classes.json").write_text(json.dumps(TABLE))
    assert find_images(tmp_path, "train").classes == CLASSES  # and not binary
    (tmp_path / "classes.json").write_text('{"classes": [], "tags": []}')  # another program's
    assert find_images(tmp_path, "train", "binary").classes.names[1] == "foreground"
    assert (
        "classes.json: differs from the class table in use (background" in capsys.readouterr().err
    )
    with refused("unknown key tags"):
        find_images(tmp_path, "train")
    split = find_images(pairs, "train", "maps")
    assert split.classes.names[4] == "water" and split.halves
    assert find_images(landcover, "train", "pictures").classes is None


KNOWN = "side by side.*two folders.*unaligned.*land cover.*Inria.*masks.*two endings"
NOT_LAYOUTS = {
    "nowhere": ("", "no such directory"),
    "other folders": ("train/sat/1.png train/map/1.png train/notes.txt",
                      f"train has map, notes.txt, sat .sub-folders are not searched.*{KNOWN}"),
    "sub-folders": ("train/A/x/1.png train/B/1.png", "train/A: .*has x .*not searched"),
    "twins on a Mac": ("train/A/\u00e9.png train/A/e\u0301.png train/B/\u00e9.png",
                       "the same name but for"),
    "another ending": ("train/1_A.png train/1_B.png train/x.png", "x.png: ends neither in _A nor"),
    "a lone ending": ("train/1_A.png train/1_B.png train/2_A.png", "2_A.png has no par"),
    "no masks": ("train/1_sat.jpg train/2_sat.jpg", "train: no _mask beside 1_sat.jpg$"),
    "val without masks": ("train/1_sat.jpg train/1_mask.png test/2_sat.jpg",
                          "test: no _mask beside 2_sat.jpg: put some pairs into val/$"),
    "masks without a table": ("train/images/x.png train/masks/x.png", "s2glc, maps or b"),
    "a mask without a table": ("train/x_sat.png train/x_mask.png", "s2glc, maps or bin"),
    "nothing": ("x/notes.txt", f"images of split train: .*data has x .*{KNOWN}"),
    "val": ("train/1.png", "put some into val/ or validation/ or valid/ or test/, as in"),
    "val of domains": ("trainA/1.png trainB/1.png", "some into valA/ and valB/ or valid"),
    "val of another city": ("train/images/berlin1.tif train/gt/berlin1.tif train/overview.png",
                            "split val: put some into val/ or validation/ or valid/ or test/, as"),
    "val of half a city": ("train/images/vienna1.tif train/gt/vienna6.tif",
                           "train/gt: no images in split val: it has vienna6.tif"),
    "val without images": ("train/images/vienna1.tif train/gt/vienna1.tif val/images/x val/gt/x",
                           "val/images: no images in split val: it has x "),
    "test": ("train/1.png val/1.png", "split test: put some into test/, as in training"),
    "val of nothing": ("val/x.txt", f"images of split val: .*val has x.txt.*{KNOWN}"),
    "a lone file": ("train/A/x.png train/A/y.png train/B/x.png",
                    "2 images and 1: .*y.png has no partner"),
    "two endings": ("train/1_A.png train/2_B.png", "1 images and 1: .*1_A.png has no partner"),
    "a lone file of B": ("train/A/x.png train/B/x.png train/B/y.png", "y.png has no partner"),
    "twins": ("train/A/x.png train/A/x.jpg train/B/x.png", "but for the ending"),
    "no class table": ("train/rgb/x.png train/lc/x.png", "pass --lc-classes s2glc"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_LAYOUTS)
def test_refuses_directories_with_one_line_that_helps(tmp_path, case):
    names, text = NOT_LAYOUTS[case]
    touch(*map((tmp_path / "data").joinpath, names.split()))
    with refused(text):
        split = case.split()[0]
        find_images(tmp_path / "data", split if split in ("val", "test") else "train")


# --------------------------------------------------------------------------------------- label maps

INDEX = np.array([[0, 1, 2, 0, 1], [2, 255, 1, 0, 0]], np.uint8)
CODES = np.where(INDEX == 255, np.uint8(3), INDEX)  # 3 is the row of the table that is ignored
ONE_HOT = (INDEX[..., None] == np.arange(3)).astype(np.float32)
COLOURS = CLASSES.palette[INDEX]
STRAY = np.where(INDEX[..., None] == 255, np.uint8((0x84, 0x29, 0xF0)), COLOURS)  # like no class

VALUED = [{"name": f"n{k}", "color": f"0,{k},0", "value": k} for k in (1, 2, 3)]
MIXED = [VALUED[2], {"name": "x", "color": "#000001"}]  # the value of a row without one: its place
IGNORED_SECOND = [TABLE[0], TABLE[3], *TABLE[1:3]]
EXACT = [{"name": "no", "color": "#000000"}, {"name": "yes", "color": "#ffffff"}]
NEAREST = {"nearest": True, "classes": EXACT}
INK = [{"name": color, "color": color} for color in ("#F00000", "#101010", "#FDFDFD")]
INK = {"nearest": True, "classes": INK}
RGB = [{"name": c, "color": c} for c in ("#000000", "#ff0000", "#00ff00")]
INKS = [{"name": "no", "color": "#101010", "value": 7}, {"name": "yes", "color": "#ffffff"}]
GREY = [{"name": f"n{k}", "color": f"{k},{k},{k}", "value": k} for k in (0, 128)]
BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)
S2GLC = "values [1] are not in the class table (0 Clouds, 62 Artificial"
GREYS = [0, 90, 200, 255]
NOTHING = "a photograph, another --lc-classes, or mostly"


def partly(known):
    """Of 1000 pixels the first are land, the others like no class."""
    land = np.arange(1000).reshape(10, 100, 1) < known
    return np.where(land, CLASSES.palette[0], np.uint8(7))


def with_alpha(pixels):
    """Pixels, transparent and 7 where INDEX has no class."""
    none = INDEX[..., None] == 255
    return np.dstack([np.where(none, np.uint8(7), np.atleast_3d(pixels)), ~none * np.uint8(255)])


def in_three(*levels):
    """A row of greys in three bands."""
    return np.dstack([np.array([levels], np.uint8)] * 3)


HALF = np.dstack([CLASSES.palette[np.uint8([[1] * 4])], np.uint8([[0, 1, 100, 255]])])


def paletted(codes, *colours, rest=None):
    """A row of codes of a palette, which may be filled up with a colour."""
    image = Image.fromarray(np.array([codes], np.uint8))
    filled = [rest] * (256 - len(colours)) if rest else []
    image.putpalette(np.ravel([*colours, *filled]).tolist())
    return image


def reds(*levels, codes=(1, 2, 3, 4)):
    """Codes of which 1, 2, 3 and 4 are shades of red, and 0 is black."""
    return paletted(codes, BLACK, *((level, 0, 0) for level in levels))


REDS = [{"name": f"n{k}", "color": f"{40 * k},0,0"} for k in range(1, 5)]
VALUED_REDS = [row | {"value": k} for k, row in enumerate(REDS, 1)]
FAR_REDS = [row | {"value": k} for k, row in enumerate(REDS, 50)]  # none of the values occurs

# case: (class table, files, pixels or a row of codes, indices or the end of a message)
LABELS = {
    "transparent": (TABLE, "x.png", with_alpha(COLOURS), INDEX),
    "transparent grey": (TABLE, "x.png", Image.fromarray(with_alpha(INDEX), "LA"), INDEX),
    "transparent photograph": (TABLE, "x.png", with_alpha(COLOURS // 2), NOTHING),
    "a palette of greys": (EXACT, "x.png", Image.fromarray(INDEX % 2).convert("P"), INDEX % 2),
    "indices": (TABLE, "x.png x.tif", CODES, INDEX),
    "colours": (TABLE, "x.png x.tif", COLOURS, INDEX),
    "a stray colour": (TABLE, "x.png x.tif", STRAY, INDEX),
    "integers": (TABLE, "x.npy", CODES.astype(np.int64), INDEX),
    "an axis of 1": (TABLE, "x.npy", CODES[None], INDEX),
    "a last axis of 1": (TABLE, "x.npy", CODES[..., None], INDEX),
    "one-hot, a row ignored": (IGNORED_SECOND, "x.npz", ONE_HOT, INDEX),
    "one-hot, channels first": (TABLE, "x.npz", np.moveaxis(ONE_HOT, -1, 0), INDEX),
    "one-hot of all rows": (TABLE, "x.npz", CODES[..., None] == np.arange(4), INDEX),
    "one-hot of 255": (TABLE, "x.npz", ONE_HOT * 255, INDEX),
    "several classes at once": (TABLE, "x.npy", np.ones((4, 4, 3)), "is not one-hot"),
    "no numbers": (TABLE, "x.npy", np.full((4, 4, 3), np.nan), "is not one-hot"),
    "a fraction": (TABLE, "x.npy", [0.7], "[0.7] are not in the class table ("),
    "s2glc": ("s2glc", "x.png", [0, 62, 162, 255], [0, 1, 13, 255]),
    "positions in s2glc": ("s2glc", "x.png", [0, 1], S2GLC),
    "a position": (VALUED, "x.png", [0, 1, 2], "[0] are not in"),
    "some values": (MIXED, "x.png", [3, 1], [0, 1]),
    "no values, a row ignored": (IGNORED_SECOND, "x.png", [0, 1, 2, 3], [0, 255, 1, 2]),
    "soft edges": (NEAREST, "x.png x.tif", GREYS, [0, 0, 1, 1]),
    "binary, 0 and 1": ("binary", "x.png x.tif", [0, 1, 1, 0], "[1] are not in"),
    "more codes": (NEAREST, "x.tif", [0, 1, 2, 3], "[2, 3] are not in"),
    "binary, 254": ("binary", "x.png x.tif", [0, 254, 255, 0], [0, 1, 1, 0]),
    "a grey photograph": ("binary", "x.png", [90, 100, 0, 140], NOTHING),
    "three bands of codes": (TABLE, "x.png", np.dstack([CODES] * 3), INDEX),
    "three bands of codes, 255": (TABLE, "x.tif", np.dstack([INDEX] * 3), INDEX),
    "three bands, soft": ("binary", "x.png x.tif", in_three(*GREYS), [0, 0, 1, 1]),
    "three bands of codes, one is black": (RGB, "x.png", in_three(0, 1, 2), [0, 1, 2]),
    "three bands of codes, nearest": ("maps", "x.tif", in_three(0, 1, 8), [0, 1, 8]),
    "white and stray greys": (EXACT + RGB[1:], "x.png", in_three(0, 2, 3, 255), [0, 255, 255, 1]),
    "colours and a stray grey": (INKS, "x.png", in_three(7, 16, 255), [255, 0, 1]),
    "three bands of dark JPEG": (VALUED_REDS, "x.jpg", in_three(1, 1, 2, 2), NOTHING),
    "black and a stray grey": (EXACT, "x.png", in_three(0, 7, 7, 0), [0, 255, 255, 0]),
    "black alone": (EXACT[::-1], "x.tif", in_three(0, 0), [1, 1]),
    "white and a stray black": ("s2glc", "x.png", in_three(0, 255), [255, 0]),
    "black without a class": ("s2glc", "x.png", in_three(0, 0), NOTHING),
    "white of a JPEG": ("maps", "x.jpg", in_three(255, 255), [2, 2]),
    "binary, 254 alone": ("binary", "x.png", [254, 254], [1, 1]),
    "binary, 2 and 255": ("binary", "x.png", [0, 2, 255], [0, 0, 1]),
    "binary, dark greys": ("binary", "x.png", [0, 2, 3], "[2, 3] are not in"),
    "binary, a dark JPEG": ("binary", "x.jpg", [1, 1], [0, 0]),
    "binary, red": ("binary", "x.png", np.uint8([[[0, 0, 0], [255, 0, 0]]]), [0, 255]),
    "three bands of black and 1": (EXACT, "x.png", in_three(0, 1), [0, 1]),
    "three bands near one colour": (INK, "x.png", in_three(1, 2), [1, 1]),
    "codes and 255": (NEAREST, "x.png", [0, 1, 255], [0, 1, 255]),
    "greys, 255 is none": (GREY, "x.png", [0, 128, 140, 255], [0, 1, 1, 255]),
    "a palette filled up": ("binary", "x.tif", paletted([255], BLACK, RED, rest=BLACK), [1]),
    "a palette of one white": ("binary", "x.png", paletted([0, 255], rest=WHITE), [0, 1]),
    "white first": ("binary", "x.png", paletted([0, 1, 1], WHITE, rest=BLACK), [1, 0, 0]),
    "white alone, first": ("binary", "x.png", paletted([0, 0, 0], WHITE, rest=BLACK), [1, 1, 1]),
    "20 levels off": (NEAREST, "x.png", np.full((2, 5, 3), (20, 0, 0), np.uint8), INDEX * 0),
    "40 levels off": (NEAREST, "x.png", np.full((2, 5, 3), (40, 0, 0), np.uint8), NOTHING),
    "known in 1.5 %": (TABLE, "x.png", partly(15), 255 * (partly(15)[..., 0] == 7)),
    "known in 0.5 %": (TABLE, "x.png", partly(5), NOTHING),
    "no nearest": (EXACT, "x.png", GREYS, "[90, 200] are not in"),
    "half transparent": (TABLE, "x.png", HALF, [255, 1, 1, 1]),
}
# values that a table names decide, else most of the colours
PALETTES = {
    "another red": (VALUED_REDS, reds(40, 80, 120, 240), [0, 1, 2, 3]),
    "one red twice": (VALUED_REDS, reds(40, 80, 120, 120), [0, 1, 2, 3]),
    "one of the reds": (REDS, reds(160, 120, 80, 40, codes=[1, 0, 0, 0]), [3, 255, 255, 255]),
    "a palette of one red": (REDS, reds(160, codes=[1] * 4), [3] * 4),
    "too many reds": (VALUED_REDS[:3], reds(40, 80, 120, 160), [0, 1, 2, 255]),
    "too many reds, one is another": (VALUED_REDS[:3], reds(40, 77, 120, 160), "[4] are not in"),
    "a stray before the last red": (VALUED_REDS[:3], reds(40, 80, 77, 120), [0, 1, 255, 2]),
    "reds in another order, and strays": (VALUED_REDS[:3], reds(80, 77, 120, 7), [1, 255, 2, 255]),
    "strays, and no values": (REDS[:3], reds(80, 77, 160, 7, 40, 120), [1, 255, 255, 255]),
    "a stray shifts the reds": (VALUED_REDS[:3], reds(40, 77, 80, 120), [0, 255, 1, 2]),
    "a stray beside an ignored red": (
        VALUED_REDS[:2] + [VALUED_REDS[2] | {"ignore": True}],
        reds(40, 80, 119, 77),
        [0, 1, 255, 255],
    ),
    "reds and codes in another order": (VALUED_REDS[:3], reds(80, 40, 77, 120), [1, 0, 255, 2]),
    "half of the reds": (FAR_REDS, reds(160, 120, 9, 7), "are not in"),
    "other values": (FAR_REDS, reds(160, 120, 80, 40), [3, 2, 1, 0]),
}
for name, (table, image, want) in PALETTES.items():
    LABELS[name] = table, "x.png x.tif", image, want

NONE = INDEX == 255
VALUES = [row | {"value": k} for k, row in enumerate(TABLE)]
SWAPPED = {"nearest": True, "classes": [EXACT[0] | {"value": 250}, EXACT[1] | {"value": 1}]}
WHOLE = np.where(NONE, np.uint8(1), INDEX)
FAR = np.zeros((1, 2520), np.uint8)  # the pixels that are looked at first have no soft edges
FAR[0, 2500:] = [*[200, 60] * 5, *[254] * 10]
FAR_COLOUR = np.zeros((1, 3000, 3), np.uint8)
FAR_COLOUR[0, 2500] = 9, 0, 0
FLOATS = INDEX.astype(np.float32)
# case: (class table, pixels of a GeoTIFF, its profile, indices)
GEOTIFFS = {
    "codes of 16 bits": (TABLE, CODES.astype(np.uint16), {}, INDEX),
    "floats": (TABLE, FLOATS, {}, INDEX),
    "NaN": (TABLE, np.where(NONE, np.nan, FLOATS), {}, INDEX),
    "NaN is no data": (TABLE, np.where(NONE, np.nan, FLOATS), {"nodata": np.nan}, INDEX),
    "floats, no data": (TABLE, np.where(NONE, -3e38, FLOATS), {"nodata": -3e38}, INDEX),
    "no data": (TABLE, np.where(NONE, np.uint8(99), INDEX), {"nodata": 99}, INDEX),
    "no data that is a class": (TABLE, WHOLE, {"nodata": 2}, WHOLE),
    "a mask, no data that is a class": (TABLE, WHOLE, {"nodata": 2, "valid": ~NONE}, INDEX),
    "a mask over a stranger": (TABLE, np.where(NONE, np.uint8(77), INDEX), {"valid": ~NONE}, INDEX),
    "no data, nearest": (SWAPPED, np.array([250, 1, 1, 0], np.uint8)[INDEX.clip(0, 3)],
                         {"nodata": 0}, np.where(NONE, 255, INDEX > 0)),
    "no data of a mask": ("binary", np.where(NONE, -9, np.int16(255) * (INDEX == 1)),
                          {"nodata": -9}, np.where(NONE, 255, INDEX == 1)),
    "soft edges far away, no data that is a class": ("binary", FAR, {"nodata": 0}, FAR > 128),
    "codes in three bands, a colour far away": (
        "binary", FAR_COLOUR, {}, "has codes, or greys, and also colours"),
    "no data in colours": (NEAREST | {"classes": TABLE[:3]},
                           np.where(NONE[..., None], np.uint8(1), COLOURS), {"nodata": 1}, INDEX),
}  # fmt: skip
for name, (table, pixels, profile, want) in GEOTIFFS.items():
    LABELS[f"GeoTIFF, {name}"] = table, "x.tif", (pixels, profile), want


def table_of(table):
    """A ClassTable of a built-in name, or of rows."""
    return ClassTable.load(table if isinstance(table, str) else json.dumps(table))


FILES = [(case, name) for case, row in LABELS.items() for name in row[1].split()]


@pytest.mark.parametrize(("case", "name"), FILES)
def test_label_maps(tmp_path, case, name):
    table, _, pixels, want = LABELS[case]
    if isinstance(pixels, list):
        pixels = np.array([pixels], np.uint8 if isinstance(pixels[0], int) else float)
    if isinstance(pixels, tuple):
        geotiff(tmp_path / name, pixels[0], **pixels[1])
    elif isinstance(pixels, Image.Image):
        pixels.save(tmp_path / name)
    else:
        {".npy": np.save, ".npz": np.savez}.get(name[1:], save)(tmp_path / name, pixels)
    if isinstance(want, str):
        with refused(re.escape(want)):
            Raster(tmp_path / name, table_of(table)).read()
        return
    want = np.atleast_2d(want)
    with Raster(tmp_path / name, table_of(table)) as raster:
        assert (raster.height, raster.width) == want.shape and (raster.read() == want).all()
        assert (raster.read(1, 2, 9, 2) == want[1:, 2:4]).all()
        assert (raster.read(0, 0, 1, 1) == want[:1, :1]).all()  # whatever a window has
        assert (raster.read(0, max(0, raster.width - 10), 1, 10) == want[:1, -10:]).all()
        assert (want[~raster.valid(0, 0, *want.shape)] == 255).all()


def test_label_maps_are_not_turned(tmp_path):
    """By the orientation that a camera writes: they were drawn, and have no upright."""
    image, exif = Image.fromarray(np.zeros((40, 60, 3), np.uint8)), Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    with Raster(tmp_path / "x.jpg", table_of(NEAREST)) as raster:
        assert (raster.height, raster.width) == raster.read().shape == (40, 60)
    with Raster(tmp_path / "x.jpg") as raster:
        assert (raster.height, raster.width, 3) == raster.read().shape == (60, 40, 3)


@pytest.mark.parametrize("bits", [2, 4])
def test_greys_of_few_bits_in_a_png_are_codes_or_else_levels(tmp_path, bits):
    for table, codes, want in ((TABLE, [0, 1, 2, 1], [0, 1, 2, 1]), ("binary", [0, -1], [0, 1])):
        codes = np.uint8(np.mod(codes, 2**bits))
        packed = np.packbits(np.unpackbits(codes[:, None], axis=1)[:, -bits:])
        header = struct.pack(">IIBBBBB", len(codes), 1, bits, 0, 0, 0, 0)
        parts = {b"IHDR": header, b"IDAT": zlib.compress(b"\0" + packed.tobytes()), b"IEND": b""}
        with open(tmp_path / "x.png", "wb") as file:
            file.write(b"\x89PNG\r\n\x1a\n")
            for name, content in parts.items():
                PngImagePlugin.putchunk(file, name, content)
        assert Raster(tmp_path / "x.png", table_of(table)).read().tolist() == [want]


def test_a_palette_that_contradicts_the_values_is_reported(tmp_path, capsys):
    for levels, said in (((80, 40), True), ((40, 80), False), ((40, 77), False)):
        shades = [(level, 0, 0) for level in levels]
        filled = [BLACK] * 252 + [(40, 0, 0)]  # the last is the colour of 255, which is no class
        paletted([1, 2, 255], BLACK, *shades, *filled).save(tmp_path / "x.png")
        errors.print_new.cache_clear()
        assert Raster(tmp_path / "x.png", table_of(VALUED_REDS)).read().tolist() == [[0, 1, 255]]
        assert ("has the colours of other classes" in capsys.readouterr().err) == said
    Image.fromarray(np.uint8([[1, 2]])).convert("P").save(tmp_path / "x.png")  # in greys
    greys = [{"name": f"n{k}", "color": ",".join(f"{3 - k}" * 3), "value": k} for k in (1, 2)]
    assert Raster(tmp_path / "x.png", table_of(greys)).read().tolist() == [[0, 1]]
    assert not capsys.readouterr().err


TWO = [{"name": "a", "color": "#010203", "value": 0}, {"name": "b", "color": "9,9,9", "value": 255}]


@pytest.mark.parametrize("name", ["x.png", "placed.png", "x.tif", "white_is_zero.tif"])
@pytest.mark.parametrize("table", ["binary", TABLE, TWO])
def test_masks_of_one_bit(tmp_path, table, name):
    """Also where the pixels that are looked at first have only one of the two."""
    mask = np.zeros((1, 3000), bool)
    mask[0, 2500:2600] = True
    if "white" in name:
        geotiff(tmp_path / name, np.uint8(~mask), nbits="1", photometric="MINISWHITE")
    else:
        save(tmp_path / name, mask)
        (tmp_path / "placed.pgw").write_text("1\n0\n0\n-1\n0\n0\n")
    assert (pixels_of(tmp_path / name) == mask).all()
    assert (Raster(tmp_path / name, table_of(table)).read() == mask).all()


JPEG_TIFF = "x.tif", {"compression": "jpeg"}


@pytest.mark.parametrize("table", ["binary", NEAREST, EXACT])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(("name", "options"), [("x.jpg", {}), ("x.webp", {}), JPEG_TIFF])
def test_masks_survive_jpeg(tmp_path, table, mode, name, options):
    index = np.zeros((64, 64), np.uint8)
    index[13:40, 9:31] = 1
    Image.fromarray(index * 255).convert(mode).save(tmp_path / name, quality=50, **options)
    assert (Raster(tmp_path / name, table_of(table)).read() == index).mean() > 0.99


OTHER_JPEGS = ("x.png", {"format": "JPEG"}), ("x.jpg", {"format": "MPO", "save_all": True})


@pytest.mark.parametrize(("name", "how"), [("x.jpg", {}), ("x.webp", {}), JPEG_TIFF, *OTHER_JPEGS])
def test_land_cover_halves_survive_compression(tmp_path, name, how):
    index = np.kron(np.arange(16).reshape(4, 4) % 3, np.ones((16, 16), int))
    both = np.hstack([picture(np.random.default_rng(0), 64, 64), CLASSES.palette[index]])
    if "save_all" in how:  # two pictures in a JPEG, as of some cameras
        how = how | {"append_images": [Image.fromarray(both)]}
    save(tmp_path / "train" / name, both, quality=80, **how)
    store = store_of(tmp_path, tmp_path / "cache", 64, lc_classes=json.dumps(TABLE))
    assert (store.B[0, 0] == index).mean() > 0.95


@pytest.mark.parametrize(
    ("levels", "want"), [([0, 128, 200, 254], [0, 1, 1, 1]), ([0, 1, 1, 0], None)]
)
def test_masks_beside_their_photographs_are_read_as_in_folders(tmp_path, levels, want):
    """In halves: soft edges, 254, and no 0 and 1."""
    both = np.hstack([picture(np.random.default_rng(0), 4, 4), in_three(*levels).repeat(4, 0)])
    save(tmp_path / "train" / "0.png", both)
    with contextlib.nullcontext() if want else refused("are not in the class table"):
        store = store_of(tmp_path, tmp_path / "cache", 4, lc_classes="binary")
        assert (store.B[0, 0] == want).all()


def test_transparent_codes_have_no_class_with_a_place_either(tmp_path):
    """Of a label map, and of one in the right half of a file."""
    codes, table = np.uint8([[0, 0, 0, 1], [0, 0, 2, 2]]), table_of(RGB)
    want = np.where(codes == 1, np.uint8(255), codes)
    image = Image.fromarray(codes)
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    for place in (False, True):
        image.save(tmp_path / "x.png", transparency=1)
        if place:
            (tmp_path / "x.pgw").write_text("1\n0\n0\n-1\n5\n5\n")
        with Raster(tmp_path / "x.png", table) as raster:
            assert bool(raster.tiff) == place and (raster.read() == want).all()
        with Raster(tmp_path / "x.png") as raster:
            half = Half(raster, 2, table)
            assert (half.read(0, 0, 2, 2) == want[:, 2:]).all()


@pytest.mark.parametrize("patch", [0, 80])
@pytest.mark.parametrize(
    ("nodata", "table", "masked", "want"),
    [(0, "binary", 80, 0), (255, "binary", 80, 0), (0, json.dumps(INKS), 80, 255),
     (0, "binary", 70, 0)],
)  # fmt: skip
def test_a_no_data_value_of_halves_may_be_a_class(tmp_path, patch, nodata, table, masked, want):
    """As in a mask in a file of its own; another one, and what a mask hides, have no class."""
    pixels = np.full((80, 160, 3), 90, np.uint8)
    pixels[:, 80:] = 255 * (np.arange(80) > 19)[:, None]
    valid = np.tile(np.arange(160) < 80 + masked, (80, 1)) if masked < 80 else None
    geotiff(tmp_path / "train" / "0.tif", pixels, valid, nodata=nodata)
    store = store_of(tmp_path, tmp_path / "cache", 80, patch=patch, lc_classes=table)
    assert (store.B[0, 0] == [want] * 20 + [1] * (masked - 20) + [255] * (80 - masked)).all()


def test_all_patches_of_a_mask_in_halves_are_read_alike(tmp_path):
    """Also one that has dark greys alone, and one in part transparent."""
    levels = np.full((8, 16, 4), 255, np.uint8)
    levels[:, :8, :3] = picture(np.random.default_rng(0), 8, 8)
    levels[:4, 8:12, :3] = levels[4:, 8:, :3] = 2
    levels[:2, 12:, 3] = 0
    save(tmp_path / "train" / "0.png", levels)
    store = store_of(tmp_path, tmp_path / "cache", 4, patch=4, lc_classes="binary")
    white, dark = store.B[1, 0], store.B[[0, 2, 3], 0]
    assert (white == [[255], [255], [1], [1]]).all() and (dark == 0).all()


def test_places_beside_a_hole_have_no_data_after_resizing():
    known = np.ones((32, 32), bool)
    known[9, 9] = False
    small = resize(known, (16, 16))
    assert (small[3:6, 3:6] == 0).all() and (small == 255).mean() > 0.8


@pytest.mark.parametrize("nearest", [False, True])
def test_refuses_pictures_as_label_maps(tmp_path, nearest):
    """JPEG-compressed label maps of the same places are accepted, at any quality."""
    table = dataclasses.replace(CLASSES, nearest=nearest)
    photo, _, classes = landscape(np.random.default_rng(0), 128)
    for name in ("x.jpg", "x.png", "x.tif"):
        save(tmp_path / name, photo)
        with refused(f"{name}: not the colours of the class table"):
            Raster(tmp_path / name, table).read()
        pairs = tmp_path / f"pairs {name}"
        save(pairs / "train" / name, np.hstack([photo, photo]))
        for patch in (0, 64):
            with refused(f"{name}: not the colours of the class table"):
                store_of(pairs, tmp_path, 64, patch=patch, lc_classes=table.text)
    index = np.uint8(classes % 3).repeat(4, 0).repeat(4, 1)
    of_maps = table_of("maps")
    for quality, colours, share in ((30, table, 0.75), (95, table, 0.75), (80, of_maps, 0.95)):
        save(tmp_path / "lc.jpg", colours.palette[index], quality=quality)
        assert (Raster(tmp_path / "lc.jpg", colours).read() == index).mean() > share


# what the second row of a table may not have; --paint reads names in any case
ROWS = {
    "colour": ["#000000"],
    "value": [0, -1, 65536, 1.5, True, float("inf")],
    "ignore": ["no"],
    "name": [7, TABLE[0]["name"], "Land"],
    "color": ["1,2", "300,0,0", "0,-1,0", "red", [1.5, 2, 3], [255, 0, 0], "#00112233",
              "#e2a9291", "#+1+2+3", TABLE[0]["color"]],
}  # fmt: skip


def test_class_tables_are_read_strictly():
    for text in ("[]", '[{"name": "x"}]', "{", '[{"name": "x", "color": "#12"}]', TABLE[:1]):
        with refused("class table .*: "):
            table_of(text)
    for more in ({"nearest": "false"}, {"Nearest": True}):
        with refused("class table .*earest.*: write "):
            table_of({"classes": TABLE} | more)
    for key, values in ROWS.items():
        for value in values:
            with refused(f"class table .*{key}.*: write "):
                table_of([TABLE[0], TABLE[1] | {key: value}])


def test_class_table_round_trip():
    assert table_of([*TABLE[:3], TABLE[3] | {"value": -9}]).values[-9] == 255  # as no data
    assert ClassTable.load(CLASSES.text) == CLASSES and ClassTable.load("") is None
    assert ClassTable.load(ClassTable.load("maps").text) == ClassTable.load("maps")
    values = sorted(ClassTable.load("s2glc").values)  # of Malinowski et al. 2020, and 0 for clouds
    assert values == [0, 62, 73, 75, 82, 83, 102, 103, 104, 105, 106, 121, 123, 162]
    tables = [ClassTable.load(name) for name in ("s2glc", "maps", "binary")]
    names = ["".join(name[:2] for name in table.names) for table in tables]
    assert names == ["ClArCuViBrCoHeMoScMaPeNaPeWa", "laburomowapacepaai", "bafo"]
    sums = [int(np.dot(np.ravel(x.colors), np.arange(3 * len(x)))) for x in tables]
    assert sums == [101298, 71409, 3060]
    colors = [list(bytes.fromhex(row["color"][1:])) for row in TABLE]
    assert CLASSES.palette[[0, 1, 2, 255, 3]].tolist() == [*colors, [0, 0, 0]]
    two_ignored = table_of([*TABLE, {"name": "cloud", "color": "255,0,0", "ignore": True}])
    assert two_ignored.palette[255].tolist() == colors[3]  # the first colour of what is ignored


# ---------------------------------------------------------------------------------------- the store


def test_store_holds_the_resized_images(pairs, tmp_path):
    store = store_of(pairs, tmp_path, 40)
    both = Image.open(pairs / "train" / "3.png")
    a = np.asarray(both.crop((0, 0, 80, 80)).resize((40, 40), Image.Resampling.BICUBIC))
    assert (store.A[3].transpose(1, 2, 0) == a).all() and store.records.shape == (6, 6, 40, 40)
    assert np.shares_memory(store.A, store.records)


def test_training_pieces_may_overlap(tmp_path, capsys):
    """--stride, along both sides; validation pieces do not."""
    pictures_in(tmp_path, "train/A/x.png train/B/x.png val/A/x.png val/B/x.png", 70, 100)
    store = store_of(tmp_path, tmp_path / "cache", patch=32, stride=20)
    corners = [(top, left) for top in (0, 20) for left in (0, 20, 40, 60)]
    for side in "AB":
        whole = pixels_of(tmp_path / "train" / side / "x.png")
        for (top, left), piece in zip(corners, getattr(store, side), strict=True):
            want = whole[top : top + 32, left : left + 32]
            assert (piece.transpose(1, 2, 0) == want).all()
    assert "cut into 8 patches of 32, every 20 pixels" in capsys.readouterr().err
    assert len(store_of(tmp_path, tmp_path / "cache", patch=32, stride=20, split="val").A) == 6
    assert "every" not in capsys.readouterr().err
    assert len(store_of(tmp_path, tmp_path / "cache", patch=32).A) == 6  # another store
    with refused("--stride is for pieces: pass --patch"):
        store_of(tmp_path, tmp_path / "cache", stride=20)


def test_patches_of_labels(tmp_path, capsys):
    """Two rasters of two by two; others are smaller than a patch and give none."""
    rng, rows = np.random.default_rng(0), []
    for name, shape in (("a", (50, 45)), ("b", (50, 45)), ("low", (19, 45)), ("narrow", (45, 19))):
        index = rng.integers(0, 2, shape, np.uint8)
        save(tmp_path / "train" / "images" / f"{name}.tif", picture(rng, *shape))
        save(tmp_path / "train" / "gt" / f"{name}.tif", index * 255)
        if name == "narrow":  # never decoded, so that it does not matter
            save(tmp_path / "train" / "gt" / f"{name}.tif", index + 7)
        rows += [index[:20, :20], index[:20, 20:40], index[20:40, :20], index[20:40, 20:40]]
    store = store_of(tmp_path, tmp_path / "cache", 20, patch=20)
    assert store.records.shape == (8, 4, 20, 20) and (store.B[:, 0] == rows[:8]).all()
    said = capsys.readouterr().err
    assert "smaller than --patch 20 and left out: 2 image(s)" in said
    assert "4 files cut into 8 patches of 20" in said
    with refused("--patch 51: every image of split train is smaller"):
        store_of(tmp_path, tmp_path / "cache", patch=51)


def test_each_half_has_the_holes_of_its_own(tmp_path):
    """Those of a mask in the left half; those of a no-data value in the bands of the right."""
    valid = np.full((40, 80), 255, np.uint8)
    valid[:10] = np.arange(80) >= 20
    geotiff(tmp_path / "mask/train/0.tif", picture(np.random.default_rng(0), 40, 80), valid)
    store = store_of(tmp_path / "mask", tmp_path / "cache", 40)
    assert not store.known("A", store.records)[0, 0, :10, :20].any()
    assert (store.known("B", store.records) == 255).all()
    pixels = np.full((40, 80, 2), 500, np.int16)
    pixels[:10, 40:, 1] = -9999
    geotiff(tmp_path / "bands/train/0.tif", pixels, nodata=-9999)
    of = {"bands_A": "1", "bands_B": "2", "limits_A": "0,1000 int16", "limits_B": "0,1000 int16"}
    store = store_of(tmp_path / "bands", tmp_path / "cache", 40, **of)
    assert (store.known("A", store.records) == 255).all()
    assert not store.known("B", store.records)[0, 0, :9].any()


def test_unpaired_images_keep_their_holes(tmp_path, capsys):
    valid = np.full((40, 40), 255, np.uint8)
    valid[:10] = 0
    for name in ("trainA", "trainB"):
        geotiff(tmp_path / name / "x.tif", picture(np.random.default_rng(0), 40, 40), valid)
    shutil.copy(tmp_path / "trainB" / "x.tif", tmp_path / "trainB" / "y.tif")
    store = store_of(tmp_path, tmp_path / "cache", 40)
    assert "unaligned, split train: 1 + 2 files" in capsys.readouterr().err
    for side in "AB":
        holes = store.images(side, torch.from_numpy(store.rows[side])).isnan()
        assert holes[..., :9, :].all() and not holes[..., 12:, :].any()


@pytest.mark.parametrize(
    ("empty", "folders"), [("A", "A B"), ("B", "A B"), ("A", "images gt")]
)  # fmt: skip
def test_a_side_without_any_data_is_refused(tmp_path, empty, folders):
    """Nor does the land cover of a photograph without data count."""
    for side, folder in zip("AB", folders.split(), strict=True):
        opacity = np.full((40, 40), 255 * (side != empty), np.uint8)
        pixels = opacity if folder == "gt" else np.dstack([noise(40, 40), opacity])
        for k in range(3):
            save(tmp_path / "train" / folder / f"{k}.png", pixels)
    with refused(f"split train: no pixel of {empty} has data"):
        store_of(tmp_path, tmp_path / "cache")


def test_a_patch_of_unknown_colours_is_ignored(tmp_path):
    """A whole image of them is refused, as it may be a photograph."""
    drawn = np.zeros((40, 80, 3), np.uint8)
    drawn[20:, 40:] = CLASSES.colors[1]
    save(tmp_path / "train" / "0.png", drawn)
    store = store_of(tmp_path, tmp_path / "cache", 20, patch=20, lc_classes=json.dumps(TABLE))
    assert store.B[:, 0].reshape(4, -1).mean(1).tolist() == [255, 255, 1, 1]


def test_labels_are_resized_with_nearest_only(landcover, tmp_path):
    store = store_of(landcover, tmp_path, 50)
    assert store.B.shape == (4, 1, 50, 50) and set(np.unique(store.B)) == {0, 1, 2, 255}
    store_of(landcover, tmp_path, 50, lc_classes=json.dumps(VALUES))
    assert len(store_files(tmp_path)) == 2  # given values may decide how palettes are read
    store_of(landcover, tmp_path, 50, lc_classes=json.dumps({"nearest": True, "classes": VALUES}))
    assert len(store_files(tmp_path)) == 3


def store_files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_store_is_reused_and_invalidated(tmp_path, monkeypatch):
    root, cache = side_by_side(tmp_path / "data", suffix=".bmp"), tmp_path / "cache"
    train = root / "train"
    for path in train.iterdir():
        os.utime(path, (1, 1))  # all sizes and times are the same

    def is_new(folder=root, **options):
        before = len(store_files(cache))
        store_of(folder, cache, **options)
        return len(store_files(cache)) == before + 1

    cache.mkdir()
    waited = calls_of(monkeypatch, support.store, "wait_for_others")
    assert is_new() and len(waited) == 1  # of several processes the first builds it
    with monkeypatch.context() as patch:
        patch.setattr(Raster, "read", lambda *_, **__: pytest.fail("decoded again"))
        assert not is_new()
    assert is_new(side=40)
    os.utime(train / "0.bmp", (2, 2))
    assert is_new()
    assert is_new(shutil.copytree(root, tmp_path / "other"))  # with the same names and times
    assert is_new(limits_A="0,9 uint8") and is_new(limits_A="0,99 uint8")
    for name in ("5.BPW", "4.bmp.aux.xml", "3.bmp.msk"):  # a place, a no-data value, a mask
        (train / name).write_text("1\n0\n0\n-1\n0\n0\n")
        assert is_new()
    (train / "1.bpw").symlink_to("nowhere")
    touch(train / "README.new", train / "x.bmp.aux.xml")
    assert not is_new()  # they are of no image
    link = train / "2.bmp"
    target = link.rename(tmp_path / "one.bmp")
    for file in (target, shutil.copy2(target, tmp_path / "two.bmp")):
        link.unlink(missing_ok=True)
        link.symlink_to(file)
        assert is_new()  # a link to another file of this size and time
    first = store_of(root, cache).A[0].copy()
    (train / "0.bmp").rename(train / "9.bmp")
    assert (store_of(root, cache).A[-1] == first).all()  # their order has changed
    before = (train / "3.bmp").stat()
    save(train / "3.bmp", np.zeros((80, 160), np.uint8))
    os.utime(train / "3.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not store_of(root, cache).A[2].any()  # a file of another size
    (train / "5.bmp").unlink()
    assert len(store_of(root, cache).A) == 5


MISFITS = {  # dataset and file: (its size, its type, a part of the line)
    "pairs/train/2.png": ((80, 100, 3), np.uint8, "2.png: 100x80 is no pair side by side"),
    "pairs/train/3.png": ((80, 160), np.uint16, "3.png: has uint16 values"),
    "landcover/train/lc/1.png": ((80, 79), np.uint8, "1.png: 80x80 and 79x80: sizes"),
    "landcover/train/rgb/3.jpg": (1200, bytes, "3.jpg: cannot be decoded .*truncated"),
    "landcover/train/rgb/2.jpg": (0, bytes, "2.jpg: cannot be decoded"),
}


@pytest.mark.parametrize("file", MISFITS)
def test_refuses_what_does_not_fit_and_leaves_no_store(tmp_path, file):
    size, kind, text = MISFITS[file]
    name, path = file.split("/")[0], tmp_path / file
    root = {"pairs": side_by_side, "landcover": land_cover}[name](tmp_path / name)
    if kind is bytes:
        path.write_bytes(path.read_bytes()[:size])
    else:
        save(path, np.zeros(size, kind))
    with refused(text):
        store_of(root, tmp_path / "cache")
    assert not list(tmp_path.rglob("*.npy"))


def test_says_how_much_has_no_class_and_refuses_maps_without_any(tmp_path, capsys):
    """A mask of 0 and 255 under a table whose values are 0 and 1, with a byte order mark."""
    mask = np.full((40, 40), 255, np.uint8)
    for split in ("val", "train"):
        save(tmp_path / split / "rgb" / "1.png", np.zeros((40, 40, 3), np.uint8))
        save(tmp_path / split / "lc" / "1.png", mask)
        mask[10:] = 0
    (tmp_path / "classes.json").write_text(json.dumps(EXACT), encoding="utf-8-sig")
    store_of(tmp_path, tmp_path / "cache", 40)
    assert (
        "2 classes, of which only 'no' occurs, 25% of the pixels ignored" in capsys.readouterr().err
    )
    with refused("split val: no pixel of B has a class"):
        store_of(tmp_path, tmp_path / "cache", 40, "val")


def test_values_in_holes_have_no_influence(tmp_path):
    """Bicubic resizing would mix them in where the weights of several holes add up to nothing."""
    rng = np.random.default_rng(0)
    pixels, hidden = noise(100, 200, 4), rng.random((100, 200)) < 0.05
    found = []
    even = np.full_like(pixels, 200)
    for name, image, value in (("a", pixels, 0), ("b", pixels, 255), ("even", even, 0)):
        image[hidden] = value
        image[..., 3] = np.where(hidden, 0, 255)
        save(tmp_path / name / "train" / "1.png", image)
        found.append(np.array(store_of(tmp_path / name, tmp_path / "cache", 64).records))
    assert (found[0] == found[1]).all() and 0 < (found[0][:, 6:] > 0).mean() < 1
    seen = np.moveaxis(found[2][:, :3], 1, -1)[found[2][:, 6] > 0]  # beside holes, too
    assert abs(seen - 200.0).max() <= 1


def test_a_class_that_occurs_alone_is_named(tmp_path, monkeypatch, capsys):
    """Also where no more than a sample of the images is looked at first."""
    (tmp_path / "classes.json").write_text(json.dumps(EXACT))
    looked_at = {100: 1, 1000: 2}  # instead of 100 and 1000
    spread = lambda count, total: np.arange(min(looked_at[count], total))  # noqa: E731
    monkeypatch.setattr(support.store, "spread", spread)
    for number, text in ((0, "of which only 'no' occurs\n"), (1, "2 classes\n")):
        save(tmp_path / "train" / "rgb" / f"{number}.png", np.zeros((9, 9, 3), np.uint8))
        save(tmp_path / "train" / "lc" / f"{number}.png", np.full((9, 9), number, np.uint8))
        store_of(tmp_path, tmp_path / "cache")
        assert capsys.readouterr().err.endswith(text)
    looked_at[1000] = 1
    store_of(tmp_path, tmp_path / "cache")
    assert capsys.readouterr().err.endswith("of which only 'no' occurs in 1 images\n")


def test_a_store_larger_than_the_memory_is_read_only(pairs, tmp_path, monkeypatch, recwarn):
    whole, opened = store_of(pairs, tmp_path, 64).records, np.lib.format.open_memmap

    def like_linux(path, mode, *how):
        if mode == "c":
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return opened(path, mode, *how)

    monkeypatch.setattr(np.lib.format, "open_memmap", like_linux)
    records = store_of(pairs, tmp_path, 64).records
    assert records.mode == "r" and (records == whole).all()
    (batch,) = common.Loader(records, CPU).batches(np.array([[1, 0]]))
    assert (batch[0].numpy() == whole[1]).all() and not recwarn.list


def test_a_damaged_store_is_built_again(tmp_path):
    root, cache = side_by_side(tmp_path / "data"), tmp_path / "cache"
    whole = np.array(store_of(root, cache).records)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    for damaged in (content[:-1], content + b"x", content[:9] + b"?" + content[10:], b""):
        file.write_bytes(damaged)
        assert (store_of(root, cache).records == whole).all() and file.read_bytes() == content


def test_what_is_unfinished_is_removed_after_a_day(pairs, tmp_path):
    old, new, folder = (tmp_path / f".unfinished-{k}.npy" for k in range(3))
    touch(old, new, folder / "train/000.png")  # of a demo world
    for path in (old, folder):
        os.utime(path, (0, time.time() - 90000))
    store_of(pairs, tmp_path, 64)
    assert not old.exists() and not folder.exists() and new.exists()  # another may be writing it


@pytest.mark.parametrize(
    "terminal, seconds, rank, shown",
    [(True, 2, 0, True), (True, 0.01, 0, False), (False, 2, 0, False)]
    + [(False, 20, 0, True), (True, 20, 1, False)],
)
def test_what_takes_long_shows_a_bar(terminal, seconds, rank, shown, monkeypatch):
    """On a terminal after a second, in a log after ten."""
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("tqdm.std.time", itertools.count(0, seconds).__next__)
    pieces = [piece.tolist() for piece in common.chunks(np.arange(25))]
    assert sum(pieces, []) == list(range(25)) and max(map(len, pieces)) == 8
    assert bool(re.search(r"measuring: +96%.* 24/25", stream.getvalue())) == shown


def test_a_full_disk_is_one_line(tmp_path, pairs, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    main = common.command(lambda argv: store_of(pairs, tmp_path))
    assert "No space left on device" in line_of(main, None, capsys)
    assert store_files(tmp_path) == []


@pytest.mark.parametrize("free, resident", [(2, False), (3, True)])
def test_images_lie_in_a_gpu_that_has_room(free, resident, monkeypatch):
    """If they take less than 40 % of its free memory."""
    records = np.zeros((5, 3, 8, 8), np.uint8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * records.nbytes, 0))
    moved = calls_of(monkeypatch, torch.Tensor, "to", lambda tensor, device: tensor)
    assert common.Loader(records, torch.device("cuda")).resident == resident == bool(moved)


def test_loading_and_prefetching_yield_the_rows_asked_for(pairs, tmp_path, monkeypatch):
    """The background thread, with pinning (which needs a GPU) left out, and its end."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    records = store_of(pairs, tmp_path).records
    loader, index = common.Loader(records, CPU), np.array([[3, 1], [0, 5], *[[2, 4]] * 10])
    both = zip(loader.batches(index), loader._prefetched(index), index, strict=True)
    for one, other, rows in both:
        assert (np.stack(one) == records[rows]).all() and (np.stack(other) == records[rows]).all()
    half = loader._prefetched(index)
    next(half)
    half.close()  # ends the thread although it waits to put the next batch
    with pytest.raises(IndexError):
        list(loader._prefetched(np.array([[0, 99]])))


# --------------------------------------------------------------------------------------- demo world


def test_demo_world(tmp_path):
    """The same on every machine; written once; satellite left and map right; val is not train."""
    root = demo_world(tmp_path, "maps", train=2, val=1, side=64)
    written = [Path(root) / name for name in ("train/000.png", "train/001.png", "val/000.png")]
    assert sorted((tmp_path / "demo-maps").rglob("*.png")) == written
    times = [path.stat().st_mtime_ns for path in written]
    demo_world(tmp_path, "maps", train=3, val=1, side=32)  # another one does not replace it
    assert sorted((tmp_path / "demo-maps").rglob("*.png")) == written
    assert [path.stat().st_mtime_ns for path in written] == times
    for path, number in zip(written, (0, 1, 100_000), strict=True):
        satellite, drawn, _ = landscape(np.random.default_rng([7, number]), 64)
        assert (pixels_of(path) == np.concatenate([satellite, drawn], 1)).all()
    root = demo_world(tmp_path, "landcover", train=2, val=1, side=64)
    store = store_of(root, tmp_path / "cache", 64)
    assert store.classes.names == DEMO_CLASSES
    for k in range(2):
        satellite, _, ground = landscape(np.random.default_rng([7, k]), 64)
        assert (store.A[k].transpose(1, 2, 0) == satellite).all() and (store.B[k] == ground).all()
    with pytest.raises(TypeError):  # as Ctrl-C in the middle of it
        demo_world(tmp_path / "new", "maps", train=1, val="", side=64)
    assert not store_files(tmp_path / "new")
    assert store_files(tmp_path) == ["cache", "demo-landcover", "demo-maps", "new"]
    satellite, drawn, ground = landscape(np.random.default_rng(0), 96)
    colors = {tuple(color) for color in drawn.reshape(-1, 3).tolist()}
    assert colors <= set(ClassTable.load("maps").colors)
    assert (drawn[ground == 1] == (186, 210, 186)).all()  # fields are not parks
    assert set(np.unique(ground)) == set(range(6))
    shares = np.bincount(ground.ravel()) / ground.size
    assert shares == pytest.approx([0.183, 0.256, 0.178, 0.194, 0.069, 0.120], abs=0.005)
    levels = [satellite[ground == k] for k in range(6)]
    means = [99.9, 117.3, 54.2, 61.0, 136.5, 129.0]
    assert [x.mean() for x in levels] == pytest.approx(means, abs=0.2)
    spreads = [20.1, 28.6, 18.7, 23.4, 28.2, 7.2]
    assert [x.std() for x in levels] == pytest.approx(spreads, abs=0.2)


# ----------------------------------------------------------------------------------------- measures


def test_image_measures_by_hand():
    """Red is off in half of the pixels: 5 levels off is not within 5. (3, 4, 0) is 5 off in all."""
    target = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    for off, five, ten in ((4, 1, 1), (5, 0.5, 1), (9, 0.5, 1), (10, 0.5, 0.5)):
        fake = target.clone()
        fake[:, 0, :, :8] += off
        measured = {name: value.item() for name, value in measure_images(fake, target).items()}
        assert (measured["accuracy_5"], measured["accuracy_10"]) == (five, ten)
        assert measured["mse"] == pytest.approx(off**2 / 6)
        assert measured["psnr"] == pytest.approx(10 * np.log10(255**2 * 6 / off**2))
        assert measured["rmse_rgb"] == pytest.approx(np.sqrt(off**2 / 2))
    fake = target + torch.tensor([3, 4, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    assert measure_images(fake, target)["rmse_rgb"].item() == pytest.approx(5)
    assert measure_images(target, target)["psnr"].item() == pytest.approx(148.13, abs=0.01)


def ssim(a, b):
    """Of one window: Gaussian weights of sigma 1.5 over 11 x 11 pixels."""
    x = np.arange(11) - 5
    weights = np.exp(-(x[:, None] ** 2 + x**2) / 4.5)
    weights /= weights.sum()
    mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
    var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
    cov = (weights * (a - mean_a) * (b - mean_b)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    same_mean = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return same_mean * (2 * cov + c2) / (var_a + var_b + c2)


def test_ssim_by_hand():
    """The mean over two windows full of data, and over three channels of which one is inverted."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (11, 12))
    b = np.clip(a + rng.integers(-40, 40, (11, 12)), 0, 255)
    channels = np.stack([a, a, a]), np.stack([b, b, 255 - b])
    wider = (np.pad(image, ((0, 0), (0, 0), (0, 1))) for image in channels)  # without data
    pictures = (torch.from_numpy(image).byte()[None] for image in wider)
    known = torch.arange(13).expand(1, 1, 11, 13) < 12
    windows = slice(0, 11), slice(1, 12)
    alike, inverted = (np.mean([ssim(a[:, k], x[:, k]) for k in windows]) for x in (b, 255 - b))
    want = (2 * alike + inverted) / 3
    assert measure_images(*pictures, known=known)["ssim"].item() == pytest.approx(want, rel=1e-6)


def test_a_table_leaves_cells_empty(capsys):
    print_table({})  # of a changed script that measures nothing
    assert not capsys.readouterr().out.strip()
    print_table({"model": {"psnr": 1.0, "rmse": 2.0}, "copy": {"rmse": 3.0}})
    _, model, copy = capsys.readouterr().out.splitlines()
    assert copy.index("3.0000") == model.index("2.0000")


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
    """10 levels off in a box of 4 x 8, 1 off elsewhere; the second image has no edit at all.

    Pixels without data do not count, inside or outside, of the target or of the source.
    """
    mask = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    mask[0, :, :4, :8] = True
    ramp, scores = 100 + torch.arange(16).expand(2, 3, 16, 16), common.Scores()
    target = common.from_bytes(ramp)
    guess = target + torch.where(mask, 10.0, 1.0) / 127.5
    source = target + 4 / 127.5
    for hole, image in ((0, target), (15, target), (1, source)):
        image[0, :, hole, hole] = torch.nan
    scores.add_edit("model", guess, target, source, mask)
    row = scores.table()["model"]
    assert (row["l1_inside"], row["l1_outside"], row["l1_to_input"]) == (10.0, 1.0, 6.0)


def test_pixels_without_data_in_a_guess_have_its_mean_colour_and_count():
    target, scores = torch.zeros(1, 3, 16, 16), common.Scores()
    target[..., :8] = 20 / 127.5
    guess = torch.zeros(1, 3, 16, 16)
    guess[..., :8] = torch.nan
    scores.add_images("copy", guess, target, Limits((0,) * 3, (255,) * 3, "int16"))
    row = scores.table()["copy"]
    assert row["rmse"] == pytest.approx(20 / 2**0.5, abs=0.1)
    assert row["rmse_units"] == pytest.approx(row["rmse"], rel=0.01)
    guess = target.clone()
    guess[:, 2] += 51 / 127.5  # a fifth of the third band's units
    scores.add_images("a band", guess, target, Limits((0,) * 3, (10, 100, 1000), "float32"))
    units = scores.table()["a band"]["rmse_units"]
    assert units == pytest.approx(200 / 3**0.5, rel=0.02)
    target, guess = torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)
    guess[0], target[0, :, 2:] = 20 / 127.5, torch.nan  # images with data weigh the same
    scores.add_images("holes", guess, target, Limits((0,) * 3, (255,) * 3, "int16"))
    row = scores.table()["holes"]
    assert row["rmse_units"] == pytest.approx(row["rmse"], rel=0.01)


def test_holes_have_the_mean_colour_of_their_own_image():
    real, fake = torch.zeros(2, 1, 1, 2, 2)
    real[..., 0, 0] = torch.nan
    fake[0, 0] = torch.tensor([[9.0, 1], [2, 6]])
    assert common.holes_of(real, fake).flatten().tolist() == [3, 1, 2, 6]
    assert common.filled_alike(fake, real)[0].flatten().tolist() == [0, 1, 2, 6]
    fake[..., 1, 1] = torch.nan  # of a broken generator, which must be noticed
    assert common.holes_of(real, fake)[..., 1, 1].isnan()
    nothing = torch.full_like(real, torch.nan)
    assert not common.holes_of(nothing, fake).any() and not common.filled(nothing).any()


def test_sixteen_bits_are_resized_as_eight_bits_are(pairs):
    """Bicubic, to the nearest level."""
    image = pixels_of(pairs / "train" / "0.png")[:, :80]
    fine = resize(image.astype(np.int16) * 100, (48, 40))
    bands = [Image.fromarray(band.astype(np.float32) * 100) for band in np.moveaxis(image, -1, 0)]
    want = [np.asarray(band.resize((48, 40), Image.Resampling.BICUBIC)) for band in bands]
    assert abs(fine - np.stack(want, -1)).max() <= 0.5
    step = np.where(np.arange(16) < 8, -32768, 32767).astype(np.int16)[None, :, None]
    wide = resize(np.repeat(step, 16, 0), (23, 23))[0, :, 0].astype(int)
    assert (np.diff(wide) >= 0).all()  # what lies beyond the levels is clipped


def test_variety_is_how_much_places_differ_as_a_share_of_the_targets_differences():
    """Of pictures, of edits where both places have one, of labels where both have a class."""
    levels = torch.tensor([0, 100, 0]).view(3, 1, 1, 1).expand(3, 3, 16, 16)
    quarter, half, target = map(common.from_bytes, (levels // 4, levels // 2, levels))
    mask, scores = torch.ones(3, 1, 16, 16, dtype=torch.bool), common.Scores()
    mask[1, :, :8] = False
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


def histograms_of(images, labels=None, **most):
    """Of arrays (N, 3, S, S) and (N, 1, S, S), or of pairs of the same images."""
    rows = {"A": images, "B": images if labels is None else labels}
    classes = None if labels is None else CLASSES
    about = {"paired": True, "classes": classes, "rows": rows, "known": lambda *_: None}
    return ImageStore.histograms(types.SimpleNamespace(**rows, **about), **most)


def test_constant_guesses():
    images = np.zeros((2, 3, 4, 4), np.uint8)
    images[0, 0], images[1, 1, :1] = 200, 80
    guesses = common.constant_colors(histograms_of(images)["A"])
    bytes_of = {name: to_bytes(color).tolist() for name, color in guesses.items()}
    assert bytes_of == {"mean training colour": [100, 10, 0], "median training colour": [0, 0, 0]}
    four = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    counts = histograms_of(four, four // 3, most=2)  # evenly spread
    assert counts["A"][0, :4].tolist() == counts["A of classes"][0, 0, :4].tolist() == [1, 0, 1, 0]
    assert counts["B"][0, :3].tolist() == [3, 1, 0]  # of labels all count
    counts = torch.zeros(1, 256)
    counts[0, [0, 1, 2, 255]] = torch.tensor([1.0, 3, 1, 4])
    guesses = common.constant_colors(counts, CLASSES)
    assert tuple(to_bytes(guesses["most frequent class"]).tolist()) == CLASSES.colors[1]
    mean = (CLASSES.palette[[0, 1, 2, 255]] * [[1], [3], [1], [4]]).sum(0) / 9
    assert (to_bytes(guesses["mean training colour"]).numpy() == mean.round()).all()
    table = ClassTable.load("maps")
    drawn = common.from_bytes(torch.tensor(table.colors)[:, :, None, None])
    assert pix2pix.nearest_class(drawn, table).flatten().tolist() == list(range(9))


def test_colours_of_the_classes():
    """By hand: what each class looked like; all pixels' colour for classes that were not seen."""
    labels = np.array([[0, 0, 0, 1], [1, 1, 1, 255]], np.uint8).reshape(2, 1, 2, 2)
    images = np.zeros((2, 3, 2, 2), np.uint8)
    images[0, 0] = [[10, 20], [90, 200]]  # red, of the first image: three of class 0, one of 1
    images[1, 1] = [[4, 4], [4, 80]]  # green, of the second: three of class 1, one ignored
    counts = histograms_of(images, labels)
    assert counts["A of classes"].shape == (3, 3, 256) and counts["A of classes"].sum() == 7 * 3
    assert counts["B"].nonzero().tolist() == [[0, 0], [0, 1]]
    colors = common.constant_colors(counts["A"], by_class=counts["A of classes"])
    levels = {name: (color + 1) * 127.5 for name, color in colors.items()}
    everywhere = torch.tensor([320 / 8, 92 / 8, 0.0])
    close = functools.partial(torch.allclose, atol=1e-3, rtol=0)
    assert close(levels["mean training colour"], everywhere)
    mean, median = levels["mean colour of the class"], levels["median colour of the class"]
    assert close(mean[:2], torch.tensor([[40.0, 0, 0], [50, 3, 0]]))
    assert close(median[:2], torch.tensor([[20.0, 0, 0], [0, 4, 0]]))
    assert close(mean[[2, 255]], everywhere.expand(2, 3))
    index = torch.from_numpy(labels[:, 0])
    guesses = common.constant_guesses(colors, torch.zeros(2, 3, 2, 2), index)
    mean = to_bytes(guesses["mean colour of the class"])
    assert mean[:, 0].tolist() == [[[40, 40], [40, 50]], [[50, 50], [50, 40]]]
    assert (to_bytes(guesses["mean training colour"])[:, 0] == 40).all()


def test_images_are_spread_evenly():
    for count, indices in ((1, [0]), (3, [0, 2, 4]), (4, [0, 1, 3, 4])):
        assert common.spread(count, 6).tolist() == indices
    for count in (0, 6, 9):
        assert common.spread(count, 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_bytes_and_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(common.from_bytes(levels)), levels)
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert (as_array(as_tensor(picture)[0]) == picture).all()
    assert as_tensor(picture).is_contiguous()
    assert to_bytes(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_classes_one_hot_drawn_and_back():
    index = torch.from_numpy(INDEX)[None]
    maps = common.one_hot(index, 3)
    assert maps.shape == (1, 3, *INDEX.shape) and maps.sum() == (INDEX < 3).sum()
    assert torch.equal(common.class_index(maps), index.long())
    assert (as_array(common.draw(index, CLASSES)[0]) == COLOURS).all()
