"""The page about the trials."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from hard_life.bits import NOT_READ
from hard_life.jobs import JOBS
from hard_life.trials import Found

KINDS = ("killed", "full disk", "two at once", "a flipped bit")

HEAD = """# A hard life

What becomes of the files that metalens writes when a process is killed, a disk is full, a bit flips, or two processes write to one place.
`python tools/hard_life` made the trials and wrote this page. [Promises](promises.md) says what follows from
them, with a test for each.

- *Killed*: the command writes newer files over older ones, and is killed (`kill -9`) before it changes files: before each creation, fsync, move
  and deletion in turn, or before {moments} of them.
- *Full disk*: the disk has no room left, then some kB, then more, until the command ends well.
- *Two at once*: the same command runs twice at the same time, with other inputs.
- *old*, *new*: the file is byte for byte the older or the newer one. *none*: it is not there. *a part*: it has the lines of some steps, or is the
  checkpoint of another step. Nothing else was found{but}.
- After each kill, and after each full disk once there was room, the command ran again (`train` with `--resume`). It wrote what one run alone
  writes, and left no temporary file{but}.
- *A flipped bit*: reading the file with one bit changed, at {flips} random places.
"""

# (what happens, what the user sees)
SEEN = (
    ("A run is killed.", "Nothing. `metalens train ... --resume` goes on after the newest checkpoint, and ends with the same bytes."),
    (
        "`convert` or `eval` is killed between the moves of its files.",
        "Each file is whole, and files of two versions lie side by side: run the command again. A lens of metalens that is mixed in this way is "
        "refused when it is read.",
    ),
    (
        "`convert --force` of a model is killed between its two moves.",
        "There is no folder NAME. The older model is whole, in the hidden folder `.NAME.old.metalens-*` beside it: run the command again, which "
        "deletes that folder when the new model is in place, or move the folder to NAME.",
    ),
    (
        "The disk is full.",
        "Exit code 1, and a line that names the file: `Error: [Errno 28] No space left on device: 'results/logit_stats.npz'`. What was there before "
        "is whole.",
    ),
    (
        "A lens or a trajectory is damaged.",
        "`Error: ... is damaged`, or `... has changed since it was written`. A changed description of a lens is a warning.",
    ),
    ("A checkpoint is damaged.", "A warning that names it. The run goes on from the one before."),
    ("Cached tokens are damaged.", "Nothing. The text is tokenized again."),
    ("The weights of a converted model are damaged.", "Possibly nothing: mlx-lm's format has no checksum. Convert the file again."),
    ("A second `train` writes to the same place.", "`Error: Another run (pid 4711 on host) writes to lens.`"),
    ("Another command runs twice at once.", "Nothing. Each file is that of one of the two."),
)


def page(found: Mapping[str, Mapping[str, Found]]) -> str:
    """Return docs/reference/hard-life.md.

    Args:
        found: {name of a job: {kind of trial: what it has shown}}.
    """
    jobs = [job for job in JOBS if job.name in found]
    wrong = [line for kinds in found.values() for result in kinds.values() for line in result.wrong]
    most = {kind: max((kinds[kind].trials for kinds in found.values() if kind in kinds), default=0) for kind in KINDS}
    head = HEAD.format(moments=most["killed"], flips=most["a flipped bit"], but=", except what the end of this page lists" if wrong else "")
    parts = [head, f"| command | file | {' | '.join(KINDS)} |", "|---|---|" + "---|" * len(KINDS)]
    for job in jobs:
        for name in job.files:
            cells = [_states(found[job.name].get(kind, Found()), name) for kind in KINDS]
            parts.append(f"| `{job.name}` | `{name}` | {' | '.join(cells)} |")
    parts += ["", "| command | kills | full disks: how it ended | two at once: how they ended |", "|---|---:|---|---|"]
    for job in jobs:
        killed, full, two = (found[job.name].get(kind, Found()) for kind in KINDS[:3])
        parts.append(f"| `{job.name}` | {killed.trials} | {_listed(full.endings)} | {_listed(two.endings)} |")
    parts += ["", "## What you see", "", "| what happens | what you see |", "|---|---|", *(f"| {what} | {seen} |" for what, seen in SEEN), ""]
    if wrong:
        parts += ["## What must not be", "", *(f"- {' '.join(line.split())}" for line in wrong), ""]
    return "\n".join(parts)


def _states(found: Found, name: str) -> str:
    return _listed(found.states.get(name, Counter()))


def _listed(counted: Counter[str]) -> str:
    return NOT_READ if NOT_READ in counted else ", ".join(f"{what} {count}" for what, count in counted.most_common())
