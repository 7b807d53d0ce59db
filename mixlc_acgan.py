"""mixlc_acgan: the edit of mixlc, with a discriminator that also classifies every pixel, and a style loss.

    python mixlc_acgan.py --data denmark/ --lc-classes s2glc              rgb/ and lc/ folders, 14 classes
    python mixlc_acgan.py --data maps/ --lc-classes maps                  the map half becomes land cover
    python mixlc_acgan.py --quick                                         no data, two minutes: a demo world
    python mixlc_acgan.py --data denmark/ --show-samples 8                what it trains on, as a picture
    python mixlc_acgan.py --evaluate --train-judge --checkpoint runs/mixlc_acgan/checkpoints/last.pt
    python mixlc_acgan.py --generate photo.png --lc photo_lc.png --paint water:80,96,64,48 --samples 4 --checkpoint X

Papers: Odena, Olah, Shlens 2017, Conditional Image Synthesis With Auxiliary Classifier GANs, arXiv:1610.09585; Johnson,
Alahi, Fei-Fei 2016, Perceptual Losses for Real-Time Style Transfer and Super-Resolution, arXiv:1603.08155.

Differences from the system that this follows: its classifier saw the land cover that it was to find; here land cover
enters the adversarial head only. And the classifier's verdict on fakes teaches the generator, as in the paper.

Measured: --quick, 90 s on two cores of a CPU, inside the edit 19.1 levels from the target; a copy of the input 34.9.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import UserError, option

# ------------------------------------------------------------------------------------------------------------- Config


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = option("", "directory with the images; none: a small demo world", "data")
    patch: int = option(0, "cut images into N x N patches first; 0: whole images", low=0)
    cache: str = option("", "folder of the decoded images; none: cache/ beside the run folder")
    val_images: int = option(100, "validation images measured after an epoch; 0: all", low=0)
    box: str = option("center", "the pasted piece: 3/8 of the side in the middle, or 1/8 to 1/2 anywhere",
                      choices=("center", "random"))  # fmt: skip
    size: int = option(256, "side of the images that the networks see", "model", choices=(64, 128, 256, 512))
    lc_classes: str = option("", "land cover: s2glc, maps, binary or a classes.json (data/classes.json is found)")
    width: int = option(64, "channels of the first layer", low=1, high=1024)
    dropout: float = option(0.5, "dropout of the generator, on in training and in generating: it is the noise",
                            low=0.0, high=0.9)  # fmt: skip
    adv_lambda: float = option(0.05, "weight of the adversarial loss", "training", low=0.0)
    pixel_lambda: float = option(0.5, "weight of the L1 loss", low=0.0)
    style_lambda: float = option(0.45, "weight of the style loss", low=0.0)
    class_lambda: float = option(0.05, "weight of the classifier's verdict on the fake", low=0.0)
    id_lambda: float = option(0.1, "weight of the identity loss: with its own land cover a photograph stays", low=0.0)
    class_weights: bool = option(True, "weigh classes by their inverse frequency in the training land cover")
    style_features: str = option("vgg16", "ImageNet's VGG16, or its layers with random weights",
                                 choices=("vgg16", "random"))  # fmt: skip
    style_layers: str = option("relu3_3", "layers of the style loss, such as relu1_2,relu2_2,relu3_3")
    vgg16: str = option("", "VGG16 weights; none: torch.hub's cache or download")
    lr: float = option(2e-4, "Adam's rate", low=0.0)
    beta1: float = option(0.5, "Adam's first beta", low=0.0, high=0.999)
    batch_size: int = option(16, "edits a step, in each process", low=1)
    epochs: int = option(200, "passes over the training images", low=1, may_change=True)
    seed: int = option(0, "of weights, order, pairs, boxes, flips and dropout", low=0, high=2**32 - 1)
    eval_norm: str = option("running", "generating: the image's own statistics | running statistics",
                            choices=("batch", "running"))  # fmt: skip
    quick: bool = option(False, "small networks, images and epochs: works in two minutes on two CPU cores", "run")
    out: str = option("", "run folder, or folder of the edited images; none: runs/mixlc_acgan")
    resume: bool = option(False, "go on with the run in --out, at the step where it stopped")
    log_every: int = option(50, "steps between rows of metrics.csv", low=1)
    save_every: int = option(10, "epochs between checkpoints that are kept; last.pt is written every epoch", low=0)
    sample_rows: int = option(6, "validation images in a sample grid", low=1)
    show_samples: int = option(0, "write a picture of N training edits to --out, and stop", low=0)
    track: str = option("", "also log to", choices=("", "tensorboard", "wandb"))
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    precision: str = option("auto", "auto: bf16 on CUDA, fp32 on the CPU", choices=("auto", "fp32", "bf16"))
    graph: bool = option(True, "capture the training step in a CUDA graph")
    checkpoint: str = option("", "model to evaluate or to generate with", "use a trained model")
    evaluate: bool = option(False, "measure --checkpoint on the validation split")
    train_judge: bool = option(False, "before evaluating, train a classifier on photographs alone to judge the edits")
    judge_epochs: int = option(30, "epochs of the judge", low=1)
    generate: str = option("", "photograph to edit with --checkpoint")
    lc: str = option("", "its land cover: already edited, or to be edited by --paint")
    lc_before: str = option("", "its land cover before the edit, where --lc is already edited")
    paint: tuple = option((), "class:x,y,width,height: a rectangle of land cover to paint, in pixels; may be repeated")
    samples: int = option(1, "answers to the one edit, each with other noise", low=1, high=64)
    keep_outside: bool = option(True, "keep the photograph outside the edit, with a feathered border, or regenerate it")


QUICK = {"size": 64, "width": 12, "batch_size": 4, "epochs": 12, "log_every": 12, "lr": 5e-4}
QUICK |= {"style_features": "random", "style_layers": "relu2_2"}

# --------------------------------------------------------------------------------------------------------------- data


class Edits:
    """Edits made of two tiles a and b: a box of b's photograph and land cover replaces the same box of a's.

    Both tiles are mirrored and turned over half of the time, each on its own, photograph and land cover together.
    A batch is (rgb_a, lc_ab, rgb_ab, box, lc_a, rgb_b, lc_b):

    rgb_a, rgb_ab, rgb_b  (B, 3, S, S) in [-1, 1]: input, target, and an untouched photograph for the discriminator
    lc_ab, lc_a, lc_b     (B, classes, S, S) one-hot, all zeros where ignored
    box                   (B, 4) top, left, height, width
    """

    def __init__(self, cfg, split, device):
        self.cfg, self.device = cfg, device
        self.store = common.ImageStore(cfg, split, cfg.size, demo="landcover", smallest=cfg.size)
        self.classes = self.store.classes
        if not self.store.paired or not self.classes:
            remedy = "pass --lc-classes (maps for the maps data)" if self.store.paired else "trainA/trainB is none"
            raise UserError(f"--data {cfg.data}: mixlc_acgan needs photographs with land cover: {remedy}")
        if len(self.store.records) < 2:
            raise UserError(f"--data {cfg.data}: split {split} holds one image, and an edit takes two")
        self.rows = common.Rows(self.store.records, device)
        self.palette = self.classes.palette_on(device)

    def __len__(self):
        return len(self.rows)

    @property
    def steps(self):
        """Batches in an epoch."""
        return common.steps_in_epoch(len(self), self.cfg.batch_size)

    def plan(self, rng, order, flips):
        """For every row a of `order`: (N, 2) rows a and b, b never a; (N, 4) boxes; (N, 4) flips of a and of b."""
        count, size = len(order), self.cfg.size
        partner = (order + rng.integers(1, len(self), count)) % len(self)
        side = rng.integers(size // 8, size // 2 + 1, count)
        corner = (rng.random((count, 2)) * (size - side[:, None] + 1)).astype(np.int64)
        if self.cfg.box == "center":
            side = np.full(count, size * 3 // 8)
            corner = np.repeat((size - side[:, None]) // 2, 2, 1)
        boxes = np.stack([corner[:, 0], corner[:, 1], side, side], 1)
        return np.stack([order, partner], 1), boxes, rng.integers(0, 2, (count, 4)) * flips

    def batches(self, epoch, first=0):
        """An epoch's training batches from number `first` on; they follow from (seed, epoch, batch, rank) alone."""
        rng = np.random.default_rng([self.cfg.seed, epoch])
        plan = self.plan(rng, rng.permutation(len(self)), flips=1)
        plan = (common.rank_rows(x, self.cfg.batch_size)[first:] for x in plan)  # (batches, B, 2 or 4)
        for a, b, box in self.tiles(*plan):
            yield self.edit(a, b, box)

    def in_order(self, count, batch_size=8):
        """Batches of the first `count` images with partners and boxes that are always the same, without flips."""
        plan = self.plan(np.random.default_rng(1), np.arange(len(self)), flips=0)
        for first in range(0, count, batch_size):
            for a, b, box in self.tiles(*(x[None, first : min(first + batch_size, count)] for x in plan)):
                yield self.edit(a, b, box)

    def tiles(self, index, boxes, flips):
        """For rows (steps, B, 2), boxes and flips (steps, B, 4): records a, b (B, 4, S, S) uint8 and box (B, 4)."""
        batches = self.rows.batches(index.reshape(len(index), 2 * index.shape[1]))
        for images, box, flip in zip(batches, torch.from_numpy(boxes).to(self.device), flips, strict=True):
            yield mirror(images[::2], flip[:, :2].tolist()), mirror(images[1::2], flip[:, 2:].tolist()), box

    def edit(self, a, b, box):
        """Records a and b (B, 4, S, S) uint8 and box (B, 4) -> a batch."""
        ab = torch.where(edit_mask(box, self.cfg.size), b, a)
        rgb_a, rgb_ab, rgb_b = (common.from_bytes(x[:, :3]) for x in (a, ab, b))
        lc_a, lc_ab, lc_b = (one_hot(x[:, 3], len(self.classes)) for x in (a, ab, b))
        return rgb_a, lc_ab, rgb_ab, box, lc_a, rgb_b, lc_b

    def picture(self, lc):
        """One-hot land cover (B, classes, S, S) -> (B, 3, S, S) in [-1, 1], in class colours."""
        index = torch.where(lc.sum(1) > 0, lc.argmax(1), common.IGNORED)
        return common.draw(index, self.palette)


