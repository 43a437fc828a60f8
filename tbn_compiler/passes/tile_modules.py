"""Tile the layers of a model in place, module by module, without tracing anything that a user wrote.

Before::

    model.fc: nn.Linear                         # called as a module
    model.w: nn.Parameter                       # used by a function: F.linear(x, self.w)
    model.qkv: nn.Linear                        # other code reads qkv.weight

After::

    model.fc: a graph module                    # tile -> scale -> linear; still an instance of nn.Linear
    model.w: reads as a tiled weight            # a property; the parameter stays in parameters() and state_dict()
    model.qkv: nn.Linear                        # its weight reads as a tiled weight, for its own forward too

Each module stays the same object in every place that holds it, with its hooks, attributes and mode. Graph modules
inside the model are rewritten as graphs: whoever put them there has chosen their meaning.

Left alone, each with a recorded reason: what the config keeps in float, weights that other modules need in float
(embeddings), computed weights, layers that no pass tiles, and parameters that no code is seen to multiply with.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from tbn_compiler.errors import TransformError
from tbn_compiler.graph.code_reads import ParameterUses, parameter_uses
from tbn_compiler.graph.copying import reachable
from tbn_compiler.graph.function_reads import ELEMENTWISE, LINEAR, PRODUCT, RIGHT, WRITTEN
from tbn_compiler.graph.layer_graph import TiledGraph, adopt, become, layer_graph_class
from tbn_compiler.graph.layer_modules import float_graph, float_kind, is_huggingface_conv1d
from tbn_compiler.graph.layers import derived_kind
from tbn_compiler.graph.records import (
    TRANSPOSED,
    LayerRecord,
    alpha_source_key,
    attach_records,
    compare_whole_checkpoints,
    detach_records,
    graph_parts,
    join_key,
    layer_name,
    own_records,
)
from tbn_compiler.graph.tiled_parameters import STRENGTH, ReadForm, read_forms, read_tiled
from tbn_compiler.passes import run_passes, training_pipeline
from tbn_compiler.passes.choose_tiling import Scope, decide, with_float_input
from tbn_compiler.passes.convert_latents import convert_parameters
from tbn_compiler.passes.eligibility import module_kind_or_name, unsupported_reason, why_no_weight
from tbn_compiler.passes.expose_attention import attention_module, why_not_decomposed
from tbn_compiler.passes.tile_weights import alpha_source

# What the forward of PyTorch's recurrent cells reads.
_CELL_WEIGHTS = ("weight_ih", "weight_hh")

_WRITTEN = "the code of a module writes to it in place, which a weight that is computed cannot keep"
_ADDED = "it is only added to activations, or multiplied with them"
_NO_PRODUCT = "no product with it is seen in the code of {}; name it in tile_parameters to tile it"


def tile_modules(root: nn.Module, scope: Scope) -> None:
    """Tile a model in place; what is tiled already stays as it is.

    Args:
        root: the model, whose structure is the caller's own copy.
        scope: the options. ``keys`` and ``held`` are found here.
    """
    outermost = {part for _, part in graph_parts(root)}
    parts = {submodule for part in outermost for submodule in part.modules()}
    modules = {module: path for path, module in root.named_modules()}
    plans = {
        module: _asked_for(module, plan, scope.at(modules[module])) for module, plan in _plans(root, modules, parts)
    }
    scope = replace(scope, path="", keys=_keys(root), held=_held(modules, plans, parts))
    for module, path in modules.items():
        if isinstance(module, fx.GraphModule):
            if module in outermost:
                _tile_graph(module, scope.at(path))
        elif module in parts:
            continue
        elif isinstance(plans.get(module), _Layer):
            _tile_layer(module, scope.at(path))
        else:
            found = plans.get(module)
            _tile_parameters(module, found.weights if isinstance(found, _Parameters) else (), scope.at(path))
    if not isinstance(root, fx.GraphModule):
        compare_whole_checkpoints(root)


@dataclass(frozen=True)
class _Layer:
    """A module to replace by a graph."""


@dataclass(frozen=True)
class _Weight:
    """A parameter of a module, and how it is to be tiled, or the reason why not.

    Attributes:
        name: of the parameter.
        kind: of the layer.
        view: of the parameter, as the layer uses it.
        batch: number of weights along its first axes.
        reason: why it is left alone.
        written: code writes to it in place, a reason that counts only where the parameter could be a weight at all.
        unseen: no code is seen to multiply with it, so that options may know better.
        listed: whether it has a record if it is left alone.
    """

    name: str
    kind: str
    view: str = ""
    batch: int = 1
    reason: str | None = None
    written: bool = False
    unseen: bool = False
    listed: bool = True

    @property
    def taken(self) -> bool:
        """Whether it is to be tiled, if the options and its size allow it."""
        return self.reason is None and not self.written


@dataclass(frozen=True)
class _Parameters:
    """A module whose parameters are read tiled, or left alone."""

    weights: tuple[_Weight, ...]


def _plans(
    root: nn.Module, modules: dict[nn.Module, str], parts: set[nn.Module]
) -> Iterator[tuple[nn.Module, _Layer | _Parameters]]:
    """What is to become of each module with weights, whatever the config says."""
    uses = parameter_uses(root)
    kept = {
        method.__self__
        for method in reachable(root)
        if isinstance(method, types.MethodType) and isinstance(method.__self__, nn.Module)
    }
    attentions: dict[nn.Module, str] = {}
    read: set[nn.Module] = set()
    for module, path in modules.items():
        if module in parts or (module in attentions and module_kind_or_name(module) is None):
            continue
        if isinstance(module, nn.MultiheadAttention):
            reason = why_not_decomposed(module)
            if reason is None and _is_read(module, uses, kept):
                yield module, _Parameters(tuple(_projections(module, uses)))
                read.add(module.out_proj)
                continue
            if reason is None:
                yield module, _Layer()
                parts.update(part for part in module.modules() if part is not module)
                continue
            attentions |= {
                part: f"inside {type(module).__name__} {path!r}, which is not decomposed: {reason}"
                for part in module.modules()
                if part is not module
            }
            yield module, _left(module, type(module).__name__, f"attention is not decomposed: {reason}")
        elif module in attentions:
            yield module, _left(module, module_kind_or_name(module) or "parameter", attentions[module])
        elif isinstance(module, nn.RNNCellBase):
            yield module, _Parameters(tuple(_weights(module, uses)))
        elif unsupported_reason(module) is not None:
            yield module, _left(module, type(module).__name__, str(unsupported_reason(module)))
        # A method of the layer that something keeps goes on reading its weight, as code outside does.
        elif (
            float_kind(module) is not None
            and module not in read
            and not (uses.read_from_outside(module, "weight") or module in kept)
        ):
            yield module, _Layer()
        else:
            yield module, _Parameters(tuple(_weights(module, uses)))


def _is_read(attention: nn.MultiheadAttention, uses: ParameterUses, kept: set[nn.Module]) -> bool:
    """Whether other code reads the weights of an attention, which then keeps its forward and reads them too."""
    return any(
        part in kept or read_forms(part) or (name.endswith("weight") and uses.of(part, name) - {WRITTEN})
        for part in (attention, attention.out_proj)
        for name in part._parameters
    )


def _projections(attention: nn.MultiheadAttention, uses: ParameterUses) -> Iterator[_Weight]:
    """The weights of the input projections of an attention; a packed one is one layer."""
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        if attention._parameters.get(name) is not None:
            yield _Weight(name, "linear", written=WRITTEN in uses.of(attention, name))


def _left(module: nn.Module, kind: str, reason: str) -> _Parameters:
    names = [name for name, parameter in module._parameters.items() if parameter is not None and parameter.dim() >= 2]
    if "weight" in names or not names:
        names = ["weight"]
    return _Parameters(tuple(_Weight(name, kind, reason=reason) for name in names[:1]))


def _weights(module: nn.Module, uses: ParameterUses) -> Iterator[_Weight]:
    """The parameters of a module that code uses as weights, and those that might be."""
    kind = derived_kind(module)
    layer_weight = "weight" if kind is not None or is_huggingface_conv1d(module) else None
    if layer_weight and not isinstance(module._parameters.get("weight"), Tensor):
        computed = "a parametrization" if parametrize.is_parametrized(module) else "its module"
        reason = f"its weight is not a plain parameter (a buffer, or computed by {computed})"
        yield _Weight("weight", kind or "linear", reason=reason)
    sources = {alpha_source_key(form.record.weight) for form in read_forms(module)}
    for name, parameter in module._parameters.items():
        if parameter is None or name in sources:
            continue
        roles = uses.of(module, name)
        written = WRITTEN in roles
        if name == layer_weight:
            yield _Weight(name, kind or "linear", "" if kind else TRANSPOSED, written=written)
            continue
        # A matrix may be a layer's weight; vectors and single rows are not.
        if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.dim() < 2:
            continue
        if isinstance(module, nn.RNNCellBase) and name in _CELL_WEIGHTS:
            yield _Weight(name, "linear", written=written)
            continue
        convolution = next((role for role in roles if role.startswith("conv")), None)
        if convolution is not None and parameter.dim() == 2 + int(convolution[-2]):
            yield _Weight(name, convolution, written=written)
        elif roles & {LINEAR, RIGHT, PRODUCT}:
            if parameter.dim() == 2:
                view = TRANSPOSED if RIGHT in roles and LINEAR not in roles else ""
                yield _Weight(name, "linear", view, written=written)
            else:
                yield _Weight(name, "parameter", batch=math.prod(parameter.shape[:-2]), written=written)
        elif min(parameter.shape[:2]) > 1:
            added = roles - {WRITTEN} == {ELEMENTWISE}
            reason = _ADDED if added else _NO_PRODUCT.format(type(module).__name__)
            yield _Weight(name, "parameter", reason=reason, unseen=True, listed=not added)


def _keys(root: nn.Module) -> dict[int, tuple[str, ...]]:
    keys: dict[int, tuple[str, ...]] = {}
    for key, parameter in root.named_parameters(remove_duplicate=False):
        keys[id(parameter)] = (*keys.get(id(parameter), ()), key)
    return keys


def _held(
    modules: dict[nn.Module, str], plans: dict[nn.Module, _Layer | _Parameters], parts: set[nn.Module]
) -> dict[int, str]:
    """The parameters that some module needs in float, or that modules use in different ways, by id, with the reason."""
    held: dict[int, str] = {}
    ways: dict[int, tuple[object, nn.Module]] = {}
    for module, path in modules.items():
        plan = plans.get(module)
        weights = {w.name: w for w in plan.weights} if isinstance(plan, _Parameters) else {}
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            place = f"{type(module).__name__} {path!r}"
            weight = weights.get(name)
            if isinstance(plan, _Layer) and isinstance(module, nn.MultiheadAttention):
                way: object = (name, "attention")
            elif isinstance(plan, _Layer):
                way = "layer" if not is_huggingface_conv1d(module) else TRANSPOSED
            elif weight is not None and weight.taken:
                way = (weight.view or "layer", weight.batch) if weight.batch > 1 else (weight.view or "layer")
            elif module in parts:
                way = "graph"
            else:
                held.setdefault(id(parameter), f"its weight is shared with {place}, which needs it in float")
                continue
            first, other = ways.setdefault(id(parameter), (way, module))
            if first != way or (way == "graph" and other is not module):
                held.setdefault(
                    id(parameter),
                    f"its weight is shared with {type(other).__name__} {modules[other]!r} and {place}, which use it in "
                    "different ways",
                )
    return held


def _tile_graph(module: fx.GraphModule, scope: Scope) -> None:
    """Rewrite a graph module that the user's model holds."""
    if not isinstance(module, TiledGraph):
        become(module, adopt(module, module.graph))
    run_passes(module, training_pipeline(scope))


