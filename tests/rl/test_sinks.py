"""Where metrics go: names that a table documents, TensorBoard, Weights & Biases, a bar and a plot."""

import dataclasses
import re
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from counting_loop import NUMBERS
from test_trainer import SAMPLING, TINY

from jaxengine.rl.loops import live_plot, sinks
from jaxengine.rl.loops.step_metrics import step_metrics
from jaxengine.rl.objective import ALGORITHMS
from jaxengine.rl.train_state import Batch, TrainerConfig
from jaxengine.rl.trainer import Trainer

README = Path(sinks.__file__).parent.parent / "README.md"
STEPS = [(0, {"evaluation/x": 0.5}), (1, {"reward": 0.25}), (2, {"reward": 0.5}), (2, {"evaluation/x": 0.75})]


def names_of_an_update(algorithm: str, **how) -> set[str]:
    """What an update measures, found by tracing it, and what `train` adds."""
    objective = dataclasses.replace(ALGORITHMS[algorithm], **how)
    trainer = Trainer(TINY[0], optax.sgd(1.0), TrainerConfig(objective, SAMPLING))
    like = lambda dtype: jnp.zeros((2, 8), dtype)
    critic = dict(old_values=like(jnp.float32), returns=like(jnp.float32)) if trainer.has_critic else {}
    near = like(jnp.float32)
    batch = Batch(like(jnp.int32), like(bool), like(jnp.float32), like(jnp.float32), reference=near, **critic)
    return {"staleness"} | set(jax.eval_shape(trainer.update, trainer.start(TINY[1], jax.random.key(0)), batch)[1])


def test_the_table_has_every_metric():
    """And no other. What an iteration itself measures is read off its fields."""
    names = names_of_an_update("grpo") | names_of_an_update("ppo", entropy_coefficient=0.1)
    numbers = NUMBERS | {"updates": [dict.fromkeys(sorted(names), 0.0)]}
    _, section = README.read_text().split("\n# A run that can be left alone\n")
    documented = set(re.findall(r"^\| `([\w/]+)` \|", section, re.MULTILINE))
    assert step_metrics(numbers).keys() | {"evaluation/NAME"} == documented


def test_metrics_of_an_iteration():
    updates = [{"kl": 0.0, "entropy": 3.0}, {"kl": 0.5, "entropy": 4.0}]
    numbers = dict(tokens=120, batch_tokens=100, generating=4.0, learning=2.0, deviation=0.3, entropy=None)
    iteration = NUMBERS | numbers | {"updates": updates}
    metrics = step_metrics(iteration | {"rewards": {"right": 0.5}})
    assert metrics["reward_deviation"] == 0.3 and metrics["rewards/right"] == 0.5
    assert (metrics["kl"], metrics["kl_first"], metrics["loss_entropy"]) == (0.5, 0.0, 4.0)
    assert (metrics["generated_tokens_per_second"], metrics["learned_tokens_per_second"]) == (30.0, 50.0)
    assert not {"entropy", "version", "updates", "generating", "deviation"} & metrics.keys()


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) in TensorBoard's event files, in order, without those that a later START takes back."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # length, checksum, event, checksum
            (size,) = struct.unpack_from("<Q", data)
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == SessionLog.START:
                found = [entry for entry in found if entry[0] < event.step]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard(tmp_path):
    """A run that goes on writes again what was measured after its snapshot, and nothing stands there twice."""
    pytest.importorskip("tensorboardX", reason="pip install 'jaxengine[tensorboard]' brings it")
    first = sinks.TensorBoard(tmp_path)
    for step in STEPS:
        first(*step)
    expected = [(step, name, value) for step, metrics in STEPS for name, value in metrics.items()]
    assert scalars(tmp_path) == expected  # nothing waits for a close
    again = sinks.TensorBoard(tmp_path)
    for step in STEPS[2:]:
        again(*step)
    assert scalars(tmp_path) == expected
    evaluated_late = sinks.TensorBoard(tmp_path)
    evaluated_late(2, {"evaluation/y": 1.0})
    assert scalars(tmp_path) == [*expected, (2, "evaluation/y", 1.0)]


@pytest.mark.slow  # .ci/run has the library there
def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install 'jaxengine[wandb]' brings it")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = sinks.WeightsAndBiases(project="test", mode="offline", dir=tmp_path)
    for step in [*STEPS, (3, {"reward": 0.75})]:
        sink(*step)
    assert sink.run.summary["reward"] == 0.5 and sink.run.summary["evaluation/x"] == 0.75  # up to step 2, which is over
    sink.run.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    "module, make, extra",
    [
        ("tensorboardX.event_file_writer", lambda: sinks.TensorBoard("folder"), "tensorboard"),
        ("wandb", lambda: sinks.WeightsAndBiases(project="test"), "wandb"),
        ("matplotlib.figure", live_plot.LivePlot, "notebooks"),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch, module, make, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module} .*pip install 'jaxengine\[{extra}\]'"):
        make()


def test_the_bar_shows_what_is_watched(capsys):
    with sinks.ProgressBar(12, done=1, name="grpo") as bar:
        bar(1, {"evaluation/x": 0.5})
        for step in range(2, 13):
            bar(step, {"reward": step / 10, "entropy": 0.25, "kl": 0.0, "length": 3.0})
    last = capsys.readouterr().err.split("\r")[-1]
    assert "grpo: 100%" in last and "12/12" in last
    assert "reward=0.750, entropy=0.250, kl=0.0000, length=3.0" in last  # the mean of steps 3 to 12


def test_a_plot_without_a_display(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'jaxengine[notebooks]' brings it")
    plot = live_plot.LivePlot(["reward", "evaluation/x"])
    for step in STEPS:
        plot(*step)
    lines = {panel.get_title(): panel.lines[0].get_xydata().tolist() for panel in plot.figure.axes}
    assert lines == {"reward": [[1, 0.25], [2, 0.5]], "evaluation/x": [[0, 0.5], [2, 0.75]]}
    plot.figure.savefig(tmp_path / "plot.png")
    np.testing.assert_array_less(1000, (tmp_path / "plot.png").stat().st_size)


class Shown:
    """Stands for IPython's display, and the handle that it gives."""

    def __init__(self) -> None:
        self.pictures = []

    def display(self, picture, *, display_id):
        assert display_id and not self.pictures, "a second picture would stand below the first"
        self.pictures.append(picture)
        return self

    def update(self, picture):
        self.pictures.append(picture)

    def Image(self, *, data):
        return data


def test_a_plot_is_drawn_again_in_its_place(monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install 'jaxengine[notebooks]' brings it")
    shown = Shown()
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    monkeypatch.setattr(live_plot, "_is_notebook", lambda: True)
    plot = live_plot.LivePlot(["reward"], every=2)
    for step in range(1, 5):
        plot(step, {"reward": step})
    assert len(shown.pictures) == 2 and all(picture.startswith(b"\x89PNG") for picture in shown.pictures)
    assert shown.pictures[0] != shown.pictures[1]
