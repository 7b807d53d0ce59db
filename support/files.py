"""Writing files: whole or absent, and a run folder that one process holds."""

import contextlib
import os
from pathlib import Path

from PIL import Image

from support.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}
ARRAY_SUFFIXES = {".npy", ".npz"}
TIFF_SUFFIXES = {".tif", ".tiff"}
LOSSY = {".jpg", ".jpeg", ".webp"}
LOCKS = []  # run folders that this process holds, as open files


def lock(folder):
    """Holds a run folder till the program ends, however it does; refuses one that is held."""
    if os.environ.get("RANK", "0") != "0":  # the first process of torchrun holds it for all
        return
    try:
        import fcntl
    except ImportError:  # Windows
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        what = "another process is training in it: wait, stop it, or choose another --out"
        raise UserError(f"--out {folder}: {what}") from None
    except OSError:  # a file system without locks
        os.close(handle)
        return
    LOCKS.append(handle)


@contextlib.contextmanager
def whole_or_absent(path):
    """Yields a name to write to, which becomes path at the end, or goes if that is not reached."""
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path, text):
    """Writes a text file aside, and renames: whole or absent."""
    with whole_or_absent(path) as aside:
        aside.write_text(text + "\n")


def write_image(path, image):
    """Writes (H, W, 3) or (H, W) uint8, or a Pillow image, aside, and renames: whole or absent.

    By the ending of path: JPEG at quality 95, else lossless; an unknown ending becomes .png.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        path, suffix = path.with_suffix(".png"), ".png"
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 95, "subsampling": 0} if suffix in (".jpg", ".jpeg") else {}
    if suffix == ".webp":
        options = {"lossless": True}
    with whole_or_absent(path) as aside:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        picture.save(aside, **options)
    return path
