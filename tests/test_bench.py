"""Tools that answer a question once: masks, seams, texture, controls, the parts for a GPU."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace

import bench_epoch
import bench_step
import draw_controls
import draw_raster
import forged_masks
import gpu
import numpy as np
import pytest
import seams
import texture
import torch
from paths import ROOT

import common
import cyclegan
import harness
import pix2pix
from files import land_cover
from mixlc_acgan import style_loss
from runs import tiny_run
from support.windows import tiles
from tensors import calls_of, open_data


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


def test_photograph_and_mask_are_turned_together():
    records = torch.randint(0, 256, (1, 1, 16, 16), dtype=torch.uint8).repeat(100, 4, 1, 1)
    seen = forged_masks.turned(records, np.random.default_rng(0))
    assert torch.equal(seen[:, 0], seen[:, 3]) and len(seen.unique(dim=0)) == 8


@pytest.mark.slow
def test_the_segmenter_gets_real_tiles_and_forged_ones_made_of_them(tmp_path, monkeypatch, capsys):
    """n real tiles always, forged ones beside them; held-out tiles are the validation split's."""
    given, learnt, masks = (
        calls_of(monkeypatch, forged_masks, name)
        for name in ("mean_iou", "learn_to_paint", "forge")
    )
    data, cache = land_cover(tmp_path / "data"), str(tmp_path / "cache")
    words = "--patch 80 --size 64 --width 2 --tiles 3 --seeds 2 --forged 2 --paint-steps 1"
    forged_masks.main([*words.split(), "--steps", "1", "--data", str(data), "--cache", cache])
    assert "3 tiles, seed 1, real + 2 x forged, augmented: 0." in capsys.readouterr().out
    cfg = pix2pix.Config(data=str(data), patch=80, size=64, cache=cache)
    train, held = (forged_masks.tiles_of(cfg, split) for split in ("train", "val"))
    cases = [(seed, len(records), augment) for records, _, _, augment, seed, _ in given]
    assert cases == list(itertools.product((0, 1), (3, 9), (False, True)))
    for records, val, *_ in given:
        known = [any(torch.equal(tile, real) for real in train) for tile in records]
        assert torch.equal(val, held) and known == [True] * 3 + [False] * (len(records) - 3)
    for k in range(2):
        assert torch.equal(learnt[k][0], given[4 * k][0])
        assert torch.equal(masks[k][0], learnt[k][0][:, 3])
    assert not torch.equal(given[0][0], given[4][0]), "another seed takes other tiles"


@pytest.mark.slow
def test_controls_and_raster_are_drawn(tmp_path):
    """The title of a run is its difference from the first; a raster is translated in three ways."""
    data = land_cover(tmp_path / "data", train=2, val=2, side=160)
    for name, more in (("a", ""), ("b", "--lambda-l1 7")):
        words = f"--patch 80 --width 2 --epochs 1 {more}"
        pix2pix.main(tiny_run("pix2pix", data, tmp_path / name, words))
    kept, drawn = draw_controls.controls([tmp_path / "a", tmp_path / "b"])
    ways = "own statistics", "running statistics"
    assert [*kept] == [f"{run}, {way}" for run in ("no change", "--lambda-l1 7") for way in ways]
    assert all(0 < row["rmse"] < 255 and -1 <= row["alike"] <= 1 for row in kept.values())
    checkpoint = str(tmp_path / "a" / "checkpoints" / "last.pt")
    for sheet in (drawn, draw_raster.raster(checkpoint, str(data / "val/lc/0.png"))):
        assert np.asarray(sheet).std() > 10


def test_pictures_of_one_pattern_are_alike():
    rng = torch.Generator().manual_seed(0)
    pattern, other = torch.randn(2, 1, 3, 64, 64, generator=rng)
    assert draw_controls.alike(pattern.repeat(3, 1, 1, 1)).tolist() == pytest.approx([1, 1, 1])
    assert draw_controls.alike(torch.cat([pattern, other])).abs().max() < 0.1


