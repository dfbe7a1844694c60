"""The SGLang frontend language, unmodified, against the fake scheduler."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.frontend import load_frontend
from tests.server.fake_scheduler import DEFAULT_ANSWER, logprob_of
from tests.server.harness import Server, eventually


@pytest.fixture(scope="module")
def sgl() -> Any:
    return load_frontend()


@pytest.fixture
def backend(sgl: Any, server: Server) -> Any:
    backend = sgl.RuntimeEndpoint(server.url)
    sgl.set_default_backend(backend)
    return backend


def sent_tokens(server: Server, text: str) -> list[int]:
    ids: list[int] = server.tokenizer.encode(text)
    return ids


def test_gen_with_stop_and_meta_info(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user("hello") + sgl.assistant(sgl.gen("answer", stop="quick", max_tokens=50))

    state = program.run()
    assert state["answer"] == "hello world, the "
    assert state.get_meta_info("answer")["finish_reason"] == {"type": "stop", "matched": "quick"}


def test_stream(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "hello" + sgl.gen("answer", max_tokens=50)

    state = program.run(stream=True)
    assert "".join(state.text_iter(var_name="answer")) == DEFAULT_ANSWER


@pytest.mark.parametrize(("dtype", "regex"), [(int, r"[-+]?[0-9]+[ \n]*"), (bool, "(True|False)")])
def test_types_become_regular_expressions(
    sgl: Any, backend: Any, server: Server, dtype: type, regex: str
) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "hello" + sgl.gen("answer", dtype=dtype)

    program.run().sync()
    grammar = server.scheduler.received[-1].sampling.grammar
    assert grammar is not None and (grammar.kind, grammar.value) == ("regex", regex)


def test_json_schema(sgl: Any, backend: Any, server: Server) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "hello" + sgl.gen("answer", json_schema='{"type": "integer"}')

    program.run().sync()
    grammar = server.scheduler.received[-1].sampling.grammar
    assert grammar is not None and grammar.kind == "json_schema"


METHODS = [
    "token_length_normalized",
    "greedy_token_selection",
    "unconditional_likelihood_normalized",
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prompt", ["hello world, what is", "aaaa"])
def test_select(sgl: Any, backend: Any, server: Server, method: str, prompt: str) -> None:
    choices = [" the quick", " fox", " lazy dog;"]

    @sgl.function
    def program(s: Any) -> None:
        s += prompt
        s += sgl.select("pick", choices=choices, choices_method=getattr(sgl, method))

    state = program.run()
    assert state["pick"] in choices
    entries = state.get_meta_info("pick")["input_token_logprobs"]
    for choice, have in zip(choices, entries, strict=True):
        ids = sent_tokens(server, prompt + choice)
        assert [entry[1] for entry in have] == ids[len(ids) - len(have) :]
        assert all(entry[0] == pytest.approx(logprob_of(entry[1])) for entry in have)


def test_fork_and_join(sgl: Any, backend: Any, server: Server) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "hello"
        s.sync()
        forks = s.fork(3)
        for fork in forks:
            fork += " again" + sgl.gen("answer", max_tokens=2)
        for fork in forks:
            s += fork["answer"]

    before = len(server.scheduler.received)
    program.run().sync()
    budgets = [m.sampling.max_new_tokens for m in server.scheduler.received[before:]]
    assert sorted(budgets) == [0, 2, 2, 2]


def test_run_batch(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any, word: str) -> None:
        s += "a prefix that all of them share and that is longer than sixty-four characters: "
        s += word + sgl.gen("answer", max_tokens=50)

    words = [{"word": str(i)} for i in range(60)]
    states = program.run_batch(words, num_threads=40)
    assert [state["answer"] for state in states] == [DEFAULT_ANSWER] * 60


def test_cache_prefix_flush_and_server_info(sgl: Any, backend: Any, server: Server) -> None:
    backend.cache_prefix("hello world")
    assert server.scheduler.received[-1].sampling.max_new_tokens == 0
    eventually(lambda: server.scheduler.num_active == 0)
    backend.flush_cache()
    assert server.scheduler.controls[-1].action == "flush_cache"
    assert backend.get_server_info()["tp_size"] == 1
    backend.start_profile()
    backend.stop_profile()
    assert backend.get_model_name() == "models/toy"


def test_errors_are_raised(sgl: Any, backend: Any) -> None:
    with pytest.raises(RuntimeError, match="prompt is empty"):
        backend.cache_prefix("")
