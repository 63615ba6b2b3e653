"""math-verify in processes of its own, each killed when it thinks for too long: its parser computes what it reads,
9^{9^{9^9}} included, and no timeout inside the process stops that. A killed judgement counts as wrong.
The limit is in CPU seconds, kept by the kernel: a busy machine changes no verdict, and an orphan ends too."""

import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def cores():
    """How many judges may work at once. The other processes of this machine judge too; 16 of a gigabyte are enough."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, max(1, ours // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class Judge(threading.local):
    """The process, each thread's own: started when it is needed and again after it was killed."""

    CPU_SECONDS, WALL_SECONDS, BYTES = 2, 120, 2**30
    THREADS = ThreadPoolExecutor(cores())  # all that they do is wait for their judges
    process = None

    def map(self, function, *arguments):
        """[function(...) of each], in order. Games start no judge, and threads would not make them faster."""
        return list((self.THREADS.map if self.process else map)(function, *arguments))

    def equivalent(self, gold, answer):
        """Whether two LaTeX expressions (text) are the same mathematics."""
        self.start()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([gold, answer]) + "\n")
            self.process.stdin.flush()
        return self._line("True\n", "False\n") == "True\n"

    def start(self):
        """Make sure that the process runs. Raises ValueError where math-verify is missing."""
        if self.process is not None and self.process.poll() is None:
            return
        root = str(Path(__file__).parents[1])  # with PYTHONSAFEPATH no folder is on the path by itself
        start = f"import sys; sys.path.insert(0, {root!r}); from support.judge import judge; judge()"
        command = [sys.executable, "-c", start]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        # A session of its own: Ctrl-C is meant for the run, and must not turn a right answer into a wrong one.
        self.process = subprocess.Popen(command, cwd=root, start_new_session=True, **streams)
        if not self._line("ready\n"):
            there = importlib.util.find_spec("math_verify")
            slow = "the process of math-verify did not start: does it have a GiB of memory (ulimit -v)?"
            raise ValueError(slow if there else "this task needs math-verify: pip install math-verify")

    def _line(self, *expected):
        """The next line that the process writes, if it is one of these; else None, and the process is killed."""
        ready = select.select([self.process.stdout], [], [], self.WALL_SECONDS)[0]
        line = self.process.stdout.readline() if ready else ""
        if line in expected:
            return line
        self.process.kill()
        self.process.communicate()  # closes the pipes
        self.process = None


def judge():
    """The judge's process: pairs of expressions in, verdicts out, a line each, until its input ends."""
    import resource

    from math_verify import parse, verify

    allowed = resource.getrlimit(resource.RLIMIT_AS)[1]  # more than the user allows would be refused
    most = Judge.BYTES if allowed == resource.RLIM_INFINITY else min(Judge.BYTES, allowed)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    verify(parse(r"$\frac{x}{2} + 2x$"), parse("$0$"))  # what it imports at its first use takes a second or two
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, Judge.CPU_SECONDS)  # then SIGPROF, which ends the process
        try:
            gold, answer = (parse(f"${text}$", parsing_timeout=None) for text in json.loads(line))
            print(verify(gold, answer, timeout_seconds=None), flush=True)
        except Exception:
            print(False, flush=True)


JUDGE = Judge()
