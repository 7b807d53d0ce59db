"""Layouts of dataset directories, recognised by folders and file names."""

import contextlib
import dataclasses
import os
import re
import unicodedata
from pathlib import Path

from support.classes import ClassTable
from support.errors import UserError, print_once
from support.files import ARRAY_SUFFIXES, IMAGE_SUFFIXES

LAYOUTS = (
    "train/1.jpg, twice as wide as high (pairs side by side); "
    "train/A/x.png + train/B/x.png (two folders); trainA/x.jpg + trainB/y.jpg (unaligned); "
    "train/rgb/7.png + train/lc/7.png (land cover); "
    "train/images/vienna1.tif + train/gt/vienna1.tif (Inria); "
    "train/images/7.png + train/masks/7.png (masks); "
    "train/7_A.png + train/7_B.png, or train/7_sat.jpg + train/7_mask.png (two endings)"
)
_FOLDERS = (  # layout, and where the images A and B of a split lie
    ("unaligned", "{}A", "{}B"),
    ("two folders", "{}/A", "{}/B"),
    ("two folders", "{}/a", "{}/b"),
    ("land cover", "{}/rgb", "{}/lc"),
    ("Inria", "{}/images", "{}/gt"),
    ("masks", "{}/images", "{}/masks"),
)
_ENDINGS = ("_A", "_B"), ("_sat", "_mask")
_VALIDATES = re.compile("(austin|chicago|kitsap|tyrol-w|vienna)[1-5]")  # of Inria's images


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of one split: two lists of files, A and B.

    paired   A[i] and B[i] show the same place
    halves   A[i] and B[i] are the left and the right half of one file
    classes  the ClassTable of B if B has label maps, else None
    """

    root: Path
    layout: str
    name: str
    A: list
    B: list
    paired: bool
    halves: bool
    classes: ClassTable | None


def image_files(folder, labels=False):
    """The images of a folder; for labels arrays, too."""
    suffixes = IMAGE_SUFFIXES | ARRAY_SUFFIXES if labels else IMAGE_SUFFIXES
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    return [folder / name for name in names if os.path.splitext(name)[1].lower() in suffixes]


def contents(folder):
    """The first names in a folder without images, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    return f"{', '.join(names[:4]) or 'nothing'} (sub-folders are not searched, VRTs not read)"


def find_images(data, split, lc_classes=""):
    """The Split "train", "val" or "test" of a dataset directory, whose layout is recognised.

    The validation split is val, or test if there is no val; in the Inria layout it is images 1-5
    of each city. B has label maps in the layouts land cover, masks and Inria, with a classes.json
    in data, or with lc_classes; lc_classes "pictures" makes them pictures anyway.
    """
    root = Path(data)
    if not root.is_dir():
        raise UserError(f"--data {root}: no such directory: pass --data with its path")
    table = _class_table(root, lc_classes)
    names = ["val", "validation", "valid", "test"] if split == "val" else [split]
    borrowed = ["train"] if split == "val" and _is_inria(root) else []
    for name in names + borrowed:
        found = _two_folders(root, name, split, table)
        found = found or (name in names and _one_folder(root, name, table))
        if not found:
            continue
        masks = found.layout == "two endings" and found.B[0].stem.endswith("_mask")
        if (masks or found.layout in ("land cover", "masks")) and not (table or lc_classes):
            remedy = "write a classes.json, or pass --lc-classes s2glc, maps or binary"
            raise UserError(f"{root}: label maps need a class table: {remedy}")
        return found
    folder = root / names[0]
    if split != "train" and not folder.is_dir():
        sides = "{0}A/ and {0}B/" if (root / "trainA").is_dir() else "{0}/"
        where = f"put some into {' or '.join(map(sides.format, names))}, as in training"
        raise UserError(f"{root}: no images of split {split}: {where}")
    folder = folder if folder.is_dir() else root
    has = f"{folder} has {contents(folder)}"
    raise UserError(f"{root}: no layout with images of split {split}: {has}; layouts: {LAYOUTS}")


