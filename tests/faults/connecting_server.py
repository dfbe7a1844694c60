"""A server that connects to itself just before it says that it is ready: flags as usual."""

from __future__ import annotations

import socket
import sys

from tca_runtime import launch_server
from tca_runtime.config import RuntimeConfig
from tca_runtime.stdio import survive_full_disk

_print_ready = launch_server._print_ready


def connect_first(config: RuntimeConfig, model: str) -> None:
    socket.create_connection((config.server.host, config.server.port), timeout=5).close()
    _print_ready(config, model)


if __name__ == "__main__":
    launch_server._print_ready = connect_first
    survive_full_disk()
    sys.exit(launch_server.main(sys.argv[1:]))
