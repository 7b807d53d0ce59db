"""The processes of torchrun: rank, world size, averages; signals."""

import os
import signal
import threading

import torch
import torch.distributed as dist

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    SIGNALS.append(signal.SIGHUP)  # nohup ignores it


def handled_signals():
    """The SIGNALS that a run may handle: in the main thread those whose handler is Python's."""
    in_thread = threading.current_thread() is not threading.main_thread()
    return [] if in_thread else [n for n in SIGNALS if signal.getsignal(n) is not None]


def rank():
    """This process's number: 0 unless torchrun started several."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def of_rank_0(value):
    """Process 0's value (numbers, text), in every process."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def reduced(tensor, how=dist.ReduceOp.SUM):
    """The sum, or another reduction, of all processes' tensors, on the device of the group."""
    if world_size() == 1:
        return tensor
    tensor = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(tensor, how)
    return tensor


def wait_for_others():
    """Returns once every process has called it."""
    if world_size() > 1:
        dist.barrier()


def first_on_machine():
    """Whether this is the first process of its machine, which writes files for the others."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def average_gradients(module):
    """Averages a module's gradients over all processes, as one flat message."""
    if world_size() == 1:
        return
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    means = flat.div_(world_size()).split([grad.numel() for grad in grads])
    for grad, mean in zip(grads, means, strict=True):
        grad.copy_(mean.view(grad.shape))
