"""Private memory of ranks that read and write a checkpoint: a shard and one tensor, as the benchmark measures it."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "checkpoint_memory.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(300)
def test_a_rank_holds_its_shard_and_one_tensor():
    """Half a gigabyte, so that a second tensor, or another rank's shard, is more than the constant."""
    command = [sys.executable, BENCHMARK, "--layers", "2", "--ranks", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
