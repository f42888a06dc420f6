"""OpenAI's paths for embeddings, as its clients call them: ``/v1/embeddings`` and ``/v1/models``."""

import base64

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from effir_search.serving.refusal import Refusal
from effir_search.serving.service import Service, parsed_json, shown

FORMATS = ("float", "base64")


class EmbeddingsApi:
    """The routes; each method of them answers one path."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
        ]

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings {model, input, encoding_format, dimensions, prompt_name, user}."""
        body = parsed_json(await request.body())
        if unknown := body.keys() - {"model", "input", "encoding_format", "dimensions", "prompt_name", "user"}:
            raise Refusal(400, f"unknown field {shown(min(unknown))}")
        form = body.get("encoding_format") or "float"
        if form not in FORMATS:
            raise Refusal(400, f'encoding_format must be "float" or "base64", not {shown(form)}')
        model = body.get("model")
        vectors, num_tokens = await self._service.embed(
            model, body.get("input"), body.get("prompt_name"), body.get("dimensions")
        )
        data = [
            {"object": "embedding", "index": number, "embedding": written(vector, form)}
            for number, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return JSONResponse({"object": "list", "data": data, "model": model, "usage": usage})

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "effir_search"} for name in self._service.models()
        ]
        return JSONResponse({"object": "list", "data": data})


def written(vector: np.ndarray, form: str) -> list[float] | str:
    """Return a vector as a list of numbers, or as the Base64 of little-endian float32."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return vector.tolist()
