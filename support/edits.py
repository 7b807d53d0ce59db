"""One edit of a photograph: what is generated, and how it is blended in."""

import numpy as np
import torch
import torch.nn.functional as F

from support.classes import IGNORED
from support.errors import progress
from support.limits import values_of
from support.pictures import mirrored, resize
from support.windows import Windows, hull, network_input, overlap, shared_statistics, window_of


class PhotoEdit:
    """An edit of one photograph through its land cover.

    photo       its Raster
    lc          Raster of the land cover after the edit, without the strokes
    first       Raster of the land cover before it: by default lc
    strokes     rectangles of a class, [(index, top, left, bottom, right), ...]
    has_before  whether the land cover before is given, so that only its changes are generated
    window      (height, width) of a window, in pixels, which may be the whole photograph
    border      width of the ramp around an edit, into the photograph: 12 pixels in 256
    whole       everything is generated, and nothing of the photograph is kept
    """

    def __init__(self, cfg, photo, lc, first=None, strokes=()):
        self.cfg, self.photo, self.lc, self.strokes = cfg, photo, lc, strokes
        self.first = first or lc
        self.has_before = bool(first or strokes)
        self.size = photo.height, photo.width
        self.window = window_of(cfg, photo) or self.size
        self.border = max(1, round(12 * min(self.window) / 256))
        self.whole = not (self.has_before and cfg.keep_outside)

    def after(self, top, left, height, width):
        """A window of the land cover after the edit, mirrored at the edges."""
        labels = self.lc.read(top, left, height, width).copy()
        for index, *corners in self.strokes:
            y0, x0, y1, x1 = (max(c - o, 0) for c, o in zip(corners, (top, left) * 2, strict=True))
            labels[y0:y1, x0:x1] = index
        return mirrored(labels, height, width)

    def before(self, top, left, height, width):
        """A window of the land cover before the edit, mirrored at the edges."""
        return mirrored(self.first.read(top, left, height, width), height, width)

    def changed(self, *window):
        """Where the land cover of a window (top, left, height, width) becomes another: bool.

        Where it has no class after the edit, nothing is asked for, and the photograph stays.
        """
        if not self.has_before:
            return np.ones(window[2:], bool)
        after = self.after(*window)
        return (self.before(*window) != after) & (after != IGNORED)

    def regions(self):
        """The regions to generate, [(top, left, height, width), ...]: one for a group of changes.

        A change of up to 3/4 of a window is the middle of one window; a larger one gets a margin of
        1/4. Overlapping regions become one.
        """
        if self.whole:
            return [(0, 0, *self.size)]
        regions, boxes = np.empty((2, 0, 4), int)  # regions, and the boxes of their changes
        for box in self._changes(max(1, min(self.window) // 16)):
            region = self._surroundings(box)
            while (near := overlap(regions.T, region)).any():
                first = near.argmax()
                box = hull(box, boxes[first].tolist())
                regions, boxes = (np.delete(x, first, 0) for x in (regions, boxes))
                region = self._surroundings(box)
            regions, boxes = np.vstack([regions, region]), np.vstack([boxes, box])
        return list(map(tuple, regions.tolist()))

    def _changes(self, block):
        """Yields boxes (top, left, height, width) that cover all changes, on a grid of blocks."""
        height, width = self.size
        for top in progress(range(0, height, block), "comparing", delay=2):
            changed = self.changed(top, 0, min(block, height - top), width).any(0)
            blocks = np.logical_or.reduceat(changed, np.arange(0, width, block))
            edges = np.flatnonzero(np.diff(blocks, prepend=False, append=False)) * block
            for left, right in edges.reshape(-1, 2).tolist():
                yield top, left, block, right - left

    def _surroundings(self, box):
        """The region to generate around a box of changes."""
        lengths = []
        for length, side, window in zip(box[2:], self.size, self.window, strict=True):
            margin = window // 4
            fits = length <= window - margin
            lengths.append(min(side, window if fits else length + 2 * margin))
        return centred(box, lengths, self.size)

    def generated(self, region, predict, net=None):
        """Generates a region (top, left, height, width): yields (pixels (h, w, C), top, left)."""
        y, x, *size = region

        def cut(top, left, *sides):
            return self._cut(y + top, x + left, *sides)

        def changed(top, left, *sides):  # a ramp ends where the next window has no weight
            return self.changed(y + top, x + left, *sides)

        statistics = shared_statistics(self.cfg, net)
        valid = None if self.whole else changed
        windows = Windows(cut, predict, size, self.window, statistics, valid)
        for top, strip in windows.blended(about=self.photo.path.name):
            pixels = values_of(strip, self.photo.limits)
            yield self._feathered(pixels, y + top, x), y + top, x

    def _cut(self, *window):
        """The network's input, (C + 2, S, S): photograph, land cover, and 1 where it changes."""
        size = self.cfg.size, self.cfg.size
        rgb = network_input(self.photo, self.cfg.size, *window)
        lc = resize(self.after(*window), size, labels=True)
        changed = resize(self.changed(*window).astype(np.uint8), size, labels=True)
        return np.concatenate([rgb, lc[None], changed[None]])

    def _feathered(self, pixels, top, left):
        """Generated pixels where land cover changes, a ramp around, and the photograph elsewhere.

        A region has no change near its sides, but the strips above and below may have.
        """
        height, width = pixels.shape[:2]
        if self.whole:
            return pixels
        above = min(self.border, top)
        changed = self.changed(top - above, left, above + height + self.border, width)
        share = ramp(changed, self.border // 2)[above : above + height, :, None]
        under = self.photo.values(top, left, height, width)
        blend = under + share * (pixels - under.astype(np.float64))
        return (blend if pixels.dtype.kind == "f" else blend.round()).astype(pixels.dtype)


def ramp(changed, radius):
    """1 where `changed` (H, W) is True, falling to 0 over 2 * radius pixels around: float64.

    It is the mean, in a square, of `changed` grown by a square of the same size.
    """
    share = torch.from_numpy(changed)[None, None].double()
    column, around = (2 * radius + 1, 1), {"stride": 1, "padding": (radius, 0)}
    for _ in range(2):  # along columns, then along rows
        share = F.max_pool2d(share, column, **around).transpose(2, 3)
    for _ in range(2):
        share = F.avg_pool2d(share, column, **around, count_include_pad=False).transpose(2, 3)
    return share[0, 0].numpy()


def centred(box, lengths, size):
    """The box (top, left, *lengths) around the middle of another, moved to lie in the image."""
    corner = []
    for first, inner, length, side in zip(box[:2], box[2:], lengths, size, strict=True):
        corner.append(max(0, min(first + (inner - length) // 2, side - length)))
    return *corner, *lengths
