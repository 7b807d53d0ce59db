"""Pictures and label maps as tensors, arrays and grids."""

import functools

import numpy as np
import torch
from PIL import Image, ImageDraw

from support.classes import IGNORED
from support.files import write_image


def to_bytes(images):
    """Images in [-1, 1] -> uint8 0..255; 0 where there is no data (NaN)."""
    levels = (images.detach().float() + 1) * 127.5
    return levels.nan_to_num(0.0).round().clamp(0, 255).to(torch.uint8)


def from_bytes(images, known=None):
    """(B, C, H, W) uint8 or int16 -> float32 in [-1, 1]; NaN where known (B, 1, H, W) is 0."""
    middle, half = (-0.5, 32767.5) if images.dtype == torch.int16 else (127.5, 127.5)
    levels = images.to(torch.float32, memory_format=torch.contiguous_format)
    levels = levels.sub_(middle).mul_(1 / half)
    return levels if known is None else levels.masked_fill_(known == 0, torch.nan)


def filled(images):
    """Images (B, C, H, W) with their own mean colour where they have no data (NaN)."""
    colors = images.nanmean((2, 3), keepdim=True).nan_to_num()
    return torch.where(images.isnan(), colors, images)


def holes_of(real, fake):
    """Generated images with the holes of real ones, filled as those are: with their own colour.

    NaN of a broken generator stays.
    """
    holes = real.isnan()
    return torch.where(holes, filled(torch.where(holes, torch.nan, fake)), fake)


def filled_alike(fake, target):
    """(fake, target), equal where the target has no data, so that no loss counts there."""
    whole = filled(target)
    return torch.where(target.isnan(), whole.to(fake.dtype), fake), whole


def one_hot(index, classes):
    """Class indices (B, H, W) uint8 -> (B, classes, H, W) float32, all zeros where ignored."""
    each = torch.arange(classes, dtype=torch.uint8, device=index.device).view(1, -1, 1, 1)
    maps = torch.empty(len(index), classes, *index.shape[1:], device=index.device)
    return torch.eq(index[:, None], each, out=maps)  # straight into floats: ten times as fast


def class_index(maps):
    """One-hot maps (B, classes, H, W) -> class indices (B, H, W); IGNORED where all are zero."""
    return torch.where(maps.sum(1) > 0, maps.argmax(1), IGNORED)


def draw(index, classes):
    """Class indices (B, H, W) in the colours of a ClassTable: (B, 3, H, W) in [-1, 1]."""
    flat = _palette_on(classes, index.device).index_select(1, index.flatten().int())
    return flat.view(3, *index.shape).transpose(0, 1).contiguous()


@functools.cache
def _palette_on(classes, device):
    """A ClassTable's palette as a tensor (3, 256) in [-1, 1]."""
    return from_bytes(torch.from_numpy(classes.palette.T)).to(device)


def as_tensor(picture):
    """A picture (H, W, C), uint8 or int16 -> (1, C, H, W) in [-1, 1]."""
    return from_bytes(torch.tensor(picture).permute(2, 0, 1)[None])


def as_array(image):
    """An image (C, H, W) in [-1, 1] -> (H, W, C) uint8 array."""
    return to_bytes(image).permute(1, 2, 0).cpu().numpy()


def eight_bits(levels):
    """A picture's levels, uint8 or int16, as uint8."""
    return levels if levels.dtype == np.uint8 else ((levels >> 8) + 128).astype(np.uint8)


def resize(image, size, labels=False):
    """An (H, W, C) picture, or (H, W) label map, at size (width, height): bicubic, or nearest.

    Of (H, W) bool, where there is data: 255, or 0 at and beside holes.
    """
    if image.ndim == 3 and (image.shape[-1] != 3 or image.dtype == np.int16):
        bands = [resize(band, size) for band in np.moveaxis(image, -1, 0)]
        return np.stack(bands, -1)
    how = Image.Resampling.NEAREST if labels else Image.Resampling.BICUBIC
    plane = image if image.dtype == np.uint8 else image.astype(np.float32)
    resized = np.array(Image.fromarray(plane).resize(size, how))
    if image.dtype == bool:
        return np.where(abs(resized - 1) < 1e-3, 255, 0).astype(np.uint8)
    if image.dtype == np.int16:
        return resized.round().clip(-32768, 32767).astype(np.int16)
    return resized


def mirrored(pixels, height, width):
    """(H, W, ...) pixels made (height, width, ...) by mirroring them at bottom and right."""
    missing = [(0, height - pixels.shape[0]), (0, width - pixels.shape[1])]
    return np.pad(pixels, missing + [(0, 0)] * (pixels.ndim - 2), "symmetric")


def paste(picture, pixels, top, left=0):
    """Pastes pixels into a picture, cut off where they would lie outside it."""
    y, x = max(0, -top), max(0, -left)
    bottom, right = max(0, top + pixels.shape[0]), max(0, left + pixels.shape[1])
    inside = picture[top + y : bottom, left + x : right]
    inside[...] = pixels[y : y + inside.shape[0], x : x + inside.shape[1]]


def shown(images):
    """Pictures (B, C, H, W) as colours (B, 3, H, W): one band grey, two red and cyan, or three."""
    if images.shape[1] == 2:
        return torch.cat([images, images[:, 1:]], 1)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]


def grid(columns):
    """{title: (B, C, H, W) in [-1, 1]} -> (height, width, 3) uint8: a row an image, with titles."""
    count, _, height, width = next(iter(columns.values())).shape
    gap, head = 4, 16
    size = len(columns) * (width + gap) + gap, head + count * (height + gap)
    sheet = Image.new("RGB", size, "white")
    text = ImageDraw.Draw(sheet)
    for k, (title, images) in enumerate(columns.items()):
        left = gap + k * (width + gap)
        text.text((left, 2), title, fill="black")
        for row, image in enumerate(shown(images)):
            picture = Image.fromarray(as_array(image))
            sheet.paste(picture, (left, head + row * (height + gap)))
    return np.asarray(sheet)


def save_grid(path, columns):
    """Writes grid(columns) as an image file."""
    write_image(path, grid(columns))
