"""Hugging Face transformers: ``save_pretrained`` and ``from_pretrained`` of tiled models.

A model of transformers that :func:`~tbn_compiler.transform`, :func:`~tbn_compiler.lower` or
:func:`~tbn_compiler.load` returns carries a quantizer, so that its own methods store it as what it is: its weights or
tiles in safetensors, sharded where large, and how they are tiled in ``config.json``::

    {"quantization_config": {"quant_method": "tbn", "form": "packed", "layers": {"model.layers.0.mlp.up_proj.weight":
     {"shape": [512, 128], "p": 4, ...}}, ...}}

``AutoModel*.from_pretrained`` then builds the model, tiles its layers on the meta device as that says, and loads into
them. A float checkpoint is tiled on the way with :class:`TbnConfig`::

    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=TbnConfig(tbn.TilingConfig(p=4)))

The plug-in is in use wherever both packages are imported. A program without this package cannot read such a folder:
transformers warns there of an unknown quantization type, and takes the weights that it does not find as new ones.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

import safetensors
import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tbn_compiler.compiler import judge_tiling, lower, lower_model, tile_in_place
from tbn_compiler.config import TilingConfig
from tbn_compiler.errors import ConfigError, LoweringError, SerializationError, TransformError
from tbn_compiler.fileformat import PackedHeader, StoredLayer, layer_from_data, layer_to_data
from tbn_compiler.graph.random_state import keep_random_state
from tbn_compiler.graph.records import (
    EXTRA_STATE,
    alpha_key,
    get_records,
    input_scale_key,
    is_tiling_record,
    join_key,
    own_records,
    record_holders,
    split_key,
    tile_key,
)
from tbn_compiler.graph.tiled_parameters import STRENGTH, plain_class, read_forms, read_stored, read_tiled
from tbn_compiler.graph.tiling_data import shorten
from tbn_compiler.packing import packed_size
from tbn_compiler.serialize import check_tilings, restore_records, rewritten_calls

QUANT_METHOD = "tbn"
VERSION = 1
Form: TypeAlias = Literal["train", "packed"]


@register_quantization_config(QUANT_METHOD)
class TbnConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` tiles a float checkpoint, and what ``config.json`` says of a tiled one.

    Args:
        tiling: how to tile a float checkpoint; default :class:`~tbn_compiler.TilingConfig`. A mapping of its options
            serves too. A checkpoint that is tiled already says so itself.
        form: what a float checkpoint becomes: ``"train"``, as :func:`~tbn_compiler.transform` gives, or ``"packed"``,
            as :func:`~tbn_compiler.lower` does.
        layers: of a tiled checkpoint, the tiling of each weight by name, as
            :mod:`~tbn_compiler.fileformat` writes it.
        left_alone: of a tiled checkpoint, by weight name, why each other layer is in float.
        gradual: of a tiled checkpoint, whether it is trained gradually.
        version: format version of the last three.
        quant_method: always ``"tbn"``.

    Raises:
        ConfigError: an option of the tiling is unknown or out of range.
        SerializationError: the entry of a checkpoint is damaged, or written by a later version.

    Example:
        >>> TbnConfig(TilingConfig(p=8), form="packed").form
        'packed'
    """

    def __init__(
        self,
        tiling: TilingConfig | Mapping[str, Any] | None = None,
        form: Form = "train",
        *,
        layers: Mapping[str, Any] | None = None,
        left_alone: Mapping[str, str] | None = None,
        gradual: bool = False,
        version: int = VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if type(version) is not int or not 1 <= version <= VERSION:
            raise SerializationError(
                f"quantization_config has format version {shorten(version)}; this tbn_compiler reads up to {VERSION}: "
                "upgrade it"
            )
        if unknown:
            raise SerializationError(
                f"quantization_config has the unknown field {', '.join(map(shorten, unknown))}: it may change what the "
                "tiles mean, so a later tbn_compiler must read it"
            )
        if quant_method != QUANT_METHOD:
            raise ConfigError(f"quant_method is {quant_method!r}, not {QUANT_METHOD!r}")
        if form not in get_args(Form):
            raise ConfigError(f"form={form!r} is not one of {', '.join(map(repr, get_args(Form)))}")
        if tiling is not None and not isinstance(tiling, TilingConfig):
            if not isinstance(tiling, Mapping):
                raise ConfigError(f"tiling must be a TilingConfig, got {type(tiling).__name__} {tiling!r}")
            tiling = TilingConfig(**tiling)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # that of transformers' own methods is an enum
        self.version = version
        self.form = form
        self.tiling = tiling
        self.layers = None if layers is None else _read_layers(layers)
        self.left_alone = dict(left_alone or {})
        self.gradual = bool(gradual)

    def to_dict(self) -> dict[str, Any]:
        """The entry of ``config.json``; options of a tiling that were not applied yet stand there without a filter."""
        data: dict[str, Any] = {"quant_method": self.quant_method, "version": self.version, "form": self.form}
        if self.layers is not None:
            data["layers"] = {name: layer_to_data(layer) for name, layer in self.layers.items()}
            data["left_alone"] = dict(self.left_alone)
            return data | ({"gradual": True} if self.gradual else {})
        if self.tiling is not None:
            data["tiling"] = self.tiling.to_dict()
        return data

    def describe(self, model: nn.Module) -> None:
        """Take over how a model is tiled, and whether it is lowered.

        Raises:
            SerializationError: the model holds weights of both kinds, or was rewritten since it was lowered.
        """
        records = get_records(model) or ()
        buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        tiled = [record for record in records if record.spec is not None]
        packed = {record.weight for record in tiled if tile_key(record.weight) in buffers}
        if packed and len(packed) != len(tiled):
            weight = next(record.weight for record in tiled if record.weight not in packed)
            raise SerializationError(f"some layers are lowered, and {weight!r} is not: lower the whole model")
        for weight, difference in rewritten_calls(model):
            raise SerializationError(
                f"layer {weight!r} was rewritten by tbn_compiler.optimize, which no checkpoint holds ({difference}): "
                "save the lowered model, and optimise after from_pretrained"
            )
        self.form = "packed" if packed else "train"
        self.layers = {record.weight: StoredLayer(record.spec, record.note) for record in tiled if record.spec}
        self.left_alone = {record.weight: record.reason for record in records if record.reason}
        self.gradual = any(split_key(name)[1] == STRENGTH for name in buffers)


def _read_layers(layers: Mapping[str, Any]) -> dict[str, StoredLayer]:
    if not isinstance(layers, Mapping):
        raise SerializationError(f"layers of the quantization_config are {shorten(layers)}, not an object")
    return {name: _read_layer(name, data) for name, data in layers.items()}


def _read_layer(name: str, data: Any) -> StoredLayer:
    try:
        return layer_from_data(data)
    except (ConfigError, SerializationError) as error:
        raise SerializationError(f"quantization_config, layer {name!r}: {error}") from error


def mark(root: nn.Module) -> None:
    """Let every model of transformers in a tiled model know that it is one, so that its own methods store it as such.

    :func:`~tbn_compiler.transform`, ``lower``, ``load`` and ``from_pretrained`` do so themselves. A model that was put
    together from tiled ones since, as by ``from_encoder_decoder_pretrained``, is unknown until this is called.

    Args:
        root: the model. A part that holds no tiled layer stays as it is.
    """
    described: set[int] = set()  # a model and the one inside it share their configuration: it is the outer one's
    for module in root.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        outermost = id(module.config) not in described
        described.add(id(module.config))
        config = TbnConfig()
        try:
            config.describe(module)
        except SerializationError:
            config.layers = {}  # told again when it is saved, with the reason
        if config.layers or get_records(module):
            attributes = {
                "hf_quantizer": TbnQuantizer(config),
                # Weights that train are no quantized ones: they may be cast, and trainers need no adapter for them.
                "is_quantized": config.form == "packed",
                "quantization_method": QUANT_METHOD,
            }
            for name, value in attributes.items():
                setattr(module, name, value)
            # That of a model that was loaded, and changed since.
            if outermost and hasattr(module.config, "quantization_config"):
                module.config.quantization_config = config


_Value = TypeVar("_Value")


def _named_as_in(model: PreTrainedModel, values: Mapping[str, _Value]) -> dict[str, _Value]:
    """Values by weight, under the names that the weights have in a model.

    A model and the same with a head on it load each other's checkpoints: the head's file says ``model.layers.0.fc`` of
    what the other calls ``layers.0.fc``, and has layers of its own that the other lacks.
    """
    prefix = f"{model.base_model_prefix}."
    inside = bool(model.base_model_prefix) and hasattr(model, model.base_model_prefix)  # has a head on it
    named = dict(values)
    if inside and not any(name.startswith(prefix) for name in values):
        named = {prefix + name: value for name, value in values.items()}
    elif not inside and any(name.startswith(prefix) for name in values):
        named = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    if type(model).__name__ in (model.config.architectures or ()):
        return named
    # Another class takes what it has of the checkpoint.
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in named.items() if _parameter(name) in own}


