"""Command-line options as fields of a frozen dataclass."""

import argparse
import dataclasses
import functools
import math

from support.classes import ClassTable
from support.errors import UserError


def option(default, help, *, group=None, choices=None, low=None, high=None, **meaning):
    """A field of an Options class that is also a command-line option.

    group       a heading of --help, which holds for the fields that follow, too; a checkpoint
                fixes the group "model"
    low, high   bounds of a number, both included
    may_change  a resumed run may have another value: True, or a function of the saved options
    needs       the option without which this one has no effect, such as "generate", one of two,
                "generate or serve", or the value that an option must have, such as "content=vgg"
    endless     infinity is one of its values
    file        it names a file, which must exist
    weights     generator weights, which --generate takes in place of --checkpoint
    """
    about = {"help": help, "group": group, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=about | meaning)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that all four scripts share; a script's Config adds the model's own.

    script  its name, which run folders and checkpoints carry
    demo    the demo world that stands in where there is no --data: "maps" or "landcover"
    """

    script = ""
    demo = "maps"

    data: str = option("", "directory of images; none: a demo world", group="data", may_change=True)
    patch: int = option(0, "cut images into N x N patches first; 0: whole images", low=0)
    max_images: int = option(0, "train on N images, evenly spread; 0: all", low=0)
    flip: str = option(
        "auto",
        "turn training images; auto: horizontal, and with land cover both ways",
        choices=("auto", "none", "horizontal", "both"),
    )
    cache: str = option("", "folder of the decoded images; none: beside the run", may_change=True)
    val_images: int = option(100, "validation images measured after an epoch; 0: all", low=0)
    size: int = option(256, "side that networks see", group="model", choices=(64, 128, 256, 512))
    width: int = option(64, "channels of the first layer", low=1, high=1024)
    lc_classes: str = option("", "classes of B: s2glc, maps, binary, a classes.json, or pictures")
    beta1: float = option(0.5, "Adam's first beta", group="training", low=0.0, high=0.999)
    seed: int = option(0, "of weights, order, augmentation and noise", low=0, high=2**32 - 1)
    quick: bool = option(False, "small networks, images and epochs: a minute", group="run")
    out: str = option("", "run folder, or folder of results; none: runs/<script>", may_change=True)
    resume: bool = option(False, "continue the run in --out where it stopped", may_change=True)
    log_every: int = option(50, "steps between rows of metrics.csv", low=1)
    save_every: int = option(10, "epochs between checkpoints that stay", low=0, may_change=True)
    sample_rows: int = option(6, "validation images in a sample grid", low=1)
    track: str = option("", "also log to", choices=("", "tensorboard", "wandb"), may_change=True)
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"), may_change=True)
    precision: str = option("auto", "auto: bf16 on CUDA", choices=("auto", "fp32", "bf16"))
    graph: bool = option(True, "capture the training step in a CUDA graph")
    checkpoint: str = option("", "model to evaluate or to generate with", group="use")
    evaluate: bool = option(False, "measure --checkpoint on the validation split")
    split: str = option("val", "the split to measure", choices=("val", "test"), needs="evaluate")
    train_judge: bool = option(False, "train a judge of what is generated", may_change=True)
    judge_epochs: int = option(20, "its epochs", low=1, needs="train_judge", may_change=True)
    generate: str = option("", "image or folder to translate, or photograph to edit")
    overwrite: bool = option(False, "generate again what --out already has", needs="generate")
    serve: bool = option(False, "a page to paint on, in the browser")
    address: str = option("127.0.0.1", "where it listens: on this machine alone", needs="serve")
    port: int = option(8000, "its port; 0: any that is free", low=0, high=65535, needs="serve")
    window: int = option(
        0, "source pixels that --size spans; 0: as in training", low=0, needs="generate or serve"
    )
    norm_reach: float = option(
        2.0,
        "windows around that share a raster's normalisation; 0: none",
        low=0.0,
        endless=True,
        needs="generate or serve",
    )

    @functools.cached_property
    def classes(self):
        """The ClassTable that --lc-classes names; None where B holds pictures."""
        return ClassTable.load(self.lc_classes)

    @property
    def using(self):
        """Whether a trained model is used; else one is trained."""
        return bool(self.evaluate or self.generate or self.serve)


@dataclasses.dataclass(frozen=True)
class EditOptions(Options):
    """What the two scripts that edit photographs share beside Options."""

    demo = "landcover"

    box: str = option(
        "center",
        "the pasted piece: 3/8 of the side in the middle, or 1/8 to 1/2 of it anywhere",
        group="data",
        choices=("center", "random"),
    )
    use_ba: bool = option(False, "also learn the complement: all but the box is pasted")
    erase: bool = option(True, "blank the edit in G's photograph", group="model")
    eval_norm: str = option(
        "auto",
        "generating with the image's own statistics | running ones | own at batch size 1",
        choices=("batch", "running", "auto"),
    )
    show_samples: int = option(0, "draw N training edits, then stop", group="run", low=0)
    lc: str = option("", "land cover, edited or for --paint to edit", group="use", needs="generate")
    lc_before: str = option("", "its land cover before, where --lc is edited", needs="generate")
    paint: tuple = option((), "class:x,y,width,height, a rectangle to paint", needs="generate")
    keep_outside: bool = option(True, "keep the photograph outside the edit", needs="generate")


def flag(name):
    """lambda_l1 -> --lambda-l1"""
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def grouped_fields(config):
    """Pairs (group, field) of an options class, each field under the last group named."""
    group = "options"
    for field in dataclasses.fields(config):
        group = field.metadata["group"] or group
        yield group, field


def parse(config, doc, quick, argv=None):
    """The command line as (cfg, given): a config, and a dict of just the options that were typed.

    doc    the script's docstring: its first two paragraphs, with the commands, head --help
    quick  {name: value}: the defaults that --quick puts in place of the usual ones
    """
    parser = _Parser(
        usage="%(prog)s [options]",
        description="\n\n".join(doc.strip().split("\n\n")[:2]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups = {}
    for group, field in grouped_fields(config):
        if group not in groups:
            title = "use a trained model" if group == "use" else group
            groups[group] = parser.add_argument_group(title)
        groups[group].add_argument(flag(field.name), dest=field.name, **_argument(field))
    given = vars(parser.parse_args(argv))
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    for name, value in given.items():
        about = config.__dataclass_fields__[name].metadata
        if value == math.inf and not about.get("endless"):
            raise UserError(f"{flag(name)} {value}: must be finite")
        if about["low"] is not None and not value >= about["low"]:  # NaN, too
            raise UserError(f"{flag(name)} {value}: must be at least {about['low']}")
        if about["high"] is not None and not value <= about["high"]:
            raise UserError(f"{flag(name)} {value}: must be at most {about['high']}")
    defaults = quick if given.get("quick") else {}
    return config(**{**defaults, **given}), given


def _argument(field):
    """What argparse needs to know of a field."""
    shown = "none" if field.default in ("", ()) else field.default
    if isinstance(field.default, bool):
        shown = "on" if field.default else "off"
    kwargs = {"default": argparse.SUPPRESS, "help": f"{field.metadata['help']} [{shown}]"}
    kind = type(field.default)
    if kind is bool:
        return kwargs | {"action": argparse.BooleanOptionalAction}
    if kind is tuple:
        return kwargs | {"action": "append", "metavar": "TEXT"}
    if field.metadata["choices"]:
        return kwargs | {"type": kind, "choices": field.metadata["choices"]}
    return kwargs | {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
