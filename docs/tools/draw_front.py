"""Draw docs/front.jpg: the first five validation images of a kept run, and their translations.

python docs/tools/draw_front.py [RUN [RESULT]]

RUN     a folder of docs/results/, or another one that keep_run.py wrote
"""

import sys

from paths import DOCS
from sheet import kept_picture, sheet

RUN, COUNT, SIDE = "pix2pix-satellite-to-map-256", 5, 256
INPUT, FAKE = 0, 1  # columns of the grid


def front(run=RUN):
    """Photographs above, the maps that the network made of them below."""
    columns = []
    for row in range(COUNT):
        columns.append(("", [kept_picture(run, column, row) for column in (INPUT, FAKE)]))
    return sheet(columns, SIDE, head=0)


if __name__ == "__main__":
    run = sys.argv[1] if len(sys.argv) > 1 else RUN
    result = sys.argv[2] if len(sys.argv) > 2 else DOCS / "front.jpg"
    front(run).save(result, quality=82)
