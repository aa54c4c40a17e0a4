"""The Triton kernels, imported as `fastrnn.kernels`. They import only triton and each other.

`scan.py` is the sequence kernel, forward and backward. `gemm_step.py` is one step of it next to the GEMMs of a library,
with layer norm and projection. `cells.py` has the equations, `functions.py` the pointwise functions in them,
`products.py` the products with W_hh, `gradients.py` the pieces of a backward step, `barrier.py` the barrier among
programs, `layer_norm.py` and `norms.py` the reductions over a row, `memory.py` tiles and their loads and stores.
"""

if __name__ != "fastrnn.kernels":
    raise ImportError(
        f"fastrnn's kernels were imported as {__name__!r}; their name is 'fastrnn.kernels'. A top-level `kernels` "
        "would shadow the package of that name on PyPI. Install fastrnn (`pip install -e .`) and run pytest with "
        "--import-mode=importlib."
    )
