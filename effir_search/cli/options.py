"""Command options made from the fields of settings dataclasses, and settings made from what a command was given."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click
from annotated_types import Ge, Gt, Le, Lt
from click.core import ParameterSource

from effir_search.settings import DataSettings, EncoderOptions, Settings

Kind = TypeVar("Kind", bound=Settings)
Command = Callable[..., object]

PATH = click.Path(path_type=Path)
# What --max-length changes where a model is saved.
OWN_LENGTH = "Tokens of a text read for {}; the saved model keeps its own."
# Fields of a list whose values may stand between commas; in the name of a file a comma may be part of it.
DIVIDED_BY_COMMAS = (
    *("fields", "log_to", "dimensions", "tables", "kinds", "numbers", "shares", "criteria", "unit_criteria", "seeds"),
    *("dtypes", "weights", "hits_of", "remove_query_of"),
)
# Choices that jobs make for themselves.
NO_OPTION = ("saved",)


class Listed(click.ParamType):
    """Values of a list option: what stands between commas, each of the type ``of``."""

    def __init__(self, of: click.ParamType) -> None:
        self.of, self.name = of, "|".join(of.choices) if isinstance(of, click.Choice) else f"{of.name},..."

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple:
        """Return the values."""
        try:
            return tuple(self.of.convert(part.strip(), param, ctx) for part in str(value).split(","))
        except click.BadParameter:
            if self.of is not click.INT:
                raise
        self.fail(f"{value!r} is not a list of numbers such as 16,17,18", param, ctx)


class FiniteRange(click.FloatRange):
    """A number in a range, neither infinite nor NaN, which no bound keeps out."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


def options_of(
    kind: type[Settings],
    *,
    without: Collection[str] = (),
    only: Collection[str] | None = None,
    unset: bool = False,
    required: Collection[str] = (),
    help: Mapping[str, str] = MappingProxyType({}),
    names: Mapping[str, str] = MappingProxyType({}),
    defaults: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Command], Command]:
    """Return what adds an option for each field of a settings dataclass to a command, in their order.

    Args:
        kind: The dataclass.
        without: Fields that get none.
        only: The fields that get one; None = all.
        unset: Let every option be None unless it is given, and show the field's default all the same.
        help: By field, what the option's help says in this command instead.
        required: Fields that must be given in this command, whatever their default.
        names: By field, the option's name in this command instead, as in ``--evaluate``.
        defaults: By field, what its default is called in this command instead; "" = nothing.
    """
    chosen = [f.name for f in fields(kind) if f.name not in without and (only is None or f.name in only)]

    def add(command: Command) -> Command:
        for name in reversed(chosen):
            texts = {"name": names.get(name), "help": help.get(name), "default_text": defaults.get(name)}
            command = option_of(kind, name, unset=unset, required=name in required, **texts)(command)
        return command

    return add


def option_of(
    kind: type[Settings],
    field_name: str,
    *,
    unset: bool = False,
    required: bool = False,
    name: str | None = None,
    parameter: str | None = None,
    help: str | None = None,
    default_text: str | None = None,
) -> Callable[[Command], Command]:
    """Return the option of one field of a settings dataclass.

    Args:
        kind: The dataclass.
        field_name: The field.
        unset: See ``options_of``.
        required: Whether it must be given, whatever the field's default.
        name: The option's name, instead of the field's.
        parameter: The command's parameter that gets the value, instead of the one named as the field.
        help: See ``options_of``.
        default_text: See ``defaults`` there.
    """
    field = next(f for f in fields(kind) if f.name == field_name)
    name = name or field.metadata["option"] or f"--{field.name.replace('_', '-')}"
    default = MISSING if required else field.default
    default_text = field.metadata["default_text"] if default_text is None else default_text
    text = help or field.metadata["help"]
    hint = _without_none(get_type_hints(kind, include_extras=True)[field_name])
    attributes: dict[str, Any] = {}
    if get_origin(hint) is tuple:
        of = _type(get_args(hint)[0])
        attributes = {"multiple": True, "type": Listed(of) if field.name in DIVIDED_BY_COMMAS else of}
        text = f"{text.removesuffix('.')}; repeatable."
    elif hint is bool and default is None:
        name = f"{name}/--no-{name.removeprefix('--')}"
    elif hint is bool:
        attributes["is_flag"] = True
    else:
        attributes["type"] = _type(hint)
    if default is MISSING:
        attributes["required"] = not unset
    elif unset or default is None:
        attributes["default"] = () if attributes.get("multiple") else None
        if default is not None and default is not False and default != () and default_text is None:
            default_text = _shown(default)
    elif get_origin(hint) is not tuple:
        attributes["default"] = default
    if default_text:
        text = f"{text}  [default: {default_text}]"
        attributes["show_default"] = False
    return click.option(name, parameter or field.name, help=text, **attributes)


