"""`homebrew prepare`: tokenize texts of any size into token files.

- `prepare`: the function `prepare`, which connects the other modules.
- `documents`: reads documents from text, JSON Lines and Parquet files.
- `plan`, `state`: cut the input into parts; record which parts are done, to continue after a crash.
- `encode_part`, `workers`: encode a part; encode parts in several processes.
- `joined_parts`, `shard_writer`: join the parts, and write them to token files.
"""
