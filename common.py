"""What the four scripts share and what has nothing to do with GANs. The names that they use:

errors      UserError, command
options     option, Options, EditOptions, flag, begin
device      autocast, full_precision, own_statistics, set_mode, place, adam, fast_step, seed_step,
            average_gradients
data        load_size, turns, ImageStore, Rows, batches_of_rank, chunks, spread
runs        Run, restore, load_network, save_grid
pictures    IGNORED, from_bytes, one_hot, class_index, draw
measures    Scores, constant_colors, constant_guesses, copy_verdict, write_evaluation,
            plot_confusion
features    VGG16Features, gram
judge       find_judge
generation  translate_files, edit_file
"""

import argparse
import atexit
import collections
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import nn
from tqdm import tqdm

# ------------------------------------------------------------------------------------------- errors


class UserError(Exception):
    """A user's mistake: its text names the file or the option and the remedy, on one line."""


def command(main):
    """Decorates a script's main: a user's mistake becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapper(argv=None):
        try:
            return main(argv)
        except UserError as error:
            message = str(error)
            if not first_here():  # its machine's first process has found the same
                sys.exit(2)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(130)
        except (MemoryError, RuntimeError) as error:
            message = _explain(error)
            if not message:
                raise
        except BrokenPipeError:  # whoever read our output has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except OSError as error:
            if error.errno is None:
                raise
            where = error.filename or "writing"
            message = f"{where}: {error.strerror}; choose another place with --out or --cache"
        finally:
            while _LOCKS:
                os.close(_LOCKS.pop())
        for bar in list(getattr(tqdm, "_instances", [])):  # the message gets a line of its own
            bar.leave = False
            bar.close()
        print("error: " + " ".join(message.split()), file=sys.stderr)
        sys.exit(2)

    return wrapper


_LOCKS = []  # run folders that this process holds, as open files


def lock(folder):
    """Holds a run folder till the program ends, however it does; refuses one that is held."""
    if os.environ.get("RANK", "0") != "0":  # the first process of torchrun holds it for all
        return
    try:
        import fcntl
    except ImportError:  # Windows
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        what = "another process is training in it: wait, stop it, or choose another --out"
        raise UserError(f"--out {folder}: {what}") from None
    except OSError:  # a file system without locks
        os.close(handle)
        return
    _LOCKS.append(handle)


def _explain(error):
    """What to tell the user of an error that PyTorch raised; "" if it is a bug of ours."""
    text, cause = str(error), error
    while cause:  # running out of memory inside a graph's capture raises a second error on its way
        memory = isinstance(cause, (MemoryError, torch.OutOfMemoryError))
        if memory or "can't allocate memory" in str(cause):
            break
        cause = cause.__context__
    if cause:
        return "out of memory: lower --batch-size, --size or --width, or try --precision bf16"
    if world_size() > 1 and re.search("gloo|nccl|connection|timed out", text, re.IGNORECASE):
        return "another process of this run has ended: fix what it says, then go on with --resume"
    return ""


# ------------------------------------------------------------------------------------------ options


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


def turns(flip):
    """How many ways a value of --flip leaves: (left to right, upside down), 1 or 2 each."""
    return {"none": (1, 1), "horizontal": (2, 1), "both": (2, 2)}[flip]


def load_size(cfg):
    """The side at which training images are stored: --load-size, or 286/256 of --size."""
    if cfg.load_size and not cfg.size <= cfg.load_size <= 4096:
        raise UserError(f"--load-size {cfg.load_size}: must be --size {cfg.size} to 4096")
    return cfg.load_size or round(cfg.size * 286 / 256)


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


def begin(config, doc, quick, argv=None):
    """Begins a program: (cfg, device, checkpoint). The arguments are parse's.

    A new run has no checkpoint and a folder of its own; its data have been found, and its class
    table stands in cfg. For --resume the options are the checkpoint's, for --evaluate and
    --generate those of the group "model"; one that was typed and contradicts them is refused.
    """
    cfg, given = parse(config, doc, quick, argv)
    _check_options(cfg, given)
    fields, checkpoint = dataclasses.fields(cfg), None
    weights = any(getattr(cfg, f.name) for f in fields if f.metadata.get("weights"))
    if cfg.checkpoint or cfg.resume:
        cfg, checkpoint = _adopt(cfg, given)
    elif cfg.evaluate or (cfg.using and not weights):
        what = "--generate" if cfg.generate else "--serve" if cfg.serve else "--evaluate"
        raise UserError(f"{what} needs --checkpoint FILE, a model to use")
    device = start(cfg)
    cfg = dataclasses.replace(cfg, device=device.type)  # which a resumed run keeps
    if cfg.using and not checkpoint:
        cfg = dataclasses.replace(cfg, out=cfg.out or f"runs/{cfg.script}/generated")
    elif not checkpoint:
        _check_folder(cfg)
        classes = find_images(source(cfg), "train", cfg.lc_classes).classes
        text = classes.text if classes else "pictures"
        cfg = dataclasses.replace(cfg, lc_classes=text, out=of_rank_0(_claim_folder(cfg)))
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        lock(cfg.out)
        _check_folder(cfg)  # another run may have come and gone meanwhile
    return cfg, device, checkpoint


def _check_options(cfg, given):
    """Refuses options that do not go together, and files that are not there."""
    for field in dataclasses.fields(cfg):
        name, about, value = field.name, field.metadata, getattr(cfg, field.name)
        needed, _, wanted = about.get("needs", "").partition("=")
        others = needed.split(" or ") if needed else []
        values = [getattr(cfg, other) for other in others]
        if wanted and not cfg.resume and not cfg.checkpoint:  # else a file says what it has
            missing = wanted not in values
        else:
            missing = others and not wanted and not any(values)
        if about.get("file") and value and not Path(value).is_file():
            raise UserError(f"{flag(name)} {value}: no such file")
        if name in given and missing:
            flags = " or ".join(map(flag, others))
            raise UserError(f"{flag(name)} goes with {flags} {wanted}".rstrip())
    if cfg.checkpoint and not cfg.using:
        remedy = "to go on training: --resume"
        raise UserError(f"--checkpoint goes with --generate, --evaluate or --serve ({remedy})")
    if cfg.serve and (cfg.generate or cfg.evaluate):
        raise UserError("--serve goes without --generate and --evaluate: one after the other")
    if cfg.resume and cfg.using:
        remedy = "name the model to evaluate or to generate with by --checkpoint"
        raise UserError(f"--resume goes on training: {remedy}")


def _adopt(cfg, given):
    """(cfg, checkpoint): the options that --resume or --checkpoint finds, with those typed."""
    if cfg.resume:
        run = _newest_run(cfg)
        lock(run)
        path = run / "checkpoints" / "last.pt"
    else:
        path = Path(cfg.checkpoint)
        inside = path.parent.name == "checkpoints"
        run = path.parent.parent if inside else path.with_name(f"{path.stem}_results")
    checkpoint = load_checkpoint(path, cfg.script)
    saved, world = _saved_options(cfg, checkpoint, path), int(os.environ.get("WORLD_SIZE", "1"))
    if cfg.evaluate and "histograms" not in checkpoint:
        raise UserError(f"{path}: written by an older version: it has nothing to compare with")
    if cfg.resume and checkpoint.get("world", 1) != world:
        what = f"a run of {checkpoint['world']} processes cannot go on with {world}"
        remedy = f"torchrun --nproc-per-node {checkpoint['world']} {cfg.script}.py --resume"
        raise UserError(f"{path}: {what}: {remedy}")
    held = {
        field.name for group, field in grouped_fields(type(cfg)) if _held(cfg, group, field, saved)
    }
    for name in sorted(held & set(given) & set(saved)):
        same = given[name] == saved[name]
        if name == "lc_classes" and given[name] and saved[name]:
            same = ClassTable.load(given[name]) == ClassTable.load(saved[name])
        if not same:
            value = str(saved[name])[:60]
            raise UserError(
                f"{flag(name)} {given[name]} contradicts {path} ({value}): leave it out"
            )
    known = {field.name for field in dataclasses.fields(cfg)}
    adopted = {name: value for name, value in saved.items() if name in known}
    adopted |= {name: value for name, value in given.items() if name not in held}
    groups = [(group, field.name) for group, field in grouped_fields(type(cfg))]
    mine = [name for group, name in groups if cfg.using and (group == "use" or name == "device")]
    adopted |= {name: getattr(cfg, name) for name in ["resume", *mine]}
    if cfg.using:
        adopted["window"] = cfg.window or checkpoint.get("window", saved["patch"])
    if cfg.resume and adopted["epochs"] < checkpoint["epoch"]:
        done = f"the run has done {checkpoint['epoch']} already"
        raise UserError(f"--epochs {adopted['epochs']}: {done}: leave it out, or pass more")
    keep = cfg.resume or (cfg.evaluate and not cfg.out)
    adopted["out"] = str(run if keep else cfg.out or run / "generated")
    return type(cfg)(**adopted), checkpoint


def _saved_options(cfg, checkpoint, path):
    """A checkpoint's options, all of them; refuses what no run has, as after editing by hand."""
    saved = dict(checkpoint["config"])
    for field in dataclasses.fields(cfg):
        kind, about = type(field.default), field.metadata
        value = saved.setdefault(field.name, field.default)
        kinds = {float: (float, int), tuple: (tuple, list)}.get(kind, kind)
        fits = isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)
        fits = fits and (not about["choices"] or value in about["choices"])
        fits = fits and (about["low"] is None or value >= about["low"])
        if not fits:
            raise UserError(f"{path}: holds {flag(field.name)} {str(value)[:60]}, as no run does")
    for name in ("epoch", "batch", "step") if cfg.resume else ():
        if type(checkpoint.get(name)) is not int or checkpoint[name] < 0:
            raise UserError(f"{path}: holds the {name} {checkpoint.get(name)}, as no run does")
    return saved


def _held(cfg, group, field, saved):
    """Whether a checkpoint's value of an option is kept, whatever is typed."""
    if not cfg.resume:
        return group == "model"
    may_change = field.metadata.get("may_change", False)
    return not (may_change(saved) if callable(may_change) else may_change)


def _newest_run(cfg):
    """The run folder that --resume means: --out, or the newest of runs/script, runs/script-2..."""
    runs = [Path(cfg.out)]
    if not cfg.out:
        name = re.compile(rf"{cfg.script}(-\d+)?")
        runs = [run for run in Path("runs").glob(f"{cfg.script}*") if name.fullmatch(run.name)]
    saved = {run: run / "checkpoints" / "last.pt" for run in runs}
    times = {run: path.stat().st_mtime for run, path in saved.items() if path.is_file()}
    if not times:
        where = cfg.out or f"runs/{cfg.script}"
        raise UserError(f"--resume: no checkpoints/last.pt in {where}: start without --resume")
    return max(times, key=times.get)


def _check_folder(cfg):
    """Refuses an --out that holds anything but a run that began and saved nothing."""
    folder, about = Path(cfg.out), Path(cfg.out) / "config.json"
    if not cfg.out or rank() or not folder.exists():
        return
    if folder.is_file():
        raise UserError(f"--out {folder}: is a file, not a folder")
    if any(folder.glob("checkpoints/*.pt")):
        raise UserError(f"--out {folder} holds a run: go on with --resume, or choose another --out")
    text = about.read_text(errors="replace") if about.is_file() else ""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    if any(files) and f'"script": "{cfg.script}"' not in text:
        raise UserError(f"--out {folder} holds other files: choose an empty or a new folder")


def _claim_folder(cfg):
    """A new run's folder: --out, or the first of runs/script, runs/script-2, ... to come."""
    if cfg.out or rank():
        return cfg.out
    Path("runs").mkdir(exist_ok=True)
    for k in itertools.count(1):
        folder = Path(f"runs/{cfg.script}" + (f"-{k}" if k > 1 else ""))
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    return str(folder)


# ------------------------------------------------------------------------------------------- device


def rank():
    """This process's number: 0 unless torchrun started several."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def of_rank_0(value):
    """Process 0's value (numbers, text), in every process."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def reduced(tensor, how=dist.ReduceOp.SUM):
    """The sum of all processes' tensors, on the device that the group works on."""
    if world_size() == 1:
        return tensor
    tensor = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(tensor, how)
    return tensor


def wait_for_others():
    """Returns when every process has come here."""
    if world_size() > 1:
        dist.barrier()


def first_here():
    """Whether this process is the one of its machine that writes what all there read."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def start(cfg):
    """The device to work on; starts the process group (under torchrun) and the random numbers."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        remedy = "--device cpu goes on, or starts, on the CPU"
        raise UserError(f"--device cuda: no CUDA device is visible here ({remedy})")
    cuda = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 is what --precision fp32 says
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        hours = datetime.timedelta(hours=6)  # others wait while one decodes the images
        where = device if cuda else None
        dist.init_process_group("nccl" if cuda else "gloo", timeout=hours, device_id=where)
        atexit.register(dist.destroy_process_group)  # after main, and the graph that it captured
    if not cuda:
        keep_memory()
    torch.manual_seed(cfg.seed)
    return device


def keep_memory():
    """Has glibc keep what is freed for the next step.

    Blocks of 32 MB and more (activations at 256 pixels are) go back to the system otherwise, and
    are mapped, page by page, anew in every step.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes


def seed_step(seed, epoch, batch):
    """Sets PyTorch's random numbers from (seed, epoch, batch, rank): a resume needs no state.

    Of the CPU and of this process's GPU: torch.manual_seed, which visits every backend, takes ten
    times as long.
    """
    words = np.random.SeedSequence([seed, epoch, batch, rank()]).generate_state(2)
    number = int(words[0]) << 31 ^ int(words[1])
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(number)


def autocast(cfg, device):
    """bf16 autocast where --precision says so (auto: on CUDA); never fp16, which GANs overflow."""
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def full_precision(x):
    """At least float32, as losses need: bf16 becomes float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def own_statistics(cfg):
    """Whether BatchNorm generates with the image's own statistics: --eval-norm batch, or auto.

    At batch size 1 running statistics differ from what the layers saw in training.
    """
    return cfg.eval_norm == "batch" or (cfg.eval_norm == "auto" and cfg.batch_size == 1)


def set_mode(net, training, track):
    """net.train(training); without track, BatchNorm in training mode keeps its statistics."""
    for module in net.train(training).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = track


def place(net, device):
    """A network on the device, in the memory format that is fastest there.

    That is channels_last on CUDA, but not with InstanceNorm, whose backward pass is wrong in
    PyTorch 2.13 for one image with a channels_last gradient.
    """
    instance_norm = any(isinstance(module, nn.InstanceNorm2d) for module in net.modules())
    plain = device.type == "cpu" or instance_norm
    layout = torch.contiguous_format if plain else torch.channels_last
    return net.to(device, memory_format=layout)


def adam(module, cfg, device):
    """Fused Adam, betas (beta1, 0.999); on CUDA its rate is a tensor that a graph can read."""
    cuda = device.type == "cuda"
    return torch.optim.Adam(
        module.parameters(),
        lr=torch.tensor(cfg.lr, device=device) if cuda else cfg.lr,
        betas=(cfg.beta1, 0.999),
        fused=True,
        capturable=cuda,
    )


def set_lr(optimizer, lr):
    """Gives an optimizer the rate lr, in place where it is a tensor that a captured graph reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def average_gradients(module):
    """Averages a module's gradients over all processes, as one flat message."""
    if world_size() == 1:
        return
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    means = flat.div_(world_size()).split([grad.numel() for grad in grads])
    for grad, mean in zip(grads, means, strict=True):
        grad.copy_(mean.view(grad.shape))


