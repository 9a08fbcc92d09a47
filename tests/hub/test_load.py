import contextlib
import itertools
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from homebrew import GPT, GPTConfig, TokenDataset, Trainer, TrainerConfig
from homebrew.checkpoint.manifest import Checkpoint, open_checkpoint
from homebrew.checkpoint.store import CheckpointStore
from homebrew.data.tokenizer import CharTokenizer
from homebrew.errors import CheckpointError, CorruptCheckpoint, ModelError
from homebrew.hub.load import load_checkpoint, load_model
from homebrew.hub.peft import save_adapter
from homebrew.model.lora import LoRAConfig, adapter_state_dict, add_lora, base_fingerprint

CONFIG = {"block_size": 8, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.0}
TEXT = "Now is the winter of our discontent made glorious summer by this sun of York. " * 10


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    dataset = TokenDataset.from_text(TEXT, 8, tokenizer="char")
    model_config = GPTConfig(**CONFIG | {"vocab_size": dataset.vocab_size, "eos_token_id": 3})
    folder = tmp_path_factory.mktemp("run")
    config = TrainerConfig(output_dir=folder, max_steps=4, save_every=2, micro_batch_size=4, compile=False)
    trainer = Trainer(model_config, dataset, config=config)
    trainer.train()
    return trainer


def test_a_run_is_loaded_from_its_newest_checkpoint(trainer):
    for source in (trainer.config.output_dir, trainer.config.output_dir / "checkpoints" / "step-00000004"):
        model, tokenizer = load_model(source)
        assert tokenizer.to_json() == trainer.train_dataset.tokenizer.to_json()
        assert model.config == trainer.model.config
        assert model.config.eos_token_id == 3
        assert model.lm_head.weight is model.transformer.wte.weight
        assert not model.training
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(tensor.cpu(), model.state_dict()[name])
    earlier, _ = load_model(trainer.config.output_dir / "checkpoints" / "step-00000002")
    assert not torch.equal(earlier.lm_head.weight, trainer.model.lm_head.weight.cpu())


@pytest.mark.parametrize("source", [".", "checkpoints/step-00000004"])
def test_from_pretrained_names_the_function_that_opens_a_run(trainer, source):
    with pytest.raises(ModelError, match="load_model"):
        GPT.from_pretrained(trainer.config.output_dir / source)


def save_checkpoint(folder, edit=lambda tensors: None, state=None, file="model"):
    """Save a checkpoint of an untrained model, with tensors and state edited."""
    tensors = {name: t.clone() for name, t in GPT(GPTConfig(**CONFIG)).state_dict().items() if name != "lm_head.weight"}
    edit(tensors)
    store = CheckpointStore(folder)
    store.prepare()
    return store.save(1, {file: tensors}, {"identity": {"model": CONFIG}, "tokenizer": None} | (state or {}))


def test_a_run_in_progress_is_loaded_although_it_removes_the_opened_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path)
    store, steps = CheckpointStore(tmp_path, keep_last=1), iter([2, 3])

    def tensors_late(checkpoint, name, tensors=Checkpoint.tensors):
        for step in itertools.islice(steps, 1):
            store.save(step, store.latest()[0].files(), checkpoint.state)
        return tensors(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "tensors", tensors_late)
    assert load_model(tmp_path)[0].config == GPTConfig(**CONFIG)
    assert store.steps() == [3]


def test_a_checkpoint_without_a_tokenizer_is_loaded(tmp_path):
    model, tokenizer = load_model(save_checkpoint(tmp_path))
    assert tokenizer is None
    assert torch.equal(model.lm_head.weight, GPT(GPTConfig(**CONFIG)).lm_head.weight)


