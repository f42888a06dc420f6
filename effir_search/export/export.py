"""A model folder with a graph in place of weights, as sentence-transformers and this project open it."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.encoding.same_space import learned_spaces
from effir_search.evaluation.benchmark import Benchmark, benchmark, collection_files, format_benchmark
from effir_search.export.gguf_writer import write_gguf
from effir_search.export.int8 import write_int8
from effir_search.files.reading import read_json
from effir_search.files.whole import refuse_existing, whole_folder
from effir_search.indexing.verify import cosine
from effir_search.model.checkpoint import lasting_name, quiet_transformers
from effir_search.model.graph_model import EXPORT_FILE, GRAPH_FILES, OWN_CONFIG, PACKAGES, graph_files, require_packages
from effir_search.model.modeling_effir import EffirConfig
from effir_search.model.save import HEADER, SPACES_FIELD, WEIGHTS_FIELD
from effir_search.model.sentence_files import write_sentence_files
from effir_search.pruning.calibration import Calibration, sample_texts
from effir_search.settings import EncoderOptions, EvaluationSettings, ExportSettings, TextSettings

logger = logging.getLogger(__name__)

# Texts on which an export is compared with its model where none are given.
OWN_TEXTS = ("a dense retriever", "What is left of a model when half of its MLPs are dropped?", "word " * 40)
# Texts that speed is measured on.
TIMED_TEXTS = 512
# An export in float32 whose vectors are further from the model's is no export of it.
LEAST_COSINE = 0.99999


@dataclass(frozen=True)
class Export:
    """What was exported, as ``effir_export.json`` has it; beside these it says whose vectors the graph gives.

    Attributes:
        model: Folder or hub name of the source, without its path.
        model_sha256: See ``model.checkpoint.weights_sha256``.
        to: "onnx" or "openvino".
        int8: Whether matrix products are in int8.
        cosine: Mean, between the embeddings of the texts compared on and the model's in float32.
        compared: How many texts these were.
        calibration: What ranges were read off, see ``Calibration.record``; None without int8.
    """

    model: str
    model_sha256: str
    to: str
    int8: bool
    cosine: float
    compared: int
    calibration: dict | None


def export_graph(
    name: str, output: Path, settings: ExportSettings, options: EncoderOptions = DEFAULT_OPTIONS
) -> Export:
    """Write a model folder that ONNX Runtime or OpenVINO runs, whole or not at all.

    Args:
        name: Model folder or hub name; pruned or not.
        output: The new folder.
        settings: The format, and whether it is to be in int8.
        options: How a text becomes a vector, where that is not to be what the model's files say.

    Raises:
        ValueError: A model that cannot be written as a graph, or whose graph computes something else.
        ModuleNotFoundError: A package of the extra ``export`` is missing.
        OSError: ``output`` exists, or cannot be written.
    """
    refuse_existing(output, replaces=())
    require_packages(PACKAGES[settings.to])
    encoder = Encoder.from_pretrained(name, options, backend="torch", device="cpu", dtype="fp32")
    sample, compared = _texts(settings)
    with whole_folder(output) as folder:
        file = folder / GRAPH_FILES[settings.to]
        file.parent.mkdir()
        _write_graph(encoder, file, settings, sample)
        _write_settings(encoder, folder)
        graph = Encoder.from_pretrained(folder, dtype="fp32")
        mean = float(cosine(graph.encode_documents(compared), encoder.encode_documents(compared)).mean())
        if not settings.int8 and mean < LEAST_COSINE:
            raise RuntimeError(f"the graph is not the model: its vectors have a mean cosine of {mean:.6f} to it")
        export = Export(
            model=lasting_name(name),
            model_sha256=encoder.weights_sha256,
            to=settings.to,
            int8=settings.int8,
            cosine=mean,
            compared=len(compared),
            calibration=sample.record(encoder.config.max_length) if settings.int8 else None,
        )
        spaces = [asdict(space) for space in learned_spaces(encoder, encoder.dimension)]
        record = asdict(export) | {WEIGHTS_FIELD: graph.weights_sha256, SPACES_FIELD: spaces}
        (folder / EXPORT_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(export, output.name), encoding="utf-8")
    return export


def export_gguf(name: str, output: Path, settings: ExportSettings, options: EncoderOptions = DEFAULT_OPTIONS) -> str:
    """Write a model as a GGUF file, see ``gguf_writer.write_gguf``; return what it is.

    Args:
        name: Model folder or hub name.
        output: The new file.
        settings: What matrices are stored as.
        options: As for ``export_graph``.
    """
    encoder = Encoder.from_pretrained(name, options, backend="torch", device="cpu", dtype="saved")
    write_gguf(encoder, output, weights=settings.weights)
    return f"{lasting_name(name)} for llama.cpp, {settings.weights}, {output.stat().st_size:,} bytes -> {output}"


def _texts(settings: ExportSettings) -> tuple[Calibration | None, Sequence[str]]:
    """Return the texts that ranges are read off, and others that both models are compared on."""
    if not settings.texts:
        return None, OWN_TEXTS
    both = sample_texts(settings.texts, size=settings.num_texts * 3 // 2, seed=settings.seed)
    # Texts of several sources come one source after the other.
    compared = both.texts[2::3]
    calibrated = [text for place, text in enumerate(both.texts) if place % 3 < 2]
    if len(both.texts) < 3:
        calibrated = compared = both.texts
        if settings.int8:
            logger.warning("only %d texts to read ranges off, which are compared on as well", len(both.texts))
    elif settings.int8 and len(calibrated) < settings.num_texts:
        logger.warning("ranges are read off %d texts, all that there are", len(calibrated))
    return both._replace(texts=calibrated), compared


def _write_graph(encoder: Encoder, file: Path, settings: ExportSettings, sample: Calibration | None) -> None:
    if settings.to == "onnx":
        encoder.write_onnx(file)
        return
    import openvino

    with TemporaryDirectory() as temporary:
        onnx = Path(temporary, "model.onnx")
        encoder.write_onnx(onnx)
        if settings.int8:
            write_int8(encoder, onnx, sample.texts, file)
        else:
            openvino.save_model(openvino.Core().read_model(onnx), file, compress_to_fp16=False)


def _write_settings(encoder: Encoder, folder: Path) -> None:
    """Write the config, the tokenizer and sentence-transformers' files."""
    config = encoder.model.config
    config.name_or_path = ""  # a path of this machine has no place in a saved config
    with quiet_transformers():
        if isinstance(config, EffirConfig):
            config.to_json_file(folder / OWN_CONFIG, use_diff=False)
            config.base_config.to_json_file(folder / "config.json")
        else:
            config.to_json_file(folder / "config.json")
        encoder.tokenizer.save_pretrained(folder)
    # The runtimes' bridges to sentence-transformers want transformers 4, which has another name for the same class.
    file = folder / "tokenizer_config.json"
    settings = read_json(file)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_sentence_files(folder, encoder.own_files(), hidden_size=config.hidden_size)


