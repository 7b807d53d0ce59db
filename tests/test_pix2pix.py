"""pix2pix: networks, losses, the step, sampling."""

import contextlib
import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import pix2pix
from conftest import parameters
from pix2pix import Config, Discriminator, Pairs, ResNetGenerator, State, UNetGenerator, build, train_step, translate

CPU = torch.device("cpu")
TINY = Config(size=64, width=4, batch_size=2, precision="fp32")


def random_batch(seed=0, size=64, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(batch, 3, size, size, generator=generator, dtype=dtype) * 2 - 1 for _ in range(2))


# ----------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(("size", "count"), [(64, 29_244_035), (128, 41_828_995), (256, 54_413_955), (512, 66_998_915)])
def test_unet_parameters(size, count):
    assert parameters(UNetGenerator(size, 64, "batch", 0.5)) == count


@pytest.mark.parametrize(("field", "count"), [(1, 9_024), (16, 139_585), (70, 2_768_705), (286, 11_159_361)])
def test_discriminator_parameters(field, count):
    assert parameters(Discriminator(64, "batch", field)) == count


def test_resnet_parameters():
    assert parameters(ResNetGenerator(3, 3, 64, 9, "instance")) == 11_378_179


@pytest.mark.parametrize("field", [1, 16, 70, 286])
def test_receptive_field(field):
    """From the layers, last to first: one logit sees kernel + (seen - 1) * stride pixels of the layer before."""
    seen = 1
    for layer in reversed([m for m in Discriminator(4, "batch", field).modules() if isinstance(m, nn.Conv2d)]):
        seen = layer.kernel_size[0] + (seen - 1) * layer.stride[0]
    assert seen == field


def test_patch_logits_are_30x30_at_256():
    x = torch.zeros(1, 3, 256, 256)
    assert Discriminator(4, "batch", 70)(x, x).shape == (1, 1, 30, 30)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("generator", ["unet", "resnet"])
@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_output_shape_and_range(size, generator, norm):
    state = build(dataclasses.replace(TINY, size=size, generator=generator, norm=norm, width=2), CPU, training=False)
    with torch.no_grad():
        fake = state.G(torch.randn(1, 3, size, size))
    assert fake.shape == (1, 3, size, size)
    assert fake.abs().max() <= 1


