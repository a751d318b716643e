"""`hogwild demo`."""

import sys
from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add `demo` to the command line."""
    app.command("demo")(demo)


def demo(
    model: Path = typer.Option(
        Path(".cache/models/SmolLM2-135M-Instruct"), help="Where the demo's model is kept; made there if missing."
    ),
    data_dir: Path = typer.Option(Path(".hogwild/demo"), help="For logs and checkpoints; an earlier demo's is wiped."),
    steps: int = typer.Option(None, min=1, help="Optimizer steps; default: as many as the fact needs."),
    record: Path = typer.Option(None, help="Write what the demo printed to this SVG file."),
    keep_running: bool = typer.Option(False, "--keep-running", help="Go on serving afterwards, until Ctrl-C."),
) -> None:
    """Watch a served model learn a fact: ask, train, ask the same running vLLM again, save a checkpoint.

    Exits non-zero when the fact was not learned.
    """
    from hogwild import demo as demonstration
    from hogwild.demo_model import make_demo_model

    make_demo_model(model)
    learned = demonstration.run(model, data_dir, steps=steps or demonstration.STEPS, keep_running=keep_running)
    if record:
        demonstration.console.save_svg(str(record), title="make demo")
    sys.exit(0 if learned else 1)
