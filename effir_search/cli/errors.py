"""What becomes of an error: one line on the terminal and an exit status."""

import click

from effir_search.errors import UserError

# The packages of each extra; those of several stand in the first.
EXTRAS = {
    "train": ("accelerate", "datasets", "peft", "pydantic", "sentence_transformers", "tomli_w"),
    "serve": ("mcp", "starlette", "uvicorn"),
    "export": ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf"),
    "mteb": ("mteb",),
    "pyterrier": ("pyterrier", "pyterrier_dr", "npids"),
}

ERROR_LENGTH = 300

# Of sysexits.h: an internal error of the program.
BUG = 70


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
    is_missing_extra = isinstance(error, ModuleNotFoundError) and extra_of(error.name) is not None
    return is_missing_extra or isinstance(error, UserError | OSError | MemoryError)


def extra_of(package: str | None) -> str | None:
    """Return the extra that installs a package; None if there is none."""
    return next((extra for extra, packages in EXTRAS.items() if package in packages), None)


def describe_error(error: Exception) -> str:
    """Return what is shown of an error."""
    if not is_for_users(error):
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return one_line(message, before="this is a bug: ", after="; effir --debug ... shows where, please report that")
    if isinstance(error, ModuleNotFoundError):
        extra = extra_of(error.name)
        return f"{error.name} is not installed; pip install '.[{extra}]' in a clone of effir_search, or make install"
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
