"""``/generate`` as SGLang's clients use it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests

from tests.server.fake_scheduler import DEFAULT_ANSWER, SCRIPT, logprob_of
from tests.server.harness import Server, eventually
from tests.tokenizer.toy_tokenizers import EOS, IM_END


def events(response: requests.Response) -> list[dict[str, Any]]:
    """The objects of a stream, which must end with [DONE]."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith(b"data: ") for line in lines)
    assert lines[-1] == b"data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def stream(server: Server, **body: Any) -> list[dict[str, Any]]:
    response = server.post("/generate", {**body, "stream": True}, stream=True)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events(response)


def script(**params: Any) -> dict[str, Any]:
    """Sampling parameters with a script for the fake scheduler."""
    custom = {k: v for k, v in params.items() if k in SCRIPT}
    return {**{k: v for k, v in params.items() if k not in SCRIPT}, "custom_params": custom}


def test_single_prompt(server: Server) -> None:
    reply = server.generate(text="hello world")
    meta = reply["meta_info"]
    ids = server.tokenizer.encode(DEFAULT_ANSWER) + [server.tokenizer.eos_token_id]
    assert reply["text"] == DEFAULT_ANSWER
    assert reply["output_ids"] == ids
    assert meta["finish_reason"] == {"type": "stop", "matched": ids[-1]}
    assert meta["prompt_tokens"] == len(server.tokenizer.encode("hello world"))
    assert meta["completion_tokens"] == len(ids)
    assert meta["cached_tokens"] == meta["prompt_tokens"] // 2
    assert meta["e2e_latency"] > 0
    assert meta["id"] and meta["num_retractions"] == 0
    assert "tca" not in meta and "input_token_logprobs" not in meta


def test_put_is_accepted_and_unknown_fields_and_nulls_are_ignored(server: Server) -> None:
    body = {
        "text": "hello",
        "model": None,
        "log_metrics": True,
        "background": False,
        "lora_path": None,
        "return_logprob": None,
        "data_parallel_rank": 0,
        "sampling_params": {
            "stop": None,
            "stop_token_ids": [],
            "stop_regex": [],
            "regex": None,
            "json_schema": None,
            "top_k": -1,
            "wishes": 3,
        },
    }
    response = requests.put(server.url + "/generate", json=body, timeout=30)
    assert response.status_code == 200
    assert response.json()["text"] == DEFAULT_ANSWER


def test_special_token_text_becomes_special_ids(server: Server) -> None:
    reply = server.generate(text=f"{EOS}{IM_END}", sampling_params={"max_new_tokens": 0})
    assert reply["meta_info"]["prompt_tokens"] == 2


def test_length_and_zero_tokens(server: Server) -> None:
    reply = server.generate(text="hello", sampling_params={"max_new_tokens": 3})
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 3}
    assert reply["meta_info"]["completion_tokens"] == 3
    reply = server.generate(text="hello", sampling_params={"max_new_tokens": 0})
    assert reply["text"] == "" and reply["output_ids"] == []
    assert reply["meta_info"]["prompt_tokens"] == len(server.tokenizer.encode("hello"))


def test_null_max_new_tokens_asks_for_what_fits(server: Server) -> None:
    server.generate(input_ids=[5, 6, 7], sampling_params={"max_new_tokens": None})
    assert server.scheduler.received[-1].sampling.max_new_tokens == 512 - 3


@pytest.mark.parametrize("per_message", [1, 3, 100])
def test_stop_string_is_trimmed_and_aborts(server: Server, per_message: int) -> None:
    params = script(stop="quick", per_message=per_message, answer="the quick brown fox" * 5)
    reply = server.generate(text="hello", sampling_params=params)
    rid = server.scheduler.received[-1].rid
    assert reply["text"] == "the "
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": "quick"}
    assert server.tokenizer.decode(reply["output_ids"]).startswith("the quick")
    assert len(server.tokenizer.decode(reply["output_ids"])) < len("the quick") + 8
    if per_message < 100:
        eventually(lambda: rid in server.scheduler.aborted)


def test_no_stop_trim_keeps_the_stop(server: Server) -> None:
    params = {"stop": ["quick", ""], "no_stop_trim": True}
    assert server.generate(text="a", sampling_params=params)["text"] == "hello world, the quick"


def test_stop_string_goes_before_eos_and_length(server: Server) -> None:
    params = script(answer="hello the", stop="the", per_message=100)
    reply = server.generate(text="a", sampling_params=params)
    assert reply["meta_info"]["finish_reason"]["matched"] == "the"
    count = len(server.tokenizer.encode("hello the"))
    reply = server.generate(text="a", sampling_params={**params, "max_new_tokens": count})
    assert reply["meta_info"]["finish_reason"]["matched"] == "the"


