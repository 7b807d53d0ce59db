"""VGG16's layers: from a file, from torch.hub, with random weights, and what they refuse."""

import types

import numpy as np
import plain
import pytest
import torch

import common
from common import VGG16Features
from files import CONVOLUTIONS, vgg_file
from runs import refused
from support.demo import landscape
from tensors import pictures

FIRST_RANDOM_WEIGHTS = [-0.306415, -0.313633, -0.068199]


def test_activations_of_a_file_with_torchvisions_keys(tmp_path):
    weights = vgg_file(tmp_path / "vgg.pth")
    vgg = VGG16Features(["relu3_3", "relu1_1", "relu2_2"], "vgg16", str(tmp_path / "vgg.pth"))
    parts = [(k, part) for k, _ in CONVOLUTIONS[:7] for part in ("weight", "bias")]
    tensors = [weights[f"features.{k}.{part}"] for k, part in parts]
    stored = types.SimpleNamespace(buffers=lambda: tensors, scales=vgg.scales)
    want = plain.vgg16(stored, pictures(), [0, 3, 6])
    for a, b in zip(vgg(pictures()), want, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert not list(vgg.parameters()) and not vgg.state_dict()


@pytest.mark.parametrize("weights", ["vgg16", "random"])
def test_gram_matrices_have_norm_1_whatever_the_weights(tmp_path, weights):
    """On landscapes: a weight of the style loss means the same with any layers and weights."""
    stored = vgg_file(tmp_path / "vgg.pth")
    torch.save({name: 7 * value for name, value in stored.items()}, tmp_path / "vgg.pth")
    vgg = VGG16Features(["relu1_2", "relu3_3"], weights, str(tmp_path / "vgg.pth"))
    photographs = [landscape(np.random.default_rng(k), 128)[0] for k in range(4)]
    images = torch.from_numpy(np.stack(photographs)).permute(0, 3, 1, 2)
    for activations in vgg(common.from_bytes(images)):
        norms = common.gram(activations).norm(dim=(1, 2))
        assert norms.mean().item() == pytest.approx(1, rel=1e-4)


def test_refusals(tmp_path, monkeypatch):
    """Only the layers in use are needed of a file."""
    file = str(tmp_path / "short.pth")
    vgg_file(file, last=2)
    (features,) = VGG16Features(["relu1_2"], "vgg16", file)(pictures())
    assert features.shape == (2, 64, 64, 64)
    with refused("--vgg16 .*/moved.pth: no such file: pass its new path"):
        VGG16Features(["relu1_1"], "vgg16", f"{tmp_path}/moved.pth")
    with refused("no features.5.weight"):
        VGG16Features(["relu3_3"], "vgg16", file)
    for layers in (["relu9_1"], ["relu1_2", "pool1"], []):
        with refused("choose from relu1_1"):
            VGG16Features(layers, "random", "")

    asked = []

    def offline(*_, **how):
        asked.append(how)
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with refused("vgg16-397923af.pth .*--vgg16 FILE"):
        VGG16Features(["relu1_2"], "vgg16", "")
    assert asked[0]["check_hash"] and asked[0]["weights_only"]


def test_random_features_are_the_same_on_every_run_and_machine():
    torch.manual_seed(123)
    one = VGG16Features(["relu3_3"], "random", "")
    torch.manual_seed(5)
    two = VGG16Features(["relu3_3"], "random", "")
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True))
    first = one.relu1_1_weight.flatten()[:3].tolist()
    assert first == pytest.approx(FIRST_RANDOM_WEIGHTS, abs=1e-5)
    for weight in (one.relu1_2_weight, one.relu2_1_weight, one.relu3_3_weight):
        want = 2 / (9 * weight.shape[1])  # He et al. 2015: variance 2 / fan in
        assert weight.var().item() == pytest.approx(want, rel=0.1)
