"""CycleGAN: networks, losses, pool, straight-through one-hot, the step, sampling, the command
line.
"""

import copy
import dataclasses
import itertools
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import cyclegan
from conftest import (
    CPU,
    TABLE,
    batch_of,
    land_cover,
    maps,
    parameters,
    picture,
    pictures,
    same,
    save,
    state_of,
)
from cyclegan import (
    Config,
    Discriminator,
    Domains,
    ImagePool,
    ResNetGenerator,
    build,
    main,
    train_step,
    translate,
)
from support.pictures import to_bytes

TINY = Config(size=64, width=4, blocks=1, batch_size=2, precision="fp32", pool_size=3)
LABELS = dataclasses.replace(TINY, lc_classes=json.dumps(TABLE))
ARGUMENTS = [
    "--size",
    "64",
    "--width",
    "4",
    "--blocks",
    "1",
    "--batch-size",
    "2",
    "--log-every",
    "2",
    "--device",
    "cpu",
]


# ----------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("channels", "count"), [((3, 3), 11_378_179), ((14, 3), 11_412_675), ((3, 14), 11_412_686)]
)
def test_generator_parameters(channels, count):
    assert parameters(ResNetGenerator, *channels, 64, 9, pictures=True) == count


@pytest.mark.parametrize(("channels", "count"), [(3, 2_764_737), (14, 2_776_001)])
def test_discriminator_parameters(channels, count):
    assert parameters(Discriminator, channels, 64) == count


def test_discriminator_gives_16x16_at_256():
    assert Discriminator(3, 4)(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 16, 16)


def test_discriminator_receptive_field():
    seen = 1
    for layer in reversed([m for m in Discriminator(3, 4).modules() if isinstance(m, nn.Conv2d)]):
        seen = layer.kernel_size[0] + (seen - 1) * layer.stride[0]
    assert seen == 94


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_output_shapes(size):
    for cfg, channels in ((TINY, 3), (LABELS, 3)):
        state = build(dataclasses.replace(cfg, size=size, width=2), CPU, training=False)
        with torch.no_grad():
            assert state.G_AB(torch.zeros(1, 3, size, size)).shape == (1, channels, size, size)


def test_blocks_follow_the_size():
    for size, blocks in ((128, 6), (256, 9)):
        G = build(Config(size=size, width=2), CPU, training=False).G_AB
        assert sum(isinstance(m, cyclegan.ResidualBlock) for m in G.modules()) == blocks


def test_pictures_end_in_tanh_and_land_cover_in_logits():
    assert isinstance(build(TINY, CPU).G_AB.layers[-1], nn.Tanh)
    state = build(LABELS, CPU)
    assert isinstance(state.G_AB.layers[-1], nn.Identity) and isinstance(
        state.G_BA.layers[-1], nn.Tanh
    )
    assert not any(isinstance(m, nn.BatchNorm2d) for m in state.G_AB.modules())


# ------------------------------------------------------------------- one-hot maps, straight through


def test_straight_through_is_exactly_one_hot():
    logits = torch.randn(2, 14, 9, 9) * 5
    hot = cyclegan.straight_through(logits)
    assert set(hot.unique().tolist()) == {0.0, 1.0} and torch.equal(hot.sum(1), torch.ones(2, 9, 9))
    assert torch.equal(hot.argmax(1), logits.argmax(1))


def test_straight_through_has_the_gradient_of_the_softmax():
    logits, weight = torch.randn(1, 5, 3, 3, requires_grad=True), torch.randn(1, 5, 3, 3)
    (got,) = torch.autograd.grad((cyclegan.straight_through(logits) * weight).sum(), logits)
    (want,) = torch.autograd.grad((logits.softmax(1) * weight).sum(), logits)
    assert torch.allclose(got, want) and got.abs().sum() > 0


