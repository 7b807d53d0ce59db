"""The page to paint on: what it paints, what its server refuses, and in a browser how it feels."""

import base64
import contextlib
import dataclasses
import functools
import http.client
import importlib.util
import io
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image

import common
from files import (
    CLASSES,
    LABELS,
    TABLE,
    geotiff,
    land_cover,
    picture,
    pictures_in,
    pixels_of,
    save,
    side_by_side,
)
from forks import forked, until
from pages import BROWSER
from runs import refused, tiny_run, use
from support import serve
from support import studio as studios
from support.canvases import EditCanvas, MemoryRaster, TranslationCanvas
from support.classes import ClassTable
from support.generate import _stroke
from support.limits import Limits
from support.pictures import as_array
from support.rasters import Raster
from support.studio import Studio
from tensors import calls_of, tiny

PLAYWRIGHT = importlib.util.find_spec("playwright")


class Painter(torch.nn.Module):
    """Stands in for a generator: the colour of the class, or of the picture, a little blurred."""

    def __init__(self, own_statistics=False):
        super().__init__()
        self.norm = torch.nn.InstanceNorm2d(3) if own_statistics else torch.nn.Identity()
        self.windows, self.samples = 0, []

    def forward(self, windows, whole=False, variant=1):
        self.windows += len(windows)
        self.samples.append(variant)
        if windows.shape[1] == 5:  # of an edit
            windows = windows[:, 3:4]
        x = common.draw(windows[:, 0], CLASSES) if windows.shape[1] == 1 else windows / 127.5 - 1
        if whole:  # noise
            x = x * (1 - 0.1 * torch.rand(1))
        return torch.nn.functional.avg_pool2d(self.norm(x), 5, 1, 2).tanh()


def configured(script, tmp_path, **options):
    options = {"out": str(tmp_path / "out"), "cache": str(tmp_path / "cache")} | options
    return tiny(script, **{"lc_classes": json.dumps(TABLE), "port": 0, **options})[1]


# ----------------------------------------------------------------------------------------- canvases


def generated(tmp_path, cfg, pixels, net=None):
    """What --generate makes of a label map."""
    name = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
    save(name, pixels)
    cfg = dataclasses.replace(cfg, generate=(str(name),), out=str(name.with_suffix("")))
    common.translate_files(cfg, net or Painter(), net, from_labels=True)
    return pixels_of(Path(cfg.out) / name.name)


def translating(cfg, predict, pixels, net=None, photo=None):
    raster = MemoryRaster(pixels, CLASSES)
    return TranslationCanvas(cfg, predict, net, as_array, raster, photo)


def random_labels(height, width):
    return np.random.default_rng(0).integers(0, 3, (height, width), np.uint8)


def put(picture, box, part):
    """Puts what a canvas has generated of a box into a picture."""
    top, left, height, width = box
    picture[top : top + height, left : left + width] = part


def test_a_canvas_shows_what_generate_gives_and_paints_only_what_a_stroke_touches(tmp_path):
    cfg, painter = configured("pix2pix", tmp_path, window=64), Painter()
    pixels = random_labels(200, 150)
    canvas = translating(cfg, painter, pixels)
    region, picture = canvas.generated((0, 0, 1, 1), 1)
    assert region == (0, 0, 200, 150) and painter.windows == 4 * 3
    assert np.array_equal(picture, generated(tmp_path, cfg, pixels))
    pixels = canvas.pixels
    for top, windows in ((60, 2 * 2), (100, 2 * 2), (170, 2)):
        pixels[top : top + 10, 100:110] = 1
        painter.windows = 0
        box, part = canvas.generated((top, 100, 10, 10), 1)
        assert painter.windows == windows and part.shape < (200, 150)
        put(picture, box, part)
        assert np.array_equal(picture, generated(tmp_path, cfg, pixels))


def test_samples_of_a_canvas_are_those_of_seeds(tmp_path):
    """A canvas of one window, where a model may have noise."""
    cfg, pixels = configured("pix2pix", tmp_path, window=64), random_labels(64, 64)
    canvas = translating(cfg, Painter(), pixels)
    for variant in (1, 2):
        want = generated(tmp_path, dataclasses.replace(cfg, seed=cfg.seed + variant - 1), pixels)
        assert np.array_equal(canvas.generated((0, 0, 64, 64), variant)[1], want)


def test_windows_of_a_canvas_share_their_statistics(tmp_path):
    cfg, net = configured("pix2pix", tmp_path, window=64), Painter(own_statistics=True)
    pixels = random_labels(200, 150)
    pixels[:100] = 1
    _, picture = translating(cfg, net, pixels, net).generated((0, 0, 1, 1), 1)
    assert np.array_equal(picture, generated(tmp_path, cfg, pixels, net))


def test_an_edit_shows_what_generate_gives_and_paints_only_what_is_new(tmp_path):
    cfg, painter = configured("mixlc", tmp_path, window=64), Painter()
    photo = picture(np.random.default_rng(0), 300, 400).copy()
    labels, edited = np.zeros((300, 400), np.uint8), photo.copy()
    canvas = EditCanvas(cfg, painter, None, MemoryRaster(labels, CLASSES), MemoryRaster(photo))
    save(tmp_path / "photo.png", photo)
    save(tmp_path / "lc.png", labels)
    files = {"generate": (str(tmp_path / "photo.png"),), "lc": str(tmp_path / "lc.png")}
    strokes = {"water:100,50,20,20": 1, "road:300,200,90,30": 3, "water:310,210,10,5": 3}
    for count, (stroke, windows) in enumerate(strokes.items(), 1):
        index, top, left, bottom, right = _stroke(stroke, CLASSES, 300, 400)
        canvas.pixels[top:bottom, left:right] = index
        painter.windows = 0
        put(edited, *canvas.generated((top, left, bottom - top, right - left), 1))
        assert painter.windows == windows
        out = tmp_path / f"out{count}"
        options = files | {"paint": tuple(strokes)[:count], "out": str(out)}
        common.edit_file(dataclasses.replace(cfg, **options), Painter())
        assert np.array_equal(edited, pixels_of(out / "photo.png"))
    box = 210, 310, 5, 10
    canvas.generated(box, 2)
    assert painter.samples[-1] == 2  # another answer is another sample
    canvas.pixels[:] = 0  # all of it erased
    painter.windows = 0
    put(edited, *canvas.generated(box, 1))
    assert np.array_equal(edited, photo) and painter.windows == 0


