"""Benchmarks run once, as tests, unless --benchmark-only asks for times; CUDA tests need a GPU."""

import pytest
import torch


def pytest_configure(config):
    if not config.getoption("benchmark_only", False):
        config.option.benchmark_disable = True
    if hasattr(config, "workerinput"):  # -n auto has a process for each core
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if config.getoption("benchmark_only", False):  # what cannot run is left out, not skipped
        config.option.verbose = max(1, config.option.verbose)  # a line for each
        cuda = torch.cuda.is_available()
        timed = [
            item
            for item in items
            if "benchmark" in item.fixturenames and (cuda or not item.get_closest_marker("cuda"))
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(timed)])
        items[:] = timed
    else:
        for item in items:
            if "benchmark" in item.fixturenames:
                item.add_marker("slow")  # no part of a quick look at the scripts
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)  # without pytest-benchmark the other tests run
def pytest_benchmark_update_machine_info(config, machine_info):
    """What a result is worth knowing of its machine, and not what the machine is called."""
    del machine_info["node"]
    machine_info["torch"] = torch.__version__
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine_info["threads"] = torch.get_num_threads()
