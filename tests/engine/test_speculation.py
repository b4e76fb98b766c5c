"""Drafts change how fast tokens come and nothing else, whatever is guessed, right or wrong."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.scheduler_settings import SchedulerSettings
from tests.engine.engines import tiny_engine

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.2, top_p=0.95, max_tokens=40, ignore_eos=True)
FACTS = ("text", "token_ids", "finish_reason", "stop_reason", "cumulative_logprob", "logprobs")


def speculative(num_pages: int = 48, **options: Any) -> Engine:
    return tiny_engine(num_pages, speculation="suffix", max_draft_len=6, **options)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 2 to 32 tokens; the even ones begin alike."""
    pick = np.random.default_rng(seed)
    head = pick.integers(4, 250, 20).tolist()
    return [
        (head if index % 2 == 0 else []) + pick.integers(4, 250, pick.integers(2, 12)).tolist()
        for index in range(count)
    ]


def run(
    engine: Engine, token_ids: list[list[int]], samplings: list[SamplingParams]
) -> list[list[dict[str, Any]]]:
    """All that comes out, by prompt and sample; pages and requests add up after every step."""
    for index, (prompt, sampling) in enumerate(zip(token_ids, samplings, strict=True)):
        engine.add_request(f"r{index}", prompt, sampling=sampling, identity=f"row {index}")
    outputs = {}
    while engine.has_unfinished:
        outputs.update({output.request_id: output for output in engine.step()})
        engine.check_integrity()
    assert engine.stats().pages_held == 0, "an idle engine holds no pages"
    return [
        [{name: getattr(sample, name) for name in FACTS} for sample in outputs[f"r{index}"].outputs]
        for index in range(len(token_ids))
    ]


class Oracle:
    """Guesses in the place of a drafter's: the tokens of an earlier run where a coin says so, else any."""

    def __init__(self, known: list[list[dict[str, Any]]], chance: float):
        self._known, self._chance, self._pick = known, chance, random.Random(7)

    def __call__(self, request: Request, num_rows: int, most: int) -> list[int]:
        if request.sampling.presence_penalty or request.sampling.logprobs is not None:
            return []
        if request.num_output_tokens < request.sampling.min_tokens:
            return []
        sample = self._known[int(request.request_id[1:])][request.sample_index]
        rest = sample["token_ids"][request.num_output_tokens :]
        guesses = []
        for at in range(min(most, 6)):
            right = at < len(rest) and self._pick.random() < self._chance
            guesses.append(rest[at] if right else self._pick.randrange(4, 250))
        return guesses


def guess(engine: Engine, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._scheduler._draft_rows.drafter, "draft", oracle)


VARIED = [
    GREEDY,
    DRAWN,
    DRAWN.replace(n=2, max_tokens=25, seed=3),
    GREEDY.replace(presence_penalty=0.7),
    DRAWN.replace(logprobs=2, max_tokens=20),
    SamplingParams(temperature=1.5, max_tokens=60, stop_token_ids=tuple(range(4, 24))),
    SamplingParams(temperature=1.5, max_tokens=60, stop=("e", "th"), min_tokens=5),
    SamplingParams(temperature=1.5, max_tokens=60, stop=("a",), include_stop_str_in_output=True),
    DRAWN.replace(logit_bias={"9": 4.0}, max_tokens=1),
    DRAWN.replace(logit_bias={"9": 4.0, "30": 3.5}),
]


@pytest.mark.parametrize("chance", [0.0, 0.7, 1.0])
def test_any_guess_leaves_every_output_as_it_was(chance, monkeypatch):
    """Greedy and sampled, ends of every kind, biased logits; rows that are not drafted beside them."""
    token_ids = prompts(len(VARIED) * 2)
    samplings = VARIED * 2
    wanted = run(tiny_engine(), token_ids, samplings)
    engine = speculative()
    guess(engine, Oracle(wanted, chance), monkeypatch)
    before = engine.stats()
    assert run(engine, token_ids, samplings) == wanted
    after = engine.stats()
    drafted = after.num_drafted_tokens - before.num_drafted_tokens
    accepted = after.num_accepted_tokens - before.num_accepted_tokens
    assert drafted > 100
    assert {
        0.0: accepted < 0.1 * drafted,
        0.7: 0.3 < accepted / drafted < 0.7,
        1.0: accepted > 0.8 * drafted,
    }[chance], (accepted, drafted)
    reasons = {sample["finish_reason"] for samples in wanted for sample in samples}
    stops = {type(sample["stop_reason"]) for samples in wanted for sample in samples}
    assert reasons == {"stop", "length"}
    assert stops >= {str, int}, "the cases end in every way"


