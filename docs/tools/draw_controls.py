"""Measure and draw runs of pix2pix that differ in one thing: docs/results/controls.json and .jpg.

    python docs/tools/draw_controls.py RUN [RUN ...]        the first is the one to compare with

Each run translates validation images 0, n, 2n, ... with the image's own statistics and with
running ones. Beside the measures stands the likeness of the pictures of different places: it is
high for a model that paints one pattern everywhere.
"""

import importlib
import json
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from keep_run import PLACE
from paths import RESULTS
from PIL import Image
from sheet import HEAD, sheet

import common
from support.pictures import as_array

IMAGES, ROWS, SIDE = 200, 4, 104


def controls(runs):
    """({title: measures}, sheet) of some run folders."""
    kept, columns = {}, []
    for run in runs:
        for norm, statistics in (("batch", "own"), ("running", "running")):
            title = f"{title_of(run, runs[0])}, {statistics} statistics"
            kept[title], shown = measured(run, norm)
            if not columns:
                columns = [(name, shown[name]) for name in ("input", "target")]
            short = title.replace(" statistics", "").replace(", ", "\n").replace(" --", "\n--")
            columns.append((short, shown["fake"]))
    return kept, sheet([(name, pictures(x)) for name, x in columns], SIDE, head=3 * HEAD)


def title_of(run, first):
    """The options in which a run differs from the first one."""
    ours, theirs = (json.loads((x / "config.json").read_text())["options"] for x in (run, first))
    words = []
    for name, value in ours.items():
        if name not in PLACE and theirs.get(name, value) != value:
            words += [common.flag(name), str(value).removesuffix(".0")]
    return " ".join(words) or "no change"


def measured(run, norm):
    """({measure: value}, sample grid) of a run's last checkpoint with --eval-norm NORM."""
    script = importlib.import_module(json.loads((run / "config.json").read_text())["script"])
    call = ["--evaluate", "--checkpoint", str(run / "checkpoints" / "last.pt")]
    with mock.patch.object(script, "report") as report:
        script.main([*call, "--eval-norm", norm, "--out", str(run / "controls")])
    state, val, cfg, _ = report.call_args.args
    scores, likeness = common.Scores(), []
    for records in val.in_order(common.spread(IMAGES, len(val))):
        x, y = val.pair(records)
        fake = script.translate(state, x, cfg)
        scores.add_images("model", fake, y)
        likeness.append(torch.stack([alike(fake), alike(y)], 1))
    row = scores.table()["model"]
    values = {name: row[name] for name in ("rmse", "accuracy_5", "accuracy_10")}
    values["alike"], values["targets_alike"] = torch.cat(likeness).mean(0).tolist()
    return values, script.sample(state, val, cfg, common.spread(ROWS, len(val)))


def alike(images, around=15):
    """The correlation of fine structure in each image (B, 3, S, S) with that in the next: (B,)."""
    grey = images.mean(1, keepdim=True)
    fine = grey - F.avg_pool2d(grey, around, 1, around // 2, count_include_pad=False)
    fine = fine.flatten(1)
    fine = F.normalize(fine - fine.mean(1, keepdim=True), dim=1)
    return (fine * fine.roll(1, 0)).sum(1)


def pictures(images):
    """Images (B, 3, S, S) in [-1, 1] as Pillow's."""
    return [Image.fromarray(as_array(image)) for image in images]


if __name__ == "__main__":
    if len(sys.argv) < 2 or "--help" in sys.argv:
        sys.exit(__doc__)
    made, drawn = controls([Path(run) for run in sys.argv[1:]])
    (RESULTS / "controls.json").write_text(json.dumps(made, indent=1) + "\n")
    drawn.save(RESULTS / "controls.jpg", quality=85)
