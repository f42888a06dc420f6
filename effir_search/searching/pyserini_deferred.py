"""What Pyserini imports for its own encoders, and a search by ours never uses: it is imported once it is used.

pandas, openai and sklearn are a third of what Pyserini takes to start.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

# pandas is used by its attributes, which can be looked up when they are asked for. Of the others names are imported,
# which functions can stand for.
BY_ATTRIBUTES = ("pandas",)
BY_NAMES = ("sklearn.preprocessing", "pyserini.encode._openai")


@contextmanager
def deferred_imports() -> Iterator[None]:
    """Let Pyserini be imported without what only its own encoders need; afterwards anybody can import it."""
    looked_up = {name: _stand_in(name, _attribute) for name in BY_ATTRIBUTES}
    called = {name: _stand_in(name, _function) for name in BY_NAMES}
    stand_ins = {name: module for name, module in (looked_up | called).items() if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for stand_in in stand_ins.values():
            _make_way(stand_in)


def _stand_in(name: str, value: Callable[[ModuleType, str], object]) -> ModuleType:
    """Return a module whose names have the values that are made of it and of them."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # as whoever asks for it, instead of importing it, expects

    def of_name(attribute: str) -> object:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return value(module, attribute)

    module.__getattr__ = of_name
    return module


def _attribute(stand_in: ModuleType, name: str) -> object:
    """Return what has a name in the real module."""
    _make_way(stand_in)
    return getattr(importlib.import_module(stand_in.__name__), name)


def _function(stand_in: ModuleType, name: str) -> Callable:
    """Return a function that calls what has a name in the real module."""
    return lambda *args, **options: _attribute(stand_in, name)(*args, **options)


def _make_way(stand_in: ModuleType) -> None:
    """Take a stand-in from where an import would find it."""
    name = stand_in.__name__
    package, _, short = name.rpartition(".")
    if sys.modules.get(name) is stand_in:
        del sys.modules[name]
    if package in sys.modules and vars(sys.modules[package]).get(short) is stand_in:
        delattr(sys.modules[package], short)
