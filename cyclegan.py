"""CycleGAN: translate between two domains without pairs: maps <-> satellite images, land cover <-> satellite images.

    python cyclegan.py --data maps/                                       both directions at once, 200 epochs
    python cyclegan.py --data horse2zebra/                                trainA/ and trainB/, no pairs at all
    python cyclegan.py --data denmark/ --lc-classes s2glc                 A photographs, B land cover of 14 classes
    python cyclegan.py --quick                                            no data, two minutes: a demo world
    python cyclegan.py --evaluate --checkpoint runs/cyclegan/checkpoints/last.pt
    python cyclegan.py --generate folder/ --checkpoint runs/cyclegan/checkpoints/last.pt --direction BtoA --out fakes/

Paper: Zhu, Park, Isola, Efros 2017, Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks,
arXiv:1703.10593.

Differences from the paper: the discriminator has one more strided layer (16x16 logits at 256, receptive field 94);
images that go through the same generator go as one batch. Where B is land cover, it is categorical: generators and
discriminator see exact one-hot maps, made from logits with a straight-through gradient, and the cycle loss is the
cross-entropy of the logits. Pixels without a class are holes, all zeros; D_B sees fake maps with a real map's holes.

Measured: --quick, 74 s on two cores of a CPU: there and back RMSE 16.6 and 13.6 levels; without ever seeing a pair,
satellite -> map 24.4, where a constant colour has 23.2, and map -> satellite 51.1, a constant 34.6: a start, no more.
"""

import dataclasses
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
    size: int = option(256, "side of the images that the networks see", "model", choices=(64, 128, 256, 512))
    lc_classes: str = option("", "B is land cover: s2glc, maps, binary or a classes.json (data/classes.json is found); "
                             "pictures: B is pictures, come what may")  # fmt: skip
    blocks: int = option(0, "residual blocks; 0: 9, or 6 below size 256", low=0)
    width: int = option(64, "channels of the first layer", low=1, high=1024)
    lambda_cycle: float = option(10.0, "weight of the cycle losses", "training", low=0.0)
    lambda_identity: float = option(0.5, "weight of the identity losses, times lambda_cycle; pictures only", low=0.0)
    pool_size: int = option(50, "fakes that the image pool of each domain holds; 0: none", low=0)
    lr: float = option(2e-4, "Adam's rate", low=0.0)
    beta1: float = option(0.5, "Adam's first beta", low=0.0, high=0.999)
    batch_size: int = option(1, "images of each domain a step, in each process", low=1)
    epochs: int = option(200, "passes over the larger domain; the rate falls to zero in the second half", low=1)
    init_AB: str = option("", "weights of G_AB to start from, or to generate with: ours, or published ones")
    init_BA: str = option("", "the same for G_BA")
    seed: int = option(0, "of weights, order, augmentation and pool", low=0, high=2**32 - 1)
    quick: bool = option(False, "small networks, images and epochs: works in two minutes on two CPU cores", "run")
    out: str = option("", "run folder, or folder of the generated images; none: runs/cyclegan")
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
    generate: str = option("", "image or folder to translate with --checkpoint (or --init-AB, --init-BA)")
    direction: str = option("AtoB", "which way --generate translates", choices=("AtoB", "BtoA"))


QUICK = {"size": 64, "width": 16, "blocks": 3, "batch_size": 2, "epochs": 12, "log_every": 12, "sample_rows": 4}

# --------------------------------------------------------------------------------------------------------------- data


