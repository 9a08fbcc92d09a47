"""Untrusted models and adapters: any file content results in a typed error or in finite weights."""

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

CONFIG = GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=8)
FUZZ = settings(
    max_examples=200, deadline=timedelta(seconds=20), database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def folder():
    """Folder with a valid model and adapter in "valid" and a copy of both to corrupt in "corrupt"."""
    memory = Path("/dev/shm")  # faster than a disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        write_valid_files(folder := Path(name))
        yield folder


def write_valid_files(folder):
    GPT(CONFIG).save_pretrained(folder / "valid")
    model = GPT(CONFIG)
    add_lora(model, LoRAConfig(rank=2))
    save_adapter(model, folder / "adapter")
    for file in (folder / "adapter").iterdir():
        file.rename(folder / "valid" / file.name)
    shutil.copytree(folder / "valid", folder / "corrupt")


def load(kind, folder):
    """Load the model in a folder, or add the adapter in it to a new model."""
    if kind == "model":
        return GPT.from_pretrained(folder)
    model = GPT(CONFIG)
    load_adapter(model, folder)
    assert lora_layers(model)
    return model


def check_file(folder, name, data, kind, bounded_memory):
    """Load the folder with one file replaced."""
    corrupt = folder / "corrupt"
    (corrupt / name).write_bytes(data)
    try:
        with bounded_memory():
            model = load(kind, corrupt)
    except ModelError as error:
        assert str(error)
    else:
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
        assert sum(tensor.nbytes for tensor in model.state_dict().values()) < 2**20
    finally:
        shutil.copyfile(folder / "valid" / name, corrupt / name)


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


def edited_json(valid, fields):
    """Strategy: a JSON file with some fields changed or removed, or arbitrary bytes."""
    values = json.loads(valid)
    changes = st.dictionaries(st.sampled_from(fields), JSON | st.just(...), min_size=1, max_size=3)
    return st.binary(max_size=50) | JSON.map(as_json) | changes.map(lambda changed: as_json(values | changed))


def as_json(value):
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not ...}
    return json.dumps(value).encode()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # such as for three different dropouts
@pytest.mark.parametrize(
    ("kind", "name", "fields"),
    [("model", "config.json", MODEL_FIELDS), ("adapter", "adapter_config.json", ADAPTER_FIELDS)],
)
def test_arbitrary_configs_load_or_raise_typed_errors(folder, bounded_memory, kind, name, fields):
    @FUZZ
    @given(edited_json((folder / "valid" / name).read_bytes(), fields))
    def check(data):
        check_file(folder, name, data, kind, bounded_memory)

    check()


HEADERS = {
    "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F8_E8M0", "F4", "C64", "U16", "X"]) | JSON,
    "shape": st.lists(st.integers(0, 8) | st.sampled_from([2**31, 2**62]), max_size=3) | JSON,
    "data_offsets": st.lists(st.integers(0, 64) | HUGE, min_size=2, max_size=2) | JSON,
}


def corrupt_safetensors(valid):
    """Strategy: a safetensors file with bytes or parts of its header changed, or arbitrary bytes."""
    length = int.from_bytes(valid[:8], "little")
    header, data = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    names = sorted(name for name in header if name != "__metadata__")

    def changed(name, part, value):
        text = json.dumps(header | {name: header[name] | {part: value}}).encode()
        return len(text).to_bytes(8, "little") + text + data

    def spliced(edits):
        result = valid
        for start, num_removed, inserted in edits:
            result = result[:start] + inserted + result[start + num_removed :]
        return result

    headers = st.sampled_from(sorted(HEADERS)).flatmap(
        lambda part: st.builds(changed, st.sampled_from(names), st.just(part), HEADERS[part])
    )
    edits = st.lists(
        st.tuples(st.integers(0, len(valid)), st.integers(0, 6), st.binary(max_size=6)), min_size=1, max_size=3
    )
    return (
        st.binary(max_size=60)
        | headers
        | edits.map(spliced)
        | ZERO_SIZE_SHAPES.map(lambda shape: empty_tensors(names, shape))
    )


ZERO_SIZE_SHAPES = st.lists(st.sampled_from([0, 1, 8, 2**31, 2**62, 2**63 - 1, 2**64 - 1]), min_size=1, max_size=3)
"""Shapes with huge sizes, which are valid in a safetensors file without data if one size is 0."""


