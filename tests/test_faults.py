"""Mistakes and failures as a user meets them: what is done, the exit status, the line.

Each case of CASES is a command line; the rest are machines that fail in the middle.
"""

import importlib
import io
import json
import os
import re
import shutil
import signal
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import common
import cyclegan
import mixlc
import pix2pix
import support.begin
import support.run
from files import CLASSES, TABLE, geotiff, land_cover, picture, save, side_by_side, touch
from harness import SCRIPTS
from runs import last, line_of, metrics_of, state_of, tiny_run, use
from support.checkpoints import load_checkpoint
from support.classes import ClassTable
from support.errors import SafeStream
from support.files import LOCKS, lock, whole_or_absent
from support.layouts import find_images
from support.rasters import Raster
from support.store import cache_folder
from tensors import CPU, same

SMALL = ["--size", "64", "--width", "2", "--batch-size", "2", "--epochs", "1", "--device", "cpu"]

EDIT = "mixlc --generate photo.png --checkpoint mixlc.pt --out o"
FORGE = "forged_masks --data landcover --cache cache --patch 80 --tiles"
# a command in a world of pairs/, landcover/ and model.pt, and a part of the line
CASES = {
    f"{EDIT} --lc lc.png --paint lake:1,1,5,5": "several; there are land, water, road",
    f"{EDIT} --lc lc.png --paint :1,1,5,5": "or several; there are",
    f"{EDIT} --lc lc.png --paint water:1,1": "write class:x,y,width,height",
    f"{EDIT} --lc lc.png --paint water:140,1,5,5": "paints nothing in the image, 140x100",
    f"{EDIT} --lc lc.png --paint water:1,100,5,5": "paints nothing in the image",
    f"{EDIT} --lc lc.png --paint water:1,1,0,5": "paints nothing in the image",
    f"{EDIT} --generate small.png --lc lc.png": "an edit needs one photograph",
    "mixlc --bands-B 1": "--bands-B 1: B is land cover",
    "mixlc --limits-B 0,9": "--limits-B 0,9: B is land cover",
    "pix2pix --evaluate --init model.pt": "need --checkpoint FILE",
    f"{EDIT} --lc lc.png": "or train with --no-erase",
    f"{EDIT} --lc small.png --paint water:1,1,5,5": "10x10: sizes must agree",
    f"{EDIT} --paint water:1,1,5,5": "needs --lc",
    "pix2pix --batch 2": "unrecognized arguments: --batch 2 (see --help)",
    "pix2pix --data=": "--data is empty: pass a value",
    "pix2pix --resume --out renamed": "this version has no option adv_lambda, alpha",
    "pix2pix --evaluate --checkpoint model.pt --out stranger": "written by another program",
    "pix2pix --evaluate --checkpoint model.pt --bands-A 3,2,1": "--bands-A 3,2,1 contradicts",
    "pix2pix --load-size 99999999": "must be 64 (--size) to 4096",
    "pix2pix --cache model.pt/c": "Not a directory: choose another",
    "pix2pix --data unaligned": "cyclegan.py",
    "mixlc --lc-classes nope.json": "nope.json: no such file",
    "pix2pix --data dangling": "dangling/train/0.png: no such file",
    "pix2pix --data dangling_later": "dangling_later/train/1.png: No such file or directory: rep",
    "pix2pix --generate loop --checkpoint model.pt --out o": "loop/x.png: no such file",
    "pix2pix --data mixed": "1.png: has uint8 values, and ",
    "pix2pix --data terabytes": "is too large: make it a TIFF",
    "mixlc --data arrays --patch 40": "0.npz: has more pixels than fit in memory",
    "mixlc --data axes": "0.npy: cannot be decoded",
    "mixlc --data utf16": "classes.json: 'utf-8' codec",
    "pix2pix --resume --out two": "2 processes: start it with torchrun --nproc-per-node 2",
    "mixlc --resume --out finished --epochs 1": "last.pt has done 2",
    "pix2pix --split test": "--split is for --generate, --evaluate or --serve",
    "pix2pix --fid": "--fid is for --generate, --evaluate or --serve",
    "cyclegan --direction BtoA": "--direction is for --generate",
    "mixlc --lc lc.png --paint water:1,1,9,9": "--lc is for --generate",
    "pix2pix --data no_val": "no_val: no images of split val: put some into val/ or validation/",
    "pix2pix --evaluate --checkpoint judged/last.pt --out judged": "judge.pt: not a checkpoint",
    "pix2pix --evaluate --checkpoint judged/last.pt --judge model.pt --out o": "is not a judge of",
    "pix2pix --data pairs --judge model.pt": "a judge needs data with land cover",
    "pix2pix --evaluate --checkpoint model.pt --train-judge": "a judge needs data with land cover",
    "mixlc --judge model.pt": "model.pt: is not a judge of 3 classes",  # before training
    "mixlc --judge model.pt --train-judge": "leave --train-judge out",
    "pix2pix --out model.pt/run": "model.pt/run: Not a directory",
    "mixlc_acgan --style-features random --style-layers relu9_9": "choose from relu1_1,",
    "pix2pix --init model.pt --width 8": "do not fit this G: check --generator",
    "pix2pix --generate pairs/val --init model.pt --out o": "one of our checkpoints: use --check",
    "pix2pix --batch-size 7": "more than 6 training images",
    "pix2pix --generate deep.tif --checkpoint model.pt --out o": "use rio convert --dtype",
    "pix2pix --data odd.pt": "no such directory",
    "pix2pix --epochs 0": "--epochs 0: must be at least 1",
    "pix2pix --dropout 1.5": "--dropout 1.5: must be at most",
    "pix2pix --patch-gan 286": "--patch-gan 286",
    "pix2pix --vgg16 nowhere.pth": "--vgg16 nowhere.pth: no such file",
    "pix2pix --content vgg --vgg16 odd.pt": "no features.0.weight: pass",
    "pix2pix --init odd.pt": "no network G in it",
    "pix2pix --init nested.pt": "no network G in it",
    "mixlc --data pairs": "--lc-classes",
    "mixlc --data lone": "has one image",
    "mixlc_acgan --data pairs": "edits need land cover: pass --lc-classes",
    "mixlc --data unaligned --lc-classes binary": "edits need pairs, which",
    "pix2pix --bands-A 0": "write 1 to 32 numbers from 1, such as 8,4,3",
    "pix2pix --bands-A 1,x": "write 1 to 32 numbers from 1, such as 8,4,3",
    f"pix2pix --bands-A {','.join('1' * 33)}": "write 1 to 32 numbers from 1",
    "pix2pix --load-size 63": "--load-size 63: must be 64 (--size)",
    "pix2pix --evaluate": "--serve need --checkpoint FILE",
    "pix2pix --checkpoint model.pt": "--checkpoint is for --generate, --evaluate and --serve",
    "pix2pix --evaluate --checkpoint model.pt --out odd.pt": "odd.pt: is a file, not a folder",
    "pix2pix --evaluate --checkpoint model.pt --out another": "another: a run of mixlc.py",
    "pix2pix --generate photo.png --generate= --checkpoint model.pt": "--generate is empty",
    "pix2pix --out kept": "--out kept has a run: --resume continues it",
    "pix2pix --evaluate --checkpoint code.pt": "code.pt: not a checkpoint, or a damaged one",
    "pix2pix --patch 99": "--patch 99: every image of split train is smaller",
    "pix2pix --evaluate --checkpoint corrupt.pt": "a damaged one",
    "pix2pix --evaluate --checkpoint flipped.pt": "a damaged one",
    "pix2pix --evaluate --checkpoint text.pt": "not a checkpoint of pix2pix.py",
    "pix2pix --evaluate --checkpoint size.pt": "--size [64]: must be int",
    "mixlc --lc-classes /dev/zero": "class table /dev/zero: no such file",
    "pix2pix --evaluate --checkpoint other.pt": "written by cyclegan.py",
    "pix2pix --evaluate --checkpoint odd.pt": "not a checkpoint of pix2pix.py",
    "pix2pix --evaluate --checkpoint run": "no such file (in a run folder: checkpoints/last.pt)",
    "pix2pix --evaluate --checkpoint model.pt --size 128": "--size 128 contradicts",
    "pix2pix --generate no --checkpoint model.pt --batch-size 9": "--batch-size 9 contradicts",
    "pix2pix --generate no --checkpoint model.pt": "no such file or directory",
    "pix2pix --generate empty --checkpoint model.pt": "no images in it",
    "pix2pix --resume --out run --lambda-l1 50": "--lambda-l1 50.0 contradicts",
    "pix2pix --resume --out run --epochs 9": "ends there; a new run with --init trains on",
    "pix2pix --resume --out empty": "no checkpoints/last.pt in empty",
    "pix2pix --out stranger": "--out stranger has evaluation.json: choose",
    "pix2pix --out odd.pt": "odd.pt: File exists",
    "pix2pix --resume --out texts": "error: texts: its G is missing, or does not fit",
    "pix2pix --resume --out no_moments": "no_moments: its opt_G is missing, or does",
    "pix2pix --resume --out no_G": "no_G: its G is missing, or does not fit",
    "pix2pix --data nan": "0.tif: no pixel has data",
    "forged_masks --data pairs --cache cache": "land cover",
    f"{FORGE} 5": "from 2 to 4",
    f"{FORGE} 2 --forged 0": "--forged",
    f"{FORGE} 2 --seeds 1": "--seeds",
    "seams nothing.pt scene.tif": "nothing.pt",
    "seams bare.pt scene.tif": "no checkpoint",
    "texture bare.pt pairs": "no checkpoint of pix2pix.py or cyclegan.py",
    "keep_run empty kept 60": "evaluation.json",
}
for limits in ["5", "1,2,3", "3,2", "1,x", "nan,1", "0,inf", "1,2,3,4,5,6,7,8"]:
    CASES[f"pix2pix --limits-A {limits}"] = "write LOW,HIGH, for all bands or for each"
