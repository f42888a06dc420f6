"""Where a model is redundant: importance by every criterion, tables and figures in a folder: ``effir analyze``."""

import csv
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from effir_search.encoding.batching import Tokens
from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.files.whole import refuse_existing, whole_folder
from effir_search.model.arithmetic import part_parameters
from effir_search.model.checkpoint import dtype_name, lasting_name
from effir_search.model.layers import PART_KINDS, PartKind, parts_of
from effir_search.model.sentence_files import prunable_config
from effir_search.pruning.calibration import sample_texts
from effir_search.pruning.drift import drifts
from effir_search.pruning.dropping_order import CRITERIA, RankedPart, announce, num_passes
from effir_search.pruning.figures import CURVES, FIGURES
from effir_search.settings import NUM_TEXTS, EncoderOptions

# Points of a curve of drift, at most: each takes a forward pass, or the end of one.
POINTS = 8

# By criterion and kind, the parts in the order of dropping.
Order = dict[str, dict[PartKind, list[RankedPart]]]
# Number of parts dropped, share of the parameters left, drift.
Point = tuple[int, float, float]
Curves = dict[str, dict[PartKind, list[Point]]]
# A kind, and the layers that lack their part of it.
DropSet = tuple[PartKind, frozenset[int]]


@dataclass(frozen=True)
class Analysis:
    """What was measured on a model; its fields are those of ``analysis.json``.

    Attributes:
        model: Folder or hub name.
        model_sha256: See ``model.checkpoint.weights_sha256``.
        dtype: Of the arithmetic.
        num_hidden_layers: Layers of the base model.
        encoder: How texts became vectors: the fields of ``encoder.EncoderConfig``.
        calibration: See ``Calibration.record``, and the number of tokens.
        layers: By kind, the layers that still have such a part.
        order: By criterion and kind, the parts ``(layer_idx, score)`` in the order of dropping.
        curves: By criterion and kind, ``(number, share, drift)``: with so many parts dropped in that order, the share
            of the parameters outside the embeddings that is left, and ``1 - cos`` of the embeddings to the model's own.
            Empty where they were not asked for.
    """

    model: str
    model_sha256: str
    dtype: str
    num_hidden_layers: int
    encoder: dict
    calibration: dict
    layers: dict[PartKind, list[int]]
    order: Order
    curves: Curves


def analyze(
    encoder_name: str,
    output: Path,
    *,
    sources: Sequence[str],
    criteria: Sequence[str] = ("cosine", "embedding"),
    curves: bool = False,
    greedy_numbers: Mapping[PartKind, int] | None = None,
    size: int = NUM_TEXTS,
    seed: int = 0,
    options: EncoderOptions = DEFAULT_OPTIONS,
) -> Analysis:
    """Measure how much each part of a model matters, and write a report: ``effir analyze``.

    The folder holds ``analysis.json`` (see ``Analysis``), ``importance.csv``, with curves ``curves.csv``, and a page,
    ``README.md``, with its figures. It appears whole or not at all.

    Args:
        encoder_name: Model folder or hub name; a pruned model too.
        output: The new folder.
        sources: Texts to measure on, see ``calibration.sample_texts``.
        criteria: Keys of ``dropping_order.CRITERIA``.
        curves: Also measure how far embeddings drift as more and more parts are dropped, in at most ``POINTS`` steps.
        greedy_numbers: How many parts of each kind the criterion greedy chooses; None = all, of a kind not named none.
        size: How many texts.
        seed: Of their sample.
        options: Of the encoder; a dtype of None is that of the weights.

    Raises:
        ValueError: No texts, or a model that cannot be pruned.
        OSError: The folder exists, or a file cannot be read or written.
    """
    refuse_existing(output, replaces=())
    config = prunable_config(encoder_name, stock_architecture=options.stock_architecture)
    calibration = sample_texts(sources, size=size, seed=seed)
    encoder = Encoder.from_pretrained(encoder_name, options.with_defaults(dtype="saved"), backend="torch")
    tokens = encoder.tokenize(calibration.texts, prompt=encoder.config.document_prompt)
    rankings = {name: _rankings(name, greedy_numbers) for name in dict.fromkeys(criteria)}
    announce(encoder, tokens, _passes(encoder, rankings, curves=curves))
    order = _order(encoder, tokens, rankings)
    analysis = Analysis(
        model=encoder_name,
        model_sha256=encoder.weights_sha256,
        dtype=dtype_name(encoder.dtype),
        num_hidden_layers=config.num_hidden_layers,
        encoder=asdict(encoder.config),
        calibration=calibration.record(encoder.config.max_length) | {"tokens": sum(map(len, tokens.input_ids))},
        layers={kind: list(parts_of(encoder.model, kind)) for kind in PART_KINDS},
        order=order,
        curves=_curves(encoder, tokens, order) if curves else {},
    )
    _write_report(analysis, output)
    return analysis


