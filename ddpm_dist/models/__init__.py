"""Networks by name. Every one is called ``network(x, t, y)``.

x (B, C, H, W) floating point, t (B,) integer indices into the schedule, y (B,) int64 labels with -1 = label dropped,
or None = all dropped; the result has the shape of x.
"""

from ddpm_dist.models.registry import build_model, infer_keywords, model_keywords, recognise
from ddpm_dist.models.weights import initialise_from, load_weights, save_weights

__all__ = [
    "build_model",
    "infer_keywords",
    "initialise_from",
    "load_weights",
    "model_keywords",
    "recognise",
    "save_weights",
]
