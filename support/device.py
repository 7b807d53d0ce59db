"""Device, precision, memory format, Adam, CUDA graph."""

import atexit
import contextlib
import ctypes
import datetime
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from support.channels_last import stay_channels_last
from support.errors import UserError
from support.processes import rank

WITH_INSTANCE_NORM = torch.channels_last  # of such networks on CUDA; or torch.contiguous_format


def start(cfg):
    """The device to work on; starts the process group (under torchrun) and the random numbers."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible here: pass --device cpu")
    cuda = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        set_arithmetic()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        hours = datetime.timedelta(hours=6)  # others wait while one decodes the images
        where = device if cuda else None
        dist.init_process_group("nccl" if cuda else "gloo", timeout=hours, device_id=where)
        atexit.register(dist.destroy_process_group)  # after main, and the graph that it captured
    if not cuda:
        keep_memory()
    torch.manual_seed(cfg.seed)
    return device


def set_arithmetic():
    """On CUDA: the fastest algorithm of each convolution, and float32 without TF32."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # off for matrix products by default


def keep_memory():
    """Has glibc keep what is freed for the next step.

    Blocks of 32 MB and more (activations at 256 pixels are) go back to the system otherwise, and
    are mapped, page by page, anew in every step.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes


def seed_step(seed, epoch, batch):
    """Sets PyTorch's random numbers from (seed, epoch, batch, rank): a resume needs no state.

    Of the CPU and of this process's GPU: torch.manual_seed, which visits every backend, takes ten
    times as long.
    """
    words = np.random.SeedSequence([seed, epoch, batch, rank()]).generate_state(2)
    number = int(words[0]) << 31 ^ int(words[1])
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(number)


def autocast(cfg, device):
    """bf16 autocast where --precision says so (auto: on CUDA); never fp16, which GANs overflow."""
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def full_precision(x):
    """At least float32, as losses need: bf16 becomes float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def own_statistics(cfg):
    """Whether BatchNorm generates with the image's own statistics: --eval-norm batch, or auto.

    At batch size 1 running statistics differ from what the layers saw in training.
    """
    return cfg.eval_norm == "batch" or (cfg.eval_norm == "auto" and cfg.batch_size == 1)


@contextlib.contextmanager
def generating(net, cfg, dropout=False):
    """Within it a network generates: BatchNorm as --eval-norm chooses, dropout on or off.

    With an image's own statistics the running ones stay as they are. Afterwards the network
    trains again.
    """
    own = own_statistics(cfg)
    for module in net.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(own)
            module.track_running_stats = not own
        elif isinstance(module, nn.Dropout):
            module.train(dropout)
    try:
        yield
    finally:
        for module in net.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = True


def to_device(net, device):
    """A network on the device, in the memory format that is fastest there."""
    instance_norm = any(isinstance(module, nn.InstanceNorm2d) for module in net.modules())
    layout = WITH_INSTANCE_NORM if instance_norm else torch.channels_last
    if device.type == "cpu":
        layout = torch.contiguous_format
    elif layout == torch.channels_last:
        stay_channels_last(net)
    return net.to(device, memory_format=layout)


def adam(module, cfg, device):
    """Fused Adam, betas (beta1, 0.999); on CUDA its rate is a tensor that a graph can read."""
    cuda, betas = device.type == "cuda", (cfg.beta1, 0.999)
    lr = torch.tensor(cfg.lr, device=device) if cuda else cfg.lr
    return torch.optim.Adam(module.parameters(), lr, betas, fused=True, capturable=cuda)


def set_lr(optimizer, lr):
    """Gives an optimizer the rate lr, in place where it is a tensor that a captured graph reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class GraphedStep:
    """train_step captured whole in one CUDA graph.

    The first calls run as they are on a side stream (they train, too), the next captures, and
    from then on a call copies its batch into the graph's own tensors and replays.
    Called like train_step. The losses that it returns are overwritten by the next call.
    """

    warmup = 3

    def __init__(self, step):
        self.step, self.calls, self.graph, self.side = step, 0, None, torch.cuda.Stream()

    def __call__(self, state, batch, cfg):
        self.calls += 1
        if self.calls <= self.warmup:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                losses = self.step(state, batch, cfg)
            torch.cuda.current_stream().wait_stream(self.side)
            return detached(losses)
        if self.graph is None:
            self.batch = tuple(tensor.clone() for tensor in batch)
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread may pin memory meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.losses = detached(self.step(state, self.batch, cfg))
            self.graph = graph
        for static, tensor in zip(self.batch, batch, strict=True):
            static.copy_(tensor)
        self.graph.replay()
        return self.losses


def detached(losses):
    """Losses without the autograd graphs that hang on them, and hold a step's memory."""
    return {name: loss.detach() for name, loss in losses.items()}


def fast_step(step, cfg, device):
    """train_step as this device runs it fastest: in a CUDA graph, or as it is (CPU, --no-graph)."""
    return GraphedStep(step) if device.type == "cuda" and cfg.graph else step
