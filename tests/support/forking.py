"""A server that forks processes from one that has imported everything, so that they start at once.

Each line on standard input is a JSON request: a job, its number of processes, their environment and their log file.
The reply is a JSON list of their exit codes.
"""

import contextlib
import json
import os
import signal
import sys
from functools import partial

import torch._dynamo  # noqa: F401 - imported by the first optimizer of a process
from child_processes import fork
from worlds import free_port


def serve(work):
    """Run `work(job)` in the processes of each request, until standard input is closed."""
    for line in sys.stdin:
        request = json.loads(line)
        port = free_port()
        ranks = range(request["processes"])
        running, codes = {fork(partial(run_rank, work, request, port, rank)) for rank in ranks}, []
        while running:
            pid, status = os.wait()
            running.remove(pid)
            codes.append(os.waitstatus_to_exitcode(status))
            if codes[-1] == -signal.SIGKILL:  # a launcher then kills the other ranks
                for other in running:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(other, signal.SIGKILL)
        print(json.dumps(codes), flush=True)


def run_rank(work, request, port, rank):
    """Run the job in this process with the environment that a launcher would set."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.environ |= request["environment"]
    if request["processes"] > 1:
        world = {"WORLD_SIZE": request["processes"], "LOCAL_WORLD_SIZE": request["processes"]}
        world |= {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in world.items()}
    try:
        work(request["job"])
    finally:
        sys.stdout.flush()
