"""``effir mine`` and ``finetune``: from a run to hard negatives, from examples or texts to a trained model."""

from pathlib import Path

import click

from effir_search.cli.options import OWN_LENGTH, PATH, encoder_options, options_of, refuse, taken
from effir_search.settings import DataSettings, EncoderOptions, LossSettings, MiningSettings, TrainingSettings

LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_dropout")


@click.command()
@click.option("--run", "run_file", type=PATH, required=True, help="TREC run of any searcher.")
@click.option("--qrels", required=True, help="BEIR TSV or TREC qrels, or irds:NAME.")
@click.option("--corpus", required=True, help="BEIR or Pyserini JSONL, TSV, .gz, a folder of them, or irds:NAME.")
@click.option("--topics", required=True, help="BEIR JSONL, TSV or TREC topics, or irds:NAME.")
@click.option("--output", type=PATH, required=True, help="JSONL of training data; an existing file is replaced.")
@options_of(MiningSettings)
def mine(run_file: Path, qrels: str, corpus: str, topics: str, output: Path, **options: object) -> None:
    """Make training data of a run: what it ranks high and is no positive is a hard negative."""
    from effir_search.training.mine import describe_mined
    from effir_search.training.mine import mine as mine_negatives

    settings = taken(MiningSettings, options)
    if settings.teacher is None and settings.reranker is None:
        refuse(["teacher_ratio", "device", "stock_architecture"], "goes with --teacher or --reranker")
    if settings.sample == "top":
        refuse(["seed"], "goes with --sample random")
    result = mine_negatives(run_file, qrels, corpus, topics, output, settings)
    click.echo(f"{describe_mined(result)} -> {output}")


@click.command()
@click.option("--encoder", required=True, help="Model folder or hub name, pruned or not.")
@click.option("--output", type=PATH, required=True, help="New model folder.")
@options_of(DataSettings)
@click.option("--full", is_flag=True, help="Train all weights.  [default: below 1 billion]")
# In a recipe 0 stands for all weights; here --full does.
@click.option("--lora-rank", type=click.IntRange(1), help="Train LoRA matrices only.  [default: 32 from 1 billion on]")
@options_of(TrainingSettings, without=["lora_rank"])
@options_of(LossSettings)
@click.option("--restart", is_flag=True, help="Discard what a stopped job left, instead of continuing it.")
@click.option("--keep-checkpoints", is_flag=True, help="Keep OUTPUT.training: checkpoints, prepared data, log.")
@options_of(
    EncoderOptions,
    without=["dimension", "dtype", "backend"],
    help={
        "max_length": OWN_LENGTH.format("training"),
        "normalize": "Vectors of length 1, compared by the cosine.  [default: the model's]",
    },
)
def finetune(encoder: str, output: Path, full: bool, restart: bool, keep_checkpoints: bool, **options: object) -> None:
    """Fine-tune an encoder for retrieval, or let it imitate a teacher; after a stop, the same command continues."""
    from effir_search.training.finetune import describe_finetuned, finetune

    if full:
        refuse(LORA_FIELDS, "does not go with --full")
        options["lora_rank"] = 0
    result = finetune(
        encoder,
        output,
        *(taken(kind, options) for kind in (DataSettings, TrainingSettings, LossSettings)),
        encoder_options(options),
        restart=restart,
        keep_checkpoints=keep_checkpoints,
    )
    if result is not None:
        click.echo(describe_finetuned(result, output))
