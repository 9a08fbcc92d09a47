"""Kinds of binary files by their first bytes, and what to do with one that was given as a text."""

NPY_MAGIC = b"\x93NUMPY"
LLMC_GPT2 = (20240520).to_bytes(4, "little")
LLMC_LLAMA3 = (20240801).to_bytes(4, "little")
"""First bytes of llm.c's token files."""

_OPEN_TOKENS = "It has token ids, not text: train on it with `homebrew train`, or open it with TokenDataset.from_file"
_DECOMPRESS = "Decompress it first"
_PREPARE = "Tokenize its texts with `homebrew prepare`, and use the result"
_EXTRACT = "Extract its text into a .txt file first"
_KINDS = {
    NPY_MAGIC: ("a NumPy array", _OPEN_TOKENS),
    LLMC_GPT2: ("a token file of llm.c", _OPEN_TOKENS),
    LLMC_LLAMA3: ("a token file of llm.c", _OPEN_TOKENS),
    b"\x1f\x8b\x08": ("compressed with gzip", f"{_DECOMPRESS}, or tokenize it with `homebrew prepare`"),
    b"BZh": ("compressed with bzip2", _DECOMPRESS),
    b"\xfd7zXZ": ("compressed with xz", _DECOMPRESS),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", f"{_DECOMPRESS}, or tokenize it with `homebrew prepare`"),
    b"PK\x03\x04": ("a zip archive", _DECOMPRESS),
    b"PAR1": ("in Parquet format", _PREPARE),
    b"ARROW1": ("in Arrow format", _EXTRACT),
    b"%PDF-": ("a PDF", _EXTRACT),
    b"\x80\x04\x95": ("a pickle", _EXTRACT),
    b"\x80\x05\x95": ("a pickle", _EXTRACT),
}
_CONVERT = (
    "If it has uint16 token ids without a header, as nanoGPT's train.bin, its name must end in .bin: train on it with "
    '`homebrew train train.bin --tokenizer gpt2`, or open it with TokenDataset.from_file("train.bin", …, '
    'tokenizer="gpt2"). Write other ids with homebrew.data.token_file.write_tokens, and convert anything else to UTF-8 '
    "text"
)


def is_known_kind(start: bytes) -> bool:
    """Return whether a file's first bytes are those of one of the kinds that `describe_binary` names."""
    return start.startswith(tuple(_KINDS))


def describe_binary(start: bytes) -> str:
    """Return the kind of a binary file and the remedy, for an error message, from the file's first bytes."""
    for magic, (kind, remedy) in _KINDS.items():
        if start.startswith(magic):
            return f"it is {kind}. {remedy}."
    return f"it has NUL or many other control characters. {_CONVERT}."
