"""What every script does around its steps: batches, crops, flips, runs, resuming, using."""

import base64
import copy
import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import common
from files import LABELS, PLACE, TABLE, bands_of, geotiff
from harness import SCRIPTS, is_edit
from pages import in_colours, page_shows, studio_of
from runs import RUNS, last, metrics_of, refused, rows_of, state_of, stop_after, tiny_run, use
from support.checkpoints import state_dict
from support.limits import Limits
from support.pictures import to_bytes
from tensors import CPU, as_rank, batch_of, calls_of, open_data, same, tiny

each_script = pytest.mark.parametrize("script", SCRIPTS)
LEFT_RIGHT = {(0, 0), (1, 0)}
ALL_TURNS = {(0, 0), (1, 0), (0, 1), (1, 1)}

# --------------------------------------------------------------------------------------------- data


@pytest.fixture
def train(script, data, cache):
    """A script's training data."""
    return open_data(script, data[script], cache)


@each_script
def test_batches_follow_from_seed_epoch_and_number(script, train, data, cache):
    first, other_seed = list(train.batches(3)), open_data(script, data[script], cache, seed=1)
    assert len(first) == len(train) // 2
    assert same(list(train.batches(3)), first)
    assert same(list(train.batches(3, first=1)), first[1:])
    assert not same(list(train.batches(4)), first)
    assert not same(list(other_seed.batches(3)), first)


@each_script
def test_ranks_share_an_epoch_without_sharing_an_image(script, train, data, cache, monkeypatch):
    """Two processes with one image each get the two images of one process's batch."""
    single, seen = open_data(script, data[script], cache, batch_size=1), []
    whole = list(train.batches(0))
    for rank in (0, 1):
        as_rank(monkeypatch, rank)
        seen.append(list(single.batches(0)))
    for batch, one, other in zip(whole, *seen, strict=True):
        for field, of_one, of_other in zip(batch, one, other, strict=True):
            assert torch.equal(field, torch.cat([of_one, of_other]))
    assert len(next(common.batches_of_rank(3, 0, np.arange(6)))) == 1
    with refused("x 2 processes: more than"):  # which need twice as many images
        next(common.batches_of_rank(4, 0, np.arange(6)))


@pytest.mark.parametrize("script", ["pix2pix", "cyclegan"])
def test_crops_reach_both_ends(script, train, monkeypatch):
    calls = calls_of(monkeypatch, importlib.import_module(script), "jitter")
    for epoch in range(20):
        list(train.batches(epoch))
    crops = [crop for _, crops, _ in calls for crop in crops]
    top, left, _, _ = zip(*crops, strict=True)
    assert set(top) == set(left) == set(range(9))  # 72 - 64 = 8
    assert len(set(zip(top, left, strict=True))) > 40


# script, --flip: how images are turned; a script's default is auto
FLIPS = {
    "pix2pix auto": LEFT_RIGHT,
    "pix2pix horizontal": LEFT_RIGHT,
    "pix2pix none": {(0, 0)},
    "pix2pix both": ALL_TURNS,
    "cyclegan auto": LEFT_RIGHT,
    "cyclegan none": {(0, 0)},
    "cyclegan auto labels": ALL_TURNS,
    "mixlc auto": ALL_TURNS,
    "mixlc horizontal": LEFT_RIGHT,
    "mixlc_acgan auto": ALL_TURNS,
}


@pytest.mark.parametrize("case", FLIPS)
def test_flips(case, pairs, landcover, cache, monkeypatch):
    """Domains, and the tiles a and b of an edit, are flipped independently of each other."""
    (script, flip, *labels), turns = case.split(), FLIPS[case]
    train = open_data(script, landcover if labels or is_edit(script) else pairs, cache, flip=flip)
    name = "mirror" if is_edit(script) else "jitter"
    calls = calls_of(monkeypatch, importlib.import_module(script), name)
    for epoch in range(30):
        list(train.batches(epoch))
    drawn = [[tuple(crop[-2:]) for crop in crops] for _, crops, *_ in calls]
    assert {turn for batch in drawn for turn in batch} == turns
    if script != "pix2pix":  # the calls come in pairs: A and B, or a and b
        of_a, of_b = sum(drawn[::2], []), sum(drawn[1::2], [])
        assert set(zip(of_a, of_b, strict=True)) == {(a, b) for a in turns for b in turns}


