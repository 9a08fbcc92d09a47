import pytest

from homebrew.plotting.panels import short_number


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.5, "1.5"), (250, "250"), (12_500, "12.5k"), (3e9, "3B"), (6e-4, "0.0006"), (5e-5, "5e-5")],
)
def test_short_number(value, text):
    assert short_number(value) == text
