import pytest

from homebrew import GPTConfig
from homebrew.errors import ConfigError, ResumeMismatch
from homebrew.training.resume import check_identity, identity
from homebrew.training.schedule import warmup_cosine


class Samples(list):
    """A dataset of the user's own."""


def make(**changes):
    arguments = {
        "dataset": Samples(range(10)),
        "model": GPTConfig(),
        "schedule": warmup_cosine(warmup_steps=5, max_steps=100),
        "max_steps": 100,
        "global_batch_size": 8,
        "seed": 42,
    }
    return identity(**arguments | changes)


CHANGES = {
    "dataset": ({"dataset": Samples(range(11))}, "'10 samples'"),
    "model": ({"model": GPTConfig(n_layer=13)}, "n_layer was 13, is 12"),
    "schedule": ({"schedule": warmup_cosine(warmup_steps=9, max_steps=100)}, "first value that differs"),
    "global_batch_size": ({"global_batch_size": 16}, "was 16, is 8"),
    "seed": ({"seed": 1}, "was 1, is 42"),
}


def test_the_same_run_goes_on():
    check_identity(make(), make(), ())


@pytest.mark.parametrize("aspect", CHANGES)
def test_another_run_is_named_by_what_differs_and_can_be_accepted(aspect):
    changes, told = CHANGES[aspect]
    ours, saved = (make(**changes), make()) if aspect == "dataset" else (make(), make(**changes))
    with pytest.raises(ResumeMismatch, match=aspect) as caught:
        check_identity(saved, ours, ())
    assert told in str(caught.value)
    assert f"accept_changes=('{aspect}',)" in str(caught.value)
    check_identity(saved, ours, (aspect,))


def test_unknown_aspect():
    with pytest.raises(ConfigError, match="'weather'"):
        check_identity(make(), make(), ("weather",))
