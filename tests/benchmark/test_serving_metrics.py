import pytest

from benchmark.serving.metrics import (
    RequestResult,
    chunk_gaps,
    distribution,
    summarise,
    throughput_series,
)


def result(
    start: float, times: tuple[float, ...], end: float, tokens: int, cached: int | None = None
) -> RequestResult:
    return RequestResult(
        start=start,
        end=end,
        text_times=times,
        prompt_tokens=10,
        completion_tokens=tokens,
        cached_tokens=cached,
    )


def test_latencies_of_one_request() -> None:
    r = result(100.0, (100.5, 101.0, 102.5), 103.0, tokens=5)
    assert r.ttft == pytest.approx(0.5)
    assert r.tpot == pytest.approx(2.0 / 4), "four tokens follow the first within two seconds"
    assert r.e2e == pytest.approx(3.0)
    assert chunk_gaps(r) == pytest.approx([0.5, 1.5])


def test_latencies_that_do_not_exist() -> None:
    silent = result(0.0, (), 1.0, tokens=3)
    assert silent.ttft is None
    assert silent.tpot is None
    assert result(0.0, (0.4,), 1.0, tokens=3).tpot is None
    assert result(0.0, (0.4, 0.5), 1.0, tokens=1).tpot is None


def test_percentiles_interpolate() -> None:
    d = distribution([i / 1000 for i in range(101)])
    assert d is not None
    assert (d.count, d.mean, d.p50, d.p90, d.p99, d.max) == pytest.approx(
        (101, 50.0, 50.0, 90.0, 99.0, 100.0)
    )
    assert distribution([]) is None


def test_summary_counts_errors_apart() -> None:
    results = [
        result(0.0, (1.0, 2.0), 2.0, tokens=20, cached=4),
        result(1.0, (1.5, 4.0), 4.0, tokens=40, cached=None),
        RequestResult(start=2.0, end=5.0, text_times=(2.1,), completion_tokens=7, error="boom"),
    ]
    s = summarise(results, planned=5)
    assert (s.completed, s.errors, s.unsent) == (2, 1, 2)
    assert s.error_messages == {"boom": 1}
    assert s.duration_s == pytest.approx(5.0), "a failed request's time counts"
    assert s.output_tokens_per_s == pytest.approx(60 / 5)
    assert s.input_tokens_per_s == pytest.approx(20 / 5)
    assert s.cached_tokens == 4
    assert s.ttft_ms is not None
    assert s.ttft_ms.p50 == pytest.approx(750.0)


def test_summary_of_nothing() -> None:
    s = summarise([], planned=3)
    assert (s.completed, s.errors, s.unsent, s.cached_tokens) == (0, 0, 3, None)
    assert s.requests_per_s == 0.0
    assert s.e2e_ms is None


def test_throughput_series_keeps_every_token() -> None:
    results = [
        result(10.0, (10.2, 10.4, 11.6, 12.9), 13.0, tokens=8),
        result(10.5, (11.0,), 11.0, tokens=5),
    ]
    starts, rates = throughput_series(results, bin_s=1.0)
    assert starts == [0.0, 1.0, 2.0]
    assert rates == pytest.approx([4.0, 7.0, 2.0])
    assert throughput_series([], bin_s=1.0) == ([], [])
