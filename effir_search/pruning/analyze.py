"""Where a model is redundant: importance by every criterion, tables and figures in a folder: ``effir analyze``."""

import csv
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from effir_search.encoder import Encoder, Tokens
from effir_search.files import refuse_existing, whole_folder
from effir_search.model.arithmetic import part_parameters
from effir_search.model.checkpoint import dtype_name, lasting_name
from effir_search.model.layers import KINDS, Kind, left_out
from effir_search.model.sentence_files import prunable_config
from effir_search.pruning.calibration import NUM_TEXTS, sample_texts
from effir_search.pruning.figures import FIGURES
from effir_search.pruning.importance import CRITERIA, Dropped, drift

logger = logging.getLogger(__name__)

# Points of a curve of drift, at most: each takes a forward pass.
POINTS = 8


@dataclass(frozen=True)
class Analysis:
    """What was measured on a model; its fields are those of ``analysis.json``.

    Attributes:
        model: Folder or hub name.
        model_sha256: See ``model.checkpoint.weights_sha256``.
        dtype: Of the arithmetic.
        num_hidden_layers: Layers of the base model.
        calibration: See ``Calibration.record``, and the number of tokens.
        order: By criterion and kind, the parts ``(layer_idx, score)`` in the order of dropping.
        curves: By criterion and kind, ``(number, share, drift)``: with so many parts dropped in that order, the share
            of the parameters outside the embeddings that is left, and ``1 - cos`` of the embeddings to the model's own.
    """

    model: str
    model_sha256: str
    dtype: str
    num_hidden_layers: int
    calibration: dict
    order: dict[str, dict[Kind, list[Dropped]]]
    curves: dict[str, dict[Kind, list[tuple[int, float, float]]]]


def analyze(
    encoder_name: str,
    output: Path,
    *,
    sources: Sequence[str],
    criteria: Sequence[str] = ("cosine", "embedding"),
    size: int = NUM_TEXTS,
    seed: int = 0,
    **options: object,
) -> Analysis:
    """Measure how much each part of a model matters, and write a report: ``effir analyze``.

    The folder holds ``analysis.json`` (see ``Analysis``), ``importance.csv``, ``curves.csv``, and a page,
    ``README.md``, with its figures. It appears whole or not at all.

    Args:
        encoder_name: Model folder or hub name; a pruned model too.
        output: The new folder.
        sources: Texts to measure on, see ``calibration.read_texts``.
        criteria: Keys of ``importance.CRITERIA``.
        size: How many texts.
        seed: Of their sample.
        options: As ``Encoder.from_pretrained`` takes them; None = its default.

    Raises:
        ValueError: No texts, or a model that cannot be pruned.
        OSError: The folder exists, or a file cannot be read or written.
    """
    refuse_existing(output, replaces=())
    stock = bool(options.get("stock_architecture"))
    num_layers = prunable_config(encoder_name, stock_architecture=stock).num_hidden_layers
    calibration = sample_texts(sources, size=size, seed=seed)
    given = {name: value for name, value in options.items() if value is not None}
    encoder = Encoder.from_pretrained(encoder_name, **({"dtype": "saved"} | given))
    tokens = encoder.tokenize(calibration.texts, prompt=encoder.config.document_prompt)
    logger.info("measuring by %s on %d texts", ", ".join(dict.fromkeys(criteria)), len(calibration.texts))
    order = {name: CRITERIA[name](encoder, tokens, KINDS, None) for name in dict.fromkeys(criteria)}
    analysis = Analysis(
        model=encoder_name,
        model_sha256=encoder.weights_sha256,
        dtype=dtype_name(encoder.dtype),
        num_hidden_layers=num_layers,
        calibration=calibration.record(encoder.config.max_length) | {"tokens": sum(map(len, tokens.input_ids))},
        order=order,
        curves=_curves(encoder, tokens, order),
    )
    with whole_folder(output) as folder:
        text = json.dumps(asdict(analysis), indent=1, ensure_ascii=False)
        (folder / "analysis.json").write_text(text + "\n", encoding="utf-8")
        _write_csv(folder / "importance.csv", ("criterion", "kind", "rank", "layer", "score"), _order_rows(analysis))
        columns = ("criterion", "kind", "number_dropped", "share_left", "drift")
        _write_csv(folder / "curves.csv", columns, _curve_rows(analysis))
        for name, draw in FIGURES.items():
            draw(analysis).savefig(folder / name, format="png")
        (folder / "README.md").write_text(_page(analysis), encoding="utf-8")
    return analysis


