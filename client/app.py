"""The hospital's Flower ``ClientApp``: every message is answered by the site and passes the guard.

The node's own configuration, which the hospital sets, names the site's folder; nothing the server sends does.
"""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client import guard
from client.site import Site
from shared.messages import PlanQuery, TrainRequest

SITE_FOLDER = "site-folder"

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer whether this site takes part in a plan."""
    return guard.release(message, lambda: _site(context).answer_query(PlanQuery.from_content(message.content)))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round."""
    return guard.release(message, lambda: _site(context).answer_train(TrainRequest.from_content(message.content)))


def _site(context: Context) -> Site:
    return Site(Path(str(context.node_config[SITE_FOLDER])))
