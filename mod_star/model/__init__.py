"""What the network computes, as pure functions of (params, arrays); knows nothing of files, devices or loops."""

from mod_star.model.routing import Trace
from mod_star.model.transformer import Decoder, Output

__all__ = ["Decoder", "Output", "Trace"]