def _card(export: Export, name: str) -> str:
    numbers = "int8, weights and activations" if export.int8 else "float32"
    return f"""{HEADER}
# {name}

{export.model} as a graph for {export.to}, {numbers}. The mean cosine of its embeddings to those of
{export.model} in float32 is {export.cosine:.5f}, on {export.compared} texts.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}", backend="{export.to}")
model.encode_query(["what is pruned?"])
```

It is an encoder for the commands of effir_search as well. `{EXPORT_FILE}` says what it was made from.
"""


def describe_export(export: Export, measured: Benchmark | None, output: Path) -> str:
    """Return what an export is, and with a comparison what it costs and gains beside its model."""
    numbers = "int8" if export.int8 else "float32"
    lines = [f"{export.model} for {export.to}, {numbers} -> {output}"]
    size = sum(file.stat().st_size for file in graph_files(output))
    lines.append(f"{size:,} bytes; the mean cosine to the model's embeddings in float32 is {export.cosine:.5f}")
    if measured is not None:
        lines += ["", format_benchmark(measured, names=("original", "export"), sizes=False)]
    return "\n".join(lines)


def compare_export(
    name: str, output: Path, settings: ExportSettings, evaluation: EvaluationSettings, options: EncoderOptions
) -> Benchmark | None:
    """Return an export beside its model, both as they run on this machine; None without texts and collections.

    Args:
        name: The model.
        output: Its export.
        settings: Where texts are that speed is measured on.
        evaluation: Collections.
        options: As for ``export_graph``.
    """
    sources = settings.texts or [str(collection_files(Path(c), evaluation.split)[0]) for c in evaluation.collections]
    if not sources:
        return None
    texts = sample_texts(sources, size=max(TIMED_TEXTS, len(sources)), seed=settings.seed).texts
    text = TextSettings(**{f.name: getattr(options, f.name) for f in fields(TextSettings)})
    both = EncoderOptions(max_length=options.max_length, stock_architecture=options.stock_architecture)
    with TemporaryDirectory() as folder:
        return benchmark(name, str(output), Path(folder), texts=texts, settings=evaluation, options=both, text=text)
