"""Grammars bind the text that a real tokenizer's tokens make, and broken ones say why."""

import json
import random
import re
import threading
import time
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tca_runtime.engine import grammar as grammar_module
from tca_runtime.engine.grammar import (
    GrammarCompiler,
    GrammarError,
    GrammarMatcher,
    allowed_tokens,
    forbid_others,
    full_mask,
)
from tca_runtime.engine.sampler import RowSampling, Sampler
from tca_runtime.sampling_params import Grammar, SamplingParams

LINES = [
    "the quick brown fox jumps over the lazy dog, 0123456789",
    '{"name": "Ada", "age": 36, "tags": ["x", "y"], "ok": true, "none": null}',
    "yes no maybe naïve café",
]
# The model's logits are wider than the tokenizer's vocabulary, as in padded checkpoints.
PADDED = 413


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<s>", "</s>", "<|end|>", "<|turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(LINES * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def eos_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer.convert_tokens_to_ids(["</s>", "<|end|>"])


@pytest.fixture
def compiler(tokenizer: PreTrainedTokenizerFast, eos_ids: list[int]) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, PADDED, eos_ids)


def start(compiler: GrammarCompiler, kind: Any, value: str = "") -> GrammarMatcher:
    return compiler.submit(Grammar(kind, value)).result(30).matcher()


def allowed(matcher: GrammarMatcher) -> set[int]:
    logits = torch.zeros(1, PADDED)
    forbid_others(logits, allowed_tokens([matcher], PADDED))
    return set(torch.isfinite(logits[0]).nonzero()[:, 0].tolist())


def walk(matcher: GrammarMatcher, eos_ids: list[int], seed: int, length: int = 40) -> list[int]:
    """Random tokens under the mask; ends at once when it may, past ``length``."""
    rng = random.Random(seed)
    tokens: list[int] = []
    while not matcher.is_terminated:
        choices = sorted(allowed(matcher))
        assert choices
        ends = [t for t in choices if t in eos_ids]
        token = ends[0] if ends and len(tokens) > length else rng.choice(choices)
        matcher.accept(token)
        tokens.append(token)
        assert len(tokens) < 2000
    assert tokens.pop() in eos_ids
    return tokens


@pytest.mark.parametrize(
    "pattern",
    [
        r"(yes|no|maybe)",
        r"[-+]?[0-9]+[ \n]*",
        r"\d{3}-\d{4}",
        r"[a-z]+(, [a-z]+){0,3}\.",
        r"caf[éè]",
        r'"[\w\d\s]*"',
    ],
)
def test_regex_text_matches_in_full(
    compiler: GrammarCompiler,
    tokenizer: PreTrainedTokenizerFast,
    eos_ids: list[int],
    pattern: str,
) -> None:
    for seed in range(10):
        text = tokenizer.decode(walk(start(compiler, "regex", pattern), eos_ids, seed))
        assert re.fullmatch(pattern, text), text


def test_json_schema_binds_the_value(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast, eos_ids: list[int]
) -> None:
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", "b"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 9},
            "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        },
        "required": ["kind", "count"],
        "additionalProperties": False,
    }
    for seed in range(20):
        matcher = start(compiler, "json_schema", json.dumps(schema))
        value = json.loads(tokenizer.decode(walk(matcher, eos_ids, seed)))
        assert value["kind"] in ("a", "b")
        assert value["count"] in range(10)
        assert set(value) <= {"kind", "count", "flags"}
        assert all(isinstance(flag, bool) for flag in value.get("flags", []))


def test_json_is_any_object_and_nothing_else(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast, eos_ids: list[int]
) -> None:
    text = '{\n    "a": [1, 2.5e3, {"b": null}],\n    "c": "é\\n"\n}'
    matcher = start(compiler, "json")
    for token in tokenizer.encode(text, add_special_tokens=False):
        matcher.accept(token)
    assert allowed(matcher) == set(eos_ids)
    [bracket] = tokenizer.encode("[", add_special_tokens=False)
    assert bracket not in allowed(start(compiler, "json"))


def test_json_whitespace_ends(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast
) -> None:
    [brace], [newline] = (tokenizer.encode(c, add_special_tokens=False) for c in "{\n")
    matcher = start(compiler, "json")
    matcher.accept(brace)
    count = 0
    while newline in allowed(matcher):
        matcher.accept(newline)
        count += 1
        assert count < 100
    assert count >= 16


def test_ebnf(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast, eos_ids: list[int]
) -> None:
    rules = 'root ::= pair | "(" root ")"\npair ::= "<" [0-9] ">"'
    for seed in range(10):
        text = tokenizer.decode(walk(start(compiler, "ebnf", rules), eos_ids, seed))
        inner = text.strip("()")
        assert re.fullmatch(r"<\d>", inner)
        assert text.count("(") == text.count(")")


