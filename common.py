"""What the four scripts share and what teaches nothing about GANs: options, data on disk, the run folder, measures.

errors      UserError, command
options     option, parse, settle
device      start, seed_step, autocast, adam, set_lr, average_gradients, fast_step, GraphedStep
data        ClassTable, find_images, read_image, read_labels, ImageStore, Rows, rank_rows, demo_world
runs        Run, save_checkpoint, load_checkpoint, restore, load_generator, save_grid
measures    measure_images, confusion_matrix, measure_labels, level_counts, constant_guesses, write_evaluation
generation  inputs_of, write_image, write_labels, read_edit, keep_outside, save_sheet
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageFilter
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------- errors


class UserError(Exception):
    """A mistake of the user's: its text names the file or the option and the remedy, on one line."""


def command(main):
    """Decorates a script's main: a mistake of the user's becomes one line on stderr and exit status 2, no traceback."""

    @functools.wraps(main)
    def wrapper(argv=None):
        try:
            return main(argv)
        except UserError as error:
            message = str(error)
        except KeyboardInterrupt:
            sys.exit(130)
        except (MemoryError, RuntimeError) as error:
            text = str(error)
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
                message = "out of memory: lower --batch-size, --size or --width, or try --precision bf16"
            elif rank_and_world()[1] > 1 and re.search("gloo|nccl|connection|timed out", text, re.IGNORECASE):
                message = "another process of this run has ended: mend what it says, and go on with --resume"
            else:
                raise
        except BrokenPipeError:  # whoever read our output has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except OSError as error:
            if error.errno is None:
                raise
            message = f"{error.filename or 'writing'}: {error.strerror}; choose another place with --out or --cache"
        for bar in list(getattr(tqdm, "_instances", [])):  # a line of its own, not the end of a progress bar
            bar.leave = False
            bar.close()
        print("error: " + " ".join(message.split()), file=sys.stderr)
        sys.exit(2)

    return wrapper


# ------------------------------------------------------------------------------------------------------------ options


def option(default, help, group=None, *, choices=None, low=None, high=None, may_change=False):
    """A field of a Config dataclass that is also a command-line option.

    group starts a new heading in --help (later fields stay under it; "model" marks what a checkpoint fixes);
    low and high bound a number, both included; may_change says that a resumed run may have another value.
    """
    meta = {"help": help, "group": group, "choices": choices, "low": low, "high": high, "may_change": may_change}
    return dataclasses.field(default=default, metadata=meta)


def flag(name):
    """lambda_l1 -> --lambda-l1"""
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def grouped_fields(config):
    """Pairs (group, field) of a Config class, each field under the last group named."""
    group = "options"
    for field in dataclasses.fields(config):
        group = field.metadata["group"] or group
        yield group, field


