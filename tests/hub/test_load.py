import contextlib
from dataclasses import asdict, replace

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from homebrew import GPT, GPTConfig, TokenDataset, Trainer, TrainerConfig
from homebrew.checkpoint.manifest import open_checkpoint
from homebrew.checkpoint.store import CheckpointStore
from homebrew.errors import CheckpointError, CorruptCheckpoint, ModelError
from homebrew.hub.load import _open, load_model
from homebrew.hub.peft import save_adapter
from homebrew.model.lora import LoRAConfig, adapter_state_dict, add_lora, base_fingerprint

SHAPE = {"block_size": 8, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.0}
TEXT = "Now is the winter of our discontent made glorious summer by this sun of York. " * 10


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    dataset = TokenDataset.from_text(TEXT, 8, tokenizer="char")
    shape = GPTConfig(**SHAPE | {"vocab_size": dataset.vocab_size})
    folder = tmp_path_factory.mktemp("run")
    config = TrainerConfig(output_dir=folder, max_steps=4, save_every=2, micro_batch_size=4, compile=False)
    trainer = Trainer(shape, dataset, config=config)
    trainer.train()
    return trainer


def test_a_runs_newest_checkpoint_is_the_model_that_was_trained(trainer):
    for source in (trainer.config.output_dir, trainer.config.output_dir / "checkpoints" / "step-00000004"):
        model, tokenizer = load_model(source)
        assert tokenizer.to_json() == trainer.train_dataset.tokenizer.to_json()
        assert model.config == trainer.model.config
        assert model.lm_head.weight is model.transformer.wte.weight
        assert not model.training
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(tensor.cpu(), model.state_dict()[name])
    earlier, _ = load_model(trainer.config.output_dir / "checkpoints" / "step-00000002")
    assert not torch.equal(earlier.lm_head.weight, trainer.model.lm_head.weight.cpu())


def saved(folder, edit=lambda tensors: None, state=None, file="model"):
    """A checkpoint of an untrained model, changed before it is sealed."""
    tensors = {name: t.clone() for name, t in GPT(GPTConfig(**SHAPE)).state_dict().items() if name != "lm_head.weight"}
    edit(tensors)
    store = CheckpointStore(folder)
    store.prepare()
    return store.save(1, {file: tensors}, {"identity": {"model": SHAPE}, "tokenizer": None} | (state or {}))


def test_a_checkpoint_without_a_tokenizer(tmp_path):
    model, tokenizer = load_model(saved(tmp_path))
    assert tokenizer is None
    assert torch.equal(model.lm_head.weight, GPT(GPTConfig(**SHAPE)).lm_head.weight)


BIAS = "transformer.h.1.mlp.c_fc.bias"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(BIAS), f"no tensor {BIAS}"),
        (lambda t: t.update({"transformer.h.2.ln_1.bias": torch.zeros(16)}), r"a tensor transformer\.h\.2\.ln_1\.bias"),
        (lambda t: t.update({BIAS: torch.zeros(63)}), rf"{BIAS} is torch\.float32 of shape \(63,\).*\(64,\)"),
        (lambda t: t.update({BIAS: torch.zeros(64, dtype=torch.int32)}), rf"{BIAS} is torch\.int32"),
    ],
)
def test_tensors_that_are_not_the_models_are_named(tmp_path, edit, message):
    with pytest.raises(CorruptCheckpoint, match=rf"model\.safetensors.*{message}"):
        load_model(saved(tmp_path, edit))


SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")


@pytest.mark.parametrize(
    "state",
    [
        {"identity": None},
        {"identity": {}},
        {"identity": {"model": [1]}},
        {"identity": {"model": SHAPE | {"n_embd": 15}}},
        {"identity": {"model": SHAPE | {"colour": "red"}}},
        {"identity": {"model": SHAPE | {"dropout": "high"}}},
        *({"identity": {"model": SHAPE | {name: size}}} for name in SIZES for size in (2**62, 10**30, 10**400)),
        {"tokenizer": "gpt2"},
        {"tokenizer": {"name": "char"}},
        {"tokenizer": {"name": "char", "alphabet": 5}},
    ],
)
def test_a_state_that_describes_no_model_is_refused(tmp_path, bounded_memory, state):
    path = saved(tmp_path, state=state)
    with bounded_memory(), pytest.raises(CorruptCheckpoint, match=r"state\.json|n_layer=\d+|wpe|wte"):
        load_model(path)


