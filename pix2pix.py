"""pix2pix: translate an image into its paired other half, such as a map into the satellite image of the same place.

    python pix2pix.py --data maps/                                        map -> satellite, 200 epochs
    python pix2pix.py --data maps/ --direction AtoB                       satellite -> map
    python pix2pix.py --data AerialImageDataset/ --patch 1000 --generator resnet --norm instance
    python pix2pix.py --quick                                             no data, two minutes: a demo world
    python pix2pix.py --evaluate --checkpoint runs/pix2pix/checkpoints/last.pt
    python pix2pix.py --generate folder/ --checkpoint runs/pix2pix/checkpoints/last.pt --out pictures/

Paper: Isola, Zhu, Zhou, Efros 2017, Image-to-Image Translation with Conditional Adversarial Networks, arXiv:1611.07004.

Differences from the paper: the U-Net's depth follows --size, down to a bottleneck of 1x1, which has no norm; the rate
falls linearly to zero in the second half, as in the published code; --generator resnet, --norm instance, --gan lsgan
and --content vgg are experiments beside it, --schedule constant and --d-weight 1.0 those of other systems.

Measured: --quick, 45 s on two cores of a CPU, validation RMSE 13.6 levels; a constant colour 34.6, the input 124.7.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

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
    direction: str = option("BtoA", "which side is translated into which", "model", choices=("AtoB", "BtoA"))
    size: int = option(256, "side of the images that the networks see", choices=(64, 128, 256, 512))
    lc_classes: str = option(
        "", "B holds label maps: s2glc, maps, binary or a classes.json (data/classes.json is found)"
    )
    generator: str = option("unet", "generator", choices=("unet", "resnet"))
    blocks: int = option(0, "residual blocks of --generator resnet; 0: 9, or 6 below size 256", low=0)
    width: int = option(64, "channels of the first layer", low=1, high=1024)
    norm: str = option("batch", "normalisation", choices=("batch", "instance"))
    patch_gan: int = option(70, "receptive field of the discriminator, in pixels", choices=(1, 16, 70, 286))
    dropout: float = option(0.5, "dropout of the U-Net's inner up blocks", low=0.0, high=0.9)
    gan: str = option("bce", "adversarial loss", "training", choices=("bce", "lsgan"))
    d_weight: float = option(0.5, "weight of the discriminator's loss; 1.0: the sum without the half", low=0.0)
    content: str = option("l1", "what holds the fake to its target: L1, or VGG16 features", choices=("l1", "vgg"))
    lambda_l1: float = option(100.0, "weight of the content loss, whichever --content is", low=0.0)
    vgg16: str = option("", "VGG16 weights for --content vgg; none: torch.hub's cache or download")
    lr: float = option(2e-4, "Adam's rate", low=0.0)
    beta1: float = option(0.5, "Adam's first beta", low=0.0, high=0.999)
    batch_size: int = option(1, "images a step, in each process", low=1)
    epochs: int = option(200, "passes over the training images", low=1)
    schedule: str = option("linear", "rate: to zero in the second half | constant | follows the validation RMSE",
                           choices=("linear", "constant", "plateau"))  # fmt: skip
    init: str = option("", "generator weights to start from, or to generate with: ours, or published ones")
    seed: int = option(0, "of weights, order, augmentation and dropout", low=0, high=2**32 - 1)
    eval_norm: str = option("batch", "generating: dropout on and the image's own statistics, as the paper | running "
                            "statistics, no dropout", choices=("batch", "running"))  # fmt: skip
    quick: bool = option(False, "small networks, images and epochs: works in two minutes on two CPU cores", "run")
    out: str = option("", "run folder, or folder of the generated images; none: runs/pix2pix")
    resume: bool = option(False, "go on with the run in --out, at the step where it stopped")
    log_every: int = option(50, "steps between rows of metrics.csv", low=1)
    save_every: int = option(10, "epochs between checkpoints that are kept; last.pt is written every epoch", low=0)
    sample_rows: int = option(6, "validation images in a sample grid", low=1)
    track: str = option("", "also log to", choices=("", "tensorboard", "wandb"))
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    precision: str = option("auto", "auto: bf16 on CUDA, fp32 on the CPU", choices=("auto", "fp32", "bf16"))
    graph: bool = option(True, "capture the training step in a CUDA graph")
    checkpoint: str = option("", "model to evaluate or to generate with", "use a trained model")
    evaluate: bool = option(False, "measure --checkpoint on the validation split")
    generate: str = option("", "image or folder to translate with --checkpoint (or --init)")


QUICK = {"size": 64, "width": 24, "batch_size": 4, "epochs": 20, "log_every": 12, "eval_norm": "running"}

# --------------------------------------------------------------------------------------------------------------- data


class Pairs:
    """Pairs (input, target) of a split, in batches, on the device.

    Jitter (paper, appendix 6.2): images are stored at size * 286 / 256, cropped at random, mirrored half of the time.
    An image and its target are one record: both get the same crop and flip. Validation images stay as they are.
    """

    def __init__(self, cfg, split, device):
        self.cfg, self.device = cfg, device
        self.store = common.ImageStore(cfg, split, round(cfg.size * 286 / 256) if split == "train" else cfg.size)
        if not self.store.paired:
            raise UserError(f"--data {cfg.data}: trainA and trainB are not pairs: cyclegan.py learns without pairs")
        self.rows = common.Rows(self.store.records, device)
        self.classes = self.store.classes
        self.palette = self.classes.palette_on(device) if self.classes else None

    def __len__(self):
        return len(self.rows)

    @property
    def steps(self):
        """Batches in an epoch."""
        return common.steps_in_epoch(len(self), self.cfg.batch_size)

    def batches(self, epoch, first=0):
        """An epoch's training batches from number `first` on; they follow from (seed, epoch, batch, rank) alone."""
        rng = np.random.default_rng([self.cfg.seed, epoch])
        room = self.store.side - self.cfg.size
        order = rng.permutation(len(self))
        plan = rng.integers(0, (room + 1, room + 1, 2), (len(self), 3))  # top, left, flip of every image
        index, plan = (common.rank_rows(x, self.cfg.batch_size)[first:] for x in (order, plan))  # (batches, B, ...)
        for images, jitters in zip(self.rows.batches(index), plan.tolist(), strict=True):
            yield self.sides(jitter(images, jitters, self.cfg.size))

    def in_order(self, count, batch_size=8):
        """The first `count` records, without jitter, in batches (B, 3 + C, S, S) uint8."""
        for first in range(0, count, batch_size):
            index = np.arange(first, min(first + batch_size, count))[None]
            yield torch.stack(next(self.rows.batches(index)))

    def sides(self, records):
        """Records (B, 3 + C, S, S) uint8 -> (input, target), each (B, 3, S, S) in [-1, 1]; labels in class colours."""
        a, b = common.from_bytes(records[:, :3]), records[:, 3:]
        b = common.from_bytes(b) if self.palette is None else common.draw(b[:, 0], self.palette)
        return (a, b) if self.cfg.direction == "AtoB" else (b, a)


