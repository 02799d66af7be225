"""Report of what compiling gained and lost, layer by layer and head by head."""

import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

TEACHER = "teacher"


def device_kind() -> str:
  """The kind of device that JAX computes on by default."""
  return jax.devices()[0].device_kind


@dataclasses.dataclass(frozen=True)
class Alternative:
  """Attention operator measured on one layer's held-out activations.

  Attributes:
    label: `"asap"`, `"asap@2"` with two closures, `"sinkhorn@3"` for the teacher
      stopped after three full iterations, and so on.
    tv: total variation distance to the teacher's plan, mean over heads and rows.
    milliseconds: one attention call, as in `LayerReport`.
  """

  label: str
  tv: float
  milliseconds: float

  @property
  def cut(self) -> int | None:
    """Iterations of a `"sinkhorn@k"`, `None` for other operators."""
    match = re.fullmatch(r"sinkhorn@(\d+)", self.label)
    return None if match is None else int(match[1])


@dataclasses.dataclass(frozen=True)
class LayerReport:
  """Fidelity of one compiled layer to its teacher, on held-out calibration batches.

  Arrays are per head, `[heads]`; plan metrics are means over valid rows or columns.

  Attributes:
    name: path of the attention function in the model.
    iterations: full Sinkhorn iterations of the teacher.
    r2: share of the variance of the teacher's dual that the dual map predicts; NaN
      where there is no dual map.
    tv: total variation distance to the teacher's plan, 0 to 1.
    kl: KL(teacher || compiled), nats.
    column_error: mean |column sum / target - 1| of the compiled plan.
    teacher_column_error: column error of the teacher's plan.
    teacher_milliseconds: one attention call of the teacher, from queries, keys and
      values to outputs, on a held-out batch; compiled by XLA, warm, median.
    milliseconds: one call of the compiled operator, measured in the same way.
    seconds: spent on this layer, apart from the teacher's forward passes, which all
      layers share.
    alternatives: operators that were measured on this layer.
    chosen: label of the compiled model's operator, which the figures describe;
      `"teacher"` where the teacher was kept.
  """

  name: str
  iterations: int
  r2: np.ndarray
  tv: np.ndarray
  kl: np.ndarray
  column_error: np.ndarray
  teacher_column_error: np.ndarray
  teacher_milliseconds: float
  milliseconds: float
  seconds: float
  alternatives: tuple[Alternative, ...] = ()
  chosen: str = "asap"

  @property
  def exact_milliseconds(self) -> float:
    """All iterations of the teacher in their fastest form."""
    exact = (TEACHER, f"sinkhorn@{self.iterations}")
    times = [a.milliseconds for a in self.alternatives if a.label in exact]
    return min(times, default=self.teacher_milliseconds)

  @property
  def teacher(self) -> Alternative:
    """Teacher's own attention, as a point beside the alternatives."""
    return Alternative("teacher", 0.0, self.teacher_milliseconds)

  @property
  def standing(self) -> Alternative:
    """Chosen operator, as it was measured among the alternatives if it is there."""
    for alternative in self.alternatives:
      if alternative.label == self.chosen:
        return alternative
    if self.chosen == "teacher":
      return self.teacher
    return Alternative(self.chosen, float(np.mean(self.tv)), self.milliseconds)

  @property
  def better_cut(self) -> Alternative | None:
    """Closest cut Sinkhorn that is no slower and no farther than the chosen operator.

    `None` if every cut that was measured is slower or farther.
    """
    most = self.standing
    cuts = [
      a for a in self.alternatives if a.cut is not None and a.label != self.chosen
    ]
    better = [
      a for a in cuts if a.tv <= most.tv and a.milliseconds <= most.milliseconds
    ]
    return min(better, key=lambda a: (a.tv, a.milliseconds), default=None)


