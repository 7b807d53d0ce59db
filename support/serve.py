"""The local server behind --serve: paint, and see what a model makes of it."""

import base64
import collections
import concurrent.futures
import contextlib
import functools
import io
import ipaddress
import itertools
import json
import secrets
import socket
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import torch
from PIL import Image

from support.batches import spread
from support.canvases import EditCanvas, TranslationCanvas, around
from support.classes import IGNORED, ClassTable
from support.errors import UserError
from support.opening import UPLOADS
from support.pictures import as_array
from support.processes import world_size
from support.rasters import Raster, label_image
from support.store import ImageStore

MOST_BYTES = 2**26  # of a request
MOST_PIXELS = 2**24  # of a picture: 4096 x 4096
MOST_ANSWERS = 4
KEPT = 2**25  # pixels of canvases; those used last stay
EXAMPLES = 12


def translations(cfg, predict, net, from_labels, to_labels):
    """--serve of a script that translates; the arguments are translate_files'."""

    def show(strip):
        return cfg.classes.palette[strip.argmax(0)] if to_labels else as_array(strip[None])

    predict = until_the_end(predict)

    def make(inputs, _):
        return TranslationCanvas(
            cfg, predict, net, inputs, cfg.classes if from_labels else None, show
        )

    Studio(cfg, cfg.classes if from_labels else None, make).serve()


def edits(cfg, predict, net):
    """--serve of a script that edits photographs; the arguments are edit_file's."""
    make = functools.partial(EditCanvas, cfg, until_the_end(predict), net)
    Studio(cfg, cfg.classes, make, edits=True).serve()


ENDED = threading.Event()


def until_the_end(predict):
    """A predict that gives up once the server has ended, between two batches of windows."""

    def predicting(*windows, **how):
        if ENDED.is_set():
            raise Refused(503, "the server has ended")
        return predict(*windows, **how)

    return predicting


