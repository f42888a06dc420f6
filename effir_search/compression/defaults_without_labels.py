"""What a recipe has where it says nothing: the paper's settings, or other ones to learn without labels.

The defaults of the dataclasses in ``settings`` are the paper's.
"""

from collections.abc import Mapping

from effir_search.settings import WidthSettings

# For learning without labels, from the model itself.
WITHOUT_LABELS: dict[str, dict[str, object]] = {
    "prune": {"criterion": "greedy"},
    "slim": {"criterion": "taylor", "steps": 30},
    "finetune": {"max_steps": 2000, "epochs": 20.0},
}
# A model that nothing was dropped from is at no distance from itself, so its loss says nothing of its units.
OF_WHOLE_MODELS = {"slim": {"criterion": "activation"}}


def merged(*recipes: Mapping[str, object]) -> dict[str, object]:
    """Return settings with sections as dicts; the later ones win, field by field."""
    settings: dict[str, object] = {}
    for recipe in recipes:
        for name, value in recipe.items():
            earlier = settings.get(name)
            settings[name] = earlier | value if isinstance(earlier, dict) and isinstance(value, dict) else value
    return settings


def defaults_without_labels(recipe: Mapping[str, object]) -> dict[str, object]:
    """Return what a recipe without labels has where it says nothing: the teacher is the encoder itself."""
    prune = recipe.get("prune", {})
    drops = [prune.get(name) for name in ("drop_mlp", "drop_attention", "drop_block")]
    imitates_itself = recipe.get("data", {}).get("teacher") in (None, recipe["encoder"])
    is_whole = drops[0] == 0 and not any(drops) and imitates_itself
    defaults = merged(WITHOUT_LABELS, {"data": {"teacher": recipe["encoder"]}}, OF_WHOLE_MODELS if is_whole else {})
    if recipe.get("slim", {}).get("criterion") == "gates":
        # Gates are learned for as many steps as with labels, not for those of a pass that measures.
        return merged(defaults, {"slim": {"steps": WidthSettings.steps}})
    return defaults
