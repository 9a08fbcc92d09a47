import numpy as np
import pytest

from homebrew.plotting.curve_points import smoothed, visible_points


def test_smoothing_keeps_lines_and_leaves_out_what_is_not_finite():
    line = np.arange(1000.0)
    smooth = smoothed(line)
    np.testing.assert_allclose(smooth[:950], line[:950])
    noisy = line + np.random.default_rng(0).normal(0, 20, 1000)
    assert np.std(smoothed(noisy)[50:950] - line[50:950]) < 8
    noisy[500] = np.nan
    assert np.isfinite(smoothed(noisy)).all()
    assert np.isnan(smoothed(np.full(3, np.nan))).all()
    assert smoothed(line[:5]).tolist() == line[:5].tolist()


@pytest.mark.parametrize("log_x", [False, True])
def test_the_visible_points_of_a_long_curve_include_its_ends_and_extremes(log_x):
    values = np.random.default_rng(0).random(300_000)
    values[[7, 200_000, 123_456]] = np.nan, 5.0, -5.0
    x, y = visible_points(np.arange(1.0, 300_001), values, log_x=log_x)
    assert (x[0], x[-1], y.min(), y.max()) == (1, 300_000, -5, 5)
    assert (np.diff(x) > 0).all()
    assert 1000 < len(x) <= 2002
    assert not log_x or x[:6].tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("values", [np.full(5000, np.nan), np.zeros(5000), np.arange(10.0)])
def test_a_curve_without_visible_points_or_a_short_one(values):
    x, y = visible_points(np.ones(len(values)), values, log_x=True)
    assert len(x) == len(y) <= max(10, np.isfinite(values).sum())
