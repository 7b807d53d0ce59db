"""mixlc_acgan: the edit of mixlc, with a two-headed discriminator and a style loss.

A second head of the discriminator learns to classify every pixel of real photographs. Its loss
teaches the generator to show the classes that were asked for. A style loss compares textures
through Gram matrices of VGG16 features. Noise and dropout give an edit several results.

    python mixlc_acgan.py --data denmark/ --lc-classes s2glc    rgb/ and lc/ folders, 14 classes
    python mixlc_acgan.py --data maps/ --lc-classes maps        the map half becomes land cover
    python mixlc_acgan.py --quick                               no data, a minute: a demo world
    python mixlc_acgan.py --data maps/ --lc-classes maps --show-samples 8    a picture of 8 edits
    python mixlc_acgan.py --evaluate --train-judge --checkpoint X
    python mixlc_acgan.py --generate a.png --lc a_lc.png --paint water:80,96,64,48 --checkpoint X

Papers: Odena, Olah, Shlens 2017, Conditional Image Synthesis With Auxiliary Classifier GANs,
arXiv:1610.09585; Johnson, Alahi, Fei-Fei 2016, Perceptual Losses for Real-Time Style Transfer and
Super-Resolution, arXiv:1603.08155.

Differences from the original system, which has no paper (options in brackets: nearest to it):
- In the photograph that the generator gets, noise replaces the edit (--no-erase: it stays). The
  discriminator gets the edit within its photograph (--no-composite: all of the generator's output).
- Half of the edits ask for the land cover that is there, instead of an identity loss on all
  (--own 0 --lambda-id 0.1), and boxes have any size (--box center). Other edits are compared
  with a collage, as in the original, also by L1, although it is one of many right answers.
- The original classifier was given its own target as input. Here it gets the photograph alone, and
  only the adversarial head gets land cover, too. In Odena et al. neither head gets the class.
- The classifier's loss on fakes teaches the generator, as in Odena et al. The classifier itself
  learns from real photographs alone. In the paper (equation 3) it learns from fakes as well, but a
  fake does not yet show the classes that were asked for.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import UserError, option

# ----------------------------------------------------------------------------------------- networks


def block(conv, dropout=0.0):
    """Convolution (BatchNorm cancels its bias), BatchNorm, Dropout, ReLU."""
    layers = [conv, nn.BatchNorm2d(conv.out_channels)]
    if dropout > 0:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.ReLU())


def down_block(channels_in, channels, padding="zeros"):
    """Strided convolution, BatchNorm, LeakyReLU: to half the side."""
    conv = nn.Conv2d(channels_in, channels, 4, 2, 1, padding_mode=padding)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.LeakyReLU(0.2))


class UNet(nn.Module):
    """Five down blocks, two at the bottom, four up: (B, C, S, S) -> (B, 64, S/2, S/2)."""

    def __init__(self, channels_in, width, dropout):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width, 16 * width]  # 64 128 256 512 1024
        self.downs = nn.ModuleList([down_block(channels_in, width, "reflect")])
        for channels, out in itertools.pairwise(widths):
            self.downs.append(down_block(channels, out))
        channels = widths[-1]
        self.bottom = nn.Sequential(
            block(nn.Conv2d(channels, channels, 3, 1, 1), dropout),
            block(nn.Conv2d(channels, channels, 3, 1, 1), dropout),
        )
        self.ups = nn.ModuleList()
        for out in reversed(widths[:-1]):
            self.ups.append(block(nn.ConvTranspose2d(channels, out, 4, 2, 1), dropout))
            channels = 2 * out  # with the skip
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
    """Two 3x3 convolutions with BatchNorm and a shortcut (after arXiv:1603.08155)."""

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(
            block(nn.Conv2d(channels, channels, 3, 1, 1)),
            nn.Conv2d(channels, channels, 3, 1, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return x + self.layers(x)


class Generator(nn.Module):
    """Photograph (B, bands, S, S) in [-1, 1], land cover (B, classes, S, S) -> (B, bands, S, S)."""

    def __init__(self, classes, bands, width, dropout):
        super().__init__()
        self.rgb_net = UNet(bands, width, dropout)
        self.lc_net = UNet(classes, width, dropout)
        self.output_net = nn.Sequential(
            block(nn.ConvTranspose2d(2 * width, width, 4, 2, 1)),
            ResidualBlock(width),
            nn.Conv2d(width, bands, 3, 1, 1),
            nn.Tanh(),
        )

    def forward(self, rgb, lc):
        x = torch.cat([self.rgb_net(rgb), self.lc_net(lc)], 1)  # (B, 128, S/2, S/2)
        return self.output_net(x)


class Discriminator(nn.Module):
    """Two heads on one trunk, which gets the photograph alone (Odena et al. 2017, section 3).

    forward: real or fake? Logits (B, 1, S/32, S/32) of a photograph (B, bands, S, S), given the
    share of every class of its land cover (B, classes, S, S) at each logit.
    classify: class logits of every pixel, (B, classes, S, S), from the photograph alone: a
    classifier with land cover in its input would copy it, and teach nothing.
    """

    def __init__(self, classes, bands, width, dropout=0.0):
        super().__init__()
        layers, channels = [], bands
        for out in (width, 2 * width, 4 * width, 8 * width, 16 * width):  # 64 .. 1024
            layers += [down_block(channels, out), nn.Dropout(dropout)]
            channels = out
        for _ in range(2):
            conv = nn.Conv2d(channels, channels, 3, 1, 1)
            layers.append(nn.Sequential(conv, nn.BatchNorm2d(channels), nn.LeakyReLU(0.2)))
        self.trunk = nn.Sequential(*layers)  # (B, 1024, S/32, S/32)
        self.real_head = nn.Sequential(  # one layer would only add features and class shares
            nn.Conv2d(channels + classes, 4 * width, 3, 1, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 3, 1, 1),
        )
        layers = []
        for out in (8 * width, 4 * width, 2 * width, width, width):  # 512 at S/16 .. 64 at S
            layers.append(block(nn.ConvTranspose2d(channels, out, 4, 2, 1)))
            channels = out
        self.class_head = nn.Sequential(*layers, nn.Conv2d(width, classes, 3, 1, 1))

    def forward(self, image, lc):
        return self.real_or_fake(self.trunk(image), lc)

    def classify(self, image):
        """The class logits of every pixel."""
        return self.class_head(self.trunk(image))

    @torch.no_grad()
    def classes_of(self, image):
        """The likeliest class of a pixel, (B, S, S), by running statistics of reals and fakes."""
        self.eval()
        classes = self.classify(common.filled(image)).argmax(1)
        self.train()
        return classes

    def both(self, image, lc):
        """(real or fake logits, class logits) with the trunk run once."""
        features = self.trunk(image)
        return self.real_or_fake(features, lc), self.class_head(features)

    def real_or_fake(self, features, lc):
        """The adversarial head, on features of the trunk."""
        shares = F.adaptive_avg_pool2d(lc, features.shape[-2:]).to(features.dtype)
        return self.real_head(torch.cat([features, shares], 1))


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


# ------------------------------------------------------------------------------------------- losses


def gan_loss(logits, is_real, near):
    """Cross-entropy of logits with "real" (1) or "fake" (0): a scalar.

    Goodfellow et al. 2014 (arXiv:1406.2661), equation 1, with the -log D(G(x)) of its section 3.
    near  (B, 1, S, S) bool: a logit of (B, 1, P, P) counts if its S/P x S/P cell touches it
    """
    logits = common.full_precision(logits)
    target = torch.full_like(logits, float(is_real))
    touched = F.adaptive_max_pool2d(near.float(), logits.shape[-2:]).to(logits)  # 1 or 0
    total = F.binary_cross_entropy_with_logits(logits, target, touched, reduction="sum")
    return total / touched.sum().clamp_min(1)


def grown(mask):
    """The mask of an edit, (B, 1, S, S), with a border around it, 12 pixels at 256: bool."""
    border = round(12 * mask.shape[-1] / 256)
    return F.max_pool2d(mask.float(), 2 * border + 1, 1, border) > 0


def l1_loss(fake, target):
    """Mean absolute difference where target is not NaN, arXiv:1611.07004, equation 3: a scalar."""
    known = ~target.isnan()
    difference = common.full_precision(fake) - common.full_precision(target)
    return torch.where(known, difference, 0.0).abs().sum() / known.sum().clamp_min(1)


def class_loss(logits, target, weights):
    """Cross-entropy of logits (B, classes, S, S) against one-hot land cover: a scalar.

    Over the pixels that have a class, weighted by weights (classes,) of their class. Odena et al.
    2017, equation 3.
    """
    weighted = target * weights.to(target.dtype).view(1, -1, 1, 1)
    log_likelihood = (common.full_precision(logits).log_softmax(1) * weighted).sum()
    return -log_likelihood / weighted.sum().clamp_min(1e-6)


def style_loss(vgg, fake, target):
    """Squared Frobenius distance of Gram matrices, the sum over layers: a scalar.

    Johnson et al. 2016, equation 4, of features that VGG16Features scales; the mean over the batch.
    Gram matrices are float32 under any autocast: they are sums of thousands of products, for which
    bf16 has too few digits.
    """
    loss = 0.0
    fake, target = common.filled_alike(fake, target)
    with torch.autocast(fake.device.type, enabled=False):
        layers_fake = vgg(common.full_precision(fake))
        layers_target = vgg(common.full_precision(target))
        for layer_fake, layer_target in zip(layers_fake, layers_target, strict=True):
            difference = common.gram(layer_fake) - common.gram(layer_target)
            loss = loss + difference.square().sum((1, 2)).mean()
    return loss


def inverse_frequency(counts):
    """Class weights, (classes,) float32, from the number of pixels of each class, (classes,).

    The mean number / the class's own, at most 10; 0 for a class that does not occur.
    """
    counts = counts.double()
    mean = counts[counts > 0].mean()
    return torch.where(counts > 0, (mean / counts).clamp_max(10.0), 0.0).float()


# ------------------------------------------------------------------------------------------- Config


@dataclasses.dataclass(frozen=True)
class Config(common.EditOptions):
    """The model's own options; common.EditOptions has data, size, box, erase and so on.

    A group includes the options below it. A checkpoint fixes group "model" and `fixed` options.
    """

    script = "mixlc_acgan"

    dropout: float = option(0.5, "noise: dropout of G, always on", group="model", low=0.0, high=0.9)
    d_dropout: float = option(0.0, "dropout of D's trunk", low=0.0, high=0.9)
    lambda_adv: float = option(0.05, "weight of the adversarial loss", group="training", low=0.0)
    lambda_l1: float = option(0.5, "weight of the L1 loss", low=0.0)
    lambda_style: float = option(0.45, "weight of the style loss", low=0.0)
    lambda_class: float = option(0.05, "weight of the class loss of the fake", low=0.0)
    lambda_id: float = option(0.0, "weight of the identity loss", low=0.0)
    class_weights: bool = option(True, "weight the class losses by inverse frequency")
    style_features: str = option(
        "vgg16", "VGG16 of the style loss: vgg16 (ImageNet), random", choices=("vgg16", "random")
    )
    style_layers: str = option("relu3_3", "layers of the style loss, such as relu1_2,relu3_3")
    vgg16: str = option("", "VGG16's weights; unset: from torch.hub", file=True, may_change=True)
    lr: float = option(2e-4, "learning rate of Adam", low=0.0)
    batch_size: int = option(16, "edits in a step of one process", low=1, fixed=True)
    epochs: int = option(200, "passes over the training images", low=1, high=10**6, may_change=True)


QUICK = {"size": 64, "width": 12, "batch_size": 4, "epochs": 8, "log_every": 12, "lr": 5e-4}
QUICK |= {"style_features": "random", "style_layers": "relu2_2"}
SCORES = ("l1_inside", "l1_outside", "own_mean_iou")  # of evaluate; own_: by D's classifier

# --------------------------------------------------------------------------------------------- data


class Edit(NamedTuple):
    """A batch of edits. With --use-ba half of them are complements: b edited outside the box.

    Own edits ask for the land cover that is there: lc_ab is lc_a, and rgb_ab is rgb_a.
    """

    rgb_a: torch.Tensor  # (B, C, S, S) in [-1, 1], the input
    lc_ab: torch.Tensor  # (B, classes, S, S) one-hot, zeros where ignored: what is asked for
    rgb_ab: torch.Tensor  # (B, C, S, S) in [-1, 1], the target
    box: torch.Tensor  # (B, 4) top, left, height, width
    inside: torch.Tensor  # (B,) bool: the edit lies inside the box, else outside it
    lc_a: torch.Tensor  # (B, classes, S, S) the input's own land cover
    rgb_b: torch.Tensor  # (B, C, S, S) an untouched photograph, for the discriminator
    lc_b: torch.Tensor  # (B, classes, S, S) its land cover
    own: torch.Tensor  # (B,) bool: own edits


class Edits:
    """Edits made of two tiles a and b: a box of b's photograph and land cover is pasted into a.

    Both tiles are mirrored and turned upside down half of the time, each on its own, photograph
    and land cover together.
    """

    def __init__(self, cfg, split, device):
        self.cfg, self.device = cfg, device
        self.store = common.ImageStore(cfg, split, cfg.size)
        self.classes = self.store.classes
        if not self.store.paired:
            raise UserError(f"--data {cfg.data}: edits need pairs, which trainA and trainB are not")
        if not self.classes:
            remedy = "pass --lc-classes (maps for the maps data)"
            raise UserError(f"--data {cfg.data}: edits need land cover: {remedy}")
        if len(self.store.records) < 2:
            raise UserError(f"--data {cfg.data}: split {split} has one image; an edit needs two")
        self.loader = common.Loader(self.store.records, device)

    def __len__(self):
        return len(self.loader)

    def choose(self, rng, order, box):
        """For every image a of `order` a partner b, never a itself, and a box: (N,), (N, 4)."""
        size, count = self.cfg.size, len(order)
        partner = (order + rng.integers(1, len(self), count)) % len(self)
        shortest, longest = {"center": (3, 3), "random": (1, 4), "any": (1, 8)}[box]  # eighths
        side = rng.integers(size * shortest // 8, size * longest // 8 + 1, count)
        room = size - side[:, None]
        corner = rng.integers(0, room + 1, (count, 2))
        if box == "center":
            corner[:] = room // 2
        return partner, np.column_stack([corner, side, side])

    def batches(self, epoch, first=0):
        """An epoch's batches from batch `first` on: the same for the same seed, epoch and rank."""
        rng = np.random.default_rng([self.cfg.seed, epoch])
        order = rng.permutation(len(self))
        partner, boxes = self.choose(rng, order, self.cfg.box)
        turns = common.turns("both" if self.cfg.flip == "auto" else self.cfg.flip)
        flips = rng.integers(0, (*turns, *turns), (len(self), 4))  # flip, upside_down: of a, of b
        own = rng.random(len(self)) < self.cfg.own
        plan = common.batches_of_rank(self.cfg.batch_size, first, order, partner, boxes, flips, own)
        yield from self.pasted(*plan, self.cfg.use_ba)

    def in_order(self, images):
        """Images by index, unflipped, with the same partners each time and boxes in the middle."""
        rng = np.random.default_rng(1)
        partner, boxes = self.choose(rng, np.arange(len(self)), "center")
        flips, own = np.zeros((len(self), 4), np.int64), np.zeros(len(self), bool)
        for index in common.chunks(images):
            plan = index, partner[index], boxes[index], flips[index], own[index]
            yield from self.pasted(*(part[None] for part in plan))

    def pasted(self, index_a, index_b, boxes, flips, own, use_ba=False):
        """Batches of edits: image numbers and own (steps, B), boxes and flips (steps, B, 4)."""
        boxes, own = (torch.from_numpy(x).to(self.device) for x in (boxes, own))
        tiles_a, tiles_b = self.loader.batches(index_a), self.loader.batches(index_b)
        for a, b, box, flip, is_own in zip(tiles_a, tiles_b, boxes, flips, own, strict=True):
            a, b = mirror(a, flip[:, :2].tolist()), mirror(b, flip[:, 2:].tolist())
            yield self.paste(a, b, box, is_own, use_ba)

    def paste(self, a, b, box, own, use_ba):
        """Records a and b (B, C, S, S), box (B, 4) and own (B,) -> an Edit."""
        inside = torch.ones_like(own)
        if use_ba:
            a, b, inside = torch.cat([a, b]), torch.cat([b, a]), torch.cat([inside, ~inside])
            box, own = torch.cat([box, box]), torch.cat([own, own])
        pasted = edit_mask(box, inside, self.cfg.size) & ~own.view(-1, 1, 1, 1)
        ab = torch.where(pasted, b, a)
        rgb_a, rgb_b, rgb_ab = (self.store.images("A", x) for x in (a, b, ab))
        labels = (self.store.images("B", x) for x in (a, b, ab))
        lc_a, lc_b, lc_ab = (common.one_hot(x, len(self.classes)) for x in labels)
        return Edit(rgb_a, lc_ab, rgb_ab, box, inside, lc_a=lc_a, rgb_b=rgb_b, lc_b=lc_b, own=own)


