"""Faults injected into saved models, and inputs drawn for attention: what was lost?

`saved` has the model that is saved and tells which one stands at a path; `kills`,
`damage`, `disks` and `writers` are faults. `calls` makes attention calls that `drawn`
draws and `exact` computes in float64. `refused` passes bad arguments to all public
`entries`.
"""
