"""A plain twin of every training step: each network and each loss written out, nothing merged.

Networks are functions of their stored tensors, taken one after the other; losses are formulas.
Nothing here calls the scripts. Everything is in float64.
"""

from collections import namedtuple

import torch
import torch.nn.functional as F

Edit = namedtuple("Edit", "rgb_a lc_ab rgb_ab box inside lc_a rgb_b lc_b own")


class Net:
    """A network's tensors by layer, in the order in which they are stored."""

    def __init__(self, module, forward):
        self.tensors = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.names = [name for name, _ in module.named_parameters()]
        self.forward = forward
        for name in self.names:
            self.tensors[name].requires_grad_()

    def __call__(self, *inputs):
        layers = {}
        for name in self.tensors:
            layer, _, tensor = name.rpartition(".")
            layers.setdefault(layer, {})[tensor] = name
        self.remaining = list(layers.values())
        out = self.forward(self, *inputs)
        assert not self.remaining  # every layer was used
        return out

    def take(self):
        return {key: self.tensors[name] for key, name in self.remaining.pop(0).items()}

    def conv(self, x, kernel, stride, padding, dilation=1):
        layer = self.take()
        assert layer["weight"].shape[2:] == (kernel, kernel)
        return F.conv2d(x, layer["weight"], layer.get("bias"), stride, padding, dilation)

    def up(self, x, kernel, output_padding=0, upsample="transposed"):
        if upsample == "resize":
            return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), 3, 1, 1)
        layer = self.take()
        assert layer["weight"].shape[2:] == (kernel, kernel)
        return F.conv_transpose2d(x, layer["weight"], layer.get("bias"), 2, 1, output_padding)

    def linear(self, x):
        layer = self.take()
        return x @ layer["weight"].T + layer["bias"]

    def batch_norm(self, x):
        layer = self.take()
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        with torch.no_grad():
            unbiased = x.var((0, 2, 3), correction=1)
            layer["running_mean"].mul_(0.9).add_(0.1 * mean)
            layer["running_var"].mul_(0.9).add_(0.1 * unbiased)
            layer["num_batches_tracked"].add_(1)
        x = (x - each(mean)) / (each(var) + 1e-5).sqrt()
        return x * each(layer["weight"]) + each(layer["bias"])

    def instance_norm(self, x):
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt()

    def norm(self, x, kind):
        return self.batch_norm(x) if kind == "batch" else self.instance_norm(x)


def each(channel):
    return channel.view(1, -1, 1, 1)


def relu(x):
    return torch.where(x > 0, x, 0.0)


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x)


def reflect(x, border):
    return F.pad(x, (border,) * 4, mode="reflect")


class Adam(torch.optim.Adam):
    """Of some networks, with the papers' momentum of 0.5."""

    def __init__(self, nets, lr):
        super().__init__(
            [net.tensors[name] for net in nets for name in net.names], lr, (0.5, 0.999)
        )

    def minimise(self, loss):
        parameters = self.param_groups[0]["params"]
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.step()


# ------------------------------------------------------------------------------------------- losses


def bce(logits, real):
    return torch.log(1 + torch.exp(-logits if real else logits)).mean()


def lsgan(logits, real):
    return ((logits - float(real)) ** 2).mean()


def full(images):
    """Pictures with holes (NaN) in the mean colour of the rest of their image."""
    images = images.clone()
    for channel in images.flatten(0, 1):
        channel[channel.isnan()] = channel[~channel.isnan()].mean()
    return images


