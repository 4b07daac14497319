"""A client of CRI, the Kubernetes interface of container runtimes, made from its definition when the tests run."""
import pathlib
import sys
import threading
from types import ModuleType
from typing import Any

from .userland import UNPACKED
from .processes import run, until

DEFINITION = UNPACKED / "cri-api/usr/share/gocode/src/k8s.io/cri-api/pkg/apis/runtime/v1/api.proto"


def compile_messages(folder: pathlib.Path) -> ModuleType:
    """CRI's messages, compiled into `folder`."""
    text = DEFINITION.read_text().replace("[debug_redact = true]", "")  # an option that older compilers do not know
    (folder / "cri_api.proto").write_text(text)
    run("protoc", "-I", folder, "--python_out", folder, folder / "cri_api.proto")
    sys.path.insert(0, str(folder))
    try:
        import cri_api_pb2
    finally:
        sys.path.remove(str(folder))
    compiled: ModuleType = cri_api_pb2
    return compiled


class Cri:
    """The services behind a socket: `cri("RunPodSandbox", config=...)` is that call's answer, as a dict."""

    def __init__(self, path: str, messages: ModuleType) -> None:
        import grpc
        self._messages = messages
        # By way of this thread: gRPC's own are those of the first machine, and in its mount namespace.
        # What another channel has learnt about the socket is not shared, such as not to try it soon.
        self._channel = grpc.insecure_channel(f"unix:///proc/{threading.get_native_id()}/root{path}", [
            ("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500)])
        grpc.channel_ready_future(self._channel).result(timeout=300)
        assert until(self._is_initialized, 60)

    def __call__(self, method: str, service: str = "RuntimeService", **request: Any) -> Any:
        from google.protobuf.json_format import MessageToDict, ParseDict
        question, answer = (getattr(self._messages, f"{method}{kind}") for kind in ("Request", "Response"))
        call = self._channel.unary_unary(f"/runtime.v1.{service}/{method}", question.SerializeToString,
                                         answer.FromString)
        return MessageToDict(call(ParseDict(request, question()), timeout=300), preserving_proto_field_name=True)

    def _is_initialized(self) -> bool:
        """Whether it has recovered what it knew: containerd serves before (containerd#8468)."""
        import grpc
        try:
            self("Version")
            return True
        except grpc.RpcError as error:
            if "not initialized" not in error.details():
                raise
            return False

    def close(self) -> None:
        self._channel.close()