class GraphedStep:
    """train_step captured whole in one CUDA graph.

    The first calls run as they are on a side stream (they train, too), the next captures, and
    from then on a call copies its batch into the graph's own tensors and replays.
    Called like train_step. The losses that it returns are overwritten by the next call.
    """

    warmup = 3

    def __init__(self, step):
        self.step, self.calls, self.graph, self.side = step, 0, None, torch.cuda.Stream()

    def __call__(self, state, batch, cfg):
        self.calls += 1
        if self.calls <= self.warmup:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                losses = self.step(state, batch, cfg)
            torch.cuda.current_stream().wait_stream(self.side)
            return detached(losses)
        if self.graph is None:
            self.batch = tuple(tensor.clone() for tensor in batch)
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread may pin memory meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.losses = detached(self.step(state, self.batch, cfg))
            self.graph = graph
        for static, tensor in zip(self.batch, batch, strict=True):
            static.copy_(tensor)
        self.graph.replay()
        return self.losses


def detached(losses):
    """Losses without the autograd graphs that hang on them, and hold a step's memory."""
    return {name: loss.detach() for name, loss in losses.items()}


def fast_step(step, cfg, device):
    """train_step as this device runs it fastest: in a CUDA graph, or as it is (CPU, --no-graph)."""
    return GraphedStep(step) if device.type == "cuda" and cfg.graph else step


# ------------------------------------------------------------------------------- data: class tables

IGNORED = 255  # index of what has no class: it enters no loss and no measure

_TABLES = {
    "s2glc": """
        0 255,255,255 Clouds
        62 210,0,0 Artificial surfaces and constructions
        73 253,211,39 Cultivated areas
        75 176,91,16 Vineyards
        82 35,152,0 Broadleaf tree cover
        83 8,98,0 Coniferous tree cover
        102 249,150,39 Herbaceous vegetation
        103 141,139,0 Moors and Heathland
        104 95,53,6 Sclerophyllous vegetation
        105 149,107,196 Marshes
        106 77,37,106 Peatbogs
        121 154,154,154 Natural material surfaces
        123 106,255,255 Permanent snow covered surfaces
        162 20,69,249 Water bodies""",
    "maps": """
        0 233,229,222 land
        1 243,241,235 building
        2 254,254,252 road
        3 252,157,36 motorway
        4 177,208,254 water
        5 203,223,172 park
        6 186,210,186 cemetery
        7 222,218,212 paved
        8 211,201,189 airfield""",
    "binary": """
        0 0,0,0 background
        255 255,255,255 foreground""",
}


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """The classes of a label map. Index i has names[i] and colors[i]; what is ignored has none.

    names    of the n classes
    colors   (r, g, b) of each
    rows     (value, (r, g, b), index or IGNORED) of every row of the table, in its order
    nearest  colours are matched to the nearest (pictures that went through JPEG), not exactly
    text     the table as JSON: load(text) gives it back
    """

    names: tuple
    colors: tuple
    rows: tuple
    nearest: bool
    text: str

    @staticmethod
    def load(source):
        """The table called source: a built-in name, a path to a classes.json, or JSON text.

        None for "", and for "pictures", which says that B is no label map.
        """
        if source in ("", "pictures"):
            return None
        if source in _TABLES:
            rows = [row.split(maxsplit=2) for row in _TABLES[source].strip().splitlines()]
            entries = [{"name": n, "value": int(value), "color": c} for value, c, n in rows]
            return ClassTable._build(entries, source == "maps", source)
        is_json = source.lstrip().startswith(("[", "{"))
        name = source[:60] if is_json else source
        try:
            table = json.loads(source if is_json else Path(source).read_text("utf-8-sig"))
            nearest = table.get("nearest", False) if isinstance(table, dict) else False
            entries = table["classes"] if isinstance(table, dict) else table
            return ClassTable._build(entries, nearest, name)
        except FileNotFoundError:
            known = ", ".join(_TABLES)
            raise UserError(f"class table {source}: no such file (built in: {known})") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            reason = "no UTF-8" if isinstance(error, UnicodeError) else repr(error)[:80]
            what = f"not a list of {{name, color, value, ignore}} ({reason})"
            raise UserError(f"class table {name}: {what}") from None

    @staticmethod
    def _build(entries, nearest, source):
        names, colors, rows = [], [], []
        kinds = {"name": str, "value": int, "color": (str, list), "ignore": bool}
        for position, entry in enumerate(entries):
            for key, part in entry.items():
                if not isinstance(part, kinds[key]) or (key == "value" and isinstance(part, bool)):
                    raise ValueError(f"{key} {part!r}")
            color = entry["color"]
            if isinstance(color, str):
                decimal = re.fullmatch(r"(\d+), *(\d+), *(\d+)", color)
                parts = decimal or re.fullmatch("#?" + "([0-9a-fA-F]{2})" * 3, color)
                color = [int(part, 10 if decimal else 16) for part in parts.groups()]
            if len(color) != 3 or not all(type(c) is int and 0 <= c <= 255 for c in color):
                raise ValueError(f"colour {entry['color']}")
            index = IGNORED if entry.get("ignore") else len(names)
            rows.append((entry.get("value", position), tuple(color), index))
            if index != IGNORED:
                names.append(entry["name"])
                colors.append(tuple(color))
        for column, what in enumerate(("value", "color")):
            if len({row[column] for row in rows}) != len(rows):
                raise UserError(f"class table {source}: two classes have the same {what}")
        if not 2 <= len(names) < IGNORED or len(set(names)) != len(names):
            what = "needs 2 to 254 classes, each with a name of its own"
            raise UserError(f"class table {source}: {what}")
        text = json.dumps({"nearest": nearest, "classes": entries})
        return ClassTable(tuple(names), tuple(colors), tuple(rows), nearest, text)

    def __len__(self):
        return len(self.names)

    @functools.cached_property
    def palette(self):
        """(256, 3) uint8: every index's colour; black for what has none."""
        palette = np.zeros((256, 3), np.uint8)
        for _, color, index in reversed(self.rows):  # of what is ignored the first colour
            palette[index] = color
        return palette

    def from_codes(self, codes, path):
        """(H, W) integers -> (H, W) uint8 indices.

        Codes are the table's values, or 255, or positions in the table where these cannot be
        mistaken for values: no number is a value of one class and the position of another.
        """
        present = np.unique(codes)
        values = {value: index for value, _, index in self.rows}
        positions = {position: index for position, (_, _, index) in enumerate(self.rows)}
        if any(values.get(position, index) != index for position, index in positions.items()):
            positions = {}
        for table in ({IGNORED: IGNORED} | values, {IGNORED: IGNORED} | positions):
            if all(int(code) in table for code in present):
                indices = np.array([table[int(code)] for code in present], np.uint8)
                return indices[np.searchsorted(present, codes)]
        wrong = [c for c in present.tolist() if c not in values and c not in positions]
        wrong = (wrong or present.tolist())[:8]
        what = f"outside the class table, whose values are {sorted(values)}"
        raise UserError(f"{path}: label values {wrong} are {what}")

    def from_colours(self, rgb, path, nearest, strict=True):
        """(H, W, 3) uint8 -> (H, W) uint8 indices; stray colours are ignored, unless nearest.

        strict  less than 1 % of colours that are known is refused: that is no label map
        """
        packed = (rgb.astype(np.int32) << (16, 8, 0)).sum(-1)
        present, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
        present_rgb = (present[:, None] >> (16, 8, 0)) & 255  # (K, 3)
        distance = [((present_rgb - color) ** 2).sum(1) for _, color, _ in self.rows]
        distance = np.stack(distance)  # (rows, K)
        index = np.array([row[2] for row in self.rows], np.uint8)[distance.argmin(0)]
        if not nearest:
            exact = distance.min(0) == 0
            if strict and counts[exact].sum() < 0.01 * counts.sum():
                known = ", ".join(self.names[:6])
                what = "hardly a pixel has a colour of the class table"
                raise UserError(f"{path}: {what} ({known}, ...)")
            index[~exact] = IGNORED
        return index[inverse.reshape(packed.shape)]

    def from_one_hot(self, array, path):
        """(H, W, C) or (C, H, W) one-hot -> (H, W) uint8 indices; no class at all: IGNORED."""
        indices = {len(self): range(len(self)), len(self.rows): [row[2] for row in self.rows]}
        if array.shape[-1] not in indices and array.shape[0] in indices:
            array = np.moveaxis(array, 0, -1)
        if array.shape[-1] not in indices:
            what = f"no one-hot of the class table's {len(self)} classes"
            raise UserError(f"{path}: shape {array.shape} is {what}")
        index = np.array(indices[array.shape[-1]], np.uint8)[array.argmax(-1)]
        if not np.isin(array, (0, 1, 255)).all() or (array > 0).sum(-1).max() > 1:
            raise UserError(f"{path}: is no one-hot: a pixel has one class, or none")
        return np.where(array.max(-1) > 0, index, np.uint8(IGNORED))


# ------------------------------------------------------------------------------ data: files on disk

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}
ARRAY_SUFFIXES = {".npy", ".npz"}
TIFF_SUFFIXES = {".tif", ".tiff"}
LOSSY = {".jpg", ".jpeg", ".webp"}
LAYOUTS = (
    "train/1.jpg, twice as wide as high (pairs side by side); "
    "train/A/x.png + train/B/x.png (two folders); trainA/x.jpg + trainB/y.jpg (unaligned); "
    "train/rgb/7.png + train/lc/7.png (land cover); "
    "train/images/vienna1.tif + train/gt/vienna1.tif (Inria)"
)


@contextlib.contextmanager
def _decoding(path):
    """Turns whatever a decoder raises into one line that names the file."""
    Image.MAX_IMAGE_PIXELS = None  # rasters are large on purpose
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path}: claims more pixels than memory can hold") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # Pillow and numpy raise a dozen kinds, as files differ
        raise UserError(
            f"{path}: cannot be decoded ({error}): replace or remove the file"
        ) from None


@functools.cache
def _rasterio():
    """rasterio, with a bounded cache, and quiet about TIFFs that have no place on earth."""
    os.environ.setdefault("GDAL_CACHEMAX", "256")  # MB of decoded blocks
    import rasterio

    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    return rasterio


@functools.cache
def _say_once(text):
    print(text, file=sys.stderr)


