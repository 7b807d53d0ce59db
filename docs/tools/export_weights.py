"""Makes a checkpoint small enough to give away: networks alone, in half precision, no paths.

    python docs/tools/export_weights.py runs/pix2pix/checkpoints/last.pt weights/satellite-to-map.pt
    python docs/tools/export_weights.py runs/mixlc/checkpoints/epoch_000[4-7].pt weights/editor.pt

Of several checkpoints, of one run or of runs that continue each other, the result has the mean of
the weights, and the options of the last. It works wherever a checkpoint works, but for --resume:
optimisers and image pools are left out. Vectors (biases, norm layers) keep their precision; they
are few, and half precision would overflow in running variances.
"""

import sys
from pathlib import Path

import paths  # noqa: F401  finds support/
import torch

from support.begin import command
from support.checkpoints import load_weights, save_checkpoint
from support.errors import UserError, refusing

PATHS = ("cache", "out", "checkpoint", "init", "init_AB", "init_BA", "vgg16", "judge")
KEPT = ("script", "histograms", "window", "epoch", "step")


def halved(tensor):
    """A tensor of two dimensions and more in float16; others as they are."""
    return tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor


def mean(contents):
    """The last of several checkpoints' contents, with the mean of the weights of all."""
    state = contents[-1]["state"]
    for name, weights in state.items():
        if name.startswith(("G", "D", "judge")):
            for key in weights:
                alike = [content["state"][name][key].double() for content in contents]
                weights[key] = torch.stack(alike).mean(0).to(weights[key].dtype)
    return contents[-1]


def shrink(content):
    """A checkpoint's content without what only training needs."""
    config = {name: "" if name in PATHS else value for name, value in content["config"].items()}
    config["data"] = Path(config["data"]).name
    small = {name: content[name] for name in KEPT} | {"config": config, "state": {}}
    networks = ("G",) if content["script"] == "mixlc" else ("G", "D")  # mixlc has no --init
    for name, value in content["state"].items():
        if name.startswith(networks):
            small["state"][name] = {key: halved(tensor) for key, tensor in value.items()}
        elif not isinstance(value, dict):  # class weights, the place in a schedule
            small["state"][name] = value
    return small


@command
def main(argv=None):
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) < 2:
        sys.exit(__doc__)
    *given, result = arguments
    contents = [load_weights(path) for path in given]
    for path, content in zip(given, contents, strict=True):
        content = content if isinstance(content, dict) else {}
        if "script" not in content and "judge" not in content.get("state", {}):
            raise UserError(f"{path}: neither a checkpoint of one of the scripts nor a judge")
    with refusing(f"{' '.join(given)}: not checkpoints of one run"):
        content = mean(contents)
    if "judge" in content["state"]:
        judge = {key: halved(tensor) for key, tensor in content["state"]["judge"].items()}
        save_checkpoint(result, content | {"state": {"judge": judge}})
    else:
        save_checkpoint(result, shrink(content))


if __name__ == "__main__":
    main()
