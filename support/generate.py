"""--generate and --serve: pictures translated, photographs edited."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

from support.edits import PhotoEdit
from support.errors import UserError
from support.files import IMAGE_SUFFIXES, TIFF_SUFFIXES, write_image, write_text
from support.layouts import image_files
from support.pictures import as_array, as_tensor, from_bytes, paste, save_grid
from support.rasters import Raster, writing
from support.serve import edits, translations
from support.windows import blended, network_input, say_windows, shared_statistics, window_of


def inputs_of(cfg, labels=False):
    """The files that --generate names: one, or the images of a folder."""
    path = Path(cfg.generate)
    if not path.exists():
        raise UserError(f"--generate {path}: no such file or directory")
    files = image_files(path, labels) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--generate {path}: no images in it")
    return files


def results_of(path, to_labels=False):
    """The names of what is generated from a file: its own, or .png where that cannot be written."""
    if path.suffix.lower() == ".vrt":
        path = path.with_suffix(".tif")
    if to_labels and path.suffix.lower() not in TIFF_SUFFIXES:
        return [f"{path.stem}.png", f"{path.stem}_colours.png"]
    return [path.name if path.suffix.lower() in IMAGE_SUFFIXES else f"{path.stem}.png"]


def claim_names(cfg, names):
    """Refuses to write over anything in --out but what the same command has written there.

    A hidden file beside that folder holds which command that was, for each name.
    """
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"--generate {cfg.generate}: two results would be called {twice[0]}")
    options = dataclasses.asdict(dataclasses.replace(cfg, out="", cache="", device="auto"))
    command = hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:16]
    out, written = Path(cfg.out).resolve(), {}
    if out.is_file():
        raise UserError(f"--out {cfg.out}: is a file, not a folder")
    log = out.with_name(f".{out.name}.generated.json")
    with contextlib.suppress(OSError, ValueError):  # none yet, or a damaged one
        written = json.loads(log.read_text())
    for name in names:
        path = Path(cfg.out) / name
        if path.exists() and written.get(name) != command:
            raise UserError(f"{path} exists and would be written over: choose another --out")
    for aside in out.glob(".*-*") if out.is_dir() else ():  # of a process that was killed
        if re.sub(r"^\.\d+-", "", aside.name) in names:
            aside.unlink()
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):
        write_text(log, json.dumps(written | dict.fromkeys(names, command), indent=1))


def edit_of_files(cfg):
    """The PhotoEdit that --generate, --lc, --lc-before and --paint ask for."""
    path = inputs_of(cfg)[0]
    if Path(cfg.generate).is_dir():
        what = "an edit takes one photograph, not a folder"
        raise UserError(f"--generate {cfg.generate}: {what}")
    if not cfg.lc:
        what = "the photograph's land cover (edited, or to be edited by --paint)"
        raise UserError(f"--generate needs --lc FILE, {what}")
    photo = Raster(path)
    maps = [Raster(file, cfg.classes) for file in (cfg.lc, cfg.lc_before) if file]
    for labels in maps:
        if (labels.height, labels.width) != (photo.height, photo.width):
            size = f"{labels.width}x{labels.height}"
            other = f"{path} is {photo.width}x{photo.height}"
            raise UserError(f"{labels.path} is {size} but {other}: sizes must agree")
        a, b = labels.tiff, photo.tiff
        if a and b and a.crs and b.crs and (a.crs, a.transform) != (b.crs, b.transform):
            raise UserError(f"{labels.path} lies elsewhere than {path}: another CRS or transform")
    if cfg.erase and not (cfg.lc_before or cfg.paint):
        remedy = "pass --lc-before FILE or --paint, or train with --no-erase"
        raise UserError(f"--generate must know what changed: {remedy}")
    strokes = [_stroke(text, cfg.classes, photo.height, photo.width) for text in cfg.paint]
    return PhotoEdit(cfg, photo, *maps, strokes=strokes)


def _stroke(text, classes, height, width):
    """A "class:x,y,width,height" as (index, top, left, bottom, right). Of a class the beginning of
    its name is enough, where no other begins so.
    """
    name, _, numbers = text.rpartition(":")
    names = [known.lower() for known in classes.names]
    meant = [known for known in names if known.startswith(name.lower())]
    meant = [name.lower()] if name.lower() in names else meant
    try:
        x, y, wide, tall = (int(number) for number in numbers.split(","))
    except ValueError:
        raise UserError(f"--paint {text}: write class:x,y,width,height, in pixels") from None
    if len(meant) != 1:
        known, what = ", ".join(classes.names), "several begin so" if meant else "no such class"
        raise UserError(f"--paint {text}: {what}; there are {known}")
    if min(wide, tall, x + wide, y + tall) <= 0 or x >= width or y >= height:
        raise UserError(f"--paint {text}: lies outside the image, {width}x{height} pixels")
    return names.index(meant[0]), max(y, 0), max(x, 0), y + tall, x + wide


def _view(regions, size, most=1024):
    """What a sheet shows: all, or of a large raster the surroundings of the largest edit."""
    if max(size) <= most or not regions:
        return 0, 0, min(size[0], most), min(size[1], most)
    top, left, height, width = max(regions, key=lambda region: region[2] * region[3])
    corner = [
        max(0, min(first + length // 2 - most // 2, side - most))
        for first, length, side in ((top, height, size[0]), (left, width, size[1]))
    ]
    return *corner, min(most, size[0]), min(most, size[1])


def translate_files(cfg, predict, net=None, from_labels=False, to_labels=False):
    """--generate of pictures or label maps, at the scale of training, into --out.

    predict(windows (B, 3 or 1, S, S) uint8, whole)  -> pictures (B, 3, S, S) in [-1, 1], or scores
           of the classes (B, classes, S, S); whole: there is just one window
    net    the network, if it normalises by an image's own statistics
    """
    if cfg.serve:
        translations(cfg, predict, net, from_labels, to_labels)
        return
    files = inputs_of(cfg, labels=from_labels)
    claim_names(cfg, [name for path in files for name in results_of(path, to_labels)])
    for path in files:
        torch.manual_seed(cfg.seed)  # a picture does not depend on the others in its folder
        with Raster(path, cfg.classes if from_labels else None) as raster:
            window = window_of(cfg, raster)
            say_windows(cfg, raster, [(0, 0, raster.height, raster.width)], window)
            strips = blended(
                functools.partial(network_input, raster, cfg.size),
                functools.partial(predict, whole=not window),
                (raster.height, raster.width),
                window,
                shared_statistics(cfg, net),
                about=path.name,
            )
            with writing(Path(cfg.out) / path.name, raster, to_labels and cfg.classes) as put:
                for top, strip in strips:
                    if to_labels:
                        put(strip.argmax(0).byte().numpy(), top)
                    else:
                        put(as_array(strip[None]), top)
    print(f"{len(files)} image(s) written to {cfg.out}")


def edit_file(cfg, predict, net=None, samples=1):
    """--generate of an edit, at the scale of training, into --out, with a before/after sheet.

    Only windows around what changed are painted, and blended into the photograph over a border
    of 12 pixels in 256; elsewhere it stays as it is. With several samples also how they differ:
    their standard deviation, white at 32 levels.

    predict(windows (B, 5, S, S) uint8, sample)  -> (B, 3, S, S) in [-1, 1]; a window is the
           photograph, the land cover to be, and 1 where it changes
    net    the network, if it normalises by an image's own statistics
    """
    if cfg.serve:
        edits(cfg, predict, net)
        return
    edit = edit_of_files(cfg)
    photo, name, regions = edit.photo, edit.photo.path, edit.regions()
    names = results_of(name)
    if samples > 1:
        suffix = Path(names[0]).suffix
        names = [f"{name.stem}_{k}{suffix}" for k in range(1, samples + 1)]
    more = ["sheet", "differences"] if samples > 1 else ["sheet"]
    claim_names(cfg, names + [f"{name.stem}_{what}.png" for what in more])
    say_windows(cfg, photo, regions, edit.window)
    if not edit.told:
        hint = "--lc-before FILE would tell what changed"
        print(f"the whole photograph is regenerated: {hint}", file=sys.stderr)
    if not regions:
        print("the land cover is the same before and after: nothing changes", file=sys.stderr)
    view = _view(regions, edit.size)
    top, left, height, width = view
    pictures, answers = {"before": photo.read(*view)}, []
    if edit.told:
        pictures["land cover"] = cfg.classes.palette[edit.before(*view)]
    pictures["edited land cover"] = cfg.classes.palette[edit.after(*view)]
    for k, written in enumerate(names, 1):
        shown = pictures["before"].copy()
        with writing(Path(cfg.out) / written, photo) as put:
            for first in range(0, edit.size[0], 256):
                put(photo.read(first, 0, 256), first)
            for region in regions:
                for pixels, y, x in edit.generated(region, predict, net, sample=k):
                    put(pixels, y, x)
                    paste(shown, pixels, y - top, x - left)
        pictures[f"after {k}" if samples > 1 else "after"] = shown
        answers.append(shown.astype(np.float32))
    if samples > 1:
        spread = np.std(answers, 0).mean(-1, keepdims=True)
        differences = np.minimum(spread * 8, 255).astype(np.uint8).repeat(3, -1)
        pictures["where they differ"] = differences
        write_image(Path(cfg.out) / f"{name.stem}_differences.png", differences)
    sheet = {title: from_bytes(as_tensor(x, "cpu")) for title, x in pictures.items()}
    save_grid(Path(cfg.out) / f"{name.stem}_sheet.png", sheet)
    print(f"{len(answers)} picture(s) written to {cfg.out}, with a before/after sheet")
