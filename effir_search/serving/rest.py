"""Pyserini's REST paths: those of 2.x, ``/v1/INDEX/search``, and those of 1.6, ``/v1/indexes/INDEX/search``."""

import json

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from effir_search.serving.refusal import Refusal
from effir_search.serving.service import ANSWER_LENGTH, HITS, Hit, Service, parsed_json, shown
from effir_search.text.corpus import Document, document_text


class Rest:
    """The routes; each method of them answers one path."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Return the routes of both versions."""
        one_six = "/v1/indexes/{index}"
        return [
            Route("/v1/{index}/search", self.search, methods=["GET"]),
            Route("/v1/{index}/doc/{docid:path}", self.document, methods=["GET"]),
            Route("/v1/indexes", self.list_indexes, methods=["GET"]),
            Route("/v1/indexes/", self.list_names, methods=["GET"]),
            Route(f"{one_six}/search", self.search_1, methods=["POST"]),
            Route(f"{one_six}/documents/{{docid:path}}", self.document_1, methods=["GET"]),
            Route(f"{one_six}/status", self.status_1, methods=["GET"]),
        ]

    async def search(self, request: Request) -> Response:
        """GET /v1/INDEX/search?query=&hits=&parse=&max_doc_length=."""
        name, parameters = request.path_params["index"], request.query_params
        parse = flag(parameters.get("parse"), "parse")
        length = doc_length(parameters.get("max_doc_length"))
        found = await self._service.search(name, parameters.get("query", ""), parameters.get("hits") or HITS)
        check_length(found, length)
        candidates = [
            {"docid": hit.doc_id, "score": hit.score, "rank": hit.rank, "doc": payload(hit.document, parse, length)}
            for hit in found
        ]
        query = {"text": parameters["query"]}
        return JSONResponse({"api": "v1", "index": name, "query": query, "candidates": candidates})

    async def document(self, request: Request) -> Response:
        """GET /v1/INDEX/doc/DOCID?parse=."""
        name, doc_id = request.path_params["index"], request.path_params["docid"]
        parse = flag(request.query_params.get("parse"), "parse")
        doc = payload(self._service.document(name, doc_id), parse, None)
        return JSONResponse({"api": "v1", "index": name, "docid": doc_id, "doc": doc})

    async def list_indexes(self, request: Request) -> Response:
        """GET /v1/indexes, which is not Pyserini's: what there is, for the page and for agents."""
        return JSONResponse({"api": "v1", "indexes": index_list(self._service)})

    async def search_1(self, request: Request) -> Response:
        """POST /v1/indexes/INDEX/search {query, hits, qid}."""
        name, body = request.path_params["index"], parsed_json(await request.body())
        query, qid = body.get("query", ""), body.get("qid", "")
        if isinstance(query, dict):
            query, qid = query.get("query_txt", ""), query.get("qid", qid)
        if not isinstance(qid, str):
            raise Refusal(400, f"qid must be a text, not {shown(qid)}")
        found = await self._service.search(name, query, body.get("hits", HITS))
        check_length(found, None)
        asked = {"qid": qid, "query_txt": query, "query_img_path": None, "query_modality": "text", "fp16": False}
        candidates = [
            {
                "docid": hit.doc_id,
                "score": hit.score,
                "document_txt": document_text(hit.document) if hit.document else "",
                "document_img_path": None,
                "encoded_img": None,
            }
            for hit in found
        ]
        return JSONResponse({"query": asked, "candidates": candidates})

    async def document_1(self, request: Request) -> Response:
        """GET /v1/indexes/INDEX/documents/DOCID."""
        return JSONResponse(record(self._service.document(request.path_params["index"], request.path_params["docid"])))

    async def status_1(self, request: Request) -> Response:
        """GET /v1/indexes/INDEX/status."""
        index = self._service.index(request.path_params["index"])
        return JSONResponse({"downloaded": True, "size_bytes": str(index.num_bytes)})

    async def list_names(self, request: Request) -> Response:
        """GET /v1/indexes/?index_type=: names alone."""
        return JSONResponse(list(self._service.indexes.by_name))


def index_list(service: Service) -> list[dict[str, object]]:
    """Return what there is to say of each index."""
    return [
        {
            "name": index.name,
            "documents": index.num_documents,
            "dimension": index.searcher.encoder.dimension,
            "kind": index.info.kind if index.info else None,
            "has_texts": bool(index.texts),
        }
        for index in service.indexes.by_name.values()
    ]


def record(document: Document) -> dict[str, str]:
    """Return a document as a line of BEIR's corpora has it."""
    return {"_id": document.doc_id, "title": document.title, "text": document.text}


def payload(document: Document | None, parse: bool, length: int | None) -> dict[str, str] | str | None:  # noqa: FBT001
    """Return what Pyserini calls the doc of a hit: its fields without the id, or with ``parse=false`` its JSON."""
    if document is None:
        return None
    if length is not None:
        document = document._replace(title=document.title[:length], text=document.text[:length])
    return {"title": document.title, "text": document.text} if parse else json.dumps(record(document))


def check_length(hits: list[Hit], length: int | None) -> None:
    """Raise a Refusal if the texts of an answer are longer together than one answer may be."""
    lengths = [len(text) for hit in hits if hit.document for text in (hit.document.title, hit.document.text)]
    if sum(lengths if length is None else [min(one, length) for one in lengths]) > ANSWER_LENGTH:
        raise Refusal(400, "the texts of so many hits are too long for one answer; ask for fewer hits")


def flag(value: str | None, name: str) -> bool:
    """Return "true" or "false" as a truth value; nothing is true."""
    values = {None: True, "true": True, "false": False}
    if (key := value and value.strip().lower()) not in values:
        raise Refusal(400, f'{name} must be "true" or "false", not {shown(value)}')
    return values[key]


def doc_length(value: str | None) -> int | None:
    """Return the characters of each text that are asked for; None = all."""
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 9 and int(value) > 0):
        raise Refusal(400, f"max_doc_length must be a whole number of characters, not {shown(value)}")
    return int(value)
