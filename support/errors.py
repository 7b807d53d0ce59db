"""UserError, remarks printed once, progress bars, printing that never fails."""

import contextlib
import functools
import os
import re
import sys
import threading

from tqdm import tqdm


class UserError(Exception):
    """A user's mistake: its text names the file or the option and the remedy, on one line."""


def out_of_memory(error):
    """Whether an error is a lack of memory, or followed from one, as in capturing a graph."""
    texts = (
        "(can't|annot) allocate memory|(out of|not enough) memory|create a primitive|ALLOC_FAILED"
    )
    if re.search(texts, str(error)) or isinstance(error, MemoryError):
        return True
    return error.__context__ is not None and out_of_memory(error.__context__)


@contextlib.contextmanager
def refusing(message):
    """Turns every error within into a UserError with this message, but for a lack of memory."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UserError(message) from None


# Control characters, as in a file's name, but for those of progress bars
_CONTROLS = re.compile(r"(?!\x1b\[A)[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class SafeStream:
    """Replaces sys.stdout or sys.stderr, and drops text that cannot be written there.

    A broken pipe, a full disk or a closed terminal must not keep a run from being saved.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 (none: 2>&- in a shell)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        text = _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
        try:
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self.stream.flush()
        except RuntimeError:  # a signal's message in the middle of another one
            pass
        except OSError:  # later text goes nowhere: at the end Python flushes the stream once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def speaks():
    """Whether this process prints and writes: torchrun's first one, or the only one."""
    return os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ


_OF_THREAD, _ONE_PRINTS = threading.local(), threading.Lock()


def remarks():
    """The list of this thread's remarks, those of print_once."""
    return vars(_OF_THREAD).setdefault("remarks", [])


def print_once(text):
    """Prints a remark on stderr, once in a program; a page may show it each time."""
    remarks().append(text)
    with _ONE_PRINTS:
        print_new(text)


@functools.cache
def print_new(text):
    if speaks():
        print(text, file=sys.stderr)


def on_terminal():
    """Whether stderr is a terminal; an object in its place may not tell."""
    return getattr(sys.stderr, "isatty", bool)()


def progress(steps, about, **more):
    """A progress bar, which is removed at the end; in a log only of what takes over 10 seconds."""
    in_log = {} if on_terminal() else {"delay": 10, "mininterval": 10}
    return tqdm(steps, about, leave=False, disable=not speaks(), **(more | in_log))


@contextlib.contextmanager
def drawing(path):
    """Turns an error of drawing a page or a plot, which no run needs, into one line on stderr."""
    try:
        yield
    except Exception as error:
        print(f"{path}: cannot be drawn ({type(error).__name__}: {error})", file=sys.stderr)
