"""The page to paint on: what it paints, what its server refuses, and in a browser how it feels."""

import base64
import contextlib
import dataclasses
import http.client
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import TABLE, geotiff, land_cover, picture, save, tiny
from support import serve
from support import studio as studios
from support.canvases import EditCanvas, TranslationCanvas
from support.classes import ClassTable
from support.generate import _stroke
from support.pictures import as_array
from support.rasters import Raster
from support.studio import Studio

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
PLAYWRIGHT = importlib.util.find_spec("playwright")
CLASSES = ClassTable.load(json.dumps(TABLE))


class Painter:
    """Stands in for a generator: the colour of the class, or of the picture, a little blurred."""

    def __init__(self):
        self.windows = 0

    def __call__(self, windows, whole=False, sample=1):
        self.windows += len(windows)
        if windows.shape[1] == 5:  # of an edit
            windows = windows[:, 3:4]
        if windows.shape[1] == 1:
            x = common.draw(windows[:, 0], CLASSES)
        else:
            x = common.from_bytes(windows)
        if whole:  # noise
            x = x * (1 - 0.1 * torch.rand(1))
        return torch.nn.functional.avg_pool2d(x, 5, 1, 2)


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
    return np.asarray(Image.open(Path(cfg.out) / name.name))


def translating(cfg, predict, pixels, net=None):
    return TranslationCanvas(cfg, predict, net, pixels, CLASSES, lambda x: as_array(x[None]))


def test_a_canvas_shows_what_generate_gives_and_paints_only_what_a_stroke_touches(tmp_path):
    cfg = configured("pix2pix", tmp_path, window=64)
    pixels = np.random.default_rng(0).integers(0, 3, (200, 150), np.uint8)
    painter = Painter()
    canvas = translating(cfg, painter, pixels)
    region, shown = canvas.generated((0, 0, 1, 1), 1)
    assert region == (0, 0, 200, 150) and painter.windows == 4 * 3
    assert np.array_equal(shown, generated(tmp_path, cfg, pixels))
    for top, windows in ((60, 2 * 2), (170, 2)):
        pixels[top : top + 10, 100:110] = 1
        painter.windows = 0
        (y, x, height, width), part = canvas.generated((top, 100, 10, 10), 1)
        assert painter.windows == windows and (height, width) < (200, 150)
        shown[y : y + height, x : x + width] = part
        assert np.array_equal(shown, generated(tmp_path, cfg, pixels))


def test_answers_of_a_canvas_are_those_of_seeds(tmp_path):
    """A canvas of one window, where a model may have noise."""
    cfg = configured("pix2pix", tmp_path, window=64)
    pixels = np.random.default_rng(0).integers(0, 3, (64, 64), np.uint8)
    canvas = translating(cfg, Painter(), pixels)
    for sample in (1, 2):
        want = generated(tmp_path, dataclasses.replace(cfg, seed=cfg.seed + sample - 1), pixels)
        assert np.array_equal(canvas.generated((0, 0, 64, 64), sample)[1], want)


def test_answers_of_an_edit_are_its_samples(tmp_path):
    cfg, samples = configured("mixlc", tmp_path, window=64), []

    def predict(windows, sample):
        samples.append(sample)
        return torch.zeros(len(windows), 3, 64, 64)

    labels, photo = np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.uint8)
    canvas = EditCanvas(cfg, predict, None, labels, photo)
    canvas.pixels[20:30, 20:30] = 1
    for sample in (1, 2):
        canvas.generated((20, 20, 10, 10), sample)
    assert samples == [1, 2]


