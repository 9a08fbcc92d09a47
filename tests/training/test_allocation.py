import resource
import sys

import pytest
import torch

from homebrew.training.allocation import freed_memory_kept

CPU = torch.device("cpu")


def faults():
    """Pages that are new to a large tensor, after others of its size have come and gone.

    By itself glibc never keeps as much; where in the heap it lies takes some rounds to settle.
    """
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(48 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_what_is_freed_is_taken_again_without_the_system():
    with freed_memory_kept(CPU):
        assert faults() < 10


def test_elsewhere_nothing_happens(monkeypatch):
    with freed_memory_kept(torch.device("meta")):
        pass
    monkeypatch.setattr(sys, "platform", "darwin")
    with freed_memory_kept(CPU):
        pass
