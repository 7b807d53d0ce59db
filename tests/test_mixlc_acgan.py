"""mixlc_acgan: the two heads, the losses, the style features, the noise, the judge, the command line."""

import contextlib
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import mixlc
import mixlc_acgan
from conftest import TABLE, land_cover, parameters, picture, save, state_of
from mixlc_acgan import Config, Discriminator, Edits, Generator, VGG16Features, build, main, train_step, translate

CPU = torch.device("cpu")
TINY = Config(
    size=64, width=4, batch_size=2, precision="fp32", lc_classes=json.dumps(TABLE), style_features="random",
    style_layers="relu1_2",
)  # fmt: skip
ARGUMENTS = ["--size", "64", "--width", "4", "--batch-size", "2", "--log-every", "2", "--device", "cpu"]
ARGUMENTS += ["--style-features", "random", "--style-layers", "relu1_2"]
FIRST_RANDOM_WEIGHTS = [-0.306415, -0.313633, -0.068199]


def maps(seed=0, count=2, size=64, classes=3):
    index = torch.randint(
        classes, (count, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return mixlc_acgan.one_hot(index, classes)


def pictures(seed=0, count=2, size=64):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_batch(seed=0):
    box = torch.tensor([[20, 20, 24, 24], [0, 40, 16, 16]])
    return pictures(seed), maps(seed), pictures(seed + 1), box, maps(seed + 2), pictures(seed + 3), maps(seed + 4)


# ------------------------------------------------------------------------------------------------------------ samples


def test_batches_hold_the_land_cover_of_both_tiles(tmp_path):
    root = land_cover(tmp_path / "data", train=5)
    cfg = dataclasses.replace(TINY, data=str(root), cache=str(tmp_path), lc_classes="", box="random")
    ours = Edits(cfg, "train", CPU)
    shared = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(mixlc.Config) if hasattr(cfg, f.name)}
    theirs = mixlc.Edits(mixlc.Config(**shared), "train", CPU)
    for got, want in zip(ours.batches(1), theirs.batches(1), strict=True):
        rgb_a, lc_ab, rgb_ab, box, lc_a, rgb_b, lc_b = got
        assert all(
            torch.equal(x, y) for x, y in zip((rgb_a, lc_ab, rgb_ab, box, rgb_b), (*want[:4], want[5]), strict=True)
        )
        mask = mixlc_acgan.edit_mask(box, 64)
        assert torch.equal(torch.where(mask, lc_b, lc_a), lc_ab) and torch.equal(
            torch.where(mask, rgb_b, rgb_a), rgb_ab
        )


# ----------------------------------------------------------------------------------------------------------- networks


def test_generator_parameters():
    def conv(i, o, k, norm=True):
        return i * o * k * k + o + (2 * o if norm else 0)

    def unet(channels):
        downs = [(channels, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]
        ups = [(1024, 512), (1024, 256), (512, 128), (256, 64)]
        fours = sum(conv(i, o, 4) for i, o in downs + ups)
        return fours + 2 * conv(1024, 1024, 3) + conv(128, 64, 3)

    output = conv(128, 64, 4) + 2 * conv(64, 64, 3) + conv(64, 3, 3, norm=False)
    assert parameters(Generator(14, 64, 0.5)) == unet(3) + unet(14) + output == 88_220_547


def test_discriminator_parameters():
    def conv(i, o, k, norm=True):
        return i * o * k * k + o + (2 * o if norm else 0)

    trunk = sum(conv(i, o, 4) for i, o in [(3, 64), (64, 128), (128, 256), (256, 512), (512, 1024)])
    trunk += 2 * conv(1024, 1024, 3)
    ups = sum(conv(i, o, 4) for i, o in [(1024, 512), (512, 256), (256, 128), (128, 64), (64, 64)])
    heads = conv(1024 + 14, 1, 3, norm=False) + conv(64, 14, 3, norm=False)
    assert parameters(Discriminator(14, 64)) == trunk + ups + heads == 41_257_805


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_shapes(size):
    image, lc = torch.randn(2, 3, size, size), maps(size=size)
    with torch.no_grad():
        assert Generator(3, 2, 0.5)(image, lc).shape == image.shape
        logits, classes = Discriminator(3, 2).both(image, lc)
    assert logits.shape == (2, 1, size // 32, size // 32) and classes.shape == (2, 3, size, size)


def test_the_class_head_never_sees_land_cover():
    """Changing it moves the adversarial logits, and the class logits not at all."""
    D, image = Discriminator(3, 4).eval(), pictures()
    (logits, classes), (other_logits, other_classes) = D.both(image, maps(0)), D.both(image, maps(9))
    assert torch.equal(classes, other_classes) and not torch.equal(logits, other_logits)
    assert torch.equal(D(image, maps(0)), logits) and torch.equal(D.classify(image), classes)
    lc = maps(0).requires_grad_()
    assert torch.autograd.grad(D.both(image, lc)[1].sum(), lc, allow_unused=True)[0] is None


# ------------------------------------------------------------------------------------------------------------- losses


def test_gram_style_loss_on_a_2x2x2_tensor():
    """Channels (1, 2, 3, 4) and (0, 1, 0, 1): Gram [[30, 6], [6, 2]] / 8; of zeros: zero."""
    features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, 1.0]]]])
    assert torch.equal(mixlc_acgan.gram(features), torch.tensor([[[30.0, 6.0], [6.0, 2.0]]]) / 8)
    loss = mixlc_acgan.style_loss(lambda image: [image], features, torch.zeros_like(features))
    assert loss.item() == pytest.approx((30**2 + 2 * 6**2 + 2**2) / 64)
    twice = mixlc_acgan.style_loss(lambda image: [image, image], features, torch.zeros_like(features))
    assert twice.item() == pytest.approx(2 * loss.item())


