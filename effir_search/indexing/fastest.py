"""Which backend encodes fastest on this machine, among those whose vectors are the model's own."""

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

from effir_search.encoding.encoder import Encoder
from effir_search.indexing.verify import cosine
from effir_search.model.graph_model import GRAPH_DTYPES, PACKAGES
from effir_search.model.to_graph import NoGraphError
from effir_search.settings import EncoderOptions

logger = logging.getLogger(__name__)

TRIED_TEXTS, ROUNDS = 256, 3
# A backend whose vectors have a lower mean cosine to those of float32 is not taken.
LEAST_COSINE = 0.999


def fastest_options(name: str, texts: Sequence[str], options: EncoderOptions) -> EncoderOptions:
    """Return options with the backend that encodes texts fastest, of those that are installed and can run the model.

    Each encodes all texts three times, in turns; its median counts. On a GPU, and for an exported model, there is
    nothing to choose.

    Args:
        name: Model folder or hub name.
        texts: Documents as they are read, prompts not before them.
        options: How it is loaded; the ``backend`` is "auto".

    Raises:
        ValueError: As ``Encoder.from_pretrained``.
    """
    by_torch = Encoder.from_pretrained(name, options, backend="auto").pack()
    if by_torch.backend != "torch" or by_torch.device.type != "cpu":
        return replace(options, backend=by_torch.backend)
    encoders = {"torch": by_torch}
    for backend, package in PACKAGES.items():
        is_able = options.dtype in (None, "auto") or by_torch.dtype in GRAPH_DTYPES[backend].values()
        if is_able and all(find_spec(needed) is not None for needed in (package, "onnx", "onnxscript")):
            try:
                encoders[backend] = Encoder.from_pretrained(name, options, backend=backend, device="cpu")
            except NoGraphError as error:
                logger.info("torch encodes: %s", error)
                return replace(options, backend="torch")
    if len(encoders) == 1:
        logger.info("torch encodes, as no other backend is installed (the extra export has them)")
        return replace(options, backend="torch")
    wanted = Encoder.from_pretrained(name, options, backend="torch", dtype="fp32").encode_documents(texts)
    seconds: dict[str, list[float]] = {backend: [] for backend in encoders}
    cosines = {}
    for turn in range(ROUNDS + 1):
        for backend, encoder in encoders.items():
            begun = time.perf_counter()
            embeddings = encoder.encode_documents(texts)
            if turn:  # the first one warms up
                seconds[backend].append(time.perf_counter() - begun)
            cosines[backend] = float(cosine(embeddings, wanted).mean())
    speeds = {backend: len(texts) / statistics.median(values) for backend, values in seconds.items()}
    close = [backend for backend in encoders if cosines[backend] >= LEAST_COSINE]
    fastest = max(close or ["torch"], key=speeds.__getitem__)
    shown = ", ".join(
        f"{backend} {speed:.0f} (cosine to float32 {cosines[backend]:.4f})" for backend, speed in speeds.items()
    )
    logger.info("documents a second: %s; %s encodes", shown, fastest)
    return replace(options, backend=fastest)