def test_a_complete_grammar_allows_the_end_only(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast, eos_ids: list[int]
) -> None:
    matcher = start(compiler, "regex", "yes")
    assert not allowed(matcher) & set(eos_ids)
    for token in tokenizer.encode("yes", add_special_tokens=False):
        matcher.accept(token)
    assert allowed(matcher) == set(eos_ids)
    assert not matcher.is_terminated
    matcher.accept(eos_ids[1])
    assert matcher.is_terminated
    assert allowed(matcher) == set(range(PADDED))


def test_special_and_padding_tokens_are_no_text(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast, eos_ids: list[int]
) -> None:
    bits = allowed(start(compiler, "regex", r"[^é]*"))
    assert max(bits) < len(tokenizer)
    special = set(tokenizer.convert_tokens_to_ids(["<s>", "<|turn|>"]))
    assert not bits & special
    assert set(eos_ids) <= bits


def test_eos_comes_from_the_tokenizer_when_the_model_names_none(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    matcher = start(GrammarCompiler(tokenizer, PADDED, []), "regex", "a")
    matcher.accept(*tokenizer.encode("a", add_special_tokens=False))
    assert allowed(matcher) == {tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("regex", "[a-z", "invalid regex: Regex parsing error at position 5: Unclosed '\\['"),
        ("regex", "(?=a)b", "invalid regex: .*Lookahead is not supported"),
        ("regex", r"[^\s\S]", "the regex allows no text at all"),
        ("json_schema", '{"type": ', "invalid JSON schema: Failed to parse JSON"),
        ("json_schema", '{"type": "thing"}', 'invalid JSON schema: Unsupported type "thing"'),
        ("json_schema", "false", "invalid JSON schema: Schema 'false' cannot accept any value"),
        ("ebnf", 'main ::= "x"', 'invalid EBNF grammar: .*root rule with name "root"'),
        ("ebnf", "root ::= other", 'invalid EBNF grammar: .*Rule "other" is not defined'),
    ],
)
def test_a_broken_grammar_says_why(
    compiler: GrammarCompiler, kind: Any, value: str, message: str
) -> None:
    with pytest.raises(GrammarError, match=message) as caught:
        start(compiler, kind, value)
    assert caught.value.status == 400
    assert ".cc" not in str(caught.value)


def test_a_tokenizer_that_cannot_be_used_is_an_error_of_the_request() -> None:
    compiler = GrammarCompiler(object(), PADDED, [1])  # type: ignore[arg-type]
    with pytest.raises(GrammarError, match="not possible with this tokenizer"):
        start(compiler, "regex", "a")


def test_recent_results_and_failures_are_kept(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GrammarCompiler, "MAX_CACHED", 2)
    good, bad, other = (Grammar("regex", v) for v in ("a+", "(", "b+"))
    first, failed = compiler.submit(good), compiler.submit(bad)
    assert first.result(30) and failed.exception(30)
    assert compiler.submit(bad) is failed
    assert compiler.submit(good) is first
    compiler.submit(other)
    assert compiler.submit(good) is first
    assert compiler.submit(bad) is not failed


def test_the_cache_is_bounded_in_bytes(
    tokenizer: PreTrainedTokenizerFast, eos_ids: list[int]
) -> None:
    compiler = GrammarCompiler(tokenizer, PADDED, eos_ids, cache_bytes=1)
    first = compiler.submit(Grammar("regex", "a+"))
    first.result(30)
    compiler.submit(Grammar("regex", "b+")).result(30)
    assert compiler.submit(Grammar("regex", "a+")) is not first