class Ranking(NamedTuple):
    """What a criterion is asked for: the order of the parts of these kinds, of each the first ``number``; None = all.

    Each kind starts from the model as it is.
    """

    kinds: Sequence[PartKind]
    number: int | None


def _rankings(name: str, greedy_numbers: Mapping[PartKind, int] | None) -> list[Ranking]:
    """Return what a criterion is asked for."""
    if name != "greedy" or greedy_numbers is None:
        return [Ranking(PART_KINDS, None)]
    return [Ranking([kind], number) for kind, number in greedy_numbers.items()]


def _passes(encoder: Encoder, rankings: Mapping[str, Sequence[Ranking]], *, curves: bool) -> dict[str, int]:
    """Return how many passes over the texts there will be, by what they are for."""
    passes = {
        name: sum(num_passes(encoder.model, name, *ranking) for ranking in asked) for name, asked in rankings.items()
    }
    if curves:
        passes["curves, at most"] = 2 + POINTS * len(PART_KINDS) * len(rankings)
    return passes


def _order(encoder: Encoder, tokens: Tokens, rankings: Mapping[str, Sequence[Ranking]]) -> Order:
    """Return ``Analysis.order``."""
    order: Order = {name: {kind: [] for kind in PART_KINDS} for name in rankings}
    for name, asked in rankings.items():
        for ranking in asked:
            order[name] |= CRITERIA[name](encoder, tokens, *ranking)
    return order


def _write_report(analysis: Analysis, output: Path) -> None:
    """Write the folder of an analysis."""
    with whole_folder(output) as folder:
        text = json.dumps(asdict(analysis), indent=1, ensure_ascii=False)
        (folder / "analysis.json").write_text(text + "\n", encoding="utf-8")
        _write_csv(folder / "importance.csv", ("criterion", "kind", "rank", "layer", "score"), _order_rows(analysis))
        if analysis.curves:
            columns = ("criterion", "kind", "number_dropped", "share_left", "drift")
            _write_csv(folder / "curves.csv", columns, _curve_rows(analysis))
        for name, draw in FIGURES.items():
            if analysis.curves or name != CURVES:
                draw(analysis).savefig(folder / name, format="png")
        (folder / "README.md").write_text(_page(analysis), encoding="utf-8")


def _curves(encoder: Encoder, tokens: Tokens, order: Order) -> Curves:
    """Return ``Analysis.curves``; a set of parts whose drift is known already is not left out again."""
    sizes = {
        kind: {
            layer_idx: part_parameters(encoder.model, kind, layer_idx) for layer_idx in parts_of(encoder.model, kind)
        }
        for kind in PART_KINDS
    }
    total_size = sum(sizes["block"].values())
    steps = {
        (name, kind): [frozenset(part.layer_idx for part in parts[:number]) for number in _numbers(len(parts))]
        for name, parts_by_kind in order.items()
        for kind, parts in parts_by_kind.items()
    }
    drift_of = _known_drifts(order)
    plans = list(dict.fromkeys((kind, layers) for (_, kind), sets in steps.items() for layers in sets))
    drift_of |= _measured_drifts(encoder, tokens, [plan for plan in plans if plan not in drift_of])
    curves: Curves = {name: {} for name in order}
    for (name, kind), sets in steps.items():
        curves[name][kind] = [(0, 1.0, 0.0)]
        for layers in sets:
            share_left = 1 - sum(sizes[kind][layer_idx] for layer_idx in layers) / total_size
            curves[name][kind].append((len(layers), share_left, drift_of[kind, layers]))
    return curves


def _numbers(num_parts: int) -> list[int]:
    """Return the numbers of dropped parts at which a curve has a point, at most ``POINTS``."""
    return sorted({round(number) for number in np.linspace(1, num_parts, POINTS)}) if num_parts else []


