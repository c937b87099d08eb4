"""What opening a bundle may import: a replica, a trial and every `recommend` wait for it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import torch
from recray.models import build_model
from recray.models.base import Catalogue
with torch.device("meta"):
    for name in ("popularity", "item-knn", "ials", "sasrec", "neumf"):
        build_model(name, Catalogue(100, {"weather": 3}), {})
print("torch._dynamo" in sys.modules)
"""


def test_a_model_without_memory_imports_no_compiler() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"
