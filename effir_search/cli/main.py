"""The group of all commands, and what becomes of an error: one line and an exit status."""

import logging
import signal
import sys

import click

from effir_search.cli.compression import compress, demo
from effir_search.cli.evaluation import compare, evaluate
from effir_search.cli.pruning import analyze, convert, prune, slim
from effir_search.cli.retrieval import index, info, search, verify
from effir_search.cli.study import study
from effir_search.cli.training import finetune, mine
from effir_search.errors import UserError
from effir_search.log_messages import show_messages

# Packages of the extra "train".
EXTRA = ("accelerate", "datasets", "peft", "pydantic", "sentence_transformers", "tomli_w")
ERROR_LENGTH = 300
# Of sysexits.h: an internal error of the program.
BUG = 70
COMMANDS = (
    index,
    search,
    evaluate,
    compare,
    mine,
    analyze,
    prune,
    slim,
    finetune,
    compress,
    study,
    convert,
    info,
    verify,
    demo,
)


class OneLineErrors(click.Group):
    """Show every error as one line; ``--debug`` shows the traceback.

    What a person can put right has exit status 1, anything else is a bug of this package and has 70.
    """

    def invoke(self, ctx: click.Context) -> object:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:  # the last place where an error can be made one line
            if ctx.params["debug"]:
                raise
            shown = click.ClickException(describe_error(error))
            shown.exit_code = 1 if is_for_users(error) else BUG
            raise shown from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which a newcomer needs them."""
        return list(self.commands)


def is_for_users(error: Exception) -> bool:
    """Return whether an error is one that a person can put right: a value, a file, a package that is not there."""
    is_missing_extra = isinstance(error, ModuleNotFoundError) and error.name in EXTRA
    return is_missing_extra or isinstance(error, UserError | OSError | MemoryError)


def describe_error(error: Exception) -> str:
    """Return what is shown of an error."""
    if not is_for_users(error):
        told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return one_line(told, before="this is a bug: ", after="; effir --debug ... shows where, please report that")
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; pip install '.[train]' in a clone of effir_search, or make install"
    if isinstance(error, MemoryError):
        return one_line(f"not enough memory: {error}")
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return one_line(str(error))


def one_line(message: str, *, before: str = "", after: str = "") -> str:
    """Return a message on one line that, with ``Error: `` before it, has at most 300 characters."""
    message = " ".join(message.split())
    room = ERROR_LENGTH - len(f"Error: {before}{after}")
    return before + (message if len(message) <= room else message[: room - 3] + "...") + after


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
