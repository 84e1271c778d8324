"""Numbers of a run against the definitions of their names, on hand numbers."""

import pytest
import torch
from pairs import pairs

from spo_lightning.evaluation.totals import Totals, pair_numbers

# torchtune's case, beta 0.1 (interop-and-traps D.2), with lengths of our own
POLICY = pairs([-0.5, -10.0, -1.0], [-0.1, -30.0, -21.0], [2, 4, 5], [1, 8, 3])
REFERENCE = pairs([-0.5, -10.1, -0.1], [-0.1, -20.1, -0.1], [2, 4, 5], [1, 8, 3])
BY_HAND = {
    "rewards/chosen": [0.0, 0.01, -0.09],
    "rewards/rejected": [0.0, -0.99, -2.09],
    "rewards/margins": [0.0, 1.0, 2.0],
    "rewards/accuracies": [0.0, 1.0, 1.0],  # a tie counts 0
    "logps/chosen": [-0.5, -10.0, -1.0],
    "logps/rejected": [-0.1, -30.0, -21.0],
    "preference/accuracy": [0.0, 1.0, 1.0],
    # per token: -0.25 against -0.1, -2.5 against -3.75, -0.2 against -7
    "preference/accuracy_norm": [0.0, 1.0, 1.0],
    "displacement/rate": [0.0, 0.0, 1.0],  # strictly below the reference
    "displacement/chosen": [0.0, 0.1, -0.9],
}


def test_numbers_of_pairs_equal_their_definitions():
    numbers = pair_numbers(POLICY, REFERENCE, beta=0.1)
    assert numbers.keys() == BY_HAND.keys() | {"nll/chosen"}
    for name, expected in BY_HAND.items():
        values, counted = numbers[name]
        assert values.tolist() == pytest.approx(expected, abs=1e-12), name
        assert counted.tolist() == [1, 1, 1]
    total, count = numbers["nll/chosen"]
    assert (total.sum().item(), count.sum().item()) == (pytest.approx(11.5), 11)


def test_accuracy_per_token_and_in_sum_can_differ():
    # the longer chosen answer is less probable in sum and more probable per token
    policy = pairs([-6.0], [-4.0], [6], [2])
    numbers = pair_numbers(policy, None, beta=0.1)
    assert numbers["preference/accuracy"][0].item() == 0
    assert numbers["preference/accuracy_norm"][0].item() == 1
    assert not [name for name in numbers if name.startswith(("rewards", "displacement"))]


def test_an_exact_tie_counts_as_not_accurate():
    numbers = pair_numbers(REFERENCE, REFERENCE, beta=0.1)
    for name in ("rewards/accuracies", "displacement/rate"):
        assert numbers[name][0].tolist() == [0, 0, 0]


def test_totals_are_no_mean_of_means():
    totals = Totals()
    totals.add({"a": torch.tensor([1.0, 2.0, 3.0]), "b": (torch.tensor(4.0), torch.tensor(8))})
    totals.add({"a": torch.tensor([10.0]), "b": (torch.tensor(1.0), torch.tensor(2))})
    assert totals.means()["a"].item() == 4.0  # the mean of the two means would be 6
    assert totals.means()["b"].item() == 0.5


def test_totals_keep_float64_and_no_graph():
    totals = Totals()
    value = torch.full((1,), 16_777_216.0, requires_grad=True)
    totals.add({"a": value})
    for _ in range(4):
        totals.add({"a": torch.ones(1)})  # float32 would swallow each of these
    total, count = totals.sums["a"]
    assert not total.requires_grad and total.dtype == torch.float64
    assert (total.item(), count.item()) == (16_777_220.0, 5)


@pytest.mark.parametrize("cut", [1, 2])
def test_batches_of_any_size_give_the_same_means(cut):
    def part(of, rows):
        keep = torch.isin(of.pair, torch.tensor(rows))
        pair = of.pair[keep] - rows[0]
        return type(of)(of.logps[keep], pair, of.side[keep], len(rows))

    whole, split = Totals(), Totals()
    whole.add(pair_numbers(POLICY, REFERENCE, beta=0.1))
    for rows in (list(range(cut)), list(range(cut, 3))):
        split.add(pair_numbers(part(POLICY, rows), part(REFERENCE, rows), beta=0.1))
    for name, value in whole.means().items():
        assert split.means()[name].item() == pytest.approx(value.item(), rel=1e-12), name
