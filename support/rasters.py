"""Pictures and label maps on disk, read by windows."""

import functools
from pathlib import Path

import numpy as np
from PIL import Image

from support.classes import IGNORED
from support.errors import UserError, say_once
from support.files import ARRAY_SUFFIXES
from support.opening import (
    READABLE,
    check_ending,
    decoding,
    deep_driver,
    driver_of,
    gdal,
    open_array,
    open_image,
    open_tiff,
    shape_of_array,
)
from support.pictures import mirrored


class Raster:
    """A picture on disk, or with a ClassTable a label map, that is read by windows.

    Label maps are array files, or images of indices, of code values or of class colours. A TIFF
    or VRT of any size is read piece by piece; other files lie in memory from the first window
    on. Photographs are turned upright as EXIF says.

    bands          those to read of a picture, numbered from 1; (): red, green and blue, as a TIFF
                   names them, or the first three; one band is repeated for (). Never alpha
    endings        those that are opened, each by one driver: READABLE, or UPLOADS of strangers
    most           pixels of a file that lies in memory; 8 bytes for each in an array file
    limits         Limits of a picture: needed for more than 8 bits
    height, width  in pixels
    dtype, count   of a picture: the type of its values, and how many bands it has, without alpha
    tiff           rasterio's dataset of a TIFF or VRT, else None
    """

    def __init__(self, path, table=None, endings=READABLE, most=2**28, bands=(), limits=None):
        self.path, self.table, self.tiff, self._whole = Path(path), table, None, None
        self._has_alpha, self.bands = False, [] if table else list(bands)
        self.limits, self.dtype, self.count = limits, "uint8", 3
        suffix = self.path.suffix.lower()
        with decoding(path):
            check_ending(self.path, endings)
            driver = driver_of(self.path) or (not table and deep_driver(self.path))
            if driver:
                self._open_tiff(driver)
            elif suffix in ARRAY_SUFFIXES:
                self.height, self.width = self._sides_of_array(shape_of_array(self.path, 8 * most))
            else:
                with open_image(path) as image:
                    self._has_alpha = image.has_transparency_data
                    sides = image.size[::-1]
                    self.count = 1 if image.mode in ("1", "L", "LA") else 3
                    self._check_bands(list(range(1, self.count + 1)))
                    sideways = _orientation(image) >= 5
                self.height, self.width = sides[::-1] if sideways else sides
            if not self.tiff and self.height * self.width > most:
                remedy = f"gdal_translate {self.path.name} {self.path.stem}.tif"
                what = f"{self.width}x{self.height} pixels are too many for its format: {remedy}"
                raise UserError(f"{path}: {what}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.tiff:
            self.tiff.close()

    def read(self, top=0, left=0, height=None, width=None):
        """A window, or as much of it as there is: (H, W) class indices, or a picture (H, W, C).

        A picture is uint8, or with limits the int16 levels between them.
        """
        pixels = self.values(top, left, height, width)
        return self.limits.to_levels(pixels) if self.limits and not self.table else pixels

    def values(self, top=0, left=0, height=None, width=None):
        """A window as `read`'s, but of a picture in the values of the file."""
        bottom = self.height if height is None else min(top + height, self.height)
        right = self.width if width is None else min(left + width, self.width)
        with decoding(self.path):
            if self.tiff:
                return self._read_tiff(top, left, bottom, right)
            if self._whole is None:
                self._whole = self._read_labels() if self.table else self._read_picture()
            return self._whole[top:bottom, left:right]

    def padded(self, top, left, height, width):
        """A window (height, width, ...), mirrored at the edges of the raster."""
        return mirrored(self.read(top, left, height, width), height, width)

    def _sides_of_array(self, shape):
        """Height and width of a label map: the shape without the axis of its classes."""
        if not self.table:
            raise UserError(f"{self.path}: is an array, which is read as a label map only")
        last = shape[-1] in (1, len(self.table), len(self.table.entries))
        if len(shape) == 2:
            return shape
        return shape[:2] if last else shape[1:]

    def _read_picture(self):
        with open_image(self.path) as image:
            if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
                say_once(f"images are {image.mode}: converted to RGB")
            turn = _TURNS.get(_orientation(image))
            rgb = image.convert("RGBA" if self.masked else "RGB")
            pixels = np.asarray(rgb.transpose(Image.Transpose[turn]) if turn else rgb)
        if self.masked:
            self._valid = pixels[..., 3] > 0
        return self._picked(pixels[..., :3])

    def _check_bands(self, there):
        """Refuses numbers of bands that a file lacks."""
        wrong = [band for band in self.bands if band not in there]
        if wrong:
            has = ",".join(map(str, there))
            raise UserError(f"{self.path}: --bands names {wrong[0]}, but its bands are {has}")
        if self.bands == [1] and len(there) > 1 and not self.limits:
            say_once(f"band 1 of {len(there)} is read")

    def _picked(self, rgb):
        """The bands to read of a picture (H, W, 3) uint8: (H, W, C)."""
        return np.ascontiguousarray(rgb[..., [band - 1 for band in self.bands or (1, 2, 3)]])

    def _read_labels(self):
        table, path = self.table, self.path
        if path.suffix.lower() in ARRAY_SUFFIXES:
            with open_array(path) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
            if array.ndim == 3 and 1 not in (array.shape[0], array.shape[-1]):
                return table.from_one_hot(array, path)
            return table.from_codes(array.reshape(self.height, self.width), path)
        with open_image(path) as image:
            if image.mode == "1":  # 0 and 255, or 0 and 1: as the table has it
                one = 255 if 255 in table.values else 1
                return table.from_codes(np.asarray(image) * one, path)
            if image.mode == "P":
                palette = np.zeros((256, 3), np.uint8)
                colors = np.reshape(image.getpalette("RGB"), (-1, 3))
                palette[: len(colors)] = colors
                if table.by_palette(np.asarray(image), palette):
                    return table.from_colours(palette[np.asarray(image)], path, nearest=False)
            jpeg = image.format in ("JPEG", "WEBP")
            grey = image.mode == "L" and table.by_grey(np.asarray(image), jpeg)
            if not grey and image.mode in ("P", "L", "I", "I;16", "I;16B", "I;16L", "F"):
                return table.from_codes(np.asarray(image), path)
            nearest = table.nearest or jpeg or grey
            return table.from_colours(np.asarray(image.convert("RGB")), path, nearest)

    def _open_tiff(self, driver):
        self.tiff = open_tiff(self.path, driver)
        self.height, self.width, kinds = self.tiff.height, self.tiff.width, self.tiff.dtypes
        self.dtype = str(np.result_type(*kinds))
        if np.dtype(self.dtype).kind not in "iuf":
            raise UserError(f"{self.path}: has {self.dtype} values, which are not read")
        if self.table and self.tiff.count > 1 and self.dtype != "uint8":
            remedy = "one band of codes, or colours of 8 bits"
            raise UserError(f"{self.path}: has {self.dtype} values; a label map has {remedy}")
        if not (self.table or self.limits or self.dtype == "uint8"):
            remedy = f"gdal_translate -ot Byte -scale LOW HIGH 0 255 {self.path.name} NEW.tif"
            what = f"has {self.dtype} values where 8 bits are expected"
            raise UserError(f"{self.path}: {what}: {remedy}")
        lossy = str(self.tiff.compression) == "Compression.jpeg"
        self._nearest = lossy or bool(self.table and self.table.nearest)
        self._palette, self._levels, self._grey = None, None, False
        if self.tiff.colorinterp[0].name == "palette" and kinds[0] == "uint8":
            colors = self.tiff.colormap(1)
            self._palette = np.array([colors.get(k, (0, 0, 0))[:3] for k in range(256)], np.uint8)
        self._choose_bands()
        if not self.table:
            return
        one_bit = self.tiff.tags(1, ns="IMAGE_STRUCTURE").get("NBITS") == "1"
        if one_bit and sorted(self._palette[:2].tolist()) == [[0] * 3, [255] * 3]:
            one = 255 if 255 in self.table.values else 1  # as of a PNG of one bit
            self._levels, self._palette = self._palette[:2, 0] // 255 * np.uint8(one), None
        top, left = max(0, self.height // 2 - 512), max(0, self.width // 2 - 512)
        bottom, right = min(top + 1024, self.height), min(left + 1024, self.width)
        middle = self._cut(top, left, bottom, right)
        if len(middle) == 3:  # a photograph is refused here
            colours, valid = np.moveaxis(middle, 0, -1), self.valid(top, left, *middle.shape[1:])
            colours = colours if valid is None else colours[valid][None]
            self.table.from_colours(colours, self.path, self._nearest)
        elif self._palette is None and kinds[0] == "uint8":
            self._grey = self.table.by_grey(middle[0], lossy)
        elif self._palette is not None and not self.table.by_palette(middle[0], self._palette):
            self._palette = None

    def _choose_bands(self):
        """Sets which bands of the TIFF are read, and says once which are left out."""
        names = [color.name for color in self.tiff.colorinterp]
        there = [k for k, name in enumerate(names, 1) if name != "alpha"] or [1]
        self.count = 3 if self._palette is not None else len(there)
        self._check_bands([1, 2, 3] if self._palette is not None else there)
        self._chosen = there[:3] if len(there) >= 3 else there[:1]
        if {"red", "green", "blue"} <= set(names):
            self._chosen = [names.index(name) + 1 for name in ("red", "green", "blue")]
        if self.bands and self._palette is None:
            self._chosen = self.bands
        elif len(there) > len(self._chosen) and not self.table:
            which = ", ".join(map(str, self._chosen))
            how = "--bands-A or --bands-B chooses others"
            say_once(f"images have {len(there)} bands: {which} are read: {how}")

    def _cut(self, top, left, bottom, right):
        pixels = self.tiff.read(self._chosen, window=((top, bottom), (left, right)))
        return pixels if self._levels is None else self._levels[pixels]

    def _read_tiff(self, top, left, bottom, right):
        bands = self._cut(top, left, bottom, right)  # (C, H, W)
        pixels = np.moveaxis(bands, 0, -1)  # (H, W, C)
        if self._palette is not None:
            pixels = self._palette[bands[0]]
        if self._palette is not None and not self.table:
            return self._picked(pixels)
        if not self.table:
            grey = pixels.shape[-1] == 1 and not self.bands
            return np.repeat(pixels, 3, 2) if grey else np.ascontiguousarray(pixels)
        nothing = self.tiff.nodata
        by_colour = self._grey or pixels.shape[-1] == 3
        if by_colour:
            nearest = self._grey or (self._nearest and self._palette is None)
            pixels = np.repeat(pixels, 3 // pixels.shape[-1], -1)
            indices = self.table.from_colours(pixels, self.path, nearest, strict=False)
        else:
            if nothing is not None and nothing not in self.table.values:
                bands = np.where(bands == nothing, self.table.unused, bands)
            indices = self.table.from_codes(bands[0], self.path)
        if self.masked and (by_colour or nothing is None):
            valid = self.valid(top, left, *indices.shape)
            indices = np.where(valid, indices, np.uint8(IGNORED))
        return indices

    @functools.cached_property
    def place(self):
        """(CRS or None, transform of pixels to coordinates); None without a place on earth."""
        if not self.tiff:
            return None
        (gcps, crs), to_place = self.tiff.gcps, self.tiff.transform
        if gcps:
            to_place = gdal().transform.from_gcps(gcps)
        nowhere = to_place.is_identity or to_place.is_degenerate
        return None if nowhere else (crs or self.tiff.crs, to_place)

    @functools.cached_property
    def masked(self):
        """Whether some pixels of a TIFF, or of a photograph with transparency, may hold no data."""
        if not self.tiff:
            return self._has_alpha and not self.table
        flags = self.tiff.mask_flag_enums
        everywhere = all("all_valid" in (flag.name for flag in band) for band in flags)
        return not everywhere or (np.dtype(self.dtype).kind == "f" and not self.table)

    def valid(self, top, left, height, width):
        """Where a window holds data, (height, width) bool; None where every pixel does."""
        if not self.masked:
            return None
        if not self.tiff:
            self.read(top, left, height, width)
            return self._valid[top : top + height, left : left + width]
        window = (top, top + height), (left, left + width)
        valid = self.tiff.dataset_mask(window=window) > 0
        if self.table or np.dtype(self.dtype).kind != "f":
            return valid
        return valid & np.isfinite(self.values(top, left, height, width)).all(-1)


# EXIF's orientations 2 to 8: how to turn a photograph upright
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_TURNS = dict(enumerate(_TURNS.split(), 2))


def _orientation(image):
    """EXIF's orientation of an open image, 1 to 8; cameras write it in JPEG files."""
    return image.getexif().get(274, 1) if image.format in ("JPEG", "MPO", "WEBP") else 1


def check_pair(a, b):
    """Refuses two Rasters of other sizes, or with corners over a tenth of a pixel apart."""
    if (a.height, a.width) != (b.height, b.width):
        other = f"{b.path} is {b.width}x{b.height}"
        raise UserError(f"{a.path} is {a.width}x{a.height} but {other}: sizes must agree")
    if not (a.place and b.place):
        return
    crs, other_crs = a.place[0], b.place[0]
    same = not (crs and other_crs) or crs == other_crs
    same = same or crs.to_epsg() == other_crs.to_epsg() is not None
    to_a, to_b = (np.reshape(raster.place[1], (3, 3)) for raster in (a, b))
    corners = np.array([[0, a.width, 0, a.width], [0, 0, a.height, a.height], [1, 1, 1, 1]])
    apart = np.abs(np.linalg.inv(to_a) @ to_b @ corners - corners).max()  # in pixels
    if not same or apart > 0.1:
        raise UserError(f"{b.path} lies elsewhere than {a.path}: another CRS or transform")
