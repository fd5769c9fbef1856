"""With real processes as ranks, over real sockets."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from mindpangu.runtime import cluster
from mindpangu.runtime.cluster import Hub, JobFailed, World, run_scheduler

RANK = """
import os, sys, time
from mindpangu.runtime.cluster import join
world = join()
print("here", world.rank, world.size, world.local_size, flush=True)
"""


def environment(port, size, role="MS_WORKER", rank=0):
    return os.environ | {"MS_ROLE": role, "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": str(port - 1),
                         "MS_WORKER_NUM": str(size), "RANK_ID": str(rank)}


@pytest.fixture
def job():
    """start(size, program) -> processes of the ranks, the thread of the hub, and what it raised, if it has ended."""
    started = []

    def start(size, program, hub_size=None, missing=(), join_timeout_s=20):
        server = socket.create_server(("127.0.0.1", 0))
        raised = []

        def run():
            try:
                with server:
                    Hub(server, hub_size or size, join_timeout_s).run()
            except JobFailed as error:
                raised.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        port = server.getsockname()[1]
        ranks = [subprocess.Popen([sys.executable, "-c", RANK + program], env=environment(port, size, rank=rank),
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                 for rank in range(size) if rank not in missing]
        started.extend(ranks)
        return ranks, thread, raised

    yield start
    for process in started:
        process.kill()
        process.wait()


def outputs(ranks, timeout=30):
    return [rank.communicate(timeout=timeout) for rank in ranks]


def test_values_of_all_ranks_come_in_their_order_and_rank_0_alone_acts(job):
    ranks, thread, raised = job(3, """
for i in range(50):
    assert world.gather("numbers", [i, world.rank]) == [[i, rank] for rank in range(3)]
time.sleep(0.2 * world.rank)
print(world.on_main("answer", lambda: {"pid": os.getpid(), "text": "数学" * 100_000})["pid"], os.getpid())
world.leave()
""")
    lines = [out.split("\n") for out, _ in outputs(ranks)]
    assert [line[0] for line in lines] == [f"here {rank} 3 3" for rank in range(3)]
    assert {line[1].split()[0] for line in lines} == {lines[0][1].split()[1]}
    thread.join(10)
    assert raised == [] and [rank.returncode for rank in ranks] == [0, 0, 0]


def test_a_killed_rank_is_named_to_all_and_ends_them_within_seconds(job):
    ranks, thread, raised = job(3, "world.gather('a step')\nprint('stepped', flush=True)\nworld.gather('b', 1)\n" +
                                "time.sleep(60) if world.rank == 1 else world.gather('c')\n")
    for rank in ranks:
        assert [rank.stdout.readline(), rank.stdout.readline()][1] == "stepped\n"
    time.sleep(0.3)
    began = time.monotonic()
    ranks[1].send_signal(signal.SIGKILL)
    errors = [error for _, error in outputs([ranks[0], ranks[2]])]
    assert time.monotonic() - began < 20
    named = f"rank 1 ({socket.gethostname()}, process {ranks[1].pid}) is gone"
    assert all(named in error and "the same command resumes" in error for error in errors)
    assert ranks[0].returncode == ranks[2].returncode == 1
    thread.join(10)
    assert named in raised[0]


def test_a_rank_that_hangs_is_named_to_those_that_wait_for_it_in_a_step(job):
    ranks, thread, raised = job(3, """
with world.meeting("step 1", 1):
    pass
if world.rank == 1:
    time.sleep(60)
with world.meeting("step 2", 1):
    time.sleep(60)
""")
    errors = [error for _, error in outputs(ranks)]
    named = f"rank 1 ({socket.gethostname()}, process {ranks[1].pid}) did not come to step 2, where another has waited"
    assert all(f"error: {named} for 1 s" in error and "run.step_timeout_s=1;" in error for error in errors)
    assert [rank.returncode for rank in ranks] == [1, 1, 1]
    thread.join(10)
    assert raised and raised[0].startswith(named)


def test_ranks_that_all_hang_in_a_step_are_ended(job):
    ranks, _, raised = job(2, "with world.meeting('step 7', 1):\n    time.sleep(60)")
    outputs(ranks)
    assert raised[0].startswith("all ranks have been in step 7 for 1 s: one of them hangs, or a link")


def test_what_takes_long_without_a_limit_or_between_steps_is_waited_for(job):
    ranks, thread, raised = job(2, """
with world.meeting("step 1", 1):
    pass
time.sleep(3 * world.rank)
world.gather("between")
with world.meeting("step 2", 0):
    time.sleep(3)
world.leave()
""")
    outputs(ranks)
    thread.join(10)
    assert raised == [] and [rank.returncode for rank in ranks] == [0, 0]


def test_why_a_rank_stops_is_told_to_all_and_the_one_that_said_it_ends_by_itself(job):
    ranks, _, raised = job(2, """
if world.rank == 1:
    world.fail("train.lr=0: expected above 0.")
    time.sleep(0.5)
    sys.exit(7)
