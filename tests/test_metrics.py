import io
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.event_file_loader import EventFileLoader  # type: ignore[import-not-found,unused-ignore]

from mod_star.errors import InputError
from mod_star.training.metrics import MetricsWriter, read_metrics
from mod_star.training.progress import TrainingProgress
