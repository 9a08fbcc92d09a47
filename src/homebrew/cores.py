"""The CPU cores of the machine."""

import os


def num_available_cores() -> int:
    """Return the number of CPU cores that this process may use. `taskset` or a batch system can restrict it."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
