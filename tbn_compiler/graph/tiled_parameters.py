"""Parameters that code reads as tiled weights, without a graph around them.

A weight that a function uses (``F.linear(x, self.w)``, ``einsum``, ``x @ self.w``) belongs to a module whose forward
stays as the user wrote it. The module's class becomes a subclass in which the parameter's name is a property, as in
``torch.nn.utils.parametrize``::

    self.w    ->  scale(tile(W, p), A, k)         training, W and A being the parameters "w" and "w_alpha_source"
    self.w    ->  unpack(w_tile, w_alpha, ...)    lowered

So does a layer whose ``weight`` other code reads: both its own forward and that code see the tiled weight. The
parameter itself stays in ``parameters()``, ``named_parameters()`` and ``state_dict()`` under its name.

Modules of one class and with equal tilings share their new class, so that ``torch.compile`` compiles equal blocks once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tbn_compiler.graph.records import (
    TRANSPOSED,
    CarriesTilings,
    LayerRecord,
    alpha_key,
    alpha_source_key,
    split_key,
    tile_key,
)
from tbn_compiler.tiling import TileLayout

STRENGTH = "tiling_strength"


@dataclass(frozen=True)
class ReadForm:
    """How a property computes one weight.

    Attributes:
        record: the weight's record, as seen from its module.
        lowered: from the stored tile instead of the trained parameters.
        gradual: blended with the float weight by the module's tiling strength.
    """

    record: LayerRecord
    lowered: bool = False
    gradual: bool = False


def read_forms(module: nn.Module) -> tuple[ReadForm, ...]:
    """The forms of the parameters that a module's code reads tiled; empty for any other module."""
    found: tuple[ReadForm, ...] = getattr(type(module), "tbn_read_forms", ())
    return found


def read_tiled(module: nn.Module, forms: Sequence[ReadForm]) -> None:
    """Let code read parameters of a module as tiled weights from now on, in place.

    Args:
        module: holds the parameters and buffers that the forms name.
        forms: one for each such parameter; further parameters are read as they are.
    """
    base = plain_class(type(module))
    # The class is shared, so what it compares must not hold names or reasons that differ from block to block.
    module.__class__ = _reading_class(base, tuple(forms)) if forms else base  # type: ignore[arg-type]


def read_stored(module: nn.Module) -> None:
    """Let names of a module's tiled parameters mean these themselves, in place, until :func:`read_tiled` is called.

    A loader that finds parameters by name meets the shapes and values that are stored, not the weights they give.
    """
    forms = read_forms(module)
    if forms:
        module.__class__ = _reading_class(plain_class(type(module)), forms, tiled=False)  # type: ignore[arg-type]


def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The user's class below one that reads tiled weights."""
    return next(base for base in cls.__mro__ if "tbn_read_forms" not in base.__dict__ and base is not CarriesTilings)


@functools.cache
def _reading_class(base: type[nn.Module], forms: tuple[ReadForm, ...], tiled: bool = True) -> type[nn.Module]:
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "tbn_read_forms": forms,
    }
    if tiled:
        members |= {form.record.parameter: _property(form) for form in forms}
    return type(base.__name__, (CarriesTilings, base), members)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Pickle by the user's class, since the subclass is not importable."""
    return _restore, (plain_class(type(self)), read_forms(self)), self.__dict__.copy()


def _restore(base: type[nn.Module], forms: tuple[ReadForm, ...]) -> nn.Module:
    module: nn.Module = base.__new__(base)
    read_tiled(module, forms)
    return module


def _property(form: ReadForm) -> property:
    read = _lowered_read(form.record) if form.lowered else _training_read(form)
    return property(
        read, functools.partial(_set, form.record.parameter), functools.partial(_delete, form.record.parameter)
    )


def _set(name: str, module: nn.Module, value: Any) -> None:
    module._parameters[name] = value  # nn.Module has checked it


def _delete(name: str, module: nn.Module) -> None:
    del module._parameters[name]


def _training_read(form: ReadForm) -> Any:
    record = form.record
    spec = record.spec
    assert spec is not None
    name, transposed, gradual = record.parameter, record.view == TRANSPOSED, form.gradual
    source_name = alpha_source_key(record.weight) if spec.alpha_source == "A" else name
    layout, num_alphas, binary = spec.layout, spec.num_alphas, spec.tile_dtype == "binary"
    p, p_in, shift, batch = layout.p, layout.p_in, layout.shift, layout.batch
    alphas_in, held = layout.alphas_in(num_alphas), spec.latent == "tile"
    shape = list(layout.shape)
    options = {"p_in": p_in, "shift": shift, "batch": batch, "hadamard": layout.hadamard, "binary": binary}

    def read(self: nn.Module) -> Tensor | None:
        parameter = self._parameters.get(name)
        if parameter is None:
            if name in self._parameters:
                return None
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        weight = parameter.t() if transposed and not held else parameter
        source = weight if source_name == name else self._parameters.get(source_name)
        if source is None:  # a new module that was made by this one's class: nothing of it is tiled
            return parameter
        if held:
            whole: Tensor = torch.ops.tbn.train_weight.default(weight, source, shape, p, num_alphas, **options)
            return whole.t() if transposed else whole
        bits = torch.ops.tbn.tile.default(weight, p, **options)
        used: Tensor = torch.ops.tbn.scale.default(bits, source, num_alphas, p_in=alphas_in)
        strength = self._buffers.get(STRENGTH) if gradual else None
        if strength is not None:
            used = torch.lerp(weight, used, strength.type_as(weight))
        return used.t() if transposed else used

    return read


def _lowered_read(record: LayerRecord) -> Any:
    spec = record.spec
    assert spec is not None
    transposed, layout = record.view == TRANSPOSED, spec.layout
    tile_name, alpha_name = tile_key(record.weight), alpha_key(record.weight)

    def read(self: nn.Module) -> Tensor:
        weight = _unpack(self._buffers[tile_name], self._buffers[alpha_name], layout)  # type: ignore[arg-type]
        return weight.t() if transposed else weight

    return read


def decoded_weight(module: nn.Module, record: LayerRecord) -> Tensor:
    """The float weight ``alpha * B`` of a lowered layer, decoded from the tensors that its module stores.

    Args:
        module: holds the stored tensors.
        record: the weight's record, as seen from the module.
    """
    assert record.spec is not None
    tile, alpha = (getattr(module, split_key(key(record.weight))[1]) for key in (tile_key, alpha_key))
    return _unpack(tile, alpha, record.spec.layout)


def _unpack(tile: Tensor, alpha: Tensor, layout: TileLayout) -> Tensor:
    """By one operator: a graph then shows what is decoded, and drops it where code reads no more than its dtype."""
    options = {"p_in": layout.p_in, "shift": layout.shift, "batch": layout.batch, "hadamard": layout.hadamard}
    weight: Tensor = torch.ops.tbn.unpack.default(tile, alpha, list(layout.shape), layout.p, **options)
    return weight
