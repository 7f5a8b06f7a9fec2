"""How a command ends: an error to one line on stderr and an exit code. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from cyclopts.exceptions import CycloptsError

from fasttht.errors import FastthtError, is_shortage
from fasttht.pipelines import DataError
from fasttht.signals import Terminated

# What to know after a stop, by the words that a command begins with; the others keep nothing.
_AFTER_A_STOP = {
    "train": "the same command again continues from the last checkpoint, or begins anew if there is none yet",
    "pretrain": "the same command again continues from the last checkpoint, or begins anew if there is none yet",
    "compare": "the same command again keeps the runs that are finished, and continues the others",
    "eval": "nothing was kept but what suites keep in --work-dir; the same command begins anew",
    "plot steps": "points that were measured are kept; the same command measures the others",
    "plot eps": "points that were measured are kept; the same command measures the others",
    "data write": "the same command with --resume goes on, if the write had come far enough to be kept",
}

# What to lower where memory runs out before a command knows by how much, by its first word; the others have no such
# option in common.
_AFTER_A_SHORTAGE = {
    "train": "lower --batch-size or --bank-size, or raise --grad-accum-steps",
    "pretrain": "lower --batch-size, --img-size or --queue-size",
}


def code_of(error: BaseException, tokens: Sequence[str]) -> int | None:
    """Print the line that ends the command of these words, and return its exit code; None, and no line, for a bug."""
    if isinstance(error, CycloptsError):
        _say(error, " ".join(str(error).split()))
        return 2
    if isinstance(error, FastthtError | DataError):
        _say(error, str(error))
        return error.exit_code
    if isinstance(error, OSError):
        what = error.filename or "a file"
        _say(error, f"{what}: expected to read or write it, got: {error.strerror}; check the path and the disk")
        return 6
    if is_shortage(error):
        got = (str(error) or "no room").splitlines()[0][:200]
        advice = [_AFTER_A_SHORTAGE[word] for word in tokens[:1] if word in _AFTER_A_SHORTAGE]
        _say(error, f"memory: expected enough, got: {got}; {advice[0] if advice else 'free some, or do less at once'}")
        return 6
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):  # Python's words
        _say(error, "threads: expected room for one more, got this machine's limit; lower --workers, or raise the "
             "limit (ulimit -u)")  # fmt: skip
        return 6
    if isinstance(error, KeyboardInterrupt):
        said = [_AFTER_A_STOP[words] for words in (" ".join(tokens[:2]), *tokens[:1]) if words in _AFTER_A_STOP]
        _say(error, f"stopped; {said[0] if said else 'nothing was kept; the same command begins anew'}")
        return stop_code(error)
    return None


def stop_code(error: KeyboardInterrupt) -> int:
    """Return the exit code after a stop: 75 where a batch system asked for it, 130 after Ctrl-C."""
    return 75 if isinstance(error, Terminated) else 130


def _say(error: BaseException, text: str) -> None:
    """Print a line, unless another of several processes has said the same."""
    from fasttht.log import fail

    if not getattr(error, "told", False):
        fail(text)
