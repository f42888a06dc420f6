"""A torch transformer written as an ONNX graph, which ONNX Runtime and OpenVINO read."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from effir_search.errors import UserError
from effir_search.model.graph_model import OUTPUT_NAME, require_packages

# ONNX's files hold at most 2 GB; larger weights lie beside the graph.
LARGE_BYTES = 1_500_000_000


class NoGraphError(UserError):
    """A model that cannot be written as a graph."""


class _States(nn.Module):
    """A transformer that takes its inputs in order and returns the last layer's states alone."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True))).last_hidden_state


def write_onnx(model: PreTrainedModel, tokens: Mapping[str, Tensor], file: Path) -> None:
    """Write a model as an ONNX file that takes any number of texts of any length.

    Args:
        model: In float32, on the CPU, in eval mode, not packed. What was dropped of it is not in the graph.
        tokens: What it takes, ``(batch, seq)`` each, two texts of two tokens at least; the names become the inputs'.
        file: The new file; more than 1.5 GB of weights lie in another beside it.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing.
        NoGraphError: torch cannot write this model as a graph, or would write another one.
    """
    kind = model.config.model_type
    # The graph has the angles of one length: it took those of long texts for short ones, too.
    config = getattr(model.config, "base_config", model.config)
    if "longrope" in str(getattr(config, "rope_parameters", None)):
        raise NoGraphError(f"a {kind} with longrope, whose RoPE depends on the length of a text, cannot be a graph")
    require_packages("onnx", "onnxscript")
    states = _States(model, list(tokens)).eval()
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with warnings.catch_warnings(), _quiet_exporter(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                states,
                tuple(tokens.values()),
                dynamo=True,
                dynamic_shapes={"tensors": (any_size,) * len(tokens)},
                input_names=list(tokens),
                output_names=[OUTPUT_NAME],
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).partition(". ")[0]
            raise NoGraphError(f"torch cannot write a {kind} as an ONNX graph: {reason}") from error
    program.save(file, external_data=size > LARGE_BYTES)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep what the exporter remarks on its own work out of the answer."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):  # it prints the whole graph of a model that it cannot write
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
