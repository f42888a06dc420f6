"""``effir evaluate``, ``compare`` and ``benchmark``: from runs to measures and tests, encoders side by side."""

from pathlib import Path

import click

from effir_search.cli.options import PATH, encoder_options, options_of, taken
from effir_search.settings import BenchmarkSettings, ComparisonFormat, EncoderOptions, ReportFormat, choices


@click.command()
@click.option("--run", "run_file", type=PATH, required=True, help="TREC run.")
@click.option("--qrels", required=True, help="BEIR TSV or TREC qrels, or irds:NAME.")
@click.option("--measures", default="nDCG@10 R@100 RR@10", help="Names of ir-measures or trec_eval.")
@click.option(
    "--format", "form", type=click.Choice(choices(ReportFormat)), default="text", help="Format of the answer."
)
@click.option("--per-query", is_flag=True, help="Print the measures of every query too.")
@click.option("--only-with-positives", is_flag=True, help="Leave out judged queries without a relevant document.")
def evaluate(
    run_file: Path, qrels: str, measures: str, form: ReportFormat, per_query: bool, only_with_positives: bool
) -> None:
    """Score a TREC run against qrels with ir-measures."""
    from effir_search.evaluation.measures import evaluate_run, format_evaluation

    evaluation = evaluate_run(run_file, qrels, measures, only_with_positives=only_with_positives)
    click.echo(format_evaluation(evaluation, form, per_query=per_query))


@click.command()
@click.argument("baseline", type=PATH)
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option("--qrels", required=True, help="BEIR TSV or TREC qrels, or irds:NAME.")
@click.option("--measures", default="nDCG@10 R@100 RR@10", help="Names of ir-measures or trec_eval.")
@click.option(
    "--format", "form", type=click.Choice(choices(ComparisonFormat)), default="text", help="Format of the answer."
)
@click.option(
    "--figure", type=PATH, help="PNG of each query's difference in the first measure; an existing one is replaced."
)
@click.option("--alpha", type=click.FloatRange(0, 1), default=0.05, help="Mark a corrected p below this.")
@click.option("--resamples", type=click.IntRange(1), default=10_000, help="Sign patterns of the randomisation test.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of these patterns.")
@click.option("--only-with-positives", is_flag=True, help="Leave out judged queries without a relevant document.")
def compare(
    baseline: Path,
    runs: tuple[Path, ...],
    qrels: str,
    measures: str,
    form: ComparisonFormat,
    figure: Path | None,
    alpha: float,
    resamples: int,
    seed: int,
    only_with_positives: bool,
) -> None:
    """Compare TREC runs with the first one, query by query: wins, losses, tests with Holm's correction."""
    from effir_search.evaluation.compare import compare_runs
    from effir_search.evaluation.comparison_figure import draw_figure
    from effir_search.evaluation.comparison_tables import format_comparison

    chance = {"resamples": resamples, "seed": seed}
    comparison = compare_runs(baseline, runs, qrels, measures, only_with_positives=only_with_positives, **chance)
    if figure is not None:
        draw_figure(comparison, figure)
    click.echo(format_comparison(comparison, form, alpha=alpha))


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--corpus", required=True, help="BEIR or Pyserini JSONL, TSV, .gz, a folder of them, or irds:NAME.")
@click.option("--topics", help="BEIR JSONL, TSV or TREC topics, or irds:NAME: queries to time, and to search for.")
@click.option("--qrels", help="BEIR TSV or TREC qrels, or irds:NAME: measure nDCG@10 too.")
@click.option("--output", type=PATH, required=True, help="Folder; an existing report is replaced, its runs stay.")
@options_of(BenchmarkSettings)
@options_of(EncoderOptions, without=["dtype"])
def benchmark(
    models: tuple[str, ...], corpus: str, topics: str | None, qrels: str | None, output: Path, **options: object
) -> None:
    """Measure encoders side by side: speed, latency, memory, work, energy, quality; tables, a picture, a page.

    MODELS are folders or hub names; ratios are to the first one. What was searched before a stop is not searched again;
    speeds are always measured anew, all together.
    """
    from effir_search.benchmarking.benchmark import benchmark

    settings, how = taken(BenchmarkSettings, options), encoder_options(options)
    files = {"corpus": corpus, "topics": topics, "qrels": qrels}
    click.echo(benchmark(models, output, **files, settings=settings, options=how))
