"""Non-finite losses and gradients: they never reach the weights or the optimizer, and nothing waits for the device."""

import math
import warnings
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from tiny_runs import ONE_LAYER, Recorder, equal, make_trainer, matrices_and_vectors, saved_steps, weights
from torch.utils._python_dispatch import TorchDispatchMode

from homebrew import GPT, GPTConfig, Muon
from homebrew.callbacks.base import Callback
from homebrew.errors import ConfigError, NonFiniteError

BAD_STEP = 3  # value of trainer.step while the step is taken; metrics call it step 4
CONFIG = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16)


class Snapshots(Callback):
    """Copies the weights and the optimizer's state at the start and after each step."""

    def __init__(self):
        self.by_step = {}

    def on_train_begin(self, trainer):
        self.on_step_end(trainer)

    def on_step_end(self, trainer):
        states = {
            f"{i}/{key}": value.clone()
            for i, state in enumerate(trainer.optimizer.state.values())
            for key, value in state.items()
        }
        self.by_step[trainer.step] = weights(trainer) | states

    def unchanged_steps(self):
        """Return the steps, counted from 0, that changed nothing."""
        return [
            step for step, after in pairwise(sorted(self.by_step)) if equal(self.by_step[step], self.by_step[after])
        ]


def inject(trainer, where, value):
    """Add `value` to the loss, or to the loss of one micro-batch, or set one element of one gradient to it."""
    num_losses = 0

    def into_loss(module, inputs, loss):
        nonlocal num_losses
        if trainer.step != BAD_STEP:
            return loss
        num_losses += 1
        return loss + value if where == "loss" or num_losses == 2 else loss

    def into_gradient(gradient):
        if trainer.step == BAD_STEP:
            gradient = gradient.clone()
            gradient[0] = value
        return gradient

    if where == "gradient":
        trainer.model.transformer.ln_f.bias.register_hook(into_gradient)
    else:
        trainer.model.register_forward_hook(into_loss)


def make_small_trainer(output_dir, **settings):
    return make_trainer(output_dir, **{"model": CONFIG, "micro_batch_size": 2, "compile": False} | settings)


def muon_and_sgd(model):
    matrices, vectors = matrices_and_vectors(model.parameters())
    return [Muon(matrices, lr=1e-2), torch.optim.SGD(vectors, lr=0.1, momentum=0.9)]


OPTIMIZERS = {
    "adamw": lambda model: "adamw",
    "muon": lambda model: "muon",
    "averaged muon": lambda model: "muon",
    "averaged Muon and SGD": muon_and_sgd,
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "Muon and SGD": muon_and_sgd,
}


def averaging(optimizer):
    """Return the settings of the optimizers that are called averaged."""
    return {"ema_decay": 0.9} if optimizer.startswith("averaged") else {}


PLACES = [("loss", math.nan), ("micro-batch", math.inf), ("gradient", math.nan), ("gradient", math.inf)]


@pytest.mark.parametrize(
    ("policy", "where", "value", "optimizer"),
    [(policy, *place, "adamw") for policy in ("raise", "skip") for place in PLACES]
    + [("skip", "gradient", math.nan, optimizer) for optimizer in OPTIMIZERS if optimizer != "adamw"]
    + [("raise", "gradient", math.nan, "averaged muon")],
)
def test_a_non_finite_step_changes_no_weight_and_no_optimizer_state(tmp_path, policy, where, value, optimizer):
    model = GPT(CONFIG)
    snapshots, recorder = Snapshots(), Recorder()
    settings = {"log_every": 2, "non_finite": policy, "save_every": None, "callbacks": [snapshots, recorder]}
    settings |= averaging(optimizer)
    trainer = make_small_trainer(tmp_path, model=model, optimizer=OPTIMIZERS[optimizer](model), **settings)
    inject(trainer, where, value)
    if policy == "raise":
        with pytest.raises(NonFiniteError, match=f"step {BAD_STEP + 1} "):
            trainer.train()
        trainer._modes.train()  # from the average to the last weights
        snapshots.on_step_end(trainer)
        assert BAD_STEP in snapshots.unchanged_steps()
        assert not set(range(BAD_STEP)) & set(snapshots.unchanged_steps())
    else:
        trainer.train()
        assert snapshots.unchanged_steps() == [BAD_STEP]
    (skipped,) = recorder.skipped
    assert (skipped.step, skipped.reason) == (BAD_STEP + 1, "non_finite")
    assert math.isfinite(skipped.loss) == (where == "gradient")
    assert math.isfinite(skipped.grad_norm) == (where != "gradient")


