"""Writing pictures and label maps by windows, georeferenced like their source."""

import base64
import contextlib
import functools
import itertools
import os
from pathlib import Path

import numpy as np
from PIL import Image

from support.classes import IGNORED
from support.errors import UserError
from support.files import TIFF_SUFFIXES, whole_or_absent, write_image
from support.opening import gdal
from support.pictures import paste


def writing(path, source, classes=None, bands=3, limits=None, edited=False):
    """A context that gives put(pixels, top, left=0): a new picture of a Raster's size, by windows.

    With a ClassTable pixels are (H, W) class indices, and the file gets its values and colours;
    else they are (H, W, bands) uint8, or of the type of Limits. A TIFF has the place on earth and
    the holes of its source; if that is edited, also its bands' names, units, scales and offsets,
    and, as every file, its ICC profile.
    Other files are written at the end, and have one band or three of 8 bits. The file appears when
    it is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)  # fails before anything is generated
    if path.suffix.lower() in TIFF_SUFFIXES:
        return _writing_tiff(path, source, classes, bands, limits, edited)
    return _writing_whole(path, source, classes, bands, edited)


def label_image(index, classes):
    """(H, W) class indices as a Pillow image of the table's values, with its colours."""
    image = Image.fromarray(classes.codes[index])
    if image.mode == "L":  # values of 8 bits
        image.putpalette(classes.code_palette.tobytes())
    return image


def _remove_beside(path):
    """Removes what GDAL has written about an earlier picture of this name, and would believe."""
    for ending in (".aux.xml", ".ovr", ".msk"):
        Path(f"{path}{ending}").unlink(missing_ok=True)


@contextlib.contextmanager
def _writing_whole(path, source, classes, bands, edited):
    size = source.height, source.width
    whole = np.zeros(size if classes else (*size, bands), np.uint8)
    yield functools.partial(paste, whole)
    if source.masked:
        alpha = source.alpha()
        if not edited:
            whole[alpha == 0] = IGNORED if classes else 0
    if classes:
        pictures = {path.with_suffix(".png"): label_image(whole, classes)}
        pictures[path.with_name(f"{path.stem}_colours.png")] = classes.palette[whole]
    else:
        if source.masked and path.suffix.lower() in (".png", ".webp"):
            whole = np.dstack([whole, alpha])
        pictures = {path: whole.squeeze(-1) if whole.shape[-1] == 1 else whole}
    for name, picture in pictures.items():
        write_image(name, picture, source.colours if edited else None)
        _remove_beside(name)


def _profile(source, classes, bands, limits):
    """rasterio's profile of a TIFF with the size and the place of a Raster."""
    dtype = classes.codes.dtype if classes else np.dtype(limits.dtype if limits else "uint8")
    kinds = itertools.chain(*source.tiff.mask_flag_enums) if source.tiff else ()
    by_value = source.masked and gdal().enums.MaskFlags.nodata in kinds  # and not by a mask
    values = [source.tiff.nodatavals[band - 1] for band in source.chosen] if by_value else [None]
    alike = len(set(map(str, values))) == 1  # NaN, too
    as_read = source.palette is None and source.levels is None  # else a level has another value
    nothing = values[0] if alike and as_read else None
    nothing = classes.unused if classes else nothing
    inside = limits and nothing is not None and min(limits.low) < nothing < max(limits.high)
    if inside and limits != source.limits:  # in other units a value like others: a mask instead
        nothing = None
    if nothing is not None:
        fits = not np.isinf(nothing) and gdal().dtypes.in_dtype_range(nothing, dtype)
        nothing = dtype.type(nothing).item() if fits else None  # else: a mask
    profile = {"height": source.height, "width": source.width, "count": 1 if classes else bands}
    if not classes and bands != 3:  # GDAL would call the fourth alpha
        profile["photometric"] = "MINISBLACK"
    profile |= {"driver": "GTiff", "dtype": dtype, "nodata": nothing, "bigtiff": "if_safer"}
    profile |= {"compress": "deflate", "tiled": True, "blockxsize": 256, "blockysize": 256}
    if not source.tiff:
        return profile
    tiff, (gcps, crs) = source.tiff, source.tiff.gcps
    if gcps:
        return profile | {"gcps": gcps, "crs": crs or gdal().CRS()}
    if not tiff.transform.is_identity:
        profile["transform"] = tiff.transform
    return profile | {"crs": crs or tiff.crs, "rpcs": tiff.rpcs}


