"""Layouts and their refusals, label maps, the store, the demo world."""

import dataclasses
import json
import os
import shutil
import types

import numpy as np
import pytest
import torch
from PIL import Image

import common
import pix2pix
from common import ImageStore, UserError
from conftest import TABLE, as_rank, land_cover, picture, save, side_by_side
from pix2pix import Config
from support.classes import ClassTable
from support.demo import DEMO_CLASSES, demo_world, landscape
from support.layouts import find_images
from support.measures import confusion_matrix, measure_images, measure_labels
from support.pictures import as_array, as_tensor, to_bytes
from support.rasters import Raster


def config(root, cache, **options):
    return Config(data=str(root), cache=str(cache), **options)


def stems(paths):
    return [path.stem for path in paths]


# ------------------------------------------------------------------------------------------ layouts


def test_splits_by_name(tmp_path):
    side_by_side(tmp_path, train=2, val=1)
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    assert len(find_images(tmp_path, "val").A) == 1 and len(find_images(tmp_path, "test").A) == 2
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(UserError, match="no layout with images of split test"):
        find_images(tmp_path, "test")


def test_side_by_side(pairs):
    split = find_images(pairs, "train")
    assert (split.layout, split.paired, split.halves) == ("side by side", True, True)
    assert stems(split.A) == ["0", "1", "2", "3", "4", "5"] and split.A == split.B
    assert stems(find_images(pairs, "val").A) == ["0", "1", "2"]


@pytest.mark.parametrize("names", ["AB", "ab"])
def test_two_folders(tmp_path, names):
    for split in ("train", "test"):
        for side in names:
            for stem in ("x", "y"):
                save(
                    tmp_path / split / side / f"{stem}.png",
                    picture(np.random.default_rng(0), 16, 16),
                )
    split = find_images(tmp_path, "train")
    assert (split.layout, split.paired, split.halves, stems(split.A)) == (
        "two folders",
        True,
        False,
        ["x", "y"],
    )
    assert find_images(tmp_path, "val").name == "test"


def test_unaligned(tmp_path):
    for folder, count in (("trainA", 3), ("trainB", 2), ("testA", 1), ("testB", 1)):
        for k in range(count):
            save(tmp_path / folder / f"{k}.jpg", picture(np.random.default_rng(k), 16, 16))
    split = find_images(tmp_path, "train")
    assert (split.layout, split.paired, len(split.A), len(split.B)) == ("unaligned", False, 3, 2)
    store = ImageStore(config(tmp_path, tmp_path / "cache"), "train", 8)
    assert store.A.shape == (3, 3, 8, 8) and store.B.shape == (2, 3, 8, 8) and store.records is None


def test_land_cover(landcover):
    split = find_images(landcover, "train")
    assert (split.layout, split.classes.names) == ("land cover", ("land", "water", "road"))


