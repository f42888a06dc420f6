"""How a model is compressed, from end to end, as one TOML file: read, checked, filled up with defaults, written."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path

import tomli_w
from pydantic import TypeAdapter, ValidationError

from effir_search.errors import UserError
from effir_search.files.reading import decode
from effir_search.settings import (
    CompressionSettings,
    DataSettings,
    DepthSettings,
    EvaluationSettings,
    LossSettings,
    TextSettings,
    TrainingSettings,
    WidthSettings,
)

RECIPE_FILE = "recipe.toml"
# What sections share, and is given once for all of them.
SHARED = "seed"


SECTIONS = {
    "text": TextSettings,
    "data": DataSettings,
    "prune": DepthSettings,
    "slim": WidthSettings,
    "finetune": TrainingSettings,
    "loss": LossSettings,
    "evaluate": EvaluationSettings,
}
# The defaults of the dataclasses are the paper's. These are for learning without labels, from the model itself.
WITHOUT_LABELS = {
    "prune": {"criterion": "greedy"},
    "slim": {"criterion": "taylor", "steps": 30},
    "finetune": {"max_steps": 2000, "epochs": 20.0},
}
# A model that nothing was dropped from is at no distance from itself, so its loss says nothing of its units.
OF_WHOLE_MODELS = {"slim": {"criterion": "activation"}}


def read_recipe(path: Path) -> dict[str, object]:
    """Return what a recipe file says, sections as dicts; it may leave out what has a default.

    Raises:
        ValueError: It is no TOML.
        OSError: It cannot be read.
    """
    try:
        return tomllib.loads(decode(path.read_bytes(), str(path)))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: is no TOML: {error}") from error


def merged(*given: Mapping[str, object]) -> dict[str, object]:
    """Return settings with sections as dicts; the later ones win, field by field."""
    settings: dict[str, object] = {}
    for more in given:
        for name, value in more.items():
            known = settings.get(name)
            settings[name] = known | value if isinstance(known, dict) and isinstance(value, dict) else value
    return settings


def as_compression(given: Mapping[str, object], *, where: str = "the recipe") -> CompressionSettings:
    """Return a checked recipe; what is not given has its default.

    Without labels the defaults are ``WITHOUT_LABELS`` before those of the dataclasses, and the teacher is the encoder.

    Args:
        given: As ``read_recipe`` returns it.
        where: Opens an error.

    Raises:
        ValueError: An unknown name, a value of another type, or sections that contradict one another.
    """
    _check_names(given, CompressionSettings, where)
    for section, kind in SECTIONS.items():
        value = given.get(section, {})
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: {section} must be a section, [{section}]")
        _check_names(value, kind, f"{where}: [{section}]")
    if "encoder" not in given:
        raise UserError(
            f"which encoder is compressed? give --encoder, or encoder in {where}, a model folder or hub name"
        )
    data = given.get("data", {})
    if not (data.get("train") or data.get("texts") or data.get("queries")):
        raise UserError(
            f"there is nothing to learn from; give --train, or --texts (or --queries), or the same in [data] of {where}"
        )
    if not data.get("train") and (data.get("texts") or data.get("queries")):
        dropped = [given.get("prune", {}).get(name) for name in ("drop_mlp", "drop_attention", "drop_block")]
        whole = dropped[0] == 0 and not any(dropped) and data.get("teacher") in (None, given["encoder"])
        own = {"data": {"teacher": given["encoder"]}} | (OF_WHOLE_MODELS if whole else {})
        learned = given.get("slim", {}).get("criterion") == "gates"
        of_gates = {"slim": {"steps": WidthSettings.steps}} if learned else {}  # not those of a pass that measures
        given = merged(WITHOUT_LABELS, own, of_gates, given)
    given = merged({section: {SHARED: given.get(SHARED, 0)} for section in ("slim", "finetune")}, given)
    try:
        return TypeAdapter(CompressionSettings).validate_json(json.dumps(given, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "tuple_type":
            message = 'must be a list, as in ["one.jsonl", "two.jsonl"]'
        told = "" if place in SECTIONS else f", found {first['input']!r}"
        raise UserError(f"{where}: {place}: {message}{told}") from error


def _check_names(given: Mapping[str, object], kind: type, where: str) -> None:
    names = [field.name for field in fields(kind) if kind is CompressionSettings or field.name != SHARED]
    for name in given:
        if name not in names:
            close = get_close_matches(name, names, n=1)
            known = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise UserError(f"{where}: there is no {name!r}; {known}")


def format_recipe(compression: CompressionSettings) -> str:
    """Return a recipe as TOML, with all defaults written out but those that are None."""
    settings = json.loads(json.dumps(asdict(compression)))
    told = {
        name: {k: v for k, v in value.items() if v is not None and k != SHARED} if isinstance(value, dict) else value
        for name, value in settings.items()
        if value is not None
    }
    return tomli_w.dumps(told)
