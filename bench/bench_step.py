"""The four scripts' own train_step: the plain path, what the fast path adds one thing at a time, and the fast path.

    pytest bench/bench_step.py --benchmark-only                    on the CPU, and on a GPU where there is one
    pytest bench/bench_step.py --benchmark-only -k cuda

plain is what one would write first: eager, float32, NCHW, Adam as it comes. The ratio to it, in one run, is the result.
"""

import harness
import pytest
import torch

PLAIN, FAST = harness.VARIANTS[0], harness.VARIANTS[-1]
CPU_VARIANTS = (PLAIN, "channels_last", "fused", "bf16", FAST)  # compiling on a CPU takes minutes a network
RUNS = [  # device, size, batch size, variants, rounds
    ("cpu", 64, 1, CPU_VARIANTS, 6),
    ("cpu", 64, 4, (PLAIN, FAST), 3),
    ("cpu", 256, 1, (PLAIN, FAST), 1),  # where a step of cyclegan takes ten seconds
    *(("cuda", 256, batch_size, harness.VARIANTS, 30) for batch_size in (1, 4, 16)),
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
]


@pytest.fixture(scope="session")
def peak():
    """The device's matrix rate for a type, measured once."""
    rates = {}
    return lambda device, dtype: rates.setdefault((device, dtype), harness.matrix_rate(device, dtype))


@pytest.mark.benchmark(timer=harness.device_time)
@pytest.mark.parametrize(("script", "device", "size", "batch_size", "variant", "rounds"), CASES)
def bench_step(benchmark, request, peak, script, device, size, batch_size, variant, rounds):
    timed = request.config.getoption("benchmark_only")
    if not timed and (size, batch_size) != (64, 1):
        pytest.skip("as a test: the small size once")
    options = {"size": size, "batch_size": batch_size} | ({} if timed else {"width": 4})
    state, cfg, step = harness.prepare(script, variant, device, **options)
    batch = harness.random_batch(script, cfg, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    benchmark.group = f"step-{size}-batch-{batch_size}-{script}-{device}"
    warmup = (8 if device == "cuda" else 1) if timed else 0
    losses = benchmark.pedantic(step, (state, batch, cfg), rounds=rounds, warmup_rounds=warmup)
    assert all(loss.isfinite() for loss in losses.values())
    if not benchmark.stats:
        return
    seconds, flops = benchmark.stats.stats.median, harness.step_flops(script, size=size, batch_size=batch_size)
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    benchmark.extra_info.update(
        script=script,
        variant=variant,
        size=size,
        batch_size=batch_size,
        dtype=str(dtype).removeprefix("torch."),
        parameters=harness.parameters(state),
        seconds=seconds,
        images_per_second=batch_size / seconds,
        flops_per_step=flops,
        share_of_matrix_rate=flops / seconds / peak(device, dtype),
        **harness.about(device),
    )
    if device == "cuda":
        benchmark.extra_info["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
