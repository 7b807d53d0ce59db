"""pix2pix: networks, losses, the step, sampling."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import common
import pix2pix
from conftest import CPU, as_rank, batch_of, parameters
from pix2pix import (
    Config,
    Discriminator,
    Pairs,
    ResNetGenerator,
    State,
    UNetGenerator,
    build,
    train_step,
    translate,
)
from support.pictures import to_bytes

TINY = Config(size=64, width=4, batch_size=2, precision="fp32")
PAPER = dataclasses.replace(TINY, eval_norm="batch")


# ----------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("size", "count"), [(64, 29_244_035), (128, 41_828_995), (256, 54_413_955), (512, 66_998_915)]
)
def test_unet_parameters(size, count):
    assert parameters(UNetGenerator, size, 64, "batch", 0.5) == count


@pytest.mark.parametrize(
    ("field", "count"), [(1, 9_024), (16, 139_585), (70, 2_768_705), (286, 11_159_361)]
)
def test_discriminator_parameters(field, count):
    assert parameters(Discriminator, 64, "batch", field) == count


def test_resnet_parameters():
    assert parameters(ResNetGenerator, 3, 3, 64, 9, "instance") == 11_378_179


@pytest.mark.parametrize("field", [1, 16, 70, 286])
def test_receptive_field(field):
    """From the layers, last to first: one logit sees kernel + (seen - 1) * stride pixels of the
    layer before.
    """
    seen = 1
    for layer in reversed(
        [m for m in Discriminator(4, "batch", field).modules() if isinstance(m, nn.Conv2d)]
    ):
        seen = layer.kernel_size[0] + (seen - 1) * layer.stride[0]
    assert seen == field


def test_patch_logits_are_30x30_at_256():
    x = torch.zeros(1, 3, 256, 256)
    assert Discriminator(4, "batch", 70)(x, x).shape == (1, 1, 30, 30)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("generator", ["unet", "resnet"])
@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_output_shape_and_range(size, generator, norm):
    state = build(
        dataclasses.replace(TINY, size=size, generator=generator, norm=norm, width=2),
        CPU,
        training=False,
    )
    with torch.no_grad():
        fake = state.G(torch.randn(1, 3, size, size))
    assert fake.shape == (1, 3, size, size)
    assert fake.abs().max() <= 1


def test_unet_layers_are_registered_as_data_flows_and_only_the_last_has_a_bias():
    G = UNetGenerator(64, 4, "batch", 0.5)
    convolutions = [m for m in G.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert [m.out_channels for m in convolutions] == [4, 8, 16, 32, 32, 32, 32, 32, 16, 8, 4, 3]
    assert [m.bias is not None for m in convolutions] == [False] * 11 + [True]
    assert all(
        m.bias is not None
        for m in UNetGenerator(64, 4, "instance", 0.5).modules()
        if isinstance(m, nn.Conv2d)
    )


@pytest.mark.parametrize(("size", "count"), [(64, 1), (128, 2), (256, 3), (512, 4)])
def test_unet_dropout_layers(size, count):
    assert (
        sum(isinstance(m, nn.Dropout) for m in UNetGenerator(size, 2, "batch", 0.5).modules())
        == count
    )


def test_patch_gan_286_refuses_what_it_cannot_see():
    with pytest.raises(common.UserError, match="--patch-gan 286"):
        build(dataclasses.replace(TINY, patch_gan=286), CPU)
    build(dataclasses.replace(TINY, patch_gan=286, size=128), CPU)


# ------------------------------------------------------------------------------------------- losses


def test_bce_loss_by_hand():
    logits = torch.tensor([0.0, 2.0])
    assert pix2pix.gan_loss(logits, True, "bce").item() == pytest.approx(
        (math.log(2) + math.log(1 + math.exp(-2))) / 2
    )
    assert pix2pix.gan_loss(logits, False, "bce").item() == pytest.approx(
        (math.log(2) + math.log(1 + math.exp(2))) / 2
    )


def test_lsgan_loss_by_hand():
    logits = torch.tensor([0.0, 3.0])
    assert pix2pix.gan_loss(logits, True, "lsgan").item() == pytest.approx((1 + 4) / 2)
    assert pix2pix.gan_loss(logits, False, "lsgan").item() == pytest.approx((0 + 9) / 2)


def test_the_mean_is_over_losses_of_patches_not_of_logits():
    logits = torch.tensor([[[[-4.0, 4.0]]]])
    assert pix2pix.gan_loss(logits, True, "bce").item() == pytest.approx(
        (math.log1p(math.exp(4)) + math.log1p(math.exp(-4))) / 2
    )


def test_l1_loss_by_hand():
    assert pix2pix.l1_loss(
        torch.tensor([1.0, -1.0]), torch.tensor([0.5, 1.0])
    ).item() == pytest.approx(1.25)


def vgg_file(path):
    """A VGG16 file as torchvision lays it out, with random weights."""
    generator, weights, channels = torch.Generator().manual_seed(3), {}, 3
    for index, out in (
        (0, 64),
        (2, 64),
        (5, 128),
        (7, 128),
        (10, 256),
        (12, 256),
        (14, 256),
        (17, 8),
    ):
        scale = (2 / (9 * channels)) ** 0.5
        weights[f"features.{index}.weight"] = (
            torch.randn(out, channels, 3, 3, generator=generator) * scale
        )
        weights[f"features.{index}.bias"] = torch.randn(out, generator=generator) * 0.1
        channels = out
    torch.save(weights, path)
    return weights


# ----------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("generator", ["unet", "resnet"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_a_batch_are_the_mean_of_those_of_its_images(layout, generator):
    """With InstanceNorm; batch size 1 is the paper's, and two processes with one image each must
    equal one with two.
    """
    cfg = dataclasses.replace(TINY, norm="instance", generator=generator, blocks=1, dropout=0.0)
    state, batch = build(cfg, CPU), [x.double() for x in batch_of("pix2pix", TINY)]
    nets = nn.ModuleList((state.G, state.D)).double()
    state.opt_G.step = state.opt_D.step = lambda: None

    def gradients(part):
        train_step(state, tuple(x[part].to(memory_format=layout) for x in batch), cfg)
        return [p.grad.clone() for p in nets.parameters()]

    for whole, *parts in zip(*map(gradients, (slice(0, 2), slice(0, 1), slice(1, 2))), strict=True):
        assert torch.allclose(whole, sum(parts) / 2, rtol=1e-6, atol=1e-9)


@pytest.mark.cuda
def test_cuda_dropout_differs_from_replay_to_replay_and_follows_the_seed():
    device = torch.device("cuda")
    cfg = dataclasses.replace(TINY, lr=0.0)
    state, step, batch = (
        build(cfg, device),
        None,
        tuple(x.to(device) for x in batch_of("pix2pix", TINY)),
    )
    step = common.fast_step(train_step, cfg, device)
    seen = []
    for k in (0, 1, 2, 3, 4, 5, 4):
        common.seed_step(0, 0, k)
        seen.append(step(state, batch, cfg)["g_l1"].item())
    assert seen[4] != seen[5] and seen[4] == pytest.approx(seen[6], rel=1e-6)


@pytest.mark.cuda
def test_cuda_step_never_synchronises():
    device = torch.device("cuda")
    state, batch = build(TINY, device), tuple(x.to(device) for x in batch_of("pix2pix", TINY))
    train_step(state, batch, dataclasses.replace(TINY, precision="bf16"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, batch, dataclasses.replace(TINY, precision="bf16"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_cuda_rows_resident_and_prefetched_agree():
    array, index = (
        np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8),
        np.arange(10).reshape(5, 2),
    )
    resident = list(common.Loader(array, torch.device("cuda")).batches(index))
    prefetched = list(common.Loader(array, torch.device("cuda"), share=0.0).batches(index))
    assert all(
        torch.equal(torch.stack(a), torch.stack(b))
        for a, b in zip(resident, prefetched, strict=True)
    )


# --------------------------------------------------------------------------------------------- data


def coordinates(count, side):
    """Records whose first two channels say where a pixel was, and whose other four repeat them for
    the target.
    """
    y, x = np.mgrid[:side, :side].astype(np.uint8)
    record = np.stack([y, x, y * 0, y, x, y * 0])
    return torch.from_numpy(np.repeat(record[None], count, 0))


def test_jitter_is_the_same_for_input_and_target():
    rng = np.random.default_rng(0)
    plan = rng.integers(0, (9, 9, 2, 2), (32, 4)).tolist()
    out = pix2pix.jitter(coordinates(32, 72), plan, 64)
    assert torch.equal(out[:, :3], out[:, 3:])
    for image, (top, left, flip, upside_down) in zip(out, plan, strict=True):
        y, x = np.mgrid[top : top + 64, left : left + 64]
        y, x = (y[::-1] if upside_down else y), (x[:, ::-1] if flip else x)
        assert (image[0].numpy() == y).all() and (image[1].numpy() == x).all()


@pytest.fixture
def train(pairs, tmp_path):
    return Pairs(dataclasses.replace(TINY, data=str(pairs), cache=str(tmp_path)), "train", CPU)


def test_sides_and_direction(train):
    records = next(train.in_order(np.arange(2)))
    x, y = train.sides(records)
    assert x.shape == y.shape == (2, 3, 72, 72) and x.min() >= -1 and x.max() <= 1
    assert torch.allclose(x, -y, atol=0.05)  # BtoA: the input is B, the negative of A
    train.cfg = dataclasses.replace(train.cfg, direction="AtoB")
    assert torch.equal(train.sides(records)[0], y)


def test_batches_follow_from_seed_epoch_and_number(train):
    first = list(train.batches(3))
    again = list(train.batches(3))
    later = list(train.batches(3, first=1))
    other = list(train.batches(4))
    assert len(first) == len(train) // 2 == 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first[1:], later, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


def test_ranks_share_an_epoch_without_sharing_an_image(train, monkeypatch):
    whole = torch.cat([x for x, _ in train.batches(0)])
    seen = []
    for rank in (0, 1):
        as_rank(monkeypatch, rank)
        train.cfg = dataclasses.replace(train.cfg, batch_size=1)
        seen.append(torch.cat([x for x, _ in train.batches(0)]))
    assert torch.equal(torch.stack(seen, 1).flatten(0, 1), whole)


def test_crop_offsets_reach_both_ends(train, monkeypatch):
    honest, drawn = pix2pix.jitter, []
    monkeypatch.setattr(pix2pix, "jitter", lambda *args: (drawn.extend(args[1]), honest(*args))[1])
    for epoch in range(40):
        list(train.batches(epoch))
    top, left, flip, upside_down = zip(*drawn, strict=True)
    assert (
        set(top) == set(left) == set(range(9)) and set(flip) == {0, 1} and set(upside_down) == {0}
    )  # 72 - 64 = 8


def test_validation_is_not_augmented(pairs, tmp_path):
    val = Pairs(dataclasses.replace(TINY, data=str(pairs), cache=str(tmp_path)), "val", CPU)
    assert val.store.side == 64
    assert torch.equal(
        torch.cat(list(val.in_order(np.arange(3)))), torch.from_numpy(np.array(val.store.records))
    )


def test_label_maps_are_drawn_in_their_class_colours(landcover, tmp_path):
    cfg = dataclasses.replace(TINY, data=str(landcover), cache=str(tmp_path))
    data = Pairs(cfg, "train", CPU)
    x, y = next(data.batches(0))
    colors = {tuple(c) for c in to_bytes(x).permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    assert colors == {
        (0x84, 0x29, 0xF6),
        (0xE2, 0xA9, 0x29),
        (0x6E, 0xC1, 0xE4),
        (0x9B, 0x9B, 0x9B),
    }
    val = Pairs(cfg, "val", CPU)
    cfg = dataclasses.replace(cfg, direction="AtoB", lc_classes=val.store.classes.text)
    rows = pix2pix.evaluate(build(cfg, CPU), val, cfg, np.arange(2)).table()
    assert set(rows["model"]) >= {"psnr", "pixel_accuracy", "mean_iou"}


# ---------------------------------------------------------------------------------------- translate


def test_papers_policy_is_that_of_batch_size_1_unless_told():
    for size, policy, own in ((1, "auto", 1), (2, "auto", 0), (1, "running", 0), (2, "batch", 1)):
        cfg = dataclasses.replace(TINY, batch_size=size, eval_norm=policy)
        assert common.own_statistics(cfg) == bool(own)


def test_papers_policy_uses_each_images_own_statistics_and_dropout():
    state, (x, _) = build(TINY, CPU), [torch.cat([x, x[:1]]) for x in batch_of("pix2pix", TINY)]
    statistics = {k: v.clone() for k, v in state.G.state_dict().items()}
    torch.manual_seed(1)
    together = translate(state, x, PAPER)
    torch.manual_seed(1)
    assert torch.equal(translate(state, x[:1], PAPER), together[:1])
    assert not torch.equal(translate(state, x[:1], PAPER), together[:1])  # another noise
    assert all(torch.equal(v, statistics[k]) for k, v in state.G.state_dict().items())
    assert state.G.training and not together.requires_grad


def test_running_policy_is_deterministic():
    cfg = dataclasses.replace(TINY, eval_norm="running")
    state, (x, _) = build(cfg, CPU), [torch.cat([x, x[:1]]) for x in batch_of("pix2pix", TINY)]
    assert torch.equal(translate(state, x, cfg), translate(state, x, cfg))
    train_step(state, batch_of("pix2pix", TINY), cfg)
    assert any(
        m.num_batches_tracked == 1 for m in state.G.modules() if isinstance(m, nn.BatchNorm2d)
    )


# ----------------------------------------------------------------------------------------- the rate


def test_linear_schedule_is_constant_for_half_then_falls_to_zero():
    cfg, state = dataclasses.replace(TINY, epochs=200, lr=1.0), State(nn.Identity())
    rates = [pix2pix.learning_rate(state, cfg, epoch) for epoch in range(200)]
    assert rates[:100] == [1.0] * 100
    assert rates[100] == pytest.approx(100 / 101) and rates[199] == pytest.approx(1 / 101)
    assert pix2pix.learning_rate(state, dataclasses.replace(cfg, schedule="constant"), 199) == 1.0


def rates(losses):
    """The share of --lr that --schedule plateau leaves after each of these epochs."""
    cfg, state = dataclasses.replace(TINY, schedule="plateau", lr=1.0), State(nn.Identity())
    left = []
    for epoch, loss in enumerate(losses):
        left.append(pix2pix.learning_rate(state, cfg, epoch))
        pix2pix.follow_plateau(state, loss)
    return left


def test_plateau_halves_after_twenty_stalled_epochs_and_stops_at_a_hundredth():
    left = rates([10.0 - k for k in range(9)] + [1.0] * 400)
    assert left[:29] == [1.0] * 29 and left[30] == 0.5 and left[50] == 0.25
    assert min(left) == left[-1] == 0.01


def test_plateau_survives_what_other_schedules_died_of():
    """Nine hundred epochs: the content loss falls slowly, with noise, while adversarial losses
    collapse and the validation error is best at epoch 150. The rate follows the content loss.
    """
    epochs, rng = np.arange(900), np.random.default_rng(0)
    content = 0.3 * np.exp(-epochs / 900) * (1 + 0.002 * rng.normal(size=900))
    adversarial = np.minimum(0.7 + epochs / 30, 8.0)
    validation = 20 + np.abs(epochs - 150) / 100
    assert rates(content)[300] == 1.0 and rates(content)[-1] >= 0.25
    for dying in (adversarial, validation):
        assert rates(dying)[300] < 0.05  # so it must not follow these, and never dies of them
        assert rates(dying)[-1] == 0.01


def test_the_last_epochs_decay():
    cfg, state = dataclasses.replace(TINY, epochs=10, epochs_decay=2, lr=1.0), State(nn.Identity())
    left = [pix2pix.learning_rate(state, cfg, epoch) for epoch in range(10)]
    assert left[:8] == [1.0] * 8 and left[8:] == pytest.approx([2 / 3, 1 / 3])
    cfg = dataclasses.replace(cfg, epochs_decay=0)
    assert pix2pix.learning_rate(state, cfg, 9) == 1.0


@pytest.mark.parametrize("flip", ["none", "horizontal", "both", "auto"])
def test_flip(train, monkeypatch, flip):
    honest, drawn = pix2pix.jitter, []
    monkeypatch.setattr(pix2pix, "jitter", lambda *args: (drawn.extend(args[1]), honest(*args))[1])
    train.cfg = dataclasses.replace(train.cfg, flip=flip)
    for epoch in range(10):
        list(train.batches(epoch))
    seen = {tuple(crop[2:]) for crop in drawn}
    both = {(a, b) for a in (0, 1) for b in (0, 1)}
    left_right = {(0, 0), (1, 0)}
    expected = {"none": {(0, 0)}, "horizontal": left_right, "both": both, "auto": left_right}
    assert seen == expected[flip]


def test_load_size_and_max_images(pairs, tmp_path):
    cfg = dataclasses.replace(
        TINY, data=str(pairs), cache=str(tmp_path), load_size=80, max_images=4
    )
    data = Pairs(cfg, "train", CPU)
    assert data.store.side == 80 and len(data) == 4
    assert [path.stem for path in data.store.split.A] == ["0", "1", "3", "4"]  # of six
    assert next(data.batches(0))[0].shape[-1] == 64
    with pytest.raises(common.UserError, match="--load-size 63: must be --size 64"):
        Pairs(dataclasses.replace(cfg, load_size=63), "train", CPU)


def test_judge_scores_photographs_of_label_maps(landcover, tmp_path):
    """A judge that sees the input's classes in the model's fakes alone."""
    val = Pairs(dataclasses.replace(TINY, data=str(landcover), cache=str(tmp_path)), "val", CPU)
    cfg = dataclasses.replace(val.cfg, lc_classes=val.store.classes.text)
    records = next(val.in_order(np.arange(2)))
    truth, calls = torch.where(records[:, 3] < 255, records[:, 3], 0), []

    class Judge:
        def classes_of(self, image):
            calls.append(image)
            return truth if len(calls) == 1 else (truth + 1) % 3

    rows = pix2pix.evaluate(build(cfg, CPU), val, cfg, np.arange(2), judge=Judge()).table()
    assert rows["model"]["judge_pixel_accuracy"] == rows["model"]["judge_mean_iou"] == 1
    names = ("pixel_accuracy", "class_accuracy", "mean_iou")
    assert rows["real photograph"] == {f"judge_{name}": 0 for name in names}
    assert torch.equal(calls[2], calls[1].roll(1, 0))