def mirror(images, flips):
    """B images (C, S, S) and for each (flip, upside_down) -> (B, C, S, S)."""
    mirrored = []
    for image, (flip, upside_down) in zip(images, flips, strict=True):
        image = image.flip(2) if flip else image
        mirrored.append(image.flip(1) if upside_down else image)
    return torch.stack(mirrored)


def edit_mask(box, inside, size):
    """Where the edit is: box (B, 4), inside (B,) -> (B, 1, size, size) bool."""
    along = torch.arange(size, device=box.device)
    top, left, height, width = box[:, :, None].unbind(1)  # (B, 1) each
    y = (along >= top) & (along < top + height)  # (B, size)
    x = (along >= left) & (along < left + width)
    within = y[:, None, :, None] & x[:, None, None, :]
    return torch.where(inside.view(-1, 1, 1, 1), within, ~within)


def visible(edit, cfg):
    """rgb_a as the generator gets it: whole, or with --erase noise in place of the edit.

    Noise leaves nothing to copy, shows G the place of the edit, and makes room for texture.
    Iizuka et al. (doi:10.1145/3072959.3073659) fill in the mean colour, and give G the mask.
    """
    mask = edit_mask(edit.box, edit.inside, cfg.size)
    rgb = common.filled(edit.rgb_a)
    return torch.where(mask, 0.5 * torch.randn_like(rgb), rgb) if cfg.erase else rgb


