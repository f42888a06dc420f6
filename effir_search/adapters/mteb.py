"""mteb: an encoder as its model, and indexes of every kind as what it searches its tasks with."""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.search_wrappers import SearchEncoderWrapper
from mteb.types import PromptType
from transformers import PreTrainedModel

from effir_search.encoding.config import own_config, scale
from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.errors import UserError
from effir_search.files.reading import file_sha256
from effir_search.indexing.build import DEFAULT_SETTINGS
from effir_search.indexing.faiss_kinds import new_index
from effir_search.indexing.folder import write_folder
from effir_search.indexing.index_record import IndexInfo
from effir_search.model.checkpoint import dtype_name
from effir_search.model.modeling_effir import EffirConfig
from effir_search.searching.pyserini_bridge import open_searcher
from effir_search.searching.searcher import available_cores
from effir_search.settings import EncoderOptions, IndexSettings
from effir_search.text.corpus import read_corpus
from effir_search.text.folders import beir_file
from effir_search.text.trec import read_qrels, read_topics

# The organisation in the name of a model that is a folder; mteb takes no name without one.
LOCAL = "effir"
# Rows that are written into an index at once.
BLOCK = 4096


class EffirEncoder(AbsEncoder):
    """An encoder of this package as a model of mteb.

    Queries and documents get the prompts of the encoder's config. Texts that a task calls neither, as those of
    clustering and of similarity, get none.

    Attributes:
        encoder: What encodes.
        mteb_model_meta: What mteb records of it. The revision is a hash of the weights and the model's own settings;
            other settings are ``experiment_kwargs``. So mteb keeps the results of each apart.
    """

    def __init__(self, model: Encoder | str | Path, options: EncoderOptions = DEFAULT_OPTIONS) -> None:
        """Take an encoder, or load one.

        Args:
            model: An encoder, or its folder or hub name.
            options: How it is loaded, if it is not there yet: ``dimension`` for the first components of a Matryoshka
                model, for example.

        Raises:
            ValueError: The folder is not a model this project can run, or an option does not fit it.
            OSError: A file cannot be read.
        """
        self.encoder = model if isinstance(model, Encoder) else Encoder.from_pretrained(model, options)
        self.mteb_model_meta = model_meta(self.encoder, options)
        if not isinstance(model, Encoder):
            self.encoder.pack()

    def encode(
        self,
        inputs: Iterable[Mapping[str, Sequence[str]]],
        *,
        prompt_type: PromptType | None = None,
        **_kwargs: object,
    ) -> np.ndarray:
        """Return ``(texts, dimension)`` float32, of length 1 where the similarity is the cosine.

        Args:
            inputs: Batches with their texts under "text"; how many of them share a forward pass is the encoder's own
                matter.
            prompt_type: Which prompt stands before each.
            _kwargs: What mteb tells besides: task, split and batch size.
        """
        config = self.encoder.config
        prompts = {PromptType.query: config.query_prompt, PromptType.document: config.document_prompt}
        texts = [text for batch in inputs for text in batch["text"]]
        return scale(self.encoder.encode(texts, prompt=prompts.get(prompt_type, "")).embeddings, config)


def model_meta(encoder: Encoder, options: EncoderOptions = DEFAULT_OPTIONS) -> ModelMeta:
    """Return what mteb records of an encoder; what nobody knows of a folder, such as its licence, is left open."""
    model, config = encoder.model, encoder.config
    is_hub_name = not Path(encoder.name).exists() and encoder.name.count("/") == 1
    own = asdict(own_config(encoder.files, model, encoder.tokenizer))
    changed = {name: value for name, value in asdict(config).items() if value != own[name]}
    arithmetic = {"dtype": dtype_name(encoder.dtype), "backend": encoder.backend}
    usual = {"dtype": "float32", "backend": "torch"}
    changed |= {name: value for name, value in arithmetic.items() if value != usual[name]}
    parameters = list(model.parameters()) if isinstance(model, PreTrainedModel) else []
    of_bytes = sum(p.numel() * p.element_size() for p in parameters)
    is_pruned = isinstance(model.config, EffirConfig)
    base = model.config.base_model if is_pruned else None
    return ModelMeta(
        loader=partial(_load, encoder.name, options),
        name=encoder.name if is_hub_name else f"{LOCAL}/{Path(encoder.name).resolve().name}",
        revision=hashlib.sha256(f"{encoder.weights_sha256}{sorted(own.items())}".encode()).hexdigest()[:40],
        release_date=None,
        languages=None,
        n_parameters=sum(p.numel() for p in parameters) or None,
        n_embedding_parameters=model.get_input_embeddings().weight.numel() if parameters else None,
        memory_usage_mb=of_bytes / 2**20 if parameters else None,
        max_tokens=config.max_length,
        embed_dim=encoder.dimension,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch" if encoder.backend == "torch" else {"onnx": "ONNX"}.get(encoder.backend, "OpenVINO")],
        similarity_fn_name=config.similarity,
        use_instructions=bool(config.query_prompt or config.document_prompt),
        training_datasets=None,
        adapted_from=base if base and "/" in base and not Path(base).exists() else None,
        experiment_kwargs=changed or None,
    )


