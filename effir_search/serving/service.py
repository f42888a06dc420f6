"""What the server answers, whichever way it is asked: hits, documents, embeddings. Every value is checked here."""

import json
from typing import NamedTuple

from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.files.reading import read_json
from effir_search.model.save import TRAINING_FILE
from effir_search.serving.batching import Batcher, Embeddings
from effir_search.serving.indexes import Indexes, ServedIndex
from effir_search.serving.refusal import Refusal
from effir_search.settings import ServeSettings
from effir_search.text.checks import check_unicode
from effir_search.text.corpus import Document

# Hits of a search that does not say how many.
HITS = 10
# Characters of all texts in one answer.
ANSWER_LENGTH = 8_000_000
QUERY, DOCUMENT = "query", "document"


class Hit(NamedTuple):
    """A hit with its document; ``document`` is None where there is no text of it."""

    doc_id: str
    score: float
    rank: int
    document: Document | None


class EmbeddingModel(NamedTuple):
    """A model that gives embeddings, and how: ``side`` is "query", "document" or None = both have one prompt."""

    encoder: Encoder
    side: str | None


class Service:
    """The indexes, and what answers requests on them.

    Attributes:
        indexes: See ``Indexes``.
        batcher: See ``Batcher``.
        settings: What a request may ask for.
    """

    def __init__(self, indexes: Indexes, batcher: Batcher, settings: ServeSettings) -> None:
        self.indexes, self.batcher, self.settings = indexes, batcher, settings

    def index(self, name: str) -> ServedIndex:
        """Return the index of a name.

        Raises:
            Refusal: There is none.
        """
        index = self.indexes.by_name.get(name)
        if index is None:
            raise Refusal(404, f"there is no index {shown(name)}; there are: {', '.join(self.indexes.by_name)}")
        return index

    async def search(self, name: str, query: object, hits: object = HITS) -> list[Hit]:
        """Return the best hits of a query, best first.

        Raises:
            Refusal: An unknown index, a query that is no text, empty or too long; hits out of range.
        """
        index = self.index(name)
        text, number = self.checked_query(query), self.checked_hits(hits)
        found = await self.batcher.search(index.searcher, text, number)
        documents = index.documents(hit.doc_id for hit in found)
        return [Hit(hit.doc_id, hit.score, rank, documents.get(hit.doc_id)) for rank, hit in enumerate(found, start=1)]

    def document(self, name: str, doc_id: str) -> Document:
        """Return a document.

        Raises:
            Refusal: An unknown index or document, an index without texts.
        """
        index = self.index(name)
        if not index.texts:
            raise Refusal(404, f"there are no texts of the index {name}; start the server with its --corpus")
        document = index.documents([doc_id]).get(doc_id) if is_unicode(doc_id) else None
        if document is None:
            raise Refusal(404, f"there is no document {shown(doc_id)} in the corpus of {name}")
        return document

    def checked_query(self, query: object) -> str:
        """Return a query that can be searched for, or raise a Refusal."""
        if not isinstance(query, str):
            raise Refusal(400, f"the query must be a text, not {kind_of(query)}")
        if not query.strip():
            raise Refusal(400, "the query is empty")
        if len(query) > self.settings.max_query_length:
            limit = self.settings.max_query_length
            raise Refusal(400, f"the query has {len(query):,} characters; at most {limit:,} are allowed")
        if not is_unicode(query):
            raise Refusal(400, "the query is not valid Unicode")
        return query

    def checked_hits(self, hits: object) -> int:
        """Return a number of hits that is in range, or raise a Refusal; a text of digits is a number, too."""
        number = hits
        if isinstance(hits, str) and len(hits) <= 10 and hits.isascii() and hits.removeprefix("-").isdigit():
            number = int(hits)
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= self.settings.max_hits:
            limit = self.settings.max_hits
            raise Refusal(400, f"hits must be a whole number from 1 to {limit:,}, not {shown(hits)}")
        return number

    def models(self) -> dict[str, EmbeddingModel]:
        """Return the models that give embeddings, by all names they have.

        A model is called as its folder; where two are called alike, as its index. NAME-query and NAME-document put
        the query's or the document's prompt before each text. A name that two models would have is none of them.
        """
        encoders = {id(index.searcher.encoder): index.searcher.encoder for index in self.indexes.by_name.values()}
        folders = [folder_name(encoder) for encoder in encoders.values()]
        models: dict[str, EmbeddingModel] = {}
        ambiguous = set()
        for index in self.indexes.by_name.values():
            encoder = index.searcher.encoder
            name = folder_name(encoder)
            name = name if folders.count(name) == 1 else index.name
            for side in (None, QUERY, DOCUMENT):
                full_name, model = f"{name}-{side}" if side else name, EmbeddingModel(encoder, side)
                if models.setdefault(full_name, model) != model:
                    ambiguous.add(full_name)
        return {name: model for name, model in models.items() if name not in ambiguous}

    async def embed(self, model: object, inputs: object, prompt_name: object, dimensions: object) -> Embeddings:
        """Return the embeddings of texts.

        Args:
            model: A name of ``models``.
            inputs: A text or several.
            prompt_name: "query", "document" or None = as the model's name says.
            dimensions: Leading components that are asked for; None = all.

        Raises:
            Refusal: A value that is none of these; a model with two prompts, and no word which.
        """
        models = self.models()
        if not isinstance(model, str) or model not in models:
            raise Refusal(404, f"there is no model {shown(model)}; there are: {', '.join(models)}")
        encoder, side = models[model]
        texts = self._checked_inputs(inputs)
        prompt = _prompt(encoder, model, side, prompt_name)
        size = encoder.dimension if dimensions is None else _checked_dimensions(encoder, model, dimensions)
        if size != encoder.dimension:
            encoder = encoder.with_config(dimension=size)
        return await self.batcher.encode(encoder, texts, prompt)

    def _checked_inputs(self, inputs: object) -> list[str]:
        texts = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(texts, list) or not texts:
            raise Refusal(400, f"input must be a text or a list of texts, not {kind_of(inputs)}")
        if len(texts) > self.settings.max_inputs:
            raise Refusal(400, f"input has {len(texts):,} texts; at most {self.settings.max_inputs:,} are allowed")
        for number, text in enumerate(texts):
            if isinstance(text, int | list):
                raise Refusal(400, "input must be text, not tokens: those of another tokenizer mean nothing here")
            if not isinstance(text, str):
                raise Refusal(400, f"input {number} must be a text, not {kind_of(text)}")
            if not text.strip():
                raise Refusal(400, f"input {number} is empty")
            if not is_unicode(text):
                raise Refusal(400, f"input {number} is not valid Unicode")
        return texts