def _read_through(path, **overview):
    """Reads a TIFF, or one of its overviews, with its mask; returns the number of overviews."""
    with gdal().open(path, driver="GTiff", **overview) as written:
        for _, window in written.block_windows():
            written.read(window=window, masked=True)
        return len(written.overviews(1))


def _unlike(nothing, layers):
    """Generated bands (C, H, W) in which no pixel looks like no data to Raster.valid."""
    step = (abs(nothing) * 1e-5 or 1e-30) if layers.dtype.kind == "f" else 1
    other = nothing - step if nothing > 0 else nothing + step
    same = layers == nothing
    if layers.dtype == np.uint8 or nothing == 0:  # one band with this value is not enough
        same = same.all(0)
    return np.where(same, other, layers)


def _describe(target, source, bands):
    """Gives an edited TIFF the profile of its source, and the names, units, ... of its bands."""
    if source.colours:
        colours = base64.b64encode(source.colours).decode()
        target.update_tags(ns="COLOR_PROFILE", SOURCE_ICC_PROFILE=colours)
    if not source.tiff:
        return
    if len(source.chosen) == bands:  # not of a grey that becomes red, green, blue
        target.update_tags(ns="COLOR_PROFILE", **source.tiff.tags(ns="COLOR_PROFILE"))
    for about in ("descriptions", "units", "scales", "offsets"):
        values = [getattr(source.tiff, about)[k - 1] for k in source.chosen]
        setattr(target, about, (values * bands)[:bands])  # grey is read thrice


def _name_classes(target, classes):
    """Gives a TIFF of land cover the names and the colours of its values."""
    for name, value in zip(classes.names, classes.codes, strict=False):
        target.update_tags(1, **{f"class_{value}": name})
    target.write_colormap(1, dict(enumerate(classes.code_palette)))


@contextlib.contextmanager
def _writing_tiff(path, source, classes, bands, limits, edited):
    profile = _profile(source, classes, bands, limits)
    nothing, tags = profile["nodata"], source.tiff.tags() if source.tiff else {}
    if not edited:  # other tags may describe values that are translated
        tags = {name: tags[name] for name in tags if name == "AREA_OR_POINT"}
    tags.pop("NODATA_VALUES", None)  # GDAL would believe it, and not the mask
    if "gcps" in profile:  # GDAL would move them by a pixel where they lie in pixels' middles
        tags.pop("AREA_OR_POINT", None)

    def put(pixels, top, left=0):
        height, width = pixels.shape[:2]
        window = (top, top + height), (left, left + width)
        valid = source.valid(top, left, height, width)
        layers = classes.codes[pixels][None] if classes else np.moveaxis(pixels, -1, 0)
        if source.masked and nothing is None:
            target.write_mask(valid, window=window)
        elif source.masked:
            if not classes:
                layers = _unlike(nothing, layers)
            holes = nothing
            if edited and profile["dtype"] == source.dtype != "uint8":  # other bands have values
                holes = np.moveaxis(source.values(top, left, height, width), -1, 0)
            layers = np.where(valid, layers, holes).astype(profile["dtype"])
        target.write(layers, window=window)

    try:
        with whole_or_absent(path) as aside:
            with (
                gdal().Env(GDAL_TIFF_INTERNAL_MASK=True),
                gdal().open(aside, "w", **profile) as target,
            ):
                target.update_tags(**tags)
                if edited:
                    _describe(target, source, bands)
                if classes:
                    _name_classes(target, classes)
                yield put
                if max(target.shape) > 4096:  # with overviews a GIS opens it at once
                    how = gdal().enums.Resampling["nearest" if classes else "average"]
                    halvings = range(1, (max(target.shape) // 256).bit_length())
                    target.build_overviews([2**k for k in halvings], how)
            # GDAL reports no error when it closes a file on a full disk
            for level in range(_read_through(aside)):
                _read_through(aside, overview_level=level)
            _remove_beside(path)
            beside = Path(f"{aside}.aux.xml")  # of GDAL: a CRS that a TIFF cannot hold
            if beside.is_file():
                os.replace(beside, f"{path}.aux.xml")
    except gdal().errors.RasterioError as error:
        raise UserError(f"{path}: cannot be written ({error}): is the disk full?") from None