def test_inria(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("austin1", "austin5", "austin6", "vienna36", "tyrol-w2", "tyrol-w10"):
        save(tmp_path / "train" / "images" / f"{name}.tif", picture(rng, 40, 40))
        save(
            tmp_path / "train" / "gt" / f"{name}.tif",
            (rng.random((40, 40)) < 0.5).astype(np.uint8) * 255,
        )
    train, val = find_images(tmp_path, "train"), find_images(tmp_path, "val")
    assert stems(train.A) == ["austin6", "tyrol-w10", "vienna36"] and train.layout == "Inria"
    assert stems(val.A) == ["austin1", "austin5", "tyrol-w2"]
    store = ImageStore(config(tmp_path, tmp_path / "cache", patch=20), "train", 20)
    assert store.records.shape == (12, 4, 20, 20) and set(np.unique(store.B)) == {0, 1}


def test_classes_turn_any_layout_into_label_maps(pairs, tmp_path):
    split = find_images(pairs, "train", "maps")
    assert split.classes.names[4] == "water" and split.halves


def test_refuses_directories_with_one_line_that_helps(tmp_path, pairs):
    with pytest.raises(UserError, match="no such directory"):
        find_images(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="side by side.*two folders.*unaligned.*land cover.*Inria"):
        find_images(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="no layout"):
        find_images(tmp_path, "train")
    shutil.copytree(pairs / "train", tmp_path / "lone" / "train")
    with pytest.raises(UserError, match="no layout with images of split val"):
        find_images(tmp_path / "lone", "val")
    for side in "AB":
        (tmp_path / "empty" / "train" / side).mkdir(parents=True)
    with pytest.raises(UserError, match="no images"):
        find_images(tmp_path / "empty", "train")


def test_refuses_lists_that_do_not_match(tmp_path):
    for side, names in (("A", "xyz"), ("B", "xz")):
        for name in names:
            save(tmp_path / "train" / side / f"{name}.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(
        UserError, match="3 images on one side, 2 on the other.*y.png has no partner"
    ):
        find_images(tmp_path, "train")


def test_refuses_label_maps_without_a_class_table(tmp_path):
    root = land_cover(tmp_path)
    (root / "classes.json").unlink()
    with pytest.raises(UserError, match="--lc-classes"):
        find_images(root, "train")


# --------------------------------------------------------------------------------------- label maps


@pytest.fixture
def table():
    return ClassTable.load(json.dumps(TABLE))


INDEX = np.array([[0, 1, 2, 0, 1], [2, 255, 1, 0, 0]], np.uint8)
CODES = np.array(
    [[0, 1, 2, 0, 1], [2, 3, 1, 0, 0]], np.uint8
)  # 3 is the row of the table that is ignored


def colours(table, index):
    return table.palette[index]


@pytest.mark.parametrize(
    "kind", ["indices", "colours", "palette", "stray", "one-hot", "channels first", "npy"]
)
def test_label_formats(tmp_path, table, kind):
    path = tmp_path / (
        "x.npz" if "hot" in kind or "first" in kind else "x.npy" if kind == "npy" else "x.png"
    )
    if kind == "indices":
        save(path, CODES)
    elif kind in ("colours", "stray"):
        rgb = colours(table, INDEX).copy()
        if kind == "stray":
            rgb[1, 1] = (0x84, 0x29, 0xF0)  # near the first class, but not it
        save(path, rgb)
    elif kind == "palette":  # colours, stored in an order of their own
        image = Image.fromarray(colours(table, INDEX)).quantize(8)
        image.save(path)
    elif kind == "npy":
        np.save(path, CODES.astype(np.int64))
    else:
        one_hot = (INDEX[..., None] == np.arange(3)).astype(np.float32)
        np.savez(path, one_hot if kind == "one-hot" else np.moveaxis(one_hot, -1, 0))
    assert (Raster(path, table).read() == INDEX).all()


def test_palette_image_of_indices_with_another_palette(tmp_path, table):
    image = Image.fromarray(CODES).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 1, 1, 1])
    image.save(tmp_path / "x.png")
    assert (Raster(tmp_path / "x.png", table).read() == INDEX).all()


def test_s2glc_codes(tmp_path):
    table = ClassTable.load("s2glc")
    assert len(table) == 14 and table.names[13] == "Water bodies"
    save(tmp_path / "codes.png", np.array([[0, 62, 162, 255]], np.uint8))
    assert Raster(tmp_path / "codes.png", table).read().tolist() == [[0, 1, 13, 255]]


def test_codes_that_could_be_mistaken_for_positions_are_never_taken_for_them(tmp_path):
    rows = [
        {"name": n, "color": f"{k},0,0", "value": k}
        for k, n in enumerate(("land", "water", "forest"), 1)
    ]
    table = ClassTable.load(json.dumps(rows))
    save(tmp_path / "good.png", np.array([[1, 2, 3, 255]], np.uint8))
    assert Raster(tmp_path / "good.png", table).read().tolist() == [[0, 1, 2, 255]]
    save(tmp_path / "stray.png", np.array([[0, 1, 2]], np.uint8))
    with pytest.raises(UserError, match=r"\[0\] are outside"):
        Raster(tmp_path / "stray.png", table).read()


def test_binary_masks(tmp_path):
    table = ClassTable.load("binary")
    save(tmp_path / "grey.png", np.array([[0, 255, 255]], np.uint8))
    Image.fromarray(np.array([[False, True, True]])).save(tmp_path / "one_bit.png")
    for name in ("grey", "one_bit"):
        assert Raster(tmp_path / f"{name}.png", table).read().tolist() == [[0, 1, 1]]


