"""The group of all commands, and what becomes of an error: one line and an exit status."""

import logging
import signal
import sys

import click

from effir_search.cli.compression import compress, demo
from effir_search.cli.evaluation import compare, evaluate
from effir_search.cli.pruning import analyze, convert, prune, slim
from effir_search.cli.retrieval import index, info, search, verify
from effir_search.cli.training import finetune, mine
from effir_search.messages import show_messages

# Packages of the extra "train".
EXTRA = ("accelerate", "datasets", "peft", "pydantic", "sentence_transformers", "tomli_w")


ERROR_LENGTH = 300


class OneLineErrors(click.Group):
    """Show what a user can put right as one line; ``--debug`` shows the traceback."""

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; ValueError, OSError and missing extras become ``Error: ...`` and exit status 1."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except ModuleNotFoundError as error:
            if ctx.params["debug"] or (error.name or "").partition(".")[0] not in EXTRA:
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


# In the order in which they are needed.
COMMANDS = (
    *(index, search, evaluate, compare, mine),
    *(analyze, prune, slim, finetune, compress, convert),
    *(info, verify, demo),
)
for command in COMMANDS:
    cli.add_command(command)
