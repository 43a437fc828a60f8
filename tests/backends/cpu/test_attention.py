"""Attention by the native kernel: its results, and which calls it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import bound, library
from tbn_compiler.graph.records import graph_parts
from tests import oracle

pytestmark = [
    pytest.mark.skipif(bound.unavailable() is not None, reason=str(bound.unavailable())),
    pytest.mark.skipif(not library.has_attention(library.level()), reason="no level here computes attention"),
]

CONFIG = tbn.TilingConfig(p=4, min_size=0)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    options = (1.0, True) if scale is None else (scale, False)
    result: Tensor = torch.ops.tbn_cpu.attention(query, key, value, *options, causal)
    return result


def expected(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    """The definition in float64."""
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return scores.softmax(-1) @ value


def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    options = (1.0, True) if scale is None else (scale, False)
    result: Tensor = torch.ops.tbn_cpu.masked_attention(query, key, value, mask, *options)
    return result


def heads(samples: int, count: int, length: int, width: int, seed: int) -> Tensor:
    """As layers have them: those of a token side by side."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, length, count, width, generator=generator).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "width", "value_width"),
    [
        (1, 1, 1, 1),
        (7, 5, 20, 17),
        (6, 16, 16, 64),
        (13, 65, 64, 64),
        (30, 17, 33, 130),
        (65, 65, 64, 48),
        (2, 200, 8, 8),
    ],
)
def test_results(queries: int, keys: int, width: int, value_width: int, causal: bool) -> None:
    query, key = heads(2, 3, queries, width, 0), heads(2, 3, keys, width, 1)
    value = heads(2, 3, keys, value_width, 2)
    for scale, rtol in ((None, 2e-6), (0.7, 2e-5), (-1.5, 2e-5), (0.0, 2e-6)):  # large scores are rounded more
        found = attention(query, key, value, scale, causal)
        oracle.assert_close(found, expected(query, key, value, scale, causal).float(), rtol)
    with torch.no_grad():
        theirs = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    oracle.assert_close(attention(query, key, value, causal=causal), theirs, rtol=2e-6)


def forms(x: Tensor) -> list[Tensor]:
    """The same values, in memory in other ways."""
    spread = torch.stack([x, x], -1)[..., 0]  # neighbours are two floats apart
    return [x, x.contiguous(), x.transpose(-1, -2).contiguous().transpose(-1, -2), spread, F.pad(x, (3, 2))[..., 3:-2]]


