# %% [markdown]
# # What double stochasticity does
#
# The same small Transformer, trained on digits twice: with softmax attention, whose
# rows sum to one, and with Sinkhorn attention, whose columns do so too. The second one
# is then compiled. What do keys receive, and what becomes of the tokens with depth?

# %%
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import asap_jax
from asap_jax import metrics, plotting

# %% [markdown]
# ## Two models, trained alike
#
# Four blocks on 16 tokens of 2 x 2 pixels. `states` gives the tokens after every block,
# and `sow_weights` makes Flax keep the attention weights.

# %%
images, labels = load_digits(return_X_y=True)
shuffled = np.random.default_rng(0).permutation(len(labels))
images, labels = images[shuffled] / 16, labels[shuffled]
tokens = images.astype(np.float32).reshape(-1, 4, 2, 4, 2)
tokens = tokens.swapaxes(2, 3).reshape(-1, 16, 4)
train, test = slice(0, 1408), slice(1408, None)


# %%
class Block(nnx.Module):
  """Attention and a perceptron, each with a residual connection."""

  def __init__(self, width, attention_fn, rngs):
    self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
    self.attention = nnx.MultiHeadAttention(
      2, width, attention_fn=attention_fn, decode=False, rngs=rngs
    )
    self.enter = nnx.Linear(width, 2 * width, rngs=rngs)
    self.leave = nnx.Linear(2 * width, width, rngs=rngs)

  def __call__(self, x, sow_weights=False):
    x = x + self.attention(self.norms[0](x), sow_weights=sow_weights)
    return x + self.leave(nnx.gelu(self.enter(self.norms[1](x))))


class DigitReader(nnx.Module):
  """Tokens `[batch, 16, 4]` to logits of ten classes."""

  def __init__(self, attention_fn, rngs, width=32, depth=4):
    self.embed = nnx.Linear(4, width, rngs=rngs)
    self.positions = nnx.Param(0.5 * jax.random.normal(rngs.params(), (16, width)))
    self.blocks = nnx.List([Block(width, attention_fn, rngs) for _ in range(depth)])
    self.head = nnx.Linear(width, 10, rngs=rngs)

  def states(self, tokens, sow_weights=False):
    """Tokens before the first block and after every block."""
    states = [self.embed(tokens) + self.positions[...]]
    for block in self.blocks:
      states.append(block(states[-1], sow_weights))
    return states

  def __call__(self, tokens):
    return self.head(self.states(tokens)[-1].mean(-2))


# %%
STEPS = 400


def task_loss(model, inputs, targets):
  """Cross-entropy."""
  scores = model(inputs)
  return optax.softmax_cross_entropy_with_integer_labels(scores, targets).mean()


@functools.partial(nnx.jit, static_argnames="loss")
def train_step(model, optimizer, inputs, targets, loss):
  """One step of Adam."""
  optimizer.update(model, nnx.grad(loss)(model, inputs, targets))


def trained(model, loss=task_loss):
  """The model, trained with the same seed as all others."""
  random = np.random.default_rng(0)
  schedule = optax.cosine_decay_schedule(3e-3, STEPS)
  optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
  for _ in range(STEPS):
    chosen = random.integers(1408, size=32)
    train_step(model, optimizer, tokens[chosen], labels[chosen], loss)
  return model


def reader(attention_fn):
  """A model with one attention in all blocks, from the same seed as all others."""
  return DigitReader(attention_fn, nnx.Rngs(0))


sinkhorn = functools.partial(asap_jax.sinkhorn_attention, iterations=20)
models = {
  "softmax": trained(reader(asap_jax.softmax_attention)),
  "Sinkhorn": trained(reader(sinkhorn)),
}

# %% [markdown]
# The third model is the Sinkhorn one, compiled: no iterations left, one closure. Its
# dual maps are fitted by ridge regression alone; with `refine_steps` they come closer.

# %%
batches = tokens[train].reshape(11, 128, 16, 4)
models["ASAP"], _ = asap_jax.compile(
  models["Sinkhorn"],
  batches,
  asap_jax.Recipe(slices=4, refine_steps=0),
  progress=False,
)

# %% [markdown]
# ## Look at one image
#
# Plans on a test image, of the block and head whose softmax plan is farthest from
# doubly stochastic there; below them, what each key receives. (Softmax and Sinkhorn
# were trained apart: the heads of one have nothing to do with those of the other.)


