import numpy as np
import pytest
import torch

from homebrew.errors import ConfigError, DataError
from homebrew.integers import as_integer


@pytest.mark.parametrize("value", [5, np.int64(5), np.uint8(5)])
def test_integers_become_python_integers(value):
    assert type(as_integer("size", value, 5, 5)) is int


@pytest.mark.parametrize("value", [5.0, True, np.True_, "5", None, torch.tensor(5), np.array([5]), 0, 10, 10**30])
@pytest.mark.parametrize("error", [ConfigError, DataError])
def test_other_values_are_refused_by_name(value, error):
    with pytest.raises(error, match=r"size=.*from 1 to 9"):
        as_integer("size", value, 1, 9, error=error)