def test_unet_layers_are_registered_as_data_flows_and_only_the_last_has_a_bias():
    G = UNetGenerator(64, 4, "batch", 0.5)
    convolutions = [m for m in G.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert [m.out_channels for m in convolutions] == [4, 8, 16, 32, 32, 32, 32, 32, 16, 8, 4, 3]
    assert [m.bias is not None for m in convolutions] == [False] * 11 + [True]
    assert all(m.bias is not None for m in UNetGenerator(64, 4, "instance", 0.5).modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(("size", "count"), [(64, 1), (128, 2), (256, 3), (512, 4)])
def test_unet_dropout_layers(size, count):
    assert sum(isinstance(m, nn.Dropout) for m in UNetGenerator(size, 2, "batch", 0.5).modules()) == count


def test_initial_weights():
    state = build(dataclasses.replace(TINY, width=32), CPU)
    for net in (state.G, state.D):
        weights = torch.cat(
            [m.weight.flatten() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        )
        scales = torch.cat([m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
        assert abs(weights.mean()) < 1e-3 and abs(weights.std() - 0.02) < 1e-3
        assert abs(scales.mean() - 1) < 5e-3 and abs(scales.std() - 0.02) < 5e-3
        assert all((m.bias == 0).all() for m in net.modules() if getattr(m, "bias", None) is not None)


def test_patch_gan_286_refuses_what_it_cannot_see():
    with pytest.raises(common.UserError, match="--patch-gan 286"):
        build(dataclasses.replace(TINY, patch_gan=286), CPU)
    build(dataclasses.replace(TINY, patch_gan=286, size=128), CPU)


# ------------------------------------------------------------------------------------------------------------- losses


def test_bce_loss_by_hand():
    logits = torch.tensor([0.0, 2.0])
    assert pix2pix.gan_loss(logits, True, "bce").item() == pytest.approx((math.log(2) + math.log(1 + math.exp(-2))) / 2)
    assert pix2pix.gan_loss(logits, False, "bce").item() == pytest.approx((math.log(2) + math.log(1 + math.exp(2))) / 2)


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
    assert pix2pix.l1_loss(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 1.0])).item() == pytest.approx(1.25)


def vgg_file(path):
    """A VGG16 file as torchvision lays it out, with random weights."""
    generator, weights, channels = torch.Generator().manual_seed(3), {}, 3
    for index, out in ((0, 64), (2, 64), (5, 128), (7, 128), (10, 256), (12, 256), (14, 256), (17, 8)):
        scale = (2 / (9 * channels)) ** 0.5
        weights[f"features.{index}.weight"] = torch.randn(out, channels, 3, 3, generator=generator) * scale
        weights[f"features.{index}.bias"] = torch.randn(out, generator=generator) * 0.1
        channels = out
    torch.save(weights, path)
    return weights


def test_vgg_loss_by_hand(tmp_path):
    weights = vgg_file(tmp_path / "vgg.pth")
    features = pix2pix.VGG16Features(str(tmp_path / "vgg.pth"))

    def by_hand(x):
        x = ((x + 1) / 2 - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor(
            [0.229, 0.224, 0.225]
        ).view(1, 3, 1, 1)
        for index in (0, 2, 5, 7, 10, 12, 14):
            x = F.max_pool2d(x, 2) if index in (5, 10) else x
            x = F.relu(F.conv2d(x, weights[f"features.{index}.weight"], weights[f"features.{index}.bias"], padding=1))
        return x

    fake, target = random_batch()
    want = (by_hand(fake) - by_hand(target)).square().mean()
    assert pix2pix.vgg_loss(features, fake, target).item() == pytest.approx(want.item(), rel=1e-4)
    assert pix2pix.vgg_loss(features, fake, fake).item() == 0
    assert not any(p.requires_grad for p in features.parameters())


@pytest.mark.parametrize(("given", "result"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_losses_are_in_at_least_float32(given, result):
    x = torch.zeros(2, 3, 8, 8, dtype=given)
    assert pix2pix.gan_loss(x, True, "bce").dtype == pix2pix.l1_loss(x, x).dtype == result


def test_totals_weigh_their_terms():
    cfg = dataclasses.replace(TINY, lambda_l1=7.0, d_weight=1.0)
    losses = train_step(build(cfg, CPU), random_batch(), cfg)
    assert list(losses) == ["g_total", "g_adv", "g_l1", "d_total", "d_real", "d_fake"]
    assert losses["g_total"].item() == pytest.approx(losses["g_adv"].item() + 7 * losses["g_l1"].item(), rel=1e-5)
    assert losses["d_total"].item() == pytest.approx(losses["d_real"].item() + losses["d_fake"].item(), rel=1e-5)


def test_vgg_content_replaces_l1(tmp_path):
    vgg_file(tmp_path / "vgg.pth")
    cfg = dataclasses.replace(TINY, content="vgg", vgg16=str(tmp_path / "vgg.pth"), lambda_l1=3.0, dropout=0.0)
    state, batch = build(cfg, CPU), random_batch()
    content = state.content(state.G(batch[0]), batch[1]).item()
    losses = train_step(state, batch, cfg)
    assert losses["g_total"].item() == pytest.approx(losses["g_adv"].item() + 3 * content, rel=1e-3)
    assert "content" not in common.state_dict(state)


# ----------------------------------------------------------------------------------------------------------- the step


class Frozen(torch.optim.SGD):
    """An optimizer whose step records the gradients that it finds and changes nothing."""

    def __init__(self, module, watched):
        super().__init__(module.parameters(), lr=0.0)
        self.module, self.watched, self.seen = module, watched, None

    def step(self):
        self.seen = {
            name: [None if p.grad is None else p.grad.clone() for p in net.parameters()]
            for name, net in self.watched.items()
        }


def test_each_step_leaves_the_other_networks_gradients_untouched():
    state = build(TINY, CPU)
    nets = {"G": state.G, "D": state.D}
    state.opt_D, state.opt_G = Frozen(state.D, nets), Frozen(state.G, nets)
    train_step(state, random_batch(), TINY)
    assert all(grad is None for grad in state.opt_D.seen["G"])
    assert all(grad is not None and grad.abs().sum() > 0 for grad in state.opt_D.seen["D"][-1:])
    before, after = state.opt_D.seen["D"], state.opt_G.seen["D"]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(grad is not None for grad in state.opt_G.seen["G"])


def test_discriminator_gradient_is_that_of_its_own_loss_alone():
    """Zeroed before, not after: two steps in a row do not add up."""
    state = build(dataclasses.replace(TINY, dropout=0.0), CPU)
    nets = {"D": state.D}
    state.opt_D, state.opt_G = Frozen(state.D, nets), Frozen(state.G, nets)
    train_step(state, random_batch(), TINY)
    first = [grad.clone() for grad in state.opt_D.seen["D"]]
    train_step(state, random_batch(), TINY)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, state.opt_D.seen["D"], strict=True))


@pytest.mark.parametrize("generator", ["unet", "resnet"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_a_batch_are_the_mean_of_those_of_its_images(layout, generator):
    """With InstanceNorm; batch size 1 is the paper's, and two processes with one image each must equal one with two."""
    cfg = dataclasses.replace(TINY, norm="instance", generator=generator, blocks=1, dropout=0.0)
    state, batch = build(cfg, CPU), random_batch(dtype=torch.float64)
    nets = nn.ModuleList((state.G, state.D)).double()
    state.opt_G.step = state.opt_D.step = lambda: None

    def gradients(part):
        train_step(state, tuple(x[part].to(memory_format=layout) for x in batch), cfg)
        return [p.grad.clone() for p in nets.parameters()]

    for whole, *parts in zip(*map(gradients, (slice(0, 2), slice(0, 1), slice(1, 2))), strict=True):
        assert torch.allclose(whole, sum(parts) / 2, rtol=1e-6, atol=1e-9)


def test_step_changes_both_networks():
    state = build(TINY, CPU)
    before = copy.deepcopy((state.G, state.D))
    train_step(state, random_batch(), TINY)
    for old, net in zip(before, (state.G, state.D), strict=True):
        assert all(not torch.equal(a, b) for a, b in zip(old.parameters(), net.parameters(), strict=True))


def test_step_reads_no_value_on_the_host(monkeypatch):
    """On the meta device tensors have no values: .item() or a branch on one would raise."""
    monkeypatch.setattr(common, "autocast", lambda cfg, device: contextlib.nullcontext())  # there is none for meta
    meta = torch.device("meta")
    for cfg in (TINY, dataclasses.replace(TINY, gan="lsgan", generator="resnet", norm="instance", blocks=1)):
        state = build(cfg, CPU)
        state.G.to(meta), state.D.to(meta)
        state.opt_G, state.opt_D = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (state.G, state.D))
        losses = train_step(state, tuple(x.to(meta) for x in random_batch()), cfg)
        assert all(loss.shape == () for loss in losses.values())


@pytest.mark.cuda
def test_cuda_graph_trains_like_the_plain_path():
    device = torch.device("cuda")
    cfg = dataclasses.replace(TINY, dropout=0.0, width=16)
    plain, graphed = build(cfg, device), build(cfg, device)
    for net in ("G", "D"):
        getattr(graphed, net).load_state_dict(getattr(plain, net).state_dict())
    step = common.fast_step(train_step, cfg, device)
    assert isinstance(step, common.GraphedStep)
    for k in range(20):
        batch = tuple(x.to(device) for x in random_batch(k))
        if k == 10:
            for state in (plain, graphed):
                common.set_lr((state.opt_G, state.opt_D), 1e-4)
        want = {name: value.item() for name, value in train_step(plain, batch, cfg).items()}
        got = {name: value.item() for name, value in step(graphed, batch, cfg).items()}
        for name, loss in want.items():
            assert got[name] == pytest.approx(loss, rel=5e-3, abs=5e-4), (k, name)
    assert step.graph is not None


@pytest.mark.cuda
def test_cuda_dropout_differs_from_replay_to_replay_and_follows_the_seed():
    device = torch.device("cuda")
    cfg = dataclasses.replace(TINY, lr=0.0)
    state, step, batch = build(cfg, device), None, tuple(x.to(device) for x in random_batch())
    step = common.fast_step(train_step, cfg, device)
    seen = []
    for k in (0, 1, 2, 3, 4, 5, 4):
        common.seed_step(0, 0, k)
        seen.append(step(state, batch, cfg)["g_l1"].item())
    assert seen[4] != seen[5] and seen[4] == pytest.approx(seen[6], rel=1e-6)


@pytest.mark.cuda
def test_cuda_step_never_synchronises():
    device = torch.device("cuda")
    state, batch = build(TINY, device), tuple(x.to(device) for x in random_batch())
    train_step(state, batch, dataclasses.replace(TINY, precision="bf16"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, batch, dataclasses.replace(TINY, precision="bf16"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_cuda_rows_resident_and_prefetched_agree():
    array, index = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8), np.arange(10).reshape(5, 2)
    resident = list(common.Rows(array, torch.device("cuda")).batches(index))
    prefetched = list(common.Rows(array, torch.device("cuda"), share=0.0).batches(index))
    assert all(torch.equal(torch.stack(a), torch.stack(b)) for a, b in zip(resident, prefetched, strict=True))


# --------------------------------------------------------------------------------------------------------------- data


def coordinates(count, side):
    """Records whose first two channels say where a pixel was, and whose other four repeat them for the target."""
    y, x = np.mgrid[:side, :side].astype(np.uint8)
    record = np.stack([y, x, y * 0, y, x, y * 0])
    return torch.from_numpy(np.repeat(record[None], count, 0))


def test_jitter_is_the_same_for_input_and_target():
    rng = np.random.default_rng(0)
    plan = rng.integers(0, (9, 9, 2), (32, 3)).tolist()
    out = pix2pix.jitter(coordinates(32, 72), plan, 64)
    assert torch.equal(out[:, :3], out[:, 3:])
    for image, (top, left, flip) in zip(out, plan, strict=True):
        y, x = np.mgrid[top : top + 64, left : left + 64]
        x = x[:, ::-1] if flip else x
        assert (image[0].numpy() == y).all() and (image[1].numpy() == x).all()


@pytest.fixture
def train(pairs, tmp_path):
    return Pairs(dataclasses.replace(TINY, data=str(pairs), cache=str(tmp_path)), "train", CPU)


def test_sides_and_direction(train):
    records = next(train.in_order(2))
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
    assert len(first) == train.steps == 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first[1:], later, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


def test_ranks_share_an_epoch_without_sharing_an_image(train, monkeypatch):
    whole = torch.cat([x for x, _ in train.batches(0)])
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(common, "rank_and_world", lambda rank=rank: (rank, 2))
        train.cfg = dataclasses.replace(train.cfg, batch_size=1)
        seen.append(torch.cat([x for x, _ in train.batches(0)]))
    assert torch.equal(torch.stack(seen, 1).flatten(0, 1), whole)


def test_crop_offsets_reach_both_ends(train, monkeypatch):
    honest, drawn = pix2pix.jitter, []
    monkeypatch.setattr(pix2pix, "jitter", lambda *args: (drawn.extend(args[1]), honest(*args))[1])
    for epoch in range(40):
        list(train.batches(epoch))
    top, left, flip = zip(*drawn, strict=True)
    assert set(top) == set(left) == set(range(9)) and set(flip) == {0, 1}  # 72 - 64 = 8


def test_validation_is_not_augmented(pairs, tmp_path):
    val = Pairs(dataclasses.replace(TINY, data=str(pairs), cache=str(tmp_path)), "val", CPU)
    assert val.store.side == 64
    assert torch.equal(torch.cat(list(val.in_order(3, 2))), torch.from_numpy(np.array(val.store.records)))


def test_label_maps_are_drawn_in_their_class_colours(landcover, tmp_path):
    cfg = dataclasses.replace(TINY, data=str(landcover), cache=str(tmp_path))
    data = Pairs(cfg, "train", CPU)
    x, y = next(data.batches(0))
    colors = {tuple(c) for c in common.to_bytes(x).permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    assert colors == {(0x84, 0x29, 0xF6), (0xE2, 0xA9, 0x29), (0x6E, 0xC1, 0xE4), (0x9B, 0x9B, 0x9B)}
    val = Pairs(cfg, "val", CPU)
    rows = pix2pix.evaluate(build(cfg, CPU), val, dataclasses.replace(cfg, direction="AtoB"), 2)
    assert set(rows["model"]) >= {"psnr", "pixel_accuracy", "mean_iou"}


# ---------------------------------------------------------------------------------------------------------- translate


def test_papers_policy_uses_each_images_own_statistics_and_dropout():
    state, (x, _) = build(TINY, CPU), random_batch(batch=3)
    statistics = {k: v.clone() for k, v in state.G.state_dict().items()}
    torch.manual_seed(1)
    together = translate(state, x, TINY)
    torch.manual_seed(1)
    assert torch.equal(translate(state, x[:1], TINY), together[:1])
    assert not torch.equal(translate(state, x[:1], TINY), together[:1])  # another noise
    assert all(torch.equal(v, statistics[k]) for k, v in state.G.state_dict().items())
    assert state.G.training and not together.requires_grad


def test_running_policy_is_deterministic():
    cfg = dataclasses.replace(TINY, eval_norm="running")
    state, (x, _) = build(cfg, CPU), random_batch(batch=3)
    assert torch.equal(translate(state, x, cfg), translate(state, x, cfg))
    train_step(state, random_batch(), cfg)
    assert any(m.num_batches_tracked == 1 for m in state.G.modules() if isinstance(m, nn.BatchNorm2d))


# ----------------------------------------------------------------------------------------------------------- the rate


def test_linear_schedule_is_constant_for_half_then_falls_to_zero():
    cfg, state = dataclasses.replace(TINY, epochs=200, lr=1.0), State(nn.Identity())
    rates = [pix2pix.learning_rate(state, cfg, epoch) for epoch in range(200)]
    assert rates[:100] == [1.0] * 100
    assert rates[100] == pytest.approx(100 / 101) and rates[199] == pytest.approx(1 / 101)
    assert pix2pix.learning_rate(state, dataclasses.replace(cfg, schedule="constant"), 199) == 1.0


def test_plateau_follows_the_validation_error():
    cfg, state = dataclasses.replace(TINY, schedule="plateau", lr=1.0), State(nn.Identity())
    for k in range(12):
        pix2pix.follow_plateau(state, 10.0 - k)
    assert pix2pix.learning_rate(state, cfg, 12) == 1.0
    for _ in range(10):
        pix2pix.follow_plateau(state, 5.0)
    assert pix2pix.learning_rate(state, cfg, 22) == 0.5
