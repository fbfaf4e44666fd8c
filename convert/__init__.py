"""From safetensors to one small, verified GGUF: `python -m convert SRC OUT.gguf --quant Q4_K_M`."""
