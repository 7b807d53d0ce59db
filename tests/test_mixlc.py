"""mixlc alone: pasted edits, the networks' crops, the local loss, edits of photographs."""

import dataclasses
import importlib
import json
import types

import numpy as np
import pytest
import torch
from torch import nn

import common
import mixlc
from files import picture, pixels_of, save
from mixlc import color_loss, edit_mask, grown, label_loss, main, masked_l1_loss
from runs import metrics_of, rows_of, tiny_run, use
from support.classes import ClassTable
from support.demo import demo_world
from support.generate import _stroke
from support.pictures import to_bytes
from tensors import CPU, batch_of, calls_of, inputs_of, open_data, tiny

TINY = tiny("mixlc")[1]


def choices(data, count):
    """What data chooses in `count` epochs: partners and boxes of all its tiles."""
    drawn, box = [], data.cfg.box
    for k in range(count):
        drawn.append(data.choose(np.random.default_rng(k), np.arange(len(data)), box))
    partners, boxes = zip(*drawn, strict=True)
    return np.stack(partners), np.stack(boxes)


def mask_of(*box, size=64):
    return edit_mask(torch.tensor([box]), torch.tensor([True]), size)


@pytest.mark.parametrize("box", ["center", "random", "any"])
def test_paste_geometry_pixel_by_pixel(landcover, cache, box):
    train = open_data("mixlc", landcover, cache, box=box)
    index, records = np.arange(len(train)), train.store.records
    partner, boxes = train.choose(np.random.default_rng(0), index, box)
    flips, own = np.zeros((1, len(train), 4), np.int64), np.zeros((1, len(train)), bool)
    own[0, 1] = True  # asks for its own land cover: nothing is pasted
    edit = next(train.pasted(index[None], partner[None], boxes[None], flips, own))
    for k in index:
        top, left, height, width = boxes[k]
        pasted = np.array(records[k])
        part = slice(top, top + height), slice(left, left + width)
        pasted[:, *part] = records[k if own[0, k] else partner[k]][:, *part]
        wanted = {"a": records[k], "b": records[partner[k]], "ab": pasted}
        for name, record in wanted.items():
            rgb, lc = getattr(edit, f"rgb_{name}")[k], getattr(edit, f"lc_{name}")[k]
            assert (to_bytes(rgb).numpy() == record[:3]).all()
            assert (common.class_index(lc[None])[0].numpy() == record[3]).all()
        assert edit.box[k].tolist() == boxes[k].tolist()
    assert edit.inside.all()


@pytest.mark.parametrize(("box", "longest"), [("random", 32), ("any", 64)])
def test_boxes_have_every_side_and_reach_both_edges(landcover, cache, box, longest):
    boxes = choices(open_data("mixlc", landcover, cache, box=box), 600)[1].reshape(-1, 4)
    assert set(boxes[:, 2]) == set(range(8, longest + 1)) and (boxes[:, 2] == boxes[:, 3]).all()
    ends = boxes[:, :2] + boxes[:, 2:]
    assert boxes.min() == 0 and ends.max() == 64
    center = open_data("mixlc", landcover, cache, box="center")
    center.cfg = dataclasses.replace(center.cfg, size=256)
    assert (choices(center, 1)[1] == [80, 80, 96, 96]).all()


def test_b_is_never_a_and_may_be_any_other(landcover, cache):
    data = open_data("mixlc", landcover, cache)
    partners = choices(data, 100)[0]
    pairs = {(a, b) for epoch in partners.tolist() for a, b in enumerate(epoch)}
    assert pairs == {(a, b) for a in range(4) for b in range(4) if a != b}
    own = torch.cat([edit.own for epoch in range(50) for edit in data.batches(epoch)])
    assert 0.4 < own.float().mean() < 0.6  # half ask for their own land cover


def test_use_ba_adds_the_complement(landcover, cache):
    edit = next(open_data("mixlc", landcover, cache, use_ba=True, own=0.0).batches(0))
    assert len(edit.rgb_a) == 4 and edit.inside.tolist() == [True, True, False, False]
    outside = ~edit_mask(edit.box, edit.inside, 64)  # what is no edit is the input's
    for kind in ("rgb", "lc"):
        a, b, ab = (getattr(edit, f"{kind}_{name}") for name in ("a", "b", "ab"))
        assert torch.equal(a[2:], b[:2]) and torch.equal(b[2:], a[:2])
        assert torch.equal(ab[:2], ab[2:]) and len(ab) == 4
        assert torch.equal(a.masked_select(outside), ab.masked_select(outside))


