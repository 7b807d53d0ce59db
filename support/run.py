"""The folder of a training run: metrics, samples, checkpoints, signals."""

import contextlib
import csv
import dataclasses
import hashlib
import json
import math
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
from torch import nn
from tqdm import tqdm

from support.batches import spread, steps_in_epoch
from support.checkpoints import RANKS, buffers_of_ranks, save_checkpoint, state_dict
from support.device import detached, recommend_precision, set_lr
from support.errors import UserError, drawing, on_terminal
from support.files import remove_unfinished, whole_or_absent, write_text
from support.layouts import find_images
from support.pictures import grid, save_grid
from support.plots import plot_metrics, read_metrics, write_page
from support.processes import handled_signals, of_rank_0, rank, reduced, world_size

SAVED = ("epoch", "batch", "step", "histograms", "window", "window_B", "fingerprint", "id")
REMEDY = "try a lower --lr, --precision fp32, or look for odd images in the data"


class Means:
    """Means of the losses of several steps, which stay on the device until they are read."""

    def __init__(self, saved=None):
        self.names, self.sums, self.count = saved or ([], 0, 0)

    def add(self, names, values):
        """Adds a step's losses: their names, and their values as one tensor."""
        if self.count and names != self.names:
            raise ValueError(f"losses {names}, and {self.names} in steps before: return the same")
        self.names, self.count = names, self.count + 1
        self.sums = values + torch.as_tensor(self.sums, device=values.device)

    def read(self):
        """{name: mean}, over all processes."""
        means = reduced(self.sums / self.count) / world_size()
        return dict(zip(self.names, means.tolist(), strict=True))

    def saved(self):
        """(names, sums, count) for a checkpoint, averaged over all processes."""
        sums = reduced(self.sums) / world_size() if self.count else 0
        return self.names, sums, self.count


