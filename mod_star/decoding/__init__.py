"""Generation from a trained model, token by token, at the cost of what is routed.

Import `Generator`, `GenerationConfig`, `Sampling`, `Think` and `complete` from here; `cot_decode` and
`self_consistency` from `mod_star.decoding.cot`, `BeamSearch` from `mod_star.decoding.beam`.
"""

from mod_star.decoding.generate import Generator
from mod_star.decoding.generated import Generated
from mod_star.decoding.generation_config import GenerationConfig
from mod_star.decoding.sampling import Sampling
from mod_star.decoding.text import Completion, complete, complete_many, encode_prompts
from mod_star.decoding.think import Think

__all__ = [
    "Completion",
    "Generated",
    "GenerationConfig",
    "Generator",
    "Sampling",
    "Think",
    "complete",
    "complete_many",
    "encode_prompts",
]
