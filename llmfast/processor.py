"""What processor this is, and which of its instructions decide what kernels of ONNX Runtime run.

Linux says it in /proc/cpuinfo; elsewhere a name is all that is known.
"""

import platform
from functools import cache
from pathlib import Path

# The instruction sets that decide which int8, int4 and bf16 kernels run.
_NAMED = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "asimddp", "i8mm", "sve")
# Those that multiply int8 and add in 32 bits at once.
_INT8_DOT = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
_CPUINFO = Path("/proc/cpuinfo")


def processor_name() -> str:
    """Return the processor's name, or its architecture's."""
    return _fields().get("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Return which of the sets that matter the processor has, as Linux names them; none where the system is another."""
    flags = _flags()
    return [name for name in _NAMED if name in flags]


def saturates_int8() -> bool:
    """Return whether this is known to be an x86 processor that adds two products of int8 in 16 bits.

    There 255 * 127 + 255 * 127 becomes 32,767. ONNX Runtime's fast kernels take that loss:
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html#when-and-why-do-i-need-to-try-u8u8
    """
    flags = _flags()
    return "sse2" in flags and not flags & _INT8_DOT


def _flags() -> set[str]:
    fields = _fields()
    return set(f"{fields.get('flags', '')} {fields.get('Features', '')}".split())


@cache
def _fields() -> dict[str, str]:
    """Return what the system says of the first processor."""
    try:
        text = _CPUINFO.read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