def _known_drifts(order: Order) -> dict[DropSet, float]:
    """Return the drifts that scores are: of greedy with all parts so far left out, of embedding with one."""
    drift_of: dict[DropSet, float] = {}
    for kind, parts in order.get("greedy", {}).items():
        for number, part in enumerate(parts, start=1):
            drift_of[kind, frozenset(layer_idx for layer_idx, _ in parts[:number])] = part.score
    for kind, parts in order.get("embedding", {}).items():
        drift_of |= {(kind, frozenset([layer_idx])): score for layer_idx, score in parts}
    return drift_of


def _measured_drifts(encoder: Encoder, tokens: Tokens, plans: Sequence[DropSet]) -> dict[DropSet, float]:
    """Return the drift with each of these sets of parts left out."""
    reference = encoder.encode_tokens(tokens).embeddings
    total = len(plans) * sum(map(bool, tokens.input_ids))
    with tqdm(total=total, desc="curves", unit=" texts", disable=None) as progress:
        parts = [[(kind, layer_idx) for layer_idx in sorted(layers)] for kind, layers in plans]
        return dict(zip(plans, drifts(encoder, tokens, parts, reference, done=progress.update), strict=True))


def format_analysis(analysis: Analysis) -> str:
    """Return a table for each criterion: each part's score and, in brackets, its place in the order of dropping."""
    return "\n\n".join(
        f"{name}\n"
        + "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, (5, 14, 14, 14), strict=True)) for row in rows)
        for name, rows in _tables(analysis).items()
    )


def _tables(analysis: Analysis) -> dict[str, list[list[str]]]:
    tables = {}
    for name, order in analysis.order.items():
        cells = {
            (kind, part.layer_idx): f"{part.score:.4f} ({rank})"
            for kind, parts in order.items()
            for rank, part in enumerate(parts, start=1)
        }
        rows = [
            [str(layer_idx), *(cells.get((kind, layer_idx), _missing(analysis, kind, layer_idx)) for kind in order)]
            for layer_idx in range(analysis.num_hidden_layers)
        ]
        tables[name] = [["layer", *order], *rows]
    return tables


def _missing(analysis: Analysis, kind: PartKind, layer_idx: int) -> str:
    """Return what stands for a part without a score: it is gone, or was not asked for."""
    return "" if layer_idx in analysis.layers[kind] else "dropped"


def _order_rows(analysis: Analysis) -> list[tuple]:
    return [
        (name, kind, rank, *part)
        for name, order in analysis.order.items()
        for kind, parts in order.items()
        for rank, part in enumerate(parts, start=1)
    ]


def _curve_rows(analysis: Analysis) -> list[tuple]:
    return [
        (name, kind, *point)
        for name, curves in analysis.curves.items()
        for kind, curve in curves.items()
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

CURVES_EXPLAINED = """## Size against drift of the embedding

![Size against drift](curves.png)

Parts are dropped in the order of the tables. Drift is 1 - cos between the embeddings of a pruned model, not fine-tuned,
and the model's own, mean over the texts. In `curves.csv`, `number_dropped` counts parts, and `share_left` is the share
of the parameters outside the embeddings that is left.

"""
PARTS: dict[PartKind, str] = {"mlp": "MLPs", "attention": "attentions", "block": "layers"}


def _page(analysis: Analysis) -> str:
    calibration = analysis.calibration
    criterion, order = next(iter(analysis.order.items()))
    kind = next(kind for kind in ("mlp", "attention", "block") if order[kind])
    first = ",".join(str(part.layer_idx) for part in order[kind][: min(2, max(1, len(order[kind]) - 1))])
    tables = []
    for name, rows in _tables(analysis).items():
        header, *body = (f"| {' | '.join(row)} |" for row in rows)
        tables.append("\n".join([f"### {name}", "", EXPLAINED[name], "", header, "| ---: " * 4 + "|", *body]))
    measured = (
        f"{calibration['texts']:,} texts ({calibration['tokens']:,} tokens) of {', '.join(calibration['sources'])}"
    )
    return f"""# What {lasting_name(analysis.model)} can do without

{analysis.num_hidden_layers} layers, {analysis.dtype}, {analysis.encoder["pooling"]} pooling; measured on {measured},
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

{CURVES_EXPLAINED if analysis.curves else ""}## Next

```
effir prune --encoder {shlex.quote(analysis.model)} --drop-{kind}-layers {first} --output models/small
```

drops the {PARTS[kind]} that {criterion} puts first; `effir finetune` then wins back what that cost. Scores are in
`importance.csv`, all numbers in `analysis.json`.
"""
