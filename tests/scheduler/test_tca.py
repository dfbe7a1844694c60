"""TCA through scheduler and engine, with a tiny random model on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tca_runtime.attention.base import AttentionStep, LayerAttention
from tca_runtime.attention.triton_backend import TritonBackend
from tca_runtime.cache.sequence import Sequence
from tca_runtime.messages import Control, ControlReply, FinishReason
from tca_runtime.scheduler.pace import PrefillPace
from tests.scheduler.tiny_server import WINDOW, Server, prompt


def test_keeping_everything_is_full_attention() -> None:
    text = prompt(1, 900)
    full = Server(disable_tca=True).ask(text, 40)
    assert Server(tca_config="uniform:1.0").ask(text, 40) == full
    assert Server().ask(text, 40, kept_ratio=1.0) == full
    assert Server().ask(text, 40, tca=False) == full
    assert Server().ask(text, 40, kept_ratio=0.05) != full


def test_dense_output_is_the_same_with_and_without_the_prefix_cache() -> None:
    turns = [prompt(i, 300) for i in range(3)]
    cached, plain = Server(disable_tca=True), Server(disable_tca=True, share=False)
    history: list[int] = []
    for turn in turns:
        history += turn
        answer = cached.ask(history)
        assert plain.ask(history) == answer
        history += answer
    assert cached.engine.cache.tree.num_tokens > 0
    assert plain.engine.cache.tree.num_tokens == 0


def test_reply_says_what_was_kept() -> None:
    server = Server()
    server.submit("a", prompt(1, 1000))
    server.submit("short", prompt(2, 50))
    server.run()
    tca = server.last("a").tca
    assert tca is not None
    candidates = (1000 - WINDOW) // 64 * 64
    kept = server.engine.sparsity.decode.kept_tokens(candidates // 64).mean()  # type: ignore[union-attr]
    assert tca["kept_ratio"] == pytest.approx((kept + 1000 - candidates) / 1000)
    assert 0 < tca["dropped_mass"] < 1
    assert (tca["probes"], tca["retention"]) == (32, "on-pressure")
    assert server.last("short").tca is None


def test_dropped_mass_limit_takes_the_smallest_budget_that_honours_it() -> None:
    server = Server()
    reports = []
    for i, limit in enumerate((0.5, 0.2, 0.05, 0.0)):
        server.submit(f"r{i}", prompt(1, 1000), max_dropped_mass=limit)
        server.run()
        report = server.last(f"r{i}").tca
        assert report is not None and report["dropped_mass"] <= limit + 1e-6
        reports.append(report["kept_ratio"])
    assert reports == sorted(reports)
    assert reports[0] < reports[-1] == 1.0


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"kept_ratio": 1.5}, "kept_ratio"),
        ({"kept_ratio": "much"}, "kept_ratio"),
        ({"max_dropped_mass": -1}, "max_dropped_mass"),
        ({"probes": 0}, "probes"),
        ({"probes": True}, "probes"),
        ({"probes": 2.7}, "probes"),
        ({"tca": "no"}, "tca"),
        ({"tca": 0}, "tca"),
        ({"tca": False, "kept_ratio": 2}, "kept_ratio"),
        ({"kept_ratio": 1.0, "probes": 2.7}, "probes"),
    ],
)
@pytest.mark.parametrize("dense", [False, True])
def test_bad_custom_params_are_the_clients_mistake(
    params: dict[str, Any], name: str, dense: bool
) -> None:
    server = Server(disable_tca=dense)
    server.submit("a", prompt(1, 20), **params)
    server.run()
    finish = server.last("a").finish
    assert isinstance(finish, FinishReason)
    assert finish.status == 400 and f"custom_params.{name} must be" in finish.message


def test_a_whole_number_of_probes_may_be_written_as_a_fraction() -> None:
    server = Server()
    server.submit("a", prompt(1, 1000), probes=4.0, tca=True)
    server.run()
    tca = server.last("a").tca
    assert tca is not None and tca["probes"] == 4


@pytest.mark.parametrize(
    ("new_tokens", "refresh"),
    [(1500, 128), pytest.param(16_000, 1024, marks=pytest.mark.slow)],
)
def test_long_generation_stays_within_its_budget(new_tokens: int, refresh: int) -> None:
    server = Server(tokens=new_tokens + 2500, tca_refresh=refresh)
    server.submit("a", prompt(1, 400), new_tokens)
    longest = 0
    settings = server.engine.sparsity
    assert settings is not None
    for _ in range(2 * new_tokens):
        server.scheduler.run_once()
        if server.scheduler.planner.is_idle:
            break
        for request in server.scheduler.planner.running:
            assert request.sequence is not None
            view = request.sequence.view
            length = int(view.lengths.max()) + view.grown
            kept = settings.decode.kept_tokens(request.num_tokens // 64).max()
            assert length <= kept + WINDOW + 64 + refresh + 1
            longest = max(longest, length)
    assert len(server.tokens("a")) == new_tokens
    assert longest < 0.3 * new_tokens + WINDOW + 64 + refresh + 200
    server.engine.cache.check()


def test_immediate_retention_frees_what_is_not_kept() -> None:
    server = Server(tca_retention="immediate")
    server.ask(prompt(1, 3000), 4)
    usage = server.engine.cache.usage()
    window_share = (WINDOW + 64 + 4) / 3003
    assert usage.tree_slots / usage.full_equivalent_slots <= 0.31 + window_share
    assert server.engine.cache.reclaimer.counts.pruned > 0


def test_tree_report_shows_what_each_layer_keeps() -> None:
    server = Server(tca_retention="immediate")
    server.ask(prompt(1, 3000), 4)
    server.ask(prompt(1, 3000), 4)
    server.mail.inbound.append(Control(call_id="c", action="tree"))
    server.run()
    (reply,) = [m for m in server.mail.outbound if isinstance(m, ControlReply)]
    assert reply.ok
    nodes = reply.payload["nodes"]
    usage = server.engine.cache.usage()
    assert sum(node["slots"] for node in nodes) == usage.tree_slots
    assert sum(node["tokens"] for node in nodes) == usage.cached_tokens
    (pruned,) = [node for node in nodes if node["state"] == "pruned"]
    assert (
        pruned["hits"] >= 1 and len(pruned["kept_ratio_by_layer"]) == server.engine.shape.num_layers
    )
    assert all(0.2 < ratio < 0.5 for ratio in pruned["kept_ratio_by_layer"])


def test_a_pruned_prefix_is_shared() -> None:
    server = Server(tca_retention="immediate")
    document = prompt(1, 2000)
    server.ask(document + prompt(2, 40))
    server.submit("b", document + prompt(3, 40))
    server.run()
    assert server.last("b").cached_tokens == 2000
    report = server.last("b").tca
    assert report is None or report["kept_ratio"] > 0


def test_demoted_prefix_answers_as_a_full_one() -> None:
    documents = [prompt(i, 1500) for i in range(4)]
    questions = [prompt(10 + i, 30) for i in range(4)]
    roomy = Server(tokens=20000)
    tight = Server(tokens=2000, host_gib=0.05)
    for server in (roomy, tight):
        for document in documents:
            server.ask(document, 2)
    for document, question in zip(documents, questions, strict=True):
        assert tight.ask(document + question) == roomy.ask(document + question)
    counts = tight.engine.cache.reclaimer.counts
    assert counts.demoted > 0 and counts.promoted > 0
    assert counts.pruned == counts.evicted == 0
    assert roomy.engine.cache.reclaimer.counts.demoted == 0


def test_without_host_tier_pressure_prunes_before_it_evicts() -> None:
    server = Server(tokens=4000)
    for i in range(4):
        server.ask(prompt(i, 1500), 2)
    counts = server.engine.cache.reclaimer.counts
    assert counts.pruned > 0
    server.submit("again", prompt(2, 1500) + prompt(9, 40))
    server.run()
    assert server.last("again").cached_tokens == 1500


def test_a_host_tier_that_cannot_be_had_degrades_to_pruning() -> None:
    server = Server(tokens=4000, host_gib=1e9)
    answers = [server.ask(prompt(i, 1500), 2) for i in range(4)]
    assert all(len(answer) == 2 for answer in answers)
    counts = server.engine.cache.reclaimer.counts
    assert counts.pruned > 0 and counts.demoted == 0


def test_full_attention_never_reads_a_pruned_prefix() -> None:
    document, question = prompt(1, 1500), prompt(2, 20)
    expected = Server(disable_tca=True).ask(document + question)
    server = Server(tca_retention="immediate")
    server.ask(document + question)
    assert server.ask(document + question, tca=False) == expected


def test_retracted_requests_resume_right() -> None:
    settings = {"tca_first_refresh": 1024}
    alone = [Server(**settings).ask(prompt(i, 500), 200) for i in range(3)]
    crowded = Server(tokens=1700, **settings)
    for i in range(3):
        crowded.submit(f"r{i}", prompt(i, 500), 200)
    crowded.run()
    assert crowded.scheduler.planner.num_retractions > 0
    for i in range(3):
        got = crowded.tokens(f"r{i}")
        assert len(got) == 200
        # A resumed request selects anew, with later queries: the same start, then its own way.
        assert got[:30] == alone[i][:30]


def test_a_view_is_selected_anew_as_the_output_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tca_first_refresh=8, tca_refresh=50)
    sizes: list[int] = []
    show = server.engine.cache.show

    def recording(sequences: list[Sequence], *views: Any) -> list[bool]:
        sizes.extend(sequence.computed - 600 for sequence in sequences)
        return show(sequences, *views)

    monkeypatch.setattr(server.engine.cache, "show", recording)
    server.ask(prompt(1, 600), 170)
    assert sizes == [0, 8, 16, 32, 64, 114, 164]


def test_a_refresh_scores_with_the_queries_of_the_latest_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever else decodes, and whatever is computed beside it."""
    server = Server(tca_first_refresh=16, tca_refresh=50)
    backend, asked = server.engine.backend, []
    begin = backend.begin
    latest: dict[tuple[int, int], list[Tensor]] = {}

    def recording(step: AttentionStep) -> LayerAttention:
        attention = begin(step)
        if step.decode is None:
            return attention
        starts = step.decode.start[:, 0, 0].tolist()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for i, start in enumerate(starts):
                latest.setdefault((start, layer), []).append(q[i].clone())
            return attention(layer, q, k, v)

        return attend

    queries = server.engine._queries
    assert queries is not None
    read = queries.latest

    def reading(views: list[int], ends: list[int], count: int) -> Tensor:
        found = read(views, ends, count)
        for view, kept in zip(views, found, strict=True):
            start = int(server.engine.cache.views.start[view, 0])
            for layer, queries_of_layer in enumerate(kept):
                assert torch.equal(queries_of_layer, torch.stack(latest[start, layer][-count:]))
            asked.append(view)
        return found

    monkeypatch.setattr(backend, "begin", recording)
    monkeypatch.setattr(queries, "latest", reading)
    for i in range(3):
        server.submit(f"r{i}", prompt(i, 600 + i), 90 + i)
    server.run()
    assert len(asked) == 3 * 3, "after 16, 32 and 64 tokens"


