"""Where the time of a training step on the CPU goes, and what is left to gain.

    python bench/roofline.py [SCRIPT ...]         at 256 pixels, batch size 1; default: all
    python bench/roofline.py cyclegan --keep      also into bench/roofline.json, for bench/README.md

Every convolution of a step is timed alone, forward and backward, in float32, beside the whole step.
The sum of these times is nearly a floor (it has gradients that the step leaves out): a faster step
needs a faster library of convolutions. The rate of each one shows the shapes that are slow.
"""

import argparse
import collections
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F

import harness
from support.device import keep_memory

KEPT = Path(__file__).parent / "roofline.json"
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
    x, weight = torch.randn(call.input), torch.randn(call.weight)
    wanted = []
    for tensor, asked in zip((x, weight), call.gradients, strict=True):
        wanted += [tensor.requires_grad_()] if asked else []

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
    layers = []
    for call, (forwards, backwards) in convolutions(lambda: step(state, batch, cfg)).items():
        forward, backward = time_of(call)
        work = gflop(call) * (forwards + sum(call.gradients) * backwards)
        layers.append((forwards * forward + backwards * backward, work, call))
    layers.sort(reverse=True)
    return layers, {
        "step": best(lambda: step(state, batch, cfg)),
        "step_memory_given_back": given_back,
        "matrix_rate": harness.matrix_rate("cpu", torch.float32) / 1e9,
        "convolutions_seconds": sum(seconds for seconds, _, _ in layers),
        "convolutions_gflop": sum(work for _, work, _ in layers),
        **harness.about("cpu"),
    }


def main(argv):
    how = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**how)
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT")
    parser.add_argument("--keep", action="store_true", help="write bench/roofline.json")
    asked = parser.parse_args(argv)
    scripts = asked.scripts or harness.SCRIPTS
    kept = json.loads(KEPT.read_text())
    for script in scripts:
        fresh = multiprocessing.get_context("spawn").Pool(1)  # keep_memory lasts for a process
        layers, kept[script] = fresh.apply(measure, (script,))
        fresh.close()
        print(script, kept[script])
        for seconds, work, call in layers[:12]:
            shapes = f"{call.name} {call.input}, {call.weight}"
            print(f"  {seconds:.3f} s, {work / seconds:.0f} GFLOP/s: {shapes}")
    if asked.keep:
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
