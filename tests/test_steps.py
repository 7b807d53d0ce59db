"""Every script's step and losses: against plain twins, by hand, and what holds for all."""

import contextlib
import copy
import dataclasses
import math
from unittest import mock

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import cyclegan
import mixlc
import mixlc_acgan
import pix2pix
import support.measures
import support.vgg16
from files import LABELS, save
from graphs import record_graphs
from harness import SCRIPTS, is_edit
from support.device import GraphedStep, set_lr
from support.judge import Judge
from support.limits import Limits
from tensors import CPU, batch_of, calls_of, open_data, tiny

GLOBAL = {"d": "global"}
NETS = ("G", "D", "G_AB", "G_BA", "D_A", "D_B")
CASES = {
    "pix2pix": {},
    "pix2pix lsgan": {"gan": "lsgan", "d_weight": 1.0, "lambda_l1": 7.0},
    "pix2pix instance": {"norm": "instance", "patch_gan": 16},
    "pix2pix resnet": {"generator": "resnet", "blocks": 1, "patch_gan": 1},
    "pix2pix resnet instance": {"generator": "resnet", "blocks": 1, "norm": "instance"},
    "pix2pix 286": {"patch_gan": 286, "size": 128},
    "pix2pix resize": {"upsample": "resize", "norm": "instance"},
    "pix2pix resnet resize": {"generator": "resnet", "blocks": 1, "upsample": "resize"},
    "pix2pix vgg holes": {"content": "vgg", "lambda_vgg": 3.0},
    "cyclegan": {"pool_size": 0},
    "cyclegan pool": {"pool_size": 3, "lambda_cycle": 7.0, "lambda_identity": 0.3},
    "cyclegan no identity": {"lambda_identity": 0.0},
    "cyclegan resize": {"upsample": "resize"},
    "cyclegan labels": LABELS | {"pool_size": 3},
    "cyclegan holes": {},
    "cyclegan labels holes": LABELS,
    "mixlc": {},
    "mixlc holes": {},
    "mixlc no erase holes": GLOBAL | {"erase": False, "composite": False},
    "mixlc late": GLOBAL | {"fusion": "late"},
    "mixlc early": {"fusion": "early", "lambda_adv": 0.25, "lambda_l1": 3.0, "lambda_local": 2.0},
    "mixlc dilated": {"fusion": "dilated", "lambda_color": 4.0},
    "mixlc color holes": {"lambda_color": 9.0, "use_ba": True},
    "mixlc global": GLOBAL,
    "mixlc no erase": {"erase": False, "use_ba": True},
    "mixlc local": GLOBAL | {"local_d": True, "use_ba": True},
    "mixlc lc skips": {"skips": "lc", "lambda_adv": 0.7},
    "mixlc collage": {"collage": True, "use_ba": True, "composite": False},
    "mixlc composite": GLOBAL | {"composite": True, "collage": False},
    "mixlc_acgan": {},
    "mixlc_acgan holes": {"lambda_id": 0.2},
    "mixlc_acgan whole": {"composite": False, "lambda_id": 0.2},
    "mixlc_acgan no erase": {"erase": False, "use_ba": True},
    "mixlc_acgan weights": {
        **{"lambda_adv": 0.3, "lambda_l1": 2.0, "lambda_style": 30.0, "lambda_class": 0.7},
        **{"lambda_id": 0.4, "style_layers": "relu1_1,relu1_2", "use_ba": True},
    },
}
# what holds for every step is tested with these
ALL = dict.fromkeys(SCRIPTS, {}) | {
    "pix2pix lsgan": {"gan": "lsgan", "generator": "resnet", "norm": "instance", "blocks": 1},
    "cyclegan": {"pool_size": 9},  # filled after a graph is captured
    "cyclegan labels": LABELS | {"pool_size": 3},
    "mixlc": GLOBAL | {"local_d": True, "fusion": "dilated"},
    "mixlc label": {},
}
every = pytest.mark.parametrize("case", ALL)


def in_double(state):
    """A State whose networks and losses compute in float64."""
    for name, value in vars(state).items():
        if isinstance(value, nn.Module):
            value.double()
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(state, name, value.double())
    return state


