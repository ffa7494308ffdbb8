"""The `portkit` command: one file a verb in this folder; each parses, calls, prints and exits.

Knows exit codes and how an error reads on a terminal. Knows nothing of models: a verb imports the
engine inside its function, so that `portkit --help` never waits for torch.

Exit codes: 0 done or the gate holds, 1 the answer is no, 2 bad input or usage, 3 inconclusive,
70 our own fault, 130 interrupted (Ctrl-C, SIGTERM).
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from typing import NoReturn

import typer
from typer.exceptions import Abort, Exit, TyperException

from portkit.cli import (
    bench,
    demo,
    diff,
    export,
    faults,
    generate,
    import_,
    inspect,
    list_,
    load,
    parity,
    plot,
    record,
    train,
)
from portkit.cli.output import say
from portkit.errors import PortkitError

INTERNAL_ERROR, INTERRUPTED = 70, 130

app = typer.Typer(
    name="portkit",
    help="Load released checkpoints into readable PyTorch ports, and prove the ports right.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        import portkit

        print(f"portkit {portkit.__version__}")
        raise typer.Exit


for name, verb in {
    "demo": demo,
    "load": load,
    "inspect": inspect,
    "parity": parity,
    "record": record,
    "diff": diff,
    "faults": faults,
    "generate": generate,
    "train": train,
    "plot": plot,
    "import": import_,
    "export": export,
    "list": list_,
}.items():
    app.command(name)(verb.command)
app.add_typer(bench.app, name="bench")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code. A user's error is one line on stderr."""
    _terminate_as_ctrl_c_does()
    try:
        code = app(args=argv, prog_name="portkit", standalone_mode=False) or 0
        if code == INTERRUPTED:  # which typer makes of a Ctrl-C in a verb
            _say_error("interrupted", code)
    except Exit as exit_:
        code = exit_.exit_code
        if code == INTERRUPTED:  # which typer makes of it between them
            _say_error("interrupted", code)
    except TyperException as error:
        code = _say_error(error.format_message(), 2)
    except PortkitError as error:
        code = _say_error(str(error), error.exit_code)
    except (KeyboardInterrupt, Abort):
        code = _say_error("interrupted", INTERRUPTED)
    except BaseException as error:  # a library in another language may raise beside Exception
        code = _end_badly(error)
    sys.exit(code)


def _terminate_as_ctrl_c_does() -> None:
    """Have SIGTERM unwind what runs, so that nothing half made stays; where somebody has it heard
    or ignored already, it is theirs.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _end_badly(error: BaseException) -> int:
    """The exit code of what no verb expects: the system's refusals, and our own faults."""
    # A reader that has gone, as `head` does, makes typer exit by itself, with 1.
    cause = error.__context__ if isinstance(error, SystemExit) else error
    if isinstance(cause, OSError) and cause.errno == errno.EPIPE:
        # Silence stdout so that closing it cannot fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError):  # a full disk behind stdout, a folder that may not be read
        return _say_error(str(error), 2)
    return _say_error(_keep_traceback(error), INTERNAL_ERROR)


def _say_error(message: str, code: int) -> int:
    say(f"portkit: error: {' '.join(message.split())}", aside=True)
    return code


def _keep_traceback(error: BaseException) -> str:
    said = f"this is a fault of portkit itself ({type(error).__name__}: {error!s:.300}); "
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            prefix="portkit-",
            suffix=".txt",
            delete=False,
            encoding="utf-8",
            errors="backslashreplace",
        ) as file:
            file.write(f"{sys.argv}\n{''.join(traceback.format_exception(error))}")
    except OSError as problem:
        return f"{said}the traceback could not be kept ({problem.strerror})"
    return f"{said}the traceback is in {file.name}"
