"""Every file with a structure is read within the same limits, whichever function opens it."""

import hashlib
import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shards import write_shard

from homebrew import GPT, GPTConfig
from homebrew.bounded_readers import MAX_BYTES, MAX_JSON_VALUES, MAX_RANK, MAX_TENSORS, read_json
from homebrew.checkpoint.manifest import open_checkpoint
from homebrew.checkpoint.store import CheckpointStore
from homebrew.data.token_file import TokenFile, write_tokens
from homebrew.errors import CorruptCheckpoint, DataError, HomebrewError, ModelError
from homebrew.hub.load import load_model
from homebrew.hub.peft import load_adapter, save_adapter
from homebrew.hub.read_tokenizer import read_tokenizer
from homebrew.model.lora import LoRAConfig, add_lora

CONFIG = GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=8)


def load_checkpoint(path):
    open_checkpoint(path).tensors("model")


def write_checkpoint(folder):
    store = CheckpointStore(folder)
    store.prepare()
    return store.save(3, {"model": {"w": torch.ones(2)}}, {}, score=None), load_checkpoint


def write_sharded_checkpoint(folder):
    path, load = write_checkpoint(folder)
    (path / "model.safetensors").unlink()
    (path / "model").mkdir()
    write_shard(path / "model" / "shard.safetensors", {"w": ([0], torch.ones(2))})
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["model.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    update_manifest(path, "model/shard.safetensors")
    return path, load


def write_model(folder):
    GPT(CONFIG).save_pretrained(folder)
    return folder, load_model


def write_model_with_index(folder):
    write_model(folder)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    return folder, load_model


def write_adapter(folder):
    model = GPT(CONFIG)
    add_lora(model, LoRAConfig(rank=2))
    save_adapter(model, folder)
    return folder, lambda path: load_adapter(GPT(CONFIG), path)


def write_token_file(folder):
    write_tokens(folder / "book.npy", np.arange(9), vocab_size=10)
    return folder, lambda path: TokenFile(path / "book.npy")


def write_vocabulary(folder):
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("")
    return folder, partial(read_tokenizer, vocab_size=20)


JSON_FILES = [
    (write_checkpoint, "manifest.json", CorruptCheckpoint),
    (write_checkpoint, "state.json", CorruptCheckpoint),
    (write_model, "config.json", ModelError),
    (write_model, "homebrew_tokenizer.json", ModelError),
    (write_model_with_index, "model.safetensors.index.json", ModelError),
    (write_vocabulary, "vocab.json", ModelError),
    (write_adapter, "adapter_config.json", ModelError),
    (write_token_file, "book.json", DataError),
]
TENSOR_FILES = [
    (write_checkpoint, "model.safetensors", CorruptCheckpoint),
    (write_sharded_checkpoint, "model/shard.safetensors", CorruptCheckpoint),
    (write_model, "model.safetensors", ModelError),
    (write_model_with_index, "model-1.safetensors", ModelError),
    (write_adapter, "adapter_model.safetensors", ModelError),
]


def update_manifest(folder, name):
    """Write a file's size and hash into a checkpoint's manifest, if the folder has one."""
    if (path := folder / "manifest.json").exists() and name != path.name:
        manifest, data = json.loads(path.read_text()), (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        path.write_text(json.dumps(manifest))


def cases(files, hostile, some):
    """Pair the first file with all hostile contents, and the others, which the same function reads, with some."""
    pairs = [(files[0], name) for name in hostile] + [(file, name) for file in files[1:] for name in some]
    return [pytest.param(file, *hostile[name], id=f"{file[0].__name__}-{file[1]}-{name}") for file, name in pairs]


def check(tmp_path, bounded_memory, file, data, message):
    """Replace a file of a valid folder and load the folder."""
    write, name, error = file
    folder, load = write(tmp_path)
    (folder / name).write_bytes(data)
    update_manifest(folder, name)
    with bounded_memory(), pytest.raises(error, match=message):
        load(folder)


def fill(item, num_bytes):
    return b'{"a": [' + item * (num_bytes // len(item) - 10) + b"0]}"


HOSTILE_JSON = {
    "empty objects": (fill(b"{},", MAX_BYTES), "JSON values"),
    "empty lists": (fill(b"[],", MAX_BYTES), "JSON values"),
    "numbers": (fill(b"1,", MAX_BYTES), "JSON values"),
    "keys": (b'{"":0' + b"".join(b',"%d":0' % i for i in range(MAX_JSON_VALUES // 2)) + b"}", "JSON values"),
    "deep lists": (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "deep"),
    "deep objects": (b'{"a": ' * 500 + b"0" + b"}" * 500, "deep"),
    "deeper than Python's stack": (b'{"a": ' + b"[" * 500_000 + b"]" * 500_000 + b"}", "is not valid JSON"),
    "large": (b'{"a": 0' + b" " * MAX_BYTES + b"}", "bytes"),
    "long string": (b'{"a": "' + b"x" * MAX_BYTES + b'"}', "bytes"),
    "duplicate keys": (b'{"a": 1, "a": 2}', "duplicate key"),
    "empty": (b"", "not valid JSON"),
    "truncated": (b'{"a": 0', "not valid JSON"),
    "a list": (b"[]", "must contain a JSON object"),
    "null": (b"null", "must contain a JSON object"),
    "not UTF-8": (b"\xff", "not valid JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", "not valid JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
    "long integer": (b'{"a": ' + b"1" * 10_000 + b"}", "not valid JSON"),
}


@pytest.mark.parametrize(("file", "data", "message"), cases(JSON_FILES, HOSTILE_JSON, ("numbers", "truncated")))
def test_json_is_bounded(tmp_path, bounded_memory, file, data, message):
    check(tmp_path, bounded_memory, file, data, message)


def header(text):
    return len(text).to_bytes(8, "little") + text


def entry(dtype="F32", shape="0"):
    return f'{{"dtype": "{dtype}", "shape": [{shape}], "data_offsets": [0, 0]}}'


def rank(number):
    return header(f'{{"w": {entry(shape=",".join(["0"] * number))}}}'.encode())


HOSTILE_TENSORS = {
    "long header": (header(b'{"__metadata__": {"a": "' + b"x" * 56_000_000 + b'"}}'), "too long"),
    "header longer than the file": ((2**60).to_bytes(8, "little") + b"{}", "too long"),
    "much metadata": (header(b'{"__metadata__": {"":""' + b',"":""' * MAX_JSON_VALUES + b"}}"), "JSON values"),
    "65 dimensions": (rank(65), "at most 64 dimensions"),
    "100,000 dimensions": (rank(100_000), "at most 64 dimensions"),
    "many tensors": (header(json.dumps(dict.fromkeys(range(MAX_TENSORS + 1), 0)).encode()), "65,537 tensors"),
    "4-bit floats": (header(f'{{"w": {entry("F4")}}}'.encode()), "F4"),
    "unknown dtype": (header(f'{{"w": {entry("X")}}}'.encode()), "not supported"),
    "duplicate names": (header(f'{{"w": {entry()}, "w": {entry()}}}'.encode()), "duplicate key"),
    "not JSON": (b"\x10" + b"\0" * 7 + b"{" * 16, "not valid JSON"),
    "empty": (b"", "not valid JSON"),
}


@pytest.mark.parametrize(("file", "data", "message"), cases(TENSOR_FILES, HOSTILE_TENSORS, ("long header", "empty")))
def test_safetensors_headers_are_bounded(tmp_path, bounded_memory, file, data, message):
    check(tmp_path, bounded_memory, file, data, message)


@pytest.mark.parametrize("file", TENSOR_FILES, ids=lambda file: f"{file[0].__name__}-{file[1]}")
@pytest.mark.parametrize("value", [1e300, -4e38])
def test_values_are_finite_after_the_cast_to_the_dtype_that_is_loaded(tmp_path, file, value):
    write, name, error = file
    folder, load = write(tmp_path)
    with safe_open(folder / name, framework="pt") as saved:
        metadata = saved.metadata()
    tensors = {key: torch.full_like(t, value, dtype=torch.float64) for key, t in load_file(folder / name).items()}
    save_file(tensors, folder / name, metadata)
    update_manifest(folder, name)
    with pytest.raises(error, match="not finite"):
        load(folder)


@pytest.mark.parametrize("file", JSON_FILES + TENSOR_FILES, ids=lambda file: f"{file[0].__name__}-{file[1]}")
@pytest.mark.parametrize("target", ["copy", "/dev/zero"])
def test_links_are_not_followed(tmp_path, file, target):
    write, name, error = file
    (tmp_path / "valid").mkdir()
    folder, load = write(tmp_path / "valid")
    if not (folder / name).exists():
        (folder / name).touch()
    (folder / name).rename(tmp_path / "copy")
    (folder / name).symlink_to(tmp_path / target)
    with pytest.raises(error, match=r"[Ss]ymbolic link|not a regular file"):
        load(folder)


def test_values_within_the_limits_are_read(tmp_path):
    path = tmp_path / "file.json"
    values = {"list": [[]] * (MAX_JSON_VALUES // 4), "text": "x" * (MAX_BYTES // 2)}
    path.write_text(json.dumps(values))
    assert read_json(path, HomebrewError) == values


def test_tensors_of_the_largest_supported_rank_are_read(tmp_path):
    store = CheckpointStore(tmp_path)
    store.prepare()
    tensors = {"w": torch.ones([1] * MAX_RANK)}
    checkpoint = open_checkpoint(store.save(1, {"optimizer": tensors}, {}, score=None))
    assert checkpoint.tensors("optimizer")["w"].shape == tensors["w"].shape
