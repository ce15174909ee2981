"""The stand-in of Dataproc on free ports of this machine: gRPC and REST over one ``Core``.

Names and routes are the library's own. ``with serving(runner) as server:`` starts both fronts and ends them,
with every driver that still runs; ``server.client(dp.JobControllerClient, "rest")`` is the real client on it.
"""

import importlib
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import grpc
from dataproc_core import Core, LostAnswerError, Runner
from dataproc_messages import raw
from dataproc_rules import ServiceError
from google.auth.credentials import AnonymousCredentials
from google.cloud import dataproc_v1 as dp
from google.longrunning import operations_pb2
from google.protobuf import json_format

#: Each service with the module that has its routes.
SERVICES = {
    "AutoscalingPolicyService": "autoscaling_policy_service",
    "BatchController": "batch_controller",
    "ClusterController": "cluster_controller",
    "JobController": "job_controller",
    "WorkflowTemplateService": "workflow_template_service",
}
#: Codes of HTTP as Google's APIs map them.
HTTP = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
OPERATIONS = {
    "GetOperation": operations_pb2.GetOperationRequest,
    "CancelOperation": operations_pb2.CancelOperationRequest,
}
#: What every API of Google takes beside the fields of a request.
SYSTEM_PARAMETERS = {"alt", "$alt", "prettyPrint", "key", "fields", "quotaUser"}


@dataclass(frozen=True)
class Route:
    """One way to ask for an rpc over HTTP."""

    rpc: str
    method: str
    path: re.Pattern[str]
    fields: tuple[str, ...]  # of the groups of the path
    body: str  # a field, * for the whole request, or nothing


def routes() -> list[Route]:
    """All routes of the services, as the library's own transports have them."""
    found = []
    for service, module_name in SERVICES.items():
        folder = f"google.cloud.dataproc_v1.services.{module_name}.transports.rest_base"
        base = vars(importlib.import_module(folder))[f"_Base{service}RestTransport"]
        for name, rpc in vars(base).items():
            if name.startswith("_Base") and hasattr(rpc, "_get_http_options"):
                found += [route(name.removeprefix("_Base"), option) for option in rpc._get_http_options()]
    return found


def route(rpc: str, option: dict[str, str]) -> Route:
    """``/v1/{name=projects/*/jobs/*}:cancel`` as a pattern with one group per field."""
    fields: list[str] = []

    def group(match: re.Match[str]) -> str:
        fields.append(match[1])
        return "(" + (match[2] or "=*")[1:].replace("*", "[^/]+") + ")"

    pattern = re.sub(r"\{([^}=]+)(=[^}]+)?\}", group, option["uri"])
    return Route(rpc, option["method"].upper(), re.compile(pattern), tuple(fields), option.get("body", ""))


def request_type(rpc: str) -> Any:
    return OPERATIONS.get(rpc) or getattr(dp, f"{rpc}Request", None)


class RestServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, core: Core) -> None:
        super().__init__(("127.0.0.1", 0), RestAnswers)
        self.core = core
        self.routes = [one for one in routes() if one.rpc in core.answers]
        self.log: list[tuple[str, str, dict[str, Any]]] = []  # method, path with query, body


