"""The hospital's Flower ``ClientApp``: every message is answered by the site and passes the guard.

The node's own configuration, which the hospital sets, names the site's folder; nothing the server sends does.
"""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client import guard
from client.site import Site
from shared.errors import ErrorCode
from shared.messages import PlanQuery, TrainRequest, error_reply

SITE_FOLDER, SIMULATION_SEED = "site-folder", "simulation-seed"

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer whether this site takes part in a plan."""
    return guard.release(message, lambda: _site(context).answer_query(PlanQuery.from_content(message.content)))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round."""
    return guard.release(message, lambda: _site(context).answer_train(TrainRequest.from_content(message.content)))


@app.evaluate()
def evaluate(message: Message, _context: Context) -> Message:
    """Refuse: a site's own metrics are releases too, so evaluation stays in the hospital."""
    return error_reply(ErrorCode.BAD_MESSAGE, message)


def _site(context: Context) -> Site:
    seed = context.node_config.get(SIMULATION_SEED)
    return Site(Path(str(context.node_config[SITE_FOLDER])), None if seed is None else int(seed))