@dataclasses.dataclass(frozen=True)
class Report:
  """Layers of a compiled model; prints as a table, draws as `plot`.

  Attributes:
    layers: one report per layer, in the model's order.
    model_milliseconds: median times of the whole model's forward pass on a calibration
      batch: `"as trained"`, `"exact, fastest"` (all iterations, in their fastest form),
      `"compiled"`, and `"softmax"` in the place of every Sinkhorn attention.
    target_tv: that operators were chosen by; `None` for a fixed operator.
    seconds: wall time of the whole compilation.
    device: that was measured on, as JAX calls its kind.
    unreplaced: Sinkhorn attention that the model calls but holds where it cannot be
      replaced, by module, function and line: it stays as it was.
  """

  layers: tuple[LayerReport, ...]
  model_milliseconds: dict[str, float]
  target_tv: float | None
  seconds: float
  device: str = dataclasses.field(default_factory=device_kind)
  unreplaced: tuple[str, ...] = ()

  @property
  def headline(self) -> str:
    """What was gained, in one line."""
    teacher = sum(layer.teacher_milliseconds for layer in self.layers)
    exact = sum(layer.exact_milliseconds for layer in self.layers)
    own = sum(layer.milliseconds for layer in self.layers)
    tv = float(np.mean([layer.tv.mean() for layer in self.layers]))
    return (
      f"Attention {teacher / own:.1f} times as fast as trained, {exact / own:.2f} "
      f"times as its fastest exact form; held-out TV {tv:.3f}."
    )

  def __str__(self) -> str:
    times = ", ".join(f"{k} {v:.1f}" for k, v in self.model_milliseconds.items())
    caption = (
      f"Measured on held-out batches, on {self.device}; {self.seconds:.1f} s in all. "
      "ms: teacher -> compiled, one call of the attention operator. Whole model, ms: "
      f"{times}."
    )
    table = Table(caption=caption, caption_justify="left")
    table.add_column("layer", no_wrap=True)
    for name in ("head", "R2", "TV", "KL", "column error", "of teacher", "ms"):
      table.add_column(name, justify="right")
    mixed = any(layer.chosen != "asap" for layer in self.layers)
    if mixed:
      table.add_column("chosen", no_wrap=True)
    for layer in self.layers:
      times = f"{layer.teacher_milliseconds:.2f} -> {layer.milliseconds:.2f}"
      columns = [layer.r2, layer.tv, layer.kl, layer.column_error]
      columns.append(layer.teacher_column_error)
      for head, values in enumerate(zip(*columns, strict=True)):
        first = (escape(layer.name), times, layer.chosen) if head == 0 else ("", "", "")
        # Iterations predict no dual, and have no R2.
        figures = ("-" if np.isnan(value) else f"{value:.4f}" for value in values)
        table.add_row(first[0], str(head), *figures, first[1], *first[2:][:mixed])
      table.add_section()
    stream = io.StringIO()
    # Wider where names of operators would leave too little for the figures. In a
    # notebook rich would display the table instead of writing it, or colour it.
    width = 120 if mixed else 100
    console = Console(
      file=stream, width=width, force_jupyter=False, force_terminal=False
    )
    console.print(self.headline, markup=False, highlight=False)
    console.print(table)
    for layer in self.layers:
      for line in _remarks(layer, self.target_tv):
        # Paths may hold brackets, which are markup otherwise.
        console.print(line, markup=False, highlight=False)
    for name in self.unreplaced:
      line = f"Not compiled, for no module holds its function: {name}."
      console.print(line, markup=False, highlight=False)
    return stream.getvalue().rstrip("\n")

  def plot(self, axes: Sequence[Any] | np.ndarray | None = None) -> np.ndarray:
    """Draws fidelity against time on axes `[layers]`: `asap_jax.plotting.plot_report`.

    Needs Matplotlib, which comes with the extra `experiments`.
    """
    from asap_jax.plotting import plot_report  # Matplotlib is optional

    return plot_report(self, axes)


def _remarks(layer: LayerReport, target_tv: float | None) -> list[str]:
  """Where the exact iterations stay, or where one of them would have been better."""
  exact = (TEACHER, f"sinkhorn@{layer.iterations}")
  if target_tv is not None and layer.chosen in exact:
    return [
      f"{layer.name}: all {layer.iterations} iterations stay, in their fastest form: "
      f"nothing faster comes within TV {target_tv} here."
    ]
  cut = layer.better_cut
  return [] if cut is None else [_advice(layer, cut)]


def _advice(layer: LayerReport, cut: Alternative) -> str:
  standing = layer.standing
  faster = "faster" if cut.milliseconds < standing.milliseconds else "as fast"
  closer = "closer" if cut.tv < standing.tv else "as close"
  count = "1 iteration" if cut.cut == 1 else f"{cut.cut} iterations"
  name = f"Sinkhorn cut to {count}"
  if cut.cut == layer.iterations:
    name = f"the teacher's Sinkhorn itself, in its fastest form ({count}),"
  return (
    f"{layer.name}: {name} is {faster} and {closer} here "
    f"(TV {cut.tv:.4f} in {cut.milliseconds:.2f} ms; {standing.label}: "
    f"{standing.tv:.4f} in {standing.milliseconds:.2f} ms)."
  )
