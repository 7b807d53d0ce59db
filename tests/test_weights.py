"""weights/: every file loads, generates, and beats constant colours on a kept validation image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pix2pix
from support.measures import constant_colors

ROOT = Path(__file__).parent.parent
KEPT = {"satellite-to-map": "pix2pix-satellite-to-map-256"}


def test_every_file_has_a_card_and_all_are_small():
    files = sorted((ROOT / "weights").glob("*.pt"))
    assert {file.stem for file in files} == set(KEPT)
    assert sum(file.stat().st_size for file in files) < 80e6
    text = (ROOT / "weights" / "README.md").read_text()
    assert all(f"## {file.name}" in text for file in files)


@pytest.mark.parametrize("name", KEPT)
def test_weights_beat_constant_colours(tmp_path, name):
    """On the first row of the run's grid: input | fake | target, 256 pixels each."""
    grid = np.asarray(Image.open(ROOT / "docs" / "results" / KEPT[name] / "grid.jpg"))
    source, target = (grid[16:272, left : left + 256] for left in (4, 524))
    Image.fromarray(source).save(tmp_path / "photo.png")
    file = ROOT / "weights" / f"{name}.pt"
    use = f"--generate {tmp_path}/photo.png --checkpoint {file} --out {tmp_path}/out --device cpu"
    pix2pix.main(use.split())
    made = np.asarray(Image.open(tmp_path / "out" / "photo.png"))
    assert made.shape == target.shape
    content = torch.load(file, weights_only=True)
    colors = constant_colors(content["histograms"]["B"])
    error = np.square(made - target.astype(float)).mean()
    for color in colors.values():
        constant = (color.numpy() + 1) * 127.5
        assert error < np.square(constant - target).mean()
