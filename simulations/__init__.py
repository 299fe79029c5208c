"""A whole federation on one machine: generated hospitals, in-process or Ray nodes, baselines."""
