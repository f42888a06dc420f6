"""How the units of a model's MLPs are scored: what tells which matter least."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from effir_search.errors import UserError
from effir_search.model.layers import mlp_inputs, mlp_output, mlp_widths
from effir_search.pruning.gates import Batch, checked, frozen, gated, learn_gates

# Takes a model, batches, a loss that runs the model on one of them, and settings of its own by keyword; returns by
# layer the scores of its units, (width,) float32 on the CPU, the lowest to be cut first. Layers without MLP are left
# out. The model is left as it is.
UnitCriterion = Callable[..., dict[int, Tensor]]


def by_activation(
    model: PreTrainedModel, batches: Iterable[Batch], loss: Callable[[Batch], Tensor], *, progress: bool = True
) -> dict[int, Tensor]:
    """Score units by how much they write: the mean of ``|activation|``, times the norm of the outgoing column.

    Every batch is used once, without gradients. The mean is over real tokens: those of which the ``attention_mask``
    that ``loss`` gives to the model, ``(batch, seq)``, is 1, or all where it gives none. What the loss is does not
    matter.

    Raises:
        ValueError: No batches or no token, a mask of another shape, or a loss that runs the layers but not the model.
    """
    widths = _widths(model)
    sums = {
        layer_idx: torch.zeros(width, dtype=torch.float64, device=mlp_output(model, layer_idx).weight.device)
        for layer_idx, width in widths.items()
    }
    num_tokens = dict.fromkeys(widths, 0)

    def add(layer_idx: int, activations: Tensor, real: Tensor | None) -> None:
        # Padding may hold anything, an infinity too: it is left out, not multiplied by 0.
        activations = activations.flatten(0, -2) if real is None else activations[real]  # (tokens, width)
        sums[layer_idx] += activations.double().abs().sum(dim=0)
        num_tokens[layer_idx] += len(activations)

    with torch.no_grad(), _activations(model, add):
        for batch in _shown(batches, "activation", progress):
            loss(batch)
        if not all(num_tokens.values()):
            raise UserError("activations need batches with at least one token, got none")
        return {
            layer_idx: (total / num_tokens[layer_idx] * _outgoing(model, layer_idx)).float().cpu()
            for layer_idx, total in sums.items()
        }


def by_taylor(
    model: PreTrainedModel, batches: Iterable[Batch], loss: Callable[[Batch], Tensor], *, progress: bool = True
) -> dict[int, Tensor]:
    """Score units by how much the loss would change without them, to first order.

    That is ``|sum of activation * dLoss/dactivation|`` over the tokens of a batch, which is the gradient of its gate at
    1; then the mean over batches, each used once. Where the loss is at its minimum, as the distance of a model to
    itself is, all scores are 0.

    Raises:
        ValueError: No batches, or a loss that is not finite or does not depend on the units.
    """
    with gated(model) as gates, frozen(model):
        _widths(model)
        sums = {layer_idx: torch.zeros_like(z, requires_grad=False) for layer_idx, z in gates.items()}
        num_batches = 0
        for batch in _shown(batches, "taylor", progress):
            num_batches += 1
            value = checked(loss(batch), f"batch {num_batches}")
            value.backward(inputs=list(gates.values()))
            for layer_idx, z in gates.items():
                if z.grad is not None:
                    sums[layer_idx] += z.grad.abs()
                    z.grad = None
        if num_batches == 0:
            raise UserError("no batches")
        return {layer_idx: (total / num_batches).cpu() for layer_idx, total in sums.items()}


def by_magnitude(
    model: PreTrainedModel, batches: Iterable[Batch] = (), loss: Callable[[Batch], Tensor] | None = None
) -> dict[int, Tensor]:
    """Score units by their weights alone: the norms of incoming rows and of the outgoing column, multiplied.

    A gated MLP has two incoming rows a unit, gate and up, others one. Biases do not count. Nothing is run.
    """
    scores = {}
    with torch.no_grad():
        for layer_idx, width in _widths(model).items():
            product = _outgoing(model, layer_idx)
            for linear in mlp_inputs(model, layer_idx):
                rows = linear.weight.float().view(-1, width, linear.in_features)  # (blocks, width, hidden_size)
                product = product * rows.norm(dim=-1).prod(dim=0)
            scores[layer_idx] = product.cpu()
    return scores


def by_chance(
    model: PreTrainedModel,
    batches: Iterable[Batch] = (),
    loss: Callable[[Batch], Tensor] | None = None,
    *,
    seed: int = 0,
) -> dict[int, Tensor]:
    """Score units by random numbers, for comparison: the same for the same widths and seed. Nothing is run."""
    generator = torch.Generator().manual_seed(seed)
    return {layer_idx: torch.rand(width, generator=generator) for layer_idx, width in _widths(model).items()}


UNIT_CRITERIA: dict[str, UnitCriterion] = {
    "gates": learn_gates,  # EffiR's
    "activation": by_activation,
    "taylor": by_taylor,
    "magnitude": by_magnitude,
    "random": by_chance,
}


def _widths(model: PreTrainedModel) -> dict[int, int]:
    widths = {layer_idx: width for layer_idx, width in enumerate(mlp_widths(model)) if width}
    if not widths:
        raise UserError("the model has no MLP left to narrow")
    return widths


def _outgoing(model: PreTrainedModel, layer_idx: int) -> Tensor:
    """Norms of the columns that a layer's units write by, ``(width,)`` float32."""
    return mlp_output(model, layer_idx).weight.float().norm(dim=0)


def _shown(batches: Iterable[Batch], name: str, progress: bool) -> Iterable[Batch]:
    return tqdm(batches, desc=name, unit=" batches", disable=None if progress else True)


@contextmanager
def _activations(model: PreTrainedModel, report: Callable[[int, Tensor, Tensor | None], None]) -> Iterator[None]:
    """Inside the block, call ``report(layer_idx, activations, real)`` for every MLP that runs.

    Activations are ``(batch, seq, width)``; real is ``(batch, seq)`` bool, or None where the model got no mask.
    """
    masks: list[Tensor | None] = []

    def begin(_model: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        masks[:] = [None if mask is None else mask.bool()]

    def end(*_call: object) -> None:
        masks.clear()

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end, always_call=True),
    ]
    try:
        for layer_idx in _widths(model):

            def hand_on(_output: nn.Module, args: tuple, layer_idx: int = layer_idx) -> None:
                if not masks:
                    raise UserError("the loss must run the model as a whole, since the attention_mask is read there")
                real, shape = masks[0], args[0].shape[:-1]
                if real is not None and real.shape != shape:
                    raise UserError(
                        f"the attention_mask is {tuple(real.shape)}, but there are activations of {tuple(shape)} tokens"
                    )
                report(layer_idx, args[0], real)

            handles.append(mlp_output(model, layer_idx).register_forward_pre_hook(hand_on))
        yield
    finally:
        for handle in handles:
            handle.remove()
