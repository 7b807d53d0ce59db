"""Device, precision, memory format, Adam, CUDA graph."""

import atexit
import contextlib
import ctypes
import datetime
import os
import signal
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from support.channels_last import stay_channels_last
from support.errors import UserError, print_once
from support.processes import rank


def start(cfg):
    """Chooses the device, and starts random numbers and, under torchrun, the process group."""
    cuda = cfg.device != "cpu" and torch.cuda.is_available()
    if cfg.device == "cuda" and not cuda:
        raise UserError("--device cuda: no CUDA device is visible here: pass --device cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count():
        raise UserError(f"--nproc-per-node: only {torch.cuda.device_count()} GPUs are visible here")
    if cuda:
        torch.cuda.set_device(device)
        set_arithmetic()
    else:
        keep_memory()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        hours = datetime.timedelta(hours=6)  # the others wait while one decodes the images
        where = device if cuda else None
        before = [(n, signal.signal(n, signal.SIG_DFL)) for n in (signal.SIGINT, signal.SIGTERM)]
        dist.init_process_group("nccl" if cuda else "gloo", timeout=hours, device_id=where)
        for number, handler in before:  # Python's would wait until all processes are there
            signal.signal(number, handler or signal.SIG_DFL)
        atexit.register(dist.destroy_process_group)  # after main, and the graph that it captured
    torch.manual_seed(cfg.seed)
    return device


def set_arithmetic():
    """On CUDA: the fastest algorithm of each convolution, and float32 without TF32."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # off for matrix products by default


def keep_memory():
    """Makes glibc keep freed memory for the next step.

    Otherwise blocks of 32 MB and more, such as activations at 256 pixels, return to the system,
    and every step maps them anew, page by page.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes


def has_avx512():
    """Whether this CPU has AVX-512, which bf16 and channels_last need to be fast (bench/README)."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def recommend_precision(cfg):
    """Prints a remark if a new run on the CPU would be faster in another --precision."""
    if cfg.device != "cpu" or cfg.quick:
        return
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions
    if cfg.precision == "auto" and capabilities.get("amx_bf16"):
        print_once("this CPU has AMX: training is faster with --precision bf16")
    if cfg.precision == "bf16" and not has_avx512():
        print_once("this CPU has no AVX-512: training is much faster with --precision fp32")


def seed_step(seed, epoch, batch):
    """Seeds PyTorch on the CPU and this process's GPU by (seed, epoch, batch, rank).

    So a resume needs no state. torch.manual_seed, which visits every backend, is ten times slower.
    """
    words = np.random.SeedSequence([seed, epoch, batch, rank()]).generate_state(2)
    number = (int(words[0]) << 31) ^ int(words[1])
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(number)


def autocast(cfg, device):
    """Autocast to bf16 by --precision; never to fp16, which overflows in GANs."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=in_bf16(cfg, device))


def in_bf16(cfg, device):
    """Whether networks compute in bf16: auto is bf16 on CUDA, for pictures of 8 bits.

    Its 8 bits of significand give outputs near -1 and 1 steps of 1/256: too coarse for 16 bits.
    GPUs before Ampere, such as the T4, only emulate it: there auto is float32.
    """
    if cfg.precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return fast and not (cfg.limits_A or cfg.limits_B)
    return cfg.precision == "bf16"


def full_precision(x):
    """x in float32 or more, for losses: bf16 becomes float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def own_statistics(cfg):
    """Whether BatchNorm generates with the image's own statistics: --eval-norm batch, or auto.

    At batch size 1 running statistics differ from what the layers saw in training.
    """
    return cfg.eval_norm == "batch" or (cfg.eval_norm == "auto" and cfg.batch_size == 1)


@contextlib.contextmanager
def generating(net, cfg, dropout=False):
    """A context in which a network generates: BatchNorm by --eval-norm, nn.Dropout on or off.

    Running statistics do not change. Afterwards the network is in training mode.
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


def fastest_layout(net, device):
    """The memory format in which a network is fastest: channels_last, or contiguous (NCHW)."""
    instance_norm = any(isinstance(module, nn.InstanceNorm2d) for module in net.modules())
    last = device.type == "cuda" or (instance_norm and has_avx512())
    return torch.channels_last if last else torch.contiguous_format


def to_device(net, device):
    """Moves a network to the device, in the memory format that is fastest there."""
    layout = fastest_layout(net, device)
    if layout == torch.channels_last:
        stay_channels_last(net)
    return net.to(device, memory_format=layout)


def adam(module, cfg, device):
    """Fused Adam, betas (beta1, 0.999); on CUDA its rate is a tensor that a graph can read."""
    cuda, betas = device.type == "cuda", (cfg.beta1, 0.999)
    lr = torch.tensor(cfg.lr, device=device) if cuda else cfg.lr
    return torch.optim.Adam(module.parameters(), lr, betas, fused=True, capturable=cuda)


def set_lr(optimizer, lr):
    """Sets an optimizer's learning rate, in place if a captured graph may read it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class GraphedStep:
    """train_step captured whole in one CUDA graph, and called like it.

    The first calls run train_step on a side stream, the next one captures it. From then on a call
    copies its batch into the graph's own tensors and replays, and overwrites the losses of the
    call before.
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
            self.batch, before = tuple(tensor.clone() for tensor in batch), set_by_python(state)
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread may pin memory meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.losses = detached(self.step(state, self.batch, cfg))
            if set_by_python(state) != before:  # such as a count of steps, on which it branches
                raise UserError("train_step sets parts of State, which a graph cannot: --no-graph")
            self.graph = graph
        for static, tensor in zip(self.batch, batch, strict=True):
            static.copy_(tensor)
        self.graph.replay()
        return self.losses


def set_by_python(state):
    """The numbers of a State, and which tensors it has."""
    numbers = {name: x for name, x in vars(state).items() if isinstance(x, (int, float))}
    tensors = {name: id(x) for name, x in vars(state).items() if isinstance(x, torch.Tensor)}
    return numbers | tensors


def detached(losses):
    """Losses {name: 0-d tensor} without their autograd graphs, which keep a step's memory."""
    for name, loss in losses.items():
        if not isinstance(loss, torch.Tensor) or loss.ndim:
            raise TypeError(f"loss {name}: train_step must return 0-d tensors")
    return {name: loss.detach() for name, loss in losses.items()}


def fast_step(step, cfg, device):
    """train_step in a CUDA graph, which repeats one call; unchanged on the CPU, or --no-graph."""
    return GraphedStep(step) if device.type == "cuda" and cfg.graph else step