DEEP = Limits((0.0,) * 5, (5000.0,) * 5, "uint16")
# a picture's values, its limits, a colour, and the values that it paints
PAINTED = [
    ([7], None, (30, 60, 90), [60]),
    ([30, 60, 9], None, (30, 60, 90), [30, 60, 90]),
    ([7, 8], None, (30, 60, 90), [30, 60]),
    ([7, 8, 9, 5, 6], None, (30, 60, 90), [30, 60, 90, 5, 6]),
    ([4000, 9000, 70, 61, 9999], DEEP, (255, 0, 51), [5000, 0, 1000, 61, 9999]),
    ([0.5], Limits((-1.0,), (1.0,), "float32"), (0, 0, 153), [-0.6]),
]


@pytest.mark.parametrize(("values", "limits", "colour", "painted"), PAINTED)
def test_a_colour_changes_the_bands_that_are_shown(values, limits, colour, painted):
    """In the depth of the picture; the eraser brings the file's values back, beyond limits, too."""
    dtype = np.dtype(limits.dtype if limits else "uint8")
    raster = MemoryRaster(np.full((6, 4, len(values)), values, dtype), limits=limits)
    raster.now[2:4, 1:3] = colour
    expected = np.full((6, 4, len(values)), values, dtype)
    expected[2:4, 1:3] = painted
    assert raster.values().dtype == dtype and np.allclose(raster.values(), expected)
    assert np.allclose(raster.values(3, 2, 9, 9), expected[3:, 2:])
    raster.now[:] = raster.start
    assert (raster.values() == np.array(values, dtype)).all()


# ------------------------------------------------------------------------------------------- server


@contextlib.contextmanager
def serving(cfg, make, edits=False):
    """A function that asks a server on this machine as the page does; its studio, server, port."""
    studio = Studio(cfg, cfg.classes, make, edits)
    server = serve.listening(studio)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    host, port = server.server_address[:2]

    def ask(method, path, body=None, *, token=f"/{server.token}/", **headers):
        """(status, content) of an answer; JSON is read, and a dict is sent as JSON."""
        connection = http.client.HTTPConnection(host, port, timeout=60)
        body = json.dumps(body) if isinstance(body, dict) else body
        connection.request(method, f"{token}{path}", body, headers)
        answer = connection.getresponse()
        content, ask.headers = answer.read(), dict(answer.headers)
        if ask.headers["Content-Type"] == "application/json":
            content = json.loads(content)
        return answer.status, content

    ask.studio, ask.server, ask.port = studio, server, port
    try:
        yield ask
    finally:
        server.shutdown()
        server.server_close()
        studio.worker.shutdown()


@pytest.fixture
def ask(tmp_path, landcover):
    cfg = configured("pix2pix", tmp_path, window=64, data=str(landcover))

    def make(given, photo):
        return translating(cfg, Painter(), given.pixels, photo=photo)

    with serving(cfg, make) as asking:
        yield asking


def opened(ask, **wanted):
    status, answer = ask("POST", "open", wanted or {"width": 80, "height": 64})
    assert status == 200, answer
    return answer["canvas"]


def stroke(ask, canvas, x=0, y=0, width=5, height=5, value=1, samples=1):
    query = f"canvas={canvas}&x={x}&y={y}&width={width}&height={height}&samples={samples}"
    return ask("POST", f"stroke?{query}", bytes([value]) * (width * height))


def in_base64(name, content):
    """A file as the page sends it."""
    return [name, base64.b64encode(content).decode()]


def arrays(write, name, *content):
    """A file of numpy as the page sends it, written by np.save or another."""
    file = io.BytesIO()
    write(file, *content)
    return in_base64(name, file.getvalue())


def file(array, name="x.png", kind="PNG", **options):
    content = io.BytesIO()
    Image.fromarray(array).save(content, kind, **options)
    return in_base64(name, content.getvalue())


def test_a_stroke_is_painted_and_the_map_can_be_read_again(ask, tmp_path):
    canvas = opened(ask)
    status, answer = stroke(ask, canvas, 20, 10, 30, 40, samples=2)
    assert status == 200
    one, other = (pixels_of(io.BytesIO(base64.b64decode(x["png"]))) for x in answer["pictures"])
    want = np.zeros((64, 80), np.uint8)
    want[10:50, 20:50] = 1
    assert one.shape == (64, 80, 3) and not np.array_equal(one, other)
    far = [np.abs(one[30, 35] - np.array(color)).sum() for color in CLASSES.colors]
    assert np.argmin(far) == 1
    again = ask("POST", "open", {"canvas": canvas})[1]
    assert (again["height"], again["width"]) == (64, 80)
    pixels, start = (base64.b64decode(again[name]) for name in ("pixels", "start"))
    assert pixels == want.tobytes() and start == bytes(64 * 80)
    (tmp_path / "map.png").write_bytes(ask("POST", "labels.png?width=80&height=64", pixels)[1])
    assert np.array_equal(Raster(tmp_path / "map.png", CLASSES).read(), want)
    for sides, content in (("width=80&height=63", pixels), ("width=1&height=1", b"\3")):
        assert ask("POST", f"labels.png?{sides}", content)[0] == 400


