"""Generation: images a second through translate, megapixels a second from raster to raster as
--generate does it, and the memory that it takes.

    pytest bench/bench_generate.py --benchmark-only
"""

import dataclasses
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import common
import harness
import pix2pix
from support import serve as page
from support.canvases import MemoryRaster
from support.checkpoints import state_dict
from support.pictures import to_bytes
from support.rasters import Raster

RUNS = [("cpu", 64, 1), ("cpu", 256, 1), ("cuda", 256, 1), ("cuda", 256, 16)]
CASES = [
    pytest.param(
        *(script, device, size, batch_size),
        id=f"{script}-{device}-{size}-{batch_size}",
        marks=[pytest.mark.cuda] if device == "cuda" else [],
    )
    for device, size, batch_size in RUNS
    for script in harness.SCRIPTS
]


def inputs_for(script, cfg, count, device):
    """Bytes, as files give them, for `count` images: pictures, and for the edits land cover."""
    pictures = torch.randint(
        0, 256, (count, 3, cfg.size, cfg.size), dtype=torch.uint8, device=device
    )
    labels = torch.randint(0, 14, (count, cfg.size, cfg.size), dtype=torch.uint8, device=device)
    return (pictures, labels) if harness.is_edit(script) else (pictures,)


def generate(module, state, cfg, pictures, labels=None):
    inputs = common.from_bytes(pictures)
    inputs = inputs if labels is None else (inputs, common.one_hot(labels, 14))
    return to_bytes(module.translate(state, inputs, cfg))


@pytest.mark.benchmark(timer=harness.device_time)
@pytest.mark.parametrize(("script", "device", "size", "batch_size"), CASES)
def bench_images(benchmark, request, script, device, size, batch_size):
    timed = request.config.getoption("benchmark_only")
    if not timed and size != 64:
        pytest.skip("as a test: the small size")
    state, cfg, module = model(script, device, size, batch_size, timed)
    inputs = inputs_for(script, cfg, batch_size, device)
    benchmark.group = f"generate-{size}-batch-{batch_size}-{device}"
    rounds, warmup = (20 if device == "cuda" else 3, 2) if timed else (1, 0)
    fakes = benchmark.pedantic(
        generate, (module, state, cfg, *inputs), rounds=rounds, warmup_rounds=warmup
    )
    assert fakes.shape == (batch_size, 3, size, size) and fakes.dtype == torch.uint8
    note(benchmark, script, device, size, batch_size, images=batch_size)


RASTERS = [
    pytest.param(script, device, id=f"{script}-{device}", marks=marks)
    for device, marks in (("cpu", []), ("cuda", [pytest.mark.cuda]))
    for script in ("pix2pix", "cyclegan")
]


@pytest.mark.benchmark(timer=harness.device_time)
@pytest.mark.parametrize(("script", "device"), RASTERS)
def bench_raster(benchmark, request, tmp_path, script, device):
    """What --generate does with a GeoTIFF, from file to file; beside it the network's share."""
    timed = request.config.getoption("benchmark_only")
    side = (8192 if device == "cuda" else 1024) if timed else 150
    size = 256 if timed and device == "cuda" else 64
    state, cfg, module = model(script, device, size, 1, timed)
    write_raster(tmp_path / "raster.tif", side)
    cfg = dataclasses.replace(
        cfg,
        generate=(str(tmp_path / "raster.tif"),),
        out=str(tmp_path / "generated"),
        overwrite=True,
        window=256 if timed else 64,
    )
    honest, seconds = common.translate_files, []

    def translate_files(cfg, paint, *rest, **more):
        def timed_paint(*windows, **options):
            begin = harness.device_time()
            fakes = paint(*windows, **options)
            seconds.append(harness.device_time() - begin)
            return fakes

        honest(cfg, timed_paint, *rest, **more)

    def raster():
        seconds.clear()
        module.generate(state, cfg, torch.device(device))

    benchmark.group = f"raster-{side}-{device}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "translate_files", translate_files)
        benchmark.pedantic(raster, rounds=2 if timed else 1)
    with Raster(tmp_path / "generated" / "raster.tif") as result:
        assert (result.height, result.width) == (side, side)
    assert seconds
    note(benchmark, script, device, size, 1, images=side**2 / size**2)
    if benchmark.stats:
        inside = sum(seconds) / benchmark.stats.stats.data[-1]
        benchmark.extra_info.update(side=side, window=cfg.window, outside_the_network=1 - inside)


