# %% [markdown]
# # Compile your model
#
# Train a model of your own with Sinkhorn attention, compile it on unlabelled inputs,
# read the report, save and restore it. The model is any Flax NNX module; only its
# `attention_fn` matters here.

# %%
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import asap_jax
from asap_jax import plotting

# %% [markdown]
# ## Data and model
#
# Digits of 8 x 8 pixels, as 16 tokens of 2 x 2.

# %%
images, labels = load_digits(return_X_y=True)
shuffled = np.random.default_rng(0).permutation(len(labels))
images, labels = images[shuffled] / 16, labels[shuffled]
tokens = images.astype(np.float32).reshape(-1, 4, 2, 4, 2)
tokens = tokens.swapaxes(2, 3).reshape(-1, 16, 4)
train, test = slice(0, 1408), slice(1408, None)

# %%
sinkhorn = functools.partial(asap_jax.sinkhorn_attention, iterations=20)


class Block(nnx.Module):
  """Attention and a perceptron, each with a residual connection."""

  def __init__(self, width, attention_fn, rngs):
    self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
    self.attention = nnx.MultiHeadAttention(
      4, width, attention_fn=attention_fn, decode=False, rngs=rngs
    )
    self.enter = nnx.Linear(width, 2 * width, rngs=rngs)
    self.leave = nnx.Linear(2 * width, width, rngs=rngs)

  def __call__(self, x):
    x = x + self.attention(self.norms[0](x))
    return x + self.leave(nnx.gelu(self.enter(self.norms[1](x))))


class DigitReader(nnx.Module):
  """Tokens `[batch, 16, 4]` to logits of ten classes."""

  def __init__(self, rngs, attention_fn=sinkhorn, width=32):
    self.embed = nnx.Linear(4, width, rngs=rngs)
    self.positions = nnx.Param(0.5 * jax.random.normal(rngs.params(), (16, width)))
    self.blocks = nnx.List([Block(width, attention_fn, rngs) for _ in range(2)])
    self.head = nnx.Linear(width, 10, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens) + self.positions[...]
    for block in self.blocks:
      x = block(x)
    return self.head(x.mean(-2))


# %% [markdown]
# ## Train


# %%
@nnx.jit
def train_step(model, optimizer, inputs, targets):
  """One step of Adam; the loss."""

  def loss(model):
    scores = model(inputs)
    return optax.softmax_cross_entropy_with_integer_labels(scores, targets).mean()

  value, gradients = nnx.value_and_grad(loss)(model)
  optimizer.update(model, gradients)
  return value


def fit(model, steps, rate):
  """Trains a model in place; the losses."""
  schedule = optax.cosine_decay_schedule(rate, steps)
  optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
  random = np.random.default_rng(0)
  losses = []
  for _ in range(steps):
    chosen = random.integers(1408, size=32)
    losses.append(train_step(model, optimizer, tokens[chosen], labels[chosen]))
  return losses


STEPS = 400
teacher = DigitReader(nnx.Rngs(0))
losses = fit(teacher, STEPS, 4e-3)

# %%
smooth = np.reshape(losses, (-1, 20)).mean(1)
curve = {"training loss": (np.arange(10, STEPS, 20), smooth)}
plotting.plot_curves(curve, xlabel="step", ylabel="cross-entropy, nats").figure


# %%
@nnx.jit
def accuracy(model):
  """Share of test images read right."""
  return (model(tokens[test]).argmax(-1) == labels[test]).mean()


print(f"teacher: {accuracy(teacher):.3f} of {len(labels[test])} test images")

# %% [markdown]
# ## Compile
#
# `compile` runs the teacher on unlabelled batches and gives every Sinkhorn layer the
# operator that is the fastest on this device of those that come within `target_tv=0.05`
# of its plans: Sinkhorn cut short, a start in closed form, or a learned dual map and a
# few closures. It returns a new model with a report.

# %%
batches = tokens[train].reshape(11, 128, 16, 4)
compiled, report = asap_jax.compile(teacher, batches, progress=False)
print(f"compiled: {accuracy(compiled):.3f}")

