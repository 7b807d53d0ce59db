"""Opening image files; their ending chooses the driver.

GDAL and Pillow choose a driver by content. Some drivers open further files, reach the network,
write, or run programs, so a text file named scene.tif could do all of that.
"""

import contextlib
import functools
import os
import re
import threading
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from support.batches import some_of
from support.errors import UserError, print_once
from support.files import ARRAY_SUFFIXES, IMAGE_SUFFIXES

NAMED = {".gif", ".vrt", ".gpkg"}  # read where a user names them, not as part of a folder
READABLE = IMAGE_SUFFIXES | ARRAY_SUFFIXES | NAMED
UPLOADS = READABLE - NAMED - {".bmp", ".jp2", ".img"}  # that strangers may send
DRIVERS = {".tif": "GTiff", ".tiff": "GTiff", ".vrt": "VRT"}
DRIVERS |= {".jp2": "JP2OpenJPEG", ".img": "HFA", ".gpkg": "GPKG"}
# by GDAL where they have a place on earth
PLACED = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
CACHED_MB = 256  # of decoded blocks of rasters
_NUMPY = threading.Lock()
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_VRT_PARTS = """VRTDataset SRS GeoTransform GCPList GCP Metadata MDI BlockXSize BlockYSize
    VRTRasterBand Offset Scale UnitType Description CategoryNames Category ColorInterp ColorTable
    Entry MaskBand NoDataValue NODATA HideNoDataValue SimpleSource ComplexSource SourceFilename
    SourceBand SourceProperties SrcRect DstRect UseMaskBand"""

_VRT_REMARKS = "Histograms", "GDALRasterAttributeTable", "OverviewList", "Overview"


@contextlib.contextmanager
def decoding(path):
    """Turns an error of a decoder into a UserError that names the file."""
    Image.MAX_IMAGE_PIXELS = None  # rasters are large on purpose
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path}: has more pixels than fit in memory") from None
    except Exception as error:  # Pillow and numpy raise a dozen kinds, as files differ
        raise UserError(f"{path}: cannot be decoded ({error}): replace or remove it") from None


def check_ending(path, endings):
    """Refuses a path that is no file, or has none of these endings."""
    if not path.is_file():
        what = "is no file, but a folder or a pipe" if path.exists() else "no such file"
        raise UserError(f"{path}: {what}")
    if path.suffix.lower() not in endings:
        raise UserError(f"{path}: cannot be decoded: known endings are {' '.join(sorted(endings))}")


def open_image(path):
    """The Pillow image of a file."""
    return Image.open(path, formats=FORMATS)


@functools.cache
def gdal():
    """rasterio, with a bounded cache, and without warnings of no georeference or of two masks."""
    os.environ.setdefault("GDAL_CACHEMAX", str(CACHED_MB))
    os.environ["GDAL_DISABLE_READDIR_ON_OPEN"] = "TRUE"  # files beside a TIFF: see _check_files
    import rasterio.warp

    for kind in ("NotGeoreferencedWarning", "NodataShadowWarning"):
        warnings.filterwarnings("ignore", category=getattr(rasterio.errors, kind))
    version = rasterio.__gdal_version__
    if tuple(map(int, version.split(".")[:2])) < (3, 10):
        about = "reads colours of some palettes wrongly, and loses colour profiles"
        print_once(f"GDAL {version} {about}: pip install 'rasterio>=1.4.4'")
    return rasterio


def driver_of(path):
    """GDAL's driver for a file; None for files without a place on earth, which Pillow opens."""
    suffix = path.suffix.lower()
    if suffix not in PLACED:
        return DRIVERS.get(suffix)
    for ending in (f".{suffix[1]}{suffix[-1]}w", f"{suffix}w", ".wld"):  # x.pgw, x.pngw, x.wld
        beside = path.with_suffix(ending), path.with_suffix(ending.upper())
        if any(map(os.path.isfile, beside)):  # False, too, for a name that is too long
            return PLACED[suffix]
    about = Path(f"{path}.aux.xml")
    content = about.read_bytes() if os.path.isfile(about) else b""
    return PLACED[suffix] if re.search(b"<(GeoTransform|GCPList|SRS)", content) else None


def png_depth(path):
    """The bits of a PNG's samples; 8 for other files. Pillow gives 8 for each PNG."""
    start = _start(path, 25)  # the signature, and the header's size and depth
    return start[24] if start[:8] == b"\x89PNG\r\n\x1a\n" and len(start) == 25 else 8


