"""Where the time of a run went."""

import time

import psutil
from ignite.engine import Engine, Events
from monai.engines import IterationEvents


class TimeReport:
    """Handler that says where the time of an evaluator's run went. It stands before the handlers that write."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("reading", "network", "back to the own grid", "writing"), 0.0)
        self.start_up = 0.0
        self.last = 0.0

    def attach(self, engine: Engine) -> None:
        """Each span is from the event before it to the one named here."""
        engine.add_event_handler(Events.STARTED, self.begin)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self.end_span, "reading")
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.end_span, "network")
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.end_span, "back to the own grid")
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.end_span, "writing")
        engine.add_event_handler(Events.COMPLETED, self.tell)

    def begin(self) -> None:
        self.last = time.monotonic()
        # the clock of day may have been set back since
        self.start_up = max(0.0, time.time() - psutil.Process().create_time())

    def end_span(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] += now - self.last
        self.last = now

    def tell(self, engine: Engine) -> None:
        self.end_span("writing")
        subjects = max(engine.state.iteration, 1)
        spans = ", ".join(f"{name} {seconds / subjects:.2f}" for name, seconds in self.seconds.items())
        mean = sum(self.seconds.values()) / subjects
        print(f"time: {self.start_up:.1f} s to start up, then {mean:.2f} s a subject, waiting for {spans}")