@each_script
def test_crops_and_flips_are_the_same_for_all_channels_of_an_image(script):
    """An image's channels are its rows, its columns, and both again for its partner."""
    y, x = np.mgrid[:72, :72].astype(np.uint8)
    images = torch.from_numpy(np.stack([y, x, y, x])[None].repeat(32, 0))
    plan = np.random.default_rng(0).integers(0, (9, 9, 2, 2), (32, 4)).tolist()
    module = importlib.import_module(script)
    if is_edit(script):
        plan = [[0, 0, flip, upside_down] for _, _, flip, upside_down in plan]
        out, side = module.mirror(images, [crop[2:] for crop in plan]), 72
    else:
        out, side = module.jitter(images, plan, 64), 64
    assert torch.equal(out[:, :2], out[:, 2:])
    for image, (top, left, flip, upside_down) in zip(out.numpy(), plan, strict=True):
        y, x = np.mgrid[top : top + side, left : left + side]
        y, x = (y[::-1] if upside_down else y), (x[:, ::-1] if flip else x)
        assert (image[0] == y).all() and (image[1] == x).all()


@each_script
def test_validation_images_are_whole_unflipped_and_always_the_same(script, data, cache):
    edits = is_edit(script)
    options = {"box": "random", "use_ba": True, "own": 1.0} if edits else {}
    split = "train" if edits else "val"  # with several partners to choose from
    one = open_data(script, data[script], cache, split)
    other = open_data(script, data[script], cache, split, **options, seed=5)
    (batch,) = one.in_order(np.arange(len(one)))
    (again,) = other.in_order(np.arange(len(other)))
    (some,) = other.in_order(np.arange(2))
    assert one.store.side == 64 and same(batch, again)
    if isinstance(batch, torch.Tensor):
        assert (batch.numpy() == one.store.records).all() and torch.equal(some, batch[:2])
    else:
        assert same(list(some), [field[:2] for field in batch])
        assert (to_bytes(batch[0]).numpy() == one.store.records[:, :3]).all()
    assert not edits or (batch.inside.all() and batch.box.tolist() == [[20, 20, 24, 24]] * 4)


@pytest.mark.parametrize("script", ["pix2pix", "cyclegan"])
def test_load_size_and_max_images(script, pairs, cache):
    data = open_data(script, pairs, cache, load_size=80, max_images=4)
    assert data.store.side == 80 and len(data) == 4
    assert [path.stem for path in data.store.split.A] == ["0", "1", "3", "4"]  # of six
    assert next(data.batches(0))[0].shape[-1] == 64
    assert len(open_data(script, pairs, cache, "val", max_images=2)) == 3  # of training alone
    assert open_data(script, pairs, cache, load_size=64).store.side == 64  # the smallest


@pytest.mark.cuda
def test_cuda_rows_resident_and_prefetched_agree():
    array = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
    index, device = np.arange(10).reshape(5, 2), torch.device("cuda")
    resident = list(common.Loader(array, device).batches(index))
    assert same(resident, list(common.Loader(array, device, share=0.0).batches(index)))


# ---------------------------------------------------------------------------------------- translate

NOISE = "pix2pix batch", "mixlc_acgan running", "mixlc_acgan batch"  # dropout, which stays on
QUIET = "cyclegan -", "pix2pix running", "mixlc running", "mixlc batch"


