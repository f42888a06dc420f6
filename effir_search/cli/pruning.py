"""``effir analyze``, ``prune``, ``slim`` and ``convert``: models with fewer parts."""

from pathlib import Path

import click

from effir_search.cli.options import (
    OWN_LENGTH,
    PATH,
    Command,
    data_settings,
    encoder_options,
    numbers,
    options_of,
    refuse,
    taken,
)
from effir_search.settings import (
    Criterion,
    DataSettings,
    DepthSettings,
    EncoderOptions,
    LossSettings,
    WidthSettings,
    choices,
)

# What an option of each kind of part drops, and what one with -layers.
PARTS = {
    "mlp": ("MLPs", "the MLPs of these layers"),
    "attention": ("attentions", "the attentions of these layers"),
    "block": ("whole layers", "these layers whole"),
}


def depth_options(command: Command) -> Command:
    """Add the options that say how many parts of each kind to drop, or of which layers."""
    for kind, (parts, parts_of_layers) in reversed(PARTS.items()):
        number = f"drop_{kind}"
        command = numbers(f"--drop-{kind}-layers", f"Drop {parts_of_layers}, from 0, as in 3,5.")(command)
        help = {number: f"Drop so many {parts}."}
        command = options_of(DepthSettings, only=[number], unset=True, help=help, defaults={number: ""})(command)
    return command


def sample_options(*, required: bool) -> Command:
    """Return what adds the options that say which texts a model is measured on."""

    def add(command: Command) -> Command:
        command = click.option("--seed", type=click.IntRange(0), default=0, help="Seed of their sample.")(command)
        command = options_of(DepthSettings, only=["num_texts"])(command)
        return click.option(
            "--texts",
            "sources",
            multiple=True,
            required=required,
            help="Corpus, topics or text file to measure on; may be repeated.",
        )(command)

    return add


@click.command()
@click.option("--encoder", required=True, help="Model folder or hub name.")
@click.option("--output", type=PATH, required=True, help="New folder of the report.")
@click.option(
    "--criterion",
    "criteria",
    type=click.Choice(choices(Criterion)),
    multiple=True,
    default=("cosine", "embedding"),
    help="What tells which parts matter least; may be repeated.",
)
@click.option("--curves", is_flag=True, help="Measure drift against size too: up to 8 passes a kind and criterion.")
@sample_options(required=True)
@options_of(
    EncoderOptions,
    without=["dimension", "backend"],
    help={"max_length": "Tokens of a text read for measuring.", "dtype": "Arithmetic."},
    defaults={"dtype": "that of the weights"},
)
def analyze(
    encoder: str,
    output: Path,
    sources: tuple[str, ...],
    criteria: tuple[str, ...],
    curves: bool,
    num_texts: int,
    seed: int,
    **options: object,
) -> None:
    """Measure how much each MLP, attention and block of a model matters; write tables and figures."""
    from effir_search.pruning.analyze import analyze, format_analysis

    sample = {"sources": sources, "size": num_texts, "seed": seed}
    analysis = analyze(encoder, output, **sample, criteria=criteria, curves=curves, options=encoder_options(options))
    click.echo(f"{format_analysis(analysis)}\n\nreport -> {output / 'README.md'}")


@click.command()
@click.option("--encoder", required=True, help="Model folder or hub name.")
@click.option("--output", type=PATH, required=True, help="New model folder.")
@depth_options
@options_of(DepthSettings, only=["criterion"])
@sample_options(required=False)
@options_of(
    EncoderOptions, without=["dimension", "dtype", "backend"], help={"max_length": OWN_LENGTH.format("measuring")}
)
def prune(
    encoder: str,
    output: Path,
    sources: tuple[str, ...],
    criterion: str,
    num_texts: int,
    seed: int,
    **options: object,
) -> None:
    """Drop the MLPs, attentions or blocks of a model that matter least, and save what is left."""
    from effir_search.pruning.prune import describe_pruning, prune_encoder

    numbers = {kind: number for kind in PARTS if (number := options.pop(f"drop_{kind}")) is not None}
    layers = {kind: chosen for kind in PARTS if (chosen := options.pop(f"drop_{kind}_layers")) is not None}
    if not any(numbers.values()):
        refuse(["criterion"], "goes with a number of parts, such as --drop-mlp 2")
    if not sources:
        refuse(["num_texts", "seed", "max_length"], "goes with --texts, and changes nothing in the saved model")
    sample = {"sources": sources, "size": num_texts, "seed": seed}
    plan = {"numbers": numbers, "layers": layers, "criterion": criterion}
    result = prune_encoder(encoder, output, **plan, **sample, options=encoder_options(options))
    click.echo(describe_pruning(result, output))


