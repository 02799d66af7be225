"""Pure functions, arguments that each takes, and bad values of them."""

import jax.numpy as jnp

import asap_jax
from experiments.stress.samples import CLOUD, DIM, HEADS, LOGITS, Entry, dual_map


def pure() -> dict[str, Entry]:
  weights = [jnp.ones((3, 5)), jnp.ones((3, 6), int)]
  clouds = {"query": CLOUD, "key": CLOUD}
  shapes = {"query": [CLOUD[..., :3], CLOUD[0, 0]], "key": [CLOUD[..., :3]]}
  of_clouds = {**shapes, "query_weights": weights, "key_weights": weights}
  f, g = jnp.ones((2, 6)), jnp.ones((2, 5))
  of_logits = {
    "query_weights": [jnp.ones((2, 5)), jnp.ones((2, 6), int)],
    "key_weights": [jnp.ones((2, 6)), jnp.ones((2, 5), int)],
  }
  duals = {"duals": [asap_jax.Duals(g, g), asap_jax.Duals(f, f)]}
  x = {"x": jnp.ones((3, 6)), "y": jnp.ones((3, 5))}
  return {
    "gaussian_potential": Entry(
      asap_jax.gaussian_potential,
      clouds,
      {**of_clouds, "covariances": ["none"], "rank": [0], "side": ["both"]},
    ),
    "GaussianDualInitializer": Entry(
      asap_jax.GaussianDualInitializer, {}, {"covariances": ["none"], "rank": [0]}
    ),
    "SlicedDualInitializer": Entry(
      asap_jax.SlicedDualInitializer,
      {},
      {"dual_map": [dual_map()], "slices": ["none"]},
    ),
    "kantorovich_potentials": Entry(
      asap_jax.kantorovich_potentials,
      x,
      {
        "x": [jnp.ones(()), jnp.ones((2, 6))],
        "x_weights": [jnp.ones((3, 5)), jnp.ones((3, 6), int)],
        "y_weights": [jnp.ones((3, 6))],
        "cost": ["cubic"],
      },
    ),
    "sliced_potentials": Entry(
      asap_jax.sliced_potentials,
      {**clouds, "directions": jnp.ones((2, DIM))},
      {**of_clouds, "directions": [jnp.ones((2, 3))]},
    ),
    "predict_dual": Entry(
      asap_jax.predict_dual,
      {
        "dual_map": dual_map(),
        "query": jnp.ones((2, 6, DIM)),
        "key": jnp.ones((2, 6, DIM)),
      },
      {
        "dual_map": [dual_map(weights=jnp.ones((HEADS, 3)))],
        "query_weights": [jnp.ones((2, 5))],
      },
    ),
    "DualMap": Entry(
      lambda **fields: asap_jax.predict_dual(
        dual_map(**fields), jnp.ones((2, 6, DIM)), jnp.ones((2, 6, DIM))
      ),
      {},
      {"features": [("unknown",), ("query", "potentials")]},
    ),
    "closure": Entry(
      asap_jax.closure, {"logits": LOGITS, "f": f}, {"f": [g], **of_logits}
    ),
    "closures": Entry(
      asap_jax.closures,
      {"logits": LOGITS, "dual": f, "count": 2},
      {
        "dual": [g],
        "count": [0, -1],
        "relaxation": [jnp.ones((2, 3))],
        "momentum": [jnp.ones((2, 3))],
        "side": ["both"],
        **of_logits,
      },
    ),
    "plan": Entry(
      asap_jax.plan,
      {"logits": LOGITS, "duals": asap_jax.Duals(f, g)},
      {**duals, **of_logits},
    ),
    "sinkhorn_duals": Entry(
      asap_jax.sinkhorn_duals,
      {"logits": LOGITS, "iterations": 2},
      {"iterations": [0, -1], "init": [g], **of_logits},
    ),
  }
