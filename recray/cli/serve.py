"""Serve a bundle over HTTP as a Ray Serve application, until Ctrl-C."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from recray.cli.output import Output

EXAMPLE = "recray serve runs/bundle --port 8000"


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("bundle", metavar="BUNDLE", help="what `recray bundle` left")
    parser.add_argument("--config", metavar="FILE", help="a Serve config, see deployments/serve")
    parser.add_argument(
        "--profile",
        choices=("lite", "fast"),
        default="lite",
        help="fast: Serve's throughput flags, behind HAProxy (default lite)",
    )
    parser.add_argument("--p99", metavar="50ms", help="size all stages together so that 99 of 100 keep it")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1; another host needs a token")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument(
        "--state", metavar="DIR|redis://...", help="keeps users' events; default until the server stops"
    )
    parser.add_argument("--feedback", metavar="DIR", help="logs events and answers; default: in --state DIR")
    parser.add_argument("--token-file", metavar="FILE", help="holds the bearer token that is asked for")
    parser.add_argument("--address", help="of a Ray cluster; default $RAY_ADDRESS, else one is started")


def run(given: Namespace) -> Output:
    """Call the verb."""
    from recray import api

    api.serve(
        given.bundle,
        config=given.config,
        host=given.host,
        port=given.port,
        token_file=given.token_file,
        address=given.address,
        profile=given.profile,
        p99=given.p99,
        state=given.state,
        feedback=given.feedback,
    )
    return Output("")
