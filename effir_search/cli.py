"""The commands: each parses its options, calls one function and prints the answer."""

import logging
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from effir_search.messages import show_messages

# What the library's tables hold, written out: importing them would make --help wait for torch. A test compares them.
POOLINGS = ("cls", "last", "mean")
DTYPES = ("auto", "fp32", "bf16", "fp16")
REPORT_FORMATS = ("text", "json", "csv", "markdown")
COMPARISON_FORMATS = (*REPORT_FORMATS, "latex")
DTYPE_HELP = "Arithmetic; auto is bf16 where the processor has it.  [default: auto; in a search, the index's]"
CRITERIA = ("cosine", "embedding", "greedy")
UNIT_CRITERIA = ("gates", "activation", "taylor", "magnitude", "random")
SCHEDULES = ("linear", "cosine", "constant")
REPORTERS = ("tensorboard", "wandb")
TOPIC_FIELDS = ("title", "description", "narrative")
SAMPLES = ("random", "top")
# Packages of the extra "train".
EXTRA = ("accelerate", "peft", "sentence_transformers")
# What --max-length changes where a model is saved.
OWN_LENGTH = "Tokens of a text read for {}; the saved model keeps its own.  [default: the model's]"
ERROR_LENGTH = 300
PATH = click.Path(path_type=Path)


class OneLineErrors(click.Group):
    """Show what a user can put right as one line; ``--debug`` shows the traceback."""

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; ValueError, OSError and missing extras become ``Error: ...`` and exit status 1."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except ModuleNotFoundError as error:
            if ctx.params["debug"] or error.name not in EXTRA:
                raise
            advice = "pip install '.[train]' in a clone of effir_search, or make install"
            raise click.ClickException(f"{error.name} is not installed; {advice}") from error
        except (ValueError, OSError) as error:
            if ctx.params["debug"]:
                raise
            raise click.ClickException(one_line(error)) from error


def one_line(error: Exception) -> str:
    """Return an error's message on one line that, with ``Error: `` before it, has at most 300 characters."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    message = " ".join(message.split())
    room = ERROR_LENGTH - len("Error: ")
    return message if len(message) <= room else message[: room - 3] + "..."


def refuse(names: Iterable[str], why: str) -> None:
    """Raise a usage error if one of these options of the running command was given: it would be ignored."""
    context = click.get_current_context()
    for parameter in context.command.params:
        if parameter.name in names and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} {why}")


def with_options(command: Callable, options: Sequence[Callable]) -> Callable:
    """Return the command with these options, which its help shows in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def text_options(*, length: str, field: str = "max_length", normalize: bool = False) -> Callable[[Callable], Callable]:
    """Return what adds the options that say how a text becomes one vector.

    Args:
        length: Help of --max-length: what it changes.
        field: The parameter that takes it.
        normalize: Whether there is --normalize too.
    """
    choice = click.Choice
    options = [
        click.option("--pooling", type=choice(POOLINGS), help="Token states to one vector.  [default: the model's]"),
        click.option("--query-prompt", help="Text before every query.  [default: the model's]"),
        click.option("--document-prompt", help="Text before every document.  [default: the model's]"),
        click.option("--max-length", field, type=click.IntRange(1), help=length),
        click.option("--append-eos", is_flag=True, default=None, help="End every text with the EOS token."),
        click.option(
            "--normalize", is_flag=True, default=None,
            help="Vectors of length 1, compared by the cosine.  [default: the model's]",
        ),
    ]  # fmt: skip
    return lambda command: with_options(command, options if normalize else options[:-1])


def encoder_options(*, length: str) -> Callable[[Callable], Callable]:
    """Return what adds the options that say how texts are encoded; ``length`` as in ``text_options``."""
    options = [
        click.option("--dtype", type=click.Choice(DTYPES), help=DTYPE_HELP),
        click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ..."),
        click.option("--batch-tokens", type=click.IntRange(1), help="Padded tokens a batch.  [default: by device]"),
    ]  # fmt: skip
    return lambda command: text_options(length=length)(with_options(command, options))


