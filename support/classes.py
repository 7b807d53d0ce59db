"""The classes of a label map: their names, values and colours."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np

from support.errors import UserError

_KEYS = {"name": str, "color": str, "value": int, "ignore": bool}
_EXAMPLE = '[{"name": "lake", "color": "#1445f9" or "20,69,249", "value": 5, "ignore": false}, ...]'
# A distance of (r, g, b) from the table's colours. JPEG of quality 30 to 95 moves the demo world's
# labels by up to 14 levels; most pixels of photographs lie 50 to 200 away from any table.
FAR = 32
IGNORED = 255  # index of pixels without a class: they enter no loss and no measure
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
    """The classes of a label map. Index i has names[i] and colors[i].

    names    of the n classes
    colors   (r, g, b) of each
    entries  (value or else position, (r, g, b), index or IGNORED) of every row, in order
    valued   whether some row gives its value
    nearest  whether a colour becomes the nearest one of the table (for lossy pictures)
    text     the table as JSON, which load accepts
    """

    names: tuple
    colors: tuple
    entries: tuple
    valued: bool
    nearest: bool
    text: str

    @staticmethod
    def load(source):
        """The table of a built-in name, a JSON file or JSON text; None for "" and "pictures"."""
        if source in ("", "pictures"):
            return None
        if source in _TABLES:
            rows = [row.split(maxsplit=2) for row in _TABLES[source].strip().splitlines()]
            entries = [{"name": n, "value": int(value), "color": c} for value, c, n in rows]
            return ClassTable._build(entries, source == "maps")
        is_json = source.lstrip().startswith(("[", "{"))
        try:
            if not (is_json or Path(source).is_file()):  # nor a device, which may have no end
                raise FileNotFoundError
            table = json.loads(source if is_json else Path(source).read_text("utf-8-sig"))
            if isinstance(table, list):
                table = {"classes": table}
            if unknown := ", ".join(table.keys() - {"classes", "nearest"}):
                raise ValueError(f"unknown key {unknown}")
            nearest = table.get("nearest", False)
            if type(nearest) is not bool:
                raise TypeError(f"nearest {nearest!r}")
            return ClassTable._build(table["classes"], nearest)
        except FileNotFoundError:
            known = ", ".join(_TABLES)
            raise UserError(f"class table {source}: no such file (built in: {known})") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            name = source[:60] if is_json else source
            raise UserError(f"class table {name}: {str(error)[:80]}: write {_EXAMPLE}") from None

    @staticmethod
    def _build(entries, nearest):
        names, rows = [], []
        for position, entry in enumerate(entries):
            for key, value in entry.items():
                if type(value) is not _KEYS.get(key):
                    raise TypeError(f"{key} {value!r}" if key in _KEYS else f"unknown key {key}")
            value, index = entry.get("value", position), IGNORED
            if not entry.get("ignore"):
                index = len(names)
                names.append(entry["name"])
                if not 0 <= value <= 65535:
                    raise ValueError(f"value {value}, not 0 to 65535")
            rows.append((value, _color(entry["color"]), index))
        if not 2 <= len(names) < IGNORED:
            raise ValueError(f"needs 2 to 254 classes that are not ignored, not {len(names)}")
        values, colors, _ = zip(*rows, strict=True)
        for column in ([name.lower() for name in names], values, colors):
            if len(set(column)) != len(column):
                raise ValueError("two classes have the same name, value or color")
        colors = tuple(color for _, color, index in rows if index != IGNORED)
        valued = any("value" in entry for entry in entries)
        text = json.dumps({"nearest": nearest, "classes": entries})
        return ClassTable(tuple(names), colors, tuple(rows), valued, nearest, text)

    def __len__(self):
        return len(self.names)

    @functools.cached_property
    def palette(self):
        """(256, 3) uint8: the colour of every index; black for an index without a class."""
        palette = np.zeros((256, 3), np.uint8)
        for _, color, index in reversed(self.entries):  # of ignored rows the first one decides
            palette[index] = color
        return palette

    @functools.cached_property
    def values(self):
        """{value: index or IGNORED} of every row."""
        return {value: index for value, _, index in self.entries}

    @functools.cached_property
    def grey(self):
        """Whether each colour is the grey of its value, as in `binary`."""
        return all(color == (value,) * 3 for value, color, _ in self.entries)

    def has(self, codes):
        """Whether the table has all of these codes."""
        return set(np.unique(codes).tolist()) <= {self.unused, *self.values}

    def nearest_row(self, rgb):
        """Colours (K, 3) -> the squared distance to the nearest one of the table, and its row."""
        distance = np.stack([((rgb - color) ** 2).sum(1) for _, color, _ in self.entries])
        return distance.min(0), distance.argmin(0)

    @functools.cached_property
    def unused(self):
        """The code of pixels without a class: 255, or the next lower one that no row has."""
        return max(set(range(256)) - set(self.values))

    @functools.cached_property
    def codes(self):
        """(256,) uint8, or uint16 for values over 255: the code of every index in a file."""
        codes = np.full(256, self.unused)
        codes[: len(self)] = [value for value, _, index in self.entries if index != IGNORED]
        return codes.astype(np.min_scalar_type(codes.max()))

    @functools.cached_property
    def code_palette(self):
        """(256 or 65536, 3) uint8: the colour of every code."""
        palette = np.zeros((np.iinfo(self.codes.dtype).max + 1, 3), np.uint8)
        palette[self.codes] = self.palette
        return palette

    def from_codes(self, codes, path):
        """(H, W) of the table's values, `unused` or NaN -> (H, W) uint8 indices."""
        index = {self.unused: IGNORED} | self.values
        codes = np.where(np.isnan(codes), self.unused, codes)
        present = np.unique(codes)
        wrong = [code for code in present.tolist() if code not in index]
        if wrong:
            there = [f"{v} {self.names[i]}" for v, i in self.values.items() if i != IGNORED]
            what = f"label values {wrong[:8]} are not in the class table"
            remedy = "write a classes.json that has them"
            raise UserError(f"{path}: {what} ({', '.join(there)}): {remedy}")
        indices = np.array([index[code] for code in present.tolist()], np.uint8)
        return indices[np.searchsorted(present, codes)]

    def from_colours(self, rgb, path, nearest, strict=True):
        """(H, W, 3) uint8 -> (H, W) uint8 indices; unknown colours are ignored, unless nearest.

        strict  refuses a photograph: less than 1 % of its pixels have a known colour, or with
                nearest less than half have one within FAR
        """
        packed = (rgb.astype(np.int32) << (16, 8, 0)).sum(-1)
        present, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
        distance, row = self.nearest_row((present[:, None] >> (16, 8, 0)) & 255)
        known = distance <= (FAR**2 if nearest else 0)
        if strict and counts[known].sum() < (0.5 if nearest else 0.01) * counts.sum():
            causes = "a photograph, another --lc-classes, or mostly colours that it lacks"
            raise UserError(f"{path}: not the colours of the class table: {causes}?")
        index = np.array([index for _, _, index in self.entries], np.uint8)[row]
        if not nearest:
            index[~known] = IGNORED
        return index[inverse.reshape(packed.shape)]

    def from_one_hot(self, array, path):
        """(H, W, C) one-hot -> (H, W) uint8 indices; IGNORED where all are zero.

        C  the number of classes, or of all rows of the table
        """
        rows = [index for _, _, index in self.entries]
        indices = {len(self): range(len(self)), len(rows): rows}
        alone = np.isin(array, (0, 1, 255)).all() and (array > 0).sum(-1).max() <= 1
        if array.shape[-1] not in indices or not alone:
            raise UserError(f"{path}: is not one-hot in the class table's {len(self)} classes")
        index = np.array(indices[array.shape[-1]], np.uint8)[array.argmax(-1)]
        return np.where(array.max(-1) > 0, index, np.uint8(IGNORED))


def _color(text):
    """The (r, g, b) of "#rrggbb" or "r,g,b"."""
    try:
        levels = bytes.fromhex(text[1:]) if text.startswith("#") else map(int, text.split(","))
        r, g, b = bytes(levels)
        return r, g, b
    except ValueError:
        raise ValueError(f'color "{text}"') from None
