"""Command-line options as fields of a frozen dataclass."""

import argparse
import dataclasses
import functools
import math
from pathlib import Path

from support.classes import ClassTable
from support.errors import UserError


def option(default, help, *, group=None, choices=None, low=-math.inf, high=2**31 - 1, **meaning):
    """A field of an Options class that is also a command-line option.

    default     a bool, int, float or str, or a tuple of str
    group       a heading of --help, for this field and those that follow; a checkpoint fixes the
                group "model"
    low, high   bounds of a number, both included
    may_change  a resumed run may have another value: True, or a function of the saved options
    fixed       a checkpoint fixes it, although it is not of the group "model": the batch size,
                which decides the statistics of BatchNorm (own_statistics in device.py)
    file        it names a file, which must exist
    weights     it names generator weights, which --generate accepts in place of --checkpoint
    """
    about = {"help": help, "group": group, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=about | meaning)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that all four scripts share; a script's Config adds the model's own.

    script  its name, which is part of run folders and checkpoints
    demo    the demo world without --data: "maps" or "landcover"
    """

    script = ""
    demo = "maps"

    data: str = option(
        "",
        "folder of images, A and B (docs/data.md); unset: a demo world",
        group="data",
        may_change=True,
    )
    patch: int = option(0, "cut images into squares of N pixels first; 0: keep them whole", low=0)
    stride: int = option(
        0, "cut training images every N pixels, so that pieces overlap; 0: every --patch", low=0
    )
    max_images: int = option(0, "train on N images, evenly spread over all; 0: on all", low=0)
    flip: str = option(
        "auto",
        "mirror training images: none, horizontal (left to right), both (also upside down), "
        "auto (horizontal; both for edits and for unpaired land cover)",
        choices=("auto", "none", "horizontal", "both"),
    )
    cache: str = option("", "folder of decoded images; unset: beside the run", may_change=True)
    val_images: int = option(100, "validation images to measure after an epoch; 0: all", low=0)
    size: int = option(
        256, "side of the networks' images, in pixels", group="model", choices=(64, 128, 256, 512)
    )
    width: int = option(64, "channels of the first layer", low=1, high=1024)
    lc_classes: str = option(
        "",
        "class table of B: s2glc, maps, binary, a JSON file, or pictures (no classes); unset: "
        "classes.json in --data",
    )
    bands_A: str = option(
        "", "bands of A, 1 to 32, such as 8,4,3; unset: red, green, blue, or all of 1 or 2"
    )
    bands_B: str = option("", "the same for B, if B is pictures")
    limits_A: str = option(
        "",
        "LOW,HIGH: values of A that become -1 and 1, one pair for all bands or one for each; "
        "unset: 0,255 for 8 bits, else the 2nd and 98th percentile of the training images",
    )
    limits_B: str = option("", "the same for B, if B is pictures")
    beta1: float = option(0.5, "Adam's first beta", group="training", low=0.0, high=0.999)
    seed: int = option(
        0, "random seed of weights, data order, augmentation and noise", low=0, high=2**32 - 1
    )
    quick: bool = option(False, "small networks and images, few epochs: a minute", group="run")
    out: str = option(
        "",
        "folder of the run or results; unset: runs/<script>; to evaluate, the checkpoint's run; to "
        "generate, generated/ in that",
        may_change=True,
    )
    resume: bool = option(
        False, "continue the run in --out, or the newest, where it stopped", may_change=True
    )
    log_every: int = option(50, "largest number of steps between rows of metrics.csv", low=1)
    save_every: int = option(
        10, "keep a checkpoint every N epochs; 0: the last one only", low=0, may_change=True
    )
    sample_rows: int = option(6, "validation images in a sample grid", low=1)
    track: str = option(
        "",
        "also log to TensorBoard or Weights & Biases",
        choices=("tensorboard", "wandb"),
        may_change=True,
    )
    device: str = option(
        "auto", "auto: cuda where there is a GPU", choices=("auto", "cpu", "cuda"), may_change=True
    )
    precision: str = option(
        "auto",
        "auto: bf16 for 8-bit pictures on CUDA (Ampere or newer), else fp32",
        choices=("auto", "fp32", "bf16"),
    )
    graph: bool = option(True, "capture the training step in a CUDA graph", may_change=True)
    checkpoint: str = option("", "the trained model, a .pt file", group="use")
    evaluate: bool = option(False, "measure --checkpoint on a split of the data")
    split: str = option("val", "the split to measure", choices=("val", "test"))
    judge: str = option(
        "",
        "measure with this judge, a file of --train-judge; unset: the run's own",
        may_change=True,
        file=True,
    )
    train_judge: bool = option(False, "train a judge that segments photographs", may_change=True)
    judge_epochs: int = option(20, "epochs of the judge's training", low=1, may_change=True)
    generate: tuple = option((), "images or folders to translate, or a photograph to edit")
    overwrite: bool = option(False, "replace results that are already in --out")
    serve: bool = option(False, "serve a local page to paint on, in a browser")
    address: str = option("127.0.0.1", "network address of the page")
    port: int = option(8000, "port of the page; 0: a free one", low=0, high=65535)
    window: int = option(
        0, "side of the windows of large images, in source pixels; 0: as in training", low=0
    )
    norm_reach: float = option(
        2.0,
        "standard deviation, in windows, of the Gaussian weights by which windows share their "
        "normalisation statistics; 0: not shared",
        low=0.0,
        high=math.inf,
    )

    def __post_init__(self):
        """Refuses a number out of bounds, and a misspelt choice, which could mean another one."""
        for _, field in grouped_fields(type(self)):
            name, about, value = flag(field.name), field.metadata, getattr(self, field.name)
            low, high, choices = about["low"], about["high"], about["choices"]
            kind = type(field.default)
            if not isinstance(value, (kind, int) if kind is float else kind) and name != "--window":
                raise UserError(f"{name} {str(value)[:20]}: must be {kind.__name__}")
            if isinstance(value, (int, float)) and not low <= value <= high:  # NaN, too
                bound = f"at most {high}" if value > high else f"at least {low}"
                raise UserError(f"{name} {str(value)[:20]}: must be {bound}")
            if choices and value not in (field.default, *choices):
                raise UserError(f"{name} {value}: choose from {', '.join(map(str, choices))}")

    @functools.cached_property
    def classes(self):
        """The ClassTable that --lc-classes names; None where B has pictures."""
        return ClassTable.load(self.lc_classes)

    def bands(self, domain):
        """The bands to read of domain "A" or "B", numbered from 1; (): red, green and blue."""
        text = self.bands_A if domain == "A" else self.bands_B
        numbers = text.split(",") if text else []
        if len(numbers) > 32 or not all(n.strip().isdecimal() and int(n) > 0 for n in numbers):
            raise UserError(f"--bands-{domain} {text}: write 1 to 32 numbers from 1, such as 8,4,3")
        return tuple(int(number) for number in numbers)

    def channels(self, domain):
        """The number of channels of pictures of a domain; 3, colours, if they are label maps."""
        return len(self.bands(domain)) or 3

    @property
    def domains(self):
        """The domain of a translation's input, and that of its output: "AB" or "BA"."""
        return "BA" if getattr(self, "direction", "") == "BtoA" else "AB"

    @property
    def using(self):
        """Whether a trained model is used; else one is trained."""
        return bool(self.evaluate or self.generate or self.serve)


