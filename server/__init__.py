"""The aggregator: rounds, strategies, held-out evaluation, checkpoints, registry, report."""
