"""The folder of a training run: metrics, samples, checkpoints, signals."""

import contextlib
import csv
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from support.batches import steps_in_epoch
from support.checkpoints import RANKS, buffers_of_ranks, save_checkpoint, state_dict, tensors_of
from support.device import set_lr
from support.errors import UserError
from support.files import UNFINISHED, write_text
from support.pictures import grid, save_grid
from support.plots import plot_metrics, read_metrics, write_page
from support.processes import of_rank_0, rank, reduced, world_size

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    SIGNALS.append(signal.SIGHUP)  # nohup ignores it
REMEDY = "try a lower --lr, --precision fp32, or look for odd images in the data"


class Run:
    """The folder of one training run: config.json, metrics.csv, losses.png, samples, checkpoints.

    cfg, checkpoint  as begin gave them
    data             the training data: its len() images are an epoch, its store has histograms
    scores           names of the measures that close an epoch's last row of metrics.csv

    epoch, batch, step  where training stands: epochs done, batches done in this one, steps in all
    histograms          of the training images, which evaluations compare with
    interrupted         the number of a signal (one of SIGNALS) that asked to stop, else 0
    """

    seconds = 180  # between what is written after epochs; within one, five times as long

    def __init__(self, cfg, checkpoint, data, scores=()):
        saved = checkpoint or {}
        self.cfg, self.scores, self.out = cfg, scores, Path(cfg.out)
        self.steps_per_epoch = steps_in_epoch(len(data), cfg.batch_size)
        self.images_per_step = cfg.batch_size * world_size()
        self.epoch, self.batch, self.step = (saved.get(k, 0) for k in ("epoch", "batch", "step"))
        self.names, self.sums = saved.get("names", []), saved.get("sums")
        self.count, self.means, self.lr = saved.get("count", 0), {}, 0.0
        self.epoch_sums = saved.get("epoch_sums")
        self.histograms = saved.get("histograms") or data.store.histograms()
        self.window = saved.get("window") or data.store.window()
        self.images = data.store.fingerprint()
        changed = saved.get("images", self.images) != self.images
        if changed:  # the same place in the schedule, with the epoch from its beginning
            self.batch, self.sums, self.count, self.epoch_sums = 0, None, 0, None
        self.id = saved.get("id") or uuid.uuid4().hex[:8]
        self.clock, self.first_step, self.written = None, self.step, -math.inf
        self.interrupted, self.overdue, self.saved = 0, False, time.monotonic()
        for number in SIGNALS:
            signal.signal(number, self._interrupt)
        if rank():
            self.bar = tqdm(disable=True)
            return
        for folder in ("checkpoints", "samples"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        self._tidy()
        self._write_config()
        self.metrics = self.out / "metrics.csv"
        self.metrics.touch()
        size = self.metrics.stat().st_size
        os.truncate(self.metrics, min(saved.get("metrics_bytes", size), size) if saved else 0)
        self.tracker = _tracker(cfg, self.id) if cfg.track else None
        total = cfg.epochs * self.steps_per_epoch * self.images_per_step
        done = self.step * self.images_per_step
        self.bar = tqdm(total=total, initial=done, unit="image", dynamic_ncols=True, smoothing=0.05)
        self.say(f"run folder {self.out}")
        if changed:
            self.say(f"the images are not those of before: epoch {self.epoch + 1} begins anew")

    def _tidy(self):
        """After a process that was killed: drops its temporary files, links what it had saved."""
        for folder in (self.out, self.out / "checkpoints", self.out / "samples"):
            for path in folder.glob(f"{UNFINISHED}*"):
                path.unlink()
        folder, every = self.out / "checkpoints", self.cfg.save_every
        last, kept = folder / "last.pt", folder / f"epoch_{self.epoch:04}.pt"
        due = every and self.epoch and self.epoch % every == 0 and self.batch == 0
        if due and last.is_file() and not kept.is_file():
            _link(last, kept)

    def say(self, text):
        """A line on stderr, above the progress bar."""
        if rank() == 0:
            self.bar.write(text, file=sys.stderr)

    def _write_config(self):
        cuda = self.cfg.device == "cuda"
        packages = {package.__name__: package.__version__ for package in (torch, np)}
        about = {
            "script": self.cfg.script,
            "options": dataclasses.asdict(self.cfg),
            "versions": {"python": platform.python_version()} | packages,
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
            "processes": world_size(),
            "git_commit": _git_commit(),
            "defaults": dataclasses.asdict(type(self.cfg)()),
        }
        write_text(self.out / "config.json", json.dumps(about, indent=2))

    def _interrupt(self, number, frame):
        self.interrupted = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        if rank() == 0:
            os.write(2, b"\nstopping: this step is finished and saved first\n")

    def stopping(self):
        """Whether to save and stop; notes whether to save. Several processes agree on both, every
        ten steps.
        """
        overdue, self.overdue = time.monotonic() - self.saved > 5 * self.seconds, False
        if world_size() > 1:
            if self.step % 10:
                return False
            asked = torch.tensor([self.interrupted, int(overdue)])
            self.interrupted, overdue = reduced(asked, dist.ReduceOp.MAX).tolist()
        self.overdue = bool(overdue)
        return self.interrupted != 0

    def set_lr(self, lr, *optimizers):
        """Gives optimizers the rate lr, which is logged."""
        self.lr = lr
        for optimizer in optimizers:
            set_lr(optimizer, lr)

    def end_step(self, state, losses):
        """Closes a step with losses {name: 0-d tensor}; their means are read every --log-every
        steps. Saves where it is time to, and after a signal, which then ends the program.
        """
        self.names = list(losses)
        values = torch.stack([value.detach().double() for value in losses.values()])
        self.sums = values if self.sums is None else self.sums.to(values.device) + values
        if self.batch == 0 or self.epoch_sums is None:
            self.epoch_sums = torch.zeros_like(values)
        self.epoch_sums = self.epoch_sums.to(values.device) + values
        self.count, self.step, self.batch = self.count + 1, self.step + 1, self.batch + 1
        self.bar.update(self.images_per_step)
        if self.step - self.first_step in (1, 4):
            self._warn_of_weeks()
        if self.step % self.cfg.log_every == 0 and self.batch < self.steps_per_epoch:
            self._flush({})  # an epoch's last row waits for its scores
        self._save_if_due(state)

    def epoch_mean(self, name):
        """The mean of a loss over the epoch that ends, in all processes."""
        mean = reduced(self.epoch_sums) / world_size() / self.batch
        return mean[self.names.index(name)].item()

    def _warn_of_weeks(self):
        """After a few steps: how long the run takes, if that is more than two days."""
        if self.clock is None:
            self.clock = time.monotonic()
            return
        seconds = (time.monotonic() - self.clock) / 3
        left = self.cfg.epochs * self.steps_per_epoch - self.step
        days = seconds * left / 86400
        if days > 2:
            remedy = "--size 128 --width 32 --epochs 20 --max-images 400 would make it hours"
            self.say(f"{seconds:.2g} s a step: this run takes {days:.0f} days here; {remedy}")

    def _flush(self, scores):
        means = reduced(self.sums / self.count) / world_size()
        self.means = dict(zip(self.names, means.tolist(), strict=True))
        values = self.means | scores
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            self._refuse(", ".join(bad))
        if rank() == 0:
            header = ["epoch", "step", "lr", *self.means, *self.scores]
            numbers = [*self.means.values(), *(scores.get(name) for name in self.scores)]
            row = [self.epoch + 1, self.step, f"{self.lr:.8g}"]
            row += ["" if number is None else f"{number:.8g}" for number in numbers]
            with open(self.metrics, "a", newline="") as file:
                csv.writer(file).writerows([row] if file.tell() else [header, row])
            if self.tracker:
                self.tracker(values | {"lr": self.lr}, {}, self.step)
            shown = {name: f"{value:.3g}" for name, value in self.means.items()}
            self.bar.set_postfix(shown, refresh=False)
        self.sums, self.count = None, 0

    def _refuse(self, what):
        last = self.out / "checkpoints" / "last.pt"
        kept = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint yet"
        raise UserError(f"{what} not finite by step {self.step}: stopped; {kept}; {REMEDY}")

    def end_epoch(self, state, scores, columns):
        """Closes an epoch: its last row with scores {name: value}, and what is written on a clock.

        That is grid, plot and checkpoint: every few minutes, as an epoch may take a second, after
        the first and the last epoch, and where --save-every says so.

        columns  {title: (B, 3, H, W) in [-1, 1]}, the sample grid from left to right
        """
        self._flush(scores)
        self.epoch, self.batch = self.epoch + 1, 0
        values = (self.means | scores).items()
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values)
        self.say(f"epoch {self.epoch}/{self.cfg.epochs}: {shown}")
        keep = self.cfg.save_every > 0 and self.epoch % self.cfg.save_every == 0
        waited = time.monotonic() - self.written > self.seconds
        if not of_rank_0(waited or keep or self.epoch == self.cfg.epochs):
            return
        if rank() == 0:
            save_grid(self.out / "samples" / f"epoch_{self.epoch:04}.png", columns)
            plot_metrics(read_metrics(self.metrics), self.out / "losses.png")
            write_page(self.out)
            if self.tracker:
                self.tracker({}, columns, self.step)
        self.save(state)
        if rank() == 0 and keep:
            kept = self.out / "checkpoints" / f"epoch_{self.epoch:04}.pt"
            _link(self.out / "checkpoints" / "last.pt", kept)
        self.written = time.monotonic()

    def save(self, state):
        """Writes checkpoints/last.pt, unless a weight is not finite: then the old one stays."""
        self.saved, content = time.monotonic(), state_dict(state)
        tensors = [t for t in tensors_of(content) if t.is_floating_point() and t.numel()]
        finite = torch.stack([t.detach().abs().max().isfinite().cpu() for t in tensors])
        if not finite.all():
            self._refuse("weights")
        if world_size() > 1:
            content[RANKS] = buffers_of_ranks(state)
        if self.sums is not None:  # of all processes, for all of them to go on with
            self.sums = reduced(self.sums) / world_size()
        self.epoch_sums = reduced(self.epoch_sums) / world_size()
        if rank() == 0:
            about = {
                "script": self.cfg.script,
                "config": dataclasses.asdict(self.cfg),
                "world": world_size(),
                "metrics_bytes": self.metrics.stat().st_size,
                "state": content,
            }
            names = ("epoch", "batch", "step", "names", "sums", "count", "epoch_sums")
            names += ("histograms", "window", "images", "id")
            about |= {name: getattr(self, name) for name in names}
            save_checkpoint(self.out / "checkpoints" / "last.pt", about)

    def _save_if_due(self, state):
        """In the middle of an epoch: saves every quarter of an hour, and after a signal, which then
        ends the program with 128 + its number.
        """
        stopping = self.stopping()
        if not stopping and not self.overdue:
            return
        self.save(state)
        if rank() == 0:
            plot_metrics(read_metrics(self.metrics), self.out / "losses.png")
        if not stopping:
            return
        self.say(f"stopped at step {self.step}: go on with --resume --out {self.out}")
        self.bar.close()
        sys.exit(128 + self.interrupted)

    def close(self):
        """Ends the run: the signals are given back; an evaluation may follow."""
        self.bar.close()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _link(source, target):
    """A second name for a file that will only ever be replaced, never changed."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy(source, target)


def _git_commit():
    """The commit of these scripts, or None where they are not in a repository."""
    call = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "--quiet", "HEAD"]
    with contextlib.suppress(OSError):
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None


def _tracker(cfg, run_id):
    """tracker(scalars, images, step): TensorBoard, which Weights & Biases copies if asked to."""
    try:
        if cfg.track == "wandb":
            import wandb

            about = {"project": f"gan-{cfg.script}", "dir": cfg.out, "id": run_id}
            config = dataclasses.asdict(cfg)
            wandb.init(**about, config=config, resume="allow", sync_tensorboard=True)
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        packages = "tensorboard wandb" if cfg.track == "wandb" else "tensorboard"
        raise UserError(f"--track {cfg.track}: not installed: pip install {packages}") from None
    writer = SummaryWriter(str(Path(cfg.out) / "tensorboard"))

    def track(scalars, images, step):
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        if images:
            writer.add_image("samples", grid(images), step, dataformats="HWC")
        writer.flush()

    return track
