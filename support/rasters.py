"""Pictures and label maps on disk, read and written by windows."""

import contextlib
import functools
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from support.classes import IGNORED
from support.errors import UserError, say_once
from support.files import ARRAY_SUFFIXES, TIFF_SUFFIXES, whole_or_absent, write_image
from support.pictures import mirrored, paste


@contextlib.contextmanager
def _decoding(path):
    """Turns whatever a decoder raises into one line that names the file."""
    Image.MAX_IMAGE_PIXELS = None  # rasters are large on purpose
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path}: claims more pixels than memory can hold") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # Pillow and numpy raise a dozen kinds, as files differ
        raise UserError(
            f"{path}: cannot be decoded ({error}): replace or remove the file"
        ) from None


@functools.cache
def _rasterio():
    """rasterio, with a bounded cache, and quiet about TIFFs that have no place on earth."""
    os.environ.setdefault("GDAL_CACHEMAX", "256")  # MB of decoded blocks
    import rasterio

    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    return rasterio


class Raster:
    """A picture on disk, or with a ClassTable a label map, that is read by windows.

    Label maps are array files, or images of indices, of code values or of class colours. A TIFF
    of any size is read piece by piece; other files lie in memory from the first window on, and
    may have 2^28 pixels (16384 x 16384). Photographs are turned upright as EXIF says.

    height, width  in pixels
    tiff           rasterio's dataset, else None
    """

    def __init__(self, path, table=None):
        self.path, self.table, self.tiff, self._whole = Path(path), table, None, None
        with _decoding(path):
            if self.path.suffix.lower() in TIFF_SUFFIXES:
                self._open_tiff()
            elif self.path.suffix.lower() in ARRAY_SUFFIXES:
                sides = list(_load_array(path, mmap_mode="r").shape)
                while len(sides) > 2:  # one-hot, or an axis of length 1
                    sides.pop(-1 if sides[-1] in (1, len(table), len(table.entries)) else 0)
                self.height, self.width = sides
            else:
                with Image.open(path) as image:
                    sides = image.size[::-1]
                    sideways = _orientation(image) >= 5
                self.height, self.width = sides[::-1] if sideways else sides
            if not self.tiff and self.height * self.width > 2**28:
                remedy = f"gdal_translate {self.path.name} {self.path.stem}.tif"
                what = f"{self.width}x{self.height} pixels are too many for its format: {remedy}"
                raise UserError(f"{path}: {what}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.tiff:
            self.tiff.close()

    def read(self, top=0, left=0, height=None, width=None):
        """A window, or as much of it as there is: (H, W, 3) uint8, or (H, W) class indices."""
        bottom = self.height if height is None else min(top + height, self.height)
        right = self.width if width is None else min(left + width, self.width)
        with _decoding(self.path):
            if self.tiff:
                return self._read_tiff(top, left, bottom, right)
            if self._whole is None:
                self._whole = self._read_labels() if self.table else self._read_picture()
            return self._whole[top:bottom, left:right]

    def padded(self, top, left, height, width):
        """A window (height, width, ...), mirrored at the edges of the raster."""
        return mirrored(self.read(top, left, height, width), height, width)

    def _read_picture(self):
        with Image.open(self.path) as image:
            if image.mode.startswith(("I", "F")) or ";16" in str(image.tile):
                remedy = "convert it to 8 bits, with limits of your choice"
                raise UserError(f"{self.path}: has more than 8 bits a channel: {remedy}")
            if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBA", "LA", "PA"):
                say_once(f"images are {image.mode}: converted to RGB, without any transparency")
            turn = _TURNS.get(_orientation(image))
            rgb = image.convert("RGB")
            return np.asarray(rgb.transpose(Image.Transpose[turn]) if turn else rgb)

    def _read_labels(self):
        table, path = self.table, self.path
        if path.suffix.lower() in ARRAY_SUFFIXES:
            array = _load_array(path)
            if array.ndim == 3 and 1 not in (array.shape[0], array.shape[-1]):
                return table.from_one_hot(array, path)
            codes = array.astype(np.int64)
            if not (array == codes).all():
                raise UserError(f"{path}: holds fractions, which are no class indices")
            return table.from_codes(codes.reshape(self.height, self.width), path)
        with Image.open(path) as image:
            if image.mode == "P" and _palette_is_of(np.asarray(image.convert("RGB")), table):
                return table.from_colours(np.asarray(image.convert("RGB")), path, False)
            if image.mode in ("P", "1", "L", "I", "I;16", "I;16B", "I;16L"):
                return table.from_codes(np.asarray(image).astype(np.int64), path)
            lossy = table.nearest or image.format in ("JPEG", "WEBP")
            return table.from_colours(np.asarray(image.convert("RGB")), path, lossy)

    def _open_tiff(self):
        if not self.path.is_file():
            raise FileNotFoundError
        self.tiff = _rasterio().open(self.path)
        self.height, self.width, kinds = self.tiff.height, self.tiff.width, self.tiff.dtypes
        integers = self.tiff.count == 1 and kinds[0].strip("u").startswith("int")
        if set(kinds) != {"uint8"} and not (self.table and integers):
            scale = "" if self.table else " -scale LOW HIGH 0 255"
            remedy = f"gdal_translate -ot Byte{scale} {self.path.name} {self.path.stem}_8bit.tif"
            raise UserError(f"{self.path}: holds {kinds[0]} values, not 8 bits a channel: {remedy}")
        if self.tiff.count not in (1, 3) and not self.table:
            which = "first three are taken as RGB" if self.tiff.count > 3 else "first counts"
            say_once(f"images have {self.tiff.count} bands: the {which}")
        self._palette, lossy = None, str(self.tiff.compression) == "Compression.jpeg"
        self._nearest = lossy or bool(self.table and self.table.nearest)
        if self.tiff.count == 1 and self.tiff.colorinterp[0].name == "palette":
            colors = self.tiff.colormap(1)
            self._palette = np.array([colors.get(k, (0, 0, 0))[:3] for k in range(256)], np.uint8)
        if self.table and (self._palette is not None or self.tiff.count >= 3):
            top, left = max(0, self.height // 2 - 512), max(0, self.width // 2 - 512)
            bottom, right = min(top + 1024, self.height), min(left + 1024, self.width)
            middle = self._cut(top, left, bottom, right)
            if self._palette is None:  # a photograph is refused here
                self.table.from_colours(np.moveaxis(middle, 0, -1), self.path, self._nearest)
            elif not _palette_is_of(self._palette[middle[0]], self.table):
                self._palette = None  # its numbers are what counts

    def _cut(self, top, left, bottom, right):
        bands = (1, 2, 3) if self.tiff.count >= 3 else (1,)
        return self.tiff.read(bands, window=((top, bottom), (left, right)))

    def _read_tiff(self, top, left, bottom, right):
        bands = self._cut(top, left, bottom, right)  # (1 or 3, H, W)
        if self._palette is not None:
            bands = np.moveaxis(self._palette[bands[0]], -1, 0)
        pixels = np.moveaxis(bands, 0, -1)  # (H, W, 1 or 3)
        if not self.table:
            return np.repeat(pixels, 3, 2) if len(bands) == 1 else np.ascontiguousarray(pixels)
        if len(bands) == 3:
            indices = self.table.from_colours(pixels, self.path, self._nearest, strict=False)
        else:
            codes, nothing = bands[0].astype(np.int64), self.tiff.nodata
            if nothing is not None and nothing not in {value for value, _, _ in self.table.entries}:
                codes[codes == nothing] = IGNORED
            indices = self.table.from_codes(codes, self.path)
        if self.masked and (len(bands) == 3 or self.tiff.nodata is None):
            valid = self.valid(top, left, *indices.shape)
            indices = np.where(valid, indices, np.uint8(IGNORED))
        return indices

    @functools.cached_property
    def masked(self):
        """Whether some pixels of a TIFF may hold no data."""
        flags = self.tiff.mask_flag_enums if self.tiff else []
        return not all("all_valid" in (flag.name for flag in band) for band in flags)

    def valid(self, top, left, height, width):
        """Where a window holds data, (height, width) bool; None where every pixel does."""
        if not self.masked:
            return None
        window = (top, top + height), (left, left + width)
        return self.tiff.dataset_mask(window=window) > 0


# EXIF's orientations 2 to 8: how to turn a photograph upright
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_TURNS = dict(enumerate(_TURNS.split(), 2))


def _orientation(image):
    """EXIF's orientation of an open image, 1 to 8; cameras write it in JPEG files."""
    return image.getexif().get(274, 1) if image.format in ("JPEG", "MPO", "WEBP") else 1


def _load_array(path, **how):
    """The array of a .npy file, or the first one of a .npz file."""
    array = np.load(path, **how)
    array = array[array.files[0]] if isinstance(array, np.lib.npyio.NpzFile) else array
    if array.ndim not in (2, 3):
        what = "(H, W), or one-hot (H, W, C) or (C, H, W) is needed"
        raise UserError(f"{path}: holds an array of shape {array.shape}: {what}")
    return array


def _palette_is_of(rgb, table):
    """Whether most of the colours that a palette image (H, W, 3) uses are the class table's."""
    used = np.unique(rgb.reshape(-1, 3), axis=0)
    known = {color for _, color, _ in table.entries}
    return 2 * len(known & set(map(tuple, used.tolist()))) > len(used)


def writing(path, source, classes=None):
    """A context that gives put(pixels, top, left=0): a new picture of a Raster's size, by windows.

    With a ClassTable pixels are (H, W) class indices, and the file gets its colours, else they
    are (H, W, 3) uint8. A TIFF from a TIFF keeps its place on earth, and no data stays no data;
    other files lie in memory till the end. It appears under its name when it is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    by_windows = source.tiff and path.suffix.lower() in TIFF_SUFFIXES
    return (_writing_tiff if by_windows else _writing_whole)(path, source, classes)


@contextlib.contextmanager
def _writing_whole(path, source, classes):
    whole = np.zeros((source.height, source.width, *(() if classes else (3,))), np.uint8)
    yield functools.partial(paste, whole)
    if not classes:
        write_image(path, whole)
        return
    image = Image.fromarray(whole)  # indices, which the scripts read again, and colours to look at
    image.putpalette(classes.palette.tobytes())
    write_image(path.with_suffix(".png"), image)
    write_image(path.with_name(f"{path.stem}_colours.png"), classes.palette[whole])


@contextlib.contextmanager
def _writing_tiff(path, source, classes):
    given = IGNORED if classes else source.tiff.nodata
    nothing = int(given) if given is not None and 0 <= given <= 255 else None  # else: a mask
    profile = {"height": source.height, "width": source.width, "count": 1 if classes else 3}
    profile |= {"driver": "GTiff", "dtype": "uint8", "nodata": nothing, "bigtiff": "if_safer"}
    profile |= {"compress": "deflate", "tiled": True, "blockxsize": 256, "blockysize": 256}
    gcps, crs = source.tiff.gcps
    if gcps:
        profile |= {"gcps": gcps, "crs": crs}
    elif not source.tiff.transform.is_identity:
        profile |= {"crs": source.tiff.crs, "transform": source.tiff.transform}

    def put(pixels, top, left=0):
        height, width = pixels.shape[:2]
        window = (top, top + height), (left, left + width)
        valid = source.valid(top, left, height, width)
        bands = pixels[None] if classes else np.moveaxis(pixels, -1, 0)
        if valid is not None and nothing is None:
            target.write_mask(valid, window=window)
        elif valid is not None:
            if not classes:  # what was painted must not look like nothing
                bands = np.where((bands == nothing).all(0), abs(nothing - 1), bands)
            bands = np.where(valid, bands, nothing).astype(np.uint8)
        target.write(bands, window=window)

    try:
        with whole_or_absent(path) as aside:
            with (
                _rasterio().Env(GDAL_TIFF_INTERNAL_MASK=True),
                _rasterio().open(aside, "w", **profile) as target,
            ):
                target.update_tags(**source.tiff.tags())
                if classes:
                    colors = enumerate(classes.palette.tolist())
                    target.write_colormap(1, {k: tuple(color) for k, color in colors})
                yield put
            # GDAL keeps quiet when it closes on a full disk
            with _rasterio().open(aside) as written:
                for top in range(0, source.height, 256):
                    written.read(window=((top, min(top + 256, source.height)), (0, source.width)))
    except _rasterio().errors.RasterioError as error:
        raise UserError(f"{path}: cannot be written ({error}): is the disk full?") from None
