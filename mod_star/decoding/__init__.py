"""Generation from a trained model, token by token, at the cost of what is routed."""

from mod_star.decoding.generate import Generated, Generator
from mod_star.decoding.sampling import Sampling
from mod_star.decoding.text import Completion, complete, encode_prompts
from mod_star.decoding.think import Think

__all__ = ["Completion", "Generated", "Generator", "Sampling", "Think", "complete", "encode_prompts"]
