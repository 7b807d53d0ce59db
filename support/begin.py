"""Start of a program: options, checkpoint, run folder; error messages."""

import contextlib
import dataclasses
import errno
import functools
import importlib.util
import itertools
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from support.checkpoints import load_checkpoint
from support.classes import ClassTable
from support.device import has_avx512, start
from support.errors import SafeStream, UserError, out_of_memory, print_new, print_once, speaks
from support.files import lock, unlock
from support.judge import load_judge
from support.layouts import find_images
from support.limits import with_limits
from support.options import flag, grouped_fields, parse, weight_options
from support.processes import first_on_machine, handled_signals, of_rank_0, rank, world_size
from support.store import cache_folder, source


def command(main):
    """Decorates a script's main: a user's mistake becomes one line on stderr and exit status 2.

    SIGTERM ends it as Ctrl-C does, so that no unfinished file stays; a Run saves first.
    Then signals are handled as before.
    """

    @functools.wraps(main)
    def wrapper(argv=None):
        print_new.cache_clear()  # a notebook may run several
        handlers = {number: signal.getsignal(number) for number in handled_signals()}
        if signal.SIGTERM in handlers:
            signal.signal(signal.SIGTERM, _terminated)
        with (
            contextlib.redirect_stdout(SafeStream(sys.stdout if speaks() else None)),
            contextlib.redirect_stderr(SafeStream(sys.stderr)),
        ):
            try:
                return main(argv)
            except SystemExit as stop:
                status = stop.code
            except KeyboardInterrupt as stop:
                _close_bars()
                print("stopped", file=sys.stderr)
                status = 128 + (*stop.args, signal.SIGINT)[0]
            except Exception as error:
                _close_bars()
                message = _explain(error)
                if not message:
                    raise
                if not first_on_machine():  # which prints the same, and torchrun ends this one
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                    time.sleep(5)
                print("error: " + " ".join(message.split()), file=sys.stderr)
                status = 2
            finally:
                unlock()
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        raise SystemExit(status)  # of no other error, which in a notebook would keep the networks

    return wrapper


def _close_bars():
    """Removes all progress bars, below which a message would stand."""
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.leave = False
        bar.close()


def _terminated(number, frame):
    raise KeyboardInterrupt(number)


def _explain(error):
    """The message for the user, or "" for a bug of ours, whose traceback is shown."""
    if isinstance(error, UserError):
        return str(error)
    if out_of_memory(error):
        return "out of memory: lower --batch-size, --size or --width, or try --precision bf16"
    if isinstance(error, OSError) and error.errno is not None:
        lacks = isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP
        remedy = "replace or remove it" if lacks else "choose another --out or --cache"
        if isinstance(error, PermissionError):
            remedy = "ask for permission, close programs that use it, or choose another path"
        return f"{error.filename or 'writing'}: {error.strerror}: {remedy}"
    network = re.search("gloo|nccl|connection|timed out", str(error), re.IGNORECASE)
    if network and world_size() > 1 and isinstance(error, RuntimeError):
        return "another process of this run has ended: see its message, then --resume"
    return ""


def begin(config, doc, quick, argv=None):
    """Begins a program: (cfg, device, checkpoint). The arguments are parse's.

    A new run has no checkpoint; it gets a folder of its own, and cfg its class table. Otherwise
    options come from the checkpoint, but for the group "use". A typed option wins, or is refused
    where the checkpoint fixes it: with --resume unless it may change, else in the group "model"
    and where the option says so.
    """
    cfg, given = parse(config, doc, quick, argv)
    _check_modes(cfg, given)
    checkpoint = None
    if cfg.resume:
        cfg, checkpoint = _resume(cfg, given)
    elif cfg.checkpoint:
        cfg, checkpoint = _use(cfg, given)
    elif cfg.using:
        cfg = dataclasses.replace(cfg, out=cfg.out or f"runs/{cfg.script}/generated")
    if cfg.using:
        _check_results(cfg)
    elif cfg.track:
        _check_tracker(cfg)
    device = start(cfg)
    cfg = dataclasses.replace(cfg, device=device.type)  # also that of a resumed run
    if cfg.using and "precision" not in given and cfg.device == "cpu" and not has_avx512():
        cfg = dataclasses.replace(cfg, precision="fp32")  # training's bf16 would be far slower
    if not cfg.using and not checkpoint:
        cfg = _new_run(cfg)
    if (cfg.judge or cfg.train_judge) and not cfg.classes:
        raise UserError("a judge needs data with land cover: leave --judge and --train-judge out")
    if cfg.judge and not Path(cfg.judge).is_file():
        raise UserError(f"--judge {cfg.judge}: no such file: pass its new path")
    if cfg.judge:  # a wrong one is refused before training
        with torch.random.fork_rng([]):
            load_judge(cfg, cfg.judge)
    return cfg, device, checkpoint


