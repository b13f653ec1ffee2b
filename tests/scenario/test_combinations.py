"""The table of moves leaves no pair out."""

from itertools import product

from tests.support.scenario.combinations import COMBINATIONS


def test_the_combinations_meet_in_pairs():
    for first, second in ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3)):
        seen = {(row[first], row[second]) for row in COMBINATIONS}
        values = [{row[column] for row in COMBINATIONS} for column in (first, second)]
        assert set(product(*values)) == seen, (first, second)
