"""``fedward-server`` with Flower's own SuperLink, to compare with: ours turns away stock SuperNodes.

``python -m simulations.stock_server start SRV``
"""

import sys
from pathlib import Path

from server import cli, control

if __name__ == "__main__":
    control.superlink_program = (str(Path(sys.executable).with_name("flower-superlink")),)
    cli.main()