def mirror(images, flips):
    """B images (C, S, S), mirrored where the first of an image's two flips is 1, turned over where the second is ->
    (B, C, S, S)."""
    axes = [[axis for axis, on in zip((2, 1), flip, strict=True) if on] for flip in flips]
    return torch.stack([image.flip(axis) if axis else image for image, axis in zip(images, axes, strict=True)])


def one_hot(index, classes):
    """Class indices (B, S, S) uint8 -> (B, classes, S, S) float32; an ignored pixel is zero in every class."""
    each = torch.arange(classes, dtype=torch.uint8, device=index.device).view(1, -1, 1, 1)
    maps = torch.empty(len(index), classes, *index.shape[1:], device=index.device)
    return torch.eq(index[:, None], each, out=maps)  # straight into floats: on a CPU ten times as fast as by bools


def edit_mask(box, size):
    """Where the edit is: box (B, 4) -> (B, 1, size, size) bool."""
    along = torch.arange(size, device=box.device)
    top, left, height, width = box[:, :, None].unbind(1)  # (B, 1) each
    y, x = (along >= top) & (along < top + height), (along >= left) & (along < left + width)  # (B, size)
    return y[:, None, :, None] & x[:, None, None, :]


# ----------------------------------------------------------------------------------------------------------- networks


