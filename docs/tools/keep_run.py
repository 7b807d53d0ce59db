"""Keep what a run on real data came to, small enough to commit: result.json, curve.png, grid.jpg.

    python docs/tools/keep_run.py runs/pix2pix docs/results/NAME SECONDS

result.json holds the options that differ from the defaults (of the data only the folder's name),
SECONDS in hours, versions, the rows of evaluation.json and the measures after each epoch. grid.jpg
is the last sample grid: validation images 0, n, 2n, ..., a rule that is older than the training.
"""

import csv
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import matplotlib
import paths  # noqa: F401
from PIL import Image

import common
from support.classes import ClassTable

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

GRID_BYTES = 300_000  # the largest grid.jpg
PLACE = {"data", "cache", "out", "resume", "vgg16", "judge", "track", "device"}  # of this machine
BUILT_IN = ("s2glc", "maps", "binary")  # class tables
WAYS = {  # the curves of cyclegan: the start of their rows in evaluation.json, and the measure
    "rmse_AB": ("A to B: ", "rmse"),
    "rmse_BA": ("B to A: ", "rmse"),
    "accuracy_AB": ("A to B: ", "pixel_accuracy"),
    "cycle_A": ("A to B to A: ", "rmse"),
}


def keep(run, folder, seconds):
    """Writes result.json, curve.png and grid.jpg of a finished run into a folder."""
    if not (run / "evaluation.json").is_file():
        raise common.UserError(f"{run}: has no evaluation.json, so it has not ended")
    folder.mkdir(parents=True, exist_ok=True)
    about = json.loads((run / "config.json").read_text())
    evaluation = json.loads((run / "evaluation.json").read_text())
    result = {
        "script": about["script"],
        "data": Path(about["options"]["data"]).name or "demo world",
        "options": changed_options(about),
        "versions": about["versions"],
        "machine": f"{about['device']}, {about['processes']} process(es)",
        "hours": round(seconds / 3600, 2),
        "images": evaluation["images"],
        "answer": evaluation.get("answer"),
        "rows": evaluation["rows"],
        "curve": curve_of(run),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    draw_curve(result, folder / "curve.png")
    grid = Image.open(sorted((run / "samples").glob("*.png"))[-1])
    for quality in (85, 75, 60, 45):
        grid.save(folder / "grid.jpg", quality=quality)
        if (folder / "grid.jpg").stat().st_size < GRID_BYTES:
            break


def changed_options(about):
    """The options of a config.json that differ from the script's defaults."""
    defaults = dataclasses.asdict(importlib.import_module(about["script"]).Config())
    defaults = json.loads(json.dumps(defaults))  # a tuple becomes a list, as in the file
    # a built-in class table by its name; another one lies in the data and is found there
    names = {ClassTable.load(name).text: name for name in BUILT_IN}
    asked = dict(about["options"])
    asked["lc_classes"] = names.get(asked["lc_classes"], "")
    changed = {}
    for name, value in asked.items():
        if name not in PLACE and value != defaults.get(name):
            changed[name] = value
    return changed


def curve_of(run):
    """[{"epoch", measure: value, ...}, ...] from the last row of each epoch in metrics.csv."""
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("val_")]
    curve = []
    for row in rows:
        if row[names[0]]:
            values = {name.removeprefix("val_"): float(row[name]) for name in names}
            curve.append({"epoch": int(row["epoch"])} | values)
    return curve


def draw_curve(result, path):
    """Each measure after each epoch, with the trivial baselines as dotted lines."""
    names = [name for name in result["curve"][0] if name != "epoch"]
    epochs = [row["epoch"] for row in result["curve"]]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 2.6), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        axis.plot(epochs, [row[name] for row in result["curve"]], marker="o")
        start, measure = WAYS.get(name, ("", name))
        for row, cells in result["rows"].items():
            trivial = "colour" in row or "class" in row
            if row.startswith(start) and trivial and measure in cells:
                axis.axhline(cells[measure], linestyle=":", color="gray")
                place, side = (epochs[-1], "right") if "median" in row else (epochs[0], "left")
                label = row.removeprefix(start)
                axis.text(place, cells[measure], label, fontsize=6, va="bottom", ha=side)
        axis.set(title=name, xlabel="epoch")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


@common.command
def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 3:
        sys.exit(__doc__)
    keep(Path(words[0]), Path(words[1]), float(words[2]))


if __name__ == "__main__":
    main()
