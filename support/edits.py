"""One edit of a photograph: which windows must be generated anew."""

import numpy as np
from PIL import Image, ImageFilter

from support.limits import values_of
from support.pictures import mirrored, resize
from support.windows import Windows, around, filled, shared_statistics, touch, window_of


class PhotoEdit:
    """An edit of one photograph through its land cover: where to paint, and what goes in.

    photo    its Raster
    lc       Raster of the land cover that it shall have, before the strokes
    first    Raster of the land cover that it has; None: lc, without the strokes
    strokes  rectangles of a class, [(index, top, left, bottom, right), ...]
    told     whether the land cover before is known, and with it what changed
    window   (height, width) of a window, in pixels; None: the photograph is generated as a whole
    border   how far an edit is feathered into the photograph: 12 pixels in 256
    """

    def __init__(self, cfg, photo, lc, first=None, strokes=()):
        self.cfg, self.photo, self.lc, self.first, self.strokes = cfg, photo, lc, first, strokes
        self.told = bool(first or strokes)
        self.size = photo.height, photo.width
        self.window = window_of(cfg, photo)
        self.border = max(1, round(12 * min(self.window or self.size) / 256))
        self.whole = not (self.told and cfg.keep_outside)

    def after(self, top, left, height, width):
        """A window of the land cover that the edited photograph shall have, mirrored at edges."""
        labels = self.lc.read(top, left, height, width).copy()
        for index, *corners in self.strokes:
            y0, x0, y1, x1 = (max(c - o, 0) for c, o in zip(corners, (top, left) * 2, strict=True))
            labels[y0:y1, x0:x1] = index
        return mirrored(labels, height, width)

    def before(self, top, left, height, width):
        """A window of the land cover that the photograph has; of --lc's where nothing tells."""
        labels = (self.first or self.lc).read(top, left, height, width)
        return mirrored(labels, height, width)

    def changed(self, top, left, height, width):
        """Where a window's land cover changes: (height, width) bool."""
        if not self.told:
            return np.ones((height, width), bool)
        window = top, left, height, width
        return self.before(*window) != self.after(*window)

    def regions(self):
        """What to generate, [(top, left, height, width), ...], around each group of changes.

        A change that leaves a window an eighth of its side around it gets one window of its own,
        with the change in its middle, as in training; a larger one gets a quarter all around.
        Regions that would overlap become one.
        """
        if self.whole or not self.window:
            return [(0, 0, *self.size)]
        regions = {}  # region: the box of its changes
        for box in self._changes(max(1, min(self.window) // 16)):
            region = self._surroundings(box)
            while near := [other for other in regions if touch(region, other)]:
                box = around(box, regions.pop(near[0]))
                region = self._surroundings(box)
            regions[region] = box
        return list(regions)

    def _changes(self, block):
        """Boxes (top, left, height, width) that cover what changes, in blocks of pixels."""
        height, width = self.size
        for top in range(0, height, block):
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
        windows = Windows(
            lambda top, left, *sides: self._cut(y + top, x + left, *sides),
            predict,
            size,
            self.window,
            shared_statistics(self.cfg, net),
        )
        for top, strip in windows.blended(about=self.photo.path.name):
            pixels = values_of(strip, self.photo.limits)
            yield self._feathered(pixels, y + top, x), y + top, x

    def _cut(self, *window):
        """A window as the network takes it, (C + 2, S, S): photograph, land cover, what changes."""
        size = self.cfg.size, self.cfg.size
        rgb = resize(filled(self.photo, *window), size)
        lc = resize(self.after(*window), size, labels=True)
        changed = resize(self.changed(*window).astype(np.uint8), size, labels=True)
        return np.concatenate([np.moveaxis(rgb, -1, 0), lc[None], changed[None]])

    def _feathered(self, pixels, top, left):
        """Generated pixels where land cover changes, the photograph elsewhere, a ramp between."""
        height, width = pixels.shape[:2]
        if self.whole:
            return pixels
        border = self.border
        above, before = min(border, top), min(border, left)
        window = top - above, left - before, height + above + border, width + before + border
        mask = Image.fromarray(self.changed(*window).astype(np.uint8) * 255)
        mask = mask.filter(ImageFilter.BoxBlur(border))
        mask = mask.crop((before, above, before + width, above + height))
        under = self.photo.values(top, left, height, width)
        share = np.asarray(mask, np.float64)[..., None] / 255
        blend = under + share * (pixels - under.astype(np.float64))
        return (blend if pixels.dtype.kind == "f" else blend.round()).astype(pixels.dtype)


def centred(box, lengths, size):
    """A box (top, left, *lengths) with another in its middle, moved into an image of a size."""
    corner = []
    for first, inner, length, side in zip(box[:2], box[2:], lengths, size, strict=True):
        corner.append(max(0, min(first + (inner - length) // 2, side - length)))
    return *corner, *lengths
