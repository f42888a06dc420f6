import csv
import json
from dataclasses import asdict

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import save_model

from effir_search.cli import cli
from effir_search.encoding.encoder import Encoder
from effir_search.model.arithmetic import count
from effir_search.model.layers import PART_KINDS
from effir_search.model.surgery import prune
from effir_search.pruning.analyze import analyze, format_analysis
from effir_search.pruning.calibration import sample_texts
from effir_search.pruning.drift import drift
from effir_search.pruning.dropping_order import CRITERIA
from effir_search.pruning.figures import curves_figure
from effir_search.settings import Criterion, EncoderOptions, choices

FILES = ["README.md", "analysis.json", "curves.csv", "curves.png", "importance.csv", "importance.png", "order.png"]


@pytest.fixture(scope="module")
def report(tmp_path_factory, llama_folder, collection):
    folder = tmp_path_factory.mktemp("report") / "analysis"
    options = {"criteria": list(CRITERIA), "curves": True, "size": 8, "options": EncoderOptions(dtype="fp32")}
    analysis = analyze(str(llama_folder), folder, sources=[str(collection)], **options)
    return folder, analysis


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_folder_holds_the_scores_of_every_part_by_every_criterion(report, llama_folder, collection):
    folder, analysis = report
    assert sorted(path.name for path in folder.iterdir()) == FILES
    record = json.loads((folder / "analysis.json").read_text())
    encoder = Encoder.from_pretrained(llama_folder, dtype="fp32")
    tokens = encoder.tokenize(sample_texts([str(collection)], size=8).texts)
    assert record["calibration"]["tokens"] == sum(map(len, tokens.input_ids))
    for name, criterion in CRITERIA.items():
        expected = criterion(encoder, tokens, PART_KINDS, None)
        assert record["order"][name] == {kind: [list(part) for part in parts] for kind, parts in expected.items()}
    rows = rows_of(folder / "importance.csv")
    assert len(rows) == 3 * 3 * 4
    for row in rows:
        layer_idx, score = record["order"][row["criterion"]][row["kind"]][int(row["rank"]) - 1]
        assert (int(row["layer"]), float(row["score"])) == (layer_idx, score)


def test_curves_are_the_sizes_and_drifts_of_really_pruned_models(report, llama_folder, collection):
    folder, analysis = report
    full = Encoder.from_pretrained(llama_folder, dtype="fp32")
    tokens = full.tokenize(sample_texts([str(collection)], size=8).texts)
    reference = full.encode_tokens(tokens).embeddings
    final_norm = 32
    whole = count(prune(full.model)).without_embeddings - final_norm
    rows = rows_of(folder / "curves.csv")
    assert len(rows) == 3 * 3 * 5
    # A model of embeddings alone, the end of the curve of blocks, cannot be pruned to.
    for row in [row for row in rows if (row["kind"], row["number_dropped"]) != ("block", "4")]:
        layers = [
            part.layer_idx for part in analysis.order[row["criterion"]][row["kind"]][: int(row["number_dropped"])]
        ]
        encoder = Encoder.from_pretrained(llama_folder, dtype="fp32")
        encoder = encoder.with_model(prune(encoder.model, **{row["kind"]: layers}))
        left = count(encoder.model).without_embeddings - final_norm
        assert float(row["share_left"]) == pytest.approx(left / whole, abs=1e-9)
        assert float(row["drift"]) == pytest.approx(drift(encoder, tokens, reference), abs=2e-6)


