"""FID, KID and LPIPS: by torchmetrics where it is installed, with small features."""

import importlib
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from runs import line_of, rows_of, use
from support import distances, measures
from support.pictures import to_bytes
from tensors import CPU


class Colours(nn.Module):
    """The mean colour of pictures (B, 3, S, S) uint8 as their features (B, 3)."""

    num_features = 3

    def forward(self, images):
        return images.double().mean((2, 3))


class Difference(nn.Module):
    """In place of LPIPS, whose network would be fetched: the mean absolute difference."""

    def update(self, guess, real):
        self.value = (guess - real).abs().mean()

    def compute(self):
        return self.value


@pytest.fixture
def small(monkeypatch):
    """Distances by mean colours."""
    lpip = pytest.importorskip("torchmetrics.image.lpip")
    monkeypatch.setattr(lpip, "LearnedPerceptualImagePatchSimilarity", Difference)

    def make(device, paired):
        return distances.Distances(device, paired, features=Colours())

    return make


def test_distances_by_hand(small):
    """FID: |difference of means|^2 + trace(C + C' - 2 (C C')^(1/2)), of mean colours."""
    seeded = torch.Generator().manual_seed(0)
    real = (torch.rand(60, 3, 1, 1, generator=seeded) - 0.5).expand(-1, -1, 8, 8)
    fake = (torch.rand(60, 3, 1, 1, generator=seeded) * 0.7 - 0.6).expand(-1, -1, 8, 8)
    measure = small(CPU, True)
    for k in range(0, 60, 20):
        measure.add(fake[k : k + 20], real[k : k + 20])
    a, b = (to_bytes(x)[..., 0, 0].double().numpy() for x in (real, fake))
    product = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real
    want = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T))
    values = measure.measures()
    assert not (measure.fid.sync_on_compute or measure.kid.sync_on_compute)  # all have all pictures
    assert values["fid"] == pytest.approx(want - 2 * np.sqrt(product).sum(), rel=1e-3)
    assert values["kid"] > 0
    assert values["lpips"] == pytest.approx((fake - real).abs()[40:].mean().item())
    same = small(CPU, False)
    same.add(real, real)
    assert abs(same.measures()["fid"]) < 1e-3 and "lpips" not in same.measures()
    for bands in (1, 5):
        measure.add(fake[:, :1].expand(-1, bands, -1, -1), real[:, :1].expand(-1, bands, -1, -1))


@pytest.mark.parametrize("script", ["pix2pix", "cyclegan"])
def test_evaluation_shows_distances_of_the_model(script, small, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "Distances", small)
    run = trained(script)
    importlib.import_module(script).main(use(run, "--evaluate --fid", f"--out {tmp_path}/out"))
    rows = {row: cells for row, cells in rows_of(tmp_path / "out").items() if "fid" in cells}
    assert set(rows) == ({"model"} if script == "pix2pix" else {"A to B: model", "B to A: model"})
    assert all(cells["fid"] > 0 and cells["lpips"] > 0 for cells in rows.values())


def test_without_torchmetrics_one_line_names_it(trained, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    main = importlib.import_module("pix2pix").main
    line = line_of(main, use(trained("pix2pix"), "--evaluate --fid"), capsys)
    assert "pip install torchmetrics[image]" in line
    images = torch.zeros(1, 3, 64, 64)
    measures.Scores(brief=True, fid=True).add_distances("model", images, images)  # not each epoch


def test_distances_compare_pixels_with_data(monkeypatch):
    monkeypatch.setattr(measures, "Distances", made := mock.MagicMock())
    real, guess = torch.zeros(2, 1, 3, 8, 8)
    real[..., :4], guess[:] = torch.nan, 1
    measures.Scores(fid=True).add_distances("model", guess, real, False)
    made.assert_called_once_with(CPU, False)
    fake, seen = made.return_value.add.call_args.args
    assert torch.equal(fake[..., :4], seen[..., :4]) and (fake[..., 4:] == 1).all()
