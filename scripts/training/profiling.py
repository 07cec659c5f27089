"""A trace of training steps, to see where their time goes."""

from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events

from scripts.files import whole_files


class TraceSaver:
    """Handler that records training steps, after two to warm up, in `trace-rank<n>.pt.trace.json`.

    Perfetto and TensorBoard open the file. A training with too few steps writes none and prints so.

    Args:
        output_dir: the folder to write to.
        steps: how many steps to record; 0 for none.
    """

    def __init__(self, output_dir: str, steps: int) -> None:
        self.output_dir = Path(output_dir)
        self.name = f"trace-rank{idist.get_rank()}.pt.trace.json"
        self.written = False
        self.steps = steps

    def attach(self, engine: Engine) -> None:
        if not self.steps:
            return
        schedule = torch.profiler.schedule(wait=1, warmup=1, active=self.steps, repeat=1)
        self.profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=self.write)
        engine.add_event_handler(Events.STARTED, self.profiler.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.profiler.step)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def finish(self) -> None:
        self.profiler.stop()
        if not self.written:
            print("no trace: training ended before the steps to record")

    def write(self, profiler: torch.profiler.profile) -> None:
        with whole_files(self.output_dir) as temporary:
            profiler.export_chrome_trace(str(temporary / self.name))
        self.written = True
        print(f"trace of training steps: {self.output_dir / self.name}")
