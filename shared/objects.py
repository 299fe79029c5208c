"""The objects that make up a message's content, as far as a stranger may name them: few, small and of two kinds."""

from collections.abc import Mapping
from itertools import islice

from flwr.app import ConfigRecord, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from shared.errors import ProtocolError

MAX_MESSAGE_BYTES = 256 * 2**20  # of one incoming message; 64 million float32, far above any task's model
MOST_OBJECTS = 8
_KINDS = frozenset({RecordDict.__qualname__, ConfigRecord.__qualname__})


def object_names(tree: ObjectTree) -> list[str]:
    """Return the names of a content's objects, each once. Raises ProtocolError if they are too many."""
    names = [item.object_id for item in islice(iterate_object_tree(tree), MOST_OBJECTS + 1)]
    if len(names) > MOST_OBJECTS:
        raise ProtocolError("The message has too many objects.")
    return list(dict.fromkeys(names))


def content_from(name: str, contents: Mapping[str, bytes]) -> RecordDict:
    """Return the content whose object is called ``name``, put together from objects that anybody may have made.

    Raises:
        ProtocolError: If they are of other kinds than a message's, or none at all.
    """
    try:
        kinds = {get_object_head_values_from_object_content(content)[0] for content in contents.values()}
        inflated = inflate_object_from_contents(name, dict(contents)) if kinds <= _KINDS else None
    except Exception as error:  # a stranger's bytes may break Flower's parser anywhere
        raise ProtocolError("The message cannot be read.") from error
    if not isinstance(inflated, RecordDict):
        raise ProtocolError("The message holds other things than a message may.")
    return inflated
