"""Functions of elements of several types: comparisons, masks, integers, rounding, statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Functions = dict[str, Callable[..., Any]]

COMPARISONS: Functions = {
    "with numbers": lambda m, x: (x == 0, x != 0.5, x < 0, x <= 0, x > 0.25, x >= math.inf),
    "numbers first": lambda m, x: (torch.less(torch.tensor(0.1), x), torch.ge(torch.tensor(0.5), x)),
    "of two": lambda m, x: (x == x.flip(3), x != x.abs(), x < x.flip(3), x <= x.abs(), x > -x, x >= -x),
    "of channels": lambda m, x: (
        x == m.channel,
        x != m.channel,
        x[:, :1] < x,
        x <= m.channel,
        x > x[:, :1],
        m.channel >= x,
    ),
    "logic": lambda m, x: (
        *((x > 0) & (x < 1), (x > 0) | (x < -1), (x > 0) ^ (x < 1), ~(x > 0)),
        *(torch.logical_and(x, x > 0), torch.logical_or(x, x < 0), torch.logical_xor(x, x > 1), torch.logical_not(x)),
        *((x > 0) & (m.channel > 0), (x > 0) | (m.channel > 0), (x > 0) ^ (x[:, :1] > 0)),
    ),
    "arithmetic on booleans": lambda m, x: (
        (x > 0) + (x > 1),
        (x > 0) * (x > 1),
        (x > 0) * x,
        x + (x > 0),
        (x > 0) > (x > 1),
    ),
    "kinds of numbers": lambda m, x: (torch.isnan(x), torch.isinf(x), torch.isfinite(x), torch.isclose(x, x.abs())),
    "any, all": lambda m, x: ((x > 0).any(1), (x > 0).all(3), (x > 0).any(), (x > 1).all(), (x > 0).amax(2), x.any(3)),
    "moves": lambda m, x: (
        *((x > 0).flip(1), torch.cat([x > 0, x < 0], 1), F.pad(x > 0, (1, 1)), (x > 0).mT[:, 1:], (x > 0)[:, :2]),
        *((x > 0).expand(2, 4, 8, 6), torch.stack([x > 0, x < 1], 1), (x > 0).roll(1, 1)),
    ),
    "counts": lambda m, x: ((x > 0).sum(3), (x > 0).sum((1, 2)), (x > 0).float().mean(1), x.count_nonzero(3)),
}
CHOICES: Functions = {
    "two": lambda m, x: torch.where(x > 0, x, 0.1 * x),
    "numbers": lambda m, x: (torch.where(x > 0, 1.0, 0.0), torch.where(x > 0, x, -1.0), torch.where(x > 0, 2.0, x)),
    "channels": lambda m, x: (torch.where(x > 0, m.channel, x), torch.where(m.channel > 0, x, x[:, :1])),
    "a mask": lambda m, x: torch.where(m.mask[:1], x, -x),
    "integers": lambda m, x: (torch.where(x > 0, 3, -1), torch.where(x > 0, x.argmax(1, keepdim=True), 7)),
    "booleans": lambda m, x: torch.where(x > 0, x > 1, x < -1),
    "masked fill": lambda m, x: (
        x.masked_fill(x > 0, 0),
        x[..., :6, :].masked_fill(~m.mask, -1e9),
        x.masked_fill(x < 0, math.inf),
    ),
    "masked softmax": lambda m, x: x[..., :6, :].masked_fill(~m.mask, -math.inf).softmax(3),
    "triangles": lambda m, x: (x.tril(), x.triu(1)),
    "thresholds": lambda m, x: (
        F.threshold(x, 0.1, 3),
        F.hardshrink(x),
        F.softshrink(x),
        torch.lerp(x, x.flip(3), 0.3),
    ),
    "replaced": lambda m, x: (torch.nan_to_num(x), torch.nan_to_num(x, 1, 2, 3)),
    "clamped": lambda m, x: (x.clamp(m.channel, m.channel + 1), x.clamp(max=m.channel), x.clamp(min=m.channel)),
    "written": lambda m, x: (y := x.clone(), y.masked_fill_(y < 0, 0.5))[0],
}
ROUNDING: Functions = {
    "rounded": lambda m, x: (x.floor(), x.ceil(), x.round(), x.trunc(), x.sign(), x.frac(), (4 * x).round() / 4),
    "halves": lambda m, x: ((2 * x).round() / 2).round() + torch.round(m.channel.round() + 0.5),
    "zeros keep their sign": lambda m, x: (1 / x.floor(), 1 / x.ceil(), 1 / x.round(), 1 / x.trunc()),
    "quotients": lambda m, x: (
        x // 0.5,
        x // -0.3,
        x % 0.5,
        x % -0.3,
        torch.fmod(x, 0.3),
        torch.div(x, 0.3, rounding_mode="trunc"),
    ),
    "quotients of two": lambda m, x: (
        x // m.channel,
        x % m.channel,
        2 // x,
        2 % x,
        torch.fmod(x, m.channel),
        x // x.flip(3),
    ),
    "to integers": lambda m, x: (x.nan_to_num().clamp(-1e6, 1e6).long(), (x > 0).int(), x.bool(), x.bool().float()),
}
MATH: Functions = {
    "exponents": lambda m, x: (x.exp2(), x.expm1(), x.abs().log1p(), x.abs().log2(), x.abs().log10(), x.erfc()),
    "angles": lambda m, x: (x.tan(), x.atan(), x.clamp(-1, 1).asin(), x.clamp(-1, 1).acos(), torch.atan2(x, x.flip(3))),
    "hyperbolic": lambda m, x: (x.sinh(), x.cosh(), x.asinh(), (1 + x.abs()).acosh(), (x / 100).atanh()),
    "powers": lambda m, x: (2**x, x.abs() ** x.flip(3), x**3, x**-2),
    "of two": lambda m, x: (torch.hypot(x, x.flip(3)), torch.fmax(x, x.flip(3)), torch.fmin(x, m.channel)),
    "logarithms": lambda m, x: (torch.logaddexp(x, -x), torch.xlogy(x, x.abs()), torch.sinc(x)),
}
STATISTICS: Functions = {
    "variance": lambda m, x: (
        x.var(3),
        x.var((1, 3), keepdim=True),
        x.var(),
        x.var(2, correction=0),
        x.var(3, correction=5),
    ),
    "deviation": lambda m, x: (
        x.std(1),
        x.std((2, 3)),
        torch.var_mean(x, 1)[0],
        torch.std_mean(x, (1, 2), correction=2)[0],
    ),
    # Beside infinity PyTorch's mean is not that of torch.mean, and depends on the order of the elements.
    "with the mean": lambda m, x: (*torch.var_mean(y := x.clamp(-9, 9), 1), *torch.std_mean(y, (1, 2), correction=2)),
    "of one": lambda m, x: (x[:, :1].var(1, correction=0), x[:, :1].std(1, correction=0)),
    "log-sum-exp": lambda m, x: (x.logsumexp(3), (50 * x).logsumexp((1, 2)), x.logsumexp((1, 3), keepdim=True)),
    "running": lambda m, x: (x.cumsum(3), x.cumsum(1), x.cumprod(2)),
    "norms": lambda m, x: (
        x.norm(),
        x.norm(dim=1),
        x.norm(3, 1),
        x.norm(math.inf, 2),
        x.norm(-math.inf, 2),
        x.norm(0, 3),
    ),
    "matrix norm": lambda m, x: torch.linalg.matrix_norm(x),
}
INTEGERS: Functions = {
    "arithmetic": lambda m, x: (
        (i := x.argmax(1)) * 2 + 1,
        3 - i,
        i - i.flip(2),
        i * i.flip(2),
        -i,
        i + i[:, :1],
        i**2,
    ),
    "quotients": lambda m, x: (
        *(
            (i := 7 * x.argmax(3) - 11) // 2,
            i // -3,
            i % 4,
            i % -4,
            torch.div(i, 3, rounding_mode="trunc"),
            5 // (i.abs() + 1),
        ),
        *(i // (i.flip(2) + 100), i % (i.flip(2) + 100), i / 4, torch.div(i, i.flip(2) + 100, rounding_mode="trunc")),
    ),
    "comparisons": lambda m, x: (
        *((i := x.argmax(1)) > 2, i >= 2, i < 1, i <= 1, i == 3, i != 3, i > 1.5, i == i.flip(2), i != i.flip(2)),
        *(i < i.flip(2), i <= i.flip(2), i > i.flip(2), i >= i.flip(2), i < i[:, :1], i == i[:, :1]),
    ),
    "bits": lambda m, x: ((i := 5 * x.argmax(1) - 3) & 3, i | 8, i ^ i.flip(2), ~i, i.bool(), i & i[:, :1]),
    "extrema": lambda m, x: (
        (i := x.argmax(1)).clamp(1, 2),
        i.clamp(min=1),
        i.abs(),
        i.sign(),
        torch.maximum(i, i.flip(2)),
        torch.minimum(i, i[:, :1]),
    ),
    "reductions": lambda m, x: (
        (i := x.argmax(1)).sum(2),
        i.amax(1),
        i.amin(1),
        i.prod(1),
        i.argmax(2),
        i.argmin(1),
        i.max(),
        i.sum(),
    ),
    "running": lambda m, x: (x.argmax(1).cumsum(1), (x > 0).cumsum(3), (1 + x.argmax(1)[..., :3]).cumprod(2)),
    "with floats": lambda m, x: (
        (i := x.argmax(1)) * 0.5,
        i * x,
        i.float() + 1,
        i / 2,
        i.float().mean(1),
        x.nan_to_num(0, 9, -9).long(),
        (x > 0) + 2,
    ),
    "with stored": lambda m, x: (x.argmax(1) + torch.arange(6), x.argmax(1) * torch.tensor([[2], [3]]).repeat(4, 1)),
    "moves": lambda m, x: (
        *(
            (i := x.argmax(1)).flip(1),
            torch.cat([i, i + 1], 1),
            F.pad(i, (1, 1)),
            F.pad(i, (1, 1), value=-1),
            i.mT[:, 1:],
        ),
        *(i.expand(2, 8, 6), torch.stack([i, i]), i.roll(1, 1), i[:, 1:3], F.pad(i, (1, 1), mode="reflect")),
    ),
    "one-hot": lambda m, x: (x.argmax(1)[..., None] == torch.arange(4)).float(),
}
INDICES: Functions = {
    "stored": lambda m, x: (
        x[:, [0, 2, 1]],
        x[:, [0, 2]],
        x[..., [1, 1, 5]],
        x[:, :, [-1, 0, 3]],
        x[:, m.bytes.long() - 252],
    ),
    "index_select": lambda m, x: (x.index_select(1, torch.tensor([2, 0, 0])), x.index_select(3, torch.tensor([1, 5]))),
    "several": lambda m, x: (
        x[:, [0, 2, 1], [3, 4, 5]],
        x[:, [[0], [2]], [3, 7]],
        x[:, [0, 1], :, [2, 3]],
        x[[0, 0], :, [1, 2]],
    ),
    "gather": lambda m, x: (
        x.gather(1, torch.tensor([0, 3, 1])[None, :, None, None].expand(1, 3, 8, 6)),
        x.gather(3, torch.zeros(1, 4, 8, 2, dtype=torch.long)),
    ),
    "computed gather": lambda m, x: (
        x.gather(1, (i := x.argmax(1, keepdim=True))),
        x.gather(2, i[:, :, :1].expand(1, 4, 1, 6)[:, :3, :, 1:]),
        torch.take_along_dim(x, i, 1),
    ),
    "computed": lambda m, x: (
        *(x[0, 0][x[0, 0].argmax(0)], x.index_select(2, x[0, 0].argmax(0)), x[:, :, x[0, 0].argmax(0)]),
        *(
            x[0][torch.arange(4), x[0, :, :, 0].argmax(1)],
            x[0][x[0, :, 0].argmax(1) % 4 - 4, x[0, :, :, 0].argmax(1) - 8],
        ),
    ),
    "of integers": lambda m, x: (
        (i := x.argmax(1))[:, [2, 0]],
        i.gather(2, i[..., :2]),
        (x > 0)[:, [1, 3]],
        (x > 0).gather(1, i[:, None]),
    ),
    "windows": lambda m, x: (
        x.unfold(2, 3, 2),
        x.unfold(3, 2, 1).unfold(2, 2, 3),
        F.unfold(x, (2, 3), padding=1),
        F.unfold(x, 2, stride=2),
    ),
    "diagonals": lambda m, x: (
        x.diagonal(0, 2, 3),
        x.diagonal(1, 3, 2),
        x.diagonal(-2, 1, 2),
        torch.diag_embed(x[0, 0]),
    ),
    "rolled": lambda m, x: (x.roll((1, 2), (2, 3)), x.roll(3), x.roll((1, -1), (1, 1)), x.roll(0, 1)),
    "written": lambda m, x: (
        *((y := x.clone(), y.__setitem__((slice(None), 0), 0.0))[0], torch.select_scatter(x, x[:, 0], 1, 2)),
        *(
            (y := x.clone(), y.__setitem__(y < 0, 0.5))[0],
            (y := x.clone(), y.__setitem__((slice(None), slice(1, 3)), x[:, :2]))[0],
        ),
        (y := x[0, 0].clone(), y.__setitem__(y[:, 0] > 0, 9.0))[0],
    ),
    "one-hot": lambda m, x: F.one_hot(x.argmax(1), 4),
    "scattered": lambda m, x: (
        torch.zeros_like(x).scatter(1, (i := x.argmax(1, keepdim=True)), 1.0),
        x.scatter(1, i, x[:, 1:3]),
        torch.zeros_like(x).scatter_add(2, x.argmax(2, keepdim=True), x[:, :, :2] + 1),
        x.argmax(1).scatter(2, x.argmax(1)[..., :1], 7),
        torch.zeros(1, 4, 8, 6, dtype=torch.bool).scatter(1, i, value=True) | (x > 2),
    ),
    "top two": lambda m, x: torch.zeros_like(x).scatter(1, x.topk(2, 1).indices, x.softmax(1)),
}
ORDERS: Functions = {
    "sorted": lambda m, x: (x.sort(3).values, x.sort(1, descending=True).values, x.sort(dim=2, stable=True).indices),
    "both": lambda m, x: (
        *x.sort(dim=1, stable=True),
        *x.sort(dim=2, stable=True, descending=True),
        x.argsort(dim=3, stable=True),
    ),
    "largest": lambda m, x: (x.topk(2, 3).values, x.topk(3, 1, largest=False).values, x.topk(8, 2).values),
}
RESIZED: Functions = {
    "linear": lambda m, x: (
        *(
            F.interpolate(x, size, mode="bilinear", align_corners=corners)
            for size in ((16, 12), (5, 9), (1, 1), (8, 5))
            for corners in (False, True)
        ),
        *(F.interpolate(x, scale_factor=s, mode="bilinear") for s in (1.7, 0.4, (2.0, 0.5))),
        F.interpolate(x, scale_factor=1.7, mode="bilinear", recompute_scale_factor=True),
        F.interpolate(x, (8, 6), mode="bilinear"),
        *(F.interpolate(x[0], 11, mode="linear", align_corners=corners) for corners in (False, True)),
    ),
    "nearest": lambda m, x: (
        *(F.interpolate(x, scale_factor=s) for s in (1.7, 0.4, (2.0, 0.7))),
        *(F.interpolate(x, size, mode="nearest-exact") for size in ((16, 12), (5, 9), (3, 2))),
        *(
            F.interpolate(x[0], 11),
            F.interpolate(x[0], 11, mode="nearest-exact"),
            F.interpolate(x[0], scale_factor=1.3),
        ),
    ),
    "volumes": lambda m, x: (
        F.interpolate(x[:, None], (4, 5, 9)),
        F.interpolate(x[:, None], (3, 5, 9), mode="trilinear"),
    ),
    "cubic": lambda m, x: F.interpolate(x, (5, 9), mode="bicubic"),
}
