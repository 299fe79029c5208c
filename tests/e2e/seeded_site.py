"""A site's daemon whose noise can be repeated: ``python -m seeded_site start SITE``.

No setting of ``fedward-site`` does that. Only code can, as here.
"""

import os
import sys
from pathlib import Path

from client.app import SiteApp
from client.daemon import Connection, run_daemon
from client.site import Site
from shared.logs import configure_logs

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    policy = Site(folder).policy
    configure_logs()
    connection = Connection(server=policy.server, health_port=policy.health_port, keep_alive_s=policy.keep_alive_s)
    run_daemon(folder, connection, site=policy.name, app=SiteApp(int(os.environ["SITE_SEED"])))
    os._exit(0)
