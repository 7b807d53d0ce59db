"""Curves, confusion matrices, and the pages of runs."""

import csv
import json
import time
from pathlib import Path

import numpy as np

from support.batches import spread
from support.files import whole_or_absent, write_text


def read_metrics(path):
    """The rows of a metrics.csv as dicts of text; [] where there is no file."""
    if not Path(path).is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _pyplot():
    """matplotlib, which is slow to import, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save_figure(figure, path):
    """Writes a figure aside, and renames: whole or absent."""
    figure.tight_layout()
    with whole_or_absent(path) as aside:
        figure.savefig(aside, dpi=90)
    _pyplot().close(figure)


def plot_metrics(rows, path):
    """losses.png: one panel for each column of metrics.csv, over steps."""
    pyplot = _pyplot()
    names = [name for name in (rows[0] if rows else {}) if name not in ("epoch", "step")]
    height = -(-len(names) // 3)
    figure, axes = pyplot.subplots(height, 3, figsize=(13, 2.6 * height), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        measured = [row for row in rows if row[name]]
        steps = [int(row["step"]) for row in measured]
        values = [float(row[name]) for row in measured]
        axis.plot(steps, values, linewidth=1, marker="o" if len(steps) == 1 else "")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    _save_figure(figure, path)


def plot_confusion(confusion, names, path):
    """A confusion matrix (classes, classes) as a picture: rows are the target's classes.

    Cells are shares of their row.
    """
    pyplot = _pyplot()
    share = (confusion / confusion.sum(1, keepdim=True).clamp_min(1)).cpu().numpy()
    side = 0.6 * len(names)
    figure, axis = pyplot.subplots(figsize=(2.5 + side, 2 + side))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set(xlabel="generated", ylabel="target")
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", parse_math=False)
    axis.set_yticks(range(len(names)), names, parse_math=False)
    for row, column in np.ndindex(*share.shape):
        color = "white" if share[row, column] > 0.5 else "black"
        text = f"{share[row, column]:.2f}"
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    _save_figure(figure, path)


def write_page(folder):
    """index.html of a run folder, and of the folder around it if that is called runs.

    They are pages/run.html and pages/runs.html with the data in them, and open from disk.
    """
    templates = Path(__file__).parent
    folder = folder.resolve()
    pages = [(folder, "run.html", _page_data(folder, 2000))]
    if folder.parent.name == "runs":
        found = sorted(path.parent for path in folder.parent.glob("*/config.json"))
        pages.append((folder.parent, "runs.html", [_page_data(run, 300) for run in found]))
    for folder, name, data in pages:
        text = json.dumps(data).replace("<", "\\u003c")  # whatever a folder is called
        page = (templates / name).read_text().replace("__DATA__", text)
        write_text(folder / "index.html", page)


def _page_data(folder, most):
    """What a page shows of a run folder; of metrics.csv at most so many rows, evenly spread."""
    about = json.loads((folder / "config.json").read_text())
    rows = read_metrics(folder / "metrics.csv")
    epochs = {row["epoch"]: k for k, row in enumerate(rows)}  # its last row has the scores
    rows = [rows[k] for k in sorted({*spread(most, len(rows)).tolist(), *epochs.values()})]
    names = [name for name in (rows[0] if rows else {}) if name not in ("epoch", "step")]
    evaluation = folder / "evaluation.json"
    options, defaults = about["options"], about.get("defaults", {})
    return about | {
        "name": folder.name,
        "epoch": int(rows[-1]["epoch"]) if rows else 0,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "samples": sorted(path.name for path in (folder / "samples").glob("epoch_*.png")),
        "steps": [int(row["step"]) for row in rows],
        "columns": {k: [float(row[k]) if row[k] else None for row in rows] for k in names},
        "evaluation": json.loads(evaluation.read_text()) if evaluation.is_file() else None,
        "defaults": defaults,
        "changed": {
            k: v for k, v in options.items() if v != defaults.get(k) and k not in _ELSEWHERE
        },
    }


_ELSEWHERE = ("out", "cache", "device", "lc_classes")  # say nothing about the model
