"""The hospital's Flower ``ClientApp``: every message is answered by the site and passes the guard.

The node's own configuration, which the hospital sets, names the site's folder and the server; nothing the server
sends does.
"""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client import guard
from client.site import Site

SITE_FOLDER, SIMULATION_SEED, SERVER_FINGERPRINT = "site-folder", "simulation-seed", "server-fingerprint"


class SiteApp(ClientApp):
    """Answers messages of every type, the unknown ones with a code.

    Flower's own dispatch raises on a type that has no function, and its runtime would send that exception's text.
    """

    def __call__(self, message: Message, context: Context) -> Message:
        """Return what may leave the hospital in answer to ``message``."""
        return guard.release(message, lambda: _site(context).answer(message.metadata.message_type, message.content))


app = SiteApp()


def _site(context: Context) -> Site:
    config = context.node_config
    seed = config.get(SIMULATION_SEED)
    server = str(config.get(SERVER_FINGERPRINT, ""))
    return Site(Path(str(config[SITE_FOLDER])), None if seed is None else int(seed), server)
