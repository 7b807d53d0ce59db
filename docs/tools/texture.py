"""Measure the texture of generated pictures: docs/results/texture.json.

    python docs/tools/texture.py CHECKPOINT DATA [--vgg16 FILE]
    python docs/tools/texture.py CHECKPOINT DATA --keep cyclegan-maps        into docs/results, too

For every row of the evaluation: the style loss of mixlc_acgan.py (Johnson et al. 2016,
arXiv:1603.08155, eq. 4) of the pictures and their targets, by three layers of VGG16. It is 0 for
equal textures, wherever they are in a picture. In the row "real, of another place" a target is
compared with the next one of its batch.
"""

import argparse
import collections
import contextlib
import importlib
import io
import json
import statistics
import tempfile
from unittest import mock

import torch
from paths import RESULTS

import common
from mixlc_acgan import style_loss
from support.checkpoints import load_weights
from support.measures import print_table

LAYERS = ("relu1_2", "relu2_2", "relu3_3")


@torch.no_grad()
def measured(script, checkpoint, data, vgg):
    """{row: {"texture": mean}} of the evaluation of a checkpoint."""
    found = collections.defaultdict(list)

    def add(row, guesses, targets):
        for guess, target in zip(guesses.split(1), targets.split(1), strict=True):
            found[row].append(style_loss(vgg, guess, target).item())

    def add_images(scores, row, guess, target, limits=None):
        add(row, guess, target)
        if row.endswith("model") and len(target) > 1:
            add(row.removesuffix("model") + "real, of another place", target[1:], target[:-1])

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(common.Scores, "add_images", add_images),
        mock.patch.object(common.Scores, "table", lambda _: {}),
    ):
        call = ["--evaluate", "--checkpoint", checkpoint, "--data", data, "--precision", "fp32"]
        script.main([*call, "--out", folder])
    return {row: {"texture": statistics.mean(values)} for row, values in found.items()}


@common.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="checkpoint of pix2pix.py or cyclegan.py")
    parser.add_argument("data", help="as in the scripts")
    parser.add_argument("--vgg16", default="", metavar="FILE", help="as in the scripts")
    parser.add_argument("--keep", metavar="NAME", help="also write docs/results/texture.json")
    args = parser.parse_args(argv)
    name = load_weights(args.checkpoint).get("script")
    if name not in ("pix2pix", "cyclegan"):
        raise common.UserError(f"{args.checkpoint}: no checkpoint of pix2pix.py or cyclegan.py")
    vgg = common.VGG16Features(LAYERS, "vgg16", args.vgg16)
    rows = measured(importlib.import_module(name), args.checkpoint, args.data, vgg)
    print_table(rows)
    if args.keep:
        path = RESULTS / "texture.json"
        kept = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(kept | {args.keep: rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
