"""Generation: images a second through translate, and megapixels a second over a raster cut into
tiles.

    pytest bench/bench_generate.py --benchmark-only

What is timed is what --generate calls, from bytes to bytes, without reading and writing files.
"""

import harness
import pytest
import torch

import common

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
    return (pictures, labels) if "mixlc" in script else (pictures,)


def generate(module, state, cfg, pictures, labels=None):
    inputs = common.from_bytes(pictures)
    inputs = inputs if labels is None else (inputs, common.one_hot(labels, 14))
    return common.to_bytes(module.translate(state, inputs, cfg))


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


@pytest.mark.benchmark(timer=harness.device_time)
@pytest.mark.parametrize(("script", "device", "size", "batch_size"), CASES)
def bench_raster(benchmark, request, script, device, size, batch_size):
    """A raster of 4 x 4 tiles (16 x 16 on a GPU), side by side, in batches."""
    timed = request.config.getoption("benchmark_only")
    if not timed and size != 64:
        pytest.skip("as a test: the small size")
    if device == "cpu" and size != 64:
        pytest.skip("on the CPU: tiles of 64 pixels")
    state, cfg, module = model(script, device, size, batch_size, timed)
    side = (16 if device == "cuda" else 4) if timed else 2
    tiles = inputs_for(script, cfg, side * side, device)

    def raster():
        parts = zip(*(kind.split(batch_size) for kind in tiles), strict=True)
        fakes = torch.cat([generate(module, state, cfg, *part) for part in parts])
        rows = fakes.view(side, side, 3, size, size).permute(
            0, 3, 1, 4, 2
        )  # (side, size, side, size, 3)
        return rows.reshape(side * size, side * size, 3).cpu()

    benchmark.group = f"raster-{size}-batch-{batch_size}-{device}"
    picture = benchmark.pedantic(raster, rounds=3 if timed else 1, warmup_rounds=1 if timed else 0)
    assert picture.shape == (side * size, side * size, 3)
    note(benchmark, script, device, size, batch_size, images=side * side)


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
