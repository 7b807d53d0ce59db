"""mixlc: samples and paste geometry, networks, losses, the step, edits, the command line."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common
import mixlc
from conftest import (
    CPU,
    TABLE,
    as_rank,
    batch_of,
    land_cover,
    line_of,
    parameters,
    picture,
    save,
    side_by_side,
    state_of,
)
from mixlc import (
    Config,
    Discriminator,
    Edits,
    Generator,
    build,
    edit_mask,
    main,
    train_step,
    translate,
)
from support.classes import ClassTable
from support.demo import demo_world
from support.generate import _stroke
from support.pictures import to_bytes
from support.plots import read_metrics

TINY = Config(size=64, width=4, batch_size=2, precision="fp32", lc_classes=json.dumps(TABLE))
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


@pytest.fixture
def data(tmp_path):
    return land_cover(tmp_path / "data", train=5, val=3)


def edits(root, cache, split="train", **changes):
    return Edits(
        dataclasses.replace(TINY, data=str(root), cache=str(cache), lc_classes="", **changes),
        split,
        CPU,
    )


# ------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("box", ["center", "random"])
def test_paste_geometry_pixel_by_pixel(data, tmp_path, box):
    train = edits(data, tmp_path, box=box)
    partner, boxes = train.choose(np.random.default_rng(0), np.arange(5))
    flips, records = np.zeros((1, 5, 4), np.int64), train.store.records
    edit = next(train.pasted(np.arange(5)[None], partner[None], boxes[None], flips))
    for k in range(5):
        row_a, row_b = k, partner[k]
        top, left, height, width = boxes[k]
        want = np.array(records[row_a])
        part = slice(top, top + height), slice(left, left + width)
        want[:, *part] = records[row_b][:, *part]
        for name, record in (("ab", want), ("a", records[row_a]), ("b", records[row_b])):
            rgb, lc = getattr(edit, f"rgb_{name}")[k], getattr(edit, f"lc_{name}")[k]
            assert (to_bytes(rgb).numpy() == record[:3]).all()
            assert (common.class_index(lc[None])[0].numpy() == record[3]).all()
        assert edit.box[k].tolist() == boxes[k].tolist()
    assert edit.inside.all()


def test_the_center_box_is_96_of_256(data, tmp_path):
    train = edits(data, tmp_path)
    train.cfg = dataclasses.replace(train.cfg, size=256)
    boxes = train.choose(np.random.default_rng(0), np.arange(5))[1]
    assert (boxes == [80, 80, 96, 96]).all()


def test_random_boxes_reach_every_side_and_both_edges(data, tmp_path):
    train = edits(data, tmp_path, box="random")
    boxes = np.concatenate(
        [train.choose(np.random.default_rng(k), np.arange(5))[1] for k in range(600)]
    )
    assert set(boxes[:, 2]) == set(range(8, 33)) and (boxes[:, 2] == boxes[:, 3]).all()
    ends = boxes[:, :2] + boxes[:, 2:]
    assert boxes.min() == 0 and ends.max() == 64


def test_b_is_never_a_and_may_be_any_other(data, tmp_path):
    train = edits(data, tmp_path)
    partners = [train.choose(np.random.default_rng(k), np.arange(5))[0] for k in range(100)]
    pairs = {(a, b) for partner in partners for a, b in enumerate(partner.tolist())}
    assert pairs == {(a, b) for a in range(5) for b in range(5) if a != b}


def test_flips_are_joint_for_photograph_and_land_cover_and_separate_for_a_and_b():
    y, x = np.mgrid[:8, :8].astype(np.uint8)
    images = torch.from_numpy(np.stack([y, x, y, x])[None].repeat(4, 0))
    flips = [[0, 0], [1, 0], [0, 1], [1, 1]]
    out = mixlc.mirror(images, flips).numpy()
    for image, (flip, upside_down) in zip(out, flips, strict=True):
        want = images[0].numpy()[:, :: -1 if upside_down else 1, :: -1 if flip else 1]
        assert (image == want).all() and (image[0] == image[2]).all()


def test_all_flips_are_drawn(data, tmp_path, monkeypatch):
    """Of a and of b, each on its own; the first two of a record's four are a's."""
    honest, drawn = mixlc.mirror, []
    monkeypatch.setattr(mixlc, "mirror", lambda *args: (drawn.append(args[1]), honest(*args))[1])
    train = edits(data, tmp_path)
    for epoch in range(40):
        list(train.batches(epoch))
    pairs = zip(drawn[::2], drawn[1::2], strict=True)
    both = {(*a, *b) for of_a, of_b in pairs for a, b in zip(of_a, of_b, strict=True)}
    assert both == {tuple(map(int, f"{k:04b}")) for k in range(16)}


def test_real_is_never_a_collage(data, tmp_path):
    """Every "real" is one of the files, mirrored or not; rgb_ab is none of them."""
    train = edits(data, tmp_path)
    whole = np.array(train.store.records[:, :3])
    known = {image[:, ::v, ::h].tobytes() for image in whole for v in (1, -1) for h in (1, -1)}
    for edit in train.batches(0):
        for image, collage in zip(edit.rgb_b, edit.rgb_ab, strict=True):
            assert to_bytes(image).contiguous().numpy().tobytes() in known
            assert to_bytes(collage).contiguous().numpy().tobytes() not in known


def test_use_ba_adds_the_complement(data, tmp_path):
    train = edits(data, tmp_path, use_ba=True)
    edit = next(train.batches(0))
    assert len(edit.rgb_a) == 4 and edit.inside.tolist() == [True, True, False, False]
    outside = ~edit_mask(edit.box, edit.inside, 64)  # what is no edit is the input's
    for kind in ("rgb", "lc"):
        a, b, ab = (getattr(edit, f"{kind}_{name}") for name in ("a", "b", "ab"))
        assert torch.equal(a[2:], b[:2]) and torch.equal(b[2:], a[:2])
        assert torch.equal(ab[:2], ab[2:]) and len(ab) == 4
        assert torch.equal(a.masked_select(outside), ab.masked_select(outside))
    val = edits(data, tmp_path, "val", use_ba=True)
    assert all(edit.inside.all() for edit in val.in_order(np.arange(3)))


def test_erase_blanks_the_edit_and_nothing_else():
    batch = mixlc.Edit(*batch_of("mixlc", TINY))
    mask = edit_mask(batch.box, batch.inside, 64)
    blank = mixlc.visible(batch, TINY)
    assert mixlc.visible(batch, dataclasses.replace(TINY, erase=False)) is batch.rgb_a
    assert (blank.masked_select(mask) == 0).all()
    assert torch.equal(blank.masked_select(~mask), batch.rgb_a.masked_select(~mask))


def test_what_the_generator_sees_of_an_erased_edit(monkeypatch):
    """In training and in evaluation, where the copy of rgb_a stays whole."""
    cfg = TINY
    state, seen, batch = build(cfg, CPU), [], mixlc.Edit(*batch_of("mixlc", cfg))
    state.G.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    mask = edit_mask(batch.box, batch.inside, 64)
    train_step(state, batch, cfg)
    val = types.SimpleNamespace(in_order=lambda images: [batch], classes=cfg.classes)
    rows = mixlc.evaluate(state, val, cfg, np.arange(2)).table()
    columns = mixlc.sample(state, val, cfg, np.arange(2))
    assert len(seen) == 3 and (columns["input"].masked_select(mask) == 0).all()
    for image in seen:
        assert torch.equal(image, mixlc.visible(batch, cfg))
    assert rows["copy of rgb_a"]["l1_to_input"] == 0


def test_ignored_pixels_have_no_class(data, tmp_path):
    _, lc_ab, *_ = next(edits(data, tmp_path).batches(0))
    assert set(lc_ab.sum(1).unique().tolist()) == {0.0, 1.0}


def test_batches_follow_from_seed_epoch_and_number(data, tmp_path):
    train = edits(data, tmp_path, box="random")
    first, later, other = (
        list(train.batches(2)),
        list(train.batches(2, first=1)),
        list(train.batches(3)),
    )
    assert len(first) == len(train) // 2 == 2
    assert all(torch.equal(x, y) for x, y in zip(first[1], later[0], strict=True))
    assert not torch.equal(first[0][0], other[0][0])


def test_validation_edits_are_always_the_same(data, tmp_path):
    one, other = (edits(data, tmp_path, "val", seed=seed, box="random") for seed in (0, 5))
    some, all_of_them = (next(x.in_order(np.arange(n))) for x, n in ((one, 2), (other, 3)))
    assert all(torch.equal(x, y[:2]) for x, y in zip(some, all_of_them, strict=True))


def test_ranks_never_share_a_tile(data, tmp_path, monkeypatch):
    train, seen = edits(data, tmp_path, batch_size=1), []
    for rank in (0, 1):
        as_rank(monkeypatch, rank)
        seen.append(torch.cat([batch[0] for batch in train.batches(0)]))
    assert len({image.numpy().tobytes() for image in torch.cat(seen)}) == 4


# ----------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("fusion", ["late", "early", "dilated"])
def test_parameters(fusion):
    """Two U-Nets of 54.3 million parameters and the output network are about 109 million; the
    others have one U-Net.
    """
    unet = 64 + 512  # biases of the first layer and of the bottleneck
    widths = [64, 128, 256, 512, 512, 512, 512, 512]
    unet += sum(16 * i * o for i, o in zip([3, *widths[:-1]], widths, strict=True)) + 2 * sum(
        widths[1:-1]
    )
    ups = [(512, 512), (1024, 512), (1024, 512), (1024, 512), (1024, 256), (512, 128), (256, 64)]
    unet += sum(16 * i * o + 2 * o for i, o in ups)
    assert parameters(mixlc.UNet, 3, 256, 64) == unet
    output = 64 + 16 * 64 * 3 + 3
    want = {
        "late": 2 * unet + 16 * 11 * 64 + 9 * 256 * 64 + output,
        "early": unet + 16 * 14 * 64 + 9 * 128 * 64 + output,
        "dilated": unet
        + 16 * 14 * 128
        + 128
        + 5 * (9 * 128 * 128 + 2 * 128)
        + 9 * 256 * 64
        + output,
    }[fusion]
    assert parameters(Generator, 14, 256, 64, fusion, "both") == want
    assert fusion != "late" or 108e6 < want < 110e6


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_the_dilated_net_sees_the_whole_centre_box(size):
    """One place in the middle is moved by the farthest pixels of the box, 3/8 of the side."""
    net = mixlc.DilatedNet(1, size, 2).eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.1)
    image = torch.zeros(1, 1, size, size, requires_grad=True)
    net(image + 1)[0, 0, size // 4, size // 4].backward()
    seen = image.grad[0, 0].nonzero()
    top, bottom = seen.min().item(), seen.max().item()
    assert top <= size * 5 // 16 and bottom >= size * 11 // 16 - 1


@pytest.mark.parametrize("fusion", ["late", "early", "middle", "dilated"])
@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_generator_shapes(size, fusion):
    G = Generator(3, size, 2, fusion, "lc").eval()
    with torch.no_grad():
        fake = G(torch.zeros(1, 3, size, size), torch.zeros(1, 3, size, size))
    assert fake.shape == (1, 3, size, size) and fake.abs().max() <= 1


@pytest.mark.parametrize("local_d", [False, True])
@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_discriminator_shapes(size, local_d):
    D = Discriminator(size, 2, local_d)
    assert D.global_trunk[:-3](torch.zeros(1, 3, size, size)).shape[2:] == (4, 4)
    box = torch.tensor([[0, size // 2, 8, 8]] * 2)
    assert D(torch.randn(2, 3, size, size), box).shape == (2, 1)


def test_discriminator_has_six_blocks_at_256():
    convolutions = [m for m in Discriminator(256, 64, False).modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64, 128, 256, 512, 512, 512]
    assert {m.kernel_size for m in convolutions} == {(5, 5)}


def test_window_lies_around_the_box_and_within_the_image():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    images = torch.stack([y, x]).expand(3, 2, 64, 64)
    box = torch.tensor([[20, 20, 24, 24], [0, 0, 8, 8], [50, 56, 14, 8]])
    window = mixlc.crop_around(images, box, 32)
    assert window.shape == (3, 2, 32, 32)
    assert window[:, :, 0, 0].tolist() == [[16, 16], [0, 0], [32, 32]]
    assert window[0, 1, 0].tolist() == list(range(16, 48))


def test_local_discriminator_sees_the_window_only():
    D, image = Discriminator(64, 2, True).eval(), torch.randn(1, 3, 64, 64)
    box, seen = torch.tensor([[0, 0, 16, 16]]), []
    D.local_trunk.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    D(image, box)
    other = image.clone()
    other[:, :, 32:] = 0
    D(other, box)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], image[:, :, :32, :32])


# ------------------------------------------------------------------------------------------- losses


def test_gan_loss_by_hand():
    logits = torch.tensor([0.0, 2.0])
    assert mixlc.gan_loss(logits, True).item() == pytest.approx(
        (math.log(2) + math.log(1 + math.exp(-2))) / 2
    )
    assert mixlc.gan_loss(logits, False).item() == pytest.approx(
        (math.log(2) + math.log(1 + math.exp(2))) / 2
    )


def test_edit_mask():
    mask = edit_mask(torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]), torch.tensor([True, False]), 8)
    want = torch.zeros(8, 8, dtype=torch.bool)
    want[1:4, 2:6] = True
    assert torch.equal(mask[0, 0], want) and torch.equal(mask[1, 0], ~want)


def test_local_loss_by_hand_with_its_border_at_the_images_edge():
    """A box in the corner of a 64 pixel image: the window has a border of 3 on two sides, and none
    beyond the image.
    """
    mask = edit_mask(torch.tensor([[0, 0, 8, 10]]), torch.tensor([True]), 64)
    fake, target = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    target[..., :11, :13] = 0.5  # just the window
    assert mixlc.local_l1_loss(fake, target, mask).item() == pytest.approx(0.5)
    target[..., 11:, :] = 9.0  # outside it: no effect
    target[..., 10, 12] = 0.5 + 11 * 13  # its last pixel
    assert mixlc.local_l1_loss(fake, target, mask).item() == pytest.approx(1.5)


def test_border_is_12_pixels_at_256():
    mask = edit_mask(torch.tensor([[100, 100, 20, 20]]), torch.tensor([True]), 256)
    fake, target = torch.zeros(1, 1, 256, 256), torch.ones(1, 1, 256, 256)
    target[..., 88:132, 88:132] = 0
    assert mixlc.local_l1_loss(fake, target, mask).item() == 0
    target[..., 87, 100] = 0
    target[..., 88, 88] = 1
    assert mixlc.local_l1_loss(fake, target, mask).item() == pytest.approx(1 / 44**2)


def test_local_loss_is_the_mean_of_each_samples_own_window():
    """Pooled, the complement of a box would outweigh the box five times."""
    box, inside = torch.tensor([[24, 24, 8, 8]] * 2), torch.tensor([True, False])
    mask = edit_mask(box, inside, 64)
    fake, target = torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 64, 64)
    target[0], target[1] = 1.0, 3.0
    assert mixlc.local_l1_loss(fake, target, mask).item() == pytest.approx(2.0)


def test_local_loss_of_the_complement():
    mask = edit_mask(torch.tensor([[16, 16, 32, 32]]), torch.tensor([False]), 64)
    fake, target = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    target[..., 19:45, 19:45] = 7.0  # deeper in the box than the border: not the complement's
    assert mixlc.local_l1_loss(fake, target, mask).item() == 0


# ----------------------------------------------------------------------------------------- the step


def test_discriminator_is_shown_untouched_photographs_and_fakes_only():
    state, seen, batch = build(TINY, CPU), [], mixlc.Edit(*batch_of("mixlc", TINY))
    state.D.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().clone()))
    train_step(state, batch, TINY)
    assert len(seen) == 3 and torch.equal(seen[1], batch.rgb_b)
    assert not any(torch.equal(image, batch.rgb_ab) for image in seen)


# ---------------------------------------------------------------------------------------- translate


@pytest.mark.parametrize("policy", ["running", "batch"])
def test_translate_does_not_depend_on_companions_nor_change_statistics(policy):
    cfg = dataclasses.replace(TINY, eval_norm=policy)
    state, (rgb, lc, *_) = build(cfg, CPU), batch_of("mixlc", TINY)
    statistics = {k: v.clone() for k, v in state.G.state_dict().items()}
    both = translate(state, (rgb, lc), cfg)
    assert torch.allclose(translate(state, (rgb[:1], lc[:1]), cfg), both[:1], atol=1e-5)
    assert all(torch.equal(v, statistics[k]) for k, v in state.G.state_dict().items())
    assert state.G.training and not both.requires_grad


def test_evaluation_by_hand(data, tmp_path, monkeypatch):
    """A generator that copies: the model's row is the copy's; outside the box it is perfect."""
    val = edits(data, tmp_path, "val", erase=False)
    monkeypatch.setattr(mixlc, "translate", lambda state, inputs, cfg: inputs[0])
    rows = mixlc.evaluate(None, val, val.cfg, np.arange(3)).table()
    assert rows["model"] == rows["copy of rgb_a"] and rows["model"]["l1_outside"] == 0
    edit, errors = next(val.in_order(np.arange(3))), []
    rgb_a, rgb_ab = to_bytes(edit.rgb_a).float(), to_bytes(edit.rgb_ab).float()
    for k, (top, left, height, width) in enumerate(edit.box.tolist()):
        part = (k, ..., slice(top, top + height), slice(left, left + width))
        errors.append((rgb_a[part] - rgb_ab[part]).abs().mean().item())
    assert rows["model"]["l1_inside"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_the_verdict_on_copying(data, tmp_path, monkeypatch):
    val, answers = edits(data, tmp_path, "val"), {}
    edit = next(val.in_order(np.arange(3)))
    guesses = {"darker copy": (edit.rgb_a + 1) * 0.8 - 1, "target": edit.rgb_ab}
    for name, guess in guesses.items():
        monkeypatch.setattr(mixlc, "translate", lambda state, x, cfg, guess=guess: guess)
        rows = mixlc.evaluate(None, val, val.cfg, np.arange(3)).table()
        answers[name] = common.copy_verdict(rows)
    assert answers["darker copy"].endswith("it copies its input")
    assert answers["target"].endswith("it does not copy its input")
    assert "0.00 levels from the target" in answers["target"]
    rows = {"model": {"l1_inside": 57.0, "l1_to_input": 53.0}, "copy of rgb_a": {"l1_inside": 73.0}}
    assert common.copy_verdict(rows).endswith("it neither copies its input nor hits the target")


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
    root = tmp_path_factory.mktemp("mixlc")
    land_cover(root / "data", train=5, val=3)
    main(options(root / "data", root / "run", "--epochs", "2"))
    return root


def test_run_folder_and_answer(trained):
    report = json.loads((trained / "run" / "evaluation.json").read_text())
    assert list(report["rows"])[:2] == ["model", "copy of rgb_a"]
    assert set(report["rows"]["model"]) == {
        "l1_inside",
        "psnr_inside",
        "l1_outside",
        "psnr_outside",
        "l1_to_input",
    }
    assert "copy its input" in report["answer"]
    header = (trained / "run" / "metrics.csv").read_text().splitlines()[0]
    losses = "g_total,g_adv,g_l1,g_local,d_total,d_real,d_fake"
    assert header == f"epoch,step,lr,{losses},val_l1_inside,val_l1_outside"


@pytest.mark.parametrize(("steps", "batch"), [(2, 2), (3, 1)])
def test_resume_is_exact(trained, tmp_path, monkeypatch, steps, batch):
    """Stopped at the last step of an epoch (of two), and in the middle of one."""
    out, asked = tmp_path / "run", iter([False] * (steps - 1) + [True])
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "stopping", lambda run: next(asked))
        with pytest.raises(SystemExit):
            main(options(trained / "data", out, "--epochs", "2"))
    assert state_of(out / "checkpoints" / "last.pt")["batch"] == batch
    main(["--resume", "--out", str(out)])
    got, want = (
        state_of(folder / "checkpoints" / "last.pt")["state"] for folder in (out, trained / "run")
    )
    for net in ("G", "D"):
        assert all(torch.equal(value, want[net][name]) for name, value in got[net].items())
    assert (out / "metrics.csv").read_text() == (trained / "run" / "metrics.csv").read_text()


def test_evaluate_repeats_the_report(trained, tmp_path):
    main(
        [
            "--evaluate",
            "--checkpoint",
            str(trained / "run" / "checkpoints" / "last.pt"),
            "--out",
            str(tmp_path),
        ]
    )
    again, first = (
        json.loads((folder / "evaluation.json").read_text())
        for folder in (tmp_path, trained / "run")
    )
    assert again["rows"] == first["rows"]


@pytest.fixture
def photo(tmp_path):
    save(tmp_path / "in" / "photo.png", picture(np.random.default_rng(9), 100, 140))
    save(tmp_path / "in" / "lc" / "photo.png", np.zeros((100, 140), np.uint8))
    return tmp_path / "in" / "photo.png", tmp_path / "in" / "lc" / "photo.png"


def use(trained, photo, out, *more):
    checkpoint = str(trained / "run" / "checkpoints" / "last.pt")
    return [
        "--generate",
        str(photo[0]),
        "--lc",
        str(photo[1]),
        "--checkpoint",
        checkpoint,
        "--out",
        str(out),
        *more,
    ]


def test_painting_strokes_keeps_what_lies_outside(trained, photo, tmp_path):
    main(
        use(
            trained,
            photo,
            tmp_path / "out",
            "--paint",
            "water:40,30,50,40",
            "--paint",
            "Road:60,40,10,10",
        )
    )
    edited, before = (
        np.asarray(Image.open(path)).astype(int)
        for path in (tmp_path / "out" / "photo.png", photo[0])
    )
    border = round(12 * 100 / 256)
    changed = (edited != before).any(-1)
    assert changed[30:70, 40:90].mean() > 0.9
    changed[30 - border : 70 + border, 40 - border : 90 + border] = False
    assert not changed.any()
    sheet = Image.open(tmp_path / "out" / "photo_sheet.png")
    assert sheet.size == (4 * 144 + 4, 16 + 104)
    colors = {color for _, color in sheet.getcolors(1 << 20)}
    assert {(0x84, 0x29, 0xF6), (0xE2, 0xA9, 0x29), (0x6E, 0xC1, 0xE4)} <= colors


def test_an_edited_land_cover_file(trained, photo, tmp_path, capsys):
    lc = np.zeros((100, 140), np.uint8)
    lc[:, 70:] = 1
    save(tmp_path / "in" / "edited.png", lc)
    photo = photo[0], tmp_path / "in" / "edited.png", photo[1]
    assert "--no-erase" in line_of(main, use(trained, photo, tmp_path / "no"), capsys)
    main(options(trained / "data", tmp_path / "whole" / "run", "--epochs", "1", "--no-erase"))
    trained = tmp_path / "whole"
    main(use(trained, photo, tmp_path / "a"))
    assert "--lc-before" in capsys.readouterr().err
    main(use(trained, photo, tmp_path / "b", "--lc-before", str(photo[2])))
    main(use(trained, photo, tmp_path / "c", "--lc-before", str(photo[2]), "--no-keep-outside"))
    whole, kept, again = (np.asarray(Image.open(tmp_path / name / "photo.png")) for name in "abc")
    before = np.asarray(Image.open(photo[0]))
    assert (
        (whole == again).all()
        and (kept[:, :60] == before[:, :60]).all()
        and (kept[:, 80:] == whole[:, 80:]).all()
    )


def test_mistakes_are_one_line(trained, photo, tmp_path, capsys):
    out = tmp_path / "out"
    save(tmp_path / "small.png", np.zeros((10, 10), np.uint8))
    cases = {
        "no such class; there are land, water, road": use(
            trained, photo, out, "--paint", "lake:1,1,5,5"
        ),
        "several begin so; there are": use(trained, photo, out, "--paint", ":1,1,5,5"),
        "write class:x,y,width,height": use(trained, photo, out, "--paint", "water:1,1"),
        "lies outside the image, 140x100": use(trained, photo, out, "--paint", "water:200,1,5,5"),
        "is 10x10 but": use(trained, (photo[0], tmp_path / "small.png"), out),
        "needs --lc": use(trained, photo, out)[:2] + use(trained, photo, out)[4:],
        "needs --checkpoint": use(trained, photo, out)[:4],
    }
    for text, arguments in cases.items():
        assert text in line_of(main, arguments, capsys), text


def test_the_beginning_of_a_name_is_enough():
    colors = ("#000000", "#010101", "#020202")
    rows = [
        {"name": n, "color": c}
        for n, c in zip(("Water bodies", "road", "roads"), colors, strict=True)
    ]
    classes = ClassTable.load(json.dumps(rows))
    strokes = [_stroke(f"{name}:1,2,3,4", classes, 9, 9) for name in ("water", "road", "Roads")]
    assert strokes == [(0, 2, 1, 6, 4), (1, 2, 1, 6, 4), (2, 2, 1, 6, 4)]


def test_data_that_does_not_do(tmp_path, capsys):
    pairs = side_by_side(tmp_path / "pairs")
    assert "--paint goes with --generate" in line_of(
        main, [*options(pairs, tmp_path / "run"), "--paint", "a:1,2,3,4"], capsys
    )
    assert "--lc-classes" in line_of(main, options(pairs, tmp_path / "run"), capsys)
    small = land_cover(tmp_path / "small", side=60)
    assert "0.jpg: 60x60 is smaller than --size 64" in line_of(
        main, options(small, tmp_path / "run"), capsys
    )
    lone = land_cover(tmp_path / "lone", train=1)
    assert "an edit needs two" in line_of(main, options(lone, tmp_path / "run"), capsys)


def test_every_layout_works_through_lc_classes(tmp_path):
    pairs = side_by_side(tmp_path / "pairs")
    main(
        options(
            pairs,
            tmp_path / "run",
            "--epochs",
            "1",
            "--lc-classes",
            "maps",
            "--use-ba",
            "--local-d",
        )
    )
    assert (tmp_path / "run" / "evaluation.json").is_file()


def test_one_hot_array_files(tmp_path):
    root = land_cover(tmp_path / "data")
    for path in sorted(root.rglob("lc/*.png")):
        index = np.asarray(Image.open(path))
        np.savez_compressed(path.with_suffix(".npz"), index[..., None] == np.arange(3))
        path.unlink()
    main(options(root, tmp_path / "run", "--epochs", "1"))
    assert (tmp_path / "run" / "evaluation.json").is_file()


def test_show_samples_writes_a_picture_and_does_not_train(data, tmp_path):
    main(options(data, tmp_path / "show", "--show-samples", "3"))
    sheet = np.asarray(Image.open(tmp_path / "show" / "samples.png"))
    assert sheet.shape == (16 + 3 * 68, 4 + 6 * 68, 3) and [
        p.name for p in (tmp_path / "show").iterdir()
    ] == ["samples.png"]
    target = sheet[16 : 16 + 64, 4 + 5 * 68 : 4 + 5 * 68 + 64]
    assert (target[19, 19:45] == 255).all() and (
        target[18, 18] != 255
    ).any()  # the box at 20..43, framed


@pytest.mark.slow
def test_training_lowers_the_local_loss(tmp_path):
    demo_world(tmp_path / "cache", "landcover", train=56, val=4, side=96)
    out = tmp_path / "run"
    shape = ["--size", "64", "--width", "16", "--batch-size", "4", "--lr", "1e-3"]
    main([*shape, "--epochs", "8", "--log-every", "4", "--out", str(out)])
    rows = read_metrics(out / "metrics.csv")
    first, last = (
        np.mean([float(row["g_local"]) for row in part]) for part in (rows[:2], rows[-4:])
    )
    assert last < 0.6 * first
    table = json.loads((out / "evaluation.json").read_text())["rows"]
    assert table["model"]["l1_inside"] < table["copy of rgb_a"]["l1_inside"]
