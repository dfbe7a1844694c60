"""The SGLang frontend language, unmodified, against a real server and model."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

pytestmark = pytest.mark.slow

METHODS = [
    "token_length_normalized",
    "greedy_token_selection",
    "unconditional_likelihood_normalized",
]


def test_gen(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user("What is the capital of France?")
        s += sgl.assistant(sgl.gen("answer", max_tokens=24, temperature=0))

    state = program.run()
    assert "Paris" in state["answer"]
    assert state.get_meta_info("answer")["finish_reason"]["type"] == "stop"


def test_multi_turn_shares_the_prefix(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.system("You are a helpful assistant. " * 10)
        s += sgl.user("Name a fruit.")
        s += sgl.assistant(sgl.gen("first", max_tokens=16, temperature=0))
        s += sgl.user("Name another one.")
        s += sgl.assistant(sgl.gen("second", max_tokens=16, temperature=0))

    state = program.run()
    first, second = state.get_meta_info("first"), state.get_meta_info("second")
    assert second["cached_tokens"] >= first["prompt_tokens"] - 1


def test_stream_equals_gen(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "Once upon a time" + sgl.gen("story", max_tokens=24, temperature=0)

    pieces = list(program.run(stream=True).text_iter(var_name="story"))
    assert len(pieces) > 3
    assert "".join(pieces) == program.run()["story"]


@pytest.mark.parametrize("method", METHODS)
def test_select(sgl: Any, backend: Any, method: str) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "Q: What is the capital of France?\nA: The capital of France is "
        s += sgl.select(
            "city",
            choices=["Paris", "a banana", "Tuesday"],
            temperature=0.0,
            choices_method=getattr(sgl, method),
        )

    state = program.run()
    assert state["city"] == "Paris"
    entries = state.get_meta_info("city")["input_token_logprobs"]
    assert all(entry[0] is not None for choice in entries for entry in choice)


@pytest.mark.parametrize("method", METHODS)
def test_select_after_a_repeated_token(sgl: Any, backend: Any, method: str) -> None:
    # The client takes the first entry for a healed token here and needs its logprob.
    @sgl.function
    def program(s: Any) -> None:
        s += "no no no no no"
        s += sgl.select(
            "next", choices=[" no", " hippopotamus"], choices_method=getattr(sgl, method)
        )

    state = program.run()
    assert state["next"] in (" no", " hippopotamus")


def test_regex_and_types(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "The address of localhost is "
        s += sgl.gen("ip", regex=r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", max_tokens=24)
        s += "\nThe number of days in a week is "
        s += sgl.gen("days", dtype=int, max_tokens=8, temperature=0)
        s += "\nIs water wet? "
        s += sgl.gen("wet", dtype=bool, max_tokens=8, temperature=0)

    state = program.run()
    assert re.fullmatch(r"(\d{1,3}\.){3}\d{1,3}", state["ip"])
    assert re.fullmatch(r"[-+]?[0-9]+", state["days"].strip())
    assert state["wet"] in ("True", "False")


def test_json_schema(sgl: Any, backend: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }

    @sgl.function
    def program(s: Any) -> None:
        s += "Describe a person as JSON: "
        s += sgl.gen("person", json_schema=json.dumps(schema), max_tokens=120, temperature=0)

    person = json.loads(program.run()["person"])
    assert isinstance(person["name"], str) and isinstance(person["age"], int)


def test_fork(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "Three facts about the sea, told at length to somebody who has never seen it. "
        s.sync()
        forks = s.fork(3)
        for i, fork in enumerate(forks):
            fork += f"Fact {i + 1}:" + sgl.gen("fact", max_tokens=12, temperature=0)
        for fork in forks:
            s += fork["fact"]

    state = program.run()
    assert len(state.text()) > 100


def test_run_batch(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any, country: str) -> None:
        s += "Capitals of countries, one after the other, without any further explanation.\n"
        s += f"The capital of {country} is" + sgl.gen("city", max_tokens=4, temperature=0)

    countries = ["France", "Italy", "Spain", "Japan"] * 3
    states = program.run_batch([{"country": country} for country in countries], num_threads=12)
    cities = [state["city"] for state in states]
    assert cities[:4] == cities[4:8] == cities[8:]
    assert "Paris" in cities[0]


def test_cache_prefix_and_flush(sgl: Any, backend: Any) -> None:
    prefix = "A long common beginning of many prompts that are still to come. " * 8

    @sgl.function
    def program(s: Any) -> None:
        s += prefix + sgl.gen("rest", max_tokens=1, temperature=0)

    def cached() -> int:
        return int(program.run().get_meta_info("rest")["cached_tokens"])

    backend.flush_cache()
    backend.cache_prefix(prefix)
    assert cached() > 50
    backend.flush_cache()
    assert cached() == 0
    assert backend.get_server_info()["kv_cache"]["total_slots"] > 0