def double_batch(script, cfg, seed=0, device="cpu"):
    """A random batch in float64."""
    batch = (x.to(device) for x in batch_of(script, cfg, seed))
    return tuple(x.double() if x.dtype == torch.float32 else x for x in batch)


def without_data(batch):
    """A batch whose pictures have no data in a square, in each image another one."""
    batch = [x.clone() for x in batch]
    pictures = (x for x in batch if x.ndim == 4 and x.min() < 0)
    for k, images in enumerate(pictures):
        for row, image in enumerate(images):
            image[:, 9 * k : 9 * k + 24, 20 * row : 20 * row + 24] = torch.nan
    return tuple(batch)


def prepared(case, device="cpu", **options):
    """(module, cfg, state, batch) of a case of ALL in float64."""
    script = case.split()[0]
    module, cfg = tiny(script, **{"width": 2, **ALL[case], **options})
    state = in_double(module.build(cfg, torch.device(device)))
    return module, cfg, state, double_batch(script, cfg, device=device)


def optimizers(state):
    return [x for x in vars(state).values() if isinstance(x, torch.optim.Optimizer)]


def without_dropout(case):
    return {"dropout": 0.0} if hasattr(tiny(case.split()[0])[1], "dropout") else {}


@pytest.mark.parametrize("case", CASES)
def test_step_equals_its_plain_twin(case, monkeypatch):
    """In float64: every loss, every weight and every running statistic.

    One step of each case, more of those without options and with pools.
    """
    script = case.split()[0]
    monkeypatch.setattr(support.vgg16, "_imagenet", lambda path: None)  # random ones
    options = {"width": 2} | without_dropout(case) | CASES[case]
    options["lr"] = 1e-7  # Adam blows rounding up where a gradient is zero, at most to this
    module, cfg = tiny(script, **options)
    state = in_double(module.build(cfg, CPU))
    if script == "mixlc_acgan":
        state.class_weights[:] = torch.tensor([0.5, 2.0, 1.25])
    twin = plain.TWINS[script](state, cfg)
    for k in range(3 if "pool" in case else 2 if case in SCRIPTS else 1):
        batch = double_batch(script, cfg, seed=k)
        if case.endswith("holes"):
            batch = without_data(batch)
        torch.manual_seed(k)
        want = twin.step(*batch)
        torch.manual_seed(k)
        got = module.train_step(state, batch, cfg)
        assert list(got) == list(want)
        for name, loss in want.items():
            assert abs(got[name].item() - loss.item()) < 1e-10, (k, name)
    for name in NETS:
        if hasattr(state, name):
            theirs = getattr(twin, name).tensors
            for key, tensor in getattr(state, name).state_dict().items():
                assert (tensor - theirs[key]).abs().max() < 1e-9, (name, key)


# ------------------------------------------------------------------------------- what holds for all


def sides(state):
    """The generators and the discriminators of a state."""
    nets = {name: getattr(state, name) for name in NETS if hasattr(state, name)}
    found = {}
    for side in {name[0] for name in nets}:
        found[side] = nn.ModuleList(net for name, net in nets.items() if name[0] == side)
    return found


@every
def test_each_update_leaves_the_other_networks_gradients_untouched(case, monkeypatch):
    """And averages its own over the processes, once for each step of its optimiser."""
    module, cfg, state, batch = prepared(case)
    averaged = calls_of(monkeypatch, common, "average_gradients")
    nets, seen, steps = sides(state), {}, []
    if len(nets) == 1:
        pytest.skip("there is no discriminator")

    def watch(name):
        def step():
            grads = {k: [p.grad for p in net.parameters()] for k, net in nets.items()}
            seen[name] = copy.deepcopy(grads)
            steps.append(name)

        return step

    state.opt_D.step, state.opt_G.step = watch("D"), watch("G")
    module.train_step(state, batch, cfg)
    first, second = seen  # pix2pix and the edits update D first, cyclegan G
    assert all(grad is None for grad in seen[first][second])
    assert all(grad is not None for grad in seen[first][first] + seen[second][second])
    pairs = zip(seen[first][first], seen[second][first], strict=True)
    assert all(torch.equal(before, after) for before, after in pairs)
    ours = [id(p) for name in steps for p in nets[name].parameters()]
    theirs = [id(p) for (net,) in averaged for p in net.parameters()]
    assert sorted(theirs) == sorted(ours)


