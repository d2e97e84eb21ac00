"""RoPE++ experiments: a position encoding's imaginary part as further attention heads."""

__version__ = "0.1.0"
