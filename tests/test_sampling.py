import numpy as np
import pytest

from llmfast.errors import InputError, OptionError
from llmfast.infer.sampling import Sampling, candidates, sample

LOGITS = [np.random.default_rng(seed).normal(0, scale, 200).astype(np.float32) for seed, scale in enumerate((1, 3, 9))]


def _draw(logits, sampling, count=50):
    rng = np.random.default_rng(sampling.seed)
    return [sample(logits, sampling, rng) for _ in range(count)]


@pytest.mark.parametrize("logits", LOGITS)
def test_greedy_takes_the_likeliest(logits):
    assert set(_draw(logits, Sampling())) == {int(logits.argmax())}


@pytest.mark.parametrize("logits", [*LOGITS, np.zeros(8, np.float32)])
def test_top_k_of_one_is_greedy(logits):
    assert _draw(logits, Sampling(temperature=2.0, top_k=1)) == _draw(logits, Sampling())


def test_same_seed_same_tokens_other_seed_others():
    first, again, other = (_draw(LOGITS[0], Sampling(temperature=1.0, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_nothing_outside_the_nucleus(logits, top_p):
    probabilities = np.exp(logits.astype(np.float64) / 1.5)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    nucleus = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1]
    sampling = Sampling(temperature=1.5, top_p=top_p)
    assert set(candidates(logits, sampling)[0]) == set(nucleus)
    assert set(_draw(logits, sampling, 200)) <= set(nucleus)


def test_uniform_nucleus_has_as_many_tokens_as_it_needs():
    assert len(candidates(np.zeros(40, np.float32), Sampling(temperature=1.0, top_p=0.5))[0]) == 20


def test_frequencies_follow_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    drawn = np.bincount(_draw(logits, Sampling(temperature=1.0), 4000), minlength=3) / 4000
    assert np.abs(drawn - [0.5, 0.3, 0.2]).max() < 0.03


def test_tiny_temperature_is_greedy():
    assert _draw(LOGITS[0], Sampling(temperature=1e-320)) == _draw(LOGITS[0], Sampling())


@pytest.mark.parametrize(
    ("settings", "warper"),
    [
        ({"top_k": 7}, "TopKLogitsWarper"),
        ({"top_p": 0.8}, "TopPLogitsWarper"),
        ({"min_p": 0.1}, "MinPLogitsWarper"),
    ],
)
def test_filters_keep_what_transformers_keeps(settings, warper):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    for logits in LOGITS:
        kept = getattr(processors, warper)(*settings.values())(None, torch.from_numpy(logits)[None].double())
        expected = np.flatnonzero(np.isfinite(kept[0].numpy()))
        tokens, _ = candidates(logits, Sampling(temperature=1.0, **settings))
        assert sorted(tokens) == expected.tolist()


def test_repetition_penalty_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = np.array([2.0, 1.9, -1.0, -1.1], np.float32)
    expected = processors.RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[0, 2]]), torch.from_numpy(logits)[None])
    chosen = sample(logits, Sampling(repetition_penalty=1.5), np.random.default_rng(0), {0, 2})
    assert chosen == int(expected.argmax()) == 1
    assert logits[0] == 2.0


@pytest.mark.parametrize("poison", [np.nan, np.inf, None])
def test_logits_that_are_not_finite_are_refused(poison):
    logits = np.full(4, -np.inf, np.float32)
    if poison is not None:
        logits[1] = poison
    with pytest.raises(InputError, match="not finite"):
        sample(logits, Sampling(), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_impossible_options_are_refused(option, value):
    with pytest.raises(OptionError, match="--" + option.replace("_", "-")):
        Sampling(**{option: value})
