"""Windows over a text."""

from __future__ import annotations

import pytest

from titan_lite.evaluation.windows import Window, windows


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 10, 23, 24, 25])
@pytest.mark.parametrize(("size", "stride"), [(8, 8), (8, 3), (8, 1), (1, 1)])
def test_each_token_is_predicted_once_from_as_many_as_promised(n: int, size: int, stride: int) -> None:
    found = list(windows(n, size, stride))
    assert [token for window in found for token in range(window.first, window.stop)] == list(range(1, n))
    for number, window in enumerate(found):
        assert window.stop - 1 - window.start == min(size, window.stop - 1)
        least = size - stride + 1 if number else 1
        assert all(least <= token - window.start <= size for token in range(window.first, window.stop))


def test_written_out() -> None:
    assert list(windows(12, 5, 3)) == [Window(0, 1, 6), Window(3, 6, 9), Window(6, 9, 12)]
    assert list(windows(11, 5, 3)) == [Window(0, 1, 6), Window(3, 6, 9), Window(5, 9, 11)]
