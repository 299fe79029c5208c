"""A recurrent forecaster: the last N readings in, a path out."""

from torch import Tensor, nn


class Forecaster(nn.Module):
    """One recurrent layer and a linear read-out of its last output.

    Args:
        cell: ``nn.LSTM`` or ``nn.GRU``.
        features: Values per reading.
        hidden: Size of the state.
        horizon: Steps ahead.
    """

    def __init__(
        self, cell: type[nn.RNNBase] = nn.LSTM, features: int = 3, hidden: int = 64, horizon: int = 12
    ) -> None:
        super().__init__()
        self.memory = cell(features, hidden, batch_first=True)  # type: ignore[arg-type, call-arg]
        self.readout = nn.Linear(hidden, horizon)

    def forward(self, readings: Tensor) -> Tensor:
        """Return paths ``(N, horizon)`` of readings ``(N, T, features)``."""
        outputs = self.memory(readings)[0]
        path: Tensor = self.readout(outputs[:, -1])
        return path