def test_a_refresh_selects_the_same_on_every_backend() -> None:
    text, settings = prompt(1, 900), {"tca_first_refresh": 8, "tca_refresh": 16}
    one, two = Server(**settings), Server(**settings)
    # Its layout of the work, with the kernels' references.
    two.engine.backend = TritonBackend(two.engine.shape, two.engine.cache.pool.kv)
    assert two.ask(text, 60) == one.ask(text, 60)


def test_the_tail_of_a_prompt_sees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """However a prompt is cut: with its cached beginning and without."""
    chunks: list[tuple[int, int, bool]] = []
    server = Server(chunk=1024, tca_tail=300)
    plan = server.scheduler.planner.plan

    def recording(**state: bool) -> Any:
        made = plan(**state)
        chunks.extend((c.begin, c.end, c.sees_past) for c in made.chunks)
        return made

    monkeypatch.setattr(server.scheduler.planner, "plan", recording)
    server.ask(prompt(1, 3000), 1)
    assert chunks == [(0, 1024, True), (1024, 2048, False), (2048, 2700, False), (2700, 3000, True)]
    chunks.clear()
    server.ask(prompt(1, 3000) + prompt(2, 100), 1)
    assert chunks == [(3000, 3100, True)]
    chunks.clear()
    # The tail begins a few queries behind a multiple of the chunk, too few to choose a view.
    server.ask(prompt(3, 2358), 1)
    assert chunks == [(0, 1024, True), (1024, 2048, False), (2048, 2358, True)]


