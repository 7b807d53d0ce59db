"""Runs of pix2pix.py from the command line: their folder, resuming, evaluation, generation."""

import copy
import dataclasses
import errno
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import matplotlib.axes
import numpy as np
import pytest
import torch
from PIL import Image

import common
import pix2pix
import support.run
from files import picture, pictures_in, pixels_of, save, vgg_file
from forks import forked
from pix2pix import Config, main
from runs import last, line_of, metrics_of, refused, rows_of, state_of, tiny_run, use
from support import processes
from support.checkpoints import RANKS, buffers_of_ranks, load_weights, save_checkpoint, state_dict
from support.demo import demo_world
from support.device import detached
from support.errors import UserError, print_once, refusing
from support.files import unlock
from support.options import parse
from support.plots import read_metrics
from tensors import CPU, as_rank, batch_of, calls_of, open_data, same, tiny

LAST = "checkpoints/last.pt"


def train(data, out, more=""):
    main(tiny_run("pix2pix", data, out, more))


def begun(words):
    """The Config of a program that begins with this command line."""
    return common.begin(Config, "", {}, words.split())[0]


@pytest.fixture(scope="module")
def done(trained):
    """A finished run of two epochs."""
    return trained("pix2pix")


# ----------------------------------------------------------------------------------- the run folder


def test_run_folder(done, pairs):
    names = {str(path.relative_to(done)) for path in done.rglob("*") if path.is_file()}
    assert names == {
        *(".lock", "config.json", "metrics.csv", "index.html", "losses.png", "evaluation.json"),
        *(f"samples/epoch_000{k}.png" for k in (1, 2)),
        *(f"checkpoints/{name}.pt" for name in ("last", "epoch_0001", "epoch_0002")),
    }
    about = json.loads((done / "config.json").read_text())
    assert about["options"]["width"] == 4 and about["versions"]["torch"] == torch.__version__
    rows = metrics_of(done)
    assert [row["epoch"] + row["step"] for row in rows] == ["12", "13", "25", "26"]
    assert [bool(row["val_psnr"]) for row in rows] == [False, True, False, True]
    report = json.loads((done / "evaluation.json").read_text())
    assert report["images"] == 3 and report["split"] == "val"
    assert (report["size"], report["data"]) == (64, str(pairs))
    baselines = ["copy of the input", "mean training colour", "median training colour"]
    assert list(report["rows"]) == ["model", *baselines]
    measures = "psnr ssim rmse rmse_rgb accuracy_5 accuracy_10 variety"
    assert list(report["rows"]["model"]) == measures.split()


def test_losses_png_has_a_panel_for_every_column(done, plot_metrics, tmp_path, monkeypatch):
    drawn = calls_of(monkeypatch, matplotlib.axes.Axes, "plot")
    titles = calls_of(monkeypatch, matplotlib.axes.Axes, "set_title")
    plot_metrics(metrics_of(done), tmp_path / "losses.png")
    assert [steps for _, steps, _ in drawn][1] == [2, 3, 5, 6]
    assert [name for _, name in titles] == list(metrics_of(done)[0])[2:]
    image = np.asarray(Image.open(tmp_path / "losses.png").convert("L"))
    assert image.shape == (3 * 234, 3 * 390)  # nine columns, three a row
    panels = image.reshape(3, 234, 3, 390).std((1, 3))
    assert (panels > 10).all()
    plot_metrics([], tmp_path / "none.png")  # a run that stops before its first row
    assert not (tmp_path / "none.png").exists()
    plot_metrics([{"epoch": "1", "step": "2", "g_l1": "7"}], tmp_path / "losses.png")
    assert (pixels_of(tmp_path / "losses.png")[..., :3] == (31, 119, 180)).all(-1).any()  # a dot


def test_sample_grid_shows_fixed_images_on_a_fixed_scale(done, pairs):
    """Input, fake, target; the second row of two is of the second validation image."""
    first, second = (pixels_of(done / "samples" / f"epoch_000{k}.png") for k in (1, 2))
    assert first.shape == (16 + 2 * 68, 4 + 3 * 68, 3) and (first != second).any()
    both = Image.open(pairs / "val" / "1.png")
    target, given = (both.crop((x, 0, x + 80, 80)).resize((64, 64), 3) for x in (0, 80))
    for sheet in (first, second):
        assert sheet[:16].min() < 128  # titles
        assert (sheet[84 : 84 + 64, 4 : 4 + 64] == np.asarray(given)).all()
        assert (sheet[84 : 84 + 64, 140 : 140 + 64] == np.asarray(target)).all()


