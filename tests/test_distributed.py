"""Training over several processes: DDP, FSDP2 and ``torchrun``, against one process on the whole batch.

The processes of all cases are started once; each rank takes its half of the batch, so that the mean of their losses
is the loss of one process.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.nn.functional  # before a group is made: see `examples/paper/devices.py`
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler import LoweringError, TilingConfig
from tests import oracle

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

ROOT = Path(__file__).parent.parent
STEPS, PROCESSES = 3, 2
CONFIG = TilingConfig(p=4, min_size=0, alpha="tile")


class Blocks(nn.Module):
    """Two residual blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16, bias=False)) for _ in range(2)
        )
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)  # type: ignore[no-any-return]


def whole(**options: Any) -> Any:
    torch.manual_seed(5)
    return tbn.transform(Blocks(), CONFIG.replace(**options))


def block_by_block() -> Any:
    """Each block is a graph module of its own, called as a module: what sharding block by block needs."""
    torch.manual_seed(5)
    model = Blocks()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = tbn.transform(block, CONFIG)
    return model


def train(module: nn.Module, parameters: Any, rank: int = 0, processes: int = 1) -> list[float]:
    """The loss of the whole batch at each step."""
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(16, 16, generator=generator), torch.randint(0, 8, (16,), generator=generator)
    share = slice(rank * 16 // processes, (rank + 1) * 16 // processes)
    optimiser = torch.optim.AdamW(parameters, lr=0.01)
    gradual = any(name.endswith("tiling_strength") for name, _ in module.named_buffers())
    losses = []
    for step in range(STEPS):
        if gradual:
            tbn.set_tiling_strength(module, step / (STEPS - 1))
        optimiser.zero_grad()
        loss = F.cross_entropy(module(x[share]), y[share])
        loss.backward()
        optimiser.step()
        total = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(total)
        losses.append(float(total) / processes)
    return losses


def gradual() -> Any:
    return whole(gradual=True)


def held() -> Any:
    """What is trained are the tiles."""
    return whole(latent="tile")


# Each case: how the module is made, and how a process wraps it.
def _ddp(module: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module)


def _compiled_ddp(module: nn.Module) -> nn.Module:
    # The backend makes no difference to what DDP sees, and this one compiles quickly.
    return torch.compile(_ddp(module), backend="aot_eager")  # type: ignore[return-value]


def _fsdp(module: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (PROCESSES,))
    if not isinstance(module, torch.fx.GraphModule):
        for block in module.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)  # type: ignore[arg-type]
    fully_shard(module, mesh=mesh)
    return module


def shard_elements(parameter: Tensor) -> int:
    """Elements that this process holds, of which the optimiser holds as many twice."""
    from torch.distributed.tensor import DTensor

    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


CASES: dict[str, tuple[Callable[[], Any], Callable[[nn.Module], nn.Module]]] = {
    "ddp": (whole, _ddp),
    "ddp_gradual": (gradual, _ddp),
    "ddp_compiled": (whole, _compiled_ddp),
    "ddp_tile": (held, _ddp),
    "ddp_compiled_tile": (held, _compiled_ddp),
    "fsdp": (whole, _fsdp),
    "fsdp_gradual": (gradual, _fsdp),
    "fsdp_blocks": (block_by_block, _fsdp),
    "fsdp_tile": (held, _fsdp),
}


def stages(form: str) -> list[nn.Sequential]:
    """The two halves of a network, each with its own layers, tiled and perhaps lowered."""
    torch.manual_seed(6)
    halves = [nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), nn.Sequential(nn.Linear(16, 8))]
    tiled = [tbn.transform(half, CONFIG) for half in halves]
    return tiled if form == "train" else [tbn.lower(half) for half in tiled]


def pipeline_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(8, 16, generator=generator), torch.randint(0, 8, (8,), generator=generator)


def _pipeline_stage(rank: int, form: str) -> dict[str, Any]:
    """Run one half of the network in PyTorch's pipeline: its gradients, and the results where it is the last."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    module = stages(form)[rank]
    x, y = pipeline_batch()
    stage = PipelineStage(module, rank, PROCESSES, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=4, loss_fn=F.cross_entropy if form == "train" else None)
    if rank == 0:
        schedule.step(x)
        output = None
    else:
        output = schedule.step(target=y, losses=[]) if form == "train" else schedule.step()
    gradients = {name: value.grad for name, value in module.named_parameters() if value.grad is not None}
    return {"output": None if output is None else output.detach(), "gradients": gradients}


def _process(rank: int, folder: str) -> None:
    """One of the processes: run every case, and let rank 0 write what came out."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    results = {}
    for name, (build, wrap) in CASES.items():
        module = build()
        wrapped = wrap(module)
        losses = train(wrapped, wrapped.parameters(), rank, PROCESSES)
        state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
        elements = sum(shard_elements(parameter) for parameter in wrapped.parameters())
        results[name] = {"losses": losses, "state": state, "elements": elements}
        if name.startswith("fsdp"):
            dist.checkpoint.save({"model": get_model_state_dict(module)}, checkpoint_id=f"{folder}/{name}")
        if name == "fsdp":
            results[name]["summary"] = str(tbn.summary(module))
            try:
                tbn.lower(module)
            except LoweringError as error:
                results[name]["error"] = str(error)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    for form in ("train", "packed"):
        torch.save(_pipeline_stage(rank, form), f"{folder}/stage {rank} {form}.pt")
    del module, wrapped
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes wrote."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(_process, args=(str(folder),), nprocs=PROCESSES)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Any:
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("case", CASES)
def test_same_training_as_one_process(results: Any, case: str) -> None:
    qat = CASES[case][0]()
    losses = train(qat, qat.parameters())
    assert losses[-1] < losses[0]
    assert results[case]["losses"] == pytest.approx(losses, rel=1e-5)
    state = qat.state_dict()
    torch.testing.assert_close(dict(results[case]["state"]), dict(state), rtol=1e-4, atol=1e-5)


