"""torch.compile where it can help: a scan of many small operations becomes one kernel chain."""

import functools
import os
import shutil
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
SWITCH = "FEDWARD_COMPILE"


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile ``function`` at its first call if ``FEDWARD_COMPILE=1`` and a C++ compiler is there.

    Compiling costs seconds for every new shape, which pays for long training only; so it is asked for.
    """
    fast: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        if os.environ.get(SWITCH) != "1" or not (torch.cuda.is_available() or shutil.which("c++")):
            return function(*arguments, **named)
        if not fast:
            fast.append(torch.compile(function, dynamic=None))
        return fast[0](*arguments, **named)

    return call
