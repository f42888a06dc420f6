import copy
import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import DOCUMENTS, save_model, save_sentence_files
from processes import fork_server, forked_by
from torch import Tensor
from torch.nn import functional as F

from effir_search.encoding.encoder import Encoder
from effir_search.settings import LossSettings
from effir_search.text.examples import Example, document_key
from effir_search.training.dev import likeness
from effir_search.training.imitation_objective import ImitationObjective
from effir_search.training.in_batch_negatives import check_examples
from effir_search.training.plain_texts import PlainText
from effir_search.training.retrieval_objective import RetrievalObjective
from effir_search.training.teachers import bi_encoder_scores

TEXTS = [text for _, text in DOCUMENTS.values() if text]
QUERIES = ["what eats the cat ?", "hot soup", "sweet tea", "warm kitchen"]
SETTINGS = LossSettings(temperature=0.1, teacher_temperature=1.0)
OVER_BATCH = replace(SETTINGS, distill_over="batch", contrastive_weight=0.0)
WITH_TOKENS = LossSettings(temperature=0.1, token_weight=1.0)


def example(
    query: int, positive: int, negatives: tuple[int, ...] = (), *, scores: bool = False, known: tuple = ()
) -> Example:
    return Example(
        QUERIES[query],
        TEXTS[positive],
        [TEXTS[number] for number in negatives],
        [1.0, *(0.3 * number for number in range(len(negatives)))] if scores else None,
        [document_key(TEXTS[number]) for number in (positive, *known)],
    )


EXAMPLES = [
    example(0, 0, (1, 2), scores=True, known=(5,)),
    example(1, 6, (3, 4), scores=True),
    example(2, 5, (0, 1), scores=True),
    example(3, 1, (7, 6), scores=True, known=(2,)),
]


def load(folder: str, **settings: object) -> Encoder:
    encoder = Encoder.from_pretrained(folder, device="cpu", dtype="fp32", **settings)
    encoder.model.requires_grad_(True)
    return encoder


def gradients(objective: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in objective.model.named_parameters() if p.grad is not None}


def expected_contrastive(encoder: Encoder, examples: list[Example], temperature: float) -> float:
    """InfoNCE query by query from the encoder's own vectors, in numpy."""
    texts = list(dict.fromkeys(text for e in examples for text in (e.positive, *e.negatives)))
    vectors = dict(zip(texts, encoder.encode_documents(texts), strict=True))
    losses = []
    for e, query in zip(examples, encoder.encode_queries([e.query for e in examples]), strict=True):
        allowed = [t for t in texts if t == e.positive or document_key(t) not in e.known]
        scores = np.array([query @ vectors[t] for t in allowed], dtype=np.float64) / temperature
        losses.append(np.log(np.exp(scores).sum()) - scores[allowed.index(e.positive)])
    return float(np.mean(losses))


def test_embeddings_are_those_of_the_encoder(bert_folder):
    encoder = load(bert_folder, batch_tokens=20)  # several forward passes
    found = RetrievalObjective(encoder, SETTINGS).embed_texts(TEXTS, "")
    np.testing.assert_allclose(found.detach().numpy(), encoder.encode_documents(TEXTS), atol=1e-6)


@pytest.mark.parametrize("pooling", ["max", "weightedmean", "mean_sqrt_len_tokens", "cls+last"])
@pytest.mark.parametrize("cached", [False, True])
def test_embeddings_are_those_of_the_encoder_by_every_pooling_also_without_the_prompt(tmp_path, pooling, cached):
    save_sentence_files(save_model(tmp_path, "bert"), prompts={"query": "soup "}, include_prompt=False)
    encoder = load(tmp_path, pooling=pooling, batch_tokens=20)
    objective = RetrievalObjective(encoder, LossSettings(temperature=0.1, cached=cached))
    embeddings = objective.embed_texts(QUERIES, "soup ")
    np.testing.assert_allclose(embeddings.detach().numpy(), encoder.encode_queries(QUERIES), atol=1e-6)
    embeddings.square().sum().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(objective).values())