def test_parts_of_a_large_canvas_state_where_they_lie(ask):
    canvas = opened(ask, width=200, height=64)
    for x, corner in ((0, (0, 0)), (180, (136, 0))):  # at first all of it
        (part,) = stroke(ask, canvas, x)[1]["pictures"]
        assert (part["x"], part["y"]) == corner


PICTURES = {"lc_classes": "pictures"}
MODELS = {  # script, what it is given: options, the classes to paint with
    "pix2pix, land cover": ({}, CLASSES),
    "pix2pix, maps": (PICTURES, ClassTable.load("maps")),
    "pix2pix, photographs": ({"direction": "AtoB"} | PICTURES, None),
    "cyclegan, photographs": ({"direction": "AtoB"}, None),
    "mixlc, edits": ({}, CLASSES),
}


@pytest.mark.parametrize("model", MODELS)
def test_the_page_knows_the_model(model, tmp_path, landcover):
    (options, table), (script, given) = MODELS[model], model.split(", ")
    cfg = configured(script, tmp_path, window=48, data=str(landcover), **options)
    edits, labels = given == "edits", None if given in ("maps", "photographs") else cfg.classes
    studio = Studio(cfg, labels, None, edits)
    data = r'<script id="data" type="application/json">(.*)</script>'
    about = json.loads(re.findall(data, studio.page())[0])
    start = studio.examples[0][edits].start  # of edits the photograph is shown
    shown = labels.palette[start] if labels and not edits else start
    examples = [pixels_of(io.BytesIO(base64.b64decode(x))) for x in about.pop("examples")]
    assert len(examples) == 2 and (examples[0] == shown[::2, ::2]).all()
    rows = zip(table.names, table.colors, strict=True) if table else []
    assert about == {
        "script": script,
        "edits": edits,
        "labels": bool(labels),
        "classes": [[name, list(color)] for name, color in rows],
        "unlabeled": [0x9B] * 3 if labels else [0] * 3,
        "blank": {"height": 48, "width": 48},
        "most": 4,
    }


def test_an_example_is_opened_beside_its_photograph(ask):
    _, example = ask("POST", "open", '{"example": 1}')
    assert example["photo"] and opened(ask, example=1)  # to compare with
    studio = Studio(dataclasses.replace(ask.studio.cfg, lc_classes="pictures"), None, None)
    picture = studio.file_of({"height": 1, "width": 2}, bytes(range(6)))
    assert pixels_of(io.BytesIO(picture)).tolist() == [[[0, 1, 2], [3, 4, 5]]]


@pytest.mark.parametrize(
    ("window", "shape"), [(40, (40, 40)), ((100, 200), (64, 128)), (0, (64, 64))]
)
def test_examples_are_as_wide_and_high_as_windows(tmp_path, pairs, window, shape):
    """They are stored as squares; as a whole they are squeezed as in training once more."""
    cfg = configured("pix2pix", tmp_path, data=str(pairs), window=window, lc_classes="pictures")
    studio = Studio(cfg, None, None)
    assert all(image.start.shape == (*shape, 3) for image in studio.examples[0])
    height, width = np.broadcast_to(window or 64, 2)
    assert f'"blank": {{"height": {height}, "width": {width}}}' in studio.page()


def test_no_more_images_are_decoded_than_the_page_shows(tmp_path):
    side_by_side(tmp_path / "data", train=1, val=15, side=16)
    cfg = configured("pix2pix", tmp_path, data=str(tmp_path / "data"), lc_classes="pictures")
    assert len(Studio(cfg, None, None).examples) == 12
    (store,) = Path(cfg.cache).glob("val-*.npy")
    assert len(np.load(store, mmap_mode="r")) == 12


def test_without_validation_images_the_page_opens_with_a_picture_of_docs(tmp_path):
    for direction, name in (("BtoA", "example_map.png"), ("AtoB", "example.jpg")):
        cfg = configured("pix2pix", tmp_path, data=str(tmp_path / "none"), direction=direction)
        ((given, photo),) = Studio(cfg, None, None).examples
        shown = Image.open(ROOT / "docs" / name).convert("RGB")
        assert (given.start == np.asarray(shown)).all() and photo is None
    colors = "3c1098 8429f6 6ec1e4 fedd3a e2a929"  # of city_lc.png
    rows = [{"name": color, "color": f"#{color}"} for color in colors.split()]
    how = {"data": str(tmp_path / "none"), "lc_classes": json.dumps(rows)}
    for script, given_photo in (("mixlc", "city.jpg"), ("pix2pix", None)):
        cfg = configured(script, tmp_path, **how)
        ((given, photo),) = Studio(cfg, cfg.classes, None, edits=bool(given_photo)).examples
        assert (cfg.classes.palette[given.start] == pixels_of(ROOT / "docs" / "city_lc.png")).all()
        if given_photo:
            assert (photo.start == pixels_of(ROOT / "docs" / given_photo)).all()
        else:
            assert photo is None
    cfg = configured("mixlc", tmp_path, data=how["data"], lc_classes="maps")  # other colours
    assert not Studio(cfg, cfg.classes, None, edits=True).examples


def test_examples_without_pairs_have_no_photograph_to_compare_with(tmp_path, landcover):
    """Nor have photographs that are translated into land cover."""
    test = "testA/0.png testA/1.png testA/2.png testB/0.png testB/1.png"
    data = pictures_in(tmp_path / "data", f"trainA/0.png trainB/0.png {test}")
    cfg = configured("cyclegan", tmp_path, data=str(data), lc_classes="pictures")
    make = functools.partial(TranslationCanvas, cfg, Painter(), None, as_array)
    studio = Studio(cfg, None, make)
    assert [photo for _, photo in studio.examples] == [None] * 3
    opened = studio.open({"example": 0})["canvas"]
    assert studio.canvases[opened].pixels is not studio.examples[0][0].now  # it stays unpainted
    cfg = configured("cyclegan", tmp_path, data=str(landcover), **LABELS, direction="AtoB")
    assert [photo for _, photo in Studio(cfg, None, None).examples] == [None] * 2
    cfg = configured("mixlc", tmp_path, data=str(data), lc_classes="pictures")
    assert not Studio(cfg, None, None, edits=True).examples  # nor is there a pair to edit


