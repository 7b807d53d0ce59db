"""Label maps, pictures and photographs that are edited on the page."""

import collections
import functools
import itertools
from pathlib import Path

import numpy as np
import torch

from support.edits import PhotoEdit
from support.limits import values_of
from support.pictures import as_tensor, eight_bits, paste, shown
from support.rasters import Raster
from support.windows import Windows, hull, network_input, overlap, shared_statistics, window_of


def colours_of(values, limits):
    """A file's picture (H, W, C) as colours: (H, W, 3) uint8."""
    levels = limits.to_levels(values) if limits else values
    planes = torch.tensor(eight_bits(levels)).movedim(-1, 0)
    return shown(planes[None])[0].movedim(0, -1).numpy()


def values_of_colours(colours, bands, limits):
    """Colours (H, W, 3) uint8 as a file's picture (H, W, bands).

    One band gets their grey, two get red and green, and each beyond the third gets blue.
    """
    image = as_tensor(colours)[0]
    if bands == 1:
        image = image.mean(0, keepdim=True)
    return values_of(image[[min(band, 2) for band in range(bands)]], limits)


class MemoryRaster(Raster):
    """A picture, or a label map, in memory, which strokes change.

    pixels  (H, W, C), as in a file, or (H, W) class indices
    start   its colours (H, W, 3) uint8, or (H, W) class indices
    now     the same, changed by strokes. A new colour changes the bands that are shown
    """

    masked = False  # every pixel has data

    def __init__(self, pixels, table=None, limits=None):
        self.path, self.table, self.tiff, self.limits = Path("canvas"), table, None, limits
        self.height, self.width = pixels.shape[:2]
        self.pixels, self.start = pixels, pixels if table else colours_of(pixels, limits)
        self.now = self.start.copy()

    def values(self, top=0, left=0, height=None, width=None):
        """A window, cut off at the edges, with the strokes."""
        bottom, right = top + (height or self.height), left + (width or self.width)
        window = slice(top, bottom), slice(left, right)
        now, pixels = self.now[window], self.pixels[window]
        if self.table:
            return now
        painted = (now != self.start[window]).any(-1)
        new = values_of_colours(now[painted][None], pixels.shape[-1], self.limits)[0]
        pixels = pixels.astype(np.result_type(pixels, new))
        pixels[painted, :3] = new[:, :3]
        return pixels


class TranslationCanvas(Windows):
    """A label map or a picture, and its translation, window by window, as by --generate.

    show    show(strip (C, H, W) of the translation)  -> (H, W, 3) uint8
    photo   a MemoryRaster to compare with, or None
    pixels  the MemoryRaster's `now`, which strokes change; start: as it was opened

    Shared statistics stay those of the canvas as it was opened.
    """

    def __init__(self, cfg, predict, net, show, raster, photo=None):
        self.seed, self.show, self.photo = cfg.seed, show, photo
        self.pixels, self.start = raster.now, raster.start
        self.kept = collections.defaultdict(dict)  # variant: {corner: (C, height, width) float32}
        window, size = window_of(cfg, raster), (raster.height, raster.width)
        cut = functools.partial(network_input, raster, cfg.size)
        predict = functools.partial(predict, whole=not window)
        super().__init__(cut, predict, size, window, shared_statistics(cfg, net))

    def generated(self, box, variant):
        """Generates the windows that overlap a box, at first all: (the box around them, pixels)."""
        self.variant = variant
        kept = self.kept[variant]
        if not kept:
            box = 0, 0, *self.size
        torch.manual_seed(self.seed + variant - 1)
        corners = [(top, left) for top, _ in self.rows for left, _ in self.columns]
        touched = [corner for corner in corners if overlap((*corner, *self.sides), box)]
        for corner in touched:
            kept.pop(corner, None)
        top, left, height, width = hull((*touched[0], *self.sides), (*touched[-1], *self.sides))
        rows = [row for row in self.rows if row[0] < top + height and top < row[0] + self.sides[0]]
        strips = [strip[:, :, left : left + width] for _, strip in self.blended(rows)]
        blend = torch.cat(strips, 1)[:, top - rows[0][0] :][:, :height]  # cut off at the edges
        return (top, left, *blend.shape[1:]), self.show(blend)

    def predicted(self, corners):
        """The windows at these corners; those without a change are kept from before."""
        kept = self.kept[self.variant]
        new = [corner for corner in corners if corner not in kept]
        if new:
            kept |= zip(new, super().predicted(new), strict=True)
        return torch.stack([kept[corner] for corner in corners])


class EditCanvas:
    """A photograph with land cover, and the edited photograph, by regions, as by --generate.

    pixels  (H, W) class indices, which strokes change; start: as they were opened
    """

    def __init__(self, cfg, predict, net, labels, photo):
        self.predict, self.net, self.photo = predict, net, photo
        self.pixels, self.start = labels.now, labels.start
        self.edit = PhotoEdit(cfg, photo, labels, MemoryRaster(self.start, cfg.classes))
        self.kept = collections.defaultdict(dict)  # variant: {(region, land cover): its parts}

    def generated(self, box, variant):
        """Generates new regions. Returns the box around all that differs, and its pixels."""
        kept, found = self.kept[variant], {}
        predict = functools.partial(self.predict, variant=variant)
        for region in self.edit.regions():
            key = region, self.edit.after(*region).tobytes()
            found[key] = kept.get(key) or list(self.edit.generated(region, predict, self.net))
        for region, _ in kept.keys() ^ found.keys():  # new, erased, or part of another region now
            box = hull(box, region)
        self.kept[variant] = found
        picture = self.photo.values(*box)
        for pixels, y, x in itertools.chain(*found.values()):
            paste(picture, pixels, y - box[0], x - box[1])
        return box, colours_of(picture, self.photo.limits)