@pytest.mark.parametrize(("seconds", "grids"), [(1e9, [1, 4, 5]), (0, [1, 2, 3, 4, 5])])
def test_what_is_written_on_the_way_is_written_on_a_clock(
    pairs, tmp_path, monkeypatch, seconds, grids
):
    """After the first and the last epoch, at --save-every, and when minutes have passed."""
    monkeypatch.setattr(common.Run, "seconds", seconds)
    monkeypatch.setattr(common.Run, "must_save", lambda run: (0, False))  # that is tested below
    saved, honest, run = [], common.Run.save, tmp_path / "run"
    monkeypatch.setattr(common.Run, "save", lambda r, s: saved.append(r.epoch) or honest(r, s))
    train(pairs, run, "--epochs 5 --save-every 4 --max-images 2")
    names = sorted(path.name for path in (run / "samples").iterdir())
    assert names == [f"epoch_{k:04}.png" for k in grids] and saved == grids
    assert {path.stem for path in (run / "checkpoints").iterdir()} == {"last", "epoch_0004"}
    assert state_of(run / "checkpoints" / "epoch_0004.pt")["epoch"] == 4
    rows = metrics_of(run)
    assert {row["epoch"] for row in rows} == set("12345") and rows[-1]["val_psnr"]


def test_processes_agree_when_to_save_and_when_to_stop(monkeypatch):
    """What one of them wants, all do: on GPUs every ten steps, and before a validation."""
    as_rank(monkeypatch, 0)
    other = torch.tensor(15)  # has had SIGTERM, and its clock is ahead
    largest = {torch.distributed.ReduceOp.MAX: torch.maximum}
    monkeypatch.setattr(support.run, "reduced", lambda tensor, how: largest[how](tensor, other))
    run = object.__new__(common.Run)
    run.interrupted, run.saved_at, run.steps_per_epoch = 2, time.monotonic(), 6
    for device, step, batch in (("cuda", 20, 2), ("cuda", 24, 6), ("cpu", 19, 1)):
        run.cfg, run.step, run.batch = types.SimpleNamespace(device=device), step, batch
        assert run.must_save() == [15, 15]
    run.cfg, run.step, run.batch = types.SimpleNamespace(device="cuda"), 19, 1
    assert run.must_save() == (0, False)


def test_a_signal_during_the_last_validation_stops_before_the_report(
    pairs, tmp_path, monkeypatch, capsys
):
    """A resume writes it."""
    honest, run = common.Run.end_epoch, tmp_path / "run"

    def end_epoch(run, *more):
        honest(run, *more)
        if run.epoch == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "end_epoch", end_epoch)
        with pytest.raises(SystemExit) as stopped:
            train(pairs, run, "--epochs 2")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert f"step 6: continue with --resume --out {run}\n" in capsys.readouterr().err
    assert not (run / "evaluation.json").exists()
    main(["--resume", "--out", str(run)])
    assert rows_of(run)["model"]


