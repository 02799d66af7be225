"""Saving and restoring a compiled model with Orbax.

`api` is `asap_jax.save` and `asap_jax.load`, `restoring` what is behind the latter.
`folders` replaces one version of a model by another in one step, and clears what
stopped saves left; `manifest` is the JSON that names everything; `sites` describes what
stands in a compiled model, `options` compares what is bound there by value; `arrays`
names the variables and writes their arrays; `watches` keeps thresholds;
`names` maps attributes that were renamed. Nothing saved is code: loading runs none.
"""

from asap_jax.compiler.saving.api import load, save

__all__ = ["load", "save"]