def test_seams_of_stripes_and_of_noise():
    """Windows of different brightness show as a step; noise alone shows none."""
    noise = np.random.default_rng(0).integers(100, 140, (256, 256, 3))
    stripes = noise.copy()
    starts = [start for start, _ in tiles(256, 64)]
    for k, (a, b) in enumerate(zip(starts, starts[1:], strict=False)):
        stripes[(a + 64 + b) // 2 :] += 20 * (-1) ** k
    assert seams.seams(noise, 64)[1] == pytest.approx(1, abs=0.5)
    assert seams.seams(stripes, 64)[1] > 3


@pytest.mark.slow
def test_texture_is_the_style_loss_of_each_row_and_of_other_places(trained, pairs, cache):
    vgg = common.VGG16Features(["relu1_1"], "random", "")
    last = "checkpoints/last.pt"
    rows = texture.measured(pix2pix, str(trained("pix2pix") / last), str(pairs), vgg)
    val = open_data("pix2pix", pairs, cache, "val")
    x, y = val.pair(torch.cat(list(val.in_order(np.arange(3)))))
    by_hand = {"copy of the input": style_loss(vgg, x, y).item()}
    by_hand["real, of another place"] = style_loss(vgg, y[1:], y[:-1]).item()
    for row, value in by_hand.items():
        assert rows[row]["texture"] == pytest.approx(value, rel=1e-4), row
    assert {"model", "mean training colour"} <= set(rows)
    both = texture.measured(cyclegan, str(trained("cyclegan") / last), str(pairs), vgg)
    assert {"A to B: real, of another place", "B to A: real, of another place"} <= set(both)


@pytest.mark.parametrize("missing", ["torch", "filelock"])
def test_the_parts_for_a_gpu_stop_without_what_they_need(missing, tmp_path):
    (tmp_path / missing).mkdir()
    error = f"raise ModuleNotFoundError(\"No module named '{missing}'\")"
    (tmp_path / missing / "__init__.py").write_text(error)
    bash = shutil.which("bash")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)  # and no python
    (tmp_path / "bin" / "dirname").symlink_to(shutil.which("dirname"))
    env = {"PATH": str(tmp_path / "bin"), "PYTHONPATH": str(tmp_path)}
    env["PYTHONPATH"] += os.pathsep + os.pathsep.join(path for path in sys.path if path)
    call = [bash, str(ROOT / "bench/gpu.sh"), "1", str(tmp_path / "out")]
    done = subprocess.run(call, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and f"'{missing}'" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.fixture
def session(tmp_path):
    return gpu.Session(Namespace(out=tmp_path / "out", maps=None, landcover="lc", vgg16=None), True)


def test_a_command_that_ended_well_is_left_out_next_time(session):
    for name, code in (("good", "pass"), ("bad", "raise SystemExit(3)"), ("good", "1 / 0")):
        session.do(name, 60, "-c", code)
    session.do("bad", 60, "-c", "pass")
    said = [line.split(" after")[0] for line in (session.out / "summary.txt").open()]
    assert said == ["good: exit 0", "bad: exit 3", "bad: exit 0"]


def test_a_large_file_is_packed_in_pieces(session, monkeypatch):
    monkeypatch.setattr(gpu, "PIECE", 1000)
    for name, size in (("a", 2500), ("b", 1000)):
        (session.work / f"{name}.pt").write_bytes(bytes(range(250)) * (size // 250))
    session.pack()
    pack = session.out / "pack"
    assert sorted(path.name for path in pack.glob("*.pt*")) == [
        *("a.pt.00", "a.pt.01", "a.pt.02", "b.pt")
    ]
    joined = b"".join((pack / f"a.pt.0{k}").read_bytes() for k in range(3))
    assert joined == (session.work / "a.pt").read_bytes()


def test_epochs_follow_from_the_time_of_one(session, monkeypatch):
    """One of 2 s. Edits are cut into patches of their data."""
    measured = subprocess.CompletedProcess([], 0, stdout="loading\n2.0\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: measured)
    assert [gpu.epochs_of("pix2pix", [], minutes) for minutes in (3, 0)] == ["90", "1"]
    assert "--patch 256" in " ".join(session.options("mixlc", ""))
    assert "--patch" not in session.options("pix2pix", "")


def test_every_benchmark_of_the_gpu_is_timed_once_by_its_name(session, monkeypatch):
    """The fast path comes first."""
    session.toy, asked = False, []
    monkeypatch.setattr(session, "do", lambda name, seconds, *words: asked.append(words[2:5:2]))
    gpu.times(session)
    for bench in (bench_step, bench_epoch):
        names = [case.id for case in bench.CASES if "-cuda-" in case.id]
        words = [word for file, word in asked if file == f"bench/{bench.__name__}.py"]
        assert sorted(name for word in words for name in names if word in name) == sorted(names)
    first = asked[: 3 * len(harness.SCRIPTS)]
    asked.clear()
    gpu.times(session, fast_only=True)
    assert asked == first


def test_no_training_begins_after_the_signal_to_stop(session, monkeypatch):
    """Which arrives while the epochs of the first are found."""
    monkeypatch.setattr(gpu, "epochs_of", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or "1")
    trained = calls_of(monkeypatch, subprocess, "run", lambda *_, **__: None)
    handler = signal.getsignal(signal.SIGTERM)
    session.train(1)
    signal.signal(signal.SIGTERM, handler)
    assert not trained


def test_the_third_part_packs_what_it_evaluates(session, monkeypatch):
    for name in ("draw", "stop"):
        monkeypatch.setattr(gpu.Session, name, lambda *_: None)
    monkeypatch.setattr(
        gpu.Session, "finish", lambda session, name: save(session.work / name / gpu.SMALL[0])
    )
    gpu.play(session, 3)
    assert all((session.out / name / "evaluation.json").is_file() for name in gpu.RUNS)
    assert (session.out / "pack" / "small.tar.gz").is_file()


def save(path):
    path.parent.mkdir()
    path.write_text("{}")
