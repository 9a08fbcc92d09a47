"""How a finished run can be extended, and with the schedule "wsd" from which checkpoint."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from homebrew import TrainerConfig
from homebrew.checkpoint import compatibility, manifest
from homebrew.cli.extension import extension_advice


@pytest.fixture
def run_with(tmp_path, monkeypatch):
    """Return a function that makes a finished run with a checkpoint of each step, whose past has a given schedule."""

    def make(max_steps, decay_fraction, past=None):
        config = TrainerConfig(
            output_dir=tmp_path, max_steps=max_steps, lr_schedule="wsd", decay_fraction=decay_fraction, warmup_steps=0
        )
        for step in range(max_steps + 1):
            (tmp_path / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
        schedule = config.schedule() if past is None else replace(config, max_steps=past).schedule()

        def state(path):
            identity = {"schedule": compatibility._learning_rates(schedule, (), int(path.name.removeprefix("step-")))}
            return SimpleNamespace(identity=identity)

        monkeypatch.setattr(manifest, "open_checkpoint", state)
        return config

    return make


@pytest.mark.parametrize(
    ("max_steps", "decay_fraction"), [(10, 0.9), (100, 0.3), (10, 0.7), (100, 0.07), (7, 0.5), (50, 0.0), (50, 1.0)]
)
def test_the_advice_names_the_last_checkpoint_before_the_decay(run_with, max_steps, decay_fraction):
    config = run_with(max_steps, decay_fraction)
    schedule = config.schedule()
    decayed = [step for step in range(max_steps) if schedule(step) < 1 - 1e-9]
    last = decayed[0] - 1 if decayed else max_steps
    assert f"continue from step {last}," in extension_advice(config, max_steps)


def test_a_checkpoint_whose_rate_has_decayed_before_an_accepted_change_is_not_named(run_with):
    config = run_with(20, 0.5, past=10)  # was a run of 10 steps, whose decay began at step 5
    assert "continue from step 6," in extension_advice(config, 20)


def test_other_schedules_are_extended_from_the_end(tmp_path):
    config = TrainerConfig(output_dir=tmp_path / "my run", max_steps=10)
    command = f"homebrew train --resume --output-dir '{tmp_path}/my run' --max-steps 20 --accept-changes schedule"
    assert extension_advice(config, 10).endswith(command)
