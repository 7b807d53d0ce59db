"""CycleGAN: translate between two domains without pairs, such as maps and photographs.

Two generators, G_AB and G_BA, translate in opposite directions. Discriminators D_A and D_B learn
to tell translated images from real ones. Translation there and back must give the same image (the
cycle loss): this ties a translation to its input, since there are no pairs to do so.

    python cyclegan.py --data maps/                             both directions, 200 epochs
    python cyclegan.py --data horse2zebra/                      trainA/ and trainB/, no pairs at all
    python cyclegan.py --data denmark/ --lc-classes s2glc       A photographs, B land cover
    python cyclegan.py --quick                                  no data, a minute: a demo world
    python cyclegan.py --evaluate --checkpoint runs/cyclegan/checkpoints/last.pt
    python cyclegan.py --generate labels/ --checkpoint X --direction BtoA --out fakes/

Paper: Zhu, Park, Isola, Efros 2017, Unpaired Image-to-Image Translation using Cycle-Consistent
Adversarial Networks, arXiv:1703.10593.

Differences from the paper:
- Four layers of the discriminator have stride 2, as in the paper's appendix; in the authors' code
  three have. The 16x16 logits at 256 have receptive fields of 94 pixels, not 70.
- The identity loss, which the paper uses for paintings (section 5.2), is on for all pictures
  where A and B have equally many bands.
- Land cover is categorical. G_BA and D_B get exact one-hot maps, made from logits
  with a straight-through gradient, and the cycle loss is the cross-entropy of the logits. Pixels
  without a class are holes, all zeros; fake maps get a real map's holes before they reach D_B.
"""

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import UserError, option

# ----------------------------------------------------------------------------------------- networks


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


class ResidualBlock(nn.Module):
    """Two reflection-padded 3x3 convolutions and a shortcut (after arXiv:1603.08155)."""

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x):
        return x + self.layers(x)