@click.command()
@click.option("--encoder", required=True, help="Model folder or hub name, pruned or not.")
@click.option("--output", type=PATH, required=True, help="New model folder.")
@options_of(WidthSettings, only=["narrow"], required=["narrow"])
@options_of(WidthSettings, only=["criterion"])
@options_of(DataSettings, without=[f for f in DataSettings.__dataclass_fields__ if f.startswith("dev")])
@options_of(WidthSettings, without=["narrow", "criterion"])
@options_of(LossSettings, without=["token_weight"])
@click.option("--restart", is_flag=True, help="Discard the data that a stopped job has prepared.")
@options_of(
    EncoderOptions, without=["dimension", "dtype", "backend"], help={"max_length": OWN_LENGTH.format("scoring")}
)
def slim(encoder: str, output: Path, restart: bool, **options: object) -> None:
    """Cut the units of a model's MLPs that a retrieval loss needs least, and save what is left.

    The criteria magnitude and random read weights alone and need no texts.
    """
    from effir_search.compression.slim import WITHOUT_TEXTS, describe_slimming, slim_encoder

    if options["criterion"] != "gates":
        refuse(["learning_rate", "penalty"], "goes with --criterion gates")
    if options["criterion"] in WITHOUT_TEXTS:
        refuse(["steps", "batch_size", *LossSettings.__dataclass_fields__], "goes with criteria that score on texts")
    data = data_settings(options)
    if data is None:
        refuse(["max_length"], "goes with --train or --texts, and changes nothing in the saved model")
    settings, losses = taken(WidthSettings, options), taken(LossSettings, options)
    result = slim_encoder(encoder, output, data, settings, losses, encoder_options(options), restart=restart)
    click.echo(describe_slimming(result, output))


@click.command()
@click.option(
    "--from", "source", required=True, help="LLM-Drop checkpoint or EffiR LoRA folder, or its hub name; a GGUF file."
)
@click.option("--output", type=PATH, required=True, help="New model folder.")
@click.option("--base", help="Of a LoRA folder: the model it was trained on, folder or hub name.")
@numbers("--drop-mlp-layers", "Layers without MLP, as in 16,17.  [default: config.json's]")
@numbers("--drop-attention-layers", "Layers without attention.  [default: config.json's]")
@options_of(
    EncoderOptions,
    without=["normalize", "dimension", "device", "dtype", "batch_tokens", "backend"],
    help={"max_length": "Tokens of a text that the saved model reads."},
)
@click.option(
    "--bidirectional", is_flag=True, help="Of a GGUF file: let tokens see those after them, too; then fine-tune it."
)
def convert(source: str, output: Path, bidirectional: bool, **options: object) -> None:
    """Make a model folder of an LLM-Drop or EffiR checkpoint, or of the language model in a GGUF file."""
    from effir_search.model.gguf_file import convert_gguf, describe_read, is_gguf
    from effir_search.pruning.convert import convert as convert_checkpoint
    from effir_search.pruning.convert import describe_conversion

    if is_gguf(source):
        refuse(options, "does not go with a GGUF file, which becomes a plain language model")
        read = convert_gguf(Path(source), output, bidirectional=bidirectional)
        click.echo(f"{describe_read(read)} -> {output}")
        return
    refuse(["bidirectional"], "goes with a GGUF file; other checkpoints were trained as they are")
    reading = encoder_options(options)
    config = convert_checkpoint(source, output, options=reading, **options)
    click.echo(f"{describe_conversion(config)} -> {output}")