class Norm(torch.nn.Module):
    """A network with InstanceNorm, which calls itself as paint."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.InstanceNorm2d(3)

    def forward(self, windows, whole=False):
        return self.norm(common.draw(windows[:, 0], CLASSES)).tanh()


def test_windows_of_a_canvas_share_their_statistics(tmp_path):
    cfg, net = configured("pix2pix", tmp_path, window=64), Norm()
    pixels = np.random.default_rng(0).integers(0, 3, (200, 150), np.uint8)
    pixels[:100] = 1
    canvas = translating(cfg, net, pixels, net)
    _, shown = canvas.generated((0, 0, 1, 1), 1)
    assert np.array_equal(shown, generated(tmp_path, cfg, pixels, net))


def test_an_edit_shows_what_generate_gives_and_paints_only_what_is_new(tmp_path):
    cfg = configured("mixlc", tmp_path, window=64)
    photo = picture(np.random.default_rng(0), 300, 400).copy()
    labels, painter = np.zeros((300, 400), np.uint8), Painter()
    canvas, shown = EditCanvas(cfg, painter, None, labels.copy(), photo), photo.copy()
    strokes = {"water:100,50,20,20": 1, "road:300,200,90,30": 3, "water:310,210,10,5": 3}
    for count, (stroke, windows) in enumerate(strokes.items(), 1):
        index, top, left, bottom, right = _stroke(stroke, CLASSES, 300, 400)
        canvas.pixels[top:bottom, left:right] = index
        painter.windows = 0
        box, part = canvas.generated((top, left, bottom - top, right - left), 1)
        assert painter.windows == windows
        shown[box[0] : box[0] + box[2], box[1] : box[1] + box[3]] = part
        save(tmp_path / "photo.png", photo)
        save(tmp_path / "lc.png", labels)
        files = {"generate": (str(tmp_path / "photo.png"),), "lc": str(tmp_path / "lc.png")}
        files |= {"paint": tuple(strokes)[:count], "out": str(tmp_path / f"out{count}")}
        common.edit_file(dataclasses.replace(cfg, **files), Painter())
        assert np.array_equal(shown, np.asarray(Image.open(tmp_path / f"out{count}/photo.png")))
    canvas.pixels[:] = 0  # all of it erased
    painter.windows = 0
    box, part = canvas.generated((210, 310, 5, 10), 1)
    shown[box[0] : box[0] + box[2], box[1] : box[1] + box[3]] = part
    assert np.array_equal(shown, photo) and painter.windows == 0


# ------------------------------------------------------------------------------------------- server


@contextlib.contextmanager
def serving(cfg, make, edits=False):
    """(studio, request): a server on this machine, and a function that asks it as the page does."""
    studio = Studio(cfg, cfg.classes, make, edits)
    server = serve.listening(studio)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, port = server.server_address[:2]

    def request(method, path, body=None, *, token=server.token, **headers):
        connection = http.client.HTTPConnection(host, port, timeout=60)
        connection.request(method, f"/{token}/{path}", body, headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.headers["Content-Type"] == "application/json":
            content = json.loads(content)
        return answer.status, content

    request.server, request.port = server, port
    try:
        yield studio, request
    finally:
        server.shutdown()
        server.server_close()
        studio.worker.shutdown()


@pytest.fixture
def server(tmp_path, landcover):
    cfg = configured("pix2pix", tmp_path, window=64, data=str(landcover))
    painter = Painter()

    def make(pixels, _):
        return TranslationCanvas(cfg, painter, None, pixels, CLASSES, lambda x: as_array(x[None]))

    with serving(cfg, make) as (studio, request):
        studio.predicting = painter
        yield studio, request


def opened(request, **wanted):
    status, answer = request("POST", "open", json.dumps(wanted or {"width": 80, "height": 64}))
    assert status == 200, answer
    return answer["canvas"]


def stroke(request, canvas, x, y, width, height, value=1, answers=1):
    query = f"canvas={canvas}&x={x}&y={y}&width={width}&height={height}&answers={answers}"
    return request("POST", f"stroke?{query}", bytes([value]) * (width * height))


def test_a_stroke_is_painted_and_the_map_can_be_read_again(server, tmp_path):
    studio, request = server
    canvas = opened(request)
    status, answer = stroke(request, canvas, 20, 10, 30, 40, answers=2)
    assert status == 200 and len(answer["pictures"]) == 2
    shown, other = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(part["png"]))))
        for part in answer["pictures"]
    )
    want = np.zeros((64, 80), np.uint8)
    want[10:50, 20:50] = 1
    assert shown.shape == (64, 80, 3) and not np.array_equal(shown, other)
    far = [np.abs(shown[30, 35] - np.array(color)).sum() for color in CLASSES.colors]
    assert np.argmin(far) == 1
    status, content = request("GET", f"labels.png?canvas={canvas}")
    (tmp_path / "map.png").write_bytes(content)
    assert np.array_equal(Raster(tmp_path / "map.png", CLASSES).read(), want)
    status, again = request("POST", "open", json.dumps({"canvas": canvas}))
    pixels, start = (base64.b64decode(again[name]) for name in ("pixels", "start"))
    assert pixels == want.tobytes() and start == bytes(64 * 80)


def test_the_page_knows_the_model(server):
    _, request = server
    status, text = request("GET", "")
    (about,) = re.findall(r'<script id="data" type="application/json">(.*)</script>', text.decode())
    about = json.loads(about)
    assert status == 200 and [name for name, _ in about["classes"]] == ["land", "water", "road"]
    assert about["labels"] and not about["edits"] and len(about["examples"]) == 2
    _, example = request("POST", "open", '{"example": 1}')
    assert example["photo"] and opened(request, example=1)  # to compare with


@pytest.mark.parametrize(("window", "shape"), [(40, (40, 40)), ((100, 200), (64, 128)), (0, 64)])
def test_examples_are_as_wide_and_high_as_windows(tmp_path, pairs, window, shape):
    """They are stored as squares; as a whole they are squeezed as in training once more."""
    cfg = configured("pix2pix", tmp_path, data=str(pairs), window=window, lc_classes="pictures")
    studio = Studio(cfg, None, None)
    shape = (shape, shape) if shape == 64 else shape
    assert all(image.shape == (*shape, 3) for image in studio.examples[0])
    height, width = np.broadcast_to(window or 64, 2)
    assert f'"blank": {{"height": {height}, "width": {width}}}' in studio.page()


def test_names_of_classes_are_text_in_the_page(tmp_path):
    table = [{"name": "</script><script>alert(1)</script>", "color": "#000000"}, *TABLE]
    cfg = configured("pix2pix", tmp_path, data="none", lc_classes=json.dumps(table))
    text = Studio(cfg, cfg.classes, None).page()
    assert text.count("</script>") == 2 and "alert(1)" in text and "<script>alert" not in text


def test_strangers_are_refused(server):
    _, request = server
    token = request.server.token
    for wrong in ("wrong", "", token[:-1], token + "x"):
        assert request("GET", "", token=wrong)[0] == 403
    assert request("GET", "", Host="evil.example")[0] == 403
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        status, text = request("POST", "open", "{}", Origin=origin)
        assert status == 403 and b"from another page" in text
    assert request("GET", "../../common.py")[0] == 404
    assert stroke(request, opened(request), 0, 0, 5, 5)[0] == 200


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": -1}, "x -1: must be 0 to 79"),
        ({"x": 80}, "x 80: must be 0 to 79"),
        ({"y": "a"}, "y is missing, or no whole number"),
        ({"width": 61}, "width 61: must be 1 to 60"),
        ({"answers": 9}, "answers 9: must be 1 to 4"),
        ({"height": 4}, "a stroke of 15 bytes where 20 belong"),
        ({"canvas": "99"}, "this canvas was closed"),
    ],
)
def test_a_stroke_that_does_not_fit_is_refused(server, change, text):
    _, request = server
    query = {"canvas": opened(request), "x": 20, "y": 0, "width": 5, "height": 3, "answers": 1}
    query = "&".join(f"{name}={value}" for name, value in (query | change).items())
    status, answer = request("POST", f"stroke?{query}", bytes(15))
    assert status == 400 and text in answer.decode()


def test_a_class_outside_the_table_is_refused_but_no_class_is_one(server):
    _, request = server
    canvas = opened(request)
    assert stroke(request, canvas, 0, 0, 5, 5, value=3)[0] == 400
    assert stroke(request, canvas, 0, 0, 5, 5, value=common.IGNORED)[0] == 200


@pytest.mark.parametrize("body", [b"", b"[" * 20000, b"7", b"\xff\xfe", b'{"files": 3}',
                                  b'{"files": {"input": ["a.png", "???"]}}', b'{"example": 7}',
                                  b'{"height": 9999999, "width": 64}', b"{}",
                                  b'{"example": 1e999}'])  # fmt: skip
def test_rubbish_is_refused_in_a_line(server, body):
    _, request = server
    status, answer = request("POST", "open", body)
    assert status == 400 and 0 < len(answer) < 300 and b"\n" not in answer


def test_length_is_bounded(server):
    _, request = server
    status, text = request("POST", "open", None, **{"Content-Length": str(2**40)})
    assert status == 413 and b"at most" in text
    assert request("POST", "open", iter([b"{}"]), **{"Transfer-Encoding": "chunked"})[0] == 413


def file(array, name="x.png"):
    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG")
    return [name, base64.b64encode(content.getvalue()).decode()]


def test_files_are_opened_and_do_not_stay(server, tmp_path, monkeypatch):
    studio, request = server
    (tmp_path / "aside").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "aside"))
    labels = np.random.default_rng(0).integers(0, 3, (100, 60), np.uint8)
    canvas = opened(request, files={"input": file(labels)})
    assert np.array_equal(studio.canvases[canvas].pixels, labels)
    broken = base64.b64encode(b"\x89PNG\r\n\x1a\nrubbish").decode()
    photo = picture(np.random.default_rng(0), 90, 90)
    for given, text in (
        (["a.png", broken], b"a.png: cannot be decoded"),
        (file(labels + 9, "../b.png"), b"b.png: label values"),
        (["d.png/../../e.png", broken], b"e.png: cannot be decoded"),
        (file(photo), b"x.png: its colours are not those"),
    ):
        status, answer = request("POST", "open", json.dumps({"files": {"input": given}}))
        assert status == 400 and answer.startswith(text), answer
    assert not list((tmp_path / "aside").iterdir()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.vrt", b"<VRTDataset rasterXSize='64' rasterYSize='64'></VRTDataset>"),
        ("x.tif", b"<VRTDataset rasterXSize='64' rasterYSize='64'></VRTDataset>"),
        ("x.tif", b"<MRF_META><Raster></Raster></MRF_META>"),
        ("x.png", b"%!PS-Adobe-3.0 EPSF-3.0"),
        ("x.jpg", b"\x89PNG\r\n\x1a\n"),
        ("x.gif", b"GIF89a"),
        ("x.eps", b"%!PS-Adobe-3.0 EPSF-3.0"),
        ("x", b"II*\0"),
    ],
)
def test_files_of_other_kinds_are_refused(server, name, content):
    _, request = server
    files = {"files": {"input": [name, base64.b64encode(content).decode()]}}
    status, answer = request("POST", "open", json.dumps(files))
    assert status == 400 and answer.decode().startswith(f"{name}: cannot be decoded")


@pytest.mark.parametrize("name", ["x.tif", "x.TIFF", "x.png", "x.webp", "x.npy", "x.npz"])
def test_files_of_every_kind_are_opened(server, name):
    studio, request = server
    labels, content = np.random.default_rng(0).integers(0, 3, (40, 60), np.uint8), io.BytesIO()
    kind = name[2:].lower()
    if kind in ("npy", "npz"):
        {"npy": np.save, "npz": np.savez}[kind](content, labels)
    else:
        shown = CLASSES.palette[labels] if kind == "webp" else labels
        options = {"lossless": True} if kind == "webp" else {}
        Image.fromarray(shown).save(content, kind.replace("tif", "tiff")[:4], **options)
    given = [name, base64.b64encode(content.getvalue()).decode()]
    canvas = opened(request, files={"input": given})
    assert np.array_equal(studio.canvases[canvas].pixels, labels)


def test_holes_of_a_photograph_are_filled_with_its_mean_colour(tmp_path):
    """However the file marks them: the picture painted must not depend on it."""
    studio = Studio(configured("pix2pix", tmp_path, lc_classes="pictures"), None, None)
    for nothing in (0, 255):
        pixels = np.full((20, 20, 3), nothing, np.uint8)
        pixels[:10] = 10, 20, 30
        content = geotiff(tmp_path / "x.tif", pixels, nodata=nothing).read_bytes()
        opened = studio._read("x.tif", base64.b64encode(content), None)
        assert (opened == (10, 20, 30)).all()


@pytest.mark.slow
def test_a_file_does_not_stay_when_the_server_is_ended_meanwhile(tmp_path):
    """SIGTERM arrives while it is decoded; the user's empty --out stays."""
    code = r"""
import base64, os, signal, sys, threading, time
from conftest import tiny
from support import serve, studio
def hang(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
cfg = tiny("pix2pix", port=0, data="none", out=sys.argv[1])[1]
canvases = studio.Studio(cfg, None, None)
studio.Raster = hang
given = ["x.png", base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()]
thread = threading.Thread(target=canvases.open, args=[{"files": {"input": given}}], daemon=True)
threading.Timer(0.5, thread.start).start()
serve.serve(canvases)
"""
    for folder in ("aside", "out"):
        (tmp_path / folder).mkdir()
    root = Path(__file__).parent.parent
    paths = os.pathsep.join(map(str, (root / "tests", root, root / "bench")))
    environment = os.environ | {"TMPDIR": str(tmp_path / "aside"), "PYTHONPATH": paths}
    call = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.check_output(call, cwd=tmp_path, env=environment, text=True)
    assert done.endswith("ended\n")
    assert not list((tmp_path / "aside").iterdir()) and (tmp_path / "out").is_dir()


