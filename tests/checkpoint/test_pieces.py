"""Tensors in several files: put together when they are all there, and refused when they are not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from homebrew.checkpoint.manifest import open_checkpoint
from homebrew.checkpoint.pieces import check_placements, cut, find_pieces, join, piece_name
from homebrew.errors import CheckpointError, CorruptCheckpoint

WHOLE = {"w": torch.arange(20.0).view(5, 4), "b": torch.arange(3, dtype=torch.int64), "step": torch.tensor(7.0)}
NAMES = [piece_name("model", index, 3) for index in range(3)]


def split(whole=WHOLE, rows=2):
    """As three shards would have it: of few rows, the last has none."""
    pieces = [{}, {}, {}]
    for name, tensor in whole.items():
        if tensor.dim() == 0:
            pieces[0][name] = tensor
            continue
        for i, first in enumerate(range(0, len(tensor), rows)):
            pieces[i][name] = tensor[first : first + rows].clone()
            pieces[i][f"{name}[rows]"] = torch.tensor([first, len(tensor)])
    return pieces


def saved(store, pieces, names=NAMES):
    return store.save(1, dict(zip(names, pieces, strict=True)), {})


def test_what_was_split_is_whole_again(store):
    checkpoint = open_checkpoint(saved(store, split()))
    assert checkpoint.names == ("model",)
    found = checkpoint.files()["model"]
    assert found.keys() == WHOLE.keys()
    assert all(found[name].equal(WHOLE[name]) and found[name].dtype == WHOLE[name].dtype for name in WHOLE)


def test_what_is_not_shared_out_is_the_first_shards():
    assert cut(WHOLE, 0) == WHOLE
    assert cut(WHOLE, 1) == {}


@pytest.fixture
def placed():
    """Puts a tensor on a mesh of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda tensor, placement: DTensor.from_local(tensor, mesh, [placement], run_check=False)
    torch.distributed.destroy_process_group()


def test_only_what_is_sharded_has_rows(placed):
    tensors = {"w": placed(WHOLE["w"], Shard(0)), "b": placed(WHOLE["b"], Replicate()), "step": WHOLE["step"]}
    assert cut(tensors, 0).keys() == {"w", "w[rows]", "b", "step"}
    assert cut(tensors, 1).keys() == {"w", "w[rows]"}


@pytest.mark.parametrize("placement", [Shard(1), Partial(), _StridedShard(0, split_factor=2)])
def test_what_is_shared_out_otherwise_is_an_error_when_it_is_saved(placed, placement):
    with pytest.raises(CheckpointError, match=r"w//rows is .*gather_limit_bytes"):
        check_placements({"w//rows": placed(WHOLE["w"], placement)})


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["model-00001-of-00002"], "lacks model-00002-of-00002"),
        (["model-00002-of-00002"], "lacks model-00001-of-00002"),
        (["model", "model-00001-of-00001"], "has beside the others model.safetensors"),
        (["model-00001-of-00001", "model-00002-of-00001"], "has beside the others model-00002-of-00001"),
        (["model-00001-of-00001", "model-00001-of-00002"], "model-00001-of-0000"),
        (["model-00000-of-00000"], "has beside the others model-00000-of-00000"),
    ],
)
def test_a_manifest_with_a_piece_too_few_or_too_many(store, names, told):
    with pytest.raises(CorruptCheckpoint, match=told):
        find_pieces(names, store.folder)
    with pytest.raises(CorruptCheckpoint, match=told):
        saved(store, [{} for _ in names], names)
    assert store.steps() == []


def overlap(pieces):
    pieces[1]["w[rows]"] = torch.tensor([1, 5])


def gap(pieces):
    pieces[1]["w[rows]"] = torch.tensor([3, 5])


def exchange(pieces):
    pieces[0]["w"], pieces[1]["w"] = pieces[1]["w"], pieces[0]["w"]
    pieces[0]["w[rows]"], pieces[1]["w[rows]"] = pieces[1]["w[rows]"], pieces[0]["w[rows]"]