def test_no_more_queries_than_the_granularity_share_a_selection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(chunk=8192, tca_tail=0)
    sizes: list[int] = []
    extend = server.engine.cache.extend

    def recording(sequence: Sequence, num_tokens: int) -> Tensor:
        sizes.append(num_tokens)
        return extend(sequence, num_tokens)

    monkeypatch.setattr(server.engine.cache, "extend", recording)
    server.ask(prompt(1, 5000), 1)
    assert server.engine.sparsity is not None
    shared = server.engine.sparsity.granularity
    assert shared == 4096 and sizes == [shared, 5000 - shared]
    sizes.clear()
    server.ask(prompt(2, 5000), 1, tca=False)
    assert sizes == [5000]


@pytest.mark.parametrize("selection", ["per-chunk", "one-shot"])
@pytest.mark.parametrize("length", [250, 700])
@pytest.mark.parametrize("cached", [0, 200])
def test_a_selection_does_not_depend_on_what_else_is_computed(
    monkeypatch: pytest.MonkeyPatch, selection: str, length: int, cached: int
) -> None:
    """Selections begin at 256; whatever is cut before that, or cached, each query sees it all."""
    text = prompt(1, length)
    alone = Server(tca_selection=selection)
    alone.submit("r", text)
    alone.run()
    monkeypatch.setattr(
        PrefillPace, "budget", lambda self, decoding, prompts: 24 if decoding else 256
    )
    busy = Server(tca_selection=selection)
    if cached:
        busy.ask(text[:cached], 1)
    busy.submit("stream", prompt(2, 20), 100)
    busy.scheduler.run_once()
    busy.submit("r", text)
    busy.run()
    assert busy.last("r").cached_tokens == cached
    assert busy.tokens("r") == alone.tokens("r")
    here, there = busy.last("r").tca, alone.last("r").tca
    assert here is not None and there is not None
    assert here.pop("dropped_mass") == pytest.approx(there.pop("dropped_mass"), rel=1e-3)
    assert here == there


def test_one_shot_computes_prompts_with_full_attention_and_selects_at_their_end() -> None:
    full = Server(disable_tca=True)
    once = Server(tca_config="uniform:0.05", tca_selection="one-shot")
    per_chunk = Server(tca_config="uniform:0.05")
    texts = [prompt(i, 900) for i in range(6)]
    first = [[server.ask(text, 1) for text in texts] for server in (full, once, per_chunk)]
    assert first[0] == first[1] != first[2]
    once.submit("r", texts[0], 40)
    once.run()
    assert once.tokens("r") != full.ask(texts[0], 40)
    report = once.last("r").tca
    assert report is not None and report["kept_ratio"] < 0.3


@pytest.mark.parametrize("policy", ["snapkv", "keydiff", "expected-attention", "streaming"])
def test_other_policies_serve_too(policy: str) -> None:
    server = Server(tca_policy=policy)
    assert len(server.ask(prompt(1, 700))) == 12
    assert server.engine.cache.usage().running_slots == 0
