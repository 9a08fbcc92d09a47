"""Metrics of a step, an evaluation and a device."""
