"""Contents of token files of other programs."""

import io

import numpy as np


def npy(array):
    """Return the content of a `.npy` file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def llmc_shard(ids, magic=20240520, version=1, num_tokens=None):
    """Return the content of a token file of llm.c, as its `write_datafile` writes it."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if num_tokens is None else num_tokens
    return header.tobytes() + np.asarray(ids).astype("<u4" if magic == 20240801 else "<u2").tobytes()
