"""Assembling a Trainer, and the process-wide settings that this changes."""

import gc
import weakref

import pytest
import torch
from accelerate import Accelerator
from tiny_runs import CONFIG, ONE_LAYER, make_trainer, matrices_and_vectors, token_dataset

from homebrew import GPT, Muon, TrainerConfig
from homebrew.callbacks.base import Callback
from homebrew.callbacks.curve_plot import CurvePlot
from homebrew.callbacks.run_logger import RunLogger
from homebrew.training.global_settings import RECOMPILE_LIMIT, allow_tf32, configure_compiler
from homebrew.training.parts import build_callbacks
from homebrew.training.setup import build_parts, resolve_accelerator


def test_build_parts_makes_a_working_train_step(tmp_path):
    config = TrainerConfig(output_dir=tmp_path, max_steps=1, micro_batch_size=4, mixed_precision="no")
    parts = build_parts(
        CONFIG,
        token_dataset(),
        None,
        config=config,
        optimizer=None,
        schedule=config.schedule(),
        accelerator=None,
    )
    before = [parameter.detach().clone() for parameter in parts.model.parameters()]
    micro_batches = next(iter(parts.loader.steps(0)))
    _, is_skipped, loss, _ = parts.train_step(micro_batches).tolist()
    assert not is_skipped
    assert loss == pytest.approx(torch.tensor(50.0).log().item(), abs=0.1)
    assert not all(torch.equal(a, b) for a, b in zip(before, parts.model.parameters(), strict=True))
    assert list(tmp_path.iterdir()) == []


def test_the_launch_settings_of_the_config_reach_the_accelerator(tmp_path, monkeypatch):
    settings = {"output_dir": tmp_path, "mixed_precision": "bf16", "log_with": "all", "collective_timeout_seconds": 7.0}
    monkeypatch.setattr("homebrew.training.setup.build_accelerator", lambda **arguments: arguments)
    assert resolve_accelerator(None, TrainerConfig(max_steps=1, **settings)) == settings


@pytest.mark.parametrize(
    ("part", "settings", "received"),
    [
        ("homebrew.training.parts.StepLoader", {"num_workers": 2}, {"num_workers": 2}),
        ("homebrew.training.parts.StepLoader", {"loader_timeout_seconds": 7.0}, {"timeout_seconds": 7.0}),
        ("homebrew.training.parts.CheckpointManager", {"gather_limit_bytes": 9}, {"gather_limit_bytes": 9}),
    ],
    ids=["num_workers", "loader_timeout_seconds", "gather_limit_bytes"],
)
def test_settings_reach_the_loader_and_the_checkpoint_manager(tmp_path, monkeypatch, part, settings, received):
    arguments = {}
    monkeypatch.setattr(part, lambda *_, **given: arguments.update(given))
    make_trainer(tmp_path, **settings)
    assert received.items() <= arguments.items()


@pytest.mark.parametrize("wanted", [True, False])
def test_compile_decides_whether_the_model_is_compiled(tmp_path, monkeypatch, wanted):
    compiled = []
    monkeypatch.setattr(GPT, "compile", lambda model, **_: compiled.append(model))
    trainer = make_trainer(tmp_path, compile=wanted)
    assert compiled == ([trainer.model] if wanted else [])


def test_custom_callbacks_come_after_the_built_in_ones_or_replace_them():
    class CustomLogger(RunLogger):
        pass

    custom, logger, plot = Callback(), CustomLogger(), CurvePlot()
    built_in = build_callbacks([custom], progress=True)
    assert len(built_in) == 4
    assert built_in[-1] is custom
    assert build_callbacks([custom, logger, plot], progress=False) == [custom, logger, plot]


@pytest.mark.parametrize("progress", [True, False])
def test_progress_switches_the_display(tmp_path, capsys, progress):
    make_trainer(tmp_path, max_steps=1, progress=progress).train()
    assert bool(capsys.readouterr().out) is progress


@pytest.mark.parametrize(("given", "used"), [({}, torch.bfloat16), ({"cpu_dtype": torch.float32}, torch.float32)])
def test_under_bf16_muon_iterates_in_bfloat16_unless_its_dtype_is_given(tmp_path, monkeypatch, given, used):
    model = GPT(ONE_LAYER)
    matrices, vectors = matrices_and_vectors(model.parameters())
    muon = Muon(matrices, lr=0.1)
    vars(muon).update(given)
    adamw = torch.optim.AdamW(vectors)
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "bf16")
    make_trainer(tmp_path, model=model, optimizer=[muon, adamw], accelerator=accelerator, mixed_precision="auto")
    assert muon.cpu_dtype == used


def test_tf32_is_allowed_for_a_cuda_device_only():
    allow_tf32(torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    allow_tf32(torch.device("cuda"))
    assert torch.get_float32_matmul_precision() == "high"


def test_the_recompile_limit_is_never_lowered():
    from torch._dynamo import config
    from torch._inductor import config as inductor_config

    for limit, expected in ((8, RECOMPILE_LIMIT), (1000, 1000)):
        hooks, cacheable = config.skip_nnmodule_hook_guards, inductor_config.unsafe_marked_cacheable_functions
        others = inductor_config.patch(unsafe_marked_cacheable_functions=dict(cacheable))
        with config.patch(recompile_limit=limit, skip_nnmodule_hook_guards=hooks), others:
            configure_compiler()
            assert config.recompile_limit == expected


def test_a_trainer_is_freed_with_its_last_reference(tmp_path):
    """On a GPU, a Trainer that waits for the garbage collector keeps its memory and CUDA graphs."""
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    reference = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert reference() is None
    finally:
        gc.enable()


def test_repr_of_a_trainer_describes_the_run(tmp_path):
    trainer = make_trainer(tmp_path / "run", max_steps=3)
    assert f"Trainer({trainer.model.num_parameters():,} parameters, step 0/3" in repr(trainer)
    assert f"{len(trainer.train_dataset)} samples, output_dir={str(tmp_path / 'run')!r}" in repr(trainer)
    trainer.train()
    assert "step 3/3" in repr(trainer)
    assert len(repr(make_trainer(tmp_path / "other", train_dataset=[token_dataset()[0]] * 100))) < 300
