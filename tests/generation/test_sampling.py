import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from homebrew.errors import ConfigError
from homebrew.generation.sampling import Sampling

PROCESSORS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
SETTINGS = {
    "repetition_penalty": [1.0, 1.7, 0.6],
    "temperature": [1.0, 0.7, 1.9],
    "top_k": [None, 1, 13, 1000],
    "top_p": [None, 0.8, 0.1, 1.0],
    "min_p": [None, 0.05, 0.9],
}


def test_distribution_matches_transformers():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 100, generator=generator)
    input_ids = torch.randint(100, (4, 30), generator=generator)
    seen = torch.zeros(4, 100, dtype=torch.bool).scatter(1, input_ids, value=True)
    for values in itertools.product(*SETTINGS.values()):
        settings = {name: value for name, value in zip(SETTINGS, values, strict=True) if value is not None}
        processors = LogitsProcessorList(PROCESSORS[name](value) for name, value in settings.items())
        expected = processors(input_ids, logits.clone()).softmax(-1)
        actual = Sampling(**settings).process_logits(logits, seen).softmax(-1)
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5, msg=lambda m, s=settings: f"{s}: {m}")


def test_token_frequencies_match_the_distribution():
    sampling = Sampling(temperature=1.3, top_k=6)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 10, generator=generator).expand(100_000, 10)
    noise = torch.empty(100_000, 10).exponential_(generator=generator)
    frequencies = sampling.sample(logits, noise).bincount(minlength=10) / 100_000
    expected = sampling.process_logits(logits[:1])[0].softmax(-1)
    assert (frequencies[expected == 0] == 0).all()
    torch.testing.assert_close(frequencies, expected, atol=0.006, rtol=0)


def test_zero_noise_does_not_select_an_excluded_token():
    logits = torch.tensor([[0.0, -30.0, -torch.inf]])
    noise = torch.tensor([[1.0, 0.0, 0.0]])
    assert Sampling().sample(logits, noise).tolist() == [0]


def test_temperature_zero_selects_the_most_likely_token():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    greedy = Sampling(temperature=0.0)
    assert greedy.process_logits(logits).softmax(-1).tolist() == [[0.0, 1.0, 0.0]]
    assert greedy.sample(logits, torch.full((1, 3), 1e-9)).tolist() == [1]


EXTREMES = [1e-5, 1e-20, 1e-40, 5e-324, 10**-30, Fraction(1, 10**50)]


@pytest.mark.parametrize("value", EXTREMES)
def test_tiny_values_leave_only_the_most_likely_token(value):
    logits = torch.tensor([[1.0, 3.0, 2.0], [-5.0, -3.0, -4.0], [0.0, 0.5, -80.0]])
    noise = torch.tensor([[1e-7, 80.0, 1e-7]]).expand(3, 3)
    for options in ({"temperature": value}, {"top_p": value}):
        assert Sampling(**options).process_logits(logits).softmax(-1)[:, 1].tolist() == [1.0, 1.0, 1.0]
        assert Sampling(**options).sample(logits, noise).tolist() == [1, 1, 1]


@pytest.mark.parametrize("value", [1e20, 1e38, 1e300, 10**400, np.float32(1e38)])
def test_huge_values_are_the_limits(value):
    logits = torch.tensor([[1.0, 3.0, 2.0, -3.0, 0.0]])
    assert Sampling(temperature=value).process_logits(logits).softmax(-1).tolist() == [[pytest.approx(0.2)] * 5]
    seen = torch.tensor([[False, True, False, True, True]])
    probabilities = Sampling(repetition_penalty=value).process_logits(logits, seen).softmax(-1)
    expected = torch.tensor([[1.0, 0.0, 2.0, -torch.inf, 0.0]]).softmax(-1)
    torch.testing.assert_close(probabilities, expected)


@pytest.mark.parametrize("value", EXTREMES)
def test_tiny_penalties_give_finite_probabilities(value):
    logits, seen = torch.tensor([[1.0, 3.0, 2.0, 0.0]]), torch.tensor([[True, True, False, True]])
    assert Sampling(repetition_penalty=value, min_p=value).sample(logits, torch.ones(1, 4), seen).tolist() == [1]


def test_numbers_of_numpy_are_accepted():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    sampling = Sampling(temperature=np.float32(0.5), top_k=np.int64(2), top_p=np.float32(0.99), min_p=np.float64(0.01))
    expected = Sampling(temperature=0.5, top_k=2, top_p=0.99, min_p=0.01).process_logits(logits)
    torch.testing.assert_close(sampling.process_logits(logits), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        *(({"temperature": value}, "temperature=") for value in (None, "1", True, [1.0], torch.tensor(1.0), 1j)),
        *(({"repetition_penalty": value}, "repetition_penalty=") for value in (None, "1", True, float("inf"))),
        *(({name: value}, f"{name}=") for name in ("top_p", "min_p") for value in ("0.9", True, [0.9], float("nan"))),
        *(({"top_k": value}, "top_k=") for value in ("5", True, 5.0, [5])),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        *(({name: Fraction(1, 10**400)}, f"{name}=") for name in ("top_p", "min_p")),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)
