"""Every script's smallest networks, batches for them, and what is counted and compared."""

import importlib

import torch

import common
from files import LABELS
from harness import is_edit

CPU = torch.device("cpu")


def tiny(script, **options):
    """A script's module and a Config of its smallest networks; the edits know TABLE's classes."""
    more = {"size": 64, "width": 4, "batch_size": 2, "precision": "fp32"}
    if script == "cyclegan":
        more |= {"blocks": 1, "pool_size": 0}
    if is_edit(script):
        more |= LABELS
    if script == "mixlc_acgan":
        more |= {"style_features": "random", "style_layers": "relu1_1"}
    module = importlib.import_module(script)
    return module, module.Config(**more | options)


def open_data(script, root, cache, split="train", device=CPU, **options):
    """A script's data on a device; the edits find their classes in the data."""
    module, cfg = tiny(script, lc_classes="", **options, data=str(root), cache=str(cache))
    (kind,) = (thing for thing in vars(module).values() if hasattr(thing, "in_order"))
    return kind(cfg, split, device)


def pictures(seed=0, count=2, size=64):
    """Random pictures (count, 3, size, size) in [-1, 1]."""
    seeded = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, size, size, generator=seeded) * 2 - 1


def maps(seed=0, count=2, size=64, classes=3, holes=0):
    """Random one-hot maps (count, classes, size, size); of `holes` rows no pixel has a class."""
    seeded = torch.Generator().manual_seed(seed)
    shape = count, size, size
    index = torch.randint(classes, shape, generator=seeded, dtype=torch.uint8)
    index[:, :holes] = common.IGNORED
    return common.one_hot(index, classes)


def batch_of(script, cfg, seed=0):
    """A random batch as a script's train_step takes it."""
    size = cfg.size if cfg else 64
    a, b, c = (pictures(10 * seed + k, 2, size) for k in range(3))
    lc_a, lc_b, lc_ab = (maps(10 * seed + k, 2, size, holes=7 + k) for k in range(3))
    if script == "cyclegan" and cfg.classes:
        return a, lc_b
    if not is_edit(script):
        return a, b
    box = torch.tensor([[20, 20, 24, 24], [0, 44, 16, 16]])
    inside = torch.tensor([True, not cfg.use_ba])
    own = torch.tensor([False, True])
    return a, lc_ab, c, box, inside, lc_a, b, lc_b, own


def inputs_of(net):
    """Copies of the first argument of every call of a network from now on."""
    inputs = []
    net.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach().clone()))
    return inputs


def same(a, b):
    """Whether nested dicts and lists of tensors and numbers are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def as_rank(monkeypatch, rank, world=2):
    """Makes this process play one of several."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)


def calls_of(monkeypatch, module, name, instead=None):
    """The arguments of every call of module.name from now on; it, or another, does its work."""
    honest, calls = instead or getattr(module, name), []

    def call(*arguments, **more):
        calls.append(arguments)
        return honest(*arguments, **more)

    monkeypatch.setattr(module, name, call)
    return calls
