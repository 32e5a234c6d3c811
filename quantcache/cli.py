"""Own the command line: arguments in, text or JSON out, errors to exit codes. No logic of its own."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from quantcache import __version__
from quantcache.cache import settings as settings_of
from quantcache.errors import QuantcacheError
from quantcache.render import Output
from quantcache.verbs import care, entries, models
from quantcache.verbs.common import TIME, VERBS, type_of

__all__ = ["main"]

#: they enter their verbs when they are imported; the order is that of the help
_VERB_MODULES = (models, entries, care)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("everywhere")
    add = group.add_argument
    hide = argparse.SUPPRESS
    add("--cache-dir", metavar="DIR", default=hide, help="the store (QUANTCACHE_DIR)")
    add("--json", action="store_true", default=hide, help="one JSON document on stdout")
    add("-q", "--quiet", action="store_true", default=hide, help="no words but errors")
    add("-v", "--verbose", action="store_true", default=hide, help="tracebacks, too")
    add("--no-progress", action="store_true", default=hide, help="no bars")
    add("--no-color", action="store_true", default=hide, help="no colours")
    add("--threads", type=type_of(settings_of.parse_threads), metavar="N", default=hide, help="0: one per core")
    add("--limit-size", metavar="SIZE", default=hide, help="the store's max_size (200GB)")
    add("--limit-free", metavar="SHARE", default=hide, help="the disk's keep_free (5%%)")
    add("--lock-timeout", type=TIME, metavar="TIME", default=hide, help="for another process's build")
    add("--shared", action="store_true", default=hide, help="accept a store of another user")
    parser = argparse.ArgumentParser(prog="quantcache", description="A store of quantized weights.", parents=[common], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"quantcache {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, (_, describe, configure) in VERBS.items():
        configure(verbs.add_parser(name, help=describe, description=describe, parents=[common], allow_abbrev=False))
    return parser


_DEFAULTS: dict[str, Any] = {"cache_dir": None, "json": False, "quiet": False, "verbose": False, "no_progress": False,
                             "no_color": False, "threads": None, "limit_size": None, "limit_free": None, "lock_timeout": None,
                             "shared": False}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; sys.argv if None.

    Returns:
        The exit code: 0 done, 1 failure or findings, 2 usage, 3 partly done, 4 not found, 10 no cache, 11 lock
        timeout, 12 store too new, 13 read-only, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):  # a name in a file system may be no text
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    output = Output(as_json=False, quiet=False, progress=False, color=False)
    try:
        options = parser.parse_args(arguments)
        for name, value in _DEFAULTS.items():
            setattr(options, name, getattr(options, name, value))
        output = Output(as_json=options.json, quiet=options.quiet, progress=not options.no_progress, color=not options.no_color)
        if not options.verb:
            parser.print_help(sys.stderr)
            return 2
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: output.problem("warning", str(message))
            warnings.simplefilter("always")
            code = VERBS[options.verb][0](options, output)
        sys.stdout.flush()
        return code
    except SystemExit as error:  # argparse
        return int(error.code or 0)
    except KeyboardInterrupt:
        output.problem("interrupted", "nothing unfinished was stored")
        return 130
    except BrokenPipeError:  # `quantcache ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (QuantcacheError, OSError, MemoryError) as error:
        if getattr(options, "verbose", False):
            traceback.print_exc()
        message, hint = str(error), getattr(error, "hint", None)
        if isinstance(error, MemoryError):
            message, hint = f"there is not enough memory: {message or 'the system gives no more'}", "fewer --threads take less"
        if output.as_json:
            output.document(error={"kind": type(error).__name__, "message": message, "hint": hint})
        output.problem("error", message, hint)
        return getattr(error, "exit_code", 1)


if __name__ == "__main__":
    sys.exit(main())
