import errno
import os
import re

import numpy as np
import pytest
import torch

from homebrew import TokenDataset, load_corpus, train_tokenizer
from homebrew.data.preparation.prepare import prepare
from homebrew.data.text_paths import TEXT_SUFFIXES, expand_paths, text_files
from homebrew.data.token_file import TokenFile
from homebrew.errors import DataError

WAYS = {
    "a folder": lambda folder: folder,
    "several files": lambda folder: [folder / "a.txt", folder / "more" / "b.TXT"],
    "a file and a folder": lambda folder: (str(folder / "a.txt"), folder / "more"),
    "a list of one folder": lambda folder: [str(folder)],
}


@pytest.fixture
def folder(tmp_path):
    """A folder with two texts, one of them in a subfolder, and files that are none."""
    folder = tmp_path / "texts"
    for name, content in {
        "a.txt": "To be, or not to be:",
        "more/b.TXT": "that is the question.\n",
        "tokenizer.json": "no text",
        "run/run.json": "{}",
        "run/metrics.jsonl": "no text",
        "run/logs/c.txt": "no text",
        "notes.rst": "no text",
        ".hidden.txt": "no text",
        ".git/c.txt": "no text",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "folder.txt").mkdir()
    return folder


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def paths(request, folder):
    """The two texts, given in every way."""
    return request.param(folder)


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes", "char"])
def test_from_file_has_the_tokens_of_a_prepared_file(paths, tokenizer, tmp_path):
    prepare(paths, tmp_path / "tokens.npy", tokenizer=tokenizer)
    prepared = TokenDataset.from_shards(tmp_path / "tokens.npy", 4)
    dataset = TokenDataset.from_file(paths, 4, tokenizer=tokenizer)
    everything = torch.arange(len(prepared))
    assert dataset.starts.equal(prepared.starts)
    assert torch.equal(*(torch.cat(data.batch(everything)) for data in (dataset, prepared)))
    assert dataset.num_text_bytes == prepared.num_text_bytes
    assert dataset.source.endswith("a.txt and 1 more")


def test_load_corpus_joins_texts_on_new_lines(paths):
    corpus = load_corpus(path=paths)
    assert corpus.text == "To be, or not to be:\nthat is the question.\n"
    assert corpus.source.endswith("a.txt and 1 more")


def test_token_files_may_be_a_folder(folder, tmp_path):
    shards = [tmp_path / "shards" / name for name in ("a.npy", "b.npy")]
    for shard in shards:
        prepare(folder, shard, tokenizer="bytes")
    of_folder, of_files = (TokenDataset.from_shards(paths, 4) for paths in (tmp_path / "shards", shards))
    assert of_folder.fingerprint == of_files.fingerprint


@pytest.mark.parametrize("shard_tokens", [None, 100])
def test_the_splits_of_prepare_are_not_mixed(tmp_path, shard_tokens):
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n{"text": "more of it"}\n' * 40)
    prepare(tmp_path / "a.jsonl", tmp_path / "b.npy", tokenizer="bytes", val_fraction=0.5, shard_tokens=shard_tokens)
    with pytest.raises(DataError, match=r"b-train\*.npy.*b-val\*.npy"):
        TokenDataset.from_file(tmp_path, 4)
    assert TokenDataset.from_file(tmp_path / "b-train*.npy", 4).num_tokens > 300


def test_only_the_first_suffix_that_occurs_is_taken_from_a_folder(folder):
    assert expand_paths(folder, ".npy", TEXT_SUFFIXES) == text_files(folder)
    prepare(folder, folder / "tokens.npy", tokenizer="bytes")
    assert expand_paths(folder, ".npy", TEXT_SUFFIXES) == [folder / "tokens.npy"]
    prepare(folder, folder / "tokens.npy", tokenizer="bytes")  # reads the texts, not its own output


@pytest.mark.parametrize("open_texts", [text_files, lambda path: load_corpus(path=path), TokenDataset.from_shards])
def test_a_folder_without_texts_is_an_error(tmp_path, open_texts):
    (tmp_path / "book.epub").touch()
    arguments = (4,) if open_texts == TokenDataset.from_shards else ()
    with pytest.raises(DataError, match=r"no \.(txt or \.md|npy) files"):
        open_texts(tmp_path, *arguments)


TEXT_READERS = [
    text_files,
    lambda path: load_corpus(path=path),
    lambda path: TokenDataset.from_file(path, 4),
    lambda path: train_tokenizer(path, path.parent / "own.json", vocab_size=300),
]


