"""Encoders, BM25 and both as one on many collections: ``effir suite``, which goes on where it was stopped."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from effir_search.encoding.encoder import DEFAULT_OPTIONS
from effir_search.errors import UserError
from effir_search.evaluation.measures import parse_measures
from effir_search.evaluation.pages import Table, as_markdown
from effir_search.files.job import job_folder
from effir_search.files.reading import read_json
from effir_search.files.whole import whole_file
from effir_search.model.checkpoint import resolve_model, weights_sha256
from effir_search.model.sentence_files import read_sentence_files
from effir_search.settings import EncoderOptions, SuiteSettings
from effir_search.suite.collections import Collection, find_collections
from effir_search.suite.report import Results, measured, write_report
from effir_search.suite.systems import (
    TUNED,
    CollectionSearch,
    Model,
    System,
    check_names,
    settings_sha256,
    systems_of,
)
from effir_search.text.trec import read_qrels

logger = logging.getLogger(__name__)


def suite(
    encoders: Sequence[str], output: Path, settings: SuiteSettings, options: EncoderOptions = DEFAULT_OPTIONS
) -> str:
    """Measure systems on collections and return the table of the first measure: ``effir suite``.

    What an earlier call left in the folder is used again, as long as it was made of the same files, weights and
    settings; indexes stay there for other systems to come.

    Args:
        encoders: Folders or hub names, each as it is or as NAME=MODEL; the first one is the baseline.
        output: Folder of the suite.
        settings: Collections and systems.
        options: How encoders are loaded.

    Raises:
        ValueError: Nothing to measure, a bad collection or model, ids of ir_datasets that are not on this machine.
        OSError: A file cannot be read or written.
    """
    measures, models = parse_measures(settings.measures), _models(encoders)
    if not settings.collections and not settings.mteb:
        raise UserError("nothing to measure on: give --collections, or --mteb")
    for name in ("mteb", "hybrid", "prf"):
        if getattr(settings, name) and not models:
            raise UserError(f"--{name} goes with --encoder")
    for name in ("bm25", "hybrid", "prf"):
        if getattr(settings, name) and not settings.collections:
            raise UserError(f"--{name} goes with --collections; mteb searches its tasks by itself")
    collections = find_collections(settings)
    systems = systems_of(models, settings)
    if not systems:
        raise UserError("nothing to measure: give --encoder, or --bm25")
    check_names(systems)
    with job_folder(output, {"command": "suite"}):
        tables = [_on_mteb(models, output, settings, options)] if settings.mteb else []
        if not collections:
            return tables[0]
        searches = [CollectionSearch(collection, output, settings, options) for collection in collections]
        values: dict[str, dict[str, np.ndarray]] = {str(measure): {} for measure in measures}
        for search in searches:
            name = search.collection.name
            for system in systems:
                if search.is_done(system):
                    logger.info("%s: the run of %s is there already", name, system.name)
                else:
                    logger.info("%s: %s", name, system.name)
                    search.write(system)
            search.close()
            qrels = read_qrels(search.collection.qrels)
            rows = [measured(search.run_file(system), qrels, measures) for system in systems]
            for measure, of_measure in values.items():
                of_measure[name] = np.array([row[measure] for row in rows])
        baseline = next((place for place, system in enumerate(systems) if system.model is not None), 0)
        names = [system.name for system in systems]
        notes = _notes(searches, systems)
        results = Results(names, baseline, collections, values, notes, settings.seed)
        return "\n\n".join([as_markdown(write_report(results, output)[0]).rstrip(), *tables])


def _on_mteb(models: Sequence[Model], output: Path, settings: SuiteSettings, options: EncoderOptions) -> str:
    """Let encoders do tasks of mteb, and return the table of their main scores, which is written as mteb.md, too."""
    from effir_search.adapters.mteb import run_tasks

    scores = [run_tasks(model.source, settings.mteb, output / "mteb", options=options) for model in models]
    rows = [
        [model.name, *(f"{score:.4f}" for score in of_model.values()), f"{np.mean(list(of_model.values())):.4f}"]
        for model, of_model in zip(models, scores, strict=True)
    ]
    text = "The main score of each task, as mteb computes it; that of a retrieval task is nDCG@10."
    table = as_markdown(Table("mteb", text, ["encoder", *scores[0], "mean"], rows, [])).rstrip()
    with whole_file(output / "mteb.md") as file:
        file.write(f"{table}\n")
    return table


def _models(encoders: Sequence[str]) -> list[Model]:
    models = []
    for encoder in encoders:
        name, _, source = encoder.partition("=")
        if not source or "/" in name or Path(encoder).exists():
            name, source = Path(encoder).name, encoder
            if name in ("", ".."):  # of the folder that the command runs in, or the one above
                name = Path(encoder).resolve().name
        if not name or name.startswith("."):
            raise UserError(f"--encoder {encoder}: {name!r} is no name of a run; give one, as in small={source}")
        files = read_sentence_files(resolve_model(source))
        weights = weights_sha256(files.folder, files.weight_folders)
        models.append(Model(name, source, weights, settings_sha256(files)))
    names = [model.name for model in models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f'two encoders are called "{twice[0]}"; name them, as in --encoder small=models/{twice[0]}')
    return models


def _notes(searches: Sequence[CollectionSearch], systems: Sequence[System]) -> list[str]:
    """Sentences about what the figures are of."""
    removed = [search.collection.name for search in searches if search.collection.remove_query]
    notes = [f"The document whose id is the query's is left out in {', '.join(removed)}."] if removed else []
    depths = {search.collection.hits for search in searches}
    notes.append(f"Hits a query: {_depths([search.collection for search in searches], depths)}.")
    tuned = [
        f"{system.model.name} on {search.collection.name} by {_tuned(search, system)}"
        for search in searches
        for system in systems
        if system.kind == TUNED and system.model is not None
    ]
    return notes + ([f"Weight of the dense list, tuned on other queries: {'; '.join(tuned)}."] if tuned else [])


def _depths(collections: Sequence[Collection], depths: set[int]) -> str:
    if len(depths) == 1:
        return str(*depths)
    return ", ".join(f"{collection.hits} in {collection.name}" for collection in collections)


def _tuned(search: CollectionSearch, system: System) -> str:
    run = search.run_file(system)
    tuned = read_json(run.with_name(f"{run.name}.json"))["tuned"]
    return " and ".join(
        f"{one['weight']:g} ({one['normalization']}, {one['queries']} queries of {Path(str(one['on'])).stem})"
        for one in tuned
    )
