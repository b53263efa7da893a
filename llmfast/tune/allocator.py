"""Memory that a training step frees is kept for the next one.

glibc gives every large array back to the system when it is freed, and the system clears each page that it hands out
again: a good part of a step, for a decoder whose logits are hundreds of megabytes.
Source: https://man7.org/linux/man-pages/man3/mallopt.3.html
"""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_GROWTH = 64 << 20  # bytes asked for at a time


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees until it ends; other allocators are left as they are."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)  # never
    mallopt(_TOP_PAD, _GROWTH)
