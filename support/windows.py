"""A raster translated by windows: shared statistics, smooth blending."""

import contextlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from support.batches import some_of
from support.errors import progress
from support.pictures import mirrored, resize


def tiles(length, window):
    """The windows along a side, with weights: [(start, (window,) float32), ...].

    They overlap by a quarter or more. Their weights sum to 1 everywhere. A window's weight is 0 in
    the outer quarter of an overlap, where it sees least of its surroundings, and a cosine between.
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

    InstanceNorm, and BatchNorm by an image's own statistics, would give each window colours of
    its own. A first pass notes every layer's mean and variance in some windows. Each window then
    gets those of all noted pixels together, with Gaussian weights whose standard deviation is
    `reach` windows (kernelized instance normalization, Ho et al. 2022, arXiv:2208.10730, who
    average standard deviations instead; an infinite reach: the same in all windows). The first pass
    normalises each window by itself, so that the statistics of deeper layers are approximate. Each
    layer must be used once in a pass.
    """

    most = 24  # windows noted along a side, for 2000 x 2000 windows of a large raster, too

    def __init__(self, net, reach):
        kinds = nn.InstanceNorm2d, nn.BatchNorm2d
        self.moments = {layer: [] for layer in net.modules() if isinstance(layer, kinds)}
        self.reach, self.positions = max(reach, 1e-3), []

    def some(self, windows):
        """The windows of a side to note: about one in each reach.

        Where this gives more than `most`, the reach becomes longer.
        """
        count = min(self.most, max(8, math.ceil(0.75 * len(windows) / self.reach)))
        self.reach = max(self.reach, 0.75 * len(windows) / count)
        return some_of(windows, count)

    def note(self, position, predict, tile):
        """Notes the statistics of a tile (C, S, S) at position (top, left), counted in windows."""

        def keep(layer, inputs):
            variance, mean = torch.var_mean(inputs[0].float(), (0, 2, 3), correction=0)
            self.moments[layer].append(torch.stack([mean, variance]))

        with contextlib.ExitStack() as hooks:
            for layer in self.moments:
                hooks.enter_context(layer.register_forward_pre_hook(keep))
            predict(tile[None])
        self.positions.append(position)

    @contextlib.contextmanager
    def around(self, positions):
        """A context in which the network gets windows at these positions, in this order."""
        apart = torch.tensor(positions)[:, None] - torch.tensor(self.positions)[None]  # (B, N, 2)
        weights = torch.softmax(-(apart / self.reach).square().sum(-1) / 2, 1)
        try:
            for layer in self.moments:
                layer.forward = self._forward(layer, weights)
            yield
        finally:
            for layer in self.moments:
                vars(layer).pop("forward", None)  # Ctrl-C may come before they are all set

    def _forward(self, layer, weights):
        means, variances = torch.stack(self.moments[layer], 1)  # (N, C) each
        weights = weights.to(means)
        mean = weights @ means
        variance = (weights @ (variances + means.square()) - mean.square()).clamp_min(0)
        moments = zip(mean, variance, strict=True)  # of each window; a batch may come in pieces
        affine = layer.weight, layer.bias

        def forward(x):
            images = [F.batch_norm(y, *next(moments), *affine, eps=layer.eps) for y in x.split(1)]
            return torch.cat(images)

        return forward


