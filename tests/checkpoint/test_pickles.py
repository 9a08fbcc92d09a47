"""Every function that loads files, given pickles: none is unpickled."""

import os
import pickle
import sys
import warnings

import pytest
import torch
from child_processes import exit_code, fork

from homebrew import GPT, GPTConfig, HomebrewError, TokenDataset, Trainer, TrainerConfig
from homebrew.checkpoint.store import CheckpointStore
from homebrew.hub.load import load_model
from homebrew.hub.peft import load_adapter, save_adapter
from homebrew.model.lora import LoRAConfig, add_lora

SHAPE = GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=1, n_embd=8)


class Payload:
    """Creates a directory when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def trainer(folder):
    data = TokenDataset.from_tokens(torch.arange(400) % 50, 8, vocab_size=50)
    settings = {"max_steps": 2, "micro_batch_size": 2, "mixed_precision": "no"}
    return Trainer(SHAPE, data, config=TrainerConfig(output_dir=folder, **settings))


def checkpoints(folder, pickled, monkeypatch):
    """Return a checkpoint of pickles with a valid manifest, and one whose manifest is a pickle too."""
    trainer(folder).train()
    valid, _ = CheckpointStore(folder).latest()
    with monkeypatch.context() as patch:
        patch.setattr("homebrew.checkpoint.checkpoint_files.serialize", lambda tensors: [pickled])
        patch.setattr("homebrew.checkpoint.checkpoint_files.read_header", lambda *args: None)
        sealed = CheckpointStore(folder).save(3, valid.files(), valid.state)
    bare = sealed.with_name("step-00000004")
    bare.mkdir()
    for name in os.listdir(sealed):  # noqa: PTH208
        (bare / name).write_bytes(pickled)
        (bare / name).with_suffix(".pt").write_bytes(pickled)
    return sealed, bare


def models(folder, pickled):
    """Return folders of a model and an adapter whose weights are pickles, named .safetensors and .bin."""
    model = GPT(SHAPE)
    add_lora(model, LoRAConfig(rank=2))
    for kind in ("safe", "pickled"):
        GPT(SHAPE).save_pretrained(folder / kind)
        save_adapter(model, folder / "adapter")
        for file in (folder / "adapter").iterdir():
            file.rename(folder / kind / file.name)
        for name, unsafe in (("model", "pytorch_model"), ("adapter_model", "adapter_model")):
            path = folder / kind / f"{name}.safetensors"
            path.unlink()
            (path if kind == "safe" else path.with_name(f"{unsafe}.bin")).write_bytes(pickled)
    return folder / "safe", folder / "pickled"


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_no_function_unpickles(tmp_path, monkeypatch, how):
    mark = tmp_path / "mark"
    if how == "torch":
        torch.save(Payload(mark), tmp_path / "bytes")
    else:
        (tmp_path / "bytes").write_bytes(pickle.dumps(Payload(mark)))
    pickled = (tmp_path / "bytes").read_bytes()
    sealed, bare = checkpoints(tmp_path / "run", pickled, monkeypatch)
    safe, unsafe = models(tmp_path, pickled)
    loaders = [
        lambda: load_model(sealed),
        lambda: load_model(bare),
        lambda: load_model(safe),
        lambda: trainer(tmp_path / "run").train(resume=True),
        lambda: trainer(tmp_path / "run").train(resume=sealed),
        lambda: trainer(tmp_path / "run").train(resume=bare),
        lambda: GPT.from_pretrained(safe),
        lambda: GPT.from_pretrained(unsafe),
        lambda: load_adapter(GPT(SHAPE), safe),
        lambda: load_adapter(GPT(SHAPE), unsafe),
        lambda: TokenDataset.from_shards(tmp_path / "bytes", 8),
    ]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # a child cannot use a GPU that its parent has used

    def load_all():
        opened, refused = [], 0
        sys.addaudithook(lambda event, args: opened.append(event) if event == "pickle.find_class" else None)
        warnings.simplefilter("ignore")
        for load in loaders:
            try:
                load()
            except HomebrewError:
                refused += 1
        assert (opened, mark.exists(), refused) == ([], False, len(loaders))
        (torch.load if how == "torch" else lambda path, **_: pickle.loads(path.read_bytes()))(
            tmp_path / "bytes", weights_only=False
        )
        assert opened  # the hook works
        assert mark.exists()

    assert exit_code(fork(load_all)) == 0  # in a child, because an audit hook cannot be removed
