"""What sparsity a server runs with, and the calibration file it comes from."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tca_runtime.sparsity.budget import BudgetTable
from tca_runtime.sparsity.policies import SelectionPolicy

FORMAT_VERSION = 1
# Tokens per block of candidates that this runtime selects with.
BLOCK_SIZE = 64
DEFAULT_WINDOW = 512


class ConfigurationError(ValueError):
    """A calibration file that cannot be used with this model; the message says what differs."""


@dataclass(frozen=True)
class ModelIdentity:
    """What of a model a calibration depends on. ``fingerprint`` hashes a sample of its weights."""

    fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int


class PhaseBudget(msgspec.Struct, frozen=True, kw_only=True):
    """Budgets of one phase (prefill views, or decode views): lists are ``[L][Hkv]``."""

    mu: list[list[float]]
    sigma: list[list[float]]
    keep_ratio: list[list[float]] = []
    retained_mass: list[list[float]] = []

    def table(self, block: int) -> BudgetTable:
        mu = np.array(self.mu, dtype=np.float64)
        return BudgetTable(mu, np.array(self.sigma, dtype=np.float64), block)


class CalibrationFile(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON that ``tca_runtime.calibrate`` writes."""

    version: int
    model: str
    fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block: int
    window: int
    probes: int
    threshold: float
    objective: str
    data_sha256: str
    seed: int
    prefill: PhaseBudget
    decode: PhaseBudget
    report: dict[str, Any] = {}

    @staticmethod
    def load(path: Path) -> CalibrationFile:
        """Read a file.

        Raises
        ------
        ConfigurationError
            When it is missing, not such a file, or of another version.
        """
        try:
            found = msgspec.json.decode(path.read_bytes(), type=CalibrationFile)
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigurationError(
                f"cannot read the TCA configuration {path}: {error}"
            ) from error
        if found.version != FORMAT_VERSION:
            raise ConfigurationError(
                f"{path} has format version {found.version}, this runtime reads {FORMAT_VERSION}"
            )
        return found

    def check(self, identity: ModelIdentity, path: Path) -> None:
        """Raise ConfigurationError naming the first thing that does not fit the model."""
        for name in ("num_layers", "num_kv_heads", "head_dim", "fingerprint"):
            mine, theirs = getattr(self, name), getattr(identity, name)
            if mine != theirs:
                raise ConfigurationError(
                    f"{path} was calibrated for another model: {name} is {mine} there, "
                    f"{theirs} in the model being served"
                )
        if self.block != BLOCK_SIZE:
            raise ConfigurationError(
                f"{path} was calibrated with blocks of {self.block} tokens, "
                f"this runtime selects with blocks of {BLOCK_SIZE}"
            )
        for phase, budget in (("prefill", self.prefill), ("decode", self.decode)):
            shape = np.shape(np.array(budget.mu, dtype=object))
            if shape[:2] != (self.num_layers, self.num_kv_heads):
                raise ConfigurationError(f"{path}: {phase} budgets have shape {shape}")


@dataclass(frozen=True, eq=False)
class SparsitySettings:
    """Selection as the engine runs it.

    Attributes
    ----------
    policy : ranks candidates
    prefill, decode : budgets of the views used while a prompt is computed, and after it
    window : latest tokens that are never candidates; the window's start is aligned down to a
        block, so candidates are whole blocks
    probes : latest queries that score (1 is the paper)
    prefill_probes : those that score for a prefill view, None for all; fewer cost less time and
        some accuracy (docs/quality.md)
    min_candidates : below this many droppable tokens everything is kept
    granularity : a chunk is split so that this many queries at most share a selection; longer runs
        drop less, because a run sees all of itself, and cost fewer selections (docs/quality.md)
    first_refresh, refresh : a decode view is selected anew after ``first_refresh`` generated
        tokens, because what an answer needs changes most while it begins, then whenever the
        output has doubled, and every ``refresh`` tokens at the latest
    refresh_probes : latest generated tokens at most whose queries score then
    tail : last tokens of a prompt whose queries see their whole past; a question is usually there,
        and what its queries find decides the answer
    one_shot : prompts are computed with full attention, only the decode view is selected
    min_confidence : of requests that do not say it themselves, see ``RequestSparsity``; 0 for none
    """

    policy: SelectionPolicy
    prefill: BudgetTable
    decode: BudgetTable
    window: int = DEFAULT_WINDOW
    probes: int = 32
    prefill_probes: int | None = None
    min_candidates: int = 512
    granularity: int = 4096
    first_refresh: int = 16
    refresh: int = 1024
    refresh_probes: int = 8
    tail: int = 512
    one_shot: bool = False
    min_confidence: float = 0.0

    @property
    def block(self) -> int:
        return self.decode.block

    def num_candidates(self, num_past: int) -> int:
        """How many of ``num_past`` tokens may be dropped: whole blocks outside the window."""
        count = max(0, num_past - self.window) // self.block * self.block
        return count if count >= self.min_candidates else 0

    def first_selection(self, quantum: int) -> int:
        """The first multiple of ``quantum`` where a prompt's chunk selects what it attends to."""
        if self.one_shot:
            return sys.maxsize
        blocks = max(1, -(-self.min_candidates // self.block))
        return -(-(self.window + blocks * self.block) // quantum) * quantum

    @property
    def num_prefill_probes(self) -> int:
        """Queries that score for a prefill view."""
        return self.probes if self.prefill_probes is None else min(self.prefill_probes, self.probes)

    @property
    def num_refresh_probes(self) -> int:
        """Queries that score in a refresh: no more than were generated before the first."""
        return min(self.refresh_probes, self.probes, self.first_refresh, self.refresh)

    def refresh_after(self, num_output: int) -> int:
        """Tokens until the next selection after one that was made ``num_output`` tokens in."""
        return min(max(num_output, self.first_refresh), self.refresh)

    @property
    def fingerprint(self) -> str:
        """Names everything that decides what a cache pruned under these settings holds."""
        digest = hashlib.sha256(repr(self.policy).encode())
        for table in (self.prefill, self.decode):
            digest.update(table.mu.tobytes() + table.sigma.tobytes())
        rest = (
            self.window,
            self.probes,
            self.num_prefill_probes,
            self.min_candidates,
            self.granularity,
            self.tail,
            self.block,
            self.one_shot,
        )
        digest.update(repr(rest).encode())
        return digest.hexdigest()[:16]
