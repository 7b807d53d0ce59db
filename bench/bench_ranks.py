"""What several processes send each other: the gradients of a step, counted where they are
averaged.

    pytest bench/bench_ranks.py --benchmark-only

One process plays rank 0 of 2, with an all-reduce that only counts; what is timed is packing and
unpacking.
"""

import types

import harness
import pytest
import torch

import common
import support.processes


@pytest.mark.parametrize("script", harness.SCRIPTS)
def bench_gradients(benchmark, request, monkeypatch, script):
    timed = request.config.getoption("benchmark_only")
    options = {"size": 256 if timed else 64} | ({} if timed else {"width": 4})
    module, cfg = harness.config(script, **options)
    state = module.build(cfg, torch.device("cpu"))
    nets = [value for value in vars(state).values() if isinstance(value, torch.nn.Module)]
    nets = [net for net in nets if list(net.parameters())]  # an image pool has none
    for parameter in (p for net in nets for p in net.parameters()):
        parameter.grad = torch.ones_like(parameter)
    sent = []
    count = types.SimpleNamespace(
        is_initialized=lambda: True,
        get_world_size=lambda: 2,
        all_reduce=lambda flat: sent.append(flat.numel() * flat.element_size()),
    )
    monkeypatch.setattr(support.processes, "dist", count)

    def average():
        sent.clear()
        for net in nets:
            common.average_gradients(net)

    benchmark.group = "gradients"
    benchmark.pedantic(average, rounds=5 if timed else 1, warmup_rounds=1 if timed else 0)
    assert sum(sent) == 4 * harness.parameters(state)
    if benchmark.stats:
        benchmark.extra_info.update(script=script, gradient_bytes=sum(sent), **harness.about("cpu"))