# -------------------------------------------------------------------------------------------- build


@dataclasses.dataclass
class State:
    """Networks, optimisers, tensors and numbers that a checkpoint keeps; vgg is not kept."""

    G: nn.Module
    D: nn.Module
    class_weights: torch.Tensor
    opt_G: torch.optim.Optimizer | None = None
    opt_D: torch.optim.Optimizer | None = None
    vgg: nn.Module | None = None


def build(cfg, device, training=True):
    """Networks, class weights (1 until main counts the classes) and optimisers on the device.

    Without `training` neither optimisers nor VGG16.
    """
    if not cfg.classes:
        raise UserError("edits need land cover: pass --lc-classes s2glc, maps, binary or a file")
    classes, bands = len(cfg.classes), cfg.channels("A")
    G = init_weights(Generator(classes, bands, cfg.width, cfg.dropout))
    D = init_weights(Discriminator(classes, bands, cfg.width, cfg.d_dropout))
    G, D = common.to_device(G, device), common.to_device(D, device)
    state = State(G, D, torch.ones(classes, device=device))
    if not training:
        return state
    state.opt_G = common.adam(state.G, cfg, device)
    state.opt_D = common.adam(state.D, cfg, device)
    layers = [name for name in cfg.style_layers.split(",") if name]
    vgg = common.VGG16Features(layers, cfg.style_features, cfg.vgg16, common.autocast(cfg, device))
    state.vgg = common.to_device(vgg, device)
    return state