def test_accepted_tokens_save_steps(monkeypatch):
    engine, token_ids = speculative(), prompts(4, seed=2)
    wanted = run(tiny_engine(), token_ids, [GREEDY] * 4)
    guess(engine, Oracle(wanted, 1.0), monkeypatch)
    before = engine.stats().num_steps
    assert run(engine, token_ids, [GREEDY] * 4) == wanted
    # One step for the prompts at least, then seven tokens a step.
    assert engine.stats().num_steps - before <= 3 + 40 // 7 + 1


def test_what_speculation_leaves_in_the_cache_is_right(monkeypatch):
    """Pages that held rejected tokens are found by those who go on from the same text: to the same bits."""
    token_ids = prompts(6, seed=4)
    plain, engine = tiny_engine(), speculative()
    wanted = run(plain, token_ids, [DRAWN] * 6)
    guess(engine, Oracle(wanted, 0.6), monkeypatch)
    assert run(engine, token_ids, [DRAWN] * 6) == wanted
    longer = [
        [*prompt, *samples[0]["token_ids"][: 40 - index]]
        for index, (prompt, samples) in enumerate(zip(token_ids, wanted, strict=True))
    ]
    sampling = [DRAWN.replace(logprobs=3, max_tokens=12)] * 6
    before = engine.stats().num_cached_tokens
    fresh = tiny_engine(enable_prefix_caching=False)
    assert run(engine, longer, sampling) == run(fresh, longer, sampling)
    assert engine.stats().num_cached_tokens - before > 6 * 32, "their pages were found"


def test_preemption_and_drafts_change_no_token(monkeypatch):
    token_ids = [prompt[:12] for prompt in prompts(8, seed=1)]
    sampling = [DRAWN.replace(max_tokens=70)] * 8
    wanted = run(tiny_engine(), token_ids, sampling)
    engine = speculative(num_pages=11)
    guess(engine, Oracle(wanted, 0.7), monkeypatch)
    assert run(engine, token_ids, sampling) == wanted
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.num_accepted_tokens > 0


def test_outputs_of_a_template_are_guessed_for_its_next_requests():
    """The suffix index by itself: what came once comes again in a few steps, but for other templates."""
    engine = tiny_engine(speculation="suffix", max_draft_len=5)
    prompt = prompts(1, seed=11)[0]

    def accepted(**where: Any) -> tuple[int, list[int]]:
        before = engine.stats().num_accepted_tokens
        engine.add_request("r", prompt, sampling=DRAWN, identity="row", **where)
        (output,) = [output for _ in iter(lambda: engine.has_unfinished, False) for output in engine.step()]
        return engine.stats().num_accepted_tokens - before, list(output.outputs[0].token_ids)

    first, tokens = accepted(template="letters")
    again = accepted(template="letters")
    assert first < 10
    assert again[0] > 25
    assert again[1] == tokens
    assert accepted(template="bills")[0] < 10
    assert accepted(template="letters", cache_salt="another tenant")[0] < 10


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_inside_a_draft_ends_the_text_there(stream, monkeypatch):
    """Several tokens come at once: those behind the stop are neither shown nor counted, in streams too."""
    prompt, sampling = prompts(1, seed=6)[0], GREEDY.replace(ignore_eos=False)
    (whole,) = run(tiny_engine(), [prompt], [sampling])
    text = whole[0]["text"]
    stop = next(text[at : at + 2] for at in range(12, len(text)) if text.find(text[at : at + 2]) == at)
    (wanted,) = run(tiny_engine(), [prompt], [sampling.replace(stop=(stop,))])
    engine = speculative()
    guess(engine, Oracle([whole], 1.0), monkeypatch)
    engine.add_request("r0", prompt, sampling=sampling.replace(stop=(stop,)), identity="row 0", stream=stream)
    outputs = [output for _ in iter(lambda: engine.has_unfinished, False) for output in engine.step()]
    got = outputs[-1].outputs[0]
    assert {name: getattr(got, name) for name in FACTS} == wanted[0]
    assert got.stop_reason == stop
    if stream:
        assert "".join(output.delta_text for output in outputs) == got.text
    engine.check_integrity()
    assert engine.stats().pages_held == 0