class Domains:
    """Images of domain A and of domain B, drawn independently of each other, in batches, on the device.

    Stored at size * 286 / 256, cropped at random, mirrored half of the time, beside land cover also upside down. An
    epoch is as long as the larger domain. Paired data is treated as unpaired: the order of B says nothing about A's.
    """

    def __init__(self, cfg, split, device):
        self.cfg, self.device = cfg, device
        self.store = common.ImageStore(cfg, split, round(cfg.size * 286 / 256) if split == "train" else cfg.size)
        self.paired, self.classes = self.store.paired, self.store.classes
        self.rows_A = common.Rows(self.store.records if self.paired else self.store.A, device)
        self.rows_B = self.rows_A if self.paired else common.Rows(self.store.B, device)
        self.palette = self.classes.palette_on(device) if self.classes else None

    def __len__(self):
        return max(len(self.rows_A), len(self.rows_B))

    @property
    def steps(self):
        """Batches in an epoch."""
        return common.steps_in_epoch(len(self), self.cfg.batch_size)

    def batches(self, epoch, first=0):
        """An epoch's training batches from number `first` on; they follow from (seed, epoch, batch, rank) alone."""
        domains = []
        for domain, rows in enumerate((self.rows_A, self.rows_B)):
            rng = np.random.default_rng([self.cfg.seed, epoch, domain])
            room = self.store.side - self.cfg.size
            rounds = [rng.permutation(len(rows)) for _ in range(-(-len(self) // len(rows)))]
            order = np.concatenate(rounds)[: len(self)]
            plan = rng.integers(0, (room + 1, room + 1, 2, 2 if self.classes else 1), (len(self), 4))
            index, plan = (common.rank_rows(x, self.cfg.batch_size)[first:] for x in (order, plan))
            domains.append(zip(rows.batches(index), plan.tolist(), strict=True))
        for (a, jitters_a), (b, jitters_b) in zip(*domains, strict=True):
            a, b = jitter(a, jitters_a, self.cfg.size), jitter(b, jitters_b, self.cfg.size)
            yield self.side_A(a), self.side_B(b)

    def in_order(self, count, batch_size=8):
        """The first `count` images of each domain, without jitter: batches of (A, B), each (B, C, S, S)."""
        for first in range(0, count, batch_size):
            last = min(first + batch_size, count)
            a, b = (next(rows.batches(np.arange(first, last)[None] % len(rows))) for rows in (self.rows_A, self.rows_B))
            yield self.side_A(torch.stack(a)), self.side_B(torch.stack(b))

    def side_A(self, records):
        """(B, 3 or more, S, S) uint8 -> (B, 3, S, S) in [-1, 1]."""
        return common.from_bytes(records[:, :3])

    def side_B(self, records):
        """(B, C, S, S) uint8 -> (B, 3, S, S) in [-1, 1], or (B, classes, S, S) one-hot, all zeros where ignored."""
        records = records[:, 3:] if self.paired else records
        return one_hot(records[:, 0], len(self.classes)) if self.classes else common.from_bytes(records)

    def picture(self, images):
        """Images of domain B as pictures (B, 3, S, S) in [-1, 1]: one-hot maps in class colours."""
        if not self.classes:
            return images
        index = torch.where(images.sum(1) > 0, images.argmax(1), common.IGNORED)
        return common.draw(index, self.palette)


def jitter(images, plan, size):
    """Random crops and mirrors: B images (C, S, S), and for each its (top, left, flip, upside_down) ->
    (B, C, size, size)."""
    crops = []
    for image, (top, left, flip, upside_down) in zip(images, plan, strict=True):
        crop = image[:, top : top + size, left : left + size]
        crop = crop.flip(2) if flip else crop
        crops.append(crop.flip(1) if upside_down else crop)
    return torch.stack(crops)


def one_hot(index, classes):
    """Class indices (B, S, S) uint8 -> (B, classes, S, S) float32; an ignored pixel is zero in every class."""
    each = torch.arange(classes, dtype=torch.uint8, device=index.device).view(1, -1, 1, 1)
    maps = torch.empty(len(index), classes, *index.shape[1:], device=index.device)
    return torch.eq(index[:, None], each, out=maps)  # straight into floats: on a CPU ten times as fast as by bools


# ----------------------------------------------------------------------------------------------------------- networks


class ResidualBlock(nn.Module):
    """Two reflection-padded 3x3 convolutions around a shortcut (Johnson et al. 2016, arXiv:1603.08155)."""

    def __init__(self, channels):
        super().__init__()
        layers = []
        for _ in range(2):
            layers += [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3)]
            layers += [nn.InstanceNorm2d(channels), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x):
        return x + self.layers(x)


class ResNetGenerator(nn.Module):
    """Two strided convolutions, residual blocks at a quarter of the side, two up: (B, C, S, S) -> (B, C', S, S).

    Pictures end in tanh; land cover comes out as logits.
    """

    def __init__(self, channels_in, channels_out, width, blocks, pictures):
        super().__init__()
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(channels_in, width, 7), nn.InstanceNorm2d(width), nn.ReLU()]
        for channels in (2 * width, 4 * width):  # (B, 128, S/2, S/2), (B, 256, S/4, S/4)
            layers += [nn.Conv2d(channels // 2, channels, 3, 2, 1), nn.InstanceNorm2d(channels), nn.ReLU()]
        layers += [ResidualBlock(4 * width) for _ in range(blocks)]
        for channels in (2 * width, width):  # (B, 128, S/2, S/2), (B, 64, S, S)
            layers += [nn.ConvTranspose2d(2 * channels, channels, 3, 2, 1, output_padding=1)]
            layers += [nn.InstanceNorm2d(channels), nn.ReLU()]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, channels_out, 7), nn.Tanh() if pictures else nn.Identity()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class Discriminator(nn.Module):
    """PatchGAN on an image alone: (B, C, S, S) -> logits (B, 1, S/16, S/16); receptive field 94 pixels."""

    def __init__(self, channels_in, width):
        super().__init__()
        layers, channels = [nn.Conv2d(channels_in, width, 4, 2, 1), nn.LeakyReLU(0.2)], width  # (B, 64, S/2, S/2)
        for out in (2 * width, 4 * width, 8 * width):  # (B, 128, S/4, S/4), (B, 256, S/8, S/8), (B, 512, S/16, S/16)
            layers += [nn.Conv2d(channels, out, 4, 2, 1), nn.InstanceNorm2d(out), nn.LeakyReLU(0.2)]
            channels = out
        layers += [nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(channels, 1, 4, 1, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, image):
        return self.layers(image)


def init_weights(net):
    """Convolutions N(0, 0.02), biases 0 (paper, appendix 7.1)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
            nn.init.zeros_(module.bias)
    return net


def straight_through(logits):
    """Logits (B, classes, S, S) -> exact one-hot maps of the likeliest classes, with the gradient of the softmax
    (Bengio, Leonard, Courville 2013, arXiv:1308.3432)."""
    soft = full_precision(logits).softmax(1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())  # the bracket is exactly 0


class ImagePool(nn.Module):
    """The last `size` fakes of a domain (Shrivastava et al. 2017, arXiv:1612.07828, section 2.3).

    A call takes fakes (B, C, S, S) one after the other. While there is room each is kept and returned; then each is
    returned as it is, or, half of the time, takes the place of a random old one, which is returned. No branch depends
    on a tensor's value, so that a CUDA graph can capture it; the images are buffers, so that a checkpoint holds them.
    """

    def __init__(self, size, channels, side, dtype):
        super().__init__()
        self.size = size
        self.register_buffer("images", torch.zeros(size, channels, side, side, dtype=dtype))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    def forward(self, fakes):
        if self.size == 0:
            return fakes
        returned = []
        for fake in fakes.split(1):
            full = self.count == self.size
            swap = full & (torch.rand(1, device=fake.device) < 0.5)
            slot = torch.where(full, torch.randint(self.size, (1,), device=fake.device), self.count)
            old = self.images.index_select(0, slot)
            returned.append(torch.where(swap, old.to(fake.dtype), fake))
            self.images.index_copy_(0, slot, torch.where(swap | ~full, fake.to(old.dtype), old))
            self.count += ~full
        return torch.cat(returned)


# ------------------------------------------------------------------------------------------------------------- losses


def full_precision(x):
    """At least float32, as losses need: bf16 becomes float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gan_loss(logits, real):
    """Squared distance of logits from 1 (real) or 0 (fake), the mean over every patch: a scalar.

    LSGAN, Mao et al. 2017 (arXiv:1611.04076), equation 9, as section 4 of Zhu et al. 2017 uses it.
    """
    logits = full_precision(logits)
    return F.mse_loss(logits, torch.full_like(logits, float(real)))


def l1_loss(fake, target):
    """Mean absolute difference, equation 2 of Zhu et al. 2017 for one direction: a scalar."""
    return F.l1_loss(full_precision(fake), full_precision(target))


def label_loss(logits, target):
    """Cross-entropy of logits (B, classes, S, S) against one-hot maps, over the pixels that have a class: a scalar.

    The cycle loss of land cover. It takes logits: after a softmax it could not fall below 1.755 for 14 classes.
    """
    log_likelihood = (full_precision(logits).log_softmax(1) * target).sum()
    return -log_likelihood / target.sum().clamp_min(1.0)


# -------------------------------------------------------------------------------------------------------------- build


@dataclasses.dataclass
class State:
    """Everything that training changes and a checkpoint holds."""

    G_AB: nn.Module
    G_BA: nn.Module
    D_A: nn.Module | None = None
    D_B: nn.Module | None = None
    opt_G: torch.optim.Optimizer | None = None
    opt_D: torch.optim.Optimizer | None = None
    pool_A: nn.Module | None = None
    pool_B: nn.Module | None = None


def build(cfg, device, training=True):
    """Networks, optimisers and pools on the device; without `training` the generators alone."""
    classes = common.ClassTable.load(cfg.lc_classes)
    channels_B, blocks = len(classes) if classes else 3, cfg.blocks or (9 if cfg.size >= 256 else 6)
    G_AB = ResNetGenerator(3, channels_B, cfg.width, blocks, pictures=not classes)
    G_BA = ResNetGenerator(channels_B, 3, cfg.width, blocks, pictures=True)
    G_AB, G_BA = (common.place(init_weights(G), device) for G in (G_AB, G_BA))
    if not training:
        return State(G_AB, G_BA)
    D_A, D_B = Discriminator(3, cfg.width), Discriminator(channels_B, cfg.width)
    D_A, D_B = (common.place(init_weights(D), device) for D in (D_A, D_B))
    opt_G, opt_D = (common.adam(nn.ModuleList(nets), cfg, device) for nets in ((G_AB, G_BA), (D_A, D_B)))
    pool_A = ImagePool(cfg.pool_size, 3, cfg.size, torch.float32).to(device)
    pool_B = ImagePool(cfg.pool_size, channels_B, cfg.size, torch.uint8 if classes else torch.float32).to(device)
    return State(G_AB, G_BA, D_A, D_B, opt_G, opt_D, pool_A, pool_B)


# --------------------------------------------------------------------------------------------------------- train_step


def train_step(state, batch, cfg):
    """One update of both generators, then one of both discriminators. batch = (real_A, real_B), (B, C, S, S):
    pictures in [-1, 1], or land cover as one-hot maps, all zeros where ignored.

    L_G = GAN(D_B(G_AB(A)), 1) + GAN(D_A(G_BA(B)), 1) + lambda_cycle [cycle_A + cycle_B]
          + lambda_cycle * lambda_identity [identity_A + identity_B]
    L_D = 1/2 [GAN(D(real), 1) + GAN(D(fake), 0)] for each domain; fakes come through the image pools
    """
    real_A, real_B = batch
    land_cover = cfg.lc_classes not in ("", "pictures")
    weight_identity = 0.0 if land_cover else cfg.lambda_cycle * cfg.lambda_identity
    with common.autocast(cfg, real_A.device):
        if weight_identity > 0:  # InstanceNorm keeps the images of a batch apart: one batch gives what two would
            fake_B, same_B = state.G_AB(torch.cat([real_A, real_B])).chunk(2)
            fake_A, same_A = state.G_BA(torch.cat([real_B, real_A])).chunk(2)
        else:
            fake_B, fake_A = state.G_AB(real_A), state.G_BA(real_B)
        if land_cover:
            fake_B = straight_through(fake_B)
        cycled_A, cycled_B = state.G_BA(fake_B), state.G_AB(fake_A)
        if land_cover:
            fake_B = fake_B * real_B.sum(1, keepdim=True)  # D_B must not tell maps by their holes
        logits_A, logits_B = state.D_A(fake_A), state.D_B(fake_B)
    losses = {"adv_AB": gan_loss(logits_B, True), "adv_BA": gan_loss(logits_A, True)}
    losses["cycle_A"] = l1_loss(cycled_A, real_A)
    losses["cycle_B"] = label_loss(cycled_B, real_B) if land_cover else l1_loss(cycled_B, real_B)
    loss_g = losses["adv_AB"] + losses["adv_BA"] + cfg.lambda_cycle * (losses["cycle_A"] + losses["cycle_B"])
    if weight_identity > 0:
        losses |= {"identity_A": l1_loss(same_A, real_A), "identity_B": l1_loss(same_B, real_B)}
        loss_g = loss_g + weight_identity * (losses["identity_A"] + losses["identity_B"])
    generators = nn.ModuleList((state.G_AB, state.G_BA))
    state.opt_G.zero_grad()
    loss_g.backward(inputs=list(generators.parameters()))  # the G step leaves D's gradients alone
    common.average_gradients(generators)
    state.opt_G.step()

    fake_A, fake_B = state.pool_A(fake_A.detach()), state.pool_B(fake_B.detach())  # the D step must not reach G
    with common.autocast(cfg, real_A.device):
        real_logits_A, fake_logits_A = state.D_A(torch.cat([real_A, fake_A])).chunk(2)
        real_logits_B, fake_logits_B = state.D_B(torch.cat([real_B, fake_B])).chunk(2)
    losses["d_A"] = 0.5 * (gan_loss(real_logits_A, True) + gan_loss(fake_logits_A, False))
    losses["d_B"] = 0.5 * (gan_loss(real_logits_B, True) + gan_loss(fake_logits_B, False))
    state.opt_D.zero_grad()
    (losses["d_A"] + losses["d_B"]).backward()
    common.average_gradients(nn.ModuleList((state.D_A, state.D_B)))
    state.opt_D.step()
    return losses


def learning_rate(cfg, epoch):
    """The rate of an epoch: constant for half of the epochs, then in equal steps towards zero."""
    return cfg.lr * min(1.0, (cfg.epochs - epoch) / (cfg.epochs - cfg.epochs // 2 + 1))


# ---------------------------------------------------------------------------------------------------------- translate


@torch.no_grad()
def translate(state, inputs, cfg):
    """Inputs (B, C, S, S) of one domain -> images of the other, float32, the way cfg.direction says.

    Pictures are in [-1, 1]; land cover is one-hot, in and out. InstanceNorm knows no batch and no mode.
    """
    with common.autocast(cfg, inputs.device):
        fakes = state.G_AB(inputs) if cfg.direction == "AtoB" else state.G_BA(inputs)
    if cfg.direction == "AtoB" and cfg.lc_classes not in ("", "pictures"):
        return straight_through(fakes).float()
    return fakes.float()


def both_ways(state, a, b, cfg):
    """(fake B, cycled A, fake A, cycled B) of images a and b."""
    a_to_b, b_to_a = (dataclasses.replace(cfg, direction=direction) for direction in ("AtoB", "BtoA"))
    fake_B, fake_A = translate(state, a, a_to_b), translate(state, b, b_to_a)
    return fake_B, translate(state, fake_B, b_to_a), fake_A, translate(state, fake_A, a_to_b)


def evaluate(state, val, cfg, count, constants=None):
    """Measures of the first `count` validation images as ({row: {measure: mean}}, confusion): how well each domain
    survives its cycle and, where A and B are pairs, each translation against its partner. `constants`, for A and for B
    {name: value (1, C, 1, 1)}, add the baselines. confusion is that of generated land cover, else None."""
    measured = {}
    for a, b in val.in_order(count):
        fake_B, cycled_A, fake_A, cycled_B = both_ways(state, a, b, cfg)
        rows = {"A to B to A: model": (cycled_A, a), "B to A to B: model": (cycled_B, b)}
        if val.paired:
            rows |= {"A to B: model": (fake_B, b), "B to A: model": (fake_A, a)}
        if val.paired and constants:
            copies = (val.picture(b), a) if val.classes else (b, a)
            rows |= {"B to A: copy of the input": copies} | (
                {} if val.classes else {"A to B: copy of the input": (a, b)}
            )
            for way, real, guesses in zip(("B to A", "A to B"), (a, b), constants, strict=True):
                rows |= {f"{way}: {name}": (guess.to(a).expand_as(real), real) for name, guess in guesses.items()}
        for row, (guess, real) in rows.items():
            if val.classes and real is b:
                index = torch.where(real.sum(1) > 0, real.argmax(1), common.IGNORED)
                result = common.confusion_matrix(guess.argmax(1), index, len(val.classes))
            else:
                result = common.measure_images(common.to_bytes(guess), common.to_bytes(real))
            measured.setdefault(row, []).append(result)
    rows = {}
    for row, results in sorted(measured.items()):
        labels = isinstance(results[0], torch.Tensor)
        rows[row] = common.measure_labels(sum(results)) if labels else common.average_measures(results)
    return rows, sum(measured["A to B: model"]) if val.classes and val.paired else None


# --------------------------------------------------------------------------------------------------------------- main


def generate(state, cfg, device):
    """Translates --generate's images into --out: resized to --size and back, names kept.

    Land cover is written as a PNG of class indices with the classes' palette, and beside it as colours.
    """
    classes = common.ClassTable.load(cfg.lc_classes)
    from_labels, to_labels = (classes and cfg.direction == way for way in ("BtoA", "AtoB"))
    files = common.inputs_of(cfg.generate, cfg.out, labels=from_labels, by_stem=to_labels)
    for path in files:
        image = common.read_labels(path, classes) if from_labels else common.read_image(path)
        small = common.as_tensor(common.resize(image, (cfg.size, cfg.size), labels=from_labels), device)
        fake = translate(state, one_hot(small, len(classes)) if from_labels else common.from_bytes(small), cfg)
        fake = fake[0].argmax(0).byte().cpu().numpy() if to_labels else common.as_array(fake)
        back = common.resize(fake, image.shape[1::-1], labels=to_labels)
        if to_labels:
            common.write_labels(Path(cfg.out) / path.name, back, classes)
        else:
            common.write_image(Path(cfg.out) / path.name, back)
    print(f"{len(files)} images written to {cfg.out}")


def report(state, train, val, cfg):
    """The whole validation split beside baselines that cost nothing: printed, and written to evaluation.json."""
    constants_A = common.constant_guesses(train.store.A)
    if train.classes:
        frequent = common.level_counts(train.store.B)[0, : len(train.classes)].argmax()
        constants_B = {"most frequent class": torch.eye(len(train.classes))[frequent]}
    else:
        constants_B = common.constant_guesses(train.store.B)
    constants = [{k: v.view(1, -1, 1, 1) for k, v in side.items()} for side in (constants_A, constants_B)]
    rows, confusion = evaluate(state, val, cfg, len(val), constants)
    common.write_evaluation(cfg, rows, images=len(val), split=val.store.split.name)
    if confusion is not None:
        common.plot_confusion(confusion, val.classes.names, Path(cfg.out) / "confusion.png")


@common.command
def main(argv=None):
    cfg, given = common.parse(Config, __doc__, QUICK, argv)
    device = common.start(cfg)
    cfg, checkpoint = common.settle(cfg, given, "cyclegan")
    if cfg.generate or cfg.evaluate:
        state = build(cfg, device, training=False)
        load(state, cfg, checkpoint, cfg.checkpoint)
        if cfg.evaluate:
            report(state, Domains(cfg, "train", device), Domains(cfg, "val", device), cfg)
        if cfg.generate:
            generate(state, cfg, device)
        return

    train, val = Domains(cfg, "train", device), Domains(cfg, "val", device)
    # the checkpoint keeps the whole class table, or that there is none
    cfg = dataclasses.replace(cfg, lc_classes=train.classes.text if train.classes else "pictures")
    state = build(cfg, device)
    load(state, cfg, checkpoint, cfg.out)
    scores = ("val_cycle_A", "val_accuracy_AB" if val.classes else "val_rmse_AB", "val_rmse_BA")
    run = common.Run(cfg, checkpoint, "cyclegan", train.steps, scores=scores if val.paired else scores[:1])
    step = common.fast_step(train_step, cfg, device)
    sample_A, sample_B = next(val.in_order(min(cfg.sample_rows, len(val)), cfg.sample_rows))
    for epoch in range(run.epoch, cfg.epochs):
        run.lr = learning_rate(cfg, epoch)
        common.set_lr((state.opt_G, state.opt_D), run.lr)
        for batch in train.batches(epoch, run.batch):
            common.seed_step(cfg.seed, epoch, run.batch)
            run.log(step(state, batch, cfg))
            if run.stopping():
                run.stop(state)
        rows, _ = evaluate(state, val, cfg, min(cfg.val_images or len(val), len(val)))
        measured = [rows["A to B to A: model"]["rmse"]]
        if val.paired:
            measured += [
                rows["A to B: model"]["pixel_accuracy" if val.classes else "rmse"],
                rows["B to A: model"]["rmse"],
            ]
        fake_B, cycled_A, fake_A, cycled_B = both_ways(state, sample_A, sample_B, cfg)
        columns = {"real A": sample_A, "fake B": val.picture(fake_B), "cycle A": cycled_A}
        columns |= {"real B": val.picture(sample_B), "fake A": fake_A, "cycle B": val.picture(cycled_B)}
        run.end_epoch(state, dict(zip(run.scores, measured, strict=True)), columns)
    run.close()
    report(state, train, val, cfg)


def load(state, cfg, checkpoint, path):
    """Fills a State from a checkpoint, or its generators from --init-AB and --init-BA."""
    if checkpoint:
        common.restore(state, checkpoint["state"], path)
        return
    for G, key, init in ((state.G_AB, "G_AB", cfg.init_AB), (state.G_BA, "G_BA", cfg.init_BA)):
        if init:
            common.load_generator(G, init, cfg, key)
        elif cfg.generate and key == f"G_{cfg.direction[0]}{cfg.direction[-1]}":
            raise UserError(f"--generate with --direction {cfg.direction}: needs --checkpoint, or --init-{key[2:]}")


if __name__ == "__main__":
    main()
