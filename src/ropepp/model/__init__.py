"""The model: torch alone, no training framework. In the order in which to read it:

1. `config` are its sizes, `heads` the table of attention heads: projection, phase, kv head;
2. `positions` are the variants, one small file each;
3. `attention` goes from projections over the position to a kernel (`kernels`) and out again;
   `scope` says which keys a query sees, `documents` where they begin and end in packed rows,
   `cache` keeps keys for generation, `sequence` spreads rows;
4. `transformer` puts blocks together, `loss` and `init` are its ends, `flops` its price;
5. `plain` writes specs as plain data, `folders` reads models of other origin.
"""

from ropepp.model.config import ModelConfig
from ropepp.model.heads import Head, HeadLayout
from ropepp.model.kernels import attention
from ropepp.model.transformer import Transformer

__all__ = ["Head", "HeadLayout", "ModelConfig", "Transformer", "attention"]
