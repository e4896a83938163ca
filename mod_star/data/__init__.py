"""Text from many sources as packed, batched, resumable streams of tokens. Needs neither TensorFlow nor PyTorch.

Import `train_batches`, `held_out_batches` and `read_sources` from here, and `Batch`, the type of what they give.
"""

from mod_star.data.pipeline import Batch, held_out_batches, merge_states, prefetch_to_device, train_batches
from mod_star.data.sources import read_sources

__all__ = [
    "Batch",
    "held_out_batches",
    "merge_states",
    "prefetch_to_device",
    "read_sources",
    "train_batches",
]