def write_raster(path, side):
    """A GeoTIFF (side, side) of noise, tiled, written row of tiles by row."""
    rasterio = pytest.importorskip("rasterio")

    profile = {"driver": "GTiff", "dtype": "uint8", "count": 3, "height": side, "width": side}
    profile |= {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}
    rng = np.random.default_rng(0)
    with rasterio.open(path, "w", **profile) as raster:
        for top in range(0, side, 256):
            rows = min(256, side - top)
            coarse = rng.integers(0, 256, (3, rows // 16 + 1, side // 16 + 1), np.uint8)
            pixels = coarse.repeat(16, 1).repeat(16, 2)[:, :rows, :side]
            raster.write(pixels, window=((top, top + rows), (0, side)))


@pytest.mark.parametrize("side", [256, 2000, 10_000])
def bench_memory(benchmark, request, tmp_path, side):
    """Peak memory of a process that translates a GeoTIFF, side x side, by windows of 256."""
    timed = request.config.getoption("benchmark_only")
    if not timed:
        pytest.skip("as a test: test_rasters.py")
    write_raster(tmp_path / "raster.tif", side)
    _, cfg = harness.config("pix2pix", width=8)
    state = pix2pix.build(cfg, torch.device("cpu"), training=False)
    content = {"script": "pix2pix", "config": dataclasses.asdict(cfg), "window": 256}
    torch.save(content | {"state": state_dict(state)}, tmp_path / "x.pt")
    script = Path(pix2pix.__file__)
    call = [sys.executable, script, "--generate", tmp_path / "raster.tif", "--device", "cpu"]
    call += ["--checkpoint", tmp_path / "x.pt", "--out", tmp_path / "generated"]
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    benchmark.group = "raster-memory"

    def process():
        measured = [sys.executable, "-c", code, *call]
        done = subprocess.run(measured, capture_output=True, text=True, check=True)
        return int(done.stdout.splitlines()[-1]) / 1024

    megabytes = benchmark.pedantic(process, rounds=1)
    benchmark.extra_info.update(side=side, peak_megabytes=megabytes, **harness.about("cpu"))


def model(script, device, size, batch_size, timed):
    """(state, cfg, module) for generation, as main builds it with --checkpoint."""
    options = {"size": size, "batch_size": batch_size} | ({} if timed else {"width": 4})
    module, cfg = harness.config(script, **options)
    return module.build(cfg, torch.device(device), training=False), cfg, module


def note(benchmark, script, device, size, batch_size, images):
    if benchmark.stats:
        rate = images / benchmark.stats.stats.median
        benchmark.extra_info.update(
            script=script,
            size=size,
            batch_size=batch_size,
            images_per_second=rate,
            megapixels_per_second=rate * size * size / 1e6,
            **harness.about(device),
        )


@pytest.mark.benchmark(timer=harness.device_time)
@pytest.mark.parametrize("script", harness.SCRIPTS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def bench_stroke(benchmark, request, tmp_path, script, device):
    """From a stroke to its picture, as the page to paint on asks for it: 40 x 40 of 256 x 256."""
    timed = request.config.getoption("benchmark_only")
    options = {"size": 256} if timed else {"size": 64, "width": 4}
    options |= {"lc_classes": harness.TABLE, "serve": True, "data": "none", "out": str(tmp_path)}
    if script == "cyclegan":
        options["direction"] = "BtoA"
    module, cfg = harness.config(script, **options)
    state = module.build(cfg, torch.device(device), training=False)
    with mock.patch.object(page, "serve") as serve:
        module.generate(state, cfg, torch.device(device))
    (studio,) = serve.call_args.args
    labels = np.random.default_rng(0).integers(0, 14, (256, 256), np.uint8)
    photo = MemoryRaster(np.zeros((256, 256, 3), np.uint8))
    studio.canvases["1"] = studio.make(MemoryRaster(labels, cfg.classes), photo)
    query = {"canvas": "1", "x": 100, "y": 100, "width": 40, "height": 40, "samples": 1}
    colours = iter(range(1000))

    def stroke():
        return studio.stroke(query, bytes([next(colours) % 14]) * 1600)

    benchmark.group = f"stroke-256-{device}"
    done = benchmark.pedantic(stroke, rounds=10 if timed else 1, warmup_rounds=2 if timed else 0)
    assert len(done["pictures"]) == 1
    if benchmark.stats:
        benchmark.extra_info.update(
            script=script, seconds_to_picture=benchmark.stats.stats.median, **harness.about(device)
        )
