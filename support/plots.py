"""Curves, and the page of a run."""

import csv
import json
import shlex
import time
from pathlib import Path

from support.batches import some_of, spread
from support.files import whole_or_absent, write_text


def read_metrics(path):
    """Rows of a metrics.csv as dicts of text, of a long run some; [] where there is no file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    header, *rows = text.splitlines() or [""]  # read at once: a run may be writing it
    ends = {row.partition(",")[0]: k for k, row in enumerate(rows)}  # of epochs: with the scores
    chosen = {*spread(2000, len(rows)).tolist(), *some_of([*ends.values()], 2000)}
    chosen |= {*range(len(rows))[-1:]}
    return list(csv.DictReader([header, *(rows[k] for k in sorted(chosen))]))


def plot_metrics(rows, path):
    """Draws losses.png: a panel for each column of metrics.csv, over steps."""
    from matplotlib.figure import Figure  # slow to import

    if not rows:  # stopped before the first one
        return
    names = [name for name in rows[0] if name not in ("epoch", "step")]
    height = -(-len(names) // 3)
    figure = Figure(figsize=(13, 2.6 * height))
    for place, name in enumerate(names, 1):
        axis = figure.add_subplot(height, 3, place)
        measured = [row for row in rows if row[name]]
        steps = [int(row["step"]) for row in measured]
        values = [float(row[name]) for row in measured]
        axis.plot(steps, values, linewidth=1, marker="o" if len(steps) == 1 else "")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    figure.supxlabel("step", fontsize=10)
    figure.tight_layout()
    with whole_or_absent(path) as aside:
        figure.savefig(aside, dpi=90)


def write_page(folder):
    """Writes index.html of a run folder, run.html with the run's data, which opens from disk."""
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rows = read_metrics(folder / "metrics.csv")
    columns = {}
    for name in rows[0] if rows else ():
        columns[name] = [float(row[name]) if row[name] else None for row in rows]
    evaluation = folder / "evaluation.json"
    about |= {
        "name": folder.resolve().name,
        "out": shlex.quote(Path(about["options"]["out"]).as_posix()),  # in commands to copy
        "epoch": columns.pop("epoch", [0])[-1],
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "samples": sorted(path.name for path in (folder / "samples").glob("epoch_*.png")),
        "steps": columns.pop("step", []),
        "columns": columns,
        "evaluation": json.loads(evaluation.read_text()) if evaluation.is_file() else None,
    }
    write_text(folder / "index.html", page_of("run.html", about))


def page_of(template, data):
    """The text of a page with its data as JSON."""
    text = json.dumps(data).replace("<", "\\u003c")  # no name in it can end the script element
    page = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return page.replace("__DATA__", text)