each_edit_script = pytest.mark.parametrize("script", ["mixlc", "mixlc_acgan"])


@each_edit_script
def test_an_edit_is_blanked_in_training_sampling_and_evaluation(script, monkeypatch):
    """And nothing else is; the copy of rgb_a stays whole. G gets the land cover to be."""
    module, cfg = tiny(script)
    state, batch = module.build(cfg, CPU), module.Edit(*batch_of(script, cfg))
    shown, mask = inputs_of(state.G), edit_mask(batch.box, batch.inside, 64)
    whole = module.visible(batch, dataclasses.replace(cfg, erase=False))
    assert torch.equal(whole, batch.rgb_a)

    def is_blanked(image):
        return torch.equal((image != batch.rgb_a).all(1, keepdim=True), mask)

    other = batch._replace(rgb_a=torch.where(mask, -batch.rgb_a, batch.rgb_a))
    blanks = []
    for edit in (batch, other):
        torch.manual_seed(0)
        blanks.append(module.visible(edit, cfg))
    assert torch.equal(*blanks) and is_blanked(blanks[0])
    module.train_step(state, batch, cfg)
    val = types.SimpleNamespace(in_order=lambda images: [batch], classes=cfg.classes)
    asked = calls_of(monkeypatch, module, "translate")
    rows = module.evaluate(state, val, cfg, np.arange(2)).table()
    columns = module.sample(state, val, cfg, np.arange(2))
    assert len(asked) == 2 and all(torch.equal(lc, batch.lc_ab) for _, (_, lc), _ in asked)
    assert len(shown) >= 3 and all(map(is_blanked, shown))
    assert is_blanked(columns["input"]) and rows["copy of rgb_a"]["l1_to_input"] == 0


@pytest.mark.parametrize("erase", [True, False])
@each_edit_script
def test_an_edit_is_blanked_in_a_users_photograph_with_erase(script, erase, monkeypatch):
    """By the same noise in each of several windows, and by other noise in another sample."""
    module, cfg = tiny(script, erase=erase)
    calls = calls_of(monkeypatch, module, "translate")
    edited = calls_of(monkeypatch, common, "edit_file", lambda *_: None)
    module.generate(module.build(cfg, CPU, training=False), cfg, CPU)
    windows = torch.randint(0, 3, (2, 5, 64, 64), dtype=torch.uint8)
    photographs, lc, changed = common.from_bytes(windows[:, :3]), windows[:, 3], windows[:, 4:]
    for sample in (1, 2):
        calls.clear()
        edited[0][1](windows, variant=sample)
        shown, asked = (torch.cat(x) for x in zip(*(pair for _, pair, _ in calls), strict=True))
        common.seed_step(0, sample, 0)
        blank = 0.5 * torch.randn(1, 3, 64, 64)
        want = torch.where((changed > 0) & erase, blank, photographs)
        assert torch.equal(shown, want) and torch.equal(asked, common.one_hot(lc, 3))


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


@pytest.mark.parametrize(
    ("size", "box", "rows", "columns"),
    [(64, (0, 0, 8, 10), (0, 11), (0, 13)), (256, (100, 100, 20, 20), (88, 132), (88, 132))],
)
def test_local_loss_by_hand(size, box, rows, columns):
    """The border is 12 pixels at 256 and 3 at 64, and less at the image's edge."""
    near = grown(mask_of(*box, size=size))
    fake, target = torch.zeros(1, 3, size, size), torch.full((1, 3, size, size), 9.0)
    inside = target[..., slice(*rows), slice(*columns)]
    inside[:] = 0.5
    assert masked_l1_loss(fake, target, near).item() == pytest.approx(0.5)
    inside[..., -1, -1] = inside[..., 0, 0] = 0.5 + inside[0, 0].numel()  # its first, its last
    assert masked_l1_loss(fake, target, near).item() == pytest.approx(2.5)


