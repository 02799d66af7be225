"""Encoders of texts and of images."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.common.models import AttentionFn, Classifier, EncoderConfig

Batch = Mapping[str, jax.Array]


class TextEncoder(Classifier):
  """Batches of token ids, `ids` and `valid` `[batch, length]`, to class logits."""

  def __call__(self, batch: Batch, rngs: nnx.Rngs | None = None) -> jax.Array:
    """Class logits `[batch, classes]`; other entries of `batch` are not read."""
    return self.logits(*self.tokens(batch), rngs)

  def tokens(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What `logits` and `states` take of a batch: tokens, and which are no padding."""
    return batch["ids"], batch["valid"]

  def _embedding(self, config: EncoderConfig, rngs: nnx.Rngs) -> nnx.Module:
    dtype = jnp.dtype(config.dtype)
    return nnx.Embed(config.token_size, config.width, dtype=dtype, rngs=rngs)


class VisionTransformer(Classifier):
  """Batches of images, `image` `[batch, height, width, channels]`, to class logits.

  Args:
    config: sizes; `token_size` is patch^2 * channels.
    attention_fn: as of `Classifier`.
    rngs: source of the weights, stream `params`.
    patch: side of a patch, a token each.
    channels: of the images.
    convolutions: whether patches are embedded by convolutions that halve the sides
      until a patch is one place, instead of each on its own: they overlap, and are
      learned faster (Xiao et al., 2021, "Early convolutions help transformers see
      better", arXiv 2106.14881).

  Raises:
    ValueError: if convolutions are to embed patches whose side is no power of two.
  """

  def __init__(
    self,
    config: EncoderConfig,
    attention_fn: AttentionFn | Sequence[AttentionFn],
    rngs: nnx.Rngs,
    *,
    patch: int,
    channels: int = 3,
    convolutions: bool = False,
  ):
    self.patch, self._channels = patch, channels
    self.convolutions = convolutions
    if convolutions and patch & (patch - 1):
      raise ValueError(f"patch={patch}: expected a power of two for convolutions")
    super().__init__(config, attention_fn, rngs)

  def __call__(self, batch: Batch, rngs: nnx.Rngs | None = None) -> jax.Array:
    """Class logits `[batch, classes]`; other entries of `batch` are not read.

    Raises:
      ValueError: if the patches do not divide the images.
    """
    return self.logits(*self.tokens(batch), rngs)

  def tokens(self, batch: Batch) -> tuple[jax.Array, None]:
    """What `logits` and `states` take of a batch; see there for what is raised."""
    images = batch["image"]
    return images if self.convolutions else patches(images, self.patch), None

  def _embedding(self, config: EncoderConfig, rngs: nnx.Rngs) -> nnx.Module:
    if self.convolutions:
      return Convolutions(config, self.patch, self._channels, rngs)
    return super()._embedding(config, rngs)


class Convolutions(nnx.Module):
  """Images `[batch, height, width, channels]` to tokens, one for each patch."""

  def __init__(self, config: EncoderConfig, patch: int, channels: int, rngs: nnx.Rngs):
    count = max(1, patch.bit_length() - 1)
    sizes = [config.width >> (count - 1 - i) for i in range(count)]
    self.layers = nnx.List(
      nnx.Conv(
        before,
        after,
        (3, 3),
        strides=1 if patch == 1 else 2,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
      )
      for before, after in zip([channels, *sizes], sizes, strict=False)
    )

  def __call__(self, images: jax.Array) -> jax.Array:
    """`[batch, tokens, width]`, row by row."""
    x = images
    for index, layer in enumerate(self.layers):
      x = layer(nnx.gelu(x) if index else x)
    return x.reshape(len(x), -1, x.shape[-1])


def patches(images: jax.Array, size: int) -> jax.Array:
  """Images `[batch, height, width, channels]` as flat square patches, row by row.

  Returns:
    `[batch, height / size * width / size, size^2 * channels]`.

  Raises:
    ValueError: if `size` does not divide height and width.
  """
  batch, height, width, channels = images.shape
  if height % size or width % size:
    raise ValueError(
      f"images are {height} x {width}: expected multiples of the patch, {size}"
    )
  rows, columns = height // size, width // size
  x = images.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
  return x.reshape(batch, rows * columns, size * size * channels)
