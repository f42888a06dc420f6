"""The command ``effir``: options in, one call, an answer out.

What comes in are the words of a command line; what goes out is the answer on standard output, messages on standard
error and an exit status. Open ``main.py`` first, the group of all commands. ``errors.py`` shows an error as one line,
``options.py`` makes options of the dataclasses in ``settings``; each other file holds a group of commands.
"""

from effir_search.cli.main import cli

__all__ = ["cli"]
