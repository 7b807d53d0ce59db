"""Tiny datasets, networks and runs of every script, made by the tests themselves."""

import base64
import functools
import importlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import support.run
import support.serve
from harness import SCRIPTS  # noqa: F401  the one list of their names, handed on
from support.classes import ClassTable
from support.pictures import eight_bits

CPU = torch.device("cpu")
# the index of each convolution in torchvision's vgg16().features, and its channels
CONVOLUTIONS = ((0, 64), (2, 64), (5, 128), (7, 128), (10, 256), (12, 256), (14, 256), (17, 512))
DATA = {"pix2pix": "Pairs", "cyclegan": "Domains", "mixlc": "Edits", "mixlc_acgan": "Edits"}
# the options of each script's smallest networks, beside --size 64 --width 4
SMALLEST = {
    "pix2pix": "",
    "cyclegan": "--blocks 1",
    "mixlc": "",
    "mixlc_acgan": "--style-features random --style-layers relu1_1",
}
JUDGED = "--train-judge --judge-epochs 1"
RUNS = dict.fromkeys(SCRIPTS, "--epochs 2")
RUNS |= {"pix2pix": "--epochs 2 --save-every 1", "mixlc_acgan": f"--epochs 2 {JUDGED}"}
try:
    import rasterio
    from rasterio.transform import from_origin

    PLACE = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_800_000, 0.5, 0.5)}
except ImportError:  # the other files have tests that need no GeoTIFF, such as those of CUDA
    collect_ignore = ["test_generate.py", "test_opening.py", "test_rasters.py"]

