"""The group of all commands."""

import logging
import signal
import sys

import click

from effir_search.cli.compression import compress, demo
from effir_search.cli.errors import OneLineErrors
from effir_search.cli.evaluation import benchmark, compare, evaluate
from effir_search.cli.export import export
from effir_search.cli.pruning import analyze, convert, prune, slim
from effir_search.cli.retrieval import fuse, index, info, pair, search, verify
from effir_search.cli.serving import serve
from effir_search.cli.study import study
from effir_search.cli.suite import suite
from effir_search.cli.training import finetune, mine
from effir_search.log_messages import show_messages

COMMANDS = (
    index,
    search,
    fuse,
    serve,
    evaluate,
    compare,
    benchmark,
    mine,
    analyze,
    prune,
    slim,
    finetune,
    compress,
    study,
    suite,
    pair,
    convert,
    export,
    info,
    verify,
    demo,
)


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


for command in COMMANDS:
    cli.add_command(command)