def _tile_layer(module: nn.Module, scope: Scope) -> None:
    """Let a layer module be the graph of its tile, scale and layer; unless it is left alone."""
    if isinstance(module, nn.MultiheadAttention):
        gm = attention_module(module)
    else:
        shell = nn.Module()
        shell.__dict__ = {
            **module.__dict__,
            **{name: module.__dict__[name].copy() for name in ("_parameters", "_buffers", "_modules")},
        }
        gm = adopt(shell, float_graph(module), layer_graph_class(type(module)), type(module).__name__)
    detach_records(gm)
    run_passes(gm, training_pipeline(scope))
    records = own_records(gm) or ()
    if any(record.spec for record in records):
        become(module, gm)
    else:
        attach_records(module, records)


def _tile_parameters(module: nn.Module, weights: tuple[_Weight, ...], scope: Scope) -> None:
    """Let the parameters of a module read as tiled weights, and record what becomes of each."""
    forms = {form.record.parameter: form for form in read_forms(module)}
    records: list[LayerRecord] = []
    for weight in weights:
        if not weight.listed:
            continue
        if weight.name in forms:
            records += [record for record in own_records(module) or () if record.parameter == weight.name]
            continue
        record = _record(module, weight, scope)
        records.append(record)
        if record.spec is not None:
            _register(module, record, scope, blended=any(form.gradual for form in forms.values()))
            forms[weight.name] = ReadForm(record, gradual=scope.config.gradual)
    if records:
        attach_records(module, records)
    if len(forms) > len(read_forms(module)):
        read_tiled(module, tuple(forms.values()))
        convert_parameters(module, "tile", scope)


