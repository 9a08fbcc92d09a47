import resource
import sys

import pytest
import torch

from homebrew.training.allocation import freed_memory_kept

CPU = torch.device("cpu")


def new_pages():
    """Pages that the system had to give for a large tensor; by itself glibc never keeps as much."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(48 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_what_is_freed_is_taken_again_without_the_system():
    # An aligned tensor leaves slivers beside it, which glibc keeps apart until it has some of each size: till then the
    # place of the last one is too small for the next.
    with freed_memory_kept(CPU):
        assert any(new_pages() < 10 for _ in range(100))


def test_elsewhere_nothing_happens(monkeypatch):
    with freed_memory_kept(torch.device("meta")):
        pass
    monkeypatch.setattr(sys, "platform", "darwin")
    with freed_memory_kept(CPU):
        pass
