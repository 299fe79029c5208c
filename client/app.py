"""The hospital's Flower ``ClientApp``: every message is answered by the site and passes the guard.

The node's own configuration, which the hospital sets, names the site's folder and the server; nothing the server
sends does. Neither of them can make the noise repeatable: a seed is an argument of :class:`SiteApp`, which only code
can give, and :data:`app`, which a hospital runs, has none.
"""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client import guard
from client.patients import Patients
from client.site import Site

SITE_FOLDER, SERVER_FINGERPRINT = "site-folder", "server-fingerprint"


class SiteApp(ClientApp):
    """Answers messages of every type, the unknown ones with a code.

    Flower's own dispatch raises on a type that has no function, and its runtime would send that exception's text.

    Args:
        simulation_seed: Makes the noise repeatable, so that it protects nobody: for simulations and tests.
    """

    def __init__(self, simulation_seed: int | None = None) -> None:
        super().__init__()
        self._simulation_seed, self._patients = simulation_seed, Patients()

    def prepare(self, folder: Path) -> None:
        """Open the patients in a site's folder before the first message. Raises StorageError or PolicyError."""
        Site(folder, self._simulation_seed, patients=self._patients).open_patients()

    def __call__(self, message: Message, context: Context) -> Message:
        """Return what may leave the hospital in answer to ``message``."""
        return guard.release(
            message, lambda: self._site(context).answer(message.metadata.message_type, message.content)
        )

    def _site(self, context: Context) -> Site:
        config = context.node_config
        server = str(config.get(SERVER_FINGERPRINT, ""))
        return Site(Path(str(config[SITE_FOLDER])), self._simulation_seed, server, self._patients)


app = SiteApp()
