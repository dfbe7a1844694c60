"""A server that notes how long its scheduler and engine alone were busy with each request.

One line per finished request in the file that ``TIMES_FILE`` names: the seconds from taking the
request out of the inbox to having its last token. The scheduler process imports this module too,
under another name, and so notes them.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tca_runtime import launch_server
from tca_runtime.messages import GenerateRequest, TokenBatch, ToTokenizer
from tca_runtime.scheduler.outbox import Outbox
from tca_runtime.scheduler.scheduler import Scheduler

_accept = Scheduler._accept
_send = Outbox.send
_taken: dict[str, float] = {}


def accept(self: Scheduler, message: GenerateRequest) -> None:
    _taken[message.rid] = time.perf_counter()
    _accept(self, message)


def send(self: Outbox, message: ToTokenizer) -> None:
    now = time.perf_counter()
    ended = message.outputs if isinstance(message, TokenBatch) else []
    lines = [f"{now - _taken.pop(o.rid)!r}\n" for o in ended if o.finish and o.rid in _taken]
    if lines:
        # Before the reply goes out: whoever has read that finds the line.
        with Path(os.environ["TIMES_FILE"]).open("a") as file:
            file.writelines(lines)
    _send(self, message)


Scheduler._accept = accept  # type: ignore[method-assign]
Outbox.send = send  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(launch_server.main())
