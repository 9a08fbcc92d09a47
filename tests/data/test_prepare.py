import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homebrew import TokenDataset, get_tokenizer
from homebrew.data.prepare import prepare, text_pieces
from homebrew.data.token_file import TokenFile, is_token_file
from homebrew.errors import DataError

TEXTS = st.text(st.sampled_from("a's —\n\r\t é,🙂1"), max_size=60) | st.text(max_size=40)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("prepare") / "text.txt"


@settings(deadline=None, max_examples=300)
@given(text=TEXTS, piece_characters=st.integers(1, 12))
def test_pieces_encode_to_what_the_whole_text_does(path, text, piece_characters):
    path.write_bytes(text.encode(errors="ignore"))
    whole = path.read_text(encoding="utf-8")
    pieces = list(text_pieces(path, piece_characters))
    assert "".join(pieces) == whole
    assert all(pieces)
    for name in ("gpt2", "bytes"):
        tokenizer = get_tokenizer(name)
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(whole).tolist()


def test_a_long_text_comes_in_small_pieces(path):
    path.write_text("A line of text.\n" * 1000)
    assert max(map(len, text_pieces(path, 100))) < 200
    path.write_text("A text of one line. " * 1000)
    assert max(map(len, text_pieces(path, 100))) < 200


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes", "char"])
def test_a_prepared_text_is_the_text_itself(path, tmp_path, tokenizer):
    path.write_text("Grüße —\nto all\n" * 10)
    header = prepare([path], tmp_path / "out", tokenizer=tokenizer, piece_characters=7)
    ours = TokenDataset.from_shards(tmp_path / "out", 8)
    theirs = TokenDataset.from_file(path, 8, tokenizer=tokenizer)
    assert ours[1][0].tolist() == theirs[1][0].tolist()
    assert len(ours) == len(theirs)
    assert ours.tokenizer.to_json() == theirs.tokenizer.to_json()
    assert ours.bytes_per_token == theirs.bytes_per_token
    assert header.num_text_bytes == path.stat().st_size
    assert is_token_file(tmp_path / "out")
    assert not is_token_file(path)


def test_texts_are_parted_by_the_end_of_text(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(f"{name}\n")
    prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "gpt2")
    prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "bytes", tokenizer="bytes")
    gpt2, plain = (TokenFile.open(tmp_path / name) for name in ("gpt2", "bytes"))
    assert gpt2.read(0, len(gpt2)).tolist() == [64, 198, 50256, 65, 198]
    assert bytes(plain.read(0, len(plain)).tolist()) == b"a\nb\n"


def test_what_is_no_text_is_refused_and_nothing_written(tmp_path):
    (tmp_path / "good").write_text("good")
    (tmp_path / "bad").write_bytes(b"a\xff")
    (tmp_path / "empty").touch()
    for name, message in (("bad", "UTF-8"), ("none", "none"), ("empty", "no text")):
        paths = [tmp_path / "good", tmp_path / name] if name != "empty" else [tmp_path / name]
        with pytest.raises(DataError, match=message):
            prepare(paths, tmp_path / "out", tokenizer="bytes")
    assert not (tmp_path / "out").exists()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is not a regular file"):
        prepare([tmp_path / "pipe"], tmp_path / "out")
