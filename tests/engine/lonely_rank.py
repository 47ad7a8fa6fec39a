"""``python -m tests.engine.lonely_rank CONFIG``: rank 0 of an engine whose others cannot start, busy elsewhere."""

import sys
import time
from pathlib import Path

import msgspec

from pd_serve.config import EngineConfig
from pd_serve.engine import ranks

if __name__ == "__main__":
    ranks.LAST_WORD_S = 0.1
    others = ranks.Ranks(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=EngineConfig))
    time.sleep(60)