def test_stop_string_that_is_a_special_token(server: Server) -> None:
    params = script(answer=f"hello{EOS}world", stop=[EOS], per_message=100)
    reply = server.generate(text="a", sampling_params=params)
    assert reply["text"] == "hello"
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
    kept = {**params, "skip_special_tokens": False, "no_stop_trim": True}
    assert server.generate(text="a", sampling_params=kept)["text"] == f"hello{EOS}"


def test_stop_token_id_is_no_text(server: Server) -> None:
    comma = server.tokenizer.encode("world,")[-1]
    reply = server.generate(text="a", sampling_params={"stop_token_ids": [comma]})
    assert reply["text"] == "hello world"
    assert reply["output_ids"][-1] == comma
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": comma}


def test_stop_regex(server: Server) -> None:
    reply = server.generate(text="a", sampling_params={"stop_regex": r",\s+t"})
    assert reply["text"] == "hello world"
    assert reply["meta_info"]["finish_reason"]["matched"] == r",\s+t"


def test_min_new_tokens_disarms_stops(server: Server) -> None:
    params = script(answer="hello hello hello hello", stop="hello", min_new_tokens=2)
    reply = server.generate(text="a", sampling_params=params)
    assert reply["text"].startswith("hello")
    assert reply["meta_info"]["completion_tokens"] > 2


def test_skip_special_tokens(server: Server) -> None:
    params = script(answer=f"hello{EOS} world")
    assert server.generate(text="a", sampling_params=params)["text"] == "hello world"
    params["skip_special_tokens"] = False
    assert server.generate(text="a", sampling_params=params)["text"] == f"hello{EOS} world"


def test_stream_is_cumulative_and_only_grows(server: Server) -> None:
    params = script(answer="naïve 🙂 café, grüße", delay=0.02)
    chunks = stream(server, text="hello", sampling_params=params)
    texts = [chunk["text"] for chunk in chunks]
    assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
    assert texts[-1] == "naïve 🙂 café, grüße" and not any("\ufffd" in text for text in texts)
    assert len(chunks) > 3 and "index" not in chunks[0]
    reasons = [chunk["meta_info"]["finish_reason"] for chunk in chunks]
    assert reasons[-1]["type"] == "stop" and not any(reasons[:-1])


def test_stream_holds_back_partial_stops(server: Server) -> None:
    params = script(answer="hello wor world", stop=["world"])
    chunks = stream(server, text="hello", sampling_params=params)
    texts = [chunk["text"] for chunk in chunks]
    assert texts[-1] == "hello wor "
    assert all("hello wor ".startswith(text) for text in texts)


def test_unfinished_character_at_the_end(server: Server) -> None:
    ids = server.tokenizer.encode("🙃")
    params = script(answer="🙃", max_new_tokens=len(ids) - 1)
    assert server.generate(text="a", sampling_params=params)["text"] == "\ufffd"


def test_batch_of_texts_keeps_order(server: Server) -> None:
    scripts = [("hello", 0.02), ("the", 0.0), ("fox", 0.0)]
    params = [script(answer=answer, delay=delay) for answer, delay in scripts]
    replies = server.generate(text=["a", "b", "c"], sampling_params=params, rid="mine")
    assert [reply["text"] for reply in replies] == ["hello", "the", "fox"]
    assert [reply["meta_info"]["id"] for reply in replies] == ["mine_0", "mine_1", "mine_2"]


def test_batch_of_one_is_a_list(server: Server) -> None:
    assert [r["text"] for r in server.generate(text=["a"])] == [DEFAULT_ANSWER]
    assert [r["text"] for r in server.generate(input_ids=[[5, 6]])] == [DEFAULT_ANSWER]
    assert server.generate(input_ids=[5, 6])["text"] == DEFAULT_ANSWER


def test_n_makes_a_list_with_derived_seeds(server: Server) -> None:
    replies = server.generate(text="a", sampling_params={"n": 3, "seed": 41}, rid="r")
    assert [r["text"] for r in replies] == [DEFAULT_ANSWER] * 3
    sent = server.scheduler.received[-3:]
    assert [m.sampling.seed for m in sent] == [41, 42, 43]
    assert [m.sampling.n for m in sent] == [1, 1, 1]
    server.generate(text=["a", "b"], sampling_params={"n": 2, "sampling_seed": 7})
    assert [m.sampling.seed for m in server.scheduler.received[-4:]] == [7, 8, 7, 8]


