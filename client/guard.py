"""The last thing a reply passes before it leaves the hospital.

Only messages of the allow-listed kinds leave, rebuilt field by field from the protocol's own types, and any
failure leaves as one word of a closed list. Flower would send ``str(exception)``, which can hold a patient's
name or a path.
"""

import logging
from collections.abc import Callable

from flwr.app import Message

from shared.errors import ErrorCode, FederationError
from shared.messages import SiteOffer, TrainReply, error_reply

_LOG = logging.getLogger(__name__)


def release(request: Message, answer: Callable[[], SiteOffer | TrainReply]) -> Message:
    """Run ``answer`` and return what may leave: an allow-listed reply, or a bare error code.

    This is the one place that catches broadly. The local log names the exception's type, never its text.
    """
    try:
        reply = answer()
        if type(reply) not in (SiteOffer, TrainReply):
            return error_reply(ErrorCode.INTERNAL, request)
        return Message(reply.to_content(), reply_to=request)
    except FederationError as error:
        _LOG.warning("refused", extra={"code": error.code.value})
        return error_reply(error.code, request)
    except Exception as error:
        _LOG.error("failed", extra={"code": ErrorCode.INTERNAL.value, "kind": type(error).__name__})
        return error_reply(ErrorCode.INTERNAL, request)
