"""Start a server: ``python -m tca_runtime.launch_server [--model-path X] ...``.

This process serves HTTP and tokenises; the scheduler runs in a child process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess

import uvicorn
import uvloop
import zmq
import zmq.asyncio

from tca_runtime.channels import AsyncReceiver, Sender
from tca_runtime.config import RuntimeConfig, ServerArgs, parse_args
from tca_runtime.logs import configure_logging
from tca_runtime.messages import SchedulerFailed, SchedulerReady, ToScheduler, ToTokenizer
from tca_runtime.scheduler.process import Addresses, run_scheduler
from tca_runtime.server.app import build_app
from tca_runtime.tokenizer.loading import load_tokenizer
from tca_runtime.tokenizer.manager import TokenizerManager

logger = logging.getLogger("tca_runtime")

# How long a server whose scheduler died still answers, so that clients and probes see why.
FAREWELL_SECONDS = 3.0

# Read by the scheduler process when it loads its libraries.
SCHEDULER_ENVIRONMENT = {
    # OpenMP threads spin at a barrier for well under a time slice. Longer, and they keep the
    # tokenizer process off its core; not at all, and decoding on the CPU takes twice as long.
    "GOMP_SPINCOUNT": "100000",
    # Keep freed activations instead of returning them to the system: faulting them in anew costs
    # a fifth of a prefill on the CPU.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


class StartupError(RuntimeError):
    """The server could not start; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a server until it is told to stop. Returns the process's exit status."""
    config = parse_args(argv)
    configure_logging(config.server, "server")
    for name, value in SCHEDULER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    directory = tempfile.mkdtemp(prefix="tca-")
    addresses = Addresses(f"ipc://{directory}/scheduler", f"ipc://{directory}/tokenizer")
    try:
        with (
            bind(config.server) as listener,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            return runner.run(serve(config, addresses, listener))
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def bind(args: ServerArgs) -> socket.socket:
    """Take the port before the model is loaded, so that a port in use is told at once."""
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off on accepted connections.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise StartupError(f"cannot listen on {args.host}:{args.port}: {reason}") from error
    return listener


class HttpServer(uvicorn.Server):
    """Leaves signals to the launcher: uvicorn would raise them again after its own shutdown."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(config: RuntimeConfig, addresses: Addresses, listener: socket.socket) -> int:
    """Start the scheduler, then answer requests until a signal or the scheduler's end."""
    context = zmq.asyncio.Context()
    inbox: AsyncReceiver[ToTokenizer] = AsyncReceiver(context, addresses.tokenizer, ToTokenizer)
    spawn = multiprocessing.get_context("spawn")
    scheduler = spawn.Process(
        target=run_scheduler, args=(config, addresses), name="scheduler", daemon=True
    )
    scheduler.start()
    try:
        info = await _wait_until_ready(inbox, scheduler)
        outbox: Sender[ToScheduler] = Sender(zmq.Context.shadow(context), addresses.scheduler)
        manager = TokenizerManager(config, load_tokenizer(config.model), outbox, inbox, info)
        return await _serve_http(config, manager, scheduler, listener)
    finally:
        scheduler.terminate()
        scheduler.join(timeout=5)
        if scheduler.is_alive():
            scheduler.kill()


async def _wait_until_ready(
    inbox: AsyncReceiver[ToTokenizer], scheduler: BaseProcess
) -> dict[str, object]:
    while True:
        try:
            received = await asyncio.wait_for(inbox.receive(), timeout=0.5)
        except TimeoutError:
            if scheduler.is_alive():
                continue
            status = scheduler.exitcode
            raise StartupError(f"the scheduler exited with status {status}") from None
        if isinstance(received, SchedulerReady):
            return received.info
        if isinstance(received, SchedulerFailed):
            raise StartupError(received.traceback.strip().splitlines()[-1])


async def _serve_http(
    config: RuntimeConfig,
    manager: TokenizerManager,
    scheduler: BaseProcess,
    listener: socket.socket,
) -> int:
    app = build_app(config, manager)
    level = "debug" if config.server.log_level == "debug" else "warning"
    server = HttpServer(uvicorn.Config(app, log_level=level, timeout_graceful_shutdown=5))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, setattr, server, "should_exit", True)
    watcher = asyncio.create_task(_watch(manager, scheduler, server))
    _print_ready(config, manager.served_model_name)
    await server.serve(sockets=[listener])
    watcher.cancel()
    return 1 if manager.failure else 0


async def _watch(manager: TokenizerManager, scheduler: BaseProcess, server: uvicorn.Server) -> None:
    """Turn the scheduler's death into errors for its clients and an exit with status 1."""
    while scheduler.is_alive():
        await asyncio.sleep(0.2)
    manager.fail(f"the scheduler exited with status {scheduler.exitcode}")
    print(f"scheduler died: {manager.failure}", file=sys.stderr, flush=True)
    await asyncio.sleep(FAREWELL_SECONDS)
    server.should_exit = True


def _print_ready(config: RuntimeConfig, model: str) -> None:
    host = "127.0.0.1" if config.server.host in ("0.0.0.0", "::") else config.server.host
    url = f"http://{host}:{config.server.port}"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.server.api_key else ""
    print(
        f"\nThe server is ready: {model} on {url}\n\nTry:\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        f'    -d \'{{"model": "{model}", "temperature": 0, "messages": [{{"role": "user", '
        '"content": "What is the capital of France?"}]}\'\n',
        flush=True,
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main())