def open_tiff(path, driver):
    """rasterio's dataset of a TIFF, of a VRT that joins TIFFs, or of another file with a place."""
    if driver == "VRT":
        return gdal().open(_joined_tiffs(path), driver=driver)
    _check_files(path)
    return gdal().open(path.absolute(), driver=driver)


def is_lossy(tiff):
    """Whether the compression of a dataset, or of TIFFs that a VRT joins, changes colours."""
    if tiff.driver == "VRT":
        joined = [file for file in tiff.files if file.lower().endswith((".tif", ".tiff"))]
        for file in some_of(joined, 100):
            with open_tiff(Path(file), "GTiff") as part:
                if is_lossy(part):
                    return True
    about = tiff.tags(ns="IMAGE_STRUCTURE")
    guess = "LOSSY" if about.get("COMPRESSION", "").endswith(("JPEG", "WEBP")) else ""
    return about.get("COMPRESSION_REVERSIBILITY", guess) == "LOSSY"


def _check_files(path, *parts):
    """Refuses parts, and masks and overviews beside path, that are no TIFFs: GDAL opens them.

    It also opens files such as path.aux that begin like those of ERDAS Imagine.
    """
    beside = [f"{path}{ending}" for ending in (".msk", ".MSK", ".ovr", ".OVR")]
    beside = [*filter(os.path.isfile, beside)]  # False, too, for too long a name
    for file in [*parts, *beside]:
        if _start(file, 4) not in _TIFF_STARTS:
            raise UserError(f"{file}: cannot be decoded: it is not a TIFF")
    names = [str(path), *beside]
    names += [os.path.splitext(name)[0] for name in names]
    for file in (f"{name}{ending}" for name in names for ending in (".aux", ".AUX")):
        start = _start(file, 16) if os.path.isfile(file) else b""
        if start.upper().startswith(b"EHFA_HEADER_TAG") and start != b"EHFA_HEADER_TAG\0":
            raise UserError(f"{file}: is not of ERDAS Imagine: remove it")


def _start(file, count):
    with open(file, "rb") as opened:
        return opened.read(count)


def _joined_tiffs(path):
    """The XML of a VRT file, with absolute names; refuses all but TIFFs joined without scaling."""
    root = ElementTree.fromstring(path.read_bytes())
    for owner in (root, *root.findall("VRTRasterBand")):  # without what says nothing about pixels
        owner[:] = [part for part in owner if part.tag not in _VRT_REMARKS]
    for part in root.iter():
        if part.tag not in _VRT_PARTS.split() or "subclass" in str(part.attrib).lower():
            raise UserError(f"{path}: has {part.tag} {part.attrib}: a VRT may only join TIFFs")
        if part.tag in ("SimpleSource", "ComplexSource"):
            rectangles = part.find("SrcRect"), part.find("DstRect")
            sides = [(float(r.get("xSize")), float(r.get("ySize"))) for r in rectangles]
            if sides[0] != sides[1]:  # GDAL would look for overviews, and open them by content
                raise UserError(f"{path}: scales the TIFFs that it joins: write it as one TIFF")
        if part.tag == "SourceFilename":
            folder = path.parent if part.get("relativeToVRT") == "1" else Path()
            source = (folder / part.text).absolute()
            _check_files(source, source)
            part.text, part.attrib = str(source), {"relativeToVRT": "0"}
    return ElementTree.tostring(root, "unicode")


def open_array(path, most):
    """The array of a .npy file, or the first one of a .npz file, of at most `most` bytes.

    NumPy parses headers with `ast`, which CPython 3.11 cannot do in two threads at once.
    """
    with _NUMPY:
        array = np.load(path, mmap_mode="r")
        if isinstance(array, np.ndarray):
            return array
        with array:
            if max(part.file_size for part in array.zip.infolist()) > most:
                raise MemoryError
            return array[array.files[0]]


# EXIF's orientations 2 to 8: the turn that makes a photograph upright
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURNS = dict(enumerate(TURNS.split(), 2))


def orientation(image):
    """EXIF's orientation of an open image, 1 to 8; 1 in formats without EXIF."""
    known = {"exif", "Raw profile type exif"} & image.info.keys()  # else Pillow decodes a PNG
    return image.getexif().get(274, 1) if known else 1
