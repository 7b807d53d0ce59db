"""Measure whether generated photographs are good to train on: imagery from forged masks.

    python docs/tools/forged_masks.py                                   the demo world, minutes
    python docs/tools/forged_masks.py --data landcover/ --patch 256     a data directory, longer
    python docs/tools/forged_masks.py --keep                            into docs/results, too

For n real tiles, and several seeds: pix2pix learns land cover -> photograph from these n alone.
Masks are forged from theirs: turned, mirrored, a rectangle of one pasted into another, an ellipse
of some class drawn on top. pix2pix makes photographs of them. A small U-Net then learns to segment
from the real tiles alone or with --forged times as many forged ones, each with and without turned
and mirrored copies (ordinary augmentation). The measure is the mean IoU on held-out tiles.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from paths import RESULTS

import common
import pix2pix
from support.demo import demo_world
from support.device import set_lr
from support.judge import Judge
from support.layouts import find_images
from support.measures import print_table
from support.pictures import to_bytes


def tiles_of(cfg, split):
    """(N, 4, S, S) uint8: photograph and land cover."""
    return torch.from_numpy(np.array(common.ImageStore(cfg, split, cfg.size).records))


def turned(records, rng):
    """Each record turned and mirrored at random: 8 ways."""
    turns = []
    for record, way in zip(records, rng.integers(0, 8, len(records)), strict=True):
        turn = torch.rot90(record, int(way % 4), (1, 2))
        turns.append(turn.flip(2) if way >= 4 else turn)
    return torch.stack(turns)


def forge(masks, count, rng):
    """`count` new label maps from masks (N, S, S): two of them joined, and an ellipse."""
    classes = [k for k in masks.unique() if k != common.IGNORED]
    forged = []
    for _ in range(count):
        a, b = turned(masks[rng.choice(len(masks), 2, replace=False)][:, None], rng)[:, 0]
        inside = rectangle(masks.shape[-1], rng)
        mask = torch.where(inside, b, a)
        mask[ellipse(masks.shape[-1], rng)] = classes[rng.integers(len(classes))]
        forged.append(mask)
    return torch.stack(forged)


def rectangle(side, rng):
    """A random rectangle as a mask (S, S), 1/4 to 3/4 of the side."""
    height, width = rng.integers(side // 4, side * 3 // 4, 2)
    top, left = rng.integers(0, (side - height + 1, side - width + 1))
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    return inside


def ellipse(side, rng):
    """A random ellipse as a mask (S, S), with half axes of 1/8 to 1/3 of the side."""
    y, x = rng.integers(0, side, 2)
    height, width = rng.integers(side // 8, side // 3, 2)
    places = np.arange(side)
    distance = ((places[:, None] - y) / height) ** 2 + ((places - x) / width) ** 2
    return torch.from_numpy(distance < 1)


def learn_to_paint(records, cfg, steps):
    """A pix2pix State that has learnt land cover -> photograph from these records alone."""
    torch.manual_seed(cfg.seed)
    state, rng = pix2pix.build(cfg, torch.device("cpu")), np.random.default_rng(cfg.seed)
    for step in range(steps):
        rate = cfg.lr * min(1.0, 2 * (steps - step) / steps)
        for optimizer in (state.opt_G, state.opt_D):
            set_lr(optimizer, rate)
        batch = turned(records[rng.choice(len(records), cfg.batch_size)], rng)
        x = common.draw(batch[:, 3], cfg.classes)
        pix2pix.train_step(state, (x, common.from_bytes(batch[:, :3])), cfg)
    return state


def paint(state, masks, cfg):
    """Records of forged label maps (N, S, S) and their generated photographs."""
    fakes = []
    for some in masks.split(8):
        fakes.append(pix2pix.translate(state, common.draw(some, cfg.classes), cfg))
    return torch.cat([to_bytes(torch.cat(fakes)), masks[:, None]], 1)


def mean_iou(records, val, classes, augment, seed, steps, batch=16):
    """Held-out mean IoU of a small U-Net that learnt to segment from these records."""
    torch.manual_seed(seed)
    net, rng = Judge(classes, width=16), np.random.default_rng(seed)
    adam = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(steps):
        images = records[rng.choice(len(records), batch)]
        images = turned(images, rng) if augment else images
        logits = net(common.from_bytes(images[:, :3]))
        loss = F.cross_entropy(logits, images[:, 3].long(), ignore_index=common.IGNORED)
        adam.zero_grad()
        loss.backward()
        adam.step()
    scores = common.Scores()
    for images in val.split(32):
        seen = net.classes_of(common.from_bytes(images[:, :3]))
        scores.add_labels("net", seen, images[:, 3], classes)
    return scores.table()["net"]["mean_iou"]


def compare(options, n, seed, args):
    """{kind of training set: mean IoU} for n real tiles and one seed."""
    cfg = pix2pix.Config(**options, width=args.width, batch_size=4, seed=seed)
    train, val = tiles_of(cfg, "train"), tiles_of(cfg, "val")
    rng = np.random.default_rng([seed, n])
    real = train[rng.choice(len(train), n, replace=False)]
    state = learn_to_paint(real, cfg, args.paint_steps)
    forged = paint(state, forge(real[:, 3], n * max(args.forged), rng), cfg)
    found = {}
    for times, augment in itertools.product([0, *args.forged], (False, True)):
        kind = f"real + {times} x forged" if times else "real"
        kind += ", augmented" if augment else ""
        records = torch.cat([real, forged[: n * times]])
        found[kind] = mean_iou(records, val, len(cfg.classes), augment, seed, args.steps)
        print(f"{n} tiles, seed {seed}, {kind}: {found[kind]:.3f}", flush=True)
    return found


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg = parser.add_argument
    arg("--data", default="", help="directory with land cover; without it, the demo world")
    arg("--lc-classes", default="", help="class table, as in the scripts")
    arg("--patch", type=int, default=128, help="side of the pieces that images are cut into")
    arg("--cache", default="runs/cache", help="folder of the decoded images")
    arg("--size", type=int, default=64, help="side of the networks' images")
    arg("--width", type=int, default=24, help="channels of pix2pix's first layer")
    arg("--tiles", type=int, nargs="+", default=[16, 64], help="numbers of real tiles to compare")
    arg("--forged", type=int, nargs="+", default=[1, 4], help="forged tiles for each real one")
    arg("--seeds", type=int, default=3, help="runs of each")
    arg("--paint-steps", type=int, default=800, help="steps of pix2pix, of 4 tiles each")
    arg("--steps", type=int, default=400, help="steps of the segmenter, of 16 tiles each")
    arg("--keep", action="store_true", help="also write docs/results/forged.json")
    args = parser.parse_args(argv)
    if min(args.forged) < 1:
        raise common.UserError("--forged: must be at least 1")
    if args.seeds < 2:
        raise common.UserError("--seeds: must be at least 2, to measure their spread")
    return args


@common.command
def main(argv=None):
    args = parse(argv)
    data = args.data or demo_world(args.cache, "landcover")
    classes = find_images(data, "train", args.lc_classes).classes
    if not classes:
        raise common.UserError(f"--data {data}: has no land cover; pass --lc-classes")
    options = {"data": data, "patch": args.patch, "cache": args.cache, "size": args.size}
    options["lc_classes"] = classes.text
    available = len(tiles_of(pix2pix.Config(**options), "train"))
    if not 2 <= min(args.tiles) <= max(args.tiles) <= available:
        raise common.UserError(f"--tiles: must be from 2 to {available}, all training tiles")
    found, means = {}, {}
    for n in args.tiles:
        runs = [compare(options, n, seed, args) for seed in range(args.seeds)]
        found[str(n)] = {kind: [run[kind] for run in runs] for kind in runs[0]}
        means[f"{n} tiles"] = {kind: float(np.mean(v)) for kind, v in found[str(n)].items()}
    print_table(means)
    if args.keep:
        path = RESULTS / "forged.json"
        kept = json.loads(path.read_text())
        kept[f"{Path(args.data).name or 'demo world'}, {args.size} pixels"] = {"mean_iou": found}
        path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
