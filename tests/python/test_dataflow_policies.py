"""Error policies and budgets."""

import json

import pytest

from dsline import PipelineBuildError
from dsline.dataflow.policies import (
    DeadLetterPolicy,
    ErrorBudget,
    Raise,
    Retry,
    Skip,
    dead_letter,
    parse_policy,
    retry,
)


@pytest.mark.parametrize(
    "policy",
    [
        Raise(),
        Skip(),
        dead_letter("file://dead"),
        retry(3),
        retry(2, backoff=0.5, then=dead_letter("file://d")),
    ],
)
def test_json_round_trip(policy):
    again = parse_policy(json.loads(json.dumps(policy.to_json())))
    assert type(again) is type(policy)
    assert again.to_json() == policy.to_json()


def test_words():
    assert parse_policy("raise") == Raise()
    assert parse_policy("skip") == Skip()


@pytest.mark.parametrize(
    "wrong", ["ignore", 3, None, {"dead": "x"}, {"retry": 0}, {"dead_letter": "shm://x"}]
)
def test_what_is_no_policy(wrong):
    with pytest.raises(PipelineBuildError):
        parse_policy(wrong)


def test_pauses_double():
    assert list(retry(4, backoff=0.1).pauses()) == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert isinstance(Retry(1).then_policy, Raise)
    assert retry(1, then=dead_letter("file://x")).then_policy == DeadLetterPolicy("file://x")


def test_retry_of_a_retry():
    with pytest.raises(PipelineBuildError, match="another retry"):
        retry(2, then=retry(2))


def test_budget_of_errors():
    budget = ErrorBudget(2)
    assert not budget.is_exceeded(2, 2)
    assert budget.is_exceeded(3, 1000)


def test_budget_of_a_share():
    budget = ErrorBudget(0.1)
    assert not budget.is_exceeded(5, 19)  # too few to tell
    assert not budget.is_exceeded(2, 20)
    assert budget.is_exceeded(3, 20)


@pytest.mark.parametrize("wrong", [-1, 1.0, 1.5, True, "many", float("nan")])
def test_what_is_no_budget(wrong):
    with pytest.raises(PipelineBuildError):
        ErrorBudget(wrong)