def test_color_loss_by_hand():
    """Texture alone costs nothing; a square counts if a quarter of it is edited."""
    fake = torch.tensor([1.0, -1.0]).repeat(64, 32).expand(1, 3, 64, 64)
    target = torch.zeros(1, 3, 64, 64)
    for box, off, want in (
        ((8, 8, 32, 32), 0.0, 0.0),
        ((8, 8, 32, 32), 0.5, 0.5),
        ((0, 0, 4, 4), 0.5, 0.5),  # a quarter of the first square
        ((0, 0, 3, 4), 0.5, 0.0),
    ):
        assert color_loss(fake + off, target, mask_of(*box, size=64)).item() == pytest.approx(want)
    target[:, :, :, 32:] = 0.3  # another colour in the right half, in one of three bands
    target[:, 1:] = 0.0
    whole = color_loss(fake, target, mask_of(0, 0, 64, 64, size=64)).item()
    squares = np.arange(29) * 2  # the left edges of squares of 8 pixels
    share = np.clip(squares + 8 - 32, 0, 8) / 8  # of the right half in each
    assert whole == pytest.approx(0.3 / 3 * share.mean())


@pytest.mark.parametrize(("often", "weight"), [(12, 4.0), (114, 10 / (40 / 114))])
def test_label_loss_by_hand(often, weight):
    """Of four labels in `often`, 3, 3 and no pixels; the last pixel has none."""
    labels = torch.tensor([0] * often + [1] * 3 + [2] * 3 + [4])
    target = torch.eye(5)[labels][None, None].movedim(-1, 1)[:, :4]
    logits = torch.zeros(1, 4, 1, len(labels))
    logits[0, 1, 0, labels == 1] = np.log(3)  # 1/2 instead of 1/4
    rare = 3 * weight
    want = (often * np.log(4) + rare * np.log(2) + rare * np.log(4)) / (often + 2 * rare)
    assert label_loss(logits, target).item() == pytest.approx(want)
    assert label_loss(logits, target * 0).item() == 0


def test_evaluation_by_hand(landcover, cache, monkeypatch):
    """A generator that copies: the model's row is the copy's; outside the box it is perfect."""
    val = open_data("mixlc", landcover, cache, "val", erase=False)
    monkeypatch.setattr(mixlc, "translate", lambda state, inputs, cfg: inputs[0])
    rows = mixlc.evaluate(None, val, val.cfg, np.arange(2)).table()
    assert rows["model"] == rows["copy of rgb_a"] and rows["model"]["l1_outside"] == 0
    edit, errors = next(val.in_order(np.arange(2))), []
    rgb_a, rgb_ab = to_bytes(edit.rgb_a).float(), to_bytes(edit.rgb_ab).float()
    for k, (top, left, height, width) in enumerate(edit.box.tolist()):
        part = (k, ..., slice(top, top + height), slice(left, left + width))
        errors.append((rgb_a[part] - rgb_ab[part]).abs().mean().item())
    assert rows["model"]["l1_inside"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_the_verdict_on_copying(landcover, cache, monkeypatch):
    val = open_data("mixlc", landcover, cache, "val")
    edit, answers = next(val.in_order(np.arange(2))), []
    for guess in ((edit.rgb_a + 1) * 0.8 - 1, edit.rgb_ab):
        monkeypatch.setattr(mixlc, "translate", lambda state, x, cfg, guess=guess: guess)
        answers.append(common.copy_verdict(mixlc.evaluate(None, val, val.cfg, [0, 1]).table()))
    rows = {"model": {"l1_inside": 57.0, "l1_to_input": 53.0}, "copy of rgb_a": {"l1_inside": 73.0}}
    answers.append(common.copy_verdict(rows))
    assert "0.00 levels from the target" in answers[1] and "(a copy would be 73.00)" in answers[2]
    ends = "copies its input", "does not copy its input", "does not copy its input"
    assert all(f"it {end}" in answer for answer, end in zip(answers, ends, strict=True))


def test_the_beginning_of_a_name_is_enough():
    colors = {"Water bodies": "#000000", "road": "#010101", "roads": "#020202"}
    rows = [{"name": name, "color": color} for name, color in colors.items()]
    classes = ClassTable.load(json.dumps(rows))
    strokes = [_stroke(f"{name}:1,2,3,4", classes, 9, 9) for name in ("water", "road", "Roads")]
    assert strokes == [(0, 2, 1, 6, 4), (1, 2, 1, 6, 4), (2, 2, 1, 6, 4)]


@pytest.mark.slow
def test_training_lowers_the_local_loss(tmp_path):
    demo_world(tmp_path / "cache", "landcover", train=48, val=4, side=64)
    shape = "--size 64 --width 8 --batch-size 4 --lr 2e-3"
    main(f"{shape} --epochs 4 --log-every 4 --out {tmp_path}/run".split())
    losses = [float(row["g_local"]) for row in metrics_of(tmp_path / "run")]
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:2])
    rows = rows_of(tmp_path / "run")
    assert rows["model"]["l1_inside"] < rows["copy of rgb_a"]["l1_inside"]


