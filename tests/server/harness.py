"""The real HTTP process, in a thread, over a fake scheduler."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import requests
import uvicorn
import uvloop
import zmq
from transformers import PreTrainedTokenizerFast

from tca_runtime.channels import AsyncReceiver, Sender
from tca_runtime.config import ModelArgs, RuntimeConfig, ServerArgs
from tca_runtime.messages import ToScheduler, ToTokenizer
from tca_runtime.server.app import build_app
from tca_runtime.tokenizer.manager import TokenizerManager
from tests.server.fake_scheduler import CONTEXT_LENGTH, SCRIPT, FakeScheduler
from tests.tokenizer.toy_tokenizers import byte_level

MODEL = "toy-model"


@dataclass
class Server:
    """A running server and the scheduler behind it."""

    url: str
    scheduler: FakeScheduler
    manager: TokenizerManager
    tokenizer: PreTrainedTokenizerFast

    def post(self, path: str, body: Any, **kwargs: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=30, **kwargs)

    def generate(self, **body: Any) -> Any:
        response = self.post("/generate", body)
        assert response.status_code == 200, response.text
        return response.json()

    def get(self, path: str, **kwargs: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=30, **kwargs)


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextmanager
def running_server(
    tokenizer: PreTrainedTokenizerFast | None = None,
    heartbeat_timeout: float = 30.0,
    **server_args: Any,
) -> Iterator[Server]:
    """Start a server on a free port; both halves are stopped at the end."""
    tokenizer = tokenizer or byte_level()
    config = replace(
        RuntimeConfig(),
        model=ModelArgs(model_path="models/toy", served_model_name=MODEL),
        server=ServerArgs(**server_args),
    )
    info = {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": len(tokenizer) + 4,
        "custom_params": [*SCRIPT, "kept_ratio"],
        "architectures": ["ToyForCausalLM"],
        "model_type": "toy",
    }
    with tempfile.TemporaryDirectory(prefix="tca-test-") as directory:
        to_scheduler, to_tokenizer = f"ipc://{directory}/s", f"ipc://{directory}/t"
        scheduler = FakeScheduler(tokenizer, to_scheduler, to_tokenizer)
        started: list[tuple[TokenizerManager, uvicorn.Server, int]] = []

        async def serve() -> None:
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            inbox: AsyncReceiver[ToTokenizer] = AsyncReceiver(context, to_tokenizer, ToTokenizer)
            outbox: Sender[ToScheduler] = Sender(context, to_scheduler)
            manager = TokenizerManager(config, tokenizer, outbox, inbox, info, heartbeat_timeout)
            # Without the protocol asyncio does not recognise TCP and leaves Nagle's delays on.
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            listener.bind(("127.0.0.1", 0))
            server = uvicorn.Server(
                uvicorn.Config(build_app(config, manager), log_level="warning", lifespan="on")
            )
            started.append((manager, server, listener.getsockname()[1]))
            await server.serve(sockets=[listener])
            inbox.close()
            outbox.close()
            context.destroy(linger=0)

        def run() -> None:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve())

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        eventually(lambda: bool(started) and started[0][1].started)
        manager, http, port = started[0]
        try:
            yield Server(f"http://127.0.0.1:{port}", scheduler, manager, tokenizer)
        finally:
            http.should_exit = True
            thread.join(15)
            scheduler.stop()
