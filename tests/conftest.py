"""Fixtures and process state shared by all tests."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from worlds import ON_CPUS

from homebrew.checkpoint.store import CheckpointStore
from homebrew.training.cuda_graph import CudaGraph

# A shell's background jobs, and so their children, are started deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate's singletons, its environment and PyTorch's precision as in a new process, and one thread."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.set_float32_matmul_precision("highest")  # which a Trainer lowers where there is a GPU
    torch.set_num_threads(1)  # the models are tiny


@pytest.fixture(scope="session")
def bounded_memory():
    """A context in which the process can take 256 MiB more than it has: beyond, allocations fail."""

    @contextlib.contextmanager
    def bounded():
        usual = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, usual[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, usual)

    return bounded


STATE = {"identity": {"seed": 42}, "tokenizer": None}


def run_files(step):
    """The files of a whole run's checkpoint, their numbers telling the step."""
    return {
        "model": {"w": torch.full((3, 4), float(step)), "b": torch.full((5,), step, dtype=torch.bfloat16)},
        "optimizer": {"w//exp_avg": torch.full((3, 4), step / 2), "w//step": torch.tensor(float(step))},
        "rng-0": {"python": torch.tensor([3, step]), "python_gauss": torch.tensor([float("nan")])},
    }


def adapter_files(step):
    """The files of an adapter's."""
    return {"adapter": {"w": torch.full((3,), float(step))}, "optimizer": {"w//step": torch.tensor(float(step))}}


def piece_files(step):
    """The files of a checkpoint that two processes write, the second one's last."""
    rows = torch.full((3, 4), float(step)).split(2)
    first, second = ({"w": part, "w[rows]": torch.tensor([at, 3])} for at, part in zip((0, 2), rows, strict=True))
    return {
        "model-00001-of-00002": first,
        "optimizer": {"w//step": torch.tensor(float(step))},
        "model-00002-of-00002": second,
    }


@pytest.fixture
def tiny():
    """What checkpoints hold: by kind the files of a step, and a state."""
    return {"full": run_files, "adapter": adapter_files, "pieces": piece_files, "state": STATE}


@pytest.fixture
def store(tmp_path):
    """An empty store."""
    store = CheckpointStore(tmp_path)
    store.prepare()
    return store


class Forks:
    """Starts worlds of processes, by forking one that has imported everything."""

    def __init__(self, worker, log):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ON_CPUS,
            start_new_session=True,
        )

    def run(self, job, processes=1, **environment):
        """Have a world do a job; how its processes ended."""
        self.log.unlink(missing_ok=True)
        order = {"job": job, "processes": processes, "environment": environment, "log": str(self.log)}
        try:
            print(json.dumps(order), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except BaseException:  # a test's time is over: nobody may take this answer for the next one's
            os.killpg(self.process.pid, signal.SIGKILL)
            raise


@pytest.fixture(scope="module")
def forks(request, tmp_path_factory):
    """For jobs of the module's WORKER."""
    forks = Forks(request.module.WORKER, tmp_path_factory.mktemp("forks") / "log")
    with forks.process:
        yield forks
    assert forks.process.returncode == 0


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request):
    """Every kind of device that is there."""
    return request.param


@pytest.fixture
def captured(monkeypatch):
    """The graphs captured so far; on a CPU a replay calls what was captured, with its results in one place."""
    captured, on_gpu = [], CudaGraph._capture

    def capture(graph):
        captured.append(graph)
        if graph._inputs[0].is_cuda:
            return on_gpu(graph)
        results = []

        def replay():
            results.append(graph._function(*graph._inputs))
            graph._result = results[0]
            results[0].copy_(results[-1])

        return replay

    monkeypatch.setattr(CudaGraph, "_capture", capture)
    return captured
