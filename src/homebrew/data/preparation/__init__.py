"""`homebrew prepare`: tokenize texts of any size into token files.

- `prepare`: the function, which connects the others.
- `documents`: reads documents from text, JSON Lines and Parquet files.
- `plan`, `state`: cut the input into parts; know which of them are done after a crash.
- `encode_part`, `workers`: encode parts, by several processes.
- `joined_parts`, `shard_writer`: join the parts, and write them to token files.
"""