def test_the_loss_is_infonce_with_known_positives_left_out(bert_folder):
    encoder = load(bert_folder)
    examples = [e._replace(scores=None) for e in EXAMPLES]
    terms = RetrievalObjective(encoder, SETTINGS)(examples)
    assert terms["loss"].item() == pytest.approx(expected_contrastive(encoder, examples, 0.1), rel=1e-5)
    assert "distillation" not in terms
    unmasked = [e._replace(known=e.known[:1]) for e in examples]
    assert expected_contrastive(encoder, unmasked, 0.1) > terms["loss"].item()  # the test's masks do something


def test_the_text_of_the_query_itself_is_no_negative_of_it(bert_folder):
    # As in ArguAna, where what one query finds is another query.
    objective = RetrievalObjective(load(bert_folder), SETTINGS)
    own = Example(QUERIES[0], TEXTS[0], [QUERIES[0], TEXTS[1]], None, [document_key(TEXTS[0])])
    without = own._replace(negatives=[TEXTS[1]])
    assert objective([own])["loss"].item() == pytest.approx(objective([without])["loss"].item(), rel=1e-6)


PAIR = [example(0, 0), example(1, 6)]
# Of one query with two positives, and one of the same text that knows only the first of them.
SHARED = [example(0, 0, known=(1,)), example(0, 1, known=(0,))]
ITSELF = [Example(QUERIES[0], TEXTS[0], [QUERIES[0], TEXTS[0]], None, [document_key(TEXTS[0])])]
KNOWN = example(0, 0, (1,), known=(1,))


@pytest.mark.parametrize(
    ("examples", "batch_size"),
    [(PAIR, 1), (PAIR[:1], 8), (PAIR[:1] * 5, 2), (SHARED, 2), (ITSELF, 4), ([KNOWN], 1)],
)
def test_examples_whose_loss_is_0_whatever_the_model_are_an_error_before_training(bert_folder, examples, batch_size):
    objective = RetrievalObjective(load(bert_folder), SETTINGS)
    batches = [examples] if batch_size > 1 else [[one] for one in examples]
    for batch in batches:
        loss = objective(batch)["loss"]
        loss.backward()
        assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(objective).values())
    with pytest.raises(ValueError, match="no query meets a document to be told from its positive"):
        objective.check(examples, batch_size)


@pytest.mark.parametrize(
    ("examples", "batch_size"),
    [
        (PAIR, 2),
        ([example(0, 0, (1,))], 1),
        ([SHARED[0], example(0, 1)], 2),
        ([example(0, 1), SHARED[0]], 2),
        ([KNOWN._replace(scores=[1.0, 0.5])], 1),
    ],
)
def test_examples_that_give_a_gradient_are_none(bert_folder, examples, batch_size):
    objective = RetrievalObjective(load(bert_folder), SETTINGS)
    objective.check(examples, batch_size)
    objective(examples)["loss"].backward()
    assert any(gradient.any() for gradient in gradients(objective).values())


def test_scores_that_weigh_nothing_are_not_learned_from():
    with pytest.raises(ValueError, match="a batch of 1 example without hard negatives"):
        check_examples([KNOWN._replace(scores=[1.0, 0.5])], 1, replace(SETTINGS, distillation_weight=0.0))


def test_a_document_of_two_examples_counts_once(bert_folder):
    encoder = load(bert_folder)
    examples = [example(0, 0, (1,)), example(1, 6, (1,))]
    found = RetrievalObjective(encoder, SETTINGS)(examples)["loss"].item()
    assert found == pytest.approx(expected_contrastive(encoder, examples, 0.1), rel=1e-5)