def strides(x: Tensor) -> list[int]:
    """Of the axes that have more than one element: those that views of a tensor depend on."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def test_results_lie_as_those_of_pytorch() -> None:
    """A view that works on the one works on the other."""
    beside, apart = heads(2, 3, 9, 16, 0), heads(2, 3, 9, 16, 0).contiguous()
    narrow, mask = heads(2, 3, 9, 8, 1), torch.zeros(9, 9)
    for query, value in (
        *((query, value) for query in (beside, apart) for value in (beside, apart, narrow, beside[:, :1], beside[:1])),
        *((query[0], query[0]) for query in (beside, apart)),
        *((query[..., 1:], query[..., 1:]) for query in (beside, apart)),
        (beside[:, :1], beside[:, :1]),
        (beside[:, :, :1], beside),
    ):
        key = value if value.shape[-1] == query.shape[-1] else query
        theirs = F.scaled_dot_product_attention(query, key, value)
        meta = attention(query.to("meta"), key.to("meta"), value.to("meta"))
        for found in (attention(query, key, value), masked(query, key, value, mask[: query.shape[-2]])):
            assert strides(found) == strides(theirs) == strides(meta), (query.shape, query.stride(), value.shape)
            oracle.assert_close(found, theirs, rtol=2e-6)


def test_strides() -> None:
    query, key, value = (heads(2, 3, 9, 16, seed) for seed in range(3))
    right = attention(query, key, value)
    for one in forms(query):
        for other in forms(key):
            assert torch.equal(attention(one, other, value), right)
    for one in forms(value):
        assert torch.equal(attention(query, key, one), right)
    for one in forms(query):
        meta = attention(one.to("meta"), key.to("meta"), value.to("meta"))
        assert attention(one, key, value).stride() == meta.stride()
    last = torch.randn(2, 16, 9, 3).permute(0, 3, 2, 1)  # heads are the neighbours in memory
    meta = attention(last.to("meta"), key.to("meta"), value.to("meta"))
    assert attention(last, key, value).stride() == meta.stride()
    for place in range(3):  # one float stands for all of a vector
        operands = [query, key, value]
        operands[place] = operands[place][..., :1].expand(2, 3, 9, 16)
        oracle.assert_close(attention(*operands), expected(*operands).float(), rtol=2e-6)


def test_one_stands_for_all() -> None:
    query, key, value = heads(2, 3, 9, 16, 0), heads(1, 3, 9, 16, 1), heads(2, 1, 9, 16, 2)
    wide = [key.expand(2, 3, 9, 16), value.expand(2, 3, 9, 16)]
    assert torch.equal(attention(query, key, value), attention(query, *wide))
    assert torch.equal(attention(query[0], key[0], value[0]), attention(query, *wide)[0])  # without samples


@pytest.mark.parametrize(
    "shape", [(2, 3, 9, 20), (1, 3, 9, 20), (2, 1, 1, 20), (3, 9, 20), (9, 20), (9, 1), (1, 1, 1, 1)]
)
def test_masks(shape: tuple[int, ...]) -> None:
    query, key, value = heads(2, 3, 9, 16, 0), heads(2, 3, 20, 16, 1), heads(2, 3, 20, 24, 2)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    left_out = mask.clone()
    left_out[..., 1::3] = -math.inf
    for added in (
        mask,
        left_out,
        mask.mT.contiguous().mT,
        torch.stack([mask] * 2, -1)[..., 0],
    ):
        for scale in (None, 0.7):
            theirs = F.scaled_dot_product_attention(query, key, value, added, scale=scale)
            oracle.assert_close(masked(query, key, value, added, scale), theirs, rtol=5e-6)
    one = masked(query[:1], key[:1], value[:1], mask[:1] if mask.dim() > 3 else mask)
    assert torch.equal(masked(query[0], key[0], value[0], mask[0] if mask.dim() > 3 else mask), one[0])


def test_queries_that_meet_nothing() -> None:
    """They give zeros where a mask says so, as in PyTorch, and NaN where a NaN is among their scores."""
    query, key, value = (heads(1, 2, 20, 16, seed) for seed in range(3))
    mask = torch.zeros(20, 20)
    mask[3] = -math.inf
    mask[7:9, 5:] = -math.inf
    found = masked(query, key, value, mask)
    assert torch.equal(found[:, :, 3], torch.zeros(1, 2, 16))
    oracle.assert_close(found, F.scaled_dot_product_attention(query, key, value, mask), rtol=5e-6)
    mask[3, 4] = math.nan
    assert masked(query, key, value, mask)[:, :, 3].isnan().all()


@pytest.mark.parametrize("shape", [(9, 19), (8, 20), (2, 9, 20), (3, 1, 9, 20), (1, 1, 3, 9, 20)])
def test_masks_that_do_not_fit(shape: tuple[int, ...]) -> None:
    query, key = heads(2, 3, 9, 16, 0), heads(2, 3, 20, 16, 1)
    with pytest.raises(RuntimeError, match="the mask does not fit"):
        masked(query, key, key, torch.zeros(shape))
    with pytest.raises(RuntimeError, match="must be float32"):
        masked(query, key, key, torch.zeros(9, 20, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)])
def test_nothing_to_compute(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    assert attention(x, x, x).shape == shape


def test_no_keys_and_no_width() -> None:
    query = torch.randn(2, 2, 5, 4)
    none = torch.zeros(2, 2, 0, 4)
    assert torch.equal(attention(query, none, none), torch.zeros(2, 2, 5, 4))
    value = torch.randn(2, 2, 3, 4)
    flat = attention(query[..., :0], value[..., :0], value, scale=1.0)
    oracle.assert_close(flat, value.mean(2, keepdim=True).expand(2, 2, 5, 4), rtol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_not_finite(where: str, bad: float) -> None:
    operands = {name: heads(1, 2, 20, 16, seed).contiguous() for seed, name in enumerate(("query", "key", "value"))}
    operands[where][0, 1, 7, 3] = bad
    found, right = attention(**operands), expected(**operands)
    assert torch.equal(found.isnan(), right.isnan())
    assert torch.equal(found.isinf(), right.isinf())
    oracle.assert_close(found.nan_to_num(0, 0, 0), right.nan_to_num(0, 0, 0).float(), rtol=2e-6)


def test_large_scores() -> None:
    """Weights that are nearly 0 vanish, and nothing overflows."""
    query, key, value = (heads(1, 1, 24, 16, seed) * 1e3 for seed in range(3))
    oracle.assert_close(attention(query, key, value), expected(query, key, value).float(), rtol=2e-6)
    far = torch.tensor([0.0, -80.0, -103.0, -104.5, -200.0, -3e38]).reshape(1, 6, 1)
    found = attention(torch.ones(1, 1, 1), far, torch.eye(6)[None], scale=1.0)
    right = far.flatten().double().softmax(0).float()
    assert torch.equal(found[0, 0, 4:], torch.zeros(2))
    assert (found[0, 0, :2] - right[:2]).abs().max() < 1e-7
    assert (found[0, 0] - right).abs().max() <= 2e-7


def test_threads() -> None:
    """Threads share heads, or where there are few of them their queries; the results are the same."""
    before = torch.get_num_threads()
    for count, length in ((5, 33), (1, 200), (1, 25), (2, 5)):
        query, key, value = (heads(1, count, length, 24, seed) for seed in range(3))
        for causal in (False, True):
            found = []
            try:
                for threads in (1, 2, 3, 8):
                    torch.set_num_threads(threads)
                    found.append(attention(query, key, value, causal=causal))
            finally:
                torch.set_num_threads(before)
            assert all(torch.equal(result, found[0]) for result in found)
            oracle.assert_close(found[0], expected(query, key, value, causal=causal).float(), rtol=2e-6)


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (((2, 3, 4), (2, 3, 5), (2, 3, 4)), "shapes of the inputs do not fit"),
        (((2, 3, 4), (2, 3, 4), (2, 2, 4)), "shapes of the inputs do not fit"),
        (((2, 3, 4), (1, 2, 3, 4), (2, 3, 4)), "shapes of the inputs do not fit"),
        (((3, 4), (3, 4), (3, 4)), "shapes of the inputs do not fit"),
        (((2, 3, 4), (3, 3, 4), (2, 3, 4)), "samples or heads differ"),
    ],
)
def test_what_does_not_fit(shapes: tuple[tuple[int, ...], ...], told: str) -> None:
    with pytest.raises(RuntimeError, match=told):
        attention(*map(torch.zeros, shapes))
    with pytest.raises(RuntimeError, match="must be float32"):
        attention(*(torch.zeros(1, 3, 4, dtype=torch.float64) for _ in shapes))


def test_shapes_are_known_beforehand() -> None:
    query, key, value = heads(2, 3, 9, 16, 0), heads(2, 3, 7, 16, 1), heads(2, 1, 7, 5, 2)
    real = attention(query, key, value)
    meta = attention(query.to("meta"), key.to("meta"), value.to("meta"))
    assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)


class Attention(nn.Module):
    """A layer with options of the call."""

    def __init__(self, call: Callable[..., Tensor] = F.scaled_dot_product_attention, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.call, self.options = call, options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(-2, -3) for part in self.project(x).chunk(3, -1))
        result: Tensor = self.out(self.call(q, k, v, **self.options).transpose(-2, -3).flatten(-2))
        return result


def kernels(module: nn.Module) -> int:
    """Calls of the kernel."""
    nodes = [node for _, part in graph_parts(module) for node in part.graph.nodes]
    kernels = (torch.ops.tbn_cpu.attention.default, torch.ops.tbn_cpu.masked_attention.default)
    return sum(node.target in kernels for node in nodes)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(10, 10).tril().bool(), torch.ones(10, 10).tril(1).log(), torch.rand(2, 1, 1, 10) > 0.3],
)
def test_masks_in_a_module(mask: Tensor) -> None:
    packed = tbn.lower(tbn.transform(Attention(attn_mask=mask, scale=0.4).eval(), CONFIG))
    x = torch.randn(2, 10, 32)
    fast = cpu.bind(tbn.optimize(packed, x))
    assert kernels(fast) == 1
    with torch.no_grad():
        oracle.assert_close(fast(x), packed(x), rtol=1e-5)
        with torch.autocast("cpu"):
            assert fast(x).dtype == torch.float32  # as everything that is bound
    program = torch.export.export(cpu.bind(tbn.optimize(packed, x), stored=True), (x,))
    with torch.no_grad():
        oracle.assert_close(program.module()(x), packed(x), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.5}, {"dropout_p": 0.0}], ids=str)
@pytest.mark.parametrize("shape", [(2, 10, 32), (10, 32)])
def test_in_a_module(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    packed = tbn.lower(tbn.transform(Attention(**options).eval(), CONFIG))
    x = torch.randn(shape)
    fast = cpu.bind(tbn.optimize(packed, x))
    assert kernels(fast) == 1
    with torch.no_grad():
        oracle.assert_close(fast(x), packed(x), rtol=1e-5)
        more = torch.randn(*shape[:-2], 23, 32)  # another length
        oracle.assert_close(fast(more), packed(more), rtol=1e-5)


@pytest.mark.parametrize("options", [{"dropout_p": 0.5}, {"enable_gqa": True}], ids=str)
def test_what_stays_with_pytorch(options: dict[str, Any]) -> None:
    packed = tbn.lower(tbn.transform(Attention(**options).eval(), CONFIG))
    assert kernels(cpu.bind(tbn.optimize(packed, torch.randn(2, 10, 32)))) == 0


def test_other_dtypes_stay_with_pytorch() -> None:
    def in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.double(), k.double(), v.double()).float()

    packed = tbn.lower(tbn.transform(Attention(in_float64).eval(), CONFIG))
    assert kernels(cpu.bind(tbn.optimize(packed, torch.randn(2, 10, 32)))) == 0


def test_a_level_without_it() -> None:
    packed = tbn.lower(tbn.transform(Attention().eval(), CONFIG))
    with library.use_level("portable"):
        assert kernels(cpu.bind(tbn.optimize(packed, torch.randn(2, 10, 32)))) == 0


def test_biases_that_are_parts_of_one_are_bound() -> None:
    """Those of ``nn.MultiheadAttention``: the layers behind them stayed with Python."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    packed = tbn.lower(tbn.transform(layer, CONFIG))
    nn.init.normal_(packed.self_attn.in_proj_bias)
    x = torch.randn(2, 10, 32)
    fast = cpu.bind(tbn.optimize(packed, x))
    nodes = [node for _, part in graph_parts(fast) for node in part.graph.nodes]
    assert not [node for node in nodes if node.target is torch.ops.tbn.linear.default]
    assert sum(node.target is torch.ops.tbn_cpu.linear.default for node in nodes) == 6
    assert kernels(fast) == 1
    with torch.no_grad():
        oracle.assert_close(fast(x), packed(x), rtol=1e-5)