def test_strangers_are_refused(ask):
    token = ask.server.token
    for wrong in ("/wrong/", "//", f"/{token[:-1]}/", f"/{token}x/"):
        status, text = ask("GET", "", token=wrong)
        assert status == 403 and b"open the one that --serve printed last" in text
    assert ask("GET", "", Host="evil.example")[0] == 403
    assert ask("GET", "", Host="localhost")[0] == 200
    own = f"http://127.0.0.1:{ask.port}"
    assert ask("POST", "open", '{"example": 0}', Origin=own)[0] == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        status, text = ask("POST", "open", "{}", Origin=origin)
        assert status == 403 and b"from another page" in text
    assert ask("GET", "../../common.py")[0] == 404 and len(token) >= 32
    assert stroke(ask, opened(ask))[0] == 200


HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
ALLOWED = {
    *("default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"),
    *("img-src 'self' data:", "connect-src 'self'"),
    *("style-src 'unsafe-inline'", "script-src 'unsafe-inline'"),
}


def test_every_answer_forbids_what_the_page_does_not_need(ask):
    page = f"/{ask.server.token}/"
    html, text = "text/html; charset=utf-8", "text/plain"
    answers = (page, 200, html, None), ("/", 403, text, None), (page[:-1], 301, text, page)
    for path, status, kind, place in answers:
        assert ask("GET", "", token=path)[0] == status
        headers = ask.headers
        assert (headers["Content-Type"], headers.get("Location")) == (kind, place)
        assert headers.items() >= HEADERS.items()
        assert set(headers["Content-Security-Policy"].split("; ")) == ALLOWED


STROKES = {
    "x=-1": "x -1: must be 0 to 79",
    "x=80": "x 80: must be 0 to 79",
    "y=a": "y is missing, or no whole number",
    "width=61": "width 61: must be 1 to 60",
    "samples=9": "samples 9: must be 1 to 4",
    "height=4": "15 bytes where 20 belong",
    "canvas=99": "this canvas no longer exists",
}


def test_strokes_that_do_not_fit_are_refused(ask):
    canvas = opened(ask)
    for change, text in STROKES.items():  # of one query's values the last counts
        query = f"canvas={canvas}&x=20&y=0&width=5&height=3&samples=1&{change}"
        status, answer = ask("POST", f"stroke?{query}", bytes(15))
        assert status == 400 and text in answer.decode()
    assert stroke(ask, canvas, value=3)[0] == 400  # no class of the table
    assert stroke(ask, canvas, value=common.IGNORED)[0] == 200


RUBBISH = ['{"files": {"input": ["a.png", "???"]}}', '{"files": 3}', "{}"]
RUBBISH += ["", "[" * 20000, "7", b"\xff\xfe", '{"example": 2}', '{"example": 1e999}']
RUBBISH += ['{"height": 4097, "width": 64}']


def test_rubbish_is_refused_in_a_line(ask):
    for body in RUBBISH:
        status, answer = ask("POST", "open", body)
        assert status == 400 and 0 < len(answer) < 300 and b"\n" not in answer, body


def test_length_is_bounded(ask):
    assert opened(ask, files={"input": file(random_labels(500, 500), "x.tif", "TIFF")})
    status, text = ask("POST", "open", None, **{"Content-Length": str(2**40)})
    assert status == 413 and b"too large: files may have 45 MB" in text
    assert ask("POST", "open", iter([b"{}"]), **{"Transfer-Encoding": "chunked"})[0] == 413


VRT = b"<VRTDataset rasterXSize='64' rasterYSize='64'></VRTDataset>"
LARGE, TOO_LARGE = random_labels(100, 60), random_labels(300, 300)
DECODED = "cannot be decoded"
# files that the page does not open, and the line that it shows
WRONG_FILES = [
    (in_base64("x.tif", VRT), f"x.tif: {DECODED}"),
    (in_base64("x.eps", b"%!PS-Adobe-3.0 EPSF-3.0"), f"x.eps: {DECODED}"),
    (in_base64("x.gif", b"GIF89a"), f"x.gif: {DECODED}"),
    (in_base64("x", b"II*\0"), f"x: {DECODED}"),
    (in_base64("d.png/../../e.png", b"\x89PNG\r\n\x1a\nrubbish"), f"e.png: {DECODED}"),
    (file(LARGE + 9, "../b.png"), "b.png: label values"),
    (file(picture(np.random.default_rng(0), 90, 90)), "x.png: not the colours of the class table"),
    (arrays(np.savez_compressed, "x.npz", TOO_LARGE), "x.npz: has more pixels than fit"),
    (file(TOO_LARGE, "x.tif", "TIFF"), "x.tif: more than 10000 pixels"),
]


def test_files_that_are_refused_do_not_stay(ask, tmp_path, monkeypatch):
    (tmp_path / "aside").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "aside"))
    monkeypatch.setattr(studios, "MOST_PIXELS", 10_000)
    for given, text in WRONG_FILES:
        status, answer = ask("POST", "open", {"files": {"input": given}})
        assert status == 400 and answer.decode().startswith(text)
    assert opened(ask, files={"input": file(LARGE)})
    assert not list((tmp_path / "aside").iterdir()) and not (tmp_path / "out").exists()