def test_discriminator_and_return_generator_see_exact_one_hots(monkeypatch):
    state, seen = build(LABELS, CPU), {"D_B": [], "G_BA": []}
    for name, inputs in seen.items():
        getattr(state, name).register_forward_pre_hook(
            lambda _, x, inputs=inputs: inputs.append(x[0].detach().clone())
        )
    train_step(state, (pictures(), maps()), LABELS)
    assert len(seen["D_B"]) == 3 and len(seen["G_BA"]) == 2
    for images in (*seen["D_B"], *seen["G_BA"]):
        assert set(images.unique().tolist()) == {0.0, 1.0} and (images.sum(1) == 1).all()


def test_adversarial_gradient_reaches_the_generator_of_land_cover():
    state = build(LABELS, CPU)
    fake = cyclegan.straight_through(state.G_AB(pictures()))
    cyclegan.gan_loss(state.D_B(fake), True).backward()
    assert all(p.grad is not None for p in state.G_AB.parameters())
    assert next(state.G_AB.parameters()).grad.abs().sum() > 0


def test_holes_are_the_same_in_real_and_fake_maps():
    state, seen, real = build(dataclasses.replace(LABELS, pool_size=0), CPU), [], maps()
    real[:, :, 10:20, 30:40] = 0
    state.D_B.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().clone()))
    train_step(state, (pictures(), real), dataclasses.replace(LABELS, pool_size=0))
    for images in seen:
        assert all(torch.equal(image.sum(0) == 0, real[0].sum(0) == 0) for image in images)


# ------------------------------------------------------------------------------------------- losses


def test_lsgan_loss_by_hand():
    logits = torch.tensor([0.0, 3.0])
    assert cyclegan.gan_loss(logits, True).item() == pytest.approx(2.5)
    assert cyclegan.gan_loss(logits, False).item() == pytest.approx(4.5)


def test_l1_loss_by_hand():
    assert cyclegan.l1_loss(
        torch.tensor([1.0, -1.0]), torch.tensor([0.5, 1.0])
    ).item() == pytest.approx(1.25)


def test_label_loss_by_hand_leaves_out_what_is_ignored():
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, :, 0, 0] = torch.tensor([math.log(3.0), 0.0])  # probability 3/4 of class 0
    logits[0, :, 0, 2] = 100.0  # ignored
    target = torch.zeros(1, 2, 1, 3)
    target[0, 0, 0, 0] = target[0, 1, 0, 1] = 1
    want = (-math.log(3 / 4) - math.log(1 / 2)) / 2
    assert cyclegan.label_loss(logits, target).item() == pytest.approx(want)
    reference = F.cross_entropy(logits, torch.tensor([[[0, 1, 255]]]), ignore_index=255)
    assert cyclegan.label_loss(logits, target).item() == pytest.approx(reference.item())
    assert (
        cyclegan.label_loss(logits, target * 0).item() == 0
    )  # nothing but holes: no loss, not NaN


def test_cycle_loss_of_a_perfect_generator_is_near_zero():
    """After a softmax it could not fall below 1.755 for 14 classes."""
    target = maps(classes=14)
    assert cyclegan.label_loss(target * 40, target).item() < 1e-6
    assert cyclegan.label_loss((target * 40).softmax(1), target).item() == pytest.approx(
        1.755, abs=1e-3
    )


# --------------------------------------------------------------------------------------- image pool


class ListPool:
    """The pool as the paper's code has it: a list, and a branch on the host."""

    def __init__(self, size):
        self.size, self.images = size, []

    def __call__(self, image, swap, slot):
        if len(self.images) < self.size:
            self.images.append(image)
            return image
        if swap:
            old, self.images[slot] = self.images[slot], image
            return old
        return image


