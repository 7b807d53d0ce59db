"""CUDA's graphs and streams without a GPU: a capture is recorded, and replayed on the CPU."""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# results of these have sizes, or are numbers, that only the host could know
REFUSED = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}


class Graph(TorchDispatchMode):
    """Every operation of a capture, which a replay repeats on the same tensors and numbers.

    A number, a branch or a new tensor that Python chose while capturing is there for good. A
    capture of CUDA computes nothing; this one computes the first replay's results. It does not
    show copies between the host and the GPU, nor memory that a graph uses twice.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        masks = [x for x in tree_leaves(args[1:]) if getattr(x, "dtype", None) is torch.bool]
        assert name not in REFUSED and not (masks and "index" in name), f"{name} waits for a value"
        outputs = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, outputs))
        return outputs

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for operation, args, kwargs, outputs in self.calls if self.replays > 1 else []:
            again = tree_leaves(operation(*args, **kwargs))
            for old, new in zip(tree_leaves(outputs), again, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def capture(graph, **_):
    with graph:
        yield


def record_graphs(monkeypatch):
    """Replaces torch.cuda as far as GraphedStep uses it."""
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