if not torch.cuda.is_available():
    CASES["pix2pix --device cuda"] = "--device cuda: no CUDA device"


@pytest.fixture(scope="module")
def world(tmp_path_factory, trained):
    """The folder in which the commands of CASES run."""
    root = tmp_path_factory.mktemp("world")
    side_by_side(root / "pairs")
    land_cover(root / "landcover")
    land_cover(root / "lone", train=1)
    pix2pix.main(run_of(root, root / "run"))
    shutil.copy(root / "run" / "checkpoints" / "last.pt", root / "model.pt")
    shutil.copy(trained("mixlc") / "checkpoints" / "last.pt", root / "mixlc.pt")
    shutil.copytree(trained("mixlc"), root / "finished")
    side_by_side(root / "no_val", val=0)
    save(root / "photo.png", picture(np.random.default_rng(9), 100, 140))
    save(root / "lc.png", np.zeros((100, 140), np.uint8))
    save(root / "small.png", np.zeros((10, 10), np.uint8))
    for name in ("trainA", "trainB", "testA", "testB"):
        save(root / "unaligned" / name / "0.png", np.zeros((8, 8, 3), np.uint8))
    for name in ("empty", "stranger", "judged", "another"):
        (root / name).mkdir()
    (root / "another" / "config.json").write_text('{"script": "mixlc"}')
    (root / "stranger" / "evaluation.json").write_text('{"score": 3}')
    (root / "judged" / "judge.pt").write_bytes(b"rubbish")
    Image.fromarray(np.zeros((70, 70), np.uint16)).save(root / "deep.tif")
    wrong_data(root)
    wrong_checkpoints(root)
    return root