def lose_the_end(pieces):
    del pieces[2]["w"], pieces[2]["w[rows]"]


def lose_the_middle(pieces):
    del pieces[1]["w"], pieces[1]["w[rows]"]


def lose_the_rows(pieces):
    del pieces[1]["w[rows]"]


def lose_the_tensor(pieces):
    del pieces[1]["w"]


def set_rows(*values, dtype=torch.int64):
    return lambda pieces: pieces[0].update({"w[rows]": torch.tensor(values, dtype=dtype)})


WRONG = {
    "overlap": (overlap, 2),
    "gap": (gap, 2),
    "exchanged": (exchange, 1),
    "no end": (lose_the_end, 3),
    "no middle": (lose_the_middle, 3),
    "no rows": (lose_the_rows, 2),
    "no tensor": (lose_the_tensor, 2),
    "a row too many": (lambda p: p[2].update(w=torch.zeros(2, 4)), 3),
    "another width": (lambda p: p[1].update(w=torch.zeros(2, 3)), 2),
    "another dtype": (lambda p: p[1].update(w=torch.zeros(2, 4).double()), 2),
    "another length": (lambda p: p[1].update({"w[rows]": torch.tensor([2, 6])}), 2),
    "twice": (lambda p: p[1].update(step=torch.tensor(7.0)), 2),
    "rows of a number": (lambda p: p[0].update({"step[rows]": torch.tensor([0, 1])}), 1),
    "a number for rows": (lambda p: p[1].update(w=torch.tensor(1.0)), 2),
    "negative": (set_rows(-2, 5), 1),
    "not whole": (set_rows(0.0, 5.0, dtype=torch.float64), 1),
    "not two": (set_rows(0, 5, 5), 1),
    "more than memory": (set_rows(0, 1 << 60), 1),
    "more than the files": (set_rows(0, 100_000), 1),
    "more than a size can be": (
        lambda p: p[0].update({"w": torch.zeros(0, 2**40, 0), "w[rows]": torch.tensor([0, (1 << 63) - 1])}),
        1,
    ),
}


@pytest.mark.parametrize("how", WRONG)
def test_pieces_that_do_not_fit_together(store, how):
    change, file = WRONG[how]
    pieces = split()
    change(pieces)
    path = saved(store, pieces)
    with pytest.raises(CorruptCheckpoint, match=rf"model-0000{file}-of-00003\.safetensors"):
        open_checkpoint(path).files()


@pytest.mark.parametrize("how", ["missing", "exchanged", "truncated"])
def test_files_that_are_not_the_ones_that_were_written(store, how):
    path = saved(store, split())
    first, second = (path / f"{name}.safetensors" for name in NAMES[:2])
    if how == "missing":
        second.unlink()
    elif how == "exchanged":
        first.rename(path / "held"), second.rename(first), (path / "held").rename(second)
    else:
        second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match=r"model-0000[12]-of-00003\.safetensors"):
        open_checkpoint(path)


NUMBERS = st.integers(-3, 8) | st.sampled_from([1 << 40, (1 << 63) - 1, -(1 << 63)])


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(NUMBERS, NUMBERS, st.integers(0, 4)), min_size=1, max_size=3),
    width=st.sampled_from([(2,), (), (0,), (0, 1 << 40), (1 << 40, 0), (0, (1 << 63) - 1)]),
)
def test_any_rows(tmp_path_factory, rows, width):
    pieces = [{"w": torch.ones(n, *width), "w[rows]": torch.tensor([first, total])} for first, total, n in rows]
    path = tmp_path_factory.getbasetemp()
    try:
        [(_, found)] = join(((path, piece) for piece in pieces), max_bytes=1000).items()
    except CorruptCheckpoint:
        return
    assert found.equal(torch.ones(sum(count for _, _, count in rows), *width))  # every row once, none made up
