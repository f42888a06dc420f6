"""How a model is compressed, from end to end, as one TOML file: read, checked, filled up with defaults, written."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path

import tomli_w
from pydantic import TypeAdapter, ValidationError

from effir_search.compression.defaults_without_labels import defaults_without_labels, merged
from effir_search.errors import UserError
from effir_search.files.reading import decode
from effir_search.settings import SECTIONS, CompressionSettings

RECIPE_FILE = "recipe.toml"
# What sections share, and is given once for all of them.
SHARED = "seed"


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


def as_compression(recipe: Mapping[str, object], *, where: str = "the recipe") -> CompressionSettings:
    """Return a checked recipe; what it does not say has its default.

    Without labels the defaults are ``WITHOUT_LABELS`` before those of the dataclasses, and the teacher is the encoder.

    Args:
        recipe: As ``read_recipe`` returns it.
        where: Opens an error.

    Raises:
        ValueError: An unknown name, a value of another type, or sections that contradict one another.
    """
    check_names(recipe, CompressionSettings, where)
    for section, kind in SECTIONS.items():
        value = recipe.get(section, {})
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: {section} must be a section, [{section}]")
        check_names(value, kind, f"{where}: [{section}]")
    if "encoder" not in recipe:
        raise UserError(
            f"which encoder is compressed? give --encoder, or encoder in {where}, a model folder or hub name"
        )
    recipe = _with_one_name(recipe)
    # A number of blocks that is given counts, 0 as well; without drop_mlp one would be chosen instead.
    if recipe.get("native") and "drop_block" in recipe.get("prune", {}):
        recipe = merged({"prune": {"drop_mlp": 0}}, recipe)
    data = recipe.get("data", {})
    has_texts = data.get("texts") or data.get("queries")
    if not data.get("train") and not has_texts:
        raise UserError(
            f"there is nothing to learn from; give --train, or --texts (or --queries), or the same in [data] of {where}"
        )
    if not data.get("train") and has_texts:
        recipe = merged(defaults_without_labels(recipe), recipe)
    recipe = merged({section: {SHARED: recipe.get(SHARED, 0)} for section in ("slim", "finetune")}, recipe)
    try:
        return TypeAdapter(CompressionSettings).validate_json(json.dumps(recipe, default=str), strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error)}") from error


def _with_one_name(recipe: Mapping[str, object]) -> Mapping[str, object]:
    """Return a recipe whose teacher, where that is the encoder's folder by another path, has the encoder's name."""
    encoder, teacher = recipe["encoder"], recipe.get("data", {}).get("teacher")
    if all(isinstance(name, str) and Path(name).is_dir() for name in (encoder, teacher)):
        return merged(recipe, {"data": {"teacher": encoder}}) if Path(encoder).samefile(teacher) else recipe
    return recipe


def first_problem(error: ValidationError) -> str:
    """Return where in a recipe the first problem is, what it is and what stands there."""
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "tuple_type":
        message = 'must be a list, as in ["one.jsonl", "two.jsonl"]'
    return f"{place}: {message}" + ("" if place in SECTIONS else f", found {problem['input']!r}")


def check_names(settings: Mapping[str, object], kind: type, where: str) -> None:
    """Raise ValueError if settings have a name that the dataclass has not; ``where`` opens the error."""
    names = [field.name for field in fields(kind) if kind is CompressionSettings or field.name != SHARED]
    for name in settings:
        if name not in names:
            close = get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise UserError(f"{where}: there is no {name!r}; {hint}")


def format_recipe(compression: CompressionSettings) -> str:
    """Return a recipe as TOML, with all defaults written out but those that are None."""
    settings = json.loads(json.dumps(asdict(compression)))
    written = {
        name: {k: v for k, v in value.items() if v is not None and k != SHARED} if isinstance(value, dict) else value
        for name, value in settings.items()
        if value is not None
    }
    return tomli_w.dumps(written)
