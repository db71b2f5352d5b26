"""The command line: `flaxslim inspect | slim | verify | prune | sweep | run | report | ...`.

Nothing heavy is imported until a command needs it, so that `--help` answers at once.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flaxslim.errors import FlaxslimError, ProofError

EXIT_CODES = """exit codes:
  0    done
  1    an error; the message says what to do
  2    the command line itself is wrong
  3    nothing can go, so nothing was written
  4    the two models are not proven equal, so nothing was written
  130  stopped by Ctrl-C; what stands at the target is whole, old or new

environment:
  FLAXSLIM_TRACEBACK=1   show the traceback of an unexpected error"""

NOTHING_DEAD, NOT_PROVEN, INTERRUPTED = 3, 4, 130


def _by_name() -> dict[str, Callable[..., Any]]:
    from flaxslim.cli import _commands, _prune_commands

    return {
        "inspect": _commands.inspect,
        "slim": _commands.slim,
        "verify": _commands.verify,
        "families": _commands.families,
        "prune": _prune_commands.prune,
        "sweep": _prune_commands.sweep,
        "run": _commands.run,
        "report": _commands.report,
        "export": _commands.export,
        "demo": _commands.demo,
    }


def entry() -> int:
    """The command of the shell: `main` in a process of its own."""
    # transformers imports torch where it is installed, for seconds. These run Flax classes alone;
    # a pickled checkpoint is read by torch itself.
    if sys.argv[1:2] and sys.argv[1] in ("inspect", "slim", "verify"):
        os.environ.setdefault("USE_TORCH", "0")
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with _interruptible():
            import tyro

            # Parses, calls, and exits with 2 if it cannot.
            code = tyro.extras.subcommand_cli_from_dict(
                _by_name(),
                prog="flaxslim",
                description="Make a Flax checkpoint smaller without changing what it computes: "
                "cut the FFN channels and attention heads that contribute nothing.\n\n"
                + EXIT_CODES,
                args=arguments,
            )
    except ProofError as error:
        return _complain(error, NOT_PROVEN)
    except FlaxslimError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("stopped; nothing half-written is left", INTERRUPTED)
    except Exception as error:
        return _unexpected(error)
    return int(code or 0)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is heard also where Python drops exceptions: in callbacks of the garbage collector.

    JAX has one, which runs often. What was dropped there comes again a moment later.
    """
    import _thread
    import signal
    import threading

    stock, here = sys.unraisablehook, threading.get_ident()

    def again() -> None:
        if hasattr(signal, "pthread_kill"):  # which ends a wait of the system's, too
            signal.pthread_kill(here, signal.SIGINT)
        else:
            _thread.interrupt_main()

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            threading.Timer(0.01, again).start()
        else:
            stock(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = stock


def _unexpected(error: Exception) -> int:
    """What no message was written for: one line, and the traceback for those who ask for it."""
    import traceback

    from flaxslim.cli._console import messages

    wanted = os.environ.get("FLAXSLIM_TRACEBACK", "0") not in ("", "0")
    follows = "follows" if wanted else "follows with FLAXSLIM_TRACEBACK=1"
    messages.print(
        f"unexpected error: {type(error).__name__}: {error}; please report it; the traceback "
        f"{follows}",
        markup=False,
        soft_wrap=True,
    )
    if wanted:
        text = "".join(traceback.format_exception(error))
        messages.print(text, markup=False, soft_wrap=True, end="")
    return 1


def _complain(error: FlaxslimError | str, code: int) -> int:
    from flaxslim.cli._console import message_in_flags, messages

    text = error if isinstance(error, str) else message_in_flags(error)
    messages.print(f"[bold red]error:[/] {_escape(text)}", soft_wrap=True)
    return code


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