def _load(folder: str, options: EncoderOptions, *_name: object, **_kwargs: object) -> EffirEncoder:
    """What mteb calls to load a model by its record: name, revision and device are those of the folder and options."""
    return EffirEncoder(folder, options)


class EffirIndex:
    """An index of this package as the one that mteb searches: an ``IndexEncoderSearchProtocol``.

    The vectors become a folder as ``effir index`` writes it, of any kind, which is searched through Pyserini.
    """

    def __init__(self, model: EffirEncoder, settings: IndexSettings = DEFAULT_SETTINGS) -> None:
        """Take the model and what its index becomes: ``kind`` and ``train_size``.

        Raises:
            ValueError: An unknown kind, or one that does not fit the model's dimension.
        """
        self.model, self.settings = model, settings
        new_index(settings.kind, model.encoder.dimension)
        self.clear()

    def add_documents(self, embeddings: Any, idxs: Sequence[str]) -> None:  # noqa: ANN401, an array or a tensor
        """Add ``(documents, dimension)`` and the ids of the documents."""
        self._vectors.append(np.asarray(embeddings, dtype=np.float32))
        self._doc_ids += list(idxs)
        self._close()

    def search(
        self,
        embeddings: Any,  # noqa: ANN401, an array or a tensor
        top_k: int,
        similarity_fn: Callable[..., object],
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        query_idx_to_id: Mapping[int, str] | None = None,
    ) -> tuple[list[list[float]], list[list[int]]]:
        """Return scores and rows of each query's best documents, best first; at most ``top_k``.

        Args:
            embeddings: ``(queries, dimension)``, scaled as ``EffirEncoder.encode`` does.
            top_k: How many.
            similarity_fn: Not used: the inner product of scaled vectors is the model's similarity.
            top_ranked: By query id the only documents that are ranked; rows then count these.
            query_idx_to_id: The queries' ids; needed with ``top_ranked``.
        """
        queries = np.ascontiguousarray(embeddings, dtype=np.float32)
        if top_ranked is not None:
            return self._rerank(queries, top_k, [top_ranked.get(query_idx_to_id[i], ()) for i in range(len(queries))])
        names = list(map(str, range(len(queries))))
        found = self._searcher().batch_search(queries, names, min(top_k, len(self._doc_ids)), available_cores())
        hits = [found[name] for name in names]
        return [[float(hit.score) for hit in of] for of in hits], [[int(hit.docid) for hit in of] for of in hits]

    def clear(self) -> None:
        """Forget all documents."""
        self._vectors: list[np.ndarray] = []
        self._doc_ids: list[str] = []
        self._folder: tempfile.TemporaryDirectory | None = None
        self._open: Any = None

    def _close(self) -> None:
        self._folder = self._open = None

    def _searcher(self) -> Any:  # noqa: ANN401, a pyserini.search.faiss.FaissSearcher
        """The index, built from all that was added once it is searched."""
        if self._open is None:
            if not self._doc_ids:
                raise UserError("no documents were added to the index")
            self._folder = tempfile.TemporaryDirectory()
            index_dir, encoder = Path(self._folder.name, "index"), self.model.encoder
            info = write_folder(self._rows, self._info(), index_dir, self.settings)
            self._open = open_searcher(index_dir, encoder, info, ef_search=None, nprobe=None)
        return self._open

    def _rows(self) -> Iterable[tuple[np.ndarray, list[str]]]:
        """Blocks of vectors; a document's id in the folder is its row, since ids of tasks may hold white space."""
        start = 0
        for vectors in self._vectors:
            for first in range(0, len(vectors), BLOCK):
                block = vectors[first : first + BLOCK]
                yield block, list(map(str, range(start, start + len(block))))
                start += len(block)

    def _info(self) -> IndexInfo:
        encoder = self.model.encoder
        return IndexInfo(
            model=encoder.name,
            model_sha256=encoder.weights_sha256,
            encoder=encoder.config,
            dtype=dtype_name(encoder.dtype),
            dimension=encoder.dimension,
            num_documents=len(self._doc_ids),
            num_empty=0,
            num_truncated=0,
            num_skipped=0,
            corpus=None,
            corpus_fields=None,
            corpus_sha256="",
            backend=encoder.backend,
        )

    def _rerank(
        self, queries: np.ndarray, top_k: int, candidates: Sequence[Sequence[str]]
    ) -> tuple[list[list[float]], list[list[int]]]:
        """Return scores and places of each query's best candidates, best first."""
        row_of = {doc_id: row for row, doc_id in enumerate(self._doc_ids)}
        vectors = np.concatenate(self._vectors)
        scores, places = [], []
        for query, doc_ids in zip(queries, candidates, strict=True):
            products = vectors[[row_of[doc_id] for doc_id in doc_ids]] @ query
            best = np.argsort(-products, kind="stable")[:top_k]
            scores.append(products[best].tolist())
            places.append(best.tolist())
        return scores, places


