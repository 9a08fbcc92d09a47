"""Read what an offline run of Weights & Biases has recorded; not a test.

The file has a header of 7 bytes, then records in blocks of 32 KiB, as in LevelDB's log.
"""

import json
import struct
from pathlib import Path

_BLOCK = 32 * 1024


def read_offline_runs(folder):
    """Yield the name, id, settings and logged rows of each offline run in a folder, the oldest first."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # wait for its process, which writes the files
    for path in sorted(Path(folder).glob("wandb/offline-run-*/*.wandb")):
        run, settings, rows = None, {}, []
        for data in _records(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                run = run or record.run
            for item in record.config.update:
                settings[item.key] = json.loads(item.value_json)
            if record.HasField("history"):
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
        yield {"project": run.project, "name": run.display_name, "id": run.run_id, "settings": settings, "rows": rows}


def _records(data):
    position, record = 7, b""
    while position + 7 <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < 7:  # the rest of a block without space for a header
            position += left
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield record
            record = b""
