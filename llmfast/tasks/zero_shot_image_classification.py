"""An image gets one of the labels that the user names: CLIP tells how well a text describes it."""

from collections.abc import Sequence
from typing import Any

from llmfast.bundle import ModelBundle
from llmfast.errors import OptionError
from llmfast.runtime import open_session
from llmfast.tasks._encoder import run_session, softmax
from llmfast.tasks._images import run_images
from llmfast.tasks._labels import best_labels, check_top_k, spell_labels
from llmfast.tokenizer import Tokenizer

AUTO_MODEL = "AutoModel"
OUTPUTS = ("logits_per_image",)
INPUT = "pixel_values"
INFER_OPTIONS = ("label", "hypothesis_template", "top_k")
TEXT_OPTION = "image"

_TEMPLATE = "This is a photo of {}."


def answer(
    bundle: ModelBundle,
    texts: Sequence[str],
    provider: str = "cpu",
    threads: int | None = None,
    label: Sequence[str] = (),
    hypothesis_template: str = _TEMPLATE,
    top_k: int = 5,
) -> list[dict[str, Any]]:
    """Find the label that describes each image best.

    Args:
        bundle: the model; its preprocessor_config.json says how an image becomes its input.
        texts: paths of image files.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        label: what an image may show, two or more.
        hypothesis_template: the text that a label makes, the label in place of `{}`.
        top_k: how many labels, at most.

    Returns:
        `image` (the path), `label`, `score` (the label's share of 1) and `labels` of each image, in their order: the
        likeliest labels, best first, each `label` and `score`.

    Raises:
        OptionError: fewer than two labels, an empty one, a template without `{}`, or top_k below 1.
        InputError: a file that is missing or no image, or no preprocessor_config.json or tokenizer.
        UnsupportedError: Pillow is not installed, or the graph is none of this task.

    Source: `ZeroShotImageClassificationPipeline` of transformers.
    """
    check_top_k(top_k)
    if len(label) < 2 or not all(one.strip() for one in label):
        raise OptionError("no labels to choose from", "give --label TEXT twice or more")
    if "{}" not in hypothesis_template:
        raise OptionError(f"--hypothesis-template `{hypothesis_template}` has no {{}}", f"for example `{_TEMPLATE}`")
    hypotheses = [hypothesis_template.replace("{}", one) for one in label]
    described = Tokenizer.load(bundle.path).encode_batch(hypotheses, bundle.longest_text())
    session = open_session(bundle.model, provider, threads)
    rows = run_images(bundle, texts, lambda pixels: run_session(session, OUTPUTS, described | {INPUT: pixels})[0])
    return [{"image": path} | best_labels(softmax(row), label, top_k) for path, row in zip(texts, rows, strict=True)]


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as a line a label for people."""
    return spell_labels(answer)
