"""Keeps what a run on real data came to, small enough to commit, and draws the README's picture.

    python bench/results.py keep runs/pix2pix docs/results/NAME SECONDS     result.json, curve, grid
    python bench/results.py front                                           docs/front.jpg
    python bench/results.py raster CHECKPOINT LABELS                        docs/raster.jpg
    python bench/results.py controls RUN ...      docs/controls.json and .jpg, of pix2pix's runs
    python bench/results.py paint CHECKPOINT     docs/paint.jpg; needs Playwright and Chromium

A result holds the options that differ from the defaults (of the data only their name), SECONDS in
hours, versions, evaluation.json's rows, the measures after each epoch, and grid.jpg: the last
sample grid. Its rows are validation images 0, n, 2n, ... of --sample-rows: chosen by rule, before
training.
"""

import csv
import dataclasses
import importlib
import inspect
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import common
from support.checkpoints import load_weights
from support.classes import _TABLES, ClassTable
from support.pictures import as_array
from support.plots import _pyplot

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
GAP, HEAD = 4, 16  # of a sample grid, in pixels
GRID_BYTES = 300_000  # at most, of the JPEG that is kept of it
PLACE = {"data", "cache", "out", "resume", "vgg16", "track", "device"}  # of this machine
WAYS = {  # cyclegan's columns: which rows of its evaluation, and which measure
    "rmse_AB": ("A to B: ", "rmse"),
    "rmse_BA": ("B to A: ", "rmse"),
    "accuracy_AB": ("A to B: ", "pixel_accuracy"),
    "cycle_A": ("A to B to A: ", "rmse"),
}
# The front page: columns (title, result, column of its grid), and which rows of the grids.
FRONT = (
    (
        ("photograph", "pix2pix-satellite-to-map", 0),
        ("map by pix2pix", "pix2pix-satellite-to-map", 1),
        ("map by cyclegan", "cyclegan-maps", 1),
        ("the map", "pix2pix-satellite-to-map", 2),
        ("photograph by pix2pix", "pix2pix-map-to-satellite", 1),
        ("photograph by cyclegan", "cyclegan-maps", 4),
        ("an edit asked for", "mixlc-maps", 1),
        ("by mixlc", "mixlc-maps", 2),
        ("by mixlc_acgan", "mixlc_acgan-maps", 2),
    ),
    (
        ("photograph", "pix2pix-landcover-to-satellite", 2),
        ("land cover by cyclegan", "cyclegan-dubai", 1),
        ("and back", "cyclegan-dubai", 2),
        ("the land cover", "pix2pix-landcover-to-satellite", 0),
        ("photograph by pix2pix", "pix2pix-landcover-to-satellite", 1),
        ("photograph by cyclegan", "cyclegan-dubai", 4),
        ("an edit asked for", "mixlc-dubai", 1),
        ("by mixlc", "mixlc-dubai", 2),
        ("by mixlc_acgan", "mixlc_acgan-dubai", 2),
    ),
)


