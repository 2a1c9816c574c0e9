"""Signs of life: who is quiet for how long, and what a rank that still answers says of itself."""

import os
import signal
import subprocess
import sys
import time

import pytest

from treediff.errors import UserError
from treediff.training import heartbeat

RANK = """
import sys, time
from pathlib import Path
from treediff.training import heartbeat
heartbeat.begin(Path(sys.argv[1]), 3, lambda: print("asked", flush=True))
def somewhere(): time.sleep(60)
print("begun", flush=True)
somewhere()
"""


def test_the_quietest_rank_counts_and_grace_is_granted(tmp_path):
    assert heartbeat.silence(tmp_path, 0) == 0  # before the first step
    for rank, ago in ((0, 1), (1, 40)):
        heartbeat.life(tmp_path, rank).write_text(heartbeat.starter())
        os.utime(heartbeat.life(tmp_path, rank), (time.time() - ago,) * 2)
    assert heartbeat.silence(tmp_path, 0) == pytest.approx(40, abs=2)
    assert heartbeat.silence(tmp_path, time.time() - 10) == pytest.approx(1, abs=2)  # the other is a killed start's
    assert heartbeat.silence(tmp_path, time.time() + 10) == 0
    heartbeat.beat(tmp_path, 1)
    assert heartbeat.silence(tmp_path, 0) == pytest.approx(1, abs=2)
    heartbeat.beat(tmp_path, 0, grace=100)
    heartbeat.beat(tmp_path, 1, grace=100)
    assert heartbeat.silence(tmp_path, 0) < -90
    heartbeat.end(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_answers_says_where_it_is(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        time.sleep(0.5)
        assert list(heartbeat.here(tmp_path, 0).values()) == [process.pid]
        assert heartbeat.here(tmp_path, time.time() + 5) == {}
        os.kill(process.pid, signal.SIGUSR2)
        asked = process.stdout.readline()
        said = heartbeat.stacks(tmp_path, 0)
    finally:
        process.kill()
        process.wait()
    assert b"asked" in asked
    assert said.startswith("rank3: File")
    assert "in somewhere" in said
    assert heartbeat.stacks(tmp_path, 0) == ""  # it is gone


def test_the_lock_is_waited_for_but_not_for_ever(tmp_path):
    held = heartbeat.alone(tmp_path)
    began = time.monotonic()
    with pytest.raises(UserError, match="another process is training this run"):
        heartbeat.alone(tmp_path, wait=0.5)
    assert time.monotonic() - began >= 0.5
    held.release()
    heartbeat.alone(tmp_path, wait=0).release()


def test_a_process_has_a_state():
    assert heartbeat.state(os.getpid()) in "RSD"
    assert heartbeat.state(2**22 + 1) == "X"
