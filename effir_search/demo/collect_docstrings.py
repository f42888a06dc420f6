"""Write the docstrings of the standard library to stdout as JSON lines; run as a script, in a process of its own.

Importing every module has side effects, which is why ``standard_library`` runs this file in another process. It imports
nothing but the standard library, so that the process can leave site-packages out.
"""

import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping
from types import ClassMethodDescriptorType, ModuleType
from typing import NamedTuple

# Modules that act on import (a browser, a poem, a window), or that few people look anything up in.
SKIPPED = {"antigravity", "distutils", "idlelib", "lib2to3", "pydoc_data", "test", "this", "tkinter", "turtle"}
SKIPPED |= {"turtledemo", "xxlimited", "xxlimited_35", "xxsubtype"}
# Modules that do the work of others: importlib, os, os.path, urllib.request, dis, xml.parsers.expat and re.
SKIPPED |= {"imp", "genericpath", "nt", "ntpath", "nturl2path", "opcode", "posix", "posixpath", "pyexpat"}
SKIPPED |= {"sre_compile", "sre_constants", "sre_parse"}
SKIPPED_SUBMODULES = {"test", "tests"}
# Its submodules are one codec each, all alike.
PACKAGES_WITHOUT_SUBMODULES = {"encodings"}
# What Python says of an Enum whose author said nothing.
ENUM_DOCSTRING = "An enumeration."
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Named(NamedTuple):
    """An object under one of its public names: the name of the lowest ``rank`` is the best."""

    rank: tuple
    name: str
    obj: object
    owner: type | None = None  # the class whose member it is


class Verbatim(str):
    """A default value that a signature shows as it stands, without quotes."""

    __repr__ = str.__str__


def collect() -> list[tuple[str, str]]:
    """Return ``(name, text)`` of all modules, classes, routines and properties with a docstring, sorted by name."""
    modules = dict(_public_modules())
    public = _best_names(_module_members(modules))
    # What is a method and a function of a module, as in random, keeps the function's name, which is shorter.
    best = {**_best_names(_class_members(public)), **public}

    texts = {named.name: _text(named) for named in best.values()}
    for name, module in modules.items():
        # Where a package has a function named like its module, as in unittest.main, the name means the function.
        texts.setdefault(name, _text(Named((), name, module)))
    return sorted((name, text) for name, text in texts.items() if text)


def _public_modules() -> Iterator[tuple[str, ModuleType]]:
    for name in sorted(sys.stdlib_module_names - SKIPPED):
        if not name.startswith("_"):
            yield from _import_tree(name)
    yield "os.path", os.path


def _import_tree(name: str) -> Iterator[tuple[str, ModuleType]]:
    try:
        module = importlib.import_module(name)
    except (ImportError, AttributeError, OSError):
        # Made for another operating system, or for a library that this Python was built without.
        return
    yield name, module
    if name in PACKAGES_WITHOUT_SUBMODULES:
        return
    for submodule in sorted(found.name for found in pkgutil.iter_modules(getattr(module, "__path__", ()))):
        if not submodule.startswith("_") and submodule not in SKIPPED_SUBMODULES:
            yield from _import_tree(f"{name}.{submodule}")


def _module_members(modules: Mapping[str, ModuleType]) -> Iterator[Named]:
    """Yield every public class and routine under every name that a module offers it by."""
    for module_name, module in modules.items():
        listed = getattr(module, "__all__", None)
        for short_name in list(vars(module)) if listed is None else listed:
            try:
                obj = getattr(module, short_name, None)
            except ImportError:
                # concurrent.futures imports its executors when they are asked for, and multiprocessing may be missing.
                continue
            if short_name.startswith("_") or not (inspect.isclass(obj) or inspect.isroutine(obj)):
                continue
            home = getattr(obj, "__module__", None) or module_name
            if module_name == "builtins":
                place = 0
            elif listed is not None and home.startswith(f"{module_name}."):
                # concurrent.futures.ThreadPoolExecutor rather than concurrent.futures.thread.ThreadPoolExecutor.
                place = 1
            elif home == module_name:
                place = 2
            elif listed is not None:
                place = 3
            elif home not in modules and home.rpartition(".")[0] in ("", module_name):
                # From a private module of its own, such as _sqlite3 or xml.sax._exceptions.
                place = 4
            else:
                # Imported for the module's own use.
                continue
            alias = short_name != getattr(obj, "__name__", short_name)
            name = short_name if module_name == "builtins" else f"{module_name}.{short_name}"
            yield Named((place, alias, name.count("."), name), name, obj)