def block(conv, dropout=0.0, activation=None):
    """Convolution, BatchNorm, dropout, ReLU (or another activation)."""
    layers = [conv, nn.BatchNorm2d(conv.out_channels), nn.Dropout(dropout), activation or nn.ReLU()]
    return nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Dropout) or dropout > 0))


class UNet(nn.Module):
    """Five strided convolutions, two more at the bottom, four up with skips: (B, C, S, S) -> (B, 64, S/2, S/2)."""

    def __init__(self, channels_in, width, dropout):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width, 16 * width]  # 64 128 256 512 1024
        first = nn.Conv2d(channels_in, width, 4, 2, 1, padding_mode="reflect")
        self.downs = nn.ModuleList([block(first, activation=nn.LeakyReLU(0.2))])
        for channels, out in zip(widths, widths[1:], strict=False):
            self.downs.append(block(nn.Conv2d(channels, out, 4, 2, 1), activation=nn.LeakyReLU(0.2)))
        bottom = (block(nn.Conv2d(widths[-1], widths[-1], 3, 1, 1), dropout) for _ in range(2))
        self.bottom = nn.Sequential(*bottom)
        self.ups, channels = nn.ModuleList(), widths[-1]
        for out in reversed(widths[:-1]):
            self.ups.append(block(nn.ConvTranspose2d(channels, out, 4, 2, 1), dropout))
            channels = 2 * out
        self.last = block(nn.Conv2d(channels, width, 3, 1, 1))

    def forward(self, x):
        skips = []
        for down in self.downs:
            x = down(x)  # (B, 64..1024, S/2 .. S/32, S/2 .. S/32)
            skips.append(x)
        x = self.bottom(skips.pop())  # (B, 1024, S/32, S/32)
        for up in self.ups:
            x = torch.cat([skips.pop(), up(x)], 1)  # (B, 1024..128, S/16 .. S/2, S/16 .. S/2)
        return self.last(x)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut (Johnson et al. 2016, arXiv:1603.08155)."""

    def __init__(self, channels):
        super().__init__()
        conv = nn.Conv2d(channels, channels, 3, 1, 1)
        self.layers = nn.Sequential(block(conv), nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels))

    def forward(self, x):
        return x + self.layers(x)


class Generator(nn.Module):
    """Photograph (B, 3, S, S) in [-1, 1] and land cover (B, classes, S, S) -> photograph (B, 3, S, S) in [-1, 1]."""

    def __init__(self, classes, width, dropout):
        super().__init__()
        self.rgb_net, self.lc_net = UNet(3, width, dropout), UNet(classes, width, dropout)
        self.output_net = nn.Sequential(
            block(nn.ConvTranspose2d(2 * width, width, 4, 2, 1)),
            ResidualBlock(width),
            nn.Conv2d(width, 3, 3, 1, 1),
            nn.Tanh(),
        )

    def forward(self, rgb, lc):
        return self.output_net(torch.cat([self.rgb_net(rgb), self.lc_net(lc)], 1))  # from (B, 128, S/2, S/2)


class Discriminator(nn.Module):
    """Two heads on one trunk that sees the photograph (B, 3, S, S) alone (Odena et al. 2017, section 3).

    Called with land cover (B, classes, S, S) it answers with logits of real and fake, (B, 1, S/32, S/32): the land
    cover's class shares join the trunk's features there. classify gives logits of every pixel, (B, classes, S, S); it
    never sees land cover: a classifier that did would copy it, and teach nothing.
    """

    def __init__(self, classes, width):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width, 16 * width]  # 64 128 256 512 1024
        layers = [
            block(nn.Conv2d(i, o, 4, 2, 1), activation=nn.LeakyReLU(0.2))
            for i, o in zip([3, *widths[:-1]], widths, strict=True)
        ]
        for _ in range(2):
            layers += [block(nn.Conv2d(widths[-1], widths[-1], 3, 1, 1), activation=nn.LeakyReLU(0.2))]
        self.trunk = nn.Sequential(*layers)  # (B, 1024, S/32, S/32)
        self.real_head = nn.Conv2d(widths[-1] + classes, 1, 3, 1, 1)
        ups = [8 * width, 4 * width, 2 * width, width, width]  # 512 256 128 64, and 64 again at full size
        layers = [block(nn.ConvTranspose2d(i, o, 4, 2, 1)) for i, o in zip([widths[-1], *ups[:-1]], ups, strict=True)]
        self.class_head = nn.Sequential(*layers, nn.Conv2d(width, classes, 3, 1, 1))

    def forward(self, image, lc):
        return self.judge(self.trunk(image), lc)

    def judge(self, features, lc):
        """The adversarial head, on features of the trunk."""
        shares = F.adaptive_avg_pool2d(lc, features.shape[-2:]).to(features.dtype)
        return self.real_head(torch.cat([features, shares], 1))

    def classify(self, image):
        """The classifying head."""
        return self.class_head(self.trunk(image))

    def both(self, image, lc):
        """(real or fake logits, class logits) with the trunk run once."""
        features = self.trunk(image)
        return self.judge(features, lc), self.class_head(features)


def init_weights(net):
    """Convolutions N(0, 0.02), norm scales N(1, 0.02), biases 0."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    return net


