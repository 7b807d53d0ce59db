"""weights/: every file loads, generates, and beats constant colours on a kept validation image."""

import export_weights
import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image

import cyclegan
import mixlc
import pix2pix
from runs import line_of
from support.checkpoints import load_weights
from support.judge import Judge
from support.measures import constant_colors

KEPT = {  # file: the kept run that it is of
    "cyclegan-maps": "cyclegan-maps",
    "editor-dubai": "mixlc-dubai",
    "map-to-satellite": "pix2pix-map-to-satellite-256",
    "satellite-to-map": "pix2pix-satellite-to-map-256",
}
WAYS = [  # file, script, side of its grid's pictures, columns of input and target, options, least
    ("cyclegan-maps", cyclegan, 128, 0, 3, "--direction AtoB", 0.08),
    ("cyclegan-maps", cyclegan, 128, 3, 0, "--direction BtoA", 0.2),
    ("map-to-satellite", pix2pix, 256, 0, 2, "", 0.25),
    ("satellite-to-map", pix2pix, 256, 0, 2, "", 0.25),
]


def test_every_file_has_a_card_and_all_are_small():
    files = sorted((ROOT / "weights").glob("*.pt"))
    assert {file.stem for file in files} == {*KEPT, "judge-dubai"}
    assert sum(file.stat().st_size for file in files) < 80e6
    text = (ROOT / "weights" / "README.md").read_text()
    assert all(file.name in text for file in files)


def translated(way, folder):
    """(made, targets), (6, side, side, 3) uint8, for the inputs of the run's grid of six rows."""
    name, script, side, *columns, options, _ = way
    grid, targets = np.asarray(Image.open(ROOT / f"docs/results/{KEPT[name]}/grid.jpg")), []
    for row in range(6):
        strip = grid[16 + (side + 4) * row :][:side]
        source, target = (strip[:, 4 + (side + 4) * k :][:, :side] for k in columns)
        Image.fromarray(source).save(folder / f"{row}.png")
        targets.append(target)
    use = f"--generate {folder} --checkpoint {ROOT}/weights/{name}.pt --out {folder}/out {options}"
    script.main([*use.split(), "--device", "cpu"])
    made = [np.asarray(Image.open(folder / "out" / f"{row}.png")) for row in range(6)]
    return np.stack(made), np.stack(targets)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0]} {way[-2]}")
def test_weights_follow_their_input(tmp_path, way):
    """Grey levels correlate with the target's, which no constant does, and not with another's."""
    made, targets = (x.mean(-1).reshape(6, -1) for x in translated(way, tmp_path))
    correlation = np.corrcoef(made, targets)[:6, 6:]
    assert correlation.diagonal().mean() > way[-1]
    assert np.roll(correlation, 1, 0).diagonal().mean() < way[-1] / 2


@pytest.mark.slow
def test_maps_beat_every_constant_colour(tmp_path):
    """More of their pixels lie within 10 levels of the target's, in every channel."""
    made, targets = (x.astype(float) for x in translated(WAYS[-1], tmp_path))
    histogram = load_weights(ROOT / "weights" / "satellite-to-map.pt")["histograms"]["B"]
    constants = [(color.numpy() + 1) * 127.5 for color in constant_colors(histogram).values()]
    right, *others = ((abs(x - targets) < 10).all(-1).mean() for x in (made, *constants))
    assert right > 1.05 * max(others)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "index"), [("road", 2), ("vegetation", 3)])
def test_a_judge_sees_what_the_editor_was_asked_for(tmp_path, name, index):
    """In the middle of six photographs of the grid, side by side."""
    grid = np.asarray(Image.open(ROOT / "docs/results/mixlc-dubai/grid.jpg"))
    photos = np.concatenate([grid[16 + 132 * k :][:128, 400:528] for k in range(6)], 1)
    Image.fromarray(photos).save(tmp_path / "photo.png")
    Image.fromarray(np.ones((128, 768), np.uint8)).save(tmp_path / "land.png")
    edit = f"--generate {tmp_path}/photo.png --lc {tmp_path}/land.png --out {tmp_path}/out"
    boxes = [f"--paint={name}:{40 + 128 * k},40,48,48" for k in range(6)]
    weights = ["--checkpoint", f"{ROOT}/weights/editor-dubai.pt", "--device", "cpu"]
    mixlc.main([*edit.split(), *boxes, *weights])
    judge = Judge(5)
    judge.load_state_dict(load_weights(ROOT / "weights/judge-dubai.pt")["state"]["judge"])
    shares = []
    for image in (photos, np.asarray(Image.open(tmp_path / "out" / "photo.png"))):
        windows = torch.from_numpy(image.copy()).view(128, 6, 128, 3).permute(1, 3, 0, 2)
        found = judge.classes_of(windows / 127.5 - 1)[:, 40:88, 40:88]
        shares.append((found == index).float().mean().item())
    assert shares[1] > shares[0] + 0.3


def test_several_checkpoints_become_the_mean_of_their_weights(trained, tmp_path, capsys):
    """Half as large, without optimisers and paths; vectors stay in single precision."""
    files = [trained("pix2pix") / "checkpoints" / name for name in ("epoch_0001.pt", "last.pt")]
    export_weights.main([*map(str, files), str(tmp_path / "mean.pt")])
    content = load_weights(tmp_path / "mean.pt")
    one, other = (load_weights(file)["state"] for file in files)
    assert content["state"].keys() == {"G", "D", "lr_scale", "best_loss", "stalled_epochs"}
    assert content["config"]["data"] == "pairs0" and not content["config"]["out"]
    for name in ("G", "D"):
        for key, value in content["state"][name].items():
            want = (one[name][key].double() + other[name][key].double()) / 2
            if value.is_floating_point():
                assert value.dtype == (torch.float16 if value.ndim > 1 else torch.float32)
                assert torch.allclose(value.double(), want, rtol=1e-3, atol=1e-7)
    assert not torch.equal(one["G"]["downs.0.0.weight"], other["G"]["downs.0.0.weight"])
    with pytest.raises(SystemExit):
        export_weights.main(["--help"])
    for other, text in ((trained("cyclegan"), "not checkpoints of one run"), (tmp_path, "neither")):
        last, out = other / "checkpoints" / "last.pt", str(tmp_path / "none.pt")
        last.parent.mkdir(exist_ok=True)
        if other == tmp_path:
            torch.save({"weight": torch.zeros(1)}, last)
        line = line_of(export_weights.main, [str(last), str(files[0]), out], capsys)
        assert text in line and not (tmp_path / "none.pt").exists()
    judge = str(trained("mixlc_acgan") / "judge.pt")
    export_weights.main([judge, out])
    content, own = load_weights(out), load_weights(judge)
    assert content["classes"] == own["classes"]
    for key, value in own["state"]["judge"].items():
        assert torch.equal(content["state"]["judge"][key].half(), value.half())