def _check_modes(cfg, given):
    """Refuses ways to start that do not go together."""
    if cfg.checkpoint and not cfg.using:
        raise UserError("--checkpoint is for --generate, --evaluate and --serve; or use --resume")
    weights = any(getattr(cfg, name) for name in weight_options(cfg))
    if cfg.using and not cfg.checkpoint and (cfg.evaluate or not weights):
        raise UserError("--generate, --evaluate and --serve need --checkpoint FILE")
    if sum(map(bool, (cfg.evaluate, cfg.generate, cfg.serve))) > 1:
        raise UserError("--evaluate, --generate and --serve: one at a time")
    alone = cfg.generate or cfg.serve or getattr(cfg, "show_samples", 0)
    if alone and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        name = "--show-samples" if not cfg.using else "--serve" if cfg.serve else "--generate"
        raise UserError(f"{name}: start it without torchrun, in one process")
    if cfg.judge and cfg.train_judge:
        raise UserError("--judge names a trained judge: leave --train-judge out")
    for group, field in grouped_fields(type(cfg)):
        of_use = group == "use" and not field.metadata.get("may_change")  # those of the judge may
        if of_use and field.name in given and not cfg.using:
            raise UserError(f"{flag(field.name)} is for --generate, --evaluate or --serve")


def _check_tracker(cfg):
    """Refuses a tracker that is not installed."""
    for package in (cfg.track, "tensorboard"):  # wandb copies what TensorBoard writes
        if not importlib.util.find_spec(package):
            raise UserError(f"--track {cfg.track}: pip install {package}")


def _check_results(cfg):
    """Refuses a folder of results that is a file, or has those of something else."""
    folder, results = Path(cfg.out), Path(cfg.out) / "evaluation.json"
    if folder.is_file():
        raise UserError(f"--out {folder}: is a file, not a folder")
    if not cfg.evaluate:
        return
    if results.is_file() and b'"rows": {' not in results.read_bytes():
        raise UserError(f"{results}: written by another program: choose another --out")
    if _script_of(folder) not in ("", cfg.script):
        raise UserError(f"--out {folder}: a run of {_script_of(folder)}.py: choose another --out")


def _script_of(folder):
    """The script whose run folder this is; "" of another folder."""
    about = folder / "config.json"
    text = about.read_text(errors="replace") if about.is_file() else ""
    script = re.search(r'"script": "([\w-]+)"', text)
    return script[1] if script else ""


def _resume(cfg, given):
    """(cfg, checkpoint) of the run that --resume continues; reserves its folder."""
    run = _newest_run(cfg)
    lock(run)
    path = run / "checkpoints" / "last.pt"
    checkpoint = load_checkpoint(path, cfg.script)
    saved, fields = checkpoint["config"], cfg.__dataclass_fields__
    unknown = ", ".join(sorted(saved.keys() - fields.keys()))
    if unknown:
        raise UserError(f"{path}: this version has no option {unknown}: use the version of the run")
    world, here = checkpoint.get("world", 1), int(os.environ.get("WORLD_SIZE", "1"))
    if world != here:
        how = f"start it with torchrun --nproc-per-node {world}"
        raise UserError(f"{path}: the run has {world} processes: {how}")
    fixed = set()
    for name, field in fields.items():
        may_change = field.metadata.get("may_change")
        if not (may_change(saved) if callable(may_change) else may_change):
            fixed.add(name)
    cfg = _merged(cfg, given, saved, fixed, path)
    if cfg.epochs < checkpoint["epoch"]:
        raise UserError(f"--epochs {cfg.epochs}: {path} has done {checkpoint['epoch']}")
    return dataclasses.replace(cfg, out=str(run)), checkpoint