@each_edit_script
def test_samples_differ_and_one_seed_repeats(script, landcover, tmp_path):
    main = importlib.import_module(script).main
    main(tiny_run(script, landcover, tmp_path / "run", "--epochs 1 --lr 0.05"))
    save(tmp_path / "photo.png", picture(np.random.default_rng(9), 80, 100))
    save(tmp_path / "lc.png", np.zeros((80, 100), np.uint8))
    edit = f"--generate {tmp_path}/photo.png --lc {tmp_path}/lc.png --paint water:20,20,40,40"

    def generate(folder, more=""):
        main(use(tmp_path / "run", edit, f"--out {tmp_path}/{folder} {more}"))
        return {path.stem: pixels_of(path) for path in (tmp_path / folder).iterdir()}

    a, b, c = (generate(f"{k}", f"--samples 3 --seed {k // 2}") for k in (2, 3, 4))
    samples = {f"photo_{k}" for k in (1, 2, 3)}
    assert set(a) == samples | {"photo_sheet"}
    assert (a["photo_1"] == b["photo_1"]).all()
    assert (a["photo_1"] != a["photo_2"]).any() and (a["photo_1"] != c["photo_1"]).any()
    spread = np.std([a[name] for name in sorted(samples)], 0).mean(-1, keepdims=True)
    assert spread[16:64, 16:64].max() > 0 == spread[:10].max()  # outside, the photograph is kept
    assert set(generate("one")) == {"photo", "photo_sheet"}


@each_edit_script
def test_the_columns_of_grids(script, monkeypatch, tmp_path):
    module, cfg = tiny(script, out=str(tmp_path), show_samples=2)
    edit = module.Edit(*batch_of(script, cfg))
    data = {"in_order": lambda images: [edit], "batches": lambda epoch: iter([edit])}
    data = types.SimpleNamespace(**data, classes=cfg.classes)
    saved = calls_of(monkeypatch, common, "save_grid", lambda *_: None)
    monkeypatch.setattr(module, "Edits", lambda *_: data)
    module.show_samples(cfg, CPU)
    columns = module.sample(module.build(cfg, CPU), data, cfg, [0])
    shown = [(name, columns[name]) for name in ("lc_ab", "rgb_ab")]
    for name, column in [*saved[0][1].items(), *shown]:
        want = getattr(edit, name)
        want = common.draw(common.class_index(want), cfg.classes) if "lc" in name else want
        assert torch.equal(column[:, :, 30:34, 30:34], want[:, :, 30:34, 30:34]), name


@each_edit_script
def test_a_copy_is_judged_by_the_land_cover_that_was_asked_for(script, monkeypatch):
    """And photograph b, untouched, by its own."""
    module, cfg = tiny(script)
    edit = module.Edit(*batch_of(script, cfg))
    mask = module.edit_mask(edit.box, edit.inside, 64)
    added = calls_of(monkeypatch, common.Scores, "add_labels", lambda *_: None)
    judge = types.SimpleNamespace(classes_of=lambda image: image)
    module.add_judged(common.Scores(), judge, edit, mask, edit.rgb_ab, "judge")
    want = torch.where(mask[:, 0], common.class_index(edit.lc_ab), common.IGNORED)
    assert [row for _, row, *_ in added] == ["model", "copy of rgb_a", "photograph b"]
    assert all(torch.equal(target, want) for *_, target, _, _ in added[:2])
    images = [image for _, _, image, *_ in added]
    assert all(map(torch.equal, images, (edit.rgb_ab, edit.rgb_a, edit.rgb_b)))
