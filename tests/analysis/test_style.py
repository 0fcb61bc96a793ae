"""How figures look."""

import pytest

from analysis import style


def test_points_of_one_size_stand_side_by_side():
    places = style.side_by_side([64, 256, 64, 64], 1.1)
    assert [left for _, left in places] == [True, False, False, False]
    assert [x for x, _ in places] == pytest.approx([64, 256, 64 * 1.1, 64 * 1.21])
