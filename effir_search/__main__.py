"""``python -m effir_search`` is ``effir``."""

from effir_search.cli import cli

cli(prog_name="effir")