def test_pool_against_a_plain_list(monkeypatch):
    draws, plain, pool = random.Random(0), ListPool(4), ImagePool(4, 1, 1, torch.float32)
    drawn = []

    def rand(*_, **__):
        drawn.append([draws.random(), draws.randrange(4)])
        return torch.tensor([drawn[-1][0]])

    monkeypatch.setattr(torch, "rand", rand)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([drawn[-1][1]]))
    for k in range(40):
        fakes = torch.arange(3.0).view(3, 1, 1, 1) + 3 * k
        got = pool(fakes).flatten().tolist()
        want = [
            plain(fake, u < 0.5, slot)
            for fake, (u, slot) in zip(fakes.flatten().tolist(), drawn[-3:], strict=True)
        ]
        assert got == want
        assert pool.images.flatten().tolist()[: len(plain.images)] == plain.images


def test_pool_returns_an_old_fake_half_of_the_time():
    torch.manual_seed(0)
    pool = ImagePool(50, 1, 1, torch.float32)
    fakes = torch.arange(2050.0).view(-1, 1, 1, 1)
    returned = pool(fakes).flatten()
    assert torch.equal(returned[:50], fakes.flatten()[:50]) and pool.count.item() == 50
    assert (returned[50:] != fakes.flatten()[50:]).float().mean().item() == pytest.approx(
        0.5, abs=0.05
    )


def test_pool_of_size_zero_passes_through_and_buffers_are_kept():
    x = pictures()
    assert ImagePool(0, 3, 64, torch.float32)(x) is x
    assert set(ImagePool(2, 3, 8, torch.uint8).state_dict()) == {"images", "count"}


def test_discriminators_see_the_pool():
    """With draws that always swap, the fakes that D_A judges in its own step are the pool's old
    ones.
    """
    cfg = dataclasses.replace(TINY, pool_size=2)
    state, seen, batch = build(cfg, CPU), [], (pictures(), pictures(1))
    state.pool_A.images[:], state.pool_A.count[:] = 0.25, 2
    state.D_A.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().clone()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: torch.zeros(1))
        slots = itertools.cycle([0, 1])
        patch.setattr(torch, "randint", lambda *_, **__: torch.tensor([next(slots)]))
        train_step(state, batch, cfg)
    assert (seen[1][2:] == 0.25).all() and torch.equal(state.pool_A.images, seen[0])


# ----------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_a_batch_are_the_mean_of_those_of_its_images(layout, device):
    """Batch size 1 is the paper's; two processes with one image each must equal one with two."""
    cfg = dataclasses.replace(TINY, pool_size=0)
    state, batch = (
        build(cfg, torch.device(device)),
        [x.double().to(device) for x in batch_of("cyclegan", cfg)],
    )
    nets = nn.ModuleList((state.G_AB, state.G_BA, state.D_A, state.D_B)).double()
    state.opt_G.step = state.opt_D.step = lambda: None

    def gradients(part):
        train_step(state, tuple(x[part].to(memory_format=layout) for x in batch), cfg)
        return [p.grad.clone() for p in nets.parameters()]

    for whole, *parts in zip(*map(gradients, (slice(0, 2), slice(0, 1), slice(1, 2))), strict=True):
        assert torch.allclose(whole, sum(parts) / 2, rtol=1e-6, atol=1e-9)


@pytest.mark.cuda
def test_cuda_pool_fills_inside_a_graph():
    device, cfg = torch.device("cuda"), dataclasses.replace(TINY, pool_size=5, batch_size=1)
    state, step = build(cfg, device), common.fast_step(train_step, TINY, device)
    for k in range(8):
        step(state, tuple(x.to(device) for x in (pictures(k, 1), pictures(k + 50, 1))), cfg)
    assert state.pool_A.count.item() == 5 and (state.pool_A.images.abs().sum((1, 2, 3)) > 0).all()


# --------------------------------------------------------------------------------------------- data


@pytest.fixture
def unaligned(tmp_path):
    rng = np.random.default_rng(5)
    for folder, count in (("trainA", 5), ("trainB", 2), ("testA", 2), ("testB", 3)):
        for k in range(count):
            save(tmp_path / "unaligned" / folder / f"{k}.jpg", picture(rng, 80, 80))
    return tmp_path / "unaligned"


