"""A real Ollama-protocol server for tests: scripted, fault-injecting, and recording what each client connection did.

Example:
    with FakeOllama() as server:
        server.script("/api/chat", Reply.chat("Hel", "lo"), Reply([*Reply.chat("Hel", done=False).steps, Stall()]))
        ...
        [request] = server.wait_for_requests(path="/api/chat")
        assert request.connection.wait_left()
"""

from ._fake import FakeOllama
from ._left import LeakCheckWarning, nothing_left_behind
from ._recording import RecordingError
from ._records import ConnectionRecord, RequestRecord
from ._script import Block, Cut, Endless, Gate, NoEnd, Pause, Raw, Reply, Reset, Stall, Step, Trickle
from ._teardown import WAYS, TeardownCheck, TeardownFailure, TeardownReport, check_teardown

__all__ = [
    "WAYS",
    "Block",
    "ConnectionRecord",
    "Cut",
    "Endless",
    "FakeOllama",
    "Gate",
    "LeakCheckWarning",
    "NoEnd",
    "Pause",
    "Raw",
    "RecordingError",
    "Reply",
    "RequestRecord",
    "Reset",
    "Stall",
    "Step",
    "TeardownCheck",
    "TeardownFailure",
    "TeardownReport",
    "Trickle",
    "check_teardown",
    "nothing_left_behind",
]
