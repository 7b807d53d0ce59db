"""How a label map is read as classes: by codes, greys, colours or a palette."""

import numpy as np

from support.classes import IGNORED
from support.errors import UserError, print_once


class Reading:
    """How one label map is read, which follows from a sample of its pixels, (H, W, 1 or 3).

    table     its ClassTable
    palette   the file's, (256, 3) uint8; it becomes None where codes decide
    lossy     whether the file's compression changes colours
    by_codes  whether pixels are values of the table
    """

    def __init__(self, table, path, sample, palette, lossy):
        self.table, self.path, self.palette = table, path, palette
        self.one_band = sample.shape[-1] == 3 and self._is_one_band(sample)
        sample = sample[..., :1] if self.one_band else sample
        grey = palette is None and sample.dtype == np.uint8 and sample.shape[-1] == 1
        if palette is not None and not self._by_palette(sample[..., 0]):
            self.palette = None
        self.by_colour = sample.shape[-1] == 3 or (grey and self._by_grey(sample, lossy))
        self.by_codes = self.palette is None and not self.by_colour
        self.greys = grey and table.grey  # a window may have levels that the sample has not
        self.nearest = lossy or table.nearest or self.greys

    def indices(self, pixels, known=None, strict=False):
        """Class indices (H, W) of pixels (H, W, 1 or 3), IGNORED where they are not known.

        known   (H, W) bool, or None: all are
        strict  refuses a photograph
        """
        if known is None or known.all():
            return self._indices(pixels, strict)
        indices = np.full(known.shape, IGNORED, np.uint8)
        indices[known] = self._indices(pixels[known][None], strict)[0]
        return indices

    def _indices(self, pixels, strict):
        if self.palette is not None:
            colours = self.palette[pixels[..., 0]]
            return self.table.from_colours(colours, self.path, nearest=False, strict=False)
        if self.one_band:
            if (pixels != pixels[..., :1]).any():
                raise UserError(f"{self.path}: has codes, or greys, and also colours")
            pixels = pixels[..., :1]
        if self.by_colour or (self.greys and self._by_grey(pixels, lossy=False)):
            colours = np.repeat(pixels, 3 // pixels.shape[-1], -1)
            return self.table.from_colours(colours, self.path, self.nearest, strict)
        return self.table.from_codes(pixels[..., 0], self.path)

    def _by_palette(self, codes):
        """Whether the colours of the palette count, and not the codes (H, W).

        They do if the table gives no values, or lacks some that occur, and if it has most of the
        colours that occur, or the palette has most of the table's colours. The last rule reads a
        tile of one class like the others. They also do if they contradict the values of a table of
        greys, as in a white mask whose palette begins with white.
        """
        table, colours = self.table, [tuple(colour) for colour in self.palette.tolist()]
        used, known = np.unique(codes).tolist(), {c: index for _, c, index in table.entries}
        greys = (self.palette == np.arange(256)[:, None]).all()  # as in a palette that says nothing
        if table.valued and table.has(codes):
            own = {code: table.values[code] for code in used if code in table.values}
            if greys or all(known.get(colours[k], own[k]) == own[k] for k in own):
                return False
            if not table.grey:
                about = "though its palette has the colours of other classes"
                print_once(f"a label map is read by its values, {about}")
            return table.grey
        there = {colours[code] for code in used}
        if 2 * len(known.keys() & there) > len(there):
            return True
        return not greys and 2 * len(known.keys() & set(colours)) > len(known)

    def _is_one_band(self, rgb):
        """Whether three equal bands (H, W, 3) are one band of codes or greys, and no colours."""
        used = np.unique(rgb)
        codes = self.table.has(used) and self.table.nearest_row(used[:, None])[0].any()
        return bool((rgb == rgb[..., :1]).all() and (self.table.grey or codes))

    def _by_grey(self, levels, lossy):
        """Whether levels of grey (H, W, 1) uint8 become the nearest colours, and are no codes.

        They do if some levels are no codes of the table (nor 255), and if the file is lossy, the
        table is `nearest`, or all its colours are the greys of their values. In the last two cases
        they must show several classes, and the strange levels must be no positions in the table: a
        mask of 0 and 1 is not all black.
        """
        used, table = np.unique(levels), self.table
        strange = set(used.tolist()) - {IGNORED, *table.values}
        if not strange or not (lossy or table.nearest or table.grey):
            return False
        several = len(set(table.nearest_row(used[:, None])[1])) > 1
        return lossy or (several and max(strange) >= len(table.entries))
