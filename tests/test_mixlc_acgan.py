"""mixlc_acgan: the two heads, the losses, the style features, the noise, the judge, the command
line.
"""

import dataclasses
import json
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import mixlc_acgan
from conftest import (
    CPU,
    batch_of,
    land_cover,
    maps,
    parameters,
    picture,
    pictures,
    save,
    state_of,
    tiny,
)
from mixlc_acgan import (
    Discriminator,
    Generator,
    build,
    main,
    train_step,
    translate,
)

TINY = tiny("mixlc_acgan")[1]
ARGUMENTS = [
    "--size",
    "64",
    "--width",
    "4",
    "--batch-size",
    "2",
    "--log-every",
    "2",
    "--device",
    "cpu",
]
ARGUMENTS += ["--style-features", "random", "--style-layers", "relu1_2"]


# ------------------------------------------------------------------------------------------ samples


# ----------------------------------------------------------------------------------------- networks


def test_generator_parameters():
    def conv(i, o, k, norm=True):
        return i * o * k * k + o + (2 * o if norm else 0)

    def unet(channels):
        downs = [(channels, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]
        ups = [(1024, 512), (1024, 256), (512, 128), (256, 64)]
        fours = sum(conv(i, o, 4) for i, o in downs + ups)
        return fours + 2 * conv(1024, 1024, 3) + conv(128, 64, 3)

    output = conv(128, 64, 4) + 2 * conv(64, 64, 3) + conv(64, 3, 3, norm=False)
    assert parameters(Generator, 14, 64, 0.5) == unet(3) + unet(14) + output == 88_220_547


def test_discriminator_parameters():
    def conv(i, o, k, norm=True):
        return i * o * k * k + o + (2 * o if norm else 0)

    trunk = sum(conv(i, o, 4) for i, o in [(3, 64), (64, 128), (128, 256), (256, 512), (512, 1024)])
    trunk += 2 * conv(1024, 1024, 3)
    ups = sum(conv(i, o, 4) for i, o in [(1024, 512), (512, 256), (256, 128), (128, 64), (64, 64)])
    heads = conv(1024 + 14, 256, 3, norm=False) + conv(256, 1, 3, norm=False)
    heads += conv(64, 14, 3, norm=False)
    assert parameters(Discriminator, 14, 64) == trunk + ups + heads == 43_642_575


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_shapes(size):
    image, lc = torch.randn(2, 3, size, size), maps(size=size)
    with torch.no_grad():
        assert Generator(3, 2, 0.5)(image, lc).shape == image.shape
        logits, classes = Discriminator(3, 2).both(image, lc)
    assert logits.shape == (2, 1, size // 32, size // 32) and classes.shape == (2, 3, size, size)


def test_the_adversarial_head_joins_photograph_and_land_cover():
    """a(image) + b(land cover) would have no interaction: this difference of differences."""
    D = Discriminator(3, 8).eval()
    for parameter in D.real_head.parameters():
        nn.init.normal_(parameter)
    one, other = pictures(0), pictures(1)
    here, there = maps(0), maps(9)
    with torch.no_grad():
        logits = [[D(image, lc) for lc in (here, there)] for image in (one, other)]
    interaction = logits[0][0] - logits[0][1] - logits[1][0] + logits[1][1]
    effect = (logits[0][0] - logits[0][1]).abs().mean()
    assert interaction.abs().mean() > 1e-3 * effect > 0


def test_a_discriminator_learns_that_a_photograph_does_not_fit_its_land_cover():
    """Red ground is class 0, green ground class 1: trained for seconds, it ranks over 90 %."""
    torch.manual_seed(0)
    D = mixlc_acgan.init_weights(Discriminator(2, 8))
    adam = torch.optim.Adam(D.parameters(), 1e-3, (0.5, 0.999))

    def batch():
        cover = common.one_hot(torch.randint(2, (16, 2, 2), dtype=torch.uint8), 2)
        cover = F.interpolate(cover, scale_factor=32)
        picture = torch.cat([cover * 2 - 1, torch.zeros(16, 1, 64, 64)], 1)
        return picture + 0.3 * torch.randn_like(picture), cover

    for _ in range(60):
        picture, cover = batch()
        right, wrong = D(picture, cover), D(picture, cover.flip(1))
        loss = mixlc_acgan.gan_loss(right, True) + mixlc_acgan.gan_loss(wrong, False)
        adam.zero_grad()
        loss.backward()
        adam.step()
    picture, cover = batch()
    right, wrong = D(picture, cover).mean((1, 2, 3)), D(picture, cover.flip(1)).mean((1, 2, 3))
    assert (right > wrong).float().mean().item() > 0.9


def test_the_class_head_never_sees_land_cover():
    """Changing it moves the adversarial logits, and the class logits not at all."""
    D, image = Discriminator(3, 4).eval(), pictures()
    (logits, classes), (other_logits, other_classes) = (
        D.both(image, maps(0)),
        D.both(image, maps(9)),
    )
    assert torch.equal(classes, other_classes) and not torch.equal(logits, other_logits)
    assert torch.equal(D(image, maps(0)), logits) and torch.equal(D.classify(image), classes)
    lc = maps(0).requires_grad_()
    assert torch.autograd.grad(D.both(image, lc)[1].sum(), lc, allow_unused=True)[0] is None


# ------------------------------------------------------------------------------------------- losses


def test_gram_style_loss_on_a_2x2x2_tensor():
    """Channels (1, 2, 3, 4) and (0, 1, 0, 1): Gram [[30, 6], [6, 2]] / 8; of zeros: zero."""
    features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, 1.0]]]])
    assert torch.equal(common.gram(features), torch.tensor([[[30.0, 6.0], [6.0, 2.0]]]) / 8)
    loss = mixlc_acgan.style_loss(lambda image: [image], features, torch.zeros_like(features))
    assert loss.item() == pytest.approx((30**2 + 2 * 6**2 + 2**2) / 64)
    twice = mixlc_acgan.style_loss(
        lambda image: [image, image], features, torch.zeros_like(features)
    )
    assert twice.item() == pytest.approx(2 * loss.item())


