"""mixlc: edit a photograph: change a part of its land cover, generate what fits.

A box of tile b's land cover is pasted into tile a's. The generator G gets photograph a, erased
inside the box, and the pasted land cover, and generates the missing part. The discriminator D gets
the result and labels every pixel, with a class of land cover or as generated. G learns to make
pixels that D labels as asked.

    python mixlc.py --data denmark/ --lc-classes s2glc          rgb/ and lc/ folders, 14 classes
    python mixlc.py --data maps/ --lc-classes maps              the map half becomes land cover
    python mixlc.py --quick                                     no data, a minute: a demo world
    python mixlc.py --data maps/ --lc-classes maps --show-samples 8    a picture of 8 edits
    python mixlc.py --evaluate --checkpoint runs/mixlc/checkpoints/last.pt
    python mixlc.py --generate a.png --lc a_lc.png --paint water:80,96,64,48 --checkpoint X

Papers: pix2pix (Isola et al. 2017, arXiv:1611.07004) for the generator and its losses; OASIS
(Schönfeld, Sushko et al. 2021, arXiv:2012.04781) for the discriminator, or with --d global Iizuka,
Simo-Serra, Ishikawa 2017, Globally and Locally Consistent Image Completion
(doi:10.1145/3072959.3073659).

Differences from the original system, which has no paper (nearest to it: --box center --fusion late
--no-erase --own 0 --no-composite --d global --collage --lambda-adv 0.5 --lr 1e-3):
- The original generator copies its input. Here noise replaces the part to edit, so that it cannot;
  evaluation.json states whether it does.
- The original's target is a collage, photograph b in the box of a. It has a seam, and is one of
  many right answers, so that an L1 loss teaches a blur. Here half of the edits ask for the land
  cover that is there, and their target is the photograph (SESAME, Ntavelis et al. 2020,
  arXiv:2004.04977). Inside the others there is no L1 loss (but see --lambda-color).
- The original discriminator gives one number for a whole photograph, and does not get land cover.
- Boxes have any size. In one that covers the image everything must follow from land cover.
- Real images of the discriminator are photographs. The original used collages, which have seams.
- In place of OASIS's spectral norm and LabelMix the discriminator has BatchNorm and augmentation.
- Losses are computed from logits, and the networks' depth follows --size.
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


def encoder(channels_in, size, width):
    """Down blocks to a 1x1 bottleneck: S = 2^n gives n of them."""
    depth = size.bit_length() - 1
    widths = [width * min(2**level, 8) for level in range(depth)]  # 64 128 256 512 512 ...
    first = nn.Conv2d(channels_in, width, 4, 2, 1, padding_mode="reflect")
    downs = nn.ModuleList([nn.Sequential(first, nn.LeakyReLU(0.2))])
    for channels, out in itertools.pairwise(widths[:-1]):
        conv = nn.Conv2d(channels, out, 4, 2, 1, bias=False)
        downs.append(nn.Sequential(conv, nn.BatchNorm2d(out), nn.LeakyReLU(0.2)))
    bottleneck = nn.Conv2d(widths[-2], widths[-1], 4, 2, 1)
    downs.append(nn.Sequential(bottleneck, nn.ReLU()))
    return downs


def decoder(size, width, encoders, skips):
    """Up blocks from the bottlenecks of 1 or 2 `encoders`, with 1 or 2 `skips` at every level."""
    depth = size.bit_length() - 1
    widths = [width * min(2**level, 8) for level in range(depth)]
    ups, channels = nn.ModuleList(), encoders * widths[-1]
    for out in reversed(widths[:-1]):
        conv = nn.ConvTranspose2d(channels, out, 4, 2, 1, bias=False)
        ups.append(nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU()))
        channels = (1 + skips) * out
    return ups


def encode(downs, x):
    """The activations of every down block, (B, 64..512, S/2 .. 1, S/2 .. 1)."""
    activations = []
    for down in downs:
        x = down(x)
        activations.append(x)
    return activations


class UNet(nn.Module):
    """A U-Net without its last layer, down to 1x1: (B, C, S, S) -> (B, 128, S/2, S/2), S = 2^n."""

    def __init__(self, channels_in, size, width):
        super().__init__()
        self.downs = encoder(channels_in, size, width)
        self.ups = decoder(size, width, encoders=1, skips=1)

    def forward(self, x):
        *skips, x = encode(self.downs, x)
        for up in self.ups:
            x = torch.cat([skips.pop(), up(x)], 1)  # (B, 1024..128, 2 .. S/2, 2 .. S/2)
        return x


class MiddleUNet(nn.Module):
    """Two encoders joined at the bottleneck, one decoder: -> (B, 128 or 192, S/2, S/2).

    skips: of "both" encoders, or of the land cover's ("lc") alone, so that less can be copied.
    """

    def __init__(self, classes, bands, size, width, skips):
        super().__init__()
        self.both = skips == "both"
        self.rgb_downs, self.lc_downs = encoder(bands, size, width), encoder(classes, size, width)
        self.ups = decoder(size, width, encoders=2, skips=2 if self.both else 1)

    def forward(self, rgb, lc):
        *skips_rgb, x_rgb = encode(self.rgb_downs, rgb)
        *skips_lc, x_lc = encode(self.lc_downs, lc)
        x = torch.cat([x_rgb, x_lc], 1)  # (B, 1024, 1, 1)
        for up in self.ups:
            skip_rgb, skip_lc = skips_rgb.pop(), skips_lc.pop()
            skips = [skip_rgb, skip_lc] if self.both else [skip_lc]
            x = torch.cat([*skips, up(x)], 1)
        return x


class DilatedNet(nn.Module):
    """Dilated convolutions (Yu and Koltun, arXiv:1511.07122): (B, C, S, S) -> (B, 128, S/2, S/2).

    Dilations grow with S: the receptive field is S/2, more than a box in the middle (3/8 S).
    """

    def __init__(self, channels_in, size, width):
        super().__init__()
        layers = [nn.Conv2d(channels_in, 2 * width, 4, 2, 1, padding_mode="reflect"), nn.ReLU()]
        for level in range(size.bit_length() - 4):  # at 256: dilations 1 2 4 8 16
            dilation = 2**level
            conv = nn.Conv2d(2 * width, 2 * width, 3, 1, dilation, dilation, bias=False)
            layers += [conv, nn.BatchNorm2d(2 * width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class Generator(nn.Module):
    """Photograph (B, bands, S, S) in [-1, 1], land cover (B, classes, S, S) -> (B, bands, S, S)."""

    def __init__(self, classes, bands, size, width, fusion, skips):
        super().__init__()
        self.fusion = fusion
        if fusion == "early":
            self.unet = UNet(bands + classes, size, width)
            channels = 2 * width
        elif fusion == "middle":
            self.unet = MiddleUNet(classes, bands, size, width, skips)
            channels = (3 if skips == "both" else 2) * width
        else:
            kind = UNet if fusion == "late" else DilatedNet
            self.rgb_net, self.lc_net = UNet(bands, size, width), kind(classes, size, width)
            channels = 4 * width
        last = nn.ConvTranspose2d(width, bands, 4, 2, 1)
        layers = [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU(), last, nn.Tanh()]
        self.output_net = nn.Sequential(*layers)

    def forward(self, rgb, lc):
        if self.fusion == "early":
            x = self.unet(torch.cat([rgb, lc], 1))  # (B, 128, S/2, S/2)
        elif self.fusion == "middle":
            x = self.unet(rgb, lc)  # (B, 128 or 192, S/2, S/2)
        else:
            x = torch.cat([self.rgb_net(rgb), self.lc_net(lc)], 1)  # (B, 256, S/2, S/2)
        return self.output_net(x)


class LabelDiscriminator(nn.Module):
    """What is every pixel of a photograph (B, bands, S, S)? -> (B, classes + 1, S, S) logits.

    A class of land cover, or the last one: generated. A U-Net (Schönfeld et al. 2021, section 3.2),
    here with BatchNorm and the shape of the generator's. Its input is augmented, real or generated.
    """

    def __init__(self, classes, bands, size, width):
        super().__init__()
        self.unet = UNet(bands, size, width)
        self.last = nn.ConvTranspose2d(2 * width, classes + 1, 4, 2, 1)

    def forward(self, image, box):
        return self.last(self.unet(augment(image)))


def augment(images):
    """Images (B, C, S, S) of other contrast and brightness, with a grey square of up to S/4.

    All that LabelDiscriminator sees, in G's step as well, is changed so, or it overfits on few
    photographs; labels count under the square, too. G learns through it (arXiv:2006.10738).
    """
    batch, side = images.shape[0], images.shape[-1]
    contrast, brightness = 0.4 * torch.rand(2, batch, 1, 1, 1, device=images.device)
    y, x = torch.randint(side, (2, batch, 1), device=images.device)  # middles of the squares
    along = torch.arange(side, device=images.device)
    rows, columns = (along - y).abs() < side // 8, (along - x).abs() < side // 8  # (B, S)
    square = rows[:, None, :, None] & columns[:, None, None, :]
    return (images * (0.8 + contrast) + brightness - 0.2).masked_fill(square, 0.0)


class Discriminator(nn.Module):
    """--d global: is a photograph (B, bands, S, S) real? -> (B, 1) logits.

    Iizuka et al. 2017, section 3.3. With local_d a second trunk gets a crop of half the side around
    the box; the last layer joins the two.
    """

    def __init__(self, bands, size, width, local_d):
        super().__init__()
        self.side = size // 2  # of the local trunk's crop
        self.global_trunk = self.trunk(bands, size, width)
        self.local_trunk = self.trunk(bands, size // 2, width) if local_d else None
        self.head = nn.Linear(2048 if local_d else 1024, 1)

    @staticmethod
    def trunk(bands, size, width):
        """Strided 5x5 convolutions down to 4x4, then 1024 features."""
        layers, channels = [], bands
        for level in range(size.bit_length() - 3):  # at 256: 64 128 256 512 512 512
            out = width * min(2**level, 8)
            conv = nn.Conv2d(channels, out, 5, 2, 2, bias=False)
            layers += [conv, nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]
            channels = out
        layers += [nn.Flatten(), nn.Linear(channels * 16, 1024), nn.LeakyReLU(0.2)]
        return nn.Sequential(*layers)

    def forward(self, image, box):
        features = self.global_trunk(image)  # (B, 1024)
        if self.local_trunk is not None:
            crop = crop_around(image, box, self.side)
            features = torch.cat([features, self.local_trunk(crop)], 1)  # (B, 2048)
        return self.head(features)


def crop_around(images, box, side):
    """Crops (B, C, side, side) of images (B, C, S, S) around box (top, left, height, width)."""
    corner = (box[:, :2] + (box[:, 2:] - side) // 2).clamp(0, images.shape[-1] - side)  # within
    along = torch.arange(side, device=box.device)
    y = corner[:, 0, None, None] + along[:, None]  # (B, side, 1)
    x = corner[:, 1, None, None] + along  # (B, 1, side)
    batch = torch.arange(len(images), device=box.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[batch, y, x].permute(0, 3, 1, 2)


def init_weights(net):
    """Convolutions and linear layers N(0, 0.02), norm scales N(1, 0.02), biases 0."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    return net