def test_style_is_float32_under_autocast():
    vgg, seen = VGG16Features(["relu2_2"], "random", ""), []
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
    labels = np.array([0] * 6 + [1] * 2 + [255] * 8, np.uint8).reshape(1, 1, 4, 4)
    assert mixlc_acgan.inverse_frequency(labels, 3).tolist() == pytest.approx([4 / 6, 4 / 2, 0.0])
    rare = np.array([0] * 1023 + [1], np.uint8).reshape(1, 1, 32, 32)
    assert mixlc_acgan.inverse_frequency(rare, 2).tolist() == pytest.approx([512 / 1023, 10.0])


def test_eight_losses():
    losses = train_step(build(TINY, CPU), random_batch(), TINY)
    assert list(losses) == ["g_adv", "g_pixel", "g_style", "g_class", "g_id", "d_real", "d_fake", "d_class"]
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("name", ["adv", "pixel", "style", "class", "id"])
def test_each_weight_scales_the_generators_gradient(name):
    """With the others off, twice the weight is twice the gradient; with all off there is none."""
    off = dict.fromkeys(("adv_lambda", "pixel_lambda", "style_lambda", "class_lambda", "id_lambda"), 0.0)

    def gradient(weight):
        torch.manual_seed(0)
        cfg = dataclasses.replace(TINY, **(off | {f"{name}_lambda": weight}))
        state = build(cfg, CPU)
        state.opt_G.step = state.opt_D.step = lambda: None
        torch.manual_seed(1)
        train_step(state, random_batch(), cfg)
        return torch.cat([p.grad.flatten() for p in state.G.parameters()])

    assert gradient(0.0).abs().max() == 0 and gradient(1.0).abs().max() > 0
    assert torch.allclose(gradient(2.0), 2 * gradient(1.0), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("given", "result"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_losses_are_in_at_least_float32(given, result):
    x = torch.zeros(1, 3, 8, 8, dtype=given)
    assert mixlc_acgan.gan_loss(x, True).dtype == mixlc_acgan.l1_loss(x, x).dtype == result
    assert mixlc_acgan.class_loss(x, x, torch.ones(3)).dtype == result


# ----------------------------------------------------------------------------------------------------- style features


def vgg_file(path, last=14):
    weights, channels = {}, 3
    for index, out in ((0, 64), (2, 64), (5, 128), (7, 128), (10, 256), (12, 256), (14, 256), (17, 512)):
        if index <= last:
            weights[f"features.{index}.weight"] = torch.randn(out, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
            weights[f"features.{index}.bias"] = torch.randn(out) * 0.1
        channels = out
    torch.save(weights | {"classifier.0.bias": torch.zeros(3)}, path)
    return weights


def test_vgg16_from_a_file_with_torchvisions_keys(tmp_path):
    weights = vgg_file(tmp_path / "vgg.pth")
    vgg = VGG16Features(["relu1_1", "relu2_2", "relu3_3"], "vgg16", str(tmp_path / "vgg.pth"))
    x = pictures()
    got, want = vgg(x), []
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    y = ((x + 1) / 2 - mean) / std
    for index in (0, 2, 5, 7, 10, 12, 14):
        y = F.max_pool2d(y, 2) if index in (5, 10) else y
        y = F.relu(F.conv2d(y, weights[f"features.{index}.weight"], weights[f"features.{index}.bias"], padding=1))
        want += [y] if index in (0, 7, 14) else []
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(got, want, strict=True))
    assert not vgg.training and not any(p.requires_grad for p in vgg.parameters())


def test_only_the_layers_in_use_are_kept(tmp_path):
    vgg_file(tmp_path / "short.pth", last=2)
    vgg = VGG16Features(["relu1_2"], "vgg16", str(tmp_path / "short.pth"))
    assert sum(isinstance(m, nn.Conv2d) for m in vgg.modules()) == 2


def test_vgg16_refusals(tmp_path, monkeypatch):
    vgg_file(tmp_path / "short.pth", last=2)
    with pytest.raises(common.UserError, match="no features.5.weight"):
        VGG16Features(["relu3_3"], "vgg16", str(tmp_path / "short.pth"))
    with pytest.raises(common.UserError, match="no layer .*relu9_1.*there are relu1_1"):
        VGG16Features(["relu9_1"], "random", "")

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(common.UserError, match="--vgg16 FILE"):
        VGG16Features(["relu1_2"], "vgg16", "")


def test_random_features_are_the_same_on_every_run_and_machine():
    torch.manual_seed(123)
    one = VGG16Features(["relu3_3"], "random", "")
    torch.manual_seed(5)
    two = VGG16Features(["relu3_3"], "random", "")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    first = one.features[0].weight.flatten()[:3].tolist()
    seeded = torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(0)).flatten()[:3] * (2 / 27) ** 0.5
    assert first == pytest.approx(seeded.tolist()) and first == pytest.approx(FIRST_RANDOM_WEIGHTS, abs=1e-5)
    for conv in (m for m in one.modules() if isinstance(m, nn.Conv2d)):  # He et al. 2015: variance 2 / fan in
        assert conv.weight.var().item() == pytest.approx(2 / (9 * conv.in_channels), rel=0.1)


# ----------------------------------------------------------------------------------------------------------- the step


def test_each_step_leaves_the_other_networks_gradients_untouched():
    state, seen = build(TINY, CPU), {}

    def watch(name):
        def step():
            nets = {"G": state.G, "D": state.D}
            seen[name] = {
                k: [None if p.grad is None else p.grad.clone() for p in n.parameters()] for k, n in nets.items()
            }

        return step

    state.opt_D.step, state.opt_G.step = watch("D step"), watch("G step")
    train_step(state, random_batch(), TINY)
    assert all(grad is None for grad in seen["D step"]["G"])
    assert all(grad is not None for grad in seen["D step"]["D"] + seen["G step"]["G"])
    assert all(torch.equal(a, b) for a, b in zip(seen["D step"]["D"], seen["G step"]["D"], strict=True))


def test_class_loss_of_the_fake_reaches_the_generator():
    state, (rgb, lc, *_) = build(TINY, CPU), random_batch()
    logits = state.D.classify(state.G(rgb, lc))
    mixlc_acgan.class_loss(logits, lc, state.class_weights).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in state.G.parameters())
    assert state.G.lc_net.downs[0][0].weight.grad.abs().sum() > 0


