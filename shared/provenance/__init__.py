"""Where a model comes from, and reading files that somebody else wrote."""