def test_without_validation_images_the_page_opens_with_a_picture_of_docs(tmp_path):
    for direction, shape in (("BtoA", (572, 572, 3)), ("AtoB", (1024, 1024, 3))):
        data = str(tmp_path / "none")
        cfg = configured("pix2pix", tmp_path, data=data, direction=direction)
        ((pixels, photo),) = Studio(cfg, None, None).examples
        assert pixels.shape == shape and photo is None


def test_an_edit_needs_two_files_of_one_size(tmp_path):
    cfg = configured("mixlc", tmp_path, data=str(tmp_path / "none"), window=64)
    make = lambda labels, photo: EditCanvas(cfg, Painter(), None, labels, photo)  # noqa: E731
    labels, photo = np.zeros((70, 90), np.uint8), np.zeros((70, 90, 3), np.uint8)
    with serving(cfg, make, edits=True) as (studio, request):
        assert not studio.examples
        assert request("POST", "open", '{"width": 64, "height": 64}')[0] == 400
        files = {"input": file(labels), "photo": file(photo[:69])}
        status, answer = request("POST", "open", json.dumps({"files": files}))
        assert status == 400 and b"differ in size" in answer
        canvas = opened(request, files=files | {"photo": file(photo)})
        status, answer = stroke(request, canvas, 30, 30, 10, 10)
        assert status == 200 and len(answer["pictures"]) == 1


