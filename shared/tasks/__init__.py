"""What can be trained: one module per task, found by :mod:`shared.tasks.registry`."""