def _curves(
    encoder: Encoder, tokens: Tokens, order: dict[str, dict[Kind, list[Dropped]]]
) -> dict[str, dict[Kind, list[tuple[int, float, float]]]]:
    """Return ``Analysis.curves``; a set of parts whose drift is known already is not left out again."""
    reference = encoder.encode_tokens(tokens).embeddings
    sizes = {
        kind: {part.layer_idx: part_parameters(encoder.model, kind, part.layer_idx) for part in parts}
        for kind, parts in next(iter(order.values())).items()
    }
    whole = sum(sizes["block"].values())
    known: dict[tuple[Kind, frozenset[int]], float] = {}
    for kind, parts in order.get("greedy", {}).items():
        for number, part in enumerate(parts, start=1):
            known[kind, frozenset(layer_idx for layer_idx, _ in parts[:number])] = part.score
    for kind, parts in order.get("embedding", {}).items():
        known |= {(kind, frozenset([layer_idx])): score for layer_idx, score in parts}

    curves: dict[str, dict[Kind, list[tuple[int, float, float]]]] = {}
    for name, of_kinds in order.items():
        curves[name] = {}
        for kind, parts in of_kinds.items():
            numbers = sorted({round(n) for n in np.linspace(1, len(parts), POINTS)}) if parts else []
            curves[name][kind] = [(0, 1.0, 0.0)]
            for number in tqdm(numbers, desc=f"{name}, {kind}", unit=" points", disable=None, leave=False):
                layers = frozenset(part.layer_idx for part in parts[:number])
                if (kind, layers) not in known:
                    with ExitStack() as out:
                        for layer_idx in layers:
                            out.enter_context(left_out(encoder.model, kind, layer_idx))
                        known[kind, layers] = drift(encoder, tokens, reference)
                left = 1 - sum(sizes[kind][layer_idx] for layer_idx in layers) / whole
                curves[name][kind].append((number, left, known[kind, layers]))
    return curves


def format_analysis(analysis: Analysis) -> str:
    """Return a table for each criterion: each part's score and, in brackets, its place in the order of dropping."""
    return "\n\n".join(
        f"{name}\n"
        + "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, (5, 14, 14, 14), strict=True)) for row in rows)
        for name, rows in _tables(analysis).items()
    )


def _tables(analysis: Analysis) -> dict[str, list[list[str]]]:
    tables = {}
    for name, of_kinds in analysis.order.items():
        cells = {
            (kind, part.layer_idx): f"{part.score:.4f} ({rank})"
            for kind, parts in of_kinds.items()
            for rank, part in enumerate(parts, start=1)
        }
        rows = [
            [str(layer_idx), *(cells.get((kind, layer_idx), "dropped") for kind in of_kinds)]
            for layer_idx in range(analysis.num_hidden_layers)
        ]
        tables[name] = [["layer", *of_kinds], *rows]
    return tables


def _order_rows(analysis: Analysis) -> list[tuple]:
    return [
        (name, kind, rank, *part)
        for name, of_kinds in analysis.order.items()
        for kind, parts in of_kinds.items()
        for rank, part in enumerate(parts, start=1)
    ]


def _curve_rows(analysis: Analysis) -> list[tuple]:
    return [
        (name, kind, *point)
        for name, of_kinds in analysis.curves.items()
        for kind, curve in of_kinds.items()
        for point in curve
    ]


def _write_csv(path: Path, names: Sequence[str], rows: Sequence[tuple]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)


EXPLAINED = {
    "cosine": "1 - cos(x, y) between what enters a part and what leaves it, the residual added; mean over all tokens.\n"
    "EffiR's criterion (arXiv 2512.20612).",
    "embedding": "1 - cos between the final embedding with this one part left out and the model's own; mean over the\n"
    "texts.",
    "greedy": "Parts are left out one after the other, each time the one without which the final embedding is nearest\n"
    "to the model's own; the score is 1 - cos to that with this part and all before it left out, mean over the texts.",
}


def _page(analysis: Analysis) -> str:
    calibration = analysis.calibration
    first = ",".join(str(part.layer_idx) for part in next(iter(analysis.order.values()))["mlp"][:2])
    tables = []
    for name, rows in _tables(analysis).items():
        header, *body = (f"| {' | '.join(row)} |" for row in rows)
        tables.append("\n".join([f"### {name}", "", EXPLAINED[name], "", header, "| ---: " * 4 + "|", *body]))
    measured = (
        f"{calibration['texts']:,} texts ({calibration['tokens']:,} tokens) of {', '.join(calibration['sources'])}"
    )
    return f"""# What {lasting_name(analysis.model)} can do without

{analysis.num_hidden_layers} layers, {analysis.dtype}; measured on {measured},
seed {calibration["seed"]}. Low = redundant; in brackets the place in the order of dropping, 1 = first. Layers are
counted from 0, as in the base model.

![Importance by layer](importance.png)

Each panel has its own scale. Drift is 1 - cos of the final embedding to the model's own. Scores of greedy tend to grow
in the order of dropping, as each is the drift without all parts so far: they tell when a part goes, not how much it
matters.

{f"{chr(10)}{chr(10)}".join(tables)}

## Order of dropping

![Order of dropping](order.png)

Read from below: with N parts dropped, row N, the filled layers lack theirs. The longer a bar, the earlier it goes.

## Size against drift of the embedding

![Size against drift](curves.png)

Parts are dropped in the order of the tables. Drift is 1 - cos between the embeddings of a pruned model, not fine-tuned,
and the model's own, mean over the texts. In `curves.csv`, `number_dropped` counts parts, and `share_left` is the share
of the parameters outside the embeddings that is left. Scores are in `importance.csv`, all numbers in `analysis.json`.

## Next

```
effir prune --encoder {analysis.model} --drop-mlp-layers {first} --output models/small
```

drops the MLPs that {next(iter(analysis.order))} puts first; `effir finetune` then wins back what that cost.
"""