def _use(cfg, given):
    """(cfg, checkpoint) of --checkpoint, with the group "use" of the command line."""
    path = Path(cfg.checkpoint)
    checkpoint = load_checkpoint(path, cfg.script)
    saved, fixed = dict(checkpoint["config"]), set()
    for group, field in grouped_fields(type(cfg)):
        if group == "use":
            saved.pop(field.name, None)
        elif group == "model" or field.metadata.get("fixed"):
            fixed.add(field.name)
    new = _merged(cfg, given, saved, fixed, path)
    folder = path.parent.parent if path.parent.name else Path("..")
    run = folder if path.absolute().parent.name == "checkpoints" else Path("runs") / path.stem
    if cfg.evaluate and not cfg.out and run != folder and (run / "config.json").is_file():
        raise UserError(f"{run} is another run, of the name of {path.name}: pass --out")
    out = cfg.out or (run if cfg.evaluate else run / "generated")
    window = checkpoint.get("window_B") if new.domains == "BA" else None
    changes = {"device": cfg.device, "out": str(out)}
    changes["window"] = cfg.window or window or checkpoint.get("window", new.patch)
    judge, there = run / "judge.pt", Path(out) / "judge.pt"
    unset = not (new.judge or new.train_judge or there.is_file())
    if cfg.evaluate and new.classes and unset and run == folder and judge.is_file():
        changes["judge"] = str(judge)
    if not cfg.out:  # the cache of training, also for results in generated/
        changes["cache"] = str(cache_folder(dataclasses.replace(new, out=str(run))))
    return dataclasses.replace(new, **changes), checkpoint


def _merged(cfg, given, saved, fixed, path):
    """A checkpoint's options, changed by typed ones; refuses to change `fixed` ones."""
    defaults = dataclasses.asdict(type(cfg)())
    saved = defaults | {name: value for name, value in saved.items() if name in defaults}
    for name, value in given.items():
        same = value == saved[name]
        if name == "lc_classes":
            same = ClassTable.load(value) == ClassTable.load(saved[name])
        if name.startswith("limits_"):
            same = f"{saved[name]} ".startswith(value.replace(", ", ",") + " ")
        if name in fixed and not same:
            theirs, remedy = str(saved[name])[:60] or "the default", "leave it out"
            if name == "epochs":
                weights = " ".join(map(flag, weight_options(cfg)))
                remedy = f"its schedule ends there; a new run with {weights} trains on"
            raise UserError(f"{flag(name)} {value} contradicts {path} ({theirs}): {remedy}")
    changes = {name: value for name, value in given.items() if name not in fixed}
    return type(cfg)(**saved | changes)


def _newest_run(cfg):
    """The run folder to resume: --out, or the newest of runs/script, runs/script-2, ..."""
    folders = [Path(cfg.out)]
    if not cfg.out:
        folders = [*Path("runs").glob(cfg.script), *Path("runs").glob(f"{cfg.script}-[0-9]*")]
    saved = [path for folder in folders for path in folder.glob("checkpoints/last.pt")]
    if not saved:
        raise UserError(f"--resume: no checkpoints/last.pt in {cfg.out or 'runs'} to continue from")
    newest = max(saved, key=lambda path: path.stat().st_mtime).parent.parent
    if len(saved) > 1:
        print_once(f"{newest} is the newest of {len(saved)} runs: --out names another")
    return newest


def _new_run(cfg):
    """cfg of a new run, with its class table, limits and a folder of its own."""
    if cfg.out and not rank():
        _check_folder(Path(cfg.out), cfg.script)
    split = find_images(source(cfg), "train", cfg.lc_classes)
    if not getattr(cfg, "show_samples", 0):  # which needs no validation images
        find_images(source(cfg), "val", cfg.lc_classes)
    for name in ("bands_B", "limits_B"):
        if split.classes and getattr(cfg, name):
            raise UserError(f"{flag(name)} {getattr(cfg, name)}: B is land cover: leave it out")
    text = split.classes.text if split.classes else "pictures"
    cfg = with_limits(dataclasses.replace(cfg, lc_classes=text), split)
    out = "" if rank() else _claim_folder(cfg)
    cfg = dataclasses.replace(cfg, out=of_rank_0(out))
    lock(cfg.out)
    return cfg


def _check_folder(folder, script):
    """Refuses a folder that has any files but those of a run that saved no checkpoint."""
    if any(folder.glob("checkpoints/[!.]*.pt")):
        raise UserError(f"--out {folder} has a run: --resume continues it; or choose another --out")
    files = {path.name for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}
    other = sorted(files - {"samples.png"})
    if other and _script_of(folder) != script:
        raise UserError(f"--out {folder} has {other[0]}: choose an empty or a new folder")


def _claim_folder(cfg):
    """Makes a new run's folder: --out, or the first free one of runs/script, runs/script-2, ...

    A picture of training edits is no run, and lies in runs/script-samples.
    """
    if cfg.out:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        return cfg.out
    name = f"{cfg.script}-samples" if getattr(cfg, "show_samples", 0) else cfg.script
    for k in itertools.count(1):
        folder = Path(f"runs/{name}-{k}" if k > 1 else f"runs/{name}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return str(folder)