class Numbers(click.ParamType):
    """Whole numbers, as in ``16,17,18``."""

    name = "numbers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Return the numbers."""
        try:
            return [int(number) for number in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 16,17,18", param, ctx)


@click.group(cls=OneLineErrors, context_settings={"show_default": True, "max_content_width": 110})
@click.option("--debug", is_flag=True, help="Log more, and show tracebacks.")
@click.version_option(package_name="effir_search")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Dense retrieval: index a corpus, search it, evaluate the run; prune the encoder."""
    # What a batch system or a container sends: leave as after Ctrl-C, with nothing half-written behind.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Put back for whoever calls a command in a process of theirs: one forked from it may miss the signal, and stay.
    ctx.call_on_close(lambda: signal.signal(signal.SIGTERM, before))
    show_messages(logging.DEBUG if debug else logging.INFO)


@cli.command()
@click.option("--corpus", help="BEIR or Pyserini JSONL, TSV, .gz, a folder of them, or irds:NAME.")
@click.option("--encoder", help="Model folder or hub name.")
@click.option("--from", "source", type=PATH, help="Instead of both: a Flat index, whose vectors are used again.")
@click.option("--output", type=PATH, required=True, help="New index folder.")
@click.option("--kind", default="Flat", help="FAISS factory string: Flat, SQ8, HNSW32, IVF4096,PQ64, ...")
@click.option(
    "--train-size", type=click.IntRange(1), help="Vectors an approximate kind is trained on.  [default: by kind]"
)
@click.option("--overwrite", is_flag=True, help="Replace an existing index, once the new one is complete.")
@click.option(
    "--fields", help="JSON fields that are the text, as in title,abstract.  [default: contents, or title,text]"
)
@click.option("--skip-bad", is_flag=True, help="Leave out bad lines and list them, instead of stopping at the first.")
@click.option("--restart", is_flag=True, help="Discard what a stopped job left, instead of continuing it.")
@click.option("--repair", is_flag=True, help="Encode again what is damaged or missing in OUTPUT.parts.")
@click.option("--keep-embeddings", is_flag=True, help="Keep OUTPUT.parts, the vectors; later jobs keep them too.")
@click.option("--num-shards", type=click.IntRange(1), help="Jobs that share the work.  [default: the launcher's, or 1]")
@click.option(
    "--shard-id", type=click.IntRange(0), help="Which of them this is, from 0.  [default: the launcher's, or 0]"
)
@click.option("--workers", type=click.IntRange(1), help="Processes on this CPU that share the work.")
@click.option("--devices", help="One process on each, sharing the work: cuda:0,cuda:1.")
@click.option("--threads", type=click.IntRange(1), help="Threads of each process.  [default: all cores, shared]")
@click.option("--dimension", type=click.IntRange(1), help="Leading components of a vector to keep.  [default: all]")
@encoder_options(length="Tokens of a text read, here and in a search.  [default: the model's]")
def index(
    corpus: str | None,
    encoder: str | None,
    source: Path | None,
    output: Path,
    kind: str,
    train_size: int | None,
    overwrite: bool,
    fields: str | None,
    num_shards: int | None,
    shard_id: int | None,
    workers: int | None,
    devices: str | None,
    **options: object,
) -> None:
    """Encode a corpus into a FAISS index that Pyserini opens; after a stop, the same command continues."""
    from effir_search.index import describe_built, index_corpus, rebuild_index
    from effir_search.workers import this_shard, worker_devices

    settings = {"kind": kind, "train_size": train_size, "overwrite": overwrite}
    if source is not None:
        others = click.get_current_context().params.keys() - {"source", "output", *settings}
        refuse(others, "does not go with --from")
        info = rebuild_index(source, output, **settings)
    elif corpus is not None and encoder is not None:
        if workers or devices:
            refuse(["device"], "does not go with --workers or --devices")
        settings |= {
            "fields": [name.strip() for name in fields.split(",")] if fields is not None else None,
            "shard": this_shard(num_shards, shard_id),
            "devices": worker_devices(workers, devices),
        }
        info = index_corpus(corpus, encoder, output, **settings, **options)
    else:
        raise click.UsageError("give either --corpus and --encoder, or --from")
    click.echo(describe_built(info, output))


@cli.command()
@click.option("--index", "index_dir", type=PATH, required=True, multiple=True, help="Index folder; may be repeated.")
@click.option("--topics", help="BEIR JSONL, TSV or TREC topics, irds:NAME, or Pyserini's name of topics (downloads).")
@click.option("--topics-field", type=click.Choice(TOPIC_FIELDS), default="title", help="Part of a TREC topic.")
@click.option("--output", type=PATH, help="Run file; an existing one is replaced.")
@click.option("--query", help="Search for one text and print the hits.")
@click.option("--corpus", "corpora", multiple=True, help="With --query: where the texts of the hits are; repeatable.")
@click.option("--encoder", help="Model folder or hub name.  [default: the one the index was built with]")
@click.option("--hits", type=click.IntRange(min=1), help="Hits a query.  [default: 1000; with --query, 10]")
@click.option("--qrels", help="Search only the topics that are judged here.")
@click.option("--remove-query", is_flag=True, help="Drop the document whose id is the query's.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of FAISS.  [default: all cores]")
@click.option("--ef-search", type=click.IntRange(1), help="Candidates an HNSW keeps.  [default: 128]")
@click.option("--nprobe", type=click.IntRange(1), help="Lists of an IVF that are searched.  [default: a sixteenth]")
@click.option("--tag", default="effir", help="Name of the run, its last column.")
@encoder_options(length="Tokens of a query read; an index that says how many allows no other.  [default: the index's]")
def search(
    query: str | None,
    corpora: tuple[str, ...],
    topics: str | None,
    topics_field: str,
    output: Path | None,
    qrels: str | None,
    remove_query: bool,
    tag: str,
    **options: object,
) -> None:
    """Search an index: topics into a TREC run, or one query shown."""
    from effir_search.search import format_hits, search_text, search_topics

    if query is not None and topics is None and output is None:
        refuse(["topics_field", "qrels", "remove_query", "tag"], "goes with --topics, not with --query")
        click.echo(format_hits(search_text(query, corpora=corpora, **options)))
    elif query is None and topics is not None and output is not None:
        refuse(["corpora"], "goes with --query, not with --topics")
        settings = {"topics_field": topics_field, "qrels": qrels, "remove_query": remove_query, "tag": tag}
        num_topics, num_hits = search_topics(topics, output, **settings, **options)
        click.echo(f"{num_topics} topics, {num_hits} hits -> {output}")
    else:
        raise click.UsageError("give either --topics and --output, or --query")


@cli.command()
@click.option("--run", "run_file", type=PATH, required=True, help="TREC run.")
@click.option("--qrels", required=True, help="BEIR TSV or TREC qrels, or irds:NAME.")
@click.option("--measures", default="nDCG@10 R@100 RR@10", help="Names of ir-measures.")
@click.option("--format", "form", type=click.Choice(REPORT_FORMATS), default="text", help="Format of the answer.")
@click.option("--per-query", is_flag=True, help="Print the measures of every query too.")
@click.option("--only-with-positives", is_flag=True, help="Leave out judged queries without a relevant document.")
def evaluate(run_file: Path, qrels: str, measures: str, form: str, per_query: bool, only_with_positives: bool) -> None:
    """Score a TREC run against qrels with ir-measures."""
    from effir_search.evaluate import evaluate_run, format_evaluation

    evaluation = evaluate_run(run_file, qrels, measures, only_with_positives=only_with_positives)
    click.echo(format_evaluation(evaluation, form, per_query=per_query))


@cli.command()
@click.argument("baseline", type=PATH)
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option("--qrels", required=True, help="BEIR TSV or TREC qrels, or irds:NAME.")
@click.option("--measures", default="nDCG@10 R@100 RR@10", help="Names of ir-measures.")
@click.option("--format", "form", type=click.Choice(COMPARISON_FORMATS), default="text", help="Format of the answer.")
@click.option(
    "--figure", type=PATH, help="PNG of each query's difference in the first measure; an existing one is replaced."
)
@click.option("--alpha", type=click.FloatRange(0, 1), default=0.05, help="Mark a corrected p below this.")
@click.option("--resamples", type=click.IntRange(1), default=10_000, help="Sign patterns of the randomisation test.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of these patterns.")
@click.option("--only-with-positives", is_flag=True, help="Leave out judged queries without a relevant document.")
def compare(
    baseline: Path, runs: tuple[Path, ...], form: str, figure: Path | None, alpha: float, **options: object
) -> None:
    """Compare TREC runs with the first one, query by query: wins, losses, tests with Holm's correction."""
    from effir_search.compare import compare_runs, draw_figure, format_comparison

    comparison = compare_runs(baseline, runs, **options)
    if figure is not None:
        draw_figure(comparison, figure)
    click.echo(format_comparison(comparison, form, alpha=alpha))


@cli.command()
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
def mine(run_file: Path, qrels: str, corpus: str, topics: str, output: Path, sample: str, **options: object) -> None:
    """Make training data of a run: what it ranks high and is no positive is a hard negative."""
    from effir_search.training.mine import describe_mined
    from effir_search.training.mine import mine as mine_negatives

    if options["teacher"] is None and options["reranker"] is None:
        refuse(["teacher_ratio", "device"], "goes with --teacher or --reranker")
    if sample == "top":
        refuse(["seed"], "goes with --sample random")
    mined = mine_negatives(run_file, qrels, corpus, topics, output, sample=sample, **options)
    click.echo(f"{describe_mined(mined)} -> {output}")


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
        ]
        return with_options(text_options(length=length, field=field, normalize=True)(command), options)

    return add