# --------------------------------------------------------------------------------------- train_step


def train_step(state, batch, cfg):
    """One update of D, then one of G. batch = an Edit, or a tuple of its fields.

    fake = G(rgb_a, lc_ab), same = G(rgb_a, lc_a); with --erase rgb_a has noise in the edit
    shown = fake pasted into rgb_a; with --no-composite fake, all of which then counts as the edit
    L_D = 1/2 [GAN(D(rgb_b, lc_b), 1) + GAN(D(shown, lc_ab), 0)] + class loss of rgb_b
    L_G = lambda_adv * GAN(D(shown, lc_ab), 1) + lambda_l1 * L1(fake, rgb_ab)
          + lambda_style * style(fake, rgb_ab) + lambda_class * class loss of shown
          + lambda_id * [L1 + style](same, rgb_a)
    GAN, and the class loss of shown, count in and around the edit.
    """
    edit = Edit(*batch)
    mask = edit_mask(edit.box, edit.inside, cfg.size)
    near = grown(mask) if cfg.composite else torch.ones_like(mask)
    rgb = visible(edit, cfg)
    known = ~(edit.rgb_a + edit.rgb_b)[:, :1].isnan()  # both photographs have data
    real = edit.rgb_b.masked_fill(~known, torch.nan)
    rgb_a, rgb_b = common.filled(edit.rgb_a), common.filled(real)
    with common.autocast(cfg, rgb.device):
        fake = state.G(rgb, edit.lc_ab)
        shown = torch.where(mask, fake, rgb_a) if cfg.composite else fake
        shown = common.holes_of(real, shown)  # D sees the same holes in both
        logits_fake = state.D(shown.detach(), edit.lc_ab)  # the D step must not reach G
        logits_real, classes_real = state.D.both(rgb_b, edit.lc_b)
    d_real = gan_loss(logits_real, True, near)
    d_fake = gan_loss(logits_fake, False, near)
    d_class = class_loss(classes_real, edit.lc_b * known, state.class_weights)
    loss_d = 0.5 * (d_real + d_fake) + d_class
    state.opt_D.zero_grad()
    loss_d.backward()
    common.average_gradients(state.D)
    state.opt_D.step()

    with common.autocast(cfg, rgb.device):  # anew: the first one cached casts of D's old weights
        logits_fake, classes_fake = state.D.both(shown, edit.lc_ab)
    losses = {
        "g_adv": gan_loss(logits_fake, True, near),
        "g_pixel": l1_loss(fake, edit.rgb_ab),
        "g_style": style_loss(state.vgg, fake, edit.rgb_ab),
        "g_class": class_loss(classes_fake, edit.lc_ab * (near & known), state.class_weights),
    }
    loss_g = cfg.lambda_adv * losses["g_adv"] + cfg.lambda_l1 * losses["g_pixel"]
    loss_g = loss_g + cfg.lambda_style * losses["g_style"] + cfg.lambda_class * losses["g_class"]
    if cfg.lambda_id:
        with common.autocast(cfg, rgb.device):
            same = state.G(rgb, edit.lc_a)
        losses["g_id"] = l1_loss(same, edit.rgb_a) + style_loss(state.vgg, same, edit.rgb_a)
        loss_g = loss_g + cfg.lambda_id * losses["g_id"]
    state.opt_G.zero_grad()
    loss_g.backward(inputs=list(state.G.parameters()))  # no gradients for D's weights
    common.average_gradients(state.G)
    state.opt_G.step()
    return losses | {"d_real": d_real, "d_fake": d_fake, "d_class": d_class}