def test_of_strokes_that_wait_the_newest_is_painted_and_none_is_lost(server):
    studio, request = server
    canvas = opened(request)
    begun, go, paint = threading.Event(), threading.Event(), studio.canvases[canvas].generated
    boxes = []

    def slow(box, sample):
        boxes.append(box)
        begun.set()
        go.wait(20)
        return paint(box, sample)

    studio.canvases[canvas].generated = slow
    answers = [None] * 4

    def ask(k):
        answers[k] = stroke(request, canvas, 10 * k, 5, 8, 8)[1]

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(4)]
    for k, thread in enumerate(threads):
        thread.start()
        for _ in range(2000):  # until the stroke has come
            if studio.canvases[canvas].latest > k:
                break
            threading.Event().wait(0.005)
        begun.wait(20)
    go.set()
    for thread in threads:
        thread.join(20)
    assert [bool(answer.get("superseded")) for answer in answers] == [False, True, True, False]
    assert boxes == [(5, 0, 8, 8), (5, 10, 8, 28)]
    assert (studio.canvases[canvas].pixels[5:13, 30:38] == 1).all()
    assert (studio.canvases[canvas].pixels[5:13, 10:18] == 1).all()


def test_only_so_many_pixels_are_kept_those_used_last(server, monkeypatch):
    _, request = server
    monkeypatch.setattr(studios, "KEPT", 3 * 64 * 80)
    first, second, third = (opened(request) for _ in range(3))
    assert stroke(request, first, 0, 0, 5, 5)[0] == 200
    fourth = opened(request)
    assert stroke(request, second, 0, 0, 5, 5)[0] == 400
    assert all(stroke(request, canvas, 0, 0, 5, 5)[0] == 200 for canvas in (first, third, fourth))