@cli.command()
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


@cli.command()
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


def data_options(command: Callable) -> Callable:
    """Add the options that say what is learned from."""
    options = [
        click.option(
            "--train", help="Examples: JSONL of query, positives, negatives or of their ids, or a BEIR folder."
        ),
        click.option("--corpus", help="Where the documents are, for examples that are ids."),
        click.option("--topics", help="Where the queries are, for examples that are ids."),
        click.option("--split", default="train", help="Qrels of a BEIR folder to train on."),
        click.option(
            "--negatives", type=click.IntRange(0), default=7, help="Hard negatives of an example that are used."
        ),
        click.option(
            "--texts", multiple=True, help="Without labels: corpus or text file to imitate the teacher on; repeatable."
        ),
        click.option("--queries", multiple=True, help="The same, with the query prompt: topics or text file."),
        click.option("--num-texts", type=click.IntRange(1), help="Take a sample of so many texts.  [default: all]"),
        click.option("--teacher", help="Encoder to imitate on --texts, or whose scores to learn with --train."),
        click.option("--reranker", help="Cross-encoder whose scores to learn with --train."),
    ]
    return with_options(command, options)


def loss_options(command: Callable) -> Callable:
    """Add the options that say what is minimised."""
    options = [
        click.option(
            "--temperature",
            type=click.FloatRange(0, min_open=True),
            help="Of InfoNCE and KL.  [default: 0.02; dot products: 1]",
        ),
        click.option(
            "--teacher-temperature",
            type=click.FloatRange(0, min_open=True),
            help="Of the teacher's scores.  [default: 1; with --teacher: --temperature]",
        ),
        click.option("--distillation-weight", type=click.FloatRange(0), default=1.0, help="Of KL beside InfoNCE."),
        click.option(
            "--score-weight",
            type=click.FloatRange(0),
            default=10.0,
            help="With --texts: of score matrices beside embeddings.",
        ),
        click.option("--matryoshka", "dimensions", type=Numbers(), help="Train vectors that can be cut: 384,256,128."),
        click.option(
            "--grad-cache", "cached", is_flag=True, help="The memory of one forward pass, whatever the batch size."
        ),
    ]
    return with_options(command, options)


