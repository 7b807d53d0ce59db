"""Datasets and runs that many tests share."""

import functools
import importlib
import signal
from multiprocessing import forkserver

import pytest
import torch

import support.run
from files import PLACE, land_cover, side_by_side
from harness import SCRIPTS, is_edit
from runs import RUNS, tiny_run
from support import errors, processes

if not PLACE:  # without rasterio; the other files have tests that need no GeoTIFF
    collect_ignore = ["test_depth.py", "test_generate.py", "test_opening.py", "test_rasters.py"]


def pytest_collection_finish(session):
    """Begins to import PyTorch for the processes of the slow tests; see forks.py."""
    if any(item.get_closest_marker("slow") for item in session.items):
        forkserver.ensure_running()


@pytest.fixture(autouse=True)
def fresh():
    """Every test starts from the same random numbers and signals, and sees every remark."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed also asks for each backend
    errors.print_new.cache_clear()
    handlers = [(number, signal.getsignal(number)) for number in processes.SIGNALS]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    yield
    for number, handler in handlers:  # a Run that was not closed keeps its own
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def plot_metrics():
    """The real one; runs only touch losses.png here, since drawing takes longer than training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support.run, "plot_metrics", lambda rows, path: path.touch())
        yield support.plots.plot_metrics


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return side_by_side(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def landcover(tmp_path_factory):
    return land_cover(tmp_path_factory.mktemp("landcover"))


@pytest.fixture(scope="session")
def data(pairs, landcover):
    """Each script's dataset."""
    return {script: landcover if is_edit(script) else pairs for script in SCRIPTS}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """trained(script): the folder of a tiny run of two epochs, which no test may change."""

    @functools.cache
    def run(script):
        out = tmp_path_factory.mktemp(script) / "run"
        importlib.import_module(script).main(tiny_run(script, data[script], out, RUNS[script]))
        return out

    return run