# %%
@nnx.jit
def observe(model):
  """Scores, tokens `[blocks + 1, images, 16, width]` and plans on the test images.

  Plans are `[blocks, images, heads, 16, 16]`.
  """
  look = nnx.capture(
    lambda model: model.states(tokens[test], sow_weights=True), nnx.Intermediate
  )
  states, sown = look(model)
  plans = jnp.stack(jax.tree.leaves(sown))
  return model.head(states[-1].mean(-2)), jnp.stack(states), plans


seen = {name: observe(model) for name, model in models.items()}
plans = {name: plans for name, (_, _, plans) in seen.items()}

# %%
error = metrics.column_error(plans["softmax"]).mean(-1)[:, 0]
block, head = np.unravel_index(error.argmax(), error.shape)
shown = {name: of_model[block, 0, head] for name, of_model in plans.items()}
plotting.plot_plans(shown)[0, 0].figure

# %% [markdown]
# ## Attention sinks
#
# Keys in order of what they receive, means over all test images, blocks and heads. The
# first key of softmax takes a multiple of its share, and the last ones are hardly read.
# A doubly stochastic plan reads every token as much as any other.

# %%
plotting.plot_sinks(plans).figure

# %%
print(f"{'':10}accuracy  column error  sink share (1/16 = {1 / 16:.4f})")
for name, (scores, _, of_model) in seen.items():
  accuracy = (scores.argmax(-1) == labels[test]).mean()
  error = metrics.column_error(of_model).mean()
  share = metrics.attention_sink_share(of_model).mean()
  print(f"{name:10}{accuracy:8.3f}  {error:12.4f}  {share:10.4f}")

# %% [markdown]
# ## Doubly stochastic for less, from the first step
#
# Twenty iterations are not needed to train. Two from the Gaussian start, with nothing
# learned, are the recipe: one more argument.

# %%
from_zero = functools.partial(asap_jax.sinkhorn_attention, iterations=2)
from_gaussian = functools.partial(from_zero, start="gaussian")
cheaper = {
  "2 iterations from zero": trained(reader(from_zero)),
  "2 from the Gaussian start": trained(reader(from_gaussian)),
}

# %% [markdown]
# Or none: a dual map in the loop learns with the model, from the first step. Each layer
# holds its own, and one line adds what the maps descend on to the loss.

# %%
in_loop = reader(None)
for block in in_loop.blocks:
  block.attention.attention_fn = nnx.data(asap_jax.AmortizedAttention(2, 16))


def loss_with_maps(model, inputs, targets):
  """Cross-entropy, and what the dual maps descend on."""
  return task_loss(model, inputs, targets) + asap_jax.dual_loss(model)


cheaper["a map in the loop"] = trained(in_loop, loss_with_maps)

# %%
for name, model in cheaper.items():
  scores, _, of_model = observe(model)
  accuracy = (scores.argmax(-1) == labels[test]).mean()
  print(f"{name:27}{accuracy:.3f} {metrics.column_error(of_model).mean():8.4f}")

# %% [markdown]
# ## Rank through depth
#
# The rank residual says how far tokens are from being all alike: 0 is full collapse.
# On the left are the tokens of the models as they are. On the right, the plans alone:
# the embedded tokens times the plans of all blocks, averaged over heads, without
# residual connections and perceptrons. There, averaging wins in the end, doubly
# stochastic or not (Dong et al., 2021, show how fast for softmax).

# %%
in_model, alone = {}, {}
for name, (_, states, of_model) in seen.items():
  in_model[name] = metrics.rank_residual(states).mean(-1)
  passed = [states[0]]
  for of_block in of_model.mean(2):
    passed.append(of_block @ passed[-1])
  alone[name] = metrics.rank_residual(jnp.stack(passed)).mean(-1)

# %%
((left, right),) = plotting.subplots(1, 2, width=4.5)
plotting.plot_rank(in_model, left, "the whole model")
plotting.plot_rank(alone, right, "plans alone")
left.figure

# %% [markdown]
# ## All of it at once
#
# `asap_jax.diagnose` reports this of any model, softmax or not, and what products of
# plans along paths do: a doubly stochastic product keeps all gains at one. Its smallest
# singular value says what is left of the direction that is lost first.

# %%
diagnoses = {
  name: asap_jax.diagnose(model, [tokens[test]]) for name, model in models.items()
}
for name, diagnosis in diagnoses.items():
  print(name)
  print(diagnosis)

# %%
(axes,) = plotting.subplots(1, 2, width=4.5)
for each, name in zip(axes, ("softmax", "Sinkhorn"), strict=True):
  diagnoses[name].plot(each).set_title(name)
axes[0].figure