@dataclasses.dataclass(frozen=True)
class EditOptions(Options):
    """The options that the two editing scripts share."""

    demo = "landcover"

    box: str = option(
        "any",
        "box of a training edit: center (3/8 of the side, in the middle), random (1/8 to 1/2, "
        "anywhere), any (1/8 to the whole side, anywhere)",
        group="data",
        choices=("center", "random", "any"),
    )
    use_ba: bool = option(False, "also train on the complement: all but the box is pasted")
    own: float = option(
        0.5, "share of edits that ask for the photograph's own land cover", low=0.0, high=1.0
    )
    composite: bool = option(True, "show D the edit within its photograph; off: all of G's output")
    erase: bool = option(
        True, "replace the photograph inside the edit by noise, in G's input", group="model"
    )
    eval_norm: str = option(
        "auto",
        "BatchNorm in generation: batch (the image's own statistics), running (those of "
        "training), auto (batch where --batch-size is 1, else running)",
        group="training",
        choices=("batch", "running", "auto"),
    )
    show_samples: int = option(0, "draw N training edits, then stop; 0: train", group="run", low=0)
    lc: str = option("", "land cover after the edit, or before --paint", group="use")
    lc_before: str = option("", "land cover before the edit")
    paint: tuple = option((), "rectangle to paint: class:x,y,width,height")
    samples: int = option(1, "number of variants of an edit", low=1, high=64)
    keep_outside: bool = option(True, "keep the photograph outside the edit")


def flag(name):
    """lambda_l1 -> --lambda-l1"""
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def grouped_fields(config):
    """Yields (group, field) of an options class, each field with the last group named."""
    group = "options"
    for field in dataclasses.fields(config):
        if "group" not in field.metadata:
            raise TypeError(f"{config.__name__}.{field.name} = ...: write option(..., help)")
        group = field.metadata["group"] or group
        yield group, field


def weight_options(config):
    """The names of the options that are generator weights."""
    return [field.name for field in dataclasses.fields(config) if field.metadata.get("weights")]


def parse(config, doc, quick, argv=None):
    """The command line as (cfg, given): a config, and a dict of the options that were typed.

    doc    the script's docstring, of which --help shows the first three paragraphs
    quick  {name: value}: the defaults under --quick
    """
    parser = _Parser(
        usage="%(prog)s [options]",
        description="\n\n".join(doc.strip().split("\n\n")[:3]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # so that only typed options are there
        allow_abbrev=False,
    )
    group_of = functools.cache(parser.add_argument_group)
    for group, field in grouped_fields(config):
        title = "use a trained model" if group == "use" else group
        group_of(title).add_argument(flag(field.name), **_argument(field))
    given = vars(parser.parse_args(argv and [*map(str, argv)]))
    for name, value in given.items():
        if "" in (value if isinstance(value, list) else [value]):
            raise UserError(f"{flag(name)} is empty: pass a value, or leave it out")
        names_file = config.__dataclass_fields__[name].metadata.get("file")
        if names_file and not Path(value).is_file():
            raise UserError(f"{flag(name)} {value}: no such file")
        given[name] = tuple(value) if isinstance(value, list) else value
    defaults = quick if given.get("quick") else {}
    return config(**defaults | given), given


def _argument(field):
    """The arguments of argparse's add_argument for a field."""
    default, choices = field.default, field.metadata["choices"]
    shown = "unset" if default in ("", ()) else default
    if isinstance(default, bool):
        shown = "on" if default else "off"
        kwargs = {"action": argparse.BooleanOptionalAction if default else "store_true"}
    elif isinstance(default, tuple):
        kwargs = {"action": "extend", "nargs": "+", "metavar": "TEXT"}
    else:
        metavar = None if choices else {int: "N", float: "X", str: "TEXT"}[type(default)]
        kwargs = {"type": type(default), "choices": choices, "metavar": metavar}
    return kwargs | {"help": f"{field.metadata['help']} [{shown}]"}
