"""Two processes under torchrun, on the CPU.

What each script trains, writes and resumes, and what happens when one dies.
"""

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

import common
import support.run
from files import land_cover, side_by_side
from harness import SCRIPTS
from runs import last, metrics_of, tiny_run
from support.processes import rank
from tensors import same, tiny

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
EXTRA = {
    "pix2pix": "--norm instance --dropout 0",
    "cyclegan": "--pool-size 4",
    "mixlc": "",
    "mixlc_acgan": "--style-layers relu1_2",
}

RESUMED = "cyclegan", "mixlc"  # with image pools, with BatchNorm


def words(script, folder, out, more=""):
    """The command line of a process that trains on its share of 8 images."""
    data = folder / ("lc" if "mixlc" in script else "pairs")
    more = (
        f"--batch-size 1 --epochs 2 --sample-rows 1 --cache {folder}/cache {EXTRA[script]} {more}"
    )
    return tiny_run(script, data, out, more)


def torchrun(file, *arguments):
    """A Python file in two processes, on a thread each."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "bench")))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *launch, str(file), *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=env)


def finish(process):
    return process.communicate()[1].decode(errors="replace")


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
    support.run.plot_metrics = lambda rows, path: path.touch()  # as in conftest.py
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
    process = torchrun(__file__, folder)
    said = finish(process)
    assert process.returncode == 0, said
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


def started(done, out, step):
    """A run of many epochs that has written the row of that step."""
    process = torchrun(ROOT / "pix2pix.py", *words("pix2pix", done[0], out, "--epochs 500"))
    while not any(int(row["step"] or 0) >= step for row in metrics_of(out)):
        assert process.poll() is None, finish(process)
        time.sleep(0.02)
    return process


def test_a_signal_to_torchrun_stops_and_saves(done, tmp_path):
    process = started(done, tmp_path / "run", 2)
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    assert process.returncode != 0 and "stopped at step" in said, said
    assert last(tmp_path / "run")["step"] > 0


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_killing_one_rank_ends_the_other_with_a_clear_message(done, tmp_path):
    process = started(done, tmp_path / "run", 4)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    second = next(int(pid) for pid, environ in ranks.items() if b"\0RANK=1\0" in environ)
    os.kill(second, signal.SIGKILL)
    said = finish(process)
    assert process.returncode != 0
    assert "error: another process of this run has ended" in said, said


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