def test_maps_colours_survive_jpeg(tmp_path):
    table = ClassTable.load("maps")
    index = np.repeat(np.repeat(np.array([[0, 4], [5, 3]], np.uint8), 24, 0), 24, 1)
    save(tmp_path / "x.jpg", table.palette[index], quality=80)
    assert (Raster(tmp_path / "x.jpg", table).read() == index).mean() > 0.95


def test_refuses_labels_outside_the_table(tmp_path, table):
    save(tmp_path / "x.png", np.array([[0, 77]], np.uint8))
    with pytest.raises(UserError, match=r"x.png: label values \[77\] are outside the class table"):
        Raster(tmp_path / "x.png", table).read()
    save(tmp_path / "y.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match="hardly a pixel has a colour of the class table"):
        Raster(tmp_path / "y.png", table).read()


@pytest.mark.parametrize(
    "text",
    ["[]", '[{"name": "x"}]', "{", '[{"name": "x", "color": "#12"}]', json.dumps(TABLE[:1] * 2)],
)
def test_refuses_bad_class_tables(tmp_path, text):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(UserError, match="class table"):
        ClassTable.load(str(tmp_path / "classes.json"))


def test_class_table_round_trip(table):
    assert ClassTable.load(table.text) == table
    assert ClassTable.load(ClassTable.load("maps").text) == ClassTable.load("maps")
    assert ClassTable.load("") is None


# ---------------------------------------------------------------------------------------- the store


def test_store_holds_the_resized_images(pairs, tmp_path):
    store = ImageStore(config(pairs, tmp_path), "train", 40)
    both = Image.open(pairs / "train" / "3.png")
    a = np.asarray(both.crop((0, 0, 80, 80)).resize((40, 40), Image.Resampling.BICUBIC))
    assert (store.A[3].transpose(1, 2, 0) == a).all() and store.records.shape == (6, 6, 40, 40)
    assert np.shares_memory(store.A, store.records)


def test_patches(pairs, tmp_path):
    store = ImageStore(config(pairs, tmp_path, patch=32), "train", 32)
    both = np.asarray(Image.open(pairs / "train" / "0.png"))
    assert len(store.A) == 6 * 4  # what does not fill a patch is left out
    assert (store.A[1].transpose(1, 2, 0) == both[:32, 32:64]).all()
    assert (store.B[2].transpose(1, 2, 0) == both[32:64, 80:112]).all()
    with pytest.raises(UserError, match="--patch 81"):
        ImageStore(config(pairs, tmp_path, patch=81), "train", 32)


def test_images_smaller_than_a_patch_are_left_out(tmp_path):
    root = side_by_side(tmp_path / "data")
    save(root / "train" / "small.png", np.zeros((20, 40, 3), np.uint8))
    assert len(ImageStore(config(root, tmp_path / "cache", patch=40), "train", 32).A) == 6 * 4


def test_maps_patch_count(tmp_path):
    """256 on the 600x600 halves of the maps data: 4 patches, so 1096 images give 4384."""
    save(tmp_path / "train" / "1.jpg", np.zeros((600, 1200, 3), np.uint8))
    assert len(ImageStore(config(tmp_path, tmp_path / "cache", patch=256), "train", 64).A) == 4


def test_labels_are_resized_with_nearest_only(landcover, tmp_path):
    store = ImageStore(config(landcover, tmp_path), "train", 50)
    assert store.B.shape == (4, 1, 50, 50) and set(np.unique(store.B)) == {0, 1, 2, 255}


def store_files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_store_is_reused_and_invalidated(tmp_path, monkeypatch):
    root, cache = side_by_side(tmp_path / "data"), tmp_path / "cache"
    ImageStore(config(root, cache), "train", 32)
    first = store_files(cache)
    with monkeypatch.context() as patch:
        patch.setattr(Raster, "read", lambda *_, **__: pytest.fail("decoded again"))
        ImageStore(config(root, cache), "train", 32)
    assert store_files(cache) == first
    ImageStore(config(root, cache), "train", 40)
    assert len(store_files(cache)) == 2  # another size, another file
    os.utime(root / "train" / "0.png", (1, 1))
    ImageStore(config(root, cache), "train", 32)
    assert len(store_files(cache)) == 3  # another time
    (root / "train" / "5.png").unlink()
    assert len(ImageStore(config(root, cache), "train", 32).A) == 5


def test_store_appears_whole_or_not_at_all(tmp_path):
    root, cache = side_by_side(tmp_path / "data", suffix=".jpg"), tmp_path / "cache"
    broken = root / "train" / "4.jpg"
    broken.write_bytes(broken.read_bytes()[:1200])
    with pytest.raises(UserError, match=r"4.jpg: cannot be decoded .*truncated"):
        ImageStore(config(root, cache), "train", 32)
    assert store_files(cache) == []


def test_refuses_what_does_not_fit(tmp_path):
    root = side_by_side(tmp_path / "a")
    save(root / "train" / "2.png", np.zeros((80, 100, 3), np.uint8))
    with pytest.raises(UserError, match="2.png: 100x80 is no pair side by side"):
        ImageStore(config(root, tmp_path / "cache"), "train", 32)
    root = land_cover(tmp_path / "b")
    save(root / "train" / "lc" / "1.png", np.zeros((80, 79), np.uint8))
    with pytest.raises(UserError, match="1.jpg is 80x80 but .*1.png is 79x80"):
        ImageStore(config(root, tmp_path / "cache"), "train", 32)
    (root / "train" / "rgb" / "0.jpg").write_text("no image")
    with pytest.raises(UserError, match="0.jpg: cannot be decoded"):
        ImageStore(config(root, tmp_path / "cache"), "train", 32)


def test_refuses_pictures_of_more_than_eight_bits(tmp_path):
    root = side_by_side(tmp_path / "a")
    save(root / "train" / "2.png", np.full((80, 160), 40_000, np.uint16))
    with pytest.raises(UserError, match="2.png: has more than 8 bits"):
        ImageStore(config(root, tmp_path / "cache"), "train", 32)


def test_conversions_are_said_once(tmp_path, capsys):
    for k in range(2):
        Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / f"{k}.jpg", quality=95)
        assert abs(Raster(tmp_path / f"{k}.jpg").read().astype(int) - (255, 0, 0)).max() < 8
    assert capsys.readouterr().err.count("CMYK: converted to RGB") == 1


