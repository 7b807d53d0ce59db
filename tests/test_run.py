"""The command line of pix2pix.py: runs, resume, evaluation, generation, and mistakes."""

import copy
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import pix2pix
import support.run
from conftest import as_rank, batch_of, line_of, picture, same, save, state_of
from pix2pix import Config, main
from support.checkpoints import save_checkpoint, state_dict
from support.demo import demo_world
from support.options import parse
from support.plots import read_metrics

ROOT = Path(__file__).parent.parent
TINY = "--size 64 --width 4 --batch-size 2 --log-every 2 --device cpu"
LAST = "checkpoints/last.pt"


def options(data, out, more=""):
    """The words of a command that trains a tiny model."""
    return f"--data {data} --out {out} --cache {Path(out).parent}/cache {TINY} {more}".split()


def test_the_time_left_leaves_the_first_steps_out(pairs, tmp_path, monkeypatch):
    """A CUDA graph is captured within them."""
    done, honest = [], support.run.tqdm.reset

    def reset(bar):
        done.append(bar.n)
        honest(bar)

    monkeypatch.setattr(support.run.tqdm, "reset", reset)
    main(options(pairs, tmp_path / "run", "--epochs 2"))
    assert done == [10]


def run(text):
    main(text.split())


def start(arguments):
    """pix2pix.py in a process of its own, on one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "pix2pix.py"), *arguments], stderr=subprocess.PIPE, env=env
    )


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    """A finished run of two epochs."""
    out = tmp_path_factory.mktemp("trained") / "run"
    main(options(pairs, out, "--epochs 2 --save-every 1"))
    return out


# ----------------------------------------------------------------------------------- the run folder


def test_run_folder(trained):
    names = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    assert names == {
        ".lock",
        "config.json",
        "metrics.csv",
        "index.html",
        "losses.png",
        "evaluation.json",
        "samples/epoch_0001.png",
        "samples/epoch_0002.png",
        "checkpoints/last.pt",
        "checkpoints/epoch_0001.pt",
        "checkpoints/epoch_0002.pt",
    }
    about = json.loads((trained / "config.json").read_text())
    assert about["options"]["width"] == 4 and about["versions"]["torch"] == torch.__version__


def test_metrics(trained):
    rows = read_metrics(trained / "metrics.csv")
    names = "epoch step lr g_total g_adv g_l1 d_total d_real d_fake val_psnr val_rmse"
    assert list(rows[0]) == names.split()
    assert [(row["epoch"], row["step"]) for row in rows] == [
        ("1", "2"),
        ("1", "3"),
        ("2", "5"),
        ("2", "6"),
    ]
    assert [bool(row["val_psnr"]) for row in rows] == [False, True, False, True]


def test_rows_of_an_epoch_average_as_many_steps(pairs, tmp_path):
    """Else curves zigzag at the ends of epochs. Six steps an epoch, a row for four at most."""
    main(options(pairs, tmp_path / "run", "--epochs 2 --batch-size 1 --log-every 4"))
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in rows] == ["3", "6", "9", "12"]


def test_losses_png_has_a_panel_for_every_column(trained, plot_metrics, tmp_path):
    plot_metrics(read_metrics(trained / "metrics.csv"), tmp_path / "losses.png")
    image = np.asarray(Image.open(tmp_path / "losses.png").convert("L"))
    assert image.shape == (3 * 234, 1170)  # nine columns, three a row
    for row in range(3):
        for column in range(3):
            panel = image[row * 234 : row * 234 + 234, column * 390 : column * 390 + 390]
            assert panel.std() > 10, (row, column)


def test_evaluation_needs_no_training_images(pairs, trained, tmp_path):
    shutil.copytree(pairs / "val", tmp_path / "data" / "val")
    use = f"--evaluate --checkpoint {trained}/{LAST}".split()
    main([*use, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    again, first = (
        json.loads((x / "evaluation.json").read_text()) for x in (tmp_path / "out", trained)
    )
    assert again["rows"] == first["rows"]


def test_a_long_epoch_is_saved_on_the_way(pairs, tmp_path, monkeypatch):
    """What kills a process in its first epoch costs what came after the last quarter of an hour."""
    end_step, now = common.Run.end_step, [0.0]

    def train_till_the_power_goes(run, state, losses):
        now[0] += 400.0  # seconds a step: due before the third
        if run.step == 3:
            raise ConnectionError("the power is gone")
        end_step(run, state, losses)

    long = "--epochs 2 --save-every 1 --batch-size 1"
    main(options(pairs, tmp_path / "whole", long))
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "end_step", train_till_the_power_goes)
        patch.setattr(time, "monotonic", lambda: now[0])
        with pytest.raises((ConnectionError, SystemExit)):
            main(options(pairs, tmp_path / "run", long))
    saved = state_of(tmp_path / "run/checkpoints/last.pt")
    assert (saved["epoch"], saved["batch"], saved["step"]) == (0, 3, 3)
    run(f"--resume --out {tmp_path}/run")
    ends = [state_of(tmp_path / name / "checkpoints/last.pt") for name in ("run", "whole")]
    assert same(ends[0]["state"], ends[1]["state"])
    assert (tmp_path / "run/metrics.csv").read_text() == (
        tmp_path / "whole/metrics.csv"
    ).read_text()


def test_processes_agree_when_to_save_and_when_to_stop(monkeypatch):
    """Every ten steps: what one of them wants, all do."""
    as_rank(monkeypatch, 0)
    other = torch.tensor(15)  # has had SIGTERM, and its clock is ahead
    monkeypatch.setattr(support.run, "reduced", lambda tensor, how: torch.maximum(tensor, other))
    run = object.__new__(common.Run)
    run.step, run.interrupted, run.saved_at = 19, 2, time.monotonic()
    assert not run.stopping() and not run.overdue()
    run.step = 20
    assert run.stopping() == 15 and run.overdue()


def test_nothing_is_left_of_a_run_that_could_not_begin(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no such directory" in line_of(main, f"--data nope {TINY}".split(), capsys)
    assert list(tmp_path.iterdir()) == []


def test_evaluation(trained):
    report = json.loads((trained / "evaluation.json").read_text())
    assert report["images"] == 3 and report["split"] == "val"
    assert list(report["rows"]) == [
        "model",
        "copy of the input",
        "mean training colour",
        "median training colour",
    ]
    measures = ["psnr", "ssim", "rmse", "rmse_rgb", "accuracy_5", "accuracy_10", "variety"]
    assert list(report["rows"]["model"]) == measures


def test_sample_grid_shows_fixed_images_on_a_fixed_scale(trained, pairs):
    first, second = (
        np.asarray(Image.open(trained / "samples" / f"epoch_000{k}.png")) for k in (1, 2)
    )
    assert first.shape == (16 + 3 * 68, 4 + 3 * 68, 3)
    target = np.asarray(
        Image.open(pairs / "val" / "1.png").crop((0, 0, 80, 80)).resize((64, 64), 3)
    )
    for sheet in (first, second):
        assert (sheet[16 + 68 : 16 + 68 + 64, 4 + 2 * 68 : 4 + 2 * 68 + 64] == target).all()
    assert (first != second).any()


def test_a_run_folder_is_never_written_over(trained, pairs, capsys, tmp_path, monkeypatch):
    assert "--resume" in line_of(main, options(pairs, trained), capsys)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/pix2pix/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/pix2pix/checkpoints/last.pt").touch()
    begin = f"--data {pairs} --cache {tmp_path}/cache".split()
    outs = [common.begin(Config, "", {}, begin)[0].out for _ in range(2)]
    assert outs == [
        "runs/pix2pix-2",
        "runs/pix2pix-3",
    ]  # claimed at once, before there is anything to save


def test_tracking_is_optional(pairs, tmp_path, capsys, monkeypatch):
    for package, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        text = line_of(main, options(pairs, tmp_path / package, f"--track {package}"), capsys)
        assert "pip install tensorboard" in text and package in text


def test_tracking_logs_scalars_and_samples(pairs, tmp_path, monkeypatch):
    logged = []

    class Writer:
        def __init__(self, folder):
            logged.append(folder)

        def add_scalar(self, name, value, step):
            logged.append((name, step))

        def add_image(self, name, image, step, dataformats):
            logged.append((name, step, image.shape[-1], dataformats))

        def flush(self):
            pass

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    main(options(pairs, tmp_path / "run", "--track tensorboard --epochs 1"))
    assert {("g_l1", 2), ("val_psnr", 3), ("samples", 3, 3, "HWC")} <= set(logged)


@pytest.mark.parametrize(("seconds", "grids"), [(1e9, [1, 4, 5]), (0, [1, 2, 3, 4, 5])])
def test_what_is_written_on_the_way_is_written_on_a_clock(
    pairs, tmp_path, monkeypatch, seconds, grids
):
    """After the first and the last epoch, at --save-every, and when minutes have passed."""
    monkeypatch.setattr(common.Run, "seconds", seconds)
    monkeypatch.setattr(common.Run, "overdue", lambda run: False)  # that is tested above
    saved, honest = [], common.Run.save

    def save(run, state):
        saved.append(run.epoch)
        honest(run, state)

    monkeypatch.setattr(common.Run, "save", save)
    main(options(pairs, tmp_path / "run", "--epochs 5 --save-every 4"))
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == [f"epoch_{k:04}.png" for k in grids] and saved == grids
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"last.pt", "epoch_0004.pt"}
    assert state_of(tmp_path / "run" / "checkpoints" / "epoch_0004.pt")["epoch"] == 4
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert {row["epoch"] for row in rows} == set("12345") and rows[-1]["val_psnr"]


# ------------------------------------------------------------------------------------- exact resume


@pytest.fixture(scope="module")
def uninterrupted(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = start(options(pairs, out, "--epochs 4"))
    assert process.wait(120) == 0, process.stderr.read().decode()
    return out


def wait_for_step(out, step, process):
    deadline = time.time() + 120
    while time.time() < deadline:
        rows = read_metrics(out / "metrics.csv")
        if rows and int(rows[-1]["step"]) >= step:
            return
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.002)
    raise AssertionError("the run never got there")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_resume_is_exact(pairs, tmp_path, uninterrupted, number):
    """Stopped in the middle of an epoch (3 steps each), resumed: the same weights and metrics to
    the bit.
    """
    out = tmp_path / "run"
    process = start(options(pairs, out, "--epochs 4"))
    wait_for_step(out, 8, process)
    process.send_signal(number)
    status = process.wait(60)
    assert status == (-number if number == signal.SIGKILL else 128 + number), (
        process.stderr.read().decode()
    )
    stopped = state_of(out / LAST)
    assert 3 <= stopped["step"] < 12  # killed: what was written on the clock
    process = start(f"--resume --out {out}".split())
    assert process.wait(120) == 0, process.stderr.read().decode()
    got, want = (state_of(folder / LAST) for folder in (out, uninterrupted))
    assert (got["step"], got["epoch"]) == (12, 4)
    assert same(got["state"], want["state"])
    assert (out / "metrics.csv").read_bytes() == (uninterrupted / "metrics.csv").read_bytes()


def test_resume_in_the_middle_of_an_epoch(pairs, tmp_path, monkeypatch):
    """In one process, at a step that is no multiple of --log-every: the running means survive,
    too.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(options(pairs, whole, "--epochs 3 --schedule plateau"))
    asked = iter([False, False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "stopping", lambda run: next(asked))
        with pytest.raises(SystemExit):
            main(options(pairs, parts, "--epochs 3 --schedule plateau"))
    stopped = state_of(parts / LAST)
    assert (stopped["epoch"], stopped["batch"], stopped["step"]) == (1, 1, 4)
    names, sums, count = stopped["of_row"]
    assert names[0] == "g_total" and len(sums) == len(names) and count == 1
    run(f"--resume --out {parts}")
    got, want = (state_of(folder / LAST) for folder in (parts, whole))
    assert same(got["state"], want["state"])
    assert (parts / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_plateau_follows_the_content_loss_of_training(pairs, tmp_path, monkeypatch):
    """Whatever the validation error does; as the mean of the epoch, in the middle of a log line."""
    seen, honest = [], pix2pix.train_step

    def step(state, batch, cfg):
        seen.append(honest(state, batch, cfg))
        return seen[-1]

    followed = []
    monkeypatch.setattr(pix2pix, "train_step", step)
    monkeypatch.setattr(pix2pix, "follow_plateau", lambda state, loss: followed.append(loss))
    more = "--epochs 2 --schedule plateau --log-every 2"
    main(options(pairs, tmp_path / "run", more))
    losses = [step["g_l1"].item() for step in seen]
    assert followed == pytest.approx([np.mean(losses[:3]), np.mean(losses[3:])])


def test_resume_finds_the_newest_default_run(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run(f"--data {pairs} {TINY} --epochs 1")
    cfg, _, checkpoint = common.begin(Config, "", {}, ["--resume"])
    assert cfg.out == "runs/pix2pix-2" and checkpoint["epoch"] == 1 and cfg.width == 4


def test_checkpoint_is_whole_whenever_it_is_there(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"a": 1})

    def breaks(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", breaks)
    with pytest.raises(common.UserError, match="No space left"):
        save_checkpoint(path, {"a": 2})
    assert torch.load(path, weights_only=True) == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_loss_that_is_not_finite_stops_the_run(pairs, tmp_path, monkeypatch, capsys):
    honest, calls = pix2pix.train_step, []

    def step(state, batch, cfg):
        calls.append(1)
        losses = honest(state, batch, cfg)
        return losses | ({"d_fake": losses["d_fake"] * float("nan")} if len(calls) == 5 else {})

    monkeypatch.setattr(pix2pix, "train_step", step)
    text = line_of(main, options(pairs, tmp_path / "run", "--epochs 4"), capsys)
    assert "d_fake not finite by step 5" in text and "g_l1" not in text
    assert state_of(tmp_path / "run" / LAST)["step"] == 3


def test_weights_that_are_not_finite_are_not_saved(pairs, tmp_path, monkeypatch, capsys):
    honest = pix2pix.evaluate

    def evaluate(state, *rest):
        scores = honest(state, *rest)
        next(state.D.parameters()).data.fill_(float("inf"))
        return scores

    monkeypatch.setattr(pix2pix, "evaluate", evaluate)
    assert "weights not finite" in line_of(
        main, options(pairs, tmp_path / "run", "--epochs 1"), capsys
    )
    assert not (tmp_path / "run" / LAST).exists()


# ------------------------------------------------------------------------------ trained models used


def test_evaluate(trained, tmp_path):
    run(f"--evaluate --checkpoint {trained}/{LAST} --out {tmp_path}")
    again, first = (
        json.loads((folder / "evaluation.json").read_text()) for folder in (tmp_path, trained)
    )
    assert again["rows"] == first["rows"]


def test_generate_keeps_names_and_sizes(trained, tmp_path):
    rng = np.random.default_rng(0)
    for name, (height, width) in {"a.png": (50, 70), "b.jpg": (64, 64), "c.tif": (30, 90)}.items():
        save(tmp_path / "in" / name, picture(rng, height, width))
    for source, out in (("in", "out"), ("in/a.png", "one")):
        use = f"--checkpoint {trained}/{LAST} --out {tmp_path}/{out}"
        run(f"--generate {tmp_path}/{source} {use}")
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out").iterdir()}
    assert sizes == {"a.png": (70, 50), "b.jpg": (64, 64), "c.tif": (90, 30)}
    one, many = (np.asarray(Image.open(tmp_path / folder / "a.png")) for folder in ("one", "out"))
    assert (one == many).all()


def test_generate_from_label_maps(landcover, tmp_path):
    main(options(landcover, tmp_path / "run", "--epochs 1"))
    checkpoint = str(tmp_path / "run" / LAST)
    run(f"--generate {landcover}/val/lc --checkpoint {checkpoint} --out {tmp_path}/out")
    assert Image.open(tmp_path / "out" / "0.png").size == (80, 80)
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert "mean_iou" not in report["rows"]["model"]  # BtoA: the target is the photograph


def test_options_of_use_are_those_of_the_call(trained, tmp_path):
    """Whatever the run was told; the model's own are the checkpoint's."""
    content = state_of(trained / LAST)
    content["config"] |= {"train_judge": True, "split": "test", "device": "cuda", "seed": 7}
    torch.save(content, tmp_path / "x.pt")
    cfg = common.begin(Config, "", {}, f"--evaluate --checkpoint {tmp_path}/x.pt".split())[0]
    here = "cuda" if torch.cuda.is_available() else "cpu"
    assert (cfg.train_judge, cfg.split, cfg.device) == (False, "val", here)
    assert (cfg.width, cfg.seed) == (4, 7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_run_on_the_cpu_goes_on_there(pairs, tmp_path, monkeypatch):
    """Unless --device is typed: a GPU that is there now changes nothing."""
    main(options(pairs, tmp_path / "run", "--epochs 1 --device auto"))
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["options"]["device"] == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg, device, _ = common.begin(Config, "", {}, f"--resume --out {tmp_path}/run".split())
    assert cfg.device == "cpu" and device.type == "cpu"


def test_moments_are_laid_out_like_their_parameters(tmp_path):
    """Fused Adam pairs elements by their place in memory: a checkpoint of other strides, as
    channels_last networks write it, must train on as if it had been restored without them.
    """
    cfg, batch = Config(size=64, width=4, batch_size=2, precision="fp32"), batch_of("pix2pix", None)
    state = pix2pix.build(cfg, torch.device("cpu"))
    for net in (state.G, state.D):
        net.to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    pix2pix.train_step(state, batch, cfg)
    torch.save({"state": state_dict(state)}, tmp_path / "x.pt")
    saved = torch.load(tmp_path / "x.pt")
    strides = [m["exp_avg"].stride() for m in saved["state"]["opt_G"]["state"].values()]
    restored = pix2pix.build(cfg, torch.device("cpu"))
    common.restore(restored, copy.deepcopy(saved), "x.pt")
    moments = restored.opt_G.state.values()
    assert strides != [m["exp_avg"].stride() for m in moments]
    plain = pix2pix.build(cfg, torch.device("cpu"))
    for optimizer in (saved["state"][name]["state"] for name in ("opt_G", "opt_D")):
        for entry in optimizer.values():
            for key in ("exp_avg", "exp_avg_sq"):
                entry[key] = entry[key].contiguous()
    common.restore(plain, saved, "x.pt")
    for run in (restored, plain):
        torch.manual_seed(1)
        pix2pix.train_step(run, batch, cfg)
    for a, b in zip(restored.G.parameters(), plain.G.parameters(), strict=True):
        assert a.stride() == b.stride() and torch.equal(a, b)


def test_init_from_our_checkpoint_and_from_a_bare_state_dict(trained, pairs, tmp_path):
    weights = state_of(trained / LAST)["state"]["G"]
    published = {f"model.{k}.x": value for k, value in enumerate(weights.values())}
    torch.save(published, tmp_path / "latest_net_G.pth")
    cfg = Config(size=64, width=4)
    for path in (trained / LAST, tmp_path / "latest_net_G.pth"):
        G = pix2pix.build(cfg, torch.device("cpu")).G
        common.load_network(G, path, cfg, "G")
        assert same(dict(G.state_dict()), weights)
    init = f"--init {tmp_path}/latest_net_G.pth {TINY} --out {tmp_path}/o"
    run(f"--generate {pairs}/val/0.png {init}")
    assert (tmp_path / "o" / "0.png").is_file()


def test_init_carries_the_discriminator_on(trained, pairs, tmp_path, monkeypatch):
    """Ours holds one; a bare generator does not, and D begins anew."""
    path, seen = trained / LAST, []
    torch.save(state_of(path)["state"]["G"], tmp_path / "bare.pth")

    def step(state, batch, cfg):
        seen.append(dict(state.D.state_dict()))
        sys.exit()

    monkeypatch.setattr(pix2pix, "train_step", step)
    for init in (path, tmp_path / "bare.pth"):
        with pytest.raises(SystemExit):
            main(options(pairs, tmp_path / init.stem, f"--init {init}"))
    assert same(seen[0], state_of(path)["state"]["D"]) and not same(seen[1], seen[0])


def test_published_resnet_weights_with_instance_norm_buffers_load(tmp_path):
    cfg = Config(size=64, width=4, generator="resnet", norm="instance", blocks=2)
    G = pix2pix.build(cfg, torch.device("cpu")).G
    old = {}
    for (
        name,
        value,
    ) in (
        G.state_dict().items()
    ):  # files of old releases carry buffers that InstanceNorm no longer has
        old[f"model.{name}"] = torch.full_like(value, 0.5)
        if name.endswith("bias"):
            old[f"model.{name}.running_mean"], old[f"model.{name}.running_var"] = value, value
            old[f"model.{name}.num_batches_tracked"] = torch.tensor(3)
    torch.save(old, tmp_path / "old.pth")
    common.load_network(G, tmp_path / "old.pth", cfg, "G")
    assert all((value == 0.5).all() for value in G.state_dict().values())


def test_damage_in_the_middle_of_a_checkpoint_is_noticed(trained, tmp_path, capsys):
    content = bytearray((trained / LAST).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = b"\0damage\0"
    (tmp_path / "last.pt").write_bytes(content)
    text = line_of(main, f"--evaluate --checkpoint {tmp_path}/last.pt".split(), capsys)
    assert "damaged" in text


def test_results_of_a_lone_checkpoint_lie_in_runs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.pt").write_bytes((trained / LAST).read_bytes())
    run("--evaluate --checkpoint mine.pt")
    assert (tmp_path / "runs" / "mine" / "evaluation.json").is_file()


def test_resume_survives_a_damaged_metrics_file(pairs, tmp_path, capsys):
    out = tmp_path / "run"
    main(options(pairs, out, "--epochs 1 --schedule constant"))
    rows = read_metrics(out / "metrics.csv")
    (out / "metrics.csv").write_bytes(
        (out / "metrics.csv").read_bytes() + b"\xff\xfenonsense,nonsense\n"
    )
    run(f"--resume --out {out} --epochs 2")
    assert read_metrics(out / "metrics.csv")[: len(rows)] == rows


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent(pairs, tmp_path, capsys):
    arguments = options(pairs, tmp_path / "run", "--device cuda")
    assert "--device cuda: no CUDA device" in line_of(main, arguments, capsys)


def test_unaligned_data_is_refused_by_pix2pix(tmp_path, capsys):
    for folder in ("trainA", "trainB", "testA", "testB"):
        save(tmp_path / "data" / folder / "0.png", np.zeros((8, 8, 3), np.uint8))
    assert "cyclegan.py" in line_of(main, options(tmp_path / "data", tmp_path / "run"), capsys)


def test_vgg16_that_cannot_be_fetched_says_what_to_do(pairs, tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    text = line_of(main, options(pairs, tmp_path / "run", "--content vgg"), capsys)
    assert "vgg16-397923af.pth" in text and "--vgg16 FILE" in text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("could not create a primitive"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_names_the_options_that_lower_it(error, capsys):
    def greedy(argv):
        raise error

    assert "out of memory: lower --batch-size" in line_of(common.command(greedy), None, capsys)


def test_a_bug_of_ours_keeps_its_traceback():
    def broken(argv):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        common.command(broken)()


# ------------------------------------------------------------------------------------------ options


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for field in dataclasses.fields(Config):
        shown = "none" if field.default in ("", ()) else field.default
        shown = {"True": "on", "False": "off"}.get(str(shown), shown)
        assert re.search(rf"{common.flag(field.name)}\b[^\[]*{re.escape(f'[{shown}]')}", text), (
            field.name
        )


def test_quick_changes_defaults_but_not_what_is_typed():
    cfg, given = parse(Config, "x", pix2pix.QUICK, ["--quick", "--width", "5"])
    assert (cfg.size, cfg.width, cfg.epochs) == (64, 5, pix2pix.QUICK["epochs"])
    assert given == {"quick": True, "width": 5}


def test_negative_flags_exist():
    assert parse(Config, "x", {}, ["--no-graph"])[0].graph is False


@pytest.mark.slow
def test_training_on_the_demo_world_lowers_l1(tmp_path):
    """Without data: the demo world; L1 falls well below its start, and below the constant colours'
    level.
    """
    demo_world(tmp_path / "cache", "maps", train=48, val=2, side=96)
    out = tmp_path / "run"
    shape = ["--size", "64", "--width", "12", "--batch-size", "4"]
    main([*shape, "--epochs", "8", "--log-every", "4", "--eval-norm", "running", "--out", str(out)])
    rows = read_metrics(out / "metrics.csv")
    first, last = (np.mean([float(row["g_l1"]) for row in part]) for part in (rows[:2], rows[-4:]))
    assert last < 0.5 * first
    table = json.loads((out / "evaluation.json").read_text())["rows"]
    assert table["model"]["rmse"] < table["median training colour"]["rmse"]
