"""Two processes, as torchrun starts them, on the CPU.

What each script trains, writes and resumes, and what happens when one dies.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import pix2pix
from files import land_cover, side_by_side
from forks import forked_ranks, until
from harness import SCRIPTS, is_edit
from runs import last, metrics_of, steps_of, tiny_run
from support.processes import rank
from tensors import same, tiny

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
EXTRA = {
    "pix2pix": "--norm instance --dropout 0",
    "cyclegan": "--pool-size 4",
    "mixlc_acgan": "--style-layers relu1_2",
}

RESUMED = "cyclegan", "mixlc"  # with image pools, with BatchNorm


def words(script, folder, out, more=""):
    """The command line of a process that trains on its share of 8 images."""
    data = folder / ("lc" if is_edit(script) else "pairs")
    more = f"--batch-size 1 --epochs 2 --sample-rows 1 --cache {folder}/cache {more}"
    return tiny_run(script, data, out, f"{EXTRA.get(script, '')} {more}")


def five_steps(script, rank, world):
    """Losses and weights after five steps in float64, on this rank's share of two images."""
    options = {"norm": "instance", "dropout": 0.0} if script == "pix2pix" else {}
    module, cfg = tiny(script, **options)
    torch.manual_seed(0)
    state, losses = module.build(cfg, torch.device("cpu")), []
    nets = [net.double() for net in vars(state).values() if isinstance(net, torch.nn.Module)]
    for k in range(5):
        seeded = torch.Generator().manual_seed(k)
        images = torch.rand(2, 2, 3, 64, 64, dtype=torch.float64, generator=seeded) * 2 - 1
        step = module.train_step(state, tuple(side.chunk(world)[rank] for side in images), cfg)
        losses.append(torch.stack([loss.detach() for loss in step.values()]))
        if world > 1:
            torch.distributed.all_reduce(losses[-1])
    return torch.stack(losses) / world, [p.detach() for net in nets for p in net.parameters()]


def worker(folder):
    """What both processes do: five steps; each script's run; the same run stopped and resumed."""
    torch.distributed.init_process_group("gloo")
    for script in ("pix2pix", "cyclegan"):
        result = five_steps(script, rank(), 2)
        if rank() == 0:
            torch.save(result, folder / f"{script}.pt")
    honest = common.Run.must_save
    for script in SCRIPTS:
        main, parts = importlib.import_module(script).main, folder / script / "parts"
        main(words(script, folder, folder / script / "whole"))
        if script not in RESUMED:
            continue
        common.Run.must_save = lambda run: (run.step == 3, False)
        try:
            main(words(script, folder, parts))
        except SystemExit:
            torch.distributed.barrier()
        common.Run.must_save = honest
        main(f"--resume --out {parts}".split())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder in which two workers have done their work, on 8 images, and what they said."""
    folder = tmp_path_factory.mktemp("ranks")
    side_by_side(folder / "pairs", train=8, val=1)
    land_cover(folder / "lc", train=8)
    processes = forked_ranks(worker, folder, log=folder / "log")
    for process in processes:
        process.join()
    said = "".join((folder / f"log{k}").read_text() for k in (0, 1))
    assert [process.exitcode for process in processes] == [0, 0], said
    return folder, said


@pytest.mark.parametrize("script", SCRIPTS)
def test_rank_0_alone_writes(done, script):
    out = done[0] / script / "whole"
    assert json.loads((out / "config.json").read_text())["processes"] == 2
    rows = metrics_of(out)
    assert [int(row["step"]) for row in rows] == list(range(2, 9, 2))  # 2 images a step, 2 epochs
    assert {path.name for path in out.parent.iterdir()} <= {"parts", "whole"}
    assert done[1].count(f"run folder {out}") == 1
    assert len(list((out / "samples").iterdir())) == 2 and (out / "evaluation.json").is_file()


@pytest.mark.parametrize("script", RESUMED)
def test_two_ranks_resume_to_the_bit(done, script):
    whole, parts = done[0] / script / "whole", done[0] / script / "parts"
    assert f"stopped at step 3: continue with --resume --out {parts}" in done[1]
    assert last(parts)["world"] == 2 and same(last(parts)["state"], last(whole)["state"])
    assert metrics_of(parts) == metrics_of(whole)


@pytest.mark.parametrize("script", ["pix2pix", "cyclegan"])
def test_two_ranks_equal_one_process_with_both_images(done, script):
    """With InstanceNorm, which keeps images apart; without pools: each rank has its own."""
    losses, weights = torch.load(done[0] / f"{script}.pt")
    want_losses, want_weights = five_steps(script, 0, 1)
    assert torch.allclose(losses, want_losses, rtol=0, atol=1e-9)
    for two, one in zip(weights, want_weights, strict=True):
        assert torch.allclose(two, one, rtol=0, atol=1e-9)


def endless(done, out):
    """The command line of a run of many epochs, which ends with what stops it."""
    return words("pix2pix", done[0], out, "--epochs 500")


def test_a_signal_to_torchrun_stops_and_saves(done, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    call = [sys.executable, *launch, ROOT / "pix2pix.py", *endless(done, out)]
    with log.open("wb") as file:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(call, stderr=file, env=env)
    until(lambda: steps_of(out) >= 2, lambda: process.poll() is None, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait() != 0 and "stopped at step" in log.read_text()
    assert last(out)["step"] > 0


def test_killing_one_rank_ends_the_other_with_a_clear_message(done, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    first, second = forked_ranks(pix2pix.main, endless(done, out), log=log)
    until(lambda: steps_of(out) >= 4, second.is_alive, tmp_path / "log1")
    second.kill()
    first.join()
    said = (tmp_path / "log0").read_text()
    assert first.exitcode != 0
    assert "error: another process of this run has ended" in said, said