@cli.command()
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
    from effir_search.slim import WITHOUT_TEXTS, Scoring, describe_slimmed, slim_encoder
    from effir_search.training.objective import LossSettings

    if options["criterion"] != "gates":
        refuse(["learning_rate", "penalty"], "goes with --criterion gates")
    if options["criterion"] in WITHOUT_TEXTS:
        refuse(["steps", "batch_size", *LossSettings.__dataclass_fields__], "goes with criteria that score on texts")
    scoring, losses = (taken(kind, options) for kind in (Scoring, LossSettings))
    data = data_given(options)
    if data is None:
        refuse(["max_length"], "goes with --train or --texts, and changes nothing in the saved model")
    slimmed = slim_encoder(encoder, output, narrow, data, scoring=scoring, losses=losses, **options)
    click.echo(describe_slimmed(slimmed, output))


@cli.command()
@click.option("--encoder", required=True, help="Model folder or hub name, pruned or not.")
@click.option("--output", type=PATH, required=True, help="New model folder.")
@data_options
@click.option("--dev", help="BEIR folder whose nDCG@10 to watch.  [default: likeness to the teacher, with --texts]")
@click.option("--dev-split", default="dev", help="Its qrels.")
@click.option("--dev-queries", type=click.IntRange(1), default=200, help="Sample of its queries.")
@click.option("--dev-documents", type=click.IntRange(1), default=2000, help="Sample of its documents.")
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
@click.option("--device", default="auto", help="auto, cpu or cuda")
@click.option("--batch-tokens", type=click.IntRange(1), help="Padded tokens a forward pass.  [default: by device]")
@click.option("--restart", is_flag=True, help="Discard what a stopped job left, instead of continuing it.")
@click.option("--keep-checkpoints", is_flag=True, help="Keep OUTPUT.training: checkpoints, prepared data, log.")
@text_options(length=OWN_LENGTH.format("training"), normalize=True)
def finetune(encoder: str, output: Path, full: bool, **options: object) -> None:
    """Fine-tune an encoder for retrieval, or let it imitate a teacher; after a stop, the same command continues."""
    from effir_search.training.finetune import Data, Recipe, describe_finetuned, finetune
    from effir_search.training.objective import LossSettings

    if full:
        refuse(["lora_rank", "lora_alpha", "lora_dropout"], "does not go with --full")
        options["lora_rank"] = 0
    data, recipe, losses = (taken(kind, options) for kind in (Data, Recipe, LossSettings))
    done = finetune(encoder, output, data, recipe=recipe, losses=losses, **options)
    if done is not None:
        click.echo(describe_finetuned(done, output))