def test_says_how_much_has_no_class_and_refuses_maps_without_any(tmp_path, capsys):
    root = tmp_path / "data"
    rows = [{"name": "ground", "color": "0,0,0"}, {"name": "building", "color": "255,255,255"}]
    for split in ("train", "val"):  # a mask of 0 and 255 under a table whose values are 0 and 1
        mask = np.zeros((40, 40), np.uint8)
        mask[:10] = 255
        save(root / split / "rgb" / "1.png", np.zeros((40, 40, 3), np.uint8))
        save(root / split / "lc" / "1.png", mask if split == "train" else mask * 0 + 255)
    (root / "classes.json").write_bytes(
        b"\xef\xbb\xbf" + json.dumps(rows).encode()
    )  # as some editors write it
    ImageStore(config(root, tmp_path / "cache"), "train", 40)
    assert "2 classes, 25% of the pixels ignored" in capsys.readouterr().err
    with pytest.raises(UserError, match="split val: no pixel has a class"):
        ImageStore(config(root, tmp_path / "cache"), "val", 40)


def test_refuses_fractions_as_class_indices(tmp_path, table):
    np.save(tmp_path / "lc.npy", np.full((4, 4), 0.7))
    with pytest.raises(UserError, match="fractions"):
        Raster(tmp_path / "lc.npy", table).read()
    np.save(tmp_path / "lc.npy", np.full((4, 4), 1.0))
    assert (Raster(tmp_path / "lc.npy", table).read() == 1).all()


def test_a_damaged_store_is_built_again(tmp_path):
    root, cache = side_by_side(tmp_path / "data"), tmp_path / "cache"
    whole = np.array(ImageStore(config(root, cache), "train", 32).records)
    file = store_files(cache)[0]
    content = (cache / file).read_bytes()
    for damaged in (content[:-1], content + b"x", content[:9] + b"?" + content[10:], b""):
        (cache / file).write_bytes(damaged)
        assert (ImageStore(config(root, cache), "train", 32).records == whole).all()
    assert (cache / file).read_bytes() == content


