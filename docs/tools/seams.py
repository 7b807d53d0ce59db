"""Measure how visible the windows of a raster are, by the reach of shared statistics.

    python docs/tools/seams.py CHECKPOINT RASTER [--window 256]
    python docs/tools/seams.py CHECKPOINT RASTER --keep "cyclegan, map"      into docs/results too

The raster is translated once for each --norm-reach. Two ratios are printed; 1 means no seam:

gradient  mean difference of neighbouring pixels across the middle of an overlap, over elsewhere
step      difference of the mean colours of two bands that meet in the middle of an overlap, each an
          eighth of a window wide and a window long, over that of bands that meet within windows
"""

import argparse
import contextlib
import importlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np
from paths import RESULTS

import common
from support.checkpoints import load_weights
from support.measures import print_table
from support.rasters import Raster
from support.windows import tiles

REACHES = (0, 0.5, 1, 2, 4, float("inf"))


def seams(image, window):
    """(gradient, step) of a picture (H, W, 3) that was painted by windows."""
    picture = image.astype(float)
    return np.mean([seams_across(x, window) for x in (picture, picture.transpose(1, 0, 2))], 0)


def seams_across(picture, window):
    """(gradient, step) of the borders between windows that lie side by side."""
    starts = [start for start, _ in tiles(picture.shape[1], window)]
    middles = [(a + window + b) // 2 for a, b in zip(starts, starts[1:], strict=False)]
    band = max(1, window // 8)
    elsewhere = []
    for start in starts:
        for x in (start + window // 2 - band, start + window // 2, start + window // 2 + band):
            if min(abs(x - middle) for middle in middles) > band:
                elsewhere.append(x)
    gradient = gradients(picture, middles) / gradients(picture, elsewhere)
    step = bands(picture, middles, band, window) / bands(picture, elsewhere, band, window)
    return gradient, step


def gradients(picture, places):
    """Mean absolute difference of the two columns that meet at each place."""
    return np.mean([np.abs(picture[:, x] - picture[:, x - 1]).mean() for x in places])


def bands(picture, places, band, window):
    """Mean absolute difference of the mean colours of two bands that meet at each place."""
    steps = []
    for x in places:
        for top in range(0, picture.shape[0] - window + 1, window):
            rows = picture[top : top + window]
            left, right = rows[:, x - band : x], rows[:, x : x + band]
            steps.append(np.abs(left.mean((0, 1)) - right.mean((0, 1))).mean())
    return np.mean(steps)


def translated(script, checkpoint, raster, window, reach):
    """The raster as the script's --generate makes it, (H, W, 3)."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        call = ["--generate", raster, "--checkpoint", checkpoint, "--out", folder]
        script.main([*call, "--window", str(window), "--norm-reach", str(reach)])
        with Raster(next(Path(folder).glob(f"{Path(raster).stem}*"))) as result:
            return result.read()


@common.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="checkpoint of one of the scripts")
    parser.add_argument("raster", help="picture of at least two windows a side")
    parser.add_argument("--window", type=int, default=0, help="as in the scripts")
    parser.add_argument("--keep", metavar="NAME", help="also write docs/results/seams.json")
    args = parser.parse_args(argv)
    content = load_weights(args.checkpoint)
    if "script" not in content:
        raise common.UserError(f"{args.checkpoint}: no checkpoint of one of the scripts")
    window = args.window or int(np.min(content.get("window", content["config"]["patch"])))
    with Raster(args.raster) as picture:
        if min(picture.width, picture.height) < 2 * window or not window:
            raise common.UserError(f"{args.raster}: smaller than two windows of {window} a side")
    script, rows = importlib.import_module(content["script"]), {}
    for reach in REACHES:
        image = translated(script, args.checkpoint, args.raster, window, reach)
        gradient, step = seams(image, window)
        rows[f"reach {reach}"] = {"gradient": gradient, "step": step}
    print_table(rows)
    if args.keep:
        path = RESULTS / "seams.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {args.keep: rows}, indent=1))


if __name__ == "__main__":
    main()
