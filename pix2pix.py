"""pix2pix: translate an image into its paired other half, such as a map into a photograph.

A generator G learns from pairs (x, y) to turn x into y. A discriminator D gets x together with y
or with G(x) and learns to tell which of the two it got, patch by patch; G learns to fool it. An L1
loss keeps G(x) near y, and D adds the texture that L1 alone would blur.

    python pix2pix.py --data maps/                              map (B) -> satellite (A), 200 epochs
    python pix2pix.py --data maps/ --direction AtoB             satellite (A) -> map (B)
    python pix2pix.py --data AerialImageDataset/ --patch 1000 --generator resnet --norm instance
    python pix2pix.py --quick                                   no data, a minute: a demo world
    python pix2pix.py --evaluate --checkpoint runs/pix2pix/checkpoints/last.pt
    python pix2pix.py --generate folder/ --checkpoint runs/pix2pix/checkpoints/last.pt --out new/

Paper: Isola, Zhu, Zhou, Efros 2017, Image-to-Image Translation with Conditional Adversarial
Networks, arXiv:1611.07004.

Differences from the paper:
- The U-Net goes down to 1x1 at every --size, and has no norm there (the paper's errata, 6.3).
- Trained above batch size 1, G generates with running statistics and no dropout (--eval-norm).
- Dropout is one block further from the bottleneck, and the learning rate falls linearly in the
  second half, as in the authors' PyTorch code.
- --generator resnet (no skips over its bottleneck), --norm instance (in G and D), --gan lsgan and
  --content vgg are experiments. The paper has --schedule constant; others --d-weight 1.0, too.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import UserError, option

# ----------------------------------------------------------------------------------------- networks


def norm_layer(norm, channels):
    """BatchNorm with scale and shift, or InstanceNorm without."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.InstanceNorm2d(channels)


def doubling(transposed, upsample):
    """Doubles height and width: `transposed` itself, or nearest neighbours and a 3x3 convolution.

    The second leaves no checkerboard: Odena, Dumoulin, Olah 2016, Deconvolution and Checkerboard
    Artifacts (doi:10.23915/distill.00003).
    """
    if upsample == "transposed":
        return transposed
    bias = transposed.bias is not None
    conv = nn.Conv2d(transposed.in_channels, transposed.out_channels, 3, 1, 1, bias=bias)
    return nn.Sequential(nn.Upsample(scale_factor=2), conv)


class UNetGenerator(nn.Module):
    """Encoder and decoder with skips (paper, section 3.2.1): (B, C, S, S) -> (B, C', S, S).

    S = 2^n: n down blocks to a 1x1 bottleneck, then n up blocks. Shapes below: --width 64.
    """

    def __init__(self, channels_in, channels_out, size, width, norm, dropout, upsample):
        super().__init__()
        depth = size.bit_length() - 1
        bias = norm == "instance"  # as published, though InstanceNorm cancels it
        widths = [width * min(2**level, 8) for level in range(depth)]  # 64 128 256 512 512 ...
        first = nn.Conv2d(channels_in, width, 4, 2, 1, bias=bias)
        self.downs = nn.ModuleList([nn.Sequential(first)])
        for level in range(1, depth):
            conv = nn.Conv2d(widths[level - 1], widths[level], 4, 2, 1, bias=bias)
            layers = [nn.LeakyReLU(0.2), conv]
            if level < depth - 1:  # the bottleneck has no norm
                layers.append(norm_layer(norm, widths[level]))
            self.downs.append(nn.Sequential(*layers))
        self.ups = nn.ModuleList()
        channels = widths[-1]
        for level in reversed(range(1, depth)):
            out = widths[level - 1]
            conv = doubling(nn.ConvTranspose2d(channels, out, 4, 2, 1, bias=bias), upsample)
            layers = [nn.ReLU(), conv, norm_layer(norm, out)]
            if 4 <= level < depth - 1:  # 512 channels out, but not the innermost
                layers.append(nn.Dropout(dropout))
            self.ups.append(nn.Sequential(*layers))
            channels = 2 * out  # with the skip
        last = doubling(nn.ConvTranspose2d(channels, channels_out, 4, 2, 1), upsample)
        self.ups.append(nn.Sequential(nn.ReLU(), last, nn.Tanh()))

    def forward(self, x):
        skips = []
        for down in self.downs:
            x = down(x)  # (B, 64..512, S/2 .. 1, S/2 .. 1)
            skips.append(x)
        x = self.ups[0](skips.pop())  # (B, 512, 2, 2)
        for up in self.ups[1:]:  # (B, 512..64, 4 .. S/2, 4 .. S/2), and at last (B, C', S, S)
            x = up(torch.cat([skips.pop(), x], 1))
        return x


