"""transformers without network, and with a place of its own for the code of folders."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="ropepp-hf-"))