# --------------------------------------------------------------------------------------------- main


@common.command
def main(argv=None):
    cfg, device, checkpoint = common.begin(Config, __doc__, QUICK, argv)
    if cfg.using:  # --evaluate, --generate or --serve
        use(cfg, device, checkpoint)
        return
    if cfg.show_samples:
        show_samples(cfg, device)
        return
    state = build(cfg, device)
    if checkpoint:
        common.restore(state, checkpoint, cfg.out)
    train, val = Edits(cfg, "train", device), Edits(cfg, "val", device)
    run = common.Run(cfg, checkpoint, train, scores=[f"val_{name}" for name in SCORES])
    if cfg.class_weights and not checkpoint:
        counts = run.histograms["B"][0, : len(cfg.classes)]
        state.class_weights.copy_(inverse_frequency(counts))
    run.set_lr(cfg.lr, state.opt_G, state.opt_D)
    step = common.fast_step(train_step, cfg, device)
    sample_images = common.spread(cfg.sample_rows, len(val))
    val_images = common.spread(cfg.val_images, len(val))
    for epoch in range(run.epoch, cfg.epochs):
        for batch in train.batches(epoch, run.batch):
            common.seed_step(cfg.seed, epoch, run.batch)
            run.end_step(state, step(state, batch, cfg))
        scores = evaluate(state, val, cfg, val_images).table()["model"]
        scores = {f"val_{name}": scores[name] for name in SCORES}
        run.end_epoch(state, scores, sample(state, val, cfg, sample_images))
    run.close()
    report(state, val, cfg, run.histograms)


