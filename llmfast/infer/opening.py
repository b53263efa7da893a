"""Which engine runs a decoder: over one slab where the graph allows it, over a cache that grows otherwise."""

from llmfast.bundle import ModelBundle
from llmfast.infer.decoder import Decoder, runs
from llmfast.infer.engine import Engine


def open_decoder(
    bundle: ModelBundle,
    provider: str = "cpu",
    threads: int | None = None,
    max_length: int | None = None,
    chunk_tokens: int = 256,
    spin: bool = True,
) -> Decoder:
    """Open a text-generation model, llmfast's own or another exporter's.

    Args:
        bundle: the model.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        max_length: positions that will be needed; None means the model's whole context.
        chunk_tokens: tokens of a prompt that go through the graph at once.
        spin: let idle threads spin.

    Raises:
        UnsupportedError: the graph is no decoder, or one of a form that no engine runs.
        InputError: the model can't be read, or does not say how long its context is.
        ResourceError: no memory for the KV cache.
    """
    inputs = bundle.manifest.graphs.get("model", {}).get("inputs", ())
    if not inputs or "seqlens_k" in inputs:
        return Engine(bundle, provider, threads, max_length, chunk_tokens, spin)
    # Own bundles need neither of these, and are opened without reading their graphs first.
    from llmfast.infer.growing import GrowingEngine
    from llmfast.thirdparty import adopt, can_adopt

    if not can_adopt(bundle):
        return GrowingEngine(bundle, provider, threads, max_length, chunk_tokens, spin)
    from llmfast.graph.model import OnnxModel

    adopted, model = adopt(bundle, OnnxModel.load(bundle.model))
    graph = model.proto.SerializeToString()
    engine = Engine(adopted, provider, threads, max_length, chunk_tokens, spin, graph=graph)
    with runs(bundle.model):
        engine.decode(0)
    engine.reset()
    return engine
