"""Task ``glucose-forecast-lstm``: ``glucose-forecast`` with an LSTM in place of the GRU.

The cell is chosen by the plan's task, so that a plan's digest, a site's permission and a checkpoint's description all
say which it is.
"""

from dataclasses import replace
from functools import partial

from torch import nn

from shared.models.recurrent import GlucoseForecaster
from shared.tasks import glucose_forecast

TASK = replace(glucose_forecast.TASK, name="glucose-forecast-lstm", build=partial(GlucoseForecaster, nn.LSTM))
