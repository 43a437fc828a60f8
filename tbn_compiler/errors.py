"""The exceptions of tbn_compiler: one small hierarchy under :class:`TBNError`.

A message names the node or layer, its shapes, why it failed and what to do about it.
"""

from __future__ import annotations


class TBNError(Exception):
    """Base class of every error that tbn_compiler raises on purpose."""


class ConfigError(TBNError, ValueError):
    """A :class:`~tbn_compiler.TilingConfig` field, override or preset is not valid."""


class TransformError(TBNError, RuntimeError):
    """A model cannot be traced or holds nothing that can be tiled."""


class LoweringError(TBNError, RuntimeError):
    """A trained module cannot be lowered exactly."""


class SerializationError(TBNError, RuntimeError):
    """A packed file is damaged, foreign, newer than this version, or does not fit the model."""


class ExportError(TBNError, RuntimeError):
    """A lowered module cannot be exported: an unsupported operator, shape or name."""
