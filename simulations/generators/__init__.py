"""Simulated hospitals' raw exports, for demonstrations, tests and studies."""