@every
def test_losses_of_a_bf16_step_are_float32_and_near_those_of_fp32(case):
    script = case.split()[0]
    module, cfg = tiny(script, **ALL[case])
    state = module.build(cfg, CPU)
    other, batch = copy.deepcopy(state), batch_of(script, cfg)
    torch.manual_seed(0)
    want = module.train_step(state, batch, cfg)
    torch.manual_seed(0)
    got = module.train_step(other, batch, dataclasses.replace(cfg, precision="bf16"))
    for name, loss in want.items():
        assert got[name].dtype == torch.float32
        assert got[name].item() == pytest.approx(loss.item(), rel=0.1, abs=0.05), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@every
def test_fast_path_trains_like_the_plain_one(case, device, monkeypatch):
    """In float64, without dropout; on CUDA in a graph, or in the recording of one on the CPU.

    The plain one: NCHW, Adam as it comes. The learning rate falls on the way. What is recorded
    reads no value on the host: .item() or a branch on one would raise.
    """
    module, cfg, fast, _ = prepared(case, device, **without_dropout(case))
    slow = copy.deepcopy(fast)
    rates = torch.tensor([cfg.lr, cfg.lr / 3]).tolist()  # float32, as a graph has it
    for name, net in sides(slow).items():
        net.to(memory_format=torch.contiguous_format)
        setattr(slow, f"opt_{name}", torch.optim.Adam(net.parameters(), betas=(0.5, 0.999)))
    step = common.fast_step(module.train_step, cfg, torch.device(device))
    if device == "cpu":
        record_graphs(monkeypatch)
        step = GraphedStep(module.train_step)
        for optimizer in optimizers(fast):
            optimizer.param_groups[0]["lr"] = torch.tensor(cfg.lr)
    for k in range(6):
        for optimizer in optimizers(fast) + optimizers(slow):
            set_lr(optimizer, rates[k > 4])
        batch = double_batch(case.split()[0], cfg, k, device)
        common.seed_step(0, 0, k)
        want = {name: loss.item() for name, loss in module.train_step(slow, batch, cfg).items()}
        common.seed_step(0, 0, k)
        got = {name: loss.item() for name, loss in step(fast, batch, cfg).items()}
        assert got == pytest.approx(want, rel=1e-6, abs=1e-8), k
    assert step.graph is not None


@every
def test_all_tensors_are_on_the_device(case, data, cache, tmp_path, monkeypatch):
    """Of batches to windows: "meta" computes nothing, and refuses the tensors of others."""
    device, script, convolve = torch.device("meta"), case.split()[0], F.conv2d

    def conv2d(x, weight, *more, **options):  # that of "meta" accepts others
        assert x.device == weight.device
        return convolve(x, weight, *more, **options)

    for module, name, replaced in (
        (common, "adam", lambda *_: mock.Mock()),
        (F, "conv2d", conv2d),
        (torch.Tensor, "backward", lambda *_, **options: None),
        (torch.Tensor, "cpu", lambda x: torch.zeros(x.shape, dtype=x.dtype)),
        (torch, "autocast", lambda *_, **options: contextlib.nullcontext()),
        (torch.cuda, "mem_get_info", lambda _: (10**12, 10**12)),  # free, in all
        (support.measures, "confusion_matrix", lambda a, b, classes: (a + b).sum()),
    ):
        monkeypatch.setattr(module, name, replaced)
    root = data["mixlc" if "labels" in case else script]
    train, val = (open_data(script, root, cache, split, device) for split in ("train", "val"))
    module, cfg = tiny(script, **ALL[case])
    state = module.build(cfg, device)
    losses = module.train_step(state, next(train.batches(0)), cfg)
    assert {loss.device for loss in losses.values()} == {device}
    grid = module.sample(state, val, cfg, np.arange(2))
    assert {images.device for images in grid.values()} == {device}
    color = {"mean": torch.zeros(3)}
    colors = {"A": color, "B": color} if script == "cyclegan" else color
    val.store.limits = dict.fromkeys("AB", Limits((0,) * 3, (1,) * 3, ""))
    judge = Judge(3, width=2).to(device) if cfg.classes else None
    module.evaluate(state, val, cfg, np.arange(2), colors, judge)
    photo, lc = tmp_path / "a.png", tmp_path / "lc.png"
    save(photo, np.zeros((150, 64, 3), np.uint8))
    save(lc, np.zeros((150, 64), np.uint8))
    use = {"generate": (str(photo),), "out": str(tmp_path / "new"), "window": 64, "batch_size": 1}
    use |= {"lc": str(lc), "paint": ("road:0,0,64,150",)} if is_edit(script) else {}
    module.generate(state, dataclasses.replace(cfg, **use), device)


