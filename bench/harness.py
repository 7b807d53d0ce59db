"""What the benchmarks share: a clock that waits for the device, one training step in several
variants, and how much arithmetic it is.
"""

import contextlib
import ctypes
import functools
import importlib
import json
import sys
import time
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import common
import support.device
from support.channels_last import stay_channels_last

SCRIPTS = ("pix2pix", "cyclegan", "mixlc", "mixlc_acgan")
TABLE = json.dumps([{"name": f"class {k}", "color": f"{k},0,0"} for k in range(14)])
# plain: what one would write first; fast: everything that this project adds
# nchw: the fast path in NCHW
# vgg_fp32: the fast path, with the features of VGG16 in float32
# keep_memory: what is freed stays with the process, which takes effect on the CPU alone
# the others: plain, with one part of the fast path
FAST, SINGLE = "fast", ("graph", "bf16", "channels_last", "fused", "compile")
FULL = (FAST, "nchw", "vgg_fp32")
# on CUDA: (variant, batch size), in the order of their worth
BY_WORTH = [(FAST, 1), (FAST, 16), ("nchw", 1), ("vgg_fp32", 16), ("nchw", 16), (FAST, 4)]
BY_WORTH += [(variant, 1) for variant in SINGLE]  # compile takes longest
ONLY = {"vgg_fp32": ("mixlc_acgan",), "nchw": ("cyclegan",)}  # with a style loss, with InstanceNorm


def is_edit(script):
    """Whether a script edits photographs through their land cover; the others translate."""
    return issubclass(importlib.import_module(script).Config, common.EditOptions)


def device_time():
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def config(script, **options):
    """A script's module and its Config; the edits get a table of 14 classes and a style loss that
    needs no file. The arithmetic is that of training.
    """
    support.device.set_arithmetic()
    module = importlib.import_module(script)
    options |= {"lc_classes": TABLE} if is_edit(script) and "lc_classes" not in options else {}
    options |= {"style_features": "random"} if script == "mixlc_acgan" else {}
    return module, module.Config(**options)


def random_batch(script, cfg, device):
    """Random images in the shapes that the script's train_step takes."""
    shape = cfg.batch_size, 3, cfg.size, cfg.size
    images = [torch.rand(shape, device=device) * 2 - 1 for _ in range(3)]
    if not is_edit(script):
        return tuple(images[:2])
    index = torch.randint(14, (cfg.batch_size, cfg.size, cfg.size), device=device)
    lc = nn.functional.one_hot(index, 14).permute(0, 3, 1, 2).float().contiguous()
    box = torch.tensor([[cfg.size // 4] * 4] * cfg.batch_size, device=device)
    inside = torch.ones(cfg.batch_size, dtype=torch.bool, device=device)
    return images[0], lc, images[1], box, inside, lc, images[2], lc, ~inside


def dataset(module, cfg, split, device):
    """A script's data, as its main loads it."""
    (name,) = {"Pairs", "Domains", "Edits"} & vars(module).keys()
    return getattr(module, name)(cfg, split, device)


def prepare(script, variant, device, **options):
    """(state, cfg, step) of a variant of a script.

    step(state, batch, cfg) is what main calls for "fast", and for the others the script's own
    train_step on a state that lacks what the variant does not have.
    """
    device = torch.device(device)
    fast = variant in FULL
    bf16 = variant == "bf16" or (fast and device.type == "cuda")
    options |= {"graph": fast or variant == "graph", "precision": "bf16" if bf16 else "fp32"}
    module, cfg = config(script, **options)
    nchw = mock.patch.object(support.device, "fastest_layout", lambda *_: torch.contiguous_format)
    with nchw if variant not in (FAST, "vgg_fp32") else contextlib.nullcontext():
        state = module.build(cfg, device)
    if fast and script == "mixlc_acgan" and variant != "vgg_fp32":
        state.vgg.autocast = common.autocast(cfg, device)  # as with ImageNet's weights
    for name, value in vars(state).items():
        if isinstance(value, nn.Module):
            if variant == "channels_last":
                stay_channels_last(value)
                value.to(memory_format=torch.channels_last)
            if variant == "compile":
                value.compile()
        fused = fast or variant in ("fused", "graph")
        if isinstance(value, torch.optim.Optimizer) and not fused:
            parameters = value.param_groups[0]["params"]
            setattr(state, name, torch.optim.Adam(parameters, lr=cfg.lr, betas=(cfg.beta1, 0.999)))
    return state, cfg, common.fast_step(module.train_step, cfg, device)


def keep_memory(kept):
    """Has glibc keep freed memory, as training on the CPU does, or give it back as it comes.

    As it comes is what its own rules settle at, which the first call of mallopt switches off.
    """
    if kept:
        support.device.keep_memory()
    elif sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
        mallopt(-4, 65536)  # M_MMAP_MAX
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: from this size on, a mapping for each block
        mallopt(-1, 64 * 2**20)  # M_TRIM_THRESHOLD


def parameters(state):
    """How many weights a State trains."""
    return sum(p.numel() for o in vars(state).values() if isinstance(o, torch.optim.Optimizer)
               for group in o.param_groups for p in group["params"])  # fmt: skip


@functools.cache
def step_flops(script, size, batch_size, **options):
    """Floating-point operations of convolutions and matrix products in one train_step.

    Forward and backward; two to a multiplication with its addition. Counted on tensors without
    values, which takes no time, once for all variants.
    """
    options |= {"size": size, "batch_size": batch_size, "precision": "fp32"}
    module, cfg = config(script, **options)
    state = module.build(cfg, torch.device("cpu"))
    for name, value in vars(state).items():
        if isinstance(value, (nn.Module, torch.Tensor)):
            setattr(state, name, value.to("meta"))
    for name in [name for name in vars(state) if name.startswith("opt_")]:
        nets = [net for key, net in vars(state).items() if key.startswith(name[4:])]
        weights = [weight for net in nets for weight in net.parameters()]
        setattr(state, name, torch.optim.SGD(weights, lr=0.1))
    nothing = contextlib.nullcontext()  # there is no autocast for meta
    with (
        FlopCounterMode(display=False) as counter,
        mock.patch.object(common, "autocast", lambda *_: nothing),
        mock.patch.object(torch, "autocast", lambda *_, **__: nothing),
    ):
        module.train_step(state, random_batch(script, cfg, "meta"), cfg)
    return counter.get_total_flops()


def matrix_rate(device, dtype, rounds=10):
    """The operations a second that this device reaches on large square matrix products: its
    practical peak.
    """
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        begin = device_time()
        a @ b
        best = min(best, device_time() - begin)
    return 2 * side**3 / best


def about(device):
    """What every result says of where it comes from."""
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return {"device": name, "torch": torch.__version__}