def test_state_of_tiles_is_shared_out(results: Any) -> None:
    """A process holds half of the parameters; those of a tile are ``2 p`` times fewer, but for its alphas."""
    plain, tiles = (dict(build().named_parameters()) for build in (whole, held))
    biases = sum(value.numel() for key, value in plain.items() if "bias" in key)
    weights = sum(value.numel() for key, value in plain.items() if "weight" in key)
    alphas = sum(value.numel() for key, value in tiles.items() if "alpha" in key)
    assert results["ddp_tile"]["elements"] == weights // 4 + alphas + biases
    assert results["fsdp_tile"]["elements"] == results["ddp_tile"]["elements"] // PROCESSES
    assert results["fsdp"]["elements"] == (2 * weights + biases) // PROCESSES


@pytest.mark.parametrize(("case", "build"), [("fsdp", whole), ("fsdp_tile", held)])
def test_gathered_state_lowers_as_that_of_one_process(results: Any, case: str, build: Any) -> None:
    fresh, alone = build(), build()
    fresh.load_state_dict(results[case]["state"])
    train(alone, alone.parameters())
    x = torch.randn(5, 16)
    with torch.no_grad():
        oracle.assert_close(tbn.lower(fresh)(x), tbn.lower(alone)(x), 1e-5)


def load_alone(module: nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint that several processes wrote into a module of this one."""
    state = {"model": module.state_dict()}
    for value in state["model"].values():
        if value.is_floating_point():
            value.zero_()
    dist.checkpoint.load(state, checkpoint_id=checkpoint, no_dist=True)
    module.load_state_dict(state["model"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # it says so of any checkpoint read alone
@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("fsdp")])
def test_distributed_checkpoints(results: Any, folder: Path, case: str) -> None:
    """Written by two processes in parts, read by one; the tilings are compared."""
    module = CASES[case][0]()
    load_alone(module, folder / case)
    torch.testing.assert_close(dict(module.state_dict()), dict(results[case]["state"]), rtol=0, atol=0)
    if case == "fsdp":
        other = whole(p=2, alpha="layer")
        state = {"model": other.state_dict()}
        dist.checkpoint.load(state, checkpoint_id=folder / case, no_dist=True)
        with pytest.raises(RuntimeError, match="is tiled with p=2, 1 alpha from A, in the checkpoint with p=4"):
            other.load_state_dict(state["model"])


@pytest.mark.parametrize("form", ["train", "packed"])
def test_pipeline_of_two_stages(folder: Path, form: str) -> None:
    first, second = stages(form)
    x, y = pipeline_batch()
    output = second(first(x))
    found = [torch.load(folder / f"stage {rank} {form}.pt") for rank in range(PROCESSES)]
    torch.testing.assert_close(found[1]["output"], output.detach(), rtol=1e-5, atol=1e-6)
    if form == "packed":
        return
    F.cross_entropy(output, y).backward()
    for stage, module in zip(found, (first, second), strict=True):
        gradients = {name: value.grad for name, value in module.named_parameters()}
        torch.testing.assert_close(stage["gradients"], gradients, rtol=1e-4, atol=1e-6)


def test_sharded_module_says_to_gather_first(results: Any) -> None:
    error = results["fsdp"]["error"]
    assert "parameter 'blocks.0.0.weight' is a DTensor, sharded over processes" in error
    assert "get_model_state_dict with full_state_dict=True" in error


def test_summary_of_a_sharded_module(results: Any) -> None:
    assert results["fsdp"]["summary"] == str(tbn.summary(whole()))


@pytest.mark.parametrize(
    "launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]]
)
def test_example_runs_with_and_without_torchrun(launcher: list[str]) -> None:
    pytest.importorskip("sklearn")
    command = [sys.executable, *launcher, "examples/distributed_mlp.py", "--epochs", "3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    accuracy, *table = result.stdout.splitlines()
    assert accuracy.endswith(f"{PROCESSES if launcher else 1} process(es)")
    assert float(accuracy.split()[2]) > 80
    assert sum("3 layers tiled" in line for line in table) == 1  # from rank 0 alone
