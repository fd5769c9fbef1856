"""With real processes, which evaluate what they are told: builtins.eval is the function of most pools."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mindpangu.rewards.workers import WorkerDied, WorkerPool

PID = "__import__('os').getpid()"
# Holds the interpreter's lock for longer than any test.
LONG_INTEGER = "5 ** (5 ** 12)"


def children_of(pid):
    """{pid: state} of the processes that a process started; state Z is a zombie."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid:
            children[int(path.parent.name)] = state
    return children


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def pool():
    before = children_of(os.getpid())
    with WorkerPool("builtins:eval", num_workers=2, timeout_s=5) as pool:
        yield pool
    assert children_of(os.getpid()).keys() <= before.keys(), "workers, or zombies, were left"


def test_arguments_and_results_of_any_size_travel_intact(pool):
    text = "数学\ud83d\0\n" * 200_000
    assert pool.call(repr(text)) == text
    assert pool.call("[1, 2.5, None, {'a': True}]") == [1, 2.5, None, {"a": True}]


def test_calls_of_many_threads_run_side_by_side_and_get_their_own_results(pool):
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda number: pool.call(f"{number} * {number}, {PID}"), range(400)))
    assert [square for square, _ in results] == [number**2 for number in range(400)]
    assert len({pid for _, pid in results}) == 2


def test_a_worker_survives_the_thread_that_started_it(pool):
    pids = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: pids.append(pool.call(PID)))
        thread.start()
        thread.join()
    assert pids[0] == pids[1] == pool.call(PID)


@pytest.mark.parametrize("hanging", ["__import__('time').sleep(60)", LONG_INTEGER])
def test_a_call_past_its_limit_raises_while_others_go_on_and_its_worker_is_replaced(hanging):
    before = children_of(os.getpid()).keys()
    with WorkerPool("builtins:eval", num_workers=2, timeout_s=1) as pool, ThreadPoolExecutor(2) as threads:
        pids = set(threads.map(pool.call, [f"__import__('time').sleep(0.2) or {PID}"] * 2))
        began = time.monotonic()
        hung = threads.submit(pool.call, hanging)
        num_done = 0
        while not hung.done():
            assert pool.call("6 * 7") == 42
            num_done += 1
        with pytest.raises(TimeoutError, match="1 s"):
            hung.result()
        assert len(children_of(os.getpid()).keys() - before) == 2, "the next worker is getting ready"
        assert 0.9 < time.monotonic() - began < 3
        assert num_done > 10
        after = set(threads.map(pool.call, [f"__import__('time').sleep(0.2) or {PID}"] * 2))
        assert len(after) == 2 and len(after & pids) == 1
        wait_until(lambda: not (pids - after) & children_of(os.getpid()).keys())


