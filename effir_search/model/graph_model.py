"""A transformer as a graph, run by ONNX Runtime or OpenVINO: what stands in a model folder in place of weights.

Such a folder is what ``effir export`` writes, in the layout that sentence-transformers opens with ``backend=``::

    onnx/model.onnx  or  openvino/openvino_model.xml and .bin
    config.json           of the family's own class, whatever was dropped: the graph says what is computed
    effir_config.json     of a pruned model its own config
    effir_export.json     what the graph was made from
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from effir_search.errors import UserError

# The file of the graph in a model folder, by backend; sentence-transformers looks for the same names.
GRAPH_FILES = {"onnx": Path("onnx", "model.onnx"), "openvino": Path("openvino", "openvino_model.xml")}
PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}
# What each computes in.
GRAPH_DTYPES = {"onnx": {"fp32": torch.float32}, "openvino": {"fp32": torch.float32, "bf16": torch.bfloat16}}
OWN_CONFIG, EXPORT_FILE = "effir_config.json", "effir_export.json"
OUTPUT_NAME = "last_hidden_state"


class GraphModel:
    """A graph in the place of a transformer: called with tokens, it returns what the transformer would.

    It computes on the CPU, with as many threads as torch has, and has no weights that could be trained or saved.

    Attributes:
        config: Of the model that the graph was made from.
        dtype: Of the arithmetic, but for what is in int8.
        device: The CPU.
        input_names: What it takes.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        run: Callable[[Mapping[str, np.ndarray]], np.ndarray],
        input_names: list[str],
        source: PreTrainedModel,
        dtype: torch.dtype,
    ) -> None:
        self._run, self.input_names, self._source, self.dtype = run, input_names, source, dtype
        self.config = source.config

    def modules(self) -> Iterator[nn.Module]:
        """Return the modules of the model that the graph was made from; their weights may be on the meta device."""
        return self._source.modules()

    def num_parameters(self) -> int:
        """Return the parameters of the model that the graph was made from."""
        return self._source.num_parameters()

    def __call__(self, **tokens: Tensor) -> BaseModelOutput:
        """Return the last layer's states, ``(batch, seq, hidden_size)`` float32, for ``(batch, seq)`` tokens."""
        # A text of one sentence has type 0 everywhere, as a BERT takes it that is given none.
        of_type_0 = {"token_type_ids": torch.zeros_like(tokens["input_ids"])}
        arrays = {name: (of_type_0 | tokens)[name].numpy() for name in self.input_names}
        return BaseModelOutput(last_hidden_state=torch.from_numpy(self._run(arrays)))


def graph_backend(folder: Path) -> str | None:
    """Return the backend whose graph lies in a folder; None where there is none."""
    return next((backend for backend, file in GRAPH_FILES.items() if (folder / file).is_file()), None)


def graph_files(folder: Path) -> list[Path]:
    """Return the files of a folder's graph, in the order of their names: they are what its vectors depend on."""
    backend = graph_backend(folder)
    if backend is None:
        return []
    file = folder / GRAPH_FILES[backend]
    return sorted(file.parent.glob(f"{file.stem}.*"))  # not what a desktop or another tool has put beside them


def require_packages(*packages: str) -> None:
    """Raise ModuleNotFoundError for the first of these packages that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def load_graph(file: Path, backend: str, source: PreTrainedModel, dtype: torch.dtype) -> GraphModel:
    """Return a graph that is ready to run.

    Args:
        file: ``.onnx``, or of OpenVINO also ``.xml``.
        backend: A key of ``GRAPH_FILES``.
        source: The model that it was made from, which may be on the meta device.
        dtype: Of the arithmetic; ONNX Runtime has float32 alone.

    Raises:
        ValueError: A dtype that the backend has not, a file that is damaged or no such graph.
        ModuleNotFoundError: The backend's package is missing.
    """
    require_packages(PACKAGES[backend])
    if dtype not in GRAPH_DTYPES[backend].values():
        able = " and ".join(GRAPH_DTYPES[backend])
        raise UserError(
            f"the backend {backend} computes in {able}, not in {str(dtype).removeprefix('torch.')}; --dtype"
        )
    load = _load_onnx if backend == "onnx" else _load_openvino
    run, names, outputs = load(file, dtype)
    needed = {"input_ids", "attention_mask"}
    if OUTPUT_NAME not in outputs or not needed <= set(names) <= needed | {"token_type_ids"}:
        raise UserError(f"{file}: takes {', '.join(names)} and gives {', '.join(outputs)}, so it is no text encoder")
    return GraphModel(run, names, source, dtype)


def _load_onnx(file: Path, _dtype: torch.dtype) -> tuple[Callable, list[str], list[str]]:
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, InvalidProtobuf, NoSuchFile

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidGraph, InvalidProtobuf, NoSuchFile) as error:
        raise UserError(f"{file}: cut, damaged or no ONNX model; export it again ({_short(error)})") from error
    names, outputs = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))
    return lambda arrays: session.run([OUTPUT_NAME], arrays)[0], names, outputs


def _load_openvino(file: Path, dtype: torch.dtype) -> tuple[Callable, list[str], list[str]]:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",  # one stream, which has all threads
    }
    try:
        model = openvino.Core().compile_model(file, "CPU", settings)
    except RuntimeError as error:
        raise UserError(f"{file}: cut, damaged or no OpenVINO model; export it again ({_short(error)})") from error
    names, outputs = ([value.get_any_name() for value in values] for values in (model.inputs, model.outputs))
    request = model.create_infer_request()

    def run(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        return request.infer(dict(arrays), share_inputs=True)[OUTPUT_NAME]

    return run, names, outputs


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
