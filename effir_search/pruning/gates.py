"""A trainable gate at every unit of a model's MLPs, and what training shows: which units a loss needs.

A unit is one of a layer's ``intermediate_size``: an input column of ``layers.mlp_output``. A model that was narrowed
before has fewer in some layers.

Source: EffiR (Lei, He, Li, Yates), arXiv 2512.20612, section on width (self-slimming).
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from effir_search.errors import UserError
from effir_search.files.whole import write_whole
from effir_search.model.layers import mlp_output, mlp_widths

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")

# Of Mistral-7B after 16 of its 32 MLPs are dropped: what the paper's lambda of 1e-8 weighs the sum of.
PAPER_UNITS = 16 * 14336
# Between two checkpoints of the gates' training, at least.
SECONDS = 60.0


class GatesFile:
    """The gates and Adam's state in a file, from which training goes on after a stop, to the same gates.

    Args:
        path: The file; it is there from the first step on, and then at most ``SECONDS`` old.
        settings: What the gates depend on, in JSON types; the state of others is not continued.
    """

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        self.path, self.settings = path, json.dumps(settings, sort_keys=True)
        self.saved_at = -math.inf

    def load(self, gates: Mapping[int, nn.Parameter], optimizer: torch.optim.Adam) -> int:
        """Set gates and optimiser to what they were, and return after how many steps: 0 where nothing was saved."""
        if not self.path.is_file():
            return 0
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            logger.warning("%s cannot be read (%s), so gates begin anew", self.path, error)
            return 0
        if metadata.get("settings") != self.settings:
            logger.info("the gates in %s are of other settings, so they begin anew", self.path)
            return 0
        step = int(metadata["step"])
        with torch.no_grad():
            for layer_idx, z in gates.items():
                z.copy_(tensors[f"{layer_idx}.z"])
                moments = {name: tensors[f"{layer_idx}.{name}"].to(z.device) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[z] = {"step": torch.tensor(float(step)), **moments}
        logger.info("gates go on from step %d", step)
        return step

    def save(self, gates: Mapping[int, nn.Parameter], optimizer: torch.optim.Adam, step: int) -> None:
        """Write the state after a step, if the last one that was written is old enough."""
        if time.monotonic() < self.saved_at + SECONDS:
            return
        tensors = {}
        for layer_idx, z in gates.items():
            tensors[f"{layer_idx}.z"] = z.detach().cpu()
            for name in ("exp_avg", "exp_avg_sq"):
                tensors[f"{layer_idx}.{name}"] = optimizer.state[z][name].cpu()
        content = save(tensors, {"step": str(step), "settings": self.settings})
        write_whole(self.path, lambda file: file.write(content))
        self.saved_at = time.monotonic()


@contextmanager
def gated(model: PreTrainedModel) -> Iterator[dict[int, nn.Parameter]]:
    """Inside the block, multiply the activations of every MLP's units by ReLU(z), and give the z of each layer.

    A z that is 1, which all are at first, changes nothing, bit for bit; one that is 0 or below does what cutting the
    unit would. Activations keep their dtype, and gradients reach both z and the model.

    Args:
        model: A base model as AutoModel loads it, or an ``EffirModel``; left as it was when the block ends.

    Yields:
        ``(width,)`` float32 by layer, on that layer's device; layers without MLP are left out.

    Raises:
        ValueError: A family that cannot be pruned.
    """
    gates: dict[int, nn.Parameter] = {}
    handles = []
    try:
        for layer_idx, width in enumerate(mlp_widths(model)):
            if width == 0:
                continue
            output = mlp_output(model, layer_idx)
            gates[layer_idx] = nn.Parameter(torch.ones(width, device=output.weight.device, dtype=torch.float32))

            def scale(_output: nn.Module, args: tuple, z: nn.Parameter = gates[layer_idx]) -> tuple:
                # The product is float32, so that bfloat16 rounds neither z nor its gradient, a sum over all tokens.
                return ((args[0] * F.relu(z)).to(args[0].dtype), *args[1:])

            handles.append(output.register_forward_pre_hook(scale))
        yield gates
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block, no parameter of a model gets a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def open_units(z: Tensor, beta: float = 5.0) -> Tensor:
    """Return about how many gates are open, with a gradient: the sum of ``2 * sigmoid(beta * ReLU(z)) - 1``.

    A closed gate, z <= 0, counts 0; one at 1 counts 0.987 with beta 5, and more the further it is open. The paper says
    that it relaxes the count of non-zero ReLU(z) by a sigmoid with beta = 5 and no more; this form is ours.

    Args:
        z: Of any shape.
        beta: How sharply a gate that opens begins to count; > 0.
    """
    return (2 * torch.sigmoid(beta * F.relu(z)) - 1).sum()


def open_of_paper(gates: Iterable[Tensor], beta: float = 5.0) -> Tensor:
    """Return how many of ``PAPER_UNITS`` would be open at the share of ``open_units`` in these: what lambda weighs."""
    gates = list(gates)
    num_open = sum(open_units(z, beta).to(gates[0].device) for z in gates)
    return PAPER_UNITS * num_open / sum(z.numel() for z in gates)


def learn_gates(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    loss: Callable[[Batch], Tensor],
    *,
    steps: int = 500,
    learning_rate: float = 0.01,
    penalty: float = 1e-8,
    beta: float = 5.0,
    progress: bool = True,
    checkpoint: GatesFile | None = None,
) -> dict[int, Tensor]:
    """Return the gates of a model's units after training them, and nothing else, with Adam; all begin at 1.

    What is minimised is ``loss(batch) + penalty * open_of_paper(gates)``. In the paper's setting that is its lambda
    times the sum over all units; in a model of any other size the same ``penalty`` has the same weight beside the loss.
    The default's total, at most 1e-8 * 229,376 = 0.0023, is small beside a loss of order 1: the loss decides on the
    units it needs, the penalty on the others.

    A gate that was closed, z <= 0, has no gradient any more and stays closed. Optimiser and rate are not given in the
    paper. Adam moves a gate by about the rate at each step, however small its gradient, as long as the sign stays.

    Args:
        model: A base model as AutoModel loads it, or an ``EffirModel``. Weights, their gradients and ``requires_grad``,
            training or eval mode are left as they are.
        batches: One is used a step. Fewer than ``steps`` are repeated, if they can be iterated over again.
        loss: Takes a batch, runs the model on it, returns a scalar that gradients flow back from.
        steps: How often z is changed, at least 1.
        learning_rate: Adam's.
        penalty: The paper's lambda.
        beta: See ``open_units``.
        progress: Whether to show a bar, where stderr is a terminal.
        checkpoint: What a stopped training goes on from; batches that it used are passed over.

    Returns:
        z by layer, ``(width,)`` float32 on the CPU, without ReLU; layers without MLP are left out.

    Raises:
        ValueError: No MLP is left, batches that run out, a loss that is not finite or does not depend on the gates, or
            a family that cannot be pruned.
    """
    if steps < 1:
        raise UserError(f"steps {steps} must be at least 1")
    with gated(model) as gates, frozen(model):
        if not gates:
            raise UserError("the model has no MLP left to narrow")
        # Of many units each has a tiny gradient, that of the penalty is about 1e-9 in the paper's setting: Adam's usual
        # 1e-8 in the denominator would make the rate depend on the size of the model.
        optimizer = torch.optim.Adam(gates.values(), lr=learning_rate, eps=1e-15)
        done = checkpoint.load(gates, optimizer) if checkpoint else 0
        with tqdm(total=steps, initial=done, desc="gates", unit=" steps", disable=None if progress else True) as bar:
            for step, batch in enumerate(islice(_repeated(batches, steps), done, None), start=done + 1):
                value = checked(loss(batch), f"step {step}")
                optimizer.zero_grad()
                total = value + penalty * open_of_paper(gates.values(), beta).to(value.device)
                total.backward(inputs=list(gates.values()))
                optimizer.step()
                bar.update()
                if checkpoint:
                    checkpoint.save(gates, optimizer, step)
        return {layer_idx: z.detach().cpu() for layer_idx, z in gates.items()}


def checked(value: Tensor, place: str) -> Tensor:
    """Return a loss that gates can be trained by.

    Raises:
        ValueError: It is not finite, or has no gradient; the message names ``place``.
    """
    if not math.isfinite(value.item()):
        raise UserError(f"{place}: the loss is {value.item()}; half precision may be too narrow, or a batch is broken")
    if not value.requires_grad:
        raise UserError(f"{place}: the loss has no gradient: it must run the model itself, and not in inference mode")
    return value


def _repeated(batches: Iterable[Batch], steps: int) -> Iterator[Batch]:
    """Yield ``steps`` batches, from the first one again after the last."""
    done = 0
    while done < steps:
        before = done
        for batch in batches:
            yield batch
            done += 1
            if done == steps:
                return
        if done == 0:
            raise UserError("no batches")
        if done == before or iter(batches) is batches:
            raise UserError(
                f"the batches ended after {done} of {steps} steps; give a list, which can be repeated, or more batches"
            )
