"""Folders of the project. Importing this first lets a tool import the project's own modules."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = DOCS / "results"

sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