def test_style_is_float32_under_autocast():
    vgg, seen = common.VGG16Features(["relu2_2"], "random", ""), []
    vgg.register_forward_hook(lambda _, x, y: seen.extend([x[0].dtype, y[0].dtype]))
    fake = pictures().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mixlc_acgan.style_loss(vgg, fake, pictures(1).bfloat16())
    assert set(seen) == {torch.float32} and loss.dtype == torch.float32
    loss.backward()
    assert fake.grad.abs().sum() > 0


def test_class_loss_by_hand_with_weights_and_ignored_pixels():
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, :, 0, 0] = torch.tensor([math.log(3.0), 0.0])  # 3/4 for class 0
    logits[0, :, 0, 2] = 50.0  # ignored
    target = torch.zeros(1, 2, 1, 3)
    target[0, 0, 0, 0] = target[0, 1, 0, 1] = 1
    weights = torch.tensor([1.0, 3.0])
    want = (-math.log(3 / 4) - 3 * math.log(1 / 2)) / 4
    assert mixlc_acgan.class_loss(logits, target, weights).item() == pytest.approx(want)
    index = torch.tensor([[[0, 1, 255]]])
    reference = F.cross_entropy(logits, index, weight=weights, ignore_index=255)
    assert mixlc_acgan.class_loss(logits, target, weights).item() == pytest.approx(reference.item())
    assert mixlc_acgan.class_loss(logits, target * 0, weights).item() == 0


def test_class_weights_by_hand():
    weights = mixlc_acgan.inverse_frequency(torch.tensor([6, 2, 0]))
    assert weights.tolist() == pytest.approx([4 / 6, 4 / 2, 0.0])
    rare = mixlc_acgan.inverse_frequency(torch.tensor([1023, 1]))
    assert rare.tolist() == pytest.approx([512 / 1023, 10.0])


