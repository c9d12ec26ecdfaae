"""Bytes on the wire in a step."""

from __future__ import annotations

from njepa.planning.network import Network
from njepa.planning.zero import AUTOCAST, BF16, ZeroSettings


def traffic_bytes(net: Network, zero: ZeroSettings, world: int) -> dict[str, float]:
    """Bytes that each rank sends in one optimizer step of one micro-batch, by rings of all ranks.

    A ring all-reduce of b bytes sends 2 (n-1)/n b, a reduce-scatter or all-gather (n-1)/n b.
    Stages 1 and 2 all-reduce gradients by default, where half of it would do (DeepSpeed 0.19.8,
    zero/stage_1_and_2.py, ``allreduce_and_scatter``), and then collect the updated parameters.
    Stage 3 gathers parameters for the forward, again for the backward, and the encoder's in fp32
    for the target encoder. Under torch_autocast stages 1 to 3 send the gradients of Linear and
    Conv2d layers in bf16, and stage 3 such parameters too; stage 0 sends fp32. With accumulation,
    stages 2 and 3 send gradients for every micro-batch.
    """
    ring = (world - 1) / world
    width = zero.precision.parameter
    full = width * net.trained_parameters
    low = full
    if zero.precision is AUTOCAST:
        low = 4 * net.trained_parameters - 2 * net.matrix_parameters
    follow = 0.0
    if zero.precision is BF16 and zero.stage:
        follow = 4 * net.encoder_parameters  # the shards of the fp32 master
    elif zero.stage == 3:
        follow = width * net.encoder_parameters
    if zero.stage == 0:
        return {"all-reduce of gradients": 2 * ring * full}
    twice = zero.stage < 3 and zero.all_reduce
    return {
        f"{'all-reduce' if twice else 'reduce-scatter'} of gradients": ring * low * (1 + twice),
        "all-gather of parameters": ring * (2 * low if zero.stage == 3 else full),
        "all-gather for the target": ring * follow,
    }