def taken(kind: type, options: dict[str, object]) -> object:
    """Return a dataclass made of the options that are its fields, which are taken out; None is its default."""
    values = {name: options.pop(name) for name in kind.__dataclass_fields__ if name in options}
    return kind(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if value is not None
        }
    )


def data_given(options: dict[str, object]) -> object:
    """Return the ``Data`` that the options name, which are taken out; None where they name none."""
    from effir_search.training.data import Data

    if any(options[name] for name in ("train", "texts", "queries")):
        return taken(Data, options)
    refuse(Data.__dataclass_fields__, "goes with --train or --texts")
    for name in Data.__dataclass_fields__:
        options.pop(name, None)
    return None


@cli.command()
@click.option("--recipe", "recipe_file", type=PATH, help="TOML file with all settings; options here come before it.")
@click.option("--encoder", help="Model folder or hub name.  [default: the recipe's]")
@click.option("--output", help="New model folder; OUTPUT.stages gets that of each stage.  [default: the recipe's]")
@click.option("--drop-mlp", type=click.IntRange(0), help="MLPs to drop.  [default: half of them]")
@click.option("--drop-attention", type=click.IntRange(0), help="Attentions to drop.  [default: 0]")
@click.option("--drop-block", type=click.IntRange(0), help="Whole layers to drop.  [default: 0]")
@click.option(
    "--criterion", type=click.Choice(CRITERIA), help="What tells which to drop.  [default: cosine; no labels: greedy]"
)
@click.option(
    "--narrow", type=click.FloatRange(0, 1, max_open=True), help="Share of the units left to cut.  [default: 0.3]"
)
@click.option(
    "--unit-criterion",
    type=click.Choice(UNIT_CRITERIA),
    help="What tells which units.  [default: gates; no labels: taylor]",
)
@data_options
@click.option(
    "--max-length",
    type=click.IntRange(1),
    help=OWN_LENGTH.format("all stages but the evaluation"),
)
@click.option(
    "--lora-rank", type=click.IntRange(0), help="Train LoRA; 0 = all weights.  [default: 32 from 1 billion on]"
)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="Highest.  [default: as effir finetune]")
@click.option("--batch-size", type=click.IntRange(1), help="Examples or texts a step.  [default: 64]")
@click.option(
    "--max-steps",
    type=click.IntRange(1),
    help="Steps of fine-tuning, at most.  [default: 1 pass over the data; no labels: 2000, and at most 20 passes]",
)
@click.option("--dev", help="BEIR folder whose nDCG@10 to watch.")
@click.option("--evaluate", "collections", multiple=True, help="BEIR folder to compare both models on; repeatable.")
@click.option("--seed", type=click.IntRange(0), help="Of samples, order, LoRA.  [default: 0]")
@click.option("--device", default="auto", help="auto, cpu or cuda")
@click.option("--batch-tokens", type=click.IntRange(1), help="Padded tokens a forward pass.  [default: by device]")
@click.option("--restart", is_flag=True, help="Discard what a stopped job left, or what depends on changed settings.")
@click.option(
    "--plan",
    is_flag=True,
    help="Print the whole recipe and the sizes it leads to, and stop; the data are not looked at.",
)
def compress(
    recipe_file: Path | None,
    device: str,
    batch_tokens: int | None,
    restart: bool,
    plan: bool,
    **options: object,
) -> None:
    """EffiR from end to end: analyse, drop, narrow, fine-tune, evaluate; after a stop, the same command continues.

    All but --encoder, --output and --train (or --texts) have defaults: the paper's, or without labels those for small
    encoders. A recipe has these options and what else the loss, slim and finetune depend on (docs/formats.md). If
    settings are changed after a stop, --restart keeps the stages that do not depend on them.
    """
    from effir_search.compress import compress, describe_compressed, describe_plan
    from effir_search.recipe import as_compression, merged, read_recipe

    given = read_recipe(recipe_file) if recipe_file else {}
    compression = as_compression(merged(given, given_settings(options)), where=str(recipe_file or "the recipe"))
    if plan:
        click.echo(describe_plan(compression))
        return
    if compression.output is None:
        raise click.UsageError("where to? give --output, or output in the recipe: a new folder")
    output = Path(compression.output)
    measured = compress(compression, output, device=device, batch_tokens=batch_tokens, restart=restart)
    if measured is not None:
        click.echo(describe_compressed(measured, output))


