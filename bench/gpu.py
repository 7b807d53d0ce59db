"""All that a GPU should show, the most important first, in three parts of at most nine minutes.

    bash bench/gpu.sh 1 OUT --maps maps/ --landcover dubai/ --vgg16 vgg16.pth
    bash bench/gpu.sh 2 OUT ...      the same words: begins the edits, waits for trainings, collects
    bash bench/gpu.sh 3 OUT ...      stops the trainings, evaluates, draws, packs, times the rest

Part 1 tests and times, and begins trainings that outlive it. Each part also does what earlier ones
left undone. OUT lies outside the checkout; trainings lie in OUT-work. OUT/pack is what to take
home: small.tar.gz, and generators in half precision; a larger file comes in pieces of 15 MB
(cat NAME.* > NAME). Without data the demo world is used; without a GPU everything has toy size.
"""

import argparse
import contextlib
import importlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs/tools"))

import filelock
import torch
from export_weights import shrink
from keep_run import keep
from paths import DOCS, ROOT

import common
import harness
from support.batches import steps_in_epoch
from support.checkpoints import load_weights, save_checkpoint

SECONDS, PIECE = 500, 15_000_000  # for a part's commands; the bytes of a file's piece
# name: part that begins it, script, its words, minutes: meant to end within part 2, side by side
RUNS = {
    "sat2map": (1, "pix2pix", "--direction AtoB", 2),
    "map2sat": (1, "pix2pix", "", 2),
    "cyclegan": (1, "cyclegan", "", 3),
    "mixlc": (2, "mixlc", "--batch-size 16", 1),
    "mixlc_acgan": (2, "mixlc_acgan", "", 2),
}
TOY = "--size 64 --width 4 --max-images 4 --batch-size 2 --val-images 4"
SMALL = ("evaluation.json", "config.json", "metrics.csv", "losses.png")


