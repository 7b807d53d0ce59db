"""The four scripts' own train_step: the plain path, what the fast path adds one thing at a time,
and the fast path.

    pytest bench/bench_step.py --benchmark-only             on the CPU, and on a GPU if there is one
    pytest bench/bench_step.py --benchmark-only -k cuda

plain is what one would write first: eager, float32, NCHW, Adam as it comes. The ratio to it is
the result: the two take turns, and so does the reference implementation's step, where there is one.
"""

import numpy as np
import pytest
import reference
import torch

import harness
from support.device import has_avx512

CPU_VARIANTS = ("fast", "channels_last", "bf16", "fused", "keep_memory")
RUNS = [  # device, size, batch size, variants, rounds
    ("cpu", 64, 1, CPU_VARIANTS, 5),
    ("cpu", 64, 4, ("fast",), 3),
    ("cpu", 256, 1, ("fast", "channels_last", "bf16"), 3),  # seven seconds a step of cyclegan
    *(("cuda", 256, batch_size, (variant,), 30) for variant, batch_size in harness.BY_WORTH),
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
    if script in harness.ONLY.get(variant, harness.SCRIPTS)
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
    if timed and (device, variant) == ("cpu", "bf16") and not has_avx512():
        pytest.skip("minutes a step without AVX-512")
    options = {"size": size, "batch_size": batch_size} | ({} if timed else {"width": 4})
    if not timed and script == "mixlc_acgan":
        options["style_layers"] = "relu1_1"
    state, cfg, step = harness.prepare(script, variant, device, **options)
    batch = harness.random_batch(script, cfg, device)
    for _ in range((8 if device == "cuda" else 1) if timed else 0):
        step(state, batch, cfg)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else None

    rivals = {}  # no plain cyclegan at batch 16: some 34 GB of activations
    if (script, batch_size) != ("cyclegan", 16):
        rivals["plain"] = harness.prepare(script, "plain", device, **options)
        if script in reference.STEPS and variant == "fast":
            own_state, own_cfg, _ = harness.prepare(script, "plain", device, **options)
            rivals["reference"] = own_state, own_cfg, reference.STEPS[script]
    seconds = {name: [] for name in rivals}

    def time_rivals():  # before every round, so that a slow moment of the machine meets all
        harness.keep_memory(False)
        for name, (rival_state, rival_cfg, rival_step) in rivals.items():
            begin = harness.device_time()
            rival_step(rival_state, batch, rival_cfg)
            seconds[name].append(harness.device_time() - begin)
        harness.keep_memory(variant in ("keep_memory", "fast"))

    time_rivals()
    for times in seconds.values():
        times.clear()
    benchmark.group = f"step-{size}-batch-{batch_size}-{script}-{device}"
    losses = benchmark.pedantic(
        step, (state, batch, cfg), setup=time_rivals, rounds=rounds if timed else 1
    )
    assert all(loss.isfinite() for loss in losses.values())
    if not benchmark.stats:
        return
    own = benchmark.stats.stats.median
    flops = harness.step_flops(script, size=size, batch_size=batch_size)
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    benchmark.extra_info.update(
        script=script,
        variant=variant,
        size=size,
        batch_size=batch_size,
        dtype=str(dtype).removeprefix("torch."),
        parameters=harness.parameters(state),
        seconds=own,
        images_per_second=batch_size / own,
        flops_per_step=flops,
        share_of_matrix_rate=flops / own / peak(device, dtype),
        **{f"{name}_seconds": float(np.median(times)) for name, times in seconds.items()},
        peak_memory_bytes=memory,
        **harness.about(device),
    )