TABLE = [
    {"name": "land", "color": "#8429f6"},
    {"name": "water", "color": "#e2a929"},
    {"name": "road", "color": "#6ec1e4"},
    {"name": "unlabeled", "color": "#9b9b9b", "ignore": True},
]
LABELS = {"lc_classes": json.dumps(TABLE)}
CLASSES = ClassTable.load(json.dumps(TABLE))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def plot_metrics():
    """The real one; runs only touch losses.png here, since drawing takes longer than training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support.run, "plot_metrics", lambda rows, path: path.touch())
        yield support.plots.plot_metrics


def picture(rng, height, width):
    """Smooth random colours, so that JPEG keeps them and a network can learn them."""
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def pixels_of(path):
    """The pixels of an image file, (H, W) or (H, W, C)."""
    return np.asarray(Image.open(path))


def refused(text):
    """A context in which a UserError must be raised, whose line matches text."""
    return pytest.raises(common.UserError, match=text)


def geotiff(path, pixels, valid=None, **profile):
    """Writes (H, W, bands) or (H, W) as a GeoTIFF in PLACE, with an internal mask if given."""
    rasterio = pytest.importorskip("rasterio")  # a test without GeoTIFFs runs without it
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    about = {"driver": "GTiff", "dtype": bands.dtype, "count": len(bands), **PLACE, **profile}
    with rasterio.open(path, "w", height=bands.shape[1], width=bands.shape[2], **about) as target:
        target.write(bands)
    if valid is not None:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as target:
            target.write_mask(valid)
    return path


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (channels, height, width), np.uint8)


def side_by_side(root, train=6, val=3, side=80, suffix=".png", drawn=False):
    """A paired dataset whose B is the negative of A, or drawn in the colours of maps."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for k in range(count):
            a = picture(rng, side, side)
            b = ClassTable.load("maps").palette[a[..., 0] // 32] if drawn else 255 - a
            save(root / split / f"{k}{suffix}", np.concatenate([a, b], 1))
    return root


def land_cover(root, train=4, val=2, side=80, table=TABLE):
    """rgb and lc folders; lc holds indices 0..2 and some 3, which is ignored."""
    rng = np.random.default_rng(1)
    for split, count in (("train", train), ("val", val)):
        for k in range(count):
            save(root / split / "rgb" / f"{k}.jpg", picture(rng, side, side))
            save(root / split / "lc" / f"{k}.png", rng.integers(0, 4, (side, side), np.uint8))
    (root / "classes.json").write_text(json.dumps(table))
    return root


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return side_by_side(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def landcover(tmp_path_factory):
    return land_cover(tmp_path_factory.mktemp("landcover"))


@pytest.fixture(scope="session")
def data(pairs, landcover):
    """Each script's dataset."""
    return {script: landcover if "mixlc" in script else pairs for script in SCRIPTS}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """trained(script): the folder of a tiny run of two epochs, which no test may change."""

    @functools.cache
    def run(script):
        out = tmp_path_factory.mktemp(script) / "run"
        importlib.import_module(script).main(tiny_run(script, data[script], out, RUNS[script]))
        return out

    return run


def tiny_run(script, data, out, more=""):
    """The command line of a run of a script's smallest networks; `more` is split at blanks."""
    line = f"--data {data} --out {out} --cache {Path(out).parent}/cache"
    line += " --size 64 --width 4 --batch-size 2 --log-every 2 --device cpu"
    return f"{line} {SMALLEST[script]} {more}".split()


def use(run, action, more=""):
    """The command line that uses a run's last checkpoint, as in use(run, "--generate x.png")."""
    return f"{action} --checkpoint {run}/checkpoints/last.pt {more}".split()


def studio_of(main, run, monkeypatch, more=""):
    """The Studio that --serve of a run's last checkpoint serves."""
    served = calls_of(monkeypatch, support.serve, "serve", lambda studio: None)
    main(use(run, "--serve", more))
    return served[-1][0]


def page_shows(studio, paths, strokes=()):
    """The picture (H, W, 3) that the page shows of files (its input, its photograph).

    strokes  [(x, y, width, height, what is painted in bytes), ...]
    """
    files = {}
    for name, path in zip(("input", "photo"), paths, strict=False):
        files[name] = [path.name, base64.b64encode(path.read_bytes()).decode()]
    opened = studio.open({"files": files})
    height, width, start = (opened[name] for name in ("height", "width", "start"))
    picture = np.zeros((height, width, 3), np.uint8)
    for stroke in [(0, 0, width, height, base64.b64decode(start)), *strokes]:
        query = dict(zip(("x", "y", "width", "height"), stroke, strict=False))
        answer = studio.stroke(query | {"canvas": opened["canvas"], "samples": 1}, stroke[-1])
        (answer,) = answer["pictures"]
        part = pixels_of(io.BytesIO(base64.b64decode(answer["png"])))
        x, y = answer["x"], answer["y"]
        picture[y : y + part.shape[0], x : x + part.shape[1]] = part
    return picture


def in_colours(path, limits=None):
    """A TIFF in 8 bits, (H, W, 3): one band is grey, two are red and cyan, else the first three."""
    with rasterio.open(path) as file:
        values = np.moveaxis(file.read(), 0, -1)
    levels = limits.to_levels(values) if limits else values
    first = {1: [0, 0, 0], 2: [0, 1, 1]}.get(values.shape[-1], [0, 1, 2])
    return eight_bits(levels)[..., first]


def tiny(script, **options):
    """A script's module and a Config of its smallest networks; the edits know TABLE's classes."""
    more = {"size": 64, "width": 4, "batch_size": 2, "precision": "fp32"}
    if script == "cyclegan":
        more |= {"blocks": 1, "pool_size": 0}
    if "mixlc" in script:
        more |= LABELS
    if script == "mixlc_acgan":
        more |= {"style_features": "random", "style_layers": "relu1_1"}
    module = importlib.import_module(script)
    return module, module.Config(**more | options)


def open_data(script, root, cache, split="train", **options):
    """A script's data on the CPU; the edits find their classes in the data."""
    module, cfg = tiny(script, lc_classes="", **options, data=str(root), cache=str(cache))
    return getattr(module, DATA[script])(cfg, split, CPU)


def pictures(seed=0, count=2, size=64):
    """Random pictures (count, 3, size, size) in [-1, 1]."""
    seeded = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, size, size, generator=seeded) * 2 - 1


def maps(seed=0, count=2, size=64, classes=3, holes=0):
    """Random one-hot maps (count, classes, size, size); of `holes` rows no pixel has a class."""
    seeded = torch.Generator().manual_seed(seed)
    shape = count, size, size
    index = torch.randint(classes, shape, generator=seeded, dtype=torch.uint8)
    index[:, :holes] = common.IGNORED
    return common.one_hot(index, classes)


def batch_of(script, cfg, seed=0):
    """A random batch as a script's train_step takes it."""
    size = cfg.size if cfg else 64
    a, b, c = (pictures(10 * seed + k, 2, size) for k in range(3))
    lc_a, lc_b, lc_ab = (maps(10 * seed + k, 2, size, holes=7 + k) for k in range(3))
    if script == "cyclegan" and cfg.classes:
        return a, lc_b
    if "mixlc" not in script:
        return a, b
    box = torch.tensor([[20, 20, 24, 24], [0, 40, 16, 16]])
    inside = torch.tensor([True, not cfg.use_ba])
    own = torch.tensor([False, True])
    return a, lc_ab, c, box, inside, lc_a, b, lc_b, own


def as_rank(monkeypatch, rank, world=2):
    """Makes this process play one of several."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)


def calls_of(monkeypatch, module, name, instead=None):
    """The arguments of every call of module.name from now on; it, or another, does its work."""
    honest, calls = instead or getattr(module, name), []

    def call(*arguments, **more):
        calls.append(arguments)
        return honest(*arguments, **more)

    monkeypatch.setattr(module, name, call)
    return calls


def inputs_of(net):
    """Copies of the first argument of every call of a network from now on."""
    inputs = []
    net.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach().clone()))
    return inputs


def stop_after(monkeypatch, steps):
    """Has a run stop after some steps, as Ctrl-C does."""
    monkeypatch.setattr(common.Run, "must_save", lambda run: (int(run.step == steps), False))


def parameters(kind, *arguments, **options):
    """How many weights a module of that kind has; made without values, which takes no time."""
    with torch.device("meta"):
        return sum(p.numel() for p in kind(*arguments, **options).parameters())


def state_of(path):
    """A checkpoint's content."""
    return torch.load(path, weights_only=True)


def last(run):
    """The content of a run's last checkpoint."""
    return state_of(run / "checkpoints" / "last.pt")


def rows_of(run):
    """The rows of a run's evaluation.json."""
    return json.loads((run / "evaluation.json").read_text())["rows"]


def same(a, b):
    """Whether nested dicts and lists of tensors and numbers are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def vgg_file(path, last=14):
    """A file as torchvision lays it out, with random weights, up to features.`last`."""
    weights, channels = {}, 3
    for index, out in CONVOLUTIONS:
        if index <= last:
            weight = torch.randn(out, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
            weights[f"features.{index}.weight"] = weight
            weights[f"features.{index}.bias"] = torch.randn(out) * 0.1
        channels = out
    torch.save(weights | {"classifier.0.bias": torch.zeros(3)}, path)
    return weights


def line_of(main, arguments, capsys):
    """The one line on stderr that a mistake prints, with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]
