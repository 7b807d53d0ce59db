"""Two processes under torchrun, on the CPU: what each script trains, writes and resumes, and what happens when one
dies."""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import land_cover, same, side_by_side, state_of

ROOT = Path(__file__).parent.parent
TINY = ["--size", "64", "--width", "4", "--log-every", "2", "--device", "cpu", "--sample-rows", "1"]
EXTRA = {
    "pix2pix": ["--norm", "instance", "--dropout", "0"],
    "cyclegan": ["--blocks", "1", "--pool-size", "4"],
    "mixlc": [],
    "mixlc_acgan": ["--style-features", "random", "--style-layers", "relu1_2"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 images in the layout that each script takes."""
    root = tmp_path_factory.mktemp("ranks")
    return {
        "pix2pix": side_by_side(root / "pairs", train=24, val=1),
        "cyclegan": root / "pairs",
        "mixlc": land_cover(root / "lc", train=24),
        "mixlc_acgan": root / "lc",
    }


def arguments(script, data, out, *more):
    return ["--data", str(data[script]), "--cache", str(data[script] / ".." / "cache"), "--out", str(out), *TINY,
            *EXTRA[script], *more]  # fmt: skip


def two_ranks(script, arguments):
    return torchrun(ROOT / f"{script}.py", arguments)


def torchrun(file, arguments):
    """A Python file in two processes, on a thread each."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launch, str(file), *arguments], stderr=subprocess.PIPE, env=env)


def finish(process):
    return process.communicate()[1].decode(errors="replace")


def last(out):
    return state_of(out / "checkpoints" / "last.pt")


def metrics(out):
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """A run of two ranks, of each script, that is never stopped: its folder and what it said."""
    done = {}

    def of(script):
        if script not in done:
            out = tmp_path_factory.mktemp(script) / "run"
            process = two_ranks(script, arguments(script, data, out, "--batch-size", "1", "--epochs", "2"))
            done[script] = out, finish(process)
            assert process.returncode == 0, done[script][1]
        return done[script]

    return of


@pytest.mark.parametrize("script", EXTRA)
def test_rank_0_alone_writes(straight, script):
    out, said = straight(script)
    assert json.loads((out / "config.json").read_text())["processes"] == 2
    rows = metrics(out)
    assert [int(row["step"]) for row in rows] == list(range(2, 25, 2))  # 24 images, 2 a step, 2 epochs
    assert sorted(path.name for path in out.parent.iterdir()) == ["run"] and said.count("run folder") == 1
    assert len(list((out / "samples").iterdir())) == 2 and (out / "evaluation.json").is_file()


WORKER = """
import importlib, os, sys, torch
import torch.distributed as dist
sys.path[:0] = [{tests!r}, {root!r}]
from test_ranks import five_steps
dist.init_process_group("gloo")
result = five_steps({script!r}, dist.get_rank(), 2)
if dist.get_rank() == 0:
    torch.save(result, {out!r})
dist.destroy_process_group()
"""


def five_steps(script, rank, world):
    """Losses and weights after five steps in float64, on this rank's share of batches of two images."""
    module = importlib.import_module(script)
    options = {"norm": "instance", "dropout": 0.0} if script == "pix2pix" else {"blocks": 1, "pool_size": 0}
    cfg = module.Config(size=64, width=4, precision="fp32", **options)
    torch.manual_seed(0)
    state, losses = module.build(cfg, torch.device("cpu")), []
    nets = [getattr(state, name).double() for name in ("G", "D", "G_AB", "G_BA", "D_A", "D_B") if hasattr(state, name)]
    for k in range(5):
        images = torch.rand(2, 2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) * 2 - 1
        step = module.train_step(state, tuple(side.chunk(world)[rank] for side in images), cfg)
        losses.append(torch.stack([loss.detach() for loss in step.values()]))
        if world > 1:
            torch.distributed.all_reduce(losses[-1])
    return torch.stack(losses) / world, [p.detach() for net in nets for p in net.parameters()]


@pytest.mark.parametrize("script", ["pix2pix", "cyclegan"])
def test_two_ranks_equal_one_process_with_both_images(script, tmp_path):
    """With InstanceNorm, which keeps the images of a batch apart; without pools, of which each rank has its own."""
    worker, out = tmp_path / "worker.py", tmp_path / "weights.pt"
    worker.write_text(WORKER.format(root=str(ROOT), tests=str(ROOT / "tests"), script=script, out=str(out)))
    process = torchrun(worker, [])
    said = finish(process)
    assert process.returncode == 0, said
    (losses, weights), (want_losses, want_weights) = torch.load(out), five_steps(script, 0, 1)
    assert torch.allclose(losses, want_losses, rtol=0, atol=1e-9)
    for two, one in zip(weights, want_weights, strict=True):
        assert torch.allclose(two, one, rtol=0, atol=1e-9)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("script", EXTRA)
def test_two_ranks_resume_to_the_bit(straight, data, tmp_path, script):
    out, whole = tmp_path / "run", straight(script)[0]
    process = two_ranks(script, arguments(script, data, out, "--batch-size", "1", "--epochs", "2"))
    wait_for_steps(process, out, 2)
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    assert process.returncode != 0 and "stopped at step" in said, said
    stopped = last(out)
    assert 0 < stopped["step"] < 24 and stopped["world"] == 2
    module = importlib.import_module(script)
    with pytest.raises(SystemExit):
        module.main(["--resume", "--out", str(out)])  # one process cannot go on with the work of two
    resumed = two_ranks(script, ["--resume", "--out", str(out)])
    assert resumed.wait() == 0, finish(resumed)
    assert same(last(out)["state"], last(whole)["state"])
    assert metrics(out) == metrics(whole)


def wait_for_steps(process, out, step):
    """Until the run has written the row of that step."""
    deadline = time.monotonic() + 120
    while not (out / "metrics.csv").is_file() or not any(int(row["step"] or 0) >= step for row in metrics(out)):
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes through /proc")
def test_killing_one_rank_ends_the_other_with_a_clear_message(data, tmp_path):
    process = two_ranks("pix2pix", arguments("pix2pix", data, tmp_path / "run", "--batch-size", "1", "--epochs", "500"))
    wait_for_steps(process, tmp_path / "run", 4)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    os.kill(next(int(pid) for pid, environ in ranks.items() if b"\0RANK=1\0" in environ), signal.SIGKILL)
    said = finish(process)
    assert process.returncode != 0
    assert "error: another process of this run has ended" in said, said
