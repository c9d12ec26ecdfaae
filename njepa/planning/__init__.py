"""What a step costs, computed from the configuration: FLOPs, bytes held and sent, time.

Pure functions; no GPU, no weights. tests/trainer/planning/test_planning.py compares them with
torch's counters, with built models, with saved tensors and with real engines.
"""

from njepa.planning.flops import Flops, mean_flops, recomputed_flops, step_flops
from njepa.planning.memory import activation_bytes, largest_micro_batch, peak_bytes, state_bytes
from njepa.planning.network import Network, Precision, Shape, Stack, network
from njepa.planning.time import GPUS, Gpu, StepTime, step_time, with_ceilings
from njepa.planning.tokens import STEPS, drawn_shapes, largest
from njepa.planning.traffic import traffic_bytes
from njepa.planning.zero import AUTOCAST, BF16, FP32, ZeroSettings, with_stage, zero_settings

__all__ = [
    "AUTOCAST", "BF16", "FP32", "GPUS", "STEPS", "Flops", "Gpu", "Network", "Precision", "Shape",
    "Stack", "StepTime", "ZeroSettings", "activation_bytes", "drawn_shapes", "largest",
    "largest_micro_batch", "mean_flops", "network", "peak_bytes", "recomputed_flops", "state_bytes",
    "step_flops", "step_time", "traffic_bytes", "with_ceilings", "with_stage", "zero_settings",
]  # fmt: skip
