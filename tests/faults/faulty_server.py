"""A server whose scheduler can be made to hang: ``python faulty_server.py HOW FLAGS...``.

It hangs in the next step after a file named by ``HANG_FILE`` appears, and removes the file. The
scheduler process imports this module too, under another name, and so gets the same engine.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

from tca_runtime import launch_server
from tca_runtime.engine.engine import Engine

_launch = Engine.launch
_trigger = Path(os.environ["HANG_FILE"])


def hang_here() -> None:
    # Unlike CDLL, PyDLL keeps the interpreter's lock: no other thread can run.
    sleep = time.sleep if sys.argv[1] == "python" else ctypes.PyDLL(None).sleep
    while True:
        sleep(600)


def launch(self: Engine, step: Any) -> Any:
    if _trigger.exists():
        _trigger.unlink()
        hang_here()
    return _launch(self, step)


Engine.launch = launch  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(launch_server.main(sys.argv[2:]))