def test_a_canvas_is_opened_between_paintings(server):
    """A predicting has the network normalise by statistics of its own meanwhile."""
    studio, request = server
    canvas, threads = opened(request), []
    make, paint = studio.make, studio.canvases[canvas].generated
    studio.make = lambda *content: threads.append(threading.get_ident()) or make(*content)
    studio.canvases[canvas].generated = lambda *a: (
        threads.append(threading.get_ident()) or paint(*a)
    )
    opened(request)
    stroke(request, canvas, 0, 0, 5, 5)
    assert len(threads) == 2 and len(set(threads)) == 1


def test_an_address_without_its_last_slash_is_completed(server):
    _, request = server
    token = request.server.token
    connection = http.client.HTTPConnection("127.0.0.1", request.port, timeout=60)
    connection.request("GET", f"/{token}")
    answer = connection.getresponse()
    assert answer.status == 301 and answer.headers["Location"] == f"/{token}/"


def test_a_painting_stops_when_the_server_has_ended(monkeypatch):
    paint, ended = serve.until_the_end(lambda x, whole: x), threading.Event()
    monkeypatch.setattr(serve, "ENDED", ended)
    assert paint(7, whole=True) == 7
    ended.set()
    with pytest.raises(serve.Refused, match="ended"):
        paint(7, whole=True)