def test_starting_and_importing_do_not_count_against_the_limit(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("import time; time.sleep(1.5)\ndef double(x): return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    with WorkerPool("slow_to_import:double", num_workers=1, timeout_s=0.5) as pool:
        assert pool.call(21) == 42


def test_a_worker_killed_in_the_middle_fails_its_call_and_the_next_one_works(pool):
    victim = pool.call(PID)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(pool.call, "__import__('time').sleep(60)")
        time.sleep(0.3)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="-9"):
            call.result()
    assert pool.call("6 * 7") == 42


def test_a_worker_that_does_not_even_read_is_given_up(tmp_path):
    with WorkerPool("builtins:eval", num_workers=1, timeout_s=1) as pool:
        os.kill(pool.call(PID), signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            pool.call(repr("a" * 10_000_000))
        assert pool.call("6 * 7") == 42


def test_a_worker_killed_while_idle_costs_one_call(pool):
    os.kill(pool.call(PID), signal.SIGKILL)
    time.sleep(0.2)
    with pytest.raises(WorkerDied):
        pool.call("1")
    assert pool.call("6 * 7") == 42


def test_the_answer_to_an_interrupted_call_is_not_the_next_calls():
    # In a process of its own: where MindSpore has been imported, its handler turns SIGINT into the process's end.
    program = """
import os, signal, threading
from mindpangu.rewards.workers import WorkerPool
with WorkerPool("builtins:eval", 1, 5) as pool:
    pool.call("1")
    interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    try:
        interrupt.start()
        pool.call("__import__('time').sleep(1)")
    except KeyboardInterrupt:
        print("interrupted", pool.call("6 * 7"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "interrupted 42\n", done.stderr


def test_what_comes_through_the_socket_during_a_call_does_not_end_the_worker(pool):
    # The kernel may announce a request after the worker has read it and is at work: here it is surely at work.
    pool.call("1")
    (worker,) = pool._workers
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(pool.call, "__import__('time').sleep(0.5)")
        time.sleep(0.2)
        worker.connection.sendall(b"\0\0\0\x07[\"7*6\"]")
        assert call.result() is None
    assert pool.call(PID) == 42, "the answer to what was sent between"


def test_what_the_function_raises_is_told_and_the_worker_goes_on(pool):
    pid = pool.call(PID)
    with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
        pool.call("1 / 0")
    assert pool.call(PID) == pid


def test_a_function_that_cannot_be_imported_is_told_at_every_call():
    with WorkerPool("mindpangu.rewards.no_such_module:f", num_workers=1, timeout_s=5) as pool:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no_such_module:f can't be imported: ModuleNotFoundError"):
                pool.call()


def test_memory_beyond_the_limit_fails_the_call_only():
    with WorkerPool("builtins:eval", num_workers=1, timeout_s=20, memory_gib=0.5) as pool:
        assert pool.call("len(bytearray(100 << 20))") == 100 << 20
        with pytest.raises(RuntimeError, match="MemoryError"):
            pool.call("len(bytearray(600 << 20))")
        assert pool.call("6 * 7") == 42


def test_what_the_function_prints_or_reads_does_not_touch_the_messages(pool):
    program = "print('}' * 1000), __import__('os').write(1, b'noise'), __import__('os').write(2, b'noise')"
    assert pool.call(f"[{program}, __import__('sys').stdin.read()][-1]") == ""
    assert pool.call("6 * 7") == 42


def test_a_worker_holds_no_descriptor_of_the_parent(pool, tmp_path):
    with open(tmp_path / "open_in_the_parent", "w") as file:
        os.set_inheritable(file.fileno(), True)
        open_files = pool.call("[__import__('os').path.realpath(f'/proc/self/fd/{number}') "
                               "for number in range(64) if __import__('os').path.exists(f'/proc/self/fd/{number}')]")
    assert open_files.count("/dev/null") == 3
    others = [path.rpartition("/")[2].partition(":")[0] for path in open_files if path != "/dev/null"]
    assert sorted(others) == ["pipe", "socket"], "the requests and the lifeline"


def test_a_closed_pool_fails_calls_under_way_and_later_ones():
    pool = WorkerPool("builtins:eval", num_workers=1, timeout_s=60)
    pool.call("1")
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(pool.call, "__import__('time').sleep(60)") for _ in range(3)]
        time.sleep(0.3)
        began = time.monotonic()
        pool.close()
        for call in calls:
            with pytest.raises(WorkerDied):
                call.result()
    with pytest.raises(WorkerDied, match="closed"):
        pool.call("1")
    pool.close()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)", "raise SystemExit"])
def test_workers_end_with_their_parent_even_in_a_long_integer_operation(end):
    program = f"""
import os, signal, sys, threading, time
from mindpangu.rewards.workers import WorkerPool
idle, busy = (WorkerPool("builtins:eval", 1, 600) for _ in range(2))
print(idle.call({PID!r}), busy.call({PID!r}), flush=True)
threading.Thread(target=lambda: busy.call({LONG_INTEGER!r}), daemon=True).start()
time.sleep(0.5)
{end}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    wait_until(lambda: all(map(has_ended, pids)), seconds=3)


def test_a_worker_that_gets_its_request_after_its_parent_ended_ends():
    program = f"""
import os, signal, threading, time
from mindpangu.rewards.workers import WorkerPool
pool = WorkerPool("builtins:eval", 1, 600)
pid = pool.call({PID!r})
print(pid, flush=True)
os.kill(pid, signal.SIGSTOP)
threading.Thread(target=lambda: pool.call({LONG_INTEGER!r}), daemon=True).start()
time.sleep(0.5)
os._exit(0)
"""
    pid = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60).stdout)
    assert not has_ended(pid)
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: has_ended(pid), seconds=3)


def has_ended(pid):
    """Gone, or a zombie that whoever adopted it has not collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