def test_real_is_never_a_collage():
    state, seen, batch = build(TINY, CPU), [], random_batch()
    state.D.trunk.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().clone()))
    train_step(state, batch, TINY)
    assert len(seen) == 3 and torch.equal(seen[1], batch[5]) and not any(torch.equal(x, batch[2]) for x in seen)


def test_step_reads_no_value_on_the_host(monkeypatch):
    """On the meta device tensors have no values: .item() or a branch on one would raise."""
    monkeypatch.setattr(common, "autocast", lambda cfg, device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    state, meta = build(TINY, CPU), torch.device("meta")
    state.G.to(meta), state.D.to(meta), state.style.args[0].to(meta)
    state.class_weights = state.class_weights.to(meta)
    state.opt_G, state.opt_D = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (state.G, state.D))
    losses = train_step(state, tuple(x.to(meta) for x in random_batch()), TINY)
    assert all(loss.shape == () for loss in losses.values())


@pytest.mark.cuda
def test_cuda_graph_trains_like_the_plain_path():
    device, cfg = torch.device("cuda"), dataclasses.replace(TINY, width=16, dropout=0.0)
    plain, graphed = build(cfg, device), build(cfg, device)
    for net in ("G", "D"):
        getattr(graphed, net).load_state_dict(getattr(plain, net).state_dict())
    step = common.fast_step(train_step, cfg, device)
    for k in range(10):
        batch = tuple(x.to(device) for x in random_batch(k))
        want = {name: loss.item() for name, loss in train_step(plain, batch, cfg).items()}
        got = {name: loss.item() for name, loss in step(graphed, batch, cfg).items()}
        for name, loss in want.items():
            assert got[name] == pytest.approx(loss, rel=1e-2, abs=1e-3), (k, name)