class Run:
    """The folder of one training run: config.json, metrics.csv, losses.png, samples, checkpoints.

    cfg, checkpoint  as begin gave them
    data             the training data: its len() images are an epoch, its store is an ImageStore
    scores           names of the measures that close an epoch's last row of metrics.csv

    epoch, batch, step  where training stands: epochs done, batches done in this one, steps in all
    histograms          of the training images, which evaluations compare with
    """

    seconds = 180  # between two saves after epochs; within an epoch five times as long

    def __init__(self, cfg, checkpoint, data, scores=()):
        self.cfg, self.scores, self.out, self.lr = cfg, scores, Path(cfg.out), 0.0
        self.steps_per_epoch = steps_in_epoch(len(data), cfg.batch_size)
        self.images_per_step = cfg.batch_size * world_size()
        self.fingerprint = fingerprint(data.store, cfg.lc_classes)
        saved = checkpoint or {}
        changed = saved.get("fingerprint", self.fingerprint) != self.fingerprint
        if changed:  # the epoch starts again
            saved = {name: saved.get(name) for name in ("epoch", "step", "id")}
        self.epoch, self.batch, self.step = (saved.get(k, 0) for k in ("epoch", "batch", "step"))
        seen = cfg.out, self.step, self.fingerprint
        if of_rank_0(seen) != seen:  # --resume without --out, or file systems that differ
            raise UserError(f"--out {cfg.out}: another run, save or --data than in process 0")
        self.of_row, self.of_epoch = Means(saved.get("of_row")), Means(saved.get("of_epoch"))
        self.id = saved.get("id") or uuid.uuid4().hex[:8]
        self.histograms = saved.get("histograms") or data.store.histograms()
        windows = saved.get("window"), saved.get("window_B")
        self.window, self.window_B = windows if any(windows) else data.store.windows()
        self.saved_at, self.drawn_at, self.interrupted = time.monotonic(), -math.inf, 0
        self.handlers = {n: signal.signal(n, self._interrupt) for n in handled_signals()}
        self.bar, self.warm = self._new_bar(), self.step + 5
        self.metrics, self.last = self.out / "metrics.csv", self.out / "checkpoints" / "last.pt"
        if not rank():
            self._prepare_folder(checkpoint or {})
        if changed and self.epoch < cfg.epochs:
            self.print(f"the images have changed: epoch {self.epoch + 1} starts again")

    def _prepare_folder(self, saved):
        """Removes a killed process's unfinished files, writes config.json, cuts metrics.csv."""
        for folder in (self.out, self.out / "checkpoints", self.out / "samples"):
            remove_unfinished(folder, age=-math.inf)  # also with a clock that differs
        write_config(self.cfg)
        cut_metrics(self.metrics, saved.get("metrics_bytes", 0))
        if not saved:
            recommend_precision(self.cfg)
        elif self.epoch and not saved.get("batch"):  # a kill may have prevented the copy
            self._keep()
        self.tracker = tracker(self.cfg, self.id, self.step) if self.cfg.track else None
        done = ": all epochs are done" if self.epoch >= self.cfg.epochs else ""
        self.print(f"run folder {self.out}{done}")

    def _new_bar(self):
        """A progress bar of all images. Its estimate of the time left starts now."""
        done = self.epoch * self.steps_per_epoch + self.batch
        about = {"unit": "image", "dynamic_ncols": True, "disable": rank() > 0}
        seconds = 0.1 if on_terminal() else 10  # a log would grow by 100 MB a day
        about |= {"miniters": 1, "mininterval": seconds}
        about["smoothing"] = 0  # the mean rate, with validation in it
        about["total"] = self.cfg.epochs * self.steps_per_epoch * self.images_per_step
        return tqdm(initial=done * self.images_per_step, **about)

    def print(self, text):
        """Prints a line on stderr, above the progress bar."""
        if rank() == 0:
            self.bar.write(text, file=sys.stderr)

    def _interrupt(self, number, frame):
        first, self.interrupted = not self.interrupted, number
        if number == signal.SIGINT:  # SIGTERM may come twice: from SLURM and from torchrun
            signal.signal(number, signal.default_int_handler)  # a second Ctrl-C ends main
        if first and rank() == 0:
            print("\nstopping: this step is finished and saved first", file=sys.stderr)

    def must_save(self):
        """(the number of a signal to stop, or 0; whether the last save is long ago).

        Several processes agree, on GPUs every ten steps and before a validation: each gets the
        largest of their values. torchrun kills them 30 seconds after a signal.
        """
        overdue = time.monotonic() - self.saved_at > 5 * self.seconds
        if world_size() == 1:
            return self.interrupted, overdue
        if self.cfg.device == "cuda" and self.step % 10 and self.batch < self.steps_per_epoch:
            return 0, False
        return reduced(torch.tensor([self.interrupted, overdue]), dist.ReduceOp.MAX).tolist()

    def set_lr(self, lr, *optimizers):
        """Sets the learning rate of optimizers, which metrics.csv lists."""
        self.lr = lr
        for optimizer in optimizers:
            set_lr(optimizer, lr)

    def end_step(self, state, losses):
        """Ends a step with losses {name: 0-d tensor}, the same names in every step.

        Their means are read every --log-every steps.
        Saves every quarter of an hour, and after a signal, which ends the program (128 + number).
        """
        if self.step == self.warm - 5:  # the first one: refuses now what no checkpoint could keep
            state_dict(state)
        values = torch.stack([loss.double() for loss in detached(losses).values()])
        self.of_row.add(list(losses), values)
        self.of_epoch.add(list(losses), values)
        self.step, self.batch = self.step + 1, self.batch + 1
        self.bar.update(self.images_per_step)
        if self.step == self.warm:  # the estimate of time left excludes a CUDA graph's capture
            self.bar.leave = False
            self.bar.close()
            self.bar = self._new_bar()
        rows = math.ceil(self.steps_per_epoch / self.cfg.log_every)  # of equally many steps
        if self.batch * rows % self.steps_per_epoch < rows and self.batch < self.steps_per_epoch:
            self._write_row({})  # an epoch's last row waits for its scores
        number, overdue = self.must_save()
        if number or overdue:
            self.save(state)
            self._draw({})
        if number:
            self._stop(number)

    def _stop(self, number):
        """Ends the program after a signal."""
        self.print(f"stopped at step {self.step}: continue with --resume --out {self.out}")
        self.bar.close()
        sys.exit(128 + number)

    def epoch_mean(self, name):
        """The mean of a loss over the epoch so far, in all processes."""
        return self.of_epoch.read()[name]

    def _write_row(self, scores):
        """Writes a row of metrics.csv: the means since the last one, and scores {name: value}.

        A loss must be finite.
        """
        means = self.of_row.read()
        for name, value in means.items():
            if not math.isfinite(value):
                self._refuse(name)
        values = {"lr": self.lr} | means | scores
        self.of_row = Means()
        if rank():
            return
        header = ["epoch", "step", "lr", *means, *self.scores]
        row = [self.epoch + 1, self.step]
        row += [f"{values[name]:.8g}" if name in values else "" for name in header[2:]]
        with open(self.metrics, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([row] if file.tell() else [header, row])
        if self.tracker:
            for name, value in values.items():
                self.tracker.add_scalar(name, value, self.step)
            self.tracker.flush()
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in means.items()}, refresh=False)

    def _refuse(self, what):
        raise UserError(f"{what} not finite by step {self.step}: saved files are kept; {REMEDY}")

    def end_epoch(self, state, scores, columns):
        """Ends an epoch: writes its last row, with scores {name: value}, and prints its means.

        An undefined score has an empty cell.
        Checkpoint, grid, plot and page are written every few minutes, as an epoch may take a
        second, after the first and the last epoch, and every --save-every epochs.

        columns  {title: (B, C, H, W) in [-1, 1]}, the sample grid from left to right
        """
        scores = {name: value for name, value in scores.items() if math.isfinite(value)}
        self._write_row(scores)
        means = self.of_epoch.read() | scores
        self.epoch, self.batch, self.of_epoch = self.epoch + 1, 0, Means()
        shown = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.print(f"epoch {self.epoch}/{self.cfg.epochs}: {shown}")
        waited = time.monotonic() - self.drawn_at > self.seconds
        if of_rank_0(waited or self._is_kept() or self.epoch == self.cfg.epochs):
            self.save(state)
            self._keep()
            self._draw(columns)
            self.drawn_at = time.monotonic()

    def save(self, state):
        """Writes checkpoints/last.pt, unless a weight is not finite: then the old one stays."""
        self.saved_at = time.monotonic()
        modules = [part for part in vars(state).values() if isinstance(part, nn.Module)]
        weights = [weight for module in modules for weight in module.parameters()]
        if not nn.utils.get_total_norm(weights, math.inf).isfinite():
            self._refuse("weights")
        content = state_dict(state)
        if world_size() > 1:
            content[RANKS] = buffers_of_ranks(state)
        about = {"of_row": self.of_row.saved(), "of_epoch": self.of_epoch.saved()}
        if rank():
            return
        about |= {name: getattr(self, name) for name in SAVED}
        about |= {"script": self.cfg.script, "config": dataclasses.asdict(self.cfg)}
        about |= {"world": world_size(), "state": content}
        about["metrics_bytes"] = self.metrics.stat().st_size if self.metrics.is_file() else 0
        save_checkpoint(self.last, about)

    def _is_kept(self):
        """Whether --save-every keeps the checkpoint of this epoch."""
        return self.cfg.save_every > 0 and self.epoch % self.cfg.save_every == 0

    def _keep(self):
        """Copies last.pt, which ends an epoch, if --save-every keeps it."""
        if self._is_kept() and not rank():
            with whole_or_absent(self.last.with_name(f"epoch_{self.epoch:04}.pt")) as aside:
                shutil.copy(self.last, aside)

    def _draw(self, columns):
        """Draws the sample grid, losses.png and index.html, which no run needs."""
        if rank():
            return
        with drawing(self.out):
            if columns:
                save_grid(self.out / "samples" / f"epoch_{self.epoch:04}.png", columns)
            if columns and self.tracker:
                self.tracker.add_image("samples", grid(columns), self.step, dataformats="HWC")
                self.tracker.flush()
            write_page(self.out)
            plot_metrics(read_metrics(self.metrics), self.out / "losses.png")

    def close(self):
        """Ends the run, and the handling of signals; an evaluation may follow.

        After a signal that came with the last epoch, which is saved, the program ends here.
        """
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.interrupted:
            self._stop(self.interrupted)
        self.bar.close()