def test_files_of_every_kind_are_opened(ask):
    labels, colours = random_labels(40, 60), CLASSES.palette[random_labels(40, 60)]
    files = [file(labels, name, "TIFF") for name in ("x.tif", "x.TIFF")]
    files += [file(labels), file(colours, "x.webp", "WEBP", lossless=True)]
    files += [arrays(np.save, name, labels) for name in ("x.npy", "X.NPY")]
    files.append(arrays(np.savez, "x.npz", labels, labels[:9]))  # the first one is read
    for given in files:
        canvas = opened(ask, files={"input": given})
        assert np.array_equal(ask.studio.canvases[canvas].pixels, labels), given[0]


def test_holes_of_a_photograph_are_filled_with_its_mean_colour(tmp_path):
    """However the file marks them: the picture painted must not depend on it."""
    cfg = configured("pix2pix", tmp_path, data="none", lc_classes="pictures")
    studio = Studio(cfg, None, None)
    for nothing in (0, 255):
        pixels = np.full((20, 20, 3), nothing, np.uint8)
        pixels[:10] = 10, 20, 30
        content = geotiff(tmp_path / "x.tif", pixels, nodata=nothing).read_bytes()
        opened = studio._read("B", *in_base64("x.tif", content))
        assert (opened.start == (10, 20, 30)).all()
    content = geotiff(tmp_path / "x.tif", pixels[10:], nodata=255).read_bytes()
    with warnings.catch_warnings(action="error", category=RuntimeWarning):  # of an empty mean
        assert (studio._read("B", *in_base64("x.tif", content)).start == 255).all()


