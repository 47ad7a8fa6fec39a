"""The commands. Options are made from the settings in :mod:`pd_serve.config`; work is imported when it is known.

Errors that a user can mend end as one line on standard error and exit status 2, other errors of ours with 1.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from typing import Annotated, Any, cast

import typer

from pd_serve import __version__, config
from pd_serve.errors import ConfigError, ModelError, PDServeError
from pd_serve.settings import Setting

app = typer.Typer(
    name="pd-serve",
    help="Serve large language models with prefill and decode on separate nodes.",
    epilog="Start here: [bold]pd-serve up[/bold], then point any OpenAI client at http://127.0.0.1:8000/v1.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
_OFF = "no_"  # in front of a flag's name: that it was turned off

_bench = typer.Typer(help="Measure an endpoint, or how fast KV moves on this machine.", no_args_is_help=True)
app.add_typer(_bench, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pd-serve {__version__}")
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of ``pd-serve`` itself."""


def _command(name: str, about: str, examples: str) -> Callable[[Callable[[Any], int]], Callable[[Any], int]]:
    """Registers a command whose options are the settings of ``config.COMMANDS[name]``."""

    def register(run: Callable[[Any], int]) -> Callable[[Any], int]:
        def command(config_file: str | None, **flags: object) -> None:
            for setting in config.settings(name):
                if setting.kind.is_flag and flags.pop(_OFF + setting.name):
                    flags[setting.name] = False
                elif setting.kind.is_list and (given := flags[setting.name]) is not None:
                    flags[setting.name] = ",".join(cast(list[str], given)) if given else None  # typer has [] for none
            raise typer.Exit(run(config.load(name, flags, config_file=config_file)))

        group, _, own_name = name.rpartition(" ")
        first = config.settings(name)[0]
        precedence = (
            f"Every option is also a variable ({first.flag}: {first.variable}) and a key of the YAML file given with "
            f"--config ({first.name}). Flags win over variables, variables over the file."
        )
        parameters = [_config_parameter()]
        parameters += [parameter for setting in config.settings(name) for parameter in _parameters(setting)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__doc__ = f"{about}\n\n[bold]Examples[/bold]\n\n{_paragraphs(examples)}\n\n{precedence}"
        (_bench if group else app).command(own_name, help=command.__doc__)(command)
        return run

    return register


def _config_parameter() -> inspect.Parameter:
    option = typer.Option("--config", metavar="FILE", help="YAML file with settings.", show_default=False)
    return _keyword("config_file", Annotated[str | None, option])


def _parameters(setting: Setting) -> list[inspect.Parameter]:
    """One option; a flag has a second, hidden one that turns it off, named in the help of the first."""
    about = f"{setting.help} {setting.reason}" if setting.reason else setting.help
    about = about.replace("[", "\\[")  # rich would take it for a style
    options: dict[str, Any] = {"show_default": False, "rich_help_panel": setting.group}
    if not setting.kind.is_flag:
        unit = f" {setting.unit}" if setting.unit else ""
        default = f" [dim]\\[default: {setting.default_text}{unit}][/dim]" if setting.default_text else ""
        option = typer.Option(setting.flag, metavar=setting.kind.shape, help=about + default, **options)
        # a list may also come an item a flag
        kind = list[str] if setting.kind.is_list else str
        return [_keyword(setting.name, Annotated[kind | None, option])]
    off = f"--no-{setting.flag[2:]}"
    if setting.default is None:
        default = f"{off}: never"
    else:
        default = f"default: on; {off} turns it off" if setting.default else "default: off"
    shown = typer.Option(setting.flag, metavar="", help=f"{about} [dim]\\[{default}][/dim]", **options)
    hidden = typer.Option(off, hidden=True)
    return [
        _keyword(setting.name, Annotated[bool | None, shown]),
        _keyword(_OFF + setting.name, Annotated[bool | None, hidden]),
    ]


def _paragraphs(text: str) -> str:
    """The lines of each paragraph as one: terminals break them, at their own width."""
    return "\n\n".join(part if part.startswith(" ") else part.replace("\n", " ") for part in text.split("\n\n"))


def _keyword(name: str, annotation: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


@_command(
    "up",
    "Start a router and its nodes on this machine, and serve a model.",
    """    pd-serve up

    pd-serve up --prefill 2 --decode 2 --port 9000

    pd-serve up --both 2

    pd-serve up --prefill 0 --decode 1 --model /models/Llama-3.2-1B""",
)
def up(settings: config.UpConfig) -> int:
    from pd_serve.up import run

    return run(settings)


@_command(
    "prefill",
    "Run one prefill node: it computes prompts and hands their KV blocks to decode nodes.",
    """    pd-serve prefill --router http://10.0.0.1:8000 --host 10.0.0.2 --port 8100 --secret-file secret

    PD_SERVE_ROUTER=http://10.0.0.1:8000 pd-serve prefill --config node.yaml""",
)
def prefill(settings: config.NodeConfig) -> int:
    from pd_serve.node.main import run

    return run(settings)


@_command(
    "decode",
    "Run one decode node: it pulls KV blocks from prefill nodes and generates the text.",
    """    pd-serve decode --router http://10.0.0.1:8000 --host 10.0.0.3 --port 8200 --secret-file secret

    pd-serve decode --local-prefill-tokens 64 --router http://10.0.0.1:8000""",
)
def decode(settings: config.NodeConfig) -> int:
    from pd_serve.node.main import run

    return run(settings)


@_command(
    "node",
    "Run one node of any role: one of both computes prompts and generates text, and exchanges KV blocks with others.",
    """    pd-serve node --router http://10.0.0.1:8000 --host 10.0.0.4 --port 8300 --secret-file secret

    pd-serve node --role prefill --router http://10.0.0.1:8000

POST /role switches a running node.""",
)
def node(settings: config.NodeConfig) -> int:
    from pd_serve.node.main import run

    return run(settings)


@_command(
    "router",
    "Run one router: the OpenAI API in front of prefill and decode nodes.",
    """    pd-serve router --host 0.0.0.0 --api-key-file keys.txt

    pd-serve router --secret-file secret --prefill http://10.0.0.2:8100 --decode http://10.0.0.3:8200""",
)
def router(settings: config.RouterConfig) -> int:
    from pd_serve.router.main import run

    return run(settings)


@_command(
    "bench serve",
    "Load an OpenAI endpoint, any server's, and print how fast it answered.",
    """    pd-serve bench serve --input-len 1024 --output-len 64 --concurrency 8

    pd-serve bench serve --base-url http://10.0.0.1:8000 --request-rate 4 --requests 200 --json result.json

    pd-serve bench serve --dataset trace.csv --trace-speed 2 --requests 500""",
)
def bench_serve(settings: config.BenchConfig) -> int:
    from pd_serve.bench.serve import run

    return run(settings)


@_command(
    "bench transfer",
    "Measure how fast KV moves between two processes of this machine, by every transport, beside the raw limit.",
    """    pd-serve bench transfer

    pd-serve bench transfer --transports nixl --size 256MiB --block-sizes 16KiB,2MiB --png rates.png

    pd-serve bench transfer --device cuda --devices 0,1 --tp 2:1 --reader-block-tokens 64 --json rates.json

    pd-serve bench transfer --device cuda --size 1GiB --under-load

A source and a reader, each a process with a pool of its own, use the transports as nodes do: the reader pulls blocks of
each size, lying side by side and scattered, as one request and as many, and compares every byte.""",
)
def bench_transfer(settings: config.BenchTransferConfig) -> int:
    from pd_serve.bench.transfer.run import run

    return run(settings)


@_command(
    "doctor",
    "Say what this machine offers for moving KV, what pd-serve would use, how fast that is, and what to change.",
    """    pd-serve doctor

    pd-serve doctor --json > findings.json

    PD_SERVE_TRANSPORT=ucx pd-serve doctor

Run it where nodes run: in the same container, as the same user, with the same variables. A finding is ok, a note, or a
problem with what to do about it. The exit status is 1 when something is broken that pd-serve cannot do without, else
0. Nothing on the machine is changed.""",
)
def doctor(settings: config.DoctorConfig) -> int:
    from pd_serve.doctor.run import run

    return run(settings)


@_command(
    "token",
    "Print what to send as 'Authorization: Bearer TOKEN' to nodes' /sleep, /wake_up and /role, and to routers' /nodes.",
    """    pd-serve token --secret-file secret

    curl -X POST -H "Authorization: Bearer $(pd-serve token --secret-file secret)" https://10.0.0.3:8200/sleep

It is made from the secret, which cannot be found from it. Over plain HTTP whoever listens can use it too.""",
)
def token(settings: config.TokenConfig) -> int:
    from pd_serve.auth import admin_token

    secret = settings.node_secret()
    if not secret:
        raise ConfigError("there is no secret to make a token from: give --secret-file")
    print(admin_token(secret.encode()))
    return 0


@app.command()
def version() -> None:
    """Print the version."""
    print(f"pd-serve {__version__}")


def main() -> None:
    """The console script."""
    try:
        app()
    except PDServeError as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        print(f"pd-serve: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError | ModelError) else 1)


if __name__ == "__main__":
    main()
