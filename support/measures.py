"""Measures of pictures, label maps and edits, and the baselines beside them."""

import collections
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from support.classes import IGNORED
from support.distances import Distances
from support.errors import drawing
from support.files import write_text
from support.pictures import filled, filled_alike, to_bytes
from support.plots import write_page
from support.processes import rank


def measure_images(fake, target, brief=False, known=None):
    """Measures of pictures: two (B, C, H, W) uint8 tensors -> {name: (B,) float64}.

    known (B, 1, H, W) bool: other pixels do not count; an image without any gives NaN.

    psnr         10 log10(255^2 / MSE), in dB; at most 148.1, for equal images
    mse          mean squared error, in squared levels 0-255; brief: these two alone
    ssim         Wang et al. 2004 (doi:10.1109/TIP.2003.819861), eq. 13: Gaussian 11x11 window,
                 sigma 1.5, mean over channels and places, no padding
    rmse_rgb     root of the mean over pixels of the squared error summed over channels
    accuracy_5   share of pixels whose largest channel difference is less than 5 levels
    accuracy_10  the same with 10 levels; these three: Fu et al. 2019 (arXiv:1809.05852)
    """
    fake, target = fake.double(), target.double()
    if known is None:
        known = torch.ones_like(target[:, :1], dtype=torch.bool)
    error = (fake - target).abs()
    count = known.sum((1, 2, 3)).double()

    def mean(values):
        return (values * known).sum((1, 2, 3)) / (count * values.shape[1])

    mse = mean(error.square())
    psnr = 10 * torch.log10(255**2 / mse.clamp_min(1e-10))
    if brief:
        return {"psnr": psnr, "mse": mse}
    worst = error.amax(1, keepdim=True)
    return {
        "psnr": psnr,
        "ssim": structural_similarity(fake, target, known),
        "mse": mse,
        "rmse_rgb": mean(error.square().sum(1, keepdim=True)).sqrt(),
        "accuracy_5": mean((worst < 5).double()),
        "accuracy_10": mean((worst < 10).double()),
    }


