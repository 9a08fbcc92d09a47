"""Corrupt and hostile checkpoints: none is loaded as if it were valid."""

import itertools
import json
import random

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from homebrew.bounded_readers import parse_tensors
from homebrew.checkpoint.manifest import (
    FORMAT,
    Manifest,
    open_checkpoint,
    parse_state,
    state_to_json,
)
from homebrew.checkpoint.rng_state import restore_rng, rng_state
from homebrew.checkpoint.tensor_check import find_non_finite
from homebrew.errors import CheckpointError, CorruptCheckpoint

MANY = settings(max_examples=1000)


def content(path):
    """Return everything that a run restores from a checkpoint, bitwise."""
    checkpoint = open_checkpoint(path)
    files = {name: safetensors.torch.save(tensors) for name, tensors in checkpoint.files().items()}
    return checkpoint.step, checkpoint.state, files


def flips(data, rng, count):
    for _ in range(count):
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        yield data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def truncations(data, rng, count):
    yield from (data[: rng.randrange(len(data))] for _ in range(count))


def other_corruption(data, rng):
    """Yield what disks and copies do: zeroed, duplicated and missing ranges."""
    for _ in range(30):
        a, b = sorted(rng.sample(range(len(data) + 1), 2))
        yield data[:a] + data[b:]
        yield data[:a] + data[a:b] * 2 + data[b:]
        if any(data[a:b]):
            yield data[:a] + b"\0" * (b - a) + data[b:]
    yield b""
    yield bytes(len(data))
    yield data + b"\0"


@pytest.fixture(params=["full", pytest.param("adapter", marks=pytest.mark.slow)])
def pair(request, store, tiny):
    """Return a checkpoint with a file of every kind, and an earlier one of the same run."""

    def files(step):
        guard = {"history": torch.tensor([2.5, 0.1, step]), "in_a_row": torch.tensor(step)}
        rng = {
            f"rng-{rank}": rng_state() | {"numpy_gauss": torch.tensor([float(step + rank / 2)])} for rank in range(2)
        }
        return tiny[request.param](step) | {"guard": guard} | rng

    return [store.save(step, files(step), tiny["state"], score=float(step)) for step in (6, 7)]


def test_no_corruption_is_loaded_silently(pair):
    other, path = pair
    rng = random.Random(0)
    original = content(path)
    names = sorted(file.name for file in path.iterdir())
    assert len(names) == 7
    tried = loaded = 0

    def attempt():
        nonlocal tried, loaded
        tried += 1
        try:
            assert content(path) == original
            loaded += 1
        except CorruptCheckpoint as error:
            assert str(path) in str(error)

    for name in names:
        original_data = (path / name).read_bytes()
        # every bit of the manifest, which no hash covers
        every = (
            original_data[:at] + bytes([original_data[at] ^ (1 << bit)]) + original_data[at + 1 :]
            for at, bit in itertools.product(range(len(original_data)), range(8))
            if name == "manifest.json"
        )
        for corrupt in itertools.chain(
            every,
            flips(original_data, rng, 150),
            truncations(original_data, rng, 150),
            other_corruption(original_data, rng),
        ):
            (path / name).write_bytes(corrupt)
            attempt()
        (path / name).unlink()
        attempt()
        for source in (*(path / other_name for other_name in names if other_name != name), other / name):
            (path / name).write_bytes(source.read_bytes())
            attempt()
        (path / name).write_bytes(original_data)

    for first, second in itertools.combinations(names, 2):
        for a, b in ((first, second), (second, first)):
            (path / a).rename(path / "swap")
            (path / b).rename(path / a)
            (path / "swap").rename(path / b)
            if a == first:
                attempt()

    assert content(path) == original
    assert tried >= 3000
    assert loaded < tried / 50  # harmless: whitespace in the manifest that became other whitespace


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=4,
)
ENTRIES = st.fixed_dictionaries({"size": st.integers(-1, 1 << 70) | JSON, "sha256": st.just("0" * 64) | JSON})
FILES = ["state.json", "model.safetensors", "model/a.safetensors", "../x", "a/b", "a/../x.safetensors"]
MANIFESTS = st.fixed_dictionaries(
    {
        "format": st.just(FORMAT) | JSON,
        "step": st.integers(-1, 10**9) | JSON,
        "score": st.none() | st.floats() | JSON,
        "files": st.dictionaries(st.sampled_from(FILES), ENTRIES) | JSON,
    }
)


