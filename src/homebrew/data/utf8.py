"""Checks of texts that users pass in."""

from homebrew.errors import DataError


def encode_utf8(text: str) -> bytes:
    """Encode a text as UTF-8."""
    check_is_string(text)
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"The text has U+{ord(text[error.start]):04X} at position {error.start}, a surrogate, which cannot be "
            f"encoded as UTF-8. Read the text with its own encoding, or with errors='replace'."
        ) from None


def check_is_string(text: object) -> None:
    """Raise an error for bytes, lists and other types."""
    if isinstance(text, bytes | bytearray):
        raise DataError(f"The text is of type {type(text).__name__}, but must be a string. Decode it first.")
    if not isinstance(text, str):
        raise DataError(f"The text is of type {type(text).__name__}, but must be a string. Pass one string.")
