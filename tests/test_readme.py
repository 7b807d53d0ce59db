"""Every command in the pages and in the scripts' docstrings runs as it is printed, on tiny data;
small options follow the printed ones and win.
"""

import functools
import importlib
import itertools
import os
import re
import shlex
import socketserver
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image

import cyclegan
from files import geotiff, land_cover, picture, save, side_by_side, vgg_file
from forks import forked
from harness import SCRIPTS
from support import store
from support.demo import demo_world

PAGES = [["README.md", "docs/use.md"]]  # which uses the models that the README's commands train
PAGES += [[f"docs/{name}.md"] for name in ("data", "inria", "results/README")]
PAGES += [["weights/README.md"]]
PAGES += [[f"{script}.py"] for script in SCRIPTS]
SMALL = {
    "--size": "64", "--load-size": "68", "--patch": "64", "--batch-size": "2", "--epochs": "1",
    "--width": "2", "--blocks": "1", "--window": "64",
}  # fmt: skip


def commands(page):
    """[(script, [word, ...]), ...] of a page, in its order: lines of code, and `code` in text."""
    text = (ROOT / page).read_text()
    found = re.findall(r"(?:^ *|`|&& )python (\w+)\.py ([^#`\n]*)", text, flags=re.MULTILINE)
    split = [(script, shlex.split(re.sub(r"\s{2,}.*", "", words))) for script, words in found]
    return [(script, words) for script, words in split if script in SCRIPTS]


def shrunk(script, words):
    """The words, and small options after them; X is the script's newest checkpoint."""
    made = [*Path("runs").glob(f"{script}/checkpoints/last.pt")]
    made += Path("runs").glob(f"{script}-*/checkpoints/last.pt")
    made.sort(key=lambda path: path.stat().st_mtime_ns)
    words = [str(made[-1]) if word == "X" else word for word in words]
    builds = "--checkpoint" not in words
    wanted = set(SMALL).intersection(words)
    if builds:
        wanted |= {"--size", "--width"} | ({"--blocks"} if script == "cyclegan" else set())
    if builds and "--generate" not in words:
        wanted |= {"--epochs", "--batch-size"}
    words += [word for name in wanted for word in (name, SMALL[name])]
    if builds and script == "mixlc_acgan":
        words += ["--style-layers", "relu1_2"]
        words += ["--style-features", "random"] * ("--vgg16" not in words)
    return words + ["--judge-epochs", "1"] * ("--train-judge" in words)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """[(process that runs some pages' commands, file of what it prints), ...], one for PAGES."""
    found, demo = [], tmp_path_factory.mktemp("demo")  # the demo worlds of --quick, made once
    for pages in PAGES:
        folder = tmp_path_factory.mktemp("page")
        log = folder / "log"
        found.append((forked(run_commands, pages, folder, demo, log=log), log))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("k", range(len(PAGES)), ids=map(" ".join, PAGES))
def test_commands_run_as_printed(k, running):
    process, log = running[k]
    process.join()
    assert process.exitcode == 0, log.read_text()


def run_commands(pages, folder, demo):
    """In a folder of its own, with small demo worlds, and a server that is told to end at once."""
    os.chdir(folder)
    write_files(folder)
    store.demo_world = functools.partial(demo_world, train=8, val=2)
    socketserver.BaseServer.serve_forever = ctrl_c
    found = [commands(page) for page in pages]
    assert all(found)
    for script, words in itertools.chain(*found):
        print("$ python", script, *words)
        words = shrunk(script, words) + ["--cache", str(demo)] * ("--quick" in words)
        importlib.import_module(script).main(words)


def ctrl_c(server, *_):
    raise KeyboardInterrupt


def write_files(root):
    """Every file that the pages name, in a folder."""
    for folder in ("weights", "docs"):
        (root / folder).symlink_to(ROOT / folder)
    rng = np.random.default_rng(0)
    for name in ("maps", "maps_286"):
        side_by_side(root / name, train=2, val=2, drawn=True)
    for name in ("dubai", "denmark"):
        land_cover(root / name, train=2, val=2)
    (root / "denmark" / "classes.json").unlink()
    for path in (root / "denmark").glob("*/lc/*.png"):
        save(path, np.array([0, 62, 73, 162], np.uint8)[np.asarray(Image.open(path))])
    for split in ("trainA", "trainB", "testA", "testB"):
        for k in range(2):
            save(root / "horse2zebra" / split / f"{k}.jpg", picture(rng, 80, 80))
    folders = [f"s2/{split}/{side}" for split in ("train", "val") for side in "AB"]
    for name in ("tile.tif", *(f"{folder}/{k}.tif" for folder in folders for k in "12")):
        bands = rng.integers(0, 5000, (80, 80, 1 if "/B/" in name else 8)).astype(np.uint16)
        geotiff(root / name, bands)
    for name in ("austin1", "austin6", "vienna1", "vienna6"):
        mask = (rng.random((80, 80)) < 0.5).astype(np.uint8) * 255
        save(root / "AerialImageDataset/train/images" / f"{name}.tif", picture(rng, 80, 80))
        save(root / "AerialImageDataset/train/gt" / f"{name}.tif", mask)
    names = "photo.png photo.jpg a.png map.png folder/1.jpg folder/2.png scene.tif"
    for name in names.split():
        save(root / name, picture(rng, 120, 140))
    labels = np.zeros((120, 140), np.uint8)  # a value of every table
    for name in ("landcover.png", "a_lc.png", "labels/1.png"):
        save(root / name, labels)
    labels[40:80, 40:80] = 2
    save(root / "edited.png", labels)
    vgg_file(root / "vgg16.pth")
    published = cyclegan.ResNetGenerator(3, 3, 2, 1, True).state_dict()
    torch.save(published, root / "latest_net_G.pth")


def test_no_page_with_commands_is_left_out():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")]
    found = {page.relative_to(ROOT).as_posix() for page in pages if commands(page)}
    assert found <= {*itertools.chain(*PAGES)}


@pytest.mark.slow
def test_the_python_in_the_pages_runs(capsys, tmp_path, monkeypatch):
    text = (ROOT / "docs/use.md").read_text()
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    monkeypatch.chdir(tmp_path)
    found = {}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(code.replace("satellite-to-map", "map-to-satellite"), dict(found))  # noqa: S102
        exec(code, found)  # noqa: S102
    assert found["fake"].shape == (2, 3, 64, 64) and "g_l1" in capsys.readouterr().out
    assert Image.open(tmp_path / "new.png").size == (2 * 256 + 3 * 4, 256 + 16 + 4)
    made, kept = found["state"].G.state_dict(), found["checkpoint"]["state"]["G"]
    assert all(torch.equal(made[name], weights.float()) for name, weights in kept.items())