def searched_with(model: EffirEncoder, settings: IndexSettings) -> SearchEncoderWrapper:
    """Return a model whose retrieval tasks mteb searches with an index of ours; an approximate kind is recorded."""
    search = SearchEncoderWrapper(model, index_backend=EffirIndex(model, settings))
    if settings.kind != "Flat":
        kind = {name: value for name, value in settings.given().items() if name in ("kind", "train_size")}
        experiment = (model.mteb_model_meta.experiment_kwargs or {}) | kind
        search.mteb_model_meta = model.mteb_model_meta.model_copy(update={"experiment_kwargs": experiment})
    return search


def collection_task(collection: Path, split: str = "test") -> AbsTaskRetrieval:
    """Return a retrieval task of mteb made of a BEIR folder; its main score is nDCG@10.

    Args:
        collection: A folder with ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/SPLIT.tsv``.
        split: Whose queries are searched. mteb leaves out those without a relevant document.

    Raises:
        ValueError: A bad line.
        OSError: A file is missing or cannot be read.
    """
    corpus, topics, qrels = (
        beir_file(collection, name) for name in ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv")
    )
    name = collection.resolve().name
    hashes = "".join(file_sha256(file) for file in (corpus, topics, qrels))
    metadata = TaskMetadata(
        name=name,
        description=f"The collection {name}.",
        dataset={"path": str(collection), "revision": hashlib.sha256(hashes.encode()).hexdigest()[:40]},
        type="Retrieval",
        category="t2t",
        eval_splits=[split],
        eval_langs=["und-Zyyy"],
        main_score="ndcg_at_10",
    )
    judgments: dict[str, dict[str, int]] = {}
    for qrel in read_qrels(str(qrels)):
        judgments.setdefault(qrel.query_id, {})[qrel.doc_id] = qrel.relevance
    documents = read_corpus(corpus)
    queries = [query for query in read_topics(str(topics)) if query.query_id in judgments]
    task = type("CollectionTask", (AbsTaskRetrieval,), {"metadata": metadata})()
    task.dataset = {
        "default": {
            split: {
                "corpus": Dataset.from_list(
                    [{"id": doc_id, "text": text, "title": title} for doc_id, text, title in documents]
                ),
                "queries": Dataset.from_list([{"id": query_id, "text": text} for query_id, text in queries]),
                "relevant_docs": judgments,
                "top_ranked": None,
            }
        }
    }
    task.data_loaded = True
    return task


def run_tasks(
    encoder: Encoder | str | Path,
    tasks: Iterable[str | mteb.AbsTask],
    output: Path,
    *,
    options: EncoderOptions = DEFAULT_OPTIONS,
    settings: IndexSettings | None = None,
) -> dict[str, float]:
    """Run tasks of mteb and return the main score of each, in their order; tasks that are done are not run again.

    Args:
        encoder: An encoder, or its folder or hub name.
        tasks: Names of tasks or of benchmarks, or tasks; data that are not on this machine are downloaded.
        output: A folder, which gets mteb's own files: ``results/MODEL/REVISION/TASK.json`` and ``model_meta.json``.
        options: How the encoder is loaded, if it is not there yet.
        settings: The index that retrieval tasks are searched with, by ``kind`` and ``train_size``; None = mteb's own
            exhaustive search.

    Raises:
        ValueError: A name that mteb does not know, a bad model, a kind of index that does not fit.
        OSError: A file cannot be read or written, or data cannot be downloaded.
    """
    chosen = [task for name in tasks for task in ([name] if isinstance(name, mteb.AbsTask) else tasks_named(name))]
    model = EffirEncoder(encoder, options)
    cache = mteb.ResultCache(output)
    scores = {}
    for task in chosen:
        searched = model
        if settings is not None and isinstance(task, AbsTaskRetrieval):
            searched = searched_with(model, settings)
        # mteb itself takes a result of other data of this name for the task's.
        done = cache.load_task_result(task.metadata.name, searched.mteb_model_meta)
        is_of_other_data = done is not None and done.dataset_revision != task.metadata.revision
        result = mteb.evaluate(
            searched,
            task,
            cache=cache,
            overwrite_strategy="always" if is_of_other_data else "only-missing",
            co2_tracker=False,
            show_progress_bar=False,
        )
        scores[task.metadata.name] = float(result.task_results[0].get_score())
    return scores


def tasks_named(name: str) -> Sequence[mteb.AbsTask]:
    """Return the task of a name, or those of the benchmark of a name.

    Raises:
        ValueError: mteb knows neither.
    """
    try:
        return [mteb.get_task(name)]
    except KeyError:
        pass
    try:
        return list(mteb.get_benchmark(name).tasks)
    except KeyError as error:
        raise UserError(f"{name}: mteb {mteb.__version__} has no task and no benchmark of this name") from error