@pytest.mark.parametrize("case", [*NOISE, *QUIET])
def test_translate_follows_the_seed_and_changes_no_network(case):
    """An image does not depend on those beside it: their statistics are not its own."""
    script, policy = case.split()
    module, cfg = tiny(script, **({} if script == "cyclegan" else {"eval_norm": policy}))
    state, batch = module.build(cfg, CPU), batch_of(script, cfg)
    given = tuple(batch[:2]) if is_edit(script) else batch[0]
    first = tuple(x[:1] for x in given) if is_edit(script) else given[:1]
    before = copy.deepcopy(state_dict(state))
    torch.manual_seed(1)
    both, other = (module.translate(state, given, cfg) for _ in range(2))
    torch.manual_seed(1)
    alone = module.translate(state, first, cfg)
    assert torch.equal(both, other) == (case not in NOISE) and not both.requires_grad
    assert case == "mixlc_acgan running" or torch.allclose(alone, both[:1], atol=1e-5)
    assert same(state_dict(state), before)
    assert all(net.training for net in vars(state).values() if isinstance(net, torch.nn.Module))
    if not is_edit(script):
        given[..., :9] = torch.nan  # no data
        assert module.translate(state, given, cfg).isfinite().all()


# --------------------------------------------------------------------------------------------- rate


@pytest.mark.parametrize("script", ["pix2pix", "cyclegan"])
def test_rate_is_constant_then_falls_to_zero(script):
    module = importlib.import_module(script)

    def rates(**options):
        cfg = module.Config(lr=1.0, **options)
        given = [module.State(None)] if script == "pix2pix" else []
        return [module.learning_rate(*given, cfg, epoch) for epoch in range(cfg.epochs)]

    half = rates(epochs=200)
    assert half[:100] == [1.0] * 100
    assert half[100] == pytest.approx(100 / 101) and half[199] == pytest.approx(1 / 101)
    late = rates(epochs=10, epochs_decay=2)
    assert late == pytest.approx([1.0] * 8 + [2 / 3, 1 / 3])
    assert rates(epochs=10, epochs_decay=0) == [1.0] * 10 and rates(epochs=1) == [1.0]
    assert rates(epochs=10, epochs_decay=99) == rates(epochs=10, epochs_decay=10)


# --------------------------------------------------------------------------------------------- runs

EDITED = {"l1_inside", "l1_outside", "l1_to_input", "variety"}
LABELLED = "pixel_accuracy", "class_accuracy", "mean_iou"
JUDGED_BY = {f"{by}_{measure}" for by in ("own", "judge") for measure in LABELLED}
# the losses and scores in metrics.csv; rows that evaluation.json holds at least
COLUMNS = {
    "pix2pix": "g_total,g_adv,g_l1,d_total,d_real,d_fake,val_psnr,val_rmse",
    "cyclegan": "adv_AB,adv_BA,cycle_A,cycle_B,identity_A,identity_B,d_A,d_B,"
    "val_cycle_A,val_rmse_AB,val_rmse_BA",
    "mixlc": "g_total,g_adv,g_l1,g_local,d_total,d_real,d_fake,val_l1_inside,val_l1_outside",
    "mixlc_acgan": "g_adv,g_pixel,g_style,g_class,d_real,d_fake,d_class,"
    "val_l1_inside,val_l1_outside,val_own_mean_iou",
}
ROWS = {
    "pix2pix": "model,copy of the input",
    "cyclegan": "A to B: model,B to A: model,A to B: copy of the input,A to B to A: model,"
    "B to A to B: model",
    "mixlc": "model,copy of rgb_a",
    "mixlc_acgan": "model,copy of rgb_a,photograph b",
}


SCORED = {  # where evaluation.json has the scores of cyclegan's metrics.csv
    "val_cycle_A": ("A to B to A: model", "rmse"),
    "val_rmse_AB": ("A to B: model", "rmse"),
    "val_rmse_BA": ("B to A: model", "rmse"),
}


@pytest.mark.parametrize("script", COLUMNS)
def test_run_folder(script, trained):
    """The last row has the measures of all validation images, whatever the sample grid shows."""
    out = trained(script)
    row, rows, report = metrics_of(out)[-1], rows_of(out), out / "evaluation.json"
    assert ",".join(row) == f"epoch,step,lr,{COLUMNS[script]}"
    for name in (name for name in row if name.startswith("val_")):
        title, measure = SCORED.get(name, ("model", name.removeprefix("val_")))
        assert float(row[name]) == pytest.approx(rows[title][measure], rel=1e-6), name
    lr = tiny(script)[1].lr * (1 if is_edit(script) else 0.5)  # of the second epoch
    kept = last(out)["state"]
    rates = {kept[name]["param_groups"][0]["lr"] for name in kept if name.startswith("opt_")}
    assert {float(row["lr"])} == rates == {lr}  # of all optimizers
    assert set(rows) >= set(ROWS[script].split(","))
    if is_edit(script):
        measures = EDITED | JUDGED_BY if script == "mixlc_acgan" else EDITED
        assert set(rows["model"]) == set(rows["copy of rgb_a"]) == measures
        assert "its input" in json.loads(report.read_text())["answer"]
    if script == "mixlc_acgan":
        assert set(rows["photograph b"]) == JUDGED_BY and (out / "judge.pt").is_file()