def test_a_checkpoint_without_weights(tmp_path):
    with pytest.raises(CorruptCheckpoint, match=r"no model\.safetensors"):
        load_model(saved(tmp_path, file="optimizer"))


def test_damage_is_passed_over_in_a_run_and_an_error_in_a_checkpoint(tmp_path):
    good, damaged = saved(tmp_path), tmp_path / "checkpoints" / "step-00000002"
    damaged.mkdir()
    with pytest.warns(UserWarning, match=r"Passed over.*step-00000002"):
        load_model(tmp_path)
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json"):
        load_model(damaged)
    (good / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*model\.safetensors"):
        load_model(tmp_path)


def test_nothing_of_that_name(tmp_path):
    with pytest.raises(ModelError, match="no folder"):
        load_model(tmp_path / "none")


@pytest.fixture
def adapted(tmp_path):
    """A run that trained an adapter on weights in a folder, and its model."""
    base = GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=2, n_embd=16))
    base.save_pretrained(tmp_path / "base")
    model = GPT.from_pretrained(tmp_path / "base", lora=LoRAConfig(rank=2))
    data = TokenDataset.from_text("To be, or not to be. " * 20, 16, tokenizer="bytes")
    settings = {"max_steps": 2, "micro_batch_size": 2, "learning_rate": 1e-2, "mixed_precision": "no", "compile": False}
    config = TrainerConfig(output_dir=tmp_path / "run", **settings)
    Trainer(model, data, config=config).train()
    return tmp_path, model.cpu().eval()


def test_a_run_that_trained_an_adapter_opens_on_its_base(adapted):
    folder, trained = adapted
    model, tokenizer = load_model(folder / "run")
    ids = torch.randint(0, 256, (2, 16))
    assert torch.equal(model(ids), trained(ids))
    assert tokenizer.name == "bytes"
    moved, _ = load_model(folder / "run", base=(folder / "base").rename(folder / "moved"))
    assert torch.equal(moved(ids), trained(ids))


def test_an_adapter_is_not_put_on_another_base(adapted):
    folder, _ = adapted
    GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=2, n_embd=16), seed=7).save_pretrained(
        folder / "base"
    )
    with pytest.raises(CheckpointError, match="was trained on"):
        load_model(folder / "run")


def test_an_adapters_base_is_no_adapter(adapted):
    folder, _ = adapted
    with pytest.raises(CheckpointError, match="holds an adapter only"):
        load_model(folder / "run", base=folder / "run")


def test_an_adapter_that_is_trained_on_keeps_its_base(adapted):
    folder, _ = adapted
    model, tokenizer = load_model(folder / "run")
    assert model.source == str(folder / "base")
    data = TokenDataset.from_text("To be, or not to be. " * 20, 16, tokenizer=tokenizer)
    settings = {"max_steps": 1, "micro_batch_size": 2, "mixed_precision": "no", "compile": False}
    config = TrainerConfig(output_dir=folder / "more", **settings)
    Trainer(model, data, config=config).train()
    again, _ = load_model(folder / "more")
    ids = torch.randint(0, 256, (2, 16))
    assert torch.equal(again(ids), model.cpu().eval()(ids))


def test_an_adapter_in_pefts_format_opens_on_its_base(adapted):
    folder, trained = adapted
    ids = torch.randint(0, 256, (2, 16))
    save_adapter(trained, folder / "adapter", base_model=trained.source)
    model, _ = load_model(folder / "adapter")
    torch.testing.assert_close(model(ids), trained(ids))
    assert model.source == str(folder / "base")
    moved, _ = load_model(folder / "adapter", base=(folder / "base").rename(folder / "moved"))
    assert torch.equal(moved(ids), model(ids))
    save_adapter(trained, folder / "adapter")
    with pytest.raises(CheckpointError, match="does not say where its base is"):
        load_model(folder / "adapter")


def adapter_of(folder, base):
    """An adapter in PEFT's format that says its base is there."""
    model = GPT(GPTConfig(**SHAPE))
    add_lora(model, LoRAConfig(rank=2))
    save_adapter(model, folder, base_model=base)
    return folder


def checkpoint_of(folder, base):
    """An adapter's checkpoint that does."""
    shape = {"rank": 2, "alpha": None, "dropout": 0.0, "target_modules": ["c_fc"], "base_sha256": "0" * 64}
    return saved(folder, state={"identity": {"adapter": shape}, "base": base}, file="adapter")


