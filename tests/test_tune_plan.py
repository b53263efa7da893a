"""What a training run is made of: learning rates over time and over layers, and the batches of an epoch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llmfast.tune.optimizers import layer_shares, learning_rate_at
from llmfast.tune.options import TuneOptions
from llmfast.tune.rows import epoch_batches
from tests.tiny_tune import run, weights, write_encoder, write_labelled


def test_schedules_rise_then_fall_to_nothing() -> None:
    for name in ("cosine", "linear"):
        options = TuneOptions(Path(), schedule=name, warmup=0.1)
        rates = [learning_rate_at(step, 100, options, 2.0) for step in range(101)]
        assert rates[0] == pytest.approx(0.2)
        assert rates[9] == rates[10] == max(rates) == 2.0
        assert rates[55] == pytest.approx(1.0)
        assert rates[100] == pytest.approx(0.0)
        assert (np.diff(rates[10:]) < 0).all()
    assert learning_rate_at(99, 100, TuneOptions(Path(), schedule="constant"), 2.0) == 2.0


def test_layers_learn_the_slower_the_deeper_they_lie() -> None:
    names = ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight",
             "bert.encoder.layer.1.output.dense.weight", "bert.pooler.dense.weight", "classifier.bias"]  # fmt: skip
    assert list(layer_shares(names, 0.5).values()) == [0.125, 0.25, 0.5, 1.0, 1.0]
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    assert list(layer_shares(names, 0.5).values()) == [0.25, 0.5, 1.0]
    assert list(layer_shares(["transformer.wte.weight", "transformer.h.0.ln_1.bias"], 0.5).values()) == [0.25, 0.5]


def test_the_optimizer_gives_layers_their_share(tmp_path: Path) -> None:
    """After one step of plain SGD weights have moved by rate * share * gradient."""
    source, data = write_encoder(tmp_path / "bert"), write_labelled(tmp_path / "data.txt")
    moved = {}
    for decay in (1.0, 0.5):
        run(source, tmp_path / str(decay), data, optimizer="sgd", max_steps=1, weight_decay=0.0, layer_decay=decay)
        key = "bert.encoder.layer.0.output.dense.weight"
        moved[decay] = weights(tmp_path / str(decay))[key] - weights(source)[key.removeprefix("bert.")]
    torch.testing.assert_close(moved[0.5], 0.25 * moved[1.0], rtol=1e-2, atol=1e-7)


def test_an_epoch_has_every_row_once_in_batches_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 1000)
    batches = epoch_batches(lengths, 16, 3, 0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    padding = sum(len(batch) * lengths[batch].max() for batch in batches) / lengths.sum()
    assert padding < 1.1
    again, other = epoch_batches(lengths, 16, 3, 0), epoch_batches(lengths, 16, 3, 1)
    assert all(np.array_equal(one, two) for one, two in zip(batches, again, strict=True))
    assert not all(np.array_equal(one, two) for one, two in zip(batches, other, strict=True))
