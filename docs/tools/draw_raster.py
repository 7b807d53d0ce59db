"""Draw docs/raster.jpg: a raster translated as one square, by separate windows, by sharing windows.

python docs/tools/draw_raster.py CHECKPOINT LABELS [RESULT]
"""

import importlib
import sys
import tempfile
from pathlib import Path

from paths import DOCS
from PIL import Image
from sheet import sheet

from support.checkpoints import load_weights

SIDE = 340


def raster(checkpoint, labels):
    """The whole raster above, a part of it at full size below."""
    script = importlib.import_module(load_weights(checkpoint)["script"])
    whole = max(Image.open(labels).size)
    ways = {
        "as one square": ["--window", str(whole)],
        "each window by itself": ["--norm-reach", "0"],
        "windows that share statistics": [],
    }
    columns = [("input", both(Image.open(labels)))]
    for title, options in ways.items():
        with tempfile.TemporaryDirectory() as out:
            call = ["--generate", labels, "--checkpoint", checkpoint, "--out", out]
            script.main([*call, *options])
            columns.append((title, both(Image.open(next(Path(out).iterdir())))))
    return sheet(columns, SIDE)


def both(picture):
    """A picture's largest square, and the part left of and above its middle."""
    picture = picture.convert("RGB")
    square = picture.crop((0, 0, min(picture.size), min(picture.size)))
    x, y = picture.width // 2, picture.height // 2
    return square, picture.crop((x - SIDE, y - SIDE, x, y))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    result = sys.argv[3] if len(sys.argv) > 3 else DOCS / "raster.jpg"
    raster(*sys.argv[1:3]).save(result, quality=82)
