"""The programs under bench/ that answer a question once: forged masks, seams, kept results."""

import json

import forged_masks
import numpy as np
import pytest
import results
import seams
import torch
from PIL import Image

import common
import pix2pix
from conftest import land_cover, line_of
from support.classes import ClassTable
from support.windows import tiles


def test_forged_masks_are_parts_of_two_real_ones():
    """A rectangle of one in another, then an ellipse of a class, not of what is ignored."""
    masks = torch.tensor([0, 1], dtype=torch.uint8)[:, None, None].repeat(1, 24, 24)
    masks[:, 0, 0] = common.IGNORED
    forged = forged_masks.forge(masks, 40, np.random.default_rng(0))
    assert forged.shape == (40, 24, 24) and forged.unique().tolist() == [0, 1, common.IGNORED]
    assert (forged == common.IGNORED).sum((1, 2)).max() <= 2, "one pixel of each, turned"
    corners = {(mask == common.IGNORED).nonzero().sum().item() for mask in forged}
    assert len(corners - {0}) > 1, "masks are turned before they are joined"
    straight = forged_masks.forge(masks[:, 1:, 1:], 40, np.random.default_rng(0))
    shares = (straight == straight[:, :1, :1]).float().mean((1, 2))
    assert shares.min() < 0.9 and len(shares.unique()) > 20


def test_what_is_drawn_on_forged_masks_is_an_ellipse():
    """Of two masks of one class, with a third that the rectangle never takes."""
    masks = torch.zeros(60, 24, 24, dtype=torch.uint8)
    masks[0] = 1
    forged = forged_masks.forge(masks, 30, np.random.default_rng(1))
    drawn = [mask for mask in forged if 0 < mask.sum() < 24 * 24 // 2]
    assert drawn
    widths = [mask.sum(1, dtype=torch.int).unique() for mask in drawn]
    assert any(len(each) > 3 for each in widths), "rows of rectangles are all of one width"


def test_photograph_and_mask_are_turned_together():
    records = torch.randint(0, 256, (8, 1, 16, 16), dtype=torch.uint8).repeat(1, 4, 1, 1)
    seen = forged_masks.turned(records, np.random.default_rng(0))
    assert torch.equal(seen[:, 0], seen[:, 3]) and not torch.equal(seen, records)
    assert torch.equal(seen.flatten(1).sort().values, records.flatten(1).sort().values)
    ways = forged_masks.turned(records[:1].repeat(100, 1, 1, 1), np.random.default_rng(0))
    assert len(ways.unique(dim=0)) == 8


@pytest.mark.parametrize("augment", [False, True])
def test_tiles_are_turned_for_the_segmenter_when_asked(augment, monkeypatch):
    turns = []
    turned = forged_masks.turned
    monkeypatch.setattr(
        forged_masks, "turned", lambda *words: turns.append(words) or turned(*words)
    )
    records = torch.randint(0, 2, (4, 4, 16, 16), dtype=torch.uint8)
    forged_masks.mean_iou(records, records, 2, augment, 0, steps=3)
    assert len(turns) == 3 * augment


def test_the_segmenter_learns_what_is_there_and_is_measured_on_what_is_held_out():
    """Brightness says the class; with the held-out classes exchanged it is always wrong."""
    labels = (torch.arange(32) % 2)[:, None, None].repeat(1, 16, 16).to(torch.uint8)
    photographs = (labels * 200 + 20)[:, None].repeat(1, 3, 1, 1)
    records = torch.cat([photographs, labels[:, None]], 1)
    wrong = torch.cat([photographs, 1 - labels[:, None]], 1)
    for val, iou in ((records, 1.0), (wrong, 0.0)):
        assert forged_masks.mean_iou(records, val, 2, True, 0, steps=30) == pytest.approx(iou)


def test_the_painter_learns_photographs_from_land_cover():
    """Red where class 1 is asked for, else blue; the masks stay beside what is painted."""
    labels = (torch.arange(8) % 2)[:, None, None].repeat(1, 64, 64).to(torch.uint8)
    labels[:, :, 32:] = 1 - labels[:, :, 32:]  # both classes in each: BatchNorm sees no constant
    photographs = torch.stack([labels * 200, labels * 0, 200 - labels * 200], 1)
    classes = ClassTable.load("binary")
    cfg = pix2pix.Config(size=64, width=8, batch_size=4, lc_classes=classes.text)
    records = torch.cat([photographs, labels[:, None]], 1)
    state = forged_masks.learn_to_paint(records, cfg, 60)
    painted = forged_masks.paint(state, 1 - labels, cfg)
    assert torch.equal(painted[:, 3], 1 - labels) and painted.dtype == torch.uint8
    redness = painted[:, 0].float() - painted[:, 2].float()
    assert redness[labels == 0].mean() > 20 and redness[labels == 1].mean() < -20


def test_what_the_segmenter_is_given(tmp_path, monkeypatch, capsys):
    """n real tiles always, forged ones beside them; held-out tiles are the validation split's.
    What is painted comes from these n tiles alone.
    """
    given, learnt, masks = [], [], []
    learn, forge = forged_masks.learn_to_paint, forged_masks.forge
    monkeypatch.setattr(forged_masks, "mean_iou", lambda *words: given.append(words) or 0.5)
    monkeypatch.setattr(
        forged_masks, "learn_to_paint", lambda *words: learnt.append(words[0]) or learn(*words)
    )
    monkeypatch.setattr(
        forged_masks, "forge", lambda *words: masks.append(words[0]) or forge(*words)
    )
    data = land_cover(tmp_path / "data", train=4, val=2)
    size = ["--patch", "80", "--size", "64", "--width", "2", "--cache", str(tmp_path / "cache")]
    steps = ["--tiles", "3", "--seeds", "2", "--paint-steps", "1", "--forged", "1", "2"]
    forged_masks.main(["--data", str(data), *size, *steps])
    assert "3 tiles, seed 1, real + 2 x forged, augmented: 0.5" in capsys.readouterr().out
    cfg = pix2pix.Config(data=str(data), patch=80, size=64, cache=str(tmp_path / "cache"))
    train, held = (forged_masks.tiles_of(cfg, split) for split in ("train", "val"))
    assert [(len(words[0]), words[3], words[4]) for words in given] == [
        (count, augment, seed)
        for seed in (0, 1)
        for count in (3, 6, 9)
        for augment in (False, True)
    ]
    for words in given:
        assert torch.equal(words[1], held)
        known = [any(torch.equal(tile, real) for real in train) for tile in words[0]]
        assert known == [True] * 3 + [False] * (len(words[0]) - 3)
    for k, (records, labels) in enumerate(zip(learnt, masks, strict=True)):
        assert torch.equal(records, given[6 * k][0]) and torch.equal(labels, records[:, 3])
    assert not torch.equal(given[0][0], given[6][0]), "another seed takes other tiles"


def test_forged_masks_of_a_directory(tmp_path, capsys):
    data = land_cover(tmp_path / "data", train=4, val=2)
    size = ["--patch", "80", "--size", "64", "--width", "2", "--cache", str(tmp_path / "cache")]
    steps = ["--tiles", "2", "--seeds", "2", "--paint-steps", "2", "--steps", "2", "--forged", "3"]
    forged_masks.main(["--data", str(data), *size, *steps])
    said = capsys.readouterr().out
    for kind in ("real", "real, augmented", "real + 3 x forged", "real + 3 x forged, augmented"):
        assert f"2 tiles, seed 0, {kind}: 0." in said


@pytest.mark.parametrize(
    ("main", "arguments", "says"),
    [
        (forged_masks.main, ["--data", "pairs"], "land cover"),
        (forged_masks.main, ["--data", "landcover", "--patch", "80", "--tiles", "5"], "4 training"),
        (forged_masks.main, ["--data", "landcover", "--patch", "80", "--tiles", "1"], "from 2"),
        (forged_masks.main, ["--data", "landcover", "--tiles", "2", "--forged", "0"], "--forged"),
        (seams.main, ["nosuch.pt", "scene.tif"], "nosuch.pt"),
        (seams.main, ["weights", "scene.tif"], "no checkpoint"),
        (results.main, ["keep", "nosuch", "kept"], "evaluation.json"),
    ],
)
def test_a_mistake_gets_one_line(main, arguments, says, pairs, landcover, tmp_path, capsys):
    known = {"pairs": str(pairs), "landcover": str(landcover), "kept": str(tmp_path / "kept")}
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "weights.pt")
    known["weights"] = str(tmp_path / "weights.pt")
    arguments = [known.get(word, word) for word in arguments]
    if main is forged_masks.main:
        arguments += ["--cache", str(tmp_path / "cache")]
    assert says in line_of(main, arguments, capsys)
    assert not (tmp_path / "kept").exists()


