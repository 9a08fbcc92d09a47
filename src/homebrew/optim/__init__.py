"""Optimizers: Muon, and several optimizers as one."""