# ---------------------------------------------------------------------------------------------- use


@torch.no_grad()
def translate(state, inputs, cfg):
    """inputs = (rgb (B, C, S, S) in [-1, 1], lc (B, classes, S, S)) -> (B, C, S, S), float32.

    Dropout stays on: it is the noise, and two calls differ. BatchNorm uses the image's own
    statistics or running averages: see --eval-norm.
    """
    rgb, lc = inputs  # without holes: see visible
    at_once = 1 if common.own_statistics(cfg) else len(rgb)
    with common.generating(state.G, cfg, dropout=True), common.autocast(cfg, rgb.device):
        pairs = zip(rgb.split(at_once), lc.split(at_once), strict=True)
        fakes = [state.G(*pair) for pair in pairs]
    return torch.cat(fakes).float()


def sample(state, val, cfg, images):
    """The columns of a sample grid, {title: (B, C, S, S) in [-1, 1]}, of these images."""
    edit = joined(val.in_order(images))
    rgb = visible(edit, cfg)
    return {
        "input": rgb,
        "lc_ab": common.draw(common.class_index(edit.lc_ab), val.classes),
        "fake": translate(state, (rgb, edit.lc_ab), cfg),
        "rgb_ab": edit.rgb_ab,
    }


def joined(edits):
    """Several batches of edits as one."""
    return Edit(*(torch.cat(field) for field in zip(*edits, strict=True)))


