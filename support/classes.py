"""The classes of a label map: their names, values and colours."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np

from support.errors import UserError

IGNORED = 255  # index of what has no class: it enters no loss and no measure
_TABLES = {
    "s2glc": """
        0 255,255,255 Clouds
        62 210,0,0 Artificial surfaces and constructions
        73 253,211,39 Cultivated areas
        75 176,91,16 Vineyards
        82 35,152,0 Broadleaf tree cover
        83 8,98,0 Coniferous tree cover
        102 249,150,39 Herbaceous vegetation
        103 141,139,0 Moors and Heathland
        104 95,53,6 Sclerophyllous vegetation
        105 149,107,196 Marshes
        106 77,37,106 Peatbogs
        121 154,154,154 Natural material surfaces
        123 106,255,255 Permanent snow covered surfaces
        162 20,69,249 Water bodies""",
    "maps": """
        0 233,229,222 land
        1 243,241,235 building
        2 254,254,252 road
        3 252,157,36 motorway
        4 177,208,254 water
        5 203,223,172 park
        6 186,210,186 cemetery
        7 222,218,212 paved
        8 211,201,189 airfield""",
    "binary": """
        0 0,0,0 background
        255 255,255,255 foreground""",
}


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """The classes of a label map. Index i has names[i] and colors[i]; what is ignored has none.

    names    of the n classes
    colors   (r, g, b) of each
    entries  (value, (r, g, b), index or IGNORED) of every row of the table, in its order
    nearest  colours are matched to the nearest (pictures that went through JPEG), not exactly
    text     the table as JSON: load(text) gives it back
    """

    names: tuple
    colors: tuple
    entries: tuple
    nearest: bool
    text: str

    @staticmethod
    def load(source):
        """The table called source: a built-in name, a path to a classes.json, or JSON text.

        None for "", and for "pictures", which says that B is no label map.
        """
        if source in ("", "pictures"):
            return None
        if source in _TABLES:
            rows = [row.split(maxsplit=2) for row in _TABLES[source].strip().splitlines()]
            entries = [{"name": n, "value": int(value), "color": c} for value, c, n in rows]
            return ClassTable._build(entries, source == "maps", source)
        is_json = source.lstrip().startswith(("[", "{"))
        name = source[:60] if is_json else source
        try:
            table = json.loads(source if is_json else Path(source).read_text("utf-8-sig"))
            nearest = table.get("nearest", False) if isinstance(table, dict) else False
            entries = table["classes"] if isinstance(table, dict) else table
            return ClassTable._build(entries, nearest, name)
        except FileNotFoundError:
            known = ", ".join(_TABLES)
            raise UserError(f"class table {source}: no such file (built in: {known})") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            reason = "no UTF-8" if isinstance(error, UnicodeError) else repr(error)[:80]
            what = f"not a list of {{name, color, value, ignore}} ({reason})"
            raise UserError(f"class table {name}: {what}") from None

    @staticmethod
    def _build(entries, nearest, source):
        names, colors, rows = [], [], []
        kinds = {"name": str, "value": int, "color": (str, list), "ignore": bool}
        for position, entry in enumerate(entries):
            for key, part in entry.items():
                if not isinstance(part, kinds[key]) or (key == "value" and isinstance(part, bool)):
                    raise ValueError(f"{key} {part!r}")
            color = entry["color"]
            if isinstance(color, str):
                decimal = re.fullmatch(r"(\d+), *(\d+), *(\d+)", color)
                parts = decimal or re.fullmatch("#?" + "([0-9a-fA-F]{2})" * 3, color)
                color = [int(part, 10 if decimal else 16) for part in parts.groups()]
            if len(color) != 3 or not all(type(c) is int and 0 <= c <= 255 for c in color):
                raise ValueError(f"colour {entry['color']}")
            index = IGNORED if entry.get("ignore") else len(names)
            rows.append((entry.get("value", position), tuple(color), index))
            if index != IGNORED:
                names.append(entry["name"])
                colors.append(tuple(color))
        for column, what in enumerate(("value", "color")):
            if len({row[column] for row in rows}) != len(rows):
                raise UserError(f"class table {source}: two classes have the same {what}")
        if not 2 <= len(names) < IGNORED or len(set(names)) != len(names):
            what = "needs 2 to 254 classes, each with a name of its own"
            raise UserError(f"class table {source}: {what}")
        text = json.dumps({"nearest": nearest, "classes": entries})
        return ClassTable(tuple(names), tuple(colors), tuple(rows), nearest, text)

    def __len__(self):
        return len(self.names)

    @functools.cached_property
    def palette(self):
        """(256, 3) uint8: every index's colour; black for what has none."""
        palette = np.zeros((256, 3), np.uint8)
        for _, color, index in reversed(self.entries):  # of what is ignored the first colour
            palette[index] = color
        return palette

    def from_codes(self, codes, path):
        """(H, W) integers -> (H, W) uint8 indices.

        Codes are the table's values, or 255, or positions in the table where these cannot be
        mistaken for values: no number is a value of one class and the position of another.
        """
        present = np.unique(codes)
        values = {value: index for value, _, index in self.entries}
        positions = {position: index for position, (_, _, index) in enumerate(self.entries)}
        if any(values.get(position, index) != index for position, index in positions.items()):
            positions = {}
        for table in ({IGNORED: IGNORED} | values, {IGNORED: IGNORED} | positions):
            if all(int(code) in table for code in present):
                indices = np.array([table[int(code)] for code in present], np.uint8)
                return indices[np.searchsorted(present, codes)]
        wrong = [c for c in present.tolist() if c not in values and c not in positions]
        wrong = (wrong or present.tolist())[:8]
        what = f"outside the class table, whose values are {sorted(values)}"
        raise UserError(f"{path}: label values {wrong} are {what}")

    def from_colours(self, rgb, path, nearest, strict=True):
        """(H, W, 3) uint8 -> (H, W) uint8 indices; stray colours are ignored, unless nearest.

        strict  less than 1 % of colours that are known is refused: that is no label map
        """
        packed = (rgb.astype(np.int32) << (16, 8, 0)).sum(-1)
        present, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
        present_rgb = (present[:, None] >> (16, 8, 0)) & 255  # (K, 3)
        distance = [((present_rgb - color) ** 2).sum(1) for _, color, _ in self.entries]
        distance = np.stack(distance)  # (rows, K)
        index = np.array([row[2] for row in self.entries], np.uint8)[distance.argmin(0)]
        if not nearest:
            exact = distance.min(0) == 0
            if strict and counts[exact].sum() < 0.01 * counts.sum():
                known = ", ".join(self.names[:6])
                what = "hardly a pixel has a colour of the class table"
                raise UserError(f"{path}: {what} ({known}, ...)")
            index[~exact] = IGNORED
        return index[inverse.reshape(packed.shape)]

    def from_one_hot(self, array, path):
        """(H, W, C) or (C, H, W) one-hot -> (H, W) uint8 indices; no class at all: IGNORED."""
        indices = {len(self): range(len(self)), len(self.entries): [row[2] for row in self.entries]}
        if array.shape[-1] not in indices and array.shape[0] in indices:
            array = np.moveaxis(array, 0, -1)
        if array.shape[-1] not in indices:
            what = f"no one-hot of the class table's {len(self)} classes"
            raise UserError(f"{path}: shape {array.shape} is {what}")
        index = np.array(indices[array.shape[-1]], np.uint8)[array.argmax(-1)]
        if not np.isin(array, (0, 1, 255)).all() or (array > 0).sum(-1).max() > 1:
            raise UserError(f"{path}: is no one-hot: a pixel has one class, or none")
        return np.where(array.max(-1) > 0, index, np.uint8(IGNORED))
