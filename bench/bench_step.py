"""The four scripts' own train_step: the plain path, what the fast path adds one thing at a time, and the fast path.

    pytest bench/bench_step.py --benchmark-only                    64 pixels on the CPU, 256 on a GPU where there is one
    pytest bench/bench_step.py --benchmark-only -k cuda

plain is what one would write first: eager, float32, NCHW, Adam as it comes. Ratios within a group are the result.
"""

import importlib
import json
import time

import pytest
import torch
from torch import nn

import common

SCRIPTS = ("pix2pix", "cyclegan", "mixlc", "mixlc_acgan")
TABLE = json.dumps([{"name": f"class {k}", "color": f"{k},0,0"} for k in range(14)])
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


def device_time():
    """Seconds, after the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def settings(script, size, width, batch_size, variant, device):
    module = importlib.import_module(script)
    options = {"size": size, "width": width, "batch_size": batch_size, "graph": variant in ("graph", "fast")}
    options["precision"] = "bf16" if variant == "bf16" or (variant == "fast" and device == "cuda") else "fp32"
    options |= {"lc_classes": TABLE} if "mixlc" in script else {}
    options |= {"style_features": "random"} if script == "mixlc_acgan" else {}
    return module, module.Config(**options)


def batch_for(script, cfg, device):
    """Random images in the shapes that the script's train_step takes."""
    shape = cfg.batch_size, 3, cfg.size, cfg.size
    images = [torch.rand(shape, device=device) * 2 - 1 for _ in range(3)]
    if "mixlc" not in script:
        return tuple(images[:2])
    index = torch.randint(14, (cfg.batch_size, cfg.size, cfg.size), device=device)
    lc = nn.functional.one_hot(index, 14).permute(0, 3, 1, 2).float()
    box = torch.tensor([[cfg.size // 4] * 4] * cfg.batch_size, device=device)
    if script == "mixlc":
        return images[0], lc, images[1], box, torch.ones(cfg.batch_size, dtype=torch.bool, device=device), images[2]
    return images[0], lc, images[1], box, lc, images[2], lc


def prepare(script, size, width, batch_size, variant, device):
    """A function of no arguments that runs one training step of a variant."""
    module, cfg = settings(script, size, width, batch_size, variant, device)
    state = module.build(cfg, torch.device(device))
    for name, value in vars(state).items():
        if isinstance(value, nn.Module) and variant not in ("channels_last", "fast"):
            value.to(memory_format=torch.contiguous_format)
        if isinstance(value, torch.optim.Optimizer) and variant not in ("fused", "graph", "fast"):
            setattr(state, name, torch.optim.Adam(value.param_groups[0]["params"], lr=cfg.lr, betas=(cfg.beta1, 0.999)))
    step = common.fast_step(module.train_step, cfg, torch.device(device))
    batch = batch_for(script, cfg, device)
    return lambda: step(state, batch, cfg), state


@pytest.mark.benchmark(timer=device_time)
@pytest.mark.parametrize("variant", ["plain", "channels_last", "fused", "bf16", "graph", "fast"])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def bench_step(benchmark, request, script, batch_size, variant, device):
    if device == "cpu" and (variant in ("bf16", "graph") or batch_size > 1):
        pytest.skip("on the CPU: float32, no graph, batch 1")
    timed = request.config.getoption("benchmark_only")
    size, width = (256, 64) if device == "cuda" else (64, 16)
    if not timed:
        size, width = 64, 4
    step, state = prepare(script, size, width, batch_size, variant, device)
    benchmark.group = f"{script}-{size}-batch-{batch_size}-{device}"
    rounds = 30 if device == "cuda" else 8
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=6 if device == "cuda" else 2)
    if benchmark.stats:
        extra = {"images_per_second": batch_size / benchmark.stats.stats.median, "dtype": variant, "device": device}
        nets = [value for value in vars(state).values() if isinstance(value, nn.Module)]
        extra["parameters"] = sum(p.numel() for net in nets for p in net.parameters())
        extra["torch"] = torch.__version__
        if device == "cuda":
            extra |= {"device": torch.cuda.get_device_name(), "peak_memory": torch.cuda.max_memory_allocated()}
        benchmark.extra_info.update(extra)