class RestAnswers(BaseHTTPRequestHandler):
    server: RestServer

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean."""

    def answer(self, status: int, content: str) -> None:
        body = content.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, refusal: ServiceError) -> None:
        status = HTTP.get(refusal.code, 500)
        error = {"code": status, "message": refusal.message, "status": refusal.code}
        self.answer(status, json.dumps({"error": error}))

    def serve(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
        self.server.log.append((self.command, self.path, body))
        try:
            rpc, request = self.parse(body)
            answer = self.server.core.call(rpc, request)
        except LostAnswerError:
            self.close_connection = True
        except ServiceError as refusal:
            self.refuse(refusal)
        except Exception as problem:  # a fault of the stand-in itself; gRPC answers UNKNOWN by itself
            self.refuse(ServiceError("INTERNAL", f"{type(problem).__name__}: {problem}"))
        else:
            self.answer(200, json_format.MessageToJson(raw(answer)))

    def parse(self, body: dict[str, Any]) -> tuple[str, Any]:
        """The rpc that a path stands for, and its request out of path, query and body."""
        url = urlsplit(self.path)
        for one in self.server.routes:
            match = one.path.fullmatch(unquote(url.path))
            if match is None or one.method != self.command:
                continue
            tree: dict[str, Any] = dict(body) if one.body == "*" else {one.body: body} if one.body else {}
            query = [pair for pair in parse_qsl(url.query) if pair[0] not in SYSTEM_PARAMETERS]
            for name, value in [*query, *zip(one.fields, match.groups(), strict=True)]:
                node = tree
                *parents, last = name.split(".")
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = value
            kind = request_type(one.rpc)
            message = kind() if one.rpc in OPERATIONS else kind.pb(kind())
            try:
                json_format.ParseDict(tree, message)
            except json_format.ParseError as error:
                raise ServiceError("INVALID_ARGUMENT", f"Invalid JSON payload received: {error}") from error
            return one.rpc, message if one.rpc in OPERATIONS else kind.wrap(message)
        raise ServiceError("NOT_FOUND", f"No such method: {self.command} {url.path}")

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = serve  # noqa: N815 - the names that http.server calls


def grpc_handlers(core: Core) -> list[grpc.GenericRpcHandler]:
    """One handler per service; gRPC itself answers UNIMPLEMENTED for all others."""

    def handler(rpc: str) -> grpc.RpcMethodHandler:
        kind = request_type(rpc)
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: answer(rpc, request, context),
            request_deserializer=kind.FromString if rpc in OPERATIONS else kind.deserialize,
            response_serializer=lambda message: raw(message).SerializeToString(),
        )

    def answer(rpc: str, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return core.call(rpc, request)
        except LostAnswerError:  # what a client sees of a connection that ends
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        except ServiceError as refusal:
            context.abort(grpc.StatusCode[refusal.code], refusal.message)

    by_service: dict[str, dict[str, grpc.RpcMethodHandler]] = {
        "google.longrunning.Operations": {rpc: handler(rpc) for rpc in OPERATIONS}
    }
    for service, module_name in SERVICES.items():
        folder = f"google.cloud.dataproc_v1.services.{module_name}.transports.rest_base"
        base = vars(importlib.import_module(folder))[f"_Base{service}RestTransport"]
        names = {name.removeprefix("_Base") for name in vars(base)} & core.answers.keys() - OPERATIONS.keys()
        by_service[f"google.cloud.dataproc.v1.{service}"] = {rpc: handler(rpc) for rpc in sorted(names)}
    return [grpc.method_handlers_generic_handler(*pair) for pair in by_service.items()]


@dataclass
class Server:
    """Both fronts of a core, while they run."""

    core: Core
    rest: RestServer
    grpc_address: str
    channels: list[grpc.Channel] = field(default_factory=list)

    @property
    def rest_url(self) -> str:
        return f"http://127.0.0.1:{self.rest.server_port}"

    def client(self, kind: Any, transport: str) -> Any:
        """A client of the library over ``grpc`` or ``rest``."""
        if transport == "grpc":
            channel = grpc.insecure_channel(self.grpc_address)
            self.channels.append(channel)
            return kind(transport=kind.get_transport_class("grpc")(channel=channel))
        return kind(
            transport="rest",
            credentials=AnonymousCredentials(),
            client_options={"api_endpoint": self.rest_url},
        )


@contextmanager
def serving(runner: Runner, **options: Any) -> Iterator[Server]:
    """A server while the block runs; ``options`` are those of ``Core``."""
    core = Core(runner, **options)
    front = grpc.server(ThreadPoolExecutor(8, "grpc"))
    for handler in grpc_handlers(core):
        front.add_generic_rpc_handlers((handler,))
    address = f"127.0.0.1:{front.add_insecure_port('127.0.0.1:0')}"
    front.start()
    rest = RestServer(core)
    thread = threading.Thread(target=rest.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    server = Server(core, rest, address)
    try:
        yield server
    finally:
        core.close()
        for channel in server.channels:
            channel.close()
        rest.shutdown()
        thread.join()
        rest.server_close()
        front.stop(None).wait()
