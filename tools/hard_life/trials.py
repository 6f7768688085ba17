"""Kill a command at every moment, fill its disk, and run it twice at once. Judge what is left."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hard_life.jobs import NEWER, OLDER, Job, age, contents, leftovers, restored
from hard_life.process import Ended, Process, at_every_change

FREE = (0, 8, 32, 64, 128, 256, 512, 1024, 2048)  # kB that a full disk has left


@dataclass
class Found:
    """What trials of one kind have shown.

    Attributes:
        trials: number of trials.
        states: {name of a file: how often it was found in each state}.
        endings: how often the command ended in each way.
        wrong: what must not be, in words.
    """

    trials: int = 0
    states: dict[str, Counter[str]] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the trials as JSON holds them."""
        states = {name: dict(counted) for name, counted in self.states.items()}
        return {"trials": self.trials, "states": states, "endings": dict(self.endings), "wrong": self.wrong}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Found:
        """Return the trials that `to_dict` gave."""
        states = {name: Counter(states) for name, states in found["states"].items()}
        return cls(found["trials"], states, Counter(found["endings"]), found["wrong"])

    def note(self, name: str, state: str) -> None:
        """Count the state of a file."""
        self.states.setdefault(name, Counter())[state] += 1


class Bench:
    """The folders of the trials, and what commands write there when nothing disturbs them.

    Args:
        scratch: an empty folder.
        prepare: writes what the commands read into the folder that it is given.

    Attributes:
        work: where all commands run, because a lens remembers paths.
        inputs: what they read.
        older: {name of a job: folder with the inputs and its older files}.
        expected: {name of a job: its older and its newer files, as `contents` returns them}.
    """

    def __init__(self, scratch: Path, prepare: Callable[[Path], None]) -> None:
        self.scratch, self.work, self.inputs = scratch, scratch / "work", scratch / "inputs"
        self.log = scratch / "log"
        for folder in (self.work, self.inputs):
            folder.mkdir()
        self.environment = {"METALENS_CACHE": str(self.work / "cache"), "METALENS_NUM_THREADS": "1"}
        require(Process(lambda: prepare(self.inputs), self.inputs, self.log, self.environment).end())
        self.expected: dict[str, list[dict[str, dict[str, bytes]]]] = {}
        self.older: dict[str, Path] = {}

    def learn(self, job: Job) -> None:
        """Write both versions of a job's files, alone and without trouble."""
        versions = []
        for version in (OLDER, NEWER):
            with restored(self.work, self.inputs):
                require(self.run(job.arguments(version)))
                versions.append(contents(self.work, job))
                if version == OLDER:
                    self.older[job.name] = self.scratch / f"older {job.name}"
                    shutil.copytree(self.work, self.older[job.name])
        self.expected[job.name] = versions

    def start(self, arguments: list[str], before: Callable[[], object] = lambda: None, log: Path | None = None) -> Process:
        """Start `metalens` with arguments in the folder of the trials."""

        def run() -> None:
            from metalens.cli import main

            before()
            main(arguments)

        return Process(run, self.work, log or self.log, self.environment)

    def call(self, function: Callable[[], object]) -> Ended:
        """Call a function in a process of its own, in the folder of the trials."""
        return Process(function, self.work, self.log, self.environment).end()

    def run(self, arguments: list[str], before: Callable[[], object] = lambda: None) -> Ended:
        """Run `metalens` with arguments."""
        return self.start(arguments, before).end()

    def refuses(self, arguments: list[str]) -> bool:
        """Return whether a command that reads files of two versions says that they do not belong together."""
        ended = self.run(arguments)
        return ended.code == 1 and "do not belong together" in ended.said

    def states(self, job: Job, found: Found, at: str) -> None:
        """Compare the files that a job has left with both versions."""
        now, (old, new) = contents(self.work, job), self.expected[job.name]
        versions: dict[str, set[str]] = {}
        for name in job.files:
            for path, data in now[name].items():
                state = "new" if new[name].get(path) == data else "old" if old[name].get(path) == data else "other"
                if state == "other" and (name in CHECKPOINTS or any(whole.startswith(data) for whole in new[name].values() if name in GROWING)):
                    state = "a part"
                found.note(name, state)
                if old[name].get(path) != new[name].get(path):
                    versions.setdefault(name, set()).add(state)
                if state == "other":
                    found.wrong.append(f"{job.name}, {at}: {path} is neither the old nor the new one")
            if not now[name]:
                found.note(name, "none")
        mixed = {state for name in job.together for state in versions.get(name, ())}
        if len(mixed) > 1 and not (job.reading and self.refuses(list(job.reading))):
            found.wrong.append(f"{job.name}, {at}: {', '.join(job.together)} are of two versions, and nothing says so")

    def again(self, job: Job, found: Found, at: str) -> None:
        """Run the command again, as a user would, and expect its files and no others."""
        age(self.work)
        ended = self.run([*job.arguments(NEWER), *job.again])
        if ended.code and job.again:
            ended = self.run(job.arguments(NEWER))
        if ended.code or ended.crashed:
            found.wrong.append(f"{job.name}, {at}: the next run ends with {ended.code}: {ended.said[-300:]}")
            return
        now, new = contents(self.work, job), self.expected[job.name][NEWER]
        for name in job.files:
            different = [path for path, data in new[name].items() if now[name].get(path) != data]
            if different and name not in CHECKPOINTS:
                found.wrong.append(f"{job.name}, {at}: after the next run {', '.join(different)} is not what one run alone writes")
        if left := leftovers(self.work):
            found.wrong.append(f"{job.name}, {at}: after the next run there is still {', '.join(left)}")


