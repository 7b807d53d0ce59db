"""weights/: every file loads, generates, and beats constant colours on a kept validation image."""

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

import pix2pix
from support.checkpoints import load_weights
from support.measures import constant_colors

KEPT = {  # file: the kept run that it is of
    "map-to-satellite": "pix2pix-map-to-satellite-256",
    "satellite-to-map": "pix2pix-satellite-to-map-256",
}


def test_every_file_has_a_card_and_all_are_small():
    files = sorted((ROOT / "weights").glob("*.pt"))
    assert {file.stem for file in files} == set(KEPT)
    assert sum(file.stat().st_size for file in files) < 80e6
    text = (ROOT / "weights" / "README.md").read_text()
    assert all(f"## {file.name}" in text for file in files)


def translated(name, folder):
    """(made, targets), (6, 256, 256, 3) uint8, for the inputs of the run's grid of six rows."""
    grid = np.asarray(Image.open(ROOT / "docs" / "results" / KEPT[name] / "grid.jpg"))
    targets = []
    for row in range(6):
        source, target = (grid[16 + 260 * row :][:256, left : left + 256] for left in (4, 524))
        Image.fromarray(source).save(folder / f"{row}.png")
        targets.append(target)
    file = ROOT / "weights" / f"{name}.pt"
    use = f"--generate {folder} --checkpoint {file} --out {folder}/out --device cpu"
    pix2pix.main(use.split())
    made = [np.asarray(Image.open(folder / "out" / f"{row}.png")) for row in range(6)]
    return np.stack(made), np.stack(targets)


@pytest.mark.parametrize("name", KEPT)
def test_weights_follow_their_input(tmp_path, name):
    """Grey levels correlate with the target's, which no constant does, and not with another's."""
    made, targets = (x.mean(-1).reshape(6, -1) for x in translated(name, tmp_path))
    correlation = np.corrcoef(made, targets)[:6, 6:]
    assert correlation.diagonal().mean() > 0.25
    assert np.roll(correlation, 1, 0).diagonal().mean() < 0.1


def test_maps_beat_every_constant_colour(tmp_path):
    made, targets = (x.astype(float) for x in translated("satellite-to-map", tmp_path))
    error = np.square(made - targets).mean()
    histogram = load_weights(ROOT / "weights" / "satellite-to-map.pt")["histograms"]["B"]
    for color in constant_colors(histogram).values():
        assert error < np.square((color.numpy() + 1) * 127.5 - targets).mean()