class ResidualBlock(nn.Module):
    """Two reflection-padded 3x3 convolutions and a shortcut (after arXiv:1603.08155)."""

    def __init__(self, channels, norm):
        super().__init__()
        bias = norm == "instance"
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=bias),
            norm_layer(norm, channels),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=bias),
            norm_layer(norm, channels),
        )

    def forward(self, x):
        return x + self.layers(x)


class ResNetGenerator(nn.Module):
    """Two strided convolutions, residual blocks, two back up: (B, C, S, S) -> (B, C', S, S)."""

    def __init__(self, channels_in, channels_out, width, blocks, norm, upsample="transposed"):
        super().__init__()
        bias = norm == "instance"
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(channels_in, width, 7, bias=bias)]
        layers += [norm_layer(norm, width), nn.ReLU()]
        for out in (2 * width, 4 * width):  # (B, 128, S/2, S/2), (B, 256, S/4, S/4)
            layers += [nn.Conv2d(out // 2, out, 3, 2, 1, bias=bias)]
            layers += [norm_layer(norm, out), nn.ReLU()]
        layers += [ResidualBlock(4 * width, norm) for _ in range(blocks)]
        for out in (2 * width, width):  # (B, 128, S/2, S/2), (B, 64, S, S)
            conv = nn.ConvTranspose2d(2 * out, out, 3, 2, 1, output_padding=1, bias=bias)
            layers += [doubling(conv, upsample), norm_layer(norm, out), nn.ReLU()]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, channels_out, 7), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class Discriminator(nn.Module):
    """PatchGAN (paper, section 3.2.2): input and image, (B, C, S, S) -> logits (B, 1, P, P).

    patch_gan: side of a logit's receptive field; at 70 P = S/8 - 2; at 1 all kernels are 1x1.
    """

    def __init__(self, channels_in, width, norm, patch_gan):
        super().__init__()
        bias = norm == "instance"  # as published, though InstanceNorm cancels it
        kernel, stride, pad = (1, 1, 0) if patch_gan == 1 else (4, 2, 1)
        inner = {1: 1, 16: 1, 70: 3, 286: 5}[patch_gan]  # layers with a norm; the last: stride 1
        layers = [nn.Conv2d(channels_in, width, kernel, stride, pad), nn.LeakyReLU(0.2)]
        channels = width
        for level in range(1, inner + 1):  # at 70: 128 at S/4, 256 at S/8, 512 at S/8 - 1
            out = width * min(2**level, 8)
            step = stride if level < inner else 1
            layers += [nn.Conv2d(channels, out, kernel, step, pad, bias=bias)]
            layers += [norm_layer(norm, out), nn.LeakyReLU(0.2)]
            channels = out
        last_bias = bias if patch_gan == 1 else True  # as published
        layers += [nn.Conv2d(channels, 1, kernel, 1, pad, bias=last_bias)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x, image):
        return self.layers(torch.cat([x, image], 1))


def init_weights(net):
    """Convolutions N(0, 0.02) (paper, appendix 6.2), norm scales N(1, 0.02), biases 0."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    return net


# ------------------------------------------------------------------------------------------- losses


def gan_loss(logits, is_real, gan):
    """Distance of logits from "real" (1) or "fake" (0), the mean over patches: a scalar.

    bce    cross-entropy, equation 1 of Isola et al. 2017 with the generator's -log D(G(x)) of
           Goodfellow et al. 2014 (arXiv:1406.2661)
    lsgan  squared distance, equation 9 of Mao et al. 2017 (arXiv:1611.04076) without its 1/2
    """
    logits = common.full_precision(logits)
    target = torch.full_like(logits, float(is_real))
    if gan == "lsgan":
        return F.mse_loss(logits, target)
    return F.binary_cross_entropy_with_logits(logits, target)


def l1_loss(fake, target):
    """Mean absolute difference where target is not NaN, Isola et al. 2017, equation 3: a scalar."""
    known = ~target.isnan()
    difference = common.full_precision(fake) - common.full_precision(target)
    return torch.where(known, difference, 0.0).abs().sum() / known.sum().clamp_min(1)


def vgg_loss(vgg, fake, target):
    """Mean squared difference of VGG16's relu3_3, scaled; arXiv:1603.08155, eq. 2: a scalar."""
    fake, target = common.filled_alike(fake, target)  # equal where target has no data
    with torch.autocast(fake.device.type, enabled=False):
        (features_fake,) = vgg(common.full_precision(fake))  # of one layer: (B, 256, S/4, S/4)
        (features_target,) = vgg(common.full_precision(target))
    return F.mse_loss(features_fake, features_target)


# ------------------------------------------------------------------------------------------- Config


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """The model's own options; common.Options has data, size, width and so on.

    A group includes the options below it. A checkpoint fixes group "model" and `fixed` options.
    """

    script = "pix2pix"

    direction: str = option("BtoA", "A to B, or B to A", group="model", choices=("AtoB", "BtoA"))
    generator: str = option(
        "unet", "unet (with skips), resnet (residual blocks)", choices=("unet", "resnet")
    )
    blocks: int = option(0, "residual blocks of resnet; 0: 9, or 6 below 256", low=0)
    norm: str = option("batch", "normalisation layers of G and D", choices=("batch", "instance"))
    patch_gan: int = option(70, "receptive field of D, in pixels", choices=(1, 16, 70, 286))
    dropout: float = option(0.5, "dropout in the decoder of unet", low=0.0, high=0.9)
    upsample: str = option(
        "transposed",
        "doubling layers of G: transposed (convolution), resize (and then a convolution)",
        choices=("transposed", "resize"),
    )
    gan: str = option(
        "bce",
        "adversarial loss: bce (cross-entropy), lsgan (least squares)",
        group="training",
        choices=("bce", "lsgan"),
    )
    d_weight: float = option(0.5, "weight of D's loss; 0.5 as in the paper", low=0.0)
    content: str = option("l1", "content loss: l1, vgg (of features)", choices=("l1", "vgg"))
    lambda_l1: float = option(100.0, "weight of the L1 loss", low=0.0)
    lambda_vgg: float = option(2.0, "weight of the VGG loss", low=0.0)
    vgg16: str = option("", "VGG16's weights; unset: from torch.hub", file=True, may_change=True)
    load_size: int = option(0, "side that crops are taken from; 0: 286/256 of --size", low=0)
    lr: float = option(2e-4, "learning rate of Adam", low=0.0)
    batch_size: int = option(1, "images in a step of one process", low=1, fixed=True)
    epochs: int = option(
        200,
        "passes over the training images",
        low=1,
        high=10**6,
        may_change=lambda run: run["schedule"] != "linear",
    )
    epochs_decay: int = option(-1, "last epochs, in which the rate falls; -1: half of all", low=-1)
    schedule: str = option(
        "linear",
        "learning rate: linear (falls in the last epochs), constant, plateau (halves when the "
        "content loss stalls)",
        choices=("linear", "constant", "plateau"),
    )
    init: str = option(
        "", "start from these weights of G (a checkpoint: D, too)", file=True, weights=True
    )
    eval_norm: str = option(
        "auto",
        "BatchNorm in generation: batch (the image's own statistics, and dropout), running (those "
        "of training, no dropout), auto (batch where --batch-size is 1, else running)",
        choices=("batch", "running", "auto"),
    )
    fid: bool = option(False, "with --evaluate: FID, KID, LPIPS (needs torchmetrics)", group="use")


QUICK = {"size": 64, "width": 24, "batch_size": 4, "epochs": 20, "log_every": 12}
SCORES = ("psnr", "rmse")  # of evaluate, after every epoch

# --------------------------------------------------------------------------------------------- data


class Pairs:
    """Pairs (input, target) of a split, in batches on the device.

    Jitter (paper, appendix 6.2): training images are stored at 286/256 of the size, cropped at
    random and mirrored half of the time (--flip). An image and its target are one record: both
    get the same crop and flip. Validation images stay as they are.
    """

    def __init__(self, cfg, split, device):
        self.cfg = cfg
        side = common.load_size(cfg) if split == "train" else cfg.size
        self.store = common.ImageStore(cfg, split, side)
        if not self.store.paired:
            what = "trainA and trainB are not pairs: cyclegan.py learns without pairs"
            raise UserError(f"--data {cfg.data}: {what}")
        self.loader = common.Loader(self.store.records, device)

    def __len__(self):
        return len(self.loader)

    def batches(self, epoch, first=0):
        """An epoch's batches from batch `first` on: the same for the same seed, epoch and rank."""
        rng = np.random.default_rng([self.cfg.seed, epoch])
        order = rng.permutation(len(self))
        room = self.store.side - self.cfg.size
        turns = common.turns("horizontal" if self.cfg.flip == "auto" else self.cfg.flip)
        bounds = room + 1, room + 1, *turns  # of top, left, flip, upside_down
        crops = rng.integers(0, bounds, (len(self), 4))
        order, crops = common.batches_of_rank(self.cfg.batch_size, first, order, crops)
        for images, crop in zip(self.loader.batches(order), crops, strict=True):
            yield self.pair(jitter(images, crop.tolist(), self.cfg.size))

    def in_order(self, images):
        """Images by index, without jitter: batches of the store's records."""
        for index in common.chunks(images):
            yield torch.stack(next(self.loader.batches(index[None])))

    def pair(self, records):
        """Records -> (input, target), (B, C, S, S) in [-1, 1], or NaN where there is no data.

        Ignored labels are no data in a target. In an input they are black, or have the colour of
        an ignored class. A target has no data where its input has none.
        """
        a, b = self.store.images("A", records), self.store.images("B", records)
        if self.store.classes:
            labels, b = b, common.draw(b, self.store.classes)
            if self.cfg.direction == "AtoB":
                b = b.masked_fill((labels == common.IGNORED)[:, None], torch.nan)
        x, y = (a, b) if self.cfg.direction == "AtoB" else (b, a)
        return x, y.masked_fill(x.isnan().any(1, keepdim=True), torch.nan)


def jitter(images, crops, size):
    """Images (C, side, side), each with (top, left, flip, upside_down) -> (B, C, size, size)."""
    jittered = []
    for image, (top, left, flip, upside_down) in zip(images, crops, strict=True):
        image = image[:, top : top + size, left : left + size]
        image = image.flip(2) if flip else image
        jittered.append(image.flip(1) if upside_down else image)
    return torch.stack(jittered)


# -------------------------------------------------------------------------------------------- build


@dataclasses.dataclass
class State:
    """Networks, optimisers, tensors and numbers that a checkpoint keeps; vgg is not kept."""

    G: nn.Module
    D: nn.Module | None = None
    opt_G: torch.optim.Optimizer | None = None
    opt_D: torch.optim.Optimizer | None = None
    vgg: nn.Module | None = None
    lr_scale: float = 1.0  # the factor of --schedule plateau
    best_loss: float = float("inf")
    stalled_epochs: int = 0


def build(cfg, device, training=True):
    """Networks and optimisers on the device; without `training` the generator alone."""
    channels = [cfg.channels(domain) for domain in cfg.domains]  # in, out: "AB" or "BA"
    if cfg.generator == "unet":
        G = UNetGenerator(*channels, cfg.size, cfg.width, cfg.norm, cfg.dropout, cfg.upsample)
    else:
        blocks = cfg.blocks or (9 if cfg.size >= 256 else 6)
        G = ResNetGenerator(*channels, cfg.width, blocks, cfg.norm, cfg.upsample)
    state = State(common.to_device(init_weights(G), device))
    if not training:
        return state
    if cfg.patch_gan == 286 and cfg.size < 128:
        raise UserError(f"--patch-gan 286 has no logit at --size {cfg.size}: use 128 or more")
    D = Discriminator(sum(channels), cfg.width, cfg.norm, cfg.patch_gan)
    state.D = common.to_device(init_weights(D), device)
    state.opt_G = common.adam(state.G, cfg, device)
    state.opt_D = common.adam(state.D, cfg, device)
    if cfg.content == "vgg":
        vgg = common.VGG16Features(["relu3_3"], "vgg16", cfg.vgg16, common.autocast(cfg, device))
        state.vgg = common.to_device(vgg, device)
    return state


# --------------------------------------------------------------------------------------- train_step


def train_step(state, batch, cfg):
    """One update of D, then one of G. batch = (input, target), (B, C, S, S) in [-1, 1] or NaN.

    L_D = d_weight * [GAN(D(x, y), 1) + GAN(D(x, G(x)), 0)]
    L_G = GAN(D(x, G(x)), 1) + lambda_l1 * L1(G(x), y), or with --content vgg
          GAN(D(x, G(x)), 1) + lambda_vgg * VGG(G(x), y)
    """
    x, y = batch
    x, real = common.filled(x), common.filled(y)  # each image's mean colour in place of NaN
    with common.autocast(cfg, x.device):
        fake = common.holes_of(y, state.G(x))  # (B, C', S, S); D sees the same holes in both
        logits_fake = state.D(x, fake.detach())  # (B, 1, P, P); the D step must not reach G
        logits_real = state.D(x, real)  # not in one batch: BatchNorm would mix them
    d_real = gan_loss(logits_real, True, cfg.gan)
    d_fake = gan_loss(logits_fake, False, cfg.gan)
    loss_d = cfg.d_weight * (d_real + d_fake)
    state.opt_D.zero_grad()
    loss_d.backward()
    common.average_gradients(state.D)
    state.opt_D.step()

    with common.autocast(cfg, x.device):  # anew: the first one cached casts of D's old weights
        logits_fake = state.D(x, fake)
    g_adv = gan_loss(logits_fake, True, cfg.gan)
    g_l1 = l1_loss(fake, y)
    losses = {"g_adv": g_adv, "g_l1": g_l1}
    if cfg.content == "vgg":
        losses["g_content"] = vgg_loss(state.vgg, fake, y)
        loss_g = g_adv + cfg.lambda_vgg * losses["g_content"]
    else:
        loss_g = g_adv + cfg.lambda_l1 * g_l1
    state.opt_G.zero_grad()
    loss_g.backward(inputs=list(state.G.parameters()))  # no gradients for D's weights
    common.average_gradients(state.G)
    state.opt_G.step()
    return {"g_total": loss_g} | losses | {"d_total": loss_d, "d_real": d_real, "d_fake": d_fake}


def learning_rate(state, cfg, epoch):
    """The rate of an epoch. linear: constant, then falling in equal steps for --epochs-decay.

    As in the authors' first PyTorch code, the epoch after the last would have the rate zero.
    """
    if cfg.schedule != "linear":
        return cfg.lr * state.lr_scale
    decay = cfg.epochs // 2 if cfg.epochs_decay < 0 else min(cfg.epochs_decay, cfg.epochs)
    return cfg.lr * min(1.0, (cfg.epochs - epoch) / (decay + 1))


def follow_plateau(state, loss, patience=20, floor=0.01):
    """--schedule plateau: halves the rate when the content loss, the mean of an epoch, stalls.

    It stalls if it has not fallen by 0.1 % for `patience` epochs. The rate is at least `floor`
    times --lr. Other measures stall too early: adversarial losses need not fall as pictures
    improve, and the validation error has its minimum long before the best pictures.
    """
    state.stalled_epochs += 1
    if loss < 0.999 * state.best_loss:
        state.best_loss, state.stalled_epochs = loss, 0
    if state.stalled_epochs == patience:
        state.lr_scale, state.stalled_epochs = max(state.lr_scale / 2, floor), 0


# --------------------------------------------------------------------------------------------- main


@common.command
def main(argv=None):
    cfg, device, checkpoint = common.begin(Config, __doc__, QUICK, argv)
    if cfg.using:  # --evaluate, --generate or --serve
        use(cfg, device, checkpoint)
        return
    state = build(cfg, device)
    if checkpoint:
        common.restore(state, checkpoint, cfg.out)
    elif cfg.init:
        common.load_network(state.G, cfg.init, cfg, "G")
        common.load_network(state.D, cfg.init, cfg, "D", optional=True)
    train, val = Pairs(cfg, "train", device), Pairs(cfg, "val", device)
    run = common.Run(cfg, checkpoint, train, scores=[f"val_{name}" for name in SCORES])
    step = common.fast_step(train_step, cfg, device)
    sample_images = common.spread(cfg.sample_rows, len(val))
    val_images = common.spread(cfg.val_images, len(val))
    for epoch in range(run.epoch, cfg.epochs):
        run.set_lr(learning_rate(state, cfg, epoch), state.opt_G, state.opt_D)
        for batch in train.batches(epoch, run.batch):
            common.seed_step(cfg.seed, epoch, run.batch)
            run.end_step(state, step(state, batch, cfg))
        if cfg.schedule == "plateau":
            follow_plateau(state, run.epoch_mean("g_l1" if cfg.content == "l1" else "g_content"))
        scores = evaluate(state, val, cfg, val_images).table()["model"]
        scores = {f"val_{name}": scores[name] for name in SCORES}
        run.end_epoch(state, scores, sample(state, val, cfg, sample_images))
    run.close()
    report(state, val, cfg, run.histograms)


# ---------------------------------------------------------------------------------------------- use


@torch.no_grad()
def translate(state, inputs, cfg, noise=True):
    """Inputs (B, C, S, S) in [-1, 1] -> images (B, C', S, S), float32 in [-1, 1].

    --eval-norm batch, the paper's policy (section 3.3): dropout stays on (if noise) and BatchNorm
    uses the statistics of the image itself. running: no dropout, running statistics.
    """
    own_statistics = common.own_statistics(cfg)
    at_once = 1 if own_statistics else len(inputs)
    with (
        common.generating(state.G, cfg, dropout=own_statistics and noise),
        common.autocast(cfg, inputs.device),
    ):
        fakes = [state.G(x) for x in common.filled(inputs).split(at_once)]
    return torch.cat(fakes).float()


def sample(state, val, cfg, images):
    """The columns of a sample grid, {title: (B, C, S, S) in [-1, 1]}, of these images."""
    x, y = val.pair(torch.cat(list(val.in_order(images))))
    return {"input": x, "fake": translate(state, x, cfg), "target": y}


def evaluate(state, val, cfg, images, colors=None, judge=None):
    """The Scores of these validation images.

    colors  from common.constant_colors: adds the baselines, a copy of the input and one colour
            for the image or for each class
    judge   measures whether generated photographs show the land cover that was asked for

    If the target is a label map, the classes of nearest colour are measured as well.
    """
    torch.manual_seed(cfg.seed)
    scores = common.Scores(brief=colors is None, fid=cfg.fid)
    limits = val.store.limits[cfg.domains[1]]
    for records in val.in_order(images):
        x, y = val.pair(records)
        labels = val.store.images("B", records) if cfg.classes else None
        guesses = {"model": translate(state, x, cfg)}
        if colors:
            if x.shape == y.shape:
                guesses["copy of the input"] = val.store.copied(x, *cfg.domains)
            guesses |= common.constant_guesses(colors, y, labels)
        for row, guess in guesses.items():
            scores.add_images(row, guess, y, limits)
            if cfg.classes and cfg.direction == "AtoB":
                nearest = nearest_class(guess, cfg.classes)
                scores.add_labels(row, nearest, labels, len(cfg.classes))
        scores.add_distances("model", guesses["model"], y)
        if judge:
            photographs = {"model": guesses["model"], "real photograph": y}
            add_judged(scores, judge, photographs, labels, len(cfg.classes))
    if judge:
        add_floor(scores, judge, val, images)
    return scores


def add_judged(scores, judge, photographs, labels, classes):
    """Measures whether the judge finds these labels in photographs {row: (B, C, S, S)}."""
    for row, photograph in photographs.items():
        scores.add_labels(row, judge.classes_of(photograph), labels, classes, by="judge")


def add_floor(scores, judge, val, images):
    """The lowest score to expect: real photographs, judged by the labels of other places."""
    if len(images) == 1:  # there is no other place
        return
    others = np.roll(images, len(images) // 2)
    for records, elsewhere in zip(val.in_order(images), val.in_order(others), strict=True):
        photographs = {"real, of another place": val.pair(elsewhere)[1]}
        labels = val.store.images("B", records)
        add_judged(scores, judge, photographs, labels, len(val.store.classes))


def nearest_class(images, classes):
    """Pictures (B, 3, H, W) in [-1, 1] -> (B, H, W) indices of the classes of nearest colour."""
    colors = torch.tensor(classes.colors, device=images.device) / 127.5 - 1
    distance = [(images - color.view(1, 3, 1, 1)).square().sum(1) for color in colors]
    return torch.stack(distance).argmin(0)


def report(state, val, cfg, histograms):
    """All of a split beside baselines: printed, and written to evaluation.json."""
    histogram = histograms[cfg.domains[1]]
    by_class = histograms.get("A of classes") if cfg.direction == "BtoA" else None
    classes = cfg.classes if cfg.direction == "AtoB" else None
    colors = common.constant_colors(histogram, classes, by_class)
    judge = common.find_judge(cfg, val.loader.device, cfg.direction == "BtoA")
    rows = evaluate(state, val, cfg, np.arange(len(val)), colors, judge).table()
    about = {"split": val.store.split.name, "judge": judge.name if judge else ""}
    common.write_evaluation(cfg, rows, images=len(val), **about)


def generate(state, cfg, device):
    """Translates --generate's pictures, or label maps, into --out, or starts --serve's page.

    Dropout, the paper's noise, would make windows differ, so it is off if there are several.
    """
    classes = cfg.classes if cfg.direction == "BtoA" else None

    def predict(windows, whole):
        """Windows (B, C, S, S) -> (B, C', S, S) in [-1, 1]; whole: the image is one window."""
        windows = windows.to(device)
        x = common.draw(windows[:, 0], classes) if classes else common.from_bytes(windows)
        return translate(state, x, cfg, noise=whole)

    net = state.G if cfg.norm == "instance" or common.own_statistics(cfg) else None
    common.translate_files(cfg, predict, net, from_labels=classes is not None)


def use(cfg, device, checkpoint):
    """--evaluate, --generate and --serve."""
    state = build(cfg, device, training=False)
    if checkpoint:
        common.restore(state, checkpoint, cfg.checkpoint)
    else:
        common.load_network(state.G, cfg.init, cfg, "G")
    if cfg.evaluate:
        report(state, Pairs(cfg, cfg.split, device), cfg, checkpoint["histograms"])
    if cfg.generate or cfg.serve:
        generate(state, cfg, device)


if __name__ == "__main__":
    main()
