"""Real runs, and folders with made-up records."""

import json

import pytest
from accelerate.state import AcceleratorState
from tiny_runs import RaiseAt, make_trainer, token_dataset


@pytest.fixture(scope="package")
def killed_and_resumed(tmp_path_factory):
    """The folder of a run that was killed in step 4, after saving step 2, and then resumed."""
    folder = tmp_path_factory.mktemp("run") / "resumed"
    settings = {"eval_dataset": token_dataset(200), "eval_every": 2, "save_every": 2, "progress": False}
    AcceleratorState._reset_state(True)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(folder, **settings, callbacks=[RaiseAt(4, KeyboardInterrupt())]).train()
    make_trainer(folder, **settings).train(resume=True)
    return folder


def step_event(step, **fields):
    values = {
        "loss": 4 / step, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 100.0, "num_tokens": 8 * step,
        "elapsed_seconds": 2.0 * step,
    }  # fmt: skip
    return {"event": "step", "step": step} | values | fields


@pytest.fixture
def record(tmp_path):
    """Write a run with the given events and settings, and return its folder."""

    def record(name, events=None, **config):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        events = [step_event(step) for step in range(1, 11)] if events is None else events
        events = [step_event(event) if isinstance(event, int) else event for event in events]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        (folder / "run.json").write_text(json.dumps({"config": {"output_dir": str(folder)} | config}))
        return folder

    return record
