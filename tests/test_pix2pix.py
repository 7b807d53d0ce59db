"""pix2pix alone: sides and direction, the two policies of BatchNorm, the plateau, the judge."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import common
import pix2pix
from files import CLASSES, pixels_of
from pix2pix import State, build, train_step
from support.pictures import to_bytes
from tensors import CPU, batch_of, calls_of, open_data, tiny

TINY = tiny("pix2pix")[1]


def test_sides_and_direction(pairs, cache):
    train = open_data("pix2pix", pairs, cache)
    assert [len(part) for part in train.in_order(np.arange(18) % 6)] == [8, 8, 2]
    records = next(train.in_order(np.arange(2)))
    x, y = train.pair(records)
    assert x.shape == y.shape == (2, 3, 72, 72) and x.min() >= -1 and x.max() <= 1
    assert torch.allclose(x, -y, atol=0.05)  # BtoA: the input is B, the negative of A
    assert torch.equal(y, common.from_bytes(records[:, :3]))
    train.cfg = dataclasses.replace(train.cfg, direction="AtoB")
    assert torch.equal(train.pair(records)[0], y)


def test_a_sample_grid_has_input_fake_and_target(pairs, cache):
    val, state = open_data("pix2pix", pairs, cache, "val"), build(TINY, CPU)
    cfg = dataclasses.replace(TINY, eval_norm="running")  # without noise
    columns = pix2pix.sample(state, val, cfg, np.arange(2))
    x, y = val.pair(next(val.in_order(np.arange(2))))
    wanted = {"input": x, "fake": pix2pix.translate(state, x, cfg), "target": y}
    assert list(columns) == list(wanted)
    assert all(torch.equal(columns[name], wanted[name]) for name in wanted)


def test_label_maps_are_drawn_in_their_class_colours(landcover, cache):
    x, _ = next(open_data("pix2pix", landcover, cache).batches(0))
    colors = {tuple(color) for color in to_bytes(x).permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    table = {(0x84, 0x29, 0xF6), (0xE2, 0xA9, 0x29), (0x6E, 0xC1, 0xE4), (0x9B, 0x9B, 0x9B)}
    assert colors == table
    val = open_data("pix2pix", landcover, cache, "val", direction="AtoB")
    (records,) = val.in_order(np.arange(2))
    ignored = val.store.images("B", records) == common.IGNORED  # no data in a target
    assert ignored.any() and torch.equal(val.pair(records)[1].isnan().all(1), ignored)
    assert val.store.histograms()["B"].sum() == (~ignored).sum()
    cfg = dataclasses.replace(val.cfg, lc_classes=val.store.classes.text)
    rows = pix2pix.evaluate(build(cfg, CPU), val, cfg, np.arange(2)).table()
    assert set(rows["model"]) >= {"psnr", "pixel_accuracy", "mean_iou"}


@pytest.mark.parametrize(
    ("size", "policy", "own"), [(1, "auto", 1), (2, "auto", 0), (1, "running", 0), (2, "batch", 1)]
)
def test_the_papers_policy_is_that_of_batch_size_1_unless_told(size, policy, own):
    cfg = dataclasses.replace(TINY, batch_size=size, eval_norm=policy)
    assert common.own_statistics(cfg) == bool(own)


@pytest.mark.parametrize("noise", [True, False])
def test_dropout_is_on_in_generation_where_noise_is_wanted(noise, monkeypatch):
    """Of an image in one window, and not of one in several."""
    cfg = dataclasses.replace(TINY, batch_size=1)
    state, x = build(cfg, CPU), batch_of("pix2pix", cfg)[0]
    first, second = (pix2pix.translate(state, x, cfg, noise) for _ in range(2))
    assert torch.equal(first, second) != noise
    calls = calls_of(monkeypatch, common, "translate_files", lambda *_, **__: None)
    pix2pix.generate(state, cfg, CPU)
    ((_, predict, *_),) = calls
    first, second = (predict(x.byte(), whole=noise) for _ in range(2))
    assert torch.equal(first, second) != noise


def test_dropout_of_the_measures_follows_the_seed(pairs, cache, monkeypatch):
    """And distances are those from the target."""
    cfg = dataclasses.replace(TINY, batch_size=1)
    state, val = build(cfg, CPU), open_data("pix2pix", pairs, cache, "val")
    compared = calls_of(monkeypatch, common.Scores, "add_distances")
    first, second = (pix2pix.evaluate(state, val, cfg, [0, 1]).table() for _ in range(2))
    other = dataclasses.replace(cfg, seed=1)
    assert first == second != pix2pix.evaluate(state, val, other, [0, 1]).table()
    assert torch.equal(compared[0][3], val.pair(next(val.in_order(np.arange(2))))[1])


@pytest.mark.cuda
def test_cuda_dropout_differs_from_replay_to_replay_and_follows_the_seed():
    device, cfg = torch.device("cuda"), dataclasses.replace(TINY, lr=0.0)
    state, batch = build(cfg, device), [x.to(device) for x in batch_of("pix2pix", cfg)]
    step, seen = common.fast_step(train_step, cfg, device), []
    for k in (0, 1, 2, 3, 4, 5, 4):
        common.seed_step(0, 0, k)
        seen.append(step(state, tuple(batch), cfg)["g_l1"].item())
    assert seen[4] != seen[5] and seen[4] == pytest.approx(seen[6], rel=1e-6)


def rates(losses, schedule="plateau"):
    """The share of --lr that a schedule leaves after each of these epochs."""
    cfg, state = dataclasses.replace(TINY, schedule=schedule, lr=1.0), State(nn.Identity())
    left = []
    for epoch, loss in enumerate(losses):
        left.append(pix2pix.learning_rate(state, cfg, epoch))
        pix2pix.follow_plateau(state, loss)
    return left


def test_the_plateau_halves_after_twenty_stalled_epochs_and_stops_at_a_hundredth():
    left = rates([10.0 - k for k in range(9)] + [1.0] * 400)
    assert left[:30] == [1.0] * 30 and left[30:50] == [0.5] * 20 and left[50] == 0.25
    assert min(left) == left[-1] == 0.01
    assert rates([0.99975**k for k in range(99)])[-1] == 1.0  # in twenty epochs by more than 0.1 %
    assert rates([0.99999**k for k in range(99)])[-1] < 1.0  # by less
    assert pix2pix.learning_rate(State(None), pix2pix.Config(schedule="constant", lr=1.0), 199) == 1


def test_a_label_map_is_translated_in_its_class_colours(tmp_path):
    """In an array there are no colours."""
    index = np.random.default_rng(0).integers(0, 3, (64, 64), np.uint8)
    np.save(tmp_path / "x.npy", index)
    paths = {"generate": (f"{tmp_path}/x.npy",), "out": f"{tmp_path}/new", "window": 64}
    cfg = dataclasses.replace(TINY, lc_classes=CLASSES.text, eval_norm="running", **paths)
    state = build(cfg, CPU)
    pix2pix.generate(state, cfg, CPU)
    x = common.draw(torch.from_numpy(index)[None], CLASSES)
    fake = to_bytes(pix2pix.translate(state, x, cfg))[0].permute(1, 2, 0)
    assert (pixels_of(tmp_path / "new" / "x.png") == fake.numpy()).all()


def test_the_judge_scores_photographs_of_label_maps(landcover, cache):
    """A judge that sees the input's classes in the model's fakes alone."""
    val = open_data("pix2pix", landcover, cache, "val")
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
    assert torch.equal(calls[2], calls[1].roll(1, 0))  # the floor: other places