def domains(root, cache, cfg=TINY, split="train"):
    return Domains(dataclasses.replace(cfg, data=str(root), cache=str(cache)), split, CPU)


def test_an_epoch_is_as_long_as_the_larger_domain(unaligned, tmp_path):
    data = domains(unaligned, tmp_path / "cache", dataclasses.replace(TINY, batch_size=1))
    batches = list(data.batches(0))
    assert len(data) == len(batches) == 5
    assert all(a.shape == b.shape == (1, 3, 64, 64) for a, b in batches)


def test_domains_are_drawn_independently(pairs, tmp_path):
    """B is A's negative in this data: were they drawn together, every batch would say so."""
    data = domains(pairs, tmp_path / "cache")
    distances = [(a + b).abs().mean().item() for epoch in range(3) for a, b in data.batches(epoch)]
    assert np.mean(distances) > 0.3


def test_every_image_once_an_epoch_and_the_smaller_domain_evenly(unaligned, tmp_path):
    seen = []
    data = domains(unaligned, tmp_path / "cache", dataclasses.replace(TINY, batch_size=1))
    data.loader_A.batches = lambda index, honest=data.loader_A.batches: (
        seen.append(index.ravel().tolist()),
        honest(index),
    )[1]
    list(data.batches(0))
    data.loader_B.batches = lambda index, honest=data.loader_B.batches: (
        seen.append(index.ravel().tolist()),
        honest(index),
    )[1]
    list(data.batches(0))
    assert sorted(seen[0]) == [0, 1, 2, 3, 4] and sorted(seen[2])[1:4] in ([0, 0, 1], [0, 1, 1])


def test_batches_follow_from_seed_epoch_and_number(pairs, tmp_path):
    data = domains(pairs, tmp_path / "cache")
    first, later = list(data.batches(2)), list(data.batches(2, first=1))
    assert all(
        torch.equal(x, y)
        for p, q in zip(first[1:], later, strict=True)
        for x, y in zip(p, q, strict=True)
    )


def test_land_cover_batches_are_one_hot_with_holes(tmp_path):
    data = domains(land_cover(tmp_path / "lc"), tmp_path / "cache")
    _, b = next(data.batches(0))
    assert b.shape == (2, 3, 64, 64) and set(b.unique().tolist()) == {0.0, 1.0}
    assert set(b.sum(1).unique().tolist()) == {0.0, 1.0}
    colors = to_bytes(data.picture(b)).permute(0, 2, 3, 1).reshape(-1, 3)
    drawn = {tuple(color) for color in colors.tolist()}
    assert (0x9B, 0x9B, 0x9B) in drawn and (0xE2, 0xA9, 0x29) in drawn


def test_jitter_mirrors_both_ways():
    y, x = np.mgrid[:72, :72].astype(np.uint8)
    images = torch.from_numpy(np.stack([y, x])[None].repeat(4, 0))
    plan = [[0, 8, 0, 0], [8, 0, 1, 0], [3, 4, 0, 1], [3, 4, 1, 1]]
    out = cyclegan.jitter(images, plan, 64)
    for image, (top, left, flip, upside_down) in zip(out, plan, strict=True):
        y, x = np.mgrid[top : top + 64, left : left + 64]
        y, x = (y[::-1] if upside_down else y), (x[:, ::-1] if flip else x)
        assert (image[0].numpy() == y).all() and (image[1].numpy() == x).all()


def test_upside_down_beside_land_cover_only(pairs, tmp_path):
    plans = []
    honest = cyclegan.jitter
    for root in (pairs, land_cover(tmp_path / "lc", train=12)):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                cyclegan,
                "jitter",
                lambda *args, seen=seen: (seen.extend(args[1]), honest(*args))[1],
            )
            for epoch in range(4):
                list(domains(root, tmp_path / "cache").batches(epoch))
        plans.append(np.mean([upside_down for *_, upside_down in seen]))
    assert plans[0] == 0 and 0.2 < plans[1] < 0.8


