"""``effir serve``: indexes over HTTP and MCP, with a page."""

import click

from effir_search.cli.options import encoder_options, options_of, refuse, taken
from effir_search.serving.kernel_caches import bound_kernel_caches
from effir_search.settings import EncoderOptions, SearchSettings, ServeSettings


@click.command()
@click.option("--index", "index_dirs", required=True, multiple=True, help="Index folder, or NAME=FOLDER; repeatable.")
@click.option("--corpus", "corpora", multiple=True, help="Where texts are; repeatable.  [default: the indexes' own]")
@click.option("--encoder", help="Model folder or hub name for all of them.  [default: each index's own]")
@click.option("--mcp", is_flag=True, help="Speak MCP on standard input and output, instead of HTTP.")
@options_of(ServeSettings)
@options_of(SearchSettings, only=["threads", "ef_search", "nprobe"])
@options_of(
    EncoderOptions,
    without=["dimension", "normalize"],
    help={"max_length": "Tokens of a query read; an index that says how many allows no other."},
    defaults={"max_length": "the index's"},
)
def serve(
    index_dirs: tuple[str, ...], corpora: tuple[str, ...], encoder: str | None, mcp: bool, **options: object
) -> None:
    """Serve indexes: Pyserini's REST, OpenAI's embeddings, MCP for agents, and a page to search on."""
    bound_kernel_caches()
    from effir_search.serving.server import serve

    if mcp:
        of_http = ["host", "port", "server_name", "api_key_file", "max_inputs", "max_body", "max_requests", "timeout"]
        refuse(of_http, "does not go with --mcp")
    settings, search = taken(ServeSettings, options), taken(SearchSettings, options)
    places = {"corpora": corpora, "encoder": encoder, "mcp": mcp}
    serve(index_dirs, settings, search=search, options=encoder_options(options), announce=click.echo, **places)
