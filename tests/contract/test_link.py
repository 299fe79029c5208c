"""The daemon against a real SuperLink over TLS: what Flower's private modules are relied upon to do."""

import datetime
import hashlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.cli.supernode.register import try_load_public_key
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager

from client.channel import Backoff, Endpoint, LinkFault
from client.keys import make_key, read_authority, read_key
from client.link import _HEADERS, Link, LinkRefused, Stopped, UnacceptableMessage
from shared.errors import ErrorCode
from shared.messages import error_reply

# Raised while Flower brings its own database up to date.
pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")
ROOT = Path(__file__).resolve().parents[2]

APP = '''
import sys, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict

import client.link
from client.channel import Backoff
from client.daemon import Connection, run_daemon
from shared.logs import configure_logs


def app(message, context):
    """Echo arrays; sleep, raise or tell about the context when asked to."""
    config = message.content["config"]
    folder = Path(str(context.node_config["site-folder"]))
    if config["do"] == "sleep":
        (folder / "training").touch()
        time.sleep(600)
    if config["do"] == "raise":
        raise RuntimeError("Doe^Jane")
    if config["do"] == "exit":
        sys.exit(3)
    facts = {"round": 7, "run-config": len(context.run_config), "state": len(context.state)}
    facts |= {f"node-{key}": str(value) for key, value in context.node_config.items()}
    facts |= {"weights": config["weights"]} if "weights" in config else {}
    return Message(RecordDict({"config": ConfigRecord(facts)}), reply_to=message)


if __name__ == "__main__":
    folder, server, health_port, limit = Path(sys.argv[1]), *sys.argv[2:5]
    client.link.MAX_MESSAGE_BYTES = int(limit)
    configure_logs()
    connection = Connection(server=server, health_port=int(health_port))
    run_daemon(folder, connection, site="st-elsewhere", app=app, backoff=Backoff(0.1, 0.5))
'''
LIMIT = 12 * 2**20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(check: Callable[[], object], what: str, seconds: float = 60.0):
    """Return the first truthy answer of ``check``; the deadline only bounds a failing test."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := check():
            return answer
        time.sleep(0.02)
    pytest.fail(f"never happened: {what}")


def make_certificates(folder: Path) -> None:
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in ("ca", "server")}
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    for name, key in keys.items():
        subject = authority if name == "ca" else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
            .add_extension(names, critical=False)
            .sign(keys["ca"], hashes.SHA256())
        )
        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        (folder / f"{name}.crt").write_bytes(certificate.public_bytes(pem))
        (folder / f"{name}.key").write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))


class Aggregator:
    """A real SuperLink in a process of its own; messages enter and leave by its own database."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.runtime_port = folder, free_port(), free_port()
        make_certificates(folder)
        self.start()

    def open(self) -> None:
        """Open the SuperLink's own database and a run in it that is under way."""
        database = str(self.folder / "state.db")
        objects = ObjectStoreFactory(database)
        self.state = LinkStateFactory(database, NoOpFederationManager(), objects).state()
        self.run = self.state.create_run(
            "a/b", "1.0", "0" * 64, {"learning-rate": 1.0}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP
        )
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self.run, SUPERLINK_NODE_ID, 1
        (task,) = self.state.get_tasks(run_ids=[self.run])
        assert self.state.claim_task(task.task_id)
        assert self.state.activate_task(task.task_id)
        self.ended = threading.Event()
        threading.Thread(target=self._keep_run_alive, args=(task.task_id,), daemon=True).start()

    def _keep_run_alive(self, task: int) -> None:
        """Do what a ServerApp's heartbeat does."""
        while not self.ended.wait(2.0):
            self.state.acknowledge_task_heartbeat(task)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "server.superlink", "--isolation", "process"]
        command += ["--enable-supernode-auth", "--database", self.folder / "state.db"]
        command += ["--disable-runtime-dependency-installation", "--port", self.runtime_port]
        for option, name in (("ca-certfile", "ca.crt"), ("certfile", "server.crt"), ("keyfile", "server.key")):
            command += [f"--ssl-{option}", self.folder / name]
        command += ["--fleet-api-address", self.address]
        environment = os.environ | {"FLWR_HOME": str(self.folder), "FLWR_TELEMETRY_ENABLED": "0"}
        environment |= {"FLWR_DISABLE_UPDATE_CHECK": "1"}
        with (self.folder / "superlink.log").open("ab") as log:
            self.process = subprocess.Popen([str(part) for part in command], env=environment, stdout=log, stderr=log)
        eventually(self._listens, "the SuperLink listens")

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def enrol(self, site: Path) -> int:
        """Register a site's public key, read as ``flwr supernode register`` reads it."""
        key = try_load_public_key(site / "site.pub")
        return self.state.create_node("<id:none>", "none", key, 0, name=site.name)

    def online(self, node: int) -> bool:
        (info,) = self.state.get_node_info(node_ids=[node])
        return info.status == "online"

    def ask(self, node: int, content: RecordDict, kind: str = "train") -> str:
        """Send a message to a node; return its id."""
        message = Message(content, node, kind)
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(self.run)
        bare = remove_content_from_message(message)
        stored, wanted = self.state.store_message_and_object_tree(bare, get_object_tree(message), session)
        assert stored
        objects = get_all_nested_objects(message)
        for name in wanted:
            assert self.state.store_object(self.run, session, name, objects[name].deflate())
        return message.object_id

    def replies(self, identifier: str) -> list[Message]:
        found = self.state.get_message_res({identifier}, self.run)
        return [self._whole(reply) for reply in found]

    def reply(self, identifier: str) -> Message:
        (reply,) = eventually(lambda: self.replies(identifier), "the reply")
        return reply

    def _whole(self, reply: Message) -> Message:
        if reply.has_error():
            return reply
        name = reply.metadata.message_id
        wanted, contents = [name], {}
        while wanted:
            item = wanted.pop()
            contents[item] = eventually(lambda item=item: self.state.get_object(self.run, item), "an object")
            head = contents[item].split(b"\x00", 1)[0].decode().split(" ")
            wanted += [child for child in head[1].split(",") if child]
        return inflate_object_from_contents(name, contents)


