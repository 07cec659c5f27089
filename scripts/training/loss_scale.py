"""The fixed loss scale of the MindSpore recipe."""

import torch
from ignite.engine import Engine, Events


class FixedLossScale:
    """Handler that keeps the factor of the loss where float16 wants one; it is halved only after an overflow.

    Args:
        scale: the factor; None leaves it to torch, which looks for the largest that doesn't overflow.
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