def keep(run, folder, seconds=""):
    """Writes result.json, curve.png and grid.jpg of a finished run into a folder."""
    run, folder = Path(run), Path(folder)
    if not (run / "evaluation.json").is_file():
        raise common.UserError(f"{run}: no evaluation.json, so no run that has ended")
    folder.mkdir(parents=True, exist_ok=True)
    about = json.loads((run / "config.json").read_text())
    evaluation = json.loads((run / "evaluation.json").read_text())
    defaults = dataclasses.asdict(importlib.import_module(about["script"]).Config())
    defaults = json.loads(json.dumps(defaults))  # a tuple is a list there
    # of a class table its name, if it is built in; one that lies in the data is found there
    tables = {ClassTable.load(name).text: name for name in _TABLES}
    asked = about["options"]
    asked["lc_classes"] = tables.get(asked["lc_classes"], "")
    options = {
        name: value
        for name, value in asked.items()
        if name not in PLACE and value != defaults.get(name)
    }
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("val_")]
    curve = [
        {"epoch": int(row["epoch"])} | {name[4:]: float(row[name]) for name in names}
        for row in rows
        if row[names[0]]  # an epoch's last row
    ]
    result = {
        "script": about["script"],
        "data": Path(about["options"]["data"]).name or "demo world",
        "options": options,
        "versions": about["versions"],
        "machine": f"{about['device']}, {about['processes']} process(es)",
        "hours": round(float(seconds) / 3600, 2) if seconds else None,
        "images": evaluation["images"],
        "answer": evaluation.get("answer"),
        "rows": evaluation["rows"],
        "curve": curve,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    draw_curve(result, folder / "curve.png")
    grid = Image.open(sorted((run / "samples").glob("*.png"))[-1])
    for quality in (85, 75, 60, 45):
        grid.save(folder / "grid.jpg", quality=quality)
        if (folder / "grid.jpg").stat().st_size < GRID_BYTES:
            break


def draw_curve(result, path):
    """A measure on validation images after each epoch, with what costs nothing as lines."""
    pyplot = _pyplot()
    names = [name for name in result["curve"][0] if name != "epoch"]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 2.6), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        epochs = [row["epoch"] for row in result["curve"]]
        axis.plot(epochs, [row[name] for row in result["curve"]], marker="o")
        way, measure = WAYS.get(name, ("", name))
        for row, cells in result["rows"].items():
            blind = "colour" in row or "class" in row  # sees no more than a class
            if row.startswith(way) and blind and measure in cells:
                axis.axhline(cells[measure], linestyle=":", color="gray")
                place, side = (epochs[-1], "right") if "median" in row else (epochs[0], "left")
                axis.text(place, cells[measure], row[len(way) :], fontsize=6, va="bottom", ha=side)
        axis.set(title=name, xlabel="epoch")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def cell(name, column, row, side):
    """One picture of a kept grid."""
    about = json.loads((RESULTS / name / "result.json").read_text())
    size = about["options"].get("size", 256)
    left, top = GAP + column * (size + GAP), HEAD + row * (size + GAP)
    grid = Image.open(RESULTS / name / "grid.jpg")
    return grid.crop((left, top, left + size, top + size)).resize((side, side), 3)


def front(rows=(0, 3, 6), side=150, path=ROOT / "docs" / "front.jpg"):
    """Draws docs/front.jpg: every third place of the grids, through all four scripts."""
    columns = max(map(len, FRONT))
    height = sum(HEAD + len(rows) * (side + GAP) for _ in FRONT)
    sheet = Image.new("RGB", (columns * (side + GAP) + GAP, height + GAP), "white")
    text, top = ImageDraw.Draw(sheet), 0
    for block in FRONT:
        for k, (title, name, column) in enumerate(block):
            left = GAP + k * (side + GAP)
            text.text((left, top + 2), title, fill="black")
            for j, row in enumerate(rows):
                picture = cell(name, column, row, side)
                sheet.paste(picture, (left, top + HEAD + j * (side + GAP)))
        top += HEAD + len(rows) * (side + GAP)
    sheet.save(path, quality=75)


