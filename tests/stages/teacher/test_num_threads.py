"""Threads compute with the number of threads that was set, from their first product on."""

import os
import subprocess
import sys

_STARTED_BY_A_FIRST_PRODUCT = """
import os
from concurrent.futures import ThreadPoolExecutor
import torch
from stages.teacher.num_threads import adopt_num_threads

torch.set_num_threads(1)
square = torch.ones(512, 512)

def started() -> int:
    before = len(os.listdir("/proc/self/task"))
    square @ square
    return len(os.listdir("/proc/self/task")) - before

for initializer in (adopt_num_threads, None):
    with ThreadPoolExecutor(1, initializer=initializer) as pool:
        print(pool.submit(started).result())
"""


def test_a_new_thread_starts_no_others_for_its_first_product() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    command = [sys.executable, "-c", _STARTED_BY_A_FIRST_PRODUCT]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    adopted, left_alone = map(int, output.split())
    assert adopted == 0
    assert left_alone > 0, "PyTorch adopts the number by itself now, so adopt_num_threads can go"
