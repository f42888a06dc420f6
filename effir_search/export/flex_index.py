"""The vectors of an index as a FlexIndex, the folder in which PyTerrier's pyterrier-dr keeps dense indexes.

Source: ``pyterrier_dr/flex/core.py`` of pyterrier-dr 0.8: ``vecs.f4``, float32 rows without a header; ``docnos.npids``,
the ids by row in the format of the package npids; ``pt_meta.json``.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from effir_search.errors import UserError
from effir_search.files.whole import refuse_existing, whole_folder
from effir_search.indexing.folder import exact_rows

VECTORS_FILE, IDS_FILE, META_FILE = "vecs.f4", "docnos.npids", "pt_meta.json"


def to_flex_index(index_dir: Path, output: Path) -> int:
    """Write the exact vectors of an index as a FlexIndex, without encoding, and return their number.

    The folder appears whole or not at all. Vectors are scaled as in the index, so that the inner product, FlexIndex's
    default, gives the index's scores.

    Args:
        index_dir: A Flat index, of this package or of Pyserini; or one of another kind whose embeddings were kept.
        output: The new folder.

    Raises:
        ValueError: The index holds no exact vectors, or is damaged.
        ModuleNotFoundError: The package npids is missing, which the extra ``pyterrier`` installs.
        OSError: ``output`` exists, or a file cannot be read or written.
    """
    import npids  # noqa: F401, a package that is missing is an error before any work

    refuse_existing(output, replaces=())
    rows = exact_rows(index_dir)
    doc_ids: list[str] = []
    dimension = 0
    with whole_folder(output) as folder:
        with open(folder / VECTORS_FILE, "wb") as file:
            for vectors, ids in tqdm(rows(), desc="Exporting", unit=" blocks", disable=None):
                file.write(np.ascontiguousarray(vectors, dtype="<f4").data)
                doc_ids += ids
                dimension = vectors.shape[1]
        if not doc_ids:
            raise UserError(f"{index_dir}: has no documents")
        if not _write_ids(doc_ids, folder / IDS_FILE):
            raise UserError(f"{index_dir}: npids, the format of a FlexIndex' ids, cannot hold those of its documents")
        meta = {"type": "dense_index", "format": "flex", "vec_size": dimension, "doc_count": len(doc_ids)}
        (folder / META_FILE).write_text(json.dumps(meta), encoding="utf-8")
    return len(doc_ids)


def _write_ids(doc_ids: Sequence[str], file: Path) -> bool:
    """Write ids in the format of npids; return whether they are read again as they are.

    npids takes the code that suits the first ids, and another block where one does not fit it. It cannot read a block
    of a single id (ZeroDivisionError), so all are one block then; a single document has no other.
    """
    from npids import Lookup

    for min_block in (None, len(doc_ids) + 1):
        file.unlink(missing_ok=True)  # it would append
        try:
            with Lookup.build(doc_ids, file, min_block=min_block) as lookup:
                return list(lookup) == doc_ids
        except ZeroDivisionError:
            continue
    return False
