"""--generate and --serve: translate images, edit photographs."""

import collections
import functools
import os
import sys
from pathlib import Path

import numpy as np
import torch

from support.edits import PhotoEdit, centred
from support.errors import UserError, print_once, progress, refusing
from support.files import IMAGE_SUFFIXES, TIFF_SUFFIXES, remove_unfinished, write_image
from support.layouts import contents, image_files
from support.limits import Limits, print_doubts, values_of
from support.opening import CACHED_MB, driver_of
from support.pairs import check_pair
from support.pictures import as_tensor, eight_bits, save_grid
from support.rasters import Raster
from support.serve import edits, translations
from support.windows import Windows, network_input, shared_statistics, window_of
from support.writing import writing


def inputs_of(cfg, labels=False):
    """The files that --generate names, and the images in its folders."""
    files = []
    for path in map(Path, cfg.generate):
        if not (path.is_dir() or path.is_file()):
            raise UserError(f"--generate {path}: no such file or directory")
        found = image_files(path, labels) if path.is_dir() else [path]
        if not found:
            raise UserError(f"--generate {path}: no images in it; it has {contents(path)}")
        files += found
    return list({(os.path.realpath(path), path.name): path for path in files}.values())


def results_of(path, to_labels=False, tiff=False):
    """The names of a file's results: its own name, with an ending that can be written.

    That is .tif for a file with a place on earth, or with `tiff`; .png for label maps and arrays.
    """
    if (driver_of(path) or tiff) and path.suffix.lower() not in TIFF_SUFFIXES:
        path = path.with_suffix(".tif")
    if to_labels and path.suffix.lower() not in TIFF_SUFFIXES:
        return [f"{path.stem}.png", f"{path.stem}_colours.png"]
    return [path.name if path.suffix.lower() in IMAGE_SUFFIXES else f"{path.stem}.png"]


def missing(cfg, names, inputs):
    """The results to write: those that --out lacks, or with --overwrite all."""
    out = Path(cfg.out)
    remove_unfinished(out)
    name, count = collections.Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(f"--generate: two results would be called {name}: generate one at a time")
    inputs = {os.path.realpath(path) for path in inputs}
    for name in names:
        if os.path.realpath(out / name) in inputs:
            raise UserError(f"{out / name} is an input: choose another --out")
    kept = [name for name in names if os.path.lexists(out / name) and not cfg.overwrite]
    if kept:
        about = f"{len(kept)} result(s) in {out} are kept"
        print(f"{about}: --overwrite replaces them", file=sys.stderr)
    return set(names) - set(kept)


def print_windows(cfg, raster):
    """Prints the windows by which a raster is generated."""
    window = window_of(cfg, raster)
    how = f"in windows of {window[1]}x{window[0]}" if window else "as a whole"
    size = f"{raster.width}x{raster.height}"
    print(f"{raster.path.name}: {size}: {how}, at {cfg.size}x{cfg.size}", file=sys.stderr)
    if window and raster.tiff and raster.tiff.block_shapes[0][1] == raster.width:
        row = window[0] * raster.width * raster.tiff.count * np.dtype(raster.dtype).itemsize
        if row > CACHED_MB * 1e6:
            about = "its strips are decoded once more for every few windows"
            print_once(f"{raster.path.name}: {about}: gdal_translate -co TILED=YES is faster")


