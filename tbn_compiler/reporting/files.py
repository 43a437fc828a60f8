"""What a packed file says of its layers, without the network that it belongs to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from tbn_compiler.fileformat import PackedHeader, read_file
from tbn_compiler.graph.records import LayerRecord, layer_name
from tbn_compiler.summary import Summary, summarize_records


def summarize_file(path: str | os.PathLike[str]) -> Summary:
    """The layers of a packed file: bits, scales, unique rows and notes.

    How often and in which layers a weight is used is not in the file, so that there are no multiply-adds.

    Raises:
        SerializationError: the file is damaged, foreign or newer than this version.
        OSError: the file cannot be read.
    """
    return summarize_records(_records(*read_file(Path(path))))


def _records(header: PackedHeader, tensors: Mapping[str, Tensor]) -> Iterator[LayerRecord]:
    for weight, layer in header.layers.items():
        shape = layer.spec.layout.shape
        yield LayerRecord(layer_name(weight), _KIND, weight, shape, spec=layer.spec, note=layer.note)
    for weight, reason in header.left_alone.items():
        stored = tensors.get(header.aliases.get(weight, weight))
        shape = () if stored is None else tuple(stored.shape)
        yield LayerRecord(layer_name(weight), _KIND, weight, shape, reason=reason)


_KIND = "weight"  # of a layer that the file does not name
