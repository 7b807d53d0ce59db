"""Dataset directories: five layouts, recognised by their folders."""

import dataclasses
import re
from pathlib import Path

from support.classes import ClassTable
from support.errors import UserError, say_once
from support.files import ARRAY_SUFFIXES, IMAGE_SUFFIXES

LAYOUTS = (
    "train/1.jpg, twice as wide as high (pairs side by side); "
    "train/A/x.png + train/B/x.png (two folders); trainA/x.jpg + trainB/y.jpg (unaligned); "
    "train/rgb/7.png + train/lc/7.png (land cover); "
    "train/images/vienna1.tif + train/gt/vienna1.tif (Inria)"
)
_FOLDERS = (  # layout, and where the images A and B of a split lie
    ("unaligned", "{}A", "{}B"),
    ("two folders", "{}/A", "{}/B"),
    ("two folders", "{}/a", "{}/b"),
    ("land cover", "{}/rgb", "{}/lc"),
    ("Inria", "{}/images", "{}/gt"),
)


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
    """The images of a folder, and for labels arrays; says how many files are of other kinds."""
    suffixes = IMAGE_SUFFIXES | ARRAY_SUFFIXES if labels else IMAGE_SUFFIXES
    found, others = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in suffixes:
            found.append(path)
        elif path.is_file():
            others.append(path)
    for path in found:
        if not path.is_file():
            what = "is no file (a link to nothing, a pipe or a folder): remove it"
            raise UserError(f"{path}: {what}")
    if others:
        endings = ", ".join(sorted({path.suffix or path.name for path in others})[:4])
        say_once(f"{folder}: {len(others)} file(s) of other kinds ({endings}) are left out")
    return found


def _match(a, b, where):
    """Two lists of files matched by stem; refuses partners that are missing or double."""
    stems_a, stems_b = ({path.stem: path for path in paths} for paths in (a, b))
    lone = sorted(set(stems_a) ^ set(stems_b))
    if lone:
        path = stems_a.get(lone[0]) or stems_b.get(lone[0])
        counts = f"{len(a)} images on one side, {len(b)} on the other"
        raise UserError(f"{where}: {counts}; {path} has no partner")
    if len(stems_a) != len(a) or len(stems_b) != len(b):
        raise UserError(f"{where}: two files in one folder have the same name but for their ending")
    return list(stems_a.values()), [stems_b[stem] for stem in stems_a]


def find_images(data, split, lc_classes=""):
    """Recognises the layout of a dataset directory and lists "train", "val" or "test" as a Split.

    The validation split is val, or test where there is no val; in the Inria layout it is images
    1-5 of each city. B are label maps in the layouts land cover and Inria, with a classes.json
    in data, or with lc_classes; lc_classes "pictures" makes them pictures all the same.
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
                return _two_folders(root, layout, name, split, folders, table)
        files = image_files(root / name) if (root / name).is_dir() else []
        if files:
            return Split(root, "side by side", name, files, files, True, True, table)
    raise UserError(f"{root}: no layout with images of split {split}; known are: {LAYOUTS}")


def _class_table(root, lc_classes):
    """The ClassTable that lc_classes names, or else the directory's own; None for pictures."""
    own = "binary" if any(root.glob("*/gt")) else ""
    if (root / "classes.json").is_file():
        own = str(root / "classes.json")
    if any(root.glob("*/lc")) and not (lc_classes or own):
        remedy = f"write {root}/classes.json or pass --lc-classes s2glc"
        raise UserError(f"{root}: label maps need a class table: {remedy}")
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
            raise UserError(f"{folder}: no images in split {name}")
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
