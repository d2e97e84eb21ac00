"""Lets transformers load this folder; the model itself is in the package ropepp."""

try:
    from ropepp.interop.hf import RoPEppConfig, RoPEppForCausalLM, RoPEppModel
except ImportError as error:
    raise ImportError("this model needs the package ropepp: pip install 'ropepp[hf]'") from error

__all__ = ["RoPEppConfig", "RoPEppForCausalLM", "RoPEppModel"]