def _shown(default: object) -> str:
    """Return a default as it is typed."""
    if isinstance(default, tuple):
        return ",".join(map(_shown, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def _without_none(hint: object) -> object:
    """Return X of ``X | None``."""
    if isinstance(hint, UnionType) or get_origin(hint) is not None and NoneType in get_args(hint):
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    return hint


def _type(hint: object) -> click.ParamType:
    """Return the click type of a field's type."""
    if get_origin(hint) is Literal:
        return click.Choice([name for name in get_args(hint) if name not in NO_OPTION])
    if get_origin(hint) is Annotated:
        base, *bounds = get_args(hint)
        lowest = next((b.ge if isinstance(b, Ge) else b.gt for b in bounds if isinstance(b, Ge | Gt)), None)
        highest = next((b.le if isinstance(b, Le) else b.lt for b in bounds if isinstance(b, Le | Lt)), None)
        is_open = {
            "min_open": any(isinstance(b, Gt) for b in bounds),
            "max_open": any(isinstance(b, Lt) for b in bounds),
        }
        return (click.IntRange if base is int else FiniteRange)(lowest, highest, **is_open)
    return click.types.convert_type(hint)


def taken(kind: type[Kind], options: dict[str, object], **values: object) -> Kind:
    """Return settings made of the options that are their fields, which are taken out; None is the default.

    Args:
        kind: The dataclass.
        options: What the command was given, by field.
        values: Fields that are not options.
    """
    found = {f.name: options.pop(f.name) for f in fields(kind) if f.name in options}
    return kind(**{name: _value(value) for name, value in found.items() if value is not None}, **values)


def _value(value: object) -> object:
    """Return the values of a list option as one tuple: ``--fields title,abstract`` is one value of two."""
    if not isinstance(value, tuple):
        return value
    return tuple(part for one in value for part in (one if isinstance(one, tuple) else (one,)))


def refuse(names: Iterable[str], why: str) -> None:
    """Raise a usage error if one of these options of the running command was given: it would be ignored."""
    context = click.get_current_context()
    names = set(names)
    for parameter in context.command.params:
        if parameter.name in names and was_given(parameter.name):
            raise click.UsageError(f"{parameter.opts[0]} {why}")


def numbers(name: str, help: str) -> Callable[[Command], Command]:
    """Return an option of whole numbers, as in ``3,5``."""
    return click.option(name, type=Listed(click.INT), help=help)


def data_settings(options: dict[str, object]) -> DataSettings | None:
    """Return the ``DataSettings`` that the options name, which are taken out; None where they name none."""
    if any(options[name] for name in ("train", "texts", "queries")):
        return taken(DataSettings, options)
    names = [f.name for f in fields(DataSettings)]
    refuse(names, "goes with --train or --texts")
    for name in names:
        options.pop(name, None)
    return None


def encoder_options(options: dict[str, object], **values: object) -> EncoderOptions:
    """Return ``EncoderOptions`` made of the options that are its fields, which are taken out."""
    return taken(EncoderOptions, options, **values)


def was_given(name: str) -> bool:
    """Return whether an option of the running command stands on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE
