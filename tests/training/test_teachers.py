import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, TOPICS, save_cross_encoder, save_model, save_sentence_files
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from effir_search.encoding.encoder import Encoder
from effir_search.settings import EncoderOptions
from effir_search.training.teachers import bi_encoder_scores, cross_encoder_scores, load_cross_encoder, load_teacher

CPU = EncoderOptions(device="cpu")
TEXTS = [f"{title} {text}".strip() for title, text in DOCUMENTS.values() if title or text]
PAIRS = [(query, text) for query in TOPICS.values() for text in TEXTS]


# Bi-encoders


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_bi_encoder_scores_as_sentence_transformers_does(tmp_path, similarity, normalize):
    prompts = {"query": "hot ", "document": "the "}
    folder = save_sentence_files(
        save_model(tmp_path / "bert", "bert"), normalize=normalize, similarity=similarity, prompts=prompts
    )
    reference = SentenceTransformer(str(folder), device="cpu").float()
    queries = reference.encode_query(list(TOPICS.values()))
    expected = reference.similarity(queries, reference.encode_document(TEXTS)).flatten()  # as PAIRS: query by query
    scores = bi_encoder_scores(Encoder.from_pretrained(folder, device="cpu", dtype="fp32"), PAIRS)
    assert scores == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)


def test_pairs_are_scored_in_their_order_and_repeated_texts_alike(bert_folder):
    encoder = Encoder.from_pretrained(bert_folder, device="cpu", dtype="fp32")
    scores = dict(zip(PAIRS, bi_encoder_scores(encoder, PAIRS), strict=True))
    order = np.random.default_rng(0).integers(len(PAIRS), size=200)
    shuffled = [PAIRS[number] for number in order]
    assert bi_encoder_scores(encoder, shuffled) == pytest.approx([scores[pair] for pair in shuffled], abs=1e-5)
    assert bi_encoder_scores(encoder, []) == []


# Cross-encoders


def test_a_cross_encoder_gives_its_logits(reranker):
    model = AutoModelForSequenceClassification.from_pretrained(reranker).eval()
    tokenizer = AutoTokenizer.from_pretrained(reranker)
    with torch.no_grad():
        expected = [model(**tokenizer(*pair, return_tensors="pt")).logits.item() for pair in PAIRS]
    scores = cross_encoder_scores(load_cross_encoder(reranker, device="cpu"), PAIRS, batch_size=5)
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert min(expected) < max(expected) - 0.01  # so the pairs can be told apart
    # sentence-transformers' own answer is the sigmoid of it.
    probabilities = CrossEncoder(str(reranker), device="cpu").predict(PAIRS)
    assert 1 / (1 + np.exp(-np.array(scores))) == pytest.approx(probabilities, rel=1e-4)


def test_a_cross_encoder_scores_one_pair_and_none(reranker):
    model = load_cross_encoder(reranker, device="cpu")
    assert cross_encoder_scores(model, PAIRS[:1]) == pytest.approx(cross_encoder_scores(model, PAIRS)[:1], abs=1e-5)
    assert cross_encoder_scores(model, []) == []


def test_a_cross_encoder_that_sentence_transformers_saved_is_read(tmp_path, reranker):
    CrossEncoder(str(reranker), device="cpu").save_pretrained(str(tmp_path / "saved"))
    scores = [cross_encoder_scores(load_cross_encoder(folder), PAIRS) for folder in (reranker, tmp_path / "saved")]
    assert scores[0] == scores[1]


def test_a_classifier_gives_no_score(tmp_path):
    model = load_cross_encoder(save_cross_encoder(tmp_path / "classifier", num_labels=3), device="cpu")
    with pytest.raises(ValueError, match="a cross-encoder with 3 labels gives no score; one with 1 label is needed"):
        cross_encoder_scores(model, PAIRS)


def test_a_score_that_is_not_finite_is_an_error(reranker):
    model = load_cross_encoder(reranker, device="cpu")
    with torch.no_grad():
        model.model.classifier.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="the teacher gave the score nan, which is not finite"):
        cross_encoder_scores(model, PAIRS)


@pytest.mark.parametrize("sentence_files", [False, True])
def test_a_model_without_a_scoring_layer_is_no_cross_encoder(tmp_path, sentence_files):
    folder = save_model(tmp_path / "bert", "bert")
    if sentence_files:
        save_sentence_files(folder)
    message = re.escape(f"{folder}: its weights are those of a BertModel without a layer that scores pairs")
    with pytest.raises(ValueError, match=message):
        load_cross_encoder(folder, device="cpu")


def test_a_folder_that_cannot_be_loaded_is_named(tmp_path, reranker):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: cannot be loaded: ")):
        load_cross_encoder(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{reranker}: cannot be loaded: ")):
        load_cross_encoder(reranker, device="abacus")


def test_without_sentence_transformers_the_way_to_get_it_is_said(monkeypatch, reranker):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # what Python itself takes for "not there"
    with pytest.raises(ValueError, match=re.escape("pip install 'effir_search[train]'")):
        load_cross_encoder(reranker)


# Either


def test_a_teacher_is_one_or_the_other(bert_folder, reranker):
    bi_encoder = Encoder.from_pretrained(bert_folder, device="cpu")
    assert load_teacher(bert_folder, options=CPU)(PAIRS) == pytest.approx(
        bi_encoder_scores(bi_encoder, PAIRS), abs=0.02
    )
    logits = cross_encoder_scores(load_cross_encoder(reranker, device="cpu"), PAIRS)
    assert load_teacher(reranker=reranker, options=CPU)(PAIRS) == pytest.approx(logits, abs=1e-5)
    for both in ((None, None), (bert_folder, reranker)):
        with pytest.raises(ValueError, match="give one teacher: either --teacher, a bi-encoder, or --reranker"):
            load_teacher(*both)


def test_a_cross_encoder_with_code_of_its_own_is_an_error_that_names_the_option(tmp_path):
    folder = save_cross_encoder(tmp_path / "reranker")
    expected = load_teacher(reranker=folder, options=CPU)(PAIRS[:3])
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoModelForSequenceClassification": "modeling_own.Scorer"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    with pytest.raises(ValueError, match=r"names code of its own \(modeling_own.Scorer\).*--stock-architecture"):
        load_teacher(reranker=folder)
    assert (
        load_teacher(reranker=folder, options=EncoderOptions(device="cpu", stock_architecture=True))(PAIRS[:3])
        == expected
    )
    (folder / "modules.json").write_text(json.dumps([{"path": "", "type": "custom_st.Transformer"}]))
    with pytest.raises(ValueError, match="module 0 is custom_st.Transformer, which is not supported"):
        load_teacher(reranker=folder, options=EncoderOptions(stock_architecture=True))