# ---------------------------------------------------------------------------------------------------------- translate


@pytest.mark.parametrize("policy", ["running", "batch"])
def test_dropout_is_the_noise_and_batch_norm_is_in_the_mode_stated(policy):
    cfg = dataclasses.replace(TINY, eval_norm=policy)
    state, (rgb, lc, *_) = build(cfg, CPU), random_batch()
    statistics, modes = {k: v.clone() for k, v in state.G.state_dict().items()}, {}
    for module in state.G.modules():
        if isinstance(module, (nn.Dropout, nn.BatchNorm2d)):
            module.register_forward_hook(lambda m, x, y: modes.setdefault(type(m), set()).add(m.training))
    torch.manual_seed(3)
    one, two = (translate(state, (rgb, lc), cfg) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(translate(state, (rgb, lc), cfg), one) and not torch.equal(one, two)
    assert modes == {nn.Dropout: {True}, nn.BatchNorm2d: {policy == "batch"}}
    assert all(torch.equal(v, statistics[k]) for k, v in state.G.state_dict().items())


def test_classifiers_are_scored_inside_the_edit_only(tmp_path):
    class Perfect(nn.Module):
        def classify(self, image):
            return torch.where(self.mask, self.lc, self.lc.flip(1))

    net, lc = Perfect(), maps(classes=3)
    net.lc, net.mask = lc, mixlc_acgan.edit_mask(torch.tensor([[8, 8, 20, 20]] * 2), 64)
    confusion = mixlc_acgan.classified(net, pictures(), lc, net.mask)
    assert confusion.sum().item() == 2 * 400 and common.measure_labels(confusion)["mean_iou"] == 1.0


# --------------------------------------------------------------------------------------------------------- whole runs


def options(data, out, *more):
    return ["--data", str(data), "--out", str(out), "--cache", str(out.parent / "cache"), *ARGUMENTS, *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixlc_acgan")
    land_cover(root / "data", train=5, val=3)
    main(options(root / "data", root / "run", "--epochs", "2", "--train-judge", "--judge-epochs", "1"))
    return root


def test_run_folder(trained):
    rows = json.loads((trained / "run" / "evaluation.json").read_text())["rows"]
    scores = {"own_accuracy", "own_iou", "judge_accuracy", "judge_iou"}
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
    assert state["class_weights"].shape == (3,) and not torch.equal(state["class_weights"], torch.ones(3))


def test_resume_is_exact(trained, tmp_path, monkeypatch):
    out, asked = tmp_path / "run", iter([False] * 2 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "stopping", lambda run: next(asked))
        with pytest.raises(SystemExit):
            main(options(trained / "data", out, "--epochs", "2", "--train-judge", "--judge-epochs", "1"))
    assert state_of(out / "checkpoints" / "last.pt")["batch"] == 1
    main(["--resume", "--out", str(out)])
    got, want = (state_of(folder / "checkpoints" / "last.pt")["state"] for folder in (out, trained / "run"))
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
    use = ["--generate", str(tmp_path / "photo.png"), "--lc", str(tmp_path / "lc.png"), "--paint", "water:20,20,40,40"]
    use += ["--checkpoint", str(trained / "run" / "checkpoints" / "last.pt")]
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main([*use, "--samples", "3", "--seed", seed, "--out", str(tmp_path / folder)])
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["photo_1.png", "photo_2.png", "photo_3.png", "photo_differences.png", "photo_sheet.png"]
    a1, a2, b1, c1 = (
        np.asarray(Image.open(tmp_path / path))
        for path in ("a/photo_1.png", "a/photo_2.png", "b/photo_1.png", "c/photo_1.png")
    )
    assert (a1 == b1).all() and (a1 != a2).any() and (a1 != c1).any()
    differences = np.asarray(Image.open(tmp_path / "a" / "photo_differences.png"))
    assert differences[30:50, 30:50].mean() > 0 and differences[:10].max() == 0  # outside, the photograph is kept
    main([*use, "--out", str(tmp_path / "one")])
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["photo.png", "photo_sheet.png"]


def test_show_samples(trained, tmp_path):
    main(options(trained / "data", tmp_path / "show", "--show-samples", "2"))
    assert Image.open(tmp_path / "show" / "samples.png").size == (4 + 6 * 68, 16 + 2 * 68)


def test_without_class_weights_all_classes_weigh_the_same(trained, tmp_path):
    main(options(trained / "data", tmp_path / "run", "--epochs", "1", "--no-class-weights"))
    weights = state_of(tmp_path / "run" / "checkpoints" / "last.pt")["state"]["class_weights"]
    assert torch.equal(weights, torch.ones(3))
