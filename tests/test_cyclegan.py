"""CycleGAN alone: straight-through one-hot maps, the image pool, unpaired data, both directions."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import plain
import pytest
import torch
from PIL import Image

import common
import cyclegan
from cyclegan import ImagePool, build, main, translate
from files import LABELS, TABLE, pictures_in, pixels_of, side_by_side
from pages import page_shows, studio_of
from runs import JUDGED, last, line_of, rows_of, tiny_run, use
from support.limits import Limits
from support.pictures import to_bytes
from tensors import CPU, calls_of, maps, open_data, pictures, same, tiny

PICTURES, LAND_COVER = tiny("cyclegan")[1], tiny("cyclegan", **LABELS)[1]


def test_the_pool_equals_a_plain_list_and_is_kept_in_checkpoints():
    ours, theirs = ImagePool(4, 1, 1, torch.float32), plain.Pool(4)
    for k in range(40):
        fakes = torch.arange(3.0).view(3, 1, 1, 1) + 3 * k
        torch.manual_seed(k)
        returned = ours(fakes)
        torch.manual_seed(k)
        assert torch.equal(returned, theirs(fakes))
    assert torch.equal(ours.images, torch.stack(theirs.images))
    assert set(ours.state_dict()) == {"images", "count"}


@pytest.fixture(scope="module")
def unaligned(tmp_path_factory):
    a, b = "trainA/0.jpg trainA/1.jpg trainA/2.jpg trainA/3.jpg trainA/4.jpg", "trainB/0.jpg"
    test = "testA/0.jpg testA/1.jpg testB/0.jpg testB/1.jpg testB/2.jpg"
    return pictures_in(tmp_path_factory.mktemp("unaligned"), f"{a} {b} trainB/1.jpg {test}", 80, 80)


def test_an_epoch_has_every_image_of_the_larger_domain_and_the_smaller_evenly(
    unaligned, cache, monkeypatch
):
    data = open_data("cyclegan", unaligned, cache, batch_size=1)
    calls = calls_of(monkeypatch, common.Loader, "batches")
    batches = list(data.batches(0))
    seen = {rows: sorted(index.ravel().tolist()) for rows, index in calls}
    assert seen[data.loader_A] == [0, 1, 2, 3, 4]
    assert seen[data.loader_B] in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
    assert len(data) == 5 and all(x.shape == (1, 3, 64, 64) for batch in batches for x in batch)


def test_without_pairs_pictures_are_compared_with_their_cycles_alone(unaligned, cache, monkeypatch):
    """In the measures; a sample grid shows both cycles."""
    val, state = open_data("cyclegan", unaligned, cache, split="val"), build(PICTURES, CPU)
    calls = calls_of(monkeypatch, common.Scores, "add_distances")
    table = cyclegan.evaluate(state, val, PICTURES, [0, 1]).table()
    assert set(table) == {"A to B to A: model", "B to A to B: model"}
    assert [paired for *_, paired in calls] == [False] * len(calls) and calls
    columns, (real_A, real_B) = cyclegan.sample(state, val, PICTURES, [0]), next(val.in_order([0]))
    made = cyclegan.both_ways(state, real_A, real_B, PICTURES)
    names = ("real A", "real B", "fake B", "cycle A", "fake A", "cycle B")
    for name, image in zip(names, (real_A, real_B, *made), strict=True):
        assert torch.equal(columns[name], image)


def test_each_row_measures_its_own_picture(pairs, cache, monkeypatch):
    """Cycles are translations of translations."""
    val, state = open_data("cyclegan", pairs, cache, split="val"), build(PICTURES, CPU)
    measured = calls_of(monkeypatch, common.Scores, "add_images")
    compared = calls_of(monkeypatch, common.Scores, "add_distances")
    val.store.limits = {"A": Limits((0,) * 3, (1,) * 3, ""), "B": Limits((0,) * 3, (2,) * 3, "")}
    cyclegan.evaluate(state, val, PICTURES, [0, 1])
    ((a, b),) = val.in_order([0, 1])
    back = dataclasses.replace(PICTURES, direction="BtoA")
    fake_b, fake_a = translate(state, a, PICTURES), translate(state, b, back)
    cycled_a, cycled_b = translate(state, fake_b, back), translate(state, fake_a, PICTURES)
    wanted = {
        "A to B: model": (fake_b, b),
        "B to A: model": (fake_a, a),
        "A to B to A: model": (cycled_a, a),
        "B to A to B: model": (cycled_b, b),
    }
    assert {row for _, row, *_ in measured} == set(wanted)
    assert {row for _, row, *_ in compared} == {"A to B: model", "B to A: model"}
    for _, row, guess, target, *_ in measured + compared:
        assert torch.equal(guess, wanted[row][0]) and torch.equal(target, wanted[row][1])
    for _, row, _, _, limits in measured:
        assert limits == val.store.limits[row.split(":")[0][-1]]


def test_domains_are_drawn_independently(pairs, cache):
    """B is A's negative in this data: were they drawn together, their sum would be small."""
    data = open_data("cyclegan", pairs, cache)
    distances = [(a + b).abs().mean().item() for epoch in range(3) for a, b in data.batches(epoch)]
    assert np.mean(distances) > 0.3