def as_json(value):
    return json.dumps(value).encode()


@pytest.mark.slow
@MANY
@given(st.binary(max_size=200) | MANIFESTS.map(as_json))
def test_any_manifest(tmp_path_factory, bounded_memory, data):
    path = tmp_path_factory.getbasetemp() / "manifest.json"
    try:
        with bounded_memory():
            manifest = Manifest.from_json(data, path)
    except CorruptCheckpoint as error:
        assert str(path) in str(error)
    else:
        assert Manifest.from_json(manifest.to_json(), path) == manifest
        assert "state.json" in manifest.files
        assert all(path.parent in (path.parent / name).resolve().parents for name in manifest.files)


@pytest.mark.slow
@MANY
@given(st.binary(max_size=200) | st.fixed_dictionaries({"step": JSON, "score": JSON, "state": JSON}).map(as_json))
def test_any_state(tmp_path_factory, bounded_memory, data):
    path = tmp_path_factory.getbasetemp() / "state.json"
    try:
        with bounded_memory():
            state = parse_state(data, path, Manifest(3, None, {}))
    except CorruptCheckpoint as error:
        assert str(path) in str(error)
    else:
        assert isinstance(state, dict)


HEADERS = st.dictionaries(
    st.text(max_size=5),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F8_E8M0", "F4", "C64", "U16", "X"]) | JSON,
            "shape": st.lists(st.integers(0, 4) | st.integers(0, 1 << 63), max_size=3) | JSON,
            "data_offsets": st.lists(st.integers(0, 32), min_size=2, max_size=2) | JSON,
        }
    )
    | JSON,
    max_size=3,
)


def with_header(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.slow
@MANY
@given(st.binary(max_size=100) | st.builds(with_header, HEADERS, st.binary(max_size=32)))
@example((2**60).to_bytes(8, "little") + b"{}")
def test_any_tensors(tmp_path_factory, bounded_memory, data):
    path = tmp_path_factory.getbasetemp() / "model.safetensors"
    try:
        with bounded_memory():
            tensors = parse_tensors(data, path, CorruptCheckpoint)
    except CorruptCheckpoint as error:
        assert str(path) in str(error)
    else:
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(data)
        find_non_finite("model", tensors)


TENSORS = st.sampled_from([torch.int64, torch.float64, torch.uint8, torch.bool]).flatmap(
    lambda dtype: st.lists(st.integers(-1, 1 << 62) if dtype is torch.int64 else st.integers(0, 1), max_size=8).map(
        lambda values: torch.tensor(values, dtype=dtype)
    )
)


@pytest.mark.slow
@MANY
@given(st.data())
def test_any_random_states(bounded_memory, data):
    original = rng_state()
    state = {name: data.draw(TENSORS) if data.draw(st.booleans()) else tensor for name, tensor in original.items()}
    for name in data.draw(st.lists(st.sampled_from(sorted(original)), max_size=1)):
        del state[name]
    try:
        with bounded_memory():
            restore_rng(state)
    except CheckpointError as error:
        assert "random states cannot be restored" in str(error)
    finally:
        restore_rng(original)


def test_state_round_trip(tmp_path, tiny):
    data = state_to_json(tiny["state"], 3, 0.5)
    assert parse_state(data, tmp_path, Manifest(3, 0.5, {})) == tiny["state"]