def _record(module: nn.Module, weight: _Weight, scope: Scope) -> LayerRecord:
    """Decide on one parameter."""
    parameter = module._parameters.get(weight.name)
    shape: tuple[int, ...] = ()
    if parameter is not None and not isinstance(parameter, nn.parameter.UninitializedParameter):
        shape = tuple(parameter.shape[::-1] if weight.view else parameter.shape)
    name = f"{weight.name}_0" if weight.view else weight.name  # as for one of several views
    groups = int(getattr(module, "groups", 1)) if weight.name == "weight" and weight.kind.startswith("conv") else 1
    label = name if weight.name != "weight" else layer_name(name)
    record = LayerRecord(label, weight.kind, name, shape, groups, weight.view, weight.name, reason="undecided")
    reason = weight.reason or why_no_weight(parameter, shape) or (_WRITTEN if weight.written else None)
    reason = reason or _why_taken(module, record)
    if reason is not None:
        return replace(record, reason=reason)
    assert parameter is not None
    spec, text = decide(scope, parameter, name, weight.kind, shape, groups, weight.batch)
    if spec is None:
        return replace(record, reason=text)
    spec, text = with_float_input(spec, text, "code that reads a weight")
    return replace(record, spec=spec, reason=None, note=text)


def _asked_for(module: nn.Module, plan: _Layer | _Parameters, scope: Scope) -> _Layer | _Parameters:
    """A plan with the parameters that options or a file ask for, where the code alone tells nothing."""
    if isinstance(plan, _Layer):
        return plan
    return _Parameters(tuple(_as_asked(module, weight, scope) for weight in plan.weights))


