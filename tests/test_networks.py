"""The networks of every script: shapes, sizes as published, receptive fields, initial weights."""

import importlib

import pytest
import torch
from test_steps import CASES
from torch import nn

from tensors import CPU, maps, pictures, tiny

NAMES = (
    "pix2pix,pix2pix instance,pix2pix resnet,pix2pix resnet instance,pix2pix resize,"
    "cyclegan,cyclegan resize,cyclegan labels,"
    "mixlc,mixlc late,mixlc early,mixlc global,mixlc lc skips,mixlc dilated,mixlc_acgan"
)
GENERATORS = {name: CASES[name] for name in NAMES.split(",")}
# script, network, its arguments, how many weights it has
PARAMETERS = [
    ("pix2pix", "UNetGenerator", (3, 3, 64, 64, "batch", 0.5, "transposed"), 29_244_035),
    ("pix2pix", "UNetGenerator", (3, 3, 128, 64, "batch", 0.5, "transposed"), 41_828_995),
    ("pix2pix", "UNetGenerator", (3, 3, 256, 64, "batch", 0.5, "transposed"), 54_413_955),
    ("pix2pix", "UNetGenerator", (3, 3, 512, 64, "batch", 0.5, "transposed"), 66_998_915),
    ("pix2pix", "UNetGenerator", (3, 3, 256, 64, "instance", 0.5, "transposed"), 54_409_603),
    ("pix2pix", "ResNetGenerator", (3, 3, 64, 9, "instance"), 11_378_179),
    ("pix2pix", "ResNetGenerator", (3, 3, 64, 9, "batch"), 11_383_427),
    ("pix2pix", "Discriminator", (6, 64, "batch", 1), 9_024),
    ("pix2pix", "Discriminator", (6, 64, "batch", 16), 139_585),
    ("pix2pix", "Discriminator", (6, 64, "batch", 70), 2_768_705),
    ("pix2pix", "Discriminator", (6, 64, "batch", 286), 11_159_361),
    ("pix2pix", "Discriminator", (6, 64, "instance", 70), 2_767_809),
    ("cyclegan", "ResNetGenerator", (3, 3, 64, 9, True), 11_378_179),
    ("cyclegan", "ResNetGenerator", (14, 3, 64, 9, True), 11_412_675),
    ("cyclegan", "ResNetGenerator", (3, 14, 64, 9, False), 11_412_686),
    ("cyclegan", "Discriminator", (3, 64), 2_764_737),
    ("cyclegan", "Discriminator", (14, 64), 2_776_001),
    ("mixlc", "Generator", (14, 3, 256, 64, "late", "lc"), 108_978_627),
    ("mixlc", "Generator", (14, 3, 256, 64, "early", "lc"), 54_499_587),
    ("mixlc", "Generator", (14, 3, 256, 64, "dilated", "lc"), 55_326_339),
    ("mixlc", "Generator", (14, 3, 256, 64, "middle", "lc"), 78_229_059),
    ("mixlc", "Generator", (14, 3, 256, 64, "middle", "both"), 93_601_347),
    ("mixlc", "Discriminator", (3, 256, 64, False), 25_807_425),
    ("mixlc", "Discriminator", (3, 256, 64, True), 45_060_225),
    ("mixlc_acgan", "Generator", (14, 3, 64, 0.5), 88_220_547),
    ("mixlc", "LabelDiscriminator", (14, 3, 256, 64), 54_439_119),
    ("mixlc_acgan", "Discriminator", (14, 3, 64), 43_642_575),
]


def made(case, **options):
    """A State of the networks of a case of GENERATORS."""
    module, cfg = tiny(case.split()[0], **{"width": 2, **GENERATORS[case], **options})
    return module.build(cfg, CPU)


def nets_of(state):
    return {name: net for name, net in vars(state).items() if name[0] in "GD"}


def convolutions(net):
    return [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]


