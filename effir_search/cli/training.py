"""``effir mine`` and ``finetune``: from a run to hard negatives, from examples or texts to a trained model."""

from pathlib import Path

import click

from effir_search.cli.legacy_options import (
    OWN_LENGTH,
    PATH,
    REPORTERS,
    SAMPLES,
    SCHEDULES,
    data_options,
    loss_options,
    refuse,
    stock_option,
    taken,
    text_options,
)


@click.command()
@click.option("--run", "run_file", type=PATH, required=True, help="TREC run of any searcher.")
@click.option("--qrels", required=True, help="BEIR TSV or TREC qrels, or irds:NAME.")
@click.option("--corpus", required=True, help="BEIR or Pyserini JSONL, TSV, .gz, a folder of them, or irds:NAME.")
@click.option("--topics", required=True, help="BEIR JSONL, TSV or TREC topics, or irds:NAME.")
@click.option("--output", type=PATH, required=True, help="JSONL of training data; an existing file is replaced.")
@click.option("--first", type=click.IntRange(1), default=1, help="Rank of the first candidate.")
@click.option("--last", type=click.IntRange(1), default=100, help="Rank of the last candidate.")
@click.option("--negatives", type=click.IntRange(1), default=8, help="Take at most so many a query.")
@click.option("--margin", type=float, help="Leave out hits above the lowest positive's score in the run less this.")
@click.option("--teacher", help="Bi-encoder that scores the documents; folder or hub name.")
@click.option("--reranker", help="Instead of it: cross-encoder; folder or hub name.")
@click.option(
    "--teacher-ratio",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    help="Leave out hits whose teacher's score is above this share of the lowest positive's.",
)
@click.option("--sample", type=click.Choice(SAMPLES), default="random", help="Which of the candidates to take.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of a random sample.")
@click.option("--device", default="auto", help="Of the teacher: auto, cpu, cuda, cuda:1, ...")
@stock_option()
def mine(run_file: Path, qrels: str, corpus: str, topics: str, output: Path, sample: str, **options: object) -> None:
    """Make training data of a run: what it ranks high and is no positive is a hard negative."""
    from effir_search.training.mine import describe_mined
    from effir_search.training.mine import mine as mine_negatives

    if options["teacher"] is None and options["reranker"] is None:
        refuse(["teacher_ratio", "device", "stock_architecture"], "goes with --teacher or --reranker")
    if sample == "top":
        refuse(["seed"], "goes with --sample random")
    mined = mine_negatives(run_file, qrels, corpus, topics, output, sample=sample, **options)
    click.echo(f"{describe_mined(mined)} -> {output}")


@click.command()
@click.option("--encoder", required=True, help="Model folder or hub name, pruned or not.")
@click.option("--output", type=PATH, required=True, help="New model folder.")
@data_options
@click.option("--dev", help="BEIR folder whose nDCG@10 to watch.  [default: likeness to the teacher, with --texts]")
@click.option("--dev-split", default="dev", help="Its qrels.")
@click.option("--dev-queries", type=click.IntRange(1), default=200, help="Sample of its queries.")
@click.option("--dev-documents", type=click.IntRange(1), default=2000, help="Sample of its documents.")
@click.option("--dev-remove-query", is_flag=True, help="There, drop the document whose id is the query's.")
@click.option("--full", is_flag=True, help="Train all weights.  [default: below 1 billion]")
@click.option("--lora-rank", type=click.IntRange(1), help="Train LoRA matrices only.  [default: 32 from 1 billion on]")
@click.option("--lora-alpha", type=click.IntRange(1), help="Scale of LoRA.  [default: twice the rank]")
@click.option("--lora-dropout", type=click.FloatRange(0, 1, max_open=True), default=0.0, help="Of LoRA's input.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    help="Highest.  [default: 2e-5, with --texts 0.2 / hidden size; of LoRA 1e-4, with --texts 4e-4]",
)
@click.option("--batch-size", type=click.IntRange(1), default=64, help="Examples or texts a step, over all devices.")
@click.option("--accumulation", type=click.IntRange(1), default=1, help="Batches whose gradients make a step.")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=1.0, help="Passes over the data.")
@click.option("--max-steps", type=click.IntRange(1), help="Stop after so many.  [default: by epochs]")
@click.option("--warmup", type=click.FloatRange(0, 1), default=0.1, help="Share of steps in which the rate rises.")
@click.option("--schedule", type=click.Choice(SCHEDULES), default="linear", help="Of the rate after that.")
@click.option("--weight-decay", type=click.FloatRange(0), default=0.0, help="Of AdamW.")
@click.option("--max-grad-norm", type=click.FloatRange(0, min_open=True), default=1.0, help="Of the gradient, at most.")
@click.option("--bf16/--no-bf16", default=None, help="bfloat16 beside float32 weights.  [default: where it is fast]")
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory a layer, for a second forward pass.")
@click.option("--dropout", is_flag=True, help="Dropout as the model's config says, instead of none.")
@loss_options
@click.option(
    "--token-weight",
    type=click.FloatRange(0),
    help="With --texts: of each token's state.  [default: 1 if the teacher has the same tokens and pools their mean]",
)
@click.option("--eval-steps", type=click.IntRange(1), help="Steps between checkpoints.  [default: a twentieth of all]")
@click.option("--patience", type=click.IntRange(1), help="End after so many checkpoints no better than one before.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of order, sample, dropout and LoRA.")
@click.option(
    "--log-to", multiple=True, type=click.Choice(REPORTERS), help="Report there besides log.jsonl; repeatable."
)
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
@click.option("--batch-tokens", type=click.IntRange(1), help="Padded tokens a forward pass.  [default: by device]")
@click.option("--restart", is_flag=True, help="Discard what a stopped job left, instead of continuing it.")
@click.option("--keep-checkpoints", is_flag=True, help="Keep OUTPUT.training: checkpoints, prepared data, log.")
@text_options(length=OWN_LENGTH.format("training"), normalize=True)
def finetune(encoder: str, output: Path, full: bool, **options: object) -> None:
    """Fine-tune an encoder for retrieval, or let it imitate a teacher; after a stop, the same command continues."""
    from effir_search.settings import DataSettings, LossSettings, TrainingSettings
    from effir_search.training.finetune import describe_finetuned, finetune

    if full:
        refuse(["lora_rank", "lora_alpha", "lora_dropout"], "does not go with --full")
        options["lora_rank"] = 0
    data, recipe, losses = (taken(kind, options) for kind in (DataSettings, TrainingSettings, LossSettings))
    done = finetune(encoder, output, data, recipe=recipe, losses=losses, **options)
    if done is not None:
        click.echo(describe_finetuned(done, output))
