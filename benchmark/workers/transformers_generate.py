"""Worker: Hugging Face transformers' ``generate`` on the CPU, float32, greedy."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from benchmark.workers.pipe import Json, answer_questions


class TokenClock(BaseStreamer):  # type: ignore[misc]
    """Notes when each new token is ready."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        # The first call hands over the prompt.
        if self._saw_prompt:
            self.times.append(time.perf_counter())
        self._saw_prompt = True

    def end(self) -> None:
        pass


def main() -> None:
    """Load the model, then answer ``encode`` and ``generate`` questions."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, help="GGUF file or Hugging Face directory")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    place, options = str(args.model), {}
    if args.model.is_file():
        place, options = str(args.model.parent), {"gguf_file": args.model.name}
    tokenizer = AutoTokenizer.from_pretrained(place, **options)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options).eval()

    def handle(question: Json) -> Json:
        if "encode" in question:
            return {"ids": tokenizer.encode(question["encode"], add_special_tokens=False)}
        return generate(model, question["input_ids"], question["new_tokens"])

    answer_questions(handle)


def generate(model: Any, input_ids: list[int], new_tokens: int) -> Json:
    """Continue one prompt by exactly ``new_tokens`` tokens; times are seconds from the start."""
    ids = torch.tensor([input_ids])
    clock = TokenClock()
    start = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        streamer=clock,
    )
    return {
        "seconds": time.perf_counter() - start,
        "token_times": [t - start for t in clock.times],
        "output_ids": output[0, len(input_ids) :].tolist(),
    }


if __name__ == "__main__":
    main()
