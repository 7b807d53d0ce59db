"""Value ranges of pictures of more than 8 bits."""

import dataclasses
from typing import NamedTuple

import numpy as np

from support.batches import some_of
from support.classes import IGNORED
from support.errors import UserError, print_once
from support.options import flag
from support.pictures import as_array
from support.rasters import Raster


class Limits(NamedTuple):
    """The values that become -1 and 1. Between them lie 65536 levels, as int16.

    low, high  of every band, (C,) each
    dtype      of the files, such as "uint16"; results are written in it. "": of any
    """

    low: tuple
    high: tuple
    dtype: str

    @classmethod
    def of(cls, cfg, domain):
        """The limits of domain "A" or "B"; None for pictures of 8 bits, and for label maps."""
        text = getattr(cfg, f"limits_{domain}")
        if not text or (domain == "B" and cfg.classes):
            return None
        numbers, _, dtype = text.partition(" ")
        try:
            pairs = np.array(numbers.split(","), float).reshape(-1, 2)
            low, high = np.broadcast_to(pairs, (cfg.channels(domain), 2)).T
            if not (np.isfinite(pairs).all() and (low < high).all()):
                raise ValueError
        except ValueError:
            how = "write LOW,HIGH, for all bands or for each, LOW below HIGH"
            raise UserError(f"--limits-{domain} {numbers}: {how}") from None
        return cls(tuple(low.tolist()), tuple(high.tolist()), dtype or "float32")

    @property
    def ranges(self):
        """high - low of every band, (C,) float64."""
        return np.subtract(self.high, self.low)

    def between(self, other, images):
        """Images (B, C, H, W) in [-1, 1] of these limits, as their values lie between others."""
        scale = self.ranges / other.ranges
        shift = 2 * np.subtract(self.low, other.low) / other.ranges - 1
        scale, shift = (images.new_tensor(x).view(1, -1, 1, 1) for x in (scale, shift))
        return (images + 1) * scale + shift

    def to_levels(self, values):
        """Values (H, W, C) -> levels, int16; values beyond a limit become the limit."""
        levels = np.nan_to_num(values.astype(np.float64), copy=False)  # the same memory throughout
        np.clip(levels, self.low, self.high, out=levels)
        levels -= self.low
        levels /= self.ranges
        levels *= 65535
        levels -= 32768
        return levels.round(out=levels).astype(np.int16)

    def to_values(self, image):
        """A tensor (C, H, W) in [-1, 1] -> values (H, W, C) of the files' type."""
        share = (np.moveaxis(image.double().numpy(), 0, -1) + 1) / 2
        values = self.low + share.clip(0, 1) * self.ranges
        dtype = np.dtype(self.dtype)
        if dtype.kind in "iu":
            values = values.round().clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
        return values.astype(dtype)


def nearly_flat(levels):
    """Whether levels (K, C) of 16 bits fill less than 1% of every band; False without any."""
    if not len(levels):
        return False
    low, high = np.percentile(levels, [2, 98], axis=0)
    return bool((high - low < 655).all())


def values_of(image, limits):
    """A tensor (C, H, W) in [-1, 1] as a file's values (H, W, C): 8 bits without Limits."""
    return limits.to_values(image) if limits else as_array(image)


def print_doubts(raster):
    """Prints a line if a network sees one colour in the middle of a Raster, or hardly any class."""
    if not (raster.limits or raster.table):
        return
    corner = max(0, raster.height // 2 - 256), max(0, raster.width // 2 - 256)
    pixels = raster.read(*corner, 512, 512)
    pixels = pixels[raster.valid(*corner, *pixels.shape[:2])]
    if raster.limits and nearly_flat(pixels):
        about = "its values fill less than 1% of the limits of training"
        print_once(f"{raster.path.name}: {about}: other units?")
    if raster.table and 2 * np.sum(pixels == IGNORED) > len(pixels):
        about = "most of its pixels have no class of the model"
        print_once(f"{raster.path.name}: {about}: another class table?")


ALL = Limits((0.0,), (1.0,), "")  # opens a file of any depth


def with_limits(cfg, split):
    """cfg with the limits of a Split's pictures, and with all bands of pictures of one or two.

    The limits are those of --limits-A and --limits-B, else 0 and 255 for 8 bits, else the 2nd and
    98th percentile of every band. Where all pictures have 8 bits there are none.
    """
    dtypes = {}
    for domain in "A" if split.classes else "AB":
        first, *others = getattr(split, domain)
        dtypes[domain], count = _kind(first, cfg.bands(domain))
        few = count < 3 and not cfg.bands(domain)
        if few and all(_kind(path)[1] == count for path in some_of(others, 1000)):
            bands = "1" if count == 1 else "1,2"
            cfg = dataclasses.replace(cfg, **{f"bands_{domain}": bands})
    if set(dtypes.values()) == {"uint8"} and not (cfg.limits_A or cfg.limits_B):
        return cfg
    for domain, dtype in dtypes.items():
        name = f"limits_{domain}"
        text = getattr(cfg, name).removesuffix(f" {dtype}").replace(" ", "")
        if not text and dtype == "uint8":
            text = "0,255"
        elif not text:
            part = {"A": (0, 0.5), "B": (0.5, 1)}[domain] if split.halves else (0, 1)
            pairs = _percentiles(getattr(split, domain), cfg.bands(domain), dtype, part)
            text = ",".join(f"{number:.8g}" for number in pairs.ravel())
            print_once(f"{flag(name)}={text}: the 2nd and 98th percentile of its values")
        cfg = dataclasses.replace(cfg, **{name: f"{text} {dtype}"})
        Limits.of(cfg, domain)  # refuses wrong ones
    return cfg


def _kind(path, bands=()):
    """The type of a picture's values, and how many bands it has."""
    with Raster(path, bands=bands or (1,), limits=ALL) as raster:
        return raster.dtype, raster.count


def _percentiles(paths, bands, dtype, part):
    """The 2nd and 98th percentile of every band, (C, 2), in 200 random windows.

    dtype  of the first file, which the others must have
    part   the first and the last column to look at, as shares of the width
    """
    files, rng = some_of(paths, 200), np.random.default_rng(0)
    samples = {}  # file: values (K, C) float64
    for path in files:
        some = []
        with Raster(path, bands=bands, limits=ALL) as raster:
            if raster.dtype != dtype:
                both = f"has {raster.dtype} values, and {paths[0]} {dtype}"
                raise UserError(f"{path}: {both}: convert them to one type")
            first, last = (int(raster.width * share) for share in part)
            sides = min(256, raster.height), min(256, last - first)
            room = raster.height - sides[0], last - first - sides[1]
            corners = rng.integers(0, room, (-(-200 // len(files)), 2), endpoint=True)
            for top, left in corners.tolist():
                window = top, first + left, *sides
                values = raster.values(*window)[raster.valid(*window)]
                some.append(values[:: 1 + len(values) // 2000])
        samples[path] = np.concatenate(some).astype(np.float64)
    if not any(map(len, samples.values())):
        raise UserError(f"{paths[0]}: no pixel has data")
    low, high = np.percentile(np.concatenate([*samples.values()]), [2, 98], axis=0)
    high = np.where(high > low, high, low + 1)
    to_levels = Limits(low, high, "").to_levels
    flat = [path for path, values in samples.items() if nearly_flat(to_levels(values))]
    if 0 < len(flat) < len(samples):
        about = f"{len(flat)} of {len(samples)} images, such as {flat[0]}"
        print_once(f"{about}, fill less than 1% of the values of all: other units?")
    return np.column_stack([low, high])
