"""Processes that arrive at a socket: many at once, and strangers among them."""

from __future__ import annotations

import multiprocessing
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nemo_rl_core.errors import DeadlineExceeded
from nemo_rl_core.machine.arrivals import Arrivals, arrive

KEY = b"a secret of the test"


@pytest.fixture(params=[None, "127.0.0.1"], ids=["path", "port"])
def arrivals(request):
    made = Arrivals(KEY, address=request.param, name="arrivals-of-a-test", proof_s=1.0)
    yield made
    made.close()


def test_many_arrive_at_once_beside_a_stranger_who_says_nothing(arrivals):
    family = socket.AF_UNIX if isinstance(arrivals.address, str) else socket.AF_INET
    with socket.socket(family) as stranger, ThreadPoolExecutor(48) as pool:
        stranger.connect(arrivals.address)
        stranger.settimeout(20.0)
        calls = [pool.submit(arrive, arrivals.address, KEY, who="The test", timeout_s=20.0) for _ in range(48)]
        found = [arrivals.next(20.0) for _ in calls]
        for number, connection in enumerate(found):
            connection.send(number)
        assert sorted(call.result().recv() for call in calls) == list(range(48))
        for call, connection in zip(calls, found, strict=True):
            call.result().close()
            connection.close()
        assert b"#CHALLENGE#" in stranger.recv(100)
        assert stranger.recv(1) == b""  # nobody waits for it for ever


def test_one_without_the_secret_never_arrives(arrivals):
    with pytest.raises(multiprocessing.AuthenticationError):
        arrive(arrivals.address, b"another", who="The test", timeout_s=20.0)
    with arrive(arrivals.address, KEY, who="The test", timeout_s=20.0) as own:
        arrivals.next(20.0).send("hello")
        assert own.recv() == "hello"


def test_one_who_does_not_answer_is_named():
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(DeadlineExceeded, match="The test did not answer"),
    ):
        arrive(silent.getsockname(), KEY, who="The test", timeout_s=0.1)


def test_many_who_say_nothing_cost_no_threads(arrivals):
    family = socket.AF_UNIX if isinstance(arrivals.address, str) else socket.AF_INET
    before = threading.active_count()
    held = [socket.socket(family) for _ in range(100)]
    for stranger in held:
        stranger.connect(arrivals.address)
        assert stranger.recv(100)  # it is being served
    assert threading.active_count() <= before
    for stranger in held:
        stranger.close()


@pytest.mark.parametrize("answer", [bytes(64), b"short"], ids=["wrong", "too short"])
def test_one_who_answers_wrongly_never_arrives_and_learns_nothing(arrivals, answer):
    family = socket.AF_UNIX if isinstance(arrivals.address, str) else socket.AF_INET
    with socket.socket(family) as stranger:
        stranger.connect(arrivals.address)
        stranger.settimeout(20.0)
        stranger.recv(100)
        stranger.sendall(answer)
        assert stranger.recv(100) in (bytes(32), b"")
    with pytest.raises(TimeoutError):
        arrivals.next(0.1)


def test_who_listens_proves_itself_too():
    with socket.create_server(("127.0.0.1", 0)) as impostor, ThreadPoolExecutor(1) as pool:
        call = pool.submit(arrive, impostor.getsockname(), KEY, who="The test", timeout_s=20.0)
        with impostor.accept()[0] as caller:
            caller.sendall(b"#CHALLENGE#" + bytes(32))
            heard = caller.recv(64)
            caller.sendall(heard[32:])  # the caller's own proof, sent back
            with pytest.raises(multiprocessing.AuthenticationError, match="The test at"):
                call.result()
