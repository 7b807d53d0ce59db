"""Dataset directories: their layouts, recognised by folders and endings of names."""

import dataclasses
import re
import unicodedata
from pathlib import Path

from support.classes import ClassTable
from support.errors import UserError, say_once
from support.files import ARRAY_SUFFIXES, BESIDE, IMAGE_SUFFIXES

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


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of one split: two lists of files, A and B.

    paired   A[i] and B[i] show the same place
    halves   A[i] and B[i] are the left and the right half of one file
    classes  the ClassTable of B when B holds label maps, else None
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
    """The images of a folder, and for labels arrays; says how much else is in it."""
    suffixes = IMAGE_SUFFIXES | ARRAY_SUFFIXES if labels else IMAGE_SUFFIXES
    found, others = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in suffixes:
            found.append(path)
        elif path.suffix.lower() not in BESIDE and (path.is_file() or path.is_dir()):
            others.append(path)
    for path in found:
        if not path.is_file():
            what = "is no file (a link to nothing, a pipe or a folder): remove it"
            raise UserError(f"{path}: {what}")
    if found and others:
        endings = ", ".join(sorted({path.suffix or path.name for path in others})[:4])
        say_once(f"{folder}: {len(others)} other file(s) or sub-folder(s) ({endings}) are left out")
    return found


def _match(a, b, where, endings=("", "")):
    """Two lists of files matched by stem, without endings; refuses partners missing or double."""
    named_a, named_b = (
        {unicodedata.normalize("NFC", path.stem).removesuffix(ending): path for path in paths}
        for paths, ending in zip((a, b), endings, strict=True)
    )
    lone = sorted(set(named_a) ^ set(named_b))
    if lone:
        path = named_a.get(lone[0]) or named_b.get(lone[0])
        counts = f"{len(a)} images on one side, {len(b)} on the other"
        raise UserError(f"{where}: {counts}; {path} has no partner")
    if len(named_a) != len(a) or len(named_b) != len(b):
        raise UserError(f"{where}: two files in one folder have the same name but for their ending")
    return list(named_a.values()), [named_b[name] for name in named_a]


def find_images(data, split, lc_classes=""):
    """Recognises the layout of a dataset directory and lists "train", "val" or "test" as a Split.

    The validation split is val, or test where there is no val; in the Inria layout it is images
    1-5 of each city. B are label maps in the layouts land cover, masks and Inria, with a
    classes.json in data, or with lc_classes; lc_classes "pictures" makes them pictures anyway.
    """
    root = Path(data)
    if not root.is_dir():
        what = "is a file, not a directory" if root.is_file() else "no such directory"
        raise UserError(f"--data {root}: {what} (--data also tells a checkpoint where its data is)")
    table = _class_table(root, lc_classes)
    names = ["val", "validation", "test"] if split == "val" else [split]
    if split == "val" and _is_inria(root):
        names.append("train")
    for name in names:
        for layout, a, b in _FOLDERS:
            folders = root / a.format(name), root / b.format(name)
            if folders[0].is_dir() and folders[1].is_dir():
                if layout in ("land cover", "masks"):
                    _check_table(root, table, lc_classes)
                return _two_folders(root, layout, name, split, folders, table)
        files = image_files(root / name) if (root / name).is_dir() else []
        endings = _endings(files)
        if "_mask" in endings:
            _check_table(root, table, lc_classes)
        if endings:
            sides = [[path for path in files if path.stem.endswith(end)] for end in endings]
            a, b = _match(*sides, f"{root}, split {name}", endings)
            return Split(root, "two endings", name, a, b, True, False, table)
        if files:
            return Split(root, "side by side", name, files, files, True, True, table)
    raise UserError(_nothing_fits(root, names[0], split))


def _endings(files):
    """The two endings that all of these names have, such as ("_A", "_B"); () if they do not."""
    for endings in _ENDINGS:
        counts = [sum(path.stem.endswith(end) for path in files) for end in endings]
        if all(counts) and sum(counts) == len(files):
            return endings
    return ()


def _nothing_fits(root, name, split):
    """The message that a directory has no layout: what its folder of the split holds instead."""
    folder = root / name
    found = f" ({folder} has {contents(folder)})" if folder.is_dir() else ""
    return f"{root}: no layout with images of split {split}{found}; known are: {LAYOUTS}"


def contents(folder):
    """What a folder without images has, in words: sub-folders and the endings of its files."""
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    folders = [path.name for path in paths if path.is_dir()]
    endings = sorted({path.suffix or path.name for path in paths if path.is_file()})
    parts = []
    if folders:
        parts.append(f"sub-folders, which are not searched: {', '.join(folders[:4])}")
    if endings:
        parts.append(f"files of other kinds: {', '.join(endings[:4])}")
    return "; ".join(parts) or "nothing in it"


def _check_table(root, table, lc_classes):
    """Refuses label maps without a class table, unless they are to be pictures."""
    if not table and lc_classes != "pictures":
        remedy = f"write {root}/classes.json or pass --lc-classes s2glc, maps or binary"
        raise UserError(f"{root}: label maps need a class table: {remedy}")


def _class_table(root, lc_classes):
    """The ClassTable that lc_classes names, or else the directory's own; None for pictures."""
    own = "binary" if any(root.glob("*/gt")) else ""
    if (root / "classes.json").is_file():
        own = str(root / "classes.json")
    table = ClassTable.load(lc_classes or own)
    if table and own and ClassTable.load(own).entries != table.entries:
        names = ", ".join(table.names)
        say_once(f"{own}: is another class table than the one in use ({names})")
    return table


def _two_folders(root, layout, name, split, folders, table):
    """The Split of a layout with a folder of A and a folder of B."""
    a, b = image_files(folders[0]), image_files(folders[1], labels=table is not None)
    if name == "train" and layout == "Inria" and _is_inria(root):
        a = [path for path in a if _validates(path) == (split == "val")]
        b = [path for path in b if _validates(path) == (split == "val")]
        name = "train, images 1-5 of each city" if split == "val" else name
    for folder, files in zip(folders, (a, b), strict=True):
        if not files:
            raise UserError(f"{folder}: no images in split {name}: it has {contents(folder)}")
    if layout != "unaligned":
        a, b = _match(a, b, f"{root}, split {name}")
    return Split(root, layout, name, a, b, layout != "unaligned", False, table)


def _is_inria(root):
    """Whether images 1-5 of each city validate: Inria's data has no validation split of its own."""
    has = {name: (root / name / "gt").is_dir() for name in ("train", "val")}
    return has["train"] and not has["val"] and (root / "train" / "images").is_dir()


def _validates(path):
    """Whether an image of Inria's is one that its authors keep for validation."""
    return bool(re.fullmatch(r"(austin|chicago|kitsap|tyrol-w|vienna)[1-5]", path.stem))
