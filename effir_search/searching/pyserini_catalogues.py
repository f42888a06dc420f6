"""Pyserini's catalogues of prebuilt indexes, which are read once somebody asks for such an index.

Pyserini 2.4 fetches them over the network while it is imported, and cannot be imported where there is none. Here a
stand-in takes the place of its module ``prebuilt_index_info`` before that.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import Any

MODULE = "pyserini.prebuilt_index_info"


def defer_catalogues() -> None:
    """Let whatever imports Pyserini's catalogues get stand-ins, which read the real ones when they are looked into."""
    if MODULE in sys.modules:
        return
    spec = importlib.util.find_spec(MODULE)
    if spec is None:
        return
    stand_in = _Deferred(MODULE)
    stand_in.__spec__, stand_in.__file__ = spec, spec.origin
    sys.modules[MODULE] = stand_in
    importlib.import_module("pyserini").prebuilt_index_info = stand_in


@cache
def _real_module() -> ModuleType:
    """The module itself; Pyserini 2.4 needs the network for it."""
    spec = sys.modules[MODULE].__spec__
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Deferred(ModuleType):
    """The stand-in for the module: what is spelled like a catalogue is one, anything else is the module's own."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401, whatever the module has
        if name.startswith("__"):  # what the import system and inspect look for
            raise AttributeError(f"module {MODULE!r} has no attribute {name!r}")
        return _Catalogue(name) if name.endswith("_INFO") else getattr(_real_module(), name)


class _Catalogue(Mapping):
    """A catalogue: the names of indexes, and where each is to be had."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _entries(self) -> Mapping[str, Any]:
        return getattr(_real_module(), self._name)

    def __getitem__(self, index: str) -> Any:  # noqa: ANN401, as Pyserini's
        return self._entries()[index]

    def __contains__(self, index: object) -> bool:
        return index in self._entries()  # some catalogues know by a prefix whose name it is not

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries())

    def __len__(self) -> int:
        return len(self._entries())