def test_land_cover_batches_are_one_hot_with_holes(landcover, cache):
    data = open_data("cyclegan", landcover, cache)
    _, b = next(data.batches(0))
    assert b.shape == (2, 3, 64, 64) and set(b.unique().tolist()) == {0.0, 1.0}
    assert set(b.sum(1).unique().tolist()) == {0.0, 1.0}
    colors = to_bytes(data.picture(b)).permute(0, 2, 3, 1).reshape(-1, 3)
    assert {(0x9B, 0x9B, 0x9B), (0xE2, 0xA9, 0x29)} <= {tuple(color) for color in colors.tolist()}


def test_translate_both_directions():
    state, back = build(LAND_COVER, CPU), dataclasses.replace(LAND_COVER, direction="BtoA")
    hot = translate(state, pictures(), LAND_COVER)
    assert (hot.sum(1) == 1).all() and set(hot.unique().tolist()) == {0.0, 1.0}
    image = translate(state, maps(), back)
    assert image.shape == (2, 3, 64, 64) and image.abs().max() <= 1 and not image.requires_grad


def test_a_run_on_land_cover(landcover, tmp_path, monkeypatch):
    run, labels, out = (tmp_path / name for name in ("run", "labels", "pictures"))
    main(tiny_run("cyclegan", landcover, run, f"--epochs 1 {JUDGED}"))
    rows = rows_of(run)
    about = json.loads((run / "evaluation.json").read_text())
    confusion = about["confusion"]
    assert about["judge"].startswith("judge.pt ")
    for row in ("B to A: model", "real photograph", "real, of another place"):
        assert 0 <= rows[row]["judge_pixel_accuracy"] <= 1, row
    assert rows["real photograph"] != rows["real, of another place"]
    measures = {"pixel_accuracy", "class_accuracy", "mean_iou", "class_variety"}
    assert set(rows["A to B: model"]) == measures and "A to B: copy of the input" not in rows
    assert rows["A to B: most frequent class"]["class_accuracy"] == pytest.approx(1 / 3, abs=0.01)
    frequent = last(run)["histograms"]["B"][0, :3].argmax()
    share = np.sum(confusion, 1)[frequent] / np.sum(confusion)
    assert rows["A to B: most frequent class"]["pixel_accuracy"] == pytest.approx(share)
    accuracy = np.trace(confusion) / np.sum(confusion)
    assert rows["A to B: model"]["pixel_accuracy"] == pytest.approx(accuracy)
    assert rows["B to A: model"]["rmse"] > 0
    main(use(run, f"--generate {landcover}/val/rgb", f"--out {labels}"))
    index = Image.open(labels / "0.png")
    assert index.mode == "P" and index.size == (80, 80) and np.asarray(index).max() < 3
    assert (np.asarray(index.convert("RGB")) == pixels_of(labels / "0_colours.png")).all()
    (photo,) = (landcover / "val" / "rgb").glob("0.*")
    shown = page_shows(studio_of(main, run, monkeypatch), [photo])
    assert (shown == pixels_of(labels / "0_colours.png")).all()
    main(use(run, f"--generate {labels}/0.png --direction BtoA", f"--out {out}"))
    assert Image.open(out / "0.png").size == (80, 80)


