"""Training events: the callback base class and the built-in callbacks."""
