"""Tensor parallel plans of tiled models, against one process: results, gradients, checkpoints and refusals.

Four processes run every case once: on a mesh of all four, and on one of two by two, whose first dimension splits the
batch.
"""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler import SerializationError, TilingConfig, TransformError
from tests import oracle
from tests.test_distributed import load_alone

try:
    import transformers
except ImportError:
    transformers = None

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

PROCESSES = 4
ROOT = Path(__file__).parent.parent.parent


class FeedForward(nn.Module):
    """Two layers that a plan splits, between two that stay whole."""

    def __init__(self, hidden: int = 64, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.up = nn.Linear(16, hidden, bias=bias)
        self.down = nn.Linear(hidden, 16, bias=bias)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(F.gelu(self.up(self.first(x)))))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Heads are split by the outputs of three projections, and joined by the inputs of a fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = [layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        return self.o(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def build(model: Callable[[], nn.Module] = FeedForward, **options: Any) -> Any:
    """A tiled model in float64, equal in all processes and beside them."""
    torch.manual_seed(3)
    config = TilingConfig(**{"p": 4, "min_size": 0, "alpha": "tile", "float_layers": ["first", "head"], **options})
    tiled = tbn.transform(model().double(), config)
    generator = torch.Generator().manual_seed(4)
    for parameter in tiled.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    return tiled


TILINGS: dict[str, dict[str, Any]] = {
    "weight": {},
    "tile": {"latent": "tile"},
    "one alpha": {"alpha": "layer", "latent": "tile"},
    "alphas of W": {"alpha_source": "W"},
    "p=2": {"p": 2, "latent": "tile"},
    "p=2 weight": {"p": 2},
    "p=16": {"p": 16},
    "two-axis": {"p": (2, 2), "alpha": "output"},
    "two-axis tile": {"p": (2, 2), "alpha": "output", "latent": "tile"},
    "hadamard": {"replicate": "hadamard"},
    "hadamard tile": {"replicate": "hadamard", "latent": "tile"},
    "hadamard p=2": {"p": 2, "replicate": "hadamard", "latent": "tile"},
    "float tile": {"tile_dtype": "float", "latent": "tile"},
    "int8": {"activation": "int8", "input_scale": "layer", "latent": "tile"},
    "no bias": {"model": lambda: FeedForward(bias=False)},
    "uneven": {"model": lambda: FeedForward(hidden=56), "p": 2, "latent": "tile"},
    "uneven weight": {"model": lambda: FeedForward(hidden=56), "p": 2},
    "attention": {"model": Attention, "p": 2, "float_layers": []},
}
PACKED = [name for name in TILINGS if name != "float tile"]


TOKENS = torch.arange(14).view(2, 7)


def language_model(form: str) -> Any:
    torch.manual_seed(6)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = tbn.transform(transformers.LlamaForCausalLM(config).double().eval(), TilingConfig(p=4, min_size=0))
    return tbn.lower(model) if form == "packed" else model


def plan_of_transformers(model: Any) -> Any:
    """The plan that comes with a model, as PyTorch's styles."""
    from torch.distributed.tensor import parallel

    known = {"colwise": parallel.ColwiseParallel, "rowwise": parallel.RowwiseParallel}
    return {name: known[style]() for name, style in model.tp_plan.items() if style in known}


def batch(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    width = 16 if isinstance(model, Attention) else 6
    return torch.randn(4, 8, width, dtype=torch.float64, generator=generator)


def plan(model: nn.Module, *, sequence: bool = False) -> Any:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel

    if isinstance(model, Attention):
        return {"[qkv]": ColwiseParallel(), "o": RowwiseParallel()}
    if sequence:  # tokens are split outside of the two layers
        return {
            "": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Shard(1), use_local_output=True),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
    return {"up": ColwiseParallel(), "down": RowwiseParallel()}


def losses(model: nn.Module, x: Tensor, steps: int = 3) -> list[float]:
    """Train by gradient descent."""
    found = []
    for _ in range(steps):
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        found.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.02 * parameter.grad  # type: ignore[operator]
    return found


def half_precision(name: str, dtype: torch.dtype, latent: str) -> Any:
    """A model with a layer whose sums and gradients leave the range of float16 before they are divided."""
    model = build(partial(FeedForward, hidden=256), latent=latent).float()
    layer = getattr(model, name)
    layer.alpha_source.data.add_(100 if latent == "weight" else 50)
    return model.to(dtype)


def gradients(layer: Any) -> dict[str, Tensor]:
    """Result of many tokens, and gradients of all parameters."""
    generator = torch.Generator().manual_seed(8)
    part = getattr(layer, "part", None)
    columns = layer.in_features if part is None else part.layout.row_size
    x = torch.randn(2048, columns, generator=generator).to(layer.weight.dtype)
    if part is not None and not part.by_outputs:
        x = x.chunk(PROCESSES, 1)[part.mesh.get_local_rank()]
    result = layer(x)
    (result.float() * result.detach().float()).sum().mul(1e-3).backward()
    found = {"result": result.detach()}
    for key, value in layer.named_parameters():
        found[key] = value.grad.full_tensor() if hasattr(value.grad, "full_tensor") else value.grad
    return found


def options_of(name: str) -> dict[str, Any]:
    return {"model": FeedForward, **TILINGS[name]}


def _state(model: nn.Module) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def _forget(model: nn.Module, mesh: Any) -> None:
    """Leave the values of the layers that are split to the first process, from which all take them."""
    for path, layer in model.named_children():
        if mesh.get_local_rank() and path not in ("first", "head"):
            for tensor in (*layer.parameters(), *layer.buffers()):
                tensor.data.zero_()


def _process(rank: int, folder: str) -> None:
    """Run every case, and write what came out."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
    from torch.distributed.tensor.parallel import parallelize_module as without_tiles

    from tbn_compiler.integrations.tensor_parallel import parallelize_module

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    all_four, two_by_two = (
        init_device_mesh("cpu", (4,)),
        init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model")),
    )
    results: dict[str, Any] = {}
    for name in TILINGS:
        for mesh in (all_four, two_by_two["model"]):
            model = build(**options_of(name))
            _forget(model, mesh)
            found: Any = {"model": parallelize_module(model, mesh, plan(model)) is model}
            x = batch(model)
            found |= {"result": model(x).detach(), "losses": losses(model, x), "state": _state(model)}
            found["elements"] = sum(
                value.to_local().numel()
                for key, value in model.named_parameters()
                if ".weight" in f".{key}" and hasattr(value, "to_local")
            )
            results[name, mesh.size()] = found
            if name in PACKED:
                packed = tbn.lower(build(**options_of(name)))
                _forget(packed, mesh)
                parallelize_module(packed, mesh, plan(packed))
                with torch.no_grad():
                    found["packed"] = packed(x)
                found["bytes"] = sum(value.numel() for key, value in packed.named_buffers() if key.endswith("_tile"))
    for dtype in (torch.float16, torch.bfloat16):
        for name, side in (("up", ColwiseParallel(output_layouts=Replicate())), ("down", RowwiseParallel())):
            for latent in ("weight", "tile"):
                model = half_precision(name, dtype, latent)
                parallelize_module(model, all_four, {name: side})
                results[dtype, name, latent] = gradients(getattr(model, name))
    model = build(latent="tile")
    parallelize_module(model, two_by_two["model"], plan(model, sequence=True))
    results["sequence"] = model(batch(model).chunk(2, 1)[two_by_two["model"].get_local_rank()]).detach()
    model = build()
    parallelize_module(model, two_by_two["model"], plan(model))
    fully_shard(model, mesh=two_by_two["data"])
    share = batch(model).chunk(2)[two_by_two["data"].get_local_rank()]
    results["fsdp losses"], results["fsdp state"] = losses(model, share), _state(model)
    dist.checkpoint.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/checkpoint")

    if transformers is not None:
        mesh = two_by_two["model"]
        for form in ("train", "packed"):
            model = language_model(form)
            parallelize_module(model, mesh, plan_of_transformers(model))
            results[f"llama {form}"] = model(TOKENS).logits.detach()

    errors: dict[str, str] = {}

    def refused(name: str, run: Callable[[], Any], kind: type[Exception] = TransformError) -> None:
        with pytest.raises(kind) as caught:
            run()
        errors[name] = str(caught.value)

    colwise, rowwise = ColwiseParallel(), RowwiseParallel()
    for name, options, style in (
        ("roll", {"replicate": "roll"}, colwise),
        ("rows", {"p": 32}, colwise),
        ("token scale", {"activation": "int8"}, rowwise),
        ("mesh", {}, colwise),
        ("gradual", {"gradual": True}, colwise),
        ("alphas", {"p": (2, 2)}, colwise),
    ):
        model = build(**options)
        mesh = two_by_two if name == "mesh" else all_four
        refused(name, lambda m=model, g=mesh, s=style: parallelize_module(m.up, g, s))  # type: ignore[misc]
    tied = build()
    tied.down.weight = tied.up.weight
    refused("tied", lambda: parallelize_module(tied, all_four, {"head": colwise, "up": colwise}))
    assert not hasattr(tied.head.weight, "to_local")  # nothing was split
    split = parallelize_module(build(), all_four, plan(build()))
    refused("lower", partial(tbn.lower, split), tbn.LoweringError)
    packed = parallelize_module(tbn.lower(build()), all_four, plan(build()))
    refused("save", packed.state_dict, SerializationError)
    refused("load", partial(packed.load_state_dict, tbn.lower(build()).state_dict()), RuntimeError)
    refused("twice", partial(parallelize_module, split, all_four, plan(build())))
    whole = tbn.optimize(tbn.lower(build()), batch(build()))
    refused("optimized", partial(parallelize_module, whole, all_four, colwise))
    refused("two names", partial(parallelize_module, build(), all_four, {"up": colwise, "u*": colwise}))

    class Own(ColwiseParallel):
        pass

    refused("style", partial(parallelize_module, build(), all_four, {"up": Own()}))
    attention = tbn.transform(nn.MultiheadAttention(16, 4), TilingConfig(p=4, min_size=0))
    refused("inside", partial(parallelize_module, attention, all_four, {"out_proj": rowwise}))
    refused("calibrate", partial(tbn.calibrate_inputs, packed, [batch(build())]))
    refused("norm", partial(parallelize_module, nn.Sequential(nn.LayerNorm(4)), all_four, {"0": colwise}))
    x = batch(build()).requires_grad_()
    (gradient,) = torch.autograd.grad(split(x).square().sum(), x, create_graph=True)
    refused("again", gradient.square().sum().backward, RuntimeError)
    results["weight"] = {name: tuple(packed.get_submodule(name).weight.shape) for name in ("up", "down")}
    refused("PyTorch's", lambda: without_tiles(build(), all_four, plan(build()))(batch(build())), Exception)
    if transformers is not None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # the group is there already
        saved = f"{folder}/tiled"
        language_model("packed").save_pretrained(saved)
        dist.barrier()
        refused("tp_plan", lambda: transformers.LlamaForCausalLM.from_pretrained(saved, tp_plan="auto"))
    results["errors"], results["text"], results["summary"] = errors, str(split.up), str(tbn.summary(split))
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    del model, packed, split
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
    return torch.load(folder / "results.pt", weights_only=False)


CASES = [(name, processes) for name in TILINGS for processes in (2, 4)]


@pytest.mark.parametrize(("name", "processes"), CASES)
def test_training_is_that_of_one_process(results: Any, name: str, processes: int) -> None:
    alone, found = build(**options_of(name)), results[name, processes]
    x = batch(alone)
    assert found["model"]
    oracle.assert_close(found["result"], alone(x).detach(), 1e-10)
    assert found["losses"] == pytest.approx(losses(alone, x), rel=1e-9)
    torch.testing.assert_close(dict(found["state"]), dict(alone.state_dict()), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("name", "processes"), [case for case in CASES if case[0] in PACKED])
def test_packed_layers(results: Any, name: str, processes: int) -> None:
    alone, found = tbn.lower(build(**options_of(name))), results[name, processes]
    with torch.no_grad():
        oracle.assert_close(found["packed"], alone(batch(alone)), 1e-10)
    whole = sum(value.numel() for key, value in alone.named_buffers() if key.endswith("_tile"))
    assert found["bytes"] <= whole // processes + 16  # padding bits, and parts that are not equal


@pytest.mark.skipif(transformers is None, reason="needs transformers")
@pytest.mark.parametrize("form", ["train", "packed"])
def test_a_language_model_by_the_plan_that_it_has(results: Any, form: str) -> None:
    model = language_model(form)
    assert len(plan_of_transformers(model)) >= 7
    oracle.assert_close(results[f"llama {form}"], model(TOKENS).logits.detach(), 1e-5)  # norms compute in float32


def test_parameters_are_split(results: Any) -> None:
    for name in ("weight", "tile"):
        model = build(**options_of(name))
        assert results[name, 4]["elements"] == (model.up.weight.numel() + model.down.weight.numel()) // 4


@pytest.mark.parametrize("latent", ["weight", "tile"])
@pytest.mark.parametrize("name", ["up", "down"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(results: Any, dtype: torch.dtype, name: str, latent: str) -> None:
    """Tiles have the signs of one process, alphas and their gradients its range."""
    alone = gradients(getattr(half_precision(name, dtype, latent), name))
    found = results[dtype, name, latent]
    assert found.keys() == alone.keys()
    for key, value in found.items():
        assert value.isfinite().all(), key
        scale = alone[key].float().abs().max()
        torch.testing.assert_close(value.float() / scale, alone[key].float() / scale, rtol=0, atol=0.05)


def test_what_a_packed_part_gives_as_its_weight(results: Any) -> None:
    assert results["weight"] == {"up": (4, 16), "down": (4, 16)}


def test_tokens_split_outside(results: Any) -> None:
    model = build(latent="tile")
    oracle.assert_close(results["sequence"], model(batch(model)).detach().chunk(2, 1)[0], 1e-10)


def test_with_fsdp_on_the_other_dimension(results: Any) -> None:
    """Each half of the batch has its loss; the mean of their gradients trains the model."""
    alone = build()
    trained = copy.deepcopy(alone)
    losses(trained, batch(alone))
    assert results["fsdp losses"][0] == pytest.approx(losses(alone, batch(alone).chunk(2)[0], 1)[0], rel=1e-9)
    torch.testing.assert_close(dict(results["fsdp state"]), dict(trained.state_dict()), rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # it says so of any checkpoint read alone
def test_distributed_checkpoint_is_read_by_one_process(results: Any, folder: Path) -> None:
    model = build()
    load_alone(model, folder / "checkpoint")
    torch.testing.assert_close(dict(model.state_dict()), dict(results["fsdp state"]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("roll", "a tiled layer (64, 16) cannot be split by its outputs: its copies begin inside a row"),
        ("rows", "its tile has 2 rows, 1 for a process, and there are 4 processes"),
        ("token scale", 'the scale of a token is that of all inputs; use input_scale="layer"'),
        ("mesh", "the mesh has 2 dimensions"),
        ("gradual", "its graph has more than a linear layer"),
        ("alphas", 'it has alphas along its inputs; use alpha="output"'),
        ("tied", "'down' shares a parameter with it"),
        ("lower", "layer 'up' is split over processes: do this before parallelize_module, or gather"),
        ("load", "layer 'up' holds a part of a packed tile: load it whole"),
        ("twice", "is split already"),
        ("optimized", "is no linear layer as transform, lower or load give it"),
        ("two names", "two entries of the plan name Linear 'up'"),
        ("style", "Own is a style that tiled layers do not know"),
        ("inside", "lies inside a graph of tiled layers"),
        ("calibrate", "layer 'up' is split over processes"),
        ("norm", "PyTorch's styles split linear layers and embeddings, and no LayerNorm"),
        ("again", "once_differentiable"),
        ("save", "layer 'up' holds a part of a packed tile, which is not saved"),
        ("PyTorch's", "DTensor"),
        ("tp_plan", "load the model without it, and split it by"),
    ],
)
def test_what_cannot_be_split_says_why(results: Any, name: str, reason: str) -> None:
    if name != "tp_plan" or transformers is not None:
        assert reason in results["errors"][name]


def test_what_a_split_layer_shows(results: Any) -> None:
    assert results["text"] == "TiledLinearPart(in_features=16, out_features=64, outputs of 4 processes)"
    assert results["summary"] == str(tbn.summary(build()))


def test_example(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    example = ROOT / "examples" / "integrations" / "tensor_parallel.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(example), "--epochs", "5", "--output", "digits.safetensors"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "from 2 processes" in result.stdout
    assert float(result.stdout.split()[-1].removesuffix("%")) > 70