def translate_files(cfg, predict, net=None, from_labels=False, to_labels=False):
    """--generate of pictures or label maps, at the scale of training, into --out.

    predict(windows (B, C or 1, S, S), whole)  -> pictures (B, C, S, S) in [-1, 1], or scores of the
           classes (B, classes, S, S). Windows are uint8, or int16 levels; whole: there is just one
    net    the network, if it normalises by an image's own statistics
    """
    if cfg.serve:
        translations(cfg, predict, net, from_labels, to_labels)
        return
    files = inputs_of(cfg, labels=from_labels)
    table = cfg.classes if from_labels else None
    tiff = not to_labels and needs_tiff(cfg, cfg.domains[1])
    names = {path: results_of(path, to_labels, tiff) for path in files}
    new = missing(cfg, [name for path in files for name in names[path]], files)
    files = [path for path in files if names[path][0] in new]
    about = {"bands": cfg.bands(cfg.domains[0]), "limits": Limits.of(cfg, cfg.domains[0])}
    for path in files:  # a wrong kind of file is found before anything is generated
        with Raster(path, table, **about):
            pass
    out = Path(cfg.out)
    for path in files:
        torch.manual_seed(cfg.seed)  # a picture does not depend on the others in its folder
        with Raster(path, table, **about) as raster:
            _translate(cfg, raster, predict, net, out / names[path][0], to_labels)
    for name, *colours in names.values():
        if name not in new and new.intersection(colours):  # of a map that is kept
            with Raster(out / name, cfg.classes) as labels:
                write_image(out / colours[0], cfg.classes.palette[labels.read()])
    print(f"{len(files)} image(s) written to {out}")


def needs_tiff(cfg, domain):
    """Whether pictures of domain "A" or "B" have bands, or a depth, that only a TIFF can have."""
    return bool(Limits.of(cfg, domain)) or cfg.channels(domain) not in (1, 3)


def _translate(cfg, raster, predict, net, out, to_labels):
    """Translates one Raster into a file: a picture, or a label map."""
    window, size = window_of(cfg, raster), (raster.height, raster.width)
    print_windows(cfg, raster)
    print_doubts(raster)
    cut = functools.partial(network_input, raster, cfg.size)
    predict = functools.partial(predict, whole=not window)
    windows = Windows(cut, predict, size, window, shared_statistics(cfg, net), raster.valid)
    classes = cfg.classes if to_labels else None
    domain = cfg.domains[1]
    limits = Limits.of(cfg, domain)
    with writing(out, raster, classes, cfg.channels(domain), limits) as put:
        for top, strip in windows.blended(about=raster.path.name):
            for rows in strip.split(256, 1):  # values take several times the memory
                put(rows.max(0).indices.byte().numpy() if classes else values_of(rows, limits), top)
                top += rows.shape[1]


def edit_of_files(cfg):
    """The PhotoEdit of --generate, --lc, --lc-before and --paint."""
    if len(cfg.generate) > 1:
        raise UserError(f"--generate {' '.join(cfg.generate)}: an edit needs one photograph")
    if not cfg.lc:
        raise UserError("--generate needs --lc FILE, the photograph's land cover")
    photo = Raster(cfg.generate[0], bands=cfg.bands("A"), limits=Limits.of(cfg, "A"))
    if photo.limits and photo.dtype != photo.limits.dtype:
        remedy = f"convert it to {photo.limits.dtype}, that of training"
        raise UserError(f"{photo.path}: has {photo.dtype} values: {remedy}")
    print_doubts(photo)
    maps = [Raster(file, cfg.classes) for file in (cfg.lc, cfg.lc_before) if file]
    for labels in maps:
        check_pair(photo, labels)
        print_doubts(labels)
    if cfg.erase and not (cfg.lc_before or cfg.paint):
        raise UserError("--generate needs --lc-before FILE or --paint (or train with --no-erase)")
    strokes = [_stroke(text, cfg.classes, photo.height, photo.width) for text in cfg.paint]
    return PhotoEdit(cfg, photo, *maps, strokes=strokes)


def _stroke(text, classes, height, width):
    """A "class:x,y,width,height" as (index, top, left, bottom, right); a unique prefix will do."""
    name, _, numbers = text.rpartition(":")
    names = [known.lower() for known in classes.names]
    meant = [known for known in names if known.startswith(name.lower())]
    meant = [name.lower()] if name.lower() in names else meant
    try:
        x, y, wide, tall = (int(number) for number in numbers.split(","))
    except ValueError:
        raise UserError(f"--paint {text}: write class:x,y,width,height, in pixels") from None
    if len(meant) != 1:
        known = ", ".join(classes.names)
        raise UserError(f"--paint {text}: no such class, or several; there are {known}")
    if min(wide, tall, x + wide, y + tall) <= 0 or x >= width or y >= height:
        raise UserError(f"--paint {text}: paints nothing in the image, {width}x{height} pixels")
    return names.index(meant[0]), y, x, y + tall, x + wide


