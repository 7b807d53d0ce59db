"""Pairs: files that match, halves of a file."""

import functools

import numpy as np

from support.errors import UserError, refusing
from support.labels import Reading, looked_at
from support.opening import gdal


class Half:
    """The left or right half of a Raster, a square: a picture, or with a ClassTable a label map.

    left  its first column
    """

    place = None  # both halves lie in one file

    def __init__(self, raster, left, table):
        if raster.width != 2 * raster.height:
            size = f"{raster.width}x{raster.height}"
            what = "is no pair side by side, as it is not twice as wide as high"
            raise UserError(f"{raster.path}: {size} {what}")
        self.raster, self.left, self.table = raster, left, table
        self.path, self.masked = raster.path, raster.masked
        self.height = self.width = raster.height

    def read(self, top, left, *sides):
        """A window: a picture (H, W, C), or class indices (H, W)."""
        pixels = self.raster.read(top, self.left + left, *sides)
        if not self.table:
            return pixels
        return self._reading.indices(pixels, self.valid(top, left, *sides))

    def valid(self, top, left, *sides):
        """Where a window has data, bool; a no-data value of labels may be a class."""
        if self.table and self.raster.tiff and self.raster.counts_nodata(self.table):
            return np.ones(sides, bool)
        return self.raster.valid(top, self.left + left, *sides)

    @functools.cached_property
    def _reading(self):
        """The Reading of the half's labels; a photograph in their place is refused."""
        windows, sample = [(0, 0, self.height, self.width)], []
        if self.raster.tiff:  # other files are decoded whole anyway
            windows = looked_at(self.height, self.width)
        for top, left, *sides in windows:
            pixels = self.raster.read(top, self.left + left, *sides)
            sample.append(pixels[self.valid(top, left, *sides)])
        sample = np.concatenate(sample)[None]
        reading = Reading(self.table, self.path, sample, None, self.raster.lossy)
        if reading.by_colour or reading.soft:
            step = 1 + sample.shape[1] // 50_000  # colours of a large half take long
            reading.indices(sample[:, ::step], strict=True)
        return reading


def check_pair(a, b):
    """Refuses two Rasters of different sizes, or with corners over a tenth of a pixel apart."""
    if (a.height, a.width) != (b.height, b.width):
        sizes = f"{a.width}x{a.height} and {b.width}x{b.height}"
        raise UserError(f"{a.path}, {b.path}: {sizes}: sizes must agree")
    if not (a.place and b.place):
        return
    (crs, to_a), (other_crs, to_b) = a.place, b.place
    corners = np.array([[0, a.width, 0, a.width], [0, 0, a.height, a.height], [1, 1, 1, 1]])
    places = np.reshape(to_b, (3, 3)) @ corners
    elsewhere = f"{b.path} lies elsewhere than {a.path}: another CRS or transform"
    same = not (crs and other_crs) or crs == other_crs
    if not (same or (crs.to_epsg() or 0) == other_crs.to_epsg()):  # may be one in other words
        with refusing(elsewhere):
            places[:2] = gdal().warp.transform(other_crs, crs, *places[:2])
    apart = np.abs(np.linalg.inv(np.reshape(to_a, (3, 3))) @ places - corners).max()  # in pixels
    if not apart <= 0.1:
        raise UserError(elsewhere)