def parse(config, doc, quick, argv=None):
    """The command line as (cfg, given): a frozen Config, and a dict of just the options that were typed.

    config  a dataclass whose fields are made by option()
    doc     the script's docstring: its first paragraph heads --help
    quick   {name: value}: the defaults that --quick puts in place of the usual ones
    """
    parser = _Parser(
        description=doc.strip().split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups = {}
    for group, field in grouped_fields(config):
        groups.setdefault(group, parser.add_argument_group(group))
        shown = "none" if field.default in ("", ()) else field.default
        shown = ("off", "on")[shown] if isinstance(shown, bool) else shown
        kwargs = {"dest": field.name, "default": argparse.SUPPRESS, "help": f"{field.metadata['help']} [{shown}]"}
        if isinstance(field.default, bool):
            kwargs["action"] = argparse.BooleanOptionalAction
        elif isinstance(field.default, tuple):
            kwargs.update(action="append", metavar="TEXT")
        else:
            kwargs.update(type=type(field.default), choices=field.metadata["choices"])
            if not field.metadata["choices"]:
                kwargs["metavar"] = {int: "N", float: "X", str: "TEXT"}[type(field.default)]
        groups[group].add_argument(flag(field.name), **kwargs)
    given = vars(parser.parse_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    for field in dataclasses.fields(config):
        low, high, value = field.metadata["low"], field.metadata["high"], given.get(field.name)
        if value is not None and not (low is None or value >= low):
            raise UserError(f"{flag(field.name)} {value}: must be at least {low}")
        if value is not None and not (high is None or value <= high):
            raise UserError(f"{flag(field.name)} {value}: must be at most {high}")
    return config(**({**quick, **given} if given.get("quick") else given)), given


GENERATION_ALONE = {"lc", "lc_before", "paint", "samples", "keep_outside"}
RESUME_MAY_CHANGE = {"data", "cache", "out", "resume", "device", "track", "save_every"}


def settle(cfg, given, script):
    """What this call works on, as (cfg, checkpoint): a new run (checkpoint None), a run resumed, a trained model used.

    Resumed, the options are the checkpoint's, and one that was typed and contradicts them is refused by name. For
    --evaluate and --generate only the options of the group "model" are held to the checkpoint's.
    """
    using = cfg.generate or cfg.evaluate
    lone = sorted(GENERATION_ALONE & set(given))
    if lone and not cfg.generate:
        raise UserError(f"{flag(lone[0])} goes with --generate FILE")
    for name, value in vars(cfg).items():
        if (name.startswith("init") or name == "vgg16") and value and not Path(value).is_file():
            raise UserError(f"{flag(name)} {value}: no such file")
    if cfg.checkpoint and not using:
        raise UserError("--checkpoint goes with --generate or --evaluate (to go on training: --resume, or --init)")
    if cfg.resume and using:
        raise UserError("--resume goes on training: name the model to evaluate or to generate with by --checkpoint")
    if not cfg.resume and not using:
        return dataclasses.replace(cfg, out=of_rank_0(_new_folder(cfg.out, script))), None
    if using and not cfg.checkpoint:
        if not cfg.evaluate and any(value for name, value in vars(cfg).items() if name.startswith("init")):
            return dataclasses.replace(cfg, out=cfg.out or f"runs/{script}/generated"), None
        raise UserError(f"{'--generate' if cfg.generate else '--evaluate'} needs --checkpoint FILE, a model to use")
    if cfg.resume:
        runs = [Path(cfg.out)] if cfg.out else sorted(Path("runs").glob(f"{script}*"))
        found = [run for run in runs if (run / "checkpoints" / "last.pt").is_file()]
        found = [run for run in found if cfg.out or re.fullmatch(rf"{script}(-\d+)?", run.name)]
        if not found:
            where = cfg.out or f"runs/{script}"
            raise UserError(f"--resume: no checkpoints/last.pt in {where}: start without --resume")
        run = max(found, key=lambda run: (run / "checkpoints" / "last.pt").stat().st_mtime)
        path = run / "checkpoints" / "last.pt"
    else:
        path = Path(cfg.checkpoint)
        run = path.parent.parent if path.parent.name == "checkpoints" else path.with_name(f"{path.stem}_results")
    checkpoint = load_checkpoint(path, script)
    saved, world = checkpoint["config"], rank_and_world()[1]
    if cfg.resume:
        held = {field.name for field in dataclasses.fields(cfg) if not field.metadata["may_change"]} - RESUME_MAY_CHANGE
        held -= {"epochs"} if saved.get("schedule", "linear") != "linear" else set()
        if checkpoint.get("world", 1) != world:
            raise UserError(f"{path}: a run of {checkpoint['world']} processes cannot go on with {world}")
    else:
        held = {field.name for group, field in grouped_fields(type(cfg)) if group == "model"}
    for name in sorted(held & set(given) & set(saved)):
        same = given[name] == saved[name]
        if name == "lc_classes" and given[name] and saved[name]:
            same = ClassTable.load(given[name]) == ClassTable.load(saved[name])
        if not same:
            raise UserError(f"{flag(name)} {given[name]} contradicts {path} ({str(saved[name])[:60]}): leave it out")
    typed = {name: value for name, value in given.items() if name not in held}
    known = {field.name for field in dataclasses.fields(cfg)}
    adopted = {name: value for name, value in saved.items() if name in known} | typed
    folder = run if cfg.resume or (cfg.evaluate and not cfg.out) else Path(cfg.out or run / "generated")
    mode = {name: getattr(cfg, name) for name in ("resume", "checkpoint", "generate", "evaluate", "device")}
    return type(cfg)(**(adopted | mode | {"out": str(folder)})), checkpoint


def _new_folder(out, script):
    """Claims the folder of a new run: --out, or the first of runs/script, runs/script-2, ... that does not exist."""
    if rank_and_world()[0]:
        return ""
    if out:
        folder, about = Path(out), Path(out) / "config.json"
        if folder.is_file():
            raise UserError(f"--out {out}: is a file, not a folder")
        if any(folder.glob("checkpoints/*.pt")):
            raise UserError(f"--out {out} holds a run: go on with --resume, or choose another --out")
        begun = about.is_file() and f'"script": "{script}"' in about.read_text(errors="replace")  # and never saved
        if folder.is_dir() and any(folder.iterdir()) and not begun:
            raise UserError(f"--out {out} holds other files: choose an empty or a new folder")
        return out
    Path("runs").mkdir(exist_ok=True)
    for k in itertools.count(1):
        folder = Path(f"runs/{script}" + (f"-{k}" if k > 1 else ""))
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    return str(folder)


# ------------------------------------------------------------------------------------------------------------- device


def rank_and_world():
    """This process's rank and the number of processes: (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def of_rank_0(value):
    """Rank 0's value (numbers, text), in every process."""
    values = [value]
    if rank_and_world()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def first_here():
    """Whether this process is the one of its machine that writes what all processes there read: stores, demo worlds."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def start(cfg):
    """The device to work on, with the process group (under torchrun) and the random numbers started from --seed."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible here (leave --device out to run on the CPU)")
    cuda = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(cfg.seed)
    return device


def seed_step(seed, epoch, batch):
    """Sets PyTorch's random numbers from (seed, epoch, batch, rank) alone: a resumed run needs no generator state."""
    words = np.random.SeedSequence([seed, epoch, batch, rank_and_world()[0]]).generate_state(2)
    torch.manual_seed(int(words[0]) << 31 ^ int(words[1]))


def autocast(cfg, device):
    """bf16 autocast where --precision says so (auto: on CUDA), else nothing; never fp16, whose range GANs overflow."""
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def place(net, device):
    """A network on the device, in the memory format that is fastest there: on CUDA channels_last, but not with
    InstanceNorm, whose backward pass is wrong in PyTorch 2.13 for one image with a channels_last gradient."""
    instance_norm = any(isinstance(module, torch.nn.InstanceNorm2d) for module in net.modules())
    plain = device.type == "cpu" or instance_norm
    return net.to(device, memory_format=torch.contiguous_format if plain else torch.channels_last)


def adam(module, cfg, device):
    """Fused Adam at cfg.lr, betas (cfg.beta1, 0.999); on CUDA its rate is a tensor, so that a graph can capture it."""
    cuda = device.type == "cuda"
    lr = torch.tensor(cfg.lr, device=device) if cuda else cfg.lr
    return torch.optim.Adam(module.parameters(), lr=lr, betas=(cfg.beta1, 0.999), fused=True, capturable=cuda)


def set_lr(optimizers, lr):
    """Gives every optimizer the rate lr, in place where the rate is a tensor that a captured graph reads."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def average_gradients(module):
    """Averages a module's gradients over all processes, as one flat message; does nothing in a single process."""
    world = rank_and_world()[1]
    if world > 1:
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        for grad, mean in zip(grads, flat.div_(world).split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view(grad.shape))


class GraphedStep:
    """train_step captured whole in one CUDA graph: the first calls run as they are on a side stream (they train, too),
    the next captures, and from then on a call copies its batch into the graph's own tensors and replays.

    Called like train_step. The losses it returns are overwritten by the next call.
    """

    warmup = 3

    def __init__(self, step):
        self.step, self.calls, self.graph = step, 0, None

    def __call__(self, state, batch, cfg):
        self.calls += 1
        if self.calls <= self.warmup:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                losses = self.step(state, batch, cfg)
            torch.cuda.current_stream().wait_stream(side)
            return losses
        if self.graph is None:
            self.batch = tuple(tensor.clone() for tensor in batch)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # another thread may pin memory
                self.losses = self.step(state, self.batch, cfg)
        for static, tensor in zip(self.batch, batch, strict=True):
            static.copy_(tensor)
        self.graph.replay()
        return self.losses


def fast_step(step, cfg, device):
    """train_step the way this device runs it fastest: captured in a CUDA graph, or as it is (CPU, or --no-graph)."""
    return GraphedStep(step) if device.type == "cuda" and cfg.graph else step


# ------------------------------------------------------------------------------------------------ data: class tables

IGNORED = 255  # index of what has no class: it enters no loss and no measure

_S2GLC = """0 255,255,255 Clouds|62 210,0,0 Artificial surfaces and constructions|73 253,211,39 Cultivated areas|
75 176,91,16 Vineyards|82 35,152,0 Broadleaf tree cover|83 8,98,0 Coniferous tree cover|
102 249,150,39 Herbaceous vegetation|103 141,139,0 Moors and Heathland|104 95,53,6 Sclerophyllous vegetation|
105 149,107,196 Marshes|106 77,37,106 Peatbogs|121 154,154,154 Natural material surfaces|
123 106,255,255 Permanent snow covered surfaces|162 20,69,249 Water bodies"""
_MAPS = """0 233,229,222 land|1 243,241,235 building|2 254,254,252 road|3 252,157,36 motorway|4 177,208,254 water|
5 203,223,172 park|6 186,210,186 cemetery|7 222,218,212 paved|8 211,201,189 airfield"""
_BINARY = "0 0,0,0 background|255 255,255,255 foreground"


def _builtin(text):
    rows = [row.strip().split(" ", 2) for row in text.split("|")]
    return [{"name": name, "value": int(value), "color": color} for value, color, name in rows]


BUILTIN_CLASSES = {"s2glc": _builtin(_S2GLC), "maps": _builtin(_MAPS), "binary": _builtin(_BINARY)}


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """The classes of a label map. Index i has names[i] and colors[i]; what is ignored has no index but IGNORED.

    names     of the n classes
    colors    (r, g, b) of each
    rows      (value, (r, g, b), index or IGNORED) of every row of the table, ignored rows included, in its order
    nearest   colours are matched to the nearest (pictures that went through JPEG), not exactly
    text      the table as JSON: load(text) gives it back
    """

    names: tuple
    colors: tuple
    rows: tuple
    nearest: bool
    text: str

    @staticmethod
    def load(source):
        """The table called source: s2glc, maps or binary, a path to a classes.json, or JSON text. None for "" and for
        "pictures", which says that B is no label map, whatever it looks like."""
        if source in ("", "pictures"):
            return None
        if source in BUILTIN_CLASSES:
            return ClassTable._build(BUILTIN_CLASSES[source], source == "maps", source)
        try:
            table = json.loads(
                source if source.lstrip().startswith(("[", "{")) else Path(source).read_text("utf-8-sig")
            )
            entries, nearest = (table["classes"], table["nearest"]) if isinstance(table, dict) else (table, False)
            return ClassTable._build(entries, nearest, source[:60])
        except FileNotFoundError:
            raise UserError(f"class table {source}: no such file (built in: {', '.join(BUILTIN_CLASSES)})") from None
        except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
            what = "not a list of {name, color, value, ignore}"
            raise UserError(f"class table {source[:60]}: {what} ({error!r})") from None

    @staticmethod
    def _build(entries, nearest, source):
        names, colors, rows = [], [], []
        for position, entry in enumerate(entries):
            color = entry["color"]
            if isinstance(color, str):
                text = color.lstrip("#")
                color = text.split(",") if "," in text else [int(text[k : k + 2], 16) for k in (0, 2, 4)]
            color = tuple(int(c) for c in color)
            if len(color) != 3 or not all(0 <= c <= 255 for c in color):
                raise ValueError(f"colour {entry['color']}")
            index = IGNORED if entry.get("ignore") else len(names)
            rows.append((int(entry.get("value", position)), color, index))
            if index != IGNORED:
                names.append(str(entry["name"]))
                colors.append(color)
        for column, what in ((0, "value"), (1, "color")):
            if len({row[column] for row in rows}) != len(rows):
                raise UserError(f"class table {source}: two classes have the same {what}")
        if not 2 <= len(names) < IGNORED or len(set(names)) != len(names):
            raise UserError(f"class table {source}: needs 2 to 254 classes, each with a name of its own")
        text = json.dumps({"nearest": nearest, "classes": entries})
        return ClassTable(tuple(names), tuple(colors), tuple(rows), nearest, text)

    def __len__(self):
        return len(self.names)

    @functools.cached_property
    def palette(self):
        """(256, 3) uint8: the colour of every index; black for IGNORED and whatever has no class."""
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self)] = self.colors
        ignored = [color for _, color, index in self.rows if index == IGNORED]
        palette[IGNORED] = ignored[0] if ignored else 0
        return palette

    def palette_on(self, device):
        """palette as a tensor (3, 256) in [-1, 1], for draw."""
        return from_bytes(torch.from_numpy(self.palette.T.copy())).to(device)

    def from_codes(self, codes, path):
        """(H, W) integers -> (H, W) uint8 indices; codes are the table's values, or 255, or positions in the table
        where these cannot be mistaken for values: no number is a value of one class and the position of another."""
        present = np.unique(codes)
        values = {value: index for value, _, index in self.rows}
        positions = {position: index for position, (_, _, index) in enumerate(self.rows)}
        if any(values.get(position, index) != index for position, index in positions.items()):
            positions = {}
        for table in ({IGNORED: IGNORED} | values, {IGNORED: IGNORED} | positions):
            if all(int(code) in table for code in present):
                return np.array([table[int(code)] for code in present], np.uint8)[np.searchsorted(present, codes)]
        wrong = [int(code) for code in present if int(code) not in values and int(code) not in positions]
        wrong = (wrong or present.tolist())[:8]
        raise UserError(f"{path}: label values {wrong} are outside the class table, whose values are {sorted(values)}")

    def from_colours(self, rgb, path, nearest):
        """(H, W, 3) uint8 -> (H, W) uint8 indices; stray colours become IGNORED, unless nearest takes the closest."""
        packed = (rgb.astype(np.int32) << (16, 8, 0)).sum(-1)
        present, inverse = np.unique(packed, return_inverse=True)
        present_rgb = (present[:, None] >> (16, 8, 0)) & 255  # (K, 3)
        colors = np.array([color for _, color, _ in self.rows])
        distance = np.stack([((present_rgb - color) ** 2).sum(1) for color in colors])  # (rows, K)
        index = np.array([row[2] for row in self.rows], np.uint8)[distance.argmin(0)]
        if not nearest:
            exact = distance.min(0) == 0
            if not exact.any():
                raise UserError(f"{path}: no pixel has a colour of the class table ({', '.join(self.names[:6])}, ...)")
            index[~exact] = IGNORED
        return index[inverse.reshape(packed.shape)]

    def from_one_hot(self, array, path):
        """(H, W, C) or (C, H, W) one-hot -> (H, W) uint8 indices; a pixel with no class at all becomes IGNORED."""
        counts = {len(self): range(len(self)), len(self.rows): [row[2] for row in self.rows]}  # ignored rows or not
        if array.shape[-1] not in counts and array.shape[0] in counts:
            array = np.moveaxis(array, 0, -1)
        if array.shape[-1] not in counts:
            raise UserError(f"{path}: shape {array.shape} is no one-hot of the class table's {len(self)} classes")
        index = np.array(counts[array.shape[-1]], np.uint8)[array.argmax(-1)]
        return np.where(array.max(-1) > 0, index, np.uint8(IGNORED))


