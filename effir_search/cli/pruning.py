"""``effir analyze``, ``prune``, ``slim`` and ``convert``: models with fewer parts."""

from collections.abc import Callable
from pathlib import Path

import click

from effir_search.cli.legacy_options import (
    CRITERIA,
    DTYPES,
    OWN_LENGTH,
    PATH,
    UNIT_CRITERIA,
    Numbers,
    data_given,
    data_options,
    loss_options,
    refuse,
    stock_option,
    taken,
    text_options,
    with_options,
)
from effir_search.settings import EncoderOptions


def depth_options(command: Callable) -> Callable:
    """Add the options that say how many parts of each kind to drop, or of which layers."""
    kinds = [
        ("block", "whole layers", "these layers whole"),
        ("attention", "attentions", "the attentions of these layers"),
        ("mlp", "MLPs", "the MLPs of these layers"),
    ]
    for kind, some, these in kinds:
        number, layers = f"--drop-{kind}", f"--drop-{kind}-layers"
        command = click.option(layers, type=Numbers(), help=f"Drop {these}, from 0, as in 3,5.")(command)
        command = click.option(number, type=click.IntRange(0), help=f"Drop so many {some}.")(command)
    return command


def texts_options(*, required: bool, length: str, field: str = "max_length") -> Callable[[Callable], Callable]:
    """Return what adds the options that say what a model is measured on; ``length`` and ``field`` as there."""

    def add(command: Callable) -> Callable:
        options = [
            click.option(
                "--texts",
                "sources",
                multiple=True,
                required=required,
                help="Corpus, topics or text file to measure on; may be repeated.",
            ),
            click.option("--num-texts", "size", type=click.IntRange(1), default=256, help="How many texts to take."),
            click.option("--seed", type=click.IntRange(0), default=0, help="Seed of their sample."),
            click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ..."),
            click.option("--batch-tokens", type=click.IntRange(1), help="Padded tokens a batch.  [default: by device]"),
            stock_option(),
        ]
        return with_options(text_options(length=length, field=field, normalize=True)(command), options)

    return add


@click.command()
@click.option("--encoder", required=True, help="Model folder or hub name.")
@click.option("--output", type=PATH, required=True, help="New folder of the report.")
@click.option(
    "--criterion",
    "criteria",
    type=click.Choice(CRITERIA),
    multiple=True,
    default=("cosine", "embedding"),
    help="What tells which parts matter least; may be repeated.",
)
@click.option("--curves", is_flag=True, help="Measure drift against size too: up to 8 passes a kind and criterion.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Arithmetic.  [default: that of the weights]")
@texts_options(required=True, length="Tokens of a text read for measuring.  [default: the model's]")
def analyze(encoder: str, output: Path, **options: object) -> None:
    """Measure how much each MLP, attention and block of a model matters; write tables and figures."""
    from effir_search.pruning.analyze import analyze, format_analysis

    analysis = analyze(encoder, output, **options)
    click.echo(f"{format_analysis(analysis)}\n\nreport -> {output / 'README.md'}")


@click.command()
@click.option("--encoder", required=True, help="Model folder or hub name.")
@click.option("--output", type=PATH, required=True, help="New model folder.")
@depth_options
@click.option("--criterion", type=click.Choice(CRITERIA), default="cosine", help="What tells which parts matter least.")
@texts_options(required=False, length=OWN_LENGTH.format("measuring"), field="calibration_length")
def prune(encoder: str, output: Path, **options: object) -> None:
    """Drop the MLPs, attentions or blocks of a model that matter least, and save what is left."""
    from effir_search.pruning.prune import NAMES, describe_pruned, prune_encoder

    numbers = {kind: number for kind in NAMES if (number := options.pop(f"drop_{kind}")) is not None}
    layers = {kind: named for kind in NAMES if (named := options.pop(f"drop_{kind}_layers")) is not None}
    if not any(numbers.values()):
        refuse(["criterion"], "goes with a number of parts, such as --drop-mlp 2")
    if not options["sources"]:
        refuse(["size", "seed", "calibration_length"], "goes with --texts, and changes nothing in the saved model")
    pruned = prune_encoder(encoder, output, numbers=numbers, layers=layers, **options)
    click.echo(describe_pruned(pruned, output))