def test_figures_are_png_and_the_page_shows_them_and_the_scores(report):
    folder, analysis = report
    page = (folder / "README.md").read_text()
    for name in FILES:
        if name.endswith(".png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
            assert f"]({name})" in page
    first = analysis.order["cosine"]["mlp"][0]
    (row,) = (line for line in page.split("### ")[1].splitlines() if line.startswith(f"| {first.layer_idx} |"))
    assert row.split("|")[1 + 1 + PART_KINDS.index("mlp")].strip() == f"{first.score:.4f} (1)"


def test_the_legend_of_the_curves_names_every_kind_once_and_hides_no_panel(report):
    _folder, analysis = report
    figure = curves_figure(analysis)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(PART_KINDS)
    assert [panel.get_title("left") for panel in figure.axes] == list(CRITERIA)
    for panel in figure.axes:
        assert len(panel.lines) == len(PART_KINDS)
        assert not legend.get_window_extent().overlaps(panel.get_tightbbox())


def test_curves_are_measured_only_if_they_are_asked_for(tmp_path, bert_folder, collection, caplog):
    with caplog.at_level("INFO"):
        analysis = analyze(str(bert_folder), tmp_path / "r", sources=[str(collection)], criteria=["cosine"])
    assert caplog.messages[-1] == "measuring on 11 texts: cosine 1 pass"
    assert analysis.curves == {}
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [n for n in FILES if not n.startswith("curves")]
    page = (tmp_path / "r" / "README.md").read_text()
    assert "curves" not in page and f"effir prune --encoder {bert_folder} --drop-mlp-layers " in page


def test_greedy_orders_only_as_many_parts_as_are_asked_for(tmp_path, bert_folder, collection):
    options = {"sources": [str(collection)], "criteria": ["cosine", "greedy"], "options": EncoderOptions(dtype="fp32")}
    analysis = analyze(str(bert_folder), tmp_path / "r", greedy_numbers={"mlp": 2}, **options)
    encoder = Encoder.from_pretrained(bert_folder, dtype="fp32")
    tokens = encoder.tokenize(sample_texts([str(collection)]).texts)
    expected = CRITERIA["greedy"](encoder, tokens, ["mlp"], 2)["mlp"]
    assert analysis.order["greedy"] == {"attention": [], "mlp": expected, "block": []}
    # A part that was not asked for is there all the same.
    assert "dropped" not in format_analysis(analysis)


def test_texts_become_vectors_as_the_options_say_and_the_record_says_how(tmp_path, llama_folder, collection):
    arguments = ["analyze", "--encoder", llama_folder, "--texts", collection, "--output", tmp_path / "r"]
    arguments += ["--pooling", "mean", "--append-eos", "--normalize", "--query-prompt", "hot ", "--max-length", 9]
    arguments += ["--document-prompt", "the ", "--dtype", "fp32", "--criterion", "embedding"]
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    options = {"pooling": "mean", "append_eos": True, "normalize": True, "query_prompt": "hot ", "max_length": 9}
    encoder = Encoder.from_pretrained(llama_folder, dtype="fp32", document_prompt="the ", **options)
    record = json.loads((tmp_path / "r" / "analysis.json").read_text())
    assert record["encoder"] == asdict(encoder.config) and record["encoder"]["pooling"] == "mean"
    tokens = encoder.tokenize(sample_texts([str(collection)]).texts, prompt="the ")
    expected = CRITERIA["embedding"](encoder, tokens, ["mlp"], None)["mlp"]
    assert record["order"]["embedding"]["mlp"] == list(map(list, expected))


def test_a_report_on_a_model_without_mlps_names_parts_that_it_has(tmp_path, bert_folder, collection):
    encoder = Encoder.from_pretrained(bert_folder, dtype="fp32")
    encoder = encoder.with_model(prune(encoder.model, mlp=range(4), attention=[0, 1]))
    encoder.save(tmp_path / "no mlp")
    analysis = analyze(str(tmp_path / "no mlp"), tmp_path / "r", sources=[str(collection)], criteria=["cosine"])
    first = analysis.order["cosine"]["attention"][0].layer_idx
    page = (tmp_path / "r" / "README.md").read_text()
    # One of the two that are left: without both, nothing would be.
    assert f"effir prune --encoder '{tmp_path / 'no mlp'}' --drop-attention-layers {first} --output" in page


def test_a_pruned_model_s_report_says_what_is_gone(tmp_path, bert_folder, collection):
    encoder = Encoder.from_pretrained(bert_folder, dtype="fp32")
    encoder = encoder.with_model(prune(encoder.model, mlp=[1], block=[2]))
    encoder.save(tmp_path / "pruned")
    analysis = analyze(str(tmp_path / "pruned"), tmp_path / "report", sources=[str(collection)], criteria=["cosine"])
    lines = [line.split() for line in format_analysis(analysis).splitlines()]
    assert lines[:2] == [["cosine"], ["layer", "attention", "mlp", "block"]]
    attention, block = ({i: score for i, score in analysis.order["cosine"][kind]} for kind in ("attention", "block"))
    rank = [part.layer_idx for part in analysis.order["cosine"]["attention"]].index(1) + 1
    assert lines[3][:4] == ["1", f"{attention[1]:.4f}", f"({rank})", "dropped"] and lines[3][4] == f"{block[1]:.4f}"
    assert lines[4] == ["2", "dropped", "dropped", "dropped"]


def test_curves_have_few_points_however_many_layers(tmp_path, collection):
    from transformers import AutoModel, LlamaConfig

    config = LlamaConfig(
        vocab_size=90, hidden_size=16, intermediate_size=16, num_hidden_layers=20, num_attention_heads=2, pad_token_id=0
    )
    save_model(tmp_path / "deep", "llama")
    AutoModel.from_config(config).save_pretrained(tmp_path / "deep")
    options = {
        "sources": [str(collection)],
        "criteria": ["cosine"],
        "curves": True,
        "options": EncoderOptions(dtype="fp32"),
    }
    analysis = analyze(str(tmp_path / "deep"), tmp_path / "report", **options)
    numbers = [point[0] for point in analysis.curves["cosine"]["mlp"]]
    assert len(numbers) == 9 and numbers[0] == 0 and numbers[-1] == 20 and numbers == sorted(numbers)
    assert not np.isnan([point[2] for point in analysis.curves["cosine"]["mlp"]]).any()


def test_the_command_prints_the_scores_and_where_the_report_is(tmp_path, bert_folder, collection):
    arguments = ["analyze", "--encoder", str(bert_folder), "--texts", str(collection), "--output", str(tmp_path / "r")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("cosine\n") and "\nembedding\n" in result.output
    assert result.output.endswith(f"report -> {tmp_path / 'r' / 'README.md'}\n")
    again = CliRunner().invoke(cli, arguments)
    assert again.exit_code == 1 and again.output.startswith(f"Error: {tmp_path / 'r'}: exists already")
    no_texts = CliRunner().invoke(cli, [*arguments[:3], "--output", str(tmp_path / "s")])
    assert no_texts.exit_code == 2 and "--texts" in no_texts.output


def test_the_commands_choices_are_the_criteria():
    (option,) = (parameter for parameter in cli.commands["analyze"].params if parameter.name == "criteria")
    assert tuple(CRITERIA) == choices(Criterion) == tuple(option.type.choices)


def test_nothing_is_left_behind_when_the_model_cannot_be_pruned(tmp_path, collection):
    save_model(tmp_path / "t5", "t5")
    with pytest.raises(ValueError, match="'t5' cannot be pruned"):
        analyze(str(tmp_path / "t5"), tmp_path / "report", sources=[str(collection)])
    assert [path.name for path in tmp_path.iterdir()] == ["t5"]
