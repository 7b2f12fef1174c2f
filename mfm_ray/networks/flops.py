"""What a call of a network costs, counted and not estimated: the unit of every figure of FLOP/s and MFU."""

from __future__ import annotations

import itertools

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mfm_ray.flow_map import FlowMap


@torch.no_grad()
def forward_flops(flow_map: FlowMap) -> float:
    """Floating-point operations of one row of one `velocity` call: twice the multiply-adds.

    Matrix products, convolutions and attention count, elementwise work does not. A backward pass through the call
    costs about twice as much again. The network computes one labelled row, on the device where its weights are; the
    weights must be there, which those of a network on the meta device are not.
    """
    tensors = itertools.chain(flow_map.parameters(), flow_map.buffers(), [torch.zeros(())])
    device = next(tensors).device
    x, time = torch.zeros(1, *flow_map.event_shape, device=device), torch.full((1,), 0.5, device=device)
    label = torch.zeros(1, dtype=torch.int64, device=device) if flow_map.num_classes else None
    # the counter knows no formula of the CPU's fused attention; written out, attention is two products it does know
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        flow_map.velocity(x, time, time, t=time, x_t=x, label=label)
    return float(counter.get_total_flops())