# ----------------------------------------------------------------------------------- style features


# ----------------------------------------------------------------------------------------- the step


def test_class_loss_of_the_fake_reaches_the_generator():
    state, (rgb, lc, *_) = build(TINY, CPU), batch_of("mixlc_acgan", TINY)
    logits = state.D.classify(state.G(rgb, lc))
    mixlc_acgan.class_loss(logits, lc, state.class_weights).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in state.G.parameters())
    assert state.G.lc_net.downs[0][0].weight.grad.abs().sum() > 0


def test_real_is_never_a_collage():
    batch = mixlc_acgan.Edit(*batch_of("mixlc_acgan", TINY))
    state, seen = build(TINY, CPU), []
    state.D.trunk.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().clone()))
    train_step(state, batch, TINY)
    assert len(seen) == 3 and torch.equal(seen[1], batch.rgb_b)
    assert not any(torch.equal(x, batch.rgb_ab) for x in seen)


# ---------------------------------------------------------------------------------------- translate


@pytest.mark.parametrize("policy", ["running", "batch"])
def test_dropout_is_the_noise_and_batch_norm_is_in_the_mode_stated(policy):
    cfg = dataclasses.replace(TINY, eval_norm=policy)
    state, (rgb, lc, *_) = build(cfg, CPU), batch_of("mixlc_acgan", TINY)
    statistics, modes = {k: v.clone() for k, v in state.G.state_dict().items()}, {}
    for module in state.G.modules():
        if isinstance(module, (nn.Dropout, nn.BatchNorm2d)):
            module.register_forward_hook(
                lambda m, x, y: modes.setdefault(type(m), set()).add(m.training)
            )
    torch.manual_seed(3)
    one, two = (translate(state, (rgb, lc), cfg) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(translate(state, (rgb, lc), cfg), one) and not torch.equal(one, two)
    assert modes == {nn.Dropout: {True}, nn.BatchNorm2d: {policy == "batch"}}
    assert all(torch.equal(v, statistics[k]) for k, v in state.G.state_dict().items())


def test_classifiers_are_scored_inside_the_edit_only(tmp_path):
    class Perfect(nn.Module):
        def classes_of(self, image):
            return torch.where(self.mask, self.lc, self.lc.flip(1)).argmax(1)

    net, lc = Perfect(), maps(classes=3)
    net.lc, net.mask = lc, torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    net.mask[:, :, 8:28, 8:28] = True
    box, inside = torch.tensor([[8, 8, 20, 20]] * 2), torch.ones(2, dtype=torch.bool)
    edit = mixlc_acgan.Edit(pictures(), lc, pictures(), box, inside, lc, pictures(), lc)
    val = types.SimpleNamespace(in_order=lambda images: [edit])
    state = types.SimpleNamespace(D=net, G=nn.Identity())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixlc_acgan, "translate", lambda state, inputs, cfg: inputs[0])
        scores = mixlc_acgan.evaluate(state, val, TINY, np.arange(2), judge=net)
    for by in ("judge", "own"):
        assert scores.confusions["model", by].sum().item() == 2 * 400
        assert scores.table()["model"][f"{by}_mean_iou"] == 1.0


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixlc_acgan")
    land_cover(root / "data", train=5, val=3)
    main(
        options(
            root / "data", root / "run", "--epochs", "2", "--train-judge", "--judge-epochs", "1"
        )
    )
    return root


def test_run_folder(trained):
    rows = json.loads((trained / "run" / "evaluation.json").read_text())["rows"]
    names = ("pixel_accuracy", "class_accuracy", "mean_iou")
    scores = {f"{by}_{name}" for by in ("own", "judge") for name in names}
    assert set(rows["model"]) == set(rows["copy of rgb_a"]) == scores | {
        "l1_inside", "psnr_inside", "l1_outside", "psnr_outside", "l1_to_input",
    }  # fmt: skip
    assert set(rows["photograph b"]) == scores
    header = (trained / "run" / "metrics.csv").read_text().splitlines()[0]
    assert "g_adv,g_pixel,g_style,g_class,g_id,d_real,d_fake,d_class,val_l1_inside" in header
    assert (trained / "run" / "judge.pt").is_file()


