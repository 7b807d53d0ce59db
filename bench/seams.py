"""How far the windows of a raster show, with normalisation of each window's own or shared.

    python bench/seams.py runs/cyclegan/checkpoints/last.pt photograph.jpg [--window 256 ...]
    python bench/seams.py ... --keep "cyclegan, map"      also into docs/seams.json, for the README

For several --norm-reach the raster is translated, and two ratios are printed; 1 is no seam:

gradient  mean difference of neighbouring pixels across the middle of an overlap, over elsewhere
step      difference of the mean colours of two bands that meet in the middle of an overlap, each an
          eighth of a window wide and a window long, over that of bands that meet within windows
"""

import argparse
import contextlib
import importlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

import common
from support.checkpoints import load_weights
from support.measures import print_table
from support.rasters import Raster
from support.windows import tiles

REACHES = (0, 0.5, 1, 2, 4, float("inf"))


def seams(image, window):
    """(gradient, step) of a picture (H, W, 3) that was painted by windows."""
    ratios = []
    for picture in (image.astype(float), image.astype(float).transpose(1, 0, 2)):
        starts = [start for start, _ in tiles(picture.shape[1], window)]
        middles = [(a + window + b) // 2 for a, b in zip(starts, starts[1:], strict=False)]
        band = max(1, window // 8)
        inside = [start + window // 2 + shift for start in starts for shift in (-band, 0, band)]
        inside = [x for x in inside if min(abs(x - middle) for middle in middles) > band]
        borders, elsewhere = (
            (gradients(picture, places), bands(picture, places, band, window))
            for places in (middles, inside)
        )
        ratios.append(np.divide(borders, elsewhere))
    return np.mean(ratios, 0)


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


@common.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("raster", help="a picture that takes more than one window")
    parser.add_argument("--window", type=int, default=0, help="as of the scripts")
    parser.add_argument("--keep", default="", metavar="NAME", help="also into docs/seams.json")
    args, more = parser.parse_known_args(argv)
    checkpoint, raster = args.checkpoint, args.raster
    content = load_weights(checkpoint)
    if "script" not in content:
        raise common.UserError(f"{checkpoint}: no checkpoint that one of the scripts wrote")
    window = args.window or content.get("window", content["config"]["patch"])
    with Raster(raster) as picture:
        if min(picture.width, picture.height) < 2 * window or not window:
            what = f"{picture.width}x{picture.height} pixels are less than two windows of {window}"
            raise common.UserError(f"{raster}: {what} a side: see --window")
    module, rows = importlib.import_module(content["script"]), {}
    for reach in REACHES:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            options = ["--generate", raster, "--checkpoint", checkpoint, "--out", folder, *more]
            options += ["--window", str(window)]
            began = time.perf_counter()
            module.main([*options, "--norm-reach", str(reach)])
            seconds = time.perf_counter() - began
            with Raster(next(Path(folder).glob(f"{Path(raster).stem}*"))) as result:
                image = result.read()
        gradient, step = seams(image, window)
        rows[f"reach {reach}"] = {"gradient": gradient, "step": step, "seconds": seconds}
    print_table(rows)
    if args.keep:
        path = Path(__file__).parent.parent / "docs" / "seams.json"
        kept = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(kept | {args.keep: rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
