"""Training by several processes: how they start, what they say to each other, and who of them is gone."""

from bayeslayers.distributed.lost import RankError
from bayeslayers.distributed.messages import agree, gather_text, is_distributed, telling_failures
from bayeslayers.distributed.world import World, start

__all__ = ["RankError", "World", "agree", "gather_text", "is_distributed", "start", "telling_failures"]