class Raster:
    """A picture on disk, or with a ClassTable a label map, that is read by windows.

    Label maps are array files, or images of indices, of code values or of class colours. A TIFF
    of any size is read piece by piece; other files lie in memory from the first window on, and
    may have 2^28 pixels (16384 x 16384). Photographs are turned upright as EXIF says.

    height, width  in pixels
    tiff           rasterio's dataset, else None
    """

    def __init__(self, path, table=None):
        self.path, self.table, self.tiff, self._whole = Path(path), table, None, None
        with _decoding(path):
            if self.path.suffix.lower() in TIFF_SUFFIXES:
                self._open_tiff()
            elif self.path.suffix.lower() in ARRAY_SUFFIXES:
                sides = list(_load_array(path, mmap_mode="r").shape)
                while len(sides) > 2:  # one-hot, or an axis of length 1
                    sides.pop(-1 if sides[-1] in (1, len(table), len(table.rows)) else 0)
                self.height, self.width = sides
            else:
                with Image.open(path) as image:
                    sides = image.size[::-1]
                    sideways = _orientation(image) >= 5
                self.height, self.width = sides[::-1] if sideways else sides
            if not self.tiff and self.height * self.width > 2**28:
                remedy = f"gdal_translate {self.path.name} {self.path.stem}.tif"
                what = f"{self.width}x{self.height} pixels are too many for its format: {remedy}"
                raise UserError(f"{path}: {what}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.tiff:
            self.tiff.close()

    def read(self, top=0, left=0, height=None, width=None):
        """A window, or as much of it as there is: (H, W, 3) uint8, or (H, W) class indices."""
        bottom = self.height if height is None else min(top + height, self.height)
        right = self.width if width is None else min(left + width, self.width)
        with _decoding(self.path):
            if self.tiff:
                return self._read_tiff(top, left, bottom, right)
            if self._whole is None:
                self._whole = self._read_labels() if self.table else self._read_picture()
            return self._whole[top:bottom, left:right]

    def padded(self, top, left, height, width):
        """A window (height, width, ...), mirrored at the edges of the raster."""
        return mirrored(self.read(top, left, height, width), height, width)

    def _read_picture(self):
        with Image.open(self.path) as image:
            if image.mode.startswith(("I", "F")) or ";16" in str(image.tile):
                remedy = "convert it to 8 bits, with limits of your choice"
                raise UserError(f"{self.path}: has more than 8 bits a channel: {remedy}")
            if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBA", "LA", "PA"):
                _say_once(f"images are {image.mode}: converted to RGB, without any transparency")
            turn = _TURNS.get(_orientation(image))
            rgb = image.convert("RGB")
            return np.asarray(rgb.transpose(Image.Transpose[turn]) if turn else rgb)

    def _read_labels(self):
        table, path = self.table, self.path
        if path.suffix.lower() in ARRAY_SUFFIXES:
            array = _load_array(path)
            if array.ndim == 3 and 1 not in (array.shape[0], array.shape[-1]):
                return table.from_one_hot(array, path)
            codes = array.astype(np.int64)
            if not (array == codes).all():
                raise UserError(f"{path}: holds fractions, which are no class indices")
            return table.from_codes(codes.reshape(self.height, self.width), path)
        with Image.open(path) as image:
            if image.mode == "P" and _palette_is_of(np.asarray(image.convert("RGB")), table):
                return table.from_colours(np.asarray(image.convert("RGB")), path, False)
            if image.mode in ("P", "1", "L", "I", "I;16", "I;16B", "I;16L"):
                return table.from_codes(np.asarray(image).astype(np.int64), path)
            lossy = table.nearest or image.format in ("JPEG", "WEBP")
            return table.from_colours(np.asarray(image.convert("RGB")), path, lossy)

    def _open_tiff(self):
        if not self.path.is_file():
            raise FileNotFoundError
        self.tiff = _rasterio().open(self.path)
        self.height, self.width, kinds = self.tiff.height, self.tiff.width, self.tiff.dtypes
        integers = self.tiff.count == 1 and kinds[0].strip("u").startswith("int")
        if set(kinds) != {"uint8"} and not (self.table and integers):
            scale = "" if self.table else " -scale LOW HIGH 0 255"
            remedy = f"gdal_translate -ot Byte{scale} {self.path.name} {self.path.stem}_8bit.tif"
            raise UserError(f"{self.path}: holds {kinds[0]} values, not 8 bits a channel: {remedy}")
        if self.tiff.count not in (1, 3) and not self.table:
            which = "first three are taken as RGB" if self.tiff.count > 3 else "first counts"
            _say_once(f"images have {self.tiff.count} bands: the {which}")
        self._palette, lossy = None, str(self.tiff.compression) == "Compression.jpeg"
        self._nearest = lossy or bool(self.table and self.table.nearest)
        if self.tiff.count == 1 and self.tiff.colorinterp[0].name == "palette":
            colors = self.tiff.colormap(1)
            self._palette = np.array([colors.get(k, (0, 0, 0))[:3] for k in range(256)], np.uint8)
        if self.table and (self._palette is not None or self.tiff.count >= 3):
            top, left = max(0, self.height // 2 - 512), max(0, self.width // 2 - 512)
            bottom, right = min(top + 1024, self.height), min(left + 1024, self.width)
            middle = self._cut(top, left, bottom, right)
            if self._palette is None:  # a photograph is refused here
                self.table.from_colours(np.moveaxis(middle, 0, -1), self.path, self._nearest)
            elif not _palette_is_of(self._palette[middle[0]], self.table):
                self._palette = None  # its numbers are what counts

    def _cut(self, top, left, bottom, right):
        bands = (1, 2, 3) if self.tiff.count >= 3 else (1,)
        return self.tiff.read(bands, window=((top, bottom), (left, right)))

    def _read_tiff(self, top, left, bottom, right):
        bands = self._cut(top, left, bottom, right)  # (1 or 3, H, W)
        if self._palette is not None:
            bands = np.moveaxis(self._palette[bands[0]], -1, 0)
        pixels = np.moveaxis(bands, 0, -1)  # (H, W, 1 or 3)
        if not self.table:
            return np.repeat(pixels, 3, 2) if len(bands) == 1 else np.ascontiguousarray(pixels)
        if len(bands) == 3:
            indices = self.table.from_colours(pixels, self.path, self._nearest, strict=False)
        else:
            codes, nothing = bands[0].astype(np.int64), self.tiff.nodata
            if nothing is not None and nothing not in {value for value, _, _ in self.table.rows}:
                codes[codes == nothing] = IGNORED
            indices = self.table.from_codes(codes, self.path)
        if self.masked and (len(bands) == 3 or self.tiff.nodata is None):
            valid = self.valid(top, left, *indices.shape)
            indices = np.where(valid, indices, np.uint8(IGNORED))
        return indices

    @functools.cached_property
    def masked(self):
        """Whether some pixels of a TIFF may hold no data."""
        flags = self.tiff.mask_flag_enums if self.tiff else []
        return not all("all_valid" in (flag.name for flag in band) for band in flags)

    def valid(self, top, left, height, width):
        """Where a window holds data, (height, width) bool; None where every pixel does."""
        if not self.masked:
            return None
        window = (top, top + height), (left, left + width)
        return self.tiff.dataset_mask(window=window) > 0


def mirrored(pixels, height, width):
    """(H, W, ...) pixels at the top left of (height, width, ...), mirrored at bottom and right."""
    missing = [(0, height - pixels.shape[0]), (0, width - pixels.shape[1])]
    return np.pad(pixels, missing + [(0, 0)] * (pixels.ndim - 2), "symmetric")


# EXIF's orientations 2 to 8: how to turn a photograph upright
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_TURNS = dict(enumerate(_TURNS.split(), 2))


def _orientation(image):
    """EXIF's orientation of an open image, 1 to 8; cameras write it in JPEG files."""
    return image.getexif().get(274, 1) if image.format in ("JPEG", "MPO", "WEBP") else 1


def _load_array(path, **how):
    """The array of a .npy file, or the first one of a .npz file."""
    array = np.load(path, **how)
    array = array[array.files[0]] if isinstance(array, np.lib.npyio.NpzFile) else array
    if array.ndim not in (2, 3):
        what = "(H, W), or one-hot (H, W, C) or (C, H, W) is needed"
        raise UserError(f"{path}: holds an array of shape {array.shape}: {what}")
    return array


def _palette_is_of(rgb, table):
    """Whether most of the colours that a palette image (H, W, 3) uses are the class table's."""
    used = np.unique(rgb.reshape(-1, 3), axis=0)
    known = {color for _, color, _ in table.rows}
    return 2 * len(known & set(map(tuple, used.tolist()))) > len(used)


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of one split: two lists of files, A and B.

    paired   A[i] and B[i] show the same place
    halves   A[i] and B[i] are the left and the right half of one file
    classes  the ClassTable of B when B holds label maps, else None
    """

    root: Path
    layout: str
    name: str
    A: list
    B: list
    paired: bool
    halves: bool
    classes: ClassTable | None


def _files(folder, labels=False):
    """The images of a folder, and for labels arrays; says how many files are of other kinds."""
    suffixes = IMAGE_SUFFIXES | (ARRAY_SUFFIXES if labels else set())
    seen = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    found = [path for path in seen if path.suffix.lower() in suffixes]
    for path in found:
        if not path.is_file():
            what = "is no file (a link to nothing, a pipe or a folder): remove it"
            raise UserError(f"{path}: {what}")
    others = [path for path in seen if path not in set(found) and path.is_file()]
    if others:
        endings = ", ".join(sorted({path.suffix or path.name for path in others})[:4])
        _say_once(f"{folder}: {len(others)} file(s) of other kinds ({endings}) are left out")
    return found


def _match(a, b, where):
    """Two lists of files matched by stem; refuses partners that are missing or double."""
    stems_a, stems_b = ({path.stem: path for path in paths} for paths in (a, b))
    lone = sorted(set(stems_a) ^ set(stems_b))
    if lone:
        path = stems_a.get(lone[0]) or stems_b.get(lone[0])
        counts = f"{len(a)} images on one side, {len(b)} on the other"
        raise UserError(f"{where}: {counts}; {path} has no partner")
    if len(stems_a) != len(a) or len(stems_b) != len(b):
        raise UserError(f"{where}: two files in one folder have the same name but for their ending")
    return list(stems_a.values()), [stems_b[stem] for stem in stems_a]


def find_images(data, split, lc_classes=""):
    """Recognises the layout of a dataset directory and lists "train", "val" or "test" as a Split.

    The validation split is val, or test where there is no val; in the Inria layout images 1-5 of
    each city. B is taken for label maps in the layouts land cover and Inria, with a classes.json
    in data, or with lc_classes; "pictures" takes it for pictures all the same.
    """
    root = Path(data)
    if not root.is_dir():
        what = "is a file, not a directory" if root.is_file() else "no such directory"
        hint = "--data also tells a checkpoint where its data lies now"
        raise UserError(f"--data {root}: {what} ({hint})")
    found = "binary" if (root / "train" / "gt").is_dir() else ""
    if (root / "classes.json").is_file():
        found = str(root / "classes.json")
    table = ClassTable.load(lc_classes or found)
    if table and found and (theirs := ClassTable.load(found)) and theirs.rows != table.rows:
        _say_once(f"{found}: is another class table than the one in use ({', '.join(table.names)})")
    names = {"val": ("val", "validation", "test", "train")}.get(split, (split,))
    for name in names:
        folder, inria = root / name, not (root / "val" / "gt").is_dir()
        layouts = {
            "unaligned": (root / f"{name}A", root / f"{name}B"),
            "two folders": (folder / "A", folder / "B"),
            "two folders ": (folder / "a", folder / "b"),
            "land cover": (folder / "rgb", folder / "lc"),
            "Inria": (folder / "images", folder / "gt"),
        }
        if split == "val" and name == "train":  # only Inria's validates on some of train
            layouts = {"Inria": layouts["Inria"]}
        for layout, folders in layouts.items():
            if not all(side.is_dir() for side in folders):
                continue
            labels = table is not None or layout in ("land cover", "Inria")
            a, b = _files(folders[0]), _files(folders[1], labels)
            if layout == "Inria" and name == "train" and inria:
                a, b = ([p for p in x if _validates(p) == (split == "val")] for x in (a, b))
                name = "train" if split == "train" else "train, images 1-5 of each city"
            for side, files in zip(folders, (a, b), strict=True):
                if not files:
                    raise UserError(f"{side}: no images in split {name}")
            if layout != "unaligned":
                a, b = _match(a, b, f"{root}, split {name}")
            if layout == "land cover" and table is None and lc_classes != "pictures":
                remedy = f"write {root}/classes.json or pass --lc-classes s2glc"
                raise UserError(f"{root}: label maps need a class table: {remedy}")
            return Split(root, layout.strip(), name, a, b, layout != "unaligned", False, table)
        if (
            (name == "train") == (split == "train")
            and folder.is_dir()
            and (files := _files(folder))
        ):
            return Split(root, "side by side", name, files, files, True, True, table)

    def has(*names):
        return any((root / name).is_dir() for name in names)

    if split == "train" and has("val", "test", "valA", "testA"):
        raise UserError(f"{root}: no training split: put images in train")
    if split == "val" and has("train", "trainA"):
        remedy = "put some of the images in val (laid out like train), or in test"
        raise UserError(f"{root}: no validation split: {remedy}")
    if split == "test" and has("train", "trainA", "val", "valA"):
        raise UserError(f"{root}: no test split: leave --split out")
    raise UserError(f"{root}: no layout that is known here; known are: {LAYOUTS}")


def _validates(path):
    """Whether an image of Inria's is one that its authors keep for validation."""
    return bool(re.fullmatch(r"(austin|chicago|kitsap|tyrol-w|vienna)[1-5]", path.stem))


# -------------------------------------------------------------------------- data: decoded just once


def cache_folder(cfg):
    """Where decoded images and demo worlds lie: --cache, or cache/ beside the run folder."""
    return Path(cfg.cache) if cfg.cache else Path(cfg.out or "runs/run").parent / "cache"


def source(cfg):
    """The directory of the images: --data, or the demo world's."""
    return cfg.data or demo_world(cache_folder(cfg), cfg.demo)


def sum_of(path, length, piece=2**24):
    """A checksum of the first `length` bytes of a file: 4 bytes, from CRC-32s of its pieces.

    In threads, outside the interpreter lock: some gigabytes a second.
    """

    def crc(first):
        with open(path, "rb") as file:
            file.seek(first)
            return zlib.crc32(file.read(min(piece, length - first)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = list(pool.map(crc, range(0, length, piece)))
    return zlib.crc32(np.array(sums, "<u4").tobytes()).to_bytes(4, "little")


def check_sum(path):
    """Raises a ValueError if a store's last four bytes are not the checksum of all before them."""
    length = path.stat().st_size - 4
    with open(path, "rb") as file:
        file.seek(max(0, length))
        written = file.read()
    if length < 0 or written != sum_of(path, length):
        raise ValueError("is damaged")


class ImageStore:
    """A split's images, decoded, cut and resized once, in a memory-mapped file that stays.

    cfg       its data, demo, lc_classes, patch (0: whole images) and cache
    split     "train", "val" or "test"
    side      every image, or patch, is resized to side x side (bicubic; labels nearest)
    smallest  images, or patches, of a smaller side than this are refused

    A        (N, 3, side, side) uint8
    B        (M, 3, side, side) uint8, or (M, 1, side, side) uint8 class indices; M = N if paired
    records  (N, 3 + 3 or 1, side, side) uint8, A and B one after the other, if paired; else None

    The file's name is a hash of the list of files, their sizes and times, and every parameter.
    It is written aside and renamed, so that it is whole or absent, and ends with a checksum.
    """

    def __init__(self, cfg, split, side, smallest=0):
        self.cache = cache_folder(cfg)
        self.split = find_images(source(cfg), split, cfg.lc_classes)
        if split == "train" and cfg.max_images:
            a, b = self.split.A, self.split.B
            a, b = ([x[k] for k in spread(cfg.max_images, len(x))] for x in (a, b))
            self.split = dataclasses.replace(self.split, A=a, B=b)
        self.classes, self.paired = self.split.classes, self.split.paired
        self.side, self.patch, self.smallest = side, cfg.patch, smallest
        self.records = None
        if self.paired:
            self.records = self._open(list(zip(self.split.A, self.split.B, strict=True)), "AB")
            self.A, self.B = self.records[:, :3], self.records[:, 3:]
        else:
            self.A = self._open([(path, None) for path in self.split.A], "A")
            self.B = self._open([(None, path) for path in self.split.B], "B")
        if rank() == 0:
            print(self._about(), file=sys.stderr)

    def _about(self):
        """What was found, on one line; refuses label maps without any class."""
        split = self.split
        text = f"{split.root}: {split.layout}, split {split.name}: {len(split.A)}"
        text += " files" if self.paired else f" + {len(split.B)} files"
        if self.patch:
            text += f" cut into {len(self.A)} patches of {self.patch}"
        if not self.classes:
            return text
        ignored = np.mean(self.B[spread(100, len(self.B))] == IGNORED)
        if ignored == 1 and all((image == IGNORED).all() for image in self.B):
            what = "no pixel has a class: check the class table"
            raise UserError(f"{split.root}, split {split.name}: {what}")
        text += f", B labels of {len(self.classes)} classes"
        return text + (f", {ignored:.0%} of the pixels ignored" if ignored >= 0.005 else "")

    def histograms(self, most=1000):
        """How often each level, or class, occurs: {"A": (3, 256), "B": (3 or 1, 256)} int64.

        Beside pairs' K classes also each level: "A of classes" (K, 3, 256). Of `most` images,
        evenly spread, where there are more. All baselines follow from these.
        """
        counts = {}
        for name, images in (("A", self.A), ("B", self.B)):
            counts[name] = np.zeros((images.shape[1], 256), np.int64)
            for row in spread(most, len(images)):
                counts[name] += [np.bincount(x.ravel(), minlength=256) for x in images[row]]
        if self.classes and self.paired:
            by_class, channels = np.zeros(256 * 3 * 256, np.int64), np.arange(3)[:, None, None]
            for row in spread(most, len(self.A)):
                places = (self.B[row].astype(np.int64) * 3 + channels) * 256 + self.A[row]
                by_class += np.bincount(places.ravel(), minlength=len(by_class))
            counts["A of classes"] = by_class.reshape(256, 3, 256)[: len(self.classes)]
        return {name: torch.from_numpy(count) for name, count in counts.items()}

    def _open(self, pairs, what):
        table = self.classes and (self.classes.rows, self.classes.nearest)
        text = [f"{what} planar summed {self.side} {self.patch} {self.split.halves} {table}"]
        for path in filter(None, itertools.chain(*pairs)):
            stat = path.stat()
            text.append(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}")
        digest = hashlib.sha256(os.fsencode("\n".join(text))).hexdigest()[:16]
        name = re.sub(r"[^A-Za-z0-9]+", "-", self.split.name)
        path = self.cache / f"{name}-{what}-{self.side}px-{digest}.npy"
        if first_here():
            try:
                check_sum(path)
            except (FileNotFoundError, NotADirectoryError):
                self._build(pairs, path)
            except (OSError, ValueError) as error:
                print(f"{path}: {error}: decoding again", file=sys.stderr)
                self._build(pairs, path)
        wait_for_others()
        return np.load(path, mmap_mode="c")  # nothing writes; torch wants what it could write to

    def _build(self, pairs, path):
        pool = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes outside the interpreter lock
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            counts = list(pool.map(self._count, pairs))
            if sum(counts) == 0:
                raise UserError(
                    f"--patch {self.patch}: no image of {self.split.root} is that large"
                )
            ends = np.cumsum(counts)
            channels = 3 * (pairs[0][0] is not None)
            channels += (1 if self.classes else 3) * (pairs[0][1] is not None)
            self.cache.mkdir(parents=True, exist_ok=True)
            shape = int(ends[-1]), channels, self.side, self.side
            store = np.lib.format.open_memmap(aside, "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):  # Linux: a full disk says so here
                with open(aside, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, aside.stat().st_size)

            def work(k):
                first = ends[k] - counts[k]
                for row, record in enumerate(self._records(pairs[k]) if counts[k] else [], first):
                    store[row] = record

            jobs = pool.map(work, range(len(pairs)))
            about = {"unit": "file", "leave": False, "disable": None}
            for _ in tqdm(jobs, f"decoding {self.split.name}", len(pairs), **about):
                pass
            store.flush()
            with open(aside, "ab") as file:
                file.write(sum_of(aside, aside.stat().st_size))
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
            pool.shutdown(cancel_futures=True)

    def _sides(self, pair):
        """The files of a pair that are there, each with the ClassTable that it needs."""
        return [(path, (None, self.classes)[k]) for k, path in enumerate(pair) if path]

    def _count(self, pair):
        """How many records a file gives; refuses sizes that do not fit together."""
        sizes = []
        for path, table in self._sides(pair):
            with Raster(path, table) as raster:
                sizes.append((raster.width, raster.height))
        width, height = sizes[0]
        if self.split.halves:
            if width != 2 * height:
                what = f"{width}x{height} is no pair side by side, which is twice as wide as high"
                raise UserError(f"{pair[0]}: {what}")
            width = height
        elif sizes[0] != sizes[-1]:
            other = f"{pair[1]} is {sizes[1][0]}x{sizes[1][1]}"
            raise UserError(f"{pair[0]} is {width}x{height} but {other}: sizes must agree")
        if min(width, height, self.patch or width) < self.smallest:
            cut = f" cut into patches of {self.patch}" if self.patch else ""
            what = f"{width}x{height}{cut} is smaller than --size {self.smallest}"
            raise UserError(f"{pair[0] or pair[1]}: {what}")
        return (width // self.patch) * (height // self.patch) if self.patch else 1

    def _records(self, pair):
        """One file, or pair of files, cut row by row: (channels, side, side) uint8 each."""
        with contextlib.ExitStack() as stack:
            rasters = []
            for path, table in [(pair[0], None)] if self.split.halves else self._sides(pair):
                rasters.append(stack.enter_context(Raster(path, table)))
            step = self.patch or rasters[0].height
            for top in range(0, rasters[0].height - step + 1, step):
                strips = [raster.read(top, height=step) for raster in rasters]
                if self.split.halves:
                    a, b = np.split(strips[0], 2, axis=1)
                    if self.classes:
                        lossy = self.classes.nearest or pair[0].suffix.lower() in LOSSY
                        b = self.classes.from_colours(b, pair[0], lossy, not self.patch)
                    strips = [a, b]
                for patches in zip(*map(self._patches, strips), strict=True):
                    yield np.concatenate(patches)

    def _patches(self, strip):
        """The patches of a strip (H, W, 3) or (H, W), resized: (3 or 1, side, side) each."""
        labels = strip.ndim == 2
        step = self.patch or strip.shape[1]
        for left in range(0, strip.shape[1] - step + 1, step):
            cut = np.ascontiguousarray(strip[:, left : left + step])
            resized = resize(cut, (self.side, self.side), labels)
            yield resized[None] if labels else resized.transpose(2, 0, 1)

    def fingerprint(self):
        """A hash of the names and sizes of the files: it stays when a data directory moves."""
        files = [(path.name, path.stat().st_size) for path in self.split.A + self.split.B]
        return hashlib.sha256(repr(files).encode()).hexdigest()[:16]

    def window(self):
        """How many source pixels an image's side had: --patch, or the median of 100 images."""
        if self.patch:
            return self.patch
        sides = []
        for k in spread(100, len(self.split.A)):
            with Raster(self.split.A[k]) as raster:
                sides.append(min(raster.height, raster.width))
        return int(np.median(sides))


class Rows:
    """Rows of a uint8 array (N, C, side, side), taken in batches onto the device.

    On a GPU the array lives there when it fits in share of the free memory; otherwise a
    background thread gathers the next batches into pinned memory. On the CPU rows are views into
    the memory-mapped file: nothing is copied before its crop is known.
    """

    def __init__(self, array, device, share=0.4):
        self.device = device
        on_cpu = device.type == "cpu"
        self.resident = on_cpu or array.size < share * torch.cuda.mem_get_info(device)[0]
        rows = torch.from_numpy(array)
        self.rows = rows.to(device) if self.resident else rows

    def __len__(self):
        return len(self.rows)

    def batches(self, index):
        """index (steps, B) of rows -> yields lists of B images (C, side, side) on the device."""
        if not self.resident:
            yield from self._prefetched(index)
            return
        for rows in index.tolist():
            yield [self.rows[row] for row in rows]

    def _prefetched(self, index, ahead=4):
        def gather(rows):
            return self.rows[torch.from_numpy(rows)].pin_memory()

        with ThreadPoolExecutor(1) as background:
            jobs = collections.deque(background.submit(gather, rows) for rows in index[:ahead])
            for k in range(len(index)):
                batch = jobs.popleft().result()
                if k + ahead < len(index):
                    jobs.append(background.submit(gather, index[k + ahead]))
                yield list(batch.to(self.device, non_blocking=True))


def steps_in_epoch(count, batch_size):
    """How many batches count images give in an epoch, the same in every process."""
    world = world_size()
    if count < batch_size * world:
        what = f"--batch-size {batch_size} in {world} process(es) is more than"
        raise UserError(f"{what} the {count} training images")
    return count // (batch_size * world)


def batches_of_rank(batch_size, first, *arrays):
    """An epoch's arrays (N, ...), each as (steps, batch_size, ...) from step `first` on.

    That is this process's share of every step; what does not fill a step is left out.
    """
    for array in arrays:
        steps = steps_in_epoch(len(array), batch_size)
        whole = array[: steps * batch_size * world_size()]
        yield whole.reshape(steps, world_size(), batch_size, *array.shape[1:])[first:, rank()]


def spread(count, total):
    """`count` of `total` indices, evenly spread, in order; all of them for 0 or too many."""
    if count == 0 or count >= total:
        return np.arange(total)
    return np.arange(count) * total // count


def chunks(index, size=8):
    """An array of indices in pieces of at most `size`."""
    return np.split(index, range(size, len(index), size))


# --------------------------------------------------------------------------------- data: demo world

DEMO_CLASSES = ("grass", "field", "forest", "water", "building", "road")
_DEMO_COLORS = "170,200,120 240,220,110 40,110,50 60,110,210 190,60,50 250,250,250"
_DEMO_MAP = "233,229,222 186,210,186 203,223,172 177,208,254 222,218,212 254,254,252"
_DEMO_GROUND = "104,122,76 140,132,84 46,72,44 34,62,88 160,128,112 132,130,126"


def landscape(rng, side):
    """A procedural landscape as (satellite, map, classes).

    (side, side, 3) uint8 twice, and (side, side) uint8 indices of DEMO_CLASSES.
    """
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
    satellite = _colors(_DEMO_GROUND)[ground] + 6 * rng.normal(size=(side, side, 1)) + shade
    satellite += np.choose(ground[..., None], texture)
    drawn = _colors(_DEMO_MAP)[ground].astype(np.uint8)
    return np.clip(satellite, 0, 255).astype(np.uint8), drawn, ground


def _colors(text):
    """ "1,2,3 4,5,6" as an array of colours, (n, 3)."""
    return np.array([color.split(",") for color in text.split()]).astype(int)


def demo_world(cache, kind, train=96, val=12, side=256):
    """Writes a small dataset of landscapes under cache, once, and returns its directory.

    kind  "maps": pairs side by side, satellite | map; "landcover": rgb and lc with classes.json
    """
    root = Path(cache) / f"demo-{kind}"
    if first_here() and not root.exists():
        aside = root.with_name(f".{root.name}.{os.getpid()}")  # whole or absent
        for split, count, first in (("train", train, 0), ("val", val, 100_000)):
            about = {"unit": "image", "leave": False, "disable": None}
            for k in tqdm(range(count), f"demo world, {split}", **about):
                satellite, drawn, ground = landscape(np.random.default_rng([7, first + k]), side)
                if kind == "landcover":
                    write_image(aside / split / "rgb" / f"{k:03}.png", satellite)
                    write_image(aside / split / "lc" / f"{k:03}.png", ground)
                else:
                    both = np.concatenate([satellite, drawn], 1)
                    write_image(aside / split / f"{k:03}.png", both)
        if kind == "landcover":
            rows = zip(DEMO_CLASSES, _DEMO_COLORS.split(), strict=True)
            table = [{"name": name, "color": color} for name, color in rows]
            (aside / "classes.json").write_text(json.dumps(table))
        try:
            aside.rename(root)
        except OSError:  # another process was faster, and its world is the same
            shutil.rmtree(aside)
    wait_for_others()
    return str(root)


# -------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path, content):
    """Writes content (dicts, lists, numbers, tensors) aside, fsyncs and renames.

    Whenever path is there it is whole, the old one or the new.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        remedy = "free some space; what was saved before is kept"
        raise UserError(f"{path}: cannot be written ({reason}): {remedy}") from None
    finally:
        aside.unlink(missing_ok=True)


def load_weights(path):
    """A file of tensors, read with weights_only=True onto the CPU."""
    path = Path(path)
    if path.is_dir():
        example = path / "checkpoints" / "last.pt"
        raise UserError(f"{path}: is a directory: name a file, such as {example}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        damaged = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()
        if damaged:  # torch.load checks no sums
            raise ValueError(f"checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds on a damaged file
        reason = (str(error).splitlines() or [repr(error)])[0][:90]
        older = sorted(path.parent.glob("epoch_*.pt")) if path.name == "last.pt" else []
        older = [other for other in older if not other.samefile(path)][-1:]
        remedy = f": {older[0]} is an older one, to put in its place" if older else ""
        raise UserError(f"{path}: not a checkpoint, or a damaged one ({reason}){remedy}") from None


def load_checkpoint(path, script):
    """A checkpoint that script ("pix2pix", ...) wrote; refuses another script's."""
    content = load_weights(path)
    names = ("config", "state")
    whole = isinstance(content, dict) and all(isinstance(content.get(k), dict) for k in names)
    if not whole or "script" not in content:
        hint = "published generator weights go with --init"
        raise UserError(f"{path}: not a checkpoint of {script}.py ({hint})")
    if content["script"] != script:
        theirs = content["script"]
        raise UserError(f"{path}: written by {theirs}.py: use that script, not {script}.py")
    return content


RANKS = "buffers of ranks"


def buffers_of_ranks(state):
    """What processes other than the first have of their own: [{module: {buffer: tensor}}, ...].

    Rank 0 gets the list, for the checkpoint; weights and optimizers are the same in all.
    """
    own = {}
    for name, module in vars(state).items():
        if isinstance(module, nn.Module):
            own[name] = {key: buffer.cpu() for key, buffer in module.named_buffers()}
    gathered = [None] * world_size() if rank() == 0 else None
    dist.gather_object(own, gathered)
    return gathered[1:] if rank() == 0 else []


def state_dict(state):
    """What a checkpoint holds of a State: modules and optimizers by their state_dict.

    Tensors and numbers are kept as such; a module that has nothing to keep is left out.
    """
    kept = {}
    for name, value in vars(state).items():
        if hasattr(value, "state_dict"):
            content = value.state_dict()
            if content:
                kept[name] = content
        elif isinstance(value, (torch.Tensor, int, float)):
            kept[name] = value
    return kept


def restore(state, checkpoint, path):
    """Puts a checkpoint's state back into a State, in place.

    What the State lacks (an optimizer, when one only generates) is passed over; what the
    checkpoint lacks is refused. Processes other than the first take their own buffers from it.
    """
    saved = checkpoint["state"]
    for name in state_dict(state):
        if name not in saved:
            raise UserError(f"{path}: holds no {name}: written by another version of this script")
        value = getattr(state, name)
        if hasattr(value, "state_dict"):
            weights = [w for w in _tensors(saved[name]) if w.is_floating_point()]
            if not all(w.isfinite().all() for w in weights):
                raise UserError(f"{path}: its {name} has weights that are not finite")
            _load_state_dict(value, saved[name], f"{path}: its {name}")
        elif isinstance(value, torch.Tensor):
            value.copy_(saved[name])
        else:
            setattr(state, name, saved[name])
    own = saved[RANKS][rank() - 1] if rank() and RANKS in saved else {}
    for name, buffers in own.items():
        getattr(state, name).load_state_dict(buffers, strict=False)


def _load_state_dict(value, saved, what):
    """A module's or an optimizer's state, whose layout and switches stay this device's."""
    groups = [dict(group) for group in getattr(value, "param_groups", [])]
    try:
        value.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{what} does not fit the options ({reason})") from None
    for group, own in zip(getattr(value, "param_groups", []), groups, strict=True):
        rate = float(group["lr"])
        group.update({key: own[key] for key in ("lr", "fused", "capturable")})
        set_lr(value, rate)
        for parameter in group["params"]:  # fused Adam pairs elements by their place in memory
            for key, moment in value.state[parameter].items():
                if moment.shape == parameter.shape and moment.stride() != parameter.stride():
                    value.state[parameter][key] = torch.empty_like(parameter).copy_(moment)


def load_network(module, path, cfg, key, optional=False):
    """Fills a network from a file: network `key` of our checkpoint, or a published generator.

    A published generator's bare state dict is taken by position. Buffers of InstanceNorm layers
    in old files are dropped. optional: a file that holds no such network changes nothing.
    """
    content = load_weights(path)
    ours = isinstance(content, dict) and isinstance(content.get("state"), dict)
    if optional and (not ours or key not in content["state"]):
        return
    if ours:
        content = content["state"].get(key)
    tensors = isinstance(content, dict) and all(
        isinstance(value, torch.Tensor) for value in content.values()
    )
    if not tensors or not content:
        raise UserError(f"{path}: holds no network {key} and is no state dict")
    ours = module.state_dict()
    if not any("running_mean" in name for name in ours):
        buffer = re.compile("(running_mean|running_var|num_batches_tracked)$")
        content = {name: value for name, value in content.items() if not buffer.search(name)}
    options = ("generator", "norm", "size", "width", "blocks", "patch_gan", "lc_classes")
    remedy = f"check {', '.join(flag(name) for name in options if hasattr(cfg, name))}"
    if len(ours) != len(content):
        counts = f"{len(content)} tensors, but this {key} has {len(ours)}"
        raise UserError(f"{path}: {counts}: {remedy}")
    for (name, mine), (theirs, value) in zip(ours.items(), content.items(), strict=True):
        if mine.shape != value.shape:
            shapes = f"{theirs} is {tuple(value.shape)}, but our {name} is {tuple(mine.shape)}"
            raise UserError(f"{path}: {shapes}: {remedy}")
    module.load_state_dict(dict(zip(ours, content.values(), strict=True)))


# ----------------------------------------------------------------------------------- the run folder

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    SIGNALS.append(signal.SIGHUP)  # nohup ignores it
REMEDY = "try a lower --lr, --precision fp32, or look for odd images in the data"


class Run:
    """The folder of one training run: config.json, metrics.csv, losses.png, samples, checkpoints.

    cfg, checkpoint  as begin gave them
    data             the training data: its len() images are an epoch, its store has histograms
    scores           names of the measures that close an epoch's last row of metrics.csv

    epoch, batch, step  where training stands: epochs done, batches done in this one, steps in all
    histograms          of the training images, which evaluations compare with
    interrupted         the number of a signal (one of SIGNALS) that asked to stop, else 0
    """

    seconds = 180  # between what is written after epochs; within one, five times as long

    def __init__(self, cfg, checkpoint, data, scores=()):
        saved = checkpoint or {}
        self.cfg, self.scores, self.out = cfg, scores, Path(cfg.out)
        self.steps_per_epoch = steps_in_epoch(len(data), cfg.batch_size)
        self.images_per_step = cfg.batch_size * world_size()
        self.epoch, self.batch, self.step = (saved.get(k, 0) for k in ("epoch", "batch", "step"))
        self.names, self.sums = saved.get("names", []), saved.get("sums")
        self.count, self.means, self.lr = saved.get("count", 0), {}, 0.0
        self.epoch_sums = saved.get("epoch_sums")
        self.histograms = saved.get("histograms") or data.store.histograms()
        self.window = saved.get("window") or data.store.window()
        self.images = data.store.fingerprint()
        changed = saved.get("images", self.images) != self.images
        if changed:  # the same place in the schedule, with the epoch from its beginning
            self.batch, self.sums, self.count, self.epoch_sums = 0, None, 0, None
        self.id = saved.get("id") or uuid.uuid4().hex[:8]
        self.clock, self.first_step, self.written = None, self.step, -math.inf
        self.interrupted, self.overdue, self.saved = 0, False, time.monotonic()
        for number in SIGNALS:
            signal.signal(number, self._interrupt)
        if rank():
            self.bar = tqdm(disable=True)
            return
        for folder in ("checkpoints", "samples"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        self._tidy()
        self._write_config()
        self.metrics = self.out / "metrics.csv"
        self.metrics.touch()
        size = self.metrics.stat().st_size
        os.truncate(self.metrics, min(saved.get("metrics_bytes", size), size) if saved else 0)
        self.tracker = _tracker(cfg, self.id) if cfg.track else None
        total = cfg.epochs * self.steps_per_epoch * self.images_per_step
        done = self.step * self.images_per_step
        self.bar = tqdm(total=total, initial=done, unit="image", dynamic_ncols=True, smoothing=0.05)
        self.say(f"run folder {self.out}")
        if changed:
            self.say(f"the images are not those of before: epoch {self.epoch + 1} begins anew")

    def _tidy(self):
        """After a process that was killed: drops its temporary files, links what it had saved."""
        ours = r"\.\d+-.+\.(json|png|html)|\..+\.pt\.\d+"
        for path in itertools.chain(self.out.glob(".*"), self.out.glob("*/.*")):
            if path.parent.name != "generated" and re.fullmatch(ours, path.name):
                path.unlink()
        folder, every = self.out / "checkpoints", self.cfg.save_every
        last, kept = folder / "last.pt", folder / f"epoch_{self.epoch:04}.pt"
        due = every and self.epoch and self.epoch % every == 0 and self.batch == 0
        if due and last.is_file() and not kept.is_file():
            _link(last, kept)

    def say(self, text):
        """A line on stderr, above the progress bar."""
        if rank() == 0:
            self.bar.write(text, file=sys.stderr)

    def _write_config(self):
        cuda = self.cfg.device == "cuda"
        packages = {package.__name__: package.__version__ for package in (torch, np)}
        about = {
            "script": self.cfg.script,
            "options": dataclasses.asdict(self.cfg),
            "versions": {"python": platform.python_version()} | packages,
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
            "processes": world_size(),
            "git_commit": _git_commit(),
            "defaults": dataclasses.asdict(type(self.cfg)()),
        }
        write_text(self.out / "config.json", json.dumps(about, indent=2))

    def _interrupt(self, number, frame):
        self.interrupted = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        if rank() == 0:
            os.write(2, b"\nstopping: this step is finished and saved first\n")

    def stopping(self):
        """Whether to save and stop; notes whether to save. Several processes agree on both, every
        ten steps.
        """
        overdue, self.overdue = time.monotonic() - self.saved > 5 * self.seconds, False
        if world_size() > 1:
            if self.step % 10:
                return False
            asked = torch.tensor([self.interrupted, int(overdue)])
            self.interrupted, overdue = reduced(asked, dist.ReduceOp.MAX).tolist()
        self.overdue = bool(overdue)
        return self.interrupted != 0

    def set_lr(self, lr, *optimizers):
        """Gives optimizers the rate lr, which is logged."""
        self.lr = lr
        for optimizer in optimizers:
            set_lr(optimizer, lr)

    def log(self, losses):
        """Takes a step's losses {name: 0-d tensor}; means are read every --log-every steps."""
        self.names = list(losses)
        values = torch.stack([value.detach().double() for value in losses.values()])
        self.sums = values if self.sums is None else self.sums.to(values.device) + values
        if self.batch == 0 or self.epoch_sums is None:
            self.epoch_sums = torch.zeros_like(values)
        self.epoch_sums = self.epoch_sums.to(values.device) + values
        self.count, self.step, self.batch = self.count + 1, self.step + 1, self.batch + 1
        self.bar.update(self.images_per_step)
        if self.step - self.first_step in (1, 4):
            self._warn_of_weeks()
        if self.step % self.cfg.log_every == 0 and self.batch < self.steps_per_epoch:
            self._flush({})  # an epoch's last row waits for its scores

    def epoch_mean(self, name):
        """The mean of a loss over the epoch that ends, in all processes."""
        mean = reduced(self.epoch_sums) / world_size() / self.batch
        return mean[self.names.index(name)].item()

    def _warn_of_weeks(self):
        """After a few steps: how long the run takes, if that is more than two days."""
        if self.clock is None:
            self.clock = time.monotonic()
            return
        seconds = (time.monotonic() - self.clock) / 3
        left = self.cfg.epochs * self.steps_per_epoch - self.step
        days = seconds * left / 86400
        if days > 2:
            remedy = "--size 128 --width 32 --epochs 20 --max-images 400 would make it hours"
            self.say(f"{seconds:.2g} s a step: this run takes {days:.0f} days here; {remedy}")

    def _flush(self, scores):
        means = reduced(self.sums / self.count) / world_size()
        self.means = dict(zip(self.names, means.tolist(), strict=True))
        values = self.means | scores
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            self._refuse(", ".join(bad))
        if rank() == 0:
            header = ["epoch", "step", "lr", *self.means, *self.scores]
            numbers = [*self.means.values(), *(scores.get(name) for name in self.scores)]
            row = [self.epoch + 1, self.step, f"{self.lr:.8g}"]
            row += ["" if number is None else f"{number:.8g}" for number in numbers]
            with open(self.metrics, "a", newline="") as file:
                csv.writer(file).writerows([row] if file.tell() else [header, row])
            if self.tracker:
                self.tracker(values | {"lr": self.lr}, {}, self.step)
            shown = {name: f"{value:.3g}" for name, value in self.means.items()}
            self.bar.set_postfix(shown, refresh=False)
        self.sums, self.count = None, 0

    def _refuse(self, what):
        last = self.out / "checkpoints" / "last.pt"
        kept = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint yet"
        raise UserError(f"{what} not finite by step {self.step}: stopped; {kept}; {REMEDY}")

    def end_epoch(self, state, scores, columns):
        """Closes an epoch: its last row with scores {name: value}, and what is written on a clock.

        That is grid, plot and checkpoint: every few minutes, as an epoch may take a second, after
        the first and the last epoch, and where --save-every says so.

        columns  {title: (B, 3, H, W) in [-1, 1]}, the sample grid from left to right
        """
        self._flush(scores)
        self.epoch, self.batch = self.epoch + 1, 0
        values = (self.means | scores).items()
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values)
        self.say(f"epoch {self.epoch}/{self.cfg.epochs}: {shown}")
        keep = self.cfg.save_every > 0 and self.epoch % self.cfg.save_every == 0
        waited = time.monotonic() - self.written > self.seconds
        if not of_rank_0(waited or keep or self.epoch == self.cfg.epochs):
            return
        if rank() == 0:
            save_grid(self.out / "samples" / f"epoch_{self.epoch:04}.png", columns)
            plot_metrics(read_metrics(self.metrics), self.out / "losses.png")
            write_page(self.out)
            if self.tracker:
                self.tracker({}, columns, self.step)
        self.save(state)
        if rank() == 0 and keep:
            kept = self.out / "checkpoints" / f"epoch_{self.epoch:04}.pt"
            _link(self.out / "checkpoints" / "last.pt", kept)
        self.written = time.monotonic()

    def save(self, state):
        """Writes checkpoints/last.pt, unless a weight is not finite: then the old one stays."""
        self.saved, content = time.monotonic(), state_dict(state)
        tensors = [t for t in _tensors(content) if t.is_floating_point() and t.numel()]
        finite = torch.stack([t.detach().abs().max().isfinite().cpu() for t in tensors])
        if not finite.all():
            self._refuse("weights")
        if world_size() > 1:
            content[RANKS] = buffers_of_ranks(state)
        if self.sums is not None:  # of all processes, for all of them to go on with
            self.sums = reduced(self.sums) / world_size()
        self.epoch_sums = reduced(self.epoch_sums) / world_size()
        if rank() == 0:
            about = {
                "script": self.cfg.script,
                "config": dataclasses.asdict(self.cfg),
                "world": world_size(),
                "metrics_bytes": self.metrics.stat().st_size,
                "state": content,
            }
            names = ("epoch", "batch", "step", "names", "sums", "count", "epoch_sums")
            names += ("histograms", "window", "images", "id")
            about |= {name: getattr(self, name) for name in names}
            save_checkpoint(self.out / "checkpoints" / "last.pt", about)

    def save_if_due(self, state):
        """In the middle of an epoch: saves every quarter of an hour, and after a signal, which then
        ends the program with 128 + its number.
        """
        stopping = self.stopping()
        if not stopping and not self.overdue:
            return
        self.save(state)
        if rank() == 0:
            plot_metrics(read_metrics(self.metrics), self.out / "losses.png")
        if not stopping:
            return
        self.say(f"stopped at step {self.step}: go on with --resume --out {self.out}")
        self.bar.close()
        sys.exit(128 + self.interrupted)

    def close(self):
        """Ends the run: the signals are given back; an evaluation may follow."""
        self.bar.close()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def write_page(folder):
    """index.html of a run folder, and of the folder around it if that is called runs.

    They are pages/run.html and pages/runs.html with the data in them, and open from disk.
    """
    templates = Path(__file__).parent / "pages"
    if not templates.is_dir():  # a script and common.py that were copied alone
        return
    folder = folder.resolve()
    pages = [(folder, "run.html", _page_data(folder, 2000))]
    if folder.parent.name == "runs":
        found = sorted(path.parent for path in folder.parent.glob("*/config.json"))
        pages.append((folder.parent, "runs.html", [_page_data(run, 300) for run in found]))
    for place, name, data in pages:
        text = json.dumps(data).replace("<", "\\u003c")  # whatever a folder is called
        page = (templates / name).read_text().replace("__DATA__", text)
        write_text(place / "index.html", page)


def _page_data(folder, most):
    """What a page shows of a run folder; of metrics.csv at most so many rows, evenly spread."""
    about = json.loads((folder / "config.json").read_text())
    rows = read_metrics(folder / "metrics.csv")
    epochs = {row["epoch"]: k for k, row in enumerate(rows)}  # its last row has the scores
    rows = [rows[k] for k in sorted({*spread(most, len(rows)).tolist(), *epochs.values()})]
    names = [name for name in (rows[0] if rows else {}) if name not in ("epoch", "step")]
    evaluation = folder / "evaluation.json"
    options, defaults = about["options"], about.get("defaults", {})
    return about | {
        "name": folder.name,
        "epoch": int(rows[-1]["epoch"]) if rows else 0,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "samples": sorted(path.name for path in (folder / "samples").glob("epoch_*.png")),
        "steps": [int(row["step"]) for row in rows],
        "columns": {k: [float(row[k]) if row[k] else None for row in rows] for k in names},
        "evaluation": json.loads(evaluation.read_text()) if evaluation.is_file() else None,
        "defaults": defaults,
        "changed": {k: v for k, v in options.items() if v != defaults.get(k) and k not in _PLACES},
    }


_PLACES = ("out", "cache", "device", "lc_classes")  # say nothing about the model


def _tensors(content):
    """Every tensor in nested dicts."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)


def _link(source, target):
    """A second name for a file that will only ever be replaced, never changed."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy(source, target)


def _git_commit():
    """The commit of these scripts, or None where they are not in a repository."""
    call = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "--quiet", "HEAD"]
    with contextlib.suppress(OSError):
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None


def _tracker(cfg, run_id):
    """tracker(scalars, images, step): TensorBoard, which Weights & Biases copies if asked to."""
    try:
        if cfg.track == "wandb":
            import wandb

            about = {"project": f"gan-{cfg.script}", "dir": cfg.out, "id": run_id}
            config = dataclasses.asdict(cfg)
            wandb.init(**about, config=config, resume="allow", sync_tensorboard=True)
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        packages = "tensorboard wandb" if cfg.track == "wandb" else "tensorboard"
        raise UserError(f"--track {cfg.track}: not installed: pip install {packages}") from None
    writer = SummaryWriter(str(Path(cfg.out) / "tensorboard"))

    def track(scalars, images, step):
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        if images:
            writer.add_image("samples", grid(images), step, dataformats="HWC")
        writer.flush()

    return track


def read_metrics(path):
    """The rows of a metrics.csv as dicts of text; [] where there is no file."""
    if not Path(path).is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _pyplot():
    """matplotlib, which is slow to import, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save_figure(figure, path):
    """Writes a figure aside, and renames: whole or absent."""
    figure.tight_layout()
    with whole_or_absent(path) as aside:
        figure.savefig(aside, dpi=90)
    _pyplot().close(figure)


def plot_metrics(rows, path):
    """losses.png: one panel for each column of metrics.csv, over steps."""
    pyplot = _pyplot()
    names = [name for name in (rows[0] if rows else {}) if name not in ("epoch", "step")]
    height = -(-len(names) // 3)
    figure, axes = pyplot.subplots(height, 3, figsize=(13, 2.6 * height), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        measured = [row for row in rows if row[name]]
        steps = [int(row["step"]) for row in measured]
        values = [float(row[name]) for row in measured]
        axis.plot(steps, values, linewidth=1, marker="o" if len(steps) == 1 else "")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    _save_figure(figure, path)


def plot_confusion(confusion, names, path):
    """A confusion matrix (classes, classes) as a picture: rows are the target's classes.

    Cells are shares of their row.
    """
    pyplot = _pyplot()
    share = (confusion / confusion.sum(1, keepdim=True).clamp_min(1)).cpu().numpy()
    side = 0.6 * len(names)
    figure, axis = pyplot.subplots(figsize=(2.5 + side, 2 + side))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set(xlabel="generated", ylabel="target")
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", parse_math=False)
    axis.set_yticks(range(len(names)), names, parse_math=False)
    for row, column in np.ndindex(*share.shape):
        color = "white" if share[row, column] > 0.5 else "black"
        text = f"{share[row, column]:.2f}"
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    _save_figure(figure, path)


# ----------------------------------------------------------------------------------------- pictures


def to_bytes(images):
    """Images in [-1, 1] -> uint8 0..255, the same fixed scale for every picture."""
    levels = (images.detach().float() + 1) * 127.5
    return levels.round().clamp(0, 255).to(torch.uint8)


def from_bytes(images):
    """Pictures (B, 3, H, W) uint8 -> float32 in [-1, 1]; the inverse of to_bytes."""
    levels = images.to(torch.float32, memory_format=torch.contiguous_format)
    return levels.sub_(127.5).mul_(1 / 127.5)


def one_hot(index, classes):
    """Class indices (B, H, W) uint8 -> (B, classes, H, W) float32, all zeros where ignored."""
    each = torch.arange(classes, dtype=torch.uint8, device=index.device).view(1, -1, 1, 1)
    maps = torch.empty(len(index), classes, *index.shape[1:], device=index.device)
    return torch.eq(index[:, None], each, out=maps)  # straight into floats: ten times as fast


def class_index(maps):
    """One-hot maps (B, classes, H, W) -> class indices (B, H, W); IGNORED where all are zero."""
    return torch.where(maps.sum(1) > 0, maps.argmax(1), IGNORED)


def draw(index, classes):
    """Class indices (B, H, W) in the colours of a ClassTable: (B, 3, H, W) in [-1, 1]."""
    flat = _palette_on(classes, index.device).index_select(1, index.flatten().int())
    return flat.view(3, *index.shape).transpose(0, 1).contiguous()


@functools.cache
def _palette_on(classes, device):
    """A ClassTable's palette as a tensor (3, 256) in [-1, 1]."""
    return from_bytes(torch.from_numpy(classes.palette.T)).to(device)


def as_tensor(image, device):
    """An (H, W) or (H, W, 3) uint8 array -> (1, H, W) or (1, 3, H, W) uint8 on the device."""
    planes = np.moveaxis(image, -1, 0) if image.ndim == 3 else image
    return torch.from_numpy(np.ascontiguousarray(planes))[None].to(device)


def as_array(images):
    """The first of (B, 3, H, W) in [-1, 1] -> (H, W, 3) uint8 array."""
    return to_bytes(images[0]).permute(1, 2, 0).cpu().numpy()


def resize(image, size, labels=False):
    """An (H, W, 3) picture, or (H, W) label map, at size (width, height): bicubic, or nearest."""
    how = Image.Resampling.NEAREST if labels else Image.Resampling.BICUBIC
    return np.array(Image.fromarray(image).resize(size, how))


def grid(columns):
    """{title: (B, 3, H, W) in [-1, 1]} -> (height, width, 3) uint8: a row an image, with titles."""
    pictures = [to_bytes(images).cpu().permute(0, 2, 3, 1).numpy() for images in columns.values()]
    count, height, width = pictures[0].shape[:3]
    gap, head = 4, 16
    size = len(pictures) * (width + gap) + gap, head + count * (height + gap)
    sheet = Image.new("RGB", size, "white")
    text = ImageDraw.Draw(sheet)
    for k, (title, column) in enumerate(zip(columns, pictures, strict=True)):
        left = gap + k * (width + gap)
        text.text((left, 2), title, fill="black")
        for row, picture in enumerate(column):
            sheet.paste(Image.fromarray(picture), (left, head + row * (height + gap)))
    return np.asarray(sheet)


def save_grid(path, columns):
    """Writes grid(columns) as an image file."""
    write_image(path, grid(columns))


# ----------------------------------------------------------------------------------------- measures


def measure_images(fake, target, brief=False):
    """Measures of pictures: two (B, C, H, W) uint8 tensors -> {name: (B,) float64}.

    psnr         10 log10(255^2 / MSE), in dB
    mse          mean squared error, in squared levels 0-255; brief: these two alone
    ssim         Wang et al. 2004 (doi:10.1109/TIP.2003.819861), eq. 13: Gaussian 11x11 window,
                 sigma 1.5, mean over channels and places, no padding
    rmse_rgb     root of the squared error summed over channels, the mean over pixels, and
    accuracy_5   share of pixels whose largest channel difference is less than 5 levels,
    accuracy_10  or than 10: Fu et al. 2019 (arXiv:1809.05852)
    """
    fake, target = fake.double(), target.double()
    error = (fake - target).abs()
    mse = error.square().mean((1, 2, 3))
    psnr = 10 * torch.log10(255**2 / mse.clamp_min(1e-10))
    if brief:
        return {"psnr": psnr, "mse": mse}
    worst = error.amax(1)
    return {
        "psnr": psnr,
        "ssim": structural_similarity(fake, target),
        "mse": mse,
        "rmse_rgb": (error.square().sum(1).mean((1, 2))).sqrt(),
        "accuracy_5": (worst < 5).double().mean((1, 2)),
        "accuracy_10": (worst < 10).double().mean((1, 2)),
    }


def structural_similarity(fake, target):
    """SSIM, as measure_images says: (B, C, H, W) float64 levels twice -> (B,)."""
    x = torch.arange(11, dtype=torch.float64, device=fake.device) - 5
    window = torch.exp(-x.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(images):
        flat = images.reshape(-1, 1, *images.shape[2:])
        return F.conv2d(F.conv2d(flat, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    mean_f, mean_t = blur(fake), blur(target)
    var_f, var_t = blur(fake * fake) - mean_f**2, blur(target * target) - mean_t**2
    cov = blur(fake * target) - mean_f * mean_t
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_f * mean_t + c1) / (mean_f**2 + mean_t**2 + c1)
    structure = (2 * cov + c2) / (var_f + var_t + c2)
    return (luminance * structure).reshape(len(fake), -1).mean(1)


def confusion_matrix(predicted, target, classes):
    """Counts of pixels, (classes, classes) int64, rows the target's class; IGNORED is left out."""
    seen = target != IGNORED
    pairs = target[seen].long() * classes + predicted[seen].long()
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def measure_labels(confusion):
    """Pixel accuracy, mean class accuracy and mean IoU, over the classes that the target has."""
    confusion = confusion.double()
    right, target, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    occurs = target > 0
    return {
        "pixel_accuracy": (right.sum() / confusion.sum()).item(),
        "class_accuracy": (right / target)[occurs].mean().item(),
        "mean_iou": (right / (target + predicted - right))[occurs].mean().item(),
    }


class Scores:
    """Measures of several guesses (a model's, its baselines'), gathered batch by batch.

    brief       of pictures those alone that are logged after every epoch
    confusions  {(row, by): confusion matrix} of what add_labels got
    """

    def __init__(self, brief=False):
        self.brief, self.sums, self.confusions = brief, {}, {}  # {row: {name: (sum, count)}}

    def _add(self, row, name, values, where=1.0):
        """Adds values to a mean, each weighing as much as `where` says."""
        cells = self.sums.setdefault(row, {})
        weights = torch.ones_like(values) * where
        amounts = torch.stack([(values * weights).sum(), weights.sum()]).cpu()
        cells[name] = cells.get(name, 0) + amounts

    def add_images(self, row, guess, target):
        """Pictures (B, 3, S, S) in [-1, 1], by measure_images: means over images."""
        for name, values in measure_images(to_bytes(guess), to_bytes(target), self.brief).items():
            self._add(row, name, values)

    def add_edit(self, row, guess, target, source, mask):
        """Edited pictures (B, 3, S, S) in [-1, 1]; mask (B, 1, S, S) says where the edit is.

        L1 in levels 0-255 and PSNR in dB, inside and outside the edit; inside, L1 to the source.
        """
        guess, target, source = (to_bytes(x).double() for x in (guess, target, source))
        for area, where in (("inside", mask.double()), ("outside", 1 - mask.double())):
            self._add(row, f"l1_{area}", (guess - target).abs(), where)
            self._add(row, f"psnr_{area}", (guess - target).square(), where)
        self._add(row, "l1_to_input", (guess - source).abs(), mask.double())

    def add_labels(self, row, predicted, target, classes, by=""):
        """Class indices (B, S, S), by measure_labels: of all pixels; `by` says who predicted."""
        self.sums.setdefault(row, {})
        confusion = confusion_matrix(predicted, target, classes).cpu()
        self.confusions[row, by] = self.confusions.get((row, by), 0) + confusion

    def rows(self):
        """{row: {measure: value}}."""
        rows = {}
        for row, cells in self.sums.items():
            means = {name: (total / count).item() for name, (total, count) in cells.items()}
            for name, mse in means.items():
                if name.startswith("psnr_"):  # of the mean squared error in an area
                    means[name] = 10 * math.log10(255**2 / max(mse, 1e-10))
            if "mse" in means:
                means = {("rmse" if k == "mse" else k): v for k, v in means.items()}
                means["rmse"] = math.sqrt(means["rmse"])
            rows[row] = means
        for (row, by), confusion in self.confusions.items():
            measures = measure_labels(confusion).items()
            rows[row] |= {f"{by}_{name}" if by else name: value for name, value in measures}
        return rows


def constant_colors(histogram, classes=None, by_class=None):
    """The baselines that see no input, or no more than its class: {name: colour in [-1, 1]}.

    histogram  (3, 256) of pictures, or (1, 256) of label maps of a ClassTable, drawn in its
               colours; these also give the most frequent class (see ImageStore.histograms)
    by_class   (K, 3, 256) of the pixels of each class: its colours are (256, 3), for each index
               one, all pixels' where training showed none; all others are (3,)
    """
    counts, guesses = histogram.numpy(), {}
    if len(counts) == 1:
        guesses["most frequent class"] = classes.palette[counts[0, : len(classes)].argmax()]
        counts = np.stack([np.bincount(channel, counts[0], 256) for channel in classes.palette.T])
    kinds = {"training colour": counts}
    if by_class is not None:
        kinds["colour of the class"] = of_index = np.repeat(counts[None], 256, 0)
        seen = by_class.numpy().any(-1, keepdims=True)
        of_index[: len(seen)] = np.where(seen, by_class.numpy(), counts)
    for what, counts in kinds.items():
        pixels = counts.sum(-1, keepdims=True)
        guesses[f"mean {what}"] = (counts * np.arange(256) / pixels).sum(-1)
        guesses[f"median {what}"] = (counts.cumsum(-1) * 2 >= pixels).argmax(-1)
    return {name: torch.from_numpy(color / 127.5 - 1).float() for name, color in guesses.items()}


def constant_guesses(colors, images, labels=None):
    """constant_colors as images {name: a tensor like images (B, C, S, S)}, of labels (B, S, S)."""
    guesses = {}
    for name, color in colors.items():
        color = color.to(images)
        each = color[labels.long()].movedim(-1, 1) if color.ndim == 2 else color.view(1, -1, 1, 1)
        guesses[name] = each.expand_as(images)
    return guesses


def copy_verdict(rows):
    """Whether a generator of edits copies its input, in a sentence.

    It does where what it paints inside the edit is nearer to its input than to its target, and
    has not even gone half the way that lies between the two.
    """
    target, to_input = rows["model"]["l1_inside"], rows["model"]["l1_to_input"]
    copy = rows["copy of rgb_a"]["l1_inside"]
    if to_input >= target:
        verdict = "it does not copy its input"
    elif to_input < copy / 2:
        verdict = "it copies its input"
    else:
        verdict = "it neither copies its input nor hits the target"
    return (
        f"inside the edit the model is {target:.2f} levels from the target "
        f"(a copy of rgb_a {copy:.2f}) and {to_input:.2f} from its input: {verdict}"
    )


def write_evaluation(cfg, rows, **about):
    """Prints {row: {measure: value}} as a table; writes it with `about` to evaluation.json."""
    if rank():
        return
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    data = cfg.data or "demo world"
    what = {"size": cfg.size, "data": data, "checkpoint": cfg.checkpoint, **about, "rows": rows}
    path = Path(cfg.out) / "evaluation.json"
    write_text(path, json.dumps(what, indent=2))
    if (path.parent / "config.json").is_file():
        write_page(path.parent)
    print_table(rows)
    print(f"written to {path}")


def print_table(rows):
    """Prints {row: {measure: value}} as text, a column a measure."""
    columns = list(dict.fromkeys(itertools.chain(*rows.values())))
    widths = [max(len(name), 7) + 2 for name in columns]
    titles = max(map(len, rows)) + 2
    print(" " * titles + "".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True)))
    for title, row in rows.items():
        cells = [f"{row[name]:.4f}" if name in row else "" for name in columns]
        print(
            f"{title:<{titles}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        )


# ----------------------------------------------------------------------------------------- features


class VGG16Features(nn.Module):
    """Layers of VGG16 (Simonyan and Zisserman 2015, arXiv:1409.1556), frozen.

    (B, 3, S, S) in [-1, 1] -> a list of activations, in the order of depth.

    layers   names such as relu1_2 or relu3_3; nothing deeper than the last of them is computed
    weights  "vgg16": ImageNet's, from `path`, a file in torchvision's layout, or for "" from
             torch.hub's cache or download; "random": He-initialised from a fixed seed, the same on
             every machine (random features carry texture: He, Wang, Hopcroft 2016,
             arXiv:1606.04801)

    Each layer's activations are scaled so that its Gram matrices have norm 1 on four procedural
    landscapes: a weight of a loss means the same with any layer, and with any weights.
    """

    depths = {1: 2, 2: 2, 3: 3, 4: 3, 5: 3}  # convolutions in each stage; a stage halves the side

    def __init__(self, layers, weights, path):
        super().__init__()
        known = [(f"relu{s}_{k}", s, k) for s, n in self.depths.items() for k in range(1, n + 1)]
        names = [name for name, _, _ in known]
        wrong = [name for name in layers if name not in names]
        if wrong or not layers:
            what = f"no layer {wrong[:1]}; there are {', '.join(names)}"
            raise UserError(f"--style-layers {','.join(layers)}: {what}")
        deepest = max(names.index(name) for name in layers)
        self.layers, self.steps, shapes = set(layers), known[: deepest + 1], {}
        channels, position = 3, 0  # position: among torchvision's `features`
        for name, stage, k in self.steps:
            out = min(64 * 2 ** (stage - 1), 512)
            position += k == 1 and stage > 1  # a pooling layer
            shapes[name] = f"features.{position}", (out, channels, 3, 3)
            channels, position = out, position + 2  # the convolution and its ReLU
        found = _random_weights(shapes) if weights == "random" else _vgg16_weights(path, shapes)
        for name, (weight, bias) in found.items():
            self.register_buffer(f"{name}_weight", weight, persistent=False)
            self.register_buffer(f"{name}_bias", bias, persistent=False)
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.scales = [1.0] * len(self.layers)
        images = [landscape(np.random.default_rng(k), 128)[0] for k in range(4)]
        images = from_bytes(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
        with torch.no_grad():
            self.scales = [gram(x).norm(dim=(1, 2)).mean().item() ** -0.5 for x in self(images)]

    def forward(self, images):
        x, activations = ((images + 1) / 2 - self.mean) / self.std, []
        for name, stage, k in self.steps:
            if k == 1 and stage > 1:
                x = F.max_pool2d(x, 2)
            weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
            x = F.relu(F.conv2d(x, weight, bias, padding=1))
            if name in self.layers:
                activations.append(x * self.scales[len(activations)])
        return activations


def gram(features):
    """Activations (B, C, H, W) -> Gram matrices (B, C, C) / (C H W): arXiv:1603.08155, eq. 3."""
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / flat[0].numel()


def _random_weights(shapes):
    """{layer: (weight, bias)}: normal with variance 2 / fan in (He et al. 2015), biases 0."""
    seeded, found = torch.Generator().manual_seed(0), {}
    for name, (_, shape) in shapes.items():
        weight = torch.randn(shape, generator=seeded) * (2 / (9 * shape[1])) ** 0.5
        found[name] = weight, torch.zeros(shape[0])
    return found


def _vgg16_weights(path, shapes):
    """{layer: (weight, bias)} of ImageNet's VGG16, from a file or torch.hub (hash checked)."""
    if path:
        weights = load_weights(path)
    else:
        url = "https://download.pytorch.org/models/vgg16-397923af.pth"
        how = {"map_location": "cpu", "check_hash": True, "weights_only": True}
        try:
            weights = torch.hub.load_state_dict_from_url(url, **how)
        except Exception as error:
            remedy = f"fetch {url} and pass it with --vgg16 FILE"
            raise UserError(f"VGG16 is not at hand ({type(error).__name__}): {remedy}") from None
    found = {}
    for name, (key, shape) in shapes.items():
        found[name] = []
        for part, size in (("weight", shape), ("bias", shape[:1])):
            tensor = weights.get(f"{key}.{part}") if isinstance(weights, dict) else None
            if not isinstance(tensor, torch.Tensor) or tensor.shape != size:
                what = f"no {key}.{part} of shape {size} in it"
                raise UserError(f"--vgg16 {path}: {what}: torchvision's vgg16 state dict is needed")
            found[name].append(tensor)
    return found


# -------------------------------------------------------------------------------------------- judge


class Judge(nn.Module):
    """A small U-Net that classifies the pixels of photographs, whoever made them.

    (B, 3, S, S) in [-1, 1] -> logits (B, classes, S, S). Trained on real photographs and their
    land cover alone, it says of generated ones whether they show what was asked for: the FCN
    score of Isola et al. 2017, section 4.1, and Zhu et al. 2017, section 5.1.1.
    """

    def __init__(self, classes, width=32):
        super().__init__()
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        channels = 3
        for out in widths:
            conv = nn.Conv2d(channels, out, 4, 2, 1)
            self.downs.append(nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU()))
            channels = out
        for out in (*widths[-2::-1], width):
            conv = nn.ConvTranspose2d(channels, out, 4, 2, 1)
            self.ups.append(nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU()))
            channels = 2 * out
        self.last = nn.Conv2d(width + 3, classes, 3, 1, 1)

    def forward(self, image):
        skips = [image]
        for down in self.downs:
            skips.append(down(skips[-1]))  # (B, 32 .. 128, S/2 .. S/16, S/2 .. S/16)
        x = skips.pop()
        for up in self.ups:
            x = torch.cat([up(x), skips.pop()], 1)
        return self.last(x)

    @torch.no_grad()
    def classes_of(self, image):
        """What it sees in photographs (B, 3, S, S): class indices (B, S, S)."""
        return self.eval()(image).argmax(1)


def find_judge(cfg, device):
    """The judge in the run folder, or with --train-judge a new one, which is kept; else None."""
    path = Path(cfg.out) / "judge.pt"
    if not cfg.classes or not (path.is_file() or cfg.train_judge):
        return None
    torch.manual_seed(cfg.seed)
    judge = Judge(len(cfg.classes)).to(device)
    if path.is_file():
        remedy = "without that file --train-judge trains another"
        print(f"the judge is {path}; {remedy}")
        try:
            judge.load_state_dict(load_checkpoint(path, cfg.script)["state"]["judge"])
        except (UserError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:90]
            raise UserError(f"{path}: is damaged ({reason}): {remedy}") from None
        return judge
    rows = Rows(ImageStore(cfg, "train", cfg.size).records, device)
    adam = torch.optim.Adam(judge.parameters(), 2e-3)
    rng, batch = np.random.default_rng(cfg.seed), min(16, len(rows))
    for _ in tqdm(range(cfg.judge_epochs), "training the judge", leave=False, disable=None):
        order = rng.permutation(len(rows))[: len(rows) // batch * batch].reshape(-1, batch)
        for images in rows.batches(order):
            turned = torch.stack(images)
            for axis in (2, 3):
                turned = turned.flip(axis) if rng.random() < 0.5 else turned
            turned = turned.transpose(2, 3) if rng.random() < 0.5 else turned
            logits = judge(from_bytes(turned[:, :3]))
            loss = F.cross_entropy(logits, turned[:, 3].long(), ignore_index=IGNORED)
            adam.zero_grad()
            loss.backward()
            average_gradients(judge)
            adam.step()
    if rank() == 0:
        content = {"script": cfg.script, "config": {}, "state": {"judge": judge.state_dict()}}
        save_checkpoint(path, content)
    return judge


# --------------------------------------------------------------------------------------- generation


def inputs_of(cfg, labels=False):
    """The files that --generate names: one, or the images of a folder."""
    path = Path(cfg.generate)
    if not path.exists():
        raise UserError(f"--generate {path}: no such file or directory")
    files = _files(path, labels) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--generate {path}: no images in it")
    return files


def results_of(path, to_labels=False):
    """The names of what is generated from a file: its own, or .png where that cannot be written."""
    if to_labels and path.suffix.lower() not in TIFF_SUFFIXES:
        return [f"{path.stem}.png", f"{path.stem}_colours.png"]
    return [path.name if path.suffix.lower() in IMAGE_SUFFIXES else f"{path.stem}.png"]


def claim_names(cfg, names):
    """Refuses to write over anything in --out but what the same command has written there.

    A hidden file beside that folder holds which command that was, for each name.
    """
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"--generate {cfg.generate}: two results would be called {twice[0]}")
    options = dataclasses.asdict(dataclasses.replace(cfg, out="", cache="", device="auto"))
    command = hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:16]
    out, written = Path(cfg.out).resolve(), {}
    if out.is_file():
        raise UserError(f"--out {cfg.out}: is a file, not a folder")
    log = out.with_name(f".{out.name}.generated.json")
    with contextlib.suppress(OSError, ValueError):  # none yet, or a damaged one
        written = json.loads(log.read_text())
    for name in names:
        path = Path(cfg.out) / name
        if path.exists() and written.get(name) != command:
            raise UserError(f"{path} exists and would be written over: choose another --out")
    for aside in out.glob(".*-*") if out.is_dir() else ():  # of a process that was killed
        if re.sub(r"^\.\d+-", "", aside.name) in names:
            aside.unlink()
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):
        write_text(log, json.dumps(written | dict.fromkeys(names, command), indent=1))


@contextlib.contextmanager
def whole_or_absent(path):
    """Yields a name to write to, which becomes path at the end, or goes if that is not reached."""
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path, text):
    """Writes a text file aside, and renames: whole or absent."""
    with whole_or_absent(path) as aside:
        aside.write_text(text + "\n")


def write_image(path, image):
    """Writes (H, W, 3) or (H, W) uint8, or a Pillow image, aside, and renames: whole or absent.

    By the ending of path: JPEG at quality 95, else lossless; an unknown ending becomes .png.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        path, suffix = path.with_suffix(".png"), ".png"
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 95, "subsampling": 0} if suffix in (".jpg", ".jpeg") else {}
    if suffix == ".webp":
        options = {"lossless": True}
    with whole_or_absent(path) as aside:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        picture.save(aside, **options)
    return path


def writing(path, source, classes=None):
    """A context that gives put(pixels, top, left=0): a new picture of a Raster's size, by windows.

    With a ClassTable pixels are (H, W) class indices, and the file gets its colours, else they
    are (H, W, 3) uint8. A TIFF from a TIFF keeps its place on earth, and no data stays no data;
    other files lie in memory till the end. It appears under its name when it is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    by_windows = source.tiff and path.suffix.lower() in TIFF_SUFFIXES
    return (_writing_tiff if by_windows else _writing_whole)(path, source, classes)


@contextlib.contextmanager
def _writing_whole(path, source, classes):
    whole = np.zeros((source.height, source.width, *(() if classes else (3,))), np.uint8)
    yield functools.partial(paste, whole)
    if not classes:
        write_image(path, whole)
        return
    image = Image.fromarray(whole)  # indices, which the scripts read again, and colours to look at
    image.putpalette(classes.palette.tobytes())
    write_image(path.with_suffix(".png"), image)
    write_image(path.with_name(f"{path.stem}_colours.png"), classes.palette[whole])


@contextlib.contextmanager
def _writing_tiff(path, source, classes):
    given = IGNORED if classes else source.tiff.nodata
    nothing = int(given) if given is not None and 0 <= given <= 255 else None  # else: a mask
    profile = {"height": source.height, "width": source.width, "count": 1 if classes else 3}
    profile |= {"driver": "GTiff", "dtype": "uint8", "nodata": nothing, "bigtiff": "if_safer"}
    profile |= {"compress": "deflate", "tiled": True, "blockxsize": 256, "blockysize": 256}
    gcps, crs = source.tiff.gcps
    if gcps:
        profile |= {"gcps": gcps, "crs": crs}
    elif not source.tiff.transform.is_identity:
        profile |= {"crs": source.tiff.crs, "transform": source.tiff.transform}

    def put(pixels, top, left=0):
        height, width = pixels.shape[:2]
        window = (top, top + height), (left, left + width)
        valid = source.valid(top, left, height, width)
        bands = pixels[None] if classes else np.moveaxis(pixels, -1, 0)
        if valid is not None and nothing is None:
            target.write_mask(valid, window=window)
        elif valid is not None:
            if not classes:  # what was painted must not look like nothing
                bands = np.where((bands == nothing).all(0), abs(nothing - 1), bands)
            bands = np.where(valid, bands, nothing).astype(np.uint8)
        target.write(bands, window=window)

    try:
        with whole_or_absent(path) as aside:
            with (
                _rasterio().Env(GDAL_TIFF_INTERNAL_MASK=True),
                _rasterio().open(aside, "w", **profile) as target,
            ):
                target.update_tags(**source.tiff.tags())
                if classes:
                    colors = enumerate(classes.palette.tolist())
                    target.write_colormap(1, {k: tuple(color) for k, color in colors})
                yield put
            # GDAL keeps quiet when it closes on a full disk
            with _rasterio().open(aside) as written:
                for top in range(0, source.height, 256):
                    written.read(window=((top, min(top + 256, source.height)), (0, source.width)))
    except _rasterio().errors.RasterioError as error:
        raise UserError(f"{path}: cannot be written ({error}): is the disk full?") from None


def tiles(length, window):
    """Where windows stand along a side, and what they weigh: [(start, (window,) float32), ...].

    They overlap by a quarter or more, and their weights sum to 1 everywhere: 0 in the outer
    quarter of an overlap, where a window knows least of what lies around, and a cosine between.
    """
    count = max(1, math.ceil((length - window // 4) / (window - window // 4)))
    starts = np.linspace(0, max(length - window, 0), count).round().astype(int).tolist()
    weights = np.ones((count, window), np.float32)
    for k in range(count - 1):
        overlap = starts[k] + window - starts[k + 1]
        position = (np.arange(overlap) + 0.5) / overlap
        ramp = (1 - np.cos(np.pi * np.clip(2 * position - 0.5, 0, 1))) / 2
        weights[k, window - overlap :] *= 1 - ramp
        weights[k + 1, :overlap] *= ramp
    return list(zip(starts, weights, strict=True))


class SharedStatistics:
    """Normalises every window of a raster by statistics of the windows around it.

    InstanceNorm, and BatchNorm by an image's own statistics, would paint each window in colours
    of its own. A first pass over some windows notes every layer's mean and variance, and a window
    then gets their averages, with Gaussian weights of `reach` windows (kernelized instance
    normalization, Ho et al. 2022, arXiv:2208.10730; an infinite reach: all alike).
    """

    most = 24  # windows noted along a side: for 2000 x 2000 windows of a large raster, too

    def __init__(self, net, reach):
        kinds = nn.InstanceNorm2d, nn.BatchNorm2d
        self.layers = [module for module in net.modules() if isinstance(module, kinds)]
        self.reach, self.places = reach, []
        self.moments = {layer: [] for layer in self.layers}

    def some(self, windows):
        """Those windows of a side to note: about one within each reach, which widens if need be."""
        count = min(self.most, max(8, math.ceil(0.75 * len(windows) / self.reach)))
        self.reach = max(self.reach, 0.75 * len(windows) / count)
        return [windows[k] for k in spread(count, len(windows))]

    def note(self, place, paint, tile):
        """Notes the statistics of a tile (C, S, S) at place (top, left), counted in windows."""

        def keep(layer, inputs):
            variance, mean = torch.var_mean(inputs[0].float(), (0, 2, 3), correction=0)
            self.moments[layer].append(torch.stack([mean, variance]))

        hooks = [layer.register_forward_pre_hook(keep) for layer in self.layers]
        try:
            paint(tile[None])
        finally:
            for hook in hooks:
                hook.remove()
        self.places.append(place)

    def note_some(self, rows, columns, sides, cut, paint):
        """Notes some of the windows that stand at these tiles of a raster."""
        noted = list(itertools.product(self.some(rows), self.some(columns)))
        bar = {"unit": "window", "leave": False, "disable": None}
        for (top, _), (left, _) in tqdm(noted, "statistics", **bar):
            place = top / sides[0], left / sides[1]
            self.note(place, paint, torch.from_numpy(cut(top, left, *sides)))

    @contextlib.contextmanager
    def around(self, places):
        """Within it the network takes windows at these places, in this order."""
        apart = torch.tensor(places)[:, None] - torch.tensor(self.places)[None]  # (B, N, 2)
        weights = torch.softmax(-apart.square().sum(-1) / (2 * self.reach**2), 1)
        try:
            for layer in self.layers:
                layer.forward = self._forward(layer, weights)
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def _forward(self, layer, weights):
        means, variances = torch.stack(self.moments[layer], 1)  # (N, C) each
        weights = weights.to(means)
        mean = weights @ means
        variance = weights @ (variances + means.square()) - mean.square()
        done = 0

        def forward(x):
            nonlocal done  # a batch may come in pieces
            rows, done = slice(done, done + len(x)), done + len(x)
            flat = x.reshape(1, -1, *x.shape[2:])
            moments = mean[rows].flatten(), variance[rows].flatten().clamp_min(0)
            x = F.batch_norm(flat, *moments, eps=layer.eps).view_as(x)
            if layer.weight is None:
                return x
            return x * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)

        return forward


def paint_windows(cut, paint, corners, sides, statistics=None):
    """Paints windows at these corners (top, left): (B, C, *sides) float32, on the CPU."""
    windows = torch.from_numpy(np.stack([cut(*corner, *sides) for corner in corners]))
    places = [(top / sides[0], left / sides[1]) for top, left in corners]
    with statistics.around(places) if statistics else contextlib.nullcontext():
        fakes = paint(windows).float().cpu()
    if fakes.shape[2:] != sides:
        fakes = F.interpolate(fakes, sides, mode="bicubic", antialias=True)
    return fakes


def blended(cut, paint, size, window, statistics=None, batch=8, about=""):
    """Paints a raster by windows: yields (top, pixels (C, rows, width) float32) from top to bottom.

    cut(top, left, height, width)  a window as the network takes it, (C', S, S) uint8
    paint(windows (B, C', S, S))   -> (B, C, S', S')
    size                           (height, width)
    window                         the side of a window; 0: the whole at once
    statistics                     SharedStatistics, where normalisation would tell windows apart

    In memory: `window` rows of the raster, in float32, and a batch.
    """
    sides = (window, window) if window else size
    rows, columns = (tiles(length, side) for length, side in zip(size, sides, strict=True))
    statistics = statistics if len(rows) * len(columns) > 1 else None
    if statistics:
        statistics.note_some(rows, columns, sides, cut, paint)
    megapixels = size[0] * size[1] / 1e6
    bar = tqdm(total=megapixels, desc=about, unit="MP", leave=False, disable=None)
    band = None  # of the raster, from `top` on: sums of weighted windows
    for k, (top, weights_y) in enumerate(rows):
        for some in (columns[j : j + batch] for j in range(0, len(columns), batch)):
            corners = [(top, left) for left, _ in some]
            fakes = paint_windows(cut, paint, corners, sides, statistics)
            if band is None:
                width = columns[-1][0] + sides[1]
                band = torch.zeros(fakes.shape[1], sides[0], width)
            for fake, (left, weights_x) in zip(fakes, some, strict=True):
                weights = torch.from_numpy(weights_y[:, None] * weights_x)
                band[:, :, left : left + sides[1]] += fake * weights
            bar.update(megapixels * len(some) / len(rows) / len(columns))
        done = rows[k + 1][0] - top if k + 1 < len(rows) else size[0] - top
        finished, rest = band.split([done, sides[0] - done], 1)
        band = torch.cat([rest, torch.zeros_like(finished)], 1)
        yield top, finished[:, :, : size[1]]
    bar.close()


def window_of(cfg, raster):
    """The window by which a raster is painted; 0 for the whole at once, up to 1.5 windows."""
    return cfg.window if max(raster.height, raster.width) > 1.5 * cfg.window > 0 else 0


def say_windows(cfg, raster, regions, window):
    """Says on stderr how these regions (top, left, height, width) of a raster are painted."""
    what, count, overlap = f"as a whole, at {cfg.size}x{cfg.size}", 0, window
    for *_, height, width in regions if window else ():
        sides = tiles(height, window), tiles(width, window)
        count += len(sides[0]) * len(sides[1])
        for (a, _), (b, _) in itertools.chain(*map(itertools.pairwise, sides)):
            overlap = min(overlap, a + window - b)
    if window:
        lapping = f", overlapping {overlap}" if overlap < window else ""
        plural = "s" if count != 1 else ""
        what = f"{count} window{plural} of {window}{lapping}, each at {cfg.size}x{cfg.size}"
    size = f"{raster.width}x{raster.height}"
    print(f"{raster.path.name}: {size}: {what}", file=sys.stderr)


def translate_files(cfg, paint, net=None, from_labels=False, to_labels=False):
    """--generate of pictures or label maps, at the scale of training, into --out.

    paint(windows (B, 3 or 1, S, S) uint8, whole)  -> pictures (B, 3, S, S) in [-1, 1], or scores
           of the classes (B, classes, S, S); whole: there is just one window
    net    the network, if it normalises by an image's own statistics
    """
    if cfg.serve:
        _page_to_paint_on().translations(cfg, paint, net, from_labels, to_labels)
        return
    files = inputs_of(cfg, labels=from_labels)
    claim_names(cfg, [name for path in files for name in results_of(path, to_labels)])
    for path in files:
        torch.manual_seed(cfg.seed)  # a picture does not depend on the others in its folder
        with Raster(path, cfg.classes if from_labels else None) as raster:
            window = window_of(cfg, raster)
            say_windows(cfg, raster, [(0, 0, raster.height, raster.width)], window)
            strips = blended(
                functools.partial(network_input, raster, cfg.size),
                functools.partial(paint, whole=not window),
                (raster.height, raster.width),
                window,
                shared_statistics(cfg, net),
                about=path.name,
            )
            with writing(Path(cfg.out) / path.name, raster, to_labels and cfg.classes) as put:
                for top, strip in strips:
                    if to_labels:
                        put(strip.argmax(0).byte().numpy(), top)
                    else:
                        put(as_array(strip[None]), top)
    print(f"{len(files)} image(s) written to {cfg.out}")


def network_input(raster, size, *place):
    """A window (top, left, height, width) of a raster at a network's size: (3 or 1, S, S) uint8."""
    small = resize(raster.padded(*place), (size, size), labels=bool(raster.table))
    return small[None] if raster.table else np.moveaxis(small, -1, 0)


def shared_statistics(cfg, net):
    """SharedStatistics of a network that normalises by an image's own; None where none is given."""
    return SharedStatistics(net, cfg.norm_reach) if net and cfg.norm_reach else None


def _page_to_paint_on():
    """The module behind --serve."""
    try:
        from pages import paint
    except ImportError:
        raise UserError("--serve: the folder pages/ does not lie beside common.py") from None
    return paint


def edit_of_files(cfg):
    """The PhotoEdit that --generate, --lc, --lc-before and --paint ask for."""
    path = inputs_of(cfg)[0]
    if Path(cfg.generate).is_dir():
        what = "an edit takes one photograph, not a folder"
        raise UserError(f"--generate {cfg.generate}: {what}")
    if not cfg.lc:
        what = "the photograph's land cover (edited, or to be edited by --paint)"
        raise UserError(f"--generate needs --lc FILE, {what}")
    photo = Raster(path)
    maps = [Raster(file, cfg.classes) for file in (cfg.lc, cfg.lc_before) if file]
    for labels in maps:
        if (labels.height, labels.width) != (photo.height, photo.width):
            size = f"{labels.width}x{labels.height}"
            other = f"{path} is {photo.width}x{photo.height}"
            raise UserError(f"{labels.path} is {size} but {other}: sizes must agree")
        a, b = labels.tiff, photo.tiff
        if a and b and a.crs and b.crs and (a.crs, a.transform) != (b.crs, b.transform):
            raise UserError(f"{labels.path} lies elsewhere than {path}: another CRS or transform")
    if cfg.erase and not (cfg.lc_before or cfg.paint):
        remedy = "pass --lc-before FILE or --paint, or train with --no-erase"
        raise UserError(f"--generate must know what changed: {remedy}")
    strokes = [_stroke(text, cfg.classes, photo.height, photo.width) for text in cfg.paint]
    return PhotoEdit(cfg, photo, *maps, strokes=strokes)


def _stroke(text, classes, height, width):
    """A "class:x,y,width,height" as (index, top, left, bottom, right). Of a class the beginning of
    its name is enough, where no other begins so.
    """
    name, _, numbers = text.rpartition(":")
    names = [known.lower() for known in classes.names]
    meant = [known for known in names if known.startswith(name.lower())]
    meant = [name.lower()] if name.lower() in names else meant
    try:
        x, y, wide, tall = (int(number) for number in numbers.split(","))
    except ValueError:
        raise UserError(f"--paint {text}: write class:x,y,width,height, in pixels") from None
    if len(meant) != 1:
        known, what = ", ".join(classes.names), "several begin so" if meant else "no such class"
        raise UserError(f"--paint {text}: {what}; there are {known}")
    if min(wide, tall, x + wide, y + tall) <= 0 or x >= width or y >= height:
        raise UserError(f"--paint {text}: lies outside the image, {width}x{height} pixels")
    return names.index(meant[0]), max(y, 0), max(x, 0), y + tall, x + wide


class PhotoEdit:
    """An edit of one photograph through its land cover: where to paint, and what goes in.

    photo    its Raster
    lc       Raster of the land cover that it shall have, before the strokes
    first    Raster of the land cover that it has; None: lc, without the strokes
    strokes  rectangles of a class, [(index, top, left, bottom, right), ...]
    told     whether the land cover before is known, and with it what changed
    window   the side of a window, in pixels; 0: the photograph is painted as a whole
    border   how far an edit is feathered into the photograph: 12 pixels in 256
    """

    def __init__(self, cfg, photo, lc, first=None, strokes=()):
        self.cfg, self.photo, self.lc, self.first, self.strokes = cfg, photo, lc, first, strokes
        self.told = bool(first or strokes)
        self.size = photo.height, photo.width
        self.window = window_of(cfg, photo)
        self.border = max(1, round(12 * (self.window or min(self.size)) / 256))
        self.whole = not (self.told and cfg.keep_outside)

    def after(self, top, left, height, width):
        """A window of the land cover that the edited photograph shall have, mirrored at edges."""
        labels = self.lc.read(top, left, height, width).copy()
        for index, *corners in self.strokes:
            y0, x0, y1, x1 = (max(c - o, 0) for c, o in zip(corners, (top, left) * 2, strict=True))
            labels[y0:y1, x0:x1] = index
        return mirrored(labels, height, width)

    def before(self, top, left, height, width):
        """A window of the land cover that the photograph has; of --lc's where nothing tells."""
        return (self.first or self.lc).padded(top, left, height, width)

    def changed(self, top, left, height, width):
        """Where a window's land cover changes: (height, width) bool."""
        if not self.told:
            return np.ones((height, width), bool)
        window = top, left, height, width
        return self.before(*window) != self.after(*window)

    def regions(self):
        """What to paint, [(top, left, height, width), ...], around each group of changes.

        A change that leaves a window an eighth of its side around it gets one window of its own,
        with the change in its middle, as in training; a larger one gets a quarter all around.
        Regions that would overlap become one.
        """
        window = self.window
        if self.whole or not window:
            return [(0, 0, *self.size)]
        block = max(1, window // 16)
        spans = [
            (y * block, x * block, (y_last + 1) * block, (x_last + 1) * block)
            for y, x, y_last, x_last in _groups(self._changed_blocks(block))
        ]
        apart = []
        while spans:
            span = spans.pop()
            near = [s for s in apart if touch(self._around(span, window), self._around(s, window))]
            if near:
                apart.remove(near[0])
                span = [*map(min, span[:2], near[0][:2]), *map(max, span[2:], near[0][2:])]
                spans.append(span)
            else:
                apart.append(span)
        return [self._around(span, window) for span in apart]

    def painted(self, region, paint, net=None, sample=1):
        """Paints a region (top, left, height, width): yields (pixels (h, w, 3), top, left)."""
        (y, x), size = region[:2], region[2:]
        strips = blended(
            lambda top, left, *sides: self._cut(y + top, x + left, *sides),
            functools.partial(paint, sample=sample),
            size,
            self.window,
            shared_statistics(self.cfg, net),
            about=self.photo.path.name,
        )
        for top, strip in strips:
            yield self._feathered(as_array(strip[None]), y + top, x), y + top, x

    def _cut(self, *place):
        """A window as the network takes it, (5, S, S): photograph, land cover, what changes."""
        size = self.cfg.size, self.cfg.size
        rgb = resize(self.photo.padded(*place), size)
        lc = resize(self.after(*place), size, labels=True)
        changed = resize(self.changed(*place).astype(np.uint8), size, labels=True)
        return np.concatenate([np.moveaxis(rgb, -1, 0), lc[None], changed[None]])

    def _feathered(self, pixels, top, left):
        """Painted pixels in the photograph, which holds outside of what changed."""
        height, width = pixels.shape[:2]
        if self.whole:
            return pixels
        border = self.border
        above, before = min(border, top), min(border, left)
        place = top - above, left - before, height + above + border, width + before + border
        mask = Image.fromarray(self.changed(*place).astype(np.uint8) * 255)
        mask = mask.filter(ImageFilter.BoxBlur(border))
        mask = mask.crop((before, above, before + width, above + height))
        under = Image.fromarray(self.photo.read(top, left, height, width))
        return np.asarray(Image.composite(Image.fromarray(pixels), under, mask))

    def _changed_blocks(self, block):
        """The set of (row, column) of blocks of pixels in which land cover changes."""
        blocks = set()
        for row, top in enumerate(range(0, self.size[0], block)):
            changed = self.changed(top, 0, min(block, self.size[0] - top), self.size[1]).any(0)
            blocks |= {(row, k // block) for k in np.flatnonzero(changed).tolist()}
        return blocks

    def _around(self, span, window):
        """The region to paint around what changes in (top, left, bottom, right)."""
        corner, room = [], window // 4
        lengths = []
        for first, last, side in zip(span[:2], span[2:], self.size, strict=True):
            fits = last - first <= window - room
            length = min(side, window if fits else last - first + 2 * room)
            corner.append(max(0, min((first + last - length) // 2, side - length)))
            lengths.append(length)
        return *corner, *lengths


def _groups(blocks):
    """Splits a set of (row, column) into groups of neighbours: the corners of each, inclusive."""
    while blocks:
        group, edge = set(), {blocks.pop()}
        while edge:
            group |= edge
            edge = blocks & {(y + dy, x + dx) for y, x in edge for dy, dx in _NEAR}
            blocks -= edge
        rows, columns = zip(*group, strict=True)
        yield min(rows), min(columns), max(rows), max(columns)


_NEAR = list(itertools.product((-1, 0, 1), repeat=2))


def touch(a, b):
    """Whether two regions (top, left, height, width) have pixels in common."""
    return all(a[k] < b[k] + b[k + 2] and b[k] < a[k] + a[k + 2] for k in (0, 1))


def _view(regions, size, most=1024):
    """What a sheet shows: all, or of a large raster the surroundings of the largest edit."""
    if max(size) <= most or not regions:
        return 0, 0, min(size[0], most), min(size[1], most)
    top, left, height, width = max(regions, key=lambda region: region[2] * region[3])
    corner = [
        max(0, min(first + length // 2 - most // 2, side - most))
        for first, length, side in ((top, height, size[0]), (left, width, size[1]))
    ]
    return *corner, min(most, size[0]), min(most, size[1])


def paste(picture, pixels, top, left=0):
    """Puts what fits of pixels into a picture, at a place that may lie partly outside it."""
    y, x = max(0, -top), max(0, -left)
    bottom, right = max(0, top + pixels.shape[0]), max(0, left + pixels.shape[1])
    inside = picture[top + y : bottom, left + x : right]
    inside[...] = pixels[y : y + inside.shape[0], x : x + inside.shape[1]]


def edit_file(cfg, paint, net=None, samples=1):
    """--generate of an edit, at the scale of training, into --out, with a before/after sheet.

    Only windows around what changed are painted, and blended into the photograph over a border
    of 12 pixels in 256; elsewhere it stays as it is. With several samples also how they differ:
    their standard deviation, white at 32 levels.

    paint(windows (B, 5, S, S) uint8, sample)  -> (B, 3, S, S) in [-1, 1]; a window is the
           photograph, the land cover to be, and 1 where it changes
    net    the network, if it normalises by an image's own statistics
    """
    if cfg.serve:
        _page_to_paint_on().edits(cfg, paint, net)
        return
    edit = edit_of_files(cfg)
    photo, name, regions = edit.photo, edit.photo.path, edit.regions()
    names = results_of(name)
    if samples > 1:
        suffix = Path(names[0]).suffix
        names = [f"{name.stem}_{k}{suffix}" for k in range(1, samples + 1)]
    more = ["sheet", "differences"] if samples > 1 else ["sheet"]
    claim_names(cfg, names + [f"{name.stem}_{what}.png" for what in more])
    say_windows(cfg, photo, regions, edit.window)
    if not edit.told:
        hint = "--lc-before FILE would tell what changed"
        print(f"the whole photograph is regenerated: {hint}", file=sys.stderr)
    if not regions:
        print("the land cover is the same before and after: nothing changes", file=sys.stderr)
    view = _view(regions, edit.size)
    top, left, height, width = view
    pictures, answers = {"before": photo.read(*view)}, []
    if edit.told:
        pictures["land cover"] = cfg.classes.palette[edit.before(*view)]
    pictures["edited land cover"] = cfg.classes.palette[edit.after(*view)]
    for k, written in enumerate(names, 1):
        shown = pictures["before"].copy()
        with writing(Path(cfg.out) / written, photo) as put:
            for first in range(0, edit.size[0], 256):
                put(photo.read(first, 0, 256), first)
            for region in regions:
                for pixels, y, x in edit.painted(region, paint, net, sample=k):
                    put(pixels, y, x)
                    paste(shown, pixels, y - top, x - left)
        pictures[f"after {k}" if samples > 1 else "after"] = shown
        answers.append(shown.astype(np.float32))
    if samples > 1:
        spread = np.std(answers, 0).mean(-1, keepdims=True)
        differences = np.minimum(spread * 8, 255).astype(np.uint8).repeat(3, -1)
        pictures["where they differ"] = differences
        write_image(Path(cfg.out) / f"{name.stem}_differences.png", differences)
    sheet = {title: from_bytes(as_tensor(x, "cpu")) for title, x in pictures.items()}
    save_grid(Path(cfg.out) / f"{name.stem}_sheet.png", sheet)
    print(f"{len(answers)} picture(s) written to {cfg.out}, with a before/after sheet")
