"""Pictures, land cover and datasets that the tests write, and what they read back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from support.classes import ClassTable
from support.writing import writing

try:
    from rasterio.transform import from_origin

    PLACE = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_800_000, 0.5, 0.5)}
except ImportError:  # tests that need no GeoTIFF run without rasterio
    PLACE = {}
TABLE = [
    {"name": "land", "color": "#8429f6"},
    {"name": "water", "color": "#e2a929"},
    {"name": "road", "color": "#6ec1e4"},
    {"name": "unlabeled", "color": "#9b9b9b", "ignore": True},
]
LABELS = {"lc_classes": json.dumps(TABLE)}
CLASSES = ClassTable.load(json.dumps(TABLE))
# the index of each convolution in torchvision's vgg16().features, and its channels
CONVOLUTIONS = ((0, 64), (2, 64), (5, 128), (7, 128), (10, 256), (12, 256), (14, 256), (17, 512))


def picture(rng, height, width):
    """Smooth random colours, so that JPEG keeps them and a network can learn them."""
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def touch(*paths):
    """Makes empty files."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def pixels_of(path):
    """The pixels of an image file, (H, W) or (H, W, C)."""
    return np.asarray(Image.open(path))


def geotiff(path, pixels, valid=None, beside=False, about=(), **profile):
    """Writes (H, W, bands) or (H, W) as a GeoTIFF in PLACE; returns the path.

    valid   its mask, within it or beside it
    about   attributes of rasterio's dataset that are set at the end, such as {"scales": (0.5,)}
    """
    rasterio = pytest.importorskip("rasterio")  # a test without GeoTIFFs runs without it
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    kind = {"driver": "GTiff", "dtype": bands.dtype, "count": len(bands), **PLACE, **profile}
    with rasterio.open(path, "w", height=bands.shape[1], width=bands.shape[2], **kind) as target:
        target.write(bands)
    if valid is None and not about:
        return path
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=not beside), rasterio.open(path, "r+") as target:
        for name, value in dict(about).items():
            setattr(target, name, value)
        if valid is not None:
            target.write_mask(valid)
    return path


def bands_of(path, bands=None):
    """The values of a TIFF, (H, W, bands)."""
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(path) as file:
        return np.moveaxis(file.read(bands), 0, -1)


def has_data(path):
    """Where a TIFF has data, by its mask, (H, W)."""
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(path) as file:
        return file.dataset_mask() > 0


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def pictures_in(root, names, height=64, width=64):
    """Writes another picture under each name, as in "trainA/0.png trainB/0.png"."""
    rng = np.random.default_rng(5)
    for name in names.split():
        save(root / name, picture(rng, height, width))
    return root


def written(path, source, pixels=None, table=None, **how):
    """Writes pixels, or its own, as a file of the place of an open Raster; returns the path."""
    with writing(path, source, table, **how) as put:
        put(source.read() if pixels is None else pixels, 0)
    return path


def side_by_side(root, train=6, val=3, side=80, suffix=".png", drawn=False):
    """A paired dataset whose B is the negative of A, or drawn in the colours of maps."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for k in range(count):
            a = picture(rng, side, side)
            b = ClassTable.load("maps").palette[a[..., 0] // 32] if drawn else 255 - a
            save(root / split / f"{k}{suffix}", np.concatenate([a, b], 1))
    return root


def land_cover(root, train=4, val=2, side=80, table=TABLE):
    """rgb and lc folders; lc holds indices 0..2 and some 3, which is ignored."""
    rng = np.random.default_rng(1)
    for split, count in (("train", train), ("val", val)):
        for k in range(count):
            save(root / split / "rgb" / f"{k}.jpg", picture(rng, side, side))
            save(root / split / "lc" / f"{k}.png", rng.integers(0, 4, (side, side), np.uint8))
    (root / "classes.json").write_text(json.dumps(table))
    return root


def vgg_file(path, last=14):
    """A file as torchvision lays it out, with random weights, up to features.`last`."""
    weights, channels = {}, 3
    for index, out in CONVOLUTIONS:
        if index <= last:
            weight = torch.randn(out, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
            weights[f"features.{index}.weight"] = weight
            weights[f"features.{index}.bias"] = torch.randn(out) * 0.1
        channels = out
    torch.save(weights | {"classifier.0.bias": torch.zeros(3)}, path)
    return weights
