"""Serving images to a training loop: decoding every epoch, as one would without this project, against the store.

    pytest bench/bench_preprocessing.py --benchmark-only

Both sides split, resize (bicubic), crop and mirror the same JPEG pairs of 600x1200 pixels to 64x64 and 256x256.
"""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import common
import pix2pix

FULL, TINY = 32, 4  # pairs


@pytest.fixture(scope="module")
def data(tmp_path_factory, request):
    """Pairs like those of the maps data: 600x1200, JPEG."""
    root = tmp_path_factory.mktemp("pairs")
    count = FULL if request.config.getoption("benchmark_only") else TINY
    for split in ("train", "val"):
        (root / split).mkdir()
    for k in range(count):
        satellite, drawn, _ = common.landscape(np.random.default_rng(k), 600)
        Image.fromarray(np.concatenate([satellite, drawn], 1)).save(root / "train" / f"{k}.jpg", quality=90)
    return root


def config(data, size, cache):
    return pix2pix.Config(data=str(data), size=size, cache=str(cache), batch_size=1)


def decode_epoch(root, size):
    """One epoch the way a plain dataset class does it: open, split, resize, jitter, to a tensor, one pair at a time."""
    rng, load = np.random.default_rng(0), round(size * 286 / 256)
    for path in sorted((root / "train").iterdir()):
        both = Image.open(path).convert("RGB")
        halves = both.crop((0, 0, 600, 600)), both.crop((600, 0, 1200, 600))
        top, left, flip = rng.integers(0, (load - size + 1, load - size + 1, 2))
        for half in halves:
            image = half.resize((load, load), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
            tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    return tensor


def images_per_second(benchmark, count):
    if benchmark.stats:
        benchmark.extra_info["images_per_second"] = round(count / benchmark.stats.stats.median, 1)


@pytest.mark.parametrize("size", [64, 256])
def bench_decode_every_epoch(benchmark, data, size):
    benchmark.group = f"epoch-{size}"
    benchmark.pedantic(decode_epoch, (data, size), rounds=2, warmup_rounds=1)
    images_per_second(benchmark, len(list((data / "train").iterdir())))


@pytest.mark.parametrize("size", [64, 256])
def bench_serve_from_store(benchmark, data, size, tmp_path):
    benchmark.group = f"epoch-{size}"
    train = pix2pix.Pairs(config(data, size, tmp_path), "train", torch.device("cpu"))
    epochs = iter(range(10_000))
    benchmark.pedantic(lambda: list(train.batches(next(epochs))), rounds=10, warmup_rounds=2)
    images_per_second(benchmark, len(train))
    assert train.store.records.dtype == np.uint8


@pytest.mark.parametrize("size", [64, 256])
def bench_build_store(benchmark, data, size, tmp_path):
    benchmark.group = f"epoch-{size}"
    cfg = config(data, size, tmp_path / "cache")

    def setup():
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        return (dataclasses.replace(cfg), "train", round(size * 286 / 256)), {}

    benchmark.pedantic(common.ImageStore, setup=setup, rounds=2, warmup_rounds=1)
    images_per_second(benchmark, len(list((data / "train").iterdir())))
