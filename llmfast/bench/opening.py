"""What opens a bundle for measurement, whatever its task."""

from collections.abc import Callable
from typing import Any

from llmfast import registry
from llmfast.batch_session import open_encoder
from llmfast.bundle import SEQ2SEQ_TASKS, TEXT_GENERATION, UNKNOWN_TASK, ModelBundle
from llmfast.tuned import SessionSettings, settings_for


def opener(
    bundle: ModelBundle,
    provider: str,
    threads: int,
    max_length: int | None,
    settings: SessionSettings | None,
    is_batch: bool,
) -> Callable[[], tuple[Any, Any]]:
    """Import what opens the bundle, and return the function that does: (engine or None, session)."""
    if bundle.manifest.task in SEQ2SEQ_TASKS:
        from llmfast.bench.translator import Translator

        def open_translator() -> tuple[Any, Any]:
            translator = Translator(bundle, provider, threads, max_length)
            return translator, translator.session

        return open_translator
    if "decoder" in bundle.graphs:  # which hears: random sound passes its encoder
        from llmfast.infer.seq2seq import Seq2SeqEngine

        return lambda: (None, Seq2SeqEngine(bundle, provider, threads).encoder)
    if bundle.manifest.task == TEXT_GENERATION:
        from llmfast.infer.opening import open_decoder

        def open_engine() -> tuple[Any, Any]:
            chosen = settings or settings_for(bundle, provider, threads, tell=False)
            engine = open_decoder(bundle, provider, threads, max_length, settings=chosen)
            return engine, engine.session

        return open_engine
    if bundle.manifest.task != UNKNOWN_TASK:
        registry.load("tasks", bundle.manifest.task)
    return lambda: (None, open_encoder(bundle.model, provider, threads, is_batch))