def end_while_a_file_is_read(aside, out):
    """Serves a page that gets SIGTERM while it decodes a file."""

    def hang(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    tempfile.tempdir = str(aside)
    canvases = Studio(tiny("pix2pix", port=0, data="none", out=str(out))[1], None, None)
    studios.Raster = hang
    given = [{"files": {"input": ["x.png", ""]}}]
    thread = threading.Thread(target=canvases.open, args=given, daemon=True)
    threading.Timer(0.5, thread.start).start()
    common.command(lambda _: serve.serve(canvases))()  # as in a script


@pytest.mark.slow
def test_a_file_does_not_stay_when_the_server_is_ended_meanwhile(tmp_path):
    """SIGTERM arrives while it is decoded; the user's empty --out stays."""
    folders = tmp_path / "aside", tmp_path / "out"
    for folder in folders:
        folder.mkdir()
    log = tmp_path / "log"
    forked(end_while_a_file_is_read, *folders, log=log).join(60)
    assert log.read_text().endswith("ended\n")
    assert not list(folders[0].iterdir()) and folders[1].is_dir()


def test_an_edit_needs_two_files_of_one_size(tmp_path):
    cfg = configured("mixlc", tmp_path, data=str(tmp_path / "none"), window=64)
    labels, photo = np.zeros((70, 90), np.uint8), np.zeros((70, 90, 3), np.uint8)
    with serving(cfg, lambda *both: EditCanvas(cfg, Painter(), None, *both), True) as ask:
        assert ask("POST", "open", {"width": 64, "height": 64})[0] == 400
        files = {"input": file(labels), "photo": file(photo[:69])}
        status, answer = ask("POST", "open", {"files": files})
        assert status == 400 and b"90x69 and 90x70: sizes must agree" in answer
        placed = {}
        for name, pixels, crs in (("photo", photo, 32632), ("input", labels, 32633)):
            path = geotiff(tmp_path / f"{name}.tif", pixels, crs=f"EPSG:{crs}")
            placed[name] = in_base64(path.name, path.read_bytes())
        status, answer = ask("POST", "open", {"files": placed})
        assert status == 400 and b"input.tif lies elsewhere than photo.tif" in answer
        assert opened(ask, files=placed | {"input": file(labels)})
        canvas = opened(ask, files=files | {"photo": file(photo)})
        status, answer = stroke(ask, canvas, 30, 30, 10, 10)
        assert status == 200 and len(answer["pictures"]) == 1


def test_only_so_many_pixels_are_kept_those_used_last(ask, monkeypatch):
    monkeypatch.setattr(studios, "KEPT", 3 * 64 * 80)
    first, second, third = (opened(ask) for _ in range(3))
    assert stroke(ask, first)[0] == 200
    fourth = opened(ask)
    found = [stroke(ask, canvas)[0] for canvas in (first, second, third, fourth)]
    assert found == [200, 400, 200, 200]
    assert len({first, second, third, fourth, opened(ask)}) == 5  # no number is given twice
    monkeypatch.setattr(studios, "KEPT", 1)
    assert stroke(ask, opened(ask))[0] == 200  # one that alone is larger


def test_canvases_are_opened_by_many_at_once(ask):
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(4) as threads:
        opened = list(threads.map(ask.studio.open, [{"height": 16, "width": 16}] * 240))
    sys.setswitchinterval(before)
    assert len({about["canvas"] for about in opened}) == 240


def test_a_bug_is_on_the_page_and_in_the_terminal(ask, monkeypatch):
    printed = threading.Event()
    monkeypatch.setattr(ask.studio, "page", lambda: 1 / 0)
    monkeypatch.setattr(ask.server, "handle_error", lambda *_: printed.set())
    status, text = ask("GET", "")
    assert status == 500 and b"ZeroDivisionError" in text
    assert printed.wait(10)


@pytest.mark.parametrize("script", ["pix2pix", "mixlc"])
def test_a_painting_stops_when_the_server_has_ended(script, tmp_path, monkeypatch):
    served, ended = calls_of(monkeypatch, serve, "serve", lambda _: None), threading.Event()
    monkeypatch.setattr(serve, "ENDED", ended)
    cfg = configured(script, tmp_path, data="none", window=64)
    if script == "mixlc":
        serve.edits(cfg, Painter(), None)
    else:
        serve.translations(cfg, Painter(), None, from_labels=True, to_labels=False)
    ((studio,),) = served
    photo = MemoryRaster(np.zeros((64, 64, 3), np.uint8))
    canvas = studio.make(MemoryRaster(random_labels(64, 64), CLASSES), photo)
    canvas.pixels[9:20, 9:20] = 1
    box = 0, 0, 64, 64
    assert canvas.generated(box, 1)[1].shape == (64, 64, 3)
    ended.set()
    canvas.pixels[30:40, 9:20] = 2
    with pytest.raises(serve.Refused, match="ended"):
        canvas.generated(box, 1)


def test_a_canvas_is_opened_between_paintings(ask):
    """A predicting has the network normalise by statistics of its own meanwhile."""
    canvas, threads = opened(ask), set()

    def noted(function):
        return lambda *given: threads.add(threading.get_ident()) or function(*given)

    ask.studio.make = noted(ask.studio.make)
    ask.studio.canvases[canvas].generated = noted(ask.studio.canvases[canvas].generated)
    opened(ask)
    assert len(threads) == 1
    stroke(ask, canvas)
    assert len(threads) == 1


def test_the_end_waits_for_what_is_being_answered(ask, monkeypatch):
    """As PyTorch aborts if Python ends while another thread frees its tensors."""
    begun, answered, hurried = threading.Event(), [], threading.Event()

    def page():
        begun.set()
        hurried.wait(0.3)
        answered.append(True)
        return ""

    def ends():
        assert not serve.ENDED.is_set()
        threading.Thread(target=ask, args=("GET", "")).start()
        begun.wait(10)

    monkeypatch.setattr(ask.studio, "page", page)
    monkeypatch.setattr(ask.server, "serve_forever", ends)
    monkeypatch.setattr(serve, "ENDED", threading.Event())
    serve.ENDED.set()  # by an earlier server
    monkeypatch.setattr(serve, "listening", lambda _: contextlib.nullcontext(ask.server))
    slow = socket.create_connection(("127.0.0.1", ask.port))
    lines = f"POST /{ask.server.token}/stroke HTTP/1.0", "Host: localhost", "Content-Length: 9"
    slow.sendall("\r\n".join([*lines, "", "123"]).encode())
    while not any(hasattr(thread, "connection") for thread in threading.enumerate()):
        time.sleep(0.01)
    serve.serve(ask.studio)
    slow.settimeout(10)  # its request counts as finished
    assert answered and slow.recv(99).startswith(b"HTTP/1.0 4")
    slow.close()


def test_addresses(tmp_path, capsys):
    def listening(**options):
        cfg = configured("pix2pix", tmp_path, data="none", **options)
        server = serve.listening(Studio(cfg, CLASSES, None))
        server.server_close()
        return capsys.readouterr().err, socket.gethostname().lower() in server.names

    assert listening() == ("", False)
    said, named = listening(address="0.0.0.0")
    assert "warning: --address 0.0.0.0" in said and named
    every = configured("pix2pix", tmp_path, data="none", address="0.0.0.0")
    with serving(every, None) as ask:
        assert ask("GET", "", Host=f"127.0.0.1:{ask.port}")[0] == 200
    with refused("--address nowhere.invalid"):
        listening(address="nowhere.invalid")
    with socket.create_server(("127.0.0.1", 0)) as taken, refused("cannot listen .* --port 0"):
        listening(port=taken.getsockname()[1])


def test_an_address_of_ipv6(tmp_path, capsys):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    cfg = configured("pix2pix", tmp_path, data="none", address="::1")
    with serving(cfg, None) as ask:
        assert f"http://[::1]:{ask.port}/" in capsys.readouterr().out
        assert ask("GET", "")[0] == 200
        assert ask("GET", "", Host="evil.example")[0] == 403


def test_strangers_that_keep_silent_do_not_stop_the_page(ask, monkeypatch):
    strangers = [socket.create_connection(("127.0.0.1", ask.port)) for _ in range(6)]
    assert ask("GET", "")[0] == 200
    for connection in strangers:
        connection.close()
    assert serve.Handler.timeout <= 5
    limits = calls_of(monkeypatch, socket.socket, "settimeout")
    for token, waits in ((ask.server.token, True), ("wrong", False)):
        limits.clear()
        ask("GET", "", token=f"/{token}/")
        assert [seconds for _, seconds in limits].count(60) == 1 + waits  # one is the client's


# ------------------------------------------------------------------------------------------ browser


@pytest.fixture(scope="module", params=["pix2pix", "mixlc"])
def address(request, tmp_path_factory):
    """The page's address: a model trained for a moment is served by a process of its own.

    Tests of what the page does alike for a translation and for an edit take one of them.
    """
    script, root = request.param, tmp_path_factory.mktemp("model")
    data = land_cover(root / "data", side=150)
    more = "--epochs 1 --no-erase" if script == "mixlc" else "--epochs 1"  # mixlc: no noise
    run = tiny_run(script, data, root / "run", more)
    tiny(script)[0].main([*run, "--batch-size", "1"])  # pix2pix: noise
    with served(script, root / "run", root / "log") as found:
        yield found


@contextlib.contextmanager
def served(script, run, log):
    """The address of a run's page, served by a process of its own."""
    process = forked(tiny(script)[0].main, use(run, "--serve --port 0"), log=log)
    try:
        log.touch()
        found = until(lambda: re.search(r"paint at (\S+) ", log.read_text()), process.is_alive, log)
        yield found[1]
        os.kill(process.pid, signal.SIGINT)
        process.join(30)
        assert process.exitcode == 0 and log.read_text().endswith("ended\n")
    finally:
        process.kill()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page in a browser; `painted` counts the paintings that it has shown."""

    def __init__(self, page, address):
        self.page, self.painted, self.errors = page, 0, []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(address)
        self.wait()
        page.fill("#size", "20")

    def wait(self):
        """Until the next painting is shown."""
        self.painted += 1
        self.page.wait_for_selector(f'body[data-painted="{self.painted}"]', timeout=60_000)

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def drag(self, *places):
        """Over the canvas, between places given in shares of its sides."""
        box = self.page.locator("#map").bounding_box()
        at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
        self.page.mouse.move(*at[0])
        self.page.mouse.down()
        for place in at[1:]:
            self.page.mouse.move(*place, steps=4)
        self.page.mouse.up()

    def stroke(self, *places, keys=()):
        """Drags after some keys, and waits for what follows."""
        self.press(*keys)
        self.drag(*places)
        self.wait()

    def pixels(self):
        """The painted label map."""
        height, width, *pixels = self.page.evaluate("[height, width, ...pixels]")
        return np.reshape(pixels, (height, width))

    def picture(self):
        """The bytes of the first answer."""
        return self.page.evaluate(
            "Array.from(figures[0].picture.getContext('2d')"
            ".getImageData(0, 0, width, height).data).join()"
        )

    def downloaded(self, selector, path):
        with self.page.expect_download() as download:
            self.page.locator(selector).first.click()
        download.value.save_as(path)
        return path

    def map_file(self, folder):
        """The class indices of the label map that the page gives to take away."""
        return Raster(self.downloaded("#labels", folder / "map.png"), CLASSES).read()

    def edits(self):
        return self.page.locator("#photolabel").is_visible()

    def shows_an_error(self, text):
        self.page.wait_for_selector("#status.wrong")
        return text in self.page.inner_text("#status")


DROP = """content => {
    const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "map.png"));
    const event = new DragEvent("drop", {dataTransfer: transfer, bubbles: true});
    document.getElementById("map").dispatchEvent(event);
}"""


@pytest.mark.slow
@pytest.mark.skipif(
    not (PLAYWRIGHT and BROWSER), reason="needs Chromium and pip install playwright"
)
class TestBrowser:
    @pytest.fixture
    def tab(self, chromium, address):
        context = chromium.new_context(accept_downloads=True)
        tab = Tab(context.new_page(), address)
        yield tab
        assert not tab.errors
        context.close()

    def test_paint_undo_redo_fill_and_erase(self, tab):
        first, before = tab.pixels(), tab.picture()
        tab.stroke((0.4, 0.4), (0.6, 0.6), keys="2")
        second = tab.pixels()
        assert (second == 1).sum() > (first == 1).sum() and tab.picture() != before
        for keys, want in (("Control+z", first), ("Control+Shift+z", second)):
            tab.press(keys)
            tab.wait()
            assert (tab.pixels() == want).all()
            assert (tab.picture() == before) == (want is first)
        tab.stroke((0.25, 0.25), (0.75, 0.5), keys="r3")
        quarter = len(first) // 4
        inside = slice(quarter + 1, 2 * quarter - 1), slice(quarter + 1, 3 * quarter - 1)
        assert (tab.pixels()[inside] == 2).all()
        tab.stroke((0.3, 0.3), (0.3, 0.3), keys="f1")
        assert (tab.pixels()[inside] == 0).all()
        tab.press("e")
        tab.page.fill("#size", str(2 * quarter))
        for row in (0.1, 0.3, 0.5, 0.7, 0.9):  # some may be painted together
            tab.drag((0, row), (1, row))
        assert (tab.pixels() == first).all()
        while tab.page.evaluate("busy"):
            tab.page.wait_for_timeout(20)
        assert tab.picture() == before

    def test_fill_keeps_to_a_class_of_a_picture(self, chromium, trained, tmp_path):
        """Land and paved ground of the maps data differ by 11 levels."""
        with served("pix2pix", trained("pix2pix"), tmp_path / "log") as address:
            tab = Tab(chromium.new_page(), address)
            tab.page.click("#blank")
            tab.wait()
            tab.stroke((0.25, 0.25), (0.75, 0.75), keys="r8")
            tab.stroke((0.5, 0.5), (0.5, 0.5), keys="f5")
            colours = np.reshape(tab.page.evaluate("Array.from(pixels)"), (80, 80, 3))
        land, _, _, _, water, *_ = ClassTable.load("maps").colors
        assert (colours[2, 2] == land).all() and (colours[25:55, 25:55] == water).all()

    def test_one_tab_paints_a_canvas_and_saves_it_without_the_server(
        self, chromium, trained, tmp_path
    ):
        with served("pix2pix", trained("pix2pix"), tmp_path / "log") as address:
            context = chromium.new_context(accept_downloads=True)
            first = Tab(context.new_page(), address)
            second = Tab(context.new_page(), first.page.url)
            first.page.wait_for_function("canvas === null")
            assert "opened in another tab" in first.page.inner_text("#status")
            second.stroke((0.25, 0.25), (0.75, 0.75), keys="r5")
            painted = np.reshape(second.page.evaluate("Array.from(pixels)"), (-1, 3))
        saved = Image.open(second.downloaded("#labels", tmp_path / "input.png")).convert("RGB")
        assert (np.reshape(saved, (-1, 3)) == painted).all()
        assert "saved in the colours that are shown: no answer" in second.page.inner_text("#status")

    def test_samples_slider_and_files_to_take_away(self, tab, tmp_path):
        figures = tab.page.locator("main figure")
        tab.page.select_option("#samples", "3")
        tab.wait()
        assert figures.count() == 4  # nothing to tell them apart by, so far
        tab.stroke((0.4, 0.4), (0.6, 0.6), keys="2")
        assert figures.count() == (2 if tab.edits() else 4)
        assert ("no noise" in tab.page.inner_text("#status")) == tab.edits()
        figures.locator("input[type=range]").first.fill("50")
        assert "50%" in tab.page.evaluate("figures[0].before.style.clipPath")
        answer = Image.open(
            tab.downloaded("main figure:not(#left) button", tmp_path / "answer.png")
        )
        assert answer.size == (64, 64) and answer.mode == "RGB"
        assert (tab.map_file(tmp_path) == tab.pixels()).all()

    def test_files_broken_and_whole(self, tab, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
        save(tmp_path / "map.png", np.full((70, 90), 2, np.uint8))
        geotiff(tmp_path / "photo.tif", np.full((70, 90, 5), 100, np.uint8))
        if tab.edits():
            tab.page.set_input_files("#photo", tmp_path / "photo.tif")
            tab.page.wait_for_selector("text=now open its land cover")
        tab.page.set_input_files("#input", tmp_path / "broken.png")
        assert tab.shows_an_error("broken.png: cannot be decoded")
        if tab.edits():
            tab.page.set_input_files("#photo", tmp_path / "photo.tif")
        content = base64.b64encode((tmp_path / "map.png").read_bytes()).decode()
        tab.page.evaluate(DROP, content)
        tab.wait()
        assert (tab.pixels() == 2).all() and tab.pixels().shape == (70, 90)
        assert ("have 5 bands" in tab.page.inner_text("#remarks")) == tab.edits()

    def test_a_reload_keeps_the_work_and_tabs_their_own(self, tab, address):
        tab.stroke((0.4, 0.4), (0.6, 0.6), keys="2")
        painted, picture = tab.pixels(), tab.picture()
        other = Tab(tab.page.context.new_page(), address)
        assert (other.pixels() != painted).any()
        tab.page.reload()
        tab.painted = 0
        tab.wait()
        assert (tab.pixels() == painted).all() and tab.picture() == picture

    @pytest.mark.parametrize("address", ["mixlc"], indirect=True)
    def test_a_stroke_that_was_lost_goes_with_the_next(self, tab, tmp_path):
        tab.page.context.set_offline(True)
        tab.press("2")
        tab.drag((0.2, 0.2), (0.3, 0.3))
        assert tab.shows_an_error("")
        tab.page.context.set_offline(False)
        assert (tab.map_file(tmp_path) == tab.pixels()).all()  # what is seen is saved
        tab.stroke((0.7, 0.7), (0.8, 0.8))
        assert (tab.map_file(tmp_path) == tab.pixels()).all()

    @pytest.mark.parametrize("address", ["pix2pix"], indirect=True)
    def test_back_and_forth_between_canvases(self, tab):
        """Of two that are opened at once the last is shown; Back returns to the one before."""
        tab.stroke((0.4, 0.4), (0.6, 0.6), keys="2")
        first = tab.pixels()
        tab.page.evaluate("() => { open({example: 1}); open(about.blank); }")
        tab.wait()
        assert (tab.pixels() == 0).all()
        tab.page.go_back()
        tab.wait()
        assert (tab.pixels() == first).all()

    @pytest.mark.parametrize("address", ["pix2pix"], indirect=True)
    def test_zoom_stays_when_the_window_changes(self, tab):
        for key, same in (("0", False), ("+", True)):
            tab.press(key)
            before = tab.page.evaluate("zoom")
            width = tab.page.viewport_size["width"]
            tab.page.set_viewport_size({"width": width - 300, "height": 600})
            tab.page.wait_for_timeout(200)
            assert (tab.page.evaluate("zoom") == before) == same
            tab.page.set_viewport_size({"width": width, "height": 720})

    @pytest.mark.parametrize("address", ["pix2pix"], indirect=True)
    def test_nothing_is_undone_while_a_stroke_goes_on(self, tab):
        tab.stroke((0.2, 0.2), (0.3, 0.3), keys="2")
        box, mouse = tab.page.locator("#map").bounding_box(), tab.page.mouse
        tab.press("r")
        mouse.move(box["x"] + 9, box["y"] + 9)
        mouse.down()
        tab.press("Control+z")
        mouse.move(box["x"] + 99, box["y"] + 99)
        mouse.up()
        tab.wait()
        assert tab.page.evaluate("done.length") == 2

    @pytest.mark.parametrize("address", ["mixlc"], indirect=True)
    def test_keys_alone_paint_and_errors_are_text_in_the_page(self, tab, tmp_path):
        first = tab.pixels()
        tab.page.focus("#map")
        tab.press("3", "ArrowLeft", "ArrowUp", " ")
        tab.wait()
        assert (tab.pixels() != first).any()
        tab.page.evaluate("canvas = '99'")
        tab.drag((0.2, 0.2), (0.6, 0.6))
        assert tab.shows_an_error("this canvas no longer exists")
        assert (tab.map_file(tmp_path) == tab.pixels()).all()

    @pytest.mark.parametrize("address", ["pix2pix"], indirect=True)
    def test_a_phone_paints_with_a_finger(self, chromium, address):
        context = chromium.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
        tab = Tab(context.new_page(), address)
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
        first, box = tab.pixels(), tab.page.locator("#map").bounding_box()
        tab.press("2")
        tab.page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        tab.wait()
        painted = tab.pixels()
        assert (painted != first).any()
        tab.press("3")
        fingers = [{"x": box["x"] + 40 * k, "y": box["y"] + 40, "id": k} for k in (1, 2)]
        touches = tab.page.context.new_cdp_session(tab.page)
        for kind, down in (("Start", 1), ("Start", 2), ("Move", 2), ("End", 0)):
            about = {"type": f"touch{kind}", "touchPoints": fingers[:down]}
            touches.send("Input.dispatchTouchEvent", about)
        assert (tab.pixels() == painted).all() and not tab.page.evaluate("stroke || busy")
        context.close()
