"""``effir export``: models for other programs."""

from pathlib import Path

import click

from effir_search.cli.options import PATH, encoder_options, options_of, refuse, taken
from effir_search.settings import EncoderOptions, EvaluationSettings, ExportSettings, TextSettings


@click.command()
@click.argument("model", metavar="MODEL|INDEX")
@options_of(ExportSettings)
@click.option("--output", type=PATH, required=True, help="New model folder; of GGUF a new file.")
@options_of(EvaluationSettings)
@options_of(EncoderOptions, only=[*TextSettings.__dataclass_fields__, "max_length", "stock_architecture"])
def export(model: str, output: Path, **options: object) -> None:
    """Write a model for ONNX Runtime, OpenVINO or llama.cpp, or with --to flex an index for PyTerrier.

    A folder of --to onnx or openvino is an encoder for all commands that encode, and for sentence-transformers with
    backend="onnx" or "openvino". In int8 vectors are a little other ones: --evaluate tells what that costs. A FlexIndex
    has the vectors of the index as they are.
    """
    from effir_search.evaluation.benchmark import collection_files
    from effir_search.export.export import compare_export, describe_export, export_gguf, export_graph
    from effir_search.export.flex_index import to_flex_index

    if options["to"] == "flex":
        refuse(options.keys() - {"to"}, "does not go with --to flex")
        number = to_flex_index(Path(model), output)
        click.echo(f"{number} documents -> {output}")
        return
    evaluation, settings = taken(EvaluationSettings, options), taken(ExportSettings, options)
    how = encoder_options(options)
    if settings.to == "gguf":
        refuse([*EvaluationSettings.__dataclass_fields__, "num_texts", "seed"], "does not go with --to gguf")
        click.echo(export_gguf(model, output, settings, how))
        return
    refuse(["weights"], "goes with --to gguf")
    if not settings.int8:
        refuse(["num_texts"], "goes with --int8")
    for collection in evaluation.collections:  # what is wrong with them is an error before any work
        collection_files(Path(collection), evaluation.split)
    exported = export_graph(model, output, settings, how)
    measured = compare_export(model, output, settings, evaluation, how)
    click.echo(describe_export(exported, measured, output))
