"""The beginning of a program: options, checkpoint, run folder; and its end after a mistake."""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from support.checkpoints import load_checkpoint
from support.classes import ClassTable
from support.device import start
from support.errors import UserError
from support.files import LOCKS, lock
from support.layouts import find_images
from support.options import flag, grouped_fields, parse
from support.processes import first_here, of_rank_0, rank, world_size
from support.store import source


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
            while LOCKS:
                LOCKS.pop().release()
        for bar in list(getattr(tqdm, "_instances", [])):  # the message gets a line of its own
            bar.leave = False
            bar.close()
        print("error: " + " ".join(message.split()), file=sys.stderr)
        sys.exit(2)

    return wrapper


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
    if any(folder.glob("checkpoints/[!.]*.pt")):
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