def test_two_datasets_of_equal_names_sizes_and_times_have_two_stores(tmp_path):
    for name, level in (("a", 10), ("b", 200)):
        for split in ("train", "val"):
            save(tmp_path / name / split / "1.bmp", np.full((40, 80, 3), level, np.uint8))
            os.utime(tmp_path / name / split / "1.bmp", (1, 1))
    stores = [
        ImageStore(config(tmp_path / name, tmp_path / "cache"), "train", 32) for name in ("a", "b")
    ]
    assert [store.A.max() for store in stores] == [10, 200]


def test_a_full_disk_is_one_line(tmp_path, pairs, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SystemExit) as stopped:
        common.command(lambda argv: ImageStore(config(pairs, tmp_path), "train", 32))()
    assert stopped.value.code == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert store_files(tmp_path) == []


def test_rows_gather(pairs, tmp_path):
    store = ImageStore(config(pairs, tmp_path), "train", 32)
    index = np.array([[3, 1], [0, 5]])
    batches = list(common.Loader(store.records, torch.device("cpu")).batches(index))
    assert all(
        (np.stack(batch) == store.records[rows]).all()
        for batch, rows in zip(batches, index, strict=True)
    )


def test_prefetching_yields_the_same_batches_and_ends_its_thread(pairs, tmp_path, monkeypatch):
    """The background thread, with pinning (which needs a GPU) left out."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    rows = common.Loader(
        ImageStore(config(pairs, tmp_path), "train", 32).records, torch.device("cpu")
    )
    index = np.arange(6).repeat(4).reshape(12, 2)
    for one, other in zip(rows._prefetched(index), rows.batches(index), strict=True):
        assert torch.equal(torch.stack(one), torch.stack(other))
    half = rows._prefetched(index)
    next(half)
    half.close()  # ends the thread although it waits to put the next batch
    with pytest.raises(IndexError):
        list(rows._prefetched(np.array([[0, 99]])))


# --------------------------------------------------------------------------------------- demo world


def test_demo_world(tmp_path):
    root = demo_world(tmp_path, "maps", train=2, val=1, side=64)
    assert find_images(root, "train").halves and len(find_images(root, "val").A) == 1
    before = (tmp_path / "demo-maps" / "train" / "000.png").stat().st_mtime_ns
    demo_world(tmp_path, "maps", train=2, val=1, side=64)
    assert (tmp_path / "demo-maps" / "train" / "000.png").stat().st_mtime_ns == before
    root = demo_world(tmp_path, "landcover", train=2, val=1, side=64)
    store = ImageStore(config(root, tmp_path / "cache"), "train", 64)
    assert store.classes.names == DEMO_CLASSES and store.B.max() < len(DEMO_CLASSES)


def test_demo_map_half_is_made_of_map_colours(tmp_path):
    satellite, drawn, ground = landscape(np.random.default_rng(0), 96)
    colors = {tuple(c) for c in drawn.reshape(-1, 3).tolist()}
    assert (
        colors <= set(ClassTable.load("maps").colors)
        and satellite.std() > 20
        and len(np.unique(ground)) >= 4
    )


# ----------------------------------------------------------------------------------------- measures


def test_image_measures_by_hand():
    target = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    fake = target.clone()
    fake[:, 0, :, :8] += 6  # one channel of half of the pixels is 6 levels off
    measured = {name: value.item() for name, value in measure_images(fake, target).items()}
    assert measured["mse"] == pytest.approx(36 / 6)
    assert measured["psnr"] == pytest.approx(10 * np.log10(255**2 / 6))
    assert (measured["accuracy_5"], measured["accuracy_10"]) == (0.5, 1.0)
    assert measured["rmse_rgb"] == pytest.approx(np.sqrt(36 / 2))
    same = measure_images(target, target)
    assert same["ssim"].item() == pytest.approx(1.0) and same["accuracy_5"].item() == 1.0


def test_accuracies_are_strict_and_rmse_rgb_sums_over_channels():
    """A pixel 5 levels off is not within 5; (3, 4, 0) off everywhere is 5 off in all."""
    target = torch.zeros((1, 3, 16, 16), dtype=torch.uint8)
    for off, five, ten in ((4, 1, 1), (5, 0, 1), (9, 0, 1), (10, 0, 0)):
        measured = measure_images(target + off, target)
        assert (measured["accuracy_5"].item(), measured["accuracy_10"].item()) == (five, ten)
    fake = target + torch.tensor([3, 4, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    assert measure_images(fake, target)["rmse_rgb"].item() == pytest.approx(5)


def test_ssim_of_constants_by_hand():
    a, b = (torch.full((1, 3, 16, 16), v, dtype=torch.uint8) for v in (50, 100))
    c1 = (0.01 * 255) ** 2
    want = (2 * 50 * 100 + c1) / (50**2 + 100**2 + c1)
    assert measure_images(a, b)["ssim"].item() == pytest.approx(want, rel=1e-6)


def test_scores_are_means_over_images_and_rmse_the_root_of_the_mean():
    """Three images, off by 2, 0 and 4 levels everywhere, in batches of two and one."""
    target, scores = torch.zeros(3, 3, 16, 16), common.Scores()
    guess = target + torch.tensor([2.0, 0.0, 4.0]).view(3, 1, 1, 1) / 127.5
    for part in (slice(0, 2), slice(2, 3)):
        scores.add_images("model", guess[part], target[part])
    row = scores.table()["model"]
    assert row["rmse"] == pytest.approx(np.sqrt((4 + 0 + 16) / 3))
    assert row["rmse_rgb"] == pytest.approx(np.sqrt(3) * (2 + 0 + 4) / 3)  # the mean over images
    assert row["accuracy_5"] == 1.0 and row["accuracy_10"] == 1.0


def test_scores_of_edits_by_hand():
    """10 levels off in a box of 4 x 8, 1 off elsewhere; the second image has no edit at all."""
    mask = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    mask[0, :, :4, :8] = True
    target, scores = common.from_bytes(torch.full((2, 3, 16, 16), 128)), common.Scores()
    guess = target + torch.where(mask, 10.0, 1.0) / 127.5
    scores.add_edit("model", guess, target, target + 4 / 127.5, mask)
    row = scores.table()["model"]
    assert (row["l1_inside"], row["l1_outside"], row["l1_to_input"]) == (10.0, 1.0, 6.0)
    assert row["psnr_inside"] == pytest.approx(10 * np.log10(255**2 / 100))
    assert row["psnr_outside"] == pytest.approx(10 * np.log10(255**2))


def test_label_measures_by_hand():
    target = torch.tensor([0, 0, 0, 1, 1, 255])
    predicted = torch.tensor([0, 0, 1, 1, 1, 0])
    confusion = confusion_matrix(predicted, target, 3)
    assert confusion.tolist() == [[2, 1, 0], [0, 2, 0], [0, 0, 0]]
    measured = measure_labels(confusion)
    assert measured["pixel_accuracy"] == pytest.approx(4 / 5)
    assert measured["class_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert measured["mean_iou"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_constant_guesses():
    images = np.zeros((2, 3, 4, 4), np.uint8)
    images[0, 0], images[1, 1, :1] = 200, 80
    store = types.SimpleNamespace(A=images, B=images, paired=True, classes=None)
    counts = ImageStore.histograms(store)["A"]
    guesses = common.constant_colors(counts)
    bytes_of = {name: to_bytes(color).tolist() for name, color in guesses.items()}
    assert bytes_of == {"mean training colour": [100, 10, 0], "median training colour": [0, 0, 0]}
    table = ClassTable.load(json.dumps(TABLE))
    labels = np.array([0, 1, 1, 2, 1, 255, 255, 255, 255], np.uint8).reshape(1, 1, 3, 3)
    counts = torch.from_numpy(np.bincount(labels.ravel(), minlength=256)[None])
    frequent = to_bytes(common.constant_colors(counts, table)["most frequent class"])
    assert tuple(frequent.tolist()) == table.colors[1]
    drawn = torch.tensor(table.colors[2]).view(1, 3, 1, 1)
    assert pix2pix.nearest_class(common.from_bytes(drawn), table).item() == 2


def test_colours_of_the_classes():
    """By hand: what each class looked like; all pixels' colour for classes that were not seen."""
    table = ClassTable.load(json.dumps(TABLE))
    labels = np.array([[0, 0, 0, 1], [1, 1, 1, 255]], np.uint8).reshape(2, 1, 2, 2)
    images = np.zeros((2, 3, 2, 2), np.uint8)
    images[0, 0] = [[10, 20], [90, 200]]  # red, of the first image: three of class 0, one of 1
    images[1, 1] = [[4, 4], [4, 80]]  # green, of the second: three of class 1, one ignored
    store = types.SimpleNamespace(A=images, B=labels, paired=True, classes=table)
    counts = ImageStore.histograms(store)
    assert counts["A of classes"].shape == (3, 3, 256) and counts["A of classes"].sum() == 7 * 3
    colors = common.constant_colors(counts["A"], by_class=counts["A of classes"])
    levels = {name: (color + 1) * 127.5 for name, color in colors.items()}
    everywhere = [320 / 8, 92 / 8, 0.0]
    assert levels["mean training colour"].tolist() == pytest.approx(everywhere, abs=1e-3)
    mean, median = levels["mean colour of the class"], levels["median colour of the class"]
    assert mean[0].tolist() == pytest.approx([40, 0, 0], abs=1e-3)
    assert mean[1].tolist() == pytest.approx([50, 3, 0], abs=1e-3)
    assert mean[2].tolist() == mean[255].tolist() == pytest.approx(everywhere, abs=1e-3)
    assert median[0].tolist() == pytest.approx([20, 0, 0], abs=1e-3)
    assert median[1].tolist() == pytest.approx([0, 4, 0], abs=1e-3)
    shown = common.constant_guesses(colors, torch.zeros(2, 3, 2, 2), torch.from_numpy(labels[:, 0]))
    mean = to_bytes(shown["mean colour of the class"])
    assert mean[:, 0].tolist() == [[[40, 40], [40, 50]], [[50, 50], [50, 40]]]
    assert (to_bytes(shown["mean training colour"])[:, 0] == 40).all()