class Daemon:
    """A daemon with the test's app in a process of its own."""

    def __init__(self, aggregator: Aggregator, folder: Path) -> None:
        self.folder, self.aggregator = folder, aggregator
        folder.mkdir()
        make_key(folder, folder.name, 200)
        (folder / "ca.crt").write_bytes((aggregator.folder / "ca.crt").read_bytes())
        (folder / "app.py").write_text(APP)
        self.log = folder / "daemon.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        self.health_port = free_port()
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        arguments = [self.folder, self.aggregator.address, self.health_port, LIMIT]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(self.folder / "app.py"), *[str(part) for part in arguments]],
                env=environment,
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )

    def events(self) -> list[dict]:
        """Return what this start of the daemon has logged."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in events if event["time"] >= self.started]

    def faults(self) -> list[str]:
        return [event["code"] for event in self.events() if event.get("event") == "not connected"]

    def get(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}{path}", timeout=5) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.read().decode()

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def aggregator(tmp_path_factory) -> Iterator[Aggregator]:
    aggregator = Aggregator(tmp_path_factory.mktemp("superlink"))
    try:
        aggregator.open()
        yield aggregator
    finally:
        if hasattr(aggregator, "ended"):
            aggregator.ended.set()
        aggregator.kill()


@pytest.fixture(scope="module")
def hospital(aggregator, tmp_path_factory) -> Iterator[tuple[Daemon, int]]:
    """A hospital that is enrolled, and its node."""
    with ended(Daemon(aggregator, tmp_path_factory.mktemp("hospitals") / "h1")) as daemon:
        yield daemon, aggregator.enrol(daemon.folder)


@pytest.fixture
def site(hospital, aggregator) -> tuple[Daemon, int]:
    """A daemon that is online, and its node."""
    daemon, node = hospital
    if not daemon.running:
        daemon.start()
    eventually(lambda: aggregator.online(node), "the node is online")
    return daemon, node


@pytest.fixture
def daemon(aggregator, tmp_path) -> Iterator[Daemon]:
    """A daemon of the test's own, neither enrolled nor started."""
    with ended(Daemon(aggregator, tmp_path / "h2")) as daemon:
        yield daemon


@contextmanager
def ended(daemon: Daemon) -> Iterator[Daemon]:
    try:
        yield daemon
    finally:
        if daemon.running:
            daemon.end(signal.SIGKILL)


def content(do: str = "echo", weights: bytes | None = None) -> RecordDict:
    return RecordDict({"config": ConfigRecord({"do": do} | ({"weights": weights} if weights else {}))})