# ---------------------------------------------------------------------------------------------- data: files on disk

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}
ARRAY_SUFFIXES = {".npy", ".npz"}
LOSSY = {".jpg", ".jpeg", ".webp"}
LAYOUTS = (
    "train/1.jpg, twice as wide as high (pairs side by side); train/A/x.png + train/B/x.png (two folders); "
    "trainA/x.jpg + trainB/y.jpg (unaligned); train/rgb/7.png + train/lc/7.png (land cover); "
    "train/images/vienna1.tif + train/gt/vienna1.tif (Inria)"
)
_INRIA_VALIDATION = re.compile(r"(austin|chicago|kitsap|tyrol-w|vienna)[1-5]$")


@contextlib.contextmanager
def _decoding(path):
    """Turns whatever a decoder raises into one line that names the file."""
    Image.MAX_IMAGE_PIXELS = None  # rasters are large on purpose
    try:
        yield
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # Pillow and numpy raise a dozen kinds, as files differ
        raise UserError(f"{path}: cannot be decoded ({error}): replace or remove the file") from None


def read_image(path):
    """An image file as (H, W, 3) uint8."""
    with _decoding(path), Image.open(path) as image:
        if image.mode.startswith(("I", "F")) or ";16" in str(image.tile):
            raise UserError(f"{path}: has more than 8 bits a channel: convert it to 8 bits, with limits of your choice")
        return np.asarray(image.convert("RGB"))


def read_labels(path, table):
    """A label map as (H, W) uint8 class indices, from an array file or an image of indices, code values or colours."""
    with _decoding(path):
        if Path(path).suffix.lower() in ARRAY_SUFFIXES:
            array = np.load(path)
            if isinstance(array, np.lib.npyio.NpzFile):
                array = array[array.files[0]]
            if array.ndim == 3 and 1 not in (array.shape[0], array.shape[-1]):
                return table.from_one_hot(array, path)
            if not (array == array.astype(np.int64)).all():
                raise UserError(f"{path}: holds fractions, which are no class indices")
            return table.from_codes(array.squeeze().astype(np.int64), path)
        with Image.open(path) as image:
            if image.mode == "P":  # class colours that were stored with a palette, or else indices
                rgb = np.asarray(image.convert("RGB"))
                used = {tuple(int(c) for c in color) for color in np.unique(rgb.reshape(-1, 3), axis=0)}
                if 2 * len(used & {color for _, color, _ in table.rows}) > len(used):
                    return table.from_colours(rgb, path, False)
                return table.from_codes(np.asarray(image).astype(np.int64), path)
            if image.mode in ("1", "L", "I", "I;16", "I;16B", "I;16L"):
                return table.from_codes(np.asarray(image).astype(np.int64), path)
            lossy = table.nearest or image.format in ("JPEG", "WEBP")
            return table.from_colours(np.asarray(image.convert("RGB")), path, lossy)


def _image_size(path):
    """(width, height) of an image or array file, from its header where the format has one."""
    with _decoding(path):
        if path.suffix.lower() in ARRAY_SUFFIXES:
            array = np.load(path, mmap_mode="r")
            if isinstance(array, np.lib.npyio.NpzFile):
                array = array[array.files[0]]
            shape = [s for s in array.shape if s != 1]
            if len(shape) == 3:  # the class axis is the short one
                shape.pop(0 if shape[0] < shape[2] else 2)
            return shape[1], shape[0]
        with Image.open(path) as image:
            return image.size


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of one split: two lists of files, A and B.

    paired    A[i] and B[i] show the same place
    halves    A[i] and B[i] are the left and the right half of one file
    classes   the ClassTable of B when B holds label maps, else None
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
    suffixes = IMAGE_SUFFIXES | (ARRAY_SUFFIXES if labels else set())
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))


def _match(a, b, where):
    """Two lists of files matched by stem; refuses partners that are missing or double."""
    stems_a, stems_b = ({path.stem: path for path in paths} for paths in (a, b))
    lone = sorted(set(stems_a) ^ set(stems_b))
    if lone:
        path = stems_a.get(lone[0]) or stems_b.get(lone[0])
        raise UserError(f"{where}: {len(a)} images on one side, {len(b)} on the other; {path} has no partner")
    if len(stems_a) != len(a) or len(stems_b) != len(b):
        raise UserError(f"{where}: two files in one folder have the same name but for their ending")
    return list(stems_a.values()), [stems_b[stem] for stem in stems_a]


def find_images(data, split, lc_classes=""):
    """Recognises the layout of a dataset directory (LAYOUTS) and lists the split "train" or "val" as a Split.

    The validation split is val, or test where there is no val; in the Inria layout images 1-5 of each city.
    B is taken for label maps in the layouts land cover and Inria, with a classes.json in data, or with lc_classes;
    lc_classes "pictures" takes it for pictures all the same.
    """
    root = Path(data)
    if not root.is_dir():
        what = "is a file, not a directory" if root.is_file() else "no such directory"
        raise UserError(f"--data {root}: {what} (--data also tells a checkpoint where its data lies now)")
    table_file = root / "classes.json"
    inria = root / "train" / "images", root / "train" / "gt"
    found = str(table_file) if table_file.is_file() else "binary" if inria[1].is_dir() else ""
    table, pictures = ClassTable.load(lc_classes or found), lc_classes == "pictures"
    for name in ("train",) if split == "train" else ("val", "validation", "test"):
        folders = {
            "unaligned": (root / f"{name}A", root / f"{name}B"),
            "two folders": (root / name / "A", root / name / "B"),
            "two folders ": (root / name / "a", root / name / "b"),
            "land cover": (root / name / "rgb", root / name / "lc"),
            "Inria": (root / name / "images", root / name / "gt"),
        }
        for layout, (folder_a, folder_b) in folders.items():
            if not (folder_a.is_dir() and folder_b.is_dir()):
                continue
            layout = layout.strip()
            a, b = _files(folder_a), _files(folder_b, labels=layout in ("land cover", "Inria") or table is not None)
            if layout == "Inria" and split == "train" and not (root / "val" / "gt").is_dir():
                a, b = ([p for p in paths if not _INRIA_VALIDATION.match(p.stem)] for paths in (a, b))
            return _split(root, layout, name, folder_a, folder_b, a, b, table, pictures)
        if (root / name).is_dir() and (files := _files(root / name)):
            return Split(root, "side by side", name, files, files, True, True, table)
    if split == "val" and all(folder.is_dir() for folder in inria):
        a, b = ([p for p in _files(f, labels=True) if _INRIA_VALIDATION.match(p.stem)] for f in inria)
        return _split(root, "Inria", "train, images 1-5 of each city", *inria, a, b, table, pictures)
    if split == "train" and any((root / name).is_dir() for name in ("val", "test", "valA", "testA")):
        raise UserError(f"{root}: no training split: put images in train; baselines are measured on it, too")
    if split == "val" and any((root / name).is_dir() for name in ("train", "trainA")):
        raise UserError(f"{root}: no validation split: put some of the images in val (laid out like train), or in test")
    raise UserError(f"{root}: no layout that is known here; known are: {LAYOUTS}")