BIAS = "transformer.h.1.mlp.c_fc.bias"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(BIAS), f"no tensor {BIAS}"),
        (
            lambda t: t.update({"transformer.h.2.ln_1.bias": torch.zeros(16)}),
            r"unknown .*h\.2\.ln_1\.bias",
        ),
        (lambda t: t.update({BIAS: torch.zeros(63)}), rf"{BIAS} is torch\.float32 of shape \(63,\).*\(64,\)"),
        (lambda t: t.update({BIAS: torch.zeros(64, dtype=torch.int32)}), rf"{BIAS} is torch\.int32"),
    ],
)
def test_tensors_that_do_not_match_the_model_are_named(tmp_path, edit, message):
    with pytest.raises(CorruptCheckpoint, match=rf"model\.safetensors.*{message}"):
        load_model(save_checkpoint(tmp_path, edit))


SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")


@pytest.mark.parametrize(
    "state",
    [
        {"identity": None},
        {"identity": {}},
        {"identity": {"model": [1]}},
        {"identity": {"model": CONFIG | {"n_embd": 15}}},
        {"identity": {"model": CONFIG | {"colour": "red"}}},
        {"identity": {"model": CONFIG | {"dropout": "high"}}},
        *({"identity": {"model": CONFIG | {name: size}}} for name in SIZES for size in (2**62, 10**30, 10**400)),
        {"tokenizer": "gpt2"},
        {"tokenizer": {"name": "char"}},
        {"tokenizer": {"name": "char", "alphabet": 5}},
    ],
)
def test_a_state_that_does_not_describe_a_model_is_rejected(tmp_path, bounded_memory, state):
    path = save_checkpoint(tmp_path, state=state)
    with bounded_memory(), pytest.raises(CorruptCheckpoint, match=r"state\.json|n_layer=\d+|wpe|wte"):
        load_model(path)


def test_a_checkpoint_without_weights_is_rejected(tmp_path):
    with pytest.raises(CorruptCheckpoint, match=r"no model\.safetensors"):
        load_model(save_checkpoint(tmp_path, file="optimizer"))


def test_a_run_skips_corrupt_checkpoints_and_a_checkpoint_raises(tmp_path):
    valid, corrupt = save_checkpoint(tmp_path), tmp_path / "checkpoints" / "step-00000002"
    corrupt.mkdir()
    with pytest.warns(UserWarning, match=r"Skipped an invalid checkpoint.*step-00000002"):
        load_model(tmp_path)
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json"):
        load_model(corrupt)
    (valid / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"No valid checkpoint.*model\.safetensors"):
        load_model(tmp_path)


def test_a_missing_folder_raises_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="There is no folder"):
        load_model(tmp_path / "none")


@pytest.mark.parametrize("open_model", [load_model, GPT.from_pretrained])
@pytest.mark.parametrize("source", [".", "notes"])
def test_a_folder_without_a_model_is_an_error_that_names_what_can_be_opened(tmp_path, monkeypatch, open_model, source):
    (tmp_path / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    message = rf"^{re.escape(str(Path(source).absolute()))} .* no config\.json\..* a run, a checkpoint or an adapter"
    with pytest.raises(ModelError, match=message):
        open_model(source)


@pytest.mark.parametrize("source", ["runs/frist", "./runs/frist", "rnus"])
def test_a_mistyped_folder_is_named_before_the_hub(tmp_path, monkeypatch, source):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=rf"^There is no folder {re.escape(source)}\."):
        load_model(source)


@pytest.fixture
def adapted(tmp_path):
    """Folder with a base model and a run that trained an adapter on it, and the trained model."""
    base = GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=2, n_embd=16))
    base.save_pretrained(tmp_path / "base")
    model = GPT.from_pretrained(tmp_path / "base", lora=LoRAConfig(rank=2))
    data = TokenDataset.from_text("To be, or not to be. " * 20, 16, tokenizer="bytes")
    options = {"max_steps": 2, "micro_batch_size": 2, "learning_rate": 1e-2, "mixed_precision": "no", "compile": False}
    config = TrainerConfig(output_dir=tmp_path / "run", **options)
    Trainer(model, data, config=config).train()
    return tmp_path, model.cpu().eval()


