"""Serving images to a training loop: decoding every epoch, as one would without this project,
against the store.

    pytest bench/bench_preprocessing.py --benchmark-only

maps JPEG pairs of 600x1200 pixels, split, resized, cropped and mirrored; one at a time, and by
DataLoader workers inria TIFF tiles of 5000x5000 pixels with their masks, uncompressed, resized
whole lc land cover of 14 classes as compressed one-hot .npz files, against indices expanded on
the device build the store itself, as threads grow; and the cost of an image as the dataset
grows
"""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import cyclegan
import harness
import pix2pix
from support.demo import landscape

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def timed(request):
    return request.config.getoption("benchmark_only")


@pytest.fixture(scope="session")
def maps(tmp_path_factory, timed):
    """Pairs like those of the maps data."""
    root = tmp_path_factory.mktemp("maps")
    (root / "train").mkdir()
    for k in range(32 if timed else 3):
        satellite, drawn, _ = landscape(np.random.default_rng(k), 600)
        Image.fromarray(np.concatenate([satellite, drawn], 1)).save(
            root / "train" / f"{k}.jpg", quality=90
        )
    return root


@pytest.fixture(scope="session")
def inria(tmp_path_factory, timed):
    """Tiles like those of the Inria data: 75 MB of picture and 25 MB of mask each.

    There are 155 in its training set; here 36, which are three files under twelve names.
    """
    root, side = tmp_path_factory.mktemp("inria"), 5000 if timed else 100
    satellite, _, ground = landscape(np.random.default_rng(0), min(side, 1000))
    repeats = -(-side // len(satellite))
    for name, image in (("images", satellite), ("gt", (ground == 4).astype(np.uint8) * 255)):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        whole = np.tile(image, (repeats, repeats) + (1,) * (image.ndim - 2))[:side, :side]
        for k in range(36 if timed else 3):
            if k < 3:
                Image.fromarray(np.roll(whole, 100 * k, 0)).save(folder / f"paris{k}.tif")
            else:
                (folder / f"paris{k}.tif").hardlink_to(folder / f"paris{k % 3}.tif")
    return root


@pytest.fixture(scope="session")
def one_hot(tmp_path_factory, timed):
    """Photographs of 256 pixels with one-hot land cover of 14 classes, as .npz files."""
    root, rng = tmp_path_factory.mktemp("one-hot"), np.random.default_rng(0)
    for name in ("rgb", "lc"):
        (root / "train" / name).mkdir(parents=True)
    for k in range(32 if timed else 3):
        satellite, _, ground = landscape(np.random.default_rng(k), 256)
        Image.fromarray(satellite).save(root / "train" / "rgb" / f"{k}.png")
        index = ground + rng.integers(0, 9)  # 6 of 14 classes
        np.savez_compressed(root / "train" / "lc" / f"{k}.npz", np.eye(14, dtype=np.uint8)[index])
    return root


def decode_pair(path, size, rng):
    """One pair the way a plain dataset class does it: open, split, resize, jitter, to tensors."""
    load = round(size * 286 / 256)
    both = Image.open(path).convert("RGB")
    side = both.height
    top, left, flip = rng.integers(0, (load - size + 1, load - size + 1, 2))
    tensors = []
    for half in (both.crop((0, 0, side, side)), both.crop((side, 0, 2 * side, side))):
        image = half.resize((load, load), Image.Resampling.BICUBIC).crop(
            (left, top, left + size, top + size)
        )
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
        tensors.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1)
    return tuple(tensors)


class PlainPairs(torch.utils.data.Dataset):
    def __init__(self, root, size):
        self.files, self.size = sorted((root / "train").iterdir()), size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, k):
        return decode_pair(self.files[k], self.size, np.random.default_rng(k))


def decode_tile(root, k, size):
    """One Inria tile with its mask: decoded and resized whole, cropped, to tensors."""
    load, tensors = round(size * 286 / 256), []
    for name, how in (("images", Image.Resampling.BICUBIC), ("gt", Image.Resampling.NEAREST)):
        with Image.open(root / "train" / name / f"paris{k}.tif") as image:
            resized = np.array(image.resize((load, load), how).convert("RGB"))[:size, :size]
        tensors.append(torch.from_numpy(resized).permute(2, 0, 1).float() / 127.5 - 1)
    return tensors


