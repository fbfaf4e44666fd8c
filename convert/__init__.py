"""From safetensors to one small, verified GGUF: `python -m convert SRC OUT.gguf --quant Q4_K_M`.

In Python: `from convert.run import convert`, then `convert(source, out, quant=("Q4_K_M",), progress=show)`; the other
options are the fields of `convert.run.Request`, the problems are `convert.errors.ConvertError`.
"""
