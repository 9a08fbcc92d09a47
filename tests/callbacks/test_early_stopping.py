import math
from types import SimpleNamespace

import pytest
from tiny_runs import make_trainer, token_dataset

from homebrew import Callback, EarlyStopping, EvalMetrics, GPTConfig, TokenDataset, Trainer, TrainerConfig
from homebrew.errors import ConfigError


def test_stops_after_patience_evaluations_without_improvement():
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    trainer = SimpleNamespace(should_stop=False, is_main_process=True)
    stopped = []
    for loss in (3.0, 2.5, 2.45, 2.2, 2.15, 2.3):
        stopping.on_evaluate(trainer, SimpleNamespace(loss=loss))
        stopped.append(trainer.should_stop)
    assert stopped == [False, False, False, False, False, True]


@pytest.mark.parametrize(
    "arguments",
    [
        {"patience": 0},
        {"patience": 2.5},
        {"patience": "3"},
        {"patience": True},
        {"patience": None},
        {"patience": 1, "min_delta": -0.1},
        {"patience": 1, "min_delta": math.nan},
        {"patience": 1, "min_delta": math.inf},
        {"patience": 1, "min_delta": 10**400},
        {"patience": 1, "min_delta": None},
    ],
)
def test_invalid_arguments_are_rejected(arguments):
    with pytest.raises(ConfigError, match=f"{list(arguments)[-1]}=.* of at least"):
        EarlyStopping(**arguments)


@pytest.mark.parametrize(("evaluates", "eval_every"), [(False, None), (False, 2), (True, None)])
def test_a_run_without_evaluations_before_its_end_is_an_error(tmp_path, evaluates, eval_every):
    data = token_dataset() if evaluates else None
    with pytest.raises(ConfigError, match=r"eval_every.*eval_dataset|can never stop.*eval_dataset.*eval_every"):
        make_trainer(tmp_path, eval_dataset=data, eval_every=eval_every, callbacks=[EarlyStopping(patience=3)])
    assert list(tmp_path.iterdir()) == []


class InterruptAtEvaluation(Callback):
    """Raises KeyboardInterrupt at the evaluation of a step."""

    def __init__(self, step):
        self.step = step

    def on_evaluate(self, trainer, metrics):
        if metrics.step == self.step:
            raise KeyboardInterrupt


def train(folder, *callbacks, eval_every=1):
    """Train with fixed evaluation losses, of which step 2's is the lowest; return the step at which the run ended."""
    data = TokenDataset.from_text("To be, or not to be. " * 40, 16, tokenizer="bytes")
    config = TrainerConfig(
        output_dir=folder, max_steps=12, micro_batch_size=2, mixed_precision="no", eval_every=eval_every, save_every=2
    )
    model = GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=8)
    trainer = Trainer(model, data, data, config=config, callbacks=callbacks)

    def evaluate():
        loss = {1: 3.0, 2: 2.0}.get(trainer.step, 2.9 - trainer.step / 20)
        return EvalMetrics.from_loss(step=trainer.step, loss=loss, num_tokens=1, bytes_per_token=None)

    trainer.evaluate = evaluate
    trainer.train(resume=True)
    return trainer.step


def test_an_instance_can_be_reused_for_another_run(tmp_path):
    stopping = EarlyStopping(patience=3)
    assert train(tmp_path / "first", stopping) == 5
    assert train(tmp_path / "second", stopping) == 5


@pytest.mark.filterwarnings("ignore:.*no checkpoint")
@pytest.mark.parametrize("step", [1, 2, 3])  # before, at and after the first checkpoint
def test_a_resumed_run_stops_at_the_same_step_as_an_uninterrupted_run(tmp_path, step):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, EarlyStopping(patience=3), InterruptAtEvaluation(step))
    assert train(tmp_path, EarlyStopping(patience=3)) == 5


def test_evaluations_discarded_by_a_resume_do_not_count(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, EarlyStopping(patience=3), InterruptAtEvaluation(3))  # the newest checkpoint is at step 2
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, EarlyStopping(patience=3), InterruptAtEvaluation(6), eval_every=2)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\x00\x00\n")  # as after a power failure
    assert train(tmp_path, EarlyStopping(patience=3), eval_every=2) == 8