def evaluate(state, val, cfg, images, colors=None, judge=None):
    """The Scores of these validation edits: the model's, and those of a copy of rgb_a.

    The edits lie in the middle. G's raw output is measured, not pasted into the photograph.

    colors  from common.constant_colors: adds a colour everywhere, or for each class
    judge   measures whether the edits show the land cover that was asked for; D's own classifier
            always measures it (own_)
    """
    torch.manual_seed(cfg.seed)
    scores = common.Scores()
    for edit in val.in_order(images):
        mask = edit_mask(edit.box, edit.inside, cfg.size)
        fake = translate(state, (visible(edit, cfg), edit.lc_ab), cfg)
        guesses = {"model": fake, "copy of rgb_a": edit.rgb_a}
        asked = common.class_index(edit.lc_ab)
        guesses |= common.constant_guesses(colors or {}, fake, asked)
        for row, guess in guesses.items():
            scores.add_edit(row, guess, edit.rgb_ab, edit.rgb_a, mask)
        add_judged(scores, state.D, edit, mask, fake, by="own")
        if judge:
            add_judged(scores, judge, edit, mask, fake, by="judge")
    return scores


def add_judged(scores, judge, edit, mask, fake, by):
    """Measures whether a judge sees the land cover that was asked for inside the edits.

    The lowest score to expect is the copy of rgb_a's. Photograph b gives the score of real
    photographs. A fake can exceed it: its classes may be easier to recognise.
    """
    judged = {
        "model": (fake, edit.lc_ab),
        "copy of rgb_a": (edit.rgb_a, edit.lc_ab),
        "photograph b": (edit.rgb_b, edit.lc_b),
    }
    for row, (image, lc) in judged.items():
        target = torch.where(mask[:, 0], common.class_index(lc), common.IGNORED)
        scores.add_labels(row, judge.classes_of(image), target, lc.shape[1], by)


