"""How the programs of this package end: bad input is one sentence on standard error, never a traceback."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from shared.errors import FederationError

FAILED, INTERRUPTED = 1, 130


def run_script(main: Callable[[], object], name: str | None = None) -> None:
    """Run a program; what it cannot do is said in a sentence and exits 1, Ctrl-C exits 130.

    SIGTERM ends it as Ctrl-C does, so that what it started is ended too.

    Args:
        main: The program.
        name: What it is called; by default as the file that is run.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except FederationError as error:
        code, sentence = FAILED, str(error)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        reason = error.strerror or type(error).__name__
        code, sentence = FAILED, f"{reason}{where}. Check the path, its permissions and the disk."
    except KeyboardInterrupt:
        code, sentence = INTERRUPTED, "stopped."
    else:
        return
    finally:
        signal.signal(signal.SIGTERM, before)
    called = name or Path(sys.argv[0]).stem
    Console(stderr=True).print(f"{called}: {sentence}", style="red", highlight=False, soft_wrap=True, markup=False)
    sys.exit(code)
