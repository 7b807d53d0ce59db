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
    suffixes = IMAGE_SUFFIXES | (ARRAY_SUFFIXES if labels else set())
    seen = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    found = [path for path in seen if path.suffix.lower() in suffixes]
    for path in found:
        if not path.is_file():
            what = "is no file (a link to nothing, a pipe or a folder): remove it"
            raise UserError(f"{path}: {what}")
    others = [path for path in seen if path not in set(found) and path.is_file()]
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

    The validation split is val, or test where there is no val; in the Inria layout images 1-5 of
    each city. B is taken for label maps in the layouts land cover and Inria, with a classes.json
    in data, or with lc_classes; "pictures" takes it for pictures all the same.
    """
    root = Path(data)
    if not root.is_dir():
        what = "is a file, not a directory" if root.is_file() else "no such directory"
        hint = "--data also tells a checkpoint where its data lies now"
        raise UserError(f"--data {root}: {what} ({hint})")
    found = "binary" if (root / "train" / "gt").is_dir() else ""
    if (root / "classes.json").is_file():
        found = str(root / "classes.json")
    table = ClassTable.load(lc_classes or found)
    if table and found and (theirs := ClassTable.load(found)) and theirs.entries != table.entries:
        say_once(f"{found}: is another class table than the one in use ({', '.join(table.names)})")
    names = {"val": ("val", "validation", "test", "train")}.get(split, (split,))
    for name in names:
        folder, inria = root / name, not (root / "val" / "gt").is_dir()
        layouts = {
            "unaligned": (root / f"{name}A", root / f"{name}B"),
            "two folders": (folder / "A", folder / "B"),
            "two folders ": (folder / "a", folder / "b"),
            "land cover": (folder / "rgb", folder / "lc"),
            "Inria": (folder / "images", folder / "gt"),
        }
        if split == "val" and name == "train":  # only Inria's validates on some of train
            layouts = {"Inria": layouts["Inria"]}
        for layout, folders in layouts.items():
            if not all(side.is_dir() for side in folders):
                continue
            labels = table is not None or layout in ("land cover", "Inria")
            a, b = image_files(folders[0]), image_files(folders[1], labels)
            if layout == "Inria" and name == "train" and inria:
                a, b = ([p for p in x if _validates(p) == (split == "val")] for x in (a, b))
                name = "train" if split == "train" else "train, images 1-5 of each city"
            for side, files in zip(folders, (a, b), strict=True):
                if not files:
                    raise UserError(f"{side}: no images in split {name}")
            if layout != "unaligned":
                a, b = _match(a, b, f"{root}, split {name}")
            if layout == "land cover" and table is None and lc_classes != "pictures":
                remedy = f"write {root}/classes.json or pass --lc-classes s2glc"
                raise UserError(f"{root}: label maps need a class table: {remedy}")
            return Split(root, layout.strip(), name, a, b, layout != "unaligned", False, table)
        if (
            (name == "train") == (split == "train")
            and folder.is_dir()
            and (files := image_files(folder))
        ):
            return Split(root, "side by side", name, files, files, True, True, table)

    def has(*names):
        return any((root / name).is_dir() for name in names)

    if split == "train" and has("val", "test", "valA", "testA"):
        raise UserError(f"{root}: no training split: put images in train")
    if split == "val" and has("train", "trainA"):
        remedy = "put some of the images in val (laid out like train), or in test"
        raise UserError(f"{root}: no validation split: {remedy}")
    if split == "test" and has("train", "trainA", "val", "valA"):
        raise UserError(f"{root}: no test split: leave --split out")
    raise UserError(f"{root}: no layout that is known here; known are: {LAYOUTS}")


def _validates(path):
    """Whether an image of Inria's is one that its authors keep for validation."""
    return bool(re.fullmatch(r"(austin|chicago|kitsap|tyrol-w|vienna)[1-5]", path.stem))
