"""Shard files as torch.distributed.checkpoint writes them, without a process group."""

import json

from safetensors.torch import save_file


def sharding_info(offsets):
    """Return the metadata of a file of shards, from the offsets of each tensor's shard."""
    return {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": offset} for name, offset in offsets.items()})}


def write_shard(path, shards):
    """Write one rank's file: a dictionary of (offsets, tensor) by name."""
    tensors = {name: tensor for name, (_, tensor) in shards.items()}
    save_file(tensors, path, metadata=sharding_info({name: offsets for name, (offsets, _) in shards.items()}))