class Studio:
    """What the page asks for: canvases to open, strokes, files to take away.

    make(pixels, photograph)  -> a canvas, TranslationCanvas or EditCanvas
    """

    def __init__(self, cfg, classes, make, edits=False):
        self.cfg, self.classes, self.make, self.edits = cfg, classes, make, edits
        if world_size() > 1:
            raise UserError("--serve: start it without torchrun, in one process")
        self.folder = Path(cfg.out)
        self.token = secrets.token_urlsafe(24)
        self.canvases, self.numbers = collections.OrderedDict(), itertools.count(1)
        self.worker = concurrent.futures.ThreadPoolExecutor(1)  # one predicting at a time
        self.examples = self._examples()

    def _examples(self):
        """[(pixels, photograph or None)] of validation images, evenly spread, if there are any."""
        try:
            store = ImageStore(self.cfg, "val", self.cfg.size)
        except (UserError, OSError):
            return []
        sides = (store.B, store.A)
        if not self.edits and self.cfg.direction == "AtoB":
            sides = (store.A, store.B)
        found = []
        for k in spread(EXAMPLES, len(sides[0])):
            pixels, other = (np.moveaxis(side[k % len(side)], 0, -1).copy() for side in sides)
            photo = other if store.paired and other.shape[2] == 3 else None
            found.append((pixels[..., 0] if self.classes else pixels, photo))
        return found

    def page(self):
        """The page, with what it needs to know of the model in it."""
        table = self.classes or ClassTable.load("maps")
        about = {
            "script": self.cfg.script,
            "edits": self.edits,
            "labels": bool(self.classes),
            "classes": list(zip(table.names, table.colors, strict=True)),
            "unlabeled": table.palette[IGNORED].tolist(),
            "side": self.cfg.window or self.cfg.size,
            "most": MOST_ANSWERS,
            "examples": [png(self._shown(*example)[::2, ::2]) for example in self.examples],
        }
        text = json.dumps(about).replace("<", "\\u003c")  # whatever a class is called
        return (Path(__file__).parent / "paint.html").read_text().replace("__DATA__", text)

    def _shown(self, pixels, photo):
        """What stands for an example: the photograph to edit, or else what the model is given."""
        if self.edits:
            return photo
        return self.classes.palette[pixels] if self.classes else pixels

    def open(self, wanted):
        """Opens {"example": k}, {"files": ...}, {"height", "width"} of a blank canvas, or again
        a {"canvas": number} that is open.
        """
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
        canvas.start, canvas.latest, canvas.dirty, canvas.beside = pixels, 0, None, photo
        key = str(next(self.numbers))
        self.canvases[key] = canvas
        while sum(kept.start.size for kept in self.canvases.values()) > KEPT:
            if len(self.canvases) == 1:
                break
            self.canvases.popitem(last=False)
        return self._described(key)

    def _described(self, key):
        canvas = self._canvas({"canvas": key})
        start, now = (base64.b64encode(x.tobytes()).decode() for x in (canvas.start, canvas.pixels))
        height, width = canvas.pixels.shape[:2]
        about = {"canvas": key, "height": height, "width": width, "start": start, "pixels": now}
        return about | {"photo": None if canvas.beside is None else png(canvas.beside)}

    def _decoded(self, files):
        """(pixels, photograph or None) of {"input": [name, base64], and of edits "photo"}."""
        found = []
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".opened-", dir=self.folder) as folder:
            for what, table in (("input", self.classes), ("photo", None))[: 1 + self.edits]:
                name, content = files[what]
                name = Path(name).name
                path = Path(folder) / f"{what}{Path(name).suffix[:8]}"
                path.write_bytes(base64.b64decode(content, validate=True))
                try:
                    with Raster(path, table, UPLOADS, MOST_PIXELS) as raster:
                        size = f"{raster.width}x{raster.height}"
                        if raster.height * raster.width > MOST_PIXELS:
                            raise UserError(f"{path}: {size} pixels are too many for this page")
                        if min(raster.height, raster.width) < 16:
                            raise UserError(f"{path}: {size} pixels are too few")
                        found.append(np.ascontiguousarray(raster.read()))
                except UserError as error:
                    raise UserError(str(error).replace(str(path), name)) from None
        pixels, photo = found if self.edits else (*found, None)
        if self.edits and photo.shape[:2] != pixels.shape[:2]:
            a, b = (f"{image.shape[1]}x{image.shape[0]}" for image in (photo, pixels))
            raise UserError(f"the photograph is {a}, its land cover {b}: sizes must agree")
        return pixels, photo

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
        left, top = whole(query, "x", 0, width - 1), whole(query, "y", 0, height - 1)
        box = (
            top,
            left,
            whole(query, "height", 1, height - top),
            whole(query, "width", 1, width - left),
        )
        answers = whole(query, "answers", 1, MOST_ANSWERS)
        shape = (*box[2:], *canvas.pixels.shape[2:])
        if len(content) != np.prod(shape):
            raise UserError(f"a stroke of {len(content)} bytes where {np.prod(shape)} belong")
        pixels = np.frombuffer(content, np.uint8).reshape(shape)
        if self.classes and (pixels[pixels != IGNORED] >= len(self.classes)).any():
            raise UserError(f"a class outside the table, which has {len(self.classes)}")
        canvas.latest += 1
        return self.worker.submit(
            self._generate, canvas, canvas.latest, box, pixels, answers
        ).result()

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
        """What was painted, as a PNG: the table's values and colours, which scripts read again."""
        pixels = self._canvas(query).pixels
        return encoded(
            label_image(pixels, self.classes) if self.classes else Image.fromarray(pixels)
        )

    def server(self):
        """The server, which listens from now on, and answers once it is told to."""
        cfg = self.cfg
        try:
            server = ThreadingHTTPServer((cfg.address, cfg.port), Handler)
        except socket.gaierror:
            raise UserError(f"--address {cfg.address}: no address of this machine") from None
        except OSError as error:
            what = f"cannot listen there ({error.strerror}): --port 0 takes any that is free"
            raise UserError(f"--address {cfg.address} --port {cfg.port}: {what}") from None
        server.daemon_threads, server.studio = True, self
        host, port = server.server_address
        if not ipaddress.ip_address(host).is_loopback:
            what = "whoever reaches this machine and knows the address below may use this model"
            print(f"warning: --address {cfg.address}: {what}", file=sys.stderr)
        print(f"paint at http://{host}:{port}/{self.token}/ (Ctrl-C ends it)", flush=True)
        return server

    def serve(self):
        """Answers till Ctrl-C."""
        with self.server() as server, contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        ENDED.set()
        self.worker.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(OSError):  # there are results of --generate in it
            self.folder.rmdir()
        print("ended")


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


