"""The judge: what it learns, that it repeats, and where it stands in the evaluation of a run."""

import dataclasses
import importlib
import json
import shutil

import numpy as np
import pytest
import torch

import common
import cyclegan
import mixlc_acgan
import pix2pix
import support.judge
from files import TABLE, save
from runs import JUDGED, refused, rows_of, state_of, tiny_run
from support.judge import Judge, train_judge
from support.pictures import filled
from tensors import CPU, calls_of, pictures, same

CFG = pix2pix.Config(size=64, train_judge=True, judge_epochs=4, lc_classes=json.dumps(TABLE))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Photographs in the colours of their land cover, with noise; blocks of 16 pixels."""
    root, rng = tmp_path_factory.mktemp("judge"), np.random.default_rng(0)
    palette = np.array([(200, 60, 40), (40, 60, 200), (60, 200, 60)])
    for split, count in (("train", 24), ("val", 4)):
        for k in range(count):
            index = np.kron(rng.integers(0, 3, (4, 4)), np.ones((16, 16))).astype(np.uint8)
            noise = rng.normal(0, 20, (64, 64, 3))
            photograph = np.clip(palette[index] + noise, 0, 255).astype(np.uint8)
            if k == 0:  # without data at the left
                known = np.broadcast_to(255 * (np.arange(64) > 3), (64, 64))
                photograph = np.dstack([photograph, known.astype(np.uint8)])
            save(root / split / "rgb" / f"{k}.png", photograph)
            save(root / split / "lc" / f"{k}.png", index)
    (root / "classes.json").write_text(json.dumps(TABLE))
    return root


@pytest.fixture(scope="module")
def judge(data, tmp_path_factory):
    """The file of a judge that has learnt."""
    out = tmp_path_factory.mktemp("judge")
    common.find_judge(dataclasses.replace(CFG, data=str(data), cache=str(out), out=str(out)), CPU)
    return out / "judge.pt"


def test_a_judge_learns_repeats_and_is_kept(data, tmp_path, capsys, monkeypatch):
    cfg = dataclasses.replace(CFG, data=str(data), cache=str(tmp_path / "cache"))

    def found(out, **options):
        return common.find_judge(dataclasses.replace(cfg, out=str(tmp_path / out), **options), CPU)

    one, kept = found("a"), found("a", train_judge=False)
    found("a")
    with monkeypatch.context() as patch:
        patch.setattr(support.judge, "rank", lambda: 1)  # of several processes the first writes
        two = found("b")
    assert not (tmp_path / "b" / "judge.pt").exists()
    assert same(dict(one.state_dict()), dict(two.state_dict()))
    said = capsys.readouterr().out.splitlines()
    ends = ["a/judge.pt", "which was trained before", "remove it to train another", "b/judge.pt"]
    assert all(map(str.endswith, said, ends)) and len(said) == 4
    given = {"train_judge": False, "judge": str(tmp_path / "a" / "judge.pt")}
    assert found("c", **given).name == kept.name == one.name
    assert found("c", **given, bands_A="1,2,3").name == one.name
    deep, path = state_of(given["judge"]) | {"limits": "0,9 uint16"}, str(tmp_path / "deep.pt")
    torch.save(deep, path)
    assert found("c", judge=path, limits_A="0,9 uint16")
    with refused("a judge of other limits"):
        found("c", judge=path, limits_A="0,8 uint16")
    assert not (tmp_path / "c").exists()
    with refused("a judge of other classes"):
        found("c", **given, lc_classes=json.dumps(TABLE).replace("water", "renamed"))
    for options in ({"bands_A": "3,2,1"}, {"limits_A": "0,9 uint8"}):
        with refused(f"a judge of other {next(iter(options)).split('_')[0]}"):
            found("c", **given, **options)
    val = pix2pix.Pairs(dataclasses.replace(cfg, out=str(tmp_path / "a")), "val", CPU)
    scores = common.Scores()
    for records in val.in_order(np.arange(4)):
        seen = kept.classes_of(common.from_bytes(records[:, :3]))
        scores.add_labels("real", seen, records[:, 3], 3, by="judge")
    assert scores.table()["real"]["judge_mean_iou"] > 0.9
    assert not kept.training  # it judges by the statistics of its training


def test_a_judge_sees_images_turned_in_all_ways(data, tmp_path, monkeypatch):
    judge, seen = Judge(3, width=2), set()
    steps = calls_of(monkeypatch, support.judge.F, "cross_entropy")

    def look(module, inputs):
        seen.update(image.numpy().tobytes() for image in inputs[0])

    judge.register_forward_pre_hook(look)
    paths = {"data": str(data), "out": str(tmp_path / "run")}
    cfg = dataclasses.replace(CFG, judge_epochs=40, max_images=5, **paths)
    train_judge(judge, cfg, CPU)
    assert 20 < len(seen) <= 5 * 8  # two flips alone give 5 * 4
    all_images = dataclasses.replace(CFG, judge_epochs=1, **paths)
    train_judge(Judge(3, width=2), all_images, CPU)
    assert len(steps) == 40 + 1  # a step an epoch, of 5 images, and of 16 of 24


def test_without_land_cover_or_wish_there_is_no_judge(tmp_path, capsys):
    out = {"out": str(tmp_path)}
    unwished = dataclasses.replace(CFG, train_judge=False, **out)
    assert common.find_judge(unwished, CPU) is common.find_judge(unwished, CPU, False) is None
    assert capsys.readouterr().err == ""
    assert common.find_judge(dataclasses.replace(CFG, lc_classes="pictures", **out), CPU) is None


# photographs of the land cover that was asked for, and of other land cover
JUDGED_ROWS = {
    "pix2pix": ("real photograph", "real, of another place"),
    "mixlc": ("photograph b", "copy of rgb_a"),
}


@pytest.mark.parametrize(
    ("script", "way", "measure", "noise"),
    [
        ("pix2pix", "", "rmse", 20),
        ("cyclegan", "B to A: ", "rmse", 20),
        ("mixlc", "", "l1_inside", 16),
        ("mixlc_acgan", "", "l1_inside", 16),
    ],
)
def test_a_colour_for_each_class_leaves_the_noise(
    data, judge, tmp_path, script, way, measure, noise
):
    """The baseline that sees the land cover, where that is all there is to see; and the judge."""
    run, judged = tmp_path / "run", f"--judge {judge}" * (script in JUDGED_ROWS)
    more = f"--width 2 --batch-size 8 --epochs 1 {judged}"
    importlib.import_module(script).main(tiny_run(script, data, run, more))
    rows = rows_of(run)
    for average in ("mean", "median"):
        found = rows[f"{way}{average} colour of the class"][measure]
        assert found == pytest.approx(noise, rel=0.1)
        assert found < rows[f"{way}{average} training colour"][measure] / 2
    if judged:
        real, elsewhere = (rows[row] for row in JUDGED_ROWS[script])
        assert real["judge_pixel_accuracy"] > 0.9 > elsewhere["judge_pixel_accuracy"]
        assert "judge_pixel_accuracy" in rows["model"]
        assert "mean_iou" not in rows["model"]  # the target is the photograph


@pytest.mark.parametrize("module", [pix2pix, cyclegan])
def test_a_single_image_has_no_other_place(module):
    assert module.add_floor(None, None, None, np.arange(1)) is None


@pytest.mark.parametrize("script", ["pix2pix", "cyclegan"])
def test_no_judge_without_photographs_made_of_land_cover(script, data, tmp_path, capsys):
    """pix2pix makes land cover; of cyclegan's photographs without pairs none is known."""
    if script == "cyclegan":
        for split, to in (("train", "train"), ("val", "test")):
            for folder, side in (("rgb", "A"), ("lc", "B")):
                shutil.copytree(data / split / folder, tmp_path / "data" / f"{to}{side}")
        shutil.copy(data / "classes.json", tmp_path / "data")
    root, more = (data, "--direction AtoB") if script == "pix2pix" else (tmp_path / "data", "")
    words = f"--epochs 1 --max-images 4 {JUDGED} {more}"
    importlib.import_module(script).main(tiny_run(script, root, tmp_path / "run", words))
    rows = rows_of(tmp_path / "run")
    assert "mean colour of the class" not in rows  # of maps it would see the target
    measures = {name for row in rows.values() for name in row}
    assert measures and not any(name.startswith("judge_") for name in measures)
    assert not (tmp_path / "run" / "judge.pt").exists()
    assert "no judge is used" in capsys.readouterr().err


def test_holes_are_grey_to_judges_and_classifiers():
    D, judge, image = mixlc_acgan.Discriminator(3, 3, 4), Judge(3, width=4), pictures()
    image[:, :, :20] = torch.nan
    for net in (D, judge):
        for weight in net.parameters():
            torch.nn.init.normal_(weight)
        assert torch.equal(net.classes_of(image), net.classes_of(filled(image)))
        assert len(net.classes_of(image).unique()) > 1