@pytest.mark.parametrize(
    ("script", "options", "shared"),
    [
        ("pix2pix", {"norm": "instance", "batch_size": 4}, True),
        ("pix2pix", {"batch_size": 4}, False),
        ("pix2pix", {"batch_size": 1}, True),
        ("cyclegan", LABELS, True),
        ("mixlc", {"batch_size": 1}, True),
        ("mixlc_acgan", {"batch_size": 1}, True),
        ("mixlc_acgan", {"batch_size": 4}, False),
    ],
)
def test_windows_share_statistics_where_images_have_their_own(script, options, shared, monkeypatch):
    """And land cover is blended as probabilities."""
    module, cfg = tiny(script, **options)
    state, name = module.build(cfg, CPU), "edit_file" if is_edit(script) else "translate_files"
    calls = calls_of(monkeypatch, common, name, lambda *_, **__: None)
    module.generate(state, cfg, CPU)
    ((_, predict, net, *_),) = calls
    assert net is ((state.G_AB if script == "cyclegan" else state.G) if shared else None)
    if script == "cyclegan":
        scores = predict(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), whole=False)
        assert torch.allclose(scores.sum(1), torch.ones(1, 64, 64))


@each_script
def test_a_generator_that_does_not_listen_is_told(script, trained, tmp_path, capsys):
    """One that gives the same for every input; for cyclegan, either of the two."""
    checkpoint = last(trained(script))
    for name in ("G", "G_AB"):
        for weights in checkpoint["state"].get(name, {}).values():
            weights.zero_()
    torch.save(checkpoint, tmp_path / "deaf.pt")
    module, out = importlib.import_module(script), tmp_path / "out"
    module.main(f"--evaluate --checkpoint {tmp_path}/deaf.pt --out {out}".split())
    title = "A to B: model" if script == "cyclegan" else "model"
    said = f"{title} ignores its input: its outputs hardly differ (0.0% of the targets' difference)"
    assert said in capsys.readouterr().out and rows_of(out)[title]["variety"] == 0


def test_a_model_listens_where_its_outputs_differ_by_a_share_of_015(tmp_path, capsys):
    shares = {"a model": 0.14, "b model": 0.16, "copy of the input": 0.1}
    rows = {title: {"variety": share} for title, share in shares.items()}
    common.write_evaluation(tiny("pix2pix", out=str(tmp_path))[1], rows)
    said = capsys.readouterr().out
    assert said.count("ignores its input") == 1 and "a model ignores its input" in said


@pytest.mark.parametrize(
    "case", ["pix2pix 4 1", "cyclegan 4 1", "mixlc 2 2", "mixlc 3 1", "mixlc_acgan 3 1"]
)
def test_resume_is_exact(case, data, trained, tmp_path, monkeypatch):
    """Stopped in the middle of the second epoch, or (mixlc) at the last step of the first."""
    script, steps, batch = case.split()
    main, out = importlib.import_module(script).main, tmp_path / "run"
    seeds = calls_of(monkeypatch, common, "seed_step")
    stop_after(int(steps), main, tiny_run(script, data[script], out, RUNS[script]), monkeypatch)
    assert last(out)["batch"] == int(batch)
    assert (out / "index.html").is_file() and (out / "losses.png").is_file()
    main(f"--resume --out {out}".split())
    half = len(seeds) // 2
    assert seeds == [(0, epoch, k) for epoch in (0, 1) for k in range(half)]  # one for each step
    assert same(last(out)["state"], last(trained(script))["state"])
    whole = trained(script) / "metrics.csv"
    assert (out / "metrics.csv").read_text() == whole.read_text()
    assert all(state_of(path)["batch"] == 0 for path in out.glob("checkpoints/epoch_*.pt"))


