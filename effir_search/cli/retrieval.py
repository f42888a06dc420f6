"""``effir index``, ``search``, ``verify`` and ``info``: from a corpus to an index to a run."""

from pathlib import Path

import click

from effir_search.cli.legacy_options import DTYPES, PATH, TOPIC_FIELDS, encoder_options, refuse, stock_option


@click.command()
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
@click.option("--id-field", help="JSON field that is the id.  [default: _id, id, pid, docid, ...]")
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
@click.option(
    "--normalize",
    is_flag=True,
    default=None,
    help="Vectors of length 1, compared by the cosine.  [default: the model's]",
)
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
    from effir_search.indexing.build import describe_built, index_corpus, rebuild_index
    from effir_search.indexing.workers import this_shard, worker_devices

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


@click.command()
@click.option("--index", "index_dir", type=PATH, required=True, multiple=True, help="Index folder; may be repeated.")
@click.option("--topics", help="BEIR JSONL, TSV or TREC topics, irds:NAME, or Pyserini's name of topics (downloads).")
@click.option("--topics-field", type=click.Choice(TOPIC_FIELDS), default="title", help="Part of a topic.")
@click.option("--output", type=PATH, help="Run file; an existing one is replaced.")
@click.option("--query", help="Search for one text and print the hits.")
@click.option("--corpus", "corpora", multiple=True, help="With --query: where the texts of the hits are; repeatable.")
@click.option("--encoder", help="Model folder or hub name.  [default: the one the index was built with]")
@click.option("--hits", type=click.IntRange(min=1), help="Hits a query.  [default: 1000; with --query, 10]")
@click.option("--qrels", help="Search only the topics that are judged here.")
@click.option("--remove-query", is_flag=True, help="Drop the document whose id is the query's.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of FAISS.  [default: all cores]")
@click.option("--ef-search", type=click.IntRange(1), help="Candidates an HNSW keeps.  [default: 128, or the hits]")
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
    from effir_search.searching.search import format_hits, search_text, search_topics

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


@click.command()
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
@stock_option()
def info(model_or_index: str | None, **options: object) -> None:
    """Say what a model or an index is, or on paper what a pruned model would be."""
    from effir_search.searching.info import describe

    click.echo(describe(model_or_index, **{name: value for name, value in options.items() if value is not None}))


@click.command()
@click.argument("index_dir", type=PATH)
@click.option("--encoder", help="Model folder or hub name.  [default: the one the index was built with]")
@click.option("--corpus", help="Where the documents are.  [default: where they were]")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
@stock_option(None)
def verify(
    index_dir: Path, encoder: str | None, corpus: str | None, device: str, stock_architecture: bool | None
) -> None:
    """Check an index: counts, hashes, a sample encoded again; of approximate kinds, which hits they find."""
    from effir_search.indexing.verify import describe_verified, verify_index
    from effir_search.searching.search import load_encoder

    model = load_encoder(index_dir, encoder, device=device, stock_architecture=stock_architecture)
    click.echo(describe_verified(verify_index(index_dir, model, corpus=corpus), index_dir))