# Where in a recipe the options of ``compress`` belong that are not in its [data].
IN_RECIPE = {
    "encoder": ("encoder",),
    "output": ("output",),
    "max_length": ("max_length",),
    "seed": ("seed",),
    "drop_mlp": ("prune", "drop_mlp"),
    "drop_attention": ("prune", "drop_attention"),
    "drop_block": ("prune", "drop_block"),
    "criterion": ("prune", "criterion"),
    "narrow": ("slim", "narrow"),
    "unit_criterion": ("slim", "criterion"),
    "lora_rank": ("finetune", "lora_rank"),
    "learning_rate": ("finetune", "learning_rate"),
    "batch_size": ("finetune", "batch_size"),
    "max_steps": ("finetune", "max_steps"),
    "collections": ("evaluate", "collections"),
}


def given_settings(options: dict[str, object]) -> dict[str, object]:
    """Return the options that were given, as a recipe has them."""
    context = click.get_current_context()
    settings: dict[str, object] = {}
    for name, value in options.items():
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            *section, field = IN_RECIPE.get(name, ("data", name))
            home = settings.setdefault(section[0], {}) if section else settings
            home[field] = list(value) if isinstance(value, tuple) else value
    return settings


@cli.command()
@click.option("--from", "source", required=True, help="LLM-Drop checkpoint or EffiR LoRA folder, or its hub name.")
@click.option("--output", type=PATH, required=True, help="New model folder.")
@click.option("--base", help="Of a LoRA folder: the model it was trained on, folder or hub name.")
@click.option("--drop-mlp-layers", type=Numbers(), help="Layers without MLP, as in 16,17.  [default: config.json's]")
@click.option("--drop-attention-layers", type=Numbers(), help="Layers without attention.  [default: config.json's]")
@text_options(length="Tokens of a text that the saved model reads.  [default: the model's]")
def convert(source: str, output: Path, **options: object) -> None:
    """Make an LLM-Drop or EffiR checkpoint a model folder of this project."""
    from effir_search.model.convert import convert as convert_checkpoint
    from effir_search.model.convert import describe_converted

    config = convert_checkpoint(source, output, **options)
    click.echo(f"{describe_converted(config)} -> {output}")