def noise(size: int) -> bytes:
    return np.random.default_rng(0).bytes(size)


def test_a_model_goes_there_and_back(aggregator, site):
    daemon, node = site
    reply = aggregator.reply(aggregator.ask(node, content(weights=noise(1_700_000))))
    facts = reply.content["config"]
    assert facts["weights"] == noise(1_700_000)
    authority = x509.load_pem_x509_certificate((aggregator.folder / "ca.crt").read_bytes())
    der = authority.public_bytes(serialization.Encoding.DER)
    assert facts["node-server-fingerprint"] == hashlib.sha256(der).hexdigest()[:16]
    assert facts["node-site-folder"] == str(daemon.folder)
    assert facts["run-config"] == 0, "what the server configures reaches no ClientApp"
    health = json.loads(daemon.get("/healthz"))
    assert (health["ok"], health["round"]) == (True, 7)
    assert 'fedward_site_messages_total{kind="train",outcome="answered"} 1.0' in daemon.get("/metrics")
    asked = (aggregator.folder / "superlink.log").read_text()
    assert "[Fleet.PushMessages]" in asked
    assert "[Fleet.GetFab]" not in asked


def test_whatever_fails_leaves_as_a_code(aggregator, site):
    daemon, node = site
    # Two pieces on the wire, eight when joined; Flower would join a million.
    eight = Array(np.zeros((8 * 5 * 2**20 - 128) // 4, np.float32))
    unfolding = RecordDict({**content(), "arrays": ArrayRecord({"weights": eight})})
    asked = {
        "internal": [aggregator.ask(node, content(do)) for do in ("raise", "exit")],
        "bad-message": [
            aggregator.ask(node, content(weights=noise(14 * 2**20))),
            aggregator.ask(node, unfolding),
        ],
    }
    for code, identifiers in asked.items():
        for identifier in identifiers:
            reply = aggregator.reply(identifier)
            assert reply.has_error()
            assert reply.error.reason == code
    assert aggregator.reply(aggregator.ask(node, content())).has_content(), "the daemon lives on"
    assert "Doe" not in daemon.log.read_text()


def test_an_unknown_key_is_refused_until_it_is_enrolled(aggregator, daemon):
    daemon.start()
    eventually(lambda: daemon.faults().count("not-admitted") >= 2, "two refusals")
    assert daemon.process.poll() is None
    assert json.loads(daemon.get("/healthz"))["ok"] is False
    node = aggregator.enrol(daemon.folder)
    assert aggregator_answers(aggregator, node)
    assert daemon.end(signal.SIGINT) == 0
    assert not aggregator.online(node)


class Recorder:
    """Watches a link in this process and stops it at the first fault."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.faults: list[LinkFault] = []

    def contact(self) -> None:
        return

    def fault(self, fault: LinkFault, attempt: int, delay_s: float) -> None:
        self.faults.append(fault)
        self.stop.set()


def link_of(daemon: Daemon, recorder: Recorder, proxy: str = "") -> Link:
    authority, key = read_authority(daemon.folder), read_key(daemon.folder)
    endpoint = Endpoint(daemon.aggregator.address, authority, key, proxy=proxy)
    return Link(endpoint, recorder.stop, recorder, Backoff(0.01, 0.01))


def test_another_authority_is_not_trusted(daemon, tmp_path):
    make_certificates(tmp_path)
    (daemon.folder / "ca.crt").write_bytes((tmp_path / "ca.crt").read_bytes())
    recorder = Recorder()
    with pytest.raises(Stopped), link_of(daemon, recorder):
        pytest.fail("it connected")
    assert recorder.faults == [LinkFault.TLS]


def test_a_wrong_clock_is_named(aggregator, daemon, monkeypatch):
    aggregator.enrol(daemon.folder)
    late = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    monkeypatch.setattr("flwr.client.grpc_rere_client.node_auth_client_interceptor.now", lambda: late)
    recorder = Recorder()
    with pytest.raises(Stopped), link_of(daemon, recorder):
        pytest.fail("it connected")
    assert recorder.faults == [LinkFault.CLOCK]


def test_a_revoked_node_is_refused(aggregator, daemon):
    node = aggregator.enrol(daemon.folder)
    recorder = Recorder()
    with link_of(daemon, recorder) as link:
        assert link.node_id == node
        assert link.receive() is None
        aggregator.state.delete_node("<id:none>", node)
        with pytest.raises(LinkRefused) as refusal:
            link.receive()
    assert refusal.value.fault is LinkFault.KEY


def test_a_kind_of_message_that_flower_does_not_know_gets_a_code(aggregator, daemon):
    node = aggregator.enrol(daemon.folder)
    with link_of(daemon, Recorder()) as link:
        pull = link._calls["PullMessages"]

        def hostile(*arguments, **options):
            answer = pull(*arguments, **options)
            answer.messages_list[0].metadata.message_type = "send-everything"
            return answer

        link._calls["PullMessages"] = hostile
        identifier = aggregator.ask(node, content())
        with pytest.raises(UnacceptableMessage) as refusal:
            link.receive()
        assert link.reply(error_reply(ErrorCode.BAD_MESSAGE, refusal.value.envelope))
        assert aggregator.reply(identifier).error.reason == "bad-message"


def test_pulling_ends_at_the_limit(aggregator, daemon, monkeypatch):
    monkeypatch.setattr("client.link.MAX_MESSAGE_BYTES", 6 * 2**20)
    node = aggregator.enrol(daemon.folder)
    with link_of(daemon, Recorder()) as link:
        pull, pulled = link._calls["PullObject"], []

        def counting(*arguments, **options):
            answer = pull(*arguments, **options)
            pulled.append(len(answer.object_content))
            return answer

        link._calls["PullObject"] = counting
        parts = {f"part-{number}": ConfigRecord({"noise": noise(3 * 2**20 + number)}) for number in range(5)}
        aggregator.ask(node, RecordDict(parts))
        with pytest.raises(UnacceptableMessage):
            link.receive()
    assert 6 * 2**20 < sum(pulled) < 12 * 2**20, "one piece past the limit, not three"


def test_the_link_holds_no_way_to_fetch_code(daemon):
    calls = link_of(daemon, Recorder())._calls
    assert "PullMessages" in calls
    assert not {"GetFab", "GetRun"} & set(calls)


def test_a_reply_outlives_a_restart_of_the_server(aggregator, site):
    daemon, node = site
    assert aggregator_answers(aggregator, node)
    before = reconnects(daemon)
    aggregator.kill()
    eventually(lambda: "unreachable" in daemon.faults(), "the cut is noticed")
    assert json.loads(daemon.get("/healthz"))["connected"] is False
    assert reconnects(daemon) == before
    identifier = aggregator.ask(node, content())
    aggregator.start()
    assert aggregator.reply(identifier).has_content(), "the node stayed the same node"
    assert reconnects(daemon) > before


def test_a_killed_daemon_is_back_at_once_and_its_lost_message_is_said_to_be_lost(aggregator, site):
    daemon, node = site
    identifier = train_for_ever(aggregator, daemon, node)
    daemon.end(signal.SIGKILL)
    assert aggregator.online(node), "the server believes it online until the heartbeat lapses"
    daemon.start()
    reply = aggregator.reply(identifier)
    assert reply.has_error(), "the ServerApp hears of the crash instead of waiting for its deadline"
    assert aggregator_answers(aggregator, node)
    assert daemon.faults() == [], "it was admitted at the first attempt"


def test_sigterm_in_mid_training_ends_the_daemon_and_takes_the_node_offline(aggregator, site):
    daemon, node = site
    train_for_ever(aggregator, daemon, node)
    assert daemon.end(signal.SIGTERM) == 0
    assert not aggregator.online(node)
    assert daemon.events()[-1]["event"] == "stopping"


def test_a_proxy_is_used_when_one_is_named(aggregator, daemon):
    aggregator.enrol(daemon.folder)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        asked: list[str] = []
        thread = threading.Thread(target=relay, args=(listener, asked), daemon=True)
        thread.start()
        with link_of(daemon, Recorder(), f"http://127.0.0.1:{listener.getsockname()[1]}") as link:
            assert link.receive() is None
        thread.join()
    assert asked == [f"CONNECT {aggregator.address} HTTP/1.1"]


def train_for_ever(aggregator: Aggregator, daemon: Daemon, node: int) -> str:
    """Start a training that does not end; return the message's id once it is under way."""
    begun = daemon.folder / "training"
    begun.unlink(missing_ok=True)
    identifier = aggregator.ask(node, content("sleep"))
    eventually(begun.exists, "the training has begun")
    return identifier


def reconnects(daemon: Daemon) -> float:
    (line,) = [line for line in daemon.get("/metrics").splitlines() if line.startswith("fedward_site_reconnects_total")]
    return float(line.split()[1])


def aggregator_answers(aggregator: Aggregator, node: int) -> bool:
    """Return whether the node, once online, answers a message."""
    eventually(lambda: aggregator.online(node), "the node is online")
    return aggregator.reply(aggregator.ask(node, content())).has_content()


def relay(listener: socket.socket, asked: list[str]) -> None:
    """Serve one CONNECT request as an HTTP proxy does."""
    client, _ = listener.accept()
    with client:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(4096)
        asked.append(head.split(b"\r\n")[0].decode())
        host, port = asked[0].split()[1].split(":")
        with socket.create_connection((host, int(port))) as server:
            client.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
            back = threading.Thread(target=pump, args=(server, client), daemon=True)
            back.start()
            pump(client, server)
            back.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65_536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return


class Hostile:
    """An enrolled site that calls the Fleet API by hand."""

    def __init__(self, daemon: Daemon) -> None:
        self.key = read_key(daemon.folder)
        endpoint = Endpoint(daemon.aggregator.address, read_authority(daemon.folder), self.key)
        signing = NodeAuthClientInterceptor(self.key, self.key.public_key())
        self.fleet = FleetStub(grpc.intercept_channel(endpoint.channel(), signing))
        self.run = daemon.aggregator.run
        self.node = Node(node_id=self.activate(self.key.public_key()))

    def call(self, name: str, request):
        return getattr(self.fleet, name)(request, metadata=_HEADERS, timeout=10)

    def refused(self, name: str, request) -> bool:
        """Whether the SuperLink refuses a call as not permitted."""
        try:
            self.call(name, request)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.PERMISSION_DENIED
        return False

    def activate(self, public_key, interval: float = 10.0) -> int:
        key = public_key_to_bytes(public_key)
        return self.call("ActivateNode", ActivateNodeRequest(public_key=key, heartbeat_interval=interval)).node_id

    def announcement(self, message: Message, name: str = "", size: int = 0) -> PushMessagesRequest:
        message.metadata.__dict__["_message_id"] = name or message.object_id
        tree = get_object_tree(message)
        many = ObjectTree(children=[ObjectTree(object_id=f"{n:064x}") for n in range(size)])
        return PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[ObjectTree(object_id=message.metadata.message_id, children=[*tree.children, many])]
            if size
            else [ObjectTree(object_id=message.metadata.message_id, children=tree.children)],
        )

    def forged(self, **claims) -> Message:
        """A message of which everything is the sender's word."""
        said = {"message_id": "", "reply_to_message_id": "", "group_id": "", "message_type": "train", "ttl": 60.0}
        said |= {"run_id": self.run, "src_node_id": self.node.node_id, "dst_node_id": SUPERLINK_NODE_ID}
        return make_message(
            metadata=Metadata(created_at=time.time(), **(said | claims)), content=content("forged", noise(100))
        )


@pytest.fixture
def hostile(aggregator, tmp_path) -> Iterator[Hostile]:
    with ended(Daemon(aggregator, tmp_path / "hostile")) as daemon:
        aggregator.enrol(daemon.folder)
        yield Hostile(daemon)


@pytest.fixture
def victim(aggregator, daemon) -> Iterator[tuple[Link, int]]:
    node = aggregator.enrol(daemon.folder)
    with link_of(daemon, Recorder()) as link:
        yield link, node


def test_a_site_cannot_come_online_as_another_or_for_hours(hostile, victim, daemon):
    others = public_key_to_bytes(read_key(daemon.folder).public_key())
    request = ActivateNodeRequest(public_key=others, heartbeat_interval=10.0)
    assert hostile.refused("ActivateNode", request)
    own = public_key_to_bytes(hostile.key.public_key())
    assert hostile.refused("ActivateNode", ActivateNodeRequest(public_key=own, heartbeat_interval=1800.0))
    beat = SendNodeHeartbeatRequest(node=hostile.node, heartbeat_interval=1800.0)
    assert hostile.refused("SendNodeHeartbeat", beat)
    assert not hostile.refused(
        "SendNodeHeartbeat", SendNodeHeartbeatRequest(node=hostile.node, heartbeat_interval=10.0)
    )


def test_a_site_cannot_question_another_as_if_it_were_the_server(aggregator, hostile, victim):
    link, node = victim
    for source in (SUPERLINK_NODE_ID, hostile.node.node_id):
        message = hostile.forged(src_node_id=source, dst_node_id=node)
        assert hostile.refused("PushMessages", hostile.announcement(message))
    assert link.receive() is None


def test_a_site_cannot_answer_for_another(aggregator, hostile, victim):
    link, node = victim
    asked = aggregator.ask(node, content())
    question = link.receive()
    message = hostile.forged(src_node_id=node, reply_to_message_id=asked)
    assert hostile.refused("PushMessages", hostile.announcement(message))
    message = hostile.forged(reply_to_message_id=asked)
    assert not list(hostile.call("PushMessages", hostile.announcement(message)).objects_to_push)
    assert link.reply(Message(content("true"), reply_to=question))
    assert aggregator.reply(asked).content["config"]["do"] == "true"


def test_a_site_cannot_have_anothers_question_deleted(aggregator, hostile, victim):
    link, node = victim
    asked = aggregator.ask(node, content())
    for _ in range(2):  # no error either: an honest site's question may be gone
        request = ConfirmMessageReceivedRequest(node=hostile.node, run_id=hostile.run, message_object_id=asked)
        hostile.call("ConfirmMessageReceived", request)
    assert link.receive().metadata.message_id == asked


def test_a_site_cannot_take_over_the_push_of_what_all_wait_for(aggregator, hostile):
    asked = aggregator.ask(hostile.node.node_id, content(weights=noise(1000)))
    message = hostile.forged(reply_to_message_id=asked)
    assert hostile.refused("PushMessages", hostile.announcement(message, name=asked))
    (pulled,) = hostile.call("PullMessages", PullMessagesRequest(node=hostile.node)).messages_list
    assert pulled.metadata.message_id == asked


def test_a_site_cannot_announce_more_than_a_reply_has(aggregator, hostile):
    asked = aggregator.ask(hostile.node.node_id, content())
    for size in (8, 2000):
        message = hostile.forged(reply_to_message_id=asked)
        assert hostile.refused("PushMessages", hostile.announcement(message, size=size))
    two = hostile.announcement(hostile.forged(reply_to_message_id=asked))
    two.messages_list.append(two.messages_list[0])
    assert hostile.refused("PushMessages", two)
    message = hostile.forged(reply_to_message_id=asked)
    assert list(hostile.call("PushMessages", hostile.announcement(message)).objects_to_push), "an honest one is taken"


def test_calls_that_no_daemon_makes_are_refused(hostile):
    assert hostile.refused("GetRun", GetRunRequest(node=hostile.node, run_id=hostile.run))
    assert hostile.refused("GetFab", GetFabRequest(node=hostile.node, hash_str="0" * 64, run_id=hostile.run))
    assert hostile.refused("UnregisterNode", UnregisterNodeFleetRequest(node_id=hostile.node.node_id))


def test_nothing_of_an_ended_run_stays(tmp_path):
    forgetting = """
import sys
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, SubStatus
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from server.superlink import forget_ended_runs

forget_ended_runs()
state = LinkStateFactory(sys.argv[1], NoOpFederationManager(), ObjectStoreFactory(sys.argv[1])).state()
run = state.create_run("a/b", "1.0", "0" * 64, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP)
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, SUPERLINK_NODE_ID, 1
(task,) = state.get_tasks(run_ids=[run])
assert state.claim_task(task.task_id) and state.activate_task(task.task_id)
node = state.create_node("<id:none>", "none", b"key", 0, name="h1")
assert state.activate_node(node, 10.0)
message = Message(RecordDict({"config": ConfigRecord({"x": 1})}), node, "train")
message.metadata.__dict__["_message_id"] = message.object_id
bare, tree = remove_content_from_message(message), get_object_tree(message)
assert state.store_message_and_object_tree(bare, tree, state.start_session(run))[0]
before = len(state.object_store)
assert state.finish_task(task.task_id, SubStatus.COMPLETED, "")
print(before, len(state.object_store))
"""
    command = [sys.executable, "-c", forgetting, str(tmp_path / "state.db")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["3", "0"]
