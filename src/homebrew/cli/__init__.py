"""Command line: one module for each command, and `main`."""
