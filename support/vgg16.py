"""Features of VGG16 for content and style losses."""

import contextlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from support.checkpoints import load_weights
from support.demo import landscape
from support.device import full_precision
from support.errors import UserError, refusing
from support.pictures import from_bytes, shown

LAYERS = {  # the number of the convolution among torchvision's `features`, and its channels
    "relu1_1": (0, 64), "relu1_2": (2, 64),
    "relu2_1": (5, 128), "relu2_2": (7, 128),
    "relu3_1": (10, 256), "relu3_2": (12, 256), "relu3_3": (14, 256),
    "relu4_1": (17, 512), "relu4_2": (19, 512), "relu4_3": (21, 512),
    "relu5_1": (24, 512), "relu5_2": (26, 512), "relu5_3": (28, 512),
}  # fmt: skip


class VGG16Features(nn.Module):
    """Layers of VGG16 (Simonyan and Zisserman 2015, arXiv:1409.1556), frozen.

    (B, C, S, S) in [-1, 1] -> a list of activations, float32, in the order of depth, of the first
    three bands.

    layers    names such as relu1_2 or relu3_3; nothing deeper than the last of them is computed
    weights   "vgg16": ImageNet's, from `path`, a file in torchvision's layout, or for "" from
              torch.hub; "random": normal with variance 2 / fan in (He et al. 2015), from a fixed
              seed (random features carry texture: He, Wang, Hopcroft 2016, arXiv:1606.04801)
    autocast  the precision of the convolutions with ImageNet's weights; random ones compute in
              float32, since their gradients in bf16 differ more

    Each layer's activations are scaled so that its Gram matrices have norm 1 on four procedural
    landscapes, so that a loss weight suits any layer and any weights.
    """

    def __init__(self, layers, weights, path, autocast=None):
        super().__init__()
        names = list(LAYERS)
        if not layers or not set(layers) <= set(names):
            raise UserError(f"--style-layers {','.join(layers)}: choose from {','.join(names)}")
        deepest = max(names.index(name) for name in layers)
        self.layers, self.computed = set(layers), names[: deepest + 1]
        given = None if weights == "random" else _imagenet(path)
        seeded = torch.Generator().manual_seed(0)
        channels = 3
        for name in self.computed:
            position, out = LAYERS[name]
            key = f"features.{position}"
            if given is None:
                weight = nn.init.kaiming_normal_(torch.empty(out, channels, 3, 3), generator=seeded)
                bias = torch.zeros(out)
            else:
                with refusing(f"--vgg16 {path}: no {key}.weight: pass torchvision's vgg16 weights"):
                    weight, bias = given[f"{key}.weight"], given[f"{key}.bias"]
            self.register_buffer(f"{name}_weight", weight, persistent=False)
            self.register_buffer(f"{name}_bias", bias, persistent=False)
            channels = out
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.scales, self.autocast = [1.0] * len(self.layers), contextlib.nullcontext()
        images = [landscape(np.random.default_rng(k), 128)[0] for k in range(4)]
        images = from_bytes(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
        with torch.no_grad():
            self.scales = [gram(x).norm(dim=(1, 2)).mean().item() ** -0.5 for x in self(images)]
        if autocast and weights != "random":
            self.autocast = autocast

    def forward(self, images):
        x = ((shown(images) + 1) / 2 - self.mean) / self.std
        activations = []
        with self.autocast:
            for name in self.computed:
                if name.endswith("_1") and name != "relu1_1":
                    x = F.max_pool2d(x, 2)
                weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
                if name in self.layers:
                    activations.append(x)
        scaled = zip(activations, self.scales, strict=True)
        return [full_precision(x) * scale for x, scale in scaled]


def gram(features):
    """Activations (B, C, H, W) -> Gram matrices (B, C, C) / (C H W): arXiv:1603.08155, eq. 3."""
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / flat[0].numel()


def _imagenet(path):
    """VGG16's state dict, trained on ImageNet: from a file, or by torch.hub, which checks it."""
    if path:
        if not Path(path).is_file():
            raise UserError(f"--vgg16 {path}: no such file: pass its new path")
        return load_weights(path)
    url = "https://download.pytorch.org/models/vgg16-397923af.pth"
    how = {"map_location": "cpu", "check_hash": True, "weights_only": True}
    with refusing(f"VGG16 is not at hand: fetch {url} and pass --vgg16 FILE"):
        return torch.hub.load_state_dict_from_url(url, **how)
