"""What the network computes: pure functions of (params, arrays). It knows nothing of files, devices or loops.

Import `Decoder`, `Output` and `Trace` from here, and parts of your own from `mod_star.parts`.
"""

from mod_star.model.routing import Trace
from mod_star.model.transformer import Decoder, Output

__all__ = ["Decoder", "Output", "Trace"]