def raster(checkpoint, path, side=340):
    """Draws docs/raster.jpg: a raster, painted as one square, by windows of their own, and so that
    windows share their statistics; below, a part of it.
    """
    script = importlib.import_module(load_weights(checkpoint)["script"])
    whole = max(Image.open(path).size)
    ways = {
        "as one square": ["--window", str(whole)],
        "each window by itself": ["--norm-reach", "0"],
    }
    pictures = {"input": Image.open(path).convert("RGB")}
    for title, options in (ways | {"windows that share statistics": []}).items():
        with tempfile.TemporaryDirectory() as out:
            call = ["--generate", path, "--checkpoint", checkpoint, "--out", out, *options]
            script.main(call)
            pictures[title] = Image.open(next(Path(out).iterdir())).convert("RGB")
    sheet = Image.new("RGB", (len(pictures) * (side + GAP), HEAD + 2 * (side + GAP)), "white")
    text = ImageDraw.Draw(sheet)
    for k, (title, picture) in enumerate(pictures.items()):
        left, middle = k * (side + GAP), [length // 2 for length in picture.size]
        text.text((left, 2), title, fill="black")
        square = picture.crop((0, 0, min(picture.size), min(picture.size)))
        sheet.paste(square.resize((side, side), 3), (left, HEAD))
        part = picture.crop((middle[0] - side, middle[1] - side, *middle))
        sheet.paste(part, (left, HEAD + side + GAP))
    sheet.save(ROOT / "docs" / "raster.jpg", quality=82)


def controls(*runs, images=200, rows=4, side=104):
    """Writes docs/controls.json, and draws docs/controls.jpg: runs that differ in one thing, each
    by an image's own statistics and by running ones, on validation images 0, n, 2n, ...

    Beside the measures stands how alike the pictures of different places are: one pattern that is
    painted everywhere shows there.
    """
    columns, kept = {}, {}
    for run in map(Path, runs):
        about = json.loads((run / "config.json").read_text())
        script = importlib.import_module(about["script"])
        first = run == Path(runs[0])
        what = {k: v for k, v in about["options"].items() if base(runs[0]).get(k, v) != v}
        values = {k: str(v).removesuffix(".0") for k, v in what.items() if k not in PLACE}
        what = " ".join(f"{common.flag(k)} {value}" for k, value in values.items())
        for norm in ("batch", "running"):
            call = ["--evaluate", "--checkpoint", str(run / "checkpoints" / "last.pt")]
            with mock.patch.object(script, "report") as report:
                script.main([*call, "--eval-norm", norm, "--out", str(run / "controls")])
            state, val, cfg, _ = report.call_args.args
            scores, likeness = common.Scores(), []
            for records in val.in_order(common.spread(images, len(val))):
                x, y = val.sides(records)
                fake = script.translate(state, x, cfg)
                scores.add_images("model", fake, y)
                likeness.append(torch.stack([alike(fake), alike(y)], 1))
            own = scores.table()["model"]
            likeness = torch.cat(likeness).mean(0).tolist()
            title = f"{what or 'as it is'}, {'own' if norm == 'batch' else 'running'} statistics"
            kept[title] = {name: own[name] for name in ("rmse", "accuracy_5", "accuracy_10")}
            kept[title] |= {"alike": likeness[0], "targets_alike": likeness[1]}
            shown = script.sample(state, val, cfg, common.spread(rows, len(val)))
            if first and norm == "batch":
                columns |= {"input": shown["input"], "target": shown["target"]}
            columns[title] = shown["fake"]
    (ROOT / "docs" / "controls.json").write_text(json.dumps(kept, indent=1) + "\n")
    head = 3 * HEAD
    sheet = Image.new("RGB", (len(columns) * (side + GAP), head + rows * (side + GAP)), "white")
    text = ImageDraw.Draw(sheet)
    for k, (title, pictures) in enumerate(columns.items()):
        words = title.replace(" statistics", "").replace(", ", "\n").replace(" --", "\n--")
        text.text((k * (side + GAP), 2), words, fill="black")
        for j, picture in enumerate(as_array(image[None]) for image in pictures):
            place = k * (side + GAP), head + j * (side + GAP)
            sheet.paste(Image.fromarray(picture).resize((side, side), 3), place)
    sheet.save(ROOT / "docs" / "controls.jpg", quality=85)


def alike(pictures, around=15):
    """The correlation of what is fine in each picture (B, 3, S, S) with that in the next: (B,)."""
    grey = pictures.mean(1, keepdim=True)
    fine = (grey - F.avg_pool2d(grey, around, 1, around // 2, count_include_pad=False)).flatten(1)
    fine = F.normalize(fine - fine.mean(1, keepdim=True), dim=1)
    return (fine * fine.roll(1, 0)).sum(1)


def base(run):
    """The options of a run."""
    return json.loads((Path(run) / "config.json").read_text())["options"]


def paint(checkpoint):
    """Draws docs/paint.jpg: trees are painted into a validation image, on the page of --serve."""
    from playwright.sync_api import sync_playwright

    script = load_weights(checkpoint)["script"]
    call = [sys.executable, ROOT / f"{script}.py", "--serve", "--port", "0"]
    process = subprocess.Popen(
        [*call, "--checkpoint", checkpoint], stdout=subprocess.PIPE, text=True
    )
    address = next(line for line in process.stdout if line.startswith("paint at")).split()[2]
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1000, "height": 690})
        page.goto(address)
        page.wait_for_selector('body[data-painted="1"]')
        page.click("text=vegetation")
        page.fill("#size", "24")
        box = page.locator("#map").bounding_box()
        places = [(0.4, 0.45), (0.55, 0.5), (0.6, 0.6), (0.5, 0.65)]
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places:
            page.mouse.move(*place, steps=8)
        page.mouse.up()
        page.wait_for_selector('body[data-painted="2"]')
        shot = Path(folder) / "shot.png"
        page.screenshot(path=shot)
        Image.open(shot).convert("RGB").save(ROOT / "docs" / "paint.jpg", quality=80)
        browser.close()
    process.send_signal(signal.SIGINT)
    process.wait()


@common.command
def main(argv=None):
    verb, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    verbs = {"keep": keep, "front": front, "raster": raster, "controls": controls, "paint": paint}
    try:
        inspect.signature(verbs[verb]).bind(*rest)
    except (KeyError, TypeError):
        sys.exit(__doc__)
    verbs[verb](*rest)


if __name__ == "__main__":
    main()
