"""Two processes under torchrun, on the CPU.

What each script trains, writes and resumes, and what happens when one dies.
"""

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

import common
from conftest import SCRIPTS, land_cover, same, side_by_side, state_of, tiny
from support.processes import rank

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
TINY = ["--size", "64", "--width", "4", "--log-every", "2", "--device", "cpu", "--sample-rows", "1"]
TINY += ["--batch-size", "1", "--epochs", "2"]
EXTRA = {
    "pix2pix": ["--norm", "instance", "--dropout", "0"],
    "cyclegan": ["--blocks", "1", "--pool-size", "4"],
    "mixlc": [],
    "mixlc_acgan": ["--style-features", "random", "--style-layers", "relu1_2"],
}


def torchrun(file, *arguments):
    """A Python file in two processes, on a thread each."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "bench")))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [*launch, str(file), *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=env)


def finish(process):
    return process.communicate()[1].decode(errors="replace")


def last(out):
    return state_of(out / "checkpoints" / "last.pt")


def metrics(out):
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


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
    honest = common.Run.stopping
    for script in SCRIPTS:
        data = folder / ("lc" if "mixlc" in script else "pairs")
        main = importlib.import_module(script).main
        arguments = ["--data", data, "--cache", folder / "cache", *TINY, *EXTRA[script]]
        arguments = [str(word) for word in arguments]
        main([*arguments, "--out", str(folder / script / "whole")])
        common.Run.stopping = lambda run: run.step == 5
        try:
            main([*arguments, "--out", str(folder / script / "parts")])
        except SystemExit:
            torch.distributed.barrier()
        common.Run.stopping = honest
        main(f"--resume --out {folder / script / 'parts'}".split())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder in which two workers have done their work, on 24 images, and what they said."""
    folder = tmp_path_factory.mktemp("ranks")
    side_by_side(folder / "pairs", train=24, val=1)
    land_cover(folder / "lc", train=24)
    process = torchrun(__file__, folder)
    said = finish(process)
    assert process.returncode == 0, said
    return folder, said


@pytest.mark.parametrize("script", SCRIPTS)
def test_rank_0_alone_writes(done, script):
    out = done[0] / script / "whole"
    assert json.loads((out / "config.json").read_text())["processes"] == 2
    rows = metrics(out)
    assert [int(row["step"]) for row in rows] == list(range(2, 25, 2))  # 2 images a step, 2 epochs
    assert sorted(path.name for path in out.parent.iterdir()) == ["parts", "whole"]
    assert done[1].count(f"run folder {out}") == 1
    assert len(list((out / "samples").iterdir())) == 2 and (out / "evaluation.json").is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_resume_to_the_bit(done, script):
    whole, parts = done[0] / script / "whole", done[0] / script / "parts"
    assert f"stopped at step 5: go on with --resume --out {parts}" in done[1]
    assert last(parts)["world"] == 2 and same(last(parts)["state"], last(whole)["state"])
    assert metrics(parts) == metrics(whole)


def test_one_process_cannot_go_on_with_the_work_of_two(done, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("mixlc").main(
            f"--resume --out {done[0] / 'mixlc' / 'whole'}".split()
        )
    assert "2 processes cannot go on with 1" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["pix2pix", "cyclegan"])
def test_two_ranks_equal_one_process_with_both_images(done, script):
    """With InstanceNorm, which keeps images apart; without pools: each rank has its own."""
    (losses, weights), (want_losses, want_weights) = (
        torch.load(done[0] / f"{script}.pt"),
        five_steps(script, 0, 1),
    )
    assert torch.allclose(losses, want_losses, rtol=0, atol=1e-9)
    for two, one in zip(weights, want_weights, strict=True):
        assert torch.allclose(two, one, rtol=0, atol=1e-9)


def wait_for_steps(process, out, step):
    """Until the run has written the row of that step."""
    deadline = time.monotonic() + 120
    while True:
        rows = metrics(out) if (out / "metrics.csv").is_file() else []
        if any(int(row["step"] or 0) >= step for row in rows):
            return
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.02)


def many_epochs(done, out):
    data = ["--data", done[0] / "pairs", "--cache", done[0] / "cache", "--out", out]
    return torchrun(ROOT / "pix2pix.py", *data, *TINY, "--epochs", "500")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_signal_to_torchrun_stops_and_saves(done, tmp_path):
    process = many_epochs(done, tmp_path / "run")
    wait_for_steps(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    assert process.returncode != 0 and "stopped at step" in said, said
    assert last(tmp_path / "run")["step"] > 0


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_killing_one_rank_ends_the_other_with_a_clear_message(done, tmp_path):
    process = many_epochs(done, tmp_path / "run")
    wait_for_steps(process, tmp_path / "run", 4)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    second = next(int(pid) for pid, environ in ranks.items() if b"\0RANK=1\0" in environ)
    os.kill(second, signal.SIGKILL)
    said = finish(process)
    assert process.returncode != 0
    assert "error: another process of this run has ended" in said, said


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
