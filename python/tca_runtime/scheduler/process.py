"""Entry of the scheduler process."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from dataclasses import dataclass
from typing import Any

import torch
import zmq

from tca_runtime.channels import Receiver, Sender
from tca_runtime.config import RuntimeConfig
from tca_runtime.engine.engine import Engine
from tca_runtime.engine.grammar import GrammarCompiler
from tca_runtime.logs import configure_logging
from tca_runtime.messages import SchedulerFailed, SchedulerReady, ToScheduler, ToTokenizer
from tca_runtime.scheduler.choices import kv_cache_gib, log_choices
from tca_runtime.scheduler.scheduler import Scheduler
from tca_runtime.tokenizer.loading import load_tokenizer


@dataclass(frozen=True)
class Addresses:
    """ZMQ endpoints; each is bound by its receiver."""

    scheduler: str
    tokenizer: str


def run_scheduler(config: RuntimeConfig, addresses: Addresses) -> None:
    """Load the model and serve until killed. A crash is reported, then exits with status 1."""
    configure_logging(config.server, "scheduler")
    # Ctrl-C reaches the whole process group; the launcher ends this process itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    outbox: Sender[ToTokenizer] = Sender(context, addresses.tokenizer)
    try:
        inbox: Receiver[ToScheduler] = Receiver(context, addresses.scheduler, ToScheduler)
        scheduler = _build(config, inbox, outbox)
        launcher = os.getppid()
        # A launcher that was killed cannot end its children.
        while os.getppid() == launcher:
            scheduler.run_once()
    except Exception:
        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        outbox.send(SchedulerFailed(traceback=text))
        outbox.close()
        context.term()
        sys.exit(1)


def _build(
    config: RuntimeConfig, inbox: Receiver[ToScheduler], outbox: Sender[ToTokenizer]
) -> Scheduler:
    engine = Engine(config)
    engine.warm_up()
    model = engine.model_config
    context_length = config.model.context_length or model.max_position
    grammars = GrammarCompiler(load_tokenizer(config.model), model.vocab_size, model.eos_token_ids)
    scheduler = Scheduler(config, engine, grammars, inbox, outbox, context_length)
    info: dict[str, Any] = {
        "model_type": model.model_type,
        "architectures": [model.architecture],
        "context_length": context_length,
        "vocab_size": model.vocab_size,
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
