"""The inverse of X^T X, by which GPTQ and SparseGPT let the weights to come make up for an error."""

import numpy as np

_DAMPING_TRIES = 4


def inverse_factor(gram: np.ndarray, damping: float) -> np.ndarray | None:
    """Return the upper factor U of the inverse, U^T U = (gram + damp I)^-1, float32 [K, K]; None if singular."""
    matrix = gram.astype(np.float64)
    mean = float(np.trace(matrix)) / len(matrix)
    for attempt in range(_DAMPING_TRIES):
        damped = matrix + np.eye(len(matrix)) * (damping * 10**attempt * mean)
        try:
            np.linalg.cholesky(damped)  # tells whether it is positive definite
            upper = np.linalg.cholesky(np.linalg.inv(damped)).T
        except np.linalg.LinAlgError:
            continue
        if np.isfinite(upper).all():
            return np.ascontiguousarray(upper, np.float32)
    return None
