"""mixlc: edit a satellite image through its land cover: paste a piece of another land cover, paint what follows.

    python mixlc.py --data denmark/ --lc-classes s2glc                    rgb/ and lc/ folders, 14 classes
    python mixlc.py --data maps/ --lc-classes maps                        the map half becomes land cover
    python mixlc.py --quick                                               no data, two minutes: a demo world
    python mixlc.py --data denmark/ --show-samples 8                      what it trains on, as a picture
    python mixlc.py --evaluate --checkpoint runs/mixlc/checkpoints/last.pt
    python mixlc.py --generate photo.png --lc photo_lc.png --paint water:80,96,64,48 --checkpoint X --out edited/

Papers: pix2pix (Isola et al. 2017, arXiv:1611.07004) for the generator and its losses; the discriminators of Iizuka,
Simo-Serra, Ishikawa 2017, Globally and Locally Consistent Image Completion (doi:10.1145/3072959.3073659).

The system that this follows asks whether such a generator merely copies its input; evaluation.json answers with a
number. Differences from it: its discriminator took collages for real, whose seams give them away, ours an untouched
photograph; cross-entropies take logits; the networks' depth follows --size.

Measured: --quick, 74 s on two cores of a CPU, inside the edit 15.0 levels from the target; a copy of the input 34.9.
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
    box: str = option("center", "the pasted piece: 3/8 of the side in the middle, or 1/8 to 1/2 anywhere",
                      choices=("center", "random"))  # fmt: skip
    use_ba: bool = option(False, "also learn the complement: from image b and the same land cover to the same target")
    size: int = option(256, "side of the images that the networks see", "model", choices=(64, 128, 256, 512))
    lc_classes: str = option("", "land cover: s2glc, maps, binary or a classes.json (data/classes.json is found)")
    fusion: str = option("late", "photograph and land cover: a U-Net each | one U-Net for both | a U-Net, and dilated "
                         "convolutions for the land cover", choices=("late", "early", "dilated"))  # fmt: skip
    width: int = option(64, "channels of the first layer", low=1, high=1024)
    local_d: bool = option(False, "a second discriminator that looks at the pasted window")
    alpha: float = option(0.5, "weight of the adversarial loss", "training", low=0.0)
    pix_lambda: float = option(10.0, "weight of the L1 loss", low=0.0)
    local_pix_lambda: float = option(5.0, "weight of the L1 loss in the window of the edit", low=0.0)
    lr: float = option(1e-3, "Adam's rate", low=0.0)
    beta1: float = option(0.5, "Adam's first beta", low=0.0, high=0.999)
    batch_size: int = option(8, "edits a step, in each process", low=1)
    epochs: int = option(200, "passes over the training images", low=1, may_change=True)
    seed: int = option(0, "of weights, order, pairs, boxes and flips", low=0, high=2**32 - 1)
    eval_norm: str = option("running", "generating: the image's own statistics | running statistics",
                            choices=("batch", "running"))  # fmt: skip
    quick: bool = option(False, "small networks, images and epochs: works in two minutes on two CPU cores", "run")
    out: str = option("", "run folder, or folder of the edited images; none: runs/mixlc")
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
    generate: str = option("", "photograph to edit with --checkpoint")
    lc: str = option("", "its land cover: already edited, or to be edited by --paint")
    lc_before: str = option("", "its land cover before the edit, where --lc is already edited")
    paint: tuple = option((), "class:x,y,width,height: a rectangle of land cover to paint, in pixels; may be repeated")
    keep_outside: bool = option(True, "keep the photograph outside the edit, with a feathered border, or regenerate it")


QUICK = {"size": 64, "width": 16, "batch_size": 4, "epochs": 30, "log_every": 12}

# --------------------------------------------------------------------------------------------------------------- data


class Edits:
    """Edits made of two tiles a and b: a box of b's photograph and land cover replaces the same box of a's.

    Both tiles are mirrored and turned over half of the time, each on its own, photograph and land cover together.
    A batch is (rgb_a, lc_ab, rgb_ab, box, inside, real):

    rgb_a, rgb_ab, real  (B, 3, S, S) in [-1, 1]: input, target, and an untouched photograph (b's) for the discriminator
    lc_ab                (B, classes, S, S) one-hot, all zeros where ignored
    box                  (B, 4) top, left, height, width
    inside               (B,) bool: the edit is what lies inside the box; with --use-ba False for the second half of the
                         batch, where the input is rgb_b and the edit is all that lies outside
    """

    def __init__(self, cfg, split, device):
        self.cfg, self.device = cfg, device
        self.store = common.ImageStore(cfg, split, cfg.size, demo="landcover", smallest=cfg.size)
        self.classes = self.store.classes
        if not self.store.paired or not self.classes:
            remedy = "pass --lc-classes (maps for the maps data)" if self.store.paired else "trainA/trainB is none"
            raise UserError(f"--data {cfg.data}: mixlc needs photographs with land cover: {remedy}")
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
            yield self.edit(a, b, box, self.cfg.use_ba)

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

    def edit(self, a, b, box, use_ba=False):
        """Records a and b (B, 4, S, S) uint8 and box (B, 4) -> a batch."""
        inside = torch.ones(len(a), dtype=torch.bool, device=a.device)
        ab = torch.where(edit_mask(box, inside, self.cfg.size), b, a)
        if use_ba:
            a, b, ab, box = torch.cat([a, b]), torch.cat([b, a]), ab.repeat(2, 1, 1, 1), box.repeat(2, 1)
            inside = torch.cat([inside, ~inside])
        rgb_a, rgb_ab, real = (common.from_bytes(x[:, :3]) for x in (a, ab, b))
        return rgb_a, one_hot(ab[:, 3], len(self.classes)), rgb_ab, box, inside, real

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


def edit_mask(box, inside, size):
    """Where the edit is: box (B, 4), inside (B,) -> (B, 1, size, size) bool: the box, or all but the box."""
    along = torch.arange(size, device=box.device)
    top, left, height, width = box[:, :, None].unbind(1)  # (B, 1) each
    y, x = (along >= top) & (along < top + height), (along >= left) & (along < left + width)  # (B, size)
    return (y[:, None, :, None] & x[:, None, None, :]) == inside.view(-1, 1, 1, 1)


# ----------------------------------------------------------------------------------------------------------- networks


class UNet(nn.Module):
    """A U-Net without its last layer: (B, C, S, S) -> (B, 128, S/2, S/2); S = 2^n, down to a 1x1 bottleneck."""

    def __init__(self, channels_in, size, width):
        super().__init__()
        depth = size.bit_length() - 1
        widths = [width * min(2**level, 8) for level in range(depth)]  # 64 128 256 512 512 ...
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        first = nn.Conv2d(channels_in, width, 4, 2, 1, padding_mode="reflect")
        self.downs.append(nn.Sequential(first, nn.LeakyReLU(0.2)))
        for channels, out in zip(widths[:-2], widths[1:-1], strict=True):
            conv = nn.Conv2d(channels, out, 4, 2, 1, bias=False)
            self.downs.append(nn.Sequential(conv, nn.BatchNorm2d(out), nn.LeakyReLU(0.2)))
        self.downs.append(nn.Sequential(nn.Conv2d(widths[-2], widths[-1], 4, 2, 1), nn.ReLU()))
        for level in reversed(range(1, depth)):
            channels, out = widths[level] * (1 if level == depth - 1 else 2), widths[level - 1]
            conv = nn.ConvTranspose2d(channels, out, 4, 2, 1, bias=False)
            self.ups.append(nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU()))

    def forward(self, x):
        skips = []
        for down in self.downs:
            x = down(x)  # (B, 64..512, S/2 .. 1, S/2 .. 1)
            skips.append(x)
        x = skips.pop()
        for up in self.ups:
            x = torch.cat([skips.pop(), up(x)], 1)  # (B, 1024..128, 2 .. S/2, 2 .. S/2)
        return x


class DilatedNet(nn.Module):
    """Sees far without going deep (Yu and Koltun 2016, arXiv:1511.07122): (B, C, S, S) -> (B, 128, S/2, S/2)."""

    def __init__(self, channels_in, width):
        super().__init__()
        layers = [nn.Conv2d(channels_in, 2 * width, 4, 2, 1, padding_mode="reflect"), nn.ReLU()]
        for dilation in (1, 2, 4, 8):  # together they see 31x31 places, 62x62 pixels and more
            conv = nn.Conv2d(2 * width, 2 * width, 3, 1, dilation, dilation, bias=False)
            layers += [conv, nn.BatchNorm2d(2 * width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class Generator(nn.Module):
    """Photograph (B, 3, S, S) in [-1, 1] and land cover (B, classes, S, S) -> photograph (B, 3, S, S) in [-1, 1]."""

    def __init__(self, classes, size, width, fusion):
        super().__init__()
        self.early = fusion == "early"
        self.rgb_net = UNet(3 + classes if self.early else 3, size, width)
        if not self.early:
            self.lc_net = UNet(classes, size, width) if fusion == "late" else DilatedNet(classes, width)
        self.output_net = nn.Sequential(
            nn.Conv2d(2 * width if self.early else 4 * width, width, 3, 1, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, rgb, lc):
        if self.early:
            return self.output_net(self.rgb_net(torch.cat([rgb, lc], 1)))
        return self.output_net(torch.cat([self.rgb_net(rgb), self.lc_net(lc)], 1))  # from (B, 256, S/2, S/2)


class Discriminator(nn.Module):
    """Is the photograph (B, 3, S, S) untouched? -> one logit each, (B, 1) (Iizuka et al. 2017, section 3.3).

    With local_d a second trunk looks at a window of half the side around the box; the last layer joins the two.
    """

    def __init__(self, size, width, local_d):
        super().__init__()
        self.window = size // 2
        self.global_trunk = self.trunk(size, width)
        self.local_trunk = self.trunk(size // 2, width) if local_d else None
        self.head = nn.Linear(1024 * (2 if local_d else 1), 1)

    @staticmethod
    def trunk(size, width):
        """Strided 5x5 convolutions down to 4x4, then 1024 features."""
        layers, channels = [], 3
        for level in range(size.bit_length() - 3):  # at 256: 64 128 256 512 512 512, (B, 512, 4, 4)
            out = width * min(2**level, 8)
            layers += [nn.Conv2d(channels, out, 5, 2, 2, bias=False), nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]
            channels = out
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 1024), nn.LeakyReLU(0.2))

    def forward(self, image, box):
        features = self.global_trunk(image)  # (B, 1024)
        if self.local_trunk is not None:
            features = torch.cat([features, self.local_trunk(crop_window(image, box, self.window))], 1)
        return self.head(features)


def crop_window(images, box, side):
    """The side x side window of images (B, C, S, S) around the middle of box (B, 4), moved to lie within the image."""
    corner = (box[:, :2] + (box[:, 2:] - side) // 2).clamp(0, images.shape[-1] - side)
    y, x = (corner[:, k, None] + torch.arange(side, device=box.device) for k in (0, 1))  # (B, side)
    batch = torch.arange(len(images), device=box.device)
    return images.permute(0, 2, 3, 1)[batch[:, None, None], y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


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


def local_l1_loss(fake, target, mask):
    """Mean absolute difference in the window of the edit: mask (B, 1, S, S) and a border around it, 12 pixels at 256,
    cut off at the image's edge: a scalar."""
    border = round(12 * mask.shape[-1] / 256)
    window = F.max_pool2d(full_precision(mask.to(fake.dtype)), 2 * border + 1, 1, border)
    difference = (full_precision(fake) - full_precision(target)).abs()
    return (difference * window).sum() / (fake.shape[1] * window.sum())


# -------------------------------------------------------------------------------------------------------------- build


@dataclasses.dataclass
class State:
    """Everything that training changes and a checkpoint holds."""

    G: nn.Module
    D: nn.Module | None = None
    opt_G: torch.optim.Optimizer | None = None
    opt_D: torch.optim.Optimizer | None = None


def build(cfg, device, training=True):
    """Networks and optimisers on the device; without `training` the generator alone."""
    classes = common.ClassTable.load(cfg.lc_classes)
    if classes is None:
        raise UserError("--lc-classes: the networks need to know how many classes there are")
    G = common.place(init_weights(Generator(len(classes), cfg.size, cfg.width, cfg.fusion)), device)
    if not training:
        return State(G)
    D = common.place(init_weights(Discriminator(cfg.size, cfg.width, cfg.local_d)), device)
    return State(G, D, common.adam(G, cfg, device), common.adam(D, cfg, device))


# --------------------------------------------------------------------------------------------------------- train_step


def train_step(state, batch, cfg):
    """One update of the discriminator, then one of the generator. batch as Edits makes it.

    L_D = 1/2 [GAN(D(real), 1) + GAN(D(G(x)), 0)]
    L_G = alpha * GAN(D(G(x)), 1) + pix_lambda * L1(G(x), rgb_ab) + local_pix_lambda * L1 in the window of the edit
    """
    rgb_a, lc_ab, rgb_ab, box, inside, real = batch
    with common.autocast(cfg, rgb_a.device):
        fake = state.G(rgb_a, lc_ab)
        logits_fake = state.D(fake.detach(), box)  # the D step must not reach G
        logits_real = state.D(real, box)
    d_fake, d_real = gan_loss(logits_fake, False), gan_loss(logits_real, True)
    loss_d = 0.5 * (d_real + d_fake)
    state.opt_D.zero_grad()
    loss_d.backward()
    common.average_gradients(state.D)
    state.opt_D.step()

    with common.autocast(cfg, rgb_a.device):
        logits_fake = state.D(fake, box)
    g_adv, g_l1 = gan_loss(logits_fake, True), l1_loss(fake, rgb_ab)
    g_local = local_l1_loss(fake, rgb_ab, edit_mask(box, inside, fake.shape[-1]))
    loss_g = cfg.alpha * g_adv + cfg.pix_lambda * g_l1 + cfg.local_pix_lambda * g_local
    state.opt_G.zero_grad()
    loss_g.backward(inputs=list(state.G.parameters()))  # the G step leaves D's gradients alone
    common.average_gradients(state.G)
    state.opt_G.step()
    losses = {"g_total": loss_g, "g_adv": g_adv, "g_l1": g_l1, "g_local": g_local}
    return losses | {"d_total": loss_d, "d_real": d_real, "d_fake": d_fake}


# ---------------------------------------------------------------------------------------------------------- translate


@torch.no_grad()
def translate(state, inputs, cfg):
    """inputs = (rgb (B, 3, S, S) in [-1, 1], land cover (B, classes, S, S)) -> photographs (B, 3, S, S), float32.

    --eval-norm running: running statistics; batch: BatchNorm uses the statistics of the image itself.
    """
    own_statistics = cfg.eval_norm == "batch"
    set_mode(state.G, own_statistics, track=not own_statistics)
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


def evaluate(state, val, cfg, count, constants=None):
    """L1 (levels 0-255) and PSNR (dB) against rgb_ab, inside the box and outside it, and L1 to rgb_a inside, over the
    first `count` validation edits, {row: {measure: mean}}: the model, the copy of rgb_a, and `constants`, {name: (3,)
    colour in [-1, 1]}."""
    sums, pixels = {}, torch.zeros(2, 1)
    for rgb_a, lc_ab, rgb_ab, box, inside, _ in val.in_order(count):
        guesses = {"model": translate(state, (rgb_a, lc_ab), cfg), "copy of rgb_a": rgb_a}
        guesses |= {
            name: color.to(rgb_a).view(1, 3, 1, 1).expand_as(rgb_a) for name, color in (constants or {}).items()
        }
        mask = edit_mask(box, inside, cfg.size).float()
        masks = torch.stack([mask, 1 - mask])  # (2, B, 1, S, S): the edit, and what it leaves
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
    return rows


# --------------------------------------------------------------------------------------------------------------- main


def show_samples(train, cfg):
    """Writes a picture of --show-samples training edits to samples.png in --out, the box drawn."""
    plan = train.plan(np.random.default_rng([cfg.seed, 0]), np.arange(len(train)), flips=1)
    a, b, box = next(train.tiles(*(x[None, : cfg.show_samples] for x in plan)))
    rgb_a, lc_ab, rgb_ab, box, inside, rgb_b = train.edit(a, b, box)
    lc_a, lc_b = (one_hot(x[:, 3], len(train.classes)) for x in (a, b))
    lc_a, lc_b, lc_ab = map(train.picture, (lc_a, lc_b, lc_ab))
    columns = {"rgb_a": rgb_a, "lc_a": lc_a, "rgb_b": rgb_b, "lc_b": lc_b, "lc_ab": lc_ab, "rgb_ab": rgb_ab}
    mask = edit_mask(box, inside, cfg.size).float()
    frame = F.max_pool2d(mask, 3, 1, 1) - mask  # one pixel around the box
    common.save_grid(Path(cfg.out) / "samples.png", {k: x * (1 - frame) + frame for k, x in columns.items()})
    print(f"written to {Path(cfg.out) / 'samples.png'}")


def generate(state, cfg, device):
    """Edits --generate's photograph as --lc and --paint say, and writes it to --out with a before/after sheet."""
    classes, small = common.ClassTable.load(cfg.lc_classes), (cfg.size, cfg.size)
    path, photo, before, after = common.read_edit(cfg, classes)
    rgb = common.as_tensor(common.resize(photo, small), device)
    label = common.as_tensor(common.resize(after, small, labels=True), device)
    fake = translate(state, (common.from_bytes(rgb), one_hot(label, len(classes))), cfg)
    edited = common.resize(common.as_array(fake), photo.shape[1::-1])
    if cfg.keep_outside:
        edited = common.keep_outside(edited, photo, before, after)
    written = common.write_image(Path(cfg.out) / path.name, edited)
    pictures = {"before": photo, "land cover": None if before is None else classes.palette[before]}
    pictures |= {"edited land cover": classes.palette[after], "after": edited}
    common.save_sheet(Path(cfg.out) / f"{path.stem}_sheet.png", pictures)
    print(f"written to {written}, with a before/after sheet beside it")


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


def report(state, train, val, cfg):
    """The whole validation split beside baselines that cost nothing: printed, and written to evaluation.json; and the
    question whether the generator copies its input, answered."""
    rows = evaluate(state, val, cfg, len(val), common.constant_guesses(train.store.A))
    answer = copy_verdict(rows)
    common.write_evaluation(cfg, rows, images=len(val), split=val.store.split.name, answer=answer)
    print(answer)


@common.command
def main(argv=None):
    cfg, given = common.parse(Config, __doc__, QUICK, argv)
    device = common.start(cfg)
    cfg, checkpoint = common.settle(cfg, given, "mixlc")
    if cfg.generate or cfg.evaluate:
        state = build(cfg, device, training=False)
        common.restore(state, checkpoint["state"], cfg.checkpoint)
        if cfg.evaluate:
            report(state, Edits(cfg, "train", device), Edits(cfg, "val", device), cfg)
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
    run = common.Run(cfg, checkpoint, "mixlc", train.steps, scores=("val_l1_inside", "val_l1_outside"))
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
        scores = {f"val_{name}": scores[name] for name in ("l1_inside", "l1_outside")}
        run.end_epoch(state, scores, columns | {"rgb_ab": rgb_ab})
    run.close()
    report(state, train, val, cfg)


if __name__ == "__main__":
    main()