@pytest.mark.parametrize(("script", "network", "arguments", "count"), PARAMETERS)
def test_parameters(script, network, arguments, count):
    with torch.device("meta"):  # without values, which takes no time
        net = getattr(importlib.import_module(script), network)(*arguments)
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("size", [64, 512])
@pytest.mark.parametrize("case", GENERATORS)
def test_shapes_and_ranges(case, size):
    script = case.split()[0]
    options = {"patch_gan": 70} if script == "pix2pix" else {}
    nets = nets_of(made(case, size=size, **options))
    image, lc = pictures(0, 2, size), maps(0, 2, size)
    patches = {"pix2pix": size // 8 - 2, "cyclegan": size // 16, "mixlc_acgan": size // 32}
    logits = {script: (1, count, count) for script, count in patches.items()}
    is_global = GENERATORS[case].get("d") == "global"
    logits["mixlc"] = (1,) if is_global else (lc.shape[1] + 1, size, size)
    box = torch.tensor([[0, size // 2, 8, 8]] * 2)
    given = {"pix2pix": [image], "mixlc": [box], "mixlc_acgan": [lc]}
    for name, net in nets.items():
        inputs = [lc if case == "cyclegan labels" and name in ("G_BA", "D_B") else image]
        if name == "G" and "mixlc" in case:
            inputs.append(lc)
        elif name == "D":
            inputs += given[script]
        with torch.no_grad():
            out = net(*inputs)
        if name[0] == "G":
            assert out.shape == image.shape
            assert out.abs().max() <= 1 or (case, name) == ("cyclegan labels", "G_AB")
        else:
            assert out.shape == (2, *logits[script])


@pytest.mark.parametrize(
    ("script", "arguments", "field"),
    [
        *[("pix2pix", (6, 4, "batch", field), field) for field in (1, 16, 70, 286)],
        ("cyclegan", (3, 4), 94),
    ],
)
def test_receptive_field(script, arguments, field):
    """A logit sees kernel + (seen - 1) * stride pixels of the layer before, last to first."""
    seen = 1
    for layer in reversed(convolutions(importlib.import_module(script).Discriminator(*arguments))):
        seen = layer.kernel_size[0] + (seen - 1) * layer.stride[0]
    assert seen == field


@pytest.mark.parametrize("script", ["pix2pix", "cyclegan"])
def test_blocks_follow_the_size(script):
    for size, blocks in ((128, 6), (256, 9)):
        options = {"generator": "resnet"} if script == "pix2pix" else {}
        module, cfg = tiny(script, **options, blocks=0, size=size)
        G = next(iter(nets_of(module.build(cfg, CPU, training=False)).values()))
        assert sum(isinstance(m, module.ResidualBlock) for m in G.modules()) == blocks


@pytest.mark.parametrize("n", [6, 7, 8, 9])
def test_dropout_layers(n):
    """Of pix2pix's inner decoder blocks, and of the acgan's generator and discriminator."""
    acgan = made("mixlc_acgan", d_dropout=0.3)
    nets = made("pix2pix", size=2**n).G, acgan.G, acgan.D
    layers = [[m.p for m in net.modules() if isinstance(m, nn.Dropout)] for net in nets]
    assert layers == [[0.5] * (n - 5), [0.5] * 12, [0.3] * 5]


@pytest.mark.parametrize(
    "case", ["pix2pix", "cyclegan", "mixlc dilated", "mixlc global", "mixlc_acgan"]
)
def test_initial_weights(case):
    """Convolutions N(0, 0.02), norm scales N(1, 0.02), every bias 0."""
    for net in nets_of(made(case, width=16)).values():
        linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
        weights = torch.cat([m.weight.flatten() for m in convolutions(net) + linear])
        assert abs(weights.mean()) < 1e-3 and abs(weights.std() - 0.02) < 5e-4
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        if norms:
            scales = torch.cat([m.weight for m in norms])
            assert abs(scales.mean() - 1) < 5e-3 and abs(scales.std() - 0.02) < 5e-3
        assert all((p == 0).all() for name, p in net.named_parameters() if name.endswith("bias"))