BASES = [
    "a" * 5000,
    "./" + "a" * 5000,
    "a/" * 2040 + "a",
    "a" * 300,
    "",
    "step-\0",
    "step-\ud800",
    "\0",
    "./\0",
    "/a\0",
]


@pytest.mark.parametrize("base", BASES, ids=[ascii(base[:9]) + str(len(base)) for base in BASES])
@pytest.mark.parametrize("make", [adapter_of, checkpoint_of])
def test_a_base_that_can_be_no_path_is_an_error(tmp_path, monkeypatch, make, base):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = make(tmp_path / "adapter", base)
    with pytest.raises((CheckpointError, ModelError)):
        load_model(path)


ANY = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([2**62, 10**400, *BASES])


@settings(max_examples=300, deadline=None, database=None)
@given(
    kind=st.sampled_from(["model", "adapter"]),
    model=st.dictionaries(st.sampled_from(sorted(SHAPE)), ANY, min_size=1, max_size=2),
    adapter=st.dictionaries(st.sampled_from(["rank", "alpha", "dropout", "target_modules", "base_sha256"]), ANY),
    base=st.just("whole") | ANY,
)
def test_any_state_that_describes_a_model(checkpoints, bounded_memory, kind, model, adapter, base):
    path, state = checkpoints[kind]
    identity = state["identity"]
    described = {"model": SHAPE | model, "adapter": identity.get("adapter", {}) | adapter}
    base = str(checkpoints["model"][0]) if base == "whole" else base
    checkpoint = replace(open_checkpoint(path), state=state | {"identity": described, "base": base})
    with contextlib.suppress(CheckpointError, ModelError), bounded_memory():
        opened, _ = _open(checkpoint, None)
        assert all(tensor.isfinite().all() for tensor in opened.state_dict().values())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A whole model's checkpoint and one of an adapter on it, and what is in their states."""
    whole = open_checkpoint(saved(tmp_path_factory.mktemp("whole")))
    model, _ = load_model(whole.path)
    shape = asdict(LoRAConfig(rank=2)) | {"base_sha256": base_fingerprint(model)}
    add_lora(model, LoRAConfig(rank=2))
    store = CheckpointStore(tmp_path_factory.mktemp("adapter"))
    state = {"identity": {"adapter": shape}, "tokenizer": None, "base": str(whole.path)}
    path = store.save(1, {"adapter": adapter_state_dict(model)}, state)
    load_model(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.chdir(path.parent)
        yield {"model": (whole.path, whole.state), "adapter": (path, state)}


def test_an_adapters_base_cannot_be_itself_or_another(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for base in (first, second):
        adapter_of(first, str(base)), adapter_of(second, str(first))
        with pytest.raises(CheckpointError, match="holds an adapter only"):
            load_model(first)


def test_an_adapters_description_that_is_a_link_is_not_read(tmp_path):
    path = adapter_of(tmp_path / "adapter", "nowhere/at-all") / "adapter_config.json"
    path.symlink_to(path.rename(tmp_path / "elsewhere"))
    with pytest.raises(ModelError, match="is a link"):
        load_model(path.parent)


@pytest.mark.parametrize("rank", [3, 2**40])
def test_an_adapters_rank_is_that_of_its_tensors_before_memory_is_taken(adapted, bounded_memory, rank):
    folder, _ = adapted
    checkpoint, _ = CheckpointStore(folder / "run").latest()
    identity = checkpoint.state["identity"]
    lying = checkpoint.state | {"identity": identity | {"adapter": identity["adapter"] | {"rank": rank}}}
    path = CheckpointStore(folder / "other").save(1, {"adapter": checkpoint.tensors("adapter")}, lying)
    with bounded_memory(), pytest.raises(CorruptCheckpoint, match=r"adapter\.safetensors does not fit"):
        load_model(path)


def test_an_export_after_a_run_in_half_precision_is_compared_in_full(tmp_path):
    data = TokenDataset.from_text(TEXT, 8, tokenizer="bytes")
    settings = {"micro_batch_size": 2, "mixed_precision": "bf16", "compile": False}
    model = Trainer(GPTConfig(**SHAPE), data, config=TrainerConfig(output_dir=tmp_path, max_steps=1, **settings)).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # so that bfloat16's rounding is seen
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(GPT.from_pretrained(tmp_path / "out").lm_head.weight, model.lm_head.weight.cpu())