def edit_file(cfg, predict, net=None):
    """--generate of an edit, at the scale of training, into --out, with a before/after sheet.

    Only windows around changes are generated, and blended into the photograph (see PhotoEdit).
    With several --samples the sheet also shows their standard deviation, white at 32 levels.

    predict(windows (B, C + 2, S, S), variant) -> (B, C, S, S) in [-1, 1]; a window is the
           photograph, uint8 or int16 levels, the land cover to be, and 1 where it changes
    net    the network, if it normalises by an image's own statistics
    """
    if cfg.serve:
        edits(cfg, predict, net)
        return
    edit, out = edit_of_files(cfg), Path(cfg.out)
    path, regions = edit.photo.path, edit.regions()
    names = results_of(path, tiff=needs_tiff(cfg, "A"))
    sheet = f"{path.stem}_sheet.png"
    if cfg.samples > 1:
        suffix = Path(names[0]).suffix
        names = [f"{path.stem}_{k}{suffix}" for k in range(1, cfg.samples + 1)]
    inputs = [raster.path for raster in (edit.photo, edit.lc, edit.first)]
    new = missing(cfg, [*names, sheet], inputs)
    print_windows(cfg, edit.photo)
    if not edit.has_before:
        print("everything is generated: --lc-before FILE limits it to changes", file=sys.stderr)
    if not regions:
        print("no pixel gets another class: nothing changes", file=sys.stderr)
    results = {}
    for k, name in enumerate(names, 1):
        if name in new:
            _write_edit(out / name, edit, regions, functools.partial(predict, variant=k), net)
        results[f"after {k}" if cfg.samples > 1 else "after"] = out / name
    if sheet in new:
        pictures = _pictures(edit, regions, results)
        save_grid(out / sheet, {title: as_tensor(x) for title, x in pictures.items()})
        print(f"before and after: {out / sheet}")
    print(f"{len(new.intersection(names))} picture(s) written to {out}")


def _write_edit(path, edit, regions, predict, net):
    """Writes the photograph, and over it the generated regions."""
    photo, bands = edit.photo, edit.cfg.channels("A")
    with writing(path, photo, bands=bands, limits=photo.limits, edited=True) as put:
        for top in progress(range(0, edit.size[0], 256), "copying"):
            put(photo.values(top, 0, 256), top)
        for region in regions:
            for pixels, top, left in edit.generated(region, predict, net):
                put(pixels, top, left)


def _pictures(edit, regions, results):
    """The pictures of a sheet, {title: (H, W, C) uint8}; results = {title: path}."""
    view, palette = _view(regions, edit.size), edit.cfg.classes.palette
    pictures = {"before": eight_bits(edit.photo.read(*view))}
    if edit.has_before:
        pictures["land cover"] = palette[edit.before(*view)]
    pictures["edited land cover"] = palette[edit.after(*view)]
    how = {"bands": range(1, edit.cfg.channels("A") + 1), "limits": edit.photo.limits}
    for title, path in results.items():  # some may have been there before
        another = f"{path}: another picture is there: --overwrite replaces it"
        with refusing(another), Raster(path, **how) as raster:
            check_pair(edit.photo, raster)
            pictures[title] = eight_bits(raster.read(*view))
    if len(results) > 1:
        spread = np.std([pictures[title] for title in results], 0).mean(-1, keepdims=True)
        pictures["where they differ"] = np.minimum(spread * 8, 255).astype(np.uint8)
    return pictures


def _view(regions, size, most=1024):
    """The box of a sheet: all, or in a large raster the surroundings of the largest edit."""
    lengths = min(most, size[0]), min(most, size[1])
    largest = max(regions, key=lambda region: region[2] * region[3], default=(0, 0, 0, 0))
    return centred(largest, lengths, size)
