"""Repetition, frequency and presence penalties from per-request token counts on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from tca_runtime.engine.upload import upload

_FIRST_CAPACITY = 4


class TokenCounts:
    """Which tokens each request's prompt holds and how often its output holds them.

    One row per request that is penalised. A step gathers and updates rows; nothing is recounted.
    Memory: 5 bytes per row and vocabulary entry, grown by doubling.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._output = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._free: list[int] = []

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return len(self._prompt) - len(self._free)

    def open(self, prompt_ids: Tensor) -> int:
        """Take a row for a request with this prompt (int64 ids) and no output yet."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._prompt[row] = False
        self._output[row] = 0
        self._prompt[row].index_fill_(0, upload(prompt_ids, self._prompt.device), True)
        return row

    def close(self, row: int) -> None:
        """Give a row back."""
        self._free.append(row)

    def record(self, rows: Tensor, tokens: Tensor) -> None:
        """Count one new output token of each row (int64 ``[N]``; rows are distinct)."""
        self._output[rows, tokens] += 1

    def penalise(
        self, logits: Tensor, rows: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
    ) -> None:
        """Apply all three penalties in place.

        Repetition (as in Hugging Face): seen in prompt or output, a positive logit is divided
        and a negative one multiplied. Frequency and presence (as in OpenAI's API): subtracted
        per occurrence, and once, for tokens of the output.

        Parameters
        ----------
        logits : float32 ``[N, V]``
        rows : int64 ``[N]``
        repetition, frequency, presence : float32 ``[N, 1]``; 1, 0 and 0 change nothing
        """
        counts = self._output[rows]
        in_output = counts > 0
        factor = torch.where(logits > 0, repetition.reciprocal(), repetition)
        logits.copy_(torch.where(self._prompt[rows] | in_output, logits * factor, logits))
        logits.sub_(counts * frequency).sub_(in_output * presence)

    def _grow(self) -> None:
        old = len(self._prompt)
        new = max(_FIRST_CAPACITY, old)
        self._prompt = torch.cat([self._prompt, self._prompt.new_zeros(new, self._prompt.shape[1])])
        self._output = torch.cat([self._output, self._output.new_zeros(new, self._output.shape[1])])
        self._free += range(old + new - 1, old - 1, -1)
