import pytest
import torch

from effir_search.encoding.pooling import POOLERS, pool

# Two texts of 3 and 2 tokens, hidden size 2.
STATES = torch.tensor([[[1.0, 8.0], [2.0, 4.0], [6.0, 0.0]], [[3.0, 1.0], [-5.0, -1.0], [9.0, 9.0]]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
EXPECTED = {
    "cls": [[1, 8], [3, 1]],
    "last": [[6, 0], [-5, -1]],
    "mean": [[3, 4], [-1, 0]],
    "max": [[6, 8], [3, 1]],
    # (1 * 1 + 2 * 2 + 3 * 6) / 6, (1 * 8 + 2 * 4 + 0) / 6; (3 - 10) / 3, (1 - 2) / 3
    "weightedmean": [[23 / 6, 16 / 6], [-7 / 3, -1 / 3]],
    # 9 / sqrt(3), 12 / sqrt(3); -2 / sqrt(2), 0
    "mean_sqrt_len_tokens": [[9 / 3**0.5, 12 / 3**0.5], [-2 / 2**0.5, 0]],
}
WITHOUT_FIRST = {
    "cls": [[2, 4], [-5, -1]],
    "last": [[6, 0], [-5, -1]],
    "mean": [[4, 2], [-5, -1]],
    "max": [[6, 4], [-5, -1]],
    # The places are those in the whole text: (2 * 2 + 3 * 6) / 5, (2 * 4 + 0) / 5
    "weightedmean": [[22 / 5, 8 / 5], [-5, -1]],
    "mean_sqrt_len_tokens": [[8 / 2**0.5, 4 / 2**0.5], [-5, -1]],
}


def left_padded(tensor):
    """The second row's padding before its text."""
    return torch.stack([tensor[0], tensor[1].roll(1, dims=0)])


@pytest.mark.parametrize("pooling", POOLERS)
@pytest.mark.parametrize(("prompt_length", "expected"), [(0, EXPECTED), (1, WITHOUT_FIRST)])
def test_each_pooler_is_its_arithmetic_whichever_side_the_padding_is_on(pooling, prompt_length, expected):
    for states, mask in ((STATES, MASK), (left_padded(STATES), left_padded(MASK))):
        pooled = pool(states, mask, pooling, prompt_length=prompt_length)
        torch.testing.assert_close(pooled, torch.tensor(expected[pooling], dtype=torch.float32))


def test_several_poolings_are_put_one_behind_the_other():
    expected = torch.tensor([[6.0, 8, 1, 8], [3, 1, 3, 1]])
    torch.testing.assert_close(pool(STATES, MASK, "max+cls"), expected)