def folder_name(encoder: Encoder) -> str:
    """Return the last part of the name of a model."""
    return encoder.name.rstrip("/").rpartition("/")[2] or encoder.name


def _prompt(encoder: Encoder, model: str, side: str | None, prompt_name: object) -> str:
    """Return what is put before each text, or raise a Refusal."""
    prompts = {QUERY: encoder.config.query_prompt, DOCUMENT: encoder.config.document_prompt}
    if prompt_name is not None and prompt_name not in tuple(prompts):
        raise Refusal(400, f'prompt_name must be "query" or "document", not {shown(prompt_name)}')
    if side is not None and prompt_name not in (None, side):
        raise Refusal(400, f"the model {model} is for a {side}, and prompt_name says {prompt_name}")
    side = side or prompt_name
    if side is None and prompts[QUERY] != prompts[DOCUMENT]:
        raise Refusal(400, f"{model} reads queries and documents otherwise; ask for {model}-query or {model}-document")
    return prompts[side or DOCUMENT]


def _checked_dimensions(encoder: Encoder, model: str, dimensions: object) -> int:
    """Return a number of leading components that the model was trained to be cut at, or raise a Refusal."""
    allowed = matryoshka_dimensions(encoder)
    if type(dimensions) is not int or dimensions not in allowed:  # 16.0 is no number of components
        known = ", ".join(map(str, allowed))
        raise Refusal(400, f"dimensions of {model} must be {known}, not {shown(dimensions)}")
    return dimensions


def matryoshka_dimensions(encoder: Encoder) -> list[int]:
    """Return the numbers of leading components that a model may be cut at: its own, and those it was trained with."""
    path = encoder.files.folder / TRAINING_FILE
    record = read_json(path) if path.is_file() else {}
    trained = record.get("losses", {}).get("dimensions") or []
    return sorted({size for size in trained if size < encoder.dimension} | {encoder.dimension})


def is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8."""
    try:
        check_unicode(text, "text")
    except UserError:
        return False
    return True


def shown(value: object) -> str:
    """Return a value as an error shows it: short, on one line, in ASCII."""
    if isinstance(value, str):
        return ascii(value if len(value) <= 60 else f"{value[:57]}...")
    return repr(value) if isinstance(value, int | float) else kind_of(value)


def kind_of(value: object) -> str:
    """Return what JSON calls a value."""
    if value is None:
        return "null"
    if value == [] and isinstance(value, list):
        return "an empty list"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return {bool: "true or false", list: "a list", dict: "an object"}.get(type(value), "a text")


def parsed_json(body: bytes) -> dict[str, object]:
    """Return the JSON object of a request's body.

    Raises:
        Refusal: It is none, or has a NaN or an infinity.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the body is not JSON") from error
    if not isinstance(value, dict):
        raise Refusal(400, f"the body must be a JSON object, not {kind_of(value)}")
    return value


def _refuse_constant(name: str) -> float:
    raise Refusal(400, f"the body has {name}, which is no number of JSON")
