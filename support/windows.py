"""A raster painted window by window, with shared statistics and smooth blending."""

import contextlib
import itertools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from support.batches import spread
from support.pictures import resize


def tiles(length, window):
    """Where windows stand along a side, and what they weigh: [(start, (window,) float32), ...].

    They overlap by a quarter or more, and their weights sum to 1 everywhere: 0 in the outer
    quarter of an overlap, where a window knows least of what lies around, and a cosine between.
    """
    count = max(1, math.ceil((length - window // 4) / (window - window // 4)))
    starts = np.linspace(0, max(length - window, 0), count).round().astype(int).tolist()
    weights = np.ones((count, window), np.float32)
    for k in range(count - 1):
        overlap = starts[k] + window - starts[k + 1]
        position = (np.arange(overlap) + 0.5) / overlap
        ramp = (1 - np.cos(np.pi * np.clip(2 * position - 0.5, 0, 1))) / 2
        weights[k, window - overlap :] *= 1 - ramp
        weights[k + 1, :overlap] *= ramp
    return list(zip(starts, weights, strict=True))


class SharedStatistics:
    """Normalises every window of a raster by statistics of the windows around it.

    InstanceNorm, and BatchNorm by an image's own statistics, would paint each window in colours
    of its own. A first pass over some windows notes every layer's mean and variance, and a window
    then gets their averages, with Gaussian weights of `reach` windows (kernelized instance
    normalization, Ho et al. 2022, arXiv:2208.10730; an infinite reach: all alike).
    """

    most = 24  # windows noted along a side: for 2000 x 2000 windows of a large raster, too

    def __init__(self, net, reach):
        kinds = nn.InstanceNorm2d, nn.BatchNorm2d
        self.layers = [module for module in net.modules() if isinstance(module, kinds)]
        self.reach, self.positions = reach, []
        self.moments = {layer: [] for layer in self.layers}

    def some(self, windows):
        """Those windows of a side to note: about one within each reach, which widens if need be."""
        count = min(self.most, max(8, math.ceil(0.75 * len(windows) / self.reach)))
        self.reach = max(self.reach, 0.75 * len(windows) / count)
        return [windows[k] for k in spread(count, len(windows))]

    def note(self, position, predict, tile):
        """Notes the statistics of a tile (C, S, S) at position (top, left), counted in windows."""

        def keep(layer, inputs):
            variance, mean = torch.var_mean(inputs[0].float(), (0, 2, 3), correction=0)
            self.moments[layer].append(torch.stack([mean, variance]))

        hooks = [layer.register_forward_pre_hook(keep) for layer in self.layers]
        try:
            predict(tile[None])
        finally:
            for hook in hooks:
                hook.remove()
        self.positions.append(position)

    def note_some(self, rows, columns, sides, cut, predict):
        """Notes some of the windows that stand at these tiles of a raster."""
        noted = list(itertools.product(self.some(rows), self.some(columns)))
        bar = {"unit": "window", "leave": False, "disable": None}
        for (top, _), (left, _) in tqdm(noted, "statistics", **bar):
            position = top / sides[0], left / sides[1]
            self.note(position, predict, torch.from_numpy(cut(top, left, *sides)))

    @contextlib.contextmanager
    def around(self, positions):
        """Within it the network takes windows at these positions, in this order."""
        apart = torch.tensor(positions)[:, None] - torch.tensor(self.positions)[None]  # (B, N, 2)
        weights = torch.softmax(-apart.square().sum(-1) / (2 * self.reach**2), 1)
        try:
            for layer in self.layers:
                layer.forward = self._forward(layer, weights)
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def _forward(self, layer, weights):
        means, variances = torch.stack(self.moments[layer], 1)  # (N, C) each
        weights = weights.to(means)
        mean = weights @ means
        variance = weights @ (variances + means.square()) - mean.square()
        done = 0

        def forward(x):
            nonlocal done  # a batch may come in pieces
            rows, done = slice(done, done + len(x)), done + len(x)
            flat = x.reshape(1, -1, *x.shape[2:])
            moments = mean[rows].flatten(), variance[rows].flatten().clamp_min(0)
            x = F.batch_norm(flat, *moments, eps=layer.eps).view_as(x)
            if layer.weight is None:
                return x
            return x * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)

        return forward


def predict_windows(cut, predict, corners, sides, statistics=None):
    """Paints windows at these corners (top, left): (B, C, *sides) float32, on the CPU."""
    windows = torch.from_numpy(np.stack([cut(*corner, *sides) for corner in corners]))
    positions = [(top / sides[0], left / sides[1]) for top, left in corners]
    with statistics.around(positions) if statistics else contextlib.nullcontext():
        fakes = predict(windows).float().cpu()
    if fakes.shape[2:] != sides:
        fakes = F.interpolate(fakes, sides, mode="bicubic", antialias=True)
    return fakes


def blended(cut, predict, size, window, statistics=None, batch=8, about=""):
    """Paints a raster by windows: yields (top, pixels (C, rows, width) float32) from top to bottom.

    cut(top, left, height, width)  a window as the network takes it, (C', S, S) uint8
    predict(windows (B, C', S, S))   -> (B, C, S', S')
    size                           (height, width)
    window                         the side of a window; 0: the whole at once
    statistics                     SharedStatistics, where normalisation would tell windows apart

    In memory: `window` rows of the raster, in float32, and a batch.
    """
    sides = (window, window) if window else size
    rows, columns = (tiles(length, side) for length, side in zip(size, sides, strict=True))
    statistics = statistics if len(rows) * len(columns) > 1 else None
    if statistics:
        statistics.note_some(rows, columns, sides, cut, predict)
    megapixels = size[0] * size[1] / 1e6
    bar = tqdm(total=megapixels, desc=about, unit="MP", leave=False, disable=None)
    band = None  # of the raster, from `top` on: sums of weighted windows
    for k, (top, weights_y) in enumerate(rows):
        for some in (columns[j : j + batch] for j in range(0, len(columns), batch)):
            corners = [(top, left) for left, _ in some]
            fakes = predict_windows(cut, predict, corners, sides, statistics)
            if band is None:
                width = columns[-1][0] + sides[1]
                band = torch.zeros(fakes.shape[1], sides[0], width)
            for fake, (left, weights_x) in zip(fakes, some, strict=True):
                weights = torch.from_numpy(weights_y[:, None] * weights_x)
                band[:, :, left : left + sides[1]] += fake * weights
            bar.update(megapixels * len(some) / len(rows) / len(columns))
        done = rows[k + 1][0] - top if k + 1 < len(rows) else size[0] - top
        finished, rest = band.split([done, sides[0] - done], 1)
        band = torch.cat([rest, torch.zeros_like(finished)], 1)
        yield top, finished[:, :, : size[1]]
    bar.close()


def window_of(cfg, raster):
    """The window by which a raster is painted; 0 for the whole at once, up to 1.5 windows."""
    return cfg.window if max(raster.height, raster.width) > 1.5 * cfg.window > 0 else 0


def say_windows(cfg, raster, regions, window):
    """Says on stderr how these regions (top, left, height, width) of a raster are painted."""
    what, count, overlap = f"as a whole, at {cfg.size}x{cfg.size}", 0, window
    for *_, height, width in regions if window else ():
        sides = tiles(height, window), tiles(width, window)
        count += len(sides[0]) * len(sides[1])
        for (a, _), (b, _) in itertools.chain(*map(itertools.pairwise, sides)):
            overlap = min(overlap, a + window - b)
    if window:
        lapping = f", overlapping {overlap}" if overlap < window else ""
        plural = "s" if count != 1 else ""
        what = f"{count} window{plural} of {window}{lapping}, each at {cfg.size}x{cfg.size}"
    size = f"{raster.width}x{raster.height}"
    print(f"{raster.path.name}: {size}: {what}", file=sys.stderr)


def shared_statistics(cfg, net):
    """SharedStatistics of a network that normalises by an image's own; None where none is given."""
    return SharedStatistics(net, cfg.norm_reach) if net and cfg.norm_reach else None


def network_input(raster, size, *window):
    """A window (top, left, height, width) of a raster at a network's size: (3 or 1, S, S) uint8."""
    small = resize(raster.padded(*window), (size, size), labels=bool(raster.table))
    return small[None] if raster.table else np.moveaxis(small, -1, 0)


def touch(a, b):
    """Whether two regions (top, left, height, width) have pixels in common."""
    return all(a[k] < b[k] + b[k + 2] and b[k] < a[k] + a[k + 2] for k in (0, 1))