@cli.command()
@click.argument("model_or_index", required=False)
@click.option("--config", "config_file", type=PATH, help="A model's config.json instead: no weights are needed.")
@click.option("--drop-mlp", type=click.IntRange(0), help="Plan: so many MLPs less.")
@click.option("--drop-attention", type=click.IntRange(0), help="Plan: so many attentions less.")
@click.option("--drop-block", type=click.IntRange(0), help="Plan: so many whole layers less.")
@click.option(
    "--narrow", type=click.FloatRange(0, 1, max_open=True), help="Plan: this share of the MLP units left less."
)
@click.option("--length", type=click.IntRange(1), default=256, help="Tokens of the text whose FLOPs are told.")
@click.option(
    "--dtype", type=click.Choice(DTYPES[1:]), help="Of the weights whose bytes are told.  [default: the model's]"
)
@click.option("--format", "form", type=click.Choice(("text", "json")), default="text", help="Format of the answer.")
def info(model_or_index: str | None, **options: object) -> None:
    """Say what a model or an index is, or on paper what a pruned model would be."""
    from effir_search.info import describe

    click.echo(describe(model_or_index, **{name: value for name, value in options.items() if value is not None}))


@cli.command()
@click.argument("index_dir", type=PATH)
@click.option("--encoder", help="Model folder or hub name.  [default: the one the index was built with]")
@click.option("--corpus", help="Where the documents are.  [default: where they were]")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
def verify(index_dir: Path, encoder: str | None, corpus: str | None, device: str) -> None:
    """Check an index: counts, hashes, a sample encoded again."""
    from effir_search.search import load_encoder
    from effir_search.verify import verify_index

    model = load_encoder(index_dir, encoder, device=device)
    checked = verify_index(index_dir, model, corpus=corpus)
    click.echo(
        f"{index_dir}: {checked.num_documents} documents, hashes right; {checked.num_sampled} encoded again, "
        f"lowest cosine {checked.lowest_cosine:.6f}, all found"
    )


@cli.command()
@click.option("--query", help="Search the demo collection for this text.")
@click.option("--output", type=PATH, default=Path("indexes/demo"), help="Folder of the demo's files.")
def demo(query: str | None, output: Path) -> None:
    """Try it all on the documentation of Python itself, beside BM25."""
    from effir_search.demo import run_demo

    run_demo(output, query=query, echo=click.echo)
