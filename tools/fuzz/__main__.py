"""Damaged files and settings, at random: each is used as a good one would be, or refused in one clear line.

`python -m tools.fuzz --kind nii --minutes 10 --seed 0` keeps in --output_dir what ends otherwise, and exits with 1 if
anything did; `--case N` does one case again. Kinds: hdr, nii, h5, pt, ckpt, json, see `tools.fuzz.cases`.
"""

import argparse
import contextlib
import itertools
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import numpy as np
import torch
from tqdm import tqdm

from scripts.errors import input_error_in, ran_out_of_memory
from tools.fuzz.cases import CASES, ROOT, networks, transforms

SECONDS = 10  # that a case may take
MOST_MEMORY = 2 * 2**30  # bytes that cases may fill
# bytes that a case may ask for: a text in a pickle may claim 4 GiB, which are taken and given back untouched
MOST_ADDRESSES = 5 * 2**30


class TooLong(BaseException):
    """A case took more than SECONDS; no `except Exception` holds it."""


def is_clear(message: str, folder: Path) -> bool:
    """Whether it is one line that begins with the file or the option that is wrong."""
    return len(message.splitlines()) == 1 and bool(re.match(rf"'?{re.escape(str(folder))}/\S|--", message))


def out_of_memory(error: BaseException | None) -> bool:
    """Whether it is, or was raised from, a lack of memory."""
    while error is not None and not ran_out_of_memory(error):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error is not None


def raise_too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong(f"a case took more than {SECONDS} s")


def judge(kind: str, seed: int, number: int, folder: Path) -> tuple[str, str, str]:
    """Do a case in an empty folder: 'refused', 'accepted' or 'finding'; of the last a short name and the traceback."""
    signal.signal(signal.SIGALRM, raise_too_long)
    signal.alarm(SECONDS)
    try:
        CASES[kind](np.random.default_rng([seed, number]), folder)
        return "accepted", "", ""
    except BaseException as error:
        signal.alarm(0)
        refusal = input_error_in(error)
        if refusal and is_clear(str(refusal), folder) and not out_of_memory(error):
            return "refused", "", ""
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "finding", f"{type(error).__name__}-{Path(last.filename).name}-{last.lineno}", traceback.format_exc()
    finally:
        signal.alarm(0)


def keep(folder: Path, output: Path, text: str) -> None:
    """Copy the files of a finding, unless there are those of one like it."""
    if not output.exists():
        shutil.copytree(folder, output, symlinks=True)
        (output / "finding.txt").write_text(text, errors="backslashreplace")


def work(kind: str, seed: int, first: int, folder: Path, output_dir: Path, results: Connection) -> None:
    """Do case after case, and tell of each; the process is a child's, and may die of one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which is the parent's to see
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    transforms()
    networks()  # both are kept; the first case would take seconds for them
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MOST_ADDRESSES, taken + MOST_ADDRESSES))
    for number in itertools.count(first):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            verdict, name, text = judge(kind, seed, number, folder)
        if verdict == "finding":
            keep(folder, output_dir / f"{kind}-{name}", f"--kind {kind} --seed {seed} --case {number}\n{text}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if peak > MOST_MEMORY:
            sys.exit(f"case {number} filled the memory: {peak / 2**30:.2f} GiB")  # which makes it a finding
        results.send((verdict, peak))


def fuzz(kind: str, minutes: float, seed: int, output_dir: Path, most: int = sys.maxsize) -> Counter[str]:
    """Do cases in a child process, for so many minutes or until so many are done, and say what became of them."""
    verdicts: Counter[str] = Counter()
    peak, begin = 0, time.monotonic()
    context = multiprocessing.get_context("fork")
    child = None
    with TemporaryDirectory() as scratch, tqdm(desc=kind, unit="case") as bar:
        folder = Path(scratch) / "case"
        folder.mkdir()
        try:
            while time.monotonic() - begin < 60 * minutes and bar.n < most:
                if child is None:
                    results, sender = context.Pipe(duplex=False)
                    arguments = (kind, seed, bar.n, folder, output_dir, sender)
                    child = context.Process(target=work, args=arguments, daemon=True)
                    child.start()
                    sender.close()
                try:
                    if not results.poll(2 * SECONDS):  # it hangs where no signal is heeded
                        child.kill()
                    verdict, memory = results.recv()
                    peak = max(peak, memory)
                except EOFError:
                    child.join()
                    verdict, ended = "finding", f"ended-{child.exitcode}"
                    keep(folder, output_dir / f"{kind}-{ended}-{bar.n}", f"--seed {seed} --case {bar.n}: {ended}\n")
                    child = None
                verdicts[verdict] += 1
                bar.set_postfix(findings=verdicts["finding"], refresh=False)
                bar.update()
        except KeyboardInterrupt:
            pass
        finally:
            if child is not None:
                child.kill()
                child.join()
    print(
        f"{kind}: {(time.monotonic() - begin) / 60:.1f} minutes, {verdicts.total():,} cases, "
        f"{verdicts['refused']:,} refused, {verdicts['accepted']:,} accepted, {verdicts['finding']:,} findings, "
        f"peak memory {peak / 2**30:.2f} GiB"
    )
    return verdicts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=CASES, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "eval" / "fuzz")
    parser.add_argument("--case", type=int)
    given = parser.parse_args()
    if given.case is None:
        sys.exit(bool(fuzz(given.kind, given.minutes, given.seed, given.output_dir)["finding"]))
    with TemporaryDirectory() as scratch:
        print(*judge(given.kind, given.seed, given.case, Path(scratch)), sep="\n")