def listening(tmp_path, **options):
    cfg = configured("pix2pix", tmp_path, data="none", **options)
    return serve.listening(Studio(cfg, CLASSES, None))


def test_addresses(tmp_path, capsys):
    listening(tmp_path).server_close()
    assert "warning" not in capsys.readouterr().err
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(common.UserError, match="cannot listen there .* --port 0"),
    ):
        listening(tmp_path, port=taken.getsockname()[1])
    with pytest.raises(common.UserError, match="--address nowhere.invalid"):
        listening(tmp_path, address="nowhere.invalid")
    listening(tmp_path, address="0.0.0.0").server_close()
    assert "warning: --address 0.0.0.0" in capsys.readouterr().err


def test_an_address_of_ipv6(tmp_path, capsys):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    cfg = configured("pix2pix", tmp_path, data="none", address="::1")
    with serving(cfg, None) as (_, request):
        assert f"http://[::1]:{request.port}/" in capsys.readouterr().out
        assert request("GET", "")[0] == 200
        assert request("GET", "", Host="evil.example")[0] == 403


def test_strangers_do_not_stop_the_page(server, monkeypatch):
    """Of connections that show no token the oldest are dropped; those that did are kept."""
    _, request = server
    monkeypatch.setattr(serve, "STRANGERS", 3)
    body = b"{}"
    head = f"POST /{request.server.token}/open HTTP/1.1\r\nHost: 127.0.0.1:{request.port}\r\n"
    address = "127.0.0.1", request.port
    friend = socket.create_connection(address, timeout=20)
    friend.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
    while request.server.strangers:  # until its token was seen
        threading.Event().wait(0.005)
    strangers = [socket.create_connection(address, timeout=20) for _ in range(5)]
    for stranger in strangers:
        stranger.sendall(b"GET / HTTP/1.1\r\n")
    assert [stranger.recv(9) for stranger in strangers[:2]] == [b"", b""]
    assert request("GET", "")[0] == 200
    friend.sendall(body)
    assert b" 400 " in friend.recv(99)
    for connection in (friend, *strangers):
        connection.close()
    assert serve.Handler.timeout <= 5


# ------------------------------------------------------------------------------------------ browser


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{script: checkpoint} of models that were trained for a moment."""
    root, found = tmp_path_factory.mktemp("models"), {}
    data = land_cover(root / "data", side=150)
    for script in ("pix2pix", "mixlc"):
        module, _ = tiny(script)
        out = root / "runs" / script
        run = ["--data", data, "--out", out, "--cache", root / "cache", "--size", 64, "--width", 2]
        module.main([*map(str, run), "--batch-size", "1", "--epochs", "1"])  # pix2pix: noise
        found[script] = out / "checkpoints" / "last.pt"
    return found


@contextlib.contextmanager
def started(script, checkpoint):
    """The page's address, of a script that serves in a process of its own."""
    root = Path(__file__).parent.parent
    call = [sys.executable, root / f"{script}.py", "--serve", "--port", "0"]
    process = subprocess.Popen(
        [*call, "--checkpoint", checkpoint], stdout=subprocess.PIPE, text=True, cwd=root
    )
    try:
        line = next(line for line in process.stdout if line.startswith("paint at "))
        yield line.split()[2]
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "ended\n" and process.wait(30) == 0
    finally:
        process.kill()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["pix2pix", "mixlc"])
def address(request, models):
    with started(request.param, models[request.param]) as address:
        yield address


