"""The canvases that are open on the page, and strokes on them."""

import base64
import collections
import concurrent.futures
import contextlib
import copy
import io
import itertools
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from support.batches import spread
from support.canvases import MemoryRaster, values_of_colours
from support.classes import IGNORED, ClassTable
from support.errors import UserError, remarks
from support.limits import Limits, print_doubts, values_of
from support.opening import UPLOADS
from support.pairs import check_pair
from support.pictures import as_tensor, resize
from support.plots import page_of
from support.rasters import Raster
from support.store import ImageStore
from support.windows import sides_of
from support.writing import label_image

MOST_PIXELS = 2**24  # of a picture: 4096 x 4096
MOST_SAMPLES = 4
KEPT = 2**26  # values of all canvases, three for a pixel of a picture; those used last stay
EXAMPLES = 12


class Studio:
    """Answers the page's requests: opens canvases, applies strokes, makes files of them.

    make(given, photo)  -> a TranslationCanvas or an EditCanvas of MemoryRasters; photo: to edit,
                        or to compare with, or None
    """

    def __init__(self, cfg, classes, make, edits=False):
        self.cfg, self.classes, self.make, self.edits = cfg, classes, make, edits
        self.canvases, self.numbers = collections.OrderedDict(), itertools.count(1)
        self.lock = threading.Lock()  # of canvases
        self.worker = concurrent.futures.ThreadPoolExecutor(1)  # one predicting at a time
        self.shape = sides_of(cfg)
        self.input_domain, self.other_domain = "BA" if edits else cfg.domains
        self.examples = self._examples()

    def _examples(self):
        """[(given, photo)] of validation images; without training's data, of docs/."""
        try:
            store = ImageStore(self.cfg, "val", self.cfg.size, most=EXAMPLES)
        except (UserError, OSError):
            with contextlib.suppress(UserError, OSError):
                return [self._of_docs()]
            return []
        if self.edits and not store.paired:
            return []
        found = []
        for k in spread(EXAMPLES, len(getattr(store, self.input_domain))):
            given = self._stored(store, self.input_domain, k)
            other = self._stored(store, self.other_domain, k)
            found.append((given, other if store.paired and not other.table else None))
        return found

    def _of_docs(self):
        """(given, photo) of pictures of docs/; UserError of classes that have other colours."""
        docs, domain = Path(__file__).parents[1] / "docs", self.input_domain
        drawn = "city_lc.png" if self.classes else "example_map.png"
        pixels = Raster(docs / ("example.jpg" if domain == "A" else drawn), self.classes).read()
        if not self.classes:
            return self._picture(domain, pixels), None
        photo = self._picture("A", Raster(docs / "city.jpg").read()) if self.edits else None
        return MemoryRaster(pixels, self.classes), photo

    def _stored(self, store, domain, k):
        """Image k of a store with the shape of a window, no larger than it is stored."""
        height, width = self.shape
        scale = min(1, self.cfg.size / min(height, width))
        size = round(width * scale), round(height * scale)
        images = getattr(store, domain)
        image = np.moveaxis(images[k % len(images)], 0, -1)
        if domain == "B" and store.classes:
            labels = image[..., 0].astype(np.uint8)
            return MemoryRaster(resize(labels, size, labels=True), store.classes)
        resized, limits = resize(np.ascontiguousarray(image), size), store.limits[domain]
        return MemoryRaster(values_of(as_tensor(resized)[0], limits), limits=limits)

    def page(self):
        """The page, with a description of the model in it."""
        table = self.classes or ClassTable.load("maps")
        photographs = self.input_domain == "A" and not self.classes  # a map's colours are of no use
        shown = [photo if self.edits else given for given, photo in self.examples]
        pictures = [x.table.palette[x.start] if x.table else x.start for x in shown]
        about = {
            "script": self.cfg.script,
            "edits": self.edits,
            "labels": bool(self.classes),
            "classes": [] if photographs else list(zip(table.names, table.colors, strict=True)),
            "unlabeled": table.palette[IGNORED].tolist(),
            "blank": dict(zip(("height", "width"), self.shape, strict=True)),
            "most": MOST_SAMPLES,
            "examples": [png(picture[::2, ::2]) for picture in pictures],
        }
        return page_of("paint.html", about)

    def open(self, wanted):
        """Opens an example, files, a blank canvas of a height and width, or a canvas once more."""
        remarks().clear()
        if "canvas" in wanted:
            return self._described(str(wanted["canvas"]))
        if "example" in wanted:
            given, photo = self.examples[whole(wanted, "example", 0, len(self.examples) - 1)]
        elif "files" in wanted:
            files = wanted["files"]
            given, photo = self._read(self.input_domain, *files["input"]), None
            if self.edits:
                photo = self._read(self.other_domain, *files["photo"])
                check_pair(photo, given)
        elif self.edits:
            raise UserError("open a photograph and its land cover")
        else:
            shape = whole(wanted, "height", 16, 4096), whole(wanted, "width", 16, 4096)
            blank, photo = np.zeros(shape, np.uint8), None
            given = self._picture(self.input_domain, ClassTable.load("maps").palette[blank])
            if self.classes:
                given = MemoryRaster(blank, self.classes)
        # in the worker, as generating changes how the network normalises
        canvas = self.worker.submit(self.make, copy.deepcopy(given), photo).result()
        key = str(next(self.numbers))
        with self.lock:
            self.canvases[key], opened = canvas, self.canvases.values()
            while len(opened) > 1 and sum(x.start.size for x in opened) > KEPT:
                self.canvases.popitem(last=False)
        return self._described(key)

    def _described(self, key):
        canvas = self._canvas(key)
        height, width = canvas.pixels.shape[:2]
        about = {"canvas": key, "height": height, "width": width}
        about["remarks"] = list(dict.fromkeys(remarks()))
        about["start"] = base64.b64encode(canvas.start.tobytes()).decode()
        if (canvas.pixels != canvas.start).any():
            about["pixels"] = base64.b64encode(canvas.pixels.tobytes()).decode()
        return about | {"photo": None if canvas.photo is None else png(canvas.photo.start)}

    def _picture(self, domain, colours):
        """Colours (H, W, 3) uint8 as a MemoryRaster of a domain's bands and depth."""
        bands, limits = self.cfg.channels(domain), Limits.of(self.cfg, domain)
        return MemoryRaster(values_of_colours(colours, bands, limits), limits=limits)

    def _read(self, domain, name, content):
        """A file in base64 as a MemoryRaster; the file is removed at once."""
        name, content = Path(name).name, base64.b64decode(content, validate=True)
        table = self.classes if domain == self.input_domain else None
        bands, limits = self.cfg.bands(domain), Limits.of(self.cfg, domain)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder) / f"file{Path(name).suffix[:8]}"
            path.write_bytes(content)
            try:
                with Raster(path, table, UPLOADS, MOST_PIXELS, bands, limits) as raster:
                    if raster.height * raster.width > MOST_PIXELS:
                        raise UserError(f"{path}: more than {MOST_PIXELS} pixels: cut it")
                    print_doubts(raster)
                    remarks()[:] = [text.replace(path.name, name) for text in remarks()]
                    pixels = raster.values()
                    valid = raster.valid(0, 0, *pixels.shape[:2])
                    if raster.masked and valid.any() and not table:
                        pixels[~valid] = pixels[valid].mean(0)
                    memory = MemoryRaster(pixels, table, limits)
                    memory.path, memory.place = Path(name), raster.place
                    return memory
            except UserError as error:
                text = str(error).replace(str(path), name).replace("make it a TIFF, or cut", "cut")
                raise UserError(text) from None

    def _canvas(self, key):
        with self.lock:
            canvas = self.canvases.get(key)
            if not canvas:
                raise UserError("this canvas no longer exists: save what you see, then reopen it")
            self.canvases.move_to_end(key)
        return canvas

    def stroke(self, query, content):
        """Changes a box of a canvas and generates the samples, one stroke at a time."""
        canvas = self._canvas(query.get("canvas"))
        height, width = canvas.pixels.shape[:2]
        top, left = whole(query, "y", 0, height - 1), whole(query, "x", 0, width - 1)
        sides = whole(query, "height", 1, height - top), whole(query, "width", 1, width - left)
        samples = whole(query, "samples", 1, MOST_SAMPLES)
        change = canvas, (top, left, *sides), self._pixels(content, *sides), samples
        return self.worker.submit(self._generate, *change).result()

    def _pixels(self, content, *sides):
        """Bytes as class indices (H, W), or as colours (H, W, 3)."""
        shape = sides if self.classes else (*sides, 3)
        if len(content) != np.prod(shape):
            raise UserError(f"{len(content)} bytes where {np.prod(shape)} belong")
        pixels = np.frombuffer(content, np.uint8).reshape(shape)
        if self.classes and (pixels[pixels != IGNORED] >= len(self.classes)).any():
            raise UserError(f"a class outside the table of {len(self.classes)} classes")
        return pixels

    def _generate(self, canvas, box, pixels, samples):
        top, left, height, width = box
        canvas.pixels[top : top + height, left : left + width] = pixels
        begin, pictures = time.perf_counter(), []
        for variant in range(1, samples + 1):
            (y, x, *_), picture = canvas.generated(box, variant)
            pictures.append({"x": x, "y": y, "png": png(picture)})
        return {"pictures": pictures, "seconds": time.perf_counter() - begin}

    def file_of(self, query, content):
        """What was painted as a PNG: a label map has the table's values and colours."""
        sides = whole(query, "height", 1, MOST_PIXELS), whole(query, "width", 1, MOST_PIXELS)
        pixels = self._pixels(content, *sides)
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