@pytest.mark.parametrize(("classes", "measure"), [("maps", "mean_iou"), ("pictures", "rmse")])
def test_the_mode_can_be_forced_and_is_bound_to_the_checkpoint(classes, measure, pairs, tmp_path):
    """Another classes.json that appears later changes nothing."""
    root, run = shutil.copytree(pairs, tmp_path / "data"), tmp_path / "run"
    if classes == "maps":
        side_by_side(root, drawn=True)
    main(tiny_run("cyclegan", root, run, f"--epochs 1 --max-images 2 --lc-classes {classes}"))
    for more in (None, f"--out {tmp_path}/again --lc-classes {classes}"):
        if more:
            (root / "classes.json").write_text(json.dumps(TABLE))
            main(use(run, "--evaluate", more))
            run = tmp_path / "again"
        assert measure in rows_of(run)["A to B: model"]


def test_published_weights_are_usable_at_once(pairs, tmp_path, capsys):
    values = build(PICTURES, CPU).G_BA.state_dict().values()
    published = {f"model.{k}.x": value for k, value in enumerate(values)}
    torch.save(published, tmp_path / "latest_net_G.pth")
    line = f"--generate {pairs}/val --init-BA {tmp_path}/latest_net_G.pth --out {tmp_path}/out"
    line += " --size 64 --width 4 --blocks 1 --device cpu --direction"
    main(f"{line} BtoA".split())
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert "--init-AB" in line_of(main, f"{line} AtoB".split(), capsys)
    cfg = dataclasses.replace(PICTURES, init_BA=f"{tmp_path}/latest_net_G.pth")
    state = build(cfg, CPU)  # with a discriminator, which the file lacks
    cyclegan.load_generators(state, cfg)
    assert all(map(torch.equal, state.G_BA.state_dict().values(), values))


@pytest.mark.parametrize(("way", "D"), [("AB", "D_B"), ("BA", "D_A")])
def test_init_of_one_generator_starts_from_our_checkpoint_with_its_discriminator(way, D, trained):
    kept = last(trained("cyclegan"))["state"]
    path = trained("cyclegan") / "checkpoints" / "last.pt"
    cfg = dataclasses.replace(PICTURES, **{f"init_{way}": str(path)})
    state = build(cfg, CPU)
    nets = {name: getattr(state, name) for name in ("G_AB", "G_BA", "D_A", "D_B")}
    before = {name: copy.deepcopy(net.state_dict()) for name, net in nets.items()}
    cyclegan.load_generators(state, cfg)
    for name, net in nets.items():
        want = kept[name] if name in (f"G_{way}", D) else before[name]
        assert same(dict(net.state_dict()), dict(want))


def test_copies_of_the_input_are_as_far_both_ways(trained):
    rows = rows_of(trained("cyclegan"))
    ways = [rows[f"{way}: copy of the input"]["rmse"] for way in ("A to B", "B to A")]
    ways.append(rows_of(trained("pix2pix"))["copy of the input"]["rmse"])
    assert ways == pytest.approx(3 * ways[:1]) and ways[0] > 50


@pytest.mark.parametrize("larger", "AB")
def test_unpaired_images_are_measured_as_often_as_the_larger_side_has_them(tmp_path, larger):
    few = "testA/0.png testA/1.png testB/0.png testB/1.png"
    pictures_in(tmp_path, " ".join([few, *(f"test{larger}/{k}.png" for k in range(2, 5))]))
    val = open_data("cyclegan", tmp_path, tmp_path / "cache", "val")
    assert sum(len(a) for a, b in val.in_order(np.arange(5)) if len(a) == len(b)) == 5


def test_the_judge_sees_the_translation(landcover, cache, monkeypatch):
    """And no distance is measured of land cover."""
    cfg, val = LAND_COVER, open_data("cyclegan", landcover, cache, "val")
    judged = calls_of(monkeypatch, cyclegan, "add_judged", lambda *_: None)
    compared = calls_of(monkeypatch, common.Scores, "add_distances")
    state, ((_, lc),) = build(cfg, CPU), val.in_order([0, 1])
    cyclegan.evaluate(state, val, cfg, [0, 1], judge=True)
    assert torch.equal(judged[0][2]["B to A: model"], translate(state, lc, cfg, "BtoA"))
    assert {row for _, row, *_ in compared} == {"B to A: model"}