def _split(root, layout, name, folder_a, folder_b, a, b, table, pictures):
    for folder, files in ((folder_a, a), (folder_b, b)):
        if not files:
            raise UserError(f"{folder}: no images in split {name}")
    if layout != "unaligned":
        a, b = _match(a, b, f"{root}, split {name}")
    if layout == "land cover" and table is None and not pictures:
        raise UserError(f"{root}: label maps need a class table: write {root}/classes.json or pass --lc-classes s2glc")
    return Split(root, layout, name, a, b, layout != "unaligned", False, table)


# ------------------------------------------------------------------------------------------- data: decoded just once


def _readable(path):
    """Whether path is a whole .npy file."""
    try:
        np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return True


class ImageStore:
    """Every image of a split, decoded, cut and resized once, in a memory-mapped uint8 file that later runs find again.

    cfg    its data, lc_classes (see find_images), patch (cut sources into patches of this side first; 0: whole images)
           and cache, the folder of the store files (none: cache/ beside the run folder)
    split  "train" or "val"
    side   every image, or patch, is resized to side x side (bicubic; labels nearest)
    demo   which demo world stands in when cfg.data is empty: "maps" or "landcover"
    smallest  images, or patches, of a smaller side than this are refused

    A  (N, 3, side, side) uint8
    B  (M, 3, side, side) uint8, or (M, 1, side, side) uint8 class indices when classes is not None; M = N if paired
    records  (N, 3 + 3 or 1, side, side) uint8, A and B one after the other, if paired; else None

    The file's name is a hash of the list of files, their sizes and times, and every parameter. It is written aside
    and renamed, so that it is whole or absent.
    """

    def __init__(self, cfg, split, side, demo="maps", smallest=0):
        self.cache = Path(cfg.cache) if cfg.cache else Path(cfg.out or "runs/run").parent / "cache"
        self.split = find_images(cfg.data or demo_world(self.cache, demo), split, cfg.lc_classes)
        self.classes, self.paired = self.split.classes, self.split.paired
        self.side, self.patch, self.smallest = side, cfg.patch, smallest
        if self.paired:
            self.records = self._open(list(zip(self.split.A, self.split.B, strict=True)), "AB")
            self.A, self.B = self.records[:, :3], self.records[:, 3:]
        else:
            self.records = None
            self.A = self._open([(path, None) for path in self.split.A], "A")
            self.B = self._open([(None, path) for path in self.split.B], "B")
        if rank_and_world()[0] == 0:
            files = f"{len(self.split.A)}" + ("" if self.paired else f" + {len(self.split.B)}") + " files"
            cut = f" cut into {len(self.A)} patches of {self.patch}" if self.patch else ""
            about = f"{self.split.root}: {self.split.layout}, split {self.split.name}: {files}{cut}{self._labels()}"
            print(about, file=sys.stderr)

    def _labels(self):
        """What there is to say of B's labels; refuses maps without any."""
        if not self.classes:
            return ""
        ignored = np.mean(self.B[:: -(-len(self.B) // 100)] == IGNORED)
        if ignored == 1 and all((image == IGNORED).all() for image in self.B):
            raise UserError(f"{self.split.root}, split {self.split.name}: no pixel has a class: check the class table")
        share = f", {ignored:.0%} of the pixels ignored" if ignored >= 0.005 else ""
        return f", B labels of {len(self.classes)} classes{share}"

    def _open(self, pairs, what):
        table = self.classes and (self.classes.rows, self.classes.nearest)
        text = [f"{what} planar {self.side} {self.patch} {self.split.halves} {table}"]
        for path in (path for pair in pairs for path in pair if path):
            stat = path.stat()
            text.append(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}")
        digest = hashlib.sha256(os.fsencode("\n".join(text))).hexdigest()[:16]
        path = self.cache / f"{re.sub(r'[^A-Za-z0-9]+', '-', self.split.name)}-{what}-{self.side}px-{digest}.npy"
        if first_here() and not _readable(path):
            self._build(pairs, path)
        if rank_and_world()[1] > 1:
            dist.barrier()
        return np.load(path, mmap_mode="c")  # nothing writes; torch wants what it could write to

    def _build(self, pairs, path):
        pool = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes and resizes outside the interpreter lock
        try:
            counts = list(pool.map(self._count, pairs))
            if sum(counts) == 0:
                raise UserError(f"--patch {self.patch}: no image of {self.split.root} is that large")
            ends = np.cumsum(counts)
            channels = sum(0 if p is None else 3 if k == 0 or not self.classes else 1 for k, p in enumerate(pairs[0]))
            shape = (int(ends[-1]), channels, self.side, self.side)
            self.cache.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                with open(aside, "wb") as file:
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    offset = file.tell()
                    file.flush()
                    if hasattr(os, "posix_fallocate"):  # Linux: a full disk says so here
                        os.posix_fallocate(file.fileno(), 0, offset + math.prod(shape))
                    else:
                        file.truncate(offset + math.prod(shape))
                store = np.memmap(aside, np.uint8, "r+", offset, shape)

                def work(k):
                    if counts[k]:
                        store[ends[k] - counts[k] : ends[k]] = self._decode(pairs[k])

                jobs = pool.map(work, range(len(pairs)))
                jobs = tqdm(jobs, f"decoding {self.split.name}", len(pairs), unit="file", leave=False, disable=None)
                collections.deque(jobs, 0)
                store.flush()
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)
        finally:
            pool.shutdown(cancel_futures=True)

    def _count(self, pair):
        """How many records a file gives; refuses sizes that do not fit together."""
        sizes = [_image_size(path) for path in pair if path]
        width, height = sizes[0]
        if self.split.halves:
            if width != 2 * height:
                raise UserError(f"{pair[0]}: {width}x{height} is no pair side by side, which is twice as wide as high")
            width = height
        elif sizes[0] != sizes[-1]:
            other = f"{pair[1]} is {sizes[1][0]}x{sizes[1][1]}"
            raise UserError(f"{pair[0]} is {width}x{height} but {other}: sizes must agree")
        if min(width, height, self.patch or width) < self.smallest:
            cut = f" cut into patches of {self.patch}" if self.patch else ""
            raise UserError(f"{next(filter(None, pair))}: {width}x{height}{cut} is smaller than --size {self.smallest}")
        return (width // self.patch) * (height // self.patch) if self.patch else 1

    def _decode(self, pair):
        """One file, or pair of files, as (records, channels, side, side) uint8."""
        path_a, path_b = pair
        if self.split.halves:
            both = read_image(path_a)
            a, b = both[:, : both.shape[0]], both[:, both.shape[0] :]
            if self.classes:
                b = self.classes.from_colours(b, path_a, self.classes.nearest or path_a.suffix.lower() in LOSSY)
            images = [a, b]
        else:
            images = [] if path_a is None else [read_image(path_a)]
            if path_b is not None:
                images.append(read_labels(path_b, self.classes) if self.classes else read_image(path_b))
        patches = [list(self._patches(image)) for image in images]
        return np.stack([np.concatenate(record) for record in zip(*patches, strict=True)])

    def _patches(self, image):
        step_y, step_x = (self.patch, self.patch) if self.patch else image.shape[:2]
        for top in range(0, image.shape[0] - step_y + 1, step_y):
            for left in range(0, image.shape[1] - step_x + 1, step_x):
                cut = Image.fromarray(np.ascontiguousarray(image[top : top + step_y, left : left + step_x]))
                how = Image.Resampling.BICUBIC if image.ndim == 3 else Image.Resampling.NEAREST
                resized = np.asarray(cut.resize((self.side, self.side), how))
                yield resized.transpose(2, 0, 1) if image.ndim == 3 else resized[None]


class Rows:
    """Rows of a uint8 array (N, C, side, side), taken in batches onto the device.

    On a GPU the array lives there when it fits in share of the free memory; otherwise a background thread gathers the
    next batches into pinned memory. On the CPU rows are views into the memory-mapped file: nothing is copied before
    its crop is known.
    """

    def __init__(self, array, device, share=0.4):
        self.device = device
        self.resident = device.type == "cpu" or array.size < share * torch.cuda.mem_get_info(device)[0]
        self.rows = torch.from_numpy(array).to(device) if self.resident else torch.from_numpy(array)

    def __len__(self):
        return len(self.rows)

    def batches(self, index):
        """index (steps, B) of rows -> yields, step by step, lists of B images (C, side, side) uint8 on the device."""
        if self.resident:
            for rows in index.tolist():
                yield [self.rows[row] for row in rows]
        else:
            yield from self._prefetched(index)

    def _prefetched(self, index, ahead=4):
        ready, stop = queue.Queue(ahead), threading.Event()

        def gather():
            for rows in index:
                if stop.is_set():
                    return
                try:
                    ready.put(self.rows[torch.from_numpy(rows)].pin_memory())
                except Exception as error:
                    ready.put(error)
                    return

        worker = threading.Thread(target=gather, daemon=True)
        worker.start()
        try:
            for _ in index:
                batch = ready.get()
                if isinstance(batch, Exception):
                    raise batch
                yield list(batch.to(self.device, non_blocking=True))
        finally:
            stop.set()
            while worker.is_alive():  # it may wait to put one more batch
                with contextlib.suppress(queue.Empty):
                    ready.get(timeout=0.01)


def steps_in_epoch(count, batch_size):
    """How many batches count images give in an epoch, the same number in every process; the remainder is left out."""
    world = rank_and_world()[1]
    if count < batch_size * world:
        raise UserError(f"--batch-size {batch_size} in {world} process(es) is more than the {count} training images")
    return count // (batch_size * world)


def rank_rows(order, batch_size):
    """An epoch's order of rows (N, ...) as (steps, batch_size, ...): this process's share of every step."""
    rank, world = rank_and_world()
    steps = steps_in_epoch(len(order), batch_size)
    return order[: steps * batch_size * world].reshape(steps, world, batch_size, *order.shape[1:])[:, rank]


# --------------------------------------------------------------------------------------------------- data: demo world

DEMO_CLASSES = ("grass", "field", "forest", "water", "building", "road")
_DEMO_COLORS = ((170, 200, 120), (240, 220, 110), (40, 110, 50), (60, 110, 210), (190, 60, 50), (250, 250, 250))
_DEMO_MAP = ((233, 229, 222), (186, 210, 186), (203, 223, 172), (177, 208, 254), (222, 218, 212), (254, 254, 252))


def landscape(rng, side):
    """A procedural landscape as (satellite, map, classes): (side, side, 3) uint8 twice, (side, side) uint8 indices."""
    fx, fy = np.meshgrid(np.fft.rfftfreq(side), np.fft.fftfreq(side))
    radius = np.maximum(np.hypot(fx, fy), 1 / side)

    def noise(slope):  # spectrum 1 / f^slope, mean 0, deviation 1
        field = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(side, side))) / radius**slope, (side, side))
        return (field - field.mean()) / field.std()

    y, x = np.mgrid[:side, :side]
    elevation, moisture, warp = noise(2.2), noise(1.9), noise(2.5)
    angle = rng.uniform(0, np.pi)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    parcel = (u // rng.integers(24, 40)).astype(int) * 57 + (v // rng.integers(16, 28)).astype(int) * 131
    tint = rng.uniform(-1, 1, (4096, 3))[parcel % 4096]  # (side, side, 3), one colour a field

    ground = np.zeros((side, side), np.uint8)
    ground[(moisture < 0.2) & (np.abs(elevation) < 1.2)] = 1
    ground[moisture > 0.5] = 2
    ground[elevation < -0.8] = 3
    for _ in range(rng.integers(1, 4)):  # towns: a street grid, a house on most blocks, and a road that leaves
        cx, cy, reach = rng.uniform(0.1, 0.9) * side, rng.uniform(0.1, 0.9) * side, rng.uniform(0.1, 0.22) * side
        block = side // 18
        town = (np.hypot(x - cx, y - cy) + 0.15 * reach * warp < reach) & (ground != 3)
        inside = (u % block > 0.35 * block) & (v % block > 0.35 * block)
        ground[town] = np.where(inside & (tint[..., 0] + warp < 1.5), 4, 0)[town]
        ground[town & ((u % block < 0.2 * block) | (v % block < 0.2 * block))] = 5
        across = (x - cx) * np.sin(angle) - (y - cy) * np.cos(angle) + side / 40 * (warp - warp[int(cy), int(cx)])
        ground[np.abs(across) < side / 100] = 5

    base = np.array([(104, 122, 76), (140, 132, 84), (46, 72, 44), (34, 62, 88), (160, 128, 112), (132, 130, 126)])
    satellite = base[ground] + 6 * rng.normal(size=(side, side, 1))
    satellite += np.where((ground == 1)[..., None], 14 * tint + 5 * np.sin(u * 1.3)[..., None], 0)
    satellite += np.where((ground == 2)[..., None], 12 * noise(0.4)[..., None], 0)
    satellite += np.where((ground == 4)[..., None], 30 * tint[..., :1], 0)
    shade = np.where(ground == 3, 4 * moisture, 9 * (np.roll(elevation, 2, 1) - np.roll(elevation, -2, 1)) * side / 64)
    satellite = np.clip(satellite + shade[..., None], 0, 255).astype(np.uint8)
    return satellite, np.array(_DEMO_MAP, np.uint8)[ground], ground


def demo_world(cache, kind, train=96, val=12, side=256):
    """Writes a small dataset of landscapes under cache, once, and returns its directory.

    kind  "maps": pairs side by side, satellite | map; "landcover": rgb and lc folders with classes.json
    """
    root, labels = Path(cache) / f"demo-{kind}", kind == "landcover"
    if first_here() and not root.exists():
        aside = root.with_name(f".{root.name}.{os.getpid()}")  # written aside and renamed: whole or absent
        for split, count, first in (("train", train, 0), ("val", val, 100_000)):
            for name in ("rgb", "lc") if labels else ("",):
                (aside / split / name).mkdir(parents=True, exist_ok=True)
            for k in tqdm(range(count), f"demo world, {split}", unit="image", leave=False, disable=None):
                satellite, drawn, ground = landscape(np.random.default_rng([7, first + k]), side)
                if labels:
                    Image.fromarray(satellite).save(aside / split / "rgb" / f"{k:03}.png")
                    Image.fromarray(ground).save(aside / split / "lc" / f"{k:03}.png")
                else:
                    Image.fromarray(np.concatenate([satellite, drawn], 1)).save(aside / split / f"{k:03}.png")
        if labels:
            rows = zip(DEMO_CLASSES, _DEMO_COLORS, strict=True)
            table = [{"name": name, "color": ",".join(map(str, color))} for name, color in rows]
            (aside / "classes.json").write_text(json.dumps(table))
        try:
            aside.rename(root)
        except OSError:  # another process was faster, and its world is the same
            shutil.rmtree(aside)
    if rank_and_world()[1] > 1:
        dist.barrier()
    return str(root)


# -------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path, content):
    """Writes content (dicts, lists, numbers, tensors) aside, fsyncs and renames: path is whole, old or new, always."""
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
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        remedy = "free some space; what was saved before is kept"
        raise UserError(f"{path}: cannot be written ({reason}): {remedy}") from None
    finally:
        aside.unlink(missing_ok=True)


def load_weights(path):
    """A file of tensors, read with weights_only=True onto the CPU."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a directory: name a file, such as {Path(path) / 'checkpoints' / 'last.pt'}")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):  # torch.load checks no sums
            raise ValueError(f"checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds on a damaged file
        reason = (str(error).splitlines() or [repr(error)])[0][:90]
        older = sorted(Path(path).parent.glob("epoch_*.pt"))[-1:] if Path(path).name == "last.pt" else []
        remedy = f": {older[0]} is an older one, to put in its place" if older else ""
        raise UserError(f"{path}: not a checkpoint, or a damaged one ({reason}){remedy}") from None


def load_checkpoint(path, script):
    """A checkpoint that script ("pix2pix", ...) wrote; refuses another script's."""
    content = load_weights(path)
    parts = [content.get(name) for name in ("config", "state")] if isinstance(content, dict) else [None]
    if not (all(isinstance(part, dict) for part in parts) and "script" in content):
        raise UserError(f"{path}: not a checkpoint of {script}.py (published generator weights go with --init)")
    if content["script"] != script:
        raise UserError(f"{path}: written by {content['script']}.py: use that script, not {script}.py")
    return content


RANKS = "buffers of ranks"


def buffers_of_ranks(state):
    """What processes other than the first have of their own: [{module: {buffer: tensor}} for rank 1, 2, ...] in rank 0,
    where it goes into the checkpoint; weights and optimizers are the same in all."""
    rank, world = rank_and_world()
    own = {}
    for name, module in vars(state).items():
        if isinstance(module, torch.nn.Module):
            own[name] = {key: buffer.cpu() for key, buffer in module.named_buffers()}
    gathered = [None] * world if rank == 0 else None
    dist.gather_object(own, gathered)
    return gathered[1:] if rank == 0 else []


def state_dict(state):
    """What a checkpoint holds of a State: modules and optimizers by their state_dict, tensors and numbers as such."""
    kept = {name: value for name, value in vars(state).items() if _is_kept(value)}
    return {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in kept.items()}


def _is_kept(value):
    return hasattr(value, "state_dict") or isinstance(value, (torch.Tensor, int, float))


def restore(state, saved, path):
    """Puts a checkpoint's state back into a State, in place. What the State lacks (an optimizer, when one only
    generates) is passed over; what the checkpoint lacks is refused. Processes other than the first take their own
    buffers from it (image pools, running statistics)."""
    for name, value in vars(state).items():
        if not _is_kept(value):
            continue
        if name not in saved:
            raise UserError(f"{path}: holds no {name}: written by another version of this script")
        if hasattr(value, "load_state_dict"):
            here = [dict(group) for group in getattr(value, "param_groups", [])]
            try:
                value.load_state_dict(saved[name])
            except (RuntimeError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split())[:160]
                raise UserError(f"{path}: its {name} does not fit the options ({reason})") from None
            for group, own in zip(getattr(value, "param_groups", []), here, strict=True):  # of this device, not that
                rate = float(group["lr"])
                group.update({key: own[key] for key in ("lr", "fused", "capturable")})
                set_lr([value], rate)
        elif isinstance(value, torch.Tensor):
            value.copy_(saved[name])
        else:
            setattr(state, name, saved[name])
    rank = rank_and_world()[0]
    for name, buffers in (saved[RANKS][rank - 1] if rank and RANKS in saved else {}).items():
        getattr(state, name).load_state_dict(buffers, strict=False)


def load_generator(module, path, cfg, key="G"):
    """Fills a generator from path: network `key` of one of our checkpoints, or a bare state dict (a published
    generator's), whose tensors are taken by position. Buffers of InstanceNorm layers in old files are dropped."""
    content = load_weights(path)
    if isinstance(content, dict) and isinstance(content.get("state"), dict):
        content = content["state"].get(key)
    if not (isinstance(content, dict) and content and all(isinstance(v, torch.Tensor) for v in content.values())):
        raise UserError(f"{path}: holds no generator {key} and is no state dict")
    ours = module.state_dict()
    if not any("running_mean" in name for name in ours):
        content = {k: v for k, v in content.items() if not re.search("running_(mean|var)$|num_batches_tracked$", k)}
    options = [name for name in ("generator", "norm", "size", "width", "blocks", "lc_classes") if hasattr(cfg, name)]
    remedy = f"check {', '.join(map(flag, options))}"
    if len(ours) != len(content):
        raise UserError(f"{path}: {len(content)} tensors, but this generator has {len(ours)}: {remedy}")
    for (name, mine), (theirs, value) in zip(ours.items(), content.items(), strict=True):
        if mine.shape != value.shape:
            shapes = f"{theirs} is {tuple(value.shape)}, but our {name} is {tuple(mine.shape)}"
            raise UserError(f"{path}: {shapes}: {remedy}")
    module.load_state_dict(dict(zip(ours, content.values(), strict=True)))


def vgg16_weights(path, wanted):
    """Tensors of the names and shapes of `wanted` (features.0.weight, ...), of ImageNet's VGG16 in torchvision's
    layout, {name: tensor}: from a file, or, for "", from torch.hub's cache or its download, whose hash is checked."""
    if path:
        weights = load_weights(path)
    else:
        url = "https://download.pytorch.org/models/vgg16-397923af.pth"
        try:
            weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        except Exception as error:
            remedy = f"fetch {url} and pass it with --vgg16 FILE"
            raise UserError(f"VGG16 is not at hand ({type(error).__name__}): {remedy}") from None
    for name, tensor in wanted.items():
        found = weights.get(name) if isinstance(weights, dict) else None
        if not isinstance(found, torch.Tensor) or found.shape != tensor.shape:
            what = f"no {name} of shape {tuple(tensor.shape)}"
            raise UserError(f"--vgg16 {path}: {what} in it: torchvision's vgg16 state dict is needed")
    return {name: weights[name] for name in wanted}


# ----------------------------------------------------------------------------------------------------- the run folder


SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
    SIGNALS.append(signal.SIGHUP)
REMEDY = "try a lower --lr, --precision fp32, or look for odd images in the data"


class Run:
    """The folder of one training run: config.json, metrics.csv, losses.png, samples/, checkpoints/.

    cfg, checkpoint  as settle() returned them
    script           its name, kept in the checkpoints
    scores           names of the measures that close an epoch's last row of metrics.csv

    epoch, batch, step  where training stands: epochs done, batches done in this epoch, steps done in all
    interrupted         the number of a signal (one of SIGNALS) that asked to stop, else 0
    """

    def __init__(self, cfg, checkpoint, script, steps_per_epoch, scores=()):
        self.cfg, self.script, self.scores, self.steps_per_epoch = cfg, script, scores, steps_per_epoch
        self.out, self.rank = Path(cfg.out), rank_and_world()[0]
        saved = checkpoint or {"epoch": 0, "batch": 0, "step": 0, "names": [], "sums": None, "count": 0}
        self.epoch, self.batch, self.step = saved["epoch"], saved["batch"], saved["step"]
        self.names, self.sums, self.count, self.lr = saved["names"], saved["sums"], saved["count"], 0.0
        self.interrupted, self.means, self.tracker = 0, {}, None
        for number in SIGNALS:
            signal.signal(number, self._interrupt)
        if self.rank:
            self.bar = tqdm(disable=True)
            return
        (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        (self.out / "samples").mkdir(exist_ok=True)
        about = {
            "script": script,
            "options": dataclasses.asdict(cfg),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "processes": rank_and_world()[1],
            "git_commit": _git_commit(),
        }
        (self.out / "config.json").write_text(json.dumps(about, indent=2) + "\n")
        self.metrics = self.out / "metrics.csv"
        rows = read_metrics(self.metrics) if checkpoint else []
        self.rows = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) <= self.step]
        self._rewrite_metrics()
        if cfg.track:
            self.tracker = _tracker(cfg, self.out, script)
        images = cfg.batch_size * rank_and_world()[1]
        total = cfg.epochs * steps_per_epoch * images
        self.bar = tqdm(total=total, initial=self.step * images, unit="image", dynamic_ncols=True, smoothing=0.05)
        self.bar.write(f"run folder {self.out}", file=sys.stderr)

    def _interrupt(self, number, frame):
        self.interrupted = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        if self.rank == 0:
            os.write(2, b"\nstopping: this step is finished and saved first\n")

    def stopping(self):
        """Whether to save and stop. Several processes agree on it, every ten steps, so that all stop at one step."""
        if rank_and_world()[1] > 1:
            if self.step % 10:
                return False
            asked = torch.tensor(self.interrupted, device="cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            self.interrupted = int(asked)
        return self.interrupted != 0

    def log(self, losses):
        """Takes a step's losses {name: 0-d tensor}; their means are read and written every --log-every steps."""
        self.names = list(losses)
        values = torch.stack([value.detach().double() for value in losses.values()])
        self.sums = values if self.sums is None else self.sums.to(values.device) + values
        self.count, self.step, self.batch = self.count + 1, self.step + 1, self.batch + 1
        self.bar.update(self.cfg.batch_size * rank_and_world()[1])
        if self.step % self.cfg.log_every == 0 and self.batch < self.steps_per_epoch:
            self._flush({})  # an epoch's last row waits for its scores

    def _flush(self, scores):
        if self.count:
            means = self.sums / self.count
            if rank_and_world()[1] > 1:
                dist.all_reduce(means)
                means /= rank_and_world()[1]
            self.means = dict(zip(self.names, means.tolist(), strict=True))
        bad = [name for name, value in (self.means | scores).items() if not math.isfinite(value)]
        if bad:
            raise UserError(f"{', '.join(bad)} not finite by step {self.step}: stopped; {self._kept()}; {REMEDY}")
        if (self.count or scores) and self.rank == 0:
            row = {"epoch": self.epoch + 1, "step": self.step, "lr": f"{self.lr:.8g}"}
            row |= {name: f"{value:.8g}" for name, value in self.means.items()}
            row |= {name: f"{scores[name]:.8g}" if name in scores else "" for name in self.scores}
            new = not self.rows
            self.rows.append(row)
            with open(self.metrics, "a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if new:
                    writer.writeheader()
                writer.writerow(row)
            if self.tracker:
                self.tracker({**self.means, **scores, "lr": self.lr}, {}, self.step)
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in self.means.items()}, refresh=False)
        self.sums, self.count = None, 0

    def _rewrite_metrics(self):
        aside = self.metrics.with_suffix(".tmp")
        with open(aside, "w", newline="") as file:
            if self.rows:
                writer = csv.DictWriter(file, self.rows[0])
                writer.writeheader()
                writer.writerows(self.rows)
        os.replace(aside, self.metrics)

    def end_epoch(self, state, scores, columns):
        """Closes an epoch: writes its last row with scores {name: value}, the sample grid, the plot and a checkpoint.

        columns  {title: (B, 3, H, W) in [-1, 1]}, the sample grid from left to right
        """
        self._flush(scores)
        self.epoch, self.batch = self.epoch + 1, 0
        if self.rank == 0:
            save_grid(self.out / "samples" / f"epoch_{self.epoch:04}.png", columns)
            plot_metrics(self.rows, self.out / "losses.png")
            if self.tracker:
                self.tracker({}, columns, self.step)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in (self.means | scores).items())
            self.bar.write(f"epoch {self.epoch}/{self.cfg.epochs}: {shown}", file=sys.stderr)
        self.save(state)
        if self.rank == 0 and self.cfg.save_every and self.epoch % self.cfg.save_every == 0:
            _link(self.out / "checkpoints" / "last.pt", self.out / "checkpoints" / f"epoch_{self.epoch:04}.pt")

    def save(self, state):
        """Writes checkpoints/last.pt, unless a weight is not finite: then the file stays the last good one."""
        content = state_dict(state)
        tensors = [t for t in _tensors(content) if t.is_floating_point() and t.numel()]
        if not torch.stack([t.detach().abs().max().isfinite().cpu() for t in tensors]).all():
            raise UserError(f"weights not finite by step {self.step}: stopped; {self._kept()}; {REMEDY}")
        if rank_and_world()[1] > 1:
            content[RANKS] = buffers_of_ranks(state)
        if self.rank == 0:
            position = {"epoch": self.epoch, "batch": self.batch, "step": self.step}
            meter = {"names": self.names, "sums": self.sums, "count": self.count}
            about = {"script": self.script, "config": dataclasses.asdict(self.cfg), "world": rank_and_world()[1]}
            save_checkpoint(self.out / "checkpoints" / "last.pt", {**about, **position, **meter, "state": content})

    def _kept(self):
        last = self.out / "checkpoints" / "last.pt"
        return f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint yet"

    def stop(self, state):
        """Saves in the middle of an epoch, after a signal, and exits with 128 + the signal's number."""
        self.save(state)
        self.bar.write(f"stopped at step {self.step}: go on with --resume --out {self.out}", file=sys.stderr)
        self.bar.close()
        sys.exit(128 + self.interrupted)

    def close(self):
        """Ends the progress bar and gives the signals back; evaluation and generation may follow."""
        self.bar.close()
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _tensors(content):
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
        save_checkpoint(target, load_weights(source))


