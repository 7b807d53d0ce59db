"""What the page paints on: a label map or picture, or a photograph to edit."""

import collections
import functools
import itertools
from pathlib import Path

import torch

from support.edits import PhotoEdit
from support.pictures import paste
from support.rasters import Raster
from support.windows import (
    network_input,
    predict_windows,
    shared_statistics,
    tiles,
    touch,
    window_of,
)


class MemoryRaster(Raster):
    """A picture (H, W, 3) uint8, or a label map (H, W), in memory; who holds it may change it."""

    def __init__(self, pixels, table=None):
        self.path, self.table, self.tiff, self._whole = Path("canvas"), table, None, pixels
        self.height, self.width = pixels.shape[:2]


class TranslationCanvas:
    """A label map or a picture, and what a model makes of it, window by window.

    pixels   (H, W) class indices, or (H, W, 3) uint8: strokes change them
    generated  after a change, the picture of the windows around it; at the first, of all

    The windows, their weights and their noise are those of --generate, and so is the picture.
    Shared statistics stay those of the canvas as it was opened.
    """

    def __init__(self, cfg, predict, net, pixels, table, show):
        self.cfg, self.predict, self.pixels, self.show = cfg, predict, pixels, show
        self.raster = MemoryRaster(pixels, table)
        self.cut = functools.partial(network_input, self.raster, cfg.size)
        size = self.raster.height, self.raster.width
        window = window_of(cfg, self.raster)
        self.sides = (window, window) if window else size
        rows, columns = (tiles(*pair) for pair in zip(size, self.sides, strict=True))
        self.corners = [(top, left) for top, _ in rows for left, _ in columns]
        self.weights = [
            torch.from_numpy(y[:, None] * x) for (_, y), (_, x) in itertools.product(rows, columns)
        ]
        self.fakes = {}  # (number of a window, sample): (C, height, width) float32
        self.alone = len(self.corners) == 1
        self.statistics = None if self.alone else shared_statistics(cfg, net)
        if self.statistics:
            windowed = functools.partial(predict, whole=False)
            self.statistics.note_some(rows, columns, self.sides, self.cut, windowed)

    def generated(self, box, sample):
        """Paints anew what a box (top, left, height, width) touches: (its surroundings, pixels)."""
        if (0, sample) not in self.fakes:
            box = 0, 0, self.raster.height, self.raster.width
        touched = self._touched(box)
        torch.manual_seed(self.cfg.seed + sample - 1)
        predict = functools.partial(self.predict, whole=self.alone)
        for first in range(0, len(touched), 8):
            numbers = touched[first : first + 8]
            corners = [self.corners[k] for k in numbers]
            fakes = predict_windows(self.cut, predict, corners, self.sides, self.statistics)
            self.fakes |= {(k, sample): fake for k, fake in zip(numbers, fakes, strict=True)}
        tops, lefts = zip(*(self.corners[k] for k in touched), strict=True)
        bottom = min(max(tops) + self.sides[0], self.raster.height)
        right = min(max(lefts) + self.sides[1], self.raster.width)
        region = min(tops), min(lefts), bottom - min(tops), right - min(lefts)
        return region, self.show(self._blended(region, sample))

    def _touched(self, box):
        """The numbers of the windows that have pixels in a box."""
        return [k for k, corner in enumerate(self.corners) if touch((*corner, *self.sides), box)]

    def _blended(self, region, sample):
        """The windows of a region, each with its weights: (C, height, width) float32."""
        y, x, height, width = region
        blend = torch.zeros(len(self.fakes[0, sample]), height, width)
        for k in self._touched(region):
            top, left = self.corners[k]
            fake = self.fakes[k, sample] * self.weights[k]
            target = blend[:, max(0, top - y) :, max(0, left - x) :]
            fake = fake[:, max(0, y - top) :, max(0, x - left) :]
            fake = fake[:, : target.shape[1], : target.shape[2]]
            target[:, : fake.shape[1], : fake.shape[2]] += fake
        return blend


class EditCanvas:
    """A photograph, its land cover, which strokes change, and the photograph that follows.

    pixels   (H, W) class indices: strokes change them
    generated  after a change, the picture of the regions that it changed

    The regions, their windows and how they are blended are those of --generate.
    """

    def __init__(self, cfg, predict, net, labels, photo):
        self.predict, self.net, self.photo, self.pixels = predict, net, photo, labels
        maps = MemoryRaster(labels, cfg.classes), MemoryRaster(labels.copy(), cfg.classes)
        self.edit = PhotoEdit(cfg, MemoryRaster(photo), *maps)
        self.answers = collections.defaultdict(dict)  # sample: {(region, land cover): its pieces}

    def generated(self, box, sample):
        """Paints the regions that are new: (the box around all that changed, pixels)."""
        known, found = self.answers[sample], {}
        for region in self.edit.regions():
            key = region, self.edit.after(*region).tobytes()
            if key not in known:
                known[key] = list(self.edit.generated(region, self.predict, self.net, sample))
                box = around(box, region)
            found[key] = known[key]
        for region, _ in known.keys() - found.keys():  # what was erased, or became part of another
            box = around(box, region)
        self.answers[sample] = found
        top, left, height, width = box
        picture = self.photo[top : top + height, left : left + width].copy()
        for pixels, y, x in itertools.chain(*found.values()):
            paste(picture, pixels, y - top, x - left)
        return box, picture


def around(box, other):
    """The box (top, left, height, width) around two."""
    top, left = min(box[0], other[0]), min(box[1], other[1])
    bottom, right = (
        max(box[0] + box[2], other[0] + other[2]),
        max(box[1] + box[3], other[1] + other[3]),
    )
    return top, left, bottom - top, right - left
