"""PyTorch's tensor parallel plans for tiled linear layers: :func:`parallelize_module`.

A plan splits a linear layer by its outputs (``ColwiseParallel``) or by its inputs (``RowwiseParallel``). Here the
*tile* is split, so that a process multiplies and stores ``1 / processes`` of the unique rows; what processes exchange
are results of unique rows, and each writes the copies that it needs. Write ``T [R, n]`` for the tile of a weight
``[p R, n]``, of copies with scales ``alpha_i``, and ``T_k`` for the part of process ``k``::

    by outputs   T_k = rows of T       z = gather(x T_k^T)           y_i = alpha_i z + bias_i,  of the outputs of k
    by inputs    T_k = columns of T    z = sum over k of x_k T_k^T   y_i = alpha_i z + bias_i,  all i

The sum has ``R`` values for a token in place of ``p R``. Copies with Hadamard signs differ: there the processes
exchange all results. ``latent="weight"`` trains each copy by gradients of its own (Eq. 6), so that a process multiplies
its part of the whole weight, and sums the parts of a tile at each step; ``latent="tile"`` does neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import parallel as styles

from tbn_compiler.errors import SerializationError, TransformError
from tbn_compiler.graph.calls import tiled_call, training_call
from tbn_compiler.graph.layer_graph import LayerGraph
from tbn_compiler.graph.records import (
    CarriesTilings,
    LayerRecord,
    alpha_key,
    attach_records,
    input_scale_key,
    own_records,
    tile_key,
)
from tbn_compiler.ops.latents import alphas_of
from tbn_compiler.packing import pack_bits, unpack_bits
from tbn_compiler.tiling import TileLayout, TileSpec, hadamard_matrix, tile_signs

Plan = styles.ParallelStyle | Mapping[str, styles.ParallelStyle]

# What a layer keeps of a graph module besides its tensors, hooks and attributes.
_GRAPH_STATE = ("_graph", "_code", "_lineno_map", "_prologue_start", "graph", "meta")


def parallelize_module(
    module: nn.Module,
    device_mesh: DeviceMesh | None = None,
    parallelize_plan: Plan | None = None,
    *,
    src_data_rank: int | None = 0,
) -> nn.Module:
    """Split a model over processes as ``torch.distributed.tensor.parallel.parallelize_module`` does, tiled layers too.

    Tiled linear layers that the plan names with ``ColwiseParallel`` or ``RowwiseParallel`` are split by their tile;
    everything else in the plan is PyTorch's. Inputs and results have the layouts of PyTorch's own: plans stay as they
    are, and may mix tiled layers with others.

    Args:
        module: a model that :func:`~tbn_compiler.transform` made, to train, or :func:`~tbn_compiler.lower`. It is
            changed in place.
        device_mesh: mesh of one dimension.
        parallelize_plan: a style, or styles by module path, as in PyTorch.
        src_data_rank: the process whose values all take; ``None``: each keeps its own.

    Returns:
        The module. Parameters of layers to train are ``DTensor`` under their names, with their shapes; checkpoints are
        written and read by ``torch.distributed.checkpoint``. Gather them into a model that was not split to lower it.
        The parts of a packed layer are not saved: save the model before.

    Raises:
        TransformError: a layer cannot be split, with the reason. No layer is changed.

    Example:
        >>> mesh = init_device_mesh("cpu", (2,))                                            # doctest: +SKIP
        >>> parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})  # doctest: +SKIP
    """
    if parallelize_plan is None or isinstance(parallelize_plan, styles.ParallelStyle):
        plan: Any = parallelize_plan if parallelize_plan is None else _Style(parallelize_plan)
        checked: Any = None if plan is None else _Check(plan, module, set())
    else:
        plan = {path: _Style(style) for path, style in parallelize_plan.items()}
        named: set[nn.Module] = set()
        checked = {path: _Check(style, module, named) for path, style in plan.items()}
    styles.parallelize_module(module, device_mesh, checked, src_data_rank=src_data_rank)
    return styles.parallelize_module(module, device_mesh, plan, src_data_rank=src_data_rank)


_SPLITTING = (styles.ColwiseParallel, styles.RowwiseParallel)


class _Style(styles.ParallelStyle):
    """A style of PyTorch that splits tiled layers in its own way."""

    def __init__(self, style: styles.ParallelStyle) -> None:
        super().__init__()
        self.style = style

    def part(self, module: nn.Module, mesh: DeviceMesh) -> _Part | None:
        """How a tiled layer is split; ``None`` where the style is for PyTorch to apply."""
        if not isinstance(self.style, _SPLITTING):
            return None
        if isinstance(module, TiledLinearPart):
            raise TransformError(f"{module} is split already")
        if isinstance(module, LayerGraph) and isinstance(module, nn.Linear):
            if type(self.style) not in _SPLITTING:
                raise TransformError(f"{type(self.style).__name__} is a style that tiled layers do not know")
            return _Part.of(module, mesh, isinstance(self.style, styles.ColwiseParallel))
        if isinstance(module, fx.GraphModule) or _is_tiled(module):
            raise TransformError(
                f"{type(module).__name__} is no linear layer as transform, lower or load give it: only such are split "
                "(before optimize)"
            )
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise TransformError(f"PyTorch's styles split linear layers and embeddings, and no {type(module).__name__}")
        return None

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        part = self.part(module, device_mesh)
        if part is None:
            return styles.parallelize_module(module, device_mesh, self.style, src_data_rank=self.src_data_rank)
        _split(module, part, self.style, self.src_data_rank)
        return module


class _Check(styles.ParallelStyle):
    """Raises where a style cannot be applied, and applies nothing."""

    def __init__(self, style: _Style, model: nn.Module, named: set[nn.Module]) -> None:
        super().__init__()
        self.style, self.model, self.named = style, model, named

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        part = self.style.part(module, device_mesh)
        if isinstance(self.style.style, _SPLITTING):
            if module in self.named:
                raise TransformError(f"two entries of the plan name {type(module).__name__} {self._path(module)!r}")
            self.named.add(module)
            graphs = [graph for graph in self.model.modules() if isinstance(graph, fx.GraphModule)]
            tiled = [
                graph
                for graph in graphs
                if graph is not module and any(record.spec for record in own_records(graph) or ())
            ]
            if any(module in set(graph.modules()) for graph in tiled):
                raise TransformError(f"{self._path(module)!r} lies inside a graph of tiled layers, and cannot be split")
        if part is not None:
            own = {id(value) for value in [*module.parameters(), *module.buffers()]}
            for path, other in self.model.named_modules():
                tensors = [*other.parameters(recurse=False), *other.buffers(recurse=False)]
                if other is not module and own.intersection(map(id, tensors)):
                    part.refuse(f"{path!r} shares a parameter with it")
        return module

    def _path(self, module: nn.Module) -> str:
        return str(next(path for path, other in self.model.named_modules() if other is module))


@dataclass(frozen=True)
class _Part:
    """What a process holds of a layer.

    Attributes:
        mesh: the processes.
        by_outputs: whether outputs are split, not inputs.
        spec: the tiling of the whole weight.
        trains: whether the layer trains; else its tile is packed.
    """

    mesh: DeviceMesh
    by_outputs: bool
    spec: TileSpec
    trains: bool

    @classmethod
    def of(cls, module: nn.Module, mesh: DeviceMesh, by_outputs: bool) -> _Part:
        """The part of a layer.

        Raises:
            TransformError: the layer cannot be split.
        """
        record = _record(module)
        assert record.spec is not None
        part = cls(mesh, by_outputs, record.spec, _trains(module))
        reason = part._obstacle(module)
        if reason is not None:
            part.refuse(reason)
        return part

    @property
    def layout(self) -> TileLayout:
        return self.spec.layout

    @property
    def mixes(self) -> int:
        """Results of a row of the tile: one, or one for each copy with Hadamard signs."""
        return self.layout.p if self.layout.kind == "hadamard" else 1

    @property
    def tile_rows(self) -> int:
        """``R``, the rows of the tile."""
        return self.layout.rows // self.layout.p_out

    def bounds(self, size: int) -> tuple[int, int]:
        """The range of ``size`` rows or columns that this process has, as ``torch.chunk`` and ``Shard`` give it."""
        step = -(-size // self.mesh.size())
        begin = min(step * self.mesh.get_local_rank(), size)
        return begin, min(begin + step, size)

    def _steps(self, size: int) -> int:
        return -(-size // self.mesh.size())

    def refuse(self, reason: str) -> NoReturn:
        """Raise why the layer cannot be split."""
        side = "outputs" if self.by_outputs else "inputs"
        raise TransformError(f"a tiled layer {tuple(self.layout.shape)} cannot be split by its {side}: {reason}")

    def _obstacle(self, module: nn.Module) -> str | None:
        layout, processes = self.layout, self.mesh.size()
        if self.mesh.ndim != 1:
            return f"the mesh has {self.mesh.ndim} dimensions; pass one of them, as mesh['name']"
        if not _is_bare(module, self.trains):
            return "its graph has more than a linear layer (gradual tiling, or fused functions: split before optimize)"
        if layout.kind == "staggered" or not layout.aligned:
            return "its copies begin inside a row"
        if layout.alphas_in(_num_alphas(module, self.spec)) > 1:
            return 'it has alphas along its inputs; use alpha="output"'
        if self.trains and self.spec.tile_dtype != "binary" and self.spec.latent == "weight":
            return 'tiles in full precision are split with latent="tile" only'
        if self.trains or _packed_alone(module):
            return self._too_small(layout, processes)
        return "its tile is stored in full precision"

    def _too_small(self, layout: TileLayout, processes: int) -> str | None:
        if self.by_outputs:
            if self.tile_rows <= self._steps(self.tile_rows) * (processes - 1):
                return (
                    f"its tile has {self.tile_rows} rows, {self._steps(self.tile_rows)} for a process, and there are "
                    f"{processes} processes; use a smaller p"
                )
            return None
        group = layout.p if layout.kind == "hadamard" else layout.p_in
        step = self._steps(layout.row_size)
        if layout.row_size <= step * (processes - 1) or step % group or layout.row_size % group:
            each = f"as many of the {layout.row_size} inputs, a multiple of {group}"
            return f"each of {processes} processes must have {each}"
        if self.spec.activation != "float" and self.spec.input_scale == "token":
            return 'the scale of a token is that of all inputs; use input_scale="layer"'
        return None


def _is_tiled(module: nn.Module) -> bool:
    """Whether tiled weights are recorded at a module itself."""
    return any(record.spec for record in own_records(module) or ())


def _record(module: nn.Module) -> LayerRecord:
    records = own_records(module) or ()
    if len(records) != 1 or records[0].spec is None or records[0].view:
        raise TransformError(f"{type(module).__name__} is not one tiled weight: it cannot be split over processes")
    return records[0]


def _calls(module: nn.Module) -> list[fx.Node]:
    assert isinstance(module, fx.GraphModule)
    return [node for node in module.graph.nodes if node.op.startswith("call_")]


def _trains(module: nn.Module) -> bool:
    return not any(tiled_call(node) for node in _calls(module))


def _is_bare(module: nn.Module, trains: bool) -> bool:
    """Whether a graph is one linear layer with its inputs in a format, and nothing else."""
    *before, last = _calls(module)
    if not trains:
        call = tiled_call(last)
        assert call is not None
        return not before and call.arguments["epilogue"] == "none" and call.arguments["input_alpha"] is None
    formats = {torch.exp, torch.ops.tbn.quantize_input.default}
    return training_call(last) is not None and all(node.target in formats for node in before)


def _num_alphas(module: nn.Module, spec: TileSpec) -> int:
    stored = module._buffers.get(alpha_key("weight"), module._parameters.get(alpha_key("weight")))
    return spec.num_alphas if stored is None else stored.numel()


def _packed_alone(module: nn.Module) -> bool:
    tile = getattr(module, tile_key("weight"))
    return bool(tile.dtype == torch.uint8)


def _split(module: Any, part: _Part, style: Any, src_data_rank: int | None) -> None:
    """Make a layer a :class:`TiledLinearPart`, in place."""
    record, mesh = _record(module), part.mesh
    for name in _GRAPH_STATE:
        module.__dict__.pop(name, None)
    module.__class__ = TiledLinearPart
    attach_records(module, [record])
    module.part = part
    module.input_layout, module.output_layout = style.input_layouts[0], style.output_layouts[0]
    module.use_local_output = style.use_local_output

    def share(value: Tensor, placement: Placement) -> DTensor:
        return distribute_tensor(value, mesh, [placement], src_data_rank=src_data_rank)

    axis = Shard(0 if part.by_outputs else 1)
    for name, value in list(module._parameters.items()):
        if value is None:
            continue
        whole = (name == "bias" and not part.by_outputs) or (value.dim() < 2 and name != "bias")
        placement = Replicate() if whole else axis
        module._parameters[name] = nn.Parameter(share(value.detach(), placement), value.requires_grad)
    if not part.trains:
        tile = share(module._buffers[tile_key("weight")], Replicate()).to_local()
        rows = unpack_bits(tile, part.layout.tile_size).view(part.tile_rows, -1)
        if part.by_outputs:
            begin, end = part.bounds(part.tile_rows)
            rows = rows[begin:end]
        else:
            begin, end = (bound // part.layout.p_in for bound in part.bounds(part.layout.row_size))
            rows = rows[:, begin:end]
        module._buffers[tile_key("weight")] = pack_bits(rows)
        for key in (alpha_key("weight"), input_scale_key("weight")):
            if module._buffers.get(key) is not None:
                module._buffers[key] = share(module._buffers[key], Replicate()).to_local()


class TiledLinearPart(CarriesTilings, nn.Module):
    """What a process holds of a tiled linear layer; made by :func:`parallelize_module`.

    Attributes:
        part: which part of the layer it is.
        input_layout: how inputs come that are plain tensors.
        output_layout: how results go.
        use_local_output: whether results are plain tensors, not ``DTensor``.
    """

    tbn_is_split = True  # SPLIT_MARK

    part: _Part
    input_layout: Placement
    output_layout: Placement
    use_local_output: bool

    def forward(self, input: Tensor) -> Tensor:
        """The layer's result ``[..., out_features]``, laid out as the style says."""
        mesh = self.part.mesh
        if not isinstance(input, DTensor):
            input = DTensor.from_local(input, mesh, [self.input_layout], run_check=False)
        wanted: Placement = Replicate() if self.part.by_outputs else Shard(input.dim() - 1)
        input = self._in_format(input.redistribute(mesh, [wanted]))
        result = self._by_outputs(input) if self.part.by_outputs else self._by_inputs(input)
        result = result.redistribute(mesh, [self.output_layout])
        return result.to_local() if self.use_local_output else result

    def _in_format(self, input: DTensor) -> DTensor:
        """The input in the number format that the layer trains with."""
        spec, mesh = self.part.spec, self.part.mesh
        if not self.part.trains or spec.activation == "float":
            return input
        log_scale, scale = self._parameters.get("input_log_scale"), None
        if log_scale is not None:
            scale = _used(log_scale, Replicate() if self.part.by_outputs else Partial()).exp()
        values = torch.ops.tbn.quantize_input.default(input.to_local(), spec.activation, 1, scale)
        return _laid_out(values, mesh, input.placements[0], input.shape)

    def _by_outputs(self, input: DTensor) -> DTensor:
        part, mesh, layout = self.part, self.part.mesh, self.part.layout
        begin, end = part.bounds(layout.rows)
        alpha, mine = self._alphas(Partial()), input.to_local(grad_placements=[Partial()])
        shape = torch.Size((*input.shape[:-1], layout.rows))
        bias = self._parameters.get("bias")
        bias = None if bias is None else bias.to_local()  # type: ignore[attr-defined]
        if part.trains and part.spec.latent == "weight":
            signs = self._used_rows(begin, end)
            weight = (signs.to(alpha.dtype) * self._row_alphas(alpha)[begin:end, None]).to(signs.dtype)
            return _laid_out(nn.functional.linear(mine, weight, bias), mesh, Shard(input.dim() - 1), shape)
        scale, relative = self._relative(alpha)
        rows = part.bounds(part.tile_rows)
        once = self._multiply(mine, scale, (rows[1] - rows[0]) * part.mixes, layout.row_size)
        once = once.unflatten(-1, (part.mixes, -1))
        whole = torch.Size((*input.shape[:-1], part.mixes, part.tile_rows))
        shared = _laid_out(once, mesh, Shard(input.dim()), whole)
        if part.mixes > 1 and part.mixes % mesh.size() == 0:  # each process takes the copies that it gives
            out = shared.redistribute(mesh, [Shard(input.dim() - 1)]).to_local().flatten(-2)
        else:
            met = shared.redistribute(mesh, [Replicate()]).to_local(grad_placements=[Partial()])
            out = met.flatten(-2)[..., begin:end] if part.mixes > 1 else _copies(met.squeeze(-2), begin, end)
        out = self._finished(out, relative, bias, begin, end)
        return _laid_out(out, mesh, Shard(input.dim() - 1), shape)

    def _by_inputs(self, input: DTensor) -> DTensor:
        part, mesh, layout = self.part, self.part.mesh, self.part.layout
        begin, end = part.bounds(layout.row_size)
        # Tokens may be split on the way; outputs are written first.
        last = isinstance(self.output_layout, Shard) and self.output_layout.dim % input.dim() == input.dim() - 1
        to = Replicate() if last or not isinstance(self.output_layout, Shard) else self.output_layout
        used: Placement = Replicate() if isinstance(to, Replicate) else Partial()
        scale, relative = self._relative(self._alphas(used, of_columns=True))
        every_row = part.mixes > 1 or (part.trains and part.spec.latent == "weight")
        rows = layout.rows if every_row else part.tile_rows
        once: Tensor = _Once.apply(self._multiply(input.to_local(), scale, rows, end - begin))  # type: ignore[no-untyped-call]
        shape = torch.Size((*input.shape[:-1], rows))
        out = _laid_out(once, mesh, Partial(), shape).redistribute(mesh, [to]).to_local()
        out = _copies(out, 0, layout.rows)
        bias = self._parameters.get("bias")
        out = self._finished(out, relative, None if bias is None else _used(bias, used), 0, layout.rows)
        return _laid_out(out, mesh, to, torch.Size((*input.shape[:-1], layout.rows)))

    def _multiply(self, input: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
        """Results of ``rows`` rows of this part, with one scale."""
        layout, spec, operators = self.part.layout, self.part.spec, torch.ops.tbn
        whole = rows == layout.rows and self.part.trains and spec.latent == "weight"
        p = layout.p if self.part.mixes > 1 or whole else layout.p_in
        options: dict[str, Any] = {"p_in": layout.p_in, "hadamard": layout.hadamard and p > 1}
        if self.part.trains:
            weight = self._parameters["weight"].to_local()  # type: ignore[union-attr]
            sizes = (columns, rows, p, 1)
            binary = spec.tile_dtype == "binary"
            trained = operators.train_linear.default(input, weight, scale, None, *sizes, **options, binary=binary)
            return cast("Tensor", trained)
        tile, given = self._buffers[tile_key("weight")], self._buffers.get(input_scale_key("weight"))
        options |= {"activation": spec.activation, "input_scale": given}
        return cast("Tensor", operators.linear.default(input, tile, scale, None, columns, rows, p, **options))

    def _alphas(self, used: Placement, *, of_columns: bool = False) -> Tensor:
        """All alphas ``[k]``; ``used`` says whether each process uses them for its own part of the gradient."""
        part, layout, mesh = self.part, self.part.layout, self.part.mesh
        if not part.trains:
            stored = self._buffers[alpha_key("weight")]
            assert stored is not None
            return stored
        k = part.spec.num_alphas
        source: Any = self._parameters.get("alpha_source")
        source = self._parameters["weight"] if source is None else source
        # In half precision sums, and gradients before they are divided by the weights that they are of, may overflow.
        wide = torch.promote_types(source.dtype, torch.float32)
        if source.numel() == k:
            return alphas_of(_used(source, used).to(wide), layout, k)
        # Mean magnitudes of blocks of rows, of which each process has some, or some columns.
        sums = source.to_local().abs().sum(1, dtype=wide)
        placement: Placement = Partial() if of_columns else Shard(0)
        rows = _laid_out(sums, mesh, placement, torch.Size((layout.rows,))).redistribute(mesh, [Replicate()])
        return rows.to_local(grad_placements=[used]).view(k, -1).sum(1) / (layout.numel // k)

    def _relative(self, alpha: Tensor) -> tuple[Tensor, Tensor | None]:
        """The largest alpha, and the alphas relative to it, which carry their gradient."""
        if not self.part.trains and alpha.numel() == 1:
            return alpha, None
        scale = alpha.detach().amax().reshape(1)
        scale = torch.where(scale > 0, scale, 1)
        return scale, alpha / scale

    def _row_alphas(self, alpha: Tensor) -> Tensor:
        return alpha.repeat_interleave(self.part.layout.rows // alpha.numel())

    def _finished(self, out: Tensor, relative: Tensor | None, bias: Tensor | None, begin: int, end: int) -> Tensor:
        """Results of outputs from ``begin`` to ``end``, with their scales and biases."""
        if relative is not None:
            out = (out.to(relative.dtype) * self._row_alphas(relative)[begin:end]).to(out.dtype)
        return out if bias is None else out + bias.to(out.dtype)

    def _used_rows(self, begin: int, end: int) -> Tensor:
        """Rows of signs that this process gives the results of, with the gradient of their latent weights (Eq. 6)."""
        layout, mesh = self.part.layout, self.part.mesh
        weight: Tensor = self._parameters["weight"].to_local()  # type: ignore[union-attr]
        # Half precision would lose signs of sums, which the whole tile has.
        fixed = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        count = self.part.tile_rows
        rows = torch.arange(begin, end, device=weight.device)
        signs = None
        if layout.kind == "hadamard":
            matrix = hadamard_matrix(layout.p, fixed)
            columns = torch.arange(layout.row_size, device=weight.device) % layout.p
            signs = matrix[rows // count][:, columns]
            fixed = fixed * signs
        summed = fixed.new_zeros(count, layout.row_size).index_add_(0, rows % count, fixed)
        summed = _laid_out(summed, mesh, Partial(), summed.shape).redistribute(mesh, [Replicate()]).to_local()
        if layout.p_in > 1:
            summed = summed.unflatten(1, (-1, layout.p_in)).sum(2)
        used = tile_signs(summed).repeat_interleave(layout.p_in, 1)[rows % count]
        used = used if signs is None else used * signs
        straight: Tensor = _Straight.apply(weight, used.to(weight.dtype))  # type: ignore[no-untyped-call]
        return straight

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.part.trains:
            raise SerializationError(
                f"layer {prefix.removesuffix('.')!r} holds a part of a packed tile, which is not saved: "
                "save the model before it is split over processes"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if not self.part.trains:
            name = prefix.removesuffix(".")
            rest[-1].append(f"layer {name!r} holds a part of a packed tile: load it whole, before it is split")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def weight(self) -> Tensor:
        """The part of the weight that this process trains; of a packed layer the part of the tile that it has."""
        trained = self._parameters.get("weight")
        if trained is not None:
            return trained
        layout, rows = self.part.layout, self.part.tile_rows
        columns, alpha = layout.row_size // layout.p_in, self._buffers[alpha_key("weight")]
        begin, end = self.part.bounds(rows if self.part.by_outputs else layout.row_size)
        shape = (end - begin, columns) if self.part.by_outputs else (rows, (end - begin) // layout.p_in)
        tile = self._buffers[tile_key("weight")]
        assert tile is not None
        assert alpha is not None
        return unpack_bits(tile, shape[0] * shape[1], alpha.dtype).view(shape)

    def extra_repr(self) -> str:
        """The sizes of the whole layer, and how it is split."""
        rows, columns = self.part.layout.shape
        side = "outputs" if self.part.by_outputs else "inputs"
        return f"in_features={columns}, out_features={rows}, {side} of {self.part.mesh.size()} processes"


class _Straight(torch.autograd.Function):
    """Other values in the place of a weight's, with the gradient of the weight (Eq. 6)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Once(torch.autograd.Function):
    """The same values; their gradient is not to be differentiated again, which sums over processes do not follow."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _laid_out(value: Tensor, mesh: DeviceMesh, placement: Placement, shape: torch.Size) -> DTensor:
    """A tensor of which ``value`` is what this process has; parts may differ in size."""
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(value.contiguous(), mesh, [placement], run_check=False, shape=shape, stride=stride)


def _used(parameter: Any, gradient: Placement) -> Tensor:
    """The values of a parameter that all processes have."""
    value: Tensor = parameter.to_local(grad_placements=[gradient])
    return value


def _copies(value: Tensor, begin: int, end: int) -> Tensor:
    """Outputs from ``begin`` to ``end``, of copies of ``value [..., R]`` one behind the other."""
    rows = value.shape[-1]
    if begin % rows == 0 and end % rows == 0:
        return value.repeat(*[1] * (value.dim() - 1), (end - begin) // rows)
    return value.index_select(-1, torch.arange(begin, end, device=value.device) % rows)
