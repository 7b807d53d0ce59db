"""A split's images, decoded once, in a memory-mapped file."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from support.batches import some_of, spread
from support.classes import IGNORED
from support.demo import demo_world
from support.errors import UserError, print_once, progress
from support.files import remove_unfinished, whole_or_absent
from support.layouts import find_images
from support.limits import Limits, nearly_flat
from support.pairs import Half, check_pair
from support.pictures import eight_bits, from_bytes, resize
from support.processes import first_on_machine, rank, wait_for_others
from support.rasters import Raster

BESIDE = (".msk", ".aux.xml", "w", ".wld")  # endings, such as x.png.msk and x.pgw


def files_beside(files):
    """Yields the files beside images that give them a mask or a place, by a list of each folder."""
    own = {name for path in files for name in (path.name, path.stem)}
    for folder in sorted({path.parent for path in files}):
        for name in sorted(os.listdir(folder)):
            image = os.path.splitext(name)[0].removesuffix(".aux")
            if name.lower().endswith(BESIDE) and image in own and (folder / name).is_file():
                yield folder / name


def cache_folder(cfg):
    """The folder of stores and demo worlds: --cache, or cache/ beside the run folder."""
    beside = Path(os.path.abspath(cfg.out or "runs/run")).parent  # also of --out .
    return Path(cfg.cache or beside / "cache")


def source(cfg):
    """The directory of the images: --data, or a demo world."""
    if not cfg.data:
        print_once("no --data: the images are invented landscapes, the demo world")
    return cfg.data or demo_world(cache_folder(cfg), cfg.demo)


def is_whole(path):
    """Whether a store is there, with the size that its header states."""
    try:
        array = np.lib.format.open_memmap(path, "r")
        return array.offset + array.nbytes == path.stat().st_size
    except Exception:  # numpy raises several kinds for a damaged header
        return False


class ImageStore:
    """A split's images, decoded, cut and resized once, in a memory-mapped file that stays.

    split  "train", "val" or "test"
    side   every image, or patch, is resized to side x side (bicubic; labels nearest)
    most   files of A, and of B, evenly spread; 0: all. In training --max-images counts

    A        (N, C, side, side) uint8, or int16 levels of Limits if A or B has more than 8 bits
    B        (M, C, side, side), the same, or (M, 1, side, side) class indices; M = N if paired
    rows     {"A", "B"}: arrays to load, from which `images` makes A, or B
    records  both of these if paired: A and B one after the other; else None

    If some picture may have pixels without data, a plane for each domain of pictures follows: 255
    where it has data. Labels are IGNORED where their photograph has none.
    """

    def __init__(self, cfg, split, side, most=0):
        self.cache = cache_folder(cfg)
        self.split = find_images(source(cfg), split, cfg.lc_classes)
        most = cfg.max_images if split == "train" else most
        a, b = (some_of(files, most) for files in (self.split.A, self.split.B))
        self.split = dataclasses.replace(self.split, A=a, B=b)
        self.classes, self.paired = self.split.classes, self.split.paired
        if cfg.stride and not cfg.patch:
            raise UserError("--stride is for pieces: pass --patch as well")
        self.side, self.patch = side, cfg.patch
        self.stride = cfg.stride if split == "train" and cfg.stride else cfg.patch
        self.bands = {domain: cfg.bands(domain) for domain in "AB"}
        self.channels = {"A": cfg.channels("A"), "B": 1 if self.classes else cfg.channels("B")}
        self.limits = {domain: Limits.of(cfg, domain) for domain in "AB"}
        if self.paired:
            self.records = self._open("AB")
            self.rows = {"A": self.records, "B": self.records}
            middle, end = self.channels["A"], sum(self.channels.values())
            self.slots = {"A": (0, middle, end), "B": (middle, end, end + 1)}  # first, last, known
        else:
            self.records = None
            self.rows = {domain: self._open(domain) for domain in "AB"}
            self.slots = {domain: (0, n, n) for domain, n in self.channels.items()}
        self.A, self.B = (self.rows[domain][:, slice(*self.slots[domain][:2])] for domain in "AB")
        if rank() == 0:
            print(self._about(), file=sys.stderr)
            self._print_other_units()

    def images(self, domain, rows):
        """Domain "A" or "B" of rows: (B, C, S, S) in [-1, 1] or NaN; indices (B, S, S)."""
        first, last, _ = self.slots[domain]
        if domain == "B" and self.classes:
            return rows[:, first]
        return from_bytes(rows[:, first:last], self.known(domain, rows))

    def copied(self, images, domain, other):
        """Images of a domain as a guess of the other: the same values, where both have one type."""
        limits, others = self.limits[domain], self.limits[other]
        alike = limits and others and limits.dtype == others.dtype
        return limits.between(others, images) if alike else images

    def known(self, domain, rows):
        """The plane of a domain that is 0 without data, (B, 1, S, S); None: data everywhere."""
        plane = self.slots[domain][2]
        return rows[:, plane : plane + 1] if rows.shape[1] > plane else None

    def _about(self):
        """The images that were found, on one line; refuses label maps without any class."""
        split = self.split
        text = f"{split.root}: {split.layout}, split {split.name}: {len(split.A)}"
        text += " files" if self.paired else f" + {len(split.B)} files"
        if self.patch:
            text += f" cut into {len(self.A)} patches of {self.patch}"
            text += f", every {self.stride} pixels" if self.stride != self.patch else ""
        if self.classes:
            text += f", B labels of {len(self.classes)} classes"
            some = {*np.unique(self.B[spread(100, len(self.B))]).tolist()} - {IGNORED}
            more = spread(1000, len(self.B))
            if len(some) == 1 and all(np.isin(self.B[k], [*some, IGNORED]).all() for k in more):
                where = f" in {len(more)} images" if len(more) < len(self.B) else ""
                text += f", of which only {self.classes.names[some.pop()]!r} occurs{where}"
        shares = []
        for domain in "AB":
            rows = self.rows[domain]
            shares.append(self._ignored(domain, rows[spread(100, len(rows))]))
            if shares[-1] == 1 and all(self._ignored(domain, row[None]) == 1 for row in rows):
                what = "a class of the table" if domain == "B" and self.classes else "data"
                nothing = f"no pixel of {domain} has {what}"
                raise UserError(f"{split.root}, split {split.name}: {nothing}")
        ignored = np.mean(shares[1:] if self.classes and self.paired else shares)
        return text + (f", {ignored:.0%} of the pixels ignored" if ignored >= 0.005 else "")

    def _ignored(self, domain, rows):
        """The share of the pixels of some rows that have no class, or no data."""
        if domain == "B" and self.classes:
            return np.mean(self.images("B", rows) == IGNORED)
        known = self.known(domain, rows)
        return 0 if known is None else np.mean(known == 0)

    def _print_other_units(self):
        """Prints a line if pictures of more than 8 bits are nearly flat between their limits."""
        for domain, limits in self.limits.items():
            if limits and limits.dtype != "uint8":
                rows = self.rows[domain][spread(100, len(self.rows[domain]))][..., ::8, ::8]
                first, last, _ = self.slots[domain]
                known = self.known(domain, rows)
                known = np.ones(rows[:, 0].shape, bool) if known is None else known[:, 0] > 0
                if nearly_flat(np.moveaxis(rows[:, first:last], 1, -1)[known]):
                    about = f"fill less than 1% of --limits-{domain}: other units?"
                    print_once(f"{self.split.root}, split {self.split.name}: {domain}: {about}")

    def histograms(self, most=1000):
        """Counts of each level, or class: {"A": (C, 256), "B": (C or 1, 256)} int64.

        With K classes and pairs also the levels in each class: "A of classes" (K, C, 256). Pixels
        without data or class do not count. Of pictures at most `most`, evenly spread, are counted,
        of label maps all, as some images alone may have a rare class. All baselines follow from
        this.
        """
        counts = {}
        for name, images in (("A", self.A), ("B", self.B)):
            counts[name] = np.zeros((images.shape[1], 256), np.int64)
            known, labels = self.known(name, self.rows[name]), name == "B" and self.classes
            for row in spread(0 if labels else most, len(images)):
                seen = slice(None) if known is None else known[row, 0] > 0
                bands = images[row] if labels else eight_bits(images[row])
                counts[name] += [np.bincount(x[seen].ravel(), minlength=256) for x in bands]
        if self.classes:
            counts["B"][:, IGNORED] = 0
        if self.classes and self.paired:
            by_class = np.zeros((256, self.A.shape[1], 256), np.int64)
            for row in spread(most, len(self.A)):
                for band, levels in enumerate(eight_bits(self.A[row])):
                    both = self.B[row, 0].astype(np.int64) * 256 + levels
                    by_class[:, band] += np.bincount(both.ravel(), minlength=2**16).reshape(256, -1)
            counts["A of classes"] = by_class[: len(self.classes)]
        return {name: torch.from_numpy(count) for name, count in counts.items()}

    def _open(self, domains):
        """The array of domain "A", of "B", or of "AB", which is built if it is not there."""
        table = self.classes and (self.classes.entries, self.classes.nearest, self.classes.valued)
        about = self.side, tuple(self.bands.values()), self.limits, self.patch, self.stride
        about += self.split.halves, table
        text = [f"{domains} planar, holes of zeros, upright, greys of all {about}"]
        lists = [getattr(self.split, domain) for domain in domains]
        pairs = [dict(zip(domains, paths, strict=True)) for paths in zip(*lists, strict=True)]
        files = [path for pair in pairs for path in pair.values()]
        real = functools.cache(os.path.realpath)
        for path in (*files, *files_beside(files)):
            place, stat = real(path if path.is_symlink() else path.parent), path.stat()
            text.append(f"{place} {path.name} {stat.st_size} {stat.st_mtime_ns}")
        digest = hashlib.sha256(os.fsencode("\n".join(text))).hexdigest()[:16]
        name = re.sub(r"[^A-Za-z0-9]+", "-", self.split.name)
        path = self.cache / f"{name}-{domains}-{self.side}px-{digest}.npy"
        if first_on_machine() and not is_whole(path):
            self._build(pairs, path)
        wait_for_others()
        with contextlib.suppress(OSError):  # Linux maps nothing larger than the memory so
            return np.lib.format.open_memmap(path, "c")  # a script may write, by mistake
        return np.lib.format.open_memmap(path, "r")

    def _build(self, pairs, path):
        remove_unfinished(path.parent)
        cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)  # allowed ones
        pool = ThreadPoolExecutor(len(cores))  # Pillow decodes outside the interpreter lock
        try:
            opened = pool.map(self._count, pairs)
            opened = progress(opened, "opening", total=len(pairs), unit="file", delay=1)
            counts, masked = zip(*opened, strict=True)
            if sum(counts) == 0:
                where = f"every image of split {self.split.name}"
                raise UserError(f"--patch {self.patch}: {where} is smaller")
            if small := counts.count(0):
                print_once(f"smaller than --patch {self.patch} and left out: {small} image(s)")
            with whole_or_absent(path) as aside:
                self._fill(pairs, counts, any(masked), aside, pool)
                pool.shutdown()  # nobody maps the file any more: Windows can rename it
        finally:
            pool.shutdown(cancel_futures=True)

    def _fill(self, pairs, counts, masked, path, pool):
        """Decodes pairs of files, with `counts` of records each, into a new file."""
        channels = sum(self.channels[domain] for domain in pairs[0])
        if masked:  # a plane for each domain of pictures
            channels += sum(domain == "A" or not self.classes for domain in pairs[0])
        shape = sum(counts), channels, self.side, self.side
        dtype = np.int16 if any(self.limits.values()) else np.uint8
        store = np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # Linux: the error of a full disk comes here
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

        about = f"decoding {self.split.name}"
        with progress(None, about, total=sum(counts), unit="image") as bar:

            def work(pair, count, first):
                records = self._records(pair, masked) if count else ()
                for row, record in enumerate(records, first):
                    store[row] = record
                    bar.update()

            list(pool.map(work, pairs, counts, np.cumsum(counts) - counts))
        store.flush()

    @contextlib.contextmanager
    def _opened(self, pair):
        """The Rasters of files {domain: path}, or the Halves of one file."""
        halves, rasters = self.split.halves, []
        opened = functools.cache(Raster)  # two halves that are read alike have one
        with contextlib.ExitStack() as stack:
            for domain, path in pair.items():
                table = self.classes if domain == "B" else None
                how = {"bands": self.bands[domain], "limits": self.limits[domain]}
                raster = stack.enter_context(opened(path, None if halves else table, **how))
                if halves:
                    left = 0 if domain == "A" else raster.height
                    raster = Half(raster, left, table)
                rasters.append(raster)
            yield rasters

    def _count(self, pair):
        """(records in a file, whether some may lack data); refuses rasters that do not match."""
        with self._opened(pair) as rasters:
            check_pair(rasters[0], rasters[-1])
            masked = any(raster.masked for raster in rasters if not raster.table)
            height, width = rasters[0].height, rasters[0].width
        return len(self._starts(height)) * len(self._starts(width)), masked

    def _starts(self, length):
        """Where the pieces begin along a side of an image."""
        step = self.patch or length
        return range(0, length - step + 1, self.stride or step)

    def _records(self, pair, masked):
        """One file, or pair of files, cut row by row: yields records (channels, side, side)."""
        with self._opened(pair) as rasters:
            width = rasters[0].width
            step = self.patch or rasters[0].height
            for top in self._starts(rasters[0].height):
                strips, planes = [], []
                for raster in rasters:
                    strip = raster.read(top, 0, step, width)
                    if masked and not raster.table:  # resizing must not mix in what is hidden
                        planes.append(raster.valid(top, 0, step, width))
                        strip = np.where(planes[-1][..., None], strip, strip.dtype.type(0))
                    strips.append(strip)
                strips += planes
                for left in self._starts(width):
                    right = left + (self.patch or width)
                    record = np.concatenate([self._resized(x[:, left:right]) for x in strips])
                    if planes and rasters[-1].table:
                        labels, known = record[-2:]
                        labels[known == 0] = IGNORED
                    yield record

    def _resized(self, piece):
        """A piece (H, W, C) or (H, W) at the store's size: (C or 1, side, side)."""
        labels = piece.ndim == 2 and piece.dtype != bool
        small = resize(piece, (self.side, self.side), labels)
        return np.moveaxis(np.atleast_3d(small), -1, 0)

    def windows(self):
        """[(height, width) of A, of B] in source pixels: of --patch, or of the largest image."""
        if self.patch:
            return [(self.patch, self.patch)] * 2
        a = self._largest("A")
        return [a, a if self.paired else self._largest("B")]

    def _largest(self, domain):
        """The largest height and width of some images; a remark if a square squeezes them."""
        sizes = []
        for path in some_of(getattr(self.split, domain), 1000):
            with self._opened({domain: path}) as (raster,):
                sizes.append((raster.height, raster.width))
        height, width = max(sizes, key=lambda size: max(size) / min(size))
        if max(height, width) > 1.1 * min(height, width):
            print_once(f"images such as {width}x{height} are squeezed: --patch N cuts squares")
        return tuple(np.max(sizes, 0).tolist())
