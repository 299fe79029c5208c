"""How a ServerApp's messages get to Flower's SuperLink and replies from it, where Flower 1.39's own way does not do."""

import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, pull_objects
from flwr.superlink.grid import http_grid

_LOG = logging.getLogger(__name__)
_UPLOAD_S = 120.0


def adapt_grid() -> None:
    """Have this process's grid push and pull as a round needs it; Flower's takes no settings for either.

    A reply is announced before its weights are there. Flower then sleeps for a second and more, and every other
    reply waits behind this one: most rounds of a light task took a second longer for it. Here the weights are asked
    for again within milliseconds. A site that announces a reply and never sends it holds the others up for
    ``_UPLOAD_S`` at most; then it is asked again.

    How messages are pushed: see :func:`push_messages_first`.
    """
    # The grid calls both by these names.
    http_grid.pull_objects = partial(  # type: ignore[attr-defined]
        pull_objects, initial_backoff=0.01, backoff_cap=0.1, max_tries_per_object=None, max_time=_UPLOAD_S
    )
    http_grid.push_objects = push_messages_first  # type: ignore[attr-defined, assignment]


def push_messages_first(
    objects: Mapping[str, InflatableObject],
    push_object_fn: Callable[[str, bytes], None],
    *,
    object_ids_to_push: Collection[str],
) -> None:
    """Push what the SuperLink lacks of some messages: the messages themselves, then what they hold.

    The other order, which is Flower's, breaks off the ServerApp. All sites get one content. Once that is there a
    site confirms its message, for which the SuperLink deletes it; and pushing what was deleted is an error. A site
    that confirms what it never fetched still has it deleted, so that error must not end a round either: that site
    has lost its own question, and will be asked again or found silent.
    """
    for name, item in sorted(objects.items(), key=lambda pair: not isinstance(pair[1], Message)):
        if name in object_ids_to_push:
            try:
                push_object_fn(name, item.deflate())
            except ObjectPushError:
                _LOG.warning("part of a message was not taken", extra={"kind": type(item).__name__})