class VGG16Features(nn.Module):
    """Layers of VGG16 (Simonyan and Zisserman 2015), frozen: images (B, 3, S, S) in [-1, 1] -> a list of activations.

    layers   their names, such as relu1_2 or relu3_3; nothing deeper than the last of them is kept
    weights  "vgg16": those of the file `path`, see common.vgg16_weights; "random": He-initialised from a fixed seed,
             the same on every machine (random features carry texture, He, Wang, Hopcroft 2016, arXiv:1606.04801)
    """

    stages = (2, 2, 3, 3, 3)

    def __init__(self, layers, weights, path):
        super().__init__()
        known = [f"relu{stage}_{k}" for stage, count in enumerate(self.stages, 1) for k in range(1, count + 1)]
        wrong = [name for name in layers if name not in known]
        if wrong or not layers:
            raise UserError(f"--style-layers {','.join(layers)}: no layer {wrong[:1]}; there are {', '.join(known)}")
        modules, self.taken, channels, seeded = [], [], 3, torch.Generator().manual_seed(0)
        for name in known[: max(map(known.index, layers)) + 1]:
            stage, k = int(name[4]), int(name[6])
            if k == 1 and stage > 1:
                modules.append(nn.MaxPool2d(2))
            out = min(64 * 2 ** (stage - 1), 512)
            conv = nn.Conv2d(channels, out, 3, 1, 1)
            conv.weight.data = torch.randn(conv.weight.shape, generator=seeded) * (2 / (9 * channels)) ** 0.5
            conv.bias.data.zero_()
            modules += [conv, nn.ReLU()]
            self.taken += [len(modules) - 1] if name in layers else []
            channels = out
        self.features = nn.Sequential(*modules)
        if weights == "vgg16":
            self.load_state_dict(common.vgg16_weights(path, self.state_dict()))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images):
        x, activations = ((images + 1) / 2 - self.mean) / self.std, []
        for k, module in enumerate(self.features):
            x = module(x)
            activations += [x] if k in self.taken else []
        return activations


