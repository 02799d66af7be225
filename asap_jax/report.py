"""What compiling gained and lost, layer by layer and head by head."""

import dataclasses
import io

import numpy as np
from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class LayerReport:
  """Fidelity of one compiled layer to its teacher, on held-out calibration batches.

  Arrays are per head, `[heads]`; plan metrics are means over valid rows or columns.

  Attributes:
    name: path of the attention function in the model.
    iterations: full Sinkhorn iterations of the teacher.
    r2: share of the variance of the teacher's dual that the dual map predicts.
    tv: total variation distance to the teacher's plan, 0 to 1.
    kl: KL(teacher || compiled), nats.
    column_error: mean |column sum / target - 1| of the compiled plan.
    teacher_column_error: the same of the teacher's plan.
    teacher_milliseconds: one attention call of the teacher, from queries, keys and
      values to outputs, on a held-out batch; compiled by XLA, warm, median.
    milliseconds: the same of the compiled operator.
    seconds: spent on this layer, apart from the teacher's forward passes, which all
      layers share.
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


@dataclasses.dataclass(frozen=True)
class Report:
  """The layers of a compiled model; prints as a table.

  Attributes:
    layers: one report per layer, in the model's order.
    slices: slices per head.
    batches: calibration batches that were fitted; the figures are of the others.
    tokens: valid query tokens fitted, of the first layer and head.
    seconds: wall time of the whole compilation.
  """

  layers: tuple[LayerReport, ...]
  slices: int
  batches: int
  tokens: int
  seconds: float

  def __str__(self) -> str:
    caption = (
      f"{self.slices} slices; fitted on {self.batches} batches ({self.tokens} tokens), "
      f"measured on held-out batches; {self.seconds:.1f} s in all. "
      "ms: teacher -> compiled, one call of the attention operator."
    )
    table = Table(caption=caption, caption_justify="left")
    table.add_column("layer", no_wrap=True)
    for name in ("head", "R2", "TV", "KL", "column error", "of teacher", "ms"):
      table.add_column(name, justify="right")
    for layer in self.layers:
      times = f"{layer.teacher_milliseconds:.2f} -> {layer.milliseconds:.2f}"
      columns = (
        layer.r2,
        layer.tv,
        layer.kl,
        layer.column_error,
        layer.teacher_column_error,
      )
      for head, values in enumerate(zip(*columns, strict=True)):
        first = (layer.name, times) if head == 0 else ("", "")
        table.add_row(first[0], str(head), *(f"{v:.4f}" for v in values), first[1])
      table.add_section()
    stream = io.StringIO()
    Console(file=stream, width=110).print(table)
    return stream.getvalue().rstrip("\n")
