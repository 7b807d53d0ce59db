"""Pictures and label maps on disk, read by windows."""

import functools
from pathlib import Path

import numpy as np
from PIL import Image

from support import opening
from support.errors import UserError, print_once
from support.files import ARRAY_SUFFIXES
from support.labels import Reading, looked_at
from support.opening import READABLE


class Raster:
    """A picture on disk, or with a ClassTable a label map, that is read by windows.

    Label maps are array files, or images of indices, of code values or of class colours. A TIFF
    or VRT of any size is read piece by piece; other files are decoded whole. Photographs are
    turned upright by their EXIF orientation.

    bands          those to read of a picture, numbered from 1; (): red, green and blue, as a TIFF
                   names them, or the first three, or one band three times. Never alpha
    endings        those that may be opened: READABLE, or UPLOADS of strangers
    most           largest number of pixels of a file that is decoded whole; an array file may
                   have 8 bytes for each
    limits         Limits of a picture: needed for more than 8 bits
    height, width  in pixels
    dtype, count   of a picture: the type of its values, and the number of bands without alpha
    colours        the ICC profile of an RGB picture that is no TIFF: bytes, or None
    tiff           rasterio's dataset of a TIFF or VRT, else None; chosen: its bands that are read
    masked         whether some pixels of a TIFF, or of a transparent picture, may have no data
    palette        (256, 3) uint8, the colours of an 8-bit TIFF of indices; else None
    levels         (256,) uint8, what the greys of a TIFF are read as; None: as they are
    lossy          whether the file's compression changes colours, as that of JPEG does
    """

    def __init__(self, path, table=None, endings=READABLE, most=2**28, bands=(), limits=None):
        self.path, self.table, self.tiff, self._whole = Path(path), table, None, None
        self.palette, self._clear, self.levels, self._alpha = None, [], None, None
        self.bands, self.limits, self.dtype, self.colours = list(bands), limits, "uint8", None
        self.masked = False
        with opening.decoding(path):
            opening.check_ending(self.path, endings)
            driver = opening.driver_of(self.path)
            if not (driver or table) and opening.png_depth(self.path) == 16:
                driver = "PNG"
            if driver:
                self._open_tiff(driver, 8 * most)
                self.masked = self._lacks_data()
            elif self.path.suffix.lower() in ARRAY_SUFFIXES:
                self._open_array(8 * most)
            else:
                self._open_image()
            if not self.height * self.width:
                raise UserError(f"{path}: has no pixels")
            if not self.tiff and self.height * self.width > most:
                sides = f"{self.width}x{self.height}"
                raise UserError(f"{path}: {sides} is too large: make it a TIFF, or cut it")
            wanted = limits.dtype if limits and not table else ""
            if wanted and (wanted == "uint8") != (self.dtype == "uint8"):
                raise UserError(f"{path}: has {self.dtype} values; the training images: {wanted}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.tiff:
            self.tiff.close()

    def read(self, top=0, left=0, height=None, width=None):
        """A window, cut off at the edges: (H, W) class indices, or a picture (H, W, C).

        A picture is uint8, or with limits the int16 levels between them.
        """
        pixels = self.values(top, left, height, width)
        return self.limits.to_levels(pixels) if self.limits else pixels

    def values(self, top=0, left=0, height=None, width=None):
        """The same window, but a picture in the values of the file."""
        bottom = self.height if height is None else min(top + height, self.height)
        right = self.width if width is None else min(left + width, self.width)
        with opening.decoding(self.path):
            if self.tiff:
                return self._read_tiff(top, left, bottom, right)
            if self._whole is None:
                self._whole = self._read_labels() if self.table else self._read_picture()
            return self._whole[top:bottom, left:right]

    def _open_image(self):
        with opening.open_image(self.path) as image:
            self.masked = image.has_transparency_data
            self.lossy = image.format in ("JPEG", "MPO", "WEBP")
            self.width, self.height = image.size
            if not self.table and 5 <= opening.orientation(image) <= 8:  # lies on its side
                self.height, self.width = image.size
            if image.mode in ("RGB", "RGBA"):
                self.colours = image.info.get("icc_profile")
            self._count_bands([1] if image.mode in ("1", "L", "LA") else [1, 2, 3])

    def _open_array(self, most):
        if not self.table:
            raise UserError(f"{self.path}: an array can only be a label map, not a picture")
        array = opening.open_array(self.path, most)
        channels = 1, len(self.table), len(self.table.entries)
        if array.ndim == 3 and array.shape[-1] not in channels:
            array = np.moveaxis(array, 0, -1)
        self._array = np.atleast_3d(array)  # (H, W, 1 or classes)
        self.height, self.width, _ = self._array.shape

    def _read_picture(self):
        with opening.open_image(self.path) as image:
            turn = opening.TURNS.get(opening.orientation(image))
            rgb = image.convert("RGBA" if self.masked else "RGB")
            pixels = np.asarray(rgb.transpose(Image.Transpose[turn]) if turn else rgb)
        if self.masked:
            self._alpha = pixels[..., 3]
        return self._picked(pixels[..., :3])

    def _count_bands(self, there):
        """Counts the bands of a file, and refuses numbers of others."""
        self.count = len(there)
        wrong = [band for band in self.bands if band not in there]
        if wrong:
            about = f"its bands are {there}"
            if self.tiff and wrong[0] <= self.tiff.count:
                about = f"it is marked as alpha: {self._not_alpha()} corrects this"
            asked = f"band {wrong[0]} is asked for (--bands-A, --bands-B, or as in training)"
            raise UserError(f"{self.path}: {asked}, but {about}")
        if 0 < len(self.bands) < min(3, self.count) and not self.limits:
            print_once(f"images have {self.count} bands; these are read: {self.bands}")

    def _picked(self, rgb):
        """The bands to read of a picture (H, W, 3) uint8: (H, W, C)."""
        return np.ascontiguousarray(rgb[..., [band - 1 for band in self.bands or (1, 2, 3)]])

    def _read_labels(self):
        table, path, palette = self.table, self.path, None
        if path.suffix.lower() in ARRAY_SUFFIXES:
            if self._array.shape[-1] > 1:
                return table.from_one_hot(self._array, path)
            return table.from_codes(self._array[..., 0], path)
        with opening.open_image(path) as image:
            if self.masked:
                self._alpha = np.asarray(image.convert("RGBA"))[..., 3]
            if image.mode == "P":
                colors = bytes(image.getpalette("RGB")).ljust(3 * 256, b"\0")
                palette = np.frombuffer(colors, np.uint8).reshape(256, 3)
            elif image.mode not in ("1", "L", "I", "I;16", "I;16B", "I;16L", "F"):
                image = image.convert("L" if image.mode == "LA" else "RGB")
            pixels = np.atleast_3d(np.asarray(image))
        if pixels.dtype == bool:  # 0 and 1, or 0 and 255 if the table has 255
            pixels = pixels * np.uint8(255 if 255 in table.values else 1)
        if image.mode == "L" and (bits := opening.png_depth(path)) in (2, 4):
            codes = pixels // (255 // (2**bits - 1))
            pixels = codes if table.has(codes) else pixels
        known = self._alpha > 0 if self.masked else np.ones(pixels.shape[:2], bool)
        reading = Reading(table, path, pixels[known][None], palette, self.lossy)
        return reading.indices(pixels, known, strict=True)

    def _open_tiff(self, driver, most):
        self.tiff = opening.open_tiff(self.path, driver)
        pages = len(self.tiff.subdatasets)
        if not self.tiff.count:
            raise UserError(f"{self.path}: has {pages} images: write one of them as a TIFF")
        if pages > 1:
            print_once(f"images have {pages} pages: the first is read")
        self.height, self.width, kinds = self.tiff.height, self.tiff.width, self.tiff.dtypes
        self.dtype = str(np.result_type(*kinds))
        together = self.tiff.count if self.tiff.profile.get("interleave") == "pixel" else 1
        block = np.prod(self.tiff.block_shapes[0]) * together * np.dtype(self.dtype).itemsize
        if block > most:
            how = "gdal_translate -co TILED=YES x.tif y.tif makes smaller ones"
            raise UserError(f"{self.path}: has blocks of {block:,} bytes: {how}")
        if np.dtype(self.dtype).kind not in "iuf":
            raise UserError(f"{self.path}: has {self.dtype} values, which are not supported")
        deep = self.dtype != "uint8"
        if deep and not (self.table or self.limits):
            remedy = "use rio convert --dtype uint8 --scale-ratio R, where R is 255 / the highest"
            raise UserError(f"{self.path}: has {self.dtype} values, not 8 bits: {remedy}")
        if self.tiff.colorinterp[0].name == "palette" and kinds[0] == "uint8":
            colors = self.tiff.colormap(1)
            self.palette = np.array([colors.get(k, (0, 0, 0))[:3] for k in range(256)], np.uint8)
            if self.tiff.nodata is None:  # of a PNG with several transparent colours
                self._clear = [k for k, color in colors.items() if color[3] == 0]
        self._choose_bands()
        if not self.table:
            self._scale_grey(deep)
            return
        black_white = [[0] * 3, [255] * 3]
        colors = black_white if self.palette is None else self.palette[:2].tolist()
        one_bit = self.tiff.tags(1, ns="IMAGE_STRUCTURE").get("NBITS") == "1"
        if one_bit and sorted(colors) == black_white:
            one = 255 if 255 in self.table.values else 1  # as in a PNG of one bit
            self.levels = np.array([one if color[0] else 0 for color in colors], np.uint8)
            self.palette = None
        sample = self._sample()
        self._reading = Reading(self.table, self.path, sample, self.palette, self.lossy)
        if self._reading.by_colour or self._reading.soft:  # a photograph is refused here
            self._reading.indices(sample, strict=True)

    def _sample(self):
        """Pixels (1, K, 1 or 3) of a label map that have data, from some windows."""
        sample = []
        for top, left, height, width in looked_at(self.height, self.width):
            window = (top, top + height), (left, left + width)
            known = self.tiff.dataset_mask(window=window) > 0
            sample.append(self._cut(window)[:, known].T)
        return np.concatenate(sample)[None]

    def _scale_grey(self, deep):
        """Scales greys of fewer bits, or with white first, to levels from 0 to 255."""
        white_first = self.tiff.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
        most = 2 ** int(self.tiff.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8)) - 1
        if self.palette is None and not deep and (white_first or most < 255):
            levels = (np.arange(256).clip(0, most) * 255 / most).round().astype(np.uint8)
            self.levels = 255 - levels if white_first else levels

    def _choose_bands(self):
        """Chooses the bands of the TIFF to read; prints once if others are left out."""
        names = [color.name for color in self.tiff.colorinterp]
        there = [k for k, name in enumerate(names, 1) if name != "alpha"] or [1]
        flags, masks = opening.gdal().enums.MaskFlags, self.tiff.mask_flag_enums
        self._has_mask = not all(flags.all_valid in kinds for kinds in masks)
        # GDAL counts alpha as the second band or the fourth only, and other masks instead of it
        self._alphas = [] if self._has_mask else [k for k in self.tiff.indexes if k not in there]
        if (self._alphas or any(flags.alpha in kinds for kinds in masks)) and not self.table:
            about = "where a band marked as alpha is 0, there is no data"
            print_once(f"{about} (else: {self._not_alpha()})")
        self._count_bands([1, 2, 3] if self.palette is not None else there)
        named = {"red", "green", "blue"} <= set(names)
        colours = self.dtype == "uint8" and (named or len(there) == 3)
        if self.table and len(there) > 1 and not colours:
            what = "a label map has one band of codes, or three of 8-bit colours"
            remedy = "rio stack x.tif --bidx 1 -o y.tif (or gdal_translate -b 1) writes one"
            raise UserError(f"{self.path}: has {len(there)} bands: {what}: {remedy}")
        self.chosen = there[:3] if len(there) >= 3 else there[:1]
        if named:
            self.chosen = [names.index(name) + 1 for name in ("red", "green", "blue")]
        if self.bands and self.palette is None:
            self.chosen = self.bands
        elif len(there) > len(self.chosen) and not self.table:
            about = f"these are read: {self.chosen} (--bands-A, --bands-B)"
            print_once(f"images have {len(there)} bands; {about}")

    def _not_alpha(self):
        """The command that makes alpha a band like the others."""
        names = [color.name.replace("alpha", "undefined") for color in self.tiff.colorinterp]
        return f"rio edit-info x.tif --colorinterp {','.join(names)}"

    def _cut(self, window):
        bands = [self.tiff.read(band, window=window) for band in self.chosen]  # of several types
        pixels = np.stack(bands, dtype=self.dtype)
        return pixels if self.levels is None else self.levels[pixels]

    def _read_tiff(self, top, left, bottom, right):
        pixels = np.moveaxis(self._cut(((top, bottom), (left, right))), 0, -1)  # (H, W, C)
        if not self.table and self.palette is not None:
            return self._picked(self.palette[pixels[..., 0]])
        if not self.table:
            grey = pixels.shape[-1] == 1 and not self.bands
            return np.repeat(pixels, 3, 2) if grey else np.ascontiguousarray(pixels)
        nothing = self.tiff.nodata
        if self._reading.by_codes and nothing is not None and nothing not in self.table.values:
            pixels = np.where(pixels == nothing, np.int64(self.table.unused), pixels)
        return self._reading.indices(pixels, self.valid(top, left, *pixels.shape[:2]))

    @functools.cached_property
    def lossy(self):
        return bool(self.tiff) and opening.is_lossy(self.tiff)

    @functools.cached_property
    def place(self):
        """(CRS or None, transform of pixels to coordinates); None without a place on earth."""
        if not self.tiff:
            return None
        (gcps, crs), to_place = self.tiff.gcps, self.tiff.transform
        if gcps:
            to_place = opening.gdal().transform.from_gcps(gcps)
        nowhere = to_place.is_identity or to_place.is_degenerate
        return None if nowhere else (crs or self.tiff.crs, to_place)

    def _lacks_data(self):
        """Whether some pixels of a TIFF may have no data."""
        if self.table and self._reading.by_codes and self.counts_nodata(self.table):
            return False
        floats = np.dtype(self.dtype).kind == "f" and not self.table
        return bool(self._has_mask or self._alphas or self._clear or floats)

    def counts_nodata(self, table):
        """Whether a TIFF has no mask, and a no-data value that is a class; in a PNG it is none."""
        per_dataset = opening.gdal().enums.MaskFlags.per_dataset
        has_mask = any(per_dataset in kinds for kinds in self.tiff.mask_flag_enums)
        return self.tiff.driver != "PNG" and self.tiff.nodata in table.values and not has_mask

    def valid(self, top, left, height, width):
        """Where a window has data: (height, width) bool.

        GDAL's mask of the bands that are read decides. In a picture of more than 8 bits the no-data
        value in one of them is enough, unless it is 0, which a dark pixel may have.
        """
        if not self.masked:
            return np.ones((height, width), bool)
        if not self.tiff:
            self.values()  # decodes the file
            return self._alpha[top : top + height, left : left + width] > 0
        window = (top, top + height), (left, left + width)
        with opening.decoding(self.path):
            masks = self.tiff.read_masks(self.chosen, window=window) > 0
            deep = self.dtype != "uint8" and not self.table
            alone = [deep and bool(self.tiff.nodatavals[k - 1]) for k in self.chosen]
            valid = masks.any(0) & masks[alone].all(0)
            for band in self._alphas:
                valid &= self.tiff.read(band, window=window) > 0
            if self._clear:
                valid &= ~np.isin(self.tiff.read(1, window=window), self._clear)
        if self.table or np.dtype(self.dtype).kind != "f":
            return valid
        return valid & np.isfinite(self.values(top, left, height, width)).all(-1)

    def alpha(self):
        """The opacity of every pixel, (H, W) uint8: of a TIFF 0 without data, else 255."""
        valid = self.valid(0, 0, self.height, self.width)
        return valid * np.uint8(255) if self._alpha is None else self._alpha
