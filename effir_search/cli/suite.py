"""``effir suite``: many systems on many collections."""

from pathlib import Path

import click

from effir_search.cli.options import PATH, encoder_options, options_of, taken
from effir_search.settings import EncoderOptions, SuiteSettings


@click.command()
@click.option("--encoder", "encoders", multiple=True, help="Model folder or hub name, or NAME=MODEL; may be repeated.")
@options_of(SuiteSettings)
@click.option("--output", type=PATH, required=True, help="Folder of the suite; one that was begun is continued.")
@options_of(EncoderOptions, only=("max_length", "device", "dtype", "batch_tokens", "backend", "stock_architecture"))
def suite(encoders: tuple[str, ...], output: Path, **options: object) -> None:
    """Measure encoders, BM25 and both as one on many collections: one table, with intervals.

    What is there already is used again, so that after a stop the same command goes on. The table is of the encoders and
    collections that the command names: name those from before as well when further ones are to join them.
    """
    from effir_search.suite.suite import suite

    settings, how = taken(SuiteSettings, options), encoder_options(options)
    click.echo(suite(encoders, output, settings, how))
