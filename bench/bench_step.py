"""The four scripts' own train_step: the plain path, what the fast path adds one thing at a time,
and the fast path.

    pytest bench/bench_step.py --benchmark-only             on the CPU, and on a GPU if there is one
    pytest bench/bench_step.py --benchmark-only -k cuda

plain is what one would write first: eager, float32, NCHW, Adam as it comes. The ratio to it is
the result: the two take turns.
"""

import numpy as np
import pytest
import torch

import harness

CPU_VARIANTS = ("channels_last", "bf16", "fused", "keep_memory", "vgg_bf16", "fast")
RUNS = [  # device, size, batch size, variants, rounds
    ("cpu", 64, 1, CPU_VARIANTS, 5),
    ("cpu", 64, 4, ("fast",), 3),
    ("cpu", 256, 1, ("fast",), 3),  # where a step of cyclegan takes seven seconds
    *(("cuda", 256, batch_size, harness.VARIANTS[1:], 30) for batch_size in (1, 4, 16)),
]
CASES = [
    pytest.param(
        *(script, device, size, batch_size, variant, rounds),
        id=f"{script}-{device}-{size}-{batch_size}-{variant}",
        marks=[pytest.mark.cuda] if device == "cuda" else [],
    )
    for device, size, batch_size, variants, rounds in RUNS
    for script in harness.SCRIPTS
    for variant in variants
    if variant != "vgg_bf16" or script == "mixlc_acgan"  # which has a style loss
]


@pytest.fixture(scope="session")
def peak():
    """The device's matrix rate for a type, measured once."""
    rates = {}
    return lambda device, dtype: rates.setdefault(
        (device, dtype), harness.matrix_rate(device, dtype)
    )


@pytest.mark.benchmark(timer=harness.device_time)
@pytest.mark.parametrize(("script", "device", "size", "batch_size", "variant", "rounds"), CASES)
def bench_step(benchmark, request, peak, script, device, size, batch_size, variant, rounds):
    timed = request.config.getoption("benchmark_only")
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if not timed and (size, batch_size) != (64, 1):
        pytest.skip("as a test: the small size once")
    options = {"size": size, "batch_size": batch_size} | ({} if timed else {"width": 4})
    state, cfg, step = harness.prepare(script, variant, device, **options)
    batch = harness.random_batch(script, cfg, device)
    for _ in range((8 if device == "cuda" else 1) if timed else 0):
        step(state, batch, cfg)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else None

    plain_state, plain_cfg, plain_step = harness.prepare(script, "plain", device, **options)
    plain = []

    def time_plain():  # before every round, so that a slow moment of the machine meets both
        harness.keep_memory(False)
        begin = harness.device_time()
        plain_step(plain_state, batch, plain_cfg)
        plain.append(harness.device_time() - begin)
        harness.keep_memory(variant in ("keep_memory", "vgg_bf16", "fast"))

    time_plain()
    plain.clear()
    benchmark.group = f"step-{size}-batch-{batch_size}-{script}-{device}"
    losses = benchmark.pedantic(
        step, (state, batch, cfg), setup=time_plain, rounds=rounds if timed else 1
    )
    assert all(loss.isfinite() for loss in losses.values())
    if not benchmark.stats:
        return
    seconds, flops = (
        benchmark.stats.stats.median,
        harness.step_flops(script, size=size, batch_size=batch_size),
    )
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    benchmark.extra_info.update(
        script=script,
        variant=variant,
        size=size,
        batch_size=batch_size,
        dtype=str(dtype).removeprefix("torch."),
        parameters=harness.parameters(state),
        seconds=seconds,
        plain_seconds=float(np.median(plain)),
        images_per_second=batch_size / seconds,
        flops_per_step=flops,
        share_of_matrix_rate=flops / seconds / peak(device, dtype),
        peak_memory_bytes=memory,
        **harness.about(device),
    )