@click.command()
@click.option("--encoder", required=True, help="Model folder or hub name, pruned or not.")
@click.option("--output", type=PATH, required=True, help="New model folder.")
@click.option(
    "--narrow", type=click.FloatRange(0, 1, max_open=True), required=True, help="Share of the MLP units left to cut."
)
@click.option(
    "--criterion", type=click.Choice(UNIT_CRITERIA), default="gates", help="What tells which units matter least."
)
@data_options
@click.option(
    "--steps", type=click.IntRange(1), default=500, help="Batches to score on; but for gates, one pass at most."
)
@click.option("--batch-size", type=click.IntRange(1), default=64, help="Examples or texts a batch.")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=0.01, help="Of the gates.")
@click.option("--penalty", type=click.FloatRange(0), default=1e-8, help="Of open gates, the paper's lambda.")
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory a layer, for a second forward pass.")
@click.option("--floor", type=click.FloatRange(0, 1), default=0.05, help="Share of each layer's units that stays.")
@click.option("--multiple", type=click.IntRange(1), default=1, help="Let widths be multiples of it.")
@click.option("--bf16/--no-bf16", default=None, help="bfloat16 beside float32 weights.  [default: where it is fast]")
@loss_options
@click.option("--seed", type=click.IntRange(0), default=0, help="Of order, samples and random scores.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
@click.option("--batch-tokens", type=click.IntRange(1), help="Padded tokens a forward pass.  [default: by device]")
@click.option("--restart", is_flag=True, help="Discard the data that a stopped job has prepared.")
@text_options(length=OWN_LENGTH.format("scoring"), normalize=True)
def slim(encoder: str, output: Path, narrow: float, **options: object) -> None:
    """Cut the units of a model's MLPs that a retrieval loss needs least, and save what is left.

    The criteria magnitude and random read weights alone and need no texts.
    """
    from effir_search.compression.slim import WITHOUT_TEXTS, describe_slimmed, slim_encoder
    from effir_search.settings import LossSettings, ScoringSettings

    if options["criterion"] != "gates":
        refuse(["learning_rate", "penalty"], "goes with --criterion gates")
    if options["criterion"] in WITHOUT_TEXTS:
        refuse(["steps", "batch_size", *LossSettings.__dataclass_fields__], "goes with criteria that score on texts")
    scoring, losses = (taken(kind, options) for kind in (ScoringSettings, LossSettings))
    data = data_given(options)
    if data is None:
        refuse(["max_length"], "goes with --train or --texts, and changes nothing in the saved model")
    slimmed = slim_encoder(encoder, output, narrow, data, scoring=scoring, losses=losses, **options)
    click.echo(describe_slimmed(slimmed, output))


@click.command()
@click.option(
    "--from", "source", required=True, help="LLM-Drop checkpoint or EffiR LoRA folder, or its hub name; a GGUF file."
)
@click.option("--output", type=PATH, required=True, help="New model folder.")
@click.option("--base", help="Of a LoRA folder: the model it was trained on, folder or hub name.")
@click.option("--drop-mlp-layers", type=Numbers(), help="Layers without MLP, as in 16,17.  [default: config.json's]")
@click.option("--drop-attention-layers", type=Numbers(), help="Layers without attention.  [default: config.json's]")
@text_options(length="Tokens of a text that the saved model reads.  [default: the model's]")
@stock_option()
def convert(source: str, output: Path, **options: object) -> None:
    """Make a model folder of an LLM-Drop or EffiR checkpoint, or of the language model in a GGUF file."""
    from effir_search.model.gguf_file import convert_gguf, describe_read, is_gguf
    from effir_search.pruning.convert import convert as convert_checkpoint
    from effir_search.pruning.convert import describe_converted

    if is_gguf(source):
        refuse(options, "does not go with a GGUF file, which becomes a plain language model")
        click.echo(f"{describe_read(convert_gguf(Path(source), output))} -> {output}")
        return
    own = {name: options.pop(name) for name in ("base", "drop_mlp_layers", "drop_attention_layers")}
    given = {name: value for name, value in options.items() if value is not None}
    config = convert_checkpoint(source, output, **own, options=EncoderOptions(**given))
    click.echo(f"{describe_converted(config)} -> {output}")