def fingerprint(store, lc_classes):
    """A hash of the names of all images, and of the pixels of some training images."""
    val = find_images(store.split.root, "val", lc_classes)
    names = [path.name for split in (store.split, val) for path in split.A + split.B]
    found = hashlib.sha256(repr(names).encode())
    for images in (store.A, store.B):
        found.update(images[spread(100, len(images))].tobytes())
    return found.hexdigest()[:16]


def cut_metrics(path, length):
    """Drops rows written after a save, in a new file: a backup may be a link to the old one.

    A file with another beginning, which somebody edited, stays as it is.
    """
    content = path.read_bytes() if path.is_file() else b""
    if content.startswith(b"epoch,step,"):
        with whole_or_absent(path) as aside:
            aside.write_bytes(content[:length])


def write_config(cfg):
    """Writes config.json: the options, their defaults, versions, device and commit."""
    cuda = cfg.device == "cuda"
    packages = {package.__name__: package.__version__ for package in (torch, np)}
    call = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "--quiet", "HEAD"]
    commit = None  # as where these scripts are in no repository
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.check_output(call, text=True, stderr=subprocess.DEVNULL).strip()
    about = {
        "script": cfg.script,
        "options": dataclasses.asdict(cfg),
        "versions": {"python": platform.python_version()} | packages,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "processes": world_size(),
        "git_commit": commit,
        "defaults": dataclasses.asdict(type(cfg)()),
    }
    write_text(Path(cfg.out) / "config.json", json.dumps(about, indent=2))


def tracker(cfg, run_id, step=0):
    """A TensorBoard writer, which drops what a killed process wrote after `step`.

    With --track wandb Weights & Biases copies what it writes.
    """
    if cfg.track == "wandb":
        import wandb

        about = {"project": f"gan-{cfg.script}", "dir": cfg.out, "id": run_id, "resume": "allow"}
        wandb.init(**about, config=dataclasses.asdict(cfg), sync_tensorboard=True)
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(Path(cfg.out) / "tensorboard"), purge_step=step + 1)