def _class_table(root, lc_classes):
    """The ClassTable of lc_classes, or else the directory's own; None for pictures."""
    own = "binary" if _inria_splits(root) else ""
    if (root / "classes.json").is_file():
        own = str(root / "classes.json")
    table = ClassTable.load(lc_classes or own)
    if own and not table:
        print_once(f"{own}: not used, as B is pictures")
    elif own:
        same = False
        with contextlib.suppress(UserError):  # of another program's file
            there = ClassTable.load(own)
            same = (there.entries, there.names) == (table.entries, table.names)
        if not same:
            names = ", ".join(table.names)
            print_once(f"{own}: differs from the class table in use ({names})")
    return table


def _two_folders(root, name, split, table):
    """The Split of a layout with a folder of A and a folder of B, or None."""
    there = [row for row in _FOLDERS if all((root / x.format(name)).is_dir() for x in row[1:])]
    if not there:
        return None
    layout, *folders = there[0]
    sides, borrowed = [], split == "val" and name == "train"
    for folder, labels in zip(folders, (False, True), strict=True):
        folder = root / folder.format(name)
        files = image_files(folder, labels)
        if layout == "Inria" and name == "train" and _is_inria(root):
            files = [path for path in files if bool(_VALIDATES.fullmatch(path.stem)) == borrowed]
        if borrowed and not (files or sides):  # other cities
            return None
        if not files:
            raise UserError(f"{folder}: no images in split {split}: it has {contents(folder)}")
        sides.append(files)
    if borrowed:
        name = "train, images 1-5 of each city"
    paired = layout != "unaligned"
    if paired:
        sides = _match(*sides, f"{root}, split {name}")
    return Split(root, layout, name, *sides, paired, False, table)


def _one_folder(root, name, table):
    """The Split of a folder with pairs side by side, or with two endings, or None."""
    files = image_files(root / name) if (root / name).is_dir() else []
    for endings in _ENDINGS:
        a = [path for path in files if path.stem.endswith(endings[0])]
        b = [path for path in files if path.stem.endswith(endings[1])]
        others = [path for path in files if not path.stem.endswith(endings)]
        if endings[0] == "_sat" and a and not (b or others):  # as in DeepGlobe's test split
            remedy = ": put some pairs into val/" if name != "train" else ""
            raise UserError(f"{root / name}: no {endings[1]} beside {a[0].name}{remedy}")
        pairs = _by_stem(a, endings[0]).keys() & _by_stem(b, endings[1]).keys()
        if not (a and b) or (others and not pairs):
            continue
        if others:
            what = f"ends neither in {endings[0]} nor in {endings[1]}"
            raise UserError(f"{others[0]}: {what}: remove it")
        sides = _match(a, b, f"{root}, split {name}", endings)
        return Split(root, "two endings", name, *sides, True, False, table)
    return Split(root, "side by side", name, files, files, True, True, table) if files else None


def _match(a, b, where, endings=("", "")):
    """Matches two lists of files by stem, without endings; refuses files without one partner."""
    named_a, named_b = _by_stem(a, endings[0]), _by_stem(b, endings[1])
    alone = set(named_a) ^ set(named_b)
    if alone:
        path = (named_a | named_b)[min(alone)]
        raise UserError(f"{where}: {len(a)} images and {len(b)}: {path} has no partner")
    twice = {*a, *b} - {*named_a.values(), *named_b.values()}
    if twice:
        what = "another file there has the same name but for the ending"
        raise UserError(f"{where}: {min(twice)}: {what}")
    return list(named_a.values()), [named_b[name] for name in named_a]


def _by_stem(paths, ending):
    """{stem without its ending: path}."""
    stems = (unicodedata.normalize("NFC", path.stem) for path in paths)
    return {stem.removesuffix(ending): path for stem, path in zip(stems, paths, strict=True)}


def _inria_splits(root):
    """The names of the splits in the Inria layout."""
    return [gt.parent.name for gt in root.glob("*/gt") if (gt.parent / "images").is_dir()]


def _is_inria(root):
    """Whether images 1-5 of each city validate, as Inria's data has no validation split."""
    splits = _inria_splits(root)
    return "train" in splits and not {"val", "validation", "valid"} & {*splits}