def empty_tensors(names, shape):
    text = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name in names}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("model", "model.safetensors"), ("adapter", "adapter_model.safetensors")])
def test_arbitrary_safetensors_load_or_raise_typed_errors(folder, bounded_memory, kind, name):
    @FUZZ
    @given(corrupt_safetensors((folder / "valid" / name).read_bytes()))
    @example((2**60).to_bytes(8, "little") + b"{}")
    def check(data):
        check_file(folder, name, data, kind, bounded_memory)

    check()


@pytest.mark.parametrize(("kind", "name"), [("model", "model.safetensors"), ("adapter", "adapter_model.safetensors")])
@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [0, 2**63 - 1], [0, 2**64 - 1], [2**63 - 1, 0]])
def test_empty_tensors_of_huge_shapes_are_rejected(folder, kind, name, shape):
    names = load_file(folder / "valid" / name)
    (folder / "corrupt" / name).write_bytes(empty_tensors(names, shape))
    try:
        with pytest.raises(ModelError):
            load(kind, folder / "corrupt")
    finally:
        shutil.copyfile(folder / "valid" / name, folder / "corrupt" / name)


@pytest.mark.parametrize("value", [10**400, 1e300, 1e7], ids=["long", "large", "above"])
def test_an_adapters_scale_is_bounded(folder, value):
    config = json.loads((folder / "valid" / "adapter_config.json").read_text())
    (folder / "corrupt" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": value}))
    try:
        with pytest.raises(ModelError, match="alpha"):
            load("adapter", folder / "corrupt")
    finally:
        shutil.copyfile(folder / "valid" / "adapter_config.json", folder / "corrupt" / "adapter_config.json")


@pytest.mark.parametrize("rank", [2**20, 2**40, 10**30])
def test_an_adapters_rank_is_checked_before_memory_is_allocated(folder, bounded_memory, rank):
    config = json.loads((folder / "valid" / "adapter_config.json").read_text())
    (folder / "corrupt" / "adapter_config.json").write_text(json.dumps(config | {"r": rank}))
    model = GPT(CONFIG)
    with bounded_memory(), pytest.raises(ModelError, match="rank="):
        load_adapter(model, folder / "corrupt")
    assert not lora_layers(model)
    shutil.copyfile(folder / "valid" / "adapter_config.json", folder / "corrupt" / "adapter_config.json")


@pytest.mark.parametrize(("kind", "name"), [("model", "model.safetensors"), ("adapter", "adapter_model.safetensors")])
@pytest.mark.parametrize("value", [math.nan, math.inf, "integers"])
def test_non_finite_and_integer_weights_are_named(folder, kind, name, value):
    tensors = load_file(folder / "valid" / name)
    key = sorted(tensors)[0]
    tensors[key] = tensors[key].long() if isinstance(value, str) else torch.full_like(tensors[key], value)
    save_file(tensors, folder / "corrupt" / name)
    try:
        with pytest.raises(ModelError, match=f"{key} in .*{name}"):
            load(kind, folder / "corrupt")
    finally:
        shutil.copyfile(folder / "valid" / name, folder / "corrupt" / name)


def test_a_link_to_itself_is_not_followed(folder, tmp_path):
    shutil.copytree(folder / "valid", tmp_path / "linked")
    (tmp_path / "linked" / "config.json").unlink()
    (tmp_path / "linked" / "config.json").symlink_to("config.json")
    with pytest.raises(ModelError, match=r"config\.json is a symbolic link"):
        GPT.from_pretrained(tmp_path / "linked")


def test_links_of_the_hub_cache_are_followed_only_to_its_blobs(folder, tmp_path):
    snapshot, blobs, elsewhere = (tmp_path / name for name in ("cache/snapshots/x", "cache/blobs", "elsewhere"))
    snapshot.mkdir(parents=True)
    shutil.copytree(folder / "valid", elsewhere)
    for path in elsewhere.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs", path.name))
    blobs.symlink_to(elsewhere)
    with pytest.raises(ModelError, match=r"config\.json is a symbolic link"):
        GPT.from_pretrained(snapshot)
    blobs.unlink()
    elsewhere.rename(blobs)
    GPT.from_pretrained(snapshot)
