"""The step and everything around it."""