def _class_members(public: Mapping[int, Named]) -> Iterator[Named]:
    """Yield the public members that each class does not owe to another class with a public name."""
    for owner in public.values():
        if not inspect.isclass(owner.obj):
            continue
        for distance, base in enumerate(owner.obj.__mro__):
            # add_argument belongs to argparse._ActionsContainer, but is found in argparse.ArgumentParser only.
            if distance > 0 and id(base) in public:
                continue
            for short_name, obj in vars(base).items():
                if short_name.startswith("_") or not (inspect.isroutine(obj) or isinstance(obj, property)):
                    continue
                if inspect.getattr_static(owner.obj, short_name) is not obj:
                    continue
                alias = short_name != getattr(obj, "__name__", short_name)
                name = f"{owner.name}.{short_name}"
                yield Named((distance, alias, name.count("."), name), name, obj, owner.obj)


def _best_names(candidates: Iterator[Named]) -> dict[int, Named]:
    """Keep one name for each object, by the object's ``id``."""
    best: dict[int, Named] = {}
    for named in candidates:
        # A method bound to an instance, such as random.randint, is the same document as the method.
        key = id(getattr(named.obj, "__func__", named.obj))
        if key not in best or named.rank < best[key].rank:
            best[key] = named
    return best


def _text(named: Named) -> str:
    """Return signature and docstring on one line, or nothing for an object without a docstring of its own."""
    doc = _docstring(named.obj)
    if not doc:
        return ""
    call = _call(named)
    return ADDRESS.sub("", " ".join((f"{call}: {doc}" if call else doc).split()))


def _docstring(obj: object) -> str:
    doc, inherited = obj.__doc__, None if inspect.isclass(obj) else type(obj).__doc__
    if inspect.isclass(obj) and not doc and "__init__" in vars(obj):
        # concurrent.futures.ThreadPoolExecutor says what it is for in its constructor only.
        doc, inherited = obj.__init__.__doc__, object.__init__.__doc__
    return doc.strip() if isinstance(doc, str) and doc not in (inherited, ENUM_DOCSTRING) else ""


def _call(named: Named) -> str:
    """Return ``name(parameters)`` as a caller writes it, or nothing where the parameters are not known."""
    short_name = named.name.rpartition(".")[2]
    if isinstance(named.obj, property | ModuleType):
        return ""
    try:
        signature = inspect.signature(named.obj if named.owner is None else getattr(named.owner, short_name))
    except (ValueError, TypeError, AttributeError):
        # In C without a signature (most of these docstrings begin with one), or with one that cannot be evaluated.
        return ""
    parameters = list(signature.parameters.values())
    if named.owner is not None and not isinstance(named.obj, classmethod | staticmethod | ClassMethodDescriptorType):
        parameters = parameters[1:]
    plain = str(inspect.Signature([_plain(parameter) for parameter in parameters]))
    return "" if plain == "(*args, **kwargs)" else f"{short_name}{plain}"


def _plain(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return the parameter without annotation, and without a default that differs between machines."""
    default = parameter.default
    if inspect.isclass(default) and default is not parameter.empty:
        default = Verbatim(default.__name__)
    elif default is not parameter.empty and not isinstance(default, bool | int | float | str | bytes | None):
        default = Verbatim("...")
    elif isinstance(default, str) and os.path.isabs(default) and default != "/":
        default = Verbatim("...")
    return parameter.replace(default=default, annotation=parameter.empty)


def main() -> None:
    """Write one ``[name, text]`` a line to stdout, and keep out of it what the modules print."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n") as output:
        os.dup2(2, 1)
        output.writelines(json.dumps(name_and_text) + "\n" for name_and_text in collect())


if __name__ == "__main__":
    main()
