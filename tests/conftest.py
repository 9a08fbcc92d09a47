"""Fixtures and process state shared by all tests."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import ON_CPUS

from homebrew import GPT
from homebrew.checkpoint.store import CheckpointStore
from homebrew.training.cuda_graph import CudaGraph

# A shell starts background jobs with SIGINT ignored, and nohup with SIGHUP ignored. Child processes inherit both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples in each run, without a deadline: tests do not depend on timing.
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Reset Accelerate's singletons and environment, PyTorch's float32 precision and its number of threads."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)
    reset_accelerate()
    if torch.cuda.is_available():
        torch.compiler.reset()  # all models of a process share Dynamo's limit of compiled variants
    torch.set_float32_matmul_precision("highest")  # a Trainer lowers it on a GPU
    torch.set_num_threads(1)  # the models are tiny
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)  # Accelerate would prefer it to the CPU
    yield
    reset_accelerate()  # for the fixtures of a module, which are built before the next test's


def reset_accelerate():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def bounded_memory():
    """Return a context manager in which the process can allocate at most another 256 MiB."""
    if sys.platform != "linux":
        pytest.skip("only Linux limits the memory of a process")

    @contextlib.contextmanager
    def bounded():
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    return bounded


STATE = {"identity": {"seed": 42}, "tokenizer": None}


def full_files(step):
    """Return the tensor files of a full checkpoint, with values that depend on the step."""
    return {
        "model": {"w": torch.full((3, 4), float(step)), "b": torch.full((5,), step, dtype=torch.bfloat16)},
        "optimizer": {"w//exp_avg": torch.full((3, 4), step / 2), "w//step": torch.tensor(float(step))},
        "rng-0": {"python": torch.tensor([3, step]), "python_gauss": torch.tensor([float("nan")])},
    }


def adapter_files(step):
    """Return the tensor files of an adapter's checkpoint."""
    return {"adapter": {"w": torch.full((3,), float(step))}, "optimizer": {"w//step": torch.tensor(float(step))}}


@pytest.fixture
def tiny():
    """Return tiny checkpoints: functions from a step to tensor files, by kind, and a state."""
    return {"full": full_files, "adapter": adapter_files, "state": STATE}


@pytest.fixture
def store(tmp_path):
    """Return an empty store."""
    store = CheckpointStore(tmp_path)
    store.prepare()
    return store


class ForkServer:
    """Runs jobs in processes forked from one that has imported everything.

    Args:
        worker: Script that calls `forking.serve`.
        log: File for the output of the processes of the last job.
    """

    def __init__(self, worker, log):
        self.worker, self.log = worker, log
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, str(self.worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ON_CPUS,
            start_new_session=True,
        )

    def run(self, job, processes=1, **environment):
        """Run a job and return the exit codes of its processes."""
        self.log.unlink(missing_ok=True)
        request = {"job": job, "processes": processes, "environment": environment, "log": str(self.log)}
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except BaseException:  # a timeout: the next test must not read this job's reply
            self.kill()
            self.start()
            raise

    def close(self):
        """Let the server exit, and return its exit code."""
        self.process.stdin.close()
        code = self.process.wait()
        self.kill()
        return code

    def kill(self):
        """Kill the server and all processes it has forked."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def forks(request, tmp_path_factory):
    """Return a server for jobs of the module's WORKER script."""
    if sys.platform != "linux":
        pytest.skip("elsewhere a process with PyTorch cannot be forked safely")
    server = ForkServer(request.module.WORKER, tmp_path_factory.mktemp("forks") / "log")
    yield server
    assert server.close() == 0


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request):
    """Run the test on every available kind of device."""
    return request.param


@pytest.fixture
def deterministic(monkeypatch):
    """Use deterministic kernels on a GPU, whose fastest ones sum in an order that varies between runs."""
    if not torch.cuda.is_available():
        yield
        return
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Recording(TorchDispatchMode):
    """Records operations, to run them again on the same tensors: a CUDA graph of the CPU."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("nothing in a CUDA graph may wait for the device")
        result = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, result))
        return result

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():
            for operation, args, kwargs, result in self.calls:
                for recorded, new in zip(tree_leaves(result), tree_leaves(operation(*args, **kwargs)), strict=True):
                    if isinstance(new, torch.Tensor) and new.data_ptr() != recorded.data_ptr():
                        recorded.copy_(new)


@pytest.fixture
def captured(monkeypatch):
    """Return the CUDA graphs captured so far. On a CPU, the first replay runs the function, and is recorded."""
    captured, on_gpu = [], CudaGraph._capture

    def capture(graph):
        captured.append(graph)
        if graph._inputs[0].is_cuda:
            return on_gpu(graph)
        recording = Recording()

        def replay():
            if recording.calls:
                recording.replay()
                return
            with recording:
                graph._result = graph._function(*graph._inputs)

        return replay

    monkeypatch.setattr(CudaGraph, "_capture", capture)
    monkeypatch.setattr(GPT, "_check_range", lambda *_: None)  # would wait; not called on a GPU
    return captured
