"""Models and adapters from strangers: whatever the bytes, what comes is a typed error or finite weights."""

import json
import math
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from homebrew import GPT, GPTConfig
from homebrew.errors import ModelError
from homebrew.hub.peft import load_adapter, save_adapter
from homebrew.model.lora import LoRAConfig, add_lora, lora_layers

SHAPE = GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=8)
MANY = settings(
    max_examples=1000, deadline=timedelta(seconds=20), database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def folder():
    """A model and an adapter for it, both whole, and both to be damaged."""
    memory = Path("/dev/shm")  # to write there waits for no disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        write(folder := Path(name))
        yield folder


def write(folder):
    GPT(SHAPE).save_pretrained(folder / "whole")
    model = GPT(SHAPE)
    add_lora(model, LoRAConfig(rank=2))
    save_adapter(model, folder / "adapter")
    for file in (folder / "adapter").iterdir():
        file.rename(folder / "whole" / file.name)
    shutil.copytree(folder / "whole", folder / "damaged")


def opened(kind, folder):
    """The model in a folder, or one with the adapter in it."""
    if kind == "model":
        return GPT.from_pretrained(folder)
    model = GPT(SHAPE)
    load_adapter(model, folder)
    assert lora_layers(model)
    return model


def attempt(folder, name, data, kind, bounded_memory):
    """Open the damaged folder with one file changed."""
    damaged = folder / "damaged"
    (damaged / name).write_bytes(data)
    try:
        with bounded_memory():
            model = opened(kind, damaged)
    except ModelError as error:
        assert str(error)
    else:
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
        assert sum(tensor.nbytes for tensor in model.state_dict().values()) < 2**20
    finally:
        shutil.copyfile(folder / "whole" / name, damaged / name)


HUGE = st.sampled_from([2**31, 2**60, 10**30, 10**400, 1e300, -1, 0, math.inf, math.nan])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | HUGE,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=4,
)
MODEL_FIELDS = (
    "model_type architectures n_positions vocab_size n_layer n_head n_embd n_inner activation_function "
    "layer_norm_epsilon scale_attn_weights tie_word_embeddings resid_pdrop embd_pdrop attn_pdrop"
).split()
ADAPTER_FIELDS = (
    "peft_type r lora_alpha lora_dropout target_modules bias use_rslora rank_pattern init_lora_weights "
    "fan_in_fan_out modules_to_save base_model_name_or_path"
).split()


def edited(whole, fields):
    """A description with some of its fields changed or missing, or anything at all."""
    good = json.loads(whole)
    changes = st.dictionaries(st.sampled_from(fields), JSON | st.just(...), min_size=1, max_size=3)
    return st.binary(max_size=50) | JSON.map(as_json) | changes.map(lambda changed: as_json(good | changed))


def as_json(value):
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not ...}
    return json.dumps(value).encode()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "fields"),
    [("model", "config.json", MODEL_FIELDS), ("adapter", "adapter_config.json", ADAPTER_FIELDS)],
)
def test_any_description(folder, bounded_memory, kind, name, fields):
    @MANY
    @given(edited((folder / "whole" / name).read_bytes(), fields))
    def check(data):
        attempt(folder, name, data, kind, bounded_memory)

    check()


HEADERS = {
    "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F8_E8M0", "F4", "C64", "U16", "X"]) | JSON,
    "shape": st.lists(st.integers(0, 8) | st.sampled_from([2**31, 2**62]), max_size=3) | JSON,
    "data_offsets": st.lists(st.integers(0, 64) | HUGE, min_size=2, max_size=2) | JSON,
}


def damaged_tensors(whole):
    """A file of tensors with pieces of it exchanged, with parts of its header changed, or anything at all."""
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    names = sorted(name for name in header if name != "__metadata__")

    def changed(name, part, value):
        text = json.dumps(header | {name: header[name] | {part: value}}).encode()
        return len(text).to_bytes(8, "little") + text + data

    def spliced(edits):
        result = whole
        for at, out, put in edits:
            result = result[:at] + put + result[at + out :]
        return result

    headers = st.sampled_from(sorted(HEADERS)).flatmap(
        lambda part: st.builds(changed, st.sampled_from(names), st.just(part), HEADERS[part])
    )
    edits = st.lists(
        st.tuples(st.integers(0, len(whole)), st.integers(0, 6), st.binary(max_size=6)), min_size=1, max_size=3
    )
    return st.binary(max_size=60) | headers | edits.map(spliced) | EMPTY.map(lambda shape: of_nothing(names, shape))


