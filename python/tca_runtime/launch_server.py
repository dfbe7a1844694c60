"""Start a server: ``python -m tca_runtime.launch_server [--model-path X] ...``.

This process serves HTTP and tokenises; the scheduler runs in a child process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import uvicorn
import uvloop
from transformers import PreTrainedTokenizerFast

from tca_runtime.config import RuntimeConfig, ServerArgs, parse_args
from tca_runtime.fetch_model import FetchError
from tca_runtime.garbage import settle_garbage
from tca_runtime.gguf_file import GgufError
from tca_runtime.logs import configure_logging
from tca_runtime.server.app import build_app
from tca_runtime.stdio import survive_full_disk
from tca_runtime.supervisor import Life, StartupError, Supervisor
from tca_runtime.tokenizer.loading import TokenizerError, load_tokenizer
from tca_runtime.tokenizer.manager import TokenizerManager

logger = logging.getLogger("tca_runtime")

# How long a server whose scheduler died still answers, so that clients and probes see why.
FAREWELL_SECONDS = 3.0
# A client that takes nothing for this long, or has vanished without a word, is disconnected.
STALLED_CLIENT_SECONDS = 300
# How long replies that are complete may take to reach their clients at the end.
FLUSH_SECONDS = 5

# Read by the scheduler process when it loads its libraries.
SCHEDULER_ENVIRONMENT = {
    # OpenMP threads spin at a barrier for some fifty microseconds, about what the next operator
    # takes to come. Longer, and they keep the tokenizer process off its core, which then takes
    # the one that computes: a stream slows decoding down by several times what its messages cost.
    "GOMP_SPINCOUNT": "2000",
    # Keep freed activations instead of returning them to the system: faulting them in anew costs
    # a fifth of a prefill on the CPU.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a server until it is told to stop. Returns the process's exit status."""
    config = parse_args(argv)
    configure_logging(config.server, "server")
    for name, value in SCHEDULER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with (
            bind(config.server) as listener,
            socket_directory() as directory,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            return runner.run(Launcher(config, directory, listener).run())
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def bind(args: ServerArgs) -> socket.socket:
    """Take the port before the model is loaded, so that a port in use is told at once."""
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off on accepted connections.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it. In milliseconds; only Linux has it.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        stalled_ms = STALLED_CLIENT_SECONDS * 1000
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stalled_ms)
    try:
        listener.bind((args.host, args.port))
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise StartupError(f"cannot listen on {args.host}:{args.port}: {reason}") from error
    return listener


@contextlib.contextmanager
def socket_directory() -> Iterator[Path]:
    """A directory that only this user can enter, gone with the server."""
    try:
        directory = tempfile.mkdtemp(prefix="tca-")
    except OSError as error:
        raise StartupError(f"cannot make a directory for sockets: {error}") from error
    try:
        yield Path(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class HttpServer(uvicorn.Server):
    """Leaves signals to the launcher: uvicorn would raise them again after its own shutdown.

    ``on_listening`` is called once connections are accepted.
    """

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Launcher:
    """Runs HTTP over a supervised scheduler, from the start to an orderly end.

    The first SIGTERM or SIGINT lets open requests finish and refuses new ones; a second one ends
    the server at once.
    """

    def __init__(self, config: RuntimeConfig, directory: Path, listener: socket.socket) -> None:
        self._config = config
        self._listener = listener
        self._supervisor = Supervisor(config, directory)
        self._told_to_stop = asyncio.Event()
        self._hurried = asyncio.Event()
        self._lost = False

    async def run(self) -> int:
        """Serve until a signal, or until the scheduler is lost for good; the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        starting = asyncio.create_task(self._supervisor.start())
        stopping = asyncio.create_task(self._told_to_stop.wait())
        try:
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return 0
            return await self._serve(starting.result())
        finally:
            for task in (starting, stopping):
                task.cancel()
            await asyncio.gather(starting, stopping, return_exceptions=True)
            self._supervisor.end()

    def _stop(self) -> None:
        if self._told_to_stop.is_set():
            self._hurried.set()
        self._told_to_stop.set()

    async def _serve(self, life: Life) -> int:
        config = self._config
        tokenizer = _tokenizer(config)
        manager = TokenizerManager(config, tokenizer, life.outbox, life.inbox, life.info)
        level = "debug" if config.server.log_level == "debug" else "warning"
        app = build_app(config, manager)
        server = HttpServer(
            uvicorn.Config(app, log_level=level, timeout_graceful_shutdown=FLUSH_SECONDS),
            lambda: _print_ready(config, manager.served_model_name),
        )
        tasks = [
            asyncio.create_task(self._supervise(life, manager, server)),
            asyncio.create_task(self._drain(manager, server)),
        ]
        settle_garbage()
        await server.serve(sockets=[self._listener])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return 1 if self._lost else 0

    async def _supervise(
        self, life: Life, manager: TokenizerManager, server: uvicorn.Server
    ) -> None:
        """Turn the loss of the scheduler into an exit with status 1."""
        await self._supervisor.run(life, manager)
        self._lost = True
        await asyncio.sleep(0 if manager.draining else FAREWELL_SECONDS)
        server.should_exit = True

    async def _drain(self, manager: TokenizerManager, server: uvicorn.Server) -> None:
        """Once told to stop: let open requests finish for a while, then end the rest."""
        await self._told_to_stop.wait()
        manager.draining = True
        timeout = self._config.faults.shutdown_timeout
        logger.info("shutting down; %d requests are open", manager.num_open)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while manager.num_open and not self._hurried.is_set():
                    await asyncio.sleep(0.05)
        if manager.num_open:
            logger.warning("%d requests are ended unfinished", manager.num_open)
            manager.end_open("the server is shutting down", 503)
        server.should_exit = True


def _tokenizer(config: RuntimeConfig) -> PreTrainedTokenizerFast:
    try:
        return load_tokenizer(config.model)
    except (FetchError, GgufError, TokenizerError) as error:
        raise StartupError(str(error)) from error


def _print_ready(config: RuntimeConfig, model: str) -> None:
    host = "127.0.0.1" if config.server.host in ("0.0.0.0", "::") else config.server.host
    url = f"http://{host}:{config.server.port}"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.server.api_key else ""
    print(
        f"\nThe server is ready: {model} on {url}\n\nTry:\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        f'    -d \'{{"model": "{model}", "temperature": 0, "messages": [{{"role": "user", '
        '"content": "What is the capital of France?"}]}\'\n'
    )


if __name__ == "__main__":
    survive_full_disk()
    sys.exit(main())
