"""Where the time of a run goes."""

import time

import psutil
from ignite.engine import Engine, Events
from monai.engines import IterationEvents

# The event that ends each span. Results are written at ITERATION_COMPLETED, after MODEL_COMPLETED, so this handler may
# stand anywhere among the others. Ignite's BasicTimeProfiler doesn't know MONAI's two events: it can't separate the
# network from the way back to the subject's grid.
SPANS = {
    "reading": Events.GET_BATCH_COMPLETED,
    "network": IterationEvents.FORWARD_COMPLETED,
    "back to the own grid": IterationEvents.MODEL_COMPLETED,
    "writing": Events.GET_BATCH_STARTED,
}


class TimeReport:
    """Handler that prints where the time of an evaluator's run went, per subject."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(SPANS, 0.0)
        self.start_up = 0.0
        self.last = 0.0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.begin)
        for name, event in SPANS.items():
            engine.add_event_handler(event, self.end_span, name)
        engine.add_event_handler(Events.COMPLETED, self.report)

    def begin(self) -> None:
        self.last = time.monotonic()
        # the clock may have been set back since the process began
        self.start_up = max(0.0, time.time() - psutil.Process().create_time())

    def end_span(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] += now - self.last
        self.last = now

    def report(self, engine: Engine) -> None:
        self.end_span("writing")
        subjects = max(engine.state.iteration, 1)
        spans = ", ".join(f"{name} {seconds / subjects:.2f}" for name, seconds in self.seconds.items())
        mean = sum(self.seconds.values()) / subjects
        print(f"time: {self.start_up:.1f} s to start up, then {mean:.2f} s a subject, waiting for {spans}")