def run_of(world, out, more=""):
    """The command line of a run of one epoch."""
    return tiny_run("pix2pix", world / "pairs", out, f"--width 2 --epochs 1 {more}")


def wrong_data(root):
    (root / "loop").mkdir()
    (root / "loop" / "x.png").symlink_to("x.png")
    for name in ("train/A", "train/B", "val/A", "val/B"):
        geotiff(root / "mixed" / name / "0.tif", np.full((64, 64), 999, np.uint16))
        save(root / "mixed" / name / "1.png", np.zeros((64, 64), np.uint8))
        geotiff(root / "nan" / name / "0.tif", np.full((64, 64), np.nan, np.float32))
    shutil.copytree(root / "pairs", root / "dangling_later")
    (root / "dangling_later" / "train" / "1.png").unlink()
    (root / "dangling_later" / "train" / "1.png").symlink_to("/nowhere.png")
    for name in ("dangling", "terabytes"):
        shutil.copytree(root / "pairs", root / name)
        (root / name / "train" / "0.png").unlink()
    (root / "dangling" / "train" / "0.png").symlink_to("/nowhere.png")
    header = root / "terabytes" / "train" / "0.bmp"  # claims a size
    save(header, np.zeros((1, 1, 3), np.uint8))
    content = bytearray(header.read_bytes())
    content[18:26] = struct.pack("<ii", 2_000_000, 1_000_000)
    header.write_bytes(content)
    for name in ("arrays", "axes", "utf16"):
        shutil.copytree(root / "landcover", root / name)
    for name in ("arrays", "axes"):
        (root / name / "train" / "lc" / "0.png").unlink()
    header = io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": (10**7, 10**7)}
    np.lib.format.write_array_header_1_0(header, about)
    with zipfile.ZipFile(root / "arrays" / "train" / "lc" / "0.npz", "w") as file:
        file.writestr("arr_0.npy", header.getvalue())
    np.save(root / "axes" / "train" / "lc" / "0.npy", np.zeros((1, 3, 80, 80), np.uint8))
    (root / "utf16" / "classes.json").write_text(json.dumps(TABLE), encoding="utf-16")


