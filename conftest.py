"""Benchmarks run once, as tests, unless --benchmark-only asks for times; CUDA tests are skipped without a device."""

import pytest
import torch


def pytest_configure(config):
    if not config.getoption("benchmark_only", False):
        config.option.benchmark_disable = True


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
