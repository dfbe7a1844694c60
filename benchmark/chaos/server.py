"""A server that looks for the owner of every slot as soon as it is idle, not after a minute.

The scheduler process imports this module too, under another name, and so checks as early.
"""

from __future__ import annotations

import sys

from tca_runtime import launch_server
from tca_runtime.scheduler import idle

idle.SLOTS_CHECK_SECONDS = 1.5

if __name__ == "__main__":
    sys.exit(launch_server.main())