class Code:
    """Unpickled, it would stop the tests."""

    def __reduce__(self):
        return pytest.exit, ("a checkpoint ran code",)


def wrong_checkpoints(root):
    """Checkpoints that are not what the commands need, most of them model.pt with a change."""
    content = state_of(root / "model.pt")
    config = content["config"] | {"schedule": "constant", "epochs": 2}
    classes = {"lc_classes": CLASSES.text, "data": str(root / "landcover")}

    def with_state(**changed):
        return content | {"state": content["state"] | changed}

    for name, changed in {
        "done/checkpoints/last.pt": content | {"config": config, "epoch": 2},
        "two/checkpoints/last.pt": content | {"config": config, "world": 2},
        "renamed/checkpoints/last.pt": content
        | {"config": config | {"alpha": 1.0, "adv_lambda": 1.0}},
        "judged/last.pt": content | {"config": config | classes},
        "texts/checkpoints/last.pt": with_state(G={"downs.0.0.weight": "x"}),
        "no_moments/checkpoints/last.pt": with_state(opt_G={}),
        "no_G/checkpoints/last.pt": with_state(G=None),
        "other.pt": {"script": "cyclegan", "config": {}, "state": {}},
        "odd.pt": {"script": "pix2pix", "config": {}, "state": 3},
        "text.pt": content | {"config": "size 64"},
        "size.pt": content | {"config": config | {"size": [64]}},
        "bare.pt": {"conv.weight": torch.zeros(1)},
        "nested.pt": {"networks": {"a": torch.zeros(1), "b": torch.zeros(1)}, "epoch": 3},
        "kept/checkpoints/epoch_0010.pt": content,
        "code.pt": {"script": Code()},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(changed, root / name)
    whole = (root / "model.pt").read_bytes()
    (root / "corrupt.pt").write_bytes(whole[:5000])
    middle = len(whole) // 2  # of some weights: only their checksum shows that a byte is wrong
    (root / "flipped.pt").write_bytes(whole[:middle] + b"?!" + whole[middle + 2 :])


@pytest.mark.parametrize("command", CASES)
def test_a_mistake_is_one_line_and_leaves_nothing(command, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    before = files_of(world)
    script, *words = command.split()
    if script in SCRIPTS and not {"--checkpoint", "--resume"} & set(words):
        data = "landcover" if "mix" in script else "pairs"
        words = [*f"--data {data} --cache cache --out new".split(), *SMALL, *words]
    assert CASES[command] in line_of(importlib.import_module(script).main, words, capsys)
    assert files_of(world) == before


def test_an_undefined_score_does_not_stop_a_run(tmp_path):
    """No edit of the validation images has a class: own_mean_iou is 0 / 0."""
    root = land_cover(tmp_path / "data")
    for path in (root / "val" / "lc").iterdir():
        labels = np.asarray(Image.open(path)).copy()
        labels[15:65, 15:65] = 3  # ignored
        save(path, labels)
    main, run = importlib.import_module("mixlc_acgan").main, tmp_path / "run"
    main(tiny_run("mixlc_acgan", root, run, "--epochs 1"))
    assert metrics_of(run)[-1]["val_own_mean_iou"] in ("", None)
    for name in ("evaluation.json", "index.html"):
        assert not re.search(r": (NaN|Infinity)", (run / name).read_text())


def test_one_process_does_not_become_two(world, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = line_of(pix2pix.main, ["--resume", "--out", str(world / "run")], capsys)
    assert "the run has 1 processes" in line


def files_of(folder):
    """All files and folders but hidden ones and caches."""
    found = (path for path in folder.rglob("*") if "cache" not in path.parts)
    return sorted(path for path in found if not path.name.startswith("."))


def damaged(content, rng):
    """Some bytes changed, removed or put in."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        place, count = int(rng.integers(len(content))), int(rng.integers(1, 50))
        how = rng.integers(3)
        if how == 0:
            content[place] = rng.integers(256)
        elif how == 1:
            del content[place : place + count]
        else:
            content[place:place] = rng.bytes(count)
        content = content or bytearray(b"x")
    return content


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "npz", "json", "pt"])
def test_no_damage_to_a_file_is_a_traceback(kind, world, tmp_path):
    """It is read, or refused by name."""
    rng, path, refused = np.random.default_rng(0), tmp_path / f"x.{kind}", 0
    if kind == "npz":
        np.savez_compressed(path, rng.integers(0, 3, (40, 50), np.uint8))
    elif kind == "json":
        path.write_text(json.dumps(TABLE))
    elif kind == "pt":
        shutil.copy(world / "model.pt", path)
    else:
        save(path, picture(rng, 40, 50))
    whole = path.read_bytes()
    for _ in range(20 if kind == "pt" else 60):
        path.write_bytes(damaged(whole, rng))
        try:
            if kind == "json":
                ClassTable.load(str(path))
            elif kind == "pt":
                load_checkpoint(path, "pix2pix")
            else:
                Raster(path, CLASSES if kind == "npz" else None).read(0, 0, 64, 64)
        except common.UserError as error:
            assert "x." in str(error)
            refused += 1
    assert refused > 5


def test_another_class_table_beside_the_data_is_said(trained, landcover, tmp_path, capsys):
    """The same, or since the run began the classes were reversed, or only their names."""
    root = shutil.copytree(landcover, tmp_path / "data")
    names = [row | {"name": other["name"]} for row, other in zip(TABLE, TABLE[::-1], strict=True)]
    for table in (TABLE, TABLE[::-1], names):
        (root / "classes.json").write_text(json.dumps(table))
        more = f"--data {root} --out {tmp_path}/out"
        mixlc.main(use(trained("mixlc"), "--evaluate", more))
        remark = "classes.json: differs from the class table in use (land, water, road)"
        assert (remark in capsys.readouterr().err) == (table != TABLE)
    find_images(root, "train", "pictures")
    assert "classes.json: not used, as B is pictures" in capsys.readouterr().err


# --------------------------------------------------------------------------------- failing machines


def test_a_run_folder_has_one_run_at_a_time(world, tmp_path, capsys, monkeypatch):
    """A second one is refused while the first goes on, whether it begins or resumes."""
    shutil.copytree(world / "done", tmp_path / "run")
    (tmp_path / "new").mkdir()
    for name, words in (
        ("new", run_of(world, tmp_path / "new")),
        ("run", f"--resume --out {tmp_path}/run --epochs 3".split()),
    ):
        lock(tmp_path / name)
        first = LOCKS.pop()
        line = line_of(pix2pix.main, words, capsys)
        assert "is in use: another process" in line and ".lock; if none runs" in line
        first.release()  # as the system does when a process ends
        pix2pix.main(words)
    monkeypatch.setenv("RANK", "1")  # set by hand, without torchrun
    lock(tmp_path / "new")
    LOCKS.pop().release()
    monkeypatch.setenv("WORLD_SIZE", "2")
    lock(tmp_path / "new")
    assert not LOCKS  # the first process of torchrun has the folder for all


def test_a_start_that_was_killed_before_it_wrote_starts_again(world, tmp_path):
    """Folders and temporary files are all that it left."""
    run = tmp_path / "run"
    left = [run / f"{folder}.unfinished-00ff.x" for folder in ("", "checkpoints/", "samples/")]
    others = run / ".2024-plan.json", run / "generated" / ".unfinished-77.png"
    (run / "samples").mkdir(parents=True)
    touch(*left)
    pix2pix.main(run_of(world, run))
    assert (run / "evaluation.json").is_file() and not list(run.rglob(".unfinished*"))
    touch(*others)  # a user's, and that of a generation that goes on
    pix2pix.main(f"--resume --out {run}".split())
    assert all(path.is_file() for path in others)
    for path in run.rglob("*.pt"):  # as if killed before the first one
        path.unlink()
    with pytest.raises(SystemExit):
        cyclegan.main(tiny_run("cyclegan", world / "pairs", run, "--epochs 1"))


def test_a_kept_checkpoint_that_was_not_linked_is(world, tmp_path):
    pix2pix.main(run_of(world, tmp_path / "run", "--save-every 1"))
    kept = tmp_path / "run" / "checkpoints" / "epoch_0001.pt"
    kept.unlink()  # as if killed between replacing last.pt and this
    pix2pix.main(f"--resume --out {tmp_path / 'run'}".split())
    assert same(state_of(kept)["state"], last(tmp_path / "run")["state"])


@pytest.mark.parametrize(("split", "name", "steps"), [("train", 9, 4), ("val", 3, 3)])
def test_a_resume_with_other_images_says_so(split, name, steps, tmp_path, capsys):
    """Its epoch begins anew, and kept checkpoints stay."""
    root, run = side_by_side(tmp_path / "data", suffix=".bmp"), tmp_path / "run"
    pix2pix.main(tiny_run("pix2pix", root, run, "--epochs 2 --schedule constant --save-every 1"))
    losses = [name for name in metrics_of(run)[0] if name[:2] in ("g_", "d_")]
    means = losses, torch.full((len(losses),), 1e6, dtype=torch.float64), 2
    content = last(run) | {"epoch": 1, "batch": 2, "step": 5}  # in the middle of the second
    torch.save(content | {"of_row": means, "of_epoch": means}, run / "checkpoints" / "last.pt")
    kept = run / "checkpoints" / "epoch_0001.pt"
    before = kept.read_bytes()
    for k in range(2):
        save(root / split / f"{name + k}.bmp", picture(np.random.default_rng(k), 96, 192))
    capsys.readouterr()
    pix2pix.main(f"--resume --out {run}".split())
    said = capsys.readouterr().err
    assert "the images have changed: epoch 2 starts again" in said
    assert f"| {2 * steps}/{4 * steps} [" in said  # of its progress bar
    assert last(run)["step"] == 5 + steps and kept.read_bytes() == before
    store = pix2pix.Pairs(pix2pix.Config(**last(run)["config"]), "train", CPU).store
    changed, side = split == "train", 96 if split == "train" else 80
    assert last(run)["window"] == max(store.windows()) == (side, side)
    assert same(last(run)["histograms"], store.histograms())  # baselines of what it trains on
    assert same(last(run)["histograms"], content["histograms"]) != changed
    means = [float(row["g_l1"]) for row in metrics_of(run)]
    assert max(means) < 100  # without the steps that are done again
    if changed:
        (root / "train" / "5.bmp").unlink()
        pix2pix.main(f"--resume --out {run}".split())
        said = capsys.readouterr().err
        assert "all epochs are done" in said and "starts again" not in said


# ------------------------------------------------------------------------------ nowhere to print to


def stream(kind):
    """A stream to which nothing can be written, or one that can do nothing else."""
    if kind == "closed":
        return None
    if kind == "logger":
        return types.SimpleNamespace(write=len, flush=list)
    if kind == "full":
        return open("/dev/full", "w")
    reader, writer = os.openpty() if kind == "terminal" else os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("kind", ["closed", "full", "terminal", "pipe", "logger"])
def test_a_signal_saves_though_nothing_can_be_printed(kind, world, tmp_path, monkeypatch):
    honest = pix2pix.train_step

    def step(state, batch, cfg):
        os.kill(os.getpid(), signal.SIGINT)
        second = signal.getsignal(signal.SIGINT)  # of one more Ctrl-C
        assert second is signal.default_int_handler
        return honest(state, batch, cfg)

    monkeypatch.setattr(pix2pix, "train_step", step)
    monkeypatch.setattr(sys, "stdout", stream(kind))
    monkeypatch.setattr(sys, "stderr", stream(kind))
    with pytest.raises(SystemExit) as stopped:
        pix2pix.main(run_of(world, tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as before
    assert not stopped.value.__context__  # or a notebook would keep the networks
    assert stopped.value.code == 128 + signal.SIGINT and last(tmp_path / "run")["step"] == 1


def test_text_that_a_stream_cannot_encode_is_escaped():
    """As with LC_ALL=C, and for file names that are no UTF-8."""
    written = io.BytesIO()
    ascii_alone = io.TextIOWrapper(written, encoding="ascii")
    SafeStream(ascii_alone).write("z\xfcrich \udcff")
    assert written.getvalue() == b"z\\xfcrich \\udcff"
    SafeStream(ascii_alone).write("\n\r\t\x1b[A\x1b]0;title\x07")  # a bar's, and of a file's name
    assert written.getvalue()[16:] == b"\n\r\t\x1b[A\\x1b]0;title\\x07"


# ------------------------------------------------------------------------------- what costs nothing


def test_a_plot_that_cannot_be_drawn_costs_nothing(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"

    def draw(rows, path):
        assert (out / "checkpoints" / "last.pt").is_file()
        raise OSError("no room for a picture")

    monkeypatch.setattr(support.run, "plot_metrics", draw)
    pix2pix.main(run_of(world, out))
    said = capsys.readouterr().err
    assert f"{out}: cannot be drawn (OSError: no room for a picture)" in said


def test_a_damaged_config_costs_an_evaluation_its_page(world, tmp_path, capsys):
    run = shutil.copytree(world / "run", tmp_path / "run")
    (run / "config.json").write_text("{")
    (run / "evaluation.json").unlink()
    pix2pix.main(use(run, "--evaluate"))
    assert "index.html: cannot be drawn (JSONDecodeError" in capsys.readouterr().err
    assert (run / "evaluation.json").is_file()


@pytest.mark.parametrize("note", [b"", b"my best run\n"])
def test_a_resume_cuts_its_own_metrics_alone(note, world, tmp_path):
    """Not those that somebody edited, nor those of a backup by hard links."""
    run = shutil.copytree(world / "done", tmp_path / "run")
    saved = (world / "run" / "metrics.csv").read_bytes()
    written = note + saved + b"1,4,0.1,written,after,the,save,\xff\xfe\r\n"
    (run / "metrics.csv").write_bytes(written)
    os.link(run / "metrics.csv", tmp_path / "backup.csv")
    pix2pix.main(f"--resume --out {run} --epochs 3".split())
    now = (run / "metrics.csv").read_bytes()
    assert now.startswith(written if note else saved) and b"\n3," in now
    assert (b"after" in now) == bool(note)
    assert note or (tmp_path / "backup.csv").read_bytes() == written


def test_files_are_written_under_short_names_and_errors_name_the_file(tmp_path):
    path = tmp_path / ("x" * 249 + ".png")
    with whole_or_absent(path) as aside, whole_or_absent(path) as of_another_process:
        aside.write_text("whole")
        of_another_process.write_text("first")
    assert path.read_text() == "whole"
    with pytest.raises(OSError) as error, whole_or_absent(path) as aside:
        aside.write_text("half")
        raise OSError(28, "No space left on device")
    assert error.value.filename == str(path) and path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_another_program_has_open_is_replaced_later(tmp_path, monkeypatch):
    """As on Windows, where it cannot be replaced at that moment."""
    honest, refusals = os.replace, [True, True, False, *[True] * 9]

    def busy(*paths):
        if refusals.pop(0):
            raise PermissionError(13, "Access is denied", *map(str, paths))
        honest(*paths)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with whole_or_absent(tmp_path / "x") as aside:
        aside.write_text("whole")
    with pytest.raises(PermissionError), whole_or_absent(tmp_path / "x") as aside:
        aside.write_text("another")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("two", ["evaluate generate", "evaluate serve", "generate serve"])
def test_two_uses_at_once_are_refused(two):
    """Here without a command, which would serve if it were not."""
    asked = {name: ("x",) if name == "generate" else True for name in two.split()}
    with pytest.raises(common.UserError, match="one at a time"):
        support.begin._check_modes(pix2pix.Config(checkpoint="x", **asked), {})


def test_a_run_here_has_its_cache_beside_it(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cache_folder(pix2pix.Config(out=".")) == tmp_path / "cache"
