"""What the user is told: a mistake, on one line, and remarks that are made once."""

import functools
import sys


class UserError(Exception):
    """A user's mistake: its text names the file or the option and the remedy, on one line."""


@functools.cache
def say_once(text):
    print(text, file=sys.stderr)
