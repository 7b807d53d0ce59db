"""How a table is written, and how its cells are rounded."""

import re


def table(header, rows):
    """Markdown; columns of numbers are aligned right."""
    rows = [[str(cell) for cell in row] for row in rows]
    rule = "|"
    for column in zip(*rows, strict=True):
        numbers = all(re.match(r"-?\d|$", cell) for cell in column)
        rule += "--:|" if numbers else "---|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def line(cells):
    """One row of a table."""
    return "| " + " | ".join(cells) + " |"


def seconds(value):
    """A time of less than a minute."""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def hours(value):
    """A time of more than a minute."""
    return f"{value:.1f} h" if value >= 1 else f"{60 * value:.0f} min"


def measure(name, value):
    """Levels and decibels with one decimal, shares with three; "" for None."""
    if value is None:
        return ""
    levels = name.startswith(("rmse", "l1_")) or name == "psnr"
    return f"{value:.1f}" if levels else f"{value:.3f}"
