"""A conversation written in the SGLang frontend language.

    pip install --no-deps sglang==0.5.23
    pip install aiohttp ipython msgspec numpy pybase64 pydantic requests tqdm
    python examples/multi_turn_chat.py [--url http://127.0.0.1:30000]

Each turn extends the same prompt, so the server computes only what is new: the last column shows
how many tokens of the prompt were found in its cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types

QUESTIONS = [
    "What is the capital of France?",
    "Name one building that I should see there.",
    "How tall is it?",
]


def import_frontend() -> None:
    """Make ``sglang.lang`` importable without the engine.

    ``import sglang`` loads the whole engine and its dependencies. A program needs the frontend
    only, so an empty package with the same path takes the place of ``sglang/__init__.py``.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.submodule_search_locations is None:
        sys.exit("sglang is missing: pip install --no-deps sglang==0.5.23")
    package = types.ModuleType("sglang")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["sglang"] = package


def main() -> None:
    parser = argparse.ArgumentParser(description="Multi-turn chat in the SGLang language.")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    url = parser.parse_args().url

    import_frontend()
    from sglang.lang import api as sgl
    from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

    @sgl.function
    def chat(s, questions):
        s += sgl.system("You are a helpful travel guide. Answer in one sentence.")
        for turn, question in enumerate(questions):
            s += sgl.user(question)
            s += sgl.assistant(sgl.gen(f"answer_{turn}", max_tokens=64, temperature=0))
        s += sgl.user("Was that helpful?")
        s += sgl.assistant("My answer: " + sgl.select("mood", choices=["yes", "no", "perhaps"]))

    sgl.set_default_backend(RuntimeEndpoint(url, chat_template_name="chatml"))
    state = chat.run(questions=QUESTIONS, stream=True)
    for turn, question in enumerate(QUESTIONS):
        print(f"\n> {question}")
        for piece in state.text_iter(var_name=f"answer_{turn}"):
            print(piece, end="", flush=True)
        meta = state.get_meta_info(f"answer_{turn}")
        print(f"\n  [{meta['prompt_tokens']} prompt tokens, {meta['cached_tokens']} cached]")
    print(f"\nWas that helpful? {state['mood']}")


if __name__ == "__main__":
    main()
