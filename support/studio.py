"""The canvases that are open on the page, and strokes on them."""

import base64
import collections
import concurrent.futures
import io
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from support.batches import spread
from support.classes import IGNORED, ClassTable
from support.errors import UserError
from support.opening import UPLOADS
from support.pictures import resize
from support.plots import page_of
from support.rasters import Raster
from support.store import ImageStore
from support.windows import around, filled, sides_of
from support.writing import label_image

MOST_PIXELS = 2**24  # of a picture: 4096 x 4096
MOST_ANSWERS = 4
KEPT = 2**25  # pixels of canvases; those used last stay
EXAMPLES = 12


class Studio:
    """What the page asks for: canvases to open, strokes, files to take away.

    make(pixels, photograph)  -> a canvas, TranslationCanvas or EditCanvas
    """

    def __init__(self, cfg, classes, make, edits=False):
        self.cfg, self.classes, self.make, self.edits = cfg, classes, make, edits
        self.canvases, self.numbers = collections.OrderedDict(), itertools.count(1)
        self.worker = concurrent.futures.ThreadPoolExecutor(1)  # one predicting at a time
        self.sides = sides_of(cfg) if cfg.window else (cfg.size, cfg.size)
        self.examples = self._examples()

    def _examples(self):
        """[(pixels, photograph or None)] of validation images, evenly spread.

        Where the images of training are not at hand: the picture of docs/ that fits.
        """
        try:
            store = ImageStore(self.cfg, "val", self.cfg.size)
        except (UserError, OSError):
            if self.edits or self.classes:
                return []
            name = "example.jpg" if self.cfg.direction == "AtoB" else "example_map.png"
            path = Path(__file__).parents[1] / "docs" / name
            return [(Raster(path).read(), None)] if path.is_file() else []
        sides = (store.B, store.A)
        if not self.edits and self.cfg.direction == "AtoB":
            sides = (store.A, store.B)
        found = []
        for k in spread(EXAMPLES, len(sides[0])):
            pixels, other = (self._unsqueezed(side[k % len(side)]) for side in sides)
            photo = other if store.paired and other.ndim == 3 else None
            found.append((pixels, photo))
        return found

    def _unsqueezed(self, image):
        """A stored image (3 or 1, S, S) as wide and high as a window is, but no larger than S."""
        height, width = self.sides
        scale = min(1, self.cfg.size / min(height, width))
        size = round(width * scale), round(height * scale)
        pixels = np.moveaxis(image, 0, -1) if len(image) > 1 else image[0]
        return resize(np.ascontiguousarray(pixels), size, labels=len(image) == 1)

    def page(self):
        """The page, with what it needs to know of the model in it."""
        table = self.classes or ClassTable.load("maps")
        about = {
            "script": self.cfg.script,
            "edits": self.edits,
            "labels": bool(self.classes),
            "classes": list(zip(table.names, table.colors, strict=True)),
            "unlabeled": table.palette[IGNORED].tolist(),
            "blank": dict(zip(("height", "width"), self.sides, strict=True)),
            "most": MOST_ANSWERS,
            "examples": [png(self._shown(*example)[::2, ::2]) for example in self.examples],
        }
        return page_of("paint.html", about)

    def _shown(self, pixels, photo):
        """What stands for an example: the photograph to edit, or else what the model is given."""
        if self.edits:
            return photo
        return self.classes.palette[pixels] if self.classes else pixels

    def open(self, wanted):
        """Opens an example, files, a blank canvas of a height and width, or a canvas once more."""
        if "canvas" in wanted:
            return self._described(str(wanted["canvas"]))
        if "example" in wanted:
            pixels, photo = self.examples[whole(wanted, "example", 0, len(self.examples) - 1)]
        elif "files" in wanted:
            pixels, photo = self._decoded(wanted["files"])
        elif self.edits:
            raise UserError("open a photograph and its land cover")
        else:
            shape = whole(wanted, "height", 16, 4096), whole(wanted, "width", 16, 4096)
            pixels, photo = np.zeros(shape, np.uint8), None
            if not self.classes:
                pixels = np.full((*shape, 3), ClassTable.load("maps").colors[0], np.uint8)
        # with the paintings, which change how the network normalises
        canvas = self.worker.submit(self.make, pixels.copy(), photo).result()
        canvas.photo, canvas.latest, canvas.dirty = photo, 0, None  # strokes, what waits
        key = str(next(self.numbers))
        self.canvases[key] = canvas
        while len(self.canvases) > 1 and sum(x.start.size for x in self.canvases.values()) > KEPT:
            self.canvases.popitem(last=False)
        return self._described(key)

    def _described(self, key):
        canvas = self._canvas({"canvas": key})
        start, now = (base64.b64encode(x.tobytes()).decode() for x in (canvas.start, canvas.pixels))
        height, width = canvas.pixels.shape[:2]
        about = {"canvas": key, "height": height, "width": width, "start": start, "pixels": now}
        return about | {"photo": None if canvas.photo is None else png(canvas.photo)}

    def _decoded(self, files):
        """(pixels, photograph or None) of {"input": [name, base64], and of edits "photo"}."""
        pixels = self._read(*files["input"], self.classes)
        if not self.edits:
            return pixels, None
        photo = self._read(*files["photo"], None)
        if photo.shape[:2] != pixels.shape[:2]:
            raise UserError("the photograph and its land cover differ in size")
        return pixels, photo

    def _read(self, name, content, table):
        """The pixels of a file that came as base64, or its class indices; it does not stay."""
        name, content = Path(name).name, base64.b64decode(content, validate=True)
        bands = self.cfg.bands("A" if self.edits or self.cfg.direction == "AtoB" else "B")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"file{Path(name).suffix[:8]}"
            path.write_bytes(content)
            try:
                with Raster(path, table, UPLOADS, MOST_PIXELS, bands) as raster:
                    if raster.height * raster.width > MOST_PIXELS:
                        raise UserError(f"{path}: too many pixels for this page")
                    return filled(raster, 0, 0, raster.height, raster.width)
            except UserError as error:
                raise UserError(str(error).replace(str(path), name)) from None

    def _canvas(self, query):
        canvas = self.canvases.get(query.get("canvas"))
        if not canvas:
            raise UserError("this canvas was closed, as many newer ones were opened")
        self.canvases.move_to_end(query["canvas"])
        return canvas

    def stroke(self, query, content):
        """Changes a box of a canvas and paints what follows; of those that wait, the last."""
        canvas = self._canvas(query)
        height, width = canvas.pixels.shape[:2]
        top, left = whole(query, "y", 0, height - 1), whole(query, "x", 0, width - 1)
        sides = whole(query, "height", 1, height - top), whole(query, "width", 1, width - left)
        answers = whole(query, "answers", 1, MOST_ANSWERS)
        shape = *sides, *canvas.pixels.shape[2:]
        if len(content) != np.prod(shape):
            raise UserError(f"a stroke of {len(content)} bytes where {np.prod(shape)} belong")
        pixels = np.frombuffer(content, np.uint8).reshape(shape)
        if self.classes and (pixels[pixels != IGNORED] >= len(self.classes)).any():
            raise UserError(f"a class outside the table, which has {len(self.classes)}")
        canvas.latest += 1
        change = canvas, canvas.latest, (top, left, *sides), pixels, answers
        return self.worker.submit(self._generate, *change).result()

    def _generate(self, canvas, turn, box, pixels, answers):
        top, left, height, width = box
        canvas.pixels[top : top + height, left : left + width] = pixels
        canvas.dirty = around(canvas.dirty or box, box)
        if turn != canvas.latest:
            return {"superseded": True}
        begin, pictures = time.perf_counter(), []
        for sample in range(1, answers + 1):
            (y, x, *_), picture = canvas.generated(canvas.dirty, sample)
            pictures.append({"x": x, "y": y, "png": png(picture)})
        canvas.dirty = None
        return {"pictures": pictures, "seconds": time.perf_counter() - begin}

    def label_map(self, query):
        """The painted label map as a PNG: the table's values and colours, which scripts read."""
        pixels = self._canvas(query).pixels
        image = label_image(pixels, self.classes) if self.classes else Image.fromarray(pixels)
        return encoded(image)


def whole(query, name, low, high):
    """A whole number of a request, within bounds."""
    try:
        value = int(query[name])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{name} is missing, or no whole number") from None
    if not low <= value <= high:
        raise UserError(f"{name} {value}: must be {low} to {high}")
    return value


def encoded(image):
    """A Pillow image as the bytes of a PNG, quickly."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def png(pixels):
    """(H, W, 3) uint8 as a PNG in base64."""
    return base64.b64encode(encoded(Image.fromarray(np.ascontiguousarray(pixels)))).decode()