def test_controls_and_raster_are_drawn(tmp_path, monkeypatch):
    """What differs between runs is their title; a raster is painted in three ways."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    data = land_cover(tmp_path / "data", train=2, val=2, side=160)
    words = ["--data", str(data), "--patch", "80", "--size", "64", "--width", "2", "--epochs", "1"]
    for name, more in (("a", []), ("b", ["--lambda-l1", "7"])):
        pix2pix.main([*words, "--out", str(tmp_path / name), *more])
    results.main(["controls", str(tmp_path / "a"), str(tmp_path / "b")])
    kept = json.loads((tmp_path / "docs" / "controls.json").read_text())
    assert [*kept] == [
        f"{what}, {whose} statistics"
        for what in ("as it is", "--lambda-l1 7")
        for whose in ("own", "running")
    ]
    assert all(0 < row["rmse"] < 255 and -1 <= row["alike"] <= 1 for row in kept.values())
    results.main(["raster", str(tmp_path / "a/checkpoints/last.pt"), str(data / "val/lc/0.png")])
    for name in ("controls", "raster"):
        assert np.asarray(Image.open(tmp_path / "docs" / f"{name}.jpg")).std() > 10


def test_pictures_of_one_pattern_are_alike():
    rng = torch.Generator().manual_seed(0)
    pattern, other = torch.randn(2, 1, 3, 64, 64, generator=rng)
    assert results.alike(pattern.repeat(3, 1, 1, 1)).tolist() == pytest.approx([1, 1, 1])
    assert results.alike(torch.cat([pattern, other])).abs().max() < 0.1


def test_seams_of_stripes_and_of_noise():
    """Windows of different brightness show as a step; noise alone shows none."""
    noise = np.random.default_rng(0).integers(100, 140, (256, 256, 3))
    stripes = noise.copy()
    starts = [start for start, _ in tiles(256, 64)]
    for k, (a, b) in enumerate(zip(starts, starts[1:], strict=False)):
        stripes[(a + 64 + b) // 2 :] += 20 * (-1) ** k
    assert seams.seams(noise, 64)[1] == pytest.approx(1, abs=0.5)
    assert seams.seams(stripes, 64)[1] > 3
