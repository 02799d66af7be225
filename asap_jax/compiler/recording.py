"""Recording of what each Sinkhorn layer of an NNX model sees on batches."""

import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

from flax import nnx

from asap_jax.compiler.batches import kind_of
from asap_jax.compiler.recorded import Calls, Layer, Recorded, layers_at
from asap_jax.compiler.recorder import recorder, shapes_seen
from asap_jax.compiler.sites import Site, find_sinkhorn
from asap_jax.compiler.unreplaced import ADVICE, Unreplaced, nothing_found


class Observer(Recorded):
  """Frozen teacher and its calibration batches.

  Args:
    model: the teacher, left untouched.
    batches: its inputs; see `Recorded`.
    call: how a batch is given to the model.
    progress: whether streams show a progress bar.
    leave: names of layers that are not observed.

  Attributes:
    sites: of the model's Sinkhorn attentions; all else as of `Recorded`.
    layers: at those sites, in the model's order.
    unreplaced: calls of Sinkhorn attention at no site, by name.

  Raises:
    ValueError: if there is nothing to observe: no Sinkhorn attention, no batch, or
      attention that is not called or not visible.
  """

  sites: list[Site]

  def __init__(
    self,
    model: nnx.Module,
    batches: Iterable[Any],
    call: Callable[[nnx.Module, Any], Any],
    progress: bool,
    leave: Collection[str] = (),
  ):
    if not isinstance(model, nnx.Module):
      raise ValueError(
        f"model is of {kind_of(model)}: expected a Flax NNX module, for its attention "
        "functions are found among the attributes of its modules; Linen has "
        "asap_jax.compile_linen, and asap_jax.fit takes the queries and keys of one "
        "layer, whatever it is made of"
      )
    found = find_sinkhorn(model)
    unknown = set(leave) - {site.name for site in found}
    if unknown:
      raise ValueError(
        f"leave={sorted(unknown)}: no such Sinkhorn attention is held; expected some "
        f"of {[site.name for site in found]}"
      )
    sites = [site for site in found if site.name not in leave]
    left = [site for site in found if site.name in leave]
    hear = Unreplaced()
    record = recorder(model, sites, call, hear, left)
    super().__init__(sites, (), batches, record, progress)
    seen = shapes_seen(record, model, self.first, call)
    self.unreplaced = hear.names
    if not sites:
      raise ValueError(nothing_found(model, self.unreplaced))
    self.layers = _layers(sites, seen, self.unreplaced)
    if self.unreplaced:
      warnings.warn(
        "Sinkhorn attention that stays as it is, for no module holds its function: "
        f"{'; '.join(self.unreplaced)}. To compile it, {ADVICE}",
        stacklevel=3,
      )


def _layers(sites: list[Site], seen: Calls, unreplaced: tuple[str, ...]) -> list[Layer]:
  layers = []
  for site, calls in zip(sites, seen, strict=True):
    if not calls:
      raise ValueError(
        f"{site.name}: no call of this attention was seen on a calibration batch; pass "
        "call=, or batches that reach it; a model that splits and merges its modules "
        "inside a JAX transformation hides the calls; leave= passes over it"
        + (f". Calls of others were: {'; '.join(unreplaced)}" if unreplaced else "")
      )
    layers += layers_at(site, calls)
  return layers
