"""Two models in one folder, a student for queries and its teacher for documents: ``effir pair``.

The folder is a Router of sentence-transformers. In it ``query`` and ``document`` are model folders of their own.
"""

import json
import shutil
from pathlib import Path

from effir_search.encoding.encoder import Encoder
from effir_search.encoding.same_space import FREE, spaces_of
from effir_search.encoding.tokenizing import append_eos_token
from effir_search.errors import UserError
from effir_search.files.whole import refuse_existing, whole_folder
from effir_search.model import families, modeling_effir
from effir_search.model.checkpoint import HUB_FILES, lasting_name, weight_files
from effir_search.model.modeling_effir import EffirConfig
from effir_search.model.save import CODE, HEADER, SPACES_FIELD, TRAINING_FILE
from effir_search.model.sentence_files import ROUTES, SETTINGS_FILE, write_sentence_files
from effir_search.settings import EncoderOptions

AS_SAVED = EncoderOptions(device="cpu", dtype="saved")
# The code of a pruned model. transformers looks for it in the uppermost folder alone.
CODE_FILES = [Path(module.__file__) for module in (modeling_effir, families)]


def pair(queries: str, documents: str, output: Path) -> None:
    """Save two models as one that encodes queries by a student and documents by its teacher: ``effir pair``.

    ``SentenceTransformer(output).encode_query`` and ``encode_document`` then give the vectors of the two. Weights are
    copied as they are. The teacher reads texts as it did when it was imitated.

    Args:
        queries: The student, folder or hub name.
        documents: The teacher.
        output: The new folder.

    Raises:
        ValueError: Models that do not share a space.
        OSError: The folder exists, or a file cannot be read or written.
    """
    refuse_existing(output, replaces=())
    student = Encoder.from_pretrained(queries, AS_SAVED)
    models = dict(zip(ROUTES, (student, _teacher(student, documents)), strict=True))
    with whole_folder(output) as folder:
        modules = {route: _write_model(encoder, folder / route) for route, encoder in models.items()}
        has_code = any(isinstance(encoder.model.config, EffirConfig) for encoder in models.values())
        for file in CODE_FILES if has_code else ():
            shutil.copyfile(file, folder / file.name)
        router = {
            "types": {name: kind for names in modules.values() for name, kind in names.items()},
            "structure": {route: list(names) for route, names in modules.items()},
            "parameters": {"default_route": "document", "allow_empty_key": False},
        }
        prompts = {"query": student.config.query_prompt, "document": models["document"].config.document_prompt}
        settings = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": student.config.similarity}
        settings |= {"truncate_dim": student.config.dimension}
        entries = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Router"}]
        for name, content in (
            ("modules.json", entries), ("router_config.json", router), (SETTINGS_FILE, settings)
        ):  # fmt: skip
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(models, output.name, has_code=has_code), encoding="utf-8")


def _teacher(student: Encoder, documents: str) -> Encoder:
    """Return the teacher as it was when the student learned to give its vectors."""
    teacher = Encoder.from_pretrained(documents, AS_SAVED)
    space = next((space for space in spaces_of(student) if space.model_sha256 == teacher.weights_sha256), None)
    if space is None:
        raise UserError(
            f"{student.name}: does not say that it gives the vectors of {documents} ({SPACES_FIELD} in its "
            f"{TRAINING_FILE}); train it with --texts and that as --teacher"
        )
    reading = {name: value for name, value in vars(space.encoder).items() if name not in FREE}
    if reading["append_eos"]:
        append_eos_token(teacher.tokenizer)
    teacher = teacher.with_config(**reading, dimension=student.config.dimension)
    if not student.dimension == teacher.dimension <= space.dimension:
        raise UserError(
            f"{student.name}: learned the first {space.dimension} components of the vectors of {documents}, and has "
            f"{student.dimension}; only models whose vectors have one length make a pair"
        )
    return teacher


def _write_model(encoder: Encoder, output: Path) -> dict[str, str]:
    """Write a model folder with the very weights of another; return its modules' types by their paths in the pair."""
    place = encoder.files.transformer_folder
    output.mkdir()
    settings = [file for pattern in HUB_FILES for file in place.glob(pattern) if file.suffix != ".safetensors"]
    code = [place / file.name for file in CODE_FILES if (place / file.name).is_file()]
    for file in (*settings, *weight_files(place), *code):
        shutil.copyfile(file, output / file.name)
    if encoder.config.append_eos:
        encoder.tokenizer.save_pretrained(output)
    write_sentence_files(output, encoder.own_files(), hidden_size=encoder.model.config.hidden_size)
    modules = json.loads((output / "modules.json").read_bytes())
    return {(Path(output.name) / module["path"]).as_posix(): module["type"] for module in modules}


def _card(models: dict[str, Encoder], name: str, *, has_code: bool) -> str:
    code = ", trust_remote_code=True" if has_code else ""
    query, document = (lasting_name(encoder.name) for encoder in models.values())
    return f'''{HEADER}
# {name}

Queries are encoded by {query}, which learned to give the vectors of {document}, and documents by {document} itself.

## Loading

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}"{code})
queries = model.encode_query(["what is pruned?"])
documents = model.encode_document(["Rose bushes are pruned in spring."])
```

`query` and `document` are the folders of the two models, each a model of its own.
''' + (f"\n{CODE}" if has_code else "")
