"""Where the time of a training step on the CPU goes, and what is left to gain.

    python bench/roofline.py [SCRIPT ...]         at 256 pixels, batch size 1; default: all
    python bench/roofline.py cyclegan --keep      also into docs/roofline.json, for bench/README.md

Every convolution of a step is timed alone, forward and backward, in float32; beside them stands
the whole step. Below what the convolutions take the step cannot go without another library; what
each reaches beside the best says which shapes that library is slow at.
"""

import collections
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import harness
import torch
import torch.nn.functional as F

from support.device import keep_memory

KEPT = Path(__file__).parent.parent / "docs" / "roofline.json"
SIZE, ROUNDS = 256, 5


def best(run):
    """The least seconds of some runs."""
    run()
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


class Call(NamedTuple):
    """A convolution: its function's name, shapes, other arguments, and whether the input's and the
    weight's gradients are wanted.
    """

    name: str
    input: tuple
    weight: tuple
    arguments: tuple
    gradients: tuple


def convolutions(step):
    """{Call: [forward, backward]}: how often a step calls it, and comes back through it."""
    found = collections.defaultdict(lambda: [0, 0])

    def noted(name):
        function = getattr(F, name)

        def call(x, weight, bias, stride=1, padding=0, *more):
            output = function(x, weight, bias, stride, padding, *more)
            gradients = x.requires_grad, weight.requires_grad
            arguments = stride, padding, *more
            passes = found[Call(name, (*x.shape,), (*weight.shape,), arguments, gradients)]
            passes[0] += 1
            if output.requires_grad:
                output.register_hook(lambda _: passes.__setitem__(1, passes[1] + 1))
            return output

        return mock.patch.object(F, name, call)

    with noted("conv2d"), noted("conv_transpose2d"):
        step()
    return found


def gflop(call):
    """Of a forward pass: each place of the smaller side meets every weight of its channel."""
    x, weight = (torch.empty(shape, device="meta") for shape in (call.input, call.weight))
    plain = call.name == "conv2d"
    places = F.conv2d(x, weight, None, *call.arguments) if plain else x
    return 2 * places.numel() * weight[0].numel() / 1e9


def time_of(call):
    """(seconds of a forward pass, of a backward pass) of one convolution."""
    x, weight = (torch.randn(shape) for shape in (call.input, call.weight))
    wanted = [
        tensor.requires_grad_()
        for tensor, asked in zip((x, weight), call.gradients, strict=True)
        if asked
    ]

    def run():
        return getattr(F, call.name)(x, weight, None, *call.arguments)

    upstream = torch.randn_like(run())
    with torch.no_grad():
        forward = best(run)
    if not wanted:
        return forward, 0.0
    return forward, best(lambda: torch.autograd.grad(run(), wanted, upstream)) - forward


def measure(script):
    """A script's step, before and after freed memory is kept for the next, and its convolutions."""
    state, cfg, step = harness.prepare(script, harness.FAST, "cpu", size=SIZE, batch_size=1)
    batch = harness.random_batch(script, cfg, "cpu")
    given_back = best(lambda: step(state, batch, cfg))
    keep_memory()
    found = convolutions(lambda: step(state, batch, cfg))
    whole = best(lambda: step(state, batch, cfg))
    layers = []
    for call, (forwards, backwards) in found.items():
        forward, backward = time_of(call)
        work = gflop(call) * (forwards + sum(call.gradients) * backwards)
        seconds = forwards * forward + backwards * backward
        shapes = {"layer": call.name, "input": call.input, "weight": call.weight}
        layers.append(
            {**shapes, "passes": [forwards, backwards], "gflop": work, "seconds": seconds}
        )
    layers.sort(key=lambda layer: -layer["seconds"])
    rate = harness.matrix_rate("cpu", torch.float32) / 1e9
    totals = {"step": whole, "step_memory_given_back": given_back}
    totals |= {f"convolutions_{part}": sum(layer[part] for layer in layers)
               for part in ("seconds", "gflop")}  # fmt: skip
    return {**totals, "matrix_rate": rate, "layers": layers, **harness.about("cpu")}


def main(argv):
    scripts = [word for word in argv if not word.startswith("-")] or harness.SCRIPTS
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    for script in scripts:
        fresh = multiprocessing.get_context("spawn").Pool(1)  # keep_memory holds for a process
        kept[script] = measured = fresh.apply(measure, (script,))
        fresh.close()
        layers = measured.pop("layers")
        seconds = measured["convolutions_seconds"]
        rate = measured["convolutions_gflop"] / seconds
        print(f"{script}: a step {measured['step']:.2f} s, its convolutions alone {seconds:.2f} s,")
        print(f"{rate:.0f} GFLOP/s; matrix products reach {measured['matrix_rate']:.0f}")
        for layer in layers[:12]:
            rate = layer["gflop"] / layer["seconds"]
            shapes = f"{layer['layer']} {layer['input']}, {layer['weight']}"
            print(f"  {layer['seconds']:.3f} s {layer['passes']} {shapes}: {rate:.0f} GFLOP/s")
    if "--keep" in argv:
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
