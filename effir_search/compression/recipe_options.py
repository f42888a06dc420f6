"""Where in a recipe the options of ``effir compress`` belong; a new option is a new line."""

# Section and field of each; those without a section stand before all.
IN_RECIPE = {
    "--encoder": ("", "encoder"),
    "--output": ("", "output"),
    "--target": ("", "target"),
    "--native": ("", "native"),
    "--drop-mlp": ("prune", "drop_mlp"),
    "--drop-attention": ("prune", "drop_attention"),
    "--drop-block": ("prune", "drop_block"),
    "--criterion": ("prune", "criterion"),
    "--narrow": ("slim", "narrow"),
    "--unit-criterion": ("slim", "criterion"),
    "--train": ("data", "train"),
    "--corpus": ("data", "corpus"),
    "--topics": ("data", "topics"),
    "--split": ("data", "split"),
    "--negatives": ("data", "negatives"),
    "--texts": ("data", "texts"),
    "--queries": ("data", "queries"),
    "--num-texts": ("data", "num_texts"),
    "--teacher": ("data", "teacher"),
    "--reranker": ("data", "reranker"),
    "--stock-architecture": ("", "stock_architecture"),
    "--max-length": ("", "max_length"),
    "--lora-rank": ("finetune", "lora_rank"),
    "--learning-rate": ("finetune", "learning_rate"),
    "--batch-size": ("finetune", "batch_size"),
    "--max-steps": ("finetune", "max_steps"),
    "--dev": ("data", "dev"),
    "--dev-remove-query": ("data", "dev_remove_query"),
    "--evaluate": ("evaluate", "collections"),
    "--remove-query": ("evaluate", "remove_query"),
    "--seed": ("", "seed"),
}


def parameter_of(section: str, field: str) -> str:
    """Return the name of the command's parameter for a field of a recipe."""
    return f"{section}_{field}".strip("_")


def recipe_of(options: dict[str, object]) -> dict[str, object]:
    """Return what the options of ``IN_RECIPE`` ask for, as a recipe has it: sections as dicts."""
    recipe: dict[str, object] = {}
    for section, field in IN_RECIPE.values():
        if (value := options[parameter_of(section, field)]) not in (None, ()):
            (recipe.setdefault(section, {}) if section else recipe)[field] = value
    return recipe