# ------------------------------------------------------------------------------------------------------------- losses


def full_precision(x):
    """At least float32, as losses need: bf16 becomes float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gan_loss(logits, real):
    """Cross-entropy of logits with "real" (1) or "fake" (0), the mean over the batch: a scalar.

    Goodfellow et al. 2014 (arXiv:1406.2661), equation 1, with the generator's -log D(G(x)) of its section 3.
    """
    logits = full_precision(logits)
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def l1_loss(fake, target):
    """Mean absolute difference, equation 3 of Isola et al. 2017: a scalar."""
    return F.l1_loss(full_precision(fake), full_precision(target))


def class_loss(logits, target, weights):
    """Cross-entropy of logits (B, classes, S, S) against one-hot land cover, each pixel weighing as weights (classes,)
    say of its class, over the pixels that have one: a scalar. Odena et al. 2017, equation 3."""
    weighted = target * weights.to(target.dtype).view(1, -1, 1, 1)
    return -(full_precision(logits).log_softmax(1) * weighted).sum() / weighted.sum().clamp_min(1e-6)


def gram(features):
    """Gram matrices of activations (B, C, H, W): (B, C, C), divided by C H W. Johnson et al. 2016, equation 3."""
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / flat[0].numel()


def style_loss(vgg, fake, target):
    """Squared Frobenius distance of Gram matrices, summed over layers, the mean over the batch: a scalar.

    Johnson et al. 2016, equation 4. In float32 under any autocast: in float16 Gram matrices overflow.
    """
    with torch.autocast(fake.device.type, enabled=False):
        layers = zip(vgg(full_precision(fake)), vgg(full_precision(target)), strict=True)
        return sum((gram(a) - gram(b)).square().sum((1, 2)).mean() for a, b in layers)


def inverse_frequency(labels, classes):
    """Class weights from training label maps (N, 1, H, W) uint8: the mean frequency over each class's own, at most 10,
    0 for a class that does not occur: (classes,) float32."""
    counts = common.level_counts(labels)[0, :classes]
    occurring = counts[counts > 0].mean() if counts.any() else 1.0
    return torch.tensor(np.where(counts > 0, np.minimum(occurring / np.maximum(counts, 1), 10.0), 0.0)).float()


# -------------------------------------------------------------------------------------------------------------- build


@dataclasses.dataclass
class State:
    """Everything that training changes and a checkpoint holds; `style` is the style loss, which neither is."""

    G: nn.Module
    D: nn.Module
    class_weights: torch.Tensor
    opt_G: torch.optim.Optimizer | None = None
    opt_D: torch.optim.Optimizer | None = None
    style: Callable | None = None


def build(cfg, device, training=True):
    """Networks, class weights (1 until the training land cover says more), optimisers and style loss, on the device."""
    classes = common.ClassTable.load(cfg.lc_classes)
    if classes is None:
        raise UserError("--lc-classes: the networks need to know how many classes there are")
    G = common.place(init_weights(Generator(len(classes), cfg.width, cfg.dropout)), device)
    D = common.place(init_weights(Discriminator(len(classes), cfg.width)), device)
    state = State(G, D, torch.ones(len(classes), device=device))
    if training:
        vgg = VGG16Features([n for n in cfg.style_layers.split(",") if n], cfg.style_features, cfg.vgg16)
        state.style = functools.partial(style_loss, common.place(vgg, device))
        state.opt_G, state.opt_D = common.adam(G, cfg, device), common.adam(D, cfg, device)
    return state


# --------------------------------------------------------------------------------------------------------- train_step


def train_step(state, batch, cfg):
    """One update of the discriminator, then one of the generator. batch as Edits makes it.

    L_D = 1/2 [GAN(D(b), 1) + GAN(D(G(x)), 0)] + class loss of b
    L_G = adv_lambda * GAN(D(G(x)), 1) + pixel_lambda * L1(G(x), rgb_ab) + style_lambda * style(G(x), rgb_ab)
          + class_lambda * class loss of G(x) + id_lambda * [L1 + style](G(rgb_a, lc_a), rgb_a)
    """
    rgb_a, lc_ab, rgb_ab, _, lc_a, rgb_b, lc_b = batch
    with common.autocast(cfg, rgb_a.device):
        fake = state.G(rgb_a, lc_ab)
        logits_fake = state.D(fake.detach(), lc_ab)  # the D step must not reach G
        logits_real, classes_real = state.D.both(rgb_b, lc_b)
    d_fake, d_real = gan_loss(logits_fake, False), gan_loss(logits_real, True)
    d_class = class_loss(classes_real, lc_b, state.class_weights)
    state.opt_D.zero_grad()
    (0.5 * (d_real + d_fake) + d_class).backward()
    common.average_gradients(state.D)
    state.opt_D.step()

    with common.autocast(cfg, rgb_a.device):
        logits_fake, classes_fake = state.D.both(fake, lc_ab)
        same = state.G(rgb_a, lc_a)
    g_adv, g_class = gan_loss(logits_fake, True), class_loss(classes_fake, lc_ab, state.class_weights)
    g_pixel, g_style = l1_loss(fake, rgb_ab), state.style(fake, rgb_ab)
    g_id = l1_loss(same, rgb_a) + state.style(same, rgb_a)
    loss_g = cfg.adv_lambda * g_adv + cfg.pixel_lambda * g_pixel + cfg.style_lambda * g_style
    loss_g = loss_g + cfg.class_lambda * g_class + cfg.id_lambda * g_id
    state.opt_G.zero_grad()
    loss_g.backward(inputs=list(state.G.parameters()))  # the G step leaves D's gradients alone
    common.average_gradients(state.G)
    state.opt_G.step()
    losses = {"g_adv": g_adv, "g_pixel": g_pixel, "g_style": g_style, "g_class": g_class, "g_id": g_id}
    return losses | {"d_real": d_real, "d_fake": d_fake, "d_class": d_class}


# ---------------------------------------------------------------------------------------------------------- translate


@torch.no_grad()
def translate(state, inputs, cfg):
    """inputs = (rgb (B, 3, S, S) in [-1, 1], land cover (B, classes, S, S)) -> photographs (B, 3, S, S), float32.

    Dropout stays on: it is the noise, and two calls differ. --eval-norm running: BatchNorm uses running statistics;
    batch: the statistics of the image itself.
    """
    own_statistics = cfg.eval_norm == "batch"
    set_mode(state.G, own_statistics, track=not own_statistics)
    for module in state.G.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    size = 1 if own_statistics else len(inputs[0])
    with common.autocast(cfg, inputs[0].device):
        fakes = [state.G(rgb, lc) for rgb, lc in zip(*(x.split(size) for x in inputs), strict=True)]
    set_mode(state.G, True, track=True)
    return torch.cat(fakes).float()


def set_mode(net, training, track):
    """net.train(training); with track off, BatchNorm in training mode leaves its running statistics as they are."""
    for module in net.train(training).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = track


@torch.no_grad()
def classified(net, image, lc, mask):
    """What a classifier sees of the land cover lc in the mask of an edit: a confusion matrix (classes, classes)."""
    set_mode(net, False, track=True)
    target = torch.where((lc.sum(1) > 0) & mask[:, 0], lc.argmax(1), common.IGNORED)
    confusion = common.confusion_matrix(net.classify(image).argmax(1), target, lc.shape[1]).cpu()
    net.train()
    return confusion


def evaluate(state, val, cfg, count, constants=None, judge=None):
    """Measures over the first `count` validation edits, {row: {measure: mean}}: the model, the copy of rgb_a, and
    `constants`, {name: (3,) colour in [-1, 1]}.

    l1 (levels 0-255), psnr (dB)  against rgb_ab, inside the box and outside it; l1_to_input against rgb_a, inside
    own_accuracy, own_iou         whether D's classifier sees the requested land cover inside the box
    judge_accuracy, judge_iou     whether `judge` does, a classifier that only ever saw photographs
    The copy of rgb_a is the floor of the classifiers' measures, and the photograph b the ceiling.
    """
    torch.manual_seed(cfg.seed)
    sums, pixels, confusions = {}, torch.zeros(2, 1), {}
    judges = {"own": state.D} | ({"judge": judge} if judge else {})
    for rgb_a, lc_ab, rgb_ab, box, _, rgb_b, lc_b in val.in_order(count):
        guesses = {"model": translate(state, (rgb_a, lc_ab), cfg), "copy of rgb_a": rgb_a}
        mask = edit_mask(box, cfg.size)
        for row, image, lc in (*((k, v, lc_ab) for k, v in guesses.items()), ("photograph b", rgb_b, lc_b)):
            for name, net in judges.items():
                confusions[row, name] = confusions.get((row, name), 0) + classified(net, image, lc, mask)
        guesses |= {
            name: color.to(rgb_a).view(1, 3, 1, 1).expand_as(rgb_a) for name, color in (constants or {}).items()
        }
        masks = torch.stack([mask, ~mask]).float()  # (2, B, 1, S, S): the edit, and what it leaves
        pixels += masks.sum((1, 2, 3, 4)).cpu().view(2, 1) * 3
        for row, guess in guesses.items():
            guess, target, source = (common.to_bytes(image).float() for image in (guess, rgb_ab, rgb_a))
            errors = (guess - target).abs(), (guess - target).square(), (guess - source).abs()
            errors = torch.stack([(masks * e).sum((1, 2, 3, 4)) for e in errors], 1)
            sums[row] = sums.get(row, 0) + errors.double().cpu()  # (2 areas, L1, MSE, L1 to the input)
    rows = {}
    for row, total in sums.items():
        (l1_in, mse_in, to_input), (l1_out, mse_out, _) = (total / pixels).tolist()
        psnr_in, psnr_out = (10 * np.log10(255**2 / max(mse, 1e-10)).item() for mse in (mse_in, mse_out))
        rows[row] = {"l1_inside": l1_in, "psnr_inside": psnr_in, "l1_outside": l1_out, "psnr_outside": psnr_out}
        rows[row]["l1_to_input"] = to_input  # inside
    for (row, name), confusion in confusions.items():
        measured = common.measure_labels(confusion)
        scores = {f"{name}_accuracy": measured["pixel_accuracy"], f"{name}_iou": measured["mean_iou"]}
        rows[row] = rows.get(row, {}) | scores
    return rows


# --------------------------------------------------------------------------------------------------------------- main


def show_samples(train, cfg):
    """Writes a picture of --show-samples training edits to samples.png in --out, the box drawn."""
    plan = train.plan(np.random.default_rng([cfg.seed, 0]), np.arange(len(train)), flips=1)
    a, b, box = next(train.tiles(*(x[None, : cfg.show_samples] for x in plan)))
    rgb_a, lc_ab, rgb_ab, box, lc_a, rgb_b, lc_b = train.edit(a, b, box)
    lc_a, lc_b, lc_ab = map(train.picture, (lc_a, lc_b, lc_ab))
    columns = {"rgb_a": rgb_a, "lc_a": lc_a, "rgb_b": rgb_b, "lc_b": lc_b, "lc_ab": lc_ab, "rgb_ab": rgb_ab}
    mask = edit_mask(box, cfg.size).float()
    frame = F.max_pool2d(mask, 3, 1, 1) - mask  # one pixel around the box
    common.save_grid(Path(cfg.out) / "samples.png", {k: x * (1 - frame) + frame for k, x in columns.items()})
    print(f"written to {Path(cfg.out) / 'samples.png'}")


def generate(state, cfg, device):
    """Edits --generate's photograph as --lc and --paint say, and writes --samples answers to --out with a before/after
    sheet; and, of several, the standard deviation, white at 32 levels or more, as a picture."""
    classes, small = common.ClassTable.load(cfg.lc_classes), (cfg.size, cfg.size)
    path, photo, before, after = common.read_edit(cfg, classes)
    rgb = common.as_tensor(common.resize(photo, small), device)
    label = common.as_tensor(common.resize(after, small, labels=True), device)
    pictures = {"before": photo, "land cover": None if before is None else classes.palette[before]}
    pictures |= {"edited land cover": classes.palette[after]}
    answers, names = [], [path.name]
    if cfg.samples > 1:
        names = [f"{path.stem}_{k}{path.suffix}" for k in range(1, cfg.samples + 1)]
    torch.manual_seed(cfg.seed)
    for name in names:
        fake = translate(state, (common.from_bytes(rgb), one_hot(label, len(classes))), cfg)
        edited = common.resize(common.as_array(fake), photo.shape[1::-1])
        if cfg.keep_outside:
            edited = common.keep_outside(edited, photo, before, after)
        common.write_image(Path(cfg.out) / name, edited)
        answers.append(edited)
        pictures[f"after {len(answers)}"] = edited
    if cfg.samples > 1:
        spread = np.stack(answers).astype(np.float32).std(0).mean(-1, keepdims=True)
        pictures["where they differ"] = np.minimum(spread * 8, 255).astype(np.uint8).repeat(3, -1)
        common.write_image(Path(cfg.out) / f"{path.stem}_differences.png", pictures["where they differ"])
    common.save_sheet(Path(cfg.out) / f"{path.stem}_sheet.png", pictures)
    print(f"{len(answers)} edits written to {cfg.out}, with a before/after sheet beside them")


def train_judge(cfg, train, device, path):
    """A classifier of the discriminator's shape, trained on photographs and their land cover alone; kept in path."""
    judge = common.place(init_weights(Discriminator(len(train.classes), cfg.width)), device)
    optimizer, weights = (
        common.adam(judge, cfg, device),
        inverse_frequency(train.store.B, len(train.classes)).to(device),
    )
    for epoch in common.tqdm(range(cfg.judge_epochs), "training the judge", unit="epoch", leave=False, disable=None):
        for *_, rgb_b, lc_b in train.batches(epoch):
            with common.autocast(cfg, device):
                logits = judge.classify(rgb_b)
            optimizer.zero_grad()
            class_loss(logits, lc_b, weights).backward()
            common.average_gradients(judge)
            optimizer.step()
    common.save_checkpoint(path, {"script": "mixlc_acgan", "config": {}, "state": {"judge": judge.state_dict()}})
    return judge


