"""Long runs: what is resident must not grow with the number of batches."""

import subprocess
import sys

import pytest

# In a process of its own, whose memory nobody else touches.
RUN = """
import gc, sys, tempfile
import psutil
from gapprobe.store.writer import StoreWriter
from gapprobe.tracing import batch, run
from gapprobe.tasks.examples import Example
from tests.models.kinds import fresh
from tests.models.tiny import image

kind, positions = sys.argv[1], sys.argv[2].split()
model = fresh(kind)
picture = image(1)
examples = [Example(f"Question: What is {i}? Answer:", picture) for i in range(1000)]
resident, rows = [], batch.Batches.rows

def counted(self, *args):
    found = rows(self, *args)
    resident.append(psutil.Process().memory_info().rss)
    return found

batch.Batches.rows = counted
with tempfile.TemporaryDirectory() as folder:
    # What waits to be written is the writer's budget, not a leak: let it be written all the time.
    run.SEAL_SECONDS = 0.5
    run.capture(model, examples, folder + "/acts", positions=positions, batch_size=2, max_new_tokens=2, progress=False)
assert len(resident) == 500
print(resident[49], resident[499])
"""


@pytest.mark.parametrize(
    ("kind", "positions"), [("llava-llama", "all"), ("instructblip_t5-t5", "last_input last_output")]
)
def test_memory_stays_flat_over_500_batches(kind: str, positions: str) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, kind, positions], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    early, late = map(int, done.stdout.split())
    assert late <= 1.05 * early