def test_batch_stream_has_indices(server: Server) -> None:
    chunks = stream(
        server, text=["a", "b"], sampling_params=[script(answer="hello"), script(answer="the fox")]
    )
    last = {chunk["index"]: chunk["text"] for chunk in chunks}
    assert last == {0: "hello", 1: "the fox"}
    ended = [c["index"] for c in chunks if c["meta_info"]["finish_reason"]]
    assert sorted(ended) == [0, 1]


def test_output_logprobs(server: Server) -> None:
    meta = server.generate(text="hello world", return_logprob=True)["meta_info"]
    assert meta["input_token_logprobs"] == []
    assert meta["output_token_logprobs_length"] == meta["completion_tokens"]
    first = server.tokenizer.encode(DEFAULT_ANSWER)[0]
    assert meta["output_token_logprobs"][0] == [pytest.approx(logprob_of(first)), first, None]
    assert "output_top_logprobs" not in meta


def test_prompt_logprobs_convention(server: Server) -> None:
    ids = server.tokenizer.encode("hello world")
    zero = {"max_new_tokens": 0}
    reply = server.generate(text="hello world", return_logprob=True, sampling_params=zero)
    meta = reply["meta_info"]
    assert [entry[1] for entry in meta["input_token_logprobs"]] == ids
    assert meta["input_token_logprobs"][0][0] is None
    assert all(entry[0] is not None for entry in meta["input_token_logprobs"][1:])
    assert meta["output_token_logprobs"] == []
    meta = server.generate(
        text="hello world",
        return_logprob=True,
        logprob_start_len=1,
        return_text_in_logprobs=True,
        sampling_params=zero,
    )["meta_info"]
    assert meta["input_token_logprobs"] == [
        [pytest.approx(logprob_of(i)), i, server.tokenizer.decode([i])] for i in ids[1:]
    ]


def test_top_and_chosen_logprobs(server: Server) -> None:
    meta = server.generate(
        input_ids=[5, 6, 7],
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        token_ids_logprob=[9, 1],
        sampling_params={"max_new_tokens": 2},
    )["meta_info"]
    best = [[pytest.approx(logprob_of(t)), t, None] for t in (0, 1)]
    chosen = [[pytest.approx(logprob_of(t)), t, None] for t in (9, 1)]
    assert meta["output_top_logprobs"] == [best, best]
    assert meta["input_top_logprobs"] == [None, best, best]
    assert meta["output_token_ids_logprobs"] == [chosen, chosen]
    assert meta["input_token_ids_logprobs"] == [None, chosen, chosen]


def test_logprobs_stop_where_the_text_stops(server: Server) -> None:
    params = script(answer="hello world, the", stop=",", per_message=100)
    reply = server.generate(text="a", return_logprob=True, sampling_params=params)
    logprobs = reply["meta_info"]["output_token_logprobs"]
    assert [entry[1] for entry in logprobs] == reply["output_ids"]


def test_logprob_fields_broadcast_over_a_batch(server: Server) -> None:
    replies = server.generate(
        text=["hello", "world"],
        return_logprob=[True, False],
        logprob_start_len=0,
        top_logprobs_num=[1, 0],
        sampling_params={"max_new_tokens": 1},
    )
    assert replies[0]["meta_info"]["input_top_logprobs"]
    assert "output_token_logprobs" not in replies[1]["meta_info"]


def test_sampling_fields_reach_the_scheduler(server: Server) -> None:
    params = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 10**9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "frequency_penalty": -1,
        "presence_penalty": 1.5,
        "logit_bias": {"7": 2.5},
        "ignore_eos": True,
        "json_schema": '{"type": "integer"}',
    }
    server.generate(text="a", sampling_params=params, extra_key="tenant", priority=3)
    sent = server.scheduler.received[-1]
    sampling = sent.sampling
    assert (sent.extra_key, sent.priority) == ("tenant", 3)
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.5, 0.9, 0.1)
    assert sampling.top_k == server.manager.limits.vocab_size
    assert sampling.logit_bias == {7: 2.5} and sampling.ignore_eos
    assert sampling.grammar is not None and sampling.grammar.kind == "json_schema"


def test_tca_is_shown_when_given(server: Server) -> None:
    tca = {"kept_ratio": 0.39, "dropped_mass": 0.01}
    reply = server.generate(text="a", sampling_params=script(tca=tca))
    assert reply["meta_info"]["tca"] == tca
