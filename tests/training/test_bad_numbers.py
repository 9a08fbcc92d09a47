"""Numbers that are not finite, wherever they come from: no bit of the weights or the optimizer changes."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from homebrew import GPT, GPTConfig, TokenDataset, Trainer, TrainerConfig
from homebrew.callbacks.base import Callback
from homebrew.errors import NonFiniteError
from homebrew.training.nan_guard import NanGuard
from homebrew.training.train_step import TrainStep

BAD_STEP = 3
OPTIMIZERS = {
    "fused AdamW": lambda parameters: None,
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


class Snapshots(Callback):
    """Weights and optimizer after each step."""

    def __init__(self):
        self.taken = {}

    def on_train_begin(self, trainer):
        self.take(trainer)

    def on_step_end(self, trainer):
        self.take(trainer)

    def take(self, trainer):
        states = [state[key] for state in trainer._optimizer.state.values() for key in sorted(state)]
        self.taken[trainer.step] = [tensor.clone() for tensor in (*trainer.model.state_dict().values(), *states)]

    def same(self, step, other):
        return len(self.taken[step]) == len(self.taken[other]) and all(
            map(torch.equal, self.taken[step], self.taken[other])
        )


def poison(trainer, where, value):
    """Put the value into the loss, into that of one micro-batch, or into one element of one gradient."""
    losses = 0

    def into_loss(module, inputs, loss):
        nonlocal losses
        if trainer.step == BAD_STEP:
            losses += 1
            return loss + value if where == "loss" or losses == 2 else loss
        return loss

    def into_gradient(gradient):
        if trainer.step == BAD_STEP:
            gradient = gradient.clone()
            gradient[0] = value
        return gradient

    if where == "gradient":
        trainer.model.transformer.ln_f.bias.register_hook(into_gradient)
    else:
        trainer.model.register_forward_hook(into_loss)


def make(folder, optimizer="fused AdamW", callbacks=(), **settings):
    ids = torch.randint(0, 50, (1200,), generator=torch.Generator().manual_seed(0))
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16))
    fixed = {"max_steps": 6, "global_batch_tokens": 8 * 16, "micro_batch_size": 2, "log_every": 2, "compile": False}
    return Trainer(
        model,
        TokenDataset.from_tokens(ids, block_size=16, vocab_size=50),
        config=TrainerConfig(output_dir=folder, mixed_precision="no", **fixed | settings),
        optimizer=OPTIMIZERS[optimizer](model.parameters()),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "micro-batch", "gradient"])
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_no_bit_changes(tmp_path, policy, where, value, optimizer):
    snapshots = Snapshots()
    trainer = make(tmp_path, optimizer, [snapshots], non_finite=policy)
    poison(trainer, where, value)
    if policy == "raise":
        with pytest.raises(NonFiniteError, match=f"step {BAD_STEP} "):
            trainer.train()
    else:
        trainer.train()
        assert not snapshots.same(BAD_STEP + 1, BAD_STEP + 2)
    snapshots.take(trainer)
    assert not snapshots.same(BAD_STEP - 1, BAD_STEP)
    assert snapshots.same(BAD_STEP, BAD_STEP + 1)
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    held_back = [event for event in events if event["event"] == "held_back"]
    assert [(event["step"], event["reason"]) for event in held_back] == [(BAD_STEP, "non_finite")]
    bad = "grad_norm" if where == "gradient" else "loss"
    assert held_back[0][bad] is None  # JSON has no such number
    assert where != "gradient" or held_back[0]["loss"] is not None


@pytest.mark.filterwarnings("ignore:This Trainer has trained before", "ignore:.*it begins anew")
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_after_a_run_that_bad_numbers_ended_none_is_saved(tmp_path, policy):
    class Saves(Callback):
        def on_step_skipped(self, trainer, steps):
            if policy == "raise" or steps[-1].step == 2:
                with pytest.raises(NonFiniteError):
                    trainer.save()

    settings = {"non_finite": policy, "non_finite_limit": 2, "log_every": 5, "save_every": None}
    trainer = make(tmp_path, callbacks=[Saves()], max_steps=12, **settings)
    handle = trainer.model.transformer.ln_f.bias.register_hook(lambda grad: grad * float("nan"))
    for _ in range(2):
        with pytest.raises(NonFiniteError):
            trainer.train()
        with pytest.raises(NonFiniteError):
            trainer.save()
        assert not list((tmp_path / "checkpoints").iterdir())
    handle.remove()
    trainer.train()
    assert trainer.save().name == "step-00000012"


class Reads(TorchDispatchMode):
    """Counts the times the host asks for a tensor's value, for which it would have to wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"non_finite": "skip"}, {"loss_spike_zscore": 5.0}])
def test_the_host_asks_for_no_number(tmp_path, settings):
    counts = {}

    class Count(Callback):
        def on_step_end(self, trainer):
            counts[trainer.step] = reads.count

    trainer = make(tmp_path, callbacks=[Count()], log_every=5, max_steps=12, **settings)
    with Reads() as reads:
        trainer.train()
    assert counts == dict.fromkeys(range(1, 13), counts[1])


def test_what_is_sent_is_read_when_the_next_step_is_on_its_way(tmp_path, monkeypatch):
    log = []

    def logged(owner, name, what, counts=lambda _: True):
        function = getattr(owner, name)

        def call(self, *args):
            if counts(self):
                log.append(what)
            return function(self, *args)

        monkeypatch.setattr(owner, name, call)

    logged(TrainStep, "__call__", "step")
    logged(NanGuard, "send", "send", lambda guard: guard._recorded)
    logged(NanGuard, "check", "read", lambda guard: guard._sent)
    make(tmp_path, log_every=3, max_steps=7).train()
    expected = "step send step read step send step read step step send step read send read"
    assert log == expected.split()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("settings", [{}, {"non_finite": "skip"}, {"loss_spike_zscore": 5.0}])
def test_a_gpu_is_not_waited_for(tmp_path, settings):
    class Strict(Callback):
        def on_step_end(self, trainer):
            torch.cuda.set_sync_debug_mode("error" if 3 <= trainer.step < 12 else "default")

    try:
        make(tmp_path, callbacks=[Strict()], log_every=5, max_steps=12, **settings).train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
