"""``effir index``, ``search``, ``fuse``, ``verify``, ``info`` and ``pair``: from a corpus to an index to a run."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from effir_search.cli.options import PATH, encoder_options, options_of, refuse, taken, was_given
from effir_search.settings import (
    Bm25Settings,
    DescriptionFormat,
    EncoderOptions,
    FeedbackSettings,
    FuseSettings,
    HybridSettings,
    IndexSettings,
    PlanSettings,
    SearchSettings,
    TopicField,
    TuningSettings,
    WeightDtype,
    choices,
)

if TYPE_CHECKING:
    from effir_search.searching.hybrid import Ranking


@click.command()
@click.option("--corpus", help="BEIR or Pyserini JSONL, TSV, .gz, a folder of them, or irds:NAME.")
@click.option("--encoder", help="Model folder or hub name.")
@click.option("--bm25", is_flag=True, help="Instead of an encoder: index the words, for BM25.")
@click.option("--from", "source", type=PATH, help="Instead of both: a Flat index, whose vectors are used again.")
@click.option("--output", type=PATH, required=True, help="New index folder.")
@options_of(IndexSettings)
@click.option("--num-shards", type=click.IntRange(1), help="Jobs that share the work.  [default: the launcher's, or 1]")
@click.option(
    "--shard-id", type=click.IntRange(0), help="Which of them this is, from 0.  [default: the launcher's, or 0]"
)
@click.option("--workers", type=click.IntRange(1), help="Processes on this CPU that share the work.")
@click.option("--devices", help="One process on each, sharing the work: cuda:0,cuda:1.")
@options_of(EncoderOptions, help={"max_length": "Tokens of a text read, here and in a search."})
def index(
    corpus: str | None,
    encoder: str | None,
    bm25: bool,
    source: Path | None,
    output: Path,
    num_shards: int | None,
    shard_id: int | None,
    workers: int | None,
    devices: str | None,
    **options: object,
) -> None:
    """Encode a corpus into a FAISS index that Pyserini opens, or index its words; after a stop, the same continues."""
    if bm25:
        refuse(click.get_current_context().params.keys() - _BM25_OPTIONS, "does not go with --bm25")
        return _index_bm25(corpus, output, taken(IndexSettings, options))
    from effir_search.indexing.build import describe_built, index_corpus, rebuild_index
    from effir_search.indexing.workers import this_shard, worker_devices

    settings, how = taken(IndexSettings, options), encoder_options(options)
    if source is not None:
        others = click.get_current_context().params.keys() - {"source", "output", "kind", "train_size", "overwrite"}
        refuse(others, "does not go with --from")
        info = rebuild_index(source, output, settings)
    elif corpus is not None and encoder is not None:
        if workers or devices:
            refuse(["device"], "does not go with --workers or --devices")
        shares = {"shard": this_shard(num_shards, shard_id), "devices": worker_devices(workers, devices)}
        info = index_corpus(corpus, encoder, output, settings, how, **shares)
    else:
        raise click.UsageError("give either --corpus and --encoder, or --corpus and --bm25, or --from")
    click.echo(describe_built(info, output))


# What else ``effir index`` takes with --bm25.
_BM25_OPTIONS = {"bm25", "corpus", "output", "overwrite", "fields", "id_field", "skip_bad", "threads"}


def _index_bm25(corpus: str | None, output: Path, settings: IndexSettings) -> None:
    from effir_search.searching.bm25 import describe_bm25, index_bm25

    if corpus is None:
        raise click.UsageError("--bm25 goes with --corpus")
    click.echo(describe_bm25(index_bm25(corpus, output, settings), output))


@click.command()
@click.option("--index", "index_dir", type=PATH, required=True, multiple=True, help="Index folder; may be repeated.")
@click.option("--topics", help="BEIR JSONL, TSV or TREC topics, irds:NAME, or Pyserini's name of topics (downloads).")
@click.option("--topics-field", type=click.Choice(choices(TopicField)), default="title", help="Part of a topic.")
@click.option("--output", type=PATH, help="Run file; an existing one is replaced.")
@click.option("--query", help="Search for one text and print the hits.")
@click.option("--corpus", "corpora", multiple=True, help="With --query: where the texts of the hits are; repeatable.")
@click.option("--encoder", help="Model folder or hub name.  [default: the one the index was built with]")
@click.option("--qrels", help="Search only the topics that are judged here.")
@options_of(SearchSettings)
@click.option("--bm25", "bm25_index", type=PATH, help="BM25 index whose hits are fused with the dense ones.")
@options_of(HybridSettings)
@options_of(TuningSettings)
@options_of(Bm25Settings)
@options_of(FeedbackSettings)
@click.option("--tag", default="effir", help="Name of the run, its last column.")
@options_of(
    EncoderOptions,
    without=["dimension", "normalize"],
    help={"max_length": "Tokens of a query read; an index that says how many allows no other."},
    defaults={"max_length": "the index's"},
)
def search(
    query: str | None,
    corpora: tuple[str, ...],
    topics: str | None,
    topics_field: TopicField,
    output: Path | None,
    qrels: str | None,
    tag: str,
    index_dir: tuple[Path, ...],
    encoder: str | None,
    bm25_index: Path | None,
    **options: object,
) -> None:
    """Search an index: topics into a TREC run, or one query shown."""
    from effir_search.searching.hybrid import Ranking
    from effir_search.searching.search_topics import format_hits, search_text, search_topics

    _refuse_ignored(index_dir, bm25_index, options)
    tuning = taken(TuningSettings, options)
    kinds = {"feedback": FeedbackSettings, "bm25": Bm25Settings, "hybrid": HybridSettings}
    ranking = Ranking(bm25_index=bm25_index, **{name: taken(kind, options) for name, kind in kinds.items()})
    settings, how = taken(SearchSettings, options), encoder_options(options)
    shared = {"index_dir": index_dir, "encoder": encoder, "settings": settings, "options": how, "ranking": ranking}
    if query is not None and topics is None and output is None:
        refuse(
            ["topics_field", "qrels", "remove_query", "tag", "tune", "tune_topics"],
            "goes with --topics, not with --query",
        )
        click.echo(format_hits(search_text(query, corpora=corpora, **shared)))
    elif query is None and topics is not None and output is not None:
        refuse(["corpora"], "goes with --query, not with --topics")
        run_settings = {"topics_field": topics_field, "qrels": qrels, "tag": tag}
        if tuning.tune is None:
            num_topics, num_hits = search_topics(topics, output, **run_settings, **shared)
        else:
            num_topics, num_hits = _search_tuned(topics, output, tuning, ranking, run_settings | shared)
        click.echo(f"{num_topics} topics, {num_hits} hits -> {output}")
    else:
        raise click.UsageError("give either --topics and --output, or --query")


def _refuse_ignored(index_dir: tuple[Path, ...], bm25_index: Path | None, options: dict[str, object]) -> None:
    """Raise a usage error for an option that would have no effect."""
    from effir_search.searching.bm25 import is_bm25

    sparse = any(map(is_bm25, index_dir))
    if bm25_index is None:
        refuse((f.name for kind in (HybridSettings, TuningSettings) for f in fields(kind)), "goes with --bm25")
    if options["tune"] is None:
        refuse(["tune_topics"], "goes with --tune")
    if bm25_index is None and not sparse:
        refuse((f.name for f in fields(Bm25Settings)), "goes with --bm25, or an --index of BM25")
    if sparse:
        refuse((f.name for f in fields(EncoderOptions)), "is for a dense index; this one is BM25's")
    _refuse_of_fusion(options["fusion"], "--fusion")
    if options["prf"] is None:
        refuse((f.name for f in fields(FeedbackSettings)), "goes with --prf")
    elif options["prf"] == "average":
        refuse((f.name for f in fields(FeedbackSettings) if f.name.startswith("rocchio")), "goes with --prf rocchio")


def _refuse_of_fusion(fusion: object, option: str) -> None:
    if fusion == "rrf":
        refuse(["normalization", "missing"], f"is for scores, and {option} rrf adds up ranks")
    else:
        refuse(["rrf_k"], f"goes with {option} rrf")


def _search_tuned(
    topics: str, output: Path, tuning: TuningSettings, ranking: "Ranking", shared: dict[str, object]
) -> tuple[int, int]:
    from effir_search.evaluation.tune import NORMALIZATIONS, search_tuned

    if ranking.hybrid.fusion != "interpolation":
        raise click.UsageError("--tune goes with --fusion interpolation; reciprocal ranks have no weight to choose")
    refuse(["weight"], "does not go with --tune, which chooses it")
    tried = (ranking.hybrid.normalization,) if was_given("normalization") else NORMALIZATIONS
    return search_tuned(topics, output, tuning=tuning, normalizations=tried, **shared)


@click.command()
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option("--output", type=PATH, required=True, help="New run file; an existing one is replaced.")
@options_of(FuseSettings)
@click.option("--tag", default="effir", help="Name of the run, its last column.")
def fuse(runs: tuple[Path, ...], output: Path, tag: str, **options: object) -> None:
    """Fuse TREC runs of any programs into one."""
    from effir_search.searching.fuse import fuse

    _refuse_of_fusion(options["method"], "--method")
    click.echo(f"{fuse(runs, output, taken(FuseSettings, options), tag=tag)} hits -> {output}")


@click.command()
@click.argument("model_or_index", required=False)
@click.option("--config", "config_file", type=PATH, help="A model's config.json instead: no weights are needed.")
@options_of(PlanSettings)
@click.option("--length", type=click.IntRange(1), default=256, help="Tokens of the text whose FLOPs are told.")
@click.option(
    "--dtype",
    type=click.Choice(choices(WeightDtype)),
    help="Of the weights whose bytes are told.  [default: the model's]",
)
@click.option(
    "--format", "form", type=click.Choice(choices(DescriptionFormat)), default="text", help="Format of the answer."
)
@options_of(EncoderOptions, only=["stock_architecture"])
def info(
    model_or_index: str | None,
    config_file: Path | None,
    length: int,
    dtype: WeightDtype | None,
    form: DescriptionFormat,
    stock_architecture: bool,
    **options: object,
) -> None:
    """Say what a model or an index is, or on paper what a pruned model would be."""
    from effir_search.searching.info import describe

    sizes = {"plan": taken(PlanSettings, options), "length": length, "dtype": dtype}
    stock = {"stock_architecture": stock_architecture}
    click.echo(describe(model_or_index, form, config_file=config_file, **sizes, **stock))


@click.command()
@click.argument("index_dir", type=PATH)
@click.option("--encoder", help="Model folder or hub name.  [default: the one the index was built with]")
@click.option("--corpus", help="Where the documents are.  [default: where they were]")
@options_of(EncoderOptions, only=["device", "stock_architecture"])
def verify(index_dir: Path, encoder: str | None, corpus: str | None, **options: object) -> None:
    """Check an index: counts, hashes, a sample encoded again; of approximate kinds, which hits they find."""
    from effir_search.indexing.verify import describe_verified, verify_index
    from effir_search.searching.searcher import load_encoder

    model = load_encoder(index_dir, encoder, encoder_options(options))
    click.echo(describe_verified(verify_index(index_dir, model, corpus=corpus), index_dir))


@click.command()
@click.option("--queries", required=True, help="Model for queries: folder or hub name of one that imitates the other.")
@click.option("--documents", required=True, help="Model for documents: folder or hub name of the one it imitates.")
@click.option("--output", type=PATH, required=True, help="New folder of both.")
def pair(queries: str, documents: str, output: Path) -> None:
    """Save a small model and the one it imitates as one for sentence-transformers: queries by the first."""
    from effir_search.encoding.pair import pair

    pair(queries, documents, output)
    click.echo(f"queries by {queries}, documents by {documents} -> {output}")