@pytest.mark.slow
@pytest.mark.skipif(
    not (PLAYWRIGHT and BROWSER), reason="needs Chromium and pip install playwright"
)
class TestBrowser:
    @pytest.fixture
    def tab(self, chromium, address):
        context = chromium.new_context(accept_downloads=True)
        page = context.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        self.wait(page, 1)
        page.fill("#size", "20")
        yield page
        assert not errors
        context.close()

    @staticmethod
    def wait(page, count):
        page.wait_for_selector(f'body[data-painted="{count}"]', timeout=60_000)

    @staticmethod
    def pixels(page):
        return np.array(page.evaluate("Array.from(pixels)"))

    @staticmethod
    def shown(page, k=0):
        """The bytes of an answer's picture."""
        return page.evaluate(
            f"Array.from(figures[{k}].picture.getContext('2d')"
            ".getImageData(0, 0, width, height).data).join()"
        )

    @staticmethod
    def drag(page, *places):
        """Over the canvas, between places given in shares of its sides."""
        box = page.locator("#map").bounding_box()
        at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
        page.mouse.move(*at[0])
        page.mouse.down()
        for place in at[1:]:
            page.mouse.move(*place, steps=4)
        page.mouse.up()

    def test_paint_undo_redo_fill_and_erase(self, tab):
        first, before = self.pixels(tab), self.shown(tab)
        tab.keyboard.press("2")
        self.drag(tab, (0.4, 0.4), (0.6, 0.6))
        self.wait(tab, 2)
        second = self.pixels(tab)
        assert (second == 1).sum() > (first == 1).sum() and self.shown(tab) != before
        tab.keyboard.press("Control+z")
        self.wait(tab, 3)
        assert (self.pixels(tab) == first).all() and self.shown(tab) == before
        tab.keyboard.press("Control+Shift+z")
        self.wait(tab, 4)
        assert (self.pixels(tab) == second).all()
        tab.keyboard.press("r")
        tab.keyboard.press("3")
        self.drag(tab, (0.25, 0.25), (0.75, 0.5))
        self.wait(tab, 5)
        side = round(len(first) ** 0.5)
        square = self.pixels(tab).reshape(side, side)
        assert (square[side // 4 + 1 : side // 2 - 1, side // 4 + 1 : side * 3 // 4 - 1] == 2).all()
        tab.keyboard.press("f")
        tab.keyboard.press("1")
        self.drag(tab, (0.3, 0.3), (0.3, 0.3))
        self.wait(tab, 6)
        square = self.pixels(tab).reshape(side, side)
        assert (square[side // 4 + 1 : side // 2 - 1, side // 4 + 1 : side * 3 // 4 - 1] == 0).all()
        tab.keyboard.press("e")
        tab.fill("#size", str(side // 2))
        for row in (0.1, 0.3, 0.5, 0.7, 0.9):  # some may be painted together
            self.drag(tab, (0, row), (1, row))
        assert (self.pixels(tab) == first).all()
        while tab.evaluate("busy"):
            tab.wait_for_timeout(20)
        assert self.shown(tab) == before

    def test_answers_slider_and_files_to_take_away(self, tab, tmp_path):
        tab.select_option("#answers", "3")
        self.wait(tab, 2)
        assert tab.locator("main figure").count() == 4  # nothing to tell them apart by, so far
        tab.keyboard.press("2")
        self.drag(tab, (0.4, 0.4), (0.6, 0.6))
        self.wait(tab, 3)
        if tab.locator("#photolabel").is_visible():  # mixlc
            assert "no noise" in tab.inner_text("#status")
            assert tab.locator("main figure").count() == 2
        else:
            assert tab.locator("main figure").count() == 4
        slider = tab.locator("main figure input[type=range]").first
        slider.fill("50")
        assert "50%" in tab.evaluate("figures[0].before.style.clipPath")
        with tab.expect_download() as download:
            tab.locator("main figure button").first.click()
        picture = Image.open(download.value.path())
        assert picture.size == (64, 64) and picture.mode == "RGB"
        with tab.expect_download() as download:
            tab.click("#labels")
        download.value.save_as(tmp_path / "map.png")
        labels = Raster(tmp_path / "map.png", CLASSES).read()
        assert (labels.ravel() == self.pixels(tab)).all()

    def test_files_broken_and_whole(self, tab, tmp_path):
        edits = tab.locator("#photolabel").is_visible()
        (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
        save(tmp_path / "map.png", np.full((70, 90), 2, np.uint8))
        save(tmp_path / "photo.png", np.full((70, 90, 3), 100, np.uint8))
        if edits:
            tab.set_input_files("#photo", tmp_path / "photo.png")
            tab.wait_for_selector("text=now its land cover")
        tab.set_input_files("#input", tmp_path / "broken.png")
        tab.wait_for_selector("#status.wrong")
        assert "broken.png: cannot be decoded" in tab.inner_text("#status")
        if edits:
            tab.set_input_files("#photo", tmp_path / "photo.png")
        content = base64.b64encode((tmp_path / "map.png").read_bytes()).decode()
        tab.evaluate(
            """content => {
                const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
                const transfer = new DataTransfer();
                transfer.items.add(new File([bytes], "map.png"));
                const event = new DragEvent("drop", {dataTransfer: transfer, bubbles: true});
                document.getElementById("map").dispatchEvent(event);
            }""",
            content,
        )
        self.wait(tab, 2)
        assert (self.pixels(tab) == 2).all() and len(self.pixels(tab)) == 70 * 90

    def test_a_reload_keeps_the_work_and_tabs_their_own(self, tab, address):
        tab.keyboard.press("2")
        self.drag(tab, (0.4, 0.4), (0.6, 0.6))
        self.wait(tab, 2)
        painted, picture = self.pixels(tab), self.shown(tab)
        other = tab.context.new_page()
        other.goto(address)
        self.wait(other, 1)
        assert (self.pixels(other) != painted).any()
        tab.reload()
        self.wait(tab, 1)
        assert (self.pixels(tab) == painted).all() and self.shown(tab) == picture

    def test_a_stroke_that_was_lost_goes_with_the_next(self, tab, tmp_path):
        tab.context.set_offline(True)
        tab.keyboard.press("2")
        self.drag(tab, (0.2, 0.2), (0.3, 0.3))
        tab.wait_for_selector("#status.wrong")
        tab.context.set_offline(False)
        self.drag(tab, (0.7, 0.7), (0.8, 0.8))
        self.wait(tab, 2)
        with tab.expect_download() as download:
            tab.click("#labels")
        download.value.save_as(tmp_path / "map.png")
        labels = Raster(tmp_path / "map.png", CLASSES).read()
        assert (labels.ravel() == self.pixels(tab)).all()

    def test_nothing_is_undone_while_a_stroke_goes_on(self, tab):
        tab.keyboard.press("2")
        self.drag(tab, (0.2, 0.2), (0.3, 0.3))
        self.wait(tab, 2)
        box = tab.locator("#map").bounding_box()
        tab.keyboard.press("r")
        tab.mouse.move(box["x"] + 9, box["y"] + 9)
        tab.mouse.down()
        tab.keyboard.press("Control+z")
        tab.mouse.move(box["x"] + 99, box["y"] + 99)
        tab.mouse.up()
        self.wait(tab, 3)
        assert tab.evaluate("done.length") == 2

    def test_keys_alone_paint(self, tab):
        first = self.pixels(tab)
        tab.focus("#map")
        for key in ("3", "ArrowLeft", "ArrowUp", " "):
            tab.keyboard.press(key)
        self.wait(tab, 2)
        assert (self.pixels(tab) != first).any()

    def test_a_phone_paints_with_a_finger(self, chromium, address):
        context = chromium.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
        page = context.new_page()
        page.goto(address)
        self.wait(page, 1)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        first = self.pixels(page)
        box = page.locator("#map").bounding_box()
        page.keyboard.press("2")
        page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.wait(page, 2)
        assert (self.pixels(page) != first).any()
        context.close()

    def test_a_wrong_token_is_told_what_to_do(self, chromium, address):
        page = chromium.new_page()
        page.goto(re.sub(r"/[^/]+/$", "/wrong/", address))
        assert "copy the one that --serve printed" in page.inner_text("body")
        page.close()

    def test_errors_are_text_in_the_page(self, tab):
        tab.evaluate("canvas = '99'")
        tab.keyboard.press("2")
        self.drag(tab, (0.2, 0.2), (0.6, 0.6))
        tab.wait_for_selector("#status.wrong")
        assert "this canvas was closed" in tab.inner_text("#status")
