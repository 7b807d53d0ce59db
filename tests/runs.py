"""Command lines of tiny runs, and what a run leaves behind."""

import json
from pathlib import Path

import pytest
import torch

import common
from harness import SCRIPTS
from support.plots import read_metrics

# the options of each script's smallest networks, beside --size 64 --width 4
SMALLEST = {
    "pix2pix": "",
    "cyclegan": "--blocks 1",
    "mixlc": "",
    "mixlc_acgan": "--style-features random --style-layers relu1_1",
}
JUDGED = "--train-judge --judge-epochs 1"
# the runs of the fixture trained
RUNS = dict.fromkeys(SCRIPTS, "--epochs 2 --sample-rows 1")
RUNS["pix2pix"] = "--epochs 2 --sample-rows 2 --save-every 1"
RUNS["mixlc_acgan"] += f" {JUDGED}"


def tiny_run(script, data, out, more=""):
    """The command line of a run of a script's smallest networks; `more` is split at blanks."""
    line = f"--data {data} --out {out} --cache {Path(out).parent}/cache"
    line += " --size 64 --width 4 --batch-size 2 --log-every 2 --device cpu"
    return f"{line} {SMALLEST.get(script, '')} {more}".split()


def use(run, action, more=""):
    """The command line that uses a run's last checkpoint, as in use(run, "--generate x.png")."""
    return f"{action} --checkpoint {run}/checkpoints/last.pt --device cpu {more}".split()


def stop_after(steps, main, words, monkeypatch):
    """Calls main(words) of a run that stops after some steps, as Ctrl-C does."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(common.Run, "must_save", lambda run: (int(run.step == steps), False))
        main(words)


def state_of(path):
    """A checkpoint's content."""
    return torch.load(path, weights_only=True)


def last(run):
    """The content of a run's last checkpoint."""
    return state_of(run / "checkpoints" / "last.pt")


def rows_of(run):
    """The rows of a run's evaluation.json."""
    return json.loads((run / "evaluation.json").read_text())["rows"]


def metrics_of(run):
    """The rows of a run's metrics.csv."""
    return read_metrics(run / "metrics.csv")


def steps_of(run):
    """The last step that a run's metrics.csv has a row of; 0 without one."""
    return max((int(row["step"] or 0) for row in metrics_of(run)), default=0)


def refused(text):
    """A context in which a UserError must be raised, whose line matches text."""
    return pytest.raises(common.UserError, match=text)


def line_of(main, arguments, capsys):
    """The one line on stderr that a mistake prints, with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert not stopped.value.__context__  # or IPython would show it, and keep the networks
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]