def show_samples(cfg, device):
    """Writes a picture of --show-samples training edits to samples.png in --out, the box drawn."""
    train = Edits(dataclasses.replace(cfg, batch_size=1), "train", device)
    stream = (edit for epoch in itertools.count() for edit in train.batches(epoch))
    edits = joined(itertools.islice(stream, cfg.show_samples))
    edit = Edit(*(field[: cfg.show_samples] for field in edits))  # --use-ba makes two of each
    lc_a, lc_b, lc_ab = (
        common.draw(common.class_index(lc), train.classes)
        for lc in (edit.lc_a, edit.lc_b, edit.lc_ab)
    )
    columns = {"rgb_a": edit.rgb_a, "lc_a": lc_a, "rgb_b": edit.rgb_b, "lc_b": lc_b}
    columns |= {"lc_ab": lc_ab, "rgb_ab": edit.rgb_ab}
    mask = edit_mask(edit.box, edit.inside, cfg.size).float()
    frame = F.max_pool2d(mask, 3, 1, 1) - mask  # one pixel around the box
    path = Path(cfg.out) / "samples.png"
    common.save_grid(path, {k: x * (1 - frame) + frame for k, x in columns.items()})
    print(f"written to {path}")


def report(state, val, cfg, histograms):
    """All of a split beside baselines: printed, and written to evaluation.json.

    One line answers whether the generator copies its input.
    """
    by_class = histograms.get("A of classes")
    colors = common.constant_colors(histograms["A"], by_class=by_class)
    judge = common.find_judge(cfg, val.device)
    rows = evaluate(state, val, cfg, np.arange(len(val)), colors, judge).table()
    answer = common.copy_verdict(rows)
    about = {"split": val.store.split.name, "judge": judge.name if judge else ""}
    common.write_evaluation(cfg, rows, images=len(val), **about, answer=answer)
    print(answer)


def generate(state, cfg, device):
    """Writes --samples edits of --generate's photograph into --out, or starts --serve's page."""

    def predict(windows, variant):
        """Windows (B, C + 2, S, S): photograph, land cover, 1 in the edit -> (B, C, S, S)."""
        fakes = []
        for window in windows.to(device).split(1):
            common.seed_step(cfg.seed, variant, 0)  # the same noise in every window
            rgb, lc, changed = window[:, :-2], window[:, -2], window[:, -1:] > 0
            rgb = common.from_bytes(rgb)
            rgb = torch.where(changed, 0.5 * torch.randn_like(rgb), rgb) if cfg.erase else rgb
            fakes.append(translate(state, (rgb, common.one_hot(lc, len(cfg.classes))), cfg))
        return torch.cat(fakes)

    net = state.G if common.own_statistics(cfg) else None
    common.edit_file(cfg, predict, net)


def use(cfg, device, checkpoint):
    """--evaluate, --generate and --serve."""
    state = build(cfg, device, training=False)
    common.restore(state, checkpoint, cfg.checkpoint)
    if cfg.evaluate:
        report(state, Edits(cfg, cfg.split, device), cfg, checkpoint["histograms"])
    if cfg.generate or cfg.serve:
        generate(state, cfg, device)


if __name__ == "__main__":
    main()
