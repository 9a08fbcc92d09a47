"""Marks of tests that need more than macOS and Linux have in common."""

import sys

import pytest

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc or /dev/full")
