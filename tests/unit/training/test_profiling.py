import json

import pytest
import torch
from ignite.engine import Engine

from scripts.training.profiling import TraceSaver


@pytest.mark.parametrize(("steps", "run", "written"), [(2, 6, True), (2, 1, False)])
def test_trace_of_some_steps_in_the_format_of_perfetto_and_tensorboard(tmp_path, steps, run, written, capsys):
    convolution = torch.nn.Conv3d(1, 1, 3)
    engine = Engine(lambda engine, batch: convolution(batch))
    TraceSaver(str(tmp_path), steps).attach(engine)
    engine.run([torch.ones(1, 1, 8, 8, 8)] * run)
    assert [path.name for path in tmp_path.iterdir()] == (["trace-rank0.pt.trace.json"] if written else [])
    assert ("trace of training steps" in capsys.readouterr().out) == written
    if written:
        events = json.loads((tmp_path / "trace-rank0.pt.trace.json").read_text())["traceEvents"]
        assert sum(event["name"] == "aten::conv3d" for event in events) == steps
