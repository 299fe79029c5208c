"""Attacks on the private step, as a hostile server would try them."""
