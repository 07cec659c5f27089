"""The fixed loss scale of the MindSpore recipe."""

import torch
from ignite.engine import Engine, Events


class FixedLossScale:
    """Handler that fixes the loss scale in float16; an overflow still halves it.

    Args:
        scale: the factor; None leaves it to torch, which searches for the largest one without overflow.
    """

    def __init__(self, scale: float | None) -> None:
        self.scale = scale

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.replace)

    def replace(self, engine: Engine) -> None:
        if self.scale is not None and engine.scaler is not None:
            never = 2**31 - 1
            device = engine.state.device.type
            engine.scaler = torch.amp.GradScaler(device, init_scale=self.scale, growth_interval=never)
