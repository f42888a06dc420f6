"""Dense retrieval with Pyserini and encoders pruned by EffiR: index a corpus, search it, evaluate the run.

The package itself imports nothing heavy; ask its modules for what they are named after, as in
``from effir_search.encoding.encoder import Encoder``. The packages follow the data, and each one's ``__init__`` says
what comes in and what goes out: ``text``, ``model``, ``encoding``, ``indexing``, ``searching``, ``evaluation``,
``pruning`` and ``training``, ``compression``.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"

# Public modules that have moved: their old names still work.
MOVED = {
    "effir_search.corpus": "effir_search.text.corpus",
    "effir_search.encoder": "effir_search.encoding.encoder",
    "effir_search.evaluate": "effir_search.evaluation.measures",
    "effir_search.index": "effir_search.indexing.build",
    "effir_search.search": "effir_search.searching.search_topics",
    "effir_search.searching.search": "effir_search.searching.search_topics",
    "effir_search.trec": "effir_search.text.trec",
}


class _MovedModules(MetaPathFinder, Loader):
    """Finds a module under its old name: one with the names of the new one, and a warning."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is {new} now; the old name will go", DeprecationWarning, stacklevel=2)
        names = vars(importlib.import_module(new))
        vars(module).update({name: value for name, value in names.items() if not name.startswith("__")})


sys.meta_path.append(_MovedModules())