class ResNetGenerator(nn.Module):
    """Two strided convolutions, residual blocks, two back up: (B, C, S, S) -> (B, C', S, S).

    pictures: tanh is the last layer; else the output is logits of land cover.
    """

    def __init__(self, channels_in, channels_out, width, blocks, pictures, upsample="transposed"):
        super().__init__()
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(channels_in, width, 7)]
        layers += [nn.InstanceNorm2d(width), nn.ReLU()]
        for out in (2 * width, 4 * width):  # (B, 128, S/2, S/2), (B, 256, S/4, S/4)
            layers += [nn.Conv2d(out // 2, out, 3, 2, 1)]
            layers += [nn.InstanceNorm2d(out), nn.ReLU()]
        layers += [ResidualBlock(4 * width) for _ in range(blocks)]
        for out in (2 * width, width):  # (B, 128, S/2, S/2), (B, 64, S, S)
            conv = nn.ConvTranspose2d(2 * out, out, 3, 2, 1, output_padding=1)
            layers += [doubling(conv, upsample), nn.InstanceNorm2d(out), nn.ReLU()]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, channels_out, 7)]
        layers += [nn.Tanh() if pictures else nn.Identity()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class Discriminator(nn.Module):
    """PatchGAN on an image alone: (B, C, S, S) -> logits (B, 1, S/16, S/16) of 94x94 pixels."""

    def __init__(self, channels_in, width):
        super().__init__()
        layers = [nn.Conv2d(channels_in, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for out in (2 * width, 4 * width, 8 * width):  # 128 at S/4, 256 at S/8, 512 at S/16
            layers += [nn.Conv2d(channels, out, 4, 2, 1)]
            layers += [nn.InstanceNorm2d(out), nn.LeakyReLU(0.2)]
            channels = out
        layers += [nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(channels, 1, 4, 1, 1)]  # stays S/16
        self.layers = nn.Sequential(*layers)

    def forward(self, image):
        return self.layers(image)


def init_weights(net):
    """Convolutions N(0, 0.02) (paper, appendix 7.1), biases 0."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
            nn.init.zeros_(module.bias)
    return net


def straight_through(logits):
    """Logits (B, classes, S, S) -> exact one-hot maps, with the gradient of the softmax.

    After Bengio, Leonard, Courville 2013 (arXiv:1308.3432); as the straight-through estimator of
    Jang, Gu, Poole 2017 (arXiv:1611.01144), without its noise.
    """
    soft = common.full_precision(logits).softmax(1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())  # the value is hard's: the bracket is exactly 0


class ImagePool(nn.Module):
    """`size` earlier fakes of a domain (after Shrivastava et al. 2017, arXiv:1612.07828, 2.3).

    For each fake (C, S, S) of a batch, as in the authors' code, in plain Python:

        if len(images) < size:  # there is room: keep it
            images.append(fake)
            return fake
        if random() >= 0.5:
            return fake
        slot = randrange(size)  # an old one is returned, and this one takes its slot
        old, images[slot] = images[slot], fake
        return old

    The code below does the same without a branch on a tensor's value, so that a CUDA graph can
    capture it. The images are buffers, so that a checkpoint keeps them.
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
            anywhere = torch.randint(self.size, (1,), device=fake.device)
            slot = torch.where(full, anywhere, self.count)
            old = self.images.index_select(0, slot)
            kept = torch.where(swap | ~full, fake.to(old.dtype), old)
            returned.append(torch.where(swap, old.to(fake.dtype), fake))
            self.images.index_copy_(0, slot, kept)
            self.count += ~full
        return torch.cat(returned)


# ------------------------------------------------------------------------------------------- losses


def gan_loss(logits, is_real):
    """Squared distance of logits from 1 (real) or 0 (fake), the mean over patches: a scalar.

    LSGAN, equation 9 of Mao et al. 2017 (arXiv:1611.04076) without its 1/2, as in section 4 of Zhu
    et al. 2017.
    """
    logits = common.full_precision(logits)
    return F.mse_loss(logits, torch.full_like(logits, float(is_real)))


def l1_loss(fake, target):
    """Mean absolute difference where target is not NaN, Zhu et al. 2017, equation 2: a scalar."""
    known = ~target.isnan()
    difference = common.full_precision(fake) - common.full_precision(target)
    return torch.where(known, difference, 0.0).abs().sum() / known.sum().clamp_min(1)


def label_loss(logits, target):
    """Cross-entropy of logits (B, classes, S, S) against one-hot maps: a scalar.

    The cycle loss of land cover, over the pixels that have a class. It needs logits: if it took
    probabilities for logits, it could not fall below 1.755 for 14 classes.
    """
    total = F.cross_entropy(common.full_precision(logits), target, reduction="sum")
    return total / target.sum().clamp_min(1.0)


# ------------------------------------------------------------------------------------------- Config


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """The model's own options; common.Options has data, size, width and so on.

    A group includes the options below it. A checkpoint fixes group "model" and `fixed` options.
    """

    script = "cyclegan"

    blocks: int = option(0, "residual blocks; 0: 9, or 6 below 256", group="model", low=0)
    upsample: str = option(
        "transposed",
        "doubling layers of both G: transposed (convolution), resize (and then a convolution)",
        choices=("transposed", "resize"),
    )
    lambda_cycle: float = option(10.0, "weight of the cycle losses", group="training", low=0.0)
    lambda_identity: float = option(
        0.5, "weight of the identity losses, times --lambda-cycle; pictures only", low=0.0
    )
    pool_size: int = option(50, "fakes in the image pool of a domain; 0: none", low=0, high=10**4)
    load_size: int = option(0, "side that crops are taken from; 0: 286/256 of --size", low=0)
    lr: float = option(2e-4, "learning rate of Adam", low=0.0)
    batch_size: int = option(1, "images of each domain in a step of one process", low=1, fixed=True)
    epochs: int = option(200, "passes over the larger domain", low=1, high=10**6)
    epochs_decay: int = option(-1, "last epochs, in which the rate falls; -1: half of all", low=-1)
    init_AB: str = option(
        "", "start from these weights of G_AB (a checkpoint: D_B, too)", file=True, weights=True
    )
    init_BA: str = option(
        "", "start from these weights of G_BA (a checkpoint: D_A, too)", file=True, weights=True
    )
    direction: str = option(
        "AtoB", "direction of --generate and --serve", group="use", choices=("AtoB", "BtoA")
    )
    fid: bool = option(False, "with --evaluate: FID, KID, LPIPS (needs torchmetrics)")


QUICK = {"size": 64, "width": 16, "blocks": 3, "batch_size": 2, "epochs": 8, "log_every": 12}

# --------------------------------------------------------------------------------------------- data


class Domains:
    """Images of domain A and of domain B, drawn independently of each other, in batches.

    Training images are stored at 286/256 of the size, cropped at random and mirrored half of the
    time (--flip), with land cover also turned upside down. An epoch is as long as the larger
    domain. Paired data is treated as unpaired: B is shuffled apart from A.
    """

    def __init__(self, cfg, split, device):
        self.cfg = cfg
        side = common.load_size(cfg) if split == "train" else cfg.size
        self.store = common.ImageStore(cfg, split, side)
        self.paired, self.classes = self.store.paired, self.store.classes
        self.loader_A = self.loader_B = common.Loader(self.store.rows["A"], device)  # of pairs
        if not self.paired:
            self.loader_B = common.Loader(self.store.rows["B"], device)

    def __len__(self):
        return max(len(self.loader_A), len(self.loader_B))

    def batches(self, epoch, first=0):
        """An epoch's batches from batch `first` on: the same for the same seed, epoch and rank."""
        rng_A, rng_B = (np.random.default_rng([self.cfg.seed, epoch, k]) for k in (0, 1))
        drawn_A = self.drawn(self.loader_A, rng_A, first)
        drawn_B = self.drawn(self.loader_B, rng_B, first)
        for a, b in zip(drawn_A, drawn_B, strict=True):
            yield self.side_A(a), self.side_B(b)

    def drawn(self, loader, rng, first):
        """One domain's images in random order, jittered, batch by batch."""
        rounds = math.ceil(len(self) / len(loader))  # of the smaller domain
        order = np.concatenate([rng.permutation(len(loader)) for _ in range(rounds)])[: len(self)]
        room = self.store.side - self.cfg.size
        auto = "both" if self.classes else "horizontal"
        turns = common.turns(auto if self.cfg.flip == "auto" else self.cfg.flip)
        bounds = room + 1, room + 1, *turns  # of top, left, flip, upside_down
        crops = rng.integers(0, bounds, (len(self), 4))
        order, crops = common.batches_of_rank(self.cfg.batch_size, first, order, crops)
        for images, crop in zip(loader.batches(order), crops, strict=True):
            yield jitter(images, crop.tolist(), self.cfg.size)

    def in_order(self, images):
        """Images by index, without jitter: batches (A, B); the smaller domain repeats."""
        for index in common.chunks(images):
            a = next(self.loader_A.batches(index[None] % len(self.loader_A)))
            b = next(self.loader_B.batches(index[None] % len(self.loader_B)))
            yield self.side_A(torch.stack(a)), self.side_B(torch.stack(b))

    def side_A(self, records):
        """Records -> (B, C, S, S) in [-1, 1], or NaN where there is no data."""
        return self.store.images("A", records)

    def side_B(self, records):
        """Records -> pictures, as side_A's, or one-hot maps (B, classes, S, S)."""
        images = self.store.images("B", records)
        return common.one_hot(images, len(self.classes)) if self.classes else images

    def picture(self, images):
        """Images of domain B as pictures (B, C, S, S) in [-1, 1]."""
        return common.draw(common.class_index(images), self.classes) if self.classes else images


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
    """Networks, optimisers, tensors and numbers that training changes and a checkpoint keeps."""

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
    channels_A = cfg.channels("A")
    channels_B = len(cfg.classes) if cfg.classes else cfg.channels("B")
    blocks = cfg.blocks or (9 if cfg.size >= 256 else 6)
    G_AB = ResNetGenerator(channels_A, channels_B, cfg.width, blocks, not cfg.classes, cfg.upsample)
    G_BA = ResNetGenerator(channels_B, channels_A, cfg.width, blocks, True, cfg.upsample)
    G_AB, G_BA = (common.to_device(init_weights(G), device) for G in (G_AB, G_BA))
    state = State(G_AB, G_BA)
    if not training:
        return state
    D_A, D_B = Discriminator(channels_A, cfg.width), Discriminator(channels_B, cfg.width)
    state.D_A, state.D_B = (common.to_device(init_weights(D), device) for D in (D_A, D_B))
    state.opt_G = common.adam(nn.ModuleList([state.G_AB, state.G_BA]), cfg, device)
    state.opt_D = common.adam(nn.ModuleList([state.D_A, state.D_B]), cfg, device)
    dtype_B = torch.uint8 if cfg.classes else torch.float32
    state.pool_A = ImagePool(cfg.pool_size, channels_A, cfg.size, torch.float32).to(device)
    state.pool_B = ImagePool(cfg.pool_size, channels_B, cfg.size, dtype_B).to(device)
    return state


# --------------------------------------------------------------------------------------- train_step


def train_step(state, batch, cfg):
    """One update of both generators, then one of both discriminators. batch = (A, B).

    Each is (B, C, S, S): pictures in [-1, 1], NaN without data, or one-hot maps, zeros if ignored.

    L_G = GAN(D_B(G_AB(A)), 1) + GAN(D_A(G_BA(B)), 1) + lambda_cycle [cycle_A + cycle_B]
          + lambda_cycle * lambda_identity [identity_A + identity_B]
    L_D = 1/2 [GAN(D(real), 1) + GAN(D(fake), 0)] for each domain; fakes come through the pools
    """
    A, B = batch
    real_A, real_B = common.filled(A), common.filled(B)  # mean colours in place of NaN
    alike = real_A.shape == real_B.shape and not cfg.classes
    with_identity = cfg.lambda_identity > 0 and alike
    with common.autocast(cfg, real_A.device):
        fake_B = state.G_AB(real_A)
        fake_A = state.G_BA(real_B)
        if cfg.classes:
            fake_B = straight_through(fake_B)
        cycled_A = state.G_BA(fake_B)
        cycled_B = state.G_AB(fake_A)
        if with_identity:
            same_A = state.G_BA(real_A)
            same_B = state.G_AB(real_B)
        if cfg.classes:
            fake_B = fake_B * real_B.sum(1, keepdim=True)  # the holes of this batch's real map
        fake_A, fake_B = common.holes_of(A, fake_A), common.holes_of(B, fake_B)
        logits_A = state.D_A(fake_A)
        logits_B = state.D_B(fake_B)
    losses = {
        "adv_AB": gan_loss(logits_B, True),
        "adv_BA": gan_loss(logits_A, True),
        "cycle_A": l1_loss(cycled_A, A),
        "cycle_B": label_loss(cycled_B, real_B) if cfg.classes else l1_loss(cycled_B, B),
    }
    loss_g = losses["adv_AB"] + losses["adv_BA"]
    loss_g = loss_g + cfg.lambda_cycle * (losses["cycle_A"] + losses["cycle_B"])
    if with_identity:
        losses["identity_A"] = l1_loss(same_A, A)
        losses["identity_B"] = l1_loss(same_B, B)
        identity = losses["identity_A"] + losses["identity_B"]
        loss_g = loss_g + cfg.lambda_cycle * cfg.lambda_identity * identity
    generators = nn.ModuleList([state.G_AB, state.G_BA])
    state.opt_G.zero_grad()
    loss_g.backward(inputs=list(generators.parameters()))  # no gradients for D's weights
    common.average_gradients(generators)
    state.opt_G.step()

    fake_A = state.pool_A(fake_A.detach())  # the D step must not reach G
    fake_B = state.pool_B(fake_B.detach())
    with common.autocast(cfg, real_A.device):
        logits_real_A, logits_fake_A = state.D_A(real_A), state.D_A(fake_A)
        logits_real_B, logits_fake_B = state.D_B(real_B), state.D_B(fake_B)
    losses["d_A"] = 0.5 * (gan_loss(logits_real_A, True) + gan_loss(logits_fake_A, False))
    losses["d_B"] = 0.5 * (gan_loss(logits_real_B, True) + gan_loss(logits_fake_B, False))
    state.opt_D.zero_grad()
    (losses["d_A"] + losses["d_B"]).backward()
    common.average_gradients(nn.ModuleList([state.D_A, state.D_B]))
    state.opt_D.step()
    return losses


def learning_rate(cfg, epoch):
    """The rate of an epoch: constant, then falling in equal steps for --epochs-decay.

    As in the authors' first PyTorch code, the epoch after the last would have the rate zero.
    """
    decay = cfg.epochs // 2 if cfg.epochs_decay < 0 else min(cfg.epochs_decay, cfg.epochs)
    return cfg.lr * min(1.0, (cfg.epochs - epoch) / (decay + 1))


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
    else:
        load_generators(state, cfg)
    train, val = Domains(cfg, "train", device), Domains(cfg, "val", device)
    cells = score_cells(cfg, val.paired)
    run = common.Run(cfg, checkpoint, train, scores=list(cells))
    step = common.fast_step(train_step, cfg, device)
    sample_images = common.spread(cfg.sample_rows, len(val))
    val_images = common.spread(cfg.val_images, len(val))
    for epoch in range(run.epoch, cfg.epochs):
        run.set_lr(learning_rate(cfg, epoch), state.opt_G, state.opt_D)
        for batch in train.batches(epoch, run.batch):
            common.seed_step(cfg.seed, epoch, run.batch)
            run.end_step(state, step(state, batch, cfg))
        table = evaluate(state, val, cfg, val_images).table()
        scores = {name: table[row][measure] for name, (row, measure) in cells.items()}
        run.end_epoch(state, scores, sample(state, val, cfg, sample_images))
    run.close()
    report(state, val, cfg, run.histograms)


# ---------------------------------------------------------------------------------------------- use


@torch.no_grad()
def translate(state, inputs, cfg, direction=None):
    """Inputs (B, C, S, S) of one domain -> images of the other, float32.

    Pictures are in [-1, 1]; land cover is one-hot, in and out. direction: "AtoB" or "BtoA"; None:
    --direction. Without dropout and BatchNorm the networks need no eval().
    """
    to_B = (direction or cfg.direction) == "AtoB"
    net = state.G_AB if to_B else state.G_BA
    with common.autocast(cfg, inputs.device):
        fakes = net(common.filled(inputs))
    if to_B and cfg.classes:
        fakes = straight_through(fakes)
    return fakes.float()


def both_ways(state, real_A, real_B, cfg):
    """(fake_B, cycled_A, fake_A, cycled_B) of images of both domains."""
    fake_B = translate(state, real_A, cfg, "AtoB")
    fake_A = translate(state, real_B, cfg, "BtoA")
    cycled_A = translate(state, fake_B, cfg, "BtoA")
    cycled_B = translate(state, fake_A, cfg, "AtoB")
    return fake_B, cycled_A, fake_A, cycled_B


def sample(state, val, cfg, images):
    """The columns of a sample grid, {title: (B, C, S, S) in [-1, 1]}, of these images."""
    batches_A, batches_B = zip(*val.in_order(images), strict=True)
    real_A, real_B = torch.cat(batches_A), torch.cat(batches_B)
    fake_B, cycled_A, fake_A, cycled_B = both_ways(state, real_A, real_B, cfg)
    return {
        "real A": real_A,
        "fake B": val.picture(fake_B),
        "cycle A": cycled_A,
        "real B": val.picture(real_B),
        "fake A": fake_A,
        "cycle B": val.picture(cycled_B),
    }


def evaluate(state, val, cfg, images, constants=None, judge=None):
    """The Scores of these validation images: each domain after its cycle and, where A and B are
    pairs, each translation against its partner.

    images     by their index in the larger domain; the smaller one repeats, as in training, so
               that some of its images count twice
    constants  {"A": .., "B": ..}, from common.constant_colors: adds the baselines, a copy of the
               input and one colour for the image or for each class
    judge      measures whether generated photographs show the land cover that was asked for
    """
    scores = common.Scores(brief=constants is None, fid=cfg.fid)
    for real_A, real_B in val.in_order(images):
        labels = common.class_index(real_B) if cfg.classes else None
        fake_B, cycled_A, fake_A, cycled_B = both_ways(state, real_A, real_B, cfg)
        if val.paired and not cfg.classes:  # a pixel counts if both have data
            missing = (real_A.sum(1, keepdim=True) + real_B.sum(1, keepdim=True)).isnan()
            real_A, real_B = (x.masked_fill(missing, torch.nan) for x in (real_A, real_B))
        guesses_A = {"B to A: model": fake_A} if val.paired else {}
        guesses_B = {"A to B: model": fake_B} if val.paired else {}
        if val.paired and constants:
            for name, guess in baselines_of_A(val, real_A, real_B, constants["A"]).items():
                guesses_A[f"B to A: {name}"] = guess
            for name, guess in baselines_of_B(val, real_A, real_B, constants["B"]).items():
                guesses_B[f"A to B: {name}"] = guess
        guesses_A["A to B to A: model"] = cycled_A
        guesses_B["B to A to B: model"] = cycled_B
        for row, guess in guesses_A.items():
            scores.add_images(row, guess, real_A, val.store.limits["A"])
        for row, guess in guesses_B.items():
            if cfg.classes:
                scores.add_labels(row, guess.argmax(1), labels, len(cfg.classes))
            else:
                scores.add_images(row, guess, real_B, val.store.limits["B"])
        scores.add_distances("B to A: model", fake_A, real_A, val.paired)
        if not cfg.classes:
            scores.add_distances("A to B: model", fake_B, real_B, val.paired)
        if judge:
            photographs = {"B to A: model": fake_A, "real photograph": real_A}
            add_judged(scores, judge, photographs, labels, len(cfg.classes))
    if judge:
        add_floor(scores, judge, val, images)
    return scores


def baselines_of_A(val, real_A, real_B, colors):
    """Baselines for A: a copy of B, one colour for the image or for each class."""
    labels = common.class_index(real_B) if val.classes else None
    copy, guesses = val.picture(real_B), {}
    if copy.shape == real_A.shape:
        guesses["copy of the input"] = val.store.copied(copy, "B", "A")
    return guesses | common.constant_guesses(colors, real_A, labels)


def baselines_of_B(val, real_A, real_B, constants):
    """Baselines for B: a copy of A, one colour or one class for the image."""
    alike = real_A.shape == real_B.shape and not val.classes
    guesses = {"copy of the input": val.store.copied(real_A, "A", "B")} if alike else {}
    return guesses | common.constant_guesses(constants, real_B)


def add_judged(scores, judge, photographs, labels, classes):
    """Measures whether the judge finds these labels in photographs {row: (B, C, S, S)}."""
    for row, photograph in photographs.items():
        scores.add_labels(row, judge.classes_of(photograph), labels, classes, by="judge")


def add_floor(scores, judge, val, images):
    """The lowest score to expect: real photographs, judged by the labels of other places."""
    if len(images) == 1:  # there is no other place
        return
    others = np.roll(images, len(images) // 2)
    for here, elsewhere in zip(val.in_order(images), val.in_order(others), strict=True):
        photographs = {"real, of another place": elsewhere[0]}
        add_judged(scores, judge, photographs, common.class_index(here[1]), len(val.classes))


def score_cells(cfg, paired):
    """{column of metrics.csv: (row, measure) of evaluate's table}, for the end of an epoch."""
    cells = {"val_cycle_A": ("A to B to A: model", "rmse")}
    if paired and cfg.classes:
        cells["val_accuracy_AB"] = ("A to B: model", "pixel_accuracy")
    elif paired:
        cells["val_rmse_AB"] = ("A to B: model", "rmse")
    if paired:
        cells["val_rmse_BA"] = ("B to A: model", "rmse")
    return cells


def report(state, val, cfg, histograms):
    """All of a split beside baselines: printed, and written to evaluation.json."""
    by_class = histograms.get("A of classes")
    constants = {"A": common.constant_colors(histograms["A"], by_class=by_class)}
    if cfg.classes:
        frequent = histograms["B"][0, : len(cfg.classes)].argmax()
        constants["B"] = {"most frequent class": torch.eye(len(cfg.classes))[frequent]}
    else:
        constants["B"] = common.constant_colors(histograms["B"])
    judge = common.find_judge(cfg, val.loader_A.device, val.paired)
    scores = evaluate(state, val, cfg, np.arange(len(val)), constants, judge)
    about = {"split": val.store.split.name, "judge": judge.name if judge else ""}
    confusion = scores.confusions.get(("A to B: model", ""))
    if confusion is not None:
        about["confusion"] = confusion.tolist()  # rows are the target's classes
    common.write_evaluation(cfg, scores.table(), images=len(val), **about)


def generate(state, cfg, device):
    """Translates --generate's pictures, or label maps, into --out, or starts --serve's page.

    Windows of land cover are blended as probabilities; then each pixel gets its likeliest class.
    """
    to_B = cfg.direction == "AtoB"
    from_labels, to_labels = bool(cfg.classes and not to_B), bool(cfg.classes and to_B)
    net = state.G_AB if to_B else state.G_BA

    @torch.no_grad()
    def predict(windows, whole):
        """Windows (B, C, S, S) of the input -> (B, C', S, S) in [-1, 1], or probabilities."""
        windows = windows.to(device)
        if from_labels:
            x = common.one_hot(windows[:, 0], len(cfg.classes))
        else:
            x = common.from_bytes(windows)
        with common.autocast(cfg, device):
            fakes = net(x).float()
        return fakes.softmax(1) if to_labels else fakes

    common.translate_files(cfg, predict, net, from_labels, to_labels)


def use(cfg, device, checkpoint):
    """--evaluate, --generate and --serve."""
    state = build(cfg, device, training=False)
    if checkpoint:
        common.restore(state, checkpoint, cfg.checkpoint)
    else:
        load_generators(state, cfg)
    if cfg.evaluate:
        report(state, Domains(cfg, cfg.split, device), cfg, checkpoint["histograms"])
    if cfg.generate or cfg.serve:
        generate(state, cfg, device)


def load_generators(state, cfg):
    """Fills the generators from --init-AB and --init-BA, where they are given."""
    needed = f"init_{cfg.domains}"
    if (cfg.generate or cfg.serve) and not getattr(cfg, needed):
        remedy = f"needs --checkpoint, or {common.flag(needed)}"
        raise UserError(f"--direction {cfg.direction} {remedy}")
    for key, path, D in (("G_AB", cfg.init_AB, "D_B"), ("G_BA", cfg.init_BA, "D_A")):
        if path:
            common.load_network(getattr(state, key), path, cfg, key)
        if path and getattr(state, D):  # the discriminator of this generator's images
            common.load_network(getattr(state, D), path, cfg, D, optional=True)


if __name__ == "__main__":
    main()
