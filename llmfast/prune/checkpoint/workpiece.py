"""The PyTorch model in the middle of a pruning: its weights, its config, and the text it is measured on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast import registry
from llmfast.bundle import MODEL, TEXT_GENERATION, Manifest, ModelBundle
from llmfast.errors import InputError, UnsupportedError
from llmfast.export.checkpoint import SafetensorsCheckpoint
from llmfast.export.encoder import context_length, first_line, load_encoder
from llmfast.export.reference import parameters_on_meta
from llmfast.prune.checkpoint.families import PER_BLOCK, Family, family_of
from llmfast.report import progress

if TYPE_CHECKING:
    import torch

# Matrices of statistics that are in memory at a time; a model with more of them is run several times.
_GRAM_BYTES = 1 << 30

Cut = Callable[[str, int], "np.ndarray | None"]


class Workpiece:
    """What structured methods work on. The model is always a plain one of `transformers`: built from its config.

    Args:
        checkpoint: the original.
        task: what the model is for.
        folder: the new checkpoint's, with its tokenizer in it.
        corpus: the text that the user named to calibrate on, None without one.

    Attributes:
        model: the model as it is now, in float32.
        family: names of its parts.
        task: what it is for.
        samples: token ids to calibrate on, int64 [seq] each; set by the stage.
        folder, corpus: as given.
        dtype: the type that weights are stored in.
    """

    def __init__(self, checkpoint: SafetensorsCheckpoint, task: str, folder: Path, corpus: Path | None = None) -> None:
        if checkpoint.quantization:
            raise UnsupportedError(f"`{checkpoint.path}` is already quantized", "prune the checkpoint it was made from")
        self.family: Family = family_of(checkpoint.config, str(checkpoint.path))
        self.task, self.folder, self.corpus = task, folder, corpus
        self.samples: Sequence[np.ndarray] = ()
        self.model, self.dtype = load_model(checkpoint, task)

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def num_blocks(self) -> int:
        """How many blocks the model has."""
        return int(self.config.num_hidden_layers)

    def block_name(self, index: int, part: str = "") -> str:
        """Return the name of a block, or of a part of it, in the whole model."""
        base = self.model.base_model_prefix if self.model.base_model is not self.model else ""
        return ".".join(name for name in (base, self.family.blocks, str(index), part) if name)

    def block(self, index: int, part: str = "") -> Any:
        """Return a block, or a part of it."""
        return self.model.get_submodule(self.block_name(index, part))

    def read(self, name: str) -> "torch.Tensor":
        """Return a parameter or buffer as it is now."""
        return tensors_of(self.model)[name]

    def rebuild(self, changes: Mapping[str, Any], read: Callable[[str, tuple[int, ...]], "torch.Tensor"]) -> None:
        """Build the model anew from a changed config.

        Args:
            changes: of the config.
            read: gives each parameter of the new model, by its name and shape.
        """
        self.model = build_model(self.model, changed_config(self.config, changes), read)

    def cut(self, changes: Mapping[str, Any], kept: Cut, replaced: "Mapping[str, torch.Tensor] | None" = None) -> None:
        """Build the model anew with fewer channels.

        Args:
            changes: of the config.
            kept: the indices that stay of a parameter, by its name and dimension, where the new one is smaller.
            replaced: parameters that are not cut, for they have new values.
        """
        import torch

        old = tensors_of(self.model)

        def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
            if replaced and name in replaced:
                return replaced[name]
            tensor = old[name]
            for dim, size in enumerate(shape):
                if tensor.shape[dim] != size:
                    indices = kept(name, dim)
                    assert indices is not None, name
                    tensor = tensor.index_select(dim, torch.from_numpy(indices))
            return tensor

        self.rebuild(changes, read)

    def run(self, sample: np.ndarray) -> Any:
        """Run the model on token ids, int64 [seq]."""
        return run_model(self.model, sample)

    def observe(self, hooks: "Mapping[str, Callable[[torch.Tensor], object]]", description: str) -> None:
        """Run all samples, and show each hook what its module is given, float32 [tokens, K]."""

        def hook_of(see: "Callable[[torch.Tensor], object]") -> Callable[..., None]:
            def hook(_: Any, inputs: Any) -> None:  # what it returned would take the input's place
                see(inputs[0].reshape(-1, inputs[0].shape[-1]))

            return hook

        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(hook_of(see)) for name, see in hooks.items()
        ]
        try:
            with progress(description, len(self.samples)) as advance:
                for sample in self.samples:
                    self.run(sample)
                    advance()
        finally:
            for handle in handles:
                handle.remove()

    def states(self, sample: np.ndarray) -> "list[torch.Tensor]":
        """Return the residual stream before each block and after the last one, before any final norm, [tokens, K]."""
        found: list[torch.Tensor] = []
        handles = [
            self.block(index).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][0]))
            for index in range(self.num_blocks)
        ]
        handles.append(
            self.block(self.num_blocks - 1).register_forward_hook(
                lambda _, inputs, output: found.append((output[0] if isinstance(output, tuple) else output)[0])
            )
        )
        try:
            self.run(sample)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def grams(self, names: Sequence[str]) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield the mean of x x^T over the inputs x of linear layers, float32 [K, K], in the given order.

        The samples stream through the model as often as it takes to have no more than 1 GiB of sums in memory.
        """
        import torch

        widths = {name: self.model.get_submodule(name).weight.shape[1] for name in names}
        group_size = max(1, _GRAM_BYTES // (4 * max(widths.values()) ** 2))
        for start in range(0, len(names), group_size):
            group = names[start : start + group_size]
            sums = {name: torch.zeros(widths[name], widths[name]) for name in group}
            self.observe({name: _adder(total) for name, total in sums.items()}, "calibrating")
            tokens = sum(len(sample) for sample in self.samples)
            yield from ((name, sums[name] / tokens) for name in group)

    @contextmanager
    def skipping(self, index: int) -> Iterator[None]:
        """Let a block pass on what it is given."""
        handle = self.block(index).register_forward_hook(_pass_on)
        try:
            yield
        finally:
            handle.remove()


def load_model(checkpoint: SafetensorsCheckpoint, task: str) -> tuple[Any, Any]:
    """Return a checkpoint's model in float32, and the type its weights are stored in.

    Raises:
        InputError: weights that are missing, not finite, or do not fit the config.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)  # a pooler that the checkpoint lacks is drawn at random
    stored = getattr(torch, checkpoint.stored_type)
    if task != TEXT_GENERATION:
        return load_encoder(checkpoint.path, checkpoint.config, registry.load("tasks", task).AUTO_MODEL), stored
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            config=checkpoint.config,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise InputError(f"weights of `{checkpoint.path}` do not fit its config.json: {reason}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"weight `{missing[0]}` is missing from `{checkpoint.path}`", "the checkpoint is incomplete")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"weight `{name}` of `{checkpoint.path}` has NaN or infinite values")
    return model.eval(), stored


def build_model(model: Any, config: Any, read: "Callable[[str, tuple[int, ...]], torch.Tensor]") -> Any:
    """Build a model of the same class from another config; `read` gives each parameter by name and shape."""
    import torch

    with parameters_on_meta():
        built = type(model)._from_config(config, dtype=torch.float32)
    for prefix, module in list(built.named_modules()):
        for own, parameter in list(module.named_parameters(recurse=False)):
            name = f"{prefix}.{own}" if prefix else own
            tensor = read(name, tuple(parameter.shape))
            assert tensor.shape == parameter.shape, f"{name}: {tensor.shape}, not {parameter.shape}"
            module._parameters[own] = torch.nn.Parameter(tensor.detach().contiguous(), requires_grad=False)
    built.tie_weights()
    return built.eval()


def changed_config(config: Any, changes: Mapping[str, Any]) -> Any:
    """Return a config with other values; everything else is as it was, lists with an entry per block cut to fit."""
    known = config.to_dict()
    known.pop("model_type")
    if "num_hidden_layers" in changes:
        lists = [key for key in PER_BLOCK if isinstance(known.get(key), list)]
        known |= {key: known[key][: changes["num_hidden_layers"]] for key in lists}
    return type(config)(**(known | {config.attribute_map.get(key, key): value for key, value in changes.items()}))


def tensors_of(model: Any) -> "dict[str, torch.Tensor]":
    """Return all parameters of a model by name, tied ones under each of theirs."""
    return {name: tensor.detach() for name, tensor in model.named_parameters(remove_duplicate=False)}


def run_model(model: Any, sample: np.ndarray) -> Any:
    """Run a model on token ids, int64 [seq], a decoder without a cache."""
    import torch

    ids = torch.from_numpy(np.ascontiguousarray(sample))[None]
    options = {"use_cache": False} if model.can_generate() else {}
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def as_bundle(folder: Path, task: str, model: Any) -> ModelBundle:
    """Return what reads a checkpoint's text: its tokenizer and limits, in the form of a bundle."""
    decoder = task == TEXT_GENERATION
    limit = int(model.config.max_position_embeddings) if decoder else context_length(model)
    return ModelBundle(folder, Manifest(task, architecture={"context_length": limit}), folder / MODEL)


def _adder(total: "torch.Tensor") -> "Callable[[torch.Tensor], object]":
    return lambda rows: total.addmm_(rows.T, rows)


def _pass_on(_: Any, inputs: Any, output: Any) -> Any:
    return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]
