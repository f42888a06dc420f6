"""Where the time of a training step of a language model goes, and how near it comes to the processor's matrix products.

    python benchmarks/step_time.py CORPUS LANGUAGE_MODEL TEACHER [--batch-size 64] [--max-length 64] [--stock]

A step is that of ``effir finetune --distill-over batch --contrastive-weight 0 --bf16`` on the CPU: the first words of
documents are the queries, the documents their positives. Seconds are the fastest of the steps. The share of the peak is
the products of the forward and backward passes (6 FLOPs a weight and token; the attention's own are left out), beside
what the widest product of the model's MLPs reaches alone. With ``--stock`` the modules are transformers' own. Peak
memory is that of the process, so each call measures one kind. Prints a column of a Markdown table.
"""

import itertools
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
import torch
from torch import nn
from torch.nn import functional as F

from effir_search.encoding.encoder import Encoder
from effir_search.model.arithmetic import count, empty_model
from effir_search.model.layers import layers_of
from effir_search.settings import DataSettings, EncoderOptions, LossSettings, TrainingSettings
from effir_search.text.corpus import document_text, read_corpus
from effir_search.text.examples import Example, document_key
from effir_search.training.data import objective_of, resolved_losses, teacher_beside
from effir_search.training.objective import RetrievalObjective
from effir_search.training.trainable import make_trainable


class Seconds(Counter):
    """Seconds by part."""

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        start = time.perf_counter()
        yield
        self[part] += time.perf_counter() - start

    def watch(self, module: nn.Module, part: str) -> None:
        """Add the time of every forward pass of a module to a part."""
        starts: list[float] = []
        module.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
        module.register_forward_hook(lambda *_: self.update({part: time.perf_counter() - starts.pop()}))

    def wrap(self, owner: object, name: str, part: str) -> None:
        """Add the time of every call of a method to a part."""
        method: Callable = getattr(owner, name)

        def timed(*args: object, **kwargs: object) -> object:
            with self.of(part):
                return method(*args, **kwargs)

        setattr(owner, name, timed)


def peak(width: int, hidden_size: int, tokens: int = 2048) -> float:
    """Return the FLOPs a second of the product of an MLP's inner matrix in bfloat16, the best of 20."""
    states, weight = torch.randn(tokens, hidden_size).bfloat16(), torch.randn(width, hidden_size).bfloat16()
    best = min(_timed(lambda: F.linear(states, weight)) for _ in range(20))
    return 2 * tokens * hidden_size * width / best


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@click.command()
@click.argument("corpus")
@click.argument("model")
@click.argument("teacher")
@click.option("--batch-size", default=64, help="Queries and documents of a step.")
@click.option("--max-length", default=64, help="Tokens of a text read.")
@click.option("--steps", default=3, help="Of which the fastest counts, after one that does not.")
@click.option("--stock", is_flag=True, help="With transformers' own modules.")
def main(corpus: str, model: str, teacher: str, batch_size: int, max_length: int, steps: int, stock: bool) -> None:
    """Print where the time of a step goes."""
    options = EncoderOptions(
        pooling="last", append_eos=True, normalize=True, max_length=max_length, device="cpu", dtype="saved"
    )
    encoder = Encoder.from_pretrained(model, options)
    data, losses = DataSettings(train=corpus, teacher=teacher), LossSettings(distill_over="batch", contrastive_weight=0)
    beside = teacher_beside(data, losses, encoder, EncoderOptions(device="cpu"))
    losses = resolved_losses(losses, data, encoder, beside)
    encoder = make_trainable(encoder, TrainingSettings(lora_rank=0))
    encoder.model.train()
    objective = (
        RetrievalObjective(encoder, losses, beside) if stock else objective_of(encoder, losses, beside, bf16=True)
    )
    optimiser = torch.optim.AdamW(encoder.model.parameters(), lr=1e-6, fused=True)
    texts = (document_text(document) for document in read_corpus(corpus))
    texts = [text for text in itertools.islice(texts, 20 * batch_size) if len(text.split()) > 40][:batch_size]
    examples = [Example(" ".join(text.split()[:12]), text, [], None, [document_key(text)]) for text in texts]
    tokens = sum(len(ids) for of in ([e.query for e in examples], texts) for ids in encoder.tokenize(of).input_ids)

    seconds = Seconds()
    seconds.wrap(encoder, "tokenize", "tokenizing")
    seconds.wrap(objective, "_teacher_vectors", "teacher")
    for layer in layers_of(encoder.model):
        seconds.watch(layer.self_attn, "forward: attention")
        seconds.watch(layer.mlp, "forward: MLPs")
        seconds.watch(layer.input_layernorm, "forward: norms")
        seconds.watch(layer.post_attention_layernorm, "forward: norms")
    fastest: Seconds | None = None
    for step in range(steps + 1):
        seconds.clear()
        with seconds.of("step"):
            with seconds.of("forward"), torch.autocast("cpu", torch.bfloat16):
                loss = objective(examples)["loss"]
            with seconds.of("backward"):
                loss.backward()
            with seconds.of("optimiser"):
                torch.nn.utils.clip_grad_norm_(encoder.model.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad()
        if step and (fastest is None or seconds["step"] < fastest["step"]):
            fastest = Seconds(seconds)
    parts = ("tokenizing", "teacher", "forward: attention", "forward: MLPs", "forward: norms")
    fastest["forward: the rest"] = fastest["forward"] - sum(fastest[part] for part in parts)
    config = encoder.model.config
    flops = 6 * count(empty_model(config)).without_embeddings * tokens
    share = flops / (fastest["step"] - fastest["teacher"]) / peak(config.intermediate_size, config.hidden_size)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"| {tokens:,} tokens a step | {'stock' if stock else 'effir'} |\n| --- | ---: |")
    for part in (*parts, "forward: the rest", "backward", "optimiser", "step"):
        print(f"| {part} | {fastest[part]:.2f} s |")
    print(f"| share of the peak | {share:.0%} |\n| peak memory | {memory:.1f} GB |")


if __name__ == "__main__":
    sys.exit(main())