class Handler(BaseHTTPRequestHandler):
    """One request. What is wrong with it is said in plain text, which the page shows."""

    server_version, sys_version = "paint", ""
    timeout = 60  # seconds without a byte
    headers_of_all = {
        "Cache-Control": "no-store",
        "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'; "
        "base-uri 'none'; form-action 'none'",
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
    }

    def do_GET(self):
        """The page, and the label map to take away."""
        self._answer({"": self._page, "labels.png": self._labels})

    def do_POST(self):
        """Opening a canvas, and strokes."""
        self._answer({"open": self._open, "stroke": self._stroke})

    def _answer(self, known):
        try:
            address = urlsplit(self.path)
            _, token, *name = address.path.split("/", 2)
            self._check(token)
            if not name:  # the last slash is missing
                self._send(301, "text/plain", b"", Location=f"/{token}/")
                return
            (name,) = name
            if name not in known:
                raise Refused(404, "there is nothing of that name")
            self.query = dict(parse_qsl(address.query))
            kind, content = known[name]()
            self._send(200, kind, content)
        except Refused as error:
            self._send(error.status, "text/plain", error.text.encode())
        except UserError as error:
            self._send(400, "text/plain", str(error).encode(errors="replace"))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self._send(400, "text/plain", f"not understood: {error!r}"[:200].encode())
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except OSError as error:
            self._send(507, "text/plain", f"cannot keep the file: {error.strerror}".encode())
        except (MemoryError, torch.OutOfMemoryError):
            self._send(507, "text/plain", b"out of memory: open a smaller picture")
        except Exception as error:  # a bug of ours: the page says so, too
            self._send(500, "text/plain", repr(error)[:300].encode())
            raise

    def _check(self, token):
        """Whether it comes from the page: by the address asked for, and the token in it."""
        address, port = self.server.server_address
        names = {self.server.studio.cfg.address, self.connection.getsockname()[0], "localhost"}
        if not ipaddress.ip_address(address).is_loopback:
            names |= {socket.gethostname(), socket.getfqdn()}
        hosts = {f"{name}:{port}".lower() for name in names}
        if port == 80:  # which browsers leave out
            hosts |= {name.lower() for name in names}
        host, origin = self.headers.get("Host", "").lower(), self.headers.get("Origin")
        if host not in hosts or origin not in (None, f"http://{host}"):
            raise Refused(403, "asked for by another name, or from another page")
        if not secrets.compare_digest(token.encode(), self.server.studio.token.encode()):
            raise Refused(403, "the address is incomplete: copy the one that --serve printed")

    def _content(self):
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise Refused(411, "without a length") from None
        if not 0 <= length <= MOST_BYTES:
            self.close_connection = True
            raise Refused(413, f"{length} bytes: at most {MOST_BYTES} are read")
        return self.rfile.read(length)

    def _page(self):
        return "text/html; charset=utf-8", self.server.studio.page().encode()

    def _labels(self):
        return "image/png", self.server.studio.label_map(self.query)

    def _open(self):
        wanted = json.loads(self._content())
        return "application/json", json.dumps(self.server.studio.open(wanted)).encode()

    def _stroke(self):
        done = self.server.studio.stroke(self.query, self._content())
        return "application/json", json.dumps(done).encode()

    def _send(self, status, kind, content, **more):
        with contextlib.suppress(ConnectionError):  # the page is gone
            self.send_response(status)
            headers = {"Content-Type": kind, "Content-Length": str(len(content))}
            for name, value in (headers | more | self.headers_of_all).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_):
        """Keeps quiet: the token stands in every line."""


class Refused(Exception):
    """A request that is not the page's: an HTTP status and a text."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status, self.text = status, text
