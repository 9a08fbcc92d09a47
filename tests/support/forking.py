"""Processes forked from one that has imported everything, so that each starts at once; not a test.

Each line of the input is an order: a job, how many processes make its world, their environment and where they write.
The answer tells how each ended.
"""

import contextlib
import json
import os
import signal
import sys
import traceback

import torch._dynamo  # noqa: F401 - which the first optimizer of a process imports
from worlds import free_port

import homebrew.checkpoint.manager  # noqa: F401 - and this the first Trainer


def serve(work):
    """Have every order's processes call `work(job)`."""
    for line in sys.stdin:
        order = json.loads(line)
        port = free_port()
        left, codes = [start(work, order, port, rank) for rank in range(order["processes"])], []
        while left:
            pid, status = os.wait()
            left.remove(pid)
            codes.append(os.waitstatus_to_exitcode(status))
            if codes[-1] == -signal.SIGKILL:  # as a launcher does
                for other in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(other, signal.SIGKILL)
        print(json.dumps(codes), flush=True)


def start(work, order, port, rank):
    """Fork one process of a world."""
    pid = os.fork()
    if pid == 0:
        be_one(work, order, port, rank)
    return pid


def be_one(work, order, port, rank):
    """Be one process of a world, as a launcher would have started it."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.environ |= order["environment"]
    if order["processes"] > 1:
        sizes = {"WORLD_SIZE": order["processes"], "LOCAL_WORLD_SIZE": order["processes"]}
        place = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in (sizes | place).items()}
    code = 1
    try:
        work(order["job"])
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