def test_bytes_and_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(common.from_bytes(levels)), levels)
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert (as_array(common.from_bytes(as_tensor(picture, "cpu"))) == picture).all()
    assert common.from_bytes(as_tensor(picture, "cpu")).is_contiguous()
    assert to_bytes(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_ranks_get_disjoint_rows(monkeypatch):
    order = np.random.default_rng(0).permutation(11)
    rows = []
    for rank in range(2):
        as_rank(monkeypatch, rank)
        rows.append(next(common.batches_of_rank(2, 0, order)))
    assert rows[0].shape == (2, 2) and len(set(np.concatenate(rows).ravel().tolist())) == 8
    with pytest.raises(UserError, match="--batch-size 6"):
        next(common.batches_of_rank(6, 0, order))


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().size = 3


def palette_file(path, codes, colors, how):
    """A paletted PNG or TIFF of these codes; colors {code: "#rrggbb"}."""
    palette = np.zeros((256, 3), np.uint8)
    for code, color in colors.items():
        palette[code] = tuple(bytes.fromhex(color[1:]))
    image = Image.fromarray(codes)
    image.putpalette(palette.tobytes())
    image.save(path.with_suffix(how))
    return path.with_suffix(how)


@pytest.mark.parametrize("how", [".png", ".tif"])
def test_codes_or_colours_of_a_palette(tmp_path, how):
    """Values that a table names decide, whatever the colours; else most of the colours."""
    codes = np.array([[1, 2, 3, 4]], np.uint8)
    rows = [{"name": f"n{k}", "color": f"#{40 * k:02x}0000"} for k in range(1, 5)]
    valued = ClassTable.load(json.dumps([row | {"value": k} for k, row in enumerate(rows, 1)]))
    colors = {k: row["color"] for k, row in enumerate(rows, 1)}
    reds = colors | {4: "#f00000"}  # another red than the table's
    twins = colors | {4: colors[3]}  # two codes that share a colour
    for name, shown in (("reds", reds), ("twins", twins)):
        file = palette_file(tmp_path / name, codes, shown, how)
        assert Raster(file, valued).read().tolist() == [[0, 1, 2, 3]], name
    order = {1: colors[4], 2: colors[3], 3: colors[2], 4: colors[1]}  # codes that mean nothing
    file = palette_file(tmp_path / "order", codes, order, how)
    assert Raster(file, ClassTable.load(json.dumps(rows))).read().tolist() == [[3, 2, 1, 0]]
    far = ClassTable.load(json.dumps([row | {"value": k} for k, row in enumerate(rows, 50)]))
    assert Raster(file, far).read().tolist() == [[3, 2, 1, 0]]  # none of its values occurs
