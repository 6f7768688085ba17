import gc
import itertools
import threading
import time

import numpy as np
import pytest

from metalens.training.data import Corpus, NotEnoughDataError, Producer, Sampler


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def threads():
    return [t for t in threading.enumerate() if t.name == "metalens-producer"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    assert not threads()
    yield
    wait_until(lambda: not threads())


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_items_come_in_order(depth):
    with Producer(range(20), depth) as producer:
        assert list(producer) == list(range(20))
        assert list(producer) == []


def test_a_function_is_called_until_it_stops():
    items = iter("abc")
    with Producer(lambda: next(items)) as producer:
        assert list(producer) == ["a", "b", "c"]


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_is_made_ahead(depth):
    made = []

    def items():
        for i in itertools.count():
            made.append(i)
            yield i

    with Producer(items(), depth) as producer:
        for taken in range(5):
            wait_until(lambda taken=taken: len(made) == taken + depth)
            time.sleep(0.01)
            assert len(made) == taken + depth
            assert next(producer) == taken


def test_an_exception_reaches_the_consumer_after_what_was_made_before_it():
    def items():
        yield 1
        yield 2
        raise KeyError("broken")

    with Producer(items(), 5) as producer:
        wait_until(lambda: not threads())
        assert [next(producer), next(producer)] == [1, 2]
        for _ in range(2):
            with pytest.raises(KeyError, match="broken"):
                next(producer)


def test_closing_ends_the_thread_and_the_generator_in_it():
    ended = []

    def items():
        try:
            yield from itertools.count()
        finally:
            ended.append(threading.current_thread().name)

    producer = Producer(items())
    next(producer)
    producer.close()
    assert ended == ["metalens-producer"]
    assert not threads()
    producer.close()
    with pytest.raises(StopIteration):
        next(producer)


def test_closing_after_an_error():
    def items():
        yield 1
        raise KeyError("broken")

    producer = Producer(items())
    wait_until(lambda: not threads())
    producer.close()
    with pytest.raises(StopIteration):
        next(producer)


def test_the_thread_ends_when_the_consumer_fails():
    def consume():
        with Producer(itertools.count()):
            raise KeyError("consumer")

    with pytest.raises(KeyError):
        consume()
    assert not threads()


def test_a_forgotten_producer_ends_its_thread():
    producer = Producer(itertools.count())
    next(producer)
    del producer
    gc.collect()
    wait_until(lambda: not threads())


def test_the_consumer_waits_for_slow_sources():
    def items():
        for i in range(3):
            time.sleep(0.02)
            yield i

    with Producer(items()) as producer:
        assert list(producer) == [0, 1, 2]


def test_depth_is_checked():
    with pytest.raises(ValueError, match="depth"):
        Producer([], 0)


def test_the_state_is_that_of_what_was_consumed():
    def make():
        return Sampler(Corpus.from_ids(np.arange(100)), 3, seed=1, repeat=True)

    ahead = make()
    with Producer(lambda: ahead.take_step(5), depth=4) as producer:
        for _ in range(3):
            step = next(producer)
        wait_until(lambda: ahead.state() != step.state)
        following = [s.tolist() for s in next(producer).sequences]
    resumed = make()
    resumed.restore(step.state)
    assert [s.tolist() for s in resumed.take_tokens(5)] == following


def test_the_end_of_the_text_reaches_the_consumer():
    sampler = Sampler(Corpus.from_ids(np.arange(10)), 3)
    with Producer(lambda: sampler.take_step(3), depth=9) as producer:
        assert [next(producer).tokens for _ in range(3)] == [3, 3, 3]
        with pytest.raises(NotEnoughDataError):
            next(producer)
