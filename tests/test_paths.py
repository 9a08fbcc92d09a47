"""Paths are resolved once: `~` is the home directory, and a later change of the working directory has no effect."""

import os
import pickle
from pathlib import Path

import pytest
from tiny_runs import CONFIG, ONE_LAYER, StopAt, make_trainer, saved_steps

from homebrew import (
    GPT,
    LoRAConfig,
    TokenDataset,
    TrainerConfig,
    add_lora,
    load_adapter,
    load_corpus,
    load_hellaswag,
    load_model,
    save_adapter,
)
from homebrew.data.download import cache_dir
from homebrew.data.preparation.prepare import prepare
from homebrew.data.token_file import TokenFile, write_tokens
from homebrew.data.token_formats import is_token_file
from homebrew.errors import ConfigError
from homebrew.io import absolute_path, local_path_or_name

TEXT = "Now is the winter of our discontent. " * 20
QUESTION = '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}\n'


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home directory, and an empty working directory beside it."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_a_path_becomes_absolute_and_keeps_its_links(home, tmp_path):
    assert absolute_path("~/run") == absolute_path(Path("~/run")) == home / "run"
    assert absolute_path("run/..") == tmp_path / "work" / "run" / ".."
    assert absolute_path("/a/~") == Path("/a/~")
    assert absolute_path("~nobody-has-this-name/run") == tmp_path / "work" / "~nobody-has-this-name" / "run"


def test_a_name_is_a_path_only_if_it_exists(home, tmp_path):
    assert local_path_or_name("openai-community/gpt2") == "openai-community/gpt2"
    assert local_path_or_name(Path("gpt2")) == tmp_path / "work" / "gpt2"
    (home / "gpt2").mkdir()
    assert local_path_or_name("~/gpt2") == home / "gpt2"
    assert local_path_or_name("x" * 5000) == "x" * 5000


READERS = {
    "load_corpus": lambda path: load_corpus(path=path),
    "from_file": lambda path: TokenDataset.from_file(path, 8, tokenizer="bytes"),
    "prepare": lambda path: prepare([path], "tokens.npy", tokenizer="bytes"),
    "load_hellaswag": lambda path: load_hellaswag(path),
    "is_token_file": lambda path: is_token_file(path),
}


@pytest.mark.parametrize("name", READERS)
def test_files_in_the_home_directory_are_read(home, name):
    (home / "text").write_text(QUESTION if name == "load_hellaswag" else TEXT)
    READERS[name]("~/text")
    READERS[name](Path("~/text"))


WRITERS = {
    "prepare": lambda path: prepare(["text"], path, tokenizer="bytes"),
    "write_tokens": lambda path: write_tokens(path, [[1, 2, 3]], vocab_size=5),
    "save_pretrained": lambda path: GPT(ONE_LAYER).save_pretrained(path),
    "save_adapter": lambda path: save_adapter(adapted(), path),
    "Trainer": lambda path: make_trainer(path, max_steps=1).train(),
}


def adapted():
    model = GPT(CONFIG)
    add_lora(model, LoRAConfig(rank=2))
    return model


@pytest.mark.parametrize("name", WRITERS)
def test_files_are_written_to_the_home_directory(home, tmp_path, name):
    Path("text").write_text(TEXT)
    WRITERS[name]("~/out.npy")
    assert (home / "out.npy").exists()
    assert os.listdir(tmp_path / "work") == ["text"]  # noqa: PTH208


def test_models_and_adapters_in_the_home_directory_are_loaded(home):
    GPT(CONFIG).save_pretrained("~/model")
    save_adapter(adapted(), "~/adapter", base_model="~/model")
    load_adapter(GPT.from_pretrained("~/model"), "~/adapter")
    load_model("~/adapter")
    load_model("~/adapter", base="~/model")
    make_trainer("~/run", max_steps=1).train()
    load_model("~/run")


def test_token_files_and_the_cache_in_the_home_directory_are_found(home, monkeypatch):
    write_tokens(home / "tokens.npy", [list(range(40))], vocab_size=50)
    assert len(TokenDataset.from_shards("~/tokens.npy", 8)) == len(TokenDataset.from_shards(["~/tokens.npy"], 8)) > 0
    monkeypatch.setenv("HOMEBREW_GPT_CACHE", "~/cache")
    assert cache_dir() == home / "cache"


# --- a change of the working directory


def test_a_run_stays_in_its_folder(home, tmp_path, monkeypatch):
    class ChangesDirectory(StopAt):
        def on_train_begin(self, trainer):
            monkeypatch.chdir("/")

    trainer = make_trainer("run", save_every=1, callbacks=[ChangesDirectory(2)])
    assert trainer.config.output_dir == tmp_path / "work" / "run"
    trainer.train()
    trainer.train(resume=True)
    assert saved_steps(tmp_path / "work" / "run") == [5, 6]
    monkeypatch.chdir(tmp_path)
    make_trainer("other").train(resume=Path("work/run/checkpoints/step-00000005"))
    assert saved_steps(tmp_path / "other") == [6]


@pytest.mark.parametrize("resume", ["~/run/checkpoints/step-00000006", Path("~/run/checkpoints/step-00000006")])
def test_a_checkpoint_in_the_home_directory_is_resumed(home, resume):
    make_trainer("~/run").train()
    trainer = make_trainer("~/other")
    trainer.train(resume=resume)
    assert trainer.step == 6


def test_a_token_file_is_opened_again_by_loader_workers(home, monkeypatch):
    write_tokens("tokens.npy", [list(range(40))], vocab_size=50)
    pickled = pickle.dumps(TokenFile("tokens.npy"))
    monkeypatch.chdir("/")
    pickle.loads(pickled)


def test_the_base_of_an_adapter_is_found(home, monkeypatch):
    GPT(CONFIG).save_pretrained("base")
    for load in (GPT.from_pretrained, lambda folder: load_model(folder)[0]):
        model = load("base")
        add_lora(model, LoRAConfig(rank=2))
        make_trainer("run", model=model, max_steps=1).train(overwrite=True)
        save_adapter(model, "adapter", base_model="base")
        with monkeypatch.context() as patch:
            patch.chdir("/")
            load_model(home.parent / "work" / "run")
            load_model(home.parent / "work" / "adapter")


@pytest.mark.parametrize("value", [7, None, "", b"run", "a\0b", Path("a\0b")])
def test_an_invalid_output_dir_is_an_error(value):
    with pytest.raises(ConfigError, match=r"output_dir=.*: must be a path"):
        TrainerConfig(output_dir=value, max_steps=1)


@pytest.mark.parametrize("path", ["a\0b", "a\ud800", 5, b"run"])
@pytest.mark.parametrize(
    "use",
    [
        absolute_path,
        TokenFile,
        load_hellaswag,
        load_model,
        GPT(CONFIG).save_pretrained,
        GPT.from_pretrained,
        lambda path: load_corpus(path=path),
        lambda path: TokenDataset.from_file(path, 4),
        lambda path: TokenDataset.from_shards([path], 4),
        lambda path: prepare(path, "out.npy"),
        lambda path: write_tokens(path, [[1, 2]], vocab_size=5),
    ],
)
def test_what_is_not_a_path_is_an_error(tmp_path, monkeypatch, use, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="not a valid path"):
        use(path)