def test_an_adapters_run_is_loaded_onto_its_base(adapted):
    folder, trained = adapted
    model, tokenizer = load_model(folder / "run")
    ids = torch.randint(0, 256, (2, 16))
    assert torch.equal(model(ids), trained(ids))
    assert tokenizer.name == "bytes"
    moved, _ = load_model(folder / "run", base=(folder / "base").rename(folder / "moved"))
    assert torch.equal(moved(ids), trained(ids))


@pytest.mark.parametrize("kind", ["new run", "adapter"])
def test_a_base_given_by_a_relative_path_is_found_from_anywhere(adapted, monkeypatch, kind):
    folder, _ = adapted
    monkeypatch.chdir(folder)
    model = GPT.from_pretrained("base", lora=LoRAConfig(rank=2))
    save_adapter(model, "adapter", base_model="base")
    data = TokenDataset.from_text("To be, or not to be. " * 20, 16, tokenizer="bytes")
    options = {"max_steps": 1, "micro_batch_size": 2, "mixed_precision": "no", "compile": False}
    Trainer(model, data, config=TrainerConfig(output_dir="new run", **options)).train()
    monkeypatch.chdir(folder.parent)
    loaded, _ = load_model(folder / kind)
    assert loaded.source == str(folder / "base")


@pytest.mark.parametrize("kind", ["run", "adapter"])
def test_a_base_that_has_moved_is_an_error_that_says_so(adapted, kind):
    folder, trained = adapted
    save_adapter(trained, folder / "adapter", base_model=trained.source)
    (folder / "base").rename(folder / "moved")
    with pytest.raises(CheckpointError, match=r"If it has moved, pass base=.*There is no folder"):
        load_model(folder / kind)
    load_model(folder / kind, base=folder / "moved")


def test_an_adapter_may_bring_the_tokenizer_that_its_base_lacks(adapted):
    folder, trained = adapted
    tokenizer = CharTokenizer("abc")
    for saved in (tokenizer, None):  # without a tokenizer, an earlier one is kept
        save_adapter(trained, folder / "adapter", base_model=trained.source, tokenizer=saved)
        assert load_model(folder / "adapter")[1].to_json() == tokenizer.to_json()


@pytest.mark.parametrize("removed", ["homebrew_tokenizer.json", "vocab.json"])
def test_the_tokenizer_that_transformers_saved_beside_an_adapter_is_checked(gpt2_export, tmp_path, removed):
    model = GPT.from_pretrained(gpt2_export, lora=LoRAConfig(rank=2))
    save_adapter(model, tmp_path, base_model=str(gpt2_export))
    for name in {"homebrew_tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"} - {removed}:
        shutil.copy(gpt2_export / name, tmp_path)
    if removed == "vocab.json":
        with pytest.raises(ModelError, match="other tokens or merges"):
            load_model(tmp_path)
        return
    assert load_model(tmp_path)[1].name == "gpt2"
    (tmp_path / "added_tokens.json").write_text('{"World": 10603}')
    with pytest.raises(ModelError, match="added token='World'"):
        load_model(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("{}")
    assert load_model(tmp_path)[1] is None


def test_a_saved_adapter_leaves_no_other_tokenizer_in_its_folder(adapted):
    folder, trained = adapted
    (folder / "adapter").mkdir()
    (folder / "adapter" / "tokenizer.json").write_text("{}")
    save_adapter(trained, folder / "adapter", base_model=trained.source, tokenizer=CharTokenizer("abc"))
    assert load_model(folder / "adapter")[1].name == "char"


class WordTokenizer:
    """Custom tokenizer with two words."""

    name, vocab_size, end_of_text_id = "words", 2, None

    def encode(self, text):
        return np.array([0 if char == "a" else 1 for char in text])

    def decode_bytes(self, ids):
        return b"".join([b"a", b"b"][i] for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode()

    def to_json(self):
        return {"name": self.name}


@pytest.mark.parametrize("kind", ["run", "export", "adapter"])
def test_a_model_with_a_custom_tokenizer_is_loaded_without_it(tmp_path, kind):
    tokenizer = WordTokenizer()
    model = GPT(GPTConfig(**CONFIG | {"vocab_size": 2}))
    if kind == "run":
        data = TokenDataset.from_text("ab" * 20, 8, tokenizer=tokenizer)
        options = {"max_steps": 1, "micro_batch_size": 2, "mixed_precision": "no", "compile": False}
        Trainer(model, data, config=TrainerConfig(output_dir=tmp_path / kind, **options)).train()
    elif kind == "export":
        model.save_pretrained(tmp_path / kind, tokenizer)
    else:
        model.save_pretrained(tmp_path / "base")
        add_lora(model, LoRAConfig(rank=2))
        save_adapter(model, tmp_path / kind, base_model=str(tmp_path / "base"), tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="custom tokenizer 'words'"):
        loaded, tokenizer = load_model(tmp_path / kind)
    assert loaded.config == model.config
    assert tokenizer is None


def test_an_adapter_is_not_loaded_onto_another_base(adapted):
    folder, _ = adapted
    GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=2, n_embd=16), seed=7).save_pretrained(
        folder / "base"
    )
    with pytest.raises(CheckpointError, match="was trained on"):
        load_model(folder / "run")


