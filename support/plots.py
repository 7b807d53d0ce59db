"""Curves, and the pages of runs."""

import contextlib
import csv
import json
import os
import shlex
import time
import urllib.parse
from pathlib import Path

from support.batches import spread
from support.files import whole_or_absent, write_text


def read_metrics(path):
    """The rows of a metrics.csv as dicts of text; [] where there is no file."""
    if not Path(path).is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def plot_metrics(rows, path):
    """losses.png: one panel for each column of metrics.csv, over steps; whole or absent."""
    from matplotlib.figure import Figure  # slow to import

    names = [name for name in (rows[0] if rows else {}) if name not in ("epoch", "step")]
    height = -(-len(names) // 3)
    figure = Figure(figsize=(13, 2.6 * height))
    axes = figure.subplots(height, 3, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        measured = [row for row in rows if row[name]]
        steps = [int(row["step"]) for row in measured]
        values = [float(row[name]) for row in measured]
        axis.plot(steps, values, linewidth=1, marker="o" if len(steps) == 1 else "")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    with whole_or_absent(path) as aside:
        figure.savefig(aside, dpi=90)


def write_page(folder):
    """index.html of a run folder, and of the folder around it if that is called runs.

    They are run.html and runs.html with the data in them, and open from disk. Other folders in
    runs that are no whole run are left out.
    """
    folder = folder.resolve()
    write_text(folder / "index.html", page_of("run.html", _page_data(folder, 2000)))
    if folder.parent.name != "runs":
        return
    runs = []
    for path in sorted(folder.parent.glob("*/config.json")):
        with contextlib.suppress(Exception):  # another program's, half-written, not ours to read
            runs.append(_page_data(path.parent, 300))
    write_text(folder.parent / "index.html", page_of("runs.html", runs))


def page_of(template, data):
    """The text of a page with its data as JSON, in which no name can end the script element."""
    text = json.dumps(data).replace("<", "\\u003c")
    page = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return page.replace("__DATA__", text)


def _page_data(folder, most):
    """The contents of a run's page; of metrics.csv at most so many rows, evenly spread."""
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rows = read_metrics(folder / "metrics.csv")
    epochs = {row["epoch"]: k for k, row in enumerate(rows)}  # its last row has the scores
    rows = [rows[k] for k in sorted({*spread(most, len(rows)).tolist(), *epochs.values()})]
    columns = {}
    for name in rows[0] if rows else ():
        columns[name] = [float(row[name]) if row[name] else None for row in rows]
    evaluation = folder / "evaluation.json"
    return about | {
        "name": folder.name,
        "folder": _link(folder),
        "out": shlex.quote(about["options"]["out"]),  # in commands to copy into a shell
        "epoch": int(rows[-1]["epoch"]) if rows else 0,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "samples": sorted(map(_link, (folder / "samples").glob("epoch_*.png"))),
        "steps": columns.pop("step", []),
        "columns": {name: columns[name] for name in columns if name != "epoch"},
        "evaluation": json.loads(evaluation.read_text()) if evaluation.is_file() else None,
    }


def _link(path):
    """A path's name as part of a link: whatever characters it has, or bytes that are no text."""
    return urllib.parse.quote(os.fsencode(path.name))
