"""A sheet of pictures in columns, and the pictures of the grids that are kept."""

import json

from paths import RESULTS
from PIL import Image, ImageDraw

GAP, HEAD = 4, 16  # between pictures, and above a sample grid, in pixels


def sheet(columns, side, head=HEAD):
    """Draws columns [(title, [picture, ...]), ...], each picture at side x side pixels."""
    height = max(len(pictures) for _, pictures in columns)
    size = len(columns) * (side + GAP) - GAP, head + height * (side + GAP) - GAP
    drawn = Image.new("RGB", size, "white")
    text = ImageDraw.Draw(drawn)
    for k, (title, pictures) in enumerate(columns):
        left = k * (side + GAP)
        text.text((left, 2), title, fill="black")
        for j, picture in enumerate(pictures):
            resized = picture.resize((side, side), Image.Resampling.BICUBIC)
            drawn.paste(resized, (left, head + j * (side + GAP)))
    return drawn


def kept_picture(name, column, row):
    """One picture of docs/results/NAME/grid.jpg."""
    about = json.loads((RESULTS / name / "result.json").read_text())
    size = about["options"].get("size", 256)
    left, top = GAP + column * (size + GAP), HEAD + row * (size + GAP)
    return Image.open(RESULTS / name / "grid.jpg").crop((left, top, left + size, top + size))
