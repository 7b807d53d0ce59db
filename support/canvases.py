"""Images that the page can edit: a label map, a picture, or a photograph."""

import collections
import functools
import itertools
from pathlib import Path

import torch

from support.edits import PhotoEdit
from support.pictures import paste
from support.rasters import Raster
from support.windows import Windows, around, network_input, shared_statistics, touch, window_of


class MemoryRaster(Raster):
    """A picture (H, W, 3) uint8, or a label map (H, W), in memory; its owner may change it."""

    def __init__(self, pixels, table=None):
        self.path, self.table, self.tiff, self.pixels = Path("canvas"), table, None, pixels
        self.limits = None
        self.height, self.width = pixels.shape[:2]

    def values(self, top=0, left=0, height=None, width=None):
        """A window, or as much of it as there is, as a view."""
        bottom = None if height is None else top + height
        right = None if width is None else left + width
        return self.pixels[top:bottom, left:right]

    def valid(self, *_):
        """None: every pixel has data."""


class TranslationCanvas(Windows):
    """A label map or a picture, and what a model makes of it, window by window.

    pixels     (H, W) class indices, or (H, W, 3) uint8: strokes change them; start: before all
    generated  after a change, the picture of the windows around it; at the first, of all

    The windows, their weights and their noise are those of --generate, and so is the picture.
    Shared statistics stay those of the canvas as it was opened.
    """

    def __init__(self, cfg, predict, net, pixels, table, show):
        self.seed, self.pixels, self.show = cfg.seed, pixels, show
        self.start = pixels.copy()
        self.known = collections.defaultdict(dict)  # sample: {corner: (C, height, width) float32}
        raster = MemoryRaster(pixels, table)
        window = window_of(cfg, raster)
        super().__init__(
            functools.partial(network_input, raster, cfg.size),
            functools.partial(predict, whole=not window),
            pixels.shape[:2],
            window,
            shared_statistics(cfg, net),
        )

    def generated(self, box, sample):
        """Generates what a box (top, left, height, width) touches: (its surroundings, pixels)."""
        self.sample = sample
        known = self.known[sample]
        if not known:
            box = 0, 0, *self.size
        torch.manual_seed(self.seed + sample - 1)
        corners = [(top, left) for top, _ in self.rows for left, _ in self.columns]
        touched = [corner for corner in corners if touch((*corner, *self.sides), box)]
        for corner in touched:
            known.pop(corner, None)
        top, left = touched[0]
        bottom = min(touched[-1][0] + self.sides[0], self.size[0])
        right = min(touched[-1][1] + self.sides[1], self.size[1])
        rows = [row for row in self.rows if row[0] < bottom and top < row[0] + self.sides[0]]
        strips = [strip[:, :, left:right] for _, strip in self.blended(rows)]
        blend = torch.cat(strips, 1)[:, top - rows[0][0] :][:, : bottom - top]
        return (top, left, bottom - top, right - left), self.show(blend)

    def predicted(self, corners):
        """Windows at these corners, from memory where nothing has changed."""
        known = self.known[self.sample]
        new = [corner for corner in corners if corner not in known]
        if new:
            known |= zip(new, super().predicted(new), strict=True)
        return torch.stack([known[corner] for corner in corners])


class EditCanvas:
    """A photograph, its land cover, which strokes change, and the photograph that follows.

    pixels     (H, W) class indices: strokes change them; start: before all
    generated  after a change, the picture of the regions that it changed

    The regions, their windows and how they are blended are those of --generate.
    """

    def __init__(self, cfg, predict, net, labels, photo):
        self.predict, self.net, self.photo, self.pixels = predict, net, photo, labels
        self.start = labels.copy()
        maps = MemoryRaster(labels, cfg.classes), MemoryRaster(self.start, cfg.classes)
        self.edit = PhotoEdit(cfg, MemoryRaster(photo), *maps)
        self.answers = collections.defaultdict(dict)  # sample: {(region, land cover): its pieces}

    def generated(self, box, sample):
        """Generates the regions that are new: (the box around all that changed, pixels)."""
        known, found = self.answers[sample], {}
        predict = functools.partial(self.predict, sample=sample)
        for region in self.edit.regions():
            key = region, self.edit.after(*region).tobytes()
            if key not in known:
                known[key] = list(self.edit.generated(region, predict, self.net))
                box = around(box, region)
            found[key] = known[key]
        for region, _ in known.keys() - found.keys():  # erased, or part of another region now
            box = around(box, region)
        self.answers[sample] = found
        top, left, height, width = box
        picture = self.photo[top : top + height, left : left + width].copy()
        for pixels, y, x in itertools.chain(*found.values()):
            paste(picture, pixels, y - top, x - left)
        return box, picture