def copy_verdict(rows):
    """Whether the generator copies its input, in a sentence. It does where what it paints is nearer to rgb_a than to
    rgb_ab, and has not even gone half the way that lies between the two."""
    target, source = (rows["model"][name] for name in ("l1_inside", "l1_to_input"))
    copy = rows["copy of rgb_a"]["l1_inside"]
    verdict = "it does not copy its input"
    if source < target:
        verdict = "it copies its input" if source < copy / 2 else "it neither copies its input nor hits the target"
    return f"inside the edit the model is {target:.2f} levels from the target (a copy of rgb_a {copy:.2f}) and " + (
        f"{source:.2f} from its input: {verdict}"
    )


def report(state, train, val, cfg, device):
    """The whole validation split beside baselines that cost nothing: printed, and written to evaluation.json; and the
    question whether the generator copies its input, answered. A judge kept in the run folder judges, too."""
    judge, path = None, Path(cfg.out) / "judge.pt"
    if cfg.train_judge and not path.is_file():
        judge = train_judge(cfg, train, device, path)
    elif path.is_file():
        print(f"the judge is {path}; without that file --train-judge trains another")
        judge = Discriminator(len(train.classes), cfg.width).to(device)
        common.restore(SimpleNamespace(judge=judge), common.load_checkpoint(path, "mixlc_acgan")["state"], path)
    rows = evaluate(state, val, cfg, len(val), common.constant_guesses(train.store.A), judge)
    answer = copy_verdict(rows)
    common.write_evaluation(cfg, rows, images=len(val), split=val.store.split.name, answer=answer)
    print(answer)