def _git_commit():
    """The commit of these scripts, or None where they are not in a repository."""
    call = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "--quiet", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(call, capture_output=True, text=True, check=False).stdout.strip() or None


def _tracker(cfg, out, script):
    """tracker(scalars, images, step) for --track tensorboard or wandb; neither is needed otherwise."""
    try:
        if cfg.track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(out / "tensorboard"))

            def track(scalars, images, step):
                for name, value in scalars.items():
                    writer.add_scalar(name, value, step)
                if images:
                    writer.add_image("samples", grid(images), step, dataformats="HWC")
                writer.flush()
        else:
            import wandb

            run = wandb.init(project=f"gan-{script}", dir=str(out), config=dataclasses.asdict(cfg), resume="allow")

            def track(scalars, images, step):
                pictures = {"samples": wandb.Image(grid(images))} if images else {}
                run.log({**scalars, **pictures}, step=step)

        return track
    except ImportError:
        raise UserError(f"--track {cfg.track}: not installed: pip install {cfg.track}") from None


def read_metrics(path):
    """The rows of a metrics.csv as dicts of text; [] where there is no file."""
    if not Path(path).is_file():
        return []
    with open(path, newline="", errors="replace") as file:
        return [row for row in csv.DictReader(file) if all(value is not None for value in row.values())]