def with_holes(fake, real):
    """A generated picture with the holes of a real one, in its own mean colour."""
    known = ~real.isnan()
    mean = (fake * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
    return torch.where(known, fake, mean)


def without_holes(fake, target):
    """Both, with the mean colour of the target where it has no data."""
    return torch.where(target.isnan(), full(target), fake), full(target)


def l1(a, b):
    """The mean error where b has no holes."""
    known = ~b.isnan()
    return (a[known] - b[known]).abs().mean()


def vgg16(module, image, wanted):
    """Activations of the layers numbered `wanted` (0 is relu1_1) with a module's tensors."""
    tensors = list(module.buffers())
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (image * 0.5 + 0.5 - each(mean)) / each(std)
    activations = []
    for layer in range(max(wanted) + 1):
        if layer in (2, 4, 7, 10):
            x = F.max_pool2d(x, 2, 2)
        x = relu(F.conv2d(x, tensors[2 * layer], tensors[2 * layer + 1], 1, 1))
        if layer in wanted:
            activations.append(x * module.scales[len(activations)])
    return activations


# ------------------------------------------------------------------------------------------ pix2pix


def unet(depth, kind, upsample):
    def forward(net, x):
        skips = [net.conv(x, 4, 2, 1)]
        for level in range(1, depth):
            x = net.conv(leaky(skips[-1]), 4, 2, 1)
            skips.append(net.norm(x, kind) if level < depth - 1 else x)
        x = net.norm(net.up(relu(skips.pop()), 4, upsample=upsample), kind)
        while len(skips) > 1:
            x = relu(torch.cat([skips.pop(), x], 1))
            x = net.norm(net.up(x, 4, upsample=upsample), kind)
        x = relu(torch.cat([skips.pop(), x], 1))
        return torch.tanh(net.up(x, 4, upsample=upsample))

    return forward


def resnet(blocks, kind, upsample, ending=torch.tanh):
    def forward(net, x):
        x = relu(net.norm(net.conv(reflect(x, 3), 7, 1, 0), kind))
        x = relu(net.norm(net.conv(x, 3, 2, 1), kind))
        x = relu(net.norm(net.conv(x, 3, 2, 1), kind))
        for _ in range(blocks):
            y = relu(net.norm(net.conv(reflect(x, 1), 3, 1, 0), kind))
            x = x + net.norm(net.conv(reflect(y, 1), 3, 1, 0), kind)
        x = relu(net.norm(net.up(x, 3, 1, upsample), kind))
        x = relu(net.norm(net.up(x, 3, 1, upsample), kind))
        return ending(net.conv(reflect(x, 3), 7, 1, 0))

    return forward


def patchgan(patch, kind):
    """(strides of the inner layers, kernel, padding) follow from the receptive field."""
    strides = {1: [1], 16: [1], 70: [2, 2, 1], 286: [2, 2, 2, 2, 1]}[patch]
    kernel, first, padding = (1, 1, 0) if patch == 1 else (4, 2, 1)

    def forward(net, x, image):
        h = leaky(net.conv(torch.cat([x, image], 1), kernel, first, padding))
        for stride in strides:
            h = leaky(net.norm(net.conv(h, kernel, stride, padding), kind))
        return net.conv(h, kernel, 1, padding)

    return forward


class Pix2pix:
    def __init__(self, state, cfg):
        self.cfg, self.vgg = cfg, state.vgg
        depth = {64: 6, 128: 7}[cfg.size]
        if cfg.generator == "unet":
            forward = unet(depth, cfg.norm, cfg.upsample)
        else:
            forward = resnet(cfg.blocks, cfg.norm, cfg.upsample)
        self.G = Net(state.G, forward)
        self.D = Net(state.D, patchgan(cfg.patch_gan, cfg.norm))
        self.adam_G, self.adam_D = Adam([self.G], cfg.lr), Adam([self.D], cfg.lr)

    def step(self, x, y):
        gan = bce if self.cfg.gan == "bce" else lsgan
        x = full(x)
        image = with_holes(self.G(x), y)
        d_fake = gan(self.D(x, image.detach()), False)
        d_real = gan(self.D(x, full(y)), True)
        d_total = self.cfg.d_weight * d_real + self.cfg.d_weight * d_fake
        self.adam_D.minimise(d_total)
        g = {"g_adv": gan(self.D(x, image), True), "g_l1": l1(image, y)}
        if self.cfg.content == "vgg":
            pictures = without_holes(image, y)
            (a,), (b,) = (vgg16(self.vgg, picture, [6]) for picture in pictures)
            g["g_content"] = ((a - b) ** 2).mean()
            g_total = g["g_adv"] + self.cfg.lambda_vgg * g["g_content"]
        else:
            g_total = g["g_adv"] + self.cfg.lambda_l1 * g["g_l1"]
        self.adam_G.minimise(g_total)
        d = {"d_total": d_total, "d_real": d_real, "d_fake": d_fake}
        return {"g_total": g_total, **g, **d}


# ----------------------------------------------------------------------------------------- cyclegan


def patchgan_alone(net, image):
    h = leaky(net.conv(image, 4, 2, 1))
    for _ in range(3):
        h = leaky(net.instance_norm(net.conv(h, 4, 2, 1)))
    return net.conv(F.pad(h, (1, 0, 1, 0)), 4, 1, 1)


class OneHot(torch.autograd.Function):
    """Forward: one-hot of the largest. Backward: as if it had been the softmax."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits.softmax(1))
        return F.one_hot(logits.argmax(1), logits.shape[1]).permute(0, 3, 1, 2).to(logits.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (soft,) = ctx.saved_tensors
        return soft * (gradient - (soft * gradient).sum(1, keepdim=True))


class Pool:
    """The image pool as a list; draws are made for every image, whether they are needed or not."""

    def __init__(self, size):
        self.size, self.images = size, []

    def __call__(self, images):
        returned = []
        for image in images if self.size else []:
            swap, slot = torch.rand(1).item() < 0.5, torch.randint(self.size, (1,)).item()
            if len(self.images) < self.size:
                self.images.append(image)
            elif swap:
                image, self.images[slot] = self.images[slot], image
            returned.append(image)
        return torch.stack(returned) if self.size else images


class CycleGAN:
    def __init__(self, state, cfg):
        self.cfg, self.labels = cfg, cfg.lc_classes != ""
        kind = cfg.blocks, "instance", cfg.upsample
        to_B = resnet(*kind, (lambda x: x) if self.labels else torch.tanh)
        to_A = resnet(*kind)
        self.G_AB, self.G_BA = Net(state.G_AB, to_B), Net(state.G_BA, to_A)
        self.D_A, self.D_B = Net(state.D_A, patchgan_alone), Net(state.D_B, patchgan_alone)
        self.adam_G = Adam([self.G_AB, self.G_BA], cfg.lr)
        self.adam_D = Adam([self.D_A, self.D_B], cfg.lr)
        self.pool_A, self.pool_B = Pool(cfg.pool_size), Pool(cfg.pool_size)

    def step(self, real_A, real_B):
        a, b = full(real_A), full(real_B)
        fake_B, fake_A = self.G_AB(a), self.G_BA(b)
        if self.labels:
            fake_B = OneHot.apply(fake_B)
        cycled_A, cycled_B = self.G_BA(fake_B), self.G_AB(fake_A)
        if self.labels:
            holes = b.sum(1, keepdim=True) == 0
            index = b.argmax(1).masked_fill(holes[:, 0], 255)
            cycle_B = F.cross_entropy(cycled_B, index, ignore_index=255)
            fake_B = torch.where(holes, 0.0, fake_B)
        else:
            cycle_B = l1(cycled_B, real_B)
        fake_A, fake_B = with_holes(fake_A, real_A), with_holes(fake_B, real_B)
        losses = {
            "adv_AB": lsgan(self.D_B(fake_B), True),
            "adv_BA": lsgan(self.D_A(fake_A), True),
            "cycle_A": l1(cycled_A, real_A),
            "cycle_B": cycle_B,
        }
        loss = losses["adv_AB"] + losses["adv_BA"]
        loss = loss + self.cfg.lambda_cycle * losses["cycle_A"]
        loss = loss + self.cfg.lambda_cycle * losses["cycle_B"]
        if not self.labels and self.cfg.lambda_identity > 0:
            losses["identity_A"] = l1(self.G_BA(a), real_A)
            losses["identity_B"] = l1(self.G_AB(b), real_B)
            weight = self.cfg.lambda_cycle * self.cfg.lambda_identity
            loss = loss + weight * losses["identity_A"] + weight * losses["identity_B"]
        self.adam_G.minimise(loss)
        old_A, old_B = self.pool_A(fake_A.detach()), self.pool_B(fake_B.detach())
        losses["d_A"] = (lsgan(self.D_A(a), True) + lsgan(self.D_A(old_A), False)) / 2
        losses["d_B"] = (lsgan(self.D_B(b), True) + lsgan(self.D_B(old_B), False)) / 2
        self.adam_D.minimise(losses["d_A"] + losses["d_B"])
        return losses


# -------------------------------------------------------------------------------------------- mixlc


def edit_encoder(net, x, depth):
    levels = [leaky(net.conv(reflect(x, 1), 4, 2, 0))]
    for _ in range(depth - 2):
        levels.append(leaky(net.batch_norm(net.conv(levels[-1], 4, 2, 1))))
    return levels, relu(net.conv(levels[-1], 4, 2, 1))


def edit_unet(net, x, depth):
    skips, x = edit_encoder(net, x, depth)
    while skips:
        x = torch.cat([skips.pop(), relu(net.batch_norm(net.up(x, 4)))], 1)
    return x


def dilated_net(net, x):
    x = relu(net.conv(reflect(x, 1), 4, 2, 0))
    for dilation in (1, 2, 4):
        x = relu(net.batch_norm(net.conv(x, 3, 1, dilation, dilation)))
    return x


def middle_unet(net, rgb, lc, depth, both):
    skips_rgb, x_rgb = edit_encoder(net, rgb, depth)
    skips_lc, x_lc = edit_encoder(net, lc, depth)
    x = torch.cat([x_rgb, x_lc], 1)
    while skips_lc:
        of_rgb, of_lc, x = skips_rgb.pop(), skips_lc.pop(), relu(net.batch_norm(net.up(x, 4)))
        x = torch.cat([of_rgb, of_lc, x] if both else [of_lc, x], 1)
    return x


def edit_generator(depth, fusion, skips):
    def forward(net, rgb, lc):
        if fusion == "early":
            x = edit_unet(net, torch.cat([rgb, lc], 1), depth)
        elif fusion == "middle":
            x = middle_unet(net, rgb, lc, depth, skips == "both")
        else:
            x = edit_unet(net, rgb, depth)
            y = edit_unet(net, lc, depth) if fusion == "late" else dilated_net(net, lc)
            x = torch.cat([x, y], 1)
        x = relu(net.conv(x, 3, 1, 1))
        return torch.tanh(net.up(x, 4))

    return forward


def augmented(image):
    """Another contrast and brightness, and a grey square."""
    drawn = torch.rand(2, len(image), 1, 1, 1)
    image = image * (drawn[0] * 0.4 + 0.8) + (drawn[1] * 0.4 - 0.2)
    side, pictures = image.shape[-1], []
    rows, columns = torch.randint(side, (2, len(image), 1))[..., 0].tolist()
    for picture, y, x in zip(image, rows, columns, strict=True):
        keep, reach = torch.ones(side, side), side // 8 - 1
        keep[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1] = 0
        pictures.append(picture * keep)
    return torch.stack(pictures)


def label_discriminator(net, image, box):
    return net.up(edit_unet(net, augmented(image), 6), 4)


def edit_discriminator(depth, local):
    def trunk(net, x, blocks):
        for _ in range(blocks):
            x = leaky(net.batch_norm(net.conv(x, 5, 2, 2)))
        return leaky(net.linear(x.flatten(1)))

    def forward(net, image, box):
        features = trunk(net, image, depth - 2)
        if local:
            side = image.shape[-1]
            windows = []
            for picture, (top, left, height, width) in zip(image, box.tolist(), strict=True):
                y = min(max(top + (height - side // 2) // 2, 0), side - side // 2)
                x = min(max(left + (width - side // 2) // 2, 0), side - side // 2)
                windows.append(picture[:, y : y + side // 2, x : x + side // 2])
            features = torch.cat([features, trunk(net, torch.stack(windows), depth - 3)], 1)
        return net.linear(features)

    return forward


def edit_mask(edit):
    """Where each edit is: the box, or all but the box, (B, 1, S, S) bool."""
    mask = torch.zeros(len(edit.rgb_a), 1, *edit.rgb_a.shape[-2:], dtype=torch.bool)
    for k, (top, left, height, width) in enumerate(edit.box.tolist()):
        mask[k, :, top : top + height, left : left + width] = True
        if not edit.inside[k]:
            mask[k] = ~mask[k]
    return mask


def grown(mask):
    """The mask and 3 pixels around it at 64."""
    border, near = round(12 * mask.shape[-1] / 256), torch.zeros_like(mask)
    for k, _, y, x in mask.nonzero().tolist():
        near[k, :, max(y - border, 0) : y + border + 1, max(x - border, 0) : x + border + 1] = True
    return near


def l1_where(fake, target, where):
    """The mean over images of the mean error where `where` (B, 1, S, S) is true, but for holes."""
    errors, where = (fake - full(target)).abs().mean(1), where & ~target[:, :1].isnan()
    means = [error[here[0]].mean() for error, here in zip(errors, where, strict=True)]
    return sum(means) / len(means)


def with_holes_of_both(edit):
    """Photograph b with the holes (NaN) of both, as D sees no other difference than the edit."""
    photo = edit.rgb_b.clone()
    photo[edit.rgb_a.isnan()] = torch.nan
    return photo


def visible(edit, cfg):
    """rgb_a; with --erase noise where the edit is."""
    if not cfg.erase:
        return full(edit.rgb_a)
    return torch.where(edit_mask(edit), torch.randn_like(edit.rgb_a) / 2, full(edit.rgb_a))


def at_the_edit(logits, near):
    """The logits of the patches whose share of the image, S/P pixels a side, touches `near`."""
    side, count, kept = near.shape[-1], logits.shape[-1], []
    for k, _, row, column in torch.ones_like(logits).nonzero().tolist():
        rows = slice(row * side // count, -((row + 1) * side // -count))
        columns = slice(column * side // count, -((column + 1) * side // -count))
        if near[k, 0, rows, columns].any():
            kept.append(logits[k, 0, row, column])
    return torch.stack(kept)


def labelled(logits, labels):
    """Cross-entropy with labels (B, S, S), below 0 where none counts; all labels weigh the same."""
    found, counts = labels[labels >= 0].unique(return_counts=True)
    weights = torch.zeros(logits.shape[1], dtype=torch.float64)
    weights[found] = (counts.double().mean() / counts).clamp(max=10)
    return F.cross_entropy(logits, labels, weights.to(logits), ignore_index=-1)


def colours_apart(fake, target, where):
    """Of mean colours, in squares of an eighth of the side, a quarter of which is edited."""
    size, apart = fake.shape[-1], []
    side, step = size // 8, size // 32
    known = where[:, 0] & ~target.isnan()[:, 0]
    for image, other, inside in zip(fake, target, known, strict=True):
        for top in range(0, size - side + 1, step):
            for left in range(0, size - side + 1, step):
                square = slice(top, top + side), slice(left, left + side)
                chosen = inside[square]
                if 4 * chosen.sum() >= side**2:
                    means = [x[:, *square][:, chosen].mean(1) for x in (image, other)]
                    apart.append((means[0] - means[1]).abs().mean())
    return torch.stack(apart).mean() if apart else 0 * fake.sum()


class Mixlc:
    def __init__(self, state, cfg):
        self.cfg = cfg
        self.G = Net(state.G, edit_generator(6, cfg.fusion, cfg.skips))
        label = cfg.d == "label"
        self.D = Net(state.D, label_discriminator if label else edit_discriminator(6, cfg.local_d))
        self.adam_G, self.adam_D = Adam([self.G], cfg.lr), Adam([self.D], cfg.lr)

    def step(self, *edit_fields):
        edit = Edit(*edit_fields)
        mask = edit_mask(edit)
        near = grown(mask)
        fake = self.G(visible(edit, self.cfg), edit.lc_ab)
        shown = torch.where(mask, fake, full(edit.rgb_a)) if self.cfg.composite else fake
        photo = with_holes_of_both(edit)
        shown = with_holes(shown, photo)

        real, fakes, asked = True, False, True  # what D is to answer, and what G wants
        if self.cfg.d == "label":
            here, around = mask[:, 0], near[:, 0]
            if not self.cfg.composite:
                here = around = torch.ones_like(here)
            real, asked = (x.argmax(1).where(x.any(1), -1) for x in (edit.lc_b, edit.lc_ab))
            fakes, asked = asked.where(~here, edit.lc_ab.shape[1]), asked.where(around, -1)
            known = ~photo.isnan()[:, 0]
            real, fakes, asked = (labels.where(known, -1) for labels in (real, fakes, asked))
        adv = labelled if self.cfg.d == "label" else bce
        d_fake = adv(self.D(shown.detach(), edit.box), fakes)
        d_real = adv(self.D(full(photo), edit.box), real)
        d_total = d_real / 2 + d_fake / 2
        self.adam_D.minimise(d_total)
        g_adv = adv(self.D(shown, edit.box), asked)
        known = torch.ones_like(mask)  # without the collage: outside, and all of own edits
        if not self.cfg.collage:
            known = torch.stack([own | ~where for own, where in zip(edit.own, mask, strict=True)])
        g_l1 = l1_where(fake, edit.rgb_ab, known)
        g_local = l1_where(fake, edit.rgb_ab, near & known)
        g_total = self.cfg.lambda_adv * g_adv + self.cfg.lambda_l1 * g_l1
        g_total = g_total + self.cfg.lambda_local * g_local
        g = {"g_adv": g_adv, "g_l1": g_l1, "g_local": g_local}
        if self.cfg.lambda_color:
            g["g_color"] = colours_apart(fake, edit.rgb_ab, mask)
            g_total = g_total + self.cfg.lambda_color * g["g_color"]
        self.adam_G.minimise(g_total)
        g = {"g_total": g_total} | g
        return g | {"d_total": d_total, "d_real": d_real, "d_fake": d_fake}


# -------------------------------------------------------------------------------------- mixlc_acgan


def acgan_unet(net, x):
    skips = [leaky(net.batch_norm(net.conv(reflect(x, 1), 4, 2, 0)))]
    for _ in range(4):
        skips.append(leaky(net.batch_norm(net.conv(skips[-1], 4, 2, 1))))
    x = skips.pop()
    for _ in range(2):
        x = relu(net.batch_norm(net.conv(x, 3, 1, 1)))
    while skips:
        x = torch.cat([skips.pop(), relu(net.batch_norm(net.up(x, 4)))], 1)
    return relu(net.batch_norm(net.conv(x, 3, 1, 1)))


def acgan_generator(net, rgb, lc):
    x = torch.cat([acgan_unet(net, rgb), acgan_unet(net, lc)], 1)
    x = relu(net.batch_norm(net.up(x, 4)))
    y = relu(net.batch_norm(net.conv(x, 3, 1, 1)))
    x = x + net.batch_norm(net.conv(y, 3, 1, 1))
    return torch.tanh(net.conv(x, 3, 1, 1))


def acgan_discriminator(net, image, lc, wanted="both"):
    """(adversarial logits, class logits); what is not wanted is None, and its layers are passed."""
    x = image
    for _ in range(5):
        x = leaky(net.batch_norm(net.conv(x, 4, 2, 1)))
    for _ in range(2):
        x = leaky(net.batch_norm(net.conv(x, 3, 1, 1)))
    joined = torch.cat([x, F.avg_pool2d(lc, 32)], 1)
    logits = net.conv(leaky(net.conv(joined, 3, 1, 1)), 3, 1, 1)
    if wanted == "adversarial":
        net.remaining.clear()
        return logits, None
    for _ in range(5):
        x = relu(net.batch_norm(net.up(x, 4)))
    return logits, net.conv(x, 3, 1, 1)


def class_loss(logits, lc, weights):
    index = lc.argmax(1).masked_fill(lc.sum(1) == 0, 255)
    return F.cross_entropy(logits, index, weights.to(logits), ignore_index=255)


class MixlcACGAN:
    def __init__(self, state, cfg):
        self.cfg, self.vgg, self.weights = cfg, state.vgg, state.class_weights.clone()
        numbers = {"relu1_1": 0, "relu1_2": 1}
        self.layers = [numbers[name] for name in cfg.style_layers.split(",")]
        self.G, self.D = Net(state.G, acgan_generator), Net(state.D, acgan_discriminator)
        self.adam_G, self.adam_D = Adam([self.G], cfg.lr), Adam([self.D], cfg.lr)

    def style(self, fake, target):
        loss = 0.0
        pictures = without_holes(fake, target)
        pairs = zip(*(vgg16(self.vgg, x, self.layers) for x in pictures), strict=True)
        for a, b in pairs:
            size = a[0].numel()
            gram_a, gram_b = (torch.einsum("bihw,bjhw->bij", x, x) / size for x in (a, b))
            loss = loss + ((gram_a - gram_b) ** 2).sum((1, 2)).mean()
        return loss

    def step(self, *edit_fields):
        edit, cfg = Edit(*edit_fields), self.cfg
        rgb, mask = visible(edit, cfg), edit_mask(edit)
        near = grown(mask) if cfg.composite else torch.ones_like(mask)
        fake = self.G(rgb, edit.lc_ab)
        shown = torch.where(mask, fake, full(edit.rgb_a)) if cfg.composite else fake
        photo = with_holes_of_both(edit)
        shown = with_holes(shown, photo)
        logits = self.D(shown.detach(), edit.lc_ab, "adversarial")[0]
        d_fake = bce(at_the_edit(logits, near), False)
        logits, classes = self.D(full(photo), edit.lc_b)
        d_real = bce(at_the_edit(logits, near), True)
        known = ~photo.isnan()[:, :1]
        d_class = class_loss(classes, edit.lc_b * known, self.weights)
        self.adam_D.minimise(d_real / 2 + d_fake / 2 + d_class)
        logits, classes = self.D(shown, edit.lc_ab)
        g_adv, g_pixel = bce(at_the_edit(logits, near), True), l1(fake, edit.rgb_ab)
        g_style = self.style(fake, edit.rgb_ab)
        g_class = class_loss(classes, edit.lc_ab * near * known, self.weights)
        g_total = cfg.lambda_adv * g_adv + cfg.lambda_l1 * g_pixel + cfg.lambda_style * g_style
        g = {"g_adv": g_adv, "g_pixel": g_pixel, "g_style": g_style, "g_class": g_class}
        if cfg.lambda_id:
            same = self.G(rgb, edit.lc_a)
            g["g_id"] = l1(same, edit.rgb_a) + self.style(same, edit.rgb_a)
            g_total = g_total + cfg.lambda_id * g["g_id"]
        self.adam_G.minimise(g_total + cfg.lambda_class * g_class)
        return g | {"d_real": d_real, "d_fake": d_fake, "d_class": d_class}


TWINS = {"pix2pix": Pix2pix, "cyclegan": CycleGAN, "mixlc": Mixlc, "mixlc_acgan": MixlcACGAN}
