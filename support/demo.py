"""The demo world: procedural landscapes, written as a small dataset."""

import json
from pathlib import Path

import numpy as np

from support.classes import ClassTable
from support.errors import progress
from support.files import whole_or_absent, write_image
from support.processes import first_on_machine, wait_for_others

DEMO_CLASSES = ("grass", "field", "forest", "water", "building", "road")
_DEMO_COLORS = "170,200,120 240,220,110 40,110,50 60,110,210 190,60,50 250,250,250"
_DEMO_MAP = ("land", "cemetery", "park", "water", "paved", "road")  # of the class table `maps`
_DEMO_GROUND = "104,122,76 140,132,84 46,72,44 34,62,88 160,128,112 132,130,126"


def landscape(rng, side):
    """A landscape: photograph and map (side, side, 3), (side, side) indices of DEMO_CLASSES."""
    fx, fy = np.meshgrid(np.fft.rfftfreq(side), np.fft.fftfreq(side))
    radius = np.maximum(np.hypot(fx, fy), 1 / side)

    def noise(slope):  # spectrum 1 / f^slope, mean 0, deviation 1
        spectrum = np.fft.rfft2(rng.normal(size=(side, side))) / radius**slope
        field = np.fft.irfft2(spectrum, (side, side))
        return (field - field.mean()) / field.std()

    y, x = np.mgrid[:side, :side]
    elevation, moisture, warp, trees = noise(2.2), noise(1.9), noise(2.5), noise(0.4)
    angle = rng.uniform(0, np.pi)
    u = x * np.cos(angle) + y * np.sin(angle)
    v = y * np.cos(angle) - x * np.sin(angle)
    parcel = (u // 32).astype(int) * 57 + (v // 22).astype(int) * 131
    tint = rng.uniform(-1, 1, (4096, 3))[parcel % 4096]  # (side, side, 3), one colour a field

    ground = np.zeros((side, side), np.uint8)
    ground[(moisture < 0.2) & (np.abs(elevation) < 1.2)] = 1
    ground[moisture > 0.5] = 2
    ground[elevation < -0.8] = 3
    block = side // 18
    from_street = np.minimum(u % block, v % block) / block
    street, house = from_street < 0.2, (from_street > 0.35) & (tint[..., 0] + warp < 1.5)
    for _ in range(rng.integers(1, 4)):  # towns: a street grid, houses, and a road that leaves
        cx, cy, reach = rng.uniform((0.1, 0.1, 0.1), (0.9, 0.9, 0.22)) * side
        town = (np.hypot(x - cx, y - cy) + 0.15 * reach * warp < reach) & (ground != 3)
        ground[town] = np.where(street, 5, np.where(house, 4, 0))[town]
        across = (x - cx) * np.sin(angle) - (y - cy) * np.cos(angle)
        across += side / 40 * (warp - warp[int(cy), int(cx)])
        ground[np.abs(across) < side / 100] = 5

    furrows = 5 * np.sin(u * 1.3)[..., None]
    flat = np.zeros((1, 1, 1))
    texture = [flat, 14 * tint + furrows, 12 * trees[..., None], flat, 30 * tint[..., :1], flat]
    slope = np.roll(elevation, 2, 1) - np.roll(elevation, -2, 1)
    shade = np.where(ground == 3, 4 * moisture, 9 * slope * side / 64)[..., None]
    colors = np.array([color.split(",") for color in _DEMO_GROUND.split()]).astype(int)
    satellite = colors[ground] + 6 * rng.normal(size=(side, side, 1)) + shade
    satellite += np.choose(ground[..., None], texture)
    table = ClassTable.load("maps")
    drawn = table.palette[[table.names.index(name) for name in _DEMO_MAP]][ground]
    return np.clip(satellite, 0, 255).astype(np.uint8), drawn, ground


def demo_world(cache, kind, train=96, val=12, side=256):
    """Writes a small dataset of landscapes under cache, once, and returns its directory.

    kind  "maps": pairs side by side, satellite | map; "landcover": rgb and lc with classes.json
    """
    root = Path(cache) / f"demo-{kind}"
    if first_on_machine() and not root.exists():
        try:
            with whole_or_absent(root) as aside:
                _write_world(aside, kind, {"train": train, "val": val}, side)
        except OSError:
            if not root.exists():  # else another process was faster, with the same world
                raise
    wait_for_others()
    return str(root)


def _write_world(root, kind, counts, side):
    for (split, count), first in zip(counts.items(), (0, 100_000), strict=True):
        for k in progress(range(count), f"demo world, {split}", unit="image"):
            satellite, drawn, ground = landscape(np.random.default_rng([7, first + k]), side)
            if kind == "landcover":
                write_image(root / split / "rgb" / f"{k:03}.png", satellite)
                write_image(root / split / "lc" / f"{k:03}.png", ground)
            else:
                write_image(root / split / f"{k:03}.png", np.concatenate([satellite, drawn], 1))
    if kind == "landcover":
        rows = zip(DEMO_CLASSES, _DEMO_COLORS.split(), strict=True)
        table = [{"name": name, "color": color} for name, color in rows]
        (root / "classes.json").write_text(json.dumps(table))