def plot_metrics(rows, path):
    """losses.png: one panel for each column of metrics.csv, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in rows[0] if name not in ("epoch", "step")] if rows else []
    figure, axes = pyplot.subplots(-(-len(names) // 3), 3, figsize=(13, 2.6 * -(-len(names) // 3)), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        axis.plot(*zip(*points, strict=True), linewidth=1, marker="o" if len(points) == 1 else "")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def plot_confusion(confusion, names, path):
    """A confusion matrix (classes, classes) as a picture: rows are the target's classes, cells the share of the row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    share = (confusion / confusion.sum(1, keepdim=True).clamp_min(1)).cpu().numpy()
    figure, axis = pyplot.subplots(figsize=(2.5 + 0.6 * len(names), 2 + 0.6 * len(names)))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set(xlabel="generated", ylabel="target", xticks=range(len(names)), yticks=range(len(names)))
    axis.set_xticklabels(names, rotation=60, ha="right", parse_math=False)
    axis.set_yticklabels(names, parse_math=False)
    for row, column in np.ndindex(*share.shape):
        color = "white" if share[row, column] > 0.5 else "black"
        axis.text(column, row, f"{share[row, column]:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def to_bytes(images):
    """Images in [-1, 1] -> uint8 0..255, the same fixed scale for every picture."""
    return ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(images):
    """Pictures (B, 3, H, W) uint8 -> (B, 3, H, W) in [-1, 1], float32; the inverse of to_bytes."""
    return images.to(torch.float32, memory_format=torch.contiguous_format).sub_(127.5).mul_(1 / 127.5)


def draw(index, palette):
    """Class indices (B, H, W) in the colours of ClassTable.palette_on: (B, 3, H, W) in [-1, 1]."""
    flat = palette.index_select(1, index.flatten().int())
    return flat.view(3, *index.shape).transpose(0, 1).contiguous()


def as_tensor(image, device):
    """An (H, W) or (H, W, 3) uint8 array -> (1, H, W) or (1, 3, H, W) uint8 on the device."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0) if image.ndim == 3 else image))[None].to(
        device
    )


def as_array(images):
    """The first of (B, 3, H, W) in [-1, 1] -> (H, W, 3) uint8 array."""
    return to_bytes(images[0]).permute(1, 2, 0).cpu().numpy()


def grid(columns):
    """{title: (B, 3, H, W) in [-1, 1]} -> (height, width, 3) uint8: a row an image, a column a title, titles on top."""
    from PIL import ImageDraw

    pictures = [to_bytes(images).cpu().permute(0, 2, 3, 1).numpy() for images in columns.values()]
    count, height, width = pictures[0].shape[:3]
    gap, head = 4, 16
    sheet = Image.new("RGB", (len(pictures) * (width + gap) + gap, head + count * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (title, column) in enumerate(zip(columns, pictures, strict=True)):
        draw.text((gap + k * (width + gap), 2), title, fill="black")
        for row, picture in enumerate(column):
            sheet.paste(Image.fromarray(picture), (gap + k * (width + gap), head + row * (height + gap)))
    return np.asarray(sheet)


def save_grid(path, columns):
    """Writes grid(columns) as an image file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid(columns)).save(path)


