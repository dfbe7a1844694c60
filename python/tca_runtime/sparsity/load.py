"""From command-line settings to the sparsity a server runs with."""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib import resources
from pathlib import Path

from tca_runtime.config import SparsityArgs
from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.policies import SelectionPolicy, create_policy
from tca_runtime.sparsity.settings import (
    CalibrationFile,
    ConfigurationError,
    ModelIdentity,
    SparsitySettings,
)

logger = logging.getLogger(__name__)

UNIFORM = "uniform:"


def load_settings(
    args: SparsityArgs, identity: ModelIdentity, model_path: str
) -> SparsitySettings | None:
    """The settings to serve with; None for full attention.

    Raises
    ------
    ConfigurationError
        For a file or a ratio that does not fit the model, an unknown threshold, policy or
        option of a policy, a confidence that is no probability, or no probes.
    """
    if not 0.0 <= args.tca_min_confidence <= 1.0:
        raise ConfigurationError(
            f"--tca-min-confidence must be in [0, 1], got {args.tca_min_confidence:g}"
        )
    for flag, count in (
        ("--tca-probes", args.tca_probes),
        ("--tca-prefill-probes", args.tca_prefill_probes),
    ):
        if count is not None and count < 1:
            raise ConfigurationError(f"{flag} must be at least 1, got {count}")
    if args.disable_tca:
        return None
    policy = _policy(args.tca_policy)
    if args.tca_config is not None and args.tca_config.startswith(UNIFORM):
        settings = _uniform(args, identity, policy)
    else:
        path = Path(args.tca_config) if args.tca_config else shipped(identity, args.tca_threshold)
        if path is None:
            logger.warning(
                "no TCA configuration for this model: serving with full attention. Calibrate with\n"
                "  python -m tca_runtime.calibrate --model-path %s --ratio 0.15,0.39 "
                "--output tca.json\n"
                "and serve with --tca-config tca.json, or try --tca-config uniform:0.39",
                model_path,
            )
            return None
        settings = _calibrated(identity, path, policy)
    if args.tca_kept_ratio is not None:
        settings = _scaled(settings, args.tca_kept_ratio)
    return replace(
        settings,
        min_candidates=args.tca_min_candidates,
        prefill_probes=args.tca_prefill_probes,
        first_refresh=args.tca_first_refresh,
        refresh=args.tca_refresh,
        tail=args.tca_tail,
        min_confidence=args.tca_min_confidence,
        one_shot=args.tca_selection == "one-shot",
        window=settings.window if args.tca_window is None else args.tca_window,
        probes=settings.probes if args.tca_probes is None else args.tca_probes,
    )


def shipped(identity: ModelIdentity, threshold: float) -> Path | None:
    """The configuration that comes with the runtime for this model; None for other models.

    Raises
    ------
    ConfigurationError
        If there are some for this model, but of other thresholds.
    """
    directory = Path(str(resources.files("tca_runtime.sparsity"))) / "configs"
    paths: dict[float, Path] = {}
    for path in sorted(directory.glob("*.json")):
        found = CalibrationFile.load(path)
        if found.fingerprint == identity.fingerprint:
            paths[found.threshold] = path
    if paths and threshold not in paths:
        known = ", ".join(f"{value:g}" for value in sorted(paths))
        raise ConfigurationError(
            f"--tca-threshold {threshold:g}: this model has configurations for {known}"
        )
    return paths.get(threshold)


def _policy(text: str) -> SelectionPolicy:
    try:
        return create_policy(text)
    except ValueError as error:
        raise ConfigurationError(f"--tca-policy {text}: {error}") from error


def _uniform(
    args: SparsityArgs, identity: ModelIdentity, policy: SelectionPolicy
) -> SparsitySettings:
    assert args.tca_config is not None
    flag = f"--tca-config {args.tca_config}"
    ratios = _ratios(flag, args.tca_config.removeprefix(UNIFORM))
    try:
        prefill, decode = (
            BudgetTable.uniform(ratio, identity.num_layers, identity.num_kv_heads)
            for ratio in ratios
        )
    except ValueError as error:
        raise ConfigurationError(f"{flag}: {error}") from error
    return SparsitySettings(policy, prefill, decode)


def _scaled(settings: SparsitySettings, wanted: str) -> SparsitySettings:
    flag = f"--tca-kept-ratio {wanted}"
    prefill, decode = _ratios(flag, wanted)
    try:
        return replace(
            settings,
            prefill=settings.prefill.at_ratio(prefill),
            decode=settings.decode.at_ratio(decode),
        )
    except ValueError as error:
        raise ConfigurationError(f"{flag}: {error}") from error


def _ratios(flag: str, text: str) -> tuple[float, float]:
    """Of prefill and decode views."""
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"{flag}: {error}") from error
    if len(ratios) not in (1, 2):
        raise ConfigurationError(f"{flag}: one ratio or two are expected")
    return ratios[0], ratios[-1]


def _calibrated(identity: ModelIdentity, path: Path, policy: SelectionPolicy) -> SparsitySettings:
    found = CalibrationFile.load(path)
    found.check(identity, path)
    logger.info("TCA configuration %s (threshold %g)", path, found.threshold)
    return SparsitySettings(
        policy,
        found.prefill.table(found.block),
        found.decode.table(found.block),
        window=found.window,
        probes=found.probes,
    )
