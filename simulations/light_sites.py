"""Sites that train nothing: each answers with the weights it got, over a connection and with a key of its own.

``python -m simulations.light_sites SERVER FOLDER…`` runs one thread for each folder, until it is killed; a folder
holds a ``site.key`` and a ``ca.crt``. The number of sites, not their work, is what the aggregator is tried with.
"""

import argparse
import logging
import time
from pathlib import Path
from threading import Event, Thread

from flwr.app import Message

from client.channel import Backoff, Endpoint
from client.daemon import poll_pause_s
from client.keys import read_authority, read_key
from client.link import Link, LinkRefused, UnacceptableMessage
from client.status import Status
from shared.messages import PlanQuery, SiteOffer, TrainReply, TrainRequest
from simulations.scripts import run_script

DECLARED_PATIENTS = 200


def answer(name: str, message: Message) -> Message:
    """Accept every plan; return the weights of a training request unchanged."""
    if message.metadata.message_type == "query":
        plan = PlanQuery.from_content(message.content).plan
        return Message(SiteOffer(name, DECLARED_PATIENTS, plan.digest).to_content(), reply_to=message)
    request = TrainRequest.from_content(message.content)
    reply = TrainReply(request.round, request.plan.digest, request.weights)
    return Message(reply.to_content(), reply_to=message)


def serve_site(endpoint: Endpoint, name: str) -> None:
    """Answer messages until the process ends, through refusals while the key is not yet registered."""
    stop = Event()
    while True:
        try:
            with Link(endpoint, stop, Status(name), Backoff(0.2, 5.0)) as link:
                _serve(link, name, stop)
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


def main() -> None:
    """Serve each folder on a thread of its own, for ever."""
    parser = argparse.ArgumentParser(description="Speak for many sites that train nothing.")
    parser.add_argument("server", help="HOST:PORT of the aggregator")
    parser.add_argument("folders", type=Path, nargs="+", help="each with a site.key and a ca.crt")
    chosen = parser.parse_args()
    sites = [(Endpoint(chosen.server, read_authority(path), read_key(path)), path.name) for path in chosen.folders]
    threads = [Thread(target=serve_site, args=site, daemon=True) for site in sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    run_script(main)