# ----------------------------------------------------------------------------------------------------------- measures


def measure_images(fake, target):
    """Measures of pictures: two (B, C, H, W) uint8 tensors -> {name: (B,) float64}, one value an image.

    psnr         10 log10(255^2 / MSE), in dB
    ssim         Wang et al. 2004 (doi:10.1109/TIP.2003.819861), eq. 13: Gaussian 11x11 window, sigma 1.5, mean over
                 channels and places, no padding
    mse          mean squared error, in squared levels 0-255
    within_5     share of pixels all of whose channels are within 5 levels of the target's (Fu et al. 2019,
    within_10    arXiv:1809.05852), and within 10
    """
    fake, target = fake.double(), target.double()
    error = (fake - target).abs()
    mse = error.square().mean((1, 2, 3))
    worst = error.amax(1)
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
    ssim = (2 * mean_f * mean_t + c1) * (2 * cov + c2) / ((mean_f**2 + mean_t**2 + c1) * (var_f + var_t + c2))
    return {
        "psnr": 10 * torch.log10(255**2 / mse.clamp_min(1e-10)),
        "ssim": ssim.reshape(len(fake), -1).mean(1),
        "mse": mse,
        "within_5": (worst <= 5).double().mean((1, 2)),
        "within_10": (worst <= 10).double().mean((1, 2)),
    }


