"""The networks that `bayeslayers benchmark convert` tries, by name, and what each is made of.

`size` is that of its images; other entries are arguments of its builder, or of its configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILE = Path(__file__).parents[1] / "assets/convert_networks.json"
NETWORKS: dict[str, dict[str, Any]] = json.loads(_FILE.read_text(encoding="utf-8"))