def test_weights_that_became_infinite_are_not_saved(tmp_path):
    class SetInfinity(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 2:
                trainer.model.transformer.ln_f.bias.data[0] = math.inf

    trainer = make_trainer(tmp_path, log_every=3, save_every=1, callbacks=[SetInfinity()])
    # The error is that of the save or that of step 3, whichever comes first; the other one may be a warning.
    with warnings.catch_warnings(action="ignore"), pytest.raises(NonFiniteError, match=r"step [23] "):
        trainer.train()
    assert saved_steps(tmp_path) == [1]


class CausalMask(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("mask", torch.full((16, 16), -math.inf).triu(1))


class FrozenLimits(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.limits = torch.nn.Parameter(torch.tensor([-math.inf, 1e300], dtype=torch.float64), requires_grad=False)


class SmallestGradient(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].setdefault("smallest", torch.full_like(parameter, math.inf))


@pytest.mark.parametrize("model", [GPT, CausalMask, FrozenLimits])
@pytest.mark.parametrize("optimizer", [None, SmallestGradient])
def test_constants_and_optimizer_state_may_be_infinite(tmp_path, model, optimizer):
    for _ in range(2):
        gpt = model(ONE_LAYER)
        custom = optimizer and optimizer([p for p in gpt.parameters() if p.requires_grad], lr=0.1)
        make_trainer(tmp_path, model=gpt, optimizer=custom, max_steps=2).train(resume=True)
    assert saved_steps(tmp_path) == [2]


def test_checkpoints_before_a_non_finite_step_are_kept(tmp_path):
    trainer = make_small_trainer(tmp_path, log_every=5, save_every=1)
    inject(trainer, "gradient", math.nan)
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert saved_steps(tmp_path) == [2, 3]


@pytest.mark.filterwarnings("ignore:.*step 0:UserWarning")
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_run_ended_by_non_finite_steps_cannot_be_saved_but_trained_again(tmp_path, policy):
    class SaveOnSkip(Callback):
        def on_step_skipped(self, trainer, steps):
            if policy == "raise" or steps[-1].step == 3:
                with pytest.raises(NonFiniteError):
                    trainer.save()

    limit = {"non_finite_limit": 2} if policy == "skip" else {}
    settings = {"non_finite": policy, "log_every": 5, "save_every": None} | limit
    trainer = make_small_trainer(tmp_path, callbacks=[SaveOnSkip()], **settings)
    before = weights(trainer)
    handle = trainer.model.transformer.ln_f.bias.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NonFiniteError):
        trainer.train()
    with pytest.raises(NonFiniteError):
        trainer.save()
    assert saved_steps(tmp_path) == []
    assert equal(before, weights(trainer))
    handle.remove()
    trainer.train(resume=True)
    assert trainer.save().name == "step-00000006"
    assert not equal(before, weights(trainer))


def test_training_again_without_a_checkpoint_warns_that_it_starts_from_the_current_weights(tmp_path):
    trainer = make_small_trainer(tmp_path, max_steps=1)
    handle = trainer.model.transformer.ln_f.bias.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NonFiniteError):
        trainer.train()
    handle.remove()
    with pytest.warns(UserWarning, match="step 0"):
        trainer.train(resume=True)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loss_spike_is_skipped_if_configured(tmp_path, monkeypatch, optimizer):
    monkeypatch.setattr("homebrew.training.nan_guard.SPIKE_WARMUP", 5)
    snapshots, recorder = Snapshots(), Recorder()
    settings = {"loss_spike_zscore": 20.0, "max_steps": 10, "learning_rate": 1e-4, "callbacks": [snapshots, recorder]}
    trainer = make_small_trainer(tmp_path, optimizer=optimizer, **settings)
    trainer.model.transformer.ln_f.register_forward_hook(lambda *args: args[-1] * 50 if trainer.step == 8 else None)
    trainer.train()
    assert [(skipped.step, skipped.reason) for skipped in recorder.skipped] == [(9, "loss_spike")]
    assert snapshots.unchanged_steps() == [8]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_scaler_skips_steps_and_lowers_its_scale(tmp_path, monkeypatch, optimizer):
    """The first steps overflow, and change nothing; later steps are those of a run without a scaler."""

    def train(folder, scaler, num_bad_steps=0):
        accelerator, snapshots, model = Accelerator(cpu=True), Snapshots(), GPT(CONFIG)
        accelerator.scaler = scaler
        settings = {"mixed_precision": "auto", "non_finite": "skip", "callbacks": [snapshots]} | averaging(optimizer)
        chosen = OPTIMIZERS[optimizer](model)
        trainer = make_small_trainer(folder, model=model, optimizer=chosen, accelerator=accelerator, **settings)
        model.lm_head.weight.register_hook(lambda grad: grad * math.nan if trainer.step < num_bad_steps else grad)
        with monkeypatch.context() as patch:
            if scaler is not None:  # Accelerate unscales gradients before clipping in fp16 only, which a CPU lacks
                patch.setattr(accelerator, "native_amp", True)
                patch.setattr(accelerator.state, "_mixed_precision", "fp16")
            trainer.train()
        return snapshots

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    scaled = train(tmp_path / "scaled", scaler)
    num_skipped = 127 - math.log2(scaler.get_scale())
    assert 0 < num_skipped < 4
    plain = train(tmp_path / "plain", None, num_bad_steps=num_skipped)
    for name, value in plain.by_step[6].items():
        if not name.endswith("/average"):  # may start at a step that is skipped on the device
            torch.testing.assert_close(scaled.by_step[6][name], value, rtol=1e-4, atol=1e-5)


def test_a_gradient_scaler_refuses_the_loss_spike_rule(tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ConfigError, match=r"loss_spike_zscore=5\.0.*fp16"):
        make_small_trainer(tmp_path, accelerator=accelerator, loss_spike_zscore=5.0, mixed_precision="auto")


@pytest.mark.parametrize("limit", [0, 3])
def test_a_limit_of_skipped_steps_is_an_error_if_none_can_be_skipped(tmp_path, limit):
    with pytest.raises(ConfigError, match=rf"non_finite_limit={limit}.*non_finite='skip'"):
        make_small_trainer(tmp_path, non_finite_limit=limit)
    make_small_trainer(tmp_path, non_finite_limit=limit, non_finite="skip")
    make_small_trainer(tmp_path, non_finite_limit=limit, loss_spike_zscore=5.0)


class CountHostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host, which would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


GUARD_SETTINGS = [
    {},
    {"non_finite": "skip"},
    {"loss_spike_zscore": 5.0},
    {"optimizer": "muon"},
    {"optimizer": "muon", "ema_decay": 0.9},
]


@pytest.mark.parametrize("settings", GUARD_SETTINGS)
def test_a_step_reads_no_value_from_the_device(tmp_path, monkeypatch, settings):
    monkeypatch.setattr(GPT, "_check_range", lambda *_: None)  # reads the ids, on a CPU only
    counts = []

    class RecordCount(Callback):
        def on_step_end(self, trainer):
            counts.append(reads.count)

    trainer = make_small_trainer(tmp_path, callbacks=[RecordCount()], log_every=5, max_steps=12, **settings)
    with CountHostReads() as reads:
        trainer.train()
    assert len(set(counts)) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", GUARD_SETTINGS)
def test_a_step_does_not_synchronize_with_the_gpu(tmp_path, settings):
    class RaiseOnSynchronization(Callback):
        def on_step_end(self, trainer):
            torch.cuda.set_sync_debug_mode("error" if 3 <= trainer.step < 12 else "default")

    callbacks = [RaiseOnSynchronization()]
    try:
        make_small_trainer(tmp_path, callbacks=callbacks, log_every=5, max_steps=12, **settings).train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
