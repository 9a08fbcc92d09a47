"""Checkpoints: what a run saves, how a save is committed to disk, and how a run resumes."""