@pytest.mark.parametrize("base", ["run", "adapter"])
@pytest.mark.parametrize("kind", ["run", "adapter"])
def test_an_adapters_base_cannot_be_an_adapter(adapted, kind, base):
    folder, trained = adapted
    save_adapter(trained, folder / "adapter", base_model=trained.source)
    with pytest.raises(CheckpointError, match=f"{base} contains only an adapter"):
        load_model(folder / kind, base=folder / base)


def test_an_adapter_that_is_trained_further_keeps_its_base(adapted):
    folder, _ = adapted
    model, tokenizer = load_model(folder / "run")
    assert model.source == str(folder / "base")
    data = TokenDataset.from_text("To be, or not to be. " * 20, 16, tokenizer=tokenizer)
    options = {"max_steps": 1, "micro_batch_size": 2, "mixed_precision": "no", "compile": False}
    config = TrainerConfig(output_dir=folder / "more", **options)
    Trainer(model, data, config=config).train()
    reloaded, _ = load_model(folder / "more")
    ids = torch.randint(0, 256, (2, 16))
    assert torch.equal(reloaded(ids), model.cpu().eval()(ids))


def test_an_adapter_in_pefts_format_is_loaded_onto_its_base(adapted):
    folder, trained = adapted
    ids = torch.randint(0, 256, (2, 16))
    save_adapter(trained, folder / "adapter", base_model=trained.source)
    model, _ = load_model(folder / "adapter")
    torch.testing.assert_close(model(ids), trained(ids))
    assert model.source == str(folder / "base")
    moved, _ = load_model(folder / "adapter", base=(folder / "base").rename(folder / "moved"))
    assert torch.equal(moved(ids), model(ids))
    save_adapter(trained, folder / "adapter")
    with pytest.raises(CheckpointError, match="does not record its base"):
        load_model(folder / "adapter")


