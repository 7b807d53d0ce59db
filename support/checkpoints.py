"""Checkpoints: saved whole, loaded with weights_only, restored in place."""

import os
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from support.errors import UserError, refusing
from support.files import whole_or_absent
from support.options import flag
from support.processes import rank, world_size


def save_checkpoint(path, content):
    """Writes content (dicts, lists, numbers, tensors) to a file that is whole or absent."""
    try:
        with whole_or_absent(path) as aside, open(aside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written ({error}): is the disk full?") from None


def load_weights(path):
    """A file of tensors, read with weights_only=True onto the CPU."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file (in a run folder: checkpoints/last.pt)")
    open(path, "rb").close()  # an OSError, such as of a file that may not be read
    with refusing(f"{path}: not a checkpoint, or a damaged one"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:  # of which none is compressed
                whole = sum(part.file_size for part in parts.infolist()) <= os.path.getsize(path)
                if not whole or parts.testzip():  # torch.load verifies no checksums
                    raise ValueError
        return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(path, script):
    """A checkpoint that script ("pix2pix", ...) wrote; refuses another script's."""
    content = load_weights(path)
    content = content if isinstance(content, dict) else {}
    if content.get("script", script) != script:
        raise UserError(f"{path}: written by {content['script']}.py: use that script")
    dicts = (content.get("config"), content.get("state"))
    if "script" not in content or not all(isinstance(part, dict) and part for part in dicts):
        raise UserError(f"{path}: not a checkpoint of {script}.py: is it for --init or --judge?")
    return content


RANKS = "buffers of ranks"


def buffers_of_ranks(state):
    """On rank 0 the buffers of the other processes, [{module: {buffer: tensor}}, ...].

    A checkpoint needs them, as only weights and optimizers are the same in all processes.
    """
    own = {}
    for name, module in vars(state).items():
        if isinstance(module, nn.Module) and module.state_dict():  # VGG16 keeps nothing
            own[name] = {key: buffer.cpu() for key, buffer in module.named_buffers()}
    gathered = [None] * world_size() if rank() == 0 else None
    dist.gather_object(own, gathered)
    return gathered[1:] if rank() == 0 else []


def state_dict(state):
    """A State's tensors, numbers, and state_dicts of optimizers and of modules with weights.

    TypeError for other values, which a resumed run would lack.
    """
    kept = {}
    for name, value in vars(state).items():
        if hasattr(value, "state_dict"):
            content = value.state_dict()
            if content:
                kept[name] = content
        elif isinstance(value, torch.Tensor) or type(value) in (bool, int, float):
            kept[name] = value
        elif value is not None:
            kinds = "modules, optimizers, tensors and plain numbers"
            raise TypeError(f"State.{name} is {type(value)}: a checkpoint keeps {kinds}")
    return kept


@torch.no_grad()
def restore(state, checkpoint, path):
    """Loads a checkpoint's state into a State, in place. Each process gets its own buffers.

    Parts that the State lacks are ignored, such as optimizers in generation; a part that the
    checkpoint lacks is refused.
    """
    saved = checkpoint["state"]
    for name in state_dict(state):
        value = getattr(state, name)
        with refusing(f"{path}: its {name} is missing, or does not fit this version of the script"):
            if isinstance(value, torch.optim.Optimizer):
                _load_optimizer(value, saved[name])
            elif hasattr(value, "state_dict"):
                value.load_state_dict(saved[name])
            elif isinstance(value, torch.Tensor):
                value.copy_(saved[name])
            else:
                setattr(state, name, saved[name])
    others = dict(enumerate(saved.get(RANKS, []), 1))
    for name, buffers in others.get(rank(), {}).items():
        module = getattr(state, name)
        if module is not None:  # a discriminator is None in use
            module.load_state_dict(buffers, strict=False)


def _load_optimizer(optimizer, saved):
    """Loads an optimizer's moments, but not its memory format, options and rate: see Run.set_lr."""
    groups = optimizer.param_groups
    optimizer.load_state_dict(saved)
    optimizer.param_groups = groups
    for parameter, moments in optimizer.state.items():
        for key, moment in moments.items():  # fused Adam pairs elements by their memory address
            if getattr(moment, "shape", None) == parameter.shape:
                moments[key] = torch.empty_like(parameter).copy_(moment)


def load_network(module, path, cfg, key, optional=False):
    """Loads network `key` of one of our checkpoints, or a published generator's state dict.

    Tensors are assigned by position. Buffers of InstanceNorm layers in old files are dropped.
    optional: a file without the network changes nothing.
    """
    content = load_weights(path)
    ours = isinstance(content, dict) and isinstance(content.get("state"), dict)
    if ours and cfg.using:  # its options would not be read
        raise UserError(f"{path}: is one of our checkpoints: use --checkpoint")
    if ours:
        content = content["state"].get(key)
    if optional and (not ours or content is None):
        return
    if not (isinstance(content, dict) and all(map(torch.is_tensor, content.values()))):
        raise UserError(f"{path}: no network {key} in it, and no state dict")
    own = module.state_dict()
    if not any("running_mean" in name for name in own):
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        content = {name: value for name, value in content.items() if not name.endswith(buffers)}
    values = list(content.values())
    if [value.shape for value in values] != [value.shape for value in own.values()]:
        options = "generator norm size width blocks upsample patch_gan lc_classes bands_A bands_B"
        given = ", ".join(flag(name) for name in options.split() if hasattr(cfg, name))
        raise UserError(f"{path}: its weights do not fit this {key}: check {given}")
    module.load_state_dict(dict(zip(own, values, strict=True)))
