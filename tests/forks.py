"""Processes that start at once: each forks from a server that has imported PyTorch already."""

import atexit
import multiprocessing
import os
import signal
import socket
import threading
import time

import torch
from tqdm import tqdm

import support.run

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pix2pix", "torch._dynamo", "matplotlib.figure"])


def forked(function, *arguments, log, **environ):
    """A process that calls a function, on one thread; what it prints goes into the file `log`."""
    process = CONTEXT.Process(target=_call, args=(function, arguments, str(log), environ))
    process.start()
    return process


def forked_ranks(function, *arguments, log):
    """Two processes, as torchrun starts them; what they print goes into `log`0 and `log`1."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        forked(function, *arguments, log=f"{log}{k}", RANK=str(k), LOCAL_RANK=str(k), **environ)
        for k in (0, 1)
    ]


def until(condition, alive, log):
    """What condition() returns, once it is true; a process that has ended before fails the test."""
    while not (found := condition()):
        assert alive(), log.read_text()
        time.sleep(0.01)
    return found


def _call(function, arguments, log, environ):
    os.environ.update(environ)
    printed = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own would outlive a process that is killed
    support.run.plot_metrics = lambda rows, path: path.touch()  # as in conftest.py
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