# ---------------------------------------------------------------------------------------- translate


def test_translate_both_directions():
    state, back = build(LABELS, CPU), dataclasses.replace(LABELS, direction="BtoA")
    hot = translate(state, pictures(), LABELS)
    assert (hot.sum(1) == 1).all() and set(hot.unique().tolist()) == {0.0, 1.0}
    image = translate(state, maps(), back)
    assert image.shape == (2, 3, 64, 64) and image.abs().max() <= 1 and not image.requires_grad


# --------------------------------------------------------------------------------------- whole runs


def options(data, out, *more):
    return [
        "--data",
        str(data),
        "--out",
        str(out),
        "--cache",
        str(out.parent / "cache"),
        *ARGUMENTS,
        *more,
    ]


def rows_of(out):
    return json.loads((out / "evaluation.json").read_text())["rows"]


def test_run_on_pictures_and_resume_with_the_pool_half_full(pairs, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--epochs", "3", "--pool-size", "12"]
    main(options(pairs, whole, *more))
    asked = iter([False] * 3 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "stopping", lambda run: next(asked))
        with pytest.raises(SystemExit):
            main(options(pairs, parts, *more))
    stopped = state_of(parts / "checkpoints" / "last.pt")
    assert stopped["batch"] == 1 and stopped["state"]["pool_A"]["count"].item() == 8  # of 12
    main(["--resume", "--out", str(parts)])
    got, want = (state_of(folder / "checkpoints" / "last.pt") for folder in (parts, whole))
    assert same(got["state"], want["state"])
    assert (parts / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    header = (whole / "metrics.csv").read_text().splitlines()[0]
    assert header.endswith("identity_A,identity_B,d_A,d_B,val_cycle_A,val_rmse_AB,val_rmse_BA")
    assert {
        "A to B: model",
        "B to A: model",
        "A to B: copy of the input",
        "A to B to A: model",
    } <= set(rows_of(whole))


def test_run_on_land_cover(tmp_path):
    root, out = land_cover(tmp_path / "data"), tmp_path / "run"
    main(options(root, out, "--epochs", "1", "--train-judge", "--judge-epochs", "1"))
    rows = rows_of(out)
    for row in ("B to A: model", "real photograph", "real, of another place"):
        assert 0 <= rows[row]["judge_pixel_accuracy"] <= 1, row
    assert rows["real photograph"] != rows["real, of another place"]
    assert set(rows["A to B: model"]) == {"pixel_accuracy", "class_accuracy", "mean_iou"}
    assert rows["A to B: most frequent class"]["class_accuracy"] == pytest.approx(1 / 3, abs=0.01)
    assert rows["B to A: model"]["rmse"] > 0 and (out / "confusion.png").is_file()
    checkpoint = str(out / "checkpoints" / "last.pt")
    main(
        [
            "--generate",
            str(root / "val" / "rgb"),
            "--checkpoint",
            checkpoint,
            "--out",
            str(tmp_path / "labels"),
        ]
    )
    index, colours = (Image.open(tmp_path / "labels" / name) for name in ("0.png", "0_colours.png"))
    assert index.mode == "P" and index.size == (80, 80) and np.asarray(index).max() < 3
    assert (np.asarray(index.convert("RGB")) == np.asarray(colours)).all()
    way = ["--direction", "BtoA", "--checkpoint", checkpoint, "--out", str(tmp_path / "pictures")]
    main(["--generate", str(tmp_path / "labels" / "0.png"), *way])
    assert Image.open(tmp_path / "pictures" / "0.png").size == (80, 80)


def test_mode_can_be_forced(pairs, tmp_path):
    main(options(pairs, tmp_path / "labels" / "run", "--epochs", "1", "--lc-classes", "maps"))
    assert "mean_iou" in rows_of(tmp_path / "labels" / "run")["A to B: model"]
    root = land_cover(tmp_path / "data")
    main(options(root, tmp_path / "pictures" / "run", "--epochs", "1", "--lc-classes", "pictures"))
    assert "rmse" in rows_of(tmp_path / "pictures" / "run")["A to B: model"]


def test_run_on_unaligned_data(unaligned, tmp_path):
    main(options(unaligned, tmp_path / "run", "--epochs", "1"))
    assert set(rows_of(tmp_path / "run")) == {"A to B to A: model", "B to A to B: model"}


def test_decay_and_flip(pairs, tmp_path, monkeypatch):
    cfg = Config(epochs=10, epochs_decay=2, lr=1.0)
    assert [cyclegan.learning_rate(cfg, k) for k in (7, 8, 9)] == pytest.approx([1, 2 / 3, 1 / 3])
    honest, drawn = cyclegan.jitter, []
    monkeypatch.setattr(cyclegan, "jitter", lambda *args: (drawn.extend(args[1]), honest(*args))[1])
    list(domains(pairs, tmp_path / "cache", dataclasses.replace(TINY, flip="none")).batches(0))
    assert {tuple(crop[2:]) for crop in drawn} == {(0, 0)}
    data = domains(pairs, tmp_path / "cache", dataclasses.replace(TINY, load_size=64))
    assert data.store.side == 64


def test_published_weights_are_usable_at_once(pairs, tmp_path, capsys):
    published = {
        f"model.{k}.x": value for k, value in enumerate(build(TINY, CPU).G_BA.state_dict().values())
    }
    torch.save(published, tmp_path / "latest_net_G.pth")
    use = [
        "--generate",
        str(pairs / "val"),
        "--init-BA",
        str(tmp_path / "latest_net_G.pth"),
        *ARGUMENTS,
    ]
    main([*use, "--direction", "BtoA", "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").iterdir())) == 3
    with pytest.raises(SystemExit) as stopped:
        main([*use, "--direction", "AtoB", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2 and "--init-AB" in capsys.readouterr().err


def test_init_of_one_generator_starts_from_our_checkpoint(pairs, tmp_path):
    main(options(pairs, tmp_path / "first", "--epochs", "1"))
    path = tmp_path / "first" / "checkpoints" / "last.pt"
    cfg = dataclasses.replace(TINY, init_AB=str(path))
    state = build(cfg, CPU)
    before = copy.deepcopy(state.G_BA.state_dict())
    cyclegan.load_generators(state, cfg)
    assert same(dict(state.G_AB.state_dict()), state_of(path)["state"]["G_AB"])
    assert same(dict(state.G_BA.state_dict()), dict(before))


def test_crop_offsets_reach_both_ends(pairs, tmp_path, monkeypatch):
    honest, drawn = cyclegan.jitter, []
    monkeypatch.setattr(cyclegan, "jitter", lambda *args: (drawn.extend(args[1]), honest(*args))[1])
    data = domains(pairs, tmp_path / "cache")
    for epoch in range(25):
        list(data.batches(epoch))
    top, left, flip, _ = zip(*drawn, strict=True)
    assert set(top) == set(left) == set(range(9)) and set(flip) == {0, 1}


def test_the_mode_is_bound_to_the_checkpoint(pairs, tmp_path):
    """A classes.json that appears later does not turn a model of pictures into another."""
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    main(options(data, tmp_path / "run", "--epochs", "1"))
    (data / "classes.json").write_text(json.dumps(TABLE))
    main(["--evaluate", "--checkpoint", str(tmp_path / "run" / "checkpoints" / "last.pt")])
    assert "rmse" in rows_of(tmp_path / "run")["A to B: model"]


def test_learning_rate_is_constant_for_half_then_falls_to_zero():
    cfg = Config(epochs=200, lr=1.0)
    assert cyclegan.learning_rate(cfg, 99) == 1.0 and cyclegan.learning_rate(
        cfg, 199
    ) == pytest.approx(1 / 101)