# %% [markdown]
# ## Read the report
#
# Its first line says what was gained. Per layer and head, on held-out batches: `R2` is
# how much of the teacher's dual the map predicts, `TV` and `KL` how far the compiled
# plan is from the teacher's, and the column errors say what is left of double
# stochasticity. Below the table stands where all iterations stay, since nothing faster
# is close enough.

# %%
print(report)

# %%
report.plot()[0].figure

# %% [markdown]
# Left and below is better. At 16 tokens the attention matrix is tiny, and iterations
# on it cost next to nothing: compiling pays where each pass over the matrix is dear.
#
# ## One fixed operator
#
# A `Recipe` asks for one operator instead, by default the paper's with all refinement.
# A small network and few steps suffice for so small a model.

# %%
recipe = asap_jax.Recipe(slices=4, hidden=16, refine_steps=150)
sliced, report = asap_jax.compile(teacher, batches, recipe, progress=False)
print(f"ASAP: {accuracy(sliced):.3f}")
print(report)

# %% [markdown]
# ## Save and restore
#
# A saved model is a directory without code in it. Loading takes the class that it was
# built from; under `eval_shape` no weights are made for that.

# %%
with tempfile.TemporaryDirectory() as folder:
  asap_jax.save(f"{folder}/reader", compiled)
  blank = nnx.eval_shape(lambda: DigitReader(nnx.Rngs(0)))
  restored = asap_jax.load(f"{folder}/reader", blank)
bool((restored(tokens[test]) == compiled(tokens[test])).all())

# %% [markdown]
# ## Deploy and train on
#
# The compiled model is an NNX module like the teacher: it jits, and its dual maps are
# parameters that train with the rest, or alone under the filter `asap_jax.DualParam`.

# %%
graph, state = nnx.split(compiled)
serve = jax.jit(lambda inputs: nnx.merge(graph, state)(inputs))
serve(tokens[:2]).argmax(-1)


# %%
@nnx.jit
def gradients(model):
  """Of the mean squared score, in the parameters of the dual maps."""
  alone = nnx.DiffState(0, asap_jax.DualParam)
  return nnx.grad(lambda model: jnp.mean(model(tokens[:32]) ** 2), argnums=alone)(model)


found = jax.tree.leaves(gradients(compiled))
print(f"{len(found)} arrays of dual maps, {sum(leaf.size for leaf in found)} numbers")
print("all gradients finite:", all(bool(jnp.isfinite(leaf).all()) for leaf in found))

# %% [markdown]
# ## From a pretrained softmax model
#
# Few train from scratch. Here a reader with softmax attention stands for a pretrained
# model. `to_sinkhorn` gives it doubly stochastic attention with the weights as they are
# and says how far each layer moved; `refit=True` fits the projections after the heads
# to what softmax gave, in closed form, without labels.

# %%
softmax = DigitReader(nnx.Rngs(1), asap_jax.softmax_attention)
fit(softmax, STEPS, 4e-3)
switched, moved = asap_jax.to_sinkhorn(softmax, 5, "zero", batches=list(batches))
refitted, after = asap_jax.to_sinkhorn(
  softmax, 5, "zero", refit=True, batches=list(batches)
)
print(after)

# %%
readers = {"softmax": softmax, "plain switch": switched, "refitted": refitted}
for name, model in readers.items():
  print(f"{name:>12}: {accuracy(model):.3f}")

# %% [markdown]
# A short fine-tuning does the rest. Then the model is a teacher like any other.

# %%
tuned = nnx.clone(refitted)
fit(tuned, 100, 1e-3)
recipe = asap_jax.Recipe(slices=4, hidden=16, refine_steps=0)
shipped, report = asap_jax.compile(tuned, batches, recipe, progress=False)
print(f"fine-tuned: {accuracy(tuned):.3f}, compiled: {accuracy(shipped):.3f}")

# %% [markdown]
# `asap_jax.export` and `asap_jax.export_onnx` write it as one file that runs without
# this library. docs/pretrained.md takes a text encoder of six layers along this road.