def test_requests_of_one_grammar_do_not_share_progress(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast
) -> None:
    compiled = compiler.submit(Grammar("regex", "ab")).result(30)
    [a], [b] = (tokenizer.encode(c, add_special_tokens=False) for c in "ab")
    one, two = compiled.matcher(), compiled.matcher()
    one.accept(a)
    assert b in allowed(one) and a not in allowed(one)
    assert a in allowed(two) and b not in allowed(two)


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Grammars that begin with "slow" take until it is set."""
    event = threading.Event()
    native = grammar_module._compile_native

    def slow(compiler: Any, grammar: Grammar) -> Any:
        if grammar.value.startswith("slow"):
            event.wait(60)
        return native(compiler, grammar)

    monkeypatch.setattr(grammar_module, "_compile_native", slow)
    return event


def test_compilation_never_blocks_and_has_a_limit(
    tokenizer: PreTrainedTokenizerFast, eos_ids: list[int], release: threading.Event
) -> None:
    compiler = GrammarCompiler(tokenizer, PADDED, eos_ids, time_limit=0.3)
    compiler.submit(Grammar("regex", "a")).result(30)
    try:
        futures = [compiler.submit(Grammar("regex", f"slow{i}")) for i in range(4)]
        assert not any(f.done() for f in futures)
        for future in futures:
            with pytest.raises(GrammarError, match="compiling the regex takes longer than 0.3 s"):
                future.result(30)
        with pytest.raises(GrammarError, match="too many slow grammars") as caught:
            compiler.submit(Grammar("regex", "b")).result(30)
        assert caught.value.status == 503
        assert compiler.submit(Grammar("regex", "a")).result(0)
    finally:
        release.set()


def test_a_grammar_that_nobody_waits_for_is_not_compiled(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    both_run = threading.Barrier(3)
    begun: list[str] = []
    native = grammar_module._compile_native

    def slow(compiler: Any, grammar: Grammar) -> Any:
        begun.append(grammar.value)
        if grammar.value.startswith("slow"):
            both_run.wait(60)
            release.wait(60)
        return native(compiler, grammar)

    monkeypatch.setattr(grammar_module, "_compile_native", slow)
    shared, lonely, last = (Grammar("regex", v) for v in ("shared", "lonely", "last"))
    try:
        running = [(g, compiler.submit(g)) for g in (Grammar("regex", f"slow{i}") for i in (1, 2))]
        both_run.wait(60)
        first, again, alone = (compiler.submit(g) for g in (shared, shared, lonely))
        assert first is again
        compiler.release(shared, again)
        compiler.release(lonely, alone)
        compiler.release(*running[0])
    finally:
        release.set()
    assert compiler.submit(last).result(30) and first.result(30)
    assert alone.cancelled()
    assert sorted(begun) == ["last", "shared", "slow1", "slow2"]
    assert compiler.submit(lonely).result(30)


def test_a_refused_grammar_is_tried_again(
    tokenizer: PreTrainedTokenizerFast, eos_ids: list[int], release: threading.Event
) -> None:
    compiler = GrammarCompiler(tokenizer, PADDED, eos_ids, time_limit=0.3)
    compiler.submit(Grammar("regex", "a")).result(30)
    waiting = Grammar("regex", "b")
    try:
        slow_ones = [compiler.submit(Grammar("regex", f"slow{i}")) for i in range(8)]
        refused = compiler.submit(waiting).exception(30)
        assert isinstance(refused, GrammarError) and refused.status == 503
        errors = [future.exception(30) for future in slow_ones]
        assert {e.status for e in errors if isinstance(e, GrammarError)} == {400, 503}
    finally:
        release.set()
    for _ in range(1000):
        if compiler.submit(waiting).exception(30) is None:
            return
        time.sleep(0.01)
    raise AssertionError("the refusal was kept")


def test_a_forbidden_token_is_an_error(compiler: GrammarCompiler) -> None:
    with pytest.raises(GrammarError, match="does not allow token 0"):
        start(compiler, "regex", "a").accept(0)


def test_a_grammar_that_costs_too_much_per_token_is_an_error(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GrammarMatcher, "MAX_STEP_SECONDS", 0.02)
    matcher = start(compiler, "ebnf", 'root ::= root root root | root root | "a" | ""')
    [a] = tokenizer.encode("a", add_special_tokens=False)
    mask = full_mask(1, PADDED)
    with pytest.raises(GrammarError, match="too ambiguous"):
        for _ in range(400):
            matcher.fill(mask, 0)
            matcher.accept(a)


def test_constrained_and_free_rows_share_a_batch(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast, eos_ids: list[int]
) -> None:
    prompt = torch.tensor([5, 6], dtype=torch.int32).numpy()
    patterns = [r"\d{3}", None, "(yes|no)"]
    sampler = Sampler(PADDED, torch.device("cpu"))
    rows = [
        RowSampling(SamplingParams(min_new_tokens=20), seed, prompt, frozenset(eos_ids))
        for seed in range(3)
    ]
    for row, pattern in zip(rows, patterns, strict=True):
        if pattern:
            row.matcher = start(compiler, "regex", pattern)
    texts: list[list[int]] = [[], [], []]
    running = [0, 1, 2]
    for step in range(12):
        logits = torch.randn(len(running), PADDED, generator=torch.Generator().manual_seed(step))
        tokens = sampler.sample(logits, [rows[i] for i in running]).tolist()
        for i, token in zip(running, tokens, strict=True):
            texts[i].append(token)
            rows[i].accept(token)
        running = [i for i in running if not (m := rows[i].matcher) or not m.is_terminated]
    assert running == [1]
    assert len(texts[1]) == 12
    for i in (0, 2):
        assert texts[i].pop() in eos_ids
        assert re.fullmatch(patterns[i] or "", tokenizer.decode(texts[i]))