def jitter(images, plan, size):
    """Random crops and mirrors: B images (C, S, S), and for each its (top, left, flip) -> (B, C, size, size)."""
    crops = []
    for image, (top, left, flip) in zip(images, plan, strict=True):
        crop = image[:, top : top + size, left : left + size]
        crops.append(crop.flip(2) if flip else crop)
    return torch.stack(crops)


# ----------------------------------------------------------------------------------------------------------- networks


def norm_layer(norm, channels):
    """BatchNorm with scale and shift, or InstanceNorm without."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.InstanceNorm2d(channels)


class UNetGenerator(nn.Module):
    """Encoder and decoder with skips (paper, section 3.2.1): (B, 3, S, S) -> (B, 3, S, S) in [-1, 1], S = 2^n.

    n down blocks to a 1x1 bottleneck, n up blocks back; layers are registered in the order data flows.
    """

    def __init__(self, size, width, norm, dropout):
        super().__init__()
        depth, bias = size.bit_length() - 1, norm == "instance"
        widths = [width * min(2**level, 8) for level in range(depth)]  # 64 128 256 512 512 ...
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, out in enumerate(widths):
            outermost, bottleneck = level == 0, level == depth - 1
            layers = [] if outermost else [nn.LeakyReLU(0.2)]
            layers += [nn.Conv2d(3 if outermost else widths[level - 1], out, 4, 2, 1, bias=bias)]
            layers += [] if outermost or bottleneck else [norm_layer(norm, out)]
            self.downs.append(nn.Sequential(*layers))
        for level in reversed(range(depth)):
            outermost, bottleneck = level == 0, level == depth - 1
            channels, out = widths[level] * (1 if bottleneck else 2), 3 if outermost else widths[level - 1]
            layers = [nn.ReLU(), nn.ConvTranspose2d(channels, out, 4, 2, 1, bias=bias or outermost)]
            layers += [nn.Tanh()] if outermost else [norm_layer(norm, out)]
            layers += [nn.Dropout(dropout)] if 4 <= level < depth - 1 else []
            self.ups.append(nn.Sequential(*layers))

    def forward(self, x):
        skips = []
        for down in self.downs:
            x = down(x)  # (B, 64..512, S/2 .. 1, S/2 .. 1)
            skips.append(x)
        x = self.ups[0](skips.pop())  # (B, 512, 2, 2)
        for up in self.ups[1:]:
            x = up(torch.cat([skips.pop(), x], 1))  # (B, 512..64, 4 .. S/2, 4 .. S/2), at last (B, 3, S, S)
        return x


class ResidualBlock(nn.Module):
    """Two reflection-padded 3x3 convolutions around a shortcut (Johnson et al. 2016, arXiv:1603.08155)."""

    def __init__(self, channels, norm):
        super().__init__()
        layers = []
        for _ in range(2):
            layers += [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3, bias=norm == "instance")]
            layers += [norm_layer(norm, channels), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x):
        return x + self.layers(x)


class ResNetGenerator(nn.Module):
    """Two strided convolutions, residual blocks at a quarter of the side, two up: (B, C, S, S) -> (B, C', S, S)."""

    def __init__(self, channels_in, channels_out, width, blocks, norm):
        super().__init__()
        bias = norm == "instance"
        layers = [
            nn.ReflectionPad2d(3),
            nn.Conv2d(channels_in, width, 7, bias=bias),
            norm_layer(norm, width),
            nn.ReLU(),
        ]
        for channels in (2 * width, 4 * width):  # (B, 128, S/2, S/2), (B, 256, S/4, S/4)
            layers += [nn.Conv2d(channels // 2, channels, 3, 2, 1, bias=bias), norm_layer(norm, channels), nn.ReLU()]
        layers += [ResidualBlock(4 * width, norm) for _ in range(blocks)]
        for channels in (2 * width, width):  # (B, 128, S/2, S/2), (B, 64, S, S)
            layers += [nn.ConvTranspose2d(2 * channels, channels, 3, 2, 1, output_padding=1, bias=bias)]
            layers += [norm_layer(norm, channels), nn.ReLU()]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, channels_out, 7), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class Discriminator(nn.Module):
    """PatchGAN (paper, section 3.2.2): input and image, each (B, 3, S, S) -> logits, one for every patch, (B, 1, P, P).

    patch_gan is the receptive field of a logit in pixels: 16, 70, 286 (1, 3, 5 strided layers) or 1 (1x1 convolutions).
    """

    def __init__(self, width, norm, patch_gan):
        super().__init__()
        bias = norm == "instance"
        kernel, stride, pad = (1, 1, 0) if patch_gan == 1 else (4, 2, 1)
        strided = {1: 1, 16: 1, 70: 3, 286: 5}[patch_gan]
        layers, channels = [nn.Conv2d(6, width, kernel, stride, pad), nn.LeakyReLU(0.2)], width  # (B, 64, S/2, S/2)
        for level in range(1, strided + 1):  # at 70: (B, 128, S/4, S/4), (B, 256, S/8, S/8), (B, 512, S/8 - 1, S/8 - 1)
            out, step = width * min(2**level, 8), stride if level < strided else 1
            layers += [nn.Conv2d(channels, out, kernel, step, pad, bias=bias), norm_layer(norm, out), nn.LeakyReLU(0.2)]
            channels = out
        layers += [nn.Conv2d(channels, 1, kernel, 1, pad, bias=bias or patch_gan != 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x, image):
        return self.layers(torch.cat([x, image], 1))


def init_weights(net):
    """Convolutions N(0, 0.02), norm scales N(1, 0.02), biases 0 (paper, appendix 6.2)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    return net


class VGG16Features(nn.Module):
    """VGG16 up to relu3_3 (Simonyan and Zisserman 2015), frozen: (B, 3, S, S) in [-1, 1] -> (B, 256, S/4, S/4).

    path   the file of its weights, see common.vgg16_weights
    """

    def __init__(self, path):
        super().__init__()
        layers, channels = [], 3
        for out in (64, 64, "pool", 128, 128, "pool", 256, 256, 256):
            if out == "pool":
                layers += [nn.MaxPool2d(2)]
            else:
                layers += [nn.Conv2d(channels, out, 3, 1, 1), nn.ReLU()]
                channels = out
        self.features = nn.Sequential(*layers)
        self.load_state_dict(common.vgg16_weights(path, self.state_dict()))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images):
        return self.features(((images + 1) / 2 - self.mean) / self.std)


# ------------------------------------------------------------------------------------------------------------- losses


def full_precision(x):
    """At least float32, as losses need: bf16 becomes float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gan_loss(logits, real, gan):
    """How far logits are from saying "real" (1) or "fake" (0), the mean over every patch: a scalar.

    bce    cross-entropy, equation 1 of Isola et al. 2017 with the generator's -log D(G(x)) of Goodfellow et al. 2014
    lsgan  squared distance, Mao et al. 2017 (arXiv:1611.04076), equation 9
    """
    logits = full_precision(logits)
    target = torch.full_like(logits, float(real))
    return F.binary_cross_entropy_with_logits(logits, target) if gan == "bce" else F.mse_loss(logits, target)


def l1_loss(fake, target):
    """Mean absolute difference, equation 3 of Isola et al. 2017: a scalar."""
    return F.l1_loss(full_precision(fake), full_precision(target))


def vgg_loss(features, fake, target):
    """Feature reconstruction loss, equation 2 of Johnson et al. 2016 at relu3_3: mean squared difference, a scalar."""
    with torch.autocast(fake.device.type, enabled=False):
        return F.mse_loss(features(full_precision(fake)), features(full_precision(target)))


# -------------------------------------------------------------------------------------------------------------- build


@dataclasses.dataclass
class State:
    """Everything that training changes and a checkpoint holds; `content` is the content loss, which neither is."""

    G: nn.Module
    D: nn.Module | None = None
    opt_G: torch.optim.Optimizer | None = None
    opt_D: torch.optim.Optimizer | None = None
    content: Callable | None = None
    lr_scale: float = 1.0  # what --schedule plateau has made of the rate
    best_error: float = float("inf")
    stalled_epochs: int = 0


def build(cfg, device, training=True):
    """Networks and optimisers on the device; without `training` the generator alone."""
    if cfg.generator == "unet":
        G = UNetGenerator(cfg.size, cfg.width, cfg.norm, cfg.dropout)
    else:
        G = ResNetGenerator(3, 3, cfg.width, cfg.blocks or (9 if cfg.size >= 256 else 6), cfg.norm)
    G = common.place(init_weights(G), device)
    if not training:
        return State(G)
    if cfg.patch_gan == 286 and cfg.size < 128:
        raise UserError(f"--patch-gan 286 sees nothing of an image of --size {cfg.size}: it needs 128 or more")
    D = common.place(init_weights(Discriminator(cfg.width, cfg.norm, cfg.patch_gan)), device)
    content = l1_loss
    if cfg.content == "vgg":
        features = common.place(VGG16Features(cfg.vgg16), device)
        content = functools.partial(vgg_loss, features)
    return State(G, D, common.adam(G, cfg, device), common.adam(D, cfg, device), content)


# --------------------------------------------------------------------------------------------------------- train_step


def train_step(state, batch, cfg):
    """One update of the discriminator, then one of the generator. batch = (input, target), (B, 3, S, S) in [-1, 1].

    L_D = d_weight * [GAN(D(x, y), 1) + GAN(D(x, G(x)), 0)],  L_G = GAN(D(x, G(x)), 1) + lambda_l1 * content(G(x), y)
    """
    x, y = batch
    with common.autocast(cfg, x.device):
        fake = state.G(x)
        logits_fake = state.D(x, fake.detach())  # the D step must not reach G
        logits_real = state.D(x, y)
    d_fake, d_real = gan_loss(logits_fake, False, cfg.gan), gan_loss(logits_real, True, cfg.gan)
    loss_d = cfg.d_weight * (d_real + d_fake)
    state.opt_D.zero_grad()
    loss_d.backward()
    common.average_gradients(state.D)
    state.opt_D.step()

    with common.autocast(cfg, x.device):
        logits_fake = state.D(x, fake)
    g_adv, g_l1 = gan_loss(logits_fake, True, cfg.gan), l1_loss(fake, y)
    g_content = g_l1 if cfg.content == "l1" else state.content(fake, y)
    loss_g = g_adv + cfg.lambda_l1 * g_content
    state.opt_G.zero_grad()
    loss_g.backward(inputs=list(state.G.parameters()))  # the G step leaves D's gradients alone
    common.average_gradients(state.G)
    state.opt_G.step()
    return {"g_total": loss_g, "g_adv": g_adv, "g_l1": g_l1, "d_total": loss_d, "d_real": d_real, "d_fake": d_fake}


def learning_rate(state, cfg, epoch):
    """The rate of an epoch. linear: constant for half of the epochs, then in equal steps towards zero."""
    left = (cfg.epochs - epoch) / (cfg.epochs - cfg.epochs // 2 + 1)
    return cfg.lr * state.lr_scale * (min(1.0, left) if cfg.schedule == "linear" else 1.0)


def follow_plateau(state, error, patience=10):
    """--schedule plateau: halves the rate when the validation error has not fallen by 1 % for `patience` epochs.

    It must be the validation error: adversarial losses rise as training goes well, and a rate that follows them dies.
    """
    if error < 0.99 * state.best_error:
        state.best_error, state.stalled_epochs = error, 0
        return
    state.stalled_epochs += 1
    if state.stalled_epochs == patience:
        state.lr_scale, state.stalled_epochs = state.lr_scale / 2, 0


# ---------------------------------------------------------------------------------------------------------- translate


@torch.no_grad()
def translate(state, inputs, cfg):
    """Inputs (B, 3, S, S) in [-1, 1] -> images (B, 3, S, S), float32 in [-1, 1].

    --eval-norm batch, the paper's policy (section 3.4): dropout stays on and BatchNorm uses the statistics of the image
    itself. running: no dropout, running statistics, which at batch size 1 differ from what the layers saw in training.
    """
    own_statistics = cfg.eval_norm == "batch"
    set_mode(state.G, own_statistics, track=not own_statistics)
    with common.autocast(cfg, inputs.device):
        fakes = [state.G(x) for x in inputs.split(1 if own_statistics else len(inputs))]
    set_mode(state.G, True, track=True)
    return torch.cat(fakes).float()


def set_mode(net, training, track):
    """net.train(training); with track off, BatchNorm in training mode leaves its running statistics as they are."""
    for module in net.train(training).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = track


def evaluate(state, val, cfg, count, constants=None):
    """Measures of the first `count` validation images, {row: {measure: mean}}: the model, and with `constants`, colours
    {name: (3,)} in [-1, 1], the baselines: each constant, and the input copied."""
    torch.manual_seed(cfg.seed)
    measured, confusions = {}, {}
    for records in val.in_order(count):
        x, y = val.sides(records)
        guesses = {"model": translate(state, x, cfg)}
        if constants is not None:
            guesses["copy of the input"] = x
            guesses |= {name: color.to(y).view(1, 3, 1, 1).expand_as(y) for name, color in constants.items()}
        for row, guess in guesses.items():
            measured.setdefault(row, []).append(common.measure_images(common.to_bytes(guess), common.to_bytes(y)))
            if val.classes and cfg.direction == "AtoB":  # the target is a label map drawn in its colours
                labels = common.nearest_class(guess, val.classes), records[:, 3]
                confusions[row] = confusions.get(row, 0) + common.confusion_matrix(*labels, len(val.classes))
    rows = {row: common.average_measures(batches) for row, batches in measured.items()}
    return {row: rows[row] | (common.measure_labels(confusions[row]) if confusions else {}) for row in rows}


# --------------------------------------------------------------------------------------------------------------- main


def generate(state, cfg, device):
    """Translates --generate's images into --out: resized to --size and back, names kept."""
    classes = common.ClassTable.load(cfg.lc_classes) if cfg.direction == "BtoA" else None
    files = common.inputs_of(cfg.generate, cfg.out, labels=classes is not None)
    for path in files:
        torch.manual_seed(cfg.seed)  # for each: a picture does not depend on the others in its folder
        image = classes.palette[common.read_labels(path, classes)] if classes else common.read_image(path)
        small = common.as_tensor(common.resize(image, (cfg.size, cfg.size), labels=classes is not None), device)
        fake = common.as_array(translate(state, common.from_bytes(small), cfg))
        common.write_image(Path(cfg.out) / path.name, common.resize(fake, image.shape[1::-1]))
    print(f"{len(files)} images written to {cfg.out}")


def report(state, train, val, cfg):
    """The whole validation split beside baselines that cost nothing: printed, and written to evaluation.json."""
    side = train.store.B if cfg.direction == "AtoB" else train.store.A
    constants = common.constant_guesses(side, train.classes)
    rows = evaluate(state, val, cfg, len(val), constants)
    common.write_evaluation(cfg, rows, images=len(val), split=val.store.split.name)


@common.command
def main(argv=None):
    cfg, given = common.parse(Config, __doc__, QUICK, argv)
    device = common.start(cfg)
    cfg, checkpoint = common.settle(cfg, given, "pix2pix")
    if cfg.generate or cfg.evaluate:
        state = build(cfg, device, training=False)
        if checkpoint:
            common.restore(state, checkpoint["state"], cfg.checkpoint)
        else:
            common.load_generator(state.G, cfg.init, cfg)
        if cfg.evaluate:
            report(state, Pairs(cfg, "train", device), Pairs(cfg, "val", device), cfg)
        if cfg.generate:
            generate(state, cfg, device)
        return

    train, val = Pairs(cfg, "train", device), Pairs(cfg, "val", device)
    # the checkpoint keeps the whole class table, or that there is none
    cfg = dataclasses.replace(cfg, lc_classes=train.classes.text if train.classes else "pictures")
    state = build(cfg, device)
    if checkpoint:
        common.restore(state, checkpoint["state"], cfg.out)
    elif cfg.init:
        common.load_generator(state.G, cfg.init, cfg)
    run = common.Run(cfg, checkpoint, "pix2pix", train.steps, scores=("val_psnr", "val_rmse"))
    step = common.fast_step(train_step, cfg, device)
    sample_x, sample_y = val.sides(next(val.in_order(min(cfg.sample_rows, len(val)), cfg.sample_rows)))
    for epoch in range(run.epoch, cfg.epochs):
        run.lr = learning_rate(state, cfg, epoch)
        common.set_lr((state.opt_G, state.opt_D), run.lr)
        for batch in train.batches(epoch, run.batch):
            common.seed_step(cfg.seed, epoch, run.batch)
            run.log(step(state, batch, cfg))
            if run.stopping():
                run.stop(state)
        scores = evaluate(state, val, cfg, min(cfg.val_images or len(val), len(val)))["model"]
        if cfg.schedule == "plateau":
            follow_plateau(state, common.of_rank_0(scores["rmse"]))
        columns = {"input": sample_x, "fake": translate(state, sample_x, cfg), "target": sample_y}
        run.end_epoch(state, {"val_psnr": scores["psnr"], "val_rmse": scores["rmse"]}, columns)
    run.close()
    report(state, train, val, cfg)


if __name__ == "__main__":
    main()
