"""Options written by hand, until every command has those of its settings."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import click
from click.core import ParameterSource

# What the library's tables hold, written out: importing them would make --help wait for torch. A test compares them.
POOLINGS = ("cls", "last", "mean", "max", "weightedmean", "mean_sqrt_len_tokens")


DTYPES = ("auto", "fp32", "bf16", "fp16")


REPORT_FORMATS = ("text", "json", "csv", "markdown")


COMPARISON_FORMATS = (*REPORT_FORMATS, "latex")


DTYPE_HELP = "Arithmetic; auto is bf16 where the processor has it.  [default: auto; in a search, the index's]"


CRITERIA = ("cosine", "embedding", "greedy")


UNIT_CRITERIA = ("gates", "activation", "taylor", "magnitude", "random")


SCHEDULES = ("linear", "cosine", "constant")


REPORTERS = ("tensorboard", "wandb")


TOPIC_FIELDS = ("title", "description", "narrative")


SAMPLES = ("random", "top")


# What --max-length changes where a model is saved.
OWN_LENGTH = "Tokens of a text read for {}; the saved model keeps its own.  [default: the model's]"


PATH = click.Path(path_type=Path)


def refuse(names: Iterable[str], why: str) -> None:
    """Raise a usage error if one of these options of the running command was given: it would be ignored."""
    context = click.get_current_context()
    for parameter in context.command.params:
        if parameter.name in names and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} {why}")


def with_options(command: Callable, options: Sequence[Callable]) -> Callable:
    """Return the command with these options, which its help shows in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def stock_option(default: bool | None = False) -> Callable[[Callable], Callable]:
    """Return what adds the option that takes models with code of their own; a search's default is the index's."""
    told = "Instead of a model's own code, which is never run, take transformers' stock model; vectors may be others."
    return click.option("--stock-architecture", is_flag=True, default=default, help=told)


def text_options(*, length: str, field: str = "max_length", normalize: bool = False) -> Callable[[Callable], Callable]:
    """Return what adds the options that say how a text becomes one vector.

    Args:
        length: Help of --max-length: what it changes.
        field: The parameter that takes it.
        normalize: Whether there is --normalize too.
    """
    choice = click.Choice
    options = [
        click.option("--pooling", type=choice(POOLINGS), help="Token states to one vector.  [default: the model's]"),
        click.option("--query-prompt", help="Text before every query.  [default: the model's]"),
        click.option("--document-prompt", help="Text before every document.  [default: the model's]"),
        click.option("--max-length", field, type=click.IntRange(1), help=length),
        click.option("--append-eos", is_flag=True, default=None, help="End every text with the EOS token."),
        click.option(
            "--normalize", is_flag=True, default=None,
            help="Vectors of length 1, compared by the cosine.  [default: the model's]",
        ),
    ]  # fmt: skip
    return lambda command: with_options(command, options if normalize else options[:-1])


def encoder_options(*, length: str) -> Callable[[Callable], Callable]:
    """Return what adds the options that say how texts are encoded; ``length`` as in ``text_options``."""
    options = [
        click.option("--dtype", type=click.Choice(DTYPES), help=DTYPE_HELP),
        click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ..."),
        click.option("--batch-tokens", type=click.IntRange(1), help="Padded tokens a batch.  [default: by device]"),
        stock_option(None),
    ]  # fmt: skip
    return lambda command: text_options(length=length)(with_options(command, options))


class Numbers(click.ParamType):
    """Whole numbers, as in ``16,17,18``."""

    name = "numbers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Return the numbers."""
        try:
            return [int(number) for number in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 16,17,18", param, ctx)


def data_options(command: Callable) -> Callable:
    """Add the options that say what is learned from."""
    options = [
        click.option(
            "--train", help="Examples: JSONL of query, positives, negatives or of their ids, or a BEIR folder."
        ),
        click.option("--corpus", help="Where the documents are, for examples that are ids."),
        click.option("--topics", help="Where the queries are, for examples that are ids."),
        click.option("--split", default="train", help="Qrels of a BEIR folder to train on."),
        click.option(
            "--negatives", type=click.IntRange(0), default=7, help="Hard negatives of an example that are used."
        ),
        click.option(
            "--texts", multiple=True, help="Without labels: corpus or text file to imitate the teacher on; repeatable."
        ),
        click.option("--queries", multiple=True, help="The same, with the query prompt: topics or text file."),
        click.option("--num-texts", type=click.IntRange(1), help="Take a sample of so many texts.  [default: all]"),
        click.option("--teacher", help="Encoder to imitate on --texts, or whose scores to learn with --train."),
        click.option("--reranker", help="Cross-encoder whose scores to learn with --train."),
        stock_option(),
    ]
    return with_options(command, options)


def loss_options(command: Callable) -> Callable:
    """Add the options that say what is minimised."""
    options = [
        click.option(
            "--temperature",
            type=click.FloatRange(0, min_open=True),
            help="Of InfoNCE and KL.  [default: 0.02; dot products: 1]",
        ),
        click.option(
            "--teacher-temperature",
            type=click.FloatRange(0, min_open=True),
            help="Of the teacher's scores.  [default: 1; with --teacher: --temperature]",
        ),
        click.option("--distillation-weight", type=click.FloatRange(0), default=1.0, help="Of KL beside InfoNCE."),
        click.option(
            "--score-weight",
            type=click.FloatRange(0),
            default=10.0,
            help="With --texts: of score matrices beside embeddings.",
        ),
        click.option("--matryoshka", "dimensions", type=Numbers(), help="Train vectors that can be cut: 384,256,128."),
        click.option(
            "--grad-cache", "cached", is_flag=True, help="The memory of one forward pass, whatever the batch size."
        ),
    ]
    return with_options(command, options)


def taken(kind: type, options: dict[str, object]) -> object:
    """Return a dataclass made of the options that are its fields, which are taken out; None is its default."""
    values = {name: options.pop(name) for name in kind.__dataclass_fields__ if name in options}
    return kind(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if value is not None
        }
    )


def data_given(options: dict[str, object]) -> object:
    """Return the ``Data`` that the options name, which are taken out; None where they name none."""
    from effir_search.settings import DataSettings as Data

    if any(options[name] for name in ("train", "texts", "queries")):
        return taken(Data, options)
    refuse(Data.__dataclass_fields__, "goes with --train or --texts")
    for name in Data.__dataclass_fields__:
        options.pop(name, None)
    return None