def test_the_teachers_scores_are_learned_from_over_a_querys_own_candidates(bert_folder):
    encoder = load(bert_folder)
    e = EXAMPLES[0]
    terms = RetrievalObjective(
        encoder, LossSettings(temperature=0.1, teacher_temperature=2.0, distillation_weight=3.0)
    )([e])
    vectors = torch.from_numpy(encoder.encode_documents([e.positive, *e.negatives]))
    student = F.log_softmax(vectors @ torch.from_numpy(encoder.encode_queries([e.query]))[0] / 0.1, dim=0)
    expected = F.kl_div(student, F.log_softmax(torch.tensor(e.scores) / 2.0, 0), reduction="sum", log_target=True)
    assert terms["distillation"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert terms["loss"].item() == pytest.approx(terms["contrastive"].item() + 3 * expected.item(), rel=1e-5)


def test_an_example_without_scores_adds_nothing_to_the_divergence(bert_folder):
    objective = RetrievalObjective(load(bert_folder), SETTINGS)
    both = objective([EXAMPLES[0], EXAMPLES[1]._replace(scores=None)])["distillation"].item()
    assert both == pytest.approx(objective([EXAMPLES[0]])["distillation"].item() / 2, rel=1e-5)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bi-encoder of another architecture, whose similarity is a dot product."""
    return save_model(tmp_path_factory.mktemp("teacher"), "roberta")


def documents_of(examples: list[Example]) -> list[str]:
    return list(dict.fromkeys(text for e in examples for text in (e.positive, *e.negatives)))


def test_the_teachers_scores_of_every_document_of_the_batch_are_learned_from(bert_folder, teacher_folder):
    encoder, teacher = load(bert_folder), load(teacher_folder)
    settings = replace(OVER_BATCH, teacher_temperature=3.0, distillation_weight=2.0)
    terms = RetrievalObjective(encoder, settings, teacher)(EXAMPLES)
    texts, queries = documents_of(EXAMPLES), [e.query for e in EXAMPLES]
    assert len(texts) == 8
    expected = 0.0
    for number in range(len(queries)):  # query by query, its positives and what it knows among the documents
        student, its_teacher = (
            np.exp(np.float64(model.encode_documents(texts) @ model.encode_queries(queries)[number] / temperature))
            for model, temperature in ((encoder, 0.1), (teacher, 3.0))
        )
        student, its_teacher = student / student.sum(), its_teacher / its_teacher.sum()
        expected += (its_teacher * np.log(its_teacher / student)).sum() / len(queries)
    assert terms["distillation"].item() == pytest.approx(expected, rel=1e-4)
    assert terms["loss"].item() == pytest.approx(2 * expected, rel=1e-4)  # nothing of InfoNCE


def test_over_the_batch_is_over_the_candidates_where_every_document_is_one(bert_folder, teacher_folder):
    encoder, teacher = load(bert_folder), load(teacher_folder)
    texts = documents_of(EXAMPLES)
    every = [e._replace(negatives=[text for text in texts if text != e.positive]) for e in EXAMPLES]
    scored = [
        e._replace(scores=bi_encoder_scores(teacher, [(e.query, text) for text in (e.positive, *e.negatives)]))
        for e in every
    ]
    prepared = RetrievalObjective(encoder, replace(OVER_BATCH, distill_over="candidates"))(scored)
    beside = RetrievalObjective(encoder, OVER_BATCH, teacher)(every)
    assert beside["distillation"].item() == pytest.approx(prepared["distillation"].item(), rel=1e-4)


@pytest.mark.parametrize("dimensions", [(), (32, 32)])
def test_a_teacher_that_is_the_student_has_nothing_to_tell(bert_folder, dimensions):
    encoder = load(bert_folder)
    settings = replace(OVER_BATCH, teacher_temperature=0.1, dimensions=dimensions)
    objective = RetrievalObjective(encoder, settings, load(bert_folder))
    loss = objective(EXAMPLES)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients(objective).values())


def test_without_a_weight_infonce_leaves_no_gradient(bert_folder):
    found = []
    for weight in (0.0, 1.0):
        objective = RetrievalObjective(load(bert_folder), replace(SETTINGS, contrastive_weight=weight))
        terms = objective(EXAMPLES)
        expected = weight * terms["contrastive"].item() + terms["distillation"].item()
        assert terms["loss"].item() == pytest.approx(expected, rel=1e-6)
        terms["loss"].backward()
        found.append(gradients(objective))
    assert any(not torch.allclose(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(("examples", "batch_size"), [(PAIR, 2), ([example(0, 0, (1,))], 1), ([KNOWN], 1), (SHARED, 2)])
def test_documents_that_a_teacher_can_rank_are_something_to_learn(bert_folder, teacher_folder, examples, batch_size):
    objective = RetrievalObjective(load(bert_folder), OVER_BATCH, load(teacher_folder))
    objective.check(examples, batch_size)
    objective(examples)["loss"].backward()
    assert any(gradient.any() for gradient in gradients(objective).values())


def test_a_single_document_is_nothing_that_a_teacher_could_rank():
    for examples, batch_size in ((PAIR, 1), (PAIR[:1] * 5, 4)):
        with pytest.raises(ValueError, match="without hard negatives: no query meets a document"):
            check_examples(examples, batch_size, OVER_BATCH)


def test_without_infonce_and_scores_there_is_nothing_to_learn():
    settings = replace(SETTINGS, contrastive_weight=0.0)
    check_examples([example(0, 0, (1,), scores=True)], 1, settings)
    with pytest.raises(ValueError, match="--contrastive-weight 0: no example has a teacher's scores"):
        check_examples([example(0, 0, (1,)), example(1, 6, (3,))], 2, settings)


@pytest.mark.parametrize("over", ["candidates", "batch"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_cached_gradient_is_the_gradient(bert_folder, teacher_folder, dropout, over):
    found = {}
    teacher = load(teacher_folder) if over == "batch" else None
    for cached in (False, True):
        encoder = load(bert_folder, batch_tokens=24)
        for module in encoder.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        encoder.model.train()
        torch.manual_seed(1)
        objective = RetrievalObjective(encoder, replace(SETTINGS, cached=cached, distill_over=over), teacher)
        loss = objective(EXAMPLES)["loss"]
        loss.backward()
        found[cached] = loss.detach(), gradients(objective)
    assert found[True][0] == found[False][0]
    assert found[True][1].keys() == found[False][1].keys()
    for name, gradient in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_loss_is_the_mean_over_the_dimensions(bert_folder):
    encoder = load(bert_folder)
    examples = [e._replace(scores=None) for e in EXAMPLES]
    found = RetrievalObjective(encoder, LossSettings(temperature=0.1, dimensions=(32, 8)))(examples)["loss"].item()
    narrow = load(bert_folder, dimension=8)
    vectors = {
        8: lambda texts: F.normalize(torch.from_numpy(narrow.encode_documents(texts)), dim=-1).numpy(),
        32: encoder.encode_documents,
    }
    losses = []
    for encode in vectors.values():
        stand_in = copy.copy(encoder)
        stand_in.encode_documents = stand_in.encode_queries = encode
        losses.append(expected_contrastive(stand_in, examples, 0.1))
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


def test_dimensions_beyond_the_embeddings_are_refused(bert_folder):
    with pytest.raises(ValueError, match="--matryoshka 64: embeddings have 32 components"):
        RetrievalObjective(load(bert_folder), LossSettings(dimensions=(64,)))


def test_a_text_without_a_token_is_an_error(tmp_path):
    folder = save_model(tmp_path / "model", "llama", bos=False)
    with pytest.raises(ValueError, match="the text '' has no token"):
        RetrievalObjective(load(folder), SETTINGS).embed_texts(["", "soup"], "")


@pytest.mark.parametrize("prompts", [{}, {"query": "soup ", "document": "the "}])
def test_imitating_oneself_starts_at_zero(tmp_path, prompts):
    folder = save_sentence_files(save_model(tmp_path / "model", "bert"), prompts=prompts)
    mixed = [QUERIES[0], TEXTS[0], QUERIES[1], TEXTS[1], TEXTS[2]], [True, False, True, False, False]
    objective = ImitationObjective(load(folder), LossSettings(token_weight=1.0), load(folder))
    assert objective(*mixed)["loss"].item() == pytest.approx(0, abs=1e-5)
    other = save_sentence_files(save_model(tmp_path / "other", "roberta"), prompts=prompts)
    assert ImitationObjective(load(folder), SETTINGS, load(other))(*mixed)["loss"].item() > 0.01


def encode_one(encoder, text, query):
    return (encoder.encode_queries if query else encoder.encode_documents)([text])


@pytest.mark.parametrize("prompts", [{}, {"query": "soup ", "document": "the "}])
def test_queries_and_documents_are_compared_with_what_the_teacher_makes_of_them(tmp_path, bert_folder, prompts):
    """With prompts of its own the teacher reads other tokens, and encodes the texts by itself."""
    teacher = load(save_sentence_files(save_model(tmp_path / "teacher", "roberta"), prompts=prompts))
    student = load(bert_folder)
    texts, queries = [QUERIES[0], TEXTS[0], QUERIES[1], TEXTS[1], TEXTS[2]], [True, False, True, False, False]
    terms = ImitationObjective(student, SETTINGS, teacher)(texts, queries)
    unit, reference = (
        torch.from_numpy(np.concatenate([encode_one(e, *text) for text in zip(texts, queries, strict=True)]))
        for e in (student, teacher)
    )  # both encoders' vectors have length 1
    assert terms["embedding"].item() == pytest.approx((1 - (unit * reference).sum(1)).mean().item(), rel=1e-4)
    expected = ((unit @ unit.T - reference @ reference.T) ** 2).mean().item()
    assert terms["scores"].item() == pytest.approx(expected, rel=1e-4)


def test_a_teacher_of_another_dimension_is_imitated_in_its_scores_alone(bert_folder):
    encoder = load(bert_folder)
    teacher = load(bert_folder, dimension=7)
    terms = ImitationObjective(encoder, LossSettings(score_weight=2.0), teacher)(TEXTS[:4], [False] * 4)
    assert "embedding" not in terms
    vectors = F.normalize(torch.from_numpy(encoder.encode_documents(TEXTS[:4])), dim=-1)
    unit = F.normalize(torch.from_numpy(teacher.encode_documents(TEXTS[:4])), dim=-1)
    expected = 2 * ((vectors @ vectors.T - unit @ unit.T) ** 2).mean()
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_teacher_of_another_dimension_needs_two_texts_and_a_weight(tmp_path, bert_folder):
    teacher = load(bert_folder, dimension=16)
    objective = ImitationObjective(load(bert_folder), SETTINGS, teacher)
    texts = [PlainText(text, False) for text in TEXTS[:3]]
    objective.check(texts, 2)
    for dataset, batch_size in ((texts, 1), (texts[:1], 8)):
        with pytest.raises(ValueError, match="a batch of 1 text: embeddings of teacher and encoder have 16 and 32"):
            objective.check(dataset, batch_size)
    with pytest.raises(ValueError, match="--score-weight 0: embeddings of teacher and encoder have 16 and 32"):
        ImitationObjective(load(bert_folder), replace(SETTINGS, score_weight=0.0), teacher).check(texts, 2)
    ImitationObjective(load(bert_folder), SETTINGS, load(bert_folder)).check(texts[:1], 1)


@pytest.mark.parametrize("of_teacher", ["dot", "cosine"])
def test_lengths_of_embeddings_count_where_a_search_goes_by_them(tmp_path, of_teacher):
    student, teacher = (load(save_model(tmp_path / name, name)) for name in ("bert", "roberta"))
    teacher.config = replace(teacher.config, similarity=of_teacher)
    assert student.config.similarity == "dot"
    terms = ImitationObjective(student, SETTINGS, teacher)(TEXTS[:4], [False] * 4)
    a, b = (torch.from_numpy(encoder.encode_documents(TEXTS[:4])).double() for encoder in (student, teacher))
    assert a.norm(dim=1).std() > 0.01
    if of_teacher == "cosine":
        b = F.normalize(b, dim=-1)
    mean_square = (b**2).sum(dim=1).mean()
    assert terms["embedding"].item() == pytest.approx(float(((a - b) ** 2).sum(1).mean() / 2 / mean_square), rel=1e-4)
    expected = ((a @ a.T - b @ b.T) ** 2).mean() / mean_square**2
    assert terms["scores"].item() == pytest.approx(float(expected), rel=1e-4)
    assert likeness([PlainText(text, False) for text in TEXTS], teacher)[1](teacher) == pytest.approx(1.0)


@pytest.mark.parametrize("cached", [False, True])
def test_tokens_are_matched_with_those_of_a_teacher_that_reads_the_same(tmp_path, bert_folder, cached):
    student, teacher = load(bert_folder, batch_tokens=24), load(save_model(tmp_path / "teacher", "roberta"))
    objective = ImitationObjective(student, LossSettings(token_weight=3.0, score_weight=1.0, cached=cached), teacher)
    terms = objective(TEXTS[:5], [False] * 5)
    away = []
    for text in TEXTS[:5]:  # one by one, without padding
        ids = torch.tensor([student.tokenize([text]).input_ids[0]])
        states = [e.model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0] for e in (student, teacher)]
        away.append((1 - F.cosine_similarity(*states, dim=-1)).mean().item())
    assert terms["tokens"].item() == pytest.approx(np.mean(away), rel=1e-4)
    whole = terms["embedding"] + terms["scores"] + 3 * terms["tokens"]
    assert terms["loss"].item() == pytest.approx(whole.item(), rel=1e-5)
    terms["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert not any("teacher" in name for name, _ in objective.named_parameters())


def test_the_cached_gradient_of_tokens_is_the_gradient(tmp_path, bert_folder):
    teacher = load(save_model(tmp_path / "teacher", "roberta"))
    found = {}
    for cached in (False, True):
        settings = LossSettings(token_weight=1.0, cached=cached)
        objective = ImitationObjective(load(bert_folder, batch_tokens=24), settings, teacher)
        objective(TEXTS[:5], [False] * 5)["loss"].backward()
        found[cached] = gradients(objective)
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_what_the_teacher_made_of_a_chunk_is_not_kept_under_gradcache(tmp_path, bert_folder):
    teacher = load(save_model(tmp_path / "teacher", "roberta"))
    states = []
    teacher.model.register_forward_hook(lambda *given: states.append(weakref.ref(given[-1].last_hidden_state)))
    settings = LossSettings(token_weight=1.0, cached=True)
    loss = ImitationObjective(load(bert_folder, batch_tokens=24), settings, teacher)(TEXTS[:5], [False] * 5)["loss"]
    gc.collect()
    assert len(states) > 1 and not any(state() is not None for state in states)
    loss.backward()


def in_a_process(rank: int, folder: str, teacher: str, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    objective = RetrievalObjective(load(folder), SETTINGS)
    loss = objective(EXAMPLES[2 * rank : 2 * rank + 2])["loss"]
    loss.backward()
    imitation = ImitationObjective(load(folder), WITH_TOKENS, load(teacher))
    texts = TEXTS[:5] if rank == 0 else TEXTS[5:8]
    # As many texts on each device make the mean of the devices the mean of all; here 5 and 3 are weighted so.
    imitated = imitation(texts, [False] * len(texts))["loss"] * len(texts) / 4
    imitated.backward()
    over_batch = RetrievalObjective(load(folder), OVER_BATCH, load(teacher))
    distilled = over_batch(EXAMPLES[2 * rank : 2 * rank + 2])["loss"]
    distilled.backward()
    found = [(loss, objective), (imitated, imitation), (distilled, over_batch)]
    torch.save([(value.detach(), gradients(owner)) for value, owner in found], f"{results}-{rank}")
    dist.destroy_process_group()


@pytest.mark.processes
def test_two_processes_give_the_loss_and_gradient_of_one(tmp_path, bert_folder):
    teacher = str(save_model(tmp_path / "teacher", "roberta"))
    job = (str(bert_folder), teacher, str(tmp_path / "store"), str(tmp_path / "result"))
    with forked_by(fork_server()):
        mp.start_processes(in_a_process, job, nprocs=2, start_method="forkserver")
    found = [torch.load(tmp_path / f"result-{rank}") for rank in (0, 1)]
    retrieval, imitation, over_batch = (
        RetrievalObjective(load(bert_folder), SETTINGS),
        ImitationObjective(load(bert_folder), WITH_TOKENS, load(teacher)),
        RetrievalObjective(load(bert_folder), OVER_BATCH, load(teacher)),  # document 1 is of both processes
    )
    losses = retrieval(EXAMPLES)["loss"], imitation(TEXTS[:8], [False] * 8)["loss"], over_batch(EXAMPLES)["loss"]
    for objective, loss, first, second in zip((retrieval, imitation, over_batch), losses, *found, strict=True):
        loss.backward()
        torch.testing.assert_close((first[0] + second[0]) / 2, loss.detach(), rtol=1e-5, atol=1e-6)
        for name, gradient in gradients(objective).items():
            mean = (first[1][name] + second[1][name]) / 2
            torch.testing.assert_close(mean, gradient, rtol=1e-3, atol=1e-5, msg=name)