class Windows:
    """The overlapping windows of a raster, generated and blended.

    cut(top, left, height, width)   -> a window at the network's size, (C', S, S)
    predict(windows (B, C', S, S))  -> (B, C, S', S')
    size        (height, width) of the raster, in pixels
    window      (height, width) of a window, in pixels; None: the whole raster at once
    statistics  SharedStatistics, if the network normalises by an image's own
    valid(top, left, height, width)  -> bool: only windows where some is True are generated
    """

    def __init__(self, cut, predict, size, window, statistics=None, valid=None):
        self.cut, self.predict, self.size, self.valid = cut, predict, size, valid
        self.sides = window or tuple(size)
        self.rows, self.columns = map(tiles, size, self.sides)
        alone = len(self.rows) == len(self.columns) == 1
        self.statistics = None if alone else statistics
        if self.statistics:
            for corner in progress(self._noted(), "statistics"):
                tile = torch.from_numpy(cut(*corner, *self.sides))
                self.statistics.note(self._positions([corner])[0], predict, tile)

    def predicted(self, corners):
        """Generates the windows at corners (top, left): (B, C, *sides) float32, on the CPU."""
        windows = np.stack([self.cut(*corner, *self.sides) for corner in corners])
        shared = contextlib.nullcontext()
        if self.statistics:
            shared = self.statistics.around(self._positions(corners))
        with shared:
            fakes = self.predict(torch.from_numpy(windows)).float().cpu()
        if fakes.shape[2:] == self.sides:
            return fakes
        return F.interpolate(fakes, self.sides, mode="bicubic", antialias=True)

    def blended(self, rows=None, about=""):
        """Yields (top, pixels (C, strip, width) float32), with a row of windows in memory."""
        rows = rows or self.rows
        height, width = self.sides
        band = None  # of the raster, from `top` on: sums of weighted windows
        for k, (top, weights_y) in enumerate(progress(rows, about, unit="row of windows")):
            for left, weights_x, fake in self._row(top):
                if band is None:
                    band = torch.zeros(len(fake), height, self.columns[-1][0] + width)
                weights = torch.from_numpy(weights_y[:, None] * weights_x)
                band[:, :, left : left + width] += fake * weights
            end = rows[k + 1][0] if k + 1 < len(rows) else min(top + height, self.size[0])
            finished, rest = band.split([end - top, height - end + top], 1)
            band = torch.cat([rest, torch.zeros_like(finished)], 1)
            yield top, finished[:, :, : self.size[1]]

    def _row(self, top):
        """Yields (left, weights, fake) of the windows of a row that have data, or of the first."""
        columns = [tile for tile in self.columns if self._has_data(top, tile[0])]
        columns = columns or self.columns[:1]
        for first in range(0, len(columns), 8):
            some = columns[first : first + 8]
            fakes = self.predicted([(top, left) for left, _ in some])
            for (left, weights), fake in zip(some, fakes, strict=True):
                yield left, weights, fake

    def _has_data(self, top, left):
        return not self.valid or self.valid(top, left, *self.sides).any()

    def _noted(self):
        """Corners of the windows to note: spread over the raster, where there is data."""
        some = self.statistics.some(self.rows), self.statistics.some(self.columns)
        for rows, columns in (some, (self.rows, self.columns)):
            corners = [(top, left) for top, _ in rows for left, _ in columns]
            noted = [corner for corner in corners if self._has_data(*corner)]
            if noted:
                return some_of(noted, self.statistics.most**2)
        return [(0, 0)]

    def _positions(self, corners):
        """Corners (top, left), counted in windows."""
        return [(top / self.sides[0], left / self.sides[1]) for top, left in corners]


def sides_of(cfg):
    """--window as (height, width), in pixels; it may be one number for both. 0: --size."""
    return tuple(np.broadcast_to(cfg.window or cfg.size, 2).tolist())


def window_of(cfg, raster):
    """The (height, width) of a raster's windows; None for a raster of up to 1.5 windows."""
    height, width = window = sides_of(cfg)
    large = 2 * raster.height > 3 * height or 2 * raster.width > 3 * width
    return window if cfg.window and large else None


def shared_statistics(cfg, net):
    """SharedStatistics of a network that normalises by an image's own; None without one."""
    return SharedStatistics(net, cfg.norm_reach) if net and cfg.norm_reach else None


def read_filled(raster, top, left, height, width):
    """A window of a raster, mirrored at its edges, with holes in the mean colour of its data.

    A network must not see how a file marks its holes.
    """
    pixels = raster.read(top, left, height, width)
    valid = raster.valid(top, left, *pixels.shape[:2])
    if not (raster.table or valid.all()):
        middle = 0 if raster.limits else 127
        colour = pixels[valid].mean(0) if valid.any() else middle
        pixels = np.where(valid[..., None], pixels, np.round(colour).astype(pixels.dtype))
    return mirrored(pixels, height, width)


def network_input(raster, size, *window):
    """A window (top, left, height, width) of a raster at a network's size: (C or 1, S, S)."""
    small = resize(read_filled(raster, *window), (size, size), labels=bool(raster.table))
    return np.moveaxis(np.atleast_3d(small), -1, 0)


def overlap(a, b):
    """Whether two boxes (top, left, height, width), or arrays of them, have pixels in common."""
    rows = (a[0] < b[0] + b[2]) & (b[0] < a[0] + a[2])
    return rows & (a[1] < b[1] + b[3]) & (b[1] < a[1] + a[3])


def hull(a, b):
    """The smallest box (top, left, height, width) around two."""
    top, left = min(a[0], b[0]), min(a[1], b[1])
    bottom = max(a[0] + a[2], b[0] + b[2])
    right = max(a[1] + a[3], b[1] + b[3])
    return top, left, bottom - top, right - left