class Session:
    """A part's words, folders and deadline."""

    def __init__(self, words, toy):
        self.words, self.toy = words, toy
        self.end = time.monotonic() + SECONDS
        self.out = Path(words.out).resolve()
        self.work = self.out.with_name(self.out.name + "-work")
        for folder in (self.out, self.work / "done"):
            folder.mkdir(parents=True, exist_ok=True)

    def print(self, text):
        print(text, flush=True)
        with open(self.out / "summary.txt", "a") as file:
            file.write(text + "\n")

    def do(self, name, seconds, *command):
        """Runs a Python command once: one that ended well is left out by the next call."""
        mark, began = self.work / "done" / name, time.monotonic()
        seconds = min(seconds, self.end - began)
        if mark.exists():
            return
        if seconds < 5:
            self.print(f"{name}: no time left")
            return
        # SIGINT, as pytest then writes its times
        limit = ["timeout", "--signal=INT", "--kill-after=15", str(seconds), sys.executable]
        with open(self.out / f"{name}.txt", "w") as log:
            call = [*limit, *map(str, command)]
            done = subprocess.run(call, cwd=ROOT, stdout=log, stderr=log, check=False)
        status = done.returncode  # 124: it was stopped
        self.print(f"{name}: exit {status} after {time.monotonic() - began:.0f} s")
        if status == 0:
            mark.touch()

    def options(self, script, more):
        """The words of a training."""
        sizes = TOY if self.toy else "--val-images 24"
        words = f"{more} --cache {self.work / 'cache'} --save-every 0 {sizes}".split()
        if harness.is_edit(script) and self.words.landcover:
            words += ["--data", os.path.abspath(self.words.landcover), "--patch", "256"]
        elif not harness.is_edit(script) and self.words.maps:
            words += ["--data", os.path.abspath(self.words.maps)]
        if script == "mixlc_acgan" and self.words.vgg16:
            words += ["--vgg16", os.path.abspath(self.words.vgg16)]
        elif script == "mixlc_acgan":
            words += ["--style-features", "random"]
        return words

    def begin(self, part):
        """Begins a part's trainings in a process group of their own, unless they run already."""
        call = [sys.executable, __file__, *sys.argv[1:], "--train", str(part)]
        with open(self.work / f"trainings{part}.txt", "a") as log:
            subprocess.Popen(call, stdout=log, stderr=log, start_new_session=True)

    def train(self, part):
        """A part's trainings, one after the other; those that are there go on."""
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
        with filelock.FileLock(self.work / f"trainings{part}.lock", timeout=0):
            (self.work / f"trainings{part}.id").write_text(str(os.getpid()))
            for name, (of_part, script, more, minutes) in RUNS.items():
                run, words = self.work / name, self.options(script, more)
                if of_part != part or stopped or (run / "evaluation.json").exists():
                    continue
                if (run / "checkpoints/last.pt").exists():
                    words = ["--resume"]
                else:
                    words += ["--epochs", epochs_of(script, words, 0 if self.toy else minutes)]
                if stopped:  # meanwhile
                    return
                call, began = [f"{script}.py", *words, "--out", run], time.monotonic()
                subprocess.run([sys.executable, *call], cwd=ROOT, check=False)
                with open(self.work / f"{name}.seconds", "a") as file:
                    file.write(f"{time.monotonic() - began}\n")

    def stop(self, part):
        """Ends a part's trainings: they save first."""
        lock = filelock.FileLock(self.work / f"trainings{part}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            group = int((self.work / f"trainings{part}.id").read_text())
            os.killpg(group, signal.SIGTERM)
            with contextlib.suppress(filelock.Timeout):
                lock.acquire(timeout=45)
            if not lock.is_locked:
                os.killpg(group, signal.SIGKILL)
        lock.release()

    def wait(self):
        """Until every training has ended, or the part's time has."""
        while time.monotonic() < self.end - 20:
            if all((self.work / name / "evaluation.json").exists() for name in RUNS):
                return
            time.sleep(1)

    def collect(self):
        """The small files of every training."""
        for name in RUNS:
            grids = sorted((self.work / name / "samples").glob("*.png"))[-1:]
            for path in [*(self.work / name / file for file in SMALL), *grids]:
                if path.is_file():
                    (self.out / name).mkdir(exist_ok=True)
                    shutil.copy(path, self.out / name / path.name)

    def finish(self, name):
        """Evaluates a training that was stopped; keeps its result and its generators."""
        run, script = self.work / name, RUNS[name][1]
        last = run / "checkpoints/last.pt"
        if not last.exists():
            self.print(f"{name}: no checkpoint")
            return
        if not (run / "evaluation.json").exists():
            words = [f"{script}.py", "--evaluate", "--checkpoint", last, "--out", run]
            self.do(f"{name}-evaluate", 120, *words)
        if (run / "evaluation.json").exists():
            seconds = self.work / f"{name}.seconds"
            times = seconds.read_text().split() if seconds.exists() else []
            try:
                keep(run, self.out / name / "kept", sum(map(float, times)))
            except (OSError, LookupError) as error:  # stopped within its first epoch
                self.print(f"{name}: not kept: {error!r}")
        write_generators(last, self.work / f"{name}.pt")

    def draw(self):
        """A picture of the map of a photograph."""
        tool, last = DOCS / "tools/draw_raster.py", self.work / "sat2map/checkpoints/last.pt"
        self.do("raster", 90, tool, last, DOCS / "example.jpg", self.out / "raster.jpg")

    def pack(self):
        """OUT/pack: small.tar.gz, and each generator, whole or in pieces."""
        pack, small = self.out / "pack", self.work / "small.tar.gz"
        shutil.rmtree(pack, ignore_errors=True)
        with tarfile.open(small, "w:gz") as archive:
            archive.add(self.out, "results")
        pack.mkdir()
        for path in [small, *self.work.glob("*.pt")]:
            content = path.read_bytes()
            for k, first in enumerate(range(0, len(content), PIECE)):
                end = "" if len(content) <= PIECE else f".{k:02}"
                (pack / (path.name + end)).write_bytes(content[first : first + PIECE])


def epochs_of(script, words, minutes):
    """How many epochs fill so many minutes: text. Measured in a process of its own."""
    call = [sys.executable, __file__, "--seconds-of-an-epoch", script, *words]
    done = subprocess.run(call, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return "1"  # the training will fail alike
    return str(max(1, int(60 * minutes / float(done.stdout.split()[-1]))))


def seconds_of_an_epoch(script, words):
    """From 20 of its steps, after the first ones and the capture of the graph, and its measures."""
    module = importlib.import_module(script)
    scratch = Path(words[words.index("--cache") + 1]) / f"timed-{os.getpid()}"
    words = [*words, "--out", str(scratch)]
    cfg, device, _ = common.begin(module.Config, module.__doc__, module.QUICK, words)
    state, train = module.build(cfg, device), harness.dataset(module, cfg, "train", device)
    step = common.fast_step(module.train_step, cfg, device)
    batches = itertools.chain.from_iterable(map(train.batches, itertools.count()))
    for number, batch in enumerate(itertools.islice(batches, 30)):
        if number == 10:
            began = harness.device_time()
        step(state, batch, cfg)
    seconds = (harness.device_time() - began) / 20 * steps_in_epoch(len(train), cfg.batch_size)
    val = harness.dataset(module, cfg, "val", device)
    for _ in range(2):  # the first one chooses its kernels
        began = harness.device_time()
        module.evaluate(state, val, cfg, common.spread(cfg.val_images, len(val)))
    print(seconds + harness.device_time() - began)


def write_generators(checkpoint, path):
    """Generators in half precision, as weights/ has them."""
    content = shrink(load_weights(checkpoint))
    state = content["state"]
    content["state"] = {name: state[name] for name in state if name.startswith("G")}
    save_checkpoint(path, content)


def tests(session):
    """Versions, first minutes, CUDA's tests."""
    do, toy = session.do, session.toy
    do("versions", 30, "-m", "torch.utils.collect_env")
    for script in ["pix2pix"] if toy else harness.SCRIPTS:
        out = session.work / f"quick-{os.getpid()}-{script}"
        words = [f"{script}.py", "--quick", "--out", out, *(f"{TOY} --epochs 1".split() * toy)]
        do(f"quick-{script}", 100, *words)
    do("tests", 120, "-m", "pytest", "-m", "cuda", "tests/test_steps.py" if toy else "tests")


def times(session, fast_only=False):
    """Benchmarks, each in a process of its own: the fast steps, epochs, the other variants."""
    steps = [
        ("step", f"{script}-cuda-256-{batch_size}-{variant}")
        for variant, batch_size in harness.BY_WORTH
        for script in harness.ONLY.get(variant, harness.SCRIPTS)
    ]
    fast = 2 * len(harness.SCRIPTS)  # at batch size 1 and 16
    epochs = [("epoch", f"{script}-cuda") for script in harness.SCRIPTS]
    cases = steps[:fast] + epochs + ([] if fast_only else steps[fast:])
    for bench, case in cases * (not session.toy):
        words = ["-m", "pytest", f"bench/bench_{bench}.py", "-k", case, "--benchmark-only"]
        report = f"--benchmark-json={session.out}/{bench}-{case}.json"
        session.do(f"{bench}-{case}", 60, *words, report)


def play(session, part):
    """A part. Nothing is timed beside trainings."""
    if part == 1:
        tests(session)
        times(session, fast_only=True)
        session.begin(1)
    elif part == 2:
        session.begin(1)
        session.begin(2)
        tests(session)  # what part 1 left undone
        session.wait()
    else:
        session.stop(1)
        session.stop(2)
        for name in RUNS:
            session.finish(name)
    session.collect()
    if part == 3:
        session.draw()
        session.pack()  # should the call end while the rest is timed
        times(session)
        session.pack()


def main(argv):
    if argv[:1] == ["--seconds-of-an-epoch"]:
        seconds_of_an_epoch(argv[1], argv[2:])
        return
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("part", type=int, choices=(1, 2, 3))
    parser.add_argument("out")
    for name in ("--maps", "--landcover", "--vgg16"):
        parser.add_argument(name)
    parser.add_argument("--train", type=int, help=argparse.SUPPRESS)
    words = parser.parse_args(argv)
    session = Session(words, not torch.cuda.is_available())
    if words.train:
        session.train(words.train)
        return
    for name in ("pytest", "pytest_benchmark", "rasterio"):
        try:
            importlib.import_module(name)
        except ImportError:
            session.print(f"{name} is missing: what needs it is left out")
    play(session, words.part)
    session.print(f"part {words.part}: done")


if __name__ == "__main__":
    main(sys.argv[1:])
