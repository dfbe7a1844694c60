"""Entry of the scheduler process."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from typing import Any

import torch
import zmq

from tca_runtime.channels import Receiver, UnreadableMessage
from tca_runtime.config import RuntimeConfig
from tca_runtime.engine.engine import Engine
from tca_runtime.engine.grammar import GrammarCompiler
from tca_runtime.fetch_model import FetchError
from tca_runtime.garbage import settle_garbage
from tca_runtime.gguf_file import GgufError
from tca_runtime.logs import configure_logging
from tca_runtime.messages import (
    AbortRequest,
    FinishReason,
    GenerateRequest,
    SchedulerFailed,
    SchedulerReady,
    TokenBatch,
    TokenOutput,
    ToScheduler,
)
from tca_runtime.models.errors import ModelError
from tca_runtime.scheduler.choices import kv_cache_gib, log_choices
from tca_runtime.scheduler.outbox import Outbox
from tca_runtime.scheduler.rehearsal import rehearse
from tca_runtime.scheduler.repetition import create_repetition
from tca_runtime.scheduler.scheduler import Scheduler
from tca_runtime.sparsity.chooser import REQUEST_PARAMS
from tca_runtime.sparsity.settings import ConfigurationError
from tca_runtime.stdio import survive_full_disk
from tca_runtime.tokenizer.loading import TokenizerError, load_tokenizer

logger = logging.getLogger(__name__)

# Makes the process print the stacks of all its threads, whatever they are doing.
STACKS_SIGNAL = signal.SIGUSR1

# Mistakes of whoever started the server: their message says all, a traceback would hide it.
_USER_ERRORS = (ModelError, FetchError, GgufError, TokenizerError, ConfigurationError)


@dataclass(frozen=True)
class Addresses:
    """ZMQ endpoints; each is bound by its receiver."""

    scheduler: str
    tokenizer: str


def run_scheduler(config: RuntimeConfig, addresses: Addresses) -> None:
    """Load the model and serve until killed. A crash is reported, then exits with status 1."""
    survive_full_disk()
    configure_logging(config.server, "scheduler")
    # Ctrl-C and some service managers reach all processes; the launcher ends this one itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable(file=2)
    faulthandler.register(STACKS_SIGNAL, file=2)
    parent = multiprocessing.parent_process()
    launcher = parent.pid if parent is not None else os.getppid()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox: Receiver[ToScheduler] = Receiver(context, addresses.scheduler, ToScheduler)
    outbox = Outbox(context, addresses.tokenizer, lambda rid: inbox.inject(AbortRequest(rid=rid)))
    inbox.on_unreadable = lambda message: _refuse(outbox, message)
    try:
        scheduler = _build(config, inbox, outbox)
        settle_garbage()
        # A launcher that was killed cannot end its children.
        while os.getppid() == launcher:
            scheduler.run_once()
    except Exception as error:
        known = isinstance(error, _USER_ERRORS)
        text = traceback.format_exc()
        if not known or logger.isEnabledFor(logging.DEBUG):
            print(text, file=sys.stderr)
        outbox.send(SchedulerFailed(traceback=text, reason=str(error) if known else ""))
        outbox.close()
        inbox.close()
        context.term()
        sys.exit(1)


def _refuse(outbox: Outbox, message: UnreadableMessage) -> None:
    """Answer a request that could not be read, if it is known which one it was."""
    logger.error("%s", message)
    if message.tag != GenerateRequest.__name__:
        return
    reason = FinishReason("abort", message="the scheduler could not read the request", status=500)
    for rid in message.rids or ():
        outbox.send(TokenBatch(outputs=[TokenOutput(rid=rid, token_ids=[], finish=reason)]))


def _build(config: RuntimeConfig, inbox: Receiver[ToScheduler], outbox: Outbox) -> Scheduler:
    engine = Engine(config)
    engine.warm_up()
    model = engine.model_config
    context_length = config.model.context_length or model.max_position
    if engine.device.type == "cuda":
        rehearse(config, engine, context_length)
    tokenizer = load_tokenizer(config.model)
    grammars = GrammarCompiler(tokenizer, model.vocab_size, model.eos_token_ids)
    repetition = create_repetition(
        config.sparsity,
        engine,
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        context_length,
    )
    scheduler = Scheduler(config, engine, grammars, inbox, outbox, context_length, repetition)
    info: dict[str, Any] = {
        "model_type": model.model_type,
        "architectures": [model.architecture],
        "context_length": context_length,
        "vocab_size": model.vocab_size,
        "custom_params": list(REQUEST_PARAMS),
        "dtype": str(engine.shape.dtype).removeprefix("torch."),
        "device": str(engine.device),
        "attention_backend": type(engine.backend).__name__,
        "num_threads": torch.get_num_threads(),
        "kv_cache_gb": kv_cache_gib(engine),
        **scheduler.state(),
    }
    log_choices(config, engine)
    outbox.send(SchedulerReady(info=info))
    return scheduler
