"""Writing files whole or not at all; reserving a run folder."""

import contextlib
import os
import secrets
import shutil
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout
from PIL import Image

from support.errors import UserError, speaks

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".jp2", ".img"}
ARRAY_SUFFIXES = {".npy", ".npz"}
TIFF_SUFFIXES = {".tif", ".tiff"}
UNFINISHED = ".unfinished-"  # prefix of the name of each file that is being written
LOCKS = []  # of the run folders that this process has reserved


def lock(folder):
    """Reserves a run folder for this process until it ends; refuses one that is reserved."""
    if not speaks():
        return
    try:
        path = Path(folder).absolute() / ".lock"
        LOCKS.append(FileLock(path).acquire(timeout=0).lock)
    except Timeout:
        who = f"another process has locked {path}; if none runs on any machine, remove it"
        raise UserError(f"--out {folder}: is in use: {who}") from None


def unlock():
    """Releases the run folders of this process, and removes those of runs that failed at once."""
    while LOCKS:
        reserved = LOCKS.pop()
        reserved.release()
        path = Path(reserved.lock_file)
        with contextlib.suppress(OSError):  # the folder may be gone
            worthless = {path, path.with_name("config.json")}
            if worthless.issuperset(path.parent.iterdir()):
                for file in worthless:  # on Windows its release removes the lock
                    file.unlink(missing_ok=True)
                path.parent.rmdir()


@contextlib.contextmanager
def whole_or_absent(path):
    """Yields the name of a new file, which replaces path in the end; after an error it is removed.

    A new folder may be made in the same way. The name has path's ending and a random part, which no
    other process or user chooses. Missing folders are made. An OSError names path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{UNFINISHED}{secrets.token_hex(8)}{path.suffix}")
    try:
        yield aside
        # on Windows a virus scanner may have one of the two open
        for seconds in (0.1, 1, 9) if sys.platform == "win32" else ():
            with contextlib.suppress(PermissionError):
                return os.replace(aside, path)
            time.sleep(seconds)
        os.replace(aside, path)
    except OSError as error:
        if error.filename in (None, str(aside)):
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # on Windows an error may still map it
            aside.unlink(missing_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # of a folder


def remove_unfinished(folder, age=86400):
    """Removes what a killed process left unfinished, at least `age` seconds old."""
    for path in Path(folder).glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):  # a folder, or removed by another process
            if time.time() - path.lstat().st_mtime >= age:
                shutil.rmtree(path) if path.is_dir() and age > 0 else path.unlink()


def write_text(path, text):
    """Writes a text file, whole or absent."""
    with whole_or_absent(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


def write_image(path, image, colours=None):
    """Writes (H, W, 3) or (H, W) uint8, or a Pillow image: JPEG at quality 95, others lossless.

    colours  its ICC profile, or None
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with whole_or_absent(path) as aside:
        how = {"quality": 95, "subsampling": 0, "lossless": True, "exact": True}  # JPEG; WebP
        picture.save(aside, **how, icc_profile=colours)
