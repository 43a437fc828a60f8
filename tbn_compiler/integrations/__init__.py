"""Libraries that train, store and serve models of their own: what a tiled model is to them.

Each has a module here that is imported only where the library is: ``import tbn_compiler`` loads none of them. What this
module adds at import is a look at every model that is made, and at one import that may come later.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from torch import nn

from tbn_compiler import compiler

# Each plug-in, and the module of its library behind which it is imported.
_PLUGINS = {
    "transformers.modeling_utils": "tbn_compiler.integrations.transformers",
    "peft.tuners.tuners_utils": "tbn_compiler.integrations.peft",
}


def register() -> None:
    """Let the plug-ins know of every model that is tiled or lowered, and of libraries as soon as they are imported."""
    compiler.model_observers.append(_observe)
    for library in _PLUGINS:
        if library in sys.modules:
            _import_plugin(library)
        else:
            sys.meta_path.insert(0, _AfterImport(library))


def _observe(model: nn.Module) -> None:
    """Let a model of transformers be saved as what it is now. One can only exist where that is imported."""
    plugin = sys.modules.get("tbn_compiler.integrations.transformers")
    if plugin is not None:
        plugin.mark(model)


def _import_plugin(library: str) -> None:
    """Import a plug-in; the library itself has to work where it does not fit."""
    try:
        importlib.import_module(_PLUGINS[library])
    except ImportError as error:
        name = library.partition(".")[0]
        warnings.warn(
            f"this version of {name} is not known to tbn_compiler, whose part for it is off: {error}", stacklevel=2
        )


class _AfterImport(importlib.abc.MetaPathFinder):
    """Imports a plug-in behind a module of its library, in whichever order the packages are imported."""

    def __init__(self, library: str) -> None:
        self.library = library
        self._asking = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The usual spec of that module, with the plug-in's import behind its execution."""
        if name != self.library or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:  # until the module has really been imported: some only ask for it
                    sys.meta_path.remove(self)
                _import_plugin(self.library)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
