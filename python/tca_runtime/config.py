"""Start-up settings: one frozen dataclass per concern. The CLI is built from their fields."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

DEFAULT_MODEL = "smollm2-135m"


def _option(
    default: Any, help: str, *, choices: Sequence[str] = (), has_options: bool = False
) -> Any:
    """``has_options``: ``:`` and anything may follow a choice."""
    return field(
        default=default, metadata={"help": help, "choices": choices, "has_options": has_options}
    )


@dataclass(frozen=True)
class ModelArgs:
    """Which model, and how it is loaded."""

    model_path: str = _option(
        DEFAULT_MODEL, "a known model's name, a Hugging Face directory, or a GGUF file"
    )
    tokenizer_path: str | None = _option(None, "directory of the tokenizer, if not the model's")
    served_model_name: str | None = _option(None, "name shown to clients")
    dtype: str = _option(
        "auto", "weights and KV cache", choices=("auto", "float32", "bfloat16", "float16")
    )
    device: str = _option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    load_format: str = _option(
        "auto", "'dummy' takes a config and random weights", choices=("auto", "dummy")
    )
    model_config: str | None = _option(
        None, "named shape for --load-format dummy, e.g. llama-3.1-8b"
    )
    context_length: int | None = _option(None, "longest prompt + output, if not the model's")
    chat_template: str | None = _option(None, "file with a Jinja chat template")


@dataclass(frozen=True)
class CacheArgs:
    """Memory of the KV cache."""

    max_total_tokens: int | None = _option(
        None, "capacity of the slot pool, in tokens of a full cache"
    )
    mem_fraction: float = _option(
        0.85,
        "share of device memory for weights and KV cache; on the CPU the cache takes half of this "
        "share of what is free, 8 GiB at most",
    )
    disable_radix_cache: bool = _option(False, "never share a prefix")


@dataclass(frozen=True)
class SchedulerArgs:
    """Batching and admission."""

    max_running_requests: int = _option(64, "requests that decode together")
    max_queued_requests: int = _option(4096, "waiting requests before 503")
    queue_timeout: float = _option(
        600.0, "seconds a request may wait for admission before 503; 0 is no limit"
    )
    request_timeout: float = _option(
        3600.0, "seconds a request may take, waiting included, before 504; 0 is no limit"
    )
    chunked_prefill_size: int | None = _option(
        None, "prompt tokens computed per step at most; default 8192 on a GPU, 2048 on the CPU"
    )
    max_decode_slowdown: float = _option(
        2.2,
        "how many times as long as a decode step a step may take that also computes part of a "
        "prompt; more where more than half as many prompts wait as requests decode; 0 is no limit",
    )
    schedule_policy: str = _option(
        "lpm", "order of admission: longest prefix match or arrival", choices=("lpm", "fcfs")
    )
    mixed_batches: bool = _option(True, "decode running requests in the steps that prefill")
    disable_overlap: bool = _option(
        False, "on a GPU, plan a step only when the tokens of the one before it are known"
    )
    random_seed: int | None = _option(None, "seed of the seeds drawn for unseeded requests")

    def chunk_on(self, device: str) -> int:
        """Prompt tokens per step on a kind of device."""
        return self.chunked_prefill_size or (8192 if device == "cuda" else 2048)


@dataclass(frozen=True)
class AttentionArgs:
    """Kernels."""

    attention_backend: str = _option(
        "auto", "attention implementation", choices=("auto", "torch", "cpu", "flashinfer", "triton")
    )


@dataclass(frozen=True)
class SparsityArgs:
    """TCA-Attention: per-head core context."""

    disable_tca: bool = _option(False, "plain full attention")
    tca_config: str | None = _option(
        None,
        "calibration file, 'uniform:RATIO' or 'uniform:PREFILL,DECODE'; known models have one",
    )
    tca_threshold: float = _option(0.95, "which of a known model's configurations is used")
    tca_kept_ratio: str | None = _option(
        None, "RATIO or PREFILL,DECODE: scale all heads' budgets so that they keep this on average"
    )
    tca_policy: str = _option(
        "tca",
        "what ranks tokens, and its options: NAME or NAME:OPTION=VALUE,...",
        has_options=True,
        choices=(
            "tca",
            "pages",
            "snapkv",
            "keydiff",
            "expected-attention",
            "streaming",
            "topk",
            "quest",
            "h2o",
            "full",
        ),
    )
    tca_selection: str = _option(
        "per-chunk",
        "select while a prompt is computed too, or compute it with full attention",
        choices=("per-chunk", "one-shot"),
    )
    tca_probes: int | None = _option(None, "latest queries that score (1 is the paper)")
    tca_prefill_probes: int | None = _option(
        None, "those of them that score while a prompt is computed; all if not given"
    )
    tca_window: int | None = _option(None, "latest tokens that are never dropped")
    tca_min_candidates: int = _option(512, "below this many droppable tokens all are kept")
    tca_first_refresh: int = _option(
        16, "generated tokens after which a decode view is selected anew, then as output doubles"
    )
    tca_refresh: int = _option(1024, "most generated tokens between selections of a decode view")
    tca_tail: int = _option(512, "last tokens of a prompt that attend to everything before them")
    tca_min_confidence: float = _option(
        0.0,
        "decode with a fifth of the prompt until a token is less likely than this, draw it again "
        "with all that is configured; 0 never begins with less",
    )
    tca_retention: str = _option(
        "on-pressure",
        "when unselected slots leave the device",
        choices=("on-pressure", "immediate", "never"),
    )
    tca_repetition: str = _option(
        "auto",
        "while idle, have the model repeat cold prefixes, so that pruning them costs less; "
        "auto does it on a GPU without a host tier",
        choices=("auto", "on", "off"),
    )
    host_cache_size: float | None = _option(
        None, "GiB of host memory for demoted slots; 0 is off, default a share of what is free"
    )


@dataclass(frozen=True)
class ServerArgs:
    """HTTP."""

    host: str = _option("127.0.0.1", "address to listen on")
    port: int = _option(30000, "port to listen on")
    api_key: str | None = _option(
        None, "bearer token that clients must send; several are separated by commas"
    )
    admin_api_key: str | None = _option(
        None, "bearer token for flush_cache, abort_request, profiling and tca/tree"
    )
    log_level: str = _option("info", "verbosity", choices=("debug", "info", "warning", "error"))
    log_format: str = _option("text", "log lines", choices=("text", "json"))
    profile_dir: str = _option("profiles", "traces are written there, or below")
    max_body_bytes: int = _option(64 << 20, "largest accepted request body")


@dataclass(frozen=True)
class FaultArgs:
    """What happens when something breaks, and at the end."""

    restart_on_crash: bool = _option(False, "start the scheduler anew when it dies or hangs")
    max_restarts: int = _option(5, "restarts within ten minutes before the server gives up")
    watchdog_timeout: float = _option(
        300.0, "seconds without a sign of the scheduler until it counts as crashed; 0 is off"
    )
    shutdown_timeout: float = _option(
        30.0, "seconds that open requests may run on after SIGTERM before they are ended"
    )


@dataclass(frozen=True)
class RuntimeConfig:
    """All settings of one server."""

    model: ModelArgs = ModelArgs()
    cache: CacheArgs = CacheArgs()
    scheduler: SchedulerArgs = SchedulerArgs()
    attention: AttentionArgs = AttentionArgs()
    sparsity: SparsityArgs = SparsityArgs()
    server: ServerArgs = ServerArgs()
    faults: FaultArgs = FaultArgs()


def parse_args(argv: Sequence[str] | None = None) -> RuntimeConfig:
    """Build the configuration from command-line flags.

    Raises
    ------
    SystemExit
        On an unknown flag or a value of the wrong type, with argparse's message.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tca_runtime.launch_server",
        description="Serve a language model with a per-head sparse, prefix-shared KV cache.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    groups: dict[str, type[Any]] = get_type_hints(RuntimeConfig)
    for name, cls in groups.items():
        _add_group(parser.add_argument_group(name, cls.__doc__), cls)
    values = vars(parser.parse_args(argv))
    return RuntimeConfig(
        **{
            name: cls(**{f.name: values[f.name] for f in fields(cls)})
            for name, cls in groups.items()
        }
    )


def _add_group(group: Any, cls: type[Any]) -> None:
    hints = get_type_hints(cls)
    for f in fields(cls):
        flag = "--" + f.name.replace("_", "-")
        hint = hints[f.name]
        if hint is bool:
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=f.default,
                help=f.metadata["help"],
            )
            continue
        base = next((t for t in get_args(hint) if t is not type(None)), hint)
        choices, text = f.metadata["choices"], f.metadata["help"]
        if f.metadata["has_options"]:
            base, text = _with_options(choices), f"{text}; {', '.join(choices)}"
            choices = ()
        group.add_argument(flag, type=base, default=f.default, choices=choices or None, help=text)


def _with_options(choices: Sequence[str]) -> Callable[[str], str]:
    def check(text: str) -> str:
        name = text.partition(":")[0]
        if name not in choices:
            known = ", ".join(choices)
            raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {known})")
        return text

    return check