def save_peft_adapter(folder, base):
    """Save an adapter in PEFT's format that records the given base."""
    model = GPT(GPTConfig(**CONFIG))
    add_lora(model, LoRAConfig(rank=2))
    save_adapter(model, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    return folder


def save_adapter_checkpoint(folder, base):
    """Save a checkpoint of an adapter that records the given base."""
    adapter = {"rank": 2, "alpha": None, "dropout": 0.0, "target_modules": ["c_fc"], "base_sha256": "0" * 64}
    return save_checkpoint(folder, state={"identity": {"adapter": adapter}, "base": base}, file="adapter")


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
@pytest.mark.parametrize("save", [save_peft_adapter, save_adapter_checkpoint])
def test_a_base_that_is_not_a_valid_path_raises_a_typed_error(tmp_path, monkeypatch, save, base):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = save(tmp_path / "adapter", base)
    with pytest.raises((CheckpointError, ModelError)):
        load_model(path)


ANY = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([2**62, 10**400, *BASES])


@settings(max_examples=100, deadline=None, database=None)
@given(
    kind=st.sampled_from(["model", "adapter"]),
    model_values=st.dictionaries(st.sampled_from(sorted(CONFIG)), ANY, min_size=1, max_size=2),
    adapter_values=st.dictionaries(st.sampled_from(["rank", "alpha", "dropout", "target_modules", "base_sha256"]), ANY),
    base=st.just("valid") | ANY,
)
def test_arbitrary_states_load_or_raise_typed_errors(
    checkpoints, bounded_memory, kind, model_values, adapter_values, base
):
    path, state = checkpoints[kind]
    identity = state["identity"]
    described = {"model": CONFIG | model_values, "adapter": identity.get("adapter", {}) | adapter_values}
    base = str(checkpoints["model"][0]) if base == "valid" else base
    checkpoint = replace(open_checkpoint(path), state=state | {"identity": described, "base": base})
    with contextlib.suppress(CheckpointError, ModelError), bounded_memory():
        model, _ = load_checkpoint(checkpoint)
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of a full model and of an adapter on it, each as its path and state."""
    full = open_checkpoint(save_checkpoint(tmp_path_factory.mktemp("full")))
    model, _ = load_model(full.path)
    adapter = asdict(LoRAConfig(rank=2)) | {"base_sha256": base_fingerprint(model)}
    add_lora(model, LoRAConfig(rank=2))
    store = CheckpointStore(tmp_path_factory.mktemp("adapter"))
    state = {"identity": {"adapter": adapter}, "tokenizer": None, "base": str(full.path)}
    path = store.save(1, {"adapter": adapter_state_dict(model)}, state)
    load_model(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.chdir(path.parent)
        yield {"model": (full.path, full.state), "adapter": (path, state)}


def test_adapters_that_record_each_other_as_base_are_an_error(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for base in (first, second):
        save_peft_adapter(first, str(base)), save_peft_adapter(second, str(first))
        with pytest.raises(CheckpointError, match="contains only an adapter"):
            load_model(first)


def test_an_adapter_config_that_is_a_symbolic_link_is_not_read(tmp_path):
    path = save_peft_adapter(tmp_path / "adapter", "nowhere/at-all") / "adapter_config.json"
    path.symlink_to(path.rename(tmp_path / "elsewhere"))
    with pytest.raises(ModelError, match="is a symbolic link"):
        load_model(path.parent)


@pytest.mark.parametrize("rank", [3, 2**40])
def test_an_adapters_rank_is_checked_before_memory_is_allocated(adapted, bounded_memory, rank):
    folder, _ = adapted
    checkpoint, _ = CheckpointStore(folder / "run").latest()
    identity = checkpoint.state["identity"]
    wrong_state = checkpoint.state | {"identity": identity | {"adapter": identity["adapter"] | {"rank": rank}}}
    path = CheckpointStore(folder / "other").save(1, {"adapter": checkpoint.tensors("adapter")}, wrong_state)
    with bounded_memory(), pytest.raises(CorruptCheckpoint, match=r"adapter\.safetensors does not match|rank="):
        load_model(path)


def test_an_export_after_mixed_precision_training_is_verified_in_float32(tmp_path):
    data = TokenDataset.from_text(TEXT, 8, tokenizer="bytes")
    options = {"micro_batch_size": 2, "mixed_precision": "bf16", "compile": False}
    model = Trainer(GPTConfig(**CONFIG), data, config=TrainerConfig(output_dir=tmp_path, max_steps=1, **options)).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # makes bfloat16's rounding visible
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(GPT.from_pretrained(tmp_path / "out").lm_head.weight, model.lm_head.weight.cpu())
