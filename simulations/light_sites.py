"""Sites that train nothing: each answers with the weights it got, over a connection and with a key of its own.

``python -m simulations.light_sites SERVER FOLDER…`` runs one thread for each folder, until it is killed; a folder
holds a ``site.key`` and a ``ca.crt``. The number of sites, not their work, is what the aggregator is tried with.
"""

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread

from flwr.app import Message

from client.channel import Backoff, Endpoint
from client.daemon import poll_pause_s
from client.keys import read_authority, read_key
from client.link import Link, LinkRefused, UnacceptableMessage
from client.status import Status
from shared.messages import PlanQuery, SiteOffer, TrainReply, TrainRequest

DECLARED_PATIENTS = 200


def answer(name: str, message: Message) -> Message:
    """Accept every plan; return the weights of a training request unchanged."""
    if message.metadata.message_type == "query":
        plan = PlanQuery.from_content(message.content).plan
        return Message(SiteOffer(name, DECLARED_PATIENTS, plan.digest).to_content(), reply_to=message)
    request = TrainRequest.from_content(message.content)
    reply = TrainReply(request.round, request.plan.digest, request.weights)
    return Message(reply.to_content(), reply_to=message)


def serve_site(server: str, folder: Path) -> None:
    """Answer messages until the process ends, through refusals while the key is not yet registered."""
    endpoint, stop = Endpoint(server, read_authority(folder), read_key(folder)), Event()
    while True:
        try:
            with Link(endpoint, stop, Status(folder.name), Backoff(0.2, 5.0)) as link:
                _serve(link, folder.name, stop)
        except (LinkRefused, UnacceptableMessage):
            stop.wait(1.0)


def _serve(link: Link, name: str, stop: Event) -> None:
    last = time.monotonic()
    while True:
        asked = time.monotonic()
        message = link.receive()
        if message is None:
            now = time.monotonic()
            stop.wait(poll_pause_s(now - last, now - asked))
            continue
        link.reply(answer(name, message))
        last = time.monotonic()


def main(server: str, folders: Sequence[Path]) -> None:
    """Serve each folder on a thread of its own, for ever."""
    logging.disable(logging.CRITICAL)
    threads = [Thread(target=serve_site, args=(server, folder)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(sys.argv[1], [Path(argument) for argument in sys.argv[2:]])
