"""Choosing which weights become zero: exactly as many as were asked for."""

import numpy as np

from llmfast.prune.options import Pattern


def smallest_of_all(scores: np.ndarray, ratio: float) -> np.ndarray:
    """Return a mask of the smallest scores of a layer, bool [N, K]; round(ratio N K) of it are true."""
    mask = np.zeros(scores.size, bool)
    count = round(ratio * scores.size)
    if count:
        mask[np.argpartition(scores.reshape(-1), count - 1)[:count]] = True
    return mask.reshape(scores.shape)


def smallest_of_rows(scores: np.ndarray, ratio: float) -> np.ndarray:
    """Return a mask of the smallest scores of each row, bool [N, K]; round(ratio K) of each row are true."""
    mask = np.zeros(scores.shape, bool)
    count = round(ratio * scores.shape[1])
    if count:
        np.put_along_axis(mask, np.argpartition(scores, count - 1, axis=1)[:, :count], True, axis=1)
    return mask


def smallest_of_groups(scores: np.ndarray, pattern: Pattern) -> np.ndarray:
    """Return a mask that leaves `keep` of each `group` scores in a row, bool [N, K]; what fills no group stays."""
    rows, columns = scores.shape
    whole = columns // pattern.group * pattern.group
    groups = scores[:, :whole].reshape(rows, -1, pattern.group)
    order = np.argsort(groups, axis=2, kind="stable")[:, :, : pattern.group - pattern.keep]
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order, True, axis=2)
    return np.concatenate([mask.reshape(rows, whole), np.zeros((rows, columns - whole), bool)], axis=1)
