"""What is kept of a tile is right after any change, is made once, and goes with the tile."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import tbn_compiler
from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import library, prepare
from tbn_compiler.ops import reference

tbn = torch.ops.tbn
M, N, P = 64, 96, 4

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason="no library; test_library checks that")


def random_tile() -> Tensor:
    return torch.randint(0, 256, (M * N // P // 8,), dtype=torch.uint8)


def check(tile: Tensor, tokens: int = 2, **kw: str) -> None:
    """The kernels use the tile as it is now."""
    x, alpha = torch.randint(-8, 9, (tokens, N)) / 8, torch.ones(1)
    got = tbn.linear(x, tile, alpha, None, N, M, P, **kw)
    assert torch.equal(got, reference.linear(x, tile, alpha, None, N, M, P, **kw))


def test_in_place_change() -> None:
    tile = random_tile()
    check(tile)
    tile.copy_(random_tile())
    check(tile)
    tile[3:9].bitwise_not_()
    check(tile)
    with torch.no_grad():
        tile.fill_(255)
    check(tile)


def test_in_place_change_of_an_inference_tensor() -> None:
    with torch.inference_mode():
        tile = random_tile()
        check(tile)
        tile.copy_(random_tile())
        check(tile)
        tile[0] ^= 1
        check(tile)
    assert tile.is_inference()


def test_new_memory_behind_the_same_tensor() -> None:
    tile = random_tile()
    for _ in range(8):
        check(tile)
        tile.data = random_tile()
    check(tile)


def test_views_and_tensors_at_one_address() -> None:
    tile = random_tile()
    check(tile)
    view = tile.view(-1)
    check(view)
    tile.copy_(random_tile())
    check(view)
    check(tile)


def test_load_state_dict_and_moves() -> None:
    config = tbn_compiler.TilingConfig(p=P, min_size=1)
    first, second = (
        tbn_compiler.lower(tbn_compiler.transform(nn.Sequential(nn.Linear(N, M)), config)) for _ in range(2)
    )
    x = torch.randn(2, N)

    def expected() -> Tensor:
        with cpu.use_level("none"):
            return first(x)

    torch.testing.assert_close(first(x), expected())
    first.load_state_dict(second.state_dict())
    torch.testing.assert_close(first(x), expected())
    torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)
    first.load_state_dict({key: value.clone() for key, value in second.state_dict().items()}, assign=True)
    torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)
    assert torch.equal(first.to(torch.bfloat16)(x.bfloat16()), second.bfloat16()(x.bfloat16()))


def test_every_use_of_one_tile() -> None:
    """The same bits in two layers of different shapes, formats and levels."""
    tile, alpha = random_tile(), torch.ones(1)
    for level in cpu.info().available:
        with cpu.use_level(level):
            for tokens in (1, 16):
                check(tile, tokens)
                check(tile, tokens, activation="int8")
            x = torch.randint(-8, 9, (3, 48)) / 8
            got = tbn.linear(x, tile, alpha, None, 48, 128, P)
            assert torch.equal(got, reference.linear(x, tile, alpha, None, 48, 128, P))


def test_memory_goes_with_the_tile() -> None:
    gc.collect()
    before = prepare.memory()
    tile = random_tile()
    check(tile)
    check(tile, 16)
    tiles, nbytes = prepare.memory()
    assert tiles == before[0] + 1
    assert nbytes > before[1]
    del tile
    gc.collect()
    assert prepare.memory() == before


def test_prepared_once_by_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    pack = prepare.pack

    def counting(signs: Tensor, *, integer: bool) -> object:
        made.append(threading.get_ident())
        return pack(signs, integer=integer)

    monkeypatch.setattr(prepare, "pack", counting)
    tile, barrier = random_tile(), threading.Barrier(8)

    def call() -> None:
        barrier.wait()
        for _ in range(20):
            check(tile)

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(call) for _ in range(8)]:
            future.result()
    assert len(made) == 1


def test_many_threads_in_one_module_while_its_tile_changes() -> None:
    """Each call sees the old tile or the new one, whole."""
    tiles = [random_tile(), random_tile()]
    x, alpha = torch.randint(-8, 9, (20, N)) / 8, torch.ones(1)
    results = [reference.linear(x, tile, alpha, None, N, M, P) for tile in tiles]
    holder = {"tile": tiles[0].clone()}
    stop = threading.Event()

    def call() -> int:
        calls = 0
        while not stop.is_set():
            got = tbn.linear(x, holder["tile"], alpha, None, N, M, P)
            assert any(torch.equal(got, result) for result in results)
            calls += 1
        return calls

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(call) for _ in range(6)]
        for i in range(100):
            holder["tile"] = tiles[i % 2].clone()
        stop.set()
        assert all(future.result() > 0 for future in futures)


@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_of_one_call_share_its_work(threads: int, tokens: int) -> None:
    tile = random_tile()
    torch.set_num_threads(threads)
    try:
        for _ in range(5):
            check(tile, tokens)
            check(tile, tokens, activation="int8")
    finally:
        torch.set_num_threads(1)
    assert library.load()[0].tbn_pool_threads() >= threads - 1


def test_calls_at_once_with_several_threads_each() -> None:
    """One call has the pool; the others compute on their own thread."""
    tile = random_tile()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(5) as pool:
            for future in [pool.submit(check, tile, 1 + i % 20) for i in range(100)]:
                future.result()
    finally:
        torch.set_num_threads(1)


FORK = """
import os, torch, tbn_compiler
from tbn_compiler.backends.cpu import library
torch.set_num_threads(2)
tile = torch.randint(0, 256, (192,), dtype=torch.uint8)
x, alpha = torch.ones(20, 96), torch.ones(1)
call = lambda: torch.ops.tbn.linear(x, tile, alpha, None, 96, 64, 4)
before = call()
threads = library.load()[0].tbn_pool_threads
assert threads() == 1
child = os.fork()
if child == 0:
    ok = threads() == 0 and torch.equal(call(), before) and threads() == 1
    os._exit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(call(), before)
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_its_own_threads() -> None:
    result = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "done", result.stderr
