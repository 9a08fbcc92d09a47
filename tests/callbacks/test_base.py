"""The names and arguments of a callback's events are checked when its class is defined."""

import pytest

from homebrew import Callback
from homebrew.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("on_step", "on_step_end"),
        ("on_evaluation", "on_evaluate"),
        ("on_epoch_end", "on_step_end"),
        ("on_x", "on_log"),
    ],
)
def test_an_unknown_event_is_an_error(name, message):
    with pytest.raises(ConfigError, match=f"{name}, which is not an event.*{message}"):
        type("Mine", (Callback,), {name: lambda self, trainer: None})


def hugging_face(self, args, state, control, **kwargs):
    pass


@pytest.mark.parametrize("method", [hugging_face, lambda self, trainer: None, lambda: None])
def test_other_arguments_are_an_error(method):
    with pytest.raises(ConfigError, match=r"on_log\(self, trainer, metrics\)"):
        type("Mine", (Callback,), {"on_log": method})


def test_other_names_and_more_arguments_are_allowed():
    class Mine(Callback):
        on_screen = True

        def on_log(self, t, m, verbose=False):
            pass

        def on_evaluate(self, *arguments):
            pass

        on_save = on_step_skipped = on_evaluate

        def once(self):
            pass

    class Other(Mine):
        def on_train_begin(self, trainer, **options):
            pass
