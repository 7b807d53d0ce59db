"""A whole epoch, loader and step together: how long, and how much of it the step waits for its
data.

    pytest bench/bench_epoch.py --benchmark-only

An epoch over real files is timed against as many steps on one batch that never changes: what is
missing there is the loading. Pairs are JPEGs of 600x1200 pixels, served from the store.
"""

import numpy as np
import pytest
import torch
from PIL import Image

import common
import harness
from support.demo import landscape

RUNS = [("cpu", 64, 1, 16), ("cpu", 64, 4, 16), ("cuda", 256, 1, 64), ("cuda", 256, 16, 64)]
CASES = [
    pytest.param(
        *(script, device, size, batch_size, count),
        id=f"{script}-{device}-{size}-{batch_size}",
        marks=[pytest.mark.cuda] if device == "cuda" else [],
    )
    for device, size, batch_size, count in RUNS
    for script in harness.SCRIPTS
]
SCHEDULE = 200 * 1096  # images that a run of the paper's sees: 200 epochs of the maps data


@pytest.fixture(scope="session")
def files(tmp_path_factory, request):
    """A directory of 64 pairs, satellite | map."""
    root = tmp_path_factory.mktemp("pairs")
    for k in range(64 if request.config.getoption("benchmark_only") else 4):
        satellite, drawn, _ = landscape(np.random.default_rng(k % 4), 600)
        both = Image.fromarray(np.concatenate([satellite, drawn], 1))
        for split in ("train", "val") if k < 2 else ("train",):
            (root / split).mkdir(exist_ok=True)
            both.save(root / split / f"{k}.jpg", quality=90)
    return root


@pytest.mark.benchmark(timer=harness.device_time)
@pytest.mark.parametrize(("script", "device", "size", "batch_size", "count"), CASES)
def bench_epoch(benchmark, request, files, tmp_path, script, device, size, batch_size, count):
    timed = request.config.getoption("benchmark_only")
    if not timed and batch_size > 1:
        pytest.skip("as a test: batch 1")
    options = {"size": size, "batch_size": batch_size, "data": str(files), "cache": str(tmp_path)}
    options |= {"width": 16 if device == "cpu" else 64} if timed else {"width": 4}
    options |= {"lc_classes": "maps"} if harness.is_edit(script) else {}
    if not timed and script == "mixlc_acgan":
        options["style_layers"] = "relu1_1"
    state, cfg, step = harness.prepare(script, harness.FAST, device, **options)
    train = harness.dataset(harness.config(script)[0], cfg, "train", torch.device(device))
    steps = (count if timed else 4) // batch_size or 1
    batch = next(train.batches(0))

    def epoch(number):
        for _, batch in zip(range(steps), train.batches(number), strict=False):
            common.seed_step(cfg.seed, number, 0)
            step(state, batch, cfg)

    alone = []

    def steps_alone():  # before every round, so that a slow moment of the machine meets both
        begin = harness.device_time()
        for _ in range(steps):
            common.seed_step(cfg.seed, 0, 0)
            step(state, batch, cfg)
        alone.append(harness.device_time() - begin)

    numbers = iter(range(1000))
    benchmark.group = f"epoch-{size}-batch-{batch_size}-{script}-{device}"
    rounds = (5 if device == "cuda" else 2) if timed else 1
    if timed:
        epoch(next(numbers))
        steps_alone()
        alone.clear()
    benchmark.pedantic(lambda: epoch(next(numbers)), setup=steps_alone, rounds=rounds)
    if not benchmark.stats:
        return
    seconds, alone = benchmark.stats.stats.median, float(np.median(alone))
    benchmark.extra_info.update(
        script=script,
        size=size,
        batch_size=batch_size,
        seconds_per_image=seconds / steps / batch_size,
        share_waiting=max(0.0, 1 - alone / seconds),
        **harness.about(device),
    )
    if size == 256:
        benchmark.extra_info["hours_of_the_full_schedule"] = (
            seconds / steps / batch_size * SCHEDULE / 3600
        )