world.gather("wait")
""")
    errors = [error for _, error in outputs(ranks)]
    assert "rank 1" in errors[0] and "stopped: train.lr=0: expected above 0." in errors[0]
    assert errors[1] == "" and [rank.returncode for rank in ranks] == [1, 7]
    assert "train.lr=0" in raised[0]


def test_a_rank_that_does_not_come_is_named(job):
    ranks, _, raised = job(3, "world.gather('x')", missing=(0, 2), join_timeout_s=2)
    (_, error), = outputs(ranks)
    assert "of 3 ranks 0, 2 did not come within 2 s" in error
    assert ranks[0].returncode == 1 and raised


def test_a_job_of_another_size_is_refused(job):
    ranks, _, raised = job(2, "world.gather('x')", hub_size=3, missing=(0,))
    (_, error), = outputs(ranks)
    assert "rank 1 of 2 came from" in error and "this job has 3 ranks" in error and ranks[0].returncode == 1
    assert raised and raised[0] in error


def test_ranks_that_do_different_things_are_stopped(job):
    ranks, _, raised = job(2, "world.gather('this' if world.rank else 'that')")
    outputs(ranks)
    assert raised == ["the ranks do different things: rank 0: that; rank 1: this"]


def test_a_rank_that_waits_for_one_that_has_finished_is_stopped(job):
    ranks, _, raised = job(2, "world.leave() if world.rank else world.gather('more')\ntime.sleep(1)")
    outputs(ranks)
    assert "has finished, but rank 0" in raised[0] and "more" in raised[0]


def test_strangers_on_the_port_disturb_nobody(job, monkeypatch):
    monkeypatch.setattr(cluster, "_GREETING_TIMEOUT_S", 0.5)
    server = socket.create_server(("127.0.0.1", 0))
    hub = threading.Thread(target=lambda: Hub(server, 1, 20).run())
    hub.start()
    port = server.getsockname()[1]
    for content in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\0\0\0\x02[]"):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(content)
    silent = socket.create_connection(("127.0.0.1", port))
    silent.sendall(b"GET / HTTP/1.1\r\n\r\n")  # and waits for an answer
    with socket.create_connection(("127.0.0.1", port), timeout=20) as rank:
        assert b"hub" in rank.recv(100)
        for message in ({"rank": 0, "size": 1, "host": "h", "pid": 1}, {"leave": True}):
            text = json.dumps(message).encode()
            rank.sendall(len(text).to_bytes(4, "big") + text)
    hub.join(20)
    silent.close()
    server.close()
    assert not hub.is_alive()


def test_a_port_in_use_is_named(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, value in environment(port, 2, "MS_SCHED").items():
            monkeypatch.setenv(name, value)
        assert run_scheduler() == 1
    assert f"port {port} of 127.0.0.1 can't be opened" in capsys.readouterr().err


def test_an_end_of_mindspores_scheduler_ends_the_job():
    """It ends where its port is in use, and ranks would wait for it for ten minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["false"]) as scheduler:
        with pytest.raises(JobFailed, match="MindSpore's scheduler ended with 1: .*--master_port is in use"):
            Hub(server, 1, 20, scheduler).run()
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", "2"]) as scheduler:
        rank = subprocess.Popen([sys.executable, "-c", RANK + "time.sleep(60)"], stderr=subprocess.PIPE, text=True,
                                env=environment(server.getsockname()[1], 2))
        with pytest.raises(JobFailed, match="MindSpore's scheduler ended with 0"):
            Hub(server, 2, 20, scheduler).run()
        assert "MindSpore's scheduler ended" in rank.communicate(timeout=20)[1] and rank.returncode == 1


def test_an_end_of_mindspores_scheduler_names_the_rank_that_was_stopped():
    """It gives up half a minute after it has heard from a process last."""
    wait = "world.gather('a checkpoint') if world.rank == 0 else time.sleep(60)"
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", "3"]) as scheduler:
        ranks = [subprocess.Popen([sys.executable, "-c", RANK + wait], stderr=subprocess.PIPE, text=True,
                                  env=environment(server.getsockname()[1], 2, rank=rank)) for rank in range(2)]
        named = f"rank 1 ({socket.gethostname()}, process {ranks[1].pid}) did not come to a checkpoint, where others"
        with pytest.raises(JobFailed, match="MindSpore's scheduler ended with 0: .*" + re.escape(named)):
            Hub(server, 2, 20, scheduler).run()
        assert named in outputs(ranks)[0][1]


def test_ranks_that_need_no_collectives_end_the_job_when_they_end(tmp_path):
    """A run that is complete already; MindSpore's scheduler would wait ten minutes for them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    program = "from mindpangu.runtime.cluster import run_scheduler\nraise SystemExit(run_scheduler())"
    scheduler = subprocess.Popen([sys.executable, "-c", program], env=environment(port, 2, "MS_SCHED"), cwd=tmp_path)
    ranks = [subprocess.Popen([sys.executable, "-c", RANK + "world.leave()"], env=environment(port, 2, rank=rank),
                              stdout=subprocess.DEVNULL) for rank in range(2)]
    try:
        assert [process.wait(60) for process in (*ranks, scheduler)] == [0, 0, 0]
    finally:
        for process in (*ranks, scheduler):
            process.kill()
            process.wait()


def test_a_missing_node_rank_and_a_hub_that_is_not_there_are_told():
    program = "from mindpangu.runtime import cluster\ncluster._JOIN_TIMEOUT_S = 1\ncluster.join()"
    def tried(rank):
        done = subprocess.run([sys.executable, "-c", program], env=environment(port, 2, rank=rank), capture_output=True,
                              text=True, timeout=60)
        assert done.returncode
        return done.stderr

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"can't reach the job's hub at 127.0.0.1:{port} (timed out)" in tried(1)  # it accepts, and is silent
    assert f"can't reach the job's hub at 127.0.0.1:{port}" in tried(1)
    assert "--node_rank" in tried(-1)


def test_alone_nothing_is_sent():
    world = World()
    assert world.is_main and world.gather("x", 3) == [3] and world.on_main("y", lambda: 4) == 4
    with world.meeting("z", 1e-9):
        world.fail("nobody hears it")
    world.leave()
