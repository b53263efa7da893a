"""The KV cache of a prompt in a file: what the next prompt has in common with it is not computed again.

The file is in the safetensors format (https://github.com/huggingface/safetensors#format): `tokens` int64 [n], and
`past_key_values.{i}.key|value` [1, heads, n, head size] as the graph caches them; its metadata say of which model. What
is taken over is cut where kernels cut, so answers are those without the file, to the bit, as in a batch.
"""

from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bundle import ModelBundle, stage_file
from llmfast.errors import InputError, OptionError, ResourceError, UnsupportedError
from llmfast.files import open_regular
from llmfast.infer.decoder import Decoder, common_beginning
from llmfast.infer.engine import Engine

_FORMAT = "llmfast-prompt-cache-1"
_TOKENS = "tokens"
# A prompt that found less of itself in the file takes the file's place.
_ENOUGH = 0.75


class PromptCache:
    """A file that holds a prompt's keys and values.

    Args:
        path: need not exist.
        bundle: the model that the cache is of.

    Raises:
        OptionError: its folder does not exist.
        UnsupportedError: the model is no bundle of llmfast's.
    """

    def __init__(self, path: Path, bundle: ModelBundle) -> None:
        if not path.resolve().parent.is_dir():
            raise OptionError(f"no such folder: `{path.parent}`", "make it first, or choose another --prompt-cache")
        self.path = path
        self._name, self._digest = bundle.name, bundle.digest
        self._reused = 0

    def load(self, engine: Decoder, prompt_ids: np.ndarray) -> int:
        """Let an empty engine begin with what the file holds of a prompt; return how many positions that is.

        Raises:
            InputError: no prompt cache, truncated, or of another model.
            UnsupportedError: the model's cache is no slab in this process's memory.
        """
        own = self._slab(engine)
        self._reused = 0
        if self.path.exists():
            held, cache = self._read(own)
            self._reused = common_beginning(held, prompt_ids)
            if self._reused:
                own.load_cache({name: array[:, :, : self._reused] for name, array in cache.items()})
        return self._reused

    def save(self, engine: Decoder, prompt_ids: np.ndarray) -> bool:
        """Write the prompt that the engine has read, unless the file held most of it; return whether it was written.

        Raises:
            ResourceError: it can't be written; what was there stays.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        if self._reused >= _ENOUGH * len(prompt_ids) and self.path.exists():
            return False
        cache = self._slab(engine).copy_cache(len(prompt_ids))
        facts = {"format": _FORMAT, "name": self._name, "model": self._digest, "kv": _kind(cache)}
        with stage_file(self.path, overwrite=True) as staged:
            try:
                save_file({_TOKENS: prompt_ids.astype(np.int64), **cache}, staged, metadata=facts)
                staged.chmod(0o600)  # the prompt may be private
            except SafetensorError as error:
                raise ResourceError(f"cannot write `{self.path}`: {error}") from error
        return True

    def spell(self, prompt_tokens: int, is_written: bool) -> str:
        """Return what the file was good for, for people."""
        text = f"note: {self._reused} of {prompt_tokens} prompt tokens were in `{self.path}`"
        return f"{text}; it holds this prompt now" if is_written else text

    def _slab(self, engine: Decoder) -> Engine:
        if not isinstance(engine, Engine):
            raise UnsupportedError(f"`{self._name}` has a cache that grows: no --prompt-cache", "leave it out")
        return engine

    def _read(self, engine: Engine) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        from safetensors import SafetensorError, safe_open

        own = engine.copy_cache(0)
        try:
            with open_regular(self.path):
                pass  # no folder, no pipe
            with safe_open(self.path, framework="numpy") as file:
                facts = file.metadata() or {}
                if facts.get("format") != _FORMAT:
                    raise InputError(
                        f"no prompt cache: `{self.path}`", "name a file that --prompt-cache wrote, or none"
                    )
                self._require_same(facts, _kind(own))
                arrays: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"truncated or corrupt prompt cache: `{self.path}`: {error}", "remove it") from error
        held = arrays.pop(_TOKENS, np.zeros(0))
        shapes = {name: (1, array.shape[1], len(held), array.shape[3]) for name, array in own.items()}
        types = {name: array.dtype for name, array in own.items()}
        is_whole = held.ndim == 1 and held.dtype == np.int64 and {name: a.shape for name, a in arrays.items()} == shapes
        if not is_whole or {name: array.dtype for name, array in arrays.items()} != types:
            raise InputError(f"malformed prompt cache: `{self.path}`: its parts do not fit together", "remove it")
        return held, arrays

    def _require_same(self, facts: dict[str, str], kind: str) -> None:
        """Refuse the cache of another model; the message names what differs."""
        ours = {"model": self._digest, "kv": kind}
        differing = [name for name, value in ours.items() if facts.get(name) != value]
        if not differing:
            return
        spelled = {
            "model": f"`model` is `{facts.get('name', '')}` ({facts.get('model', '')[:8]}), not `{self._name}` "
            f"({self._digest[:8]})",
            "kv": f"`kv` is {facts.get('kv', 'unknown')}, not {kind}",
        }
        raise InputError(
            f"`{self.path}` is the prompt cache of another model: {'; '.join(spelled[name] for name in differing)}",
            "remove it, or give each model a file of its own",
        )


def _kind(cache: dict[str, np.ndarray]) -> str:
    return ", ".join(sorted({str(array.dtype) for array in cache.values()}))