@each_script
def test_evaluation_repeats_with_the_kept_judge(script, trained, data, tmp_path, monkeypatch):
    """And measures all images of the split that is asked for."""
    first, main = rows_of(trained(script)), importlib.import_module(script).main
    main(use(trained(script), "--evaluate"))
    assert rows_of(trained(script)) == first
    root = shutil.copytree(data[script], tmp_path / "data")
    (root / "train").rename(root / "test")
    calls = calls_of(monkeypatch, importlib.import_module(script), "evaluate")
    more = f"--data {root} --out {tmp_path}/out --val-images 2"  # these are for every epoch
    main(use(trained(script), "--evaluate --split test", more))
    ((_, _, _, images, *_),) = calls
    assert images.tolist() == list(range(4 if is_edit(script) else 6))
    about = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert about["split"] == "test" and about["images"] == len(images)
    assert about["checkpoint"].endswith("checkpoints/last.pt")
    kept = json.loads((trained(script) / "evaluation.json").read_text())
    assert about["judge"] == kept["judge"]  # the run's own, though the results lie elsewhere
    if kept["judge"]:
        other = torch.load(trained(script) / "judge.pt")
        next(iter(other["state"]["judge"].values())).add_(1)
        (tmp_path / "new").mkdir()
        torch.save(other, tmp_path / "new" / "judge.pt")
        main(use(trained(script), "--evaluate", f"--out {tmp_path}/new"))
        about = json.loads((tmp_path / "new" / "evaluation.json").read_text())
        assert about["judge"] not in ("", kept["judge"])  # the one that lies there
        shutil.copytree(tmp_path / "new", tmp_path / "runs" / "x")
        shutil.copy(trained(script) / "checkpoints" / "last.pt", tmp_path / "x.pt")
        monkeypatch.chdir(tmp_path)
        main(["--evaluate", "--checkpoint", "x.pt", "--out", "other", "--device", "cpu"])
        assert (
            json.loads((tmp_path / "other" / "evaluation.json").read_text())["judge"] == ""
        )  # not runs/x


@pytest.mark.parametrize("script", ["mixlc", "mixlc_acgan"])
def test_show_samples_writes_a_picture_and_does_not_train(script, landcover, tmp_path, monkeypatch):
    """And leaves the folder, --out or runs/script, to a training. It needs no whole batch."""
    module = importlib.import_module(script)
    many = "--show-samples 9 --box center --batch-size 9 --use-ba"
    module.main(tiny_run(script, landcover, tmp_path / "show", many))
    assert [path.name for path in (tmp_path / "show").glob("[!.]*")] == ["samples.png"]
    sheet = np.asarray(Image.open(tmp_path / "show" / "samples.png"))
    assert sheet.shape == (16 + 9 * 68, 4 + 6 * 68, 3)
    target = sheet[16 : 16 + 64, 4 + 5 * 68 : 4 + 5 * 68 + 64]
    assert (target[19, 19:45] == 255).all()  # the frame of the box at 20..43
    assert (target[18, 18] != 255).any()
    monkeypatch.chdir(tmp_path)
    about = f"--data {landcover} --cache c --size 64 --width 2 --batch-size 2 --device cpu"
    module.main([*about.split(), "--show-samples", "1"])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [f"{script}-samples"]
    common.begin(module.Config, "", {}, tiny_run(script, landcover, tmp_path / "show"))


# ------------------------------------------------------------------------------------------- bands

MANY = {  # options, the type of the files, the number of bands of a result
    "pix2pix": ("--direction AtoB --bands-A 6,5,4,3,2,1 --bands-B 2", "uint8", 1),
    "cyclegan": ("--bands-A 5,1 --bands-B 1,2,3,4", "uint16", 4),
    "mixlc": ("--bands-A 4,3,2,6,1", "uint16", 5),
    "mixlc_acgan": ("--bands-A 6,2", "uint8", 2),
}


