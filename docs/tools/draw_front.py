"""Draw docs/front.jpg: validation images of two kept runs, in order, and their translations.

python docs/tools/draw_front.py
"""

from paths import DOCS
from sheet import kept_picture, sheet

CELLS = [  # the first two rows of one run's sample grid, the next three of the other's
    *[("pix2pix-satellite-to-map-256", row) for row in (0, 1)],
    *[("pix2pix-map-to-satellite-256", row) for row in (2, 3, 4)],
]
SIDE, INPUT, FAKE = 256, 0, 1  # pixels; columns of the grid


def front():
    """The networks' inputs above, what they made of them below."""
    columns = []
    for run, row in CELLS:
        columns.append(("", [kept_picture(run, column, row) for column in (INPUT, FAKE)]))
    return sheet(columns, SIDE, head=0)


if __name__ == "__main__":
    front().save(DOCS / "front.jpg", quality=82)
