"""From a trained model to a compiled one.

`api` is `asap_jax.compile`, and `asap_jax.choose` for another device; `arrays` is
`asap_jax.fit`, for one layer of which there are only arrays; `linen` is
`asap_jax.compile_linen`, by the `slots` where Linen modules call. In the order of their
steps: `sites` finds the Sinkhorn attentions, `recording` watches them on calibration
batches (`batches` checks these, `recorder` records one forward pass, `unreplaced` names
the calls at no site), `recorded` streams what was seen, whoever saw it; from there on
there is one way for all. `prepared` keeps some calls of a layer,
`candidates` says what may stand there, `fitting` fits dual maps, `fidelity` compares
plans with the teacher's, `clock` times, `selection` takes the fastest that is close
enough, `standing` puts it in its place (`kept`: with the others), and `report` says
what was gained. `recipes` and `measuring` are the way of one fixed operator.
`distillation` trains all maps together afterwards; `saving` keeps a compiled model,
with the `records` of what compiling knew; `watching` looks after it at work.
Before all of it, `conversion` makes Sinkhorn attention of softmax, and `moved` says how
far that moves a model.
"""

from asap_jax.compiler.api import Compiled, choose, compile
from asap_jax.compiler.arrays import AttentionCall, Fitted, FittedAttention, fit
from asap_jax.compiler.conversion import Converted, to_sinkhorn
from asap_jax.compiler.distillation import Distilled, distil
from asap_jax.compiler.kept import CandidateAttention
from asap_jax.compiler.linen import CompiledLinen, compile_linen
from asap_jax.compiler.moved import LayerMoved, Moved
from asap_jax.compiler.operators import Sinkhorn
from asap_jax.compiler.recipes import Recipe
from asap_jax.compiler.records import keep_record, record_of, records_of
from asap_jax.compiler.report import Alternative, LayerReport, Report
from asap_jax.compiler.saving import load, save
from asap_jax.compiler.slots import CompiledModule
from asap_jax.compiler.watching import Reading, monitor, unwatched, watch

__all__ = [
  "Alternative",
  "AttentionCall",
  "CandidateAttention",
  "Compiled",
  "CompiledLinen",
  "CompiledModule",
  "Converted",
  "Distilled",
  "Fitted",
  "FittedAttention",
  "LayerMoved",
  "LayerReport",
  "Moved",
  "Reading",
  "Recipe",
  "Report",
  "Sinkhorn",
  "choose",
  "compile",
  "compile_linen",
  "distil",
  "fit",
  "keep_record",
  "load",
  "monitor",
  "record_of",
  "records_of",
  "save",
  "to_sinkhorn",
  "unwatched",
  "watch",
]
