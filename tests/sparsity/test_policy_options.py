"""``--tca-policy NAME:OPTION=VALUE,...`` and ``--tca-selection``."""

from __future__ import annotations

from dataclasses import fields

import pytest

from tca_runtime.config import SparsityArgs, parse_args
from tca_runtime.sparsity.load import load_settings
from tca_runtime.sparsity.policies import POLICIES, create_policy
from tca_runtime.sparsity.policies.baselines import ExpectedAttentionPolicy, SnapKVPolicy
from tca_runtime.sparsity.policies.retrieval import H2OPolicy
from tca_runtime.sparsity.policies.tca import TCAPolicy
from tca_runtime.sparsity.settings import ConfigurationError, ModelIdentity, SparsitySettings

MODEL = ModelIdentity("unknown", 2, 2, 16)


def load(**args: str) -> SparsitySettings:
    found = load_settings(SparsityArgs(tca_config="uniform:0.3", **args), MODEL, "m")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("tca", TCAPolicy()),
        ("tca:score=mass", TCAPolicy(score="mass")),
        ("tca:score=normalised-hhi, concentrated_keeps=few", TCAPolicy("normalised-hhi", "few")),
        ("snapkv:kernel=7", SnapKVPolicy(7)),
        ("h2o:recent=0.25", H2OPolicy(0.25)),
        (
            "expected-attention:use_covariance=false,epsilon=1e-3",
            ExpectedAttentionPolicy(use_covariance=False, epsilon=1e-3),
        ),
    ],
)
def test_options_are_the_fields_of_the_policy(text: str, policy: object) -> None:
    assert parse_args(["--tca-policy", text]).sparsity.tca_policy == text
    assert load(tca_policy=text).policy == policy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tac", "unknown selection policy 'tac'; known: tca, pages"),
        (
            "tca:scores=mass",
            "no option 'scores'; there is score: raw-hhi or normalised-hhi or mass",
        ),
        ("full:a=1", "no option 'a'; there is none"),
        ("tca:score=best", "score must be raw-hhi or normalised-hhi or mass, not 'best'"),
        ("tca:score", "'score' should be OPTION=VALUE"),
        ("tca:", "'' should be OPTION=VALUE"),
        ("tca:score=mass,score=mass", "score is given twice"),
        ("snapkv:kernel=wide", "kernel must be a whole number, not 'wide'"),
        ("snapkv:kernel=1.5", "kernel must be a whole number, not '1.5'"),
        ("snapkv:kernel=4", "kernel must be a positive odd number, not 4"),
        ("h2o:recent=most", "recent must be a number, not 'most'"),
        ("h2o:recent=1.5", r"recent must be in \[0, 1\], not 1.5"),
        ("h2o:recent=nan", r"recent must be in \[0, 1\]"),
        ("expected-attention:use_covariance=1", "use_covariance must be true or false, not '1'"),
        ("expected-attention:epsilon=inf", "epsilon must not be negative or infinite"),
        ("streaming:sinks=-1", "sinks must not be negative"),
        ("quest:page=48", "page must be a power of two, not 48"),
        ("quest:queries=0", "queries must be positive"),
        ("pages:page=0", "page must be a power of two"),
        ("pages:after=-1", "after must not be negative"),
        ("pages:before=-1", "before must not be negative"),
        ("pages:tokens=101", r"tokens must be in \[0, 100\]"),
    ],
)
def test_a_wrong_option_is_an_error_that_says_what_there_is(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^--tca-policy {text}: .*{words}"):
        load(tca_policy=text)


def test_an_unknown_policy_is_told_by_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--tca-policy", "tac:score=mass"])
    assert "invalid choice: 'tac' (choose from tca, pages," in capsys.readouterr().err


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_field_of_every_policy_can_be_given(name: str) -> None:
    policy = create_policy(name)
    for field in fields(policy):  # type: ignore[arg-type]
        text = str(getattr(policy, field.name))
        text = text.lower() if text in ("True", "False") else text
        assert create_policy(f"{name}:{field.name}={text}") == policy


def test_what_is_chosen_names_the_cache() -> None:
    settings = [load(), load(tca_policy="tca:score=mass"), load(tca_selection="one-shot")]
    assert len({s.fingerprint for s in settings}) == 3
    assert [s.one_shot for s in settings] == [False, False, True]


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_confidence_is_a_probability(value: float) -> None:
    with pytest.raises(ConfigurationError, match=r"^--tca-min-confidence must be in \[0, 1\]"):
        load_settings(SparsityArgs(tca_min_confidence=value), MODEL, "m")


@pytest.mark.parametrize("name", ["tca_probes", "tca_prefill_probes"])
def test_somebody_must_score(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ConfigurationError, match=f"^{flag} must be at least 1, got 0"):
        load_settings(SparsityArgs(tca_config="uniform:0.3", **{name: 0}), MODEL, "m")


@pytest.mark.parametrize(
    ("flags", "probes", "in_prefill"),
    [
        ([], 32, 32),
        (["--tca-probes", "64"], 64, 64),
        (["--tca-prefill-probes", "16"], 32, 16),
        (["--tca-probes", "8", "--tca-prefill-probes", "16"], 8, 8),
    ],
)
def test_prefill_views_take_all_probes_unless_told_otherwise(
    flags: list[str], probes: int, in_prefill: int
) -> None:
    args = parse_args(["--tca-config", "uniform:0.3", *flags]).sparsity
    settings = load_settings(args, MODEL, "m")
    assert settings is not None
    assert (settings.probes, settings.num_prefill_probes) == (probes, in_prefill)