@pytest.mark.parametrize("script", MANY)
def test_networks_of_other_bands_and_depths(script, tmp_path, monkeypatch):
    """Trained, measured, used, on the page too; results have the bands of B, or the photograph."""
    root, edits, (options, dtype, count) = tmp_path / "data", is_edit(script), MANY[script]
    folders = ("rgb", "lc") if edits else ("A", "B")
    for k in range(6):
        most, split = 256 if dtype == "uint8" else 5000, "val" if k > 3 else "train"
        a = np.random.default_rng(k).integers(0, most, (64, 64, 6), dtype)
        b = (a[..., 0] % 3).astype(np.uint8) if edits else a[..., :5]
        geotiff(root / split / folders[0] / f"{k}.tif", a)
        geotiff(root / split / folders[1] / f"{k}.tif", b)
    if edits:
        (root / "classes.json").write_text(json.dumps(TABLE))
    module, out = importlib.import_module(script), tmp_path / "run"
    module.main(tiny_run(script, root, out, f"--epochs 1 {options}"))
    photo, result = root / "val" / folders[0] / "5.tif", tmp_path / "new" / "5.tif"
    more = f"--lc {root}/val/lc/5.tif --paint water:0,0,30,30" if edits else ""
    module.main(use(out, f"--generate {photo} {more}", f"--out {tmp_path}/new"))
    with pytest.importorskip("rasterio").open(result) as file:
        assert file.count == count and file.dtypes[0] == dtype
        assert "alpha" not in [color.name for color in file.colorinterp]
        assert file.transform == PLACE["transform"]
    if edits:
        before = bands_of(photo, [int(band) for band in options.split()[-1].split(",")])
        assert (bands_of(result)[40:, 40:] == before[40:, 40:]).all()
    title = "A to B: model" if script == "cyclegan" else "model"
    assert ("rmse_units" in rows_of(out)[title]) == (dtype == "uint16" and not edits)
    files = (root / "val" / "lc" / "5.tif", photo) if edits else (photo,)
    strokes = [(0, 0, 30, 30, bytes([1]) * 900)] if edits else []
    studio = studio_of(module.main, out, monkeypatch)
    shown = page_shows(studio, files, strokes)
    limits = Limits.of(module.Config(**last(out)["config"]), "A" if edits else "B")
    assert (shown == in_colours(result, limits)).all()
    if not edits:  # the colour of land, or nearly: its grey, or without blue
        blank = base64.b64decode(studio.open({"height": 16, "width": 16})["start"])
        assert abs(np.frombuffer(blank, np.uint8).reshape(-1, 3) - [233.0, 229, 222]).max() < 8


def test_one_file_beside_the_other_half_has_bands_of_its_own(pairs, tmp_path):
    """Pairs side by side: each half by its own bands."""
    about = {"data": str(pairs), "cache": str(tmp_path)}
    plain = common.ImageStore(tiny("pix2pix", **about)[1], "train", 64)
    store = common.ImageStore(tiny("pix2pix", bands_A="3,1", bands_B="2", **about)[1], "train", 64)
    assert (plain.A[:, [2, 0]] == store.A).all() and (plain.B[:, [1]] == store.B).all()


@pytest.mark.parametrize(
    ("script", "direction", "sides"),
    [("pix2pix", "AtoB", "B"), ("pix2pix", "BtoA", "A"), ("cyclegan", "AtoB", "AB")],
)
def test_baselines_are_of_the_side_that_is_generated(
    script, direction, sides, pairs, cache, tmp_path, monkeypatch
):
    module, cfg = tiny(script, direction=direction, out=str(tmp_path))
    counts = {"A": torch.ones(3, 256), "B": torch.arange(1, 257).expand(3, -1)}
    counted = calls_of(monkeypatch, common, "constant_colors")
    data = open_data(script, pairs, cache, "val", direction=direction)
    module.report(module.build(cfg, CPU, training=False), data, cfg, counts)
    for (histogram, *_), side in zip(counted, sides, strict=True):
        assert histogram is counts[side]
