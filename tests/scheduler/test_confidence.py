"""Requests that begin with little in view, and read more once they are not sure."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tca_runtime.messages import AbortRequest, FinishReason, LogprobOptions
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.sparsity.chooser import LITTLE
from tests.scheduler.tiny_server import Server, prompt

# A random model is as sure as that of hardly anything, and of anything at all.
NEVER, ALWAYS = 0.9999, 1e-30


def report(server: Server, rid: str) -> dict[str, Any]:
    found = server.last(rid).tca
    assert found is not None
    return found


def sampled(max_new: int, **params: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new, ignore_eos=True, seed=5, **params)


def test_a_sure_request_decodes_with_little() -> None:
    server = Server()
    server.submit("usual", prompt(1, 1000))
    server.submit("sure", prompt(1, 1000), min_confidence=ALWAYS)
    server.run()
    usual, sure = report(server, "usual"), report(server, "sure")
    assert sure["kept_ratio"] < usual["kept_ratio"] and "raised_at" not in sure
    assert sure["kept_ratio"] == pytest.approx(LITTLE, abs=0.1)
    assert server.scheduler.state()["num_raised"] == 0
    assert server.last("sure").cached_tokens > 900, "both share what is cached"


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_unsure_token_is_drawn_again_with_more(overlap: bool, temperature: float) -> None:
    server = Server(overlap=overlap)
    text = prompt(1, 1000)
    wanted = sampled(12, temperature=temperature, custom_params={"min_confidence": NEVER})
    server.send("r", text, wanted)
    server.run()
    found, tokens = report(server, "r"), server.tokens("r")
    assert found["raised_at"] == 1 and len(tokens) == 12
    state = server.scheduler.state()
    assert (state["num_raised"], state["num_retractions"]) == (1, 0)
    # As if the client had sent the first token as the end of a prompt.
    server.send("next", text + tokens[:1], sampled(11, temperature=temperature))
    server.run()
    assert server.tokens("next") == tokens[1:]
    assert report(server, "next")["kept_ratio"] == pytest.approx(found["kept_ratio"])
    server.engine.cache.check()


def test_what_is_drawn_in_vain_is_told_nobody() -> None:
    server = Server(overlap=True)
    limits = {"custom_params": {"min_confidence": NEVER}, "temperature": 0.0}
    server.send("r", prompt(1, 900), sampled(9, **limits), logprobs=LogprobOptions(900, 2))
    server.run()
    outputs = server.outputs("r")
    logprobs = [entry for output in outputs for entry in output.output_logprobs or []]
    assert [token for _, token in logprobs] == server.tokens("r")
    assert server.finish("r").type == "length"
    server.send("quiet", prompt(1, 900), sampled(9, **limits))
    server.run()
    assert server.tokens("quiet") == server.tokens("r")
    assert server.last("quiet").output_logprobs is None


@pytest.mark.parametrize(
    ("server", "params"),
    [
        ({"tca_retention": "immediate"}, {}),
        ({"share": False}, {}),
        ({}, {"frequency_penalty": 0.5}),
        ({"tca_config": "uniform:0.1"}, {}),
        ({"disable_tca": True}, {}),
    ],
    ids=["pruned", "not-cached", "penalised", "little-anyway", "dense"],
)
def test_some_requests_never_begin_with_little(
    server: dict[str, Any], params: dict[str, Any]
) -> None:
    made = Server(**server)
    made.send("r", prompt(1, 900), sampled(9, custom_params={"min_confidence": NEVER}, **params))
    made.send("usual", prompt(1, 900), sampled(9, **params))
    made.run()
    assert made.tokens("r") == made.tokens("usual")
    assert made.scheduler.state()["num_raised"] == 0


def test_a_server_may_begin_all_requests_with_little() -> None:
    server = Server(tca_min_confidence=NEVER)
    for rid, params in {
        "usual": {},
        "own": {"min_confidence": ALWAYS},
        "off": {"min_confidence": 0},
        "mass": {"max_dropped_mass": 0.5},
    }.items():
        server.submit(rid, prompt(1, 900), **params)
    server.run()
    assert report(server, "usual")["raised_at"] == 1
    raised = [rid for rid in ("own", "off", "mass") if "raised_at" in report(server, rid)]
    assert not raised and server.scheduler.state()["num_raised"] == 1
    assert report(server, "own")["kept_ratio"] < report(server, "off")["kept_ratio"]


def test_two_limits_exclude_each_other() -> None:
    server = Server()
    server.submit("r", prompt(1, 20), min_confidence=0.5, max_dropped_mass=0.1)
    server.run()
    finish = server.last("r").finish
    assert isinstance(finish, FinishReason)
    assert finish.status == 400 and "exclude each other" in finish.message


@settings(max_examples=15, deadline=None)
@given(
    confidences=st.lists(st.sampled_from([ALWAYS, 0.02, 0.2, NEVER]), min_size=2, max_size=5),
    aborts=st.lists(st.none() | st.integers(2, 40), min_size=5, max_size=5),
    tokens=st.sampled_from([1300, 6000]),
    overlap=st.booleans(),
    layered=st.booleans(),
)
def test_every_request_ends_once_whoever_is_unsure(
    confidences: list[float], aborts: list[int | None], tokens: int, overlap: bool, layered: bool
) -> None:
    server = Server(tokens=tokens, overlap=overlap)
    server.scheduler.planner.pace.is_layered = layered
    for i, confidence in enumerate(confidences):
        server.submit(f"r{i}", prompt(i % 2, 400 + 50 * i), 20, min_confidence=confidence)
    for step in range(45):
        for i, abort in enumerate(aborts[: len(confidences)]):
            if abort == step:
                server.mail.inbound.append(AbortRequest(rid=f"r{i}"))
        server.scheduler.run_once()
        server.engine.cache.check()
    server.run()
    for i in range(len(confidences)):
        if server.finish(f"r{i}").type != "abort":
            assert len(server.tokens(f"r{i}")) == 20
    assert server.engine.cache.usage().running_slots == 0
