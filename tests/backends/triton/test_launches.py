"""What is kept between the calls of a layer: plans, choices, compiled kernels, counts of programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from tbn_compiler.backends.triton import conv, hadamard, linear, prepared, replay, tuning
from tbn_compiler.backends.triton.search import Config
from tbn_compiler.packing import pack_bits


class Compiled:
    """A compiled kernel, which notes its launches."""

    launch_metadata = None

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[Any, ...]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args: self.launches.append((grid, args))


class Kernel:
    """A kernel that compiles to one."""

    arg_names = ("x", "size", "BIAS", "BLOCK")

    def __init__(self) -> None:
        self.compiled = Compiled()
        self.calls: list[dict[str, Any]] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **constants: Any) -> Compiled:
            self.calls.append(constants)
            return self.compiled

        return launch


def test_a_kept_kernel_is_launched_with_the_constants_behind_its_arguments() -> None:
    kernel, kept = Kernel(), replay.Kept({})
    for size in (3, 4):
        replay.start(kept, kernel, (size, 1, 1), "x", size, BLOCK=8, BIAS=True, num_warps=4)
    assert kernel.calls == [{"BLOCK": 8, "BIAS": True, "num_warps": 4}]
    assert kernel.compiled.launches == [((4, 1, 1), ("x", 4, True, 8))]
    replay.start(None, kernel, (5, 1, 1), "x", 5, BLOCK=8, BIAS=True)
    assert len(kernel.calls) == 2


def test_the_arguments_stand_in_the_order_of_the_kernels() -> None:
    """A kept kernel gets its arguments by place: those of every launch are all that come before the first constant."""
    from tbn_compiler.backends.triton.kernels import convert, few_tokens, hadamard_few, unpacked
    from tbn_compiler.backends.triton.kernels import hadamard as signed
    from tbn_compiler.backends.triton.kernels import linear as kernels

    for kernel in (
        *(kernels.linear_dot, kernels.linear_words, few_tokens.linear_limbs, few_tokens.linear_sum),
        *(few_tokens.linear_popcount, unpacked.linear_gemm, unpacked.copy_rows, convert.unpack_rows),
        *(signed.unpack_groups, signed.linear_groups, signed.mix_channels),
        *(hadamard_few.hadamard_limbs, hadamard_few.hadamard_sum),
    ):
        constant = [parameter.is_constexpr for parameter in kernel.params]
        assert constant == sorted(constant), kernel


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Config]]:
    """The configurations of all launches, which compute nothing; choices are final."""
    configs: list[Config] = []
    monkeypatch.setattr(linear, "launch", lambda config, plan, operands: configs.append(config))
    monkeypatch.setattr(tuning, "settled", lambda device, key, candidates: True)
    prepared.forget()
    yield configs
    prepared.forget()


def test_equal_calls_are_prepared_once(launched: list[Config]) -> None:
    tile, x = pack_bits(torch.randn(16 * 64)), torch.randn(3, 64)
    args = (torch.ones(1), None, 64, 64, 4)
    with (
        mock.patch.object(linear, "plan_weight", wraps=linear.plan_weight) as plan,
        mock.patch.object(tuning, "choose", wraps=tuning.choose) as choose,
    ):
        for _ in range(3):
            linear.linear(x, tile, *args)
        assert (plan.call_count, choose.call_count) == (1, 1)
        linear.linear(torch.randn(3, 64), pack_bits(torch.randn(16 * 64)), *args)  # other tensors of the same form
        assert (plan.call_count, choose.call_count) == (1, 1)
        for count, other in enumerate(
            [
                (torch.randn(4, 64), {}),
                (torch.randn(3, 128)[:, :64], {}),
                (torch.randn(3, 65)[:, 1:], {}),
                (x.bfloat16(), {}),
                (x, {"epilogue": "relu"}),
            ]
        ):
            linear.linear(other[0], tile, *args, **other[1])
            assert plan.call_count == choose.call_count == count + 2
    assert len(launched) == 9


def test_equal_convolutions_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[Config] = []
    monkeypatch.setattr(conv, "run", lambda config, plan, geometry, operands: configs.append(config))
    monkeypatch.setattr(tuning, "settled", lambda device, key, candidates: True)
    prepared.forget()
    tile, args = pack_bits(torch.randn(16 * 8 * 9 // 4)), (torch.ones(1), None, 8, 16, (3, 3), 4)
    with (
        mock.patch.object(conv, "plan_call", wraps=conv.plan_call) as plan,
        mock.patch.object(tuning, "choose", wraps=tuning.choose) as choose,
    ):
        for _ in range(3):
            conv.conv2d(torch.randn(2, 8, 7, 6), tile, *args)
        assert (plan.call_count, choose.call_count) == (1, 1)
        last = torch.randn(2, 8, 7, 6).to(memory_format=torch.channels_last)
        for count, (x, options) in enumerate([(last, {}), (last, {"padding": (1, 1)}), (last[:1], {})]):
            conv.conv2d(x, tile, *args, **options)
            assert plan.call_count == choose.call_count == count + 2
    assert len(configs) == 6
    prepared.forget()


def test_copies_with_signs_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And never run as plain ones: a choice that is kept stays with its layout."""
    launched: list[int] = []
    monkeypatch.setattr(hadamard, "launch", lambda config, plan, operands: launched.append(plan.mixes))
    monkeypatch.setattr(conv, "_mixed", lambda config, plan, geometry, operands: launched.append(plan.mixes))
    monkeypatch.setattr(linear, "launch", lambda config, plan, operands: launched.append(plan.mixes))
    monkeypatch.setattr(tuning, "settled", lambda device, key, candidates: True)
    prepared.forget()
    tile, x, args = pack_bits(torch.randn(16 * 64)), torch.randn(3, 64), (torch.ones(4), None, 64, 64, 4)
    filters, image = pack_bits(torch.randn(16 * 8 * 9 // 4)), torch.randn(2, 8, 7, 6)
    with mock.patch.object(tuning, "choose", wraps=tuning.choose) as choose:
        for _ in range(3):
            linear.linear(x, tile, *args, hadamard=True)
        linear.linear(x, tile, *args)
        for _ in range(3):
            conv.conv2d(image, filters, torch.ones(1), None, 8, 16, (3, 3), 4, hadamard=True)
    keys = [call.args[1] for call in choose.call_args_list]
    assert [("signed=4" in key) for key in keys] == [True, False, True]
    assert launched == [4, 4, 4, 1, 4, 4, 4]
    prepared.forget()


def test_the_users_choice_of_tf32_is_seen(launched: list[Config]) -> None:
    tile, x = pack_bits(torch.randn(16 * 64)), torch.randn(3, 64)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with mock.patch.object(linear, "plan_weight", wraps=linear.plan_weight) as plan:
        try:
            for setting in ("ieee", "tf32", "ieee"):
                matmul.fp32_precision = setting
                linear.linear(x, tile, torch.ones(1), None, 64, 64, 4)
        finally:
            matmul.fp32_precision = before
    assert plan.call_count == 2


def test_bad_operands_are_refused_every_time(launched: list[Config]) -> None:
    tile = pack_bits(torch.randn(16 * 64))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="expected 64 input features"):
            linear.linear(torch.ones(3, 63), tile, torch.ones(1), None, 64, 64, 4)
    assert launched == []


def test_the_number_of_kept_layers_is_bounded(launched: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "KEPT_LAYERS", 2)
    tile = pack_bits(torch.randn(16 * 64))
    for tokens in range(1, 8):
        linear.linear(torch.randn(tokens, 64), tile, torch.ones(1), None, 64, 64, 4)
    assert max(len(known) for known in prepared._prepared) <= 2


def test_alignments_of_every_tensor_are_seen(launched: list[Config]) -> None:
    """A kernel is compiled for tensors at multiples of 16 bytes, or for any."""
    x, tile, alpha, bias = torch.randn(3, 64), pack_bits(torch.randn(16 * 64)), torch.ones(4), torch.randn(64)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    with mock.patch.object(linear, "plan_weight", wraps=linear.plan_weight) as plan:
        for count, operands in enumerate(
            [
                (x, tile, alpha, bias),
                (shifted(x), tile, alpha, bias),
                (x, shifted(tile), alpha, bias),
                (x, tile, shifted(alpha), bias),
                (x, tile, alpha, shifted(bias)),
                (x, tile, alpha, None),
            ]
        ):
            for _ in range(2):
                linear.linear(*operands, 64, 64, 4)
            assert plan.call_count == count + 1


def test_a_choice_that_is_no_candidate_any_more_settles_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = tuning.Tuner(tmp_path / "choices.json", measure=lambda run: 1.0)
    tuner.choose("key", [Config("dot")], lambda config: None, save=False)
    monkeypatch.setattr(tuning, "tuner_for", lambda index: tuner)
    device = torch.device("cuda", 0)
    assert tuning.settled(device, "key", [Config("dot"), Config("sum")])
    assert not tuning.settled(device, "key", [Config("sum")])
    monkeypatch.setenv("TBN_TRITON_TUNE", "0")
    assert tuning.settled(device, "key", [Config("sum")])


def test_rows_that_overlap_are_not_copied_in_bulk() -> None:
    x = torch.randn(64).bfloat16()
    assert linear._aligned(x.expand(1, 64))
    assert not linear._aligned(x.expand(513, 64))
    assert linear._aligned(torch.randn(513, 64).bfloat16())
