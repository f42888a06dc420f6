import itertools

import numpy as np
import pytest
from conftest import save_model, save_sentence_files

from effir_search.encoding.encoder import Encoder
from effir_search.evaluation.turns import TURN, answer_in_turns, encode_in_turns
from effir_search.indexing.verify import cosine

TEXTS = ["the cat eats fish", "hot soup", "sweet tea with honey and lemon"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, bert_folder):
    """The tiny BERT, itself again with fewer components, and another model."""
    other = save_sentence_files(save_model(tmp_path_factory.mktemp("mpnet"), "mpnet"))
    names = [(bert_folder, {}), (bert_folder, {"dimension": 8}), (other, {})]
    return [Encoder.from_pretrained(folder, dtype="fp32", device="cpu", **changes) for folder, changes in names]


def test_cosines_are_to_the_first_encoder_and_there_is_none_of_vectors_of_other_lengths(encoders):
    turns = encode_in_turns([encoders[0], *encoders], TEXTS, rounds=2)
    expected = cosine(encoders[2].encode_documents(TEXTS), encoders[0].encode_documents(TEXTS)).mean()
    assert turns.cosines[:2] == [pytest.approx(1), pytest.approx(1)]
    assert turns.cosines[2] is None
    assert turns.cosines[3] == pytest.approx(expected, abs=1e-5) and expected < 0.99


def test_each_round_counts_by_itself_for_each_encoder(encoders):
    turns = encode_in_turns(encoders, TEXTS, rounds=4)
    assert turns.seconds.shape == (4, 3) and (turns.seconds > 0).all()
    assert turns.joules is None


def test_energy_is_that_of_each_encoders_own_turns(encoders):
    # A meter that counts how often it is asked: between the two times of a turn lies one joule.
    count = itertools.count()
    turns = encode_in_turns(encoders, TEXTS * (TURN // 3 + 1), rounds=2, joules=lambda: float(next(count)))
    assert np.array_equal(turns.joules, np.full((2, 3), 2.0))  # so many texts are two turns


def test_the_seconds_of_a_round_are_those_of_all_its_turns(encoders):
    few, many = (encode_in_turns(encoders[:1], TEXTS * (number // 3), rounds=5).seconds for number in (TURN, 6 * TURN))
    assert np.median(many) > 2 * np.median(few)  # six turns in place of one


def test_every_query_of_every_round_is_timed_for_every_encoder(encoders):
    seconds = answer_in_turns(encoders, TEXTS, rounds=2)
    assert seconds.shape == (2, 3, 3) and (seconds > 0).all()