def structural_similarity(fake, target, known):
    """SSIM (see measure_images) of windows full of data: two (B, C, H, W) float64 -> (B,)."""
    x = torch.arange(11, dtype=torch.float64, device=fake.device) - 5
    window = torch.exp(-x.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(images):
        flat = images.reshape(-1, 1, *images.shape[2:])
        return F.conv2d(F.conv2d(flat, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    mean_f, mean_t = blur(fake), blur(target)
    var_f, var_t = blur(fake * fake) - mean_f**2, blur(target * target) - mean_t**2
    cov = blur(fake * target) - mean_f * mean_t
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_f * mean_t + c1) / (mean_f**2 + mean_t**2 + c1)
    structure = (2 * cov + c2) / (var_f + var_t + c2)
    similarity = (luminance * structure).view(*fake.shape[:2], *luminance.shape[2:]).mean(1)
    full = -F.max_pool2d(-known.double(), 11, 1)[:, 0]  # 1 where a window is full of data, else 0
    return (similarity * full).sum((1, 2)) / full.sum((1, 2))


def confusion_matrix(predicted, target, classes):
    """Counts of pixels, (classes, classes) int64, rows the target's class; IGNORED is left out."""
    seen = target != IGNORED
    pairs = target[seen].long() * classes + predicted[seen].long()
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def measure_labels(confusion):
    """Pixel accuracy, mean class accuracy and mean IoU, over the classes that the target has."""
    confusion = confusion.double()
    right, target, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    occurs = target > 0
    return {
        "pixel_accuracy": (right.sum() / confusion.sum()).item(),
        "class_accuracy": (right / target)[occurs].mean().item(),
        "mean_iou": (right / (target + predicted - right))[occurs].mean().item(),
    }


def has_data(images):
    """Where pictures (B, C, S, S) have data, and are not NaN: (B, 1, S, S) bool."""
    return ~images.isnan().any(1, keepdim=True)


class Scores:
    """Measures of several guesses (a model's, its baselines'), gathered batch by batch.

    brief  pictures get only the measures that are logged after every epoch
    fid    add_distances has an effect, unless brief
    """

    def __init__(self, brief=False, fid=False):
        self.brief, self.fid = brief, fid and not brief
        self.sums = collections.defaultdict(int)  # {(row, name): (sum, count)}
        self.confusions = collections.defaultdict(int)  # {(row, by): matrix}
        self.distances = {}  # {row: Distances}

    def _add(self, row, name, values, where=1.0):
        """Adds values that are not NaN to a mean, with `where` as their weights."""
        weights = ~values.isnan() * where
        amounts = [(values.nan_to_num() * weights).sum(), weights.sum()]
        self.sums[row, name] += torch.stack(amounts).cpu()

    def add_images(self, row, guess, target, limits=None):
        """Adds measure_images of pictures (B, C, S, S) in [-1, 1] or NaN: means over images.

        With Limits also mse_units: the squared error in the files' units, the mean over bands.
        """
        known, guess = has_data(target), filled(guess)
        if limits and not self.brief:
            ranges = torch.tensor(limits.ranges, device=target.device).view(1, -1, 1, 1)
            error = ((guess.double() - target) / 2 * ranges).square()  # NaN without data
            self._add(row, "mse_units", error.nanmean((1, 2, 3)))
        guess, target = to_bytes(guess), to_bytes(target)
        for name, values in measure_images(guess, target, self.brief, known).items():
            self._add(row, name, values)
        if not self.brief:
            self._add_variety(row, "variety", guess, target, known)

    def add_distances(self, row, guess, real, paired=True):
        """With fid: adds Distances of pictures (B, C, S, S) in [-1, 1] from real ones."""
        if not self.fid:
            return
        if row not in self.distances:
            self.distances[row] = Distances(guess.device, paired)
        self.distances[row].add(*filled_alike(guess, real))

    def add_edit(self, row, guess, target, source, mask):
        """Adds measures of edited pictures (B, C, S, S) in [-1, 1]; mask (B, 1, S, S): the edit.

        L1 in levels 0-255, inside and outside the edit; inside, also L1 to the source.
        """
        known, known_source = has_data(target), has_data(source)
        guess, target, source = (to_bytes(filled(x)).double() for x in (guess, target, source))
        for area, where in (("inside", mask & known), ("outside", ~mask & known)):
            self._add(row, f"l1_{area}", (guess - target).abs(), where.double())
        self._add(row, "l1_to_input", (guess - source).abs(), (mask & known_source).double())
        self._add_variety(row, "variety", guess, target, mask & known)

    def add_labels(self, row, predicted, target, classes, by=""):
        """Adds measure_labels of class indices (B, S, S); by: a judge's name, or "" for a model."""
        if not by:
            self._add_variety(row, "class_variety", predicted, target, target != IGNORED, most=1)
        self.confusions[row, by] += confusion_matrix(predicted, target, classes).cpu()

    def _add_variety(self, row, name, guess, target, known, most=255):
        """Adds by how much each guess, and each target, differs from the one before it."""
        both = known[1:] & known[:-1]
        changes = [x.double().diff(dim=0).abs().clamp(max=most) * both for x in (guess, target)]
        amounts = torch.stack([change.sum() for change in changes]).cpu()
        if amounts[1] > 0:
            self.sums[row, name] += amounts

    def table(self):
        """{row: {measure: value}}."""
        rows = collections.defaultdict(dict)
        for (row, name), (total, count) in self.sums.items():
            mean = (total / count).item()
            if name in ("mse", "mse_units"):
                name, mean = f"r{name}", math.sqrt(mean)
            rows[row][name] = mean
        for row, distances in self.distances.items():
            rows[row].update(distances.measures())
        for (row, by), confusion in self.confusions.items():
            for name, value in measure_labels(confusion).items():
                rows[row][f"{by}_{name}" if by else name] = value
        return dict(rows)


def constant_colors(histogram, classes=None, by_class=None):
    """The baselines that see no input, or no more than its class: {name: colour in [-1, 1]}.

    histogram  (C, 256) of pictures, or (1, 256) of label maps, which are drawn in the colours of
               `classes`; these also give the most frequent class (see ImageStore.histograms)
    by_class   (K, C, 256) of the pixels of each class, which adds colours (256, C), one for each
               index: that of all pixels where training had none. The others are (C,)
    """
    counts, guesses = histogram.numpy(), {}
    if classes:
        guesses["most frequent class"] = classes.palette[counts[0, : len(classes)].argmax()]
        counts = np.stack([np.bincount(channel, counts[0], 256) for channel in classes.palette.T])
    kinds = {"training colour": counts}
    if by_class is not None:
        of_index = np.repeat(counts[None], 256, 0)
        seen = by_class.numpy().any(-1, keepdims=True)
        of_index[: len(seen)] = np.where(seen, by_class.numpy(), counts)
        kinds["colour of the class"] = of_index
    for kind, counts in kinds.items():
        pixels = counts.sum(-1, keepdims=True)
        guesses[f"mean {kind}"] = (counts * np.arange(256) / pixels).sum(-1)
        guesses[f"median {kind}"] = (counts.cumsum(-1) * 2 >= pixels).argmax(-1)
    return {name: torch.from_numpy(color / 127.5 - 1).float() for name, color in guesses.items()}


def constant_guesses(colors, images, labels=None):
    """constant_colors as {name: images (B, C, S, S)}; by class at labels (B, S, S)."""
    guesses = {}
    for name, color in colors.items():
        color = color.to(images)
        each = color[labels.long()].movedim(-1, 1) if color.ndim == 2 else color.view(1, -1, 1, 1)
        guesses[name] = each.expand_as(images)
    return guesses


def copy_verdict(rows):
    """A sentence that states whether a generator of edits copies its input.

    It does if inside the edit its output is nearer to the input than to the target, and less than
    half as far from the input as the target is.
    """
    target, to_input = rows["model"]["l1_inside"], rows["model"]["l1_to_input"]
    copy = rows["copy of rgb_a"]["l1_inside"]
    copies = "copies" if to_input < min(target, copy / 2) else "does not copy"
    levels = f"{target:.2f} levels from the target (a copy would be {copy:.2f})"
    return f"an edit is {levels} and {to_input:.2f} from its input: it {copies} its input"


def write_evaluation(cfg, rows, **about):
    """Writes {row: {measure: value}} with `about` to evaluation.json, and prints it as a table.

    A measure that is not defined is left out, such as the SSIM where each window has holes.
    """
    if rank():
        return
    finite = {}
    for title, row in rows.items():
        finite[title] = {name: value for name, value in row.items() if math.isfinite(value)}
    path = Path(cfg.out) / "evaluation.json"
    data = cfg.data or "demo world"
    about = {"size": cfg.size, "data": data, "checkpoint": cfg.checkpoint} | about
    print_table(finite)  # first: the folder may be another user's, or full
    write_text(path, json.dumps(about | {"rows": finite}, indent=2))
    for title, row in finite.items():
        varieties = [value for name, value in row.items() if name.endswith("variety")]
        if title.endswith("model") and min(varieties, default=1) < 0.15:
            share = f"{min(varieties):.1%} of the targets' difference"
            print(f"{title} ignores its input: its outputs hardly differ ({share})")
    print(f"written to {path}")
    if (path.parent / "config.json").is_file():
        with drawing(path.parent / "index.html"):
            write_page(path.parent)


def print_table(rows):
    """Prints {row: {measure: value}} as text, a column a measure."""
    heads = {name: f"  {name:>7}" for row in rows.values() for name in row}
    titles = max(map(len, rows), default=0) + 2
    print(" " * titles + "".join(heads.values()))
    for title, row in rows.items():
        line = title.ljust(titles)
        for name, head in heads.items():
            cell = f"{row[name]:.4f}" if name in row else ""
            line += cell.rjust(len(head))
        print(line)