def exhaust(batches):
    count = 0
    for batch in batches:
        count += len(batch[0])
    return count


def measure(benchmark, group, how, function, rounds, timed, **extra):
    """Times function, which returns how many images it served."""
    benchmark.group = group
    count = benchmark.pedantic(
        function, rounds=rounds if timed else 1, warmup_rounds=1 if timed else 0
    )
    if benchmark.stats:
        each = benchmark.stats.stats.median / count
        extra |= {"how": how, "milliseconds_per_image": 1000 * each, **harness.about("cpu")}
        benchmark.extra_info.update(extra)


def pairs(root, size, cache, batch_size=1):
    return pix2pix.Pairs(
        pix2pix.Config(data=str(root), size=size, cache=str(cache), batch_size=batch_size),
        "train",
        CPU,
    )


def epochs(data):
    """A function that serves one epoch after the other."""
    numbers = iter(range(10**6))
    return lambda: exhaust(data.batches(next(numbers)))


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("how", ["decode", "decode-2-workers", "store", "store-batch-16"])
def bench_maps(benchmark, maps, tmp_path, timed, size, how):
    if how == "decode":
        function = lambda: exhaust((a[None], b[None]) for a, b in PlainPairs(maps, size))  # noqa: E731
    elif how == "decode-2-workers":
        plain = PlainPairs(maps, size)
        loader = torch.utils.data.DataLoader(plain, num_workers=2, persistent_workers=True)
        function = lambda: exhaust(loader)  # noqa: E731
    else:
        function = epochs(pairs(maps, size, tmp_path, 16 if timed and "16" in how else 1))
    measure(
        benchmark,
        f"serve-maps-{size}",
        how,
        function,
        3 if "decode" in how else 20,
        timed,
        size=size,
    )


@pytest.mark.parametrize("how", ["decode", "store"])
def bench_inria(benchmark, inria, tmp_path, timed, how):
    if how == "decode":
        function = lambda: len([decode_tile(inria, k, 256) for k in range(3)])  # noqa: E731
    else:
        function = epochs(pairs(inria, 256, tmp_path))
    measure(
        benchmark, "serve-inria-256", how, function, 2 if how == "decode" else 50, timed, size=256
    )


@pytest.mark.parametrize("how", ["decode", "store"])
def bench_land_cover(benchmark, one_hot, tmp_path, timed, how):
    """Both give photographs and one-hot float maps of 14 classes, 256 pixels."""
    if how == "decode":

        def function():
            files = sorted((one_hot / "train" / "rgb").iterdir())
            for path in files:
                torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float().div_(
                    127.5
                ).sub_(1)
                with np.load(one_hot / "train" / "lc" / f"{path.stem}.npz") as archive:
                    torch.from_numpy(archive["arr_0"]).permute(2, 0, 1).float().contiguous()
            return len(files)
    else:
        options = {
            "size": 256,
            "cache": str(tmp_path),
            "batch_size": 1,
            "lc_classes": harness.TABLE,
        }
        data = cyclegan.Domains(cyclegan.Config(data=str(one_hot), **options), "train", CPU)
        function = epochs(data)
    measure(
        benchmark,
        "serve-land-cover-256",
        how,
        function,
        3 if how == "decode" else 20,
        timed,
        size=256,
    )


@pytest.mark.parametrize("threads", [1, 2, 4])
def bench_build(benchmark, maps, tmp_path, timed, monkeypatch, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: threads)

    def build():
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        return len(pairs(maps, 256, tmp_path / "cache"))

    measure(benchmark, "build-store-256", f"{threads} threads", build, 3, timed, threads=threads)


@pytest.mark.parametrize("count", [8, 64, 512])
def bench_growth(benchmark, tmp_path, timed, count):
    """What one image costs to serve, in datasets of 8 to 512 pairs; and what they take: a file, no
    memory of ours.
    """
    count = count if timed else 2
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 200, 3), np.uint8))
    (tmp_path / "train").mkdir()
    for k in range(count):
        image.save(tmp_path / "train" / f"{k}.png")
    data = pairs(tmp_path, 256, tmp_path / "cache")
    size = data.store.records.nbytes
    measure(
        benchmark,
        "growth-256",
        f"{count} pairs",
        epochs(data),
        3,
        timed,
        count=count,
        store_bytes=size,
    )
