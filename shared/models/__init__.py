"""The networks. GroupNorm at most, never BatchNorm: it would mix patients before the gradient is clipped."""
