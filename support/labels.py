"""How a label map is read as classes: by codes, greys, colours or a palette."""

import numpy as np

from support.classes import FAR, IGNORED
from support.errors import UserError, print_once

BLACK = (0, 0, 0)  # in palettes also what fills them up


def looked_at(height, width, side=342):
    """Yields 3 x 3 windows (top, left, height, width) of a label map, or one of a small map."""
    bottom, right = max(0, height - side), max(0, width - side)
    for top in {0, bottom // 2, bottom}:
        for left in {0, right // 2, right}:
            yield top, left, min(side, height), min(side, width)


class Reading:
    """How one label map is read, which follows from a sample of its pixels, (H, W, 1 or 3).

    table     its ClassTable
    palette   the file's, (256, 3) uint8; it becomes None where codes decide
    lossy     whether the file's compression changes colours
    by_codes  whether pixels are values of the table
    soft      whether greys that are no values become the nearest one, as at the edges of a mask
    """

    def __init__(self, table, path, sample, palette, lossy):
        self.table, self.path, self.palette = table, path, palette
        self.lossy, self.nearest = lossy, lossy or table.nearest
        self.one_band = sample.shape[-1] == 3 and self._is_one_band(sample)
        sample = sample[..., :1] if self.one_band else sample
        grey = palette is None and sample.dtype == np.uint8 and sample.shape[-1] == 1
        if palette is not None and not self._by_palette(sample[..., 0]):
            self.palette = None
        strange = self._strange(sample) if grey else set()
        several = lossy or (grey and self._several(sample))
        least = len(table.entries) if several else FAR  # lower levels alone are codes
        self.soft = grey and table.grey and (lossy or max(strange, default=255) >= least)
        near = bool(strange) and self.nearest and several and not table.grey
        self.by_colour = sample.shape[-1] == 3 or near
        self.by_codes = self.palette is None and not self.by_colour

    def indices(self, pixels, known=None, strict=False):
        """Class indices (H, W) of pixels (H, W, 1 or 3), IGNORED where they are not known.

        known   (H, W) bool, or None: all are
        strict  refuses a photograph
        """
        if not (known is None or known.all()):
            indices = np.full(known.shape, IGNORED, np.uint8)
            indices[known] = self.indices(pixels[known][None], strict=strict)[0]
            return indices
        if self.palette is not None:
            colours = self.palette[pixels[..., 0]]
            return self.table.from_colours(colours, self.path, nearest=False, strict=False)
        if self.one_band:
            if (pixels != pixels[..., :1]).any():
                raise UserError(f"{self.path}: has codes, or greys, and also colours")
            pixels = pixels[..., :1]
        soft = self.soft and bool(self._strange(pixels))
        if not (self.by_colour or soft):
            return self.table.from_codes(pixels[..., 0], self.path)
        colours = np.repeat(pixels, 3 // pixels.shape[-1], -1)
        indices = self.table.from_colours(colours, self.path, self.nearest or soft, strict)
        if soft and IGNORED not in self.table.values:
            indices[pixels[..., 0] == IGNORED] = IGNORED
        return indices

    def _strange(self, levels):
        """The levels that are neither values of the table nor 255."""
        return set(np.unique(levels).tolist()) - {IGNORED, *self.table.values}

    def _several(self, levels):
        """Whether levels are nearest to several classes: a mask of 0 and 1 is not all black."""
        return len(set(self.table.nearest_row(np.unique(levels)[:, None])[1])) > 1

    def _is_one_band(self, rgb):
        """Whether three equal bands (H, W, 3) are one band of codes or greys, and no colours.

        Codes must be more than black and white, and more than the levels that are colours of the
        table. 255 may mean no class, unless white is a colour of the table.
        """
        if (rgb != rgb[..., :1]).any():
            return False
        used = np.unique(rgb)
        reach = FAR**2 if self.nearest else 0
        shown = set(used[self.table.nearest_row(used[:, None])[0] <= reach].tolist())
        codes = self.table.values.keys() & set(used.tolist())
        may_be_codes = self.table.has(used) and codes - {0, 255} and not self.lossy
        are_colours = len(shown) >= len(codes) or 255 in shown - codes
        return self.table.grey or bool(may_be_codes and not are_colours)

    def _by_palette(self, codes):
        """Whether the colours of the palette count, and not the codes (H, W).

        They do if the table gives no values, or lacks some that occur, and if it has most of the
        colours that occur, or the palette has most of the table's colours. The last rule reads a
        tile of one class like the others. They do not if those that the table has confirm its
        values, and another of its values has a colour that it lacks. They also do if they
        contradict the values of a table of greys, as in a white mask whose palette begins with
        white.
        """
        table, colours = self.table, [tuple(colour) for colour in self.palette.tolist()]
        used, known = np.unique(codes).tolist(), {c: index for _, c, index in table.entries}
        greys = (self.palette == np.arange(256)[:, None]).all()  # as in a palette that says nothing
        own = {k: table.values[k] for k in used if k in table.values and colours[k] != BLACK}
        agree = all(known.get(colours[k], own[k]) == own[k] for k in own)
        if table.valued and table.has(codes):
            if greys or agree:
                return False
            if table.grey and len({colours[k] for k in own}) == len(own):
                return True
            about = "though its palette has the colours of other classes"
            print_once(f"a label map is read by its values, {about}")
            return False
        lost = [k for k in own if own[k] != IGNORED and colours[k] not in known]
        others = {colours[k] for k in used if k not in own} - {BLACK}  # of codes that are no values
        if table.valued and agree and lost and not others & known.keys():
            return False  # a class with another colour would vanish; from_codes names what is amiss
        there = {colours[code] for code in used}
        if 2 * len(known.keys() & there) > len(there):
            return True
        return not greys and 2 * len(known.keys() & set(colours)) > len(known)