def average_measures(batches):
    """measure_images' results, a list -> {name: mean over all images}; rmse, in levels, is the root of the mean MSE."""
    means = {name: torch.cat([batch[name] for batch in batches]).mean().item() for name in batches[0]}
    return {"rmse" if k == "mse" else k: math.sqrt(v) if k == "mse" else v for k, v in means.items()}


def nearest_class(images, classes):
    """Pictures (B, 3, H, W) in [-1, 1] -> (B, H, W) indices of the classes whose colours are nearest."""
    colors = torch.tensor(classes.colors, device=images.device) / 127.5 - 1
    distance = [(images - color.view(1, 3, 1, 1)).square().sum(1) for color in colors]
    return torch.stack(distance).argmin(0)


def confusion_matrix(predicted, target, classes):
    """Counts of pixels, (classes, classes) int64, rows the target's class; IGNORED targets are left out."""
    seen = target != IGNORED
    pairs = target[seen].long() * classes + predicted[seen].long()
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def measure_labels(confusion):
    """Pixel accuracy, mean class accuracy and mean IoU; the means are over the classes that occur in the target."""
    confusion = confusion.double()
    right, target, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    occurs = target > 0
    return {
        "pixel_accuracy": (right.sum() / confusion.sum()).item(),
        "class_accuracy": (right / target)[occurs].mean().item(),
        "mean_iou": (right / (target + predicted - right))[occurs].mean().item(),
    }


def level_counts(images):
    """How often each level occurs in uint8 images (N, C, H, W): (C, 256); read in pieces, whatever the size."""
    counts = np.zeros((images.shape[1], 256), np.int64)
    for first in range(0, len(images), 64):
        piece = images[first : first + 64]
        counts += [np.bincount(piece[:, c].ravel(), minlength=256) for c in range(images.shape[1])]
    return counts


def constant_guesses(images, classes=None):
    """The baselines that see no input: {name: (3,) colour in [-1, 1]}, from training images (N, 3, H, W) uint8, or from
    label maps (N, 1, H, W) of a ClassTable, which also give the most frequent class."""
    counts, guesses = level_counts(images), {}
    if images.shape[1] == 1:
        guesses["most frequent class"] = classes.palette[counts[0, : len(classes)].argmax()]
        counts = np.stack([np.bincount(classes.palette[:, c], counts[0], 256) for c in range(3)])
    guesses["mean training colour"] = (counts * np.arange(256)).sum(1) / counts.sum(1)
    guesses["median training colour"] = (counts.cumsum(1) * 2 >= counts.sum(1, keepdims=True)).argmax(1)
    return {name: torch.tensor(np.asarray(color) / 127.5 - 1, dtype=torch.float32) for name, color in guesses.items()}


def write_evaluation(cfg, rows, **about):
    """Prints {row: {measure: value}} as a table; writes it, with what was measured, to evaluation.json in cfg.out."""
    if rank_and_world()[0] == 0:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        what = {"size": cfg.size, "data": cfg.data or "demo world", "checkpoint": cfg.checkpoint, **about}
        path = Path(cfg.out) / "evaluation.json"
        path.write_text(json.dumps({**what, "rows": rows}, indent=2) + "\n")
        print_table(rows)
        print(f"written to {path}")


def print_table(rows):
    """Prints {row: {measure: value}} as text, a column a measure."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = max(map(len, rows)) + 2
    print(" " * width + "".join(f"{name:>{max(len(name), 7) + 2}}" for name in columns))
    for title, row in rows.items():
        cells = (f"{row[name]:.4f}" if name in row else "" for name in columns)
        print(
            f"{title:<{width}}"
            + "".join(f"{c:>{max(len(name), 7) + 2}}" for name, c in zip(columns, cells, strict=True))
        )


# --------------------------------------------------------------------------------------------------------- generation


def inputs_of(path, out, labels=False, by_stem=False):
    """The files that --generate names: one file, or the images of a folder (by_stem: that differ in more than their
    ending); refuses to write over them."""
    path, out = Path(path), Path(out)
    if not path.exists():
        raise UserError(f"--generate {path}: no such file or directory")
    files = _files(path, labels) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--generate {path}: no images in it")
    if by_stem and len({file.stem for file in files}) < len(files):
        raise UserError(f"--generate {path}: two files have the same name but for their ending")
    if out.resolve() == files[0].parent.resolve():
        raise UserError(f"--out {out}: holds the inputs, and the results have the same names: choose another folder")
    there = [out / file.name for file in files if (out / file.name).exists()]
    if there and out.name != "generated":  # the folder that is ours when none is named
        raise UserError(f"{there[0]} exists and would be written over: choose another --out")
    return files


def write_labels(path, index, classes):
    """Writes (H, W) uint8 indices twice: name.png, indices with the classes' palette, and name_colours.png."""
    path = Path(path).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(index)
    image.putpalette(classes.palette.tobytes())
    image.save(path)
    Image.fromarray(classes.palette[index]).save(path.with_name(f"{path.stem}_colours.png"))


def write_image(path, image):
    """Writes (H, W, 3) uint8 by the ending of path: JPEG at quality 95, the rest lossless, PNG if unknown."""
    path = Path(path)
    path = path if path.suffix.lower() in IMAGE_SUFFIXES else path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    lossy = {"quality": 95, "subsampling": 0} if path.suffix.lower() in (".jpg", ".jpeg") else {}
    lossy |= {"lossless": True} if path.suffix.lower() == ".webp" else {}
    Image.fromarray(image).save(path, **lossy)
    return path


def painted(lc, strokes, classes):
    """Land cover (H, W) with rectangles "class:x,y,width,height" painted into a copy, one after the other."""
    lc = lc.copy()
    for stroke in strokes:
        name, _, numbers = stroke.rpartition(":")
        names = [known.lower() for known in classes.names]
        try:
            x, y, width, height = (int(number) for number in numbers.split(","))
        except ValueError:
            raise UserError(f"--paint {stroke}: write class:x,y,width,height, in pixels") from None
        if name.lower() not in names:
            raise UserError(f"--paint {stroke}: no such class; there are {', '.join(classes.names)}")
        area = lc[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)]
        if area.size == 0:
            raise UserError(f"--paint {stroke}: lies outside the image, {lc.shape[1]}x{lc.shape[0]} pixels")
        area[...] = names.index(name.lower())
    return lc


def read_edit(cfg, classes):
    """What --generate, --lc, --lc-before and --paint ask for: (path, photo, before, after).

    photo   (H, W, 3) uint8, the photograph at path
    before  (H, W) uint8 class indices, its land cover, or None where nothing tells
    after   (H, W) uint8 class indices, the land cover that the edited photograph shall have
    """
    path = inputs_of(cfg.generate, cfg.out)[0]
    if Path(cfg.generate).is_dir():
        raise UserError(f"--generate {cfg.generate}: an edit takes one photograph, not a folder")
    if not cfg.lc:
        raise UserError("--generate needs --lc FILE, the photograph's land cover (edited, or to be edited by --paint)")
    if Path(cfg.out).resolve() in {Path(file).resolve().parent for file in (cfg.lc, cfg.lc_before) if file}:
        raise UserError(f"--out {cfg.out}: holds the land cover, which may have the same name: choose another folder")
    photo, lc = read_image(path), read_labels(cfg.lc, classes)
    before = read_labels(cfg.lc_before, classes) if cfg.lc_before else lc if cfg.paint else None
    for name, labels in ((cfg.lc, lc), (cfg.lc_before, before)):
        if labels is not None and labels.shape != photo.shape[:2]:
            sizes = f"{labels.shape[1]}x{labels.shape[0]} but {path} is {photo.shape[1]}x{photo.shape[0]}"
            raise UserError(f"{name} is {sizes}: sizes must agree")
    return path, photo, before, painted(lc, cfg.paint, classes)


def keep_outside(edited, photo, before, after):
    """The photograph (H, W, 3) where land cover stayed, the edited one where it changed, blended over a border of 12
    pixels at 256. Where nothing tells what changed (before None), the edited one."""
    if before is None:
        print("the whole photograph is regenerated: --lc-before FILE would tell what changed", file=sys.stderr)
        return edited
    border = max(1, round(12 * min(after.shape) / 256))
    mask = Image.fromarray((before != after).astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(border))
    return np.asarray(Image.composite(Image.fromarray(edited), Image.fromarray(photo), mask))


def resize(image, size, labels=False):
    """An (H, W, 3) picture, or (H, W) label map, at size (width, height): bicubic, or nearest. A copy, writable."""
    how = Image.Resampling.NEAREST if labels else Image.Resampling.BICUBIC
    return np.array(Image.fromarray(image).resize(size, how))


def save_sheet(path, pictures):
    """Writes {title: (H, W, 3) uint8} side by side, those that are None left out."""
    columns = {k: from_bytes(as_tensor(x, "cpu")) for k, x in pictures.items() if x is not None}
    save_grid(path, columns)