def _as_asked(module: nn.Module, weight: _Weight, scope: Scope) -> _Weight:
    key, batch = join_key(scope.path, weight.name), weight.batch
    if weight.unseen:
        batch = math.prod(module._parameters[weight.name].shape[:-2])  # type: ignore[union-attr]
    if scope.specs is not None:
        for name, view in ((key, ""), (f"{key}_0", TRANSPOSED)):
            if name in scope.specs:
                return _Weight(weight.name, weight.kind, view, batch)
    elif weight.unseen and scope.config.tiles_parameter(key):
        return _Weight(weight.name, weight.kind, weight.view, batch)
    return weight


def _why_taken(module: nn.Module, record: LayerRecord) -> str | None:
    name = alpha_source_key(record.weight)
    return f"its module has an attribute {name!r}, the name of the alpha source" if hasattr(module, name) else None


def _register(module: nn.Module, record: LayerRecord, scope: Scope, *, blended: bool) -> None:
    """Register what training adds to a module; ``blended``: another of its weights is blended already."""
    assert record.spec is not None
    parameter = module._parameters[record.parameter]
    assert parameter is not None
    if record.spec.alpha_source == "A":
        source = alpha_source(scope, parameter, record.shape, record.view)
        module.register_parameter(alpha_source_key(record.weight), source)
    if scope.config.gradual and not blended:
        if hasattr(module, STRENGTH):
            raise TransformError(
                f"{type(module).__name__} has an attribute {STRENGTH!r}, the name under which gradual tiling keeps its "
                "state: rename it"
            )
        module.register_buffer(STRENGTH, torch.zeros((), device=parameter.device))