@common.command
def main(argv=None):
    cfg, given = common.parse(Config, __doc__, QUICK, argv)
    device = common.start(cfg)
    cfg, checkpoint = common.settle(cfg, given, "mixlc_acgan")
    if cfg.generate or cfg.evaluate:
        state = build(cfg, device, training=False)
        common.restore(state, checkpoint["state"], cfg.checkpoint)
        if cfg.evaluate:
            report(state, Edits(cfg, "train", device), Edits(cfg, "val", device), cfg, device)
        if cfg.generate:
            generate(state, cfg, device)
        return

    train = Edits(cfg, "train", device)
    if cfg.show_samples:
        show_samples(train, cfg)
        return
    val = Edits(cfg, "val", device)
    cfg = dataclasses.replace(cfg, lc_classes=train.classes.text)  # the checkpoint keeps the whole table
    state = build(cfg, device)
    if checkpoint:
        common.restore(state, checkpoint["state"], cfg.out)
    elif cfg.class_weights:
        state.class_weights.copy_(inverse_frequency(train.store.B, len(train.classes)))
    run = common.Run(
        cfg, checkpoint, "mixlc_acgan", train.steps, scores=("val_l1_inside", "val_l1_outside", "val_own_iou")
    )
    step = common.fast_step(train_step, cfg, device)
    sample = next(val.in_order(min(cfg.sample_rows, len(val)), cfg.sample_rows))
    rgb_a, lc_ab, rgb_ab = sample[:3]
    for epoch in range(run.epoch, cfg.epochs):
        run.lr = cfg.lr
        for batch in train.batches(epoch, run.batch):
            common.seed_step(cfg.seed, epoch, run.batch)
            run.log(step(state, batch, cfg))
            if run.stopping():
                run.stop(state)
        scores = evaluate(state, val, cfg, min(cfg.val_images or len(val), len(val)))["model"]
        columns = {"rgb_a": rgb_a, "lc_ab": val.picture(lc_ab), "fake": translate(state, (rgb_a, lc_ab), cfg)}
        scores = {f"val_{name}": scores[name] for name in ("l1_inside", "l1_outside", "own_iou")}
        run.end_epoch(state, scores, columns | {"rgb_ab": rgb_ab})
    run.close()
    report(state, train, val, cfg, device)


if __name__ == "__main__":
    main()
