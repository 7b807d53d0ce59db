"""Draw edits of held-out photographs, chosen by rule: every n-th place, each class in two shapes.

python docs/tools/draw_edits.py CHECKPOINT DATA RESULT [CLASS ...]

For each class a rectangle and a shape as a hand would draw it, in the middle of a square of two
windows' sides: photograph, edited land cover, result.
"""

import importlib
import sys
import tempfile
from pathlib import Path

import numpy as np
import paths  # noqa: F401
from PIL import Image, ImageDraw
from sheet import sheet

from support.batches import spread
from support.checkpoints import load_weights
from support.classes import ClassTable
from support.layouts import find_images
from support.rasters import Raster

RECTANGLE = [(0.2, 0.25), (0.8, 0.25), (0.8, 0.75), (0.2, 0.75)]  # of the middle window: x, y
BLOB = [(0.1, 0.5), (0.25, 0.2), (0.5, 0.3), (0.7, 0.1), (0.9, 0.45), (0.75, 0.8), (0.4, 0.7)]
LINE = [(-0.3, 0.75), (0.2, 0.6), (0.6, 0.45), (1.3, 0.3)]  # a road or a river, from side to side
LINES = ("road", "motorway")


def photograph_and_labels(split, k, side):
    """Validation place k, the square in its middle: (side, side, 3) and (side, side)."""
    photograph = Raster(split.A[k])
    rgb = photograph.read()
    if split.halves:
        rgb, drawn = np.split(rgb, 2, axis=1)
        nearest = split.classes.nearest or photograph.lossy
        labels = split.classes.from_colours(drawn, split.A[k], nearest)
    else:
        labels = Raster(split.B[k], split.classes).read()
    top, left = ((length - side) // 2 for length in labels.shape)
    return tuple(x[max(top, 0) :, max(left, 0) :][:side, :side] for x in (rgb, labels))


def drawn(labels, index, name, by_hand, window):
    """Labels with a shape of one class painted in their middle."""
    image, middle = Image.fromarray(labels), np.array(labels.shape[::-1]) / 2
    pen = ImageDraw.Draw(image)
    points = LINE if by_hand and name in LINES else BLOB if by_hand else RECTANGLE
    corners = [tuple(middle + (np.array(point) - 0.5) * window) for point in points]
    if points is LINE:
        pen.line(corners, fill=index, width=max(3, window // 14), joint="curve")
    else:
        pen.polygon(corners, fill=index)
    return np.asarray(image)


def edits(checkpoint, data, names):
    """The columns of a sheet: a photograph, its edited land cover, and the result."""
    saved = load_weights(checkpoint)
    classes, window = ClassTable.load(saved["config"]["lc_classes"]), int(np.min(saved["window"]))
    script, split = importlib.import_module(saved["script"]), find_images(data, "val", "")
    if split.halves:
        split = find_images(data, "val", saved["config"]["lc_classes"])
    wanted = [(name, by_hand) for name in names for by_hand in (False, True)]
    columns = []
    for k, (name, by_hand) in zip(spread(len(wanted), len(split.A)), wanted, strict=True):
        rgb, labels = photograph_and_labels(split, k, 2 * window)
        edited = drawn(labels, classes.names.index(name), name, by_hand, window)
        with tempfile.TemporaryDirectory() as folder:
            files = {"photo": rgb, "before": classes.codes[labels], "after": classes.codes[edited]}
            for file, pixels in files.items():
                Image.fromarray(pixels).save(f"{folder}/{file}.png")
            line = f"--generate {folder}/photo.png --lc {folder}/after.png --out {folder}/out"
            line += f" --lc-before {folder}/before.png --checkpoint {checkpoint}"
            script.main(line.split())
            result = Image.open(f"{folder}/out/photo.png").convert("RGB")
        title = f"{name}, {'by hand' if by_hand else 'rectangle'}"
        pictures = [Image.fromarray(rgb), Image.fromarray(classes.palette[edited]), result]
        columns.append((title, pictures))
    return columns, 2 * window


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    columns, side = edits(*sys.argv[1:3], sys.argv[4:] or ["water", "park", "building", "road"])
    sheet(columns, side).save(Path(sys.argv[3]), quality=85)
