"""The page to paint on without a browser: what it shows, and what a result would look like."""

import base64
import io
import shutil

import numpy as np

import support.serve
from files import bands_of, pixels_of
from runs import use
from support.pictures import eight_bits
from tensors import calls_of

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


def studio_of(main, run, monkeypatch, more=""):
    """The Studio that --serve of a run's last checkpoint serves."""
    served = calls_of(monkeypatch, support.serve, "serve", lambda studio: None)
    main(use(run, "--serve", more))
    return served[-1][0]


def opened(studio, paths):
    """The page's answer to files (its input, its photograph)."""
    files = {}
    for name, path in zip(("input", "photo"), paths, strict=False):
        files[name] = [path.name, base64.b64encode(path.read_bytes()).decode()]
    return studio.open({"files": files})


def page_shows(studio, paths, strokes=()):
    """The picture (H, W, 3) that the page shows of files (its input, its photograph).

    strokes  [(x, y, width, height, what is painted in bytes), ...]
    """
    about = opened(studio, paths)
    height, width, start = (about[name] for name in ("height", "width", "start"))
    picture = np.zeros((height, width, 3), np.uint8)
    for stroke in [(0, 0, width, height, base64.b64decode(start)), *strokes]:
        query = dict(zip(("x", "y", "width", "height"), stroke, strict=False))
        answer = studio.stroke(query | {"canvas": about["canvas"], "samples": 1}, stroke[-1])
        (answer,) = answer["pictures"]
        part = pixels_of(io.BytesIO(base64.b64decode(answer["png"])))
        x, y = answer["x"], answer["y"]
        picture[y : y + part.shape[0], x : x + part.shape[1]] = part
    return picture


def in_colours(path, limits=None):
    """A TIFF in 8 bits, (H, W, 3): one band is grey, two are red and cyan, else the first three."""
    values = bands_of(path)
    levels = limits.to_levels(values) if limits else values
    first = {1: [0, 0, 0], 2: [0, 1, 1]}.get(values.shape[-1], [0, 1, 2])
    return eight_bits(levels)[..., first]