@pytest.mark.parametrize("read", TEXT_READERS)
@pytest.mark.parametrize("name", ["c.jsonl", "more/c.JSON", "more/c.txt.gz", "c.parquet", "train.bin"])
def test_data_that_would_be_left_out_of_a_folder_is_an_error(folder, read, name):
    (folder / name).touch()
    with pytest.raises(DataError, match=rf"{folder / name}.*{folder}/\*\*/\*\.txt.*homebrew prepare"):
        read(folder)


def test_the_pattern_in_an_error_matches_the_folder_that_was_given(tmp_path):
    for name in ("texts[1]/a.txt", "texts[1]/b.jsonl", "texts1/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError) as error:
        text_files(tmp_path / "texts[1]")
    pattern = re.search("a pattern such as '(.*?)'", str(error.value))[1]
    assert text_files(pattern) == [tmp_path / "texts[1]" / "a.txt"]


def test_markdown_is_text(folder, tmp_path):
    (folder / "more" / "a.md").write_text("# To be")
    files = [folder / name for name in ("a.txt", "more/a.md", "more/b.TXT")]
    assert text_files(folder) == files
    prepared, named = (prepare(paths, tmp_path / "out.npy", tokenizer="bytes") for paths in (folder, files))
    assert prepared == named


@pytest.mark.parametrize("read", [*TEXT_READERS, lambda path: TokenDataset.from_shards(path, 4)])
@pytest.mark.parametrize("name", ["c.jsonl", "more/c.parquet", "c.gz"])
def test_a_folder_without_text_files_says_what_reads_its_data(tmp_path, read, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"no \..* files.*{tmp_path / name}.*homebrew prepare"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("encoding", "advice"),
    [("latin-1", "iconv -f latin1 "), ("cp1252", "iconv -f latin1 "), ("utf-16", "iconv -f utf-16 ")],
)
@pytest.mark.parametrize(
    "read",
    [
        lambda path, output: TokenDataset.from_file(path, 4),
        lambda path, output: load_corpus(path=path),
        lambda path, output: prepare(path, output),
    ],
    ids=["from_file", "load_corpus", "prepare"],
)
def test_a_text_in_another_encoding_is_an_error_that_says_how_to_convert_it(tmp_path, encoding, advice, read):
    path = tmp_path / "book.txt"
    path.write_text("Où est le café? " * 10, encoding=encoding)
    with pytest.raises(DataError, match="cannot be read as UTF-8 text") as caught:
        read(path, tmp_path / "tokens.npy")
    assert advice in str(caught.value)


def test_all_names_of_json_lines_are_taken_from_a_folder_but_not_the_metadata_of_token_files(tmp_path):
    for name in ("a.json", "b.NDJSON", "c.jsonl"):
        (tmp_path / name).write_text('{"text": "To be"}')
    np.save(tmp_path / "a.npy", np.zeros((2, 2)))  # not a token file, so a.json is a text
    for output in ("d.npy", "e.npy", "e.npy"):
        prepare(tmp_path, tmp_path / output, tokenizer="bytes", shard_tokens=9 if output == "e.npy" else None)
    (tmp_path / "g.partial").mkdir()
    (tmp_path / "g.partial" / "plan.json").touch()
    prepare(tmp_path, tmp_path / "f.npy", tokenizer="bytes")
    assert len(TokenFile(tmp_path / "f.npy")) == 15


READERS = [
    text_files,
    lambda path: load_corpus(path=path),
    lambda path: TokenDataset.from_file(path, 4),
    lambda path: prepare(path, path.parent / "out.npy", tokenizer="bytes"),
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["more", "more/deep"])
def test_a_subfolder_that_cannot_be_read_is_an_error(folder, monkeypatch, read, name):
    (folder / name).mkdir(exist_ok=True)
    scandir = os.scandir

    def scan(path):
        if str(path) == str(folder / name):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)  # the superuser may read all folders
    with pytest.raises(DataError, match=rf"{folder / name}' cannot be read: Permission denied"):
        read(folder)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("target", ["nowhere", "c.txt", "a.txt/b"])
def test_a_link_to_a_missing_file_is_an_error(folder, read, target):
    (folder / "more" / "c.txt").symlink_to(target)
    with pytest.raises(DataError, match=rf"{folder}/more/c.txt' cannot be read"):
        read(folder)


def test_a_pipe_with_the_suffix_of_a_text_is_an_error(folder):
    os.mkfifo(folder / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe\.txt' is not a regular file"):
        text_files(folder)


def test_links_to_files_are_read_and_links_to_folders_and_other_files_are_not(folder):
    (folder / "c.txt").symlink_to("a.txt")
    (folder / "linked").symlink_to("more")
    (folder / "linked.txt").symlink_to("more")
    (folder / "broken.rst").symlink_to("nowhere")
    (folder / ".broken.txt").symlink_to("nowhere")
    assert text_files(folder) == [folder / name for name in ("a.txt", "c.txt", "more/b.TXT")]
