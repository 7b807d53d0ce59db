"""An edit of one photograph through its land cover: which windows are painted."""

import functools
import itertools

import numpy as np
from PIL import Image, ImageFilter

from support.pictures import as_array, mirrored, resize
from support.windows import blended, shared_statistics, touch, window_of


class PhotoEdit:
    """An edit of one photograph through its land cover: where to paint, and what goes in.

    photo    its Raster
    lc       Raster of the land cover that it shall have, before the strokes
    first    Raster of the land cover that it has; None: lc, without the strokes
    strokes  rectangles of a class, [(index, top, left, bottom, right), ...]
    told     whether the land cover before is known, and with it what changed
    window   the side of a window, in pixels; 0: the photograph is painted as a whole
    border   how far an edit is feathered into the photograph: 12 pixels in 256
    """

    def __init__(self, cfg, photo, lc, first=None, strokes=()):
        self.cfg, self.photo, self.lc, self.first, self.strokes = cfg, photo, lc, first, strokes
        self.told = bool(first or strokes)
        self.size = photo.height, photo.width
        self.window = window_of(cfg, photo)
        self.border = max(1, round(12 * (self.window or min(self.size)) / 256))
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
        return (self.first or self.lc).padded(top, left, height, width)

    def changed(self, top, left, height, width):
        """Where a window's land cover changes: (height, width) bool."""
        if not self.told:
            return np.ones((height, width), bool)
        window = top, left, height, width
        return self.before(*window) != self.after(*window)

    def regions(self):
        """What to paint, [(top, left, height, width), ...], around each group of changes.

        A change that leaves a window an eighth of its side around it gets one window of its own,
        with the change in its middle, as in training; a larger one gets a quarter all around.
        Regions that would overlap become one.
        """
        window = self.window
        if self.whole or not window:
            return [(0, 0, *self.size)]
        block = max(1, window // 16)
        spans = [
            (y * block, x * block, (y_last + 1) * block, (x_last + 1) * block)
            for y, x, y_last, x_last in _groups(self._changed_blocks(block))
        ]
        apart = []
        while spans:
            span = spans.pop()
            near = [s for s in apart if touch(self._around(span, window), self._around(s, window))]
            if near:
                apart.remove(near[0])
                span = [*map(min, span[:2], near[0][:2]), *map(max, span[2:], near[0][2:])]
                spans.append(span)
            else:
                apart.append(span)
        return [self._around(span, window) for span in apart]

    def generated(self, region, predict, net=None, sample=1):
        """Paints a region (top, left, height, width): yields (pixels (h, w, 3), top, left)."""
        (y, x), size = region[:2], region[2:]
        strips = blended(
            lambda top, left, *sides: self._cut(y + top, x + left, *sides),
            functools.partial(predict, sample=sample),
            size,
            self.window,
            shared_statistics(self.cfg, net),
            about=self.photo.path.name,
        )
        for top, strip in strips:
            yield self._feathered(as_array(strip[None]), y + top, x), y + top, x

    def _cut(self, *window):
        """A window as the network takes it, (5, S, S): photograph, land cover, what changes."""
        size = self.cfg.size, self.cfg.size
        rgb = resize(self.photo.padded(*window), size)
        lc = resize(self.after(*window), size, labels=True)
        changed = resize(self.changed(*window).astype(np.uint8), size, labels=True)
        return np.concatenate([np.moveaxis(rgb, -1, 0), lc[None], changed[None]])

    def _feathered(self, pixels, top, left):
        """MemoryRaster pixels in the photograph, which holds outside of what changed."""
        height, width = pixels.shape[:2]
        if self.whole:
            return pixels
        border = self.border
        above, before = min(border, top), min(border, left)
        window = top - above, left - before, height + above + border, width + before + border
        mask = Image.fromarray(self.changed(*window).astype(np.uint8) * 255)
        mask = mask.filter(ImageFilter.BoxBlur(border))
        mask = mask.crop((before, above, before + width, above + height))
        under = Image.fromarray(self.photo.read(top, left, height, width))
        return np.asarray(Image.composite(Image.fromarray(pixels), under, mask))

    def _changed_blocks(self, block):
        """The set of (row, column) of blocks of pixels in which land cover changes."""
        blocks = set()
        for row, top in enumerate(range(0, self.size[0], block)):
            changed = self.changed(top, 0, min(block, self.size[0] - top), self.size[1]).any(0)
            blocks |= {(row, k // block) for k in np.flatnonzero(changed).tolist()}
        return blocks

    def _around(self, span, window):
        """The region to paint around what changes in (top, left, bottom, right)."""
        corner, room = [], window // 4
        lengths = []
        for first, last, side in zip(span[:2], span[2:], self.size, strict=True):
            fits = last - first <= window - room
            length = min(side, window if fits else last - first + 2 * room)
            corner.append(max(0, min((first + last - length) // 2, side - length)))
            lengths.append(length)
        return *corner, *lengths


def _groups(blocks):
    """Splits a set of (row, column) into groups of neighbours: the corners of each, inclusive."""
    while blocks:
        group, edge = set(), {blocks.pop()}
        while edge:
            group |= edge
            edge = blocks & {(y + dy, x + dx) for y, x in edge for dy, dx in _NEAR}
            blocks -= edge
        rows, columns = zip(*group, strict=True)
        yield min(rows), min(columns), max(rows), max(columns)


_NEAR = list(itertools.product((-1, 0, 1), repeat=2))
