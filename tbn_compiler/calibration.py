"""Fitting a tiled network to what it will meet, without training: alphas to a float model, input scales to inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tbn_compiler.compiler import lower, unwrap
from tbn_compiler.errors import TransformError
from tbn_compiler.graph.copying import copy_with_tensors
from tbn_compiler.graph.records import (
    LayerRecord,
    alpha_key,
    alpha_source_key,
    get_records,
    input_log_scale_key,
    input_scale_key,
    own_records,
    split_key,
)
from tbn_compiler.graph.shapes import split_inputs
from tbn_compiler.input_scales import find_scales
from tbn_compiler.ops.latents import alphas_of

_SMALLEST = 1e-3  # of the magnitude that a layer's alphas had: an alpha at 0 would never train


@dataclass(frozen=True)
class LayerFit:
    """What calibration made of one tiled layer.

    Attributes:
        name: qualified name of the layer.
        before: error of its result, ``|y - y_float|**2 / |y_float|**2`` over all batches, on the inputs that it gets in
            the tiled network; ``None`` for a layer that was left alone.
        after: the same with the new alphas and bias.
        reason: why it was left alone; ``None`` otherwise.
    """

    name: str
    before: float | None = None
    after: float | None = None
    reason: str | None = None


@torch.no_grad()
def calibrate(module: nn.Module, source: nn.Module, batches: Iterable[Any]) -> tuple[LayerFit, ...]:
    """Set alphas and biases so that each tiled layer gives nearly what the layer of the float model gives.

    A layer's result is linear in its alphas, ``y = sum_k alpha_k f_k(x) + b``. With ``x`` what the layer gets in the
    tiled network, whose earlier layers are calibrated by then, and ``y`` what it gives in the float one, the alphas
    are the least squares solution over all batches, and the bias takes up what is left of the mean of each channel. The
    order is AdaQuant's (Hubara et al., arXiv 2006.10518), the solution the closed form that alphas have. They stay
    positive.

    Both networks run in evaluation mode, once over the batches for each layer: some dozens of inputs are enough. Train
    from there on, or estimate the statistics of batch-norm again (``torch.optim.swa_utils.update_bn``).

    Args:
        module: the result of :func:`~tbn_compiler.transform` of ``source``'s architecture, changed in place, and with
            it the biases that it shares with the model that was transformed; start with
            :func:`~tbn_compiler.init_from_float`.
        source: the trained float model.
        batches: inputs of both: each a tensor, a tuple of the arguments of ``forward``, or a dictionary of them.

    Returns:
        What became of each tiled layer, in the order in which they run. Left alone, with the reason, are layers
        whose alphas come from the weight (``alpha_source="W"``), that are called more than once, attentions, and
        parameters that functions use.

    Raises:
        TransformError: no layer is tiled, ``batches`` is empty, or ``source`` has no such layer.

    Example:
        >>> import tbn_compiler as tbn
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
        >>> qat = tbn.init_from_float(tbn.transform(model, tbn.TilingConfig(min_size=0)))
        >>> fits = tbn.calibrate(qat, model, [torch.randn(32, 64)])
        >>> all(fit.after <= fit.before for fit in fits)
        True
    """
    module = unwrap(module, TransformError)
    # A tiled model shares its biases with the float one that it was made from: the latter must stay as it is.
    source = copy_with_tensors(unwrap(source, TransformError))
    kept = list(batches)
    if not kept:
        raise TransformError("calibration needs at least one batch")
    with _evaluating(module), _evaluating(source):
        order = _layers_in_order(module, kept[0])
        return tuple(_fit(module, source, name, reason, kept) for name, reason in order)


@torch.no_grad()
def calibrate_inputs(module: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """Set the scales of the inputs of layers with ``input_scale="layer"`` to what the inputs are.

    Each becomes the one with the least mean square error of all elements, those beyond its range included, over all
    batches: ``int8`` ranges are chosen from a histogram of magnitudes, and a ``"binary"`` scale is the mean magnitude.
    The network runs once over the batches, in evaluation mode and with these layers' inputs in floating point. Do it
    before training, after :func:`~tbn_compiler.init_from_float` if that is used.

    Args:
        module: the result of :func:`~tbn_compiler.transform` or :func:`~tbn_compiler.lower`, changed in place.
        batches: inputs: each a tensor, a tuple of the arguments of ``forward``, or a dictionary of them by name.

    Returns:
        The scale of each layer by its name. A layer that no batch reaches with anything but zeros keeps its own, and is
        not among them.

    Raises:
        TransformError: no layer has such a scale.
        TBNError: ``batches`` is empty, or an input of a layer is not finite.

    Example:
        >>> import tbn_compiler as tbn
        >>> config = tbn.TilingConfig(min_size=0, activation="int8", input_scale="layer")
        >>> qat = tbn.transform(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), config)
        >>> scales = tbn.calibrate_inputs(qat, [torch.randn(32, 64)])
        >>> list(scales)
        ['0', '2']
    """
    module = unwrap(module, TransformError)
    names: dict[Tensor, str] = {}
    for record in get_records(module) or ():
        if record.spec is not None and record.spec.input_scale == "layer":
            for key in (input_log_scale_key(record.weight), input_scale_key(record.weight)):
                path, name = split_key(key)
                value = getattr(module.get_submodule(path), name, None)
                if isinstance(value, Tensor):
                    names.setdefault(value, record.name)
    if not names:
        raise TransformError(
            f"no layer of {type(module).__name__} has one scale for its inputs: transform it with "
            "TilingConfig(activation=..., input_scale='layer')"
        )
    with _evaluating(module):
        found = find_scales(module, batches, list(names))
    scales = {}
    for (tensor, name), scale in zip(names.items(), found, strict=True):
        if scale:
            tensor.fill_(math.log(scale) if isinstance(tensor, nn.Parameter) else scale)
            scales[name] = scale
    return scales


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _tiled_records(layer: nn.Module) -> list[LayerRecord]:
    return [record for record in own_records(layer) or () if record.spec is not None]


def _layers_in_order(module: nn.Module, batch: Any) -> list[tuple[str, str | None]]:
    """The tiled layers in the order in which they run, each with the reason why it is left alone, if there is one."""
    layers = {path: part for path, part in module.named_modules() if _tiled_records(part)}
    if not layers:
        raise TransformError(f"{type(module).__name__} has no tiled layer: pass what tbn_compiler.transform returned")
    calls: list[str] = []

    def note(path: str) -> Callable[..., None]:
        return lambda *_: calls.append(path)

    handles = [part.register_forward_hook(note(path)) for path, part in layers.items()]
    try:
        _run(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for path in dict.fromkeys([*calls, *layers]):
        (record, *others), part = _tiled_records(layers[path]), layers[path]
        assert record.spec is not None
        reason = None
        if not isinstance(part, fx.GraphModule):
            reason = "functions use its parameters"
        elif others or record.weight != "weight":
            reason = "it has several weights"
        elif calls.count(path) != 1:
            reason = f"it is called {calls.count(path)} times"
        elif record.spec.alpha_source == "W":
            reason = "its alphas come from its weight"
        found.append((path, reason))
    return found


def _run(module: nn.Module, batch: Any) -> Any:
    arguments, options = split_inputs(batch)
    return module(*arguments, **options)


def _seen(module: nn.Module, name: str, batch: Any) -> tuple[Any, Tensor]:
    """The arguments and the result of a layer while a network runs."""
    seen: list[Any] = []
    layer = module.get_submodule(name)
    handle = layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs, output)))
    try:
        _run(module, batch)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise TransformError(f"layer {name!r} of {type(module).__name__} runs {len(seen)} times, not once")
    inputs, result = seen[0]
    return inputs, result


def _fit(module: nn.Module, source: nn.Module, name: str, reason: str | None, batches: list[Any]) -> LayerFit:
    if reason is not None:
        return LayerFit(name, reason=reason)
    layer: Any = module.get_submodule(name)
    try:
        source.get_submodule(name)
    except AttributeError:
        raise TransformError(f"{type(source).__name__} has no layer {name!r}") from None
    (record,) = _tiled_records(layer)
    assert record.spec is not None
    k = record.spec.num_alphas
    pairs = [(_seen(module, name, batch)[0], _seen(source, name, batch)[1].double()) for batch in batches]
    packed: Any = copy_with_tensors(lower(layer))
    stored, bias = packed.get_buffer(alpha_key(record.weight)), packed._parameters.get("bias")

    def results(alpha: Tensor) -> list[Tensor]:
        stored.copy_(alpha)
        return [packed(*inputs).double() for inputs, _ in pairs]

    old = stored.clone()
    constant = results(torch.zeros_like(old))
    parts = [results(unit) for unit in torch.eye(k, dtype=old.dtype, device=old.device)]
    gram, right = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    for index, (_, wanted) in enumerate(pairs):
        rest = wanted - constant[index]
        basis = torch.stack([(part[index] - constant[index]).flatten() for part in parts])
        if bias is not None:  # which takes the means
            rest, basis = (
                _centred(rest, layer),
                torch.stack([_centred(row.view_as(rest), layer).flatten() for row in basis]),
            )
        gram += (basis @ basis.t()).cpu()
        right += (basis @ rest.flatten()).cpu()
    floor = _SMALLEST * old.abs().mean().double().cpu()
    new = torch.linalg.lstsq(gram, right[:, None]).solution[:, 0].clamp(min=floor).to(old)
    before = _error(results(old), pairs)
    found = results(new)
    if bias is not None:
        change = _mean_of_channels([wanted - result for (_, wanted), result in zip(pairs, found, strict=True)], layer)
        bias.add_(change.to(bias.dtype))
        found = results(new)
    after = _error(found, pairs)
    if after < before:
        _set_alphas(layer, record, new)
        if bias is not None:
            layer._parameters["bias"].copy_(bias)
    return LayerFit(name, before, min(before, after))


def _channel_axis(layer: Any) -> int:
    return -1 - len(getattr(layer, "kernel_size", ()))


def _others(value: Tensor, layer: Any) -> list[int]:
    return [axis for axis in range(value.dim()) if axis != value.dim() + _channel_axis(layer)]


def _centred(value: Tensor, layer: Any) -> Tensor:
    axes = _others(value, layer)
    return value - value.mean(axes, keepdim=True) if axes else value


def _mean_of_channels(values: list[Tensor], layer: Any) -> Tensor:
    sums = [value.sum(axes) if (axes := _others(value, layer)) else value for value in values]
    counts = [value.numel() // sums[0].numel() for value in values]
    return torch.stack(sums).sum(0) / sum(counts)


def _error(results: list[Tensor], pairs: list[tuple[Any, Tensor]]) -> float:
    wrong = sum(float((result - wanted).square().sum()) for result, (_, wanted) in zip(results, pairs, strict=True))
    return wrong / max(sum(float(wanted.square().sum()) for _, wanted in pairs), 1e-30)


def _set_alphas(layer: Any, record: LayerRecord, alpha: Tensor) -> None:
    """Let the alpha source give these alphas."""
    assert record.spec is not None
    layout, k = record.spec.layout, record.spec.num_alphas
    source = layer._parameters[alpha_source_key(record.weight)]
    if source.numel() == k:
        source.copy_(alpha.reshape(source.shape))
        return
    old = alphas_of(source, layout, k)
    ratio = torch.where(old > 0, alpha / old, torch.zeros_like(alpha))
    source.copy_(layout.scale(source, ratio))
    flat = torch.where(old > 0, torch.zeros_like(alpha), alpha)
    if flat.any():  # a source of zeros has no direction to keep
        source.add_(layout.scale(torch.ones_like(source), flat))