# ------------------------------------------------------------------------------------------- losses


def gan_loss(logits, is_real):
    """Cross-entropy of logits with "real" (1) or "fake" (0): a scalar.

    Goodfellow et al. 2014 (arXiv:1406.2661), equation 1, with the -log D(G(x)) of its section 3.
    """
    logits = common.full_precision(logits)
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(is_real)))


def grown(mask):
    """The mask of an edit, (B, 1, S, S), with a border around it, 12 pixels at 256: bool."""
    border = round(12 * mask.shape[-1] / 256)
    return F.max_pool2d(mask.float(), 2 * border + 1, 1, border) > 0


def masked_l1_loss(fake, target, where):
    """Mean absolute difference where `where` (B, 1, S, S) is true: a scalar.

    The mean of each image's own mean, 0 if none is true. All true: equation 3 of Isola et al. 2017.
    """
    difference = (common.full_precision(fake) - common.full_precision(target)).abs()
    total = (difference * where).sum((1, 2, 3))  # (B,)
    return (total / (fake.shape[1] * where.sum((1, 2, 3)).clamp_min(1))).mean()


def color_loss(fake, target, where):
    """Mean absolute difference of colours, without texture, where `where` is true: a scalar.

    These are the mean colours in overlapping squares of S/8. A square counts if `where` is true in
    a quarter of it or more.
    """
    side = where.shape[-1] // 8
    share = F.avg_pool2d(where.float(), side, side // 4)  # (B, 1, 29, 29)
    difference = (common.full_precision(fake) - common.full_precision(target)) * where
    means = F.avg_pool2d(difference, side, side // 4) / share.clamp_min(0.25)
    counts = share >= 0.25
    return (means.abs() * counts).sum() / (fake.shape[1] * counts.sum().clamp_min(1))


def label_loss(logits, target):
    """Weighted cross-entropy of logits (B, classes + 1, S, S) with one-hot labels: a scalar.

    target  (B, classes, S, S), or (B, classes + 1, S, S) with "generated"; zeros do not count

    A label's weight is the mean number of pixels per label / its own number, at most 10, so that
    rare labels count. Schönfeld et al. 2021, 3.2, weight all labels so but "generated".
    """
    counts = target.sum((0, 2, 3))
    mean = counts.sum() / (counts > 0).sum().clamp_min(1)
    weighted = target * (mean / counts.clamp_min(1)).clamp_max(10).view(1, -1, 1, 1)
    log_likelihood = common.full_precision(logits).log_softmax(1)[:, : len(counts)]
    return -(log_likelihood * weighted).sum() / weighted.sum().clamp_min(1)


# ------------------------------------------------------------------------------------------- Config


@dataclasses.dataclass(frozen=True)
class Config(common.EditOptions):
    """The model's own options; common.EditOptions has data, size, box, erase and so on.

    A group includes the options below it. A checkpoint fixes group "model" and `fixed` options.
    """

    script = "mixlc"

    fusion: str = option(
        "middle",
        "late (a U-Net each for photograph and land cover), early (one for both), middle (two "
        "encoders, one decoder), dilated (late, with dilated convolutions for the land cover)",
        group="model",
        choices=("late", "early", "middle", "dilated"),
    )
    skips: str = option("both", "encoders with skips in --fusion middle", choices=("both", "lc"))
    d: str = option(
        "label",
        "discriminator: label (of every pixel: its land cover, or generated), global (of the "
        "whole photograph: real or fake)",
        choices=("label", "global"),
    )
    local_d: bool = option(False, "--d global: a second network for the surroundings of the box")
    collage: bool = option(False, "L1 losses also inside edits that are collages", group="training")
    lambda_adv: float = option(2.0, "weight of the adversarial loss", low=0.0)
    lambda_l1: float = option(10.0, "weight of the L1 loss", low=0.0)
    lambda_local: float = option(5.0, "weight of the L1 loss in and around the edit", low=0.0)
    lambda_color: float = option(0.0, "weight of the loss of colours in the edit", low=0.0)
    lr: float = option(5e-4, "learning rate of Adam", low=0.0)
    batch_size: int = option(8, "edits in a step of one process", low=1, fixed=True)
    epochs: int = option(200, "passes over the training images", low=1, high=10**6, may_change=True)


QUICK = {"size": 64, "width": 16, "batch_size": 4, "epochs": 20, "log_every": 12}
SCORES = ("l1_inside", "l1_outside")  # of evaluate, after every epoch

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
    """Networks, optimisers, tensors and numbers that training changes and a checkpoint keeps."""

    G: nn.Module
    D: nn.Module | None = None
    opt_G: torch.optim.Optimizer | None = None
    opt_D: torch.optim.Optimizer | None = None


def build(cfg, device, training=True):
    """Networks and optimisers on the device; without `training` the generator alone."""
    if not cfg.classes:
        raise UserError("edits need land cover: pass --lc-classes s2glc, maps, binary or a file")
    classes, bands = len(cfg.classes), cfg.channels("A")
    G = Generator(classes, bands, cfg.size, cfg.width, cfg.fusion, cfg.skips)
    state = State(common.to_device(init_weights(G), device))
    if not training:
        return state
    if cfg.d == "label":
        D = LabelDiscriminator(classes, bands, cfg.size, cfg.width)
    else:
        D = Discriminator(bands, cfg.size, cfg.width, cfg.local_d)
    state.D = common.to_device(init_weights(D), device)
    state.opt_G = common.adam(state.G, cfg, device)
    state.opt_D = common.adam(state.D, cfg, device)
    return state


# --------------------------------------------------------------------------------------- train_step


def train_step(state, batch, cfg):
    """One update of D, then one of G. batch = an Edit, or a tuple of its fields.

    fake = G(rgb_a, lc_ab); with --erase rgb_a has noise in the edit
    shown = fake pasted into rgb_a; with --no-composite fake, all of which is then the edit to D
    L_D = 1/2 [label(D(rgb_b), lc_b) + label(D(shown), lc_ab outside the edit, generated inside)]
    L_G = lambda_adv * label(D(shown), lc_ab in and around the edit) + lambda_l1 * L1(fake, rgb_ab)
          + lambda_local * L1 in and around the edit + lambda_color * color(fake, rgb_ab) in it
    L1 counts outside edits and inside own ones; with --collage everywhere.
    With --d global the first losses are GAN(D(rgb_b), 1), GAN(D(shown), 0) and GAN(D(shown), 1).
    """
    edit = Edit(*batch)
    mask = edit_mask(edit.box, edit.inside, cfg.size)
    near = grown(mask)
    generated = mask if cfg.composite else torch.ones_like(mask)
    known = ~(edit.rgb_a + edit.rgb_b)[:, :1].isnan()  # both photographs have data
    real = edit.rgb_b.masked_fill(~known, torch.nan)
    rgb = visible(edit, cfg)
    rgb_a, rgb_b, target = (common.filled(x) for x in (edit.rgb_a, real, edit.rgb_ab))
    with common.autocast(cfg, rgb.device):
        fake = state.G(rgb, edit.lc_ab)
        shown = torch.where(mask, fake, rgb_a) if cfg.composite else fake
        shown = common.holes_of(real, shown)  # D sees the same holes in both
        logits_fake = state.D(shown.detach(), edit.box)  # the D step must not reach G
        logits_real = state.D(rgb_b, edit.box)
    if cfg.d == "label":
        labels = torch.cat([edit.lc_ab * ~generated, generated.to(edit.lc_ab)], 1)
        d_real = label_loss(logits_real, edit.lc_b * known)
        d_fake = label_loss(logits_fake, labels * known)
    else:
        d_real, d_fake = gan_loss(logits_real, True), gan_loss(logits_fake, False)
    loss_d = 0.5 * (d_real + d_fake)
    state.opt_D.zero_grad()
    loss_d.backward()
    common.average_gradients(state.D)
    state.opt_D.step()

    with common.autocast(cfg, rgb.device):  # anew: the first one cached casts of D's old weights
        logits_fake = state.D(shown, edit.box)
    if cfg.d == "label":
        g_adv = label_loss(logits_fake, edit.lc_ab * ((near | generated) & known))
    else:
        g_adv = gan_loss(logits_fake, True)
    has_data = ~edit.rgb_ab[:, :1].isnan()
    has_target = (~mask | edit.own.view(-1, 1, 1, 1) | cfg.collage) & has_data
    g_l1 = masked_l1_loss(fake, target, has_target)
    g_local = masked_l1_loss(fake, target, near & has_target)
    losses = {"g_adv": g_adv, "g_l1": g_l1, "g_local": g_local}
    loss_g = cfg.lambda_adv * g_adv + cfg.lambda_l1 * g_l1 + cfg.lambda_local * g_local
    if cfg.lambda_color > 0:
        losses["g_color"] = color_loss(fake, target, mask & has_data)
        loss_g = loss_g + cfg.lambda_color * losses["g_color"]
    state.opt_G.zero_grad()
    loss_g.backward(inputs=list(state.G.parameters()))  # no gradients for D's weights
    common.average_gradients(state.G)
    state.opt_G.step()
    return {"g_total": loss_g} | losses | {"d_total": loss_d, "d_real": d_real, "d_fake": d_fake}


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

    BatchNorm uses the image's own statistics or running averages: see --eval-norm.
    """
    rgb, lc = inputs  # without holes: see visible
    at_once = 1 if common.own_statistics(cfg) else len(rgb)
    with common.generating(state.G, cfg), common.autocast(cfg, rgb.device):
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
    judge   measures whether the edits show the land cover that was asked for
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
        windows = windows.to(device)
        rgb, lc, changed = windows[:, :-2], windows[:, -2], windows[:, -1:] > 0
        rgb = common.from_bytes(rgb)
        common.seed_step(cfg.seed, variant, 0)  # the same noise in every window
        noise = 0.5 * torch.randn_like(rgb[:1])
        rgb = torch.where(changed, noise, rgb) if cfg.erase else rgb
        return translate(state, (rgb, common.one_hot(lc, len(cfg.classes))), cfg)

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
