"""The model: torch alone, no training framework."""

from ropepp.model.config import ModelConfig
from ropepp.model.heads import Head, HeadLayout
from ropepp.model.kernels import attention
from ropepp.model.transformer import Transformer

__all__ = ["Head", "HeadLayout", "ModelConfig", "Transformer", "attention"]