CHECKPOINTS = ("state.safetensors", "state.json")  # those of any step
GROWING = ("metrics.jsonl",)  # line by line


def require(ended: Ended) -> None:
    """Check that a command without trouble ends well."""
    if ended.code or ended.crashed:
        raise RuntimeError(f"A command that nothing disturbed ended with {ended.code}:\n{ended.said}")


def moments(bench: Bench, job: Job) -> int:
    """Return how often a job changes a file, over its older files."""
    counted = bench.scratch / "counted"

    def count() -> None:
        handle = os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        at_every_change(bench.work, lambda: os.write(handle, b"."))

    counted.unlink(missing_ok=True)
    with restored(bench.work, bench.older[job.name]):
        require(bench.run(job.arguments(NEWER), count))
    return counted.stat().st_size


def killed(bench: Bench, job: Job, most: int) -> Found:
    """Kill the command before each change that it makes to files, or before `most` of them."""
    found, every = Found(), moments(bench, job)
    for moment in sorted({round(i * (every - 1) / max(min(most, every) - 1, 1)) + 1 for i in range(min(most, every))}):

        def kill(moment: int = moment) -> None:
            changes = itertools.count(1)
            at_every_change(bench.work, lambda: next(changes) == moment and os.kill(os.getpid(), signal.SIGKILL))

        with restored(bench.work, bench.older[job.name]):
            ended = bench.run(job.arguments(NEWER), kill)
            if ended.code != -signal.SIGKILL:
                found.wrong.append(f"{job.name}, killed before change {moment}: it ended with {ended.code}: {ended.said[-300:]}")
            found.trials += 1
            at = f"killed before change {moment} of {every}"
            bench.states(job, found, at)
            bench.again(job, found, at)
    return found


def full_disk(bench: Bench, job: Job) -> Found:
    """Run the command on a disk that has a few kB left. Then make room, and run it again."""
    found = Found()
    for free in FREE:
        with SmallDisk(bench.work), restored(bench.work, bench.older[job.name]):
            filler = bench.work / "filler"
            fill(filler, free << 10)
            ended = bench.run(job.arguments(NEWER))
            at = f"with {free} kB left"
            found.trials += 1
            named = names_file(ended.said, job)
            found.endings["written" if ended.code == 0 else "an error that names the file" if named else "another error"] += 1
            if ended.crashed or (ended.code and not named):
                found.wrong.append(f"{job.name}, {at}: ended with {ended.code}: {ended.said[-400:]}")
            if ended.code and (left := leftovers(bench.work)):
                found.wrong.append(f"{job.name}, {at}: {', '.join(left)} is left")
            bench.states(job, found, at)
            filler.unlink()
            if ended.code:
                bench.again(job, found, at)
        if ended.code == 0:
            break
    return found


def names_file(said: str, job: Job) -> bool:
    """Return whether a command ended with one error, and said in one line which of its files it could not write, and why."""
    lines = said.splitlines()
    places = {Path(pattern).parts[0] for pattern in job.files.values()}
    reasons = [line for line in lines if "No space left on device" in line or "Is the disk full?" in line]
    errors = [line for line in lines if line.startswith("Error: ")]
    return len(errors) == len(reasons) == 1 and any(place in reasons[0] for place in places)


class SmallDisk:
    """A disk of 8 MB (a tmpfs) that is mounted at a folder inside a `with` block. Takes root, or `unshare --user --map-root-user --mount`.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(self.folder)], check=True)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


def fill(file: Path, left: int) -> None:
    """Write a file that leaves so many bytes of the disk."""
    facts = os.statvfs(file.parent)
    file.write_bytes(bytes(max(facts.f_bavail * facts.f_frsize - left - facts.f_frsize, 0)))


def twice(bench: Bench, job: Job, rounds: int) -> Found:
    """Start the command twice at once, once for each version."""
    found = Found()
    for number in range(rounds):
        with restored(bench.work, bench.inputs):
            logs = [bench.scratch / f"log{version}" for version in (OLDER, NEWER)]
            both = [bench.start(job.arguments(version), log=log) for version, log in zip((OLDER, NEWER), logs, strict=True)]
            ended = [process.end() for process in both]
            at = f"two at once, round {number + 1}"
            found.trials += 1
            for each in ended:
                refused = "Another run (pid" in each.said
                found.endings["written" if each.code == 0 else "refused, by the number of the other" if refused else "an error"] += 1
                if each.crashed or (each.code and not refused):
                    found.wrong.append(f"{job.name}, {at}: ended with {each.code}: {each.said[-300:]}")
            if all(each.code for each in ended):
                found.wrong.append(f"{job.name}, {at}: neither of the two wrote")
            bench.states(job, found, at)
            if left := leftovers(bench.work):
                found.wrong.append(f"{job.name}, {at}: {', '.join(left)} is left")
    return found