def test_default_folders_are_numbered_and_a_resume_finds_the_one_saved_last(
    done, pairs, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    outs = [begun(f"--data {pairs} --cache c").out for _ in range(2)]
    assert outs == ["runs/pix2pix", "runs/pix2pix-2"]  # at once, before there is what to save
    unlock()
    save_checkpoint(Path("runs/pix2pix-mine") / LAST, {})  # newer, but by no name of ours
    capsys.readouterr()
    for k, name in enumerate(("pix2pix-9", "pix2pix-10", "pix2pix")):
        shutil.copytree(done, f"runs/{name}")
        os.utime(f"runs/{name}/{LAST}", (k, k))
        cfg = begun("--resume --no-graph")
        assert (cfg.out, cfg.width, cfg.graph) == (f"runs/{name}", 4, False)
        remark = f"runs/{name} is the newest of {k + 1} runs: --out names another\n"
        assert (remark in capsys.readouterr().err) == (k > 0)


@pytest.mark.parametrize("missing", ["tensorboard", "wandb"])
def test_tracking_is_optional(missing, pairs, done, tmp_path, capsys, monkeypatch):
    for package in ("tensorboard", "wandb"):
        there = None if package == missing else types.SimpleNamespace(__spec__=True)
        monkeypatch.setitem(sys.modules, package, there)
    words = tiny_run("pix2pix", pairs, tmp_path / "run", "--track wandb")
    assert f"--track wandb: pip install {missing}" in line_of(main, words, capsys)
    assert not list(tmp_path.iterdir())  # before anything is decoded
    content, run = last(done), shutil.copytree(done, tmp_path / "run")
    content["config"] |= {"track": "wandb", "schedule": "constant"}  # on another machine
    torch.save(content, run / LAST)
    text = line_of(main, f"--resume --out {run} --epochs 3".split(), capsys)
    assert f"--track wandb: pip install {missing}" in text


def test_a_second_ctrl_c_ends_a_run_at_once_but_no_second_sigterm(capsys):
    run = object.__new__(common.Run)
    run.interrupted = 0
    raises = signal.default_int_handler  # KeyboardInterrupt, which a notebook survives
    for number, then in ((signal.SIGTERM, run._interrupt), (signal.SIGINT, raises)):
        signal.signal(number, run._interrupt)
        run._interrupt(number, None)
        assert run.interrupted == number and signal.getsignal(number) == then
    assert capsys.readouterr().err.count("stopping: ") == 1


def test_tracking_logs_scalars_and_samples(pairs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", types.SimpleNamespace(__spec__=True))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard := mock.MagicMock())
    made = calls_of(monkeypatch, support.run, "tracker")
    train(pairs, tmp_path / "run", "--track tensorboard --epochs 1")
    assert made[0][1] == last(tmp_path / "run")["id"] and len(made[0][1]) == 8
    folder = str(tmp_path / "run" / "tensorboard")
    tensorboard.SummaryWriter.assert_called_once_with(folder, purge_step=1)
    writer, any_value = tensorboard.SummaryWriter.return_value, mock.ANY
    scalars = [mock.call("g_l1", any_value, 2), mock.call("val_psnr", any_value, 3)]
    scalars.append(mock.call("lr", 2e-4, 3))
    writer.add_scalar.assert_has_calls(scalars, any_order=True)
    writer.add_image.assert_called_once_with("samples", any_value, 3, dataformats="HWC")
    monkeypatch.setitem(sys.modules, "wandb", wandb := mock.MagicMock())
    cfg = tiny("pix2pix", out=str(tmp_path), track="wandb")[1]
    support.run.tracker(cfg, "the run")
    how = wandb.init.call_args.kwargs
    assert (how["id"], how["resume"], how["sync_tensorboard"]) == ("the run", "allow", True)
    assert how["config"]["width"] == 4


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_closed_terminal_saves_but_nohup_is_obeyed(handler):
    before = signal.signal(signal.SIGHUP, handler)
    try:
        saves = signal.SIGHUP in runpy.run_path(processes.__file__)["SIGNALS"]
        assert saves == (handler is signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread_leaves_signals_alone(pairs, tmp_path):
    """Nor does it touch a handler that is not Python's, as in a program that embeds Python."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train, pairs, tmp_path / "run", "--epochs 1").result()
    assert (tmp_path / "run" / LAST).is_file()
    with mock.patch.object(signal, "getsignal", lambda number: None):
        assert processes.handled_signals() == []
    assert processes.handled_signals() == processes.SIGNALS


def test_what_a_run_of_several_rows_an_epoch_prints(pairs, tmp_path, monkeypatch, capsys):
    """Rows average as many steps, else curves zigzag at the ends of epochs: six, a row for four.

    The bar goes on after its estimate of the time left has begun anew.
    """
    closed, run = calls_of(monkeypatch, common.Run, "close"), tmp_path / "run"
    train(pairs, run, "--epochs 2 --batch-size 1 --log-every 4 --save-every 0")
    assert [row["step"] for row in metrics_of(run)] == ["3", "6", "9", "12"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # an evaluation ends at once again
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    said, ((closing,),) = capsys.readouterr().err, closed
    assert "epoch 1/2: g_total" in said and "squeezed" not in said and "is read" not in said
    means = np.mean([float(row["g_total"]) for row in metrics_of(run)[:2]])  # of the first epoch
    assert f"epoch 1/2: g_total {means:.4g}" in said and "val_rmse" in said.split("epoch 2/2")[0]
    assert closing.bar.n == closing.bar.total == 12 and "| 5/12 [00:00<?, ?image/s]" in said
    main(f"--resume --out {run}".split())
    assert f"run folder {run}: all epochs are done" in capsys.readouterr().err


def test_the_bar_counts_images_and_is_drawn_by_the_first_process(monkeypatch):
    cfg = types.SimpleNamespace(epochs=4)
    run = types.SimpleNamespace(cfg=cfg, epoch=2, batch=1, steps_per_epoch=5, images_per_step=3)
    for rank in (0, 1):
        monkeypatch.setattr(support.run, "rank", lambda rank=rank: rank)
        with common.Run._new_bar(run) as bar:
            assert (bar.n, bar.total, bar.disable) == (33, 60, rank == 1)
            assert rank or (bar.smoothing, bar.miniters, bar.mininterval) == (0, 1, 10)  # in a log
    monkeypatch.setattr(support.run, "rank", lambda: 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with common.Run._new_bar(run) as bar:
        assert bar.mininterval == 0.1


# ------------------------------------------------------------------------------------- exact resume


@pytest.fixture(scope="module")
def uninterrupted(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = forked(main, tiny_run("pix2pix", pairs, out, "--epochs 4"), log=f"{out}.txt")
    assert ended(process, f"{out}.txt") == 0
    return out


def ended(process, log):
    """The exit status of a process that ends by itself, or the number of its signal below 0."""
    process.join(120)
    assert process.exitcode is not None, Path(log).read_text()
    return process.exitcode


def test_a_fingerprint_sees_both_sides(pairs, cache, tmp_path):
    """Their pixels, and the names of all images."""
    store = open_data("pix2pix", pairs, cache).store
    found = {support.run.fingerprint(store, "")}
    for side in "AB":
        changed = getattr(store, side).copy()
        changed[0, 0, 0, 0] ^= 1
        setattr(store, side, changed)
        found.add(support.run.fingerprint(store, ""))
    for names in ("trainA/0.png trainB/0.png testA/0.png testB/0.png", "testB/1.png"):
        store = open_data("cyclegan", pictures_in(tmp_path, names), cache).store
        found.add(support.run.fingerprint(store, ""))
    assert len(found) == 5


def main_with_signal(argv, number):
    """A main that gets a signal during step 8, the second of its epoch."""
    end_step = common.Run.end_step

    def ending(run, state, losses):
        if run.step == 7:
            os.kill(os.getpid(), number)
        end_step(run, state, losses)

    common.Run.end_step = ending
    main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_resume_is_exact(pairs, tmp_path, uninterrupted, number):
    """Stopped in the middle of an epoch of three steps: the same weights and rows to the bit."""
    out, log = tmp_path / "run", tmp_path / "log.txt"
    argv = tiny_run("pix2pix", pairs, out, "--epochs 4")
    process = forked(main_with_signal, argv, number, log=log)
    killed = number == signal.SIGKILL
    assert ended(process, log) == (-number if killed else 128 + number), log.read_text()
    assert last(out)["step"] == (3 if killed else 8)  # killed: what was written on the clock
    process = forked(main, f"--resume --out {out}".split(), log=log)
    assert ended(process, log) == 0, log.read_text()
    assert (last(out)["step"], last(out)["epoch"]) == (12, 4)
    assert same(last(out)["state"], last(uninterrupted)["state"])
    assert (out / "metrics.csv").read_bytes() == (uninterrupted / "metrics.csv").read_bytes()


def test_a_long_epoch_is_saved_on_the_way(pairs, tmp_path, monkeypatch):
    """What kills a process in its first epoch costs what came after the last quarter of an hour."""
    end_step, now = common.Run.end_step, [0.0]

    def train_till_the_power_goes(run, state, losses):
        now[0] += 400.0  # seconds a step: due after the third, and not again by the fifth
        if run.step == 5:
            raise ConnectionError("the power is gone")
        end_step(run, state, losses)
        assert not run.of_epoch.sums.requires_grad  # or every step's graph would stay in memory

    long, runs = "--epochs 1 --save-every 1 --batch-size 1 --schedule plateau", tmp_path / "run"
    train(pairs, tmp_path / "whole", long)
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "end_step", train_till_the_power_goes)
        patch.setattr(time, "monotonic", lambda: now[0])
        with pytest.raises((ConnectionError, SystemExit)):
            train(pairs, runs, long)
    saved = last(runs)
    assert [saved[name] for name in ("epoch", "batch", "step")] == [0, 3, 3]
    main(f"--resume --out {runs}".split())
    assert same(last(runs)["state"], last(tmp_path / "whole")["state"])
    assert last(runs)["id"] == saved["id"]  # by which Weights & Biases finds the run
    assert last(runs)["state"]["best_loss"] < 9  # numbers are kept, too
    assert (runs / "metrics.csv").read_text() == (tmp_path / "whole/metrics.csv").read_text()


def test_rows_and_the_plateau_follow_the_losses_of_training(pairs, tmp_path, monkeypatch):
    """The mean since the last row; the mean of the epoch, whatever the validation error does."""
    losses, followed, honest = [], [], pix2pix.train_step

    def step(state, batch, cfg):
        found = honest(state, batch, cfg)
        losses.append(found["g_content" if cfg.content == "vgg" else "g_l1"].item())
        return found

    monkeypatch.setattr(pix2pix, "train_step", step)
    monkeypatch.setattr(pix2pix, "follow_plateau", lambda state, loss: followed.append(loss))
    train(pairs, tmp_path / "run", "--epochs 2 --schedule plateau")
    assert followed == pytest.approx([np.mean(losses[:3]), np.mean(losses[3:])])
    means = [np.mean(losses[:2]), losses[2], np.mean(losses[3:5]), losses[5]]
    assert [float(row["g_l1"]) for row in metrics_of(tmp_path / "run")] == pytest.approx(means)
    losses.clear()
    vgg_file(tmp_path / "vgg.pth")
    more = f"--epochs 1 --schedule plateau --content vgg --vgg16 {tmp_path}/vgg.pth --max-images 2"
    train(pairs, tmp_path / "vgg", more)
    assert followed[2:] == pytest.approx([np.mean(losses)])


FULL = OSError(28, "No space left on device"), RuntimeError("[enforce fail] . unexpected pos 64")


@pytest.mark.parametrize(
    ("module", "name", "error", "text"),
    [(os, "fsync", FULL[0], "No space left"), (torch, "save", FULL[1], "is the disk full")],
)
def test_checkpoint_is_whole_whenever_it_is_there(tmp_path, monkeypatch, module, name, error, text):
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"a": 1})
    monkeypatch.setattr(module, name, mock.Mock(side_effect=error))
    with refused(f"x.pt.*{text}"):
        save_checkpoint(path, {"a": 2})
    assert state_of(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_unpacks_to_more_is_not_unpacked(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data/0", bytes(10**6))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("unpacked"))
    with refused("x.pt: not a checkpoint, or a damaged one"):
        load_weights(tmp_path / "x.pt")


def test_a_checkpoint_of_a_gpu_is_read_onto_the_cpu(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"weight": torch.ones(2)}, tmp_path / "x.pt")
    assert load_weights(tmp_path / "x.pt")["weight"].device == CPU


def test_a_loss_that_is_not_finite_stops_the_run(pairs, tmp_path, monkeypatch, capsys):
    honest, calls = pix2pix.train_step, []

    def step(state, batch, cfg):
        calls.append(1)
        losses = honest(state, batch, cfg)
        return losses | ({"d_fake": losses["d_fake"] * float("nan")} if len(calls) == 5 else {})

    monkeypatch.setattr(pix2pix, "train_step", step)
    words = tiny_run("pix2pix", pairs, tmp_path / "run", "--epochs 4")
    text = line_of(main, words, capsys)
    assert "d_fake not finite by step 5" in text and "g_l1" not in text
    assert last(tmp_path / "run")["step"] == 3


def test_weights_that_are_not_finite_are_not_saved(pairs, tmp_path, monkeypatch, capsys):
    honest = pix2pix.evaluate

    def evaluate(state, *rest):
        scores = honest(state, *rest)
        next(state.D.parameters()).data.fill_(float("inf"))
        return scores

    words = tiny_run("pix2pix", pairs, tmp_path / "run", "--epochs 1")
    with monkeypatch.context() as patch:
        patch.setattr(pix2pix, "evaluate", evaluate)
        assert "weights not finite" in line_of(main, words, capsys)
    assert not (tmp_path / "run" / LAST).exists()
    main(words)  # starts again, without the rows of before
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == ["2", "3"]


def test_a_run_folder_names_its_script(tmp_path):
    for text, script in (('{"script": "pix2pix-ema"}', "pix2pix-ema"), ("{}", ""), ("", "")):
        (tmp_path / "config.json").write_text(text)
        assert support.begin._script_of(tmp_path) == script


def test_a_checkpoint_keeps_all_of_a_state_or_none():
    """Also of a changed script, whose resumed run would otherwise lack a part silently."""
    part = torch.nn.Parameter(torch.ones(1))
    state = types.SimpleNamespace(part=part, none=None, steps=3, best=0.5)
    saved = state_dict(state)
    assert set(saved) == {"part", "steps", "best"}
    saved = copy.deepcopy(saved)
    part.data += 1
    common.restore(state, {"state": saved}, "x.pt")
    assert part.item() == 1
    for value in ({"G": part}, [part], "text", np.float64(1)):  # torch.load refuses NumPy's
        with pytest.raises(TypeError, match="State.best is .*: a checkpoint keeps modules"):
            state_dict(types.SimpleNamespace(best=value))


@pytest.mark.parametrize("loss", [0.5, torch.ones(1), None])
def test_a_loss_is_a_0d_tensor(loss):
    with pytest.raises(TypeError, match="loss mine: train_step must return 0-d tensors"):
        detached({"g": torch.tensor(1.0), "mine": loss})


def test_options_from_python_are_checked():
    """A misspelt choice would silently mean the other one."""
    for wrong, message in (
        ({"norm": "batchnorm"}, "--norm batchnorm: choose from batch, instance"),
        ({"lambda_l1": -1.0}, "--lambda-l1 -1.0: must be at least 0.0"),
        ({"dropout": float("nan")}, "--dropout nan: must be at least 0.0"),
        ({"size": 100}, "--size 100: choose from 64, 128, 256, 512"),
        ({"width": "64"}, "--width 64: must be int"),
        ({"batch_size": 2**31}, "--batch-size 2147483648: must be at most 2147483647"),
    ):
        with pytest.raises(UserError, match=message):
            pix2pix.Config(**wrong)
        with pytest.raises(UserError, match=message):
            dataclasses.replace(pix2pix.Config(), **wrong)

    @dataclasses.dataclass(frozen=True)
    class Config(pix2pix.Config):
        lambda_mine: float = 1.0

    with pytest.raises(TypeError, match="Config.lambda_mine = ...: write option"):
        Config()


@pytest.mark.parametrize("epochs", [3, 4500])
def test_curves_of_a_long_run_have_some_of_its_rows(epochs, tmp_path):
    rows = [f"{1 + k * epochs // 9000},{k},{k % 7}" for k in range(9000)]
    path = tmp_path / "metrics.csv"
    begun = "9001,9000"  # a row that is being written
    path.write_text("\n".join(["epoch,step,g", *rows, begun]))
    found = read_metrics(path)
    steps = [int(row["step"]) for row in found]
    assert 2000 <= len(found) <= 4001 and steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 9000)
    assert all(int(row["g"]) == int(row["step"]) % 7 for row in found[:-1])
    ends = {9000 * k // epochs - 1 for k in range(1, epochs + 1)}
    assert len(ends & {*steps}) >= min(epochs, 2000)


def test_what_no_checkpoint_keeps_is_refused_at_the_first_step(pairs, tmp_path, monkeypatch):
    build, steps = pix2pix.build, calls_of(monkeypatch, pix2pix, "train_step")

    def with_a_list(*given):
        state = build(*given)
        state.history = [1]
        return state

    monkeypatch.setattr(pix2pix, "build", with_a_list)
    with pytest.raises(TypeError, match="State.history"):
        train(pairs, tmp_path / "run")
    assert len(steps) == 1 and not (tmp_path / "run").exists()


def test_moments_are_laid_out_like_their_parameters():
    """Fused Adam pairs elements by their place in memory: a checkpoint of other strides, as
    channels_last networks write it, must train on as if it had been restored without them.
    """
    cfg, batch = tiny("pix2pix")[1], batch_of("pix2pix", None)
    state, restored, plain = (pix2pix.build(cfg, CPU) for _ in range(3))
    for net in (state.G, state.D):
        net.to(memory_format=torch.channels_last)
    pix2pix.train_step(state, batch, cfg)
    saved = {"state": copy.deepcopy(state_dict(state))}
    saved["state"]["opt_G"]["param_groups"][0]["capturable"] = True  # as on a GPU
    common.restore(restored, copy.deepcopy(saved), "x.pt")
    for optimizer in ("opt_G", "opt_D"):
        for entry in saved["state"][optimizer]["state"].values():
            entry |= {key: entry[key].contiguous() for key in ("exp_avg", "exp_avg_sq")}
            entry["count"] = 7  # of another optimiser: a plain number
    common.restore(plain, saved, "x.pt")
    strides = [
        [moments["exp_avg"].stride() for moments in s.opt_G.state.values()]
        for s in (state, restored)
    ]
    assert strides[0] != strides[1] and not restored.opt_G.param_groups[0]["capturable"]
    for run in (restored, plain):
        torch.manual_seed(1)
        pix2pix.train_step(run, batch, cfg)
    for a, b in zip(restored.G.parameters(), plain.G.parameters(), strict=True):
        assert a.stride() == b.stride() and torch.equal(a, b)


def test_each_process_gets_its_own_buffers(monkeypatch):
    """Of three, the first of which saves and has a mean of 0."""
    state = pix2pix.State(torch.nn.BatchNorm2d(1), vgg=torch.nn.Module())  # as in use, without D
    state.vgg.register_buffer("weights", torch.zeros(1), persistent=False)
    state.stalled_epochs = 7
    others = [{"G": {"running_mean": torch.tensor([float(k)])}, "D": {}} for k in (1, 2)]

    def gather(own, gathered):
        assert list(own) == ["G"]
        gathered[:] = [own, *others]

    monkeypatch.setattr(torch.distributed, "gather_object", gather)
    as_rank(monkeypatch, 0, 3)
    saved, means = {"state": state_dict(state) | {RANKS: buffers_of_ranks(state)}}, []
    saved = copy.deepcopy(saved)
    for rank in range(4):  # a model may be used by more processes than trained it
        as_rank(monkeypatch, rank, 4)
        common.restore(state, saved, "x.pt")
        means.append(state.G.running_mean.item())
    assert means == [0, 1, 2, 0] and saved["state"]["stalled_epochs"] == 7


def test_a_checkpoint_of_several_processes_has_the_buffers_of_all(tmp_path, monkeypatch):
    as_rank(monkeypatch, 0)
    monkeypatch.setattr(support.run, "buffers_of_ranks", lambda _: [7])
    run, means = object.__new__(common.Run), support.run.Means()
    vars(run).update(dict.fromkeys(support.run.SAVED, 1), cfg=tiny("pix2pix")[1])
    vars(run).update(of_row=means, of_epoch=means, metrics=tmp_path / "no", last=tmp_path / "x.pt")
    run.save(pix2pix.State(torch.nn.Linear(1, 1)))
    content = state_of(run.last)
    assert content["world"] == 2 and content["state"][RANKS] == [7]


def test_of_several_processes_one_prints_and_writes(tmp_path, monkeypatch, capsys):
    """Each that cannot go on has a message, unless the first one's ends it before."""

    def ending(error):
        def main(argv):
            raise error

        return common.command(main)

    as_rank(monkeypatch, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    waited = []
    clock = types.SimpleNamespace(sleep=lambda _: waited.append(signal.getsignal(signal.SIGTERM)))
    monkeypatch.setattr(support.begin, "time", clock)
    common.write_evaluation(tiny("pix2pix", out=str(tmp_path))[1], {"model": {"rmse": 1.0}})
    common.command(lambda argv: print("a line"))()
    print_once("a remark")
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())
    assert line_of(ending(common.UserError("a mistake")), None, capsys) == "error: a mistake"
    assert waited == [signal.SIG_DFL]
    text = line_of(ending(PermissionError(errno.EACCES, "no entry", "data")), None, capsys)
    remedy = "ask for permission, close programs that use it, or choose another path"
    assert text == f"error: data: no entry: {remedy}"
    text = line_of(ending(OSError(errno.ELOOP, "a loop", "x.png")), None, capsys)
    assert text == "error: x.png: a loop: replace or remove it"
    for stop, code in ((KeyboardInterrupt(), 130), (KeyboardInterrupt(signal.SIGTERM), 143)):
        with pytest.raises(SystemExit) as stopped:
            ending(stop)()
        assert stopped.value.code == code and capsys.readouterr().err == "stopped\n"
    text = line_of(ending(RuntimeError("Connection closed by peer")), None, capsys)
    assert "another process of this run has ended" in text


def test_processes_with_another_run_or_other_images_are_refused(
    pairs, tmp_path, monkeypatch, capsys
):
    """As where each machine has its own file system."""
    for part in range(3):  # the folder, the step, the images

        def of_rank_0(seen, part=part):
            return (*seen[:part], None, *seen[part + 1 :])

        monkeypatch.setattr(support.run, "of_rank_0", of_rank_0)
        line = line_of(main, tiny_run("pix2pix", pairs, tmp_path / "run"), capsys)
        assert "another run, save or --data than in process 0" in line


@pytest.mark.parametrize("words", ["--generate x.png --checkpoint", "--serve --checkpoint"])
def test_torchrun_is_not_for_use(words, done, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = line_of(main, [*words.split(), str(done / LAST)], capsys)
    assert "start it without torchrun" in line


def test_measures_are_printed_before_they_are_written(tmp_path, capsys):
    """They may have taken hours, and the folder may be another user's."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        cfg = tiny("pix2pix", out=str(tmp_path / "file"))[1]
        common.write_evaluation(cfg, {"model": {"rmse": 1.0}})
    assert "1.0000" in capsys.readouterr().out


# ------------------------------------------------------------------------------ trained models used


def test_evaluation_needs_validation_images_alone(pairs, done, tmp_path, monkeypatch):
    """Results of a lone checkpoint lie in runs/."""
    shutil.copytree(pairs / "val", tmp_path / "data" / "val")
    shutil.copy(done / LAST, tmp_path / "mine.pt")
    monkeypatch.chdir(tmp_path)
    main(["--evaluate", "--checkpoint", "mine.pt", "--data", "data"])
    assert rows_of(tmp_path / "runs" / "mine") == rows_of(done)
    (tmp_path / "runs" / "mine" / "config.json").touch()
    with refused("runs/mine is another run, of the name of mine.pt: pass --out"):
        begun("--checkpoint mine.pt --evaluate")
    assert begun("--checkpoint mine.pt --evaluate --out new").out == "new"
    assert begun("--checkpoint mine.pt --serve").serve


def test_generate_keeps_names_and_sizes(done, tmp_path):
    """Of images and folders, in one command."""
    rng, sizes = np.random.default_rng(0), {"a.png": (70, 50), "b.jpg": (64, 64), "c.tif": (90, 30)}
    for name, (width, height) in sizes.items():
        save(tmp_path / "in" / name, picture(rng, height, width))
    save(tmp_path / "d.png", picture(rng, 70, 70))
    main(use(done, f"--generate {tmp_path}/in {tmp_path}/d.png", f"--out {tmp_path}/out"))
    found = {path.name: Image.open(path).size for path in (tmp_path / "out").iterdir()}
    assert found == sizes | {"d.png": (70, 70)}


def test_options_of_use_are_those_of_the_call(done, tmp_path):
    """Whatever the run was told; the model's own are the checkpoint's."""
    content = last(done)
    content["config"] |= {"train_judge": True, "split": "test", "device": "cuda", "seed": 7}
    torch.save(content, tmp_path / "x.pt")
    cfg = begun(f"--evaluate --checkpoint {tmp_path}/x.pt")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    assert (cfg.train_judge, cfg.split, cfg.device) == (False, "val", here)
    assert (cfg.width, cfg.seed) == (4, 7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_run_on_the_cpu_goes_on_there(pairs, tmp_path, monkeypatch):
    """Unless --device is typed: a GPU that is there now changes nothing."""
    main([*tiny_run("pix2pix", pairs, tmp_path / "run", "--epochs 1"), "--device", "auto"])
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["options"]["device"] == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg, device, _ = common.begin(Config, "", {}, f"--resume --out {tmp_path}/run".split())
    assert cfg.device == "cpu" and device.type == "cpu"


def test_init_from_our_checkpoint_and_from_a_bare_state_dict(done, pairs, tmp_path, monkeypatch):
    """Ours restores D as well; after a bare generator D begins anew."""
    weights, cfg = last(done)["state"], tiny("pix2pix")[1]
    bare, ours = tmp_path / "latest_net_G.pth", done / LAST
    torch.save({f"model.{k}.x": value for k, value in enumerate(weights["G"].values())}, bare)
    for path in (ours, bare):
        G = pix2pix.build(cfg, CPU).G
        common.load_network(G, path, cfg, "G")
        assert same(dict(G.state_dict()), weights["G"])
    at_once = f"--generate {pairs}/val/0.png --init {bare} --size 64 --width 4 --device cpu"
    main(f"{at_once} --out {tmp_path}/o".split())
    assert (tmp_path / "o" / "0.png").is_file()
    assert begun(at_once).out == "runs/pix2pix/generated"
    seen = []
    monkeypatch.setattr(pix2pix, "train_step", lambda state, *_: seen.append(state.D) or sys.exit())
    for init in (ours, bare):
        with pytest.raises(SystemExit):
            train(pairs, tmp_path / init.stem, f"--init {init}")
    kept, anew = (same(dict(D.state_dict()), weights["D"]) for D in seen)
    assert kept and not anew


def test_published_resnet_weights_with_instance_norm_buffers_load(tmp_path):
    """Files of old releases carry buffers that InstanceNorm no longer has."""
    cfg = Config(size=64, width=4, generator="resnet", norm="instance", blocks=2)
    G, old = pix2pix.build(cfg, CPU).G, {}
    for name, value in G.state_dict().items():
        old[f"model.{name}"] = torch.full_like(value, 0.5)
        if name.endswith("bias"):
            old |= {f"model.{name}.running_{kind}": value for kind in ("mean", "var")}
            old[f"model.{name}.num_batches_tracked"] = torch.tensor(3)
    torch.save(old, tmp_path / "old.pth")
    common.load_network(G, tmp_path / "old.pth", cfg, "G")
    assert all((value == 0.5).all() for value in G.state_dict().values())


# ------------------------------------------------------------------------------ errors and options


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("could not create a primitive"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"),  # on Windows
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
BUGS = "shape mismatch", "CUDA error: an illegal memory access", "connection timed out"


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, *map(RuntimeError, BUGS)], ids=repr)
def test_out_of_memory_is_one_line_and_a_bug_of_ours_keeps_its_traceback(error, capsys):
    def broken(argv):
        raise error

    if error in OUT_OF_MEMORY:
        with pytest.raises(type(error)), refusing("not the fault of a file"):
            raise error
        assert "out of memory: lower --batch-size" in line_of(common.command(broken), None, capsys)
        return
    with pytest.raises(RuntimeError, match=str(error)):
        common.command(broken)()


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for field in dataclasses.fields(Config):
        shown = "unset" if field.default in ("", ()) else field.default
        shown = {"True": "on", "False": "off"}.get(str(shown), shown)
        option = rf"{common.flag(field.name)}\b[^\[]*{re.escape(f'[{shown}]')}"
        assert re.search(option, text), field.name


def test_quick_changes_defaults_but_not_what_is_typed():
    cfg, given = parse(Config, "x", pix2pix.QUICK, ["--quick", "--width", 5, "--no-graph"])
    assert (cfg.size, cfg.width, cfg.epochs) == (64, 5, pix2pix.QUICK["epochs"])
    assert given == {"quick": True, "width": 5, "graph": False}
    cfg, _ = parse(Config, "x", {}, ["--generate", "a", "--generate", "b", "c"])
    assert cfg.generate == ("a", "b", "c")


@pytest.mark.slow
def test_training_on_the_demo_world_lowers_l1(tmp_path, capsys):
    """Without data: the demo world; L1 falls well below its start and the constant colours'."""
    demo_world(tmp_path / "cache", "maps", train=48, val=2, side=96)
    out = tmp_path / "run"
    shape = "--size 64 --width 12 --batch-size 4 --epochs 8 --log-every 4 --eval-norm running"
    main(f"{shape} --out {out}".split())
    assert "no --data: the images are invented landscapes" in capsys.readouterr().err
    losses = [float(row["g_l1"]) for row in metrics_of(out)]
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:2])
    assert rows_of(out)["model"]["rmse"] < rows_of(out)["median training colour"]["rmse"]


def test_a_checkpoint_is_used_from_its_own_folder(done, monkeypatch):
    monkeypatch.chdir(done / "checkpoints")
    out = begun("--generate last.pt --checkpoint last.pt").out
    assert Path(out).resolve() == done / "generated"


def test_the_commit_is_that_of_the_scripts(tmp_path, monkeypatch):
    called = calls_of(monkeypatch, subprocess, "check_output", lambda *_, **__: "abc\n")
    support.run.write_config(tiny("pix2pix", out=str(tmp_path))[1])
    assert str(Path(support.run.__file__).parent) in called[0][0]
    assert json.loads((tmp_path / "config.json").read_text())["git_commit"] == "abc"
