"""Recurrent forecasters: the last N readings in, a path out."""

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GLUCOSE_CENTRE: Final = 120.0
GLUCOSE_SCALE: Final = 20.0
"""mg/dL. These constants are public: about the middle and the hourly change of people's glucose."""
SLOPE_SCALE: Final = 5.0
INSULIN_SCALE: Final = 2.0
CARBOHYDRATE_SCALE: Final = 30.0


class Forecaster(nn.Module):
    """One recurrent layer and a linear read-out of its last output: what the benchmark times.

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


class GlucoseForecaster(nn.Module):
    """Forecasts the next hour of glucose from the last readings, as the change from the last one.

    A recurrent layer reads how the glucose and its sensor behave; beside it a linear map of the last differences
    carries the line that an autoregression would draw, so that the network has to learn the rest only. Insulin acts
    through a linear map of its own, the same for everybody: it is given with meals and for high values, and a network
    that may combine them learns what it was given for instead of what it does. Inputs and outputs are in physical
    units and scaled by public constants: nothing is normalised by anybody's data.

    Args:
        cell: ``nn.GRU`` or ``nn.LSTM``.
        hidden: Size of the state. Small, for noise grows with the number of parameters.
        skip: How many of the last differences the linear map sees.
        horizon: Steps ahead.
        clock: Whether it looks at the time of day.
        doses: Over how many of the last readings insulin is looked at.
    """

    def __init__(
        self,
        cell: type[nn.RNNBase] = nn.GRU,
        hidden: int = 16,
        skip: int = 12,
        horizon: int = 12,
        clock: bool = False,
        doses: int = 36,
    ) -> None:
        super().__init__()
        self.skip, self.clock, self.doses = skip, clock, doses
        self.memory = cell(4 + 2 * clock, hidden, batch_first=True)  # type: ignore[arg-type, call-arg]
        self.line = nn.Linear(skip, horizon, bias=False)
        self.insulin = nn.Linear(doses, horizon, bias=False)
        self.readout = nn.Linear(hidden, 3 * horizon)
        with torch.no_grad():
            # Fresh weights forecast the last reading; covariates, which many exports lack, begin without a say.
            self.memory.get_parameter("weight_ih_l0")[:, 3:] = 0.0
            for parameter in (self.line.weight, self.insulin.weight, self.readout.weight, self.readout.bias):
                parameter.zero_()

    def forward(self, readings: Tensor) -> Tensor:
        """Return quantiles ``(N, horizon, 3)`` in mg/dL, ordered by construction: 0.05, 0.5, 0.95.

        Args:
            readings: ``(N, T, 4)`` with ``T > skip`` and ``T >= doses``, one every 5 minutes: glucose in mg/dL,
                insulin in units and carbohydrate in grams since the reading before, minute of the day.
        """
        glucose, insulin, carbohydrate = readings[..., 0], readings[..., 1], readings[..., 2]
        last = glucose[:, -1:]
        change = (glucose - last) / GLUCOSE_SCALE
        slope = F.pad(glucose[:, 1:] - glucose[:, :-1], (1, 0)) / SLOPE_SCALE
        features = [change / 2, (glucose - GLUCOSE_CENTRE) / (3 * GLUCOSE_SCALE), slope]
        features += [carbohydrate / CARBOHYDRATE_SCALE]
        if self.clock:
            angle = readings[..., 3] * (2 * math.pi / 1440)
            features += [angle.sin(), angle.cos()]
        state = self.memory(torch.stack(features, dim=-1))[0][:, -1]
        middle, below, above = self.readout(state).chunk(3, dim=-1)
        middle = self.line(change[:, -self.skip - 1 : -1]) + middle
        middle = self.insulin(insulin[:, -self.doses :] / INSULIN_SCALE) + middle
        quantiles = torch.stack([middle - F.softplus(below), middle, middle + F.softplus(above)], dim=-1)
        return last[..., None] + GLUCOSE_SCALE * quantiles
