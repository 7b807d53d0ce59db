"""The order of images in an epoch, and batches of them on the device."""

import collections
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from support.errors import UserError, progress
from support.processes import rank, world_size


def turns(flip):
    """The number of ways to turn an image by --flip: (left to right, upside down), 1 or 2 each."""
    return {"none": (1, 1), "horizontal": (2, 1), "both": (2, 2)}[flip]


def load_size(cfg):
    """The side at which training images are stored: --load-size, or 286/256 of --size."""
    if cfg.load_size and not cfg.size <= cfg.load_size <= 4096:
        raise UserError(f"--load-size {cfg.load_size}: must be {cfg.size} (--size) to 4096")
    return cfg.load_size or round(cfg.size * 286 / 256)


class Loader:
    """Images of an array (N, C, side, side), uint8 or int16, taken in batches onto the device.

    A GPU gets the whole array if it fits in `share` of the free memory; otherwise a background
    thread gathers the next batches into pinned memory. On the CPU images are views into the
    memory-mapped file, of which only crops are copied.
    """

    def __init__(self, array, device, share=0.4):
        with warnings.catch_warnings(action="ignore"):  # of an array that cannot be written to
            self.device, self.images = device, torch.from_numpy(array)
        on_cpu = device.type == "cpu"
        self.resident = on_cpu or array.nbytes < share * torch.cuda.mem_get_info(device)[0]
        if self.resident:
            self.images = self.images.to(device)

    def __len__(self):
        return len(self.images)

    def batches(self, index):
        """index (steps, B) of rows -> yields lists of B images (C, side, side) on the device."""
        if not self.resident:
            yield from self._prefetched(index)
        else:
            for rows in index.tolist():
                yield [self.images[row] for row in rows]

    def _prefetched(self, index, ahead=4):
        def gather(rows):
            return self.images[torch.from_numpy(rows)].pin_memory()

        with ThreadPoolExecutor(1) as background:
            jobs = collections.deque(background.submit(gather, rows) for rows in index[:ahead])
            for k in range(len(index)):
                batch = jobs.popleft().result()
                if k + ahead < len(index):
                    jobs.append(background.submit(gather, index[k + ahead]))
                yield list(batch.to(self.device, non_blocking=True))


def steps_in_epoch(count, batch_size):
    """The number of batches that `count` images give each process in an epoch."""
    world = world_size()
    if count < batch_size * world:
        each = f" x {world} processes" if world > 1 else ""
        more = f"more than {count} training images: lower it"
        raise UserError(f"--batch-size {batch_size}{each}: {more}")
    return count // (batch_size * world)


def batches_of_rank(batch_size, first, *arrays):
    """This process's share of the steps from `first` on: (steps, batch_size, ...) of each array."""
    for array in arrays:
        steps = steps_in_epoch(len(array), batch_size)
        whole = array[: steps * batch_size * world_size()]
        yield whole.reshape(steps, world_size(), batch_size, *array.shape[1:])[first:, rank()]


def spread(count, total):
    """`count` of `total` indices, evenly spread, in order; all of them for 0 or too many."""
    count = min(count or total, total)
    return np.arange(count) * total // count


def some_of(items, count):
    """`count` items of a list, evenly spread, in order; all of them for 0 or too many."""
    return [items[k] for k in spread(count, len(items))]


def chunks(index):
    """Yields an array of indices in pieces of at most 8, with a progress bar if it takes long."""
    pieces = np.split(index, range(8, len(index), 8))
    with progress(None, "measuring", total=len(index), unit="image", delay=1) as bar:
        for piece in pieces:
            yield piece
            bar.update(len(piece))
