"""Early warning at the bedside: a stream of glucose readings in, alerts out. Nothing of it leaves the hospital."""
