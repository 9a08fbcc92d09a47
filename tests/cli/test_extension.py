"""From which checkpoint a finished run with the schedule "wsd" can be extended."""

import pytest

from homebrew import TrainerConfig
from homebrew.cli.extension import extension_advice


@pytest.mark.parametrize(
    ("max_steps", "decay_fraction"), [(10, 0.9), (100, 0.3), (10, 0.7), (100, 0.07), (7, 0.5), (50, 0.0), (50, 1.0)]
)
def test_the_advice_names_the_last_checkpoint_before_the_decay(tmp_path, max_steps, decay_fraction):
    config = TrainerConfig(
        output_dir=tmp_path, max_steps=max_steps, lr_schedule="wsd", decay_fraction=decay_fraction, warmup_steps=0
    )
    for step in range(max_steps + 1):
        (tmp_path / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
    schedule = config.schedule()
    decayed = [step for step in range(max_steps) if schedule(step) < 1 - 1e-9]
    last = decayed[0] - 1 if decayed else max_steps
    assert f"continue from step {last}," in extension_advice(config, max_steps)