@pytest.mark.cuda
@every
def test_cuda_step_never_synchronises(case):
    device, script = torch.device("cuda"), case.split()[0]
    module, cfg = tiny(script, **{**ALL[case], "precision": "bf16"})
    state, batch = module.build(cfg, device), [x.to(device) for x in batch_of(script, cfg)]
    module.train_step(state, batch, cfg)
    torch.cuda.set_sync_debug_mode("error")
    try:
        module.train_step(state, batch, cfg)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --------------------------------------------------------------------------------- losses, by hand


def softplus(x):
    return math.log1p(math.exp(x))


EVERYWHERE = torch.ones(1, 1, 64, 64) > 0
GAN_LOSSES = {  # a function, and its arguments from the third on
    "pix2pix bce": (pix2pix.gan_loss, "bce"),
    "pix2pix lsgan": (pix2pix.gan_loss, "lsgan"),
    "cyclegan lsgan": (cyclegan.gan_loss,),
    "mixlc bce": (mixlc.gan_loss,),
    "mixlc_acgan bce": (mixlc_acgan.gan_loss, EVERYWHERE),
}


@pytest.mark.parametrize("case", GAN_LOSSES)
def test_gan_loss_by_hand(case):
    """The mean is over the losses of the patches, not over their logits."""
    (loss, *more), kind = GAN_LOSSES[case], case.split()[1]
    logits = torch.tensor([[[[-4.0, 3.0]]]])
    real = {"bce": (softplus(4) + softplus(-3)) / 2, "lsgan": (5**2 + 2**2) / 2}[kind]
    fake = {"bce": (softplus(-4) + softplus(3)) / 2, "lsgan": (4**2 + 3**2) / 2}[kind]
    assert loss(logits, True, *more).item() == pytest.approx(real)
    assert loss(logits, False, *more).item() == pytest.approx(fake)


def test_l1_losses_by_hand():
    fake, target = torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([[[[0.5, 1.0]]]])
    for script in (pix2pix, cyclegan, mixlc_acgan):
        assert script.l1_loss(fake, target).item() == pytest.approx(1.25)
    assert mixlc.masked_l1_loss(fake, target, fake < 9).item() == pytest.approx(1.25)


@pytest.mark.parametrize("weights", [None, (1.0, 1.0), (1.0, 3.0)])
def test_loss_of_classes_by_hand_leaves_out_ignored_pixels(weights):
    """cyclegan's has no weights."""
    logits, target = torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3)
    logits[0, 0, 0, 0] = math.log(3.0)  # 3/4 for class 0
    target[0, 0, 0, 0] = target[0, 1, 0, 1] = 1
    logits[0, 0, 0, 2] = 100.0  # ignored
    loss, more, (a, b) = cyclegan.label_loss, (), weights or (1, 1)
    if weights:
        loss, more = mixlc_acgan.class_loss, (torch.tensor(weights),)
    want = -(a * math.log(3 / 4) + b * math.log(1 / 2)) / (a + b)
    assert loss(logits, target, *more).item() == pytest.approx(want)
    assert loss(logits, target * 0, *more).item() == 0  # not NaN


@pytest.mark.parametrize(
    ("given", "result"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_losses_are_in_at_least_float32(given, result):
    x = torch.zeros(1, 3, 64, 64, dtype=given)
    losses = [loss(x, True, *more) for loss, *more in GAN_LOSSES.values()]
    losses += [script.l1_loss(x, x) for script in (pix2pix, cyclegan, mixlc_acgan)]
    losses += [script.label_loss(x, x) for script in (cyclegan, mixlc)]
    losses += [loss(x, x, EVERYWHERE) for loss in (mixlc.masked_l1_loss, mixlc.color_loss)]
    losses.append(mixlc_acgan.class_loss(x, x, torch.ones(3)))
    assert [loss.dtype for loss in losses] == [result] * len(losses)