def test_requests_whose_draws_depend_on_more_are_not_drafted():
    engine = speculative()
    for changes in (
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.3},
        {"bad_words": ("the",)},
        {"allowed_token_ids": tuple(range(4, 200))},
        {"logprobs": 0},
        {"prompt_logprobs": 0},
        {"min_tokens": 40},
    ):
        for _ in range(2):  # the second time its output is known
            before = engine.stats().num_drafted_tokens
            run(engine, prompts(1, seed=8), [GREEDY.replace(**changes)])
            assert engine.stats().num_drafted_tokens == before, changes


def test_an_abort_while_a_draft_is_in_flight_frees_its_pages(monkeypatch):
    token_ids = prompts(3, seed=9)
    wanted = run(tiny_engine(), token_ids, [GREEDY] * 3)
    engine = speculative()
    guess(engine, Oracle(wanted, 0.5), monkeypatch)
    for index, prompt in enumerate(token_ids):
        engine.add_request(f"r{index}", prompt, sampling=GREEDY, identity=f"row {index}")
    while not (engine._in_flight is not None and engine._in_flight.plan.drafts):
        engine.step()
    assert engine.abort_request("r1")
    engine.check_integrity()
    outputs = {}
    while engine.has_unfinished:
        outputs.update({output.request_id: output.outputs[0].token_ids for output in engine.step()})
        engine.check_integrity()
    assert outputs == {f"r{index}": wanted[index][0]["token_ids"] for index in (0, 2)}
    assert engine.stats().pages_held == 0


def test_a_step_with_drafts_must_be_updated_before_the_next_is_planned():
    settings = SchedulerSettings(
        max_num_seqs=2, max_num_batched_tokens=32, max_model_len=64, page_size=8, num_pages=20,
        speculation="ngram", num_draft_logits=16,
    )  # fmt: skip
    scheduler = Scheduler(settings)
    request = Request(
        request_id="r", prompt_token_ids=(5, 6, 7, 5, 6), sampling=GREEDY, key=(0, 0), max_total_len=40
    )
    scheduler.add(request)
    plan = scheduler.schedule()
    scheduler.update(plan, _drawn(7))
    plan = scheduler.schedule()
    (row,) = plan.rows
    # Behind 5 6 7 came 5 6, and behind that the same again.
    assert list(row.draft) == [5, 6, 7, 5, 6, 7, 5, 6]
    assert (row.start, row.num_tokens, row.num_logits, row.num_prompt_logprobs) == (5, 9, 9, 0)
    assert len(request.page_ids) == 2, "pages for all of its tokens"
    scheduler.advance(plan)
    assert request.num_computed == 6, "guesses count as computed when they are seen to be right"
    with pytest.raises(ValueError, match="has drafts"):
        scheduler.schedule()
    finished = scheduler.update(plan, _drawn(5, accepted={0: (6, 7)}))
    assert finished == []
    assert request.num_computed == 8
    assert request.num_tokens == 9
    scheduler.check_integrity()


def _drawn(token: int, accepted: Any = None) -> Any:
    from engine.plan import StepResults

    return StepResults([token], accepted=accepted or {})


def test_off_declares_the_steps_it_always_did():
    assert EngineConfig().num_draft_logits == 0
    assert EngineConfig(speculation="auto").num_draft_logits == 64
    assert EngineConfig(speculation="auto", max_num_seqs=4, max_draft_len=3).num_draft_logits == 12
    most = tiny_engine()._runner.buckets[-1].num_logits
    assert most == 32, "as padded"
    assert max(bucket.num_logits for bucket in speculative()._runner.buckets) >= 8 + 24
    wrong: list[dict[str, Any]] = [{"speculation": "draft"}, {"max_draft_len": 0}, {"max_draft_len": 33}]
    for options in wrong:
        with pytest.raises(ConfigError, match=f"engine.{next(iter(options))}"):
            EngineConfig(**options)
