"""InstanceNorm and reflection padding that stay channels_last."""

import torch
import torch.nn.functional as F
from torch import nn


class InstanceNorm(nn.InstanceNorm2d):
    """InstanceNorm as BatchNorm of one image after the other.

    PyTorch's own returns NCHW, and in 2.13 its gradient is wrong for a channels_last batch of 1.
    """

    def forward(self, x):
        how = {"weight": self.weight, "bias": self.bias, "training": True, "eps": self.eps}
        images = [F.batch_norm(image, None, None, **how) for image in x.split(1)]
        return images[0] if len(images) == 1 else torch.cat(images)


class ReflectionPad(nn.ReflectionPad2d):
    """Reflection padding, equal on all sides. PyTorch's own returns NCHW on CUDA."""

    def forward(self, x):
        return Reflected.apply(x, self.padding[0])


class Reflected(torch.autograd.Function):
    """(B, C, H, W) -> (B, C, H + 2 pad, W + 2 pad), in the memory format of x."""

    @staticmethod
    def forward(ctx, x, pad):
        ctx.pad = pad
        out = F.pad(x, [pad] * 4)
        for dim in (2, 3):
            for border, inside in borders(out, pad, dim):
                border.copy_(inside.flip(dim))
        return out

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        for dim in (3, 2):
            for border, inside in borders(gradient, ctx.pad, dim):
                inside.add_(border.flip(dim))
        return F.pad(gradient, [-ctx.pad] * 4), None


def borders(x, pad, dim):
    """Two views (border, the part inside that it mirrors) of a padded tensor, along dim."""
    end = x.shape[dim] - pad
    before = x.narrow(dim, 0, pad), x.narrow(dim, pad + 1, pad)
    after = x.narrow(dim, end, pad), x.narrow(dim, end - pad - 1, pad)
    return before, after


def stay_channels_last(net):
    """Replaces InstanceNorm2d and ReflectionPad2d in a network; names and weights stay."""
    for module in net.modules():
        if isinstance(module, nn.InstanceNorm2d):
            module.__class__ = InstanceNorm
        elif isinstance(module, nn.ReflectionPad2d) and len(set(module.padding)) == 1:
            module.__class__ = ReflectionPad
