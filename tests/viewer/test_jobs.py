"""The thread that holds the model: one job at a time, progress, cancelling, errors, and an end that waits for nobody."""

import asyncio
import threading
import time

import pytest

from metalens.display.server import jobs
from metalens.display.server.jobs import AHEAD, BusyError, ModelThread
from metalens.utils.errors import InvalidValueError
from support.coroutines import run_apart


class Steps:
    """A job of many steps, which the test lets go on one by one."""

    def __init__(self, count):
        self.count, self.done = count, 0
        self.go = threading.Semaphore(0)

    def __call__(self, model):
        for i in range(self.count):
            assert self.go.acquire(timeout=20)
            self.done += 1
            yield {"type": "progress", "done": i, "total": self.count, "what": model}


def run(scenario):
    async def limited():
        thread = ModelThread(lambda: "the model")
        try:
            return await asyncio.wait_for(scenario(thread), 30)
        finally:
            thread.close(5)

    return run_apart(limited())


async def collect(job):
    return [line async for line in job.lines()]


def test_lines_arrive_in_order_and_end():
    async def scenario(thread):
        steps = Steps(3)
        steps.go.release(3)
        return await collect(await thread.start(steps))

    lines = run(scenario)
    assert [line.get("done") for line in lines] == [0, 1, 2, None]
    assert lines[0]["what"] == "the model"
    assert lines[-1] == {"type": "done"}


def test_of_ten_jobs_at_once_one_runs_and_nine_are_refused():
    async def scenario(thread):
        steps = Steps(1)
        started = await asyncio.gather(*(thread.start(steps) for _ in range(10)), return_exceptions=True)
        steps.go.release(10)
        lines = [await collect(job) for job in started if not isinstance(job, Exception)]
        return started, lines, steps.done

    started, lines, done = run(scenario)
    refused = [error for error in started if isinstance(error, BusyError)]
    assert len(refused) == 9
    assert "one at a time" in str(refused[0])
    assert [len(each) for each in lines] == [2]
    assert done == 1


def test_a_reader_that_goes_away_stops_the_job_and_the_next_one_runs():
    async def scenario(thread):
        first, second = Steps(1000), Steps(1)
        job = await thread.start(first)
        first.go.release(1)
        lines = job.lines()
        await anext(lines)
        await lines.aclose()  # what happens when a browser closes its connection
        first.go.release(1)
        second.go.release(1)
        return first, await collect(await thread.start(second))

    first, lines = run(scenario)
    assert first.done <= 3
    assert lines[-1] == {"type": "done"}


def test_a_reader_that_does_not_go_on_holds_the_job_back_and_loses_nothing():
    async def scenario(thread):
        steps = Steps(10 * AHEAD)
        steps.go.release(steps.count)
        job = await thread.start(steps)
        lines = job.lines()
        first = await anext(lines)
        await asyncio.sleep(0.5)
        made = steps.done
        return made, [first, *[line async for line in lines]]

    made, lines = run(scenario)
    assert made <= AHEAD + 2  # one that the reader has, one that waits for room
    assert [line.get("done") for line in lines] == [*range(10 * AHEAD), None]


def test_a_reader_that_stays_away_ends_the_job(monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE", 0.2)

    async def scenario(thread):
        first, second = Steps(10 * AHEAD), Steps(1)
        first.go.release(first.count)
        second.go.release(1)
        job = await thread.start(first)
        await asyncio.wait_for(job.ended.wait(), 10)
        return first.done, await collect(await thread.start(second))

    made, lines = run(scenario)
    assert made == AHEAD + 1
    assert lines[-1] == {"type": "done"}


def test_a_cancelled_job_in_a_long_step_is_said_to_be_stopping(monkeypatch):
    monkeypatch.setattr(jobs, "STOPPING", 0.1)

    async def scenario(thread):
        long = Steps(1)
        job = await thread.start(long)
        thread.cancel()
        with pytest.raises(BusyError, match="is stopping"):
            await thread.start(long)
        long.go.release(1)
        await collect(job)
        long.go.release(1)
        return await collect(await thread.start(long))

    assert run(scenario)[-1] == {"type": "done"}


def test_an_error_of_the_library_is_one_line_and_any_other_one_leaves_the_thread_alive(caplog):
    def refuses(_):
        yield {"type": "progress"}
        raise InvalidValueError("The text is too long.")

    def breaks(_):
        raise ZeroDivisionError("a bug")
        yield

    async def scenario(thread):
        lines = [await collect(await thread.start(work)) for work in (refuses, breaks)]
        steps = Steps(1)
        steps.go.release(1)
        return [*lines, await collect(await thread.start(steps))]

    refused, broken, after = run(scenario)
    assert refused[-1] == {"type": "error", "message": "The text is too long."}
    assert "ZeroDivisionError: a bug" in broken[-1]["message"]
    assert "Traceback" in caplog.text
    assert after[-1] == {"type": "done"}


def test_a_model_that_does_not_load_is_the_caller_s_error():
    def load():
        raise InvalidValueError("There is no such model.")

    with pytest.raises(InvalidValueError, match="no such model"):
        ModelThread(load).loaded.result(10)


def test_closing_does_not_wait_for_a_long_step():
    release = threading.Event()

    def long_step(_):
        release.wait(20)
        yield {"type": "progress"}

    async def scenario():
        thread = ModelThread(lambda: None)
        await thread.start(long_step)
        began = time.monotonic()
        ended = thread.close(0.2)
        return ended, time.monotonic() - began

    ended, seconds = run_apart(scenario())
    release.set()
    assert not ended
    assert seconds < 5