def test_checkpoint_keeps_class_weights_and_no_vgg(trained):
    state = state_of(trained / "run" / "checkpoints" / "last.pt")["state"]
    assert set(state) == {"G", "D", "class_weights", "opt_G", "opt_D"}
    assert state["class_weights"].shape == (3,) and not torch.equal(
        state["class_weights"], torch.ones(3)
    )


def test_resume_is_exact(trained, tmp_path, monkeypatch):
    out, asked = tmp_path / "run", iter([False] * 2 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "stopping", lambda run: next(asked))
        with pytest.raises(SystemExit):
            main(
                options(
                    trained / "data", out, "--epochs", "2", "--train-judge", "--judge-epochs", "1"
                )
            )
    assert state_of(out / "checkpoints" / "last.pt")["batch"] == 1
    main(["--resume", "--out", str(out)])
    got, want = (
        state_of(folder / "checkpoints" / "last.pt")["state"] for folder in (out, trained / "run")
    )
    for net in ("G", "D"):
        assert all(torch.equal(value, want[net][name]) for name, value in got[net].items())
    assert (out / "metrics.csv").read_text() == (trained / "run" / "metrics.csv").read_text()


def test_evaluation_repeats_with_the_kept_judge(trained):
    first = json.loads((trained / "run" / "evaluation.json").read_text())
    main(["--evaluate", "--checkpoint", str(trained / "run" / "checkpoints" / "last.pt")])
    assert json.loads((trained / "run" / "evaluation.json").read_text())["rows"] == first["rows"]


def test_samples_differ_and_one_seed_repeats(trained, tmp_path):
    save(tmp_path / "photo.png", picture(np.random.default_rng(9), 80, 100))
    save(tmp_path / "lc.png", np.zeros((80, 100), np.uint8))
    use = [
        "--generate",
        str(tmp_path / "photo.png"),
        "--lc",
        str(tmp_path / "lc.png"),
        "--paint",
        "water:20,20,40,40",
    ]
    use += ["--checkpoint", str(trained / "run" / "checkpoints" / "last.pt")]
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main([*use, "--samples", "3", "--seed", seed, "--out", str(tmp_path / folder)])
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [
        "photo_1.png",
        "photo_2.png",
        "photo_3.png",
        "photo_differences.png",
        "photo_sheet.png",
    ]
    a1, a2, b1, c1 = (
        np.asarray(Image.open(tmp_path / path))
        for path in ("a/photo_1.png", "a/photo_2.png", "b/photo_1.png", "c/photo_1.png")
    )
    assert (a1 == b1).all() and (a1 != a2).any() and (a1 != c1).any()
    differences = np.asarray(Image.open(tmp_path / "a" / "photo_differences.png"))
    assert (
        differences[16:64, 16:64].max() > 0 and differences[:10].max() == 0
    )  # outside, the photograph is kept
    main([*use, "--out", str(tmp_path / "one")])
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "photo.png",
        "photo_sheet.png",
    ]


def test_show_samples(trained, tmp_path):
    main(options(trained / "data", tmp_path / "show", "--show-samples", "2"))
    assert Image.open(tmp_path / "show" / "samples.png").size == (4 + 6 * 68, 16 + 2 * 68)


def test_without_class_weights_all_classes_weigh_the_same(trained, tmp_path):
    main(options(trained / "data", tmp_path / "run", "--epochs", "1", "--no-class-weights"))
    weights = state_of(tmp_path / "run" / "checkpoints" / "last.pt")["state"]["class_weights"]
    assert torch.equal(weights, torch.ones(3))