def _parameter(weight: str) -> str:
    """The parameter that a weight is, or is a view of."""
    return re.sub(r"_\d+$", "", weight)


def _dense_state(model: nn.Module) -> dict[str, Any]:
    """The ``state_dict`` of the float model with the weights that a tiled one computes with."""
    packed = lower(model)
    state = {name: value for name, value in packed.state_dict().items() if not is_tiling_record(value)}
    for record in get_records(packed) or ():
        if record.spec is None:
            continue
        for weight in (record.weight, *record.tied_weights):
            for key in (tile_key, alpha_key, input_scale_key):
                state.pop(key(weight), None)
        for parameter in (record.parameter, *record.tied):
            path, name = split_key(parameter)
            state[parameter] = getattr(packed.get_submodule(path), name).detach()
    return state


def _placeholders(model: nn.Module, layers: Mapping[str, StoredLayer]) -> Iterator[tuple[str, Tensor]]:
    """Tensors without values in the places of stored ones, by ``state_dict`` key."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for record in get_records(model) or ():
        if record.spec is None:
            continue
        spec, weight = layers[record.weight].spec, parameters[record.parameter]
        q = spec.layout.tile_size
        if spec.tile_dtype == "binary":
            yield tile_key(record.weight), weight.new_empty(packed_size(q), dtype=torch.uint8)
        else:
            yield tile_key(record.weight), weight.new_empty(q)
        yield alpha_key(record.weight), weight.new_empty(spec.num_alphas)
        if spec.input_scale == "layer":
            yield input_scale_key(record.weight), weight.new_empty(())


def _beginnings(name: str) -> list[int]:
    """Where the parts of a dotted name begin."""
    return [0, *(match.end() for match in re.finditer(r"\.", name))]


def _check_files(files: Iterable[str], config: TbnConfig) -> None:
    """Refuse files without a tensor of the tilings that ``config`` tells: they would load as layers without values.

    ``from_config`` builds the float model of a configuration, and ``save_pretrained`` writes that configuration anew.
    """
    names: set[str] = set()
    for file in files:
        if not str(file).endswith(".safetensors"):
            return
        with safetensors.safe_open(file, "pt") as opened:
            stored = list(opened.keys())
        # A part of a model that is stored whole has shorter names.
        names.update(name[place:] for name in stored for place in _beginnings(name))
    needed = {
        tile_key(weight) if config.form == "packed" else join_key(split_key(weight)[0], EXTRA_STATE)
        for weight in config.layers or ()
    }
    if files and needed and not needed & names:
        raise SerializationError(
            f"the checkpoint holds no tensor of the {len(needed)} tiled layers in its config.json, such as "
            f"{min(needed)!r}: its model was built from the configuration of a tiled one (from_config) and is float. "
            "Load it with a config whose quantization_config is deleted"
        )


@register_quantizer(QUANT_METHOD)
class TbnQuantizer(HfQuantizer):
    """What transformers asks of a quantization method: here a model is tiled, or lowered, in place."""

    quantization_config: TbnConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Give a model on the meta device the layers of its checkpoint."""
        config = self.quantization_config
        if not self.pre_quantized:
            return
        if config.layers is None:
            raise SerializationError("quantization_config of the checkpoint does not say how its layers are tiled")
        _check_files(kwargs.get("checkpoint_files") or (), config)
        packed = config.form == "packed"
        layers = _named_as_in(model, config.layers)
        if config.layers and not layers:
            raise SerializationError(f"{type(model).__name__} has none of the tiled layers of the checkpoint")
        # Alphas of packed layers come from the file: no alpha source needs to exist meanwhile.
        specs = {
            name: replace(layer.spec, alpha_source="W", latent="weight") if packed else layer.spec
            for name, layer in layers.items()
        }
        header = PackedHeader(layers, _named_as_in(model, config.left_alone), {})
        try:
            tile_in_place(model, TilingConfig(gradual=config.gradual), specs)
            check_tilings(model, header, {})
            if packed:
                lower_model(model, dict(_placeholders(model, layers)))
        except (LoweringError, SerializationError) as error:
            raise SerializationError(
                f"quantization_config of the checkpoint does not fit {type(model).__name__}: {error}. (A model that "
                "was put together from tiled parts is saved after tbn_compiler.integrations.transformers.mark(model).)"
            ) from error
        restore_records(model, header)
        for part in model.modules():
            read_stored(part)
        for _, holder in record_holders(model):
            if any(record.spec is not None for record in own_records(holder) or ()):
                # What transformers does to new weights is not for those that are computed.
                holder._is_hf_initialized = True  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Tile a float model with its weights."""
        config = self.quantization_config
        for part in model.modules():
            if forms := read_forms(part):
                read_tiled(part, forms)
        if (getattr(model, "tp_size", None) or 1) > 1:
            raise TransformError(
                "tp_plan of from_pretrained splits weights by rows, and the rows of a tile are shared by its copies: "
                "load the model without it, and split it by "
                "tbn_compiler.integrations.tensor_parallel.parallelize_module"
            )
        if not self.pre_quantized:
            offloaded = next((name for name, value in model.named_parameters() if value.is_meta), None)
            if offloaded is not None:
                raise TransformError(
                    f"parameter {offloaded!r} is offloaded, and a layer without its weight cannot be tiled: load the "
                    "float model whole, save it tiled, and load that with the device_map"
                )
            tiling = config.tiling or TilingConfig()
            tile_in_place(model, tiling)
            judge_tiling(model, tiling, set(), stacklevel=2)
            if config.form == "packed":
                lower_model(model)
            config.describe(model)
            self.pre_quantized = True
        mark(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Called before a model is saved: lets its ``config.json`` say what the model is by now."""
        self.quantization_config.describe(model)
        model.config.quantization_config = self.quantization_config
        for part in model.modules():  # parts with a configuration of their own are loaded alone by it
            if isinstance(part, PreTrainedModel) and part.config is not model.config and get_records(part):
                part.config.quantization_config = TbnConfig()
                part.config.quantization_config.describe(part)
        return None, {}

    def is_serializable(self) -> bool:
        """Tiled models can be saved, before and after lowering."""
        return True

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The dense model of a tiled one: every tiled weight as a parameter of its full size.

        Args:
            model: tiled, in training or packed, of which the class and the configuration say how it is built.
            dtype: of the result; default: that of each parameter.

        Raises:
            LoweringError: parameters are offloaded.
        """
        offloaded = next((name for name, value in model.state_dict().items() if value.is_meta), None)
        if offloaded is not None:
            raise LoweringError(f"{offloaded!r} is offloaded: load the model whole to have it dense")
        config = copy.deepcopy(model.config)
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            vars(part).pop("quantization_config", None)
        restore = keep_random_state(model)
        dense = cast("PreTrainedModel", plain_class(type(model))(config))
        restore()
        dense.load_state_dict(_dense_state(model), assign=True)
        dense.tie_weights()
        if hasattr(model, "generation_config"):
            dense.generation_config = copy.deepcopy(model.generation_config)
        if dtype is not None:
            nn.Module.to(dense, dtype=dtype)
        dense.train(model.training)
        return dense

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through the layers: adapters can be trained on packed ones."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the weights themselves train."""
        return self.quantization_config.form == "train"

    @property
    def is_compileable(self) -> bool:
        """Both forms can be compiled."""
        return True
