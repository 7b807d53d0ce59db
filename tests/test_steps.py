"""Every script's training step: against its plain twin, and what holds for all of them."""

import contextlib
import copy
import dataclasses
import importlib
import json

import plain
import pytest
import torch
from torch import nn

import common
import support.vgg16
from conftest import CPU, TABLE, batch_of, tiny

NETS = ("G", "D", "G_AB", "G_BA", "D_A", "D_B")
LABELS = {"lc_classes": json.dumps(TABLE)}
CASES = {
    "pix2pix": {},
    "pix2pix lsgan": {"gan": "lsgan", "d_weight": 1.0, "lambda_l1": 7.0},
    "pix2pix instance": {"norm": "instance", "patch_gan": 16},
    "pix2pix resnet": {"generator": "resnet", "blocks": 1, "patch_gan": 1},
    "pix2pix resnet instance": {"generator": "resnet", "blocks": 1, "norm": "instance"},
    "pix2pix 286": {"patch_gan": 286, "size": 128, "width": 2},
    "pix2pix vgg": {"content": "vgg", "lambda_vgg": 3.0},
    "cyclegan": {"pool_size": 0},
    "cyclegan pool": {"pool_size": 3, "lambda_cycle": 7.0, "lambda_identity": 0.3},
    "cyclegan no identity": {"lambda_identity": 0.0},
    "cyclegan labels": LABELS | {"pool_size": 3},
    "mixlc": {},
    "mixlc late": {"fusion": "late"},
    "mixlc early": {"fusion": "early", "lambda_adv": 0.25, "lambda_l1": 3.0, "lambda_local": 2.0},
    "mixlc dilated": {"fusion": "dilated"},
    "mixlc both skips": {"fusion": "middle", "skips": "both"},
    "mixlc no erase": {"erase": False, "use_ba": True},
    "mixlc local": {"local_d": True, "use_ba": True},
    "mixlc_acgan": {},
    "mixlc_acgan no erase": {"erase": False, "use_ba": True},
    "mixlc_acgan weights": {
        **{"lambda_adv": 0.3, "lambda_l1": 2.0, "lambda_style": 30.0, "lambda_class": 0.7},
        **{"lambda_id": 0.4, "style_layers": "relu1_2,relu2_1,relu2_2", "use_ba": True},
    },
}


def in_double(state):
    """A State whose networks and losses compute in float64."""
    for name, value in vars(state).items():
        if isinstance(value, nn.Module):
            value.double()
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(state, name, value.double())
    return state


def double(batch):
    return tuple(x.double() if x.dtype == torch.float32 else x for x in batch)


def build(script, monkeypatch=None, **options):
    """(module, cfg, state): the state in float64; VGG16 with random weights where it is asked."""
    module, cfg = tiny(script, **options)
    if monkeypatch:
        monkeypatch.setattr(support.vgg16, "_imagenet", lambda path: None)  # random ones
    return module, cfg, in_double(module.build(cfg, CPU))


@pytest.mark.parametrize("case", CASES)
def test_step_equals_its_plain_twin(case, monkeypatch):
    """Three steps in float64: every loss, every weight and every running statistic."""
    script = case.split()[0]
    options = {"dropout": 0.0} if script in ("pix2pix", "mixlc_acgan") else {}
    options["lr"] = 1e-7  # Adam blows rounding up where a gradient is zero, at most to this
    module, cfg, state = build(script, monkeypatch, **options, **CASES[case])
    if script == "mixlc_acgan":
        state.class_weights[:] = torch.tensor([0.5, 2.0, 1.25])
    twin = plain.TWINS[script](state, cfg)
    for k in range(3):
        batch = double(batch_of(script, cfg, seed=k))
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
                assert (tensor - theirs[key]).abs().max() < 1e-10, (name, key)


# ------------------------------------------------------------------------------- what holds for all

ALL = {
    "pix2pix": {},
    "pix2pix lsgan": {"gan": "lsgan", "generator": "resnet", "norm": "instance", "blocks": 1},
    "cyclegan": {"pool_size": 3},
    "cyclegan labels": LABELS | {"pool_size": 3},
    "mixlc": {"local_d": True, "fusion": "dilated"},
    "mixlc_acgan": {},
}
every = pytest.mark.parametrize("case", ALL)


def sides(state):
    """The generators and the discriminators of a state."""
    nets = {name: getattr(state, name) for name in NETS if hasattr(state, name)}
    G = nn.ModuleList(net for name, net in nets.items() if name.startswith("G"))
    return {"G": G, "D": nn.ModuleList(net for name, net in nets.items() if name.startswith("D"))}


@every
def test_each_update_leaves_the_other_networks_gradients_untouched(case):
    module, cfg, state = build(case.split()[0], **ALL[case])
    nets, seen = sides(state), {}

    def watch(name):
        def step():
            grads = {k: [p.grad for p in net.parameters()] for k, net in nets.items()}
            seen[name] = copy.deepcopy(grads)

        return step

    state.opt_D.step, state.opt_G.step = watch("D"), watch("G")
    module.train_step(state, double(batch_of(case.split()[0], cfg)), cfg)
    first, second = seen  # pix2pix and the edits update D first, cyclegan G
    assert all(grad is None for grad in seen[first][second])
    assert all(grad is not None for grad in seen[first][first] + seen[second][second])
    pairs = zip(seen[first][first], seen[second][first], strict=True)
    assert all(torch.equal(before, after) for before, after in pairs)