EMPTY = st.lists(st.sampled_from([0, 1, 8, 2**31, 2**62, 2**63 - 1, 2**64 - 1]), min_size=1, max_size=3)
"""Shapes of tensors that, with a 0 in them, have no bytes."""


def of_nothing(names, shape):
    text = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name in names}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("model", "model.safetensors"), ("adapter", "adapter_model.safetensors")])
def test_any_tensors(folder, bounded_memory, kind, name):
    @MANY
    @given(damaged_tensors((folder / "whole" / name).read_bytes()))
    @example((2**60).to_bytes(8, "little") + b"{}")
    def check(data):
        attempt(folder, name, data, kind, bounded_memory)

    check()


@pytest.mark.parametrize(("kind", "name"), [("model", "model.safetensors"), ("adapter", "adapter_model.safetensors")])
@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [0, 2**63 - 1], [0, 2**64 - 1], [2**63 - 1, 0]])
def test_tensors_of_no_bytes_and_any_shape_are_refused(folder, kind, name, shape):
    names = load_file(folder / "whole" / name)
    (folder / "damaged" / name).write_bytes(of_nothing(names, shape))
    try:
        with pytest.raises(ModelError):
            opened(kind, folder / "damaged")
    finally:
        shutil.copyfile(folder / "whole" / name, folder / "damaged" / name)


@pytest.mark.parametrize("value", [10**400, 1e300, 1e7], ids=["long", "large", "above"])
def test_an_adapters_scale_is_bounded(folder, value):
    whole = json.loads((folder / "whole" / "adapter_config.json").read_text())
    (folder / "damaged" / "adapter_config.json").write_text(json.dumps(whole | {"lora_alpha": value}))
    try:
        with pytest.raises(ModelError, match="alpha"):
            opened("adapter", folder / "damaged")
    finally:
        shutil.copyfile(folder / "whole" / "adapter_config.json", folder / "damaged" / "adapter_config.json")


@pytest.mark.parametrize("rank", [2**20, 2**40, 10**30])
def test_an_adapters_rank_is_that_of_its_tensors_before_memory_is_taken(folder, bounded_memory, rank):
    whole = json.loads((folder / "whole" / "adapter_config.json").read_text())
    (folder / "damaged" / "adapter_config.json").write_text(json.dumps(whole | {"r": rank}))
    model = GPT(SHAPE)
    with bounded_memory(), pytest.raises(ModelError, match="lora_A"):
        load_adapter(model, folder / "damaged")
    assert not lora_layers(model)
    shutil.copyfile(folder / "whole" / "adapter_config.json", folder / "damaged" / "adapter_config.json")


@pytest.mark.parametrize(("kind", "name"), [("model", "model.safetensors"), ("adapter", "adapter_model.safetensors")])
@pytest.mark.parametrize("value", [math.nan, math.inf, "whole numbers"])
def test_weights_that_are_not_finite_numbers_are_named(folder, kind, name, value):
    tensors = load_file(folder / "whole" / name)
    key = sorted(tensors)[0]
    tensors[key] = tensors[key].long() if isinstance(value, str) else torch.full_like(tensors[key], value)
    save_file(tensors, folder / "damaged" / name)
    try:
        with pytest.raises(ModelError, match=f"{key} in .*{name}"):
            opened(kind, folder / "damaged")
    finally:
        shutil.copyfile(folder / "whole" / name, folder / "damaged" / name)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("model", "config.json"),
        ("model", "model.safetensors"),
        ("adapter", "adapter_config.json"),
        ("adapter", "adapter_model.safetensors"),
    ],
)
def test_links_out_of_a_folder_are_not_followed(folder, tmp_path, kind, name):
    shutil.copytree(folder / "whole", tmp_path / "linked")
    path = tmp_path / "linked" / name
    path.unlink()
    path.symlink_to(folder / "whole" / name)
    with pytest.raises(ModelError, match=f"{name} is a link"):
        opened(kind, tmp_path / "linked")


def test_links_of_a_cache_lead_to_blobs_beside_it_that_are_none_themselves(folder, tmp_path):
    snapshot, blobs, secret = tmp_path / "cache" / "snapshots" / "x", tmp_path / "cache" / "blobs", tmp_path / "secret"
    snapshot.mkdir(parents=True)
    shutil.copytree(folder / "whole", secret)
    for path in secret.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs", path.name))
    blobs.symlink_to(secret)
    with pytest.raises(ModelError, match=r"config\.json is a link"):
        GPT.from_pretrained(snapshot)
    blobs.unlink()
    secret.rename(blobs)
    GPT.from_pretrained(snapshot)
