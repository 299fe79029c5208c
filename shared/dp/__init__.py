"""Private gradients: each patient's gradient is bounded before it is summed and noised."""