@every
def test_gradients_do_not_add_up_over_steps(case):
    module, cfg, state = build(case.split()[0], **ALL[case])
    if hasattr(state, "pool_A"):  # what it returns differs from step to step
        state.pool_A.size = state.pool_B.size = 0
    state.opt_D.step = state.opt_G.step = lambda: None
    batch, seen = double(batch_of(case.split()[0], cfg)), []
    for _ in range(2):
        torch.manual_seed(0)
        module.train_step(state, batch, cfg)
        nets = sides(state).values()
        seen.append([p.grad.clone() for net in nets for p in net.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*seen, strict=True))


@every
def test_step_reads_no_value_on_the_host(case, monkeypatch):
    """On the meta device tensors have no values: .item() or a branch on one would raise."""
    nothing = contextlib.nullcontext()  # there is no autocast for meta
    monkeypatch.setattr(common, "autocast", lambda cfg, device: nothing)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nothing)
    module, cfg, state = build(case.split()[0], **ALL[case])
    for name, value in vars(state).items():
        if isinstance(value, (nn.Module, torch.Tensor)):
            setattr(state, name, value.to("meta"))
    for name, net in sides(state).items():
        setattr(state, f"opt_{name}", torch.optim.SGD(net.parameters(), lr=0.1))
    batch = tuple(x.to("meta") for x in double(batch_of(case.split()[0], cfg)))
    losses = module.train_step(state, batch, cfg)
    assert all(loss.shape == () for loss in losses.values())


@every
def test_step_changes_every_weight(case):
    module, cfg, state = build(case.split()[0], **ALL[case])
    before = copy.deepcopy(sides(state))
    module.train_step(state, double(batch_of(case.split()[0], cfg)), cfg)
    for name, net in sides(state).items():
        pairs = zip(before[name].parameters(), net.parameters(), strict=True)
        assert all(not torch.equal(old, new) for old, new in pairs)


@every
def test_initial_weights(case):
    """Convolutions N(0, 0.02), norm scales N(1, 0.02), every bias 0."""
    script = case.split()[0]
    module, cfg = tiny(script, **ALL[case] | {"width": 32 if script != "mixlc_acgan" else 16})
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    for net in sides(module.build(cfg, CPU)).values():
        modules = list(net.modules())
        weights = torch.cat([m.weight.flatten() for m in modules if isinstance(m, kinds)])
        assert abs(weights.mean()) < 1e-3 and abs(weights.std() - 0.02) < 5e-4
        scales = [m.weight for m in modules if isinstance(m, nn.BatchNorm2d)]
        if scales:
            scales = torch.cat(scales)
            assert abs(scales.mean() - 1) < 5e-3 and abs(scales.std() - 0.02) < 5e-3
        assert all((m.bias == 0).all() for m in modules if getattr(m, "bias", None) is not None)


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


@pytest.mark.parametrize(("given", "result"), [("bfloat16", "float32"), ("float64", "float64")])
@pytest.mark.parametrize("script", ["pix2pix", "cyclegan", "mixlc", "mixlc_acgan"])
def test_losses_are_in_at_least_float32(script, given, result):
    module = importlib.import_module(script)
    x = torch.zeros(1, 3, 64, 64, dtype=getattr(torch, given))
    losses = [module.l1_loss(x, x), module.gan_loss(x, True, *["bce"] * (script == "pix2pix"))]
    if script == "cyclegan":
        losses.append(module.label_loss(x, x))
    if script == "mixlc":
        losses.append(module.local_l1_loss(x, x, torch.ones(1, 1, 64, 64, dtype=torch.bool)))
    if script == "mixlc_acgan":
        losses.append(module.class_loss(x, x, torch.ones(3)))
    assert all(loss.dtype == getattr(torch, result) for loss in losses)


def plain_adam(state, cfg):
    """The same networks with Adam as it comes, NCHW."""
    for net in sides(state).values():
        net.to(memory_format=torch.contiguous_format)
    for name, net in sides(state).items():
        adam = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(cfg.beta1, 0.999))
        setattr(state, f"opt_{name}", adam)
    return state


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@every
def test_fast_path_trains_like_the_plain_one(case, device):
    """Ten steps in float64, without dropout; on CUDA in a graph."""
    script = case.split()[0]
    options = {"dropout": 0.0} if script in ("pix2pix", "mixlc_acgan") else {}
    module, cfg = tiny(script, **ALL[case], **options)
    fast = in_double(module.build(cfg, torch.device(device)))
    slow = plain_adam(copy.deepcopy(fast), cfg)
    step = common.fast_step(module.train_step, cfg, torch.device(device))
    for k in range(10):
        batch = tuple(x.to(device) for x in double(batch_of(script, cfg, seed=k)))
        common.seed_step(0, 0, k)
        want = {name: loss.item() for name, loss in module.train_step(slow, batch, cfg).items()}
        common.seed_step(0, 0, k)
        got = {name: loss.item() for name, loss in step(fast, batch, cfg).items()}
        assert got == pytest.approx(want, rel=1e-6, abs=1e-8), k
    assert device == "cpu" or step.graph is not None
